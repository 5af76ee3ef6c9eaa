//! Waking a shard, and what it runs. In: rings from any thread. Out: a descriptor that polls readable, or a task of the
//! live queue that runs at once. Promise: no ring is lost, and however often a bell is rung before it is heard, only the
//! first ring is a system call.

use glommio::net::UnixStream;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{AcqRel, Acquire},
};
use std::time::Duration;

/// A pair of unix sockets rather than an eventfd: a receive is the only wait that glommio puts into its latency ring.
pub(super) struct Bell {
    rope: OwnedFd,
    sound: OwnedFd,
    /// Rung and not yet heard.
    rung: AtomicBool,
}

/// The shard's side of a bell that preempts.
pub(super) struct Ear {
    bell: Arc<Bell>,
    sound: UnixStream,
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        // Blocking: io_uring would not wait on a nonblocking one. Our own calls say DONTWAIT.
        let (rope, sound) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let rung = AtomicBool::new(false);
        Ok(Self { rope, sound, rung })
    }

    /// Ring *after* the thing to look at is in its place.
    pub(super) fn ring(&self) {
        if !self.rung.swap(true, AcqRel) {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            // Only EAGAIN is possible, when it sounds already.
            let _ = rustix::net::send(&self.rope, &[1], flags);
        }
    }

    /// Call it *before* looking: a ring during or after it makes the descriptor readable again.
    pub(super) fn still(&self) {
        // In this order: a ring between the two is swallowed by neither, it leaves the descriptor readable.
        let _ = rustix::net::recv(&self.sound, &mut [0u8; 8][..], RecvFlags::DONTWAIT);
        self.rung.swap(false, AcqRel);
    }
}

impl Bell {
    /// The same for whoever watches by an edge-triggered set and looks without having been told: one load if nobody has
    /// rung. A byte that comes late stays until the next ring, which is a new edge.
    pub(super) fn still_if_rung(&self) {
        if self.rung.load(Acquire) {
            self.still();
        }
    }
}

impl AsFd for Bell {
    /// Becomes readable when the bell is rung.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sound.as_fd()
    }
}

impl Ear {
    /// On the shard that is to hear.
    pub(super) fn new(bell: Arc<Bell>) -> io::Result<Self> {
        let raw = bell.sound.try_clone()?.into_raw_fd();
        // SAFETY: the duplicate was just given up by its owner; the stream becomes the only one.
        let sound = unsafe { UnixStream::from_raw_fd(raw) };
        Ok(Self { bell, sound })
    }

    /// Waits for a ring and stills the bell. While this waits, a ring preempts the other queues of the shard: it
    /// completes in the latency ring, and as it always wakes this task, it cannot put the executor to sleep (see `turn`).
    pub(super) async fn hear(&self) {
        if self.sound.peek(&mut [0u8; 1]).await.is_err() {
            // No memory in the kernel, perhaps: late is better than spinning.
            super::sleep(Duration::from_millis(5)).await;
        }
        self.bell.still();
    }
}
