//! The shard's end of its journal: one group after the other goes to be committed, and what has become durable comes back.
//!
//! Promise: a commit begins at once when there was none for a moment, and else as soon as the one before has ended, but not
//! more often than about once a millisecond unless much waits: few messages share few commits, many share each.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::time::{Duration, Instant};

use crate::observe::{HighWater, Stage, record};
use crate::store::journal::{Committed, Floors, State, Status, Writer};
use crate::xmpp::slice::Slice;

/// Between the begins of two commits. A message waits for two, one at each owner; three quarters of this made its p50 0.7
/// instead of 0.8 ms and its p99 no better.
const PACE: Duration = Duration::from_millis(1);
/// The same while much waits for the database: each group fills up whole blocks, and the disk is to last.
const PACE_WITH_BACKLOG: Duration = Duration::from_millis(4);
/// So much waits for the database that the disk is spared.
const BACKLOG_BYTES: u64 = 1 << 30;
/// So much does not wait for the pace.
const GROUP_BYTES: usize = 64 << 10;
/// The same, in acts.
const GROUP_ACTS: usize = 256;

pub struct Journal {
    shard: usize,
    writer: Writer,
    state: Arc<State>,
    floors: Floors,
    begun: Cell<Instant>,
    /// The file that groups go to; 0: not known yet.
    file: Cell<u32>,
    foreign: Arc<Foreign>,
    /// This shard holds nothing foreign open any more, and has said so.
    settled: Cell<bool>,
    /// The most acts that waited.
    pub waiting: HighWater,
}

/// What shards have taken over from others of an earlier start: until nobody holds anything of it open, no floor may rise,
/// for an id in it may be anybody's. Then the floors of shards that are no more are passed.
pub struct Foreign {
    /// Shards that may still hold something.
    pub left: std::sync::atomic::AtomicUsize,
    pub shards: usize,
}

impl Journal {
    pub fn new(shard: usize, writer: Writer, floors: Floors, foreign: Arc<Foreign>) -> Journal {
        Journal {
            shard,
            state: writer.state(),
            writer,
            floors,
            begun: Cell::new(Instant::now() - PACE_WITH_BACKLOG),
            file: Cell::new(0),
            foreign,
            settled: Cell::new(false),
            waiting: HighWater::default(),
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Hands over what waits, if it is time.
    pub fn hand_over(&self, slice: &mut Slice) {
        slice.journal_is_full(self.state.status() != Status::Open);
        self.waiting.saw(slice.ledger.waiting() as u64);
        self.tell_settled(slice);
        if slice.ledger.is_flying() || self.wait(slice).is_none_or(|wait| !wait.is_zero()) {
            return;
        }
        // acts without a change come to nothing but themselves, and may be followed by others
        while slice.ledger.waiting() > 0 || slice.ledger.due_ms(slice.now.ms).is_some() {
            match slice.seal() {
                Some(group) => {
                    self.begun.set(Instant::now());
                    return self.writer.submit(group);
                }
                None if slice.ledger.waiting() == 0 => return,
                None => {}
            }
        }
    }

    /// How long until the next group may go; `None`: nothing waits, or a group is on its way.
    pub fn wait(&self, slice: &Slice) -> Option<Duration> {
        if slice.ledger.is_flying() {
            return None;
        }
        let due_ms = slice.ledger.due_ms(slice.now.ms)?;
        let due = Duration::from_millis(due_ms.saturating_sub(slice.now.ms));
        if slice.ledger.bytes() >= GROUP_BYTES || slice.ledger.waiting() >= GROUP_ACTS {
            return Some(due);
        }
        let pace = match self.state.backlog_bytes() > BACKLOG_BYTES {
            true => PACE_WITH_BACKLOG,
            false => PACE,
        };
        Some(pace.saturating_sub(self.begun.get().elapsed()).max(due))
    }

    /// A group is durable.
    pub fn landed(&self, slice: &mut Slice, committed: Committed) {
        record(Stage::JournalCommit, committed.took.as_micros() as u64);
        slice.committed(Some(&committed.group), &|slot| committed.place(slot));
        let file = committed.file();
        if self.file.replace(file) != file {
            slice.new_segment();
        }
        slice.ledger.give_back(committed.group);
        self.tell_settled(slice);
        if self.foreign.left.load(Acquire) == 0 {
            self.floors[self.shard].store(slice.fx.floor, Release);
        }
    }

    fn tell_settled(&self, slice: &Slice) {
        if !slice.ledger.foreign_settled() || self.settled.replace(true) {
            return;
        }
        if self.foreign.left.fetch_sub(1, AcqRel) == 1 {
            for floor in &self.floors[self.foreign.shards..] {
                floor.store(u64::MAX, Release);
            }
        }
    }
}
