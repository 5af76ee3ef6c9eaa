//! BOSH at `/bosh` (XEP-0124, XEP-0206): an XMPP stream over requests that come one after the other, on whatever connections. In:
//! bodies of requests. Out: bodies of answers, as late as there is something to say or as the client agreed to wait.
//!
//! The session of requests is kept by the shard where it began; its id names that shard, encrypted, so a request that another core
//! has accepted goes there with its connection, which then stays. To the rest of the server it is a client on one end of a pair of
//! sockets ([`Transport`] on that end, the same gates, hand-over to the owner of the user, stream management): the keeper holds
//! the other end.
//!
//! Promise: stanzas of requests arrive once and in the order of their ids; an answer is kept until the client must have it and is
//! sent again when it asks again; what no answer that the client must have has carried counts as not delivered (one byte of it stays
//! unread in the pair, so that the owner sees it). That is known for all at once or not at all: of a client without stream management
//! that only listens, and hears something in each answer, nothing is known to have arrived until a moment of silence. It gets
//! that again when it has gone, and is ended when it is too much (`slice::overflow`). Not offered: several streams in one session (XEP-0124 section 16: no client asks), keys
//! (section 15: what TLS does better), answers by script (section 18).

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use crate::net::{Socket, Transport};
use crate::rt::{self, Queue, SlotSetter, slot};
use crate::shard::http::After;
use crate::shard::http::exchange::{Answer, Exchange, Gone};
use crate::shard::login::{self, WebStream};
use crate::shard::{Kind, Shard};
use crate::xml::{
    Attributes, FrameKind, Framer, Limits, NS_CLIENT, NS_STREAMS, StreamNs, View, escape_attr,
    missing_declaration,
};

const NS: &str = "http://jabber.org/protocol/httpbind";
const NS_XBOSH: &str = "urn:xmpp:xbosh";
/// The version of XEP-0124 that is spoken.
const VERSION: &str = "1.11";
/// Random bytes of a session's id.
const ID_BYTES: usize = 18;
/// Highest request id (section 7.1).
const RID_MAX: u64 = (1 << 53) - 1;
/// Requests that the server holds open: one is enough to push (section 11).
const HOLD_MAX: usize = 1;
/// Bytes taken from the pair at once.
const PIECE_BYTES: usize = 64 << 10;
const OWN: Limits = Limits {
    stanza_bytes_max: u32::MAX as usize,
    header_bytes_max: 64 * 1024,
    depth_max: u16::MAX,
    attributes_max: u16::MAX,
};

/// The sessions that a shard keeps.
#[derive(Default)]
pub struct Sessions {
    by_id: HashMap<Box<str>, Rc<RefCell<Session>>>,
    by_link: HashMap<u64, Box<str>>,
}

impl Sessions {
    pub fn len(&self) -> usize {
        self.by_id.len()
    }
}

struct Session {
    /// The keeper's end.
    end: Transport,
    link: u64,
    /// The highest id of which all before have been handled.
    rid: u64,
    hold: usize,
    wait_ms: u64,
    /// Held requests, oldest first.
    held: VecDeque<(u64, SlotSetter<Reply>)>,
    /// Came before their turn.
    early: BTreeMap<u64, (Request, SlotSetter<Reply>)>,
    /// The newest answers.
    kept: VecDeque<(u64, Reply)>,
    framer: Framer,
    /// The unfinished element from the pair.
    unfinished: Vec<u8>,
    /// The newest byte that was taken is still in the pair.
    tail: bool,
    /// Since when no request is held, and for how long that may be.
    silent_since_ms: u64,
    silent_ms_max: u64,
    /// When an empty poll came last, and whether the newest answer was empty, too.
    polled_ms: u64,
    had_nothing: bool,
    /// The attributes of the answer that begins the session, until it is sent.
    greeting: Option<String>,
    /// The owner has closed its end; what is in the pair may still be read.
    closed: bool,
    /// No more will come from the pair; the condition that the client hears.
    over: Option<&'static str>,
    /// The client was told so.
    said: bool,
}

type Reply = Rc<[u8]>;

/// What a request says.
struct Request {
    payload: Vec<u8>,
    restart: Option<String>,
    terminate: bool,
    pause_ms: Option<u64>,
}

/// A `<body/>`, its attributes and payload apart.
struct Body {
    sid: Option<String>,
    rid: Option<u64>,
    to: Option<String>,
    lang: Option<String>,
    wait: Option<u64>,
    hold: Option<u64>,
    request: Request,
}

fn read_body(bytes: &[u8], limits: &Limits) -> Option<Body> {
    let mut limits = *limits;
    limits.depth_max += 1;
    let none = StreamNs::default();
    let view = View::parse(bytes.trim_ascii(), &none, &limits).ok()?;
    if view.name() != "body" || view.ns() != NS {
        return None;
    }
    let text = |name: &str| view.attr(name).map(|value| value.into_owned());
    let number = |name: &str| view.attr(name).and_then(|value| value.parse::<u64>().ok());
    // declarations are not among a view's attributes
    let written = || {
        Attributes::of(view.raw().as_bytes()).filter_map(|(name, all)| {
            let value = all.splitn(2, |b| *b == b'=').nth(1)?.trim_ascii();
            Some((name, value.get(1..value.len() - 1)?))
        })
    };
    let prefix = written().find_map(|(name, value)| {
        let prefix = name.strip_prefix(b"xmlns:")?;
        (value == NS_XBOSH.as_bytes()).then_some(prefix)
    });
    let restart = prefix.is_some_and(|prefix| {
        written().any(|(name, value)| {
            name.strip_prefix(prefix) == Some(b":restart") && matches!(value, b"true" | b"1")
        })
    });
    Some(Body {
        sid: text("sid"),
        rid: number("rid"),
        to: text("to"),
        lang: text("xml:lang"),
        wait: number("wait"),
        hold: number("hold"),
        request: Request {
            payload: view.inner().as_bytes().to_vec(),
            restart: restart.then(|| text("to").unwrap_or_default()),
            terminate: view.attr("type").as_deref() == Some("terminate"),
            pause_ms: number("pause").map(|seconds| seconds.saturating_mul(1000)),
        },
    })
}

/// The end of a session, in the answer's own body (section 17).
fn terminate(condition: &str) -> Vec<u8> {
    let condition = match condition {
        "" => String::new(),
        condition => format!(" condition='{condition}'"),
    };
    format!("<body xmlns='{NS}' type='terminate'{condition}/>").into_bytes()
}

fn answer_xml(body: &[u8]) -> Answer {
    Answer::new(200, "text/xml; charset=utf-8", body)
}

/// A request, where it was accepted.
pub async fn post(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    let most = exchange.config.web.bosh_body_bytes_max;
    match exchange.whole_body(most).await? {
        Some(body) => handle(exchange, body).await,
        None => Ok(After::Next),
    }
}

/// A request with its body; on the shard that keeps its session, or on its way there.
pub async fn handle(exchange: &mut Exchange<'_>, bytes: Vec<u8>) -> Result<After, Gone> {
    let shard = exchange.shard.clone();
    let limits = shard.slice.borrow().env.limits.xml;
    let parsed = read_body(&bytes, &limits);
    let Some((body, rid)) = parsed.and_then(|body| {
        let rid = body.rid.filter(|rid| (1..=RID_MAX).contains(rid))?;
        Some((body, rid))
    }) else {
        shard.gauges.http_refused.one();
        return exchange.answer(answer_xml(&terminate("bad-request"))).await;
    };
    let Some(sid) = body.sid.clone() else {
        return create(exchange, body, rid).await;
    };
    let keeper = keeper(&shard, &sid);
    if let Some(other) = keeper.filter(|keeper| *keeper != shard.number) {
        return Ok(After::Move {
            shard: other,
            body: bytes,
        });
    }
    let session = shard.bosh.borrow().by_id.get(&*sid).cloned();
    let Some(session) = session.filter(|_| keeper.is_some()) else {
        // who guesses waits, longer each time
        shard.gauges.bosh_unknown.one();
        let (client, _) = exchange.client();
        let pause = shard.doors.failed(client.ip(), None, &exchange.config);
        rt::sleep(pause).await;
        return exchange
            .answer(answer_xml(&terminate("item-not-found")))
            .await;
    };
    let reply = take(&shard, &session, rid, body.request);
    respond(exchange, &session, &sid, rid, reply).await
}

/// Waits for the answer.
async fn respond(
    exchange: &mut Exchange<'_>,
    session: &Rc<RefCell<Session>>,
    sid: &str,
    rid: u64,
    reply: Result<Reply, rt::Slot<Reply>>,
) -> Result<After, Gone> {
    let shard = exchange.shard.clone();
    let reply = match reply {
        Ok(reply) => Some(reply),
        Err(slot) => {
            let wait = Duration::from_millis(session.borrow().wait_ms);
            match rt::timeout(wait, slot.take()).await {
                Ok(reply) => reply,
                Err(_) => session.borrow_mut().expire(rid, shard.now_ms()),
            }
        }
    };
    shard.bosh_reap(session, sid);
    match reply {
        Some(reply) => exchange.answer(answer_xml(&reply)).await,
        // asked again on another connection
        None => Err(Gone),
    }
}

async fn create(exchange: &mut Exchange<'_>, body: Body, rid: u64) -> Result<After, Gone> {
    let shard = exchange.shard.clone();
    let config = exchange.config.clone();
    let (client, encrypted) = exchange.client();
    let full = shard.bosh.borrow().len() >= config.web.bosh_sessions_max;
    // the place of the connection is another one: this outlives it
    let proxied = config.is_web_proxy(exchange.conn.peer.ip());
    let pass = shard.doors.enter(client.ip(), proxied, &config);
    let pass = match pass {
        Ok(pass) if !full && !shard.has_too_many_logins() && !shard.stopping.get() => pass,
        _ => {
            shard.gauges.turned_away.one();
            let answer = Answer::text(503, "too many sessions").with("Retry-After", "10");
            return exchange.answer(answer).await;
        }
    };
    let pair = UnixStream::pair()
        .and_then(|(near, far)| Ok((Socket::try_from(near)?, Socket::try_from(far)?)));
    let Ok((near, far)) = pair else {
        let answer = Answer::text(503, "no descriptors left").with("Retry-After", "10");
        return exchange.answer(answer).await;
    };
    let sid = new_sid(&shard);
    let wait = body.wait.unwrap_or(0).min(config.web.bosh_wait_seconds_max);
    let hold = body.hold.unwrap_or(1).min(HOLD_MAX as u64) as usize;
    let hold = if wait == 0 { 0 } else { hold };
    let inactivity = config.web.bosh_inactivity_seconds_max;
    let now_ms = shard.now_ms();
    let link = shard.links.borrow_mut().insert(Kind::Bosh);
    if shard.readiness.add(&near, link).is_err() {
        shard.links.borrow_mut().remove(link);
        return Err(Gone);
    }
    let requests = hold + 1;
    let greeting = format!(
        " sid='{sid}' ver='{VERSION}' wait='{wait}' hold='{hold}' requests='{requests}' inactivity='{inactivity}' \
         polling='{}' maxpause='{}' from='{}' ack='{rid}' xmpp:version='1.0' xmpp:restartlogic='true' xmlns:xmpp='{NS_XBOSH}'",
        config.web.bosh_polling_seconds_min, config.web.bosh_pause_seconds_max, config.domain,
    );
    let session = Rc::new(RefCell::new(Session {
        end: Transport::plain(near),
        link,
        rid: rid - 1,
        hold,
        // the greeting takes its time
        wait_ms: config.limits.auth_seconds_max * 1000,
        held: VecDeque::new(),
        early: BTreeMap::new(),
        kept: VecDeque::new(),
        framer: Framer::new(),
        unfinished: Vec::new(),
        tail: false,
        silent_since_ms: now_ms,
        silent_ms_max: inactivity * 1000,
        polled_ms: 0,
        had_nothing: false,
        greeting: Some(greeting),
        closed: false,
        over: None,
        said: false,
    }));
    {
        let mut sessions = shard.bosh.borrow_mut();
        sessions.by_id.insert(sid.as_str().into(), session.clone());
        sessions.by_link.insert(link, sid.as_str().into());
    }
    shard.gauges.bosh_sessions.one();
    let stream = WebStream {
        transport: Transport::plain(far),
        client,
        proxied,
        // channel bindings belong to a connection, and this is none
        encrypted,
        pass,
        guest: None,
        accepted_us: shard.now_us(),
        framer: Framer::new(),
    };
    rt::spawn(Queue::Login, login::begin_stream(shard.clone(), stream));
    let mut request = body.request;
    let mut header = stream_header(body.to.as_deref(), body.lang.as_deref());
    header.append(&mut request.payload);
    request.payload = header;
    request.restart = None;
    let reply = take(&shard, &session, rid, request);
    respond(exchange, &session, &sid, rid, reply).await?;
    // what waits no longer for its greeting waits as agreed
    session.borrow_mut().wait_ms = wait.max(1) * 1000;
    Ok(After::Next)
}

fn stream_header(to: Option<&str>, lang: Option<&str>) -> Vec<u8> {
    let mut header =
        format!("<stream:stream xmlns='{NS_CLIENT}' xmlns:stream='{NS_STREAMS}' version='1.0'")
            .into_bytes();
    for (name, value) in [("to", to), ("xml:lang", lang)] {
        if let Some(value) = value {
            header.extend_from_slice(format!(" {name}='").as_bytes());
            escape_attr(value, &mut header);
            header.push(b'\'');
        }
    }
    header.push(b'>');
    header
}

/// Takes a request: its answer, or the place where that will come.
fn take(
    shard: &Shard,
    session: &Rc<RefCell<Session>>,
    rid: u64,
    request: Request,
) -> Result<Reply, rt::Slot<Reply>> {
    let config = shard.config.borrow().clone();
    let mut session = session.borrow_mut();
    let (setter, slot) = slot();
    if rid <= session.rid {
        // section 14.3: asked again
        if let Some((_, reply)) = session.kept.iter().find(|(kept, _)| *kept == rid) {
            return Ok(reply.clone());
        }
        if let Some(held) = session.held.iter_mut().find(|(held, _)| *held == rid) {
            held.1 = setter;
            return Err(slot);
        }
        return Ok(session.end(shard, "item-not-found"));
    }
    // section 14.2: no further ahead than the requests that may be open at a time
    if rid > session.rid + session.hold as u64 + 1 {
        return Ok(session.end(shard, "item-not-found"));
    }
    session.early.insert(rid, (request, setter));
    let mut next = session.rid + 1;
    while let Some((request, setter)) = session.early.remove(&next) {
        session.rid = next;
        if let Some(condition) = session.proceed(shard, &config, next, request, setter) {
            session.end(shard, condition);
            break;
        }
        next += 1;
    }
    session.pump(shard);
    Err(slot)
}

impl Session {
    /// Handles a request whose turn it is. An error is the condition with which the session ends.
    fn proceed(
        &mut self,
        shard: &Shard,
        config: &crate::config::Config,
        rid: u64,
        request: Request,
        setter: SlotSetter<Reply>,
    ) -> Option<&'static str> {
        let now_ms = shard.now_ms();
        // the client has all but the answers that may be open
        let open = self.hold as u64 + 1;
        while self
            .kept
            .front()
            .is_some_and(|(kept, _)| kept + open <= rid)
        {
            self.kept.pop_front();
        }
        let empty = request.payload.is_empty() && !request.terminate && request.restart.is_none();
        let pause_ms = request.pause_ms.filter(|_| self.greeting.is_none());
        if self.hold == 0 && empty && pause_ms.is_none() && self.greeting.is_none() {
            // section 12
            let least_ms = config.web.bosh_polling_seconds_min * 1000;
            if now_ms < self.polled_ms + least_ms && self.had_nothing {
                self.held.push_back((rid, setter));
                return Some("policy-violation");
            }
            self.polled_ms = now_ms;
        }
        self.held.push_back((rid, setter));
        let mut bytes = Vec::new();
        if let Some(to) = &request.restart {
            let to = Some(to.as_str()).filter(|to| !to.is_empty());
            bytes = stream_header(to.or(Some(&config.domain)), None);
        }
        bytes.extend_from_slice(&request.payload);
        if request.terminate {
            bytes.extend_from_slice(b"</stream:stream>");
        }
        if self.over.is_none() && !bytes.is_empty() {
            // slow: the owner reads no faster than it handles, so what waits here is bounded too
            if self.end.pending() + bytes.len() > config.limits.send_queue_bytes_max
                || self
                    .end
                    .write(&bytes, &mut shard.scratch.borrow_mut())
                    .is_err()
            {
                return Some("policy-violation");
            }
        }
        self.silent_ms_max = config.web.bosh_inactivity_seconds_max * 1000;
        if let Some(pause_ms) = pause_ms {
            // section 10: all are answered, and the client may be away
            self.silent_ms_max = pause_ms.min(config.web.bosh_pause_seconds_max * 1000);
            while !self.held.is_empty() {
                self.answer(&[], now_ms);
            }
        }
        None
    }

    /// Answers what can be answered.
    fn pump(&mut self, shard: &Shard) {
        let now_ms = shard.now_ms();
        if self.held.is_empty() {
            return;
        }
        let mut payload = Vec::new();
        self.read(&mut payload);
        if let Some(condition) = self.over {
            if !self.held.is_empty() {
                self.say_over(&payload, condition);
            }
            return;
        }
        if !payload.is_empty() {
            self.answer(&payload, now_ms);
        }
        while self.held.len() > self.hold && self.greeting.is_none() {
            self.answer(&[], now_ms);
        }
        if self.kept.iter().all(|(_, reply)| is_empty(reply))
            && self.unfinished.is_empty()
            && self.tail
        {
            // the client must have everything
            let _ = self.end.socket().recv(&mut [0; 1]);
            self.tail = false;
        }
    }

    /// Takes whole elements out of the pair.
    fn read(&mut self, payload: &mut Vec<u8>) {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let seen = match self.end.socket().peek(&mut piece) {
                Ok(0) => {
                    self.over.get_or_insert("");
                    break;
                }
                Ok(seen) => seen,
                Err(_) => break,
            };
            let known = usize::from(self.tail);
            if seen <= known {
                if self.closed {
                    self.over.get_or_insert("");
                }
                break;
            }
            self.unfinished.extend_from_slice(&piece[known..seen]);
            // all but the last byte: the owner sees that not all has arrived
            let _ = self.end.socket().recv(&mut piece[..seen - 1]);
            self.tail = true;
        }
        let mut at = 0;
        loop {
            let rest = &self.unfinished[at..];
            if rest.starts_with(b"<?xml") {
                self.framer.restart();
            }
            let frame = match self.framer.next(rest, &OWN) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(_) => {
                    self.over = Some("internal-server-error");
                    break;
                }
            };
            let element = &rest[..frame.len];
            match frame.kind {
                FrameKind::Element => {
                    if element.starts_with(b"<stream:error") {
                        self.over = Some("remote-stream-error");
                    }
                    match missing_declaration(element) {
                        None => payload.extend_from_slice(element),
                        Some((at, declaration)) => {
                            payload.extend_from_slice(&element[..at]);
                            payload.extend_from_slice(declaration.as_bytes());
                            payload.extend_from_slice(&element[at..]);
                        }
                    }
                }
                FrameKind::Header => {
                    if let Some(greeting) = &mut self.greeting {
                        let at = memchr::memmem::find(element, b"<stream:stream").unwrap_or(0);
                        let id = Attributes::of(&element[at..]).find(|(name, _)| *name == b"id");
                        let id = id.map(|(_, all)| String::from_utf8_lossy(all).into_owned());
                        greeting.push_str(&id.unwrap_or_default().replacen(" id=", " authid=", 1));
                    }
                }
                FrameKind::End => {
                    self.over.get_or_insert("");
                }
                FrameKind::Whitespace => {}
            }
            at += frame.len;
        }
        self.unfinished.drain(..at);
        if self.unfinished.is_empty() {
            self.unfinished = Vec::new();
        }
    }

    /// Answers the oldest held request.
    fn answer(&mut self, payload: &[u8], now_ms: u64) {
        let Some((rid, setter)) = self.held.pop_front() else {
            return;
        };
        self.had_nothing = payload.is_empty();
        let greeting = self.greeting.take().unwrap_or_default();
        // section 9: the highest id that was received with all before it, where it is another than the client expects
        let ack = match greeting.is_empty() && self.rid > rid {
            true => format!(" ack='{}'", self.rid),
            false => String::new(),
        };
        let mut reply =
            format!("<body xmlns='{NS}' xmlns:stream='{NS_STREAMS}'{greeting}{ack}").into_bytes();
        match payload.is_empty() {
            true => reply.extend_from_slice(b"/>"),
            false => {
                reply.push(b'>');
                reply.extend_from_slice(payload);
                reply.extend_from_slice(b"</body>");
            }
        }
        let reply: Reply = reply.into();
        self.kept.push_back((rid, reply.clone()));
        setter.set(reply);
        if self.held.is_empty() {
            self.silent_since_ms = now_ms;
        }
    }

    /// The request has waited as long as was agreed: its answer, if it has none yet.
    fn expire(&mut self, rid: u64, now_ms: u64) -> Option<Reply> {
        while self.held.iter().any(|(held, _)| *held <= rid) {
            self.answer(&[], now_ms);
        }
        let kept = self.kept.iter().find(|(kept, _)| *kept == rid);
        kept.map(|(_, reply)| reply.clone())
    }

    /// Tells the end, with what was still to be said.
    fn say_over(&mut self, payload: &[u8], condition: &str) {
        let mut reply = format!("<body xmlns='{NS}' xmlns:stream='{NS_STREAMS}' type='terminate'");
        if !condition.is_empty() {
            reply.push_str(&format!(" condition='{condition}'"));
        }
        let mut reply = reply.into_bytes();
        reply.push(b'>');
        reply.extend_from_slice(payload);
        reply.extend_from_slice(b"</body>");
        let reply: Reply = reply.into();
        while let Some((rid, setter)) = self.held.pop_front() {
            self.kept.push_back((rid, reply.clone()));
            setter.set(reply.clone());
            self.said = true;
        }
        self.early.clear();
    }

    /// A breach of the protocol ends the session; the answer that says so.
    fn end(&mut self, shard: &Shard, condition: &'static str) -> Reply {
        shard.gauges.bosh_refused.one();
        self.over = Some(condition);
        self.say_over(&[], condition);
        self.said = true;
        terminate(condition).into()
    }
}

fn is_empty(reply: &[u8]) -> bool {
    reply.ends_with(b"/>")
        && !reply.starts_with(b"<body xmlns='http://jabber.org/protocol/httpbind' type=")
}

impl Shard {
    /// The owner has written something for a session that is kept here, or has closed it.
    pub(in crate::shard) fn bosh_ready(&self, link: u64, closed: bool) {
        let sid = self.bosh.borrow().by_link.get(&link).cloned();
        let Some(sid) = sid else { return };
        let session = self.bosh.borrow().by_id.get(&sid).cloned();
        let Some(session) = session else { return };
        if session.borrow_mut().end.flush().is_err() {
            session.borrow_mut().over.get_or_insert("");
        }
        session.borrow_mut().closed |= closed;
        session.borrow_mut().pump(self);
        self.bosh_reap(&session, &sid);
    }

    /// Ends what is silent too long; the user's session may be resumed.
    pub(in crate::shard) fn bosh_tick(&self, now_ms: u64) {
        let silent: Vec<_> = self
            .bosh
            .borrow()
            .by_id
            .iter()
            .filter(|(_, session)| {
                let session = session.borrow();
                session.held.is_empty() && now_ms > session.silent_since_ms + session.silent_ms_max
            })
            .map(|(sid, session)| (sid.clone(), session.clone()))
            .collect();
        for (sid, session) in silent {
            self.bosh_remove(&session, &sid);
        }
    }

    /// Forgets a session whose client has heard of its end.
    fn bosh_reap(&self, session: &Rc<RefCell<Session>>, sid: &str) {
        if session.borrow().said {
            self.bosh_remove(session, sid);
        }
    }

    fn bosh_remove(&self, session: &Rc<RefCell<Session>>, sid: &str) {
        let session = session.borrow();
        let mut sessions = self.bosh.borrow_mut();
        sessions.by_id.remove(sid);
        sessions.by_link.remove(&session.link);
        self.links.borrow_mut().remove(session.link);
        self.readiness.remove(session.end.socket());
        let _ = session.end.socket().shutdown();
    }
}

/// The id of a session: random bytes, and the keeper's number hidden behind them.
fn new_sid(shard: &Shard) -> String {
    let mut id = [0; ID_BYTES + 2];
    aws_lc_rs::rand::fill(&mut id[..ID_BYTES]).expect("the system gives random bytes");
    let hidden = (shard.number as u16) ^ veil(&shard.doors.key(), &id[..ID_BYTES]);
    id[ID_BYTES..].copy_from_slice(&hidden.to_be_bytes());
    BASE64_URL_SAFE_NO_PAD.encode(id)
}

/// The shard that keeps the session; `None`: there is no such shard, so no such session.
fn keeper(shard: &Shard, sid: &str) -> Option<usize> {
    let id = BASE64_URL_SAFE_NO_PAD.decode(sid).ok()?;
    let (random, hidden) = id.split_at_checked(ID_BYTES)?;
    let hidden = u16::from_be_bytes(hidden.try_into().ok()?);
    let keeper = usize::from(hidden ^ veil(&shard.doors.key(), random));
    (keeper < shard.slice.borrow().env.ring.members()).then_some(keeper)
}

fn veil(key: &[u8; 32], random: &[u8]) -> u16 {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let tag = hmac::sign(&key, random);
    u16::from_be_bytes([tag.as_ref()[0], tag.as_ref()[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_read_as_in_the_example_of_xep_0124() {
        let text = "<body content='text/xml; charset=utf-8' from='user@example.com' hold='1' rid='1573741820' to='example.com' \
                    route='xmpp:example.com:9999' ver='1.6' wait='60' ack='1' xml:lang='en' xmlns='http://jabber.org/protocol/httpbind' \
                    xmpp:version='1.0' xmlns:xmpp='urn:xmpp:xbosh'/>";
        let body = read_body(text.as_bytes(), &Limits::default()).unwrap();
        assert_eq!(
            (body.rid, body.wait, body.hold),
            (Some(1573741820), Some(60), Some(1))
        );
        assert_eq!(
            (body.sid, body.to.as_deref(), body.lang.as_deref()),
            (None, Some("example.com"), Some("en"))
        );
        assert!(body.request.payload.is_empty() && body.request.restart.is_none());
        let text = "<body rid='1' sid='x' to='example.com' xml:lang='en' xmpp:restart='true' \
                    xmlns='http://jabber.org/protocol/httpbind' xmlns:xmpp='urn:xmpp:xbosh'/>";
        let body = read_body(text.as_bytes(), &Limits::default()).unwrap();
        assert_eq!(body.request.restart.as_deref(), Some("example.com"));
        for wrong in [
            "<body/>",
            "<a xmlns='http://jabber.org/protocol/httpbind'/>",
            "",
            "<body",
        ] {
            assert!(
                read_body(wrong.as_bytes(), &Limits::default()).is_none(),
                "{wrong}"
            );
        }
    }
}
