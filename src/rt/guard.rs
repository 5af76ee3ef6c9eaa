//! A remedy for a fault of glommio 0.9. In: the waker of each executor's first task. Out: a wake from outside, again and
//! again. Promise: a shard that went to sleep with work to do sleeps no longer than [`PULSE`].
//!
//! The fault: when an event completes in the latency ring (the preempt timer does, if the kernel takes the core away at
//! the wrong moment) between the poll and the first task queue of a turn, `LocalExecutor::run_task_queues` runs nothing and
//! says that there is nothing to run; the executor then parks, although tasks are runnable. Whatever woke them is used
//! up, so that neither a timer nor a socket wakes the shard again. Without this guard, on a busy machine, every twentieth
//! start hung and shards fell silent for good.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::{Poll, Waker};
use std::time::Duration;

/// How often executors are woken.
const PULSE: Duration = Duration::from_millis(20);

type Entry = Mutex<Option<Waker>>;

/// One executor's place among those that are woken, for as long as it runs.
pub struct Guard(Arc<Entry>);

impl Guard {
    /// Begins on this thread's executor, before it runs.
    pub fn start() -> Guard {
        static GUARDED: OnceLock<Arc<Mutex<Vec<Weak<Entry>>>>> = OnceLock::new();
        let guarded = GUARDED.get_or_init(|| {
            let guarded = Arc::new(Mutex::new(Vec::new()));
            let all = guarded.clone();
            std::thread::Builder::new()
                .name("pulse".into())
                .spawn(move || pulse(&all))
                .expect("one more thread can be started");
            guarded
        });
        let entry = Arc::new(Mutex::new(None));
        lock(guarded).push(Arc::downgrade(&entry));
        Guard(entry)
    }

    /// Wakes the calling task from now on; it must live as long as its executor.
    pub async fn watch(&self) {
        poll_fn(|cx| {
            *lock(&self.0) = Some(cx.waker().clone());
            Poll::Ready(())
        })
        .await
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // A waker must not outlive its executor.
        lock(&self.0).take();
    }
}

fn pulse(guarded: &Mutex<Vec<Weak<Entry>>>) {
    loop {
        std::thread::sleep(PULSE);
        lock(guarded).retain(|entry| {
            let Some(entry) = entry.upgrade() else {
                return false;
            };
            if let Some(waker) = &*lock(&entry) {
                waker.wake_by_ref();
            }
            true
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
