//! Private storage (XEP-0049): elements that a user's clients keep on the server, each under its name and namespace, for
//! nobody else.
//!
//! All elements of a user are one document, so that one limit bounds them. A change reads it, puts its elements in and
//! writes it; changes of one user therefore run one after the other, in [`Changes`].

use std::collections::VecDeque;

use fnv::FnvHashMap;

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::store::tier::{Op, Query, ReadError};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::slice::Slice;

pub const NS: &str = "jabber:iq:private";

pub static FEATURE: Feature = Feature {
    name: "Private XML storage",
    spec: "XEP-0049",
    version: "1.2",
    server: &[NS],
    account: &[NS],
    iq: &[IqRoute { name: "query", ns: NS, target: Target::Account, handle }],
    ..NONE
};

/// Key of the document.
const KEY: &str = "private";

/// Changes of one user that may wait for the one at work.
const WAITING_MAX: usize = 16;

/// Users with a change at work, and what waits behind it, oldest first.
#[derive(Default)]
pub struct Changes(FnvHashMap<Box<str>, VecDeque<Iq>>);

fn handle(slice: &mut Slice, iq: Iq) {
    let error = match iq.payload.elements().count() {
        // both errors are allowed (section 2.3); this one does not tell whether there is such an account
        _ if !iq.own() => Some(StanzaError::SERVICE_UNAVAILABLE),
        0 if iq.set => Some(StanzaError::NOT_ACCEPTABLE),
        0 => Some(StanzaError::BAD_REQUEST),
        2.. if !iq.set => Some(StanzaError::BAD_REQUEST),
        _ if iq.payload.elements().any(|e| e.ns.is_empty() || e.ns == NS) => Some(StanzaError::NOT_ACCEPTABLE),
        _ => None,
    };
    match error {
        Some(error) => slice.iq_error(&iq, &error),
        None if iq.set => set(slice, iq),
        None => get(slice, iq),
    }
}

fn get(slice: &mut Slice, iq: Iq) {
    read(slice, iq, |slice, iq, stored| {
        let wanted = iq.payload.elements().next().expect("was checked");
        let found = stored.elements().find(|e| e.is(&wanted.name, &wanted.ns)).unwrap_or(wanted).clone();
        slice.iq_result(&iq, Some(Element::new("query", NS).child(found)));
    });
}

fn set(slice: &mut Slice, iq: Iq) {
    match slice.private.0.get_mut(iq.account()) {
        None => {
            slice.private.0.insert(iq.account().into(), VecDeque::new());
            work(slice, iq);
        }
        Some(waiting) if waiting.len() < WAITING_MAX => waiting.push_back(iq),
        Some(_) => slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT),
    }
}

fn work(slice: &mut Slice, iq: Iq) {
    let name = iq.account().to_owned();
    read(slice, iq, move |slice, iq, mut stored| {
        for element in iq.payload.elements() {
            stored.remove_children(|old| old.is(&element.name, &element.ns));
            stored = stored.child(element.clone());
        }
        let bytes = stored.to_xml("").into_bytes();
        if bytes.len() > slice.env.limits.private_bytes_max {
            slice.iq_error(&iq, &StanzaError::POLICY_VIOLATION.text("the private storage is full"));
            return next(slice, &name);
        }
        let op = Op::PutDocument { name: name.as_str().into(), key: KEY.into(), value: Some(bytes.into()) };
        slice.write(
            &name.clone(),
            op,
            Box::new(move |slice, result| {
                match result {
                    Ok(()) => slice.iq_result(&iq, None),
                    Err(error) => {
                        tracing::warn!(%error, "private data could not be stored");
                        slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR);
                    }
                }
                next(slice, &name);
            }),
        );
    });
}

/// The change at work is over: the next one.
fn next(slice: &mut Slice, name: &str) {
    let Some(waiting) = slice.private.0.get_mut(name) else { return };
    match waiting.pop_front() {
        Some(iq) => work(slice, iq),
        None => {
            slice.private.0.remove(name);
        }
    }
}

/// Reads the user's document; `then` gets `<query/>` with all elements. A failure is answered here.
fn read(slice: &mut Slice, iq: Iq, then: impl FnOnce(&mut Slice, Iq, Element) + 'static) {
    let name = iq.account().to_owned();
    let query = Query::Document { name: name.as_str().into(), key: KEY.into() };
    slice.read(
        &name.clone(),
        query,
        Box::new(move |slice, result| match document(result) {
            Ok(stored) => then(slice, iq, stored),
            Err(error) => {
                tracing::warn!(user = name, error, "private data could not be read");
                slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR);
                if iq.set {
                    next(slice, &name);
                }
            }
        }),
    );
}

fn document(read: Result<Option<Box<[u8]>>, ReadError>) -> Result<Element, String> {
    let Some(bytes) = read.map_err(|error| error.to_string())? else { return Ok(Element::new("query", NS)) };
    let text = std::str::from_utf8(&bytes).map_err(|error| error.to_string())?;
    Element::parse(text).map_err(|error| error.to_string())
}
