//! The runtime, and the only place that names glommio. In: the cores to run on and one future for each. Out: one pinned
//! executor (a shard) per core with three task queues, timers, a readiness set for sockets ([`Readiness`]), the mesh
//! between shards ([`mesh`]) and the inbox for foreign threads ([`inbox`]).
//! Promise: a shard never spins; with nothing to do it sleeps in its ring, and live traffic preempts all else.

mod bell;
mod inbox;
mod local;
mod mesh;
mod priority;
mod probe;
mod readiness;
mod turn;

pub use inbox::{Inbox, InboxSender, SendError, inbox};
pub use local::{Notify, Slot, SlotSetter, slot};
pub use mesh::{Mesh, MeshEnd, mesh};
pub use priority::{be_prompt, gently, give_way, step_back};
pub use probe::{cores_online, probe, raise_open_files};
pub use readiness::{Readiness, Ready};

use glommio::{
    Latency, LocalExecutor, LocalExecutorBuilder, Placement, Shares, TaskQueueHandle, executor,
};
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// glommio's own preempt timer, and the latency asked of it for live traffic: far off, for the reason told in [`turn`].
/// That a latency is asked for at all is what makes an event of the live queue preempt the others.
const PREEMPT_TIMER: Duration = Duration::from_secs(10);
/// Registered against the locked-memory limit three times per shard; only file I/O through rings would use it.
const IO_MEMORY_BYTES: usize = 64 * 1024;
/// A shard keeps few requests in its rings (one poll of its readiness set, timers, file writes); sockets do not go there.
const RING_DEPTH: usize = 128;

/// The task queues of a shard, in falling order of their share of the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Sessions that are logged in, the readiness task, the mesh. Latency-bound: it preempts the other two.
    Live,
    /// Connections that are logging in.
    Login,
    /// Whatever may wait: eviction, drains, statistics.
    House,
}

/// Shares out of 1000, in the order of [`Queue`].
const SHARES: [usize; 3] = [1000, 250, 50];

thread_local! {
    static QUEUES: Cell<Option<[TaskQueueHandle; 3]>> = const { Cell::new(None) };
    static SHARD: Cell<usize> = const { Cell::new(0) };
}

/// Starts one executor per entry of `cores`, pinned to that core, and runs `main(shard)` there in [`Queue::Live`];
/// `shard` is the index in `cores`. No `main` starts before all executors stand. A thread ends when its `main` is
/// done; tasks that are still running are dropped with it.
///
/// Errors: a sentence for the operator that names the core. Call [`probe`] first.
pub fn run_shards<F, Fut>(cores: &[usize], main: F) -> Result<Vec<JoinHandle<()>>, String>
where
    F: Fn(usize) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let (standing, reports) = mpsc::channel::<Result<(), String>>();
    let mut starts = Vec::with_capacity(cores.len());
    let mut threads = Vec::with_capacity(cores.len());
    for (shard, &core) in cores.iter().enumerate() {
        let (start, started) = mpsc::channel::<()>();
        let (main, standing) = (main.clone(), standing.clone());
        let thread = Builder::new()
            .name(format!("shard-{shard}"))
            .spawn(move || match executor_on(Placement::Fixed(core)) {
                Err(why) => {
                    let _ = standing.send(Err(format!("core {core}: {why}")));
                }
                Ok(ex) => {
                    let _ = standing.send(Ok(()));
                    // A dropped sender means that another shard could not stand: end quietly.
                    if started.recv().is_ok() {
                        priority::be_a_shard();
                        run(&ex, shard, async move { main(shard).await });
                    }
                }
            })
            .map_err(|e| format!("core {core}: cannot start a thread: {e}"))?;
        starts.push(start);
        threads.push(thread);
    }
    for _ in cores {
        reports
            .recv()
            .map_err(|_| "a shard's thread ended while it started".to_owned())??;
    }
    for start in starts {
        let _ = start.send(());
    }
    Ok(threads)
}

/// Runs `future` to its end on an executor of its own on this thread, not pinned, as shard 0 with all queues:
/// for tests and commands that need timers or files but no blade.
pub fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let ex = executor_on(Placement::Unbound).expect("an executor: probe() says what is missing");
    run(&ex, 0, future)
}

fn executor_on(placement: Placement) -> Result<LocalExecutor, String> {
    LocalExecutorBuilder::new(placement)
        .name("shard")
        .io_memory(IO_MEMORY_BYTES)
        .ring_depth(RING_DEPTH)
        .preempt_timer(PREEMPT_TIMER)
        .make()
        .map_err(|e| format!("cannot start the executor: {e}"))
}

fn run<T: 'static>(ex: &LocalExecutor, shard: usize, main: impl Future<Output = T> + 'static) -> T {
    ex.run(async move {
        let share = |q: Queue| Shares::Static(SHARES[q as usize]);
        QUEUES.set(Some([
            executor().create_task_queue(
                share(Queue::Live),
                Latency::Matters(PREEMPT_TIMER),
                "live",
            ),
            executor().create_task_queue(share(Queue::Login), Latency::NotImportant, "login"),
            executor().create_task_queue(share(Queue::House), Latency::NotImportant, "house"),
        ]));
        SHARD.set(shard);
        let bells = turn::set_up().expect("two descriptors: they belong to what a shard needs");
        for hear in bells {
            spawn_into(Queue::Live, hear).detach();
        }
        spawn_into(Queue::House, turn::heartbeat()).detach();
        // One look at the rings, which arms the bells, before anything can keep the shard busy. (A timer that is over
        // when it is first polled does not wait.)
        sleep(Duration::from_millis(1)).await;
        spawn_into(Queue::Live, turn::paced(Queue::Live, main)).await
    })
}

fn spawn_into<T: 'static>(
    queue: Queue,
    future: impl Future<Output = T> + 'static,
) -> glommio::Task<T> {
    let queues = QUEUES
        .get()
        .expect("called on a shard: run_shards or block_on made its queues");
    glommio::spawn_local_into(future, queues[queue as usize])
        .expect("queues live as long as their shard")
}

/// Starts a detached task on this shard. It first runs when its queue's turn comes, never inside this call.
///
/// Panics outside [`run_shards`] and [`block_on`].
pub fn spawn(queue: Queue, future: impl Future<Output = ()> + 'static) {
    spawn_into(queue, turn::paced(queue, future)).detach();
}

/// The index of this shard in `cores` as given to [`run_shards`].
pub fn shard() -> usize {
    SHARD.get()
}

/// Waits for `duration`; at least that, and no more than a turn of the loop longer.
pub async fn sleep(duration: Duration) {
    glommio::timer::sleep(duration).await;
}

/// Processor time that this thread has used, microseconds.
pub fn thread_cpu_us() -> u64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    used.tv_sec as u64 * 1_000_000 + used.tv_nsec as u64 / 1000
}

/// The time given to [`timeout`] went by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("timed out")]
pub struct Elapsed;

/// What `future` returns, or [`Elapsed`] after `duration`; the future is then dropped.
///
/// The timer is looked at when it has rung, not whenever `future` is polled: glommio's would take itself out of its table and put
/// itself in again each time.
pub async fn timeout<T>(duration: Duration, future: impl Future<Output = T>) -> Result<T, Elapsed> {
    let mut future = pin!(future);
    let mut alarm = pin!(sleep(duration));
    let mut told: Option<(Arc<Alarm>, Waker)> = None;
    poll_fn(|cx| {
        if let Poll::Ready(value) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(value));
        }
        let same = |(alarm, _): &&(Arc<Alarm>, Waker)| alarm.task.will_wake(cx.waker());
        let waker = match told.as_ref().filter(same) {
            Some((alarm, _)) if !alarm.rung.swap(false, Relaxed) => return Poll::Pending,
            Some((_, waker)) => waker,
            None => {
                let alarm = Arc::new(Alarm {
                    task: cx.waker().clone(),
                    rung: AtomicBool::new(false),
                });
                let waker = Waker::from(alarm.clone());
                &told.insert((alarm, waker)).1
            }
        };
        alarm
            .as_mut()
            .poll(&mut Context::from_waker(waker))
            .map(|()| Err(Elapsed))
    })
    .await
}

/// Wakes a task, and remembers that it was the timer.
struct Alarm {
    task: Waker,
    rung: AtomicBool,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Relaxed);
        self.task.wake_by_ref();
    }
}

/// Lets the other runnable tasks of this queue, and the other queues, run once.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Yields if something more urgent waits: call it in every loop that may run longer than about 100 us.
pub async fn yield_if_needed() {
    if turn::need_preempt() {
        turn::end_slice();
        yield_now().await;
    }
}

/// Is there a task of this shard, other than the one that asks, which could run now?
pub fn others_runnable() -> bool {
    turn::others_runnable()
}

/// Lets the other runnable tasks of all queues run, for a slice at most. Returns at once if there are none.
pub async fn others_first() {
    turn::others_first().await;
}

/// Has the executor look at its timers and files. A task that never waits in the ring ([`Readiness::nap`]) calls it every
/// millisecond.
pub async fn look_at_rings() {
    turn::pass_rings();
    yield_now().await;
}

/// Whether something more urgent waits, for loops that keep their state and return instead of awaiting. Looks at the
/// clock: about 30 ns.
pub fn need_preempt() -> bool {
    turn::need_preempt()
}

#[cfg(test)]
mod tests;
