//! A remedy for a fault of glommio 0.9. In: each executor's thread and the waker of its first task. Out: a wake from outside,
//! again and again. Promise: a shard that went to sleep with work to do sleeps no longer than [`PULSE`].
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

/// How often executors are woken. Twenty times a second cost an idle core about a thousandth.
const PULSE: Duration = Duration::from_millis(50);

enum State {
    /// The executor may park before its first task ran; then only a signal to its thread interrupts the wait.
    Starting(libc::pthread_t),
    Running(Waker),
    Ended,
}

type Entry = Mutex<State>;

/// One executor's place among those that are woken, for as long as it runs.
pub struct Guard(Arc<Entry>);

impl Guard {
    /// Begins on this thread's executor, before it runs.
    pub fn start() -> Guard {
        static GUARDED: OnceLock<Arc<Mutex<Vec<Weak<Entry>>>>> = OnceLock::new();
        let guarded = GUARDED.get_or_init(|| {
            hear_signal();
            let guarded = Arc::new(Mutex::new(Vec::new()));
            let all = guarded.clone();
            std::thread::Builder::new()
                .name("pulse".into())
                .spawn(move || pulse(&all))
                .expect("one more thread can be started");
            guarded
        });
        // SAFETY: asks for the calling thread's own handle; nothing can go wrong.
        let thread = unsafe { libc::pthread_self() };
        let entry = Arc::new(Mutex::new(State::Starting(thread)));
        lock(guarded).push(Arc::downgrade(&entry));
        Guard(entry)
    }

    /// Wakes the calling task from now on; it must live as long as its executor.
    pub async fn watch(&self) {
        poll_fn(|cx| {
            *lock(&self.0) = State::Running(cx.waker().clone());
            Poll::Ready(())
        })
        .await
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Neither the waker nor the handle may outlive the thread, on which this runs.
        *lock(&self.0) = State::Ended;
    }
}

fn pulse(guarded: &Mutex<Vec<Weak<Entry>>>) {
    loop {
        std::thread::sleep(PULSE);
        lock(guarded).retain(|entry| {
            let Some(entry) = entry.upgrade() else {
                return false;
            };
            match &*lock(&entry) {
                // SAFETY: the thread lives: before it ends it takes this lock and replaces the handle.
                State::Starting(thread) => drop(unsafe { libc::pthread_kill(*thread, libc::SIGURG) }),
                State::Running(waker) => waker.wake_by_ref(),
                State::Ended => {}
            }
            true
        });
    }
}

/// An ignored signal interrupts nothing: SIGURG gets a handler that does nothing.
fn hear_signal() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all zero is a valid `sigaction` (no flags, so no restart); the handler touches nothing, so it is safe wherever
    // it interrupts; the old action is not asked for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(libc::SIGURG, &action, std::ptr::null_mut());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
