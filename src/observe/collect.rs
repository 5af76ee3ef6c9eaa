//! The one who collects. In: histograms that shards and lane hand over when asked. Out: totals, and the last half minute or
//! so, for whoever looks. Promise: a shard gives away pointers and gets an empty set back; adding up, sorting and writing
//! happen on this thread. A shard that does not answer holds up nobody: its figures come with the next look.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use hdrhistogram::Histogram;

use super::histogram::{Histograms, Recorded, histogram};
use super::page::BUCKETS_US;
use super::stage::{Place, Stage};

/// Without anybody looking, it is collected so often.
const PERIOD: Duration = Duration::from_secs(5);
/// What was collected within that is not asked for again.
const FRESH: Duration = Duration::from_millis(50);
/// How long an answer is waited for.
const ANSWERED_WITHIN: Duration = Duration::from_millis(500);
/// Quantiles are of this long and what has come of the next half.
pub const HALF: Duration = Duration::from_secs(30);
/// Looks that wait; more are refused.
const LOOKS_MAX: usize = 64;

/// Has a recorder hand over: it sends what it has with the number given, and goes on with the empty set. `false`: it cannot
/// be asked now.
pub type Ask = Box<dyn Fn(usize, Histograms, &Sender<(usize, Histograms)>) -> bool + Send>;

/// Whoever records.
pub struct Recorder {
    /// `None`: the lane.
    pub shard: Option<usize>,
    pub ask: Ask,
}

/// Runs on the collecting thread.
type Look = Box<dyn FnOnce(&Collected) + Send>;

/// Gets all that is collected, each piece once: for logs of intervals.
pub trait Follow: Send {
    /// A piece of `shard` (`None`: the lane).
    fn piece(&mut self, shard: Option<usize>, stage: Stage, piece: &Recorded);
    /// After each collection; when it wants to be called again.
    fn turn(&mut self) -> Duration;
    /// No more comes.
    fn end(&mut self) {}
}

enum Message {
    Look(Look),
    Stop,
}

/// The way to the collecting thread.
#[derive(Clone)]
pub struct Observer {
    messages: Sender<Message>,
    handed: Sender<(usize, Histograms)>,
}

/// The figures of one recorder.
pub struct Of {
    /// `None`: the lane.
    pub shard: Option<usize>,
    series: Vec<Series>,
}

/// What was recorded of one stage since the start.
pub struct Series {
    pub total: Histogram<u64>,
    pub sum_us: u64,
    recent: [Histogram<u32>; 2],
}

/// All figures.
pub struct Collected {
    of: Vec<Of>,
}

impl Observer {
    /// Starts the thread; `begin` runs on it first.
    pub fn start(
        recorders: Vec<Recorder>,
        followers: Vec<Box<dyn Follow>>,
        begin: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<(Observer, JoinHandle<()>)> {
        let (messages, asked) = bounded(LOOKS_MAX);
        let (handed, pieces) = unbounded();
        let collector = Collector {
            spare: recorders.iter().map(|_| Some(Histograms::new())).collect(),
            collected: Collected::new(recorders.iter().map(|r| r.shard)),
            recorders,
            handed: handed.clone(),
            pieces,
            followers,
            at: None,
            half_since: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name("observer".into())
            .spawn(move || {
                begin();
                collector.run(&asked);
            })?;
        Ok((Observer { messages, handed }, thread))
    }

    /// Runs `look` on the collecting thread, with figures of this moment. `false`: too many look already.
    pub fn look(&self, look: impl FnOnce(&Collected) + Send + 'static) -> bool {
        let message = Message::Look(Box::new(look));
        self.messages.try_send(message).is_ok()
    }

    /// What a recorder that ends has not handed over yet.
    pub fn give(&self, n: usize, histograms: Histograms) {
        // nobody collects any more: then nobody looks either
        let _ = self.handed.send((n, histograms));
    }

    /// Shards have ended: the thread takes what they gave, and ends. Wait for it to have logs complete.
    pub fn stop(&self) {
        let _ = self.messages.send_timeout(Message::Stop, ANSWERED_WITHIN);
    }
}

impl Collected {
    fn new(shards: impl Iterator<Item = Option<usize>>) -> Collected {
        let of = shards.map(|shard| Of {
            shard,
            series: Stage::ALL.iter().map(|_| Series::new()).collect(),
        });
        Collected { of: of.collect() }
    }

    /// Those who record the stage.
    pub fn of(&self, stage: Stage) -> impl Iterator<Item = (Option<usize>, &Series)> {
        let lane = stage.place() == Place::Lane;
        self.of
            .iter()
            .filter(move |of| of.shard.is_none() == lane)
            .map(move |of| (of.shard, &of.series[stage as usize]))
    }

    fn add(&mut self, n: usize, stage: Stage, piece: &Recorded) {
        let series = &mut self.of[n].series[stage as usize];
        for value in piece.histogram.iter_recorded() {
            let (value, count) = (value.value_iterated_to(), value.count_at_value());
            series.total.saturating_record_n(value, u64::from(count));
        }
        series.sum_us += piece.sum_us;
        series.recent[0]
            .add(&piece.histogram)
            .expect("all have the same bounds");
    }

    fn turn_half(&mut self) {
        for series in self.of.iter_mut().flat_map(|of| &mut of.series) {
            series.recent.swap(0, 1);
            if !series.recent[0].is_empty() {
                series.recent[0].reset();
            }
        }
    }
}

impl Series {
    fn new() -> Series {
        Series {
            total: histogram(),
            sum_us: 0,
            recent: [histogram(), histogram()],
        }
    }

    /// What was recorded in the last half minute to minute.
    pub fn recent(&self) -> Histogram<u32> {
        let mut both = self.recent[0].clone();
        both.add(&self.recent[1]).expect("all have the same bounds");
        both
    }

    /// How many lie in each bucket: see [`BUCKETS_US`].
    pub fn buckets(&self) -> Vec<u64> {
        let mut counts = vec![0; BUCKETS_US.len() + 1];
        for value in self.total.iter_recorded() {
            // the lowest of the values that it stands for: a duration of exactly a bound belongs below it
            let us = self.total.lowest_equivalent(value.value_iterated_to());
            let at = BUCKETS_US.partition_point(|bound| *bound < us);
            counts[at] += value.count_at_value();
        }
        counts
    }
}

struct Collector {
    recorders: Vec<Recorder>,
    /// Those that are not at their recorder's.
    spare: Vec<Option<Histograms>>,
    handed: Sender<(usize, Histograms)>,
    pieces: Receiver<(usize, Histograms)>,
    collected: Collected,
    followers: Vec<Box<dyn Follow>>,
    at: Option<Instant>,
    half_since: Instant,
}

impl Collector {
    fn run(mut self, messages: &Receiver<Message>) {
        let mut next = Instant::now() + PERIOD;
        loop {
            match messages.recv_deadline(next) {
                Ok(Message::Look(look)) => {
                    self.collect(|_| true);
                    look(&self.collected);
                }
                Err(RecvTimeoutError::Timeout) => self.collect(|_| true),
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            }
            let again = self.followers.iter_mut().map(|f| f.turn()).min();
            next = Instant::now() + again.unwrap_or(PERIOD).min(PERIOD);
        }
        self.at = None;
        // shards have ended, and given what they had
        self.collect(|recorder| recorder.shard.is_none());
        while let Ok((n, histograms)) = self.pieces.try_recv() {
            self.take(n, histograms);
        }
        for follower in &mut self.followers {
            follower.end();
        }
    }

    fn collect(&mut self, wanted: impl Fn(&Recorder) -> bool) {
        let now = Instant::now();
        if self.at.is_some_and(|at| now.duration_since(at) < FRESH) {
            return;
        }
        if now.duration_since(self.half_since) >= HALF {
            self.half_since = now;
            self.collected.turn_half();
        }
        let mut asked = 0;
        for (n, recorder) in self.recorders.iter().enumerate() {
            if !wanted(recorder) {
                continue;
            }
            if let Some(empty) = self.spare[n].take() {
                match (recorder.ask)(n, empty, &self.handed) {
                    true => asked += 1,
                    // it went the way of the question
                    false => self.spare[n] = Some(Histograms::new()),
                }
            }
        }
        let until = now + ANSWERED_WITHIN;
        while asked > 0 {
            let Ok((n, histograms)) = self.pieces.recv_deadline(until) else {
                break;
            };
            asked -= 1;
            self.take(n, histograms);
        }
        self.at = Some(Instant::now());
    }

    fn take(&mut self, n: usize, mut histograms: Histograms) {
        for stage in Stage::ALL {
            let piece = histograms.get(stage);
            if piece.histogram.is_empty() {
                continue;
            }
            self.collected.add(n, stage, piece);
            for follower in &mut self.followers {
                follower.piece(self.recorders[n].shard, stage, piece);
            }
        }
        histograms.clear();
        self.spare[n] = Some(histograms);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A recorder that is not a thread of its own.
    fn recorder(shard: Option<usize>) -> (Recorder, Arc<Mutex<Histograms>>) {
        let all = Arc::new(Mutex::new(Histograms::new()));
        let own = all.clone();
        let ask: Ask = Box::new(move |n, empty, reply| {
            let full = std::mem::replace(&mut *own.lock().unwrap(), empty);
            reply.send((n, full)).is_ok()
        });
        (Recorder { shard, ask }, all)
    }

    fn looked<T: Send + 'static>(
        observer: &Observer,
        look: impl Fn(&Collected) -> T + Send + 'static,
    ) -> T {
        let (tell, told) = bounded(1);
        assert!(observer.look(move |all| tell.send(look(all)).unwrap()));
        told.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn everything_that_was_recorded_is_in_the_totals_once() {
        let (first, one) = recorder(Some(0));
        let (second, two) = recorder(Some(1));
        let (lane, _) = recorder(None);
        let (observer, thread) =
            Observer::start(vec![first, second, lane], Vec::new(), || {}).unwrap();
        let count = |observer: &Observer| {
            looked(observer, |all| -> Vec<(Option<usize>, u64, u64)> {
                let of = all.of(Stage::Login);
                of.map(|(shard, s)| (shard, s.total.len(), s.sum_us))
                    .collect()
            })
        };
        for round in 1..=3 {
            one.lock().unwrap().record(Stage::Login, 100, 2);
            two.lock().unwrap().record(Stage::Login, 7, 1);
            std::thread::sleep(FRESH); // what is younger than that is not asked for again
            let wanted = vec![
                (Some(0), 2 * round, 200 * round),
                (Some(1), round, 7 * round),
            ];
            assert_eq!(count(&observer), wanted);
        }
        assert_eq!(looked(&observer, |all| all.of(Stage::SqlLoad).count()), 1);
        observer.stop();
        thread.join().unwrap();
    }

    #[test]
    fn a_recorder_that_does_not_answer_holds_up_nobody() {
        let (good, own) = recorder(Some(0));
        let stuck = Recorder {
            shard: Some(1),
            ask: Box::new(|_, empty, reply| {
                // never answered, and its histograms are with it
                std::mem::forget((empty, reply.clone()));
                true
            }),
        };
        let (observer, _) = Observer::start(vec![stuck, good], Vec::new(), || {}).unwrap();
        own.lock().unwrap().record(Stage::Login, 5, 1);
        let counts = looked(&observer, |all| -> Vec<u64> {
            all.of(Stage::Login).map(|(_, s)| s.total.len()).collect()
        });
        assert_eq!(counts, [0, 1]);
    }

    #[test]
    fn a_duration_of_exactly_a_bound_lies_below_it() {
        let mut collected = Collected::new([Some(0)].into_iter());
        let mut histograms = Histograms::new();
        for bound in BUCKETS_US {
            histograms.record(Stage::Login, bound, 1);
        }
        histograms.record(Stage::Login, 59_000_000, 5);
        collected.add(0, Stage::Login, histograms.get(Stage::Login));
        let (_, series) = collected.of(Stage::Login).next().unwrap();
        let mut wanted = vec![1; BUCKETS_US.len()];
        wanted.push(5);
        assert_eq!(series.buckets(), wanted);
    }

    #[test]
    fn what_is_older_than_a_minute_is_not_recent() {
        let mut collected = Collected::new([Some(0)].into_iter());
        let mut histograms = Histograms::new();
        histograms.record(Stage::Login, 7, 1);
        collected.add(0, Stage::Login, histograms.get(Stage::Login));
        let recent = |c: &Collected| {
            c.of(Stage::Login)
                .next()
                .map(|(_, s)| s.recent().len())
                .unwrap()
        };
        collected.turn_half();
        assert_eq!(recent(&collected), 1);
        collected.turn_half();
        assert_eq!(recent(&collected), 0);
    }
}
