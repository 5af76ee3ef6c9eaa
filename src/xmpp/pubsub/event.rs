//! What is told of a change (XEP-0060 sections 7.1.2, 7.2.2, 8.2, 8.4.2, 8.5.2), as bytes that stand alone.

use super::NS_EVENT;
use super::nodes::Item;
use crate::xmpp::message::attribute;

/// Something that has happened to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Published { item: Item, payload: bool },
    Retracted { ids: Vec<String> },
    Purged,
    Deleted,
    Configured,
}

impl Event {
    /// `<event/>` for one node.
    pub fn element(&self, node: &str) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        out.extend_from_slice(b"<event");
        attribute("xmlns", NS_EVENT, &mut out);
        out.push(b'>');
        let open = |name: &str, out: &mut Vec<u8>| {
            out.push(b'<');
            out.extend_from_slice(name.as_bytes());
            attribute("node", node, out);
        };
        match self {
            Event::Published { item, payload } => {
                open("items", &mut out);
                out.push(b'>');
                write_item(item, *payload, &mut out);
                out.extend_from_slice(b"</items>");
            }
            Event::Retracted { ids } => {
                open("items", &mut out);
                out.push(b'>');
                for id in ids {
                    out.extend_from_slice(b"<retract");
                    attribute("id", id, &mut out);
                    out.extend_from_slice(b"/>");
                }
                out.extend_from_slice(b"</items>");
            }
            Event::Purged | Event::Deleted | Event::Configured => {
                let name = match self {
                    Event::Purged => "purge",
                    Event::Deleted => "delete",
                    _ => "configuration",
                };
                open(name, &mut out);
                out.extend_from_slice(b"/>");
            }
        }
        out.extend_from_slice(b"</event>");
        out
    }
}

/// `<item id='…'>payload</item>`, wherever the namespace of items is the default one.
pub fn write_item(item: &Item, payload: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(b"<item");
    attribute("id", &item.id, out);
    if payload && !item.payload.is_empty() {
        out.push(b'>');
        out.extend_from_slice(&item.payload);
        out.extend_from_slice(b"</item>");
    } else {
        out.extend_from_slice(b"/>");
    }
}

/// A notification's start tag without `to`, which is spliced in behind [`START`], and all the rest of it.
pub fn message(from: &str, inner: &[u8]) -> Vec<u8> {
    let mut out = START.to_vec();
    attribute("type", "headline", &mut out);
    attribute("id", &crate::xmpp::random_id(), &mut out);
    attribute("from", from, &mut out);
    out.push(b'>');
    out.extend_from_slice(inner);
    out.extend_from_slice(b"</message>");
    out
}

pub const START: &[u8] = b"<message";
