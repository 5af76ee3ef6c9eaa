//! Looking at journals of a stopped server, and saving what can be saved.
//!
//! In: the folder. Out: for each segment what is in it and what is damaged ([`verify`]); every readable record
//! ([`show`]); segments that [`super::open`] accepts ([`repair`]). Promises: verify and show change nothing; repair keeps
//! a copy of each file before it changes it, drops nothing that can be read, names what is lost, and can be interrupted
//! and begun again at any point.
//!
//! A repaired segment keeps its name, journal and generation, so that groups are copied as they are. A lost record
//! between others becomes an empty [`Change::Marks`]; lost groups become a group of no records (see [`super::format`]),
//! in place, or, where the end of a segment or a whole one is missing, at the begin of the next one.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::disk::{Disk, DiskFile, read_full, write_full};
use super::format::{
    self, BLOCK, BadGroup, GROUP_HEAD, GroupHead, Header, RECORD_HEAD, Records, padded,
};
use super::scan::{Expected, Live, Window, later_group, torn};
use super::{JournalError, Name, open_segment, sorted_names};
use crate::store::change::{ArchivedChange, Change, Marks};

/// What is in the journals of a folder.
#[derive(Debug, Default)]
pub struct Report {
    /// By shard and generation.
    pub segments: Vec<SegmentReport>,
}

#[derive(Debug)]
pub struct SegmentReport {
    pub file: String,
    /// Bytes up to the end of the last group, and of the file.
    pub used: u64,
    pub bytes: u64,
    /// That can be read.
    pub groups: u64,
    pub records: u64,
    /// Of the records that can be read.
    pub seqs: Option<RangeInclusive<u64>>,
    pub damage: Vec<Damage>,
    /// What would be cut off at the end: a group that was never acknowledged.
    pub tail: Option<String>,
}

#[derive(Debug)]
pub struct Damage {
    pub offset: u64,
    pub why: String,
    /// Sequence numbers that cannot be read.
    pub lost: Vec<RangeInclusive<u64>>,
}

/// Reads everything; changes nothing.
///
/// # Errors
/// The folder or a file cannot be read at all, or another release wrote it.
pub fn verify(disk: &Arc<dyn Disk>) -> Result<Report, JournalError> {
    let segments = examine(disk)?;
    Ok(Report {
        segments: segments.into_iter().map(|s| s.report).collect(),
    })
}

/// Gives `f` every record that can be read: shard, sequence number, change.
///
/// # Errors
/// As [`verify`].
pub fn show(
    disk: &Arc<dyn Disk>,
    mut f: impl FnMut(u16, u64, &ArchivedChange),
) -> Result<(), JournalError> {
    let mut window = Window::default();
    for segment in examine(disk)? {
        let Some(live) = &segment.live else { continue };
        for piece in &segment.pieces {
            match piece {
                Piece::Raw { at } => {
                    let group = window.group(live, *at, live.end())?;
                    let (head, bytes) = group.map_err(|why| live.damaged(u64::from(*at), why))?;
                    for record in Records::new(&head, bytes) {
                        if let Ok(change) = ArchivedChange::access(record.payload) {
                            f(segment.name.shard(), record.seq, change);
                        }
                    }
                }
                Piece::Built {
                    first_seq,
                    payloads,
                    ..
                } => {
                    for (seq, payload) in (*first_seq..).zip(payloads) {
                        if let Some(Ok(change)) = payload.as_deref().map(ArchivedChange::access) {
                            f(segment.name.shard(), seq, change);
                        }
                    }
                }
                Piece::Skip { .. } => {}
            }
        }
    }
    Ok(())
}

/// Rewrites what is damaged; copies of the files as they were go to `backup` first.
///
/// # Errors
/// As [`verify`]; or a file cannot be written.
pub fn repair(disk: &Arc<dyn Disk>, backup: &dyn Disk) -> Result<Report, JournalError> {
    let segments = examine(disk)?;
    for segment in segments.iter().filter(|s| !s.report.damage.is_empty()) {
        let name = segment.name.to_string();
        let io = |doing| {
            let file = disk.path(&name);
            move |source| JournalError::Io {
                file,
                doing,
                source,
            }
        };
        copy(&*disk.open(&name).map_err(io("opened"))?, backup, &name).map_err(io("copied"))?;
        match &segment.live {
            Some(live) => rewrite(&**disk, live, segment)?,
            None => disk.remove(&name).map_err(io("removed"))?,
        }
        disk.sync_dir().map_err(io("synced"))?;
    }
    Ok(Report {
        segments: segments.into_iter().map(|s| s.report).collect(),
    })
}

impl Report {
    /// Whether [`super::open`] accepts it.
    pub fn is_good(&self) -> bool {
        self.segments.iter().all(|s| s.damage.is_empty())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.segments {
            let SegmentReport {
                file,
                used,
                bytes,
                groups,
                records,
                ..
            } = segment;
            write!(
                f,
                "{file}: {used} of {bytes} bytes, {groups} groups, {records} records"
            )?;
            match &segment.seqs {
                Some(seqs) => writeln!(f, ", {} to {}", seqs.start(), seqs.end())?,
                None => writeln!(f)?,
            }
            for Damage { offset, why, lost } in &segment.damage {
                write!(f, "  damaged at byte {offset}: {why}; ")?;
                match lost.as_slice() {
                    [] => writeln!(f, "no record is known to be lost")?,
                    lost => {
                        let lost = lost.iter().map(|range| match (range.start(), range.end()) {
                            (one, same) if one == same => one.to_string(),
                            (first, last) => format!("{first} to {last}"),
                        });
                        writeln!(f, "lost records: {}", lost.collect::<Vec<_>>().join(", "))?;
                    }
                }
            }
            if let Some(tail) = &segment.tail {
                writeln!(f, "  torn at byte {used}, never acknowledged: {tail}")?;
            }
        }
        Ok(())
    }
}

/// A segment and what it would be after a repair.
struct Segment {
    name: Name,
    /// `None`: nothing in it can be read.
    live: Option<Arc<Live>>,
    /// What it should be expected to begin with.
    begins: Expected,
    pieces: Vec<Piece>,
    report: SegmentReport,
}

enum Piece {
    /// A group as it is.
    Raw { at: u32 },
    /// What is left of a damaged group; `None`: a lost record.
    Built {
        number: u64,
        first_seq: u64,
        payloads: Vec<Option<Vec<u8>>>,
    },
    /// Lost groups up to this number; sequence numbers go on with `seq`.
    Skip { number: u64, seq: u64 },
}

fn examine(disk: &Arc<dyn Disk>) -> Result<Vec<Segment>, JournalError> {
    let mut all = Vec::new();
    // for windows only
    let mut ids = 0..;
    let mut names = sorted_names(&**disk)?;
    names.retain(|name| matches!(name, Name::Segment(..)));
    for names in names.chunk_by(|a, b| a.shard() == b.shard()) {
        let mut opened = Vec::new();
        for name in names {
            match open_segment(disk, *name, ids.next().unwrap_or(0)) {
                Ok(live) => opened.push((*name, Ok(live))),
                Err(JournalError::Damaged { why, .. }) => opened.push((*name, Err(why))),
                Err(other) => return Err(other),
            }
        }
        let good = opened.iter().find_map(|(_, live)| live.as_ref().ok());
        let journal = good.map(|live| live.header.journal);
        let mut expected = None;
        for at in 0..opened.len() {
            let following = opened[at + 1..].iter();
            let next = following
                .filter_map(|(_, live)| live.as_ref().ok())
                .map(|live| Expected::at_begin_of(&live.header))
                .next();
            let (name, live) = &opened[at];
            let live = match live {
                Ok(live) if Some(live.header.journal) != journal => {
                    Err("it belongs to another journal of this shard".to_owned())
                }
                Ok(live) => Ok((live.clone(), None)),
                Err(why) => match guess(disk, *name, journal, ids.next().unwrap_or(0))? {
                    Some(live) => Ok((live, Some(why.clone()))),
                    None => Err(why.clone()),
                },
            };
            let is_last = at + 1 == opened.len();
            let segment = match live {
                Ok((live, why)) => segment(*name, &live, why, &mut expected, next, is_last)?,
                Err(why) => unreadable(disk, *name, why, expected),
            };
            all.push(segment);
        }
    }
    Ok(all)
}

/// A segment whose header is lost: what it must have been, if any group agrees with that.
fn guess(
    disk: &Arc<dyn Disk>,
    name: Name,
    journal: Option<[u8; 16]>,
    id: u32,
) -> Result<Option<Arc<Live>>, JournalError> {
    let (Name::Segment(shard, generation), Some(journal)) = (name, journal) else {
        return Ok(None);
    };
    let shown = name.to_string();
    let io = |source| JournalError::Io {
        file: disk.path(&shown),
        doing: "opened",
        source,
    };
    let file = disk.open(&shown).map_err(io)?;
    let bytes = file.bytes().map_err(io)? / u64::from(BLOCK) * u64::from(BLOCK);
    let mut header = Header {
        shard,
        generation,
        bytes: bytes.clamp(*super::SEGMENT_BYTES.start(), *super::SEGMENT_BYTES.end()),
        first_seq: 1,
        first_group: 1,
        journal,
    };
    let live = |header| Live::new(id, shown.clone(), header, file.clone(), disk.clone());
    let Some((_, first)) = later_group(&live(header), 0, 0)? else {
        return Ok(None);
    };
    (header.first_seq, header.first_group) = (first.first_seq, first.number);
    Ok(Some(Arc::new(live(header))))
}

fn unreadable(
    disk: &Arc<dyn Disk>,
    name: Name,
    why: String,
    expected: Option<Expected>,
) -> Segment {
    let report = SegmentReport {
        file: disk.path(&name.to_string()),
        used: 0,
        bytes: 0,
        groups: 0,
        records: 0,
        seqs: None,
        damage: vec![Damage {
            offset: 0,
            why: format!("{why}; nothing in it can be read"),
            lost: Vec::new(),
        }],
        tail: None,
    };
    Segment {
        name,
        live: None,
        begins: expected.unwrap_or(Expected { number: 1, seq: 1 }),
        pieces: Vec::new(),
        report,
    }
}

/// Reads a segment through all damage. `expected` is what the one before it leaves, `next` what the one behind it
/// begins with.
fn segment(
    name: Name,
    live: &Arc<Live>,
    bad_header: Option<String>,
    expected: &mut Option<Expected>,
    next: Option<Expected>,
    is_last: bool,
) -> Result<Segment, JournalError> {
    let begin = Expected::at_begin_of(&live.header);
    let begins = expected.unwrap_or(begin);
    let mut segment = Segment {
        name,
        live: Some(live.clone()),
        begins,
        pieces: Vec::new(),
        report: SegmentReport {
            file: live.path(),
            used: u64::from(BLOCK),
            bytes: live.header.bytes,
            groups: 0,
            records: 0,
            seqs: None,
            damage: Vec::new(),
            tail: None,
        },
    };
    if let Some(why) = bad_header {
        segment.damaged(0, why, vec![]);
    }
    if begins.number > begin.number {
        segment.damaged(0, "it does not follow the segment before it", vec![]);
    }
    if begins.number < begin.number {
        segment.skip(0, "groups before this segment are missing", begins, begin);
    }
    let mut expected_here = Expected {
        number: begins.number.max(begin.number),
        seq: begins.seq.max(begin.seq),
    };
    let mut window = Window::default();
    let mut at = BLOCK;
    while at < live.end() {
        let group = window.group(live, at, live.end())?;
        let checked = group.and_then(|(head, bytes)| {
            expected_here.check(&head)?;
            Ok((head, bytes))
        });
        let why = match checked {
            Ok((head, bytes)) => {
                if !format::PAYLOAD_VERSIONS.contains(&head.payload_version) {
                    return Err(JournalError::PayloadVersion {
                        file: live.path(),
                        found: head.payload_version,
                    });
                }
                segment.group(at, &head, bytes);
                expected_here = Expected::behind(&head);
                at += head.padded();
                continue;
            }
            Err(why) => why,
        };
        let here = match window.group(live, at, live.end())? {
            Ok((head, _)) if head.number > expected_here.number => Some((at, head)),
            _ => later_group(live, at, expected_here.number)?,
        };
        let (to, limit) = match (here, next) {
            (Some((offset, head)), _) => (
                offset,
                Some(Expected {
                    number: head.number,
                    seq: head.first_seq,
                }),
            ),
            (None, Some(next)) if next.number > expected_here.number => (live.end(), Some(next)),
            _ => (live.end(), None),
        };
        let Some(limit) = limit else {
            if is_last {
                let walked = super::scan::Walked {
                    end: at,
                    expected: expected_here,
                    groups: 0,
                    records: 0,
                    why: Some(why),
                };
                segment.report.tail = torn(live, &walked)?;
            }
            break;
        };
        expected_here = segment.lost(live, &mut window, at..to, why, expected_here, limit)?;
        if here.is_none() {
            break;
        }
        at = to;
    }
    *expected = Some(expected_here);
    Ok(segment)
}

impl Segment {
    fn damaged(&mut self, at: u32, why: impl ToString, lost: Vec<RangeInclusive<u64>>) {
        self.report.damage.push(Damage {
            offset: u64::from(at),
            why: why.to_string(),
            lost,
        });
    }

    /// Groups that are nowhere.
    fn skip(&mut self, at: u32, why: &str, from: Expected, to: Expected) {
        let lost = (from.seq < to.seq).then(|| from.seq..=to.seq - 1);
        self.damaged(at, why, lost.into_iter().collect());
        self.pieces.push(Piece::Skip {
            number: to.number - 1,
            seq: to.seq,
        });
    }

    fn count(&mut self, seqs: impl Iterator<Item = u64>) {
        self.report.groups += 1;
        for seq in seqs {
            self.report.records += 1;
            let first = self.report.seqs.as_ref().map_or(seq, |seqs| *seqs.start());
            self.report.seqs = Some(first..=seq);
        }
    }

    /// A good group; what is in a record may be damaged all the same, if it was so when it was written.
    fn group(&mut self, at: u32, head: &GroupHead, bytes: &[u8]) {
        let records = || Records::new(head, bytes);
        let readable = |payload: &[u8]| ArchivedChange::access(payload).map(drop);
        let unreadable = records().find_map(|record| readable(record.payload).err());
        self.report.used = u64::from(at + head.padded());
        let Some(why) = unreadable else {
            self.pieces.push(Piece::Raw { at });
            return self.count(records().map(|record| record.seq));
        };
        let kept = |payload: &[u8]| readable(payload).is_ok().then(|| payload.to_vec());
        let payloads: Vec<_> = records().map(|record| kept(record.payload)).collect();
        self.built(
            at,
            why,
            head.number,
            head.first_seq,
            payloads,
            head.next_seq(),
        );
    }

    /// What is left of a group; what is missing of it ends before `end`.
    fn built(
        &mut self,
        at: u32,
        why: impl ToString,
        number: u64,
        first_seq: u64,
        payloads: Vec<Option<Vec<u8>>>,
        end: u64,
    ) {
        let mut lost: Vec<RangeInclusive<u64>> = Vec::new();
        for seq in first_seq..end {
            let kept = payloads.get((seq - first_seq) as usize);
            if kept.is_none_or(Option::is_none) {
                match lost.last_mut() {
                    Some(last) if *last.end() + 1 == seq => *last = *last.start()..=seq,
                    _ => lost.push(seq..=seq),
                }
            }
        }
        self.damaged(at, why, lost);
        let kept = (first_seq..).zip(&payloads);
        let kept: Vec<_> = kept
            .filter(|(_, p)| p.is_some())
            .map(|(seq, _)| seq)
            .collect();
        self.count(kept.into_iter());
        self.pieces.push(Piece::Built {
            number,
            first_seq,
            payloads,
        });
    }

    /// Bytes between two good groups, or behind the last one although more should follow, in which groups from `from`
    /// to `to` cannot be read as they are.
    fn lost(
        &mut self,
        live: &Live,
        window: &mut Window,
        bytes: std::ops::Range<u32>,
        why: BadGroup,
        from: Expected,
        to: Expected,
    ) -> Result<Expected, JournalError> {
        let mut from = from;
        let mut why = why;
        let mut at = bytes.start;
        let mut told = bytes.start;
        while at < bytes.end && from.number < to.number {
            if let Some((number, first_seq, payloads)) = salvage(
                live,
                window,
                at..bytes.end,
                (at == bytes.start).then_some(from),
                from,
                to,
            )? {
                if number > from.number {
                    let before = Expected {
                        number,
                        seq: first_seq,
                    };
                    self.skip(told, &why.to_string(), from, before);
                }
                // what a damaged head leaves out ends where the next one begins, if that is the next one
                let records = payloads.len() as u64;
                let end = match number + 1 == to.number {
                    true => to.seq,
                    false => first_seq + records,
                };
                self.built(at, why, number, first_seq, payloads, end);
                from = Expected {
                    number: number + 1,
                    seq: end,
                };
                why = BadGroup::NotOne;
                told = at + BLOCK;
            }
            at += BLOCK;
        }
        if from.number < to.number && bytes.end < live.end() {
            self.skip(told, &why.to_string(), from, to);
            from = to;
        } else if from.number < to.number {
            // told here, and skipped at the begin of the next segment
            let lost = (from.seq < to.seq).then(|| from.seq..=to.seq - 1);
            self.damaged(told, why, lost.into_iter().collect());
        }
        Ok(from)
    }
}

/// A damaged group's number, first sequence number and records.
type Salvaged = (u64, u64, Vec<Option<Vec<u8>>>);

/// What can still be read of a group that begins at `bytes.start`. If its head cannot be read it must be `here`.
fn salvage(
    live: &Live,
    window: &mut Window,
    bytes: std::ops::Range<u32>,
    here: Option<Expected>,
    from: Expected,
    to: Expected,
) -> Result<Option<Salvaged>, JournalError> {
    let length = u64::from(bytes.end - bytes.start);
    let (at, end) = (u64::from(bytes.start), u64::from(bytes.end));
    let head = window.get(live, at, u64::from(GROUP_HEAD), end)?;
    let is_between = |head: &GroupHead| {
        (from.number..to.number).contains(&head.number)
            && (from.seq..=to.seq).contains(&head.first_seq)
            && head.next_seq() <= to.seq
    };
    let head = GroupHead::parse(head, length).ok().filter(is_between);
    let (number, first_seq, most, bytes) = match (head, here) {
        (Some(head), _) => (head.number, head.first_seq, head.records, head.bytes),
        (None, Some(here)) => {
            let most = u32::try_from(to.seq - here.seq).unwrap_or(u32::MAX);
            (here.number, here.seq, most, length as u32)
        }
        (None, None) => return Ok(None),
    };
    let group = window.get(live, at, u64::from(bytes), end)?;
    // lengths can be trusted if only payloads are damaged
    let trusted = head.is_some_and(|head| {
        group.len() == head.bytes as usize
            && matches!(head.check(live.seed, group), Err(BadGroup::Record(_)))
    });
    let mut payloads = Vec::new();
    for record in Records::chain(group, first_seq, most) {
        let good = record.is_good(live.seed) && ArchivedChange::access(record.payload).is_ok();
        match (good, trusted) {
            (true, _) => payloads.push(Some(record.payload.to_vec())),
            (false, true) => payloads.push(None),
            (false, false) => break,
        }
    }
    let found = trusted || !payloads.is_empty();
    Ok(found.then_some((number, first_seq, payloads)))
}

/// Writes what a segment should be beside it, and then in its place.
fn rewrite(disk: &dyn Disk, live: &Live, segment: &Segment) -> Result<(), JournalError> {
    let Name::Segment(shard, generation) = segment.name else {
        unreachable!("only segments are examined");
    };
    let new = Name::New(shard, generation).to_string();
    let failed = live.io("written");
    let file = disk.create(&new).map_err(&failed)?;
    let mut at = BLOCK;
    let mut window = Window::default();
    for piece in &segment.pieces {
        let mut bytes = match piece {
            Piece::Raw { at } => {
                let group = window.group(live, *at, live.end())?;
                let (_, bytes) = group.map_err(|why| live.damaged(u64::from(*at), why))?;
                bytes.to_vec()
            }
            Piece::Built {
                number,
                first_seq,
                payloads,
            } => sealed(live.seed, *number, *first_seq, payloads),
            Piece::Skip { number, seq } => sealed(live.seed, *number, *seq, &[]),
        };
        bytes.resize(padded(bytes.len() as u32) as usize, 0);
        write_full(&*file, &bytes, u64::from(at)).map_err(&failed)?;
        at += bytes.len() as u32;
    }
    // what stands for lost groups may need a little more room than there was
    let header = Header {
        bytes: live.header.bytes.max(u64::from(at)),
        first_seq: segment.begins.seq,
        first_group: segment.begins.number,
        ..live.header
    };
    write_full(&*file, &header.block(), 0).map_err(&failed)?;
    let zeros = vec![0; 1 << 20];
    let mut rest = u64::from(at);
    while rest < header.bytes {
        let piece = (header.bytes - rest).min(zeros.len() as u64);
        write_full(&*file, &zeros[..piece as usize], rest).map_err(&failed)?;
        rest += piece;
    }
    file.datasync().map_err(&failed)?;
    disk.rename(&new, &live.name).map_err(&failed)
}

fn sealed(seed: u32, number: u64, first_seq: u64, payloads: &[Option<Vec<u8>>]) -> Vec<u8> {
    let mut nothing = Vec::new();
    Change::Marks(Marks::default()).encode(&mut nothing);
    let mut bytes = vec![0; GROUP_HEAD as usize];
    for payload in payloads {
        let payload = payload.as_ref().unwrap_or(&nothing);
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.resize(bytes.len() + RECORD_HEAD as usize - 4, 0);
        bytes.extend_from_slice(payload);
    }
    format::seal(&mut bytes, seed, number, first_seq, payloads.len() as u32);
    bytes
}

/// Copies a file as it is, durably.
fn copy(from: &dyn DiskFile, to: &dyn Disk, name: &str) -> std::io::Result<()> {
    let file = to.create(name)?;
    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let read = read_full(from, &mut piece, at)?;
        if read == 0 {
            file.datasync()?;
            return to.sync_dir();
        }
        write_full(&*file, &piece[..read], at)?;
        at += read as u64;
    }
}
