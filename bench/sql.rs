//! What the SQL tier costs, CPU of nitro and of the server, on a SQLite file and on a real MariaDB:
//! `cargo bench --bench sql`. `NITRO_BENCH_CORE=1` pins the lane, `NITRO_BENCH_DIR` names the disk that matters,
//! `NITRO_BENCH_SQL='CREATE INDEX …'` tells what a change of the schema would cost.

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nitro::store::change::{Change, Id, Marks, Message};
use nitro::store::drain::Source;
use nitro::store::record::{Record, RosterItem, ScramKeys, Subscription, UserRecord};
use nitro::store::sql::Database;
use nitro::store::sql::lane::{Lane, LaneConfig};
use nitro::store::tier::{Answer, ArchiveQuery, Query, Request};
use sqlx::ConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;
use tokio::sync::Notify;

#[path = "../tests/servers/mod.rs"]
mod servers;
use servers::mariadb::Mariadb;

const USERS: usize = 10_000;
const MESSAGES: usize = 200_000;

fn main() {
    let folder = match std::env::var_os("NITRO_BENCH_DIR") {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    };
    let file = folder.expect("a folder for the database can be made");
    run(&Place {
        database: Database::Sqlite(file.path().join("nitro.db")),
        server: None,
    });
    match Mariadb::start() {
        Some(server) => run(&Place {
            database: Database::parse(&server.url()).expect("a test's address"),
            server: Some(server),
        }),
        None => println!("MariaDB is not installed"),
    }
}

struct Place {
    database: Database,
    server: Option<Mariadb>,
}

impl Place {
    /// The change of the schema that is tried out.
    fn change(&self) {
        let Ok(change) = std::env::var("NITRO_BENCH_SQL") else {
            return;
        };
        match (&self.server, &self.database) {
            (Some(server), _) => server.sql(&format!("USE nitro; {change}")),
            (None, Database::Sqlite(path)) => {
                let runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = { runtime }.build().expect("a runtime");
                let changed = runtime.block_on(async {
                    let options = SqliteConnectOptions::new().filename(path);
                    let mut connection = options.connect().await?;
                    let change = sqlx::raw_sql(sqlx::AssertSqlSafe(change));
                    change.execute(&mut connection).await
                });
                changed.expect("a statement that SQLite takes");
            }
            _ => unreachable!("a server is no file"),
        }
    }
}

fn run(place: &Place) {
    let names: Vec<String> = (0..USERS).map(|n| format!("trader{n:05}")).collect();
    let record = Record::new(&user(50));
    let bench = Bench::start(place, 4_000);
    bench.drain(names.iter().map(|name| Change::AddUser {
        name,
        revision: 1,
        record: record.bytes(),
    }));
    bench.lane.stop();
    place.change();
    for records_max in [1_000, 4_000, 10_000] {
        let bench = Bench::start(place, records_max);
        // Each message is two entries: of the one who sent it and of the one who got it.
        for waiting in [false, true] {
            let base =
                1_790_000_000_000 + records_max as u64 * 1_000_000 + u64::from(waiting) * 500_000;
            let changes: Vec<Change<'_>> = (0..MESSAGES / 2)
                .flat_map(|n| message(&names, base + n as u64, n, waiting))
                .collect();
            let also = if waiting { ", half pending" } else { "" };
            let what = format!("entry drained, {records_max} a transaction{also}");
            tell(&what, place, &bench, MESSAGES, || {
                bench.drain(changes.iter().copied())
            });
            let waits = changes.iter().filter_map(|change| match change {
                Change::Message(one) if one.what & Message::PENDING != 0 => Some(one.id),
                _ => None,
            });
            let ids: Vec<u64> = waits.collect();
            if waiting {
                tell(
                    "mark, long after its message",
                    place,
                    &bench,
                    ids.len(),
                    || {
                        bench.drain(ids.chunks(10).map(|done| {
                            Change::Marks(Marks {
                                done,
                                ..Marks::default()
                            })
                        }));
                    },
                );
            }
        }
        bench.lane.stop();
    }
    // A large archive, and one who seldom wrote.
    let bench = Bench::start(place, 4_000);
    let stanza = [b'x'; 300];
    let large = (0..200_000).map(|n| {
        let peer = match n {
            1_000 => "paris@example.com",
            _ => "juliet@example.com/balcony",
        };
        Change::Message(Message {
            peer,
            stanza: &stanza,
            ..entry(
                &names[0],
                Id::at(1_900_000_000_000_u64 + n).0,
                Message::ARCHIVE,
            )
        })
    });
    bench.drain(large);
    bench.lane.stop();

    let bench = Bench::start(place, 4_000);
    tell(
        "cold load, 50 contacts, all at once",
        place,
        &bench,
        USERS,
        || {
            let loads = names.iter().map(|name| Request::Load {
                name: name.as_str().into(),
            });
            bench.ask(loads.collect());
        },
    );
    tell("cold load, alone", place, &bench, 1_000, || {
        for name in &names[..1_000] {
            bench.ask(vec![Request::Load {
                name: name.as_str().into(),
            }]);
        }
    });
    for (what, name, with, count) in [
        ("last page of 50 of a small archive", 7, None, false),
        ("the same, counted", 7, None, true),
        ("last page of 50 of 200,000", 0, None, false),
        ("the same, counted", 0, None, true),
        (
            "a rare peer of 200,000",
            0,
            Some("paris@example.com"),
            false,
        ),
        ("the same, counted", 0, Some("paris@example.com"), true),
    ] {
        tell(what, place, &bench, 50, || {
            for ticket in 0..50 {
                let query = Query::Archive(ArchiveQuery {
                    name: names[name].as_str().into(),
                    with: with.map(Into::into),
                    most: 50,
                    backwards: true,
                    count,
                    ..ArchiveQuery::default()
                });
                bench.ask(vec![Request::Read { ticket, query }]);
            }
        });
    }
    bench.lane.stop();
}

fn message(names: &[String], ms: u64, n: usize, waiting: bool) -> [Change<'_>; 2] {
    let (from, to) = (&names[n * 7_919 % USERS], &names[n * 104_729 % USERS]);
    let got = Message::ARCHIVE | Message::RECEIVED | (u8::from(waiting) * Message::PENDING);
    let id = Id::at(ms).0;
    [
        Change::Message(entry(from, id, Message::ARCHIVE | Message::SENT)),
        Change::Message(entry(to, id + (1 << 13), got)),
    ]
}

fn entry(owner: &str, id: u64, what: u8) -> Message<'_> {
    Message {
        id,
        owner,
        what,
        kind: 1,
        flags: 17,
        peer: "juliet@example.com/balcony",
        twin: 0,
        stream: "",
        count: 0,
        stanza: &[b'x'; 300],
    }
}

fn user(contacts: usize) -> UserRecord {
    let keys = |hash_len| ScramKeys {
        iterations: 10_000,
        salt: vec![7; 16],
        stored_key: vec![8; hash_len],
        server_key: vec![9; hash_len],
    };
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

/// CPU of a process with all its threads.
fn cpu(pid: &str) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields = stat.rsplit(") ").next().expect("what follows the name");
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks: u64 = [11, 12]
        .map(|at| fields[at].parse::<u64>().unwrap_or(0))
        .iter()
        .sum();
    // Ticks of 10 ms, on every Linux of today.
    Duration::from_millis(ticks * 10)
}

fn tell(what: &str, place: &Place, bench: &Bench, count: usize, work: impl FnOnce()) {
    let all = || {
        let server = place
            .server
            .as_ref()
            .map(|server| cpu(&server.pid().to_string()));
        let statements = bench.lane.counters().statements.load(Relaxed);
        (cpu("self"), server.unwrap_or_default(), statements)
    };
    let (before, began) = (all(), Instant::now());
    work();
    let (after, wall) = (all(), began.elapsed());
    let each = |part: Duration| part.as_secs_f64() * 1e6 / count as f64;
    println!(
        "{:8} {what:45} CPU {:7.2} us + server {:7.2} us, {:8.2} us on the clock, {:.4} statements",
        if place.server.is_some() {
            "MariaDB"
        } else {
            "SQLite"
        },
        each(after.0 - before.0),
        each(after.1 - before.1),
        each(wall),
        (after.2 - before.2) as f64 / count as f64
    );
}

struct Bench {
    lane: Lane,
    answers: Receiver<Vec<Answer>>,
    drained: Receiver<u64>,
    journal: Arc<Journal>,
}

impl Bench {
    fn start(place: &Place, records_max: usize) -> Bench {
        let mut config = LaneConfig::new(place.database.clone());
        let core = std::env::var("NITRO_BENCH_CORE").ok();
        config.affinity = core.and_then(|core| Some(vec![core.parse().ok()?]));
        config.drain.linger = Duration::from_millis(50);
        config.drain.records_max = records_max;
        config.drain.bytes_max = 8 << 20;
        config.drain.ahead_bytes_max = 32 << 20;
        let (to, answers) = channel();
        let (heard, drained) = channel();
        // Each bench has a journal of its own, that begins at 1.
        static STARTED: AtomicU64 = AtomicU64::new(1);
        let journal = Arc::new(Journal {
            identity: STARTED.fetch_add(1, Relaxed),
            ..Journal::default()
        });
        let lane = Lane::start(
            config,
            vec![Box::new(move |batch| {
                let _ = to.send(batch);
            })],
            vec![Box::new(List(journal.clone()))],
            Box::new(move |_, seq| {
                let _ = heard.send(seq);
            }),
        );
        Bench {
            lane: lane.expect("a fresh database opens"),
            answers,
            drained,
            journal,
        }
    }

    fn drain<'a>(&self, changes: impl Iterator<Item = Change<'a>>) {
        let payloads = changes.map(|change| {
            let mut payload = Vec::new();
            change.encode(&mut payload);
            payload
        });
        let end = {
            let mut records = self.journal.records.lock().expect("nobody panics");
            records.extend(payloads);
            records.len() as u64
        };
        if let Some(waker) = &*self.journal.waker.lock().expect("nobody panics") {
            waker.notify_one();
        }
        while self.drained.recv().expect("the lane drains") != end {}
    }

    fn ask(&self, requests: Vec<Request>) {
        let mut left = requests.len();
        let sent = self.lane.sender().try_send(0, requests);
        sent.expect("the queue is empty");
        while left > 0 {
            left -= self.answers.recv().expect("the lane answers").len();
        }
    }
}

/// A journal that is a list in memory.
#[derive(Default)]
struct Journal {
    identity: u64,
    records: Mutex<Vec<Vec<u8>>>,
    waker: Mutex<Option<Arc<Notify>>>,
}

struct List(Arc<Journal>);

impl Source for List {
    fn journal(&self) -> u16 {
        0
    }

    fn identity(&self) -> u64 {
        self.0.identity
    }

    fn read(
        &mut self,
        wanted: RangeInclusive<u64>,
        bytes_max: usize,
        bytes: &mut Vec<u8>,
        records: &mut Vec<(u64, Range<usize>)>,
    ) -> Result<(), String> {
        let all = self.0.records.lock().expect("nobody panics");
        let behind = *wanted.start() as usize - 1;
        for (n, payload) in (1..).zip(&*all).skip(behind) {
            if n > *wanted.end() {
                break;
            }
            let begin = bytes.len();
            bytes.extend(payload);
            records.push((n, begin..bytes.len()));
            if bytes.len() >= bytes_max {
                break;
            }
        }
        Ok(())
    }

    fn limit(&self) -> u64 {
        self.0.records.lock().expect("nobody panics").len() as u64
    }

    fn drained(&self, _: u64) {}

    fn wake(&self, waker: Arc<Notify>) {
        *self.0.waker.lock().expect("nobody panics") = Some(waker);
    }
}
