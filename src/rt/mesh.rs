//! Between shards. In: batches for another shard. Out: the same batches there, in order. Promise: bounded, without
//! locks, wakes a sleeping shard, and never blocks the sender: a full channel gives the batch back.

use glommio::channels::shared_channel::{
    ConnectedReceiver, ConnectedSender, SharedReceiver, SharedSender, new_bounded,
};
use glommio::{GlommioError, ResourceType};

/// A shard's end before it is connected; may be sent to the shard's thread.
pub struct MeshEnd<T: Send + 'static> {
    peers: Vec<Option<Pair<T>>>,
    shard: usize,
}

type Pair<T> = (SharedSender<T>, SharedReceiver<T>);

/// A shard's end of the channels to and from all other shards.
pub struct Mesh<T: Send + 'static> {
    senders: Vec<Option<ConnectedSender<T>>>,
    receivers: Vec<Option<MeshReceiver<T>>>,
}

/// What one other shard sends.
pub struct MeshReceiver<T: Send + 'static>(ConnectedReceiver<T>);

/// Makes a full mesh between `n` shards: end `i` is for shard `i`. Each direction of each pair holds at most
/// `capacity` values; a value should be a batch (measured: 32 items a value are 30 times cheaper than one).
pub fn mesh<T: Send + 'static>(n: usize, capacity: usize) -> Vec<MeshEnd<T>> {
    let mut ends: Vec<MeshEnd<T>> = (0..n)
        .map(|shard| MeshEnd {
            peers: (0..n).map(|_| None).collect(),
            shard,
        })
        .collect();
    for low in 0..n {
        for high in low + 1..n {
            let (up, from_low) = new_bounded(capacity);
            let (down, from_high) = new_bounded(capacity);
            ends[low].peers[high] = Some((up, from_high));
            ends[high].peers[low] = Some((down, from_low));
        }
    }
    ends
}

impl<T: Send + 'static> MeshEnd<T> {
    /// Connects on the shard's own executor. Completes when all shards have called it.
    ///
    /// Connecting a channel waits for its other end, so all shards must go through the channels they share in one
    /// order: ascending pairs, and within a pair the channel that leads upwards first. Else two would wait for ever.
    pub async fn connect(self) -> Mesh<T> {
        let mut mesh = Mesh {
            senders: Vec::new(),
            receivers: Vec::new(),
        };
        for (peer, pair) in self.peers.into_iter().enumerate() {
            let (sender, receiver) = match pair {
                None => (None, None),
                Some((sender, receiver)) if self.shard < peer => {
                    let sender = sender.connect().await;
                    (Some(sender), Some(receiver.connect().await))
                }
                Some((sender, receiver)) => {
                    let receiver = receiver.connect().await;
                    (Some(sender.connect().await), Some(receiver))
                }
            };
            mesh.senders.push(sender);
            mesh.receivers.push(receiver.map(MeshReceiver));
        }
        mesh
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
        let Some(Some(sender)) = self.senders.get(shard) else {
            return Err(value);
        };
        sender.try_send(value).map_err(|error| match error {
            GlommioError::Closed(ResourceType::Channel(value))
            | GlommioError::WouldBlock(ResourceType::Channel(value)) => value,
            other => unreachable!("a channel is full or closed, not {other}"),
        })
    }

    /// Takes the receiving end for what `shard` sends, for the one task that will read it; `None` for this shard's own
    /// index and when it was taken already.
    pub fn receiver(&mut self, shard: usize) -> Option<MeshReceiver<T>> {
        self.receivers.get_mut(shard)?.take()
    }
}

impl<T: Send + 'static> MeshReceiver<T> {
    /// The next value in order, or `None` when that shard has ended and everything was received. For a task that
    /// waits for nothing else: every wait that is given up leaves its waker behind until the next value.
    pub async fn recv(&self) -> Option<T> {
        self.0.recv().await
    }
}
