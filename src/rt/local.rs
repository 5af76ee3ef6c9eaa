//! Waiting inside one shard. In: events. Out: woken tasks of the same shard. Promise: no atomics, no locks.

use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// An event that tasks of one shard wait for.
#[derive(Default)]
pub struct Notify {
    /// How often [`Notify::notify`] was called.
    rings: Cell<u64>,
    /// The ring up to which somebody has been told.
    heard: Cell<u64>,
    waiting: RefCell<SmallVec<[Waker; 1]>>,
}

impl Notify {
    /// Without waiters and without a ring.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes all who wait. If nobody does, the next [`wait`](Self::wait) returns at once; any number of rings that
    /// nobody waited for count as one.
    pub fn notify(&self) {
        self.rings.set(self.rings.get() + 1);
        // Taken out first: a waker may run code that waits again.
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits for the next [`notify`](Self::notify), or for one that nobody has heard yet.
    pub async fn wait(&self) {
        let seen = self.heard.get();
        poll_fn(|cx| {
            if self.rings.get() > seen {
                self.heard.set(self.rings.get());
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.iter().any(|w| w.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

/// Makes a place for one value: set once by one task, taken once by another of the same shard.
pub fn slot<T>() -> (SlotSetter<T>, Slot<T>) {
    let shared = Rc::new(Shared {
        state: RefCell::new(State::Empty(None)),
    });
    (SlotSetter(shared.clone()), Slot(shared))
}

/// The end that waits for the value.
pub struct Slot<T>(Rc<Shared<T>>);

/// The end that gives the value.
pub struct SlotSetter<T>(Rc<Shared<T>>);

struct Shared<T> {
    state: RefCell<State<T>>,
}

enum State<T> {
    Empty(Option<Waker>),
    Full(T),
    /// The setter is gone without a value, or the value was taken.
    Over,
}

impl<T> SlotSetter<T> {
    /// Gives the value and wakes the one who waits. If the other end is gone, the value is dropped.
    pub fn set(self, value: T) {
        self.0.put(State::Full(value));
    }
}

impl<T> Drop for SlotSetter<T> {
    fn drop(&mut self) {
        if matches!(*self.0.state.borrow(), State::Empty(_)) {
            self.0.put(State::Over);
        }
    }
}

impl<T> Slot<T> {
    /// The value, or `None` if the setter was dropped without giving one.
    pub async fn take(self) -> Option<T> {
        poll_fn(|cx| {
            let mut state = self.0.state.borrow_mut();
            if let State::Empty(waiting) = &mut *state {
                *waiting = Some(cx.waker().clone());
                return Poll::Pending;
            }
            match std::mem::replace(&mut *state, State::Over) {
                State::Full(value) => Poll::Ready(Some(value)),
                _ => Poll::Ready(None),
            }
        })
        .await
    }
}

impl<T> Shared<T> {
    fn put(&self, state: State<T>) {
        if let State::Empty(Some(waiting)) = self.state.replace(state) {
            waiting.wake();
        }
    }
}
