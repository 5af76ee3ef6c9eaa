//! Private storage (XEP-0049): elements that a user's clients keep on the server, each under its name and namespace, for
//! nobody else.
//!
//! All elements of a user are one document, so that one limit bounds them. A change reads it, puts its elements in and
//! writes it; changes of one user therefore run one after the other, in [`Changes`]. Bookmarks of rooms are not kept here: what is
//! written or asked of them are the bookmarks of [`super::bookmarks`].

use std::collections::VecDeque;

use fnv::FnvHashMap;

use super::{Feature, Iq, IqRoute, NONE, Target, bookmarks};
use crate::store::tier::ReadError;
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::slice::Op;
use crate::xmpp::slice::Slice;

pub const NS: &str = "jabber:iq:private";

pub static FEATURE: Feature = Feature {
    name: "Private XML storage",
    spec: "XEP-0049",
    version: "1.2",
    server: &[NS],
    account: &[NS],
    iq: &[IqRoute {
        name: "query",
        ns: NS,
        target: Target::Account,
        handle,
    }],
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
        _ if iq.payload.elements().any(|e| e.ns.is_empty() || e.ns == NS) => {
            Some(StanzaError::NOT_ACCEPTABLE)
        }
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
        if wanted.is("storage", bookmarks::OLD_NODE) {
            return get_bookmarks(slice, iq, stored);
        }
        let found = stored
            .elements()
            .find(|e| e.is(&wanted.name, &wanted.ns))
            .unwrap_or(wanted)
            .clone();
        slice.iq_result(&iq, Some(Element::new("query", NS).child(found)));
    });
}

/// The bookmarks as an old list, with what else was stored in one.
fn get_bookmarks(slice: &mut Slice, iq: Iq, stored: Element) {
    let name = iq.account().to_owned();
    bookmarks::items(slice, &name, false, move |slice, found| {
        let list = stored.find("storage", bookmarks::OLD_NODE).cloned();
        let list = list.unwrap_or_else(|| Element::new("storage", bookmarks::OLD_NODE));
        let list = match found {
            Ok(items) => bookmarks::old_list(&items)
                .elements()
                .fold(bookmarks::without_rooms(&list), |list, room| {
                    list.child(room.clone())
                }),
            Err(error) if error == StanzaError::ITEM_NOT_FOUND => list,
            Err(error) => return slice.iq_error(&iq, &error),
        };
        slice.iq_result(&iq, Some(Element::new("query", NS).child(list)));
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
        let mut rooms = None;
        for element in iq.payload.elements() {
            stored.remove_children(|old| old.is(&element.name, &element.ns));
            if element.is("storage", bookmarks::OLD_NODE) {
                rooms = Some(bookmarks::of_old_list(element));
                stored = stored.child(bookmarks::without_rooms(element));
            } else {
                stored = stored.child(element.clone());
            }
        }
        let rooms = match rooms.transpose() {
            Ok(rooms) => rooms,
            Err(error) => {
                slice.iq_error(&iq, &error);
                return next(slice, &name);
            }
        };
        let bytes = stored.to_xml("").into_bytes();
        if bytes.len() > slice.env.limits.private_bytes_max {
            slice.iq_error(
                &iq,
                &StanzaError::POLICY_VIOLATION.text("the private storage is full"),
            );
            return next(slice, &name);
        }
        if let Some(rooms) = rooms {
            let documents = vec![(KEY.to_owned(), bytes)];
            return bookmarks::replace(
                slice,
                &name.clone(),
                rooms,
                documents,
                move |slice, result| {
                    match result {
                        Ok(()) => slice.iq_result(&iq, None),
                        Err(error) => slice.iq_error(&iq, &error),
                    }
                    next(slice, &name);
                },
            );
        }
        let op = Op::PutDocument {
            key: KEY.into(),
            value: Some(bytes.into()),
        };
        slice.write(
            &name.clone(),
            op,
            Box::new(move |slice, result| {
                match result {
                    Ok(()) => slice.iq_result(&iq, None),
                    Err(error) => {
                        tracing::warn!(%error, "private data could not be stored");
                        slice.iq_error(&iq, &error.into());
                    }
                }
                next(slice, &name);
            }),
        );
    });
}

/// The change at work is over: the next one.
fn next(slice: &mut Slice, name: &str) {
    let Some(waiting) = slice.private.0.get_mut(name) else {
        return;
    };
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
    read_document(slice, &name.clone(), move |slice, result| match result {
        Ok(stored) => then(slice, iq, stored),
        Err(error) => {
            tracing::warn!(user = name, error, "private data could not be read");
            slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT);
            if iq.set {
                next(slice, &name);
            }
        }
    });
}

/// `<query/>` with all that is stored; of bookmarks only what [`super::bookmarks`] has not taken over.
pub fn read_document(
    slice: &mut Slice,
    name: &str,
    then: impl FnOnce(&mut Slice, Result<Element, String>) + 'static,
) {
    let read = Box::new(move |slice: &mut Slice, result| then(slice, document(result)));
    slice.read(name, KEY, read);
}

fn document(read: Result<Option<Box<[u8]>>, ReadError>) -> Result<Element, String> {
    let Some(bytes) = read.map_err(|error| error.to_string())? else {
        return Ok(Element::new("query", NS));
    };
    let text = std::str::from_utf8(&bytes).map_err(|error| error.to_string())?;
    Element::parse(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use crate::xmpp::testing::{Client, World};

    fn iq(typ: &str, inner: &str) -> String {
        format!("<iq type='{typ}' id='p'><query xmlns='jabber:iq:private'>{inner}</query></iq>")
    }

    fn world() -> (World, Client) {
        let mut w = World::with(1, |limits| limits.private_bytes_max = 200);
        w.add("alice");
        let a = w.login("alice", "a");
        (w, a)
    }

    const DONE: &str = "<iq type='result' id='p' to='alice@localhost/a'/>";

    #[track_caller]
    fn holds(w: &mut World, a: Client, asked: &str, found: &str) {
        w.send(a, &iq("get", asked));
        w.expect(a, &[&format!(
            "<iq type='result' id='p' to='alice@localhost/a'><query xmlns='jabber:iq:private'>{found}</query></iq>"
        )]);
    }

    #[test]
    fn elements_are_kept_by_name_and_namespace() {
        let (mut w, a) = world();
        holds(&mut w, a, "<s xmlns='urn:a'/>", "<s xmlns='urn:a'/>");
        w.send(
            a,
            &iq(
                "set",
                "<s xmlns='urn:a'>1</s><t xmlns='urn:a'>2</t><s xmlns='urn:b'>3</s>",
            ),
        );
        w.expect(a, &[DONE]);
        w.send(a, &iq("set", "<s xmlns='urn:a'><x/>new</s>"));
        w.expect(a, &[DONE]);
        holds(
            &mut w,
            a,
            "<s xmlns='urn:a'/>",
            "<s xmlns='urn:a'><x/>new</s>",
        );
        holds(&mut w, a, "<t xmlns='urn:a'/>", "<t xmlns='urn:a'>2</t>");
        holds(&mut w, a, "<s xmlns='urn:b'/>", "<s xmlns='urn:b'>3</s>");
    }

    #[test]
    fn changes_that_overtake_one_another_are_all_kept() {
        let (mut w, a) = world();
        w.tier.held = true;
        for name in ["a", "b", "c"] {
            w.send(a, &iq("set", &format!("<{name} xmlns='urn:a'>1</{name}>")));
        }
        w.expect(a, &[]);
        w.release();
        w.expect(a, &[DONE, DONE, DONE]);
        for name in ["a", "b", "c"] {
            holds(
                &mut w,
                a,
                &format!("<{name} xmlns='urn:a'/>"),
                &format!("<{name} xmlns='urn:a'>1</{name}>"),
            );
        }
        assert!(w.slices[0].private.0.is_empty());
    }

    #[test]
    fn changes_that_wait_have_a_limit() {
        let (mut w, a) = world();
        w.tier.held = true;
        for _ in 0..super::WAITING_MAX + 2 {
            w.send(a, &iq("set", "<s xmlns='urn:a'/>"));
        }
        let got = w.take(a);
        assert!(
            got.len() == 1 && got[0].contains("<resource-constraint"),
            "{got:?}"
        );
        w.release();
        assert_eq!(w.take(a).len(), super::WAITING_MAX + 1);
    }

    #[test]
    fn all_elements_together_have_a_limit() {
        let (mut w, a) = world();
        let long = "x".repeat(100);
        w.send(a, &iq("set", &format!("<s xmlns='urn:a'>{long}</s>")));
        w.expect(a, &[DONE]);
        w.send(a, &iq("set", &format!("<t xmlns='urn:a'>{long}</t>")));
        assert!(w.take(a).concat().contains("<policy-violation"));
        // the next change goes on
        w.send(a, &iq("set", "<s xmlns='urn:a'/>"));
        w.expect(a, &[DONE]);
    }

    #[test]
    fn mistakes_are_answered() {
        let (mut w, a) = world();
        w.add("bob");
        let b = w.login("bob", "b");
        for (request, condition) in [
            (iq("get", ""), "bad-request"),
            (iq("set", ""), "not-acceptable"),
            (
                iq("get", "<s xmlns='urn:a'/><s xmlns='urn:b'/>"),
                "bad-request",
            ),
            (iq("set", "<s/>"), "not-acceptable"),
        ] {
            w.send(a, &request);
            let got = w.take(a).concat();
            assert!(got.contains(&format!("<{condition} ")), "{request}: {got}");
        }
        for typ in ["get", "set"] {
            w.send(
                b,
                &iq(typ, "<s xmlns='urn:a'/>").replace("<iq ", "<iq to='alice@localhost' "),
            );
            assert!(w.take(b).concat().contains("<service-unavailable"));
        }
    }

    #[test]
    fn what_cannot_be_read_or_stored_is_an_error_and_blocks_nothing() {
        let (mut w, a) = world();
        w.tier.broken = true;
        for typ in ["get", "set", "set"] {
            w.send(a, &iq(typ, "<s xmlns='urn:a'>1</s>"));
            assert!(w.take(a).concat().contains("<resource-constraint"));
        }
        w.tier.broken = false;
        w.send(a, &iq("set", "<s xmlns='urn:a'>1</s>"));
        w.expect(a, &[DONE]);
    }
}
