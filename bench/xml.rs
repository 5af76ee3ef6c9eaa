//! What XML costs per stanza: framing and the checked view of a usual chat message, each alone and together, and for
//! comparison the same message as an owned tree; and what all that is done with it costs, from read to written: its start
//! tag is stamped, both sides are put into the group for the journal, it is delivered. Run: `cargo bench --bench xml`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nitro::xml::{Element, Framer, Limits, StreamNs, View};

#[path = "house.rs"]
mod house;
use house::House;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HEADER: &[u8] = b"<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='localhost' version='1.0'>";

/// 220 bytes: what a graphical client sends with a line of chat.
const CHAT: &[u8] = b"<message to='bob@localhost/desk' id='c0ffee42' type='chat' xml:lang='en'>\
<body>EURUSD 1.0842/44, can you do 25m?</body>\
<active xmlns='http://jabber.org/protocol/chatstates'/>\
<request xmlns='urn:xmpp:receipts'/></message>";

fn in_stream() -> Framer {
    let mut framer = Framer::new();
    framer
        .next(HEADER, &Limits::default())
        .expect("a header")
        .expect("a whole header");
    framer
}

fn chat(c: &mut Criterion) {
    let limits = Limits::default();
    let ns = StreamNs::client();
    let mut group = c.benchmark_group("chat");
    group.throughput(Throughput::Bytes(CHAT.len() as u64));
    let mut framer = in_stream();
    group.bench_function("frame", |b| {
        b.iter(|| framer.next(black_box(CHAT), &limits))
    });
    group.bench_function("view", |b| {
        b.iter(|| {
            black_box(View::parse(black_box(CHAT), &ns, &limits).expect("well-formed")).standalone()
        })
    });
    group.bench_function("frame+view", |b| {
        b.iter(|| {
            let frame = framer
                .next(black_box(CHAT), &limits)
                .expect("well-formed")
                .expect("whole");
            black_box(View::parse(&CHAT[..frame.len], &ns, &limits).expect("well-formed"))
                .standalone()
        })
    });
    group.bench_function("element", |b| {
        b.iter(|| Element::parse_in(black_box(CHAT), &ns, &limits))
    });
    group.finish();
}

/// Much text, little markup.
fn long_body(c: &mut Criterion) {
    let limits = Limits::default();
    let ns = StreamNs::client();
    let body = "The quick brown fox jumps over the lazy dog. ".repeat(90);
    let stanza = format!("<message to='bob@localhost' type='chat'><body>{body}</body></message>");
    let mut framer = in_stream();
    let mut group = c.benchmark_group("4 KiB body");
    group.throughput(Throughput::Bytes(stanza.len() as u64));
    group.bench_function("frame+view", |b| {
        b.iter(|| {
            let frame = framer
                .next(black_box(stanza.as_bytes()), &limits)
                .expect("well-formed")
                .expect("whole");
            black_box(
                View::parse(&stanza.as_bytes()[..frame.len], &ns, &limits).expect("well-formed"),
            )
            .standalone()
        })
    });
    group.finish();
}

/// Through the slice of one shard, without sockets, TLS and disk.
fn slice(c: &mut Criterion) {
    let mut group = c.benchmark_group("slice");
    group.throughput(Throughput::Elements(1));
    let mut house = House::new();
    for (name, stanza) in [
        ("message, archived on both sides", house::CHAT),
        ("message, not stored", house::FLEETING),
    ] {
        group.bench_function(name, |b| b.iter(|| house.chat(black_box(stanza))));
    }
    // with the client's side of SCRAM, and the log-out
    let mut house = House::new();
    for (name, user) in [("login", "carol"), ("login, 20 contacts on line", "alice")] {
        group.bench_function(name, |b| b.iter(|| house.log_in(black_box(user))));
    }
    group.finish();
}

criterion_group!(benches, chat, long_body, slice);
criterion_main!(benches);
