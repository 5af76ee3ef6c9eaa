//! Retention: what is older than it is to be kept goes out of the archives, a little at a time.
//!
//! In: a [`Purge`], which says how old and whose. Out: rows deleted, step by step ([`Sql::purge_step`]), so that whoever calls can
//! let others go first between two steps. Promises: what waits for its recipient stays, and what was retracted is never
//! shown again: a retraction goes only when nothing older is left that it could be about. [`may_purge`] is the one place that
//! says what must stay; who has to prove what was said adds to it (all places of that kind: [`crate::xmpp::storing`]).

use super::connection::{Dialect, SqlError, Value};
use super::statements;
use super::{Sql, apply};
use crate::store::change::Id;

/// Entries that one step looks at. It is one transaction.
pub const STEP_ROWS: u32 = 500;

/// Whose archives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    All,
    /// Prepared local part.
    One(String),
    Users,
    /// One room after the other: they are few beside the users, whose entries need not be looked at then.
    Rooms,
}

/// What is to go, and how far it has gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Purge {
    /// Ids below this one: entries from before a moment.
    before: u64,
    whose: Whose,
    /// Of this owner only.
    owner: Option<String>,
    /// Nothing is deleted, all is counted.
    dry: bool,
    stage: Stage,
    after: u64,
    /// Entries deleted (or to be deleted).
    pub gone: u64,
    /// Entries that are old enough and stay, because they wait for their recipients.
    pub kept: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Finds the room behind `owner`.
    NextRoom,
    Entries,
    Retractions,
    Over,
}

/// An entry that is old enough to go.
struct Candidate {
    id: u64,
    /// It waits for its recipient.
    pending: bool,
    /// Of those whose archives are meant.
    meant: bool,
}

/// May an entry be deleted that is older than it is to be kept?
fn may_purge(candidate: &Candidate) -> bool {
    candidate.meant && !candidate.pending
}

impl Purge {
    /// What was accepted more than `days` ago.
    pub fn older_than(days: u64, whose: Whose, dry: bool) -> Purge {
        let age_ms = days.saturating_mul(24 * 3600 * 1000);
        Purge {
            before: Id::at(apply::now_ms().saturating_sub(age_ms)).0,
            owner: match &whose {
                Whose::One(name) => Some(name.clone()),
                _ => None,
            },
            dry,
            stage: match whose {
                Whose::Rooms => Stage::NextRoom,
                _ => Stage::Entries,
            },
            whose,
            after: 0,
            gone: 0,
            kept: 0,
        }
    }

    pub fn is_over(&self) -> bool {
        self.stage == Stage::Over
    }

    /// The statement that finds the next rows; it ends with a bound of their number.
    fn statement(&self, dialect: Dialect) -> (String, Vec<Value<'_>>) {
        let mut values = Vec::new();
        let waits = "EXISTS (SELECT 1 FROM pending p WHERE p.id = k.id)";
        let (table, waits, room) = match (self.stage, &self.whose) {
            (Stage::Entries, Whose::Users) => (
                "archive",
                waits,
                "EXISTS (SELECT 1 FROM users u WHERE u.id = k.owner AND u.name LIKE '%@rooms')",
            ),
            (Stage::Entries, _) => ("archive", waits, "0"),
            // whosever it is: it goes only when nothing is left that it could be about
            _ => ("retractions", "0", "0"),
        };
        let owner = match &self.owner {
            Some(name) => {
                values.push(Value::Text(name));
                "k.owner = (SELECT u.id FROM users u WHERE u.name = ?) AND "
            }
            None => "",
        };
        let by_owner = self.owner.is_some() && self.stage == Stage::Entries;
        // by its own order: else a planner may prefer to read all of an archive and to sort it
        let index = match (dialect, by_owner) {
            (Dialect::Sqlite, true) => " INDEXED BY archive_owner",
            (Dialect::MySql, true) => " FORCE INDEX (archive_owner)",
            (_, false) => "",
        };
        values.extend([Value::from(self.after), Value::from(self.before)]);
        let last = match self.stage {
            Stage::Entries => "",
            // something older stays that it may be about
            _ => {
                " AND NOT EXISTS (SELECT 1 FROM archive a WHERE a.owner = k.owner AND a.id < k.id)"
            }
        };
        values.push(Value::Int(i64::from(STEP_ROWS)));
        let text = format!(
            "SELECT k.id, {waits}, {room} FROM {table} AS k{index} WHERE {owner}k.id > ? AND k.id < ?{last} ORDER BY k.id LIMIT ?"
        );
        (text, values)
    }
}

impl Sql {
    /// The next step of a purge.
    pub async fn purge_step(&mut self, purge: &mut Purge) -> Result<(), SqlError> {
        if purge.stage == Stage::NextRoom {
            let behind = purge.owner.take().unwrap_or_default();
            let values = [Value::Text(&behind)];
            let rows = self.conn.ask(statements::NEXT_ROOM, &values).await?;
            purge.stage = Stage::Over;
            if let Some(row) = rows.first() {
                purge.owner = Some(row.text(0)?.to_owned());
                purge.stage = Stage::Entries;
            }
            return Ok(());
        }
        let (text, values) = purge.statement(self.conn.dialect());
        let rows = self.conn.ask(sqlx::AssertSqlSafe(text), &values).await?;
        let mut found = Vec::new();
        for row in &rows {
            found.push(Candidate {
                id: row.id(0)?,
                pending: row.int(1)? != 0,
                meant: row.int(2)? == 0,
            });
        }
        let last = found.last().map(|candidate| candidate.id);
        let seen = found.len() as u64;
        let meant = found.iter().filter(|candidate| candidate.meant).count() as u64;
        found.retain(may_purge);
        let ids: Vec<u64> = found.iter().map(|candidate| candidate.id).collect();
        if !purge.dry && !ids.is_empty() {
            let statement = match purge.stage {
                Stage::Entries => &statements::DROP_ARCHIVE,
                _ => &statements::DROP_RETRACTIONS,
            };
            self.in_transaction(async |sql| {
                sql.conn.run_for(statement, &ids, statements::id).await
            })
            .await?;
        }
        if purge.stage == Stage::Entries {
            purge.gone += ids.len() as u64;
            purge.kept += meant - ids.len() as u64;
        }
        if let Some(last) = last {
            purge.after = last;
        }
        if seen < u64::from(STEP_ROWS) {
            purge.after = 0;
            purge.stage = match purge.stage {
                Stage::Entries => Stage::Retractions,
                _ if purge.whose == Whose::Rooms => Stage::NextRoom,
                _ => Stage::Over,
            };
        }
        Ok(())
    }
}
