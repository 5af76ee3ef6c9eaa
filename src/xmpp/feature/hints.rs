//! Message processing hints (XEP-0334), and everything else that routing must know of a message's payload: found in one
//! pass over its children, where it enters.

use super::{Feature, NONE};
use crate::xml::view::{Child, View};
use crate::xmpp::meta::{Kind, Meta};

pub const NS: &str = "urn:xmpp:hints";

pub static FEATURE: Feature = Feature {
    name: "Message processing hints",
    spec: "XEP-0334",
    version: "1.0.0",
    server: &[NS],
    ..NONE
};

const NS_CHAT_STATES: &str = "http://jabber.org/protocol/chatstates";

const NS_RECEIPTS: &str = "urn:xmpp:receipts";
const NS_MARKERS: &str = "urn:xmpp:chat-markers:0";
const NS_INVITATION: &str = "jabber:x:conference";
const NS_ROOM_USER: &str = "http://jabber.org/protocol/muc#user";

/// Instant messaging payloads of today that come without a body; XEP-0280 section 6.1 leaves the list open.
const CARBON_PAYLOADS: &[(&str, &str)] = &[
    ("reactions", "urn:xmpp:reactions:0"),
    ("encrypted", "eu.siacs.conversations.axolotl"),
];

pub fn meta(view: &View<'_>) -> Meta {
    let kind = Kind::message(view.attr("type").as_deref());
    let mut flags = 0;
    let (mut states, mut others, mut room, mut invitation) = (false, false, false, false);
    for child in view.children() {
        match (child.name, &*child.ns) {
            ("body", crate::xmpp::NS_CLIENT) if !child.inner().is_empty() => flags |= Meta::BODY,
            ("body" | "thread" | "subject", crate::xmpp::NS_CLIENT) => {}
            // section 4.1: for archives; a message may still wait for its recipient
            ("no-permanent-store", NS) => flags |= Meta::NO_ARCHIVE,
            ("no-store", NS) => flags |= Meta::NO_STORE,
            ("store", NS) => flags |= Meta::STORE,
            ("no-copy", NS) | ("private", super::carbons::NS) => flags |= Meta::NO_COPY,
            (_, NS) => {}
            (_, NS_CHAT_STATES) => {
                states = true;
                flags |= Meta::CARBON;
            }
            (name, ns) => {
                others = true;
                match ns {
                    NS_RECEIPTS | NS_MARKERS => flags |= Meta::CARBON,
                    NS_INVITATION => invitation = true,
                    // mediated invitation or decline (XEP-0045 section 7.8.2)
                    NS_ROOM_USER if invites(child) => invitation = true,
                    NS_ROOM_USER => room = true,
                    super::retract::NS if name == "retract" => {
                        // XEP-0424 section 5: it must be in the archive
                        flags |= Meta::CARBON | Meta::RETRACT | Meta::STORE;
                    }
                    _ if CARBON_PAYLOADS.contains(&(name, ns)) => flags |= Meta::CARBON,
                    _ => {}
                }
            }
        }
    }
    // chat states alone may wait for an inactive client
    if states && !others && flags & Meta::BODY == 0 {
        flags |= Meta::LAZY;
    }
    let copied = match kind {
        Kind::Chat => true,
        Kind::Normal => flags & Meta::BODY != 0,
        // The answer to a message that was copied: it repeats that message, or nobody can tell any more
        Kind::MessageError => flags & Meta::BODY != 0 || view.children().len() <= 1,
        _ => false,
    };
    if copied || invitation {
        flags |= Meta::CARBON;
    }
    if room && !invitation {
        flags |= Meta::ROOM;
    }
    Meta::new(kind).with(flags)
}

/// Payloads that say nothing by themselves: chat states, receipts, markers.
pub fn is_chatter(ns: &str) -> bool {
    matches!(ns, NS_CHAT_STATES | NS_RECEIPTS | NS_MARKERS)
}

fn invites(x: &Child<'_>) -> bool {
    memchr::memmem::find(x.inner().as_bytes(), b"invite").is_some()
        || memchr::memmem::find(x.inner().as_bytes(), b"decline").is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::StreamNs;

    fn flags(message: &str) -> u16 {
        meta(&View::parse(message.as_bytes(), &StreamNs::client(), &Default::default()).unwrap())
            .flags
    }

    #[test]
    fn the_rules_for_carbons_are_those_of_the_specification() {
        let copied = |message| flags(message) & Meta::CARBON != 0;
        assert!(copied("<message type='chat'/>"));
        assert!(copied("<message><body>x</body></message>"));
        assert!(!copied("<message><subject>x</subject></message>"));
        assert!(copied(
            "<message><received xmlns='urn:xmpp:receipts' id='1'/></message>"
        ));
        assert!(copied(
            "<message><paused xmlns='http://jabber.org/protocol/chatstates'/></message>"
        ));
        assert!(copied(
            "<message><displayed xmlns='urn:xmpp:chat-markers:0' id='1'/></message>"
        ));
        assert!(copied(
            "<message><x xmlns='jabber:x:conference' jid='r@c'/></message>"
        ));
        assert!(copied(
            "<message><x xmlns='http://jabber.org/protocol/muc#user'><invite from='a@b'/></x></message>"
        ));
        assert!(!copied("<message type='headline'><body>x</body></message>"));
        assert!(copied(
            "<message type='error'><body>x</body><error type='cancel'/></message>"
        ));
        assert!(copied(
            "<message type='error'><error type='cancel'/></message>"
        ));
        assert!(!copied(
            "<message type='error'><q xmlns='urn:q'/><error type='cancel'/></message>"
        ));
    }

    #[test]
    fn private_messages_of_rooms_are_told_from_invitations() {
        let room = |message| flags(message) & Meta::ROOM != 0;
        assert!(room(
            "<message type='chat'><body>x</body><x xmlns='http://jabber.org/protocol/muc#user'/></message>"
        ));
        assert!(!room(
            "<message><x xmlns='http://jabber.org/protocol/muc#user'><invite from='a@b'/></x></message>"
        ));
    }

    #[test]
    fn hints_are_seen() {
        assert_eq!(
            flags("<message><no-store xmlns='urn:xmpp:hints'/></message>"),
            Meta::NO_STORE
        );
        assert_eq!(
            flags("<message><no-permanent-store xmlns='urn:xmpp:hints'/></message>"),
            Meta::NO_ARCHIVE
        );
        assert_eq!(
            flags("<message><store xmlns='urn:xmpp:hints'/></message>"),
            Meta::STORE
        );
        assert_eq!(
            flags("<message><no-copy xmlns='urn:xmpp:hints'/></message>"),
            Meta::NO_COPY
        );
        assert_eq!(
            flags("<message><private xmlns='urn:xmpp:carbons:2'/></message>") & Meta::NO_COPY,
            Meta::NO_COPY
        );
        assert_eq!(flags("<message><no-copy xmlns='urn:other'/></message>"), 0);
    }

    #[test]
    fn chat_states_alone_may_wait() {
        let lazy = |message| flags(message) & Meta::LAZY != 0;
        assert!(lazy(
            "<message type='chat'><composing xmlns='http://jabber.org/protocol/chatstates'/><thread>1</thread></message>"
        ));
        assert!(!lazy(
            "<message type='chat'><active xmlns='http://jabber.org/protocol/chatstates'/><body>x</body></message>"
        ));
        assert!(!lazy("<message type='chat'/>"));
    }
}
