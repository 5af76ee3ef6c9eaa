//! What it costs, measured on demand:
//! `cargo test --release --lib store::sql::tests::figures -- --ignored --nocapture --test-threads 1`

use std::time::Instant;

use super::*;

/// CPU of this process, all its threads, and of the server.
fn cpu(place: &Place) -> (Duration, Duration) {
    let of = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..]
            .split_whitespace()
            .collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    };
    let server = place.server.as_ref();
    (
        of("self"),
        server.map_or(Duration::ZERO, |server| of(&server.pid().to_string())),
    )
}

fn tell(what: &str, place: &Place, count: usize, work: impl FnOnce()) {
    let (before, began) = (cpu(place), Instant::now());
    work();
    let (after, wall) = (cpu(place), began.elapsed());
    let each = |part: Duration| part.as_secs_f64() * 1e6 / count as f64;
    let kind = if place.server.is_some() {
        "MariaDB"
    } else {
        "SQLite"
    };
    println!(
        "{kind:8} {what:60} {:6.2} us + {:6.2} us of the server, {:6.2} us on the clock",
        each(after.0 - before.0),
        each(after.1 - before.1),
        each(wall)
    );
}

const USERS: usize = 10_000;
const MESSAGES: usize = 200_000;

#[test]
#[ignore = "measures for a minute"]
fn cpu_of_a_drained_entry_and_of_a_cold_load() {
    for place in places() {
        let affinity: Vec<usize> = std::env::var("NITRO_FIGURES_CORE")
            .ok()
            .and_then(|core| core.parse().ok())
            .into_iter()
            .collect();
        let names: Vec<String> = (0..USERS).map(|n| format!("trader{n:05}")).collect();
        let (fifty, stanza) = (record(50), [b'x'; 300]);
        for records_max in [1_000, 4_000, 10_000] {
            let bench = Bench::start(&place.database, 1, |config| {
                config.affinity = (!affinity.is_empty()).then(|| affinity.clone());
                config.drain.linger = Duration::from_millis(50);
                config.drain.records_max = records_max;
                config.drain.bytes_max = 8 << 20;
                config.drain.ahead_bytes_max = 32 << 20;
            });
            let revision = Id::at(1_780_000_000_000 + records_max as u64).0;
            let adds: Vec<_> = names
                .iter()
                .map(|name| add(name, revision, &fifty))
                .collect();
            bench.journals[0].push(&adds);
            bench.all_drained(0);
            // Each message is two entries: of the one who sent it and of the one who got it; half of them wait.
            let base = 1_790_000_000_000 + records_max as u64 * 1_000_000;
            for waiting in [false, true] {
                let mut changes = Vec::new();
                for n in 0..MESSAGES / 2 {
                    let id = Id::at(base + n as u64 + u64::from(waiting) * 500_000).0;
                    let (from, to) = (n * 7919 % USERS, n * 104_729 % USERS);
                    let (sent, got) = (
                        Message::ARCHIVE | Message::SENT,
                        Message::ARCHIVE
                            | Message::RECEIVED
                            | if waiting { Message::PENDING } else { 0 },
                    );
                    let entry = |owner: usize, id, what| {
                        Change::Message(Message {
                            stanza: &stanza,
                            ..message(&names[owner], id, what, "juliet@example.com/balcony")
                        })
                    };
                    changes.push(entry(from, id, sent));
                    changes.push(entry(to, id + (1 << 13), got));
                }
                let bytes: Vec<Vec<u8>> = encode(&changes).into_iter().map(|b| b.payload).collect();
                let what = format!(
                    "entry drained, {records_max} a transaction{}",
                    if waiting { ", half pending" } else { "" }
                );
                let before = bench.sender.counters().statements.load(Relaxed);
                tell(&what, &place, MESSAGES, || {
                    bench.journals[0].push_bytes(bytes);
                    bench.all_drained(0);
                });
                let statements = bench.sender.counters().statements.load(Relaxed) - before;
                println!(
                    "         {:.4} statements an entry",
                    statements as f64 / MESSAGES as f64
                );
                if waiting {
                    let ids: Vec<u64> = changes
                        .iter()
                        .filter_map(|change| match change {
                            Change::Message(one) if one.what & Message::PENDING != 0 => {
                                Some(one.id)
                            }
                            _ => None,
                        })
                        .collect();
                    let marks: Vec<_> = ids
                        .chunks(10)
                        .map(|done| {
                            Change::Marks(Marks {
                                done,
                                ..Marks::default()
                            })
                        })
                        .collect();
                    tell(
                        "mark of a pending one drained later",
                        &place,
                        ids.len(),
                        || {
                            bench.journals[0].push(&marks);
                            bench.all_drained(0);
                        },
                    );
                }
            }
            bench.lane.stop();
        }
        let bench = Bench::start(&place.database, 1, |config| {
            config.affinity = (!affinity.is_empty()).then(|| affinity.clone());
        });
        let before = bench.sender.counters().statements.load(Relaxed);
        tell(
            "cold load, 50 contacts, 10,000 at once",
            &place,
            USERS,
            || {
                let loads = names.iter().map(|name| Request::Load {
                    name: name.as_str().into(),
                });
                bench.send(loads.collect());
                bench.answers(USERS);
            },
        );
        let statements = bench.sender.counters().statements.load(Relaxed) - before;
        println!(
            "         {:.4} statements a load",
            statements as f64 / USERS as f64
        );
        tell("cold load, alone", &place, 1_000, || {
            for name in &names[..1_000] {
                bench.load(name).unwrap();
            }
        });
        let page = |with: Option<&str>, count| {
            let query = Query::Archive(crate::store::tier2::ArchiveQuery {
                name: names[7].as_str().into(),
                with: with.map(Into::into),
                most: 50,
                backwards: true,
                count,
                ..Default::default()
            });
            for _ in 0..500 {
                bench.send(vec![Request::Read {
                    ticket: 1,
                    query: query.clone(),
                }]);
                bench.answers(1);
            }
        };
        tell("last page of 50", &place, 500, || page(None, false));
        tell("last page of 50 with a peer, counted", &place, 500, || {
            page(Some("juliet@example.com"), true)
        });
        bench.lane.stop();
    }
}

#[test]
#[ignore = "measures for half a minute"]
fn a_page_of_a_large_archive_with_a_rare_peer() {
    for place in places() {
        let bench = Bench::start(&place.database, 1, |config| {
            config.drain.linger = Duration::from_millis(50);
        });
        let (none, stanza) = (record(0), [b'x'; 300]);
        bench.journals[0].push(&[add("romeo", 1, &none)]);
        let changes: Vec<_> = (0..200_000)
            .map(|n| {
                let peer = if n == 1_000 {
                    "paris@example.com"
                } else {
                    "juliet@example.com/balcony"
                };
                Change::Message(Message {
                    stanza: &stanza,
                    ..message(
                        "romeo",
                        Id::at(1_790_000_000_000 + n).0,
                        Message::ARCHIVE,
                        peer,
                    )
                })
            })
            .collect();
        bench.journals[0].push(&changes);
        bench.all_drained(0);
        for (what, with, count, backwards) in [
            ("last page of 50", None, false, true),
            ("last page of 50, counted", None, true, true),
            (
                "last page with a rare peer",
                Some("paris@example.com"),
                false,
                true,
            ),
            (
                "last page with a rare peer, counted",
                Some("paris@example.com"),
                true,
                true,
            ),
            (
                "first page with the usual peer",
                Some("juliet@example.com"),
                false,
                false,
            ),
        ] {
            let query = Query::Archive(crate::store::tier2::ArchiveQuery {
                name: "romeo".into(),
                with: with.map(Into::into),
                most: 50,
                backwards,
                count,
                ..Default::default()
            });
            tell(&format!("archive of 200,000: {what}"), &place, 20, || {
                for _ in 0..20 {
                    let query = query.clone();
                    bench.send(vec![Request::Read { ticket: 1, query }]);
                    bench.answers(1);
                }
            });
        }
        bench.lane.stop();
    }
}
