//! How deep a queue was lately. In: its depth, whenever it is known. Out: the highest of the last half minute to minute, so
//! that a reader who comes every fifteen seconds misses none. One core's: no lock.

use std::cell::Cell;

/// Milliseconds of half the time that is remembered.
const HALF_MS: u64 = 30_000;

#[derive(Debug, Default)]
pub struct HighWater {
    now: Cell<u64>,
    before: Cell<u64>,
    since_ms: Cell<u64>,
}

impl HighWater {
    pub fn saw(&self, depth: u64) {
        if depth > self.now.get() {
            self.now.set(depth);
        }
    }

    /// The highest lately, at this moment of a monotonic clock.
    pub fn get(&self, now_ms: u64) -> u64 {
        if now_ms.saturating_sub(self.since_ms.get()) >= HALF_MS {
            self.since_ms.set(now_ms);
            self.before.set(self.now.replace(0));
        }
        self.now.get().max(self.before.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_high_depth_is_told_for_half_a_minute_at_least_and_a_minute_at_most() {
        let high = HighWater::default();
        high.saw(3);
        high.saw(9);
        high.saw(1);
        assert_eq!(high.get(29_999), 9);
        assert_eq!(high.get(30_000), 9);
        high.saw(2);
        assert_eq!(high.get(59_000), 9);
        assert_eq!(high.get(60_000), 2);
        assert_eq!(high.get(90_000), 0);
    }
}
