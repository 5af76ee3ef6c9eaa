//! How far SQL may have the journals, where there is a ring: never further than the ring has answered.
//!
//! In: from each shard, up to where its journal is answered for; that what the last start left is. Out: the limit of each
//! journal, and a wake-up of the drain when it grows. Promise: until every shard has told the ring what the last start
//! left, whichever journal it stands in, nothing is drained.

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;

use crate::store::drain::Source;

/// Shared by the shards and the drain.
pub struct Hold {
    /// Shards that have not told all of what the last start left.
    starting: AtomicUsize,
    /// By shard.
    drainable: Vec<AtomicU64>,
    drain: OnceLock<Arc<Notify>>,
}

impl Hold {
    pub fn new(shards: usize) -> Hold {
        Hold {
            starting: AtomicUsize::new(shards),
            drainable: (0..shards).map(|_| AtomicU64::new(0)).collect(),
            drain: OnceLock::new(),
        }
    }

    /// A shard has told everything that the last start left. Called once by each.
    pub fn has_started(&self) {
        if self.starting.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.wake();
        }
    }

    /// The ring has answered for everything in the shard's journal up to `seq`; it never falls.
    pub fn drainable(&self, shard: usize, seq: u64) {
        let before = self.drainable[shard].fetch_max(seq, Ordering::AcqRel);
        if before < seq {
            self.wake();
        }
    }

    fn limit(&self, journal: u16, committed: u64) -> u64 {
        if self.starting.load(Ordering::Acquire) > 0 {
            return 0;
        }
        match self.drainable.get(usize::from(journal)) {
            Some(seq) => committed.min(seq.load(Ordering::Acquire)),
            // of a shard that is no more: it does not grow
            None => committed,
        }
    }

    fn wake(&self) {
        if let Some(drain) = self.drain.get() {
            drain.notify_one();
        }
    }
}

/// A journal that waits for the ring.
pub struct Held<S> {
    pub journal: S,
    pub hold: Arc<Hold>,
}

impl<S: Source> Source for Held<S> {
    fn journal(&self) -> u16 {
        self.journal.journal()
    }

    fn identity(&self) -> u64 {
        self.journal.identity()
    }

    fn read(
        &mut self,
        wanted: RangeInclusive<u64>,
        bytes_max: usize,
        bytes: &mut Vec<u8>,
        records: &mut Vec<(u64, Range<usize>)>,
    ) -> Result<(), String> {
        self.journal.read(wanted, bytes_max, bytes, records)
    }

    fn limit(&self) -> u64 {
        self.hold
            .limit(self.journal.journal(), self.journal.limit())
    }

    fn drained(&self, seq: u64) {
        self.journal.drained(seq);
    }

    fn wake(&self, waker: Arc<Notify>) {
        // the drain has one for all of its journals
        let _ = self.hold.drain.set(waker.clone());
        self.journal.wake(waker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_drained_before_every_shard_has_told_what_the_last_start_left() {
        let hold = Hold::new(2);
        hold.drainable(0, 9);
        hold.has_started();
        assert_eq!((hold.limit(0, 20), hold.limit(7, 20)), (0, 0));
        hold.has_started();
        assert_eq!(
            (hold.limit(0, 20), hold.limit(1, 20), hold.limit(7, 20)),
            (9, 0, 20)
        );
        hold.drainable(0, 4);
        assert_eq!((hold.limit(0, 20), hold.limit(0, 5)), (9, 5));
    }
}
