//! `chat`: pairs of online users send one another numbered messages, in a window or at a fixed rate.
//!
//! The [`Engine`] of a thread knows its pairs: what to write when, and what a received message means for latency,
//! order and loss. Each message carries its run, number and due time in its id, so nothing has to be remembered per
//! message. With a rate, latency counts from the time a message was due: a stall counts for all that it delayed.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use crate::connection::Account;
use crate::element::{attribute, escape};
use crate::fleet::Fleet;
use crate::options::{ChatOptions, Global, Target};
use crate::report::{self, Histogram, Report};

/// More messages than this that fell due in one turn wait for the next: receiving goes on in between.
const DUE_PER_TURN_MAX: u64 = 4096;

/// What all threads need to know.
#[derive(Clone, Debug)]
pub struct Plan {
    pub run: u64,
    pub epoch: Instant,
    pub pace: Pace,
    /// Messages in all; `None`: until told to stop.
    pub messages: Option<u64>,
    pub pairs: u32,
    pub threads: usize,
    pub drain: Duration,
    pub body: usize,
    pub bare: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Messages of each sender under way.
    Window(u32),
    /// Messages per second of all pairs.
    Rate(f64),
}

/// What came of the messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub sent: u64,
    pub received: u64,
    pub lost: u64,
    pub duplicated: u64,
    pub reordered: u64,
    /// Came back with an error.
    pub bounced: u64,
}

/// The output buffers of the senders; `None` for one that is gone.
pub trait Outputs {
    fn output(&mut self, slot: usize) -> Option<&mut Vec<u8>>;
}

/// The chat of one thread. Slots of a pair are 2n and 2n + 1; a direction is known by its sender's slot.
pub struct Engine {
    plan: Plan,
    directions: Vec<Direction>,
    rate_per_s: f64,
    due_offset: Duration,
    begun: u64,
    quota: Option<u64>,
    started: bool,
    sending: bool,
    last_receipt: Instant,
    suffix: Vec<u8>,
    pub latencies: Histogram,
    pub tally: Tally,
}

#[derive(Default)]
struct Direction {
    prefix: Vec<u8>,
    sent: u64,
    order: Order,
}

/// Follows the numbers that one receiver sees from one sender.
#[derive(Default)]
struct Order {
    next: u64,
    /// Below `next` and not yet seen.
    missing: BTreeSet<u64>,
}

#[derive(Debug, PartialEq, Eq)]
enum Arrival {
    InOrder,
    Late,
    Duplicate,
}

impl Order {
    fn arrive(&mut self, number: u64) -> Arrival {
        if number >= self.next {
            self.missing.extend(self.next..number);
            self.next = number + 1;
            return Arrival::InOrder;
        }
        if self.missing.remove(&number) {
            Arrival::Late
        } else {
            Arrival::Duplicate
        }
    }

    fn lost(&self, sent: u64) -> u64 {
        self.missing.len() as u64 + sent - self.next
    }
}

impl Engine {
    /// `slots`: the accounts of this thread's users, pair by pair.
    pub fn new(plan: Plan, thread: usize, target: &Target, slots: &[Account]) -> Engine {
        let threads = plan.threads as u64;
        let own_pairs = slots.len() as u64 / 2;
        let share = own_pairs as f64 / f64::from(plan.pairs.max(1));
        let directions: Vec<_> = (0..own_pairs as usize * 2)
            .map(|slot| Direction {
                prefix: message_prefix(&slots[slot ^ 1], target, plan.bare, plan.run),
                ..Direction::default()
            })
            .collect();
        let mut suffix = b"'><body>".to_vec();
        suffix.extend(
            (0..plan.body).map(|at| b"the quick brown fox jumps over the lazy dog "[at % 44]),
        );
        suffix.extend_from_slice(b"</body></message>");
        let thread = thread as u64;
        let quota = plan
            .messages
            .map(|all| all / threads + u64::from(thread < all % threads));
        let (rate_per_s, due_offset) = match plan.pace {
            Pace::Rate(rate) => (rate * share, Duration::from_secs_f64(thread as f64 / rate)),
            Pace::Window(_) => (0.0, Duration::ZERO),
        };
        Engine {
            directions,
            rate_per_s,
            due_offset,
            begun: 0,
            quota,
            started: false,
            sending: true,
            last_receipt: plan.epoch,
            suffix,
            latencies: report::histogram(),
            tally: Tally::default(),
            plan,
        }
    }

    /// When the next message is due, at a fixed rate.
    pub fn next_due(&self) -> Option<Instant> {
        let Pace::Rate(_) = self.plan.pace else {
            return None;
        };
        (self.sending && !self.directions.is_empty()).then(|| self.due(self.begun))
    }

    fn due(&self, number: u64) -> Instant {
        self.plan.epoch + self.due_offset + Duration::from_secs_f64(number as f64 / self.rate_per_s)
    }

    /// Sends what is due.
    pub fn turn(&mut self, now: Instant, outputs: &mut impl Outputs) {
        if self.directions.is_empty() {
            self.sending = false;
            return;
        }
        match self.plan.pace {
            Pace::Rate(_) => {
                let last = self.begun + DUE_PER_TURN_MAX;
                while self.sending && self.begun < last && self.due(self.begun) <= now {
                    let sender = (self.begun % self.directions.len() as u64) as usize;
                    let due = self.due(self.begun);
                    if let Some(out) = outputs.output(sender) {
                        self.write(sender, due, out);
                    }
                    self.begun += 1;
                    self.check_quota();
                }
            }
            Pace::Window(window) if !self.started => {
                'all: for _ in 0..window {
                    for sender in 0..self.directions.len() {
                        if !self.sending {
                            break 'all;
                        }
                        if let Some(out) = outputs.output(sender) {
                            self.write(sender, now, out);
                        }
                        self.begun += 1;
                        self.check_quota();
                    }
                }
            }
            Pace::Window(_) => {}
        }
        self.started = true;
    }

    fn check_quota(&mut self) {
        if self.quota.is_some_and(|quota| self.begun >= quota) {
            self.sending = false;
        }
    }

    fn write(&mut self, sender: usize, due: Instant, out: &mut Vec<u8>) {
        let direction = &mut self.directions[sender];
        let due_ns = due.saturating_duration_since(self.plan.epoch).as_nanos() as u64;
        out.extend_from_slice(&direction.prefix);
        write!(out, "{:x}-{due_ns:x}", direction.sent).expect("a vector takes it");
        out.extend_from_slice(&self.suffix);
        direction.sent += 1;
        self.tally.sent += 1;
    }

    /// Notes a message that `receiver` got. Returns the sender when it is owed the next one to send.
    pub fn on_message(&mut self, receiver: usize, message: &[u8], now: Instant) -> Option<usize> {
        let (run, number, due_ns) = parse_id(attribute(message, b"id")?)?;
        if run != self.plan.run || receiver >= self.directions.len() {
            return None;
        }
        if attribute(message, b"type") == Some(b"error") {
            self.tally.bounced += 1;
            return None;
        }
        let sender = receiver ^ 1;
        self.last_receipt = now;
        match self.directions[sender].order.arrive(number) {
            Arrival::InOrder => {}
            Arrival::Late => self.tally.reordered += 1,
            Arrival::Duplicate => {
                self.tally.duplicated += 1;
                return None;
            }
        }
        self.tally.received += 1;
        let now_ns = (now - self.plan.epoch).as_nanos() as u64;
        self.latencies
            .saturating_record(now_ns.saturating_sub(due_ns).max(1));
        (self.sending && matches!(self.plan.pace, Pace::Window(_))).then_some(sender)
    }

    /// Writes the next message of a sender to whom [`Engine::on_message`] owed it.
    pub fn send_next(&mut self, sender: usize, now: Instant, out: &mut Vec<u8>) {
        self.write(sender, now, out);
        self.begun += 1;
        self.check_quota();
    }

    /// The measurement begins: forget the latencies so far.
    pub fn measure(&mut self) {
        self.latencies.reset();
    }

    pub fn stop_sending(&mut self, now: Instant) {
        self.sending = false;
        self.last_receipt = self.last_receipt.max(now);
    }

    /// All has arrived, or nothing more will.
    pub fn is_finished(&self, now: Instant) -> bool {
        let complete = self.tally.received + self.tally.bounced >= self.tally.sent;
        let silent =
            self.started && now.saturating_duration_since(self.last_receipt) > self.plan.drain;
        // A window of which every message is lost would wait for ever.
        let stalled = matches!(self.plan.pace, Pace::Window(_)) && silent;
        (!self.sending && (complete || silent)) || stalled
    }

    pub fn finish(mut self) -> (Tally, Histogram) {
        self.tally.lost = self
            .directions
            .iter()
            .map(|direction| direction.order.lost(direction.sent))
            .sum();
        (self.tally, self.latencies)
    }
}

fn message_prefix(to: &Account, target: &Target, bare: bool, run: u64) -> Vec<u8> {
    let (name, domain, resource) = (
        escape(&to.name),
        escape(&target.domain),
        escape(&target.resource),
    );
    let resource = if bare {
        String::new()
    } else {
        format!("/{resource}")
    };
    format!("<message type='chat' to='{name}@{domain}{resource}' id='{run:x}-").into_bytes()
}

fn parse_id(id: &[u8]) -> Option<(u64, u64, u64)> {
    let mut parts = std::str::from_utf8(id)
        .ok()?
        .split('-')
        .map(|part| u64::from_str_radix(part, 16).ok());
    Some((parts.next()??, parts.next()??, parts.next()??))
}

impl Tally {
    pub fn add(&mut self, other: &Tally) {
        self.sent += other.sent;
        self.received += other.received;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
        self.bounced += other.bounced;
    }

    pub fn is_clean(&self) -> bool {
        self.lost + self.duplicated + self.reordered + self.bounced == 0
    }
}

/// The whole scenario; returns its report and whether all went well.
pub fn run(global: &Global, options: &ChatOptions) -> Result<Report, String> {
    let mut global = global.clone();
    global.users = (global.users / 2).max(1) * 2;
    if options.rate.is_some_and(|rate| rate <= 0.0) || options.window == 0 {
        return Err("--rate and --window must be greater than 0".into());
    }
    if global.resource.is_empty() && !options.bare {
        return Err(
            "--resource may only be empty with --bare: messages go to full addresses".into(),
        );
    }
    let mut target = global.target()?;
    target.stream_management = options.sm;
    let fleet = Fleet::start(&global, target)?;
    let login = fleet.login_all("log in")?;
    let mut report = Report::new("chat");
    report.note_failures(&login.failures);
    fleet.wait_until_quiet();

    let warmup = options
        .warmup
        .unwrap_or(if options.messages.is_some() { 0.0 } else { 1.0 });
    fleet.start_chat(Plan {
        run: std::time::UNIX_EPOCH
            .elapsed()
            .map_or(1, |elapsed| elapsed.as_nanos() as u64),
        epoch: Instant::now(),
        pace: options
            .rate
            .map_or(Pace::Window(options.window), Pace::Rate),
        messages: options.messages,
        pairs: global.users / 2,
        threads: global.threads,
        drain: Duration::from_secs_f64(options.drain),
        body: options.body,
        bare: options.bare,
    });
    fleet.watch_chat("warm up", Duration::from_secs_f64(warmup));
    if warmup > 0.0 {
        fleet.measure_chat();
    }
    let (before, received_before) = (fleet.snapshot(), fleet.received());
    let outcome = match options.messages {
        Some(_) => fleet.finish_chat("chat")?,
        None => {
            fleet.watch_chat("chat", Duration::from_secs_f64(options.duration));
            Default::default()
        }
    };
    let (after, received_after) = (fleet.snapshot(), fleet.received());
    let outcome = match options.messages {
        Some(_) => outcome,
        None => {
            fleet.stop_chat();
            fleet.finish_chat("drain")?
        }
    };
    let usage = before.until(&after);
    let measured = received_after - received_before;
    let seconds = usage.wall.as_secs_f64();

    report.number("users", "users", global.users, "");
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    match options.rate {
        Some(rate) => report.number("rate_per_s", "rate asked for", rate, "messages/s"),
        None => report.number(
            "window",
            "window of each sender",
            options.window,
            "messages",
        ),
    }
    report.number("seconds", "measured", seconds, "s");
    report.number("messages", "messages measured", measured, "");
    report.number(
        "messages_per_s",
        "messages",
        measured as f64 / seconds,
        "/s",
    );
    report.latencies("latency", "latency", &outcome.latencies);
    report.usage(&usage, measured, "message", "us", 1e6);
    let tally = &outcome.tally;
    report.number("sent", "sent in all", tally.sent, "");
    report.number("lost", "lost", tally.lost, "");
    report.number("duplicated", "duplicated", tally.duplicated, "");
    report.number("reordered", "reordered", tally.reordered, "");
    report.number("bounced", "bounced", tally.bounced, "");
    report.number("disconnected", "connections lost", fleet.disconnected(), "");
    report.note_failures(&fleet.disconnections());
    if !tally.is_clean() {
        report.fail("messages were lost, duplicated, reordered or bounced");
    }
    if measured == 0 {
        report.fail("no message arrived");
    }
    fleet.stop();
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scram::KeyCache;

    impl Outputs for [Vec<u8>; 2] {
        fn output(&mut self, slot: usize) -> Option<&mut Vec<u8>> {
            self.get_mut(slot)
        }
    }

    fn engine(pace: Pace, messages: Option<u64>) -> Engine {
        let plan = Plan {
            run: 0xabc,
            epoch: Instant::now(),
            pace,
            messages,
            pairs: 1,
            threads: 1,
            drain: Duration::from_secs(1),
            body: 5,
            bare: false,
        };
        let account = |name: &str| Account {
            name: name.into(),
            keys: KeyCache::default(),
        };
        Engine::new(plan, 0, &Target::for_tests(), &[account("a"), account("b")])
    }

    /// Lets both senders write; returns what each wrote.
    fn turn(engine: &mut Engine, now: Instant) -> [String; 2] {
        let mut written = <[Vec<u8>; 2]>::default();
        engine.turn(now, &mut written);
        written.map(|bytes| String::from_utf8(bytes).unwrap())
    }

    fn stanzas(bytes: &str) -> Vec<&str> {
        bytes.split_inclusive("</message>").collect()
    }

    #[test]
    fn a_window_is_filled_once_and_refilled_by_receipts() {
        let mut engine = engine(Pace::Window(2), None);
        let now = Instant::now();
        let [from_a, from_b] = turn(&mut engine, now);
        assert_eq!(stanzas(&from_a).len(), 2);
        assert_eq!(stanzas(&from_b).len(), 2);
        assert!(
            from_a.starts_with("<message type='chat' to='b@localhost/load' id='abc-0-"),
            "{from_a}"
        );
        assert!(from_a.ends_with("'><body>the q</body></message>"));
        assert_eq!(turn(&mut engine, now), ["", ""]);
        let received = stanzas(&from_a)[0].as_bytes();
        assert_eq!(engine.on_message(1, received, Instant::now()), Some(0));
        assert_eq!(engine.on_message(1, received, Instant::now()), None);
        assert_eq!((engine.tally.received, engine.tally.duplicated), (1, 1));
    }

    #[test]
    fn a_rate_sends_what_is_due_and_counts_from_then() {
        let mut engine = engine(Pace::Rate(1000.0), Some(10));
        let epoch = engine.plan.epoch;
        let [from_a, from_b] = turn(&mut engine, epoch + Duration::from_micros(4500));
        assert_eq!((stanzas(&from_a).len(), stanzas(&from_b).len()), (3, 2));
        assert_eq!(engine.next_due(), Some(epoch + Duration::from_millis(5)));
        let last = stanzas(&from_a)[2].as_bytes();
        engine.on_message(1, last, epoch + Duration::from_millis(14));
        assert!(
            (9_900_000..10_100_000).contains(&engine.latencies.max()),
            "{}",
            engine.latencies.max()
        );
        turn(&mut engine, epoch + Duration::from_secs(1));
        assert_eq!((engine.tally.sent, engine.next_due()), (10, None));
    }

    #[test]
    fn losses_and_disorder_are_told_apart() {
        let mut order = Order::default();
        assert_eq!(order.arrive(0), Arrival::InOrder);
        assert_eq!(order.arrive(3), Arrival::InOrder);
        assert_eq!(order.arrive(1), Arrival::Late);
        assert_eq!(order.arrive(1), Arrival::Duplicate);
        assert_eq!(order.arrive(0), Arrival::Duplicate);
        assert_eq!(order.lost(4), 1);
        assert_eq!(order.lost(6), 3);
    }

    #[test]
    fn messages_of_other_runs_do_not_count() {
        let mut engine = engine(Pace::Window(1), None);
        turn(&mut engine, Instant::now());
        for id in ["abd-0-0", "abc-0", "", "hello"] {
            let message = format!("<message id='{id}'/>");
            assert_eq!(
                engine.on_message(0, message.as_bytes(), Instant::now()),
                None
            );
        }
        assert_eq!(engine.tally.received, 0);
    }
}
