//! The database by hand: for commands while no server runs, and for what is read once at the start.
//!
//! In: calls of a program that may wait. Out: accounts, counts, outcomes. Promise: what a call reports as written is
//! durable. Never beside a running server: its caches would not know.

use std::path::Path;

use super::record::Record;
pub use super::sqlite::{KeyShape, Listed};
use super::sqlite::{ROWS_MAX, SqlError, Sqlite};
use super::tier::{Loaded, Op, WriteError};

/// Accounts written between two commits of an import.
const IMPORT_BATCH: usize = 5_000;

/// The database, opened for calls that wait. Errors are sentences for the operator.
pub struct Store {
    runtime: tokio::runtime::Runtime,
    sql: Option<Sqlite>,
}

/// What became of an import.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Imported {
    pub written: u64,
    /// Positions, counted from 0, of those that were left out: they exist already (`add_users`) or do not exist
    /// (`put_users`).
    pub left_out: Vec<u64>,
}

impl Store {
    /// Opens the SQLite file, made and migrated if need be.
    pub fn open(path: impl AsRef<Path>) -> Result<Store, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(|error| format!("cannot start a runtime: {error}"))?;
        let sql = runtime.block_on(Sqlite::open(path.as_ref(), 64 << 20, Default::default()))?;
        Ok(Store {
            runtime,
            sql: Some(sql),
        })
    }

    /// Adds accounts, thousands between two commits; `progress` hears how many were dealt with. Those who exist are
    /// left as they are.
    pub fn add_users(
        &mut self,
        users: impl IntoIterator<Item = (String, Record)>,
        progress: impl FnMut(u64),
    ) -> Result<Imported, String> {
        self.import(users, progress, |name, record| Op::AddUser { name, record })
    }

    /// Replaces the records of accounts, in the same way.
    pub fn put_users(
        &mut self,
        users: impl IntoIterator<Item = (String, Record)>,
        progress: impl FnMut(u64),
    ) -> Result<Imported, String> {
        self.import(users, progress, |name, record| Op::PutUser { name, record })
    }

    /// Applies changes in one transaction.
    pub fn apply(&mut self, ops: &[Op]) -> Result<Vec<Result<(), WriteError>>, String> {
        let ops: Vec<&Op> = ops.iter().collect();
        self.wait(async |sql| sql.write(&ops).await)
    }

    /// Adds one account; false if it exists.
    pub fn add(&mut self, name: &str, record: Record) -> Result<bool, String> {
        self.one(Op::AddUser {
            name: name.into(),
            record,
        })
    }

    /// Replaces one account's record; false if there is none.
    pub fn put(&mut self, name: &str, record: Record) -> Result<bool, String> {
        self.one(Op::PutUser {
            name: name.into(),
            record,
        })
    }

    /// Removes an account with all that belongs to it; false if there is none.
    pub fn remove(&mut self, name: &str) -> Result<bool, String> {
        self.one(Op::RemoveUser { name: name.into() })
    }

    /// All about one account.
    pub fn show(&mut self, name: &str) -> Result<Option<Loaded>, String> {
        Ok(self.load(&[name])?.swap_remove(0))
    }

    /// All about many accounts, in the order asked.
    pub fn load(&mut self, names: &[&str]) -> Result<Vec<Option<Loaded>>, String> {
        let mut all = Vec::with_capacity(names.len());
        for names in names.chunks(ROWS_MAX) {
            for (name, found) in names
                .iter()
                .zip(self.wait(async |sql| sql.load(names).await)?)
            {
                all.push(found.map_err(|error| format!("{name}: {error}"))?);
            }
        }
        Ok(all)
    }

    /// Up to `limit` accounts whose name begins with `prefix` and comes after `after` (empty: from the first), in
    /// byte order.
    pub fn list(&mut self, prefix: &str, after: &str, limit: usize) -> Result<Vec<Listed>, String> {
        self.wait(async |sql| sql.list(prefix, after, limit).await)
    }

    /// How many accounts there are.
    pub fn count(&mut self) -> Result<u64, String> {
        self.wait(async |sql| sql.count().await)
    }

    /// Counts of accounts by the shape of their SCRAM keys, most frequent first: what is shown to unknown users
    /// follows it.
    pub fn key_distribution(&mut self) -> Result<Vec<KeyShape>, String> {
        self.wait(async |sql| sql.key_shapes().await)
    }

    fn one(&mut self, op: Op) -> Result<bool, String> {
        match self.apply(&[op])?.pop() {
            Some(Err(WriteError::Conflict | WriteError::Missing)) => Ok(false),
            Some(Err(error)) => Err(error.to_string()),
            _ => Ok(true),
        }
    }

    fn import(
        &mut self,
        users: impl IntoIterator<Item = (String, Record)>,
        mut progress: impl FnMut(u64),
        op: impl Fn(Box<str>, Record) -> Op,
    ) -> Result<Imported, String> {
        let mut users = users.into_iter();
        let mut imported = Imported::default();
        let mut position = 0;
        loop {
            let batch: Vec<Op> = users
                .by_ref()
                .take(IMPORT_BATCH)
                .map(|(name, record)| op(name.into(), record))
                .collect();
            if batch.is_empty() {
                return Ok(imported);
            }
            for outcome in self.apply(&batch)? {
                match outcome {
                    Ok(()) => imported.written += 1,
                    Err(WriteError::Conflict | WriteError::Missing) => {
                        imported.left_out.push(position)
                    }
                    Err(error) => return Err(error.to_string()),
                }
                position += 1;
            }
            progress(position);
        }
    }

    fn wait<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Sqlite) -> Result<T, SqlError>,
    ) -> Result<T, String> {
        let sql = self
            .sql
            .as_mut()
            .expect("the connection is there until the store is dropped");
        self.runtime
            .block_on(work(sql))
            .map_err(|error| format!("the database is not available: {error}"))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // A proper close empties the write-ahead log; without it the next open would.
        if let Some(sql) = self.sql.take() {
            let _ = self.runtime.block_on(sql.close());
        }
    }
}
