//! The documents of a user's nodes: the index and the buckets of items (see the page of [`super`]).
//!
//! Layout of each: one version byte, then an rkyv archive that needs no alignment. Whoever reads bytes gets them checked.

use std::hash::Hasher;

use fnv::FnvHasher;
use rkyv::{Archive, Deserialize, Serialize, rancor};

use super::config::{Access, Config, SendLast};

/// The version byte of both kinds of document.
pub const VERSION: u8 = 1;

/// Key of the index.
pub const KEY: &str = crate::store::warm::INDEX_KEY;

/// An item of this size at most, with its id, lies in the index, if its node keeps one item only.
pub const INLINE_BYTES_MAX: usize = 1024;

/// How much a bucket is to hold; beyond it a node gets twice as many.
pub const BUCKET_BYTES: usize = 4096;

/// Buckets of a node.
pub const BUCKETS_MAX: u16 = 64;

/// The number of a node, and of its bucket.
pub type Bucket = (u16, u16);

/// All nodes of a user.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct Nodes {
    /// Sorted by name.
    pub nodes: Vec<Node>,
}

#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    /// Names its buckets.
    pub number: u16,
    /// How many there are, a power of two.
    pub buckets: u16,
    pub config: Config,
    /// Others than the owner, sorted by bare JID.
    pub affiliations: Vec<(String, Affiliation)>,
    /// Of all items, the inline one included.
    pub items: u32,
    /// Of ids and payloads.
    pub bytes: u64,
    /// Id of the newest item.
    pub last: Option<String>,
    pub inline: Option<Item>,
}

/// XEP-0060 section 4.1. Whoever is not named has none.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[rkyv(derive(Clone, Copy, PartialEq))]
#[repr(u8)]
pub enum Affiliation {
    /// Sees what is on a whitelist.
    Member,
    /// Sees nothing.
    Outcast,
}

#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub id: String,
    /// Grows with each publication, over all nodes: an [`Id`](crate::store::change::Id), so it tells the time as well.
    pub seq: u64,
    /// One element that stands alone; empty: none.
    pub payload: Vec<u8>,
}

impl Item {
    pub fn bytes(&self) -> usize {
        self.id.len() + self.payload.len()
    }
}

#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
struct Items {
    items: Vec<Item>,
}

/// The key of a bucket's document.
pub fn key((node, bucket): Bucket) -> String {
    format!("{KEY}:{node}:{bucket}")
}

impl Node {
    pub fn new(name: &str, number: u16, config: Config) -> Node {
        Node {
            name: name.to_owned(),
            number,
            buckets: 1,
            config,
            affiliations: Vec::new(),
            items: 0,
            bytes: 0,
            last: None,
            inline: None,
        }
    }

    pub fn bucket_of(&self, id: &str) -> Bucket {
        (self.number, bucket(id, self.buckets))
    }

    /// All that hold items.
    pub fn all_buckets(&self) -> Vec<Bucket> {
        if self.inline.is_some() || self.items == 0 {
            return Vec::new();
        }
        (0..self.buckets).map(|n| (self.number, n)).collect()
    }

    pub fn affiliation(&self, bare: &str) -> Option<Affiliation> {
        let at = self
            .affiliations
            .binary_search_by(|(jid, _)| jid.as_str().cmp(bare));
        at.ok().map(|at| self.affiliations[at].1)
    }
}

/// In which of so many buckets (a power of two) the item with this id lies.
fn bucket(id: &str, buckets: u16) -> u16 {
    let mut hash = FnvHasher::default();
    hash.write(id.as_bytes());
    // the low bits of FNV are weak for short keys
    let hash = hash.finish();
    let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48;
    mixed as u16 & buckets.saturating_sub(1)
}

impl ArchivedNode {
    pub fn bucket_of(&self, id: &str) -> Bucket {
        (
            self.number.to_native(),
            bucket(id, self.buckets.to_native()),
        )
    }

    /// Is its last item for those who come on line?
    pub fn greets(&self) -> bool {
        matches!(self.config.send_last, ArchivedSendLast::OnSubAndPresence) && self.items > 0
    }

    pub fn access(&self) -> Access {
        match self.config.access {
            ArchivedAccess::Open => Access::Open,
            ArchivedAccess::Presence => Access::Presence,
            ArchivedAccess::Roster => Access::Roster,
            ArchivedAccess::Whitelist => Access::Whitelist,
        }
    }
}

use super::config::{ArchivedAccess, ArchivedSendLast};

impl Nodes {
    pub fn position(&self, name: &str) -> Result<usize, usize> {
        self.nodes
            .binary_search_by(|node| node.name.as_str().cmp(name))
    }

    pub fn get(&self, name: &str) -> Option<&Node> {
        self.position(name).ok().map(|at| &self.nodes[at])
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut Node> {
        self.position(name).ok().map(|at| &mut self.nodes[at])
    }

    /// The smallest number that no node has.
    pub fn free_number(&self) -> u16 {
        (0..=u16::MAX)
            .find(|n| !self.nodes.iter().any(|node| node.number == *n))
            .unwrap_or(u16::MAX)
    }

    pub fn encode(&self) -> Vec<u8> {
        encode(|out| rkyv::api::high::to_bytes_in::<_, rancor::Error>(self, out))
    }

    /// No bytes: no nodes.
    pub fn decode(bytes: &[u8]) -> Result<Nodes, String> {
        if bytes.is_empty() {
            return Ok(Nodes::default());
        }
        let archived = rkyv::access::<ArchivedNodes, rancor::Error>(body(bytes)?);
        let archived = archived.map_err(|error| error.to_string())?;
        rkyv::deserialize::<Nodes, rancor::Error>(archived).map_err(|error| error.to_string())
    }
}

impl ArchivedNodes {
    /// The index, read in place. No bytes: `None`.
    pub fn access(bytes: &[u8]) -> Option<&ArchivedNodes> {
        if bytes.is_empty() {
            return None;
        }
        rkyv::access::<ArchivedNodes, rancor::Error>(body(bytes).ok()?).ok()
    }

    pub fn get(&self, name: &str) -> Option<&ArchivedNode> {
        let at = self
            .nodes
            .binary_search_by(|node| node.name.as_str().cmp(name))
            .ok()?;
        Some(&self.nodes[at])
    }
}

/// A bucket's document; no bytes when it is empty.
pub fn encode_items(items: Vec<Item>) -> Vec<u8> {
    if items.is_empty() {
        return Vec::new();
    }
    let items = Items { items };
    encode(|out| rkyv::api::high::to_bytes_in::<_, rancor::Error>(&items, out))
}

pub fn decode_items(bytes: &[u8]) -> Result<Vec<Item>, String> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let archived = rkyv::access::<ArchivedItems, rancor::Error>(body(bytes)?);
    let archived = archived.map_err(|error| error.to_string())?;
    let items = rkyv::deserialize::<Items, rancor::Error>(archived);
    items
        .map(|items| items.items)
        .map_err(|error| error.to_string())
}

fn encode(write: impl FnOnce(Vec<u8>) -> Result<Vec<u8>, rancor::Error>) -> Vec<u8> {
    write(vec![VERSION]).expect("writing to memory fails only beyond 2 GiB, far above every limit")
}

fn body(bytes: &[u8]) -> Result<&[u8], String> {
    match bytes.split_first() {
        Some((&VERSION, body)) => Ok(body),
        Some((found, _)) => Err(format!(
            "nodes of version {found} were written by another release, start that one"
        )),
        None => Err("the document is empty".into()),
    }
}

/// May somebody see the items of a node (XEP-0060 section 4.5)? `Err` says why not. The owner is not asked about.
pub fn may_see(
    access: Access,
    affiliation: Option<Affiliation>,
    subscribed: bool,
    in_group: impl FnOnce() -> bool,
) -> Result<(), crate::xmpp::error::StanzaError> {
    use super::refused;
    use crate::xmpp::error::StanzaError;
    const NOT_AUTHORIZED: StanzaError = StanzaError::NOT_AUTHORIZED;
    match (access, affiliation) {
        (_, Some(Affiliation::Outcast)) => Err(StanzaError::FORBIDDEN),
        (Access::Open, _) | (Access::Whitelist, Some(Affiliation::Member)) => Ok(()),
        (Access::Whitelist, None) => Err(StanzaError {
            kind: "cancel",
            ..refused(StanzaError::NOT_ALLOWED, "closed-node")
        }),
        (Access::Presence, _) if subscribed => Ok(()),
        (Access::Presence, _) => Err(refused(NOT_AUTHORIZED, "presence-subscription-required")),
        (Access::Roster, _) if subscribed && in_group() => Ok(()),
        (Access::Roster, _) => Err(refused(NOT_AUTHORIZED, "not-in-roster-group")),
    }
}

/// [`SendLast`] for whoever reads configurations as values.
pub fn greets(config: &Config) -> bool {
    config.send_last == SendLast::OnSubAndPresence
}
