//! A connection from accept to its session: a task in the login queue that drives [`Negotiation`] and waits for what that
//! needs. When a user is named, the task ends here and goes on at the user's owner, with socket, TLS state and unread bytes.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::doors::{Pass, Shut};
use super::moves::Parcel;
use super::{Door, Kind, LiveLink, Shard, Waits, http};
use crate::config::Registration;
use crate::net::{Listener, Proxied, Read, Socket, Transport, parse_proxy_header};
use crate::observe::{Stage, record};
use crate::rt::{self, Queue, slot};
use crate::store::record::{ArchivedScramKeys, Record, UserRecord};
use crate::xml::{Framer, StreamNs};
use crate::xmpp::bind::{self, Arrival};
use crate::xmpp::error::{StanzaError, StreamError};
use crate::xmpp::feature::sm;
use crate::xmpp::negotiation::{Negotiation, Policy, Step};
use crate::xmpp::sasl::{ChannelBindings, Credentials, Mechanism, ScramKeysRef};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::{Computed, Job, Op, Slot, WriteError};

/// A connection that has no session yet. It may move to another shard.
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
    /// Monotonic milliseconds of the blade.
    deadline_ms: u64,
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
    /// Whatever had to be said was said.
    Close,
    /// The connection broke.
    Gone,
}

/// How often a user is loaded for one binding, when others push him out of the cache in between.
const LOADS_MAX: u32 = 3;

enum Resumed {
    Yes,
    /// There is no such session; so many of its stanzas were durable, if that is known.
    No {
        count: Option<u32>,
    },
}

/// How long to wait for descriptors when there are none left (EMFILE).
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Accepts what comes in at one port.
pub async fn accept(shard: Rc<Shard>, listener: Listener, door: Door) {
    let notify = Rc::new(Waits::default());
    let link = shard.links.borrow_mut().insert(Kind::Waits(notify.clone()));
    if let Err(error) = shard.readiness.add(&listener, link) {
        tracing::error!(%error, "a listener cannot be watched");
        return;
    }
    loop {
        // what is queued in the kernel would be reset when the listener closes: take it all before
        match listener.accept() {
            Ok(Some((socket, peer))) => {
                shard.clock();
                match door {
                    Door::Http => rt::spawn(Queue::House, http::serve(shard.clone(), socket)),
                    _ => {
                        let accepted_us = shard.slice.borrow().now.us;
                        let tls_first = door == Door::XmppTls;
                        rt::spawn(
                            Queue::Login,
                            begin(shard.clone(), socket, peer, tls_first, accepted_us),
                        );
                    }
                }
            }
            // that the server stops is told by HTTP to the end (see [`http`]): load balancers ask
            Ok(None) if shard.stopping.get() && door != Door::Http => break,
            Ok(None) => notify.ready.wait().await,
            Err(error) => {
                shard.gauges.accept_failures.one();
                tracing::warn!(%error, "connections cannot be accepted for the moment");
                rt::sleep(EXHAUSTED_PAUSE).await;
            }
        }
        rt::yield_if_needed().await;
    }
    shard.links.borrow_mut().remove(link);
    shard.readiness.remove(&listener);
}

async fn begin(
    shard: Rc<Shard>,
    socket: Socket,
    peer: SocketAddr,
    tls_first: bool,
    accepted_us: u64,
) {
    let config = shard.config.borrow().clone();
    let mut transport = Transport::plain(socket);
    let deadline_ms = shard.slice.borrow().now.ms + config.limits.auth_seconds_max * 1000;
    let mut rest = Vec::new();
    let mut client = peer;
    let mut proxied = false;
    if config.is_trusted_proxy(peer.ip()) {
        let named = shard.with_readiness(
            &mut transport,
            deadline_ms,
            async |shard, transport, notify| proxy_header(shard, transport, notify).await,
        );
        match named.await {
            Some(Some((source, unread))) => {
                proxied = true;
                client = source.unwrap_or(peer);
                rest = unread;
            }
            _ => return,
        }
    }
    if shard.negotiating.get() >= config.limits.logins_in_progress_max {
        return turn_away(&shard, transport, tls_first, Shut::Logins);
    }
    let pass = match shard.doors.enter(client.ip(), proxied, &config) {
        Ok(pass) => pass,
        Err(shut) => return turn_away(&shard, transport, tls_first, shut),
    };
    let loopback = !proxied && client.ip().to_canonical().is_loopback();
    let mechanisms = &config.sasl.mechanisms;
    let policy = Policy {
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
        attempts_max: config.limits.auth_attempts_max as u32,
        xml: crate::xml::Limits {
            stanza_bytes_max: config.limits.unauthenticated_stanza_bytes_max,
            ..shard.slice.borrow().env.limits.xml
        },
    };
    let tls_us = shard.now_us();
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
        times: Times {
            accepted_us,
            tls_us,
            sasl_us: None,
        },
    };
    negotiate(shard, connecting, None).await;
}

/// A connection comes to this shard because its user lives here.
pub fn arrived(shard: Rc<Shard>, moved: Moved) {
    shard.hand_overs.set(shard.hand_overs.get() + 1);
    rt::spawn(
        Queue::Login,
        negotiate(shard, moved.connecting, Some(moved.wish)),
    );
}

/// Too many connections: said in plain text where that is possible.
fn turn_away(shard: &Shard, mut transport: Transport, tls_first: bool, shut: Shut) {
    shard.gauges.turned_away.one();
    tracing::debug!(?shut, "turned away");
    if tls_first {
        return;
    }
    let config = shard.config.borrow().clone();
    let negotiation = Negotiation::new(
        &config.domain,
        Policy {
            tls_offered: false,
            tls_required: false,
            mechanisms: Vec::new(),
            register: false,
            attempts_max: 1,
            xml: Default::default(),
        },
    );
    let mut out = Vec::new();
    negotiation.refuse(
        &StreamError::text("resource-constraint", "too many connections"),
        &mut out,
    );
    let _ = transport.write(&out, &mut shard.scratch.borrow_mut());
    shard.close_transport(transport);
}

async fn negotiate(shard: Rc<Shard>, mut c: Connecting, wish: Option<Wish>) {
    shard.negotiating.set(shard.negotiating.get() + 1);
    let notify = Rc::new(Waits::default());
    let link = shard.links.borrow_mut().insert(Kind::Waits(notify.clone()));
    let outcome = match shard.readiness.add(c.transport.socket(), link) {
        Err(_) => Outcome::Gone,
        Ok(()) => {
            let left = c.deadline_ms.saturating_sub(shard.slice.borrow().now.ms);
            let run = run(&shard, &mut c, wish, &notify, link);
            match rt::timeout(Duration::from_millis(left), run).await {
                Ok(outcome) => outcome,
                Err(_) => Outcome::Refuse(StreamError::text(
                    "connection-timeout",
                    "too slow to authenticate",
                )),
            }
        }
    };
    shard.negotiating.set(shard.negotiating.get() - 1);
    if let Outcome::Bound = outcome {
        let Connecting {
            transport,
            framer,
            rest,
            pass,
            negotiation,
            ..
        } = c;
        drop(negotiation);
        let Some(sid) = shard.take_bound(link) else {
            return;
        };
        if let Some(kind) = shard.links.borrow_mut().get_mut(link) {
            *kind = Kind::Live(Box::new(LiveLink {
                transport,
                framer,
                rest,
                session: sid,
                _pass: pass,
            }));
        }
        // what came behind the binding, and edges that nobody saw meanwhile
        shard.read(link, true);
        shard.flush();
        if !shard.unread.borrow().is_empty() {
            shard.nudge();
        }
        return;
    }
    shard.links.borrow_mut().remove(link);
    shard.readiness.remove(c.transport.socket());
    match outcome {
        Outcome::Move(owner, wish) => {
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
            if !c.transport.handshaking() {
                let _ = c.transport.write(&out, &mut shard.scratch.borrow_mut());
            }
            shard.close_transport(c.transport);
        }
        Outcome::Close => shard.close_transport(c.transport),
        Outcome::Gone | Outcome::Bound => {}
    }
}

/// Negotiates until the session stands or there is nothing more to say.
async fn run(
    shard: &Rc<Shard>,
    c: &mut Connecting,
    wish: Option<Wish>,
    notify: &Waits,
    link: u64,
) -> Outcome {
    let mut out = Vec::new();
    let mut next = wish.map(|wish| match wish {
        Wish::Login(name) => Step::Login { name },
        Wish::Register(name, password) => Step::Register { name, password },
    });
    loop {
        if shard.stopping.get() {
            return Outcome::Refuse(StreamError::text("system-shutdown", "the server stops"));
        }
        let step = match next.take() {
            Some(step) => step,
            None => match c.framer.next(&c.rest, c.negotiation.limits()) {
                Err(error) => return Outcome::Refuse(error.into()),
                Ok(None) => match fill(shard, c, notify).await {
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
                c.framer.restart();
                if let Some(name) = c.negotiation.user() {
                    shard.doors.succeeded(name);
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
                next = Some(shard.credentials(c, &name, &mut out).await);
            }
            Step::CheckPassword(check) => {
                let right = match shard.compute(Job::Check(check)).await {
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
                shard.hold_back(c, notify, pause).await;
                if close {
                    let _ = c.transport.write(&out, &mut shard.scratch.borrow_mut());
                    return Outcome::Close;
                }
            }
            Step::Register { name, password } => {
                let owner = shard.slice.borrow().env.owner(&name) as usize;
                if owner != shard.number {
                    return Outcome::Move(owner, Wish::Register(name, password));
                }
                let outcome = shard.register(c, &name, password).await;
                c.negotiation.registered(outcome, &mut out);
            }
            Step::Bind { resource } => {
                let outcome = shard.bind(c, resource.as_deref(), link).await;
                let bound = outcome.is_ok();
                c.negotiation
                    .bound(outcome.as_deref().map_err(Clone::clone), &mut out);
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
            Step::Resume { previd, h } => match shard.resume(c, &previd, h, link).await {
                Ok(Resumed::Yes) => {
                    record(Stage::Resume, shard.now_us() - c.times.accepted_us);
                    return Outcome::Bound;
                }
                Ok(Resumed::No { count }) => c.negotiation.not_resumed(count, &mut out),
                Err(error) => return Outcome::Refuse(error),
            },
            Step::End => {
                let _ = c.transport.write(&out, &mut shard.scratch.borrow_mut());
                return Outcome::Close;
            }
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
async fn fill(shard: &Shard, c: &mut Connecting, notify: &Waits) -> Result<(), ()> {
    loop {
        if std::mem::take(&mut c.drained) && !notify.closed.get() {
            // the last read took all that was there: an edge tells when there is more
            notify.ready.wait().await;
            if c.transport.pending() > 0 && c.transport.flush().is_err() {
                return Err(());
            }
            if shard.stopping.get() {
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
            let bound = c.transport.channel_bindings();
            c.negotiation.encrypted(ChannelBindings {
                exporter: bound.exporter,
                server_end_point: bound.end_point.map(Into::into),
            });
        }
        if read {
            return Ok(());
        }
        if handshake_done {
            continue;
        }
        c.drained = true;
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

    /// Waits for `pause`, or until the shard stops.
    async fn hold_back(&self, c: &mut Connecting, notify: &Waits, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.stopping.get()
            && let Some(left) = until.checked_duration_since(Instant::now())
        {
            let _ = rt::timeout(left, notify.ready.wait()).await;
        }
        // what was reported meanwhile is not reported again
        c.drained = false;
    }

    /// Waits until the user is loaded, then goes on with his keys.
    async fn credentials(&self, c: &mut Connecting, name: &str, out: &mut Vec<u8>) -> Step {
        let begun = Instant::now();
        self.load(name).await;
        // known or not, cached or not: the time of the answer does not tell
        let least = Duration::from_millis(self.config.borrow().sasl.answer_ms_min);
        if let Some(left) = least.checked_sub(begun.elapsed()) {
            rt::sleep(left).await;
        }
        let slice = self.slice.borrow();
        let decoy = self.decoy.borrow().clone();
        match slice.users.peek(name) {
            Some(Slot::Present(user)) => {
                let record = user.record.get();
                let keys = Credentials {
                    sha1: record.sha1.as_ref().map(borrow_keys),
                    sha256: record.sha256.as_ref().map(borrow_keys),
                };
                c.negotiation
                    .credentials(Some(keys), record.disabled, &decoy, out)
            }
            Some(Slot::Missing) => c.negotiation.credentials(None, false, &decoy, out),
            // the tier cannot say
            _ => c
                .negotiation
                .failed(crate::xmpp::sasl::Failure::TEMPORARY_AUTH_FAILURE, out),
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

    /// The session begins. Its user may have left the cache since he authenticated: he is loaded again.
    async fn bind(
        &self,
        c: &mut Connecting,
        resource: Option<&str>,
        link: u64,
    ) -> Result<String, StanzaError> {
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
            resource,
            link,
            lang: c.negotiation.lang.clone(),
            stream_ns: self.stream_ns(c.negotiation.stream_ns()),
            peer: c.peer.to_string().into(),
            tls: c.negotiation.encrypted,
        };
        let sid = bind::bind(&mut slice, arrival)?;
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
        Ok(jid)
    }

    /// The old connection is closed first, and the answer waits until all that was read from it is decided: its count is
    /// exact.
    async fn resume(
        &self,
        c: &mut Connecting,
        previd: &str,
        h: u32,
        link: u64,
    ) -> Result<Resumed, StreamError> {
        let name: Box<str> = c.negotiation.user().unwrap_or_default().into();
        let sid = sm::find(&self.slice.borrow(), &name, previd);
        if let Some(sid) = sid {
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
            settled.take().await;
        }
        let mut slice = self.slice.borrow_mut();
        let Some(sid) = sm::find(&slice, &name, previd) else {
            let count = slice.count_of(previd);
            return Ok(Resumed::No { count });
        };
        let stream_ns = self.stream_ns(c.negotiation.stream_ns());
        sm::resume(&mut slice, sid, link, h)?;
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
