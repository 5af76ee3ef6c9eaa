//! The metrics of the whole blade, put together. In: the tables of shards, blade, SQL lane, Redis ring and process, and what
//! the collecting thread has. Out: pages for `GET /metrics`, figures for `nitro top`, and the list in `config/metrics.md`.
//! Everything here runs on the collecting thread: a shard only asks for a page and gets it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hdrhistogram::serialization::{Serializer, V2Serializer};

use super::redis;
use crate::admin::{Figures, InstanceFigures, StageFigures};
use crate::observe::{
    About, Collected, Family, Format, GAUGES, Gauges, Histograms, Kind, Labels, Observer, PROCESS,
    Place, Process, Row, SNAPSHOT, Stage, Unit, Value, families, render,
};
use crate::store::redis::figures as redis_figures;
use crate::store::sql;

/// Of each stage's durations.
const QUANTILES: [(f64, &str); 4] = [(0.5, "0.5"), (0.99, "0.99"), (0.999, "0.999"), (1.0, "1")];

/// Its label is not called `quantile`: that belongs to summaries.
const QUANTILE: About = About {
    name: "nitro_stage_quantile_seconds",
    kind: Kind::gauge,
    help: "Quantiles of each stage's durations in the last half minute to minute, at most 1 % off (1: the longest). For a look at \
           one shard; they cannot be added up or averaged: alerts and sums over shards use the buckets. When one is bad, see the \
           help of its stage's own metric.",
    labels: &["stage", "shard", "q"],
};

const BUILD: About = About {
    name: "nitro_build_info",
    kind: Kind::gauge,
    help: "1, with the release. When blades show different ones for long, an upgrade was left half done.",
    labels: &["version"],
};

/// What the figures are taken from.
pub struct Sources {
    pub gauges: Arc<Gauges>,
    pub sql: Arc<sql::Counters>,
    pub redis: Option<Arc<redis::Figures>>,
    /// When the process started, unix microseconds.
    pub started_us: u64,
}

/// Pages and figures for whoever asks; cloned for each shard.
#[derive(Clone)]
pub struct Pages {
    pub sources: Arc<Sources>,
    pub observer: Observer,
}

impl Pages {
    /// Has the page of `GET /metrics` written; `then` gets it, on the collecting thread. `false`: too many ask at once.
    pub fn page(&self, format: Format, then: impl FnOnce(String) + Send + 'static) -> bool {
        let sources = self.sources.clone();
        self.observer
            .look(move |collected| then(render(sources.families(collected), format)))
    }

    /// The figures for `nitro top`. `false`: too many ask at once.
    pub fn figures(&self, then: impl FnOnce(Figures) + Send + 'static) -> bool {
        let sources = self.sources.clone();
        self.observer
            .look(move |collected| then(sources.figures(collected)))
    }

    /// The last that a shard has recorded.
    pub fn last(&self, shard: usize, histograms: Histograms) {
        self.observer.give(shard, histograms);
    }
}

fn of_shard(shard: usize) -> Labels {
    vec![("shard", shard.to_string())]
}

fn of_stage(stage: Stage) -> About {
    About {
        name: stage.metric(),
        kind: Kind::histogram,
        help: stage.help(),
        labels: match stage.place() {
            Place::Shard => &["shard"],
            Place::Lane => &[],
        },
    }
}

impl Sources {
    /// All metrics, in the order of the list.
    pub fn families(&self, collected: &Collected) -> Vec<Family> {
        let build = Family {
            about: BUILD,
            samples: vec![(
                vec![("version", env!("CARGO_PKG_VERSION").into())],
                Value::Number(1),
            )],
        };
        let mut all = vec![build];
        let shards = self.gauges.snapshots();
        let by_shard = shards.iter().enumerate();
        all.extend(families(
            SNAPSHOT,
            by_shard.map(|(n, snapshot)| (of_shard(n), snapshot)),
        ));
        let (mut stages, mut quantiles) = (Vec::new(), Vec::new());
        for stage in Stage::ALL {
            let mut samples = Vec::new();
            for (shard, series) in collected.of(stage) {
                let labels = shard.map(of_shard).unwrap_or_default();
                let durations = Value::Durations {
                    sum_us: series.sum_us,
                    counts: series.buckets(),
                };
                samples.push((labels.clone(), durations));
                let recent = series.recent();
                if recent.is_empty() {
                    continue;
                }
                for (quantile, text) in QUANTILES {
                    let us = recent.value_at_quantile(quantile).min(recent.max());
                    let mut labels = labels.clone();
                    labels.insert(0, ("stage", stage.name().into()));
                    labels.push(("q", text.into()));
                    quantiles.push((labels, Value::Number(us)));
                }
            }
            stages.push(Family {
                about: of_stage(stage),
                samples,
            });
        }
        all.append(&mut stages);
        all.push(Family {
            about: QUANTILE,
            samples: quantiles,
        });
        let one = |labels: Labels| labels;
        all.extend(families(
            GAUGES,
            [(one(Vec::new()), &*self.gauges)].into_iter(),
        ));
        all.extend(families(
            sql::figures::ROWS,
            [(one(Vec::new()), &*self.sql)].into_iter(),
        ));
        if let Some(redis) = &self.redis {
            let instances = redis.all();
            let labelled = instances.iter().map(|figure| {
                let mut labels = of_shard(figure.shard);
                labels.push(("redis", figure.instance.to_string()));
                (labels, &*figure.counters)
            });
            all.extend(families(redis_figures::ROWS, labelled));
        }
        let process = Process::read(self.started_us);
        all.extend(families(PROCESS, [(one(Vec::new()), &process)].into_iter()));
        all
    }

    fn figures(&self, collected: &Collected) -> Figures {
        let process = Process::read(self.started_us);
        let mut blade = numbers(GAUGES, &*self.gauges);
        blade.append(&mut numbers(sql::figures::ROWS, &*self.sql));
        blade.append(&mut numbers(PROCESS, &process));
        let instances = self.redis.as_ref().map(|redis| redis.all());
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        Figures {
            release: env!("CARGO_PKG_VERSION").into(),
            unix_us: unix.unwrap_or_default().as_micros() as u64,
            shards: self
                .gauges
                .snapshots()
                .iter()
                .map(|snapshot| numbers(SNAPSHOT, snapshot))
                .collect(),
            blade,
            instances: instances
                .unwrap_or_default()
                .iter()
                .map(|figure| InstanceFigures {
                    shard: figure.shard,
                    instance: figure.instance.to_string(),
                    numbers: numbers(redis_figures::ROWS, &*figure.counters),
                })
                .collect(),
            stages: stage_figures(collected),
        }
    }
}

fn stage_figures(collected: &Collected) -> Vec<StageFigures> {
    let mut serializer = V2Serializer::new();
    let mut all = Vec::new();
    for stage in Stage::ALL {
        for (shard, series) in collected.of(stage) {
            let mut bytes = Vec::new();
            serializer
                .serialize(&series.total, &mut bytes)
                .expect("a vector takes everything");
            all.push(StageFigures {
                stage: stage.name().into(),
                shard,
                histogram: BASE64.encode(bytes),
            });
        }
    }
    all
}

fn numbers<T>(rows: &[Row<T>], of: &T) -> BTreeMap<String, u64> {
    rows.iter()
        .map(|row| (row.about.name.to_owned(), (row.get)(of)))
        .collect()
}

/// Every metric that there is.
pub fn catalogue() -> Vec<About> {
    let mut all = vec![BUILD];
    all.extend(SNAPSHOT.iter().map(|row| row.about));
    all.extend(Stage::ALL.map(of_stage));
    all.push(QUANTILE);
    all.extend(GAUGES.iter().map(|row| row.about));
    all.extend(sql::figures::ROWS.iter().map(|row| row.about));
    all.extend(redis_figures::ROWS.iter().map(|row| row.about));
    all.extend(PROCESS.iter().map(|row| row.about));
    all
}

/// The text of `config/metrics.md`.
pub fn list() -> String {
    let mut out = String::from(
        "# Metrics\n\n\
         What `GET /metrics` shows (key `http.listen`). Generated from the tables in the sources by\n\
         `nitro check-config --print-metrics`; a test keeps the two equal.\n\n\
         | metric | kind | unit | labels | what it means, and what to do |\n|---|---|---|---|---|\n",
    );
    for about in catalogue() {
        let unit = match about.unit() {
            Unit::Count => "",
            Unit::Bytes => "bytes",
            Unit::Seconds => "seconds",
            Unit::Microseconds => "microseconds",
        };
        let help = about.help.trim().replace('|', "\\|");
        let labels: Vec<String> = about.labels.iter().map(|l| format!("`{l}`")).collect();
        let _ = writeln!(
            out,
            "| `{}` | {} | {unit} | {} | {help} |",
            about.full_name(),
            about.kind.as_str(),
            labels.join(", "),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::observe::{Recorder, Snapshot};

    /// A page with samples of every family.
    fn page(format: Format) -> String {
        let gauges = Arc::new(Gauges::new(2));
        gauges.publish(
            1,
            Snapshot {
                sessions: 7,
                ..Snapshot::default()
            },
        );
        let redis = redis::Figures::default();
        redis.add(0, "unix:///r\"1", Arc::default());
        let sources = Arc::new(Sources {
            gauges,
            sql: Arc::default(),
            redis: Some(Arc::new(redis)),
            started_us: 1_790_000_000_000_000,
        });
        let recorders = [Some(0), Some(1), None].map(|shard| Recorder {
            shard,
            ask: Box::new(|n, mut histograms, reply| {
                for stage in Stage::ALL {
                    histograms.record(stage, 1000, 1);
                }
                reply.send((n, histograms)).is_ok()
            }),
        });
        let (observer, _) = Observer::start(recorders.into(), Vec::new(), || {}).unwrap();
        let pages = Pages { sources, observer };
        let (tell, told) = crossbeam_channel::bounded(1);
        assert!(pages.page(format, move |page| tell.send(page).unwrap()));
        told.recv_timeout(std::time::Duration::from_secs(20))
            .unwrap()
    }

    #[test]
    fn the_committed_list_is_the_generated_one() {
        let committed = include_str!("../../config/metrics.md");
        assert_eq!(
            committed,
            list(),
            "run: cargo run -- check-config --print-metrics > config/metrics.md"
        );
    }

    #[test]
    fn a_name_ends_in_its_unit_and_is_there_once() {
        let mut seen = HashSet::new();
        for about in catalogue() {
            let name = about.name;
            assert!(seen.insert(name), "{name} is there twice");
            let plain = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.chars().all(plain), "{name}");
            assert!(!name.ends_with("_total"), "{name}: that comes by itself");
            let unit = about.unit();
            for (word, of) in [
                ("bytes", Unit::Bytes),
                ("seconds", Unit::Seconds),
                ("microseconds", Unit::Microseconds),
            ] {
                let says = name.split('_').any(|part| part == word);
                assert_eq!(says, unit == of, "{name} says {word} but not at its end");
            }
            for short in ["_ms", "_us", "_ns", "_kb", "_mb", "_kib"] {
                assert!(!name.ends_with(short), "{name}: bytes and seconds");
            }
            if unit == Unit::Microseconds {
                let old = [
                    "nitro_journal_commit_microseconds",
                    "nitro_journal_commit_microseconds_max",
                    "nitro_redis_round_trip_microseconds",
                ];
                assert!(old.contains(&name), "{name}: new ones are in seconds");
            }
        }
    }

    #[test]
    fn every_help_says_what_it_means_and_what_to_do() {
        for about in catalogue() {
            let help = about.help.trim();
            assert!(help.ends_with('.'), "{}: {help}", about.name);
            let what = help.find("When ").filter(|at| *at > 0);
            let what = what.or_else(|| help[1..].find(" When "));
            assert!(what.is_some(), "{}: {help}", about.name);
            assert!(
                !help.contains('\n') && !help.contains("  "),
                "{}",
                about.name
            );
        }
    }

    #[test]
    fn names_that_helps_point_to_exist() {
        let names: HashSet<String> = catalogue()
            .iter()
            .flat_map(|about| [about.name.to_owned(), about.full_name()])
            .collect();
        let word = |c: char| c.is_ascii_lowercase() || c == '_';
        let config = crate::config::Config::default_file();
        for about in catalogue() {
            for said in about.help.split(|c| !word(c)) {
                let metric = ["nitro_", "process_"].iter().any(|p| said.starts_with(p));
                assert!(!metric || names.contains(said), "{}: {said}", about.name);
            }
            for key in about.help.split(|c: char| !word(c) && c != '.') {
                let key = key.trim_end_matches(['.', '_']);
                if let Some((_, name)) = key
                    .split_once('.')
                    .filter(|(s, n)| !s.is_empty() && !n.is_empty())
                {
                    assert!(
                        config.contains(&format!("\n{name}")),
                        "{}: {key}",
                        about.name
                    );
                }
            }
        }
    }

    #[test]
    fn a_page_has_every_metric_of_the_list_with_its_kind_unit_and_help() {
        let text = page(Format::OpenMetrics);
        for about in catalogue() {
            let (name, kind) = (about.name, about.kind.as_str());
            for line in [
                format!("# TYPE {name} {kind}"),
                format!("# HELP {name} {}", about.help.trim()),
            ] {
                assert_eq!(text.lines().filter(|l| *l == line).count(), 1, "{line}");
            }
            let unit = match about.unit() {
                Unit::Bytes => Some("bytes"),
                Unit::Seconds => Some("seconds"),
                Unit::Count | Unit::Microseconds => None,
            };
            let told = text.lines().find_map(|line| {
                let (of, unit) = line.strip_prefix("# UNIT ")?.split_once(' ')?;
                (of == name).then_some(unit)
            });
            assert_eq!(told, unit, "{name}");
            let sample = match about.kind {
                Kind::counter => format!("{name}_total"),
                Kind::gauge => name.to_owned(),
                Kind::histogram => format!("{name}_count"),
            };
            let samples: Vec<&str> = text
                .lines()
                .filter(|line| line.split(['{', ' ']).next() == Some(&sample))
                .collect();
            assert!(!samples.is_empty(), "{name} has no sample");
            for line in samples {
                for label in about.labels {
                    assert!(
                        line.contains(&format!("{label}=\""))
                            || *label == "shard" && line.contains("stage=\"sql"),
                        "{line} has no {label}"
                    );
                }
            }
        }
        let described = text.lines().filter(|l| l.starts_with("# TYPE ")).count();
        assert_eq!(described, catalogue().len());
        assert!(text.contains("nitro_sessions{shard=\"1\"} 7\n"));
        assert!(text.contains("nitro_login_seconds_bucket{le=\"0.001\",shard=\"0\"} 1\n"));
        let quantile = "nitro_stage_quantile_seconds{stage=\"login\",shard=\"1\",q=\"0.99\"} ";
        let told = text.lines().find_map(|line| line.strip_prefix(quantile));
        let seconds: f64 = told.expect("it is there").parse().unwrap();
        assert!((0.001..=0.00101).contains(&seconds), "{seconds}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_older_format_has_the_same_samples() {
        // labels stand in another order there
        let samples = |text: String| -> Vec<String> {
            let of = text.lines().filter(|line| !line.starts_with('#'));
            let name = |line: &str| line.split(['{', ' ']).next().map(str::to_owned);
            let mut names: Vec<String> = of.filter_map(name).collect();
            names.sort();
            names
        };
        let (open, older) = (page(Format::OpenMetrics), page(Format::Prometheus));
        assert!(samples(open) == samples(older));
    }
}
