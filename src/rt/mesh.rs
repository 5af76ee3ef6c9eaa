//! Between shards. In: batches for another shard. Out: the same batches there, in order. Promise: bounded, without
//! locks, wakes a sleeping shard, and never blocks the sender: a full channel gives the batch back.
//!
//! Not glommio's `shared_channel`: see `turn` for what its wake-ups can do. Here each pair and direction has a bounded
//! queue, and each shard one bell that a task of its live queue hears through the ring: a batch that arrives while the
//! shard is busy with log-ins preempts them.

use super::bell::{Bell, Ear};
use super::{Queue, spawn};
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Poll, Waker};

/// A shard's end before it is connected; may be sent to the shard's thread.
pub struct MeshEnd<T: Send + 'static> {
    senders: Vec<Option<Outgoing<T>>>,
    receivers: Vec<Option<Receiver<T>>>,
    bell: Arc<Bell>,
}

/// A shard's end of the channels to and from all other shards.
pub struct Mesh<T: Send + 'static> {
    senders: Vec<Option<Outgoing<T>>>,
    receivers: Vec<Option<MeshReceiver<T>>>,
}

/// What one other shard sends.
pub struct MeshReceiver<T: Send + 'static>(Rc<Incoming<T>>);

struct Outgoing<T> {
    queue: Option<Sender<T>>,
    bell: Arc<Bell>,
}

struct Incoming<T> {
    queue: Receiver<T>,
    waiting: RefCell<Option<Waker>>,
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
    /// Connects on the shard's own executor, whose live queue gets the task that hears the bell.
    pub fn connect(self) -> io::Result<Mesh<T>> {
        let ear = Ear::new(self.bell)?;
        let incoming: Vec<Option<Rc<Incoming<T>>>> = self
            .receivers
            .into_iter()
            .map(|queue| {
                queue.map(|queue| {
                    let waiting = RefCell::new(None);
                    Rc::new(Incoming { queue, waiting })
                })
            })
            .collect();
        let heard = incoming.iter().flatten().map(Rc::downgrade).collect();
        spawn(Queue::Live, hear(ear, heard));
        Ok(Mesh {
            senders: self.senders,
            receivers: incoming
                .into_iter()
                .map(|one| one.map(MeshReceiver))
                .collect(),
        })
    }
}

/// Wakes whoever waits for a channel in which there is something now. Ends when all receivers are gone.
async fn hear<T>(ear: Ear, mut channels: Vec<Weak<Incoming<T>>>) {
    while !channels.is_empty() {
        ear.hear().await;
        channels.retain(|channel| {
            let Some(channel) = channel.upgrade() else {
                return false;
            };
            // A waiter is woken although his queue is empty: it may have ended.
            if let Some(waiting) = channel.waiting.take() {
                waiting.wake();
            }
            true
        });
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

    /// Takes the receiving end for what `shard` sends, for the one task that will read it; `None` for this shard's own
    /// index and when it was taken already.
    pub fn receiver(&mut self, shard: usize) -> Option<MeshReceiver<T>> {
        self.receivers.get_mut(shard)?.take()
    }
}

impl<T: Send + 'static> MeshReceiver<T> {
    /// The next value in order, or `None` when that shard has ended and everything was received.
    pub async fn recv(&self) -> Option<T> {
        poll_fn(|cx| match self.0.queue.try_recv() {
            Ok(value) => Poll::Ready(Some(value)),
            Err(TryRecvError::Disconnected) => Poll::Ready(None),
            Err(TryRecvError::Empty) => {
                self.0.waiting.replace(Some(cx.waker().clone()));
                Poll::Pending
            }
        })
        .await
    }

    /// The next value if one is there: to take all of a burst without giving the turn away.
    pub fn try_recv(&self) -> Option<T> {
        self.0.queue.try_recv().ok()
    }
}

impl<T> Drop for Outgoing<T> {
    fn drop(&mut self) {
        // First the end of the channel, then the bell: the other shard must find it ended.
        drop(self.queue.take());
        self.bell.ring();
    }
}
