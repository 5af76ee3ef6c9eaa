//! Between shards. In: batches for another shard. Out: the same batches there, in order. Promise: bounded, without
//! locks, wakes a sleeping shard, and never blocks the sender: a full channel gives the batch back.
//!
//! Not glommio's `shared_channel`: see `turn` for what its wake-ups can do. Here each pair and direction has a bounded
//! queue, and each shard one bell in its readiness set.

use super::bell::Bell;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A shard's end before it is connected; may be sent to the shard's thread.
pub struct MeshEnd<T: Send + 'static> {
    senders: Vec<Option<Outgoing<T>>>,
    receivers: Vec<Option<Receiver<T>>>,
    bell: Arc<Bell>,
}

/// A shard's end of the channels to and from all other shards: add it to the shard's [`Readiness`](super::Readiness) and
/// [`receive`](Self::receive) when reported.
pub struct Mesh<T: Send + 'static> {
    senders: Vec<Option<Outgoing<T>>>,
    receivers: Vec<Option<Receiver<T>>>,
    bell: Arc<Bell>,
}

struct Outgoing<T> {
    queue: Option<Sender<T>>,
    bell: Arc<Bell>,
}

/// Makes a full mesh between `n` shards: end `i` is for shard `i`. Each direction of each pair holds at most
/// `capacity` values; a value should be a batch, since each may cost a wake-up.
pub fn mesh<T: Send + 'static>(n: usize, capacity: usize) -> io::Result<Vec<MeshEnd<T>>> {
    let mut ends = Vec::with_capacity(n);
    for _ in 0..n {
        ends.push(MeshEnd {
            senders: (0..n).map(|_| None).collect(),
            receivers: (0..n).map(|_| None).collect(),
            bell: Arc::new(Bell::new()?),
        });
    }
    for from in 0..n {
        for to in (0..n).filter(|to| *to != from) {
            let (sender, receiver) = bounded(capacity.max(1));
            ends[from].senders[to] = Some(Outgoing {
                queue: Some(sender),
                bell: ends[to].bell.clone(),
            });
            ends[to].receivers[from] = Some(receiver);
        }
    }
    Ok(ends)
}

impl<T: Send + 'static> MeshEnd<T> {
    /// On the shard that it is for.
    pub fn connect(self) -> Mesh<T> {
        Mesh {
            senders: self.senders,
            receivers: self.receivers,
            bell: self.bell,
        }
    }
}

impl<T: Send + 'static> Mesh<T> {
    /// How many shards there are, this one included.
    pub fn shards(&self) -> usize {
        self.senders.len()
    }

    /// Puts `value` into the channel to `shard` and wakes it. Gives it back when the channel is full, when that shard
    /// has ended, and for this shard's own index, which has no channel.
    pub fn try_send(&self, shard: usize, value: T) -> Result<(), T> {
        let Some(Some(Outgoing {
            queue: Some(queue),
            bell,
        })) = self.senders.get(shard)
        else {
            return Err(value);
        };
        queue
            .try_send(value)
            .map_err(|refused| refused.into_inner())?;
        bell.ring();
        Ok(())
    }

    /// Appends what has arrived to `into`, in order for each sender, at most `most` values; returns how many. If more is
    /// there, the readiness set reports the mesh again.
    pub fn receive(&self, into: &mut Vec<T>, most: usize) -> usize {
        // In this order: a bell rung after it was stilled is for a value that this look may miss.
        self.bell.still_if_rung();
        let before = into.len();
        for queue in self.receivers.iter().flatten() {
            let room = most - (into.len() - before);
            into.extend(queue.try_iter().take(room));
        }
        let taken = into.len() - before;
        if taken == most {
            self.bell.ring();
        }
        taken
    }
}

impl<T: Send + 'static> AsFd for Mesh<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl<T> Drop for Outgoing<T> {
    fn drop(&mut self) {
        // First the end of the channel, then the bell: the other shard must find it ended.
        drop(self.queue.take());
        self.bell.ring();
    }
}
