//! The ring of instances as one shard uses it.
//!
//! In: loads, stores, sessions, by user name; what the sockets bring; the clock. Out: [`Event`]s, bytes to write, and
//! which sockets are wanted ([`Wants`]). Nothing here waits or does I/O: a driver owns the sockets and calls.
//!
//! Each turn of the driver: write [`Tier::outgoing`], read what has come into [`Tier::incoming`], then [`Tier::tick`]
//! (in this order, so that a shard that was held up does not blame the servers), take [`Tier::events`], look at
//! [`Tier::wants`].
//!
//! Promises: see [`super::instance`] for what a load may bring; every queue is bounded by [`Config`], and where one is
//! full a load is [`Event::Unavailable`] and a store is given back as [`Later`].

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use redis::Value;

use super::address::Address;
use super::connection::Limits;
use super::generations::{Generation, Placement};
use super::instance::{Counters, Instance, Wants, with_revision};

/// How a shard uses its instances; [`Config::new`] has the defaults.
#[derive(Debug, Clone)]
pub struct Config {
    /// Before every key.
    pub prefix: String,
    /// Under which sessions are registered: a name without `:`, and the shard's number.
    pub blade: String,
    pub shard: u16,
    /// Of the process: [`super::Generations::incarnation`].
    pub incarnation: u64,
    /// How long a record stays without being stored or touched again, and how long the word that there is no such user.
    pub ttl_ms: u64,
    pub missing_ttl_ms: u64,
    /// How long a session is believed in without renewal.
    pub sessions_ttl_ms: u64,
    /// For a reply, and for a connection.
    pub timeout_ms: u64,
    pub connect_timeout_ms: u64,
    /// Lost connections in a row that open the breaker.
    pub failures_max: u32,
    /// Pause before the next connection after the first fault, and the longest.
    pub pause_ms_min: u64,
    pub pause_ms_max: u64,
    /// Commands without reply, and bytes not written yet, for each instance.
    pub in_flight_max: usize,
    pub out_bytes_max: usize,
    /// Larger ones are not kept: the instance then says that it does not have it.
    pub value_bytes_max: usize,
    /// Missed writes that wait for a new generation, for each instance.
    pub stores_waiting_max: usize,
}

impl Config {
    pub fn new(
        prefix: impl Into<String>,
        blade: impl Into<String>,
        shard: u16,
        incarnation: u64,
    ) -> Config {
        Config {
            incarnation,
            prefix: prefix.into(),
            blade: blade.into(),
            shard,
            ttl_ms: 7 * 24 * 3600 * 1000,
            missing_ttl_ms: 60_000,
            sessions_ttl_ms: 90_000,
            timeout_ms: 250,
            connect_timeout_ms: 250,
            failures_max: 3,
            pause_ms_min: 20,
            pause_ms_max: 5_000,
            in_flight_max: 4_096,
            out_bytes_max: 4 << 20,
            value_bytes_max: 1 << 20,
            stores_waiting_max: 65_536,
        }
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            commands_max: self.in_flight_max,
            out_bytes_max: self.out_bytes_max,
            reply_bytes_max: self.value_bytes_max + (64 << 10),
            timeout_us: self.timeout_ms * 1000,
        }
    }
}

/// What has become of what was asked. Loads and stores are answered once each, in no order but that of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Loaded {
        name: Box<str>,
        revision: u64,
        value: Vec<u8>,
    },
    /// Ask SQL; then [`Tier::offer`] what it says.
    Missed { name: Box<str> },
    /// Ask SQL. The instance is away, not believed, or has enough to do.
    Unavailable { name: Box<str> },
    /// The ring holds this revision or a newer one: SQL may have it.
    Stored { name: Box<str>, revision: u64 },
    /// The ring does not hold it, and nobody will read there what was before: SQL may have it.
    StoreMissed {
        instance: usize,
        name: Box<str>,
        revision: u64,
    },
    /// What the instance holds is not to be believed any more. Make a number that this shard never used durable together with
    /// the run id (`Generations::renew`), then call [`Tier::generation`]. Until then it is neither read nor written, and missed
    /// writes are not answered; it is not asked for again, so whoever fails at it goes on trying.
    Renew { instance: usize, run_id: Box<str> },
    /// `None`: the instance is away.
    Sessions {
        name: Box<str>,
        sessions: Option<Vec<Session>>,
    },
}

/// Not now: there is no room, or it is not known yet whether the instance is there. Keep the change (and SQL from
/// having it) and try again in a later turn; this ends within the time-outs.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the Redis ring cannot take it at the moment")]
pub struct Later;

/// Which copies outlive others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// [`Config::ttl_ms`]: users, and the word that one was removed.
    Long,
    /// [`Config::missing_ttl_ms`]: that there is no such user.
    Short,
}

/// Where a user is logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    pub blade: Box<str>,
    pub shard: u16,
    pub resource: Box<str>,
    /// Unix milliseconds; it is gone then unless it is renewed before. Blades' clocks must agree to some seconds.
    pub until_ms: u64,
}

/// See the module's page. Not `Send`: made on its shard.
pub struct Tier {
    config: Rc<Config>,
    placement: Placement,
    instances: Vec<Instance>,
    events: VecDeque<Event>,
}

impl Tier {
    /// `addresses` in the order in which `placement` knows them; `generations` are those that are durable, `None` where
    /// there is none yet.
    ///
    /// # Panics
    /// If the three do not fit together.
    pub fn new(
        config: Config,
        addresses: &[Address],
        placement: Placement,
        generations: Vec<Option<Generation>>,
    ) -> Tier {
        assert!(
            addresses.len() == generations.len() && addresses.len() == placement.instances(),
            "each instance needs its place and its generation"
        );
        assert!(
            !config.blade.contains(':'),
            "a blade's name is part of a field that is split at `:`"
        );
        let config = Rc::new(config);
        let instances = addresses.iter().zip(generations).enumerate();
        let instances = instances
            .map(|(index, (address, generation))| {
                Instance::new(index, address.clone(), generation, config.clone())
            })
            .collect();
        Tier {
            config,
            placement,
            instances,
            events: VecDeque::new(),
        }
    }

    // ---- users

    /// Asks for a user. Answered by `Loaded`, `Missed` or `Unavailable`; those who ask while it is being read share the
    /// read, each has an answer.
    pub fn load(&mut self, name: &str, now_us: u64) {
        let (at, since) = self.placement.of(name);
        self.instances[at].load(name, since, now_us, &mut self.events);
    }

    /// A change that is durable in the journal, `revision` being newer than whatever this owner stored of the user
    /// before. Answered by `Stored` or `StoreMissed`: not before may SQL have the change (and not before SQL has it may
    /// the owner's cache forget it). A removal is a change like others, whose value says that there is no such user.
    pub fn store(
        &mut self,
        name: &str,
        revision: u64,
        value: &[u8],
        keep: Keep,
        now_us: u64,
    ) -> Result<(), Later> {
        let (value, ttl_ms) = self.value(revision, value, keep);
        let (at, since) = self.placement.of(name);
        self.instances[at].store(name, since, value, ttl_ms, now_us, &mut self.events)
    }

    /// What SQL said, for the next reader: sent if that is easy, answered never. The caller has seen to it that he has
    /// stored nothing newer of this user.
    pub fn offer(&mut self, name: &str, revision: u64, value: &[u8], keep: Keep, now_us: u64) {
        let (value, ttl_ms) = self.value(revision, value, keep);
        let (at, since) = self.placement.of(name);
        self.instances[at].offer(name, since, value, ttl_ms, now_us);
    }

    /// Lets a user's copy live as long as if it were stored now.
    pub fn touch(&mut self, name: &str, now_us: u64) {
        let (at, since) = self.placement.of(name);
        self.instances[at].touch(name, since, now_us);
    }

    /// The answer to [`Event::Renew`]; false if the number is not newer than what the instance has.
    pub fn generation(&mut self, instance: usize, generation: Generation) -> bool {
        self.instances[instance].generation(generation, &mut self.events)
    }

    // ---- sessions

    /// Registers these resources of a user as logged in here for [`Config::sessions_ttl_ms`], new ones and those to be
    /// renewed (three times in that span). False: it was not sent; the next renewal will do.
    pub fn sessions_set<'a>(
        &mut self,
        name: &str,
        resources: impl IntoIterator<Item = &'a str>,
        unix_ms: u64,
        now_us: u64,
    ) -> bool {
        let key = self.sessions_key(name);
        let mut set = redis::cmd("HSET");
        set.arg(&key);
        let mut any = false;
        for resource in resources {
            any = true;
            set.arg(self.field(resource))
                .arg(unix_ms + self.config.sessions_ttl_ms);
        }
        let mut expire = redis::cmd("PEXPIRE");
        expire.arg(&key).arg(self.config.sessions_ttl_ms);
        any && self.sessions_send(name, &[set, expire], now_us)
    }

    /// The user has logged out there.
    pub fn sessions_remove(&mut self, name: &str, resource: &str, now_us: u64) -> bool {
        let mut remove = redis::cmd("HDEL");
        remove
            .arg(self.sessions_key(name))
            .arg(self.field(resource));
        self.sessions_send(name, &[remove], now_us)
    }

    /// Asks where a user is logged in; answered by [`Event::Sessions`].
    pub fn sessions(&mut self, name: &str, unix_ms: u64, now_us: u64) {
        let key = self.sessions_key(name);
        let (at, _) = self.placement.of(name);
        self.instances[at].sessions_load(name, &key, unix_ms, now_us, &mut self.events);
    }

    // ---- the driver's side

    /// All that has happened since the last call.
    pub fn events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    pub fn instances(&self) -> usize {
        self.instances.len()
    }

    pub fn address(&self, instance: usize) -> &Address {
        self.instances[instance].address()
    }

    pub fn counters(&self, instance: usize) -> Arc<Counters> {
        self.instances[instance].counters().clone()
    }

    pub fn wants(&self, instance: usize, now_us: u64) -> Wants<'_> {
        self.instances[instance].wants(now_us)
    }

    /// The driver began to connect.
    pub fn connecting(&mut self, instance: usize, now_us: u64) {
        self.instances[instance].connecting(now_us);
    }

    pub fn connected(&mut self, instance: usize, now_us: u64) {
        self.instances[instance].connected(now_us);
    }

    /// The socket ended, or could not be connected.
    pub fn lost(&mut self, instance: usize, why: &str, now_us: u64) {
        self.instances[instance].lost(why, now_us, &mut self.events);
    }

    /// It is not who it should be, or breaks TLS: given up at once.
    pub fn untrusted(&mut self, instance: usize, why: &str, now_us: u64) {
        self.instances[instance].untrusted(why, now_us, &mut self.events);
    }

    /// What is to be written to this instance's socket.
    pub fn outgoing(&self, instance: usize) -> &[u8] {
        self.instances[instance].outgoing()
    }

    /// The socket took so many bytes of it.
    pub fn written(&mut self, instance: usize, bytes: usize) {
        self.instances[instance].written(bytes);
    }

    pub fn incoming(&mut self, instance: usize, bytes: &[u8], now_us: u64) {
        self.instances[instance].incoming(bytes, now_us, &mut self.events);
    }

    /// Looks at the deadlines.
    pub fn tick(&mut self, now_us: u64) {
        for instance in &mut self.instances {
            instance.tick(now_us, &mut self.events);
        }
    }

    /// Does an instance owe an answer, or is one being connected? Then deadlines are near.
    pub fn is_waiting(&self) -> bool {
        self.instances.iter().any(Instance::is_waiting)
    }

    /// When the driver must look at `tick` and `wants` at the latest, even if nothing comes.
    pub fn deadline_us(&self) -> Option<u64> {
        self.instances
            .iter()
            .filter_map(Instance::deadline_us)
            .min()
    }

    // ---- small things

    fn value(&self, revision: u64, value: &[u8], keep: Keep) -> (Box<[u8]>, u64) {
        let ttl_ms = match keep {
            Keep::Long => self.config.ttl_ms,
            Keep::Short => self.config.missing_ttl_ms,
        };
        // A revision without value still holds off what is older.
        let fits = value.len() <= self.config.value_bytes_max;
        (
            with_revision(revision, if fits { value } else { &[] }),
            ttl_ms,
        )
    }

    fn sessions_send(&mut self, name: &str, commands: &[redis::Cmd], now_us: u64) -> bool {
        let (at, _) = self.placement.of(name);
        self.instances[at].sessions_send(commands, now_us)
    }

    fn sessions_key(&self, name: &str) -> String {
        format!("{}s:{name}", self.config.prefix)
    }

    fn field(&self, resource: &str) -> String {
        format!("{}:{}:{resource}", self.config.blade, self.config.shard)
    }
}

impl Session {
    /// Field, value, field, value, ... as HGETALL answers; those that have ended, or that nobody here wrote, left out.
    pub(super) fn read_all(fields: &[Value], unix_ms: u64) -> Vec<Session> {
        let text = |value: &Value| match value {
            Value::BulkString(bytes) => String::from_utf8(bytes.clone()).ok(),
            _ => None,
        };
        let session = |pair: &[Value]| {
            let (field, until) = (text(pair.first()?)?, text(pair.get(1)?)?);
            let mut parts = field.splitn(3, ':');
            Some(Session {
                blade: parts.next()?.into(),
                shard: parts.next()?.parse().ok()?,
                resource: parts.next()?.into(),
                until_ms: until.parse().ok()?,
            })
        };
        fields
            .chunks(2)
            .filter_map(session)
            .filter(|session| session.until_ms > unix_ms)
            .collect()
    }
}
