//! What people ask of each other through a room by message: invitations and declines (XEP-0045 section 7.8.2), voice (7.13, 8.6),
//! membership (7.10, 9.9).

use super::privilege::{Role, may_change_role};
use super::{NS_USER, Room, admin, info};
use crate::store::room::{Affiliate, Affiliation};
use crate::xml::Element;
use crate::xmpp::batch::Receipt;
use crate::xmpp::component::Host;
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::{self, Field, Form, Values};
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::{Fate, Slice, Waiting};
use crate::xmpp::{NS_CLIENT, parse_stanza};

const NS_REQUEST: &str = "http://jabber.org/protocol/muc#request";
/// Invitations in one message.
const INVITED_MAX: usize = 20;

pub fn inbound(
    slice: &mut Slice,
    room: &mut Room,
    from: &Jid<'_>,
    stanza: &Waiting,
) -> Result<Fate, StanzaError> {
    let Some(message) = parse_stanza(&stanza.stanza) else {
        return Err(StanzaError::BAD_REQUEST);
    };
    let x = message.find("x", NS_USER);
    let invites: Vec<&Element> = x
        .into_iter()
        .flat_map(Element::elements)
        .filter(|e| e.is("invite", NS_USER))
        .collect();
    if !invites.is_empty() {
        return invite(slice, room, from, &invites, stanza.receipt);
    }
    if let Some(decline) = x.and_then(|x| x.find("decline", NS_USER)) {
        return decline_to(slice, room, from, decline, stanza.receipt);
    }
    if let Some(x) = message.find("x", form::NS) {
        let form_type = x.elements().find(|f| f.get("var") == Some(form::FORM_TYPE));
        let form_type = form_type.and_then(|f| f.find("value", form::NS));
        let form_type = form_type.map(Element::text_content).unwrap_or_default();
        return match &*form_type {
            NS_REQUEST => voice(slice, room, from, &Values::read(x, NS_REQUEST)?),
            info::NS_REGISTER_FORM => {
                let form = Values::read(x, info::NS_REGISTER_FORM)?;
                approve(slice, room, from, &form, stanza.receipt)
            }
            _ => Err(StanzaError::BAD_REQUEST),
        };
    }
    Err(StanzaError::BAD_REQUEST)
}

/// Section 7.8.2. In a room for members, who is invited becomes one.
fn invite(
    slice: &mut Slice,
    room: &mut Room,
    from: &Jid<'_>,
    invites: &[&Element],
    receipt: Option<Receipt>,
) -> Result<Fate, StanzaError> {
    let Some(place) = room.occupants.find(from.as_str()) else {
        return Err(StanzaError::NOT_ACCEPTABLE.text("only for those who are in the room"));
    };
    let Some(inviter) = room.occupants.get(place) else {
        return Err(StanzaError::NOT_ACCEPTABLE);
    };
    let settings = &room.state.settings;
    if !settings.invites && inviter.affiliation < Affiliation::Admin {
        return Err(StanzaError::FORBIDDEN);
    }
    if invites.len() > INVITED_MAX {
        slice.counters.room_refused += 1;
        return Err(StanzaError::POLICY_VIOLATION.text("too many invitations in one message"));
    }
    let by = match settings.non_anonymous {
        true => from.bare().to_owned(),
        false => room.occupant_jid(&inviter.nick),
    };
    let mut stanzas = Vec::new();
    let mut members = Vec::new();
    for one in invites {
        let to = one.get("to").ok_or(StanzaError::BAD_REQUEST)?;
        let to = Jid::parse(to).map_err(|_| StanzaError::JID_MALFORMED)?;
        match slice.host(to.domain()) {
            Host::Own if to.local().is_some() => {}
            Host::Component if slice.components.is_served(to.domain()) => {}
            Host::Component => {
                let error = StanzaError::REMOTE_SERVER_TIMEOUT;
                return Err(error.text("the component that serves this address is not connected"));
            }
            _ => {
                let error = StanzaError::ITEM_NOT_FOUND;
                return Err(
                    error.text("only people of this server and of its components are invited")
                );
            }
        }
        if room.state.affiliation(to.bare()) == Affiliation::Outcast {
            return Err(StanzaError::FORBIDDEN.text("he is banned"));
        }
        if settings.members_only && room.state.affiliation(to.bare()) < Affiliation::Member {
            members.push(to.bare().to_owned());
        }
        let mut invite = Element::new("invite", NS_USER).attr("from", &*by);
        for child in one
            .elements()
            .filter(|c| c.name == "reason" || c.name == "continue")
        {
            invite = invite.child(child.clone());
        }
        let mut x = Element::new("x", NS_USER).child(invite);
        if !settings.password.is_empty() {
            x = x.child(Element::new("password", NS_USER).text(settings.password.clone()));
        }
        let message = Element::new("message", NS_CLIENT)
            .attr("to", to.as_str())
            .attr("id", crate::xmpp::random_id())
            .child(x)
            .attr("from", &*room.jid);
        stanzas.push((to.into_owned(), message));
    }
    // it is kept for those who are not there
    let meta = Meta::new(Kind::Normal).with(Meta::SERVER | Meta::CARBON);
    let tell = move |slice: &mut Slice, room: &mut Room| {
        let last = stanzas.len() - 1;
        for (n, (to, message)) in stanzas.into_iter().enumerate() {
            // what is counted is with who is invited, of several with the last one
            let receipt = receipt.filter(|_| n == last);
            slice.route_element(&to, &room.jid, &message, meta, receipt);
        }
        if let Some(receipt) = receipt {
            slice.passed_on(receipt);
        }
    };
    if members.is_empty() {
        tell(slice, room);
        return Ok(Fate::Open);
    }
    if room.state.affiliates.len() + members.len() > slice.env.limits.rooms.affiliates_max {
        slice.counters.room_refused += 1;
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("the room has too many members"));
    }
    let join = move |state: &mut crate::store::room::RoomRecord| {
        for jid in members {
            state.affiliate_as(Affiliate {
                jid,
                affiliation: Affiliation::Member,
                ..Affiliate::default()
            });
        }
    };
    room.change(slice, join, tell)?;
    Ok(Fate::Open)
}

/// Section 7.8.2: back to who has invited, if he is still in.
fn decline_to(
    slice: &mut Slice,
    room: &mut Room,
    from: &Jid<'_>,
    decline: &Element,
    receipt: Option<Receipt>,
) -> Result<Fate, StanzaError> {
    if room.state.affiliation(from.bare()) == Affiliation::Outcast {
        return Err(StanzaError::FORBIDDEN);
    }
    let to = decline.get("to").ok_or(StanzaError::BAD_REQUEST)?;
    let to = Jid::parse(to).map_err(|_| StanzaError::JID_MALFORMED)?;
    let place = match to.resource() {
        Some(nick) if to.bare() == &*room.jid => room.occupants.named(nick),
        // where people are known by their nicknames, nobody learns so who is in
        _ if !room.state.settings.non_anonymous => None,
        _ => room.occupants.of(to.bare()).next(),
    };
    let Some(inviter) = place.and_then(|place| room.occupants.get(place)) else {
        // a room tells nothing to those who are not in it
        return Err(StanzaError::ITEM_NOT_FOUND);
    };
    let mut answer = Element::new("decline", NS_USER).attr("from", from.bare());
    for child in decline.elements().filter(|c| c.name == "reason") {
        answer = answer.child(child.clone());
    }
    let Ok(to) = Jid::parse(&inviter.bare) else {
        return Err(StanzaError::ITEM_NOT_FOUND);
    };
    let message = Element::new("message", NS_CLIENT)
        .attr("to", to.as_str())
        .child(Element::new("x", NS_USER).child(answer))
        .attr("from", &*room.jid);
    let meta = Meta::new(Kind::Normal).with(Meta::SERVER | Meta::CARBON);
    slice.route_element(&to, &room.jid, &message, meta, receipt);
    let Some(receipt) = receipt else {
        return Ok(Fate::Decided);
    };
    slice.passed_on(receipt);
    Ok(Fate::Open)
}

/// Sections 7.13 and 8.6: a visitor asks for voice, or a moderator answers.
fn voice(
    slice: &mut Slice,
    room: &mut Room,
    from: &Jid<'_>,
    form: &Values,
) -> Result<Fate, StanzaError> {
    let Some(place) = room.occupants.find(from.as_str()) else {
        return Err(StanzaError::NOT_ACCEPTABLE);
    };
    let Some(asker) = room.occupants.get_mut(place) else {
        return Err(StanzaError::NOT_ACCEPTABLE);
    };
    if let Some(allow) = form.boolean("muc#request_allow")? {
        let actor = (asker.affiliation, asker.role);
        let actor_nick = asker.nick.clone();
        let nick = form.one("muc#roomnick")?.unwrap_or_default();
        let target = room
            .occupants
            .named(nick)
            .ok_or(StanzaError::ITEM_NOT_FOUND)?;
        let Some(visitor) = room.occupants.get_mut(target) else {
            return Err(StanzaError::ITEM_NOT_FOUND);
        };
        may_change_role(
            actor,
            (visitor.affiliation, visitor.role),
            Role::Participant,
        )?;
        visitor.asked = false;
        if allow && visitor.role == Role::Visitor {
            admin::set_role(slice, room, target, Role::Participant, &actor_nick, None);
        }
        return Ok(Fate::Decided);
    }
    if asker.role != Role::Visitor {
        return Err(StanzaError::BAD_REQUEST.text("you have voice"));
    }
    // once is enough, until somebody answers
    if std::mem::replace(&mut asker.asked, true) {
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("it was asked for already"));
    }
    let form = Form::new(form::Kind::Form, NS_REQUEST)
        .title("Request for voice")
        .instructions("To let this person speak, say yes.")
        .field(Field::list("muc#role", "participant").option("Participant", "participant"))
        .field(Field::jid("muc#jid", from.as_str()).label("Address"))
        .field(Field::text("muc#roomnick", &asker.nick).label("Nickname"))
        .field(Field::boolean("muc#request_allow", false).label("Let this person speak?"));
    let form = form.element();
    ask(slice, room, &form, |_, role| role == Role::Moderator);
    Ok(Fate::Decided)
}

/// Sends a form to those who may answer it. How many got it.
pub fn ask(
    slice: &mut Slice,
    room: &Room,
    form: &Element,
    of: impl Fn(Affiliation, Role) -> bool,
) -> usize {
    let deciders = room
        .occupants
        .iter()
        .filter(|(_, o)| of(o.affiliation, o.role));
    let sessions = deciders.flat_map(|(_, o)| o.sessions.iter().map(|s| &*s.jid));
    let message = Element::new("message", NS_CLIENT)
        .attr("from", &*room.jid)
        .child(form.clone());
    let mut count = 0;
    let audience = super::fanout::Audience::of(&slice.env, sessions.inspect(|_| count += 1));
    let mut bytes = Vec::new();
    message.write(&mut bytes, NS_CLIENT);
    super::fanout::send(slice, &audience, &bytes, Meta::new(Kind::Normal));
    count
}

/// Section 9.9: an admin lets somebody be a member, or not.
fn approve(
    slice: &mut Slice,
    room: &mut Room,
    from: &Jid<'_>,
    form: &Values,
    receipt: Option<Receipt>,
) -> Result<Fate, StanzaError> {
    if room.state.affiliation(from.bare()) < Affiliation::Admin {
        return Err(StanzaError::FORBIDDEN);
    }
    let allow = form.boolean("muc#register_allow")? == Some(true);
    let jid = form
        .jid("muc#register_jid")?
        .ok_or(StanzaError::BAD_REQUEST)?;
    room.asked.remove(jid.bare());
    if !allow {
        return Ok(Fate::Decided);
    }
    let nick = form
        .one("muc#register_roomnick")?
        .unwrap_or_default()
        .to_owned();
    if room.state.affiliation(jid.bare()) > Affiliation::None {
        return Ok(Fate::Decided);
    }
    // counted when it is durable
    info::reserve(slice, room, jid.bare(), &nick, move |slice, _| {
        if let Some(receipt) = receipt {
            slice.finish(receipt);
        }
    })?;
    Ok(Fate::Open)
}
