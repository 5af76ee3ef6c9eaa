//! Message retraction (XEP-0424), and what moderation of rooms (XEP-0425) needs of it.
//!
//! In: messages with `<retract/>`, where they are accepted. Out: pages of archives in which what was retracted is a tombstone.
//! Promises: only who has sent a message retracts it, in his own archive and in the recipient's; a retraction is durable with
//! the message that brings it, before that is acknowledged; nothing is replaced or deleted: the original stays in the store,
//! where no client reads it. A retraction hides all versions of a message that was corrected (XEP-0308).
//!
//! What is retracted is worked out when a page is shown, not when the retraction comes: it may come before an entry is
//! anywhere near, and needs no search then.

use std::rc::Rc;

use super::{Feature, NONE, moderation, occupant_id, stable_id, time};
use crate::store::change::{Change, Id, Message, Retract};
use crate::store::tier::{Entry, Page, Retraction};
use crate::xml::dom::Element;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::ledger::Act;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::{Env, Slice};

pub const NS: &str = "urn:xmpp:message-retract:1";
const NS_CORRECT: &str = "urn:xmpp:message-correct:0";

pub static FEATURE: Feature = Feature {
    name: "Message retraction",
    spec: "XEP-0424",
    version: "0.4.2",
    server: &[NS],
    account: &[NS, "urn:xmpp:message-retract:1#tombstone"],
    ..NONE
};

/// No id of a message that can be retracted is longer.
const TARGET_BYTES_MAX: usize = 1023;

/// A message with `<retract/>` is being journalled, with this id and these bits of [`Message`]: so is the retraction.
pub fn journal(slice: &mut Slice, owner: &Rc<str>, id: u64, what: u8, peer: &str, stanza: &[u8]) {
    let by: Box<str> = person(&slice.env, peer).into();
    put(slice, owner, id, what & SIDES, &by, stanza);
}

/// The same for a message to a room, by the occupant with this identifier (XEP-0421): it names its target by the room's stable id.
pub fn journal_in_room(slice: &mut Slice, room: &Rc<str>, id: u64, by: &str, stanza: &[u8]) {
    put(slice, room, id, Message::RECEIVED, by, stanza);
}

fn put(slice: &mut Slice, owner: &Rc<str>, id: u64, side: u8, peer: &str, stanza: &[u8]) {
    let Some(message) = crate::xmpp::parse_stanza(stanza) else {
        return;
    };
    let target = message.find("retract", NS).and_then(|e| e.get("id"));
    let Some(target) = target.filter(|id| !id.is_empty() && id.len() <= TARGET_BYTES_MAX) else {
        return;
    };
    let tombstone = Element::new("retracted", NS).attr("stamp", time::stamp_ms(Id(id).unix_ms()));
    // clients match the two by it
    let tombstone = match message.get("id") {
        Some(own) => tombstone.attr("id", own),
        None => tombstone,
    };
    let tombstone = tombstone.to_xml("");
    let retract = Retract {
        id,
        owner,
        side,
        peer,
        target,
        tombstone: tombstone.as_bytes(),
    };
    let change = Change::Retract(retract);
    slice.ledger.journal(owner, &change, Act::Retracted);
}

/// Somebody who may do so, which was checked, has an entry of a room's archive retracted (XEP-0425): the one with this stable
/// id. `id` is that of the message by which the room tells its occupants, which is being journalled; `by` and `reason` are
/// shown in the tombstone.
pub fn moderate(
    slice: &mut Slice,
    owner: &Rc<str>,
    id: u64,
    stable_id: &str,
    by: &str,
    reason: Option<&str>,
) {
    let tombstone = Element::new("retracted", NS)
        .attr("stamp", time::stamp_ms(Id(id).unix_ms()))
        .child(Element::new("moderated", moderation::NS).attr("by", by));
    let tombstone = match reason {
        Some(reason) => tombstone.child(Element::new("reason", NS).text(reason)),
        None => tombstone,
    };
    let tombstone = tombstone.to_xml("");
    let retract = Retract {
        id,
        owner,
        side: 0,
        peer: "",
        target: stable_id,
        tombstone: tombstone.as_bytes(),
    };
    let change = Change::Retract(retract);
    slice.ledger.journal(owner, &change, Act::Retracted);
}

const SIDES: u8 = Message::SENT | Message::RECEIVED;

/// The ids by which entries of a page may have been retracted, as [`Retraction::key`] has them.
pub fn keys(env: &Env, page: &Page) -> Box<[i64]> {
    let mut keys: Vec<i64> = page
        .entries
        .iter()
        .flat_map(|entry| Names::of(env, entry).all())
        .map(|name| Retraction::key(&name))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into()
}

/// Puts tombstones in the place of what was retracted; the entries that have become one.
pub fn bury(env: &Env, page: &mut Page, retractions: &[Retraction]) -> Vec<Entry> {
    let mut buried = Vec::new();
    if retractions.is_empty() {
        return buried;
    }
    for entry in &mut page.entries {
        let names = Names::of(env, entry);
        let retraction = retractions
            .iter()
            .find(|one| names.are_meant_by(env, one, entry));
        let tombstone = retraction.and_then(|one| tombstone(&entry.stanza, &one.tombstone));
        if let Some(tombstone) = tombstone {
            entry.stanza = tombstone;
            buried.push(entry.clone());
        }
    }
    buried
}

/// How an entry may be named.
#[derive(Default)]
struct Names {
    /// By ids of its sender's: its own, and that of the message which it corrects.
    own: Vec<String>,
    /// In a room: its stable id, and the identifier of who has sent it.
    stable: Option<String>,
    occupant: Option<String>,
}

impl Names {
    fn of(env: &Env, entry: &Entry) -> Names {
        let meta = Meta::from_numbers(entry.kind, entry.flags);
        let in_room = meta.kind == Kind::GroupChat;
        let stable = in_room.then(|| stable_id::shown(entry.id, env.id_key));
        // a retraction itself stays, clients that were away learn of it; but a moderator may take it back
        if meta.has(Meta::RETRACT) {
            return Names {
                stable,
                ..Names::default()
            };
        }
        let Some(message) = crate::xmpp::parse_stanza(&entry.stanza) else {
            return Names::default();
        };
        let origin = message.find("origin-id", stable_id::NS);
        let corrects = message.find("replace", NS_CORRECT);
        let ids = [Some(&message), origin, corrects];
        let ids = ids.into_iter().flatten().filter_map(|e| e.get("id"));
        let mut own: Vec<String> = ids.map(str::to_owned).collect();
        own.sort_unstable();
        own.dedup();
        let occupant = message.find("occupant-id", occupant_id::NS);
        let occupant = occupant.and_then(|e| e.get("id")).map(str::to_owned);
        Names {
            own,
            stable,
            occupant,
        }
    }

    fn all(self) -> impl Iterator<Item = String> {
        self.own.into_iter().chain(self.stable)
    }

    fn are_meant_by(&self, env: &Env, retraction: &Retraction, entry: &Entry) -> bool {
        if retraction.id <= entry.id {
            return false;
        }
        if let Some(stable) = &self.stable {
            // by a moderator, or by whoever has sent it
            let may = retraction.side == 0 || self.occupant.as_deref() == Some(&*retraction.peer);
            return **stable == *retraction.target && may;
        }
        retraction.side == entry.what & SIDES
            && *retraction.peer == *person(env, &entry.peer)
            && self.own.iter().any(|id| **id == *retraction.target)
    }
}

/// The message without all that was in it.
fn tombstone(stanza: &[u8], tombstone: &[u8]) -> Option<Box<[u8]>> {
    let message = crate::xmpp::parse_stanza(stanza)?;
    let tombstone = Element::parse(std::str::from_utf8(tombstone).ok()?).ok()?;
    let mut shown = Element::new("message", NS_CLIENT);
    for name in ["to", "from", "type", "id"] {
        if let Some(value) = message.get(name) {
            shown.set(name, value);
        }
    }
    let mut bytes = Vec::new();
    shown.child(tombstone).write(&mut bytes, NS_CLIENT);
    Some(bytes.into())
}

/// Who it is that speaks: an address without its resource, but in a room the resource tells people apart.
fn person<'j>(env: &Env, jid: &'j str) -> &'j str {
    let bare = jid.split_once('/').map_or(jid, |(bare, _)| bare);
    let domain = bare.split_once('@').map_or(bare, |(_, domain)| domain);
    match env.rooms.as_deref() == Some(domain) {
        true => jid,
        false => bare,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tier::ArchiveQuery;
    use crate::xmpp::parse_stanza;
    use crate::xmpp::testing::{Client, World};
    use std::cell::RefCell;

    struct Scene {
        w: World,
        alice: String,
        bob: String,
        a: Client,
        b: Client,
    }

    impl Scene {
        fn new() -> Scene {
            let mut w = World::new(2);
            let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
            w.add(&alice);
            w.add(&bob);
            let (a, b) = (w.online(&alice, "a"), w.online(&bob, "b"));
            Scene {
                w,
                alice,
                bob,
                a,
                b,
            }
        }

        fn say(&mut self, client: Client, id: &str, payload: &str) {
            let to = match client == self.a {
                true => &self.bob,
                false => &self.alice,
            };
            let message =
                format!("<message type='chat' id='{id}' to='{to}@localhost'>{payload}</message>");
            self.w.send(client, &message);
            self.w.advance(1000);
        }

        fn retract(&mut self, client: Client, id: &str) {
            let payload = format!(
                "<retract id='{id}' xmlns='{NS}'/><fallback xmlns='urn:xmpp:fallback:0' for='{NS}'/><body>gone</body>"
            );
            self.say(client, &format!("r-{id}"), &payload);
        }

        /// Bodies in an archive; of a tombstone its id.
        fn archive(&mut self, name: &str) -> Vec<String> {
            let query = ArchiveQuery {
                name: name.into(),
                most: 100,
                backwards: true,
                ..ArchiveQuery::default()
            };
            let put = Rc::new(RefCell::new(None));
            let page = put.clone();
            let then = move |_: &mut Slice, read| *put.borrow_mut() = Some(read);
            self.w.slice_of(name).read_archive(query, Box::new(then));
            self.w.run();
            let page: Page = page.take().expect("a read is answered").unwrap();
            let shown = |entry: &Entry| {
                let message = parse_stanza(&entry.stanza).unwrap();
                match message.find("retracted", NS) {
                    None => message.find("body", NS_CLIENT).unwrap().text_content(),
                    Some(tombstone) => {
                        assert_eq!(message.children.len(), 1, "{message:?}");
                        assert!(tombstone.get("stamp").is_some());
                        let by = tombstone.get("id").unwrap_or("a moderator");
                        format!("{} by {by}", message.get("id").unwrap())
                    }
                }
            };
            page.entries.iter().map(shown).collect()
        }

        /// All see the same, in memory, in SQL and in the journal.
        fn both_have(&mut self, wanted: &[&str]) {
            for name in [self.alice.clone(), self.bob.clone()] {
                for _ in 0..2 {
                    assert_eq!(self.archive(&name), wanted, "{name}");
                }
            }
        }
    }

    #[test]
    fn a_sender_retracts_his_own_message_in_both_archives_and_the_original_stays() {
        for dry in [false, true] {
            let mut s = Scene::new();
            s.w.tier.dry = dry;
            s.say(s.a, "m1", "<body>1</body>");
            s.say(s.b, "m2", "<body>2</body>");
            s.both_have(&["1", "2"]);
            s.retract(s.a, "m1");
            s.both_have(&["m1 by r-m1", "2", "gone"]);
            s.w.drain();
            s.both_have(&["m1 by r-m1", "2", "gone"]);
            s.w.crash(2);
            s.both_have(&["m1 by r-m1", "2", "gone"]);
            let stored = s.w.tier.users[&s.bob].archive.values();
            let stored: Vec<_> = stored.map(|e| e.stanza.clone()).collect();
            assert!(String::from_utf8_lossy(&stored[0]).contains("<body>1</body>"));
        }
    }

    #[test]
    fn a_retraction_is_durable_with_its_message() {
        let mut s = Scene::new();
        s.w.tier.dry = true;
        s.say(s.a, "m1", "<body>1</body>");
        s.retract(s.a, "m1");
        s.w.crash(3);
        s.both_have(&["m1 by r-m1", "gone"]);
    }

    #[test]
    fn nobody_retracts_what_another_has_sent() {
        let mut s = Scene::new();
        let carol = s.w.on(0, "carol");
        s.w.add(&carol);
        let c = s.w.online(&carol, "c");
        s.say(s.a, "m1", "<body>1</body>");
        // the other side, somebody else, and one who says that he is she
        s.retract(s.b, "m1");
        for to in [&s.alice, &s.bob] {
            let message = format!(
                "<message type='chat' id='x' to='{to}@localhost'><retract id='m1' xmlns='{NS}'/><body>x</body></message>"
            );
            s.w.send(c, &message);
        }
        assert_eq!(s.archive(&s.bob.clone()), ["1", "gone", "x"]);
        assert_eq!(s.archive(&s.alice.clone()), ["1", "gone", "x"]);
        let forged = format!(
            "<message type='chat' from='{}@localhost' to='{}@localhost'><retract id='m1' xmlns='{NS}'/><body>y</body></message>",
            s.alice, s.bob
        );
        s.w.send(c, &forged);
        assert!(s.w.closed(c));
        assert_eq!(s.archive(&s.bob.clone()), ["1", "gone", "x"]);
    }

    #[test]
    fn a_retraction_is_for_what_was_sent_before_it_and_not_for_others() {
        let mut s = Scene::new();
        s.say(s.a, "m1", "<body>1</body>");
        s.say(
            s.a,
            "m2",
            "<body>2</body><origin-id xmlns='urn:xmpp:sid:0' id='o2'/>",
        );
        s.say(s.b, "m1", "<body>3</body>");
        s.retract(s.a, "o2");
        s.retract(s.a, "m1");
        // the same id again, a retraction of a retraction, nothing at all
        s.say(s.a, "m1", "<body>4</body>");
        s.retract(s.a, "r-m1");
        s.say(s.a, "x", &format!("<retract xmlns='{NS}'/><body>5</body>"));
        s.both_have(&[
            "m1 by r-m1",
            "m2 by r-o2",
            "3",
            "gone",
            "gone",
            "4",
            "gone",
            "5",
        ]);
    }

    #[test]
    fn a_correction_replaces_nothing_and_a_retraction_hides_all_versions() {
        let mut s = Scene::new();
        s.say(s.a, "m1", "<body>1</body>");
        let correct = "<body>2</body><replace id='m1' xmlns='urn:xmpp:message-correct:0'/>";
        s.say(s.a, "m2", correct);
        s.both_have(&["1", "2"]);
        s.retract(s.a, "m1");
        s.both_have(&["m1 by r-m1", "m2 by r-m1", "gone"]);
    }

    #[test]
    fn a_retraction_without_body_is_archived() {
        let mut s = Scene::new();
        s.say(s.a, "m1", "<body>1</body>");
        s.say(s.a, "r", &format!("<retract id='m1' xmlns='{NS}'/>"));
        assert_eq!(s.w.tier.users[&s.bob].archive.len(), 2);
        assert_eq!(s.w.tier.users[&s.alice].retractions.len(), 1);
    }

    #[test]
    fn a_moderated_entry_of_a_room_is_a_tombstone() {
        let mut s = Scene::new();
        // as a room's entry would be
        s.say(s.a, "m1", "<body>1</body>");
        let name = s.bob.clone();
        let mut archive = std::mem::take(&mut s.w.tier.users.get_mut(&name).unwrap().archive);
        for entry in archive.values_mut() {
            entry.kind = Kind::GroupChat as u8;
        }
        let id = *archive.keys().next().unwrap();
        s.w.tier.users.get_mut(&name).unwrap().archive = archive;
        let slice = s.w.slice_of(&name);
        let shown = stable_id::shown(id, slice.env.id_key);
        let now = slice.next_id();
        moderate(
            slice,
            &Rc::from(&*name),
            now,
            &shown,
            "room@rooms/boss",
            Some("spam"),
        );
        s.w.run();
        assert_eq!(s.archive(&name), ["m1 by a moderator"]);
    }
}
