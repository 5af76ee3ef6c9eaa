//! Bookmarks of rooms (XEP-0402), and the two older ways to them: one list in private storage (XEP-0048 over XEP-0049), one list in a
//! node (XEP-0048 over XEP-0223). All three show and change the same bookmarks, which are the items of [`NODE`].
//!
//! An old list that is written is compared with the items: what is the same stays untouched and nobody is told of it, and
//! `<extensions/>`, which old lists do not know, stay. A list in private storage from before this feature becomes items when
//! bookmarks are first asked for or changed.

use std::rc::Rc;

use fnv::FnvHashMap;

use super::{Feature, Iq, NONE, NodeRule, pep, private};
use crate::xml::dom::{Element, Node};
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::pubsub::config::Config;
use crate::xmpp::pubsub::edit::{INVALID_PAYLOAD, Op, Told};
use crate::xmpp::pubsub::event::{self, Event};
use crate::xmpp::pubsub::nodes::Item;
use crate::xmpp::pubsub::{NS as NS_PUBSUB, refused};
use crate::xmpp::slice::Slice;

pub const NODE: &str = "urn:xmpp:bookmarks:1";

/// Node and namespace of the old list.
pub const OLD_NODE: &str = "storage:bookmarks";

pub static FEATURE: Feature = Feature {
    name: "Bookmarks, old and new",
    spec: "XEP-0402, XEP-0048",
    version: "1.2.0, 1.2",
    account: &[
        "urn:xmpp:bookmarks:1#compat",
        "urn:xmpp:bookmarks:1#compat-pep",
    ],
    nodes: &[NodeRule {
        name: NODE,
        config: Config::private,
    }],
    ..NONE
};

/// Id of the one item of the old node.
const OLD_ID: &str = "current";

/// Is it a bookmark?
pub fn check(id: Option<&str>, payload: &[u8]) -> Result<(), StanzaError> {
    let id = id.ok_or(refused(StanzaError::BAD_REQUEST, "item-required"))?;
    if Jid::parse(id).is_err() {
        return Err(StanzaError::JID_MALFORMED);
    }
    match parse(payload) {
        Some(element) if element.is("conference", NODE) => Ok(()),
        _ => Err(INVALID_PAYLOAD),
    }
}

fn parse(payload: &[u8]) -> Option<Element> {
    Element::parse(std::str::from_utf8(payload).ok()?).ok()
}

/// The bookmarks of a user: items of [`NODE`], or (`old`) one with the old list.
pub fn items(
    slice: &mut Slice,
    name: &str,
    old: bool,
    then: impl FnOnce(&mut Slice, Result<Vec<Item>, StanzaError>) + 'static,
) {
    let user = name.to_owned();
    moved(slice, name, move |slice, result| {
        if let Err(error) = result {
            return then(slice, Err(error));
        }
        let nodes = pep::nodes_of(slice, &user).unwrap_or_default();
        if nodes.get(NODE).is_none() {
            return then(slice, Err(StanzaError::ITEM_NOT_FOUND));
        }
        let found = Box::new(move |slice: &mut Slice, found: Result<Vec<Item>, _>| {
            then(
                slice,
                found.map(|items| if old { vec![old_item(&items)] } else { items }),
            );
        });
        pep::read_items(slice, &user, NODE, found);
    });
}

/// The old list with all bookmarks.
pub fn old_list(items: &[Item]) -> Element {
    let all = items.iter().filter_map(|item| {
        let conference = pep::payload(item)?;
        Some(to_old(&item.id, &conference))
    });
    all.fold(Element::new("storage", OLD_NODE), Element::child)
}

fn old_item(items: &[Item]) -> Item {
    let mut payload = Vec::new();
    old_list(items).write(&mut payload, "");
    Item {
        id: OLD_ID.to_owned(),
        seq: items.iter().map(|item| item.seq).max().unwrap_or_default(),
        payload,
    }
}

fn to_old(jid: &str, conference: &Element) -> Element {
    let mut old = Element::new("conference", OLD_NODE).attr("jid", jid);
    for key in ["name", "autojoin"] {
        if let Some(value) = conference.get(key) {
            old.set(key, value);
        }
    }
    for name in ["nick", "password"] {
        if let Some(found) = conference.find(name, NODE) {
            old = old.child(Element::new(name, OLD_NODE).text(found.text_content()));
        }
    }
    old
}

/// The bookmark, with what `before` has that the old list cannot say.
fn to_new(old: &Element, before: Option<&Element>) -> Element {
    let mut new = Element::new("conference", NODE);
    for key in ["name", "autojoin"] {
        if let Some(value) = old.get(key) {
            new.set(key, value);
        }
    }
    for name in ["nick", "password"] {
        if let Some(found) = old.find(name, OLD_NODE) {
            new = new.child(Element::new(name, NODE).text(found.text_content()));
        }
    }
    match before.and_then(|before| before.find("extensions", NODE)) {
        Some(extensions) => new.child(extensions.clone()),
        None => new,
    }
}

/// Bookmarks of an old list, by address; of two for one room the last one counts.
pub fn of_old_list(storage: &Element) -> Result<Vec<(String, Element)>, StanzaError> {
    let mut all: Vec<(String, Element)> = Vec::new();
    let mut places: FnvHashMap<String, usize> = FnvHashMap::default();
    for old in storage.elements().filter(|e| e.is("conference", OLD_NODE)) {
        let jid = old.get("jid").ok_or(StanzaError::BAD_REQUEST)?;
        let jid = Jid::parse(jid).map_err(|_| StanzaError::JID_MALFORMED)?;
        match places.get(jid.as_str()) {
            Some(at) => all[*at].1 = old.clone(),
            None => {
                places.insert(jid.as_str().to_owned(), all.len());
                all.push((jid.as_str().to_owned(), old.clone()));
            }
        }
    }
    Ok(all)
}

/// All else of an old list: addresses of pages, which stay in private storage.
pub fn without_rooms(storage: &Element) -> Element {
    let mut rest = storage.clone();
    rest.remove_children(|e| e.is("conference", OLD_NODE));
    rest.children
        .retain(|node| matches!(node, Node::Element(_)));
    rest
}

/// The bookmarks are what an old list says, together with `documents`, which are written in the same step.
pub fn replace(
    slice: &mut Slice,
    name: &str,
    list: Vec<(String, Element)>,
    documents: Vec<(String, Vec<u8>)>,
    then: impl FnOnce(&mut Slice, Result<(), StanzaError>) + 'static,
) {
    fill(slice, name, (list, false), documents, then);
}

/// `first`: only if there are none yet.
fn fill(
    slice: &mut Slice,
    name: &str,
    (list, first): (Vec<(String, Element)>, bool),
    documents: Vec<(String, Vec<u8>)>,
    then: impl FnOnce(&mut Slice, Result<(), StanzaError>) + 'static,
) {
    if list.len() > slice.env.limits.pubsub.items_max {
        let error = StanzaError::RESOURCE_CONSTRAINT.text("too many bookmarks");
        return then(slice, Err(error));
    }
    let user = name.to_owned();
    pep::begin(
        slice,
        name,
        Box::new(move |slice, turn| {
            let turn = match turn {
                Ok(turn) => turn,
                Err(error) => return then(slice, Err(error)),
            };
            let made = turn.nodes.get(NODE).is_some();
            if first && made {
                // somebody was faster
                then(slice, Ok(()));
                return pep::end(slice, turn);
            }
            let found = Box::new(move |slice: &mut Slice, found: Result<Vec<Item>, _>| {
                let items = match found {
                    Ok(items) => items,
                    Err(error) => {
                        then(slice, Err(error));
                        return pep::end(slice, turn);
                    }
                };
                let mut ops = difference(&items, list);
                if !made {
                    let config = Config::private();
                    ops.insert(0, (NODE.to_owned(), Op::Create { config }));
                }
                pep::commit(slice, turn, pep::Change { ops, documents }, then);
            });
            pep::read_items(slice, &user, NODE, found);
        }),
    );
}

/// What makes the items those of the list.
fn difference(items: &[Item], list: Vec<(String, Element)>) -> Vec<(String, Op)> {
    let mut ops = Vec::new();
    let gone: Vec<String> = items
        .iter()
        .filter(|item| !list.iter().any(|(jid, _)| *jid == item.id))
        .map(|item| item.id.clone())
        .collect();
    for (jid, old) in list {
        let before = items.iter().find(|item| item.id == jid);
        let before = before.and_then(pep::payload);
        if before
            .as_ref()
            .is_some_and(|before| same(&jid, before, &old))
        {
            continue;
        }
        let mut payload = Vec::new();
        to_new(&old, before.as_ref()).write(&mut payload, "");
        let op = Op::Publish {
            id: jid,
            payload,
            options: None,
            config: Config::private(),
        };
        ops.push((NODE.to_owned(), op));
    }
    if !gone.is_empty() {
        let op = Op::Retract {
            ids: gone,
            notify: true,
        };
        ops.push((NODE.to_owned(), op));
    }
    ops
}

/// Does the old list say of a room what the bookmark says?
fn same(jid: &str, before: &Element, old: &Element) -> bool {
    let shown = to_old(jid, before);
    let text = |e: &Element, name| e.find(name, OLD_NODE).map(Element::text_content);
    let on = |e: &Element| matches!(e.get("autojoin"), Some("1" | "true"));
    shown.get("name") == old.get("name")
        && on(&shown) == on(old)
        && ["nick", "password"]
            .iter()
            .all(|name| text(&shown, name) == text(old, name))
}

/// A client publishes an old list in the old node.
pub fn publish_old(slice: &mut Slice, iq: Iq, payload: &[u8]) {
    let storage = parse(payload).filter(|e| e.is("storage", OLD_NODE));
    let list = storage.ok_or(INVALID_PAYLOAD).and_then(|s| of_old_list(&s));
    let list = match list {
        Ok(list) => list,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let name = iq.account().to_owned();
    moved(slice, &name.clone(), move |slice, result| {
        if let Err(error) = result {
            return slice.iq_error(&iq, &error);
        }
        replace(
            slice,
            &name,
            list,
            Vec::new(),
            move |slice, result| match result {
                Ok(()) => {
                    let item = Element::new("item", NS_PUBSUB).attr("id", OLD_ID);
                    let publish = Element::new("publish", NS_PUBSUB)
                        .attr("node", OLD_NODE)
                        .child(item);
                    let answer = Element::new("pubsub", NS_PUBSUB).child(publish);
                    slice.iq_result(&iq, Some(answer));
                }
                Err(error) => slice.iq_error(&iq, &error),
            },
        );
    });
}

/// What private storage has of bookmarks becomes items, if that was not done yet.
pub fn moved(
    slice: &mut Slice,
    name: &str,
    then: impl FnOnce(&mut Slice, Result<(), StanzaError>) + 'static,
) {
    let user = name.to_owned();
    pep::with_index(slice, name, move |slice, result| {
        if result.is_err() {
            return then(slice, Err(StanzaError::RESOURCE_CONSTRAINT));
        }
        let nodes = pep::nodes_of(slice, &user).unwrap_or_default();
        if nodes.get(NODE).is_some() {
            return then(slice, Ok(()));
        }
        private::read_document(slice, &user.clone(), move |slice, stored| {
            let stored = match stored {
                Ok(stored) => stored,
                Err(_) => return then(slice, Err(StanzaError::RESOURCE_CONSTRAINT)),
            };
            let list = stored.find("storage", OLD_NODE).map(of_old_list);
            match list {
                Some(Ok(list)) if !list.is_empty() => {
                    fill(slice, &user, (list, true), Vec::new(), then);
                }
                _ => then(slice, Ok(())),
            }
        });
    });
}

/// Bookmarks were changed: those of the user's own clients that know the old node only hear the whole list.
pub fn changed(slice: &mut Slice, name: &Rc<str>, told: &[Told]) {
    if !told.iter().any(|told| told.node.name == NODE) {
        return;
    }
    let wants = slice.sessions_of(name).iter().any(|sid| {
        let session = slice.sessions.get(*sid);
        session.is_some_and(|s| s.caps.as_ref().is_some_and(|c| c.wants_node(OLD_NODE)))
    });
    if !wants {
        return;
    }
    let user = name.clone();
    let found = Box::new(move |slice: &mut Slice, found: Result<Vec<Item>, _>| {
        let Ok(items) = found else { return };
        let event = Event::Published {
            item: old_item(&items),
            payload: true,
        };
        let bare = format!("{user}@{}", slice.env.domain);
        let stanza = event::message(&bare, &event.element(OLD_NODE));
        pep::to_sessions(slice, &user, OLD_NODE, &stanza);
    });
    pep::read_items(slice, name, NODE, found);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::testing::{Client, World};

    const PRIVATE: &str = "jabber:iq:private";

    fn ask(w: &mut World, client: Client, iq: &str) -> Element {
        w.send(client, iq);
        let got = w.take(client);
        let answers = got
            .iter()
            .map(|s| crate::xmpp::parse_stanza(s.as_bytes()).unwrap());
        let mut answers = answers.filter(|e| e.name == "iq");
        let answer = answers.next().unwrap_or_else(|| panic!("{iq}: {got:?}"));
        assert_eq!(answer.get("type"), Some("result"), "{iq}: {got:?}");
        answer
    }

    fn private(typ: &str, inner: &str) -> String {
        format!(
            "<iq type='{typ}' id='p'><query xmlns='{PRIVATE}'><storage xmlns='{OLD_NODE}'>{inner}</storage></query></iq>"
        )
    }

    fn publish(id: &str, inner: &str) -> String {
        format!(
            "<iq type='set' id='p'><pubsub xmlns='{NS_PUBSUB}'><publish node='{NODE}'><item id='{id}'>\
             <conference xmlns='{NODE}' name='{id}'>{inner}</conference></item></publish></pubsub></iq>"
        )
    }

    fn get(node: &str) -> String {
        format!(
            "<iq type='get' id='g'><pubsub xmlns='{NS_PUBSUB}'><items node='{node}'/></pubsub></iq>"
        )
    }

    /// The rooms that each of the three ways shows.
    fn rooms(w: &mut World, client: Client) -> Vec<String> {
        let items = |answer: &Element| {
            let pubsub = answer.find("pubsub", NS_PUBSUB).unwrap();
            let items = pubsub.find("items", NS_PUBSUB).unwrap();
            items.elements().cloned().collect::<Vec<_>>()
        };
        let of_list = |storage: &Element| -> Vec<String> {
            let list = of_old_list(storage).unwrap();
            list.into_iter().map(|(jid, _)| jid).collect()
        };
        let new = items(&ask(w, client, &get(NODE)));
        let new: Vec<String> = new
            .iter()
            .map(|item| item.get("id").unwrap().to_owned())
            .collect();
        let old = items(&ask(w, client, &get(OLD_NODE)));
        assert_eq!(of_list(old[0].find("storage", OLD_NODE).unwrap()), new);
        let stored = ask(w, client, &private("get", ""));
        let stored = stored
            .find("query", PRIVATE)
            .unwrap()
            .find("storage", OLD_NODE)
            .cloned();
        assert_eq!(of_list(&stored.unwrap()), new);
        new
    }

    fn capable(w: &mut World, resource: &str, node: &str) -> Client {
        let client = w.login("alice", resource);
        w.send(
            client,
            &format!("<presence><c xmlns='http://jabber.org/protocol/caps' node='urn:{resource}' ver='1'/></presence>"),
        );
        let got = w.take(client).concat();
        let (_, id) = got.split_once("type='get' id='").unwrap();
        let id = &id[..32];
        w.send(
            client,
            &format!(
                "<iq type='result' id='{id}' to='localhost'><query xmlns='http://jabber.org/protocol/disco#info'><feature var='{node}+notify'/></query></iq>"
            ),
        );
        w.take(client);
        client
    }

    #[test]
    fn all_three_ways_show_and_change_the_same_bookmarks() {
        let mut w = World::new(1);
        w.add("alice");
        let a = w.online("alice", "a");
        ask(
            &mut w,
            a,
            &private(
                "set",
                "<conference jid='fx@rooms' name='FX'/><url name='u' url='https://example.com'/>",
            ),
        );
        assert_eq!(rooms(&mut w, a), ["fx@rooms"]);
        ask(
            &mut w,
            a,
            &publish(
                "rates@rooms",
                "<nick>al</nick><extensions><x xmlns='urn:x'/></extensions>",
            ),
        );
        assert_eq!(rooms(&mut w, a), ["fx@rooms", "rates@rooms"]);
        let stored = ask(&mut w, a, &private("get", "")).to_xml("jabber:client");
        assert!(
            stored.contains(
                "<conference jid='rates@rooms' name='rates@rooms'><nick>al</nick></conference>"
            ),
            "{stored}"
        );
        assert!(
            stored.contains("url='https://example.com'"),
            "what is no room stays where it was"
        );
        // an old list in the old node; what it cannot say stays
        let list = "<conference jid='rates@rooms' name='Rates' autojoin='true'/><conference jid='new@rooms'/>";
        ask(
            &mut w,
            a,
            &format!(
                "<iq type='set' id='p'><pubsub xmlns='{NS_PUBSUB}'><publish node='{OLD_NODE}'><item id='current'>\
                 <storage xmlns='{OLD_NODE}'>{list}</storage></item></publish></pubsub></iq>"
            ),
        );
        assert_eq!(rooms(&mut w, a), ["rates@rooms", "new@rooms"]);
        let new = ask(&mut w, a, &get(NODE)).to_xml("jabber:client");
        assert!(
            new.contains("<extensions><x xmlns='urn:x'/></extensions>"),
            "{new}"
        );
        assert!(new.contains("autojoin='true'"));
        ask(
            &mut w,
            a,
            &format!(
                "<iq type='set' id='p'><pubsub xmlns='{NS_PUBSUB}'><retract node='{NODE}'><item id='new@rooms'/></retract></pubsub></iq>"
            ),
        );
        assert_eq!(rooms(&mut w, a), ["rates@rooms"]);
        ask(&mut w, a, &private("set", ""));
        assert!(rooms(&mut w, a).is_empty());
    }

    #[test]
    fn what_was_stored_before_becomes_bookmarks_when_somebody_asks() {
        for first in [
            get(NODE),
            get(OLD_NODE),
            private("get", ""),
            publish("b@rooms", ""),
        ] {
            let mut w = World::new(1);
            w.add("alice");
            let stored = format!(
                "<query xmlns='{PRIVATE}'><storage xmlns='{OLD_NODE}'><conference jid='a@rooms'/></storage></query>"
            );
            let documents = &mut w.tier.users.get_mut("alice").unwrap().documents;
            documents.insert("private".into(), stored.into_bytes().into());
            let a = w.online("alice", "a");
            ask(&mut w, a, &first);
            let wanted: &[&str] = match first.contains("publish") {
                true => &["a@rooms", "b@rooms"],
                false => &["a@rooms"],
            };
            assert_eq!(rooms(&mut w, a), wanted);
        }
    }

    #[test]
    fn only_what_has_changed_is_told_and_old_clients_hear_the_list() {
        let mut w = World::new(1);
        w.add("alice");
        w.befriend("alice", "bob");
        let a = w.online("alice", "a");
        let new = capable(&mut w, "new", NODE);
        let old = capable(&mut w, "old", OLD_NODE);
        w.take(new);
        ask(
            &mut w,
            a,
            &private(
                "set",
                "<conference jid='a@rooms'/><conference jid='b@rooms' name='B'/>",
            ),
        );
        assert_eq!(w.take(new).len(), 2);
        assert_eq!(w.take(old).len(), 1);
        ask(
            &mut w,
            a,
            &private(
                "set",
                "<conference jid='b@rooms' name='B'/><conference jid='c@rooms'/>",
            ),
        );
        let got = w.take(new).concat();
        assert!(
            got.contains("<item id='c@rooms'>") && got.contains("<retract id='a@rooms'/>"),
            "{got}"
        );
        assert!(!got.contains("b@rooms"), "{got}");
        let got = w.take(old);
        assert!(
            got.len() == 1
                && got[0].contains("<storage xmlns='storage:bookmarks'><conference jid='b@rooms'"),
            "{got:?}"
        );
        ask(
            &mut w,
            a,
            &private(
                "set",
                "<conference jid='b@rooms' name='B'/><conference jid='c@rooms'/>",
            ),
        );
        assert!(w.take(new).is_empty() && w.take(old).is_empty());
    }

    #[test]
    fn a_bookmark_is_one_and_nobody_else_sees_it() {
        let mut w = World::new(1);
        w.befriend("alice", "bob");
        let a = w.online("alice", "a");
        let b = w.online("bob", "b");
        ask(&mut w, a, &publish("fx@rooms", ""));
        for bad in [
            publish("@", ""),
            publish("fx@rooms", "").replace("conference", "room"),
            publish("fx@rooms", "").replace(" id='fx@rooms'", ""),
            private("set", "<conference name='nowhere'/>"),
            private("set", "<conference jid='@'/>"),
        ] {
            w.send(a, &bad);
            assert!(w.take(a).concat().contains("type='error'"), "{bad}");
        }
        for node in [NODE, OLD_NODE] {
            w.send(b, &get(node).replace("<iq ", "<iq to='alice@localhost' "));
            assert!(w.take(b).concat().contains("type='error'"));
        }
        assert_eq!(rooms(&mut w, a), ["fx@rooms"]);
    }
}
