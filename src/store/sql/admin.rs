//! The database by hand: for commands while no server runs, and for what is read once at the start.
//!
//! In: calls of a program that may wait. Out: accounts, counts, outcomes. Promise: what a call reports as written is
//! durable. Never beside a running server, and never before its journals were drained: its caches would not know, and
//! what a journal still holds is older than what is written here.

use std::time::Duration;

use super::purge::Purge;
use super::{Applied, Database, Position, SetUpError, Sql, SqlError, UserChange, UserOp, runtime};
pub use super::{KeyShape, Listed};
use crate::store::change::Id;
use crate::store::record::Record;
use crate::store::tier::Loaded;

/// Accounts written between two commits of an import.
const IMPORT_BATCH: usize = 5_000;

/// A server that hangs must not hold the start up for long.
const THERE_WITHIN: Duration = Duration::from_secs(5);

/// The database, opened for calls that wait. Errors are sentences for the operator.
pub struct Store {
    runtime: tokio::runtime::Runtime,
    sql: Option<Sql>,
}

/// What became of an import.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Imported {
    pub written: u64,
    /// Positions, counted from 0, of those that were left out: they exist already (`add_users`) or do not exist
    /// (`put_users`).
    pub left_out: Vec<u64>,
}

/// A change of an account; revisions are made from the clock, and above what is stored.
#[derive(Debug, Clone)]
pub enum Op {
    AddUser { name: Box<str>, record: Record },
    PutUser { name: Box<str>, record: Record },
    RemoveUser { name: Box<str> },
}

/// Why a change was not applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("the user exists already")]
    Conflict,
    #[error("there is no such user")]
    Missing,
}

impl Store {
    /// Opens the database; a SQLite file is made if need be, the schema brought up to date.
    pub fn open(database: &Database) -> Result<Store, String> {
        let runtime = runtime()?;
        let sql = runtime.block_on(Sql::open(database, 64 << 20, Default::default()))?;
        Ok(Store {
            runtime,
            sql: Some(sql),
        })
    }

    /// The same; `Ok(None)`: the server cannot be reached, trying again may help.
    pub fn open_if_there(database: &Database) -> Result<Option<Store>, String> {
        let runtime = runtime()?;
        let mut sql = Sql::unconnected(database, 64 << 20, Default::default());
        let usual = sql.set_deadline(THERE_WITHIN);
        match runtime.block_on(sql.set_up()) {
            Ok(()) => {
                sql.set_deadline(usual);
                Ok(Some(Store {
                    runtime,
                    sql: Some(sql),
                }))
            }
            Err(SetUpError {
                unreachable: true, ..
            }) => Ok(None),
            Err(SetUpError { sentence, .. }) => Err(sentence),
        }
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
        let ops: Vec<UserOp<'_>> = ops.iter().map(Op::by_hand).collect();
        let applied = self.wait(async |sql| sql.change_users(&ops).await)?;
        let outcome = |one| match one {
            Applied::Done(_) => Ok(()),
            Applied::Stale => Err(WriteError::Conflict),
            Applied::Missing => Err(WriteError::Missing),
        };
        Ok(applied.into_iter().map(outcome).collect())
    }

    /// The next step of a purge of archives.
    pub fn purge_step(&mut self, purge: &mut Purge) -> Result<(), String> {
        self.wait(async |sql| sql.purge_step(purge).await)
    }

    /// Adds one account; false if it exists.
    pub fn add(&mut self, name: &str, record: Record) -> Result<bool, String> {
        let name = name.into();
        self.one(Op::AddUser { name, record })
    }

    /// Replaces one account's record; false if there is none.
    pub fn put(&mut self, name: &str, record: Record) -> Result<bool, String> {
        let name = name.into();
        self.one(Op::PutUser { name, record })
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
        for names in names.chunks(Sql::LOADS_MAX) {
            let found = self.wait(async |sql| sql.load(names).await)?;
            for (name, found) in names.iter().zip(found) {
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

    /// Up to where each journal is in the database: the drain goes on behind it.
    pub fn positions(&mut self) -> Result<Vec<Position>, String> {
        self.wait(async |sql| sql.positions().await)
    }

    /// What [`Sql::highest_id`] says: where the ids of this blade's shards begin.
    pub fn highest_id(&mut self) -> Result<Id, String> {
        self.wait(async |sql| sql.highest_id().await).map(Id)
    }

    fn one(&mut self, op: Op) -> Result<bool, String> {
        Ok(self.apply(&[op])?.iter().all(Result::is_ok))
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
                    Err(_) => imported.left_out.push(position),
                }
                position += 1;
            }
            progress(position);
        }
    }

    fn wait<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Sql) -> Result<T, SqlError>,
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

impl Op {
    fn by_hand(&self) -> UserOp<'_> {
        let (name, change) = match self {
            Op::AddUser { name, record } => (name, UserChange::Add(record.bytes())),
            Op::PutUser { name, record } => (name, UserChange::Put(record.bytes())),
            Op::RemoveUser { name } => (name, UserChange::Remove),
        };
        UserOp {
            name,
            revision: None,
            change,
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // A proper close empties the write-ahead log; without it the next open would.
        if let Some(sql) = self.sql.take() {
            self.runtime.block_on(sql.close());
        }
    }
}
