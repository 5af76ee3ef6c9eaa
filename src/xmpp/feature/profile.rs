//! What people tell of themselves in nodes of one item: nickname, mood, activity, tune, location. To the server all are alike: shown to
//! subscribers, the newest replaces the one before.

use super::{Feature, NONE, NodeRule};
use crate::xmpp::pubsub::config::Config;

pub static FEATURE: Feature = Feature {
    name: "Nickname, mood, activity, tune, location",
    spec: "XEP-0172, XEP-0107, XEP-0108, XEP-0118, XEP-0080",
    version: "1.1, 1.2.2, 1.3, 1.3.0, 1.10.0",
    nodes: &[
        NodeRule {
            name: "http://jabber.org/protocol/nick",
            config: Config::personal,
        },
        NodeRule {
            name: "http://jabber.org/protocol/mood",
            config: Config::personal,
        },
        NodeRule {
            name: "http://jabber.org/protocol/activity",
            config: Config::personal,
        },
        NodeRule {
            name: "http://jabber.org/protocol/tune",
            config: Config::personal,
        },
        NodeRule {
            name: "http://jabber.org/protocol/geoloc",
            config: Config::personal,
        },
    ],
    ..NONE
};
