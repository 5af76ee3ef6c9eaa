//! What the processes cost: CPU time of the server, of the generator and of the machine, and resident memory, read from
//! `/proc`; and a verdict on who was the bottleneck.
//!
//! A server may be several processes (with its database, say), told apart by name, and its threads are told apart by the
//! first word of theirs: `shard-3` is one of `shard`, `sqlx-worker` of `sqlx`. What the kernel's io_uring workers do
//! counts for the thread that gave them the work, what ended threads did counts as [`ENDED`].

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

/// From this share of a core on a thread counts as saturated.
const SATURATED: f64 = 0.90;
/// With less idle time than this the machine counts as saturated.
const MACHINE_IDLE_MIN: f64 = 0.07;

/// The group of threads that hold a slice of the users each.
const SHARD: &str = "shard";
/// The group of threads that were there in between only.
const ENDED: &str = "ended";
/// `/proc/PID/stat` counts ticks of 10 ms: less than two of them are no thread that ended.
const ENDED_MIN_NS: u64 = 20_000_000;

/// By (process, thread).
type ThreadTimes = BTreeMap<(u32, u32), ThreadTime>;

/// Nanoseconds on a core, and ready to run without one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct ThreadTime {
    running: u64,
    waiting: u64,
}

/// Shares of the time; the two add up to almost 1 for a thread that always has work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Busiest {
    pub running: f64,
    pub waiting: f64,
}

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
    server_processes: BTreeMap<u32, Process>,
    generator: ThreadTimes,
    /// Ticks of all cores: all, idle.
    machine: (u64, u64),
    cores: f64,
}

#[derive(Clone, Debug)]
struct Process {
    name: String,
    /// Nanoseconds of all its threads, those that have ended too.
    running: u64,
    /// The group of each thread.
    groups: BTreeMap<u32, String>,
}

/// CPU time of the processes of one name, and of their groups of threads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProcessUsage {
    pub cpu: Duration,
    pub threads: BTreeMap<String, Duration>,
}

/// What was used between two snapshots.
#[derive(Clone, Debug, PartialEq)]
pub struct Usage {
    pub wall: Duration,
    /// All processes of the server together; `None` without one to watch.
    pub server: Option<Duration>,
    /// By name of the process.
    pub processes: BTreeMap<String, ProcessUsage>,
    pub server_busiest: Busiest,
    pub generator: Duration,
    pub generator_busiest: Busiest,
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
        let pids = self.pids();
        Snapshot {
            at: Instant::now(),
            server: pids.iter().flat_map(|pid| thread_times(*pid)).collect(),
            server_processes: pids
                .iter()
                .filter_map(|pid| Some((*pid, Process::read(*pid)?)))
                .collect(),
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
        let (_, server_busiest) = difference(&self.server, &later.server, wall);
        let processes = self.processes_until(later);
        let server = processes.values().map(|process| process.cpu).sum();
        let (generator, generator_busiest) = difference(&self.generator, &later.generator, wall);
        let all = later.machine.0.saturating_sub(self.machine.0);
        let idle = later.machine.1.saturating_sub(self.machine.1);
        Usage {
            wall,
            server: (!later.server.is_empty()).then_some(server),
            processes,
            server_busiest,
            generator: Duration::from_nanos(generator),
            generator_busiest,
            machine_idle: if all == 0 {
                1.0
            } else {
                idle as f64 / all as f64
            },
            cores: later.cores,
        }
    }

    fn processes_until(&self, later: &Snapshot) -> BTreeMap<String, ProcessUsage> {
        let mut usages = BTreeMap::<String, ProcessUsage>::new();
        for (pid, process) in &later.server_processes {
            let usage = usages.entry(process.name.clone()).or_default();
            let mut add = |group: &str, nanoseconds| {
                let time = Duration::from_nanos(nanoseconds);
                *usage.threads.entry(group.to_owned()).or_default() += time;
                usage.cpu += time;
            };
            let mut known = 0;
            for (thread, time) in later.server.range((*pid, 0)..=(*pid, u32::MAX)) {
                let earlier = self.server.get(thread).copied().unwrap_or_default();
                let running = time.running.saturating_sub(earlier.running);
                let group = process.groups.get(&thread.1).unwrap_or(&process.name);
                add(group, running);
                known += running;
            }
            let earlier = self.server_processes.get(pid).map_or(0, |p| p.running);
            let ended = (process.running.saturating_sub(earlier)).saturating_sub(known);
            if ended > ENDED_MIN_NS {
                add(ENDED, ended);
            }
        }
        usages
    }
}

impl Process {
    fn read(pid: u32) -> Option<Process> {
        let folder = format!("/proc/{pid}");
        let comm = |of: std::path::PathBuf| {
            let text = fs::read_to_string(of.join("comm")).ok()?;
            Some(text.trim_end().to_owned())
        };
        let names: BTreeMap<u32, String> = fs::read_dir(format!("{folder}/task"))
            .ok()?
            .flatten()
            .filter_map(|task| {
                let thread = task.file_name().to_str()?.parse().ok()?;
                Some((thread, comm(task.path())?))
            })
            .collect();
        Some(Process {
            name: comm(folder.clone().into())?,
            running: stat_nanoseconds(format!("{folder}/stat").as_ref())?,
            groups: groups(&names),
        })
    }
}

impl Usage {
    /// CPU time of the shards, and of all other threads of their processes; `None` if the server has no shards.
    pub fn shards_and_others(&self) -> Option<(Duration, Duration)> {
        let sharded = || {
            self.processes
                .values()
                .filter_map(|process| Some((process, process.threads.get(SHARD)?)))
        };
        sharded().next()?;
        let shards: Duration = sharded().map(|(_, shards)| *shards).sum();
        let all: Duration = sharded().map(|(process, _)| process.cpu).sum();
        Some((shards, all - shards))
    }

    /// Who kept the work from going faster: a thread that always ran, else one that always wanted to run and had to
    /// wait for a core that others used.
    pub fn bottleneck(&self) -> Bottleneck {
        let (server, generator) = (self.server_busiest, self.generator_busiest);
        let wanted = |thread: Busiest| thread.running + thread.waiting >= SATURATED;
        if server.running >= SATURATED {
            Bottleneck::Server
        } else if wanted(server) {
            Bottleneck::Machine
        } else if generator.running >= SATURATED {
            Bottleneck::Generator
        } else if wanted(generator) || self.machine_idle < MACHINE_IDLE_MIN {
            Bottleneck::Machine
        } else {
            Bottleneck::None
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
        let busiest = |thread: Busiest| {
            let (running, waiting) = (thread.running * 100.0, thread.waiting * 100.0);
            format!("busiest thread ran {running:.0} % and waited for a core {waiting:.0} %")
        };
        let server = match self.server {
            Some(time) => {
                let busiest = busiest(self.server_busiest);
                format!("server {:.2} cores, {busiest}", cores(time))
            }
            None => "server unknown without --server-pid".to_owned(),
        };
        let facts = format!(
            "{server}; generator {:.2} cores, {}; all others {:.2} cores; machine {:.0} % idle",
            cores(self.generator),
            busiest(self.generator_busiest),
            self.others(),
            self.machine_idle * 100.0
        );
        match self.bottleneck() {
            Bottleneck::Server => format!("bottleneck: server ({facts})"),
            Bottleneck::Generator => format!(
                "bottleneck: generator ({facts}): rates and latencies are its own; use more --threads"
            ),
            Bottleneck::Machine => {
                format!("bottleneck: machine ({facts}): work waits for cores that others use")
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

/// Running time of all threads, and the thread that had most to do.
fn difference(before: &ThreadTimes, after: &ThreadTimes, wall: Duration) -> (u64, Busiest) {
    let share = |time: u64| time as f64 / wall.as_nanos().max(1) as f64;
    let mut sum = 0;
    let mut busiest = Busiest::default();
    for (thread, time) in after {
        let earlier = before.get(thread).copied().unwrap_or_default();
        let running = time.running.saturating_sub(earlier.running);
        let waiting = time.waiting.saturating_sub(earlier.waiting);
        sum += running;
        if share(running + waiting) > busiest.running + busiest.waiting {
            busiest = Busiest {
                running: share(running),
                waiting: share(waiting),
            };
        }
    }
    (sum, busiest)
}

/// The group of each thread, from the names of all.
fn groups(names: &BTreeMap<u32, String>) -> BTreeMap<u32, String> {
    let group = |name: &str| {
        let end = name.find(|byte: char| byte == '-' || byte.is_ascii_digit());
        let word = name[..end.unwrap_or(name.len())].trim_end_matches('_');
        if word.is_empty() { name } else { word }.to_owned()
    };
    names
        .iter()
        .map(|(thread, name)| {
            // `iou-wrk-N`: a kernel thread that does what thread N submitted
            let submitter = name
                .strip_prefix("iou-wrk-")
                .and_then(|number| names.get(&number.parse().ok()?));
            (*thread, group(submitter.unwrap_or(name)))
        })
        .collect()
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
            let time = schedstat.and_then(|text| parse_schedstat(&text));
            let from_ticks = || {
                let running = stat_nanoseconds(&task.path().join("stat"))?;
                Some(ThreadTime {
                    running,
                    waiting: 0,
                })
            };
            Some(((pid, thread), time.or_else(from_ticks)?))
        })
        .collect()
}

fn parse_schedstat(text: &str) -> Option<ThreadTime> {
    let mut fields = text
        .split_ascii_whitespace()
        .map(|field| field.parse().ok());
    Some(ThreadTime {
        running: fields.next()??,
        waiting: fields.next()??,
    })
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

    fn usage(server: (f64, f64), generator: (f64, f64), machine_idle: f64) -> Usage {
        let busiest = |(running, waiting): (f64, f64)| Busiest { running, waiting };
        Usage {
            wall: Duration::from_secs(1),
            server: Some(Duration::from_secs_f64(server.0)),
            processes: BTreeMap::new(),
            server_busiest: busiest(server),
            generator: Duration::from_secs_f64(generator.0),
            generator_busiest: busiest(generator),
            machine_idle,
            cores: 2.0,
        }
    }

    #[test]
    fn the_bottleneck_is_who_is_saturated() {
        assert_eq!(
            usage((0.99, 0.0), (0.5, 0.0), 0.2).bottleneck(),
            Bottleneck::Server
        );
        assert_eq!(
            usage((0.99, 0.0), (0.99, 0.0), 0.0).bottleneck(),
            Bottleneck::Server
        );
        assert_eq!(
            usage((0.5, 0.0), (0.99, 0.0), 0.2).bottleneck(),
            Bottleneck::Generator
        );
        assert_eq!(
            usage((0.6, 0.35), (0.95, 0.0), 0.0).bottleneck(),
            Bottleneck::Machine
        );
        assert_eq!(
            usage((0.8, 0.18), (0.2, 0.0), 0.4).bottleneck(),
            Bottleneck::Machine
        );
        assert_eq!(
            usage((0.7, 0.0), (0.6, 0.0), 0.01).bottleneck(),
            Bottleneck::Machine
        );
        assert_eq!(
            usage((0.3, 0.0), (0.2, 0.0), 0.7).bottleneck(),
            Bottleneck::None
        );
        let unknown = Usage {
            server: None,
            ..usage((0.0, 0.0), (0.95, 0.0), 0.5)
        };
        assert_eq!(unknown.bottleneck(), Bottleneck::Generator);
        assert!(
            unknown
                .sentence()
                .starts_with("bottleneck: generator (server unknown")
        );
    }

    #[test]
    fn processes_that_are_neither_are_told() {
        assert!((usage((0.5, 0.0), (0.25, 0.0), 0.1).others() - 1.05).abs() < 1e-9);
    }

    #[test]
    fn stat_lines_are_parsed_whatever_the_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 100 1000 200";
        assert_eq!(parse_stat_ticks(stat), Some(300));
        let time = ThreadTime {
            running: 12,
            waiting: 34,
        };
        assert_eq!(parse_schedstat("12 34 5\n"), Some(time));
        assert_eq!(parse_machine_ticks("cpu  1 2 3 40 5 6 7 8 9 10"), (72, 45));
    }

    #[test]
    fn threads_are_grouped_by_the_first_word_of_their_name() {
        let names = [
            (10, "nitro"),
            (11, "shard-0"),
            (12, "shard-17"),
            (13, "journal-0"),
            (14, "sqlx-sqlite-wor"),
            (15, "sql"),
            (16, "iou-wrk-12"),
            (17, "iou-wrk-99"),
            (18, "ib_io_rd-1"),
            (19, "-"),
        ];
        let names = names.map(|(thread, name)| (thread, name.to_owned()));
        let groups: Vec<_> = groups(&names.into()).into_values().collect();
        let expected = [
            "nitro", "shard", "shard", "journal", "sqlx", "sql", "shard", "iou", "ib_io_rd", "-",
        ];
        assert_eq!(groups, expected);
    }

    /// Number, group and milliseconds of each thread.
    type Threads<'a> = &'a [(u32, &'a str, u64)];

    /// Of processes: number, name, milliseconds and threads.
    fn snapshot(processes: &[(u32, &str, u64, Threads)]) -> Snapshot {
        let mut snapshot = Snapshot {
            at: Instant::now(),
            server: ThreadTimes::new(),
            server_processes: BTreeMap::new(),
            generator: ThreadTimes::new(),
            machine: (0, 0),
            cores: 2.0,
        };
        for (pid, name, running, threads) in processes {
            let groups = threads
                .iter()
                .map(|(thread, group, _)| (*thread, (*group).to_owned()));
            let process = Process {
                name: (*name).to_owned(),
                running: running * 1_000_000,
                groups: groups.collect(),
            };
            snapshot.server_processes.insert(*pid, process);
            for (thread, _, milliseconds) in *threads {
                let time = ThreadTime {
                    running: milliseconds * 1_000_000,
                    waiting: 0,
                };
                snapshot.server.insert((*pid, *thread), time);
            }
        }
        snapshot
    }

    #[test]
    fn processes_and_groups_of_threads_add_up_to_the_server() {
        let before = snapshot(&[
            (1, "nitro", 150, &[(1, "nitro", 50), (2, "shard", 100)]),
            (7, "mariadbd", 0, &[(7, "mariadbd", 0)]),
        ]);
        let after = snapshot(&[
            (
                1,
                "nitro",
                1150,
                &[
                    (1, "nitro", 60),
                    (2, "shard", 400),
                    (3, "shard", 300),
                    (4, "sql", 90),
                ],
            ),
            (7, "mariadbd", 1000, &[(7, "mariadbd", 990)]),
        ]);
        let usage = before.until(&after);
        let ms = Duration::from_millis;
        assert_eq!(usage.server, Some(ms(1990)));
        let nitro = &usage.processes["nitro"];
        assert_eq!(nitro.cpu, ms(1000));
        assert_eq!(nitro.threads["shard"], ms(600));
        assert_eq!(nitro.threads["sql"], ms(90));
        assert_eq!(nitro.threads[ENDED], ms(300));
        // less than two ticks are the grain of the clock
        let mariadbd = &usage.processes["mariadbd"];
        assert_eq!((mariadbd.cpu, mariadbd.threads.len()), (ms(990), 1));
        assert_eq!(usage.shards_and_others(), Some((ms(600), ms(400))));
        assert_eq!(before.until(&before).processes["mariadbd"].cpu, ms(0));
    }

    #[test]
    fn two_processes_of_one_name_are_one_row() {
        let before = snapshot(&[]);
        let after = snapshot(&[
            (1, "redis-server", 30, &[(1, "redis", 30)]),
            (2, "redis-server", 40, &[(2, "redis", 40)]),
        ]);
        let usage = before.until(&after);
        assert_eq!(
            usage.processes["redis-server"].cpu,
            Duration::from_millis(70)
        );
        assert_eq!(usage.shards_and_others(), None);
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
        let own = usage.processes.values().next().unwrap();
        assert_eq!(Some(own.cpu), usage.server);
        assert!(!own.threads.is_empty(), "{own:?}");
        assert!(processes.server_rss_kib().unwrap() > 100);
        assert!(Processes::new(&[u32::MAX], false).is_err());
    }
}
