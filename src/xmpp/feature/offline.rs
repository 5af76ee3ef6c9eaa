//! Offline messages (XEP-0160): a message for a user with no resource to take it waits in his queue, and is delivered, stamped
//! with its delay (XEP-0203), to the next resource that becomes available with a non-negative priority.
//!
//! One state per user and message: it waits here and nobody holds it, or sessions hold it ([`hold`]), or a client has taken
//! it ([`Slice::taken`]). When the last session that holds it ends without having taken it, it waits here again
//! ([`come_back`]). The journal and SQL know it as pending until it is taken.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::{Feature, NONE};
use crate::store::change::Id;
use crate::xmpp::meta::Meta;
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::Slice;

pub static FEATURE: Feature = Feature {
    name: "Offline messages, with delayed delivery",
    spec: "XEP-0160, XEP-0203",
    version: "1.0.1, 2.0",
    server: &["msgoffline", "urn:xmpp:delay"],
    available: Some(deliver_all),
    ..NONE
};

/// Messages that nobody holds, by id: in the order in which they were accepted. With stable ids.
#[derive(Default)]
pub struct Offline {
    messages: BTreeMap<u64, (Box<[u8]>, Meta)>,
    bytes: usize,
}

impl Offline {
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub fn has(&self, id: u64) -> bool {
        self.messages.contains_key(&id)
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The message that was accepted last of those that say something, or of all, if none does.
    pub fn newest(&self) -> Option<(&[u8], Meta)> {
        let mut from_newest = self.messages.values().rev();
        let said = from_newest.find(|(_, meta)| meta.is_said());
        let (stanza, meta) = said.or_else(|| self.messages.values().next_back())?;
        Some((stanza, *meta))
    }

    pub fn put(&mut self, id: u64, stanza: Box<[u8]>, meta: Meta) {
        self.bytes += stanza.len();
        if let Some((old, _)) = self.messages.insert(id, (stanza, meta)) {
            self.bytes -= old.len();
        }
    }

    pub fn take(&mut self, id: u64) -> Option<(Box<[u8]>, Meta)> {
        let taken = self.messages.remove(&id)?;
        self.bytes -= taken.0.len();
        Some(taken)
    }
}

/// Has the user no room for one more (XEP-0160 section 3)? Asked before a message is accepted, never after.
pub fn is_full(slice: &Slice, name: &str, stanza: &[u8]) -> bool {
    let limits = &slice.env.limits;
    slice.user(name).is_some_and(|user| {
        user.offline.len() >= limits.offline_messages_max
            || user.offline.bytes() + stanza.len() > limits.offline_bytes_max
    })
}

/// A message waits for a resource.
pub fn keep(slice: &mut Slice, name: &str, id: u64, stanza: &[u8], meta: Meta) {
    if let Some(user) = slice.user_mut(name) {
        user.offline.put(id, stanza.into(), meta);
        slice.resize(name);
    }
}

/// So many sessions hold the message.
pub fn hold(slice: &mut Slice, name: &str, id: u64, sessions: usize) {
    if let Some(user) = slice.user_mut(name) {
        let at = user.held.partition_point(|(held, _)| *held < id);
        user.held.insert(at, (id, sessions as u16));
    }
}

/// A session that held the message has ended without having taken it.
pub fn come_back(slice: &mut Slice, name: &str, id: u64, stanza: Box<[u8]>, meta: Meta) {
    let Some(user) = slice.user_mut(name) else {
        return;
    };
    // not held: another session has taken it
    let Ok(at) = user.held.binary_search_by_key(&id, |(held, _)| *held) else {
        return;
    };
    user.held[at].1 -= 1;
    if user.held[at].1 == 0 {
        user.held.remove(at);
        user.offline.put(id, stanza, meta);
        slice.resize(name);
    }
}

/// The stanza with `<delay/>` (XEP-0203) as its last child, unless this server has stamped it before.
pub fn delayed(stanza: &[u8], domain: &str, unix: u64) -> Vec<u8> {
    let mut delay = b"<delay xmlns='urn:xmpp:delay' from='".to_vec();
    crate::xml::escape::escape_attr(domain, &mut delay);
    delay.extend_from_slice(b"' stamp='");
    // behind the stable id stands only what this server wrote; a client's own claim stands before it
    let id = memchr::memmem::rfind(stanza, b"<stanza-id xmlns='urn:xmpp:sid:0' by='");
    let stamped = memchr::memmem::rfind(stanza, &delay) > id;
    let Some(inner) = stanza.strip_suffix(b"</message>").filter(|_| !stamped) else {
        return stanza.to_vec();
    };
    let mut out = Vec::with_capacity(stanza.len() + 96);
    out.extend_from_slice(inner);
    out.extend_from_slice(&delay);
    out.extend_from_slice(super::time::stamp(unix).as_bytes());
    out.extend_from_slice(b"'/></message>");
    out
}

/// A resource became available: it gets all that waits.
fn deliver_all(slice: &mut Slice, sid: SessionId) {
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    if !session.takes_bare() {
        return;
    }
    let name: Rc<str> = session.user.clone();
    let Some(user) = slice.user_mut(&name) else {
        return;
    };
    if user.offline.is_empty() {
        return;
    }
    let waiting = std::mem::take(&mut user.offline);
    slice.resize(&name);
    let burst = (waiting.bytes, waiting.len());
    let domain = slice.env.domain.clone();
    for (id, (stanza, meta)) in waiting.messages {
        hold(slice, &name, id, 1);
        let stanza = delayed(&stanza, &domain, Id(id).unix_ms() / 1000);
        slice.hand(sid, &[&stanza], meta, id);
    }
    slice.allow(sid, burst);
}

/// Messages have come back: a session that is there gets them.
pub fn deliver_again(slice: &mut Slice, name: &str) {
    if slice.user(name).is_none_or(|user| user.offline.is_empty()) {
        return;
    }
    let session = slice
        .sessions_of(name)
        .into_iter()
        .find(|sid| slice.sessions.get(*sid).is_some_and(|s| s.takes_bare()));
    if let Some(sid) = session {
        deliver_all(slice, sid);
    }
}
