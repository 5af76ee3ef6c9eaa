//! What leaves archives: by preference, by retraction, by age.

use super::*;
use crate::store::change::Retract;
use crate::store::sql::purge::{Purge, STEP_ROWS, Whose};
use crate::store::tier::{ArchiveQuery, Retraction};

fn days_ago(days: u64) -> u64 {
    Id::at(crate::store::sql::apply::now_ms() - days * 24 * 3_600_000).0
}

async fn archive(sql: &mut Sql, name: &str) -> Vec<u64> {
    let query = ArchiveQuery {
        name: name.into(),
        most: 5_000,
        ..ArchiveQuery::default()
    };
    let page = sql.archive_page(&query).await.unwrap();
    page.entries.iter().map(|entry| entry.id).collect()
}

fn retract<'a>(owner: &'a str, id: u64, target: &'a str) -> Change<'a> {
    Change::Retract(Retract {
        id,
        owner,
        side: Message::RECEIVED,
        peer: "x@y",
        target,
        tombstone: b"<retracted/>",
    })
}

#[test]
fn what_is_not_for_the_archive_after_all_goes_on_waiting() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let record = record(0);
            let change = |id| Change::Message(message("romeo", id, BOTH, "x@y"));
            apply(
                &mut sql,
                &[add("romeo", 100, &record), change(110), change(111)],
            )
            .await
            .unwrap();
            // one that was written, one of the same batch, one that was taken, one that never was
            let changes = [
                change(112),
                Change::Marks(Marks {
                    done: &[111],
                    ..Marks::default()
                }),
                Change::Unarchived {
                    ids: &[110, 111, 112, 999],
                },
            ];
            for _ in 0..2 {
                apply(&mut sql, &changes).await.unwrap();
                assert_eq!(archive(&mut sql, "romeo").await, [] as [u64; 0]);
                let pending = load(&mut sql, "romeo").await.unwrap().pending;
                let pending: Vec<_> = pending
                    .iter()
                    .map(|one| (one.id, one.what & Message::ARCHIVE, one.stanza.len()))
                    .collect();
                assert_eq!(pending, [(110, 0, 34), (112, 0, 34)]);
            }
        });
    }
}

#[test]
fn retractions_are_found_by_what_they_name_and_go_with_their_message_and_their_user() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let record = record(0);
            let changes = [
                add("romeo", 100, &record),
                add("juliet", 101, &record),
                Change::Message(message("romeo", 110, BOTH, "x@y")),
                retract("romeo", 111, "m1"),
                retract("romeo", 112, "M1"),
                retract("juliet", 113, "m1"),
                retract("nobody", 114, "m1"),
                retract("romeo", 115, "m1"),
                Change::Marks(Marks {
                    dropped: &[115],
                    ..Marks::default()
                }),
            ];
            let ids = async |sql: &mut Sql, name: &str, names: &[&str]| -> Vec<u64> {
                let keys: Vec<i64> = names.iter().map(|n| Retraction::key(n)).collect();
                let found = sql.retractions(name, &keys).await.unwrap();
                found.iter().map(|one| one.id).collect()
            };
            for _ in 0..2 {
                apply(&mut sql, &changes).await.unwrap();
                assert_eq!(ids(&mut sql, "romeo", &["m1"]).await, [111]);
                assert_eq!(ids(&mut sql, "romeo", &["m1", "M1", "x"]).await, [111, 112]);
                assert_eq!(ids(&mut sql, "juliet", &["m1"]).await, [113]);
            }
            let many: Vec<String> = (0..120).map(|n| format!("m{n}")).collect();
            let many: Vec<&str> = many.iter().map(String::as_str).collect();
            assert_eq!(ids(&mut sql, "romeo", &many).await, [111]);
            let found = sql.retractions("romeo", &[Retraction::key("m1")]).await;
            let wanted = Retraction {
                id: 111,
                side: Message::RECEIVED,
                peer: "x@y".into(),
                target: "m1".into(),
                tombstone: (*b"<retracted/>").into(),
            };
            assert_eq!(found.unwrap(), [wanted]);
            let retracted = async |sql: &mut Sql, name: &str| {
                let query = ArchiveQuery {
                    name: name.into(),
                    most: 1,
                    ..ArchiveQuery::default()
                };
                sql.archive_page(&query).await.unwrap().retracted
            };
            assert!(retracted(&mut sql, "romeo").await && !retracted(&mut sql, "nobody").await);
            let gone = [
                Change::Marks(Marks {
                    dropped: &[111],
                    ..Marks::default()
                }),
                Change::RemoveUser {
                    name: "juliet",
                    revision: 200,
                },
            ];
            apply(&mut sql, &gone).await.unwrap();
            assert_eq!(ids(&mut sql, "romeo", &["m1"]).await, [] as [u64; 0]);
            while sql.purge().await.unwrap() {}
            let left = sql.conn.ask("SELECT count(*) FROM retractions", &[]).await;
            assert_eq!(left.unwrap()[0].int(0).unwrap(), 1);
        });
    }
}

#[test]
fn a_purge_takes_what_is_old_and_leaves_what_waits() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let record = record(0);
            let added = days_ago(1000);
            let mut changes = vec![
                add("romeo", added, &record),
                add("juliet", added + 1, &record),
            ];
            let taken = Message::ARCHIVE | Message::RECEIVED;
            // more than one step
            let old = days_ago(40);
            for n in 0..u64::from(STEP_ROWS) + 20 {
                changes.push(Change::Message(message("romeo", old + n, taken, "x@y")));
            }
            changes.push(Change::Message(message("romeo", days_ago(35), BOTH, "x@y")));
            changes.push(Change::Message(message(
                "juliet",
                days_ago(34),
                taken,
                "x@y",
            )));
            changes.push(retract("juliet", days_ago(33), "m"));
            changes.push(Change::Message(message(
                "juliet",
                days_ago(20),
                taken,
                "x@y",
            )));
            changes.push(retract("romeo", days_ago(32), "m"));
            let (waits, stays) = (35, 20);
            apply(&mut sql, &changes).await.unwrap();
            let purge = async |sql: &mut Sql, days, owner: Option<&str>, dry| {
                let whose = owner.map_or(Whose::All, |name| Whose::One(name.into()));
                let mut purge = Purge::older_than(days, whose, dry);
                while !purge.is_over() {
                    sql.purge_step(&mut purge).await.unwrap();
                }
                (purge.gone, purge.kept)
            };
            let rows = u64::from(STEP_ROWS) + 20;
            assert_eq!(purge(&mut sql, 30, None, true).await, (rows + 1, 1));
            assert_eq!(purge(&mut sql, 50, None, false).await, (0, 0));
            assert_eq!(archive(&mut sql, "romeo").await.len() as u64, rows + 1);
            assert_eq!(purge(&mut sql, 30, Some("juliet"), false).await, (1, 0));
            let age = |id: u64| (days_ago(0) - id) / (days_ago(0) - days_ago(1));
            let left: Vec<u64> = archive(&mut sql, "juliet")
                .await
                .into_iter()
                .map(age)
                .collect();
            assert_eq!(left, [stays]);
            assert_eq!(purge(&mut sql, 30, None, false).await, (rows, 1));
            let left: Vec<u64> = archive(&mut sql, "romeo")
                .await
                .into_iter()
                .map(age)
                .collect();
            assert_eq!(left, [waits]);
            let pending = load(&mut sql, "romeo").await.unwrap().pending;
            assert_eq!(pending.len(), 1);
            assert!(!pending[0].stanza.is_empty(), "its text is in the archive");
            // what may be about an entry that stays, stays too
            let keys = [Retraction::key("m")];
            assert_eq!(sql.retractions("romeo", &keys).await.unwrap().len(), 1);
            assert_eq!(sql.retractions("juliet", &keys).await.unwrap().len(), 0);
        });
    }
}

#[test]
fn the_drain_purges_when_it_has_nothing_to_write() {
    for place in places() {
        let bench = Bench::start(&place.database, 1, |config| config.drain.keep_days = 30);
        let record = record(0);
        let taken = Message::ARCHIVE | Message::RECEIVED;
        let (added, old, new) = (days_ago(900), days_ago(40), days_ago(2));
        bench.journals[0].push(&[
            add("romeo", added, &record),
            Change::Message(message("romeo", old, taken, "x@y")),
            Change::Message(message("romeo", new, taken, "x@y")),
        ]);
        bench.all_drained(0);
        // the pass of the start found nothing: the next start's does
        drop(bench);
        let bench = Bench::start(&place.database, 1, |config| config.drain.keep_days = 30);
        let counters = bench.lane.counters();
        let until = std::time::Instant::now() + PATIENCE;
        while counters.purged.load(Relaxed) == 0 && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(bench);
        run(async {
            let mut sql = open(&place).await;
            assert_eq!(archive(&mut sql, "romeo").await, [new]);
        });
    }
}

#[test]
fn rooms_and_users_may_be_kept_for_different_times() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let record = record(0);
            let names = ["a", "desk@rooms", "desk2@rooms", "zoe"];
            let taken = Message::ARCHIVE | Message::RECEIVED;
            let mut changes = Vec::new();
            for (n, name) in (0..).zip(names) {
                changes.push(add(name, days_ago(900) + n, &record));
                for age in [40, 10] {
                    let id = days_ago(age) + n;
                    changes.push(Change::Message(message(name, id, taken, "x@y")));
                }
            }
            apply(&mut sql, &changes).await.unwrap();
            let left = async |sql: &mut Sql| {
                let mut left = Vec::new();
                for name in names {
                    left.push(archive(sql, name).await.len());
                }
                left
            };
            let purge = async |sql: &mut Sql, days, whose| {
                let mut purge = Purge::older_than(days, whose, false);
                while !purge.is_over() {
                    sql.purge_step(&mut purge).await.unwrap();
                }
                (purge.gone, purge.kept)
            };
            assert_eq!(purge(&mut sql, 30, Whose::Rooms).await, (2, 0));
            assert_eq!(left(&mut sql).await, [2, 1, 1, 2]);
            assert_eq!(purge(&mut sql, 5, Whose::Users).await, (4, 0));
            assert_eq!(left(&mut sql).await, [0, 1, 1, 0]);
        });
    }
}
