//! What the Redis ring keeps of a user: all that a login needs when nothing waits for him, and the index of his nodes (XEP-0163),
//! which a client with capabilities needs at once.
//!
//! In: a [`Warm`]. Out: its bytes, and the same read back. Promise: bytes that this release does not understand (another
//! version, damage) are a miss, never an error: SQL knows better.
//!
//! Layout, numbers big-endian: version (1), flags (1), revision (8); with `HAS_LAST` unix seconds (8), length of the
//! status (4) and the status; with `HAS_INDEX` the length of the index (4) and the index; with `HAS_RECORD` the stored form of
//! the record to the end.

use super::record::Record;
use super::tier::Last;

/// A release reads its own version only: what a copy of SQL would be migrated for is read from SQL.
const VERSION: u8 = 1;

const HAS_RECORD: u8 = 1;
const HAS_LAST: u8 = 2;
const HAS_PENDING: u8 = 4;
const HAS_INDEX: u8 = 8;

/// Key of the document that a copy holds.
pub const INDEX_KEY: &str = "pep";

/// Bytes of an index that a copy may hold (ten nodes make 2.5 KB). A longer one is read from SQL.
pub const INDEX_BYTES_MAX: usize = 16_384;

/// See the module's page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warm {
    /// Of the record, or of its removal; 0: there never was one.
    pub revision: u64,
    /// `None`: there is no such user.
    pub record: Option<Record>,
    pub last: Option<Last>,
    /// The document [`INDEX_KEY`], empty if there is none. `None`: the copy does not say.
    pub index: Option<Box<[u8]>>,
    /// Messages wait for him, so a login must ask SQL as well.
    pub pending: bool,
}

impl Warm {
    /// There is no such user (any more).
    pub fn missing(revision: u64) -> Warm {
        Warm {
            revision,
            record: None,
            last: None,
            index: None,
            pending: false,
        }
    }

    /// Appends the stored form.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let flags = flag(self.record.is_some(), HAS_RECORD)
            | flag(self.last.is_some(), HAS_LAST)
            | flag(self.index.is_some(), HAS_INDEX)
            | flag(self.pending, HAS_PENDING);
        out.extend([VERSION, flags]);
        out.extend(self.revision.to_be_bytes());
        if let Some(last) = &self.last {
            let length = u32::try_from(last.status.len()).expect("a stanza's text is short");
            out.extend(last.at.to_be_bytes());
            out.extend(length.to_be_bytes());
            out.extend(last.status.as_bytes());
        }
        if let Some(index) = &self.index {
            let length = u32::try_from(index.len()).expect("it is bounded");
            out.extend(length.to_be_bytes());
            out.extend(index);
        }
        if let Some(record) = &self.record {
            out.extend(record.bytes());
        }
    }

    /// `None`: not understood.
    pub fn decode(bytes: &[u8]) -> Option<Warm> {
        let mut rest = bytes;
        let [version, flags] = take(&mut rest)?;
        if version != VERSION || flags & !(HAS_RECORD | HAS_LAST | HAS_PENDING | HAS_INDEX) != 0 {
            return None;
        }
        let revision = u64::from_be_bytes(take(&mut rest)?);
        let last = match flags & HAS_LAST {
            0 => None,
            _ => {
                let at = u64::from_be_bytes(take(&mut rest)?);
                let length = u32::from_be_bytes(take(&mut rest)?);
                let (status, behind) = rest.split_at_checked(usize::try_from(length).ok()?)?;
                rest = behind;
                let status = std::str::from_utf8(status).ok()?.into();
                Some(Last { at, status })
            }
        };
        let index = match flags & HAS_INDEX {
            0 => None,
            _ => {
                let length = u32::from_be_bytes(take(&mut rest)?);
                let (index, behind) = rest.split_at_checked(usize::try_from(length).ok()?)?;
                rest = behind;
                Some(index.into())
            }
        };
        let record = match flags & HAS_RECORD {
            0 if rest.is_empty() => None,
            0 => return None,
            _ => Some(Record::from_bytes(rest).ok()?),
        };
        Some(Warm {
            revision,
            record,
            last,
            index,
            pending: flags & HAS_PENDING != 0,
        })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::user;
    use super::*;
    use proptest::prelude::*;

    fn any_warm() -> impl Strategy<Value = Warm> {
        (
            any::<u64>(),
            proptest::option::of(0usize..40),
            proptest::option::of((any::<u64>(), ".{0,40}")),
            proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
            any::<bool>(),
        )
            .prop_map(|(revision, contacts, last, index, pending)| Warm {
                revision,
                record: contacts.map(|contacts| Record::new(&user(contacts))),
                last: last.map(|(at, status)| Last {
                    at,
                    status: status.into(),
                }),
                index: index.map(Vec::into_boxed_slice),
                pending,
            })
    }

    proptest! {
        #[test]
        fn what_was_kept_comes_back(warm in any_warm()) {
            let mut bytes = Vec::new();
            warm.encode(&mut bytes);
            prop_assert_eq!(Warm::decode(&bytes), Some(warm));
        }

        #[test]
        fn damaged_or_foreign_bytes_are_a_miss_and_never_a_panic(
            warm in any_warm(), at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = Vec::new();
            warm.encode(&mut bytes);
            let whole = bytes.clone();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let _ = Warm::decode(&bytes);
            let cut = cut.index(whole.len());
            let _ = Warm::decode(&whole[..cut]);
            bytes[0] = 2;
            prop_assert_eq!(Warm::decode(&bytes), None);
        }
    }

    #[test]
    fn the_word_that_there_is_nobody_is_short() {
        let mut bytes = Vec::new();
        Warm::missing(7).encode(&mut bytes);
        assert_eq!(bytes.len(), 10);
        assert_eq!(Warm::decode(&bytes), Some(Warm::missing(7)));
    }
}
