//! Blocking (XEP-0191): a user's list of addresses from which nothing reaches him and to which he sends nothing. To a blocked
//! contact he looks offline.
//!
//! In: requests of the user's sessions; every stanza that comes in for him or leaves him. Out: errors, pushes to those of his
//! sessions that asked for the list, presence to the contacts whom a change concerns. Promise: a change is answered when it
//! is durable, and a user is never cut off from his own sessions.

use super::{Feature, Iq, IqRoute, NONE, Refusal, Target, presence};
use crate::store::record::ArchivedUserRecord;
use crate::xml::dom::Element;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:xmpp:blocking";

pub static FEATURE: Feature = Feature {
    name: "Blocking",
    spec: "XEP-0191",
    version: "1.3",
    server: &[NS],
    account: &[NS],
    iq: &[
        IqRoute { name: "blocklist", ns: NS, target: Target::Account, handle: list },
        IqRoute { name: "block", ns: NS, target: Target::Account, handle: block },
        IqRoute { name: "unblock", ns: NS, target: Target::Account, handle: unblock },
    ],
    admit: Some(admit),
    ..NONE
};

/// The user blocks the one he writes to (XEP-0191 section 3.3).
const BLOCKED: StanzaError =
    StanzaError { kind: "cancel", ..StanzaError::NOT_ACCEPTABLE.detail("blocked", "urn:xmpp:blocking:errors") };

/// XEP-0191 section 6: an address is blocked as full JID, as bare JID, as domain/resource or by its domain.
pub fn is_blocked(record: &ArchivedUserRecord, jid: &Jid<'_>) -> bool {
    !record.blocked.is_empty()
        && (record.blocks(jid.as_str()) || record.blocks(jid.bare()) || record.blocks(jid.domain()))
}

/// May a user of this slice send a stanza to this address?
pub fn may_send(slice: &Slice, name: &str, to: &Jid<'_>) -> Result<(), StanzaError> {
    if blocks(slice, name, to) { Err(BLOCKED) } else { Ok(()) }
}

/// Does this slice's user block this address? Never himself, nor the server that he is connected to.
pub fn blocks(slice: &Slice, name: &str, jid: &Jid<'_>) -> bool {
    let Some(user) = slice.user(name) else { return false };
    let record = user.record.get();
    if record.blocked.is_empty() {
        return false;
    }
    !is_own(slice, name, jid) && is_blocked(record, jid)
}

/// One of the user's sessions, his account, or the server that he is connected to.
fn is_own(slice: &Slice, name: &str, jid: &Jid<'_>) -> bool {
    slice.env.is_local(jid) && jid.local().is_none_or(|local| local == name)
}

fn admit(slice: &Slice, name: &str, from: &Jid<'_>, meta: Meta) -> Result<(), Refusal> {
    if !blocks(slice, name, from) {
        return Ok(());
    }
    match meta.kind {
        // RFC 6121 8.5.2: headlines are dropped without a word anyway
        Kind::Chat | Kind::Normal | Kind::GroupChat | Kind::IqGet | Kind::IqSet => {
            Err(Refusal::Error(StanzaError::SERVICE_UNAVAILABLE))
        }
        _ => Err(Refusal::Silent),
    }
}

fn list(slice: &mut Slice, iq: Iq) {
    let Some(sid) = iq.session.filter(|_| iq.own()) else {
        return slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
    };
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    let Some(user) = slice.user(iq.account()) else { return };
    let blocked = user.record.get().blocked.iter();
    let answer = blocked.fold(Element::new("blocklist", NS), |list, jid| list.child(item(jid.as_str())));
    if let Some(session) = slice.sessions.get_mut(sid) {
        session.blocklist = true;
    }
    slice.iq_result(&iq, Some(answer));
}

fn block(slice: &mut Slice, iq: Iq) {
    let jids = match items(slice, &iq) {
        Ok(jids) => jids,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    if jids.is_empty() {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    let Some(user) = slice.user(iq.account()) else { return };
    let record = user.record.get();
    let new = jids.iter().filter(|jid| !record.blocks(jid)).count();
    if record.blocked.len() + new > slice.env.limits.blocked_max {
        return slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT.text("the block list is full"));
    }
    change(slice, iq, Change { block: true, jids });
}

fn unblock(slice: &mut Slice, iq: Iq) {
    match items(slice, &iq) {
        // no items: everybody
        Ok(jids) => change(slice, iq, Change { block: false, jids }),
        Err(error) => slice.iq_error(&iq, &error),
    }
}

/// The normalised addresses in a request of the user himself.
fn items(slice: &Slice, iq: &Iq) -> Result<Vec<String>, StanzaError> {
    if !iq.own() || iq.session.is_none() {
        return Err(StanzaError::SERVICE_UNAVAILABLE);
    }
    if !iq.set {
        return Err(StanzaError::BAD_REQUEST);
    }
    let mut jids = Vec::new();
    for item in iq.payload.elements().filter(|e| e.is("item", NS)) {
        let jid = item.get("jid").ok_or(StanzaError::BAD_REQUEST)?;
        let jid = Jid::parse(jid).map_err(|_| StanzaError::JID_MALFORMED)?;
        // a request names no more than a list can hold
        if jids.len() >= slice.env.limits.blocked_max {
            return Err(StanzaError::RESOURCE_CONSTRAINT);
        }
        jids.push(jid.as_str().to_owned());
    }
    jids.sort_unstable();
    jids.dedup();
    Ok(jids)
}

struct Change {
    block: bool,
    /// Sorted. Empty: unblock all.
    jids: Vec<String>,
}

impl Change {
    fn apply(&self, blocked: &mut Vec<String>) {
        match (self.block, self.jids.is_empty()) {
            (true, _) => {
                blocked.extend(self.jids.iter().cloned());
                blocked.sort_unstable();
                blocked.dedup();
            }
            (false, true) => blocked.clear(),
            (false, false) => blocked.retain(|jid| self.jids.binary_search(jid).is_err()),
        }
    }

    /// What the user's sessions are told.
    fn element(&self) -> Element {
        let element = Element::new(if self.block { "block" } else { "unblock" }, NS);
        self.jids.iter().fold(element, |element, jid| element.child(item(jid)))
    }
}

fn item(jid: &str) -> Element {
    Element::new("item", NS).attr("jid", jid)
}

fn change(slice: &mut Slice, iq: Iq, change: Change) {
    let name = iq.account().to_owned();
    let Some(user) = slice.user(&name) else { return };
    let record = user.record.get();
    let mut after = user.record.to_owned().blocked;
    let mut concerned = watchers(slice, &name, record, after.iter().chain(&change.jids));
    change.apply(&mut after);
    // whom the change cuts off or lets in
    let blocked = |jid: &str| after.binary_search_by(|one| one.as_str().cmp(jid)).is_ok();
    concerned.retain(|watcher| {
        let Ok(jid) = Jid::parse(&watcher.jid) else { return false };
        let now = blocked(jid.as_str()) || blocked(jid.bare()) || blocked(jid.domain());
        now != watcher.blocked && !is_own(slice, &name, &jid)
    });
    slice.edit(
        &name.clone(),
        move |record| record.blocked = after,
        Box::new(move |slice, result| {
            if let Err(error) = result {
                tracing::warn!(user = name, %error, "a block list could not be stored");
                return slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR);
            }
            slice.iq_result(&iq, None);
            push(slice, &name, &change.element());
            for watcher in concerned {
                if watcher.blocked { show(slice, &name, &watcher) } else { hide(slice, &name, &watcher) }
            }
        }),
    );
}

/// One who sees the user's presence, or whom the user sees.
struct Watcher {
    jid: String,
    /// Before the change.
    blocked: bool,
    /// Gets the user's presence (RFC 6121: subscription `from` or `both`).
    sees: bool,
    /// The user gets his (`to` or `both`).
    seen: bool,
}

/// Contacts with a subscription, those of their resources that are `listed` one by one, and who got directed presence.
fn watchers<'a>(
    slice: &Slice,
    name: &str,
    record: &ArchivedUserRecord,
    listed: impl Iterator<Item = &'a String>,
) -> Vec<Watcher> {
    let mut all: Vec<Watcher> = Vec::new();
    let mut add = |jid: &str, sees: bool, seen: bool| {
        if let Ok(parsed) = Jid::parse(jid)
            && !all.iter().any(|watcher| watcher.jid == jid)
        {
            all.push(Watcher { jid: jid.to_owned(), blocked: is_blocked(record, &parsed), sees, seen });
        }
    };
    for contact in record.roster.iter() {
        let (sees, seen) = (contact.subscription().from(), contact.subscription().to());
        if sees || seen {
            add(contact.jid.as_str(), sees, seen);
        }
    }
    for jid in listed {
        if let Ok(parsed) = Jid::parse(jid)
            && !parsed.is_bare()
            && let Some(contact) = record.roster_item(parsed.bare())
        {
            add(jid, contact.subscription().from(), contact.subscription().to());
        }
    }
    for sid in slice.sessions_of(name) {
        for jid in slice.sessions.get(sid).iter().flat_map(|session| &session.directed) {
            add(jid, false, false);
        }
    }
    all
}

/// XEP-0191 section 3.3: a contact whom the user blocks sees him go.
fn hide(slice: &mut Slice, name: &str, watcher: &Watcher) {
    let Ok(to) = Jid::parse(&watcher.jid) else { return };
    if watcher.sees {
        return presence::hide(slice, name, &to);
    }
    for sid in slice.sessions_of(name) {
        let Some(session) = slice.sessions.get_mut(sid) else { continue };
        let Some(at) = session.directed.iter().position(|jid| **jid == *watcher.jid) else { continue };
        session.directed.remove(at);
        let from = session.jid.clone();
        send_presence(slice, &from, &to, Kind::Unavailable, "unavailable");
    }
}

/// XEP-0191 section 3.4: a contact whom the user blocks no more sees him again, and the user the contact.
fn show(slice: &mut Slice, name: &str, watcher: &Watcher) {
    let Ok(to) = Jid::parse(&watcher.jid) else { return };
    presence::show(slice, name, &to);
    if !watcher.seen {
        return;
    }
    for sid in slice.sessions_of(name) {
        let Some(session) = slice.sessions.get(sid).filter(|s| s.presence.is_some()) else { continue };
        let from = session.jid.clone();
        send_presence(slice, &from, &to, Kind::Probe, "probe");
    }
}

fn send_presence(slice: &mut Slice, from: &str, to: &Jid<'_>, kind: Kind, typ: &str) {
    let mut stanza = b"<presence".to_vec();
    attribute("type", typ, &mut stanza);
    attribute("from", from, &mut stanza);
    attribute("to", to.as_str(), &mut stanza);
    stanza.extend_from_slice(b"/>");
    slice.route(to, from, &stanza, Meta::new(kind), None);
}

/// Tells those of the user's sessions that asked for the list.
fn push(slice: &mut Slice, name: &str, change: &Element) {
    for sid in slice.sessions_of(name) {
        let Some(session) = slice.sessions.get(sid).filter(|s| s.blocklist) else { continue };
        let push = Element::new("iq", NS_CLIENT)
            .attr("type", "set")
            .attr("id", crate::xmpp::random_id())
            .attr("from", session.bare())
            .attr("to", &*session.jid)
            .child(change.clone());
        slice.send_element(sid, &push, Meta::new(Kind::IqSet).with(Meta::SERVER));
    }
}
