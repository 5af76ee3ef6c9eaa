//! Entity capabilities (XEP-0115): the hash of what an entity says of itself by service discovery, so that whoever has seen this
//! hash before need not ask. The server announces its own, and learns of its clients which nodes they want to hear of (`NODE+notify`,
//! XEP-0163 section 4.3.2).
//!
//! In: `<c/>` in presence of this slice's sessions, and their answers to disco#info. Out: for each session the nodes it wants, and a
//! word to [`super::pep`] when they become known. One client of those with an unknown hash is asked; if it does not answer within
//! [`ANSWER_MS`], or something else than it has announced, the next one is.
//!
//! Promise: nobody decides what others are told. An answer counts for others only if its hash is the announced one, and what is
//! kept is read from the very text that was hashed (the pieces that end in `+notify`), not from the elements around it: two
//! answers with the same hash say the same, however cunningly they are cut (XEP-0115 section 11.1). What has no hash that we know, or not
//! the right one, counts for its own session only.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use aws_lc_rs::digest;
use base64::prelude::*;
use fnv::FnvHashMap;

use super::{Feature, NONE, disco, pep};
use crate::xml::dom::Element;
use crate::xml::view::View;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::session::{Session, SessionId};
use crate::xmpp::slice::{Env, Slice};

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
    ended: Some(ended),
    ..NONE
};

/// How long a client has for its answer.
const ANSWER_MS: u64 = 30_000;

/// Bytes of all the nodes that one client wants; more is not listened to.
const WANTS_BYTES_MAX: usize = 4096;

/// Bytes of an announced node and hash; more is no announcement.
const ANNOUNCED_BYTES_MAX: usize = 1024;

/// Kept entries that are looked at for one that nobody uses.
const EVICT_LOOKS: usize = 16;

/// What clients with the same capabilities have in common.
#[derive(Debug, PartialEq, Eq)]
pub struct Entity {
    /// What was announced.
    key: Box<str>,
    /// Names of nodes, each followed by a line feed.
    wants: Box<str>,
}

impl Entity {
    /// Names of nodes, each followed by a line feed.
    pub fn wants(&self) -> &str {
        &self.wants
    }

    pub fn wants_node(&self, node: &str) -> bool {
        self.wants.lines().any(|one| one == node)
    }
}

/// What this slice knows of its clients' capabilities.
#[derive(Default)]
pub struct Known {
    /// By what is announced, which strangers choose: a seeded hasher.
    known: HashMap<Box<str>, Rc<Entity>>,
    order: VecDeque<Box<str>>,
    asked: HashMap<Box<str>, Asked>,
    /// Sessions that are asked, or wait for one that is.
    pending: FnvHashMap<SessionId, Box<str>>,
}

struct Asked {
    /// `node` of the query.
    node: String,
    /// Algorithm and value of the hash; `None`: for its own session only.
    ver: Option<(&'static digest::Algorithm, String)>,
    of: SessionId,
    id: String,
    due_ms: u64,
    waiting: Vec<SessionId>,
}

impl Known {
    /// Kept entries.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Keeps an entry; the oldest that no session uses goes.
    fn keep(&mut self, entity: &Rc<Entity>, most: usize) {
        if self.known.len() >= most {
            for _ in 0..EVICT_LOOKS {
                let Some(key) = self.order.pop_front() else {
                    break;
                };
                // ours, and the table's
                if self
                    .known
                    .get(&key)
                    .is_some_and(|e| Rc::strong_count(e) > 1)
                {
                    self.order.push_back(key);
                } else {
                    self.known.remove(&key);
                    break;
                }
            }
        }
        // all are in use: then it is not kept, and the next session with it is asked again
        if self.known.len() < most {
            self.order.push_back(entity.key.clone());
            self.known.insert(entity.key.clone(), entity.clone());
        }
    }
}

/// A session of this slice has sent available presence; `initial`: it was not available before.
pub fn seen(slice: &mut Slice, sid: SessionId, view: &View<'_>, initial: bool) {
    let announced = view.child("c", NS);
    let attr = |name| announced.and_then(|c| c.attr(name)).unwrap_or_default();
    let (node, ver, hash) = (attr("node"), attr("ver"), attr("hash"));
    let bytes = node.len() + ver.len() + hash.len();
    if announced.is_none() || ver.is_empty() || bytes > ANNOUNCED_BYTES_MAX {
        forget(slice, sid);
        return;
    }
    let algorithm = algorithm(&hash);
    let key: Box<str> = match algorithm {
        Some(_) => format!("{hash} {ver}").into(),
        // section 1.1 of its history: nobody can verify it
        None => format!("{node}#{ver} of {}.{}", sid.slot, sid.generation).into(),
    };
    let known = slice.sessions.get(sid).and_then(|s| s.caps.as_ref());
    if known.is_some_and(|entity| entity.key == key) {
        if initial {
            pep::arrived(slice, sid);
        }
        return;
    }
    if slice.caps.pending.get(&sid).is_some_and(|one| *one == key) {
        return;
    }
    forget(slice, sid);
    if let Some(entity) = slice.caps.known.get(&key).cloned() {
        return learn(slice, sid, entity);
    }
    if let Some(asked) = slice.caps.asked.get_mut(&key) {
        asked.waiting.push(sid);
        slice.caps.pending.insert(sid, key);
        return;
    }
    let asked = Asked {
        node: format!("{node}#{ver}"),
        ver: algorithm.map(|algorithm| (algorithm, ver.into_owned())),
        of: sid,
        id: String::new(),
        due_ms: 0,
        waiting: Vec::new(),
    };
    slice.caps.asked.insert(key.clone(), asked);
    ask(slice, &key, sid);
}

/// The session is not available any more, or announces something else.
pub fn forget(slice: &mut Slice, sid: SessionId) {
    if let Some(session) = slice.sessions.get_mut(sid) {
        session.caps = None;
    }
    leave(slice, sid);
}

fn ended(slice: &mut Slice, session: &mut Session) {
    leave(slice, session.id);
}

/// The session is not asked any more and waits for nobody.
fn leave(slice: &mut Slice, sid: SessionId) {
    let Some(key) = slice.caps.pending.remove(&sid) else {
        return;
    };
    match slice.caps.asked.get_mut(&key) {
        Some(asked) if asked.of == sid => next(slice, &key),
        Some(asked) => asked.waiting.retain(|one| *one != sid),
        None => {}
    }
}

fn learn(slice: &mut Slice, sid: SessionId, entity: Rc<Entity>) {
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    session.caps = Some(entity);
    if session.presence.is_some() {
        pep::arrived(slice, sid);
    }
}

fn ask(slice: &mut Slice, key: &str, sid: SessionId) {
    let id = crate::xmpp::random_id();
    let due_ms = slice.now.ms + ANSWER_MS;
    let Some(asked) = slice.caps.asked.get_mut(key) else {
        return;
    };
    asked.of = sid;
    asked.id.clone_from(&id);
    asked.due_ms = due_ms;
    let query = Element::new("query", disco::NS_INFO).attr("node", asked.node.as_str());
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let iq = Element::new("iq", NS_CLIENT)
        .attr("type", "get")
        .attr("id", id)
        .attr("from", &*slice.env.domain)
        .attr("to", &*session.jid)
        .child(query);
    slice.caps.pending.insert(sid, key.into());
    slice.send_element(sid, &iq, Meta::new(Kind::IqGet).with(Meta::SERVER));
}

/// Who was asked does not answer: the next one of those who wait is.
fn next(slice: &mut Slice, key: &str) {
    loop {
        let Some(asked) = slice.caps.asked.get_mut(key) else {
            return;
        };
        if asked.waiting.is_empty() {
            slice.caps.asked.remove(key);
            return;
        }
        // who has waited longest: nobody keeps others from being asked
        let sid = asked.waiting.remove(0);
        if slice
            .sessions
            .get(sid)
            .is_some_and(|s| s.presence.is_some())
        {
            return ask(slice, key, sid);
        }
        slice.caps.pending.remove(&sid);
    }
}

/// The client of a session answers the server. Anything but what it was asked is ignored.
pub fn answered(slice: &mut Slice, sid: SessionId, view: &View<'_>) {
    let id = view.attr("id").unwrap_or_default();
    let Some(key) = slice.caps.pending.get(&sid).cloned() else {
        return;
    };
    let asked = slice.caps.asked.get(&key);
    if !asked.is_some_and(|asked| asked.of == sid && asked.id == id) {
        return;
    }
    slice.caps.pending.remove(&sid);
    let text = match view.attr("type").as_deref() {
        Some("result") => {
            let answer = view.to_element();
            answer.find("query", disco::NS_INFO).map(hashed_text)
        }
        _ => None,
    };
    let text = text.unwrap_or_default();
    let entity = Rc::new(Entity {
        wants: wants_of(&text),
        key: key.clone(),
    });
    let verified = slice.caps.asked.get(&key).is_some_and(|asked| {
        asked
            .ver
            .as_ref()
            .is_some_and(|(algorithm, ver)| hash_of(algorithm, &text) == *ver)
    });
    if !verified {
        learn(slice, sid, entity);
        return next(slice, &key);
    }
    let most = slice.env.limits.caps_remembered_max;
    slice.caps.keep(&entity, most);
    let waiting = slice.caps.asked.remove(&key).map(|asked| asked.waiting);
    learn(slice, sid, entity.clone());
    for sid in waiting.unwrap_or_default() {
        slice.caps.pending.remove(&sid);
        learn(slice, sid, entity.clone());
    }
}

/// Called a few times a second.
pub fn tick(slice: &mut Slice) {
    let now = slice.now.ms;
    let late = slice
        .caps
        .asked
        .iter()
        .filter(|(_, asked)| asked.due_ms <= now);
    let late: Vec<(Box<str>, SessionId)> = late.map(|(key, a)| (key.clone(), a.of)).collect();
    for (key, sid) in late {
        slice.caps.pending.remove(&sid);
        next(slice, &key);
    }
}

// ---- hashes ------------------------------------------------------------------------------------------------------

/// Names of <https://www.iana.org/assignments/hash-function-text-names>; MD5 and the like verify nothing.
fn algorithm(hash: &str) -> Option<&'static digest::Algorithm> {
    Some(match hash {
        // what the specification demands; a second preimage of it is still beyond anybody
        "sha-1" => &digest::SHA1_FOR_LEGACY_USE_ONLY,
        "sha-224" => &digest::SHA224,
        "sha-256" => &digest::SHA256,
        "sha-384" => &digest::SHA384,
        "sha-512" => &digest::SHA512,
        _ => return None,
    })
}

fn hash_of(algorithm: &'static digest::Algorithm, text: &str) -> String {
    BASE64_STANDARD.encode(digest::digest(algorithm, text.as_bytes()).as_ref())
}

/// Section 5.1: what is hashed of an answer to disco#info.
fn hashed_text(query: &Element) -> String {
    let of = |name: &'static str| query.elements().filter(move |e| e.is(name, disco::NS_INFO));
    let get = |e: &Element, key: &str| e.get(key).unwrap_or_default().to_owned();
    let mut identities: Vec<String> = of("identity")
        .map(|e| {
            let keys = ["category", "type", "xml:lang", "name"];
            keys.map(|key| get(e, key)).join("/")
        })
        .collect();
    identities.sort_unstable();
    let mut features: Vec<String> = of("feature").map(|e| get(e, "var")).collect();
    features.sort_unstable();
    let mut pieces = identities;
    pieces.append(&mut features);
    let data = |e: &&Element| e.is("x", crate::xmpp::form::NS);
    let mut forms: Vec<(String, Vec<String>)> = Vec::new();
    for form in query.elements().filter(data) {
        let fields = || form.elements().filter(|e| e.name == "field");
        let values = |field: &Element| -> Vec<String> {
            let values = field.elements().filter(|e| e.name == "value");
            values.map(Element::text_content).collect()
        };
        let typ = fields().find(|f| f.get("var") == Some("FORM_TYPE"));
        let Some(typ) = typ.filter(|f| f.get("type") == Some("hidden")) else {
            continue;
        };
        let mut others: Vec<(String, Vec<String>)> = fields()
            .filter(|f| f.get("var") != Some("FORM_TYPE"))
            .map(|f| {
                let mut values = values(f);
                values.sort_unstable();
                (get(f, "var"), values)
            })
            .collect();
        others.sort_unstable();
        let flat = others
            .into_iter()
            .flat_map(|(var, values)| std::iter::once(var).chain(values));
        forms.push((values(typ).concat(), flat.collect()));
    }
    forms.sort_unstable();
    for (typ, fields) in forms {
        pieces.push(typ);
        pieces.extend(fields);
    }
    let mut text = String::new();
    for piece in pieces {
        text.push_str(&piece);
        text.push('<');
    }
    text
}

/// The nodes that whoever says this wants to hear of.
fn wants_of(text: &str) -> Box<str> {
    let mut nodes: Vec<&str> = text
        .split('<')
        .filter_map(|piece| piece.strip_suffix("+notify"))
        .filter(|node| !node.is_empty() && !node.contains(|c: char| c.is_control()))
        .collect();
    nodes.sort_unstable();
    nodes.dedup();
    let mut wants = String::new();
    for node in nodes {
        if wants.len() + node.len() < WANTS_BYTES_MAX {
            wants.push_str(node);
            wants.push('\n');
        }
    }
    wants.into()
}

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
    hash_of(&digest::SHA1_FOR_LEGACY_USE_ONLY, &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::testing::{Client, World};

    const QUERY: &str = "http://jabber.org/protocol/disco#info";

    fn answer(inner: &str) -> String {
        format!("<query xmlns='{QUERY}'>{inner}</query>")
    }

    fn sha1(inner: &str) -> String {
        let query = Element::parse(&answer(inner)).unwrap();
        hash_of(&digest::SHA1_FOR_LEGACY_USE_ONLY, &hashed_text(&query))
    }

    fn announce(w: &mut World, client: Client, ver: &str) {
        w.send(
            client,
            &format!(
                "<presence><c xmlns='{NS}' hash='sha-1' node='urn:c' ver='{ver}'/></presence>"
            ),
        );
    }

    /// The id of the query that the client got; `None`: it got none.
    fn query(w: &mut World, client: Client) -> Option<String> {
        let got = w.take(client);
        let query = got.iter().find(|stanza| stanza.contains(QUERY))?;
        let iq = crate::xmpp::parse_stanza(query.as_bytes()).unwrap();
        Some(iq.get("id").unwrap().to_owned())
    }

    fn reply(w: &mut World, client: Client, id: &str, inner: &str) {
        w.send(
            client,
            &format!(
                "<iq type='result' to='localhost' id='{id}'>{}</iq>",
                answer(inner)
            ),
        );
    }

    fn wants(w: &World, client: Client) -> Option<String> {
        let caps = w.session(client).caps.as_ref();
        caps.map(|entity| entity.wants().to_owned())
    }

    const MOOD: &str = "<identity category='client' type='pc' name='X'/><feature var='http://jabber.org/protocol/mood+notify'/>\
                        <feature var='urn:a'/>";
    const WANTED: &str = "http://jabber.org/protocol/mood\n";

    #[test]
    fn the_examples_of_the_specification_have_their_hashes() {
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
        // section 5.3
        let complex = "<identity xml:lang='en' category='client' name='Psi 0.11' type='pc'/>\
            <identity xml:lang='el' category='client' name='Ψ 0.11' type='pc'/>\
            <feature var='http://jabber.org/protocol/caps'/><feature var='http://jabber.org/protocol/disco#info'/>\
            <feature var='http://jabber.org/protocol/disco#items'/><feature var='http://jabber.org/protocol/muc'/>\
            <x xmlns='jabber:x:data' type='result'>\
            <field var='FORM_TYPE' type='hidden'><value>urn:xmpp:dataforms:softwareinfo</value></field>\
            <field var='ip_version'><value>ipv4</value><value>ipv6</value></field>\
            <field var='os'><value>Mac</value></field><field var='os_version'><value>10.5.1</value></field>\
            <field var='software'><value>Psi</value></field><field var='software_version'><value>0.11</value></field></x>";
        assert_eq!(sha1(complex), "q07IKJEyjvHSyhy//CH0CxmKi8w=");
    }

    #[test]
    fn one_client_is_asked_for_all_with_the_same_hash() {
        let mut w = World::new(1);
        for name in ["alice", "bob", "carol"] {
            w.add(name);
        }
        let a = w.online("alice", "a");
        let b = w.online("bob", "b");
        announce(&mut w, a, &sha1(MOOD));
        announce(&mut w, b, &sha1(MOOD));
        let id = query(&mut w, a).expect("the first is asked");
        assert_eq!(query(&mut w, b), None);
        announce(&mut w, a, &sha1(MOOD));
        assert_eq!(query(&mut w, a), None, "once");
        reply(&mut w, a, &id, MOOD);
        for client in [a, b] {
            assert_eq!(wants(&w, client).as_deref(), Some(WANTED));
        }
        let c = w.online("carol", "c");
        announce(&mut w, c, &sha1(MOOD));
        assert_eq!(query(&mut w, c), None, "it is known");
        assert_eq!(wants(&w, c).as_deref(), Some(WANTED));
        w.send(c, "<presence/>");
        assert_eq!(wants(&w, c), None, "it announces nothing any more");
    }

    #[test]
    fn nobody_poisons_what_others_are_told() {
        let mut w = World::new(1);
        for name in ["mallory", "bob"] {
            w.add(name);
        }
        let m = w.online("mallory", "m");
        announce(&mut w, m, &sha1(MOOD));
        let b = w.online("bob", "b");
        announce(&mut w, b, &sha1(MOOD));
        let id = query(&mut w, m).unwrap();
        reply(
            &mut w,
            m,
            &id,
            "<identity category='client' type='pc'/><feature var='evil+notify'/>",
        );
        assert_eq!(
            wants(&w, m).as_deref(),
            Some("evil\n"),
            "only Mallory's own"
        );
        let id = query(&mut w, b).expect("the next one is asked");
        // somebody else's answer counts for nothing
        reply(&mut w, m, &id, "<feature var='evil+notify'/>");
        reply(&mut w, b, "guessed", "<feature var='evil+notify'/>");
        assert_eq!(wants(&w, b), None);
        reply(&mut w, b, &id, MOOD);
        assert_eq!(wants(&w, b).as_deref(), Some(WANTED));
        assert_eq!(w.slices[0].caps.len(), 1);
    }

    /// Section 11.1: the same hash from elements that were cut otherwise.
    #[test]
    fn answers_with_the_same_hash_say_the_same() {
        let cut = [
            "<identity category='client' type='pc' name='X'/><feature var='http://jabber.org/protocol/mood+notify&lt;urn:a'/>",
            "<identity category='client' type='pc' name='X&lt;http://jabber.org/protocol/mood+notify'/><feature var='urn:a'/>",
            "<identity category='client' type='pc' name='X'/><identity category='http:' xml:lang='jabber.org' name='protocol/mood+notify'/>\
             <feature var='urn:a'/>",
            "<identity category='client' type='pc' name='X'/><feature var='http://jabber.org/protocol/mood+notify'/>\
             <x xmlns='jabber:x:data'><field var='FORM_TYPE' type='hidden'><value>urn:a</value></field></x>",
        ];
        let query = |inner| hashed_text(&Element::parse(&answer(inner)).unwrap());
        for inner in cut {
            assert_eq!(query(inner), query(MOOD), "{inner}");
            assert_eq!(&*wants_of(&query(inner)), WANTED);
        }
    }

    #[test]
    fn who_does_not_answer_holds_nobody_up() {
        let mut w = World::new(1);
        let names = ["a", "b", "c", "d"];
        let clients: Vec<Client> = names
            .iter()
            .map(|name| {
                w.add(name);
                let client = w.online(name, "r");
                announce(&mut w, client, &sha1(MOOD));
                client
            })
            .collect();
        let asked = |w: &mut World| {
            let mut asked = clients.iter().filter_map(|c| Some((*c, query(w, *c)?)));
            let found = asked.next();
            assert!(asked.next().is_none());
            found.expect("one is asked")
        };
        let (silent, _) = asked(&mut w);
        w.advance(ANSWER_MS);
        let (gone, _) = asked(&mut w);
        w.logout(gone);
        let (refuses, id) = asked(&mut w);
        w.send(refuses, &format!("<iq type='error' id='{id}'/>"));
        let (answers, id) = asked(&mut w);
        assert!(answers != silent && answers != refuses);
        reply(&mut w, answers, &id, MOOD);
        assert_eq!(wants(&w, answers).as_deref(), Some(WANTED));
        assert!(w.slices[0].caps.asked.is_empty() && w.slices[0].caps.pending.is_empty());
    }

    #[test]
    fn what_cannot_be_verified_counts_for_its_session_only() {
        let mut w = World::new(1);
        let clients = ["alice", "bob"].map(|name| {
            w.add(name);
            let client = w.online(name, "r");
            w.send(
                client,
                &format!("<presence><c xmlns='{NS}' node='urn:old' ver='1.0'/></presence>"),
            );
            client
        });
        for client in clients {
            let id = query(&mut w, client).expect("each is asked");
            reply(&mut w, client, &id, MOOD);
            assert_eq!(wants(&w, client).as_deref(), Some(WANTED));
        }
        assert!(w.slices[0].caps.is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_oldest_that_nobody_uses_goes() {
        let mut w = World::with(1, |limits| limits.caps_remembered_max = 2);
        let inner = |n: usize| format!("<feature var='n{n}+notify'/>");
        let known = |w: &mut World, n: usize| {
            let name = format!("u{n}");
            w.add(&name);
            let client = w.online(&name, "r");
            announce(w, client, &sha1(&inner(n)));
            if let Some(id) = query(w, client) {
                reply(w, client, &id, &inner(n));
            }
            assert_eq!(wants(w, client), Some(format!("n{n}\n")));
            client
        };
        let first = known(&mut w, 0);
        let second = known(&mut w, 1);
        known(&mut w, 2);
        assert_eq!(w.slices[0].caps.len(), 2, "both are in use");
        w.logout(second);
        known(&mut w, 3);
        assert_eq!(w.slices[0].caps.len(), 2);
        let keys: Vec<_> = w.slices[0]
            .caps
            .known
            .values()
            .map(|e| e.wants().to_owned())
            .collect();
        assert!(
            keys.contains(&"n0\n".to_owned()) && keys.contains(&"n3\n".to_owned()),
            "{keys:?}"
        );
        w.logout(first);
    }

    #[test]
    fn a_client_that_wants_everything_is_listened_to_in_part() {
        let many: String = (0..1000).map(|n| format!("node{n}+notify<")).collect();
        assert!(wants_of(&many).len() <= WANTS_BYTES_MAX);
        assert_eq!(
            &*wants_of("a&#10;b+notify<a\nb+notify<+notify<c+notify<c+notify<"),
            "a&#10;b\nc\n"
        );
    }

    #[test]
    fn the_announced_hash_is_that_of_the_answer() {
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
