//! What a run found: a table for people and one JSON line for programs, from the same rows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::proc::Usage;

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
        }
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

    pub fn json_line(&self) -> String {
        let mut json = self.json.clone();
        json.insert("ok".into(), json!(!self.is_failure()));
        json.insert("failures".into(), json!(self.failed));
        Value::Object(json).to_string()
    }

    /// Prints the table, or the line if it goes to standard output; appends the line to a file.
    pub fn publish(&self, json: Option<&Path>) -> Result<(), String> {
        let mut stdout = std::io::stdout().lock();
        let outcome = match json {
            Some(path) if path.as_os_str() == "-" => writeln!(stdout, "{}", self.json_line()),
            Some(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                file.and_then(|mut file| writeln!(file, "{}", self.json_line()))
                    .map_err(|error| format!("--json {}: {error}", path.display()))?;
                write!(stdout, "{}", self.table())
            }
            None => write!(stdout, "{}", self.table()),
        };
        outcome.map_err(|error| format!("standard output: {error}"))
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
    fn median_takes_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
