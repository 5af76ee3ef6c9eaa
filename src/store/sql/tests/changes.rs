//! What journals carry, applied in batches, against a model that applies one after the other.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::store::tier::ArchiveQuery;

/// A change of the model's history; its id or revision is its place there.
#[derive(Debug, Clone, Copy)]
enum Step {
    Add(usize),
    Put(usize),
    Remove(usize),
    Document(usize, usize, usize),
    Last(usize),
    Message(usize, u8),
    /// The mark names the message so many steps ago.
    Done(usize),
    Dropped(usize),
}

const NAMES: [&str; 3] = ["josé", "jose", "Jose"];
const KEYS: [&str; 3] = ["vcard", "VCARD", "private:urn:x storage"];

fn step() -> impl Strategy<Value = Step> {
    let name = 0..NAMES.len();
    prop_oneof![
        3 => name.clone().prop_map(Step::Add),
        3 => name.clone().prop_map(Step::Put),
        1 => name.clone().prop_map(Step::Remove),
        2 => (name.clone(), 0..KEYS.len(), 0..3_usize).prop_map(|(n, k, v)| Step::Document(n, k, v)),
        1 => name.clone().prop_map(Step::Last),
        8 => (name, 0..16_u8).prop_map(|(n, what)| Step::Message(n, what)),
        4 => (1..6_usize).prop_map(Step::Done),
        1 => (1..6_usize).prop_map(Step::Dropped),
    ]
}

/// What is expected of one account.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Account {
    revision: u64,
    contacts: usize,
    pending: BTreeSet<u64>,
    archive: BTreeSet<u64>,
    documents: BTreeMap<&'static str, Vec<u8>>,
    last: Option<u64>,
}

type Model = BTreeMap<&'static str, Account>;

/// Ids begin here and leave room.
fn id(at: usize) -> u64 {
    Id::at(1_790_000_000_000).0 + 10 * (at as u64 + 1)
}

fn model(history: &[Step]) -> Model {
    let mut model = Model::new();
    for (at, step) in history.iter().enumerate() {
        match *step {
            Step::Add(name) => {
                let account = Account {
                    revision: id(at),
                    contacts: at % 5,
                    ..Account::default()
                };
                model.insert(NAMES[name], account);
            }
            Step::Remove(name) => drop(model.remove(NAMES[name])),
            Step::Put(name) => {
                if let Some(account) = model.get_mut(NAMES[name]) {
                    account.revision = id(at);
                    account.contacts = at % 5;
                }
            }
            Step::Document(name, key, value) => {
                if let Some(account) = model.get_mut(NAMES[name]) {
                    match value {
                        0 => account.documents.remove(KEYS[key]),
                        _ => account.documents.insert(KEYS[key], vec![b'x'; value]),
                    };
                }
            }
            Step::Last(name) => {
                if let Some(account) = model.get_mut(NAMES[name]) {
                    account.last = Some(at as u64);
                }
            }
            Step::Message(name, what) => {
                if let Some(account) = model.get_mut(NAMES[name]) {
                    if what & Message::ARCHIVE != 0 {
                        account.archive.insert(id(at));
                    }
                    if what & Message::PENDING != 0 {
                        account.pending.insert(id(at));
                    }
                }
            }
            Step::Done(ago) => {
                for account in model.values_mut() {
                    account.pending.remove(&id(at.saturating_sub(ago)));
                }
            }
            Step::Dropped(ago) => {
                for account in model.values_mut() {
                    account.pending.remove(&id(at.saturating_sub(ago)));
                    account.archive.remove(&id(at.saturating_sub(ago)));
                }
            }
        }
    }
    model
}

fn encoded(history: &[Step]) -> Vec<Bytes> {
    let records: Vec<Record> = (0..5).map(record).collect();
    let stanza = [b'y'; 40];
    let mut all = Vec::new();
    for (at, step) in history.iter().enumerate() {
        let revision = id(at);
        let record = records[at % 5].bytes();
        let marked = [id(at.saturating_sub(match *step {
            Step::Done(ago) | Step::Dropped(ago) => ago,
            _ => 0,
        }))];
        let change = match *step {
            Step::Add(name) => Change::AddUser {
                name: NAMES[name],
                revision,
                record,
            },
            Step::Put(name) => Change::PutUser {
                name: NAMES[name],
                revision,
                record,
            },
            Step::Remove(name) => Change::RemoveUser {
                name: NAMES[name],
                revision,
            },
            Step::Document(name, key, value) => Change::PutDocument {
                name: NAMES[name],
                revision,
                key: KEYS[key],
                value: &b"xxx"[..value],
            },
            Step::Last(name) => Change::PutLast {
                name: NAMES[name],
                revision,
                at: at as u64,
                status: "gone",
            },
            Step::Message(name, what) => Change::Message(Message {
                stanza: &stanza,
                ..message(NAMES[name], revision, what, "juliet@example.com/balcony")
            }),
            Step::Done(_) => Change::Marks(Marks {
                done: &marked,
                ..Marks::default()
            }),
            Step::Dropped(_) => Change::Marks(Marks {
                dropped: &marked,
                ..Marks::default()
            }),
        };
        let mut payload = Vec::new();
        change.encode(&mut payload);
        all.push(Bytes {
            seq: at as u64 + 1,
            payload,
        });
    }
    all
}

async fn stored(sql: &mut Sql) -> Model {
    let mut model = Model::new();
    for name in NAMES {
        let Some(loaded) = load(sql, name).await else {
            continue;
        };
        let query = ArchiveQuery {
            name: name.into(),
            most: 1_000,
            ..ArchiveQuery::default()
        };
        let page = sql.archive_page(&query).await.unwrap();
        let wanted = KEYS.map(|key| (name, key));
        let found = sql.documents(&wanted).await.unwrap();
        assert!(
            loaded
                .pending
                .iter()
                .all(|one| *one.stanza == [b'y'; 40] && one.kind == 1 && one.flags == 0x8001)
        );
        model.insert(
            name,
            Account {
                revision: loaded.revision,
                contacts: loaded.record.get().roster.len(),
                pending: loaded.pending.iter().map(|one| one.id).collect(),
                archive: page.entries.iter().map(|one| one.id).collect(),
                documents: KEYS
                    .into_iter()
                    .zip(found)
                    .filter_map(|(key, value)| Some((key, value?.into_vec())))
                    .collect(),
                last: loaded.last.map(|last| last.at),
            },
        );
    }
    model
}

/// Applies a history in batches, with the marks of what follows next.
async fn drain(sql: &mut Sql, all: &[Bytes], history: &[Step], batches: &[usize], see: usize) {
    let mut ahead = Ahead::default();
    let mut at = 0;
    let mut sizes = batches.iter().copied().cycle();
    while at < all.len() {
        let end = (at + sizes.next().unwrap_or(7)).min(all.len());
        for (n, step) in history.iter().enumerate().take(end + see).skip(at) {
            match *step {
                Step::Done(ago) => drop(ahead.done.insert(id(n.saturating_sub(ago)))),
                Step::Dropped(ago) => drop(ahead.dropped.insert(id(n.saturating_sub(ago)))),
                _ => {}
            }
        }
        let entries: Vec<Entry<'_>> = all[at..end].iter().map(Bytes::entry).collect();
        let outcome = sql.apply(&entries, &ahead).await.unwrap();
        for id in &outcome.marked {
            ahead.done.remove(id);
            ahead.dropped.remove(id);
            ahead.never_written.remove(id);
        }
        ahead.never_written.extend(outcome.never_written);
        at = end;
    }
}

async fn empty(sql: &mut Sql) {
    for table in [
        "users",
        "archive",
        "pending",
        "documents",
        "last_activities",
        "removed",
        "gone",
        "drained",
    ] {
        let text = sqlx::AssertSqlSafe(format!("DELETE FROM {table}"));
        sql.conn.batch(text).await.unwrap();
    }
    sql.known.clear();
}

#[test]
fn a_history_ends_the_same_whatever_the_batches_and_whatever_is_applied_again() {
    for place in places() {
        let mut sql = run(open(&place));
        // Fewer on a server: each case is some fifty statements.
        let cases = if place.server.is_some() { 60 } else { 100 };
        let config = Config {
            cases,
            failure_persistence: None,
            ..Config::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async { sql.reconnect().await.unwrap() });
        let sql = tokio::sync::Mutex::new(&mut sql);
        let input = (
            prop::collection::vec(step(), 1..60),
            prop::collection::vec(1..30_usize, 1..6),
            0..20_usize,
            any::<prop::sample::Index>(),
        );
        TestRunner::new(config)
            .run(&input, |(history, batches, see, again)| {
                runtime.block_on(async {
                    let mut sql = sql.lock().await;
                    empty(&mut sql).await;
                    let (all, expected) = (encoded(&history), model(&history));
                    drain(&mut sql, &all, &history, &batches, see).await;
                    prop_assert_eq!(&stored(&mut sql).await, &expected);
                    // A crash before its position was known: what came last comes again, in its order.
                    let from = again.index(all.len());
                    drain(&mut sql, &all[from..], &history[from..], &batches, see).await;
                    prop_assert_eq!(&stored(&mut sql).await, &expected);
                    // What carries a revision comes again in any order.
                    let old = all.iter().zip(&history).rev();
                    for (bytes, _) in old.filter(|(_, step)| !matches!(step, Step::Message(..))) {
                        if !matches!(bytes.entry().change, ArchivedChange::Marks(_)) {
                            sql.apply(&[bytes.entry()], &Ahead::default())
                                .await
                                .unwrap();
                        }
                    }
                    prop_assert_eq!(&stored(&mut sql).await, &expected);
                    Ok(())
                })
            })
            .unwrap();
    }
}

#[test]
fn a_removed_user_stays_removed_and_a_new_account_has_nothing_of_the_old_one() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let (small, large) = (record(1), record(9));
            let old = [
                add("romeo", 100, &small),
                Change::Message(message("romeo", 110, BOTH, "juliet@example.com")),
                Change::PutDocument {
                    name: "romeo",
                    revision: 120,
                    key: "vcard",
                    value: b"old",
                },
                Change::PutLast {
                    name: "romeo",
                    revision: 130,
                    at: 5,
                    status: "bye",
                },
            ];
            apply(&mut sql, &old).await.unwrap();
            assert_eq!(load(&mut sql, "romeo").await.unwrap().pending.len(), 1);
            let remove = Change::RemoveUser {
                name: "romeo",
                revision: 140,
            };
            apply(&mut sql, &[remove]).await.unwrap();
            assert_eq!(load(&mut sql, "romeo").await, None);
            let outcome = apply(&mut sql, &old).await.unwrap();
            assert_eq!(outcome.skipped, 3);
            assert_eq!(
                load(&mut sql, "romeo").await,
                None,
                "what is older never comes back"
            );
            apply(&mut sql, &[add("romeo", 200, &large)]).await.unwrap();
            let fresh = load(&mut sql, "romeo").await.unwrap();
            assert_eq!(
                (fresh.revision, fresh.pending.len(), fresh.last),
                (200, 0, None)
            );
            let outcome = apply(&mut sql, &old).await.unwrap();
            assert_eq!(outcome.skipped, 3, "it belongs to the former account");
            assert_eq!(sql.highest_id().await.unwrap(), 110);
            assert_eq!(sql.documents(&[("romeo", "vcard")]).await.unwrap(), [None]);
            while sql.purge().await.unwrap() {}
            let rows = sql.conn.ask("SELECT count(*) FROM archive", &[]).await;
            assert_eq!(rows.unwrap()[0].int(0).unwrap(), 0);
        });
    }
}

#[test]
fn a_message_comes_once_and_what_was_taken_meanwhile_is_never_written_as_pending() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let record = record(0);
            let archived = message("romeo", 110, BOTH, "juliet@example.com");
            let only_pending = Message {
                what: Message::PENDING,
                ..message("romeo", 111, 0, "juliet@example.com")
            };
            let changes = [
                add("romeo", 100, &record),
                Change::Message(archived),
                Change::Message(archived),
                Change::Message(only_pending),
            ];
            apply(&mut sql, &changes).await.unwrap();
            apply(&mut sql, &changes).await.unwrap();
            let loaded = load(&mut sql, "romeo").await.unwrap();
            let stanzas: Vec<_> = loaded
                .pending
                .iter()
                .map(|one| (one.id, one.stanza.len()))
                .collect();
            assert_eq!(stanzas, [(110, 34), (111, 34)]);
            let marks = Change::Marks(Marks {
                done: &[110, 111, 120],
                ..Marks::default()
            });
            let merged = [Change::Message(message("romeo", 120, BOTH, "x@y")), marks];
            // One row in the archive; 110 and 111 are deleted, 120 was never there.
            assert_eq!(apply(&mut sql, &merged).await.unwrap().rows, 3);
            assert!(load(&mut sql, "romeo").await.unwrap().pending.is_empty());
        });
    }
}

#[test]
fn names_and_keys_are_bytes_of_any_length() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let records: Vec<Record> = (0..6).map(record).collect();
            let long = "ü".repeat(511);
            let names = ["josé", "jose", "JOSE", "jose ", "straße", &long];
            let adds: Vec<_> = (1..)
                .zip(names.iter().zip(&records))
                .map(|(n, (name, record))| add(name, n, record))
                .collect();
            apply(&mut sql, &adds).await.unwrap();
            let found = sql.load(&names).await.unwrap();
            for (n, found) in found.into_iter().enumerate() {
                assert_eq!(found.unwrap().unwrap().record.get().roster.len(), n);
            }
            assert_eq!(load(&mut sql, "strasse").await, None);

            let keys = [
                "k".repeat(5_000),
                "k".repeat(5_001),
                "K".repeat(5_000),
                "ü".repeat(1_000),
            ];
            let puts: Vec<_> = (100..)
                .zip(&keys)
                .map(|(revision, key)| Change::PutDocument {
                    name: "josé",
                    revision,
                    key,
                    value: key.as_bytes(),
                })
                .collect();
            apply(&mut sql, &puts).await.unwrap();
            for key in &keys {
                let found = sql
                    .documents(&[("josé", key), ("jose", key)])
                    .await
                    .unwrap();
                assert_eq!(found, [Some(key.as_bytes().into()), None]);
            }
            assert_eq!(sql.documents(&[("josé", "k")]).await.unwrap(), [None]);
        });
    }
}

#[test]
fn accounts_are_changed_by_hand_above_what_is_stored() {
    for place in places() {
        let mut store = super::super::admin::Store::open(&place.database).unwrap();
        let users = (0..12_000).map(|n| (format!("trader{n:05}"), record(0)));
        let imported = store.add_users(users, |_| {}).unwrap();
        assert_eq!((imported.written, imported.left_out.len()), (12_000, 0));
        let again = vec![("trader00003".into(), record(1)), ("new".into(), record(1))];
        let imported = store.add_users(again.clone(), |_| {}).unwrap();
        assert_eq!((imported.written, imported.left_out), (1, vec![0]));
        assert_eq!(store.put_users(again, |_| {}).unwrap().written, 2);
        assert_eq!(store.count().unwrap(), 12_001);
        let before = store.show("new").unwrap().unwrap().revision;
        assert!(!store.add("new", record(2)).unwrap());
        assert!(store.put("new", record(2)).unwrap());
        assert!(!store.put("nobody", record(2)).unwrap());
        assert!(store.remove("new").unwrap() && !store.remove("new").unwrap());
        assert_eq!(store.show("new").unwrap(), None);
        assert!(store.add("new", record(3)).unwrap());
        let after = store.show("new").unwrap().unwrap();
        assert!(after.revision > before);
        assert_eq!(after.record.get().roster.len(), 3);
        let listed = store.list("trader0000", "trader00007", 10).unwrap();
        let names: Vec<_> = listed.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["trader00008", "trader00009"]);
        let shapes = store.key_distribution().unwrap();
        assert_eq!(shapes.len(), 1);
        assert_eq!(
            (shapes[0].sha1, shapes[0].users),
            (Some((10_000, 16)), 12_001)
        );
    }
}
