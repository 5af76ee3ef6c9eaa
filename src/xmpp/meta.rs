//! What routing must know of a stanza, found once where it entered and carried beside its bytes, so that nobody parses it again.

use crate::observe::Stamp;

/// Stanza kind and type (RFC 6121 sections 5.2.2 and 4.7.1, RFC 6120 section 8.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Chat,
    Normal,
    Headline,
    GroupChat,
    MessageError,
    Available,
    Unavailable,
    Subscribe,
    Subscribed,
    Unsubscribe,
    Unsubscribed,
    Probe,
    PresenceError,
    IqGet,
    IqSet,
    IqResult,
    IqError,
}

impl Kind {
    pub fn message(typ: Option<&str>) -> Kind {
        match typ {
            Some("chat") => Kind::Chat,
            Some("headline") => Kind::Headline,
            Some("groupchat") => Kind::GroupChat,
            Some("error") => Kind::MessageError,
            // RFC 6121 5.2.2: anything unknown counts as normal
            _ => Kind::Normal,
        }
    }

    /// `None`: not a type of RFC 6121 4.7.1.
    pub fn presence(typ: Option<&str>) -> Option<Kind> {
        Some(match typ {
            None => Kind::Available,
            Some("unavailable") => Kind::Unavailable,
            Some("subscribe") => Kind::Subscribe,
            Some("subscribed") => Kind::Subscribed,
            Some("unsubscribe") => Kind::Unsubscribe,
            Some("unsubscribed") => Kind::Unsubscribed,
            Some("probe") => Kind::Probe,
            Some("error") => Kind::PresenceError,
            Some(_) => return None,
        })
    }

    /// `None`: not a type of RFC 6120 8.2.3.
    pub fn iq(typ: Option<&str>) -> Option<Kind> {
        Some(match typ {
            Some("get") => Kind::IqGet,
            Some("set") => Kind::IqSet,
            Some("result") => Kind::IqResult,
            Some("error") => Kind::IqError,
            _ => return None,
        })
    }

    pub fn is_message(self) -> bool {
        (self as u8) <= Kind::MessageError as u8
    }

    pub fn is_presence(self) -> bool {
        (self as u8) > Kind::MessageError as u8 && (self as u8) <= Kind::PresenceError as u8
    }

    pub fn is_iq(self) -> bool {
        (self as u8) >= Kind::IqGet as u8
    }

    pub fn is_subscription(self) -> bool {
        matches!(
            self,
            Kind::Subscribe | Kind::Subscribed | Kind::Unsubscribe | Kind::Unsubscribed
        )
    }

    /// Name of the stanza element.
    pub fn stanza(self) -> &'static str {
        if self.is_message() {
            "message"
        } else if self.is_presence() {
            "presence"
        } else {
            "iq"
        }
    }

    /// An error must never be answered by an error (RFC 6120 8.3.1), nor a result.
    pub fn may_bounce(self) -> bool {
        !matches!(
            self,
            Kind::MessageError
                | Kind::PresenceError
                | Kind::IqResult
                | Kind::IqError
                | Kind::Headline
        )
    }
}

/// Kind plus the facts about the payload that decide storing, copying and deferring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    pub kind: Kind,
    pub flags: u16,
    /// When a message was read from its sender: for [`Stage::Message`](crate::observe::Stage::Message). `None`: it was not just
    /// now, or it is no message of a client's.
    pub read: Option<Stamp>,
}

impl Meta {
    /// Has a non-empty `<body/>`.
    pub const BODY: u16 = 1;
    /// XEP-0334 `<no-store/>`: not for the offline queue.
    pub const NO_STORE: u16 = 2;
    /// XEP-0334 `<store/>`.
    pub const STORE: u16 = 4;
    /// XEP-0280 `<private/>` or XEP-0334 `<no-copy/>`: no carbons.
    pub const NO_COPY: u16 = 8;
    /// XEP-0280 says it may be copied (body, or a payload listed there).
    pub const CARBON: u16 = 16;
    /// Already a carbon copy: never copied, stored or rerouted.
    pub const COPY: u16 = 32;
    /// XEP-0352: may wait while the client is inactive (chat states, presence).
    pub const LAZY: u16 = 64;
    /// Is made by the server itself.
    pub const SERVER: u16 = 128;
    /// Came through a chat room or goes there (`<x/>` of XEP-0045 `muc#user`), and is no invitation.
    pub const ROOM: u16 = 256;

    /// XEP-0334 `<no-permanent-store/>`: for the offline queue, not for archives.
    pub const NO_ARCHIVE: u16 = 512;
    /// XEP-0424: retracts an earlier one of its sender.
    pub const RETRACT: u16 = 4096;

    /// Its recipient's session is no longer in the chat room that it is from.
    pub const OUT: u16 = 1024;
    /// Of a room: it is his own presence there, so he is in.
    pub const IN: u16 = 2048;

    pub fn new(kind: Kind) -> Meta {
        Meta {
            kind,
            flags: 0,
            read: None,
        }
    }

    pub fn with(mut self, flags: u16) -> Meta {
        self.flags |= flags;
        self
    }

    /// From what [`Meta::numbers`] gave.
    pub fn from_numbers(kind: u8, flags: u16) -> Meta {
        const KINDS: [Kind; 17] = [
            Kind::Chat,
            Kind::Normal,
            Kind::Headline,
            Kind::GroupChat,
            Kind::MessageError,
            Kind::Available,
            Kind::Unavailable,
            Kind::Subscribe,
            Kind::Subscribed,
            Kind::Unsubscribe,
            Kind::Unsubscribed,
            Kind::Probe,
            Kind::PresenceError,
            Kind::IqGet,
            Kind::IqSet,
            Kind::IqResult,
            Kind::IqError,
        ];
        let kind = KINDS.get(usize::from(kind)).copied();
        Meta {
            kind: kind.unwrap_or(Kind::Normal),
            flags,
            read: None,
        }
    }

    /// As a journal keeps it.
    pub fn numbers(self) -> (u8, u16) {
        (self.kind as u8, self.flags)
    }

    pub fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Does it say something to a person? Not: receipts, markers and retractions with a body for old clients.
    pub fn is_said(self) -> bool {
        self.has(Meta::BODY) && !self.has(Meta::RETRACT)
    }
}
