//! vcard-temp (XEP-0054): one document for each account, written by its user, readable by everybody.

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::slice::Op;
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
    slice.read(
        &name,
        KEY,
        Box::new(move |slice, result| {
            let card = match result {
                Ok(card) => card,
                Err(error) => {
                    tracing::warn!(%error, "a vCard could not be read");
                    return slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT);
                }
            };
            let card =
                card.and_then(|bytes| Element::parse(std::str::from_utf8(&bytes).ok()?).ok());
            match card {
                Some(card) => slice.iq_result(&iq, Some(card)),
                None if iq.own() => slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND),
                // XEP-0054 section 3.3: the same as where there is no such account
                None => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
            }
        }),
    );
}

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
    let op = Op::PutDocument {
        key: KEY.into(),
        value: Some(card.into()),
    };
    slice.write(
        &name,
        op,
        Box::new(move |slice, result| match result {
            Ok(()) => slice.iq_result(&iq, None),
            Err(error) => {
                tracing::warn!(%error, "a vCard could not be stored");
                slice.iq_error(&iq, &error.into());
            }
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
}
