//! What the processes cost: CPU time of the server, of the generator and of the machine, and resident memory, read from
//! `/proc`; and a verdict on who was the bottleneck.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

/// From this share of a core on a thread counts as saturated.
const SATURATED: f64 = 0.90;
/// With less idle time than this the machine counts as saturated.
const MACHINE_IDLE_MIN: f64 = 0.07;

/// CPU nanoseconds by (process, thread).
type ThreadTimes = BTreeMap<(u32, u32), u64>;

/// The processes to watch.
#[derive(Clone, Debug)]
pub struct Processes {
    server: Vec<u32>,
    children: bool,
}

#[derive(Clone, Debug)]
pub struct Snapshot {
    at: Instant,
    server: ThreadTimes,
    generator: ThreadTimes,
    /// Ticks of all cores: all, idle.
    machine: (u64, u64),
    cores: f64,
}

/// What was used between two snapshots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    pub wall: Duration,
    /// `None` without a server process to watch.
    pub server: Option<Duration>,
    /// Shares of one core.
    pub server_busiest_thread: f64,
    pub generator: Duration,
    pub generator_busiest_thread: f64,
    /// Share of all cores.
    pub machine_idle: f64,
    pub cores: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bottleneck {
    Server,
    Generator,
    Machine,
    None,
}

impl Processes {
    pub fn new(server: &[u32], children: bool) -> Result<Processes, String> {
        for pid in server {
            if thread_times(*pid).is_empty() {
                return Err(format!(
                    "--server-pid {pid}: there is no such process, or it may not be read"
                ));
            }
        }
        Ok(Processes {
            server: server.to_vec(),
            children,
        })
    }

    pub fn watch_server(&self) -> bool {
        !self.server.is_empty()
    }

    pub fn snapshot(&self) -> Snapshot {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        Snapshot {
            at: Instant::now(),
            server: self.pids().into_iter().flat_map(thread_times).collect(),
            generator: thread_times(std::process::id()),
            machine: parse_machine_ticks(stat.lines().next().unwrap_or_default()),
            // A line for all cores and one for each.
            cores: (stat.lines().filter(|line| line.starts_with("cpu")).count() as f64 - 1.0)
                .max(1.0),
        }
    }

    /// Resident memory of the server in KiB.
    pub fn server_rss_kib(&self) -> Option<u64> {
        if !self.watch_server() {
            return None;
        }
        Some(self.pids().into_iter().filter_map(rss_kib).sum())
    }

    fn pids(&self) -> Vec<u32> {
        let mut pids = self.server.clone();
        if self.children {
            let mut seen: HashSet<u32> = pids.iter().copied().collect();
            let mut next = 0;
            while next < pids.len() {
                let fresh: Vec<u32> = children(pids[next])
                    .into_iter()
                    .filter(|pid| seen.insert(*pid))
                    .collect();
                pids.extend(fresh);
                next += 1;
            }
        }
        pids
    }
}

impl Snapshot {
    pub fn until(&self, later: &Snapshot) -> Usage {
        let wall = later.at - self.at;
        let (server, server_busiest) = difference(&self.server, &later.server);
        let (generator, generator_busiest) = difference(&self.generator, &later.generator);
        let share = |busiest: u64| busiest as f64 / wall.as_nanos().max(1) as f64;
        let all = later.machine.0.saturating_sub(self.machine.0);
        let idle = later.machine.1.saturating_sub(self.machine.1);
        Usage {
            wall,
            server: (!later.server.is_empty()).then(|| Duration::from_nanos(server)),
            server_busiest_thread: share(server_busiest),
            generator: Duration::from_nanos(generator),
            generator_busiest_thread: share(generator_busiest),
            machine_idle: if all == 0 {
                1.0
            } else {
                idle as f64 / all as f64
            },
            cores: later.cores,
        }
    }
}

impl Usage {
    /// Who kept the work from going faster.
    pub fn bottleneck(&self) -> Bottleneck {
        let generator_full = self.generator_busiest_thread >= SATURATED;
        let server_full = self.server.is_some() && self.server_busiest_thread >= SATURATED;
        match (server_full, generator_full) {
            (true, _) => Bottleneck::Server,
            (false, true) => Bottleneck::Generator,
            (false, false) if self.machine_idle < MACHINE_IDLE_MIN => Bottleneck::Machine,
            (false, false) => Bottleneck::None,
        }
    }

    /// Cores that neither server nor generator used.
    pub fn others(&self) -> f64 {
        let known = self.server.unwrap_or_default() + self.generator;
        let busy = (1.0 - self.machine_idle) * self.cores;
        (busy - known.as_secs_f64() / self.wall.as_secs_f64().max(1e-9)).max(0.0)
    }

    pub fn sentence(&self) -> String {
        let cores = |time: Duration| time.as_secs_f64() / self.wall.as_secs_f64().max(1e-9);
        let server = match self.server {
            Some(time) => format!(
                "server {:.2} cores, busiest thread {:.0} %",
                cores(time),
                self.server_busiest_thread * 100.0
            ),
            None => "server unknown without --server-pid".to_owned(),
        };
        let facts = format!(
            "{server}; generator {:.2} cores, busiest thread {:.0} %; all others {:.2} cores; machine {:.0} % idle",
            cores(self.generator),
            self.generator_busiest_thread * 100.0,
            self.others(),
            self.machine_idle * 100.0
        );
        match self.bottleneck() {
            Bottleneck::Server => format!("bottleneck: server ({facts})"),
            Bottleneck::Generator => format!(
                "bottleneck: generator ({facts}): rates and latencies are its own; use more --threads"
            ),
            Bottleneck::Machine => {
                format!("bottleneck: machine ({facts}): all cores are full and shared")
            }
            Bottleneck::None => format!("bottleneck: none ({facts})"),
        }
    }
}

impl Bottleneck {
    pub fn name(self) -> &'static str {
        match self {
            Bottleneck::Server => "server",
            Bottleneck::Generator => "generator",
            Bottleneck::Machine => "machine",
            Bottleneck::None => "none",
        }
    }
}

/// Sum over all threads, and the most that one thread used.
fn difference(before: &ThreadTimes, after: &ThreadTimes) -> (u64, u64) {
    let used = after
        .iter()
        .map(|(thread, time)| time.saturating_sub(*before.get(thread).unwrap_or(&0)));
    used.fold((0, 0), |(sum, most), used| (sum + used, most.max(used)))
}

/// `schedstat` counts nanoseconds, where `stat` counts ticks of 10 ms.
fn thread_times(pid: u32) -> ThreadTimes {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return ThreadTimes::new();
    };
    tasks
        .flatten()
        .filter_map(|task| {
            let thread = task.file_name().to_str()?.parse().ok()?;
            let schedstat = fs::read_to_string(task.path().join("schedstat")).ok();
            let nanoseconds = schedstat.and_then(|text| text.split(' ').next()?.parse().ok());
            Some((
                (pid, thread),
                nanoseconds.or_else(|| stat_nanoseconds(&task.path().join("stat")))?,
            ))
        })
        .collect()
}

fn stat_nanoseconds(stat: &std::path::Path) -> Option<u64> {
    let ticks = parse_stat_ticks(&fs::read_to_string(stat).ok()?)?;
    Some(ticks * 1_000_000_000 / rustix::param::clock_ticks_per_second())
}

/// User and system ticks; the command's name in parentheses may hold anything.
fn parse_stat_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat[stat.rfind(')')? + 1..]
        .split_ascii_whitespace()
        .skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

fn parse_machine_ticks(line: &str) -> (u64, u64) {
    // user nice system idle iowait irq softirq steal; guest time is in user already.
    let ticks: Vec<u64> = line
        .split_ascii_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|text| text.parse().ok())
        .collect();
    (
        ticks.iter().sum(),
        ticks.get(3).unwrap_or(&0) + ticks.get(4).unwrap_or(&0),
    )
}

fn rss_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?
            .trim()
            .strip_suffix(" kB")?
            .trim()
            .parse()
            .ok()
    })
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let lists = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_ascii_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(server: f64, generator: f64, idle: f64) -> Usage {
        Usage {
            wall: Duration::from_secs(1),
            server: Some(Duration::from_secs_f64(server)),
            server_busiest_thread: server,
            generator: Duration::from_secs_f64(generator),
            generator_busiest_thread: generator,
            machine_idle: idle,
            cores: 2.0,
        }
    }

    #[test]
    fn the_bottleneck_is_who_is_saturated() {
        assert_eq!(usage(0.99, 0.5, 0.2).bottleneck(), Bottleneck::Server);
        assert_eq!(usage(0.5, 0.99, 0.2).bottleneck(), Bottleneck::Generator);
        assert_eq!(usage(0.7, 0.6, 0.01).bottleneck(), Bottleneck::Machine);
        assert_eq!(usage(0.3, 0.2, 0.7).bottleneck(), Bottleneck::None);
        let unknown = Usage {
            server: None,
            server_busiest_thread: 0.0,
            ..usage(0.0, 0.95, 0.5)
        };
        assert_eq!(unknown.bottleneck(), Bottleneck::Generator);
        assert!(
            unknown
                .sentence()
                .starts_with("bottleneck: generator (server unknown")
        );
    }

    #[test]
    fn stat_lines_are_parsed_whatever_the_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 100 1000 200";
        assert_eq!(parse_stat_ticks(stat), Some(300));
        assert_eq!(parse_machine_ticks("cpu  1 2 3 40 5 6 7 8 9 10"), (72, 45));
    }

    #[test]
    fn own_process_is_seen_working() {
        let processes = Processes::new(&[std::process::id()], false).unwrap();
        let before = processes.snapshot();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(60) {
            std::hint::black_box(start);
        }
        let usage = before.until(&processes.snapshot());
        assert!(
            usage.server.unwrap() > Duration::from_millis(5),
            "{usage:?}"
        );
        assert!(processes.server_rss_kib().unwrap() > 100);
        assert!(Processes::new(&[u32::MAX], false).is_err());
    }
}
