//! The promise held against chance: slices, their journals on a disk that forgets, and a tier that is slow, fails and is
//! away, all from one seed, without sockets, threads or a clock.
//!
//! In a life, users log in on several clients, write to each other, change their data, are cut off and resume; groups are
//! committed, segments recycled, records drained in portions, each at any time. Then process or machine stops, in the
//! middle of any call to the disk, with all that was on its way between shards; what was not synced is there or not. The
//! next life may have another number of shards. In the end everything is sound and drained, and the model looks: what was
//! accepted (`<a h/>`, an IQ's result) is there, once, in order; what was delivered is in the recipient's archive, unless he wants none
//! (XEP-0441), and a tombstone (XEP-0424) stands there exactly where a retraction that is there too says so. The same holds
//! for a chat room: who is in it talks, and its owner takes back what was said; all who are in get all in the archive's order.
//!
//! `NITRO_SIM_SECONDS=3600 cargo test --release xmpp::simulation` runs for an hour, `NITRO_SIM_SEED=17` begins with that
//! seed. A run that fails is tried with fewer actions, and the shortest that still fails is printed with its trace;
//! `NITRO_SIM_DRAIN=1` adds every record that reaches the tier.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::bind::{Arrival, bind};
use super::feature::{register, sm};
use super::session::SessionId;
use super::slice::{Limits, Op, Slice, Slot, Start};
use super::testing::{self, World};
use crate::store::change::{ArchivedChange, Id};
use crate::store::journal::sim::{Crash, Random, SimDisk};
use crate::store::journal::stepped::Stepped;
use crate::store::journal::{Floors, Options, Status, floors};
use crate::store::overlay::Position;
use crate::store::record::{ArchiveDefault, Record, UserRecord};
use crate::store::recovery::Recovery;
use crate::store::room::{Affiliate, Affiliation, RoomRecord};
use crate::store::tier::{Answer, ArchiveQuery, Page, ReadError, Request};
use crate::xml::{Element, StreamNs};

const SHARDS_MAX: u64 = 3;
/// Actions of the clients in one run.
const ACTIONS: u64 = 600;
/// Steps after which what should come to rest must have done so.
const REST_MAX: usize = 20_000;

#[test]
fn what_is_accepted_survives_whatever_happens() {
    let number = |name: &str| std::env::var(name).ok().map(|v| v.parse::<u64>().unwrap());
    let time = Duration::from_secs(number("NITRO_SIM_SECONDS").unwrap_or(20));
    let first = number("NITRO_SIM_SEED").unwrap_or(1);
    let begin = Instant::now();
    let mut seen = BTreeMap::new();
    for seed in first.. {
        match run(seed, number("NITRO_SIM_ACTIONS").unwrap_or(ACTIONS)) {
            Ok(counts) => {
                for (what, count) in counts {
                    *seen.entry(what).or_insert(0) += count;
                }
            }
            Err(failed) => panic!("{}", shortest(seed, failed)),
        }
        if begin.elapsed() >= time {
            println!("{} seeds: {seen:?}", seed - first + 1);
            break;
        }
    }
    for what in EXPECTED {
        assert!(seen.contains_key(what), "{what} never happened: {seen:?}");
    }
}

/// What a test of a few seeds must have met, or it proves nothing.
const EXPECTED: &[&str] = &[
    "crash of the machine",
    "crash of the process",
    "crash in a call",
    "crash in the start",
    "accepted",
    "received again",
    "resumed",
    "not resumed, counted",
    "changes accepted",
    "drained",
    "drain not known",
    "archive read",
    "tier away",
    "received",
    "shards changed",
    "retracted",
    "kept out of an archive",
];

/// A run that has failed.
struct Failed {
    why: String,
    actions: u64,
    trace: Vec<String>,
}

fn run(seed: u64, actions: u64) -> Result<BTreeMap<&'static str, u64>, Failed> {
    let trace = Rc::new(RefCell::new(Vec::new()));
    let inner = trace.clone();
    let run = move || {
        let mut simulation = Simulation::new(seed, inner);
        simulation.run(actions);
        simulation.seen
    };
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| Failed {
        why: match panic.downcast::<String>() {
            Ok(why) => *why,
            Err(other) => other.downcast_ref::<&str>().unwrap_or(&"?").to_string(),
        },
        actions,
        trace: trace.take(),
    })
}

/// Halves the number of actions as long as the run still fails.
fn shortest(seed: u64, mut failed: Failed) -> String {
    let (mut low, mut high) = (0, failed.actions);
    while low + 1 < high {
        let middle = (low + high) / 2;
        match run(seed, middle) {
            Err(shorter) => (high, failed) = (middle, shorter),
            Ok(_) => low = middle,
        }
    }
    format!(
        "{}\nNITRO_SIM_SEED={seed} NITRO_SIM_ACTIONS={} fails: {}",
        failed.trace.join("\n"),
        failed.actions,
        failed.why
    )
}

// ---- the model ---------------------------------------------------------------------------------------------------

/// A message that a client has sent.
struct Sent {
    from: usize,
    peer: usize,
    to: usize,
    full: bool,
    archived: bool,
    pending: bool,
    accepted: bool,
    /// Its sender got an error.
    refused: bool,
    /// A journal was full before it was accepted: the error may be lost with its session.
    unsure: bool,
    at: u64,
    stable_id: Option<String>,
    received: bool,
    /// It retracts an earlier message of the same client to the same user.
    retracts: Option<usize>,
}

/// A subscription that a client has asked for.
#[derive(Default)]
struct Subscribed {
    at: u64,
    accepted: bool,
    /// He has got an error, or a journal was full before it was accepted: the error may be lost with its session.
    unsure: bool,
}

/// A change that a client has asked for by IQ.
struct Asked {
    user: usize,
    what: What,
    at: u64,
    answer: Option<bool>,
}

/// Something that was said in the room.
struct Said {
    peer: usize,
    /// He surely was in when he said it.
    inside: bool,
    accepted: bool,
    refused: bool,
    /// Somebody has got it.
    received: bool,
    stable_id: Option<String>,
    /// The owner has asked to take it back; he was told that it is done.
    moderated: Option<bool>,
}

const ROOM: &str = "desk@rooms.localhost";
/// Where the numbers of what is said in the room begin, among those that streams remember.
const SAID: usize = usize::MAX / 4;

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum What {
    /// Key and value: "vcard", "password", "archiving", "item USER".
    Put(String, String),
    Block(usize),
    Unblock(usize),
}

#[derive(Default)]
struct Account {
    name: String,
    /// Surely there since; `None`: perhaps not.
    since: Option<u64>,
    /// Surely gone.
    gone: bool,
    /// Since when each other user is surely not blocked; missing: always.
    clear: BTreeMap<usize, Option<u64>>,
    /// What the archive was seen to hold.
    archive: BTreeSet<u64>,
    /// Whether messages are archived since a moment; `None`: perhaps. Before the first: they are.
    archiving: Vec<(u64, Option<bool>)>,
    /// Clients of it; one: the order of first receipts is strict.
    peers: usize,
}

/// One client program.
struct Peer {
    user: usize,
    resource: String,
    managed: bool,
    carbons: bool,
    link: Option<u64>,
    sid: Option<SessionId>,
    inbox: Vec<u8>,
    stream: Option<Stream>,
    wants: Option<Wants>,
    /// Surely in the room.
    inside: bool,
    /// The position in the room's archive of what it has heard last, since it was cut off last.
    heard: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Wants {
    Login,
    Resume,
}

/// XEP-0198 from the client's side.
#[derive(Default)]
struct Stream {
    previd: String,
    sent: u32,
    acked: u32,
    handled: u32,
    told: u32,
    /// What it had sent when it resumed.
    read: u32,
    /// Messages by their count.
    messages: VecDeque<(u32, usize)>,
    /// Changes asked for, the same.
    queries: VecDeque<(u32, usize)>,
    /// Unix ms of the last crash that it has seen.
    crashed: Option<u64>,
}

type Pages = Rc<RefCell<Vec<(usize, ArchiveQuery, Result<Page, ReadError>)>>>;
type Written = Rc<RefCell<Vec<(usize, bool, bool)>>>;

struct Simulation {
    random: Random,
    /// How much time turns have for those who are told what all are told.
    leisure: Random,
    trace: Rc<RefCell<Vec<String>>>,
    seen: BTreeMap<&'static str, u64>,
    disk: SimDisk,
    world: World,
    limits: Limits,
    journals: Option<Stepped>,
    floors: Floors,
    /// The files that groups go to, by shard.
    files: Vec<u32>,
    /// What SQL has, by number and identity of a journal.
    positions: BTreeMap<(u16, u64), u64>,
    /// By which records of a journal are merged with others, see [`crate::store::drain`].
    orders: BTreeMap<u16, u64>,
    /// Requests that the tier has not looked at, answers and news of the drain on their way.
    requests: Vec<(usize, Request)>,
    answers: Vec<(usize, Answer)>,
    news: Vec<VecDeque<Position>>,
    /// The drain of this life has told what the tier had at its begin.
    told: bool,
    /// The tier takes part in nothing.
    away: bool,
    accounts: Vec<Account>,
    peers: Vec<Peer>,
    links: u64,
    messages: Vec<Sent>,
    asked: Vec<Asked>,
    said: Vec<Said>,
    /// The last page of its archive was the end.
    room_is_read: bool,
    pages: Pages,
    /// Accounts added or removed by an operator: user, added?, done?
    written: Written,
    /// The last message of a sender that was received first, by sender, recipient and form of address.
    order: BTreeMap<(usize, usize, bool), usize>,
    /// By who asks and who is asked.
    subscribed: BTreeMap<(usize, usize), Subscribed>,
    now: u64,
    last: bool,
}

impl Simulation {
    fn new(seed: u64, trace: Rc<RefCell<Vec<String>>>) -> Simulation {
        let mut limits = testing::limits();
        limits.iterations = 1;
        limits.offline_messages_max = 100_000;
        limits.offline_bytes_max = 1 << 30;
        limits.load_queue_bytes_max = 1 << 30;
        let mut random = Random(seed);
        let users = 4 + random.below(5) as usize;
        let mut simulation = Simulation {
            trace,
            seen: BTreeMap::new(),
            disk: SimDisk::new(seed ^ 0xd15c),
            world: World::new(1),
            limits,
            journals: None,
            floors: floors(),
            files: Vec::new(),
            positions: BTreeMap::new(),
            orders: BTreeMap::new(),
            requests: Vec::new(),
            answers: Vec::new(),
            news: Vec::new(),
            told: false,
            away: false,
            accounts: Vec::new(),
            peers: Vec::new(),
            links: 0,
            messages: Vec::new(),
            asked: Vec::new(),
            said: Vec::new(),
            room_is_read: false,
            pages: Pages::default(),
            written: Written::default(),
            order: BTreeMap::new(),
            subscribed: BTreeMap::new(),
            now: 0,
            last: false,
            random,
            leisure: Random(!seed),
        };
        let mut room = testing::Stored::default();
        room.room = Some(the_room(&simulation.limits));
        let users_of_tier = &mut simulation.world.tier.users;
        users_of_tier.insert("desk@rooms".into(), room);
        for user in 0..users {
            let account = Account {
                name: format!("user{user}"),
                since: Some(0),
                ..Account::default()
            };
            simulation.world.add(&account.name);
            simulation.accounts.push(account);
            for n in 0..1 + simulation.random.below(3) {
                simulation.peer(user, format!("r{n}"));
            }
        }
        simulation
    }

    fn peer(&mut self, user: usize, resource: String) -> usize {
        self.accounts[user].peers += 1;
        self.peers.push(Peer {
            user,
            resource,
            managed: !self.random.one_in(4),
            carbons: self.random.one_in(3),
            link: None,
            sid: None,
            inbox: Vec::new(),
            stream: None,
            wants: None,
            inside: false,
            heard: 0,
        });
        self.peers.len() - 1
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_insert(0) += 1;
    }

    fn note(&self, what: impl Into<String>) {
        let what = what.into();
        self.trace
            .borrow_mut()
            .push(format!("{}: {what}", self.now));
    }

    fn run(&mut self, actions: u64) {
        self.restart(false);
        for _ in 0..actions {
            if self.journals.is_some() && self.random.one_in(120) {
                let calls = self.random.below(60);
                self.disk.crash_after(calls + 1);
            }
            if self.random.one_in(200) {
                self.crash();
            }
            if self.random.one_in(60) {
                self.away = self.random.one_in(2);
                if self.away {
                    self.saw("tier away");
                }
                self.note(format!(
                    "the tier is {}",
                    ["there", "away"][usize::from(self.away)]
                ));
            }
            self.act();
            for _ in 0..self.random.below(12) {
                self.step();
            }
        }
        self.finale();
    }

    // ---- lives ---------------------------------------------------------------------------------------------------

    fn crash(&mut self) {
        let how = match self.random.below(6) {
            0..2 => Crash::Process,
            2 => Crash::Machine { piece: 4096 },
            3 | 4 => Crash::Machine { piece: 512 },
            _ => Crash::Forgetful,
        };
        self.saw(match how {
            Crash::Process => "crash of the process",
            _ => "crash of the machine",
        });
        self.note(format!("crash: {how:?}"));
        self.disk.crash(how);
        self.journals = None;
        for at in 0..self.peers.len() {
            let unix_ms = self.world.now.unix_ms;
            let peer = &mut self.peers[at];
            if let Some(stream) = &mut peer.stream {
                stream.crashed.get_or_insert(unix_ms);
            }
            (peer.link, peer.sid, peer.wants) = (None, None, None);
            (peer.inside, peer.heard) = (false, 0);
            peer.inbox.clear();
        }
        let trouble = !self.last && self.random.one_in(3);
        self.restart(trouble);
    }

    /// Starts until it succeeds; `trouble`: the machine may stop meanwhile.
    fn restart(&mut self, trouble: bool) {
        let before = self.world.slices.len();
        let shards = 1 + self.random.below(SHARDS_MAX) as usize;
        if before != shards {
            self.saw("shards changed");
        }
        if trouble {
            let calls = self.random.below(20);
            self.disk.crash_after(calls + 1);
        }
        while let Err(why) = self.start(shards) {
            assert!(self.disk.has_crashed(), "it does not start: {why}");
            self.saw("crash in the start");
            self.journals = None;
            let piece = [512, 4096][self.random.below(2) as usize];
            self.disk.crash(Crash::Machine { piece });
        }
        self.note(format!("{shards} shards"));
    }

    fn start(&mut self, shards: usize) -> Result<(), String> {
        self.requests.clear();
        self.answers.clear();
        self.pages.borrow_mut().clear();
        self.written.borrow_mut().clear();
        self.orders.clear();
        self.told = false;
        self.world.tier.ahead = Default::default();
        self.news = (0..shards).map(|_| VecDeque::new()).collect();
        self.floors = floors();
        self.files = vec![0; shards];
        let options = Options {
            segment_bytes: [32 << 10, 64 << 10][self.random.below(2) as usize],
            backlog_bytes_max: [300 << 10, 4 << 20][self.random.below(2) as usize],
            floors: self.floors.clone(),
        };
        // a start takes a while, and the monotonic clock begins anew
        self.world.now.unix_ms += 1000;
        self.world.now.unix = self.world.now.unix_ms / 1000;
        self.world.now.ms = 1000;
        let text = |e: crate::store::journal::JournalError| e.to_string();
        let mut journals = Stepped::open(&self.disk, &options).map_err(text)?;
        let away = self.away;
        let positions = &self.positions;
        let drained = |shard: u16, identity: u64, first_seq: u64| match away {
            true => first_seq - 1,
            false => positions.get(&(shard, identity)).copied().unwrap_or(0),
        };
        let found = journals.journals().found().to_vec();
        let by_shard = found
            .iter()
            .map(|f| (f.shard, drained(f.shard, f.identity, f.first_seq)))
            .collect();
        let ring = testing::ring(shards);
        let mut recovery = Recovery::new(&ring, by_shard);
        let replayed = journals.journals().replay(|shard, seq, place, change| {
            recovery.record(shard, seq, place, change).unwrap();
        });
        replayed.map_err(text)?;
        let (mut recovered, mut last_id) = recovery.finish();
        if !away {
            last_id = last_id.max(Id(self.world.tier.last_id));
        }
        let since = self.world.owners_since(shards, last_id);
        for found in recovered.iter_mut().filter(|_| away) {
            found.doubtful = Some(since);
        }
        let firsts: BTreeMap<u16, u64> = found.iter().map(|f| (f.shard, f.first_seq)).collect();
        let next = journals.start(shards as u16, |shard, id| {
            drained(shard, id, firsts[&shard])
        });
        let next = next.map_err(text)?;
        let files = journals.journals().files();
        let starts = recovered.into_iter().zip(next).map(|(found, next_seq)| {
            let files = files.clone();
            Start {
                next_seq,
                last_id,
                found,
                read_back: Rc::new(move |place, into: &mut Vec<u8>| {
                    files.read(place, into).map_err(|error| error.to_string())
                }),
            }
        });
        let starts = starts.collect();
        let cache = [64 << 20, 1500][self.random.below(2) as usize];
        let limits = self.limits.clone();
        self.world.begin(&limits, cache, starts);
        self.journals = Some(journals);
        Ok(())
    }

    /// After each step: has the machine stopped?
    fn look(&mut self, done: Result<(), String>) {
        if self.disk.has_crashed() {
            self.saw("crash in a call");
            return self.crash();
        }
        done.expect("the disk is sound");
    }

    // ---- what goes on in the process -----------------------------------------------------------------------------

    /// One small thing that would happen by itself; may come to nothing.
    fn step(&mut self) -> bool {
        let shards = self.world.slices.len() as u64;
        let shard = self.random.below(shards) as usize;
        let moved = match self.random.below(16) {
            0..3 => self.commit(shard),
            3..6 => {
                let to = self.random.below(shards) as usize;
                self.mesh(shard, to)
            }
            6 => self.flush_requests(shard),
            7 => self.ask_tier(),
            8 => self.give_answer(),
            9 | 10 => self.flush_output(shard),
            11 => {
                let peer = self.random.below(self.peers.len() as u64) as usize;
                self.read(peer)
            }
            12 => self.keep(),
            13 => self.drain(),
            14 => self.tell(shard),
            _ => self.confirm(shard),
        };
        self.collect();
        moved
    }

    /// Everything that happens by itself, until nothing moves any more.
    fn rest(&mut self) {
        for _ in 0..REST_MAX {
            let mut moved = false;
            for shard in 0..self.world.slices.len() {
                for to in 0..self.world.slices.len() {
                    moved |= self.mesh(shard, to);
                }
                moved |= self.commit(shard);
                moved |= self.flush_requests(shard);
                moved |= self.flush_output(shard);
                moved |= self.tell(shard);
                moved |= self.confirm(shard);
            }
            moved |= self.ask_tier();
            moved |= self.give_answer();
            for peer in 0..self.peers.len() {
                moved |= self.read(peer);
                moved |= self.try_in(peer);
            }
            self.collect();
            moved |= self.drain();
            self.keep();
            if !moved {
                return;
            }
        }
        panic!("it does not come to rest");
    }

    fn commit(&mut self, shard: usize) -> bool {
        let Some(journals) = &mut self.journals else {
            return false;
        };
        let Some(slice) = self.world.slices.get_mut(shard) else {
            return false;
        };
        if !slice.ledger.is_flying() {
            if self.last || self.random.one_in(4) {
                slice.ledger.hurry();
            }
            let due = slice.ledger.due_ms(slice.now.ms);
            if due.is_none_or(|due| due > slice.now.ms) {
                return false;
            }
            if let Some(group) = slice.seal() {
                journals.submit(shard as u16, group);
            }
            return true;
        }
        let committed = match journals.commit(shard as u16) {
            Ok(committed) => committed,
            Err(error) => {
                self.look(Err(error.to_string()));
                return true;
            }
        };
        let Some(committed) = committed else {
            self.saw("no room for a commit");
            self.keep();
            return false;
        };
        // as the shard does it
        slice.committed(Some(&committed.group), &|slot| committed.place(slot));
        let file = committed.file();
        if std::mem::replace(&mut self.files[shard], file) != file {
            slice.new_segment();
        }
        slice.ledger.give_back(committed.group);
        let floor = slice.fx.floor;
        let slices = &self.world.slices;
        if slices.iter().all(|slice| slice.ledger.foreign_settled()) {
            self.floors[shard].store(floor, Relaxed);
            for floor in &self.floors[slices.len()..] {
                floor.store(u64::MAX, Relaxed);
            }
        }
        self.look(Ok(()));
        true
    }

    fn mesh(&mut self, from: usize, to: usize) -> bool {
        if from >= self.world.slices.len() || to >= self.world.slices.len() {
            return false;
        }
        let batch = std::mem::take(&mut self.world.slices[from].fx.mesh[to]);
        let some = !batch.is_empty();
        if some {
            self.world.slices[to].batch(&batch);
        }
        some
    }

    fn flush_requests(&mut self, shard: usize) -> bool {
        let Some(slice) = self.world.slices.get_mut(shard) else {
            return false;
        };
        let requests = std::mem::take(&mut slice.fx.requests);
        let jobs = std::mem::take(&mut slice.fx.jobs);
        let some = !requests.is_empty() || !jobs.is_empty();
        self.requests
            .extend(requests.into_iter().map(|r| (shard, r)));
        for (ticket, job) in jobs {
            slice.computed(ticket, job.run());
        }
        some
    }

    /// The tier looks at a request, whichever.
    fn ask_tier(&mut self) -> bool {
        if self.requests.is_empty() {
            return false;
        }
        let at = self.random.below(self.requests.len() as u64) as usize;
        let (shard, request) = self.requests.swap_remove(at);
        self.world.tier.broken = self.away || (!self.last && self.random.one_in(20));
        let answer = self.world.tier.answer(request);
        self.world.tier.broken = false;
        self.answers.push((shard, answer));
        true
    }

    fn give_answer(&mut self) -> bool {
        if self.answers.is_empty() {
            return false;
        }
        let at = self.random.below(self.answers.len() as u64) as usize;
        let (shard, answer) = self.answers.swap_remove(at);
        self.world.slices[shard].answers(vec![answer]);
        true
    }

    /// News of the drain.
    fn tell(&mut self, shard: usize) -> bool {
        let at = self.news.get_mut(shard).and_then(VecDeque::pop_front);
        if let Some(at) = at {
            self.world.slices[shard].drained(at);
        }
        at.is_some()
    }

    fn flush_output(&mut self, shard: usize) -> bool {
        let Some(slice) = self.world.slices.get_mut(shard) else {
            return false;
        };
        slice.cut_slow_readers();
        slice.fx.loaded.clear();
        let mut dirty = std::mem::take(&mut slice.fx.dirty);
        // a turn has time for some of those who are told what all are told
        let some = self.leisure.below(4);
        dirty.extend((0..some).map_while(|_| slice.next_fanned()));
        let mut moved = !slice.fx.fanned.is_empty();
        for sid in dirty {
            if let Some((link, bytes)) = slice.take_out(sid) {
                moved = true;
                if let Some(peer) = self.peers.iter_mut().find(|p| p.link == Some(link)) {
                    peer.inbox.extend_from_slice(&bytes);
                }
            }
        }
        for closing in std::mem::take(&mut slice.fx.closing) {
            moved = true;
            let peer = self.peers.iter().position(|p| p.link == Some(closing.link));
            if let Some(name) = closing.left {
                self.world.slices[shard].left(&name, Some(closing.link), peer.is_some());
            }
            if let Some(peer) = peer {
                self.peers[peer].inbox.extend_from_slice(&closing.bytes);
                self.read(peer);
                self.note(format!("{} is closed", self.jid(peer)));
                (self.peers[peer].link, self.peers[peer].sid) = (None, None);
                self.peers[peer].wants = None;
            }
        }
        moved
    }

    /// A client without stream management has all that it was sent.
    fn confirm(&mut self, shard: usize) -> bool {
        let Some(slice) = self.world.slices.get_mut(shard) else {
            return false;
        };
        let mut moved = false;
        for sid in std::mem::take(&mut slice.fx.unconfirmed) {
            let Some(session) = slice.sessions.get(sid) else {
                continue;
            };
            let link = session.link.filter(|_| !session.dirty);
            let has_all = |p: &Peer| p.link.is_some() && p.link == link && p.inbox.is_empty();
            match self.peers.iter().any(has_all) {
                true => {
                    slice.confirmed(sid);
                    moved = true;
                }
                false => slice.fx.unconfirmed.push(sid),
            }
        }
        moved
    }

    fn keep(&mut self) -> bool {
        let Some(journals) = &mut self.journals else {
            return false;
        };
        // records rest for longer before they are drained than marks wait for a group, so marks are never late
        let mut slices = self.world.slices.iter();
        let marked = slices
            .all(|slice| !slice.ledger.is_flying() && slice.ledger.due_ms(slice.now.ms).is_none());
        let kept = journals.keep(marked);
        let worked = matches!(kept, Ok(true));
        self.look(kept.map(drop).map_err(|error| error.to_string()));
        worked
    }

    /// Some records go into the tier, as [`crate::store::drain`] does it: oldest ids first, each journal in its order.
    fn drain(&mut self) -> bool {
        let Some(journals) = self.journals.as_mut().filter(|_| !self.away) else {
            return false;
        };
        let mut feeds = Vec::new();
        let (mut bytes, mut failed) = (Vec::new(), None);
        for reader in journals.readers() {
            let key = (reader.shard(), reader.identity());
            let at = self.positions.get(&key).copied().unwrap_or(0);
            reader.drained(at);
            let mut records = Vec::new();
            let wanted = at + 1..=reader.committed();
            if let Err(error) = reader.read(wanted, 1 << 20, &mut bytes, &mut records) {
                failed = Some(error.to_string());
            }
            feeds.push((key, VecDeque::from(records)));
        }
        if failed.is_some() {
            self.look(Err(failed.unwrap_or_default()));
            return true;
        }
        if !std::mem::replace(&mut self.told, true) {
            for (key, _) in &feeds {
                let seq = self.positions.get(key).copied().unwrap_or(0);
                let at = Position {
                    journal: key.0,
                    seq,
                };
                self.news.iter_mut().for_each(|news| news.push_back(at));
            }
        }
        for range in feeds
            .iter()
            .flat_map(|(_, feed)| feed)
            .map(|(_, range)| range)
        {
            let ahead = &mut self.world.tier.ahead;
            if let Ok(ArchivedChange::Marks(marks)) = ArchivedChange::access(&bytes[range.clone()])
            {
                ahead
                    .done
                    .extend(marks.done.iter().map(|id| id.to_native()));
                ahead
                    .dropped
                    .extend(marks.dropped.iter().map(|id| id.to_native()));
            }
        }
        let most = match self.last {
            true => usize::MAX,
            false => 1 + self.random.below(40) as usize,
        };
        let (mut reached, mut marked) = (BTreeMap::new(), Vec::new());
        for _ in 0..most {
            let order =
                |key: &(u16, u64), range: &std::ops::Range<usize>, orders: &BTreeMap<u16, u64>| {
                    let before = orders.get(&key.0).copied().unwrap_or(0);
                    let change = ArchivedChange::access(&bytes[range.clone()]).unwrap();
                    change.order(before)
                };
            let heads = feeds.iter().enumerate().filter_map(|(at, (key, feed))| {
                let (_, range) = feed.front()?;
                Some((order(key, range, &self.orders), at))
            });
            let Some((order, at)) = heads.min() else {
                break;
            };
            let (key, feed) = &mut feeds[at];
            let (seq, range) = feed.pop_front().unwrap();
            self.orders.insert(key.0, order);
            let change = ArchivedChange::access(&bytes[range]).unwrap();
            if let ArchivedChange::Marks(marks) = change {
                let ids = marks.done.iter().chain(marks.dropped.iter());
                marked.extend(ids.map(|id| id.to_native()));
            }
            self.world.tier.apply(change);
            if std::env::var_os("NITRO_SIM_DRAIN").is_some() {
                self.trace
                    .borrow_mut()
                    .push(format!("drained {key:?} {seq} {}", told(change)));
            }
            reached.insert(*key, seq);
        }
        if reached.is_empty() {
            return false;
        }
        let ahead = &mut self.world.tier.ahead;
        for id in marked {
            ahead.done.remove(&id);
            ahead.dropped.remove(&id);
        }
        self.saw("drained");
        self.positions.extend(&reached);
        // sometimes nobody hears how the transaction ended
        if !self.last && self.random.one_in(6) {
            self.saw("drain not known");
            return true;
        }
        for (key, seq) in reached {
            let journals = self.journals.as_mut().unwrap();
            journals
                .readers()
                .filter(|reader| (reader.shard(), reader.identity()) == key)
                .for_each(|reader| reader.drained(seq));
            for news in &mut self.news {
                news.push_back(Position {
                    journal: key.0,
                    seq,
                });
            }
        }
        true
    }

    /// Looks at journals' bounds, and at what came of archives and accounts.
    fn collect(&mut self) {
        let Some(journals) = &self.journals else {
            return;
        };
        let mut any_full = false;
        for (shard, slice) in self.world.slices.iter_mut().enumerate() {
            slice.journal_is_full(journals.status(shard as u16) != Status::Open);
            any_full |= slice.ledger.full;
        }
        if any_full {
            for message in self.messages.iter_mut().filter(|m| !m.accepted) {
                message.unsure = true;
            }
            for one in self.subscribed.values_mut().filter(|one| !one.accepted) {
                one.unsure = true;
            }
            self.saw("full");
        }
        let pages: Vec<_> = self.pages.borrow_mut().drain(..).collect();
        for (user, query, page) in pages {
            if let Ok(page) = page {
                self.page(user, &query, &page);
            }
        }
        let written: Vec<_> = self.written.borrow_mut().drain(..).collect();
        for (user, added, done) in written {
            self.note(format!("user{user} added: {added}, done: {done}"));
            let account = &mut self.accounts[user];
            match (added, done) {
                (true, true) => {
                    account.gone = false;
                    account.since = Some(self.now);
                }
                (false, true) => account.gone = true,
                _ => {}
            }
        }
    }

    /// Part of an archive, as a client may see it at any time: nothing new comes before what was seen.
    fn page(&mut self, user: usize, query: &ArchiveQuery, page: &Page) {
        self.saw("archive read");
        let ids: Vec<u64> = page.entries.iter().map(|entry| entry.id).collect();
        assert!(
            ids.windows(2).all(|pair| pair[0] < pair[1]),
            "user{user}: positions grow: {ids:?}"
        );
        let account = &mut self.accounts[user];
        if account.since.is_none() || query.after.is_some() {
            return;
        }
        let last = account.archive.last().copied().unwrap_or(0);
        for id in ids {
            assert!(
                id > last || account.archive.contains(&id),
                "user{user}: {id:x} is new before {last:x}"
            );
            account.archive.insert(id);
        }
    }
}

/// A room that stays, and that the first user owns.
fn the_room(limits: &Limits) -> Record {
    let mut room = RoomRecord {
        settings: super::room::settings::default(&limits.rooms),
        ..RoomRecord::default()
    };
    room.settings.persistent = true;
    room.affiliate_as(Affiliate {
        jid: "user0@localhost".into(),
        affiliation: Affiliation::Owner,
        ..Affiliate::default()
    });
    Record::room(&room)
}

/// A change in a few words.
fn told(change: &ArchivedChange<'_>) -> String {
    match change {
        ArchivedChange::Message(m) => format!(
            "message {:x} of {}, what {}, twin {:x}: {}",
            m.id,
            &*m.owner,
            m.what,
            m.twin,
            String::from_utf8_lossy(&m.stanza)
        ),
        ArchivedChange::Marks(marks) => {
            macro_rules! ids {
                ($ids:expr) => {
                    $ids.iter().map(|id| format!("{id:x}")).collect::<Vec<_>>()
                };
            }
            format!(
                "marks: done {:?}, dropped {:?}, settled {:?}, {} counts",
                ids!(marks.done),
                ids!(marks.dropped),
                ids!(marks.settled),
                marks.counts.len()
            )
        }
        ArchivedChange::Decided { ids } => format!(
            "decided {:?}",
            ids.iter().map(|id| format!("{id:x}")).collect::<Vec<_>>()
        ),
        other => format!("change of {:?}: {:x?}", other.owner(), id_of(other)),
    }
}

/// Its id or revision.
fn id_of(change: &ArchivedChange<'_>) -> Option<u64> {
    Some(match change {
        ArchivedChange::Message(message) => message.id.to_native(),
        ArchivedChange::AddUser { revision, .. }
        | ArchivedChange::PutUser { revision, .. }
        | ArchivedChange::RemoveUser { revision, .. }
        | ArchivedChange::PutDocument { revision, .. }
        | ArchivedChange::PutLast { revision, .. } => revision.to_native(),
        ArchivedChange::Retract(retract) => retract.id.to_native(),
        ArchivedChange::Marks(_)
        | ArchivedChange::Decided { .. }
        | ArchivedChange::Unarchived { .. } => return None,
    })
}

// ---- clients -----------------------------------------------------------------------------------------------------

impl Simulation {
    fn jid(&self, peer: usize) -> String {
        let Peer { user, resource, .. } = &self.peers[peer];
        format!("user{user}@localhost/{resource}")
    }

    fn slice_of(&mut self, user: usize) -> &mut Slice {
        let name = self.accounts[user].name.clone();
        self.world.slice_of(&name)
    }

    /// A client, or the operator, does something.
    fn act(&mut self) {
        self.now += 1;
        let peer = self.random.below(self.peers.len() as u64) as usize;
        if self.peers[peer].wants.is_some() {
            self.try_in(peer);
            return;
        }
        if self.peers[peer].link.is_none() {
            let resumes = self.peers[peer].stream.is_some() && !self.random.one_in(4);
            self.peers[peer].wants = Some(match resumes {
                true => Wants::Resume,
                false => Wants::Login,
            });
            self.try_in(peer);
            return;
        }
        match self.random.below(100) {
            0..35 => self.message(peer),
            35..45 => self.in_room(peer),
            45..55 => self.nonza(peer, "<r xmlns='urn:xmpp:sm:3'/>"),
            55..67 => self.acknowledge(peer),
            67..70 => self.presence(peer),
            70..76 => self.in_room(peer),
            76..80 => self.cut(peer),
            80..87 => self.change(peer),
            87..90 => self.subscribe(peer),
            90 => self.account(),
            91..94 => self.ask_archive(peer),
            94..98 => {
                let ms = self.random.below(300);
                self.advance(ms);
            }
            _ => {
                let ms = 2000 + self.random.below(400_000);
                self.advance(ms);
            }
        }
    }

    fn advance(&mut self, ms: u64) {
        let now = &mut self.world.now;
        now.ms += ms;
        now.unix_ms += ms;
        now.unix = now.unix_ms / 1000;
        for slice in &mut self.world.slices {
            slice.now = self.world.now;
            slice.tick();
        }
    }

    /// Goes on with a login or a resumption as far as it can.
    fn try_in(&mut self, peer: usize) -> bool {
        let Some(wants) = self.peers[peer].wants else {
            return false;
        };
        let (user, handled) = (self.peers[peer].user, self.peers[peer].stream.as_ref());
        let handled = handled.map(|s| (s.previd.clone(), s.handled, s.acked, s.crashed));
        let name = self.accounts[user].name.clone();
        let unix_ms = self.world.now.unix_ms;
        let resume_ms = self.limits.resume_ms_max;
        let slice = self.world.slice_of(&name);
        if !slice.want(&name) {
            return false;
        }
        if slice.user(&name).is_none() {
            let missing = matches!(slice.users.peek(&name), Some(Slot::Missing));
            assert!(
                !missing || self.accounts[user].since.is_none(),
                "{name} is not there any more"
            );
            self.peers[peer].wants = None;
            return false;
        }
        assert!(!self.accounts[user].gone, "{name} is there again");
        if let (Wants::Resume, Some((previd, handled, acked, crashed))) = (wants, handled) {
            if let Some(sid) = sm::find(slice, &name, &previd) {
                sm::detach(slice, sid);
                if sm::is_settling(slice, sid) {
                    return false;
                }
                if sm::find(slice, &name, &previd) == Some(sid) {
                    self.links += 1;
                    let resumed = sm::resume(slice, sid, self.links, handled, (b"", b""));
                    assert!(resumed.is_ok(), "{} has what it was sent", self.jid(peer));
                    self.note(format!("{} resumes with {handled}", self.jid(peer)));
                    let peer = &mut self.peers[peer];
                    peer.inbox.clear();
                    (peer.link, peer.sid) = (Some(self.links), Some(sid));
                    peer.wants = None;
                    if let Some(stream) = &mut peer.stream {
                        stream.told = handled;
                        stream.read = stream.sent;
                    }
                    self.saw("resumed");
                    return true;
                }
            }
            let count = slice.count_of(&previd);
            self.note(format!("{} is not resumed: {count:?}", self.jid(peer)));
            let fresh = crashed.is_some_and(|at| unix_ms - at < resume_ms);
            if let Some(h) = count {
                assert!(
                    h >= acked,
                    "{}: {h} of its stanzas are known, {acked} were acknowledged",
                    self.jid(peer)
                );
                self.saw("not resumed, counted");
                self.accepted(peer, h, false);
            } else if fresh {
                assert_eq!(acked, 0, "{}: nobody knows its count", self.jid(peer));
            }
        }
        self.log_in(peer);
        true
    }

    fn log_in(&mut self, peer: usize) {
        self.links += 1;
        let link = self.links;
        let name = self.accounts[self.peers[peer].user].name.clone();
        let resource = self.peers[peer].resource.clone();
        let user = self.world.slice_of(&name).user(&name);
        let account = user.map(|user| crate::xmpp::fast::account(user.record.get()));
        let arrival = Arrival {
            user: &name,
            account,
            resource: Some(&resource),
            link,
            lang: None,
            stream_ns: Rc::new(StreamNs::client()),
            tls: false,
            peer: "127.0.0.1".into(),
        };
        let sid = bind(self.world.slice_of(&name), arrival).unwrap();
        self.note(format!("{} logs in", self.jid(peer)));
        let one = &mut self.peers[peer];
        one.inbox.clear();
        (one.link, one.sid, one.wants, one.stream) = (Some(link), Some(sid), None, None);
        if one.managed {
            self.nonza(peer, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
            self.peers[peer].stream = Some(Stream::default());
        }
        if self.peers[peer].carbons {
            self.stanza(
                peer,
                "<iq type='set' id='c'><enable xmlns='urn:xmpp:carbons:2'/></iq>",
            );
        }
        if self.last || !self.random.one_in(4) {
            self.stanza(peer, "<presence/>");
        }
    }

    /// An element that is not counted.
    fn nonza(&mut self, peer: usize, xml: &str) {
        let Peer { user, sid, .. } = self.peers[peer];
        let enabled = self.peers[peer].stream.is_some() || xml.starts_with("<enable");
        let Some(sid) = sid.filter(|_| enabled) else {
            return;
        };
        let done = self.slice_of(user).element(sid, xml.as_bytes());
        assert!(done.is_ok(), "{}: {xml}: {done:?}", self.jid(peer));
    }

    /// An element that is counted; its count, or 0.
    fn stanza(&mut self, peer: usize, xml: &str) -> u32 {
        let Peer { user, sid, .. } = self.peers[peer];
        let Some(sid) = sid else { return 0 };
        let stream = self.peers[peer].stream.as_mut();
        let count = stream.map_or(0, |stream| {
            stream.sent += 1;
            stream.sent
        });
        self.note(format!("{} {count}: {xml}", self.jid(peer)));
        let done = self.slice_of(user).element(sid, xml.as_bytes());
        assert!(done.is_ok(), "{}: {xml}: {done:?}", self.jid(peer));
        count
    }

    fn message(&mut self, peer: usize) {
        let to = self.random.below(self.accounts.len() as u64) as usize;
        let full = self.random.one_in(3);
        let resource = match full {
            true => format!("/r{}", self.random.below(3)),
            false => String::new(),
        };
        let (attributes, payload, archived, pending) = match self.random.below(12) {
            0 => (
                "type='chat'",
                "<no-store xmlns='urn:xmpp:hints'/>",
                false,
                false,
            ),
            1 => (
                "type='chat'",
                "<no-permanent-store xmlns='urn:xmpp:hints'/>",
                false,
                true,
            ),
            2 => ("type='headline'", "", false, false),
            3 if !full => ("", "", true, true),
            _ => ("type='chat'", "", true, true),
        };
        let id = self.messages.len();
        let mut earlier = self
            .messages
            .iter()
            .rposition(|m| m.peer == peer && m.to == to && m.archived && m.retracts.is_none());
        earlier = earlier.filter(|_| archived && pending && self.random.one_in(5));
        let retract =
            earlier.map(|m| format!("<retract xmlns='urn:xmpp:message-retract:1' id='m{m}'/>"));
        let retract = retract.unwrap_or_default();
        let xml = format!(
            "<message {attributes} id='m{id}' to='user{to}@localhost{resource}'><body>m{id}</body>{payload}{retract}</message>"
        );
        self.messages.push(Sent {
            retracts: earlier,
            from: self.peers[peer].user,
            peer,
            to,
            full,
            archived,
            pending,
            accepted: false,
            refused: false,
            unsure: false,
            at: self.now,
            stable_id: None,
            received: false,
        });
        let count = self.stanza(peer, &xml);
        if let Some(stream) = &mut self.peers[peer].stream {
            stream.messages.push_back((count, id));
        }
        self.collect();
    }

    fn acknowledge(&mut self, peer: usize) {
        let Some(stream) = &mut self.peers[peer].stream else {
            return;
        };
        if stream.previd.is_empty() {
            return;
        }
        let new = stream.handled - stream.told;
        let h = stream.handled - self.random.below(u64::from(new / 2 + 1)) as u32;
        stream.told = h;
        self.nonza(peer, &format!("<a xmlns='urn:xmpp:sm:3' h='{h}'/>"));
    }

    fn presence(&mut self, peer: usize) {
        let presence = match self.random.below(5) {
            0 => {
                self.peers[peer].inside = false;
                "<presence type='unavailable'/>"
            }
            1 => "<presence><priority>-1</priority></presence>",
            _ => "<presence/>",
        };
        self.stanza(peer, presence);
    }

    fn cut(&mut self, peer: usize) {
        let Peer { user, sid, .. } = self.peers[peer];
        let Some(sid) = sid else { return };
        let way = self.random.below(4);
        self.note(format!("{} is cut, way {way}", self.jid(peer)));
        match way {
            0 => {
                // a farewell: the session is over, and what it has not got is somebody else's
                self.slice_of(user).end(sid, None);
            }
            // nobody notices
            1 => {}
            _ => self.slice_of(user).link_lost(sid),
        }
        let peer = &mut self.peers[peer];
        (peer.link, peer.sid) = (None, None);
        (peer.inside, peer.heard) = (false, 0);
        peer.inbox.clear();
    }

    /// Comes into the room, goes, or talks there.
    fn in_room(&mut self, peer: usize) {
        let nick = format!("{}-{}", self.peers[peer].user, self.peers[peer].resource);
        match self.random.below(12) {
            0 => {
                self.peers[peer].inside = false;
                let leave = format!("<presence type='unavailable' to='{ROOM}/{nick}'/>");
                self.stanza(peer, &leave);
            }
            1..9 if !self.peers[peer].inside => {
                let join = format!(
                    "<presence to='{ROOM}/{nick}'><x xmlns='http://jabber.org/protocol/muc'><history maxstanzas='3'/></x></presence>"
                );
                self.stanza(peer, &join);
            }
            1..4 if self.peers[peer].user == 0 => self.moderate(),
            _ => {
                let id = self.said.len();
                self.said.push(Said {
                    peer,
                    inside: self.peers[peer].inside,
                    accepted: false,
                    refused: false,
                    received: false,
                    stable_id: None,
                    moderated: None,
                });
                let xml = format!(
                    "<message type='groupchat' id='s{id}' to='{ROOM}'><body>s{id}</body></message>"
                );
                let count = self.stanza(peer, &xml);
                if let Some(stream) = &mut self.peers[peer].stream {
                    stream.messages.push_back((count, SAID + id));
                }
            }
        }
        self.collect();
    }

    /// The owner takes something back.
    fn moderate(&mut self) {
        let owner = self.peers.iter().position(|p| p.user == 0 && p.inside);
        let known: Vec<usize> = (0..self.said.len())
            .filter(|n| self.said[*n].stable_id.is_some() && self.said[*n].moderated.is_none())
            .collect();
        let (Some(owner), false) = (owner, known.is_empty()) else {
            return;
        };
        let n = known[self.random.below(known.len() as u64) as usize];
        let id = self.said[n].stable_id.clone().unwrap();
        self.said[n].moderated = Some(false);
        let xml = format!(
            "<iq type='set' id='t{n}' to='{ROOM}'><moderate id='{id}' xmlns='urn:xmpp:message-moderate:1'>\
             <retract xmlns='urn:xmpp:message-retract:1'/></moderate></iq>"
        );
        self.stanza(owner, &xml);
    }

    /// A message that the room has told.
    fn heard(&mut self, peer: usize, element: &Element) {
        let Some(body) = element.find("body", super::NS_CLIENT) else {
            return;
        };
        let jid = self.jid(peer);
        let n: usize = body.text_content()[1..].parse().unwrap();
        self.note(format!("{jid} hears s{n}"));
        let stable = element.find("stanza-id", "urn:xmpp:sid:0");
        let stable = stable.and_then(|s| s.get("id")).expect("it is archived");
        let shown = u64::from_str_radix(stable, 16).unwrap();
        let id = super::feature::stable_id::unpermute(shown, [1, 2]);
        if element.find("delay", "urn:xmpp:delay").is_none() {
            let heard = std::mem::replace(&mut self.peers[peer].heard, id);
            assert!(heard < id, "{jid}: s{n} came behind what was said later");
        }
        let said = &mut self.said[n];
        said.received = true;
        match &said.stable_id {
            Some(old) => assert_eq!(old, stable, "s{n} has got another stable id"),
            None => said.stable_id = Some(stable.to_owned()),
        }
        self.saw("heard in the room");
    }

    fn change(&mut self, peer: usize) {
        let user = self.peers[peer].user;
        let n = self.asked.len();
        let other = self.random.below(self.accounts.len() as u64) as usize;
        let (what, payload) = match self.random.below(10) {
            0..3 => (
                What::Put("vcard".into(), format!("v{n}")),
                format!("<vCard xmlns='vcard-temp'><FN>v{n}</FN></vCard>"),
            ),
            3..6 if other != user => (
                What::Put(format!("item user{other}"), format!("v{n}")),
                format!(
                    "<query xmlns='jabber:iq:roster'><item jid='user{other}@localhost' name='v{n}'/></query>"
                ),
            ),
            6 => (
                What::Put("password".into(), format!("v{n}")),
                format!(
                    "<query xmlns='jabber:iq:register'><username>user{user}</username><password>v{n}</password></query>"
                ),
            ),
            7 if other != user && self.random.one_in(3) => {
                self.accounts[user].clear.insert(other, None);
                (
                    What::Block(other),
                    format!(
                        "<block xmlns='urn:xmpp:blocking'><item jid='user{other}@localhost'/></block>"
                    ),
                )
            }
            8 if other != user && self.accounts[user].clear.contains_key(&other) => (
                What::Unblock(other),
                format!(
                    "<unblock xmlns='urn:xmpp:blocking'><item jid='user{other}@localhost'/></unblock>"
                ),
            ),
            9 => {
                let (default, now) = (["always", "never"][self.random.below(2) as usize], self.now);
                self.accounts[user].archiving.push((now, None));
                (
                    What::Put("archiving".into(), default.into()),
                    format!("<prefs xmlns='urn:xmpp:mam:2' default='{default}'/>"),
                )
            }
            _ => return,
        };
        self.asked.push(Asked {
            user,
            what,
            at: self.now,
            answer: None,
        });
        let count = self.stanza(peer, &format!("<iq type='set' id='q{n}'>{payload}</iq>"));
        if let Some(stream) = &mut self.peers[peer].stream {
            stream.queries.push_back((count, n));
        }
    }

    /// Each asks each only once, so that no two requests can cross.
    fn subscribe(&mut self, peer: usize) {
        let user = self.peers[peer].user;
        let other = self.random.below(self.accounts.len() as u64) as usize;
        if other == user || self.subscribed.contains_key(&(user, other)) {
            return;
        }
        let count = self.stanza(
            peer,
            &format!("<presence type='subscribe' to='user{other}@localhost'/>"),
        );
        if count > 0 {
            let asked = Subscribed {
                at: self.now,
                ..Subscribed::default()
            };
            self.subscribed.insert((user, other), asked);
            let id = usize::MAX - (user * 100 + other);
            let stream = self.peers[peer].stream.as_mut().unwrap();
            stream.messages.push_back((count, id));
        }
    }

    /// The operator adds or removes an account; users of small numbers stay.
    fn account(&mut self) {
        let user = self.random.below(self.accounts.len() as u64) as usize;
        if user < 3 {
            return;
        }
        let name = self.accounts[user].name.clone();
        let add = self.accounts[user].since.is_none();
        self.note(format!("{name}: add {add}"));
        self.accounts[user].since = None;
        self.accounts[user].gone &= !add;
        self.accounts[user].archive.clear();
        self.accounts[user].clear.clear();
        let written = self.written.clone();
        let slice = self.world.slice_of(&name);
        let who = name.clone();
        slice.when_known(
            &name,
            Box::new(move |slice| {
                let then: super::slice::Then = Box::new(move |_, result| {
                    written.borrow_mut().push((user, add, result.is_ok()));
                });
                let known = !matches!(slice.users.peek(&who), Some(Slot::Loading { .. }) | None);
                match add {
                    _ if !known => {}
                    true => {
                        let record = Record::new(&UserRecord::default());
                        slice.write(&who, Op::AddUser { record }, then);
                    }
                    false => register::remove_account(slice, &who, then),
                }
            }),
        );
    }

    fn ask_archive(&mut self, peer: usize) {
        let user = self.peers[peer].user;
        let query = ArchiveQuery {
            name: self.accounts[user].name.clone().into(),
            most: 1_000_000,
            ..ArchiveQuery::default()
        };
        self.read_archive(user, query);
    }

    fn read_archive(&mut self, user: usize, query: ArchiveQuery) {
        let (pages, asked) = (self.pages.clone(), query.clone());
        let then = Box::new(move |_: &mut Slice, page| {
            pages.borrow_mut().push((user, asked, page));
        });
        self.slice_of(user).read_archive(query, then);
    }

    // ---- what clients hear -----------------------------------------------------------------------------------------

    fn read(&mut self, peer: usize) -> bool {
        let inbox = std::mem::take(&mut self.peers[peer].inbox);
        let some = !inbox.is_empty();
        for xml in testing::elements(&inbox) {
            if xml.starts_with("</") {
                continue;
            }
            let element = super::parse_stanza(xml.as_bytes()).expect("a server writes XML");
            self.hear(peer, &element, &xml);
        }
        some
    }

    fn hear(&mut self, peer: usize, element: &Element, xml: &str) {
        let h = || element.get("h").unwrap().parse::<u32>().unwrap();
        match &*element.name {
            "message" | "presence" | "iq" => {
                if let Some(stream) = &mut self.peers[peer].stream
                    && !stream.previd.is_empty()
                {
                    stream.handled += 1;
                }
            }
            "enabled" => {
                let stream = self.peers[peer].stream.as_mut().unwrap();
                stream.previd = element.get("id").unwrap().to_owned();
            }
            "a" => {
                let h = h();
                self.note(format!("{} has {h} acknowledged", self.jid(peer)));
                self.accepted(peer, h, true);
                let queries = &mut self.peers[peer].stream.as_mut().unwrap().queries;
                while let Some((_, n)) = queries.pop_front_if(|(count, _)| *count <= h) {
                    assert!(
                        self.asked[n].answer.is_some(),
                        "q{n} is acknowledged before it is answered"
                    );
                }
            }
            "resumed" => {
                let h = h();
                let stream = self.peers[peer].stream.as_ref().unwrap();
                assert_eq!(h, stream.read, "{}: all was read", self.jid(peer));
                // answers follow
                let queries = &mut self.peers[peer].stream.as_mut().unwrap().queries;
                queries.retain(|(count, _)| *count > h);
                self.accepted(peer, h, false);
            }
            _ => {}
        }
        let id = element.get("id").unwrap_or_default().to_owned();
        let failed = element.get("type") == Some("error");
        match &*element.name {
            "message" if failed => {
                if let Some(n) = id.strip_prefix('m').and_then(|n| n.parse::<usize>().ok()) {
                    self.note(format!("{} hears that m{n} is refused", self.jid(peer)));
                    self.messages[n].refused = true;
                }
                if let Some(n) = id.strip_prefix('s').and_then(|n| n.parse::<usize>().ok()) {
                    self.note(format!("{} hears that s{n} is refused", self.jid(peer)));
                    self.said[n].refused = true;
                }
            }
            "message"
                if element
                    .get("from")
                    .is_some_and(|from| from.starts_with(ROOM)) =>
            {
                self.heard(peer, element);
            }
            "presence"
                if element
                    .get("from")
                    .is_some_and(|from| from.starts_with(ROOM)) =>
            {
                let x = element.find("x", super::room::NS_USER);
                let own = x.is_some_and(|x| x.elements().any(|s| s.get("code") == Some("110")));
                if own || failed {
                    self.peers[peer].inside = element.get("type").is_none();
                }
            }
            "message" => self.received(peer, element, xml),
            "iq" if element.get("type") == Some("result") || failed => {
                if let Some(n) = id.strip_prefix('q').and_then(|n| n.parse::<usize>().ok()) {
                    self.answered(peer, n, !failed);
                }
                if let Some(n) = id.strip_prefix('t').and_then(|n| n.parse::<usize>().ok()) {
                    self.note(format!("{} hears of s{n}: {}", self.jid(peer), !failed));
                    if !failed {
                        self.said[n].moderated = Some(true);
                        self.saw("moderated");
                    }
                }
            }
            "presence" if failed => {
                let of = |jid: &str| jid.split('@').next()?.strip_prefix("user")?.parse().ok();
                let other = element.get("from").and_then(of);
                let user = self.peers[peer].user;
                if let Some(one) = other.and_then(|o| self.subscribed.get_mut(&(user, o))) {
                    one.unsure = true;
                }
            }
            "presence" if element.get("type") == Some("subscribe") => {
                let from = element.get("from").unwrap();
                if !from.contains('/') && self.random.one_in(2) {
                    let to = from.to_owned();
                    self.stanza(peer, &format!("<presence type='subscribed' to='{to}'/>"));
                }
            }
            _ => {}
        }
    }

    /// `told`: errors that belong to it were heard before.
    fn accepted(&mut self, peer: usize, h: u32, told: bool) {
        let jid = self.jid(peer);
        let stream = self.peers[peer].stream.as_mut().unwrap();
        assert!(
            h >= stream.acked && h <= stream.sent,
            "{jid}: {h} after {}, of {}",
            stream.acked,
            stream.sent
        );
        stream.acked = h;
        while let Some((_, id)) = stream.messages.pop_front_if(|(count, _)| *count <= h) {
            if (SAID..usize::MAX / 2).contains(&id) {
                self.said[id - SAID].accepted = told;
                *self.seen.entry("accepted by the room").or_insert(0) += 1;
                continue;
            }
            if id > usize::MAX / 2 {
                let pair = usize::MAX - id;
                let pair = (pair / 100, pair % 100);
                if let Some(one) = self.subscribed.get_mut(&pair) {
                    one.accepted = true;
                }
                continue;
            }
            self.messages[id].accepted = true;
            *self.seen.entry("accepted").or_insert(0) += 1;
        }
    }

    fn received(&mut self, peer: usize, element: &Element, xml: &str) {
        let jid = self.jid(peer);
        let user = self.peers[peer].user;
        if element.find("sent", "urn:xmpp:carbons:2").is_some()
            || element.find("received", "urn:xmpp:carbons:2").is_some()
        {
            assert_eq!(element.get("to"), Some(&*jid), "a copy is for one session");
            return self.saw("carbon");
        }
        let Some(body) = element.find("body", super::NS_CLIENT) else {
            return;
        };
        let id: usize = body.text_content()[1..].parse().unwrap();
        let stable = element.find("stanza-id", "urn:xmpp:sid:0");
        let stable = stable.and_then(|s| s.get("id")).map(str::to_owned);
        self.note(format!("{jid} gets m{id}"));
        let archives = self.archives(user, self.messages[id].at);
        let message = &mut self.messages[id];
        assert_eq!(message.to, user, "m{id} is not for {jid}: {xml}");
        if let Some(archives) = archives {
            let wanted = message.archived && archives;
            assert_eq!(wanted, stable.is_some(), "m{id}: {xml}");
        }
        let first = !std::mem::replace(&mut message.received, true);
        match (&message.stable_id, stable) {
            (Some(old), Some(new)) => assert_eq!(*old, new, "m{id} has got another stable id"),
            (None, stable) => message.stable_id = stable,
            _ => {}
        }
        let (from, to, full, pending) = (message.peer, message.to, message.full, message.pending);
        self.saw(match first {
            true => "received",
            false => "received again",
        });
        // who has several clients may get one message here and the next one there
        if !first || !pending || self.accounts[user].peers > 1 {
            return;
        }
        let delayed = element.find("delay", "urn:xmpp:delay").is_some();
        let last = self.order.entry((from, to, full)).or_insert(0);
        assert!(
            id >= *last || (full && delayed),
            "m{id} came after m{last}, which was sent later"
        );
        *last = (*last).max(id);
    }

    fn answered(&mut self, peer: usize, n: usize, done: bool) {
        let asked = &mut self.asked[n];
        asked.answer = Some(done);
        let (user, what, at) = (asked.user, asked.what.clone(), asked.at);
        self.note(format!("{} hears of q{n} {what:?}: {done}", self.jid(peer)));
        if done {
            self.saw("changes accepted");
        }
        // changes are made in the order in which they were asked for
        if let What::Put(key, value) = &what
            && key == "archiving"
        {
            let later =
                |one: &Asked| one.user == user && matches!(&one.what, What::Put(k, _) if k == key);
            let last = !self.asked[n + 1..].iter().any(later);
            let certain = (done && last).then_some(value == "always");
            let now = self.now;
            self.accounts[user].archiving.push((now, certain));
        }
        // an unblocking that no later block can have undone
        if let (What::Unblock(other), true) = (&what, done) {
            let later = self
                .asked
                .iter()
                .any(|one| one.user == user && one.at >= at && one.what == What::Block(*other));
            if !later {
                let now = self.now;
                self.accounts[user].clear.insert(*other, Some(now));
            }
        }
    }
}

// ---- the end -----------------------------------------------------------------------------------------------------

impl Simulation {
    fn finale(&mut self) {
        self.note("the end");
        self.last = true;
        self.away = false;
        self.crash();
        self.now += 1;
        for _ in 0..3 {
            self.rest();
            self.advance(2_000);
        }
        let users = self.accounts.len();
        let last: Vec<usize> = (0..users)
            .map(|user| self.peer(user, "last".into()))
            .collect();
        for peer in &last {
            self.peers[*peer].managed = true;
            self.peers[*peer].wants = Some(Wants::Login);
            self.try_in(*peer);
        }
        self.rest();
        self.advance(2_000);
        self.rest();
        for (user, peer) in last.into_iter().enumerate() {
            let account = &self.accounts[user];
            if account.since.is_some() {
                assert!(self.peers[peer].link.is_some(), "user{user} is in");
                self.check_archive(user);
                self.check_changes(user);
            }
        }
        for id in 0..self.messages.len() {
            let message = &self.messages[id];
            if message.accepted && message.pending && self.binds(message) {
                assert!(message.received, "m{id} was accepted, nobody has got it");
            }
        }
        self.check_subscriptions();
        self.check_room();
    }

    /// What was accepted, and what somebody has heard, is in the room's archive, once and in each speaker's order; what was taken
    /// back is a tombstone.
    fn check_room(&mut self) {
        let (mut after, mut spoken, mut last) = (None, BTreeMap::new(), BTreeMap::new());
        let mut buried = BTreeSet::new();
        loop {
            let query = ArchiveQuery {
                name: "desk@rooms".into(),
                most: 7,
                after,
                ..ArchiveQuery::default()
            };
            for entry in self.room_page(query) {
                assert!(after.is_none_or(|after| after < entry.id), "positions grow");
                after = Some(entry.id);
                let stanza = super::parse_stanza(&entry.stanza).unwrap();
                let stable = super::feature::stable_id::shown(entry.id, [1, 2]);
                if stanza
                    .find("retracted", super::feature::retract::NS)
                    .is_some()
                {
                    buried.insert(stable);
                } else if let Some(body) = stanza.find("body", super::NS_CLIENT) {
                    let n: usize = body.text_content()[1..].parse().unwrap();
                    assert!(spoken.insert(n, stable).is_none(), "s{n} is there twice");
                    let last = last.entry(self.said[n].peer).or_insert(n);
                    assert!(*last <= n, "s{n} stands behind s{last}");
                    *last = n;
                }
            }
            if self.room_is_read {
                break;
            }
        }
        for (n, said) in self.said.iter().enumerate() {
            let hidden = said
                .stable_id
                .as_ref()
                .is_some_and(|id| buried.contains(id));
            let owed = said.received || (said.inside && said.accepted && !said.refused);
            // a tombstone does not say what it was
            let asked = said.moderated.is_some();
            assert!(
                !owed || asked || spoken.contains_key(&n),
                "s{n} is not in the room's archive"
            );
            match said.moderated {
                Some(true) => assert!(hidden, "s{n} was taken back and is shown"),
                Some(false) => assert!(
                    hidden || spoken.contains_key(&n),
                    "s{n} is neither there nor taken back"
                ),
                None => assert!(!hidden, "nobody has taken s{n} back"),
            }
        }
    }

    fn room_page(&mut self, query: ArchiveQuery) -> Vec<crate::store::tier::Entry> {
        let (pages, asked) = (self.pages.clone(), query.clone());
        self.world.slice_of("desk@rooms").read_archive(
            query,
            Box::new(move |_, page| pages.borrow_mut().push((0, asked, page))),
        );
        for _ in 0..1000 {
            for shard in 0..self.world.slices.len() {
                self.flush_requests(shard);
            }
            self.ask_tier();
            self.give_answer();
            let page = self.pages.borrow_mut().pop();
            if let Some((_, _, page)) = page {
                let page = page.expect("the tier is sound");
                self.room_is_read = page.complete;
                return page.entries;
            }
        }
        panic!("the room's archive is not answered");
    }

    /// Must the recipient have the message?
    fn binds(&self, message: &Sent) -> bool {
        let there = |user: usize, since: u64| {
            let since_when = self.accounts[user].since;
            since_when.is_some_and(|when| when < since || when == 0)
        };
        let clear = |user: usize, other: usize| match self.accounts[user].clear.get(&other) {
            None => true,
            Some(since) => since.is_some_and(|when| when < message.at),
        };
        let settled = !message.refused && !message.unsure;
        settled
            && there(message.to, message.at)
            && there(message.from, message.at)
            && clear(message.to, message.from)
            && clear(message.from, message.to)
    }

    /// Does the user want what is sent at this moment, or a little later, in his archive? `None`: he has changed his mind since, or
    /// it is not known.
    fn archives(&self, user: usize, at: u64) -> Option<bool> {
        let account = &self.accounts[user];
        let mut state = Some(true);
        for (when, archives) in &account.archiving {
            if *when >= at || account.since != Some(0) {
                return None;
            }
            state = *archives;
        }
        state
    }

    fn check_archive(&mut self, user: usize) {
        let name = self.accounts[user].name.clone();
        let mut bodies: Vec<usize> = Vec::new();
        let mut buried: BTreeSet<usize> = BTreeSet::new();
        let (mut after, mut last_id) = (None, 0);
        let mut ids = BTreeSet::new();
        loop {
            let query = ArchiveQuery {
                name: name.clone().into(),
                most: 7,
                after,
                ..ArchiveQuery::default()
            };
            self.read_archive(user, query);
            let page = 'page: {
                for _ in 0..1000 {
                    for shard in 0..self.world.slices.len() {
                        self.flush_requests(shard);
                    }
                    self.ask_tier();
                    self.give_answer();
                    let mut pages = self.pages.borrow_mut();
                    if let Some((_, _, page)) = pages.pop() {
                        break 'page page.expect("the tier is sound");
                    }
                }
                panic!("an archive is not answered");
            };
            for entry in &page.entries {
                assert!(entry.id > last_id, "positions grow");
                last_id = entry.id;
                ids.insert(entry.id);
                let stanza = super::parse_stanza(&entry.stanza).unwrap();
                let id = stanza.get("id").unwrap()[1..].parse().unwrap();
                bodies.push(id);
                if stanza
                    .find("retracted", "urn:xmpp:message-retract:1")
                    .is_some()
                {
                    buried.insert(id);
                }
                let body = stanza.find("body", super::NS_CLIENT);
                assert_eq!(body.is_none(), buried.contains(&id), "m{id}");
            }
            if page.complete {
                break;
            }
            after = page.entries.last().map(|entry| entry.id);
        }
        let once: BTreeSet<usize> = bodies.iter().copied().collect();
        assert_eq!(once.len(), bodies.len(), "user{user}: once: {bodies:?}");
        let seen = &self.accounts[user].archive;
        let vanished: Vec<_> = seen.difference(&ids).collect();
        assert!(
            vanished.is_empty(),
            "user{user}: {vanished:x?} were in the archive"
        );
        let meant = once.iter().filter_map(|id| self.messages[*id].retracts);
        let meant: BTreeSet<usize> = meant.filter(|id| once.contains(id)).collect();
        let shown: Vec<_> = meant.difference(&buried).collect();
        assert!(shown.is_empty(), "user{user}: {shown:?} were retracted");
        for id in buried.difference(&meant) {
            // a retraction hides also in the archive of somebody who did not want to keep it
            let by = self
                .messages
                .iter()
                .any(|m| m.retracts == Some(*id) && self.archives(user, m.at) != Some(true));
            assert!(by, "user{user}: nobody retracts m{id}");
        }
        *self.seen.entry("retracted").or_insert(0) += buried.len() as u64;
        // what one client sent stands in the order in which it sent it
        let mut last = BTreeMap::new();
        for id in &bodies {
            let message = &self.messages[*id];
            let last = last.entry((message.peer, message.to)).or_insert(0);
            assert!(*last <= *id, "user{user}: m{id} stands behind m{last}");
            *last = *id;
        }
        for (id, message) in self.messages.iter().enumerate() {
            let own = message.from == user || message.to == user;
            let owed = (message.accepted && self.binds(message))
                || (message.received
                    && message.to == user
                    && self.accounts[user]
                        .since
                        .is_some_and(|s| s < message.at || s == 0));
            let wants = self.archives(user, message.at);
            if own && message.archived && wants == Some(false) {
                assert!(!once.contains(&id), "m{id} is in the archive of user{user}");
                *self.seen.entry("kept out of an archive").or_insert(0) += 1;
            }
            if own && message.archived && owed && wants == Some(true) {
                assert!(
                    once.contains(&id),
                    "m{id} is not in the archive of user{user}"
                );
            }
        }
    }

    fn check_changes(&mut self, user: usize) {
        let name = self.accounts[user].name.clone();
        let since = self.accounts[user].since.unwrap();
        let record = self.world.user(&name).record.to_owned();
        let card = self.world.tier.users[&*name]
            .documents
            .get("vcard")
            .cloned();
        // by key: the last one that was accepted, and all that were asked for later
        let mut allowed: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut must: BTreeSet<&str> = BTreeSet::new();
        for asked in self
            .asked
            .iter()
            .filter(|a| a.user == user && a.at >= since)
        {
            let What::Put(key, value) = &asked.what else {
                continue;
            };
            let values = allowed.entry(key).or_default();
            match asked.answer {
                Some(true) => {
                    *values = vec![value];
                    must.insert(key);
                }
                Some(false) => {}
                None => values.push(value),
            }
        }
        for (key, values) in allowed {
            let is = |value: &str| match key {
                "vcard" => card.as_ref().is_some_and(|card| {
                    String::from_utf8_lossy(card).contains(&format!(">{value}<"))
                }),
                "password" => record.sha256.as_ref().is_some_and(|keys| {
                    let hash = super::sasl::Hash::Sha256;
                    let derived = super::sasl::derive(hash, value, &keys.salt, keys.iterations);
                    derived.is_ok_and(|derived| derived.stored_key == keys.stored_key)
                }),
                "archiving" => {
                    let archiving = record.archiving.as_ref();
                    let never = archiving.is_some_and(|a| a.default == ArchiveDefault::Never);
                    never == (value == "never")
                }
                item => {
                    let contact = format!("{}@localhost", item.strip_prefix("item ").unwrap());
                    let item = record.roster.iter().find(|item| item.jid == contact);
                    item.is_some_and(|item| item.name == value)
                }
            };
            assert!(
                !must.contains(key) || values.iter().any(|value| is(value)),
                "{name}: {key} must be one of {values:?}"
            );
        }
        for (other, clear) in &self.accounts[user].clear {
            let jid = format!("user{other}@localhost");
            let wanted = self.asked.iter().rfind(|a| {
                a.user == user
                    && a.answer != Some(false)
                    && matches!(&a.what, What::Block(o) | What::Unblock(o) if o == other)
            });
            if let Some(wanted) = wanted.filter(|wanted| wanted.answer == Some(true)) {
                let blocked = matches!(wanted.what, What::Block(_));
                assert_eq!(
                    record.blocked.contains(&jid),
                    blocked,
                    "{name} and {jid}: {clear:?}"
                );
            }
        }
    }

    /// Both sides of a subscription agree.
    fn check_subscriptions(&mut self) {
        let ever_blocked = |account: &Account, other: usize| account.clear.contains_key(&other);
        for ((from, to), asked) in &self.subscribed {
            let Subscribed {
                at,
                accepted,
                unsure,
            } = asked;
            let steady = |user: usize| self.accounts[user].since == Some(0);
            if !steady(*from)
                || !steady(*to)
                || ever_blocked(&self.accounts[*from], *to)
                || ever_blocked(&self.accounts[*to], *from)
            {
                continue;
            }
            let (a, b) = (&self.accounts[*from].name, &self.accounts[*to].name);
            let own = &self.world.tier.users[&**a].record;
            let others = &self.world.tier.users[&**b].record;
            let jid = |name: &str| format!("{name}@localhost");
            let item = own.roster.iter().find(|item| item.jid == jid(b));
            let other = others.roster.iter().find(|item| item.jid == jid(a));
            let (subscribes, asks) = item.map_or((false, false), |i| (i.subscription.to(), i.ask));
            let granted = other.is_some_and(|item| item.subscription.from());
            let waits = others.requests.iter().any(|request| request.jid == jid(a));
            let told = format!(
                "{a} to {b} at {at}, accepted: {accepted}; {subscribes} {asks}, {granted} {waits}"
            );
            assert_eq!(subscribes, granted, "{told}");
            assert_eq!(asks, waits, "{told}");
            assert!(!accepted || *unsure || subscribes || asks, "{told}");
        }
    }
}
