//! What a run found: a table for people and one JSON line for programs, from the same rows.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

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
            sentences: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// A figure; `unit` is for people, the key names it for programs.
    pub fn number(&mut self, key: &str, label: &str, value: impl Into<Value>, unit: &str) {
        let value = value.into();
        let shown = match value.as_f64() {
            Some(number) if value.is_f64() => human(number),
            _ => value.to_string(),
        };
        self.rows.push((
            label.to_owned(),
            format!("{shown} {unit}").trim_end().to_owned(),
        ));
        self.json.insert(key.to_owned(), value);
    }

    pub fn text(&mut self, key: &str, label: &str, value: String) {
        self.rows.push((label.to_owned(), value.clone()));
        self.json.insert(key.to_owned(), json!(value));
    }

    /// A list for programs only.
    pub fn list(&mut self, key: &str, values: &[f64]) {
        self.json.insert(key.to_owned(), json!(values));
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
        self.rows
            .push((label.to_owned(), format!("{} ms", shown.join("  "))));
        let figures: Map<String, Value> = figures
            .iter()
            .map(|(name, value)| ((*name).into(), json!(value)))
            .collect();
        self.json.insert(format!("{key}_ms"), figures.into());
    }

    /// CPU time per unit of work, and who was the bottleneck. `per_second` scales seconds to `unit`.
    pub fn usage(&mut self, usage: &Usage, work: u64, of: &str, unit: &str, per_second: f64) {
        let each = |time: std::time::Duration| time.as_secs_f64() * per_second / work.max(1) as f64;
        if let Some(server) = usage.server {
            self.number(
                &format!("server_cpu_{unit}_per_{of}"),
                &format!("server CPU per {of}"),
                each(server),
                unit,
            );
        }
        let generator = each(usage.generator);
        self.number(
            &format!("generator_cpu_{unit}_per_{of}"),
            &format!("generator CPU per {of}"),
            generator,
            unit,
        );
        self.bottleneck(usage);
    }

    pub fn bottleneck(&mut self, usage: &Usage) {
        self.json
            .insert("bottleneck".into(), json!(usage.bottleneck().name()));
        self.json.insert(
            "server_busiest_thread".into(),
            json!(usage.server_busiest.running),
        );
        self.json.insert(
            "generator_busiest_thread".into(),
            json!(usage.generator_busiest.running),
        );
        self.json
            .insert("machine_idle".into(), json!(usage.machine_idle));
        self.sentences.push(usage.sentence());
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
