//! Occupant identifiers (XEP-0421): a keyed hash that tells a person apart in one room whatever his nickname, and tells nothing of
//! him. Written by `src/xmpp/room/presence.rs` into all that an occupant sends.

use super::{Feature, NONE};

pub const NS: &str = "urn:xmpp:occupant-id:0";

pub static FEATURE: Feature = Feature {
    name: "Anonymous unique occupant identifiers for rooms",
    spec: "XEP-0421",
    version: "1.0.1",
    ..NONE
};
