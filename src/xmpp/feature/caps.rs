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
    stream: Some(|env| {
        format!(
            "<c xmlns='{NS}' hash='sha-1' node='{NODE}' ver='{}'/>",
            server_ver(env)
        )
    }),
    ..NONE
};

/// The verification string of the server's own answer to disco#info.
pub fn server_ver(env: &Env) -> String {
    let (category, typ, name) = disco::SERVER;
    ver(
        &[&format!("{category}/{typ}//{name}")],
        &disco::server_features(env),
    )
}

/// Is it `node#ver` as the server announces it?
pub fn is_own_node(env: &Env, node: &str) -> bool {
    node.strip_prefix(NODE)
        .and_then(|rest| rest.strip_prefix('#'))
        .is_some_and(|ver| ver == server_ver(env))
}

/// XEP-0115 section 5.1, without forms. Both lists are sorted already.
fn ver(identities: &[&str], features: &[&str]) -> String {
    let mut text = String::new();
    for one in identities.iter().chain(features) {
        text.push_str(one);
        text.push('<');
    }
    // SHA-1 is what the specification demands; nothing is trusted because of it
    let hash = aws_lc_rs::digest::digest(
        &aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY,
        text.as_bytes(),
    );
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
        assert_eq!(
            ver(&["client/pc//Exodus 0.9.1"], &features),
            "QgayPKawpkPSDYmwT/WM94uAlu0="
        );
    }

    #[test]
    fn the_announced_hash_is_that_of_the_answer() {
        use crate::xmpp::testing::World;
        let mut w = World::new(1);
        w.add("alice");
        let a = w.login("alice", "a");
        let announced = FEATURE.stream.unwrap()(&w.slices[0].env);
        let announced = crate::xmpp::parse_stanza(announced.as_bytes()).unwrap();
        let (node, hash) = (
            announced.get("node").unwrap(),
            announced.get("ver").unwrap(),
        );
        let ask = |node: &str| {
            format!(
                "<iq type='get' id='d' to='localhost'><query xmlns='http://jabber.org/protocol/disco#info' node='{node}'/></iq>"
            )
        };
        w.send(a, &ask(&format!("{node}#{hash}")));
        let got = crate::xmpp::parse_stanza(w.take(a)[0].as_bytes()).unwrap();
        let query = got.find("query", disco::NS_INFO).unwrap();
        assert_eq!(query.get("node"), Some(&*format!("{node}#{hash}")));
        let identity = query.find("identity", disco::NS_INFO).unwrap();
        let get = |key| identity.get(key).unwrap_or_default();
        let identity = format!("{}/{}//{}", get("category"), get("type"), get("name"));
        let features: Vec<_> = query.elements().filter_map(|e| e.get("var")).collect();
        assert_eq!(ver(&[&identity], &features), hash);
        w.send(a, &ask(&format!("{node}#other")));
        assert!(w.take(a).concat().contains("<item-not-found"));
    }
}
