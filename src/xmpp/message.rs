//! Messages: from a session's stream to the routing rules of RFC 6121 section 8.5.
//!
//! A message that must survive ([`Meta::storable`]) is journalled twice: by its sender's owner ([`outbound`]: his archive) and
//! by its recipient's ([`accept`]: archive and pending delivery). What follows from it (copies, delivery) happens when the
//! journal has it ([`sent`], [`accepted`]). A plain chat message is forwarded as the bytes it came in: only the start tag is written anew (`from` is stamped, `to`
//! normalised), no tree is built.

use std::rc::Rc;

use smallvec::SmallVec;

use super::NS_CLIENT;
use super::batch::Receipt;
use super::error::StanzaError;
use super::feature::{Incoming, Outgoing, blocking, hints, offline, push, retract, stable_id};
use super::jid::Jid;
use super::ledger::Act;
use super::meta::{Kind, Meta};
use super::session::SessionId;
use super::slice::{Fate, Slice, Slot};
use super::storing::{self, Side};
use crate::observe::Stamp;
use crate::store::change::{ArchivedMessage, Change, Message};
use crate::store::tier::Pending;
use crate::xml::dom::Element;
use crate::xml::escape::escape_attr;
use crate::xml::view::View;

/// A message of a session of this slice.
pub fn outbound(slice: &mut Slice, sid: SessionId, view: &View<'_>) {
    slice.counters.messages_in += 1;
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let own: Box<str>;
    let to_text = view.attr("to");
    let to = match &to_text {
        Some(to) => Jid::parse(to),
        None => {
            // RFC 6121 8.1: no `to` means the sender's own bare JID
            own = session.bare().into();
            Jid::parse(&own)
        }
    };
    let Ok(to) = to else {
        return bounce_out(slice, sid, view, &StanzaError::JID_MALFORMED);
    };
    if !slice.is_reached(&to) {
        return bounce_out(slice, sid, view, &StanzaError::REMOTE_SERVER_NOT_FOUND);
    }
    let local = slice.env.is_local(&to);
    if to.local().is_none() && (local || slice.env.is_room(&to)) {
        // nobody reads what is sent to the server itself, or to the service of rooms
        return bounce_out(slice, sid, view, &StanzaError::SERVICE_UNAVAILABLE);
    }
    if let Err(error) = may_send(slice, sid, &to) {
        return bounce_out(slice, sid, view, &error);
    }
    let meta = Meta {
        read: Some(Stamp::at(slice.now.us)),
        ..hints::meta(view)
    };
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let (lang, jid) = (session.lang.clone(), session.jid.clone());
    let scratch = slice.take_scratch();
    let stanza = compose(view, &jid, Some(&to), lang.as_deref(), scratch);
    let outgoing = Outgoing {
        to: &to,
        from: &jid,
        stanza: &stanza,
        meta,
    };
    for hook in slice.hooks.message_out.clone().iter() {
        if let Err(error) = hook(slice, sid, &outgoing) {
            slice.give_scratch(stanza);
            return bounce_out(slice, sid, view, &error);
        }
    }
    let Some(user) = slice.sessions.get(sid).map(|s| s.user.clone()) else {
        return;
    };
    if !meta.storable() {
        let receipt = slice.current;
        if slice.ledger.holds(&user) {
            let act = Act::Sent {
                session: sid,
                to: slice.ledger.keep(to.as_str().as_bytes()),
                from: slice.ledger.keep(jid.as_bytes()),
                stanza: Some(slice.ledger.keep(&stanza)),
                meta,
                receipt: None,
            };
            slice.ledger.queue(&user, act);
        } else {
            self::sent(slice, &user, sid, to.as_str(), &jid, &stanza, meta);
        }
        slice.route(&to, &jid, &stanza, meta, receipt);
    } else if slice.ledger.full {
        slice.give_scratch(stanza);
        slice.counters.journal_refused += 1;
        return bounce_out(slice, sid, view, &JOURNAL_FULL);
    } else {
        // nobody asks for the fate of what came before <enable/>, and counting begins anew there
        let receipt = slice.current.unwrap_or(Receipt {
            shard: slice.env.shard,
            session: SessionId::NONE,
            seq: 0,
            twin: 0,
        });
        // what a user sends to himself stands in his archive once
        let twin = match local && to.local() == Some(&user) {
            true => 0,
            false => record_sent(slice, (&user, sid), receipt, &to, &jid, &stanza, meta),
        };
        slice.route(&to, &jid, &stanza, meta, Some(Receipt { twin, ..receipt }));
    }
    slice.give_scratch(stanza);
}

const JOURNAL_FULL: StanzaError = StanzaError::RESOURCE_CONSTRAINT;

/// The sender's record of a message; its id.
fn record_sent(
    slice: &mut Slice,
    (user, session): (&Rc<str>, SessionId),
    receipt: Receipt,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
) -> u64 {
    let id = slice.next_id();
    let what = storing::what(slice, user, Side::Sender, to.as_str(), meta);
    let (kind, flags) = meta.numbers();
    let stream = slice
        .sessions
        .get(receipt.session)
        .and_then(|s| s.sm.as_ref());
    let change = Change::Message(Message {
        id,
        owner: user,
        what,
        kind,
        flags,
        peer: to.as_str(),
        twin: 0,
        stream: stream.map(|sm| &*sm.id).unwrap_or_default(),
        count: receipt.seq,
        stanza,
    });
    let act = Act::Sent {
        session,
        to: slice.ledger.keep(to.as_str().as_bytes()),
        from: slice.ledger.keep(from.as_bytes()),
        stanza: None,
        meta,
        receipt: Some(receipt),
    };
    slice.ledger.journal(user, &change, act);
    if meta.has(Meta::RETRACT) {
        retract::journal(slice, user, id, what, to.as_str(), stanza);
    }
    slice.defer(receipt);
    id
}

/// A message of the user's has left, for good: his other sessions may see it.
pub fn sent(
    slice: &mut Slice,
    user: &str,
    session: SessionId,
    to: &str,
    from: &str,
    stanza: &[u8],
    meta: Meta,
) {
    let Ok(to) = Jid::parse(to) else { return };
    let outgoing = Outgoing {
        to: &to,
        from,
        stanza,
        meta,
    };
    for hook in slice.hooks.message_sent.clone().iter() {
        hook(slice, user, session, &outgoing);
    }
}

/// XEP-0191 3: a user may not write to those whom the user blocks.
pub fn may_send(slice: &Slice, sid: SessionId, to: &Jid<'_>) -> Result<(), StanzaError> {
    let Some(session) = slice.sessions.get(sid) else {
        return Ok(());
    };
    blocking::may_send(slice, &session.user, to)
}

/// The stanza as its recipient gets it: start tag with `from` stamped and `to` normalised, the payload as it came.
/// Stanzas whose payload hangs on the sender's stream (prefixes, other default namespaces) go through a tree.
pub fn compose(
    view: &View<'_>,
    from: &str,
    to: Option<&Jid<'_>>,
    lang: Option<&str>,
    mut out: Vec<u8>,
) -> Vec<u8> {
    if !view.standalone() || stable_id::present(view) {
        let mut element = view.to_element();
        element.set("from", from);
        if let Some(to) = to {
            element.set("to", to.as_str());
            stable_id::strip(&mut element, to.bare());
        }
        if let Some(lang) = lang
            && element.get("xml:lang").is_none()
        {
            element.set("xml:lang", lang);
        }
        element.write(&mut out, NS_CLIENT);
        return out;
    }
    let mut has_lang = false;
    out.push(b'<');
    out.extend_from_slice(view.name().as_bytes());
    for attr in view.attrs() {
        match attr.name {
            "from" | "to" => continue,
            "xml:lang" => has_lang = true,
            _ => {}
        }
        out.push(b' ');
        out.extend_from_slice(attr.name.as_bytes());
        out.push(b'=');
        out.push(attr.quote);
        out.extend_from_slice(attr.raw.as_bytes());
        out.push(attr.quote);
    }
    if let Some(to) = to {
        attribute("to", to.as_str(), &mut out);
    }
    attribute("from", from, &mut out);
    if let Some(lang) = lang
        && !has_lang
    {
        attribute("xml:lang", lang, &mut out);
    }
    if view.inner().is_empty() {
        out.extend_from_slice(b"/>");
        return out;
    }
    out.push(b'>');
    out.extend_from_slice(view.inner().as_bytes());
    out.extend_from_slice(b"</");
    out.extend_from_slice(view.name().as_bytes());
    out.push(b'>');
    out
}

/// ` name='value'`, escaped.
pub fn attribute(name: &str, value: &str, out: &mut Vec<u8>) {
    out.push(b' ');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"='");
    escape_attr(value, out);
    out.push(b'\'');
}

/// Answers a stanza of a session of this slice by an error, if it may be answered by one.
pub fn bounce_out(slice: &mut Slice, sid: SessionId, view: &View<'_>, error: &StanzaError) {
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let Some((answer, kind)) = error_answer(view, &session.jid, error) else {
        return;
    };
    slice.counters.bounces += 1;
    slice.send_element(sid, &answer, Meta::new(kind).with(Meta::SERVER));
}

/// The error that `to` gets for his stanza, if it may be answered by one.
pub fn error_answer(view: &View<'_>, to: &str, error: &StanzaError) -> Option<(Element, Kind)> {
    let typ = view.attr("type");
    let (answerable, kind) = match view.name() {
        "iq" => {
            let kind = Kind::iq(typ.as_deref());
            let answer = matches!(kind, Some(Kind::IqResult | Kind::IqError));
            (!answer, Kind::IqError)
        }
        "message" => {
            let kind = Kind::message(typ.as_deref());
            (kind != Kind::MessageError, Kind::MessageError)
        }
        _ => (typ.as_deref() != Some("error"), Kind::PresenceError),
    };
    if !answerable {
        return None;
    }
    let original = view.to_element();
    let mut answer = Element::new(view.name(), NS_CLIENT)
        .attr("type", "error")
        .attr("to", to);
    if let Some(to) = original.get("to") {
        answer = answer.attr("from", to);
    }
    if let Some(id) = original.get("id") {
        answer = answer.attr("id", id);
    }
    for child in original.elements() {
        answer = answer.child(child.clone());
    }
    Some((answer.child(error.element()), kind))
}

/// Where a message goes (RFC 6121 8.5.2 and 8.5.3, table in 8.5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// To these sessions.
    Sessions,
    /// To the offline queue.
    Offline,
    Drop,
    Refuse,
}

/// A message that must survive, for a user of this slice who is present or being loaded: refused now, or journalled.
pub fn accept(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    let name = to.local().expect("only users are routed to");
    let Ok(from_jid) = Jid::parse(from) else {
        return Fate::Decided;
    };
    let present = slice.user(name).map(|user| user.name.clone());
    if present.is_some() {
        if !slice.admits(to, &from_jid, stanza, meta) {
            return Fate::Decided;
        }
        let rule = choose(slice, to, meta, &mut SmallVec::new());
        // XEP-0160 section 3: a full queue is said, not silent
        if rule == Rule::Refuse || (rule == Rule::Offline && offline::is_full(slice, name, stanza))
        {
            slice.bounce(to, from, stanza, meta, &StanzaError::SERVICE_UNAVAILABLE);
            return Fate::Decided;
        }
    }
    if slice.ledger.full {
        slice.counters.journal_refused += 1;
        slice.bounce(to, from, stanza, meta, &JOURNAL_FULL);
        return Fate::Decided;
    }
    let (mut side, mut stream) = (Side::Recipient, None);
    if from_jid.bare() == to.bare() {
        side = Side::Both;
        stream = receipt
            .filter(|r| r.shard == slice.env.shard)
            .and_then(|r| slice.sessions.get(r.session)?.sm.as_ref());
    }
    let stream: Box<str> = stream.map(|sm| sm.id.clone()).unwrap_or_default();
    let what = storing::what(slice, name, side, from, meta);
    let id = slice.next_id();
    let (kind, flags) = meta.numbers();
    let change = Change::Message(Message {
        id,
        owner: name,
        what,
        kind,
        flags,
        peer: from,
        twin: receipt.map_or(0, |r| r.twin),
        stream: &stream,
        count: receipt.map_or(0, |r| r.seq),
        stanza,
    });
    let act = Act::Received {
        to: slice.ledger.keep(to.as_str().as_bytes()),
        meta,
        receipt,
    };
    let user = present.unwrap_or_else(|| name.into());
    slice.ledger.journal(&user, &change, act);
    if meta.has(Meta::RETRACT) {
        retract::journal(slice, &user, id, what, from, stanza);
    }
    Fate::Open
}

/// The journal has it: it is delivered, or waits for its recipient.
pub fn accepted(slice: &mut Slice, to: &str, message: &ArchivedMessage<'_>, meta: Meta) {
    let name = &*message.owner;
    let undecided = message.what & Message::UNDECIDED != 0;
    let Ok(to) = Jid::parse(to) else { return };
    let user = match slice.users.get(name) {
        Some(Slot::Present(user)) => user.name.clone(),
        Some(Slot::Missing) => {
            if undecided {
                slice.refuse_missing(&to, &message.peer, &message.stanza, meta);
            }
            let ms = slice.now.ms;
            return slice.ledger.dropped(&name.into(), message.id.into(), ms);
        }
        // he gets it with what else waits for him when he is loaded
        Some(Slot::Loading { .. } | Slot::Room(_)) => return,
        None => {
            if undecided {
                slice.want(name);
            }
            return;
        }
    };
    let id = message.id.into();
    if undecided && !admitted(slice, &user, &to, &message.peer, &message.stanza, meta, id) {
        return;
    }
    let by = to.bare();
    let mut archived = message.what & Message::ARCHIVE != 0;
    if undecided && archived && !storing::wanted(slice, name, &message.peer) {
        let ms = slice.now.ms;
        slice.ledger.unarchived(&user, id, ms);
        archived = false;
    }
    let stamped = archived
        .then(|| stable_id::stamp(slice, by, &message.stanza, id))
        .flatten();
    let stanza = stamped.as_deref().unwrap_or(&message.stanza);
    let mut taken: SmallVec<[SessionId; 4]> = SmallVec::new();
    match choose(slice, &to, meta, &mut taken) {
        Rule::Sessions => {
            slice.counters.messages_delivered += 1;
            slice.fx.delivered(meta);
            offline::hold(slice, &user, id, taken.len());
            for sid in &taken {
                slice.hand(*sid, &[stanza], meta, id);
            }
        }
        // whatever has become of the recipient's sessions meanwhile, it was accepted
        Rule::Offline | Rule::Refuse | Rule::Drop => {
            slice.counters.messages_offline += 1;
            offline::keep(slice, &user, id, stanza, meta);
        }
    }
    let incoming = Incoming {
        to: &to,
        from: &message.peer,
        stanza,
        meta,
    };
    for hook in slice.hooks.message_in.clone().iter() {
        hook(slice, &user, &incoming, &taken);
    }
    if let Some(stamped) = stamped {
        slice.reuse(stamped);
    }
}

/// May a message come in that was accepted before its recipient was known? If not, it is in no archive and no queue. Either
/// way that is said once, for good: whatever he changes later, and over crashes.
fn admitted(
    slice: &mut Slice,
    user: &Rc<str>,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    id: u64,
) -> bool {
    let admitted = Jid::parse(from).is_ok_and(|from| slice.admits(to, &from, stanza, meta));
    let ms = slice.now.ms;
    match admitted {
        true => slice.ledger.decided(id, ms),
        false => slice.ledger.dropped(user, id, ms),
    }
    admitted
}

/// The recipient was loaded: what was accepted for him before is decided.
pub fn decide(slice: &mut Slice, name: &str, undecided: Vec<Pending>) {
    for pending in undecided {
        let Some(user) = slice.user(name).map(|u| u.name.clone()) else {
            return;
        };
        let meta = Meta::from_numbers(pending.kind, pending.flags);
        let element = super::parse_stanza(&pending.stanza);
        let ends = element
            .as_ref()
            .and_then(|e| e.get("to").zip(e.get("from")));
        let Some((Ok(to), from)) = ends.map(|(to, from)| (Jid::parse(to), from)) else {
            continue;
        };
        if !admitted(slice, &user, &to, from, &pending.stanza, meta, pending.id) {
            if let Some(user) = slice.user_mut(name) {
                user.offline.take(pending.id);
                slice.resize(name);
            }
            continue;
        }
        if pending.what & Message::ARCHIVE != 0 && !storing::wanted(slice, name, from) {
            let ms = slice.now.ms;
            slice.ledger.unarchived(&user, pending.id, ms);
            // what names no entry of the archive has no stable id
            if slice
                .user(name)
                .is_some_and(|user| user.offline.has(pending.id))
            {
                offline::keep(slice, name, pending.id, &pending.stanza, meta);
            }
        }
        push::decided(slice, name, from, &pending.stanza, meta);
    }
}

/// There is no such recipient: what was accepted for him comes back.
pub fn decide_missing(slice: &mut Slice, name: &str) {
    let user: Rc<str> = name.into();
    let undecided = slice.overlay.undecided(name);
    if undecided.is_empty() {
        return;
    }
    let gone = slice.ledger.marked().gone;
    let mut bytes = Vec::new();
    for (id, place) in undecided {
        let ms = slice.now.ms;
        if gone.contains(&id) {
            continue;
        }
        slice.ledger.dropped(&user, id, ms);
        let Ok((entry, _)) = slice.overlay.entry(place, &mut bytes) else {
            continue;
        };
        let element = super::parse_stanza(&entry.stanza);
        if let Some(to) = element.as_ref().and_then(|e| e.get("to"))
            && let Ok(to) = Jid::parse(to)
        {
            let meta = Meta::from_numbers(entry.kind, entry.flags);
            slice.refuse_missing(&to, &entry.peer, &entry.stanza, meta);
        }
    }
}

/// A message that need not survive, for a user of this slice who is present.
pub fn deliver(slice: &mut Slice, to: &Jid<'_>, from: &str, stanza: &[u8], meta: Meta) -> Fate {
    let name = to.local().expect("only users are routed to");
    // own stanzas meet no block list; the parse borrows
    let Ok(from_jid) = Jid::parse(from) else {
        return Fate::Decided;
    };
    if !slice.admits(to, &from_jid, stanza, meta) {
        return Fate::Decided;
    }
    let mut taken: SmallVec<[SessionId; 4]> = SmallVec::new();
    match choose(slice, to, meta, &mut taken) {
        // nobody is there, and it is not worth keeping
        Rule::Drop | Rule::Offline => {}
        Rule::Refuse => {
            slice.bounce(to, from, stanza, meta, &StanzaError::SERVICE_UNAVAILABLE);
        }
        Rule::Sessions => {
            slice.counters.messages_delivered += 1;
            slice.fx.delivered(meta);
            for sid in &taken {
                slice.send(*sid, &[stanza], meta);
            }
            let incoming = Incoming {
                to,
                from,
                stanza,
                meta,
            };
            for hook in slice.hooks.message_in.clone().iter() {
                hook(slice, name, &incoming, &taken);
            }
        }
    }
    Fate::Decided
}

/// The decision, without any effect.
fn choose(slice: &Slice, to: &Jid<'_>, meta: Meta, taken: &mut SmallVec<[SessionId; 4]>) -> Rule {
    let name = to.local().expect("only users are routed to");
    let Some(user) = slice.user(name) else {
        return Rule::Refuse;
    };
    if let Some(resource) = to.resource() {
        if let Some(sid) = slice.find_session(name, resource) {
            taken.push(sid);
            return Rule::Sessions;
        }
        match meta.kind {
            // 8.5.3.2.1: a chat message goes on as if to the bare JID
            Kind::Chat => {}
            Kind::Normal | Kind::GroupChat => return Rule::Refuse,
            _ => return Rule::Drop,
        }
    }
    match meta.kind {
        Kind::GroupChat => return Rule::Refuse,
        Kind::MessageError => return Rule::Drop,
        _ => {}
    }
    for sid in &user.sessions {
        if slice.sessions.get(*sid).is_some_and(|s| s.takes_bare()) {
            taken.push(*sid);
        }
    }
    match meta.kind {
        _ if !taken.is_empty() => Rule::Sessions,
        Kind::Headline => Rule::Drop,
        _ => Rule::Offline,
    }
}

/// A message that was not worth keeping and that a session left unacknowledged: another session may have it, if it was for
/// that one alone.
pub fn redeliver(slice: &mut Slice, to: &Jid<'_>, stanza: &[u8], meta: Meta) {
    let mut taken: SmallVec<[SessionId; 4]> = SmallVec::new();
    if !to.is_bare() && choose(slice, &to.to_bare(), meta, &mut taken) == Rule::Sessions {
        let stanza = offline::delayed(stanza, to.domain(), slice.now.unix);
        for sid in &taken {
            slice.send(*sid, &[&stanza], meta);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::xmpp::testing::World;

    #[test]
    fn what_waits_for_a_full_way_is_bounded_and_the_sender_hears_of_it() {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.add(&alice);
        w.add(&bob);
        let a = w.online(&alice, "a");
        let b = w.online(&bob, "b");
        let message =
            format!("<message type='chat' id='m' to='{bob}@localhost'><body>hi</body></message>");
        w.slice_of(&alice).fx.closed[1] = true;
        w.send(a, &message);
        let refused = w.take(a);
        assert!(
            refused.len() == 1
                && refused[0].contains("resource-constraint")
                && refused[0].contains("type='wait'"),
            "{refused:?}"
        );
        assert!(w.take(b).is_empty());
        w.slice_of(&alice).fx.closed[1] = false;
        w.send(a, &message);
        assert!(w.take(a).is_empty());
        assert_eq!(w.take(b).len(), 1);
    }
}
