//! The text of `GET /metrics`. In: families. Out: OpenMetrics 1.0, or the older Prometheus text format for those who ask
//! for that, both as `prometheus-client` writes them.
//!
//! The crate's own metric types are not used: they would be a second set of counters beside those that the shards own. It
//! writes what the tables say, through its interface for collectors.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{self, Registry};

use super::table::{Family, Kind, Unit, Value};

/// How a page is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus text 0.0.4.
    Prometheus,
}

impl Format {
    /// What the reader's `Accept` header asks for; OpenMetrics if it does not say.
    pub fn accepted(accept: &str) -> Format {
        let open = accept.contains("application/openmetrics-text");
        match accept.contains("text/plain") && !open {
            true => Format::Prometheus,
            false => Format::OpenMetrics,
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Upper bounds of a histogram's buckets in microseconds, behind which everything else comes: 1, 2, 5 from 20 us to 30 s, so
/// that each bound of the service's aims (0.5, 1, 2, 5 ms) is one of them.
pub const BUCKETS_US: [u64; 19] = [
    20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
    1_000_000, 2_000_000, 5_000_000, 10_000_000, 30_000_000,
];

/// Writes the families in their order.
pub fn render(families: Vec<Family>, format: Format) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Page(families)));
    let mut out = String::with_capacity(64 << 10);
    let written = match format {
        Format::OpenMetrics => prometheus_client::encoding::text::encode(&mut out, &registry),
        Format::Prometheus => {
            prometheus_client::encoding::prometheus_text::encode(&mut out, &registry)
        }
    };
    written.expect("a string takes everything");
    out
}

struct Page(Vec<Family>);

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page").finish_non_exhaustive()
    }
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        for family in &self.0 {
            let about = &family.about;
            let (name, unit) = match about.unit() {
                Unit::Bytes => (cut(about.name, "_bytes"), Some(registry::Unit::Bytes)),
                Unit::Seconds => (cut(about.name, "_seconds"), Some(registry::Unit::Seconds)),
                Unit::Count | Unit::Microseconds => (about.name, None),
            };
            let kind = match about.kind {
                Kind::counter => MetricType::Counter,
                Kind::gauge => MetricType::Gauge,
                Kind::histogram => MetricType::Histogram,
            };
            let help = about.help.trim();
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for (labels, value) in &family.samples {
                match labels.is_empty() {
                    true => sample(&mut metric, about.kind, about.unit(), value)?,
                    false => {
                        let mut metric = metric.encode_family(labels)?;
                        sample(&mut metric, about.kind, about.unit(), value)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn cut<'a>(name: &'a str, unit: &str) -> &'a str {
    name.strip_suffix(unit).unwrap_or(name)
}

fn sample(to: &mut MetricEncoder, kind: Kind, unit: Unit, value: &Value) -> fmt::Result {
    match *value {
        Value::Number(us) if unit == Unit::Seconds => {
            let seconds = us as f64 / 1e6;
            match kind {
                Kind::counter => to.encode_counter::<NoLabelSet, _, f64>(&seconds, None),
                _ => to.encode_gauge(&seconds),
            }
        }
        Value::Number(n) => match kind {
            Kind::counter => to.encode_counter::<NoLabelSet, _, f64>(&n, None),
            _ => to.encode_gauge(&n),
        },
        Value::Durations { sum_us, ref counts } => {
            let bounds = BUCKETS_US.iter().map(|us| *us as f64 / 1e6);
            let buckets: Vec<(f64, u64)> = bounds
                .chain([f64::INFINITY])
                .zip(counts.iter().copied())
                .collect();
            let sum = sum_us as f64 / 1e6;
            to.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::About;
    use super::*;

    fn families() -> Vec<Family> {
        let about = |name, kind| About {
            name,
            kind,
            help: " What it means. When it is bad, do this.",
            labels: &["shard"],
        };
        let mut counts = vec![0; BUCKETS_US.len() + 1];
        (counts[0], counts[3], counts[19]) = (2, 1, 4);
        let shard = |n: u64| vec![("shard", n.to_string())];
        vec![
            Family {
                about: about("nitro_binds", Kind::counter),
                samples: vec![
                    (shard(0), Value::Number(3)),
                    (shard(1), Value::Number(u64::MAX)),
                ],
            },
            Family {
                about: about("nitro_cpu_seconds", Kind::counter),
                samples: vec![(Vec::new(), Value::Number(1_500_000))],
            },
            Family {
                about: about("nitro_odd", Kind::gauge),
                samples: vec![(vec![("instance", "a\"b\\c\nd".into())], Value::Number(1))],
            },
            Family {
                about: about("nitro_login_seconds", Kind::histogram),
                samples: vec![(
                    shard(0),
                    Value::Durations {
                        sum_us: 123_000_456,
                        counts,
                    },
                )],
            },
        ]
    }

    #[test]
    fn a_page_is_open_metrics() {
        let page = render(families(), Format::OpenMetrics);
        for line in [
            "# HELP nitro_binds What it means. When it is bad, do this.",
            "# TYPE nitro_binds counter",
            "nitro_binds_total{shard=\"0\"} 3",
            "nitro_binds_total{shard=\"1\"} 18446744073709551615",
            "# UNIT nitro_cpu_seconds seconds",
            "nitro_cpu_seconds_total 1.5",
            r#"nitro_odd{instance="a\"b\\c\nd"} 1"#,
            "# TYPE nitro_login_seconds histogram",
            "nitro_login_seconds_sum{shard=\"0\"} 123.000456",
            "nitro_login_seconds_count{shard=\"0\"} 7",
            "nitro_login_seconds_bucket{le=\"0.00002\",shard=\"0\"} 2",
            "nitro_login_seconds_bucket{le=\"0.0002\",shard=\"0\"} 3",
            "nitro_login_seconds_bucket{le=\"30.0\",shard=\"0\"} 3",
            "nitro_login_seconds_bucket{le=\"+Inf\",shard=\"0\"} 7",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
        assert!(page.ends_with("\n# EOF\n"));
    }

    #[test]
    fn the_older_format_is_for_those_who_ask_for_it() {
        let page = render(families(), Format::Prometheus);
        assert!(
            page.contains("# TYPE nitro_binds_total counter\n"),
            "{page}"
        );
        assert!(!page.contains("# EOF"), "{page}");
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        assert_eq!(Format::accepted(prometheus), Format::OpenMetrics);
        assert_eq!(Format::accepted(""), Format::OpenMetrics);
        assert_eq!(Format::accepted("*/*"), Format::OpenMetrics);
        assert_eq!(Format::accepted("text/plain"), Format::Prometheus);
    }
}
