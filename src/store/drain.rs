//! The drain: what the journals hold goes into SQL, in large batches, in the background.
//!
//! In: records of each journal, in its order, from a [`Source`]. Out: rows, each batch in one transaction with the
//! positions it reaches; then [`Source::drained`]. Promises:
//!
//! - a record is reported as drained only after its transaction is committed; after a crash, a lost connection or an
//!   unknown end of a commit it goes on from the position that the database has;
//! - journals are merged by the ids of their records, which grow with time: a user whose changes lie in two journals,
//!   because the number of cores has changed, sees them in his order; a mark comes behind the message that it names;
//! - records rest for a moment ([`DrainConfig::linger`]), so that a delivery that is taken soon is never written as
//!   pending; with a backlog they do not. (So a load may show a delivery as taken whose mark is durable in the journal,
//!   but not reached yet.);
//! - a record that the database refuses is found by halving its batch, put aside (`quarantine`) and counted, and the
//!   drain goes on. Every statement has a deadline, every wait a bound.

use std::collections::VecDeque;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::change::ArchivedChange;
use super::sql::purge::{Purge, Whose};
use super::sql::{Ahead, Counters, Entry, Position, Sql, SqlError, Trouble};
use crate::observe::Stage;
use crate::rt::gently;

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Bytes read from a source at a time.
const READ_BYTES: usize = 1 << 20;

/// A transaction that was lost as often as this although the server could be reached is tried with half as many.
const LOST_MAX: u32 = 3;

/// One journal, as the drain sees it. It is read on the drain's thread.
pub trait Source: Send {
    fn journal(&self) -> u16;

    /// Tells this journal from an earlier one of the same number that was deleted: positions of another one do not
    /// count. It never changes.
    fn identity(&self) -> u64 {
        0
    }

    /// Appends payloads of the records of the `wanted` numbers, in order, about `bytes_max` bytes but at least one record if there
    /// is one: `records` gets each one's number and its place in `bytes`.
    fn read(
        &mut self,
        wanted: RangeInclusive<u64>,
        bytes_max: usize,
        bytes: &mut Vec<u8>,
        records: &mut Vec<(u64, Range<usize>)>,
    ) -> Result<(), String>;

    /// Records up to this one may be drained now; it grows.
    fn limit(&self) -> u64;

    /// Everything up to `seq` is durable in the database.
    fn drained(&self, seq: u64);

    /// Whom to notify when there are new records or the limit has grown.
    fn wake(&self, waker: Arc<Notify>);
}

/// Hears what is durable in the database: journal and number. Called on the drain's thread, so it must only pass it on.
pub type DrainedSink = Box<dyn Fn(u16, u64) + Send>;

#[derive(Debug, Clone)]
pub struct DrainConfig {
    /// How long a record rests at least before it is written; at most about twice as long.
    pub linger: Duration,
    /// Records and bytes of one transaction. Larger ones touch each page of an index less often.
    pub records_max: usize,
    pub bytes_max: usize,
    /// Bytes read ahead, of all journals together.
    pub ahead_bytes_max: usize,
    /// Days after which entries go out of the archives; 0: never.
    pub keep_days: u64,
    /// The same for the archives of rooms.
    pub rooms_keep_days: u64,
}

impl Default for DrainConfig {
    fn default() -> DrainConfig {
        DrainConfig {
            linger: Duration::from_millis(500),
            records_max: 4_000,
            bytes_max: 2 << 20,
            ahead_bytes_max: 8 << 20,
            keep_days: 0,
            rooms_keep_days: 0,
        }
    }
}

impl DrainConfig {
    /// Does anything ever go out of the archives by its age?
    fn retains(&self) -> bool {
        self.keep_days > 0 || self.rooms_keep_days > 0
    }

    /// What one pass is made of.
    fn purges(&self) -> VecDeque<Purge> {
        let parts = match self.keep_days == self.rooms_keep_days {
            true => vec![(self.keep_days, Whose::All)],
            false => vec![
                (self.keep_days, Whose::Users),
                (self.rooms_keep_days, Whose::Rooms),
            ],
        };
        let parts = parts.into_iter().filter(|(days, _)| *days > 0);
        parts
            .map(|(days, whose)| Purge::older_than(days, whose, false))
            .collect()
    }
}

/// How the drain is woken and stopped.
#[derive(Default)]
pub struct DrainHandle {
    /// For the sources.
    wake: Arc<Notify>,
    stop: Notify,
    stopping: std::cell::Cell<bool>,
    /// What is not drained by then stays in the journals.
    until: std::cell::Cell<Option<Instant>>,
}

impl DrainHandle {
    /// What can be drained at once still is, then the drain ends.
    pub fn stop(&self) {
        self.stopping.set(true);
        self.stop.notify_one();
        self.wake.notify_one();
    }

    /// The same, but no transaction begins later than this: the journals keep what is left for the next start.
    pub fn stop_within(&self, most: Duration) {
        self.until.set(Some(Instant::now() + most));
        self.stop();
    }

    fn is_over(&self) -> bool {
        self.until
            .get()
            .is_some_and(|until| Instant::now() >= until)
    }

    /// A pause that ends early when the drain is to stop.
    pub(super) async fn pause(&self, pause: Duration) {
        if !self.stopping.get() {
            let _ = tokio::time::timeout(pause, self.stop.notified()).await;
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.get()
    }
}

/// The drain with all it holds.
pub struct Drain {
    config: DrainConfig,
    feeds: Vec<Feed>,
    ahead: Ahead,
    sink: DrainedSink,
    counters: Arc<Counters>,
    /// Records of the next transaction at most; shrinks while a refused one is looked for.
    batch_max: usize,
    /// Transactions lost one after the other, while the server was there.
    lost: u32,
    /// Since when the database is away, for the log.
    down_since: Option<Instant>,
    retention: Retention,
}

/// What is too old is deleted when there is nothing to write: now and then a whole pass, in small steps.
struct Retention {
    /// What is left of the pass.
    purges: VecDeque<Purge>,
    next: Instant,
}

/// From the end of one pass to the next one.
const PASS_EVERY: Duration = Duration::from_secs(3600);
/// Of the time that a step took, its pause: others use the disk, too.
const STEP_PAUSE: u32 = 4;
const STEP_PAUSE_MIN: Duration = Duration::from_millis(20);

impl Drain {
    pub fn new(
        config: DrainConfig,
        sources: Vec<Box<dyn Source>>,
        sink: DrainedSink,
        counters: Arc<Counters>,
    ) -> Drain {
        Drain {
            batch_max: config.records_max,
            config,
            feeds: sources.into_iter().map(Feed::new).collect(),
            ahead: Ahead::default(),
            sink,
            counters,
            lost: 0,
            down_since: None,
            retention: Retention {
                purges: VecDeque::new(),
                next: Instant::now(),
            },
        }
    }

    /// Deletes some of what is too old, if anything may be; how long to leave the database alone then.
    async fn retain(&mut self, sql: &mut Sql) -> Result<Option<Duration>, SqlError> {
        if self.retention.purges.is_empty() && Instant::now() >= self.retention.next {
            self.retention.purges = self.config.purges();
        }
        let Some(purge) = self.retention.purges.front_mut() else {
            return Ok(None);
        };
        let (begun, before) = (Instant::now(), purge.gone);
        sql.purge_step(purge).await?;
        self.counters.purged.fetch_add(purge.gone - before, Relaxed);
        if purge.is_over() {
            if purge.gone > 0 {
                let (entries, waiting) = (purge.gone, purge.kept);
                tracing::info!(entries, waiting, "the archives have lost what was too old");
            }
            self.retention.purges.pop_front();
            self.retention.next = Instant::now() + PASS_EVERY;
        }
        let pause = begun.elapsed() * STEP_PAUSE;
        Ok(Some(pause.max(STEP_PAUSE_MIN)))
    }

    /// Drains until it is told to stop. The connection need not be made yet, the schema must be there.
    pub async fn run(mut self, mut sql: Sql, handle: &DrainHandle) {
        for feed in &self.feeds {
            feed.source.wake(handle.wake.clone());
        }
        let mut pause = BACKOFF_MIN;
        let mut synced = false;
        loop {
            let tried = async {
                if !synced || !sql.is_connected() {
                    if !sql.is_connected() {
                        sql.reconnect().await?;
                    }
                    self.go_on_from(&sql.positions().await?);
                    synced = true;
                }
                self.turn(&mut sql, handle).await
            };
            match tried.await {
                Ok(Turn::Worked) => {
                    self.is_up();
                    pause = BACKOFF_MIN;
                }
                Ok(Turn::Ended) => break,
                Err(error) => {
                    // Whether a lost transaction was committed only the database knows.
                    synced = false;
                    self.is_down(&error);
                    if handle.is_stopping() {
                        break;
                    }
                    handle.pause(pause).await;
                    pause = (pause * 2).min(BACKOFF_MAX);
                }
            }
        }
        sql.close().await;
    }

    /// One transaction, or the wait for one.
    async fn turn(&mut self, sql: &mut Sql, handle: &DrainHandle) -> Result<Turn, SqlError> {
        self.read()?;
        let all = handle.is_stopping();
        if all && handle.is_over() {
            return Ok(Turn::Ended);
        }
        let batch = self.batch(all);
        if !batch.is_empty() {
            self.write(sql, &batch).await?;
            return Ok(Turn::Worked);
        }
        let records_rest = self.feeds.iter().any(|feed| feed.head().is_some());
        if all && !records_rest {
            return Ok(Turn::Ended);
        }
        if !all && let Some(pause) = self.retain(sql).await? {
            handle.pause(pause).await;
            return Ok(Turn::Worked);
        }
        if records_rest {
            handle.pause(self.config.linger).await;
            return Ok(Turn::Worked);
        }
        if !sql.purge().await? {
            self.is_up();
            let waken = handle.wake.notified();
            match self.config.retains() {
                false => waken.await,
                true => {
                    let pass = self.retention.next;
                    if tokio::time::timeout_at(pass, waken).await.is_err() {
                        return Ok(Turn::Worked);
                    }
                }
            }
            // What comes together is read together: not once for each of the journals' groups.
            handle.pause(self.config.linger).await;
        }
        Ok(Turn::Worked)
    }

    /// Applies a batch, or finds the record in it that is refused.
    async fn write(&mut self, sql: &mut Sql, batch: &[Place]) -> Result<(), SqlError> {
        let entries: Vec<Entry<'_>> = gently(batch).map_while(|at| self.entry(*at)).collect();
        let done = match entries.len() {
            // Not even the drain can read the first one.
            0 => Err(SqlError::refused("the record cannot be read")),
            _ => {
                let begun = Instant::now();
                let done = sql.apply(&entries, &self.ahead).await;
                let timings = &self.counters.timings;
                timings.record(Stage::SqlBatch, begun.elapsed());
                done
            }
        };
        let count = entries.len();
        drop(entries);
        match done {
            Ok(outcome) => {
                self.lost = 0;
                self.counters.rows.fetch_add(outcome.rows, Relaxed);
                self.counters.skipped.fetch_add(outcome.skipped, Relaxed);
                for id in gently(&outcome.marked) {
                    self.ahead.done.remove(id);
                    self.ahead.dropped.remove(id);
                    self.ahead.never_written.remove(id);
                }
                // A mark of the same batch is handled there; these marks are still to come.
                self.ahead.never_written.extend(outcome.never_written);
                self.finish(&batch[..count]);
                self.batch_max = (self.batch_max * 2).min(self.config.records_max);
                Ok(())
            }
            Err(error) if error.trouble == Trouble::Refused && count > 1 => {
                self.batch_max = count / 2;
                Ok(())
            }
            Err(error) if error.trouble == Trouble::Refused => {
                self.put_aside(sql, batch[0], &error).await
            }
            Err(error) => {
                if error.trouble == Trouble::Lost {
                    self.lost += 1;
                    if self.lost >= LOST_MAX && count > 1 {
                        self.lost = 0;
                        self.batch_max = count / 2;
                    }
                }
                Err(error)
            }
        }
    }

    async fn put_aside(
        &mut self,
        sql: &mut Sql,
        at: Place,
        error: &SqlError,
    ) -> Result<(), SqlError> {
        let feed = &self.feeds[at.feed];
        let record = &feed.chunks[at.chunk].records[at.record];
        let payload = &feed.chunks[at.chunk].bytes[record.place.clone()];
        let position = feed.position(record.seq);
        sql.quarantine(position, payload, &error.text).await?;
        tracing::error!(journal = position.journal, seq = record.seq, bytes = payload.len(), reason = %error,
            "the database refuses a record of the journal; it is kept in its table `quarantine`");
        self.counters.quarantined.fetch_add(1, Relaxed);
        self.batch_max = (self.batch_max * 2).min(self.config.records_max);
        self.finish(&[at]);
        Ok(())
    }

    /// Takes out what is in the database, and tells.
    fn finish(&mut self, batch: &[Place]) {
        self.counters.drained.fetch_add(batch.len() as u64, Relaxed);
        let mut reached: Vec<Option<u64>> = vec![None; self.feeds.len()];
        for at in batch {
            let feed = &mut self.feeds[at.feed];
            reached[at.feed] = Some(feed.chunks[at.chunk].records[at.record].seq);
        }
        for (feed, seq) in self.feeds.iter_mut().zip(reached) {
            if let Some(seq) = seq {
                feed.drop_up_to(seq);
                feed.source.drained(seq);
                (self.sink)(feed.source.journal(), seq);
            }
        }
        if self.feeds.iter().all(|feed| feed.head().is_none()) {
            // No mark is left to come, also none of those that another connection has applied.
            self.ahead = Ahead::default();
        }
        self.count_waiting();
    }

    /// Goes on from the positions that the database has.
    fn go_on_from(&mut self, positions: &[Position]) {
        for feed in &mut self.feeds {
            let own = |one: &&Position| **one == feed.position(one.seq);
            let seq = positions.iter().find(own).map_or(0, |one| one.seq);
            if feed.drained.is_none_or(|drained| drained < seq) {
                feed.drained = Some(seq);
                feed.drop_up_to(seq);
                feed.read = feed.read.max(seq);
                feed.source.drained(seq);
                (self.sink)(feed.source.journal(), seq);
            }
        }
    }

    /// Reads what may be drained, as far as there is room. Each journal has its own, so that the oldest record of all
    /// is always among those that were read; for the same reason nothing is drained while one cannot be read.
    fn read(&mut self) -> Result<(), SqlError> {
        let bytes_max = self.config.ahead_bytes_max / self.feeds.len().max(1);
        for feed in &mut self.feeds {
            let mut bytes = feed.bytes();
            while bytes < bytes_max {
                match feed.read_more(&mut self.ahead)? {
                    0 => break,
                    read => bytes += read,
                }
            }
        }
        self.count_waiting();
        Ok(())
    }

    /// The places of the next batch: those that rested long enough, oldest ids first, each journal in its order. None goes
    /// before an older one of another journal, which may have to rest still.
    fn batch(&self, all: bool) -> Vec<Place> {
        let buffered: usize = self.feeds.iter().map(Feed::bytes).sum();
        let records: usize = self.feeds.iter().map(Feed::len).sum();
        let ripe = match () {
            // With a backlog nothing rests: what is to be merged lies in it.
            _ if all || buffered >= self.config.bytes_max || records >= self.config.records_max => {
                Instant::now()
            }
            _ => match Instant::now().checked_sub(self.config.linger) {
                Some(ripe) => ripe,
                None => return Vec::new(),
            },
        };
        let mut heads: Vec<Option<Place>> =
            (0..self.feeds.len()).map(|feed| self.first(feed)).collect();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < self.batch_max {
            let oldest = heads.iter().flatten();
            let oldest = oldest.min_by_key(|at| self.record(**at).map(|record| record.order));
            let Some(at) = oldest.copied() else { break };
            let chunk = &self.feeds[at.feed].chunks[at.chunk];
            let record = &chunk.records[at.record];
            if chunk.read_at > ripe {
                break;
            }
            bytes += record.place.len();
            if bytes > self.config.bytes_max && !batch.is_empty() {
                break;
            }
            batch.push(at);
            heads[at.feed] = self.behind(at);
        }
        batch
    }

    fn first(&self, feed: usize) -> Option<Place> {
        let chunk = self.feeds[feed].chunks.front()?;
        let at = Place {
            feed,
            chunk: 0,
            record: chunk.next,
        };
        self.record(at).map(|_| at)
    }

    fn behind(&self, at: Place) -> Option<Place> {
        let chunk = &self.feeds[at.feed].chunks[at.chunk];
        let next = match at.record + 1 < chunk.records.len() {
            true => Place {
                record: at.record + 1,
                ..at
            },
            false => Place {
                chunk: at.chunk + 1,
                record: 0,
                ..at
            },
        };
        self.record(next).map(|_| next)
    }

    fn record(&self, at: Place) -> Option<&Record> {
        let chunk = self.feeds[at.feed].chunks.get(at.chunk)?;
        chunk.records.get(at.record)
    }

    /// `None`: the payload is none that this release can read.
    fn entry(&self, at: Place) -> Option<Entry<'_>> {
        let feed = &self.feeds[at.feed];
        let chunk = &feed.chunks[at.chunk];
        let record = &chunk.records[at.record];
        let payload = &chunk.bytes[record.place.clone()];
        Some(Entry {
            at: feed.position(record.seq),
            change: ArchivedChange::access(payload).ok()?,
        })
    }

    fn count_waiting(&self) {
        let waiting = self.feeds.iter().map(Feed::len).sum();
        self.counters.drain_waiting.store(waiting, Relaxed);
    }

    fn is_up(&mut self) {
        self.counters.up.store(true, Relaxed);
        if let Some(since) = self.down_since.take() {
            tracing::info!(
                seconds = since.elapsed().as_secs(),
                "the journal is drained again"
            );
        }
    }

    fn is_down(&mut self, error: &SqlError) {
        self.counters.up.store(false, Relaxed);
        self.counters.retries.fetch_add(1, Relaxed);
        if self.down_since.is_none() {
            self.down_since = Some(Instant::now());
            tracing::warn!(%error, "nothing is drained into the database; what is accepted stays in the journal");
        }
    }
}

enum Turn {
    Worked,
    Ended,
}

/// Where a record lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    feed: usize,
    chunk: usize,
    record: usize,
}

/// A source and what was read from it.
struct Feed {
    source: Box<dyn Source>,
    /// `None`: the database was not asked yet.
    drained: Option<u64>,
    read: u64,
    /// Of the last record read.
    order: u64,
    chunks: VecDeque<Chunk>,
}

struct Chunk {
    read_at: Instant,
    bytes: Vec<u8>,
    records: Vec<Record>,
    /// The first one that is not drained.
    next: usize,
}

struct Record {
    seq: u64,
    /// See [`ArchivedChange::order`].
    order: u64,
    place: Range<usize>,
}

impl Feed {
    fn new(source: Box<dyn Source>) -> Feed {
        Feed {
            source,
            drained: None,
            read: 0,
            order: 0,
            chunks: VecDeque::new(),
        }
    }

    fn position(&self, seq: u64) -> Position {
        Position {
            identity: self.source.identity(),
            journal: self.source.journal(),
            seq,
        }
    }

    fn head(&self) -> Option<&Record> {
        let chunk = self.chunks.front()?;
        chunk.records.get(chunk.next)
    }

    fn bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.bytes.len()).sum()
    }

    fn len(&self) -> usize {
        let left = |chunk: &Chunk| chunk.records.len() - chunk.next;
        self.chunks.iter().map(left).sum()
    }

    /// Reads some records, notes the marks among them; how many bytes.
    fn read_more(&mut self, ahead: &mut Ahead) -> Result<usize, SqlError> {
        let limit = self.source.limit();
        if limit <= self.read {
            return Ok(0);
        }
        let (mut bytes, mut found) = (Vec::new(), Vec::new());
        self.source
            .read(self.read + 1..=limit, READ_BYTES, &mut bytes, &mut found)
            .map_err(|error| {
                let journal = self.source.journal();
                SqlError::lost(format!("journal {journal} cannot be read: {error}"))
            })?;
        let Some((last, _)) = found.last() else {
            return Ok(0);
        };
        self.read = *last;
        let records = gently(found).map(|(seq, place)| {
            let change = ArchivedChange::access(&bytes[place.clone()]);
            if let Ok(ArchivedChange::Marks(marks)) = change {
                ahead
                    .done
                    .extend(marks.done.iter().map(|id| id.to_native()));
                let dropped = marks.dropped.iter().map(|id| id.to_native());
                ahead.dropped.extend(dropped);
            }
            self.order = change.map_or(self.order, |change| change.order(self.order));
            Record {
                seq,
                order: self.order,
                place,
            }
        });
        let records = records.collect();
        let len = bytes.len();
        self.chunks.push_back(Chunk {
            read_at: Instant::now(),
            bytes,
            records,
            next: 0,
        });
        // Empty payloads count, too, or a source of them would be read without end.
        Ok(len.max(1))
    }

    fn drop_up_to(&mut self, seq: u64) {
        self.drained = Some(self.drained.unwrap_or(0).max(seq));
        while let Some(chunk) = self.chunks.front_mut() {
            while chunk
                .records
                .get(chunk.next)
                .is_some_and(|one| one.seq <= seq)
            {
                chunk.next += 1;
            }
            if chunk.next < chunk.records.len() {
                break;
            }
            self.chunks.pop_front();
        }
    }
}

impl ArchivedChange<'_> {
    /// By what journals are merged: its id or revision, which grow with time; marks come with what is before them in their
    /// journal, but behind the messages that they name, in whichever journal those are.
    pub(crate) fn order(&self, before: u64) -> u64 {
        let behind = |ids: &mut dyn Iterator<Item = u64>| ids.max().map_or(0, |id| id + 1);
        match self {
            ArchivedChange::Message(message) => message.id.to_native(),
            ArchivedChange::AddUser { revision, .. }
            | ArchivedChange::PutUser { revision, .. }
            | ArchivedChange::RemoveUser { revision, .. }
            | ArchivedChange::PutDocument { revision, .. }
            | ArchivedChange::PutLast { revision, .. } => revision.to_native(),
            ArchivedChange::Marks(marks) => {
                let ids = marks.done.iter().chain(marks.dropped.iter());
                behind(&mut ids.map(|id| id.to_native())).max(before)
            }
            ArchivedChange::Retract(retract) => retract.id.to_native(),
            ArchivedChange::Decided { ids } | ArchivedChange::Unarchived { ids } => {
                behind(&mut ids.iter().map(|id| id.to_native())).max(before)
            }
        }
    }
}

/// A journal of this blade.
impl Source for super::journal::Reader {
    fn journal(&self) -> u16 {
        self.shard()
    }

    fn identity(&self) -> u64 {
        self.identity()
    }

    fn read(
        &mut self,
        wanted: RangeInclusive<u64>,
        bytes_max: usize,
        bytes: &mut Vec<u8>,
        records: &mut Vec<(u64, Range<usize>)>,
    ) -> Result<(), String> {
        self.read(wanted, bytes_max, bytes, records)
            .map_err(|error| error.to_string())
    }

    fn limit(&self) -> u64 {
        self.committed()
    }

    fn drained(&self, seq: u64) {
        self.drained(seq);
    }

    fn wake(&self, waker: Arc<Notify>) {
        self.on_progress(move || waker.notify_one());
    }
}
