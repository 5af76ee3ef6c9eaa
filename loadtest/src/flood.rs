//! `flood`: hostile clients beside live users: who never says anything, who trickles, who sends what is no XML, a stanza
//! without end or elements without end, who guesses passwords. How the server answers each, how much it takes of them, and
//! whether the live users notice.
//!
//! Each attacker is a thread with one blocking connection at a time, without any of the generator's own machinery:
//! what is sent here is wrong on purpose.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine};

use crate::element::{escape, find, tags};
use crate::fleet::{Fleet, raise_file_limit};
use crate::live::Live;
use crate::options::{Attack, FloodOptions, Global, Target, TlsMode};
use crate::report::Report;

/// An attacker looks for an answer so often.
const PATIENCE: Duration = Duration::from_millis(50);
/// And gives a connection up after this time.
const CONNECTION_MAX: Duration = Duration::from_secs(20);
/// A block of what has no end.
const BLOCK: usize = 64 * 1024;
/// Of a trickle.
const TRICKLE_EVERY: Duration = Duration::from_millis(100);

/// How connections ended, of one kind of attack.
#[derive(Default)]
struct Answers {
    /// How often, and the sum of the seconds until then.
    ends: BTreeMap<String, (u64, f64)>,
}

struct Shared {
    target: Target,
    over: AtomicBool,
    connections: AtomicU64,
    bytes: AtomicU64,
    answers: Mutex<BTreeMap<Attack, Answers>>,
}

pub fn run(global: &Global, options: &FloodOptions) -> Result<Report, String> {
    if global.tls == TlsMode::Direct {
        return Err("flood speaks without TLS: --tls none".into());
    }
    if global.websocket.is_some() {
        return Err("flood speaks without WebSocket".into());
    }
    raise_file_limit(u64::from(options.attackers) + u64::from(options.live.live_users))?;
    let mut report = Report::new("flood");
    // no users of its own: it watches the server
    let watch = Global {
        users: 1,
        ..global.clone()
    };
    let fleet = Fleet::start(&watch, global.target()?)?;
    let live = Live::start(global, &options.live, &mut report)?;
    if report.is_failure() {
        fleet.stop(&mut report)?;
        return Ok(report);
    }
    let attacks = if options.attack.is_empty() {
        Attack::ALL.to_vec()
    } else {
        options.attack.clone()
    };
    let shared = Arc::new(Shared {
        target: global.target()?,
        over: AtomicBool::new(false),
        connections: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
        answers: Mutex::default(),
    });
    let memory_before = fleet.server_rss_kib();
    let before = fleet.snapshot();
    if let Some(live) = &live {
        live.begin_phase();
    }
    let start = Instant::now();
    let attackers: Vec<_> = (0..options.attackers as usize)
        .map(|number| {
            let (shared, attack) = (shared.clone(), attacks[number % attacks.len()]);
            thread::Builder::new()
                .name(format!("attacker-{number}"))
                .spawn(move || attack_until_over(&shared, attack))
                .map_err(|error| format!("starting an attacker: {error}"))
        })
        .collect::<Result<_, _>>()?;
    let mut memory_most = memory_before;
    fleet.watch("flood", Duration::from_secs_f64(options.duration), || {
        memory_most = memory_most.max(fleet.server_rss_kib());
        let beside = live.as_ref().map(Live::progress).unwrap_or_default();
        let connections = shared.connections.load(Ordering::Relaxed);
        format!("{connections} connections; messages of others {beside}")
    });
    let usage = before.until(&fleet.snapshot());
    report.band("flood", start, Instant::now(), true);
    if let Some(live) = &live {
        live.begin_phase();
    }
    shared.over.store(true, Ordering::Relaxed);
    for attacker in attackers {
        let _ = attacker.join();
    }
    let chat = live.map(|live| live.finish(&mut report)).transpose()?;

    report.number("attackers", "attackers", options.attackers, "");
    report.number("seconds", "for", usage.wall.as_secs_f64(), "s");
    let connections = shared.connections.load(Ordering::Relaxed);
    report.number("connections", "connections", connections, "");
    let mib = shared.bytes.load(Ordering::Relaxed) as f64 / (1024.0 * 1024.0);
    report.number("mib_sent", "sent", mib, "MiB");
    for (attack, answers) in shared.answers.lock().expect("nobody panics").iter() {
        for (end, (count, seconds)) in &answers.ends {
            let mean = seconds / *count as f64;
            let (key, label) = (attack.name(), format!("{}: {end}", attack.name()));
            let key = format!("{key}_{}", key_of(end));
            report.number(&key, &label, *count, &format!("(after {mean:.2} s)"));
        }
    }
    if let (Some(before), Some(most)) = (memory_before, memory_most) {
        report.number("rss_before_kib", "server memory before", before, "KiB");
        report.number("rss_most_kib", "server memory at most", most, "KiB");
    }
    if let Some(server) = usage.server {
        let cores = server.as_secs_f64() / usage.wall.as_secs_f64();
        report.number("server_cores", "server CPU", cores, "cores");
    }
    if let Some(chat) = &chat {
        chat.report(&mut report, "flood", "in the flood");
    }
    report.bottleneck(&usage);
    fleet.stop(&mut report)?;
    Ok(report)
}

/// `stream error not-well-formed` as part of a key.
fn key_of(end: &str) -> String {
    end.chars()
        .map(|letter| {
            if letter.is_ascii_alphanumeric() {
                letter
            } else {
                '_'
            }
        })
        .collect()
}

fn attack_until_over(shared: &Shared, attack: Attack) {
    while !shared.over.load(Ordering::Relaxed) {
        let start = Instant::now();
        let end = one_connection(shared, attack);
        shared.connections.fetch_add(1, Ordering::Relaxed);
        let mut answers = shared.answers.lock().expect("nobody panics");
        let ends = &mut answers.entry(attack).or_default().ends;
        let entry = ends.entry(end).or_default();
        entry.0 += 1;
        entry.1 += start.elapsed().as_secs_f64();
        drop(answers);
        if start.elapsed() < Duration::from_millis(1) {
            // refused at once: do not spin
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// When the attacker gave it up, or at the end of the flood.
const STILL_OPEN: &str = "still open";

/// How it ended.
fn one_connection(shared: &Shared, attack: Attack) -> String {
    let target = &shared.target;
    let mut stream = match TcpStream::connect_timeout(&target.address, CONNECTION_MAX) {
        Ok(stream) => stream,
        Err(_) => return "refused".into(),
    };
    let ready = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    if ready.is_err() {
        return "refused".into();
    }
    let start = Instant::now();
    let mut said = Vec::new();
    let mut rounds = 0;
    while start.elapsed() < CONNECTION_MAX && !shared.over.load(Ordering::Relaxed) {
        let bytes = attack.bytes(target, rounds);
        if !bytes.is_empty() {
            match stream.write(&bytes) {
                Ok(count) => {
                    shared.bytes.fetch_add(count as u64, Ordering::Relaxed);
                }
                Err(error) if is_wait(error.kind()) => {}
                // what it said before it closed is read below
                Err(_) => {}
            }
        }
        rounds += 1;
        // who floods does not wait for answers
        let patient = bytes.len() < BLOCK;
        let _ = stream.set_nonblocking(!patient);
        let read = read_some(&mut stream, &mut said);
        let _ = stream.set_nonblocking(false);
        if let Some(end) = read {
            return end;
        }
    }
    STILL_OPEN.into()
}

fn is_wait(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// `None`: it goes on.
fn read_some(stream: &mut TcpStream, said: &mut Vec<u8>) -> Option<String> {
    let mut buffer = [0; 4096];
    match stream.read(&mut buffer) {
        Ok(0) => Some(answer(said).unwrap_or("closed without a word".into())),
        Ok(count) => {
            said.extend_from_slice(&buffer[..count]);
            let end = answer(said);
            // what is not an end is not needed any more
            if end.is_none() && said.len() > BLOCK {
                said.clear();
            }
            end
        }
        Err(error) if is_wait(error.kind()) => None,
        Err(_) => Some(answer(said).unwrap_or("reset".into())),
    }
}

/// The stream error or SASL failure in what the server said.
fn answer(said: &[u8]) -> Option<String> {
    for (element, what) in [
        (&b"error"[..], "stream error"),
        (b"failure", "SASL failure"),
    ] {
        if let Some(start) = find(said, element) {
            let mut inner =
                tags(&said[start.raw.as_ptr() as usize - said.as_ptr() as usize..]).skip(1);
            let condition = inner.find(|tag| !tag.closing)?;
            return Some(format!(
                "{what} {}",
                String::from_utf8_lossy(condition.name)
            ));
        }
    }
    None
}

impl Attack {
    const ALL: [Attack; 6] = [
        Attack::Silent,
        Attack::Trickle,
        Attack::Garbage,
        Attack::Endless,
        Attack::Nested,
        Attack::Guess,
    ];

    fn name(self) -> &'static str {
        match self {
            Attack::Silent => "silent",
            Attack::Trickle => "trickle",
            Attack::Garbage => "garbage",
            Attack::Endless => "endless",
            Attack::Nested => "nested",
            Attack::Guess => "guess",
        }
    }

    /// What is sent next.
    fn bytes(self, target: &Target, round: u64) -> Vec<u8> {
        let header = format!(
            "<?xml version='1.0'?><stream:stream xmlns='jabber:client' \
             xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='{}'>",
            escape(&target.domain)
        )
        .into_bytes();
        match (self, round) {
            (Attack::Silent, _) => Vec::new(),
            (Attack::Trickle, _) => {
                thread::sleep(TRICKLE_EVERY);
                header
                    .get(round as usize)
                    .map_or(vec![b' '], |byte| vec![*byte])
            }
            (Attack::Garbage, _) => {
                // xorshift: no secret, only no XML
                let mut state = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                (0..512)
                    .map(|_| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state as u8
                    })
                    .collect()
            }
            (_, 0) => header,
            (Attack::Endless, 1) => {
                b"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>".to_vec()
            }
            (Attack::Endless, _) => vec![b'A'; BLOCK],
            (Attack::Nested, _) => b"<a>".repeat(BLOCK / 3 + 1),
            (Attack::Guess, 1) => {
                let guess = BASE64_STANDARD.encode("\0load0\0wrong");
                format!("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{guess}</auth>").into_bytes()
            }
            (Attack::Guess, _) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_says_at_the_end_is_told() {
        let said = |text: &str| answer(text.as_bytes());
        assert_eq!(said("<stream:stream id='1'><stream:features/>"), None);
        assert_eq!(
            said(
                "<stream:features/><stream:error><not-well-formed xmlns='x'/><text>no</text></stream:error></stream:stream>"
            ),
            Some("stream error not-well-formed".into())
        );
        assert_eq!(
            said("<failure xmlns='x'><not-authorized/></failure>"),
            Some("SASL failure not-authorized".into())
        );
        assert_eq!(said("<failure xmlns='x'>"), None);
        assert_eq!(
            key_of("stream error not-well-formed"),
            "stream_error_not_well_formed"
        );
    }

    #[test]
    fn attacks_are_what_they_are_called() {
        let target = Target::for_tests();
        assert!(Attack::Silent.bytes(&target, 5).is_empty());
        assert_eq!(Attack::Nested.bytes(&target, 1)[..6], *b"<a><a>");
        assert!(
            Attack::Endless
                .bytes(&target, 9)
                .iter()
                .all(|byte| *byte == b'A')
        );
        assert!(std::str::from_utf8(&Attack::Garbage.bytes(&target, 3)).is_err());
        assert_ne!(
            Attack::Garbage.bytes(&target, 3),
            Attack::Garbage.bytes(&target, 5)
        );
    }
}
