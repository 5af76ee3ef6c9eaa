//! Message displayed synchronisation (XEP-0490): up to where a user has read each conversation, an item for each in a node of his
//! own. Clients write and read it; what it takes here is the node's configuration, which nobody else sees.

use super::{Feature, NONE, NodeRule};
use crate::xmpp::pubsub::config::Config;

pub static FEATURE: Feature = Feature {
    name: "Displayed markers, synchronised",
    spec: "XEP-0490",
    version: "1.0.1",
    nodes: &[NodeRule {
        name: "urn:xmpp:mds:displayed:0",
        config: Config::private,
    }],
    ..NONE
};
