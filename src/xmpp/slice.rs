//! One core's slice of users: their records, sessions and queues, and all that happens to them.
//!
//! Sans-IO: elements of clients, batches of other shards, answers of the tiers and the clock flow in; output per session,
//! batches per shard and requests to the tiers flow out by [`Effects`], which the shard carries out at the end of each turn.
//! Everything here is one core's: no lock, no sharing. Promise: what is taken in is delivered, stored, forwarded or
//! answered by an error, and the order between two full JIDs is kept.

use std::cell::OnceCell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::rc::Rc;

use fnv::FnvHashMap;
use smallvec::SmallVec;

use super::batch::{Batch, Item, Receipt};
use super::error::{StanzaError, StreamError};
use super::feature::{self, Hooks, Refusal, presence};
use super::jid::Jid;
use super::meta::{Kind, Meta};
use super::sasl::{self, PasswordCheck, SaslError, ScramKeys};
use super::session::{Session, SessionId, Sessions};
use super::{NS_CLIENT, iq, message};
use crate::store::cache::Cache;
use crate::store::record::{Record, UserRecord};
use crate::store::ring::Ring;
use crate::store::tier::{Answer, Last, Loaded, Op, Query, ReadError, Request, Ticket, WriteError};
use crate::xml;
use crate::xml::dom::Element;
use crate::xml::view::View;

/// What a slice knows of its surroundings; fixed from start to stop.
pub struct Env {
    pub domain: Box<str>,
    pub shard: u16,
    pub ring: Rc<Ring>,
    pub limits: Limits,
    /// Key of the permutation that makes stable ids (XEP-0359).
    pub id_key: [u64; 2],
    /// See [`Env::stream_features`].
    pub features: OnceCell<Box<str>>,
}

impl Env {
    /// What the table of features adds to `<stream:features/>` after authentication.
    pub fn stream_features(&self) -> &str {
        self.features.get_or_init(|| {
            feature::FEATURES
                .iter()
                .filter_map(|f| f.stream)
                .map(|f| f(self))
                .collect()
        })
    }

    /// The shard that owns the user.
    pub fn owner(&self, name: &str) -> u16 {
        self.ring.owner(name) as u16
    }

    /// Is it a user or the server of this blade?
    pub fn is_local(&self, jid: &Jid<'_>) -> bool {
        jid.domain() == &*self.domain
    }
}

/// Bounds on everything a client can grow (design section 7); from the configuration.
#[derive(Clone, Debug)]
pub struct Limits {
    pub xml: xml::Limits,
    pub resources_per_user_max: usize,
    pub roster_items_max: usize,
    pub roster_item_bytes_max: usize,
    pub blocked_max: usize,
    pub subscription_requests_max: usize,
    pub directed_presence_max: usize,
    pub send_queue_bytes_max: usize,
    pub deferred_stanzas_max: usize,
    pub offline_messages_max: usize,
    pub offline_bytes_max: usize,
    pub private_bytes_max: usize,
    pub vcard_bytes_max: usize,
    /// Bytes that wait for one user to be loaded.
    pub load_queue_bytes_max: usize,
    /// Bytes that wait for one other shard.
    pub mesh_backlog_bytes_max: usize,
    pub unacked_bytes_max: usize,
    pub unacked_stanzas_max: usize,
    pub resume_ms_max: u64,
    pub parked_max: usize,
    pub ping_idle_ms: u64,
    pub ping_timeout_ms: u64,
    pub registration: bool,
    pub iterations: u32,
}

/// The clock, as the shard read it at the start of the turn.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// Monotonic milliseconds.
    pub ms: u64,
    /// Unix time in seconds.
    pub unix: u64,
}

/// A user of this slice, loaded.
pub struct User {
    pub name: Rc<str>,
    pub record: Record,
    /// Grows with each change of `record`.
    pub revision: u64,
    /// The last record that the tiers have, while changes are on their way there.
    pub durable: Option<Record>,
    /// How many are.
    pub edits: usize,
    /// Bound resources, those that wait for resumption included.
    pub sessions: SmallVec<[SessionId; 2]>,
    /// Messages for the next resource that becomes available, oldest first (XEP-0160); the tier holds the same.
    pub offline: VecDeque<(u64, Box<[u8]>)>,
    pub offline_bytes: usize,
    /// The last log-out (XEP-0012).
    pub last: Option<Last>,
}

impl User {
    fn new(name: &str, loaded: Loaded) -> User {
        User {
            name: name.into(),
            record: loaded.record,
            revision: 0,
            durable: None,
            edits: 0,
            sessions: SmallVec::new(),
            offline_bytes: loaded.offline.iter().map(|(_, s)| s.len()).sum(),
            offline: loaded.offline.into(),
            last: loaded.last,
        }
    }
}

/// What the slice's table holds under a name.
pub enum Slot {
    /// Asked for; what came meanwhile waits in order.
    Loading {
        queue: Vec<Queued>,
        bytes: usize,
    },
    /// No such user; remembered like a user, so that the two cost the same.
    Missing,
    Present(Box<User>),
}

/// What waits for a user to be loaded.
pub enum Queued {
    Stanza(Waiting),
    Call(Call),
}

/// Runs when a user is known: present or missing (or, when the tier cannot say, neither).
pub type Call = Box<dyn FnOnce(&mut Slice)>;

/// A stanza that waits for its recipient to be loaded.
pub struct Waiting {
    pub to: Jid<'static>,
    pub from: Box<str>,
    pub stanza: Box<[u8]>,
    pub meta: Meta,
    pub receipt: Option<Receipt>,
}

/// Is the fate of a stanza decided?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    Decided,
    /// Somebody will settle its receipt.
    Open,
}

/// A connection that ends: these bytes, then close.
pub struct Closing {
    pub link: u64,
    pub bytes: Vec<u8>,
}

/// What the shard has to carry out.
#[derive(Default)]
pub struct Effects {
    pub dirty: Vec<SessionId>,
    pub closing: Vec<Closing>,
    pub requests: Vec<Request>,
    /// One batch per shard.
    pub mesh: Vec<Batch>,
    /// Shards for which too much waits: stanzas for them are refused.
    pub closed: Vec<bool>,
    /// For the helper threads; answered by [`Slice::computed`].
    pub jobs: Vec<(Ticket, Job)>,
    /// Users whose loading has ended: logins may wait for them.
    pub loaded: Vec<Rc<str>>,
    /// Sessions that have more to get than a slow reader may have.
    overflown: Vec<SessionId>,
}

/// What goes on when a write is durable, or has failed.
pub type Then = Box<dyn FnOnce(&mut Slice, Result<(), WriteError>)>;

/// What goes on when a document was read; `Err`: the tier cannot say.
pub type ThenRead = Box<dyn FnOnce(&mut Slice, Result<Option<Box<[u8]>>, ReadError>)>;

/// Slow computing that a shard gives away to a helper thread.
pub enum Job {
    /// The keys of a new password.
    Derive { password: String, iterations: u32 },
    /// Is it the password of these keys?
    Check(PasswordCheck),
}

/// What came of a [`Job`].
pub enum Computed {
    /// SHA-1 and SHA-256.
    Keys(Result<(ScramKeys, ScramKeys), SaslError>),
    Checked(bool),
    /// The helpers have too much to do: try again later.
    Busy,
}

impl Job {
    pub fn run(self) -> Computed {
        match self {
            Job::Check(check) => Computed::Checked(check.run()),
            Job::Derive {
                password,
                iterations,
            } => Computed::Keys(sasl::new_keys(&password, iterations)),
        }
    }
}

pub type ThenComputed = Box<dyn FnOnce(&mut Slice, Computed)>;

enum Wait {
    Write(Then),
    Read(ThenRead),
    Compute(ThenComputed),
}

/// Counters of one slice; read by whoever renders metrics.
#[derive(Default, Debug, Clone)]
pub struct Counters {
    pub messages_in: u64,
    pub messages_delivered: u64,
    pub messages_offline: u64,
    pub presences_in: u64,
    pub iqs_in: u64,
    pub bounces: u64,
    pub binds: u64,
    pub resumptions: u64,
    pub overflows: u64,
    pub load_queue_full: u64,
    pub mesh_refused: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Idle,
    Resume,
}

pub struct Slice {
    pub env: Env,
    pub now: Now,
    pub users: Cache<Slot>,
    pub sessions: Sessions,
    pub fx: Effects,
    pub counters: Counters,
    pub hooks: Hooks,
    /// The inbound stanza at work, when its session has stream management.
    pub current: Option<Receipt>,
    pub parked: usize,
    /// Changes of private storage at work.
    pub(super) private: feature::private::Changes,
    waits: FnvHashMap<Ticket, (Rc<str>, Wait)>,
    ticket: Ticket,
    timers: BinaryHeap<Reverse<(u64, u32, u32, Timer)>>,
    /// Output buffers at rest; a session owns one only while it has output.
    buffers: Vec<Vec<u8>>,
    scratch: Vec<u8>,
    stable_ids: u64,
}

const BUFFERS_MAX: usize = 64;
const BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Bytes that a cached user costs beside its record and offline messages.
const USER_BYTES: usize = 256;

impl Slice {
    pub fn new(env: Env, shards: usize, cache_bytes_max: usize) -> Slice {
        let mut fx = Effects::default();
        fx.mesh.resize_with(shards, Batch::default);
        fx.closed.resize(shards, false);
        Slice {
            env,
            now: Now::default(),
            users: Cache::new(cache_bytes_max),
            sessions: Sessions::default(),
            fx,
            counters: Counters::default(),
            hooks: Hooks::collect(),
            current: None,
            parked: 0,
            private: Default::default(),
            waits: FnvHashMap::default(),
            ticket: 0,
            timers: BinaryHeap::new(),
            buffers: Vec::new(),
            scratch: Vec::new(),
            stable_ids: 0,
        }
    }

    // ---- input -------------------------------------------------------------------------------------------------

    /// One element that the client of a live session sent. An error ends the stream: pass it to [`Slice::end`].
    pub fn element(&mut self, sid: SessionId, frame: &[u8]) -> Result<(), StreamError> {
        let ms = self.now.ms;
        let Some(session) = self.sessions.get_mut(sid) else {
            return Ok(());
        };
        session.heard_ms = ms;
        session.pinged = false;
        let ns = session.stream_ns.clone();
        let view = View::parse(frame, &ns, &self.env.limits.xml)?;
        let stanza = view.ns() == NS_CLIENT && matches!(view.name(), "message" | "presence" | "iq");
        if !stanza {
            return match self.hooks.nonza(view.name(), view.ns()) {
                Some(handle) => handle(self, sid, &view),
                None => Err(StreamError::new("unsupported-stanza-type")),
            };
        }
        if let Some(from) = view.attr("from") {
            check_from(session, &from)?;
        }
        let seq = session.accept.receive();
        self.current = session.sm.is_some().then_some(Receipt {
            shard: self.env.shard,
            session: sid,
            seq,
        });
        match view.name() {
            "message" => message::outbound(self, sid, &view),
            "presence" => presence::outbound(self, sid, &view),
            _ => iq::outbound(self, sid, &view),
        }
        self.current = None;
        Ok(())
    }

    /// Whitespace of the client: it lives.
    pub fn keep_alive(&mut self, sid: SessionId) {
        let ms = self.now.ms;
        if let Some(session) = self.sessions.get_mut(sid) {
            session.heard_ms = ms;
            session.pinged = false;
        }
    }

    /// A batch of another shard.
    pub fn batch(&mut self, batch: &Batch) {
        for item in &batch.items {
            match *item {
                Item::Stanza {
                    to,
                    from,
                    stanza,
                    meta,
                    receipt,
                } => {
                    // `to` was normalised by the sender's shard: parsing borrows
                    let Ok(to) = Jid::parse(batch.text(to)) else {
                        continue;
                    };
                    let fate =
                        self.deliver(&to, batch.text(from), batch.get(stanza), meta, receipt);
                    if let (Fate::Decided, Some(receipt)) = (fate, receipt) {
                        self.settle(receipt);
                    }
                }
                Item::Presence {
                    from,
                    stanza,
                    meta,
                    names,
                } => {
                    presence::broadcast_in(
                        self,
                        batch.text(names),
                        batch.text(from),
                        batch.get(stanza),
                        meta,
                    );
                }
                Item::Probe { from, names } => {
                    presence::probe_in(self, batch.text(names), batch.text(from));
                }
                Item::Settled(receipt) => self.settle(receipt),
            }
        }
    }

    /// Answers of the tiers.
    pub fn answers(&mut self, answers: Vec<Answer>) {
        for answer in answers {
            match answer {
                Answer::Loaded { name, user } => {
                    let slot = match user {
                        Some(loaded) => Slot::Present(Box::new(User::new(&name, loaded))),
                        None => Slot::Missing,
                    };
                    self.loaded(&name, slot);
                }
                Answer::LoadFailed { name, .. } => self.load_failed(&name),
                Answer::Written { ticket, result } => {
                    if let Some((name, Wait::Write(then))) = self.waits.remove(&ticket) {
                        then(self, result);
                        self.users.unpin(&name);
                    }
                }
                Answer::Read { ticket, result } => {
                    if let Some((name, Wait::Read(then))) = self.waits.remove(&ticket) {
                        then(self, result);
                        self.users.unpin(&name);
                    }
                }
                // asked for nowhere: a user is loaded together with it
                Answer::ReadLast { .. } => {}
            }
        }
        self.evict();
    }

    /// The outcome of a job in [`Effects::jobs`].
    pub fn computed(&mut self, ticket: Ticket, outcome: Computed) {
        if let Some((_, Wait::Compute(then))) = self.waits.remove(&ticket) {
            then(self, outcome);
        }
    }

    /// The shard calls it about twice a second.
    pub fn tick(&mut self) {
        while let Some(Reverse((due, slot, generation, timer))) = self.timers.peek().copied() {
            if due > self.now.ms {
                break;
            }
            self.timers.pop();
            let sid = SessionId { slot, generation };
            match timer {
                Timer::Idle => self.idle(sid),
                Timer::Resume => feature::sm::expire(self, sid),
            }
        }
    }

    /// Every client gets `error`; parked sessions end.
    pub fn end_all(&mut self, error: &StreamError) {
        for sid in self.sessions.ids() {
            self.end(sid, Some(error.clone()));
        }
    }

    // ---- sessions ----------------------------------------------------------------------------------------------

    /// A session begins: full JID is free, the user is present.
    pub fn begin(
        &mut self,
        name: &str,
        make: impl FnOnce(SessionId) -> Session,
    ) -> Option<SessionId> {
        let Some(Slot::Present(user)) = self.users.get_mut(name) else {
            return None;
        };
        let sid = self.sessions.insert(make);
        user.sessions.push(sid);
        self.users.pin(name);
        self.counters.binds += 1;
        self.timer(self.env.limits.ping_idle_ms, sid, Timer::Idle);
        Some(sid)
    }

    /// Ends a session for good: its contacts learn it, what it held is dealt with; its client gets `error` and the end
    /// of the stream.
    pub fn end(&mut self, sid: SessionId, error: Option<StreamError>) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        if let Some(link) = session.link.take() {
            let mut bytes = std::mem::take(&mut session.out);
            match error {
                Some(error) => error.write(&mut bytes),
                None => bytes.extend_from_slice(b"</stream:stream>"),
            }
            self.fx.closing.push(Closing { link, bytes });
        } else if session.sm.is_some() {
            self.parked = self.parked.saturating_sub(1);
        }
        // nobody finds it any more, but its own farewell still names it
        let mut session = self.sessions.remove(sid).expect("was there a moment ago");
        let name = session.user.clone();
        if let Some(user) = self.user_mut(&name) {
            user.sessions.retain(|s| *s != sid);
        }
        for hook in self.hooks.ended.clone().iter() {
            hook(self, &mut session);
        }
        if let Some(mut sm) = session.sm.take() {
            feature::sm::redirect(self, sm.unacknowledged());
        }
        self.users.unpin(&name);
    }

    /// The connection is gone without a farewell: the session waits for its client, or ends.
    pub fn link_lost(&mut self, sid: SessionId) {
        let room = self.parked < self.env.limits.parked_max;
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        session.link = None;
        session.unsent = 0;
        let out = std::mem::take(&mut session.out);
        match &session.sm {
            Some(sm) if sm.resume_ms > 0 && room => {
                let wait = sm.resume_ms;
                session.accept.forget_asked();
                self.parked += 1;
                self.timer(wait, sid, Timer::Resume);
            }
            _ => {
                // `end` counts a session without link as parked
                if session.sm.is_some() {
                    self.parked += 1;
                }
                self.end(sid, None);
            }
        }
        self.reuse(out);
    }

    fn idle(&mut self, sid: SessionId) {
        let (idle, timeout) = (
            self.env.limits.ping_idle_ms,
            self.env.limits.ping_timeout_ms,
        );
        let ms = self.now.ms;
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        let silent = ms.saturating_sub(session.heard_ms);
        if session.link.is_none() || silent < idle {
            let wait = if silent < idle { idle - silent } else { idle };
            return self.timer(wait, sid, Timer::Idle);
        }
        if session.pinged {
            let Some(link) = session.link else { return };
            let mut bytes = Vec::new();
            StreamError::text("connection-timeout", "no answer to a ping").write(&mut bytes);
            self.fx.closing.push(Closing { link, bytes });
            return self.link_lost(sid);
        }
        session.pinged = true;
        feature::ping::ask(self, sid);
        self.timer(timeout, sid, Timer::Idle);
    }

    fn timer(&mut self, wait_ms: u64, sid: SessionId, timer: Timer) {
        self.timers.push(Reverse((
            self.now.ms + wait_ms,
            sid.slot,
            sid.generation,
            timer,
        )));
    }

    // ---- output ------------------------------------------------------------------------------------------------

    /// Gives a stanza (in parts, self-contained, to be read in a stream of `jabber:client`) to a session.
    pub fn send(&mut self, sid: SessionId, parts: &[&[u8]], meta: Meta) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        if session.csi.inactive
            && feature::csi::hold(session, parts, meta, self.env.limits.deferred_stanzas_max)
        {
            return;
        }
        if session.out.capacity() == 0
            && let Some(buffer) = self.buffers.pop()
        {
            session.out = buffer;
        }
        session.push(parts, meta);
        self.touched(sid);
    }

    pub fn send_element(&mut self, sid: SessionId, element: &Element, meta: Meta) {
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        element.write(&mut bytes, NS_CLIENT);
        self.send(sid, &[&bytes], meta);
        self.scratch = bytes;
    }

    /// Bytes that are no stanza: not counted, not kept, not deferred.
    pub fn send_raw(&mut self, sid: SessionId, bytes: &[u8]) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        if session.link.is_some() {
            session.out.extend_from_slice(bytes);
            self.touched(sid);
        }
    }

    /// The session has new output: written at the end of the turn, unless its client reads too slowly.
    pub(super) fn touched(&mut self, sid: SessionId) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        if !session.dirty
            && session.unsent == 0
            && session.sm.as_ref().is_none_or(|sm| sm.waiting() <= 1)
        {
            session.burst = (0, 0);
        }
        if overflow(session, &self.env.limits).is_some() {
            self.fx.overflown.push(sid);
        }
        if !session.dirty && session.link.is_some() {
            session.dirty = true;
            self.fx.dirty.push(sid);
        }
    }

    /// The server itself sent so much (bytes, stanzas) at once.
    pub(super) fn allow(&mut self, sid: SessionId, (bytes, stanzas): (usize, usize)) {
        if let Some(session) = self.sessions.get_mut(sid) {
            session.burst.0 += bytes;
            session.burst.1 += stanzas;
        }
    }

    /// What the session has to say now; give the buffer back by [`Slice::reuse`].
    pub fn take_out(&mut self, sid: SessionId) -> Option<(u64, Vec<u8>)> {
        let session = self.sessions.get_mut(sid)?;
        session.dirty = false;
        let link = session.link.filter(|_| !session.out.is_empty())?;
        if let Some(sm) = &mut session.sm {
            sm.ask(&mut session.out);
        }
        Some((link, std::mem::take(&mut session.out)))
    }

    /// An empty buffer; give it back by [`Slice::reuse`].
    pub fn buffer(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_default()
    }

    pub fn reuse(&mut self, mut buffer: Vec<u8>) {
        if self.buffers.len() < BUFFERS_MAX && buffer.capacity() <= BUFFER_BYTES_MAX {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    /// Slow readers: parked if they can resume, else ended.
    pub fn cut_slow_readers(&mut self) {
        while let Some(sid) = self.fx.overflown.pop() {
            let Some(session) = self.sessions.get_mut(sid) else {
                continue;
            };
            let Some(overflow) = overflow(session, &self.env.limits) else {
                continue;
            };
            let error = StreamError::text(
                "resource-constraint",
                "the client does not read what it is sent",
            );
            self.counters.overflows += 1;
            if overflow == Overflow::Kept || session.link.is_none() {
                // nothing more can be kept for it
                self.end(sid, Some(error));
            } else if let Some(link) = session.link {
                let mut bytes = Vec::new();
                error.write(&mut bytes);
                self.fx.closing.push(Closing { link, bytes });
                self.link_lost(sid);
            }
        }
    }

    // ---- routing -----------------------------------------------------------------------------------------------

    /// Sends a stanza (self-contained bytes, `from` and `to` as the recipient will see them) to a local user, wherever
    /// he lives. `receipt` is the inbound stanza that hangs on it: usually `slice.current`.
    pub fn route(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) {
        let Some(name) = to.local() else { return };
        let owner = self.env.owner(name);
        if owner == self.env.shard {
            if self.deliver(to, from, stanza, meta, receipt) == Fate::Open
                && let Some(receipt) = receipt
            {
                self.defer(receipt);
            }
            return;
        }
        if self.fx.closed[owner as usize] && meta.kind.may_bounce() {
            self.counters.mesh_refused += 1;
            return self.bounce(to, from, stanza, meta, &StanzaError::RESOURCE_CONSTRAINT);
        }
        let batch = &mut self.fx.mesh[owner as usize];
        let item = Item::Stanza {
            to: batch.put(to.as_str().as_bytes()),
            from: batch.put(from.as_bytes()),
            stanza: batch.put(stanza),
            meta,
            receipt,
        };
        batch.items.push(item);
        if let Some(receipt) = receipt {
            self.defer(receipt);
        }
    }

    pub fn route_element(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        element: &Element,
        meta: Meta,
        receipt: Option<Receipt>,
    ) {
        let mut bytes = Vec::with_capacity(256);
        element.write(&mut bytes, NS_CLIENT);
        self.route(to, from, &bytes, meta, receipt);
    }

    /// Delivers to a user of this slice.
    fn deliver(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) -> Fate {
        let name = to.local().expect("only users are routed to");
        let full = match self.users.get_mut(name) {
            Some(Slot::Present(_)) => {
                return if meta.kind.is_message() {
                    message::deliver(self, to, from, stanza, meta, receipt)
                } else if meta.kind.is_presence() {
                    presence::deliver(self, to, from, stanza, meta, receipt)
                } else {
                    iq::deliver(self, to, from, stanza, meta)
                };
            }
            Some(Slot::Missing) => {
                self.refuse_missing(to, from, stanza, meta);
                return Fate::Decided;
            }
            Some(Slot::Loading { bytes, .. }) => {
                *bytes + stanza.len() > self.env.limits.load_queue_bytes_max
            }
            None => false,
        };
        // who is not loaded has no sessions: these have nobody to go to
        if matches!(
            meta.kind,
            Kind::Available
                | Kind::Unavailable
                | Kind::PresenceError
                | Kind::IqResult
                | Kind::IqError
        ) {
            return Fate::Decided;
        }
        if full {
            self.counters.load_queue_full += 1;
            self.bounce(to, from, stanza, meta, &StanzaError::RESOURCE_CONSTRAINT);
            return Fate::Decided;
        }
        self.want(name);
        if let Some(Slot::Loading { queue, bytes }) = self.users.get_mut(name) {
            *bytes += stanza.len();
            queue.push(Queued::Stanza(Waiting {
                to: to.clone().into_owned(),
                from: from.into(),
                stanza: stanza.into(),
                meta,
                receipt,
            }));
        }
        Fate::Open
    }

    /// RFC 6121 8.5.1: the user does not exist.
    fn refuse_missing(&mut self, to: &Jid<'_>, from: &str, stanza: &[u8], meta: Meta) {
        if meta.kind.is_message() || meta.kind.is_iq() {
            let forbidden = to
                .local()
                .zip(Jid::parse(from).ok())
                .is_some_and(|(name, from)| {
                    // what a stranger hears of an account that exists
                    feature::last::forbids(self, name, &from, stanza, meta)
                });
            let error = if forbidden {
                StanzaError::FORBIDDEN
            } else {
                StanzaError::SERVICE_UNAVAILABLE
            };
            self.bounce(to, from, stanza, meta, &error);
        } else if matches!(meta.kind, Kind::Subscribe | Kind::Probe) {
            presence::answer_unsubscribed(self, to, from);
        }
    }

    /// May the stanza come in to its recipient, a user of this slice? If not, its sender hears what he is to hear.
    pub fn admits(&mut self, to: &Jid<'_>, from: &Jid<'_>, stanza: &[u8], meta: Meta) -> bool {
        let name = to.local().expect("only users are routed to");
        match self.hooks.admission(self, name, from, meta) {
            Ok(()) => return true,
            Err(Refusal::Silent) => {}
            Err(Refusal::Error(error)) => self.bounce(to, from.as_str(), stanza, meta, &error),
        }
        false
    }

    /// Sends a stanza back to its sender as an error, if its kind may be answered by one.
    pub fn bounce(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        error: &StanzaError,
    ) {
        if !meta.kind.may_bounce() || meta.has(Meta::COPY) {
            return;
        }
        let (Ok(back), Some(original)) = (Jid::parse(from), super::parse_stanza(stanza)) else {
            return;
        };
        self.counters.bounces += 1;
        let mut answer = Element::new(meta.kind.stanza(), NS_CLIENT)
            .attr("from", to.as_str())
            .attr("to", from)
            .attr("type", "error");
        if let Some(id) = original.get("id") {
            answer = answer.attr("id", id);
        }
        for child in original.elements() {
            answer = answer.child(child.clone());
        }
        let kind = match meta.kind {
            k if k.is_message() => Kind::MessageError,
            k if k.is_presence() => Kind::PresenceError,
            _ => Kind::IqError,
        };
        let answer = answer.child(error.element());
        // XEP-0280 6.1: those who got a copy of the message get one of the error
        let flags = Meta::SERVER | (meta.flags & (Meta::CARBON | Meta::NO_COPY));
        self.route_element(
            &back,
            to.as_str(),
            &answer,
            Meta::new(kind).with(flags),
            None,
        );
    }

    pub fn defer(&mut self, receipt: Receipt) {
        if let Some(session) = self.sessions.get_mut(receipt.session) {
            session.accept.defer(receipt.seq);
        }
    }

    /// The fate of an inbound stanza is decided.
    pub fn settle(&mut self, receipt: Receipt) {
        if receipt.shard != self.env.shard {
            self.fx.mesh[receipt.shard as usize]
                .items
                .push(Item::Settled(receipt));
            return;
        }
        if let Some(session) = self.sessions.get_mut(receipt.session) {
            session.accept.settle(receipt.seq);
            feature::sm::answer_asked(self, receipt.session);
        }
    }

    // ---- users -------------------------------------------------------------------------------------------------

    pub fn user(&self, name: &str) -> Option<&User> {
        match self.users.get(name) {
            Some(Slot::Present(user)) => Some(user),
            _ => None,
        }
    }

    pub fn user_mut(&mut self, name: &str) -> Option<&mut User> {
        match self.users.get_mut(name) {
            Some(Slot::Present(user)) => Some(user),
            _ => None,
        }
    }

    /// Sessions of a user, parked ones included.
    pub fn sessions_of(&self, name: &str) -> SmallVec<[SessionId; 4]> {
        self.user(name)
            .map(|u| u.sessions.iter().copied().collect())
            .unwrap_or_default()
    }

    /// The session with that resource.
    pub fn find_session(&self, name: &str, resource: &str) -> Option<SessionId> {
        self.user(name)?.sessions.iter().copied().find(|sid| {
            self.sessions
                .get(*sid)
                .is_some_and(|s| s.resource() == resource)
        })
    }

    /// Makes sure that the user is here or on his way; [`Effects::loaded`] tells when. `true`: known now.
    pub fn want(&mut self, name: &str) -> bool {
        match self.users.get(name) {
            Some(Slot::Loading { .. }) => false,
            Some(_) => true,
            None => {
                self.users.insert(
                    name,
                    Slot::Loading {
                        queue: Vec::new(),
                        bytes: 0,
                    },
                    USER_BYTES,
                );
                self.users.pin(name);
                self.fx.requests.push(Request::Load { name: name.into() });
                false
            }
        }
    }

    fn loaded(&mut self, name: &str, slot: Slot) {
        let bytes = match &slot {
            Slot::Present(user) => user_bytes(user),
            _ => USER_BYTES,
        };
        let Some(place) = self.users.get_mut(name) else {
            return;
        };
        if !matches!(place, Slot::Loading { .. }) {
            return;
        }
        let Slot::Loading { queue, .. } = std::mem::replace(place, slot) else {
            return;
        };
        self.users.set_bytes(name, bytes);
        self.run_queue(queue);
        self.fx.loaded.push(name.into());
        self.users.unpin(name);
    }

    /// The tier cannot say: what waits is refused for now, and the next one asks again.
    fn load_failed(&mut self, name: &str) {
        self.users.unpin(name);
        let Some(Slot::Loading { queue, .. }) = self.users.remove(name) else {
            return;
        };
        for waiting in queue {
            match waiting {
                Queued::Call(call) => call(self),
                Queued::Stanza(w) => {
                    self.bounce(
                        &w.to,
                        &w.from,
                        &w.stanza,
                        w.meta,
                        &StanzaError::RESOURCE_CONSTRAINT,
                    );
                    if let Some(receipt) = w.receipt {
                        self.settle(receipt);
                    }
                }
            }
        }
        self.fx.loaded.push(name.into());
    }

    /// Runs `call` when the user is known, in order with what else waits for him.
    pub fn when_known(&mut self, name: &str, call: Call) {
        if self.want(name) {
            call(self);
        } else if let Some(Slot::Loading { queue, .. }) = self.users.get_mut(name) {
            queue.push(Queued::Call(call));
        }
    }

    fn run_queue(&mut self, queue: Vec<Queued>) {
        for waiting in queue {
            match waiting {
                Queued::Call(call) => call(self),
                Queued::Stanza(w) => {
                    let fate = self.deliver(&w.to, &w.from, &w.stanza, w.meta, w.receipt);
                    if let (Fate::Decided, Some(receipt)) = (fate, w.receipt) {
                        self.settle(receipt);
                    }
                }
            }
        }
    }

    /// Changes a user's record, here at once and in the tiers; `then` runs when it is durable, or has failed and the
    /// record is as it was.
    pub fn edit(&mut self, name: &str, change: impl FnOnce(&mut UserRecord), then: Then) {
        let Some(user) = self.user_mut(name) else {
            return then(self, Err(WriteError::Missing));
        };
        let mut record = user.record.to_owned();
        change(&mut record);
        let record = Record::new(&record);
        let before = std::mem::replace(&mut user.record, record.clone());
        user.durable.get_or_insert(before);
        user.edits += 1;
        user.revision += 1;
        let revision = user.revision;
        let bytes = user_bytes(user);
        let op = Op::PutUser {
            name: name.into(),
            record: record.clone(),
        };
        self.users.set_bytes(name, bytes);
        let who: Rc<str> = name.into();
        self.write(
            name,
            op,
            Box::new(move |slice, result| {
                if let Some(user) = slice.user_mut(&who) {
                    user.edits = user.edits.saturating_sub(1);
                    if result.is_ok() {
                        user.durable = Some(record);
                    } else if user.revision == revision
                        && let Some(durable) = &user.durable
                    {
                        user.record = durable.clone();
                    }
                    if user.edits == 0 {
                        user.durable = None;
                    }
                }
                then(slice, result);
            }),
        );
    }

    /// Writes something of a user; the user stays in the cache until it is durable.
    pub fn write(&mut self, name: &str, op: Op, then: Then) {
        let ticket = self.wait(name, Wait::Write(then));
        self.users.pin(name);
        self.fx.requests.push(Request::Write { ticket, op });
    }

    pub fn read(&mut self, name: &str, query: Query, then: ThenRead) {
        let ticket = self.wait(name, Wait::Read(then));
        self.users.pin(name);
        self.fx.requests.push(Request::Read { ticket, query });
    }

    pub fn compute(&mut self, job: Job, then: ThenComputed) {
        let ticket = self.wait("", Wait::Compute(then));
        self.fx.jobs.push((ticket, job));
    }

    fn wait(&mut self, name: &str, wait: Wait) -> Ticket {
        self.ticket += 1;
        self.waits.insert(self.ticket, (name.into(), wait));
        self.ticket
    }

    /// A new account is durable, or a removed one is gone: the table follows.
    pub fn set_user(&mut self, name: &str, record: Option<Record>) {
        let slot = match record {
            Some(record) => Slot::Present(Box::new(User::new(
                name,
                Loaded {
                    record,
                    offline: Vec::new(),
                    last: None,
                },
            ))),
            None => Slot::Missing,
        };
        match self.users.get_mut(name) {
            Some(place) => *place = slot,
            None => {
                self.users.insert(name, slot, USER_BYTES);
            }
        }
    }

    pub fn resize(&mut self, name: &str) {
        if let Some(bytes) = self.user(name).map(user_bytes) {
            self.users.set_bytes(name, bytes);
        }
    }

    fn evict(&mut self) {
        self.users.evict(|_, _| {});
    }

    /// A number for a new stable id or queue position: grows, also over restarts.
    pub fn next_id(&mut self) -> u64 {
        // 2^22 ids a second and shard; for 256 shards
        let floor = (self.now.unix << 30) | ((self.env.shard as u64) << 22);
        self.stable_ids = (self.stable_ids + 1).max(floor);
        self.stable_ids
    }

    /// A scratch buffer of the slice's; give it back by [`Slice::give_scratch`].
    pub fn take_scratch(&mut self) -> Vec<u8> {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch
    }

    pub fn give_scratch(&mut self, scratch: Vec<u8>) {
        if scratch.capacity() <= BUFFER_BYTES_MAX {
            self.scratch = scratch;
        }
    }
}

fn user_bytes(user: &User) -> usize {
    USER_BYTES + user.record.bytes().len() + user.offline_bytes + 32 * user.offline.len()
}

/// What there is too much of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Overflow {
    /// Stanzas that the client has not acknowledged.
    Kept,
    /// Bytes that the kernel does not take.
    Unsent,
}

fn overflow(session: &Session, limits: &Limits) -> Option<Overflow> {
    let (bytes, stanzas) = session.burst;
    let kept = session.sm.as_ref().is_some_and(|sm| {
        sm.over(
            limits.unacked_bytes_max + bytes,
            limits.unacked_stanzas_max + stanzas,
        )
    });
    // what was not offered to the kernel yet says nothing about the client
    let unsent = session.unsent > 0
        && session.unsent + session.out.len() > limits.send_queue_bytes_max + bytes;
    match (kept, unsent) {
        (true, _) => Some(Overflow::Kept),
        (false, true) => Some(Overflow::Unsent),
        (false, false) => None,
    }
}

/// RFC 6120 8.1.2.1: a client may name itself, by full or bare JID, and nobody else.
fn check_from(session: &Session, from: &str) -> Result<(), StreamError> {
    let error = StreamError::new("invalid-from");
    if from == &*session.jid || from == session.bare() {
        return Ok(());
    }
    match Jid::parse(from) {
        Ok(jid) if jid.as_str() == &*session.jid || jid.as_str() == session.bare() => Ok(()),
        _ => Err(error),
    }
}
