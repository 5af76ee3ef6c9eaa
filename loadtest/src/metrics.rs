//! Counters that the server shows by HTTP as Prometheus text: by how much they grow for a unit of work (the SQL statements
//! of a login, say). In: the text before and after. Out: rows of the report. A counter that is not there is an error
//! before the run, not a zero after it.

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

/// Their values, in the order of their names.
pub type Reading = Vec<f64>;

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
        self.names.is_empty()
    }

    pub fn read(&self) -> Result<Reading, String> {
        if self.is_empty() {
            return Ok(Reading::new());
        }
        let url = &self.url;
        let text = self.agent.get(url).call();
        let text = text.and_then(|mut answer| answer.body_mut().read_to_string());
        let text = text.map_err(|error| format!("--metrics {url}: {error}"))?;
        let value = |name: &String| {
            let missing = || format!("--metric {name}: {url} does not show it");
            value(&text, name).ok_or_else(missing)
        };
        self.names.iter().map(value).collect()
    }

    /// How much each grew in all rounds (before, after, work done), and for each unit of work.
    pub fn report(
        &self,
        report: &mut Report,
        rounds: &[(&Reading, &Reading, u64)],
        of: &str,
    ) -> Result<(), String> {
        let work: u64 = rounds.iter().map(|(_, _, work)| work).sum();
        for (at, name) in self.names.iter().enumerate() {
            let mut grown = 0.0;
            for (before, after, _) in rounds {
                if after[at] < before[at] {
                    return Err(format!(
                        "--metric {name} fell: it is no counter, or the server was restarted"
                    ));
                }
                grown += after[at] - before[at];
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
        assert_eq!(after, [7.0, 1500.0]);
        let mut report = Report::new("storm");
        let before = vec![2.0, 500.0];
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
