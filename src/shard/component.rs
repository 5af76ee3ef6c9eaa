//! Connections of components (XEP-0114): their sockets. In: bytes, room to write, the clock. Out: what
//! [`crate::xmpp::component`] decides, written with one system call for all that waits for a connection.
//!
//! A connection stays on the shard that accepted it. Its handshake is a part of the live loop, not a log-in: there are few, and
//! none waits for a tier. Who does not know the secret is held back as at log-ins ([`super::doors`]). With `component.proxy` the
//! connections of trusted proxies begin with a PROXY v2 header, and what it names is the peer.

use std::cell::Cell;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::rc::Rc;

use super::doors::Pass;
use super::live::{End, READS_MAX};
use super::{Kind, Links, Shard};
use crate::config::Config;
use crate::net::{Proxied, Read, Socket, Transport, parse_proxy_header};
use crate::rt;
use crate::xml::{self, FrameKind, Framer};
use crate::xmpp::component::{ConnId, Handshake, NOT_AUTHORIZED, Settings, Step};
use crate::xmpp::error::StreamError;
use crate::xmpp::slice::Slice;

/// The connection of a component.
pub struct ComponentLink {
    transport: Transport,
    framer: Framer,
    /// Read and not taken.
    rest: Vec<u8>,
    stage: Stage,
    peer: SocketAddr,
    /// None yet for one that comes through a proxy.
    pass: Option<Pass>,
    /// Of its handshake, ms of the monotonic clock.
    deadline_ms: u64,
    _place: Place,
}

enum Stage {
    /// The proxy has not said yet for whom it speaks.
    Proxy,
    Handshake(Box<Handshake>),
    /// It does not know the secret, and is not told so before.
    Held {
        until_ms: u64,
        handshake: Box<Handshake>,
    },
    /// It has proved its secret; it serves its name when the slice says that it is up.
    Serves(ConnId),
}

/// Counts connections of a shard; given back when dropped.
struct Place(Rc<Cell<usize>>);

impl Place {
    fn take(open: &Rc<Cell<usize>>) -> Place {
        open.set(open.get() + 1);
        Place(open.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

pub fn settings(config: &Config) -> Settings {
    let component = &config.component;
    Settings {
        shared_max: component.shared_max,
        queue_bytes_max: component.queue_bytes_max,
        keepalive_ms: component.keepalive_seconds * 1000,
        timeout_ms: component.timeout_seconds * 1000,
    }
}

impl Shard {
    /// A connection was accepted at a port for components.
    pub(super) fn component_accepted(&self, socket: Socket, peer: SocketAddr) {
        let config = self.config.borrow().clone();
        let full = self.components_open.get() >= config.component.connections_max;
        let proxied = config.component.proxy && config.is_trusted_proxy(peer.ip());
        let pass = match proxied {
            true => Ok(None),
            false => self.doors.enter(peer.ip(), false, &config).map(Some),
        };
        let pass = match pass {
            Ok(pass) if !full && !self.stopping.get() => pass,
            _ => {
                self.gauges.turned_away.one();
                let error = match self.stopping.get() {
                    true => StreamError::text("system-shutdown", "the server stops"),
                    false => StreamError::text("resource-constraint", "too many connections"),
                };
                let mut out = Vec::new();
                Handshake::default().refuse(&error, &mut out);
                return self.close_transport(Transport::plain(socket), &out);
            }
        };
        let mut links = self.links.borrow_mut();
        let link = links.insert(Kind::Component(Box::new(ComponentLink {
            transport: Transport::plain(socket),
            framer: Framer::new(),
            rest: Vec::new(),
            stage: match proxied {
                true => Stage::Proxy,
                false => Stage::Handshake(Box::default()),
            },
            peer,
            pass,
            deadline_ms: self.now_ms() + config.limits.auth_seconds_max * 1000,
            _place: Place::take(&self.components_open),
        })));
        if let Some(Kind::Component(c)) = links.get_mut(link)
            && self.readiness.add(c.transport.socket(), link).is_err()
        {
            links.remove(link);
            return;
        }
        drop(links);
        // what came before it was watched
        self.unread.borrow_mut().push_back(link);
        self.nudge();
    }

    pub(super) fn component_ready(&self, link: u64, event: &rt::Ready) {
        if event.writable {
            let mut links = self.links.borrow_mut();
            if let Some(Kind::Component(c)) = links.get_mut(link)
                && let Stage::Serves(id) = c.stage
            {
                self.component_write(&mut self.slice.borrow_mut(), &mut links, id);
            }
        }
        if event.readable || event.closed {
            match self.ways.borrow().congested() {
                true => self.unread.borrow_mut().push_back(link),
                false => self.component_read(link, event.closed),
            }
        }
    }

    /// As [`Shard::read`].
    pub(super) fn component_read(&self, link: u64, to_the_end: bool) {
        let mut links = self.links.borrow_mut();
        let Some(Kind::Component(c)) = links.get_mut(link) else {
            return;
        };
        let mut slice = self.slice.borrow_mut();
        let mut scratch = self.scratch.borrow_mut();
        let mut end = Ok(());
        if !c.rest.is_empty() && c.may_read(&slice) {
            let rest = std::mem::take(&mut c.rest);
            end = self.component_frames(&mut slice, c, link, &rest);
        }
        let mut drained = false;
        for turn in 0..=READS_MAX {
            if end.is_err() || drained || !c.may_read(&slice) {
                break;
            }
            if turn == READS_MAX {
                self.unread.borrow_mut().push_back(link);
                break;
            }
            end = match c.transport.read(&mut scratch) {
                Ok(Read::Data { bytes, more }) => {
                    drained = !more && !to_the_end;
                    if c.rest.is_empty() {
                        self.component_frames(&mut slice, c, link, bytes)
                    } else {
                        let mut all = std::mem::take(&mut c.rest);
                        all.extend_from_slice(bytes);
                        self.component_frames(&mut slice, c, link, &all)
                    }
                }
                Ok(Read::HandshakeDone) => Ok(()),
                Ok(Read::WouldBlock) => break,
                Ok(Read::Eof) | Err(_) => Err(End::Lost),
            };
        }
        drop(scratch);
        let Err(end) = end else { return };
        match (end, &mut c.stage) {
            (End::Lost, Stage::Serves(id)) => {
                let id = *id;
                self.component_gone(&mut links, link);
                slice.component_lost(id);
            }
            (End::Lost, _) | (End::Stream(_), Stage::Proxy) => {
                self.component_gone(&mut links, link)
            }
            (End::Stream(error), Stage::Serves(id)) => slice.component_end(*id, error),
            (End::Stream(error), Stage::Handshake(handshake) | Stage::Held { handshake, .. }) => {
                let mut out = Vec::new();
                if let Some(error) = error {
                    handshake.refuse(&error, &mut out);
                }
                drop(slice);
                drop(links);
                self.component_close(link, &out);
            }
        }
    }

    /// Cuts `bytes` into frames and has them handled; what is not taken is kept in `rest`.
    fn component_frames(
        &self,
        slice: &mut Slice,
        c: &mut ComponentLink,
        link: u64,
        bytes: &[u8],
    ) -> Result<(), End> {
        let mut at = 0;
        if let Stage::Proxy = c.stage {
            let Some(header) = self.component_proxy(c, bytes)? else {
                c.rest.extend_from_slice(bytes);
                return Ok(());
            };
            at = header;
        }
        while c.may_read(slice) {
            let limits = match c.stage {
                Stage::Serves(_) => slice.env.limits.xml,
                _ => xml::Limits {
                    stanza_bytes_max: self.config.borrow().limits.unauthenticated_stanza_bytes_max,
                    ..slice.env.limits.xml
                },
            };
            let frame = c.framer.next(&bytes[at..], &limits);
            let Some(frame) = frame.map_err(|e| End::Stream(Some(e.into())))? else {
                break;
            };
            let piece = &bytes[at..at + frame.len];
            at += frame.len;
            match &c.stage {
                Stage::Serves(id) => match frame.kind {
                    FrameKind::Element => slice
                        .component_element(*id, piece)
                        .map_err(|error| End::Stream(Some(error)))?,
                    FrameKind::Whitespace => {}
                    FrameKind::End => return Err(End::Stream(None)),
                    FrameKind::Header => {
                        return Err(End::Stream(Some(StreamError::new("not-well-formed"))));
                    }
                },
                _ => self.component_handshake(slice, c, link, frame.kind, piece, &limits)?,
            }
        }
        c.rest.extend_from_slice(&bytes[at..]);
        Ok(())
    }

    /// Reads the header of a proxy: its length, if it is whole.
    fn component_proxy(&self, c: &mut ComponentLink, bytes: &[u8]) -> Result<Option<usize>, End> {
        let (proxied, length) = match parse_proxy_header(bytes) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(None),
            Err(error) => {
                tracing::warn!(address = %c.peer.ip(), %error, "a trusted proxy sent no PROXY v2 header");
                return Err(End::Lost);
            }
        };
        if let Proxied::Client(source) = proxied {
            c.peer = source;
        }
        c.stage = Stage::Handshake(Box::default());
        let config = self.config.borrow().clone();
        match self.doors.enter(c.peer.ip(), true, &config) {
            Ok(pass) => c.pass = Some(pass),
            Err(_) => {
                self.gauges.turned_away.one();
                let error = StreamError::text("resource-constraint", "too many connections");
                return Err(End::Stream(Some(error)));
            }
        }
        Ok(Some(length))
    }

    fn component_handshake(
        &self,
        slice: &mut Slice,
        c: &mut ComponentLink,
        link: u64,
        kind: FrameKind,
        frame: &[u8],
        limits: &xml::Limits,
    ) -> Result<(), End> {
        let Stage::Handshake(handshake) = &mut c.stage else {
            return Ok(());
        };
        let mut out = Vec::new();
        let hosts = slice.components.hosts.clone();
        let step = handshake
            .frame(kind, frame, &hosts, limits, &mut out)
            .map_err(|error| End::Stream(Some(error)))?;
        // a few hundred bytes into an empty socket, or a connection that is good for nothing
        match c.transport.socket().send(&out) {
            Ok(sent) if sent == out.len() => {}
            _ if out.is_empty() => {}
            _ => return Err(End::Lost),
        }
        match step {
            Step::Continue => {}
            Step::End => return Err(End::Stream(None)),
            Step::Proved(host) => {
                if let Some(pass) = &mut c.pass {
                    pass.authenticated();
                }
                self.doors.succeeded(&account(&host));
                let (ns, peer) = (handshake.stream_ns(), c.peer.to_string());
                c.stage = Stage::Serves(slice.component_join(link, &host, ns, &peer));
            }
            Step::Failed(host) => {
                self.gauges.auth_failures.one();
                tracing::info!(
                    address = %c.peer.ip(),
                    user = &*host,
                    condition = NOT_AUTHORIZED.condition,
                    "authentication failed"
                );
                let config = self.config.borrow().clone();
                let pause = self
                    .doors
                    .failed(c.peer.ip(), Some(&account(&host)), &config);
                let until_ms = slice.now.ms + pause.as_millis() as u64;
                if let Stage::Handshake(handshake) =
                    std::mem::replace(&mut c.stage, Stage::Handshake(Box::default()))
                {
                    c.stage = Stage::Held {
                        until_ms,
                        handshake,
                    };
                }
            }
        }
        Ok(())
    }

    /// Writes what waits for the components of this shard. Their last words: see [`Shard::component_close`].
    pub(super) fn component_flush(&self, slice: &mut Slice) {
        if slice.components.dirty.is_empty() && slice.components.opened.is_empty() {
            return;
        }
        self.unread
            .borrow_mut()
            .extend(slice.components.opened.drain(..));
        let mut links = self.links.borrow_mut();
        for id in std::mem::take(&mut slice.components.dirty) {
            self.component_write(slice, &mut links, id);
        }
    }

    fn component_write(&self, slice: &mut Slice, links: &mut Links, id: ConnId) {
        while let Some((link, bytes)) = slice.component_out(id) {
            let Some(Kind::Component(c)) = links.get_mut(link) else {
                return;
            };
            let offered = bytes.len();
            match c.transport.socket().send(bytes) {
                Ok(taken) => {
                    slice.component_wrote(id, taken);
                    if taken < offered {
                        // an edge tells when there is room
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return slice.component_wrote(id, 0);
                }
                Err(_) => {
                    self.component_gone(links, link);
                    return slice.component_lost(id);
                }
            }
        }
    }

    fn component_gone(&self, links: &mut Links, link: u64) {
        if let Some(Kind::Component(c)) = links.remove(link) {
            self.readiness.remove(c.transport.socket());
        }
    }

    /// Ends a connection with these last words.
    pub(super) fn component_close(&self, link: u64, bytes: &[u8]) {
        let gone = self.links.borrow_mut().remove(link);
        if let Some(Kind::Component(c)) = gone {
            self.close_transport(c.transport, bytes);
        }
    }

    /// Deadlines, white space, dead connections. A few times a second.
    pub(super) fn component_tick(&self, now_ms: u64) {
        if self.components_open.get() == 0 {
            return;
        }
        let mut over = Vec::new();
        let mut links = self.links.borrow_mut();
        let mut dead = Vec::new();
        for (slot, entry) in &mut links.slab {
            let Kind::Component(c) = &mut entry.kind else {
                continue;
            };
            let link = (u64::from(entry.generation) << 32) | slot as u64;
            match &mut c.stage {
                Stage::Proxy if now_ms >= c.deadline_ms => over.push((link, Vec::new())),
                Stage::Handshake(handshake) if now_ms >= c.deadline_ms => {
                    let mut out = Vec::new();
                    let error = StreamError::text("connection-timeout", "too slow to authenticate");
                    handshake.refuse(&error, &mut out);
                    over.push((link, out));
                }
                Stage::Held {
                    until_ms,
                    handshake,
                } if now_ms >= *until_ms => {
                    let mut out = Vec::new();
                    handshake.refuse(&NOT_AUTHORIZED, &mut out);
                    over.push((link, out));
                }
                Stage::Serves(id) => {
                    let unsent = c.transport.socket().unsent().unwrap_or_default();
                    if !self.slice.borrow_mut().component_tick(*id, unsent) {
                        dead.push(link);
                    }
                }
                _ => {}
            }
        }
        for link in dead {
            self.component_gone(&mut links, link);
        }
        drop(links);
        for (link, out) in over {
            self.component_close(link, &out);
        }
    }

    /// The shard stops.
    pub(super) fn component_stop(&self) {
        let error = StreamError::text("system-shutdown", "the server stops");
        self.slice.borrow_mut().component_end_all(&error);
        let mut over = Vec::new();
        for (slot, entry) in &mut self.links.borrow_mut().slab {
            if let Kind::Component(c) = &mut entry.kind {
                let mut out = Vec::new();
                match &mut c.stage {
                    Stage::Serves(_) => continue,
                    Stage::Proxy => {}
                    Stage::Handshake(handshake) | Stage::Held { handshake, .. } => {
                        handshake.refuse(&error, &mut out);
                    }
                }
                over.push(((u64::from(entry.generation) << 32) | slot as u64, out));
            }
        }
        for (link, out) in over {
            self.component_close(link, &out);
        }
    }
}

impl ComponentLink {
    /// Nothing is read of one that is held back, nor before it serves its name.
    fn may_read(&self, slice: &Slice) -> bool {
        match &self.stage {
            Stage::Proxy | Stage::Handshake(_) => true,
            Stage::Held { .. } => false,
            Stage::Serves(id) => slice.components.conn(*id).is_some_and(|conn| conn.up),
        }
    }
}

/// Under which failures of a name are counted: no user's name has a space.
fn account(host: &str) -> String {
    format!("component {host}")
}
