//! What travels between shards: batches of stanzas and connections that move to their owner.
//!
//! Every shard drains what comes in, whatever the state of its ways out, so two shards that flood each other go on. A full
//! way keeps what is to go (counted); meanwhile the shard reads nothing from its clients, so what is kept is bounded by
//! what other shards and answers of the tiers may still cause.

use std::collections::VecDeque;

use super::login::Moved;
use crate::rt::Mesh;
use crate::xmpp::batch::Batch;

/// One mesh message.
pub enum Parcel {
    Batch(Batch),
    /// A connection comes to its user's owner.
    Moved(Box<Moved>),
}

/// Parcels taken in one turn; more stay for the next.
const PARCELS_MAX: usize = 256;

/// The ways to all shards.
pub struct Ways {
    mesh: Mesh<Parcel>,
    kept: Vec<VecDeque<Parcel>>,
    kept_count: usize,
    /// How often a way was full.
    pub full: u64,
    pub sent: u64,
}

impl Ways {
    pub fn new(mesh: Mesh<Parcel>) -> Ways {
        let kept = (0..mesh.shards()).map(|_| VecDeque::new()).collect();
        Ways {
            mesh,
            kept,
            kept_count: 0,
            full: 0,
            sent: 0,
        }
    }

    /// What the readiness set watches.
    pub fn mesh(&self) -> &Mesh<Parcel> {
        &self.mesh
    }

    /// What has come from other shards, a bounded number of parcels.
    pub fn receive(&self, into: &mut Vec<Parcel>) {
        self.mesh.receive(into, PARCELS_MAX);
    }

    /// Sends a parcel, behind those that are kept for the same shard.
    pub fn send(&mut self, shard: usize, parcel: Parcel) {
        self.sent += 1;
        if self.kept[shard].is_empty() {
            match self.mesh.try_send(shard, parcel) {
                Ok(()) => return,
                Err(back) => self.kept[shard].push_back(back),
            }
        } else {
            self.kept[shard].push_back(parcel);
        }
        self.full += 1;
        self.kept_count += 1;
    }

    /// Tries again what is kept.
    pub fn retry(&mut self) {
        if self.kept_count == 0 {
            return;
        }
        for (shard, kept) in self.kept.iter_mut().enumerate() {
            while let Some(parcel) = kept.pop_front() {
                if let Err(back) = self.mesh.try_send(shard, parcel) {
                    kept.push_front(back);
                    break;
                }
                self.kept_count -= 1;
            }
        }
    }

    /// Is a way full? Then no client is read.
    pub fn congested(&self) -> bool {
        self.kept_count > 0
    }
}
