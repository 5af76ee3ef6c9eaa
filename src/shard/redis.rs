//! The shard's end of the Redis ring: its sockets, and what goes between slice and [`Tier`].
//!
//! In: loads and copies of the slice, what sockets bring, answers of the [`Keeper`]. Out: one write per instance and turn
//! with all that the turn has to say; answers for the slice; requests for SQL where the ring does not know enough; how
//! far the drain may go ([`Hold`]). Promise: nothing here waits. What an instance does or does not do is the tier's to
//! judge; while it owes an answer the shard turns at least every millisecond, so that deadlines are kept.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::{Kind, Shard};
use crate::net::{TlsClient, TlsClientConfig};
use crate::rt;
use crate::store::redis::hold::Hold;
use crate::store::redis::keeper::{Keeper, Reply};
use crate::store::redis::{
    Address, Config, Counters, Endpoint, Event, Generation, Placement, Tier, Wants,
};
use crate::store::tier::Request;
use crate::xmpp::slice::Slice;
use crate::xmpp::warmth::Behind;

const READ_BYTES: usize = 64 << 10;
/// Reads of one instance in one turn.
const READS_MAX: usize = 8;
/// Rounds in one turn of what loads bring forth more loads.
const ROUNDS_MAX: usize = 4;
/// Between two ticks of the shard.
const TICK_MS: u64 = 250;

/// Figures of all shards and instances, for `/metrics`.
#[derive(Default)]
pub struct Figures(Mutex<Vec<Figure>>);

/// Of one instance as one shard sees it.
#[derive(Clone)]
pub struct Figure {
    pub shard: usize,
    pub instance: Box<str>,
    pub counters: Arc<Counters>,
}

impl Figures {
    /// One more, for good.
    pub fn add(&self, shard: usize, instance: &str, counters: Arc<Counters>) {
        if let Ok(mut all) = self.0.lock() {
            all.push(Figure {
                shard,
                instance: instance.into(),
                counters,
            });
        }
    }

    pub fn all(&self) -> Vec<Figure> {
        self.0.lock().map(|all| all.clone()).unwrap_or_default()
    }
}

/// What a shard needs for its end of the ring.
#[derive(Clone)]
pub struct RedisParts {
    /// With the shard's own number.
    pub config: Config,
    pub addresses: Arc<[Address]>,
    pub placement: Placement,
    /// Those that were durable at the start, by shard.
    pub generations: Vec<Vec<Option<Generation>>>,
    pub keeper: Keeper,
    pub hold: Arc<Hold>,
    pub figures: Arc<Figures>,
    /// There if an instance is reached over TLS.
    pub tls: Option<TlsClientConfig>,
}

/// See the module's page.
pub struct Redis {
    shard: usize,
    tier: RefCell<Tier>,
    sockets: RefCell<Vec<Option<Socket>>>,
    buffer: RefCell<Vec<u8>>,
    keeper: Keeper,
    hold: Arc<Hold>,
    has_started: Cell<bool>,
    drainable: Cell<u64>,
    /// There is more to do than readiness will tell of.
    restless: Cell<bool>,
    /// The session that is renewed next.
    renewed: Cell<usize>,
    sessions_ttl_ms: u64,
    tls: Option<TlsClientConfig>,
    /// Decrypted, of one read.
    plain: RefCell<Vec<u8>>,
}

struct Socket {
    fd: OwnedFd,
    link: u64,
    connected: bool,
    readable: bool,
    writable: bool,
    tls: Option<Box<TlsClient>>,
}

impl Socket {
    /// What the socket brought, decrypted where that is needed; the tier learns of the connection when it can be used.
    fn incoming(
        &mut self,
        tier: &mut Tier,
        instance: usize,
        bytes: &[u8],
        plain: &mut Vec<u8>,
        now_us: u64,
    ) {
        let Some(tls) = &mut self.tls else {
            return tier.incoming(instance, bytes, now_us);
        };
        plain.clear();
        let was_handshaking = tls.is_handshaking();
        let opened = tls.open(bytes, plain);
        if was_handshaking && !tls.is_handshaking() {
            tier.connected(instance, now_us);
        }
        if !plain.is_empty() {
            tier.incoming(instance, plain, now_us);
        }
        if let Err(why) = opened {
            self.readable = false;
            // it is told why, if it takes that at once
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = rustix::net::send(&self.fd, tls.outgoing(), flags);
            tier.untrusted(instance, &why, now_us);
        }
    }

    /// Sends what it and the tier have, as much as the kernel takes.
    fn write(&mut self, tier: &mut Tier, instance: usize, now_us: u64) {
        while self.connected && self.writable {
            if let Some(tls) = &mut self.tls
                && tls.outgoing().is_empty()
            {
                let taken = tls.seal(tier.outgoing(instance));
                tier.written(instance, taken);
            }
            let bytes = match &self.tls {
                Some(tls) => tls.outgoing(),
                None => tier.outgoing(instance),
            };
            if bytes.is_empty() {
                break;
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.fd, bytes, flags) {
                Ok(sent) => match &mut self.tls {
                    Some(tls) => tls.sent(sent),
                    None => tier.written(instance, sent),
                },
                Err(Errno::WOULDBLOCK) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.writable = false;
                    tier.lost(instance, &error.to_string(), now_us);
                }
            }
        }
    }
}

impl Redis {
    pub fn new(shard: usize, parts: RedisParts) -> Redis {
        let sessions_ttl_ms = parts.config.sessions_ttl_ms;
        let tier = Tier::new(
            parts.config,
            &parts.addresses,
            parts.placement,
            parts.generations[shard].clone(),
        );
        for instance in 0..tier.instances() {
            let name = &tier.address(instance).name;
            parts.figures.add(shard, name, tier.counters(instance));
        }
        Redis {
            shard,
            sockets: RefCell::new((0..tier.instances()).map(|_| None).collect()),
            tier: RefCell::new(tier),
            buffer: RefCell::new(vec![0; READ_BYTES]),
            keeper: parts.keeper,
            hold: parts.hold,
            has_started: Cell::new(false),
            drainable: Cell::new(0),
            restless: Cell::new(true),
            renewed: Cell::new(0),
            sessions_ttl_ms,
            tls: parts.tls,
            plain: RefCell::default(),
        }
    }

    /// Must the shard look again soon, whatever its sockets say?
    pub fn is_restless(&self) -> bool {
        self.restless.get()
    }

    /// A connection's TLS before its handshake, where the instance wants TLS.
    fn tls_of(&self, instance: usize) -> Result<Option<Box<TlsClient>>, String> {
        let tier = self.tier.borrow();
        match (&tier.address(instance).endpoint, &self.tls) {
            (
                Endpoint::Tcp {
                    host, tls: true, ..
                },
                Some(config),
            ) => TlsClient::new(config, host).map(|tls| Some(Box::new(tls))),
            (Endpoint::Tcp { tls: true, .. }, None) => Err("TLS was not set up".into()),
            _ => Ok(None),
        }
    }

    fn read(&self, now_us: u64) {
        let mut buffer = self.buffer.borrow_mut();
        let mut plain = self.plain.borrow_mut();
        let mut tier = self.tier.borrow_mut();
        for (instance, socket) in self.sockets.borrow_mut().iter_mut().enumerate() {
            let Some(socket) = socket else { continue };
            for _ in 0..READS_MAX {
                if !(socket.readable && socket.connected) {
                    break;
                }
                match rustix::net::recv(&socket.fd, &mut buffer[..], RecvFlags::DONTWAIT) {
                    Ok((0, _)) => {
                        socket.readable = false;
                        tier.lost(instance, "it has closed the connection", now_us);
                    }
                    Ok((taken, _)) => {
                        let bytes = &buffer[..taken];
                        socket.incoming(&mut tier, instance, bytes, &mut plain, now_us);
                    }
                    Err(Errno::WOULDBLOCK) => socket.readable = false,
                    Err(Errno::INTR) => {}
                    Err(error) => {
                        socket.readable = false;
                        tier.lost(instance, &error.to_string(), now_us);
                    }
                }
            }
        }
    }

    fn write(&self, now_us: u64) {
        let mut tier = self.tier.borrow_mut();
        for (instance, socket) in self.sockets.borrow_mut().iter_mut().enumerate() {
            if let Some(socket) = socket {
                socket.write(&mut tier, instance, now_us);
            }
        }
    }

    /// Loads, copies and sessions of the slice.
    fn take(&self, slice: &mut Slice, now_us: u64) {
        let mut tier = self.tier.borrow_mut();
        for request in std::mem::take(&mut slice.fx.requests) {
            match request {
                Request::Load { name } => tier.load(&name, now_us),
                read => slice.fx.behind.push(read),
            }
        }
        slice.ring_stores(&mut |name, number, value, keep| {
            tier.store(name, number, value, keep, now_us).is_ok()
        });
        slice.ring_offers(&mut |name, number, value, keep| {
            tier.offer(name, number, value, keep, now_us);
        });
        let unix_ms = slice.now.unix_ms;
        for (name, resource, came) in slice.warmth.sessions.drain(..) {
            // what is not sent now is renewed, or ends by itself
            match came {
                true => tier.sessions_set(&name, [&*resource], unix_ms, now_us),
                false => tier.sessions_remove(&name, &resource, now_us),
            };
        }
    }

    /// What has become of it.
    fn hear(&self, slice: &mut Slice) {
        let events: Vec<Event> = self.tier.borrow_mut().events().collect();
        for event in events {
            match event {
                Event::Loaded { name, value, .. } => {
                    slice.ring_loaded(&name, &value);
                }
                Event::Missed { name } => slice.ring_behind(&name, Behind::Missed),
                Event::Unavailable { name } => slice.ring_behind(&name, Behind::Unavailable),
                Event::Stored { revision, .. } | Event::StoreMissed { revision, .. } => {
                    slice.ring_stored(revision);
                }
                Event::Renew { instance, run_id } => {
                    self.keeper.renew(self.shard, instance, run_id);
                }
                // the next step, several blades, asks
                Event::Sessions { .. } => {}
            }
        }
    }

    /// Tells the drain how far it may go.
    fn publish(&self, slice: &Slice) {
        if !self.has_started.get() && slice.warmth.has_started() {
            self.has_started.set(true);
            self.hold.has_started();
        }
        let drainable = slice.warmth.drainable();
        if self.drainable.replace(drainable) < drainable {
            self.hold.drainable(self.shard, drainable);
        }
    }

    /// Some of the sessions say again that they are there: each three times before it would be forgotten.
    pub fn renew_sessions(&self, slice: &mut Slice) {
        let count = slice.sessions.len();
        if count == 0 {
            return;
        }
        let some = (count as u64 * TICK_MS * 3).div_ceil(self.sessions_ttl_ms) as usize;
        let from = match self.renewed.get() {
            from if from < count => from,
            _ => 0,
        };
        for session in slice.sessions.iter().skip(from).take(some) {
            let one = (session.user.clone(), session.resource().into(), true);
            slice.warmth.sessions.push(one);
        }
        self.renewed.set(from + some);
    }
}

impl Shard {
    /// The begin of a turn's end: what the instances have said.
    pub(super) fn redis_hear(&self, slice: &mut Slice) {
        let Some(redis) = &self.redis else { return };
        let now_us = self.now_us();
        redis.read(now_us);
        redis.tier.borrow_mut().tick(now_us);
        self.redis_connect(redis, now_us);
        redis.hear(slice);
    }

    /// The end: what the slice has to say to them.
    pub(super) fn redis_tell(&self, slice: &mut Slice) {
        let Some(redis) = &self.redis else { return };
        let now_us = self.now_us();
        for _ in 0..ROUNDS_MAX {
            redis.take(slice, now_us);
            redis.write(now_us);
            redis.hear(slice);
            if slice.fx.requests.is_empty() {
                break;
            }
        }
        redis.publish(slice);
        let sockets = redis.sockets.borrow();
        let unread = sockets.iter().flatten().any(|s| s.readable && s.connected);
        redis.restless.set(
            unread
                || !slice.fx.requests.is_empty()
                || slice.warmth.looks_again(slice.now.ms)
                || redis.tier.borrow().is_waiting(),
        );
    }

    /// Makes and closes connections as the tier wants them.
    fn redis_connect(&self, redis: &Redis, now_us: u64) {
        let count = redis.sockets.borrow().len();
        for instance in 0..count {
            let endpoint = match redis.tier.borrow().wants(instance, now_us) {
                Wants::Keep => continue,
                Wants::Nothing => None,
                Wants::Connect(address) => Some(address.endpoint.clone()),
            };
            self.redis_close(redis, instance);
            let Some(endpoint) = endpoint else { continue };
            redis.tier.borrow_mut().connecting(instance, now_us);
            match endpoint {
                Endpoint::Unix(path) => {
                    let opened = SocketAddrUnix::new(&path)
                        .and_then(|address| open(AddressFamily::UNIX, &address));
                    self.redis_opened(redis, instance, opened, now_us);
                }
                Endpoint::Tcp { host, port, .. } => match host.parse::<IpAddr>() {
                    Ok(ip) => {
                        let opened = open_tcp((ip, port).into());
                        self.redis_opened(redis, instance, opened, now_us);
                    }
                    Err(_) => redis.keeper.find(redis.shard, instance, host, port),
                },
            }
        }
    }

    fn redis_opened(
        &self,
        redis: &Redis,
        instance: usize,
        opened: Result<(OwnedFd, bool), Errno>,
        now_us: u64,
    ) {
        let (fd, connected) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let why = error.to_string();
                return redis.tier.borrow_mut().lost(instance, &why, now_us);
            }
        };
        let tls = match redis.tls_of(instance) {
            Ok(tls) => tls,
            Err(why) => return redis.tier.borrow_mut().untrusted(instance, &why, now_us),
        };
        let link = self.links.borrow_mut().insert(Kind::Redis(instance));
        if let Err(error) = self.readiness.add(&fd, link) {
            self.links.borrow_mut().remove(link);
            let why = error.to_string();
            return redis.tier.borrow_mut().lost(instance, &why, now_us);
        }
        if connected && tls.is_none() {
            redis.tier.borrow_mut().connected(instance, now_us);
        }
        redis.sockets.borrow_mut()[instance] = Some(Socket {
            fd,
            link,
            connected,
            readable: connected,
            writable: connected,
            tls,
        });
    }

    fn redis_close(&self, redis: &Redis, instance: usize) {
        let socket = redis.sockets.borrow_mut()[instance].take();
        if let Some(socket) = socket {
            self.readiness.remove(&socket.fd);
            self.links.borrow_mut().remove(socket.link);
        }
    }

    /// Something happened at an instance's socket.
    pub(super) fn redis_ready(&self, instance: usize, event: &rt::Ready) {
        let Some(redis) = &self.redis else { return };
        let mut sockets = redis.sockets.borrow_mut();
        let Some(socket) = sockets[instance]
            .as_mut()
            .filter(|socket| socket.link == event.token)
        else {
            return;
        };
        socket.readable |= event.readable || event.closed;
        socket.writable |= event.writable;
        if !socket.connected && (event.writable || event.closed) {
            let now_us = self.now_us();
            let mut tier = redis.tier.borrow_mut();
            match rustix::net::sockopt::socket_error(&socket.fd) {
                Ok(Ok(())) => {
                    socket.connected = true;
                    if socket.tls.is_none() {
                        tier.connected(instance, now_us);
                    }
                }
                Ok(Err(error)) | Err(error) => tier.lost(instance, &error.to_string(), now_us),
            }
        }
    }

    /// The keeper has answered.
    pub(super) fn redis_reply(&self, reply: Reply) {
        let Some(redis) = &self.redis else { return };
        let now_us = self.now_us();
        match reply {
            Reply::Generation(instance, generation) => {
                redis.tier.borrow_mut().generation(instance, generation);
            }
            Reply::Found(instance, found) => {
                let waits = redis.tier.borrow().wants(instance, now_us) == Wants::Keep
                    && redis.sockets.borrow()[instance].is_none();
                match found {
                    // a late answer to a question that was given up
                    _ if !waits => {}
                    Ok(address) => {
                        self.redis_opened(redis, instance, open_tcp(address), now_us);
                    }
                    Err(why) => redis.tier.borrow_mut().lost(instance, &why, now_us),
                }
            }
        }
    }
}

fn open_tcp(address: SocketAddr) -> Result<(OwnedFd, bool), Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let (fd, connected) = open(family, &address)?;
    rustix::net::sockopt::set_tcp_nodelay(&fd, true)?;
    Ok((fd, connected))
}

/// A nonblocking socket that is connected, or is being connected.
fn open(
    family: AddressFamily,
    address: &impl rustix::net::addr::SocketAddrArg,
) -> Result<(OwnedFd, bool), Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&fd, address) {
        Ok(()) => Ok((fd, true)),
        Err(Errno::INPROGRESS) => Ok((fd, false)),
        Err(error) => Err(error),
    }
}
