//! What an SRE sees. In: increments and durations from the core that saw the thing. Out: sums and histograms, whenever somebody
//! reads. Promise: recording takes no lock and never waits; the module knows nobody else in the house.
//!
//! | file | what it does |
//! |---|---|
//! | `stage` | what is measured: name, help, who records |
//! | `histogram` | durations of each recording thread, handed over by exchange |
//! | `lag` | how late a loop is |
//! | `gauges` | figures of the shards, and the text of `GET /metrics` |

mod gauges;
mod histogram;
mod lag;
mod stage;

pub use gauges::{Gauges, Snapshot, Table, label};
pub use histogram::{
    Histograms, Recorded, US_MAX, begin_recording, exchange, histogram, record, record_n,
};
pub use lag::{Lag, LoopLag};
pub use stage::{Place, Stage};

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number that only grows. Declare it where it is recorded, one per core where the rate is high:
/// a relaxed increment of a cache line that only one core writes costs about a nanosecond.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at zero; `const`, so that it may be a `static`.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_counts_what_every_thread_adds() {
        static SEEN: Counter = Counter::new();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (0..1000).for_each(|_| SEEN.one()));
            }
        });
        SEEN.add(5);
        assert_eq!(SEEN.get(), 4005);
    }
}
