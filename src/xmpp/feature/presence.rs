//! Presence (RFC 6121 section 4): who is on line, told to those who may know.
//!
//! In: presence of the user's own clients ([`outbound`]), presence of others for users of this slice ([`deliver`],
//! [`broadcast_in`], [`probe_in`]), and the end of sessions. Out: at most one item of presence and one of probes per
//! shard, whatever the number of contacts; per recipient's session the sender's bytes with `to` spliced in, no tree.
//!
//! Promises: a contact who has seen a resource come sees it go, however it goes (a session that waits for resumption has
//! not gone); nobody gets presence of a contact whom his own roster does not say he is subscribed to, nor of one he
//! blocks. Subscriptions are [`super::subscription`]'s.

use smallvec::SmallVec;

use super::{Feature, NONE, avatar, blocking, caps, roster, subscription};
use crate::observe::{Stage, record};
use crate::store::tier::Last;
use crate::xml::view::View;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::batch::{Item, Receipt};
use crate::xmpp::component::Host;
use crate::xmpp::error::StanzaError;
use crate::xmpp::groups::Groups;
use crate::xmpp::jid::Jid;
use crate::xmpp::ledger::Act;
use crate::xmpp::message::{self, attribute, bounce_out};
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::pace::Shared;
use crate::xmpp::room;
use crate::xmpp::session::{Presence, Session, SessionId};
use crate::xmpp::slice::Op;
use crate::xmpp::slice::{Fate, Slice, Slot, User};

pub static FEATURE: Feature = Feature {
    name: "Presence",
    spec: "RFC 6121 4",
    ended: Some(ended),
    ..NONE
};

/// The most bytes of a presence that is kept and sent to all contacts.
pub const PRESENCE_BYTES_MAX: usize = 16 * 1024;

/// The most bytes of a farewell (`<status/>` of unavailable presence) that is kept for XEP-0012.
const STATUS_BYTES_MAX: usize = 1023;

/// Each kept or broadcast stanza begins so; `to` is spliced in behind it.
const START: &[u8] = b"<presence";

// ---- from the user's clients -------------------------------------------------------------------------------------

/// Presence of any kind of a session of this slice.
pub fn outbound(slice: &mut Slice, sid: SessionId, view: &View<'_>) {
    slice.counters.presences_in += 1;
    // 4.7.1
    let Some(kind) = Kind::presence(view.attr("type").as_deref()) else {
        return bounce_out(slice, sid, view, &StanzaError::BAD_REQUEST);
    };
    let Some(to) = view.attr("to") else {
        return match kind {
            Kind::Available => available(slice, sid, view),
            Kind::Unavailable => unavailable(slice, sid, view),
            Kind::Probe | Kind::PresenceError => {}
            _ => bounce_out(slice, sid, view, &StanzaError::BAD_REQUEST),
        };
    };
    let Ok(to) = Jid::parse(&to) else {
        return bounce_out(slice, sid, view, &StanzaError::JID_MALFORMED);
    };
    if kind.is_subscription() {
        subscription::outbound(slice, sid, view, kind, &to);
    } else {
        directed(slice, sid, view, kind, &to);
    }
}

/// 4.7.2.3: -128 to 127, zero if there is none.
fn priority(view: &View<'_>) -> Result<i8, StanzaError> {
    let mut found = view
        .children()
        .iter()
        .filter(|c| c.name == "priority" && &*c.ns == NS_CLIENT);
    let Some(priority) = found.next() else {
        return Ok(0);
    };
    let error = StanzaError::BAD_REQUEST.text("a priority is one number from -128 to 127");
    match priority.text().trim().parse() {
        Ok(priority) if found.next().is_none() => Ok(priority),
        _ => Err(error),
    }
}

/// 4.2 and 4.4: initial presence, or a change of it.
fn available(slice: &mut Slice, sid: SessionId, view: &View<'_>) {
    let priority = match priority(view) {
        Ok(priority) => priority,
        Err(error) => return bounce_out(slice, sid, view, &error),
    };
    let buffer = slice.buffer();
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    let stanza = message::compose(view, &session.jid, None, session.lang.as_deref(), buffer);
    let name = session.user.clone();
    let stanza = avatar::announce(slice, &name, view, stanza);
    if stanza.len() > PRESENCE_BYTES_MAX {
        slice.reuse(stanza);
        let error =
            StanzaError::POLICY_VIOLATION.text("presence is larger than this server relays");
        return bounce_out(slice, sid, view, &error);
    }
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    let kept = Presence {
        priority,
        stanza: stanza.as_slice().into(),
    };
    let before = session.presence.replace(Box::new(kept)).map(|p| p.priority);
    let initial = before.is_none();
    if let Some(bound) = session.bound.take() {
        record(Stage::LoginPresence, bound.until(slice.now.us));
    }
    let jid = session.jid.clone();
    let meta = Meta::new(Kind::Available).with(Meta::LAZY);
    to_own(slice, &name, &stanza, meta);
    if initial {
        others_to(slice, sid, &name);
    }
    broadcast(slice, &name, &jid, &stanza, meta, initial);
    slice.reuse(stanza);
    if initial {
        subscription::deliver_requests(slice, sid);
    }
    // a resource that did not take messages so far takes those that waited
    if initial || (before.is_some_and(|p| p < 0) && priority >= 0) {
        for hook in slice.hooks.available.clone().iter() {
            hook(slice, sid);
        }
    }
    caps::seen(slice, sid, view, initial);
    avatar::come(slice, sid, view);
}

/// The server has something to add to a session's presence: it goes out again as it is now.
pub fn renew(slice: &mut Slice, sid: SessionId, stanza: Vec<u8>) {
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    let Some(presence) = &mut session.presence else {
        return;
    };
    presence.stanza = stanza.as_slice().into();
    let (name, jid) = (session.user.clone(), session.jid.clone());
    let meta = Meta::new(Kind::Available).with(Meta::LAZY);
    to_own(slice, &name, &stanza, meta);
    broadcast(slice, &name, &jid, &stanza, meta, false);
}

/// 4.5: the client says that it goes.
fn unavailable(slice: &mut Slice, sid: SessionId, view: &View<'_>) {
    let buffer = slice.buffer();
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    let stanza = message::compose(view, &session.jid, None, session.lang.as_deref(), buffer);
    let was = session.presence.is_some();
    let (name, jid) = (session.user.clone(), session.jid.clone());
    let directed = std::mem::take(&mut session.directed);
    let rooms = std::mem::take(&mut session.rooms);
    if was {
        let meta = Meta::new(Kind::Unavailable).with(Meta::LAZY);
        // to itself too, so it is still available here
        to_own(slice, &name, &stanza, meta);
        broadcast(slice, &name, &jid, &stanza, meta, false);
    }
    farewell(slice, &name, &jid, &stanza, directed, was);
    room::leave_all(slice, &jid, &stanza, rooms);
    slice.reuse(stanza);
    if let Some(session) = slice.sessions.get_mut(sid) {
        session.presence = None;
    }
    caps::forget(slice, sid);
    if was {
        let status = view.child("status", NS_CLIENT).map(|s| s.text());
        note_last(slice, &name, status.as_deref().unwrap_or_default());
    }
}

/// 4.5.2: a session has ended; if its client did not say that it goes, the server does. It is in no table any more.
fn ended(slice: &mut Slice, session: &mut Session) {
    let was = session.presence.take().is_some();
    let directed = std::mem::take(&mut session.directed);
    let rooms = std::mem::take(&mut session.rooms);
    if !was && directed.is_empty() && rooms.is_empty() {
        return;
    }
    let mut stanza = slice.buffer();
    write_unavailable(&session.jid, &mut stanza);
    if was {
        let meta = Meta::new(Kind::Unavailable).with(Meta::LAZY | Meta::SERVER);
        to_own(slice, &session.user, &stanza, meta);
        broadcast(slice, &session.user, &session.jid, &stanza, meta, false);
    }
    farewell(slice, &session.user, &session.jid, &stanza, directed, was);
    room::leave_all(slice, &session.jid, &stanza, rooms);
    slice.reuse(stanza);
    if was {
        note_last(slice, &session.user, "");
    }
}

/// XEP-0012: the user's last resource went. Nobody waits for the write.
fn note_last(slice: &mut Slice, name: &str, status: &str) {
    if slice
        .sessions_of(name)
        .iter()
        .any(|sid| is_available(slice, *sid))
    {
        return;
    }
    let at = slice.now.unix;
    let status: Box<str> = status[..status.floor_char_boundary(STATUS_BYTES_MAX)].into();
    let Some(user) = slice.user_mut(name) else {
        return;
    };
    let last = Last { at, status };
    user.last = Some(last.clone());
    slice.write(name, Op::PutLast { last }, Box::new(|_, _| {}));
}

/// 4.6.3: those who were shown the resource by directed presence see it go.
fn farewell(
    slice: &mut Slice,
    name: &str,
    jid: &str,
    stanza: &[u8],
    directed: SmallVec<[Box<str>; 0]>,
    broadcast: bool,
) {
    for target in directed {
        let Ok(target) = Jid::parse(&target) else {
            continue;
        };
        if broadcast && target.is_bare() && sees(slice, name, target.as_str()) {
            // has got it as a subscriber
            continue;
        }
        send_to(slice, &target, jid, stanza, Kind::Unavailable);
    }
}

/// 4.6: presence, a probe or an error for somebody.
fn directed(slice: &mut Slice, sid: SessionId, view: &View<'_>, kind: Kind, to: &Jid<'_>) {
    if slice.env.is_room(to) {
        return room::outbound(slice, sid, view, kind, to);
    }
    if !slice.is_reached(to) {
        // 4.3: a probe is no reason for an error
        if kind == Kind::Available {
            bounce_out(slice, sid, view, &StanzaError::REMOTE_SERVER_NOT_FOUND);
        }
        return;
    }
    if slice.env.is_local(to) && to.local().is_none() {
        // the server itself: nobody is there to be told
        return;
    }
    if let Err(error) = message::may_send(slice, sid, to) {
        return bounce_out(slice, sid, view, &error);
    }
    let most = slice.env.limits.directed_presence_max;
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let listed = session.directed.iter().position(|d| **d == *to.as_str());
    let regular = session.presence.is_some() && sees(slice, &session.user, to.bare());
    let own = to.as_str() == session.bare();
    let full = session.directed.len() >= most;
    let stanza = message::compose(
        view,
        &session.jid,
        Some(to),
        session.lang.as_deref(),
        Vec::new(),
    );
    let jid = session.jid.clone();
    let stanza = match kind {
        Kind::Available => avatar::announce(slice, &session.user, view, stanza),
        _ => stanza,
    };
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    match (kind, listed) {
        (Kind::Available, None) if !regular && !own => {
            if full {
                let error = StanzaError::RESOURCE_CONSTRAINT.text("directed presence to too many");
                return bounce_out(slice, sid, view, &error);
            }
            session.directed.push(to.as_str().into());
        }
        (Kind::Unavailable, Some(at)) => {
            session.directed.swap_remove(at);
        }
        _ => {}
    }
    slice.route(to, &jid, &stanza, meta_of(kind), None);
}

// ---- broadcast ---------------------------------------------------------------------------------------------------

/// One contact's place in a broadcast: owner and group sort them, the name lies in a buffer.
struct Place {
    key: u32,
    start: u32,
    end: u32,
}

/// Contacts who only get presence, who get and give it, who only give it.
const GETS: u32 = 0;
const BOTH: u32 = 1;
const GIVES: u32 = 2;

/// Sends presence of full JID `from` to the user's subscribers and, with `probe`, asks those whom the user is subscribed
/// to for theirs. The roster is read once; names are written once per shard, as the overlap of those who get and those
/// who are asked lies between the two ends of one list.
fn broadcast(slice: &mut Slice, name: &str, from: &str, stanza: &[u8], meta: Meta, probe: bool) {
    let mut names = slice.buffer();
    let mut places: SmallVec<[Place; 32]> = SmallVec::new();
    let mut elsewhere: SmallVec<[(u32, Jid<'static>); 0]> = SmallVec::new();
    let Some(user) = slice.user(name) else {
        return;
    };
    let record = user.record.get();
    let blocks = !record.blocked.is_empty();
    let shared = slice.groups.person(name).is_some()
        || slice.regrouping.before().any(|g| g.person(name).is_some());
    for item in record.roster.iter() {
        let subscription = item.subscription();
        // without a probe nobody gives
        let group = match (subscription.from(), probe && subscription.to()) {
            (true, false) => GETS,
            (true, true) => BOTH,
            (false, true) => GIVES,
            (false, false) => continue,
        };
        let Some(contact) = local_name(item.jid.as_str(), &slice.env.domain) else {
            if let Ok(jid) = Jid::parse(item.jid.as_str())
                && slice.host(jid.domain()) == Host::Component
                && blocking::may_send(slice, name, &jid).is_ok()
            {
                elsewhere.push((group, jid.into_owned()));
            }
            continue;
        };
        if shared && still_together(slice, name, contact) {
            // with the others of the group
            continue;
        }
        // XEP-0191 section 4: a blocked contact gets no presence, and is not asked for his
        if blocks
            && Jid::parse(item.jid.as_str())
                .is_ok_and(|jid| blocking::may_send(slice, name, &jid).is_err())
        {
            continue;
        }
        let start = names.len() as u32;
        names.extend_from_slice(contact.as_bytes());
        places.push(Place {
            key: u32::from(slice.env.owner(contact)) << 2 | group,
            start,
            end: names.len() as u32,
        });
    }
    places.sort_unstable_by_key(|p| p.key);
    let mut rest = &places[..];
    while let Some(first) = rest.first() {
        let owner = first.key >> 2;
        let (shard, next) = rest.split_at(rest.partition_point(|p| p.key >> 2 == owner));
        rest = next;
        if owner == u32::from(slice.env.shard) {
            broadcast_here(slice, shard, &names, from, stanza, meta);
        } else {
            broadcast_there(slice, owner, shard, &names, from, stanza, meta);
        }
    }
    slice.reuse(names);
    if shared {
        broadcast_to_groups(slice, name, from, stanza, meta, probe);
    }
    for (group, contact) in elsewhere {
        if group != GIVES {
            send_with(slice, &contact, from, stanza, meta.with(Meta::SERVER));
        }
        if group != GETS {
            ask(slice, from, &contact);
        }
    }
}

/// The same for those with whom the user shares a group: each shard knows its own.
fn broadcast_to_groups(
    slice: &mut Slice,
    name: &str,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    probe: bool,
) {
    let Some(user) = slice.user(name) else {
        return;
    };
    let blocked = &user.record.get().blocked;
    let mut except = String::new();
    for jid in blocked.iter() {
        if jid.as_str() == &*slice.env.domain {
            return;
        }
        if let Some(contact) = local_name(jid.as_str(), &slice.env.domain)
            && still_together(slice, name, contact)
        {
            except.extend([contact, "\n"]);
        }
    }
    for shard in 0..slice.fx.mesh.len() {
        if shard == usize::from(slice.env.shard) {
            group_in(slice, from, (stanza, meta), &except, probe);
        } else if all_groups(slice).any(|groups| groups.reaches(name, shard)) {
            let batch = &mut slice.fx.mesh[shard];
            let item = Item::Group {
                from: batch.put(from.as_bytes()),
                stanza: batch.put(stanza),
                meta,
                except: batch.put(except.as_bytes()),
                probe,
            };
            batch.items.push(item);
        }
    }
}

/// Presence of full JID `from` for all users of this slice with whom he shares a group, `except` (local parts, each ended by a
/// line feed). `probe`: he is told of theirs.
pub fn group_in(
    slice: &mut Slice,
    from: &str,
    (stanza, meta): (&[u8], Meta),
    except: &str,
    probe: bool,
) {
    let Ok(from) = Jid::parse(from) else {
        return;
    };
    let Some(local) = from.local() else { return };
    let (now, before) = (slice.groups.clone(), slice.regrouping.older());
    let shard = usize::from(slice.env.shard);
    let mut shared = None;
    for (at, groups) in std::iter::once(&now).chain(&before).enumerate() {
        let Some(person) = groups.person(local) else {
            continue;
        };
        for group in groups.of(person) {
            for contact in groups.contacts_of_shard(person, &group.name, shard) {
                let name = &*contact.name;
                // who is not on line is neither told nor asked
                let online = slice
                    .user(name)
                    .is_some_and(|user| !user.sessions.is_empty());
                let done = at > 0 && now.together(local, name);
                let done = done
                    || before
                        .iter()
                        .take(at.saturating_sub(1))
                        .any(|g| g.together(local, name));
                if !online || done || except.lines().any(|one| one == name) {
                    continue;
                }
                tell(slice, name, &from, stanza, meta, &mut shared);
                if probe {
                    asked(slice, name, &from);
                }
            }
        }
    }
}

/// An administrator's groups, and those of before that other shards may still have.
fn all_groups(slice: &Slice) -> impl Iterator<Item = &Groups> {
    std::iter::once(&*slice.groups).chain(slice.regrouping.before())
}

fn still_together(slice: &Slice, name: &str, contact: &str) -> bool {
    all_groups(slice).any(|groups| groups.together(name, contact))
}

/// A probe of full JID `from` for a contact whose presence a component keeps (4.3).
fn ask(slice: &mut Slice, from: &str, contact: &Jid<'_>) {
    let mut stanza = START.to_vec();
    attribute("from", from, &mut stanza);
    stanza.extend_from_slice(b" type='probe'/>");
    let meta = Meta::new(Kind::Probe).with(Meta::SERVER);
    send_with(slice, contact, from, &stanza, meta);
}

/// The same on behalf of an available session.
pub fn probe_component(slice: &mut Slice, sid: SessionId, contact: &Jid<'_>) {
    let session = slice.sessions.get(sid).filter(|s| s.presence.is_some());
    if let Some(from) = session.map(|session| session.jid.clone()) {
        ask(slice, &from, &contact.to_bare());
    }
}

fn text_of<'a>(place: &Place, names: &'a [u8]) -> &'a str {
    let name = &names[place.start as usize..place.end as usize];
    std::str::from_utf8(name).expect("a roster holds texts")
}

fn broadcast_here(
    slice: &mut Slice,
    places: &[Place],
    names: &[u8],
    from: &str,
    stanza: &[u8],
    meta: Meta,
) {
    let Ok(from) = Jid::parse(from) else {
        return;
    };
    let mut shared = None;
    for place in places {
        let name = text_of(place, names);
        if place.key & 3 != GIVES {
            tell(slice, name, &from, stanza, meta, &mut shared);
        }
        if place.key & 3 != GETS {
            asked(slice, name, &from);
        }
    }
}

fn broadcast_there(
    slice: &mut Slice,
    owner: u32,
    places: &[Place],
    names: &[u8],
    from: &str,
    stanza: &[u8],
    meta: Meta,
) {
    let batch = &mut slice.fx.mesh[owner as usize];
    let from = batch.put(from.as_bytes());
    let put = |batch: &mut crate::xmpp::batch::Batch, places: &[Place]| {
        for place in places {
            batch.put(&names[place.start as usize..place.end as usize]);
            batch.put(b"\n");
        }
    };
    let gets = places.partition_point(|p| p.key & 3 == GETS);
    let told = places.partition_point(|p| p.key & 3 <= BOTH);
    let start = batch.open();
    put(batch, &places[..gets]);
    let both = batch.open();
    put(batch, &places[gets..told]);
    let tell = batch.close(start);
    put(batch, &places[told..]);
    let probe = batch.close(both);
    if told > 0 {
        let stanza = batch.put(stanza);
        batch.items.push(Item::Presence {
            from,
            stanza,
            meta,
            names: tell,
        });
    }
    if places.len() > gets {
        batch.items.push(Item::Probe { from, names: probe });
    }
}

/// 4.2.2, 4.4.2, 4.5.2: the user's own available resources, the sender among them.
fn to_own(slice: &mut Slice, name: &str, stanza: &[u8], meta: Meta) {
    let sessions = available_sessions(slice, name);
    to_sessions(slice, &sessions, name, stanza, meta);
}

/// A new resource gets the presence of the user's other resources.
fn others_to(slice: &mut Slice, sid: SessionId, name: &str) {
    let meta = Meta::new(Kind::Available).with(Meta::LAZY);
    for other in available_sessions(slice, name) {
        if other == sid {
            continue;
        }
        let mut stanza = slice.buffer();
        if let Some(presence) = slice.sessions.get(other).and_then(|s| s.presence.as_ref()) {
            stanza.extend_from_slice(&presence.stanza);
            to_sessions(slice, &[sid], name, &stanza, meta);
        }
        slice.reuse(stanza);
    }
}

/// Splices `to` in and sends.
fn to_sessions(slice: &mut Slice, sessions: &[SessionId], name: &str, stanza: &[u8], meta: Meta) {
    let Some((head, rest)) = spliced(slice, name, stanza) else {
        return;
    };
    for sid in sessions {
        slice.send(*sid, &[&head, rest], meta);
    }
}

/// The same for one session, past what waits for it ([`crate::xmpp::pace`]).
pub fn write_to(slice: &mut Slice, sid: SessionId, stanza: &[u8], meta: Meta) {
    if meta.has(Meta::ROOM) {
        return room::fanout::write_to(slice, sid, stanza, meta);
    }
    let Some(name) = slice.sessions.get(sid).map(|s| s.user.clone()) else {
        return;
    };
    if let Some((head, rest)) = spliced(slice, &name, stanza) {
        slice.give(sid, &[&head, rest], meta, 0);
    }
}

/// The beginning of the stanza with `to`, and the rest.
fn spliced<'s>(
    slice: &Slice,
    name: &str,
    stanza: &'s [u8],
) -> Option<(SmallVec<[u8; 256]>, &'s [u8])> {
    let Some(rest) = stanza.strip_prefix(START) else {
        debug_assert!(false, "presence begins with its name");
        return None;
    };
    let mut head: SmallVec<[u8; 256]> = SmallVec::new();
    // neither part of a bare JID may hold a character that needs escaping (RFC 7622 3.2, 3.3.1)
    for part in [
        START,
        b" to='",
        name.as_bytes(),
        b"@",
        slice.env.domain.as_bytes(),
        b"'",
    ] {
        head.extend_from_slice(part);
    }
    Some((head, rest))
}

// ---- from others -------------------------------------------------------------------------------------------------

/// Presence of full JID `from` for its subscribers `names` (local parts, separated by line feeds): to all available
/// resources of each who is here and subscribed.
pub fn broadcast_in(slice: &mut Slice, names: &str, from: &str, stanza: &[u8], meta: Meta) {
    let Ok(from) = Jid::parse(from) else {
        return;
    };
    let mut shared = None;
    for name in names.lines() {
        tell(slice, name, &from, stanza, meta, &mut shared);
    }
}

/// [`broadcast_in`] for one.
fn tell(
    slice: &mut Slice,
    name: &str,
    from: &Jid<'_>,
    stanza: &[u8],
    meta: Meta,
    shared: &mut Option<Shared>,
) {
    let Some(user) = slice.user(name).filter(|u| !u.sessions.is_empty()) else {
        return;
    };
    // it must not overtake a message that the contact sent before and that is on its way into the journal
    if slice.ledger.holds(name) && slice.ledger.bytes() <= slice.env.limits.mesh_backlog_bytes_max {
        let user = user.name.clone();
        let act = Act::Presence {
            from: slice.ledger.keep(from.as_str().as_bytes()),
            stanza: slice.ledger.keep(stanza),
            meta,
        };
        return slice.ledger.queue(&user, act);
    }
    show_to(slice, name, from, stanza, meta, shared);
}

/// Nothing that is older waits.
pub fn tell_now(slice: &mut Slice, name: &str, from: &Jid<'_>, stanza: &[u8], meta: Meta) {
    show_to(slice, name, from, stanza, meta, &mut None);
}

fn show_to(
    slice: &mut Slice,
    name: &str,
    from: &Jid<'_>,
    stanza: &[u8],
    meta: Meta,
    shared: &mut Option<Shared>,
) {
    let Some(user) = slice.user(name) else { return };
    // the sender's side may lag behind: what counts is what the recipient's own roster says
    let item = user.record.get().roster_item(from.bare());
    if !item.is_some_and(|i| i.subscription().to()) && !slice.still_together(name, from) {
        return;
    }
    let sessions = available_of(slice, user);
    if !sessions.is_empty() && admit(slice, name, from, meta) {
        for sid in sessions {
            slice.pace(sid, stanza, meta, shared);
        }
    }
    if meta.kind == Kind::Unavailable {
        forget_directed(slice, name, from);
    }
}

/// 4.3.2 at a login: full JID `from` asks for the presence of its contacts `names` (local parts, separated by line
/// feeds). Who is not here has no resources, and no answer is needed to say that.
pub fn probe_in(slice: &mut Slice, names: &str, from: &str) {
    let Ok(from) = Jid::parse(from) else {
        return;
    };
    for name in names.lines() {
        asked(slice, name, &from);
    }
}

/// [`probe_in`] for one.
fn asked(slice: &mut Slice, name: &str, from: &Jid<'_>) {
    let sees = match slice.users.get(name) {
        Some(Slot::Present(user)) => {
            let item = user.record.get().roster_item(from.bare());
            item.is_some_and(|i| i.subscription().from()) || slice.still_together(name, from)
        }
        Some(Slot::Missing | Slot::Room(_)) => false,
        _ => return,
    };
    if !admit(slice, name, from, Meta::new(Kind::Probe)) {
        return;
    }
    if sees {
        answer_probe(slice, name, from);
    } else if let Ok(to) = Jid::from_parts(Some(name), &slice.env.domain, None) {
        refuse_probe(slice, &to, from);
    }
}

/// The presence of each available resource of `name` for full JID `from`.
fn answer_probe(slice: &mut Slice, name: &str, from: &Jid<'_>) {
    if !slice.env.is_local(from) {
        return show_all(slice, name, from);
    }
    let Some(asker) = from.local() else {
        return;
    };
    let meta = Meta::new(Kind::Available).with(Meta::LAZY);
    let owner = slice.env.owner(asker);
    if owner == slice.env.shard {
        let Some(asking) = from.resource().and_then(|r| slice.find_session(asker, r)) else {
            return;
        };
        for sid in available_sessions(slice, name) {
            let mut stanza = slice.buffer();
            if let Some(presence) = slice.sessions.get(sid).and_then(|s| s.presence.as_ref()) {
                stanza.extend_from_slice(&presence.stanza);
                slice.pace(asking, &stanza, meta, &mut None);
            }
            slice.reuse(stanza);
        }
        return;
    }
    let batch = &mut slice.fx.mesh[owner as usize];
    let mut to = None;
    let Some(Slot::Present(user)) = slice.users.get(name) else {
        return;
    };
    for sid in &user.sessions {
        let Some(session) = slice.sessions.get(*sid) else {
            continue;
        };
        let Some(rest) = session
            .presence
            .as_ref()
            .and_then(|p| p.stanza.strip_prefix(START))
        else {
            continue;
        };
        let to = *to.get_or_insert_with(|| batch.put(from.as_str().as_bytes()));
        let sender = batch.put(session.jid.as_bytes());
        let start = batch.open();
        for part in [START, b" to='", from.bare().as_bytes(), b"'", rest] {
            batch.put(part);
        }
        let stanza = batch.close(start);
        batch.items.push(Item::Stanza {
            to,
            from: sender,
            stanza,
            meta,
            receipt: None,
        });
    }
}

/// Presence of one sender for a user of this slice who is present.
pub fn deliver(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    let name = to.local().expect("only users are routed to");
    let Ok(from_jid) = Jid::parse(from) else {
        return Fate::Decided;
    };
    if !slice.admits(to, &from_jid, stanza, meta) {
        return Fate::Decided;
    }
    if meta.kind.is_subscription() {
        return subscription::inbound(slice, to, &from_jid, stanza, meta, receipt);
    }
    if meta.kind == Kind::Probe {
        probe(slice, to, &from_jid, stanza);
        return Fate::Decided;
    }
    // 8.5.2.1.2, 8.5.3: `to` stays as it is
    match to.resource() {
        Some(resource) => {
            if let Some(sid) = slice.find_session(name, resource) {
                slice.send(sid, &[stanza], meta);
            }
        }
        None => {
            for sid in available_sessions(slice, name) {
                slice.send(sid, &[stanza], meta);
            }
        }
    }
    if meta.kind == Kind::Unavailable {
        forget_directed(slice, name, &from_jid);
    }
    Fate::Decided
}

/// 4.6.1: who has said that he goes needs no farewell.
fn forget_directed(slice: &mut Slice, name: &str, from: &Jid<'_>) {
    for sid in slice.sessions_of(name) {
        if let Some(session) = slice.sessions.get_mut(sid)
            && !session.directed.is_empty()
        {
            session.directed.retain(|d| **d != *from.as_str());
        }
    }
}

/// 4.3.2 and 4.6.6: a probe that a client sent.
fn probe(slice: &mut Slice, to: &Jid<'_>, from: &Jid<'_>, stanza: &[u8]) {
    let name = to.local().expect("only users are routed to");
    let own = from.bare() == to.bare();
    let allowed = own || sees(slice, name, from.bare());
    let Some(resource) = to.resource() else {
        if !allowed {
            return refuse_probe(slice, to, from);
        }
        if available_sessions(slice, name).is_empty() {
            let id = subscription::id_of(stanza);
            return mere(slice, to.bare(), from, Kind::Unavailable, id.as_deref());
        }
        return answer_probe(slice, name, from);
    };
    let session = slice.find_session(name, resource);
    let session = session.and_then(|sid| slice.sessions.get(sid));
    let shown = session.is_some_and(|s| {
        s.directed
            .iter()
            .any(|d| **d == *from.as_str() || **d == *from.bare())
    });
    if !allowed && !shown {
        return refuse_probe(slice, to, from);
    }
    let here = shown || session.is_some_and(|s| s.presence.is_some());
    let kind = if here {
        Kind::Available
    } else {
        Kind::Unavailable
    };
    mere(slice, to.as_str(), from, kind, None);
}

/// Presence that says no more than yes or no.
fn mere(slice: &mut Slice, from: &str, to: &Jid<'_>, kind: Kind, id: Option<&str>) {
    let mut stanza = START.to_vec();
    attribute("from", from, &mut stanza);
    if let Some(id) = id {
        attribute("id", id, &mut stanza);
    }
    if kind == Kind::Unavailable {
        stanza.extend_from_slice(b" type='unavailable'");
    }
    stanza.extend_from_slice(b"/>");
    send_to(slice, to, from, &stanza, kind);
}

/// 4.3.2, rule 1. Who has asked for a subscription and waits for the answer gets none here: it would cancel the request.
fn refuse_probe(slice: &mut Slice, to: &Jid<'_>, from: &Jid<'_>) {
    let name = to.local().expect("only users are routed to");
    let asked = |u: &User| u.record.get().request(from.bare()).is_some();
    if !slice.user(name).is_some_and(asked) {
        answer_unsubscribed(slice, to, from.as_str());
    }
}

/// `to` does not exist, or does not let `from` see its presence: `from`'s side learns that (4.3.2, 8.5.1).
pub fn answer_unsubscribed(slice: &mut Slice, to: &Jid<'_>, from: &str) {
    if let Ok(from) = Jid::parse(from) {
        subscription::say(slice, Kind::Unsubscribed, to.bare(), &from, None);
    }
}

// ---- for subscriptions -------------------------------------------------------------------------------------------

/// The contact (bare or full JID) sees all resources of the user go: the subscription ends (3.2.2, 3.3.3).
pub fn hide(slice: &mut Slice, name: &str, contact: &Jid<'_>) {
    for sid in slice.sessions_of(name) {
        let Some(session) = slice.sessions.get_mut(sid) else {
            continue;
        };
        let shown = |d: &str| {
            d == contact.as_str()
                || (contact.is_bare() && d.split('/').next() == Some(contact.bare()))
        };
        let before = session.directed.len();
        session.directed.retain(|d| !shown(d));
        let directed = session.directed.len() < before;
        if session.presence.is_some() || directed {
            let jid = session.jid.clone();
            let mut stanza = slice.buffer();
            write_unavailable(&jid, &mut stanza);
            send_to(slice, contact, &jid, &stanza, Kind::Unavailable);
            slice.reuse(stanza);
        }
    }
}

/// The contact (bare or full JID) sees the user's resources again: the user does not block him any more (XEP-0191 3.4).
/// Only if the contact is subscribed.
pub fn show(slice: &mut Slice, name: &str, contact: &Jid<'_>) {
    if sees(slice, name, contact.bare()) {
        show_all(slice, name, contact);
    }
}

/// All available resources of the user, for one address.
pub fn show_all(slice: &mut Slice, name: &str, contact: &Jid<'_>) {
    for sid in available_sessions(slice, name) {
        let mut stanza = slice.buffer();
        let Some(session) = slice.sessions.get(sid) else {
            continue;
        };
        if let Some(presence) = &session.presence {
            let jid = session.jid.clone();
            stanza.extend_from_slice(&presence.stanza);
            send_to(slice, contact, &jid, &stanza, Kind::Available);
        }
        slice.reuse(stanza);
    }
}

/// May presence or a request of `from` come in to the user?
pub fn admit(slice: &Slice, name: &str, from: &Jid<'_>, meta: Meta) -> bool {
    slice.hooks.admission(slice, name, from, meta).is_ok()
}

// ---- tools -------------------------------------------------------------------------------------------------------

fn meta_of(kind: Kind) -> Meta {
    match kind {
        Kind::Available | Kind::Unavailable => Meta::new(kind).with(Meta::LAZY),
        _ => Meta::new(kind),
    }
}

/// Is the contact subscribed to the user's presence?
fn sees(slice: &Slice, name: &str, contact: &str) -> bool {
    roster::own_subscription(slice, name, contact).from()
        || Jid::parse(contact).is_ok_and(|contact| slice.together(name, &contact))
}

fn is_available(slice: &Slice, sid: SessionId) -> bool {
    slice
        .sessions
        .get(sid)
        .is_some_and(|s| s.presence.is_some())
}

fn available_sessions(slice: &Slice, name: &str) -> SmallVec<[SessionId; 4]> {
    slice
        .user(name)
        .map(|user| available_of(slice, user))
        .unwrap_or_default()
}

fn available_of(slice: &Slice, user: &User) -> SmallVec<[SessionId; 4]> {
    let all = user.sessions.iter().copied();
    all.filter(|sid| is_available(slice, *sid)).collect()
}

/// The local part of a bare JID of this domain.
fn local_name<'a>(jid: &'a str, domain: &str) -> Option<&'a str> {
    let (name, rest) = jid.split_once('@')?;
    (rest == domain).then_some(name)
}

fn write_unavailable(jid: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(START);
    attribute("from", jid, out);
    out.extend_from_slice(b" type='unavailable'/>");
}

/// Splices `to` in and routes to one address.
fn send_to(slice: &mut Slice, to: &Jid<'_>, from: &str, stanza: &[u8], kind: Kind) {
    send_with(slice, to, from, stanza, meta_of(kind));
}

fn send_with(slice: &mut Slice, to: &Jid<'_>, from: &str, stanza: &[u8], meta: Meta) {
    let (Some(rest), true) = (stanza.strip_prefix(START), slice.is_reached(to)) else {
        return;
    };
    let mut out = slice.buffer();
    out.extend_from_slice(START);
    attribute("to", to.as_str(), &mut out);
    out.extend_from_slice(rest);
    slice.route(to, from, &out, meta, None);
    slice.reuse(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::Subscription;
    use crate::xmpp::testing::{Client, World, bare};

    /// Romeo on shard 0 and Juliet on `shard`, friends.
    fn friends(shard: usize) -> (World, String, String) {
        let mut world = World::new(2);
        let (romeo, juliet) = (world.on(0, "romeo"), world.on(shard, "juliet"));
        world.befriend(&romeo, &juliet);
        (world, romeo, juliet)
    }

    /// They are on line: `orchard` and `balcony`.
    fn couple(shard: usize) -> (World, String, String, Client, Client) {
        let (mut world, romeo, juliet) = friends(shard);
        let orchard = world.online(&romeo, "orchard");
        let balcony = world.online(&juliet, "balcony");
        world.take(orchard);
        (world, bare(&romeo), bare(&juliet), orchard, balcony)
    }

    #[test]
    fn a_login_shows_itself_to_contacts_and_to_itself_and_shows_who_is_there() {
        for shard in [0, 1] {
            let (mut world, romeo, juliet) = friends(shard);
            let balcony = world.online(&juliet, "balcony");
            let orchard = world.login(&romeo, "orchard");
            let (r, j) = (bare(&romeo), bare(&juliet));
            world.send(
                orchard,
                "<presence id='p' xml:lang='it'><show>chat</show><priority>5</priority></presence>",
            );
            let told = |to: &str| {
                format!(
                    "<presence id='p' xml:lang='it' from='{r}/orchard' to='{to}'>\
                     <show>chat</show><priority>5</priority></presence>"
                )
            };
            world.expect(
                orchard,
                &[
                    &told(&r),
                    &format!("<presence from='{j}/balcony' to='{j2}'/>", j2 = r),
                ],
            );
            world.expect(balcony, &[&told(&j)]);
            assert_eq!(
                world.session(orchard).presence.as_ref().unwrap().priority,
                5
            );
        }
    }

    #[test]
    fn a_login_costs_one_presence_and_one_probe_per_other_shard_and_a_write_per_contact() {
        let mut world = World::new(3);
        let me = world.on(0, "me");
        world.add(&me);
        let mut contacts = Vec::new();
        for n in 0..20 {
            let name = world.on(n % 3, &format!("friend{n}x"));
            world.befriend(&me, &name);
            contacts.push((n % 3, world.online(&name, "r")));
        }
        let (gets, gives) = (world.on(1, "gets"), world.on(1, "gives"));
        for (name, mine, theirs) in [
            (&gets, Subscription::From, Subscription::To),
            (&gives, Subscription::To, Subscription::From),
        ] {
            world.item(&me, name, mine);
            world.item(name, &me, theirs);
            contacts.push((1, world.online(name, "r")));
        }
        for (_, contact) in &contacts {
            world.take(*contact);
        }
        let client = world.login(&me, "desk");
        world.element(client, "<presence/>").unwrap();
        for shard in [1, 2] {
            let batch = &world.slices[0].fx.mesh[shard];
            let [
                Item::Presence { names: told, .. },
                Item::Probe { names: asked, .. },
            ] = batch.items[..]
            else {
                panic!("{:?}", batch.items);
            };
            let names = |span| {
                batch
                    .text(span)
                    .lines()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            let (told, asked) = (names(told), names(asked));
            let friends = contacts.iter().filter(|(s, _)| *s == shard).count();
            if shard == 1 {
                assert_eq!((told.len(), asked.len()), (friends - 1, friends - 1));
                assert!(told.contains(&gets) && !told.contains(&gives));
                assert!(asked.contains(&gives) && !asked.contains(&gets));
            } else {
                assert_eq!(told, asked);
                assert_eq!(told.len(), friends);
            }
        }
        world.run();
        assert_eq!(world.take(client).len(), 1 + 21, "itself and who gives");
        let told: usize = contacts.iter().map(|(_, c)| world.take(*c).len()).sum();
        assert_eq!(told, 21);
    }

    #[test]
    fn presence_needs_a_subscription_on_both_sides() {
        for shard in [0, 1] {
            let mut world = World::new(2);
            let (romeo, juliet) = (world.on(0, "romeo"), world.on(shard, "juliet"));
            // Juliet's server has forgotten; Romeo's believes that they are friends
            world.item(&romeo, &juliet, Subscription::Both);
            world.item(&juliet, &romeo, Subscription::None);
            let balcony = world.online(&juliet, "balcony");
            let orchard = world.online(&romeo, "orchard");
            world.expect(balcony, &[]);
            world.send(orchard, "<presence type='unavailable'/>");
            world.expect(balcony, &[]);
            // 4.3.2, rule 1: the probe of the login has told Romeo's side
            let item = &world.stored(&romeo).roster[0];
            assert_eq!(item.subscription, Subscription::From);
        }
    }

    #[test]
    fn updates_go_to_contacts_and_to_all_own_resources_without_probes() {
        for shard in [0, 1] {
            let (mut world, r, j, orchard, balcony) = couple(shard);
            let garden = world.online(r.split('@').next().unwrap(), "garden");
            world.take(balcony);
            world.take(orchard);
            world.send(orchard, "<presence><show>away</show></presence>");
            let told = |to: &str| {
                format!("<presence from='{r}/orchard' to='{to}'><show>away</show></presence>")
            };
            world.expect(orchard, &[&told(&r)]);
            world.expect(garden, &[&told(&r)]);
            world.expect(balcony, &[&told(&j)]);
        }
    }

    #[test]
    fn a_new_resource_sees_the_users_other_resources() {
        let (mut world, r, j, _, balcony) = couple(1);
        let garden = world.login(r.split('@').next().unwrap(), "garden");
        world.send(garden, "<presence/>");
        world.expect(
            garden,
            &[
                &format!("<presence from='{r}/garden' to='{r}'/>"),
                &format!("<presence from='{r}/orchard' to='{r}'/>"),
                &format!("<presence from='{j}/balcony' to='{r}'/>"),
            ],
        );
        world.expect(
            balcony,
            &[&format!("<presence from='{r}/garden' to='{j}'/>")],
        );
    }

    #[test]
    fn who_says_that_he_goes_is_seen_going_with_his_words() {
        for shard in [0, 1] {
            let (mut world, r, j, orchard, balcony) = couple(shard);
            let name = r.split('@').next().unwrap().to_owned();
            world.send(
                orchard,
                "<presence type='unavailable'><status>to bed</status></presence>",
            );
            let told = |to: &str| {
                format!(
                    "<presence type='unavailable' from='{r}/orchard' to='{to}'><status>to bed</status></presence>"
                )
            };
            world.expect(orchard, &[&told(&r)]);
            world.expect(balcony, &[&told(&j)]);
            let last = world.tier.users[&name].last.clone().unwrap();
            assert_eq!((last.at, &*last.status), (world.now.unix, "to bed"));
            // once is enough
            world.send(orchard, "<presence type='unavailable'/>");
            world.send(balcony, "<presence><show>xa</show></presence>");
            world.take(balcony);
            world.expect(orchard, &[]);
            // 4.5.2: then it is initial presence again
            world.send(orchard, "<presence/>");
            assert_eq!(world.take(orchard).len(), 2);
            world.logout(orchard);
            assert_eq!(world.take(balcony).len(), 2);
        }
    }

    #[test]
    fn who_vanishes_is_seen_going_and_who_may_resume_is_not() {
        for shard in [0, 1] {
            let (mut world, r, j, orchard, balcony) = couple(shard);
            let gone = format!("<presence type='unavailable' from='{r}/orchard' to='{j}'/>");
            world.send(orchard, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
            world.cut(orchard);
            world.expect(balcony, &[]);
            let limit = world.slices[0].env.limits.resume_ms_max;
            world.advance(limit - 1);
            world.expect(balcony, &[]);
            world.advance(1);
            world.expect(balcony, &[&gone]);
            let name = r.split('@').next().unwrap();
            assert_eq!(&*world.user(name).last.as_ref().unwrap().status, "");
            let orchard = world.online(name, "orchard");
            world.take(balcony);
            world.cut(orchard);
            world.expect(balcony, &[&gone]);
        }
    }

    #[test]
    fn the_last_log_out_is_that_of_the_last_resource() {
        let (mut world, r, _, orchard, _) = couple(1);
        let name = r.split('@').next().unwrap().to_owned();
        let garden = world.online(&name, "garden");
        let never = world.login(&name, "never");
        world.logout(orchard);
        world.logout(never);
        assert!(world.tier.users[&name].last.is_none());
        world.logout(garden);
        assert!(world.tier.users[&name].last.is_some());
        assert_eq!(world.tier.changes, 1);
    }

    #[test]
    fn presence_that_makes_no_sense_is_a_bad_request_and_nobody_sees_it() {
        let (mut world, _, j, orchard, balcony) = couple(0);
        for bad in [
            "<presence id='b' type='available'/>",
            "<presence id='b'><priority>128</priority></presence>",
            "<presence id='b'><priority>-129</priority></presence>",
            "<presence id='b'><priority/></presence>",
            "<presence id='b'><priority>high</priority></presence>",
            "<presence id='b'><priority>1</priority><priority>1</priority></presence>",
            "<presence id='b' type='subscribe'/>",
        ] {
            world.send(orchard, bad);
            let got = world.take(orchard);
            assert!(
                got.len() == 1 && got[0].contains("<bad-request "),
                "{bad}: {got:?}"
            );
            assert!(got[0].contains("id='b'") && got[0].contains("type='error'"));
        }
        let big = "x".repeat(PRESENCE_BYTES_MAX);
        world.send(
            orchard,
            &format!("<presence><status>{big}</status></presence>"),
        );
        assert!(world.take(orchard)[0].contains("policy-violation"));
        world.expect(balcony, &[]);
        world.send(orchard, &format!("<presence to='{j}' type='error'/>"));
        assert_eq!(
            world.take(balcony).len(),
            1,
            "an error is passed on and never answered"
        );
        for quiet in [
            "<presence type='probe'/>",
            "<presence type='error'/>",
            "<presence type='probe' to='a@b'/>",
        ] {
            world.send(orchard, quiet);
            world.expect(orchard, &[]);
        }
        world.send(orchard, "<presence to='@'/>");
        assert!(world.take(orchard)[0].contains("jid-malformed"));
        world.send(orchard, "<presence to='room@elsewhere.example/nick'/>");
        assert!(world.take(orchard)[0].contains("remote-server-not-found"));
    }

    #[test]
    fn messages_follow_the_priority() {
        let (mut world, _, j, orchard, balcony) = couple(1);
        world.send(balcony, "<presence><priority> -1 </priority></presence>");
        world.take(balcony);
        world.send(
            orchard,
            &format!("<message to='{j}' type='chat'><body>hi</body></message>"),
        );
        world.expect(balcony, &[]);
        world.send(balcony, "<presence><priority>+1</priority></presence>");
        let got = world.take(balcony);
        assert!(
            got.len() == 2 && got[1].contains("<body>hi</body>"),
            "what waited comes: {got:?}"
        );
    }

    #[test]
    fn bytes_that_hang_on_their_stream_stand_alone_when_they_leave() {
        let (mut world, r, j, orchard, balcony) = couple(1);
        world.send(
            orchard,
            "<presence xmlns:x='urn:a'><x:y x:z='1'/></presence>",
        );
        let got = world.take(balcony);
        assert!(got[0].starts_with("<presence to='"), "{got:?}");
        let element = crate::xmpp::parse_stanza(got[0].as_bytes()).unwrap();
        assert!(element.find("y", "urn:a").is_some());
        assert_eq!(element.get("to"), Some(&*j));
        assert_eq!(element.get("from"), Some(&*format!("{r}/orchard")));
    }

    #[test]
    fn directed_presence_is_seen_going_too() {
        for shard in [0, 1] {
            let mut world = World::new(2);
            let (romeo, juliet) = (world.on(0, "romeo"), world.on(shard, "juliet"));
            world.add(&romeo);
            world.add(&juliet);
            let orchard = world.online(&romeo, "orchard");
            let balcony = world.online(&juliet, "balcony");
            let (r, j) = (bare(&romeo), bare(&juliet));
            let gone =
                |to: &str| format!("<presence type='unavailable' from='{r}/orchard' to='{to}'/>");
            let full = format!("{j}/balcony");
            for to in [&j, &full] {
                let to = to.as_str();
                world.send(
                    orchard,
                    &format!("<presence to='{to}'><show>chat</show></presence>"),
                );
                world.expect(
                    balcony,
                    &[&format!(
                        "<presence from='{r}/orchard' to='{to}'><show>chat</show></presence>"
                    )],
                );
                // 4.6.3, rule 2: no part in broadcasts
                world.send(orchard, "<presence><show>away</show></presence>");
                world.expect(balcony, &[]);
                world.send(orchard, "<presence type='unavailable'/>");
                world.expect(balcony, &[&gone(to)]);
                assert!(world.session(orchard).directed.is_empty());
                world.send(orchard, "<presence/>");
            }
            // who was told already is not told again
            world.send(orchard, &format!("<presence to='{full}'/>"));
            world.send(
                orchard,
                &format!("<presence to='{full}' type='unavailable'/>"),
            );
            world.take(balcony);
            world.send(orchard, "<presence type='unavailable'/>");
            world.expect(balcony, &[]);
            // rule 3: without initial presence, and the client vanishes
            world.send(orchard, &format!("<presence to='{full}'/>"));
            world.take(balcony);
            world.cut(orchard);
            world.expect(balcony, &[&gone(&full)]);
            // 4.6.1: who has left needs no farewell
            let orchard = world.online(&romeo, "orchard");
            world.send(orchard, &format!("<presence to='{full}'/>"));
            world.take(balcony);
            world.send(
                balcony,
                &format!("<presence to='{r}/orchard' type='unavailable'/>"),
            );
            world.logout(orchard);
            world.expect(balcony, &[]);
        }
    }

    #[test]
    fn a_subscriber_who_was_shown_presence_is_told_once() {
        let (mut world, r, j, orchard, balcony) = couple(1);
        world.send(
            orchard,
            &format!("<presence to='{j}'><show>dnd</show></presence>"),
        );
        world.take(balcony);
        assert!(world.session(orchard).directed.is_empty());
        world.logout(orchard);
        world.expect(
            balcony,
            &[&format!(
                "<presence type='unavailable' from='{r}/orchard' to='{j}'/>"
            )],
        );
    }

    #[test]
    fn directed_presence_has_a_limit() {
        let mut world = World::with(1, |limits| limits.directed_presence_max = 1);
        for name in ["romeo", "juliet", "nurse"] {
            world.add(name);
        }
        let orchard = world.online("romeo", "orchard");
        for _ in 0..2 {
            world.send(orchard, "<presence to='juliet@localhost'/>");
        }
        world.expect(orchard, &[]);
        world.send(orchard, "<presence to='nurse@localhost'/>");
        assert!(world.take(orchard)[0].contains("resource-constraint"));
        world.send(
            orchard,
            "<presence to='juliet@localhost' type='unavailable'/>",
        );
        world.send(orchard, "<presence to='nurse@localhost'/>");
        world.expect(orchard, &[]);
    }

    #[test]
    fn a_probe_is_answered_to_those_who_may_know() {
        for shard in [0, 1] {
            let (mut world, r, j, orchard, balcony) = couple(shard);
            let probe = |to: &str| format!("<presence type='probe' id='p' to='{to}'/>");
            world.send(balcony, "<presence id='mine'><show>away</show></presence>");
            world.take(orchard);
            world.send(orchard, &probe(&j));
            world.expect(
                orchard,
                &[&format!(
                    "<presence id='mine' from='{j}/balcony' to='{r}'><show>away</show></presence>"
                )],
            );
            // 4.3.2: about one resource, only that it is there
            let full = format!("{r}/orchard");
            world.send(orchard, &probe(&format!("{j}/balcony")));
            world.expect(
                orchard,
                &[&format!("<presence from='{j}/balcony' to='{full}'/>")],
            );
            world.send(orchard, &probe(&format!("{j}/attic")));
            world.expect(
                orchard,
                &[&format!(
                    "<presence type='unavailable' from='{j}/attic' to='{full}'/>"
                )],
            );
            world.logout(balcony);
            world.take(orchard);
            world.send(orchard, &probe(&j));
            world.expect(
                orchard,
                &[&format!(
                    "<presence type='unavailable' id='p' from='{j}' to='{full}'/>"
                )],
            );
            // a stranger learns nothing, whether there is such a user or not
            let thief = world.on(0, "thief");
            world.add(&thief);
            let thief = world.online(&thief, "x");
            for to in [
                &*r,
                &*full,
                &*j,
                "nobody@localhost",
                &*format!("{j}/balcony"),
            ] {
                world.send(thief, &probe(to));
                world.expect(thief, &[]);
            }
        }
    }

    #[test]
    fn who_was_shown_directed_presence_may_ask_for_it() {
        let mut world = World::new(2);
        let (romeo, juliet) = (world.on(0, "romeo"), world.on(1, "juliet"));
        world.add(&romeo);
        world.add(&juliet);
        let orchard = world.online(&romeo, "orchard");
        let balcony = world.online(&juliet, "balcony");
        let (r, j) = (bare(&romeo), bare(&juliet));
        world.send(
            orchard,
            &format!("<presence to='{j}/balcony'><show>chat</show></presence>"),
        );
        world.take(balcony);
        world.send(
            balcony,
            &format!("<presence type='probe' to='{r}/orchard'/>"),
        );
        world.expect(
            balcony,
            &[&format!("<presence from='{r}/orchard' to='{j}/balcony'/>")],
        );
        world.send(balcony, &format!("<presence type='probe' to='{r}'/>"));
        world.expect(balcony, &[]);
    }

    #[test]
    fn a_blocked_contact_sees_nothing_and_is_not_seen() {
        for shard in [0, 1] {
            let (mut world, romeo, juliet) = friends(shard);
            let (r, j) = (bare(&romeo), bare(&juliet));
            let stored = world.tier.users.get_mut(&romeo).unwrap();
            stored.record.block(&j);
            let balcony = world.online(&juliet, "balcony");
            let orchard = world.online(&romeo, "orchard");
            world.expect(balcony, &[]);
            world.send(balcony, "<presence><show>away</show></presence>");
            world.take(balcony);
            world.send(balcony, &format!("<presence to='{r}/orchard'/>"));
            world.send(balcony, &format!("<presence type='probe' to='{r}'/>"));
            world.send(balcony, &format!("<presence type='unsubscribe' to='{r}'/>"));
            world.send(orchard, "<presence><show>xa</show></presence>");
            assert_eq!(world.take(orchard).len(), 1);
            let got = world.take(balcony);
            assert!(
                got.iter().all(|s| s.contains("<iq ")),
                "only pushes of her own roster: {got:?}"
            );
            assert_eq!(
                world.stored(&romeo).roster[0].subscription,
                Subscription::Both
            );
        }
    }
}
