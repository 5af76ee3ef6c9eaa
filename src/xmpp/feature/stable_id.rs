//! Unique and stable stanza ids (XEP-0359): a message that a user may keep gets `<stanza-id by='his bare JID'/>` from his
//! owner; ids that claim to be from him are taken out where a message enters. An id tells strangers nothing: it is a keyed
//! permutation of a counter.

use std::io::Write;

use super::{Feature, NONE};
use crate::store::change::Message;
use crate::store::tier::Pending;
use crate::xml::dom::Element;
use crate::xml::escape::escape_attr;
use crate::xml::view::View;
use crate::xmpp::jid::Jid;
use crate::xmpp::slice::{Env, Slice};

pub const NS: &str = "urn:xmpp:sid:0";

pub static FEATURE: Feature = Feature {
    name: "Unique and stable stanza ids",
    spec: "XEP-0359",
    version: "0.7.0",
    server: &[NS],
    account: &[NS],
    ..NONE
};

/// Does a stanza carry a stable id that somebody gave it?
pub fn present(view: &View<'_>) -> bool {
    view.children()
        .iter()
        .any(|c| c.name == "stanza-id" && &*c.ns == NS)
}

/// Takes out the ids that claim to be given by `by` (XEP-0359 section 3.1: an entity removes those that name itself).
pub fn strip(element: &mut Element, by: &str) {
    // whoever reads it normalises the address, so it is compared as one
    let same = |claimed: &str| Jid::parse(claimed).is_ok_and(|jid| jid.as_str() == by);
    element.remove_children(|c| c.is("stanza-id", NS) && c.get("by").is_some_and(same));
}

/// The stanza with the id that the recipient's account gives it. Give the buffer back by [`Slice::reuse`].
pub fn stamp(slice: &mut Slice, by: &str, stanza: &[u8], id: u64) -> Option<Vec<u8>> {
    let mut out = slice.buffer();
    write(by, stanza, permute(id, slice.env.id_key), &mut out).then_some(out)
}

/// A message as it waits for its recipient: with its stable id, if it stands in his archive.
pub fn stamped(env: &Env, by: &str, pending: Pending) -> (u64, Box<[u8]>) {
    let mut out = Vec::new();
    let stamped = pending.what & Message::ARCHIVE != 0
        && write(
            by,
            &pending.stanza,
            permute(pending.id, env.id_key),
            &mut out,
        );
    (
        pending.id,
        if stamped { out.into() } else { pending.stanza },
    )
}

fn write(by: &str, stanza: &[u8], id: u64, out: &mut Vec<u8>) -> bool {
    let Some(inner) = stanza.strip_suffix(b"</message>") else {
        return false;
    };
    out.reserve(stanza.len() + 96);
    out.extend_from_slice(inner);
    out.extend_from_slice(b"<stanza-id xmlns='urn:xmpp:sid:0' by='");
    escape_attr(by, out);
    write!(out, "' id='{id:016x}'/></message>").expect("writing to memory succeeds");
    true
}

/// An id as clients see it.
pub fn shown(id: u64, key: [u64; 2]) -> String {
    format!("{:016x}", permute(id, key))
}

/// The inverse of [`permute`].
pub fn unpermute(value: u64, key: [u64; 2]) -> u64 {
    let (mut left, mut right) = ((value >> 32) as u32, value as u32);
    for round in (0..8u64).rev() {
        let before = left;
        left = right ^ round_of(before, round, key);
        right = before;
    }
    (u64::from(left) << 32) | u64::from(right)
}

/// A keyed bijection of 64 bits: a balanced Feistel network of eight rounds over two halves.
pub fn permute(value: u64, key: [u64; 2]) -> u64 {
    let (mut left, mut right) = ((value >> 32) as u32, value as u32);
    for round in 0..8u64 {
        (left, right) = (right, left ^ round_of(right, round, key));
    }
    (u64::from(left) << 32) | u64::from(right)
}

fn round_of(half: u32, round: u64, key: [u64; 2]) -> u32 {
    let key = key[(round & 1) as usize].rotate_left(7 * round as u32);
    (mix(u64::from(half) ^ key ^ (round << 40)) >> 32) as u32
}

/// splitmix64's finalizer.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gives_an_id_in_the_name_of_the_recipients_account() {
        let mut w = crate::xmpp::testing::World::new(1);
        w.add("alice");
        w.add("bob");
        let a = w.online("alice", "a");
        let b = w.online("bob", "b");
        let forged: String = ["alice@localhost", "ALICE@localhost", "bob@localhost"]
            .iter()
            .map(|by| format!("<stanza-id xmlns='urn:xmpp:sid:0' by='{by}' id='forged'/>"))
            .collect();
        w.send(
            b,
            &format!("<message to='alice@localhost' type='chat'><body>x</body>{forged}</message>"),
        );
        w.expect(
            a,
            &[
                "<message from='bob@localhost/b' to='alice@localhost' type='chat'><body>x</body>\
            <stanza-id xmlns='urn:xmpp:sid:0' by='bob@localhost' id='forged'/>\
            <stanza-id xmlns='urn:xmpp:sid:0' by='alice@localhost' id='*'/></message>",
            ],
        );
        // nor where the server gives none
        w.send(
            b,
            &format!("<message to='alice@localhost' type='headline'>{forged}</message>"),
        );
        assert!(!w.take(a).concat().to_lowercase().contains("by='alice"));
    }

    #[test]
    fn ids_of_neighbours_are_distinct_and_unlike() {
        let key = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];
        let ids: std::collections::HashSet<u64> = (0..100_000).map(|i| permute(i, key)).collect();
        assert_eq!(ids.len(), 100_000);
        assert!((0..1000).all(|i| unpermute(permute(i, key), key) == i));
        let bits: u32 = (0..1000u64)
            .map(|i| (permute(i, key) ^ permute(i + 1, key)).count_ones())
            .sum();
        assert!((28_000..36_000).contains(&bits), "{bits}");
    }
}
