//! vcard-temp (XEP-0054): one document for each account, written by its user, readable by everybody.

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::store::tier::{Op, Query};
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
    iq: &[IqRoute { name: "vCard", ns: NS, target: Target::Account, handle }],
    ..NONE
};

/// Key of the document.
const KEY: &str = "vcard";

fn handle(slice: &mut Slice, iq: Iq) {
    if iq.set { set(slice, iq) } else { get(slice, iq) }
}

fn get(slice: &mut Slice, iq: Iq) {
    let name = iq.account().to_owned();
    let query = Query::Document { name: name.as_str().into(), key: KEY.into() };
    slice.read(
        &name,
        query,
        Box::new(move |slice, result| {
            let card = match result {
                Ok(card) => card,
                Err(error) => {
                    tracing::warn!(%error, "a vCard could not be read");
                    return slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR);
                }
            };
            let card = card.and_then(|bytes| Element::parse(std::str::from_utf8(&bytes).ok()?).ok());
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
        return slice.iq_error(&iq, &StanzaError::POLICY_VIOLATION.text("the vCard is too big"));
    }
    let name = iq.account().to_owned();
    let op = Op::PutDocument { name: name.as_str().into(), key: KEY.into(), value: Some(card.into()) };
    slice.write(
        &name,
        op,
        Box::new(move |slice, result| match result {
            Ok(()) => slice.iq_result(&iq, None),
            Err(error) => {
                tracing::warn!(%error, "a vCard could not be stored");
                slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR);
            }
        }),
    );
}
