//! The session request of RFC 3921: clients of that age send it after binding and wait for the answer. A session has begun
//! by then, so the answer is yes; the stream feature says that asking is optional.

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::xmpp::error::StanzaError;
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:ietf:params:xml:ns:xmpp-session";

pub static FEATURE: Feature = Feature {
    name: "Session establishment for old clients",
    spec: "RFC 3921 3",
    stream: Some(|_| format!("<session xmlns='{NS}'><optional/></session>")),
    iq: &[IqRoute {
        name: "session",
        ns: NS,
        target: Target::Both,
        handle: answer,
    }],
    ..NONE
};

fn answer(slice: &mut Slice, iq: Iq) {
    if !iq.set {
        slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    } else if iq.session.is_none() {
        // somebody else's account
        slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
    } else {
        slice.iq_result(&iq, None);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn whoever_asks_for_a_session_has_one() {
        let mut w = crate::xmpp::testing::World::new(1);
        w.add("alice");
        w.add("bob");
        let a = w.login("alice", "a");
        let ask =
            "<iq type='set' id='s'><session xmlns='urn:ietf:params:xml:ns:xmpp-session'/></iq>";
        w.send(a, ask);
        w.expect(a, &["<iq type='result' id='s' to='alice@localhost/a'/>"]);
        w.send(a, &ask.replace("<iq ", "<iq to='localhost' "));
        w.expect(
            a,
            &["<iq type='result' id='s' from='localhost' to='alice@localhost/a'/>"],
        );
        w.send(a, &ask.replace("<iq ", "<iq to='bob@localhost' "));
        assert!(w.take(a).concat().contains("<service-unavailable"));
    }
}
