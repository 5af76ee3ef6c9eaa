//! Into a shard from foreign threads (SQL lane, administration, password hashing). In: values from any OS thread.
//! Out: the same values on the shard, woken through its readiness set. Promise: bounded; only the foreign thread ever
//! waits, and never past its deadline.

use super::bell::Bell;
use crossbeam_channel::{Receiver, SendTimeoutError, Sender, TrySendError, bounded};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// The foreign side; clone it for every thread.
pub struct InboxSender<T> {
    queue: Sender<T>,
    bell: Arc<Bell>,
}

/// The shard's side: add it to the shard's [`Readiness`](super::Readiness) and [`drain`](Self::drain) when reported.
pub struct Inbox<T> {
    queue: Receiver<T>,
    capacity: usize,
    bell: Arc<Bell>,
}

/// Why a value could not be sent; it comes back.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError<T> {
    /// The shard did not make room in time.
    #[error("the shard's inbox is full")]
    Full(T),
    /// The shard has ended.
    #[error("the shard has ended")]
    Closed(T),
}

/// An inbox for at most `capacity` values.
pub fn inbox<T: Send>(capacity: usize) -> io::Result<(InboxSender<T>, Inbox<T>)> {
    let bell = Arc::new(Bell::new()?);
    let (sender, receiver) = bounded(capacity.max(1));
    Ok((
        InboxSender {
            queue: sender,
            bell: bell.clone(),
        },
        Inbox {
            queue: receiver,
            capacity: capacity.max(1),
            bell,
        },
    ))
}

impl<T> Clone for InboxSender<T> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            bell: self.bell.clone(),
        }
    }
}

impl<T> InboxSender<T> {
    /// Sends `value`, blocking this thread for up to `patience` while the inbox is full. Never call it on a shard.
    pub fn send(&self, value: T, patience: Duration) -> Result<(), SendError<T>> {
        let sent = self.queue.send_timeout(value, patience);
        sent.map_err(|error| match error {
            SendTimeoutError::Timeout(value) => SendError::Full(value),
            SendTimeoutError::Disconnected(value) => SendError::Closed(value),
        })?;
        self.bell.ring();
        Ok(())
    }

    /// Sends `value` if there is room; never waits.
    pub fn try_send(&self, value: T) -> Result<(), SendError<T>> {
        let sent = self.queue.try_send(value);
        sent.map_err(|error| match error {
            TrySendError::Full(value) => SendError::Full(value),
            TrySendError::Disconnected(value) => SendError::Closed(value),
        })?;
        self.bell.ring();
        Ok(())
    }
}

impl<T> Inbox<T> {
    /// Appends what has arrived to `into`, at most one capacity's worth; returns how many. If more arrived meanwhile,
    /// the readiness set reports the inbox again.
    pub fn drain(&self, into: &mut Vec<T>) -> usize {
        self.bell.still_if_rung();
        let before = into.len();
        into.extend(self.queue.try_iter().take(self.capacity));
        let drained = into.len() - before;
        if drained == self.capacity {
            self.bell.ring();
        }
        drained
    }
}

impl<T> AsFd for Inbox<T> {
    /// Becomes readable when something arrives.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
