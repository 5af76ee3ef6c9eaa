//! Coming in, presence, another nickname, going (XEP-0045 sections 7.1, 7.2, 7.6, 7.7, 7.14). The order in which a newcomer is
//! told is that of section 7.1: those who are in, himself, the last messages, the subject.

use super::fanout::{self, Audience};
use super::history;
use super::nick::Key;
use super::occupants::Place;
use super::presence::{Show, occupant_id, payload};
use super::privilege::Role;
use super::{NS, Room, message};
use crate::store::room::Affiliation;
use crate::xml::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::{Slice, Waiting};

/// Bytes of one presence that are told to all.
const PRESENCE_BYTES_MAX: usize = crate::xmpp::feature::presence::PRESENCE_BYTES_MAX;

/// Presence without `<x/>` is no wish to come in, as the groupchat protocol before XEP-0045 had it, but that of somebody who does
/// not know yet that he is out: told so, his client comes in again. ejabberd lets such people in, Prosody does not.
pub const NOT_IN: StanzaError =
    StanzaError::ITEM_NOT_FOUND.text("who is not in the room comes in with <x/> first");

/// Presence for a room.
pub fn inbound(slice: &mut Slice, room: &mut Room, to: &Jid<'_>, from: &Jid<'_>, stanza: &Waiting) {
    // whoever speaks is not lost
    room.unreached.remove(from.as_str());
    match stanza.meta.kind {
        Kind::Available => match crate::xmpp::parse_stanza(&stanza.stanza) {
            Some(element) => available(slice, room, to, from, &element, stanza),
            None => room.refuse(slice, to, stanza, &StanzaError::BAD_REQUEST),
        },
        Kind::Unavailable => leave(slice, room, from, stanza),
        // an error comes back from somebody who is not there any more (section 7.14)
        Kind::PresenceError => drop_session(slice, room, from.as_str()),
        _ => {}
    }
}

fn available(
    slice: &mut Slice,
    room: &mut Room,
    to: &Jid<'_>,
    from: &Jid<'_>,
    presence: &Element,
    stanza: &Waiting,
) {
    let Some(nick) = to.resource() else {
        return room.refuse(slice, to, stanza, &StanzaError::JID_MALFORMED);
    };
    let joins = presence.find("x", NS).is_some();
    // as it is shown, so that spaces are no other nickname
    let asked = nick;
    let shown = super::nick::enforced(nick);
    let nick = shown.as_deref().unwrap_or(nick);
    let result = match room.occupants.find(from.as_str()) {
        None if !joins => Err(NOT_IN),
        None => enter(slice, room, to, from, presence, false),
        Some(place) => {
            let limits = &slice.env.limits.rooms;
            let (ms, rate) = (slice.now.ms, limits.presences_per_second_max);
            let Some(occupant) = room.occupants.get_mut(place) else {
                return;
            };
            let same = *occupant.nick == *nick;
            if !occupant.presences.take(ms, rate, 3) {
                slice.counters.room_refused += 1;
                Err(StanzaError::RESOURCE_CONSTRAINT.text("too much presence at once"))
            } else if !same {
                rename(slice, room, place, (nick, nick != asked), from, presence)
            } else {
                update(slice, room, place, from, presence, joins)
            }
        }
    };
    if let Err(error) = result {
        room.refuse(slice, to, stanza, &error);
        if room.occupants.find(from.as_str()).is_none() {
            forget(slice, room, from.as_str());
        }
    }
}

/// The session's own shard takes the room off its list.
fn forget(slice: &mut Slice, room: &Room, jid: &str) {
    let audience = Audience::of(&slice.env, [jid]);
    fanout::forget(slice, &audience, &room.jid);
}

/// Changed presence of somebody who is in; or he comes in again, having lost his memory (section 7.2.4).
fn update(
    slice: &mut Slice,
    room: &mut Room,
    place: Place,
    from: &Jid<'_>,
    presence: &Element,
    joins: bool,
) -> Result<(), StanzaError> {
    let payload = bounded(presence)?;
    room.occupants.set_presence(place, from.as_str(), &payload);
    let Some(occupant) = room.occupants.get(place) else {
        return Ok(());
    };
    let mut show = Show::here(occupant);
    show.id = presence.get("id");
    if joins {
        return welcome(slice, room, place, from, presence, &show, News::default());
    }
    room.tell(slice, place, &show);
    Ok(())
}

pub(super) fn bounded(presence: &Element) -> Result<Vec<u8>, StanzaError> {
    let payload = payload(presence);
    match payload.len() > PRESENCE_BYTES_MAX {
        true => {
            Err(StanzaError::POLICY_VIOLATION.text("presence is larger than this server relays"))
        }
        false => Ok(payload),
    }
}

/// May this person use this nickname? Its key.
pub fn check_nick(
    slice: &Slice,
    room: &mut Room,
    nick: &str,
    bare: &str,
    own: Option<Place>,
) -> Result<Key, StanzaError> {
    if nick.len() > slice.env.limits.rooms.nick_bytes_max {
        return Err(StanzaError::NOT_ACCEPTABLE.text("the nickname is too long"));
    }
    let Some(key) = Key::of(nick) else {
        return Err(StanzaError::NOT_ACCEPTABLE.text("that is no nickname"));
    };
    // section 7.10: reserved for somebody else
    room.reserved.follow(&room.state.affiliates, room.revision);
    if room.reserved.clashes(&key, bare) || room.occupants.clash(&key, own).is_some() {
        return Err(StanzaError::CONFLICT);
    }
    Ok(key)
}

/// Section 7.2: somebody comes in, or another session of somebody under the same nickname. `created`: he has made the room.
pub fn enter(
    slice: &mut Slice,
    room: &mut Room,
    to: &Jid<'_>,
    from: &Jid<'_>,
    presence: &Element,
    created: bool,
) -> Result<(), StanzaError> {
    let asked = to.resource().ok_or(StanzaError::JID_MALFORMED)?;
    let shown = super::nick::enforced(asked);
    let nick = shown.as_deref().unwrap_or(asked);
    let bare = from.bare();
    let affiliation = room.state.affiliation(bare);
    let settings = &room.state.settings;
    if room.locked && !created && affiliation != Affiliation::Owner {
        return Err(StanzaError::ITEM_NOT_FOUND.text("the room is not configured yet"));
    }
    if affiliation == Affiliation::Outcast {
        return Err(StanzaError::FORBIDDEN);
    }
    if settings.members_only && affiliation < Affiliation::Member {
        return Err(StanzaError::REGISTRATION_REQUIRED);
    }
    let x = presence.find("x", NS);
    if !settings.password.is_empty() && affiliation < Affiliation::Owner {
        let given = x.and_then(|x| x.find("password", NS));
        let given = given.map(Element::text_content).unwrap_or_default();
        if aws_lc_rs::constant_time::verify_slices_are_equal(
            given.as_bytes(),
            settings.password.as_bytes(),
        )
        .is_err()
        {
            return Err(StanzaError::NOT_AUTHORIZED);
        }
    }
    let payload = bounded(presence)?;
    let mut place = room.occupants.named(nick);
    if let Some(taken) = place
        && room.occupants.get(taken).is_none_or(|o| *o.bare != *bare)
    {
        return Err(StanzaError::CONFLICT);
    }
    if let Some(known) = place {
        let resources = slice.env.limits.resources_per_user_max;
        let sessions = room.occupants.get(known).map_or(0, |o| o.sessions.len());
        if sessions >= resources {
            return Err(StanzaError::RESOURCE_CONSTRAINT);
        }
        room.occupants.add_session(known, from.as_str(), &payload);
    } else {
        let most = match room.state.settings.occupants_max as usize {
            0 => slice.env.limits.rooms.occupants_max,
            most => most.min(slice.env.limits.rooms.occupants_max),
        };
        // section 7.2.9: admins and owners come in all the same
        if room.occupants.len() >= most && affiliation < Affiliation::Admin {
            slice.counters.room_refused += 1;
            return Err(StanzaError::SERVICE_UNAVAILABLE
                .text("the room is full")
                .wait());
        }
        let key = check_nick(slice, room, nick, bare, None)?;
        let role = affiliation.role(room.state.settings.moderated);
        let id = occupant_id(&slice.env, &room.jid, bare);
        let new = room.occupants.add(nick, key, bare, affiliation, role, id);
        room.occupants.add_session(new, from.as_str(), &payload);
        place = Some(new);
    }
    let Some(place) = place else { return Ok(()) };
    let Some(occupant) = room.occupants.get(place) else {
        return Ok(());
    };
    let mut show = Show::here(occupant);
    show.id = presence.get("id");
    // section 7.2.1: he has not got the nickname that he asked for, but one that is the same by RFC 8266
    let renamed = *occupant.nick != *asked;
    let news = News { created, renamed };
    welcome(slice, room, place, from, presence, &show, news)
}

/// What somebody who comes in learns beside what the room is.
#[derive(Clone, Copy, Default)]
struct News {
    /// He has made it.
    created: bool,
    /// His nickname is another one than he has said.
    renamed: bool,
}

fn welcome(
    slice: &mut Slice,
    room: &mut Room,
    place: Place,
    from: &Jid<'_>,
    presence: &Element,
    show: &Show<'_>,
    news: News,
) -> Result<(), StanzaError> {
    let settings = &room.state.settings;
    let mut statuses = Vec::new();
    if settings.non_anonymous {
        statuses.push(100);
    }
    if settings.archived {
        statuses.push(170);
    }
    if news.created {
        statuses.push(201);
    }
    if news.renamed {
        statuses.push(210);
    }
    room.tell_of_others(slice, place, from.as_str());
    room.tell_others(slice, place, show);
    let own = Show {
        own_statuses: &statuses,
        ..show.clone()
    };
    room.tell_session(slice, place, from.as_str(), &own);
    let others = room.occupants.get(place).map(|occupant| {
        let sessions = occupant.sessions.iter().map(|s| s.jid.clone());
        sessions
            .filter(|jid| **jid != *from.as_str())
            .collect::<Vec<_>>()
    });
    for jid in others.unwrap_or_default() {
        room.tell_session(slice, place, &jid, show);
    }
    let audience = Audience::of(&slice.env, [from.as_str()]);
    let wanted = history::Wanted::of(presence, slice.now.unix_ms);
    let most = room.state.settings.history_max as usize;
    let past = room.history.select(&wanted, most, &room.jid);
    fanout::send_all(slice, &audience, &past, Meta::new(Kind::GroupChat));
    let subject = message::subject_stanza(room);
    fanout::send(slice, &audience, &subject, Meta::new(Kind::GroupChat));
    Ok(())
}

/// Section 7.6. `nick`: the new one, and whether the room has made it of another one that was asked for.
fn rename(
    slice: &mut Slice,
    room: &mut Room,
    place: Place,
    (nick, modified): (&str, bool),
    from: &Jid<'_>,
    presence: &Element,
) -> Result<(), StanzaError> {
    let payload = bounded(presence)?;
    let key = check_nick(slice, room, nick, from.bare(), Some(place))?;
    room.occupants.set_presence(place, from.as_str(), &payload);
    let Some(occupant) = room.occupants.get(place) else {
        return Ok(());
    };
    let leaves = Show {
        kind: Kind::Unavailable,
        statuses: &[303],
        new_nick: Some(nick),
        ..Show::here(occupant)
    };
    room.tell(slice, place, &leaves);
    room.occupants.rename(place, nick, key);
    if let Some(occupant) = room.occupants.get(place) {
        let mut show = Show::here(occupant);
        show.id = presence.get("id");
        if modified {
            show.own_statuses = &[210];
        }
        room.tell(slice, place, &show);
    }
    Ok(())
}

/// Section 7.14: a session goes by itself.
fn leave(slice: &mut Slice, room: &mut Room, from: &Jid<'_>, stanza: &Waiting) {
    let Some(place) = room.occupants.find(from.as_str()) else {
        return;
    };
    // he may say why
    let farewell = crate::xmpp::parse_stanza(&stanza.stanza)
        .and_then(|presence| bounded(&presence).ok())
        .unwrap_or_default();
    room.occupants.set_presence(place, from.as_str(), &farewell);
    gone(slice, room, place, from.as_str(), &[]);
}

/// Nobody serves a component's domain: all who are in from there go first, then those who stay learn it. Nobody is told of others
/// who has gone, too, so a gateway with many people costs what those who stay have to hear.
pub fn drop_domain(slice: &mut Slice, room: &mut Room, domain: &str) {
    let there = |bare: &str| bare.split_once('@').map_or(bare, |(_, host)| host) == domain;
    let places = room.occupants.iter().filter(|(_, one)| there(&one.bare));
    let places: Vec<Place> = places.map(|(place, _)| place).collect();
    let gone: Vec<_> = places
        .into_iter()
        .filter_map(|place| room.occupants.remove(place))
        .collect();
    if gone.is_empty() {
        return;
    }
    let audiences = room.audiences(&slice.env, None);
    for occupant in &gone {
        let show = Show {
            statuses: &[307, 333],
            ..Show::gone(occupant)
        };
        room.tell_those(slice, occupant, &show, &audiences);
    }
    left(slice, room);
}

/// Nothing reaches the session any more.
pub fn drop_session(slice: &mut Slice, room: &mut Room, jid: &str) {
    if let Ok(of) = Jid::parse(jid)
        && !slice.env.is_local(&of)
        && !slice.components.is_served(of.domain())
    {
        return drop_domain(slice, room, of.domain());
    }
    let Some(place) = room.occupants.find(jid) else {
        return;
    };
    if Jid::parse(jid).is_ok_and(|of| !slice.env.is_local(&of)) {
        // a component that does not keep up refuses what goes to each of its people: they are dealt with together
        if room.unreached.is_empty() {
            slice.rooms.unreached.push(room.name.clone());
        }
        room.unreached.insert(jid.into());
        return;
    }
    room.occupants.set_presence(place, jid, b"");
    gone(slice, room, place, jid, &[307, 333]);
}

/// Those whom a component did not reach go first, then those who stay learn it: nobody is told of others who have gone, too, so
/// hundreds of them cost what those who stay have to hear.
pub fn drop_unreached(slice: &mut Slice, room: &mut Room) {
    const STATUSES: &[u16] = &[307, 333];
    if room.ending {
        // all leave
        return room.unreached.clear();
    }
    if room.flow.changes > 0 {
        // what is told of a change comes first
        return slice.rooms.unreached.push(room.name.clone());
    }
    let (mut gone, mut partly) = (Vec::new(), Vec::new());
    for jid in std::mem::take(&mut room.unreached) {
        let Some(place) = room.occupants.find(&jid) else {
            continue;
        };
        let Some(occupant) = room.occupants.get(place) else {
            continue;
        };
        // perhaps he hears it all the same
        let show = Show {
            statuses: STATUSES,
            ..Show::gone(occupant)
        };
        let last = occupant.sessions.len() == 1;
        room.tell_session(slice, place, &jid, &show);
        if last {
            gone.extend(room.occupants.remove(place));
        } else {
            room.occupants.remove_session(place, &jid);
            partly.push(place);
        }
    }
    if gone.is_empty() && partly.is_empty() {
        return;
    }
    let audiences = room.audiences(&slice.env, None);
    for occupant in &gone {
        let show = Show {
            statuses: STATUSES,
            ..Show::gone(occupant)
        };
        room.tell_those(slice, occupant, &show, &audiences);
    }
    for place in partly {
        if let Some(occupant) = room.occupants.get(place) {
            let here = Show::here(occupant);
            room.tell(slice, place, &here);
        }
    }
    left(slice, room);
}

fn gone(slice: &mut Slice, room: &mut Room, place: Place, jid: &str, statuses: &[u16]) {
    let Some(occupant) = room.occupants.get(place) else {
        return;
    };
    let show = Show {
        statuses,
        farewell: true,
        ..Show::gone(occupant)
    };
    let last = occupant.sessions.len() == 1;
    if last {
        room.tell_others(slice, place, &show);
    }
    room.tell_session(slice, place, jid, &show);
    room.occupants.remove_session(place, jid);
    if !last && let Some(occupant) = room.occupants.get(place) {
        let here = Show::here(occupant);
        room.tell(slice, place, &here);
    }
    left(slice, room);
}

/// Somebody is put out, with all sessions: kicked, banned, no member any more.
pub fn put_out(slice: &mut Slice, room: &mut Room, place: Place, show: &Show<'_>) {
    debug_assert!(show.role == Role::None);
    room.tell(slice, place, show);
    room.occupants.remove(place);
    left(slice, room);
}

/// A temporary room ends with its last occupant, one that nobody has configured too (sections 10.1.3, 10.9).
fn left(slice: &mut Slice, room: &mut Room) {
    if room.occupants.is_empty() && (!room.state.settings.persistent || room.locked) {
        super::owner::end(slice, room, None, |_, _| {});
    }
}
