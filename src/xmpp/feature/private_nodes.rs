//! Private data in nodes (XEP-0223): a client publishes with the options `persist_items` and `access_model` `whitelist`, and the
//! server makes sure that the node has them: a publication that expects other options than the node has is refused
//! ([`crate::xmpp::pubsub::config::Config::meets`]), so nothing private lands in a node that others read.

use super::{Feature, NONE};

pub static FEATURE: Feature = Feature {
    name: "Private data in nodes",
    spec: "XEP-0223",
    version: "1.1.1",
    ..NONE
};
