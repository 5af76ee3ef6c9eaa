//! The journal on a real folder and with its threads; and what damage it must see.

use std::sync::mpsc;
use std::time::Duration;

use super::disk::Folder;
use super::format::BLOCK;
use super::segments::CommitError;
use super::sim::{Crash, Failing, SimDisk};
use super::*;
use crate::store::change::{Change, Message};

/// Longer than any step takes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn options(segment_bytes: u64) -> Options {
    Options {
        segment_bytes,
        backlog_bytes_max: 1 << 30,
        floors: floors(),
    }
}

fn message(id: u64, stanza: &[u8]) -> Change<'_> {
    Change::Message(Message {
        id,
        owner: "alice",
        what: Message::RECEIVED,
        kind: 0,
        flags: 0,
        peer: "bob@localhost",
        twin: 0,
        stream: "",
        count: 0,
        stanza,
    })
}

/// A writer whose commits can be waited for.
struct Bench {
    writer: Writer,
    committed: mpsc::Receiver<Committed>,
}

impl Bench {
    fn new(journals: &mut Journals, shard: u16, drained: u64) -> Bench {
        let (sender, committed) = mpsc::channel();
        let tell = move |committed| {
            // nobody listens any more when a test is over
            let _ = sender.send(committed);
        };
        let writer = journals.writer(shard, drained, Box::new(tell)).unwrap();
        Bench { writer, committed }
    }

    /// Commits records with these stanzas in one group.
    fn commit(&self, stanzas: &[&[u8]]) -> Committed {
        self.submit(stanzas);
        self.committed.recv_timeout(PATIENCE).unwrap()
    }

    fn submit(&self, stanzas: &[&[u8]]) {
        let mut group = Group::new();
        for (seq, stanza) in (self.writer.next_seq()..).zip(stanzas) {
            group.append(seq, &message(seq, stanza));
        }
        self.writer.submit(group);
    }
}

/// Sequence numbers and stanzas.
fn replayed(journals: &Journals) -> Vec<(u16, u64, Vec<u8>)> {
    let mut all = Vec::new();
    let replay = journals.replay(|shard, seq, _, change| {
        let ArchivedChange::Message(message) = change else {
            panic!("only messages were appended");
        };
        all.push((shard, seq, message.stanza.to_vec()));
    });
    replay.unwrap();
    all
}

fn sim() -> (SimDisk, Arc<dyn Disk>) {
    let disk = SimDisk::new(1);
    (disk.clone(), Arc::new(disk))
}

fn refused(disk: &Arc<dyn Disk>) -> String {
    match open(disk.clone(), &options(64 << 10)) {
        Ok(_) => panic!("it must be refused"),
        Err(why) => why.to_string(),
    }
}

/// Waits for something that another thread is about to do.
fn until(what: &str, done: impl Fn() -> bool) {
    let begin = std::time::Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn what_was_committed_on_a_real_disk_is_replayed_read_and_drained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data/journal");
    let disk: Arc<dyn Disk> = Arc::new(Folder::open(&path).unwrap());
    {
        let mut journals = open(disk.clone(), &options(64 << 10)).unwrap();
        let bench = Bench::new(&mut journals, 0, 0);
        let (mut group, mut slots) = (Group::new(), Vec::new());
        for seq in 1..=3 {
            slots.push(group.append(seq, &message(seq, b"hello")));
        }
        bench.writer.submit(group);
        let committed = bench.committed.recv_timeout(PATIENCE).unwrap();
        let mut read = Vec::new();
        for slot in slots {
            journals
                .files()
                .read(committed.place(slot), &mut read)
                .unwrap();
            assert_eq!(read, committed.group.payload(slot));
        }
        // enough for several segments, in groups larger than one
        for n in 0..5_u8 {
            bench.commit(&vec![&[n; 400][..]; 300]);
        }
        assert_eq!(bench.writer.next_seq(), 1504);
        assert!(bench.writer.state().segments() >= 5);
        assert_eq!(bench.writer.state().commits(), 6);
    }
    let mut journals = open(disk.clone(), &options(64 << 10)).unwrap();
    let all = replayed(&journals);
    assert_eq!(all.len(), 1503);
    assert!(
        (1..)
            .zip(&all)
            .all(|(n, (shard, seq, _))| (*shard, *seq) == (0, n))
    );
    assert_eq!(all[1502].2, [4; 400]);
    let found = &journals.found()[0];
    assert_eq!(
        (found.first_seq, found.last_seq, &found.cut),
        (1, 1503, &None)
    );
    let bench = Bench::new(&mut journals, 0, 2);
    let mut reader = journals.reader(0);
    bench.commit(&[b"last"]);
    let (mut bytes, mut records, mut after) = (Vec::new(), Vec::new(), 2);
    while after < 1504 {
        bytes.clear();
        records.clear();
        reader
            .read(after + 1..=u64::MAX, 10_000, &mut bytes, &mut records)
            .unwrap();
        assert!(bytes.len() <= 10_000);
        for (seq, range) in &records {
            after += 1;
            assert_eq!(*seq, after);
            ArchivedChange::access(&bytes[range.clone()]).unwrap();
        }
    }
    let state = bench.writer.state();
    assert!(state.backlog_bytes() > 500_000);
    reader.drained(after);
    assert_eq!(state.backlog_bytes(), 0);
    until("drained segments are recycled", || state.segments() == 1);
    let places_end_with_their_segment = journals.files().read(
        Place {
            file: 1,
            offset: 4144,
            len: 10,
        },
        &mut bytes,
    );
    assert!(matches!(
        places_end_with_their_segment,
        Err(JournalError::Recycled)
    ));
}

/// Three groups of two records; the bytes of the segment, and where the second and third group are.
fn three_groups() -> (SimDisk, Arc<dyn Disk>, Vec<u8>, [usize; 2]) {
    let (sim, disk) = sim();
    let mut journals = open(disk.clone(), &options(64 << 10)).unwrap();
    let (_, mut appender, _) = journals.adopt(0, 0).unwrap();
    let mut begins = Vec::new();
    for n in 0..3_u64 {
        let mut group = Group::new();
        let slots = [1, 2].map(|m| {
            let seq = 2 * n + m;
            group.append(seq, &message(seq, &[seq as u8; 150]))
        });
        appender.commit(&mut group).unwrap();
        let committed = Committed {
            group,
            took: Duration::ZERO,
        };
        begins.push(committed.place(slots[0]).offset as usize - 48);
    }
    let bytes = sim.edit(SEGMENT, |bytes| bytes.clone());
    (sim, disk, bytes, [begins[1], begins[2]])
}

const SEGMENT: &str = "00000-000000000001.seg";

/// All that may be replayed of [`three_groups`] after damage to the last one.
fn is_a_prefix_in_whole_groups(found: &[(u16, u64, Vec<u8>)]) -> bool {
    let whole = [4, 6].contains(&found.len());
    let known = |(n, (_, seq, stanza)): (u64, &(u16, u64, Vec<u8>))| {
        n == *seq && *stanza == vec![n as u8; 150]
    };
    whole && (1..).zip(found).all(known)
}

/// A drain may read up to a limit, and commits go on meanwhile. Was: it began at the segment's first group each time.
#[test]
fn who_may_not_read_everything_goes_on_where_he_stopped() {
    let disk = SimDisk::new(5);
    let mut journals = open(Arc::new(disk.clone()), &options(8 << 20)).unwrap();
    let bench = Bench::new(&mut journals, 0, 0);
    let mut reader = journals.reader(0);
    let steps = 300;
    let (mut bytes, mut records) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        bench.commit(&[b"ahead"]);
    }
    let before = disk.bytes_read();
    for seq in 1..=steps {
        bench.commit(&[b"one more"]);
        reader
            .read(seq..=seq, 10_000, &mut bytes, &mut records)
            .unwrap();
    }
    let read: Vec<u64> = records.iter().map(|(seq, _)| *seq).collect();
    assert_eq!(read, (1..=steps).collect::<Vec<_>>());
    let blocks = (disk.bytes_read() - before) / u64::from(BLOCK);
    assert!(blocks < steps * 8, "{blocks} blocks for {steps} groups");
}

#[test]
fn a_last_page_cut_at_any_byte_costs_only_its_own_group() {
    let (sim, disk, good, [_, last]) = three_groups();
    let end = last + format::u32_at(&good, last + 8) as usize;
    for cut in last..=end {
        for what_follows in [0, 0xa5] {
            let whole = sim.edit(SEGMENT, |bytes| {
                bytes.clone_from(&good);
                bytes[cut..].fill(what_follows);
                bytes[..end] == good[..end]
            });
            let journals = open(disk.clone(), &options(64 << 10)).unwrap();
            let found = replayed(&journals);
            assert!(is_a_prefix_in_whole_groups(&found), "cut at {cut}");
            assert_eq!(found.len() == 6, whole, "cut at {cut}");
            let told = &journals.found()[0].cut;
            // what has lost its numbers cannot be told from what an earlier generation left
            if cut >= last + 24 {
                assert_eq!(told.is_none(), whole, "cut at {cut}: {told:?}");
            }
        }
    }
}

#[test]
fn a_last_page_with_random_flips_costs_only_its_own_group_and_never_invents() {
    let (sim, disk, good, [_, last]) = three_groups();
    let mut random = super::sim::Random(7);
    for _ in 0..2_000 {
        let mut touched = false;
        sim.edit(SEGMENT, |bytes| {
            bytes.clone_from(&good);
            for _ in 0..=random.below(4) {
                let at = last + random.below(4096) as usize;
                bytes[at] ^= 1 << random.below(8);
            }
            let end = last + format::u32_at(&good, last + 8) as usize;
            touched = bytes[..end] != good[..end];
        });
        let journals = open(disk.clone(), &options(64 << 10)).unwrap();
        let found = replayed(&journals);
        assert!(is_a_prefix_in_whole_groups(&found));
        assert_eq!(found.len() == 6, !touched);
        let told = journals.found()[0].cut.is_some();
        assert_eq!(told, touched, "every cut is told");
    }
}

#[test]
fn damage_before_a_complete_group_is_refused_with_the_place_and_the_mend() {
    let (sim, disk, good, [second, _]) = three_groups();
    let mut random = super::sim::Random(8);
    for _ in 0..500 {
        sim.edit(SEGMENT, |bytes| {
            bytes.clone_from(&good);
            let length = u64::from(format::u32_at(&good, second + 8));
            bytes[second + random.below(length) as usize] ^= 1 << random.below(8);
        });
        let why = refused(&disk);
        let place = format!("journal/{SEGMENT}: damaged at byte {second} (");
        assert!(why.starts_with(&place), "{why}");
        assert!(why.contains("`nitro journal verify`") && why.contains("`nitro journal repair`"));
    }
}

#[test]
fn another_version_is_refused_with_a_sentence() {
    let (sim, disk, good, [second, _]) = three_groups();
    sim.edit(SEGMENT, |bytes| (bytes[8], bytes[2056]) = (2, 2));
    assert_eq!(
        refused(&disk),
        "journal/00000-000000000001.seg: the journal's format has version 2, this nitro reads 1: \
         it was written by another release; start that one"
    );
    // a later release's records in a group that is whole
    sim.edit(SEGMENT, |bytes| {
        bytes.clone_from(&good);
        let header = format::Header::parse(&good).unwrap();
        bytes[second + 32] = 9;
        let length = format::u32_at(bytes, second + 8) as usize;
        let group = &mut bytes[second..second + length];
        let mut sum = crc32c::crc32c_append(header.seed(), &group[8..40]);
        let mut at = 40;
        while at < length {
            sum = crc32c::crc32c_append(sum, &group[at..at + 8]);
            at += 8 + format::u32_at(group, at) as usize;
        }
        group[4..8].copy_from_slice(&sum.to_le_bytes());
    });
    let why = refused(&disk);
    assert!(
        why.contains("records have version 9, this nitro reads 1 to 3"),
        "{why}"
    );
}

#[test]
fn files_that_are_not_of_a_journal_are_left_alone() {
    let (sim, disk, _, _) = three_groups();
    for name in [
        "README",
        "00000-1.seg",
        "0-000000000001.seg",
        "00000-x.spare",
        "-.seg",
    ] {
        sim.put(name, b"mine".to_vec());
    }
    sim.put("00000-77.new", vec![1; 100]);
    sim.put("00000-78.spare", vec![1; 100]);
    let journals = open(disk.clone(), &options(64 << 10)).unwrap();
    assert_eq!(replayed(&journals).len(), 6);
    assert_eq!(sim.edit("00000-x.spare", |bytes| bytes.len()), 4);
    let left = disk.list().unwrap();
    assert!(
        !left
            .iter()
            .any(|name| name.contains("-77.") || name.contains("-78.")),
        "{left:?}"
    );
}

#[test]
fn a_file_under_another_name_or_cut_short_is_refused() {
    let (sim, disk, good, _) = three_groups();
    sim.put("00003-000000000001.seg", good.clone());
    assert!(refused(&disk).contains("by its header it is generation 1 of shard 0"));
    disk.remove("00003-000000000001.seg").unwrap();
    sim.edit(SEGMENT, |bytes| bytes.truncate(9000));
    assert!(refused(&disk).contains("it has 9000 bytes and should have 65536"));
    sim.edit(SEGMENT, |bytes| bytes.clear());
    assert!(refused(&disk).contains("its header is damaged"));
}

/// Fills several segments of a journal, one group each.
fn fill(journals: &mut Journals, shard: u16, groups: u64) -> (Arc<Journal>, Appender) {
    let (journal, mut appender, first) = journals.adopt(shard, 0).unwrap();
    for seq in first..first + groups {
        let mut group = Group::new();
        group.append(seq, &message(seq, &vec![seq as u8; 40_000]));
        while let Err(CommitError::NoSpare) = appender.commit(&mut group) {
            journal.keep().unwrap();
        }
    }
    (journal, appender)
}

#[test]
fn a_missing_segment_in_the_middle_is_refused_by_name() {
    let (_, disk) = sim();
    drop(fill(
        &mut open(disk.clone(), &options(64 << 10)).unwrap(),
        5,
        4,
    ));
    disk.remove("00005-000000000003.seg").unwrap();
    assert_eq!(
        refused(&disk),
        "journal/00005-000000000004.seg: a segment between 00005-000000000002.seg and this one is missing; \
         put it back, or go on without its records with: nitro journal repair"
    );
    // the oldest are those that are recycled
    disk.remove("00005-000000000001.seg").unwrap();
    disk.remove("00005-000000000002.seg").unwrap();
    let journals = open(disk, &options(64 << 10)).unwrap();
    assert_eq!(replayed(&journals).len(), 1);
}

#[test]
fn what_an_earlier_generation_left_in_a_segment_never_comes_back() {
    let (sim, disk) = sim();
    let mut journals = open(disk.clone(), &options(64 << 10)).unwrap();
    let (journal, appender) = fill(&mut journals, 0, 3);
    journal.drained(2);
    while journal.keep().unwrap() == Kept::Worked {}
    let names = disk.list().unwrap();
    let used = |name: &&String| name.ends_with(".spare") && sim.edit(name, |b| b.contains(&1));
    let used: Vec<_> = names.iter().filter(used).cloned().collect();
    assert!(!used.is_empty(), "spares that were segments: {names:?}");
    for name in names
        .iter()
        .filter(|n| n.ends_with(".spare") && !used.contains(n))
    {
        disk.remove(name).unwrap();
    }
    drop((journals, journal, appender));
    let mut journals = open(disk.clone(), &options(64 << 10)).unwrap();
    let (_, mut appender, _) = journals.adopt(0, 2).unwrap();
    for (seq, bytes) in [(4, 30_000), (5, 10)] {
        let mut group = Group::new();
        group.append(seq, &message(seq, &vec![seq as u8; bytes]));
        appender.commit(&mut group).unwrap();
    }
    let last = "00000-000000000004.seg";
    let rest = sim.edit(last, |bytes| {
        bytes.iter().filter(|b| [1, 2].contains(*b)).count()
    });
    assert!(rest > 3_000, "old records are still in the file");
    sim.crash(Crash::Process);
    let journals = open(disk, &options(64 << 10)).unwrap();
    let found: Vec<_> = replayed(&journals).iter().map(|(_, seq, _)| *seq).collect();
    assert_eq!(found, [3, 4, 5]);
    assert_eq!(journals.found()[0].cut, None, "old groups are no torn ones");
}

#[test]
fn journals_of_all_shards_are_found_and_those_of_lost_shards_end_when_drained() {
    let (_, disk) = sim();
    {
        let mut journals = open(disk.clone(), &options(64 << 10)).unwrap();
        drop(
            (0..3)
                .map(|shard| fill(&mut journals, shard, 3))
                .collect::<Vec<_>>(),
        );
    }
    let mut journals = open(disk.clone(), &options(64 << 10)).unwrap();
    let all: Vec<_> = replayed(&journals).iter().map(|r| (r.0, r.1)).collect();
    let three = |shard| (1..4).map(move |seq| (shard, seq));
    assert_eq!(all, (0..3).flat_map(three).collect::<Vec<_>>());
    let bench = Bench::new(&mut journals, 0, 0);
    bench.commit(&[b"goes on"]);
    let mut readers: Vec<_> = (0..3).map(|shard| journals.reader(shard)).collect();
    for reader in &mut readers {
        let (mut bytes, mut records) = (Vec::new(), Vec::new());
        reader
            .read(1..=u64::MAX, usize::MAX, &mut bytes, &mut records)
            .unwrap();
        let last = records.last().unwrap().0;
        assert_eq!(last, if reader.shard() == 0 { 4 } else { 3 });
        reader.drained(last);
    }
    let of = |shard: &str| {
        let names = disk.list().unwrap();
        names.iter().filter(|name| name.starts_with(shard)).count()
    };
    until("lost shards leave nothing", || {
        of("00001-") + of("00002-") == 0
    });
    until("the others keep their spares", || {
        bench.writer.state().segments() == 1
    });
    drop((bench, readers, journals));
    let journals = open(disk, &options(64 << 10)).unwrap();
    let found: Vec<_> = journals
        .found()
        .iter()
        .map(|f| (f.shard, f.last_seq))
        .collect();
    assert_eq!(found, [(0, 4)]);
}

#[test]
fn a_journal_that_begins_again_goes_on_where_the_database_is() {
    let (_, disk) = sim();
    let mut journals = open(disk, &options(64 << 10)).unwrap();
    let bench = Bench::new(&mut journals, 7, 4711);
    assert_eq!(bench.writer.next_seq(), 4712);
    bench.commit(&[b"one"]);
    assert_eq!(bench.writer.state().committed_seq(), 4712);
}

#[test]
fn nothing_is_told_before_the_sync_has_ended() {
    let (sim, disk) = sim();
    let mut journals = open(disk, &options(64 << 10)).unwrap();
    let bench = Bench::new(&mut journals, 0, 0);
    bench.commit(&[b"one"]);
    until("spares are made", || bench.writer.state().spares() == 2);
    sim.set_failing(Some(Failing::HeldSync));
    bench.submit(&[b"two"]);
    let early = bench.committed.recv_timeout(Duration::from_millis(200));
    assert!(early.is_err());
    assert_eq!(bench.writer.state().committed_seq(), 1);
    assert!(bench.writer.is_busy());
    let mut reader = journals.reader(0);
    let (mut bytes, mut records) = (Vec::new(), Vec::new());
    reader
        .read(1..=u64::MAX, usize::MAX, &mut bytes, &mut records)
        .unwrap();
    assert_eq!(records.len(), 1);
    sim.set_failing(None);
    bench.committed.recv_timeout(PATIENCE).unwrap();
    assert_eq!(bench.writer.state().committed_seq(), 2);
}

#[test]
fn an_error_of_the_disk_ends_the_process_and_acknowledges_nothing() {
    for failing in [Failing::Sync, Failing::Write] {
        let (sim, disk) = sim();
        let mut journals = open(disk, &options(64 << 10)).unwrap();
        let bench = Bench::new(&mut journals, 0, 0);
        bench.commit(&[b"one"]);
        until("spares are made", || bench.writer.state().spares() == 2);
        sim.set_failing(Some(failing));
        bench.submit(&[b"two"]);
        let ended = bench.committed.recv_timeout(PATIENCE);
        assert_eq!(ended.unwrap_err(), mpsc::RecvTimeoutError::Disconnected);
        assert_eq!(bench.writer.state().committed_seq(), 1);
    }
}

#[test]
fn a_full_disk_refuses_early_keeps_room_for_completions_and_loses_nothing() {
    let (sim, disk) = sim();
    let mut journals = open(disk, &options(64 << 10)).unwrap();
    let bench = Bench::new(&mut journals, 0, 0);
    let state = bench.writer.state();
    until("spares are made", || state.spares() == 2);
    sim.set_bytes_max(2 * (64 << 10) + 100);
    assert_eq!(state.status(), Status::Open);
    bench.commit(&[&[1; 40_000]]);
    until("it is told", || state.status() == Status::DiskFull);
    // most of one segment, and a whole one, are left
    bench.commit(&[&[2; 10_000]]);
    bench.commit(&[&[3; 40_000]]);
    bench.submit(&[&[4; 40_000]]);
    let early = bench.committed.recv_timeout(Duration::from_millis(100));
    assert!(early.is_err(), "no room is no acknowledgement");
    // the database catches up, which needs no room
    let reader = journals.reader(0);
    reader.drained(2);
    bench.committed.recv_timeout(PATIENCE).unwrap();
    assert_eq!(state.committed_seq(), 4);
    sim.set_bytes_max(u64::MAX);
    until("it is over", || state.status() == Status::Open);
    let again: Vec<_> = replayed(&journals).iter().map(|r| r.1).collect();
    assert_eq!(again, [3, 4]);
}

#[test]
fn a_writer_that_waits_for_room_can_be_stopped() {
    let (sim, disk) = sim();
    let mut journals = open(disk, &options(64 << 10)).unwrap();
    let bench = Bench::new(&mut journals, 0, 0);
    let state = bench.writer.state();
    until("spares are made", || state.spares() == 2);
    sim.set_bytes_max(0);
    for _ in 0..2 {
        bench.commit(&[&[1; 40_000]]);
    }
    bench.submit(&[&[2; 40_000]]);
    drop(bench);
    assert_eq!(state.committed_seq(), 2);
}

#[test]
fn a_backlog_beyond_its_bound_refuses_but_still_takes_completions() {
    let (_, disk) = sim();
    let few = Options {
        backlog_bytes_max: 100_000,
        ..options(64 << 10)
    };
    let mut journals = open(disk, &few).unwrap();
    let bench = Bench::new(&mut journals, 0, 0);
    let state = bench.writer.state();
    bench.commit(&[&[1; 40_000]]);
    assert_eq!(state.status(), Status::Open);
    bench.commit(&[&[2; 40_000]]);
    bench.commit(&[&[3; 40_000]]);
    assert_eq!(state.status(), Status::BacklogFull);
    bench.commit(&[b"a completion"]);
    let reader = journals.reader(0);
    reader.drained(3);
    assert_eq!(state.status(), Status::Open);
    assert!(state.backlog_bytes() <= 2 * 4096);
    reader.drained(4);
    assert_eq!(state.backlog_bytes(), 0);
}

#[test]
fn a_pinned_segment_stays_until_the_floor_has_passed() {
    let (_, disk) = sim();
    let options = options(64 << 10);
    let mut journals = open(disk, &options).unwrap();
    let (journal, mut appender, _) = journals.adopt(0, 0).unwrap();
    let id = Id::next(Id(0), 1_790_000_000_000, 9);
    for seq in 1..=2 {
        let mut group = Group::new();
        let change = message(id.0, &[1; 40_000]);
        let Change::Message(mut message) = change else {
            unreachable!("it was made one");
        };
        message.what = Message::SENT;
        group.append(seq, &Change::Message(message));
        while let Err(CommitError::NoSpare) = appender.commit(&mut group) {
            journal.keep().unwrap();
        }
    }
    journal.drained(2);
    for floor in [0, id.0] {
        options.floors[9].store(floor, Relaxed);
        while journal.keep().unwrap() == Kept::Worked {}
        assert_eq!(journal.state.segments(), 2);
        assert!(journal.is_waiting_for_floors());
    }
    options.floors[9].store(id.0 + 1, Relaxed);
    while journal.keep().unwrap() == Kept::Worked {}
    assert_eq!(journal.state.segments(), 1);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_is_in_a_segment_nothing_is_invented(
        pieces in proptest::collection::vec(
            (proptest::num::usize::ANY, proptest::collection::vec(proptest::num::u8::ANY, 0..200)), 0..5,
        ),
        copies in proptest::collection::vec((0..16_usize, 0..16_usize), 0..4),
    ) {
        let (sim, disk, good, _) = three_groups();
        sim.edit(SEGMENT, |bytes| {
            for (at, piece) in &pieces {
                let at = at % (20_000 - piece.len());
                bytes[at..at + piece.len()].copy_from_slice(piece);
            }
            for (from, to) in &copies {
                bytes[to * 4096..(to + 1) * 4096].copy_from_slice(&good[from * 4096..(from + 1) * 4096]);
            }
        });
        if let Ok(journals) = open(disk, &options(64 << 10)) {
            let found = replayed(&journals);
            let known = |(n, (_, seq, stanza)): (u64, &(u16, u64, Vec<u8>))| {
                n == *seq && *stanza == vec![n as u8; 150]
            };
            proptest::prop_assert!(found.len() <= 6 && (1..).zip(&found).all(known));
        }
    }
}

/// Six groups of three records each in two segments of one journal; where each group begins.
fn two_segments() -> (SimDisk, Arc<dyn Disk>, Vec<(String, usize)>) {
    let (sim, disk) = sim();
    let mut journals = open(disk.clone(), &options(32 << 10)).unwrap();
    let (journal, mut appender, _) = journals.adopt(0, 0).unwrap();
    let mut groups = Vec::new();
    for n in 0..6 {
        let mut group = Group::new();
        let slots = [1, 2, 3].map(|m| {
            let seq = 3 * n + m;
            group.append(seq, &message(seq, &[seq as u8; 2500]))
        });
        while let Err(CommitError::NoSpare) = appender.commit(&mut group) {
            journal.keep().unwrap();
        }
        let committed = Committed {
            group,
            took: Duration::ZERO,
        };
        let place = committed.place(slots[0]);
        let generation = journal.table().segments.len();
        groups.push((
            format!("00000-{generation:012}.seg"),
            place.offset as usize - 48,
        ));
    }
    assert_eq!(groups[2].0, SEGMENT);
    assert_eq!(groups[3], ("00000-000000000002.seg".to_owned(), 4096));
    (sim, disk, groups)
}

/// Repairs, and tells what can be replayed then: sequence numbers of messages, each checked.
fn repaired(disk: &Arc<dyn Disk>) -> (repair::Report, Vec<u64>) {
    let backup = SimDisk::new(2);
    let before = repair::verify(disk).unwrap();
    let report = repair::repair(disk, &backup).unwrap();
    assert_eq!(
        before.to_string(),
        report.to_string(),
        "verify tells what repair will do"
    );
    let copied = backup.list().unwrap().len();
    let damaged = report
        .segments
        .iter()
        .filter(|s| !s.damage.is_empty())
        .count();
    assert_eq!(copied, damaged, "the damaged files are kept");
    let again = repair::verify(disk).unwrap();
    assert!(again.is_good(), "{again}");
    let journals = open(disk.clone(), &options(32 << 10)).unwrap();
    let mut seqs = Vec::new();
    let replay = journals.replay(|_, seq, _, change| match change {
        ArchivedChange::Message(message) => {
            assert_eq!(*message.stanza, [seq as u8; 2500]);
            seqs.push(seq);
        }
        ArchivedChange::Marks(marks) => assert!(marks.done.is_empty()),
        _ => panic!("nobody appended this"),
    });
    replay.unwrap();
    (report, seqs)
}

fn all_but(lost: &[u64]) -> Vec<u64> {
    (1..=18).filter(|seq| !lost.contains(seq)).collect()
}

#[test]
fn a_good_journal_is_not_changed_by_a_repair() {
    let (_, disk, _) = two_segments();
    let (report, seqs) = repaired(&disk);
    assert!(report.is_good());
    assert_eq!(seqs, all_but(&[]));
    let mut shown = Vec::new();
    repair::show(&disk, |shard, seq, _| shown.push((shard, seq))).unwrap();
    assert_eq!(shown, (1..=18).map(|seq| (0, seq)).collect::<Vec<_>>());
}

#[test]
fn a_repair_loses_one_record_for_one_damaged_payload() {
    for (n, at, lost) in [(0, 100, 1), (1, 3000, 5), (2, 6000, 9), (4, 100, 13)] {
        let (sim, disk, groups) = two_segments();
        let (file, begin) = &groups[n];
        sim.edit(file, |bytes| bytes[begin + at] ^= 1);
        assert!(matches!(
            open(disk.clone(), &options(32 << 10)),
            Err(JournalError::Damaged { .. })
        ));
        let (report, seqs) = repaired(&disk);
        assert_eq!(seqs, all_but(&[lost]), "{report}");
        assert!(
            report
                .to_string()
                .contains(&format!("; lost records: {lost}\n")),
            "{report}"
        );
    }
}

#[test]
fn a_repair_keeps_the_records_of_a_group_whose_head_is_lost() {
    for (n, lost_from) in [(0, 1), (1, 4), (2, 7), (4, 13)] {
        let (sim, disk, groups) = two_segments();
        let (file, begin) = &groups[n];
        sim.edit(file, |bytes| bytes[*begin..begin + 40].fill(0xff));
        let (report, seqs) = repaired(&disk);
        assert_eq!(seqs, all_but(&[]), "{report}");
        // with its first record it loses where the others begin
        let (sim, disk, groups) = two_segments();
        let (file, begin) = &groups[n];
        sim.edit(file, |bytes| bytes[*begin..begin + 60].fill(0xff));
        let (report, seqs) = repaired(&disk);
        let lost = [lost_from, lost_from + 1, lost_from + 2];
        assert_eq!(seqs, all_but(&lost), "{report}");
    }
}

#[test]
fn a_repair_goes_on_behind_groups_segments_and_headers_that_are_gone() {
    // two groups, in the middle and up to the end of a segment
    let (sim, disk, groups) = two_segments();
    sim.edit(SEGMENT, |bytes| bytes[groups[1].1..].fill(0));
    let (report, seqs) = repaired(&disk);
    assert_eq!(seqs, all_but(&[4, 5, 6, 7, 8, 9]), "{report}");
    // a whole segment
    let (sim, disk, _) = two_segments();
    sim.edit(SEGMENT, |bytes| bytes.fill(0));
    let (report, seqs) = repaired(&disk);
    assert_eq!(seqs, (10..=18).collect::<Vec<_>>(), "{report}");
    // only its header
    let (sim, disk, _) = two_segments();
    sim.edit(SEGMENT, |bytes| bytes[..4096].fill(0));
    let (report, seqs) = repaired(&disk);
    assert_eq!(seqs, all_but(&[]), "{report}");
    // the second half of a file
    let (sim, disk, groups) = two_segments();
    sim.edit(SEGMENT, |bytes| bytes.truncate(groups[2].1));
    let (report, seqs) = repaired(&disk);
    assert_eq!(seqs, all_but(&[7, 8, 9]), "{report}");
    // a segment that is not there at all
    let (_, disk) = sim_with_segments(4);
    disk.remove("00000-000000000002.seg").unwrap();
    let (_, seqs) = {
        let backup = SimDisk::new(2);
        let report = repair::repair(&disk, &backup).unwrap();
        assert!(report.to_string().contains("lost records: 2\n"), "{report}");
        let journals = open(disk.clone(), &options(64 << 10)).unwrap();
        let seqs: Vec<_> = replayed(&journals).iter().map(|r| r.1).collect();
        (report, seqs)
    };
    assert_eq!(seqs, [1, 3, 4]);
    // and it can be written again
    let mut journals = open(disk, &options(64 << 10)).unwrap();
    let (journal, mut appender, next_seq) = journals.adopt(0, 0).unwrap();
    assert_eq!(next_seq, 5);
    let mut group = Group::new();
    group.append(5, &message(5, b"on"));
    appender.commit(&mut group).unwrap();
    let mut reader = Reader::new(journal, journals.keeper.clone());
    let (mut bytes, mut records) = (Vec::new(), Vec::new());
    reader
        .read(1..=u64::MAX, usize::MAX, &mut bytes, &mut records)
        .unwrap();
    let seqs: Vec<_> = records.iter().map(|r| r.0).collect();
    assert_eq!(seqs, [1, 3, 4, 5]);
}

fn sim_with_segments(count: u64) -> (SimDisk, Arc<dyn Disk>) {
    let (sim, disk) = sim();
    drop(fill(
        &mut open(disk.clone(), &options(64 << 10)).unwrap(),
        0,
        count,
    ));
    (sim, disk)
}

#[test]
fn a_repair_of_random_damage_always_leads_to_a_journal_that_opens() {
    for seed in 0..300 {
        let mut random = super::sim::Random(seed);
        let (sim, disk, _) = two_segments();
        for _ in 0..=random.below(3) {
            let file = [SEGMENT, "00000-000000000002.seg"][random.below(2) as usize];
            sim.edit(file, |bytes| {
                let at = random.below(26_000) as usize;
                let most = [2, 200, 9000][random.below(3) as usize];
                let end = (at + 1 + random.below(most) as usize).min(bytes.len());
                bytes[at..end]
                    .iter_mut()
                    .for_each(|b| *b ^= random.next() as u8);
            });
        }
        let (report, seqs) = repaired(&disk);
        assert!(
            seqs.is_sorted() && seqs.iter().all(|seq| (1..=18).contains(seq)),
            "{report}"
        );
    }
}

/// `cargo test --release --lib -- --ignored --nocapture cpu_of_a_record`, on the disk of the temporary folder.
#[test]
#[ignore = "a measurement"]
fn cpu_of_a_record() {
    use rustix::time::{ClockId, clock_gettime};
    let cpu_us = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
    };
    let dir = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(Folder::open(dir.path()).unwrap());
    let mut journals = open(disk.clone(), &options(64 << 20)).unwrap();
    let bench = Bench::new(&mut journals, 0, 0);
    let state = bench.writer.state();
    let reader = journals.reader(0);
    until("spares are made", || state.spares() == 2);
    let mut group = Group::new();
    // records first, so that every segment in use has been written before
    for (records, groups) in [
        (1000, 300),
        (1, 5_000),
        (10, 5_000),
        (100, 2_000),
        (1000, 500),
    ] {
        let (cpu, begin, micros) = (cpu_us(), std::time::Instant::now(), state.commit_us_sum());
        let mut appending = 0.0;
        for _ in 0..groups {
            let before = cpu_us();
            group.clear();
            for seq in (bench.writer.next_seq()..).take(records) {
                group.append(seq, &message(seq, &[b'x'; 300]));
            }
            appending += cpu_us() - before;
            bench.writer.submit(group);
            group = bench.committed.recv_timeout(PATIENCE).unwrap().group;
            reader.drained(bench.writer.next_seq() - 1);
        }
        let count = (records * groups) as f64;
        println!(
            "{records:5} a group: {:7.2} us of CPU a record ({:.2} of it collecting), {:6.0} us a commit, {:8.0} records/s, {} bytes a record, {} segments, {} spares",
            (cpu_us() - cpu) / count,
            appending / count,
            (state.commit_us_sum() - micros) as f64 / groups as f64,
            count / begin.elapsed().as_secs_f64(),
            group.bytes() / records,
            state.segments(),
            state.spares(),
        );
    }
    // and reading all of it at a start
    drop((bench, reader, journals));
    let mut journals = open(disk.clone(), &options(64 << 20)).unwrap();
    let bench = Bench::new(&mut journals, 0, 0);
    for _ in 0..400 {
        group.clear();
        for seq in (bench.writer.next_seq()..).take(1000) {
            group.append(seq, &message(seq, &[b'x'; 300]));
        }
        bench.writer.submit(group);
        group = bench.committed.recv_timeout(PATIENCE).unwrap().group;
    }
    drop((bench, journals));
    let begin = std::time::Instant::now();
    let journals = open(disk, &options(64 << 20)).unwrap();
    let opened = begin.elapsed();
    let mut count = 0;
    journals.replay(|_, _, _, _| count += 1).unwrap();
    println!(
        "start: {count} records opened in {opened:?}, replayed in {:?}",
        begin.elapsed() - opened
    );
}
