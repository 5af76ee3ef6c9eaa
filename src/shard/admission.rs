//! Storm control: who of those who log in may compute now. In: connections, what their clients and the tiers have brought for
//! them, and how long each turn of the live loop took. Out: whose turn it is ([`Admission::next`]), and who hears that there is
//! too much to do. Promise: whatever knocks, a message of somebody who is in waits no longer than about
//! `storm.lag_us_target` for those who are not; a client is let in, or told when to come back, never left in silence.
//!
//! A login computes in *steps*: from the moment when its client or a tier has brought something to the moment when it waits for
//! one of them again. A step needs a *place*. Places are given out once per turn of the live loop, after live traffic, and
//! their number is found by control: [`Control`] lowers it when turns take longer than the target and raises it while they
//! do not. So a login that waits for SQL, Redis, a helper thread or its client holds no place, and a client that never sends
//! holds nothing but its descriptor.
//!
//! Those who want a place wait in the order of [`Class`]: what was begun is finished first, so that little is under way at
//! a time and new connections wait where they cost least. There are two gates on the way:
//!
//! | gate | where | costs | order |
//! |---|---|---|---|
//! | first | accepted, nothing read, no TLS | descriptor | arrival |
//! | second | SASL has named the user, at his owner | TLS state | a session to resume, then on line a moment ago, then others |
//!
//! Every eighth place goes to who has waited longest of all, so nobody starves. Who waits longer than
//! `storm.wait_seconds_max`, or comes when `limits.logins_in_progress_max` are there, is refused by [`overloaded`]. On a port
//! that begins with TLS the first get their handshake, to be told in words; the others a TLS alert (internal_error).
//!
//! Sans-IO: no clock, no socket. `K` is a connection at the first gate.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::config::Config;
use crate::rt::Notify;
use crate::xmpp::error::StreamError;

/// Namespace of the application-specific condition of [`overloaded`].
pub const NS: &str = "urn:nitro:storm:0";

/// One place of so many goes to who has waited longest.
const OLDEST_EVERY: u32 = 8;
/// Busy time after which the number of places is looked at again.
const WINDOW_US: u64 = 10_000;
/// A login that has taken so many steps is one of a client that sends byte by byte.
const STEPS_USUAL: u32 = 64;

/// `<resource-constraint/>` with a condition of ours that says when to come back (RFC 6120 4.9.3.17 and 4.9.4).
pub fn overloaded(seconds: u64) -> StreamError {
    StreamError::text(
        "resource-constraint",
        "too many log in at the moment: come back later",
    )
    .detail(format!("<retry-after xmlns='{NS}' seconds='{seconds}'/>"))
}

/// What somebody wants a place for, in the order in which places are given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A port has connects to accept.
    Accept,
    /// A session has begun and its client asks for what clients ask for at their start: roster, presence.
    Begins,
    /// The second gate is behind it.
    Named,
    /// At the second gate, with a session that can be resumed.
    Resumable,
    /// At the second gate, on line now or a moment ago.
    Recent,
    /// At the second gate.
    Stranger,
    /// Between the gates: handshake, stream header.
    Unnamed,
    /// At the first gate.
    Knocks,
    /// Its client sends byte by byte.
    Slow,
}

const CLASSES: usize = Class::Slow as usize + 1;

impl Class {
    fn is_gate(self) -> bool {
        matches!(
            self,
            Class::Resumable | Class::Recent | Class::Stranger | Class::Knocks
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
enum State {
    /// Waits for its client.
    #[default]
    Idle,
    /// Waits for a tier, or for time to pass.
    Away,
    /// Wants a place.
    Queued,
    /// Has one.
    Holds,
    Gone,
}

/// One login, as the gates see it; shared with whoever reports its socket ready.
#[derive(Default)]
pub struct Login {
    state: Cell<State>,
    /// The client brought something while the login did not wait for it.
    again: Cell<bool>,
    /// Bytes for the client wait for room in the kernel.
    pub blocked: Cell<bool>,
    /// Waited too long at a gate.
    late: Cell<bool>,
    /// Its client was silent too long while others waited.
    cut: Cell<bool>,
    /// Is past the second gate.
    named: Cell<bool>,
    steps: Cell<u32>,
    /// When it began to wait, whatever for; ms of the monotonic clock.
    since_ms: Cell<u64>,
    /// All that it waited for places.
    queued_ms: Cell<u64>,
    /// The peer sends no more; that edge does not come again.
    pub closed: Cell<bool>,
    /// Rung when it has a place, or when it must look why not.
    pub told: Notify,
}

impl Login {
    pub fn holds_place(&self) -> bool {
        self.state.get() == State::Holds
    }

    /// Waited too long at a gate: to be refused.
    pub fn is_late(&self) -> bool {
        self.late.get()
    }

    /// Its client was silent too long while others waited: to be refused.
    pub fn is_cut(&self) -> bool {
        self.cut.get()
    }

    /// Its socket was reported, and it has not looked since.
    pub fn has_news(&self) -> bool {
        self.again.get() || self.closed.get()
    }

    /// Tells its task that it is over.
    pub fn cut(&self) {
        self.cut.set(true);
        self.told.notify();
    }

    /// Milliseconds that were not the client's fault.
    pub fn queued_ms(&self, now_ms: u64) -> u64 {
        let now = match self.state.get() {
            State::Queued => now_ms.saturating_sub(self.since_ms.get()),
            _ => 0,
        };
        self.queued_ms.get() + now
    }

    /// How long its client has been silent.
    pub fn silent_ms(&self, now_ms: u64) -> u64 {
        match self.state.get() {
            State::Idle => now_ms.saturating_sub(self.since_ms.get()),
            _ => 0,
        }
    }
}

/// Whose turn it is.
pub enum Next<K> {
    /// Its task was told.
    Told,
    /// Read this session's connection, then [`Admission::done`].
    Read(u64),
    /// Let it in; it holds a place.
    Begin(K),
    /// It waited too long: refuse it, then [`Admission::done`].
    Late(K),
}

enum Waiting<K> {
    Login(Rc<Login>),
    Listener(Rc<Notify>),
    Session(u64),
    Knock(K),
}

/// In order of arrival; since when.
type Queue<K> = VecDeque<(u64, Waiting<K>)>;

/// The places of one shard and who waits for them.
pub struct Admission<K> {
    control: RefCell<Control>,
    queues: RefCell<[Queue<K>; CLASSES]>,
    waiting: Cell<usize>,
    /// Those of them for whom there is no room behind the first gate.
    held_back: Cell<usize>,
    computing: Cell<usize>,
    /// The live loop sleeps: nobody but logins has anything to do.
    pub asleep: Cell<bool>,
    /// Places that may still be given out in this turn.
    left: Cell<usize>,
    given: Cell<u32>,
    wait_ms_max: Cell<u64>,
    begun_max: Cell<usize>,
    /// Sessions begun since the last [`Admission::tick`], and how many a second before.
    bound: Cell<u64>,
    ticked_ms: Cell<u64>,
    per_second: Cell<f64>,
    retry_seconds: Cell<(u64, u64)>,
    /// Refused because they waited too long.
    pub late: Cell<u64>,
    /// Waits at the gates: how many ended, and their milliseconds together.
    pub waits: Cell<(u64, u64)>,
}

impl<K> Admission<K> {
    pub fn new(config: &Config) -> Admission<K> {
        let admission = Admission {
            control: RefCell::new(Control::new(config)),
            queues: RefCell::new(std::array::from_fn(|_| VecDeque::new())),
            waiting: Cell::new(0),
            held_back: Cell::new(0),
            computing: Cell::new(0),
            asleep: Cell::new(false),
            left: Cell::new(0),
            given: Cell::new(0),
            wait_ms_max: Cell::new(0),
            begun_max: Cell::new(0),
            bound: Cell::new(0),
            ticked_ms: Cell::new(0),
            per_second: Cell::new(0.0),
            retry_seconds: Cell::new((0, 0)),
            late: Cell::new(0),
            waits: Cell::new((0, 0)),
        };
        admission.configure(config);
        admission
    }

    /// The configuration was loaded again.
    pub fn configure(&self, config: &Config) {
        let storm = &config.storm;
        self.control.borrow_mut().configure(config);
        self.wait_ms_max.set(storm.wait_seconds_max * 1000);
        self.begun_max.set(storm.logins_begun_max);
        self.retry_seconds
            .set((storm.retry_seconds_min, storm.retry_seconds_max));
    }

    // ---- who wants a place -------------------------------------------------------------------------------------

    fn put(&self, class: Class, now_ms: u64, waiting: Waiting<K>) {
        self.queues.borrow_mut()[class as usize].push_back((now_ms, waiting));
        self.waiting.set(self.waiting.get() + 1);
    }

    fn queue(&self, login: &Rc<Login>, class: Class, now_ms: u64) {
        let class = match login.steps.get() > STEPS_USUAL {
            true => Class::Slow,
            false => class,
        };
        login.again.set(false);
        login.state.set(State::Queued);
        login.since_ms.set(now_ms);
        self.put(class, now_ms, Waiting::Login(login.clone()));
    }

    fn give_back(&self, login: &Login) {
        if login.holds_place() {
            self.done();
        }
    }

    /// A connection was accepted, or another shard had too many of them.
    pub fn knock(&self, knock: K, arrived_ms: u64) {
        self.put(Class::Knocks, arrived_ms, Waiting::Knock(knock));
    }

    /// There are connects to accept: the listener's task is told when it may take some.
    pub fn accept(&self, listener: &Rc<Notify>, now_ms: u64) {
        self.put(Class::Accept, now_ms, Waiting::Listener(listener.clone()));
    }

    /// The client of a session that has just begun has sent something.
    pub fn begins(&self, link: u64, now_ms: u64) {
        self.put(Class::Begins, now_ms, Waiting::Session(link));
    }

    /// A login's socket is ready.
    pub fn ready(&self, login: &Rc<Login>, now_ms: u64) {
        match login.state.get() {
            State::Idle => self.queue(login, self.class_of(login), now_ms),
            _ => login.again.set(true),
        }
    }

    fn class_of(&self, login: &Login) -> Class {
        match login.named.get() {
            true => Class::Named,
            false => Class::Unnamed,
        }
    }

    /// The step is over: the login waits for its client. It is told when that has sent something and there is a place.
    pub fn rest(&self, login: &Rc<Login>, now_ms: u64) {
        self.give_back(login);
        login.state.set(State::Idle);
        login.since_ms.set(now_ms);
        if login.again.get() {
            self.queue(login, self.class_of(login), now_ms);
        }
    }

    /// The step is over: the login waits for a tier, or for time to pass.
    pub fn away(&self, login: &Login, now_ms: u64) {
        self.give_back(login);
        login.state.set(State::Away);
        login.since_ms.set(now_ms);
    }

    /// What it was away for is there: `true`, if there is a place at once, else it is told when there is one.
    pub fn back(&self, login: &Rc<Login>, now_ms: u64) -> bool {
        if self.take(login) {
            return true;
        }
        // what its client has sent meanwhile is still there
        let again = login.again.get();
        self.queue(login, self.class_of(login), now_ms);
        login.again.set(again);
        false
    }

    /// A place without waiting: nobody else waits, and there is room in this turn, or no turn at all.
    fn take(&self, login: &Login) -> bool {
        let left = self.left.get();
        if self.waiting.get() > 0 || (left == 0 && !self.asleep.get()) {
            return false;
        }
        self.left.set(left.saturating_sub(1));
        self.computing.set(self.computing.get() + 1);
        login.state.set(State::Holds);
        true
    }

    /// The second gate: `true`, if nobody waits there, else it is told when its turn has come.
    pub fn name(&self, login: &Rc<Login>, class: Class, now_ms: u64) -> bool {
        let again = login.again.get();
        self.give_back(login);
        login.named.set(true);
        if self.take(login) {
            return true;
        }
        self.queue(login, class, now_ms);
        login.again.set(again);
        false
    }

    /// A new login takes over the place of the knock that was given one.
    pub fn begun(&self, login: &Login) {
        login.state.set(State::Holds);
    }

    /// A login ends, however it ends.
    pub fn leave(&self, login: &Login) {
        self.give_back(login);
        login.state.set(State::Gone);
        self.held_back.set(0);
    }

    /// A place is free again.
    pub fn done(&self) {
        self.computing.set(self.computing.get().saturating_sub(1));
    }

    // ---- whose turn it is --------------------------------------------------------------------------------------

    /// A turn of the live loop took so long, from harvest to harvest, sleep not counted: what came just behind the harvest
    /// waited for it.
    pub fn turn(&self, took_us: u64) {
        self.control.borrow_mut().turn(took_us);
    }

    /// Live traffic has had its turn: so many places may be given out now.
    pub fn open(&self) -> usize {
        let places = self.control.borrow().places;
        let left = places.saturating_sub(self.computing.get());
        self.left.set(left);
        places
    }

    /// There was more to do than this turn had room for.
    pub fn limit(&self) {
        self.control.borrow_mut().limited = true;
    }

    /// Gives out one place. `begun`: connections that are past the first gate. `None`: nobody waits, or there is none left
    /// in this turn.
    pub fn next(&self, now_ms: u64, begun: usize) -> Option<Next<K>> {
        let full = begun >= self.begun_max.get();
        if !full {
            self.held_back.set(0);
        }
        loop {
            if self.waiting.get() == 0 {
                return None;
            }
            if self.left.get() == 0 {
                self.control.borrow_mut().limited = true;
                return None;
            }
            let Some((class, since_ms, waiting)) = self.pick(full, now_ms) else {
                self.held_back.set(self.waiting.get());
                return None;
            };
            if let Waiting::Login(login) = &waiting {
                if login.state.get() != State::Queued {
                    continue;
                }
                login
                    .queued_ms
                    .set(login.queued_ms.get() + now_ms.saturating_sub(since_ms));
            }
            let waited_ms = now_ms.saturating_sub(since_ms);
            let late = class.is_gate() && waited_ms > self.wait_ms_max.get();
            if class.is_gate() {
                let (count, sum_ms) = self.waits.get();
                self.waits.set((count + 1, sum_ms + waited_ms));
            }
            if late {
                self.late.set(self.late.get() + 1);
            }
            self.left.set(self.left.get() - 1);
            self.given.set(self.given.get().wrapping_add(1));
            if let Waiting::Listener(listener) = waiting {
                // takes few, and holds no place
                listener.notify();
                return Some(Next::Told);
            }
            self.computing.set(self.computing.get() + 1);
            return Some(match waiting {
                Waiting::Login(login) => {
                    login.state.set(State::Holds);
                    login.steps.set(login.steps.get() + 1);
                    login.late.set(late);
                    login.told.notify();
                    Next::Told
                }
                Waiting::Session(link) => Next::Read(link),
                Waiting::Knock(knock) if late => Next::Late(knock),
                Waiting::Knock(knock) => Next::Begin(knock),
                Waiting::Listener(_) => unreachable!("has been told"),
            });
        }
    }

    /// Takes out who is next: by class, or now and then the one who has waited longest.
    fn pick(&self, full: bool, now_ms: u64) -> Option<(Class, u64, Waiting<K>)> {
        const ALL: [Class; CLASSES] = [
            Class::Accept,
            Class::Begins,
            Class::Named,
            Class::Resumable,
            Class::Recent,
            Class::Stranger,
            Class::Unnamed,
            Class::Knocks,
            Class::Slow,
        ];
        let mut queues = self.queues.borrow_mut();
        // who has waited too long is not let in, but told
        let late_ms = now_ms.saturating_sub(self.wait_ms_max.get());
        let open = |class: &&Class| {
            let Some((since_ms, _)) = queues[**class as usize].front() else {
                return false;
            };
            !(full && **class == Class::Knocks) || *since_ms < late_ms
        };
        let class = match self.given.get() % OLDEST_EVERY == OLDEST_EVERY - 1 {
            true => ALL
                .iter()
                .filter(open)
                .min_by_key(|class| queues[**class as usize].front().map(|(since, _)| *since)),
            false => ALL.iter().find(open),
        };
        let class = *class?;
        let (since_ms, waiting) = queues[class as usize].pop_front()?;
        self.waiting.set(self.waiting.get() - 1);
        self.held_back
            .set(self.held_back.get().min(self.waiting.get()));
        Some((class, since_ms, waiting))
    }

    /// Takes out all who wait at the first gate: the shard stops.
    pub fn drain_knocks(&self) -> Vec<K> {
        let knocks = std::mem::take(&mut self.queues.borrow_mut()[Class::Knocks as usize]);
        self.waiting.set(self.waiting.get() - knocks.len());
        self.held_back.set(0);
        let knocks = knocks.into_iter().filter_map(|(_, waiting)| match waiting {
            Waiting::Knock(knock) => Some(knock),
            _ => None,
        });
        knocks.collect()
    }

    // ---- figures -----------------------------------------------------------------------------------------------

    /// Does anybody wait for a place who may have one?
    pub fn is_wanted(&self) -> bool {
        self.waiting.get() > self.held_back.get()
    }

    /// Connections at the first gate.
    pub fn knocks(&self) -> usize {
        self.queues.borrow()[Class::Knocks as usize].len()
    }

    /// Logins at the second gate.
    pub fn at_second_gate(&self) -> usize {
        let queues = self.queues.borrow();
        [Class::Resumable, Class::Recent, Class::Stranger]
            .iter()
            .map(|class| queues[*class as usize].len())
            .sum()
    }

    /// Logins that compute.
    pub fn computing(&self) -> usize {
        self.computing.get()
    }

    /// How many may, as control has found.
    pub fn places(&self) -> usize {
        self.control.borrow().places
    }

    /// A session has begun.
    pub fn bound(&self) {
        self.bound.set(self.bound.get() + 1);
    }

    /// A few times a second: how many begin a session in a second.
    pub fn tick(&self, now_ms: u64) {
        // some may have waited too long by now
        self.held_back.set(0);
        let elapsed_ms = now_ms - self.ticked_ms.replace(now_ms);
        let now = self.bound.replace(0) as f64 * 1000.0 / elapsed_ms.max(1) as f64;
        self.per_second
            .set(self.per_second.get() * 0.75 + now * 0.25);
    }

    /// When somebody who is refused may come back: when those who wait are through, and not all at the same moment.
    /// `chance`: 0 to 255.
    pub fn retry_seconds(&self, chance: u8) -> u64 {
        let waiting = (self.knocks() + self.at_second_gate()) as f64;
        let (least, most) = self.retry_seconds.get();
        let through = (waiting / self.per_second.get().max(1.0)) as u64;
        let base = through.clamp(least, most);
        // from the base to twice as long
        base + base * u64::from(chance) / 256
    }
}

/// How many wait at the first gate of each shard, for all shards of a blade: the kernel spreads connects by a hash, and of few
/// connects one shard may get many more handshakes than another.
pub struct Loads(Vec<AtomicUsize>);

/// So many more than elsewhere are no reason to move a connection.
const UNEVEN_MIN: usize = 8;

impl Loads {
    pub fn new(shards: usize) -> Loads {
        Loads((0..shards).map(|_| AtomicUsize::new(0)).collect())
    }

    pub fn publish(&self, shard: usize, waiting: usize) {
        self.0[shard].store(waiting, Relaxed);
    }

    /// One more connection has come to `shard`, where `waiting` wait: the shard that it should go to, if that is another one.
    pub fn better(&self, shard: usize, waiting: usize) -> Option<usize> {
        if waiting < UNEVEN_MIN {
            return None;
        }
        let loads = self.0.iter().map(|load| load.load(Relaxed)).enumerate();
        let (least, load) = loads.min_by_key(|(_, load)| *load)?;
        if least == shard || waiting < load + load / 8 + UNEVEN_MIN {
            return None;
        }
        // until that shard says itself how many there are
        self.0[least].fetch_add(1, Relaxed);
        Some(least)
    }
}

/// How many logins may compute at a time: lowered by a quarter when turns take longer than the target, raised in small
/// steps while they do not and somebody waits.
///
/// What is compared is the turn that a message meets which comes at any moment: a long turn is met more often, so turns are
/// weighted by their length.
struct Control {
    places: usize,
    least: usize,
    most: usize,
    target_us: u64,
    sum_us: u64,
    squares: u64,
    /// Somebody had to wait for a place.
    limited: bool,
}

impl Control {
    fn new(config: &Config) -> Control {
        let mut control = Control {
            places: config.storm.logins_computing_min,
            least: 0,
            most: 0,
            target_us: 0,
            sum_us: 0,
            squares: 0,
            limited: false,
        };
        control.configure(config);
        control
    }

    fn configure(&mut self, config: &Config) {
        let storm = &config.storm;
        self.least = storm.logins_computing_min;
        self.most = storm.logins_computing_max;
        self.target_us = storm.lag_us_target;
        self.places = self.places.clamp(self.least, self.most);
    }

    fn turn(&mut self, took_us: u64) {
        self.sum_us += took_us;
        self.squares += took_us * took_us;
        if self.sum_us < WINDOW_US {
            return;
        }
        let met_us = self.squares / self.sum_us;
        (self.sum_us, self.squares) = (0, 0);
        let limited = std::mem::take(&mut self.limited);
        if met_us > self.target_us {
            self.places = (self.places - self.places.div_ceil(4)).max(self.least);
        } else if limited {
            self.places = (self.places + 1 + self.places / 8).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Gates = Admission<&'static str>;

    fn gates(sets: &[&str]) -> Gates {
        let sets: Vec<String> = sets.iter().map(|s| format!("storm.{s}")).collect();
        Admission::new(&Config::load(None, &sets).unwrap())
    }

    fn fixed(places: usize) -> Gates {
        let least = format!("logins_computing_min={places}");
        let most = format!("logins_computing_max={places}");
        gates(&[&least, &most, "wait_seconds_max=10"])
    }

    /// A login that waits for its client.
    fn idle(gates: &Gates) -> Rc<Login> {
        let login = Rc::default();
        gates.rest(&login, 0);
        login
    }

    fn begun(next: Option<Next<&'static str>>) -> &'static str {
        match next {
            Some(Next::Begin(name)) => name,
            Some(Next::Late(name)) => name,
            _ => "-",
        }
    }

    #[test]
    fn a_crowd_at_one_shard_is_spread_over_all_and_few_stay_where_they_are() {
        let loads = Loads::new(3);
        let mut waiting = [0; 3];
        for _ in 0..7 {
            assert_eq!(loads.better(0, waiting[0]), None);
            waiting[0] += 1;
        }
        for _ in 0..3000 {
            let at = loads.better(0, waiting[0]).unwrap_or(0);
            waiting[at] += 1;
            loads.publish(at, waiting[at]);
        }
        let (least, most) = (waiting.iter().min(), waiting.iter().max());
        assert!(most.unwrap() * 10 < least.unwrap() * 12, "{waiting:?}");
    }

    #[test]
    fn no_more_compute_than_there_are_places_and_a_place_is_free_again_behind_a_step() {
        let gates = fixed(2);
        let logins: Vec<_> = (0..3).map(|_| idle(&gates)).collect();
        for login in &logins {
            gates.ready(login, 0);
        }
        gates.open();
        assert!(gates.next(0, 3).is_some() && gates.next(0, 3).is_some());
        assert!(gates.next(0, 3).is_none());
        let holds: Vec<_> = logins.iter().map(|login| login.holds_place()).collect();
        assert_eq!((holds, gates.computing()), (vec![true, true, false], 2));
        gates.rest(&logins[0], 1);
        gates.leave(&logins[1]);
        gates.open();
        assert!(gates.next(1, 3).is_some() && gates.next(1, 3).is_none());
        assert!(logins[2].holds_place() && !gates.is_wanted());
        gates.away(&logins[2], 1);
        assert_eq!(gates.computing(), 0);
    }

    #[test]
    fn who_waits_for_a_tier_or_for_a_silent_client_holds_no_place() {
        let gates = fixed(1);
        for n in 0..100 {
            let login = idle(&gates);
            gates.ready(&login, n);
            gates.open();
            assert!(gates.next(n, 0).is_some() && login.holds_place());
            match n % 2 {
                0 => gates.rest(&login, n),
                _ => gates.away(&login, n),
            }
        }
        gates.knock("new", 100);
        gates.open();
        assert_eq!(begun(gates.next(100, 100)), "new");
    }

    #[test]
    fn what_a_client_sent_during_a_step_is_looked_at_behind_it() {
        let gates = fixed(1);
        let login = idle(&gates);
        gates.ready(&login, 0);
        gates.open();
        gates.next(0, 1);
        gates.ready(&login, 0);
        assert!(!gates.is_wanted());
        gates.rest(&login, 0);
        assert!(gates.is_wanted());
    }

    #[test]
    fn what_was_begun_goes_before_what_was_not_and_the_second_gate_goes_by_priority() {
        let gates = fixed(1);
        gates.knock("first", 0);
        gates.knock("second", 0);
        let (named, unnamed) = (idle(&gates), idle(&gates));
        let of = |class| {
            let login = Rc::default();
            gates.away(&login, 0);
            gates.name(&login, class, 0);
            login
        };
        gates.ready(&unnamed, 0);
        let stranger = of(Class::Stranger);
        let recent = of(Class::Recent);
        let resumable = of(Class::Resumable);
        named.named.set(true);
        gates.ready(&named, 0);
        for login in [named, resumable, recent, stranger, unnamed] {
            gates.open();
            assert!(gates.next(0, 5).is_some());
            assert!(login.holds_place());
            gates.leave(&login);
        }
        for name in ["first", "second"] {
            gates.open();
            assert_eq!(begun(gates.next(0, 0)), name);
            gates.done();
        }
    }

    #[test]
    fn who_has_waited_longest_is_not_overtaken_for_ever() {
        let gates = fixed(1);
        gates.knock("patient", 0);
        for n in 1..OLDEST_EVERY + 1 {
            let login = idle(&gates);
            gates.ready(&login, u64::from(n));
            gates.open();
            if begun(gates.next(u64::from(n), 0)) == "patient" {
                return;
            }
            gates.leave(&login);
        }
        panic!("never let in");
    }

    #[test]
    fn who_waits_too_long_at_a_gate_is_late_and_a_slow_client_is_not() {
        let gates = fixed(1);
        gates.knock("late", 0);
        let (named, slow) = (Rc::default(), idle(&gates));
        gates.name(&named, Class::Stranger, 0);
        gates.ready(&slow, 0);
        for _ in 0..3 {
            gates.open();
            if let Some(Next::Late(name)) = gates.next(10_001, 0) {
                assert_eq!(name, "late");
            }
            gates.done();
        }
        assert!(named.is_late() && !slow.is_late());
        assert_eq!(gates.late.get(), 2);
        // and what he waited is not taken from his time
        assert_eq!(named.queued_ms(10_001), 10_001);
    }

    #[test]
    fn nobody_is_let_in_while_too_many_have_begun() {
        let gates = gates(&["logins_begun_max=5"]);
        gates.knock("new", 0);
        gates.open();
        assert!(gates.next(0, 5).is_none());
        assert!(!gates.is_wanted(), "nothing to turn for");
        let gone = idle(&gates);
        gates.leave(&gone);
        assert!(gates.is_wanted());
        assert_eq!(begun(gates.next(0, 4)), "new");
        gates.done();
        gates.open();
        gates.knock("late", 0);
        assert!(matches!(gates.next(30_000, 5), Some(Next::Late("late"))));
    }

    #[test]
    fn a_client_that_sends_byte_by_byte_goes_behind_all_others() {
        let gates = fixed(1);
        let slow = idle(&gates);
        for _ in 0..=STEPS_USUAL {
            gates.ready(&slow, 0);
            gates.open();
            gates.next(0, 0);
            gates.rest(&slow, 0);
        }
        gates.given.set(0);
        gates.ready(&slow, 0);
        gates.knock("new", 0);
        gates.open();
        assert_eq!(begun(gates.next(0, 0)), "new");
    }

    #[test]
    fn a_refusal_is_said_in_xml_with_the_seconds_until_the_crowd_is_through() {
        let gates = gates(&["retry_seconds_min=5", "retry_seconds_max=100"]);
        assert_eq!((gates.retry_seconds(0), gates.retry_seconds(255)), (5, 9));
        for _ in 0..1000 {
            gates.knock("one of many", 0);
        }
        for second in 1..100 {
            (0..50).for_each(|_| gates.bound());
            gates.tick(second * 1000);
        }
        assert!((20..=21).contains(&gates.retry_seconds(0)));
        let mut out = Vec::new();
        overloaded(20).write(&mut out);
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("<resource-constraint xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>"));
        assert!(out.contains("<retry-after xmlns='urn:nitro:storm:0' seconds='20'/>"));
    }

    /// A shard whose turn costs `live_us` and `step_us` for each place that was taken.
    fn settle(gates: &Gates, live_us: u64, step_us: u64, wanted: usize) -> Vec<usize> {
        let mut seen = Vec::new();
        for _ in 0..20_000 {
            (gates.waiting.get()..wanted).for_each(|_| gates.knock("", 0));
            gates.open();
            let mut taken = 0;
            while gates.next(0, 0).is_some() {
                taken += 1;
            }
            (0..taken).for_each(|_| gates.done());
            gates.turn(live_us + taken * step_us);
            seen.push(gates.places());
        }
        seen
    }

    #[test]
    fn as_many_compute_as_turns_stay_within_the_target() {
        let gates = gates(&["lag_us_target=200", "logins_computing_max=64"]);
        for (step_us, least, most) in [(20, 6, 10), (100, 1, 2), (1, 60, 64)] {
            let seen = settle(&gates, 10, step_us, 1000);
            let last = &seen[seen.len() / 2..];
            let mean = last.iter().sum::<usize>() / last.len();
            assert!((least..=most).contains(&mean), "{step_us}: {mean}");
        }
    }

    #[test]
    fn the_number_never_falls_below_its_floor_and_does_not_rise_without_need() {
        let gates = gates(&["logins_computing_min=2", "logins_computing_max=64"]);
        // something else takes the core
        settle(&gates, 5000, 100, 1000);
        assert_eq!(gates.places(), 2);
        gates.drain_knocks();
        settle(&gates, 10, 20, 1);
        assert!(gates.places() <= 3);
    }
}
