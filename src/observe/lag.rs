//! How late a loop is. In: its turns, and when it slept because it had nothing to do. Out: [`Stage::LoopLag`].
//!
//! A probe is due every millisecond, like an event that comes then and waits until the loop looks again. Those that are due
//! while the loop works are as late as its next look; those that are due while it sleeps wake it, so they are not. That
//! weighs by time: the quantiles are those of an event at any moment, however many short turns surround a long one. A turn
//! costs one comparison and, about once a millisecond, one record.

use super::histogram::{record, record_n};
use super::stage::Stage;

/// Between two probes.
const PROBE_US: u64 = 1000;
/// A timer of the kernel may be so late though the core is free (timer slack, and waking up).
const SLACK_US: u64 = 100;
/// Later than that, the machine was stopped: it is told once.
const STOPPED_US: u64 = 10_000_000;

/// Of one loop; all times are microseconds of one monotonic clock.
#[derive(Debug)]
pub struct LoopLag {
    due_us: u64,
    #[cfg(test)]
    seen: Lag,
}

/// What probes have met.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    pub probes: u64,
    /// How late they were, together.
    pub late_us: u64,
    /// The latest of them.
    pub worst_us: u64,
}

impl LoopLag {
    pub fn new(now_us: u64) -> LoopLag {
        LoopLag {
            due_us: now_us + PROBE_US,
            #[cfg(test)]
            seen: Lag::default(),
        }
    }

    /// The loop looks what is there: probes that were due since it looked or slept last are as late as that.
    pub fn looked(&mut self, now_us: u64) {
        if now_us < self.due_us {
            return;
        }
        if now_us - self.due_us > STOPPED_US {
            self.probe(now_us - self.due_us, 1);
            self.due_us = now_us + PROBE_US;
            return;
        }
        while self.due_us <= now_us {
            self.probe(now_us - self.due_us, 1);
            self.due_us += PROBE_US;
        }
    }

    /// The loop had nothing to do from `from_us` on, and was to be woken by an event or, at the latest, at `until_us`. It looks
    /// again now: what was due before waited for nothing, what was due after waited for the core. `until_us` is now if an
    /// event woke it.
    pub fn slept(&mut self, from_us: u64, until_us: u64, now_us: u64) {
        // due before it fell asleep: taken up when it looked, that is now, or it would not have slept
        self.looked(from_us);
        let served_until = (until_us + SLACK_US).min(now_us);
        if self.due_us <= served_until {
            let served = (served_until - self.due_us) / PROBE_US + 1;
            self.probe(0, served);
            self.due_us += served * PROBE_US;
        }
        self.looked(now_us);
    }

    /// What was seen since it was taken last.
    #[cfg(test)]
    fn take(&mut self) -> Lag {
        std::mem::take(&mut self.seen)
    }

    fn probe(&mut self, late_us: u64, n: u64) {
        match n {
            1 => record(Stage::LoopLag, late_us),
            n => record_n(Stage::LoopLag, late_us, n.min(u64::from(u32::MAX)) as u32),
        }
        #[cfg(test)]
        {
            self.seen.probes += n;
            self.seen.late_us += late_us * n;
            self.seen.worst_us = self.seen.worst_us.max(late_us);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::histogram::{Histograms, begin_recording, exchange};
    use super::*;

    fn lag(probes: u64, late_us: u64, worst_us: u64) -> Lag {
        Lag {
            probes,
            late_us,
            worst_us,
        }
    }

    #[test]
    fn a_long_turn_delays_every_probe_that_was_due_in_it() {
        begin_recording();
        let mut loop_lag = LoopLag::new(0);
        for us in (0..1000).step_by(10) {
            loop_lag.looked(us);
        }
        assert_eq!(loop_lag.take(), Lag::default());
        // the turn from 990 to 4200: probes at 1000, 2000, 3000, 4000
        loop_lag.looked(4200);
        assert_eq!(loop_lag.take(), lag(4, 3200 + 2200 + 1200 + 200, 3200));
        loop_lag.looked(4900);
        assert_eq!(loop_lag.take(), Lag::default());
        let mut recorded = exchange(Histograms::new());
        let recorded = recorded.get(Stage::LoopLag);
        assert_eq!((recorded.histogram.len(), recorded.sum_us), (4, 6800));
    }

    #[test]
    fn a_sleeping_loop_is_not_late() {
        let mut loop_lag = LoopLag::new(0);
        // woken by an event
        loop_lag.slept(10, 5500, 5500);
        assert_eq!(loop_lag.take(), lag(5, 0, 0));
        // woken by the timer, within its slack
        loop_lag.slept(5600, 6600, 6690);
        assert_eq!(loop_lag.take(), lag(1, 0, 0));
        // probes are due again at the same pace
        loop_lag.looked(7010);
        assert_eq!(loop_lag.take(), lag(1, 10, 10));
    }

    #[test]
    fn a_loop_that_is_woken_late_is_late() {
        let mut loop_lag = LoopLag::new(0);
        // to be woken at 1500, had the core back at 9200: 1000 was served, 2000 to 9000 were not
        loop_lag.slept(600, 1500, 9200);
        assert_eq!(loop_lag.take(), lag(9, 200 * 8 + 1000 * 28, 7200));
    }

    #[test]
    fn a_probe_that_was_due_in_the_turn_before_the_sleep_counts() {
        let mut loop_lag = LoopLag::new(0);
        loop_lag.slept(1300, 2300, 2310);
        assert_eq!(loop_lag.take(), lag(2, 300, 300));
    }

    #[test]
    fn a_machine_that_stood_still_is_told_once() {
        let mut loop_lag = LoopLag::new(0);
        loop_lag.looked(3_600_000_000);
        assert_eq!(loop_lag.take(), lag(1, 3_599_999_000, 3_599_999_000));
        loop_lag.looked(3_600_001_000);
        assert_eq!(loop_lag.take(), lag(1, 0, 0));
    }
}
