//! What travels between shards: batches of stanzas and connections that move to their owner.
//!
//! Every shard drains what comes in, whatever the state of its ways out, so two shards that flood each other go on. A full
//! way keeps what is to go (counted); meanwhile the shard reads nothing from its clients. Beyond a bound in bytes the slice
//! refuses stanzas for that shard.

use std::collections::VecDeque;

use super::http::MovedRequest;
use super::login::{Knock, Moved};
use crate::observe::{HighWater, Stage, Stamp, record};
use crate::rt::Mesh;
use crate::xmpp::batch::{Batch, Item};

/// One mesh message.
pub enum Parcel {
    Batch(Batch),
    /// A connection comes to its user's owner.
    Moved(Box<Moved>),
    /// A connection that was only accepted comes to a shard where fewer wait.
    Knock(Box<Knock>),
    /// A request, with its connection, comes to the shard that keeps its session.
    Request(Box<MovedRequest>),
}

impl Parcel {
    fn bytes(&self) -> usize {
        match self {
            Parcel::Batch(batch) => batch.len() + batch.items.len() * size_of::<Item>(),
            Parcel::Moved(_) => size_of::<Moved>(),
            Parcel::Knock(_) => size_of::<Knock>(),
            Parcel::Request(request) => size_of::<MovedRequest>() + request.body.len(),
        }
    }
}

/// A parcel, and since when it is on its way.
pub struct Sent {
    parcel: Parcel,
    at: Stamp,
}

/// Parcels taken in one turn; more stay for the next.
const PARCELS_MAX: usize = 256;

/// The ways to all shards.
pub struct Ways {
    mesh: Mesh<Sent>,
    kept: Vec<VecDeque<Sent>>,
    kept_count: usize,
    kept_bytes: Vec<usize>,
    received: Vec<Sent>,
    /// The most parcels that were kept.
    pub kept_most: HighWater,
    /// How often a way was full.
    pub full: u64,
    pub sent: u64,
}

impl Ways {
    pub fn new(mesh: Mesh<Sent>) -> Ways {
        let kept: Vec<_> = (0..mesh.shards()).map(|_| VecDeque::new()).collect();
        Ways {
            mesh,
            kept_bytes: vec![0; kept.len()],
            kept,
            kept_count: 0,
            received: Vec::new(),
            kept_most: HighWater::default(),
            full: 0,
            sent: 0,
        }
    }

    /// What the readiness set watches.
    pub fn mesh(&self) -> &Mesh<Sent> {
        &self.mesh
    }

    /// What has come from other shards, a bounded number of parcels, at this moment.
    pub fn receive(&mut self, into: &mut Vec<Parcel>, now_us: u64) {
        self.mesh.receive(&mut self.received, PARCELS_MAX);
        for Sent { parcel, at } in self.received.drain(..) {
            record(Stage::MeshQueue, at.until(now_us));
            into.push(parcel);
        }
    }

    /// Sends a parcel at this moment, behind those that are kept for the same shard.
    pub fn send(&mut self, shard: usize, parcel: Parcel, now_us: u64) {
        self.sent += 1;
        let at = Stamp::at(now_us);
        let sent = Sent { parcel, at };
        let sent = match self.kept[shard].is_empty() {
            true => match self.mesh.try_send(shard, sent) {
                Ok(()) => return,
                Err(back) => back,
            },
            false => sent,
        };
        self.kept_bytes[shard] += sent.parcel.bytes();
        self.kept[shard].push_back(sent);
        self.full += 1;
        self.kept_count += 1;
        self.kept_most.saw(self.kept_count as u64);
    }

    /// Tries again what is kept.
    pub fn retry(&mut self) {
        if self.kept_count == 0 {
            return;
        }
        for (shard, kept) in self.kept.iter_mut().enumerate() {
            while let Some(sent) = kept.pop_front() {
                let bytes = sent.parcel.bytes();
                if let Err(back) = self.mesh.try_send(shard, sent) {
                    kept.push_front(back);
                    break;
                }
                self.kept_count -= 1;
                self.kept_bytes[shard] -= bytes;
            }
        }
    }

    /// Bytes that wait for one shard.
    pub fn kept_bytes(&self, shard: usize) -> usize {
        self.kept_bytes[shard]
    }

    /// Is a way full? Then no client is read.
    pub fn congested(&self) -> bool {
        self.kept_count > 0
    }
}
