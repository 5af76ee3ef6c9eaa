//! The promises of the SQL lane and of the admin calls, kept on real SQLite files.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use sqlx::{ConnectOptions, Connection};
use tempfile::TempDir;

use super::admin::Store;
use super::lane::{Lane, LaneConfig, LaneSender};
use super::record::Record;
use super::record::tests::user;
use super::tier::{Answer, Last, Loaded, Op, Query, Request, WriteError};

/// Far more than any test needs; only a broken promise waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

struct Bench {
    lane: Option<Lane>,
    sender: LaneSender,
    shards: Vec<Receiver<Vec<Answer>>>,
    folder: TempDir,
}

impl Bench {
    fn new(shards: usize) -> Bench {
        Bench::with(shards, tempfile::tempdir().unwrap(), |_| {})
    }

    fn with(shards: usize, folder: TempDir, change: impl FnOnce(&mut LaneConfig)) -> Bench {
        let mut config = LaneConfig::new(file(&folder));
        change(&mut config);
        let (sinks, shards) = (0..shards)
            .map(|_| {
                let (to, from) = channel();
                let sink: super::lane::AnswerSink =
                    Box::new(move |answers| to.send(answers).unwrap());
                (sink, from)
            })
            .unzip();
        let lane = Lane::start(config, sinks).unwrap();
        Bench {
            sender: lane.sender(),
            lane: Some(lane),
            shards,
            folder,
        }
    }

    fn send(&self, shard: usize, requests: Vec<Request>) {
        self.sender.try_send(shard, requests).unwrap();
    }

    fn answers(&self, shard: usize, count: usize) -> Vec<Answer> {
        let mut answers = Vec::new();
        while answers.len() < count {
            answers.extend(self.shards[shard].recv_timeout(PATIENCE).unwrap());
        }
        assert_eq!(answers.len(), count);
        answers
    }

    /// Sends changes as one batch and waits for their outcomes, in the order sent.
    fn write(&self, ops: Vec<Op>) -> Vec<Result<(), WriteError>> {
        let count = ops.len();
        let requests = ops.into_iter().enumerate().map(|(n, op)| Request::Write {
            ticket: n as u64,
            op,
        });
        self.send(0, requests.collect());
        let mut outcomes: Vec<_> = self.answers(0, count).into_iter().map(written).collect();
        outcomes.sort_by_key(|(ticket, _)| *ticket);
        outcomes.into_iter().map(|(_, result)| result).collect()
    }

    fn load(&self, name: &str) -> Option<Loaded> {
        self.send(0, vec![load(name)]);
        loaded(self.answers(0, 1).remove(0))
    }

    fn document(&self, name: &str, key: &str) -> Option<Box<[u8]>> {
        let query = Query::Document {
            name: name.into(),
            key: key.into(),
        };
        self.send(0, vec![Request::Read { ticket: 7, query }]);
        match self.answers(0, 1).remove(0) {
            Answer::Read { ticket: 7, result } => result.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn last(&self, name: &str) -> Option<Last> {
        self.send(
            0,
            vec![Request::Read {
                ticket: 8,
                query: Query::Last { name: name.into() },
            }],
        );
        match self.answers(0, 1).remove(0) {
            Answer::ReadLast { ticket: 8, result } => result.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn stop(mut self) -> TempDir {
        self.lane.take().unwrap().stop();
        self.folder
    }
}

fn file(folder: &TempDir) -> PathBuf {
    folder.path().join("data").join("nitro.db")
}

fn load(name: &str) -> Request {
    Request::Load { name: name.into() }
}

fn loaded(answer: Answer) -> Option<Loaded> {
    match answer {
        Answer::Loaded { user, .. } => user,
        other => panic!("{other:?}"),
    }
}

fn written(answer: Answer) -> (u64, Result<(), WriteError>) {
    match answer {
        Answer::Written { ticket, result } => (ticket, result),
        other => panic!("{other:?}"),
    }
}

fn add(name: &str) -> Op {
    Op::AddUser {
        name: name.into(),
        record: Record::new(&user(3)),
    }
}

fn put(name: &str, contacts: usize) -> Op {
    Op::PutUser {
        name: name.into(),
        record: Record::new(&user(contacts)),
    }
}

fn put_offline(name: &str, id: u64) -> Op {
    Op::PutOffline {
        name: name.into(),
        id,
        stanza: format!("<message id='{id}'/>").into_bytes().into(),
    }
}

fn put_document(name: &str, key: &str, value: Option<&str>) -> Op {
    Op::PutDocument {
        name: name.into(),
        key: key.into(),
        value: value.map(|value| value.as_bytes().into()),
    }
}

fn contacts(loaded: &Option<Loaded>) -> usize {
    loaded.as_ref().unwrap().record.get().roster.len()
}

/// Runs statements on a connection of its own, as an operator with `sqlite3` would; returns the first column.
fn sql(path: &Path, statement: &str) -> Vec<i64> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(path)
            .read_only(false);
        let mut conn = options.connect().await.unwrap();
        let statement = sqlx::AssertSqlSafe(statement.to_owned());
        let rows = sqlx::query_scalar(statement)
            .fetch_all(&mut conn)
            .await
            .unwrap();
        conn.close().await.unwrap();
        rows
    })
}

#[test]
fn everything_written_is_read_back() {
    let bench = Bench::new(1);
    assert_eq!(bench.load("romeo"), None);
    assert_eq!(bench.write(vec![add("romeo")]), [Ok(())]);
    let fresh = bench.load("romeo").unwrap();
    assert_eq!(fresh.record, Record::new(&user(3)));
    assert_eq!((fresh.offline.len(), fresh.last), (0, None));

    let last = Last {
        at: 1_790_000_000,
        status: "gone home".into(),
    };
    let outcomes = bench.write(vec![
        put("romeo", 5),
        put_offline("romeo", 2),
        put_offline("romeo", 1),
        put_offline("romeo", 3),
        put_document("romeo", "vcard", Some("<vCard/>")),
        put_document("romeo", "private:urn:x y", Some("<y/>")),
        Op::PutLast {
            name: "romeo".into(),
            at: last.at,
            status: last.status.clone(),
        },
    ]);
    assert_eq!(outcomes, vec![Ok(()); 7]);
    let full = bench.load("romeo").unwrap();
    assert_eq!(full.record.get().roster.len(), 5);
    assert_eq!(
        full.offline.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
        [1, 2, 3]
    );
    assert_eq!(&*full.offline[0].1, b"<message id='1'/>");
    assert_eq!(full.last, Some(last.clone()));
    assert_eq!(bench.last("romeo"), Some(last));
    assert_eq!(
        bench.document("romeo", "vcard").as_deref(),
        Some(&b"<vCard/>"[..])
    );
    assert_eq!(bench.document("romeo", "private:urn:x z"), None);
    assert_eq!(bench.document("nobody", "vcard"), None);
    assert_eq!(bench.last("nobody"), None);

    bench.write(vec![
        Op::DropOffline {
            name: "romeo".into(),
            up_to: 2,
        },
        put_document("romeo", "vcard", Some("<vCard><FN/></vCard>")),
        put_document("romeo", "private:urn:x y", None),
    ]);
    let rest = bench.load("romeo").unwrap().offline;
    assert_eq!(rest.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [3]);
    assert_eq!(
        bench.document("romeo", "vcard").as_deref(),
        Some(&b"<vCard><FN/></vCard>"[..])
    );
    assert_eq!(bench.document("romeo", "private:urn:x y"), None);
}

#[test]
fn a_removed_user_leaves_nothing_behind() {
    let bench = Bench::new(1);
    bench.write(vec![
        add("romeo"),
        put_offline("romeo", 1),
        put_document("romeo", "vcard", Some("<vCard/>")),
        Op::PutLast {
            name: "romeo".into(),
            at: 1,
            status: "".into(),
        },
    ]);
    assert_eq!(
        bench.write(vec![Op::RemoveUser {
            name: "romeo".into()
        }]),
        [Ok(())]
    );
    assert_eq!(bench.load("romeo"), None);
    let left = "SELECT (SELECT count(*) FROM offline) + (SELECT count(*) FROM document)
        + (SELECT count(*) FROM last_activity)";
    assert_eq!(sql(&file(&bench.folder), left), [0]);
    // The next one of that name starts from nothing.
    bench.write(vec![add("romeo")]);
    assert_eq!(bench.load("romeo").unwrap().offline, []);
    assert_eq!(bench.document("romeo", "vcard"), None);
}

#[test]
fn a_change_that_cannot_be_made_is_told_and_harms_no_other() {
    let bench = Bench::new(1);
    let outcomes = bench.write(vec![
        add("romeo"),
        add("romeo"),
        put("juliet", 1),
        put_offline("juliet", 1),
        put("romeo", 9),
        Op::RemoveUser {
            name: "juliet".into(),
        },
        Op::DropOffline {
            name: "juliet".into(),
            up_to: 1,
        },
        put_document("juliet", "vcard", None),
        Op::PutLast {
            name: "juliet".into(),
            at: 0,
            status: "".into(),
        },
        add("juliet"),
    ]);
    let missing = Err(WriteError::Missing);
    assert_eq!(outcomes[..2], [Ok(()), Err(WriteError::Conflict)]);
    assert_eq!(outcomes[2..4], [missing.clone(), missing.clone()]);
    assert_eq!(outcomes[4], Ok(()));
    assert_eq!(outcomes[5..9], vec![missing; 4]);
    assert_eq!(outcomes[9], Ok(()));
    assert_eq!(contacts(&bench.load("romeo")), 9);
    assert_eq!(contacts(&bench.load("juliet")), 3);
}

#[test]
fn changes_of_one_user_keep_their_order_in_one_batch() {
    let bench = Bench::new(1);
    let outcomes = bench.write(vec![
        add("romeo"),
        put_offline("romeo", 1),
        Op::DropOffline {
            name: "romeo".into(),
            up_to: 9,
        },
        put_offline("romeo", 2),
        put("romeo", 1),
        put("romeo", 2),
        put_document("romeo", "vcard", Some("a")),
        put_document("romeo", "vcard", None),
        put_document("romeo", "vcard", Some("b")),
        add("juliet"),
        Op::RemoveUser {
            name: "juliet".into(),
        },
        put("juliet", 1),
    ]);
    assert_eq!(outcomes[..11], vec![Ok(()); 11]);
    assert_eq!(outcomes[11], Err(WriteError::Missing));
    let romeo = bench.load("romeo").unwrap();
    assert_eq!(romeo.record.get().roster.len(), 2);
    assert_eq!(
        romeo.offline.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
        [2]
    );
    assert_eq!(bench.document("romeo", "vcard").as_deref(), Some(&b"b"[..]));
}

#[test]
fn a_statement_the_database_refuses_fails_alone() {
    let bench = Bench::new(1);
    bench.write(vec![add("romeo")]);
    let trigger = "CREATE TRIGGER refuse BEFORE INSERT ON offline WHEN new.id = 13
        BEGIN SELECT raise(ABORT, 'unlucky'); END";
    sql(&file(&bench.folder), trigger);
    let outcomes = bench.write((1..=100).map(|id| put_offline("romeo", id)).collect());
    for (n, outcome) in outcomes.iter().enumerate() {
        match (n + 1, outcome) {
            (13, Err(WriteError::Unavailable(why))) => assert!(why.contains("unlucky")),
            (13, other) => panic!("{other:?}"),
            (_, outcome) => assert_eq!(outcome, &Ok(())),
        }
    }
    assert_eq!(bench.load("romeo").unwrap().offline.len(), 99);
}

#[test]
fn a_thousand_cold_loads_share_few_statements() {
    let bench = Bench::new(2);
    bench.write((0..500).map(|n| add(&format!("user{n}"))).collect());
    bench.write((500..1000).map(|n| add(&format!("user{n}"))).collect());
    let counters = bench.lane.as_ref().unwrap().counters();
    let before = counters.statements.load(Relaxed);
    for shard in 0..2 {
        let names = (0..500).map(|n| format!("user{}", n * 2 + shard));
        bench.send(shard, names.map(|name| load(&name)).collect());
    }
    for shard in 0..2 {
        assert!(
            bench
                .answers(shard, 500)
                .into_iter()
                .all(|answer| loaded(answer).is_some())
        );
    }
    let statements = counters.statements.load(Relaxed) - before;
    assert!(statements <= 50, "{statements} statements for 1,000 loads");
    assert_eq!(counters.users_loaded.load(Relaxed), 1000);
    assert_eq!(counters.queue_depth.load(Relaxed), 0);
    assert!(counters.queue_depth_max.load(Relaxed) >= 500);
}

#[test]
fn every_load_is_answered_once_to_the_shard_that_asked() {
    let bench = Bench::new(2);
    bench.write(vec![add("romeo")]);
    bench.send(0, vec![load("romeo"), load("nobody"), load("romeo")]);
    bench.send(1, vec![load("romeo")]);
    let mut found: Vec<_> = bench
        .answers(0, 3)
        .into_iter()
        .map(|one| loaded(one).is_some())
        .collect();
    found.sort_unstable();
    assert_eq!(found, [false, true, true]);
    assert!(loaded(bench.answers(1, 1).remove(0)).is_some());
}

#[test]
fn a_read_sees_the_writes_before_it() {
    let bench = Bench::new(1);
    bench.write(vec![add("romeo"), add("other")]);
    for round in 1..100 {
        let query = Query::Document {
            name: "romeo".into(),
            key: "vcard".into(),
        };
        let version = round.to_string();
        let mut requests: Vec<_> = (0..20)
            .map(|n| Request::Write {
                ticket: 100 + n,
                op: put_offline("other", round * 100 + n),
            })
            .collect();
        requests.extend([
            Request::Write {
                ticket: 1,
                op: put("romeo", round as usize),
            },
            load("romeo"),
            Request::Write {
                ticket: 2,
                op: put_document("romeo", "vcard", Some(&version)),
            },
            Request::Read { ticket: 3, query },
        ]);
        bench.send(0, requests);
        for answer in bench.answers(0, 24) {
            match answer {
                Answer::Loaded { user, .. } => assert_eq!(contacts(&user), round as usize),
                Answer::Read { result, .. } => {
                    assert_eq!(result.unwrap().as_deref(), Some(version.as_bytes()))
                }
                Answer::Written { result, .. } => result.unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn what_was_answered_is_in_the_file() {
    // Another connection sees it, so it is committed; with synchronous=FULL a commit is on the disk.
    let bench = Bench::new(1);
    for n in 0..20 {
        bench.write(vec![add(&format!("user{n}"))]);
        assert_eq!(
            sql(&file(&bench.folder), "SELECT count(*) FROM users"),
            [n + 1]
        );
    }
}

#[test]
fn a_restart_finds_everything() {
    let bench = Bench::new(1);
    bench.write(vec![add("romeo"), put_offline("romeo", 4)]);
    let folder = bench.stop();
    let wal = file(&folder).with_extension("db-wal");
    assert!(!wal.exists(), "a clean stop leaves one file");
    let bench = Bench::with(1, folder, |_| {});
    assert_eq!(bench.load("romeo").unwrap().offline.len(), 1);
}

#[test]
fn stop_answers_all_that_was_accepted() {
    let mut bench = Bench::new(1);
    bench.write(vec![add("romeo")]);
    for id in 0..50 {
        bench.send(
            0,
            vec![
                Request::Write {
                    ticket: id,
                    op: put_offline("romeo", id),
                },
                load("romeo"),
            ],
        );
    }
    bench.lane.take().unwrap().stop();
    assert_eq!(bench.answers(0, 100).len(), 100);
    let back = bench.sender.try_send(0, vec![load("romeo")]).unwrap_err();
    assert_eq!(back.len(), 1);
    assert_eq!(bench.sender.counters().queue_depth.load(Relaxed), 0);
}

#[test]
fn a_full_queue_gives_the_batch_back_at_once() {
    let bench = Bench::with(1, tempfile::tempdir().unwrap(), |config| {
        config.queue_max = 2
    });
    // Another program holds the write lock: nothing can be written, so the queue fills.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file(&bench.folder));
    let mut other = runtime.block_on(options.connect()).unwrap();
    runtime
        .block_on(sqlx::query("BEGIN IMMEDIATE").execute(&mut other))
        .unwrap();
    bench.send(
        0,
        vec![Request::Write {
            ticket: 1,
            op: add("romeo"),
        }],
    );
    bench.send(
        0,
        vec![Request::Write {
            ticket: 2,
            op: put("romeo", 1),
        }],
    );
    let back = bench
        .sender
        .try_send(0, vec![load("romeo"), load("juliet")])
        .unwrap_err();
    assert_eq!(back.len(), 2);
    assert_eq!(bench.sender.counters().refused.load(Relaxed), 1);
    runtime
        .block_on(sqlx::query("ROLLBACK").execute(&mut other))
        .unwrap();
    assert_eq!(
        bench
            .answers(0, 2)
            .into_iter()
            .filter(|one| written(one.clone()).1.is_ok())
            .count(),
        2
    );
}

#[test]
fn a_locked_database_is_told_and_later_writes_succeed() {
    let bench = Bench::with(1, tempfile::tempdir().unwrap(), |config| {
        config.retry_max = Duration::ZERO
    });
    bench.write(vec![add("romeo")]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file(&bench.folder));
    let mut other = runtime.block_on(options.connect()).unwrap();
    runtime
        .block_on(sqlx::query("BEGIN IMMEDIATE").execute(&mut other))
        .unwrap();
    let outcome = bench.write(vec![put("romeo", 1)]).remove(0);
    assert!(
        matches!(outcome, Err(WriteError::Unavailable(_))),
        "{outcome:?}"
    );
    // Reading goes on beside it.
    assert_eq!(contacts(&bench.load("romeo")), 3);
    runtime
        .block_on(sqlx::query("ROLLBACK").execute(&mut other))
        .unwrap();
    assert_eq!(bench.write(vec![put("romeo", 1)]), [Ok(())]);
    assert_eq!(contacts(&bench.load("romeo")), 1);
}

#[test]
fn a_record_of_another_release_is_no_user_and_no_silence() {
    let bench = Bench::new(1);
    bench.write(vec![add("romeo"), add("juliet")]);
    sql(
        &file(&bench.folder),
        "UPDATE users SET record = x'63' WHERE name = 'romeo'",
    );
    bench.send(0, vec![load("romeo"), load("juliet")]);
    for answer in bench.answers(0, 2) {
        match answer {
            Answer::LoadFailed { name, error } => {
                assert_eq!(&*name, "romeo");
                assert!(error.contains("version 99"), "{error}");
            }
            other => assert!(loaded(other).is_some()),
        }
    }
}

#[test]
fn a_newer_schema_is_refused_with_a_sentence() {
    let folder = Bench::new(1).stop();
    sql(
        &file(&folder),
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
            VALUES (999, 'from the future', 1, x'00', 0)",
    );
    let error = Lane::start(LaneConfig::new(file(&folder)), vec![])
        .err()
        .unwrap();
    assert!(
        error.contains("schema 999") && error.contains("newer nitro"),
        "{error}"
    );
    assert_eq!(Store::open(file(&folder)).err().unwrap(), error);
}

#[test]
fn a_file_that_is_no_database_is_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    std::fs::write(
        file(&folder),
        "this is not SQLite, and long enough to be seen as such ".repeat(20),
    )
    .unwrap();
    let error = Lane::start(LaneConfig::new(file(&folder)), vec![])
        .err()
        .unwrap();
    assert!(error.contains("cannot open the database"), "{error}");
}

#[test]
fn only_the_owner_may_read_the_data() {
    let bench = Bench::new(1);
    bench.write(vec![add("romeo")]);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let path = file(&bench.folder);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
}

#[test]
fn the_lane_and_its_connections_step_back_behind_the_shards() {
    let _bench = Bench::with(1, tempfile::tempdir().unwrap(), |config| config.nice = 11);
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // Fields of proc(5) stat after the name in brackets: nice is the 19th of all, the policy the 41st.
    let stepped_back = tasks.filter_map(|task| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).ok()?;
        let (name, fields) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let batch = (fields[16], fields[38]) == ("11", "3");
        (batch && name.contains("(sql")).then_some(())
    });
    assert_eq!(
        stepped_back.count(),
        3,
        "the lane's thread and one for each connection"
    );
}

#[test]
fn names_are_compared_byte_by_byte() {
    let bench = Bench::new(1);
    assert_eq!(
        bench.write(vec![add("jose"), add("josé"), add("JOSE")]),
        vec![Ok(()); 3]
    );
    assert_eq!(bench.load("Jose"), None);
}

#[test]
fn an_import_writes_all_and_says_whom_it_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(file(&folder)).unwrap();
    assert!(store.add("user00007", Record::new(&user(1))).unwrap());
    assert!(!store.add("user00007", Record::new(&user(1))).unwrap());
    let record = Record::new(&user(0));
    let mut heard = Vec::new();
    let users = (0..12_000).map(|n| (format!("user{n:05}"), record.clone()));
    let imported = store.add_users(users, |count| heard.push(count)).unwrap();
    assert_eq!((imported.written, imported.left_out), (11_999, vec![7]));
    assert_eq!(heard, [5_000, 10_000, 12_000]);
    assert_eq!(store.count().unwrap(), 12_000);

    let changes = [
        ("user00001".into(), Record::new(&user(2))),
        ("nobody".into(), record.clone()),
    ];
    assert_eq!(store.put_users(changes, |_| {}).unwrap().left_out, [1]);
    assert_eq!(contacts(&store.show("user00001").unwrap()), 2);
    let both = store.load(&["nobody", "user00007"]).unwrap();
    assert!(both[0].is_none() && both[1].is_some());

    let page = store.list("user0001", "user00012", 3).unwrap();
    let names: Vec<_> = page.into_iter().map(|one| one.name).collect();
    assert_eq!(names, ["user00013", "user00014", "user00015"]);
    assert_eq!(store.list("", "", 5).unwrap().len(), 5);
    assert_eq!(store.list("v", "", 5).unwrap().len(), 0);

    assert!(store.remove("user00007").unwrap() && !store.remove("user00007").unwrap());
    let mut keyless = user(0);
    keyless.sha1 = None;
    store.put("user00002", Record::new(&keyless)).unwrap();
    let shapes = store.key_distribution().unwrap();
    assert_eq!(shapes.len(), 2);
    assert_eq!(
        (shapes[0].sha1, shapes[0].sha256, shapes[0].users),
        (Some((10_000, 16)), Some((10_000, 16)), 11_998)
    );
    assert_eq!((shapes[1].sha1, shapes[1].users), (None, 1));
}
