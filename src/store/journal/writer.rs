//! The threads of a journal: thin shells around [`super::segments`].
//!
//! In: groups from a shard; what the drain has done. Out: `on_commit`, on the committer's thread; spares. Promise: a
//! shard never waits for the disk, a commit waits for nothing but its own write and sync.
//!
//! A committer for each journal does blocking writes and `fdatasync`. Not the shard's own ring: the shard naps in
//! `epoll`, where nobody looks at the ring, so a commit would be noticed late. One keeper for all journals makes spares
//! and recycles, so that filling a new segment with zeros delays no commit.

use std::cell::Cell;
use std::mem;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use super::group::{Committed, Group};
use super::segments::{Appender, CommitError, Journal, Kept, SPARES_WANTED};
use super::state::State;
use crate::rt;

/// After which what failed for want of room is tried again, and floors are looked at.
const PAUSE: Duration = Duration::from_secs(1);

/// How far the thread that makes spares steps back behind the shards.
const KEEPER_NICE: i32 = 5;

/// A shard's end of its journal. Dropping it waits for the group that is under way.
pub struct Writer {
    groups: Option<Sender<(Group, Instant)>>,
    next_seq: Cell<u64>,
    shared: Arc<Shared>,
    journal: Arc<Journal>,
    thread: Option<JoinHandle<()>>,
    _keeper: Arc<Keeper>,
}

#[derive(Default)]
struct Shared {
    in_flight: AtomicBool,
    stop: AtomicBool,
}

impl Writer {
    pub(super) fn start(
        journal: Arc<Journal>,
        appender: Appender,
        next_seq: u64,
        keeper: Arc<Keeper>,
        on_commit: Box<dyn Fn(Committed) + Send>,
    ) -> Writer {
        let (groups, intake) = crossbeam_channel::bounded(1);
        let shared = Arc::new(Shared::default());
        let committer = Committer {
            appender,
            journal: journal.clone(),
            shared: shared.clone(),
            bell: keeper.bell.clone(),
            on_commit,
        };
        let thread = std::thread::Builder::new()
            .name(format!("journal-{}", journal.shard))
            .spawn(move || committer.run(&intake))
            .expect("the system gives a thread at start");
        Writer {
            groups: Some(groups),
            next_seq: Cell::new(next_seq),
            shared,
            journal,
            thread: Some(thread),
            _keeper: keeper,
        }
    }

    /// The number of the first record of the next group to be submitted.
    pub fn next_seq(&self) -> u64 {
        self.next_seq.get()
    }

    /// Hands a group to the committer. Never waits.
    ///
    /// # Panics
    /// If the group before is still under way, if this one is empty, or does not begin with [`Writer::next_seq`].
    pub fn submit(&self, group: Group) {
        assert!(!group.is_empty(), "a group holds something");
        assert_eq!(
            group.first_seq(),
            self.next_seq.get(),
            "nothing is left out"
        );
        let busy = self.shared.in_flight.swap(true, Relaxed);
        assert!(!busy, "one group is in flight at a time");
        self.next_seq.set(group.next_seq());
        let groups = self.groups.as_ref().expect("taken only when dropped");
        let sent = groups.try_send((group, Instant::now()));
        sent.expect("the committer lives as long as the writer and has nothing to do");
    }

    /// Whether a group is under way.
    pub fn is_busy(&self) -> bool {
        self.shared.in_flight.load(Acquire)
    }

    pub fn state(&self) -> Arc<State> {
        self.journal.state.clone()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Release);
        self.groups = None;
        self.journal.wake();
        if let Some(thread) = self.thread.take() {
            // a thread that panicked has told its own story
            let _ = thread.join();
        }
    }
}

struct Committer {
    appender: Appender,
    journal: Arc<Journal>,
    shared: Arc<Shared>,
    bell: Arc<Bell>,
    on_commit: Box<dyn Fn(Committed) + Send>,
}

impl Committer {
    fn run(mut self, groups: &Receiver<(Group, Instant)>) {
        rt::be_prompt();
        while let Ok((mut group, submitted)) = groups.recv() {
            while let Err(why) = self.appender.commit(&mut group) {
                let stops = self.shared.stop.load(Acquire);
                match why {
                    CommitError::Disk(why) => self.journal.disk.die(&why.to_string()),
                    // a server that stops has not acknowledged it
                    CommitError::NoSpare | CommitError::NoRoom(_) if stops => return,
                    CommitError::NoSpare => {
                        self.bell.ring();
                        self.journal.wait_for_spare(PAUSE);
                    }
                    CommitError::NoRoom(why) => {
                        self.journal.lacks_room(&why);
                        self.journal.wait(PAUSE);
                    }
                }
            }
            if self.journal.state.spares() < SPARES_WANTED {
                self.bell.ring();
            }
            let took = submitted.elapsed();
            self.journal
                .state
                .took(took, group.records(), group.bytes());
            self.journal.progressed();
            self.shared.in_flight.store(false, Release);
            (self.on_commit)(Committed { group, took });
        }
    }
}

/// The thread that tidies up, for all journals of a folder; ends with the last of them.
#[derive(Default)]
pub(super) struct Keeper {
    bell: Arc<Bell>,
    journals: Arc<Mutex<Vec<Arc<Journal>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Wakes the keeper.
#[derive(Default)]
struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Default)]
struct BellState {
    rung: bool,
    stop: bool,
}

impl Keeper {
    pub fn add(&self, journal: Arc<Journal>) {
        lock(&self.journals).push(journal);
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            let (bell, journals) = (self.bell.clone(), self.journals.clone());
            let spawned = std::thread::Builder::new()
                .name("journal-keeper".into())
                .spawn(move || keep(&bell, &journals));
            *thread = Some(spawned.expect("the system gives a thread at start"));
        }
        self.ring();
    }

    pub fn ring(&self) {
        self.bell.ring();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        lock(&self.bell.state).stop = true;
        self.ring();
        if let Some(thread) = lock(&self.thread).take() {
            // a thread that panicked has told its own story
            let _ = thread.join();
        }
    }
}

impl Bell {
    fn ring(&self) {
        lock(&self.state).rung = true;
        self.rung.notify_one();
    }

    /// Waits for a ring, or at most `most`; `false`: stop.
    fn wait(&self, most: Option<Duration>) -> bool {
        let waits = |state: &mut BellState| !state.rung && !state.stop;
        let state = lock(&self.state);
        let mut state = match most {
            Some(most) => {
                let waited = self.rung.wait_timeout_while(state, most, waits);
                waited.expect("a thread that panics ends the process").0
            }
            None => {
                let waited = self.rung.wait_while(state, waits);
                waited.expect("a thread that panics ends the process")
            }
        };
        state.rung = false;
        !state.stop
    }
}

fn keep(bell: &Bell, journals: &Mutex<Vec<Arc<Journal>>>) {
    // zeros for a new segment are as much as a second of commits
    rt::step_back(KEEPER_NICE);
    let mut again = None;
    while bell.wait(again) {
        again = None;
        let mut left = mem::take(&mut *lock(journals));
        for journal in &left {
            let waits = loop {
                match journal.keep() {
                    Ok(Kept::Worked) if lock(&bell.state).stop => return,
                    Ok(Kept::Worked) => {}
                    Ok(Kept::Idle) => break journal.is_waiting_for_floors(),
                    Ok(Kept::NoRoom) => break true,
                    Err(why) => journal.disk.die(&why.to_string()),
                }
            };
            if waits {
                again = Some(PAUSE);
            }
        }
        left.retain(|journal| !journal.is_gone());
        lock(journals).append(&mut left);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a thread that panics ends the process")
}
