//! The seam between a shard and what lies behind its cache and its journal: the Redis ring and SQL.
//!
//! In: batches of [`Request`] from a shard. Out: batches of [`Answer`] to the same shard, in any order, matched by name
//! or ticket. Everything here is a plain value that may go to another thread. Changes do not pass here: they go into the
//! journal, and from there into SQL ([`super::drain`]). Promises:
//!
//! - every request is answered exactly once (loads of one name that wait together share a query, not an answer);
//! - an answer is one consistent view of SQL: all changes up to some position of each journal, and none behind it.
//!
//! Names are prepared bare local parts (RFC 7622): compared byte by byte.

use super::record::Record;

/// Chosen by the asking shard, given back in the answer.
pub type Ticket = u64;

/// What a shard asks.
#[derive(Debug, Clone)]
pub enum Request {
    /// All that a login needs, in one round trip. Answered by [`Answer::Loaded`] or [`Answer::LoadFailed`].
    Load { name: Box<str> },
    /// Answered by the variant of [`Answer`] with the same name.
    Read { ticket: Ticket, query: Query },
}

/// What is seldom needed and so not part of [`Loaded`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Query {
    Document {
        name: Box<str>,
        key: Box<str>,
    },
    Archive(ArchiveQuery),
    /// Retractions of entries that are named by ids with one of these keys ([`Retraction::key`]); each once, ascending.
    Retractions {
        name: Box<str>,
        keys: Box<[i64]>,
    },
    /// All chat rooms, page by page: up to `most` behind the row `after`.
    Rooms {
        after: u64,
        most: u32,
    },
}

/// A page of a user's archive (XEP-0313, XEP-0059). All bounds hold together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ArchiveQuery {
    pub name: Box<str>,
    /// Only messages with this JID; a bare one matches all its resources.
    pub with: Option<Box<str>>,
    /// Accepted at or after, at or before, unix milliseconds.
    pub start_ms: Option<u64>,
    pub end_ms: Option<u64>,
    /// Exclusive bounds of the filter (`after-id`, `before-id` of XEP-0313 4.1.3).
    pub after_id: Option<u64>,
    pub before_id: Option<u64>,
    /// Exactly these (`ids`); empty: any.
    pub ids: Vec<u64>,
    /// The page: up to `most` messages behind `after` (exclusive), or, if `backwards`, the last `most` before `before`.
    pub after: Option<u64>,
    pub before: Option<u64>,
    pub backwards: bool,
    pub most: u32,
    /// Is [`Page::count`] wanted?
    pub count: bool,
}

/// What a shard gets back.
#[derive(Debug, Clone)]
pub enum Answer {
    /// `None`: there is no such user.
    Loaded {
        name: Box<str>,
        user: Option<Loaded>,
    },
    /// Nobody knows whether there is such a user: the tier cannot be reached, or the record cannot be read.
    LoadFailed { name: Box<str>, error: String },
    /// `None`: no such document or no such user.
    Document {
        ticket: Ticket,
        result: Result<Option<Box<[u8]>>, ReadError>,
    },
    Archive {
        ticket: Ticket,
        result: Result<Page, ReadError>,
    },
    Retractions {
        ticket: Ticket,
        result: Result<Vec<Retraction>, ReadError>,
    },
    /// Empty: there are no more.
    Rooms {
        ticket: Ticket,
        result: Result<Vec<StoredRoom>, ReadError>,
    },
}

/// A chat room as SQL has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRoom {
    /// Its row: ascending, never used twice.
    pub number: u64,
    /// `NAME@rooms`.
    pub name: Box<str>,
    /// `None`: it cannot be read.
    pub record: Option<Record>,
    /// The document that says who has made it; empty: there is none.
    pub maker: Box<str>,
}

/// All that a login needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    pub record: Record,
    /// Of the record.
    pub revision: u64,
    /// Pending deliveries, ids ascending.
    pub pending: Vec<Pending>,
    pub last: Option<Last>,
    /// The document [`INDEX_KEY`](super::warm::INDEX_KEY), empty if there is none. `None`: it was not asked for.
    pub index: Option<Box<[u8]>>,
}

/// A message that waits for one of the user's clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub id: u64,
    /// As in [`super::change::Message`].
    pub what: u8,
    pub kind: u8,
    pub flags: u16,
    pub stanza: Box<[u8]>,
}

/// XEP-0012.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Last {
    /// Unix seconds.
    pub at: u64,
    /// Text of the last unavailable presence; may be empty.
    pub status: Box<str>,
}

/// A page of an archive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// Ids ascending, whichever way the page was sought.
    pub entries: Vec<Entry>,
    /// Nothing that matches lies beyond the page in the direction of the search.
    pub complete: bool,
    /// Messages that match, the page's bounds left aside.
    pub count: Option<u64>,
    /// How many of them lie before the first entry.
    pub index: Option<u64>,
    /// An `after`, `before`, `after_id`, `before_id` or one of `ids` is in no archive of this user: XEP-0059's
    /// item-not-found. The shard knows better where the journal still has it.
    pub missing: Vec<u64>,
    /// The highest id of this owner that SQL has, whatever matches; 0: none. What the journal has beyond it is not here.
    pub last_id: u64,
    /// Something in this archive was retracted: [`Query::Retractions`] tells whether it is on the page.
    pub retracted: bool,
}

/// A [`Retract`](super::change::Retract), with what it needs to be told from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retraction {
    pub id: u64,
    pub side: u8,
    pub peer: Box<str>,
    pub target: Box<str>,
    pub tombstone: Box<[u8]>,
}

impl Retraction {
    /// What the target's id is looked up by: FNV-1a. It need not be unique, for the id itself is compared.
    pub fn key(target: &str) -> i64 {
        let mut hasher = fnv::FnvHasher::default();
        std::hash::Hasher::write(&mut hasher, target.as_bytes());
        std::hash::Hasher::finish(&hasher) as i64
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub id: u64,
    pub what: u8,
    pub kind: u8,
    pub flags: u16,
    pub peer: Box<str>,
    pub stanza: Box<[u8]>,
}

/// The tier cannot be reached: nothing is known about what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the database is not available: {0}")]
pub struct ReadError(pub String);

impl Query {
    /// The user who is asked about.
    pub fn name(&self) -> &str {
        match self {
            Query::Document { name, .. } | Query::Retractions { name, .. } => name,
            Query::Archive(query) => &query.name,
            // about all
            Query::Rooms { .. } => "",
        }
    }
}
