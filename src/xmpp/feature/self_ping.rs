//! Self-ping in rooms (XEP-0410): a room itself answers who asks whether he is still in (`src/xmpp/room/iq.rs`).

use super::{Feature, NONE};

pub const NS: &str = "http://jabber.org/protocol/muc#self-ping-optimization";

pub static FEATURE: Feature = Feature {
    name: "Self-ping in rooms",
    spec: "XEP-0410",
    version: "1.1.0",
    ..NONE
};
