//! Offline messages (XEP-0160): a message for a user with no resource to take it waits in his queue, in memory and in the
//! tiers, and is delivered, stamped with its delay (XEP-0203), to the next resource that becomes available with a
//! non-negative priority. A stored message is acknowledged when it is durable.

use super::{Feature, NONE};
use crate::store::tier::Op;
use crate::xmpp::batch::Receipt;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::{Fate, Slice};

pub static FEATURE: Feature = Feature {
    name: "Offline messages, with delayed delivery",
    spec: "XEP-0160, XEP-0203",
    version: "1.0.1, 2.0",
    server: &["msgoffline", "urn:xmpp:delay"],
    available: Some(deliver_all),
    ..NONE
};

/// Queues a message for a user of this slice who is present, or refuses it.
pub fn store(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    let name = to.local().expect("only users are routed to");
    let (most, most_bytes) = (
        slice.env.limits.offline_messages_max,
        slice.env.limits.offline_bytes_max,
    );
    let Some(user) = slice.user(name) else {
        return Fate::Decided;
    };
    match wanted(meta) {
        Wanted::Yes => {}
        Wanted::No => return Fate::Decided,
        Wanted::Refuse => {
            slice.bounce(to, from, stanza, meta, &StanzaError::SERVICE_UNAVAILABLE);
            return Fate::Decided;
        }
    }
    if user.offline.len() >= most || user.offline_bytes + stanza.len() > most_bytes {
        // XEP-0160 section 3: a full queue is said, not silent
        slice.bounce(to, from, stanza, meta, &StanzaError::SERVICE_UNAVAILABLE);
        return Fate::Decided;
    }
    keep(slice, name, to.domain(), stanza, receipt);
    Fate::Open
}

/// Queues a message that was accepted before: no limit applies any more.
pub fn keep(slice: &mut Slice, name: &str, domain: &str, stanza: &[u8], receipt: Option<Receipt>) {
    let id = slice.next_id();
    let stanza: Box<[u8]> = delayed(stanza, domain, slice.now.unix).into();
    let Some(user) = slice.user_mut(name) else {
        return;
    };
    user.offline_bytes += stanza.len();
    user.offline.push_back((id, stanza.clone()));
    slice.resize(name);
    let who: Box<str> = name.into();
    slice.write(
        name,
        Op::PutOffline {
            name: name.into(),
            id,
            stanza,
        },
        Box::new(move |slice, result| {
            if let Err(error) = result {
                tracing::error!(user = &*who, %error, "an offline message could not be stored");
                take_back(slice, &who, id);
            }
            if let Some(receipt) = receipt {
                slice.settle(receipt);
            }
        }),
    );
}

/// A message that is not durable must not look as if it were: it leaves the queue, and its sender hears of it.
fn take_back(slice: &mut Slice, name: &str, id: u64) {
    let Some(user) = slice.user_mut(name) else {
        return;
    };
    // not there: somebody has got it meanwhile
    let Some(at) = user.offline.iter().position(|(i, _)| *i == id) else {
        return;
    };
    let Some((_, stanza)) = user.offline.remove(at) else {
        return;
    };
    user.offline_bytes -= stanza.len();
    slice.resize(name);
    let Some(element) = crate::xmpp::parse_stanza(&stanza) else {
        return;
    };
    if let (Some(to), Some(from)) = (element.get("to"), element.get("from"))
        && let Ok(to) = Jid::parse(to)
    {
        let meta = Meta::new(Kind::message(element.get("type")));
        slice.bounce(&to, from, &stanza, meta, &StanzaError::RESOURCE_CONSTRAINT);
    }
}

enum Wanted {
    Yes,
    No,
    Refuse,
}

/// XEP-0160 section 3 and XEP-0334: what is worth keeping.
fn wanted(meta: Meta) -> Wanted {
    match meta.kind {
        _ if meta.has(Meta::COPY) => Wanted::No,
        Kind::Chat | Kind::Normal if meta.has(Meta::NO_STORE) => Wanted::No,
        Kind::Chat | Kind::Normal if meta.has(Meta::BODY) || meta.has(Meta::STORE) => Wanted::Yes,
        // a normal message may carry anything (invitations, forms); chat without a body is chat states and markers
        Kind::Normal if !meta.has(Meta::LAZY) => Wanted::Yes,
        Kind::Chat | Kind::Normal => Wanted::No,
        Kind::GroupChat => Wanted::Refuse,
        _ => Wanted::No,
    }
}

/// The stanza with `<delay/>` (XEP-0203) as its last child, unless this server has stamped it before.
pub fn delayed(stanza: &[u8], domain: &str, unix: u64) -> Vec<u8> {
    let mut delay = b"<delay xmlns='urn:xmpp:delay' from='".to_vec();
    crate::xml::escape::escape_attr(domain, &mut delay);
    delay.extend_from_slice(b"' stamp='");
    // behind the stable id stands only what this server wrote; a client's own claim stands before it
    let id = memchr::memmem::rfind(stanza, b"<stanza-id xmlns='urn:xmpp:sid:0' by='");
    let stamped = memchr::memmem::rfind(stanza, &delay) > id;
    let Some(inner) = stanza.strip_suffix(b"</message>").filter(|_| !stamped) else {
        return stanza.to_vec();
    };
    let mut out = Vec::with_capacity(stanza.len() + 96);
    out.extend_from_slice(inner);
    out.extend_from_slice(&delay);
    out.extend_from_slice(super::time::stamp(unix).as_bytes());
    out.extend_from_slice(b"'/></message>");
    out
}

/// A resource became available: it gets all that waits.
fn deliver_all(slice: &mut Slice, sid: SessionId) {
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    if !session.takes_bare() {
        return;
    }
    let name = session.user.clone();
    let Some(user) = slice.user_mut(&name) else {
        return;
    };
    if user.offline.is_empty() {
        return;
    }
    let queue = std::mem::take(&mut user.offline);
    user.offline_bytes = 0;
    slice.resize(&name);
    let up_to = queue.back().map(|(id, _)| *id).unwrap_or_default();
    let burst = (
        queue.iter().map(|(_, stanza)| stanza.len()).sum(),
        queue.len(),
    );
    for (_, stanza) in queue {
        let meta = Meta::new(Kind::Chat).with(Meta::BODY);
        slice.send(sid, &[&stanza], meta);
    }
    slice.allow(sid, burst);
    slice.write(
        &name,
        Op::DropOffline { name: (&*name).into(), up_to },
        Box::new(|_, result| {
            if let Err(error) = result {
                tracing::warn!(%error, "delivered offline messages could not be removed: they will come again");
            }
        }),
    );
}
