//! The SQL lane: one thread that carries the shards' requests to the database and the answers back, and drains the
//! journals.
//!
//! In: batches of requests over one bounded queue, from any shard, which never waits for it. Out: batches of answers,
//! handed to the asking shard's function on the lane's thread. Promises: those of [`tier2`](crate::store::tier2); all
//! loads that wait are answered by one statement for up to 50 users; every request is answered within
//! [`LaneConfig::retry_max`] or fails, whatever the database does; and an archive page never delays a load.
//!
//! Inside are tasks on a single-threaded tokio runtime: intake (queue → waiting), loads, reads (documents and pages) and
//! the [drain](crate::store::drain), the latter three with a connection each (sqlx runs each SQLite connection on a
//! thread of its own, which inherits affinity and priority). A MySQL server that cannot be reached at the start is tried
//! until it can; what is wrong with its schema or rights is told at the start.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::{Counters, Database, SetUpError, Sql, SqlError, Trouble};
use crate::store::drain::{Drain, DrainConfig, DrainHandle, DrainedSink, Source};
use crate::store::tier2::{Answer, ArchiveQuery, Loaded, Query, ReadError, Request, Ticket};

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

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
            Err(SetUpError(sentence, true)) => {
                tracing::warn!(reason = %sentence, "the server starts without its database and tries on");
                false
            }
            Err(SetUpError(sentence, false)) => {
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
        self.drain.stop();
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
                Err(SetUpError(sentence, unreachable)) => {
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
        loop {
            let loads = self.waiting.borrow_mut().take_loads(names_max);
            let Some(until) = loads.iter().map(|load| load.until).min() else {
                if self.waiting.borrow().stopping {
                    break;
                }
                self.loads_wake.notified().await;
                continue;
            };
            let mut names: Vec<&str> = loads.iter().map(|load| &*load.name).collect();
            names.sort_unstable();
            names.dedup();
            let found = attempts
                .until(until, &self, &mut sql, async |sql| sql.load(&names).await)
                .await;
            let answer_all = |found: &dyn Fn(&str) -> Result<Option<Loaded>, String>| {
                let mut out = Out::new(&self.answers);
                for load in &loads {
                    let answer = match found(&load.name) {
                        Ok(user) => {
                            let found = u64::from(user.is_some());
                            self.counters.users_loaded.fetch_add(found, Relaxed);
                            let name = load.name.clone();
                            Answer::Loaded { name, user }
                        }
                        Err(error) => {
                            self.counters.failures.fetch_add(1, Relaxed);
                            let name = load.name.clone();
                            Answer::LoadFailed { name, error }
                        }
                    };
                    out.push(load.shard, answer);
                }
                out.send(&self);
            };
            match found {
                Ok(found) => {
                    names_max = Sql::LOADS_MAX;
                    answer_all(&|name| {
                        let at = names.binary_search(&name).expect("it was asked for");
                        found[at].clone().map_err(|error| error.to_string())
                    });
                }
                // A damaged page harms those who stand on it, not all who asked at the same time.
                Err(error) if error.trouble == Trouble::Refused && names.len() > 1 => {
                    names_max = names.len() / 2;
                    self.waiting.borrow_mut().loads.extend_front_in_order(loads);
                }
                Err(error) if error.trouble == Trouble::Refused || self.gives_up(until) => {
                    // Who came later is tried longer.
                    let now = Instant::now();
                    let refused = error.trouble == Trouble::Refused;
                    let over = |load: &Load| {
                        refused || load.until <= now || self.waiting.borrow().stopping
                    };
                    let (over, later): (Vec<_>, Vec<_>) = loads.into_iter().partition(over);
                    self.waiting.borrow_mut().loads.extend_front_in_order(later);
                    let mut out = Out::new(&self.answers);
                    for load in over {
                        self.counters.failures.fetch_add(1, Relaxed);
                        let (name, error) = (load.name, error.to_string());
                        out.push(load.shard, Answer::LoadFailed { name, error });
                    }
                    out.send(&self);
                    self.fail_overdue_loads(&error);
                }
                Err(_) => self.waiting.borrow_mut().loads.extend_front_in_order(loads),
            }
        }
        sql.close().await;
    }

    /// Answers documents, as many as wait with one statement, and archive pages.
    async fn answer_reads(self: Rc<Self>, mut sql: Sql) {
        // A page of a large archive with a rare peer may take long.
        sql.set_deadline(self.retry_max);
        let mut attempts = Attempts::default();
        loop {
            let reads = self.waiting.borrow_mut().take_reads();
            let Some(until) = reads.iter().map(|read| read.until).min() else {
                if self.waiting.borrow().stopping {
                    break;
                }
                self.reads_wake.notified().await;
                continue;
            };
            let done = attempts
                .until(until, &self, &mut sql, async |sql| find(sql, &reads).await)
                .await;
            let mut out = Out::new(&self.answers);
            match done {
                Ok(answers) => {
                    for (read, answer) in reads.iter().zip(answers) {
                        out.push(read.shard, answer);
                    }
                }
                Err(error) if error.trouble == Trouble::Refused || self.gives_up(until) => {
                    let now = Instant::now();
                    let refused = error.trouble == Trouble::Refused;
                    let mut waiting = self.waiting.borrow_mut();
                    let over = |read: &Read| refused || read.until <= now || waiting.stopping;
                    let (mut over, later): (Vec<_>, Vec<_>) = reads.into_iter().partition(over);
                    waiting.reads.extend_front_in_order(later);
                    while waiting.reads.front().is_some_and(|read| read.until <= now) {
                        over.extend(waiting.reads.pop_front());
                    }
                    for read in over {
                        self.counters.failures.fetch_add(1, Relaxed);
                        out.push(read.shard, read.failed(&error));
                    }
                }
                Err(_) => self.waiting.borrow_mut().reads.extend_front_in_order(reads),
            }
            out.send(&self);
        }
        sql.close().await;
    }

    fn fail_overdue_loads(&self, error: &SqlError) {
        let now = Instant::now();
        let mut out = Out::new(&self.answers);
        loop {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.loads.front().is_none_or(|load| load.until > now) {
                break;
            }
            let Some(load) = waiting.loads.pop_front() else {
                break;
            };
            self.counters.failures.fetch_add(1, Relaxed);
            let (name, error) = (load.name, error.to_string());
            out.push(load.shard, Answer::LoadFailed { name, error });
        }
        out.send(self);
    }

    fn gives_up(&self, until: Instant) -> bool {
        Instant::now() >= until || self.waiting.borrow().stopping
    }
}

/// Answers for these reads: either documents, or one page.
async fn find(sql: &mut Sql, reads: &[Read]) -> Result<Vec<Answer>, SqlError> {
    if let [
        Read {
            ticket,
            query: Query::Archive(query),
            ..
        },
    ] = reads
    {
        let (ticket, result) = (*ticket, Ok(sql.archive_page(query).await?));
        return Ok(vec![Answer::Archive { ticket, result }]);
    }
    let wanted: Vec<(&str, &str)> = reads
        .iter()
        .map(|read| match &read.query {
            Query::Document { name, key } => (&**name, &**key),
            Query::Archive(ArchiveQuery { name, .. }) => (&**name, ""),
        })
        .collect();
    let found = sql.documents(&wanted).await?;
    let answer = |(read, found): (&Read, Option<Box<[u8]>>)| Answer::Document {
        ticket: read.ticket,
        result: Ok(found),
    };
    Ok(reads.iter().zip(found).map(answer).collect())
}

impl Read {
    fn failed(self, error: &SqlError) -> Answer {
        let (ticket, error) = (self.ticket, ReadError(error.to_string()));
        match self.query {
            Query::Document { .. } => Answer::Document {
                ticket,
                result: Err(error),
            },
            Query::Archive(_) => Answer::Archive {
                ticket,
                result: Err(error),
            },
        }
    }
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
            desk.counters.retries.fetch_add(1, Relaxed);
            let waited = desk.retry_max;
            return Err(SqlError::lost(format!("no answer within {waited:?}")));
        };
        match &done {
            Ok(_) => self.pause = None,
            Err(error) if error.trouble == Trouble::Refused => {}
            Err(error) => {
                if error.trouble == Trouble::Lost {
                    sql.disconnect();
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
                    Query::Document { .. } => &counters.reads,
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

    /// The oldest, up to so many different names; who asks for one of them is among them.
    fn take_loads(&mut self, names_max: usize) -> Vec<Load> {
        let mut loads = Vec::new();
        let mut names: HashMap<Box<str>, ()> = HashMap::new();
        while let Some(load) = self.loads.pop_front() {
            if !names.contains_key(&load.name) {
                if names.len() == names_max {
                    self.loads.push_front(load);
                    break;
                }
                names.insert(load.name.clone(), ());
            }
            loads.push(load);
        }
        loads
    }

    /// One page, or up to 50 documents.
    fn take_reads(&mut self) -> Vec<Read> {
        let is_page = |read: &Read| matches!(read.query, Query::Archive(_));
        let count = match self.reads.iter().position(is_page) {
            Some(0) => 1,
            position => position.unwrap_or(self.reads.len()).min(Sql::LOADS_MAX),
        };
        self.reads.drain(..count).collect()
    }
}

/// Putting back what could not be answered, where it was.
trait ExtendFront<T> {
    fn extend_front_in_order(&mut self, items: Vec<T>);
}

impl<T> ExtendFront<T> for VecDeque<T> {
    fn extend_front_in_order(&mut self, items: Vec<T>) {
        for item in items.into_iter().rev() {
            self.push_front(item);
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
