//! Durations, as histograms of each recording thread.
//!
//! In: microseconds of a [`Stage`], from the thread that saw it. Out: the histograms since the last exchange, as a whole, to
//! the one who collects. Promise: recording takes no lock, allocates nothing and costs a few nanoseconds; handing over is
//! an exchange of pointers, however much was recorded.
//!
//! 1 microsecond to 60 seconds with two significant figures: a value is at most 1 % off, which no alert and no plot can tell,
//! and a histogram is 10 KiB, of which only the values in use are touched. Three figures would be eight times as much. What
//! takes longer than a minute counts as a minute: deadlines end everything before.

use std::cell::RefCell;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::time::Duration;

use hdrhistogram::{Counter, Histogram};

use super::stage::Stage;

/// The longest duration that is told from longer ones.
pub const US_MAX: u64 = 60_000_000;
/// Of a value's decimal digits.
const FIGURES: u8 = 2;

/// An empty histogram with the bounds of all others.
pub fn histogram<T: Counter>() -> Histogram<T> {
    Histogram::new_with_bounds(1, US_MAX, FIGURES).expect("bounds that hdrhistogram takes")
}

/// What was recorded of one stage. Counts are of 32 bits: they are of an interval, not of a lifetime.
pub struct Recorded {
    pub histogram: Histogram<u32>,
    /// Microseconds, exact.
    pub sum_us: u64,
    /// The value that came last, and how often in a row it is not yet in the histogram: what one turn of a loop reads and
    /// writes shares its time stamps.
    run: (u64, u32),
}

impl Recorded {
    fn new() -> Recorded {
        Recorded {
            histogram: histogram(),
            sum_us: 0,
            run: (0, 0),
        }
    }

    fn record(&mut self, us: u64, n: u32) {
        if self.run.0 != us {
            self.end_run();
            self.run.0 = us;
        }
        self.run.1 = self.run.1.saturating_add(n);
    }

    fn end_run(&mut self) {
        let (us, n) = self.run;
        if n > 0 {
            self.histogram.saturating_record_n(us, n);
            self.sum_us += us.min(US_MAX) * u64::from(n);
            self.run.1 = 0;
        }
    }
}

/// What was recorded of all stages.
pub struct Histograms(Box<[Recorded]>);

impl Histograms {
    pub fn new() -> Histograms {
        Histograms(Stage::ALL.iter().map(|_| Recorded::new()).collect())
    }

    pub fn record(&mut self, stage: Stage, us: u64, n: u32) {
        self.0[stage as usize].record(us, n);
    }

    pub fn get(&mut self, stage: Stage) -> &Recorded {
        let recorded = &mut self.0[stage as usize];
        recorded.end_run();
        recorded
    }

    /// For the next interval.
    pub fn clear(&mut self) {
        for recorded in &mut self.0 {
            recorded.run = (0, 0);
            recorded.sum_us = 0;
            if !recorded.histogram.is_empty() {
                recorded.histogram.reset();
            }
        }
    }
}

impl Default for Histograms {
    fn default() -> Self {
        Self::new()
    }
}

thread_local! {
    static OWN: RefCell<Option<Histograms>> = const { RefCell::new(None) };
}

/// From now on this thread records: call it once on each shard.
pub fn begin_recording() {
    OWN.set(Some(Histograms::new()));
}

/// It took so many microseconds. Nothing happens on a thread that does not record.
pub fn record(stage: Stage, us: u64) {
    record_n(stage, us, 1);
}

/// The same, `n` times.
pub fn record_n(stage: Stage, us: u64, n: u32) {
    OWN.with_borrow_mut(|own| {
        if let Some(own) = own {
            own.record(stage, us, n);
        }
    });
}

/// What this thread has recorded since the last exchange; from now on it records into `empty`. A thread that does not record
/// gives `empty` back.
pub fn exchange(empty: Histograms) -> Histograms {
    OWN.with_borrow_mut(|own| match own {
        Some(own) => std::mem::replace(own, empty),
        None => empty,
    })
}

/// For a thread that is no shard and cannot be asked: it locks for each record, and is hardly ever disturbed.
#[derive(Default)]
pub struct SharedHistograms(Mutex<Histograms>);

impl SharedHistograms {
    pub fn record(&self, stage: Stage, took: Duration) {
        if let Ok(mut all) = self.0.lock() {
            all.record(stage, took.as_micros() as u64, 1);
        }
    }

    /// As [`exchange`].
    pub fn exchange(&self, empty: Histograms) -> Histograms {
        match self.0.lock() {
            Ok(mut all) => std::mem::replace(&mut *all, empty),
            Err(_) => empty,
        }
    }
}

impl std::fmt::Debug for SharedHistograms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedHistograms").finish_non_exhaustive()
    }
}

/// A moment of a monotonic clock of microseconds, in four bytes, for what is carried with each message. Moments further apart
/// than 35 minutes cannot be told from later ones: nothing that is measured takes so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(NonZeroU32);

impl Stamp {
    /// Some moment.
    pub const FIRST: Stamp = Stamp(NonZeroU32::MIN);

    pub fn at(us: u64) -> Stamp {
        Stamp(NonZeroU32::new(us as u32).unwrap_or(NonZeroU32::MIN))
    }

    /// Microseconds from then to now; 0 if now is earlier, as it may be by the clock of a turn that began before.
    pub fn until(self, now_us: u64) -> u64 {
        let apart = (now_us as u32).wrapping_sub(self.0.get()) as i32;
        apart.max(0) as u64
    }
}

/// Moments, of which many in a row are the same.
#[derive(Debug, Default)]
pub struct Stamps(Vec<(Stamp, u32)>);

impl Stamps {
    pub fn push(&mut self, stamp: Stamp) {
        match self.0.last_mut() {
            Some((last, n)) if *last == stamp => *n += 1,
            _ => self.0.push((stamp, 1)),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them end now.
    pub fn record(&mut self, stage: Stage, now_us: u64) {
        for (stamp, n) in self.0.drain(..) {
            record_n(stage, stamp.until(now_us), n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_handed_over_once_and_as_a_whole() {
        begin_recording();
        for us in [7, 7, 7, 130, 7] {
            record(Stage::Login, us);
        }
        record_n(Stage::Message, 2 * US_MAX, 3);
        let mut first = exchange(Histograms::new());
        let login = first.get(Stage::Login);
        assert_eq!((login.histogram.len(), login.sum_us), (5, 158));
        assert_eq!(login.histogram.count_at(7), 4);
        let message = first.get(Stage::Message);
        assert_eq!((message.histogram.len(), message.sum_us), (3, 3 * US_MAX));
        first.clear();
        let mut second = exchange(first);
        assert!(
            Stage::ALL
                .iter()
                .all(|s| second.get(*s).histogram.is_empty())
        );
        // and the first, cleared, is what is recorded into now
        record(Stage::Login, 9);
        let mut third = exchange(second);
        assert_eq!(third.get(Stage::Login).histogram.len(), 1);
        assert_eq!(third.get(Stage::Login).sum_us, 9);
    }

    #[test]
    fn a_thread_that_does_not_record_gives_the_empty_ones_back() {
        let recorded = std::thread::spawn(|| {
            record(Stage::Login, 1);
            exchange(Histograms::new())
                .get(Stage::Login)
                .histogram
                .len()
        });
        assert_eq!(recorded.join().unwrap(), 0);
    }

    #[test]
    fn a_value_is_at_most_one_percent_off() {
        let mut all = Histograms::new();
        let mut us = 1;
        while us <= US_MAX {
            all.record(Stage::Login, us, 1);
            let histogram = &all.get(Stage::Login).histogram;
            let told = histogram.value_at_quantile(1.0).min(histogram.max());
            assert!(told >= us && told - us <= us / 100, "{us} became {told}");
            all.clear();
            us = us * 21 / 20 + 1;
        }
    }

    #[test]
    fn a_stamp_measures_across_the_wrap_of_its_clock() {
        let wrap = 1 << 32;
        for (from, to) in [
            (5, 9),
            (wrap - 3, wrap + 4),
            (7 * wrap + 1, 7 * wrap + 60_000_000),
        ] {
            assert_eq!(Stamp::at(from).until(to), to - from);
        }
        // one of four billion moments is told a microsecond late
        assert_eq!(Stamp::at(wrap).until(wrap + 10), 9);
        assert_eq!(Stamp::at(700).until(650), 0);
    }

    #[test]
    fn stamps_of_one_moment_are_recorded_together() {
        begin_recording();
        let mut stamps = Stamps::default();
        for us in [100, 100, 100, 150] {
            stamps.push(Stamp::at(us));
        }
        assert_eq!(stamps.0.len(), 2);
        stamps.record(Stage::Message, 200);
        assert!(stamps.is_empty());
        let mut all = exchange(Histograms::new());
        let messages = all.get(Stage::Message);
        assert_eq!((messages.histogram.len(), messages.sum_us), (4, 350));
    }

    #[test]
    fn a_set_of_histograms_has_its_size() {
        // per shard two of them: one that is recorded into, one on its way back from the collector
        let bytes = histogram::<u32>().distinct_values() * size_of::<u32>();
        assert!(bytes <= 11 << 10, "{bytes}");
    }
}
