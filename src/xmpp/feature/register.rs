//! In-band registration (XEP-0077) for those who have an account: they change its password or remove it. Making an account is
//! part of the negotiation, before there is a session.

use fnv::FnvHashMap;

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::store::record;
use crate::xml::dom::Element;
use crate::xmpp::error::{StanzaError, StreamError};
use crate::xmpp::jid::{self, Jid};
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::sasl::ScramKeys;
use crate::xmpp::slice::Op;
use crate::xmpp::slice::{Computed, Job, Slice, Then};

pub const NS: &str = "jabber:iq:register";

pub static FEATURE: Feature = Feature {
    name: "In-band registration",
    spec: "XEP-0077",
    version: "2.4",
    server: &[NS],
    on: |env| env.limits.registration,
    iq: &[IqRoute {
        name: "query",
        ns: NS,
        target: Target::Both,
        handle,
    }],
    ..NONE
};

fn handle(slice: &mut Slice, iq: Iq) {
    let own = iq.own() || iq.to.as_ref().is_some_and(|to| to.local().is_none());
    if !own || iq.session.is_none() {
        return slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
    }
    if !iq.set {
        return form(slice, iq);
    }
    if !slice.env.limits.registration {
        return refuse(slice, iq, &StanzaError::NOT_ALLOWED);
    }
    if iq.payload.find("remove", NS).is_some() {
        remove(slice, iq)
    } else {
        change_password(slice, iq)
    }
}

/// What is on file (section 3.1): never the password.
fn form(slice: &mut Slice, iq: Iq) {
    if !slice.env.limits.registration {
        return slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
    }
    let name = iq.from.local().expect("only users ask");
    let query = Element::new("query", NS)
        .child(Element::new("registered", NS))
        .child(Element::new("instructions", NS).text("Send a new password to change it."))
        .child(Element::new("username", NS).text(name))
        .child(Element::new("password", NS));
    slice.iq_result(&iq, Some(query));
}

/// An error without the request, which may hold a password (section 3.3).
fn refuse(slice: &mut Slice, mut iq: Iq, error: &StanzaError) {
    iq.payload = Element::new("query", NS);
    slice.iq_error(&iq, error);
}

fn change_password(slice: &mut Slice, mut iq: Iq) {
    let field = |name| {
        iq.payload
            .find(name, NS)
            .map(|e| e.text_content())
            .unwrap_or_default()
    };
    let (username, password) = (field("username"), field("password"));
    // held no longer than needed
    iq.payload = Element::new("query", NS);
    if username.is_empty() || password.is_empty() {
        return refuse(slice, iq, &StanzaError::BAD_REQUEST);
    }
    let name: Box<str> = iq.from.local().expect("only users ask").into();
    if jid::localpart(&username).ok().as_deref() != Some(&*name) {
        // section 3.1.1: a second identity
        return refuse(slice, iq, &StanzaError::NOT_ACCEPTABLE);
    }
    let job = Job::Derive {
        password,
        iterations: slice.env.limits.iterations,
    };
    let turn = slice.passwords.begin(&name);
    slice.compute(
        job,
        Box::new(move |slice, computed| {
            // helper threads overtake each other: the last one asked for is the one that holds
            let holds = slice
                .passwords
                .end(&name, turn, matches!(computed, Computed::Keys(Ok(_))));
            let (sha1, sha256) = match computed {
                Computed::Keys(Ok(keys)) => keys,
                // a password that SASLprep forbids, or an endless one
                Computed::Keys(Err(_)) => return refuse(slice, iq, &StanzaError::NOT_ACCEPTABLE),
                _ => return refuse(slice, iq, &StanzaError::RESOURCE_CONSTRAINT),
            };
            slice.edit(
                &name,
                |record| {
                    if holds {
                        record.sha1 = Some(stored(sha1));
                        record.sha256 = Some(stored(sha256));
                    }
                },
                Box::new(move |slice, result| match result {
                    Ok(()) => slice.iq_result(&iq, None),
                    Err(error) => {
                        tracing::warn!(%error, "a password could not be stored");
                        refuse(slice, iq, &error.into());
                    }
                }),
            );
        }),
    );
}

/// Password changes whose keys are being computed, by user.
#[derive(Default)]
pub struct Changes(FnvHashMap<Box<str>, Turns>);

#[derive(Default)]
struct Turns {
    begun: u64,
    /// The youngest one that was made.
    made: u64,
    open: u32,
}

impl Changes {
    fn begin(&mut self, name: &str) -> u64 {
        let turns = self.0.entry(name.into()).or_default();
        turns.begun += 1;
        turns.open += 1;
        turns.begun
    }

    /// Is it to be made: `good`, and no younger one was made before?
    fn end(&mut self, name: &str, turn: u64, good: bool) -> bool {
        let Some(turns) = self.0.get_mut(name) else {
            return good;
        };
        let holds = good && turn > turns.made;
        if holds {
            turns.made = turn;
        }
        turns.open -= 1;
        if turns.open == 0 {
            self.0.remove(name);
        }
        holds
    }
}

fn stored(keys: ScramKeys) -> record::ScramKeys {
    record::ScramKeys {
        iterations: keys.iterations,
        salt: keys.salt,
        stored_key: keys.stored_key,
        server_key: keys.server_key,
    }
}

fn remove(slice: &mut Slice, iq: Iq) {
    if iq.payload.elements().count() != 1 {
        return refuse(slice, iq, &StanzaError::BAD_REQUEST);
    }
    let name: Box<str> = iq.from.local().expect("only users ask").into();
    let then: Then = Box::new(move |slice, result| match result {
        Ok(()) => slice.iq_result(&iq, None),
        Err(error) => {
            tracing::warn!(%error, "an account could not be removed");
            slice.iq_error(&iq, &error.into());
        }
    });
    remove_account(slice, &name, then);
}

/// Removes an account of this slice. `then` runs when that is durable, or has failed; the account's sessions can still be
/// told so, and end after it.
pub fn remove_account(slice: &mut Slice, name: &str, then: Then) {
    let who: Box<str> = name.into();
    slice.write(
        name,
        Op::RemoveUser,
        Box::new(move |slice, result| {
            let gone = result.is_ok();
            then(slice, result);
            if gone {
                removed(slice, &who);
            }
        }),
    );
    if !slice.ledger.full {
        cancel_subscriptions(slice, name);
    }
}

/// The account is gone for good: its sessions end, and from now on there is no such user.
fn removed(slice: &mut Slice, name: &str) {
    for sid in slice.sessions_of(name) {
        // what it was sent has no recipient any more
        if let Some(sm) = slice
            .sessions
            .get_mut(sid)
            .and_then(|session| session.sm.as_mut())
        {
            sm.unacknowledged();
        }
        if let Some(session) = slice.sessions.get_mut(sid) {
            session.unconfirmed = None;
        }
        slice.end(
            sid,
            Some(StreamError::text(
                "not-authorized",
                "the account was removed",
            )),
        );
    }
    slice.set_user(name, None);
}

/// Section 3.2: the contacts are told that all subscriptions are cancelled.
fn cancel_subscriptions(slice: &mut Slice, name: &str) {
    let Some(record) = slice.user(name).map(|user| user.record.to_owned()) else {
        return;
    };
    let from = format!("{name}@{}", slice.env.domain);
    for contact in &record.roster {
        if contact.subscription.to() || contact.ask {
            cancel(slice, &from, &contact.jid, Kind::Unsubscribe, "unsubscribe");
        }
        if contact.subscription.from() || contact.approved {
            cancel(
                slice,
                &from,
                &contact.jid,
                Kind::Unsubscribed,
                "unsubscribed",
            );
        }
    }
    for request in &record.requests {
        cancel(
            slice,
            &from,
            &request.jid,
            Kind::Unsubscribed,
            "unsubscribed",
        );
    }
}

fn cancel(slice: &mut Slice, from: &str, to: &str, kind: Kind, typ: &str) {
    let Ok(to) = Jid::parse(to) else { return };
    let mut stanza = b"<presence".to_vec();
    attribute("type", typ, &mut stanza);
    attribute("from", from, &mut stanza);
    attribute("to", to.as_str(), &mut stanza);
    stanza.extend_from_slice(b"/>");
    slice.forward(&to, from, &stanza, Meta::new(kind), None);
}

#[cfg(test)]
mod tests {
    use crate::store::record::Subscription;
    use crate::xmpp::testing::{Client, World};

    fn iq(typ: &str, inner: &str) -> String {
        format!("<iq type='{typ}' id='r'><query xmlns='jabber:iq:register'>{inner}</query></iq>")
    }

    fn change(username: &str, password: &str) -> String {
        iq(
            "set",
            &format!("<username>{username}</username><password>{password}</password>"),
        )
    }

    #[test]
    fn of_two_new_passwords_the_last_one_asked_for_holds_whichever_is_computed_first() {
        let mut changes = super::Changes::default();
        let (first, second) = (changes.begin("alice"), changes.begin("alice"));
        assert!(changes.end("alice", second, true));
        assert!(!changes.end("alice", first, true));
        let (first, second) = (changes.begin("alice"), changes.begin("alice"));
        assert!(!changes.end("alice", second, false));
        assert!(changes.end("alice", first, true));
        assert!(changes.0.is_empty());
    }

    fn alice() -> (World, Client) {
        let mut w = World::new(1);
        w.add("alice");
        let a = w.online("alice", "a");
        (w, a)
    }

    #[test]
    fn who_asks_is_told_his_name_and_no_password() {
        let (mut w, a) = alice();
        w.send(a, &iq("get", ""));
        w.expect(a, &["<iq type='result' id='r' to='alice@localhost/a'><query xmlns='jabber:iq:register'><registered/>\
            <instructions>Send a new password to change it.</instructions><username>alice</username><password/></query></iq>"]);
    }

    #[test]
    fn a_new_password_is_confirmed_when_its_keys_are_durable() {
        let (mut w, a) = alice();
        w.tier.held = true;
        // the name is compared as an address
        w.send(a, &change("Alice", "n3w"));
        w.expect(a, &[]);
        assert!(w.stored("alice").sha256.is_none());
        w.release();
        w.expect(a, &["<iq type='result' id='r' to='alice@localhost/a'/>"]);
        let keys = w.stored("alice").sha256.clone().unwrap();
        let hash = crate::xmpp::sasl::Hash::Sha256;
        let derived = crate::xmpp::sasl::derive(hash, "n3w", &keys.salt, keys.iterations).unwrap();
        assert_eq!(derived.stored_key, keys.stored_key);
        assert_eq!(keys.iterations, 4096);
        assert!(w.stored("alice").sha1.is_some());
    }

    #[test]
    fn a_refused_change_changes_nothing_and_repeats_no_password() {
        let (mut w, a) = alice();
        w.add("bob");
        for (request, condition) in [
            (change("bob", "secret"), "not-acceptable"),
            (change("alice", ""), "bad-request"),
            (change("", "secret"), "bad-request"),
            (iq("set", "<password>secret</password>"), "bad-request"),
            (change("alice", "secret\u{7}"), "not-acceptable"),
            (
                iq("set", "<remove/><password>secret</password>"),
                "bad-request",
            ),
        ] {
            let Ok(()) = w.element(a, &request) else {
                continue;
            };
            w.run();
            let got = w.take(a).concat();
            assert!(got.contains(&format!("<{condition} ")), "{request}: {got}");
            assert!(!got.contains("secret"), "{got}");
        }
        w.tier.broken = true;
        w.send(a, &change("alice", "secret"));
        let got = w.take(a).concat();
        assert!(
            got.contains("<resource-constraint") && !got.contains("secret"),
            "{got}"
        );
        w.tier.broken = false;
        assert!(w.stored("alice").sha1.is_none() && w.stored("bob").sha1.is_none());
    }

    #[test]
    fn without_registration_there_is_none_of_this() {
        let mut w = World::with(1, |limits| limits.registration = false);
        w.add("alice");
        let a = w.online("alice", "a");
        w.send(a, &iq("get", ""));
        assert!(w.take(a).concat().contains("<service-unavailable"));
        for request in [change("alice", "x"), iq("set", "<remove/>")] {
            w.send(a, &request);
            assert!(w.take(a).concat().contains("<not-allowed"));
        }
        assert!(w.tier.users.contains_key("alice"));
        w.send(a, "<iq type='get' id='d' to='localhost'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>");
        assert!(!w.take(a).concat().contains("jabber:iq:register"));
    }

    #[test]
    fn somebody_elses_account_is_none_of_ones_business() {
        let (mut w, a) = alice();
        w.add("bob");
        for name in ["bob", "nobody"] {
            for request in [iq("get", ""), iq("set", "<remove/>"), change(name, "x")] {
                w.send(
                    a,
                    &request.replace("<iq ", &format!("<iq to='{name}@localhost' ")),
                );
                assert!(w.take(a).concat().contains("<service-unavailable"));
            }
        }
        assert!(w.tier.users.contains_key("bob"));
    }

    #[test]
    fn a_removed_account_ends_its_sessions_and_subscriptions() {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        let (carol, dave) = (w.on(0, "carol"), w.on(1, "dave"));
        w.befriend(&alice, &bob);
        w.item(&alice, &carol, Subscription::To);
        w.item(&carol, &alice, Subscription::From);
        w.item(&alice, &dave, Subscription::From);
        w.item(&dave, &alice, Subscription::To);
        let a = w.online(&alice, "a");
        let phone = w.online(&alice, "phone");
        let clients: Vec<Client> = [&bob, &carol, &dave].map(|name| w.online(name, "x")).into();
        w.take(a);
        w.take(phone);
        w.tier.held = true;
        w.send(a, &iq("set", "<remove/>"));
        assert!(!w.closed(a));
        w.release();
        let got = w.take(a);
        assert!(got[0].contains("type='result'"), "{got:?}");
        for (client, got) in [(a, got), (phone, w.take(phone))] {
            assert!(got.concat().contains("<not-authorized "), "{got:?}");
            assert!(w.closed(client));
        }
        let subscription = |w: &World, name: &str| {
            w.stored(name)
                .roster_item(&format!("{alice}@localhost"))
                .map(|item| item.subscription)
        };
        for (client, name, kinds) in [
            (
                clients[0],
                &bob,
                &["unavailable", "unsubscribe", "unsubscribed"][..],
            ),
            (clients[1], &carol, &["unsubscribe"][..]),
            (clients[2], &dave, &["unavailable", "unsubscribed"][..]),
        ] {
            let got = w.take(client).concat();
            for kind in kinds {
                assert!(
                    got.contains(&format!("type='{kind}'")),
                    "{kind} for {name}: {got}"
                );
            }
            assert_eq!(subscription(&w, name), Some(Subscription::None));
        }
        assert!(!w.tier.users.contains_key(&alice));
        w.send(
            clients[0],
            &format!("<message type='chat' to='{alice}@localhost'><body>x</body></message>"),
        );
        assert!(w.take(clients[0]).concat().contains("<service-unavailable"));
    }

    #[test]
    fn an_account_that_cannot_be_removed_stays() {
        let (mut w, a) = alice();
        w.tier.broken = true;
        w.send(a, &iq("set", "<remove/>"));
        assert!(w.take(a).concat().contains("<resource-constraint"));
        assert!(!w.closed(a));
        w.tier.broken = false;
        w.send(a, &iq("set", "<remove/>"));
        assert!(w.closed(a));
    }
}
