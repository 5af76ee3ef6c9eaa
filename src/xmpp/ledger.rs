//! What a slice has decided and must not say before it is durable.
//!
//! In: changes, and what is to happen when each is durable. Out: groups of changes for the journal, one after the other
//! ([`Ledger::seal`]), and when a group is durable the acts that waited for it, in the order in which they came. Promises:
//! nothing is delivered, settled or answered before the group that holds it is durable; what must not overtake an act of a
//! user (another stanza for him) queues behind it, though it needs no journal itself.

use std::collections::VecDeque;
use std::rc::Rc;

use fnv::{FnvHashMap, FnvHashSet};

use super::batch::{Receipt, Span, Spans};
use super::meta::Meta;
use super::session::SessionId;
use super::slice::Then;
use crate::store::change::{Change, Id, Marks, StreamCount};
use crate::store::journal::{Group, Slot};

/// Marks may wait so long for other changes to go with.
const MARKS_WAIT_MS: u64 = 50;
/// More marks go at once.
const MARKS_MAX: usize = 4096;

/// An act, and the change that it waits for.
pub struct Entry {
    /// Of the change; 0: none, it only queues behind others.
    pub seq: u64,
    pub slot: Option<Slot>,
    pub user: Rc<str>,
    pub act: Act,
}

pub enum Act {
    /// A message has come in for the user: deliver it.
    Received {
        to: Span,
        meta: Meta,
        receipt: Option<Receipt>,
    },
    /// The user's session has sent a message: his other sessions may see it. `stanza`: it is in no journal.
    Sent {
        session: SessionId,
        to: Span,
        from: Span,
        stanza: Option<Span>,
        meta: Meta,
        receipt: Option<Receipt>,
    },
    /// A stanza for the user that needs no journal, but must not overtake.
    Behind {
        to: Span,
        from: Span,
        stanza: Span,
        meta: Meta,
        receipt: Option<Receipt>,
    },
    /// A stanza of the user's for a component: it must not overtake what he sent before, nor be read before it is durable.
    ToComponent {
        to: Span,
        from: Span,
        stanza: Span,
        meta: Meta,
        receipt: Option<Receipt>,
    },
    /// Presence of one of the user's contacts, who may have sent him messages before.
    Presence {
        from: Span,
        stanza: Span,
        meta: Meta,
    },
    /// A stanza of the user's that changes something of another one: it goes there until it is settled.
    Forward {
        to: Span,
        from: Span,
        meta: Meta,
        receipt: Receipt,
    },
    /// A message to a chat room, the user here: everybody in it gets it.
    Reflected {
        meta: Meta,
        receipt: Option<Receipt>,
    },
    /// A change of the user's data.
    Written {
        then: Then,
    },
    /// The journal knows so many stanzas of a session.
    Counted {
        session: SessionId,
        count: u32,
    },
    /// Deliveries of the user's that a client took.
    Done(Vec<u64>),
    Dropped(Vec<u64>),
    /// Messages that were accepted before their recipient was known, and are let in.
    Decided(Vec<u64>),
    /// Such messages that are not for his archive.
    Unarchived(Vec<(Rc<str>, u64)>),
    /// Something in the user's archive is shown no more.
    Retracted,
}

/// Acts and the strings that they name.
#[derive(Default)]
pub struct Acts {
    pub entries: Vec<Entry>,
    pub strings: Spans,
}

#[derive(Default)]
pub struct Ledger {
    group: Group,
    acts: Acts,
    /// Of the group that is being committed; the floor that will be durable with it, and whether nothing foreign is open then.
    flying: Option<(Acts, u64, bool)>,
    /// A set at rest.
    spare: (Option<Group>, Option<Acts>),
    next_seq: u64,
    sealed_seq: u64,
    last_id: Id,
    shard: u16,
    /// Acts that wait, by user.
    behind: FnvHashMap<Rc<str>, u32>,
    /// Ids of sent messages whose fate at their recipient is not durable, ascending; settled ones in the middle are marked.
    open: VecDeque<(u64, bool)>,
    /// The same, of messages to which another shard of an earlier start gave their ids: their senders have moved here.
    foreign: FnvHashSet<u64>,
    /// Not all of them are settled, durably.
    foreign_open: bool,
    done: Vec<(Rc<str>, u64)>,
    dropped: Vec<(Rc<str>, u64)>,
    decided: Vec<u64>,
    unarchived: Vec<(Rc<str>, u64)>,
    settled: Vec<u64>,
    counts: Vec<StreamCount>,
    marks_since_ms: Option<u64>,
    /// The journal takes no new messages and changes: its bound, or the disk's, is reached.
    pub full: bool,
}

/// Messages of which no journal says yet, or none that was heard of, that
#[derive(Default)]
pub struct Marked {
    /// they are done or dropped,
    pub gone: FnvHashSet<u64>,
    /// they are let in,
    pub decided: FnvHashSet<u64>,
    /// they are in no archive.
    pub unarchived: FnvHashSet<u64>,
}

impl Ledger {
    /// `next_seq` and `last_id` (the highest of any shard) go on from what the journals hold.
    pub fn new(shard: u16, next_seq: u64, last_id: Id) -> Ledger {
        Ledger {
            shard,
            next_seq: next_seq.max(1),
            last_id: last_id.last_of_ms(),
            sealed_seq: next_seq.max(1) - 1,
            ..Ledger::default()
        }
    }

    /// A new id; see [`Id`].
    pub fn next_id(&mut self, unix_ms: u64) -> u64 {
        self.last_id = Id::next(self.last_id, unix_ms, self.shard);
        self.last_id.0
    }

    /// Do acts of the user wait?
    pub fn holds(&self, user: &str) -> bool {
        !self.behind.is_empty() && self.behind.contains_key(user)
    }

    /// An act that waits for `change`.
    pub fn journal(&mut self, user: &Rc<str>, change: &Change<'_>, act: Act) {
        let seq = self.next_seq;
        self.next_seq += 1;
        let slot = self.group.append(seq, change);
        self.put(seq, Some(slot), user, act);
    }

    /// An act that only queues behind those of the same user.
    pub fn queue(&mut self, user: &Rc<str>, act: Act) {
        self.put(0, None, user, act);
    }

    fn put(&mut self, seq: u64, slot: Option<Slot>, user: &Rc<str>, act: Act) {
        if matches!(
            act,
            Act::Received { .. }
                | Act::Sent { .. }
                | Act::Behind { .. }
                | Act::ToComponent { .. }
                | Act::Presence { .. }
        ) {
            *self.behind.entry(user.clone()).or_insert(0) += 1;
        }
        self.acts.entries.push(Entry {
            seq,
            slot,
            user: user.clone(),
            act,
        });
    }

    /// An act is done.
    pub fn release(&mut self, user: &str) {
        if let Some(count) = self.behind.get_mut(user) {
            *count -= 1;
            if *count == 0 {
                self.behind.remove(user);
            }
        }
    }

    /// Strings of acts that are not done yet.
    pub fn keep(&mut self, text: &[u8]) -> Span {
        self.acts.strings.put(text)
    }

    /// A sent message is on its way to its recipient's owner; it may be one that an earlier start left open.
    pub fn opened(&mut self, id: u64) {
        if Id(id).shard() != self.shard {
            self.foreign.insert(id);
            self.foreign_open = true;
        } else if self.open.back().is_none_or(|(last, _)| *last < id) {
            self.open.push_back((id, false));
        } else if let Err(at) = self.open.binary_search_by_key(&id, |(open, _)| *open) {
            self.open.insert(at, (id, false));
        }
    }

    /// Its fate is durable there.
    pub fn settled(&mut self, id: u64, now_ms: u64) {
        if !self.foreign.remove(&id) {
            let Ok(at) = self.open.binary_search_by_key(&id, |(open, _)| *open) else {
                return;
            };
            self.open[at].1 = true;
            while self.open.front().is_some_and(|(_, settled)| *settled) {
                self.open.pop_front();
            }
        }
        self.settled.push(id);
        self.mark(now_ms);
    }

    pub fn done(&mut self, user: &Rc<str>, id: u64, now_ms: u64) {
        self.done.push((user.clone(), id));
        self.mark(now_ms);
    }

    pub fn dropped(&mut self, user: &Rc<str>, id: u64, now_ms: u64) {
        self.dropped.push((user.clone(), id));
        self.mark(now_ms);
    }

    /// A message that nobody could decide when it was accepted is let in. A later change of its recipient's (a block) is never
    /// durable before this is.
    pub fn decided(&mut self, id: u64, now_ms: u64) {
        self.decided.push(id);
        self.mark(now_ms);
    }

    /// A message that nobody could decide when it was accepted is let in, but not into the archive.
    pub fn unarchived(&mut self, user: &Rc<str>, id: u64, now_ms: u64) {
        self.unarchived.push((user.clone(), id));
        self.mark(now_ms);
    }

    /// Counts of streams, to be repeated in the journal.
    pub fn count(&mut self, counts: impl Iterator<Item = StreamCount>, now_ms: u64) {
        self.counts.extend(counts);
        self.mark(now_ms);
    }

    /// What no journal says yet, or none that was heard of.
    pub fn marked(&self) -> Marked {
        let waiting = self.done.iter().chain(&self.dropped).map(|(_, id)| *id);
        let mut marked = Marked {
            gone: waiting.collect(),
            decided: self.decided.iter().copied().collect(),
            unarchived: self.unarchived.iter().map(|(_, id)| *id).collect(),
        };
        let flying = self.flying.iter().flat_map(|(acts, ..)| &acts.entries);
        for entry in flying {
            match &entry.act {
                Act::Done(ids) | Act::Dropped(ids) => marked.gone.extend(ids),
                Act::Decided(ids) => marked.decided.extend(ids),
                Act::Unarchived(ids) => marked.unarchived.extend(ids.iter().map(|(_, id)| *id)),
                _ => {}
            }
        }
        marked
    }

    /// Marks do not wait any more.
    pub fn hurry(&mut self) {
        if let Some(since) = &mut self.marks_since_ms {
            *since = 0;
        }
    }

    fn mark(&mut self, now_ms: u64) {
        self.marks_since_ms.get_or_insert(now_ms);
    }

    /// The last change of the group that was sealed last.
    pub fn sealed_seq(&self) -> u64 {
        self.sealed_seq
    }

    pub fn is_flying(&self) -> bool {
        self.flying.is_some()
    }

    /// Bytes that wait for the next group.
    pub fn bytes(&self) -> usize {
        self.group.bytes() + self.acts.strings.len()
    }

    /// Acts that wait for the next group.
    pub fn waiting(&self) -> usize {
        self.acts.entries.len()
    }

    /// When the next group wants to go: `None`: nothing waits; else ms of the monotonic clock, now for acts.
    pub fn due_ms(&self, now_ms: u64) -> Option<u64> {
        if !self.acts.entries.is_empty() {
            return Some(now_ms);
        }
        let since = self.marks_since_ms?;
        let marks = self.done.len()
            + self.dropped.len()
            + self.decided.len()
            + self.unarchived.len()
            + self.settled.len()
            + self.counts.len();
        Some(match marks < MARKS_MAX {
            true => since + MARKS_WAIT_MS,
            false => now_ms,
        })
    }

    /// Closes the group: it is to be committed, then given to [`super::slice::Slice::committed`]. `None`: there is nothing to
    /// write, run the acts at once. Only when none is flying.
    pub fn seal(&mut self) -> Option<Group> {
        assert!(self.flying.is_none(), "one group at a time");
        if self.marks_since_ms.take().is_some() {
            self.append_marks();
        }
        let acts = self.spare.1.take().unwrap_or_default();
        let acts = std::mem::replace(&mut self.acts, acts);
        self.flying = Some((acts, self.floor(), self.foreign.is_empty()));
        self.sealed_seq = self.next_seq - 1;
        if self.group.is_empty() {
            // nothing to commit: the caller runs the acts
            return None;
        }
        let group = self.spare.0.take().unwrap_or_default();
        Some(std::mem::replace(&mut self.group, group))
    }

    fn append_marks(&mut self) {
        let ids = |marks: &[(Rc<str>, u64)]| marks.iter().map(|(_, id)| *id).collect::<Vec<_>>();
        let (done, dropped) = (ids(&self.done), ids(&self.dropped));
        let marks = Marks {
            done: &done,
            dropped: &dropped,
            settled: &self.settled,
            counts: &self.counts,
        };
        let seq = self.next_seq;
        self.next_seq += 1;
        let slot = self.group.append(seq, &Change::Marks(marks));
        self.settled.clear();
        self.counts.clear();
        for (marks, act) in [
            (
                std::mem::take(&mut self.done),
                Act::Done as fn(Vec<u64>) -> Act,
            ),
            (std::mem::take(&mut self.dropped), Act::Dropped),
        ] {
            for same in marks.chunk_by(|a, b| Rc::ptr_eq(&a.0, &b.0)) {
                let act = act(same.iter().map(|(_, id)| *id).collect());
                self.put(seq, Some(slot), &same[0].0, act);
            }
        }
        if !self.decided.is_empty() {
            let ids = std::mem::take(&mut self.decided);
            let act = Act::Decided(ids.clone());
            self.journal(&Rc::from(""), &Change::Decided { ids: &ids }, act);
        }
        if !self.unarchived.is_empty() {
            let unarchived = std::mem::take(&mut self.unarchived);
            let ids = ids(&unarchived);
            let act = Act::Unarchived(unarchived);
            self.journal(&Rc::from(""), &Change::Unarchived { ids: &ids }, act);
        }
    }

    /// All sent messages with a smaller id are settled, in memory.
    fn floor(&self) -> u64 {
        match self.open.front() {
            Some((id, _)) => *id,
            None => self.last_id.0 + 1,
        }
    }

    /// The acts of the group that has become durable, and what is settled now for good.
    pub fn landed(&mut self) -> (Acts, u64) {
        let (acts, floor, foreign_settled) = self.flying.take().expect("a group was flying");
        self.foreign_open &= !foreign_settled;
        (acts, floor)
    }

    /// Nothing to which another shard gave its id is open any more, durably: from now on floors are each shard's own.
    pub fn foreign_settled(&self) -> bool {
        !self.foreign_open
    }

    /// A buffer for a next group.
    pub fn give_back(&mut self, mut group: Group) {
        group.clear();
        self.spare.0 = Some(group);
    }

    pub fn give_back_acts(&mut self, mut acts: Acts) {
        const BYTES_MAX: usize = 1 << 20;
        if acts.strings.len() <= BYTES_MAX {
            acts.entries.clear();
            acts.strings.clear();
            self.spare.1 = Some(acts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_known_from_when_they_are_made_until_their_group_is_durable() {
        let mut ledger = Ledger::new(0, 1, Id(0));
        let user: Rc<str> = "juliet".into();
        ledger.dropped(&user, 1, 0);
        ledger.decided(2, 0);
        ledger.unarchived(&user, 3, 0);
        let all = |ledger: &Ledger| {
            let Marked {
                gone,
                decided,
                unarchived,
            } = ledger.marked();
            [gone, decided, unarchived].map(|ids| ids.into_iter().collect::<Vec<_>>())
        };
        assert_eq!(all(&ledger), [[1], [2], [3]]);
        assert!(ledger.seal().is_some());
        assert_eq!(all(&ledger), [[1], [2], [3]], "on its way");
        ledger.landed();
        assert_eq!(all(&ledger), [[0; 0]; 3]);
    }
}
