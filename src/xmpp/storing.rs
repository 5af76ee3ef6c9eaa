//! What is stored of a message between two: the one place that decides it.
//!
//! In: the facts of a message ([`Meta`], found where it entered), whose side of it is meant, and what that user wants
//! (XEP-0441). Out: the bits with which his owner journals it, and whether it is journalled at all.
//!
//! Whoever must be able to prove what was said (a legal hold) overrules the server in these places, and nowhere else:
//!
//! | place | decides |
//! |---|---|
//! | [`what`] | what is stored of a message between two, and in whose archive |
//! | [`kept`](super::room::message::kept) | the same of a message to a room |
//! | `may_purge` of [`store::sql::purge`](crate::store::sql::purge) | what goes by age: `archive.keep_days`, and `rooms.keep_days` for the rooms' domain |
//! | [`Op::RemoveUser`](super::slice::Op::RemoveUser) | an account goes with its archive |
//! | [`room::owner::end`](super::room::owner::end) | a room that is destroyed, or temporary, goes with its archive |
//!
//! Retraction and moderation ([`retract`](super::feature::retract)) take nothing away: they hide it from clients.

use super::jid::Jid;
use super::meta::{Kind, Meta};
use super::slice::Slice;
use crate::store::change::Message;

impl Meta {
    /// Must it survive until a client has it? RFC 6121 8.5, XEP-0160 section 3 and XEP-0334: chat and normal messages with a
    /// body or the hint; a normal one may carry anything (invitations, forms), a chat message without a body is chat states
    /// and markers.
    pub fn storable(self) -> bool {
        matches!(self.kind, Kind::Chat | Kind::Normal)
            && !self.has(Meta::COPY)
            && !self.has(Meta::NO_STORE)
            && (self.has(Meta::BODY)
                || self.has(Meta::STORE)
                || (self.kind == Kind::Normal && !self.has(Meta::LAZY)))
    }
}

/// Whose side of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Sender,
    Recipient,
    /// He has written to himself: it stands in his archive once.
    Both,
}

/// The bits of [`Message`] with which a user's owner journals his side of a message that is [`Meta::storable`]. `peer` is the
/// other side, as the stanza names it. A user who is not known yet is [`Message::UNDECIDED`], and [`wanted`] is asked when
/// he is.
pub fn what(slice: &Slice, user: &str, side: Side, peer: &str, meta: Meta) -> u8 {
    let mut what = match side {
        Side::Sender => Message::SENT,
        Side::Recipient => Message::RECEIVED | Message::PENDING,
        Side::Both => Message::SENT | Message::RECEIVED | Message::PENDING,
    };
    let known = slice.user(user).is_some();
    if !known && side != Side::Sender {
        what |= Message::UNDECIDED;
    }
    if may_be_archived(meta) && (!known || wanted(slice, user, peer)) {
        what |= Message::ARCHIVE;
    }
    what
}

/// Does the user want messages with this peer archived?
pub fn wanted(slice: &Slice, user: &str, peer: &str) -> bool {
    slice.user(user).is_none_or(|found| {
        let record = found.record.get();
        let shared = || Jid::parse(peer).is_ok_and(|peer| slice.together(user, &peer));
        record.archives(peer, shared)
    })
}

/// Does it belong into archives (XEP-0313 section 6, XEP-0334)?
fn may_be_archived(meta: Meta) -> bool {
    meta.storable()
        && (meta.has(Meta::BODY) || meta.has(Meta::STORE))
        && !meta.has(Meta::NO_ARCHIVE)
}
