//! The one place that decides when a stanza may be acknowledged (XEP-0198 `h`).
//!
//! Stanzas in -> numbers; fates in (durable, delivered or refused) -> the longest prefix whose fate is decided. A stanza whose
//! handling is over at once costs one increment. One that waits (for another shard, for a user to be loaded, for a write)
//! holds `h` back until the last part of it is settled. The journal's group commits will settle stanzas through here too.

use std::collections::VecDeque;

use crate::observe::Stamp;

#[derive(Debug, Default)]
pub struct Acceptance {
    /// Stanzas read, modulo 2^32 (XEP-0198 section 4).
    received: u32,
    /// Those without a decided fate, oldest first.
    open: VecDeque<Open>,
    /// The client asked (`<r/>`) when it had sent that many; not answered yet.
    asked: VecDeque<u32>,
}

/// A stanza without a decided fate.
#[derive(Debug)]
struct Open {
    seq: u32,
    /// How many parts of it are open.
    parts: u16,
    read: Stamp,
}

impl Acceptance {
    /// Counts a stanza; its number.
    pub fn receive(&mut self) -> u32 {
        self.received = self.received.wrapping_add(1);
        self.received
    }

    /// One more part of stanza `seq` is open; the first part is so since it was read, `now`.
    pub fn defer(&mut self, seq: u32, now: Stamp) {
        match self.open.back_mut() {
            Some(last) if last.seq == seq => last.parts += 1,
            // a part that ends in a further one: younger stanzas may wait already, but this one still has its entry
            Some(last) if (seq.wrapping_sub(last.seq) as i32) < 0 => {
                if let Some(open) = self.open.iter_mut().find(|open| open.seq == seq) {
                    open.parts += 1;
                }
            }
            _ => self.open.push_back(Open {
                seq,
                parts: 1,
                read: now,
            }),
        }
    }

    /// An error for the client waits behind other things: `h` stays where it is until the part of the stanza that is given here
    /// is settled, so that no count covers what the error answers before the client has it. `None`: nothing is counted yet.
    pub fn hold(&mut self, now: Stamp) -> Option<u32> {
        let seq = self.open.front().map_or(self.received, |open| open.seq);
        if seq == 0 && self.open.is_empty() {
            return None;
        }
        self.defer(seq, now);
        Some(seq)
    }

    /// A part of stanza `seq` is decided. If it was the last one: when the stanza was read.
    pub fn settle(&mut self, seq: u32) -> Option<Stamp> {
        let front = self.open.front()?.seq;
        // numbers ascend, but a stanza without open parts has no entry
        let guess = (seq.wrapping_sub(front) as usize).min(self.open.len().saturating_sub(1));
        let at = (0..=guess).rev().find(|i| self.open[*i].seq == seq)?;
        let open = &mut self.open[at];
        open.parts = open.parts.saturating_sub(1);
        let read = (open.parts == 0).then_some(open.read);
        while self.open.front().is_some_and(|open| open.parts == 0) {
            self.open.pop_front();
        }
        if self.open.is_empty() {
            self.open.shrink_to_fit();
        }
        read
    }

    /// The count that may be acknowledged: the longest prefix of decided stanzas.
    pub fn h(&self) -> u32 {
        match self.open.front() {
            Some(open) => open.seq.wrapping_sub(1),
            None => self.received,
        }
    }

    /// Stanzas read, decided or not.
    pub fn received(&self) -> u32 {
        self.received
    }

    /// `<r/>` came. `false`: too many are waiting for their answer.
    #[must_use]
    pub fn ask(&mut self, waiting_max: usize) -> bool {
        if self.asked.len() >= waiting_max {
            return false;
        }
        self.asked.push_back(self.received);
        true
    }

    /// The next answer that is due, what it covers at least and at most: all that was read before its `<r/>` is decided.
    pub fn due(&self) -> Option<(u32, u32)> {
        let asked = *self.asked.front()?;
        let h = self.h();
        (!is_behind(h, asked)).then_some((asked, h))
    }

    /// It was given.
    pub fn answered(&mut self) {
        self.asked.pop_front();
        if self.asked.is_empty() {
            self.asked.shrink_to_fit();
        }
    }

    pub fn forget_asked(&mut self) {
        self.asked.clear();
    }

    pub fn waiting(&self) -> usize {
        self.open.len()
    }
}

/// Is count `a` smaller than `b`? Counts wrap (XEP-0198 section 4).
pub fn is_behind(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Stamp = Stamp::FIRST;

    #[test]
    fn h_is_the_longest_decided_prefix() {
        let mut a = Acceptance::default();
        for _ in 0..5 {
            let seq = a.receive();
            if seq == 2 || seq == 4 {
                a.defer(seq, NOW);
                a.defer(seq, NOW);
            }
        }
        assert_eq!(a.h(), 1);
        a.settle(4);
        a.settle(4);
        assert_eq!(a.h(), 1);
        a.settle(2);
        assert_eq!(a.h(), 1);
        a.settle(2);
        assert_eq!(a.h(), 5);
    }

    #[test]
    fn an_answer_waits_for_what_was_asked_about_and_no_longer() {
        let mut a = Acceptance::default();
        let seq = a.receive();
        a.defer(seq, NOW);
        assert!(a.ask(8));
        assert_eq!(a.due(), None);
        let later = a.receive();
        a.defer(later, NOW);
        a.settle(seq);
        assert_eq!(a.due(), Some((1, 1)));
        a.answered();
        assert_eq!(a.due(), None);
    }

    #[test]
    fn a_part_may_end_in_a_further_part_while_younger_stanzas_wait() {
        let mut a = Acceptance::default();
        let (old, young) = (a.receive(), a.receive());
        a.defer(old, NOW);
        a.defer(young, NOW);
        a.defer(old, NOW);
        a.settle(old);
        a.settle(young);
        assert_eq!(a.h(), 0);
        a.settle(old);
        assert_eq!(a.h(), 2);
    }

    #[test]
    fn an_error_that_waits_holds_the_count_where_it_is() {
        let mut a = Acceptance::default();
        assert_eq!(a.hold(NOW), None);
        a.receive();
        // of the stanza that was read last, whatever is read meanwhile
        let held = a.hold(NOW).unwrap();
        a.receive();
        assert_eq!(a.h(), 0);
        a.settle(held);
        assert_eq!(a.h(), 2);
        // of one that is open
        let open = a.receive();
        a.defer(open, NOW);
        a.receive();
        let held = a.hold(NOW).unwrap();
        a.settle(open);
        assert_eq!(a.h(), 2);
        a.settle(held);
        assert_eq!(a.h(), 4);
    }

    #[test]
    fn counts_wrap() {
        let mut a = Acceptance {
            received: u32::MAX,
            ..Default::default()
        };
        let seq = a.receive();
        assert_eq!(seq, 0);
        a.defer(seq, NOW);
        assert_eq!(a.h(), u32::MAX);
        a.settle(0);
        assert_eq!(a.h(), 0);
    }

    #[test]
    fn settling_what_is_not_open_changes_nothing() {
        let mut a = Acceptance::default();
        a.settle(7);
        let seq = a.receive();
        a.defer(seq, NOW);
        a.settle(99);
        assert_eq!(a.h(), 0);
    }
}
