//! The protocol, without sockets and clocks: streams, SASL, binding, sessions, routing, and one file per feature.
//!
//! Flow: [`negotiation`] carries a connection from its first byte to a bound session; from then on [`slice`] takes each
//! element of it and returns effects (output per session, batches to other shards, requests to the tiers).

pub mod accept;
pub mod batch;
pub mod bind;
pub mod component;
pub mod error;
pub mod fast;
pub mod feature;
pub mod form;
pub mod groups;
pub mod iq;
pub mod jid;
pub mod ledger;
pub mod message;
pub mod meta;
pub mod negotiation;
pub mod pace;
#[cfg(test)]
mod promise;
pub mod pubsub;
pub mod regroup;
pub mod room;
pub mod sasl;
pub mod sasl2;
pub mod session;
#[cfg(test)]
mod simulation;
pub mod slice;
pub mod storing;
#[cfg(test)]
pub mod testing;
pub mod warmth;

pub const NS_CLIENT: &str = "jabber:client";
pub const NS_STREAM: &str = "http://etherx.jabber.org/streams";

use crate::random::random;

/// Appends all parts.
fn push(out: &mut String, parts: &[&str]) {
    parts.iter().for_each(|part| out.push_str(part));
}

/// 128 random bits in hexadecimal: resources, stream ids, resumption ids, ids of the server's own requests.
pub fn random_id() -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut bytes = [0; 16];
    random(&mut bytes);
    let mut id = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        id.push(DIGITS[usize::from(byte >> 4)].into());
        id.push(DIGITS[usize::from(byte & 15)].into());
    }
    id
}

/// The tree of a stanza that stands in a client's stream (default namespace `jabber:client`) and was within the limits when
/// it entered.
pub fn parse_stanza(stanza: &[u8]) -> Option<crate::xml::Element> {
    crate::xml::Element::parse_in(stanza, &crate::xml::StreamNs::client(), &ENTERED).ok()
}

/// For what was within the limits of a stream when it entered.
pub const ENTERED: crate::xml::Limits = crate::xml::Limits {
    stanza_bytes_max: usize::MAX,
    header_bytes_max: 0,
    depth_max: u16::MAX,
    attributes_max: u16::MAX,
};
