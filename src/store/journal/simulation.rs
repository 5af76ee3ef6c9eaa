//! Journals against a model, through thousands of crashes, from a seed: no threads, no clock, no real disk.
//!
//! In a life, groups are appended and committed, spares made, segments recycled, records drained, floors raised, the
//! disk filled; then, in the middle of some call, process or machine stops. The next start must find what the model says.
//!
//! `NITRO_SIM_SECONDS=3600 cargo test --release simulation` runs for an hour, `NITRO_SIM_SEED=17` begins with that seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::group::Slot;
use super::reader::Reader;
use super::segments::{Appender, CommitError, Journal, Kept, Role};
use super::sim::{Crash, Random, SimDisk};
use super::*;
use crate::store::change::{Change, Message};

const SHARDS: u16 = 3;

/// What is known of one journal.
#[derive(Default)]
struct Model {
    /// Durable: whatever is replayed or drained must be equal.
    committed: BTreeMap<u64, Vec<u8>>,
    /// Ids that a record waits for.
    pins: BTreeMap<u64, u64>,
    drained: u64,
    /// Submitted and not acknowledged; how many of it must be there all the same, because their piece is durable.
    in_flight: Vec<(u64, Vec<u8>)>,
    durable_pieces: usize,
    in_one_piece: bool,
}

/// A journal in one life.
struct Running {
    journal: Arc<Journal>,
    reader: Reader,
    /// `None`: its shard is no more.
    writing: Option<Writing>,
}

struct Writing {
    appender: Appender,
    next_seq: u64,
    group: Option<(Group, Vec<Slot>)>,
}

struct Simulation {
    random: Random,
    disk: SimDisk,
    models: BTreeMap<u16, Model>,
    /// The highest that each floor has ever been.
    floors: [u64; SHARDS as usize],
    last_id: Id,
    /// How often something interesting has happened.
    seen: BTreeMap<&'static str, u64>,
}

#[test]
fn what_was_committed_survives_any_crash_and_nothing_else_appears() {
    let number = |name: &str| std::env::var(name).ok().map(|v| v.parse::<u64>().unwrap());
    let time = Duration::from_secs(number("NITRO_SIM_SECONDS").unwrap_or(10));
    let first = number("NITRO_SIM_SEED").unwrap_or(1);
    let begin = Instant::now();
    let mut seen = BTreeMap::new();
    for seed in first.. {
        println!("seed {seed}");
        let mut simulation = Simulation::new(seed);
        simulation.run();
        for (what, count) in simulation.seen {
            *seen.entry(what).or_insert(0) += count;
        }
        if begin.elapsed() >= time {
            println!("{} seeds: {seen:?}", seed - first + 1);
            break;
        }
    }
    for what in [
        "lives",
        "committed",
        "crashed in a call",
        "crashed in open",
        "found unacknowledged",
        "drained",
        "recycled",
        "no spare",
        "no room for a spare",
        "pinned",
        "in pieces",
        "left",
        "read back",
    ] {
        assert!(seen.contains_key(what), "{what} never happened: {seen:?}");
    }
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        Simulation {
            random: Random(seed),
            disk: SimDisk::new(seed ^ 0xd15c),
            models: BTreeMap::new(),
            floors: [0; SHARDS as usize],
            last_id: Id::at(1000),
            seen: BTreeMap::new(),
        }
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_insert(0) += 1;
    }

    fn run(&mut self) {
        for _ in 0..30 {
            self.saw("lives");
            let calls = match self.random.below(6) {
                0 => self.random.below(10),
                1..4 => self.random.below(100),
                _ => self.random.below(1000),
            };
            self.disk.crash_after(calls + 1);
            self.life();
            let how = match self.random.below(8) {
                0..3 => Crash::Process,
                3..5 => Crash::Machine { piece: 4096 },
                5..7 => Crash::Machine { piece: 512 },
                _ => Crash::Forgetful,
            };
            self.disk.crash(how);
            // what the machine still remembers of a process that ended may be lost before anybody looks
            if how == Crash::Process && self.random.one_in(4) {
                self.disk.crash(Crash::Forgetful);
            }
        }
        // and at last without a crash, so that all can be looked at
        self.disk.set_bytes_max(u64::MAX);
        self.life();
    }

    fn life(&mut self) {
        let floors = floors();
        let options = Options {
            segment_bytes: [32 << 10, 64 << 10][self.random.below(2) as usize],
            backlog_bytes_max: 200 << 10,
            floors: floors.clone(),
        };
        let mut journals = match open(Arc::new(self.disk.clone()), &options) {
            Ok(journals) => journals,
            Err(e) => return self.must_be_the_crash("crashed in open", &e.to_string()),
        };
        if let Err(e) = self.check_replay(&journals) {
            return self.must_be_the_crash("crashed in open", &e.to_string());
        }
        let mut running = match self.start(&mut journals) {
            Ok(running) => running,
            Err(e) => return self.must_be_the_crash("crashed in open", &e.to_string()),
        };
        for _ in 0..self.random.below(300) {
            for (shard, floor) in self.floors.iter_mut().enumerate() {
                if self.random.one_in(20) {
                    *floor = (*floor).max(Id::at(self.last_id.unix_ms() - 1).0);
                }
                // it begins with zero in each life, and rises when the caller knows again
                if self.random.one_in(4) {
                    floors[shard].store(*floor, Relaxed);
                }
            }
            if self.random.one_in(30) {
                let most = [u64::MAX, u64::MAX, 200 << 10, 400 << 10, 800 << 10];
                let most = most[self.random.below(most.len() as u64) as usize];
                self.disk.set_bytes_max(most);
            }
            let shard = self.random.below(u64::from(SHARDS)) as u16;
            let Some(running) = running.get_mut(&shard) else {
                continue;
            };
            let done = match self.random.below(10) {
                0..4 => self.commit(shard, running),
                4..8 => self.keep(running),
                _ => self.drain(shard, running, &journals.files()),
            };
            if let Err(e) = done {
                return self.must_be_the_crash("crashed in a call", &e.to_string());
            }
        }
        for (shard, running) in &running {
            if let Some(writing) = &running.writing {
                self.remember_pieces(*shard, writing);
            }
        }
    }

    fn must_be_the_crash(&mut self, what: &'static str, why: &str) {
        assert!(self.disk.has_crashed(), "refused without a reason: {why}");
        self.saw(what);
    }

    /// What is replayed against what is known.
    fn check_replay(&mut self, journals: &Journals) -> Result<(), JournalError> {
        let mut replayed: BTreeMap<u16, Vec<(u64, Place, Vec<u8>)>> = BTreeMap::new();
        let files = journals.files();
        let mut read = Vec::new();
        let mut failed = None;
        journals.replay(|shard, seq, place, change| {
            assert!(change.owner().is_some());
            if let Err(e) = files.read(place, &mut read) {
                failed = Some(e);
            }
            replayed
                .entry(shard)
                .or_default()
                .push((seq, place, read.clone()));
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
        for (shard, model) in &mut self.models {
            let replayed = replayed.remove(shard).unwrap_or_default();
            let first = replayed.first().map_or(u64::MAX, |r| r.0);
            let pinned = model.pins.iter().find(|(seq, id)| {
                let of = (**id >> 13) as usize & 0xff;
                **id >= self.floors[of] && model.committed.contains_key(seq)
            });
            let needed = pinned.map_or(u64::MAX, |(seq, _)| *seq);
            let undrained = model.committed.range(model.drained + 1..).next();
            let needed = needed.min(undrained.map_or(u64::MAX, |(seq, _)| *seq));
            assert!(
                first <= needed,
                "journal {shard}: {needed} is missing, {first} is the first"
            );
            assert!(
                replayed.windows(2).all(|w| w[0].0 + 1 == w[1].0),
                "in order, without gaps"
            );
            let last = replayed.last().map_or(0, |r| r.0);
            let acknowledged = model.committed.keys().last().copied().unwrap_or(0);
            assert!(
                needed == u64::MAX || last >= acknowledged,
                "the end is there"
            );
            let mut unacknowledged = 0;
            for (seq, _, payload) in replayed {
                match model.committed.get(&seq) {
                    Some(known) => assert!(*known == payload, "{seq} is another one"),
                    None => {
                        let expected = &model.in_flight[unacknowledged];
                        assert!(*expected == (seq, payload), "nobody has appended {seq}");
                        unacknowledged += 1;
                    }
                }
            }
            let all = model.in_flight.len();
            assert!(
                unacknowledged >= model.durable_pieces,
                "a durable piece is there"
            );
            assert!(
                !model.in_one_piece || unacknowledged == 0 || unacknowledged == all,
                "half a group: {unacknowledged} of {all}"
            );
            if unacknowledged > 0 {
                *self.seen.entry("found unacknowledged").or_insert(0) += 1;
            }
            // what was found stays
            model
                .committed
                .extend(model.in_flight.drain(..unacknowledged));
            let lost: Vec<_> = model.in_flight.drain(..).collect();
            model
                .pins
                .retain(|pinned, _| lost.iter().all(|(seq, _)| seq != pinned));
            model.durable_pieces = 0;
        }
        assert!(replayed.is_empty(), "nobody has written these journals");
        Ok(())
    }

    fn start(&mut self, journals: &mut Journals) -> Result<BTreeMap<u16, Running>, JournalError> {
        let mut running = BTreeMap::new();
        let shards = 1 + self.random.below(u64::from(SHARDS)) as u16;
        for shard in 0..shards {
            let model = self.models.entry(shard).or_default();
            let adopted = journals.adopt(shard, model.drained);
            let (journal, appender, next_seq) = match adopted {
                // a full disk is a reason not to start
                Err(JournalError::NoRoom { .. }) => continue,
                other => other?,
            };
            let last = model.committed.keys().last().copied().unwrap_or(0);
            assert_eq!(next_seq, last + 1, "the sequence goes on");
            let writing = Writing {
                appender,
                next_seq,
                group: None,
            };
            let reader = Reader::new(journal.clone(), journals.keeper.clone());
            let writing = Some(writing);
            running.insert(
                shard,
                Running {
                    journal,
                    reader,
                    writing,
                },
            );
        }
        for found in journals.found().to_vec() {
            if found.shard < shards {
                continue;
            }
            let journal = journals.journals[&found.shard].clone();
            journal.set_role(Role::Left);
            let reader = Reader::new(journal.clone(), journals.keeper.clone());
            reader.drained(self.models[&found.shard].drained);
            let writing = None;
            running.insert(
                found.shard,
                Running {
                    journal,
                    reader,
                    writing,
                },
            );
        }
        Ok(running)
    }

    /// Appends a group, or goes on with the one that waits for room.
    fn commit(&mut self, shard: u16, running: &mut Running) -> Result<(), JournalError> {
        let Some(writing) = &mut running.writing else {
            return Ok(());
        };
        let (mut group, slots) = match writing.group.take() {
            Some(waiting) => waiting,
            None => self.collect(shard, writing),
        };
        let done = writing.appender.commit(&mut group);
        let model = self.models.get_mut(&shard).unwrap();
        match done {
            Ok(()) => {
                writing.next_seq = group.next_seq();
                model.committed.extend(model.in_flight.drain(..));
                assert_eq!(running.journal.state.committed_seq(), writing.next_seq - 1);
                let committed = Committed {
                    group,
                    took: Duration::ZERO,
                };
                let mut read = Vec::new();
                let first_seq = committed.group.first_seq();
                for (seq, slot) in (first_seq..).zip(slots) {
                    match running.journal.files.read(committed.place(slot), &mut read) {
                        // a first piece while the last one waited for room
                        Err(JournalError::Recycled) if seq <= model.drained => continue,
                        other => other?,
                    }
                    assert_eq!(read, committed.group.payload(slot));
                    *self.seen.entry("read back").or_insert(0) += 1;
                }
                self.saw("committed");
                Ok(())
            }
            Err(CommitError::Disk(e)) => {
                writing.group = Some((group, slots));
                let writing = running.writing.take().unwrap();
                self.remember_pieces(shard, &writing);
                Err(e)
            }
            Err(_) => {
                writing.group = Some((group, slots));
                self.saw("no spare");
                Ok(())
            }
        }
    }

    /// What of an unacknowledged group is durable, when a life ends.
    fn remember_pieces(&mut self, shard: u16, writing: &Writing) {
        if let Some((group, _)) = &writing.group {
            let model = self.models.get_mut(&shard).unwrap();
            let behind = group.first_seq() + u64::from(group.written.records);
            model.durable_pieces = model.in_flight.partition_point(|(seq, _)| *seq < behind);
            if group.written.records > 0 {
                self.saw("in pieces");
            }
        }
    }

    fn collect(&mut self, shard: u16, writing: &Writing) -> (Group, Vec<Slot>) {
        let mut group = Group::new();
        let mut slots = Vec::new();
        let records = match self.random.below(10) {
            0 => 1 + self.random.below(400),
            1..4 => 1,
            _ => 1 + self.random.below(30),
        };
        for n in 0..records {
            let now = self.last_id.unix_ms() + self.random.below(3);
            let of = self.random.below(u64::from(SHARDS)) as u16;
            self.last_id = Id::next(self.last_id, now, of);
            let bytes = match self.random.below(200) {
                0 => self.random.below(9000),
                _ => self.random.below(80),
            };
            let stanza = self.random.next().to_le_bytes().repeat(bytes as usize / 8);
            let (what, twin, pin) = match self.random.below(60) {
                0 => (Message::SENT, 0, Some(self.last_id.0)),
                1 => (Message::RECEIVED, self.last_id.0, Some(self.last_id.0)),
                2 => (Message::SENT | Message::RECEIVED, 0, None),
                _ => (Message::RECEIVED, 0, None),
            };
            let change = Change::Message(Message {
                id: self.last_id.0,
                owner: "owner",
                what,
                kind: 0,
                flags: 0,
                peer: "peer@localhost",
                twin,
                stream: "",
                count: 0,
                stanza: &stanza,
            });
            let seq = writing.next_seq + n;
            let slot = group.append(seq, &change);
            slots.push(slot);
            let model = self.models.get_mut(&shard).unwrap();
            model.in_flight.push((seq, group.payload(slot).to_vec()));
            if let Some(pin) = pin {
                model.pins.insert(seq, pin);
                *self.seen.entry("pinned").or_insert(0) += 1;
            }
        }
        let model = self.models.get_mut(&shard).unwrap();
        model.in_one_piece = group.bytes() <= (32 << 10) - 4096;
        (group, slots)
    }

    fn keep(&mut self, running: &mut Running) -> Result<(), JournalError> {
        let before = running.journal.state.segments();
        match running.journal.keep()? {
            Kept::NoRoom => self.saw("no room for a spare"),
            Kept::Worked if running.journal.state.segments() < before => self.saw("recycled"),
            _ => {}
        }
        if running.journal.is_gone() {
            self.saw("left");
        }
        Ok(())
    }

    fn drain(
        &mut self,
        shard: u16,
        running: &mut Running,
        files: &Files,
    ) -> Result<(), JournalError> {
        let model = self.models.get_mut(&shard).unwrap();
        let (mut bytes, mut records) = (Vec::new(), Vec::new());
        let most = self.random.below(20_000) as usize;
        running
            .reader
            .read(model.drained + 1..=u64::MAX, most, &mut bytes, &mut records)?;
        // pieces of a group that waits for room are durable as well
        let state = &running.journal.state;
        let pieces = model
            .in_flight
            .iter()
            .take_while(|(seq, _)| *seq <= state.committed_seq());
        let pieces = pieces.count();
        model.committed.extend(model.in_flight.drain(..pieces));
        let mut known = model.committed.range(model.drained + 1..);
        for (seq, range) in &records {
            let payload = bytes[range.clone()].to_vec();
            let expected = known.next().map(|(seq, payload)| (*seq, payload.clone()));
            assert_eq!(
                expected,
                Some((*seq, payload)),
                "each committed record in turn"
            );
        }
        assert!(
            !records.is_empty() || known.next().is_none(),
            "nothing is left behind"
        );
        let Some((seq, _)) = records.last() else {
            return Ok(());
        };
        // sometimes SQL takes less than it was given, or answers late
        let seq = match self.random.below(3) {
            0 => seq - self.random.below(records.len() as u64),
            _ => *seq,
        };
        if self.random.one_in(4) {
            return Ok(());
        }
        model.drained = model.drained.max(seq);
        running.reader.drained(model.drained);
        assert_eq!(state.drained_seq(), model.drained);
        if model.drained == state.committed_seq() {
            assert_eq!(state.backlog_bytes(), 0);
        }
        let gone = Place {
            file: u32::MAX,
            offset: 4096,
            len: 1,
        };
        assert!(matches!(
            files.read(gone, &mut bytes),
            Err(JournalError::Recycled)
        ));
        self.saw("drained");
        Ok(())
    }
}
