//! vcard-temp (XEP-0054): one document for each account, written by its user, readable by everybody. Its photo is the avatar of
//! [`super::avatar`], and [`super::vcard4`] says the same in another form.

use super::{Feature, Iq, IqRoute, NONE, Target, avatar, pep, vcard4};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::slice::Slice;

pub const NS: &str = "vcard-temp";

pub static FEATURE: Feature = Feature {
    name: "vcard-temp",
    spec: "XEP-0054",
    version: "1.3.0",
    server: &[NS],
    account: &[NS],
    iq: &[IqRoute {
        name: "vCard",
        ns: NS,
        target: Target::Account,
        handle,
    }],
    ..NONE
};

/// Key of the document.
pub const KEY: &str = "vcard";

fn handle(slice: &mut Slice, iq: Iq) {
    if iq.set {
        set(slice, iq)
    } else {
        get(slice, iq)
    }
}

fn get(slice: &mut Slice, iq: Iq) {
    let name = iq.account().to_owned();
    pep::with_index(slice, &name.clone(), move |slice, result| {
        if result.is_err() {
            return slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT);
        }
        slice.read(
            &name,
            KEY,
            Box::new(move |slice, result| match result {
                Ok(card) => with_avatar(slice, iq, card),
                Err(error) => {
                    tracing::warn!(%error, "a vCard could not be read");
                    slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT);
                }
            }),
        );
    });
}

/// The avatar of the nodes, if the asker may see it, is the photo of the card (XEP-0398 section 5.2).
fn with_avatar(slice: &mut Slice, iq: Iq, card: Option<Box<[u8]>>) {
    let card = card.and_then(|bytes| Element::parse(std::str::from_utf8(&bytes).ok()?).ok());
    let name = iq.account().to_owned();
    let nodes = pep::nodes_of(slice, &name).unwrap_or_default();
    let image = match avatar::image(&nodes) {
        None => return answer(slice, iq, card),
        Some(image) => image.filter(|_| pep::node_info(slice, &iq, avatar::DATA).is_ok()),
    };
    let Some(image) = image else {
        let card = card.map(|mut card| {
            avatar::into_card(&mut card, None, &[]);
            card
        });
        return answer(slice, iq, card);
    };
    pep::read_items(
        slice,
        &name,
        avatar::DATA,
        Box::new(move |slice, found| match found {
            Ok(items) => {
                let mut card = card.unwrap_or_else(|| Element::new("vCard", NS));
                avatar::into_card(&mut card, Some(&image), &items);
                answer(
                    slice,
                    iq,
                    Some(card).filter(|card| !card.children.is_empty()),
                );
            }
            Err(error) => slice.iq_error(&iq, &error),
        }),
    );
}

fn answer(slice: &mut Slice, iq: Iq, card: Option<Element>) {
    match card {
        Some(card) => slice.iq_result(&iq, Some(card)),
        None if iq.own() => slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND),
        // XEP-0054 section 3.3: the same as where there is no such account
        None => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
    }
}

/// The card without its photo, the avatar that the photo is, and the vCard4 that says the same are written in one step.
fn set(slice: &mut Slice, iq: Iq) {
    if !iq.own() {
        return slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    }
    let mut card = Vec::new();
    iq.payload.write(&mut card, "");
    if card.len() > slice.env.limits.vcard_bytes_max {
        return slice.iq_error(
            &iq,
            &StanzaError::POLICY_VIOLATION.text("the vCard is too big"),
        );
    }
    let name = iq.account().to_owned();
    pep::begin(
        slice,
        &name,
        Box::new(move |slice, turn| {
            let turn = match turn {
                Ok(turn) => turn,
                Err(error) => return slice.iq_error(&iq, &error),
            };
            let mut card = iq.payload.clone();
            let mut ops = avatar::of_card(&turn.nodes, &mut card);
            ops.extend(vcard4::of_card(&turn.nodes, &card));
            let mut bytes = Vec::new();
            card.write(&mut bytes, "");
            let documents = vec![(KEY.to_owned(), bytes)];
            let change = pep::Change { ops, documents };
            pep::commit(slice, turn, change, move |slice, result| match result {
                Ok(()) => slice.iq_result(&iq, None),
                Err(error) => slice.iq_error(&iq, &error),
            });
        }),
    );
}

#[cfg(test)]
mod tests {
    use crate::xmpp::testing::World;

    const GET: &str = "<iq type='get' id='g'><vCard xmlns='vcard-temp'/></iq>";
    const SET: &str =
        "<iq type='set' id='s'><vCard xmlns='vcard-temp'><FN>Alice &amp; Co</FN></vCard></iq>";
    const CARD: &str = "<vCard xmlns='vcard-temp'><FN>Alice &amp; Co</FN></vCard>";

    #[test]
    fn a_card_is_written_by_its_owner_and_read_by_everybody() {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.add(&alice);
        w.add(&bob);
        let a = w.login(&alice, "a");
        let b = w.login(&bob, "b");
        w.send(a, GET);
        assert!(w.take(a).concat().contains("<item-not-found"));
        w.send(a, SET);
        w.expect(
            a,
            &[&format!(
                "<iq type='result' id='s' to='{alice}@localhost/a'/>"
            )],
        );
        w.send(a, GET);
        w.expect(
            a,
            &[&format!(
                "<iq type='result' id='g' to='{alice}@localhost/a'>{CARD}</iq>"
            )],
        );
        let to = format!("<iq to='{alice}@localhost' ");
        w.send(b, &GET.replace("<iq ", &to));
        w.expect(b, &[&format!("<iq type='result' id='g' from='{alice}@localhost' to='{bob}@localhost/b'>{CARD}</iq>")]);
        w.send(b, &SET.replace("<iq ", &to).replace("Alice", "Mallory"));
        assert!(w.take(b).concat().contains("<forbidden"));
        assert!(
            String::from_utf8_lossy(&w.tier.users[&alice].documents["vcard"]).contains("Alice")
        );
    }

    #[test]
    fn who_has_no_card_looks_like_nobody() {
        let mut w = World::new(1);
        w.add("alice");
        w.add("bob");
        let b = w.login("bob", "b");
        for name in ["alice", "nobody"] {
            w.send(
                b,
                &GET.replace("<iq ", &format!("<iq to='{name}@localhost' ")),
            );
            w.expect(b, &[&format!(
                "<iq type='error' id='g' from='{name}@localhost' to='bob@localhost/b'><vCard xmlns='vcard-temp'/>\
                 <error type='cancel'><service-unavailable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>"
            )]);
        }
    }

    #[test]
    fn a_card_that_is_too_big_or_cannot_be_stored_is_an_error() {
        let mut w = World::with(1, |limits| limits.vcard_bytes_max = 50);
        w.add("alice");
        let a = w.login("alice", "a");
        w.send(a, SET);
        assert!(w.take(a).concat().contains("<policy-violation"));
        w.tier.broken = true;
        w.send(a, &SET.replace("Alice &amp; Co", "A"));
        assert!(w.take(a).concat().contains("<resource-constraint"));
        w.send(a, GET);
        assert!(w.take(a).concat().contains("<resource-constraint"));
        assert!(w.tier.users["alice"].documents.is_empty());
    }

    #[test]
    fn a_vcard4_that_its_owner_has_closed_stays_as_it_is_when_a_card_is_set() {
        let mut w = World::new(1);
        w.add("alice");
        w.add("bob");
        let (a, b) = (w.login("alice", "a"), w.login("bob", "b"));
        let publish = "<iq type='set' id='p'><pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='urn:xmpp:vcard4'>\
            <item id='current'><vcard xmlns='urn:ietf:params:xml:ns:vcard-4.0'><fn><text>Secret</text></fn></vcard></item></publish>\
            <publish-options><x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE' type='hidden'>\
            <value>http://jabber.org/protocol/pubsub#publish-options</value></field><field var='pubsub#access_model'>\
            <value>whitelist</value></field></x></publish-options></pubsub></iq>";
        let get = |to: &str| {
            format!(
                "<iq type='get' id='i'{to}><pubsub xmlns='http://jabber.org/protocol/pubsub'><items node='urn:xmpp:vcard4'/></pubsub></iq>"
            )
        };
        w.send(a, publish);
        assert!(w.take(a).concat().contains("type='result'"));
        w.send(a, SET);
        assert!(w.take(a).concat().contains("type='result'"));
        w.send(a, &get(""));
        let own = w.take(a).concat();
        assert!(own.contains("Secret") && !own.contains("Alice"), "{own}");
        w.send(b, &get(" to='alice@localhost'"));
        assert!(w.take(b).concat().contains("type='error'"));
        w.send(a, GET);
        assert!(w.take(a).concat().contains("Alice &amp; Co"));
    }
}
