//! The SQL lane: one thread that carries the shards' requests to the database and the answers back.
//!
//! In: batches of requests over one bounded queue, from any shard, which never waits for it. Out: batches of answers,
//! handed to the asking shard's function on the lane's thread. Promises: those of [`super::tier`]; and all loads that
//! wait are answered by one statement for up to 50 users, all writes that wait go into one transaction.
//!
//! Inside are three tasks on a single-threaded tokio runtime: intake (queue → waiting), reader and writer, the latter
//! two with a connection each, so that neither delays the other (sqlx runs each connection on a thread of its own,
//! which inherits affinity and priority). What must see a write of the same user waits until that is committed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use fnv::FnvHashMap;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::sqlite::{ROWS_MAX, SqlError, Sqlite, Trouble};
use super::tier::{Answer, Op, Query, ReadError, Request, Ticket, WriteError};

/// Beyond this nothing is gained, and a failing change costs more.
const WRITES_PER_TRANSACTION_MAX: usize = 1_000;

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// How the lane runs; see [`LaneConfig::new`] for the defaults.
#[derive(Debug, Clone)]
pub struct LaneConfig {
    /// The SQLite file.
    pub path: PathBuf,
    /// Requests that wait or are under way, of all shards together. Reaching it makes `try_send` give batches back.
    pub queue_max: usize,
    /// Cores for the lane's thread and the threads of its connections; `None` leaves them to the kernel. One core is
    /// cheapest: a hop between two costs ~60 us.
    pub affinity: Option<Vec<usize>>,
    /// 0 to 19: how far the lane steps back behind the shards.
    pub nice: i32,
    /// SQLite's page cache, for each of the two connections.
    pub page_cache_bytes: usize,
    /// How long a change or a read is tried again while the database is locked or gone.
    pub retry_max: Duration,
}

impl LaneConfig {
    pub fn new(path: impl Into<PathBuf>) -> LaneConfig {
        LaneConfig {
            path: path.into(),
            queue_max: 65_536,
            affinity: None,
            nice: 5,
            page_cache_bytes: 64 << 20,
            retry_max: Duration::from_secs(5),
        }
    }
}

/// Where a shard's answers go; called on the lane's thread, so it must only pass them on.
pub type AnswerSink = Box<dyn Fn(Vec<Answer>) + Send>;

/// Figures for the metrics. All but `queue_depth` only grow.
#[derive(Debug, Default)]
pub struct LaneCounters {
    /// SQL statements, BEGIN and COMMIT included.
    pub statements: AtomicU64,
    /// Loads asked for.
    pub loads: AtomicU64,
    /// Users found by them.
    pub users_loaded: AtomicU64,
    /// Documents and last activities asked for.
    pub reads: AtomicU64,
    /// Changes asked for.
    pub writes: AtomicU64,
    /// Transactions committed.
    pub transactions: AtomicU64,
    /// Attempts repeated because the database was locked or gone.
    pub retries: AtomicU64,
    /// Requests answered with "not available" or "full".
    pub failures: AtomicU64,
    /// Batches given back because the queue was full.
    pub refused: AtomicU64,
    /// Requests that wait or are under way.
    pub queue_depth: AtomicUsize,
    /// The highest it was.
    pub queue_depth_max: AtomicUsize,
}

/// The running lane. Dropping it stops it as [`Lane::stop`] does.
pub struct Lane {
    sender: LaneSender,
    thread: Option<JoinHandle<()>>,
}

/// A shard's end of the queue.
#[derive(Clone)]
pub struct LaneSender {
    queue: mpsc::UnboundedSender<Message>,
    counters: Arc<LaneCounters>,
    queue_max: usize,
    shards: usize,
}

enum Message {
    Batch {
        shard: usize,
        requests: Vec<Request>,
    },
    Stop,
}

impl Lane {
    /// Opens the database (made and migrated if need be) and starts the thread; `answers[n]` is shard n's function.
    /// The error is a sentence for the operator.
    pub fn start(config: LaneConfig, answers: Vec<AnswerSink>) -> Result<Lane, String> {
        let counters = Arc::new(LaneCounters::default());
        let (queue, intake) = mpsc::unbounded_channel();
        let sender = LaneSender {
            queue,
            counters: counters.clone(),
            queue_max: config.queue_max,
            shards: answers.len(),
        };
        let (started, start) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("sql".into())
            .spawn(move || run(&config, answers, intake, counters, &started))
            .map_err(|error| format!("cannot start the SQL thread: {error}"))?;
        // A closed channel without a word is a panic on the thread, which has told its own story.
        start
            .recv()
            .unwrap_or_else(|_| Err("the SQL thread ended while it started".into()))?;
        Ok(Lane {
            sender,
            thread: Some(thread),
        })
    }

    /// The queue's end, to be cloned for each shard.
    pub fn sender(&self) -> LaneSender {
        self.sender.clone()
    }

    pub fn counters(&self) -> Arc<LaneCounters> {
        self.sender.counters.clone()
    }

    /// Takes nothing more, answers everything that was accepted, commits, closes the database. Blocks until then: not
    /// for a shard's thread.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // An error means that the thread has ended already.
        let _ = self.sender.queue.send(Message::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl LaneSender {
    /// Queues a batch for shard `shard`, or gives it back if the queue is full or the lane has stopped. Never waits.
    /// The bound is checked before a batch, not inside: the queue may exceed it by one batch of each shard.
    pub fn try_send(&self, shard: usize, requests: Vec<Request>) -> Result<(), Vec<Request>> {
        assert!(
            shard < self.shards,
            "the lane was started for {} shards",
            self.shards
        );
        if requests.is_empty() {
            return Ok(());
        }
        let count = requests.len();
        let before = self.counters.queue_depth.fetch_add(count, Relaxed);
        if before < self.queue_max {
            match self.queue.send(Message::Batch { shard, requests }) {
                Ok(()) => {
                    self.counters
                        .queue_depth_max
                        .fetch_max(before + count, Relaxed);
                    return Ok(());
                }
                Err(mpsc::error::SendError(Message::Batch { requests, .. })) => {
                    return Err(self.give_back(requests));
                }
                Err(_) => unreachable!("a failed send gives back what was sent"),
            }
        }
        Err(self.give_back(requests))
    }

    pub fn counters(&self) -> &LaneCounters {
        &self.counters
    }

    fn give_back(&self, requests: Vec<Request>) -> Vec<Request> {
        self.counters.queue_depth.fetch_sub(requests.len(), Relaxed);
        self.counters.refused.fetch_add(1, Relaxed);
        requests
    }
}

/// The lane's thread, from its start to its end.
fn run(
    config: &LaneConfig,
    answers: Vec<AnswerSink>,
    intake: mpsc::UnboundedReceiver<Message>,
    counters: Arc<LaneCounters>,
    started: &std::sync::mpsc::SyncSender<Result<(), String>>,
) {
    // Before the connections are opened: their threads inherit both.
    step_back(config);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(format!(
                "cannot start the SQL thread's runtime: {error}"
            )));
            return;
        }
    };
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let opened = async {
            let writer =
                Sqlite::open(&config.path, config.page_cache_bytes, counters.clone()).await?;
            let reader = writer.another().await.map_err(|error| {
                format!(
                    "cannot open the database {}: {error}",
                    config.path.display()
                )
            })?;
            Ok((writer, reader))
        };
        let (writer, reader) = match opened.await {
            Ok(both) => both,
            Err(sentence) => {
                let _ = started.send(Err(sentence));
                return;
            }
        };
        let _ = started.send(Ok(()));
        let desk = Desk {
            waiting: RefCell::default(),
            reader_wake: Notify::new(),
            writer_wake: Notify::new(),
            answers,
            counters,
            retry_max: config.retry_max,
        };
        let desk = Rc::new(desk);
        let tasks = [
            tokio::task::spawn_local(desk.clone().take_in(intake)),
            tokio::task::spawn_local(desk.clone().read(reader)),
            tokio::task::spawn_local(desk.write(writer)),
        ];
        for task in tasks {
            task.await
                .expect("the lane's tasks are never cancelled and do not panic");
        }
    });
}

/// What the three tasks share; they run on one thread and borrow it only between their waits.
struct Desk {
    waiting: RefCell<Waiting>,
    reader_wake: Notify,
    writer_wake: Notify,
    answers: Vec<AnswerSink>,
    counters: Arc<LaneCounters>,
    retry_max: Duration,
}

/// Bounded, all together, by the queue's depth: what waits here has not been answered.
#[derive(Default)]
struct Waiting {
    loads: VecDeque<Load>,
    reads: VecDeque<Read>,
    /// Loads and reads that must see a write that is not committed yet, with its number.
    held: Vec<(u64, Held)>,
    writes: VecDeque<Write>,
    /// The number of the last write of each user who has uncommitted ones.
    last_write: FnvHashMap<Box<str>, u64>,
    writes_taken: u64,
    writes_done: u64,
    stopping: bool,
}

struct Load {
    shard: usize,
    name: Box<str>,
}

struct Read {
    shard: usize,
    ticket: Ticket,
    query: Query,
}

struct Write {
    shard: usize,
    ticket: Ticket,
    op: Op,
    number: u64,
}

enum Held {
    Load(Load),
    Read(Read),
}

impl Desk {
    /// Sorts what comes in until the lane is stopped and the queue is empty.
    async fn take_in(self: Rc<Self>, mut intake: mpsc::UnboundedReceiver<Message>) {
        while let Some(message) = intake.recv().await {
            let mut next = Some(message);
            while let Some(message) = next {
                match message {
                    Message::Batch { shard, requests } => {
                        let mut waiting = self.waiting.borrow_mut();
                        requests
                            .into_iter()
                            .for_each(|one| waiting.add(shard, one, &self.counters));
                    }
                    // What was queued before is still delivered; later sends fail.
                    Message::Stop => intake.close(),
                }
                next = intake.try_recv().ok();
            }
            self.reader_wake.notify_one();
            self.writer_wake.notify_one();
        }
        self.waiting.borrow_mut().stopping = true;
        self.reader_wake.notify_one();
        self.writer_wake.notify_one();
    }

    /// Answers loads and reads, as many as wait with one statement.
    async fn read(self: Rc<Self>, mut sql: Sqlite) {
        loop {
            let (loads, documents, lasts) = {
                let mut waiting = self.waiting.borrow_mut();
                let loads = waiting.take_loads();
                let (documents, lasts) = waiting.take_reads();
                if loads.is_empty()
                    && documents.is_empty()
                    && lasts.is_empty()
                    && waiting.stopping
                    && waiting.held.is_empty()
                {
                    break;
                }
                (loads, documents, lasts)
            };
            if loads.is_empty() && documents.is_empty() && lasts.is_empty() {
                self.reader_wake.notified().await;
                continue;
            }
            let mut out = Out::new(&self.answers);
            self.answer_loads(&mut sql, loads, &mut out).await;
            out.send(&self);
            self.answer_documents(&mut sql, documents, &mut out).await;
            self.answer_lasts(&mut sql, lasts, &mut out).await;
            out.send(&self);
        }
        let _ = sql.close().await;
    }

    /// Applies changes, as many as wait in one transaction.
    async fn write(self: Rc<Self>, mut sql: Sqlite) {
        loop {
            let batch = {
                let mut waiting = self.waiting.borrow_mut();
                if waiting.writes.is_empty() && waiting.stopping {
                    break;
                }
                let count = waiting.writes.len().min(WRITES_PER_TRANSACTION_MAX);
                waiting.writes.drain(..count).collect::<Vec<_>>()
            };
            if batch.is_empty() {
                self.writer_wake.notified().await;
                continue;
            }
            let outcomes = self.apply(&mut sql, &batch).await;
            self.waiting.borrow_mut().committed(&batch);
            self.reader_wake.notify_one();
            let mut out = Out::new(&self.answers);
            for (write, result) in batch.into_iter().zip(outcomes) {
                if matches!(result, Err(WriteError::Unavailable(_) | WriteError::Full)) {
                    self.counters.failures.fetch_add(1, Relaxed);
                }
                out.push(
                    write.shard,
                    Answer::Written {
                        ticket: write.ticket,
                        result,
                    },
                );
            }
            out.send(&self);
        }
        let _ = sql.close().await;
    }

    /// One transaction for all; if that is refused, halves, until the one change that harms the others stands alone.
    async fn apply(&self, sql: &mut Sqlite, batch: &[Write]) -> Vec<Result<(), WriteError>> {
        let ops: Vec<&Op> = batch.iter().map(|write| &write.op).collect();
        let mut outcomes = Vec::with_capacity(ops.len());
        let mut patience = Patience::new(self.retry_max);
        // The last is the next one: order is kept.
        let mut parts = vec![&ops[..]];
        while let Some(part) = parts.pop() {
            match sql.write(part).await {
                Ok(some) => outcomes.extend(some),
                Err(error) if self.again(sql, &error, &mut patience).await => parts.push(part),
                // Locked or gone: each alone would fare no better.
                Err(error) if matches!(error.trouble, Trouble::Busy | Trouble::Lost) => {
                    outcomes.extend(part.iter().map(|_| Err(error.clone().into())));
                }
                Err(error) if part.len() == 1 => outcomes.push(Err(error.into())),
                Err(_) => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
            }
        }
        outcomes
    }

    async fn answer_loads(&self, sql: &mut Sqlite, loads: Loads, out: &mut Out<'_>) {
        let names: Vec<&str> = loads.iter().map(|(name, _)| &**name).collect();
        let mut patience = Patience::new(self.retry_max);
        let mut parts = vec![&names[..]];
        let mut found = Vec::with_capacity(names.len());
        while let Some(part) = parts.pop().filter(|part| !part.is_empty()) {
            match sql.load(part).await {
                Ok(some) => {
                    found.extend(some.into_iter().map(|one| one.map_err(|e| e.to_string())))
                }
                Err(error) if self.again(sql, &error, &mut patience).await => parts.push(part),
                // A damaged page harms those who stand on it, not all who asked at the same time.
                Err(error) if error.trouble == Trouble::Refused && part.len() > 1 => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
                Err(error) => found.extend(part.iter().map(|_| Err(error.to_string()))),
            }
        }
        for ((name, shards), result) in loads.into_iter().zip(found) {
            match &result {
                Ok(None) => {}
                Ok(Some(_)) => {
                    self.counters.users_loaded.fetch_add(1, Relaxed);
                }
                Err(_) => {
                    self.counters.failures.fetch_add(1, Relaxed);
                }
            }
            let (last, others) = shards.split_last().expect("a load has somebody who asked");
            for shard in others {
                out.push(*shard, loaded(name.clone(), result.clone()));
            }
            out.push(*last, loaded(name, result));
        }
    }

    async fn answer_documents(&self, sql: &mut Sqlite, reads: Vec<Read>, out: &mut Out<'_>) {
        let wanted: Vec<(&str, &str)> = reads
            .iter()
            .map(|read| match &read.query {
                Query::Document { name, key } => (&**name, &**key),
                Query::Last { .. } => unreachable!("taken apart by take_reads"),
            })
            .collect();
        if wanted.is_empty() {
            return;
        }
        let mut patience = Patience::new(self.retry_max);
        let found = loop {
            match sql.documents(&wanted).await {
                Ok(found) => break found.into_iter().map(Ok).collect(),
                Err(error) if self.again(sql, &error, &mut patience).await => {}
                Err(error) => break self.unavailable(&error, wanted.len()),
            }
        };
        for (read, result) in reads.iter().zip(found) {
            out.push(
                read.shard,
                Answer::Read {
                    ticket: read.ticket,
                    result,
                },
            );
        }
    }

    async fn answer_lasts(&self, sql: &mut Sqlite, reads: Vec<Read>, out: &mut Out<'_>) {
        let names: Vec<&str> = reads.iter().map(|read| read.query.name()).collect();
        if names.is_empty() {
            return;
        }
        let mut patience = Patience::new(self.retry_max);
        let found = loop {
            match sql.last(&names).await {
                Ok(found) => break found.into_iter().map(Ok).collect(),
                Err(error) if self.again(sql, &error, &mut patience).await => {}
                Err(error) => break self.unavailable(&error, names.len()),
            }
        };
        for (read, result) in reads.iter().zip(found) {
            out.push(
                read.shard,
                Answer::ReadLast {
                    ticket: read.ticket,
                    result,
                },
            );
        }
    }

    fn unavailable<T>(&self, error: &SqlError, count: usize) -> Vec<Result<T, ReadError>> {
        self.counters.failures.fetch_add(count as u64, Relaxed);
        (0..count)
            .map(|_| Err(ReadError(error.to_string())))
            .collect()
    }

    /// Whether to try again, after a pause and with a sound connection.
    async fn again(&self, sql: &mut Sqlite, error: &SqlError, patience: &mut Patience) -> bool {
        match error.trouble {
            Trouble::Full | Trouble::Refused => return false,
            Trouble::Busy => {}
            Trouble::Lost => {
                // If it cannot be reopened, the next attempt fails in the same way.
                let _ = sql.reconnect().await;
            }
        }
        let again = patience.pause().await;
        if again {
            self.counters.retries.fetch_add(1, Relaxed);
        } else {
            tracing::error!(%error, "the database is not available");
        }
        again
    }
}

fn loaded(name: Box<str>, result: Result<Option<super::tier::Loaded>, String>) -> Answer {
    match result {
        Ok(user) => Answer::Loaded { name, user },
        Err(error) => Answer::LoadFailed { name, error },
    }
}

/// Each name once, with the shards that asked (the same one twice if it asked twice).
type Loads = Vec<(Box<str>, Vec<usize>)>;

impl Waiting {
    fn add(&mut self, shard: usize, request: Request, counters: &LaneCounters) {
        match request {
            Request::Load { name } => {
                counters.loads.fetch_add(1, Relaxed);
                match self.last_write.get(&name) {
                    Some(&write) => self.held.push((write, Held::Load(Load { shard, name }))),
                    None => self.loads.push_back(Load { shard, name }),
                }
            }
            Request::Read { ticket, query } => {
                counters.reads.fetch_add(1, Relaxed);
                let read = Read {
                    shard,
                    ticket,
                    query,
                };
                match self.last_write.get(read.query.name()) {
                    Some(&write) => self.held.push((write, Held::Read(read))),
                    None => self.reads.push_back(read),
                }
            }
            Request::Write { ticket, op } => {
                counters.writes.fetch_add(1, Relaxed);
                self.writes_taken += 1;
                let number = self.writes_taken;
                match self.last_write.get_mut(op.name()) {
                    Some(last) => *last = number,
                    None => {
                        self.last_write.insert(op.name().into(), number);
                    }
                }
                self.writes.push_back(Write {
                    shard,
                    ticket,
                    op,
                    number,
                });
            }
        }
    }

    /// Up to 50 different names.
    fn take_loads(&mut self) -> Loads {
        let mut loads: Loads = Vec::new();
        let mut positions: FnvHashMap<Box<str>, usize> = FnvHashMap::default();
        while let Some(load) = self.loads.pop_front() {
            if let Some(&at) = positions.get(&load.name) {
                loads[at].1.push(load.shard);
            } else if loads.len() == ROWS_MAX {
                self.loads.push_front(load);
                break;
            } else {
                positions.insert(load.name.clone(), loads.len());
                loads.push((load.name, vec![load.shard]));
            }
        }
        loads
    }

    /// Up to 50 reads, taken apart into documents and last activities.
    fn take_reads(&mut self) -> (Vec<Read>, Vec<Read>) {
        let count = self.reads.len().min(ROWS_MAX);
        self.reads
            .drain(..count)
            .partition(|read| matches!(read.query, Query::Document { .. }))
    }

    /// After the commit (or the final failure) of `batch`: lets those go who waited for it.
    fn committed(&mut self, batch: &[Write]) {
        for write in batch {
            self.writes_done = write.number;
            if self.last_write.get(write.op.name()) == Some(&write.number) {
                self.last_write.remove(write.op.name());
            }
        }
        let done = self.writes_done;
        for (_, held) in self.held.extract_if(.., |(number, _)| *number <= done) {
            match held {
                Held::Load(load) => self.loads.push_back(load),
                Held::Read(read) => self.reads.push_back(read),
            }
        }
    }
}

/// Answers on their way, collected for each shard: one call for many.
struct Out<'a> {
    sinks: &'a [AnswerSink],
    answers: Vec<Vec<Answer>>,
}

impl<'a> Out<'a> {
    fn new(sinks: &'a [AnswerSink]) -> Out<'a> {
        Out {
            sinks,
            answers: sinks.iter().map(|_| Vec::new()).collect(),
        }
    }

    fn push(&mut self, shard: usize, answer: Answer) {
        self.answers[shard].push(answer);
    }

    fn send(&mut self, desk: &Desk) {
        for (sink, answers) in self.sinks.iter().zip(&mut self.answers) {
            if !answers.is_empty() {
                desk.counters.queue_depth.fetch_sub(answers.len(), Relaxed);
                sink(std::mem::take(answers));
            }
        }
    }
}

/// Growing pauses between attempts, up to a limit in all.
struct Patience {
    until: Instant,
    pause: Duration,
}

impl Patience {
    fn new(retry_max: Duration) -> Patience {
        Patience {
            until: Instant::now() + retry_max,
            pause: BACKOFF_MIN,
        }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// False at once if the limit is reached, else true after a pause.
    async fn pause(&mut self) -> bool {
        if self.is_over() {
            return false;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(BACKOFF_MAX);
        true
    }
}

/// Pins the calling thread and puts it behind the shards. Failing is no reason not to start: it costs latency only.
#[allow(unsafe_code)]
fn step_back(config: &LaneConfig) {
    if let Some(cores) = &config.affinity {
        // SAFETY: a cpu_set_t is plain bits, valid when zeroed; CPU_SET only writes inside it because larger numbers
        // are left out; the kernel only reads it. 0 is the calling thread.
        let pinned = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            for core in cores
                .iter()
                .filter(|core| **core < libc::CPU_SETSIZE as usize)
            {
                libc::CPU_SET(*core, &mut set);
            }
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
        };
        if pinned != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, ?cores, "cannot pin the SQL thread");
        }
    }
    // SAFETY: plain system calls on the calling thread (0) with values of our own; `param` is only read.
    let stepped_back = unsafe {
        let param: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &param) == 0
            && libc::setpriority(libc::PRIO_PROCESS, 0, config.nice) == 0
    };
    if !stepped_back {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "cannot lower the SQL thread's priority");
    }
}
