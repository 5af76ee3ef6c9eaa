//! What is said in a room (XEP-0045 sections 7.4, 7.5, 8.1).
//!
//! A message that is archived is journalled under the room first and told to all when it is durable ([`reflected`]); its sender's
//! receipt settles then. Whatever is not worth keeping (chat states, `<no-store/>`, rooms without an archive) waits for what came
//! before it and is told at once.

use std::borrow::Cow;

use super::fanout;
use super::history::Past;
use super::privilege::Role;
use super::{NS_USER, Room, at_work, join, mediated};
use crate::store::change::{ArchivedMessage, Change, Message};
use crate::store::room::{Subject, Who};
use crate::xml::escape::escape_text;
use crate::xml::view::View;
use crate::xml::{Element, StreamNs};
use crate::xmpp::error::StanzaError;
use crate::xmpp::feature::{occupant_id, retract, stable_id};
use crate::xmpp::jid::Jid;
use crate::xmpp::ledger::Act;
use crate::xmpp::message::{attribute, compose};
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::{Fate, Slice, Waiting};
use crate::xmpp::{ENTERED, NS_CLIENT, parse_stanza};

/// Does the room keep it, if it has an archive?
pub fn kept(meta: Meta) -> bool {
    meta.kind == Kind::GroupChat
        && (meta.has(Meta::BODY) || meta.has(Meta::STORE) || meta.has(Meta::RETRACT))
        && !meta.has(Meta::NO_STORE)
        && !meta.has(Meta::NO_ARCHIVE)
}

/// A message that changes nothing of the room: it may follow others into the journal.
pub fn only_follows(room: &Room, stanza: &Waiting) -> bool {
    room.state.settings.archived
        && kept(stanza.meta)
        && stanza.meta.has(Meta::BODY)
        && !stanza.to.contains('/')
}

/// A message for a room, or through it.
pub fn inbound(
    slice: &mut Slice,
    room: &mut Room,
    to: &Jid<'_>,
    from: &Jid<'_>,
    stanza: &Waiting,
) -> Fate {
    let result = match (stanza.meta.kind, to.resource()) {
        (Kind::GroupChat, None) => to_all(slice, room, from, stanza),
        // section 7.5
        (Kind::GroupChat, Some(_)) => Err(StanzaError::BAD_REQUEST),
        (Kind::MessageError, None) => {
            join::drop_session(slice, room, from.as_str());
            Ok(Fate::Decided)
        }
        // from a component, about what all got: he is not there any more
        (Kind::MessageError, Some(_)) if !slice.env.is_local(from) && is_final(stanza) => {
            join::drop_session(slice, room, from.as_str());
            Ok(Fate::Decided)
        }
        (_, Some(nick)) => private(slice, room, nick, from, stanza),
        (Kind::Normal, None) => mediated::inbound(slice, room, from, stanza),
        (Kind::Headline, None) => Ok(Fate::Decided),
        // nobody answers for the room itself
        (_, None) => Err(StanzaError::SERVICE_UNAVAILABLE),
    };
    match result {
        Ok(fate) => fate,
        Err(error) => {
            room.refuse(slice, to, stanza, &error);
            Fate::Decided
        }
    }
}

/// Does an error say that nobody is there (XEP-0045 section 7.14)?
fn is_final(stanza: &Waiting) -> bool {
    const FINAL: [&str; 8] = [
        "gone",
        "item-not-found",
        "jid-malformed",
        "recipient-unavailable",
        "redirect",
        "remote-server-not-found",
        "remote-server-timeout",
        "service-unavailable",
    ];
    let message = parse_stanza(&stanza.stanza);
    let error = message.as_ref().and_then(|m| m.find("error", NS_CLIENT));
    error.is_some_and(|error| error.elements().any(|e| FINAL.contains(&&*e.name)))
}

fn to_all(
    slice: &mut Slice,
    room: &mut Room,
    from: &Jid<'_>,
    stanza: &Waiting,
) -> Result<Fate, StanzaError> {
    let place = room.occupants.find(from.as_str());
    // section 7.4
    let Some(place) = place else {
        return Err(StanzaError::NOT_ACCEPTABLE.text("only for those who are in the room"));
    };
    let (ms, rate) = (slice.now.ms, slice.env.limits.rooms.messages_per_second_max);
    let Some(occupant) = room.occupants.get_mut(place) else {
        return Err(StanzaError::NOT_ACCEPTABLE);
    };
    if !occupant.messages.take(ms, rate, 3) {
        slice.counters.room_refused += 1;
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("too many messages at once"));
    }
    let role = occupant.role;
    let nick = occupant.nick.clone();
    let id = occupant.id.clone();
    let affiliation = occupant.affiliation;
    let Ok(view) = View::parse(&stanza.stanza, &StreamNs::client(), &ENTERED) else {
        return Err(StanzaError::BAD_REQUEST);
    };
    let subject = view.child("subject", NS_CLIENT);
    let subject = subject.filter(|_| {
        view.child("body", NS_CLIENT).is_none() && view.child("thread", NS_CLIENT).is_none()
    });
    if let Some(subject) = subject {
        let text = subject.text().into_owned();
        return change_subject(slice, room, role, &nick, text, &view, stanza);
    }
    // section 7.5: visitors have no voice
    if role < Role::Participant {
        return Err(StanzaError::FORBIDDEN.text("only for those with voice"));
    }
    slice.counters.room_messages += 1;
    let said = said(room, &nick, &id, &view);
    if !room.state.settings.archived || !kept(stanza.meta) {
        let everybody = room.everybody(&slice.env);
        fanout::send(slice, &everybody, &said, stanza.meta);
        return Ok(Fate::Decided);
    }
    if slice.ledger.full {
        slice.counters.journal_refused += 1;
        return Err(StanzaError::RESOURCE_CONSTRAINT);
    }
    let message_id = slice.next_id();
    let signed = signed(&said, from.as_str(), affiliation.as_str(), role.as_str());
    let (kind, flags) = stanza.meta.numbers();
    let change = Change::Message(Message {
        id: message_id,
        owner: &room.name,
        what: Message::RECEIVED | Message::ARCHIVE,
        kind,
        flags,
        peer: &room.occupant_jid(&nick),
        twin: 0,
        stream: "",
        count: 0,
        stanza: &signed,
    });
    room.flow.messages += 1;
    let act = Act::Reflected {
        meta: stanza.meta,
        receipt: stanza.receipt,
    };
    slice.ledger.journal(&room.name, &change, act);
    if stanza.meta.has(Meta::RETRACT) {
        retract::journal_in_room(slice, &room.name, message_id, &id, &said);
    }
    Ok(Fate::Open)
}

/// The message as all get it, without `to` and stable id: from the nickname, with the occupant's id (XEP-0421); what claims to
/// be the room's is taken out.
fn said(room: &Room, nick: &str, id: &str, view: &View<'_>) -> Vec<u8> {
    let from = room.occupant_jid(nick);
    let forged = view.children().iter().any(|c| {
        &*c.ns == occupant_id::NS || &*c.ns == NS_USER || (c.name == "delay" && c.ns == NS_DELAY)
    });
    // what hangs on prefixes is written anew, so that nothing of the start tag stays but what is the room's
    let mut out = if forged || !view.standalone() || stable_id::present(view) {
        let mut element = view.to_element();
        element.unset("to");
        element.set("from", &*from);
        stable_id::strip(&mut element, &room.jid);
        element.remove_children(|c| {
            c.ns == occupant_id::NS
                || c.ns == NS_USER
                || (c.is("delay", NS_DELAY) && c.get("from") == Some(&*room.jid))
        });
        // `from` comes last, as in what is composed
        element.unset("from");
        let element = element.attr("from", &*from);
        let mut out = Vec::new();
        element.write(&mut out, NS_CLIENT);
        out
    } else {
        compose(view, &from, None, None, Vec::new())
    };
    add(&mut out, |out| {
        out.extend_from_slice(b"<occupant-id xmlns='urn:xmpp:occupant-id:0'");
        attribute("id", id, out);
        out.extend_from_slice(b"/>");
    });
    out
}

const SIGNATURE: &[u8] = b"<x xmlns='http://jabber.org/protocol/muc#user'><item affiliation='";

/// The message as it is kept: with who has said it, for those who may see that later (XEP-0313 section 7.3.1), and for whoever
/// must prove it.
fn signed(said: &[u8], jid: &str, affiliation: &str, role: &str) -> Vec<u8> {
    let mut out = said.to_vec();
    add(&mut out, |out| {
        out.extend_from_slice(SIGNATURE);
        out.extend_from_slice(affiliation.as_bytes());
        out.push(b'\'');
        attribute("jid", jid, out);
        attribute("role", role, out);
        out.extend_from_slice(b"/></x>");
    });
    out
}

/// The message as all get it, without that. Nobody but the room writes such an element: [`said`] takes it out of what comes.
pub fn unsigned(kept: &[u8]) -> Cow<'_, [u8]> {
    let end = b"'/></x></message>";
    match memchr::memmem::rfind(kept, SIGNATURE) {
        Some(at)
            if kept.ends_with(end)
                && memchr::memchr(b'<', &kept[at + SIGNATURE.len()..kept.len() - end.len()])
                    .is_none() =>
        {
            Cow::Owned([&kept[..at], b"</message>"].concat())
        }
        _ => Cow::Borrowed(kept),
    }
}

const NS_DELAY: &str = "urn:xmpp:delay";

/// Writes something at the end of a `<message/>`.
pub fn add(stanza: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let end = b"</message>";
    if stanza.ends_with(end) {
        stanza.truncate(stanza.len() - end.len());
    } else if stanza.ends_with(b"/>") {
        stanza.truncate(stanza.len() - 2);
        stanza.push(b'>');
    }
    write(stanza);
    stanza.extend_from_slice(end);
}

/// The journal has a message: everybody gets it.
pub fn reflected(slice: &mut Slice, name: &str, message: &ArchivedMessage<'_>, meta: Meta) {
    let id = message.id.to_native();
    at_work(slice, name, |slice, room| {
        // of a room that has ended meanwhile: this one has begun anew
        room.flow.messages = room.flow.messages.saturating_sub(1);
        let said = unsigned(&message.stanza);
        let Some(stanza) = stable_id::stamp(slice, &room.jid, &said, id) else {
            return;
        };
        if room.occupants.take_changed() || room.audience.is_none() {
            room.audience = Some(room.everybody(&slice.env));
        }
        if let Some(everybody) = &room.audience {
            fanout::send(slice, everybody, &stanza, meta);
        }
        let limits = &slice.env.limits.rooms;
        let past = Past {
            at_ms: slice.now.unix_ms,
            stanza: stanza.as_slice().into(),
        };
        room.history.push(past, limits);
        slice.reuse(stanza);
    });
}

/// Section 8.1.
fn change_subject(
    slice: &mut Slice,
    room: &mut Room,
    role: Role,
    nick: &str,
    text: String,
    view: &View<'_>,
    stanza: &Waiting,
) -> Result<Fate, StanzaError> {
    let least = match room.state.settings.subject_open {
        true => Role::Participant,
        false => Role::Moderator,
    };
    if role < least {
        return Err(StanzaError::FORBIDDEN);
    }
    if text.len() > slice.env.limits.rooms.subject_bytes_max {
        slice.counters.room_refused += 1;
        return Err(StanzaError::NOT_ACCEPTABLE.text("the subject is too long"));
    }
    let id = view.attr("id").map(|id| id.into_owned());
    let subject = Subject {
        text,
        nick: nick.into(),
        at: slice.now.unix,
    };
    let (receipt, nick): (_, Box<str>) = (stanza.receipt, nick.into());
    room.change(
        slice,
        move |state| state.subject = Some(subject),
        move |slice, room| {
            let text = room.state.subject.as_ref().map_or("", |s| &s.text);
            let stanza = subject_of(&room.occupant_jid(&nick), text, id.as_deref(), None);
            let everybody = room.everybody(&slice.env);
            fanout::send(slice, &everybody, &stanza, Meta::new(Kind::GroupChat));
            if let Some(receipt) = receipt {
                slice.finish(receipt);
            }
        },
    )?;
    Ok(Fate::Open)
}

fn subject_of(from: &str, text: &str, id: Option<&str>, at: Option<(u64, &str)>) -> Vec<u8> {
    let mut out = b"<message type='groupchat'".to_vec();
    if let Some(id) = id {
        attribute("id", id, &mut out);
    }
    attribute("from", from, &mut out);
    out.extend_from_slice(b"><subject>");
    escape_text(text, &mut out);
    out.extend_from_slice(b"</subject>");
    if let Some((unix, room)) = at {
        out.extend_from_slice(b"<delay xmlns='urn:xmpp:delay'");
        attribute("from", room, &mut out);
        let stamp = crate::xmpp::feature::time::stamp(unix);
        attribute("stamp", &stamp, &mut out);
        out.extend_from_slice(b"/>");
    }
    out.extend_from_slice(b"</message>");
    out
}

/// What ends coming in (section 7.2.15): the subject, empty if there is none.
pub fn subject_stanza(room: &Room) -> Vec<u8> {
    match &room.state.subject {
        Some(subject) => subject_of(
            &room.occupant_jid(&subject.nick),
            &subject.text,
            None,
            Some((subject.at, &room.jid)),
        ),
        None => subject_of(&room.jid, "", None, None),
    }
}

/// Section 7.5: to one occupant. His owner keeps it as any message, so the sender's receipt goes with it.
fn private(
    slice: &mut Slice,
    room: &mut Room,
    nick: &str,
    from: &Jid<'_>,
    stanza: &Waiting,
) -> Result<Fate, StanzaError> {
    let error = stanza.meta.kind == Kind::MessageError;
    let Some(place) = room.occupants.find(from.as_str()) else {
        return Err(StanzaError::NOT_ACCEPTABLE.text("only for those who are in the room"));
    };
    let target = room.occupants.named(nick);
    let (ms, rate) = (slice.now.ms, slice.env.limits.rooms.messages_per_second_max);
    let who = room.state.settings.private_messages;
    let Some(sender) = room.occupants.get_mut(place) else {
        return Err(StanzaError::NOT_ACCEPTABLE);
    };
    if !error && !sender.messages.take(ms, rate, 3) {
        slice.counters.room_refused += 1;
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("too many messages at once"));
    }
    let least = match who {
        Who::Anyone => Role::Visitor,
        Who::Participants => Role::Participant,
        Who::Moderators | Who::Nobody => Role::Moderator,
    };
    if !error && (sender.role < least || who == Who::Nobody) {
        return Err(StanzaError::FORBIDDEN.text("private messages are not for you here"));
    }
    let own_nick = sender.nick.clone();
    let id = sender.id.clone();
    let Some(target) = target.and_then(|place| room.occupants.get(place)) else {
        return Err(StanzaError::ITEM_NOT_FOUND);
    };
    let Some(mut element) = parse_stanza(&stanza.stanza) else {
        return Err(StanzaError::BAD_REQUEST);
    };
    let own = |c: &Element| c.ns == NS_USER || c.ns == occupant_id::NS;
    element.remove_children(own);
    if !error {
        element = element
            .child(Element::new("x", NS_USER))
            .child(Element::new("occupant-id", occupant_id::NS).attr("id", &*id));
    }
    let from = room.occupant_jid(&own_nick);
    let sessions: Vec<Box<str>> = target.sessions.iter().map(|s| s.jid.clone()).collect();
    let meta = stanza.meta.with(Meta::ROOM);
    let mut fate = Fate::Decided;
    // the newest one has it for good; the others see it, too
    for (at, jid) in sessions.iter().rev().enumerate() {
        let Ok(to) = Jid::parse(jid) else { continue };
        element.set("to", to.as_str());
        stable_id::strip(&mut element, to.bare());
        element.unset("from");
        element.attrs.push(("from".into(), from.clone()));
        if at == 0 {
            slice.route_element(&to, &from, &element, meta, stanza.receipt);
            if let Some(receipt) = stanza.receipt {
                slice.passed_on(receipt);
                fate = Fate::Open;
            }
        } else {
            let copy = meta.with(Meta::COPY);
            slice.route_element(&to, &from, &element, copy, None);
        }
    }
    Ok(fate)
}
