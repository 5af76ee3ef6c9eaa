//! Stream management (XEP-0198): what was sent is kept until the client has it; a session whose connection broke waits
//! for its client and goes on without loss. What may be acknowledged to the client is decided in [`super::super::accept`].

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::{Feature, NONE, NonzaRoute, offline, push};
use crate::store::change::StreamCount;
use crate::store::recovery::stream_key;
use crate::xml::view::View;
use crate::xmpp::accept::is_behind;
use crate::xmpp::error::StreamError;
use crate::xmpp::jid::Jid;
use crate::xmpp::ledger::Act;
use crate::xmpp::message;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:xmpp:sm:3";

pub static FEATURE: Feature = Feature {
    name: "Stream management",
    spec: "XEP-0198",
    version: "1.6.3",
    stream: Some(|_| format!("<sm xmlns='{NS}'/>")),
    nonza: &[
        NonzaRoute {
            name: "enable",
            ns: NS,
            handle: enable,
        },
        NonzaRoute {
            name: "r",
            ns: NS,
            handle: asked,
        },
        NonzaRoute {
            name: "a",
            ns: NS,
            handle: acknowledged,
        },
        NonzaRoute {
            name: "resume",
            ns: NS,
            handle: resume_too_late,
        },
    ],
    ..NONE
};

/// `<r/>` of a client that may wait for their answer.
const ASKED_MAX: usize = 1024;

/// The state of one session with stream management.
#[derive(Debug)]
pub struct Sm {
    /// `previd` of a resumption; empty: cannot be resumed.
    pub id: Box<str>,
    /// How long it waits for its client; 0: it does not.
    pub resume_ms: u64,
    /// Stanzas sent, modulo 2^32.
    sent: u32,
    /// The last `h` of the client.
    acked: u32,
    kept: Kept,
    /// An `<r/>` is on its way.
    requested: bool,
    /// The count of the client's stanzas that the journal knows: it outlives a crash. The client is told no more.
    pub durable: u32,
    /// The count that is on its way there.
    counting: u32,
}

impl Sm {
    fn new(id: Box<str>, resume_ms: u64) -> Sm {
        Sm {
            id,
            resume_ms,
            sent: 0,
            acked: 0,
            kept: Kept::default(),
            requested: false,
            durable: 0,
            counting: 0,
        }
    }

    /// A stanza goes out: counted and kept.
    pub fn sent(&mut self, parts: &[&[u8]], meta: Meta, id: u64) {
        self.sent = self.sent.wrapping_add(1);
        self.kept.push(parts, meta, id);
    }

    /// Is more kept than a client may leave unacknowledged?
    pub fn over(&self, bytes_max: usize, stanzas_max: usize) -> bool {
        self.kept.over(bytes_max, stanzas_max)
    }

    /// Stanzas that the client has not acknowledged.
    pub fn waiting(&self) -> usize {
        self.kept.entries.len()
    }

    /// The newest pending delivery that the client has not acknowledged, of those that say something or, if none does, of all.
    pub fn newest_pending(&self) -> Option<(&[u8], Meta)> {
        self.kept.newest_pending()
    }

    /// Asks for an acknowledgement behind what goes out now, unless one is on its way.
    pub fn ask(&mut self, out: &mut Vec<u8>) {
        if !self.requested && !self.kept.entries.is_empty() && !out.is_empty() {
            self.requested = true;
            out.extend_from_slice(b"<r xmlns='urn:xmpp:sm:3'/>");
        }
    }

    /// The client has `h` stanzas; gives the pending deliveries among them. `Err`: it was never sent so many.
    fn acknowledge(&mut self, h: u32) -> Result<SmallVec<[u64; 16]>, u32> {
        let new = h.wrapping_sub(self.acked);
        if new as usize > self.kept.entries.len() {
            return Err(self.sent);
        }
        let mut taken = SmallVec::new();
        for _ in 0..new {
            taken.extend(self.kept.pop().filter(|id| *id != 0));
        }
        self.acked = h;
        Ok(taken)
    }

    /// Takes out everything that was not acknowledged.
    pub fn unacknowledged(&mut self) -> Vec<(Box<[u8]>, Meta, u64)> {
        self.kept.take_all()
    }
}

/// Sent stanzas in one buffer, oldest first; owns nothing when empty.
#[derive(Debug, Default)]
pub struct Kept {
    bytes: Vec<u8>,
    head: usize,
    /// Length, kind, and the id of the pending delivery or 0.
    entries: VecDeque<(u32, Meta, u64)>,
}

impl Kept {
    pub fn over(&self, bytes_max: usize, stanzas_max: usize) -> bool {
        self.bytes() > bytes_max || self.entries.len() > stanzas_max
    }

    pub fn push(&mut self, parts: &[&[u8]], meta: Meta, id: u64) {
        let before = self.bytes.len();
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        self.entries
            .push_back(((self.bytes.len() - before) as u32, meta, id));
    }

    fn newest_pending(&self) -> Option<(&[u8], Meta)> {
        let mut newest = None;
        let mut end = self.bytes.len();
        for (len, meta, id) in self.entries.iter().rev() {
            let begin = end - *len as usize;
            if *id != 0 {
                let this = Some((&self.bytes[begin..end], *meta));
                if meta.is_said() {
                    return this;
                }
                newest = newest.or(this);
            }
            end = begin;
        }
        newest
    }

    /// Takes out everything.
    pub fn take_all(&mut self) -> Vec<(Box<[u8]>, Meta, u64)> {
        let kept = std::mem::take(self);
        let mut rest = &kept.bytes[kept.head..];
        let mut all = Vec::with_capacity(kept.entries.len());
        for (len, meta, id) in &kept.entries {
            let (stanza, next) = rest.split_at(*len as usize);
            all.push((stanza.into(), *meta, *id));
            rest = next;
        }
        all
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes out the oldest one; its id.
    pub fn pop(&mut self) -> Option<u64> {
        let (len, _, id) = self.entries.pop_front()?;
        self.head += len as usize;
        if self.entries.is_empty() {
            *self = Kept::default();
        } else if self.head > 16 * 1024 && self.head * 2 > self.bytes.len() {
            self.bytes.drain(..self.head);
            self.head = 0;
        }
        Some(id)
    }

    fn bytes(&self) -> usize {
        self.bytes.len() - self.head
    }

    fn all(&self) -> &[u8] {
        &self.bytes[self.head..]
    }
}

/// What `<enable/>` asks for.
#[derive(Clone, Debug)]
pub struct Wish {
    resume: bool,
    max_ms: Option<u64>,
}

impl Wish {
    /// By its attributes `resume` and `max`.
    pub fn new(resume: Option<&str>, max: Option<&str>) -> Wish {
        Wish {
            resume: matches!(resume, Some("true" | "1")),
            max_ms: max
                .and_then(|max| max.parse::<u64>().ok())
                .map(|s| s.saturating_mul(1000)),
        }
    }
}

fn enable(slice: &mut Slice, sid: SessionId, view: &View<'_>) -> Result<(), StreamError> {
    let wish = Wish::new(view.attr("resume").as_deref(), view.attr("max").as_deref());
    match begin(slice, sid, &wish) {
        Some(answer) => slice.send_raw(sid, answer.as_bytes()),
        None => slice.send_raw(sid, &failed("unexpected-request", None)),
    }
    Ok(())
}

/// Enables stream management; the answer. `None`: it is enabled already.
pub fn begin(slice: &mut Slice, sid: SessionId, wish: &Wish) -> Option<String> {
    let most_ms = slice.env.limits.resume_ms_max;
    let session = slice
        .sessions
        .get_mut(sid)
        .filter(|session| session.sm.is_none())?;
    let resume_ms = match wish.resume {
        true => wish.max_ms.unwrap_or(most_ms).min(most_ms),
        false => 0,
    };
    let id: Box<str> = if resume_ms > 0 {
        crate::xmpp::random_id().into()
    } else {
        "".into()
    };
    let answer = if resume_ms > 0 {
        format!(
            "<enabled xmlns='{NS}' id='{id}' resume='true' max='{}'/>",
            resume_ms / 1000
        )
    } else {
        format!("<enabled xmlns='{NS}'/>")
    };
    session.sm = Some(Box::new(Sm::new(id, resume_ms)));
    // XEP-0198 section 4: counting starts with <enable/>
    session.accept = Default::default();
    Some(answer)
}

fn asked(slice: &mut Slice, sid: SessionId, _: &View<'_>) -> Result<(), StreamError> {
    let Some(session) = slice.sessions.get_mut(sid) else {
        return Ok(());
    };
    if session.sm.is_none() {
        return Err(StreamError::text(
            "unsupported-stanza-type",
            "stream management is not enabled",
        ));
    }
    if !session.accept.ask(ASKED_MAX) {
        return Err(StreamError::text(
            "policy-violation",
            "too many unanswered requests for acknowledgement",
        ));
    }
    answer_asked(slice, sid);
    Ok(())
}

/// Sends the acknowledgements that are due.
pub fn answer_asked(slice: &mut Slice, sid: SessionId) {
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    while let Some((asked, h)) = session.accept.due() {
        let Some(sm) = &mut session.sm else { return };
        // who cannot resume has no use for a count after a crash
        let h = match sm.resume_ms {
            0 => h,
            _ if is_behind(sm.durable, asked) => return count(slice, sid),
            _ if is_behind(sm.durable, h) => sm.durable,
            _ => h,
        };
        session.accept.answered();
        if session.link.is_some() {
            push_ack(h, &mut session.out);
        }
    }
    slice.touched(sid);
}

/// Has the count of decided stanzas journalled, when those themselves are not (presence, requests).
fn count(slice: &mut Slice, sid: SessionId) {
    let ms = slice.now.ms;
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    let h = session.accept.h();
    let Some(sm) = session.sm.as_mut().filter(|sm| is_behind(sm.counting, h)) else {
        return;
    };
    sm.counting = h;
    let count = StreamCount {
        stream: stream_key(&sm.id),
        count: h,
    };
    let user = session.user.clone();
    slice.ledger.count([count].into_iter(), ms);
    let act = Act::Counted {
        session: sid,
        count: h,
    };
    slice.ledger.queue(&user, act);
}

/// The journal knows so many stanzas of the session.
pub fn counted(slice: &mut Slice, sid: SessionId, count: u32) {
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    if let Some(sm) = &mut session.sm {
        if is_behind(sm.durable, count) {
            sm.durable = count;
        }
        if is_behind(sm.counting, count) {
            sm.counting = count;
        }
    }
    if session.settling {
        let name = session.user.clone();
        slice.fx.loaded.push(name);
    }
    answer_asked(slice, sid);
}

fn push_ack(h: u32, out: &mut Vec<u8>) {
    use std::io::Write;
    write!(out, "<a xmlns='{NS}' h='{h}'/>").expect("writing to memory succeeds");
}

fn acknowledged(slice: &mut Slice, sid: SessionId, view: &View<'_>) -> Result<(), StreamError> {
    let Some(session) = slice.sessions.get_mut(sid) else {
        return Ok(());
    };
    let (Some(sm), Some(h)) = (
        &mut session.sm,
        view.attr("h").and_then(|h| h.parse::<u32>().ok()),
    ) else {
        return Err(StreamError::text(
            "policy-violation",
            "an acknowledgement without enabled stream management or h",
        ));
    };
    sm.requested = false;
    match sm.acknowledge(h) {
        Ok(taken) => {
            let user = session.user.clone();
            // what came out meanwhile is asked for at the end of the turn
            if !sm.kept.entries.is_empty() {
                session.out.extend_from_slice(b"<r xmlns='urn:xmpp:sm:3'/>");
                sm.requested = true;
                slice.touched(sid);
            }
            for id in taken {
                slice.taken(&user, id);
            }
            Ok(())
        }
        Err(sent) => Err(too_high(h, sent)),
    }
}

/// XEP-0198 section 6.
fn too_high(h: u32, sent: u32) -> StreamError {
    StreamError::text("undefined-condition", "h is higher than what was sent").detail(format!(
        "<handled-count-too-high xmlns='{NS}' h='{h}' send-count='{sent}'/>"
    ))
}

fn resume_too_late(slice: &mut Slice, sid: SessionId, _: &View<'_>) -> Result<(), StreamError> {
    slice.send_raw(sid, &failed("unexpected-request", None));
    Ok(())
}

/// `<failed/>` with a stanza error condition and the count where it is known.
pub fn failed(condition: &str, h: Option<u32>) -> Vec<u8> {
    let h = h.map(|h| format!(" h='{h}'")).unwrap_or_default();
    format!("<failed xmlns='{NS}'{h}><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>").into_bytes()
}

/// The session of `name` that `previd` names, whether it waits or its old connection still stands.
pub fn find(slice: &Slice, name: &str, previd: &str) -> Option<SessionId> {
    slice.user(name)?.sessions.iter().copied().find(|sid| {
        let sm = slice.sessions.get(*sid).and_then(|s| s.sm.as_ref());
        sm.is_some_and(|sm| sm.resume_ms > 0 && *sm.id == *previd)
    })
}

/// What the old connection of a session hears.
fn resumed_elsewhere() -> StreamError {
    StreamError::text("conflict", "resumed by another connection")
}

/// The client wants to resume: its old connection, if it still stands, is closed before anything else.
pub fn detach(slice: &mut Slice, sid: SessionId) {
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    if let Some(link) = session.link {
        slice.fx.close(link, &resumed_elsewhere());
        slice.cut(sid, "resumed by another connection");
    }
}

/// Is something that was read from the session not decided yet? Then its user is in [`Effects::loaded`] when all is.
///
/// [`Effects::loaded`]: crate::xmpp::slice::Effects::loaded
pub fn is_settling(slice: &mut Slice, sid: SessionId) -> bool {
    let Some(session) = slice.sessions.get_mut(sid) else {
        return false;
    };
    let h = session.accept.h();
    let durable = session
        .sm
        .as_ref()
        .is_none_or(|sm| !is_behind(sm.durable, h));
    session.settling = session.accept.waiting() > 0 || !durable;
    if session.accept.waiting() == 0 && !durable {
        count(slice, sid);
        return true;
    }
    session.settling
}

/// The client is back on a new connection with `h` stanzas: `<resumed/>`, then what it has not got.
/// `around`: what goes out before `<resumed/>` and directly behind it. The old connection must be closed before. `Err`: the
/// client claims more than it was sent; the session ended.
pub fn resume(
    slice: &mut Slice,
    sid: SessionId,
    link: u64,
    h: u32,
    around: (&[u8], &[u8]),
) -> Result<(), StreamError> {
    let ms = slice.now.ms;
    let Some(session) = slice.sessions.get_mut(sid) else {
        return Ok(());
    };
    super::csi::activate(session);
    let Some(sm) = &mut session.sm else {
        return Ok(());
    };
    let taken = match sm.acknowledge(h) {
        Ok(taken) => taken,
        Err(sent) => {
            slice.end(sid, None);
            return Err(too_high(h, sent));
        }
    };
    match session.link.replace(link) {
        None => slice.parked = slice.parked.saturating_sub(1),
        Some(old) => slice.fx.close(old, &resumed_elsewhere()),
    }
    session.heard_ms = ms;
    session.pinged = false;
    session.unsent = 0;
    session.out.clear();
    session.accept.forget_asked();
    let resumed = format!(
        "<resumed xmlns='{NS}' previd='{}' h='{}'/>",
        sm.id,
        session.accept.h()
    );
    session.out.extend_from_slice(around.0);
    session.out.extend_from_slice(resumed.as_bytes());
    session.out.extend_from_slice(around.1);
    session.out.extend_from_slice(sm.kept.all());
    sm.requested = false;
    let repeated = (sm.kept.bytes(), sm.kept.entries.len());
    session.settling = false;
    let user = session.user.clone();
    slice.counters.resumptions += 1;
    slice.touched(sid);
    slice.requeue(sid);
    for id in taken {
        slice.taken(&user, id);
    }
    slice.allow(sid, repeated);
    push::is_there(slice, sid);
    Ok(())
}

/// Nobody came back in time: the session ends, and what it was not known to have goes where it would go now.
pub fn expire(slice: &mut Slice, sid: SessionId) {
    let waiting = slice.sessions.get(sid).filter(|s| s.link.is_none());
    if let Some(session) = waiting {
        session.log_end("not resumed in time", false);
        slice.end(sid, None);
    }
}

/// What a session that ends for good leaves unacknowledged (XEP-0198 section 5, RFC 6121 8.5.2): pending deliveries wait for
/// another client, requests are answered by an error, everything else is dropped.
pub fn redirect(slice: &mut Slice, user: &str, left: Vec<(Box<[u8]>, Meta, u64)>) {
    let comes_back = left.iter().any(|(_, _, id)| *id != 0);
    for (stanza, meta, id) in left {
        if id != 0 {
            offline::come_back(slice, user, id, stanza, meta);
            continue;
        }
        let wanted = match meta.kind {
            Kind::Chat | Kind::Normal => meta.has(Meta::BODY),
            Kind::IqGet | Kind::IqSet => true,
            _ => false,
        };
        if !wanted || meta.has(Meta::COPY) || meta.has(Meta::SERVER) {
            continue;
        }
        let Some(element) = crate::xmpp::parse_stanza(&stanza) else {
            continue;
        };
        let (Some(to), Some(from)) = (element.get("to"), element.get("from")) else {
            continue;
        };
        let Ok(to) = Jid::parse(to) else { continue };
        if meta.kind.is_iq() {
            slice.bounce(
                &to,
                from,
                &stanza,
                meta,
                &crate::xmpp::error::StanzaError::SERVICE_UNAVAILABLE,
            );
            continue;
        }
        message::redeliver(slice, &to, &stanza, meta);
    }
    offline::deliver_again(slice, user);
    if comes_back {
        push::came_back(slice, user);
    }
}
