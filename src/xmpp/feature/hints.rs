//! Message processing hints (XEP-0334), and everything else that routing must know of a message's payload: found in one
//! pass over its children, where it enters.

use super::{Feature, NONE};
use crate::xml::view::View;
use crate::xmpp::meta::{Kind, Meta};

pub const NS: &str = "urn:xmpp:hints";

pub static FEATURE: Feature = Feature {
    name: "Message processing hints",
    spec: "XEP-0334",
    version: "0.4.1",
    server: &[NS],
    ..NONE
};

const NS_CHAT_STATES: &str = "http://jabber.org/protocol/chatstates";

/// Payloads that are worth a carbon without a body (XEP-0280 section 6.1).
const CARBON_PAYLOADS: &[(&str, &str)] = &[
    ("received", "urn:xmpp:receipts"),
    ("request", "urn:xmpp:receipts"),
    ("received", "urn:xmpp:chat-markers:0"),
    ("displayed", "urn:xmpp:chat-markers:0"),
    ("acknowledged", "urn:xmpp:chat-markers:0"),
    ("reactions", "urn:xmpp:reactions:0"),
    ("retract", "urn:xmpp:message-retract:1"),
    ("encrypted", "eu.siacs.conversations.axolotl"),
];

pub fn meta(view: &View<'_>) -> Meta {
    let kind = Kind::message(view.attr("type").as_deref());
    let mut flags = 0;
    let (mut states, mut others) = (false, false);
    for child in view.children() {
        match (child.name, &*child.ns) {
            ("body", crate::xmpp::NS_CLIENT) => flags |= Meta::BODY | Meta::CARBON,
            ("no-store" | "no-permanent-store", NS) => flags |= Meta::NO_STORE,
            ("store", NS) => flags |= Meta::STORE,
            ("no-copy", NS) | ("private", super::carbons::NS) => flags |= Meta::NO_COPY,
            (_, NS) => {}
            (_, NS_CHAT_STATES) => {
                states = true;
                flags |= Meta::CARBON;
            }
            ("thread" | "subject", crate::xmpp::NS_CLIENT) => {}
            (name, ns) => {
                others = true;
                if CARBON_PAYLOADS.contains(&(name, ns)) {
                    flags |= Meta::CARBON;
                }
            }
        }
    }
    // chat states alone, or nothing at all, may wait for an inactive client
    if states && !others && flags & Meta::BODY == 0 {
        flags |= Meta::LAZY;
    }
    // XEP-0280 6.1: chat always, normal and error for what they carry, headline and groupchat never
    match kind {
        Kind::Chat => flags |= Meta::CARBON,
        Kind::Headline | Kind::GroupChat => flags &= !Meta::CARBON,
        _ => {}
    }
    Meta { kind, flags }
}
