//! Moderation of what was said in rooms (XEP-0425): a row only, the work is done in `src/xmpp/room/moderation.rs`.

use super::{Feature, NONE};

pub const NS: &str = "urn:xmpp:message-moderate:1";

pub static FEATURE: Feature = Feature {
    name: "Moderated message retraction in rooms",
    spec: "XEP-0425",
    version: "0.3.0",
    ..NONE
};
