//! In-band registration (XEP-0077) for those who have an account: they change its password or remove it. Making an account is
//! part of the negotiation, before there is a session.

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::store::record;
use crate::store::tier::Op;
use crate::xml::dom::Element;
use crate::xmpp::error::{StanzaError, StreamError};
use crate::xmpp::jid::{self, Jid};
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::sasl::ScramKeys;
use crate::xmpp::slice::{Computed, Job, Slice, Then};

pub const NS: &str = "jabber:iq:register";

pub static FEATURE: Feature = Feature {
    name: "In-band registration",
    spec: "XEP-0077",
    version: "2.4",
    server: &[NS],
    on: |env| env.limits.registration,
    iq: &[IqRoute { name: "query", ns: NS, target: Target::Both, handle }],
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
    let field = |name| iq.payload.find(name, NS).map(|e| e.text_content()).unwrap_or_default();
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
    let job = Job::Derive { password, iterations: slice.env.limits.iterations };
    slice.compute(
        job,
        Box::new(move |slice, computed| {
            let (sha1, sha256) = match computed {
                Computed::Keys(Ok(keys)) => keys,
                // a password that SASLprep forbids, or an endless one
                Computed::Keys(Err(_)) => return refuse(slice, iq, &StanzaError::NOT_ACCEPTABLE),
                _ => return refuse(slice, iq, &StanzaError::RESOURCE_CONSTRAINT),
            };
            slice.edit(
                &name,
                |record| {
                    record.sha1 = Some(stored(sha1));
                    record.sha256 = Some(stored(sha256));
                },
                Box::new(move |slice, result| match result {
                    Ok(()) => slice.iq_result(&iq, None),
                    Err(error) => {
                        tracing::warn!(%error, "a password could not be stored");
                        refuse(slice, iq, &StanzaError::INTERNAL_SERVER_ERROR);
                    }
                }),
            );
        }),
    );
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
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    let name: Box<str> = iq.from.local().expect("only users ask").into();
    let then: Then = Box::new(move |slice, result| match result {
        Ok(()) => slice.iq_result(&iq, None),
        Err(error) => {
            tracing::warn!(%error, "an account could not be removed");
            slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR);
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
        Op::RemoveUser { name: name.into() },
        Box::new(move |slice, result| {
            let gone = result.is_ok();
            then(slice, result);
            if gone {
                removed(slice, &who);
            }
        }),
    );
}

/// The account is gone from the tiers: its sessions end, its contacts are told that all subscriptions are cancelled (section
/// 3.2), and from now on there is no such user.
fn removed(slice: &mut Slice, name: &str) {
    let Some(user) = slice.user(name) else {
        return slice.set_user(name, None);
    };
    let record = user.record.to_owned();
    for sid in slice.sessions_of(name) {
        // what it was sent has no recipient any more
        if let Some(sm) = slice.sessions.get_mut(sid).and_then(|session| session.sm.as_mut()) {
            sm.unacknowledged();
        }
        slice.end(sid, Some(StreamError::text("not-authorized", "the account was removed")));
    }
    slice.set_user(name, None);
    let from = format!("{name}@{}", slice.env.domain);
    for contact in &record.roster {
        if contact.subscription.to() || contact.ask {
            cancel(slice, &from, &contact.jid, Kind::Unsubscribe, "unsubscribe");
        }
        if contact.subscription.from() || contact.approved {
            cancel(slice, &from, &contact.jid, Kind::Unsubscribed, "unsubscribed");
        }
    }
    for request in &record.requests {
        cancel(slice, &from, &request.jid, Kind::Unsubscribed, "unsubscribed");
    }
}

fn cancel(slice: &mut Slice, from: &str, to: &str, kind: Kind, typ: &str) {
    let Ok(to) = Jid::parse(to) else { return };
    let mut stanza = b"<presence".to_vec();
    attribute("type", typ, &mut stanza);
    attribute("from", from, &mut stanza);
    attribute("to", to.as_str(), &mut stanza);
    stanza.extend_from_slice(b"/>");
    slice.route(&to, from, &stanza, Meta::new(kind), None);
}
