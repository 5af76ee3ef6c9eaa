//! How the kernel shares a core among the threads of this process. In: what a thread is for. Out: how soon it runs when it wakes
//! on a busy core. Promise: needs no privilege; where the kernel does not know it, nothing changes.
//!
//! A shard that is busy does not sleep, and a thread that shares its core gets its turn only when the kernel's clock ticks: up
//! to four milliseconds on common kernels, which is what an acknowledgement then waits for. Since Linux 6.12 a thread may ask
//! for shorter slices (EEVDF, `sched_attr.sched_runtime`): it gets no more of the core, but it gets it as soon as it wakes.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// The slice of a thread that works for microseconds at a time; the kernel allows no shorter one.
const PROMPT: Duration = Duration::from_micros(100);
/// The slice of a shard: longer than that, shorter than what anybody has who did not ask.
const SHARD: Duration = Duration::from_micros(400);
/// How long a thread in the background works before it gives way; in it a shard may become late by as much.
const STRETCH: Duration = Duration::from_micros(100);
/// Items of [`gently`] between two looks at the clock; a few microseconds' work.
const LOOK_EVERY: usize = 16;

/// The calling thread wakes up for a moment, and others wait for what it does then: the journal's committer.
pub fn be_prompt() {
    ask_for_slice(PROMPT);
}

/// Puts the calling thread behind all others: what it does may wait. `nice`: 0 to 19. Failing costs latency only.
pub fn step_back(nice: i32) {
    // SAFETY: plain system calls on the calling thread (0) with values of our own; `param` is only read.
    let stepped_back = unsafe {
        let param: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &param) == 0
            && libc::setpriority(libc::PRIO_PROCESS, 0, nice) == 0
    };
    if !stepped_back {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "cannot lower a thread's priority");
    }
}

/// The calling thread works in the background and may have run long enough: whoever else wants its core gets it. Without this the
/// kernel lets it run until its clock ticks, four milliseconds on common kernels, and a shard's messages wait.
pub fn give_way() {
    thread_local! {
        static LAST: Cell<Option<Instant>> = const { Cell::new(None) };
    }
    if LAST.get().is_none_or(|last| last.elapsed() >= STRETCH) {
        std::thread::yield_now();
        LAST.set(Some(Instant::now()));
    }
}

/// The items of a loop over thousands, which takes turns with whoever wants the core: see [`give_way`].
pub fn gently<T>(items: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    items.into_iter().enumerate().map(|(n, item)| {
        if n % LOOK_EVERY == 0 {
            give_way();
        }
        item
    })
}

/// The calling thread runs a shard.
pub(super) fn be_a_shard() {
    ask_for_slice(SHARD);
}

fn ask_for_slice(slice: Duration) {
    // SAFETY: plain integers. The calls are about the calling thread (0); the first writes at most `size` bytes into
    // `attributes`, the second reads as many from it.
    unsafe {
        let mut attributes: libc::sched_attr = std::mem::zeroed();
        let size = size_of::<libc::sched_attr>() as u32;
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) != 0
            || attributes.sched_policy != libc::SCHED_OTHER as u32
        {
            return;
        }
        attributes.size = size;
        attributes.sched_runtime = slice.as_nanos() as u64;
        libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn asking_for_short_slices_changes_nothing_else() {
        let of = || {
            // SAFETY: plain system calls about the calling thread.
            unsafe {
                (
                    libc::sched_getscheduler(0),
                    libc::getpriority(libc::PRIO_PROCESS, 0),
                )
            }
        };
        std::thread::spawn(move || {
            let before = of();
            super::be_prompt();
            assert_eq!(of(), before);
        })
        .join()
        .unwrap();
    }
}
