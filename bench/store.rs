//! What the tiers cost: placement, reading a cached record, collecting a group for the journal, cold loads from SQL.
//! `cargo bench --bench store`; set `NITRO_BENCH_DIR` to measure the disk that matters.

use std::hint::black_box;
use std::sync::mpsc::{Receiver, channel};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nitro::store::cache::Cache;
use nitro::store::change::{Change, Message};
use nitro::store::journal::{Group, format};
use nitro::store::record::{Record, RosterItem, ScramKeys, Subscription, UserRecord};
use nitro::store::ring::Ring;
use nitro::store::sql::Database;
use nitro::store::sql::admin::Store;
use nitro::store::sql::lane::{AnswerSink, Lane, LaneConfig};
use nitro::store::tier::{Answer, Request};

const USERS: usize = 10_000;
const AT_ONCE: usize = 1_000;

fn keys(hash_len: usize) -> ScramKeys {
    ScramKeys {
        iterations: 10_000,
        salt: vec![7; 16],
        stored_key: vec![8; hash_len],
        server_key: vec![9; hash_len],
    }
}

fn user(contacts: usize) -> UserRecord {
    let contact = |n| RosterItem {
        jid: format!("trader{n:05}@example.com"),
        name: format!("Trader {n}"),
        groups: vec!["Desk".into()],
        subscription: Subscription::Both,
        ..RosterItem::default()
    };
    UserRecord {
        sha1: Some(keys(20)),
        sha256: Some(keys(32)),
        roster: (0..contacts).map(contact).collect(),
        ..UserRecord::default()
    }
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("trader{n:05}")).collect()
}

fn ring(c: &mut Criterion) {
    let ring = Ring::of_shards(16);
    let names = names(USERS);
    let mut group = c.benchmark_group("ring");
    group.throughput(Throughput::Elements(names.len() as u64));
    group.bench_function("lookup", |b| {
        b.iter(|| {
            names
                .iter()
                .map(|name| ring.owner(black_box(name)))
                .sum::<usize>()
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("build of 16", |b| b.iter(|| Ring::of_shards(black_box(16))));
    group.finish();
}

fn record(c: &mut Criterion) {
    let names = names(USERS);
    let mut cache = Cache::new(1 << 30);
    let record = Record::new(&user(50));
    for name in &names {
        cache.insert(name, record.clone(), record.bytes().len());
    }
    let mut group = c.benchmark_group("record of 50 contacts");
    group.throughput(Throughput::Elements(names.len() as u64));
    group.bench_function("found in the cache, one contact read", |b| {
        b.iter(|| {
            let contact = black_box("trader00033@example.com");
            let found = |name: &&String| {
                let record = cache.get(name).map(Record::get);
                record
                    .and_then(|user| user.roster_item(contact))
                    .is_some_and(|item| item.approved)
            };
            names.iter().filter(found).count()
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("checked on entry", |b| {
        b.iter(|| Record::from_bytes(black_box(record.bytes())).is_ok());
    });
    let owned = user(50);
    group.bench_function("archived", |b| b.iter(|| Record::new(black_box(&owned))));
    group.finish();
}

/// What the hot path pays for a message at one owner: encoding into the group that is being collected.
fn group(c: &mut Criterion) {
    let stanza = [b'x'; 220];
    let change = Change::Message(Message {
        id: 1 << 60,
        owner: "trader00001",
        what: Message::RECEIVED | Message::PENDING | Message::ARCHIVE,
        kind: 0,
        flags: 1,
        peer: "trader00002@example.com/desk",
        twin: 1 << 60,
        stream: "",
        count: 0,
        stanza: &stanza,
    });
    let mut collected = Group::new();
    let mut bench = c.benchmark_group("journal");
    bench.throughput(Throughput::Elements(1000));
    bench.bench_function("a message of 220 bytes appended to a group", |b| {
        b.iter(|| {
            collected.clear();
            for seq in 1..=1000 {
                black_box(collected.append(seq, black_box(&change)));
            }
        });
    });
    // what the committer does before it writes: checksums of a group of 100 records of 300 bytes
    let mut bytes = vec![0; format::GROUP_HEAD as usize];
    for _ in 0..100 {
        bytes.extend(300_u32.to_le_bytes());
        bytes.extend([0; format::RECORD_HEAD as usize - 4]);
        bytes.extend([b'x'; 300]);
    }
    bench.throughput(Throughput::Bytes(bytes.len() as u64));
    bench.bench_function("a group of 100 records sealed", |b| {
        b.iter(|| format::seal(black_box(&mut bytes), 7, 1, 1, 100));
    });
    bench.finish();
}

fn database(folder: &tempfile::TempDir) -> Database {
    Database::Sqlite(folder.path().join("nitro.db"))
}

struct Bench {
    lane: Lane,
    answers: Receiver<Vec<Answer>>,
}

impl Bench {
    fn start(folder: &tempfile::TempDir) -> Bench {
        let (to, answers) = channel();
        let sink: AnswerSink = Box::new(move |batch| to.send(batch).expect("the bench listens"));
        let mut config = LaneConfig::new(database(folder));
        config.affinity = Some(vec![0]);
        let lane = Lane::start(config, vec![sink], Vec::new(), Box::new(|_, _| {}));
        Bench {
            lane: lane.expect("a fresh database opens"),
            answers,
        }
    }

    /// Sends one batch and waits until it is answered.
    fn round(&self, requests: Vec<Request>) {
        let mut left = requests.len();
        self.lane
            .sender()
            .try_send(0, requests)
            .expect("the queue is empty");
        while left > 0 {
            left -= self.answers.recv().expect("the lane answers").len();
        }
    }
}

fn sql(c: &mut Criterion) {
    let folder = match std::env::var_os("NITRO_BENCH_DIR") {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    };
    let folder = folder.expect("a folder for the database can be made");
    let names = names(USERS);
    let record = Record::new(&user(50));
    let mut store = Store::open(&database(&folder)).expect("a fresh database opens");
    let users = names.iter().map(|name| (name.clone(), record.clone()));
    store
        .add_users(users, |_| {})
        .expect("an import into a fresh database succeeds");
    drop(store);
    let bench = Bench::start(&folder);

    let mut group = c.benchmark_group("sql");
    group.sample_size(20);
    group.throughput(Throughput::Elements(AT_ONCE as u64));
    let mut at = 0;
    let mut next = || {
        at = (at + 7919) % USERS;
        names[at].as_str().into()
    };
    group.bench_function("cold loads, 50 contacts, 1,000 at once", |b| {
        b.iter(|| {
            bench.round(
                (0..AT_ONCE)
                    .map(|_| Request::Load { name: next() })
                    .collect(),
            )
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("cold load, alone", |b| {
        b.iter(|| bench.round(vec![Request::Load { name: next() }]));
    });
    group.finish();
    bench.lane.stop();
}

fn import(c: &mut Criterion) {
    let record = Record::new(&user(0));
    let mut group = c.benchmark_group("import");
    group.sample_size(10);
    group.throughput(Throughput::Elements(100_000));
    group.bench_function("100,000 accounts", |b| {
        b.iter(|| {
            let folder = tempfile::tempdir().expect("a folder for the database can be made");
            let mut store = Store::open(&database(&folder)).expect("opens");
            let users = (0..100_000).map(|n| (format!("trader{n:06}"), record.clone()));
            store
                .add_users(users, |_| {})
                .expect("an import into a fresh database succeeds")
        });
    });
    group.finish();
}

criterion_group!(benches, ring, record, group, sql, import);
criterion_main!(benches);
