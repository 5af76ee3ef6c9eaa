//! Service discovery (XEP-0030): who the server and its accounts are and what they can do. All that is said comes from the
//! table of features. An account answers its own user and those who may see its presence; to anybody else it looks like one
//! that does not exist.

use super::{FEATURES, Feature, Iq, IqRoute, NONE, Target, caps};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::slice::{Env, Slice};

pub const NS_INFO: &str = "http://jabber.org/protocol/disco#info";
pub const NS_ITEMS: &str = "http://jabber.org/protocol/disco#items";

pub static FEATURE: Feature = Feature {
    name: "Service discovery",
    spec: "XEP-0030",
    version: "2.5.0",
    server: &[NS_INFO, NS_ITEMS],
    account: &[NS_INFO, NS_ITEMS],
    iq: &[
        IqRoute { name: "query", ns: NS_INFO, target: Target::Server, handle: server_info },
        IqRoute { name: "query", ns: NS_INFO, target: Target::Account, handle: account_info },
        IqRoute { name: "query", ns: NS_ITEMS, target: Target::Server, handle: server_items },
        IqRoute { name: "query", ns: NS_ITEMS, target: Target::Account, handle: account_items },
    ],
    ..NONE
};

/// Category, type and name of the server's one identity.
pub const SERVER: (&str, &str, &str) = ("server", "im", "nitro");

/// What the server's domain offers, sorted, each once.
pub fn server_features(env: &Env) -> Vec<&'static str> {
    collect(env, |feature| feature.server)
}

fn collect(env: &Env, of: fn(&Feature) -> &'static [&'static str]) -> Vec<&'static str> {
    let mut all: Vec<_> = FEATURES.iter().filter(|f| (f.on)(env)).flat_map(|f| of(f).iter().copied()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// May `asker` know about the presence, and so the existence, of this slice's user? Himself and those who have a
/// subscription to his presence.
pub fn may_see(slice: &Slice, name: &str, asker: &Jid<'_>) -> bool {
    if slice.env.is_local(asker) && asker.local() == Some(name) {
        return true;
    }
    let Some(user) = slice.user(name) else { return false };
    user.record.get().roster_item(asker.bare()).is_some_and(|item| item.subscription().from())
}

fn server_info(slice: &mut Slice, iq: Iq) {
    let node = iq.payload.get("node");
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    if node.is_some_and(|node| !caps::is_own_node(&slice.env, node)) {
        return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    }
    let answer = info(node, SERVER, &server_features(&slice.env));
    slice.iq_result(&iq, Some(answer));
}

fn account_info(slice: &mut Slice, iq: Iq) {
    if let Err(error) = check_account(slice, &iq) {
        return slice.iq_error(&iq, &error);
    }
    let answer = info(None, ("account", "registered", ""), &collect(&slice.env, |feature| feature.account));
    slice.iq_result(&iq, Some(answer));
}

fn server_items(slice: &mut Slice, iq: Iq) {
    if iq.set {
        slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    } else if iq.payload.get("node").is_some() {
        slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    } else {
        slice.iq_result(&iq, Some(Element::new("query", NS_ITEMS)));
    }
}

/// The items of an account are its available resources (XEP-0030 section 4.1).
fn account_items(slice: &mut Slice, iq: Iq) {
    if let Err(error) = check_account(slice, &iq) {
        return slice.iq_error(&iq, &error);
    }
    let mut answer = Element::new("query", NS_ITEMS);
    for sid in slice.sessions_of(iq.account()) {
        if let Some(session) = slice.sessions.get(sid)
            && session.presence.is_some()
        {
            answer = answer.child(Element::new("item", NS_ITEMS).attr("jid", &*session.jid));
        }
    }
    slice.iq_result(&iq, Some(answer));
}

fn check_account(slice: &Slice, iq: &Iq) -> Result<(), StanzaError> {
    if !may_see(slice, iq.account(), &iq.from) {
        // XEP-0030 section 8 and RFC 6121 8.5.1: the same as where there is no such account. For items the XEP would have
        // an empty result in both cases; the RFC's error says as little.
        Err(StanzaError::SERVICE_UNAVAILABLE)
    } else if iq.set {
        Err(StanzaError::BAD_REQUEST)
    } else if iq.payload.get("node").is_some() {
        Err(StanzaError::ITEM_NOT_FOUND)
    } else {
        Ok(())
    }
}

fn info(node: Option<&str>, (category, typ, name): (&str, &str, &str), features: &[&str]) -> Element {
    let mut identity = Element::new("identity", NS_INFO).attr("category", category).attr("type", typ);
    if !name.is_empty() {
        identity = identity.attr("name", name);
    }
    let mut query = Element::new("query", NS_INFO);
    if let Some(node) = node {
        query = query.attr("node", node);
    }
    let query = query.child(identity);
    features.iter().fold(query, |query, feature| query.child(Element::new("feature", NS_INFO).attr("var", *feature)))
}
