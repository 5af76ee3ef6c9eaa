//! Entity capabilities (XEP-0115): the hash of what the server says of itself by service discovery, so that a client that
//! has seen this hash before need not ask.

use base64::prelude::*;

use super::{Feature, NONE, disco};
use crate::xmpp::slice::Env;

pub const NS: &str = "http://jabber.org/protocol/caps";

/// Names the software; the server has no page of its own that a URL could point to.
pub const NODE: &str = "urn:x-nitro:server";

pub static FEATURE: Feature = Feature {
    name: "Entity capabilities",
    spec: "XEP-0115",
    version: "1.6.0",
    server: &[NS],
    stream: Some(|env| format!("<c xmlns='{NS}' hash='sha-1' node='{NODE}' ver='{}'/>", server_ver(env))),
    ..NONE
};

/// The verification string of the server's own answer to disco#info.
pub fn server_ver(env: &Env) -> String {
    let (category, typ, name) = disco::SERVER;
    ver(&[&format!("{category}/{typ}//{name}")], &disco::server_features(env))
}

/// Is it `node#ver` as the server announces it?
pub fn is_own_node(env: &Env, node: &str) -> bool {
    node.strip_prefix(NODE).and_then(|rest| rest.strip_prefix('#')).is_some_and(|ver| ver == server_ver(env))
}

/// XEP-0115 section 5.1, without forms. Both lists are sorted already.
fn ver(identities: &[&str], features: &[&str]) -> String {
    let mut text = String::new();
    for one in identities.iter().chain(features) {
        text.push_str(one);
        text.push('<');
    }
    // SHA-1 is what the specification demands; nothing is trusted because of it
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
    BASE64_STANDARD.encode(hash.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_specification_has_its_hash() {
        let features = [
            "http://jabber.org/protocol/caps",
            "http://jabber.org/protocol/disco#info",
            "http://jabber.org/protocol/disco#items",
            "http://jabber.org/protocol/muc",
        ];
        assert_eq!(ver(&["client/pc//Exodus 0.9.1"], &features), "QgayPKawpkPSDYmwT/WM94uAlu0=");
    }
}
