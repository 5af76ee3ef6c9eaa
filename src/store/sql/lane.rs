//! The SQL lane: one thread that carries the shards' requests to the database and the answers back, and drains the
//! journals.
//!
//! In: batches of requests over one bounded queue, from any shard, which never waits for it. Out: batches of answers,
//! handed to the asking shard's function on the lane's thread. Promises: those of [`tier`](crate::store::tier); all
//! loads that wait are answered by one statement for up to 50 users; every request is answered within
//! [`LaneConfig::retry_max`] or fails, whatever the database does; and an archive page never delays a load.
//!
//! Inside are tasks on a single-threaded tokio runtime: intake (queue → waiting), loads, reads (documents and pages) and
//! the [drain](crate::store::drain), the latter three with a connection each (sqlx runs each SQLite connection on a
//! thread of its own, which inherits affinity and priority). A MySQL server that cannot be reached at the start is tried
//! until it can; what is wrong with its schema or rights is told at the start.

use std::cell::{Cell, RefCell};
use std::collections::{HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::{Counters, Database, SetUpError, Sql, SqlError, Trouble};
use crate::observe::Stage;
use crate::store::drain::{Drain, DrainConfig, DrainHandle, DrainedSink, Source};
use crate::store::tier::{
    Answer, Loaded, Page, Query, ReadError, Request, Retraction, StoredRoom, Ticket,
};

const BACKOFF_MIN: Duration = Duration::from_millis(10);
/// How long the drain goes on when the lane is stopped.
const STOP_WITHIN: Duration = Duration::from_secs(2);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Between the begins of two load statements, unless a full one waits: a lonely load goes at once, those of a storm share
/// statements. Below `sasl.answer_ms_min`, so that no log-in waits longer for it.
const LOADS_PACE: Duration = Duration::from_micros(2_800);

/// How the lane runs; see [`LaneConfig::new`] for the defaults.
#[derive(Debug, Clone)]
pub struct LaneConfig {
    pub database: Database,
    /// Requests that wait or are under way, of all shards together. Reaching it makes `try_send` give batches back.
    pub queue_max: usize,
    /// Cores for the lane's thread and the threads of its connections; `None` leaves them to the kernel. One core is
    /// cheapest: a hop between two costs ~60 us.
    pub affinity: Option<Vec<usize>>,
    /// 0 to 19: how far the lane steps back behind the shards.
    pub nice: i32,
    /// SQLite's page cache, for each of the three connections.
    pub page_cache_bytes: usize,
    /// How long a request is tried, from when it was taken in, while the database is locked or gone.
    pub retry_max: Duration,
    /// How long one statement of the drain may take.
    pub statement_max: Duration,
    pub drain: DrainConfig,
}

impl LaneConfig {
    pub fn new(database: Database) -> LaneConfig {
        LaneConfig {
            database,
            queue_max: 65_536,
            affinity: None,
            nice: 5,
            page_cache_bytes: 64 << 20,
            retry_max: Duration::from_secs(5),
            statement_max: Duration::from_secs(30),
            drain: DrainConfig::default(),
        }
    }
}

/// Where a shard's answers go; called on the lane's thread, so it must only pass them on.
pub type AnswerSink = Box<dyn Fn(Vec<Answer>) + Send>;

/// The running lane. Dropping it stops it as [`Lane::stop`] does.
pub struct Lane {
    sender: LaneSender,
    thread: Option<JoinHandle<()>>,
}

/// A shard's end of the queue.
#[derive(Clone)]
pub struct LaneSender {
    queue: mpsc::UnboundedSender<Message>,
    counters: Arc<Counters>,
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
    /// Opens the database (made and migrated if need be) and starts the thread; `answers[n]` is shard n's function,
    /// `drained` hears how far each of the `sources` is in the database, at first from where it goes on.
    /// The error is a sentence for the operator.
    pub fn start(
        config: LaneConfig,
        answers: Vec<AnswerSink>,
        sources: Vec<Box<dyn Source>>,
        drained: DrainedSink,
    ) -> Result<Lane, String> {
        let counters = Arc::new(Counters::default());
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
            .spawn(move || {
                let drain = Drain::new(config.drain.clone(), sources, drained, counters.clone());
                run(&config, answers, intake, counters, drain, &started);
            })
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

    pub fn counters(&self) -> Arc<Counters> {
        self.sender.counters.clone()
    }

    /// Takes nothing more, answers everything that was accepted, drains what can be drained, closes the database.
    /// Blocks until then: not for a shard's thread.
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

    pub fn counters(&self) -> &Counters {
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
    counters: Arc<Counters>,
    drain: Drain,
    started: &std::sync::mpsc::SyncSender<Result<(), String>>,
) {
    // Before the connections are opened: their threads inherit both.
    step_back(config);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
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
        let mut sql = Sql::unconnected(&config.database, config.page_cache_bytes, counters.clone());
        // An unreachable server must not hold the start up for long.
        sql.set_deadline(config.retry_max);
        let ready = match sql.set_up().await {
            Ok(()) => true,
            Err(SetUpError {
                sentence,
                unreachable: true,
            }) => {
                tracing::warn!(reason = %sentence, "the server starts without its database and tries on");
                false
            }
            Err(SetUpError { sentence, .. }) => {
                let _ = started.send(Err(sentence));
                return;
            }
        };
        let _ = started.send(Ok(()));
        sql.set_deadline(config.statement_max);
        counters.up.store(ready, Relaxed);
        let desk = Rc::new(Desk {
            waiting: RefCell::default(),
            loads_wake: Notify::new(),
            reads_wake: Notify::new(),
            ready: Cell::new(ready),
            answers,
            counters,
            retry_max: config.retry_max,
            drain: DrainHandle::default(),
        });
        let tasks = [
            tokio::task::spawn_local(desk.clone().take_in(intake)),
            tokio::task::spawn_local(desk.clone().answer_loads(sql.another())),
            tokio::task::spawn_local(desk.clone().answer_reads(sql.another())),
            tokio::task::spawn_local(desk.drain(sql, drain)),
        ];
        for task in tasks {
            task.await
                .expect("the lane's tasks are never cancelled and do not panic");
        }
    });
}

/// What the tasks share; they run on one thread and borrow it only between their waits.
struct Desk {
    waiting: RefCell<Waiting>,
    loads_wake: Notify,
    reads_wake: Notify,
    /// The schema is there.
    ready: Cell<bool>,
    answers: Vec<AnswerSink>,
    counters: Arc<Counters>,
    retry_max: Duration,
    drain: DrainHandle,
}

/// Bounded, all together, by the queue's depth: what waits here has not been answered. Oldest first.
#[derive(Default)]
struct Waiting {
    loads: VecDeque<Load>,
    reads: VecDeque<Read>,
    stopping: bool,
}

struct Load {
    until: Instant,
    shard: usize,
    name: Box<str>,
}

struct Read {
    until: Instant,
    shard: usize,
    ticket: Ticket,
    query: Query,
}

impl Desk {
    /// Sorts what comes in until the lane is stopped and the queue is empty.
    async fn take_in(self: Rc<Self>, mut intake: mpsc::UnboundedReceiver<Message>) {
        while let Some(message) = intake.recv().await {
            let mut next = Some(message);
            let until = Instant::now() + self.retry_max;
            while let Some(message) = next {
                match message {
                    Message::Batch { shard, requests } => {
                        let mut waiting = self.waiting.borrow_mut();
                        for request in requests {
                            waiting.add(shard, request, until, &self.counters);
                        }
                    }
                    // What was queued before is still delivered; later sends fail.
                    Message::Stop => intake.close(),
                }
                next = intake.try_recv().ok();
            }
            self.loads_wake.notify_one();
            self.reads_wake.notify_one();
        }
        self.waiting.borrow_mut().stopping = true;
        self.loads_wake.notify_one();
        self.reads_wake.notify_one();
        self.drain.stop_within(STOP_WITHIN);
    }

    /// Makes the schema if the start could not, then drains.
    async fn drain(self: Rc<Self>, mut sql: Sql, drain: Drain) {
        let mut pause = BACKOFF_MIN;
        let mut told = String::new();
        while !self.ready.get() {
            match sql.set_up().await {
                Ok(()) => {
                    tracing::info!("the database is there");
                    self.counters.up.store(true, Relaxed);
                    self.ready.set(true);
                }
                Err(_) if self.drain.is_stopping() => return,
                Err(SetUpError {
                    sentence,
                    unreachable,
                }) => {
                    if !unreachable && sentence != told {
                        tracing::error!(reason = %sentence, "the database cannot be used");
                        told = sentence;
                    }
                    self.counters.retries.fetch_add(1, Relaxed);
                    self.drain.pause(pause).await;
                    pause = (pause * 2).min(BACKOFF_MAX);
                }
            }
        }
        self.loads_wake.notify_one();
        self.reads_wake.notify_one();
        drain.run(sql, &self.drain).await;
    }

    /// Answers loads, as many as wait with one statement.
    async fn answer_loads(self: Rc<Self>, mut sql: Sql) {
        // Time for a second try on a new connection.
        sql.set_deadline(self.retry_max * 2 / 5);
        let mut attempts = Attempts::default();
        let mut names_max = Sql::LOADS_MAX;
        let mut next = Instant::now();
        loop {
            if self.waiting.borrow().are_few(names_max) && Instant::now() < next {
                tokio::time::sleep_until(next).await;
            }
            let loads = self.waiting.borrow_mut().take_loads(names_max);
            let Some(oldest) = loads.first() else {
                if self.waiting.borrow().stopping {
                    break;
                }
                self.loads_wake.notified().await;
                continue;
            };
            next = Instant::now() + LOADS_PACE;
            let mut names: Vec<&str> = loads.iter().map(|load| &*load.name).collect();
            names.sort_unstable();
            names.dedup();
            let count = names.len();
            let found = attempts
                .until(oldest.until, &self, &mut sql, async |sql| {
                    let begun = Instant::now();
                    let found = sql.load(&names).await?;
                    let timings = &self.counters.timings;
                    timings.record(Stage::SqlLoad, begun.elapsed());
                    Ok(loads
                        .iter()
                        .map(|load| {
                            let at = names.binary_search(&&*load.name);
                            found[at.expect("it was asked for")].clone()
                        })
                        .collect::<Vec<_>>())
                })
                .await;
            match found {
                Ok(found) => {
                    names_max = Sql::LOADS_MAX;
                    let found = found.into_iter().map(|one| one.map_err(|e| e.to_string()));
                    self.answer(loads.into_iter().zip(found));
                }
                // A damaged page harms those who stand on it, not all who asked at the same time.
                Err(error) if is_refused(&error) && count > 1 => {
                    names_max = count / 2;
                    put_back(&mut self.waiting.borrow_mut().loads, loads);
                }
                Err(error) if is_refused(&error) => self.answer(failed(loads, &error)),
                Err(error) => {
                    let mut waiting = self.waiting.borrow_mut();
                    put_back(&mut waiting.loads, loads);
                    let stopping = waiting.stopping;
                    let over = overdue(&mut waiting.loads, |load| stopping || is_past(load.until));
                    drop(waiting);
                    self.answer(failed(over, &error));
                }
            }
        }
        sql.close().await;
    }

    /// Answers documents, as many as wait with one statement, and archive pages.
    async fn answer_reads(self: Rc<Self>, mut sql: Sql) {
        // A page of a large archive with a rare peer may take long.
        sql.set_deadline(self.retry_max);
        let mut attempts = Attempts::default();
        let mut reads_max = Sql::LOADS_MAX;
        loop {
            let reads = self.waiting.borrow_mut().take_reads(reads_max);
            let Some(oldest) = reads.first() else {
                if self.waiting.borrow().stopping {
                    break;
                }
                self.reads_wake.notified().await;
                continue;
            };
            let count = reads.len();
            let found = attempts
                .until(oldest.until, &self, &mut sql, async |sql| {
                    let begun = Instant::now();
                    let found = find(sql, &reads).await;
                    let timings = &self.counters.timings;
                    timings.record(Stage::SqlRead, begun.elapsed());
                    found
                })
                .await;
            match found {
                Ok(found) => {
                    reads_max = Sql::LOADS_MAX;
                    self.answer(reads.into_iter().zip(found));
                }
                Err(error) if is_refused(&error) && count > 1 => {
                    reads_max = count / 2;
                    put_back(&mut self.waiting.borrow_mut().reads, reads);
                }
                Err(error) if is_refused(&error) => self.answer(failed(reads, &error)),
                Err(error) => {
                    let mut waiting = self.waiting.borrow_mut();
                    put_back(&mut waiting.reads, reads);
                    let stopping = waiting.stopping;
                    let over = overdue(&mut waiting.reads, |read| stopping || is_past(read.until));
                    drop(waiting);
                    self.answer(failed(over, &error));
                }
            }
        }
        sql.close().await;
    }

    /// Hands answers out, those of one shard in one call.
    fn answer<A: Asked>(&self, answers: impl Iterator<Item = (A, Result<A::Found, String>)>) {
        let mut out: Vec<Vec<Answer>> = self.answers.iter().map(|_| Vec::new()).collect();
        for (asked, found) in answers {
            if found.is_err() {
                self.counters.failures.fetch_add(1, Relaxed);
            }
            out[asked.shard()].push(asked.answer(found, &self.counters));
        }
        for (sink, answers) in self.answers.iter().zip(out) {
            if !answers.is_empty() {
                self.counters.queue_depth.fetch_sub(answers.len(), Relaxed);
                sink(answers);
            }
        }
    }
}

/// What waits for an answer.
trait Asked {
    type Found;

    fn shard(&self) -> usize;

    fn answer(self, found: Result<Self::Found, String>, counters: &Counters) -> Answer;
}

impl Asked for Load {
    type Found = Option<Loaded>;

    fn shard(&self) -> usize {
        self.shard
    }

    fn answer(self, found: Result<Self::Found, String>, counters: &Counters) -> Answer {
        let name = self.name;
        match found {
            Ok(user) => {
                let found = u64::from(user.is_some());
                counters.users_loaded.fetch_add(found, Relaxed);
                Answer::Loaded { name, user }
            }
            Err(error) => Answer::LoadFailed { name, error },
        }
    }
}

/// What a [`Read`] found.
enum ReadFound {
    Document(Option<Box<[u8]>>),
    Page(Page),
    Retractions(Vec<Retraction>),
    Rooms(Vec<StoredRoom>),
}

impl Asked for Read {
    type Found = ReadFound;

    fn shard(&self) -> usize {
        self.shard
    }

    fn answer(self, found: Result<Self::Found, String>, _: &Counters) -> Answer {
        let ticket = self.ticket;
        match (self.query, found) {
            (_, Ok(ReadFound::Document(found))) => Answer::Document {
                ticket,
                result: Ok(found),
            },
            (_, Ok(ReadFound::Page(page))) => Answer::Archive {
                ticket,
                result: Ok(page),
            },
            (_, Ok(ReadFound::Retractions(found))) => Answer::Retractions {
                ticket,
                result: Ok(found),
            },
            (_, Ok(ReadFound::Rooms(found))) => Answer::Rooms {
                ticket,
                result: Ok(found),
            },
            (Query::Rooms { .. }, Err(error)) => Answer::Rooms {
                ticket,
                result: Err(ReadError(error)),
            },
            (Query::Retractions { .. }, Err(error)) => Answer::Retractions {
                ticket,
                result: Err(ReadError(error)),
            },
            (Query::Document { .. }, Err(error)) => Answer::Document {
                ticket,
                result: Err(ReadError(error)),
            },
            (Query::Archive(_), Err(error)) => Answer::Archive {
                ticket,
                result: Err(ReadError(error)),
            },
        }
    }
}

/// Finds either documents, or one page, or what was retracted on one, or rooms.
async fn find(sql: &mut Sql, reads: &[Read]) -> Result<Vec<Result<ReadFound, String>>, SqlError> {
    let mut documents = Vec::new();
    for read in reads {
        match &read.query {
            Query::Document { name, key } => documents.push((&**name, &**key)),
            Query::Archive(query) => {
                return Ok(vec![Ok(ReadFound::Page(sql.archive_page(query).await?))]);
            }
            Query::Retractions { name, keys } => {
                let found = sql.retractions(name, keys).await?;
                return Ok(vec![Ok(ReadFound::Retractions(found))]);
            }
            Query::Rooms { after, most } => {
                let found = sql.rooms(*after, *most).await?;
                return Ok(vec![Ok(ReadFound::Rooms(found))]);
            }
        }
    }
    let found = sql.documents(&documents).await?;
    Ok(found
        .into_iter()
        .map(|one| Ok(ReadFound::Document(one)))
        .collect())
}

/// The same error for all.
fn failed<A: Asked>(
    all: Vec<A>,
    error: &SqlError,
) -> impl Iterator<Item = (A, Result<A::Found, String>)> {
    let text = error.to_string();
    all.into_iter().map(move |one| (one, Err(text.clone())))
}

fn put_back<T>(queue: &mut VecDeque<T>, items: Vec<T>) {
    for item in items.into_iter().rev() {
        queue.push_front(item);
    }
}

/// Takes from the front, where the oldest are, what is over.
fn overdue<T>(queue: &mut VecDeque<T>, is_over: impl Fn(&T) -> bool) -> Vec<T> {
    let count = queue.iter().take_while(|one| is_over(one)).count();
    queue.drain(..count).collect()
}

fn is_past(until: Instant) -> bool {
    Instant::now() >= until
}

/// Trying again does not help.
fn is_refused(error: &SqlError) -> bool {
    matches!(error.trouble, Trouble::Refused | Trouble::Damaged)
}

/// Attempts of one task, with growing pauses between those that fail.
#[derive(Default)]
struct Attempts {
    pause: Option<Duration>,
}

impl Attempts {
    /// One attempt, on a connection that is made if need be, with a pause after a failure; it ends at `until`.
    async fn until<T>(
        &mut self,
        until: Instant,
        desk: &Desk,
        sql: &mut Sql,
        work: impl AsyncFnOnce(&mut Sql) -> Result<T, SqlError>,
    ) -> Result<T, SqlError> {
        let attempt = async {
            if !desk.ready.get() {
                return Err(SqlError::lost("it could not be reached yet"));
            }
            if !sql.is_connected() {
                sql.reconnect().await?;
            }
            work(sql).await
        };
        let Ok(done) = tokio::time::timeout_at(until, attempt).await else {
            sql.disconnect();
            desk.counters.up.store(false, Relaxed);
            desk.counters.retries.fetch_add(1, Relaxed);
            let waited = desk.retry_max;
            return Err(SqlError::lost(format!("no answer within {waited:?}")));
        };
        match &done {
            Ok(_) => {
                self.pause = None;
                desk.counters.up.store(true, Relaxed);
            }
            Err(error) if is_refused(error) => {}
            Err(error) => {
                if error.trouble == Trouble::Lost {
                    sql.disconnect();
                    desk.counters.up.store(false, Relaxed);
                }
                desk.counters.retries.fetch_add(1, Relaxed);
                let pause = self.pause.unwrap_or(BACKOFF_MIN);
                self.pause = Some((pause * 2).min(BACKOFF_MAX));
                if !desk.waiting.borrow().stopping {
                    tokio::time::sleep_until(until.min(Instant::now() + pause)).await;
                }
            }
        }
        done
    }
}

impl Waiting {
    fn add(&mut self, shard: usize, request: Request, until: Instant, counters: &Counters) {
        match request {
            Request::Load { name } => {
                counters.loads.fetch_add(1, Relaxed);
                self.loads.push_back(Load { until, shard, name });
            }
            Request::Read { ticket, query } => {
                let counter = match query {
                    Query::Document { .. } | Query::Retractions { .. } | Query::Rooms { .. } => {
                        &counters.reads
                    }
                    Query::Archive(_) => &counters.pages,
                };
                counter.fetch_add(1, Relaxed);
                self.reads.push_back(Read {
                    until,
                    shard,
                    ticket,
                    query,
                });
            }
        }
    }

    /// Some wait, but not enough for a full statement.
    fn are_few(&self, names_max: usize) -> bool {
        !self.stopping && (1..names_max).contains(&self.loads.len())
    }

    /// The oldest, up to so many different names; who asks for one of them is among them.
    fn take_loads(&mut self, names_max: usize) -> Vec<Load> {
        let mut loads = Vec::new();
        let mut names: HashSet<Box<str>> = HashSet::new();
        while let Some(load) = self.loads.pop_front() {
            if !names.contains(&load.name) {
                if names.len() == names_max {
                    self.loads.push_front(load);
                    break;
                }
                names.insert(load.name.clone());
            }
            loads.push(load);
        }
        loads
    }

    /// One page, or the retractions on one, or so many documents.
    fn take_reads(&mut self, reads_max: usize) -> Vec<Read> {
        let alone = |read: &Read| !matches!(read.query, Query::Document { .. });
        let count = match self.reads.iter().position(alone) {
            Some(0) => 1,
            position => position.unwrap_or(self.reads.len()).min(reads_max),
        };
        self.reads.drain(..count).collect()
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
    crate::rt::step_back(config.nice);
}
