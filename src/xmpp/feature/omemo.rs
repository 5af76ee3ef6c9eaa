//! End-to-end encryption (XEP-0384): clients publish device lists and key bundles in nodes that everybody may read, because whoever
//! writes to somebody for the first time needs them. The server reads none of it.

use super::{Feature, NONE, NodeRule};
use crate::xmpp::pubsub::config::{Config, SendLast};

pub static FEATURE: Feature = Feature {
    name: "OMEMO device lists and bundles",
    spec: "XEP-0384",
    version: "0.9.1",
    nodes: &[
        NodeRule {
            name: "urn:xmpp:omemo:2:devices",
            config: Config::public,
        },
        // an item for each device
        NodeRule {
            name: "urn:xmpp:omemo:2:bundles",
            config: || Config {
                max_items: Config::MAX,
                send_last: SendLast::Never,
                ..Config::public()
            },
        },
        // version 0.3, which most clients speak: the device list, and a node for each bundle
        NodeRule {
            name: "eu.siacs.conversations.axolotl.devicelist",
            config: Config::public,
        },
        NodeRule {
            name: "eu.siacs.conversations.axolotl.bundles:*",
            config: || Config {
                send_last: SendLast::Never,
                ..Config::public()
            },
        },
    ],
    ..NONE
};
