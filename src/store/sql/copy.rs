//! Everything of one database into another one, SQLite or MySQL, either way.
//!
//! In: a source that nobody writes to (or one consistent view of it), and an empty target. Out: a target with the same
//! rows under the same numbers, ids and revisions. Promises:
//!
//! - a batch is one transaction of whole keys in the order of keys, so a target says by itself how far it is: behind the
//!   highest key of each table. A copy that was killed goes on there; there is no second account of it that could
//!   disagree with the rows;
//! - until all is copied and compared, the target carries a mark (`copying` in `state`), with which no server starts on
//!   it. The mark is a fingerprint of the source: a source that has changed meanwhile is refused, as is a target that
//!   holds anything else;
//! - comparing reads both sides again: batch by batch the number of rows and the sum of their SHA-256 (64 bits of it).
//!
//! Positions of journals (`drained`) are copied as they are, last: they say what a database holds, and the target holds
//! what the source does. A start on the target goes on behind them: what journals still keep of drained records is not
//! applied again, and what is journalled from now on is behind them in any case. Positions of journals that are no more
//! harm nothing, for a journal's identity is random.
//!
//! Numbers of accounts that are gone (`gone`) are dealt with before a copy for good ([`Copy::purge`]), so the counter of
//! account numbers need not be copied: nothing is left that a number could be mistaken for.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use sqlx::AssertSqlSafe;

use super::connection::{Dialect, Row, SqlError, Value};
use super::statements::{Statement, rows};
use super::{Database, Position, Sql, runtime, schema};

/// Rows of one batch.
const BATCH_ROWS: i64 = 1000;
/// Bytes after which a batch ends, beside its last key.
const BATCH_BYTES: i64 = 8 << 20;
/// How long one statement may take: large tables are counted.
const STATEMENT_MAX: Duration = Duration::from_secs(24 * 3600);

/// What a column holds.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Int,
    Text,
    Bytes,
    /// Text that a MySQL database may hold shortened ([`Sql::stored_key`]).
    Key,
}
use Kind::{Bytes, Int, Key, Text};

struct Table {
    name: &'static str,
    /// What batches are cut by; batches hold whole keys.
    key: &'static str,
    /// The column whose bytes count.
    weight: &'static str,
    columns: &'static [(&'static str, Kind)],
    put: &'static Statement,
}

macro_rules! tables {
    ($($name:ident by $key:literal, mostly $weight:literal: [$(($column:literal, $kind:expr)),* $(,)?];)*) => {
        /// In the order in which they are copied.
        static TABLES: &[Table] = &[$(Table {
            name: stringify!($name),
            key: $key,
            weight: $weight,
            columns: &[$(($column, $kind)),*],
            put: {
                static PUT: Statement = Statement::change(|_, n| {
                    insert(stringify!($name), &[$($column),*], n)
                });
                &PUT
            },
        }),*];
    };
}

tables! {
    users by "id", mostly "record": [
        ("id", Int), ("name", Text), ("added", Int), ("revision", Int), ("created_at", Int), ("updated_at", Int),
        ("disabled", Int), ("sha1_iterations", Int), ("sha1_salt_len", Int), ("sha256_iterations", Int),
        ("sha256_salt_len", Int), ("record", Bytes),
    ];
    removed by "name", mostly "name": [("name", Text), ("revision", Int)];
    gone by "owner", mostly "owner": [("owner", Int)];
    documents by "owner", mostly "value": [("owner", Int), ("doc_key", Key), ("revision", Int), ("value", Bytes)];
    last_activities by "owner", mostly "status": [("owner", Int), ("revision", Int), ("at", Int), ("status", Text)];
    pending by "id", mostly "stanza": [("id", Int), ("owner", Int), ("meta", Int), ("stanza", Bytes)];
    archive by "id", mostly "stanza": [
        ("id", Int), ("owner", Int), ("peer_key", Int), ("meta", Int), ("peer", Text), ("stanza", Bytes),
    ];
    retractions by "id", mostly "tombstone": [
        ("id", Int), ("owner", Int), ("target_key", Int), ("side", Int), ("peer", Text), ("target", Text),
        ("tombstone", Bytes),
    ];
    quarantine by "seq", mostly "payload": [
        ("identity", Int), ("journal", Int), ("seq", Int), ("part", Int), ("at", Int), ("reason", Text), ("payload", Bytes),
    ];
}

static PUT_POSITIONS: Statement =
    Statement::change(|_, n| insert("drained", &["identity", "journal", "seq"], n));

fn insert(table: &str, columns: &[&str], n: usize) -> String {
    let values = rows(n, columns.len());
    format!(
        "INSERT INTO {table} ({}) VALUES {values}",
        columns.join(", ")
    )
}

const MARK: &str = "SELECT value FROM state WHERE name = 'copying'";
const PUT_MARK: &str = "INSERT INTO state (name, value) VALUES ('copying', ?)";
const DROP_MARK: &str = "DELETE FROM state WHERE name = 'copying'";
const PUT_EPOCH: &str = "UPDATE state SET value = ? WHERE name = 'accounts'";
const FINGERPRINT: &str =
    "SELECT (SELECT COUNT(*) FROM users), (SELECT COALESCE(MAX(id), 0) FROM users),
    (SELECT COALESCE(MAX(revision), 0) FROM users), (SELECT COUNT(*) FROM removed),
    (SELECT COALESCE(MAX(value), 0) FROM state WHERE name = 'accounts')";

/// How far a copy is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    pub doing: Doing,
    pub table: &'static str,
    /// Rows of the table.
    pub done: u64,
    pub of: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    Copying,
    Comparing,
}

/// What a table was found to hold, on both sides.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sum {
    pub table: String,
    pub rows: u64,
    /// The sum of the rows' hashes; the same in either database.
    pub checksum: String,
}

/// Who hears of the progress.
pub type Tell<'a> = &'a mut dyn FnMut(Progress);

/// A source and a target, opened for a program that waits. Errors are sentences for the operator.
pub struct Copy {
    runtime: tokio::runtime::Runtime,
    from: Sql,
    to: Sql,
    names: [String; 2],
}

impl Copy {
    /// Opens both; the target's schema is made. `live`: others write to the source meanwhile, and one consistent view of
    /// it is copied (MySQL only).
    pub fn open(from: &Database, to: &Database, live: bool) -> Result<Copy, String> {
        let runtime = runtime()?;
        let names = [from.to_string(), to.to_string()];
        if names[0] == names[1] {
            return Err(format!(
                "source and target are the same database, {}: name another one",
                names[0]
            ));
        }
        let (from, to) = runtime.block_on(async {
            let mut source = Sql::unconnected(from, 16 << 20, Default::default());
            source.set_up().await.map_err(|error| error.sentence)?;
            let mut target = Sql::unconnected(to, 16 << 20, Default::default());
            let opened = target.set_up_unfinished().await;
            opened.map_err(|error| error.sentence)?;
            source.set_deadline(STATEMENT_MAX);
            target.set_deadline(STATEMENT_MAX);
            if live {
                let view = [
                    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
                    "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
                ];
                for statement in view {
                    let begun = source.conn.batch(statement).await;
                    begun.map_err(|error| failed(&names[0], &error))?;
                }
            }
            Ok::<_, String>((source, target))
        })?;
        Ok(Copy {
            runtime,
            from,
            to,
            names,
        })
    }

    /// Deletes what is left of accounts that are gone from the source. Not on a live one, which does so itself.
    pub fn purge(&mut self) -> Result<(), String> {
        let name = &self.names[0];
        self.runtime.block_on(async {
            while self.from.purge().await.map_err(|e| failed(name, &e))? {}
            Ok(())
        })
    }

    /// Copies everything, or what is missing after a copy that was interrupted, compares it, and takes the mark away.
    pub fn run(&mut self, tell: Tell<'_>) -> Result<Vec<Sum>, String> {
        let Copy {
            runtime,
            from,
            to,
            names,
        } = self;
        runtime.block_on(async {
            mark(from, to, names).await?;
            for table in TABLES {
                copy(table, from, to, tell).await.map_err(|trouble| {
                    let [source, target] = &*names;
                    let name = table.name;
                    match trouble {
                        Trouble::Source(error) => {
                            format!("{}, in its table {name}", failed(source, &error))
                        }
                        Trouble::Target(error) => format!(
                            "{}, in its table {name}; mend that and repeat the command",
                            failed(target, &error)
                        ),
                    }
                })?;
            }
            let sums = compare_all(from, to, names, tell).await?;
            finish(from, to).await.map_err(|e| failed(&names[1], &e))?;
            Ok(sums)
        })
    }

    /// Compares both, and changes nothing.
    pub fn compare(&mut self, tell: Tell<'_>) -> Result<Vec<Sum>, String> {
        let Copy {
            runtime,
            from,
            to,
            names,
        } = self;
        runtime.block_on(compare_all(from, to, names, tell))
    }

    /// Closes both; SQLite's write-ahead logs go into their files.
    pub fn close(self) {
        self.runtime.block_on(async {
            self.from.close().await;
            self.to.close().await;
        });
    }
}

/// What a copy of a database says of itself.
#[derive(Debug)]
pub struct Described {
    pub positions: Vec<Position>,
    pub sums: Vec<Sum>,
}

/// The newest schema that backups may have.
pub fn schema_newest() -> i64 {
    schema::newest_of_sqlite()
}

/// A compact copy of a SQLite database, which may be in use, as it is at one moment. The file must not be there yet.
/// Waits for the disk, and holds nobody up: writers of a write-ahead log do not wait for readers.
pub fn vacuum_into(from: &Path, to: &Path) -> Result<(), String> {
    let runtime = runtime()?;
    let database = Database::Sqlite(from.into());
    let name = database.to_string();
    runtime.block_on(async {
        let mut sql = Sql::unconnected(&database, 16 << 20, Default::default());
        sql.set_up().await.map_err(|error| error.sentence)?;
        sql.set_deadline(STATEMENT_MAX);
        let to = to
            .to_str()
            .ok_or("the name of the backup is not UTF-8; choose another one")?;
        let statement = format!("VACUUM INTO '{}'", to.replace('\'', "''"));
        let done = sql.conn.batch(AssertSqlSafe(statement)).await;
        let done = done.map_err(|error| failed(&name, &error));
        sql.close().await;
        done.map(drop)
    })
}

/// Reads a SQLite database through: its structure, positions of journals, rows and their sums.
pub fn describe(path: &Path, tell: Tell<'_>) -> Result<Described, String> {
    let runtime = runtime()?;
    let database = Database::Sqlite(path.into());
    let name = database.to_string();
    runtime.block_on(async {
        let mut sql = Sql::unconnected(&database, 16 << 20, Default::default());
        sql.set_up().await.map_err(|error| error.sentence)?;
        sql.set_deadline(STATEMENT_MAX);
        let described = async {
            let good = sql.conn.ask("PRAGMA quick_check(1)", &[]).await?;
            if good.first().map(|row| row.text(0)).transpose()? != Some("ok") {
                return Err(SqlError::refused("its structure is damaged"));
            }
            let mut sums = Vec::new();
            for table in TABLES {
                let of = table.count(&mut sql).await?;
                let (mut all, mut after) = (Digest::default(), None);
                while let Some(upto) = table.bound(&mut sql, after.as_ref()).await? {
                    all.add(table.digest(&mut sql, after.as_ref(), &upto).await?);
                    after = Some(upto);
                    tell(Progress {
                        doing: Doing::Comparing,
                        table: table.name,
                        done: all.rows,
                        of,
                    });
                }
                sums.push(all.sum(table));
            }
            Ok(Described {
                positions: sql.positions().await?,
                sums,
            })
        };
        let described = described.await;
        sql.close().await;
        described.map_err(|error| failed(&name, &error))
    })
}

fn failed(database: &str, error: &SqlError) -> String {
    format!("the database {database} gave an error: {error}")
}

/// On which side it went wrong.
enum Trouble {
    Source(SqlError),
    Target(SqlError),
}

impl Sql {
    /// The mark of a copy that is not finished.
    pub(super) async fn copying(&mut self) -> Result<Option<i64>, SqlError> {
        let rows = self.conn.ask(MARK, &[]).await?;
        rows.first().map(|row| row.int(0)).transpose()
    }
}

/// Marks an empty target, or finds that its mark is that of this source.
async fn mark(from: &mut Sql, to: &mut Sql, names: &[String; 2]) -> Result<(), String> {
    let [source, target] = names;
    let own = fingerprint(from).await.map_err(|e| failed(source, &e))?;
    let copying = to.copying().await.map_err(|e| failed(target, &e))?;
    match copying {
        Some(mark) if mark == own => return Ok(()),
        Some(_) => {
            return Err(format!(
                "the database {target} is half of a copy of another database, or {source} has changed since it was \
                 begun: empty {target} and repeat the command"
            ));
        }
        None => {}
    }
    for table in TABLES {
        let there = table
            .bound(to, None)
            .await
            .map_err(|e| failed(target, &e))?;
        if there.is_some() {
            return Err(format!(
                "the database {target} is not empty (its table {} has rows): name an empty one, or compare with --verify \
                 if it is a copy that was finished",
                table.name
            ));
        }
    }
    let marked = to.conn.run(PUT_MARK, &[Value::Int(own)]).await;
    marked.map(drop).map_err(|e| failed(target, &e))
}

/// Changes with everything that a server or a command does to a database.
async fn fingerprint(sql: &mut Sql) -> Result<i64, SqlError> {
    let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut positions = sql.positions().await?;
    positions.sort_unstable_by_key(|at| (at.identity, at.journal));
    for at in positions {
        digest.update(&at.identity.to_le_bytes());
        digest.update(&at.journal.to_le_bytes());
        digest.update(&at.seq.to_le_bytes());
    }
    for row in sql.conn.ask(FINGERPRINT, &[]).await? {
        for at in 0..5 {
            digest.update(&row.int(at)?.to_le_bytes());
        }
    }
    Ok(eight_bytes(digest.finish().as_ref()) as i64)
}

async fn copy(table: &Table, from: &mut Sql, to: &mut Sql, tell: Tell<'_>) -> Result<(), Trouble> {
    use Trouble::{Source, Target};
    let of = table.count(from).await.map_err(Source)?;
    let mut done = table.count(to).await.map_err(Target)?;
    let mut after = table.last(to).await.map_err(Target)?;
    while let Some(upto) = table.bound(from, after.as_ref()).await.map_err(Source)? {
        let rows = table
            .read(from, after.as_ref(), &upto)
            .await
            .map_err(Source)?;
        let dialect = to.conn.dialect();
        let rows = table.values(&rows).map_err(Source)?;
        let written = async {
            to.conn.begin().await?;
            let put = to.conn.run_for(table.put, &rows, |values, row| {
                values.extend(row.iter().map(|cell| cell.value(dialect)));
            });
            put.await?;
            to.conn.commit().await
        };
        if let Err(error) = written.await {
            to.conn.roll_back().await;
            return Err(Target(error));
        }
        done += rows.len() as u64;
        after = Some(upto);
        tell(Progress {
            doing: Doing::Copying,
            table: table.name,
            done,
            of,
        });
    }
    Ok(())
}

async fn compare_all(
    from: &mut Sql,
    to: &mut Sql,
    names: &[String; 2],
    tell: Tell<'_>,
) -> Result<Vec<Sum>, String> {
    let [source, target] = names;
    let mut sums = Vec::new();
    for table in TABLES {
        let differs = |at: &Bound| {
            format!(
                "{source} and {target} differ in the table {}, {} {at} or before: empty {target} and copy again",
                table.name, table.key
            )
        };
        let of = table.count(from).await.map_err(|e| failed(source, &e))?;
        let (mut all, mut after) = (Digest::default(), None);
        while let Some(upto) = table
            .bound(from, after.as_ref())
            .await
            .map_err(|e| failed(source, &e))?
        {
            let one = table
                .digest(from, after.as_ref(), &upto)
                .await
                .map_err(|e| failed(source, &e))?;
            let other = table
                .digest(to, after.as_ref(), &upto)
                .await
                .map_err(|e| failed(target, &e))?;
            if one != other {
                return Err(differs(&upto));
            }
            all.add(one);
            after = Some(upto);
            tell(Progress {
                doing: Doing::Comparing,
                table: table.name,
                done: all.rows,
                of,
            });
        }
        if let Some(more) = table
            .bound(to, after.as_ref())
            .await
            .map_err(|e| failed(target, &e))?
        {
            return Err(differs(&more));
        }
        sums.push(all.sum(table));
    }
    Ok(sums)
}

/// Positions of journals and the number of the accounts' changes; the mark goes with them.
async fn finish(from: &mut Sql, to: &mut Sql) -> Result<(), SqlError> {
    let positions = from.positions().await?;
    let epoch = from.conn.ask(super::statements::EPOCH, &[]).await?;
    let epoch = epoch.first().map_or(Ok(0), |row| row.int(0))?;
    let written = async {
        to.conn.begin().await?;
        let put = to.conn.run_for(&PUT_POSITIONS, &positions, |values, at| {
            values.extend([
                Value::from(at.identity),
                Value::Int(at.journal.into()),
                Value::from(at.seq),
            ]);
        });
        put.await?;
        to.conn.run(PUT_EPOCH, &[Value::Int(epoch)]).await?;
        to.conn.run(DROP_MARK, &[]).await?;
        to.conn.commit().await
    };
    let written = written.await;
    if written.is_err() {
        to.conn.roll_back().await;
    }
    written
}

/// A key up to which something was done.
#[derive(Debug, Clone, PartialEq)]
enum Bound {
    Int(i64),
    Text(String),
}

impl Bound {
    fn value(&self) -> Value<'_> {
        match self {
            Bound::Int(number) => Value::Int(*number),
            Bound::Text(text) => Value::Text(text),
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bound::Int(number) => number.fmt(f),
            Bound::Text(text) => text.fmt(f),
        }
    }
}

/// A value of a row, with what was made of it.
enum Cell<'r> {
    Null,
    Int(i64),
    Text(&'r str),
    Bytes(&'r [u8]),
    Key(&'r str, Cow<'r, str>),
}

impl Cell<'_> {
    fn value(&self, dialect: Dialect) -> Value<'_> {
        match self {
            Cell::Null => Value::Null,
            Cell::Int(number) => Value::Int(*number),
            Cell::Text(text) => Value::Text(text),
            Cell::Bytes(bytes) => Value::Bytes(bytes),
            Cell::Key(whole, short) => Value::Text(match dialect {
                Dialect::Sqlite => whole,
                Dialect::MySql => short,
            }),
        }
    }
}

impl Table {
    fn is_named(&self) -> bool {
        self.columns
            .iter()
            .any(|(name, kind)| *name == self.key && *kind == Text)
    }

    /// What is before every key.
    fn begin(&self) -> Bound {
        match self.is_named() {
            true => Bound::Text(String::new()),
            false => Bound::Int(i64::MIN),
        }
    }

    fn key_of(&self, row: &Row) -> Result<Bound, SqlError> {
        Ok(match self.is_named() {
            true => Bound::Text(row.text(0)?.to_owned()),
            false => Bound::Int(row.int(0)?),
        })
    }

    async fn count(&self, sql: &mut Sql) -> Result<u64, SqlError> {
        let text = format!("SELECT COUNT(*) FROM {}", self.name);
        let rows = sql.conn.ask(AssertSqlSafe(text), &[]).await?;
        rows.first().map_or(Ok(0), |row| row.id(0))
    }

    /// The highest key.
    async fn last(&self, sql: &mut Sql) -> Result<Option<Bound>, SqlError> {
        let Table { name, key, .. } = self;
        let text = format!("SELECT {key} FROM {name} ORDER BY {key} DESC LIMIT 1");
        let rows = sql.conn.ask(AssertSqlSafe(text), &[]).await?;
        rows.first().map(|row| self.key_of(row)).transpose()
    }

    /// Where the batch behind `after` ends; none: there are no rows.
    async fn bound(&self, sql: &mut Sql, after: Option<&Bound>) -> Result<Option<Bound>, SqlError> {
        let Table {
            name, key, weight, ..
        } = self;
        let text = format!(
            "SELECT {key}, COALESCE(LENGTH({weight}), 0) FROM {name} WHERE {key} > ? ORDER BY {key} LIMIT {BATCH_ROWS}"
        );
        let begin = self.begin();
        let rows = sql
            .conn
            .ask(AssertSqlSafe(text), &[after.unwrap_or(&begin).value()])
            .await?;
        let (mut bytes, mut last) = (0, None);
        for row in &rows {
            last = Some(row);
            bytes += row.int(1)?;
            if bytes > BATCH_BYTES {
                break;
            }
        }
        last.map(|row| self.key_of(row)).transpose()
    }

    /// The rows behind `after`, up to `upto`.
    async fn read(
        &self,
        sql: &mut Sql,
        after: Option<&Bound>,
        upto: &Bound,
    ) -> Result<Vec<Row>, SqlError> {
        let columns: Vec<&str> = self.columns.iter().map(|(name, _)| *name).collect();
        let text = format!(
            "SELECT {} FROM {} WHERE {key} > ? AND {key} <= ? ORDER BY {key}",
            columns.join(", "),
            self.name,
            key = self.key
        );
        let begin = self.begin();
        let values = [after.unwrap_or(&begin).value(), upto.value()];
        sql.conn.ask(AssertSqlSafe(text), &values).await
    }

    fn values<'r>(&self, rows: &'r [Row]) -> Result<Vec<Vec<Cell<'r>>>, SqlError> {
        let cell = |row: &'r Row, at: usize, kind: Kind| {
            Ok(match kind {
                Int => row.optional_int(at)?.map_or(Cell::Null, Cell::Int),
                Text => Cell::Text(row.text(at)?),
                Bytes => row.optional_bytes(at)?.map_or(Cell::Null, Cell::Bytes),
                Key => {
                    let key = row.text(at)?;
                    Cell::Key(key, Sql::short_key(key))
                }
            })
        };
        let cells = |row| {
            let kinds = self.columns.iter().enumerate();
            kinds.map(|(at, (_, kind))| cell(row, at, *kind)).collect()
        };
        rows.iter().map(cells).collect()
    }

    async fn digest(
        &self,
        sql: &mut Sql,
        after: Option<&Bound>,
        upto: &Bound,
    ) -> Result<Digest, SqlError> {
        let rows = self.read(sql, after, upto).await?;
        let mut digest = Digest::default();
        let mut bytes = Vec::new();
        for row in self.values(&rows)? {
            bytes.clear();
            for cell in &row {
                // A length before everything that has one: no two rows have the same bytes.
                match cell.value(Dialect::MySql) {
                    Value::Null => bytes.push(0),
                    Value::Int(number) => {
                        bytes.push(1);
                        bytes.extend_from_slice(&number.to_le_bytes());
                    }
                    Value::Text(text) => add(&mut bytes, text.as_bytes()),
                    Value::Bytes(some) => add(&mut bytes, some),
                }
            }
            let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes);
            digest.rows += 1;
            digest.sum = digest.sum.wrapping_add(eight_bytes(hash.as_ref()));
        }
        return Ok(digest);

        fn add(bytes: &mut Vec<u8>, some: &[u8]) {
            bytes.push(2);
            bytes.extend_from_slice(&(some.len() as u64).to_le_bytes());
            bytes.extend_from_slice(some);
        }
    }
}

/// Rows and the sum of their hashes: the order in which a database delivers rows of one key does not matter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Digest {
    rows: u64,
    sum: u64,
}

impl Digest {
    fn add(&mut self, more: Digest) {
        self.rows += more.rows;
        self.sum = self.sum.wrapping_add(more.sum);
    }

    fn sum(&self, table: &Table) -> Sum {
        Sum {
            table: table.name.into(),
            rows: self.rows,
            checksum: format!("{:016x}", self.sum),
        }
    }
}

fn eight_bytes(hash: &[u8]) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|n| hash[n]))
}
