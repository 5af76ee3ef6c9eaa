//! A connection from accept to its session. It waits at two gates ([`super::admission`]); from the first one on it is a task in
//! the login queue that drives [`Negotiation`] and waits for what that needs. When a user is named, the task ends here and goes
//! on at the user's owner, with socket, TLS state and unread bytes.

use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::admission::{Class, Login, overloaded};
use super::doors::{Pass, Shut};
use super::moves::Parcel;
use super::{Begins, Door, Kind, LiveLink, Shard, Waits, http};
use crate::config::{Config, Registration};
use crate::net::{Listener, Proxied, Read, Socket, Transport, parse_proxy_header};
use crate::observe::{Stage, record};
use crate::rt::{self, Notify, Queue, slot};
use crate::store::record::{ArchivedScramKeys, Record, UserRecord};
use crate::xml::{Framer, StreamNs};
use crate::xmpp::bind::{self, Answers, Arrival, Extras};
use crate::xmpp::error::{StanzaError, StreamError};
use crate::xmpp::fast;
use crate::xmpp::feature::sm;
use crate::xmpp::negotiation::{Negotiation, Policy, Step};
use crate::xmpp::sasl::{
    ChannelBindings, Credentials, Exporter, Failure, Mechanism, ScramKeysRef, external,
};
use crate::xmpp::session::{Session, SessionId};
use crate::xmpp::slice::{Computed, Job, Op, Slot, WriteError};

/// A connection at the first gate: accepted, nothing read. It may move to another shard.
pub struct Knock {
    socket: Socket,
    peer: SocketAddr,
    door: Door,
    /// None yet for one that comes through a proxy: whose place it takes stands in its first bytes.
    pass: Option<Pass>,
    /// Monotonic milliseconds of the blade.
    pub arrived_ms: u64,
    /// The same in microseconds.
    arrived_us: u64,
}

/// A connection past the first gate that has no session yet. It may move to another shard.
pub struct Connecting {
    transport: Transport,
    framer: Framer,
    /// Read and not yet taken.
    rest: Vec<u8>,
    /// The last read left nothing in the kernel.
    drained: bool,
    negotiation: Negotiation,
    /// The client, as a believed proxy names it.
    peer: SocketAddr,
    pass: Pass,
    /// Monotonic milliseconds of the blade, time at the gates not counted.
    deadline_ms: u64,
    /// What its client hears as soon as it can hear anything.
    refusal: Option<StreamError>,
    times: Times,
}

/// Since when, in monotonic microseconds of the blade: for [`Stage`]s. They go with the connection to its owner.
struct Times {
    accepted_us: u64,
    /// The begin of the TLS handshake.
    tls_us: u64,
    /// The first element that named a user.
    sasl_us: Option<u64>,
}

/// A connection on its way to its user's owner, and what it wanted there.
pub struct Moved {
    connecting: Connecting,
    wish: Wish,
}

enum Wish {
    Login(Box<str>),
    Register(Box<str>, String),
}

/// Why negotiation ends here.
enum Outcome {
    /// The session stands.
    Bound,
    /// To the owner.
    Move(usize, Wish),
    /// A stream error is owed.
    Refuse(StreamError),
    /// Nothing more is to be said than this.
    Close(Vec<u8>),
    /// The connection broke.
    Gone,
}

/// The longest that a login usually has to say at once: so that it is written without moving.
const OUT_BYTES_USUAL: usize = 1536;
/// How often a user is loaded for one binding, when others push him out of the cache in between.
const LOADS_MAX: u32 = 3;

enum Resumed {
    Yes,
    /// The account is not what was authenticated against any more.
    Refused(Failure),
    /// There is no such session; so many of its stanzas were durable, if that is known.
    No {
        count: Option<u32>,
    },
}

/// How long to wait for descriptors when there are none left (EMFILE).
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// How often somebody who is held back looks whether the shard stops.
const HOLD_BACK_PIECE: Duration = Duration::from_millis(500);
/// Accepts in one turn.
const ACCEPTS_MAX: usize = 8;
/// How long a session counts as one that begins: its client asks for its roster, its rooms and what it has missed, and may leave
/// again at once.
const BEGINS_MS: u64 = 2000;
/// TLS alert, fatal, internal_error (RFC 8446 6.2): what can be said in the clear to who expects a handshake.
const ALERT_INTERNAL_ERROR: [u8; 7] = [21, 3, 3, 0, 2, 2, 80];

/// A login's dealings with the gates. Its place is given back however its task ends.
pub(super) struct Guest {
    shard: Rc<Shard>,
    login: Rc<Login>,
}

impl Guest {
    fn new(shard: &Rc<Shard>) -> Guest {
        Guest {
            shard: shard.clone(),
            login: Rc::default(),
        }
    }

    /// Waits for the client.
    async fn client(&self) {
        self.shard.admission.rest(&self.login, self.shard.now_ms());
        self.shard.wake_for_gates();
        self.login.told.wait().await;
    }

    /// Waits for `other` without a place, then for one.
    pub(super) async fn away<T>(&self, other: impl Future<Output = T>) -> T {
        let admission = &self.shard.admission;
        admission.away(&self.login, self.shard.now_ms());
        let outcome = other.await;
        let has = admission.back(&self.login, self.shard.now_ms());
        if !has && !self.shard.stopping.get() {
            self.shard.wake_for_gates();
            self.login.told.wait().await;
        }
        outcome
    }

    /// Milliseconds at the gates, which are not the client's fault.
    pub(super) fn queued_ms(&self, now_ms: u64) -> u64 {
        self.login.queued_ms(now_ms)
    }

    /// Waits at the second gate.
    async fn name(&self, class: Class) -> Result<(), StreamError> {
        let admission = &self.shard.admission;
        if !admission.name(&self.login, class, self.shard.now_ms()) {
            self.shard.wake_for_gates();
            self.login.told.wait().await;
        }
        match self.login.is_late() {
            true => Err(self.shard.overloaded()),
            false => Ok(()),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shard.admission.leave(&self.login);
    }
}

/// Accepts what comes in at one port.
pub async fn accept(shard: Rc<Shard>, listener: Listener, door: Door) {
    let notify = Rc::new(Notify::new());
    let link = shard
        .links
        .borrow_mut()
        .insert(Kind::Listener(notify.clone()));
    if let Err(error) = shard.readiness.add(&listener, link) {
        tracing::error!(%error, "a listener cannot be watched");
        return;
    }
    'open: loop {
        // what is queued in the kernel would be reset when the listener closes: take it all before
        for _ in 0..ACCEPTS_MAX {
            match listener.accept() {
                Ok(Some((socket, peer))) => match door {
                    Door::Http => {
                        let serving = http::serve_operators(shard.clone(), socket, peer);
                        rt::spawn(Queue::House, serving);
                    }
                    Door::Component => shard.component_accepted(socket, peer),
                    _ => knocks(&shard, socket, peer, door),
                },
                // that the server stops is told by HTTP to the end (see [`http`]): load balancers ask
                Ok(None) if shard.stopping.get() && door != Door::Http => break 'open,
                Ok(None) => {
                    notify.wait().await;
                    continue 'open;
                }
                Err(error) => {
                    shard.gauges.accept_failures.one();
                    tracing::warn!(%error, "connections cannot be accepted for the moment");
                    rt::sleep(EXHAUSTED_PAUSE).await;
                }
            }
        }
        if !shard.stopping.get() {
            // the rest in the next turn
            shard.admission.accept(&notify, shard.now_ms());
            shard.wake_for_gates();
            notify.wait().await;
        }
    }
    shard.links.borrow_mut().remove(link);
    shard.readiness.remove(&listener);
}

/// A connection was accepted: it waits at the first gate, here or where fewer wait.
fn knocks(shard: &Rc<Shard>, socket: Socket, peer: SocketAddr, door: Door) {
    let config = shard.config.borrow().clone();
    let mut pass = None;
    let mut shut = None;
    if shard.stopping.get() {
        let error = StreamError::text("system-shutdown", "the server stops");
        return turn_away(shard, Transport::plain(socket), door, &error);
    }
    if shard.has_too_many_logins() {
        shut = Some(Shut::Logins);
    } else if !(match door.is_web() {
        true => config.is_web_proxy(peer.ip()),
        false => config.is_trusted_proxy(peer.ip()),
    }) {
        match shard.doors.enter(peer.ip(), false, &config) {
            Ok(entered) => pass = Some(entered),
            Err(why) => shut = Some(why),
        }
    }
    if let Some(shut) = shut {
        return shard.turn_away(Transport::plain(socket), door, shut);
    }
    let knock = Box::new(Knock {
        socket,
        peer,
        door,
        pass,
        arrived_ms: shard.now_ms(),
        arrived_us: shard.now_us(),
    });
    if let Some(other) = shard.loads.better(shard.number, shard.admission.knocks()) {
        shard.knocks_moved.set(shard.knocks_moved.get() + 1);
        return shard
            .ways
            .borrow_mut()
            .send(other, Parcel::Knock(knock), shard.now_us());
    }
    let arrived_ms = knock.arrived_ms;
    shard.admission.knock(knock, arrived_ms);
    shard.wake_for_gates();
}

/// A connection has a place.
pub fn let_in(shard: Rc<Shard>, knock: Knock) {
    let guest = Guest::new(&shard);
    shard.admission.begun(&guest.login);
    rt::spawn(Queue::Login, begin(shard, knock, guest, None));
}

/// A connection has waited too long, and holds a place to be told so.
pub fn too_late(shard: Rc<Shard>, knock: Knock) {
    let error = shard.overloaded();
    if knock.door == Door::XmppTls {
        let guest = Guest::new(&shard);
        shard.admission.begun(&guest.login);
        rt::spawn(Queue::Login, begin(shard, knock, guest, Some(error)));
    } else {
        turn_away(&shard, Transport::plain(knock.socket), knock.door, &error);
        shard.admission.done();
    }
}

/// The shard stops.
pub fn turn_all_away(shard: &Rc<Shard>) {
    let error = StreamError::text("system-shutdown", "the server stops");
    for knock in shard.admission.drain_knocks() {
        let transport = Transport::plain(knock.socket);
        turn_away(shard, transport, knock.door, &error);
    }
}

async fn begin(shard: Rc<Shard>, knock: Knock, guest: Guest, refusal: Option<StreamError>) {
    if knock.door.is_web() {
        let tls = knock.door.begins_with_tls();
        let Knock {
            socket,
            peer,
            pass,
            arrived_us,
            ..
        } = knock;
        // in a box: a task has room for the longest way through it, and most do not go this one
        let serving = http::serve_client(shard, socket, peer, pass, tls, arrived_us, guest);
        return Box::pin(serving).await;
    }
    let config = shard.config.borrow().clone();
    let mut transport = Transport::plain(knock.socket);
    let deadline_ms = shard.now_ms() + config.limits.auth_seconds_max * 1000;
    let mut rest = Vec::new();
    let mut client = knock.peer;
    let tls_first = knock.door.begins_with_tls();
    let proxied = knock.pass.is_none();
    let pass = match knock.pass {
        Some(pass) => pass,
        None => {
            let named = shard.with_readiness(
                &mut transport,
                deadline_ms,
                async |shard, transport, notify| proxy_header(shard, transport, notify).await,
            );
            match guest.away(named).await {
                Some(Some((source, unread))) => {
                    client = source.unwrap_or(knock.peer);
                    rest = unread;
                }
                _ => return,
            }
            match shard.doors.enter(client.ip(), proxied, &config) {
                Ok(pass) => pass,
                Err(shut) => return shard.turn_away(transport, knock.door, shut),
            }
        }
    };
    let tls_us = shard.now_us();
    let policy = policy(&shard, &config, client, proxied, tls_first);
    if tls_first {
        if let Err(error) = transport.start_tls(&shard.tls.borrow(), &rest) {
            tracing::error!(%error, "TLS cannot be started");
            return;
        }
        rest.clear();
    }
    let connecting = Connecting {
        transport,
        framer: Framer::new(),
        rest,
        drained: false,
        negotiation: Negotiation::new(&config.domain, policy),
        peer: client,
        pass,
        deadline_ms,
        refusal,
        times: Times {
            accepted_us: knock.arrived_us,
            tls_us,
            sasl_us: None,
        },
    };
    negotiate(shard, connecting, None, guest).await;
}

/// A stream that comes over the web, past the first gate.
pub(super) struct WebStream {
    pub transport: Transport,
    /// As a believed proxy names it.
    pub client: SocketAddr,
    pub proxied: bool,
    /// By TLS at our door, or a proxy says so.
    pub encrypted: bool,
    pub pass: Pass,
    /// Its place, if its connection's first request has begun it.
    pub guest: Option<Guest>,
    pub accepted_us: u64,
    /// Of the kind of stream that the transport carries.
    pub framer: Framer,
}

/// A stream has begun over the web.
pub(super) async fn begin_stream(shard: Rc<Shard>, stream: WebStream) {
    let config = shard.config.borrow().clone();
    let policy = policy(&shard, &config, stream.client, stream.proxied, true);
    let mut negotiation = Negotiation::new(&config.domain, policy);
    if stream.encrypted {
        // none where TLS ends at a proxy, or begins there again: then no mechanism with channel binding is offered
        negotiation.encrypted(match stream.proxied {
            true => ChannelBindings::default(),
            false => bindings(stream.transport.channel_bindings()),
        });
    }
    let connecting = Connecting {
        transport: stream.transport,
        framer: stream.framer,
        rest: Vec::new(),
        drained: false,
        negotiation,
        peer: stream.client,
        pass: stream.pass,
        deadline_ms: shard.now_ms() + config.limits.auth_seconds_max * 1000,
        refusal: None,
        times: Times {
            accepted_us: stream.accepted_us,
            tls_us: stream.accepted_us,
            sasl_us: None,
        },
    };
    let guest = stream.guest.unwrap_or_else(|| Guest::new(&shard));
    negotiate(shard, connecting, None, guest).await;
}

fn bindings(bound: crate::net::ChannelBindings) -> ChannelBindings {
    ChannelBindings {
        exporter: bound
            .exporter
            .map(|exporter| Exporter::new(move || exporter.binding())),
        server_end_point: bound.end_point.map(Into::into),
    }
}

/// What this connection may do.
fn policy(
    shard: &Shard,
    config: &Config,
    client: SocketAddr,
    proxied: bool,
    tls_first: bool,
) -> Policy {
    let loopback = !proxied && client.ip().to_canonical().is_loopback();
    let mechanisms = &config.sasl.mechanisms;
    Policy {
        tls_offered: !tls_first,
        tls_required: config.c2s.require_tls,
        mechanisms: Mechanism::ALL
            .into_iter()
            .filter(|m| mechanisms.iter().any(|name| name == m.name()))
            .collect(),
        register: match config.registration {
            Registration::Off => false,
            Registration::Loopback => loopback,
            Registration::On => true,
        },
        sasl2: config.sasl.sasl2,
        tokens: config.sasl.token_days > 0,
        attempts_max: config.limits.auth_attempts_max as u32,
        xml: crate::xml::Limits {
            stanza_bytes_max: config.limits.unauthenticated_stanza_bytes_max,
            ..shard.slice.borrow().env.limits.xml
        },
    }
}

/// A connection comes to this shard because its user lives here.
pub fn arrived(shard: Rc<Shard>, moved: Moved) {
    shard.hand_overs.set(shard.hand_overs.get() + 1);
    let guest = Guest::new(&shard);
    rt::spawn(
        Queue::Login,
        negotiate(shard, moved.connecting, Some(moved.wish), guest),
    );
}

/// Says why a connection is not let in: in words where it expects plain text, else by a TLS alert.
fn turn_away(shard: &Shard, transport: Transport, door: Door, error: &StreamError) {
    shard.gauges.turned_away.one();
    let mut out = Vec::new();
    if door.begins_with_tls() {
        out.extend_from_slice(&ALERT_INTERNAL_ERROR);
    } else if door == Door::Web {
        out.extend_from_slice(http::BUSY);
    } else {
        let config = shard.config.borrow().clone();
        let policy = Policy {
            tls_offered: false,
            tls_required: false,
            mechanisms: Vec::new(),
            register: false,
            sasl2: false,
            tokens: false,
            attempts_max: 1,
            xml: Default::default(),
        };
        Negotiation::new(&config.domain, policy).refuse(error, &mut out);
    }
    shard.close_transport(transport, &out);
}

async fn negotiate(shard: Rc<Shard>, mut c: Connecting, wish: Option<Wish>, guest: Guest) {
    shard.negotiating.set(shard.negotiating.get() + 1);
    let link = shard
        .links
        .borrow_mut()
        .insert(Kind::Login(guest.login.clone()));
    let outcome = match shard.readiness.add(c.transport.socket(), link) {
        Err(_) => Outcome::Gone,
        Ok(()) => in_time(&shard, &mut c, wish, &guest, link).await,
    };
    shard.negotiating.set(shard.negotiating.get() - 1);
    c.deadline_ms += guest.login.queued_ms(shard.now_ms());
    if let Outcome::Bound = outcome {
        let Connecting {
            transport,
            framer,
            rest,
            drained,
            pass,
            negotiation,
            ..
        } = c;
        // what came behind the binding, and edges that nobody saw meanwhile
        let more = !rest.is_empty() || !drained || guest.login.has_news();
        drop(negotiation);
        let Some(sid) = shard.take_bound(link) else {
            return;
        };
        let shown = |session: &Session| session.presence.is_some();
        let begins = match shard.slice.borrow().sessions.get(sid).is_some_and(shown) {
            true => Begins::No,
            false => Begins::Until {
                ms: shard.now_ms() + BEGINS_MS,
                queued: false,
                closed: false,
            },
        };
        if let Some(kind) = shard.links.borrow_mut().get_mut(link) {
            *kind = Kind::Live(Box::new(LiveLink {
                transport,
                framer,
                rest,
                session: sid,
                _pass: pass,
                begins,
            }));
        }
        shard.admission.bound();
        if more {
            shard.read(link, true);
        }
        shard.flush();
        if !shard.unread.borrow().is_empty() {
            shard.nudge();
        }
        return;
    }
    shard.links.borrow_mut().remove(link);
    match outcome {
        Outcome::Move(owner, wish) => {
            shard.readiness.remove(c.transport.socket());
            shard.ways.borrow_mut().send(
                owner,
                Parcel::Moved(Box::new(Moved {
                    connecting: c,
                    wish,
                })),
                shard.now_us(),
            );
        }
        Outcome::Refuse(error) => {
            let mut out = Vec::new();
            c.negotiation.refuse(&error, &mut out);
            shard.close_transport(c.transport, &out);
        }
        Outcome::Close(last) => shard.close_transport(c.transport, &last),
        Outcome::Gone if c.transport.has_said_farewell() => {
            shard.close_transport(c.transport, &[]);
        }
        Outcome::Gone | Outcome::Bound => {}
    }
}

/// [`run`], within the time that the client has; what it waits at the gates is not its fault.
async fn in_time(
    shard: &Rc<Shard>,
    c: &mut Connecting,
    wish: Option<Wish>,
    guest: &Guest,
    link: u64,
) -> Outcome {
    let deadline_ms = c.deadline_ms;
    let mut run = pin!(run(shard, c, wish, guest, link));
    loop {
        let now_ms = shard.now_ms();
        let left = (deadline_ms + guest.login.queued_ms(now_ms)).saturating_sub(now_ms);
        match rt::timeout(Duration::from_millis(left), run.as_mut()).await {
            Ok(outcome) => return outcome,
            Err(_) if left > 0 => {}
            Err(_) => {
                return Outcome::Refuse(StreamError::text(
                    "connection-timeout",
                    "too slow to authenticate",
                ));
            }
        }
    }
}

/// Negotiates until the session stands or there is nothing more to say.
async fn run(
    shard: &Rc<Shard>,
    c: &mut Connecting,
    wish: Option<Wish>,
    guest: &Guest,
    link: u64,
) -> Outcome {
    let mut out = Vec::with_capacity(OUT_BYTES_USUAL);
    let mut next = wish.map(|wish| match wish {
        Wish::Login(name) => Step::Login { name },
        Wish::Register(name, password) => Step::Register { name, password },
    });
    loop {
        if shard.stopping.get() {
            return Outcome::Refuse(StreamError::text("system-shutdown", "the server stops"));
        }
        if guest.login.is_cut() {
            return Outcome::Refuse(StreamError::text("connection-timeout", "silent too long"));
        }
        if let Some(error) = c.refusal.take_if(|_| !c.transport.handshaking()) {
            return Outcome::Refuse(error);
        }
        let step = match next.take() {
            Some(step) => step,
            None => match c.framer.next(&c.rest, c.negotiation.limits()) {
                Err(error) => return Outcome::Refuse(error.into()),
                Ok(None) => match fill(shard, c, guest).await {
                    Ok(()) => continue,
                    Err(()) => return Outcome::Gone,
                },
                Ok(Some(frame)) => {
                    let step = {
                        let slice = shard.slice.borrow();
                        c.negotiation
                            .frame(frame.kind, &c.rest[..frame.len], &slice.env, &mut out)
                    };
                    c.rest.drain(..frame.len);
                    match step {
                        Ok(step) => step,
                        Err(error) => return Outcome::Refuse(error),
                    }
                }
            },
        };
        match step {
            Step::Continue => {}
            Step::Authenticated => {
                // before the client hears of it: its next connection counts on it
                c.pass.authenticated();
                if let Some(since_us) = c.times.sasl_us.take() {
                    record(Stage::Sasl, shard.now_us() - since_us);
                }
                // the stream goes on where the rest came along with the authentication
                if c.negotiation.request().is_none() {
                    c.framer.restart();
                }
                if let Some(name) = c.negotiation.user() {
                    shard.doors.succeeded(name);
                    match shard.often(name) {
                        Ok(Duration::ZERO) => {}
                        Ok(pause) => {
                            guest.away(shard.hold_back(pause)).await;
                            // what was reported meanwhile is not reported again
                            c.drained = false;
                        }
                        Err(seconds) => return Outcome::Refuse(overloaded(seconds)),
                    }
                }
                if c.negotiation.request().is_some() {
                    next = Some(c.negotiation.proceed(&shard.slice.borrow().env, &mut out));
                }
            }
            Step::StartTls => {
                if c.transport
                    .write(&out, &mut shard.scratch.borrow_mut())
                    .is_err()
                {
                    return Outcome::Gone;
                }
                out.clear();
                // RFC 6120 5.4.3.3: nothing may follow <starttls/> in the clear
                c.rest.clear();
                c.times.tls_us = shard.now_us();
                if c.transport.start_tls(&shard.tls.borrow(), &[]).is_err() {
                    return Outcome::Gone;
                }
                c.framer.restart();
            }
            Step::Login { name } => {
                c.times.sasl_us.get_or_insert_with(|| shard.now_us());
                let owner = shard.slice.borrow().env.owner(&name) as usize;
                if owner != shard.number {
                    return Outcome::Move(owner, Wish::Login(name));
                }
                if let Err(error) = guest.name(shard.class_of(&name, &c.negotiation)).await {
                    return Outcome::Refuse(error);
                }
                next = Some(shard.credentials(c, guest, &name, &mut out).await);
            }
            Step::CheckPassword(check) => {
                let right = match guest.away(shard.compute(Job::Check(check))).await {
                    Some(Computed::Checked(right)) => Some(right),
                    _ => None,
                };
                next = Some(c.negotiation.checked(right, &mut out));
            }
            Step::Refused {
                name,
                condition,
                close,
            } => {
                shard.gauges.auth_failures.one();
                // what the client has chosen is quoted and comes behind the address: see config/fail2ban
                tracing::info!(
                    address = %c.peer.ip(),
                    user = name.as_deref().unwrap_or_default(),
                    condition,
                    "authentication failed"
                );
                let config = shard.config.borrow().clone();
                let pause = shard.doors.failed(c.peer.ip(), name.as_deref(), &config);
                guest.away(shard.hold_back(pause)).await;
                // what was reported meanwhile is not reported again
                c.drained = false;
                if close {
                    return Outcome::Close(out);
                }
            }
            Step::Register { name, password } => {
                let owner = shard.slice.borrow().env.owner(&name) as usize;
                if owner != shard.number {
                    return Outcome::Move(owner, Wish::Register(name, password));
                }
                if let Err(error) = guest.name(Class::Stranger).await {
                    return Outcome::Refuse(error);
                }
                let outcome = guest.away(shard.register(c, &name, password)).await;
                c.negotiation.registered(outcome, &mut out);
            }
            Step::Tokens => {
                // he may have left the cache since he authenticated
                let name: Box<str> = c.negotiation.user().unwrap_or_default().into();
                if shard.slice.borrow().user(&name).is_none() {
                    guest.away(shard.load(&name)).await;
                }
                let outcome = match shard.plan_tokens(&c.negotiation) {
                    Err(failure) => Err(failure),
                    Ok(None) => Ok(None),
                    Ok(Some(plan)) => guest.away(shard.change_tokens(&c.negotiation, plan)).await,
                };
                let env = &shard.slice.borrow().env;
                next = match c.negotiation.tokens(outcome, env, &mut out) {
                    Step::Continue => None,
                    step => Some(step),
                };
            }
            Step::Bind { resource, extras } => {
                let outcome = shard.bind(c, resource.as_deref(), &extras, link).await;
                let bound = outcome.is_ok();
                let told = match &outcome {
                    Ok((jid, answers)) => Ok((&**jid, answers)),
                    Err(error) => Err(error.clone()),
                };
                c.negotiation
                    .bound(told, &shard.slice.borrow().env, &mut out);
                if bound {
                    return match c.transport.write(&out, &mut shard.scratch.borrow_mut()) {
                        Ok(()) => {
                            record(Stage::Login, shard.now_us() - c.times.accepted_us);
                            Outcome::Bound
                        }
                        Err(_) => {
                            shard.abandon(link);
                            Outcome::Gone
                        }
                    };
                }
            }
            Step::Resume { previd, h } => match shard.resume(c, guest, &previd, h, link).await {
                Ok(Resumed::Yes) => {
                    record(Stage::Resume, shard.now_us() - c.times.accepted_us);
                    return Outcome::Bound;
                }
                Ok(Resumed::Refused(failure)) => {
                    next = match c.negotiation.refused_resumption(failure, &mut out) {
                        Step::Continue => None,
                        step => Some(step),
                    };
                }
                Ok(Resumed::No { count }) => {
                    let env = &shard.slice.borrow().env;
                    next = match c.negotiation.not_resumed(count, env, &mut out) {
                        Step::Continue => None,
                        step => Some(step),
                    };
                }
                Err(error) => return Outcome::Refuse(error),
            },
            Step::End => return Outcome::Close(out),
        }
        if next.is_none() && !out.is_empty() {
            if c.transport
                .write(&out, &mut shard.scratch.borrow_mut())
                .is_err()
            {
                return Outcome::Gone;
            }
            out.clear();
        }
    }
}

/// Reads until there is something new in `rest`, with the handshake on the way.
async fn fill(shard: &Shard, c: &mut Connecting, guest: &Guest) -> Result<(), ()> {
    loop {
        if std::mem::take(&mut c.drained) && !guest.login.closed.get() {
            // the last read took all that was there: an edge tells when there is more
            guest.login.blocked.set(c.transport.pending() > 0);
            guest.client().await;
            if c.transport.pending() > 0 && c.transport.flush().is_err() {
                return Err(());
            }
            if shard.stopping.get() || guest.login.is_cut() {
                return Ok(());
            }
        }
        let handshaking = c.transport.handshaking();
        let read = {
            let mut scratch = shard.scratch.borrow_mut();
            match c.transport.read(&mut scratch) {
                Ok(Read::Data { bytes, more }) => {
                    c.drained = !more;
                    c.rest.extend_from_slice(bytes);
                    true
                }
                Ok(Read::HandshakeDone | Read::WouldBlock) => false,
                Ok(Read::Eof) => return Err(()),
                Err(error) => {
                    tracing::debug!(address = %c.peer.ip(), %error, "a connection broke before its session");
                    return Err(());
                }
            }
        };
        // not only when the read says so: data may come together with the handshake's last message
        let handshake_done = handshaking && !c.transport.handshaking();
        if handshake_done {
            record(Stage::TlsHandshake, shard.now_us() - c.times.tls_us);
            if c.transport.tls_resumed() {
                shard.gauges.tls_resumed.one();
            }
            let bound = c.transport.channel_bindings();
            c.negotiation.encrypted(bindings(bound));
            c.negotiation.certified(certified(shard, c));
        }
        if read || (handshake_done && c.refusal.is_some()) {
            return Ok(());
        }
        if handshake_done {
            continue;
        }
        c.drained = true;
    }
}

/// The accounts that the client's certificate stands for (XEP-0178).
fn certified(shard: &Shard, c: &Connecting) -> Vec<Box<str>> {
    let config = shard.config.borrow();
    match c.transport.client_names() {
        None => Vec::new(),
        Some(Ok(names)) => {
            let email = config.tls.client_email.then_some(&*names.email);
            external::accounts(&names.xmpp, email, &config.domain)
        }
        Some(Err(reason)) => {
            shard.gauges.client_certificates_refused.one();
            tracing::info!(address = %c.peer.ip(), reason, "a client's certificate does not hold");
            Vec::new()
        }
    }
}

/// The PROXY header that a believed proxy must send first: the client it names, and what came behind the header.
async fn proxy_header(
    shard: &Shard,
    transport: &mut Transport,
    notify: &Waits,
) -> Option<(Option<SocketAddr>, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        match parse_proxy_header(&bytes) {
            Ok(Some((proxied, len))) => {
                let unread = bytes.split_off(len);
                let source = match proxied {
                    Proxied::Client(source) => Some(source),
                    Proxied::Unknown | Proxied::Proxy => None,
                };
                return Some((source, unread));
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a trusted proxy sent no PROXY v2 header");
                return None;
            }
        }
        let more = {
            let mut scratch = shard.scratch.borrow_mut();
            match transport.read(&mut scratch) {
                Ok(Read::Data { bytes: data, .. }) => {
                    bytes.extend_from_slice(data);
                    true
                }
                Ok(Read::WouldBlock) => false,
                _ => return None,
            }
        };
        if !more {
            notify.ready.wait().await;
        }
    }
}

impl Shard {
    /// Watches a connection for as long as `with` runs, within the deadline.
    pub(super) async fn with_readiness<T>(
        &self,
        transport: &mut Transport,
        deadline_ms: u64,
        with: impl AsyncFnOnce(&Shard, &mut Transport, &Waits) -> T,
    ) -> Option<T> {
        let notify = Rc::new(Waits::default());
        let link = self.links.borrow_mut().insert(Kind::Waits(notify.clone()));
        let mut outcome = None;
        if self.readiness.add(transport.socket(), link).is_ok() {
            let left = deadline_ms.saturating_sub(self.slice.borrow().now.ms);
            outcome = rt::timeout(Duration::from_millis(left), with(self, transport, &notify))
                .await
                .ok();
            self.readiness.remove(transport.socket());
        }
        self.links.borrow_mut().remove(link);
        outcome
    }

    /// Are so many logins in progress that no more may begin?
    pub(super) fn has_too_many_logins(&self) -> bool {
        let most = self.config.borrow().limits.logins_in_progress_max;
        self.negotiating.get() + self.admission.knocks() >= most
    }

    /// Only the live loop gives out places: it must not sleep while somebody wants one.
    pub(super) fn wake_for_gates(&self) {
        if self.admission.is_wanted() && self.admission.asleep.replace(false) {
            self.nudge();
        }
    }

    /// Waits for `pause`, or until the shard stops.
    async fn hold_back(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.stopping.get()
            && let Some(left) = until.checked_duration_since(Instant::now())
        {
            rt::sleep(left.min(HOLD_BACK_PIECE)).await;
        }
    }

    /// What somebody hears who cannot log in now.
    fn overloaded(&self) -> StreamError {
        let mut chance = [0];
        aws_lc_rs::rand::fill(&mut chance).expect("the system gives random bytes");
        overloaded(self.admission.retry_seconds(chance[0]))
    }

    /// How long the login of an account is held back that logs in too often, or when it may try again.
    fn often(&self, name: &str) -> Result<Duration, u64> {
        let config = self.config.borrow().clone();
        let often = self
            .frequency
            .borrow_mut()
            .login(name, self.now_ms(), &config);
        if often != Ok(Duration::ZERO) {
            self.logins_slowed.set(self.logins_slowed.get() + 1);
        }
        often
    }

    fn turn_away(&self, transport: Transport, door: Door, shut: Shut) {
        tracing::debug!(?shut, "turned away");
        let error = match shut {
            Shut::Logins | Shut::Blade => self.overloaded(),
            Shut::Address | Shut::Unauthenticated => {
                StreamError::text("resource-constraint", "too many connections")
            }
        };
        turn_away(self, transport, door, &error);
    }

    /// Whom the second gate lets in first: who has a session that can be resumed, then who is on line or was a moment ago.
    /// Whether he will resume it he says now (XEP-0388), or is not known before he says so.
    fn class_of(&self, name: &str, negotiation: &Negotiation) -> Class {
        let slice = self.slice.borrow();
        let Some(user) = slice.user(name) else {
            return Class::Stranger;
        };
        let resumable = |sid| {
            let sm = slice.sessions.get(sid).and_then(|s| s.sm.as_ref());
            sm.is_some_and(|sm| sm.resume_ms > 0)
        };
        let since = |at| slice.now.unix.saturating_sub(at);
        let resumes = match negotiation.request() {
            None => user.sessions.iter().any(|sid| resumable(*sid)),
            Some(request) => request
                .resume
                .as_ref()
                .is_some_and(|(previd, _)| sm::find(&slice, name, previd).is_some()),
        };
        if resumes {
            return Class::Resumable;
        }
        let recent = self.config.borrow().storm.recent_seconds;
        match &user.last {
            _ if !user.sessions.is_empty() => Class::Recent,
            Some(last) if since(last.at) <= recent => Class::Recent,
            _ => Class::Stranger,
        }
    }

    /// Waits until the user is loaded, then goes on with his keys.
    async fn credentials(
        &self,
        c: &mut Connecting,
        guest: &Guest,
        name: &str,
        out: &mut Vec<u8>,
    ) -> Step {
        let begun = Instant::now();
        // known or not, cached or not: the time of the answer does not tell
        let least = Duration::from_millis(self.config.borrow().sasl.answer_ms_min);
        let known = async {
            self.load(name).await;
            if let Some(left) = least.checked_sub(begun.elapsed()) {
                rt::sleep(left).await;
            }
        };
        guest.away(known).await;
        let slice = self.slice.borrow();
        let decoy = self.decoy.borrow().clone();
        let unix = slice.now.unix;
        match slice.users.peek(name) {
            Some(Slot::Present(user)) if c.negotiation.shows_token() => {
                let record = user.record.get();
                self.gauges.token_logins.one();
                c.negotiation.account = Some(fast::account(record));
                c.negotiation.token(Some(record), &slice.env, unix, out)
            }
            Some(Slot::Missing) if c.negotiation.shows_token() => {
                c.negotiation.token(None, &slice.env, unix, out)
            }
            Some(Slot::Present(user)) => {
                let record = user.record.get();
                let keys = Credentials {
                    sha1: record.sha1.as_ref().map(borrow_keys),
                    sha256: record.sha256.as_ref().map(borrow_keys),
                };
                if c.negotiation.shows_certificate() {
                    self.gauges.certificate_logins.one();
                }
                c.negotiation.account = Some(fast::account(record));
                c.negotiation
                    .credentials(Some(keys), record.disabled, &decoy, out)
            }
            Some(Slot::Missing) => c.negotiation.credentials(None, false, &decoy, out),
            // the tier cannot say
            _ => c.negotiation.failed(Failure::TEMPORARY_AUTH_FAILURE, out),
        }
    }

    /// Returns when the user is present or missing, or cannot be loaded now.
    async fn load(&self, name: &str) {
        let known = self.slice.borrow_mut().want(name);
        if known {
            return;
        }
        let since_us = self.now_us();
        let (setter, loaded) = slot();
        self.waiting
            .borrow_mut()
            .entry(name.into())
            .or_default()
            .push(setter);
        self.flush();
        loaded.take().await;
        record(Stage::UserRead, self.now_us() - since_us);
    }

    /// Has a slow job done by a helper thread.
    async fn compute(&self, job: Job) -> Option<Computed> {
        let (setter, done) = slot();
        self.slice
            .borrow_mut()
            .compute(job, Box::new(move |_, outcome| setter.set(outcome)));
        self.flush();
        done.take().await
    }

    /// XEP-0077: makes the account. It exists when the answer says so.
    async fn register(
        &self,
        c: &Connecting,
        name: &str,
        password: String,
    ) -> Result<(), StanzaError> {
        let config = self.config.borrow().clone();
        self.load(name).await;
        match self.slice.borrow().users.peek(name) {
            Some(Slot::Missing) => {}
            Some(Slot::Present(_)) => return Err(StanzaError::CONFLICT),
            _ => return Err(StanzaError::RESOURCE_CONSTRAINT),
        }
        if !self.doors.register(c.peer.ip(), &config) {
            return Err(
                StanzaError::RESOURCE_CONSTRAINT.text("too many accounts from this address")
            );
        }
        let job = Job::Derive {
            password,
            iterations: config.sasl.iterations,
        };
        let (sha1, sha256) = match self.compute(job).await {
            Some(Computed::Keys(Ok(keys))) => keys,
            Some(Computed::Keys(Err(_))) => return Err(StanzaError::NOT_ACCEPTABLE),
            _ => return Err(StanzaError::RESOURCE_CONSTRAINT),
        };
        let record = Record::new(&UserRecord {
            created_at: self.slice.borrow().now.unix,
            sha1: Some(sha1.into()),
            sha256: Some(sha256.into()),
            ..UserRecord::default()
        });
        let (setter, done) = slot();
        let op = Op::AddUser { record };
        self.slice
            .borrow_mut()
            .write(name, op, Box::new(move |_, result| setter.set(result)));
        self.flush();
        match done.take().await {
            Some(Ok(())) => {
                tracing::info!(address = %c.peer.ip(), user = name, "account registered in-band");
                Ok(())
            }
            Some(Err(WriteError::Conflict)) => Err(StanzaError::CONFLICT),
            _ => Err(StanzaError::RESOURCE_CONSTRAINT),
        }
    }

    /// XEP-0484: the change of the tokens of the user who has just authenticated; `None`: there is none, which is the rule.
    /// `Err`: he must not be let in.
    fn plan_tokens(&self, negotiation: &Negotiation) -> Result<Option<fast::Plan>, Failure> {
        let config = self.config.borrow().clone();
        let terms = fast::Terms {
            life_seconds: config.sasl.token_days * 86_400,
            tokens_max: config.limits.tokens_per_user_max,
        };
        let mut random = [0; 16];
        aws_lc_rs::rand::fill(&mut random).expect("the system gives random bytes");
        let slice = self.slice.borrow();
        let user = negotiation.user().and_then(|name| slice.user(name));
        let record = user.ok_or(Failure::TEMPORARY_AUTH_FAILURE)?.record.get();
        // he may have been held back: what his proof held for may be past
        bind::check_account(record, negotiation.account)?;
        let request = negotiation.request();
        let plan = request
            .zip(request.and_then(|request| request.agent.as_deref()))
            .and_then(|(request, agent)| {
                let now = slice.now.unix;
                fast::plan(record, agent, &request.tokens, terms, now, random)
            });
        Ok(plan)
    }

    /// Carries it out: the new token, when it is durable. `Err`: the one that was to end cannot be ended, or the account is not
    /// the same any more.
    async fn change_tokens(
        &self,
        negotiation: &Negotiation,
        plan: fast::Plan,
    ) -> Result<Option<String>, Failure> {
        let name: Box<str> = negotiation.user().unwrap_or_default().into();
        let (setter, done) = slot();
        let mut over = 0;
        self.slice.borrow_mut().edit(
            &name,
            |record| over = plan.apply(record),
            Box::new(move |_, result| setter.set(result)),
        );
        self.gauges.tokens_evicted.add(over as u64);
        self.flush();
        if !matches!(done.take().await, Some(Ok(()))) {
            tracing::warn!(user = &*name, "a token could not be stored");
            return match plan.invalidates {
                true => Err(Failure::TEMPORARY_AUTH_FAILURE),
                false => Ok(None),
            };
        }
        let slice = self.slice.borrow();
        let agent = negotiation.request().and_then(|r| r.agent.as_deref());
        let record = slice.user(&name).map(|user| user.record.get());
        // the password was changed while the token was written: none is made from the new one
        if record.is_some_and(|record| negotiation.account != Some(fast::account(record))) {
            return Err(Failure::NOT_AUTHORIZED);
        }
        let answer = record
            .zip(agent)
            .and_then(|(record, agent)| plan.answer(&slice.env.login_key, &name, record, agent));
        if answer.is_some() {
            self.gauges.tokens_given.one();
        }
        Ok(answer)
    }

    /// The session begins: its JID, and the answers to what is enabled with it. Its user may have left the cache since he authenticated: he is loaded again.
    async fn bind(
        &self,
        c: &mut Connecting,
        resource: Option<&str>,
        extras: &Extras,
        link: u64,
    ) -> Result<(String, Answers), StanzaError> {
        let name: Box<str> = c.negotiation.user().unwrap_or_default().into();
        for _ in 0..LOADS_MAX {
            self.load(&name).await;
            if self
                .slice
                .borrow()
                .users
                .peek(&name)
                .is_some_and(Slot::is_known)
            {
                break;
            }
        }
        let mut slice = self.slice.borrow_mut();
        if !slice.users.peek(&name).is_some_and(Slot::is_known) {
            return Err(StanzaError::RESOURCE_CONSTRAINT);
        }
        let arrival = Arrival {
            user: c.negotiation.user().unwrap_or_default(),
            account: c.negotiation.account,
            resource,
            link,
            lang: c.negotiation.lang.clone(),
            stream_ns: self.stream_ns(c.negotiation.stream_ns()),
            peer: c.peer.to_string().into(),
            tls: c.negotiation.encrypted,
        };
        let sid = bind::bind(&mut slice, arrival)?;
        let answers = bind::enable(&mut slice, sid, extras);
        let jid = slice
            .sessions
            .get(sid)
            .map(|s| s.jid.to_string())
            .unwrap_or_default();
        self.bound.borrow_mut().push((link, sid));
        let (bare, resource) = jid.split_once('/').unwrap_or((&jid, ""));
        tracing::info!(
            address = %c.peer.ip(),
            user = bare,
            resource,
            tls = c.negotiation.encrypted,
            "logged in"
        );
        Ok((jid, answers))
    }

    /// The old connection is closed first, and the answer waits until all that was read from it is decided: its count is
    /// exact.
    async fn resume(
        &self,
        c: &mut Connecting,
        guest: &Guest,
        previd: &str,
        h: u32,
        link: u64,
    ) -> Result<Resumed, StreamError> {
        let name: Box<str> = c.negotiation.user().unwrap_or_default().into();
        let sid = sm::find(&self.slice.borrow(), &name, previd);
        if let Some(sid) = sid {
            // nobody else's connection is closed
            if let Err(failure) = self.check_account(&c.negotiation) {
                return Ok(Resumed::Refused(failure));
            }
            sm::detach(&mut self.slice.borrow_mut(), sid);
        }
        while self.is_settling(sid, previd) {
            let (setter, settled) = slot();
            self.waiting
                .borrow_mut()
                .entry(name.clone())
                .or_default()
                .push(setter);
            self.flush();
            guest.away(settled.take()).await;
        }
        if let Err(failure) = self.check_account(&c.negotiation) {
            return Ok(Resumed::Refused(failure));
        }
        let mut slice = self.slice.borrow_mut();
        let Some(sid) = sm::find(&slice, &name, previd) else {
            let count = slice.count_of(previd);
            return Ok(Resumed::No { count });
        };
        let stream_ns = self.stream_ns(c.negotiation.stream_ns());
        let jid = slice.sessions.get(sid).map(|s| s.jid.clone());
        let (before, behind) = c
            .negotiation
            .resumed(jid.as_deref().unwrap_or_default(), &slice.env);
        sm::resume(&mut slice, sid, link, h, (&before, &behind))?;
        if let Some(session) = slice.sessions.get_mut(sid) {
            session.stream_ns = stream_ns;
            session.tls = c.negotiation.encrypted;
            session.peer = c.peer.to_string().into();
            tracing::info!(
                address = %c.peer.ip(),
                user = session.bare(),
                resource = session.resource(),
                tls = c.negotiation.encrypted,
                "resumed"
            );
        }
        self.bound.borrow_mut().push((link, sid));
        Ok(Resumed::Yes)
    }

    /// Whoever has a session is loaded; of others there is nothing to resume.
    fn check_account(&self, negotiation: &Negotiation) -> Result<(), Failure> {
        let slice = self.slice.borrow();
        match negotiation.user().and_then(|name| slice.user(name)) {
            Some(user) => bind::check_account(user.record.get(), negotiation.account),
            None => Ok(()),
        }
    }

    /// Is something that was read from the session, or from one that has ended, not decided yet?
    fn is_settling(&self, sid: Option<SessionId>, previd: &str) -> bool {
        let mut slice = self.slice.borrow_mut();
        sid.is_some_and(|sid| sm::is_settling(&mut slice, sid)) || slice.is_ending(previd)
    }

    /// The namespaces of a stream header, shared by all streams that declare the same.
    fn stream_ns(&self, ns: &StreamNs) -> Rc<StreamNs> {
        let mut usual = self.usual_ns.borrow_mut();
        if **usual != *ns {
            *usual = Rc::new(ns.clone());
        }
        usual.clone()
    }

    fn take_bound(&self, link: u64) -> Option<crate::xmpp::session::SessionId> {
        let mut bound = self.bound.borrow_mut();
        let at = bound.iter().position(|(l, _)| *l == link)?;
        Some(bound.swap_remove(at).1)
    }

    /// The connection broke while its session began.
    fn abandon(&self, link: u64) {
        if let Some(sid) = self.take_bound(link) {
            self.slice.borrow_mut().link_lost(sid);
        }
    }
}

fn borrow_keys(keys: &ArchivedScramKeys) -> ScramKeysRef<'_> {
    ScramKeysRef {
        iterations: keys.iterations.to_native(),
        salt: &keys.salt,
        stored_key: &keys.stored_key,
        server_key: &keys.server_key,
    }
}
