//! A journal's figures, for its shard and the metrics.
//!
//! In: what committer, keeper and drain have done. Out: numbers that any thread may read at any time, without a lock.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::Duration;

/// May new messages be accepted? What completes accepted ones, and changes of records, may always be appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Open,
    /// More waits for the database than `backlog_bytes_max`.
    BacklogFull,
    /// No new segment can be made; what is left is for completions.
    DiskFull,
}

/// The figures; all but those of the moment only grow.
#[derive(Debug, Default)]
pub struct State {
    committed_seq: AtomicU64,
    drained_seq: AtomicU64,
    backlog_bytes: AtomicU64,
    segments: AtomicUsize,
    spares: AtomicUsize,
    commits: AtomicU64,
    records: AtomicU64,
    bytes: AtomicU64,
    commit_us_last: AtomicU64,
    commit_us_max: AtomicU64,
    commit_us_sum: AtomicU64,
    backlog_full: AtomicBool,
    no_room: AtomicBool,
}

impl State {
    pub fn status(&self) -> Status {
        match (self.no_room.load(Relaxed), self.backlog_full.load(Relaxed)) {
            (true, _) => Status::DiskFull,
            (_, true) => Status::BacklogFull,
            _ => Status::Open,
        }
    }

    /// The last durable record; 0: none.
    pub fn committed_seq(&self) -> u64 {
        self.committed_seq.load(Acquire)
    }

    /// The last record that is in SQL; 0: none.
    pub fn drained_seq(&self) -> u64 {
        self.drained_seq.load(Acquire)
    }

    /// What is durable here and not in SQL, at most 1/64 of a segment too much.
    pub fn backlog_bytes(&self) -> u64 {
        self.backlog_bytes.load(Relaxed)
    }

    /// Files that hold records.
    pub fn segments(&self) -> usize {
        self.segments.load(Relaxed)
    }

    /// Files that wait to be written.
    pub fn spares(&self) -> usize {
        self.spares.load(Relaxed)
    }

    /// Since the start: groups, their records, and their bytes before they were filled up to whole blocks.
    pub fn commits(&self) -> u64 {
        self.commits.load(Relaxed)
    }

    pub fn records(&self) -> u64 {
        self.records.load(Relaxed)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Microseconds from submission to durability: of the last commit, the highest, and of all together.
    pub fn commit_us_last(&self) -> u64 {
        self.commit_us_last.load(Relaxed)
    }

    pub fn commit_us_max(&self) -> u64 {
        self.commit_us_max.load(Relaxed)
    }

    pub fn commit_us_sum(&self) -> u64 {
        self.commit_us_sum.load(Relaxed)
    }

    pub(super) fn committed(&self, seq: u64) {
        self.committed_seq.fetch_max(seq, Release);
    }

    /// The highest that was said so far.
    pub(super) fn drained(&self, seq: u64) -> u64 {
        self.drained_seq.fetch_max(seq, Release).max(seq)
    }

    pub(super) fn took(&self, took: Duration, records: u32, bytes: usize) {
        let us = took.as_micros() as u64;
        self.commits.fetch_add(1, Relaxed);
        self.records.fetch_add(u64::from(records), Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
        self.commit_us_last.store(us, Relaxed);
        self.commit_us_max.fetch_max(us, Relaxed);
        self.commit_us_sum.fetch_add(us, Relaxed);
    }

    pub(super) fn set_figures(&self, backlog_bytes: u64, segments: usize, spares: usize) {
        self.backlog_bytes.store(backlog_bytes, Relaxed);
        self.segments.store(segments, Relaxed);
        self.spares.store(spares, Relaxed);
    }

    /// What it was before.
    pub(super) fn set_backlog_full(&self, full: bool) -> bool {
        self.backlog_full.swap(full, Relaxed)
    }

    /// What it was before.
    pub(super) fn set_no_room(&self, no_room: bool) -> bool {
        self.no_room.swap(no_room, Relaxed)
    }
}
