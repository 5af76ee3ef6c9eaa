//! One thread of the generator: one poll, the clients that belong to it, and what it has been told to do with them.
//!
//! In: [`Command`]s from the [`fleet`](crate::fleet) and readiness of sockets. Out: [`Answer`]s and counters. All that
//! one turn of the loop has for one socket leaves with one write. A client's place in the poll and in all tables is
//! its slot; a user always belongs to the same worker, and the two users of a pair to the same one.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::archive::Ask;
use crate::chat::{self, Engine, Output, Outputs};
use crate::connection::{Account, Connection, Effect, Purpose};
use crate::element::escape;
use crate::options::{Mechanism, Target, TlsMode};
use crate::register::contacts;
use crate::replay::Curve;
use crate::report::{self, Failures, Histogram};
use crate::scanner::Scanner;
use crate::scram::KeyCache;
use crate::socket::{Socket, Tls};
use crate::timeline::{Kind, Recorder};
use crate::websocket::Read as Framed;

pub const WAKE: Token = Token(usize::MAX - 1);
const TIMER: Token = Token(usize::MAX - 2);
const READ_BUFFER: usize = 128 * 1024;
const EVENTS_PER_TURN: usize = 1024;
/// A job that is begun again and again must not keep the loop, should each end at once (a connect that is refused, say).
const BEGUN_PER_TURN_MAX: usize = 1024;
/// How often deadlines are looked at when nothing happens.
const IDLE_TURN: Duration = Duration::from_millis(100);
/// An idle client keeps no buffer larger than this.
const IDLE_BUFFER_MAX: usize = 4096;

pub enum Command {
    Run(Run),
    /// Nothing more is begun.
    StopRun,
    /// All connections are gone at once, without a goodbye.
    Cut,
    /// The second one of each pair reads no more.
    StopReading,
    Chat(chat::Plan),
    /// Another part of the chat begins.
    ChatPhase(Instant),
    /// No more is sent.
    StopChat,
    /// Everyone is on line: the chat may end when all is there.
    Collect,
}

/// Do one thing with each of some users.
#[derive(Clone)]
pub struct Run {
    pub job: Job,
    pub users: Vec<u32>,
    pub pace: Pace,
    /// With the first user again after the last one, until it is stopped: a user leaves half a round before he is due again.
    pub again: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    Login,
    /// Come back into the session that was cut.
    Resume,
    Logout,
    /// A log-out that nobody waits for: part of logging in again and again.
    Leave,
    Register,
    /// Subscribe to the nearest contacts in the ring of all users.
    Befriend {
        users: u32,
        contacts: u32,
    },
    /// Something about the user's archive.
    Ask(Ask),
}

impl Job {
    /// As what its latency is shown over time.
    fn kind(self) -> Option<Kind> {
        match self {
            Job::Login => Some(Kind::Login),
            Job::Resume => Some(Kind::Resumption),
            Job::Logout => Some(Kind::Logout),
            Job::Register => Some(Kind::Registration),
            Job::Ask(Ask::Fill { .. }) => None,
            Job::Ask(_) => Some(Kind::Page),
            Job::Leave | Job::Befriend { .. } => None,
        }
    }
}

#[derive(Clone, Debug)]
pub enum Pace {
    /// So many in progress.
    Parallel(usize),
    /// So many per second from `start` on, however many are in progress.
    Rate { start: Instant, per_second: f64 },
    /// By an arrival curve from `start` on; of each `step` of its arrivals the one at `offset` is this worker's.
    Curve {
        start: Instant,
        curve: Arc<Curve>,
        step: u64,
        offset: u64,
    },
}

impl Pace {
    /// When the n-th (from 0) is due; `None`: as soon as there is room.
    fn due(&self, number: u64) -> Option<Instant> {
        match self {
            Pace::Parallel(_) => None,
            Pace::Rate { start, per_second } => {
                Some(*start + Duration::from_secs_f64(number as f64 / per_second))
            }
            Pace::Curve {
                start,
                curve,
                step,
                offset,
            } => Some(*start + curve.due(number * step + offset)?),
        }
    }

    /// An arrival curve comes to its end by itself.
    fn is_over(&self, number: u64) -> bool {
        matches!(self, Pace::Curve { .. }) && self.due(number).is_none()
    }
}

pub enum Answer {
    Run(Outcome),
    Cut,
    Chat(chat::Outcome),
}

/// What came of a [`Run`].
pub struct Outcome {
    pub done: u64,
    /// Of the done ones, the accounts that were there before.
    pub existed: u64,
    /// Of the done ones, those in the session that was cut.
    pub resumed: u64,
    pub failures: Failures,
    pub latencies: Histogram,
    /// Times that SCRAM keys had to be derived.
    pub derivations: u64,
    /// How long the turns of the generator's loop were: what arrives meanwhile waits for so long.
    pub turns: Histogram,
}

/// Totals that the fleet reads while the worker works.
#[derive(Default)]
pub struct Counters {
    pub done: AtomicU64,
    pub failed: AtomicU64,
    pub bytes_in: AtomicU64,
    pub presences: AtomicU64,
    /// Chat messages that have reached whom they can reach, of all chats.
    pub settled: AtomicU64,
    pub disconnected: AtomicU64,
}

/// Which worker and slot a user has.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub users: u32,
    pub threads: u32,
    /// Accounts that the users are spread over, and the number of the first one.
    pub accounts: u32,
    pub first: u32,
}

impl Layout {
    pub fn worker(self, user: u32) -> usize {
        (user / 2 % self.threads) as usize
    }

    /// The number in the name of a user's account.
    fn account(self, user: u32) -> u64 {
        let spread = u64::from(user) * u64::from(self.accounts) / u64::from(self.users);
        u64::from(self.first) + spread
    }

    fn slot(self, user: u32) -> usize {
        (user / 2 / self.threads * 2 + user % 2) as usize
    }

    fn user(self, worker: usize, slot: usize) -> u32 {
        (slot as u32 / 2 * self.threads + worker as u32) * 2 + slot as u32 % 2
    }

    fn users_of(self, worker: usize) -> impl Iterator<Item = u32> {
        (0..)
            .map(move |slot| self.user(worker, slot))
            .take_while(move |user| *user < self.users)
    }
}

struct Client {
    socket: Socket,
    connection: Connection,
    scanner: Scanner,
    /// Bytes of an unfinished stanza.
    rest: Vec<u8>,
    /// What is being done with it, since when (or since when it was due).
    job: Option<(Job, Instant)>,
    dirty: bool,
}

/// Where clients live, and which of them have something to write.
struct Clients {
    slots: Vec<Option<Box<Client>>>,
    dirty: Vec<usize>,
}

struct Running {
    job: Job,
    users: Vec<u32>,
    /// The next one of them.
    next: usize,
    again: bool,
    pace: Pace,
    begun: u64,
    in_progress: usize,
    deadlines: VecDeque<(Instant, usize, Instant)>,
    outcome: Outcome,
}

impl Running {
    fn has_more(&self) -> bool {
        self.next < self.users.len()
    }

    fn advance(&mut self) {
        self.next += 1;
        if self.again && self.next == self.users.len() {
            self.next = 0;
        }
    }

    /// Who leaves now, so that half of the users are on line once all have been.
    fn leaving(&self) -> Option<u32> {
        let half = self.users.len() / 2;
        self.again
            .then(|| self.users[(self.next + half) % self.users.len()])
    }

    /// Takes the next user out whom `is_free`; nobody, when all are occupied.
    fn take_next(&mut self, is_free: impl Fn(u32) -> bool) -> Option<u32> {
        let tries = if self.again { self.users.len() } else { 1 };
        for _ in 0..tries {
            let user = *self.users.get(self.next)?;
            if !self.again || is_free(user) {
                return Some(user);
            }
            self.advance();
        }
        None
    }
}

/// Why a client goes.
enum End {
    /// Its job is done with it.
    Finished,
    Failed(String),
}

pub struct Worker {
    number: usize,
    layout: Layout,
    target: Arc<Target>,
    tls: Tls,
    poll: Poll,
    timer: std::os::fd::OwnedFd,
    commands: Receiver<Command>,
    answers: Sender<Answer>,
    counters: Arc<Counters>,
    accounts: Vec<Account>,
    clients: Clients,
    running: Option<Running>,
    chat: Option<Engine>,
    /// Of the chats before.
    settled: u64,
    bytes_in: u64,
    presences: u64,
    disconnections: Arc<std::sync::Mutex<Failures>>,
    recorder: Recorder,
    second_ones_read: bool,
    read_buffer: Vec<u8>,
    plain_buffer: Vec<u8>,
}

/// What a worker is made from.
pub struct Parts {
    pub number: usize,
    pub layout: Layout,
    pub prefix: String,
    /// Lines of known keys, by name of the account.
    pub keys: Arc<HashMap<String, String>>,
    pub target: Arc<Target>,
    pub tls: Tls,
    pub poll: Poll,
    pub commands: Receiver<Command>,
    pub answers: Sender<Answer>,
    pub counters: Arc<Counters>,
    pub disconnections: Arc<std::sync::Mutex<Failures>>,
    pub recorder: Recorder,
}

impl Outputs for Clients {
    fn output(&mut self, slot: usize) -> Option<Output<'_>> {
        let client = self.slots[slot]
            .as_mut()
            .filter(|client| client.connection.is_online())?;
        if !client.dirty {
            client.dirty = true;
            self.dirty.push(slot);
        }
        Some(Output {
            bytes: &mut client.connection.out,
            stanzas: &mut client.connection.sent,
        })
    }
}

impl Clients {
    fn is_logging_in(&self, slot: usize) -> bool {
        let job = self.slots[slot].as_ref().and_then(|client| client.job);
        matches!(job, Some((Job::Login | Job::Resume, _)))
    }
}

impl Outcome {
    pub fn new() -> Outcome {
        Outcome {
            done: 0,
            existed: 0,
            resumed: 0,
            failures: Failures::new(),
            latencies: report::histogram(),
            derivations: 0,
            turns: report::histogram(),
        }
    }

    /// The same job of another worker.
    pub fn add(&mut self, other: Outcome) {
        self.done += other.done;
        self.existed += other.existed;
        self.resumed += other.resumed;
        self.derivations += other.derivations;
        for (own, other) in [
            (&mut self.latencies, &other.latencies),
            (&mut self.turns, &other.turns),
        ] {
            own.add(other).expect("histograms have the same bounds");
        }
        for (reason, count) in other.failures {
            *self.failures.entry(reason).or_default() += count;
        }
    }
}

impl Worker {
    pub fn new(parts: Parts) -> io::Result<Worker> {
        let keys = |name: &String| {
            parts
                .keys
                .get(name)
                .and_then(|line| KeyCache::from_line(line))
        };
        let accounts: Vec<_> = parts
            .layout
            .users_of(parts.number)
            .map(|user| format!("{}{}", parts.prefix, parts.layout.account(user)))
            .map(|name| Account {
                keys: keys(&name).unwrap_or_default(),
                name,
                resumption: None,
                token: None,
            })
            .collect();
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        parts.poll.registry().register(
            &mut SourceFd(&timer.as_raw_fd()),
            TIMER,
            Interest::READABLE,
        )?;
        Ok(Worker {
            number: parts.number,
            layout: parts.layout,
            target: parts.target,
            tls: parts.tls,
            poll: parts.poll,
            timer,
            commands: parts.commands,
            answers: parts.answers,
            counters: parts.counters,
            clients: Clients {
                slots: accounts.iter().map(|_| None).collect(),
                dirty: Vec::new(),
            },
            accounts,
            running: None,
            chat: None,
            settled: 0,
            bytes_in: 0,
            presences: 0,
            disconnections: parts.disconnections,
            recorder: parts.recorder,
            second_ones_read: true,
            read_buffer: vec![0; READ_BUFFER],
            plain_buffer: Vec::new(),
        })
    }

    /// Until the fleet lets go of it; then it gives the accounts back.
    pub fn run(mut self) -> io::Result<Vec<Account>> {
        let mut events = Events::with_capacity(EVENTS_PER_TURN);
        loop {
            self.arm_timer()?;
            match self.poll.poll(&mut events, Some(IDLE_TURN)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                outcome => outcome?,
            }
            let turn = Instant::now();
            for event in &events {
                match event.token() {
                    WAKE => {}
                    TIMER => {
                        // Reading re-arms the edge; nothing to read is no harm.
                        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
                    }
                    Token(slot) => self.on_ready(slot, event),
                }
            }
            if !self.take_commands() {
                return Ok(self.accounts);
            }
            self.begin_jobs();
            if let Some(chat) = &mut self.chat {
                chat.turn(Instant::now(), &mut self.clients);
            }
            self.flush_dirty();
            let now = Instant::now();
            if let Some(chat) = self.chat.as_mut().filter(|chat| chat.has_unflushed()) {
                chat.flushed(now, &mut self.recorder);
            }
            if let Some(running) = &mut self.running {
                let turn_ns = (now - turn).as_nanos() as u64;
                running.outcome.turns.saturating_record(turn_ns.max(1));
            }
            self.recorder.turn(now);
            self.check_deadlines();
            self.publish();
            self.answer();
        }
    }

    /// The poll's own timeout counts in milliseconds, too coarse for due times.
    fn arm_timer(&mut self) -> io::Result<()> {
        let job = self.running.as_ref().filter(|running| running.has_more());
        let job = job.and_then(|running| running.pace.due(running.begun));
        let chat = self.chat.as_ref().and_then(Engine::next_due);
        let Some(due) = job.into_iter().chain(chat).min() else {
            return Ok(());
        };
        let wait = due
            .saturating_duration_since(Instant::now())
            .max(Duration::from_nanos(1));
        let value = Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: wait.subsec_nanos().into(),
        };
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }

    fn take_commands(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Run(run)) => {
                    let derivations = self.derivations();
                    self.running = Some(Running {
                        job: run.job,
                        again: run.again && !run.users.is_empty(),
                        users: run.users,
                        next: 0,
                        pace: run.pace,
                        begun: 0,
                        in_progress: 0,
                        deadlines: VecDeque::new(),
                        outcome: Outcome {
                            derivations,
                            ..Outcome::new()
                        },
                    });
                }
                Ok(Command::Chat(plan)) => {
                    self.chat = Some(Engine::new(plan, self.number, &self.target, &self.accounts));
                }
                Ok(Command::StopRun) => self
                    .running
                    .iter_mut()
                    .for_each(|running| running.next = usize::MAX),
                Ok(Command::Cut) => self.cut(),
                Ok(Command::StopReading) => self.second_ones_read = false,
                Ok(Command::ChatPhase(start)) => self
                    .chat
                    .iter_mut()
                    .for_each(|chat| chat.begin_phase(start)),
                Ok(Command::StopChat) => self
                    .chat
                    .iter_mut()
                    .for_each(|chat| chat.stop_sending(Instant::now())),
                Ok(Command::Collect) => self
                    .chat
                    .iter_mut()
                    .for_each(|chat| chat.collect(Instant::now())),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Resets every connection, as when a switch forgets them; who was on line may resume his session later.
    fn cut(&mut self) {
        for (client, account) in self.clients.slots.iter_mut().zip(&mut self.accounts) {
            if let Some(client) = client.take() {
                account.resumption = client.connection.resumption();
                client.socket.reset();
            }
        }
        let _ = self.answers.send(Answer::Cut);
    }

    fn derivations(&self) -> u64 {
        self.accounts
            .iter()
            .map(|account| account.keys.derivations)
            .sum()
    }

    fn begin_jobs(&mut self) {
        for _ in 0..BEGUN_PER_TURN_MAX {
            let Some(running) = &mut self.running else {
                return;
            };
            let due = running.pace.due(running.begun);
            let now = Instant::now();
            let ready = match running.pace {
                Pace::Parallel(most) => running.in_progress < most,
                Pace::Rate { .. } | Pace::Curve { .. } => due.is_some_and(|due| due <= now),
            };
            if running.pace.is_over(running.begun) {
                running.next = usize::MAX;
            }
            if !ready {
                return;
            }
            let (clients, layout) = (&self.clients, self.layout);
            let is_free = |user| !clients.is_logging_in(layout.slot(user));
            let Some(user) = running.take_next(is_free) else {
                if !running.has_more() || due.is_none() {
                    return;
                }
                // open loop: a login that cannot even begin has failed
                running.begun += 1;
                running.in_progress += 1;
                let reason = "all users were still logging in when a login was due";
                self.job_ends(Err(reason.into()), now);
                continue;
            };
            let leaving = running.leaving();
            running.advance();
            let (job, since) = (running.job, due.unwrap_or(now));
            let slot = self.layout.slot(user);
            running.begun += 1;
            running.in_progress += 1;
            running
                .deadlines
                .push_back((now + self.target.login_timeout, slot, since));
            self.begin(job, user, slot, since);
            if let Some(user) = leaving {
                self.leave(self.layout.slot(user));
            }
        }
    }

    fn leave(&mut self, slot: usize) {
        if let Some(client) = &mut self.clients.slots[slot]
            && client.job.is_none()
            && client.connection.is_online()
        {
            client.job = Some((Job::Leave, Instant::now()));
            client.connection.close();
            self.mark_dirty(slot);
        }
    }

    fn begin(&mut self, job: Job, user: u32, slot: usize, since: Instant) {
        match (job, &mut self.clients.slots[slot]) {
            (Job::Login | Job::Resume | Job::Register, existing) => {
                *existing = None;
                let purpose = match job {
                    Job::Register => Purpose::Register,
                    Job::Resume => Purpose::Resume,
                    _ => Purpose::Login,
                };
                match self.connect(purpose, user, slot) {
                    Ok(mut client) => {
                        client.job = Some((job, since));
                        self.clients.slots[slot] = Some(client);
                    }
                    Err(error) => self.job_ends(Err(format!("connect: {error}")), since),
                }
            }
            (Job::Leave, _) => self.leave(slot),
            (Job::Logout, None) => self.job_ends(Ok(false), since),
            (Job::Befriend { .. } | Job::Ask(_), None) => {
                self.job_ends(Err("the user is not online".into()), since)
            }
            (Job::Ask(ask), Some(client)) => {
                let peer = self.layout.account(user ^ 1);
                let name = &self.accounts[slot].name;
                let own = self.layout.account(user).to_string();
                let prefix = &name[..name.len() - own.len()];
                let peer = format!("{prefix}{peer}@{}", self.target.domain);
                let connection = &mut client.connection;
                let stanzas = ask.write(&mut connection.archive, &peer, &mut connection.out);
                connection.sent = connection.sent.wrapping_add(stanzas);
                match stanzas {
                    0 => self.job_skipped(),
                    _ => client.job = Some((job, since)),
                }
                self.mark_dirty(slot);
            }
            (Job::Logout, Some(client)) => {
                client.job = Some((job, since));
                client.connection.close();
                self.mark_dirty(slot);
            }
            (
                Job::Befriend {
                    users,
                    contacts: count,
                },
                Some(client),
            ) => {
                client.job = Some((job, since));
                for contact in contacts(user, users, count) {
                    let name = &self.accounts[slot].name;
                    let prefix = &name[..name.len() - user.to_string().len()];
                    let jid = format!("{prefix}{contact}@{}", self.target.domain);
                    if !client.connection.contacts.contains(&jid) {
                        let subscribe =
                            format!("<presence type='subscribe' to='{}'/>", escape(&jid));
                        client
                            .connection
                            .out
                            .extend_from_slice(subscribe.as_bytes());
                    }
                }
                if client.connection.contacts.len() >= count as usize {
                    client.job = None;
                    self.job_ends(Ok(false), since);
                }
                self.mark_dirty(slot);
            }
        }
    }

    fn connect(&mut self, purpose: Purpose, user: u32, slot: usize) -> io::Result<Box<Client>> {
        let mut socket = Socket::connect(&self.target, user)?;
        if self.target.tls == TlsMode::Direct {
            socket.start_tls(&self.tls).map_err(io::Error::other)?;
        }
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .register(&mut socket.stream, Token(slot), interest)?;
        let mut connection = Connection::new(purpose, &self.target);
        connection.begin(&self.target, &mut self.accounts[slot]);
        Ok(Box::new(Client {
            socket,
            connection,
            scanner: Scanner::default(),
            rest: Vec::new(),
            job: None,
            dirty: false,
        }))
    }

    fn mark_dirty(&mut self, slot: usize) {
        if let Some(client) = &mut self.clients.slots[slot]
            && !client.dirty
        {
            client.dirty = true;
            self.clients.dirty.push(slot);
        }
    }

    fn on_ready(&mut self, slot: usize, event: &Event) {
        // Taken out of its slot, so that a message may write to its neighbour.
        let Some(mut client) = self.clients.slots[slot].take() else {
            return;
        };
        if event.is_writable() {
            // Also finds out what became of the connect.
            if let Err(error) = client.socket.flush(&mut client.connection.out) {
                return self.end(client, End::Failed(error.to_string()));
            }
        }
        if !self.second_ones_read && slot % 2 == 1 {
            if event.is_read_closed() || event.is_error() {
                let reason = "the server cut one who did not read";
                return self.end(client, End::Failed(reason.into()));
            }
        } else if event.is_readable() || event.is_read_closed() {
            if let Err(end) = self.read(slot, &mut client, event.is_read_closed()) {
                return self.end(client, end);
            }
            let waiting = !client.connection.out.is_empty() || client.socket.wants_write();
            if waiting && !client.dirty {
                client.dirty = true;
                self.clients.dirty.push(slot);
            }
        }
        self.clients.slots[slot] = Some(client);
    }

    fn read(&mut self, slot: usize, client: &mut Client, to_the_end: bool) -> Result<(), End> {
        let mut buffer = std::mem::take(&mut self.read_buffer);
        let outcome = self.read_into(slot, client, to_the_end, &mut buffer);
        self.read_buffer = buffer;
        outcome
    }

    fn read_into(
        &mut self,
        slot: usize,
        client: &mut Client,
        to_the_end: bool,
        buffer: &mut [u8],
    ) -> Result<(), End> {
        loop {
            let count = match client.socket.stream.read(buffer) {
                Ok(0) => return Err(closed()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(End::Failed(error.to_string())),
            };
            self.bytes_in += count as u64;
            if client.socket.is_tls() {
                let mut plain = std::mem::take(&mut self.plain_buffer);
                plain.clear();
                let open = client.socket.decrypt(&buffer[..count], &mut plain);
                if client.connection.exporter.is_none()
                    && matches!(self.target.mechanism, Mechanism::ScramPlus(_))
                {
                    client.connection.exporter = client.socket.exporter();
                }
                let outcome = self.consume(slot, client, &plain);
                self.plain_buffer = plain;
                outcome?;
                match open {
                    Ok(true) => {}
                    Ok(false) => return Err(closed()),
                    Err(error) => return Err(End::Failed(format!("TLS: {error}"))),
                }
            } else {
                self.consume(slot, client, &buffer[..count])?;
            }
            // A short read has emptied the socket: the next bytes make a new edge.
            if count < buffer.len() && !to_the_end {
                return Ok(());
            }
        }
    }

    /// Carries out what is in whole messages of WebSocket; returns how many bytes are done with.
    fn consume_messages(
        &mut self,
        slot: usize,
        client: &mut Client,
        bytes: &[u8],
    ) -> Result<usize, End> {
        let mut at = 0;
        while let Some(framing) = &mut client.socket.websocket {
            let read = framing
                .read(&bytes[at..])
                .map_err(|error| End::Failed(error.to_string()))?;
            let joined;
            let (message, end) = match read {
                Framed::Nothing => return Ok(at),
                Framed::Skip(end) => {
                    at += end;
                    continue;
                }
                Framed::Message { start, end } => (&bytes[at + start..at + end], end),
                Framed::Joined(end) => {
                    joined = std::mem::take(&mut framing.message);
                    (&joined[..], end)
                }
            };
            at += end;
            let account = &mut self.accounts[slot];
            let effect = client.connection.on_message(message, &self.target, account);
            self.presences += std::mem::take(&mut client.connection.presences);
            self.carry_out(slot, client, effect, message)?;
        }
        Ok(at)
    }

    fn consume(&mut self, slot: usize, client: &mut Client, fresh: &[u8]) -> Result<(), End> {
        let mut joined = std::mem::take(&mut client.rest);
        let bytes = if joined.is_empty() {
            fresh
        } else {
            joined.extend_from_slice(fresh);
            &joined
        };
        let mut at = 0;
        if client.socket.websocket.is_some() {
            at = self.consume_messages(slot, client, bytes)?;
        } else {
            while let Some(item) = client.scanner.next(&bytes[at..]) {
                let piece = &bytes[at + item.start..at + item.end];
                at += item.end;
                let effect = client.connection.on_piece(
                    item.kind,
                    piece,
                    &self.target,
                    &mut self.accounts[slot],
                );
                self.presences += std::mem::take(&mut client.connection.presences);
                self.carry_out(slot, client, effect, piece)?;
            }
            at += client.scanner.discard();
        }
        if at < bytes.len() {
            if joined.is_empty() {
                joined.extend_from_slice(&fresh[at..]);
            } else {
                joined.drain(..at);
            }
            client.rest = joined;
        }
        Ok(())
    }

    fn carry_out(
        &mut self,
        slot: usize,
        client: &mut Client,
        effect: Effect,
        piece: &[u8],
    ) -> Result<(), End> {
        match effect {
            Effect::None => {}
            Effect::Restart => client.scanner.restart(),
            Effect::StartTls => {
                client
                    .socket
                    .start_tls(&self.tls)
                    .map_err(|error| End::Failed(error.to_string()))?;
                client.scanner.restart();
                client
                    .connection
                    .begin(&self.target, &mut self.accounts[slot]);
            }
            Effect::Done | Effect::Exists | Effect::Resumed => {
                if let Some((job, since)) = client.job.take() {
                    if let (Effect::Resumed, Some(running)) = (&effect, &mut self.running) {
                        running.outcome.resumed += 1;
                    }
                    self.job_ends(Ok(matches!(effect, Effect::Exists)), since);
                    if job == Job::Register {
                        client.connection.close();
                        let _ = client.socket.flush(&mut client.connection.out);
                        return Err(End::Finished);
                    }
                }
            }
            Effect::Live => {
                if let Some((Job::Befriend { contacts, .. }, since)) = client.job
                    && client.connection.contacts.len() >= contacts as usize
                {
                    client.job = None;
                    self.job_ends(Ok(false), since);
                }
                if let Some((Job::Ask(ask), since)) = client.job
                    && let Some(outcome) = ask.read(&mut client.connection.archive, piece)
                {
                    client.job = None;
                    self.job_ends(outcome.map(|()| false), since);
                }
                if let Some(chat) = &mut self.chat {
                    let now = Instant::now();
                    if let Some(sender) = chat.on_message(slot, piece, now, &mut self.recorder)
                        && let Some(out) = self.clients.output(sender)
                    {
                        chat.send_next(sender, now, out);
                    }
                }
            }
            Effect::Acknowledged(count) => {
                if let Some(chat) = &mut self.chat {
                    let now = Instant::now();
                    for _ in 0..chat.on_acknowledged(slot, count, now, &mut self.recorder) {
                        let out = Output {
                            bytes: &mut client.connection.out,
                            stanzas: &mut client.connection.sent,
                        };
                        chat.send_next(slot, now, out);
                    }
                }
            }
            Effect::Ended => return Err(End::Finished),
            Effect::Failed(error) => return Err(End::Failed(error.to_string())),
        }
        Ok(())
    }

    /// A client is gone: for its job that is success or failure, without a job it is a lost connection.
    fn end(&mut self, client: Box<Client>, end: End) {
        match (client.job, end) {
            (Some((Job::Leave, _)), _) => {}
            (Some((Job::Logout, since)), _) => self.job_ends(Ok(false), since),
            (Some((_, since)), End::Failed(reason)) => self.job_ends(Err(reason), since),
            (Some((_, since)), End::Finished) => {
                self.job_ends(Err("the connection ended".into()), since)
            }
            (None, End::Finished) => {}
            (None, End::Failed(reason)) => {
                self.counters.disconnected.fetch_add(1, Ordering::Relaxed);
                let mut reasons = self
                    .disconnections
                    .lock()
                    .expect("nobody panics while holding it");
                *reasons
                    .entry(format!("connection lost: {reason}"))
                    .or_default() += 1;
            }
        }
    }

    /// There was nothing to do.
    fn job_skipped(&mut self) {
        if let Some(running) = &mut self.running {
            running.in_progress -= 1;
        }
    }

    fn job_ends(&mut self, outcome: Result<bool, String>, since: Instant) {
        let Some(running) = &mut self.running else {
            return;
        };
        running.in_progress -= 1;
        match outcome {
            Ok(existed) => {
                running.outcome.done += 1;
                running.outcome.existed += u64::from(existed);
                let now = Instant::now();
                let latency = now.saturating_duration_since(since);
                running
                    .outcome
                    .latencies
                    .saturating_record(latency.as_nanos() as u64);
                if let Some(kind) = running.job.kind() {
                    self.recorder.record(kind, now, latency);
                }
                self.counters.done.fetch_add(1, Ordering::Relaxed);
            }
            Err(reason) => {
                *running.outcome.failures.entry(reason).or_default() += 1;
                self.counters.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn flush_dirty(&mut self) {
        let mut dirty = std::mem::take(&mut self.clients.dirty);
        for slot in dirty.drain(..) {
            let Some(client) = &mut self.clients.slots[slot] else {
                continue;
            };
            client.dirty = false;
            let out = &mut client.connection.out;
            if let Err(error) = client.socket.flush(out)
                && let Some(client) = self.clients.slots[slot].take()
            {
                self.end(client, End::Failed(error.to_string()));
            } else if let Some(client) = &mut self.clients.slots[slot]
                && client.connection.out.is_empty()
                && client.connection.out.capacity() > IDLE_BUFFER_MAX
            {
                client.connection.out = Vec::new();
            }
        }
        self.clients.dirty = dirty;
    }

    fn check_deadlines(&mut self) {
        while let Some(running) = &mut self.running {
            let Some(&(deadline, slot, since)) = running.deadlines.front() else {
                return;
            };
            let working = |client: &&mut Option<Box<Client>>| {
                client
                    .as_ref()
                    .and_then(|client| client.job)
                    .is_some_and(|(_, at)| at == since)
            };
            let client = Some(&mut self.clients.slots[slot]).filter(working);
            if client.is_some() && deadline > Instant::now() {
                return;
            }
            running.deadlines.pop_front();
            if let Some(client) = client.and_then(Option::take) {
                let seconds = self.target.login_timeout.as_secs_f64();
                self.end(client, End::Failed(format!("no answer within {seconds} s")));
            }
        }
    }

    fn publish(&self) {
        self.counters
            .bytes_in
            .store(self.bytes_in, Ordering::Relaxed);
        self.counters
            .presences
            .store(self.presences, Ordering::Relaxed);
        let settled = self.chat.as_ref().map_or(0, Engine::settled);
        self.counters
            .settled
            .store(self.settled + settled, Ordering::Relaxed);
    }

    /// Hands in what is finished. A fleet that is gone ends the loop by the next command anyway.
    fn answer(&mut self) {
        if self
            .running
            .as_ref()
            .is_some_and(|running| running.in_progress == 0 && !running.has_more())
        {
            let mut outcome = self.running.take().expect("just seen").outcome;
            outcome.derivations = self.derivations() - outcome.derivations;
            let _ = self.answers.send(Answer::Run(outcome));
        }
        if self
            .chat
            .as_ref()
            .is_some_and(|chat| chat.is_finished(Instant::now()))
        {
            let chat = self.chat.take().expect("just seen");
            self.settled += chat.settled();
            let _ = self.answers.send(Answer::Chat(chat.finish()));
        }
    }
}

fn closed() -> End {
    End::Failed("the server closed the connection".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(users: u32, again: bool) -> Running {
        Running {
            job: Job::Login,
            users: (0..users).collect(),
            next: 0,
            again,
            pace: Pace::Parallel(1),
            begun: 0,
            in_progress: 0,
            deadlines: VecDeque::new(),
            outcome: Outcome::new(),
        }
    }

    #[test]
    fn who_logs_in_again_has_left_half_a_round_before() {
        let mut again = running(10, true);
        let mut online = std::collections::BTreeSet::new();
        for number in 0..100 {
            let user = again.take_next(|_| true).unwrap();
            assert_eq!(user, number % 10);
            let leaving = again.leaving().unwrap();
            again.advance();
            assert!(online.insert(user), "he has left before");
            online.remove(&leaving);
            assert!(online.len() <= 5, "{online:?}");
        }
        assert!(again.has_more());
        again.next = usize::MAX;
        assert!(!again.has_more() && again.take_next(|_| true).is_none());
    }

    #[test]
    fn who_is_still_logging_in_is_passed_over_and_once_is_enough_without_again() {
        let mut again = running(4, true);
        assert_eq!(again.take_next(|user| user > 1), Some(2));
        assert_eq!(again.take_next(|_| false), None);
        assert!(again.has_more());
        let mut once = running(2, false);
        for user in 0..2 {
            assert_eq!(once.take_next(|_| false), Some(user));
            assert_eq!(once.leaving(), None);
            once.advance();
        }
        assert!(!once.has_more());
    }

    #[test]
    fn every_user_has_one_slot_and_pairs_stay_together() {
        let layout = Layout {
            users: 1001,
            threads: 3,
            accounts: 2002,
            first: 7,
        };
        assert_eq!((layout.account(0), layout.account(1000)), (7, 2007));
        let mut seen = 0;
        for worker in 0..3 {
            for (slot, user) in layout.users_of(worker).enumerate() {
                assert_eq!((layout.worker(user), layout.slot(user)), (worker, slot));
                seen += 1;
            }
        }
        assert_eq!(seen, 1001);
        assert_eq!(layout.worker(6), layout.worker(7));
        assert_eq!(layout.slot(6) ^ 1, layout.slot(7));
    }
}
