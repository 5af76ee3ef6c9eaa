//! Counters that the server shows by HTTP as Prometheus text: by how much they grow for a unit of work (the SQL statements
//! of a login, say). In: the text before and after. Out: rows of the report. A counter that is not there is an error
//! before the run, not a zero after it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::options::MetricsOptions;
use crate::report::Report;

const TIMEOUT: Duration = Duration::from_secs(10);

/// The counters asked for; none of them without `--metrics`.
pub struct Counters {
    url: String,
    names: Vec<String>,
    agent: ureq::Agent,
}

/// What the server showed at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// Of the counters, in the order of their names.
    values: Vec<f64>,
    histograms: Histograms,
}

/// Cumulative counts of classic buckets, by metric with its other labels, shard and upper bound (its bits, as a key).
type Histograms = BTreeMap<(String, String), BTreeMap<u64, f64>>;

/// By how much a histogram of the server grew, of one shard.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardHistogram {
    /// The metric, with its labels other than the shard.
    pub name: String,
    pub shard: String,
    /// Upper bound and cumulative count.
    buckets: Vec<(f64, f64)>,
}

impl ShardHistogram {
    fn count(&self) -> f64 {
        self.buckets.last().map_or(0.0, |(_, count)| *count)
    }

    pub fn label(&self) -> String {
        match self.shard.as_str() {
            "" => format!("all ({})", self.count()),
            shard => format!("shard {shard} ({})", self.count()),
        }
    }

    /// Quantile and upper bound of each bucket that anything fell into.
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let mut before = 0.0;
        let mut curve = Vec::new();
        for (bound, count) in &self.buckets {
            if bound.is_finite() && *count > before {
                curve.push((before / self.count(), *bound));
                curve.push((count / self.count(), *bound));
                before = *count;
            }
        }
        curve
    }
}

impl Counters {
    pub fn new(options: &MetricsOptions) -> Result<Counters, String> {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .build();
        let counters = Counters {
            url: options.metrics.clone().unwrap_or_default(),
            names: options.metric.clone(),
            agent: config.into(),
        };
        counters.read()?;
        Ok(counters)
    }

    pub fn is_empty(&self) -> bool {
        self.url.is_empty()
    }

    pub fn read(&self) -> Result<Reading, String> {
        if self.is_empty() {
            return Ok(Reading::default());
        }
        let url = &self.url;
        let text = self.agent.get(url).call();
        let text = text.and_then(|mut answer| answer.body_mut().read_to_string());
        let text = text.map_err(|error| format!("--metrics {url}: {error}"))?;
        let value = |name: &String| {
            let missing = || format!("--metric {name}: {url} does not show it");
            value(&text, name).ok_or_else(missing)
        };
        Ok(Reading {
            values: self.names.iter().map(value).collect::<Result<_, _>>()?,
            histograms: histograms(&text),
        })
    }

    /// How much each grew in all rounds (before, after, work done), and for each unit of work.
    pub fn report(
        &self,
        report: &mut Report,
        rounds: &[(&Reading, &Reading, u64)],
        of: &str,
    ) -> Result<(), String> {
        if let (Some((first, _, _)), Some((_, last, _))) = (rounds.first(), rounds.last()) {
            report.server_histograms(grown(&first.histograms, &last.histograms));
        }
        let work: u64 = rounds.iter().map(|(_, _, work)| work).sum();
        for (at, name) in self.names.iter().enumerate() {
            let mut grown = 0.0;
            for (before, after, _) in rounds {
                let (before, after) = (before.values[at], after.values[at]);
                if after < before {
                    return Err(format!(
                        "--metric {name} fell: it is no counter, or the server was restarted"
                    ));
                }
                grown += after - before;
            }
            let each = grown / work.max(1) as f64;
            report.number(name, name, grown, "");
            report.number(
                &format!("{name}_per_{of}"),
                &format!("  per {of}"),
                each,
                "",
            );
        }
        Ok(())
    }
}

/// The classic buckets of all histograms in a text.
fn histograms(text: &str) -> Histograms {
    let mut histograms = Histograms::new();
    for line in text.lines() {
        let Some((name, rest)) = line.split_once("_bucket{") else {
            continue;
        };
        let Some(end) = rest.rfind('}') else {
            continue;
        };
        let value = rest[end + 1..].split_ascii_whitespace().next();
        let Some(Ok(value)) = value.map(str::parse::<f64>) else {
            continue;
        };
        let (mut bound, mut shard, mut others) = (None, String::new(), Vec::new());
        for label in rest[..end].split("\",") {
            match label.trim_end_matches('"').split_once("=\"") {
                Some(("le", text)) => bound = text.parse::<f64>().ok(),
                Some(("shard", text)) => shard = text.to_owned(),
                Some((key, text)) => others.push(format!("{key}={text}")),
                None => {}
            }
        }
        let name = match others.is_empty() {
            true => name.to_owned(),
            false => format!("{name} ({})", others.join(", ")),
        };
        // bounds of latencies are positive: their bits have their order
        if let Some(bound) = bound.filter(|bound| *bound >= 0.0) {
            histograms
                .entry((name, shard))
                .or_default()
                .insert(bound.to_bits(), value);
        }
    }
    histograms
}

/// What grew in between; nothing of those that did not.
fn grown(before: &Histograms, after: &Histograms) -> Vec<ShardHistogram> {
    let of = |(key, buckets): (&(String, String), &BTreeMap<u64, f64>)| ShardHistogram {
        name: key.0.clone(),
        shard: key.1.clone(),
        buckets: buckets
            .iter()
            .map(|(bound, count)| {
                let earlier = before.get(key).and_then(|buckets| buckets.get(bound));
                (f64::from_bits(*bound), count - earlier.unwrap_or(&0.0))
            })
            .collect(),
    };
    after
        .iter()
        .map(of)
        .filter(|histogram| histogram.count() > 0.0)
        .collect()
}

/// The sum over all labels of a metric, with or without `_total`. Comments say `# TYPE …`.
fn value(text: &str, name: &str) -> Option<f64> {
    let samples = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = rest.strip_prefix("_total").unwrap_or(rest);
        let value = match rest.strip_prefix('{') {
            Some(labels) => &labels[labels.rfind('}')? + 1..],
            None => rest,
        };
        // a longer name is another metric
        let value = value.strip_prefix([' ', '\t'])?;
        value.split_ascii_whitespace().next()?.parse::<f64>().ok()
    });
    samples.fold(None, |sum, sample| Some(sum.unwrap_or(0.0) + sample))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    const TEXT: &str = "# TYPE nitro_binds counter\n# HELP nitro_binds Sessions begun.\n\
                        nitro_binds_total{shard=\"0\"} 3\nnitro_binds_total{shard=\"1\",x=\"} 9\"} 4 1395066363000\n\
                        nitro_sql_statements_total 7\nnitro_sql_statements_slow 100\nbytes 1.5e3\n# EOF\n";

    #[test]
    fn a_counter_is_the_sum_of_its_labels_and_of_nothing_else() {
        assert_eq!(value(TEXT, "nitro_binds"), Some(7.0));
        assert_eq!(value(TEXT, "nitro_binds_total"), Some(7.0));
        assert_eq!(value(TEXT, "nitro_sql_statements"), Some(7.0));
        assert_eq!(value(TEXT, "bytes"), Some(1500.0));
        assert_eq!(value(TEXT, "nitro_sql"), None);
        assert_eq!(value(TEXT, "# TYPE nitro_binds"), None);
    }

    #[test]
    fn histograms_of_the_server_are_told_apart_by_shard_and_only_their_growth_counts() {
        let text = |first: u32, second: u32| {
            format!(
                "# TYPE nitro_login_seconds histogram\n\
                 nitro_login_seconds_bucket{{shard=\"0\",stage=\"tls\",le=\"0.001\"}} {first}\n\
                 nitro_login_seconds_bucket{{shard=\"0\",stage=\"tls\",le=\"0.01\"}} {}\n\
                 nitro_login_seconds_bucket{{shard=\"0\",stage=\"tls\",le=\"+Inf\"}} {}\n\
                 nitro_login_seconds_bucket{{le=\"0.01\",shard=\"1\",stage=\"tls\"}} {second}\n\
                 nitro_login_seconds_sum{{shard=\"0\",stage=\"tls\"}} 1\n",
                first * 2,
                first * 2
            )
        };
        let (before, after) = (histograms(&text(5, 4)), histograms(&text(50, 4)));
        let grown = grown(&before, &after);
        assert_eq!(grown.len(), 1, "shard 1 did not grow: {grown:?}");
        let shard = &grown[0];
        assert_eq!(shard.name, "nitro_login_seconds (stage=tls)");
        assert_eq!(shard.label(), "shard 0 (90)");
        assert_eq!(
            shard.curve(),
            [(0.0, 0.001), (0.5, 0.001), (0.5, 0.01), (1.0, 0.01)]
        );
    }

    /// Answers so many requests with the text.
    fn server(requests: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/metrics", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming().take(requests) {
                let mut stream = stream.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.push(byte[0]);
                }
                let length = TEXT.len();
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
                );
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(TEXT.as_bytes()).unwrap();
            }
        });
        url
    }

    #[test]
    fn counters_are_read_from_the_server_and_divided_by_the_work() {
        let options = MetricsOptions {
            metrics: Some(server(2)),
            metric: vec!["nitro_binds".into(), "bytes".into()],
        };
        let counters = Counters::new(&options).unwrap();
        let after = counters.read().unwrap();
        assert_eq!(after.values, [7.0, 1500.0]);
        let mut report = Report::new("storm");
        let before = Reading {
            values: vec![2.0, 500.0],
            ..Reading::default()
        };
        let rounds = [(&before, &after, 10), (&after, &after, 90)];
        counters.report(&mut report, &rounds, "login").unwrap();
        let line = report.json_line();
        assert!(line.contains("\"nitro_binds_per_login\":0.05"), "{line}");
        assert!(line.contains("\"bytes_per_login\":10.0"), "{line}");
        let fallen = [(&after, &before, 1)];
        assert!(counters.report(&mut report, &fallen, "login").is_err());
    }

    #[test]
    fn a_counter_that_is_not_there_is_told_before_the_run() {
        let options = MetricsOptions {
            metrics: Some(server(1)),
            metric: vec!["nitro_binds".into(), "nitro_sql".into()],
        };
        let error = Counters::new(&options).err().unwrap();
        assert!(error.starts_with("--metric nitro_sql: http://"), "{error}");
        assert!(Counters::new(&MetricsOptions::default()).is_ok());
    }
}
