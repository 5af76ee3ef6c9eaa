//! What a journal carries: every change that a shard has accepted, in the order in which it became true.
//!
//! In: borrowed values of a slice. Out: rkyv bytes, and the same read in place ([`ArchivedChange`]) by replay and drain.
//! Promise: a change applied twice, or behind a newer one of the same thing, changes nothing: messages and marks name
//! unique ids, everything else carries a revision.
//!
//! Ids and revisions come from one counter per shard ([`Id`]): unique on the blade, growing with each owner's changes,
//! over restarts too. Names are prepared bare local parts (RFC 7622), compared byte by byte.

use rkyv::with::InlineAsBox;
use rkyv::{Archive, Deserialize, Serialize, rancor};

/// Milliseconds since 1970 (42 bits), shard (8 bits), counter (13 bits): positive as an `i64` until 2109.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub u64);

impl Id {
    const SHARD_BITS: u32 = 8;
    const COUNTER_BITS: u32 = 13;
    const LOW_BITS: u32 = Self::SHARD_BITS + Self::COUNTER_BITS;
    /// Shards that can be told apart.
    pub const SHARDS_MAX: usize = 1 << Self::SHARD_BITS;

    /// The next id of a shard after `last`, at `unix_ms`; never smaller, whatever the clock does.
    pub fn next(last: Id, unix_ms: u64, shard: u16) -> Id {
        let (ms, counter) = (last.unix_ms(), last.0 & ((1 << Self::COUNTER_BITS) - 1));
        let (ms, counter) = match () {
            _ if unix_ms > ms => (unix_ms, 0),
            _ if counter + 1 < 1 << Self::COUNTER_BITS => (ms, counter + 1),
            _ => (ms + 1, 0),
        };
        Id((ms << Self::LOW_BITS) | (u64::from(shard) << Self::COUNTER_BITS) | counter)
    }

    /// No shard has given a higher one in the same millisecond: where all go on after the highest id of any.
    pub fn last_of_ms(self) -> Id {
        Id(self.0 | ((1 << Self::LOW_BITS) - 1))
    }

    /// The first id that any shard may give at `unix_ms`: the bound of a search by time.
    pub fn at(unix_ms: u64) -> Id {
        Id(unix_ms << Self::LOW_BITS)
    }

    /// Who gave it.
    pub fn shard(self) -> u16 {
        ((self.0 >> Self::COUNTER_BITS) & ((1 << Self::SHARD_BITS) - 1)) as u16
    }

    /// When the change was accepted.
    pub fn unix_ms(self) -> u64 {
        self.0 >> Self::LOW_BITS
    }
}

/// One change. All but [`Change::Marks`] and [`Change::Decided`] concern one user.
///
/// What a release adds comes last and is no larger than the largest there is: then everything that was written before reads
/// as before (see [`super::journal::format::PAYLOAD_VERSIONS`]).
#[derive(Archive, Serialize, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<'a> {
    Message(Message<'a>),
    /// A new account: nothing of an earlier one of this name is left.
    AddUser {
        #[rkyv(with = InlineAsBox)]
        name: &'a str,
        revision: u64,
        /// Stored form of a [`super::record::Record`].
        #[rkyv(with = InlineAsBox)]
        record: &'a [u8],
    },
    PutUser {
        #[rkyv(with = InlineAsBox)]
        name: &'a str,
        revision: u64,
        #[rkyv(with = InlineAsBox)]
        record: &'a [u8],
    },
    /// The account with its archive, documents and last activity; what is older than `revision` never comes back.
    RemoveUser {
        #[rkyv(with = InlineAsBox)]
        name: &'a str,
        revision: u64,
    },
    /// `key` is "vcard", "private:NAMESPACE NAME", ...; an empty value removes.
    PutDocument {
        #[rkyv(with = InlineAsBox)]
        name: &'a str,
        revision: u64,
        #[rkyv(with = InlineAsBox)]
        key: &'a str,
        #[rkyv(with = InlineAsBox)]
        value: &'a [u8],
    },
    /// XEP-0012: unix seconds of the last log-out, and the status it came with.
    PutLast {
        #[rkyv(with = InlineAsBox)]
        name: &'a str,
        revision: u64,
        at: u64,
        #[rkyv(with = InlineAsBox)]
        status: &'a str,
    },
    Marks(Marks<'a>),
    /// Undecided messages that were let in after all: nothing refuses them any more.
    Decided {
        #[rkyv(with = InlineAsBox)]
        ids: &'a [u64],
    },
}

/// A message at one of its owners.
#[derive(Archive, Serialize, Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Its position in the owner's archive.
    pub id: u64,
    /// Local part of the user in whose archive and queue it is.
    #[rkyv(with = InlineAsBox)]
    pub owner: &'a str,
    /// Bits of [`Message`]: what it is to its owner.
    pub what: u8,
    /// Kind and flags of [`crate::xmpp::meta::Meta`], as numbers.
    pub kind: u8,
    pub flags: u16,
    /// The other side, as the stanza names it: sender of a received one, addressee of a sent one (bare or full JID).
    #[rkyv(with = InlineAsBox)]
    pub peer: &'a str,
    /// Received: the `id` of the sender's record, if there is one; 0: none. A twin is applied once.
    pub twin: u64,
    /// Sent: the sender's stream (XEP-0198 `previd`; empty: cannot be resumed) and the stanza's count in it.
    #[rkyv(with = InlineAsBox)]
    pub stream: &'a str,
    pub count: u32,
    /// As its recipient gets it, without stable id and delay.
    #[rkyv(with = InlineAsBox)]
    pub stanza: &'a [u8],
}

impl Message<'_> {
    /// Stands in the owner's archive (XEP-0313).
    pub const ARCHIVE: u8 = 1;
    /// Waits for one of the owner's clients to take it.
    pub const PENDING: u8 = 2;
    /// The owner sent it. Without [`Message::RECEIVED`] it must be forwarded to its addressee until it is settled. Alone: the
    /// other half of the change before it.
    pub const SENT: u8 = 4;
    /// The owner received it.
    pub const RECEIVED: u8 = 8;
    /// Nobody knew yet whether there is such an owner, and whether he lets it in; a mark says later what has come of it.
    pub const UNDECIDED: u8 = 16;
}

/// What has become of earlier messages; collected and written once per group.
#[derive(Archive, Serialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Marks<'a> {
    /// Pending deliveries that a client has taken.
    #[rkyv(with = InlineAsBox)]
    pub done: &'a [u64],
    /// Undecided messages that were refused: in no archive and no queue.
    #[rkyv(with = InlineAsBox)]
    pub dropped: &'a [u64],
    /// Sent messages whose fate at the addressee's owner is durable.
    #[rkyv(with = InlineAsBox)]
    pub settled: &'a [u64],
    /// The last durable counts of streams, repeated at the begin of a segment (XEP-0198 section 5, `<failed h/>`).
    #[rkyv(with = InlineAsBox)]
    pub counts: &'a [StreamCount],
}

/// How many stanzas of a stream are durable.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamCount {
    /// `previd`, zero-padded.
    pub stream: [u8; 32],
    pub count: u32,
}

impl Change<'_> {
    /// Appends the archive to `out`; rkyv needs no alignment here (`unaligned`).
    pub fn encode(&self, out: &mut Vec<u8>) {
        // positions inside an archive are relative, so it may begin anywhere
        let taken = std::mem::take(out);
        *out = rkyv::api::high::to_bytes_in::<_, rancor::Error>(self, taken)
            .expect("writing to memory fails only beyond 2 GiB, far above every limit");
    }
}

impl ArchivedChange<'_> {
    /// Reads in place what [`Change::encode`] has just written, unchecked.
    ///
    /// # Safety
    /// The bytes must be exactly those of one call of [`Change::encode`].
    #[allow(unsafe_code)]
    pub unsafe fn access_unchecked(bytes: &[u8]) -> &ArchivedChange<'static> {
        // SAFETY: as the caller promises.
        unsafe { rkyv::access_unchecked::<ArchivedChange<'static>>(bytes) }
    }

    /// Checks bytes of [`Change::encode`] and reads them in place.
    pub fn access(bytes: &[u8]) -> Result<&ArchivedChange<'static>, String> {
        rkyv::access::<ArchivedChange<'static>, rancor::Error>(bytes).map_err(|e| e.to_string())
    }

    /// The user whom it concerns.
    pub fn owner(&self) -> Option<&str> {
        Some(match self {
            ArchivedChange::Message(message) => &message.owner,
            ArchivedChange::AddUser { name, .. }
            | ArchivedChange::PutUser { name, .. }
            | ArchivedChange::RemoveUser { name, .. }
            | ArchivedChange::PutDocument { name, .. }
            | ArchivedChange::PutLast { name, .. } => name,
            ArchivedChange::Marks(_) | ArchivedChange::Decided { .. } => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_encoded_is_read_in_place_wherever_it_lies() {
        let message = Message {
            id: Id::next(Id(0), 1_790_000_000_000, 3).0,
            owner: "alice",
            what: Message::ARCHIVE | Message::SENT,
            kind: 0,
            flags: 17,
            peer: "bob@localhost/b",
            twin: 0,
            stream: "abcdef",
            count: 7,
            stanza: b"<message><body>hi</body></message>",
        };
        let marks = Marks {
            done: &[1, 2, 3],
            settled: &[4],
            ..Marks::default()
        };
        let mut bytes = vec![0; 3];
        Change::Message(message).encode(&mut bytes);
        let end = bytes.len();
        Change::Marks(marks).encode(&mut bytes);
        let Ok(ArchivedChange::Message(read)) = ArchivedChange::access(&bytes[3..end]) else {
            panic!("a message was encoded");
        };
        assert_eq!(
            (&*read.owner, &*read.stanza),
            (message.owner, message.stanza)
        );
        let Ok(ArchivedChange::Marks(read)) = ArchivedChange::access(&bytes[end..]) else {
            panic!("marks were encoded");
        };
        assert_eq!(read.done.iter().map(|id| id.to_native()).sum::<u64>(), 6);
    }

    /// As the first release has written them.
    #[test]
    fn changes_of_the_first_release_are_read() {
        let bytes = |hex: &str| -> Vec<u8> {
            let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            (0..hex.len()).step_by(2).map(byte).collect()
        };
        let message = Message {
            id: 4711,
            owner: "alice",
            what: Message::ARCHIVE | Message::RECEIVED | Message::PENDING | Message::UNDECIDED,
            kind: 1,
            flags: 17,
            peer: "bob@localhost/b",
            twin: 4710,
            stream: "previd",
            count: 7,
            stanza: b"<message/>",
        };
        let count = StreamCount {
            stream: [9; 32],
            count: 5,
        };
        let marks = Marks {
            done: &[1, 2],
            dropped: &[3],
            settled: &[4],
            counts: &[count],
        };
        let add = Change::AddUser {
            name: "alice",
            revision: 8,
            record: b"record",
        };
        let last = Change::PutLast {
            name: "alice",
            revision: 9,
            at: 10,
            status: "gone",
        };
        let written = [
            (
                Change::Message(message),
                "616c696365626f62406c6f63616c686f73742f627072657669643c6d6573736167652f3e006712000000000000d3ffffff\
                 050000001b011100ccffffff0f0000006612000000000000cbffffff0600000007000000c5ffffff0a000000",
            ),
            (
                Change::Marks(marks),
                "010000000000000002000000000000000300000000000000040000000000000009090909090909090909090909090909\
                 090909090909090909090909090909090500000006bbffffff02000000c3ffffff01000000c3ffffff01000000c3ffff\
                 ff01000000000000000000000000000000000000000000000000000000",
            ),
            (
                add,
                "616c6963657265636f726401f4ffffff050000000800000000000000e9ffffff06000000000000000000000000000000\
                 0000000000000000000000000000000000000000",
            ),
            (
                last,
                "616c696365676f6e6505f6ffffff0500000009000000000000000a00000000000000e3ffffff04000000000000000000\
                 000000000000000000000000000000000000",
            ),
        ];
        for (change, hex) in written {
            let mut now = Vec::new();
            change.encode(&mut now);
            assert_eq!(now, bytes(hex), "{change:?}");
            assert!(ArchivedChange::access(&bytes(hex)).is_ok());
        }
    }

    #[test]
    fn no_shard_gives_an_id_again_after_a_start_that_knows_the_highest_of_all() {
        let of_others = Id::next(Id(0), 5, 2);
        let mut given = Id(0);
        for _ in 0..10 {
            given = Id::next(given, 5, 0);
        }
        assert!(given < of_others);
        assert!(Id::next(of_others.last_of_ms(), 0, 0) > of_others);
        assert_eq!(Id::next(of_others.last_of_ms(), 0, 0).unix_ms(), 6);
    }

    #[test]
    fn ids_grow_whatever_the_clock_does_and_keep_their_shard() {
        let mut last = Id(0);
        for ms in [5, 5, 5, 4, 9, 1] {
            for _ in 0..5_000 {
                let next = Id::next(last, ms, 7);
                assert!(next > last && next.shard() == 7);
                last = next;
            }
        }
        assert!(last.unix_ms() < 20 && last >= Id::at(9));
    }
}
