//! SQLite: the schema's migrations and every statement, on one dedicated connection.
//!
//! In: names to load, queries, changes. Out: what was found, or the outcome of each change. Promises: a load of up to
//! 50 users is one statement; all changes of one call are one transaction, durable when the call returns; statements
//! come in the sizes 1, 10 and 50 only, so that each stays prepared.

use std::borrow::Cow;
use std::path::Path;
use std::sync::LazyLock;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fnv::FnvHashMap;
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{Arguments, ConnectOptions, Connection, Row};

use super::lane::LaneCounters;
use super::record::{Record, RecordError};
use super::tier::{Last, Loaded, Op, WriteError};

/// Rows that one statement takes at most.
pub const ROWS_MAX: usize = 50;

static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("src/store/migrations");

/// What kind of trouble it is, which says what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Somebody else holds the lock: try again.
    Busy,
    /// No space left.
    Full,
    /// This one statement is refused; the connection is well.
    Refused,
    /// The connection or the file is in doubt: connect again.
    Lost,
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct SqlError {
    pub trouble: Trouble,
    pub text: String,
}

impl From<sqlx::Error> for SqlError {
    fn from(error: sqlx::Error) -> SqlError {
        let code = error
            .as_database_error()
            .and_then(|error| error.code())
            .and_then(|code| code.parse::<i32>().ok());
        // Primary result codes of SQLite are the low byte of the extended ones.
        let trouble = match code.map(|code| code & 0xff) {
            Some(5 | 6) => Trouble::Busy, // BUSY, LOCKED
            Some(13) => Trouble::Full,    // FULL
            // CORRUPT (a page of the file), TOOBIG, CONSTRAINT
            Some(11 | 18 | 19) => Trouble::Refused,
            _ => Trouble::Lost,
        };
        SqlError {
            trouble,
            text: error.to_string(),
        }
    }
}

impl From<SqlError> for WriteError {
    fn from(error: SqlError) -> WriteError {
        match error.trouble {
            Trouble::Full => WriteError::Full,
            _ => WriteError::Unavailable(error.text),
        }
    }
}

/// One connection to the database file.
pub struct Sqlite {
    conn: SqliteConnection,
    options: SqliteConnectOptions,
    counters: std::sync::Arc<LaneCounters>,
}

/// What a load found for one name.
pub type Found = Result<Option<Loaded>, RecordError>;

impl Sqlite {
    /// Opens the file, made with mode 0600 (its folder with 0700) if there is none, and brings its schema up to date.
    /// The error is a sentence for the operator.
    pub async fn open(
        path: &Path,
        page_cache_bytes: usize,
        counters: std::sync::Arc<LaneCounters>,
    ) -> Result<Sqlite, String> {
        create_private(path)?;
        let sentence = |error: &dyn std::fmt::Display| {
            format!("cannot open the database {}: {error}", path.display())
        };
        let options = options(path, page_cache_bytes);
        let mut conn = options.connect().await.map_err(|error| sentence(&error))?;
        migrate(&mut conn, path).await?;
        Ok(Sqlite {
            conn,
            options,
            counters,
        })
    }

    /// A further connection to the same file.
    pub async fn another(&self) -> Result<Sqlite, SqlError> {
        let (options, counters) = (self.options.clone(), self.counters.clone());
        Ok(Sqlite {
            conn: options.connect().await?,
            options,
            counters,
        })
    }

    /// A new connection in place of this one, after [`Trouble::Lost`].
    pub async fn reconnect(&mut self) -> Result<(), SqlError> {
        self.conn = self.options.connect().await?;
        Ok(())
    }

    /// Closes the connection; the last one moves the write-ahead log into the file.
    pub async fn close(self) -> Result<(), SqlError> {
        Ok(self.conn.close().await?)
    }

    /// Loads up to [`ROWS_MAX`] users with one statement. The answers stand in the order of `names`.
    pub async fn load(&mut self, names: &[&str]) -> Result<Vec<Found>, SqlError> {
        let mut found: Vec<Found> = Vec::new();
        found.resize_with(names.len(), || Ok(None));
        let mut offline: Vec<(usize, u64, Box<[u8]>)> = Vec::new();
        for row in self
            .ask(&LOAD, names.len(), |args, n| args.add(names.get(n)))
            .await?
        {
            let n = index(&row)?;
            let bytes: Box<[u8]> = row.try_get::<&[u8], _>(2)?.into();
            let number: Option<i64> = row.try_get(3)?;
            if row.try_get::<i64, _>(1)? == 1 {
                offline.push((n, number.unwrap_or_default() as u64, bytes));
                continue;
            }
            let status: Option<&str> = row.try_get(4)?;
            let last = number.map(|at| Last {
                at: at as u64,
                status: status.unwrap_or("").into(),
            });
            found[n] = Record::from_bytes(bytes).map(|record| {
                Some(Loaded {
                    record,
                    offline: Vec::new(),
                    last,
                })
            });
        }
        // The index delivers them in this order already; a sort of what is sorted costs nothing.
        offline.sort_by_key(|(n, id, _)| (*n, *id));
        for (n, id, stanza) in offline {
            if let Ok(Some(loaded)) = &mut found[n] {
                loaded.offline.push((id, stanza));
            }
        }
        Ok(found)
    }

    /// Reads up to [`ROWS_MAX`] documents, each (name, key), with one statement.
    pub async fn documents(
        &mut self,
        wanted: &[(&str, &str)],
    ) -> Result<Vec<Option<Box<[u8]>>>, SqlError> {
        let rows = self.ask(&DOCUMENTS, wanted.len(), |args, n| {
            args.add(wanted.get(n).map(|one| one.0))?;
            args.add(wanted.get(n).map(|one| one.1))
        });
        let mut found = vec![None; wanted.len()];
        for row in rows.await? {
            found[index(&row)?] = Some(row.try_get::<&[u8], _>(1)?.into());
        }
        Ok(found)
    }

    /// Reads the last activity of up to [`ROWS_MAX`] users with one statement.
    pub async fn last(&mut self, names: &[&str]) -> Result<Vec<Option<Last>>, SqlError> {
        let mut found = vec![None; names.len()];
        for row in self
            .ask(&LAST, names.len(), |args, n| args.add(names.get(n)))
            .await?
        {
            let (at, status) = (row.try_get::<i64, _>(1)?, row.try_get::<&str, _>(2)?);
            found[index(&row)?] = Some(Last {
                at: at as u64,
                status: status.into(),
            });
        }
        Ok(found)
    }

    /// Applies all changes in one transaction, in their order as far as it matters, and commits. A change that cannot
    /// be applied ([`WriteError::Conflict`], [`WriteError::Missing`]) leaves the others alone; an error means that
    /// nothing was applied.
    pub async fn write(&mut self, ops: &[&Op]) -> Result<Vec<Result<(), WriteError>>, SqlError> {
        self.run("BEGIN IMMEDIATE").await?;
        let done = match self.write_all(ops).await {
            Ok(outcomes) => self.run("COMMIT").await.map(|()| outcomes),
            Err(error) => Err(error),
        };
        match done {
            Ok(outcomes) => {
                self.counters.transactions.fetch_add(1, Relaxed);
                Ok(outcomes)
            }
            Err(error) => {
                // SQLite may have rolled back by itself, then this fails, which is as good.
                let _ = self.run("ROLLBACK").await;
                Err(error)
            }
        }
    }

    /// Counts of accounts by the shape of their keys.
    pub async fn key_shapes(&mut self) -> Result<Vec<KeyShape>, SqlError> {
        let rows = sqlx::query(KEY_SHAPES).fetch_all(&mut self.conn).await?;
        let shape = |row: &SqliteRow, at: usize| -> Result<Option<(u32, usize)>, sqlx::Error> {
            let (iterations, salt_len) = (
                row.try_get::<Option<u32>, _>(at)?,
                row.try_get::<Option<u32>, _>(at + 1)?,
            );
            Ok(iterations.zip(salt_len.map(|len| len as usize)))
        };
        let mut shapes = Vec::new();
        for row in &rows {
            shapes.push(KeyShape {
                sha1: shape(row, 0)?,
                sha256: shape(row, 2)?,
                users: row.try_get::<i64, _>(4)? as u64,
            });
        }
        Ok(shapes)
    }

    /// Accounts whose name begins with `prefix` and comes after `after`, in order of their bytes.
    pub async fn list(
        &mut self,
        prefix: &str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<Listed>, SqlError> {
        // No name that begins with the prefix is behind the prefix and Unicode's last character.
        let rows = sqlx::query(LIST)
            .bind(prefix)
            .bind(format!("{prefix}\u{10ffff}"))
            .bind(after)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_all(&mut self.conn)
            .await?;
        let mut listed = Vec::new();
        for row in &rows {
            listed.push(Listed {
                name: row.try_get(0)?,
                created_at: row.try_get::<i64, _>(1)? as u64,
                updated_at: row.try_get::<i64, _>(2)? as u64,
                disabled: row.try_get(3)?,
            });
        }
        Ok(listed)
    }

    /// How many accounts there are.
    pub async fn count(&mut self) -> Result<u64, SqlError> {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM users")
            .fetch_one(&mut self.conn)
            .await?;
        Ok(count as u64)
    }

    async fn write_all(&mut self, ops: &[&Op]) -> Result<Vec<Result<(), WriteError>>, SqlError> {
        let mut outcomes = Vec::with_capacity(ops.len());
        while outcomes.len() < ops.len() {
            let rest = &ops[outcomes.len()..];
            let phase = &rest[..phase_len(rest)];
            self.write_phase(phase, &mut outcomes).await?;
        }
        Ok(outcomes)
    }

    /// Applies changes none of which depends on another one: sorted by kind, each kind in multi-row statements.
    async fn write_phase(
        &mut self,
        ops: &[&Op],
        outcomes: &mut Vec<Result<(), WriteError>>,
    ) -> Result<(), SqlError> {
        let ids = self.ids(ops).await?;
        let mut rows = Phase::default();
        for op in ops {
            let id = ids.get(op.name()).copied();
            outcomes.push(match (op, id) {
                (Op::AddUser { .. }, Some(_)) => Err(WriteError::Conflict),
                (Op::AddUser { name, record }, None) => {
                    rows.add.push((name, record));
                    Ok(())
                }
                (_, None) => Err(WriteError::Missing),
                (op, Some(id)) => {
                    rows.sort(id, op);
                    Ok(())
                }
            });
        }
        let now = now();
        self.execute(&ADD_USER, &rows.add, |args, (name, record)| {
            args.add(*name)?;
            add_columns(args, record, now)
        })
        .await?;
        self.execute(&PUT_USER, &rows.put, |args, (id, name, record)| {
            args.add(*id)?;
            args.add(*name)?;
            add_columns(args, record, now)
        })
        .await?;
        self.execute(&PUT_OFFLINE, &rows.offline, |args, (user, id, stanza)| {
            args.add(*user)?;
            args.add(*id as i64)?;
            args.add(*stanza)
        })
        .await?;
        self.execute(&DROP_OFFLINE, &rows.drop, |args, (user, up_to)| {
            args.add(*user)?;
            args.add(i64::try_from(*up_to).unwrap_or(i64::MAX))
        })
        .await?;
        self.execute(
            &PUT_DOCUMENT,
            &rows.documents,
            |args, (user, key, value)| {
                args.add(*user)?;
                args.add(*key)?;
                args.add(*value)
            },
        )
        .await?;
        self.execute(&DROP_DOCUMENT, &rows.no_documents, |args, (user, key)| {
            args.add(*user)?;
            args.add(*key)
        })
        .await?;
        self.execute(&PUT_LAST, &rows.last, |args, (user, at, status)| {
            args.add(*user)?;
            args.add(*at as i64)?;
            args.add(*status)
        })
        .await?;
        self.execute(&REMOVE_USER, &rows.remove, |args, user| args.add(*user))
            .await
    }

    /// The keys of those of the users named who exist.
    async fn ids<'o>(&mut self, ops: &[&'o Op]) -> Result<FnvHashMap<&'o str, i64>, SqlError> {
        let mut names: Vec<&'o str> = ops.iter().map(|op| op.name()).collect();
        names.sort_unstable();
        names.dedup();
        let mut ids = FnvHashMap::default();
        for names in names.chunks(ROWS_MAX) {
            for row in self
                .ask(&IDS, names.len(), |args, n| args.add(names.get(n)))
                .await?
            {
                ids.insert(names[index(&row)?], row.try_get(1)?);
            }
        }
        Ok(ids)
    }

    /// Runs a query whose parameters are `count` rows, filled up with NULL (which matches nothing) to the next size.
    async fn ask(
        &mut self,
        statement: &'static LazyLock<Sizes>,
        count: usize,
        bind: impl Fn(&mut SqliteArguments, usize) -> Bound,
    ) -> Result<Vec<SqliteRow>, SqlError> {
        debug_assert!(count <= ROWS_MAX);
        let size = SIZES
            .into_iter()
            .find(|size| *size >= count)
            .unwrap_or(ROWS_MAX);
        let mut args = SqliteArguments::default();
        (0..size)
            .try_for_each(|n| bind(&mut args, n))
            .map_err(sqlx::Error::Encode)?;
        self.counters.statements.fetch_add(1, Relaxed);
        Ok(sqlx::query_with(statement.of(size), args)
            .fetch_all(&mut self.conn)
            .await?)
    }

    /// Runs a change for all rows, 50, 10 or 1 at a time.
    async fn execute<R>(
        &mut self,
        statement: &'static LazyLock<Sizes>,
        mut rows: &[R],
        bind: impl Fn(&mut SqliteArguments, &R) -> Bound,
    ) -> Result<(), SqlError> {
        for size in SIZES.into_iter().rev() {
            while rows.len() >= size {
                let (chunk, rest) = rows.split_at(size);
                rows = rest;
                let mut args = SqliteArguments::default();
                chunk
                    .iter()
                    .try_for_each(|row| bind(&mut args, row))
                    .map_err(sqlx::Error::Encode)?;
                self.counters.statements.fetch_add(1, Relaxed);
                sqlx::query_with(statement.of(size), args)
                    .execute(&mut self.conn)
                    .await?;
            }
        }
        Ok(())
    }

    async fn run(&mut self, statement: &'static str) -> Result<(), SqlError> {
        self.counters.statements.fetch_add(1, Relaxed);
        sqlx::query(statement).execute(&mut self.conn).await?;
        Ok(())
    }
}

/// How many accounts have keys of one shape; what an unknown user is shown follows this distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyShape {
    /// Iterations and bytes of salt, for SCRAM-SHA-1.
    pub sha1: Option<(u32, usize)>,
    /// The same for SCRAM-SHA-256.
    pub sha256: Option<(u32, usize)>,
    pub users: u64,
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds of the record's last change.
    pub updated_at: u64,
    pub disabled: bool,
}

type Bound = Result<(), sqlx::error::BoxDynError>;

const SIZES: [usize; 3] = [1, 10, ROWS_MAX];

/// One statement in its three sizes.
struct Sizes([String; 3]);

impl Sizes {
    fn new(text: impl Fn(usize) -> String) -> Sizes {
        Sizes(SIZES.map(text))
    }

    fn of(&'static self, size: usize) -> &'static str {
        let at = SIZES
            .iter()
            .position(|one| *one == size)
            .expect("callers ask for sizes that exist");
        &self.0[at]
    }
}

/// `(?,?),(?,?)`: rows of values.
fn rows(count: usize, width: usize) -> String {
    let row = format!("({})", vec!["?"; width].join(","));
    vec![row; count].join(",")
}

/// `(0,?),(1,?)`: rows of values with their number, so that answers need not repeat names.
fn numbered(count: usize, width: usize) -> String {
    let values = ",?".repeat(width);
    (0..count)
        .map(|n| format!("({n}{values})"))
        .collect::<Vec<_>>()
        .join(",")
}

// CROSS JOIN pins the order: from the few names to the large tables, never the other way.
static LOAD: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "WITH q(n, name) AS (VALUES {})
            SELECT q.n, 0, u.record, l.at, l.status FROM q CROSS JOIN users u ON u.name = q.name
                LEFT JOIN last_activity l ON l.user = u.id
            UNION ALL
            SELECT q.n, 1, o.stanza, o.id, NULL FROM q CROSS JOIN users u ON u.name = q.name
                CROSS JOIN offline o ON o.user = u.id",
            numbered(n, 1)
        )
    })
});
static DOCUMENTS: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "WITH q(n, name, key) AS (VALUES {})
            SELECT q.n, d.value FROM q CROSS JOIN users u ON u.name = q.name
                CROSS JOIN document d ON d.user = u.id AND d.key = q.key",
            numbered(n, 2)
        )
    })
});
static LAST: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "WITH q(n, name) AS (VALUES {})
            SELECT q.n, l.at, l.status FROM q CROSS JOIN users u ON u.name = q.name
                CROSS JOIN last_activity l ON l.user = u.id",
            numbered(n, 1)
        )
    })
});
static IDS: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "WITH q(n, name) AS (VALUES {})
            SELECT q.n, u.id FROM q CROSS JOIN users u ON u.name = q.name",
            numbered(n, 1)
        )
    })
});
static ADD_USER: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "INSERT INTO users (name, created_at, updated_at, disabled, sha1_iterations, sha1_salt_len,
                sha256_iterations, sha256_salt_len, record) VALUES {}",
            rows(n, 9)
        )
    })
});
static PUT_USER: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "INSERT INTO users (id, name, created_at, updated_at, disabled, sha1_iterations, sha1_salt_len,
                sha256_iterations, sha256_salt_len, record) VALUES {}
            ON CONFLICT (id) DO UPDATE SET created_at = excluded.created_at,
                updated_at = excluded.updated_at, disabled = excluded.disabled,
                sha1_iterations = excluded.sha1_iterations, sha1_salt_len = excluded.sha1_salt_len,
                sha256_iterations = excluded.sha256_iterations,
                sha256_salt_len = excluded.sha256_salt_len, record = excluded.record",
            rows(n, 10)
        )
    })
});
static REMOVE_USER: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| format!("DELETE FROM users WHERE id IN (VALUES {})", rows(n, 1)))
});
static PUT_OFFLINE: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "INSERT INTO offline (user, id, stanza) VALUES {} ON CONFLICT (user, id) DO NOTHING",
            rows(n, 3)
        )
    })
});
static DROP_OFFLINE: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "WITH q(user, up_to) AS (VALUES {}) DELETE FROM offline WHERE seq IN
                (SELECT o.seq FROM q CROSS JOIN offline o ON o.user = q.user AND o.id <= q.up_to)",
            rows(n, 2)
        )
    })
});
static PUT_DOCUMENT: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "INSERT INTO document (user, key, value) VALUES {}
            ON CONFLICT (user, key) DO UPDATE SET value = excluded.value",
            rows(n, 3)
        )
    })
});
static DROP_DOCUMENT: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "WITH q(user, key) AS (VALUES {}) DELETE FROM document WHERE seq IN
                (SELECT d.seq FROM q CROSS JOIN document d ON d.user = q.user AND d.key = q.key)",
            rows(n, 2)
        )
    })
});
static PUT_LAST: LazyLock<Sizes> = LazyLock::new(|| {
    Sizes::new(|n| {
        format!(
            "INSERT INTO last_activity (user, at, status) VALUES {}
            ON CONFLICT (user) DO UPDATE SET at = excluded.at, status = excluded.status",
            rows(n, 3)
        )
    })
});
const KEY_SHAPES: &str =
    "SELECT sha1_iterations, sha1_salt_len, sha256_iterations, sha256_salt_len, count(*)
    FROM users GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC";
const LIST: &str = "SELECT name, created_at, updated_at, disabled FROM users
    WHERE name >= ?1 AND name < ?2 AND name > ?3 ORDER BY name LIMIT ?4";

/// Changes of one phase, by kind. `&'o` are the changes themselves.
#[derive(Default)]
struct Phase<'o> {
    add: Vec<(&'o str, &'o Record)>,
    put: Vec<(i64, &'o str, &'o Record)>,
    offline: Vec<(i64, u64, &'o [u8])>,
    drop: Vec<(i64, u64)>,
    documents: Vec<(i64, &'o str, &'o [u8])>,
    no_documents: Vec<(i64, &'o str)>,
    last: Vec<(i64, u64, &'o str)>,
    remove: Vec<i64>,
}

impl<'o> Phase<'o> {
    fn sort(&mut self, user: i64, op: &'o Op) {
        match op {
            Op::AddUser { .. } => unreachable!("a user who exists is not added"),
            Op::PutUser { name, record } => self.put.push((user, name, record)),
            Op::RemoveUser { .. } => self.remove.push(user),
            Op::PutOffline { id, stanza, .. } => self.offline.push((user, *id, stanza)),
            Op::DropOffline { up_to, .. } => self.drop.push((user, *up_to)),
            Op::PutDocument {
                key,
                value: Some(value),
                ..
            } => self.documents.push((user, key, value)),
            Op::PutDocument {
                key, value: None, ..
            } => self.no_documents.push((user, key)),
            Op::PutLast { at, status, .. } => self.last.push((user, *at, status)),
        }
    }
}

/// How many of the first changes may be applied sorted by kind: up to the first that depends on the order beside
/// another one of the same user. Two of one kind keep their order inside their statement.
fn phase_len(ops: &[&Op]) -> usize {
    const WHOLE_USER: u8 = 1;
    let mut kinds: FnvHashMap<&str, u8> = FnvHashMap::default();
    let clash = ops.iter().position(|op| {
        let (kind, clashes) = match op {
            Op::AddUser { .. } | Op::RemoveUser { .. } => (WHOLE_USER, u8::MAX),
            Op::PutUser { .. } | Op::PutLast { .. } => (2, WHOLE_USER),
            Op::PutOffline { .. } => (4, WHOLE_USER | 8),
            Op::DropOffline { .. } => (8, WHOLE_USER | 4),
            Op::PutDocument { value: Some(_), .. } => (16, WHOLE_USER | 32),
            Op::PutDocument { value: None, .. } => (32, WHOLE_USER | 16),
        };
        let before = kinds.entry(op.name()).or_default();
        if *before & clashes != 0 {
            return true;
        }
        *before |= kind;
        false
    });
    clash.unwrap_or(ops.len())
}

fn add_columns(args: &mut SqliteArguments, record: &Record, now: i64) -> Bound {
    let user = record.get();
    args.add(user.created_at.to_native() as i64)?;
    args.add(now)?;
    args.add(user.disabled)?;
    for keys in [user.sha1.as_ref(), user.sha256.as_ref()] {
        args.add(keys.map(|keys| keys.iterations.to_native()))?;
        args.add(keys.map(|keys| keys.salt.len() as i64))?;
    }
    args.add(record.bytes())
}

fn index(row: &SqliteRow) -> Result<usize, sqlx::Error> {
    Ok(row.try_get::<i64, _>(0)? as usize)
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

fn options(path: &Path, page_cache_bytes: usize) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Wal)
        // "Written" means durable: NORMAL would lose the last commits with the power.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_millis(500))
        // No mmap: it made loads no faster, and an unreadable page would be a signal instead of an error.
        // A negative size is in KiB.
        .pragma("cache_size", format!("-{}", page_cache_bytes / 1024))
        .pragma("temp_store", "memory")
        // 16 MiB between checkpoints; what a bulk import left behind is cut to 64 MiB.
        .pragma("wal_autocheckpoint", "4000")
        .pragma("journal_size_limit", "67108864")
        .row_buffer_size(256)
        .thread_name(|id| format!("sql-{id}"))
        .disable_statement_logging()
}

async fn migrate(conn: &mut SqliteConnection, path: &Path) -> Result<(), String> {
    use sqlx::migrate::MigrateError;
    MIGRATOR.run(&mut *conn).await.map_err(|error| {
        let path = path.display();
        let own = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
        match error {
            MigrateError::VersionMissing(found) if found > own => format!(
                "the database {path} has schema {found}, this nitro knows schemas up to {own}: it was used by a newer nitro, start that one"
            ),
            error => format!("cannot bring the schema of the database {path} up to date: {error}"),
        }
    })
}

/// SQLite gives its other files (-wal, -shm) the mode of the main one.
fn create_private(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let sentence =
        |what: Cow<'_, str>, error: std::io::Error| format!("cannot create {what}: {error}");
    if let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| sentence(folder.to_string_lossy(), error))?;
    }
    match std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
    {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(sentence(path.to_string_lossy(), error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::user;
    use super::*;

    #[test]
    fn a_full_disk_is_told_and_what_was_there_stays() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        runtime.block_on(async {
            let path = folder.path().join("nitro.db");
            let mut sql = Sqlite::open(&path, 1 << 20, Default::default())
                .await
                .unwrap();
            let add = Op::AddUser {
                name: "romeo".into(),
                record: Record::new(&user(3)),
            };
            assert_eq!(sql.write(&[&add]).await.unwrap(), [Ok(())]);
            // SQLite answers a file that may not grow as it answers a full disk.
            sql.run("PRAGMA max_page_count = 20").await.unwrap();
            let put = Op::PutUser {
                name: "romeo".into(),
                record: Record::new(&user(4)),
            };
            let value = Some(vec![0; 1 << 20].into());
            let huge = Op::PutDocument {
                name: "romeo".into(),
                key: "vcard".into(),
                value,
            };
            let error = sql.write(&[&put, &huge]).await.unwrap_err();
            assert_eq!(
                (error.trouble, WriteError::from(error)),
                (Trouble::Full, WriteError::Full)
            );
            let contacts = async |sql: &mut Sqlite| {
                let found = sql.load(&["romeo"]).await.unwrap().remove(0);
                found.unwrap().unwrap().record.get().roster.len()
            };
            assert_eq!(
                contacts(&mut sql).await,
                3,
                "nothing of a failed transaction is applied"
            );
            assert_eq!(sql.write(&[&put]).await.unwrap(), [Ok(())]);
            assert_eq!(contacts(&mut sql).await, 4);
        });
    }
}
