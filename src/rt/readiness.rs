//! Sockets by readiness. In: descriptors with a token each. Out: per turn, which of them may be read, written or are
//! closing. Promise: one wait of the shard covers all its sockets, and an idle socket costs the shard nothing.
//!
//! The set is edge-triggered: a socket is reported once per change, so whoever leaves bytes unread (a used-up read
//! budget) or unsent must remember it himself. Put slot *and* generation into the token: slots and descriptors are
//! reused within one harvested batch.

use futures_io::AsyncRead;
use glommio::net::UnixStream;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::time::Duration;

/// Events taken from the kernel by one [`Readiness::harvest`]; more stay for the next.
const HARVEST_EVENTS_MAX: usize = 256;

/// One shard's set of sockets. Not for other threads: it is waited for through the shard's ring.
pub struct Readiness {
    epoll: OwnedFd,
}

/// What became true for one descriptor since it was last reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// As given to [`Readiness::add`].
    pub token: u64,
    /// Bytes, an end of stream or an error can be read.
    pub readable: bool,
    /// The send buffer has room again, or an error waits.
    pub writable: bool,
    /// The peer will send no more, or the connection is broken; what it sent before may still be read.
    pub closed: bool,
}

impl Readiness {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
        })
    }

    /// Adds `fd` (it stays the caller's, who removes it before he gives it away). What is already true is reported.
    pub fn add(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let all = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), all)?)
    }

    /// Watches `fd`, which may be in the set already, under this token from now on. What is true now is reported.
    pub fn rename(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let all = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        match epoll::modify(&self.epoll, &fd, EventData::new_u64(token), all) {
            Err(rustix::io::Errno::NOENT) => self.add(fd, token),
            changed => Ok(changed?),
        }
    }

    /// Takes `fd` out. Closing the last descriptor of a socket does the same; one that moves to another core is
    /// removed here first. An `fd` that is not in the set is ignored. Events already harvested for it stay harvested.
    pub fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits until [`harvest`](Self::harvest) has something to give; the shard sleeps in its ring meanwhile. May
    /// return early, never late.
    pub async fn wait(&self) {
        wait_readable(self.epoll.as_fd()).await;
    }

    /// Appends at most 256 ready descriptors to `events`, without waiting; returns how many. 0: time to
    /// [`wait`](Self::wait).
    pub fn harvest(&self, events: &mut Vec<Ready>) -> io::Result<usize> {
        self.harvest_within(events, Duration::ZERO)
    }

    /// The same, but the whole thread sleeps for up to `most` if nothing is ready: for a loop that knows that no other
    /// task is runnable ([`others_runnable`](super::others_runnable)). One system call for sleeping and harvesting.
    pub fn nap(&self, events: &mut Vec<Ready>, most: Duration) -> io::Result<usize> {
        let taken = self.harvest_within(events, most);
        super::turn::slept();
        taken
    }

    fn harvest_within(&self, events: &mut Vec<Ready>, most: Duration) -> io::Result<usize> {
        let mut batch = [const { std::mem::MaybeUninit::<Event>::uninit() }; HARVEST_EVENTS_MAX];
        let most = Timespec {
            tv_sec: 0,
            tv_nsec: most.as_nanos().min(999_999_999) as i64,
        };
        let batch = match epoll::wait(&self.epoll, &mut batch[..], Some(&most)) {
            Ok((batch, _)) => batch,
            Err(rustix::io::Errno::INTR) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        events.extend(batch.iter().map(|event| {
            // Copied out: the kernel's struct is packed.
            let (flags, data) = (event.flags, event.data);
            let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
            Ready {
                token: data.u64(),
                readable: broken || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                writable: broken || flags.contains(EventFlags::OUT),
                closed: broken || flags.contains(EventFlags::RDHUP),
            }
        }));
        Ok(batch.len())
    }
}

/// Waits through the shard's ring until `fd`, an epoll set, polls readable.
///
/// glommio has no public call for this. But its streams arm a poll in the ring as soon as they are made, and when the
/// poll has completed they try to receive; on an epoll descriptor that fails with ENOTSOCK, which is the moment waited
/// for. A stream stays failed, so each wait makes a new one, from a duplicate because the stream closes what it owns.
/// A failing `dup` (no descriptor left) falls back to a short timer, so that a full table of descriptors delays the
/// shard but does not stop it.
async fn wait_readable(fd: BorrowedFd<'_>) {
    let Ok(duplicate) = fd.try_clone_to_owned() else {
        return super::sleep(std::time::Duration::from_millis(5)).await;
    };
    let raw: RawFd = duplicate.into_raw_fd();
    // SAFETY: `raw` was just given up by its owner; the stream becomes the only one.
    let mut stream = unsafe { UnixStream::from_raw_fd(raw) };
    let mut unused = [0u8; 1];
    let _ = poll_fn(|cx| Pin::new(&mut stream).poll_read(cx, &mut unused)).await;
}
