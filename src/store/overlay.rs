//! What the journals hold and SQL does not have yet, user by user.
//!
//! In: changes as their groups become durable, and those that a replay finds. Out: what a user loaded from SQL (or Redis)
//! really is, undrained documents, undrained archive entries. Promise: SQL's view with the overlay on it is the newest state,
//! whichever part the drain has carried over meanwhile: applying a change twice changes nothing.
//!
//! An entry costs about 140 bytes here with its tables (measured), its text stays in the journal. While something of a user is being read from SQL
//! ([`Overlay::hold`]) nothing of his is forgotten, so an answer never falls between SQL and overlay.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use fnv::{FnvHashMap, FnvHashSet};
use smallvec::SmallVec;

use super::change::{ArchivedChange, Id, Message};
use super::journal::Place;
use super::record::Record;
use super::tier::{ArchiveQuery, Entry, Last, Loaded, Page, Pending, ReadError, Retraction};
use super::warm::INDEX_KEY;

/// Where a change stands: the number of its journal and its place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub journal: u16,
    pub seq: u64,
}

/// One change of a user.
#[derive(Debug, Clone)]
pub enum Item {
    Message {
        id: u64,
        what: u8,
        place: Place,
    },
    /// A client has taken the message.
    Done(u64),
    /// The message was refused.
    Dropped(u64),
    Record {
        revision: u64,
        record: Record,
        /// Nothing of an earlier account of this name is left.
        fresh: bool,
    },
    Removed {
        revision: u64,
    },
    Document {
        revision: u64,
        key: Box<str>,
        /// Empty: there is none.
        value: Box<[u8]>,
    },
    Last {
        revision: u64,
        last: Last,
    },
    Retraction(Box<Retraction>),
}

impl Item {
    /// An account that begins or ends: the revision behind which lies all that is its owner's now.
    fn begins(&self) -> Option<u64> {
        match self {
            Item::Removed { revision }
            | Item::Record {
                revision,
                fresh: true,
                ..
            } => Some(*revision),
            _ => None,
        }
    }

    /// What a change comes to; `place` is where it stands. `None`: marks, which name no user. An error: a record that this
    /// release does not read.
    pub fn of(change: &ArchivedChange<'_>, place: Place) -> Result<Option<Item>, String> {
        let record = |revision: u64, bytes: &[u8], fresh| {
            let record = Record::from_bytes(bytes).map_err(|error| error.to_string())?;
            Ok::<_, String>(Item::Record {
                revision,
                record,
                fresh,
            })
        };
        Ok(Some(match change {
            ArchivedChange::Message(message) => Item::Message {
                id: message.id.to_native(),
                what: message.what,
                place,
            },
            ArchivedChange::AddUser {
                revision,
                record: bytes,
                ..
            } => record(revision.to_native(), bytes, true)?,
            ArchivedChange::PutUser {
                revision,
                record: bytes,
                ..
            } => record(revision.to_native(), bytes, false)?,
            ArchivedChange::RemoveUser { revision, .. } => Item::Removed {
                revision: revision.to_native(),
            },
            ArchivedChange::PutDocument {
                revision,
                key,
                value,
                ..
            } => Item::Document {
                revision: revision.to_native(),
                key: (**key).into(),
                value: (**value).into(),
            },
            ArchivedChange::PutLast {
                revision,
                at,
                status,
                ..
            } => Item::Last {
                revision: revision.to_native(),
                last: Last {
                    at: at.to_native(),
                    status: (**status).into(),
                },
            },
            ArchivedChange::Retract(retract) => Item::Retraction(Box::new(Retraction {
                id: retract.id.to_native(),
                side: retract.side,
                peer: (*retract.peer).into(),
                target: (*retract.target).into(),
                tombstone: (*retract.tombstone).into(),
            })),
            ArchivedChange::Marks(_)
            | ArchivedChange::Decided { .. }
            | ArchivedChange::Unarchived { .. } => return Ok(None),
        }))
    }

    /// Its id or revision, or the id that a mark names.
    pub fn id(&self) -> u64 {
        match self {
            Item::Message { id, .. } | Item::Done(id) | Item::Dropped(id) => *id,
            Item::Record { revision, .. }
            | Item::Removed { revision }
            | Item::Document { revision, .. }
            | Item::Last { revision, .. } => *revision,
            Item::Retraction(retraction) => retraction.id,
        }
    }
}

/// Reads a message back from its journal: the payload is appended.
pub type ReadBack = Rc<dyn Fn(Place, &mut Vec<u8>) -> Result<(), String>>;

pub struct Overlay {
    users: FnvHashMap<Rc<str>, Undrained>,
    /// By journal: whose changes they are, in order.
    order: FnvHashMap<u16, VecDeque<(u64, Rc<str>)>>,
    /// Marks that an earlier start left, whose users are not known.
    gone: FnvHashMap<u64, Position>,
    /// Undecided messages that were let in, whoever's they are; few, and none while the database is well.
    decided: FnvHashMap<u64, Position>,
    /// Messages that are not for their owner's archive after all; few, too.
    unarchived: FnvHashMap<u64, Position>,
    doubt: Doubt,
    /// What SQL has and is not forgotten yet, a position for each journal.
    behind: Vec<Position>,
    read_back: ReadBack,
    items: usize,
}

/// What was found without knowing what SQL has of it: it may be old, and what was newer gone with another journal.
#[derive(Default)]
struct Doubt {
    /// Up to this id or revision.
    up_to: u64,
    /// Journals of which SQL has not told yet what it has.
    journals: FnvHashSet<u16>,
}

/// Changes that are forgotten in one turn: 0.2 ms.
const FORGET_AT_ONCE: usize = 500;

/// How far back a document is sought that a newer one takes the place of.
const SUPERSEDE_LOOKS: usize = 1024;

/// What a document said before is not kept while a newer one of the same journal waits behind it: a client that writes again and
/// again while the database is away costs the newest only. It is forgotten in order, so the older one is never the last.
fn supersede(items: &mut VecDeque<(u64, Item)>, newer: u64, wanted: &str) {
    let looked = items.iter_mut().rev().take(SUPERSEDE_LOOKS);
    let old = looked.map(|(_, item)| item).find_map(|item| match item {
        Item::Document {
            revision,
            key,
            value,
        } if **key == *wanted => Some((*revision, value)),
        _ => None,
    });
    if let Some((revision, value)) = old
        && revision < newer
    {
        *value = Box::default();
    }
}

/// What one journal has of a user, by position.
type Part = (u16, VecDeque<(u64, Item)>);

#[derive(Default)]
struct Undrained {
    /// By journal; nearly always one.
    parts: SmallVec<[Part; 1]>,
    /// Reads under way.
    held: u32,
    /// Drained while they are.
    drained: SmallVec<[Position; 0]>,
}

impl Overlay {
    pub fn new(read_back: ReadBack) -> Overlay {
        Overlay {
            users: FnvHashMap::default(),
            order: FnvHashMap::default(),
            gone: FnvHashMap::default(),
            decided: FnvHashMap::default(),
            unarchived: FnvHashMap::default(),
            doubt: Doubt::default(),
            behind: Vec::new(),
            read_back,
            items: 0,
        }
    }

    /// Changes that SQL does not have.
    pub fn items(&self) -> usize {
        self.items
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.users
            .iter()
            .filter(|(_, u)| !u.parts.is_empty())
            .map(|(name, _)| &**name)
    }

    /// Must the Redis ring hear of what is here of the user? Of all but what is in archives and in documents that its copies do not
    /// hold.
    pub fn concerns_ring(&self, name: &str) -> bool {
        let Some(user) = self.users.get(name) else {
            return false;
        };
        let done: FnvHashSet<u64> = user
            .items()
            .filter_map(|item| match item {
                Item::Done(id) | Item::Dropped(id) => Some(*id),
                _ => None,
            })
            .collect();
        user.items().any(|item| match item {
            Item::Record { .. } | Item::Removed { .. } | Item::Last { .. } => true,
            Item::Message { id, what, .. } => {
                what & Message::PENDING != 0 && !done.contains(id) && !self.gone.contains_key(id)
            }
            Item::Document { key, .. } => **key == *INDEX_KEY,
            Item::Done(_) | Item::Dropped(_) | Item::Retraction(_) => false,
        })
    }

    /// A change is durable in its journal. Positions of one journal ascend.
    pub fn add(&mut self, at: Position, name: &Rc<str>, item: Item) {
        self.order
            .entry(at.journal)
            .or_default()
            .push_back((at.seq, name.clone()));
        let user = match self.users.get_mut(name) {
            Some(user) => user,
            None => self.users.entry(name.clone()).or_default(),
        };
        let part = match user.parts.iter().position(|(j, _)| *j == at.journal) {
            Some(part) => part,
            None => {
                user.parts.push((at.journal, VecDeque::new()));
                user.parts.len() - 1
            }
        };
        let items = &mut user.parts[part].1;
        if let Item::Document { revision, key, .. } = &item {
            supersede(items, *revision, key);
        }
        items.push_back((at.seq, item));
        self.items += 1;
    }

    /// A message was done or dropped before the last start.
    pub fn add_gone(&mut self, at: Position, id: u64) {
        self.gone.insert(id, at);
    }

    /// An undecided message was let in.
    pub fn add_decided(&mut self, at: Position, id: u64) {
        self.decided.insert(id, at);
    }

    /// A message is not for its owner's archive after all.
    pub fn add_unarchived(&mut self, at: Position, id: u64) {
        self.unarchived.insert(id, at);
    }

    /// What was added so far was found while SQL could not be asked. Only what is newer than `up_to` is surely the newest, until
    /// [`Overlay::drained`] has been told of all journals.
    pub fn doubt(&mut self, up_to: Id) {
        let journals = self.order.keys().copied().collect();
        self.doubt = Doubt {
            up_to: up_to.0,
            journals,
        };
    }

    fn is_doubtful(&self, revision: u64) -> bool {
        revision <= self.doubt.up_to && !self.doubt.journals.is_empty()
    }

    /// SQL has everything of that journal up to `at`: that is forgotten, the first piece now, the rest by [`Overlay::forget_some`].
    /// What is still here meanwhile does no harm: SQL had it before this was told, too.
    pub fn drained(&mut self, at: Position) {
        match self.behind.iter_mut().find(|b| b.journal == at.journal) {
            Some(behind) => *behind = at,
            None => self.behind.push(at),
        }
        self.forget_some();
    }

    /// Is there something to forget?
    pub fn is_behind(&self) -> bool {
        !self.behind.is_empty()
    }

    /// Forgets a piece of what SQL has: one transaction's worth at once would keep a core for milliseconds.
    pub fn forget_some(&mut self) {
        let mut left = FORGET_AT_ONCE;
        while let Some(at) = self.behind.last().copied() {
            if !self.forget(at, &mut left) {
                return;
            }
            self.behind.pop();
            self.has_forgotten(at);
        }
    }

    /// False: `left` was not enough.
    fn forget(&mut self, at: Position, left: &mut usize) -> bool {
        let Some(order) = self.order.get_mut(&at.journal) else {
            return true;
        };
        while order.front().is_some_and(|(seq, _)| *seq <= at.seq) {
            if *left == 0 {
                return false;
            }
            *left -= 1;
            let Some((_, name)) = order.pop_front() else {
                break;
            };
            let Some(user) = self.users.get_mut(&name) else {
                continue;
            };
            if user.held > 0 {
                if user.drained.last() != Some(&at) {
                    user.drained.push(at);
                }
                continue;
            }
            self.items -= user.forget(at);
            if user.parts.is_empty() {
                self.users.remove(&name);
            }
        }
        true
    }

    /// Nothing up to `at` is here any more, but what is held: what was said about it goes behind it.
    fn has_forgotten(&mut self, at: Position) {
        self.doubt.journals.remove(&at.journal);
        let marks =
            !self.gone.is_empty() || !self.decided.is_empty() || !self.unarchived.is_empty();
        if marks && self.users.values().all(|user| user.held == 0) {
            let stays = |mark: &Position| mark.journal != at.journal || mark.seq > at.seq;
            self.gone.retain(|_, mark| stays(mark));
            self.decided.retain(|_, mark| stays(mark));
            self.unarchived.retain(|_, mark| stays(mark));
        }
    }

    /// Something of the user is asked from SQL; [`Overlay::release`] when the answer was used.
    pub fn hold(&mut self, name: &str) {
        match self.users.get_mut(name) {
            Some(user) => user.held += 1,
            None => {
                self.users.insert(
                    name.into(),
                    Undrained {
                        held: 1,
                        ..Undrained::default()
                    },
                );
            }
        }
    }

    pub fn release(&mut self, name: &str) {
        let Some(user) = self.users.get_mut(name) else {
            return;
        };
        user.held = user.held.saturating_sub(1);
        if user.held > 0 {
            return;
        }
        for at in std::mem::take(&mut user.drained) {
            self.items -= user.forget(at);
        }
        if user.parts.is_empty() {
            self.users.remove(name);
        }
    }

    /// The user as he is, from what SQL (or Redis) says of him. An error: the journal cannot be read.
    pub fn apply(&self, name: &str, loaded: Option<Loaded>) -> Result<Option<Loaded>, String> {
        let mut user = self.with_changes(name, loaded)?;
        for pending in user.iter_mut().flat_map(|user| &mut user.pending) {
            if self.decided.contains_key(&pending.id) {
                pending.what &= !Message::UNDECIDED;
            }
            if self.unarchived.contains_key(&pending.id) {
                pending.what &= !Message::ARCHIVE;
            }
        }
        Ok(user)
    }

    fn with_changes(&self, name: &str, loaded: Option<Loaded>) -> Result<Option<Loaded>, String> {
        let Some(user) = self.users.get(name).filter(|u| !u.parts.is_empty()) else {
            return Ok(loaded.map(|mut loaded| {
                loaded.pending.retain(|p| !self.gone.contains_key(&p.id));
                loaded
            }));
        };
        let mut gone: FnvHashSet<u64> = self.gone.keys().copied().collect();
        // what is older belongs to an account that was removed
        let mut floor = 0;
        // a change that was made while the account was being removed does not bring it back
        let (mut added, mut removed) = (0, 0);
        for item in user.items() {
            match item {
                Item::Record {
                    revision,
                    fresh: true,
                    ..
                } => added = added.max(*revision),
                Item::Removed { revision } => removed = removed.max(*revision),
                _ => {}
            }
        }
        let too_late = |revision: u64| removed > added && revision > removed;
        let mut newest: Option<(u64, Option<&Record>)> = None;
        let mut last: Option<(u64, &Last)> = None;
        for item in user.items() {
            match item {
                Item::Done(id) | Item::Dropped(id) => {
                    gone.insert(*id);
                }
                Item::Record {
                    revision,
                    record,
                    fresh,
                } => {
                    if newest.is_none_or(|(r, _)| r < *revision) && !too_late(*revision) {
                        newest = Some((*revision, Some(record)));
                    }
                    if *fresh {
                        floor = floor.max(*revision);
                    }
                }
                Item::Removed { revision } => {
                    if newest.is_none_or(|(r, _)| r < *revision) {
                        newest = Some((*revision, None));
                    }
                    floor = floor.max(*revision);
                }
                Item::Last { revision, last: l } => {
                    if last.is_none_or(|(r, _)| r < *revision) {
                        last = Some((*revision, l));
                    }
                }
                Item::Message { .. } | Item::Document { .. } | Item::Retraction(_) => {}
            }
        }
        let mut loaded = match (loaded, newest) {
            (Some(loaded), Some((revision, _))) if loaded.revision >= revision => loaded,
            (_, Some((_, None))) => return Ok(None),
            // SQL has the removal already
            (None, Some(_)) if added == 0 => return Ok(None),
            (None, Some((revision, _))) if self.is_doubtful(revision) => {
                return Err("it is not known yet what the database has of the journals".into());
            }
            (old, Some((revision, Some(record)))) => {
                let old = old.filter(|old| old.revision > floor || floor == 0);
                let old = old.map(|o| (o.pending, o.last, o.index));
                let (pending, last, index) = old.unwrap_or_default();
                Loaded {
                    record: record.clone(),
                    revision,
                    pending,
                    last,
                    index,
                }
            }
            (Some(loaded), None) => loaded,
            (None, None) => return Ok(None),
        };
        if let Some((_, last)) = last.filter(|(revision, _)| *revision >= floor) {
            loaded.last = Some(last.clone());
        }
        if self.newest_document(name, INDEX_KEY).is_some() {
            // whoever needs it reads it, and finds the one that is here
            loaded.index = None;
        }
        let mut pending: BTreeMap<u64, Pending> = std::mem::take(&mut loaded.pending)
            .into_iter()
            .filter(|p| p.id >= floor && !gone.contains(&p.id))
            .map(|p| (p.id, p))
            .collect();
        let mut bytes = Vec::new();
        for item in user.items() {
            let Item::Message { id, what, place } = item else {
                continue;
            };
            if what & Message::PENDING == 0
                || *id < floor
                || gone.contains(id)
                || pending.contains_key(id)
            {
                continue;
            }
            let (entry, _) = self.entry(*place, &mut bytes)?;
            pending.insert(
                *id,
                Pending {
                    id: *id,
                    what: entry.what,
                    kind: entry.kind,
                    flags: entry.flags,
                    stanza: entry.stanza,
                },
            );
        }
        loaded.pending = pending.into_values().collect();
        Ok(Some(loaded))
    }

    /// A document that SQL may not have; `Some(None)`: there is none any more. An error: it is not known whether SQL has a newer
    /// one.
    pub fn document(&self, name: &str, key: &str) -> Result<Option<Option<Box<[u8]>>>, ReadError> {
        match self.newest_document(name, key) {
            Some((revision, _)) if self.is_doubtful(revision) => Err(ReadError(
                "it is not known yet what the database has of the journals".into(),
            )),
            newest => Ok(newest.map(|(_, value)| value.map(Into::into))),
        }
    }

    fn newest_document(&self, name: &str, key: &str) -> Option<(u64, Option<&[u8]>)> {
        let user = self.users.get(name)?;
        let mut newest: Option<(u64, Option<&[u8]>)> = None;
        for item in user.items() {
            let (revision, value) = match item {
                Item::Document {
                    revision,
                    key: k,
                    value,
                } if **k == *key => (*revision, Some(&**value).filter(|v| !v.is_empty())),
                _ => match item.begins() {
                    Some(revision) => (revision, None),
                    None => continue,
                },
            };
            if newest.is_none_or(|(r, _)| r <= revision) {
                newest = Some((revision, value));
            }
        }
        newest
    }

    /// Ids of archive entries behind `last_id` (what SQL has up to there it gives itself), ascending.
    pub fn archived(&self, name: &str, last_id: u64) -> Vec<(u64, Place)> {
        self.archived_from(name, self.begins(name).max(last_id + 1))
    }

    fn archived_from(&self, name: &str, floor: u64) -> Vec<(u64, Place)> {
        let Some(user) = self.users.get(name) else {
            return Vec::new();
        };
        // a mark of an earlier start says done or dropped: one that was done stays in the archive, and dropped ones are few
        let mut gone = FnvHashSet::default();
        let mut found = Vec::new();
        for item in user.items() {
            match item {
                Item::Message { id, what, place }
                    if what & Message::ARCHIVE != 0 && !self.unarchived.contains_key(id) =>
                {
                    found.push((*id, *place));
                }
                Item::Dropped(id) => {
                    gone.insert(*id);
                }
                _ => {}
            }
        }
        found.retain(|(id, _)| *id >= floor && !gone.contains(id));
        found.sort_unstable_by_key(|(id, _)| *id);
        found.dedup_by_key(|(id, _)| *id);
        found
    }

    /// Undecided messages of a user (see [`Message::UNDECIDED`]).
    pub fn undecided(&self, name: &str) -> Vec<(u64, Place)> {
        let Some(user) = self.users.get(name) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for item in user.items() {
            match item {
                Item::Message { id, what, place } if what & Message::UNDECIDED != 0 => {
                    found.push((*id, *place));
                }
                Item::Done(id) | Item::Dropped(id) => found.retain(|(f, _)| f != id),
                _ => {}
            }
        }
        found.retain(|(id, _)| !self.gone.contains_key(id) && !self.decided.contains_key(id));
        found
    }

    /// Messages of the user's that were refused.
    fn dropped(&self, name: &str) -> SmallVec<[u64; 4]> {
        let items = self.users.get(name).into_iter().flat_map(Undrained::items);
        let dropped = items.filter_map(|item| match item {
            Item::Dropped(id) => Some(*id),
            _ => None,
        });
        dropped.collect()
    }

    /// Does the overlay know all about the user, so that SQL has nothing to add?
    pub fn is_whole(&self, name: &str) -> bool {
        self.users.get(name).is_some_and(|user| {
            let mut begins = user.items().filter_map(Item::begins);
            begins.any(|revision| !self.is_doubtful(revision))
        })
    }

    /// A page of an archive as it is, from the page that SQL gave.
    pub fn page(&self, query: &ArchiveQuery, mut page: Page) -> Result<Page, String> {
        // what was refused after all, and SQL does not know yet; the count stays as it is (XEP-0059: it may be approximate)
        let dropped = self.dropped(&query.name);
        page.entries.retain(|entry| {
            !dropped.contains(&entry.id) && !self.unarchived.contains_key(&entry.id)
        });
        // what SQL still has of somebody else who had this name
        let begins = self.begins(&query.name);
        if begins > page.last_id {
            page = Page {
                complete: true,
                count: page.count.map(|_| 0),
                missing: page.missing,
                ..Page::default()
            };
        }
        page.retracted |= self.has_retractions(&query.name);
        let beyond = self.archived_from(&query.name, begins.max(page.last_id + 1));
        page.missing
            .retain(|id| beyond.binary_search_by_key(id, |(id, _)| *id).is_err());
        let mut bytes = Vec::new();
        let mut matching = Vec::new();
        for (id, place) in beyond {
            if !query.wants(id) {
                continue;
            }
            let (entry, _) = self.entry(place, &mut bytes)?;
            if query.matches(&entry) {
                matching.push(entry);
            }
        }
        let most = query.most as usize;
        let in_sql = page.count;
        if let Some(count) = &mut page.count {
            *count += matching.len() as u64;
        }
        let sql_entries = page.entries.len();
        let total = matching.len();
        let mut extra: Vec<(usize, Entry)> = matching
            .into_iter()
            .enumerate()
            .filter(|(_, e)| query.after.is_none_or(|after| e.id > after))
            .filter(|(_, e)| query.before.is_none_or(|before| e.id < before))
            .collect();
        if query.backwards {
            if extra.len() > most {
                page.complete = false;
                extra.drain(..extra.len() - most);
                page.entries.clear();
            } else {
                let room = most - extra.len();
                if page.entries.len() > room {
                    page.complete = false;
                    let cut = page.entries.len() - room;
                    page.entries.drain(..cut);
                    page.index = page.index.map(|index| index + cut as u64);
                }
            }
        } else if page.complete {
            let room = most - page.entries.len().min(most);
            if extra.len() > room {
                page.complete = false;
                extra.truncate(room);
            }
        } else {
            extra.clear();
        }
        if page.entries.is_empty() && (sql_entries > 0 || page.index.is_none() || total > 0) {
            page.index = match (in_sql, extra.first()) {
                (Some(count), Some((before, _))) => Some(count + *before as u64),
                _ => page.index.filter(|_| sql_entries == 0),
            };
        }
        page.entries
            .extend(extra.into_iter().map(|(_, entry)| entry));
        Ok(page)
    }

    /// The revision with which the owner of this name began, or the one before him ended, if SQL does not have that yet; else 0.
    fn begins(&self, name: &str) -> u64 {
        let items = self.users.get(name).into_iter().flat_map(Undrained::items);
        items.filter_map(Item::begins).max().unwrap_or(0)
    }

    fn has_retractions(&self, name: &str) -> bool {
        self.users
            .get(name)
            .is_some_and(|user| user.items().any(|item| matches!(item, Item::Retraction(_))))
    }

    /// Retractions with one of these keys ([`Retraction::key`]), SQL's and those that it does not have yet; oldest first.
    pub fn retractions(
        &self,
        name: &str,
        keys: &[i64],
        mut found: Vec<Retraction>,
    ) -> Vec<Retraction> {
        let dropped = self.dropped(name);
        let floor = self.begins(name);
        for item in self.users.get(name).into_iter().flat_map(Undrained::items) {
            match item {
                Item::Retraction(one) if keys.contains(&Retraction::key(&one.target)) => {
                    found.push((**one).clone());
                }
                _ => {}
            }
        }
        found.retain(|one| one.id >= floor && !dropped.contains(&one.id));
        found.sort_by_key(|one| one.id);
        found.dedup_by_key(|one| one.id);
        found
    }

    /// An archive entry read back from its journal, and its twin.
    pub fn entry(&self, place: Place, bytes: &mut Vec<u8>) -> Result<(Entry, u64), String> {
        bytes.clear();
        (self.read_back)(place, bytes)?;
        match ArchivedChange::access(bytes)? {
            ArchivedChange::Message(m) => Ok((
                Entry {
                    id: m.id.into(),
                    what: m.what,
                    kind: m.kind,
                    flags: m.flags.into(),
                    peer: (&*m.peer).into(),
                    stanza: (&*m.stanza).into(),
                },
                m.twin.into(),
            )),
            _ => Err("the journal has something else where a message was".into()),
        }
    }
}

impl ArchiveQuery {
    /// Does the entry match the filter, the page's bounds left aside?
    pub fn matches(&self, entry: &Entry) -> bool {
        self.wants(entry.id)
            && self
                .with
                .as_deref()
                .is_none_or(|with| is_with(&entry.peer, with))
    }

    /// Is the message with this id within the bounds of the filter?
    fn wants(&self, id: u64) -> bool {
        let ms = Id(id).unix_ms();
        self.start_ms.is_none_or(|start| ms >= start)
            && self.end_ms.is_none_or(|end| ms <= end)
            && self.after_id.is_none_or(|after| id > after)
            && self.before_id.is_none_or(|before| id < before)
            && (self.ids.is_empty() || self.ids.contains(&id))
    }
}

/// A bare JID matches all its resources.
pub(super) fn is_with(peer: &str, with: &str) -> bool {
    match peer.strip_prefix(with) {
        Some("") => true,
        Some(rest) => rest.starts_with('/') && !with.contains('/'),
        None => false,
    }
}

impl Undrained {
    fn items(&self) -> impl Iterator<Item = &Item> {
        self.parts
            .iter()
            .flat_map(|(_, items)| items.iter().map(|(_, item)| item))
    }

    /// How many were forgotten.
    fn forget(&mut self, at: Position) -> usize {
        let mut forgotten = 0;
        self.parts.retain(|(journal, items)| {
            if *journal == at.journal {
                while items.front().is_some_and(|(seq, _)| *seq <= at.seq) {
                    items.pop_front();
                    forgotten += 1;
                }
            }
            !items.is_empty()
        });
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_that_is_written_again_and_again_is_kept_once() {
        let mut overlay = Overlay::new(Rc::new(|_, _| Ok(())));
        let name: Rc<str> = "alice".into();
        let document = |revision: u64, key: &str| Item::Document {
            revision,
            key: key.into(),
            value: vec![revision as u8; 1000].into(),
        };
        for seq in 1..=100 {
            let at = |seq| Position { journal: 0, seq };
            overlay.add(at(2 * seq), &name, document(2 * seq, "pep"));
            overlay.add(at(2 * seq + 1), &name, document(2 * seq + 1, "vcard"));
        }
        let bytes = |overlay: &Overlay| -> usize {
            let items = overlay.users["alice"].items();
            items
                .map(|item| match item {
                    Item::Document { value, .. } => value.len(),
                    _ => 0,
                })
                .sum()
        };
        assert_eq!(bytes(&overlay), 2000);
        let newest = |overlay: &Overlay, key: &str| overlay.document("alice", key).unwrap();
        assert_eq!(newest(&overlay, "pep"), Some(Some(vec![200; 1000].into())));
        // whatever has been carried over, the newest stays to the end
        for seq in [3, 100, 199] {
            overlay.drained(Position { journal: 0, seq });
            assert_eq!(newest(&overlay, "pep"), Some(Some(vec![200; 1000].into())));
        }
        overlay.drained(Position {
            journal: 0,
            seq: 201,
        });
        assert_eq!(newest(&overlay, "pep"), None);
    }

    #[test]
    fn what_sql_has_is_forgotten_in_pieces_and_marks_go_last() {
        let mut overlay = Overlay::new(Rc::new(|_, _| Ok(())));
        let at = |seq| Position { journal: 0, seq };
        let n = 2 * FORGET_AT_ONCE as u64 + 10;
        for seq in 1..=n {
            let name: Rc<str> = format!("user{seq}").into();
            overlay.add(at(seq), &name, Item::Done(seq));
        }
        overlay.add_gone(at(1), n);
        overlay.doubt(Id(n));
        overlay.drained(at(n - 5));
        assert_eq!(overlay.items(), n as usize - FORGET_AT_ONCE);
        assert!(overlay.is_behind() && overlay.is_doubtful(n) && !overlay.gone.is_empty());
        // told of more before that is done
        overlay.drained(at(n - 1));
        assert!(overlay.is_behind() && overlay.is_doubtful(n) && !overlay.gone.is_empty());
        overlay.forget_some();
        assert_eq!(overlay.items(), 1);
        assert!(!overlay.is_behind() && !overlay.is_doubtful(n) && overlay.gone.is_empty());
        assert_eq!(overlay.names().collect::<Vec<_>>(), [format!("user{n}")]);
    }
}
