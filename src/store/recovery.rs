//! What a start finds in the journals: the undrained changes of each user for the shard that owns him now, sent messages whose
//! fate is unknown, durable counts of streams.
//!
//! In: every record that is still on disk, drained or not, journal by journal ([`Recovery::record`]). Out: one [`Found`] per
//! shard, whatever the number of shards was before. Promise: a sent message without a mark and without a twin is forwarded
//! again, exactly once.

use std::collections::{BTreeMap, BTreeSet};

use fnv::{FnvHashMap, FnvHashSet};

use super::change::{ArchivedChange, Id, Message, StreamCount};
use super::journal::Place;
use super::overlay::{Item, Position};
use super::ring::Ring;

/// For one shard.
#[derive(Default)]
pub struct Found {
    pub undrained: Vec<(Position, Box<str>, Item)>,
    /// Deliveries that are done, whoever's they are, and refused messages.
    pub gone: Vec<(Position, u64)>,
    /// Undecided messages that were let in, whoever's they are.
    pub decided: Vec<(Position, u64)>,
    /// Messages that are not for their owners' archives after all.
    pub unarchived: Vec<(Position, u64)>,
    /// Ids of sent messages that must be forwarded again, the shard that is told of their end, and their places.
    pub forward: Vec<(u64, u16, Place)>,
    /// Ids of sent messages that have a twin but no mark; of the shard that gave them, if there is one of that number.
    pub settled: Vec<u64>,
    /// Ids that this shard gave to messages which must be forwarded again, whoever does it: the mark that ends it belongs
    /// into the journal that holds the message.
    pub open: Vec<u64>,
    pub counts: Vec<StreamCount>,
    /// The database could not be asked what it has: of users, only what is newer than this is surely the newest.
    pub doubtful: Option<Id>,
}

/// Collects what records say.
pub struct Recovery<'a> {
    ring: &'a Ring,
    /// By journal: SQL has everything up to there.
    drained: FnvHashMap<u16, u64>,
    found: Vec<Found>,
    /// Id, owner's shard and place of sent messages.
    sent: BTreeMap<u64, (usize, Place)>,
    settled: FnvHashSet<u64>,
    /// Of them those whose mark stands in the journal that holds the message.
    settled_at_home: FnvHashSet<u64>,
    twins: BTreeSet<u64>,
    counts: FnvHashMap<[u8; 32], u32>,
    last_id: Id,
}

impl<'a> Recovery<'a> {
    pub fn new(ring: &'a Ring, drained: FnvHashMap<u16, u64>) -> Recovery<'a> {
        let mut found = Vec::new();
        found.resize_with(ring.members(), Found::default);
        Recovery {
            ring,
            drained,
            found,
            sent: BTreeMap::new(),
            settled: FnvHashSet::default(),
            settled_at_home: FnvHashSet::default(),
            twins: BTreeSet::new(),
            counts: FnvHashMap::default(),
            last_id: Id(0),
        }
    }

    /// One record; those of one journal come in order. An error: it is no change of this release.
    pub fn record(
        &mut self,
        journal: u16,
        seq: u64,
        place: Place,
        change: &ArchivedChange<'_>,
    ) -> Result<(), String> {
        let at = Position { journal, seq };
        let drained = self.drained.get(&journal).is_some_and(|d| seq <= *d);
        match change {
            ArchivedChange::Message(m) => {
                let id = m.id.to_native();
                if m.what & Message::SENT != 0 && m.what & Message::RECEIVED == 0 {
                    let owner = self.ring.owner(&m.owner);
                    self.sent.insert(id, (owner, place));
                }
                if m.twin != 0 {
                    self.twins.insert(m.twin.to_native());
                }
                if !m.stream.is_empty() {
                    self.count(stream_key(&m.stream), m.count.to_native());
                }
            }
            ArchivedChange::Marks(marks) => {
                for id in marks.settled.iter().map(|id| id.to_native()) {
                    self.settled.insert(id);
                    if Id(id).shard() == journal {
                        self.settled_at_home.insert(id);
                    }
                }
                for count in marks.counts.iter() {
                    self.count(count.stream, count.count.to_native());
                }
                if !drained {
                    for id in marks.done.iter().chain(marks.dropped.iter()) {
                        for found in &mut self.found {
                            found.gone.push((at, id.to_native()));
                        }
                    }
                }
            }
            ArchivedChange::Decided { ids } if !drained => {
                for found in &mut self.found {
                    let ids = ids.iter().map(|id| (at, id.to_native()));
                    found.decided.extend(ids);
                }
            }
            ArchivedChange::Unarchived { ids } if !drained => {
                for found in &mut self.found {
                    let ids = ids.iter().map(|id| (at, id.to_native()));
                    found.unarchived.extend(ids);
                }
            }
            _ => {}
        }
        let Some(item) = Item::of(change, place)? else {
            return Ok(());
        };
        self.last_id = self.last_id.max(Id(item.id()));
        if let (false, Some(owner)) = (drained, change.owner()) {
            let shard = self.ring.owner(owner);
            self.found[shard].undrained.push((at, owner.into(), item));
        }
        Ok(())
    }

    /// The findings, one for each shard, and the highest id that was given.
    pub fn finish(mut self) -> (Vec<Found>, Id) {
        for (id, (shard, place)) in self.sent {
            let home = usize::from(Id(id).shard());
            let has_home = home < self.found.len();
            let home = if has_home { home } else { shard };
            match () {
                _ if self.settled_at_home.contains(&id) => {}
                // its shard was away for a while: the mark follows, or it could go first
                _ if self.settled.contains(&id) && has_home => self.found[home].settled.push(id),
                _ if self.settled.contains(&id) => {}
                _ if self.twins.contains(&id) => self.found[home].settled.push(id),
                _ => {
                    self.found[home].open.push(id);
                    self.found[shard].forward.push((id, home as u16, place));
                }
            }
        }
        for found in &mut self.found {
            // a stream's user is not known here: whoever owns him finds it
            found.counts = self
                .counts
                .iter()
                .map(|(stream, count)| StreamCount {
                    stream: *stream,
                    count: *count,
                })
                .collect();
        }
        (self.found, self.last_id)
    }

    fn count(&mut self, stream: [u8; 32], count: u32) {
        let known = self.counts.entry(stream).or_insert(count);
        // counts wrap at 2^32
        if (count.wrapping_sub(*known) as i32) > 0 {
            *known = count;
        }
    }
}

/// A `previd` as a journal repeats it.
pub fn stream_key(stream: &str) -> [u8; 32] {
    let mut key = [0; 32];
    let len = stream.len().min(key.len());
    key[..len].copy_from_slice(&stream.as_bytes()[..len]);
    key
}
