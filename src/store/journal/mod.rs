//! The journal: what a shard has accepted, durable before anybody hears of it.
//!
//! In: groups of changes ([`Group`], [`Writer`]). Out: the news that a group is durable ([`Committed`]); the changes in
//! order, for the database ([`Reader`]) and for the next start ([`Journals::replay`]); single payloads ([`Files`]).
//! Promises:
//!
//! - what was committed and not drained is there at the next start, in order, whatever happened in between;
//! - nothing is there that was not appended, and of what was not committed at most the last group, whole;
//! - a torn end is cut and told; other damage is refused with a sentence, and [`repair`] saves what can be saved;
//! - an error of the disk ends the process: the next sync would lie. A full disk loses nothing and refuses early.
//!
//! One folder holds the journals of all shards; a journal whose shard is no more is replayed and drained like the
//! others, and then removed. [`format`] has the bytes, [`segments`] the life of a file, [`disk`] the seam for tests.
//!
//! Order of calls: [`open`], [`Journals::replay`], [`Journals::writer`] for every shard, [`Journals::reader`] for every
//! shard and everything else in [`Journals::found`].

pub mod disk;
pub mod format;
mod group;
mod reader;
pub mod repair;

mod scan;
mod segments;
mod state;
mod writer;

#[cfg(test)]
pub(crate) mod sim;
#[cfg(test)]
mod simulation;
#[cfg(test)]
pub(crate) mod stepped;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};
use std::sync::{Arc, RwLock};

use fnv::FnvHashMap;
use thiserror::Error;

use self::disk::{Disk, read_full};
pub use self::format::PAYLOAD_BYTES_MAX;
use self::format::{BLOCK, RECORD_HEAD, Records};
use self::group::Pins;
pub use self::group::{Committed, Group, Place, Slot};
pub use self::reader::Reader;
use self::scan::{Expected, Live};
use self::segments::{Appender, Journal, Kept, Role, Segment, Settings};
pub use self::state::{State, Status};
use self::writer::Keeper;
pub use self::writer::Writer;
use super::change::{ArchivedChange, Id};

/// What a segment's length may be. It must hold the longest change as well: 17 MiB do in any case.
pub const SEGMENT_BYTES: RangeInclusive<u64> = (32 << 10)..=(1 << 30);

/// For each shard, by the number in its ids, the id below which all messages that it gave are settled: their fate at
/// the other side is durable there, and they will never be forwarded again. Begins with zeros, only grows.
pub type Floors = Arc<[AtomicU64]>;

/// Floors for all shards that an [`Id`] can name.
pub fn floors() -> Floors {
    (0..Id::SHARDS_MAX).map(|_| AtomicU64::new(0)).collect()
}

#[derive(Clone)]
pub struct Options {
    /// Of a new segment; a multiple of 4096 in [`SEGMENT_BYTES`]. Segments of another length are read and used up.
    pub segment_bytes: u64,
    /// More than this undrained, in one journal, and new messages are refused ([`Status::BacklogFull`]).
    pub backlog_bytes_max: u64,
    pub floors: Floors,
}

/// All journals of a folder.
pub struct Journals {
    disk: Arc<dyn Disk>,
    options: Options,
    files: Files,
    journals: BTreeMap<u16, Arc<Journal>>,
    /// Where each that was found goes on: last generation, next group.
    tails: BTreeMap<u16, (u64, Expected)>,
    found: Vec<Found>,
    keeper: Arc<Keeper>,
}

/// A journal that was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub shard: u16,
    /// See [`Reader::identity`].
    pub identity: u64,
    /// Of the first record that is still there; behind `last_seq` if there is none.
    pub first_seq: u64,
    /// 0: none.
    pub last_seq: u64,
    pub records: u64,
    /// Of its groups.
    pub bytes: u64,
    /// What was cut off at its end, in words.
    pub cut: Option<String>,
}

/// Why a journal cannot be used. All are sentences for the operator.
#[derive(Debug, Error)]
pub enum JournalError {
    #[error(
        "{file}: cannot be {doing} ({source}); see to the disk and its permissions, then start nitro again"
    )]
    Io {
        file: String,
        doing: &'static str,
        source: io::Error,
    },
    #[error(
        "{file}: damaged at byte {offset} ({why}); `nitro journal verify` shows what is affected, `nitro journal repair` saves what can be saved"
    )]
    Damaged {
        file: String,
        offset: u64,
        why: String,
    },
    #[error(
        "{file}: the journal's format has version {found}, this nitro reads {}: it was written by another release; start that one",
        format::VERSION
    )]
    Version { file: String, found: u16 },
    #[error(
        "{file}: the journal's records have version {found}, this nitro reads {} to {}: they were written by another release; start that one",
        format::PAYLOAD_VERSIONS.start(),
        format::PAYLOAD_VERSIONS.end()
    )]
    PayloadVersion { file: String, found: u16 },
    #[error(
        "{file}: a segment between {before} and this one is missing; put it back, or go on without its records with: nitro journal repair"
    )]
    Missing { before: String, file: String },
    #[error("journal.segment_bytes = {0}: must be a multiple of 4096 from 32768 to 1073741824")]
    SegmentBytes(u64),
    #[error(
        "{file}: there is no room for the journal's first segment ({bytes} bytes); make room on the disk"
    )]
    NoRoom { file: String, bytes: u64 },
    /// The record is in SQL.
    #[error("the segment has been recycled")]
    Recycled,
}

/// Opens all journals of a folder: checks every group, cuts torn ends.
///
/// # Errors
/// Anything but a torn end.
pub fn open(disk: Arc<dyn Disk>, options: &Options) -> Result<Journals, JournalError> {
    let length = options.segment_bytes;
    if !SEGMENT_BYTES.contains(&length) || !length.is_multiple_of(u64::from(BLOCK)) {
        return Err(JournalError::SegmentBytes(length));
    }
    let names = sorted_names(&*disk)?;
    let mut journals = Journals {
        disk,
        options: options.clone(),
        files: Files::default(),
        journals: BTreeMap::new(),
        tails: BTreeMap::new(),
        found: Vec::new(),
        keeper: Arc::default(),
    };
    for names in names.chunk_by(|a, b| a.shard() == b.shard()) {
        journals.read(names)?;
    }
    let synced = journals.disk.sync_dir();
    synced.map_err(|e| journals.io("", "synced", e))?;
    Ok(journals)
}

impl Journals {
    /// The journals that were there, by shard.
    pub fn found(&self) -> &[Found] {
        &self.found
    }

    /// Reads payloads back; good for all journals of this folder.
    pub fn files(&self) -> Files {
        self.files.clone()
    }

    /// Every record that is on disk, drained ones too, in the order of each journal.
    ///
    /// # Errors
    /// The disk cannot be read.
    pub fn replay(
        &self,
        mut f: impl FnMut(u16, u64, Place, &ArchivedChange),
    ) -> Result<(), JournalError> {
        for journal in self.journals.values() {
            let segments: Vec<_> = {
                let table = journal.table();
                let of = |s: &Segment| (s.live.clone(), s.end);
                table.segments.iter().map(of).collect()
            };
            for (live, end) in segments {
                let walked = scan::walk(&live, end, |at, head, bytes| {
                    for record in Records::new(head, bytes) {
                        let place = Place {
                            file: live.id,
                            offset: at + record.offset,
                            len: record.payload.len() as u32,
                        };
                        let change = access(&live, at + record.offset, record.payload)?;
                        f(journal.shard, record.seq, place, change);
                    }
                    Ok(())
                })?;
                if walked.end != end {
                    return Err(live.damaged(u64::from(walked.end), "it has changed"));
                }
            }
        }
        Ok(())
    }

    /// Goes on with a shard's journal, or begins it. `drained` is what SQL has of it. `on_commit` is called on the
    /// committer's thread, for each group in turn, and must only pass on what it gets.
    ///
    /// # Errors
    /// There is no room for a first segment.
    ///
    /// # Panics
    /// If the shard has a writer or was declared left by [`Journals::reader`].
    pub fn writer(
        &mut self,
        shard: u16,
        drained: u64,
        on_commit: Box<dyn Fn(Committed) + Send>,
    ) -> Result<Writer, JournalError> {
        let (journal, appender, next_seq) = self.adopt(shard, drained)?;
        self.keeper.add(journal.clone());
        let keeper = self.keeper.clone();
        Ok(Writer::start(
            journal, appender, next_seq, keeper, on_commit,
        ))
    }

    /// For the drain. A journal that has no writer by now is left: it is removed when all of it is drained and no
    /// longer pinned; tell [`Reader::drained`] what SQL has of it already.
    ///
    /// # Panics
    /// If the shard has neither a writer nor a journal that was found.
    pub fn reader(&mut self, shard: u16) -> Reader {
        let journal = self.journals.get(&shard);
        let journal = journal.expect("there is such a journal").clone();
        if journal.role() == Role::Unknown {
            journal.set_role(Role::Left);
            self.keeper.add(journal.clone());
        }
        Reader::new(journal, self.keeper.clone())
    }

    /// A journal and its end, without threads.
    fn adopt(
        &mut self,
        shard: u16,
        drained: u64,
    ) -> Result<(Arc<Journal>, Appender, u64), JournalError> {
        let journal = match self.journals.get(&shard) {
            Some(journal) => journal.clone(),
            None => self.journal(shard, self.disk.random()),
        };
        assert_eq!(journal.role(), Role::Unknown, "a journal has one writer");
        if !journal.has_room() && journal.make_spare()? == Kept::NoRoom {
            return Err(JournalError::NoRoom {
                file: self.disk.path(&Name::Spare(shard, 0).to_string()),
                bytes: self.options.segment_bytes,
            });
        }
        journal.set_role(Role::Written);
        let begin = Expected { number: 1, seq: 1 };
        let (generation, mut expected) = self.tails.remove(&shard).unwrap_or((0, begin));
        let first = self
            .found
            .iter()
            .find(|f| f.shard == shard && f.last_seq > 0);
        if let Some(first) = first
            && first.first_seq > drained + 1
        {
            tracing::error!(
                "journal {shard} begins with record {}, but the database has only what came before {}: \
                 it is older than the journal, or segments were removed; what was between them is missing",
                first.first_seq,
                drained + 1
            );
        }
        expected.seq = expected.seq.max(drained + 1);
        journal.drained(drained);
        let appender = Appender::new(journal.clone(), generation, expected);
        Ok((journal, appender, expected.seq))
    }

    fn journal(&mut self, shard: u16, id: [u8; 16]) -> Arc<Journal> {
        let settings = Settings {
            floors: self.options.floors.clone(),
            segment_bytes: self.options.segment_bytes,
            backlog_bytes_max: self.options.backlog_bytes_max,
        };
        let (disk, files) = (self.disk.clone(), self.files.clone());
        let journal = Arc::new(Journal::new(shard, id, disk, files, settings));
        self.journals.insert(shard, journal.clone());
        journal
    }

    /// Reads all files of one shard, segments first, by generation.
    fn read(&mut self, names: &[Name]) -> Result<(), JournalError> {
        let shard = names[0].shard();
        let mut found = Found {
            shard,
            identity: 0,
            first_seq: 1,
            last_seq: 0,
            records: 0,
            bytes: 0,
            cut: None,
        };
        let mut journal = None;
        let mut previous: Option<(Arc<Live>, scan::Walked)> = None;
        let segments = names.iter().filter(|n| matches!(n, Name::Segment(..)));
        for name in segments {
            let live = self.live(*name)?;
            if let Some((before, walked)) = &previous {
                follows(before, walked, &live)?;
            }
            let header = live.header;
            let journal = journal.get_or_insert_with(|| self.journal(shard, header.journal));
            if header.journal != journal.id {
                return Err(live.damaged(0, "it belongs to another journal of this shard"));
            }
            let (mut groups, mut pins) = (Vec::new(), Pins::default());
            let walked = scan::walk(&live, live.end(), |at, head, bytes| {
                for record in Records::new(head, bytes) {
                    pins.add_archived(access(&live, at + record.offset, record.payload)?);
                }
                groups.push((head.next_seq().saturating_sub(1), at + head.padded()));
                Ok(())
            })?;
            found.identity = identity(&header.journal);
            if found.records == 0 {
                found.first_seq = header.first_seq;
            }
            found.records += walked.records;
            found.bytes += u64::from(walked.end - BLOCK);
            found.last_seq = walked.expected.seq.saturating_sub(1);
            let segment = Segment {
                live: live.clone(),
                end: walked.end,
                last_seq: found.last_seq,
                pins,
            };
            journal.found(segment, &groups);
            previous = Some((live, walked));
        }
        if let Some((last, walked)) = previous {
            found.cut = self.cut(&last, &walked)?;
            self.tails
                .insert(shard, (last.header.generation, walked.expected));
        }
        for name in names {
            let shown = name.to_string();
            let keep = match name {
                Name::Segment(..) => continue,
                Name::New(..) => false,
                Name::Spare(_, number) => {
                    let id = self.disk.random();
                    let journal = journal.get_or_insert_with(|| self.journal(shard, id));
                    let file = self.disk.open(&shown);
                    file.and_then(|file| journal.found_spare(*number, &shown, file))
                        .map_err(|e| self.io(&shown, "opened", e))?
                }
            };
            if !keep {
                let removed = self.disk.remove(&shown);
                removed.map_err(|e| self.io(&shown, "removed", e))?;
            }
        }
        if journal.is_some() {
            self.found.push(found);
        }
        Ok(())
    }

    /// The end of a journal: nothing may follow. What is read from here on must stay, so it is synced: the process that
    /// wrote it may have ended before it could.
    fn cut(&self, last: &Live, walked: &scan::Walked) -> Result<Option<String>, JournalError> {
        let synced = last.file.datasync();
        synced.map_err(last.io("synced"))?;
        let Some(why) = walked.why else {
            return Ok(None);
        };
        if scan::later_group(last, walked.end, walked.expected.number)?.is_some() {
            return Err(last.damaged(u64::from(walked.end), why));
        }
        let Some(torn) = scan::torn(last, walked)? else {
            return Ok(None);
        };
        let file = last.path();
        let cut = format!("{file}: cut at byte {}: {torn}; {why}", walked.end);
        tracing::warn!("{cut}");
        Ok(Some(cut))
    }

    fn live(&self, name: Name) -> Result<Arc<Live>, JournalError> {
        open_segment(&self.disk, name, self.files.next_id())
    }

    fn io(&self, name: &str, doing: &'static str, source: io::Error) -> JournalError {
        JournalError::Io {
            file: self.disk.path(name),
            doing,
            source,
        }
    }
}

/// Reads payloads of all journals back, from the page cache if they are young.
#[derive(Clone, Default)]
pub struct Files(Arc<FilesInner>);

#[derive(Default)]
struct FilesInner {
    live: RwLock<FnvHashMap<u32, Arc<Live>>>,
    last_id: AtomicU32,
    /// Journals of shards that are no more, which still hold records.
    left: AtomicUsize,
}

impl Files {
    /// Replaces what is in `into` by the payload, checked. Reads the file: microseconds from memory, else as long as
    /// the disk takes.
    ///
    /// # Errors
    /// [`JournalError::Recycled`]: the record is in SQL by now. Else the disk.
    pub fn read(&self, place: Place, into: &mut Vec<u8>) -> Result<(), JournalError> {
        let live = self.get(place.file).ok_or(JournalError::Recycled)?;
        let offset = u64::from(place.offset - RECORD_HEAD);
        into.clear();
        into.resize((RECORD_HEAD + place.len) as usize, 0);
        let read = read_full(&*live.file, into, offset).map_err(live.io("read"))?;
        if !format::check_record(live.seed, &into[..read]) {
            // it may have been recycled while it was read
            self.get(place.file).ok_or(JournalError::Recycled)?;
            return Err(live.damaged(offset, "a record's checksum is wrong"));
        }
        into.drain(..RECORD_HEAD as usize);
        Ok(())
    }

    fn get(&self, id: u32) -> Option<Arc<Live>> {
        let live = self.0.live.read();
        let live = live.expect("a thread that panics ends the process");
        live.get(&id).cloned()
    }

    /// Journals that have been left and are not empty, durably: one more, one less.
    fn left(&self) -> &AtomicUsize {
        &self.0.left
    }

    fn next_id(&self) -> u32 {
        self.0.last_id.fetch_add(1, Relaxed) + 1
    }

    fn insert(&self, segment: Arc<Live>) {
        let live = self.0.live.write();
        let mut live = live.expect("a thread that panics ends the process");
        live.insert(segment.id, segment);
    }

    fn remove(&self, id: u32) {
        let live = self.0.live.write();
        live.expect("a thread that panics ends the process")
            .remove(&id);
    }
}

fn identity(id: &[u8; 16]) -> u64 {
    // positive in SQL
    u64::from_le_bytes(std::array::from_fn(|i| id[i])) >> 1
}

/// The files of a journal, by name; ordered by shard, segments first and by generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    Segment(u16, u64),
    Spare(u16, u64),
    /// Not ready: of no use after a crash.
    New(u16, u64),
}

impl Name {
    fn shard(&self) -> u16 {
        let (Name::Segment(shard, _) | Name::Spare(shard, _) | Name::New(shard, _)) = self;
        *shard
    }

    fn parse(text: &str) -> Option<Name> {
        let (shard, rest) = text.split_once('-')?;
        let (number, kind) = rest.split_once('.')?;
        let (shard, number) = (shard.parse().ok()?, number.parse().ok()?);
        let name = match kind {
            "seg" => Name::Segment(shard, number),
            "spare" => Name::Spare(shard, number),
            "new" => Name::New(shard, number),
            _ => return None,
        };
        (name.to_string() == text).then_some(name)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Segment(shard, generation) => write!(f, "{shard:05}-{generation:012}.seg"),
            Name::Spare(shard, number) => write!(f, "{shard:05}-{number}.spare"),
            Name::New(shard, number) => write!(f, "{shard:05}-{number}.new"),
        }
    }
}

/// The journals' files in a folder; others are left alone, and told.
fn sorted_names(disk: &dyn Disk) -> Result<Vec<Name>, JournalError> {
    let listed = disk.list().map_err(|source| JournalError::Io {
        file: disk.path(""),
        doing: "read",
        source,
    })?;
    let mut names = Vec::with_capacity(listed.len());
    for name in listed {
        match Name::parse(&name) {
            Some(name) => names.push(name),
            None => tracing::warn!("{}: is no file of a journal", disk.path(&name)),
        }
    }
    names.sort_by_key(|name| (name.shard(), *name));
    Ok(names)
}

/// Opens a segment whose header agrees with its name.
fn open_segment(disk: &Arc<dyn Disk>, name: Name, id: u32) -> Result<Arc<Live>, JournalError> {
    let shown = name.to_string();
    let file = disk.open(&shown).map_err(|source| JournalError::Io {
        file: disk.path(&shown),
        doing: "opened",
        source,
    })?;
    let header = scan::header(&**disk, &shown, &*file)?;
    let live = Live::new(id, shown, header, file, disk.clone());
    match Name::Segment(header.shard, header.generation) == name {
        true => Ok(Arc::new(live)),
        false => Err(live.damaged(
            0,
            format!(
                "by its header it is generation {} of shard {}",
                header.generation, header.shard
            ),
        )),
    }
}

/// Whether a segment goes on where the one before it ends.
fn follows(before: &Live, walked: &scan::Walked, live: &Live) -> Result<(), JournalError> {
    let (expected, header) = (walked.expected, live.header);
    if header.first_group == expected.number && header.first_seq >= expected.seq {
        return Ok(());
    }
    if header.first_group <= expected.number {
        return Err(live.damaged(0, "it does not follow the segment before it"));
    }
    if header.generation > before.header.generation + 1 {
        return Err(JournalError::Missing {
            before: before.name.clone(),
            file: live.path(),
        });
    }
    let why = match walked.why {
        Some(why) => why.to_string(),
        None => format!("groups up to {} should follow", header.first_group - 1),
    };
    Err(before.damaged(u64::from(walked.end), why))
}

fn access<'a>(
    live: &Live,
    offset: u32,
    payload: &'a [u8],
) -> Result<&'a ArchivedChange<'static>, JournalError> {
    ArchivedChange::access(payload).map_err(|why| live.damaged(u64::from(offset), why))
}
