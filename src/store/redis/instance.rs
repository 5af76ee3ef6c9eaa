//! One instance of the ring, as one shard sees it: its connection, its circuit breaker and its generation.
//!
//! In: loads and stores of the names that it holds, what its socket brings, the clock. Out: bytes to write, and
//! [`Event`]s. Promises: every load is answered once, every accepted store is answered once; and what a load brings is
//! never older than a store that was answered before the load came, whatever the instance went through:
//!
//! - a store whose fate is unknown (connection lost, deadline), that was refused (out of memory, read-only, ...) or that
//!   could not be sent is a *missed write*: the instance may now hold something old. It is read again only under a new
//!   *generation*, a number that is part of every key, never used by this shard and durable before it is
//!   ([`Event::Renew`], [`super::Tier::generation`]). What is late in some socket goes to keys that nobody reads;
//! - a server of another `run_id` is another server (restarted from an old dump, replaced): a new generation as well;
//! - any fault closes the connection, so no reply is believed that comes behind one.
//!
//! The breaker: what the server itself did wrong opens it at once (deadline, garbage, refusals), lost connections do
//! after a few in a row. While it is open loads are answered at once with [`Event::Unavailable`]. After growing pauses
//! one connection tries: log in, look at the run id, and write, since a server without memory or space answers reads
//! happily. State changes are logged once, everything is counted.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};

use redis::{Cmd, Value};

use super::address::Address;
use super::connection::{Broken, Connection};
use super::generations::Generation;
use super::tier::{Config, Event, Later, Session};
use crate::observe::{Counter, Stage, record};
use crate::store::ring;

/// All that is written, in one script; KEYS: fence[, user], ARGV: incarnation, time to live[, value].
///
/// Alone, the fence is set to the process's incarnation. 1: done, 0: a newer process was here. With a user: his key is
/// set unless it has a newer revision (the first eight bytes, big-endian). 1: done, 0: there is a newer one, -1: the
/// fence is not this process's, so nothing was done. The fence keeps out what an earlier process of this blade has
/// left in a socket: nobody living knows of it, so no generation was renewed for it.
///
/// Revisions are compared in halves, as numbers: Lua's are doubles, and its string order depends on the server's locale.
const WRITE: &str = "\
local held = redis.call('GET', KEYS[1])
if #KEYS == 1 then
  if held and tonumber(held) > tonumber(ARGV[1]) then return 0 end
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
if held ~= ARGV[1] then return -1 end
local old = redis.call('GETRANGE', KEYS[2], 0, 7)
if #old == 8 then
  local a, b = struct.unpack('>I4I4', old)
  local c, d = struct.unpack('>I4I4', ARGV[3])
  if a > c or (a == c and b > d) then return 0 end
end
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
return 1";

/// What EVALSHA calls it by.
static WRITE_SHA: LazyLock<String> = LazyLock::new(|| {
    use aws_lc_rs::digest;
    digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, WRITE.as_bytes())
        .as_ref()
        .iter()
        .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
});

/// Bytes of the revision before each value.
const REVISION_BYTES: usize = 8;

/// Figures for the metrics. One shard writes, anybody reads.
#[derive(Debug, Default)]
pub struct Counters {
    /// Loads asked for, and how they ended; what is missing to the sum shared the read of another.
    pub reads: Counter,
    pub hits: Counter,
    pub misses: Counter,
    pub unavailable: Counter,
    /// Accepted stores, and how they ended.
    pub stores: Counter,
    pub stored: Counter,
    pub missed_stores: Counter,
    /// Copies of what SQL said that were sent, and those that were not because there was no room or no connection.
    pub offers: Counter,
    pub offers_dropped: Counter,
    /// Faults of any kind: lost connections, deadlines, refusals, garbage.
    pub errors: Counter,
    pub breaker_opened: Counter,
    pub renewals: Counter,
    /// Replies, their time from sending to reply, and the longest.
    pub round_trips: Counter,
    pub round_trip_us_sum: Counter,
    pub round_trip_us_max: AtomicU64,
    pub in_flight: AtomicUsize,
    state: AtomicU8,
}

/// What an instance is good for at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Not connected, the breaker closed: it will be seen soon whether it is there.
    Connecting,
    /// Connected, and read if its generation is known.
    Ready,
    /// The breaker is open; now and then one connection tries.
    Open,
}

impl Counters {
    pub fn state(&self) -> State {
        match self.state.load(Relaxed) {
            0 => State::Connecting,
            1 => State::Ready,
            _ => State::Open,
        }
    }
}

/// What a driver should do with an instance's socket.
#[derive(Debug, PartialEq, Eq)]
pub enum Wants<'a> {
    /// No socket: close it if there is one.
    Nothing,
    /// A new one (close what is left of an old one), then [`super::Tier::connecting`] and, as it went, `connected` or
    /// `lost`.
    Connect(&'a Address),
    /// The one there is, or the one that is being connected.
    Keep,
}

/// Why an instance is not used.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{0}")]
    Lost(String),
    #[error("it did not answer within {0} ms")]
    Timeout(u64),
    #[error(transparent)]
    Broken(#[from] Broken),
    /// With the command and the server's own words.
    #[error("it refuses {0}: {1}")]
    Refused(&'static str, String),
    #[error("it refuses the login ({0}): look at user and password in `redis.instances`")]
    Login(String),
    #[error("it answered {0} with something else than expected")]
    Unexpected(&'static str),
    /// TLS, before or while it is used.
    #[error("{0}")]
    Untrusted(String),
    #[error("it is a replica, which may be behind: name its master in `redis.instances`")]
    Replica,
    #[error(
        "a process that was started later uses it under this blade's name: give each blade a name of its own"
    )]
    Superseded,
}

pub(super) struct Instance {
    index: usize,
    address: Address,
    config: Rc<Config>,
    counters: Arc<Counters>,
    link: Link,
    /// Of the server that is connected or was last.
    run_id: Box<str>,
    standing: Standing,
    /// Connected, and the generation belongs to this server.
    usable: bool,
    failures: u32,
    open: bool,
    ready_us: u64,
    /// Missed writes that wait for the new generation.
    missed: Vec<(Box<str>, u64)>,
    /// How many ask for a name that is being read.
    loads: HashMap<Box<str>, u32>,
}

enum Link {
    Waiting { until_us: u64 },
    Connecting { until_us: u64 },
    Hello(Connection<Sent>),
    Ready(Connection<Sent>),
}

enum Standing {
    /// Nobody said which generation there was.
    Unknown,
    Good {
        generation: Generation,
        /// Nothing was ever written under it, so nothing old can be there.
        clean: bool,
    },
    /// [`Event::Renew`] was sent.
    Asked,
}

/// What a reply is for.
enum Sent {
    Hello(Step),
    Load(Box<str>),
    Store(Store),
    Sessions {
        name: Box<str>,
        unix_ms: u64,
    },
    /// Renewals and removals that nobody waits for.
    Quiet(&'static str),
}

#[derive(Clone, Copy, PartialEq)]
enum Step {
    Auth,
    Select,
    SetName,
    InfoServer,
    InfoReplication,
    Fence,
}

struct Store {
    /// `None`: an offer, which nobody waits for.
    name: Option<Box<str>>,
    /// Kept for a server that has forgotten the script, or the fence.
    key: Box<str>,
    value: Box<[u8]>,
    ttl_ms: u64,
    /// The fence was set for it.
    fenced: bool,
}

impl Store {
    fn revision(&self) -> u64 {
        revision_of(&self.value).expect("made with a revision")
    }

    fn command(&self, config: &Config, known: bool) -> Cmd {
        let mut command = match known {
            true => redis::cmd("EVALSHA"),
            false => redis::cmd("EVAL"),
        };
        command
            .arg(if known { &WRITE_SHA } else { WRITE })
            .arg(2)
            .arg(fence_key(config))
            .arg(&*self.key)
            .arg(config.incarnation)
            .arg(self.ttl_ms)
            .arg(&*self.value);
        command
    }
}

/// Sets the fence; with the whole script, so that the server knows it from here on. A write, so that a server that
/// cannot write is found out before it is used.
fn fence(config: &Config) -> Cmd {
    let mut command = redis::cmd("EVAL");
    command
        .arg(WRITE)
        .arg(1)
        .arg(fence_key(config))
        .arg(config.incarnation)
        .arg(config.ttl_ms);
    command
}

fn fence_key(config: &Config) -> String {
    format!("{}fence:{}", config.prefix, config.blade)
}

type Events = VecDeque<Event>;

impl Instance {
    pub fn new(
        index: usize,
        address: Address,
        generation: Option<Generation>,
        config: Rc<Config>,
    ) -> Instance {
        Instance {
            index,
            address,
            config,
            counters: Arc::default(),
            link: Link::Waiting { until_us: 0 },
            run_id: "".into(),
            standing: match generation {
                Some(generation) => Standing::Good {
                    generation,
                    clean: false,
                },
                None => Standing::Unknown,
            },
            usable: false,
            failures: 0,
            open: false,
            ready_us: 0,
            missed: Vec::new(),
            loads: HashMap::new(),
        }
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    // ---- the data

    pub fn load(&mut self, name: &str, since: u32, now_us: u64, events: &mut Events) {
        self.counters.reads.one();
        if let Some(asking) = self.loads.get_mut(name) {
            *asking += 1;
            return;
        }
        let Some(generation) = self.readable() else {
            self.counters.unavailable.one();
            return events.push_back(Event::Unavailable { name: name.into() });
        };
        let mut get = redis::cmd("GET");
        get.arg(user_key(&self.config.prefix, generation, since, name));
        self.send(&get, Sent::Load(name.into()), now_us);
        self.loads.insert(name.into(), 1);
    }

    /// See [`super::Tier::store`].
    pub fn store(
        &mut self,
        name: &str,
        since: u32,
        value: Box<[u8]>,
        ttl_ms: u64,
        now_us: u64,
        events: &mut Events,
    ) -> Result<(), Later> {
        if self.usable {
            self.send_store(Some(name.into()), name, since, value, ttl_ms, now_us)
                .map_err(|Full| Later)?;
        } else if self.open && self.missed.len() < self.config.stores_waiting_max {
            let revision = revision_of(&value).expect("made with a revision");
            self.missed(Some(name.into()), revision, events);
        } else {
            // Ends soon: as usable, or with an open breaker.
            return Err(Later);
        }
        self.counters.stores.one();
        Ok(())
    }

    /// As `store`, but nothing is lost if it does not get there, so it is dropped where that takes more than sending.
    pub fn offer(&mut self, name: &str, since: u32, value: Box<[u8]>, ttl_ms: u64, now_us: u64) {
        let sent = self.usable
            && self
                .send_store(None, name, since, value, ttl_ms, now_us)
                .is_ok();
        match sent {
            true => self.counters.offers.one(),
            false => self.counters.offers_dropped.one(),
        }
    }

    pub fn touch(&mut self, name: &str, since: u32, now_us: u64) {
        let Some(generation) = self.readable().filter(|_| self.has_room_to_spare()) else {
            return;
        };
        let mut expire = redis::cmd("PEXPIRE");
        expire
            .arg(user_key(&self.config.prefix, generation, since, name))
            .arg(self.config.ttl_ms);
        self.send(&expire, Sent::Quiet("PEXPIRE"), now_us);
    }

    /// Commands about sessions, whose keys have no generation: they end by their own deadlines. False: not sent.
    pub fn sessions_send(&mut self, commands: &[Cmd], now_us: u64) -> bool {
        match &mut self.link {
            Link::Ready(connection) if connection.has_room_to_spare() => {
                for command in commands {
                    connection.send(command, Sent::Quiet("the command about sessions"), now_us);
                }
                true
            }
            _ => false,
        }
    }

    pub fn sessions_load(
        &mut self,
        name: &str,
        key: &str,
        unix_ms: u64,
        now_us: u64,
        events: &mut Events,
    ) {
        let name: Box<str> = name.into();
        match &mut self.link {
            Link::Ready(connection) if connection.has_room() => {
                let mut command = redis::cmd("HGETALL");
                command.arg(key);
                connection.send(&command, Sent::Sessions { name, unix_ms }, now_us);
            }
            _ => events.push_back(Event::Sessions {
                name,
                sessions: None,
            }),
        }
    }

    /// The answer to [`Event::Renew`]: a number that this shard never used, durable with its run id. False if it is not newer.
    pub fn generation(&mut self, generation: Generation, events: &mut Events) -> bool {
        if let Standing::Good {
            generation: old, ..
        } = &self.standing
            && old.number >= generation.number
        {
            return false;
        }
        self.standing = Standing::Good {
            generation,
            clean: true,
        };
        for (name, revision) in std::mem::take(&mut self.missed) {
            self.answer_missed(name, revision, events);
        }
        self.look(events);
        true
    }

    // ---- the socket

    pub fn wants(&self, now_us: u64) -> Wants<'_> {
        match &self.link {
            Link::Waiting { until_us } if now_us >= *until_us => Wants::Connect(&self.address),
            Link::Waiting { .. } => Wants::Nothing,
            _ => Wants::Keep,
        }
    }

    pub fn connecting(&mut self, now_us: u64) {
        self.link = Link::Connecting {
            until_us: now_us + self.config.connect_timeout_ms * 1000,
        };
    }

    pub fn connected(&mut self, now_us: u64) {
        let mut connection = Connection::new(self.config.limits());
        let mut say = |command: &mut Cmd, step| connection.send(command, Sent::Hello(step), now_us);
        if let Some(password) = &self.address.password {
            let mut auth = redis::cmd("AUTH");
            if let Some(user) = &self.address.user {
                auth.arg(&**user);
            }
            say(auth.arg(&**password), Step::Auth);
        }
        if self.address.database != 0 {
            say(
                redis::cmd("SELECT").arg(self.address.database),
                Step::Select,
            );
        }
        let own = format!("nitro:{}:{}", self.config.blade, self.config.shard);
        say(redis::cmd("CLIENT").arg("SETNAME").arg(own), Step::SetName);
        say(redis::cmd("INFO").arg("server"), Step::InfoServer);
        say(redis::cmd("INFO").arg("replication"), Step::InfoReplication);
        say(&mut fence(&self.config), Step::Fence);
        self.link = Link::Hello(connection);
    }

    pub fn lost(&mut self, why: &str, now_us: u64, events: &mut Events) {
        if !matches!(self.link, Link::Waiting { .. }) {
            self.fault(Fault::Lost(why.into()), now_us, events);
        }
    }

    pub fn untrusted(&mut self, why: &str, now_us: u64, events: &mut Events) {
        if !matches!(self.link, Link::Waiting { .. }) {
            self.fault(Fault::Untrusted(why.into()), now_us, events);
        }
    }

    pub fn outgoing(&self) -> &[u8] {
        match &self.link {
            Link::Hello(connection) | Link::Ready(connection) => connection.outgoing(),
            _ => &[],
        }
    }

    pub fn written(&mut self, bytes: usize) {
        if let Link::Hello(connection) | Link::Ready(connection) = &mut self.link {
            connection.written(bytes);
        }
    }

    pub fn incoming(&mut self, bytes: &[u8], now_us: u64, events: &mut Events) {
        if let Link::Hello(connection) | Link::Ready(connection) = &mut self.link {
            connection.feed(bytes);
        }
        while let Link::Hello(connection) | Link::Ready(connection) = &mut self.link {
            let fault = match connection.next(now_us) {
                Ok(None) => break,
                Ok(Some(reply)) => {
                    self.count_round_trip(reply.round_trip_us);
                    self.reply(reply.tag, reply.value, now_us, events).err()
                }
                Err(broken) => Some(broken.into()),
            };
            if let Some(fault) = fault {
                self.fault(fault, now_us, events);
            }
        }
        self.count_in_flight();
    }

    pub fn tick(&mut self, now_us: u64, events: &mut Events) {
        let late = self
            .deadline_us()
            .is_some_and(|deadline_us| now_us >= deadline_us);
        match &self.link {
            Link::Connecting { .. } if late => self.fault(
                Fault::Timeout(self.config.connect_timeout_ms),
                now_us,
                events,
            ),
            Link::Hello(_) | Link::Ready(_) if late => {
                self.fault(Fault::Timeout(self.config.timeout_ms), now_us, events)
            }
            _ => {}
        }
        self.count_in_flight();
    }

    pub fn is_waiting(&self) -> bool {
        match &self.link {
            Link::Waiting { .. } => false,
            Link::Connecting { .. } | Link::Hello(_) => true,
            Link::Ready(connection) => connection.in_flight() > 0,
        }
    }

    /// When `tick` is due at the latest.
    pub fn deadline_us(&self) -> Option<u64> {
        match &self.link {
            Link::Waiting { until_us } | Link::Connecting { until_us } => Some(*until_us),
            Link::Hello(connection) | Link::Ready(connection) => connection.deadline_us(),
        }
    }

    // ---- replies

    fn reply(
        &mut self,
        tag: Sent,
        value: Value,
        now_us: u64,
        events: &mut Events,
    ) -> Result<(), Fault> {
        match tag {
            Sent::Hello(step) => self.hello(step, value, now_us, events),
            Sent::Load(name) => match value {
                Value::BulkString(mut bytes) if bytes.len() > REVISION_BYTES => {
                    let revision = revision_of(&bytes).expect("it is long enough");
                    bytes.drain(..REVISION_BYTES);
                    self.counters.hits.one();
                    self.answer_loads(name, events, |name| Event::Loaded {
                        name,
                        revision,
                        value: bytes,
                    });
                    Ok(())
                }
                // A revision alone: the value was too large. Less: not ours, the next store writes over it.
                Value::Nil | Value::BulkString(_) => {
                    self.counters.misses.one();
                    self.answer_loads(name, events, |name| Event::Missed { name });
                    Ok(())
                }
                // Not ours either; the next store fails at it, and that ends in a new generation.
                Value::ServerError(error) if error.code() == "WRONGTYPE" => {
                    self.counters.misses.one();
                    self.answer_loads(name, events, |name| Event::Missed { name });
                    Ok(())
                }
                other => {
                    self.counters.unavailable.one();
                    self.answer_loads(name, events, |name| Event::Unavailable { name });
                    Err(unexpected("GET", other))
                }
            },
            Sent::Store(store) => self.stored(store, value, now_us, events),
            Sent::Sessions { name, unix_ms } => {
                let sessions = match &value {
                    Value::Array(fields) => Some(Session::read_all(fields, unix_ms)),
                    _ => None,
                };
                let good = sessions.is_some();
                events.push_back(Event::Sessions { name, sessions });
                match good {
                    true => Ok(()),
                    false => Err(unexpected("HGETALL", value)),
                }
            }
            Sent::Quiet(what) => match value {
                Value::ServerError(_) => Err(unexpected(what, value)),
                _ => Ok(()),
            },
        }
    }

    fn stored(
        &mut self,
        store: Store,
        value: Value,
        now_us: u64,
        events: &mut Events,
    ) -> Result<(), Fault> {
        match value {
            Value::Int(0 | 1) => {
                if let Some(name) = store.name {
                    self.counters.stored.one();
                    let revision = revision_of(&store.value).expect("made with a revision");
                    events.push_back(Event::Stored { name, revision });
                }
                Ok(())
            }
            Value::ServerError(error) if error.code() == "NOSCRIPT" => {
                let command = store.command(&self.config, false);
                self.send(&command, Sent::Store(store), now_us);
                Ok(())
            }
            // Flushed or evicted: once more behind a new one.
            Value::Int(-1) if !store.fenced => {
                self.send(&fence(&self.config), Sent::Hello(Step::Fence), now_us);
                let command = store.command(&self.config, true);
                let fenced = true;
                self.send(&command, Sent::Store(Store { fenced, ..store }), now_us);
                Ok(())
            }
            other => {
                let revision = store.revision();
                self.missed(store.name, revision, events);
                Err(unexpected("a write", other))
            }
        }
    }

    fn hello(
        &mut self,
        step: Step,
        value: Value,
        now_us: u64,
        events: &mut Events,
    ) -> Result<(), Fault> {
        let info = |value: &Value, field: &str| {
            let Value::BulkString(bytes) = value else {
                return None;
            };
            let text = std::str::from_utf8(bytes).ok()?;
            text.lines()
                .find_map(|line| line.strip_prefix(field))
                .map(Box::<str>::from)
        };
        match (step, &value) {
            (Step::Auth | Step::Select, Value::Okay) | (Step::Fence, Value::Int(1)) => {}
            // Only a name in the server's list of clients: an ACL may forbid it.
            (Step::SetName, Value::Okay | Value::ServerError(_)) => {}
            (Step::InfoServer, _) => match info(&value, "run_id:") {
                Some(run_id) => self.run_id = run_id,
                None => return Err(unexpected("INFO", value)),
            },
            (Step::InfoReplication, _) => match info(&value, "role:").as_deref() {
                Some("master") => {}
                Some(_) => return Err(Fault::Replica),
                None => return Err(unexpected("INFO", value)),
            },
            // Its words may repeat what it did not understand, and that would be the password.
            (Step::Auth, Value::ServerError(error)) => {
                return Err(Fault::Login(error.code().into()));
            }
            (Step::Auth, _) => return Err(Fault::Unexpected("the login")),
            (Step::Select, _) => return Err(unexpected("the database number", value)),
            (Step::SetName, _) => return Err(unexpected("CLIENT SETNAME", value)),
            (Step::Fence, Value::Int(0)) => return Err(Fault::Superseded),
            (Step::Fence, _) => return Err(unexpected("a write", value)),
        }
        if step == Step::Fence && matches!(self.link, Link::Hello(_)) {
            self.ready(now_us, events);
        }
        Ok(())
    }

    // ---- generation

    fn ready(&mut self, now_us: u64, events: &mut Events) {
        let link = std::mem::replace(&mut self.link, Link::Waiting { until_us: 0 });
        let Link::Hello(connection) = link else {
            unreachable!("the caller has looked");
        };
        self.link = Link::Ready(connection);
        self.ready_us = now_us;
        if std::mem::take(&mut self.open) {
            tracing::info!("Redis instance {} is used again", self.address.name);
        }
        self.set_state(State::Ready);
        self.look(events);
    }

    /// Is what this server holds under this generation believable?
    fn look(&mut self, events: &mut Events) {
        self.usable = false;
        if !matches!(self.link, Link::Ready(_)) {
            return;
        }
        match &self.standing {
            Standing::Good { generation, .. } if generation.run_id == self.run_id => {
                self.usable = true
            }
            Standing::Asked => {}
            Standing::Good { .. } | Standing::Unknown => self.ask(events),
        }
    }

    fn ask(&mut self, events: &mut Events) {
        self.usable = false;
        if !matches!(self.standing, Standing::Asked) {
            self.standing = Standing::Asked;
            self.counters.renewals.one();
            events.push_back(Event::Renew {
                instance: self.index,
                run_id: self.run_id.clone(),
            });
        }
    }

    /// A store (of nobody: an offer) that may have left something old, or come late.
    fn missed(&mut self, name: Option<Box<str>>, revision: u64, events: &mut Events) {
        if matches!(self.standing, Standing::Good { clean: true, .. }) {
            if let Some(name) = name {
                self.answer_missed(name, revision, events);
            }
            return;
        }
        self.missed.extend(name.map(|name| (name, revision)));
        self.ask(events);
    }

    fn answer_missed(&self, name: Box<str>, revision: u64, events: &mut Events) {
        self.counters.missed_stores.one();
        events.push_back(Event::StoreMissed {
            instance: self.index,
            name,
            revision,
        });
    }

    // ---- small things

    /// The generation's number, if the instance can be read now.
    fn readable(&self) -> Option<u64> {
        match (&self.link, &self.standing) {
            (Link::Ready(connection), Standing::Good { generation, .. })
                if self.usable && connection.has_room() =>
            {
                Some(generation.number)
            }
            _ => None,
        }
    }

    fn has_room_to_spare(&self) -> bool {
        matches!(&self.link, Link::Ready(connection) if connection.has_room_to_spare())
    }

    /// Only where there is a connection.
    fn send(&mut self, command: &Cmd, sent: Sent, now_us: u64) {
        if let Link::Ready(connection) = &mut self.link {
            connection.send(command, sent, now_us);
        }
    }

    fn send_store(
        &mut self,
        asked_by: Option<Box<str>>,
        name: &str,
        since: u32,
        value: Box<[u8]>,
        ttl_ms: u64,
        now_us: u64,
    ) -> Result<(), Full> {
        let (Link::Ready(connection), Standing::Good { generation, clean }) =
            (&mut self.link, &mut self.standing)
        else {
            unreachable!("usable means connected under a good generation");
        };
        if !connection.has_room_to_spare() {
            return Err(Full);
        }
        *clean = false;
        let store = Store {
            name: asked_by,
            key: user_key(&self.config.prefix, generation.number, since, name).into(),
            value,
            ttl_ms,
            fenced: false,
        };
        connection.send(
            &store.command(&self.config, true),
            Sent::Store(store),
            now_us,
        );
        Ok(())
    }

    fn answer_loads(
        &mut self,
        name: Box<str>,
        events: &mut Events,
        event: impl FnOnce(Box<str>) -> Event,
    ) {
        let asking = self.loads.remove(&name).unwrap_or(1);
        let event = event(name);
        (1..asking).for_each(|_| events.push_back(event.clone()));
        events.push_back(event);
    }

    fn fault(&mut self, fault: Fault, now_us: u64, events: &mut Events) {
        self.counters.errors.one();
        let steady_us = 2 * self.config.pause_ms_max * 1000;
        if self.state() == State::Ready && now_us.saturating_sub(self.ready_us) >= steady_us {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        let until_us = now_us + self.pause_us();
        let link = std::mem::replace(&mut self.link, Link::Waiting { until_us });
        self.usable = false;
        let grave = !matches!(fault, Fault::Lost(_));
        if !self.open && (grave || self.failures >= self.config.failures_max) {
            self.open = true;
            self.counters.breaker_opened.one();
            tracing::warn!(
                "Redis instance {} is not used for now: {fault}",
                self.address.name
            );
        }
        self.set_state(match self.open {
            true => State::Open,
            false => State::Connecting,
        });
        let (Link::Hello(connection) | Link::Ready(connection)) = link else {
            return;
        };
        for tag in connection.into_unanswered() {
            match tag {
                Sent::Load(name) => {
                    self.counters.unavailable.one();
                    self.answer_loads(name, events, |name| Event::Unavailable { name });
                }
                Sent::Store(store) => {
                    let revision = store.revision();
                    self.missed(store.name, revision, events);
                }
                Sent::Sessions { name, .. } => events.push_back(Event::Sessions {
                    name,
                    sessions: None,
                }),
                Sent::Hello(_) | Sent::Quiet(_) => {}
            }
        }
    }

    /// Doubles with each failure; shards and instances do not try in step.
    fn pause_us(&self) -> u64 {
        let doubled = self.config.pause_ms_min << self.failures.saturating_sub(1).min(20);
        let pause_us = doubled.min(self.config.pause_ms_max) * 1000;
        let dice = ring::hash(&self.address.name)
            ^ u64::from(self.config.shard) << 8
            ^ u64::from(self.failures);
        pause_us - pause_us / 4 * (ring::hash(&format!("{dice:x}")) % 256) / 256
    }

    fn state(&self) -> State {
        self.counters.state()
    }

    fn set_state(&self, state: State) {
        self.counters.state.store(state as u8, Relaxed);
    }

    fn count_round_trip(&self, micros: u64) {
        record(Stage::RedisRoundTrip, micros);
        self.counters.round_trips.one();
        self.counters.round_trip_us_sum.add(micros);
        self.counters.round_trip_us_max.fetch_max(micros, Relaxed);
    }

    fn count_in_flight(&self) {
        let in_flight = match &self.link {
            Link::Hello(connection) | Link::Ready(connection) => connection.in_flight(),
            _ => 0,
        };
        self.counters.in_flight.store(in_flight, Relaxed);
    }
}

/// No room for another command.
struct Full;

/// The first bytes of a stored value.
fn revision_of(value: &[u8]) -> Option<u64> {
    let bytes = value.get(..REVISION_BYTES)?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

/// A value as it is stored.
pub(super) fn with_revision(revision: u64, value: &[u8]) -> Box<[u8]> {
    [&revision.to_be_bytes(), value].concat().into()
}

/// `{prefix}{generation}.{since}:u:{name}`, numbers in hexadecimal.
fn user_key(prefix: &str, generation: u64, since: u32, name: &str) -> String {
    format!("{prefix}{generation:x}.{since:x}:u:{name}")
}

/// With the server's own words, cut to a line's length.
fn unexpected(what: &'static str, value: Value) -> Fault {
    match value {
        Value::ServerError(error) => {
            let details = error.details().unwrap_or_default();
            let words = format!("{} {details}", error.code());
            Fault::Refused(what, words.chars().take(200).collect())
        }
        _ => Fault::Unexpected(what),
    }
}
