//! Last activity (XEP-0012): how long the server has been up, and how long ago a user logged out, told only to those who may
//! see his presence. That he logged out is noted by [`super::presence`].

use super::{Feature, Iq, IqRoute, NONE, Target, disco};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::Slice;

pub const NS: &str = "jabber:iq:last";

pub static FEATURE: Feature = Feature {
    name: "Last activity",
    spec: "XEP-0012",
    version: "2.0",
    server: &[NS],
    account: &[NS],
    iq: &[
        IqRoute { name: "query", ns: NS, target: Target::Server, handle: uptime },
        IqRoute { name: "query", ns: NS, target: Target::Account, handle: activity },
    ],
    ..NONE
};

fn uptime(slice: &mut Slice, iq: Iq) {
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    // the slice's clock starts with the server
    let seconds = slice.now.ms / 1000;
    slice.iq_result(&iq, Some(query(seconds, "")));
}

fn activity(slice: &mut Slice, iq: Iq) {
    if !disco::may_see(slice, iq.account(), &iq.from) {
        return slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    }
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    let Some(user) = slice.user(iq.account()) else { return };
    let mut sessions = user.sessions.iter().filter_map(|sid| slice.sessions.get(*sid));
    let answer = match &user.last {
        // who is connected but has said that he is away is not betrayed by this
        _ if sessions.any(|session| session.presence.is_some()) => query(0, ""),
        Some(last) => query(slice.now.unix.saturating_sub(last.at), &last.status),
        None if !user.sessions.is_empty() => query(0, ""),
        // was never here
        None => return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND),
    };
    slice.iq_result(&iq, Some(answer));
}

fn query(seconds: u64, status: &str) -> Element {
    let query = Element::new("query", NS).attr("seconds", seconds.to_string());
    if status.is_empty() { query } else { query.text(status) }
}

/// Must this stanza be answered by `<forbidden/>`, because it asks a session, or a user who does not exist, for what the asker
/// may not know (XEP-0012 section 4)?
pub fn forbids(slice: &Slice, name: &str, from: &Jid<'_>, stanza: &[u8], meta: Meta) -> bool {
    meta.kind == Kind::IqGet
        && memchr::memmem::find(stanza, NS.as_bytes()).is_some()
        && crate::xmpp::parse_stanza(stanza).is_some_and(|iq| iq.find("query", NS).is_some())
        && !disco::may_see(slice, name, from)
}
