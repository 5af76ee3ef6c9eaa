//! Push notifications (XEP-0357): a user whose clients are all away or asleep is told by an app server that something waits.
//!
//! In: `<enable/>` and `<disable/>` of the user's own clients, messages that wait for him, and the app servers' answers. Out: one
//! publish request for each of his services when something begins to wait, by the owner of the user and in his name. His
//! services are a part of his record, so that a message for somebody without a session costs no read for them, and a change is
//! answered when it is durable.
//!
//! **When.** A message waits in the offline queue, or all his sessions that have it are cut off (XEP-0198) or say that they are
//! inactive (XEP-0352, `push.inactive`). After that nothing more is said until one of his clients is there again or has
//! taken all that waited, or `push.repeat_minutes` have passed. Receipts, markers, chat states, what he has written himself and what his block list
//! keeps out say nothing. A message with a body is said with `last-message-body`, which app servers show and deliver with high
//! priority; others (encrypted ones, invitations) without.
//!
//! **Failures.** An error that waiting does not mend disables the service (section 7.1). One that it may mend, or no answer within
//! `push.answer_seconds_max`, is tried again, first after `push.retry_seconds`, then after twice as many and so on up to an hour, until
//! something is there no more; after `push.tries_max` times the service is disabled as well. Times at
//! which its component was not connected do not count.
//!
//! Not promised: what was not published when the process ends is published only if another message comes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;

use fnv::FnvHashMap;
use smallvec::SmallVec;

use super::{Feature, Incoming, Iq, IqRoute, NONE, Target, hints};
use crate::store::record::PushService;
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::{self, Field, Form, Values};
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::pubsub;
use crate::xmpp::session::{Session, SessionId};
use crate::xmpp::slice::{Slice, Then, User};

pub const NS: &str = "urn:xmpp:push:0";
const NS_OPTIONS: &str = "http://jabber.org/protocol/pubsub#publish-options";
const NS_SUMMARY: &str = "urn:xmpp:push:summary";
const NS_DATA: &str = "jabber:x:data";

pub static FEATURE: Feature = Feature {
    name: "Push notifications",
    spec: "XEP-0357",
    version: "0.4.1",
    account: &[NS],
    on: |env| env.limits.push.services_max > 0,
    iq: &[
        IqRoute {
            name: "enable",
            ns: NS,
            target: Target::Account,
            handle: enable,
        },
        IqRoute {
            name: "disable",
            ns: NS,
            target: Target::Account,
            handle: disable,
        },
    ],
    message_in: Some(message_in),
    available: Some(available),
    ..NONE
};

/// From the section `push` of the configuration.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Of one user; 0: there are no push notifications.
    pub services_max: usize,
    /// Of one service, with its options.
    pub service_bytes_max: usize,
    /// Do notifications say who has written?
    pub sender: bool,
    /// Do they say what?
    pub body: bool,
    pub body_bytes_max: usize,
    /// Instead of the body; empty: nothing.
    pub placeholder: Box<str>,
    /// Does an inactive client count as one that is asleep?
    pub inactive: bool,
    pub repeat_ms: u64,
    /// Users who were told.
    pub told_max: usize,
    pub per_second_max: u32,
    /// Notifications that wait for an answer or for another try.
    pub waiting_max: usize,
    pub answer_ms_max: u64,
    pub retry_ms: u64,
    pub tries_max: u32,
}

/// Longest pause before another try.
const RETRY_MS_MAX: u64 = 3_600_000;
/// When a notification beyond [`Limits::per_second_max`] goes out.
const SLOWED_MS: u64 = 1000;
/// How often what is past is forgotten.
const SWEEP_MS: u64 = 60_000;

/// What a slice remembers of notifications.
#[derive(Default)]
pub struct Push {
    /// Users who were told and have not been there since, and until when that holds.
    told: FnvHashMap<Rc<str>, u64>,
    /// When to look through them.
    sweep_ms: u64,
    /// By number; a request's id names its number and what nobody can guess.
    waiting: FnvHashMap<u64, Notification>,
    /// Numbers by user.
    of: FnvHashMap<Rc<str>, SmallVec<[u64; 2]>>,
    /// When to look at one again: what is not in [`Notification::due_ms`] any more is past.
    due: BinaryHeap<Reverse<(u64, u64)>>,
    last: u64,
    /// What is left of [`Limits::per_second_max`], in thousandths, and since when.
    tokens: (u64, u64),
    pub counters: Counters,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub sent: u64,
    pub failed: u64,
    pub disabled: u64,
    /// Refused or left out by a limit.
    pub limited: u64,
}

/// One service is to be told that something waits for a user.
struct Notification {
    user: Rc<str>,
    jid: Box<str>,
    node: Box<str>,
    /// Failures before this try.
    failures: u32,
    /// Those of them that an app server is to blame for: not that it was not connected.
    tries: u32,
    due_ms: u64,
    state: State,
    news: News,
}

enum State {
    /// The request with this id is not answered yet. The user is pinned.
    Asked(Box<str>),
    /// Until it is due.
    Waits,
}

/// What a notification says of the newest message.
#[derive(Clone, Default)]
struct News {
    sender: Box<str>,
    /// Empty: it has none.
    body: Box<str>,
}

impl Push {
    /// Notifications that wait for an answer or for another try.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn put(&mut self, notification: Notification) -> u64 {
        self.last += 1;
        let user = notification.user.clone();
        self.of.entry(user).or_default().push(self.last);
        self.waiting.insert(self.last, notification);
        self.last
    }

    fn take(&mut self, number: u64) -> Option<Notification> {
        let taken = self.waiting.remove(&number)?;
        if let Some(numbers) = self.of.get_mut(&taken.user) {
            numbers.retain(|n| *n != number);
            if numbers.is_empty() {
                self.of.remove(&taken.user);
            }
        }
        Some(taken)
    }

    /// The notifications of a user.
    fn numbers(&self, name: &str) -> SmallVec<[u64; 2]> {
        self.of.get(name).cloned().unwrap_or_default()
    }

    fn look_again(&mut self, number: u64, due_ms: u64) {
        if let Some(notification) = self.waiting.get_mut(&number) {
            notification.due_ms = due_ms;
            self.due.push(Reverse((due_ms, number)));
        }
    }
}

// ---- services ------------------------------------------------------------------------------------------------------

fn enable(slice: &mut Slice, iq: Iq) {
    let service = match wanted(slice, &iq).and_then(|()| read(slice, &iq)) {
        Ok(service) => service,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let name = iq.account().to_owned();
    let Some(user) = slice.user(&name) else {
        return slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
    };
    let services = &user.record.get().push;
    let known = services
        .iter()
        .find(|s| is(s, &service.jid, Some(&service.node)));
    match known {
        Some(known) if *known.options == *service.options && user.revision == user.durable => {
            return slice.iq_result(&iq, None);
        }
        None if services.len() >= slice.env.limits.push.services_max => {
            slice.push.counters.limited += 1;
            let error = StanzaError::RESOURCE_CONSTRAINT.text("too many push services are enabled");
            return slice.iq_error(&iq, &error);
        }
        _ => {}
    }
    // whatever becomes of a request of before says nothing of the service as it is now
    forget(slice, &name, |n| {
        *n.jid == *service.jid && *n.node == *service.node
    });
    let change = move |services: &mut Vec<PushService>| {
        // section 5: the last received request counts
        services.retain(|s| (&s.jid, &s.node) != (&service.jid, &service.node));
        services.push(service);
    };
    slice.edit(&name, |record| change(&mut record.push), answer(iq));
}

fn disable(slice: &mut Slice, iq: Iq) {
    let checked = wanted(slice, &iq).and_then(|()| address(&iq.payload));
    let jid = match checked {
        Ok(jid) => jid.as_str().to_owned(),
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let node = iq.payload.get("node").map(str::to_owned);
    let name = iq.account().to_owned();
    let services = slice
        .user(&name)
        .map(|user| (&user.record.get().push, user));
    let none = services.is_none_or(|(services, user)| {
        let mut services = services.iter();
        user.revision == user.durable && !services.any(|s| is(s, &jid, node.as_deref()))
    });
    if none {
        return slice.iq_result(&iq, None);
    }
    forget(slice, &name, |n| {
        *n.jid == *jid && node.as_deref().is_none_or(|node| *n.node == *node)
    });
    let remove = |services: &mut Vec<PushService>| {
        let all = node.is_none();
        services.retain(|s| s.jid != jid || !(all || Some(&s.node) == node.as_ref()));
    };
    slice.edit(&name, |record| remove(&mut record.push), answer(iq));
}

fn is(service: &<PushService as rkyv::Archive>::Archived, jid: &str, node: Option<&str>) -> bool {
    *service.jid == *jid && node.is_none_or(|node| *service.node == *node)
}

fn answer(iq: Iq) -> Then {
    Box::new(move |slice, result| match result {
        Ok(()) => slice.iq_result(&iq, None),
        Err(error) => slice.iq_error(&iq, &StanzaError::from(error)),
    })
}

/// May the request be answered at all?
fn wanted(slice: &Slice, iq: &Iq) -> Result<(), StanzaError> {
    match () {
        // the same as where there is no such account
        _ if !iq.own() => Err(StanzaError::SERVICE_UNAVAILABLE),
        _ if slice.env.limits.push.services_max == 0 => Err(StanzaError::SERVICE_UNAVAILABLE),
        _ if !iq.set => Err(StanzaError::BAD_REQUEST),
        _ => Ok(()),
    }
}

fn address(payload: &Element) -> Result<Jid<'static>, StanzaError> {
    let jid = payload.get("jid").ok_or(StanzaError::BAD_REQUEST)?;
    let jid = Jid::parse(jid).map_err(|_| StanzaError::JID_MALFORMED)?;
    Ok(jid.into_owned())
}

/// The service that is to be enabled.
fn read(slice: &Slice, iq: &Iq) -> Result<PushService, StanzaError> {
    let jid = address(&iq.payload)?;
    if !slice.is_reached(&jid) {
        return Err(StanzaError::REMOTE_SERVER_NOT_FOUND);
    }
    let own_account = jid.as_str() == iq.from.bare();
    let own_services = jid.local().is_none() && slice.env.is_local(&jid);
    if own_account || own_services || slice.env.is_room(&jid) {
        return Err(StanzaError::NOT_ALLOWED.text("that is no app server"));
    }
    let options = match iq.payload.elements().find(|e| e.is("x", NS_DATA)) {
        None => String::new(),
        Some(x) => options(&Values::read(x, NS_OPTIONS)?),
    };
    let service = PushService {
        jid: jid.as_str().to_owned(),
        node: iq.payload.get("node").unwrap_or_default().to_owned(),
        options,
    };
    let bytes = service.jid.len() + service.node.len() + service.options.len();
    if bytes > slice.env.limits.push.service_bytes_max {
        return Err(StanzaError::POLICY_VIOLATION.text("node and options are too long"));
    }
    Ok(service)
}

/// The form as it is published.
fn options(values: &Values) -> String {
    let fields = values.iter().filter(|(var, _)| *var != form::FORM_TYPE);
    let form = fields.fold(
        Form::new(form::Kind::Submit, NS_OPTIONS),
        |form, (var, values)| form.field(Field::lists(var, values.iter().cloned())),
    );
    form.element().to_xml("")
}

// ---- when ----------------------------------------------------------------------------------------------------------

/// A message was delivered, or waits.
fn message_in(slice: &mut Slice, name: &str, message: &Incoming<'_>, taken: &[SessionId]) {
    if !message.meta.storable() || !has_services(slice, name) {
        return;
    }
    let awake = |sid: &SessionId| {
        let session = slice.sessions.get(*sid);
        session.is_some_and(|session| !is_asleep(slice, session))
    };
    if !taken.is_empty() && (taken.iter().any(awake) || is_attended(slice, name)) {
        return;
    }
    arrived(slice, name, message.from, message.stanza, message.meta);
}

/// A message that was accepted before its recipient was known waits for him.
pub fn decided(slice: &mut Slice, name: &str, from: &str, stanza: &[u8], meta: Meta) {
    if has_services(slice, name) && !is_attended(slice, name) {
        arrived(slice, name, from, stanza, meta);
    }
}

/// A session was cut off, and can be resumed: what it has not acknowledged waits.
pub fn cut_off(slice: &mut Slice, sid: SessionId) {
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let name = session.user.clone();
    if !has_services(slice, &name) || is_attended(slice, &name) {
        return;
    }
    let session = slice.sessions.get(sid);
    let newest = session.and_then(|session| session.sm.as_ref()?.newest_pending());
    if let Some((stanza, meta)) = newest {
        let stanza: Box<[u8]> = stanza.into();
        waits(slice, &name, &stanza, meta);
    }
}

/// Messages of a session that has ended wait again.
pub fn came_back(slice: &mut Slice, name: &str) {
    if !has_services(slice, name) || is_attended(slice, name) {
        return;
    }
    let user = slice.user(name);
    if let Some((stanza, meta)) = user.and_then(|user| user.offline.newest()) {
        let stanza: Box<[u8]> = stanza.into();
        waits(slice, name, &stanza, meta);
    }
}

fn waits(slice: &mut Slice, name: &str, stanza: &[u8], meta: Meta) {
    let parsed = crate::xmpp::parse_stanza(stanza);
    if let Some(from) = parsed.as_ref().and_then(|stanza| stanza.get("from")) {
        arrived(slice, name, from, stanza, meta);
    }
}

fn has_services(slice: &Slice, name: &str) -> bool {
    let user = slice.user(name);
    user.is_some_and(|user| !user.record.get().push.is_empty())
        && slice.env.limits.push.services_max > 0
}

fn is_asleep(slice: &Slice, session: &Session) -> bool {
    session.link.is_none() || (slice.env.limits.push.inactive && session.csi.inactive)
}

/// Has the user a session that takes messages and is awake?
fn is_attended(slice: &Slice, name: &str) -> bool {
    let sessions = slice.user(name).map(|user| &user.sessions[..]);
    sessions.unwrap_or_default().iter().any(|sid| {
        let session = slice.sessions.get(*sid);
        session.is_some_and(|session| session.takes_bare() && !is_asleep(slice, session))
    })
}

/// A resource became available.
fn available(slice: &mut Slice, sid: SessionId) {
    is_there(slice, sid);
}

/// A client of the user is there (again): he need not be told, and what comes when it has gone is new.
pub fn is_there(slice: &mut Slice, sid: SessionId) {
    if slice.push.told.is_empty() && slice.push.waiting.is_empty() {
        return;
    }
    let session = slice.sessions.get(sid);
    let there = session.filter(|session| session.takes_bare() && !is_asleep(slice, session));
    if let Some(name) = there.map(|session| session.user.clone()) {
        slice.push.told.remove(&name);
        forget(slice, &name, |notification| {
            matches!(notification.state, State::Waits)
        });
    }
}

/// His clients have taken all that waited for him: what comes now is new. So an inactive client whose connection stands hears of
/// each message that finds nothing else waiting.
pub fn all_taken(slice: &mut Slice, name: &str) {
    slice.push.told.remove(name);
}

// ---- what ----------------------------------------------------------------------------------------------------------

fn arrived(slice: &mut Slice, name: &str, from: &str, stanza: &[u8], meta: Meta) {
    let own =
        Jid::parse(from).is_ok_and(|from| slice.env.is_local(&from) && from.local() == Some(name));
    let now = slice.now.ms;
    let told = slice.push.told.get(name).is_some_and(|until| *until > now);
    if own || told {
        return;
    }
    let body = match meta.is_said() {
        true => Some(shown_body(slice, stanza)),
        false if says_something(stanza) => None,
        false => return,
    };
    let news = News {
        sender: match slice.env.limits.push.sender {
            true => from.into(),
            false => "".into(),
        },
        body: body.unwrap_or_default(),
    };
    let Some(user) = slice.user(name) else { return };
    let who = user.name.clone();
    let services = user.record.get().push.iter();
    let services: Vec<(Box<str>, Box<str>)> = services
        .map(|service| ((&*service.jid).into(), (&*service.node).into()))
        .collect();
    let mut said = false;
    let mut new = Vec::new();
    for (jid, node) in services {
        let numbers = slice.push.numbers(name);
        if numbers.iter().any(|number| {
            let waiting = slice.push.waiting.get(number);
            waiting.is_some_and(|n| n.jid == jid && n.node == node)
        }) {
            said = true;
            continue;
        }
        if slice.push.waiting.len() >= slice.env.limits.push.waiting_max {
            slice.push.counters.limited += 1;
            continue;
        }
        said = true;
        let notification = Notification {
            user: who.clone(),
            jid,
            node,
            failures: 0,
            tries: 0,
            due_ms: 0,
            state: State::Waits,
            news: news.clone(),
        };
        new.push(slice.push.put(notification));
    }
    // where there is no room to remember it he is told again
    if said && slice.push.told.len() < slice.env.limits.push.told_max {
        let until = now + slice.env.limits.push.repeat_ms;
        slice.push.told.insert(who, until);
    }
    for number in new {
        publish(slice, number);
    }
}

/// What a notification says of the body: nothing of it, unless the configuration says so.
fn shown_body(slice: &Slice, stanza: &[u8]) -> Box<str> {
    let limits = &slice.env.limits.push;
    if !limits.body {
        return limits.placeholder.clone();
    }
    let parsed = crate::xmpp::parse_stanza(stanza);
    let body = parsed.and_then(|stanza| {
        let body = stanza.find("body", crate::xmpp::NS_CLIENT);
        body.map(Element::text_content)
    });
    let mut body = body.unwrap_or_default();
    body.truncate(body.floor_char_boundary(limits.body_bytes_max));
    body.into()
}

/// Has a message without a body something that its recipient wants to know at once? Not receipts, markers and chat states.
fn says_something(stanza: &[u8]) -> bool {
    let Some(stanza) = crate::xmpp::parse_stanza(stanza) else {
        return false;
    };
    let mut children = stanza.elements();
    children.any(|child| {
        !hints::is_chatter(&child.ns)
            && !matches!(&*child.ns, hints::NS | "urn:xmpp:sid:0" | "urn:xmpp:delay")
            && !child.is("thread", crate::xmpp::NS_CLIENT)
    })
}

// ---- publishing ----------------------------------------------------------------------------------------------------

/// Asks the app server, or later, if too many were asked just now.
fn publish(slice: &mut Slice, number: u64) {
    let now = slice.now.ms;
    if !slice
        .push
        .may_send(now, slice.env.limits.push.per_second_max)
    {
        return slice.push.look_again(number, now + SLOWED_MS);
    }
    let Some(notification) = slice.push.waiting.get(&number) else {
        return;
    };
    let (name, jid) = (notification.user.clone(), notification.jid.clone());
    let Some(request) = request(slice, notification) else {
        if slice.user(&name).is_none_or(|user| waiting(user) == 0) {
            slice.push.told.remove(&name);
        }
        return drop(slice.push.take(number));
    };
    let Ok(to) = Jid::parse(&jid) else {
        return drop(slice.push.take(number));
    };
    let id: Box<str> = format!("push{number}-{}", crate::xmpp::random_id()).into();
    let from = format!("{name}@{}", slice.env.domain);
    let iq = Element::new("iq", crate::xmpp::NS_CLIENT)
        .attr("type", "set")
        .attr("id", &*id)
        .attr("from", &*from)
        .attr("to", &*jid)
        .child(request);
    let Some(notification) = slice.push.waiting.get_mut(&number) else {
        return;
    };
    notification.state = State::Asked(id);
    let deadline = now + slice.env.limits.push.answer_ms_max;
    slice.push.look_again(number, deadline);
    slice.push.counters.sent += 1;
    // an answer must find him
    slice.users.pin(&name);
    let meta = Meta::new(Kind::IqSet).with(Meta::SERVER);
    slice.route_element(&to, &from, &iq, meta, None);
}

impl Push {
    fn may_send(&mut self, now_ms: u64, per_second: u32) -> bool {
        let (tokens, since) = &mut self.tokens;
        let full = u64::from(per_second) * 1000;
        let earned = now_ms.saturating_sub(*since) * u64::from(per_second);
        *tokens = tokens.saturating_add(earned).min(full);
        *since = now_ms;
        match *tokens >= 1000 {
            true => *tokens -= 1000,
            false => return false,
        }
        true
    }
}

/// Messages that no client of the user has taken.
fn waiting(user: &User) -> usize {
    user.offline.len() + user.held.len()
}

/// The request's payload; `None`: nothing waits any more, or the service is disabled.
fn request(slice: &Slice, notification: &Notification) -> Option<Element> {
    let user = slice.user(&notification.user)?;
    let mut services = user.record.get().push.iter();
    let service = services.find(|s| is(s, &notification.jid, Some(&notification.node)))?;
    let count = waiting(user);
    if count == 0 {
        return None;
    }
    let news = &notification.news;
    let fields = [
        ("last-message-sender", &news.sender),
        ("last-message-body", &news.body),
    ];
    let form = Form::new(form::Kind::Submit, NS_SUMMARY)
        .field(Field::text("message-count", &count.to_string()));
    let form = fields
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .fold(form, |form, (var, value)| {
            form.field(Field::text(var, value))
        });
    let item = Element::new("item", pubsub::NS)
        .child(Element::new("notification", NS).child(form.element()));
    let publish = Element::new("publish", pubsub::NS)
        .attr("node", &*service.node)
        .child(item);
    let pubsub = Element::new("pubsub", pubsub::NS).child(publish);
    Some(match Element::parse(&service.options) {
        Ok(options) => pubsub.child(Element::new("publish-options", pubsub::NS).child(options)),
        Err(_) => pubsub,
    })
}

/// An answer to a user's bare JID has come: is it an app server's?
pub fn answered(slice: &mut Slice, name: &str, from: &Jid<'_>, stanza: &[u8], meta: Meta) {
    if slice.push.waiting.is_empty() {
        return;
    }
    let Some(answer) = crate::xmpp::parse_stanza(stanza) else {
        return;
    };
    let id = answer.get("id").unwrap_or_default();
    let number = id
        .strip_prefix("push")
        .and_then(|rest| rest.split('-').next());
    let Some(number) = number.and_then(|number| number.parse().ok()) else {
        return;
    };
    let asked = slice.push.waiting.get(&number).is_some_and(|n| {
        *n.user == *name
            && *n.jid == *from.as_str()
            && matches!(&n.state, State::Asked(asked) if **asked == *id)
    });
    if !asked {
        return;
    }
    if meta.kind == Kind::IqResult {
        slice.users.unpin(name);
        slice.push.take(number);
        return;
    }
    failed(slice, number, is_temporary(&answer));
}

/// May the same request succeed later? What is said of a component that is not connected, or of a bot that is off line, may.
fn is_temporary(answer: &Element) -> bool {
    let Some(error) = answer.find("error", crate::xmpp::NS_CLIENT) else {
        return false;
    };
    error.get("type") == Some("wait")
        || error.elements().any(|e| {
            e.ns == crate::xmpp::error::NS_STANZAS
                && matches!(
                    &*e.name,
                    "internal-server-error"
                        | "recipient-unavailable"
                        | "remote-server-timeout"
                        | "resource-constraint"
                        | "service-unavailable"
                )
        })
}

/// A request has failed.
fn failed(slice: &mut Slice, number: u64, temporary: bool) {
    slice.push.counters.failed += 1;
    let limits = &slice.env.limits.push;
    let (tries_max, retry_ms) = (limits.tries_max, limits.retry_ms);
    let jid = slice.push.waiting.get(&number).map(|n| n.jid.clone());
    let jid = jid.as_deref().and_then(|jid| Jid::parse(jid).ok());
    let unserved = jid.is_some_and(|jid| slice.is_unserved(&jid));
    let Some(notification) = slice.push.waiting.get_mut(&number) else {
        return;
    };
    let name = notification.user.clone();
    slice.users.unpin(&name);
    notification.failures += 1;
    notification.tries += u32::from(!unserved);
    notification.state = State::Waits;
    if temporary && notification.tries < tries_max {
        let doubled = retry_ms << (notification.failures - 1).min(20);
        let at = slice.now.ms + doubled.min(RETRY_MS_MAX);
        // whoever has come meanwhile knows what waits
        match is_attended(slice, &name) {
            true => drop(slice.push.take(number)),
            false => slice.push.look_again(number, at),
        }
        return;
    }
    let Some(gone) = slice.push.take(number) else {
        return;
    };
    slice.push.counters.disabled += 1;
    tracing::info!(
        user = &*name,
        service = &*gone.jid,
        failures = gone.failures,
        "a push service does not take notifications and was disabled"
    );
    slice.edit(
        &name,
        |record| {
            let services = &mut record.push;
            services.retain(|s| s.jid != *gone.jid || s.node != *gone.node);
        },
        Box::new(|_, result| {
            if let Err(error) = result {
                // its next notification fails as well
                tracing::warn!(%error, "a push service could not be disabled");
            }
        }),
    );
}

/// Forgets notifications of a user.
fn forget(slice: &mut Slice, name: &str, which: impl Fn(&Notification) -> bool) {
    for number in slice.push.numbers(name) {
        if slice.push.waiting.get(&number).is_some_and(&which)
            && let Some(gone) = slice.push.take(number)
            && matches!(gone.state, State::Asked(_))
        {
            slice.users.unpin(name);
        }
    }
}

/// The clock: who has not answered in time has failed, who has failed is asked again.
pub fn tick(slice: &mut Slice) {
    let now = slice.now.ms;
    while let Some(Reverse((due_ms, number))) = slice.push.due.peek().copied() {
        if due_ms > now {
            break;
        }
        slice.push.due.pop();
        let waiting = slice.push.waiting.get(&number);
        let Some(notification) = waiting.filter(|n| n.due_ms == due_ms) else {
            continue;
        };
        if matches!(notification.state, State::Asked(_)) {
            failed(slice, number, true);
            continue;
        }
        let name = notification.user.clone();
        let who = name.clone();
        let again = move |slice: &mut Slice| match slice.user(&who).is_some() {
            true => publish(slice, number),
            false => drop(slice.push.take(number)),
        };
        slice.when_known(&name, Box::new(again));
    }
    if now >= slice.push.sweep_ms {
        slice.push.sweep_ms = now + SWEEP_MS;
        slice.push.told.retain(|_, until| *until > now);
    }
}

#[cfg(test)]
mod tests {
    use crate::config::ComponentPolicy;
    use crate::xmpp::component::Settings;
    use crate::xmpp::parse_stanza;
    use crate::xmpp::slice::Limits;
    use crate::xmpp::testing::{Client, Component, World};

    const SERVER: &str = "push.example";

    /// An app server on the first shard, bob on the second, whose phone has enabled it and is gone, and alice who writes.
    struct Scene {
        w: World,
        app: Component,
        alice: Client,
        bob: String,
    }

    fn scene() -> Scene {
        scene_with(|_| {})
    }

    fn scene_with(change: impl Fn(&mut Limits)) -> Scene {
        let mut w = World::with(2, change);
        w.serve(&[(SERVER, ComponentPolicy::Refuse)], Settings::default());
        let app = w.component(0, SERVER);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.add(&alice);
        w.add(&bob);
        let alice = w.online(&alice, "desk");
        let mut s = Scene { w, app, alice, bob };
        let phone = s.phone();
        s.enables(phone);
        s.w.logout(phone);
        s
    }

    fn enable(node: &str) -> String {
        format!(
            "<iq type='set' id='e'><enable xmlns='urn:xmpp:push:0' jid='{SERVER}' node='{node}'>\
             <x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'>\
             <value>http://jabber.org/protocol/pubsub#publish-options</value></field>\
             <field var='secret'><value>eruio</value></field></x></enable></iq>"
        )
    }

    impl Scene {
        fn phone(&mut self) -> Client {
            let bob = self.bob.clone();
            self.w.online(&bob, "phone")
        }

        fn enables(&mut self, phone: Client) {
            self.w.send(phone, &enable("yxs32"));
            let done = self.w.take(phone);
            assert!(
                done.len() == 1 && done[0].contains("type='result'"),
                "{done:?}"
            );
        }

        fn says(&mut self, payload: &str) {
            let to = &self.bob;
            let message = format!("<message type='chat' to='{to}@localhost'>{payload}</message>");
            self.w.send(self.alice, &message);
        }

        fn writes(&mut self) {
            self.says("<body>Wherefore art thou?</body>");
        }

        /// What the app server was asked.
        fn asked(&mut self) -> Vec<String> {
            self.w.component_takes(self.app)
        }

        #[track_caller]
        fn asked_once(&mut self) -> String {
            let mut asked = self.asked();
            assert_eq!(asked.len(), 1, "{asked:?}");
            asked.remove(0)
        }

        fn answers(&mut self, request: &str, typ: &str, payload: &str) {
            let request = parse_stanza(request.as_bytes()).unwrap();
            let (id, to) = (request.get("id").unwrap(), request.get("from").unwrap());
            let answer = format!(
                "<iq xmlns='jabber:component:accept' type='{typ}' id='{id}' from='{SERVER}' to='{to}'>{payload}</iq>"
            );
            self.w.component_sends(self.app, &answer);
        }

        fn fails(&mut self, request: &str, kind: &str, condition: &str) {
            let error = format!(
                "<error type='{kind}'><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
            );
            self.answers(request, "error", &error);
        }

        fn services(&self) -> usize {
            self.w.user(&self.bob).record.get().push.len()
        }
    }

    #[test]
    fn the_app_server_is_told_once_with_the_options_until_the_user_has_been_there() {
        let mut s = scene();
        s.writes();
        let asked = s.asked_once();
        let id = parse_stanza(asked.as_bytes()).unwrap();
        let (id, bob) = (id.get("id").unwrap().to_owned(), s.bob.clone());
        let wanted = format!(
            "<iq type='set' id='{id}' from='{bob}@localhost' to='{SERVER}'>\
             <pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='yxs32'><item>\
             <notification xmlns='urn:xmpp:push:0'><x xmlns='jabber:x:data' type='submit'>\
             <field var='FORM_TYPE' type='hidden'><value>urn:xmpp:push:summary</value></field>\
             <field var='message-count'><value>1</value></field>\
             <field var='last-message-body'><value>New message</value></field>\
             </x></notification></item></publish>\
             <publish-options><x xmlns='jabber:x:data' type='submit'>\
             <field var='FORM_TYPE' type='hidden'><value>http://jabber.org/protocol/pubsub#publish-options</value></field>\
             <field var='secret'><value>eruio</value></field></x></publish-options></pubsub></iq>"
        );
        assert!(crate::xmpp::testing::matches(&wanted, &asked), "{asked}");
        s.answers(&asked, "result", "");
        s.writes();
        assert!(s.asked().is_empty());
        let phone = s.phone();
        s.w.logout(phone);
        s.writes();
        assert!(s.asked_once().contains("<value>1</value>"));
    }

    #[test]
    fn an_inactive_client_that_takes_what_comes_is_told_of_what_comes_then() {
        let mut s = scene();
        let desk = s.phone_at("desk");
        s.w.send(desk, "<inactive xmlns='urn:xmpp:csi:0'/>");
        for _ in 0..3 {
            s.writes();
            assert_eq!(s.w.user(&s.bob).held.len(), 0);
            let asked = s.asked_once();
            s.answers(&asked, "result", "");
        }
    }

    #[test]
    fn after_some_time_he_is_told_again() {
        let mut s = scene();
        s.writes();
        let asked = s.asked_once();
        s.answers(&asked, "result", "");
        s.w.advance(3_600_001);
        s.writes();
        assert!(s.asked_once().contains("<value>2</value>"));
    }

    #[test]
    fn sender_and_body_are_said_only_where_the_configuration_wants_it() {
        let mut s = scene_with(|limits| {
            limits.push.sender = true;
            limits.push.body = true;
            limits.push.body_bytes_max = 12;
        });
        s.says("<body>Where\u{e4}\u{e4}\u{e4}\u{e4}\u{e4}</body>");
        let asked = s.asked_once();
        assert!(
            asked.contains("<value>Where\u{e4}\u{e4}\u{e4}</value>"),
            "{asked}"
        );
        assert!(asked.contains("last-message-sender") && asked.contains("/desk</value>"));
    }

    #[test]
    fn sessions_that_are_cut_off_or_inactive_count_as_asleep_and_one_that_is_awake_as_all() {
        let mut s = scene();
        let phone = s.phone();
        s.w.send(phone, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
        s.writes();
        assert!(s.asked().is_empty());
        // not acknowledged yet
        s.w.cut(phone);
        let asked = s.asked_once();
        assert!(asked.contains("<value>1</value>"), "{asked}");
        s.answers(&asked, "result", "");
        s.writes();
        assert!(s.asked().is_empty());
        let desk = s.phone_at("desk");
        s.writes();
        assert!(s.asked().is_empty());
        s.w.send(desk, "<inactive xmlns='urn:xmpp:csi:0'/>");
        s.writes();
        let asked = s.asked_once();
        s.answers(&asked, "result", "");
        s.w.send(desk, "<active xmlns='urn:xmpp:csi:0'/>");
        s.writes();
        assert!(s.asked().is_empty());
        s.w.send(desk, "<inactive xmlns='urn:xmpp:csi:0'/>");
        s.writes();
        assert_eq!(s.asked().len(), 1);
    }

    #[test]
    fn who_resumes_has_been_there() {
        let mut s = scene();
        let phone = s.phone();
        s.w.send(phone, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
        s.w.cut(phone);
        s.writes();
        let asked = s.asked_once();
        s.answers(&asked, "result", "");
        s.writes();
        assert!(s.asked().is_empty());
        let slice = &mut s.w.slices[phone.shard];
        crate::xmpp::feature::sm::resume(slice, phone.sid, phone.link(), 0, (b"", b"")).unwrap();
        s.w.run();
        s.w.cut(phone);
        // what it has not acknowledged waits again
        assert_eq!(s.asked().len(), 1);
    }

    #[test]
    fn a_message_that_is_durable_before_its_recipient_is_known_is_told_when_he_is() {
        let mut s = scene();
        s.w.crash(1);
        s.w.serve(&[(SERVER, ComponentPolicy::Refuse)], Settings::default());
        s.app = s.w.component(0, SERVER);
        let alice = s.w.tier.users.keys().next().unwrap().clone();
        s.alice = s.w.online(&alice, "desk");
        let message = format!(
            "<message type='chat' to='{}@localhost'><body>x</body></message>",
            s.bob
        );
        s.w.element(s.alice, &message).unwrap();
        for _ in 0..3 {
            s.w.commit_only(0);
        }
        assert!(s.w.slices[0].user(&s.bob).is_none());
        s.w.run();
        assert!(s.asked_once().contains("<value>1</value>"));
    }

    #[test]
    fn what_a_session_that_ends_leaves_is_told() {
        let mut s = scene();
        s.w.confirms = false;
        let phone = s.phone();
        s.writes();
        assert!(s.asked().is_empty());
        s.w.cut(phone);
        assert_eq!(s.asked().len(), 1);
    }

    #[test]
    fn a_receipt_behind_a_message_does_not_hide_it() {
        let receipt = "<received xmlns='urn:xmpp:receipts' id='1'/><store xmlns='urn:xmpp:hints'/>";
        for managed in [false, true] {
            let mut s = scene();
            s.w.confirms = false;
            let phone = s.phone();
            if managed {
                s.w.send(phone, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
            }
            s.writes();
            s.says(receipt);
            s.w.cut(phone);
            let asked = s.asked_once();
            assert!(asked.contains("last-message-body"), "{asked}");
            assert!(asked.contains("<value>2</value>"), "{asked}");
        }
    }

    #[test]
    fn what_says_nothing_is_not_told_and_what_has_no_body_is_not_urgent() {
        let mut s = scene();
        for payload in [
            "<received xmlns='urn:xmpp:receipts' id='1'/><store xmlns='urn:xmpp:hints'/>",
            "<displayed xmlns='urn:xmpp:chat-markers:0' id='1'/><store xmlns='urn:xmpp:hints'/>",
            "<composing xmlns='http://jabber.org/protocol/chatstates'/><store xmlns='urn:xmpp:hints'/>",
            "<body>x</body><no-store xmlns='urn:xmpp:hints'/>",
        ] {
            s.says(payload);
            assert!(s.asked().is_empty(), "{payload}");
        }
        // what he writes himself, from a client that takes no messages
        let bob = s.bob.clone();
        let phone = s.w.login(&bob, "silent");
        let own = format!("<message type='chat' to='{bob}@localhost'><body>note</body></message>");
        s.w.send(phone, &own);
        assert!(s.asked().is_empty());
        s.says(
            "<encrypted xmlns='eu.siacs.conversations.axolotl'/><store xmlns='urn:xmpp:hints'/>",
        );
        let asked = s.asked_once();
        assert!(!asked.contains("last-message-body"), "{asked}");
    }

    #[test]
    fn who_is_blocked_wakes_nobody() {
        let mut s = scene();
        let phone = s.phone();
        let alice = s.w.session(s.alice).bare().to_owned();
        s.w.send(phone, &format!(
            "<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{alice}'/></block></iq>"
        ));
        s.w.logout(phone);
        s.writes();
        assert!(s.asked().is_empty());
    }

    #[test]
    fn a_message_for_somebody_who_is_not_loaded_costs_no_read_for_his_services() {
        let mut s = scene();
        s.w.crash(2);
        s.w.serve(&[(SERVER, ComponentPolicy::Refuse)], Settings::default());
        s.app = s.w.component(0, SERVER);
        let alice = s.w.on(0, "alice");
        s.alice = s.w.online(&alice, "desk");
        let (loads, reads) = (s.w.tier.loads, s.w.tier.reads);
        s.writes();
        let asked = s.asked_once();
        assert!(asked.contains("<value>1</value>"), "{asked}");
        assert_eq!((s.w.tier.loads, s.w.tier.reads), (loads + 1, reads));
    }

    #[test]
    fn a_service_that_is_answered_survives_a_crash_and_is_not_answered_before() {
        let mut s = scene();
        let phone = s.phone();
        s.w.tier.held = true;
        s.w.send(phone, &enable("second"));
        assert!(s.w.take(phone).is_empty());
        s.w.release();
        assert!(s.w.take(phone).concat().contains("type='result'"));
        s.w.tier.dry = true;
        s.w.send(phone, &enable("third"));
        assert!(s.w.take(phone).concat().contains("type='result'"));
        s.w.crash(1);
        let bob = s.bob.clone();
        s.w.login(&bob, "phone");
        assert_eq!(s.services(), 3);
    }

    #[test]
    fn services_are_enabled_anew_disabled_and_bounded() {
        let mut s = scene();
        let phone = s.phone();
        let result = "<iq type='result' id='e' to='*'/>";
        let changes = s.w.tier.changes;
        s.w.send(phone, &enable("yxs32"));
        s.w.expect(phone, &[result]);
        assert_eq!(s.w.tier.changes, changes, "the same is not written again");
        for node in ["a", "b", "c"] {
            s.w.send(phone, &enable(node));
            s.w.expect(phone, &[result]);
        }
        s.w.send(phone, &enable("one too many"));
        assert!(s.w.take(phone).concat().contains("<resource-constraint"));
        s.w.send(phone, &enable("a").replace("eruio", "other"));
        s.w.expect(phone, &[result]);
        assert_eq!(s.services(), 4);
        let disable = |node: &str| {
            format!(
                "<iq type='set' id='e'><disable xmlns='urn:xmpp:push:0' jid='{SERVER}'{node}/></iq>"
            )
        };
        s.w.send(phone, &disable(" node='b'"));
        s.w.expect(phone, &[result]);
        assert_eq!(s.services(), 3);
        s.w.send(phone, &disable(""));
        s.w.expect(phone, &[result]);
        assert_eq!(s.services(), 0);
        s.w.send(phone, &disable(""));
        s.w.expect(phone, &[result]);
        s.w.logout(phone);
        s.writes();
        assert!(s.asked().is_empty());
    }

    #[test]
    fn mistakes_are_answered() {
        let mut s = scene();
        let phone = s.phone();
        let (own, alice) = (s.bob.clone(), s.alice);
        let enable = |attrs: &str| {
            format!("<iq type='set' id='e'><enable xmlns='urn:xmpp:push:0' {attrs}/></iq>")
        };
        let long = format!("jid='{SERVER}' node='{}'", "x".repeat(5000));
        for (attrs, condition) in [
            ("node='n'", "bad-request"),
            ("jid='@' node='n'", "jid-malformed"),
            ("jid='push.elsewhere' node='n'", "remote-server-not-found"),
            ("jid='localhost' node='n'", "not-allowed"),
            (&*format!("jid='{own}@localhost' node='n'"), "not-allowed"),
            (&*long, "policy-violation"),
        ] {
            s.w.send(phone, &enable(attrs));
            let got = s.w.take(phone).concat();
            assert!(
                got.contains(&format!("<{condition} ")),
                "{attrs:.60}: {got:.300}"
            );
        }
        let foreign = enable(&format!("jid='{SERVER}' node='n'"))
            .replace("id='e'", &format!("id='e' to='{own}@localhost'"));
        s.w.send(alice, &foreign);
        assert!(s.w.take(alice).concat().contains("<service-unavailable"));
        assert_eq!(s.services(), 1);
    }

    #[test]
    fn an_error_that_waiting_does_not_mend_disables_the_service() {
        let mut s = scene();
        s.writes();
        let asked = s.asked_once();
        s.fails(&asked, "cancel", "item-not-found");
        assert_eq!(s.services(), 0);
        let bob = s.bob.clone();
        assert_eq!(s.w.stored(&bob).push.len(), 0);
        assert_eq!(s.w.slices[1].push.counters.disabled, 1);
        assert_eq!(s.w.slices[1].push.waiting(), 0);
    }

    #[test]
    fn a_late_failure_does_not_disable_a_service_that_was_enabled_anew() {
        let mut s = scene();
        s.writes();
        let asked = s.asked_once();
        let phone = s.phone();
        s.w.send(phone, &enable("yxs32").replace("eruio", "other"));
        s.w.take(phone);
        s.fails(&asked, "cancel", "item-not-found");
        assert_eq!(s.services(), 1);
        assert_eq!(s.w.slices[1].push.waiting(), 0);
        s.w.logout(phone);
        s.writes();
        assert_eq!(s.asked().len(), 1);
    }

    #[test]
    fn temporary_failures_are_tried_again_and_disable_it_after_some() {
        let mut s = scene_with(|limits| limits.push.tries_max = 4);
        s.writes();
        let asked = s.asked_once();
        s.fails(&asked, "wait", "resource-constraint");
        assert!(s.asked().is_empty());
        s.w.advance(30_000);
        // no answer at all
        assert_eq!(s.asked().len(), 1);
        s.w.advance(30_000);
        s.w.advance(60_000);
        let asked = s.asked_once();
        s.fails(&asked, "cancel", "service-unavailable");
        s.w.advance(120_000);
        assert_eq!(s.services(), 1);
        let asked = s.asked_once();
        s.fails(&asked, "wait", "internal-server-error");
        assert_eq!(s.services(), 0);
    }

    #[test]
    fn an_app_server_that_is_not_connected_does_not_lose_its_services() {
        let mut s = scene_with(|limits| limits.push.tries_max = 2);
        s.w.component_cut(s.app);
        s.writes();
        for _ in 0..4 {
            s.w.advance(3_600_000);
        }
        assert_eq!(s.services(), 1);
        s.app = s.w.component(0, SERVER);
        s.w.advance(3_600_000);
        assert_eq!(s.asked().len(), 1);
    }

    #[test]
    fn who_has_come_meanwhile_is_not_told_again() {
        let mut s = scene();
        s.w.component_cut(s.app);
        s.writes();
        assert_eq!(s.w.slices[1].push.waiting(), 1);
        let phone = s.phone();
        assert_eq!(s.w.slices[1].push.waiting(), 0);
        s.w.logout(phone);
        s.app = s.w.component(0, SERVER);
        s.w.advance(60_000);
        assert!(s.asked().is_empty());
    }

    #[test]
    fn nobody_answers_for_the_app_server() {
        let mut s = scene();
        s.writes();
        let asked = s.asked_once();
        let request = parse_stanza(asked.as_bytes()).unwrap();
        let (id, bob) = (request.get("id").unwrap(), s.bob.clone());
        s.w.send(
            s.alice,
            &format!(
                "<iq type='error' id='{id}' to='{bob}@localhost'><error type='cancel'>\
             <item-not-found xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>"
            ),
        );
        assert_eq!(s.services(), 1);
        assert_eq!(s.w.slices[1].push.waiting(), 1);
    }

    #[test]
    fn what_waits_and_what_goes_out_at_once_is_bounded() {
        let mut s = scene_with(|limits| {
            limits.push.waiting_max = 2;
            limits.push.per_second_max = 1;
        });
        let phone = s.phone();
        for node in ["a", "b"] {
            s.w.send(phone, &enable(node));
        }
        s.w.logout(phone);
        s.writes();
        assert_eq!(s.asked().len(), 1);
        assert_eq!(s.w.slices[1].push.counters.limited, 1);
        s.w.advance(1000);
        assert_eq!(s.asked().len(), 1);
    }

    #[test]
    fn a_bot_of_this_server_can_be_the_app_server() {
        let mut s = scene();
        let alice = s.w.session(s.alice).jid.to_string();
        let phone = s.phone();
        s.w.send(phone, &enable("n").replace(SERVER, &alice));
        s.w.take(phone);
        s.w.logout(phone);
        s.writes();
        let asked = s.w.take(s.alice);
        assert!(
            asked.len() == 1 && asked[0].contains("urn:xmpp:push:0"),
            "{asked:?}"
        );
        let request = parse_stanza(asked[0].as_bytes()).unwrap();
        let (id, bob) = (request.get("id").unwrap(), s.bob.clone());
        s.w.send(
            s.alice,
            &format!("<iq type='result' id='{id}' to='{bob}@localhost'/>"),
        );
        // the component has not answered yet
        assert_eq!(s.w.slices[1].push.waiting(), 1);
    }

    impl Scene {
        fn phone_at(&mut self, resource: &str) -> Client {
            let bob = self.bob.clone();
            self.w.online(&bob, resource)
        }
    }
}
