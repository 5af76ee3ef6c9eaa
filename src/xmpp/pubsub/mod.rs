//! Publish-subscribe (XEP-0060), the part that an account needs for itself: nodes with items, access models, configuration,
//! and what is told of changes. No socket, no slice: whoever drives it reads and writes documents and sends what it gives.
//!
//! In: the documents of a user, and [`edit::Op`]s. Out: documents to be written, [`event::Event`]s to be told when they are
//! durable, or one error for all. Promise: ops are made together or not at all, and nothing that is stored grows beyond
//! [`edit::Bounds`].
//!
//! **What is one document.** A node with all its items in one would be simplest, but XEP-0490 publishes an item for each
//! conversation, again and again: with 200 conversations (30 KB) each read chat would write 30 KB into the journal. An item a
//! document would leave a row in SQL for each id that a client makes up, for ever (a removed document keeps its row: its
//! revision must outlive the drain), and a list of items would need another kind of read. So:
//!
//! - the *index* (key `pep`): all nodes of a user with their configuration, affiliations and counts, and the item of those
//!   that keep one item of [`nodes::INLINE_BYTES_MAX`] at most (mood, nickname, avatar metadata, device list). That is what is
//!   needed when a contact comes on line, in one read. Ten nodes, six of them with an inline item of 200 bytes, make an index of
//!   2.5 KB;
//! - *buckets* (keys `pep:NODE:BUCKET`, both numbers): the other items, spread by a hash of their ids over 1, 2, 4 … 64 buckets, so
//!   that one holds about [`nodes::BUCKET_BYTES`]. A published item writes its bucket and the index.
//!
//! So a displayed marker among 200 writes 7 KB in the mean instead of 30 (`what_a_publication_writes_is_bounded` holds the bound), a mood
//! or an avatar's metadata the index only. Numbers of nodes are used again, so the rows of a user are bounded too.

pub mod config;
pub mod edit;
pub mod event;
pub mod nodes;

use super::error::StanzaError;

pub const NS: &str = "http://jabber.org/protocol/pubsub";
pub const NS_OWNER: &str = "http://jabber.org/protocol/pubsub#owner";
pub const NS_EVENT: &str = "http://jabber.org/protocol/pubsub#event";
pub const NS_ERRORS: &str = "http://jabber.org/protocol/pubsub#errors";

/// A feature of XEP-0060 that is not there.
pub const fn unsupported(feature: &'static str) -> StanzaError {
    StanzaError::FEATURE_NOT_IMPLEMENTED
        .detail("unsupported", NS_ERRORS)
        .feature(feature)
}

/// An error of XEP-0060: a condition with its more precise one.
pub const fn refused(condition: StanzaError, detail: &'static str) -> StanzaError {
    condition.detail(detail, NS_ERRORS)
}
