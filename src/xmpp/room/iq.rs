//! Requests to a room, and between those who are in it (XEP-0045 section 17.4, XEP-0410).
//!
//! A request to an occupant goes to his newest session, from the asker's nickname, under an id that names that session; the
//! answer finds its way back by the same: the room remembers nothing.

use super::privilege::Role;
use super::{NS_ADMIN, NS_OWNER, Room, admin, info, moderation, owner};
use crate::xml::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::feature::{self, archive, disco, ping, register, vcard};
use crate::xmpp::iq::Iq;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::parse_stanza;
use crate::xmpp::slice::{Fate, Slice, Waiting};

pub fn inbound(
    slice: &mut Slice,
    room: &mut Room,
    to: &Jid<'_>,
    from: &Jid<'_>,
    stanza: &Waiting,
) -> Fate {
    let Some(element) = parse_stanza(&stanza.stanza) else {
        return Fate::Decided;
    };
    if let Some(nick) = to.resource() {
        if let Err(error) = pass_on(slice, room, nick, from, &element, stanza.meta) {
            room.refuse(slice, to, stanza, &error);
        }
        return Fate::Decided;
    }
    let set = match stanza.meta.kind {
        Kind::IqGet => false,
        Kind::IqSet => true,
        // the room has asked nothing
        _ => return Fate::Decided,
    };
    let Some(payload) = element.elements().next() else {
        return Fate::Decided;
    };
    let iq = Iq {
        session: None,
        from: from.clone().into_owned(),
        to: Some(to.clone().into_owned()),
        id: element.get("id").unwrap_or_default().to_owned(),
        set,
        payload: payload.clone(),
        // settled with the answer
        receipt: stanza.receipt,
    };
    match (&*payload.name, &*payload.ns) {
        ("query", NS_ADMIN) => admin::handle(slice, room, iq),
        ("query", NS_OWNER) => owner::handle(slice, room, iq),
        ("query", disco::NS_INFO) => info::disco_info(slice, room, iq),
        ("query", disco::NS_ITEMS) => info::disco_items(slice, room, iq),
        ("query", register::NS) => info::registration(slice, room, iq),
        ("vCard", vcard::NS) => info::card(slice, room, iq),
        ("query", archive::NS) => info::archive(slice, room, iq),
        ("moderate", feature::moderation::NS) => moderation::handle(slice, room, iq),
        ("ping", ping::NS) if !set => slice.iq_result(&iq, None),
        _ => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
    }
    Fate::Open
}

fn pass_on(
    slice: &mut Slice,
    room: &mut Room,
    nick: &str,
    from: &Jid<'_>,
    element: &Element,
    meta: Meta,
) -> Result<(), StanzaError> {
    let request = matches!(meta.kind, Kind::IqGet | Kind::IqSet);
    let by_jid = room.occupants.find(from.as_str());
    // an account answers for its user where his vCard was asked for
    let asker = match (by_jid, request) {
        (None, false) if from.is_bare() => room.occupants.of(from.bare()).next(),
        (by_jid, _) => by_jid,
    };
    let Some(asker) = asker.and_then(|place| room.occupants.get(place)) else {
        return Err(StanzaError::NOT_ACCEPTABLE.text("only for those who are in the room"));
    };
    let target = room.occupants.named(nick);
    let target = target.and_then(|place| room.occupants.get(place));
    let target = target.ok_or(StanzaError::ITEM_NOT_FOUND)?;
    let payload = element.elements().next();
    let id = element.get("id").unwrap_or_default();
    if request {
        let own = *asker.nick == *nick;
        // XEP-0410: he is in
        if own && payload.is_some_and(|p| p.is("ping", ping::NS)) {
            let iq = Iq {
                session: None,
                from: from.clone().into_owned(),
                to: Jid::parse(&room.occupant_jid(nick))
                    .ok()
                    .map(Jid::into_owned),
                id: id.to_owned(),
                set: false,
                payload: Element::new("ping", ping::NS),
                receipt: None,
            };
            slice.iq_result(&iq, None);
            return Ok(());
        }
        if asker.role < Role::Participant && meta.kind == Kind::IqSet {
            return Err(StanzaError::FORBIDDEN);
        }
    }
    let asker_serial = asker.sessions.iter().find(|s| *s.jid == *from.as_str());
    let asker_serial = asker_serial
        .or(asker.sessions.last())
        .map_or(0, |s| s.serial);
    let (to, new_id) = if request {
        let session = target.sessions.last().ok_or(StanzaError::ITEM_NOT_FOUND)?;
        let card = payload.is_some_and(|p| p.is("vCard", vcard::NS));
        let to = match card {
            true => &*target.bare,
            false => &*session.jid,
        };
        (to.to_owned(), format!("{asker_serial}-{id}"))
    } else {
        // whoever has asked, and what he called it
        let (serial, id) = id.split_once('-').ok_or(StanzaError::ITEM_NOT_FOUND)?;
        let session = target
            .sessions
            .iter()
            .find(|s| s.serial.to_string() == serial);
        let session = session.ok_or(StanzaError::ITEM_NOT_FOUND)?;
        (session.jid.to_string(), id.to_owned())
    };
    let from = room.occupant_jid(&asker.nick);
    let mut passed = element.clone();
    passed.set("id", new_id);
    passed.set("to", &*to);
    passed.set("from", &*from);
    let to = Jid::parse(&to).map_err(|_| StanzaError::ITEM_NOT_FOUND)?;
    slice.route_element(&to, &from, &passed, Meta::new(meta.kind), None);
    Ok(())
}
