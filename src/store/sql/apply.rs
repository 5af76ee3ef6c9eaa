//! What journals carry becomes rows: one transaction for a batch, with the positions of its journals.
//!
//! In: entries in an order that keeps each journal's, and what is known of marks further on ([`Ahead`]). Out:
//! [`Outcome`], or an error and nothing is applied. First the batch is merged in memory ([`Plan`]): a delivery that was
//! taken meanwhile never becomes a row in `pending`, what was dropped becomes none at all, and of several records of one
//! user only the last is written. Then come a few multi-row statements for each table.
//!
//! A user's changes carry ids and revisions that grow with time, over restarts and shards ([`Id`]). Hence the rules:
//! a record of an account applies if it is newer than the account's; what is older than the account itself belongs to a
//! former one of that name, and is left out like what is for nobody.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use fnv::{FnvHashMap, FnvHashSet};

use super::connection::{Dialect, SqlError, Value};
use super::read::meta;
use super::statements::{self, ASK_MAX};
use super::{Sql, peer_key};
use crate::rt::{gently, give_way};
use crate::store::change::{ArchivedChange, ArchivedMessage, ArchivedRetract, Id, Message};
use crate::store::record::Record;
use crate::store::tier::Retraction;

/// Names whose numbers are remembered between batches.
const KNOWN_MAX: usize = 100_000;

/// One record of a journal.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    pub at: Position,
    pub change: &'a ArchivedChange<'static>,
}

/// A place in a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Tells the journal from one that began anew in its place.
    pub identity: u64,
    /// The journal's number.
    pub journal: u16,
    /// The record's number.
    pub seq: u64,
}

/// Marks that are durable in a journal and follow later.
#[derive(Debug, Default)]
pub struct Ahead {
    /// Deliveries that a client has taken.
    pub done: FnvHashSet<u64>,
    /// Messages that were refused.
    pub dropped: FnvHashSet<u64>,
    /// Of these no row was ever written, so their marks need not look for one.
    pub never_written: FnvHashSet<u64>,
}

/// What a batch has done.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Rows written and deleted.
    pub rows: u64,
    /// Changes for users who do not exist (any more).
    pub skipped: u64,
    /// To be added to [`Ahead::never_written`].
    pub never_written: Vec<u64>,
    /// To be taken out of it.
    pub marked: Vec<u64>,
}

/// A change of an account itself.
#[derive(Debug, Clone, Copy)]
pub struct UserOp<'a> {
    pub name: &'a str,
    /// `None`: now, and above what is there.
    pub revision: Option<u64>,
    pub change: UserChange<'a>,
}

#[derive(Debug, Clone, Copy)]
pub enum UserChange<'a> {
    /// The stored form of a record.
    Add(&'a [u8]),
    Put(&'a [u8]),
    Remove,
}

/// What became of a [`UserOp`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// At this revision.
    Done(u64),
    /// What is there is newer; or, without a revision: there is such an account.
    Stale,
    /// There is no such account.
    Missing,
}

/// What is remembered of accounts, as long as nobody else makes or removes one.
#[derive(Default)]
pub(super) struct Known {
    epoch: Option<i64>,
    // Names are chosen by strangers: a seeded hasher.
    accounts: HashMap<Box<str>, Account>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Account {
    id: i64,
    added: u64,
    revision: u64,
}

impl Known {
    pub fn clear(&mut self) {
        self.epoch = None;
        self.accounts.clear();
    }
}

impl Sql {
    /// Applies a batch in one transaction. An error means that nothing was applied, or, if it is
    /// [`super::Trouble::Lost`], that nobody knows: [`Sql::positions`] tells then.
    pub async fn apply(
        &mut self,
        entries: &[Entry<'_>],
        ahead: &Ahead,
    ) -> Result<Outcome, SqlError> {
        let plan = Plan::of(entries, ahead);
        self.in_transaction(async |sql| sql.write(&plan).await)
            .await
    }

    /// Puts a record aside that the database refuses, with its journal's position.
    pub async fn quarantine(
        &mut self,
        at: Position,
        payload: &[u8],
        reason: &str,
    ) -> Result<(), SqlError> {
        let part_max = (self.conn.packet_max / 4).clamp(1 << 10, 8 << 20);
        let mut parts: Vec<(usize, &[u8])> = payload.chunks(part_max).enumerate().collect();
        if parts.is_empty() {
            parts.push((0, payload));
        }
        let now = now_ms() / 1000;
        self.in_transaction(async |sql| {
            sql.conn
                .run_for(&statements::PUT_QUARANTINE, &parts, |values, (n, part)| {
                    values.extend([
                        Value::Int(at.identity as i64),
                        Value::Int(i64::from(at.journal)),
                        Value::from(at.seq),
                        Value::Int(*n as i64),
                        Value::from(now),
                        Value::Text(reason),
                        Value::Bytes(part),
                    ]);
                })
                .await?;
            sql.put_positions(&[at]).await
        })
        .await
    }

    /// Changes accounts by hand, in one transaction: the outcome of each, in their order.
    pub async fn change_users(&mut self, ops: &[UserOp<'_>]) -> Result<Vec<Applied>, SqlError> {
        self.in_transaction(async |sql| {
            sql.look_at_epoch().await?;
            Ok(sql.write_users(ops).await?.0)
        })
        .await
    }

    /// Deletes some rows of accounts that are gone; false if there are none.
    pub async fn purge(&mut self) -> Result<bool, SqlError> {
        let rows = self.conn.ask(statements::TO_PURGE, &[]).await?;
        let Some(owner) = rows.first().map(|row| row.int(0)).transpose()? else {
            return Ok(false);
        };
        let owner = [Value::Int(owner)];
        let purge_archive = statements::purge_archive(self.conn.dialect());
        if self.conn.run(purge_archive, &owner).await? == 0 {
            for statement in statements::PURGE_REST {
                self.conn.run(statement, &owner).await?;
            }
        }
        Ok(true)
    }

    /// A key as `documents` holds it: where an index takes only so much, a long one becomes its begin and its hash.
    /// Short ones have at most 1,024 bytes and these more, so the two cannot be mistaken.
    pub(super) fn stored_key<'k>(dialect: Dialect, key: &'k str) -> Cow<'k, str> {
        const SHORT_MAX: usize = 1024;
        if dialect == Dialect::Sqlite || key.len() <= SHORT_MAX {
            return key.into();
        }
        let begin = &key[..key.floor_char_boundary(SHORT_MAX - 64)];
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, key.as_bytes());
        let hex: String = hash.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        let dots = ".".repeat(SHORT_MAX + 1 - begin.len() - hex.len());
        format!("{begin}{dots}{hex}").into()
    }

    /// A key of any database as MySQL holds it: one that comes from there may be short already.
    pub(super) fn short_key(key: &str) -> Cow<'_, str> {
        match Sql::is_short_form(key) {
            true => key.into(),
            false => Sql::stored_key(Dialect::MySql, key),
        }
    }

    /// Whether [`Sql::stored_key`] has made it: as long as those, with dots and a hash at its end.
    fn is_short_form(key: &str) -> bool {
        let key = key.as_bytes();
        key.len() == 1025
            && key[1025 - 65] == b'.'
            && key[1025 - 64..]
                .iter()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b))
    }

    pub(super) async fn in_transaction<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Sql) -> Result<T, SqlError>,
    ) -> Result<T, SqlError> {
        self.conn.begin().await?;
        let done = match work(self).await {
            Ok(done) => self.conn.commit().await.map(|()| done),
            Err(error) => Err(error),
        };
        if done.is_err() {
            self.known.clear();
            self.conn.roll_back().await;
        }
        done
    }

    /// Forgets all numbers if anybody else has made or removed an account.
    async fn look_at_epoch(&mut self) -> Result<(), SqlError> {
        let rows = self.conn.ask(statements::EPOCH, &[]).await?;
        let epoch = rows.first().map(|row| row.int(0)).transpose()?;
        if epoch.is_none() || epoch != self.known.epoch || self.known.accounts.len() > KNOWN_MAX {
            self.known.clear();
            self.known.epoch = epoch;
        }
        Ok(())
    }

    async fn write(&mut self, plan: &Plan<'_>) -> Result<Outcome, SqlError> {
        let mut outcome = Outcome {
            marked: plan.done.iter().chain(&plan.dropped).copied().collect(),
            never_written: plan.never_written.clone(),
            ..Outcome::default()
        };
        self.look_at_epoch().await?;
        if !plan.users.is_empty() {
            let (applied, rows) = self.write_users(&plan.users).await?;
            let missing = applied.iter().filter(|one| **one == Applied::Missing);
            outcome.skipped += missing.count() as u64;
            outcome.rows += rows;
        }
        self.get_to_know(plan.names()).await?;
        let accounts = &self.known.accounts;
        // Nobody, or somebody else of that name.
        let mut owner = |name: &str, id: u64| {
            let found = accounts.get(name).filter(|account| id > account.added);
            if found.is_none() {
                outcome.skipped += 1;
            }
            found.map(|account| account.id)
        };

        let (mut archive, mut pending) = (Vec::new(), Vec::new());
        for planned in gently(&plan.messages) {
            let message = planned.message;
            let id = message.id.to_native();
            let Some(owner) = owner(&message.owner, id) else {
                continue;
            };
            let meta = meta(message.what, message.kind, message.flags.to_native());
            let archived = message.what & Message::ARCHIVE != 0;
            if archived {
                archive.push((id, owner, meta, message));
            }
            if planned.waits {
                let stanza = match archived {
                    true => Value::Null,
                    false => Value::Bytes(&message.stanza),
                };
                pending.push((id, owner, meta, stanza));
            }
        }
        let mut documents = Vec::new();
        for ((name, key), (revision, value)) in gently(&plan.documents) {
            if let Some(owner) = owner(name, *revision) {
                documents.push((
                    owner,
                    Sql::stored_key(self.conn.dialect(), key),
                    *revision,
                    *value,
                ));
            }
        }
        let mut lasts = Vec::new();
        for (name, (revision, at, status)) in gently(&plan.lasts) {
            if let Some(owner) = owner(name, *revision) {
                lasts.push((owner, *at, *status, *revision));
            }
        }
        let mut retractions = Vec::new();
        for retract in &plan.retractions {
            let id = retract.id.to_native();
            if let Some(owner) = owner(&retract.owner, id) {
                retractions.push((id, owner, *retract));
            }
        }
        // Rows enter in the order of their keys, whatever map they come from.
        documents.sort_unstable();
        lasts.sort_unstable();

        let conn = &mut self.conn;
        outcome.rows += conn
            .run_for(&statements::PUT_ARCHIVE, &archive, |values, row| {
                let (id, owner, meta, message) = row;
                values.extend([
                    Value::from(*id),
                    Value::Int(*owner),
                    Value::Int(peer_key(&message.peer)),
                    Value::Int(*meta),
                    Value::Text(&message.peer),
                    Value::Bytes(&message.stanza),
                ]);
            })
            .await?;
        outcome.rows += conn
            .run_for(&statements::PUT_PENDING, &pending, |values, row| {
                let (id, owner, meta, stanza) = row;
                values.extend([
                    Value::from(*id),
                    Value::Int(*owner),
                    Value::Int(*meta),
                    *stanza,
                ]);
            })
            .await?;
        outcome.rows += conn
            .run_for(
                &statements::PUT_DOCUMENTS,
                &documents,
                |values, (owner, key, revision, value)| {
                    values.extend([
                        Value::Int(*owner),
                        Value::Text(key),
                        Value::Bytes(value),
                        Value::from(*revision),
                    ]);
                },
            )
            .await?;
        outcome.rows += conn
            .run_for(&statements::PUT_LAST, &lasts, |values, row| {
                let (owner, at, status, revision) = row;
                values.extend([
                    Value::Int(*owner),
                    Value::from(*at),
                    Value::Text(status),
                    Value::from(*revision),
                ]);
            })
            .await?;
        outcome.rows += conn
            .run_for(&statements::PUT_RETRACTIONS, &retractions, |values, row| {
                let (id, owner, retract) = row;
                values.extend([
                    Value::from(*id),
                    Value::Int(*owner),
                    Value::Int(Retraction::key(&retract.target)),
                    Value::Int(i64::from(retract.side)),
                    Value::Text(&retract.peer),
                    Value::Text(&retract.target),
                    Value::Bytes(&retract.tombstone),
                ]);
            })
            .await?;
        for statement in [&statements::DROP_ARCHIVE, &statements::DROP_RETRACTIONS] {
            outcome.rows += conn
                .run_for(statement, &plan.dropped_rows, statements::id)
                .await?;
        }
        // First the text goes to where it waits, if it still does.
        for statement in [&statements::UNARCHIVE_PENDING, &statements::DROP_ARCHIVE] {
            outcome.rows += conn
                .run_for(statement, &plan.unarchived, statements::id)
                .await?;
        }
        outcome.rows += conn
            .run_for(
                &statements::DROP_PENDING,
                &plan.pending_rows,
                statements::id,
            )
            .await?;
        outcome.rows += conn
            .run_for(&statements::DECIDE, &plan.decided, statements::id)
            .await?;
        self.put_positions(&plan.positions).await?;
        Ok(outcome)
    }

    async fn put_positions(&mut self, positions: &[Position]) -> Result<(), SqlError> {
        self.conn
            .run_for(&statements::PUT_DRAINED, positions, |values, row| {
                values.extend([
                    Value::Int(row.identity as i64),
                    Value::Int(i64::from(row.journal)),
                    Value::from(row.seq),
                ]);
            })
            .await
            .map(drop)
    }

    /// Remembers the accounts of these names.
    async fn get_to_know(&mut self, names: FnvHashSet<&str>) -> Result<(), SqlError> {
        let unknown: Vec<&str> = gently(names)
            .filter(|name| !self.known.accounts.contains_key(*name))
            .collect();
        let found = self.ask_accounts(&statements::FIND, &unknown).await?;
        self.known.accounts.extend(found);
        Ok(())
    }

    async fn ask_accounts(
        &mut self,
        statement: &'static statements::Statement,
        names: &[&str],
    ) -> Result<Vec<(Box<str>, Account)>, SqlError> {
        let mut found = Vec::new();
        for names in names.chunks(ASK_MAX) {
            let rows = self.conn.ask_about(statement, names, 1, statements::name);
            for row in rows.await? {
                let account = Account {
                    id: row.int(0)?,
                    added: row.id(2)?,
                    revision: row.id(3)?,
                };
                found.push((row.text(1)?.into(), account));
            }
        }
        Ok(found)
    }

    /// Changes accounts, in their order: what it comes to is worked out in memory and written once for each name.
    async fn write_users(&mut self, ops: &[UserOp<'_>]) -> Result<(Vec<Applied>, u64), SqlError> {
        let mut names: Vec<&str> = ops.iter().map(|op| op.name).collect();
        names.sort_unstable();
        names.dedup();
        let mut states: HashMap<&str, State<'_>> =
            names.iter().map(|name| (*name, State::default())).collect();
        let found = self
            .ask_accounts(&statements::FIND_TO_CHANGE, &names)
            .await?;
        for (name, account) in found {
            if let Some(state) = states.get_mut(&*name) {
                state.stored = Some(account);
                state.account = Some(account);
            }
        }
        // Only those without an account can have a tombstone.
        let absent: Vec<&str> = names
            .iter()
            .copied()
            .filter(|name| states[name].stored.is_none())
            .collect();
        for chunk in absent.chunks(ASK_MAX) {
            let rows = self
                .conn
                .ask_about(&statements::FIND_REMOVED, chunk, 1, statements::name);
            for row in rows.await? {
                let revision = row.id(1)?;
                if let Some(state) = states.get_mut(row.text(0)?) {
                    state.stored_tomb = Some(revision);
                    state.tomb = Some(revision);
                }
            }
        }
        let applied = ops
            .iter()
            .map(|op| {
                let state = states.get_mut(op.name);
                state.expect("every name has a state").apply(op)
            })
            .collect();

        let mut rows = Users::default();
        for name in names {
            self.known.accounts.remove(name);
            rows.add(name, &states[name])?;
        }
        let now = now_ms() / 1000;
        let conn = &mut self.conn;
        let mut touched = 0;
        touched += conn
            .run_for(&statements::DROP_USERS, &rows.gone, statements::number)
            .await?;
        touched += conn
            .run_for(&statements::PUT_PURGE, &rows.gone, statements::number)
            .await?;
        touched += conn
            .run_for(&statements::DROP_REMOVED, &rows.back, statements::name)
            .await?;
        touched += conn
            .run_for(
                &statements::PUT_REMOVED,
                &rows.removed,
                |values, (name, revision)| {
                    values.extend([Value::Text(name), Value::from(*revision)]);
                },
            )
            .await?;
        touched += conn
            .run_for(&statements::PUT_USERS, &rows.put, |values, row| {
                values.push(Value::Int(row.account.id));
                row.bind(values, now);
            })
            .await?;
        touched += conn
            .run_for(&statements::ADD_USERS, &rows.add, |values, row| {
                row.bind(values, now);
            })
            .await?;
        if !rows.gone.is_empty() || !rows.add.is_empty() {
            conn.batch(statements::NEXT_EPOCH).await?;
            // Own changes are known: if nobody else has made one meanwhile, this is the number now.
            self.known.epoch = self.known.epoch.map(|epoch| epoch + 1);
        }
        Ok((applied, touched))
    }
}

/// What a batch comes to, before anything is known of the database.
#[derive(Default)]
struct Plan<'a> {
    users: Vec<UserOp<'a>>,
    messages: Vec<Planned<'a>>,
    /// By name and key, the newest: revision and value.
    documents: FnvHashMap<(&'a str, &'a str), (u64, &'a [u8])>,
    /// By name, the newest: revision, at, status.
    lasts: FnvHashMap<&'a str, (u64, u64, &'a str)>,
    /// All marks of the batch.
    done: Vec<u64>,
    dropped: Vec<u64>,
    /// Undecided messages that were let in: their rows are there, or in this batch.
    decided: Vec<u64>,
    /// Messages that are not for their owner's archive: their rows are there, or in this batch, too.
    unarchived: Vec<u64>,
    retractions: Vec<&'a ArchivedRetract<'static>>,
    /// Rows to be deleted for them.
    dropped_rows: Vec<u64>,
    pending_rows: Vec<u64>,
    never_written: Vec<u64>,
    positions: Vec<Position>,
}

struct Planned<'a> {
    message: &'a ArchivedMessage<'static>,
    /// Needs a row in `pending`.
    waits: bool,
}

impl<'a> Plan<'a> {
    fn of(entries: &[Entry<'a>], ahead: &Ahead) -> Plan<'a> {
        let mut plan = Plan::default();
        for entry in gently(entries) {
            let at = entry.at;
            let known = plan
                .positions
                .iter_mut()
                .find(|one| (one.identity, one.journal) == (at.identity, at.journal));
            match known {
                Some(known) => known.seq = at.seq,
                None => plan.positions.push(at),
            }
            plan.add(entry.change);
        }
        plan.merge(ahead);
        plan
    }

    fn add(&mut self, change: &'a ArchivedChange<'static>) {
        let user = |name, revision: u64, change| UserOp {
            name,
            revision: Some(revision),
            change,
        };
        match change {
            ArchivedChange::Message(message) => {
                let waits = message.what & Message::PENDING != 0;
                self.messages.push(Planned { message, waits });
            }
            ArchivedChange::AddUser {
                name,
                revision,
                record,
            } => {
                let op = user(name, revision.to_native(), UserChange::Add(record));
                self.users.push(op);
            }
            ArchivedChange::PutUser {
                name,
                revision,
                record,
            } => {
                let op = user(name, revision.to_native(), UserChange::Put(record));
                self.users.push(op);
            }
            ArchivedChange::RemoveUser { name, revision } => {
                let op = user(name, revision.to_native(), UserChange::Remove);
                self.users.push(op);
            }
            ArchivedChange::PutDocument {
                name,
                revision,
                key,
                value,
            } => {
                let newest = self.documents.entry((name, key)).or_default();
                if revision.to_native() > newest.0 {
                    *newest = (revision.to_native(), value);
                }
            }
            ArchivedChange::PutLast {
                name,
                revision,
                at,
                status,
            } => {
                let newest = self.lasts.entry(name).or_default();
                if revision.to_native() > newest.0 {
                    *newest = (revision.to_native(), at.to_native(), status);
                }
            }
            ArchivedChange::Marks(marks) => {
                self.done.extend(marks.done.iter().map(|id| id.to_native()));
                self.dropped
                    .extend(marks.dropped.iter().map(|id| id.to_native()));
            }
            ArchivedChange::Decided { ids } => {
                self.decided.extend(ids.iter().map(|id| id.to_native()));
            }
            ArchivedChange::Unarchived { ids } => {
                self.unarchived.extend(ids.iter().map(|id| id.to_native()));
            }
            ArchivedChange::Retract(retract) => self.retractions.push(retract),
        }
    }

    /// Takes out what need not be written, and finds which marks concern rows.
    fn merge(&mut self, ahead: &Ahead) {
        let done: FnvHashSet<u64> = gently(&self.done).copied().collect();
        let dropped: FnvHashSet<u64> = gently(&self.dropped).copied().collect();
        // Of these nothing is in the database, or only the row in the archive.
        let mut here: FnvHashSet<u64> = FnvHashSet::default();
        self.messages.retain_mut(|planned| {
            give_way();
            let id = planned.message.id.to_native();
            if dropped.contains(&id) || ahead.dropped.contains(&id) {
                // An earlier life of this journal may have written it: then its mark deletes it.
                return false;
            }
            if planned.waits && (done.contains(&id) || ahead.done.contains(&id)) {
                planned.waits = false;
                if done.contains(&id) {
                    here.insert(id);
                } else {
                    self.never_written.push(id);
                }
            }
            true
        });
        let is_dropped = |id: &u64| dropped.contains(id) || ahead.dropped.contains(id);
        self.retractions
            .retain(|retract| !is_dropped(&retract.id.to_native()));
        let written = |id: &&u64| !here.contains(id) && !ahead.never_written.contains(id);
        self.dropped_rows = self.dropped.clone();
        self.pending_rows = gently(&self.done).filter(written).copied().collect();
        self.pending_rows.extend(&self.dropped);
    }

    /// All whose number is needed.
    fn names(&self) -> FnvHashSet<&'a str> {
        let messages = self.messages.iter().map(|one| {
            let message: &'a ArchivedMessage<'static> = one.message;
            &*message.owner
        });
        let documents = self.documents.keys().map(|(name, _)| *name);
        let lasts = self.lasts.keys().copied();
        let retractions = self.retractions.iter().map(|retract| {
            let retract: &'a ArchivedRetract<'static> = retract;
            &*retract.owner
        });
        messages
            .chain(documents)
            .chain(lasts)
            .chain(retractions)
            .collect()
    }
}

/// One name on its way through the changes of a batch.
#[derive(Default)]
struct State<'a> {
    stored: Option<Account>,
    account: Option<Account>,
    record: Option<&'a [u8]>,
    stored_tomb: Option<u64>,
    tomb: Option<u64>,
}

impl<'a> State<'a> {
    fn apply(&mut self, op: &UserOp<'a>) -> Applied {
        let newest = self
            .account
            .map(|account| account.revision)
            .max(self.tomb)
            .unwrap_or(0);
        let revision = op
            .revision
            .unwrap_or_else(|| Id::at(now_ms()).0.max(newest + 1));
        let by_hand = op.revision.is_none();
        match (op.change, &mut self.account) {
            (UserChange::Add(_), Some(_)) if by_hand => Applied::Stale,
            (UserChange::Put(_) | UserChange::Remove, None) if by_hand => Applied::Missing,
            (UserChange::Put(_), None) => Applied::Missing,
            // A revision of 0 is that of an account from before there were revisions.
            _ if revision <= newest => Applied::Stale,
            (UserChange::Add(record), account) => {
                // The number 0 is nobody's: it is given when the row is written.
                *account = Some(Account {
                    id: 0,
                    added: revision,
                    revision,
                });
                self.record = Some(record);
                self.tomb = None;
                Applied::Done(revision)
            }
            (UserChange::Put(record), Some(account)) => {
                account.revision = revision;
                self.record = Some(record);
                Applied::Done(revision)
            }
            (UserChange::Remove, account) => {
                let was_there = account.take().is_some();
                self.record = None;
                self.tomb = Some(revision);
                match was_there {
                    true => Applied::Done(revision),
                    false => Applied::Missing,
                }
            }
        }
    }
}

/// What is written of accounts.
#[derive(Default)]
struct Users<'a> {
    /// Numbers that are no longer anybody's.
    gone: Vec<i64>,
    /// Names that have an account again.
    back: Vec<&'a str>,
    removed: Vec<(&'a str, u64)>,
    put: Vec<UserRow<'a>>,
    add: Vec<UserRow<'a>>,
}

struct UserRow<'a> {
    name: &'a str,
    account: Account,
    record: Record,
}

impl<'a> Users<'a> {
    fn add(&mut self, name: &'a str, state: &State<'_>) -> Result<(), SqlError> {
        let kept = state.account.map(|account| account.id);
        if let Some(stored) = state.stored.filter(|stored| kept != Some(stored.id)) {
            self.gone.push(stored.id);
        }
        if let Some(tomb) = state.tomb.filter(|_| state.tomb != state.stored_tomb) {
            self.removed.push((name, tomb));
        }
        if state.account.is_some() && state.stored_tomb.is_some() {
            self.back.push(name);
        }
        if let (Some(account), Some(record)) = (state.account, state.record) {
            let record = Record::from_bytes(record)
                .map_err(|error| SqlError::refused(format!("{name}: {error}")))?;
            let row = UserRow {
                name,
                account,
                record,
            };
            match account.id {
                0 => self.add.push(row),
                _ => self.put.push(row),
            }
        }
        Ok(())
    }
}

impl UserRow<'_> {
    fn bind<'v>(&'v self, values: &mut Vec<Value<'v>>, now: u64) {
        let user = self.record.get();
        values.extend([
            Value::Text(self.name),
            Value::from(self.account.added),
            Value::from(user.created_at.to_native()),
            Value::from(now),
            Value::Int(i64::from(user.disabled)),
        ]);
        for keys in [user.sha1.as_ref(), user.sha256.as_ref()] {
            values.extend(match keys {
                Some(keys) => [
                    Value::Int(i64::from(keys.iterations.to_native())),
                    Value::Int(keys.salt.len() as i64),
                ],
                None => [Value::Null, Value::Null],
            });
        }
        values.extend([
            Value::Bytes(self.record.bytes()),
            Value::from(self.account.revision),
        ]);
    }
}

pub(super) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
