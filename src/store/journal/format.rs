//! The journal's bytes, without a disk.
//!
//! In: records and their numbers. Out: the bytes of a segment's header and of a group; and back, checked. Promise: what
//! is read back was written, by this journal, at this place, under this generation; anything else is a [`BadGroup`].
//!
//! All numbers are little-endian. A folder holds, for each shard, `SHARD-GENERATION.seg`, and files that hold nothing
//! yet (`.spare`, `.new`). Groups begin on blocks of 4096 bytes; what fills up the last block of a group is zero and
//! is not read. A checksum is CRC32C.
//!
//! ```text
//! segment   block 0: the header, and a copy of it at byte 2048; then groups, one behind the other; then zeros, or what
//!           an earlier generation left
//!
//! header     0  8  "nitrojnl"
//!            8  2  version: 1
//!           10  2  shard
//!           12  4  checksum of the 64 bytes, these four taken as zero
//!           16  8  generation: grows by one from segment to segment of a journal
//!           24  8  length of the file
//!           32  8  first sequence number
//!           40  8  number of the first group
//!           48 16  journal: random, the same in all its segments
//!
//! group      0  4  "NjGr"
//!            4  4  checksum of bytes 8..40, then of the 8 bytes before each payload; begun with the seed
//!            8  4  bytes: these 40 and the records, without what fills up the block
//!           12  4  records
//!           16  8  number: grows by one from group to group, over all segments
//!           24  8  sequence number of the first record; the others follow one by one
//!           32  2  what the payloads are: 3, `store::change::Change`; 2 and 1, the same without its last kinds
//!           34  6  zero
//!           40     records
//!
//! record     0  4  length of the payload
//!            4  4  checksum of length and payload; begun with the seed
//!            8     payload
//! ```
//!
//! The seed is the checksum of journal, shard and generation. Generations of a journal never repeat, and CRC32C keeps
//! different seeds apart for equal bytes, so nothing that an earlier generation left in a recycled segment is ever
//! taken for a group, and nobody who does not know the random id can send a message that looks like one.
//!
//! A group's checksum covers the checksums of its records, so a group that was written over a torn one and is torn
//! itself cannot be put together from both.
//!
//! One group is in flight at a time, so only the last can be torn: a bad group with no complete later one is the tail
//! and is cut; any other is damage. A group of no records stands for groups that `nitro journal repair` could not read:
//! its number is that of the last of them. Sequence numbers only grow; one that is missing was lost to a repair.

use std::ops::RangeInclusive;

use thiserror::Error;

/// What groups begin on, and what is never torn by a disk that tears nothing smaller.
pub const BLOCK: u32 = 4096;
/// The version of the format that is written and read.
pub const VERSION: u16 = 1;
/// What the payloads of written groups are.
pub const PAYLOAD_VERSION: u16 = 3;
/// What is read: 1 had no [`Change::Decided`](crate::store::change::Change::Decided), 2 nothing that comes behind it there.
pub const PAYLOAD_VERSIONS: RangeInclusive<u16> = 1..=PAYLOAD_VERSION;
/// The longest payload.
pub const PAYLOAD_BYTES_MAX: u32 = 16 << 20;
/// Bytes before a group's records.
pub const GROUP_HEAD: u32 = 40;
/// Bytes before a record's payload.
pub const RECORD_HEAD: u32 = 8;

const HEADER: usize = 64;
const HEADER_COPY: usize = 2048;
const MAGIC: &[u8; 8] = b"nitrojnl";
const GROUP_MAGIC: &[u8; 4] = b"NjGr";

/// What a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub shard: u16,
    pub generation: u64,
    /// Of the file.
    pub bytes: u64,
    pub first_seq: u64,
    pub first_group: u64,
    pub journal: [u8; 16],
}

/// Why a block is no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadHeader {
    #[error("its header is damaged")]
    Damaged,
    #[error("its format has version {0}")]
    Version(u16),
}

impl Header {
    /// The first block of the segment.
    pub fn block(&self) -> [u8; BLOCK as usize] {
        let mut one = [0; HEADER];
        one[..8].copy_from_slice(MAGIC);
        one[8..10].copy_from_slice(&VERSION.to_le_bytes());
        one[10..12].copy_from_slice(&self.shard.to_le_bytes());
        one[16..24].copy_from_slice(&self.generation.to_le_bytes());
        one[24..32].copy_from_slice(&self.bytes.to_le_bytes());
        one[32..40].copy_from_slice(&self.first_seq.to_le_bytes());
        one[40..48].copy_from_slice(&self.first_group.to_le_bytes());
        one[48..64].copy_from_slice(&self.journal);
        let checksum = crc32c::crc32c(&one);
        one[12..16].copy_from_slice(&checksum.to_le_bytes());
        let mut block = [0; BLOCK as usize];
        block[..HEADER].copy_from_slice(&one);
        block[HEADER_COPY..HEADER_COPY + HEADER].copy_from_slice(&one);
        block
    }

    /// Reads a first block, or as much of it as there is: the header, or else its copy.
    pub fn parse(block: &[u8]) -> Result<Header, BadHeader> {
        let one = |at: usize| match block.get(at..at + HEADER) {
            Some(bytes) => Header::parse_one(bytes),
            None => Err(BadHeader::Damaged),
        };
        one(0).or_else(|why| one(HEADER_COPY).map_err(|_| why))
    }

    fn parse_one(bytes: &[u8]) -> Result<Header, BadHeader> {
        if bytes[..8] != *MAGIC {
            return Err(BadHeader::Damaged);
        }
        let version = u16_at(bytes, 8);
        if version != VERSION {
            return Err(BadHeader::Version(version));
        }
        let mut checked = [0; HEADER];
        checked.copy_from_slice(bytes);
        checked[12..16].fill(0);
        if crc32c::crc32c(&checked) != u32_at(bytes, 12) {
            return Err(BadHeader::Damaged);
        }
        let mut journal = [0; 16];
        journal.copy_from_slice(&bytes[48..64]);
        Ok(Header {
            shard: u16_at(bytes, 10),
            generation: u64_at(bytes, 16),
            bytes: u64_at(bytes, 24),
            first_seq: u64_at(bytes, 32),
            first_group: u64_at(bytes, 40),
            journal,
        })
    }

    /// What the checksums of this segment's groups and records begin with.
    pub fn seed(&self) -> u32 {
        let mut key = [0; 26];
        key[..16].copy_from_slice(&self.journal);
        key[16..18].copy_from_slice(&self.shard.to_le_bytes());
        key[18..].copy_from_slice(&self.generation.to_le_bytes());
        crc32c::crc32c(&key)
    }
}

/// What a group says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupHead {
    /// Head and records, without what fills up the last block.
    pub bytes: u32,
    pub records: u32,
    pub number: u64,
    pub first_seq: u64,
    pub payload_version: u16,
    checksum: u32,
}

/// Why bytes are no group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadGroup {
    #[error("no group begins here")]
    NotOne,
    #[error("the group's checksum is wrong")]
    Checksum,
    #[error("the checksum of the group's record {0} is wrong")]
    Record(u32),
    #[error("group {found} is not the expected one, {expected}")]
    Order { expected: u64, found: u64 },
}

impl GroupHead {
    /// Reads a head; nothing is checked but that it could be one that ends within `room` bytes.
    pub fn parse(bytes: &[u8], room: u64) -> Result<GroupHead, BadGroup> {
        if bytes.len() < GROUP_HEAD as usize || bytes[..4] != *GROUP_MAGIC {
            return Err(BadGroup::NotOne);
        }
        let head = GroupHead {
            checksum: u32_at(bytes, 4),
            bytes: u32_at(bytes, 8),
            records: u32_at(bytes, 12),
            number: u64_at(bytes, 16),
            first_seq: u64_at(bytes, 24),
            payload_version: u16_at(bytes, 32),
        };
        let least = u64::from(GROUP_HEAD) + u64::from(head.records) * u64::from(RECORD_HEAD);
        let grows = head.first_seq.checked_add(u64::from(head.records));
        match grows.is_some() && (least..=room).contains(&u64::from(head.bytes)) {
            true => Ok(head),
            false => Err(BadGroup::NotOne),
        }
    }

    /// The sequence number behind the group's last record.
    pub fn next_seq(&self) -> u64 {
        self.first_seq + u64::from(self.records)
    }

    /// Bytes on disk.
    pub fn padded(&self) -> u32 {
        padded(self.bytes)
    }

    /// Checks the group's and all records' checksums; `bytes` are exactly the group's.
    pub fn check(&self, seed: u32, bytes: &[u8]) -> Result<(), BadGroup> {
        let mut sum = crc32c::crc32c_append(seed, &bytes[8..GROUP_HEAD as usize]);
        let mut count = 0;
        for record in Records::new(self, bytes) {
            sum = crc32c::crc32c_append(sum, record.head);
            count += 1;
        }
        if sum != self.checksum || count != self.records {
            return Err(BadGroup::Checksum);
        }
        for (n, record) in Records::new(self, bytes).enumerate() {
            if !record.is_good(seed) {
                return Err(BadGroup::Record(n as u32));
            }
        }
        Ok(())
    }
}

/// A record of a group whose lengths fit into it; its own checksum is a question of [`Record::is_good`].
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    pub seq: u64,
    /// Of the payload, from the group's begin.
    pub offset: u32,
    pub payload: &'a [u8],
    head: &'a [u8],
}

impl Record<'_> {
    pub fn is_good(&self, seed: u32) -> bool {
        record_checksum(seed, self.payload) == u32_at(self.head, 4)
    }
}

/// The records of a group, in order, as far as their lengths make sense.
pub struct Records<'a> {
    bytes: &'a [u8],
    at: usize,
    seq: u64,
    left: u32,
}

impl<'a> Records<'a> {
    /// `bytes` begin with the group's head.
    pub fn new(head: &GroupHead, bytes: &'a [u8]) -> Records<'a> {
        Records {
            bytes: &bytes[..(head.bytes as usize).min(bytes.len())],
            at: GROUP_HEAD as usize,
            seq: head.first_seq,
            left: head.records,
        }
    }

    /// Up to `most` records behind a head that cannot be believed.
    pub fn chain(bytes: &'a [u8], first_seq: u64, most: u32) -> Records<'a> {
        Records {
            bytes,
            at: GROUP_HEAD as usize,
            seq: first_seq,
            left: most,
        }
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        self.left = self.left.checked_sub(1)?;
        let payload = self.at + RECORD_HEAD as usize;
        let head = self.bytes.get(self.at..payload)?;
        let end = payload.checked_add(u32_at(head, 0) as usize)?;
        let record = Record {
            seq: self.seq,
            offset: payload as u32,
            payload: self.bytes.get(payload..end)?,
            head,
        };
        (self.at, self.seq) = (end, self.seq + 1);
        Some(record)
    }
}

/// Checks a single record that was read with the head before it.
pub fn check_record(seed: u32, head_and_payload: &[u8]) -> bool {
    match head_and_payload.split_at_checked(RECORD_HEAD as usize) {
        Some((head, payload)) => {
            u32_at(head, 0) as usize == payload.len()
                && record_checksum(seed, payload) == u32_at(head, 4)
        }
        None => false,
    }
}

/// Fills in everything but payloads and their lengths. `bytes` begin with room for the group's head; records follow up
/// to the end, each with its length before it.
pub fn seal(bytes: &mut [u8], seed: u32, number: u64, first_seq: u64, records: u32) {
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(GROUP_MAGIC);
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..16].copy_from_slice(&records.to_le_bytes());
    bytes[16..24].copy_from_slice(&number.to_le_bytes());
    bytes[24..32].copy_from_slice(&first_seq.to_le_bytes());
    bytes[32..34].copy_from_slice(&PAYLOAD_VERSION.to_le_bytes());
    bytes[34..40].fill(0);
    let mut sum = crc32c::crc32c_append(seed, &bytes[8..GROUP_HEAD as usize]);
    let mut at = GROUP_HEAD as usize;
    for _ in 0..records {
        let payload = at + RECORD_HEAD as usize;
        let end = payload + u32_at(bytes, at) as usize;
        let checksum = record_checksum(seed, &bytes[payload..end]);
        bytes[at + 4..payload].copy_from_slice(&checksum.to_le_bytes());
        sum = crc32c::crc32c_append(sum, &bytes[at..payload]);
        at = end;
    }
    assert_eq!(at, bytes.len(), "the records fill the group");
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// Up to the next block.
pub fn padded(bytes: u32) -> u32 {
    bytes.next_multiple_of(BLOCK)
}

fn record_checksum(seed: u32, payload: &[u8]) -> u32 {
    let length = (payload.len() as u32).to_le_bytes();
    crc32c::crc32c_append(crc32c::crc32c_append(seed, &length), payload)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADER_OF_3: Header = Header {
        shard: 3,
        generation: 7,
        bytes: 1 << 20,
        first_seq: 100,
        first_group: 9,
        journal: [5; 16],
    };

    fn group(payloads: &[Vec<u8>], seed: u32) -> Vec<u8> {
        let mut bytes = vec![0; GROUP_HEAD as usize];
        for payload in payloads {
            bytes.extend((payload.len() as u32).to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(payload);
        }
        seal(&mut bytes, seed, 9, 100, payloads.len() as u32);
        bytes
    }

    #[test]
    fn a_header_survives_the_loss_of_either_copy() {
        let good = HEADER_OF_3.block();
        assert_eq!(Header::parse(&good), Ok(HEADER_OF_3));
        for copy in [0, HEADER_COPY] {
            for bit in 0..HEADER * 8 {
                let mut block = good;
                block[copy + bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Header::parse(&block), Ok(HEADER_OF_3));
            }
        }
        let mut none = good;
        (none[0], none[HEADER_COPY]) = (0, 0);
        assert_eq!(Header::parse(&none), Err(BadHeader::Damaged));
        assert_eq!(Header::parse(&good[1..70]), Err(BadHeader::Damaged));
    }

    #[test]
    fn an_unknown_version_is_told() {
        let mut block = HEADER_OF_3.block();
        (block[8], block[HEADER_COPY + 8]) = (2, 2);
        assert_eq!(Header::parse(&block), Err(BadHeader::Version(2)));
    }

    #[test]
    fn every_flipped_bit_of_a_group_is_seen() {
        let good = group(&[b"one".to_vec(), vec![], vec![b'x'; 70]], 1);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let read = GroupHead::parse(&bytes, 1 << 20);
            let checked = read.and_then(|head| match bytes.get(..head.bytes as usize) {
                Some(bytes) => head.check(1, bytes),
                None => Err(BadGroup::NotOne),
            });
            assert!(checked.is_err(), "bit {bit}");
        }
    }

    #[test]
    fn no_generation_accepts_what_another_one_wrote() {
        let seeds = (0..2_000).map(|generation| {
            let header = Header {
                generation,
                ..HEADER_OF_3
            };
            header.seed()
        });
        let bytes = group(&[b"payload".to_vec()], HEADER_OF_3.seed());
        let head = GroupHead::parse(&bytes, 4096).unwrap();
        for (generation, seed) in seeds.enumerate() {
            assert_eq!(head.check(seed, &bytes).is_ok(), generation == 7);
        }
    }

    #[test]
    fn a_group_torn_over_a_torn_one_is_not_put_together_from_both() {
        let [one, other] = [b'a', b'b'].map(|fill| group(&[vec![fill; 5000], vec![fill; 5000]], 4));
        for block in 1..3 {
            let mut torn = one.clone();
            torn[block * 4096..].copy_from_slice(&other[block * 4096..]);
            let head = GroupHead::parse(&torn, 1 << 20).unwrap();
            assert!(head.check(4, &torn).is_err());
        }
        // both records are whole, each of another group
        let mut torn = one.clone();
        torn[40 + 5008..].copy_from_slice(&other[40 + 5008..]);
        let head = GroupHead::parse(&torn, 1 << 20).unwrap();
        assert_eq!(head.check(4, &torn), Err(BadGroup::Checksum));
    }

    #[test]
    fn a_record_is_checked_by_itself() {
        let bytes = group(&[b"one".to_vec(), b"two".to_vec()], 4);
        let head = GroupHead::parse(&bytes, 4096).unwrap();
        for record in Records::new(&head, &bytes) {
            let (from, to) = (record.offset as usize - 8, record.offset as usize + 3);
            assert!(check_record(4, &bytes[from..to]));
            assert!(!check_record(5, &bytes[from..to]) && !check_record(4, &bytes[from..to - 1]));
        }
    }

    proptest! {
        #[test]
        fn what_was_sealed_is_read_back(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..20), seed: u32,
        ) {
            let bytes = group(&payloads, seed);
            let head = GroupHead::parse(&bytes, bytes.len() as u64).unwrap();
            prop_assert_eq!(head.check(seed, &bytes), Ok(()));
            let read: Vec<_> = Records::new(&head, &bytes).map(|r| (r.seq, r.payload.to_vec())).collect();
            let written: Vec<_> = (100..).zip(payloads).collect();
            prop_assert_eq!(read, written);
        }

        #[test]
        fn arbitrary_bytes_are_never_a_group_and_never_a_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..400), magic: bool, lengths: bool, seed: u32,
        ) {
            if magic && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(GROUP_MAGIC);
            }
            if lengths && bytes.len() >= 16 {
                let length = bytes.len() as u32;
                bytes[8..12].copy_from_slice(&length.to_le_bytes());
                bytes[12..16].copy_from_slice(&(length / 40).to_le_bytes());
            }
            let _ = Header::parse(&bytes);
            let _ = check_record(seed, &bytes);
            if let Ok(head) = GroupHead::parse(&bytes, bytes.len() as u64) {
                prop_assert!(Records::new(&head, &bytes).count() <= head.records as usize);
                prop_assert!(head.check(seed, &bytes[..head.bytes as usize]).is_err());
            }
        }
    }
}
