//! The promises of the SQL tier, kept on real SQLite files and a real MariaDB.

mod changes;
mod faults;
mod pages;
mod retention;
mod rooms;
mod schema;
#[path = "../../../../tests/servers/mod.rs"]
mod servers;

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::Notify;

use self::servers::mariadb::Mariadb;
use super::lane::{Lane, LaneConfig, LaneSender};
use super::{Ahead, Database, Entry, Outcome, Position, Sql, SqlError};
use crate::store::change::{ArchivedChange, Change, Id, Marks, Message};
use crate::store::drain::Source;
use crate::store::record::Record;
use crate::store::record::tests::user;
use crate::store::tier::{Answer, Loaded, Query, Request};

/// Far more than any test needs; only a broken promise waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A database for one test.
struct Place {
    database: Database,
    /// As in the configuration.
    address: String,
    _folder: Option<TempDir>,
    server: Option<Arc<Mariadb>>,
}

/// One server serves all tests that run at the same time; the last one ends it.
fn mariadb() -> Option<Arc<Mariadb>> {
    static SHARED: Mutex<Weak<Mariadb>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(|broken| broken.into_inner());
    if let Some(running) = shared.upgrade() {
        return Some(running);
    }
    let started = Mariadb::start().map(Arc::new);
    match &started {
        Some(started) => *shared = Arc::downgrade(started),
        None => eprintln!("SKIPPED: MariaDB is not installed, only SQLite is tested"),
    }
    started
}

/// A new database on each kind of server.
fn places() -> Vec<Place> {
    let mut places = vec![sqlite()];
    places.extend(mariadb().map(on_mariadb));
    places
}

fn sqlite() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("data").join("nitro.db");
    Place {
        address: format!("sqlite:{}", file.display()),
        database: Database::Sqlite(file),
        _folder: Some(folder),
        server: None,
    }
}

fn on_mariadb(server: Arc<Mariadb>) -> Place {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("t{}", NEXT.fetch_add(1, Relaxed));
    server.sql(&format!(
        "CREATE DATABASE {name} CHARACTER SET utf8mb4; GRANT ALL ON {name}.* TO 'nitro'@'localhost'"
    ));
    let url = server.url().replace("/nitro?", &format!("/{name}?"));
    Place {
        database: Database::parse(&url).unwrap(),
        address: url,
        _folder: None,
        server: Some(server),
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

async fn open(place: &Place) -> Sql {
    Sql::open(&place.database, 1 << 20, Default::default())
        .await
        .unwrap()
}

/// A journal's record with its payload.
struct Bytes {
    seq: u64,
    payload: Vec<u8>,
}

fn encode(changes: &[Change<'_>]) -> Vec<Bytes> {
    (1..)
        .zip(changes)
        .map(|(seq, change)| {
            let mut payload = Vec::new();
            change.encode(&mut payload);
            Bytes { seq, payload }
        })
        .collect()
}

impl Bytes {
    fn entry(&self) -> Entry<'_> {
        Entry {
            at: Position {
                identity: 0,
                journal: 0,
                seq: self.seq,
            },
            change: ArchivedChange::access(&self.payload).unwrap(),
        }
    }
}

async fn apply(sql: &mut Sql, changes: &[Change<'_>]) -> Result<Outcome, SqlError> {
    let bytes = encode(changes);
    let entries: Vec<Entry<'_>> = bytes.iter().map(Bytes::entry).collect();
    sql.apply(&entries, &Ahead::default()).await
}

async fn load(sql: &mut Sql, name: &str) -> Option<Loaded> {
    sql.load(&[name]).await.unwrap().remove(0).unwrap()
}

fn record(contacts: usize) -> Record {
    Record::new(&user(contacts))
}

fn add<'a>(name: &'a str, revision: u64, record: &'a Record) -> Change<'a> {
    Change::AddUser {
        name,
        revision,
        record: record.bytes(),
    }
}

fn message<'a>(owner: &'a str, id: u64, what: u8, peer: &'a str) -> Message<'a> {
    Message {
        id,
        owner,
        what,
        kind: 1,
        flags: 0x8001,
        peer,
        twin: 0,
        stream: "",
        count: 0,
        stanza: b"<message><body>hi</body></message>",
    }
}

const BOTH: u8 = Message::ARCHIVE | Message::PENDING | Message::RECEIVED;

/// A journal that is a list, as real as the drain needs it.
#[derive(Default)]
struct Journal {
    records: Mutex<Vec<Vec<u8>>>,
    /// How far it may be drained; all if `None`.
    limit: Mutex<Option<u64>>,
    drained: Mutex<u64>,
    waker: Mutex<Option<Arc<Notify>>>,
}

impl Journal {
    fn push(&self, changes: &[Change<'_>]) {
        let payloads = encode(changes).into_iter().map(|bytes| bytes.payload);
        self.push_bytes(payloads);
    }

    fn push_bytes(&self, payloads: impl IntoIterator<Item = Vec<u8>>) {
        self.records.lock().unwrap().extend(payloads);
        if let Some(waker) = &*self.waker.lock().unwrap() {
            waker.notify_one();
        }
    }

    fn len(&self) -> u64 {
        self.records.lock().unwrap().len() as u64
    }
}

struct ListSource {
    number: u16,
    identity: u64,
    journal: Arc<Journal>,
}

impl Source for ListSource {
    fn journal(&self) -> u16 {
        self.number
    }

    fn identity(&self) -> u64 {
        self.identity
    }

    fn read(
        &mut self,
        wanted: RangeInclusive<u64>,
        bytes_max: usize,
        bytes: &mut Vec<u8>,
        records: &mut Vec<(u64, Range<usize>)>,
    ) -> Result<(), String> {
        let all = self.journal.records.lock().unwrap();
        for (n, payload) in (1..).zip(&*all).filter(|(n, _)| wanted.contains(n)) {
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
        self.journal
            .limit
            .lock()
            .unwrap()
            .unwrap_or(self.journal.len())
    }

    fn drained(&self, seq: u64) {
        *self.journal.drained.lock().unwrap() = seq;
    }

    fn wake(&self, waker: Arc<Notify>) {
        *self.journal.waker.lock().unwrap() = Some(waker);
    }
}

/// A running lane with its journals.
struct Bench {
    lane: Lane,
    sender: LaneSender,
    answers: Receiver<Vec<Answer>>,
    drained: Receiver<(u16, u64)>,
    journals: Vec<Arc<Journal>>,
}

impl Bench {
    fn start(database: &Database, journals: usize, change: impl FnOnce(&mut LaneConfig)) -> Bench {
        let journals = (0..journals).map(|_| Arc::default()).collect();
        Bench::try_with(database, journals, change).unwrap()
    }

    fn try_with(
        database: &Database,
        journals: Vec<Arc<Journal>>,
        change: impl FnOnce(&mut LaneConfig),
    ) -> Result<Bench, String> {
        let mut config = LaneConfig::new(database.clone());
        config.drain.linger = Duration::from_millis(20);
        change(&mut config);
        let (to, answers) = channel();
        let (heard, drained) = channel();
        let sources = (0..).zip(&journals).map(|(number, journal)| {
            let (identity, journal) = (7, journal.clone());
            Box::new(ListSource {
                number,
                identity,
                journal,
            }) as Box<dyn Source>
        });
        let lane = Lane::start(
            config,
            vec![Box::new(move |batch| drop(to.send(batch)))],
            sources.collect(),
            Box::new(move |journal, seq| {
                let _ = heard.send((journal, seq));
            }),
        )?;
        Ok(Bench {
            sender: lane.sender(),
            lane,
            answers,
            drained,
            journals,
        })
    }

    fn send(&self, requests: Vec<Request>) {
        self.sender.try_send(0, requests).unwrap();
    }

    fn answers(&self, count: usize) -> Vec<Answer> {
        let mut answers = Vec::new();
        while answers.len() < count {
            answers.extend(self.answers.recv_timeout(PATIENCE).unwrap());
        }
        assert_eq!(answers.len(), count);
        answers
    }

    fn load(&self, name: &str) -> Result<Option<Loaded>, String> {
        self.send(vec![Request::Load { name: name.into() }]);
        match self.answers(1).remove(0) {
            Answer::Loaded { user, .. } => Ok(user),
            Answer::LoadFailed { error, .. } => Err(error),
            other => panic!("{other:?}"),
        }
    }

    fn document(&self, name: &str, key: &str) -> Option<Box<[u8]>> {
        let query = Query::Document {
            name: name.into(),
            key: key.into(),
        };
        self.send(vec![Request::Read { ticket: 7, query }]);
        match self.answers(1).remove(0) {
            Answer::Document { ticket: 7, result } => result.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until a journal is in the database up to its end.
    fn all_drained(&self, journal: u16) {
        let end = self.journals[usize::from(journal)].len();
        while self.drained.recv_timeout(PATIENCE).unwrap() != (journal, end) {}
    }
}

#[test]
fn a_database_is_named_by_its_address_and_never_shows_its_password() {
    let file = Database::parse("sqlite:data/nitro.db").unwrap();
    assert_eq!(file.to_string(), "data/nitro.db");
    let server = Database::parse("mysql://nitro:s3cret@db.example.com:3307/trade").unwrap();
    assert_eq!(format!("{server} {server:?}").matches("s3cret").count(), 0);
    assert_eq!(server.to_string(), "mysql://db.example.com:3307/trade");
    for wrong in [
        "",
        "sqlite:",
        "postgres://x/y",
        "mysql://user@host",
        "data/nitro.db",
    ] {
        let sentence = Database::parse(wrong).unwrap_err();
        assert!(
            sentence.contains("sqlite:") || sentence.contains("mysql:"),
            "{sentence}"
        );
    }
}
