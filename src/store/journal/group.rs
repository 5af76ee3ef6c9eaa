//! What a shard collects while a commit is under way, without a disk.
//!
//! In: changes, in the order in which they became true. Out: the bytes of a group, and where in the journal each change
//! is once they are written ([`Committed::place`]). Promise: a buffer is used over and over; nothing is copied twice.

use std::time::Duration;

use smallvec::SmallVec;

use super::format::{GROUP_HEAD, PAYLOAD_BYTES_MAX, RECORD_HEAD, u32_at};
use crate::store::change::{ArchivedChange, Change, Id, Message};

/// A buffer that has grown beyond this is given back when it is cleared.
const KEPT_BYTES_MAX: usize = 4 << 20;

/// Records that are to be committed together.
#[derive(Debug)]
pub struct Group {
    /// Room for the group's head, then the records, each behind its length and room for its checksum.
    pub(super) bytes: Vec<u8>,
    first_seq: u64,
    records: u32,
    pub(super) pins: Pins,
    pub(super) written: Written,
}

/// How far a group that was submitted has come; it is written in more than one piece if it is larger than a segment.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Bytes of the buffer that are durable, its head not counted, and the records in them.
    pub bytes: usize,
    pub records: u32,
    pub extents: SmallVec<[Extent; 1]>,
}

/// A piece of a group's buffer, and where it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// Of the first record in the buffer.
    pub from: u32,
    pub file: u32,
    /// Of the same record in the file.
    pub offset: u32,
}

/// A payload in a group's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub(crate) offset: u32,
    pub(crate) len: u32,
}

/// A payload in a journal. Good until its record is drained and its segment is recycled: then it is in SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// A number that is given once in a process.
    pub file: u32,
    /// Of the payload, in bytes.
    pub offset: u32,
    pub len: u32,
}

/// A group that is durable.
#[derive(Debug)]
pub struct Committed {
    /// The buffer, to be used again; its payloads can still be read.
    pub group: Group,
    /// From submission to durability.
    pub took: Duration,
}

impl Default for Group {
    fn default() -> Group {
        Group::new()
    }
}

impl Group {
    pub fn new() -> Group {
        Group {
            bytes: vec![0; GROUP_HEAD as usize],
            first_seq: 0,
            records: 0,
            pins: Pins::default(),
            written: Written::default(),
        }
    }

    /// Makes it empty.
    pub fn clear(&mut self) {
        self.bytes.truncate(GROUP_HEAD as usize);
        if self.bytes.capacity() > KEPT_BYTES_MAX {
            self.bytes.shrink_to(KEPT_BYTES_MAX);
        }
        (self.first_seq, self.records) = (0, 0);
        self.pins = Pins::default();
        self.written = Written::default();
    }

    /// Adds a record. Sequence numbers of a journal follow one by one, beginning with
    /// [`super::Writer::next_seq`].
    ///
    /// # Panics
    /// If `seq` is not the next one, or the change is longer than [`super::PAYLOAD_BYTES_MAX`]: limits on stanzas and
    /// records are far below it.
    pub fn append(&mut self, seq: u64, change: &Change) -> Slot {
        if self.records == 0 {
            self.first_seq = seq;
        }
        assert_eq!(seq, self.next_seq(), "sequence numbers follow one by one");
        let head = self.bytes.len();
        let payload = head + RECORD_HEAD as usize;
        self.bytes.resize(payload, 0);
        change.encode(&mut self.bytes);
        let len = self.bytes.len() - payload;
        assert!(
            len <= PAYLOAD_BYTES_MAX as usize,
            "a change of {len} bytes is beyond every limit"
        );
        self.bytes[head..head + 4].copy_from_slice(&(len as u32).to_le_bytes());
        self.records += 1;
        self.pins.add_change(change);
        Slot {
            offset: u32::try_from(payload).expect("a group is far below 4 GiB"),
            len: len as u32,
        }
    }

    /// The bytes of [`Change::encode`]; they can also be read when the group has been committed, until it is cleared.
    pub fn payload(&self, slot: Slot) -> &[u8] {
        &self.bytes[slot.offset as usize..(slot.offset + slot.len) as usize]
    }

    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Sequence numbers and payloads.
    #[cfg(test)]
    pub fn iter(&self) -> impl Iterator<Item = (u64, Slot)> {
        let mut at = GROUP_HEAD as usize;
        (self.first_seq..self.next_seq()).map(move |seq| {
            let len = u32_at(&self.bytes, at);
            let offset = (at + RECORD_HEAD as usize) as u32;
            at = (offset + len) as usize;
            (seq, Slot { offset, len })
        })
    }

    pub fn records(&self) -> u32 {
        self.records
    }

    /// As they will be written.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Of the first record; 0 if there is none.
    pub fn first_seq(&self) -> u64 {
        self.first_seq
    }

    /// Behind the last record; 0 if there is none.
    pub fn next_seq(&self) -> u64 {
        self.first_seq + u64::from(self.records)
    }

    /// What is not durable yet and fits into `room` bytes together with a head: end in the buffer, number of records.
    /// All of it if possible, else as many records as fit, but no cut between a change and its other half, which is forwarded
    /// to somebody else ([`Message::SENT`] alone), unless nothing would be left: a crash must not find the one without the other.
    pub(super) fn piece(&self, room: u32) -> (usize, u32) {
        let from = GROUP_HEAD as usize + self.written.bytes;
        let room = from + (room.saturating_sub(GROUP_HEAD)) as usize;
        if self.bytes.len() <= room {
            return (self.bytes.len(), self.records - self.written.records);
        }
        let (mut at, mut records) = (from, 0);
        let mut cut = (from, 0);
        loop {
            let payload = at + RECORD_HEAD as usize;
            let end = payload + u32_at(&self.bytes, at) as usize;
            if records > 0 && !is_forward(&self.bytes[payload..end]) {
                cut = (at, records);
            }
            if end > room {
                return if cut.1 > 0 { cut } else { (at, records) };
            }
            (at, records) = (end, records + 1);
        }
    }
}

fn is_forward(payload: &[u8]) -> bool {
    match ArchivedChange::access(payload) {
        Ok(ArchivedChange::Message(message)) => message.what == Message::SENT,
        _ => false,
    }
}

impl Committed {
    /// The segment that the group ends in; see [`Place::file`].
    pub fn file(&self) -> u32 {
        self.group.written.extents.last().map_or(0, |e| e.file)
    }

    /// Where the payload is from now on.
    pub fn place(&self, slot: Slot) -> Place {
        let extents = &self.group.written.extents;
        let extent = extents.iter().rfind(|e| e.from <= slot.offset);
        let extent = extent.expect("a committed group is somewhere");
        Place {
            file: extent.file,
            offset: slot.offset - extent.from + extent.offset,
            len: slot.len,
        }
    }
}

/// For each shard the highest id that its floor must have passed before a record may go: a sent message until its fate
/// at the other side is known to be durable, a received one until its twin cannot be forwarded again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pins(SmallVec<[(u16, u64); 4]>);

impl Pins {
    pub fn add_change(&mut self, change: &Change) {
        if let Change::Message(message) = change {
            self.add_message(message.what, message.id, message.twin);
        }
    }

    pub fn add_archived(&mut self, change: &ArchivedChange) {
        if let ArchivedChange::Message(message) = change {
            self.add_message(
                message.what,
                message.id.to_native(),
                message.twin.to_native(),
            );
        }
    }

    fn add_message(&mut self, what: u8, id: u64, twin: u64) {
        if what & Message::RECEIVED == 0 {
            if what & Message::SENT != 0 {
                self.add(id);
            }
        } else if twin != 0 {
            self.add(twin);
        }
    }

    fn add(&mut self, id: u64) {
        let shard = shard_of(id);
        match self.0.iter_mut().find(|(of, _)| *of == shard) {
            Some((_, highest)) => *highest = id.max(*highest),
            None => self.0.push((shard, id)),
        }
    }

    pub fn merge(&mut self, other: &Pins) {
        other.0.iter().for_each(|(_, id)| self.add(*id));
    }

    /// Whether all floors are above; a shard without a floor has passed nothing.
    pub fn are_passed(&self, floor: impl Fn(usize) -> Option<u64>) -> bool {
        let passed = |(shard, id): &(u16, u64)| floor(usize::from(*shard)) > Some(*id);
        self.0.iter().all(passed)
    }

    #[cfg(test)]
    pub fn of(ids: &[u64]) -> Pins {
        let mut pins = Pins::default();
        ids.iter().for_each(|id| pins.add(*id));
        pins
    }
}

/// The shard that gave an [`Id`].
fn shard_of(id: u64) -> u16 {
    // bits 13 to 20 of `Id`
    ((id >> 13) & (Id::SHARDS_MAX as u64 - 1)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shard_of_an_id_is_the_one_that_gave_it() {
        for shard in [0, 1, 200, 255] {
            assert_eq!(shard_of(Id::next(Id(0), 1_790_000_000_000, shard).0), shard);
        }
    }

    #[test]
    fn a_pin_holds_until_the_floor_is_above_it() {
        let id = |ms, shard| Id::next(Id(0), ms, shard).0;
        let pins = Pins::of(&[id(5, 1), id(9, 1), id(7, 2)]);
        let floors = |one, two| move |shard| [None, Some(one), Some(two)][shard];
        assert!(pins.are_passed(floors(id(9, 1) + 1, id(8, 2))));
        assert!(!pins.are_passed(floors(id(9, 1), id(8, 2))));
        assert!(!pins.are_passed(floors(id(10, 1), 0)));
        assert!(!Pins::of(&[id(1, 0)]).are_passed(floors(0, 0)));
    }

    #[test]
    fn a_group_is_cut_between_records() {
        let mut group = Group::new();
        let removal = |n| Change::RemoveUser {
            name: "somebody",
            revision: n,
        };
        let slots: Vec<_> = (7..17).map(|n| group.append(n, &removal(n))).collect();
        let one = (group.bytes() as u32 - GROUP_HEAD) / 10;
        assert_eq!(group.piece(u32::MAX), (group.bytes(), 10));
        assert_eq!(
            group.piece(GROUP_HEAD + 3 * one + one / 2),
            ((GROUP_HEAD + 3 * one) as usize, 3)
        );
        assert_eq!(group.piece(GROUP_HEAD), (GROUP_HEAD as usize, 0));
        assert!(ArchivedChange::access(group.payload(slots[9])).is_ok());
    }

    #[test]
    fn a_change_and_its_other_half_are_never_cut_apart() {
        let mut group = Group::new();
        let removal = Change::RemoveUser {
            name: "somebody",
            revision: 1,
        };
        let half = Change::Message(Message {
            id: 5,
            owner: "somebody",
            what: Message::SENT,
            kind: 0,
            flags: 0,
            peer: "other@localhost",
            twin: 0,
            stream: "",
            count: 0,
            stanza: b"<presence type='subscribe'/>",
        });
        let end = |slot: Slot| (slot.offset + slot.len) as usize;
        let first = group.append(7, &removal);
        let change = group.append(8, &removal);
        let halves = [group.append(9, &half), group.append(10, &half)];
        let last = group.append(11, &removal);
        for room in end(change)..end(halves[1]) {
            assert_eq!(group.piece(room as u32), (end(first), 1));
        }
        for room in end(halves[1])..end(last) {
            assert_eq!(group.piece(room as u32), (end(halves[1]), 4));
        }
        // they alone are more than a segment: better than nothing
        group.written.bytes = end(first) - GROUP_HEAD as usize;
        group.written.records = 1;
        let room = end(halves[0]) - end(first) + GROUP_HEAD as usize;
        assert_eq!(group.piece(room as u32), (end(halves[0]), 2));
    }

    #[test]
    fn a_place_is_small_because_a_shard_keeps_many() {
        assert_eq!(size_of::<Place>(), 12);
    }
}
