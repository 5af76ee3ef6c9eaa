//! Software version (XEP-0092): the server's name and release. Not the operating system: that helps only attackers.

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::slice::Slice;

pub const NS: &str = "jabber:iq:version";

pub static FEATURE: Feature = Feature {
    name: "Software version",
    spec: "XEP-0092",
    version: "1.1",
    server: &[NS],
    iq: &[IqRoute {
        name: "query",
        ns: NS,
        target: Target::Server,
        handle: answer,
    }],
    ..NONE
};

fn answer(slice: &mut Slice, iq: Iq) {
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    let query = Element::new("query", NS)
        .child(Element::new("name", NS).text("nitro"))
        .child(Element::new("version", NS).text(env!("CARGO_PKG_VERSION")));
    slice.iq_result(&iq, Some(query));
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_server_tells_its_name_and_release() {
        let mut w = crate::xmpp::testing::World::new(1);
        w.add("alice");
        let a = w.login("alice", "a");
        w.send(
            a,
            "<iq type='get' id='v' to='localhost'><query xmlns='jabber:iq:version'/></iq>",
        );
        w.expect(a, &[concat!(
            "<iq type='result' id='v' from='localhost' to='alice@localhost/a'><query xmlns='jabber:iq:version'>",
            "<name>nitro</name><version>",
            env!("CARGO_PKG_VERSION"),
            "</version></query></iq>"
        )]);
        w.send(
            a,
            "<iq type='set' id='v' to='localhost'><query xmlns='jabber:iq:version'/></iq>",
        );
        assert!(w.take(a).concat().contains("<bad-request"));
    }
}
