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
        IqRoute { name: "enable", ns: NS, target: Target::Both, handle: enable },
        IqRoute { name: "disable", ns: NS, target: Target::Both, handle: disable },
    ],
    message_out: Some(sent),
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
    let session = iq.session.filter(|_| own).and_then(|sid| slice.sessions.get_mut(sid));
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

/// A session of this slice sends a message: copies for the user's other sessions.
fn sent(slice: &mut Slice, sid: SessionId, message: &Outgoing<'_>) -> Result<(), StanzaError> {
    if !eligible(message.meta, Way::Sent) {
        return Ok(());
    }
    let Some(session) = slice.sessions.get(sid) else { return Ok(()) };
    // what a user sends to himself is copied once, where it arrives
    if message.to.bare() == session.bare() {
        return Ok(());
    }
    let Some(user) = slice.user(&session.user) else { return Ok(()) };
    let others = user.sessions.iter().copied().filter(|other| *other != sid);
    let copies = enabled(slice, others);
    copy(slice, &copies, Way::Sent, message.stanza, message.meta);
    Ok(())
}

/// A message reached a user of this slice: copies for those of his sessions that it did not go to.
fn received(slice: &mut Slice, name: &str, message: &Incoming<'_>, taken: &[SessionId]) {
    if !eligible(message.meta, Way::Received) {
        return;
    }
    let Some(user) = slice.user(name) else { return };
    let others = user.sessions.iter().copied().filter(|sid| !taken.contains(sid));
    let mut copies = enabled(slice, others);
    // the user's own session knows what it sent
    copies.retain(|sid| slice.sessions.get(*sid).is_some_and(|s| *s.jid != *message.from));
    copy(slice, &copies, Way::Received, message.stanza, message.meta);
}

fn enabled(slice: &Slice, sessions: impl Iterator<Item = SessionId>) -> SmallVec<[SessionId; 4]> {
    sessions.filter(|sid| slice.sessions.get(*sid).is_some_and(|s| s.carbons)).collect()
}

fn copy(slice: &mut Slice, sessions: &[SessionId], way: Way, stanza: &[u8], meta: Meta) {
    // the server's own writing: unprefixed, its default namespace left to the stream
    let Some(rest) = stanza.strip_prefix(b"<message") else { return };
    for sid in sessions {
        let mut head = slice.buffer();
        let Some(session) = slice.sessions.get(*sid) else { continue };
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
            Way::Received => (b"><received xmlns='urn:xmpp:carbons:2'>", b"</received></message>"),
        };
        head.extend_from_slice(open);
        head.extend_from_slice(b"<forwarded xmlns='urn:xmpp:forward:0'><message xmlns='jabber:client'");
        slice.send(*sid, &[&head, rest, b"</forwarded>", close], meta.with(Meta::COPY));
        slice.reuse(head);
    }
}
