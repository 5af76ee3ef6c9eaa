//! What a room says of itself, and keeps for others: service discovery (XEP-0045 section 6.4 to 6.6), registration (7.10), its
//! picture (XEP-0486), its archive (XEP-0313 section 7.3).

use std::borrow::Cow;
use std::cell::Cell;
use std::rc::Rc;

use super::join::check_nick;
use super::mediated::ask;
use super::message::unsigned;
use super::privilege::Role;
use super::{NS, Room, at_work, fanout, owner};
use crate::store::change::Change;
use crate::store::room::{Affiliate, Affiliation};
use crate::store::tier::Page;
use crate::xml::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::feature::{
    archive, disco, moderation, occupant_id, register, retract, self_ping, stable_id, vcard,
};
use crate::xmpp::form::{self, Field, Form, Values};
use crate::xmpp::iq::Iq;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::Slice;

pub const NS_REGISTER_FORM: &str = "http://jabber.org/protocol/muc#register";
const NS_ROOM_INFO: &str = "http://jabber.org/protocol/muc#roominfo";
const NODE_NICK: &str = "x-roomuser-item";
const NODE_TRAFFIC: &str = "http://jabber.org/protocol/muc#traffic";
/// Seconds' worth of registrations that may come at once.
const REGISTRATIONS_BURST: u32 = 20;
/// After so long without an answer a request for membership may come again.
const REQUEST_MS: u64 = 3_600_000;
/// Queries of one room's archive at work.
pub(super) const QUERIES_MAX: usize = 64;
/// Those of them that are answered within a millisecond, from memory.
const PAGES_MAX: u8 = 8;

pub fn disco_info(slice: &mut Slice, room: &mut Room, iq: Iq) {
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    let mut query = Element::new("query", disco::NS_INFO);
    let identity = |name: &str| {
        Element::new("identity", disco::NS_INFO)
            .attr("category", "conference")
            .attr("type", "text")
            .attr("name", name)
    };
    match iq.payload.get("node") {
        None => {}
        // section 7.12
        Some(NODE_NICK) => {
            let own = room.state.affiliate(iq.from.bare());
            query.set("node", NODE_NICK);
            if let Some(own) = own.filter(|own| !own.nick.is_empty()) {
                query = query.child(identity(&own.nick));
            }
            return slice.iq_result(&iq, Some(query));
        }
        // 6.6: all that clients send goes through
        Some(NODE_TRAFFIC) => {
            query.set("node", NODE_TRAFFIC);
            return slice.iq_result(&iq, Some(query));
        }
        Some(_) => return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND),
    }
    let s = &room.state.settings;
    let name = match s.title.is_empty() {
        true => room.local(),
        false => &s.title,
    };
    let either = |yes: bool, a: &'static str, b: &'static str| if yes { a } else { b };
    let mut features = vec![
        NS,
        disco::NS_INFO,
        disco::NS_ITEMS,
        register::NS,
        vcard::NS,
        stable_id::NS,
        occupant_id::NS,
        self_ping::NS,
        "http://jabber.org/protocol/muc#stable_id",
        "http://jabber.org/protocol/muc#request",
        either(s.persistent, "muc_persistent", "muc_temporary"),
        either(s.public, "muc_public", "muc_hidden"),
        either(s.members_only, "muc_membersonly", "muc_open"),
        either(s.moderated, "muc_moderated", "muc_unmoderated"),
        either(
            s.password.is_empty(),
            "muc_unsecured",
            "muc_passwordprotected",
        ),
        either(s.non_anonymous, "muc_nonanonymous", "muc_semianonymous"),
    ];
    if s.archived {
        features.extend([
            archive::NS,
            "urn:xmpp:mam:2#extended",
            retract::NS,
            moderation::NS,
        ]);
    }
    features.sort_unstable();
    query = query.child(identity(name));
    for feature in features {
        query = query.child(Element::new("feature", disco::NS_INFO).attr("var", feature));
    }
    let subject = room.state.subject.as_ref().map_or("", |s| &s.text);
    let mut form = Form::new(form::Kind::Result, NS_ROOM_INFO)
        .field(Field::text("muc#roominfo_description", &s.description).label("Description"))
        .field(Field::text("muc#roominfo_lang", &s.lang).label("Language"))
        .field(
            Field::text("muc#roominfo_occupants", &room.occupants.len().to_string())
                .label("Number of occupants"),
        )
        .field(
            Field::boolean("muc#roominfo_subjectmod", s.subject_open)
                .label("Participants may change the subject"),
        )
        .field(Field::boolean(
            "muc#roomconfig_changesubject",
            s.subject_open,
        ))
        .field(Field::text(
            "muc#maxhistoryfetch",
            &s.history_max.to_string(),
        ));
    // who may not come in learns no subject
    if !s.members_only && s.password.is_empty() {
        form = form.field(Field::text("muc#roominfo_subject", subject).label("Subject"));
    }
    if !room.state.avatar.is_empty() {
        form = form.field(Field::lists(
            "muc#roominfo_avatarhash",
            [&*room.state.avatar],
        ));
    }
    slice.iq_result(&iq, Some(query.child(form.element())));
}

/// Section 6.5: those who are in see who is in.
pub fn disco_items(slice: &mut Slice, room: &mut Room, iq: Iq) {
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    if iq.payload.get("node").is_some() {
        return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    }
    let mut query = Element::new("query", disco::NS_ITEMS);
    if room.occupants.find(iq.from.as_str()).is_some() {
        for (_, occupant) in room.occupants.iter() {
            let jid = room.occupant_jid(&occupant.nick);
            query = query.child(Element::new("item", disco::NS_ITEMS).attr("jid", jid));
        }
    }
    slice.iq_result(&iq, Some(query));
}

// ---- registration ------------------------------------------------------------------------------------------------------

/// Section 7.10: somebody becomes a member, or reserves a nickname.
pub fn registration(slice: &mut Slice, room: &mut Room, iq: Iq) {
    if let Err(error) = try_registration(slice, room, &iq) {
        slice.iq_error(&iq, &error);
    }
}

fn try_registration(slice: &mut Slice, room: &mut Room, iq: &Iq) -> Result<(), StanzaError> {
    let bare = iq.from.bare().to_owned();
    let own = room.state.affiliate(&bare);
    let affiliation = room.state.affiliation(&bare);
    if affiliation == Affiliation::Outcast {
        return Err(StanzaError::NOT_ALLOWED);
    }
    if !iq.set {
        let mut query = Element::new("query", register::NS);
        if let Some(own) = own.filter(|own| !own.nick.is_empty()) {
            query = query
                .child(Element::new("registered", register::NS))
                .child(Element::new("username", register::NS).text(own.nick.clone()));
        }
        let nick = own.map_or("", |own| &own.nick);
        let form = Form::new(form::Kind::Form, NS_REGISTER_FORM)
            .title(format!("Registration with {}", room.jid))
            .instructions("The nickname will be yours in this room.")
            .field(
                Field::text("muc#register_roomnick", nick)
                    .label("Nickname")
                    .required(),
            );
        slice.iq_result(iq, Some(query.child(form.element())));
        return Ok(());
    }
    let requests_max = slice.env.limits.rooms.requests_max;
    if iq.payload.find("remove", register::NS).is_some() {
        if !room.state.affiliates.iter().any(|one| one.jid == bare) {
            slice.iq_result(iq, None);
            return Ok(());
        }
        take_registration(slice, room)?;
        // owners and admins lose the nickname only
        let answer = reply(iq);
        let then = move |slice: &mut Slice, room: &mut Room| {
            slice.iq_result(&answer, None);
            super::admin::affiliated(slice, room, &bare, None, None);
        };
        let jid = iq.from.bare().to_owned();
        return room.change(
            slice,
            move |state| match affiliation {
                Affiliation::Member => state.affiliate_as(Affiliate {
                    jid,
                    affiliation: Affiliation::None,
                    ..Affiliate::default()
                }),
                _ => {
                    if let Some(one) = state.affiliates.iter_mut().find(|one| one.jid == jid) {
                        one.nick.clear();
                    }
                }
            },
            then,
        );
    }
    let values = Values::of(&iq.payload, NS_REGISTER_FORM)?.ok_or(StanzaError::BAD_REQUEST)?;
    let nick = values
        .one("muc#register_roomnick")?
        .unwrap_or_default()
        .to_owned();
    if affiliation >= Affiliation::Member {
        check_nick_of(slice, room, &nick, &bare)?;
        take_registration(slice, room)?;
        let answer = reply(iq);
        return reserve(slice, room, &bare, &nick, move |slice, _| {
            slice.iq_result(&answer, None);
        });
    }
    // an admin decides (9.9)
    check_nick_of(slice, room, &nick, &bare)?;
    let ms = slice.now.ms;
    room.asked.retain(|_, at| *at + REQUEST_MS > ms);
    if room.asked.contains_key(&*bare) {
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("it was asked for already"));
    }
    if room.asked.len() >= requests_max {
        slice.counters.room_refused += 1;
        let error = StanzaError::RESOURCE_CONSTRAINT.text("too many wait for the admins' answer");
        return Err(error.wait());
    }
    let form = Form::new(form::Kind::Form, NS_REGISTER_FORM)
        .title("Request for membership")
        .instructions("To let this person be a member, say yes.")
        .field(Field::jid("muc#register_jid", &bare).label("Address"))
        .field(Field::text("muc#register_roomnick", &nick).label("Nickname"))
        .field(Field::boolean("muc#register_allow", false).label("Let this person be a member?"));
    let admins = |affiliation: Affiliation, _: Role| affiliation >= Affiliation::Admin;
    if ask(slice, room, &form.element(), admins) == 0 {
        return Err(StanzaError::SERVICE_UNAVAILABLE
            .text("no admin is in the room")
            .wait());
    }
    room.asked.insert(bare.into(), ms);
    slice.iq_result(iq, None);
    Ok(())
}

/// One registration less in the room's rate: it bounds what all together make the room write, so it is taken when all else is
/// checked, and who may not register uses up nobody's.
fn take_registration(slice: &mut Slice, room: &mut Room) -> Result<(), StanzaError> {
    let rate = slice.env.limits.rooms.registrations_per_second_max;
    if room
        .registrations
        .take(slice.now.ms, rate, REGISTRATIONS_BURST)
    {
        return Ok(());
    }
    slice.counters.room_refused += 1;
    let error = StanzaError::RESOURCE_CONSTRAINT.text("too many registrations at once");
    Err(error.wait())
}

fn check_nick_of(
    slice: &Slice,
    room: &mut Room,
    nick: &str,
    bare: &str,
) -> Result<(), StanzaError> {
    let own = room.occupants.of(bare).next();
    check_nick(slice, room, nick, bare, own).map(|_| ())
}

/// The nickname is kept for him; who had no affiliation is a member from now on.
pub fn reserve(
    slice: &mut Slice,
    room: &mut Room,
    bare: &str,
    nick: &str,
    then: impl FnOnce(&mut Slice, &mut Room) + 'static,
) -> Result<(), StanzaError> {
    check_nick_of(slice, room, nick, bare)?;
    let old = room.state.affiliate(bare).cloned();
    if old.is_none() && room.state.affiliates.len() >= slice.env.limits.rooms.affiliates_max {
        slice.counters.room_refused += 1;
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("the room has too many members"));
    }
    let mut new = old.unwrap_or_else(|| Affiliate {
        jid: bare.to_owned(),
        affiliation: Affiliation::Member,
        ..Affiliate::default()
    });
    new.nick = nick.to_owned();
    let bare = bare.to_owned();
    room.change(
        slice,
        move |state| state.affiliate_as(new),
        move |slice, room| {
            super::admin::affiliated(slice, room, &bare, None, None);
            then(slice, room);
        },
    )
}

fn reply(iq: &Iq) -> Iq {
    Iq {
        session: iq.session,
        from: iq.from.clone(),
        to: iq.to.clone(),
        id: iq.id.clone(),
        set: iq.set,
        payload: Element::new(&iq.payload.name, &iq.payload.ns),
        receipt: iq.receipt,
    }
}

// ---- its picture -------------------------------------------------------------------------------------------------------

/// XEP-0486: the room's vCard, written by owners, read by all who could come in.
pub fn card(slice: &mut Slice, room: &mut Room, iq: Iq) {
    let affiliation = room.state.affiliation(iq.from.bare());
    if affiliation == Affiliation::Outcast
        || (room.state.settings.members_only && affiliation < Affiliation::Member)
        || (iq.set && affiliation < Affiliation::Owner)
    {
        return slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    }
    if iq.set {
        if let Err(error) = set_card(slice, room, &iq) {
            slice.iq_error(&iq, &error);
        }
        return;
    }
    let name = room.name.clone();
    slice.read(
        &name,
        vcard::KEY,
        Box::new(move |slice, result| match result {
            Ok(Some(card)) => {
                let card = std::str::from_utf8(&card).ok().map(Element::parse);
                match card {
                    Some(Ok(card)) => slice.iq_result(&iq, Some(card)),
                    _ => slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR),
                }
            }
            Ok(None) => slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND),
            Err(_) => slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT),
        }),
    );
}

fn set_card(slice: &mut Slice, room: &mut Room, iq: &Iq) -> Result<(), StanzaError> {
    let mut card = Vec::new();
    iq.payload.write(&mut card, "");
    if card.len() > slice.env.limits.vcard_bytes_max {
        return Err(StanzaError::POLICY_VIOLATION.text("the vCard is too big"));
    }
    if slice.ledger.full {
        return Err(StanzaError::RESOURCE_CONSTRAINT);
    }
    let hash = picture_hash(&iq.payload)?;
    let revision = slice.next_id();
    let name = room.name.clone();
    let document = Change::PutDocument {
        name: &name,
        revision,
        key: vcard::KEY,
        value: &card,
    };
    let answer = reply(iq);
    // one group holds both
    room.change(slice, move |state| state.avatar = hash, |_, _| {})?;
    room.written(slice, &document, move |slice, room| {
        slice.iq_result(&answer, None);
        owner::tell_statuses(slice, room, &[104]);
    });
    Ok(())
}

/// XEP-0153: SHA-1 of the picture.
fn picture_hash(card: &Element) -> Result<String, StanzaError> {
    use base64::prelude::*;
    let picture = card.find("PHOTO", vcard::NS);
    let Some(picture) = picture.and_then(|photo| photo.find("BINVAL", vcard::NS)) else {
        return Ok(String::new());
    };
    let text: String = picture.text_content().split_whitespace().collect();
    let bytes = BASE64_STANDARD.decode(text);
    let bytes = bytes.map_err(|_| StanzaError::BAD_REQUEST.text("the picture is no base64"))?;
    // names a picture, protects nothing
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, &bytes);
    Ok(hash.as_ref().iter().map(|b| format!("{b:02x}")).collect())
}

// ---- its archive -------------------------------------------------------------------------------------------------------

/// XEP-0313 section 7.3: for those who could come in, or are in.
pub fn archive(slice: &mut Slice, room: &mut Room, mut iq: Iq) {
    let affiliation = room.state.affiliation(iq.from.bare());
    let settings = &room.state.settings;
    let occupant = room.occupants.find(iq.from.as_str());
    let occupant = occupant.and_then(|place| room.occupants.get(place));
    let is_in = occupant.is_some();
    // section 7.3.1: as of now, not as of then
    let sees = affiliation >= Affiliation::Admin
        || room.shows_jids_to(occupant.map_or(Role::None, |one| one.role));
    let may = match affiliation {
        Affiliation::Outcast => false,
        Affiliation::None => is_in || (!settings.members_only && settings.password.is_empty()),
        _ => true,
    };
    slice.iq_reads(&mut iq);
    if !may {
        return slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    }
    if !iq.set {
        let query = Element::new("query", archive::NS).child(archive::form());
        return slice.iq_result(&iq, Some(query));
    }
    let ms = slice.now.ms;
    if room.pages.0 != ms {
        room.pages = (ms, 0);
    }
    room.pages.1 = room.pages.1.saturating_add(1);
    if room.queries >= QUERIES_MAX || room.pages.1 > PAGES_MAX {
        slice.counters.room_refused += 1;
        return slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT);
    }
    let mut query = match archive::read_query(&slice.env, &iq) {
        Ok(query) => query,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    query.wanted.name = (*room.name).into();
    let name = room.name.clone();
    let wanted = query.wanted.clone();
    // an answer from memory comes at once, while this room is at work
    let waits = Rc::new(Cell::new(false));
    let waited = waits.clone();
    slice.read_archive(
        wanted,
        Box::new(move |slice, page| {
            if waited.replace(true) {
                at_work(slice, &name, |_, room| {
                    room.queries = room.queries.saturating_sub(1);
                });
            }
            match page {
                Ok(page) => show(slice, &iq, &query, page, sees),
                Err(error) => {
                    tracing::warn!(room = &*name, %error, "an archive could not be read");
                    slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT);
                }
            }
        }),
    );
    if !waits.replace(true) {
        room.queries += 1;
    }
}

/// `sees`: with real addresses.
fn show(slice: &mut Slice, iq: &Iq, query: &archive::PageQuery, mut page: Page, sees: bool) {
    if !page.missing.is_empty() {
        return slice.iq_error(iq, &StanzaError::ITEM_NOT_FOUND);
    }
    let Some(room) = &iq.to else { return };
    for entry in page.entries.iter_mut().filter(|_| !sees) {
        if let Cow::Owned(plain) = unsigned(&entry.stanza) {
            entry.stanza = plain.into();
        }
    }
    let mut head = b"<message".to_vec();
    crate::xmpp::message::attribute("from", room.bare(), &mut head);
    let (stanzas, fin) = archive::results(&slice.env, &head, query, &mut page);
    let audience = fanout::Audience::of(&slice.env, [iq.from.as_str()]);
    let meta = Meta::new(Kind::Normal).with(Meta::COPY);
    fanout::send_all(slice, &audience, &stanzas, meta);
    slice.iq_result(iq, Some(fin));
}
