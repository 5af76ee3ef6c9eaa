//! The log: one line an event, to standard error. In: events of `tracing`. Out: lines of text or of JSON.
//!
//! Promises: the same warning or error is written at most [`REPEATS_MAX`] times in [`SPAN`], and how many were left out is
//! written then; a login, a refused login and a disconnect are one line each with address, reason and bare JID, always; what
//! a client has chosen stands in quotes, escaped, and behind the address, so that it can forge neither a line nor an
//! address (config/fail2ban).
//!
//! A shard that logs in thousands a second does not make a system call for each line: lines below a warning are collected
//! ([`Lines`]) and written by a thread of their own at most [`DELAY`] later, a warning or an error at once, behind all that came
//! before it. What is collected is bounded by [`COLLECTED_BYTES_MAX`]; then who logs writes it himself. All is written when the
//! server ends, or panics; only a process that is killed takes the lines of [`DELAY`] with it.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt as lines, reload};

use super::collect::Follow;
use super::{Counter, Recorded, Stage};

/// Lines of one kind in [`SPAN`]; beyond, they are counted.
const REPEATS_MAX: u32 = 10;
/// How long the same counts as a repeat.
const SPAN: Duration = Duration::from_secs(10);
/// How late a line may be written.
const DELAY: Duration = Duration::from_millis(50);
/// Of lines that wait to be written.
const COLLECTED_BYTES_MAX: usize = 64 << 10;
/// How long lines are tried while what takes them takes nothing.
const PATIENCE: Duration = Duration::from_millis(100);
/// Of this module's own lines, which are never left out.
const TARGET: &str = "nitro::log";

/// Lines left out since the start.
pub static LEFT_OUT: Counter = Counter::new();

static REPEATS: OnceLock<Arc<Repeats>> = OnceLock::new();

static LINES: OnceLock<Arc<Lines>> = OnceLock::new();

static LEVEL: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts the log of this process, from this level on ("info", ...), as text or as JSON. Only the first call counts.
pub fn start_log(level: &str, json: bool) {
    let (filter, handle) = reload::Layer::new(filter(level));
    let repeats = REPEATS.get_or_init(Arc::default).clone();
    let collected = Arc::new(Lines::new(Box::new(io::stderr())));
    let lines = lines::layer()
        .with_writer(Pen(collected.clone()))
        .with_ansi(false);
    let lines = match json {
        false => lines.boxed(),
        true => lines.json().flatten_event(true).boxed(),
    };
    let _ = LEVEL.set(handle);
    let started = tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(Limit(repeats))
        .try_init();
    // an error: there is one already
    if started.is_err() || LINES.set(collected.clone()).is_err() {
        return;
    }
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        flush_log();
        before(panic);
    }));
    let writer = collected.clone();
    let thread = std::thread::Builder::new().name("log".into());
    if thread.spawn(move || writer.write_on()).is_err() {
        collected.collect(false);
    }
}

/// Writes what is collected: before the process ends.
pub fn flush_log() {
    if let Some(lines) = LINES.get() {
        lines.flush();
    }
}

/// Another level, from now on.
pub fn set_log_level(level: &str) {
    if let Some(handle) = LEVEL.get() {
        // an error: the log has ended
        let _ = handle.reload(filter(level));
    }
}

fn filter(level: &str) -> EnvFilter {
    EnvFilter::new(format!("{level},sqlx=warn"))
}

/// Tells now and then how many lines were left out.
pub fn repeats() -> Box<dyn Follow> {
    Box::new(Tell(REPEATS.get_or_init(Arc::default).clone()))
}

/// Lines on their way to where the log goes.
struct Lines {
    waiting: Mutex<Waiting>,
    more: Condvar,
    /// Locked from taking lines until they are written, so that they stay in order. Never waited for with `waiting` locked.
    out: Mutex<Box<dyn Write + Send>>,
}

struct Waiting {
    bytes: Vec<u8>,
    /// An empty buffer with room.
    spare: Vec<u8>,
    /// The writing thread sleeps until there is more.
    idle: bool,
    /// Whether there is a writing thread.
    collect: bool,
}

/// Held from `lock` on, whatever has happened to others who held it: a line is whole, or not there.
fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lines {
    fn new(out: Box<dyn Write + Send>) -> Lines {
        Lines {
            waiting: Mutex::new(Waiting {
                bytes: Vec::new(),
                spare: Vec::new(),
                idle: false,
                collect: true,
            }),
            more: Condvar::new(),
            out: Mutex::new(out),
        }
    }

    fn collect(&self, collect: bool) {
        lock(&self.waiting).collect = collect;
        self.flush();
    }

    /// Takes a line; `urgent`: writes it before this returns.
    fn take(&self, line: &[u8], urgent: bool) {
        let mut waiting = lock(&self.waiting);
        waiting.bytes.extend_from_slice(line);
        let full = waiting.bytes.len() > COLLECTED_BYTES_MAX;
        if urgent || full || !waiting.collect {
            drop(waiting);
            self.flush();
        } else if mem::take(&mut waiting.idle) {
            drop(waiting);
            self.more.notify_one();
        }
    }

    fn flush(&self) {
        let mut out = lock(&self.out);
        let mut bytes = {
            let mut waiting = lock(&self.waiting);
            let spare = mem::take(&mut waiting.spare);
            mem::replace(&mut waiting.bytes, spare)
        };
        // an error: there is nobody to tell
        let _ = write_patiently(&mut **out, &bytes);
        let _ = out.flush();
        bytes.clear();
        if bytes.capacity() <= 2 * COLLECTED_BYTES_MAX {
            lock(&self.waiting).spare = bytes;
        }
    }

    /// The writing thread.
    fn write_on(&self) {
        loop {
            let mut waiting = lock(&self.waiting);
            while waiting.bytes.is_empty() {
                waiting.idle = true;
                waiting = self
                    .more
                    .wait(waiting)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            drop(waiting);
            std::thread::sleep(DELAY);
            self.flush();
        }
    }
}

/// Writes all, also to a pipe or terminal that somebody has made non-blocking, if it takes some within [`PATIENCE`].
fn write_patiently(out: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    let mut blocked: Option<Instant> = None;
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => (bytes, blocked) = (&bytes[written..], None),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if blocked.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
                    return Err(error);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes one event, which is written to it in one piece.
struct Line<'a> {
    lines: &'a Lines,
    urgent: bool,
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.lines.take(line, self.urgent);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What writes lines.
struct Pen(Arc<Lines>);

impl<'a> MakeWriter<'a> for Pen {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            lines: &self.0,
            urgent: true,
        }
    }

    fn make_writer_for(&'a self, of: &Metadata<'_>) -> Line<'a> {
        Line {
            lines: &self.0,
            urgent: matches!(*of.level(), Level::WARN | Level::ERROR),
        }
    }
}

/// What was said how often, by the place in the program that says it: few, so their number needs no bound.
#[derive(Default)]
struct Repeats(Mutex<HashMap<Identifier, Said>>);

struct Said {
    since: Instant,
    count: u32,
    left_out: u64,
    /// The newest of those that were left out.
    like: String,
}

impl Repeats {
    /// May it be said again? `like` tells what it says.
    fn say(&self, of: &Metadata<'_>, like: impl FnOnce() -> String) -> bool {
        let Ok(mut all) = self.0.lock() else {
            return true;
        };
        let said = all.entry(of.callsite()).or_insert_with(|| Said {
            since: Instant::now(),
            count: 0,
            left_out: 0,
            like: String::new(),
        });
        if said.left_out == 0 && said.since.elapsed() >= SPAN {
            (said.since, said.count) = (Instant::now(), 0);
        }
        said.count += 1;
        if said.count <= REPEATS_MAX {
            return true;
        }
        said.left_out += 1;
        said.like = like();
        LEFT_OUT.one();
        false
    }

    /// What was left out in spans that are over.
    fn over(&self, span: Duration) -> Vec<(u64, String)> {
        let Ok(mut all) = self.0.lock() else {
            return Vec::new();
        };
        let mut over = Vec::new();
        for said in all.values_mut() {
            if said.left_out > 0 && said.since.elapsed() >= span {
                over.push((said.left_out, std::mem::take(&mut said.like)));
                (said.since, said.count, said.left_out) = (Instant::now(), 0, 0);
            }
        }
        over
    }
}

/// Lets warnings and errors through as often as they may be said.
struct Limit(Arc<Repeats>);

impl<S: Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let of = event.metadata();
        let limited = matches!(*of.level(), Level::WARN | Level::ERROR) && of.target() != TARGET;
        !limited
            || self.0.say(of, || {
                let mut message = Message::default();
                event.record(&mut message);
                message.0
            })
    }
}

/// The text of an event, without its fields.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

struct Tell(Arc<Repeats>);

impl Tell {
    fn tell(&self, span: Duration) {
        for (left_out, like) in self.0.over(span) {
            tracing::warn!(target: TARGET, left_out, like, "repeated lines were left out");
        }
    }
}

impl Follow for Tell {
    fn piece(&mut self, _: Option<usize>, _: Stage, _: &Recorded) {}

    fn turn(&mut self) -> Duration {
        self.tell(SPAN);
        SPAN
    }

    fn end(&mut self) {
        self.tell(Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        fn lines(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().map(String::from).collect()
        }
    }

    #[test]
    fn lines_wait_for_their_thread_but_warnings_do_not_and_all_stay_in_order() {
        let written = Written::default();
        let lines = Arc::new(Lines::new(Box::new(written.clone())));
        let layer = lines::layer()
            .with_writer(Pen(lines.clone()))
            .with_ansi(false)
            .without_time();
        let log = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(log, || {
            tracing::info!("first");
            tracing::info!("second");
            assert_eq!(written.lines(), [""; 0], "there is no thread yet");
            tracing::warn!("third");
            let texts = ["first", "second", "third"];
            let all = written.lines();
            assert_eq!(all.len(), 3, "{all:?}");
            assert!(all.iter().zip(texts).all(|(l, text)| l.ends_with(text)));
            tracing::info!("fourth");
            lines.flush();
            assert!(written.lines()[3].ends_with("fourth"));
            let writer = lines.clone();
            std::thread::spawn(move || writer.write_on());
            for n in 5..10 {
                tracing::info!("line {n}");
                let until = Instant::now() + Duration::from_secs(20);
                while written.lines().len() < n && Instant::now() < until {
                    std::thread::yield_now();
                }
                assert!(written.lines()[n - 1].ends_with(&format!("line {n}")));
            }
        });
    }

    #[test]
    fn what_would_block_for_a_moment_loses_no_line() {
        struct Slow(Written, u32);
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.1 += 1;
                match self.1 % 3 {
                    0 => self.0.write(&bytes[..bytes.len().min(7)]),
                    1 => Err(ErrorKind::WouldBlock.into()),
                    _ => Err(ErrorKind::Interrupted.into()),
                }
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let written = Written::default();
        write_patiently(&mut Slow(written.clone(), 0), b"one line\nand another\n").unwrap();
        assert_eq!(written.lines(), ["one line", "and another"]);
        struct Never;
        impl Write for Never {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(ErrorKind::WouldBlock.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(write_patiently(&mut Never, b"a line").is_err());
    }

    #[test]
    fn what_is_collected_is_bounded_and_not_collected_where_nobody_writes_it() {
        let written = Written::default();
        let lines = Lines::new(Box::new(written.clone()));
        let line = [b'x'; 99];
        for n in 1..=COLLECTED_BYTES_MAX / 99 {
            lines.take(&line, false);
            assert!(written.0.lock().unwrap().is_empty(), "{n}");
        }
        lines.take(&line, false);
        let all = (COLLECTED_BYTES_MAX / 99 + 1) * 99;
        assert_eq!(written.0.lock().unwrap().len(), all);
        lines.collect(false);
        lines.take(&line, false);
        assert_eq!(written.0.lock().unwrap().len(), all + 99);
    }

    /// What is written while `log` runs.
    fn written(log: impl FnOnce(&Arc<Repeats>)) -> Vec<String> {
        let (repeats, written) = (Arc::new(Repeats::default()), Written::default());
        let writer = written.clone();
        let lines = lines::layer()
            .with_writer(move || writer.clone())
            .with_ansi(false);
        let subscriber = tracing_subscriber::registry()
            .with(lines)
            .with(Limit(repeats.clone()));
        tracing::subscriber::with_default(subscriber, || log(&repeats));
        written.lines()
    }

    #[test]
    fn the_same_warning_is_written_a_few_times_and_then_counted() {
        let lines = written(|repeats| {
            let mut tell = Tell(repeats.clone());
            for n in 0..REPEATS_MAX + 25 {
                tracing::warn!(n, "the disk is slow");
                tracing::info!(n, "logged in");
            }
            tracing::error!("something else");
            assert_eq!(tell.turn(), SPAN);
            tell.end();
            tracing::warn!("what else");
        });
        let of = |text: &str| lines.iter().filter(|l| l.contains(text)).count();
        // one more is the line that tells of them
        assert_eq!(of("the disk is slow"), REPEATS_MAX as usize + 1);
        assert_eq!(of("logged in"), REPEATS_MAX as usize + 25);
        assert_eq!(of("something else"), 1);
        assert_eq!(of("what else"), 1);
        let told = lines.iter().find(|l| l.contains("were left out")).unwrap();
        assert!(told.contains("left_out=25"), "{told}");
        assert!(told.contains("like=\"the disk is slow\""), "{told}");
    }

    #[test]
    fn after_its_span_a_warning_is_written_again() {
        let lines = written(|repeats| {
            for _ in 0..2 {
                for _ in 0..=REPEATS_MAX {
                    tracing::warn!("the disk is slow");
                }
                assert_eq!(repeats.over(Duration::ZERO).len(), 1);
            }
        });
        assert_eq!(lines.len(), 2 * REPEATS_MAX as usize);
    }

    #[test]
    fn what_a_client_has_chosen_stays_in_its_quotes() {
        let lines = written(|_| {
            let user = "x\" address=6.6.6.6\n2026-11-28T00:00:00Z  INFO nitro::shard::login: authentication failed address=6.6.6.6 user=\"";
            tracing::info!(address = %"10.0.0.1", user, "authentication failed");
        });
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            lines[0].contains(r#"authentication failed address=10.0.0.1 user="x\" address=6"#),
            "{lines:?}"
        );
    }
}
