//! Messages: from a session's stream to the routing rules of RFC 6121 section 8.5.
//!
//! A plain chat message is forwarded as the bytes it came in: only the start tag is written anew (`from` is stamped, `to`
//! normalised), no tree is built.

use smallvec::SmallVec;

use super::NS_CLIENT;
use super::batch::Receipt;
use super::error::StanzaError;
use super::feature::{Incoming, Outgoing, blocking, hints, offline, stable_id};
use super::jid::Jid;
use super::meta::{Kind, Meta};
use super::session::SessionId;
use super::slice::{Fate, Slice};
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
    if !slice.env.is_local(&to) {
        return bounce_out(slice, sid, view, &StanzaError::REMOTE_SERVER_NOT_FOUND);
    }
    if to.local().is_none() {
        // nobody reads what is sent to the server itself
        return bounce_out(slice, sid, view, &StanzaError::SERVICE_UNAVAILABLE);
    }
    if let Err(error) = may_send(slice, sid, &to) {
        return bounce_out(slice, sid, view, &error);
    }
    let meta = hints::meta(view);
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
    let receipt = slice.current;
    slice.route(&to, &jid, &stanza, meta, receipt);
    slice.give_scratch(stanza);
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
    let typ = view.attr("type");
    let answerable = match view.name() {
        "iq" => !matches!(
            Kind::iq(typ.as_deref()),
            Some(Kind::IqResult | Kind::IqError)
        ),
        "message" => Kind::message(typ.as_deref()) != Kind::MessageError,
        _ => typ.as_deref() != Some("error"),
    };
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    if !answerable {
        return;
    }
    slice.counters.bounces += 1;
    let original = view.to_element();
    let mut answer = Element::new(view.name(), NS_CLIENT)
        .attr("type", "error")
        .attr("to", &*session.jid);
    if let Some(to) = original.get("to") {
        answer = answer.attr("from", to);
    }
    if let Some(id) = original.get("id") {
        answer = answer.attr("id", id);
    }
    for child in original.elements() {
        answer = answer.child(child.clone());
    }
    let answer = answer.child(error.element());
    let kind = match view.name() {
        "iq" => Kind::IqError,
        "message" => Kind::MessageError,
        _ => Kind::PresenceError,
    };
    slice.send_element(sid, &answer, Meta::new(kind).with(Meta::SERVER));
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

/// A message for a user of this slice who is present.
pub fn deliver(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    let name = to.local().expect("only users are routed to");
    // own stanzas meet no block list; the parse borrows
    let Ok(from_jid) = Jid::parse(from) else {
        return Fate::Decided;
    };
    if !slice.admits(to, &from_jid, stanza, meta) {
        return Fate::Decided;
    }
    let mut taken: SmallVec<[SessionId; 4]> = SmallVec::new();
    let rule = choose(slice, to, meta, &mut taken);
    match rule {
        Rule::Drop => Fate::Decided,
        Rule::Refuse => {
            slice.bounce(to, from, stanza, meta, &StanzaError::SERVICE_UNAVAILABLE);
            Fate::Decided
        }
        Rule::Sessions => {
            slice.counters.messages_delivered += 1;
            let stamped = stable_id::stamp(slice, to.bare(), stanza, meta);
            let bytes = stamped.as_deref().unwrap_or(stanza);
            for sid in &taken {
                slice.send(*sid, &[bytes], meta);
            }
            let incoming = Incoming {
                to,
                from,
                stanza: bytes,
                meta,
            };
            for hook in slice.hooks.message_in.clone().iter() {
                hook(slice, name, &incoming, &taken);
            }
            if let Some(stamped) = stamped {
                slice.reuse(stamped);
            }
            Fate::Decided
        }
        Rule::Offline => {
            slice.counters.messages_offline += 1;
            let stamped = stable_id::stamp(slice, to.bare(), stanza, meta);
            let fate = {
                let bytes = stamped.as_deref().unwrap_or(stanza);
                let fate = offline::store(slice, to, from, bytes, meta, receipt);
                let incoming = Incoming {
                    to,
                    from,
                    stanza: bytes,
                    meta,
                };
                // a message that was refused has not come in
                if fate == Fate::Open {
                    for hook in slice.hooks.message_in.clone().iter() {
                        hook(slice, name, &incoming, &[]);
                    }
                }
                fate
            };
            if let Some(stamped) = stamped {
                slice.reuse(stamped);
            }
            fate
        }
    }
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

/// Delivers a message that a session left unacknowledged, as if to the bare JID, and to the offline queue beyond its limits.
/// What was addressed to the bare JID went to all sessions at once: those that are left have it.
pub fn redeliver(slice: &mut Slice, to: &Jid<'_>, stanza: &[u8], meta: Meta) {
    let name = to.local().expect("a session's messages are for its user");
    let mut taken: SmallVec<[SessionId; 4]> = SmallVec::new();
    match choose(slice, &to.to_bare(), meta, &mut taken) {
        Rule::Sessions if to.is_bare() => {}
        Rule::Sessions => {
            let stanza = offline::delayed(stanza, to.domain(), slice.now.unix);
            for sid in &taken {
                slice.send(*sid, &[&stanza], meta);
            }
        }
        Rule::Offline if meta.has(Meta::BODY) => {
            offline::keep(slice, name, to.domain(), stanza, None)
        }
        _ => {}
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

    #[test]
    fn a_message_that_cannot_be_stored_comes_back_and_is_in_no_queue() {
        for shards in [1, 2] {
            let mut w = World::new(shards);
            let (alice, bob) = (w.on(0, "alice"), w.on(shards - 1, "bob"));
            w.add(&alice);
            w.add(&bob);
            let a = w.online(&alice, "a");
            let b = w.online(&bob, "b");
            w.logout(b);
            w.tier.broken = true;
            w.send(
                a,
                &format!(
                    "<message type='chat' id='m' to='{bob}@localhost'><body>hi</body></message>"
                ),
            );
            let back = w.take(a);
            assert!(
                back.len() == 1 && back[0].contains("resource-constraint"),
                "{back:?}"
            );
            assert!(w.user(&bob).offline.is_empty());
            assert_eq!(w.user(&bob).offline_bytes, 0);
        }
    }
}
