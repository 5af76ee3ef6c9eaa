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
//! There are two bells, because one that was heard counts again only after its task has run and the executor has then
//! looked at the rings. The second is rung only when the first is on its way back, so that one is always armed; until
//! then the end of a slice only passes the turn to the next queue.
//!
//! The same mistake is possible with the wake-ups of glommio's own channels and of wakers moved to other threads, so
//! neither is used: [`mesh`](super::mesh) and [`inbox`](super::inbox) ring bells too. [`heartbeat`] bounds what is left.

use super::Queue;
use super::bell::{Bell, Ear};
use glommio::executor;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// How long a queue may run before the others are looked at.
const SLICE: Duration = Duration::from_micros(200);
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
    /// Something more urgent came, and no other queue has given way to it yet.
    preempted: Cell<bool>,
}

thread_local! {
    static TURN: Turn = const {
        Turn { began: Cell::new(None), ended: Cell::new(None), bells: RefCell::new(None),
            next: Cell::new(0), other_returns: Cell::new(true), preempted: Cell::new(false) }
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

/// `future`, ending the slice when it or its predecessors have run long enough.
///
/// A queue that wakes up is put just behind the one that runs, which would cost live traffic one more slice of the queue
/// that it has preempted. So the first task of another queue after a preemption gives way once.
pub(super) async fn paced<T>(queue: Queue, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    poll_fn(|cx| {
        if queue != Queue::Live && TURN.with(Turn::gives_way) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        enter();
        let polled = future.as_mut().poll(cx);
        leave();
        polled
    })
    .await
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
        if turn.is_over(now) {
            turn.end();
        } else if executor().need_preempt() {
            turn.preempted.set(true);
        }
    });
}

/// Whether something more urgent waits or this slice is over.
pub(super) fn need_preempt() -> bool {
    executor().need_preempt() || TURN.with(|turn| turn.is_over(Instant::now()))
}

/// Ends the slice; the task that calls it then yields.
pub(super) fn end_slice() {
    TURN.with(Turn::end);
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

    fn end(&self) {
        self.began.set(None);
        self.preempted.set(true);
        self.pass();
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
