//! Histogram logs, for those who want to see months later what one minute looked like. In: every piece that was collected. Out:
//! files in the HdrHistogram V2 interval format, one line for each stage and shard and interval (`Tag=login.shard0`), which
//! HdrHistogram's own tools and plotters read. Promise: written on the collecting thread; a disk that fails costs lines and a
//! warning, nothing else; old files are removed, so that the folder is bounded.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use super::collect::Follow;
use super::histogram::{Recorded, histogram};
use super::stage::Stage;

/// How files begin and end; between them stands when they were begun.
const PREFIX: &str = "nitro-";
const SUFFIX: &str = ".hlog";

/// Where, how often and how much.
#[derive(Clone, Debug)]
pub struct IntervalLogConfig {
    pub dir: PathBuf,
    pub interval: Duration,
    /// A file that has so many bytes is the last but one.
    pub file_bytes_max: u64,
    pub files_max: usize,
}

/// See the module's page.
pub struct IntervalLog {
    config: IntervalLogConfig,
    file: Option<(File, u64, SystemTime)>,
    /// What has come of this interval, by tag.
    open: Vec<(String, Histogram<u32>)>,
    since: Instant,
    since_unix: SystemTime,
    serializer: V2DeflateSerializer,
}

impl IntervalLog {
    /// Makes the folder. The error is a sentence.
    pub fn new(config: IntervalLogConfig) -> Result<IntervalLog, String> {
        fs::create_dir_all(&config.dir).map_err(|e| {
            format!(
                "histograms.dir: {}: {e}; name a folder that nitro may make and write",
                config.dir.display()
            )
        })?;
        Ok(IntervalLog {
            config,
            file: None,
            open: Vec::new(),
            since: Instant::now(),
            since_unix: SystemTime::now(),
            serializer: V2DeflateSerializer::new(),
        })
    }

    /// Writes the interval that is over.
    fn write(&mut self) {
        if let Err(error) = self.try_write() {
            self.file = None;
            let dir = self.config.dir.display();
            tracing::warn!(%dir, %error, "an interval is missing in the histogram log");
        }
        for (_, histogram) in &mut self.open {
            histogram.reset();
        }
        (self.since, self.since_unix) = (Instant::now(), SystemTime::now());
    }

    fn try_write(&mut self) -> io::Result<()> {
        if self.open.iter().all(|(_, histogram)| histogram.is_empty()) {
            return Ok(());
        }
        let (mut file, mut bytes, begun) = match self.file.take() {
            Some(file) if file.1 < self.config.file_bytes_max => file,
            _ => self.begin_file()?,
        };
        let from = self.since_unix.duration_since(begun).unwrap_or_default();
        let took = self.since.elapsed();
        let mut lines = Vec::with_capacity(16 << 10);
        let mut writer = IntervalLogWriterBuilder::new()
            .with_max_value_divisor(1.0)
            .begin_log_with(&mut lines, &mut self.serializer)?;
        for (tag, histogram) in &self.open {
            if !histogram.is_empty() {
                let tag = Tag::new(tag).expect("stages have plain names");
                writer
                    .write_histogram(histogram, from, took, Some(tag))
                    .map_err(|error| io::Error::other(format!("{error:?}")))?;
            }
        }
        file.write_all(&lines)?;
        bytes += lines.len() as u64;
        self.file = Some((file, bytes, begun));
        Ok(())
    }

    fn begin_file(&mut self) -> io::Result<(File, u64, SystemTime)> {
        remove_oldest(&self.config.dir, self.config.files_max.saturating_sub(1))?;
        // intervals are told by their distance from here
        let begun = self.since_unix;
        let unix = begun.duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("{PREFIX}{:013}{SUFFIX}", unix.as_millis());
        let mut head = Vec::new();
        IntervalLogWriterBuilder::new()
            .add_comment("[Histogram log format version 1.3]")
            .add_comment("[nitro: microseconds, tags are stage.shard]")
            .with_start_time(begun)
            .with_base_time(begun)
            .begin_log_with(&mut head, &mut self.serializer)?;
        head.extend_from_slice(
            b"\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_Histogram\"\n",
        );
        let mut file = File::create(self.config.dir.join(name))?;
        file.write_all(&head)?;
        Ok((file, head.len() as u64, begun))
    }
}

/// Leaves the newest `keep` files.
fn remove_oldest(dir: &Path, keep: usize) -> io::Result<()> {
    let mut ours = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|n| n.starts_with(PREFIX) && n.ends_with(SUFFIX)) {
            ours.push(path);
        }
    }
    // their names ascend with time
    ours.sort_unstable();
    let surplus = ours.len().saturating_sub(keep);
    ours.iter().take(surplus).try_for_each(fs::remove_file)
}

impl Follow for IntervalLog {
    fn piece(&mut self, shard: Option<usize>, stage: Stage, piece: &Recorded) {
        let tag = match shard {
            Some(shard) => format!("{}.shard{shard}", stage.name()),
            None => stage.name().to_owned(),
        };
        let at = match self.open.iter().position(|(open, _)| *open == tag) {
            Some(at) => at,
            None => {
                self.open.push((tag, histogram()));
                self.open.len() - 1
            }
        };
        let open = &mut self.open[at].1;
        open.add(&piece.histogram)
            .expect("all have the same bounds");
    }

    fn turn(&mut self) -> Duration {
        if self.since.elapsed() >= self.config.interval {
            self.write();
        }
        self.config.interval.saturating_sub(self.since.elapsed())
    }

    fn end(&mut self) {
        self.write();
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::super::histogram::Histograms;
    use super::*;

    fn log(dir: &Path, file_bytes_max: u64) -> IntervalLog {
        IntervalLog::new(IntervalLogConfig {
            dir: dir.join("made"),
            interval: Duration::ZERO,
            file_bytes_max,
            files_max: 3,
        })
        .unwrap()
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        let all = fs::read_dir(dir.join("made")).unwrap();
        let mut all: Vec<PathBuf> = all.map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all
    }

    /// Tag and histogram of each interval, and the times in the head.
    fn read(file: &Path) -> (Vec<(String, Histogram<u64>)>, usize) {
        let bytes = fs::read(file).unwrap();
        let (mut intervals, mut times) = (Vec::new(), 0);
        for entry in IntervalLogIterator::new(&bytes) {
            match entry.unwrap() {
                LogEntry::Interval(interval) => {
                    let encoded = interval.encoded_histogram();
                    let decoded = base64::engine::general_purpose::STANDARD
                        .decode(encoded)
                        .unwrap();
                    let histogram = Deserializer::new()
                        .deserialize(&mut decoded.as_slice())
                        .unwrap();
                    let tag = interval.tag().unwrap().as_str().to_owned();
                    intervals.push((tag, histogram));
                }
                LogEntry::StartTime(at) | LogEntry::BaseTime(at) => {
                    assert!(at.as_secs() > 1_700_000_000);
                    times += 1;
                }
            }
        }
        (intervals, times)
    }

    #[test]
    fn a_log_is_read_back_by_the_reader_of_its_format() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path(), 1 << 20);
        let mut histograms = Histograms::new();
        histograms.record(Stage::Login, 1500, 3);
        histograms.record(Stage::Login, 40_000, 1);
        histograms.record(Stage::SqlLoad, 70, 2);
        for _ in 0..2 {
            // two pieces of one interval
            log.piece(Some(1), Stage::Login, histograms.get(Stage::Login));
        }
        log.piece(None, Stage::SqlLoad, histograms.get(Stage::SqlLoad));
        log.turn();
        log.piece(Some(1), Stage::Login, histograms.get(Stage::Login));
        log.end();
        let files = files(dir.path());
        assert_eq!(files.len(), 1, "{files:?}");
        let (intervals, times) = read(&files[0]);
        assert_eq!(times, 2);
        let of: Vec<(&str, u64)> = intervals.iter().map(|(t, h)| (&**t, h.len())).collect();
        assert_eq!(
            of,
            [("login.shard1", 8), ("sql_load", 2), ("login.shard1", 4)]
        );
        let first = &intervals[0].1;
        assert_eq!(first.count_at(1500), 6);
        assert!(
            first.max() >= 40_000 && first.max() <= 40_400,
            "{}",
            first.max()
        );
    }

    #[test]
    fn a_folder_of_logs_is_bounded_and_holds_nothing_else_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path(), 1);
        let stranger = dir.path().join("made/notes.txt");
        fs::write(&stranger, "x").unwrap();
        let mut histograms = Histograms::new();
        histograms.record(Stage::Login, 1500, 1);
        for n in 0..8 {
            log.piece(Some(0), Stage::Login, histograms.get(Stage::Login));
            // files are told apart by the millisecond
            log.since_unix += Duration::from_millis(n);
            log.since = Instant::now();
            log.try_write().unwrap();
            log.since_unix += Duration::from_secs(1);
        }
        let files = files(dir.path());
        assert_eq!(files.len(), 4, "{files:?}");
        assert!(stranger.exists());
    }

    #[test]
    fn an_interval_without_anything_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path(), 1 << 20);
        log.turn();
        log.end();
        assert!(files(dir.path()).is_empty());
    }
}
