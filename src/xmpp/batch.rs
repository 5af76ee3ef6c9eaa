//! What one shard tells another: a batch of items over one shared byte arena, collected during a turn of the loop and sent
//! as one mesh message. An item names its strings by [`Span`], so a chat message to another core costs one copy and no
//! allocation beyond the batch's own growth.

use super::component::{ConnId, Word};
use super::meta::Meta;
use super::session::SessionId;

/// A range of [`Batch::bytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    start: u32,
    len: u32,
}

/// Names an inbound stanza whose acceptance somebody else decides: session on shard, and the stanza's number in its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub shard: u16,
    pub session: SessionId,
    /// XEP-0198 count of the stanza, modulo 2^32.
    pub seq: u32,
    /// The sender's record of it in his owner's journal; 0: none.
    pub twin: u64,
}

#[derive(Debug)]
pub enum Item {
    /// A stanza for one local address (bare or full), or for one of a component that is connected there. `receipt`: the sender waits for its fate.
    Stanza {
        to: Span,
        from: Span,
        stanza: Span,
        meta: Meta,
        receipt: Option<Receipt>,
    },
    /// Presence of full JID `from` for many users (local parts, each ended by a line feed), `to` not yet stamped.
    Presence {
        from: Span,
        stanza: Span,
        meta: Meta,
        names: Span,
    },
    /// Who of these users (local parts, each ended by a line feed) is online, asks full JID `from`.
    Probe { from: Span, names: Span },
    /// A notification (XEP-0163) of a node of bare JID `from` for many users (local parts, separated by line feeds), `to` not yet
    /// stamped: for those of their resources that want to hear of the node.
    Event {
        from: Span,
        node: Span,
        stanza: Span,
        names: Span,
    },
    /// Full JID `from` has come and wants to hear of these nodes (each followed by a line feed) of these users (local parts,
    /// separated by line feeds).
    Interest {
        from: Span,
        wants: Span,
        names: Span,
    },
    /// A stanza of a chat room, without `to`, for these of its occupants (full JIDs, each ended by a line feed).
    Room { stanza: Span, meta: Meta, to: Span },
    /// What there is to know of a room, for the list of rooms that each shard has: its title and who has made it, empty if it is
    /// not shown or does not last. `found`: the first shard has read it in the database (see [`super::room::directory`]).
    Listing {
        name: Span,
        listed: Span,
        maker: Span,
        found: bool,
    },
    /// Presence of full JID `from` for those with whom he shares a group, `to` not yet stamped; not for those in `except` (local
    /// parts, each ended by a line feed). `probe`: he asks for theirs.
    Group {
        from: Span,
        stanza: Span,
        meta: Meta,
        except: Span,
        probe: bool,
    },
    /// The fate of a stanza is decided: durable, delivered or refused.
    Settled(Receipt),
    /// A shard has new groups of an administrator's: how often that was so.
    Regrouped { shard: u16, times: u64 },
    /// About a connection for the name of a component.
    Component {
        host: Span,
        conn: ConnId,
        word: Word,
    },
}

/// Strings in one buffer, named by [`Span`].
#[derive(Debug, Default)]
pub struct Spans {
    bytes: Vec<u8>,
}

/// One mesh message.
#[derive(Debug, Default)]
pub struct Batch {
    strings: Spans,
    pub items: Vec<Item>,
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Adds [`Item::Stanza`].
    pub fn stanza(
        &mut self,
        to: &str,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) {
        let item = Item::Stanza {
            to: self.put(to.as_bytes()),
            from: self.put(from.as_bytes()),
            stanza: self.put(stanza),
            meta,
            receipt,
        };
        self.items.push(item);
    }
}

impl std::ops::Deref for Batch {
    type Target = Spans;

    fn deref(&self) -> &Spans {
        &self.strings
    }
}

impl std::ops::DerefMut for Batch {
    fn deref_mut(&mut self) -> &mut Spans {
        &mut self.strings
    }
}

impl Spans {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    pub fn put(&mut self, bytes: &[u8]) -> Span {
        let start = self.bytes.len() as u32;
        self.bytes.extend_from_slice(bytes);
        Span {
            start,
            len: bytes.len() as u32,
        }
    }

    /// Opens a span that grows until [`Batch::close`].
    pub fn open(&self) -> u32 {
        self.bytes.len() as u32
    }

    pub fn close(&self, start: u32) -> Span {
        Span {
            start,
            len: self.bytes.len() as u32 - start,
        }
    }

    pub fn get(&self, span: Span) -> &[u8] {
        &self.bytes[span.start as usize..(span.start + span.len) as usize]
    }

    pub fn text(&self, span: Span) -> &str {
        std::str::from_utf8(self.get(span)).expect("a sender puts whole strings")
    }
}
