//! Avatars: published in nodes (XEP-0084), shown in the vCard and announced in presence (XEP-0153), converted here (XEP-0398).
//!
//! The image is kept once, in the node [`DATA`]. Who asks for the vCard gets it as `<PHOTO/>` if he may see that node; a vCard that
//! is set with a photo publishes it ([`super::vcard`]). Presence of the user's clients that says nothing of an avatar gets its hash; when
//! the avatar changes, the presence of all his resources goes out anew. The hash comes from the index ([`super::pep`]), which is
//! read when a client that has capabilities sends its first presence, and then what went out without the hash goes out again.

use aws_lc_rs::digest;
use base64::prelude::*;

use super::{Feature, NONE, NodeRule, pep, presence};
use crate::xml::dom::Element;
use crate::xml::view::View;
use crate::xmpp::pubsub::config::Config;
use crate::xmpp::pubsub::edit::Op;
use crate::xmpp::pubsub::nodes::{Item, Nodes};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::Slice;

pub const DATA: &str = "urn:xmpp:avatar:data";
pub const METADATA: &str = "urn:xmpp:avatar:metadata";
/// XEP-0153.
pub const UPDATE: &str = "vcard-temp:x:update";

pub static FEATURE: Feature = Feature {
    name: "Avatars, in nodes, vCard and presence",
    spec: "XEP-0084, XEP-0153, XEP-0398",
    version: "1.1.4, 1.1.1, 1.0.0",
    account: &["urn:xmpp:pep-vcard-conversion:0"],
    nodes: &[
        NodeRule {
            name: DATA,
            config: Config::personal,
        },
        NodeRule {
            name: METADATA,
            config: Config::personal,
        },
    ],
    ..NONE
};

const END: &[u8] = b"</presence>";

/// What the metadata say of the image that is kept here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// SHA-1 in hexadecimal, and the id of the item in [`DATA`].
    pub id: String,
    pub typ: String,
}

/// `None`: nothing was ever said of an avatar. `Some(None)`: there is none (any more).
pub fn image(nodes: &Nodes) -> Option<Option<Image>> {
    let item = nodes.get(METADATA)?.inline.as_ref()?;
    let metadata = pep::payload(item)?;
    let infos = metadata.elements().filter(|e| e.is("info", METADATA));
    let mut here = infos.filter(|info| info.get("url").is_none());
    Some(here.find_map(|info| {
        let id = info.get("id").filter(|id| is_hash(id))?;
        Some(Image {
            id: id.to_ascii_lowercase(),
            typ: info.get("type").unwrap_or("image/png").to_owned(),
        })
    }))
}

fn is_hash(id: &str) -> bool {
    id.len() == 40 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

/// What presence says of the avatar: its hash, or nothing (there is none). It is read from an index once ([`pep::Index::avatar`]).
pub fn hash<'a>(slice: &'a Slice, name: &str) -> Option<&'a str> {
    slice.user(name)?.pep.as_ref()?.avatar()
}

pub fn hash_in(nodes: &Nodes) -> Option<Box<str>> {
    let image = image(nodes)?;
    Some(image.map(|image| image.id).unwrap_or_default().into())
}

fn update(hash: &str) -> Vec<u8> {
    let photo = match hash {
        "" => "<photo/>".to_owned(),
        hash => format!("<photo>{hash}</photo>"),
    };
    format!("<x xmlns='{UPDATE}'>{photo}</x>").into_bytes()
}

/// XEP-0398 section 4: available presence of a client of the user's as it goes out.
pub fn announce(slice: &Slice, name: &str, view: &View<'_>, stanza: Vec<u8>) -> Vec<u8> {
    let Some(hash) = hash(slice, name) else {
        return stanza;
    };
    match view.child("x", UPDATE) {
        None => with_update(stanza, hash),
        // a client that says what it has, or that it has none, is believed
        Some(x) if x.inner().contains("photo") => stanza,
        // one that says that it does not know is helped
        Some(_) => match crate::xmpp::parse_stanza(&stanza) {
            Some(mut element) => {
                element.remove_children(|e| e.is("x", UPDATE));
                let mut bytes = Vec::new();
                element.write(&mut bytes, crate::xmpp::NS_CLIENT);
                with_update(bytes, hash)
            }
            None => stanza,
        },
    }
}

fn with_update(mut stanza: Vec<u8>, hash: &str) -> Vec<u8> {
    if stanza.ends_with(END) {
        stanza.truncate(stanza.len() - END.len());
    } else if stanza.ends_with(b"/>") {
        stanza.truncate(stanza.len() - 2);
        stanza.push(b'>');
    } else {
        return stanza;
    }
    stanza.extend_from_slice(&update(hash));
    stanza.extend_from_slice(END);
    stanza
}

/// Presence without what [`with_update`] has added; `None`: the client says something of its own.
fn without_update(stanza: &[u8]) -> Option<Vec<u8>> {
    let Some(at) = memchr::memmem::rfind(stanza, UPDATE.as_bytes()) else {
        return Some(stanza.to_vec());
    };
    let start = at.checked_sub(b"<x xmlns='".len())?;
    let text = std::str::from_utf8(&stanza[at + UPDATE.len()..]).ok()?;
    let hash = text
        .strip_prefix("'><photo")?
        .strip_suffix("</x></presence>")?;
    let hash = match hash {
        "/>" => "",
        hash => hash.strip_prefix('>')?.strip_suffix("</photo>")?,
    };
    let ours = hash.is_empty() || is_hash(hash);
    let whole = stanza[start..].strip_suffix(END)? == update(hash);
    (ours && whole).then(|| [&stanza[..start], END].concat())
}

/// A client with capabilities has come: its user's index is read if it was not, and presence that went out without the hash goes
/// out again.
pub fn come(slice: &mut Slice, sid: SessionId, view: &View<'_>) {
    let Some(name) = slice.sessions.get(sid).map(|s| s.user.clone()) else {
        return;
    };
    let read = slice.user(&name).is_none_or(|user| user.pep.is_some());
    if read || view.child("c", super::caps::NS).is_none() {
        return;
    }
    pep::with_index(slice, &name.clone(), move |slice, result| {
        if result.is_ok() && hash(slice, &name).is_some() {
            changed(slice, &name);
        }
    });
}

/// The avatar is another one: presence of the user's resources goes out anew, if it says something else now.
pub fn changed(slice: &mut Slice, name: &str) {
    let hash = hash(slice, name).map(str::to_owned);
    for sid in slice.sessions_of(name) {
        let Some(presence) = slice.sessions.get(sid).and_then(|s| s.presence.as_ref()) else {
            continue;
        };
        let Some(mut stanza) = without_update(&presence.stanza) else {
            continue;
        };
        if let Some(hash) = &hash {
            stanza = with_update(stanza, hash);
        }
        if *stanza != *presence.stanza {
            presence::renew(slice, sid, stanza);
        }
    }
}

/// The avatar of a vCard that is set: what is to be published, and the card without it. An image that is no valid base64, or
/// lies elsewhere, stays in the card.
pub fn of_card(nodes: &Nodes, card: &mut Element) -> Vec<(String, Op)> {
    let ns = card.ns.clone();
    let before = image(nodes).flatten();
    let photo = card.find("PHOTO", &ns).cloned();
    let Some(photo) = photo.filter(|photo| !photo.children.is_empty()) else {
        // whoever reads a card before he writes it has got the photo: it was taken out
        return match before {
            Some(_) => vec![metadata_op(
                String::new(),
                Element::new("metadata", METADATA),
            )],
            None => Vec::new(),
        };
    };
    let text = |name| photo.find(name, &ns).map(Element::text_content);
    let packed: String = text("BINVAL")
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_whitespace())
        .collect();
    let bytes = match BASE64_STANDARD.decode(&packed) {
        Ok(bytes) if !bytes.is_empty() => bytes,
        _ => return Vec::new(),
    };
    card.remove_children(|e| e.is("PHOTO", &ns));
    let sha1 = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &bytes);
    let id: String = sha1.as_ref().iter().map(|b| format!("{b:02x}")).collect();
    let typ = text("TYPE").filter(|typ| !typ.is_empty());
    let typ = typ.unwrap_or_else(|| "image/png".into());
    let image = Image {
        id: id.clone(),
        typ,
    };
    if before.as_ref() == Some(&image) {
        return Vec::new();
    }
    let mut payload = Vec::new();
    Element::new("data", DATA)
        .text(BASE64_STANDARD.encode(&bytes))
        .write(&mut payload, "");
    let data = Op::Publish {
        id: id.clone(),
        payload,
        options: None,
        config: Config::public(),
    };
    let info = Element::new("info", METADATA)
        .attr("bytes", bytes.len().to_string())
        .attr("id", id.as_str())
        .attr("type", image.typ);
    let metadata = Element::new("metadata", METADATA).child(info);
    vec![(DATA.to_owned(), data), metadata_op(id, metadata)]
}

fn metadata_op(id: String, metadata: Element) -> (String, Op) {
    let mut payload = Vec::new();
    metadata.write(&mut payload, "");
    let id = match id.is_empty() {
        true => "current".to_owned(),
        false => id,
    };
    let op = Op::Publish {
        id,
        payload,
        options: None,
        config: Config::public(),
    };
    (METADATA.to_owned(), op)
}

/// The card with the image of the nodes in it, or without any.
pub fn into_card(card: &mut Element, image: Option<&Image>, data: &[Item]) {
    let ns = card.ns.clone();
    card.remove_children(|e| e.is("PHOTO", &ns));
    let Some(image) = image else { return };
    let item = data
        .iter()
        .find(|item| item.id.eq_ignore_ascii_case(&image.id));
    let Some(binary) = item.and_then(pep::payload) else {
        return;
    };
    let photo = Element::new("PHOTO", &ns)
        .child(Element::new("TYPE", &ns).text(image.typ.as_str()))
        .child(Element::new("BINVAL", &ns).text(binary.text_content()));
    *card = std::mem::replace(card, Element::new("", "")).child(photo);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::Subscription;
    use crate::xmpp::pubsub::NS;
    use crate::xmpp::testing::{Client, World};

    /// SHA-1 of "image" and of "other".
    const IMAGE: &str = "0e76292794888d4f1fa75fb3aff4ca27c58f56a6";
    const CAPS: &str = "<c xmlns='http://jabber.org/protocol/caps' node='urn:c' ver='1'/>";

    fn publish(node: &str, id: &str, payload: &str) -> String {
        format!(
            "<iq type='set' id='p'><pubsub xmlns='{NS}'><publish node='{node}'><item id='{id}'>{payload}</item></publish></pubsub></iq>"
        )
    }

    fn card(inner: &str) -> String {
        format!("<iq type='set' id='v'><vCard xmlns='vcard-temp'><FN>A</FN>{inner}</vCard></iq>")
    }

    fn photo(text: &str) -> String {
        let binary = BASE64_STANDARD.encode(text);
        format!("<PHOTO><TYPE>image/jpeg</TYPE><BINVAL>{binary}</BINVAL></PHOTO>")
    }

    #[track_caller]
    fn done(w: &mut World, client: Client, iq: &str) {
        w.send(client, iq);
        let got = w.take(client).concat();
        assert!(got.contains("<iq type='result'"), "{iq}: {got}");
    }

    fn upload(w: &mut World, client: Client) {
        let data = format!(
            "<data xmlns='{DATA}'>{}</data>",
            BASE64_STANDARD.encode("image")
        );
        done(w, client, &publish(DATA, IMAGE, &data));
        let info = format!(
            "<metadata xmlns='{METADATA}'><info id='{IMAGE}' bytes='5' type='image/jpeg'/></metadata>"
        );
        done(w, client, &publish(METADATA, IMAGE, &info));
    }

    fn ask(w: &mut World, client: Client, to: &str) -> String {
        w.send(
            client,
            &format!("<iq type='get' id='v'{to}><vCard xmlns='vcard-temp'/></iq>"),
        );
        w.take(client).concat()
    }

    fn x(hash: &str) -> String {
        String::from_utf8(update(hash)).unwrap()
    }

    #[test]
    fn an_avatar_in_nodes_is_in_the_vcard_and_in_presence() {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.befriend(&alice, &bob);
        let a = w.online(&alice, "a");
        let b = w.online(&bob, "b");
        done(&mut w, a, &card(""));
        upload(&mut w, a);
        let told = w.take(b);
        assert!(told.len() == 1 && told[0].contains(&x(IMAGE)), "{told:?}");
        let shown = ask(&mut w, b, &format!(" to='{alice}@localhost'"));
        assert!(
            shown.contains(&photo("image")) && shown.contains("<FN>A</FN>"),
            "{shown}"
        );
        for (sent, wanted) in [
            ("<presence/>".to_owned(), Some(x(IMAGE))),
            (
                "<presence><show>away</show></presence>".to_owned(),
                Some(x(IMAGE)),
            ),
            (
                format!("<presence><x xmlns='{UPDATE}'/></presence>"),
                Some(x(IMAGE)),
            ),
            (
                format!("<presence><x xmlns='{UPDATE}'><photo/></x></presence>"),
                None,
            ),
        ] {
            w.send(a, &sent);
            w.take(a);
            let got = w.take(b).concat();
            assert_eq!(got.matches(UPDATE).count(), 1, "{got}");
            assert_eq!(got.contains(IMAGE), wanted.is_some(), "{got}");
        }
        // directed presence, as into rooms
        w.send(a, &format!("<presence to='{bob}@localhost/b'/>"));
        assert!(w.take(b).concat().contains(&x(IMAGE)));
        let room = "desk@rooms.localhost";
        let enter = |nick: &str| {
            format!(
                "<presence to='{room}/{nick}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
            )
        };
        w.send(b, &enter("b"));
        w.send(b, &format!("<iq type='set' id='o' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query></iq>"));
        w.take(b);
        w.send(a, &enter("a"));
        let there = w.take(b).concat();
        assert!(there.contains(&x(IMAGE)), "{there}");
        w.send(a, "<presence/>");
        w.take(b);
        done(
            &mut w,
            a,
            &publish(METADATA, "none", &format!("<metadata xmlns='{METADATA}'/>")),
        );
        assert!(w.take(b).concat().contains(&x("")));
        assert!(!ask(&mut w, b, &format!(" to='{alice}@localhost'")).contains("PHOTO"));
    }

    #[test]
    fn presence_that_went_out_before_the_avatar_was_known_goes_out_again() {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.befriend(&alice, &bob);
        let a = w.online(&alice, "a");
        upload(&mut w, a);
        w.crash(2);
        let b = w.online(&bob, "b");
        let a = w.login(&alice, "a");
        w.send(a, &format!("<presence>{CAPS}</presence>"));
        let told = w.take(b);
        assert!(told.last().unwrap().contains(&x(IMAGE)), "{told:?}");
        let count = told.len();
        let second = w.login(&alice, "second");
        w.send(second, &format!("<presence>{CAPS}</presence>"));
        let told = w.take(b);
        assert!(
            told.len() < count.max(2) && told[0].contains(&x(IMAGE)),
            "known now: {told:?}"
        );
    }

    #[test]
    fn a_photo_in_a_vcard_is_published_and_taken_back() {
        let mut w = World::new(1);
        w.item("alice", "bob", Subscription::Both);
        w.item("bob", "alice", Subscription::Both);
        let a = w.online("alice", "a");
        let b = w.online("bob", "b");
        done(&mut w, a, &card(&photo("image")));
        assert!(w.take(b).concat().contains(&x(IMAGE)));
        let get = |node: &str| {
            format!(
                "<iq type='get' id='g' to='alice@localhost'><pubsub xmlns='{NS}'><items node='{node}'/></pubsub></iq>"
            )
        };
        w.send(b, &get(METADATA));
        let metadata = w.take(b).concat();
        assert!(
            metadata.contains(&format!("<info bytes='5' id='{IMAGE}' type='image/jpeg'/>")),
            "{metadata}"
        );
        w.send(b, &get(DATA));
        assert!(
            w.take(b)
                .concat()
                .contains(&BASE64_STANDARD.encode("image"))
        );
        let stored =
            String::from_utf8_lossy(&w.tier.users["alice"].documents["vcard"]).into_owned();
        assert!(!stored.contains("BINVAL"), "it is kept once: {stored}");
        // what was read is written again: nothing is told
        let mine = ask(&mut w, a, "");
        let (_, mine) = mine.split_once("<FN>A</FN>").unwrap();
        let mine = mine.split_once("</vCard>").unwrap().0.to_owned();
        done(&mut w, a, &card(&mine));
        assert!(w.take(b).is_empty());
        done(&mut w, a, &card(""));
        assert!(w.take(b).concat().contains(&x("")));
        // what is no image stays what it was
        done(&mut w, a, &card("<PHOTO><BINVAL>***</BINVAL></PHOTO>"));
        assert!(w.take(b).is_empty());
    }

    #[test]
    fn who_may_not_see_the_avatar_does_not_find_it_in_the_vcard() {
        let mut w = World::new(1);
        w.add("alice");
        w.add("eve");
        let a = w.online("alice", "a");
        let e = w.online("eve", "e");
        upload(&mut w, a);
        let got = ask(&mut w, e, " to='alice@localhost'");
        assert!(got.contains("<service-unavailable"), "{got}");
        done(&mut w, a, &card(""));
        upload(&mut w, a);
        let got = ask(&mut w, e, " to='alice@localhost'");
        assert!(
            got.contains("<FN>A</FN>") && !got.contains("PHOTO"),
            "{got}"
        );
        assert!(ask(&mut w, a, "").contains("PHOTO"));
    }

    #[test]
    fn what_a_client_says_of_its_avatar_is_told_apart_from_what_the_server_adds() {
        let stanzas = [
            "<presence from='a@b/c'/>",
            "<presence from='a@b/c'><show>away</show></presence>",
        ];
        for stanza in stanzas {
            for hash in ["", IMAGE] {
                let with = with_update(stanza.into(), hash);
                let again = without_update(&with).unwrap();
                assert_eq!(with_update(again, hash), with);
            }
        }
        for own in [
            "<presence><x xmlns='vcard-temp:x:update'><photo>mine</photo></x></presence>",
            "<presence><x xmlns='vcard-temp:x:update'/></presence>",
            "<presence><x xmlns='vcard-temp:x:update'><photo/></x><show>away</show></presence>",
        ] {
            assert_eq!(without_update(own.as_bytes()), None);
        }
    }
}
