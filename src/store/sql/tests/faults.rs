//! The lane and the drain: batches, and what happens while databases refuse, hang and die.

use std::time::Instant;

use super::*;
use crate::store::tier::ArchiveQuery;

#[test]
fn loads_that_wait_together_are_one_statement() {
    for place in places() {
        let bench = Bench::start(&place.database, 1, |_| {});
        let records: Vec<Record> = (0..50).map(record).collect();
        let names: Vec<String> = (0..50).map(|n| format!("trader{n}")).collect();
        let adds: Vec<_> = (1..)
            .zip(names.iter().zip(&records))
            .map(|(n, (name, record))| add(name, n, record))
            .collect();
        bench.journals[0].push(&adds);
        bench.all_drained(0);
        bench.load("trader0").unwrap();
        let before = bench.sender.counters().statements.load(Relaxed);
        // Twice each, and somebody whom nobody knows.
        let again = names.iter().chain(&names[..49]).map(String::as_str);
        let requests = again
            .chain(["nobody"])
            .map(|name| Request::Load { name: name.into() });
        bench.send(
            requests
                .filter(|one| !matches!(one, Request::Load { name } if &**name == "trader49"))
                .collect(),
        );
        let answers = bench.answers(99);
        let mut found = 0;
        for answer in answers {
            let Answer::Loaded { name, user } = answer else {
                panic!("{answer:?}")
            };
            let expected = name
                .strip_prefix("trader")
                .map(|n| n.parse::<usize>().unwrap());
            assert_eq!(user.map(|user| user.record.get().roster.len()), expected);
            found += usize::from(expected.is_some());
        }
        assert_eq!(found, 98);
        let counters = bench.sender.counters();
        assert_eq!(counters.statements.load(Relaxed) - before, 1);
        assert_eq!(counters.queue_depth.load(Relaxed), 0);
    }
}

#[test]
fn a_thousand_messages_are_drained_by_a_handful_of_statements() {
    for place in places() {
        let bench = Bench::start(&place.database, 1, |config| {
            config.drain.linger = Duration::from_millis(100);
        });
        let record = record(1);
        let names: Vec<String> = (0..100).map(|n| format!("trader{n}")).collect();
        let adds: Vec<_> = (1..)
            .zip(&names)
            .map(|(n, name)| add(name, n, &record))
            .collect();
        bench.journals[0].push(&adds);
        bench.all_drained(0);
        let before = bench.sender.counters().statements.load(Relaxed);
        let name = |n: u64| &*names[n as usize % 100];
        let messages: Vec<_> = (1_000..2_000)
            .map(|id| Change::Message(message(name(id), id, BOTH, "juliet@example.com")))
            .collect();
        bench.journals[0].push(&messages);
        let done: Vec<u64> = (1_000..2_000).collect();
        bench.journals[0].push(&[Change::Marks(Marks {
            done: &done,
            ..Marks::default()
        })]);
        bench.all_drained(0);
        let counters = bench.sender.counters();
        // BEGIN, epoch, two for 100 names, ten of 100 rows, position, COMMIT, a look at what is gone; and the rows that
        // were seen last.
        let statements = counters.statements.load(Relaxed) - before;
        assert!(statements <= 20, "{statements} statements");
        assert_eq!(counters.drained.load(Relaxed), 1_101);
        assert_eq!(bench.load("trader7").unwrap().unwrap().pending, []);
    }
}

#[test]
fn journals_are_merged_by_time_and_stay_in_order() {
    for place in places() {
        let bench = Bench::start(&place.database, 2, |config| {
            config.drain.records_max = 3;
        });
        // His account is in an old shard's journal, his messages in the new one's, which comes first.
        let (first, second) = (record(1), record(2));
        *bench.journals[0].limit.lock().unwrap() = Some(0);
        *bench.journals[1].limit.lock().unwrap() = Some(0);
        let new: Vec<_> = (200..220)
            .map(|id| Change::Message(message("romeo", id, BOTH, "x@y")))
            .collect();
        bench.journals[0].push(&new);
        bench.journals[1].push(&[
            add("romeo", 100, &first),
            Change::PutUser {
                name: "romeo",
                revision: 150,
                record: second.bytes(),
            },
        ]);
        for journal in &bench.journals {
            *journal.limit.lock().unwrap() = None;
            journal.push(&[]);
        }
        bench.all_drained(0);
        let loaded = bench.load("romeo").unwrap().unwrap();
        assert_eq!((loaded.pending.len(), loaded.record), (20, second));
        assert_eq!(bench.sender.counters().skipped.load(Relaxed), 0);
    }
}

#[test]
fn a_large_journal_does_not_overtake_an_old_one() {
    let place = sqlite();
    let (first, stanza) = (record(1), vec![b'x'; 100_000]);
    let journals: Vec<Arc<Journal>> = vec![Arc::default(), Arc::default()];
    let large: Vec<_> = (200..400)
        .map(|id| {
            Change::Message(Message {
                stanza: &stanza,
                ..message("romeo", id, BOTH, "x@y")
            })
        })
        .collect();
    journals[0].push(&large);
    journals[1].push(&[add("romeo", 100, &first)]);
    let bench = Bench::try_with(&place.database, journals, |_| {}).unwrap();
    bench.all_drained(0);
    assert_eq!(bench.load("romeo").unwrap().unwrap().pending.len(), 200);
}

#[test]
fn a_mark_in_another_journal_comes_behind_its_message() {
    for place in places() {
        let first = record(1);
        let journals: Vec<Arc<Journal>> = vec![Arc::default(), Arc::default()];
        // As after a start with another number of cores: what has become of messages stands in the new journal.
        journals[0].push(&[
            Change::Marks(Marks {
                done: &[215],
                dropped: &[216],
                ..Marks::default()
            }),
            Change::Decided { ids: &[217] },
        ]);
        journals[1].push(&[add("romeo", 100, &first)]);
        let old: Vec<_> = (200..220)
            .map(|id| Change::Message(message("romeo", id, BOTH | Message::UNDECIDED, "x@y")))
            .collect();
        journals[1].push(&old);
        let bench = Bench::try_with(&place.database, journals, |config| {
            config.drain.records_max = 3;
        })
        .unwrap();
        bench.all_drained(1);
        let pending = bench.load("romeo").unwrap().unwrap().pending;
        let decided = |id| {
            let found = pending.iter().find(|one| one.id == id);
            found.map(|one| one.what & Message::UNDECIDED == 0)
        };
        assert_eq!(pending.len(), 18);
        assert_eq!(
            [214, 215, 216, 217].map(decided),
            [Some(false), None, None, Some(true)]
        );
    }
}

#[test]
fn a_mark_that_has_rested_waits_for_a_message_that_has_not() {
    let place = sqlite();
    let first = record(1);
    let bench = Bench::start(&place.database, 2, |_| {});
    bench.journals[1].push(&[add("romeo", 100, &first)]);
    bench.all_drained(1);
    bench.journals[0].push(&[Change::Marks(Marks {
        done: &[215],
        ..Marks::default()
    })]);
    let counters = bench.sender.counters();
    while counters.drain_waiting.load(Relaxed) == 0 {
        std::thread::yield_now();
    }
    bench.journals[1].push(&[Change::Message(message("romeo", 215, BOTH, "x@y"))]);
    bench.all_drained(0);
    while *bench.journals[1].drained.lock().unwrap() < 2 {
        std::thread::yield_now();
    }
    assert_eq!(bench.load("romeo").unwrap().unwrap().pending, []);
}

#[test]
fn nothing_beyond_the_limit_is_drained() {
    let place = sqlite();
    let bench = Bench::start(&place.database, 1, |_| {});
    let record = record(0);
    *bench.journals[0].limit.lock().unwrap() = Some(2);
    let names: Vec<String> = (0..4).map(|n| format!("trader{n}")).collect();
    let adds: Vec<_> = (1..)
        .zip(&names)
        .map(|(n, name)| add(name, n, &record))
        .collect();
    bench.journals[0].push(&adds);
    while bench.drained.recv_timeout(PATIENCE).unwrap() != (0, 2) {}
    assert!(bench.load("trader1").unwrap().is_some());
    assert!(bench.load("trader2").unwrap().is_none());
    *bench.journals[0].limit.lock().unwrap() = None;
    bench.journals[0].push(&[]);
    bench.all_drained(0);
    assert!(bench.load("trader3").unwrap().is_some());
}

#[test]
fn what_the_database_refuses_is_put_aside_and_the_drain_goes_on() {
    for place in places() {
        let bench = Bench::start(&place.database, 1, |_| {});
        let good = record(1);
        let names: Vec<String> = (0..300).map(|n| format!("trader{n}")).collect();
        let mut changes: Vec<_> = (1..)
            .zip(&names)
            .map(|(n, name)| add(name, n, &good))
            .collect();
        // A record of no version that anybody knows, and a name beyond RFC 7622.
        let long = "x".repeat(1_100);
        changes[70] = Change::AddUser {
            name: "broken",
            revision: 71,
            record: b"\xffgarbage",
        };
        changes[200] = add(&long, 201, &good);
        let mut payloads: Vec<Vec<u8>> = encode(&changes).into_iter().map(|b| b.payload).collect();
        payloads[130] = b"no change at all".to_vec();
        bench.journals[0].push_bytes(payloads.clone());
        bench.all_drained(0);
        // SQLite has no bound for a name.
        let refused = if place.server.is_some() { 3 } else { 2 };
        assert_eq!(bench.sender.counters().quarantined.load(Relaxed), refused);
        assert!(bench.load("trader299").unwrap().is_some());
        assert!(bench.load("trader70").unwrap().is_none());
        bench.lane.stop();
        run(async {
            let mut sql = open(&place).await;
            assert_eq!(sql.count().await.unwrap(), 300 - refused);
            let rows = sql
                .conn
                .ask(
                    "SELECT journal, seq, reason, payload FROM quarantine ORDER BY seq",
                    &[],
                )
                .await
                .unwrap();
            assert_eq!(rows.len() as u64, refused);
            assert_eq!(rows[0].int(1).unwrap(), 71);
            assert!(rows[0].text(2).unwrap().contains("version 255"));
            assert_eq!(rows[0].bytes(3).unwrap(), payloads[70]);
            assert_eq!(rows[1].int(1).unwrap(), 131);
            let at = Position {
                identity: 7,
                journal: 0,
                seq: 300,
            };
            assert_eq!(sql.positions().await.unwrap(), [at]);
        });
    }
}

#[test]
fn what_is_larger_than_a_packet_is_put_aside_in_parts() {
    let Some(server) = Mariadb::start_with(&["--max-allowed-packet=1M"]).map(Arc::new) else {
        return;
    };
    let place = on_mariadb(server);
    let bench = Bench::start(&place.database, 1, |_| {});
    let (record, huge, large) = (record(1), vec![7; 3 << 20], vec![8; 400 << 10]);
    let put = |revision, value| Change::PutDocument {
        name: "romeo",
        revision,
        key: "vcard",
        value,
    };
    bench.journals[0].push(&[add("romeo", 1, &record), put(2, &huge)]);
    // Each fits, but not all together.
    let stanzas: Vec<_> = (10..20)
        .map(|id| {
            Change::Message(Message {
                stanza: &large,
                ..message("romeo", id, BOTH, "x@y")
            })
        })
        .collect();
    bench.journals[0].push(&stanzas);
    bench.all_drained(0);
    assert_eq!(bench.sender.counters().quarantined.load(Relaxed), 1);
    let loaded = bench.load("romeo").unwrap().unwrap();
    assert_eq!(loaded.pending.len(), 10);
    bench.lane.stop();
    run(async {
        let mut sql = open(&place).await;
        let rows = sql
            .conn
            .ask("SELECT payload FROM quarantine ORDER BY part", &[]);
        let rows = rows.await.unwrap();
        let bytes: usize = rows.iter().map(|row| row.bytes(0).unwrap().len()).sum();
        assert!(rows.len() > 1 && bytes > huge.len());
    });
}

#[test]
fn a_full_disk_is_told_and_nothing_is_half_applied() {
    let place = sqlite();
    run(async {
        let mut sql = open(&place).await;
        let (small, large) = (record(1), vec![0; 1 << 20]);
        apply(&mut sql, &[add("romeo", 1, &small)]).await.unwrap();
        // SQLite answers a file that may not grow as it answers a full disk.
        sql.conn.batch("PRAGMA max_page_count = 40").await.unwrap();
        let changes = [
            add("juliet", 2, &small),
            Change::PutDocument {
                name: "romeo",
                revision: 3,
                key: "vcard",
                value: &large,
            },
        ];
        let error = apply(&mut sql, &changes).await.unwrap_err();
        assert_eq!(error.trouble, super::super::Trouble::Full);
        assert_eq!(load(&mut sql, "juliet").await, None);
        sql.conn
            .batch("PRAGMA max_page_count = 4000")
            .await
            .unwrap();
        apply(&mut sql, &changes).await.unwrap();
        assert!(load(&mut sql, "juliet").await.is_some());
    });
}

#[test]
fn a_killed_server_costs_time_and_nothing_else() {
    let Some(mut server) = Mariadb::start() else {
        return;
    };
    let database = Database::parse(&server.url()).unwrap();
    let bench = Bench::start(&database, 1, |config| {
        config.retry_max = Duration::from_secs(2);
        config.drain.records_max = 50;
        config.drain.linger = Duration::ZERO;
    });
    let record = record(1);
    bench.journals[0].push(&[add("romeo", 1, &record)]);
    bench.all_drained(0);
    let query = |ticket| {
        let name = "romeo".into();
        Request::Read {
            ticket,
            query: Query::Archive(ArchiveQuery {
                name,
                most: 5,
                ..ArchiveQuery::default()
            }),
        }
    };
    let mut next = 10;
    for _ in 0..3 {
        // Killed while it drains.
        let messages: Vec<_> = (next..next + 2_000)
            .map(|id| Change::Message(message("romeo", id, Message::ARCHIVE, "x@y")))
            .collect();
        next += 2_000;
        bench.journals[0].push(&messages);
        server.kill();
        let asked = Instant::now();
        bench.send(vec![
            Request::Load {
                name: "romeo".into(),
            },
            query(1),
        ]);
        for answer in bench.answers(2) {
            assert!(
                matches!(
                    &answer,
                    Answer::LoadFailed { .. } | Answer::Archive { result: Err(_), .. }
                ),
                "{answer:?}"
            );
        }
        let waited = asked.elapsed();
        assert!(
            waited >= Duration::from_millis(1_900) && waited < Duration::from_secs(4),
            "{waited:?}"
        );
        server.restart();
        bench.all_drained(0);
        assert!(bench.load("romeo").unwrap().is_some());
    }
    bench.lane.stop();
    run(async {
        let mut sql = Sql::open(&database, 0, Default::default()).await.unwrap();
        let query = ArchiveQuery {
            name: "romeo".into(),
            count: true,
            ..ArchiveQuery::default()
        };
        assert_eq!(sql.archive_page(&query).await.unwrap().count, Some(6_000));
    });
}

#[test]
fn a_server_that_hangs_is_waited_for_within_bounds() {
    let Some(server) = Mariadb::start() else {
        return;
    };
    let database = Database::parse(&server.url()).unwrap();
    let bench = Bench::start(&database, 1, |config| {
        config.retry_max = Duration::from_secs(3);
        config.statement_max = Duration::from_secs(4);
        config.drain.linger = Duration::ZERO;
    });
    let record = record(1);
    bench.journals[0].push(&[add("romeo", 1, &record)]);
    bench.all_drained(0);
    bench.load("romeo").unwrap();
    server.stop();
    let began = Instant::now();
    let messages: Vec<_> = (10..500)
        .map(|id| Change::Message(message("romeo", id, BOTH, "x@y")))
        .collect();
    bench.journals[0].push(&messages);
    while began.elapsed() < Duration::from_secs(10) {
        let asked = Instant::now();
        // More than one statement takes, so that some wait behind others.
        let names = (0..120).map(|n| Request::Load {
            name: format!("n{n}").into(),
        });
        bench.send(names.collect());
        for answer in bench.answers(120) {
            assert!(matches!(answer, Answer::LoadFailed { .. }), "{answer:?}");
        }
        assert!(
            asked.elapsed() < Duration::from_millis(4_500),
            "{:?}",
            asked.elapsed()
        );
    }
    server.go_on();
    bench.all_drained(0);
    assert_eq!(bench.load("romeo").unwrap().unwrap().pending.len(), 490);
    assert!(bench.sender.counters().up.load(Relaxed));
}

#[test]
fn a_server_that_comes_later_is_found_and_what_waited_is_drained() {
    let Some(mut server) = Mariadb::start() else {
        return;
    };
    let database = Database::parse(&server.url()).unwrap();
    server.kill();
    let bench = Bench::start(&database, 1, |config| {
        config.retry_max = Duration::from_secs(1);
    });
    assert!(!bench.sender.counters().up.load(Relaxed));
    let record = record(1);
    bench.journals[0].push(&[add("romeo", 1, &record)]);
    bench.load("romeo").unwrap_err();
    server.restart();
    bench.all_drained(0);
    assert!(bench.load("romeo").unwrap().is_some());
    // And a lane stops although there is no server.
    server.kill();
    bench.journals[0].push(&[add("juliet", 2, &record)]);
    bench.send(vec![Request::Load {
        name: "juliet".into(),
    }]);
    let began = Instant::now();
    bench.lane.stop();
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(bench.answers.try_iter().flatten().count(), 1);
}

#[test]
fn two_blades_share_a_database() {
    // Each remembers numbers of accounts; what the other one makes and removes must not deceive it.
    for place in places() {
        run(async {
            let (mut one, mut two) = (open(&place).await, open(&place).await);
            let record = record(1);
            apply(&mut one, &[add("romeo", 1, &record)]).await.unwrap();
            let first = Change::Message(message("romeo", 10, BOTH, "x@y"));
            apply(&mut two, &[first]).await.unwrap();
            let remove = Change::RemoveUser {
                name: "romeo",
                revision: 20,
            };
            apply(&mut one, &[remove, add("romeo", 30, &record)])
                .await
                .unwrap();
            let second = Change::Message(message("romeo", 40, BOTH, "x@y"));
            apply(&mut two, &[second]).await.unwrap();
            let pending = load(&mut one, "romeo").await.unwrap().pending;
            assert_eq!(pending.iter().map(|one| one.id).collect::<Vec<_>>(), [40]);
        });
    }
}

#[test]
fn the_drain_goes_on_where_it_was_and_begins_anew_with_a_new_journal() {
    for place in places() {
        let record = record(1);
        let old: Arc<Journal> = Arc::default();
        old.push(&[add("romeo", 1, &record), add("juliet", 2, &record)]);
        let bench = Bench::try_with(&place.database, vec![old.clone()], |_| {}).unwrap();
        bench.all_drained(0);
        bench.lane.stop();
        old.push(&[add("nurse", 3, &record)]);
        let bench = Bench::try_with(&place.database, vec![old.clone()], |_| {}).unwrap();
        assert_eq!(bench.drained.recv_timeout(PATIENCE).unwrap(), (0, 2));
        bench.all_drained(0);
        assert_eq!(bench.sender.counters().drained.load(Relaxed), 1);
        bench.lane.stop();
        // What is in the journal when the lane stops is drained first.
        let bench = Bench::try_with(&place.database, vec![old.clone()], |config| {
            config.drain.linger = Duration::from_secs(60);
        })
        .unwrap();
        assert_eq!(bench.drained.recv_timeout(PATIENCE).unwrap(), (0, 3));
        old.push(&[add("paris", 4, &record)]);
        bench.lane.stop();
        assert_eq!(*old.drained.lock().unwrap(), 4);
    }
}

#[test]
fn archive_pages_do_not_delay_those_who_log_in() {
    const PAGES: u64 = 100;
    for place in places() {
        let bench = Bench::start(&place.database, 1, |_| {});
        let record = record(50);
        bench.journals[0].push(&[add("romeo", 1, &record)]);
        let messages: Vec<_> = (10..10_010)
            .map(|id| Change::Message(message("romeo", id, Message::ARCHIVE, "x@y")))
            .collect();
        bench.journals[0].push(&messages);
        bench.all_drained(0);
        // counted: each goes through all of it
        let page = |ticket| {
            let query = Query::Archive(ArchiveQuery {
                name: "romeo".into(),
                most: 50,
                count: true,
                ..ArchiveQuery::default()
            });
            Request::Read { ticket, query }
        };
        bench.send((0..PAGES).map(page).collect());
        bench.send(vec![Request::Load {
            name: "romeo".into(),
        }]);
        let answers = bench.answers(PAGES as usize + 1);
        let is_load = |answer: &Answer| matches!(answer, Answer::Loaded { user: Some(_), .. });
        let before = answers.iter().position(is_load).unwrap();
        assert!(before < PAGES as usize / 2, "{before} pages came before it");
    }
}

#[test]
fn a_reader_is_not_delayed_by_the_drain_on_sqlite() {
    let place = sqlite();
    let bench = Bench::start(&place.database, 1, |config| {
        config.drain.linger = Duration::ZERO;
    });
    let record = record(50);
    bench.journals[0].push(&[add("romeo", 1, &record)]);
    bench.all_drained(0);
    let messages: Vec<_> = (10..40_010)
        .map(|id| Change::Message(message("romeo", id, Message::ARCHIVE, "x@y")))
        .collect();
    bench.journals[0].push(&messages);
    let end = bench.journals[0].len();
    let mut loads = 0;
    // Loads and documents are answered while it drains.
    while *bench.journals[0].drained.lock().unwrap() < end {
        bench.load("romeo").unwrap().unwrap();
        assert_eq!(bench.document("romeo", "vcard"), None);
        loads += 1;
    }
    assert!(loads > 10, "{loads} loads");
    assert_eq!(bench.sender.counters().failures.load(Relaxed), 0);
}
