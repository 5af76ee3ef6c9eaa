//! Client state indication (XEP-0352): while a client is inactive, what may wait waits: presence (only the newest of each
//! full JID) and messages that say nothing (chat states). Anything else goes out at once, with what waited before it, so
//! that the order stays.

use super::{Feature, NONE, NonzaRoute};
use crate::xml::view::View;
use crate::xmpp::error::StreamError;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::session::{Session, SessionId};
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:xmpp:csi:0";

pub static FEATURE: Feature = Feature {
    name: "Client state indication",
    spec: "XEP-0352",
    version: "1.0.0",
    stream: Some(|_| format!("<csi xmlns='{NS}'/>")),
    nonza: &[
        NonzaRoute { name: "active", ns: NS, handle: active },
        NonzaRoute { name: "inactive", ns: NS, handle: inactive },
    ],
    ..NONE
};

/// Stanzas that may wait for one inactive client; then all go out.
const HELD_MAX: usize = 512;

#[derive(Debug, Default)]
pub struct Csi {
    pub inactive: bool,
    held: Vec<(Box<[u8]>, Meta)>,
}

/// Keeps the stanza back, if it may wait. `false`: the caller sends it; what waited was sent before.
pub fn hold(session: &mut Session, parts: &[&[u8]], meta: Meta) -> bool {
    let lazy = meta.has(Meta::LAZY) || matches!(meta.kind, Kind::Available | Kind::Unavailable);
    if !lazy || session.csi.held.len() >= HELD_MAX {
        release(session);
        return false;
    }
    let stanza: Box<[u8]> = parts.concat().into();
    if meta.kind.is_presence()
        && let Some(from) = from_of(&stanza)
    {
        // only the newest presence of a full JID is worth telling
        session.csi.held.retain(|(old, m)| !(m.kind.is_presence() && from_of(old) == Some(from)));
    }
    session.csi.held.push((stanza, meta));
    true
}

/// The client is active (again): what waited goes out.
pub fn activate(session: &mut Session) {
    session.csi.inactive = false;
    release(session);
}

fn release(session: &mut Session) {
    for (stanza, meta) in std::mem::take(&mut session.csi.held) {
        session.push(&[&stanza], meta);
    }
}

/// The value of `from` as it stands in the start tag of a stanza that the server wrote: behind all that the client wrote, whose
/// values may hold anything.
fn from_of(stanza: &[u8]) -> Option<&[u8]> {
    let end = memchr::memchr(b'>', stanza)?;
    let tag = &stanza[..end];
    let start = memchr::memmem::rfind(tag, b" from='")? + 7;
    let len = memchr::memchr(b'\'', &tag[start..])?;
    Some(&tag[start..start + len])
}

fn active(slice: &mut Slice, sid: SessionId, _: &View<'_>) -> Result<(), StreamError> {
    if let Some(session) = slice.sessions.get_mut(sid) {
        activate(session);
        slice.touched(sid);
    }
    Ok(())
}

fn inactive(slice: &mut Slice, sid: SessionId, _: &View<'_>) -> Result<(), StreamError> {
    if let Some(session) = slice.sessions.get_mut(sid) {
        session.csi.inactive = true;
    }
    Ok(())
}
