//! Blocking (XEP-0191): a user's list of addresses from which nothing reaches him and to which he sends nothing. To a blocked
//! contact he looks offline.
//!
//! In: requests of the user's sessions; every stanza that comes in for him or leaves him. Out: errors, pushes to those of his
//! sessions that asked for the list, presence to the contacts whom a change concerns. Promise: a change is answered when it
//! is durable, and a user is never cut off from his own sessions.

use std::collections::HashSet;

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
        IqRoute {
            name: "blocklist",
            ns: NS,
            target: Target::Account,
            handle: list,
        },
        IqRoute {
            name: "block",
            ns: NS,
            target: Target::Account,
            handle: block,
        },
        IqRoute {
            name: "unblock",
            ns: NS,
            target: Target::Account,
            handle: unblock,
        },
    ],
    admit: Some(admit),
    ..NONE
};

/// The user blocks the one he writes to (XEP-0191 section 3.3).
const BLOCKED: StanzaError = StanzaError {
    kind: "cancel",
    ..StanzaError::NOT_ACCEPTABLE.detail("blocked", "urn:xmpp:blocking:errors")
};

/// XEP-0191 section 6: an address is blocked as full JID, as bare JID, as domain/resource or by its domain.
pub fn is_blocked(record: &ArchivedUserRecord, jid: &Jid<'_>) -> bool {
    !record.blocked.is_empty()
        && (record.blocks(jid.as_str()) || record.blocks(jid.bare()) || record.blocks(jid.domain()))
}

/// May a user of this slice send a stanza to this address?
pub fn may_send(slice: &Slice, name: &str, to: &Jid<'_>) -> Result<(), StanzaError> {
    if blocks(slice, name, to) {
        Err(BLOCKED)
    } else {
        Ok(())
    }
}

/// Does this slice's user block this address? Never himself, nor the server that he is connected to.
pub fn blocks(slice: &Slice, name: &str, jid: &Jid<'_>) -> bool {
    let Some(user) = slice.user(name) else {
        return false;
    };
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
    let Some(user) = slice.user(iq.account()) else {
        return;
    };
    let blocked = user.record.get().blocked.iter();
    let answer = blocked.fold(Element::new("blocklist", NS), |list, jid| {
        list.child(item(jid.as_str()))
    });
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
    let Some(user) = slice.user(iq.account()) else {
        return;
    };
    let record = user.record.get();
    let new = jids.iter().filter(|jid| !record.blocks(jid)).count();
    if record.blocked.len() + new > slice.env.limits.blocked_max {
        return slice.iq_error(
            &iq,
            &StanzaError::RESOURCE_CONSTRAINT.text("the block list is full"),
        );
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
        self.jids
            .iter()
            .fold(element, |element, jid| element.child(item(jid)))
    }
}

fn item(jid: &str) -> Element {
    Element::new("item", NS).attr("jid", jid)
}

fn change(slice: &mut Slice, iq: Iq, change: Change) {
    let name = iq.account().to_owned();
    let Some(user) = slice.user(&name) else {
        return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    };
    let record = user.record.get();
    let mut after = user.record.to_owned().blocked;
    let mut concerned = watchers(slice, &name, record, after.iter().chain(&change.jids));
    change.apply(&mut after);
    // whom the change cuts off or lets in
    let blocked = |jid: &str| after.binary_search_by(|one| one.as_str().cmp(jid)).is_ok();
    concerned.retain(|watcher| {
        let Ok(jid) = Jid::parse(&watcher.jid) else {
            return false;
        };
        let now = blocked(jid.as_str()) || blocked(jid.bare()) || blocked(jid.domain());
        now != watcher.blocked && !is_own(slice, &name, &jid)
    });
    slice.edit(
        &name.clone(),
        move |record| record.blocked = after,
        Box::new(move |slice, result| {
            if let Err(error) = result {
                tracing::warn!(user = name, %error, "a block list could not be stored");
                return slice.iq_error(&iq, &error.into());
            }
            slice.iq_result(&iq, None);
            push(slice, &name, &change.element());
            for watcher in concerned {
                if watcher.blocked {
                    show(slice, &name, &watcher)
                } else {
                    hide(slice, &name, &watcher)
                }
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
    let mut known: HashSet<String> = HashSet::new();
    let mut add = |jid: &str, sees: bool, seen: bool| {
        if let Ok(parsed) = Jid::parse(jid)
            && known.insert(jid.to_owned())
        {
            all.push(Watcher {
                jid: jid.to_owned(),
                blocked: is_blocked(record, &parsed),
                sees,
                seen,
            });
        }
    };
    for contact in record.roster.iter() {
        let (sees, seen) = (contact.subscription().from(), contact.subscription().to());
        if sees || seen {
            add(contact.jid.as_str(), sees, seen);
        }
    }
    for jid in listed {
        if *jid == *slice.env.domain
            && let Some(person) = slice.groups.person(name)
        {
            for contact in slice.groups.contacts(person) {
                add(
                    &format!("{}@{}", contact.name, slice.env.domain),
                    true,
                    true,
                );
            }
        }
        if let Ok(parsed) = Jid::parse(jid)
            && slice.together(name, &parsed)
        {
            add(jid, true, true);
        }
        if let Ok(parsed) = Jid::parse(jid)
            && !parsed.is_bare()
            && let Some(contact) = record.roster_item(parsed.bare())
        {
            add(
                jid,
                contact.subscription().from(),
                contact.subscription().to(),
            );
        }
    }
    for sid in slice.sessions_of(name) {
        for jid in slice
            .sessions
            .get(sid)
            .iter()
            .flat_map(|session| &session.directed)
        {
            add(jid, false, false);
        }
    }
    all
}

/// XEP-0191 section 3.3: a contact whom the user blocks sees him go.
fn hide(slice: &mut Slice, name: &str, watcher: &Watcher) {
    let Ok(to) = Jid::parse(&watcher.jid) else {
        return;
    };
    if watcher.sees {
        return presence::hide(slice, name, &to);
    }
    for sid in slice.sessions_of(name) {
        let Some(session) = slice.sessions.get_mut(sid) else {
            continue;
        };
        let Some(at) = session
            .directed
            .iter()
            .position(|jid| **jid == *watcher.jid)
        else {
            continue;
        };
        session.directed.remove(at);
        let from = session.jid.clone();
        send_presence(slice, &from, &to, Kind::Unavailable, "unavailable");
    }
}

/// XEP-0191 section 3.4: a contact whom the user blocks no more sees him again, and the user the contact.
fn show(slice: &mut Slice, name: &str, watcher: &Watcher) {
    let Ok(to) = Jid::parse(&watcher.jid) else {
        return;
    };
    presence::show(slice, name, &to);
    if !watcher.seen {
        return;
    }
    for sid in slice.sessions_of(name) {
        let Some(session) = slice.sessions.get(sid).filter(|s| s.presence.is_some()) else {
            continue;
        };
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
        let Some(session) = slice.sessions.get(sid).filter(|s| s.blocklist) else {
            continue;
        };
        let push = Element::new("iq", NS_CLIENT)
            .attr("type", "set")
            .attr("id", crate::xmpp::random_id())
            .attr("from", session.bare())
            .attr("to", &*session.jid)
            .child(change.clone());
        slice.send_element(sid, &push, Meta::new(Kind::IqSet).with(Meta::SERVER));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::testing::{Client, World};

    const LIST: &str = "<iq type='get' id='l'><blocklist xmlns='urn:xmpp:blocking'/></iq>";

    fn block(items: &str) -> String {
        format!("<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'>{items}</block></iq>")
    }

    fn unblock(items: &str) -> String {
        format!("<iq type='set' id='u'><unblock xmlns='urn:xmpp:blocking'>{items}</unblock></iq>")
    }

    fn one(jid: &str) -> String {
        format!("<item jid='{jid}'/>")
    }

    /// Alice and Bob on line, on two shards, friends.
    fn friends() -> (World, Client, Client, String, String) {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.befriend(&alice, &bob);
        let a = w.online(&alice, "a");
        let b = w.online(&bob, "b");
        w.take(a);
        (
            w,
            a,
            b,
            format!("{alice}@localhost"),
            format!("{bob}@localhost"),
        )
    }

    #[track_caller]
    fn error(w: &mut World, client: Client, condition: &str) {
        let got = w.take(client);
        assert!(
            got.len() == 1 && got[0].contains(&format!("<{condition} ")),
            "wanted {condition}, got {got:?}"
        );
    }

    #[test]
    fn the_list_is_kept_and_those_who_asked_for_it_hear_of_changes() {
        let (mut w, a, _, alice, bob) = friends();
        let phone = w.login(alice.split('@').next().unwrap(), "phone");
        let kiosk = w.login(alice.split('@').next().unwrap(), "kiosk");
        w.send(phone, LIST);
        w.expect(phone, &[&format!("<iq type='result' id='l' to='{alice}/phone'><blocklist xmlns='urn:xmpp:blocking'/></iq>")]);
        // normalised, each once
        w.send(
            a,
            &block(&(one("Zoe@LOCALHOST") + &one(&bob) + &one("zoe@localhost"))),
        );
        w.expect(a, &[&format!("<iq type='result' id='b' to='{alice}/a'/>")]);
        let items = one(&bob) + &one("zoe@localhost");
        let push = |inner: String| {
            format!("<iq type='set' id='*' from='{alice}' to='{alice}/phone'>{inner}</iq>")
        };
        w.expect(
            phone,
            &[&push(format!(
                "<block xmlns='urn:xmpp:blocking'>{items}</block>"
            ))],
        );
        assert_eq!(
            w.stored(alice.split('@').next().unwrap()).blocked,
            [bob.as_str(), "zoe@localhost"]
        );
        w.send(phone, LIST);
        w.expect(phone, &[&format!(
            "<iq type='result' id='l' to='{alice}/phone'><blocklist xmlns='urn:xmpp:blocking'>{items}</blocklist></iq>"
        )]);
        w.send(phone, &unblock(&one("zoe@localhost")));
        let done = format!("<iq type='result' id='u' to='{alice}/phone'/>");
        w.expect(
            phone,
            &[
                &done,
                &push(format!(
                    "<unblock xmlns='urn:xmpp:blocking'>{}</unblock>",
                    one("zoe@localhost")
                )),
            ],
        );
        w.send(phone, &unblock(""));
        w.expect(
            phone,
            &[&done, &push("<unblock xmlns='urn:xmpp:blocking'/>".into())],
        );
        assert!(
            w.stored(alice.split('@').next().unwrap())
                .blocked
                .is_empty()
        );
        w.expect(kiosk, &[]);
    }

    #[test]
    fn bad_requests_are_answered_and_change_nothing() {
        let (mut w, a, b, alice, _) = friends();
        for (iq, condition) in [
            (block(""), "bad-request"),
            (block("<item/>"), "bad-request"),
            (block(&one("a@b@c")), "jid-malformed"),
            (unblock(&one("@x")), "jid-malformed"),
            (block(&one("x@y")).replace("set", "get"), "bad-request"),
            (LIST.replace("get", "set"), "bad-request"),
        ] {
            w.send(a, &iq);
            error(&mut w, a, condition);
        }
        for iq in [LIST.to_owned(), block(&one("x@y")), unblock("")] {
            w.send(b, &iq.replace("<iq ", &format!("<iq to='{alice}' ")));
            error(&mut w, b, "service-unavailable");
        }
        assert!(
            w.stored(alice.split('@').next().unwrap())
                .blocked
                .is_empty()
        );
    }

    #[test]
    fn a_list_has_an_end() {
        let mut w = World::with(1, |limits| limits.blocked_max = 2);
        w.add("alice");
        let a = w.online("alice", "a");
        w.send(a, &block(&(one("x@y") + &one("y@y"))));
        w.take(a);
        // known ones are no new ones
        w.send(a, &block(&one("x@y")));
        w.expect(a, &["<iq type='result' id='b' to='alice@localhost/a'/>"]);
        w.send(a, &block(&one("z@y")));
        error(&mut w, a, "resource-constraint");
        w.send(a, &block(&(one("1@y") + &one("2@y") + &one("3@y"))));
        error(&mut w, a, "resource-constraint");
        assert_eq!(w.stored("alice").blocked, ["x@y", "y@y"]);
    }

    #[test]
    fn nothing_comes_in_from_a_blocked_contact() {
        let (mut w, a, b, alice, bob) = friends();
        w.send(a, &block(&one(&bob)));
        w.take(a);
        w.take(b);
        for to in [alice.clone(), format!("{alice}/a")] {
            for stanza in ["message type='chat'", "message", "message type='groupchat'"] {
                w.send(b, &format!("<{stanza} to='{to}'><body>x</body></message>"));
                error(&mut w, b, "service-unavailable");
            }
            for typ in ["get", "set"] {
                w.send(
                    b,
                    &format!(
                        "<iq type='{typ}' id='1' to='{to}'><ping xmlns='urn:xmpp:ping'/></iq>"
                    ),
                );
                error(&mut w, b, "service-unavailable");
            }
            for silent in [
                format!("<message type='headline' to='{to}'><body>x</body></message>"),
                format!("<message type='error' to='{to}'><body>x</body></message>"),
                format!("<iq type='result' id='1' to='{to}'/>"),
                format!("<presence to='{to}'/>"),
                format!("<presence type='subscribe' to='{to}'/>"),
                format!("<presence type='probe' to='{to}'/>"),
                "<presence><show>away</show></presence>".to_owned(),
            ] {
                w.send(b, &silent);
                let got = w.take(b);
                // his own presence comes back to himself
                assert!(
                    got.iter().all(|e| e.contains(&format!("from='{bob}/b'"))),
                    "{silent}: {got:?}"
                );
            }
        }
        w.expect(a, &[]);
    }

    #[test]
    fn nothing_goes_out_to_a_blocked_contact() {
        let (mut w, a, b, alice, bob) = friends();
        w.send(a, &block(&one(&bob)));
        w.take(a);
        w.take(b);
        w.send(
            a,
            &format!("<message to='{bob}' id='1'><body>x</body></message>"),
        );
        w.expect(a, &[&format!(
            "<message type='error' from='{bob}' to='{alice}/a' id='1'><body>x</body><error type='cancel'>\
             <not-acceptable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/><blocked xmlns='urn:xmpp:blocking:errors'/>\
             </error></message>"
        )]);
        for stanza in [
            format!("<iq type='get' id='1' to='{bob}'><ping xmlns='urn:xmpp:ping'/></iq>"),
            format!("<iq type='get' id='1' to='{bob}/b'><ping xmlns='urn:xmpp:ping'/></iq>"),
            format!("<presence to='{bob}'/>"),
        ] {
            w.send(a, &stanza);
            let got = w.take(a).concat();
            assert!(
                got.contains("<blocked xmlns='urn:xmpp:blocking:errors'/>"),
                "{stanza}: {got}"
            );
        }
        w.send(a, "<presence><show>dnd</show></presence>");
        w.expect(b, &[]);
    }

    #[test]
    fn each_form_of_address_blocks_what_it_names() {
        let blocked = |listed: &str, jid: &str| {
            let user = crate::store::record::UserRecord {
                blocked: vec![listed.into()],
                ..Default::default()
            };
            is_blocked(
                crate::store::record::Record::new(&user).get(),
                &Jid::parse(jid).unwrap(),
            )
        };
        assert!(blocked("u@d/r", "u@d/r"));
        assert!(!blocked("u@d/r", "u@d/s"));
        assert!(!blocked("u@d/r", "u@d"));
        assert!(blocked("u@d", "u@d") && blocked("u@d", "u@d/r"));
        assert!(!blocked("u@d", "d") && !blocked("u@d", "v@d"));
        assert!(blocked("d/r", "d/r"));
        assert!(!blocked("d/r", "d/s") && !blocked("d/r", "u@d/r") && !blocked("d/r", "d"));
        assert!(blocked("d", "d") && blocked("d", "u@d/r") && blocked("d", "d/r"));
        assert!(!blocked("d", "sub.d"));
    }

    #[test]
    fn nobody_cuts_himself_off_from_his_own_sessions_or_the_server() {
        let (mut w, a, b, alice, _) = friends();
        let phone = w.online(alice.split('@').next().unwrap(), "phone");
        w.send(a, &block(&(one("localhost") + &one(&alice))));
        w.take(a);
        w.take(b);
        w.send(
            a,
            &format!("<message type='chat' to='{alice}/phone'><body>x</body></message>"),
        );
        assert!(w.take(phone).concat().contains("<body>x</body>"));
        w.send(
            a,
            "<iq type='get' id='p' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>",
        );
        w.expect(
            a,
            &[&format!(
                "<iq type='result' id='p' from='localhost' to='{alice}/a'/>"
            )],
        );
        w.send(
            b,
            &format!("<message type='chat' to='{alice}'><body>x</body></message>"),
        );
        error(&mut w, b, "service-unavailable");
    }

    #[test]
    fn a_blocked_contact_sees_the_user_go_and_an_unblocked_one_come_back() {
        let (mut w, a, b, alice, bob) = friends();
        w.send(a, "<presence><status>in</status></presence>");
        w.take(a);
        w.take(b);
        w.send(a, &block(&one(&bob)));
        w.expect(
            b,
            &[&format!(
                "<presence type='unavailable' from='{alice}/a' to='{bob}'/>"
            )],
        );
        // blocked in another way too: nothing changes for him
        w.send(a, &block(&one("localhost")));
        w.send(a, &unblock(&one(&bob)));
        w.expect(b, &[]);
        w.send(b, "<presence><show>dnd</show></presence>");
        w.take(b);
        w.take(a);
        w.send(a, &unblock(""));
        w.expect(
            b,
            &[&format!(
                "<presence from='{alice}/a' to='{bob}'><status>in</status></presence>"
            )],
        );
        let got = w.take(a);
        assert!(
            got.len() == 2 && got[0].contains("result") && got[1].contains("<show>dnd</show>"),
            "{got:?}"
        );
    }

    #[test]
    fn presence_is_shown_only_to_those_who_may_see_it() {
        let mut w = World::new(1);
        for name in ["alice", "carol", "dave"] {
            w.add(name);
        }
        w.item("alice", "carol", crate::store::record::Subscription::To);
        w.item("carol", "alice", crate::store::record::Subscription::From);
        let a = w.online("alice", "a");
        let carol = w.online("carol", "c");
        let dave = w.online("dave", "d");
        w.send(a, "<presence to='dave@localhost'/>");
        w.take(dave);
        w.take(carol);
        w.send(
            a,
            &block(&(one("carol@localhost") + &one("dave@localhost"))),
        );
        w.expect(carol, &[]);
        // got directed presence
        w.expect(
            dave,
            &["<presence type='unavailable' from='alice@localhost/a' to='dave@localhost'/>"],
        );
        w.send(a, &unblock(""));
        w.expect(carol, &[]);
        w.expect(dave, &[]);
    }

    #[test]
    fn a_single_resource_sees_the_user_go() {
        let (mut w, a, b, alice, bob) = friends();
        let other = w.online(bob.split('@').next().unwrap(), "other");
        w.take(a);
        w.take(b);
        w.send(a, &block(&one(&format!("{bob}/b"))));
        w.expect(
            b,
            &[&format!(
                "<presence type='unavailable' from='{alice}/a' to='{bob}/b'/>"
            )],
        );
        w.expect(other, &[]);
        w.send(
            b,
            &format!("<message type='chat' to='{alice}'><body>x</body></message>"),
        );
        error(&mut w, b, "service-unavailable");
        w.take(a);
        w.send(
            other,
            &format!("<message type='chat' to='{alice}'><body>x</body></message>"),
        );
        assert_eq!(w.take(a).len(), 1);
    }

    #[test]
    fn a_change_is_answered_when_it_is_durable() {
        let (mut w, a, b, alice, bob) = friends();
        w.tier.held = true;
        w.send(a, &block(&one(&bob)));
        w.expect(a, &[]);
        w.expect(b, &[]);
        w.release();
        w.expect(a, &[&format!("<iq type='result' id='b' to='{alice}/a'/>")]);
        assert_eq!(w.take(b).len(), 1);
    }

    #[test]
    fn a_change_that_cannot_be_stored_is_none() {
        let (mut w, a, b, alice, bob) = friends();
        w.tier.broken = true;
        w.send(a, &block(&one(&bob)));
        error(&mut w, a, "resource-constraint");
        w.expect(b, &[]);
        w.tier.broken = false;
        w.send(
            b,
            &format!("<message type='chat' to='{alice}/a'><body>x</body></message>"),
        );
        assert_eq!(w.take(a).len(), 1);
    }
}
