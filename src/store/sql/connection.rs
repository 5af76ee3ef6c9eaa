//! One connection to either database: statements with values go in, rows come out, each within a deadline.
//!
//! Promise: a statement that does not answer in time costs its connection, never the thread; whoever uses it connects
//! again. There is no pool: its hops cost more than the statements.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use sqlx::mysql::{MySqlArguments, MySqlConnectOptions, MySqlConnection, MySqlDatabaseError};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteConnection};
use sqlx::{Arguments, ConnectOptions, Connection as _, Row as _, SqlSafeStr};

use super::Counters;
use crate::rt::give_way;

/// Steps of SQLite's machine, a few microseconds, after which its thread may give way.
const STEPS: i32 = 500;

/// What kind of trouble it is, which says what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Somebody else holds the lock: try again.
    Busy,
    /// No space left.
    Full,
    /// This one statement is refused; the connection is well.
    Refused,
    /// A page of the file cannot be read: what does not need it goes on.
    Damaged,
    /// The connection or the file is in doubt: connect again.
    Lost,
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct SqlError {
    pub trouble: Trouble,
    pub text: String,
    /// The server was not reached, or does not take more connections now: no word about rights or schema.
    pub unreachable: bool,
}

impl SqlError {
    pub(crate) fn lost(text: impl Into<String>) -> SqlError {
        SqlError {
            trouble: Trouble::Lost,
            text: text.into(),
            unreachable: true,
        }
    }

    pub(crate) fn refused(text: impl Into<String>) -> SqlError {
        SqlError {
            trouble: Trouble::Refused,
            text: text.into(),
            unreachable: false,
        }
    }
}

impl From<sqlx::Error> for SqlError {
    fn from(error: sqlx::Error) -> SqlError {
        let mysql = error
            .as_database_error()
            .and_then(|error| error.try_downcast_ref::<MySqlDatabaseError>())
            .map(MySqlDatabaseError::number);
        let (trouble, unreachable) = match (mysql, error.as_database_error()) {
            (Some(number), _) => of_mysql(number),
            (None, Some(error)) => {
                let code = error.code().and_then(|code| code.parse::<i32>().ok());
                (of_sqlite(code.unwrap_or(0)), false)
            }
            _ => {
                let unreachable = match &error {
                    sqlx::Error::Io(error) => error.kind() != std::io::ErrorKind::PermissionDenied,
                    sqlx::Error::Protocol(_) => true,
                    _ => false,
                };
                (Trouble::Lost, unreachable)
            }
        };
        SqlError {
            trouble,
            text: error.to_string(),
            unreachable,
        }
    }
}

/// Primary result codes of SQLite are the low byte of the extended ones. What is not named here is tried again, never
/// put aside.
fn of_sqlite(code: i32) -> Trouble {
    match code & 0xff {
        5 | 6 => Trouble::Busy, // BUSY, LOCKED
        13 => Trouble::Full,    // FULL
        11 => Trouble::Damaged, // CORRUPT
        // TOOBIG, CONSTRAINT, MISMATCH
        18..=20 => Trouble::Refused,
        _ => Trouble::Lost,
    }
}

/// Error numbers of MySQL and MariaDB, and whether the server could not be reached.
fn of_mysql(number: u16) -> (Trouble, bool) {
    match number {
        // Lock wait timeout, deadlock; a name that somebody else added at the same time.
        1205 | 1213 | 1062 => (Trouble::Busy, false),
        // Disk full, error writing file, error from the storage engine (28), table full.
        1021 | 1026 | 1030 | 1114 => (Trouble::Full, false),
        // Too many connections (of all, of this user), host blocked, shutting down.
        1040 | 1203 | 1129 | 1053 | 1077 => (Trouble::Lost, true),
        // NULL where none may be, row or packet too large, out of range, wrong or too long value, check.
        1048 | 1118 | 1153 | 1264 | 1292 | 1366 | 1406 | 1690 | 3819 | 3988 | 4025 => {
            (Trouble::Refused, false)
        }
        _ => (Trouble::Lost, false),
    }
}

/// A parameter. Text goes to MySQL as bytes, which no collation compares.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    Null,
    Int(i64),
    Text(&'a str),
    Bytes(&'a [u8]),
}

impl From<u64> for Value<'_> {
    /// Ids and revisions stay below `i64::MAX`; a bound of a search may lie beyond.
    fn from(number: u64) -> Self {
        Value::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

/// One row of an answer.
pub(super) enum Row {
    Sqlite(sqlx::sqlite::SqliteRow),
    MySql(sqlx::mysql::MySqlRow),
}

impl Row {
    pub fn int(&self, at: usize) -> Result<i64, SqlError> {
        Ok(self.optional_int(at)?.unwrap_or(0))
    }

    pub fn optional_int(&self, at: usize) -> Result<Option<i64>, SqlError> {
        Ok(match self {
            Row::Sqlite(row) => row.try_get(at)?,
            Row::MySql(row) => row.try_get(at)?,
        })
    }

    pub fn id(&self, at: usize) -> Result<u64, SqlError> {
        Ok(self.int(at)? as u64)
    }

    /// NULL is empty.
    pub fn bytes(&self, at: usize) -> Result<&[u8], SqlError> {
        let bytes: Option<&[u8]> = match self {
            Row::Sqlite(row) => row.try_get(at)?,
            Row::MySql(row) => row.try_get(at)?,
        };
        Ok(bytes.unwrap_or_default())
    }

    pub fn optional_bytes(&self, at: usize) -> Result<Option<&[u8]>, SqlError> {
        Ok(match self {
            Row::Sqlite(row) => row.try_get(at)?,
            Row::MySql(row) => row.try_get(at)?,
        })
    }

    pub fn text(&self, at: usize) -> Result<&str, SqlError> {
        std::str::from_utf8(self.bytes(at)?)
            .map_err(|error| SqlError::refused(format!("column {at} is not UTF-8: {error}")))
    }
}

/// Where a connection leads.
#[derive(Debug, Clone)]
pub(super) enum Options {
    Sqlite(Box<SqliteConnectOptions>),
    MySql(Box<MySqlConnectOptions>),
}

/// The differences between the two that a statement's text shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    MySql,
}

enum Live {
    Sqlite(SqliteConnection),
    MySql(MySqlConnection),
}

/// A connection that can be lost and made again.
pub(super) struct Connection {
    options: Options,
    live: Option<Live>,
    counters: Arc<Counters>,
    /// How long one statement may take.
    pub deadline: Duration,
    /// Bytes that one statement may have.
    pub packet_max: usize,
}

/// Gives way, then runs `$body` on whichever connection is live, within the deadline; what was under way when it passed is given up.
macro_rules! on_live {
    ($self:ident, $conn:ident, $args:ident, $values:ident, $body:expr, $wrap:ident) => {{
        give_way();
        let deadline = $self.deadline;
        let done = match $self.live.as_mut() {
            None => return Err(SqlError::lost("there is no connection")),
            Some(Live::Sqlite($conn)) => {
                let $args = sqlite_arguments($values)?;
                tokio::time::timeout(deadline, $body)
                    .await
                    .map(|done| done.map($wrap::sqlite))
            }
            Some(Live::MySql($conn)) => {
                let $args = mysql_arguments($values)?;
                tokio::time::timeout(deadline, $body)
                    .await
                    .map(|done| done.map($wrap::mysql))
            }
        };
        match done {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err($self.judge(error.into())),
            Err(_) => {
                $self.live = None;
                Err(SqlError::lost(format!("no answer within {deadline:?}")))
            }
        }
    }};
}

impl Connection {
    /// Not connected yet.
    pub fn new(options: Options, counters: Arc<Counters>) -> Connection {
        Connection {
            options,
            live: None,
            counters,
            deadline: Duration::from_secs(10),
            packet_max: usize::MAX,
        }
    }

    pub fn dialect(&self) -> Dialect {
        match self.options {
            Options::Sqlite(_) => Dialect::Sqlite,
            Options::MySql(_) => Dialect::MySql,
        }
    }

    pub fn is_live(&self) -> bool {
        self.live.is_some()
    }

    /// Gives the connection up; what is under way on it may or may not happen.
    pub fn drop_connection(&mut self) {
        self.live = None;
    }

    /// Connects anew, whatever was there before.
    pub async fn connect(&mut self) -> Result<(), SqlError> {
        self.live = None;
        let connected = async {
            Ok::<_, sqlx::Error>(match &self.options {
                Options::Sqlite(options) => {
                    let mut connection = options.connect().await?;
                    let mut handle = connection.lock_handle().await?;
                    handle.set_progress_handler(STEPS, || {
                        give_way();
                        true
                    });
                    drop(handle);
                    Live::Sqlite(connection)
                }
                Options::MySql(options) => Live::MySql(options.connect().await?),
            })
        };
        match tokio::time::timeout(self.deadline, connected).await {
            Ok(Ok(live)) => self.live = Some(live),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => {
                return Err(SqlError::lost(format!(
                    "no connection within {:?}",
                    self.deadline
                )));
            }
        }
        if self.dialect() == Dialect::MySql {
            // Strict, or a value that does not fit would be cut instead of refused. A statement sees what is committed
            // when it begins: that is the consistent view a load or a page needs.
            self.batch("SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', SESSION innodb_lock_wait_timeout = 5")
                .await?;
            self.batch("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
                .await?;
            let rows = self.ask("SELECT @@max_allowed_packet", &[]).await?;
            let packet_max = match &rows[..] {
                [Row::MySql(row)] => row.try_get_unchecked::<i64, _>(0)? as usize,
                _ => 1 << 20,
            };
            self.packet_max = packet_max;
        }
        Ok(())
    }

    /// Closes properly; SQLite's last connection moves the write-ahead log into the file.
    pub async fn close(mut self) {
        let closed = async {
            match self.live.take() {
                Some(Live::Sqlite(conn)) => conn.close().await,
                Some(Live::MySql(conn)) => conn.close().await,
                None => Ok(()),
            }
        };
        let _ = tokio::time::timeout(self.deadline, closed).await;
    }

    /// Asks for rows.
    pub async fn ask(
        &mut self,
        text: impl SqlSafeStr,
        values: &[Value<'_>],
    ) -> Result<Vec<Row>, SqlError> {
        self.fits(values)?;
        self.counters.statements.fetch_add(1, Relaxed);
        on_live!(
            self,
            conn,
            args,
            values,
            sqlx::query_with(text, args).fetch_all(conn),
            Rows
        )
    }

    /// Changes something; how many rows.
    pub async fn run(
        &mut self,
        text: impl SqlSafeStr,
        values: &[Value<'_>],
    ) -> Result<u64, SqlError> {
        self.fits(values)?;
        self.counters.statements.fetch_add(1, Relaxed);
        on_live!(
            self,
            conn,
            args,
            values,
            sqlx::query_with(text, args).execute(conn),
            Affected
        )
    }

    /// Statements without parameters, as they stand.
    pub async fn batch(&mut self, text: impl SqlSafeStr) -> Result<u64, SqlError> {
        self.counters.statements.fetch_add(1, Relaxed);
        let values: &[Value<'_>] = &[];
        on_live!(
            self,
            conn,
            _args,
            values,
            sqlx::raw_sql(text).execute(conn),
            Affected
        )
    }

    /// Begins a transaction that is going to write.
    pub async fn begin(&mut self) -> Result<(), SqlError> {
        // SQLite: with plain BEGIN two writers that both read first could only fail.
        let text = match self.dialect() {
            Dialect::Sqlite => "BEGIN IMMEDIATE",
            Dialect::MySql => "START TRANSACTION",
        };
        self.batch(text).await.map(drop)
    }

    pub async fn commit(&mut self) -> Result<(), SqlError> {
        self.batch("COMMIT").await?;
        self.counters.transactions.fetch_add(1, Relaxed);
        Ok(())
    }

    /// After an error. If even that fails, the connection is given up, which rolls back as well.
    pub async fn roll_back(&mut self) {
        let deadline = self.deadline;
        let done = match &mut self.live {
            None => return,
            Some(Live::Sqlite(conn)) => {
                let rollback = sqlx::raw_sql("ROLLBACK").execute(conn);
                // It may have rolled back by itself, and then says that there is nothing to roll back.
                let done = tokio::time::timeout(deadline, rollback).await;
                done.is_ok()
            }
            Some(Live::MySql(conn)) => {
                let rollback = sqlx::raw_sql("ROLLBACK").execute(conn);
                let done = tokio::time::timeout(deadline, rollback).await;
                done.is_ok_and(|done| done.is_ok())
            }
        };
        if !done {
            self.live = None;
        }
    }

    /// A server that gets a packet that is too large hangs up: better not to send it.
    fn fits(&self, values: &[Value<'_>]) -> Result<(), SqlError> {
        if self.packet_max == usize::MAX {
            return Ok(());
        }
        let bytes: usize = values.iter().map(Value::bytes).sum();
        // 16 bytes for each parameter and 1 KiB for the head are more than the protocol adds.
        let all = bytes + 16 * values.len() + 1024;
        if all <= self.packet_max {
            return Ok(());
        }
        Err(SqlError::refused(format!(
            "a statement of {all} bytes is beyond the server's max_allowed_packet of {}",
            self.packet_max
        )))
    }

    fn judge(&mut self, error: SqlError) -> SqlError {
        if error.trouble == Trouble::Lost {
            self.live = None;
        }
        error
    }
}

impl Value<'_> {
    pub fn bytes(&self) -> usize {
        match self {
            Value::Null | Value::Int(_) => 0,
            Value::Text(text) => text.len(),
            Value::Bytes(bytes) => bytes.len(),
        }
    }
}

/// How results of the two are made one.
struct Rows;
impl Rows {
    fn sqlite(rows: Vec<sqlx::sqlite::SqliteRow>) -> Vec<Row> {
        rows.into_iter().map(Row::Sqlite).collect()
    }
    fn mysql(rows: Vec<sqlx::mysql::MySqlRow>) -> Vec<Row> {
        rows.into_iter().map(Row::MySql).collect()
    }
}

struct Affected;
impl Affected {
    fn sqlite(result: sqlx::sqlite::SqliteQueryResult) -> u64 {
        result.rows_affected()
    }
    fn mysql(result: sqlx::mysql::MySqlQueryResult) -> u64 {
        result.rows_affected()
    }
}

fn sqlite_arguments(values: &[Value<'_>]) -> Result<SqliteArguments, SqlError> {
    let mut args = SqliteArguments::default();
    for value in values {
        match *value {
            Value::Null => args.add(None::<i64>),
            Value::Int(number) => args.add(number),
            Value::Text(text) => args.add(text),
            Value::Bytes(bytes) => args.add(bytes),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(args)
}

fn mysql_arguments(values: &[Value<'_>]) -> Result<MySqlArguments, SqlError> {
    let mut args = MySqlArguments::default();
    args.reserve(
        values.len(),
        values.iter().map(|value| value.bytes() + 9).sum(),
    );
    for value in values {
        match *value {
            Value::Null => args.add(None::<i64>),
            Value::Int(number) => args.add(number),
            Value::Text(text) => args.add(text.as_bytes()),
            Value::Bytes(bytes) => args.add(bytes),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(args)
}
