//! Chat rooms (XEP-0045) and what belongs to them: the logic is in `src/xmpp/room/`, this is what the server's domain says of it.
//! Direct invitations (XEP-0249) pass through as messages that are kept.

use super::{Feature, NONE};

pub static FEATURE: Feature = Feature {
    name: "Chat rooms, with direct invitations and pictures",
    spec: "XEP-0045, XEP-0249, XEP-0486",
    version: "1.35.1, 1.2, 0.1.0",
    on: |env| env.rooms.is_some(),
    ..NONE
};
