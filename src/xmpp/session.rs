//! A live session: one bound resource (full JID). A small value in the slice's slab, not a task. What it has to say is
//! collected in [`Session::out`] and written once per turn of the loop; what stream management must keep is kept in `sm`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;

use slab::Slab;
use smallvec::SmallVec;

use super::accept::Acceptance;
use super::feature::caps;
use super::feature::csi::Csi;
use super::feature::sm::{Kept, Sm};
use super::meta::Meta;
use super::pace::Paced;
use super::room::occupants::Bucket;
use crate::observe::Stamp;
use crate::xml::StreamNs;

/// Slot and generation: a slot is reused, its generation never is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId {
    pub slot: u32,
    pub generation: u32,
}

impl SessionId {
    /// Of no session.
    pub const NONE: SessionId = SessionId {
        slot: u32::MAX,
        generation: 0,
    };
}

/// The last available presence of a session.
#[derive(Debug)]
pub struct Presence {
    /// -128..=127, RFC 6121 4.7.2.3.
    pub priority: i8,
    /// The stanza as it goes to others: `from` stamped, no `to`.
    pub stanza: Box<[u8]>,
}

pub struct Session {
    pub id: SessionId,
    /// Local part of the user.
    pub user: Rc<str>,
    /// Full JID.
    pub jid: Box<str>,
    /// `xml:lang` of the stream header.
    pub lang: Option<Box<str>>,
    /// Namespaces of the stream header.
    pub stream_ns: Rc<StreamNs>,
    /// Bytes for the client, written at the end of the turn.
    pub out: Vec<u8>,
    /// Bytes which the kernel has not taken yet; the shard keeps it up to date.
    pub unsent: usize,
    /// Bytes and stanzas that the server itself sent at once (offline messages, what a resumption repeats): they do not count
    /// against a client, however fast it reads.
    pub burst: (usize, usize),
    /// The connection, by a handle of the shard's; `None`: cut off and able to resume.
    pub link: Option<u64>,
    /// Waits in [`super::slice::Effects::dirty`].
    pub dirty: bool,
    /// Stands in [`super::slice::Effects::fanned`].
    pub fanned: bool,
    /// Asked for the roster: gets roster pushes (RFC 6121 2.1.6).
    pub interested: bool,
    /// XEP-0280 enabled.
    pub carbons: bool,
    /// XEP-0191 block list was asked for: gets block pushes.
    pub blocklist: bool,
    pub presence: Option<Box<Presence>>,
    /// XEP-0115: what its client wants to hear of, once that is known; shared by all with the same.
    pub caps: Option<Rc<caps::Entity>>,
    /// Those who got directed presence (RFC 6121 4.6.3) and will get the unavailable presence.
    pub directed: SmallVec<[Box<str>; 0]>,
    /// Bare JIDs of the chat rooms that it is in, or about to be: they learn it when it goes.
    pub rooms: SmallVec<[Box<str>; 0]>,
    /// Of its presence for rooms.
    pub rooms_rate: Bucket,
    pub csi: Csi,
    /// Presence of others that waits for a turn with room.
    pub paced: Option<Box<Paced>>,
    pub sm: Option<Box<Sm>>,
    pub accept: Acceptance,
    /// A client that wants to resume waits until all that was read is decided.
    pub settling: bool,
    /// Without stream management: messages that its peer may not have yet.
    pub unconfirmed: Option<Box<Kept>>,
    /// When the last bytes of the client came, ms of the monotonic clock.
    pub heard_ms: u64,
    /// A ping is on its way since then.
    pub pinged: bool,
    /// When it was bound, until its first available presence.
    pub bound: Option<Stamp>,
    /// Connected since, unix seconds.
    pub since: u64,
    /// Remote address, for operators.
    pub peer: Box<str>,
    /// Is its connection encrypted?
    pub tls: bool,
}

impl Session {
    /// Bare JID, the part of the full JID before the slash.
    pub fn bare(&self) -> &str {
        let slash = self.jid.find('/').expect("a session's JID is full");
        &self.jid[..slash]
    }

    pub fn resource(&self) -> &str {
        let slash = self.jid.find('/').expect("a session's JID is full");
        &self.jid[slash + 1..]
    }

    /// The line in the log that says that the connection of the session ended, and why. Whatever a client may have chosen is
    /// quoted and comes behind the address.
    pub(super) fn log_end(&self, reason: &str, resumable: bool) {
        let address = self.peer.parse::<SocketAddr>().map(|peer| peer.ip());
        tracing::info!(
            address = %address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            user = self.bare(),
            resource = self.resource(),
            reason,
            resumable,
            "disconnected"
        );
    }

    /// RFC 6121 8.5: may a message to the bare JID go here?
    pub fn takes_bare(&self) -> bool {
        self.presence.as_ref().is_some_and(|p| p.priority >= 0)
    }

    /// Appends one stanza (in parts) to what the client gets. Counted and kept by stream management.
    /// `id`: of a pending delivery, or 0.
    pub(super) fn push(&mut self, parts: &[&[u8]], meta: Meta, id: u64) {
        match &mut self.sm {
            Some(sm) => sm.sent(parts, meta, id),
            None if id != 0 => self
                .unconfirmed
                .get_or_insert_default()
                .push(parts, meta, id),
            None => {}
        }
        if self.link.is_some() {
            for part in parts {
                self.out.extend_from_slice(part);
            }
        }
    }
}

/// The slice's sessions.
#[derive(Default)]
pub struct Sessions {
    slab: Slab<Session>,
    generation: u32,
}

impl Sessions {
    pub fn insert(&mut self, make: impl FnOnce(SessionId) -> Session) -> SessionId {
        self.generation = self.generation.wrapping_add(1);
        let entry = self.slab.vacant_entry();
        let id = SessionId {
            slot: entry.key() as u32,
            generation: self.generation,
        };
        entry.insert(make(id));
        id
    }

    pub fn get(&self, id: SessionId) -> Option<&Session> {
        self.slab.get(id.slot as usize).filter(|s| s.id == id)
    }

    pub fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.slab.get_mut(id.slot as usize).filter(|s| s.id == id)
    }

    pub fn remove(&mut self, id: SessionId) -> Option<Session> {
        self.get(id)?;
        Some(self.slab.remove(id.slot as usize))
    }

    pub fn len(&self) -> usize {
        self.slab.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Session> {
        self.slab.iter().map(|(_, s)| s)
    }

    pub fn ids(&self) -> Vec<SessionId> {
        self.iter().map(|s| s.id).collect()
    }
}
