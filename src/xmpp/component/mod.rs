//! Components (XEP-0114): programs that serve a name of their own, such as gateways and bots, on this machine or another one.
//!
//! In: proved connections ([`Slice::component_join`]), their elements, stanzas for addresses of their names ([`route`]). Out: bytes
//! for each connection ([`Slice::component_out`]), stanzas of components to users, batches to other shards.
//!
//! A connection lives on the shard that accepted it. One shard, the *registrar* of a name (its owner by the ring), decides who
//! serves it and tells all; so every shard knows in the same order which connections there are, and hands a stanza to the
//! shard of the one that gets it.
//!
//! Promises: a component speaks only for addresses of its name. What comes for it is handed to the kernel in the order in which it
//! came, or its sender gets an error: XEP-0114 has no acknowledgement, so what the kernel took counts as delivered, and what it did
//! not take when the connection ends comes back. A user's message is in his archive, durably, before the component gets it, and
//! no acknowledgement (XEP-0198) covers it before it was handed over or refused. Nothing here grows beyond
//! `component.queue_bytes_max` for each connection (four times that within one turn).
//!
//! **After a crash** nobody knows whether the kernel had taken a message that was open, and its sender, whose session is gone, would
//! not hear an error; but the count that he gets back covers it, because it is in his archive. So it waits for its component
//! ([`Slice::component_recover`]), in front of all that comes later for the same name, and is handed over then (perhaps a second
//! time), or comes back as an error when `component.timeout_seconds` have passed.

mod handshake;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use fnv::FnvHashMap;
use smallvec::SmallVec;

pub use handshake::{Handshake, NOT_AUTHORIZED, Step, proof};

use super::batch::{Item, Receipt};
use super::error::{StanzaError, StreamError};
use super::feature::hints;
use super::jid::Jid;
use super::ledger::Act;
use super::message::error_answer;
use super::meta::{Kind, Meta};
use super::slice::{Closing, Fate, Slice, Waiting};
use super::{NS_CLIENT, iq, message};
use crate::config::ComponentPolicy as Policy;
use crate::store::ring;
use crate::xml::StreamNs;
use crate::xml::dom::{Element, Node};
use crate::xml::view::View;

/// Content namespace of a component's stream.
pub const NS_ACCEPT: &str = "jabber:component:accept";

/// What the server itself may be asked by a component (queries of its domain).
const SERVER_QUERIES: &[&str] = &[
    super::feature::disco::NS_INFO,
    super::feature::disco::NS_ITEMS,
    "urn:xmpp:ping",
    "urn:xmpp:time",
    "jabber:iq:version",
    "jabber:iq:last",
];

/// So many times `component.queue_bytes_max` may come in one turn for a component that keeps up.
const BURST: usize = 4;

const NOT_CONNECTED: StanzaError = StanzaError {
    kind: "wait",
    ..StanzaError::SERVICE_UNAVAILABLE.text("the component is not connected")
};
const LOST: StanzaError = StanzaError::REMOTE_SERVER_TIMEOUT
    .text("the connection of the component ended before it took this");
const LOST_IN_CRASH: StanzaError = StanzaError::REMOTE_SERVER_TIMEOUT
    .text("the server was restarted, and the component did not come back");
const SLOW: StanzaError = StanzaError::RESOURCE_CONSTRAINT.text("the component does not keep up");

/// The names of components, with their secrets and policies; from the configuration, the same for all shards.
#[derive(Default)]
pub struct Hosts(BTreeMap<Box<str>, (Box<str>, Policy)>);

impl Hosts {
    /// Of normalised names, each with secret and policy.
    pub fn new(hosts: impl IntoIterator<Item = (String, String, Policy)>) -> Hosts {
        let entry = |(name, secret, policy): (String, String, Policy)| {
            (name.into_boxed_str(), (secret.into_boxed_str(), policy))
        };
        Hosts(hosts.into_iter().map(entry).collect())
    }

    pub fn serves(&self, host: &str) -> bool {
        !self.0.is_empty() && self.0.contains_key(host)
    }

    fn secret(&self, host: &str) -> Option<&str> {
        self.0.get(host).map(|(secret, _)| &**secret)
    }

    fn policy(&self, host: &str) -> Option<Policy> {
        self.0.get(host).map(|(_, policy)| *policy)
    }
}

/// What the domain of an address is to this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Its own: users, and the server itself.
    Own,
    /// The chat rooms of this blade.
    Rooms,
    /// A component's, whether it is connected or not.
    Component,
    /// Nobody's here.
    Unknown,
}

/// Bounds, from the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Connections of one name, under [`Policy::Share`].
    pub shared_max: usize,
    /// Bytes that the kernel has not taken, of one connection.
    pub queue_bytes_max: usize,
    pub keepalive_ms: u64,
    pub timeout_ms: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            shared_max: 16,
            queue_bytes_max: 1 << 22,
            keepalive_ms: 60_000,
            timeout_ms: 60_000,
        }
    }
}

/// Names a connection, on all shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId {
    pub shard: u16,
    number: u32,
}

/// What is said about a connection, between its shard, the registrar of its name, and all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Its shard to the registrar: it has proved its secret.
    Join,
    /// Its shard to the registrar: it is gone.
    Leave,
    /// The registrar to its shard: another one serves the name.
    Refused,
    /// The registrar to all: it serves the name.
    Up,
    /// The registrar to all: it does not any more.
    Down,
}

/// A stanza in [`Conn::out`].
struct Mark {
    /// Its first byte and the one behind its last, counted from the first that the connection was ever given.
    start: u64,
    end: u64,
    meta: Meta,
    receipt: Option<Receipt>,
}

/// A connection that has proved its secret.
pub struct Conn {
    pub link: u64,
    pub host: Box<str>,
    /// Remote address, for operators.
    pub peer: Box<str>,
    /// Connected since, unix seconds.
    pub since: u64,
    /// Does it serve its name? Not before the registrar has said so.
    pub up: bool,
    ns: Rc<StreamNs>,
    /// Bytes from number `base` on: what the kernel has not taken, and the begin of a stanza that it has taken in part.
    out: Vec<u8>,
    base: u64,
    /// Bytes that the kernel has taken since the connection began.
    taken: u64,
    marks: VecDeque<Mark>,
    /// The kernel has not taken all that it was offered.
    stuck: bool,
    dirty: bool,
    /// When something was written last, ms of the monotonic clock.
    said_ms: u64,
    /// Bytes that its machine had acknowledged when that was looked at last, and when they became more.
    acknowledged: (u64, u64),
    pub stanzas_in: u64,
    pub stanzas_out: u64,
}

impl Conn {
    /// Bytes that the kernel has not taken.
    pub fn waiting(&self) -> usize {
        self.bytes(self.taken, self.end()).len()
    }

    /// The number of the byte that comes next.
    fn end(&self) -> u64 {
        self.base + self.out.len() as u64
    }

    fn bytes(&self, from: u64, to: u64) -> &[u8] {
        &self.out[(from - self.base) as usize..(to - self.base) as usize]
    }

    /// The rest of a stanza that the kernel has taken in part.
    fn begun(&self) -> &[u8] {
        match self.marks.front() {
            Some(first) if first.start < self.taken => self.bytes(self.taken, first.end),
            _ => &[],
        }
    }

    /// `mark`: of a stanza; none: the server's own words.
    fn push(&mut self, bytes: &[u8], mark: Option<(Meta, Option<Receipt>)>) {
        let start = self.end();
        self.out.extend_from_slice(bytes);
        if let Some((meta, receipt)) = mark {
            self.stanzas_out += 1;
            self.marks.push_back(Mark {
                start,
                end: self.end(),
                meta,
                receipt,
            });
        }
    }
}

/// Counters of one slice.
#[derive(Default, Debug, Clone)]
pub struct Counters {
    pub joins: u64,
    pub refused: u64,
    pub ends: u64,
    pub stanzas_in: u64,
    pub stanzas_out: u64,
    /// Answered by an error because no connection serves the name.
    pub unreachable: u64,
    /// Answered by an error because the connection ended first.
    pub lost: u64,
    /// Answered by an error because the component did not keep up.
    pub overflows: u64,
}

/// A slice's part in it.
#[derive(Default)]
pub struct Components {
    pub hosts: Arc<Hosts>,
    pub settings: Settings,
    /// Who serves a name, on whatever shard, as its registrar has told.
    serving: BTreeMap<Box<str>, SmallVec<[ConnId; 2]>>,
    conns: FnvHashMap<u32, Conn>,
    last: u32,
    /// Those that have something to write.
    pub dirty: Vec<ConnId>,
    pub ending: Vec<Closing>,
    /// Those that serve their names from now on: they may be read.
    pub opened: Vec<u64>,
    /// What the last start left, by name.
    recovered: BTreeMap<Box<str>, Recovered>,
    pub counters: Counters,
}

/// Messages for one name that wait for it after a crash.
struct Recovered {
    waiting: Vec<Waiting>,
    /// Of all of them.
    bytes: usize,
    /// When this was looked at first, ms of the monotonic clock.
    since_ms: Option<u64>,
    /// When this was looked at last, somebody served the name. Once more, and all shards have heard that, too.
    served: bool,
}

impl Components {
    pub fn conn(&self, id: ConnId) -> Option<&Conn> {
        self.conns.get(&id.number)
    }

    /// Of this shard.
    pub fn conns(&self) -> impl Iterator<Item = &Conn> {
        self.conns.values()
    }

    /// Bytes that wait for components of this shard.
    pub fn waiting(&self) -> usize {
        self.conns.values().map(Conn::waiting).sum()
    }

    /// The names that are served, in order.
    pub fn served(&self) -> impl Iterator<Item = &str> {
        let served = self.serving.iter().filter(|(_, conns)| !conns.is_empty());
        served.map(|(host, _)| &**host)
    }

    /// Does anybody serve the name at this moment?
    pub fn is_served(&self, host: &str) -> bool {
        self.serving.get(host).is_some_and(|all| !all.is_empty())
    }

    /// Who of these gets what a sender (bare JID) has for the name: the highest of their hashes with his, so that a connection
    /// that comes or goes moves no other one's senders.
    fn pick(&self, host: &str, from: &str, of: impl Fn(&ConnId) -> bool) -> Option<ConnId> {
        let mut all = self.serving.get(host)?.iter().copied().filter(of);
        let first = all.next()?;
        let Some(second) = all.next() else {
            return Some(first);
        };
        let weight = |id: &ConnId| ring::hash(&format!("{from} {} {}", id.shard, id.number));
        [first, second].into_iter().chain(all).max_by_key(weight)
    }
}

impl Slice {
    /// What the domain of an address is to this server. The one place that decides it.
    pub fn host(&self, domain: &str) -> Host {
        if domain == &*self.env.domain {
            Host::Own
        } else if self.env.rooms.as_deref() == Some(domain) {
            Host::Rooms
        } else if self.components.hosts.serves(domain) {
            Host::Component
        } else {
            Host::Unknown
        }
    }

    /// Is there somebody to whom stanzas for this address can be routed?
    pub fn is_reached(&self, to: &Jid<'_>) -> bool {
        self.host(to.domain()) != Host::Unknown
    }

    /// Is it a component's that is not connected just now?
    pub fn is_unserved(&self, to: &Jid<'_>) -> bool {
        let serving = self.components.serving.get(to.domain());
        self.host(to.domain()) == Host::Component && serving.is_none_or(|conns| conns.is_empty())
    }

    // ---- connections -------------------------------------------------------------------------------------------

    /// Names, secrets and bounds were loaded. Connections of names that are gone end.
    pub fn component_configure(&mut self, hosts: Arc<Hosts>, settings: Settings) {
        self.components.hosts = hosts;
        self.components.settings = settings;
        let hosts = &self.components.hosts;
        let gone: Vec<ConnId> = self
            .components
            .conns
            .iter()
            .filter(|(_, conn)| !hosts.serves(&conn.host))
            .map(|(number, _)| self.component_id(*number))
            .collect();
        for id in gone {
            self.component_end(id, Some(StreamError::new("host-gone")));
        }
    }

    fn component_id(&self, number: u32) -> ConnId {
        ConnId {
            shard: self.env.shard,
            number,
        }
    }

    /// A connection has proved the secret of the name. It serves it when it is in [`Components::opened`].
    pub fn component_join(
        &mut self,
        link: u64,
        host: &str,
        ns: Rc<StreamNs>,
        peer: &str,
    ) -> ConnId {
        self.components.last += 1;
        let number = self.components.last;
        let conn = Conn {
            link,
            host: host.into(),
            peer: peer.into(),
            since: self.now.unix,
            up: false,
            ns,
            out: Vec::new(),
            base: 0,
            taken: 0,
            marks: VecDeque::new(),
            stuck: false,
            dirty: false,
            said_ms: self.now.ms,
            acknowledged: (0, self.now.ms),
            stanzas_in: 0,
            stanzas_out: 0,
        };
        self.components.conns.insert(number, conn);
        let id = self.component_id(number);
        self.component_tell(self.env.owner(host), host, id, Word::Join);
        id
    }

    /// The connection is gone without a farewell.
    pub fn component_lost(&mut self, id: ConnId) {
        self.component_over(id, None, "connection lost");
    }

    /// Ends a connection: its peer gets the error, and the end of the stream.
    pub fn component_end(&mut self, id: ConnId, error: Option<StreamError>) {
        let reason = error.as_ref().map_or("closed by the component", |error| {
            error.text.unwrap_or(error.condition)
        });
        let mut bytes = Vec::new();
        match &error {
            Some(error) => error.write(&mut bytes),
            None => bytes.extend_from_slice(b"</stream:stream>"),
        }
        self.component_over(id, Some(bytes), reason);
    }

    /// The connections of this shard that serve a name end; how many.
    pub fn component_kick(&mut self, host: &str, error: &StreamError) -> usize {
        let all = self.components.conns.iter();
        let of_host = all.filter(|(_, conn)| conn.up && &*conn.host == host);
        let ended: Vec<u32> = of_host.map(|(number, _)| *number).collect();
        for number in &ended {
            self.component_end(self.component_id(*number), Some(error.clone()));
        }
        ended.len()
    }

    /// All of them get `error`.
    pub fn component_end_all(&mut self, error: &StreamError) {
        let all: Vec<u32> = self.components.conns.keys().copied().collect();
        for number in all {
            self.component_end(self.component_id(number), Some(error.clone()));
        }
    }

    fn component_over(&mut self, id: ConnId, farewell: Option<Vec<u8>>, reason: &str) {
        let Some(conn) = self.components.conns.remove(&id.number) else {
            return;
        };
        tracing::info!(
            address = %conn.peer,
            component = %conn.host,
            reason,
            stanzas_in = conn.stanzas_in,
            stanzas_out = conn.stanzas_out,
            "component disconnected"
        );
        self.components.counters.ends += 1;
        // nobody here picks it any more, whatever the registrar has told so far
        self.component_forget(&conn.host, id);
        self.component_tell(self.env.owner(&conn.host), &conn.host, id, Word::Leave);
        if let Some(bytes) = farewell {
            // the peer may have a part of a stanza already
            let bytes = [conn.begun(), &bytes].concat();
            let link = conn.link;
            self.components.ending.push(Closing::new(link, bytes));
        }
        self.component_return(conn);
    }

    /// What the kernel did not take, or not all of it, goes back to its senders.
    fn component_return(&mut self, mut conn: Conn) {
        for mark in std::mem::take(&mut conn.marks) {
            let stanza = conn.bytes(mark.start, mark.end);
            self.components.counters.lost += 1;
            if answers(mark.meta)
                && let Some(element) = super::parse_stanza(stanza)
                && let Some((to, sender)) = element.get("to").zip(element.get("from"))
                && let Ok(to) = Jid::parse(to)
            {
                self.bounce(&to, sender, stanza, mark.meta, &LOST);
            }
            if let Some(receipt) = mark.receipt {
                self.settle(receipt);
            }
        }
    }

    // ---- after a crash -------------------------------------------------------------------------------------------

    /// A message whose fate was open when the process ended. It waits for the component to come back.
    pub(super) fn component_recover(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Receipt,
    ) {
        let found = self.components.recovered.entry(to.domain().into());
        let recovered = found.or_insert_with(|| Recovered {
            waiting: Vec::new(),
            bytes: 0,
            since_ms: None,
            served: false,
        });
        recovered.push(to, from, stanza, meta, Some(receipt));
        self.opened(receipt);
    }

    /// Called about twice a second.
    pub(super) fn component_recovered(&mut self) {
        let (now_ms, timeout_ms) = (self.now.ms, self.components.settings.timeout_ms);
        let components = &mut self.components;
        let mut over: SmallVec<[Box<str>; 2]> = SmallVec::new();
        for (host, recovered) in &mut components.recovered {
            let serves = components.serving.contains_key(host);
            let since_ms = *recovered.since_ms.get_or_insert(now_ms);
            let late = now_ms.saturating_sub(since_ms) > timeout_ms;
            if (recovered.served && serves) || late {
                over.push(host.clone());
            }
            recovered.served = serves;
        }
        for host in over {
            let Some(recovered) = self.components.recovered.remove(&host) else {
                continue;
            };
            let serves = self.components.serving.contains_key(&host);
            for one in recovered.waiting {
                let Ok(to) = Jid::parse(&one.to) else {
                    continue;
                };
                let (from, stanza, meta) = (&*one.from, &*one.stanza, one.meta);
                let fate = match serves {
                    true => send(self, &to, from, stanza, meta, one.receipt),
                    false => {
                        self.components.counters.lost += 1;
                        refuse(self, &to, from, stanza, meta, &LOST_IN_CRASH)
                    }
                };
                if let (Fate::Decided, Some(receipt)) = (fate, one.receipt) {
                    self.settle(receipt);
                }
            }
        }
    }

    fn component_forget(&mut self, host: &str, id: ConnId) {
        if let Some(all) = self.components.serving.get_mut(host) {
            all.retain(|one| *one != id);
            if all.is_empty() {
                self.components.serving.remove(host);
            }
        }
    }

    // ---- who serves a name ---------------------------------------------------------------------------------------

    fn component_tell(&mut self, shard: u16, host: &str, conn: ConnId, word: Word) {
        if shard == self.env.shard {
            return self.component_word(host, conn, word);
        }
        let batch = &mut self.fx.mesh[usize::from(shard)];
        let host = batch.put(host.as_bytes());
        batch.items.push(Item::Component { host, conn, word });
    }

    fn component_tell_all(&mut self, host: &str, conn: ConnId, word: Word) {
        for shard in 0..self.fx.mesh.len() as u16 {
            self.component_tell(shard, host, conn, word);
        }
    }

    /// What a shard says about a connection.
    pub(super) fn component_word(&mut self, host: &str, conn: ConnId, word: Word) {
        match word {
            Word::Join => self.component_register(host, conn),
            Word::Leave => self.component_tell_all(host, conn, Word::Down),
            Word::Refused => {
                self.components.counters.refused += 1;
                let error = StreamError::text("conflict", "another connection serves this name");
                self.component_end(conn, Some(error));
            }
            Word::Up => {
                let own = conn.shard == self.env.shard;
                if own && !self.component_open(conn) {
                    // it has gone while it was decided about: the registrar will hear that
                    return;
                }
                let all = self.components.serving.entry(host.into()).or_default();
                if !all.contains(&conn) {
                    all.push(conn);
                }
            }
            Word::Down => {
                self.component_forget(host, conn);
                if conn.shard == self.env.shard {
                    let error = StreamError::text("conflict", "replaced by a newer connection");
                    self.component_end(conn, Some(error));
                }
            }
        }
    }

    /// The registrar's decision.
    fn component_register(&mut self, host: &str, conn: ConnId) {
        let there = self.components.serving.get(host);
        let there: SmallVec<[ConnId; 2]> = there.cloned().unwrap_or_default();
        let refused = match self.components.hosts.policy(host) {
            None => true,
            Some(Policy::Refuse) => !there.is_empty(),
            Some(Policy::Share) => there.len() >= self.components.settings.shared_max,
            Some(Policy::Replace) => false,
        };
        if refused {
            return self.component_tell(conn.shard, host, conn, Word::Refused);
        }
        if self.components.hosts.policy(host) == Some(Policy::Replace) {
            for old in there {
                self.component_tell_all(host, old, Word::Down);
            }
        }
        self.component_tell_all(host, conn, Word::Up);
    }

    /// The connection serves its name from now on. `false`: it is gone.
    fn component_open(&mut self, id: ConnId) -> bool {
        let ms = self.now.ms;
        let Some(conn) = self.components.conns.get_mut(&id.number) else {
            return false;
        };
        if std::mem::replace(&mut conn.up, true) {
            return true;
        }
        conn.push(b"<handshake/>", None);
        conn.acknowledged.1 = ms;
        tracing::info!(address = %conn.peer, component = %conn.host, shard = id.shard, "component connected");
        self.components.counters.joins += 1;
        self.components.opened.push(conn.link);
        self.component_touch(id);
        true
    }

    // ---- bytes -------------------------------------------------------------------------------------------------

    fn component_touch(&mut self, id: ConnId) {
        if let Some(conn) = self.components.conns.get_mut(&id.number)
            && !std::mem::replace(&mut conn.dirty, true)
        {
            self.components.dirty.push(id);
        }
    }

    /// Link and bytes that the kernel is to be offered; tell what it took by [`Slice::component_wrote`].
    pub fn component_out(&mut self, id: ConnId) -> Option<(u64, &[u8])> {
        let conn = self.components.conns.get_mut(&id.number)?;
        conn.dirty = false;
        (conn.waiting() > 0).then(|| (conn.link, conn.bytes(conn.taken, conn.end())))
    }

    /// The kernel took so many bytes: the stanzas that end in them are delivered, as far as XEP-0114 can tell.
    pub fn component_wrote(&mut self, id: ConnId, bytes: usize) {
        /// A buffer that has become longer than this is given back when it is empty.
        const BUFFER_BYTES_MAX: usize = 64 * 1024;
        let ms = self.now.ms;
        let Some(conn) = self.components.conns.get_mut(&id.number) else {
            return;
        };
        if bytes > 0 {
            conn.said_ms = ms;
        }
        conn.taken += bytes as u64;
        conn.stuck = conn.waiting() > 0;
        let mut settled: SmallVec<[Receipt; 8]> = SmallVec::new();
        while let Some(mark) = conn.marks.front()
            && mark.end <= conn.taken
        {
            settled.extend(conn.marks.pop_front().and_then(|mark| mark.receipt));
        }
        let first = conn.marks.front().map(|mark| mark.start);
        let needed = first.map_or(conn.taken, |first| first.min(conn.taken));
        let over = (needed - conn.base) as usize;
        if over == conn.out.len() {
            conn.out.clear();
            conn.base = needed;
            if conn.out.capacity() > BUFFER_BYTES_MAX {
                conn.out = Vec::new();
            }
        } else if over > conn.out.len() / 2 {
            conn.out.drain(..over);
            conn.base = needed;
        }
        for receipt in settled {
            self.settle(receipt);
        }
    }

    /// Looks after a connection, a few times a second; `unsent`: bytes that the kernel took and the peer's machine has not
    /// acknowledged. `false`: it counts as dead and must be dropped.
    pub fn component_tick(&mut self, id: ConnId, unsent: usize) -> bool {
        let ms = self.now.ms;
        let Settings {
            keepalive_ms,
            timeout_ms,
            ..
        } = self.components.settings;
        let Some(conn) = self.components.conns.get_mut(&id.number) else {
            return true;
        };
        let acknowledged = conn.taken.saturating_sub(unsent as u64);
        let idle = unsent == 0 && conn.waiting() == 0;
        if idle || acknowledged > conn.acknowledged.0 {
            conn.acknowledged = (acknowledged, ms);
        }
        if ms.saturating_sub(conn.acknowledged.1) > timeout_ms {
            self.component_over(id, None, "it does not read, or its machine is gone");
            return false;
        }
        if conn.up && idle && ms.saturating_sub(conn.said_ms) > keepalive_ms {
            conn.push(b" ", None);
            self.component_touch(id);
        }
        true
    }

    // ---- from components ---------------------------------------------------------------------------------------

    /// One element of a component that serves its name. An error ends the stream.
    pub fn component_element(&mut self, id: ConnId, frame: &[u8]) -> Result<(), StreamError> {
        let Some(conn) = self.components.conns.get_mut(&id.number) else {
            return Ok(());
        };
        conn.stanzas_in += 1;
        let (ns, host) = (conn.ns.clone(), conn.host.clone());
        self.components.counters.stanzas_in += 1;
        let limits = self.env.limits.xml;
        if memchr::memmem::find(frame, NS_ACCEPT.as_bytes()).is_some() {
            // it says its content namespace where it need not
            let mut element = Element::parse_in(frame, &ns, &limits)?;
            rename(&mut element);
            let mut bytes = Vec::with_capacity(frame.len());
            element.write(&mut bytes, NS_CLIENT);
            let client = StreamNs::client();
            return self.component_stanza(id, &host, &View::parse(&bytes, &client, &limits)?);
        }
        self.component_stanza(id, &host, &View::parse(frame, &ns, &limits)?)
    }

    fn component_stanza(
        &mut self,
        id: ConnId,
        host: &str,
        view: &View<'_>,
    ) -> Result<(), StreamError> {
        if view.ns() != NS_CLIENT || !matches!(view.name(), "message" | "presence" | "iq") {
            return Err(StreamError::new("unsupported-stanza-type"));
        }
        let from = view.attr("from");
        let from = from.as_deref().and_then(|from| Jid::parse(from).ok());
        let Some(from) = from else {
            return Err(StreamError::text(
                "improper-addressing",
                "a stanza needs a from",
            ));
        };
        if from.domain() != host {
            tracing::warn!(
                component = host,
                from = from.as_str(),
                "a component speaks for another name"
            );
            return Err(StreamError::new("invalid-from"));
        }
        if let Err(error) = self.component_stanza_to(view, &from) {
            self.component_refuse(id, view, &from, &error);
        }
        Ok(())
    }

    fn component_stanza_to(&mut self, view: &View<'_>, from: &Jid<'_>) -> Result<(), StanzaError> {
        let to = view
            .attr("to")
            .ok_or(StanzaError::BAD_REQUEST.text("a stanza needs a to"))?;
        let to = Jid::parse(&to).map_err(|_| StanzaError::JID_MALFORMED)?;
        let typ = view.attr("type");
        let (meta, query) = match view.name() {
            "message" => (hints::meta(view), false),
            "presence" => {
                let kind = Kind::presence(typ.as_deref()).ok_or(StanzaError::BAD_REQUEST)?;
                (Meta::new(kind), false)
            }
            _ => {
                let kind = Kind::iq(typ.as_deref()).ok_or(StanzaError::BAD_REQUEST)?;
                let query = matches!(kind, Kind::IqGet | Kind::IqSet);
                if view.attr("id").is_none() || (query && view.children().len() != 1) {
                    return Err(StanzaError::BAD_REQUEST);
                }
                (Meta::new(kind), query)
            }
        };
        let own = match self.host(to.domain()) {
            Host::Own => true,
            Host::Component => false,
            Host::Rooms if to.local().is_none() => {
                return match query {
                    true => self.component_asks_rooms(view, from, &to, meta),
                    false if meta.kind.is_message() => Err(StanzaError::SERVICE_UNAVAILABLE),
                    false => Ok(()),
                };
            }
            // rooms have no subscriptions
            Host::Rooms if meta.kind.is_subscription() => return Ok(()),
            Host::Rooms => false,
            Host::Unknown => return Err(StanzaError::REMOTE_SERVER_NOT_FOUND),
        };
        if own && to.local().is_none() {
            return match query {
                true => self.component_asks(view, from, &to, meta),
                false if meta.kind.is_message() => Err(StanzaError::SERVICE_UNAVAILABLE),
                // presence for the server, answers to its questions: nobody is there to be told
                false => Ok(()),
            };
        }
        // RFC 6121 3.1.2: a subscription is between bare JIDs
        let (from, to) = match meta.kind.is_subscription() {
            true => (from.to_bare(), to.to_bare()),
            false => (from.borrowed(), to.borrowed()),
        };
        let meta = match meta.kind {
            Kind::Available | Kind::Unavailable => meta.with(Meta::LAZY),
            _ => meta,
        };
        let scratch = self.take_scratch();
        let stanza = message::compose(view, from.as_str(), Some(&to), None, scratch);
        self.route(&to, from.as_str(), &stanza, meta, None);
        self.give_scratch(stanza);
        Ok(())
    }

    /// A request to the service of chat rooms.
    fn component_asks_rooms(
        &mut self,
        view: &View<'_>,
        from: &Jid<'_>,
        to: &Jid<'_>,
        meta: Meta,
    ) -> Result<(), StanzaError> {
        let payload = view.to_element().elements().next().cloned();
        let iq = iq::Iq {
            session: None,
            from: from.borrowed().into_owned(),
            to: Some(to.borrowed().into_owned()),
            id: view.attr("id").unwrap_or_default().into_owned(),
            set: meta.kind == Kind::IqSet,
            payload: payload.ok_or(StanzaError::BAD_REQUEST)?,
            receipt: None,
        };
        super::room::host::handle(self, iq);
        Ok(())
    }

    /// A request to the server itself.
    fn component_asks(
        &mut self,
        view: &View<'_>,
        from: &Jid<'_>,
        to: &Jid<'_>,
        meta: Meta,
    ) -> Result<(), StanzaError> {
        let payload = view.to_element().elements().next().cloned();
        let payload = payload.ok_or(StanzaError::BAD_REQUEST)?;
        if meta.kind != Kind::IqGet || !SERVER_QUERIES.contains(&&*payload.ns) {
            return Err(StanzaError::SERVICE_UNAVAILABLE);
        }
        let iq = iq::Iq {
            session: None,
            from: from.borrowed().into_owned(),
            to: Some(to.borrowed().into_owned()),
            id: view.attr("id").unwrap_or_default().into_owned(),
            set: false,
            payload,
            receipt: None,
        };
        iq::handle(self, iq, super::feature::Target::Server);
        Ok(())
    }

    /// Answers a component's stanza by an error, on the connection that it came by.
    fn component_refuse(
        &mut self,
        id: ConnId,
        view: &View<'_>,
        from: &Jid<'_>,
        error: &StanzaError,
    ) {
        let Some((answer, kind)) = error_answer(view, from.as_str(), error) else {
            return;
        };
        self.counters.bounces += 1;
        let mut bytes = Vec::with_capacity(256);
        answer.write(&mut bytes, NS_CLIENT);
        let _ = hand(self, id, &bytes, Meta::new(kind).with(Meta::SERVER), None);
    }
}

/// May the sender hear that the stanza did not reach its component? Not of presence that the server itself sent around.
fn answers(meta: Meta) -> bool {
    match meta.kind {
        Kind::Subscribe => true,
        Kind::Available => !meta.has(Meta::SERVER),
        kind => kind.may_bounce() && !kind.is_presence(),
    }
}

/// What stands in the content namespace of a component's stream is in that of a client's.
fn rename(element: &mut Element) {
    if element.ns == NS_ACCEPT {
        element.ns = NS_CLIENT.into();
    }
    for node in &mut element.children {
        if let Node::Element(child) = node {
            rename(child);
        }
    }
}

// ---- to components -------------------------------------------------------------------------------------------------

/// Sends a stanza to an address of a component; like [`Slice::route`], which calls it.
pub fn route(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) {
    let fate = match held_user(slice, from) {
        Some(user) => behind(slice, &user, to, from, stanza, meta, receipt),
        None => send(slice, to, from, stanza, meta, receipt),
    };
    let Some(receipt) = receipt else { return };
    match fate {
        Fate::Open => slice.opened(receipt),
        Fate::Decided => slice.refused(receipt),
    }
}

/// The sender, if he is a user whose older messages wait for the journal.
fn held_user(slice: &Slice, from: &str) -> Option<Rc<str>> {
    let (name, rest) = from.split_once('@')?;
    let domain = rest.split('/').next()?;
    (domain == &*slice.env.domain && slice.ledger.holds(name)).then(|| name.into())
}

/// It must not overtake them, and nobody gets what no archive holds.
fn behind(
    slice: &mut Slice,
    user: &Rc<str>,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    if slice.ledger.bytes() > slice.env.limits.mesh_backlog_bytes_max {
        return refuse(
            slice,
            to,
            from,
            stanza,
            meta,
            &StanzaError::RESOURCE_CONSTRAINT,
        );
    }
    let act = Act::ToComponent {
        to: slice.ledger.keep(to.as_str().as_bytes()),
        from: slice.ledger.keep(from.as_bytes()),
        stanza: slice.ledger.keep(stanza),
        meta,
        receipt,
    };
    slice.ledger.queue(user, act);
    Fate::Open
}

impl Recovered {
    fn push(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) {
        self.bytes += stanza.len();
        self.waiting.push(Waiting {
            to: to.as_str().into(),
            from: from.into(),
            stanza: stanza.into(),
            meta,
            receipt,
        });
    }
}

/// Nothing that is older waits, but what a crash has left.
pub fn send(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    let bare = from.split('/').next().unwrap_or(from);
    let Some(conn) = slice.components.pick(to.domain(), bare, |_| true) else {
        return unreachable(slice, to, from, stanza, meta);
    };
    let most = slice.components.settings.queue_bytes_max;
    if let Some(recovered) = slice.components.recovered.get_mut(to.domain()) {
        // for a moment: it is served
        if recovered.bytes + stanza.len() > most {
            slice.components.counters.overflows += 1;
            return refuse(slice, to, from, stanza, meta, &SLOW);
        }
        recovered.push(to, from, stanza, meta, receipt);
        return Fate::Open;
    }
    if conn.shard == slice.env.shard {
        return give(slice, conn, to, from, stanza, meta, receipt);
    }
    if slice.fx.closed[usize::from(conn.shard)] {
        slice.counters.mesh_refused += 1;
        return refuse(
            slice,
            to,
            from,
            stanza,
            meta,
            &StanzaError::RESOURCE_CONSTRAINT,
        );
    }
    let batch = &mut slice.fx.mesh[usize::from(conn.shard)];
    batch.stanza(to.as_str(), from, stanza, meta, receipt);
    Fate::Open
}

/// A stanza of another shard, for a component that is connected here as far as that shard knows.
pub fn arrived(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    let bare = from.split('/').next().unwrap_or(from);
    let own = slice.env.shard;
    match slice
        .components
        .pick(to.domain(), bare, |conn| conn.shard == own)
    {
        Some(conn) => give(slice, conn, to, from, stanza, meta, receipt),
        None => unreachable(slice, to, from, stanza, meta),
    }
}

fn give(
    slice: &mut Slice,
    conn: ConnId,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    match hand(slice, conn, stanza, meta, receipt) {
        true => Fate::Open,
        false => {
            slice.components.counters.overflows += 1;
            refuse(slice, to, from, stanza, meta, &SLOW)
        }
    }
}

/// `false`: too much waits already.
fn hand(
    slice: &mut Slice,
    id: ConnId,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> bool {
    let most = slice.components.settings.queue_bytes_max;
    let Some(conn) = slice.components.conns.get_mut(&id.number) else {
        return false;
    };
    // what comes in one turn, before the kernel was offered it, says nothing about the component
    let most = if conn.stuck { most } else { most * BURST };
    if conn.waiting() + stanza.len() > most {
        return false;
    }
    conn.push(stanza, Some((meta, receipt)));
    slice.components.counters.stanzas_out += 1;
    slice.component_touch(id);
    true
}

fn unreachable(slice: &mut Slice, to: &Jid<'_>, from: &str, stanza: &[u8], meta: Meta) -> Fate {
    if answers(meta) {
        slice.components.counters.unreachable += 1;
    }
    refuse(slice, to, from, stanza, meta, &NOT_CONNECTED)
}

fn refuse(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    error: &StanzaError,
) -> Fate {
    if answers(meta) {
        slice.bounce(to, from, stanza, meta, error);
    }
    Fate::Decided
}

/// A stanza for a domain that is nobody's here.
pub fn nowhere(slice: &mut Slice, to: &Jid<'_>, from: &str, stanza: &[u8], meta: Meta) {
    let _ = refuse(
        slice,
        to,
        from,
        stanza,
        meta,
        &StanzaError::REMOTE_SERVER_NOT_FOUND,
    );
}
