//! Reading segments, group by group.
//!
//! In: a file and the group that is expected at an offset. Out: the checked group, or why there is none. Promise: reads
//! in large pieces, and never beyond the end that it is told, where a commit may be under way.

use std::io;
use std::sync::Arc;

use super::JournalError;
use super::disk::{Disk, DiskFile, read_full};
use super::format::{
    BLOCK, BadGroup, BadHeader, GROUP_HEAD, GroupHead, Header, PAYLOAD_VERSIONS, Records,
};

const WINDOW_BYTES: u64 = 256 << 10;

/// An open segment.
pub(super) struct Live {
    /// As in [`super::Place`].
    pub id: u32,
    pub name: String,
    pub header: Header,
    pub seed: u32,
    pub file: Arc<dyn DiskFile>,
    disk: Arc<dyn Disk>,
}

impl Live {
    pub fn new(
        id: u32,
        name: String,
        header: Header,
        file: Arc<dyn DiskFile>,
        disk: Arc<dyn Disk>,
    ) -> Live {
        Live {
            id,
            name,
            header,
            seed: header.seed(),
            file,
            disk,
        }
    }

    /// Bytes that may hold something.
    pub fn end(&self) -> u32 {
        self.header.bytes as u32
    }

    /// How an operator finds it.
    pub fn path(&self) -> String {
        self.disk.path(&self.name)
    }

    pub fn damaged(&self, offset: u64, why: impl ToString) -> JournalError {
        JournalError::Damaged {
            file: self.path(),
            offset,
            why: why.to_string(),
        }
    }

    pub fn io(&self, doing: &'static str) -> impl Fn(io::Error) -> JournalError {
        let file = self.path();
        move |source| JournalError::Io {
            file: file.clone(),
            doing,
            source,
        }
    }
}

/// Reads and checks the header of `file`.
pub(super) fn header(
    disk: &dyn Disk,
    name: &str,
    file: &dyn DiskFile,
) -> Result<Header, JournalError> {
    let io = |source| JournalError::Io {
        file: disk.path(name),
        doing: "read",
        source,
    };
    let damaged = |why: &str| JournalError::Damaged {
        file: disk.path(name),
        offset: 0,
        why: why.into(),
    };
    let mut block = [0; BLOCK as usize];
    let read = read_full(file, &mut block, 0).map_err(io)?;
    let header = match Header::parse(&block[..read]) {
        Ok(header) => header,
        Err(BadHeader::Version(found)) => {
            return Err(JournalError::Version {
                file: disk.path(name),
                found,
            });
        }
        Err(why) => return Err(damaged(&why.to_string())),
    };
    let length = file.bytes().map_err(io)?;
    if length < header.bytes || !super::SEGMENT_BYTES.contains(&header.bytes) {
        return Err(damaged(&format!(
            "it has {length} bytes and should have {}",
            header.bytes
        )));
    }
    Ok(header)
}

/// A piece of a file in memory.
#[derive(Default)]
pub(super) struct Window {
    bytes: Vec<u8>,
    offset: u64,
    /// [`Live::id`] of the file.
    file: Option<u32>,
}

impl Window {
    /// `len` bytes at `offset`, or fewer where the file or `end` comes first.
    pub fn get(
        &mut self,
        live: &Live,
        offset: u64,
        len: u64,
        end: u64,
    ) -> Result<&[u8], JournalError> {
        let len = len.min(end.saturating_sub(offset));
        let holds = self.file == Some(live.id)
            && self.offset <= offset
            && offset + len <= self.offset + self.bytes.len() as u64;
        if !holds {
            let wanted = WINDOW_BYTES.max(len).min(end.saturating_sub(offset));
            self.file = None;
            self.bytes.resize(wanted as usize, 0);
            self.bytes.shrink_to(4 << 20);
            let read = read_full(&*live.file, &mut self.bytes, offset).map_err(live.io("read"))?;
            self.bytes.truncate(read);
            (self.file, self.offset) = (Some(live.id), offset);
        }
        let from = (offset - self.offset) as usize;
        let to = (from + len as usize).min(self.bytes.len());
        Ok(&self.bytes[from..to])
    }

    /// The complete group at `at`, whatever its number.
    pub fn group(
        &mut self,
        live: &Live,
        at: u32,
        end: u32,
    ) -> Result<Result<(GroupHead, &[u8]), BadGroup>, JournalError> {
        let (at, end) = (u64::from(at), u64::from(end));
        let head = self.get(live, at, u64::from(GROUP_HEAD), end)?;
        let head = match GroupHead::parse(head, end.saturating_sub(at)) {
            Ok(head) => head,
            Err(why) => return Ok(Err(why)),
        };
        let bytes = self.get(live, at, u64::from(head.bytes), end)?;
        if bytes.len() < head.bytes as usize {
            return Ok(Err(BadGroup::NotOne));
        }
        Ok(head.check(live.seed, bytes).map(|()| (head, bytes)))
    }
}

/// What is expected next in a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expected {
    pub number: u64,
    /// Or a higher one.
    pub seq: u64,
}

impl Expected {
    pub fn at_begin_of(header: &Header) -> Expected {
        Expected {
            number: header.first_group,
            seq: header.first_seq,
        }
    }

    /// Whether a group may stand here.
    pub fn check(&self, head: &GroupHead) -> Result<(), BadGroup> {
        let number = match head.records {
            0 => head.number >= self.number,
            _ => head.number == self.number,
        };
        match number && head.first_seq >= self.seq {
            true => Ok(()),
            false => Err(BadGroup::Order {
                expected: self.number,
                found: head.number,
            }),
        }
    }

    pub fn behind(head: &GroupHead) -> Expected {
        Expected {
            number: head.number + 1,
            seq: head.next_seq(),
        }
    }
}

/// Where a walk ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Walked {
    pub end: u32,
    pub expected: Expected,
    pub groups: u64,
    pub records: u64,
    /// Why there is no further group; `None`: the segment is full.
    pub why: Option<BadGroup>,
}

/// Gives `f` all groups from the segment's begin up to the first bad one: offset, head, bytes.
pub(super) fn walk(
    live: &Live,
    end: u32,
    mut f: impl FnMut(u32, &GroupHead, &[u8]) -> Result<(), JournalError>,
) -> Result<Walked, JournalError> {
    let mut window = Window::default();
    let mut walked = Walked {
        end: BLOCK,
        expected: Expected::at_begin_of(&live.header),
        groups: 0,
        records: 0,
        why: None,
    };
    while walked.end < end {
        let checked = window.group(live, walked.end, end)?;
        let checked = checked.and_then(|(head, bytes)| {
            walked.expected.check(&head)?;
            Ok((head, bytes))
        });
        match checked {
            Ok((head, bytes)) => {
                if !PAYLOAD_VERSIONS.contains(&head.payload_version) {
                    return Err(JournalError::PayloadVersion {
                        file: live.path(),
                        found: head.payload_version,
                    });
                }
                f(walked.end, &head, bytes)?;
                walked.end += head.padded();
                walked.expected = Expected::behind(&head);
                walked.groups += 1;
                walked.records += u64::from(head.records);
            }
            Err(why) => {
                walked.why = Some(why);
                break;
            }
        }
    }
    Ok(walked)
}

/// The first complete group of this segment behind `from`, with at least the expected number.
pub(super) fn later_group(
    live: &Live,
    from: u32,
    expected: u64,
) -> Result<Option<(u32, GroupHead)>, JournalError> {
    let mut window = Window::default();
    let mut at = from;
    while at + BLOCK < live.end() {
        at += BLOCK;
        if let Ok((head, _)) = window.group(live, at, live.end())?
            && head.number >= expected
        {
            return Ok(Some((at, head)));
        }
    }
    Ok(None)
}

/// What a torn or damaged group at the end of a journal says of itself, if it can be told from what an earlier
/// generation left there.
pub(super) fn torn(live: &Live, walked: &Walked) -> Result<Option<String>, JournalError> {
    let mut window = Window::default();
    let (at, end) = (walked.end, live.end());
    let bytes = window.get(live, u64::from(at), u64::from(GROUP_HEAD), u64::from(end))?;
    let Ok(head) = GroupHead::parse(bytes, u64::MAX) else {
        // a damaged length or magic is still known by its numbers
        let known = bytes.len() == GROUP_HEAD as usize
            && (bytes[16..24] == walked.expected.number.to_le_bytes()
                || bytes[24..32] == walked.expected.seq.to_le_bytes());
        return Ok(known.then(|| format!("group {}", walked.expected.number)));
    };
    if head.number != walked.expected.number && head.first_seq != walked.expected.seq {
        return Ok(None);
    }
    let whole = window.get(live, u64::from(at), u64::from(head.bytes), u64::from(end))?;
    let good = Records::new(&head, whole).take_while(|record| record.is_good(live.seed));
    Ok(Some(format!(
        "group {}, {} bytes, {} records of which {} are whole",
        head.number,
        head.bytes,
        head.records,
        good.count()
    )))
}
