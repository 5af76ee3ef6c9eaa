//! Migrations: the embedded files of `migrations/sqlite` and `migrations/mysql`, applied under a lock.
//!
//! Promises: two processes that start at once apply each migration once; a schema that is newer than this program is
//! refused with a sentence. The table of applied migrations is that of sqlx, which wrote it first; its own runner is not
//! used because it takes no lock on SQLite, and one on MariaDB (`GET_LOCK` with -1) that MariaDB does not give.

use std::time::Duration;

use sqlx::migrate::Migrator;
use tokio::time::Instant;

use super::Database;
use super::connection::{Connection, Dialect, SqlError, Trouble, Value};

static SQLITE: Migrator = sqlx::migrate!("src/store/sql/migrations/sqlite");
static MYSQL: Migrator = sqlx::migrate!("src/store/sql/migrations/mysql");

/// The schema of the first release.
#[cfg(test)]
pub(super) fn first_of_sqlite() -> Migrator {
    let first = SQLITE.iter().take(1).cloned().collect();
    Migrator::with_migrations(first)
}

/// How many migrations there are.
#[cfg(test)]
pub(super) fn count(dialect: Dialect) -> i64 {
    match dialect {
        Dialect::Sqlite => SQLITE.iter().count() as i64,
        Dialect::MySql => MYSQL.iter().count() as i64,
    }
}

/// How long another process may take that migrates at the same time.
const OTHERS_MAX: Duration = Duration::from_secs(60);
/// How long one migration may take; large tables are copied.
const ONE_MAX: Duration = Duration::from_secs(3600);

const LOCK: &str = "SELECT GET_LOCK(CONCAT('nitro.', MD5(DATABASE())), 60)";
const UNLOCK: &str = "SELECT RELEASE_LOCK(CONCAT('nitro.', MD5(DATABASE())))";
const TABLE: &str = "CREATE TABLE IF NOT EXISTS _sqlx_migrations (
    version BIGINT PRIMARY KEY,
    description TEXT NOT NULL,
    installed_on TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    success BOOLEAN NOT NULL,
    checksum BLOB NOT NULL,
    execution_time BIGINT NOT NULL
)";
const HAS_TABLE: &str =
    "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '_sqlx_migrations'";
const APPLIED: &str = "SELECT version, checksum FROM _sqlx_migrations ORDER BY version";
const APPLY: &str =
    "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (?, ?, 1, ?, ?)";

/// Why the schema is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum SchemaError {
    #[error("{0}")]
    Sql(#[from] SqlError),
    /// For the operator; trying again does not help.
    #[error("{0}")]
    Wrong(String),
}

/// The newest schema of SQLite that this program knows: that of a backup, whatever database it was made of.
pub(super) fn newest_of_sqlite() -> i64 {
    SQLITE.iter().map(|one| one.version).max().unwrap_or(0)
}

/// Brings the schema up to date. `database` is named in sentences.
pub(super) async fn migrate(conn: &mut Connection, database: &Database) -> Result<(), SchemaError> {
    let usual = std::mem::replace(&mut conn.deadline, ONE_MAX);
    let done = under_lock(conn, database).await;
    conn.deadline = usual;
    done
}

async fn under_lock(conn: &mut Connection, database: &Database) -> Result<(), SchemaError> {
    let own = match conn.dialect() {
        Dialect::Sqlite => &SQLITE,
        Dialect::MySql => &MYSQL,
    };
    match conn.dialect() {
        // As at nearly every start: then nobody who holds the file has to be waited for.
        Dialect::Sqlite if is_current(conn, own).await? => Ok(()),
        Dialect::Sqlite => {
            // Everything is one transaction here, and nobody else is between.
            let until = Instant::now() + OTHERS_MAX;
            loop {
                match conn.batch("BEGIN EXCLUSIVE").await {
                    Ok(_) => break,
                    Err(error) if error.trouble == Trouble::Busy && Instant::now() < until => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            match missing(conn, own, database).await {
                Ok(()) => Ok(conn.commit().await?),
                Err(error) => {
                    conn.roll_back().await;
                    Err(error)
                }
            }
        }
        Dialect::MySql => {
            let rows = conn.ask("SELECT VERSION()", &[]).await?;
            if let Some(version) = rows.first() {
                is_supported(version.text(0)?, database)?;
            }
            let rows = conn.ask(LOCK, &[]).await?;
            if rows.first().map(|row| row.int(0)).transpose()? != Some(1) {
                return Err(SchemaError::Wrong(format!(
                    "another process has been changing the schema of the database {database} for more than {} s: look what it is, then start again",
                    OTHERS_MAX.as_secs()
                )));
            }
            let done = missing(conn, own, database).await;
            // The lock goes with the connection, too.
            let _ = conn.ask(UNLOCK, &[]).await;
            done
        }
    }
}

/// `8.0.36`, `10.11.14-MariaDB-0+deb12u2`, or that with `5.5.5-` before it.
fn is_supported(version: &str, database: &Database) -> Result<(), SchemaError> {
    let (kind, least) = match version.contains("MariaDB") {
        true => ("MariaDB", (10, 11)),
        false => ("MySQL", (8, 0)),
    };
    let number = version.strip_prefix("5.5.5-").unwrap_or(version);
    let mut parts = number
        .split(['.', '-'])
        .map(|part| part.parse().unwrap_or(0));
    let found: (u32, u32) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if found >= least {
        return Ok(());
    }
    Err(SchemaError::Wrong(format!(
        "the database {database} is on {kind} {version}: nitro needs {kind} {}.{} or later",
        least.0, least.1
    )))
}

/// Has a SQLite file exactly this schema? Asks without a lock.
async fn is_current(conn: &mut Connection, own: &'static Migrator) -> Result<bool, SqlError> {
    if conn.ask(HAS_TABLE, &[]).await?.is_empty() {
        return Ok(false);
    }
    let rows = conn.ask(APPLIED, &[]).await?;
    let mut same = rows.len() == own.iter().count();
    for (row, one) in rows.iter().zip(own.iter()) {
        same &= row.int(0)? == one.version && *row.bytes(1)? == *one.checksum;
    }
    Ok(same)
}

/// Applies what is missing.
async fn missing(
    conn: &mut Connection,
    own: &'static Migrator,
    database: &Database,
) -> Result<(), SchemaError> {
    conn.batch(TABLE).await?;
    let mut applied = Vec::new();
    for row in conn.ask(APPLIED, &[]).await? {
        applied.push((row.int(0)?, row.bytes(1)?.to_vec()));
    }
    let newest = own.iter().map(|one| one.version).max().unwrap_or(0);
    if let Some((found, _)) = applied.last().filter(|(version, _)| *version > newest) {
        return Err(SchemaError::Wrong(format!(
            "the database {database} has schema {found}, this nitro knows schemas up to {newest}: it was used by a newer nitro, start that one"
        )));
    }
    for one in own.iter() {
        match applied.iter().find(|(version, _)| *version == one.version) {
            Some((_, checksum)) if *checksum == *one.checksum => {}
            Some(_) => {
                return Err(SchemaError::Wrong(format!(
                    "the database {database} has another schema {} than this nitro: it belongs to another program or release, name another database",
                    one.version
                )));
            }
            None => {
                let began = Instant::now();
                conn.batch(one.sql.clone()).await?;
                let values = [
                    Value::Int(one.version),
                    Value::Text(&one.description),
                    Value::Bytes(&one.checksum),
                    Value::Int(i64::try_from(began.elapsed().as_nanos()).unwrap_or(i64::MAX)),
                ];
                conn.run(APPLY, &values).await?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_server_is_refused_with_a_sentence() {
        let database = Database::parse("mysql://nitro@localhost/nitro").unwrap();
        for good in [
            "8.0.36",
            "9.1.0-log",
            "10.11.14-MariaDB-0+deb12u2",
            "5.5.5-11.4.2-MariaDB",
        ] {
            is_supported(good, &database).unwrap();
        }
        for old in ["5.7.44-log", "10.6.18-MariaDB", "5.5.5-10.5.1-MariaDB-1"] {
            let sentence = is_supported(old, &database).unwrap_err().to_string();
            assert!(
                sentence.contains(old) && sentence.contains("or later"),
                "{sentence}"
            );
        }
    }
}
