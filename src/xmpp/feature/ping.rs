//! Ping (XEP-0199), both directions: clients ask the server, the server asks clients that have been silent for long.

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::xml::dom::Element;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::error::StanzaError;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:xmpp:ping";

pub static FEATURE: Feature = Feature {
    name: "Ping",
    spec: "XEP-0199",
    version: "2.0.1",
    server: &[NS],
    account: &[NS],
    iq: &[IqRoute {
        name: "ping",
        ns: NS,
        target: Target::Both,
        handle: answer,
    }],
    ..NONE
};

fn answer(slice: &mut Slice, iq: Iq) {
    if iq.set {
        slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    } else if !iq.own() && iq.to.as_ref().is_some_and(|to| to.local().is_some()) {
        // who may not see a user must not learn that there is one (RFC 6121 8.5.2.3)
        slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
    } else {
        slice.iq_result(&iq, None);
    }
}

/// Asks a silent client; being heard at all answers it.
pub fn ask(slice: &mut Slice, sid: SessionId) {
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    if session.sm.is_some() {
        return slice.send_raw(sid, b"<r xmlns='urn:xmpp:sm:3'/>");
    }
    let ping = Element::new("iq", NS_CLIENT)
        .attr("type", "get")
        .attr("id", crate::xmpp::random_id())
        .attr("from", &*slice.env.domain)
        .attr("to", &*session.jid)
        .child(Element::new("ping", NS));
    slice.send_element(sid, &ping, Meta::new(Kind::IqGet).with(Meta::SERVER));
}
