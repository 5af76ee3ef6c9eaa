//! SQL: SQLite, or MySQL 8 / MariaDB 10.11 and later, behind one face.
//!
//! In: names to load, queries, and what the journals carry. Out: what was found, and positions up to which journals are
//! applied. Promises:
//!
//! - a load of up to 50 users is one statement, a page of an archive is one statement: one consistent view each;
//! - a batch of changes is one transaction with the positions of its journals, of few multi-row statements; a change
//!   that is older than what is there, or was applied before, changes nothing;
//! - names, JIDs and keys are bytes; what a database would cut or fold it refuses.
//!
//! [`Sql`] is one dedicated connection: [`lane`] holds one for loads, one for documents and archive pages, and one for
//! the drain. [`admin`] is the database by hand, [`copy`] carries everything from one database into another.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::mysql::MySqlConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};

pub mod admin;
mod apply;
mod connection;
pub mod copy;
pub mod figures;
pub mod lane;
pub mod purge;
mod read;
mod schema;
mod statements;

pub use apply::{Ahead, Applied, Entry, Outcome, Position, UserChange, UserOp};
pub use connection::{SqlError, Trouble};
pub use read::{Found, KeyShape, Listed};

use crate::observe::SharedHistograms;
use apply::Known;
use connection::{Connection, Options};

/// Which database: `sqlite:PATH`, or `mysql://user:password@host:port/name`, or `mysql://user@localhost/name?socket=PATH`.
#[derive(Clone)]
pub enum Database {
    Sqlite(PathBuf),
    MySql(Box<MySqlConnectOptions>),
}

impl Database {
    /// The error is a sentence for the operator, without the password.
    pub fn parse(text: &str) -> Result<Database, String> {
        if let Some(path) = text.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path {
                "" => Err(
                    "`sqlite:` needs the path of a file, for example sqlite:data/nitro.db".into(),
                ),
                path => Ok(Database::Sqlite(path.into())),
            };
        }
        if !text.starts_with("mysql://") && !text.starts_with("mariadb://") {
            return Err("a database is `sqlite:PATH` or `mysql://user:password@host/name`".into());
        }
        let text = text.replacen("mariadb://", "mysql://", 1);
        let options = MySqlConnectOptions::from_str(&text)
            .map_err(|error| format!("this is no `mysql://user:password@host/name`: {error}"))?;
        match options.get_database() {
            None => Err(
                "the database's name is missing: `mysql://user:password@host/name`, made with CREATE DATABASE name"
                    .into(),
            ),
            Some(_) => Ok(Database::MySql(Box::new(options))),
        }
    }

    fn options(&self, page_cache_bytes: usize) -> Options {
        match self {
            Database::Sqlite(path) => {
                Options::Sqlite(Box::new(sqlite_options(path, page_cache_bytes)))
            }
            Database::MySql(options) => Options::MySql(Box::new(
                (**options)
                    .clone()
                    .statement_cache_capacity(256)
                    .disable_statement_logging(),
            )),
        }
    }
}

/// For sentences and logs: never the password.
impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Database::Sqlite(path) => path.display().fmt(f),
            Database::MySql(options) => {
                let name = options.get_database().unwrap_or("");
                match options.get_socket() {
                    Some(socket) => write!(f, "mysql:{}/{name}", socket.display()),
                    None => write!(
                        f,
                        "mysql://{}:{}/{name}",
                        options.get_host(),
                        options.get_port()
                    ),
                }
            }
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Figures for the metrics. All but `queue_depth`, `up` and `drain_waiting` only grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// SQL statements, BEGIN and COMMIT included.
    pub statements: AtomicU64,
    /// Loads asked for.
    pub loads: AtomicU64,
    /// Users found by them.
    pub users_loaded: AtomicU64,
    /// Documents, and retractions on pages, asked for.
    pub reads: AtomicU64,
    /// Archive pages asked for.
    pub pages: AtomicU64,
    /// Transactions committed.
    pub transactions: AtomicU64,
    /// Rows that the drain wrote or deleted.
    pub rows: AtomicU64,
    /// Records of journals that are in the database, or need not be.
    pub drained: AtomicU64,
    /// Entries of archives deleted because they were old enough.
    pub purged: AtomicU64,
    /// Records for users who do not exist.
    pub skipped: AtomicU64,
    /// Records that the database refused and that lie in `quarantine`.
    pub quarantined: AtomicU64,
    /// Attempts repeated because the database was locked, full or gone.
    pub retries: AtomicU64,
    /// Requests answered with "not available".
    pub failures: AtomicU64,
    /// Batches given back because the queue was full.
    pub refused: AtomicU64,
    /// Requests that wait or are under way.
    pub queue_depth: AtomicUsize,
    /// The highest it was.
    pub queue_depth_max: AtomicUsize,
    /// Records read from journals and not yet in the database.
    pub drain_waiting: AtomicUsize,
    /// Whether the last statement was answered.
    pub up: AtomicBool,
    /// How long statements take.
    pub timings: SharedHistograms,
}

/// One connection, with what it needs to be made again.
pub struct Sql {
    conn: Connection,
    database: Database,
    page_cache_bytes: usize,
    counters: Arc<Counters>,
    known: Known,
}

impl Sql {
    /// Opens the database; SQLite's file is made (mode 0600, its folder 0700) if there is none. The schema is brought up
    /// to date. The error is a sentence for the operator.
    pub async fn open(
        database: &Database,
        page_cache_bytes: usize,
        counters: Arc<Counters>,
    ) -> Result<Sql, String> {
        let mut sql = Sql::unconnected(database, page_cache_bytes, counters);
        sql.set_up().await.map_err(|error| error.sentence)?;
        Ok(sql)
    }

    /// A connection that is still to be made, by [`Sql::reconnect`] or [`Sql::set_up`].
    pub fn unconnected(
        database: &Database,
        page_cache_bytes: usize,
        counters: Arc<Counters>,
    ) -> Sql {
        Sql {
            conn: Connection::new(database.options(page_cache_bytes), counters.clone()),
            database: database.clone(),
            page_cache_bytes,
            counters,
            known: Known::default(),
        }
    }

    /// A further connection to the same database, not made yet.
    pub fn another(&self) -> Sql {
        Sql::unconnected(&self.database, self.page_cache_bytes, self.counters.clone())
    }

    /// Connects and brings the schema up to date. A database that a copy has not filled yet is refused.
    pub async fn set_up(&mut self) -> Result<(), SetUpError> {
        self.set_up_unfinished().await?;
        match self.copying().await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(SetUpError::of_operator(format!(
                "the database {} is half of a copy: repeat the `nitro migrate-store` or `nitro restore` that was \
                 interrupted, or name another database",
                self.database
            ))),
            Err(error) => Err(SetUpError {
                sentence: format!("cannot read the database {}: {error}", self.database),
                unreachable: error.unreachable,
            }),
        }
    }

    /// The same, whether a copy is under way or not.
    async fn set_up_unfinished(&mut self) -> Result<(), SetUpError> {
        if let Database::Sqlite(path) = &self.database {
            create_private(path).map_err(SetUpError::of_operator)?;
        }
        let mut tries = 0;
        loop {
            match self.conn.connect().await {
                Ok(()) => break,
                // Two who make a file at once meet when they switch it to WAL.
                Err(error) if error.trouble == Trouble::Busy && tries < 100 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => {
                    return Err(SetUpError {
                        sentence: format!("cannot open the database {}: {error}", self.database),
                        unreachable: error.unreachable,
                    });
                }
            }
        }
        match schema::migrate(&mut self.conn, &self.database).await {
            Ok(()) => Ok(()),
            Err(schema::SchemaError::Wrong(sentence)) => Err(SetUpError::of_operator(sentence)),
            Err(schema::SchemaError::Sql(error)) => Err(SetUpError {
                sentence: format!(
                    "cannot bring the schema of the database {} up to date: {error}",
                    self.database
                ),
                unreachable: error.unreachable,
            }),
        }
    }

    /// A new connection in place of this one, after [`Trouble::Lost`].
    pub async fn reconnect(&mut self) -> Result<(), SqlError> {
        self.known.clear();
        self.conn.connect().await
    }

    pub fn is_connected(&self) -> bool {
        self.conn.is_live()
    }

    /// Gives the connection up, for example because its answer comes too late.
    pub fn disconnect(&mut self) {
        self.conn.drop_connection();
    }

    /// How long one statement may take from now on; 10 s at first. What it was before.
    pub fn set_deadline(&mut self, deadline: Duration) -> Duration {
        std::mem::replace(&mut self.conn.deadline, deadline)
    }

    /// Closes the connection; SQLite's last one moves the write-ahead log into the file.
    pub async fn close(self) {
        self.conn.close().await;
    }
}

/// For calls that wait: a runtime of the calling thread. The error is a sentence.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start a runtime: {error}"))
}

/// Why a database could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{sentence}")]
pub struct SetUpError {
    /// For the operator.
    pub sentence: String,
    /// It was only out of reach: trying again may help.
    pub unreachable: bool,
}

impl SetUpError {
    fn of_operator(sentence: String) -> SetUpError {
        SetUpError {
            sentence,
            unreachable: false,
        }
    }
}

/// `archive.peer_key`: FNV-1a of the bare JID, folded to 32 bits. A filter: who searches compares the JID as well.
fn peer_key(peer: &str) -> i64 {
    let (bare, _) = split_jid(peer);
    let hash = bare.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    i64::from(((hash >> 32) ^ hash) as u32 as i32)
}

/// Bare JID and resource. The first slash separates them (RFC 7622, 3.1).
fn split_jid(jid: &str) -> (&str, Option<&str>) {
    match jid.split_once('/') {
        Some((bare, resource)) => (bare, Some(resource)),
        None => (jid, None),
    }
}

fn sqlite_options(path: &Path, page_cache_bytes: usize) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Wal)
        // "Drained" means durable: NORMAL would lose the last commits with the power.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_millis(500))
        // No mmap: it made loads no faster, and an unreadable page would be a signal instead of an error.
        // A negative size is in KiB.
        .pragma("cache_size", format!("-{}", page_cache_bytes / 1024))
        .pragma("temp_store", "memory")
        // 16 MiB between checkpoints; what a bulk import left behind is cut to 64 MiB.
        .pragma("wal_autocheckpoint", "4000")
        .pragma("journal_size_limit", "67108864")
        .statement_cache_capacity(256)
        .row_buffer_size(256)
        .thread_name(|id| format!("sql-{id}"))
        .disable_statement_logging()
}

/// SQLite gives its other files (-wal, -shm) the mode of the main one.
fn create_private(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let sentence =
        |what: &Path, error: std::io::Error| format!("cannot create {}: {error}", what.display());
    let folder = path.parent().filter(|one| !one.as_os_str().is_empty());
    if let Some(folder) = folder {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| sentence(folder, error))?;
    }
    match std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
    {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(sentence(path, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
