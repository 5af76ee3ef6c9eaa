//! What a run found: a table for people and one JSON line for programs, from the same rows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::html::Page;
use crate::limits::{self, Figures, Limit, Verdict};
use crate::metrics::ShardHistogram;
use crate::options::Global;
use crate::plot::Band;
use crate::proc::Usage;
use crate::timeline::{self, Kind, Point, Timeline};

pub type Histogram = hdrhistogram::Histogram<u64>;

/// Longest latency that is told apart; what lasts longer counts as this.
const LATENCY_MAX_NS: u64 = 600_000_000_000;
/// Different reasons of failure that are shown.
const FAILURES_SHOWN: usize = 8;

/// Nanoseconds, to three digits.
pub fn histogram() -> Histogram {
    Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("the bounds are valid")
}

/// Reasons and how often each occurred.
pub type Failures = BTreeMap<String, u64>;

pub struct Report {
    json: Map<String, Value>,
    rows: Vec<(String, String)>,
    /// Before the keys and labels that follow.
    section: (String, String),
    sentences: Vec<String>,
    failed: Vec<String>,
    /// Key, label and histogram, in their order.
    histograms: Vec<(String, String, Histogram)>,
    /// Another name for a histogram.
    aliases: BTreeMap<String, String>,
    timelines: Vec<Timeline>,
    bands: Vec<Band>,
    samples: Vec<(String, Vec<(f64, f64)>)>,
    shards: Vec<ShardHistogram>,
    /// What was checked, and whether it held.
    limits: Vec<(bool, String)>,
}

impl Report {
    pub fn new(scenario: &str) -> Report {
        let mut json = Map::new();
        json.insert("scenario".into(), json!(scenario));
        Report {
            json,
            rows: Vec::new(),
            section: Default::default(),
            sentences: Vec::new(),
            failed: Vec::new(),
            histograms: Vec::new(),
            aliases: BTreeMap::new(),
            timelines: Vec::new(),
            bands: Vec::new(),
            samples: Vec::new(),
            shards: Vec::new(),
            limits: Vec::new(),
        }
    }

    pub fn timeline(&mut self, timeline: Timeline) {
        self.timelines.push(timeline);
    }

    /// A part of the run that plots over time shade; `strong` for what is done to the server.
    pub fn band(&mut self, label: &str, from: Instant, to: Instant, strong: bool) {
        self.bands.push(Band {
            from: timeline::seconds(from),
            to: timeline::seconds(to),
            label: label.into(),
            strong,
        });
    }

    /// Readings over time, to be plotted.
    pub fn samples(&mut self, label: &str, readings: &[(Instant, f64)]) {
        // two fleets of one run watch the same server
        if readings.is_empty() || self.samples.iter().any(|(known, _)| known == label) {
            return;
        }
        let points = readings
            .iter()
            .map(|(at, value)| (timeline::seconds(*at), *value));
        self.samples.push((label.into(), points.collect()));
    }

    /// The first readings over time.
    pub fn readings(&self) -> &[(f64, f64)] {
        self.samples
            .first()
            .map_or(&[], |(_, points)| points.as_slice())
    }

    /// Over time, of the fleets that have ended.
    pub fn points_of(&self, kind: Kind) -> impl Iterator<Item = &Point> {
        let all = self.timelines.iter().flat_map(Timeline::points);
        all.filter(move |(known, _)| *known == kind)
            .flat_map(|(_, points)| points)
    }

    pub fn server_histograms(&mut self, histograms: Vec<ShardHistogram>) {
        self.shards.extend(histograms);
    }

    /// `--fail-if` may call a histogram by this name too.
    pub fn alias(&mut self, name: &str, key: &str) {
        let name = format!("{}{name}", self.section.0);
        self.aliases
            .insert(name, format!("{}{key}", self.section.0));
    }

    /// What follows is of a second part of the run: its keys begin with `key_`, its labels with `label: `.
    pub fn begin_section(&mut self, key: &str, label: &str) {
        self.section = (format!("{key}_"), format!("{label}: "));
    }

    fn put(&mut self, key: &str, value: Value) {
        self.json.insert(format!("{}{key}", self.section.0), value);
    }

    fn row(&mut self, label: &str, value: String) {
        self.rows
            .push((format!("{}{label}", self.section.1), value));
    }

    /// A figure; `unit` is for people, the key names it for programs.
    pub fn number(&mut self, key: &str, label: &str, value: impl Into<Value>, unit: &str) {
        let value = value.into();
        let shown = match value.as_f64() {
            Some(number) if value.is_f64() => human(number),
            _ => value.to_string(),
        };
        self.row(label, format!("{shown} {unit}").trim_end().to_owned());
        self.put(key, value);
    }

    pub fn text(&mut self, key: &str, label: &str, value: String) {
        self.row(label, value.clone());
        self.put(key, json!(value));
    }

    /// Several figures of one kind, by name.
    pub fn figures(&mut self, key: &str, label: &str, shown: String, figures: Map<String, Value>) {
        self.row(label, shown);
        self.put(key, figures.into());
    }

    /// For programs only.
    pub fn flag(&mut self, key: &str, value: bool) {
        self.put(key, json!(value));
    }

    /// A list for programs only.
    pub fn list(&mut self, key: &str, values: &[f64]) {
        self.put(key, json!(values));
    }

    /// Percentiles of a histogram of nanoseconds, in milliseconds.
    pub fn latencies(&mut self, key: &str, label: &str, histogram: &Histogram) {
        let at = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e6;
        let figures = [
            ("p50", at(0.5)),
            ("p90", at(0.9)),
            ("p99", at(0.99)),
            ("p99.9", at(0.999)),
            ("max", histogram.max() as f64 / 1e6),
        ];
        let shown: Vec<_> = figures
            .iter()
            .map(|(name, value)| format!("{name} {}", human(*value)))
            .collect();
        self.row(label, format!("{} ms", shown.join("  ")));
        let figures: Map<String, Value> = figures
            .iter()
            .map(|(name, value)| ((*name).into(), json!(value)))
            .collect();
        self.put(&format!("{key}_ms"), figures.into());
        self.histograms.push((
            format!("{}{key}", self.section.0),
            format!("{}{}", self.section.1, label.trim_start()),
            histogram.clone(),
        ));
    }

    /// CPU time per unit of work, and who was the bottleneck. `per_second` scales seconds to `unit`.
    pub fn usage(&mut self, usage: &Usage, work: u64, of: &str, unit: &str, per_second: f64) {
        self.server_cpu(&[(usage, work)], of, unit, per_second);
        let generator = usage.generator.as_secs_f64() * per_second / work.max(1) as f64;
        self.number(
            &format!("generator_cpu_{unit}_per_{of}"),
            &format!("generator CPU per {of}"),
            generator,
            unit,
        );
        self.bottleneck(usage);
    }

    /// The server's CPU time per unit of work, as a median of rounds (with the work done in each): of all its processes,
    /// of each, of the shards and of the other threads of theirs.
    pub fn server_cpu(&mut self, rounds: &[(&Usage, u64)], of: &str, unit: &str, per_second: f64) {
        let each = |time: &dyn Fn(&Usage) -> Option<Duration>| {
            let figures: Vec<f64> = rounds
                .iter()
                .filter_map(|(usage, work)| {
                    Some(time(usage)?.as_secs_f64() * per_second / (*work).max(1) as f64)
                })
                .collect();
            (!figures.is_empty()).then(|| median(&figures))
        };
        let Some(all) = each(&|usage| usage.server) else {
            return;
        };
        let key = format!("server_cpu_{unit}_per_{of}");
        self.number(&key, &format!("server CPU per {of}"), all, unit);

        let names: BTreeSet<&String> = rounds
            .iter()
            .flat_map(|(usage, _)| usage.processes.keys())
            .collect();
        let (mut processes, mut threads) = (Map::new(), Map::new());
        for name in &names {
            let of_process = |usage: &Usage| Some(usage.processes.get(*name)?.cpu);
            let cpu = each(&of_process).unwrap_or(0.0);
            processes.insert((*name).clone(), json!(cpu));
            if names.len() > 1 {
                self.row(&format!("  {name}"), format!("{} {unit}", human(cpu)));
            }
            let groups: BTreeSet<&String> = rounds
                .iter()
                .filter_map(|(usage, _)| usage.processes.get(*name))
                .flat_map(|process| process.threads.keys())
                .collect();
            let groups: Map<String, Value> = groups
                .into_iter()
                .map(|group| {
                    // a group that was not there in a round used nothing
                    let cpu = each(&|usage| {
                        let threads = &usage.processes.get(*name)?.threads;
                        Some(threads.get(group).copied().unwrap_or_default())
                    });
                    (group.clone(), json!(cpu.unwrap_or(0.0)))
                })
                .collect();
            threads.insert((*name).clone(), groups.into());
        }
        if let Some(shards) = each(&|usage| Some(usage.shards_and_others()?.0)) {
            let others = each(&|usage| Some(usage.shards_and_others()?.1)).unwrap_or(0.0);
            self.number(&format!("{key}_shards"), "  shards", shards, unit);
            self.number(
                &format!("{key}_others"),
                "  their other threads",
                others,
                unit,
            );
        }
        self.put(&format!("{key}_of_processes"), processes.into());
        self.put(&format!("{key}_of_threads"), threads.into());
    }

    pub fn bottleneck(&mut self, usage: &Usage) {
        self.put("bottleneck", json!(usage.bottleneck().name()));
        self.put("server_busiest_thread", json!(usage.server_busiest.running));
        self.put(
            "generator_busiest_thread",
            json!(usage.generator_busiest.running),
        );
        self.put("machine_idle", json!(usage.machine_idle));
        let sentence = format!("{}{}", self.section.1, usage.sentence());
        self.sentences.push(sentence);
    }

    /// A sentence under the table.
    pub fn say(&mut self, sentence: impl Into<String>) {
        self.sentences.push(sentence.into());
    }

    /// The run failed, and why.
    pub fn fail(&mut self, sentence: impl Into<String>) {
        self.failed.push(sentence.into());
    }

    /// Failed logins or lost connections, by reason: any makes the run a failure.
    pub fn note_failures(&mut self, failures: &Failures) {
        let mut reasons: Vec<_> = failures.iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (reason, count) in reasons.iter().take(FAILURES_SHOWN) {
            self.failed.push(format!("{count} x {reason}"));
        }
        if reasons.len() > FAILURES_SHOWN {
            self.failed.push(format!(
                "and {} other reasons",
                reasons.len() - FAILURES_SHOWN
            ));
        }
    }

    pub fn is_failure(&self) -> bool {
        !self.failed.is_empty()
    }

    pub fn table(&self) -> String {
        let width = self
            .rows
            .iter()
            .map(|(label, _)| label.chars().count())
            .max()
            .unwrap_or(0);
        let rows = self
            .rows
            .iter()
            .map(|(label, value)| format!("{label:width$}  {value}\n"));
        let sentences = self
            .sentences
            .iter()
            .map(|sentence| format!("{sentence}\n"));
        let failed = self
            .failed
            .iter()
            .map(|sentence| format!("FAILED: {sentence}\n"));
        rows.chain(sentences).chain(failed).collect()
    }

    /// Every histogram as [nanoseconds, count] of its buckets.
    fn include_histograms(&mut self) {
        let buckets = |histogram: &Histogram| -> Value {
            let buckets = histogram.iter_recorded();
            buckets
                .map(|bucket| json!([bucket.value_iterated_to(), bucket.count_at_value()]))
                .collect()
        };
        let all: Map<String, Value> = self
            .histograms
            .iter()
            .map(|(key, _, histogram)| (key.clone(), buckets(histogram)))
            .collect();
        self.json.insert("histograms".into(), all.into());
    }

    pub fn json_line(&self) -> String {
        let mut json = self.json.clone();
        json.insert("ok".into(), json!(!self.is_failure()));
        json.insert("failures".into(), json!(self.failed));
        if !self.limits.is_empty() {
            let limits = self.limits.iter();
            let limits = limits.map(|(held, text)| json!({"held": held, "limit": text}));
            json.insert("limits".into(), limits.collect());
        }
        Value::Object(json).to_string()
    }

    /// Checks the limits: a broken one makes the run a failure.
    fn check(&mut self, limits: &[Limit]) -> Result<(), String> {
        for limit in limits {
            let Verdict { held, left, right } = limit.check(self)?;
            let text = format!("{limit}: {left} against {right}");
            if !held {
                self.failed.push(format!("limit {text}"));
            }
            self.limits.push((held, text));
        }
        Ok(())
    }

    /// Checks the limits; prints the table, or the line if it goes to standard output; appends the line to a file; writes
    /// the page and the log.
    pub fn publish(&mut self, global: &Global) -> Result<(), String> {
        self.check(&global.fail_if)?;
        if global.histograms {
            self.include_histograms();
        }
        let mut stdout = std::io::stdout().lock();
        let outcome = match &global.json {
            Some(path) if path.as_os_str() == "-" => writeln!(stdout, "{}", self.json_line()),
            Some(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                file.and_then(|mut file| writeln!(file, "{}", self.json_line()))
                    .map_err(|error| format!("--json {}: {error}", path.display()))?;
                write!(stdout, "{}", self.table())
            }
            None => write!(stdout, "{}", self.table()),
        };
        outcome.map_err(|error| format!("standard output: {error}"))?;
        if let Some(path) = &global.html {
            std::fs::write(path, self.page())
                .map_err(|error| format!("--html {}: {error}", path.display()))?;
        }
        if let Some(path) = &global.hdr {
            let what = format!("loadtest {}", self.scenario());
            let file = File::create(path).map(BufWriter::new);
            file.and_then(|mut file| {
                timeline::write_log(&mut file, &self.timelines, &what)?;
                file.flush()
            })
            .map_err(|error| format!("--hdr {}: {error}", path.display()))?;
        }
        Ok(())
    }

    fn scenario(&self) -> &str {
        self.json["scenario"].as_str().unwrap_or_default()
    }

    fn page(&self) -> String {
        let json: Value = serde_json::from_str(&self.json_line()).unwrap_or_default();
        Page {
            scenario: self.scenario(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            when: timeline::started_at(),
            rows: &self.rows,
            sentences: &self.sentences,
            failed: &self.failed,
            limits: &self.limits,
            histograms: &self.histograms,
            points: self.timelines.iter().flat_map(Timeline::points).collect(),
            interval_s: self
                .timelines
                .first()
                .map_or(1.0, |timeline| timeline.interval().as_secs_f64()),
            bands: &self.bands,
            samples: &self.samples,
            shards: &self.shards,
            json: serde_json::to_string_pretty(&json).unwrap_or_default(),
        }
        .html()
    }
}

impl Figures for Report {
    fn figure(&self, name: &str) -> Option<f64> {
        self.json.get(name)?.as_f64()
    }

    fn statistic(&self, name: &str, statistic: &str) -> Option<limits::Value> {
        let key = self.aliases.get(name).map_or(name, String::as_str);
        let (number, kind) = match self.histograms.iter().find(|(known, _, _)| known == key) {
            Some((_, _, histogram)) => {
                let ms = |ns: f64| (ns / 1e6, limits::Kind::Time);
                match statistic {
                    "count" => (histogram.len() as f64, limits::Kind::Number),
                    "max" => ms(histogram.max() as f64),
                    "mean" => ms(histogram.mean()),
                    percentile => {
                        let percentile: f64 = percentile.strip_prefix('p')?.parse().ok()?;
                        let in_range = (0.0..=100.0).contains(&percentile);
                        ms(in_range.then(|| histogram.value_at_percentile(percentile))? as f64)
                    }
                }
            }
            None => {
                let figure = self.json.get(name)?.get(statistic)?.as_f64()?;
                (figure, limits::Kind::Number)
            }
        };
        Some(limits::Value { number, kind })
    }

    fn names(&self) -> Vec<String> {
        let histograms = self
            .histograms
            .iter()
            .map(|(key, _, _)| format!("{key}.p99"));
        let aliases = self.aliases.keys().map(|name| format!("{name}.p99"));
        let numbers = self.json.iter().filter(|(_, value)| value.is_number());
        histograms
            .chain(aliases)
            .chain(numbers.map(|(key, _)| key.clone()))
            .collect()
    }
}

/// Three digits or more, without noise.
fn human(number: f64) -> String {
    match number.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{number:.0}"),
        size if size >= 10.0 => format!("{number:.1}"),
        size if size >= 1.0 => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}

/// The middle one, or the mean of the middle two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::ProcessUsage;

    #[test]
    fn table_and_json_tell_the_same() {
        let mut report = Report::new("chat");
        report.number("messages", "messages", 12, "");
        report.number("rate", "rate", 1234.5, "/s");
        let mut latencies = histogram();
        for millisecond in 1..=100u64 {
            latencies.record(millisecond * 1_000_000).unwrap();
        }
        report.latencies("latency", "latency", &latencies);
        assert_eq!(
            report.table(),
            "messages  12\nrate      1234 /s\nlatency   p50 50.0  p90 90.0  p99 99.0  p99.9 100  max 100 ms\n"
        );
        report.fail("3 lost");
        assert!(report.table().ends_with("FAILED: 3 lost\n"));
        let line = report.json_line();
        assert!(!line.contains('\n'));
        let json: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["scenario"], "chat");
        assert_eq!(json["messages"], 12);
        assert_eq!(json["rate"], 1234.5);
        assert_eq!(json["ok"], false);
        assert_eq!(json["failures"][0], "3 lost");
        assert!((json["latency_ms"]["p50"].as_f64().unwrap() - 50.0).abs() < 0.1);
    }

    #[test]
    fn cpu_time_is_told_by_process_and_by_shards() {
        let usage = |shards: u64, database: u64| {
            let process = |threads: &[(&str, u64)]| ProcessUsage {
                cpu: Duration::from_micros(threads.iter().map(|(_, us)| us).sum()),
                threads: threads
                    .iter()
                    .map(|(name, us)| ((*name).into(), Duration::from_micros(*us)))
                    .collect(),
            };
            let processes = [
                (
                    "nitro".to_owned(),
                    process(&[("shard", shards), ("sql", 100)]),
                ),
                ("mariadbd".to_owned(), process(&[("mariadbd", database)])),
            ];
            Usage {
                wall: Duration::from_secs(1),
                server: Some(Duration::from_micros(shards + 100 + database)),
                processes: processes.into(),
                server_busiest: Default::default(),
                generator: Duration::ZERO,
                generator_busiest: Default::default(),
                machine_idle: 1.0,
                cores: 2.0,
            }
        };
        let mut report = Report::new("storm");
        let rounds = [usage(400, 500), usage(600, 300), usage(9000, 100)];
        let rounds: Vec<_> = rounds.iter().map(|usage| (usage, 100)).collect();
        report.server_cpu(&rounds, "login", "us", 1e6);
        assert_eq!(
            report.table(),
            "server CPU per login   10.0 us\n  mariadbd             3.00 us\n  nitro                7.00 us\n  \
             shards               6.00 us\n  their other threads  1.00 us\n"
        );
        let json: Value = serde_json::from_str(&report.json_line()).unwrap();
        assert_eq!(
            json["server_cpu_us_per_login_of_processes"]["mariadbd"],
            3.0
        );
        assert_eq!(
            json["server_cpu_us_per_login_of_threads"]["nitro"]["sql"],
            1.0
        );
        assert_eq!(json["server_cpu_us_per_login_shards"], 6.0);
    }

    #[test]
    fn a_second_part_has_its_own_keys() {
        let mut report = Report::new("chat");
        report.number("lost", "lost", 1, "");
        report.begin_section("no_store", "no-store");
        report.number("lost", "lost", 2, "");
        let json: Value = serde_json::from_str(&report.json_line()).unwrap();
        assert_eq!(
            (&json["lost"], &json["no_store_lost"]),
            (&json!(1), &json!(2))
        );
        assert_eq!(report.table(), "lost            1\nno-store: lost  2\n");
    }

    #[test]
    fn failures_are_shown_most_frequent_first() {
        let mut report = Report::new("storm");
        report.note_failures(&Failures::new());
        assert!(!report.is_failure());
        report.note_failures(&Failures::from([("rare".into(), 1), ("often".into(), 9)]));
        assert_eq!(report.table(), "FAILED: 9 x often\nFAILED: 1 x rare\n");
    }

    #[test]
    fn a_broken_limit_makes_the_run_a_failure_and_a_figure_that_is_not_there_is_an_error() {
        let mut report = Report::new("chat");
        report.number("failed", "failed", 0, "");
        let mut latencies = histogram();
        for millisecond in 1..=100u64 {
            latencies.record(millisecond * 1_000_000).unwrap();
        }
        report.latencies("latency", "latency", &latencies);
        report.alias("chat", "latency");
        let limits = |texts: &[&str]| -> Vec<Limit> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        let held = limits(&[
            "chat.p99>100ms",
            "failed>0",
            "latency.p50>50.1ms",
            "chat.count<100",
        ]);
        report.check(&held).unwrap();
        assert!(!report.is_failure());
        report.check(&limits(&["chat.p99>90ms"])).unwrap();
        assert!(report.is_failure());
        assert!(report.table().contains("FAILED: limit chat.p99>90ms: 99.0"));
        let json: Value = serde_json::from_str(&report.json_line()).unwrap();
        assert_eq!(json["limits"][0]["held"], true);
        assert_eq!(json["limits"][4]["held"], false);
        assert!(report.check(&limits(&["lost>0"])).is_err());
    }

    #[test]
    fn histograms_can_be_pooled_from_the_document() {
        let mut report = Report::new("storm");
        let mut latencies = histogram();
        latencies.record_n(1000, 3).unwrap();
        latencies.record(2000).unwrap();
        report.latencies("login", "login", &latencies);
        report.include_histograms();
        let json: Value = serde_json::from_str(&report.json_line()).unwrap();
        assert_eq!(json["histograms"]["login"], json!([[1000, 3], [2000, 1]]));
    }

    #[test]
    fn the_page_needs_nothing_from_anywhere() {
        let mut report = Report::new("storm");
        report.text("x", "<b>label</b>", "a & b".into());
        let mut latencies = histogram();
        (1..1000).for_each(|value| latencies.record(value * 10_000).unwrap());
        report.latencies("login", "login", &latencies);
        let now = Instant::now();
        report.band("storm", now, now + Duration::from_secs(1), true);
        report.samples(
            "memory in MiB",
            &[(now, 1.0), (now + Duration::from_secs(1), 2.0)],
        );
        report.fail("3 lost");
        let page = report.page();
        for reference in ["http:", "https:", "src=", "@import", "url(", "<script"] {
            assert!(!page.contains(reference), "{reference}");
        }
        assert!(page.contains("&lt;b&gt;label") && page.contains("a &amp; b"));
        assert!(page.contains("The run failed.") && page.contains("memory in MiB"));
        assert_eq!(page.matches("<svg").count(), 2);
    }

    #[test]
    fn median_takes_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
