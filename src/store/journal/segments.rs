//! One journal: its segments, its spares, and what may be recycled. No threads here: [`super::writer`] brings them.
//!
//! In: groups to be committed, positions drained, turns to tidy up. Out: durable bytes, and figures. Promises:
//!
//! - a committed group is there after any crash, a group that is not committed is there whole or not at all (one that
//!   is larger than a segment: its first pieces);
//! - a segment goes only when all its records are drained and their pins passed ([`super::group::Pins`]), the oldest
//!   first, one at a time, each durably, so that what is left has no gap; those of journals whose shards are no more go
//!   before all others;
//! - the file of a segment is written again only when it is durably a spare.
//!
//! A segment's life: `SHARD-N.new` (being filled with zeros) → `SHARD-N.spare` → header and first group are written
//! and synced → `SHARD-GENERATION.seg`, the folder is synced, and only then the group is acknowledged → drained →
//! `.spare` again, the folder is synced.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use super::disk::{Disk, DiskFile, is_full, write_full};
use super::format::{self, BLOCK, GROUP_HEAD, Header, padded};
use super::group::{Extent, Group, Pins};
use super::scan::{Expected, Live};
use super::state::State;
use super::{Files, Floors, JournalError, Name};

/// So many empty segments are kept ready: one to go on with, one in reserve for completions when the disk is full.
pub(super) const SPARES_WANTED: usize = 2;
/// So many recycled ones are kept; more are removed.
const SPARES_MAX: usize = 4;
/// A new segment is filled with zeros in such pieces: the kernel copies each without giving the core back (4 MiB took 5.2 ms of a
/// shard's core), 64 KiB in 0.08 ms.
const FILL_BYTES: u64 = 64 << 10;
/// It is synced whenever so much is new, so that no commit waits long behind it.
const FILL_SYNC_BYTES: u64 = 4 << 20;
/// How many marks for drained positions a segment gets.
const MARKS: u32 = 64;

/// What the committer, the keeper and the drain share.
pub(super) struct Journal {
    pub shard: u16,
    pub id: [u8; 16],
    pub disk: Arc<dyn Disk>,
    pub files: Files,
    pub state: Arc<State>,
    floors: Floors,
    segment_bytes: u64,
    backlog_bytes_max: u64,
    table: Mutex<Table>,
    /// There is a spare, or the wait is over for another reason.
    room: Condvar,
    on_progress: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
pub(super) struct Table {
    /// Oldest first; the last one is written.
    pub segments: VecDeque<Segment>,
    spares: Vec<Spare>,
    /// Never used twice: the file that a commit is just making a segment of still has its old name.
    next_spare: u64,
    /// Ascending; the front one is not drained yet.
    marks: VecDeque<Mark>,
    /// Bytes of all groups since the process began; and how many of them are known to be drained.
    written: u64,
    drained: u64,
    pub role: Role,
}

/// What becomes of the journal.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Nobody has said it yet.
    #[default]
    Unknown,
    /// A shard writes it.
    Written,
    /// Its shard is no more: it goes when it is drained.
    Left,
}

/// A segment with groups.
pub(super) struct Segment {
    pub live: Arc<Live>,
    /// What is behind the last group.
    pub end: u32,
    pub last_seq: u64,
    pub pins: Pins,
}

struct Spare {
    name: String,
    file: Arc<dyn DiskFile>,
}

/// `written` when the record `seq` was committed.
struct Mark {
    seq: u64,
    written: u64,
}

/// What a turn of tidying up has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    Worked,
    Idle,
    /// A spare is missing and cannot be made now.
    NoRoom,
}

/// Why a group is not durable.
#[derive(Debug)]
pub(super) enum CommitError {
    /// There is no segment for it; it can be tried again when there is.
    NoSpare,
    /// The disk has no room even where it was written before (some file systems copy on write); it can be tried again.
    NoRoom(io::Error),
    /// Nothing can be believed any more.
    Disk(JournalError),
}

/// What may be changed by options.
pub(super) struct Settings {
    pub floors: Floors,
    pub segment_bytes: u64,
    pub backlog_bytes_max: u64,
}

impl Journal {
    pub fn new(
        shard: u16,
        id: [u8; 16],
        disk: Arc<dyn Disk>,
        files: Files,
        settings: Settings,
    ) -> Journal {
        Journal {
            shard,
            id,
            disk,
            files,
            state: Arc::default(),
            floors: settings.floors,
            segment_bytes: settings.segment_bytes,
            backlog_bytes_max: settings.backlog_bytes_max,
            table: Mutex::default(),
            room: Condvar::new(),
            on_progress: OnceLock::new(),
        }
    }

    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .expect("a thread that panics ends the process")
    }

    /// A segment that was found, behind those that were found before, and where in it groups end: sequence number of
    /// the last record and bytes so far.
    pub fn found(&self, segment: Segment, groups: &[(u64, u32)]) {
        let mut table = self.table();
        let base = table.written;
        for (last_seq, end) in groups {
            table.written = base + u64::from(end - BLOCK);
            self.mark(&mut table, *last_seq);
        }
        self.state.committed(segment.last_seq);
        self.files.insert(segment.live.clone());
        table.segments.push_back(segment);
        self.refresh(&mut table);
    }

    /// A spare that was found; `false`: it is of no use.
    pub fn found_spare(
        &self,
        number: u64,
        name: &str,
        file: Arc<dyn DiskFile>,
    ) -> io::Result<bool> {
        let mut table = self.table();
        table.next_spare = table.next_spare.max(number + 1);
        let good = file.bytes()? == self.segment_bytes && table.spares.len() < SPARES_MAX;
        if good {
            let name = name.to_owned();
            table.spares.push(Spare { name, file });
            self.refresh(&mut table);
        }
        Ok(good)
    }

    pub fn role(&self) -> Role {
        self.table().role
    }

    pub fn set_role(&self, role: Role) {
        let mut table = self.table();
        table.role = role;
        if role == Role::Left && !table.segments.is_empty() {
            self.files.left().fetch_add(1, Relaxed);
        }
    }

    /// Whether a first group could be committed now.
    pub fn has_room(&self) -> bool {
        let table = self.table();
        !table.segments.is_empty() || !table.spares.is_empty()
    }

    /// Everything up to `seq` is in SQL, durably.
    pub fn drained(&self, seq: u64) {
        let mut table = self.table();
        let seq = self.state.drained(seq);
        while let Some(mark) = table.marks.pop_front_if(|mark| mark.seq <= seq) {
            table.drained = mark.written;
        }
        if seq >= self.state.committed_seq() {
            table.drained = table.written;
        }
        self.refresh(&mut table);
    }

    /// One step of tidying up: recycles the oldest segment, or makes a spare.
    ///
    /// # Errors
    /// The folder could not be synced: nothing can be believed any more.
    pub fn keep(&self) -> Result<Kept, JournalError> {
        if let Some(segment) = self.take_recyclable() {
            return self.recycle(segment);
        }
        let mut table = self.table();
        match table.role {
            Role::Left => match table.spares.pop() {
                None => Ok(Kept::Idle),
                Some(spare) => {
                    drop(table);
                    let removed = self.disk.remove(&spare.name);
                    removed.map_err(|e| self.io(&spare.name, "removed", e))?;
                    Ok(Kept::Worked)
                }
            },
            Role::Written if table.spares.len() < SPARES_WANTED => {
                drop(table);
                self.make_spare()
            }
            _ => Ok(Kept::Idle),
        }
    }

    /// Whether it has been left and nothing of it remains.
    pub fn is_gone(&self) -> bool {
        let table = self.table();
        table.role == Role::Left && table.segments.is_empty() && table.spares.is_empty()
    }

    /// Whether segments may become free without anybody saying so: floors rise silently.
    pub fn is_waiting_for_floors(&self) -> bool {
        let table = self.table();
        let drained = self.state.drained_seq();
        let front = table.segments.front();
        front.is_some_and(|s| s.last_seq <= drained) && !self.is_only_active(&table)
    }

    /// Waits until there is a spare, at most `most`.
    pub fn wait_for_spare(&self, most: Duration) {
        let table = self.table();
        if table.spares.is_empty() {
            let waited = self.room.wait_timeout(table, most);
            drop(waited.expect("a thread that panics ends the process"));
        }
    }

    /// Waits `most`, or until [`Journal::wake`].
    pub fn wait(&self, most: Duration) {
        let waited = self.room.wait_timeout(self.table(), most);
        drop(waited.expect("a thread that panics ends the process"));
    }

    /// Refuses new messages until there are enough spares again.
    pub fn lacks_room(&self, why: &io::Error) {
        if !self.state.set_no_room(true) {
            tracing::warn!(
                "{}: the journal finds no room ({why}); new messages are refused until there is some",
                self.disk.path(&format!("{:05}-*", self.shard)),
            );
        }
    }

    /// Ends all waits.
    pub fn wake(&self) {
        // whoever is about to wait holds the table
        let _table = self.table();
        self.room.notify_all();
    }

    /// Sets what [`Journal::progressed`] calls, once.
    pub fn on_progress(&self, f: Box<dyn Fn() + Send + Sync>) {
        let _ = self.on_progress.set(f);
    }

    /// A group was committed.
    pub fn progressed(&self) {
        if let Some(f) = self.on_progress.get() {
            f();
        }
    }

    fn is_only_active(&self, table: &Table) -> bool {
        table.role != Role::Left && table.segments.len() == 1
    }

    /// Takes the oldest segment off the table if it may be recycled.
    fn take_recyclable(&self) -> Option<Segment> {
        let mut table = self.table();
        if table.role == Role::Unknown || self.is_only_active(&table) {
            return None;
        }
        // what ends a message of a journal that was left, mark or twin, must outlive it there
        if table.role == Role::Written && self.files.left().load(Relaxed) > 0 {
            return None;
        }
        let drained = self.state.drained_seq();
        let floor = |shard: usize| Some(self.floors.get(shard)?.load(Relaxed));
        let segment = table
            .segments
            .pop_front_if(|s| s.last_seq <= drained && s.pins.are_passed(floor))?;
        self.files.remove(segment.live.id);
        self.refresh(&mut table);
        Some(segment)
    }

    fn recycle(&self, segment: Segment) -> Result<Kept, JournalError> {
        let Live { name, header, .. } = &*segment.live;
        let spare = {
            let mut table = self.table();
            let wanted = table.role == Role::Written
                && table.spares.len() < SPARES_MAX
                && header.bytes == self.segment_bytes;
            wanted.then(|| self.spare_name(&mut table))
        };
        let renamed = match &spare {
            Some(spare) => self.disk.rename(name, spare),
            None => self.disk.remove(name),
        };
        match renamed {
            Ok(()) => {}
            Err(e) if is_full(&e) => {
                self.files.insert(segment.live.clone());
                self.table().segments.push_front(segment);
                return Ok(Kept::NoRoom);
            }
            Err(e) => return Err(self.io(name, "recycled", e)),
        }
        let synced = self.disk.sync_dir();
        synced.map_err(|e| self.io(name, "recycled", e))?;
        let table = self.table();
        if table.role == Role::Left && table.segments.is_empty() {
            self.files.left().fetch_sub(1, Relaxed);
        }
        drop(table);
        if let Some(name) = spare {
            let file = segment.live.file.clone();
            self.add_spare(Spare { name, file });
        }
        Ok(Kept::Worked)
    }

    /// Makes a file full of zeros: a block that has been written before needs no more than its own sync.
    pub(super) fn make_spare(&self) -> Result<Kept, JournalError> {
        let name = self.spare_name(&mut self.table());
        let new = name.replace(".spare", ".new");
        match self.fill(&new).and_then(|file| {
            self.disk.rename(&new, &name)?;
            Ok(file)
        }) {
            Ok(file) => {
                self.add_spare(Spare { name, file });
                Ok(Kept::Worked)
            }
            Err(e) => {
                // what is half done would only take the room that is missing
                let _ = self.disk.remove(&new);
                self.lacks_room(&e);
                Ok(Kept::NoRoom)
            }
        }
    }

    fn fill(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.create(name)?;
        let zeros = vec![0; FILL_BYTES.min(self.segment_bytes) as usize];
        let mut at = 0;
        while at < self.segment_bytes {
            let piece = (self.segment_bytes - at).min(zeros.len() as u64);
            write_full(&*file, &zeros[..piece as usize], at)?;
            at += piece;
            if at.is_multiple_of(FILL_SYNC_BYTES) || at == self.segment_bytes {
                file.datasync()?;
            }
            // a shard that shares the core has waited long enough
            std::thread::yield_now();
        }
        Ok(file)
    }

    fn add_spare(&self, spare: Spare) {
        let mut table = self.table();
        table.spares.push(spare);
        self.has_room_again(&table);
        self.refresh(&mut table);
        self.room.notify_all();
    }

    fn has_room_again(&self, table: &Table) {
        if table.spares.len() >= SPARES_WANTED && self.state.set_no_room(false) {
            tracing::info!("journal {}: there is room again", self.shard);
        }
    }

    fn spare_name(&self, table: &mut Table) -> String {
        table.next_spare += 1;
        Name::Spare(self.shard, table.next_spare).to_string()
    }

    /// Remembers how much is written when `seq` is, in steps: nobody needs it exact.
    fn mark(&self, table: &mut Table, seq: u64) {
        let step = self.segment_bytes / u64::from(MARKS);
        let last = table.marks.back().map_or(table.drained, |m| m.written);
        if table.written - last >= step {
            let written = table.written;
            table.marks.push_back(Mark { seq, written });
        }
    }

    /// Tells the figures, and the log when a bound is passed.
    fn refresh(&self, table: &mut Table) {
        let backlog = table.written - table.drained;
        // what is drained but pinned takes room as well
        let held = table.segments.len().saturating_sub(3) as u64 * self.segment_bytes;
        let full = backlog > self.backlog_bytes_max || held > self.backlog_bytes_max;
        self.state
            .set_figures(backlog, table.segments.len(), table.spares.len());
        if self.state.set_backlog_full(full) != full {
            match full {
                true => tracing::warn!(
                    "journal {}: {} segments are kept, {backlog} bytes in them are not in the database yet; new messages are refused until it has caught up",
                    self.shard,
                    table.segments.len()
                ),
                false => tracing::info!("journal {}: the database has caught up", self.shard),
            }
        }
    }

    fn io(&self, name: &str, doing: &'static str, source: io::Error) -> JournalError {
        JournalError::Io {
            file: self.disk.path(name),
            doing,
            source,
        }
    }
}

/// The end of a journal where groups are written; there is one.
pub(super) struct Appender {
    journal: Arc<Journal>,
    /// The last segment, and where its groups end.
    active: Option<(Arc<Live>, u32)>,
    generation: u64,
    expected: Expected,
}

impl Appender {
    /// Goes on behind what was found; `expected.seq` is the next free sequence number.
    pub fn new(journal: Arc<Journal>, generation: u64, expected: Expected) -> Appender {
        let active = journal
            .table()
            .segments
            .back()
            .map(|s| (s.live.clone(), s.end));
        Appender {
            journal,
            active,
            generation,
            expected,
        }
    }

    /// Makes the group durable. After [`CommitError::NoRoom`] the same group is to be given again.
    pub fn commit(&mut self, group: &mut Group) -> Result<(), CommitError> {
        assert_eq!(
            group.first_seq() + u64::from(group.written.records),
            self.expected.seq,
            "the group begins with the next sequence number"
        );
        while group.written.records < group.records() {
            let room = match &self.active {
                Some((live, end)) => live.end() - end,
                None => 0,
            };
            let (all, _) = group.piece(u32::MAX);
            match group.piece(room) {
                (end, records) if end == all => self.append(group, end, records)?,
                _ => self.activate(group)?,
            }
        }
        Ok(())
    }

    /// Writes a piece into the active segment.
    fn append(&mut self, group: &mut Group, end: usize, records: u32) -> Result<(), CommitError> {
        let (live, at) = self.active.clone().expect("it has room");
        self.write(group, end, records, &live, at)?;
        let synced = live.file.datasync().map_err(live.io("synced"));
        synced.map_err(CommitError::Disk)?;
        self.written(group, end, records, &live, at);
        Ok(())
    }

    /// Writes a piece into the next segment, as much as fits.
    fn activate(&mut self, group: &mut Group) -> Result<(), CommitError> {
        let journal = self.journal.clone();
        let spare = match journal.table().spares.pop() {
            Some(spare) => spare,
            None => return Err(CommitError::NoSpare),
        };
        let header = Header {
            shard: journal.shard,
            generation: self.generation + 1,
            bytes: journal.segment_bytes,
            first_seq: self.expected.seq,
            first_group: self.expected.number,
            journal: journal.id,
        };
        let (end, records) = group.piece(header.bytes as u32 - BLOCK);
        assert!(records > 0, "a segment is larger than any record");
        let name = Name::Segment(journal.shard, header.generation).to_string();
        let live = Arc::new(Live::new(
            journal.files.next_id(),
            name,
            header,
            spare.file.clone(),
            journal.disk.clone(),
        ));
        let prepared = write_full(&*live.file, &header.block(), 0)
            .map_err(|e| commit_error(&live, "written", e))
            .and_then(|()| self.write(group, end, records, &live, BLOCK))
            .and_then(|()| {
                let synced = live.file.datasync().map_err(live.io("synced"));
                synced.map_err(CommitError::Disk)
            })
            .and_then(|()| {
                let renamed = journal.disk.rename(&spare.name, &live.name);
                renamed.map_err(|e| commit_error(&live, "named", e))
            });
        if let Err(why) = prepared {
            journal.table().spares.push(spare);
            return Err(why);
        }
        let synced = journal.disk.sync_dir().map_err(live.io("synced"));
        synced.map_err(CommitError::Disk)?;
        self.generation = header.generation;
        journal.files.insert(live.clone());
        journal.table().segments.push_back(Segment {
            live: live.clone(),
            end: BLOCK,
            last_seq: header.first_seq - 1,
            pins: Pins::default(),
        });
        self.written(group, end, records, &live, BLOCK);
        Ok(())
    }

    /// Seals the piece of the group's buffer up to `end` and writes it.
    fn write(
        &self,
        group: &mut Group,
        end: usize,
        records: u32,
        live: &Live,
        at: u32,
    ) -> Result<(), CommitError> {
        let Expected { number, seq } = self.expected;
        let from = GROUP_HEAD as usize + group.written.bytes;
        let done = if from == GROUP_HEAD as usize && end == group.bytes.len() {
            format::seal(&mut group.bytes, live.seed, number, seq, records);
            group.bytes.resize(padded(end as u32) as usize, 0);
            let done = write_full(&*live.file, &group.bytes, u64::from(at));
            group.bytes.truncate(end);
            done
        } else {
            let mut piece = vec![0; GROUP_HEAD as usize];
            piece.extend_from_slice(&group.bytes[from..end]);
            format::seal(&mut piece, live.seed, number, seq, records);
            piece.resize(padded(piece.len() as u32) as usize, 0);
            write_full(&*live.file, &piece, u64::from(at))
        };
        done.map_err(|e| commit_error(live, "written", e))
    }

    /// The piece is durable.
    fn written(&mut self, group: &mut Group, end: usize, records: u32, live: &Arc<Live>, at: u32) {
        let from = GROUP_HEAD as usize + group.written.bytes;
        group.written.extents.push(Extent {
            from: from as u32,
            file: live.id,
            offset: at + GROUP_HEAD,
        });
        group.written.bytes += end - from;
        group.written.records += records;
        let bytes = padded(GROUP_HEAD + (end - from) as u32);
        self.active = Some((live.clone(), at + bytes));
        self.expected.number += 1;
        self.expected.seq += u64::from(records);
        let last_seq = self.expected.seq - 1;
        let journal = self.journal.clone();
        let mut table = journal.table();
        let segment = table.segments.back_mut().expect("one is active");
        segment.end = at + bytes;
        segment.last_seq = last_seq;
        segment.pins.merge(&group.pins);
        table.written += u64::from(bytes);
        journal.mark(&mut table, last_seq);
        journal.state.committed(last_seq);
        journal.has_room_again(&table);
        journal.refresh(&mut table);
    }
}

/// A disk without room is waited for; all else ends the process.
fn commit_error(live: &Live, doing: &'static str, error: io::Error) -> CommitError {
    match is_full(&error) {
        true => CommitError::NoRoom(error),
        false => CommitError::Disk(live.io(doing)(error)),
    }
}
