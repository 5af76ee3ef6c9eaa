//! Service discovery (XEP-0030): who the server and its accounts are and what they can do. All that is said comes from the
//! table of features. An account answers its own user and those who may see its presence; to anybody else it looks like one
//! that does not exist.

use super::{FEATURES, Feature, Iq, IqRoute, NONE, Target, caps, pep, roster};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::{self, Field, Form};
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
        IqRoute {
            name: "query",
            ns: NS_INFO,
            target: Target::Server,
            handle: server_info,
        },
        IqRoute {
            name: "query",
            ns: NS_INFO,
            target: Target::Account,
            handle: account_info,
        },
        IqRoute {
            name: "query",
            ns: NS_ITEMS,
            target: Target::Server,
            handle: server_items,
        },
        IqRoute {
            name: "query",
            ns: NS_ITEMS,
            target: Target::Account,
            handle: account_items,
        },
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
    let mut all: Vec<_> = FEATURES
        .iter()
        .filter(|f| (f.on)(env))
        .flat_map(|f| of(f).iter().copied())
        .collect();
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
    slice.user(name).is_some() && roster::subscription(slice, name, asker).from()
}

fn server_info(slice: &mut Slice, iq: Iq) {
    let node = iq.payload.get("node");
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    if node.is_some_and(|node| !caps::is_own_node(&slice.env, node)) {
        return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    }
    let answer = info(node, &[SERVER], &server_features(&slice.env));
    slice.iq_result(&iq, Some(answer));
}

fn account_info(slice: &mut Slice, iq: Iq) {
    if let Some(node) = iq.payload.get("node").map(str::to_owned) {
        return with_nodes(slice, iq, move |slice, iq| node_info(slice, iq, &node));
    }
    if let Err(error) = check_account(slice, &iq) {
        return slice.iq_error(&iq, &error);
    }
    let answer = info(
        None,
        // XEP-0163 section 6: an account is its own service
        &[("account", "registered", ""), ("pubsub", "pep", "")],
        &collect(&slice.env, |feature| feature.account),
    );
    slice.iq_result(&iq, Some(answer));
}

fn server_items(slice: &mut Slice, iq: Iq) {
    if iq.set {
        slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    } else if iq.payload.get("node").is_some() {
        slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    } else {
        let rooms = slice.env.rooms.as_deref();
        // and the components that are connected
        let upload = slice.env.upload.as_deref();
        let own = rooms.into_iter().chain(upload);
        let hosts = own.chain(slice.components.served());
        let items = hosts.fold(Element::new("query", NS_ITEMS), |query, host| {
            query.child(Element::new("item", NS_ITEMS).attr("jid", host))
        });
        slice.iq_result(&iq, Some(items));
    }
}

/// A request about the nodes of an account; the index was read when `then` runs.
fn with_nodes(slice: &mut Slice, iq: Iq, then: impl FnOnce(&mut Slice, Iq) + 'static) {
    if iq.set {
        return hidden(slice, iq, StanzaError::BAD_REQUEST);
    }
    let name = iq.account().to_owned();
    pep::with_index(slice, &name, move |slice, result| match result {
        Ok(()) => then(slice, iq),
        Err(_) => slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT),
    });
}

/// Why a node is not shown: only those who may see the account hear it.
fn hidden(slice: &mut Slice, iq: Iq, error: StanzaError) {
    match may_see(slice, iq.account(), &iq.from) {
        true => slice.iq_error(&iq, &error),
        false => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
    }
}

/// XEP-0060 section 5.3 and 5.4.
fn node_info(slice: &mut Slice, iq: Iq, node: &str) {
    match pep::node_info(slice, &iq, node) {
        Err(error) => hidden(slice, iq, error),
        Ok(config) => {
            let identity = ("pubsub", "leaf", &*config.title);
            let metadata = Form::new(
                form::Kind::Result,
                "http://jabber.org/protocol/pubsub#meta-data",
            )
            .field(Field::text("pubsub#title", &config.title))
            .field(Field::text("pubsub#type", &config.typ));
            let answer = info(Some(node), &[identity], &[crate::xmpp::pubsub::NS]);
            slice.iq_result(&iq, Some(answer.child(metadata.element())));
        }
    }
}

/// XEP-0060 section 5.5: ids of a node's items.
fn node_items(slice: &mut Slice, iq: Iq, node: String) {
    if let Err(error) = pep::node_info(slice, &iq, &node) {
        return hidden(slice, iq, error);
    }
    let name = iq.account().to_owned();
    let shown = node.clone();
    pep::read_items(
        slice,
        &name,
        &node,
        Box::new(move |slice, found| match found {
            Err(error) => slice.iq_error(&iq, &error),
            Ok(items) => {
                let jid = format!("{}@{}", iq.account(), slice.env.domain);
                let most = slice.env.limits.pubsub_page_items_max;
                let newest = &items[items.len().saturating_sub(most)..];
                let answer = Element::new("query", NS_ITEMS).attr("node", shown);
                let answer = newest.iter().fold(answer, |answer, item| {
                    let one = Element::new("item", NS_ITEMS).attr("jid", jid.as_str());
                    answer.child(one.attr("name", item.id.as_str()))
                });
                slice.iq_result(&iq, Some(answer));
            }
        }),
    );
}

/// The items of an account are its available resources (XEP-0030 section 4.1) and the nodes that the asker may see (XEP-0060 5.2).
fn account_items(slice: &mut Slice, iq: Iq) {
    with_nodes(slice, iq, |slice, iq| match iq.payload.get("node") {
        Some(node) => {
            let node = node.to_owned();
            node_items(slice, iq, node);
        }
        None => list_account(slice, iq),
    });
}

fn list_account(slice: &mut Slice, iq: Iq) {
    let nodes = pep::listed(slice, &iq);
    let sees = check_account(slice, &iq);
    if let Err(error) = &sees
        && nodes.is_empty()
    {
        return slice.iq_error(&iq, error);
    }
    let mut answer = Element::new("query", NS_ITEMS);
    for (node, title) in nodes {
        let jid = format!("{}@{}", iq.account(), slice.env.domain);
        let mut item = Element::new("item", NS_ITEMS)
            .attr("jid", jid)
            .attr("node", node);
        if !title.is_empty() {
            item.set("name", title);
        }
        answer = answer.child(item);
    }
    if sees.is_err() {
        return slice.iq_result(&iq, Some(answer));
    }
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
    } else {
        Ok(())
    }
}

fn info(node: Option<&str>, identities: &[(&str, &str, &str)], features: &[&str]) -> Element {
    let mut query = Element::new("query", NS_INFO);
    if let Some(node) = node {
        query = query.attr("node", node);
    }
    for (category, typ, name) in identities {
        let mut identity = Element::new("identity", NS_INFO)
            .attr("category", *category)
            .attr("type", *typ);
        if !name.is_empty() {
            identity = identity.attr("name", *name);
        }
        query = query.child(identity);
    }
    features.iter().fold(query, |query, feature| {
        query.child(Element::new("feature", NS_INFO).attr("var", *feature))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::Subscription;
    use crate::xmpp::testing::{Client, World};

    fn ask(to: &str, what: &str, node: &str) -> String {
        format!(
            "<iq type='get' id='d' to='{to}'><query xmlns='http://jabber.org/protocol/disco#{what}'{node}/></iq>"
        )
    }

    fn answer(w: &mut World, client: Client, request: &str) -> Element {
        w.send(client, request);
        let got = w.take(client);
        assert_eq!(got.len(), 1);
        crate::xmpp::parse_stanza(got[0].as_bytes()).unwrap()
    }

    #[test]
    fn the_server_tells_what_it_is_and_what_the_table_says() {
        let mut w = World::new(1);
        w.add("alice");
        let a = w.login("alice", "a");
        let got = answer(&mut w, a, &ask("localhost", "info", ""));
        let query = got.find("query", NS_INFO).unwrap();
        let identity = query.find("identity", NS_INFO).unwrap();
        assert_eq!(
            (identity.get("category"), identity.get("type")),
            (Some("server"), Some("im"))
        );
        let vars: Vec<_> = query.elements().filter_map(|e| e.get("var")).collect();
        assert_eq!(vars, server_features(&w.slices[0].env));
        for var in [
            NS_INFO,
            NS_ITEMS,
            "vcard-temp",
            "urn:xmpp:carbons:2",
            "jabber:iq:register",
        ] {
            assert!(vars.contains(&var), "{var}");
        }
        assert!(vars.is_sorted_by(|a, b| a < b));
        w.send(a, &ask("localhost", "items", ""));
        w.expect(a, &["<iq type='result' id='d' from='localhost' to='alice@localhost/a'><query xmlns='http://jabber.org/protocol/disco#items'><item jid='rooms.localhost'/><item jid='upload.localhost'/></query></iq>"]);
        for what in ["info", "items"] {
            w.send(a, &ask("localhost", what, " node='no such'"));
            assert!(w.take(a).concat().contains("<item-not-found"));
            w.send(a, &ask("localhost", what, "").replace("get", "set"));
            assert!(w.take(a).concat().contains("<bad-request"));
        }
    }

    #[test]
    fn an_account_answers_its_user_and_those_who_see_him() {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.item(&alice, &bob, Subscription::From);
        w.item(&bob, &alice, Subscription::To);
        let a = w.online(&alice, "a");
        let silent = w.login(&alice, "silent");
        let b = w.online(&bob, "b");
        for client in [a, silent, b] {
            let got = answer(
                &mut w,
                client,
                &ask(&format!("{alice}@localhost"), "info", ""),
            );
            let query = got.find("query", NS_INFO).unwrap();
            let identity = query.find("identity", NS_INFO).unwrap();
            assert_eq!(
                (identity.get("category"), identity.get("type")),
                (Some("account"), Some("registered"))
            );
            assert!(
                query
                    .elements()
                    .any(|e| e.get("var") == Some("urn:xmpp:sid:0"))
            );
            let got = answer(
                &mut w,
                client,
                &ask(&format!("{alice}@localhost"), "items", ""),
            );
            let items: Vec<_> = got
                .elements()
                .flat_map(Element::elements)
                .filter_map(|e| e.get("jid"))
                .collect();
            assert_eq!(
                items,
                [format!("{alice}@localhost/a")],
                "available resources only"
            );
        }
        w.send(b, &ask(&format!("{alice}@localhost"), "info", " node='x'"));
        assert!(w.take(b).concat().contains("<item-not-found"));
    }

    #[test]
    fn to_a_stranger_an_account_looks_like_none() {
        let mut w = World::new(1);
        w.add("alice");
        w.add("mallory");
        w.item("alice", "mallory", Subscription::To);
        w.online("alice", "a");
        let m = w.online("mallory", "m");
        for name in ["alice", "nobody"] {
            for what in ["info", "items"] {
                for node in ["", " node='x'"] {
                    w.send(m, &ask(&format!("{name}@localhost"), what, node));
                    let got = w.take(m).concat();
                    assert!(
                        got.contains("<service-unavailable") && got.contains("type='cancel'"),
                        "{got}"
                    );
                }
            }
        }
    }
}
