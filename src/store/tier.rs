//! The seam between a shard and what lies behind its cache: today SQL, later the Redis ring and then SQL.
//!
//! In: batches of [`Request`] from a shard. Out: batches of [`Answer`] to the same shard, in any order, matched by name
//! or ticket. Everything here is a plain value that may go to another thread. Promises:
//!
//! - every request is answered exactly once (loads of one name that wait together share a query, not an answer);
//! - writes of one shard are applied in the order they were sent;
//! - a `Load` or `Read` sees every earlier `Write` of the same name by the same shard;
//! - `Written` with `Ok` means durable.
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
    /// Answered by [`Answer::Written`].
    Write { ticket: Ticket, op: Op },
    /// Answered by [`Answer::Read`] or [`Answer::ReadLast`].
    Read { ticket: Ticket, query: Query },
}

/// A change. All but `AddUser` fail with [`WriteError::Missing`] if there is no such user.
#[derive(Debug, Clone)]
pub enum Op {
    /// Fails with [`WriteError::Conflict`] if the user exists.
    AddUser {
        name: Box<str>,
        record: Record,
    },
    PutUser {
        name: Box<str>,
        record: Record,
    },
    /// The account with its offline messages, documents and last activity.
    RemoveUser {
        name: Box<str>,
    },
    /// `id` ascends for each user and is at most `i64::MAX`; the same id twice is kept once (the first).
    PutOffline {
        name: Box<str>,
        id: u64,
        stanza: Box<[u8]>,
    },
    /// Drops the user's offline messages with `id <= up_to`.
    DropOffline {
        name: Box<str>,
        up_to: u64,
    },
    /// `key` is "vcard", "private:NAMESPACE NAME", ...; `None` removes.
    PutDocument {
        name: Box<str>,
        key: Box<str>,
        value: Option<Box<[u8]>>,
    },
    /// XEP-0012: unix seconds of the last log-out, and the status it came with.
    PutLast {
        name: Box<str>,
        at: u64,
        status: Box<str>,
    },
}

/// What is seldom needed and so not part of [`Loaded`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Query {
    /// Answered by [`Answer::Read`].
    Document { name: Box<str>, key: Box<str> },
    /// Answered by [`Answer::ReadLast`], for users who are not in the cache.
    Last { name: Box<str> },
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
    Written {
        ticket: Ticket,
        result: Result<(), WriteError>,
    },
    /// `None`: no such document or no such user.
    Read {
        ticket: Ticket,
        result: Result<Option<Box<[u8]>>, ReadError>,
    },
    /// `None`: never logged out, or no such user.
    ReadLast {
        ticket: Ticket,
        result: Result<Option<Last>, ReadError>,
    },
}

/// All that a login needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    pub record: Record,
    /// Offline messages (id, stanza), ids ascending.
    pub offline: Vec<(u64, Box<[u8]>)>,
    pub last: Option<Last>,
}

/// XEP-0012.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Last {
    /// Unix seconds.
    pub at: u64,
    /// Text of the last unavailable presence; may be empty.
    pub status: Box<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("the user exists already")]
    Conflict,
    #[error("there is no such user")]
    Missing,
    #[error("the database has no space left")]
    Full,
    #[error("the database is not available: {0}")]
    Unavailable(String),
}

/// The tier cannot be reached: nothing is known about what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the database is not available: {0}")]
pub struct ReadError(pub String);

impl Op {
    /// The user whom the change concerns.
    pub fn name(&self) -> &str {
        match self {
            Op::AddUser { name, .. }
            | Op::PutUser { name, .. }
            | Op::RemoveUser { name }
            | Op::PutOffline { name, .. }
            | Op::DropOffline { name, .. }
            | Op::PutDocument { name, .. }
            | Op::PutLast { name, .. } => name,
        }
    }
}

impl Query {
    /// The user who is asked about.
    pub fn name(&self) -> &str {
        match self {
            Query::Document { name, .. } | Query::Last { name } => name,
        }
    }
}
