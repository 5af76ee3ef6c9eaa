//! The service itself, `rooms.DOMAIN`: what it is (XEP-0045 section 6.1 to 6.3), names that are free (section 10.1.4). Answered
//! at the asker's own shard.

use super::{NS, directory};
use crate::xml::Element;
use crate::xml::view::View;
use crate::xmpp::error::StanzaError;
use crate::xmpp::feature::{disco, occupant_id, ping, rsm, self_ping};
use crate::xmpp::iq::Iq;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::Kind;
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::Slice;

const NS_UNIQUE: &str = "http://jabber.org/protocol/muc#unique";

/// A request of a session of this slice.
pub fn outbound(slice: &mut Slice, sid: SessionId, view: &View<'_>, to: &Jid<'_>, kind: Kind) {
    if let Some(iq) = Iq::of_session(slice, sid, view, to, kind) {
        handle(slice, iq);
    }
}

/// A request of somebody who is no session: a component.
pub fn handle(slice: &mut Slice, iq: Iq) {
    let node = iq.payload.get("node").is_some();
    match (&*iq.payload.name, &*iq.payload.ns) {
        _ if iq.set => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
        ("query", disco::NS_INFO | disco::NS_ITEMS) if node => {
            slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
        }
        ("query", disco::NS_INFO) => slice.iq_result(&iq, Some(info())),
        ("query", disco::NS_ITEMS) => directory::answer(slice, iq),
        ("ping", ping::NS) => slice.iq_result(&iq, None),
        ("unique", NS_UNIQUE) => {
            let unique = Element::new("unique", NS_UNIQUE).text(crate::xmpp::random_id());
            slice.iq_result(&iq, Some(unique));
        }
        _ => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
    }
}

fn info() -> Element {
    let identity = Element::new("identity", disco::NS_INFO)
        .attr("category", "conference")
        .attr("type", "text")
        .attr("name", "Chat rooms");
    let mut features = [
        NS,
        NS_UNIQUE,
        disco::NS_INFO,
        disco::NS_ITEMS,
        rsm::NS,
        ping::NS,
        occupant_id::NS,
        self_ping::NS,
        "jabber:x:conference",
    ];
    features.sort_unstable();
    let query = Element::new("query", disco::NS_INFO).child(identity);
    features.iter().fold(query, |query, feature| {
        query.child(Element::new("feature", disco::NS_INFO).attr("var", *feature))
    })
}
