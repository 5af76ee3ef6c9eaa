//! BOSH at `/bosh` (XEP-0124, XEP-0206): an XMPP stream over requests that come one after the other, on whatever connections. In:
//! bodies of requests. Out: bodies of answers, as late as there is something to say or as the client agreed to wait.
//!
//! The session of requests is kept by the shard where it began; its id names that shard, encrypted, so a request that another core
//! has accepted goes there with its connection, which then stays. To the rest of the server it is a client on one end of a pair of
//! sockets ([`Transport`] on that end, the same gates, hand-over to the owner of the user, stream management): the keeper holds
//! the other end.
//!
//! Promise: stanzas of requests arrive once and in the order of their ids; an answer is kept until the client must have it and is
//! sent again when it asks again; what an answer has carried counts as delivered when a later request says that it has arrived
//! (section 9), and not before. A client that acknowledges (`ack`) says it with the next request. The others say it by the ids that
//! they have come to: the protocol bounds how many of their requests are open, not which, so an answer on a connection that stalls may be
//! older than that number. Only those before a window of as many and [`SPARE`] more ids count as arrived; who lets an answer
//! hang while he goes on beyond it may lose what it carried. A request that waits behind an unconfirmed answer is answered
//! sooner ([`CONFIRM_MS`]), to hear the next one. The owner learns how many bytes of its stream have arrived by a number that both
//! ends of the pair share. What is not confirmed when the session ends is delivered elsewhere or kept: nothing is lost but that, and
//! a client without `ack` that dies before it has come to the end of the window gets its last messages again.
//!
//! Not offered: several streams in one session (XEP-0124 section 16: no client asks), keys (section 15: what TLS does better),
//! answers by script (section 18).

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aws_lc_rs::{constant_time, hmac};
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
/// Bytes behind them: the keeper, hidden, and the proof that this server made the id.
const KEEPER_BYTES: usize = 2;
const PROOF_BYTES: usize = 8;
/// Highest request id (section 7.1).
const RID_MAX: u64 = (1 << 53) - 1;
/// Requests that the server holds open: one is enough to push (section 11).
const HOLD_MAX: usize = 1;
/// Ids beyond those of the requests that may be open whose answers may still be on their way, if the client does not acknowledge.
const SPARE: u64 = 3;
/// How long a request waits at most while it is not known whether the answers before it have arrived.
const CONFIRM_MS: u64 = 5000;
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
    /// The newest answers, each with the end in the owner's stream of what it has carried.
    kept: VecDeque<(u64, Reply, u64)>,
    /// Bytes of the owner's stream that answers have carried.
    carried: u64,
    /// Of them, those that have arrived for certain; the owner looks at it.
    arrived: Arc<AtomicU64>,
    /// The client acknowledges answers (section 9.2).
    acks: bool,
    framer: Framer,
    /// The unfinished element from the pair.
    unfinished: Vec<u8>,
    /// Since when no request is held, and for how long that may be.
    silent_since_ms: u64,
    silent_ms_max: u64,
    /// When an empty poll came last, and whether the newest answer was empty, too.
    polled_ms: u64,
    had_nothing: bool,
    /// The attributes of the answer that begins the session, until it is sent.
    greeting: Option<String>,
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
    /// The highest id of which all answers up to it have arrived; in the first request 1: there will be such.
    ack: Option<u64>,
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
            ack: number("ack"),
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
    let keeper = keeper(&sid_key(&shard), &sid);
    let shards = shard.slice.borrow().env.ring.members();
    // an id of before a restart, with more cores
    let keeper = keeper.map(|keeper| match keeper < shards {
        true => keeper,
        false => shard.number,
    });
    if let Some(other) = keeper.filter(|keeper| *keeper != shard.number) {
        return Ok(After::Move {
            shard: other,
            body: bytes,
        });
    }
    let session = shard.bosh.borrow().by_id.get(&*sid).cloned();
    let Some(session) = session.filter(|_| keeper.is_some()) else {
        // who guesses waits, longer each time; who had a session that is no more does not
        if keeper.is_none() {
            shard.gauges.bosh_unknown.one();
            let (client, _) = exchange.client();
            let pause = shard.doors.guessed(client.ip(), &exchange.config);
            rt::sleep(pause).await;
        }
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
            let wait = Duration::from_millis(session.borrow().waits_ms());
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
    let sid = new_sid(&sid_key(&shard), shard.number);
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
    let arrived = Arc::new(AtomicU64::new(0));
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
        carried: 0,
        arrived: arrived.clone(),
        acks: body.request.ack == Some(1),
        framer: Framer::new(),
        unfinished: Vec::new(),
        silent_since_ms: now_ms,
        silent_ms_max: inactivity * 1000,
        polled_ms: 0,
        had_nothing: false,
        greeting: Some(greeting),
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
        transport: Transport::relayed(far, arrived),
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
        if let Some((_, reply, _)) = session.kept.iter().find(|(kept, ..)| *kept == rid) {
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
        // one that pauses or ends the session may be one more than may be open (sections 10 and 11)
        let more = request.pause_ms.is_some() || request.terminate;
        let unsure = self.hold as u64 + 1 + SPARE + u64::from(more);
        self.confirm(rid, &request, unsure);
        while self
            .kept
            .front()
            .is_some_and(|(kept, ..)| kept + unsure <= rid)
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
            if self.end.pending() + bytes.len() > config.limits.send_queue_bytes_max {
                return Some("policy-violation");
            }
            // an owner that takes no more has said why, and that is still to be read
            let _ = self.end.write(&bytes, &mut shard.scratch.borrow_mut());
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

    /// Which answers have arrived, as the request with this id says (section 9); of the last `unsure` ids it does not say it by itself.
    fn confirm(&mut self, rid: u64, request: &Request, unsure: u64) {
        if self.acks && request.ack.is_none() && !self.held.is_empty() {
            // it claims to have the answer to a request that has none: it only said that it would acknowledge
            self.acks = false;
        }
        let through = match request.ack {
            Some(ack) if self.acks => ack.min(rid - 1),
            None if self.acks => rid - 1,
            _ => rid.saturating_sub(unsure),
        };
        let arrived = self.kept.iter().filter(|(kept, ..)| *kept <= through);
        if let Some(end) = arrived.map(|(.., end)| *end).max() {
            self.arrived.fetch_max(end, Ordering::Release);
        }
    }

    /// How long the newest request waits for something to say, ms.
    fn waits_ms(&self) -> u64 {
        match self.greeting.is_none() && self.carried > self.arrived.load(Ordering::Relaxed) {
            true => self.wait_ms.min(CONFIRM_MS),
            false => self.wait_ms,
        }
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
    }

    /// Takes whole elements out of the pair.
    fn read(&mut self, payload: &mut Vec<u8>) {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match self.end.socket().recv(&mut piece) {
                Ok(taken @ 1..) => self.unfinished.extend_from_slice(&piece[..taken]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Ok(0) | Err(_) => {
                    self.over.get_or_insert("");
                    break;
                }
            }
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
        self.carried += at as u64;
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
        self.kept.push_back((rid, reply.clone(), self.carried));
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
        let kept = self.kept.iter().find(|(kept, ..)| *kept == rid);
        kept.map(|(_, reply, _)| reply.clone())
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
            self.kept.push_back((rid, reply.clone(), self.carried));
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

impl Shard {
    /// The owner has written something for a session that is kept here, or has closed it.
    pub(in crate::shard) fn bosh_ready(&self, link: u64) {
        let sid = self.bosh.borrow().by_link.get(&link).cloned();
        let Some(sid) = sid else { return };
        let session = self.bosh.borrow().by_id.get(&sid).cloned();
        let Some(session) = session else { return };
        // an owner that takes no more has said why, and that is still to be read
        let _ = session.borrow_mut().end.flush();
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

/// What ids of sessions are made with; the same after a restart.
fn sid_key(shard: &Shard) -> hmac::Key {
    let master = hmac::Key::new(hmac::HMAC_SHA256, &shard.slice.borrow().env.login_key);
    let key = hmac::sign(&master, b"nitro bosh sid");
    hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())
}

/// The id of a session: random bytes, the keeper's number hidden behind them, and the proof that they were made here.
fn new_sid(key: &hmac::Key, keeper: usize) -> String {
    let mut id = [0; ID_BYTES + KEEPER_BYTES + PROOF_BYTES];
    let (random, rest) = id.split_at_mut(ID_BYTES);
    aws_lc_rs::rand::fill(random).expect("the system gives random bytes");
    let (veil, proof) = veil(key, random);
    let (hidden, proven) = rest.split_at_mut(KEEPER_BYTES);
    hidden.copy_from_slice(&(keeper as u16 ^ veil).to_be_bytes());
    proven.copy_from_slice(&proof);
    BASE64_URL_SAFE_NO_PAD.encode(id)
}

/// The shard that keeps the session, or kept it; `None`: this server never gave such an id.
fn keeper(key: &hmac::Key, sid: &str) -> Option<usize> {
    let id = BASE64_URL_SAFE_NO_PAD.decode(sid).ok()?;
    let (random, rest) = id.split_at_checked(ID_BYTES)?;
    let (hidden, proven) = rest.split_at_checked(KEEPER_BYTES)?;
    let (veil, proof) = veil(key, random);
    constant_time::verify_slices_are_equal(proven, &proof).ok()?;
    let hidden = u16::from_be_bytes(hidden.try_into().ok()?);
    Some(usize::from(hidden ^ veil))
}

fn veil(key: &hmac::Key, random: &[u8]) -> (u16, [u8; PROOF_BYTES]) {
    let tag = hmac::sign(key, random);
    let tag = tag.as_ref();
    let mut proof = [0; PROOF_BYTES];
    proof.copy_from_slice(&tag[KEEPER_BYTES..KEEPER_BYTES + PROOF_BYTES]);
    (u16::from_be_bytes([tag[0], tag[1]]), proof)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_names_its_keeper_to_this_server_alone_and_none_can_be_made_up() {
        let key = |n| hmac::Key::new(hmac::HMAC_SHA256, &[n; 32]);
        let sid = new_sid(&key(1), 3);
        assert_eq!(keeper(&key(1), &sid), Some(3));
        assert_ne!(sid, new_sid(&key(1), 3));
        assert_eq!(keeper(&key(2), &sid), None);
        for wrong in [
            "",
            "A",
            &"A".repeat(sid.len()),
            &sid[1..],
            &format!("{sid}AAAA"),
        ] {
            assert_eq!(keeper(&key(1), wrong), None, "{wrong}");
        }
    }

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
