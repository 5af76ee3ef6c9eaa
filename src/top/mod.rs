//! `nitro top`: what each core does, live. In: [`Figures`] of the running server over the admin socket, twice. Out: what
//! happened between the two: a page in the terminal ([`page`]), or one JSON object for scripts.
//!
//! The server sends totals and whole histograms, so that any number of tops may look, each at its own pace, and quantiles of
//! several cores together are those of their merged histograms, not an average of quantiles.

mod page;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde::Serialize;

use crate::admin::client::Client;
use crate::admin::{AdminReply, AdminRequest, Figures};
use crate::config::Config;
use crate::observe::Stage;

/// How long an answer of the server is waited for is [`Client`]'s to say; then it is asked again after the interval.
pub struct Options {
    pub interval: Duration,
    pub once: bool,
    pub json: bool,
    /// The stage that the rows of the cores show at first.
    pub stage: Stage,
}

/// Runs until `q`. The error is a sentence.
pub fn run(config: &Config, options: &Options) -> Result<(), String> {
    let mut server = Server::connect(config)?;
    if options.once {
        let before = server.ask()?;
        std::thread::sleep(options.interval);
        let report = Report::between(&before, &server.ask()?);
        let text = match options.json {
            true => serde_json::to_string(&report).map_err(|e| e.to_string())? + "\n",
            false => page::text(&report, options.stage),
        };
        let mut out = io::stdout().lock();
        return match out.write_all(text.as_bytes()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e.to_string()),
            _ => Ok(()),
        };
    }
    if !io::stdout().is_terminal() {
        return Err(
            "nitro top needs a terminal; for scripts there is nitro top --once --json".into(),
        );
    }
    let mut view = page::View::new(&config.domain, options.interval, options.stage);
    let mut terminal = ratatui::init();
    let ended = live(&mut terminal, &mut server, &mut view);
    ratatui::restore();
    ended.map_err(|e| format!("the terminal cannot be used ({e})"))
}

fn live(
    terminal: &mut ratatui::DefaultTerminal,
    server: &mut Server,
    view: &mut page::View,
) -> io::Result<()> {
    let mut before: Option<Sample> = None;
    loop {
        match server.ask() {
            Ok(sample) => {
                view.trouble = None;
                if let Some(before) = &before {
                    view.report = Some(Report::between(before, &sample));
                }
                before = Some(sample);
            }
            Err(sentence) => {
                view.trouble = Some(sentence);
                before = None;
            }
        }
        // the first figures are of a moment, not of an interval
        let pause = match view.report {
            None => Duration::from_millis(500).min(view.interval),
            Some(_) => view.interval,
        };
        let until = Instant::now() + pause;
        loop {
            terminal.draw(|frame| view.draw(frame))?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !event::poll(left)? {
                break;
            }
            if let Event::Key(key) = event::read()?
                && key.kind != KeyEventKind::Release
                && is_end(key, view)
            {
                return Ok(());
            }
        }
    }
}

/// Does the key end it? Else it changes the view.
fn is_end(key: KeyEvent, view: &mut page::View) -> bool {
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return true,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
        KeyCode::Char('h' | '?') => view.help = !view.help,
        KeyCode::Down | KeyCode::Right | KeyCode::Tab | KeyCode::Char('s' | 'j') => view.step(1),
        KeyCode::Up | KeyCode::Left | KeyCode::BackTab | KeyCode::Char('S' | 'k') => view.step(-1),
        KeyCode::PageDown => view.scroll(1),
        KeyCode::PageUp => view.scroll(-1),
        _ => {}
    }
    false
}

/// The running server.
struct Server {
    config: Config,
    client: Option<Client>,
}

impl Server {
    fn connect(config: &Config) -> Result<Server, String> {
        let mut server = Server {
            config: config.clone(),
            client: None,
        };
        server.client()?;
        Ok(server)
    }

    fn client(&mut self) -> Result<&mut Client, String> {
        if self.client.is_none() {
            self.client = Client::connect(&self.config.data_dir)?;
        }
        let dir = self.config.data_dir.display();
        self.client.as_mut().ok_or_else(|| {
            format!("{dir}: no nitro runs on this data folder; start it (nitro serve), or name its configuration with --config")
        })
    }

    fn ask(&mut self) -> Result<Sample, String> {
        let answered = self.client()?.call(&AdminRequest::Figures);
        match answered {
            Ok(AdminReply::Figures { figures }) => Sample::new(*figures),
            Ok(AdminReply::Refused { sentence }) => Err(sentence),
            Ok(other) => Err(crate::cli::unexpected(&other)),
            Err(sentence) => {
                self.client = None;
                Err(sentence)
            }
        }
    }
}

/// Figures of one moment.
struct Sample {
    figures: Figures,
    stages: BTreeMap<(Stage, Option<usize>), Histogram<u64>>,
}

impl Sample {
    fn new(figures: Figures) -> Result<Sample, String> {
        let mut stages = BTreeMap::new();
        let mut deserializer = Deserializer::new();
        for of in &figures.stages {
            let Some(stage) = Stage::ALL.into_iter().find(|s| s.name() == of.stage) else {
                continue;
            };
            let bytes = BASE64.decode(&of.histogram).map_err(|e| e.to_string())?;
            let histogram = deserializer
                .deserialize(&mut bytes.as_slice())
                .map_err(|e| format!("the server's histograms cannot be read ({e:?})"))?;
            stages.insert((stage, of.shard), histogram);
        }
        Ok(Sample { figures, stages })
    }

    fn started(&self) -> Option<&u64> {
        self.figures.blade.get("process_start_time_seconds")
    }
}

/// What happened between two moments.
#[derive(Debug, Serialize)]
pub struct Report {
    pub release: String,
    /// Length of the interval.
    pub seconds: f64,
    pub up_seconds: f64,
    pub shards: Vec<Core>,
    /// All shards together.
    pub all: Core,
    pub tiers: Tiers,
    /// Of the whole blade, by stage; the SQL lane's are only here.
    pub stages: BTreeMap<String, Quantiles>,
}

/// One shard, or all.
#[derive(Debug, Default, Serialize)]
pub struct Core {
    pub sessions: u64,
    pub parked: u64,
    /// Connections that are logging in.
    pub negotiating: u64,
    pub logins_per_second: f64,
    pub messages_per_second: f64,
    pub disconnects_per_second: f64,
    /// Connections of components (XEP-0114), stanzas from them and for them, and what waits for them.
    pub components: u64,
    pub component_stanzas_per_second: f64,
    pub component_queue_bytes: u64,
    /// Of one core; of all shards: their mean.
    pub cpu_percent: f64,
    /// The most that waited at once lately.
    pub queues: Queues,
    pub journal_backlog_bytes: u64,
    /// 0 open, 1 the backlog's bound is reached, 2 the disk is full; of all: the worst.
    pub journal_status: u64,
    pub stages: BTreeMap<String, Quantiles>,
}

#[derive(Debug, Default, Clone, Serialize)]
pub struct Queues {
    pub inbox_max: u64,
    pub unread_max: u64,
    pub mesh_kept_max: u64,
    pub journal_waiting_max: u64,
}

/// Of the durations in the interval, microseconds.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Quantiles {
    pub count: u64,
    pub per_second: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    pub max_us: u64,
}

#[derive(Debug, Default, Serialize)]
pub struct Tiers {
    pub sql_up: bool,
    pub sql_queue: u64,
    pub sql_statements_per_second: f64,
    pub sql_drain_waiting: u64,
    pub sql_retries: u64,
    /// Instances that all shards use, and all there are.
    pub redis_in_use: usize,
    pub redis: usize,
    /// Names of those that a shard has given up for a while or is connecting to.
    pub redis_out: Vec<String>,
    pub resident_bytes: u64,
    pub log_lines_left_out: u64,
}

impl Report {
    fn between(before: &Sample, now: &Sample) -> Report {
        // a server that was started anew counts from 0
        let same = before.started() == now.started();
        let seconds = now.figures.unix_us.saturating_sub(before.figures.unix_us) as f64 / 1e6;
        let seconds = seconds.max(1e-3);
        let histogram = |key: &(Stage, Option<usize>)| {
            let mut histogram = now.stages.get(key)?.clone();
            if let Some(before) = before.stages.get(key).filter(|_| same) {
                // what was recorded stays recorded
                let _ = histogram.subtract(before);
            }
            Some(histogram)
        };
        let empty = BTreeMap::new();
        let mut shards = Vec::new();
        let mut merged: BTreeMap<Stage, Histogram<u64>> = BTreeMap::new();
        for (n, figures) in now.figures.shards.iter().enumerate() {
            let earlier = before.figures.shards.get(n).filter(|_| same);
            let rates = Rates {
                now: figures,
                before: earlier.unwrap_or(&empty),
                seconds,
            };
            let mut core = rates.core();
            for stage in Stage::ALL {
                let Some(histogram) = histogram(&(stage, Some(n))) else {
                    continue;
                };
                let quantiles = Quantiles::of(&histogram, seconds);
                core.stages.insert(stage.name().into(), quantiles);
                match merged.get_mut(&stage) {
                    None => drop(merged.insert(stage, histogram)),
                    Some(all) => all.add(&histogram).expect("all have the same bounds"),
                }
            }
            shards.push(core);
        }
        for stage in Stage::ALL {
            if let Some(histogram) = histogram(&(stage, None)) {
                merged.insert(stage, histogram);
            }
        }
        let stages: BTreeMap<String, Quantiles> = merged
            .iter()
            .map(|(stage, all)| (stage.name().into(), Quantiles::of(all, seconds)))
            .collect();
        let mut all = Core::sum(&shards);
        all.stages.clone_from(&stages);
        let blade = Rates {
            now: &now.figures.blade,
            before: if same { &before.figures.blade } else { &empty },
            seconds,
        };
        Report {
            release: now.figures.release.clone(),
            seconds,
            up_seconds: now.started().map_or(0.0, |at| {
                now.figures.unix_us.saturating_sub(*at) as f64 / 1e6
            }),
            shards,
            all,
            tiers: Tiers::of(&now.figures, &blade),
            stages,
        }
    }
}

/// Figures of two moments.
struct Rates<'a> {
    now: &'a BTreeMap<String, u64>,
    before: &'a BTreeMap<String, u64>,
    seconds: f64,
}

impl Rates<'_> {
    fn get(&self, name: &str) -> u64 {
        self.now.get(name).copied().unwrap_or_default()
    }

    fn per_second(&self, name: &str) -> f64 {
        let before = self.before.get(name).copied().unwrap_or_default();
        self.get(name).saturating_sub(before) as f64 / self.seconds
    }

    fn core(&self) -> Core {
        Core {
            sessions: self.get("nitro_sessions"),
            parked: self.get("nitro_sessions_parked"),
            negotiating: self.get("nitro_connections_negotiating"),
            logins_per_second: self.per_second("nitro_binds")
                + self.per_second("nitro_resumptions"),
            messages_per_second: self.per_second("nitro_messages_in"),
            disconnects_per_second: self.per_second("nitro_disconnects"),
            components: self.get("nitro_component_connections"),
            component_stanzas_per_second: self.per_second("nitro_component_stanzas_in")
                + self.per_second("nitro_component_stanzas_out"),
            component_queue_bytes: self.get("nitro_component_queue_bytes"),
            // microseconds of processor a second
            cpu_percent: self.per_second("nitro_shard_cpu_seconds") / 1e4,
            queues: Queues {
                inbox_max: self.get("nitro_inbox_max"),
                unread_max: self.get("nitro_unread_connections_max"),
                mesh_kept_max: self.get("nitro_mesh_kept_max"),
                journal_waiting_max: self.get("nitro_journal_waiting_max"),
            },
            journal_backlog_bytes: self.get("nitro_journal_backlog_bytes"),
            journal_status: self.get("nitro_journal_status"),
            stages: BTreeMap::new(),
        }
    }
}

impl Core {
    fn sum(all: &[Core]) -> Core {
        let mut sum = Core::default();
        for core in all {
            sum.sessions += core.sessions;
            sum.parked += core.parked;
            sum.negotiating += core.negotiating;
            sum.logins_per_second += core.logins_per_second;
            sum.messages_per_second += core.messages_per_second;
            sum.disconnects_per_second += core.disconnects_per_second;
            sum.components += core.components;
            sum.component_stanzas_per_second += core.component_stanzas_per_second;
            sum.component_queue_bytes += core.component_queue_bytes;
            sum.cpu_percent += core.cpu_percent / all.len() as f64;
            let (of, queues) = (&mut sum.queues, &core.queues);
            of.inbox_max = of.inbox_max.max(queues.inbox_max);
            of.unread_max = of.unread_max.max(queues.unread_max);
            of.mesh_kept_max = of.mesh_kept_max.max(queues.mesh_kept_max);
            of.journal_waiting_max = of.journal_waiting_max.max(queues.journal_waiting_max);
            sum.journal_backlog_bytes += core.journal_backlog_bytes;
            sum.journal_status = sum.journal_status.max(core.journal_status);
        }
        sum
    }
}

impl Quantiles {
    fn of(histogram: &Histogram<u64>, seconds: f64) -> Quantiles {
        if histogram.is_empty() {
            return Quantiles::default();
        }
        Quantiles {
            count: histogram.len(),
            per_second: histogram.len() as f64 / seconds,
            p50_us: histogram.value_at_quantile(0.5),
            p99_us: histogram.value_at_quantile(0.99),
            p999_us: histogram.value_at_quantile(0.999),
            max_us: histogram.value_at_quantile(1.0),
        }
    }
}

impl Tiers {
    fn of(figures: &Figures, blade: &Rates<'_>) -> Tiers {
        let mut redis: BTreeMap<&str, bool> = BTreeMap::new();
        for of in &figures.instances {
            let in_use = of.numbers.get("nitro_redis_state") == Some(&1);
            *redis.entry(&of.instance).or_insert(true) &= in_use;
        }
        let out = redis.iter().filter(|(_, in_use)| !**in_use);
        let out: Vec<String> = out.map(|(name, _)| (*name).to_owned()).collect();
        Tiers {
            sql_up: blade.get("nitro_sql_up") == 1,
            sql_queue: blade.get("nitro_sql_queue"),
            sql_statements_per_second: blade.per_second("nitro_sql_statements"),
            sql_drain_waiting: blade.get("nitro_sql_drain_waiting"),
            sql_retries: blade.get("nitro_sql_retries"),
            redis_in_use: redis.len() - out.len(),
            redis: redis.len(),
            redis_out: out,
            resident_bytes: blade.get("process_resident_memory_bytes"),
            log_lines_left_out: blade.get("nitro_log_lines_left_out"),
        }
    }
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::{Serializer as _, V2Serializer};

    use super::*;
    use crate::admin::{InstanceFigures, StageFigures};
    use crate::observe::histogram;

    pub(super) fn figures(
        at_s: u64,
        started: u64,
        binds: [u64; 2],
        logins: &[(usize, u64)],
    ) -> Figures {
        let shards = binds.iter().enumerate().map(|(n, binds)| {
            [
                ("nitro_sessions", 100 + n as u64),
                ("nitro_binds", *binds),
                ("nitro_shard_cpu_seconds", at_s * 250_000),
                ("nitro_inbox_max", 3 + n as u64),
                ("nitro_journal_status", n as u64),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
        });
        let stages = (0..2).map(|n| {
            let mut of = histogram::<u64>();
            for (_, us) in logins.iter().filter(|(shard, _)| *shard == n) {
                of.record(*us).unwrap();
            }
            let mut bytes = Vec::new();
            V2Serializer::new().serialize(&of, &mut bytes).unwrap();
            StageFigures {
                stage: "login".into(),
                shard: Some(n),
                histogram: BASE64.encode(bytes),
            }
        });
        let instance = |shard, instance: &str, state| InstanceFigures {
            shard,
            instance: instance.into(),
            numbers: [("nitro_redis_state".to_owned(), state)].into(),
        };
        Figures {
            release: "0.1.0".into(),
            unix_us: at_s * 1_000_000,
            shards: shards.collect(),
            blade: [
                ("nitro_sql_up".to_owned(), 1),
                ("process_start_time_seconds".to_owned(), started),
            ]
            .into(),
            instances: vec![
                instance(0, "a", 1),
                instance(1, "a", 1),
                instance(0, "b", 1),
                instance(1, "b", 2),
            ],
            stages: stages.collect(),
        }
    }

    pub(super) fn report() -> Report {
        let before = figures(100, 7, [10, 10], &[(0, 50)]);
        let now = figures(
            102,
            7,
            [20, 110],
            &[(0, 50), (0, 1000), (1, 4000), (1, 4000)],
        );
        Report::between(&Sample::new(before).unwrap(), &Sample::new(now).unwrap())
    }

    #[test]
    fn a_report_is_of_what_happened_between_two_moments() {
        let report = report();
        assert_eq!(report.seconds, 2.0);
        let [first, second] = &report.shards[..] else {
            panic!("two shards")
        };
        assert_eq!(first.logins_per_second, 5.0);
        assert_eq!(second.logins_per_second, 50.0);
        assert_eq!(first.cpu_percent, 25.0);
        assert_eq!(report.all.sessions, 201);
        assert_eq!(report.all.queues.inbox_max, 4);
        assert_eq!(report.all.journal_status, 1);
        let login = &first.stages["login"];
        assert_eq!((login.count, login.p50_us / 10), (1, 100));
        // of all cores together: merged, not averaged
        let login = &report.stages["login"];
        assert_eq!((login.count, login.per_second), (3, 1.5));
        assert!((4000..4040).contains(&login.p50_us), "{login:?}");
        assert_eq!((report.tiers.redis, report.tiers.redis_in_use), (2, 1));
        assert_eq!(report.tiers.redis_out, ["b"]);
    }

    #[test]
    fn a_server_that_was_started_anew_counts_from_nothing() {
        let before = figures(100, 7, [1000, 1000], &[(0, 50); 9]);
        let now = figures(102, 101, [4, 0], &[(0, 60)]);
        let report = Report::between(&Sample::new(before).unwrap(), &Sample::new(now).unwrap());
        assert_eq!(report.shards[0].logins_per_second, 2.0);
        assert_eq!(report.stages["login"].count, 1);
    }
}
