//! Making a room, its configuration, its end (XEP-0045 sections 10.1, 10.2, 10.9).

use super::nick::{self, Key};
use super::presence::Show;
use super::privilege::Role;
use super::{NS, NS_OWNER, Room, at_work, directory, entity, fanout, join, settings};
use crate::store::change::Change;
use crate::store::record::Record;
use crate::store::room::{Affiliate, Affiliation, MAKER_KEY, RoomRecord};
use crate::xml::Element;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::{self, Answer};
use crate::xmpp::iq::Iq;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::{Slice, Slot, WriteError};

/// Section 10.1: somebody comes into a room that does not exist.
pub fn create(slice: &mut Slice, name: &str, to: &Jid<'_>, from: &str, stanza: &[u8]) {
    if let Err(error) = try_create(slice, name, to, from, stanza) {
        slice.bounce(to, from, stanza, Meta::new(Kind::Available), &error);
        let audience = fanout::Audience::of(&slice.env, [from]);
        fanout::forget(slice, &audience, to.bare());
    }
}

fn try_create(
    slice: &mut Slice,
    name: &str,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
) -> Result<(), StanzaError> {
    let limits = &slice.env.limits.rooms;
    let from = Jid::parse(from).map_err(|_| StanzaError::JID_MALFORMED)?;
    let nick = to.resource().ok_or(StanzaError::JID_MALFORMED)?;
    let presence = crate::xmpp::parse_stanza(stanza).ok_or(StanzaError::BAD_REQUEST)?;
    if presence.find("x", NS).is_none() {
        return Err(join::NOT_IN);
    }
    if let Some(creators) = &limits.creators
        && !creators.iter().any(|jid| jid == from.bare())
    {
        return Err(StanzaError::NOT_ALLOWED.text("rooms are made by administrators"));
    }
    if slice.rooms.count >= limits.rooms_max {
        slice.counters.room_refused += 1;
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("there are too many rooms"));
    }
    // as it will be shown, which may be longer
    let shown = nick::enforced(nick).filter(|nick| nick.len() <= limits.nick_bytes_max);
    if shown.is_none_or(|nick| Key::of(&nick).is_none()) {
        return Err(StanzaError::NOT_ACCEPTABLE.text("that is no nickname"));
    }
    join::bounded(&presence)?;
    let lasts = limits.persistent;
    let limits = limits.clone();
    if lasts {
        directory::may_last(slice, from.bare())?;
    }
    let mut state = RoomRecord {
        created_at: slice.now.unix,
        settings: settings::default(&limits),
        ..RoomRecord::default()
    };
    state.affiliate_as(Affiliate {
        jid: from.bare().into(),
        affiliation: Affiliation::Owner,
        ..Affiliate::default()
    });
    let record = Record::room(&state);
    let mut room = Room::new(slice, name, to.bare(), record, 0);
    // 10.1.1: he is to configure it
    room.locked = true;
    room.maker = from.bare().into();
    room.maker_guessed = false;
    match slice.users.get_mut(name) {
        Some(place @ Slot::Missing) => *place = Slot::Room(Some(Box::new(room))),
        _ => {
            slice.rooms.count -= 1;
            return Err(StanzaError::RESOURCE_CONSTRAINT);
        }
    }
    let (to, from) = (to.clone().into_owned(), from.into_owned());
    let stanza: Box<[u8]> = stanza.into();
    let made = at_work(slice, name, move |slice, room| {
        let maker = room.maker.clone();
        let first = move |slice: &mut Slice, room: &mut Room| {
            // all was checked, and nobody is in; but limits may be others now
            if let Err(error) = join::enter(slice, room, &to, &from, &presence, true) {
                let meta = Meta::new(Kind::Available);
                slice.bounce(&to, from.as_str(), &stanza, meta, &error);
                let audience = fanout::Audience::of(&slice.env, [from.as_str()]);
                fanout::forget(slice, &audience, &room.jid);
                end(slice, room, None, |_, _| {});
            }
            if lasts {
                directory::lasts(slice, &maker);
            }
            directory::tell(slice, room);
        };
        let made = room.put(slice, state, true, first);
        if made.is_ok() && lasts {
            directory::lasts_soon(slice, &room.maker);
            keep_maker(slice, room);
        }
        if made.is_err() {
            room.gone = true;
            if let Some(place) = slice.users.get_mut(&entity(room.local())) {
                *place = Slot::Missing;
            }
        }
        made
    });
    made.unwrap_or(Err(StanzaError::RESOURCE_CONSTRAINT))
}

pub fn handle(slice: &mut Slice, room: &mut Room, iq: Iq) {
    if let Err(error) = try_handle(slice, room, &iq) {
        slice.iq_error(&iq, &error);
    }
}

fn try_handle(slice: &mut Slice, room: &mut Room, iq: &Iq) -> Result<(), StanzaError> {
    if room.state.affiliation(iq.from.bare()) != Affiliation::Owner {
        return Err(StanzaError::FORBIDDEN);
    }
    if !iq.set {
        let form = settings::form(&room.jid, &room.state, &slice.env.limits.rooms);
        let query = Element::new("query", NS_OWNER).child(form.element());
        slice.iq_result(iq, Some(query));
        return Ok(());
    }
    if let Some(destroy) = iq.payload.find("destroy", NS_OWNER) {
        return destroy_room(slice, room, iq, destroy);
    }
    let x = iq
        .payload
        .find("x", form::NS)
        .ok_or(StanzaError::BAD_REQUEST)?;
    match Answer::read(x, settings::FORM_TYPE)? {
        // 10.1.3: a room that nobody has configured goes
        Answer::Cancelled if room.locked => {
            let answer = reply(iq);
            end(slice, room, None, move |slice, _| {
                slice.iq_result(&answer, None)
            });
        }
        Answer::Cancelled => slice.iq_result(iq, None),
        Answer::Submitted(values) => {
            let new = settings::read(&values, &room.state, &slice.env.limits.rooms)?;
            configure(slice, room, iq, new)?;
        }
    }
    Ok(())
}

/// What is needed to answer later.
fn reply(iq: &Iq) -> Iq {
    Iq {
        session: iq.session,
        from: iq.from.clone(),
        to: iq.to.clone(),
        id: iq.id.clone(),
        set: iq.set,
        payload: Element::new("query", NS_OWNER),
        receipt: iq.receipt,
    }
}

/// Section 10.2.1: what has changed is told to all by status codes.
fn configure(
    slice: &mut Slice,
    room: &mut Room,
    iq: &Iq,
    new: RoomRecord,
) -> Result<(), StanzaError> {
    let answer = reply(iq);
    let old = room.state.clone();
    let begins_to_last = new.settings.persistent && !old.settings.persistent;
    // the room may learn of another one before this is durable: it is counted for one and the same
    let maker = room.maker.clone();
    if begins_to_last {
        directory::may_last(slice, &maker)?;
        directory::lasts_soon(slice, &maker);
    }
    let counted = maker.clone();
    let changed = room.change(
        slice,
        move |state| *state = new,
        move |slice, room| {
            if begins_to_last {
                directory::lasts(slice, &counted);
            }
            let first = std::mem::take(&mut room.locked);
            slice.iq_result(&answer, None);
            let (before, now) = (&old.settings, &room.state.settings);
            let mut statuses = Vec::new();
            match (before.archived, now.archived) {
                (false, true) => statuses.push(170),
                (true, false) => statuses.push(171),
                _ => {}
            }
            match (before.non_anonymous, now.non_anonymous) {
                (false, true) => statuses.push(172),
                (true, false) => statuses.push(173),
                _ => {}
            }
            if statuses.is_empty() || before != now {
                statuses.insert(0, 104);
            }
            // nobody but its maker was in before
            if !first {
                tell_statuses(slice, room, &statuses);
            }
            directory::tell(slice, room);
            let jids = old.affiliates.iter().chain(&room.state.affiliates);
            let mut jids: Vec<String> = jids.map(|one| one.jid.clone()).collect();
            jids.sort();
            jids.dedup();
            jids.retain(|jid| old.affiliation(jid) != room.state.affiliation(jid));
            for jid in jids {
                super::admin::affiliated(slice, room, &jid, None, None);
            }
            if room.state.settings.members_only && !old.settings.members_only {
                put_out_strangers(slice, room);
            }
            if room.state.settings.non_anonymous && !old.settings.non_anonymous {
                show_addresses(slice, room);
            }
        },
    );
    if begins_to_last {
        match changed {
            Ok(()) => keep_maker(slice, room),
            Err(_) => directory::lasts(slice, &maker),
        }
    }
    changed
}

/// Who has made a room that lasts is written down with it: it counts for him after the next start, too.
fn keep_maker(slice: &mut Slice, room: &mut Room) {
    let (name, maker) = (room.name.clone(), room.maker.clone());
    let document = Change::PutDocument {
        name: &name,
        revision: slice.next_id(),
        key: MAKER_KEY,
        value: maker.as_bytes(),
    };
    room.written(slice, &document, |_, _| {});
}

/// Section 9.3: the room is for members now (status 322).
fn put_out_strangers(slice: &mut Slice, room: &mut Room) {
    for place in room.occupants.places() {
        let Some(occupant) = room.occupants.get(place) else {
            continue;
        };
        if occupant.affiliation < Affiliation::Member {
            let show = Show {
                statuses: &[322],
                ..Show::gone(occupant)
            };
            join::put_out(slice, room, place, &show);
        }
    }
}

/// All see real addresses from now on.
fn show_addresses(slice: &mut Slice, room: &Room) {
    for place in room.occupants.places() {
        if let Some(occupant) = room.occupants.get(place) {
            let show = Show::here(occupant);
            room.tell_others(slice, place, &show);
        }
    }
}

/// A message with nothing but status codes for all who are in.
pub fn tell_statuses(slice: &mut Slice, room: &Room, statuses: &[u16]) {
    let mut x = Element::new("x", super::NS_USER);
    for code in statuses {
        x = x.child(Element::new("status", super::NS_USER).attr("code", code.to_string()));
    }
    let message = Element::new("message", NS_CLIENT)
        .attr("type", "groupchat")
        .attr("id", crate::xmpp::random_id())
        .attr("from", &*room.jid)
        .child(x);
    let mut bytes = Vec::new();
    message.write(&mut bytes, NS_CLIENT);
    let everybody = room.everybody(&slice.env);
    fanout::send(slice, &everybody, &bytes, Meta::new(Kind::GroupChat));
}

/// Section 10.9.
fn destroy_room(
    slice: &mut Slice,
    room: &mut Room,
    iq: &Iq,
    destroy: &Element,
) -> Result<(), StanzaError> {
    let mut told = Element::new("destroy", super::NS_USER);
    if let Some(jid) = destroy.get("jid") {
        let jid = Jid::parse(jid).map_err(|_| StanzaError::JID_MALFORMED)?;
        told.set("jid", jid.as_str());
    }
    for name in ["reason", "password"] {
        if let Some(text) = destroy.find(name, NS_OWNER).map(Element::text_content) {
            if text.len() > 1024 {
                return Err(StanzaError::POLICY_VIOLATION.text("the reason is too long"));
            }
            told = told.child(Element::new(name, super::NS_USER).text(text));
        }
    }
    if slice.ledger.full {
        slice.counters.journal_refused += 1;
        return Err(WriteError::Full.into());
    }
    let answer = reply(iq);
    end(slice, room, Some(told), move |slice, _| {
        slice.iq_result(&answer, None);
    });
    Ok(())
}

/// The room and its archive go, durably; then all who are in learn it.
pub fn end(
    slice: &mut Slice,
    room: &mut Room,
    destroy: Option<Element>,
    then: impl FnOnce(&mut Slice, &mut Room) + 'static,
) {
    if std::mem::replace(&mut room.ending, true) {
        return;
    }
    let revision = slice.next_id();
    let name = room.name.clone();
    let change = Change::RemoveUser {
        name: &name,
        revision,
    };
    room.written(slice, &change, move |slice, room| {
        let destroy = destroy.unwrap_or_else(|| Element::new("destroy", super::NS_USER));
        for place in room.occupants.places() {
            let Some(occupant) = room.occupants.get(place) else {
                continue;
            };
            let show = Show {
                affiliation: Affiliation::None,
                role: Role::None,
                destroy: Some(&destroy),
                ..Show::gone(occupant)
            };
            room.tell_himself(slice, place, &show);
            room.occupants.remove(place);
        }
        room.gone = true;
        directory::tell(slice, room);
        if let Some(place) = slice.users.get_mut(&entity(room.local())) {
            *place = Slot::Missing;
        }
        then(slice, room);
    });
}
