//! Latencies over time: a histogram for each second and kind of work.
//!
//! In: what the workers record, by a [`Recorder`] each, which sends the histograms of a second when it is over. Out: a
//! [`Timeline`] with a [`Point`] for each second, for the progress line, the plots and the HdrHistogram log (V2, one
//! tag for each kind). A second counts what was finished in it; a stall of five seconds shows in the second it ended, with
//! the five seconds as its latency.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use crate::report::{self, Histogram};

/// Histograms under way from the workers; more of them means that nobody looks, and they are dropped.
const UNDER_WAY_MAX: usize = 256;

/// What a latency is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Login,
    Logout,
    Registration,
    Message,
    Acknowledgement,
    Presence,
    Resumption,
    /// Of an archive.
    Page,
    /// From due to written: the generator's own.
    Lag,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::Login,
        Kind::Logout,
        Kind::Registration,
        Kind::Message,
        Kind::Acknowledgement,
        Kind::Presence,
        Kind::Resumption,
        Kind::Page,
        Kind::Lag,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Login => "login",
            Kind::Logout => "logout",
            Kind::Registration => "registration",
            Kind::Message => "message",
            Kind::Acknowledgement => "ack",
            Kind::Presence => "presence",
            Kind::Resumption => "resumption",
            Kind::Page => "page",
            Kind::Lag => "lag",
        }
    }
}

/// When the process started, by both clocks: the zero of all times of a run.
static START: LazyLock<(Instant, SystemTime)> =
    LazyLock::new(|| (Instant::now(), SystemTime::now()));

/// Seconds since the process started.
pub fn seconds(at: Instant) -> f64 {
    at.saturating_duration_since(START.0).as_secs_f64()
}

/// When the run began, for people (UTC).
pub fn started_at() -> String {
    let since_epoch = START
        .1
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = since_epoch.as_secs();
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (time / 3600, time / 60 % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02} UTC")
}

/// The date of a day since 1970-01-01 in the Gregorian calendar.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= months[month] {
        days -= months[month];
        month += 1;
    }
    (year, month as u64 + 1, days + 1)
}

/// The histogram of one kind and interval, of one worker.
struct Interval {
    kind: Kind,
    number: u64,
    histogram: Histogram,
}

/// A worker's end. Records without locks; sends at most a histogram for each kind and interval.
pub struct Recorder {
    interval: Duration,
    sender: SyncSender<Interval>,
    number: u64,
    histograms: [Option<Box<Histogram>>; Kind::ALL.len()],
}

impl Recorder {
    pub fn record(&mut self, kind: Kind, now: Instant, latency: Duration) {
        self.turn(now);
        let histogram = &mut self.histograms[kind as usize];
        histogram
            .get_or_insert_with(|| Box::new(report::histogram()))
            .saturating_record((latency.as_nanos() as u64).max(1));
    }

    /// Sends what is over.
    pub fn turn(&mut self, now: Instant) {
        let number = number(now, self.interval);
        if number != self.number {
            self.send();
            self.number = number;
        }
    }

    fn send(&mut self) {
        for kind in Kind::ALL {
            if let Some(histogram) = self.histograms[kind as usize].take() {
                let interval = Interval {
                    kind,
                    number: self.number,
                    histogram: *histogram,
                };
                // full, or the fleet has gone: the sums of the run are kept elsewhere
                let _ = self.sender.try_send(interval);
            }
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.send();
    }
}

/// Some figures of an interval, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Point {
    /// From the start of the run.
    pub second: f64,
    pub count: u64,
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

/// The fleet's end.
pub struct Timeline {
    interval: Duration,
    keep_log: bool,
    sender: SyncSender<Interval>,
    receiver: Receiver<Interval>,
    /// Of intervals that may not be over for all workers.
    open: BTreeMap<(u64, Kind), Histogram>,
    points: BTreeMap<Kind, Vec<Point>>,
    /// Lines of the log, by interval.
    log: Vec<(u64, Vec<u8>)>,
    serializer: V2DeflateSerializer,
}

fn number(at: Instant, interval: Duration) -> u64 {
    (at.saturating_duration_since(START.0).as_nanos() / interval.as_nanos().max(1)) as u64
}

impl Timeline {
    /// `keep_log`: histograms too, not only some figures of each.
    pub fn new(interval: Duration, keep_log: bool) -> Timeline {
        LazyLock::force(&START);
        let (sender, receiver) = sync_channel(UNDER_WAY_MAX);
        Timeline {
            interval,
            keep_log,
            sender,
            receiver,
            open: BTreeMap::new(),
            points: BTreeMap::new(),
            log: Vec::new(),
            serializer: V2DeflateSerializer::new(),
        }
    }

    pub fn recorder(&self) -> Recorder {
        Recorder {
            interval: self.interval,
            sender: self.sender.clone(),
            number: number(Instant::now(), self.interval),
            histograms: Default::default(),
        }
    }

    /// Takes in what the workers have sent, and closes what is over.
    pub fn collect(&mut self) {
        self.take_in();
        // a worker that slept through the end of an interval sends it at its next turn
        let over = number(Instant::now(), self.interval).saturating_sub(2);
        while let Some(entry) = self.open.first_entry()
            && entry.key().0 < over
        {
            let ((number, kind), histogram) = entry.remove_entry();
            self.close(number, kind, &histogram);
        }
    }

    /// The workers have ended.
    pub fn finish(&mut self) {
        self.take_in();
        for ((number, kind), histogram) in std::mem::take(&mut self.open) {
            self.close(number, kind, &histogram);
        }
    }

    fn take_in(&mut self) {
        for interval in self.receiver.try_iter() {
            self.open
                .entry((interval.number, interval.kind))
                .and_modify(|sum| {
                    sum.add(&interval.histogram)
                        .expect("histograms have the same bounds")
                })
                .or_insert(interval.histogram);
        }
    }

    fn close(&mut self, number: u64, kind: Kind, histogram: &Histogram) {
        let start = self.interval * u32::try_from(number).unwrap_or(u32::MAX);
        self.points.entry(kind).or_default().push(Point {
            second: start.as_secs_f64(),
            count: histogram.len(),
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            max: histogram.max(),
        });
        if self.keep_log {
            // without headers it writes a line and nothing else
            let mut line = Vec::new();
            let written = IntervalLogWriterBuilder::new()
                .begin_log_with(&mut line, &mut self.serializer)
                .map(|mut log| {
                    log.write_histogram(histogram, start, self.interval, Tag::new(kind.name()))
                });
            debug_assert!(matches!(written, Ok(Ok(()))), "a vector takes it");
            self.log.push((number, line));
        }
    }

    /// The newest finished interval of a kind.
    pub fn latest(&self, kind: Kind) -> Option<&Point> {
        self.points.get(&kind)?.last()
    }

    pub fn points(&self) -> impl Iterator<Item = (Kind, &[Point])> {
        self.points
            .iter()
            .map(|(kind, points)| (*kind, points.as_slice()))
    }

    pub fn interval(&self) -> Duration {
        self.interval
    }
}

/// HdrHistogram interval log, version 2, of all timelines: values are nanoseconds.
pub fn write_log(out: &mut impl Write, timelines: &[Timeline], what: &str) -> io::Result<()> {
    writeln!(out, "#[Histogram log format version 1.3]")?;
    writeln!(out, "#{what}; values in nanoseconds")?;
    let since_epoch = START.1.duration_since(SystemTime::UNIX_EPOCH);
    let since_epoch = since_epoch.unwrap_or_default().as_secs_f64();
    writeln!(out, "#[StartTime: {since_epoch:.3} (seconds since epoch)]")?;
    writeln!(out, "#[BaseTime: {since_epoch:.3} (seconds since epoch)]")?;
    writeln!(
        out,
        "\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_Histogram\""
    )?;
    // in the order of their start, as readers expect
    let mut lines: Vec<_> = timelines
        .iter()
        .flat_map(|timeline| &timeline.log)
        .collect();
    lines.sort_by_key(|(number, _)| *number);
    lines.iter().try_for_each(|(_, line)| out.write_all(line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    #[test]
    fn a_second_has_what_all_workers_recorded_in_it_and_the_log_keeps_it() {
        let interval = Duration::from_secs(1);
        let mut timeline = Timeline::new(interval, true);
        let start = START.0;
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut workers = [timeline.recorder(), timeline.recorder()];
        for worker in &mut workers {
            worker.number = 0;
            worker.record(Kind::Message, at(100), Duration::from_millis(2));
            worker.record(Kind::Message, at(999), Duration::from_millis(4));
            worker.record(Kind::Login, at(1500), Duration::from_millis(8));
        }
        drop(workers);
        timeline.finish();
        let points: Vec<_> = timeline.points().collect();
        let [(Kind::Login, logins), (Kind::Message, messages)] = points[..] else {
            panic!("{points:?}")
        };
        assert_eq!(
            (logins.len(), logins[0].count, logins[0].second),
            (1, 2, 1.0)
        );
        assert_eq!((messages.len(), messages[0].count), (1, 4));
        assert_eq!(messages[0].max / 1_000_000, 4);
        assert!(timeline.latest(Kind::Message).is_some() && timeline.latest(Kind::Lag).is_none());

        let mut log = Vec::new();
        write_log(&mut log, &[timeline], "test").unwrap();
        let mut tags = Vec::new();
        for entry in IntervalLogIterator::new(&log) {
            let LogEntry::Interval(line) = entry.unwrap() else {
                continue;
            };
            let bytes =
                base64::Engine::decode(&base64::prelude::BASE64_STANDARD, line.encoded_histogram());
            let histogram: Histogram = Deserializer::new()
                .deserialize(&mut bytes.unwrap().as_slice())
                .unwrap();
            let tag = line.tag().map(|tag| tag.as_str().to_owned());
            tags.push((
                tag.unwrap(),
                line.start_timestamp().as_secs(),
                histogram.len(),
            ));
        }
        tags.sort();
        assert_eq!(tags, [("login".into(), 1, 2), ("message".into(), 0, 4)]);
    }

    #[test]
    fn days_become_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_785), (2026, 11, 28));
    }

    #[test]
    fn an_interval_that_is_over_is_seen_while_the_run_goes_on() {
        let mut timeline = Timeline::new(Duration::from_millis(1), false);
        let mut worker = timeline.recorder();
        worker.record(Kind::Login, Instant::now(), Duration::from_millis(1));
        let deadline = Instant::now() + Duration::from_secs(10);
        while timeline.latest(Kind::Login).is_none() {
            assert!(Instant::now() < deadline);
            worker.turn(Instant::now());
            timeline.collect();
        }
        assert_eq!(timeline.latest(Kind::Login).unwrap().count, 1);
        assert!(timeline.log.is_empty());
    }
}
