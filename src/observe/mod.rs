//! What an SRE sees. In: increments and durations from the core that saw the thing. Out: sums and histograms, whenever somebody
//! reads. Promise: recording takes no lock and never waits; the module knows nobody else in the house.
//!
//! | file | what it does |
//! |---|---|
//! | `stage` | what is measured: name, help, who records |
//! | `histogram` | durations of each recording thread, handed over by exchange |
//! | `lag` | how late a loop is |
//! | `collect` | the thread that collects and adds up, and everybody who looks |
//! | `gauges`, `high` | figures of the shards and the blade; how deep queues were |
//! | `interval_log` | histogram logs in HdrHistogram's own format |
//! | `log` | the log's lines, and how often the same is said |
//! | `process` | the process as the kernel sees it |
//! | `table`, `page` | metrics as tables, and the text of `GET /metrics` |

mod collect;
mod gauges;
mod high;
mod histogram;
mod interval_log;
mod lag;
mod log;
mod page;
mod process;
mod stage;
mod table;

pub use collect::{Ask, Collected, Follow, HALF, Observer, Recorder, Series};
pub use gauges::{GAUGES, Gauges, SNAPSHOT, Snapshot};
pub use high::HighWater;
pub use histogram::{
    Histograms, Recorded, SharedHistograms, Stamp, Stamps, US_MAX, begin_recording, exchange,
    histogram, record, record_n,
};
pub use interval_log::{IntervalLog, IntervalLogConfig};
pub use lag::LoopLag;
pub use log::{LEFT_OUT, flush_log, repeats, set_log_level, start_log};
pub use page::{BUCKETS_US, Format, render};
pub use process::{PROCESS, Process};
pub use stage::{Place, Stage};
pub use table::{About, Family, Kind, Labels, Row, Unit, Value, families};

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
