//! `chat`: pairs of online users send one another numbered messages, in a window or at a fixed rate.
//!
//! The [`Engine`] of a thread knows its pairs: what to write when, and what a received message means for latency,
//! order and loss. Each message carries its run, number and due time in its id, so nothing has to be remembered per
//! message. With a rate, latency counts from the time a message was due: a stall counts for all that it delayed.
//!
//! With acknowledgements (XEP-0198) it asks behind the messages and remembers the due time of each until the server's count
//! covers it; a message that was acknowledged and never came is the worst that a run can find. Some recipients may be
//! off line until all is sent; of their messages only loss and order count, not the time.

use std::collections::{BTreeSet, VecDeque};
use std::io::Write;
use std::time::{Duration, Instant};

use crate::connection::Account;
use crate::element::{attribute, escape, find};
use crate::fleet::Fleet;
use crate::metrics::Counters;
use crate::options::{ChatOptions, Global, Target};
use crate::report::{self, Histogram, Report};
use crate::timeline::{Kind, Recorder};
use crate::worker::Job;

/// More messages than this that fell due in one turn wait for the next: receiving goes on in between.
const DUE_PER_TURN_MAX: u64 = 4096;
/// How long --settle waits for the server to come to rest.
const SETTLE_MAX: Duration = Duration::from_secs(900);
const ASK: &[u8] = b"<r xmlns='urn:xmpp:sm:3'/>";

/// What all threads need to know.
#[derive(Clone, Debug)]
pub struct Plan {
    pub run: u64,
    pub epoch: Instant,
    pub pace: Pace,
    /// Messages in all; `None`: until told to stop.
    pub messages: Option<u64>,
    pub pairs: u32,
    /// Of these pairs one is off line.
    pub offline_pairs: u32,
    /// Ask for an acknowledgement behind so many messages of a sender.
    pub ack: Option<u64>,
    pub no_store: bool,
    pub threads: usize,
    pub drain: Duration,
    pub body: usize,
    pub bare: bool,
    /// Only the first one of a pair writes.
    pub one_way: bool,
    pub traffic: Traffic,
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Messages within the pairs.
    Messages,
    /// Changes of presence, which the server sends to the contacts on line of each: so many.
    Presence { contacts: u32 },
    /// Each comes into his chat room, once.
    /// The first one of each room makes it, and takes it as it is.
    Make { occupants: u32 },
    /// The others come into rooms of so many.
    Join { occupants: u32 },
    /// The first ones of each chat room talk to all who are in it.
    Room { occupants: u32, senders: u32 },
}

#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Messages of each sender under way.
    Window(u32),
    /// Messages per second of all pairs.
    Rate(f64),
}

impl Plan {
    /// Is the second one of a pair off line? Spread evenly over all pairs.
    pub fn is_offline(&self, pair: u32) -> bool {
        let before =
            |pair: u32| u64::from(pair) * u64::from(self.offline_pairs) / u64::from(self.pairs);
        before(pair + 1) > before(pair)
    }

    /// Those who have someone to write to and are on line.
    fn senders(&self) -> u32 {
        if self.one_way {
            return self.pairs;
        }
        match self.traffic {
            Traffic::Room { occupants, senders } => self.pairs * 2 / occupants * senders,
            Traffic::Make { occupants } => self.pairs * 2 / occupants,
            Traffic::Join { occupants } => self.pairs * 2 - self.pairs * 2 / occupants,
            Traffic::Messages | Traffic::Presence { .. } => self.pairs * 2 - self.offline_pairs,
        }
    }
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
    /// Sent to someone off line.
    pub to_offline: u64,
    pub acknowledged: u64,
    pub unacknowledged: u64,
    /// Of the lost ones.
    pub acknowledged_lost: u64,
}

/// The chat of one thread, or of all.
pub struct Outcome {
    pub tally: Tally,
    /// The parts of the chat, at least one: before the measurement, quiet, in a storm.
    pub phases: Vec<Phase>,
}

/// What came of the messages that were due in one part of a chat, whenever they arrived.
#[derive(Clone)]
pub struct Phase {
    /// Since the plan's epoch.
    start_ns: u64,
    /// From due to received, of those who were on line.
    pub latencies: Histogram,
    /// From due to acknowledged.
    pub ack_latencies: Histogram,
    /// From due to written to the socket, at a fixed rate: the generator's own share of a latency.
    pub lag: Histogram,
}

impl Phase {
    fn new(start_ns: u64) -> Phase {
        Phase {
            start_ns,
            latencies: report::histogram(),
            ack_latencies: report::histogram(),
            lag: report::histogram(),
        }
    }

    fn add(&mut self, other: &Phase) {
        for (own, other) in [
            (&mut self.latencies, &other.latencies),
            (&mut self.ack_latencies, &other.ack_latencies),
            (&mut self.lag, &other.lag),
        ] {
            own.add(other).expect("histograms have the same bounds");
        }
    }
}

/// The phase in which something was due.
fn phase(phases: &mut [Phase], due_ns: u64) -> &mut Phase {
    let after = phases.partition_point(|phase| phase.start_ns <= due_ns);
    &mut phases[after.saturating_sub(1)]
}

/// Where a sender's bytes go.
pub struct Output<'a> {
    pub bytes: &'a mut Vec<u8>,
    /// Stanzas that the sender has sent, as XEP-0198 counts them.
    pub stanzas: &'a mut u32,
}

/// The outputs of the senders; `None` for one that is gone.
pub trait Outputs {
    fn output(&mut self, slot: usize) -> Option<Output<'_>>;
}

/// The chat of one thread. Slots of a pair are 2n and 2n + 1; a direction is known by its sender's slot.
pub struct Engine {
    plan: Plan,
    directions: Vec<Direction>,
    /// What the own presence comes from: bare JID and slash; in chat rooms the whole address there.
    own: Vec<Vec<u8>>,
    /// Slots of those who send.
    senders: Vec<usize>,
    rate_per_s: f64,
    due_offset: Duration,
    begun: u64,
    quota: Option<u64>,
    started: bool,
    sending: bool,
    /// The last messages have been asked for.
    asked: bool,
    /// Those who were off line are not any more.
    collecting: bool,
    last_receipt: Instant,
    suffix: Vec<u8>,
    phases: Vec<Phase>,
    /// When those were due that are written, but not to their sockets yet.
    unflushed: Vec<u64>,
    tally: Tally,
    /// To someone off line, and taken by the server as far as one can tell.
    kept: u64,
}

#[derive(Default)]
struct Direction {
    prefix: Vec<u8>,
    /// Another stanza that follows at once.
    tail: Vec<u8>,
    to_offline: bool,
    sent: u64,
    /// The first so many of them.
    acknowledged: u64,
    /// Of the others: the sender's count of stanzas with it, and when it was due.
    unacknowledged: VecDeque<(u32, u64)>,
    /// When he was due to come into his room, until he is in.
    coming: Option<u64>,
    order: Order,
}

/// Follows the numbers that one receiver sees from one sender.
#[derive(Default)]
struct Order {
    next: u64,
    /// Below `next` and not yet seen.
    missing: BTreeSet<u64>,
    /// Came back to the sender.
    refused: BTreeSet<u64>,
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

    /// How many of the first `count` neither came nor were refused.
    fn lost(&self, count: u64) -> u64 {
        let came = |number: &u64| *number < self.next && !self.missing.contains(number);
        let missing = self.missing.range(..count).count() as u64 + count.saturating_sub(self.next);
        let refused = self.refused.range(..count).filter(|number| !came(number));
        missing - refused.count() as u64
    }
}

impl Engine {
    /// `slots`: the accounts of this thread's users, pair by pair.
    pub fn new(plan: Plan, thread: usize, target: &Target, slots: &[Account]) -> Engine {
        let threads = plan.threads as u64;
        let own_pairs = slots.len() / 2;
        let offline = |slot: usize| {
            slot % 2 == 1 && plan.is_offline((slot / 2 * plan.threads + thread) as u32)
        };
        // the number of a user among those of all threads
        let number = |slot: usize| ((slot / 2 * plan.threads + thread) * 2 + slot % 2) as u32;
        let directions: Vec<_> = (0..own_pairs * 2)
            .map(|slot| Direction {
                prefix: match plan.traffic {
                    // he may come back with another resource
                    Traffic::Messages => message_prefix(
                        &slots[slot ^ 1],
                        target,
                        plan.bare || offline(slot ^ 1),
                        plan.run,
                    ),
                    Traffic::Presence { .. } => {
                        format!("<presence><status>{:x}-", plan.run).into_bytes()
                    }
                    Traffic::Make { occupants } | Traffic::Join { occupants } => {
                        let (room, nick) = (number(slot) / occupants, escape(&slots[slot].name));
                        let domain = escape(&target.domain);
                        format!(
                            "<presence to='load{room}@rooms.{domain}/{nick}' id='{:x}-",
                            plan.run
                        )
                        .into_bytes()
                    }
                    Traffic::Room { occupants, .. } => {
                        let room = number(slot) / occupants;
                        let domain = escape(&target.domain);
                        format!(
                            "<message type='groupchat' to='load{room}@rooms.{domain}' id='{:x}-",
                            plan.run
                        )
                        .into_bytes()
                    }
                },
                tail: match plan.traffic {
                    Traffic::Make { occupants } => format!(
                        "<iq type='set' id='own' to='load{}@rooms.{}'>\
                         <query xmlns='http://jabber.org/protocol/muc#owner'>\
                         <x xmlns='jabber:x:data' type='submit'/></query></iq>",
                        number(slot) / occupants,
                        escape(&target.domain)
                    )
                    .into_bytes(),
                    _ => Vec::new(),
                },
                to_offline: offline(slot ^ 1),
                ..Direction::default()
            })
            .collect();
        let senders: Vec<_> = (0..directions.len())
            .filter(|slot| !(offline(*slot) || plan.one_way && slot % 2 == 1))
            .filter(|slot| match plan.traffic {
                Traffic::Room { occupants, senders } => number(*slot) % occupants < senders,
                Traffic::Make { occupants } => number(*slot) % occupants == 0,
                Traffic::Join { occupants } => number(*slot) % occupants != 0,
                _ => true,
            })
            .collect();
        let share = senders.len() as f64 / f64::from(plan.senders().max(1));
        let mut suffix = b"'><body>".to_vec();
        suffix.extend(
            (0..plan.body).map(|at| b"the quick brown fox jumps over the lazy dog "[at % 44]),
        );
        suffix.extend_from_slice(b"</body>");
        if plan.no_store {
            suffix.extend_from_slice(b"<no-store xmlns='urn:xmpp:hints'/>");
        }
        suffix.extend_from_slice(b"</message>");
        if let Traffic::Presence { .. } = plan.traffic {
            suffix = b"</status></presence>".to_vec();
        }
        if let Traffic::Make { .. } | Traffic::Join { .. } = plan.traffic {
            suffix = b"'><x xmlns='http://jabber.org/protocol/muc'/></presence>".to_vec();
        }
        let own = slots.iter().enumerate().map(|(slot, account)| {
            let (name, domain) = (escape(&account.name), escape(&target.domain));
            match plan.traffic {
                Traffic::Make { occupants } | Traffic::Join { occupants } => {
                    format!("load{}@rooms.{domain}/{name}", number(slot) / occupants)
                }
                _ => format!("{name}@{domain}/"),
            }
            .into_bytes()
        });
        let own = own.collect();
        let thread = thread as u64;
        let quota = match plan.traffic {
            // each of them once
            Traffic::Make { .. } | Traffic::Join { .. } => Some(senders.len() as u64),
            _ => plan
                .messages
                .map(|all| all / threads + u64::from(thread < all % threads)),
        };
        let (rate_per_s, due_offset) = match plan.pace {
            Pace::Rate(rate) => (rate * share, Duration::from_secs_f64(thread as f64 / rate)),
            Pace::Window(_) => (0.0, Duration::ZERO),
        };
        Engine {
            directions,
            own,
            senders,
            rate_per_s,
            due_offset,
            begun: 0,
            quota,
            started: false,
            sending: true,
            asked: false,
            collecting: plan.offline_pairs == 0,
            last_receipt: plan.epoch,
            suffix,
            phases: vec![Phase::new(0)],
            unflushed: Vec::new(),
            tally: Tally::default(),
            kept: 0,
            plan,
        }
    }

    /// When the next message is due, at a fixed rate.
    pub fn next_due(&self) -> Option<Instant> {
        let Pace::Rate(_) = self.plan.pace else {
            return None;
        };
        (self.sending && !self.senders.is_empty()).then(|| self.due(self.begun))
    }

    fn due(&self, number: u64) -> Instant {
        self.plan.epoch + self.due_offset + Duration::from_secs_f64(number as f64 / self.rate_per_s)
    }

    /// Sends what is due.
    pub fn turn(&mut self, now: Instant, outputs: &mut impl Outputs) {
        if self.senders.is_empty() {
            self.sending = false;
            return;
        }
        match self.plan.pace {
            Pace::Rate(_) => {
                let last = self.begun + DUE_PER_TURN_MAX;
                while self.sending && self.begun < last && self.due(self.begun) <= now {
                    let sender = self.senders[(self.begun % self.senders.len() as u64) as usize];
                    let due = self.due(self.begun);
                    if let Some(out) = outputs.output(sender) {
                        self.write(sender, due, out);
                        self.unflushed.push(self.since_epoch_ns(due));
                    }
                    self.begun += 1;
                    self.check_quota();
                }
            }
            Pace::Window(window) if !self.started => {
                'all: for _ in 0..window {
                    for at in 0..self.senders.len() {
                        if !self.sending {
                            break 'all;
                        }
                        let sender = self.senders[at];
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
        if !self.sending && !self.asked && self.plan.ack.is_some() {
            self.asked = true;
            for (slot, direction) in self.directions.iter().enumerate() {
                if !direction.unacknowledged.is_empty()
                    && let Some(out) = outputs.output(slot)
                {
                    out.bytes.extend_from_slice(ASK);
                }
            }
        }
    }

    fn check_quota(&mut self) {
        if self.quota.is_some_and(|quota| self.begun >= quota) {
            self.sending = false;
        }
    }

    fn write(&mut self, sender: usize, due: Instant, out: Output<'_>) {
        let direction = &mut self.directions[sender];
        let due_ns = due.saturating_duration_since(self.plan.epoch).as_nanos() as u64;
        out.bytes.extend_from_slice(&direction.prefix);
        write!(out.bytes, "{:x}-{due_ns:x}", direction.sent).expect("a vector takes it");
        out.bytes.extend_from_slice(&self.suffix);
        out.bytes.extend_from_slice(&direction.tail);
        let stanzas = 1 + u32::from(!direction.tail.is_empty());
        *out.stanzas = out.stanzas.wrapping_add(stanzas);
        direction.sent += 1;
        direction.coming = Some(due_ns);
        self.tally.sent += 1;
        self.tally.to_offline += u64::from(direction.to_offline);
        match self.plan.ack {
            Some(every) => {
                let unacknowledged = (*out.stanzas, due_ns);
                direction.unacknowledged.push_back(unacknowledged);
                if direction.sent.is_multiple_of(every) {
                    out.bytes.extend_from_slice(ASK);
                }
            }
            None => self.kept += u64::from(direction.to_offline),
        }
    }

    /// The server has `count` stanzas of `sender`. Returns how many messages he is owed to send.
    pub fn on_acknowledged(
        &mut self,
        sender: usize,
        count: u32,
        now: Instant,
        recorder: &mut Recorder,
    ) -> u64 {
        let Some(direction) = self.directions.get_mut(sender) else {
            return 0;
        };
        let now_ns = now.saturating_duration_since(self.plan.epoch).as_nanos() as u64;
        let before = direction.acknowledged;
        while let Some((stanza, due_ns)) = direction.unacknowledged.front().copied()
            && count.wrapping_sub(stanza) <= u32::MAX / 2
        {
            direction.unacknowledged.pop_front();
            direction.acknowledged += 1;
            let latency_ns = now_ns.saturating_sub(due_ns).max(1);
            let phase = phase(&mut self.phases, due_ns);
            phase.ack_latencies.saturating_record(latency_ns);
            recorder.record(Kind::Acknowledgement, now, Duration::from_nanos(latency_ns));
        }
        let covered = direction.acknowledged - before;
        if covered == 0 {
            return 0;
        }
        self.last_receipt = now;
        self.tally.acknowledged += covered;
        if !direction.to_offline {
            return 0;
        }
        self.kept += covered;
        match self.plan.pace {
            Pace::Window(_) if self.sending => covered,
            _ => 0,
        }
    }

    /// Notes a message that `receiver` got. Returns the sender when it is owed the next one to send.
    pub fn on_message(
        &mut self,
        receiver: usize,
        message: &[u8],
        now: Instant,
        recorder: &mut Recorder,
    ) -> Option<usize> {
        if let Traffic::Presence { .. } = self.plan.traffic {
            self.on_presence(receiver, message, now, recorder);
            return None;
        }
        if matches!(
            self.plan.traffic,
            Traffic::Make { .. } | Traffic::Join { .. } | Traffic::Room { .. }
        ) {
            self.on_room(receiver, message, now, recorder);
            return None;
        }
        let (run, number, due_ns) = parse_id(attribute(message, b"id")?)?;
        if run != self.plan.run || receiver >= self.directions.len() {
            return None;
        }
        if attribute(message, b"type") == Some(b"error") {
            self.tally.bounced += 1;
            self.directions[receiver].order.refused.insert(number);
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
        if self.directions[sender].to_offline {
            return None;
        }
        let now_ns = self.since_epoch_ns(now);
        let latency_ns = now_ns.saturating_sub(due_ns).max(1);
        let phase = phase(&mut self.phases, due_ns);
        phase.latencies.saturating_record(latency_ns);
        recorder.record(Kind::Message, now, Duration::from_nanos(latency_ns));
        (self.sending && matches!(self.plan.pace, Pace::Window(_))).then_some(sender)
    }

    /// Notes a change of presence that a contact got; the own one comes back too and does not count.
    fn on_presence(
        &mut self,
        receiver: usize,
        presence: &[u8],
        now: Instant,
        recorder: &mut Recorder,
    ) {
        let id = find(presence, b"status").and_then(|status| parse_id(status.text));
        let Some((run, _, due_ns)) = id else {
            return;
        };
        let from = attribute(presence, b"from").unwrap_or_default();
        if run != self.plan.run
            || self
                .own
                .get(receiver)
                .is_none_or(|own| from.starts_with(own))
        {
            return;
        }
        self.last_receipt = now;
        self.tally.received += 1;
        let latency_ns = self.since_epoch_ns(now).saturating_sub(due_ns).max(1);
        let phase = phase(&mut self.phases, due_ns);
        phase.latencies.saturating_record(latency_ns);
        recorder.record(Kind::Presence, now, Duration::from_nanos(latency_ns));
    }

    /// Notes that somebody is in his room: his own presence comes from there, under its id or not, and others may get it under
    /// that id. Or that an occupant got a message.
    fn on_room(&mut self, receiver: usize, stanza: &[u8], now: Instant, recorder: &mut Recorder) {
        let id = attribute(stanza, b"id").and_then(parse_id);
        let id = id.filter(|(run, ..)| *run == self.plan.run);
        let kind = attribute(stanza, b"type");
        if kind == Some(b"error") {
            if id.is_some() {
                self.last_receipt = now;
                self.tally.bounced += 1;
            }
            return;
        }
        let (due_ns, of) = match self.plan.traffic {
            Traffic::Make { .. } | Traffic::Join { .. } => {
                let own = self.own.get(receiver).map(Vec::as_slice);
                if kind.is_some() || own.is_none() || attribute(stanza, b"from") != own {
                    return;
                }
                match self.directions[receiver].coming.take() {
                    Some(due_ns) => (due_ns, Kind::Presence),
                    None => return,
                }
            }
            _ => match id {
                Some((_, _, due_ns)) => (due_ns, Kind::Message),
                None => return,
            },
        };
        self.last_receipt = now;
        self.tally.received += 1;
        let latency_ns = self.since_epoch_ns(now).saturating_sub(due_ns).max(1);
        let phase = phase(&mut self.phases, due_ns);
        phase.latencies.saturating_record(latency_ns);
        recorder.record(of, now, Duration::from_nanos(latency_ns));
    }

    /// Writes the next message of a sender who is owed it.
    pub fn send_next(&mut self, sender: usize, now: Instant, out: Output<'_>) {
        // the one before may have been the last
        if !self.sending {
            return;
        }
        self.write(sender, now, out);
        self.begun += 1;
        self.check_quota();
    }

    /// What the last turn wrote has been handed to the sockets.
    pub fn flushed(&mut self, now: Instant, recorder: &mut Recorder) {
        let now_ns = self.since_epoch_ns(now);
        for due_ns in self.unflushed.drain(..) {
            let lag_ns = now_ns.saturating_sub(due_ns).max(1);
            let phase = phase(&mut self.phases, due_ns);
            phase.lag.saturating_record(lag_ns);
            recorder.record(Kind::Lag, now, Duration::from_nanos(lag_ns));
        }
    }

    pub fn has_unflushed(&self) -> bool {
        !self.unflushed.is_empty()
    }

    /// What is due from `start` on belongs to another part of the chat.
    pub fn begin_phase(&mut self, start: Instant) {
        self.phases.push(Phase::new(self.since_epoch_ns(start)));
    }

    fn since_epoch_ns(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.plan.epoch).as_nanos() as u64
    }

    pub fn stop_sending(&mut self, now: Instant) {
        self.sending = false;
        self.last_receipt = self.last_receipt.max(now);
    }

    /// Everyone is on line now.
    pub fn collect(&mut self, now: Instant) {
        self.collecting = true;
        self.last_receipt = self.last_receipt.max(now);
    }

    /// Messages that have reached whom they can reach: their recipients, or, for those off line, the server.
    pub fn settled(&self) -> u64 {
        match self.collecting && self.plan.offline_pairs > 0 {
            true => self.tally.received,
            false => self.tally.received + self.kept,
        }
    }

    /// All has arrived, or nothing more will.
    pub fn is_finished(&self, now: Instant) -> bool {
        let each = match self.plan.traffic {
            Traffic::Messages => 1,
            Traffic::Presence { contacts } => u64::from(contacts),
            Traffic::Make { .. } | Traffic::Join { .. } => 1,
            // of one thread, which hears what those of all have said: silence ends it
            Traffic::Room { .. } => u64::MAX >> 32,
        };
        // the senders may all be other threads'
        let talks = !matches!(self.plan.traffic, Traffic::Room { .. });
        let complete = talks
            && self.tally.received + self.tally.bounced >= self.tally.sent.saturating_mul(each)
            && (self.plan.ack.is_none() || self.tally.acknowledged >= self.tally.sent);
        let silent =
            self.started && now.saturating_duration_since(self.last_receipt) > self.plan.drain;
        // A window of which every message is lost would wait for ever.
        let stalled = matches!(self.plan.pace, Pace::Window(_)) && silent;
        self.collecting && ((!self.sending && (complete || silent)) || stalled)
    }

    pub fn finish(mut self) -> Outcome {
        let messages = self.plan.traffic == Traffic::Messages;
        for direction in self.directions.iter().filter(|_| messages) {
            self.tally.lost += direction.order.lost(direction.sent);
            self.tally.acknowledged_lost += direction.order.lost(direction.acknowledged);
            self.tally.unacknowledged += direction.unacknowledged.len() as u64;
        }
        Outcome {
            tally: self.tally,
            phases: self.phases,
        }
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
        self.to_offline += other.to_offline;
        self.acknowledged += other.acknowledged;
        self.unacknowledged += other.unacknowledged;
        self.acknowledged_lost += other.acknowledged_lost;
    }

    pub fn is_clean(&self) -> bool {
        self.lost + self.duplicated + self.reordered + self.bounced == 0
    }
}

impl Outcome {
    pub fn new() -> Outcome {
        Outcome {
            tally: Tally::default(),
            phases: Vec::new(),
        }
    }

    /// The same chat of another thread.
    pub fn add(&mut self, other: &Outcome) {
        self.tally.add(&other.tally);
        for (number, phase) in other.phases.iter().enumerate() {
            match self.phases.get_mut(number) {
                Some(own) => own.add(phase),
                None => self.phases.push(phase.clone()),
            }
        }
    }

    /// The part that is measured where only one is.
    pub fn measured(&self) -> &Phase {
        self.phases.last().expect("a chat has a phase")
    }
}

/// The whole scenario; returns its report and whether all went well.
pub fn run(global: &Global, options: &ChatOptions) -> Result<Report, String> {
    let mut global = global.clone();
    global.users = (global.users / 2).max(1) * 2;
    check(&global, options)?;
    let counters = Counters::new(&options.metrics)?;
    let mut target = global.target()?;
    target.stream_management = options.sm || options.ack.is_some();
    target.acknowledgements = options.ack.is_some();
    let plan = plan(&global, options);
    let (offline, online) =
        (0..global.users).partition::<Vec<_>, _>(|user| user % 2 == 1 && plan.is_offline(user / 2));

    let fleet = Fleet::start(&global, target)?;
    let login = fleet.run(Job::Login, &online, None, "log in")?;
    let mut report = Report::new("chat");
    report.note_failures(&login.failures);
    fleet.wait_until_quiet();
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
    if !offline.is_empty() {
        let count = offline.len() as u64;
        report.number("offline_recipients", "recipients off line", count, "");
    }

    measure(&fleet, options, &plan, &offline, &counters, &mut report)?;
    if options.stored && options.no_store {
        report.begin_section("no_store", "no-store");
        fleet.wait_until_quiet();
        let plan = Plan {
            run: plan.run + 1,
            no_store: true,
            ..plan
        };
        measure(&fleet, options, &plan, &[], &counters, &mut report)?;
    }
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}

fn check(global: &Global, options: &ChatOptions) -> Result<(), String> {
    let wrong = if options.rate.is_some_and(|rate| rate <= 0.0) || options.window == 0 {
        "--rate and --window must be greater than 0"
    } else if options.ack == Some(0) {
        "--ack must be greater than 0"
    } else if options.settle.is_some_and(|seconds| seconds <= 0.0) {
        "--settle must be greater than 0"
    } else if !(0.0..=1.0).contains(&options.offline_share) {
        "--offline-share is a part of 1, such as 0.25"
    } else if options.offline_share > 0.0 && options.rate.is_none() && options.ack.is_none() {
        "--offline-share with --window wants --ack: nothing else tells when the server has a message to someone off line"
    } else if options.settle.is_some() && global.server_pid.is_empty() {
        "--settle wants --server-pid"
    } else if global.resource.is_empty() && !options.bare {
        "--resource may only be empty with --bare: messages go to full addresses"
    } else {
        return Ok(());
    };
    Err(wrong.into())
}

/// Tells the messages of this run from those of others.
pub fn run_number() -> u64 {
    std::time::UNIX_EPOCH
        .elapsed()
        .map_or(1, |elapsed| elapsed.as_nanos() as u64)
}

fn plan(global: &Global, options: &ChatOptions) -> Plan {
    let pairs = global.users / 2;
    // A pair with one off line has one recipient less: x / (2 pairs - x) is the share.
    let offline = options.offline_share * f64::from(pairs * 2) / (1.0 + options.offline_share);
    Plan {
        run: run_number(),
        epoch: Instant::now(),
        pace: options
            .rate
            .map_or(Pace::Window(options.window), Pace::Rate),
        messages: options.messages,
        pairs,
        offline_pairs: offline.round() as u32,
        // asking more rarely than a window is long would wait for ever
        ack: options.ack.map(|every| match options.rate {
            Some(_) => every.into(),
            None => every.min(options.window).into(),
        }),
        no_store: options.no_store && !options.stored,
        threads: global.threads,
        drain: Duration::from_secs_f64(options.drain),
        body: options.body,
        bare: options.bare,
        one_way: false,
        traffic: Traffic::Messages,
    }
}

/// One chat with all that is measured of it.
fn measure(
    fleet: &Fleet,
    options: &ChatOptions,
    plan: &Plan,
    offline: &[u32],
    counters: &Counters,
    report: &mut Report,
) -> Result<(), String> {
    let at_once = options.messages.is_some() || options.settle.is_some();
    let warmup = options.warmup.unwrap_or(if at_once { 0.0 } else { 1.0 });
    let read = || Ok::<_, String>((counters.read()?, fleet.snapshot(), fleet.settled()));
    let mut start = read()?;
    fleet.start_chat(Plan {
        epoch: Instant::now(),
        ..plan.clone()
    });
    if warmup > 0.0 {
        fleet.watch_chat("warm up", Duration::from_secs_f64(warmup));
        fleet.begin_chat_phase();
        start = read()?;
    }
    let (counted_before, before, settled_before) = start;
    let mut outcome = Outcome::new();
    match options.messages {
        Some(_) => outcome = fleet.finish_chat("chat")?,
        None => fleet.watch_chat("chat", Duration::from_secs_f64(options.duration)),
    }
    let mut usage = before.until(&fleet.snapshot());
    let mut measured = fleet.settled() - settled_before;
    let seconds = usage.wall.as_secs_f64();
    let rate = measured as f64 / seconds;
    if options.messages.is_none() {
        fleet.stop_chat();
    }
    if let Some(quiet) = options.settle {
        if !fleet.wait_until_quiet_for(Duration::from_secs_f64(quiet), SETTLE_MAX) {
            let limit = SETTLE_MAX.as_secs();
            report.fail(format!("the server did not come to rest within {limit} s"));
        }
        let settled = before.until(&fleet.snapshot());
        report.number(
            "settled_seconds",
            "until the server was at rest",
            settled.wall.as_secs_f64(),
            "s",
        );
        measured = fleet.settled() - settled_before;
        usage.server = settled.server;
        usage.processes = settled.processes;
    }
    let counted = counters.read()?;
    if options.messages.is_none() {
        if !offline.is_empty() {
            let login = fleet.run(Job::Login, offline, None, "come back")?;
            report.note_failures(&login.failures);
            fleet.collect_chat();
        }
        outcome = fleet.finish_chat("drain")?;
    }

    let stored = if plan.no_store { "no (hint)" } else { "yes" };
    report.text("to_be_stored", "to be stored", stored.to_owned());
    report.number("seconds", "measured", seconds, "s");
    report.number("messages", "messages measured", measured, "");
    report.number("messages_per_s", "messages", rate, "/s");
    report.latencies("latency", "latency", &outcome.measured().latencies);
    report.alias("chat", "latency");
    if plan.ack.is_some() {
        report.latencies(
            "ack",
            "until acknowledged",
            &outcome.measured().ack_latencies,
        );
    }
    report.usage(&usage, measured, "message", "us", 1e6);
    counters.report(report, &[(&counted_before, &counted, measured)], "message")?;
    let tally = &outcome.tally;
    report.number("sent", "sent in all", tally.sent, "");
    if plan.offline_pairs > 0 {
        let count = tally.to_offline;
        report.number("sent_to_offline", "of them to someone off line", count, "");
    }
    if plan.ack.is_some() {
        report.number("acknowledged", "acknowledged", tally.acknowledged, "");
        report.number(
            "unacknowledged",
            "not acknowledged",
            tally.unacknowledged,
            "",
        );
        report.number(
            "acknowledged_lost",
            "acknowledged and lost",
            tally.acknowledged_lost,
            "",
        );
    }
    report.number("lost", "lost", tally.lost, "");
    report.number("duplicated", "duplicated", tally.duplicated, "");
    report.number("reordered", "reordered", tally.reordered, "");
    report.number("bounced", "bounced", tally.bounced, "");
    report.number("disconnected", "connections lost", fleet.disconnected(), "");
    if !tally.is_clean() {
        report.fail("messages were lost, duplicated, reordered or bounced");
    }
    if tally.acknowledged_lost > 0 {
        report.fail(format!(
            "{} messages were acknowledged and lost",
            tally.acknowledged_lost
        ));
    }
    if tally.unacknowledged > 0 {
        report.fail(format!(
            "{} messages were never acknowledged",
            tally.unacknowledged
        ));
    }
    if measured == 0 {
        report.fail("no message arrived");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scram::KeyCache;

    /// Bytes and stanzas of each sender; everyone is on line.
    #[derive(Default)]
    struct Senders([(Vec<u8>, u32); 2]);

    impl Outputs for Senders {
        fn output(&mut self, slot: usize) -> Option<Output<'_>> {
            let (bytes, stanzas) = self.0.get_mut(slot)?;
            Some(Output { bytes, stanzas })
        }
    }

    fn plan(pace: Pace, messages: Option<u64>) -> Plan {
        Plan {
            run: 0xabc,
            epoch: Instant::now(),
            pace,
            messages,
            pairs: 1,
            offline_pairs: 0,
            ack: None,
            no_store: false,
            threads: 1,
            drain: Duration::from_secs(1),
            body: 5,
            bare: false,
            one_way: false,
            traffic: Traffic::Messages,
        }
    }

    fn recorder() -> Recorder {
        crate::timeline::Timeline::new(Duration::from_secs(1), false).recorder()
    }

    fn engine(pace: Pace, messages: Option<u64>) -> Engine {
        engine_of(plan(pace, messages))
    }

    fn engine_of(plan: Plan) -> Engine {
        let account = |name: &str| Account {
            name: name.into(),
            keys: KeyCache::default(),
            resumption: None,
            token: None,
        };
        Engine::new(plan, 0, &Target::for_tests(), &[account("a"), account("b")])
    }

    /// Lets both senders write; returns what each wrote.
    fn turn(engine: &mut Engine, now: Instant) -> [String; 2] {
        let mut written = Senders::default();
        engine.turn(now, &mut written);
        written
            .0
            .map(|(bytes, _)| String::from_utf8(bytes).unwrap())
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
        assert_eq!(
            engine.on_message(1, received, Instant::now(), &mut recorder()),
            Some(0)
        );
        assert_eq!(
            engine.on_message(1, received, Instant::now(), &mut recorder()),
            None
        );
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
        engine.on_message(1, last, epoch + Duration::from_millis(14), &mut recorder());
        let latency = engine.phases[0].latencies.max();
        assert!((9_900_000..10_100_000).contains(&latency), "{latency}");
        turn(&mut engine, epoch + Duration::from_secs(1));
        assert_eq!((engine.tally.sent, engine.next_due()), (10, None));
    }

    #[test]
    fn a_message_belongs_to_the_phase_in_which_it_was_due() {
        let mut engine = engine(Pace::Rate(1000.0), None);
        let epoch = engine.plan.epoch;
        let at = |ms| epoch + Duration::from_millis(ms);
        engine.begin_phase(at(2));
        // due at 0, 1, 2 and 3 ms, of which b sends the second and the fourth
        let [from_a, from_b] = turn(&mut engine, at(3));
        assert!(engine.has_unflushed());
        engine.flushed(at(5), &mut recorder());
        assert!(!engine.has_unflushed());
        for (receiver, bytes) in [(1, &from_a), (0, &from_b)] {
            for stanza in stanzas(bytes) {
                engine.on_message(receiver, stanza.as_bytes(), at(10), &mut recorder());
            }
        }
        let outcome = engine.finish();
        let near = |value: u64, ms: u64| value.abs_diff(ms * 1_000_000) < 20_000;
        let [before, measured] = &outcome.phases[..] else {
            panic!()
        };
        assert_eq!((before.latencies.len(), measured.latencies.len()), (2, 2));
        assert!(near(before.latencies.max(), 10) && near(measured.latencies.max(), 8));
        assert!(near(before.lag.max(), 5) && near(measured.lag.min(), 2));
    }

    #[test]
    fn a_change_of_presence_counts_at_each_contact_and_not_at_its_own_client() {
        let mut engine = engine_of(Plan {
            traffic: Traffic::Presence { contacts: 1 },
            ..plan(Pace::Rate(1000.0), Some(1))
        });
        let epoch = engine.plan.epoch;
        let [from_a, from_b] = turn(&mut engine, epoch);
        assert_eq!(from_a, "<presence><status>abc-0-0</status></presence>");
        assert_eq!(from_b, "");
        let from = |name: &str| {
            from_a.replace(
                "<presence>",
                &format!("<presence from='{name}@localhost/load'>"),
            )
        };
        let later = epoch + Duration::from_millis(3);
        engine.on_message(0, from("a").as_bytes(), later, &mut recorder());
        assert!(!engine.is_finished(later));
        engine.on_message(1, from("a").as_bytes(), later, &mut recorder());
        assert!(engine.is_finished(later));
        let outcome = engine.finish();
        assert_eq!((outcome.tally.received, outcome.tally.lost), (1, 0));
        assert!(outcome.measured().latencies.max() >= 2_900_000);
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
    fn what_was_refused_is_not_lost() {
        let mut order = Order::default();
        order.arrive(2);
        order.refused.insert(1);
        order.refused.insert(4);
        // 0 and 3
        assert_eq!(order.lost(5), 2);
        assert_eq!(order.lost(1), 1);
        assert_eq!(order.lost(2), 1);
        // refused and yet delivered: neither
        order.refused.insert(2);
        assert_eq!(order.lost(3), 1);
    }

    #[test]
    fn an_acknowledgement_covers_all_before_it_from_their_due_times() {
        let mut engine = engine_of(Plan {
            ack: Some(2),
            ..plan(Pace::Rate(1000.0), Some(7))
        });
        let epoch = engine.plan.epoch;
        let mut senders = Senders::default();
        // roster request and presence
        senders.0[0].1 = 2;
        engine.turn(epoch + Duration::from_millis(10), &mut senders);
        let [(from_a, stanzas), (from_b, _)] = &senders.0;
        let from_a = std::str::from_utf8(from_a).unwrap();
        // behind the second, the fourth and, as no more is sent, nothing else is open
        assert_eq!(from_a.matches("<r xmlns='urn:xmpp:sm:3'/>").count(), 3);
        assert_eq!(from_a.matches("</message><r").count(), 2);
        assert_eq!(
            (*stanzas, from_b.ends_with(b"<r xmlns='urn:xmpp:sm:3'/>")),
            (6, true)
        );
        let at = |ms| epoch + Duration::from_millis(ms);
        assert_eq!(engine.on_acknowledged(0, 2, at(11), &mut recorder()), 0);
        assert_eq!(engine.tally.acknowledged, 0);
        // the messages due at 0 and 2 ms
        engine.on_acknowledged(0, 4, at(12), &mut recorder());
        assert_eq!(
            (
                engine.tally.acknowledged,
                engine.phases[0].ack_latencies.len()
            ),
            (2, 2)
        );
        let close = |value: u64, ms: u64| value.abs_diff(ms * 1_000_000) < 20_000;
        let acks = &engine.phases[0].ack_latencies;
        assert!(close(acks.max(), 12) && close(acks.min(), 10));
        engine.on_acknowledged(0, 4, at(13), &mut recorder());
        assert_eq!(engine.tally.acknowledged, 2);
        let outcome = engine.finish();
        assert_eq!(
            (
                outcome.tally.unacknowledged,
                outcome.tally.lost,
                outcome.tally.acknowledged_lost
            ),
            (5, 7, 2)
        );
    }

    #[test]
    fn a_count_of_stanzas_that_wrapped_still_covers() {
        let mut engine = engine_of(Plan {
            ack: Some(1),
            ..plan(Pace::Window(3), None)
        });
        let mut senders = Senders::default();
        senders.0[0].1 = u32::MAX - 1;
        engine.turn(Instant::now(), &mut senders);
        engine.on_acknowledged(0, u32::MAX, Instant::now(), &mut recorder());
        assert_eq!(engine.tally.acknowledged, 1);
        engine.on_acknowledged(0, 1, Instant::now(), &mut recorder());
        assert_eq!(engine.tally.acknowledged, 3);
    }

    #[test]
    fn someone_off_line_gets_all_when_he_comes_and_his_partner_goes_on_by_acknowledgements() {
        let mut engine = engine_of(Plan {
            ack: Some(1),
            offline_pairs: 1,
            ..plan(Pace::Window(2), None)
        });
        let mut senders = Senders::default();
        engine.turn(Instant::now(), &mut senders);
        let [(from_a, _), (from_b, _)] = &senders.0;
        assert!(from_b.is_empty());
        let from_a = String::from_utf8(from_a.clone()).unwrap();
        assert!(from_a.starts_with("<message type='chat' to='b@localhost' "));
        assert_eq!(engine.settled(), 0);
        assert_eq!(
            engine.on_acknowledged(0, 2, Instant::now(), &mut recorder()),
            2
        );
        assert_eq!(engine.settled(), 2);
        engine.stop_sending(Instant::now());
        let later = Instant::now() + Duration::from_secs(60);
        assert!(!engine.is_finished(later), "he has not come yet");
        let came = Instant::now();
        engine.collect(came);
        assert!(!engine.is_finished(came));
        for stanza in stanzas(&from_a) {
            let stanza = stanza.replace("<r xmlns='urn:xmpp:sm:3'/>", "");
            engine.on_message(1, stanza.as_bytes(), came, &mut recorder());
        }
        assert!(engine.is_finished(came));
        let outcome = engine.finish();
        assert!(outcome.tally.is_clean() && outcome.measured().latencies.is_empty());
        assert_eq!((outcome.tally.received, outcome.tally.to_offline), (2, 2));
    }

    #[test]
    fn the_share_of_recipients_off_line_is_the_one_asked_for() {
        use clap::Parser;
        let cli = crate::options::Cli::parse_from(
            "loadtest chat --users 1000 --offline-share 0.25 --ack --threads 3".split(' '),
        );
        let crate::options::Command::Chat(options) = &cli.command else {
            panic!()
        };
        let plan = super::plan(&cli.global, options);
        let offline: Vec<u32> = (0..500).filter(|pair| plan.is_offline(*pair)).collect();
        assert_eq!((offline.len(), plan.senders()), (200, 800));
        assert!(offline.windows(2).all(|pair| pair[1] - pair[0] <= 3));
        assert_eq!(plan.ack, Some(1));
    }

    #[test]
    fn the_hint_is_sent_only_when_asked_for() {
        let mut with = engine_of(Plan {
            no_store: true,
            ..plan(Pace::Window(1), None)
        });
        let [from_a, _] = turn(&mut with, Instant::now());
        assert!(from_a.ends_with("</body><no-store xmlns='urn:xmpp:hints'/></message>"));
    }

    #[test]
    fn options_that_cannot_go_together_are_told() {
        use clap::Parser;
        let said = |line: &str| {
            let cli =
                crate::options::Cli::try_parse_from(line.split(' ')).map_err(|e| e.to_string())?;
            let crate::options::Command::Chat(options) = &cli.command else {
                panic!()
            };
            check(&cli.global, options)
        };
        assert!(said("loadtest chat --ack=5 --rate 10 --offline-share 1 --stored").is_ok());
        assert!(
            said("loadtest chat --offline-share 0.5")
                .unwrap_err()
                .contains("--ack")
        );
        assert!(
            said("loadtest chat --rate 1 --offline-share 2")
                .unwrap_err()
                .contains("part of 1")
        );
        assert!(said("loadtest chat --ack=0").unwrap_err().contains("--ack"));
        assert!(
            said("loadtest chat --settle")
                .unwrap_err()
                .contains("--server-pid")
        );
        assert!(said("loadtest chat --no-store --rate 1 --offline-share 0.1").is_err());
        assert!(said("loadtest chat --metric x").is_err());
    }

    #[test]
    fn messages_of_other_runs_do_not_count() {
        let mut engine = engine(Pace::Window(1), None);
        turn(&mut engine, Instant::now());
        for id in ["abd-0-0", "abc-0", "", "hello"] {
            let message = format!("<message id='{id}'/>");
            assert_eq!(
                engine.on_message(0, message.as_bytes(), Instant::now(), &mut recorder()),
                None
            );
        }
        assert_eq!(engine.tally.received, 0);
    }
}
