//! All workers together, as the scenarios see them: give everyone work, wait for it with a progress bar, read the
//! processes' costs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, io};

use indicatif::{ProgressBar, ProgressStyle};
use mio::{Poll, Waker};
use rustix::process::{Resource, Rlimit, getrlimit, setpriority_process, setrlimit};

use crate::chat;
use crate::connection::Account;
use crate::options::{Global, Target};
use crate::proc::{Processes, Snapshot};
use crate::replay::Curve;
use crate::report::{Failures, Report};
use crate::socket::Tls;
use crate::timeline::{Kind, Timeline};
use crate::worker::{
    Answer, Command, Counters, Job, Layout, Outcome, Pace, Parts, Run, WAKE, Worker,
};

/// Files that are open beside the clients' sockets.
const FILES_RESERVED: u64 = 64;
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Nothing received and little CPU used by the server for this long is quiet.
const QUIET_FOR: Duration = Duration::from_millis(300);
const QUIET_SERVER_SHARE: f64 = 0.05;
/// Readings of the server's memory are shown as this.
const MEMORY: &str = "resident memory of the server, MiB";
const QUIET_WAIT_MAX: Duration = Duration::from_secs(20);

pub struct Fleet {
    global: Global,
    layout: Layout,
    handles: Vec<Handle>,
    answers: Receiver<Answer>,
    processes: Processes,
    disconnections: Arc<Mutex<Failures>>,
    timeline: RefCell<Timeline>,
    /// Resident memory of the server over time, in MiB.
    memory: RefCell<Vec<(Instant, f64)>>,
}

struct Handle {
    commands: Sender<Command>,
    waker: Arc<Waker>,
    thread: JoinHandle<io::Result<Vec<Account>>>,
    counters: Arc<Counters>,
}

impl Fleet {
    pub fn start(global: &Global, target: Target) -> Result<Fleet, String> {
        Fleet::start_as(global, target, "worker", Priority::Normal)
    }

    /// With another name of its threads, and with another priority where several fleets share the machine.
    pub fn start_as(
        global: &Global,
        target: Target,
        name: &str,
        priority: Priority,
    ) -> Result<Fleet, String> {
        raise_file_limit(u64::from(global.users))?;
        let processes = Processes::new(&global.server_pid, global.server_children)?;
        let tls = Tls::new(global, &target)?;
        let layout = Layout {
            users: global.users,
            threads: global.threads as u32,
            accounts: global.accounts.unwrap_or(global.users),
            first: global.first,
        };
        let target = Arc::new(target);
        let keys = match &global.keys {
            Some(file) => read_keys(file)?,
            None => HashMap::new(),
        };
        let keys = Arc::new(keys);
        let disconnections = Arc::new(Mutex::new(Failures::new()));
        let interval = Duration::from_secs_f64(global.interval);
        let timeline = Timeline::new(interval, global.hdr.is_some());
        let (answer_sender, answers) = channel();
        let start = |number: usize| -> io::Result<Handle> {
            let (commands, command_receiver) = channel();
            let poll = Poll::new()?;
            let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
            let counters = Arc::new(Counters::default());
            let worker = Worker::new(Parts {
                number,
                layout,
                prefix: global.prefix.clone(),
                keys: keys.clone(),
                target: target.clone(),
                tls: tls.clone(),
                poll,
                commands: command_receiver,
                answers: answer_sender.clone(),
                counters: counters.clone(),
                disconnections: disconnections.clone(),
                recorder: timeline.recorder(),
            })?;
            let thread = thread::Builder::new()
                .name(format!("{name}-{number}"))
                .spawn(move || {
                    priority.take();
                    worker.run()
                })?;
            Ok(Handle {
                commands,
                waker,
                thread,
                counters,
            })
        };
        let handles = (0..global.threads).map(start).collect::<io::Result<_>>();
        let handles =
            handles.map_err(|error| format!("starting the generator's threads: {error}"))?;
        Ok(Fleet {
            global: global.clone(),
            layout,
            handles,
            answers,
            processes,
            disconnections,
            timeline: RefCell::new(timeline),
            memory: RefCell::default(),
        })
    }

    /// Does a job with users, at most `--parallel` at a time or at a rate; waits until it is done with all of them.
    pub fn run(
        &self,
        job: Job,
        users: &[u32],
        rate: Option<f64>,
        title: &str,
    ) -> Result<Outcome, String> {
        let (done_before, failed_before) = (self.done(), self.failed());
        self.start_run(job, users, rate, false);
        let bar = progress_bar(users.len() as u64, title);
        let outcome = self.finish(|| {
            let failed = self.failed() - failed_before;
            bar.set_position(self.done() - done_before + failed);
            if failed > 0 {
                bar.set_message(format!("{failed} failed"));
            }
        });
        bar.finish_and_clear();
        outcome
    }

    /// Resets all connections at once.
    pub fn cut(&self) -> Result<(), String> {
        self.tell_all(|| Command::Cut);
        for _ in &self.handles {
            let Answer::Cut = self.wait_for_answer(|| {})? else {
                unreachable!("nothing else is running")
            };
        }
        Ok(())
    }

    /// The second one of each pair reads no more.
    pub fn stop_reading(&self) {
        self.tell_all(|| Command::StopReading);
    }

    /// Begins logins by an arrival curve, with the first user again after the last one; it ends by itself.
    pub fn start_curve(&self, curve: &Arc<Curve>) {
        let start = Instant::now();
        let mut shares = vec![Vec::new(); self.handles.len()];
        for user in self.everyone() {
            shares[self.layout.worker(user)].push(user);
        }
        for (number, (handle, users)) in self.handles.iter().zip(shares).enumerate() {
            let pace = Pace::Curve {
                start,
                curve: curve.clone(),
                step: self.handles.len() as u64,
                offset: number as u64,
            };
            handle.tell(Command::Run(Run {
                job: Job::Login,
                users,
                pace,
                again: true,
            }));
        }
    }

    /// Begins a job; `again`: with the first user again after the last one, until [`Fleet::stop_run`].
    pub fn start_run(&self, job: Job, users: &[u32], rate: Option<f64>, again: bool) {
        let threads = self.handles.len();
        let mut shares = vec![Vec::new(); threads];
        for user in users {
            shares[self.layout.worker(*user)].push(*user);
        }
        let all = users.len().max(1);
        let start = Instant::now();
        for (handle, users) in self.handles.iter().zip(shares) {
            let share = users.len() as f64 / all as f64;
            let pace = match rate {
                Some(rate) => Pace::Rate {
                    start,
                    per_second: rate * share,
                },
                None => Pace::Parallel(self.global.parallel.div_ceil(threads)),
            };
            handle.tell(Command::Run(Run {
                job,
                users,
                pace,
                again,
            }));
        }
    }

    /// Nothing more is begun; what is in progress goes on to its end.
    pub fn stop_run(&self) {
        self.tell_all(|| Command::StopRun);
    }

    /// Waits for the end of a job.
    pub fn finish(&self, mut meanwhile: impl FnMut()) -> Result<Outcome, String> {
        let mut outcome = Outcome::new();
        for _ in &self.handles {
            let Answer::Run(part) = self.wait_for_answer(&mut meanwhile)? else {
                unreachable!("no chat is running")
            };
            outcome.add(part);
        }
        Ok(outcome)
    }

    pub fn login_all(&self, title: &str) -> Result<Outcome, String> {
        self.run(Job::Login, &self.everyone(), None, title)
    }

    pub fn everyone(&self) -> Vec<u32> {
        (0..self.layout.users).collect()
    }

    pub fn start_chat(&self, plan: chat::Plan) {
        self.tell_all(|| Command::Chat(plan.clone()));
    }

    /// Messages due from now on are counted apart.
    pub fn begin_chat_phase(&self) {
        let now = Instant::now();
        self.tell_all(|| Command::ChatPhase(now));
    }

    pub fn stop_chat(&self) {
        self.tell_all(|| Command::StopChat);
    }

    pub fn collect_chat(&self) {
        self.tell_all(|| Command::Collect);
    }

    /// Lets the chat go on for a while.
    pub fn watch_chat(&self, title: &str, duration: Duration) {
        let (start, before) = (Instant::now(), self.settled());
        self.watch(title, duration, || {
            let rate = (self.settled() - before) as f64 / start.elapsed().as_secs_f64();
            format!("{rate:.0} messages/s ({})", self.progress(Kind::Message))
        });
    }

    /// Lets what is going on go on for a while.
    pub fn watch(&self, title: &str, duration: Duration, mut message: impl FnMut() -> String) {
        let bar = progress_bar(duration.as_millis() as u64, title);
        let start = Instant::now();
        while start.elapsed() < duration {
            thread::sleep(PROGRESS_EVERY.min(duration.saturating_sub(start.elapsed())));
            self.collect();
            bar.set_position(start.elapsed().as_millis() as u64);
            bar.set_message(message());
        }
        bar.finish_and_clear();
    }

    /// Takes in what the workers have measured; to be called now and then.
    pub fn collect(&self) {
        self.timeline.borrow_mut().collect();
        let mut memory = self.memory.borrow_mut();
        let interval = Duration::from_secs_f64(self.global.interval);
        let is_due = memory
            .last()
            .is_none_or(|(at, _): &(Instant, f64)| at.elapsed() >= interval);
        if is_due && let Some(kib) = self.server_rss_kib() {
            memory.push((Instant::now(), kib as f64 / 1024.0));
        }
    }

    /// Percentiles of the newest interval.
    pub fn progress(&self, kind: Kind) -> String {
        let timeline = self.timeline.borrow();
        let ms = |ns: u64| ns as f64 / 1e6;
        timeline
            .latest(kind)
            .map_or("no latency yet".into(), |point| {
                format!(
                    "p50 {:.2} p99 {:.2} max {:.2} ms",
                    ms(point.p50),
                    ms(point.p99),
                    ms(point.max)
                )
            })
    }

    pub fn finish_chat(&self, title: &str) -> Result<chat::Outcome, String> {
        let bar = progress_bar(0, title);
        let mut outcome = chat::Outcome::new();
        for _ in &self.handles {
            let part =
                self.wait_for_answer(|| bar.set_message(format!("{} messages", self.settled())))?;
            let Answer::Chat(part) = part else {
                unreachable!("nothing else is running")
            };
            outcome.add(&part);
        }
        bar.finish_and_clear();
        Ok(outcome)
    }

    fn wait_for_answer(&self, mut meanwhile: impl FnMut()) -> Result<Answer, String> {
        loop {
            match self.answers.recv_timeout(PROGRESS_EVERY) {
                Ok(answer) => {
                    self.collect();
                    return Ok(answer);
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.collect();
                    meanwhile();
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err("the generator's threads have ended".into());
                }
            }
            if let Some(handle) = self
                .handles
                .iter()
                .find(|handle| handle.thread.is_finished())
            {
                let name = handle.thread.thread().name().unwrap_or("worker");
                return Err(format!("the generator's thread {name} has ended"));
            }
        }
    }

    /// Until nothing arrives any more and the server rests (bounded).
    pub fn wait_until_quiet(&self) {
        self.wait_until_quiet_for(QUIET_FOR, QUIET_WAIT_MAX);
    }

    /// The same, with other times; whether it came to rest.
    pub fn wait_until_quiet_for(&self, quiet: Duration, most: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < most {
            let (bytes, before) = (self.sum(|counters| &counters.bytes_in), self.snapshot());
            thread::sleep(quiet);
            self.collect();
            let usage = before.until(&self.snapshot());
            let server = usage.server.map_or(0.0, |server| server.as_secs_f64());
            let rested = server < usage.wall.as_secs_f64() * QUIET_SERVER_SHARE;
            if rested && self.sum(|counters| &counters.bytes_in) == bytes {
                return true;
            }
        }
        false
    }

    /// Until nothing arrives any more at this fleet (bounded). The server may be busy with others: beside live users who chat it
    /// never rests, and [`Fleet::wait_until_quiet`] would wait as long as it may.
    pub fn wait_until_still(&self) {
        let start = Instant::now();
        while start.elapsed() < QUIET_WAIT_MAX {
            let bytes = self.sum(|counters| &counters.bytes_in);
            thread::sleep(QUIET_FOR);
            self.collect();
            if self.sum(|counters| &counters.bytes_in) == bytes {
                return;
            }
        }
    }

    /// Lets time pass, with a bar.
    pub fn rest(&self, title: &str, duration: Duration) {
        self.watch(title, duration, String::new);
    }

    pub fn snapshot(&self) -> Snapshot {
        self.processes.snapshot()
    }

    pub fn server_rss_kib(&self) -> Option<u64> {
        self.processes.server_rss_kib()
    }

    /// Chat messages that have reached whom they can reach so far: a recipient, or, when he is off line, the server.
    pub fn settled(&self) -> u64 {
        self.sum(|counters| &counters.settled)
    }

    /// Presence stanzas of others received so far.
    pub fn presences(&self) -> u64 {
        self.sum(|counters| &counters.presences)
    }

    pub fn done(&self) -> u64 {
        self.sum(|counters| &counters.done)
    }

    pub fn failed(&self) -> u64 {
        self.sum(|counters| &counters.failed)
    }

    pub fn disconnected(&self) -> u64 {
        self.sum(|counters| &counters.disconnected)
    }

    pub fn disconnections(&self) -> Failures {
        self.disconnections
            .lock()
            .expect("nobody panics while holding it")
            .clone()
    }

    /// Ends the threads and with them all connections; keeps the keys if asked to, and hands over what was over time.
    pub fn stop(self, report: &mut Report) -> Result<(), String> {
        let mut accounts = Vec::new();
        for handle in self.handles {
            drop(handle.commands);
            let _ = handle.waker.wake();
            if let Ok(Ok(part)) = handle.thread.join() {
                accounts.extend(part);
            }
        }
        let mut timeline = self.timeline.into_inner();
        timeline.finish();
        report.timeline(timeline);
        report.samples(MEMORY, &self.memory.into_inner());
        match &self.global.keys {
            Some(file) => write_keys(file, &accounts),
            None => Ok(()),
        }
    }

    fn sum(&self, counter: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        self.handles
            .iter()
            .map(|handle| counter(&handle.counters).load(Ordering::Relaxed))
            .sum()
    }

    fn tell_all(&self, command: impl Fn() -> Command) {
        for handle in &self.handles {
            handle.tell(command());
        }
    }
}

/// Who of the generator's threads gets a core first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    Normal,
    /// Whenever it has something to do: for those whose latency is measured beside the work of others.
    First,
    Last,
}

impl Priority {
    const NICE_FIRST: i32 = -20;
    const NICE_LAST: i32 = 10;
    /// Of who comes first; the kernel allows no shorter one.
    const SLICE_FIRST: Duration = Duration::from_micros(100);

    /// Whether this process may put threads of its own before others (root, CAP_SYS_NICE, `ulimit -r`, `ulimit -e`).
    pub fn may_be_first() -> bool {
        let first = || setpriority_process(None, Priority::NICE_FIRST).is_ok();
        let tried = thread::spawn(move || become_realtime() || first());
        tried.join().unwrap_or(false)
    }

    /// Of the calling thread: Linux keeps priorities by thread.
    fn take(self) {
        let nice = match self {
            Priority::Normal => return,
            Priority::First if become_realtime() => return,
            Priority::First => {
                ask_for_slice(Priority::SLICE_FIRST);
                Priority::NICE_FIRST
            }
            Priority::Last => Priority::NICE_LAST,
        };
        // refused: the lag that is measured tells what came of it
        let _ = setpriority_process(None, nice);
    }
}

/// Makes the calling thread a real-time one; false if it may not be one. Others come behind it, whatever share of the core they are owed: threads
/// of the kernel and other programs, which else keep it waiting for milliseconds. And its weight is none that the kernel
/// takes from a server of the same session (`sched_autogroup`).
#[allow(unsafe_code)]
fn become_realtime() -> bool {
    // SAFETY: a plain system call about the calling thread (0), which reads the parameter.
    unsafe {
        let param = libc::sched_param { sched_priority: 1 };
        libc::sched_setscheduler(
            0,
            libc::SCHED_RR | libc::SCHED_RESET_ON_FORK,
            &raw const param,
        ) == 0
    }
}

/// Asks for short slices for the calling thread (EEVDF, Linux 6.12; needs no privilege): a thread that wakes up then runs at
/// once. Without it, whatever its nice value, it waits until the one that runs has used up its own slice: in a storm 1.4 ms
/// at p99 instead of 0.07. Refused: as with the nice value.
#[allow(unsafe_code)]
fn ask_for_slice(slice: Duration) {
    // SAFETY: plain integers. The calls are about the calling thread (0); the first writes at most `size` bytes into
    // `attributes`, the second reads as many from it.
    unsafe {
        let mut attributes: libc::sched_attr = std::mem::zeroed();
        let size = size_of::<libc::sched_attr>() as u32;
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) == 0 {
            attributes.size = size;
            attributes.sched_runtime = slice.as_nanos() as u64;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
        }
    }
}

impl Handle {
    /// A thread that has ended is found by whoever waits for its answer.
    fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
        let _ = self.waker.wake();
    }
}

/// `NAME<tab>LINE` of each account; a file that is not there yet holds none.
fn read_keys(file: &Path) -> Result<HashMap<String, String>, String> {
    match fs::read_to_string(file) {
        Ok(text) => {
            let lines = text.lines().filter_map(|line| line.split_once('\t'));
            Ok(lines
                .map(|(name, line)| (name.into(), line.into()))
                .collect())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(HashMap::new()),
        Err(error) => Err(format!("--keys {}: {error}", file.display())),
    }
}

/// Accounts of other runs stay in the file.
fn write_keys(file: &Path, accounts: &[Account]) -> Result<(), String> {
    let mut lines = read_keys(file)?;
    for account in accounts {
        if let Some(line) = account.keys.to_line() {
            lines.insert(account.name.clone(), line);
        }
    }
    let text: String = lines
        .iter()
        .map(|(name, line)| format!("{name}\t{line}\n"))
        .collect();
    fs::write(file, text).map_err(|error| format!("--keys {}: {error}", file.display()))
}

fn progress_bar(length: u64, title: &str) -> ProgressBar {
    let template = if length == 0 {
        "{prefix:12} {spinner} {msg}"
    } else {
        "{prefix:12} {wide_bar} {pos}/{len} {msg}"
    };
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    ProgressBar::new(length)
        .with_style(style)
        .with_prefix(title.to_owned())
}

/// The soft limit on open files rises to the hard one; fewer than the clients need is an error.
pub fn raise_file_limit(clients: u64) -> Result<(), String> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised)
        .map_err(|error| format!("raising the limit on open files: {error}"))?;
    match limit.maximum {
        Some(most) if most < clients + FILES_RESERVED => Err(format!(
            "{clients} users need {} open files, the hard limit is {most}: raise it (ulimit -Hn) or share the users \
             among several processes with different --prefix",
            clients + FILES_RESERVED
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scram::KeyCache;

    #[test]
    fn keys_of_other_accounts_stay_in_the_file() {
        let file = std::env::temp_dir().join(format!("loadtest-keys-{}", std::process::id()));
        let _ = fs::remove_file(&file);
        assert_eq!(read_keys(&file), Ok(HashMap::new()));
        let line = format!("sha-1 4 c2FsdA== {}=", "A".repeat(27));
        let account = |name: &str| Account {
            name: name.into(),
            keys: KeyCache::from_line(&line).unwrap(),
            resumption: None,
            token: None,
        };
        write_keys(&file, &[account("a"), account("b c")]).unwrap();
        write_keys(&file, &[account("d")]).unwrap();
        let keys = read_keys(&file).unwrap();
        assert_eq!((keys.len(), &keys["b c"]), (3, &line));
        fs::remove_file(&file).unwrap();
    }
}
