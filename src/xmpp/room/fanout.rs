//! One stanza for many occupants: a mesh item for each shard with the bytes and the list of recipients; at the recipients' shard
//! only `to` is written for each. Promise: nobody who has blocked the room gets it, and it does not overtake what waits there for
//! the journal. What goes to many is decided for all of them at once, so they get everything in one order, but handed to their
//! connections as turns have time ([`Slice::send_fanned`]), so that no message between two people waits for hundreds of others.

use smallvec::SmallVec;

use crate::xmpp::batch::Item;
use crate::xmpp::feature::archive;
use crate::xmpp::jid::Jid;
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::pace::{self, Shared};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::{Env, Slice};

/// Full JIDs, by the shard that owns them; those of components stand under [`FOREIGN`].
#[derive(Clone, Debug, Default)]
pub struct Audience(SmallVec<[(u16, Vec<u8>); 4]>);

/// So many sessions of a shard are told at once like one; what goes to more waits for turns with time. Few in tests, whose worlds
/// are small.
const FEW: usize = if cfg!(test) { 2 } else { 16 };

/// No shard: addresses of components, whose connections may be anywhere.
pub(super) const FOREIGN: u16 = u16::MAX;

impl Audience {
    pub fn of<'a>(env: &Env, jids: impl IntoIterator<Item = &'a str>) -> Audience {
        let mut audience = Audience::default();
        for jid in jids {
            audience.add(env, jid);
        }
        audience
    }

    #[cfg(test)]
    pub fn shards(&self) -> Vec<u16> {
        self.0.iter().map(|(shard, _)| *shard).collect()
    }

    pub fn add(&mut self, env: &Env, jid: &str) {
        // a resource may have an at sign, too
        let bare = jid.split('/').next().unwrap_or(jid);
        let (name, domain) = bare.split_once('@').unwrap_or(("", bare));
        let shard = match *domain == *env.domain && !name.is_empty() {
            true => env.owner(name),
            false => FOREIGN,
        };
        let at = match self.0.iter().position(|(one, _)| *one == shard) {
            Some(at) => at,
            None => {
                self.0.push((shard, Vec::new()));
                self.0.len() - 1
            }
        };
        let list = &mut self.0[at].1;
        list.extend_from_slice(jid.as_bytes());
        list.push(b'\n');
    }
}

/// Sends a stanza that has no `to`.
pub fn send(slice: &mut Slice, audience: &Audience, stanza: &[u8], meta: Meta) {
    send_all(slice, audience, &[stanza], meta);
}

/// The same for several, one after the other.
pub fn send_all<S: AsRef<[u8]>>(slice: &mut Slice, audience: &Audience, stanzas: &[S], meta: Meta) {
    let meta = meta.with(Meta::ROOM | Meta::SERVER);
    for (shard, list) in &audience.0 {
        if *shard == FOREIGN {
            let list = std::str::from_utf8(list).expect("addresses are text");
            for stanza in stanzas {
                send_abroad(slice, list, stanza.as_ref(), meta);
            }
            continue;
        }
        if *shard == slice.env.shard {
            let list = std::str::from_utf8(list).expect("addresses are text");
            for stanza in stanzas {
                deliver(slice, list, stanza.as_ref(), meta);
            }
            continue;
        }
        let batch = &mut slice.fx.mesh[usize::from(*shard)];
        let to = batch.put(list);
        for stanza in stanzas {
            let stanza = batch.put(stanza.as_ref());
            batch.items.push(Item::Room { stanza, meta, to });
        }
    }
}

/// A stanza for occupants who are a component's. What it does not take comes back as an error, and they are out. If nobody serves
/// their domain, all of them are, as soon as the room has done what it is doing ([`super::Rooms::deserted`]).
fn send_abroad(slice: &mut Slice, to: &str, stanza: &[u8], meta: Meta) {
    if meta.has(Meta::OUT) && meta.has(Meta::COPY) {
        // a word to the list of rooms that sessions have
        return;
    }
    let Some(from) = sender(stanza) else { return };
    let plain = Meta {
        flags: meta.flags & !(Meta::OUT | Meta::IN | Meta::LAZY),
        ..meta
    };
    for jid in to.lines() {
        let Ok(to) = Jid::parse(jid) else { continue };
        if !slice.components.is_served(to.domain()) {
            slice.rooms.desert(from.bare(), to.domain());
            continue;
        }
        slice.counters.room_deliveries += 1;
        let mut attr: SmallVec<[u8; 128]> = SmallVec::new();
        let (head, rest) = spliced(jid, stanza, meta.kind, &mut attr);
        let whole = [head, &attr, rest].concat();
        slice.route(&to, from.as_str(), &whole, plain, None);
    }
}

/// A stanza for these full JIDs, each ended by a line feed, as far as they are sessions of this slice.
pub fn deliver(slice: &mut Slice, to: &str, stanza: &[u8], meta: Meta) {
    let mut shared = None;
    let mut from = None;
    let many = to.lines().nth(FEW).is_some();
    for jid in to.lines() {
        deliver_one(slice, jid, stanza, meta, many, &mut shared, &mut from);
    }
}

fn deliver_one(
    slice: &mut Slice,
    jid: &str,
    stanza: &[u8],
    meta: Meta,
    many: bool,
    shared: &mut Option<Shared>,
    from: &mut Option<Jid<'static>>,
) {
    let Some((name, resource)) = jid
        .split_once('@')
        .and_then(|(name, rest)| Some((name, rest.split_once('/')?.1)))
    else {
        return;
    };
    let Some(user) = slice.user(name) else {
        return gone(slice, jid, stanza, meta);
    };
    let blocks = !user.record.get().blocked.is_empty();
    let sid = user.sessions.iter().copied().find(|sid| {
        let session = slice.sessions.get(*sid);
        session.is_some_and(|session| session.resource() == resource)
    });
    let Some(sid) = sid else {
        return gone(slice, jid, stanza, meta);
    };
    if blocks || meta.has(Meta::OUT) || meta.has(Meta::IN) {
        let sender = match from {
            Some(from) => from,
            None => match sender(stanza) {
                Some(sender) => from.insert(sender),
                None => return,
            },
        };
        if meta.has(Meta::OUT)
            && let Some(session) = slice.sessions.get_mut(sid)
        {
            session.rooms.retain(|room| **room != *sender.bare());
        }
        if meta.has(Meta::IN)
            && let Some(session) = slice.sessions.get_mut(sid)
            && !session.rooms.iter().any(|room| **room == *sender.bare())
        {
            // a word that he was out of it came behind his coming in again
            session.rooms.push(sender.bare().into());
        }
        if blocks && slice.hooks.admission(slice, name, sender, meta).is_err() {
            return;
        }
    }
    if meta.has(Meta::OUT) && meta.has(Meta::COPY) {
        // nothing but the word that it is out
        return;
    }
    slice.counters.room_deliveries += 1;
    if meta.has(Meta::COPY) && !archive::is_behind(slice, sid) {
        // a page of the archive that he has asked for
        slice.allow(sid, (stanza.len() + jid.len(), 1));
    }
    if slice.ledger.holds(name) {
        return behind(slice, name, jid, stanza, meta);
    }
    if meta.has(Meta::LAZY) && meta.kind.is_presence() {
        return slice.pace(sid, stanza, meta, shared);
    }
    if meta.kind.is_message() {
        slice.fx.delivered(meta);
    }
    let mut attr: SmallVec<[u8; 128]> = SmallVec::new();
    let (head, rest) = spliced(jid, stanza, meta.kind, &mut attr);
    match many {
        true => slice.send_fanned(sid, &[head, &attr, rest], meta),
        false => slice.send(sid, &[head, &attr, rest], meta),
    }
}

/// A message for the recipient waits for the journal: this goes behind it.
fn behind(slice: &mut Slice, name: &str, jid: &str, stanza: &[u8], meta: Meta) {
    let Some(user) = slice.user(name).map(|user| user.name.clone()) else {
        return;
    };
    let (Ok(to), Some(from)) = (Jid::parse(jid), sender(stanza)) else {
        return;
    };
    let mut attr: SmallVec<[u8; 128]> = SmallVec::new();
    let (head, rest) = spliced(jid, stanza, meta.kind, &mut attr);
    let whole = [head, &attr, rest].concat();
    let _ = slice.deliver_behind(&user, &to, from.as_str(), &whole, meta, None);
}

/// Presence for one session, past what waits for it ([`pace`]).
pub fn write_to(slice: &mut Slice, sid: SessionId, stanza: &[u8], meta: Meta) {
    let Some(jid) = slice.sessions.get(sid).map(|s| s.jid.clone()) else {
        return;
    };
    let mut attr: SmallVec<[u8; 128]> = SmallVec::new();
    let (head, rest) = spliced(&jid, stanza, meta.kind, &mut attr);
    slice.give(sid, &[head, &attr, rest], meta, 0);
}

/// The beginning of the stanza, ` to='…'`, and the rest.
fn spliced<'s>(
    jid: &str,
    stanza: &'s [u8],
    kind: Kind,
    attr: &mut SmallVec<[u8; 128]>,
) -> (&'s [u8], &'s [u8]) {
    let needs_escape = |b: u8| matches!(b, b'&' | b'<' | b'>' | b'\'' | b'"');
    attr.extend_from_slice(b" to='");
    if jid.bytes().any(needs_escape) {
        let mut escaped = Vec::new();
        attribute("to", jid, &mut escaped);
        attr.clear();
        attr.extend_from_slice(&escaped);
    } else {
        attr.extend_from_slice(jid.as_bytes());
        attr.push(b'\'');
    }
    stanza.split_at(1 + kind.stanza().len())
}

/// There is no such session any more: the room learns it, so that nobody stays in it as a ghost.
fn gone(slice: &mut Slice, jid: &str, stanza: &[u8], meta: Meta) {
    if meta.has(Meta::OUT) || !(meta.kind.is_presence() || meta.kind == Kind::GroupChat) {
        return;
    }
    let Some(sender) = sender(stanza).filter(|sender| slice.env.is_room(sender)) else {
        return;
    };
    let room = sender.to_bare();
    let mut leaves = b"<presence type='unavailable'".to_vec();
    attribute("from", jid, &mut leaves);
    attribute("to", room.as_str(), &mut leaves);
    leaves.extend_from_slice(b"/>");
    slice.route(&room, jid, &leaves, Meta::new(Kind::Unavailable), None);
}

fn sender(stanza: &[u8]) -> Option<Jid<'static>> {
    let from = std::str::from_utf8(pace::from_of(stanza)?).ok()?;
    let from = crate::xml::escape::unescape_attr(from).ok()?;
    Some(Jid::parse(&from).ok()?.into_owned())
}

/// The shards of these sessions take the room off their lists: they are not in it.
pub fn forget(slice: &mut Slice, audience: &Audience, room: &str) {
    let mut stanza = b"<presence".to_vec();
    attribute("from", room, &mut stanza);
    stanza.extend_from_slice(b"/>");
    let meta = Meta::new(Kind::PresenceError).with(Meta::OUT | Meta::COPY);
    send(slice, audience, &stanza, meta);
}
