//! Message carbons (XEP-0280): the other sessions of a user, if they enabled it, get copies of the messages that one of them
//! sends or receives. A copy wraps the message's bytes as they went to its recipient (XEP-0297); nothing is parsed.
//!
//! Both hooks run at the owner of the user who gets the copies. A copy is for one session, live or waiting for resumption,
//! and for nobody else: it is never copied, stored, rerouted or answered by an error ([`Meta::COPY`]).

use smallvec::SmallVec;

use super::{Feature, Incoming, Iq, IqRoute, NONE, Outgoing, Target};
use crate::xmpp::error::StanzaError;
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:xmpp:carbons:2";
pub const NS_RULES: &str = "urn:xmpp:carbons:rules:0";

pub static FEATURE: Feature = Feature {
    name: "Message carbons, by stanza forwarding",
    spec: "XEP-0280, XEP-0297",
    version: "1.0.1, 1.0",
    server: &[NS, NS_RULES],
    account: &[NS, NS_RULES],
    iq: &[
        IqRoute {
            name: "enable",
            ns: NS,
            target: Target::Both,
            handle: enable,
        },
        IqRoute {
            name: "disable",
            ns: NS,
            target: Target::Both,
            handle: disable,
        },
    ],
    message_sent: Some(sent),
    message_in: Some(received),
    ..NONE
};

fn enable(slice: &mut Slice, iq: Iq) {
    switch(slice, iq, true);
}

fn disable(slice: &mut Slice, iq: Iq) {
    switch(slice, iq, false);
}

/// Asking for what is so already is fine (XEP-0280 section 10.1).
fn switch(slice: &mut Slice, iq: Iq, on: bool) {
    let own = iq.own() || iq.to.as_ref().is_some_and(|to| to.local().is_none());
    let session = iq
        .session
        .filter(|_| own)
        .and_then(|sid| slice.sessions.get_mut(sid));
    match session {
        // somebody else's account
        None => slice.iq_error(&iq, &StanzaError::NOT_ALLOWED),
        Some(_) if !iq.set => slice.iq_error(&iq, &StanzaError::BAD_REQUEST),
        Some(session) => {
            session.carbons = on;
            slice.iq_result(&iq, None);
        }
    }
}

/// Which way a message went, seen from the user who gets the copies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Sent,
    Received,
}

/// XEP-0280 section 6.1: may this message be copied?
fn eligible(meta: Meta, way: Way) -> bool {
    if !meta.has(Meta::CARBON) || meta.has(Meta::NO_COPY) || meta.has(Meta::COPY) {
        return false;
    }
    match meta.kind {
        Kind::GroupChat => false,
        // a room sends its private messages to each of the user's clients that are in it
        _ if meta.has(Meta::ROOM) => way == Way::Sent,
        _ => true,
    }
}

/// A session of this slice has sent a message: copies for the user's other sessions.
fn sent(slice: &mut Slice, name: &str, sid: SessionId, message: &Outgoing<'_>) {
    // what a user sends to himself is copied once, where it arrives
    if !eligible(message.meta, Way::Sent) || message.to.local() == Some(name) {
        return;
    }
    let Some(user) = slice.user(name) else {
        return;
    };
    let others = user.sessions.iter().copied().filter(|other| *other != sid);
    let copies = enabled(slice, others);
    copy(slice, &copies, Way::Sent, message.stanza, message.meta);
}

/// A message reached a user of this slice: copies for those of his sessions that it did not go to.
fn received(slice: &mut Slice, name: &str, message: &Incoming<'_>, taken: &[SessionId]) {
    if !eligible(message.meta, Way::Received) {
        return;
    }
    let Some(user) = slice.user(name) else { return };
    let others = user
        .sessions
        .iter()
        .copied()
        .filter(|sid| !taken.contains(sid));
    let mut copies = enabled(slice, others);
    // the user's own session knows what it sent
    copies.retain(|sid| {
        slice
            .sessions
            .get(*sid)
            .is_some_and(|s| *s.jid != *message.from)
    });
    copy(slice, &copies, Way::Received, message.stanza, message.meta);
}

fn enabled(slice: &Slice, sessions: impl Iterator<Item = SessionId>) -> SmallVec<[SessionId; 4]> {
    sessions
        .filter(|sid| slice.sessions.get(*sid).is_some_and(|s| s.carbons))
        .collect()
}

fn copy(slice: &mut Slice, sessions: &[SessionId], way: Way, stanza: &[u8], meta: Meta) {
    // the server's own writing: unprefixed, its default namespace left to the stream
    let Some(rest) = stanza.strip_prefix(b"<message") else {
        return;
    };
    for sid in sessions {
        let mut head = slice.buffer();
        let Some(session) = slice.sessions.get(*sid) else {
            continue;
        };
        head.extend_from_slice(b"<message");
        attribute("from", session.bare(), &mut head);
        attribute("to", &session.jid, &mut head);
        match meta.kind {
            Kind::Chat => head.extend_from_slice(b" type='chat'"),
            Kind::Headline => head.extend_from_slice(b" type='headline'"),
            Kind::MessageError => head.extend_from_slice(b" type='error'"),
            _ => {}
        }
        let (open, close): (&[u8], &[u8]) = match way {
            Way::Sent => (b"><sent xmlns='urn:xmpp:carbons:2'>", b"</sent></message>"),
            Way::Received => (
                b"><received xmlns='urn:xmpp:carbons:2'>",
                b"</received></message>",
            ),
        };
        head.extend_from_slice(open);
        head.extend_from_slice(
            b"<forwarded xmlns='urn:xmpp:forward:0'><message xmlns='jabber:client'",
        );
        slice.send(
            *sid,
            &[&head, rest, b"</forwarded>", close],
            meta.with(Meta::COPY),
        );
        slice.reuse(head);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::testing::{Client, World};

    const ENABLE: &str = "<iq type='set' id='c'><enable xmlns='urn:xmpp:carbons:2'/></iq>";

    /// Alice at her desk, and with carbons on her phone; Bob, on another shard.
    fn world() -> (World, Client, Client, Client, String) {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.add(&alice);
        w.add(&bob);
        let desk = w.online(&alice, "desk");
        let phone = w.online(&alice, "phone");
        let bob = w.online(&bob, "b");
        w.take(desk);
        w.send(phone, ENABLE);
        let to = w.session(phone).jid.to_string();
        w.expect(phone, &[&format!("<iq type='result' id='c' to='{to}'/>")]);
        (w, desk, phone, bob, alice)
    }

    fn jid(w: &World, client: Client) -> String {
        w.session(client).jid.to_string()
    }

    fn id(bare: &str) -> String {
        format!("<stanza-id xmlns='urn:xmpp:sid:0' by='{bare}' id='*'/>")
    }

    #[test]
    fn the_other_session_sees_what_one_gets_and_sends() {
        let (mut w, desk, phone, bob, alice) = world();
        let (bare, d, p, b) = (
            format!("{alice}@localhost"),
            jid(&w, desk),
            jid(&w, phone),
            jid(&w, bob),
        );
        w.send(
            bob,
            &format!("<message to='{d}' type='chat' id='1'><body>hello</body></message>"),
        );
        let original = |from: &str, to: &str, inner: &str| {
            format!("<message from='{from}' to='{to}' type='chat' id='1'>{inner}</message>")
        };
        let copy = |way: &str, inner: &str| {
            let inner = inner.replace("<message ", "<message xmlns='jabber:client' ");
            format!(
                "<message from='{bare}' to='{p}' type='chat'><{way} xmlns='urn:xmpp:carbons:2'>\
                 <forwarded xmlns='urn:xmpp:forward:0'>{inner}</forwarded></{way}></message>"
            )
        };
        let got = original(&b, &d, &format!("<body>hello</body>{}", id(&bare)));
        w.expect(desk, &[&got]);
        w.expect(phone, &[&copy("received", &got)]);
        w.send(
            desk,
            &format!("<message to='{b}' type='chat' id='1'><body>hi</body></message>"),
        );
        w.expect(
            phone,
            &[&copy("sent", &original(&d, &b, "<body>hi</body>"))],
        );
        w.expect(desk, &[]);
        // a message to the bare JID goes to both: nobody needs a copy
        w.take(bob);
        w.send(
            bob,
            &format!("<message to='{bare}' type='chat' id='1'><body>all</body></message>"),
        );
        assert_eq!(w.take(phone).len(), 1);
        assert_eq!(w.take(desk).len(), 1);
        assert!(w.take(bob).is_empty());
    }

    #[test]
    fn carbons_are_for_ones_own_sessions_and_can_be_switched_again_and_again() {
        let (mut w, desk, phone, bob, alice) = world();
        let (d, p, b) = (jid(&w, desk), jid(&w, phone), jid(&w, bob));
        w.send(phone, ENABLE);
        w.expect(phone, &[&format!("<iq type='result' id='c' to='{p}'/>")]);
        for _ in 0..2 {
            w.send(
                phone,
                "<iq type='set' id='d'><disable xmlns='urn:xmpp:carbons:2'/></iq>",
            );
            w.expect(phone, &[&format!("<iq type='result' id='d' to='{p}'/>")]);
        }
        w.send(
            bob,
            &format!("<message to='{d}' type='chat'><body>x</body></message>"),
        );
        w.expect(phone, &[]);
        w.send(
            bob,
            &ENABLE.replace("<iq ", &format!("<iq to='{alice}@localhost' ")),
        );
        let got = w.take(bob).concat();
        assert!(got.contains("<not-allowed") && got.contains(&b), "{got}");
    }

    #[test]
    fn what_is_private_or_no_conversation_is_not_copied() {
        let (mut w, desk, phone, bob, _) = world();
        let (d, b) = (jid(&w, desk), jid(&w, bob));
        let private = "<body>x</body><private xmlns='urn:xmpp:carbons:2'/>";
        for (typ, inner) in [
            ("chat", private),
            ("chat", "<body>x</body><no-copy xmlns='urn:xmpp:hints'/>"),
            ("groupchat", "<body>x</body>"),
            ("headline", "<body>x</body>"),
            ("normal", "<subject>x</subject>"),
            (
                "chat",
                "<body>x</body><x xmlns='http://jabber.org/protocol/muc#user'/>",
            ),
        ] {
            w.send(
                bob,
                &format!("<message to='{d}' type='{typ}'>{inner}</message>"),
            );
            assert_eq!(w.take(desk).len(), 1);
            w.expect(phone, &[]);
        }
        w.send(
            desk,
            &format!("<message to='{b}' type='chat'>{private}</message>"),
        );
        w.expect(phone, &[]);
        // since 1.0 the element stays
        assert!(w.take(bob).concat().contains("<private"));
        // written to somebody in a room, by one session only
        let pm = "<body>x</body><x xmlns='http://jabber.org/protocol/muc#user'/>";
        w.send(
            desk,
            &format!("<message to='{b}' type='chat'>{pm}</message>"),
        );
        assert_eq!(w.take(phone).len(), 1);
    }

    #[test]
    fn a_message_to_oneself_is_seen_once_everywhere() {
        let (mut w, desk, phone, _, alice) = world();
        let d = jid(&w, desk);
        w.send(desk, ENABLE);
        w.take(desk);
        let third = w.online(&alice, "third");
        w.take(desk);
        w.take(phone);
        w.send(
            desk,
            &format!("<message to='{alice}@localhost' type='chat'><body>x</body></message>"),
        );
        for client in [desk, phone, third] {
            let got = w.take(client);
            assert!(got.len() == 1 && !got[0].contains("carbons"), "{got:?}");
        }
        w.send(
            third,
            &format!("<message to='{d}' type='chat'><body>x</body></message>"),
        );
        assert!(!w.take(desk).concat().contains("carbons"));
        assert!(
            w.take(phone)
                .concat()
                .contains("<received xmlns='urn:xmpp:carbons:2'>")
        );
        w.expect(third, &[]);
    }

    #[test]
    fn the_error_to_a_copied_message_is_copied_too() {
        let (mut w, desk, phone, _, _) = world();
        w.send(
            desk,
            "<message to='nobody@localhost' type='chat' id='7'><body>x</body></message>",
        );
        assert!(w.take(desk).concat().contains("<service-unavailable"));
        let got = w.take(phone);
        assert_eq!(got.len(), 2);
        assert!(got[0].contains("<sent "));
        assert!(
            got[1].contains("<received ") && got[1].contains("type='error'"),
            "{}",
            got[1]
        );
    }

    #[test]
    fn a_copy_stands_alone_whatever_prefixes_its_original_had() {
        let (mut w, desk, phone, bob, _) = world();
        let d = jid(&w, desk);
        w.send(
            bob,
            &format!(
                "<message xmlns:x='urn:x' to='{d}' type='chat'><body>x</body><x:y/></message>"
            ),
        );
        let got = w.take(phone);
        let copy = crate::xmpp::parse_stanza(got[0].as_bytes()).unwrap();
        let original = copy
            .find("received", NS)
            .and_then(|e| e.find("forwarded", "urn:xmpp:forward:0"));
        let original = original
            .and_then(|e| e.find("message", "jabber:client"))
            .unwrap();
        assert!(
            original.find("y", "urn:x").is_some()
                && original.find("body", "jabber:client").is_some()
        );
    }

    #[test]
    fn a_copy_that_was_never_acknowledged_goes_nowhere_else() {
        let (mut w, desk, phone, bob, alice) = world();
        let d = jid(&w, desk);
        w.send(phone, "<enable xmlns='urn:xmpp:sm:3'/>");
        w.take(phone);
        w.send(
            bob,
            &format!("<message to='{d}' type='chat'><body>x</body></message>"),
        );
        assert_eq!(
            w.take(phone).len(),
            2,
            "the copy and a request for its acknowledgement"
        );
        w.take(desk);
        w.cut(phone);
        let got = w.take(desk);
        assert!(got.iter().all(|e| e.starts_with("<presence")), "{got:?}");
        assert!(w.tier.users[&alice].pending.is_empty());
        assert!(w.take(bob).is_empty());
    }

    #[test]
    fn who_takes_no_messages_himself_gets_the_copy_of_a_stored_one() {
        let (mut w, desk, phone, bob, alice) = world();
        w.logout(desk);
        w.send(phone, "<presence><priority>-1</priority></presence>");
        w.take(phone);
        w.send(
            bob,
            &format!("<message to='{alice}@localhost' type='chat'><body>x</body></message>"),
        );
        assert!(w.take(phone).concat().contains("<received "));
        assert_eq!(w.tier.users[&alice].pending.len(), 1);
    }
}
