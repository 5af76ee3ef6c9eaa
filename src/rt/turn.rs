//! Whose turn it is on a shard. In: tasks as they run. Out: the moment when a queue has run long enough and the others
//! and the kernel must be looked at. Promise: nobody waits behind a busy queue much longer than [`SLICE`], and a shard
//! never sleeps on a task that could run.
//!
//! glommio has a preempt timer for this, and it is the better idea, but in 0.9.0 (the newest on crates.io) it may not
//! be short: whenever it fires between glommio's look at the rings and its first look at the queues, for example because
//! the kernel ran another thread there, the executor takes "preempted" for "nothing to do" and sleeps with runnable
//! tasks until something else wakes it. With 200 us on a contended core that stopped eleven of twelve runs of a test
//! (fixed upstream by glommio pull request 53, unreleased). So its timer is set far off, and time is kept here: every
//! task is wrapped and looks at the clock, and a bell rung at the end of a slice is heard through the latency ring,
//! where it preempts like any other event of live traffic, and always with a task to wake.
//!
//! A bell costs six system calls, and it is only needed for what comes through the rings (timers, files): what wakes the
//! live queue otherwise needs no more than that the turn is passed. So it is rung at most every [`LOOK`], and in between the
//! end of a slice only passes the turn to the next queue.
//!
//! There are two bells, because one that was heard counts again only after its task has run and the executor has then
//! looked at the rings. The second is rung only when the first is on its way back, so that one is always armed.
//!
//! The live loop sleeps in its readiness set (one system call, which also brings the events), not in glommio's ring (about
//! twenty), as long as something comes every millisecond. It may do so only when no other task is runnable, which glommio
//! does not tell; so wake-ups are counted here ([`others_runnable`]).
//!
//! The same mistake is possible with the wake-ups of glommio's own channels and of wakers moved to other threads, so
//! neither is used: [`mesh`](super::mesh) and [`inbox`](super::inbox) ring bells that the readiness set reports. [`heartbeat`] bounds what is left.

use super::Queue;
use super::bell::{Bell, Ear};
use glommio::executor;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// How long a queue may run before the others are looked at.
const SLICE: Duration = Duration::from_micros(200);
/// How often a busy shard looks at its rings, if nothing in them preempts: timers are late by as much.
const LOOK: Duration = Duration::from_millis(1);
/// A pause longer than this between two tasks means that the executor has looked at the kernel or slept.
const PAUSE: Duration = Duration::from_micros(20);
/// Nothing known waits for it: see [`heartbeat`].
const HEARTBEAT: Duration = Duration::from_millis(500);

struct Turn {
    began: Cell<Option<Instant>>,
    ended: Cell<Option<Instant>>,
    bells: RefCell<Option<[Arc<Bell>; 2]>>,
    /// The one to ring next; armed.
    next: Cell<usize>,
    /// Whether the other one is on its way back.
    other_returns: Cell<bool>,
    /// When one was rung last.
    rung: Cell<Option<Instant>>,
    /// Something more urgent came, and no other queue has given way to it yet.
    preempted: Cell<bool>,
}

thread_local! {
    static TURN: Turn = const {
        Turn { began: Cell::new(None), ended: Cell::new(None), bells: RefCell::new(None),
            next: Cell::new(0), other_returns: Cell::new(true), rung: Cell::new(None),
            preempted: Cell::new(false) }
    };
}

/// Prepares this thread for [`paced`] tasks and returns the tasks that hear the bells, for the live queue. The bells are
/// armed when the executor has next looked at the rings.
pub(super) fn set_up() -> io::Result<[impl Future<Output = ()> + 'static; 2]> {
    let bells = [Arc::new(Bell::new()?), Arc::new(Bell::new()?)];
    let ears = [Ear::new(bells[0].clone())?, Ear::new(bells[1].clone())?];
    TURN.with(|turn| {
        turn.bells.replace(Some(bells));
        turn.began.set(None);
        turn.ended.set(None);
        turn.next.set(0);
        turn.other_returns.set(true);
        turn.rung.set(None);
    });
    Ok(ears.map(hear))
}

async fn hear(ear: Ear) {
    loop {
        ear.hear().await;
        TURN.with(|turn| turn.other_returns.set(true));
    }
}

/// Wakes the shard twice a second. What sleeps by mistake (see above: a shard stopped for seconds between two
/// instructions, a completed blocking call) then costs half a second, not a session.
pub(super) async fn heartbeat() {
    loop {
        super::sleep(HEARTBEAT).await;
    }
}

/// `future`, ending the slice when it or its predecessors have run long enough, and counted among the runnable tasks of
/// this shard whenever it is one ([`others_runnable`]).
///
/// A queue that wakes up is put just behind the one that runs, which would cost live traffic one more slice of the queue
/// that it has preempted. So the first task of another queue after a preemption gives way once.
pub(super) fn paced<T>(queue: Queue, future: impl Future<Output = T>) -> impl Future<Output = T> {
    // made now, not at the first poll: a task is runnable from its start
    let runnable = Runnable::new();
    async move {
        let waker = Waker::from(runnable.0.clone());
        let mut future = pin!(future);
        poll_fn(|cx| {
            runnable.0.inner.get_or_init(|| cx.waker().clone());
            if queue != Queue::Live && TURN.with(Turn::gives_way) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            runnable.0.set_idle();
            enter();
            let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
            leave();
            polled
        })
        .await
    }
}

/// Is there a task of this shard, other than the one that asks, which could run now?
pub(super) fn others_runnable() -> bool {
    RUNNABLE.get() > 0
}

/// Waits until no other task of this shard is runnable, but no longer than a slice.
pub(super) async fn others_first() {
    let mut waited = false;
    poll_fn(|cx| {
        if waited || !others_runnable() {
            return Poll::Ready(());
        }
        waited = true;
        RESTING.with(|resting| resting.replace(Some(cx.waker().clone())));
        Poll::Pending
    })
    .await;
}

/// Has the executor look at its rings (timers, files) before the calling task, which now yields, goes on. Passing the turn is
/// not enough: as long as any queue has something to run, the executor looks at them only when the latency ring tells it to.
pub(super) fn pass_rings() {
    TURN.with(|turn| {
        turn.pass_on();
        turn.ring(Instant::now());
    });
}

/// This thread has slept in the kernel: what was, does not count for the slice.
pub(super) fn slept() {
    TURN.with(|turn| turn.began.set(Some(Instant::now())));
}

thread_local! {
    /// Tasks of this shard that have been woken and not been polled since.
    static RUNNABLE: Cell<usize> = const { Cell::new(0) };
    /// Who waits for there to be none.
    static RESTING: RefCell<Option<Waker>> = const { RefCell::new(None) };
}

/// Counts one task as runnable, from its wake-up (or start) to its poll (or end). Wakes from other threads are passed on
/// without being counted: nothing of this house sends any.
struct Runnable(Arc<Wakeable>);

struct Wakeable {
    /// glommio's waker of the task.
    inner: OnceLock<Waker>,
    state: AtomicU8,
    home: ThreadId,
}

const IDLE: u8 = 0;
const WOKEN: u8 = 1;
const DONE: u8 = 2;

impl Runnable {
    fn new() -> Runnable {
        RUNNABLE.set(RUNNABLE.get() + 1);
        let home = std::thread::current().id();
        Runnable(Arc::new(Wakeable {
            inner: OnceLock::new(),
            state: AtomicU8::new(WOKEN),
            home,
        }))
    }
}

impl Drop for Runnable {
    fn drop(&mut self) {
        if self.0.state.swap(DONE, Relaxed) == WOKEN {
            RUNNABLE.set(RUNNABLE.get().saturating_sub(1));
        }
    }
}

impl Wakeable {
    fn set_idle(&self) {
        if self.state.swap(IDLE, Relaxed) == WOKEN {
            RUNNABLE.set(RUNNABLE.get().saturating_sub(1));
        }
    }
}

impl Wake for Wakeable {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let counted = self.state.load(Relaxed) == IDLE && self.home == std::thread::current().id();
        if counted {
            self.state.store(WOKEN, Relaxed);
            RUNNABLE.set(RUNNABLE.get() + 1);
        }
        if let Some(waker) = self.inner.get() {
            waker.wake_by_ref();
        }
    }
}

fn enter() {
    TURN.with(|turn| {
        let now = Instant::now();
        let goes_on = turn.began.get().is_some()
            && turn
                .ended
                .get()
                .is_some_and(|ended| now.duration_since(ended) < PAUSE);
        if !goes_on {
            turn.began.set(Some(now));
        }
    });
}

fn leave() {
    TURN.with(|turn| {
        let now = Instant::now();
        turn.ended.set(Some(now));
        let over = turn.is_over(now);
        if over || !others_runnable() {
            let resting = RESTING.with(|resting| resting.borrow_mut().take());
            if let Some(waker) = resting {
                waker.wake();
            }
        }
        if over && others_runnable() {
            turn.end(now);
        } else if over {
            turn.began.set(Some(now));
        } else if executor().need_preempt() {
            turn.preempted.set(true);
        }
    });
}

/// Whether something more urgent waits or this slice is over.
pub(super) fn need_preempt() -> bool {
    executor().need_preempt()
        || (others_runnable() && TURN.with(|turn| turn.is_over(Instant::now())))
}

/// Ends the slice; the task that calls it then yields.
pub(super) fn end_slice() {
    TURN.with(|turn| turn.end(Instant::now()));
}

impl Turn {
    fn is_over(&self, now: Instant) -> bool {
        self.began
            .get()
            .is_some_and(|began| now.duration_since(began) >= SLICE)
    }

    fn gives_way(&self) -> bool {
        // Not before the executor has looked at what preempted.
        let gives_way = self.preempted.get() && !executor().need_preempt();
        if gives_way {
            self.preempted.set(false);
            self.pass();
        }
        gives_way
    }

    /// The slice is over: others have their turn, and now and then the rings.
    fn end(&self, now: Instant) {
        self.pass_on();
        let due = |rung: Instant| now.duration_since(rung) >= LOOK;
        if self.rung.get().is_none_or(due) {
            self.ring(now);
        }
    }

    fn pass_on(&self) {
        self.began.set(None);
        self.preempted.set(true);
        self.pass();
    }

    /// Has the executor look at its rings.
    fn ring(&self, now: Instant) {
        self.rung.set(Some(now));
        if !executor().need_preempt()
            && let Some(bells) = &*self.bells.borrow()
            && self.other_returns.replace(false)
        {
            bells[self.next.get()].ring();
            self.next.set(1 - self.next.get());
        }
    }

    /// Marks the running queue: its other tasks wait for its next turn.
    fn pass(&self) {
        let executor = executor();
        let mut marks = pin!(executor.yield_task_queue_now());
        let _ = marks.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    }
}
