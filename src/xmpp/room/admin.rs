//! Kicks, voice, moderators, bans, members, admins, owners, and the lists of them (XEP-0045 sections 8.2 to 8.5, 9, 10.3 to 10.8).

use super::join;
use super::occupants::Place;
use super::presence::Show;
use super::privilege::{Role, may_change_affiliation, may_change_role, may_list};
use super::{NS_ADMIN, NS_USER, Room};
use crate::store::room::{Affiliate, Affiliation};
use crate::xml::Element;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::error::StanzaError;
use crate::xmpp::iq::Iq;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::Slice;

/// Items in one request.
const ITEMS_MAX: usize = 500;
const REASON_BYTES_MAX: usize = 1024;

/// What is to become of somebody.
enum Change {
    Role(Place, Role),
    Affiliation(String, Affiliation),
}

pub fn handle(slice: &mut Slice, room: &mut Room, iq: Iq) {
    let result = match iq.set {
        true => set(slice, room, &iq),
        false => get(room, &iq).map(Some),
    };
    match result {
        Ok(Some(answer)) => slice.iq_result(&iq, Some(answer)),
        // answered when it is durable
        Ok(None) => {}
        Err(error) => slice.iq_error(&iq, &error),
    }
}

/// Who asks: his affiliation, and his role if he is in.
fn standing(room: &Room, from: &Jid<'_>) -> (Affiliation, Role) {
    let affiliation = room.state.affiliation(from.bare());
    let place = room.occupants.find(from.as_str());
    let role = place.and_then(|place| room.occupants.get(place));
    (affiliation, role.map_or(Role::None, |o| o.role))
}

fn get(room: &Room, iq: &Iq) -> Result<Element, StanzaError> {
    let mut items = iq.payload.elements().filter(|e| e.is("item", NS_ADMIN));
    let (Some(item), None) = (items.next(), items.next()) else {
        return Err(StanzaError::BAD_REQUEST);
    };
    let asker = standing(room, &iq.from);
    let mut answer = Element::new("query", NS_ADMIN);
    if let Some(affiliation) = item.get("affiliation") {
        let wanted = Affiliation::parse(affiliation).ok_or(StanzaError::BAD_REQUEST)?;
        let member = room.state.settings.members_only && asker.0 >= Affiliation::Member;
        let among = member && wanted >= Affiliation::Member && room.state.settings.non_anonymous;
        if !among && !may_list(&room.state.settings, asker, wanted) {
            return Err(StanzaError::FORBIDDEN);
        }
        for one in &room.state.affiliates {
            if one.affiliation == wanted {
                answer = answer.child(listed(one));
            }
        }
        return Ok(answer);
    }
    let role = item.get("role").and_then(Role::parse);
    let role = role.ok_or(StanzaError::BAD_REQUEST)?;
    // 8.5, 9.8
    let may =
        asker.0 >= Affiliation::Admin || (asker.1 == Role::Moderator && role != Role::Moderator);
    if !may {
        return Err(StanzaError::FORBIDDEN);
    }
    for (_, occupant) in room.occupants.iter().filter(|(_, o)| o.role == role) {
        let jid = occupant.sessions.last().map_or(&*occupant.bare, |s| &s.jid);
        let item = Element::new("item", NS_ADMIN)
            .attr("affiliation", occupant.affiliation.as_str())
            .attr("jid", jid)
            .attr("nick", &*occupant.nick)
            .attr("role", role.as_str());
        answer = answer.child(item);
    }
    Ok(answer)
}

fn listed(one: &Affiliate) -> Element {
    let mut item = Element::new("item", NS_ADMIN)
        .attr("affiliation", one.affiliation.as_str())
        .attr("jid", &*one.jid);
    if !one.nick.is_empty() {
        item.set("nick", &*one.nick);
    }
    match one.reason.is_empty() {
        true => item,
        false => item.child(Element::new("reason", NS_ADMIN).text(&*one.reason)),
    }
}

/// All or nothing. `None`: it is answered when it is durable.
fn set(slice: &mut Slice, room: &mut Room, iq: &Iq) -> Result<Option<Element>, StanzaError> {
    let asker = standing(room, &iq.from);
    let asker_nick = room.occupants.find(iq.from.as_str());
    let asker_nick = asker_nick.and_then(|place| room.occupants.get(place));
    let asker_nick: Option<Box<str>> = asker_nick.map(|o| o.nick.clone());
    let mut changes = Vec::new();
    for item in iq.payload.elements().filter(|e| e.is("item", NS_ADMIN)) {
        if changes.len() == ITEMS_MAX {
            return Err(StanzaError::POLICY_VIOLATION.text("too many items in one request"));
        }
        let reason = item.find("reason", NS_ADMIN).map(Element::text_content);
        if reason.as_ref().is_some_and(|r| r.len() > REASON_BYTES_MAX) {
            return Err(StanzaError::POLICY_VIOLATION.text("the reason is too long"));
        }
        changes.push((change(room, iq, asker, item)?, reason));
    }
    if changes.is_empty() {
        return Err(StanzaError::BAD_REQUEST);
    }
    let lasting = changes
        .iter()
        .any(|(change, _)| matches!(change, Change::Affiliation(..)));
    let owners_before = room.state.owners();
    let mut state = room.state.clone();
    for (change, reason) in &changes {
        if let Change::Affiliation(jid, affiliation) = change {
            state.affiliate_as(Affiliate {
                jid: jid.clone(),
                affiliation: *affiliation,
                nick: String::new(),
                reason: reason.clone().unwrap_or_default(),
            });
        }
    }
    // 10.4: a room has an owner
    if owners_before > 0 && state.owners() == 0 {
        return Err(StanzaError::CONFLICT.text("a room must have an owner"));
    }
    if state.affiliates.len() > slice.env.limits.rooms.affiliates_max
        && state.affiliates.len() > room.state.affiliates.len()
    {
        slice.counters.room_refused += 1;
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("the room has too many affiliations"));
    }
    // who has it already hears nothing
    changes.retain(|(change, _)| match change {
        Change::Role(..) => true,
        Change::Affiliation(jid, _) => state.affiliation(jid) != room.state.affiliation(jid),
    });
    let actor = asker_nick.clone();
    if !lasting {
        for (change, reason) in changes {
            if let Change::Role(place, role) = change {
                let actor = actor.as_deref().unwrap_or_default();
                set_role(slice, room, place, role, actor, reason.as_deref());
            }
        }
        slice.iq_result(iq, None);
        return Ok(None);
    }
    let answer = Iq {
        session: iq.session,
        from: iq.from.clone(),
        to: iq.to.clone(),
        id: iq.id.clone(),
        set: true,
        payload: Element::new("query", NS_ADMIN),
        receipt: iq.receipt,
    };
    room.change(
        slice,
        move |old| *old = state,
        move |slice, room| {
            for (change, reason) in changes {
                match change {
                    Change::Role(place, role) => {
                        let actor = actor.as_deref().unwrap_or_default();
                        set_role(slice, room, place, role, actor, reason.as_deref());
                    }
                    Change::Affiliation(jid, _) => {
                        affiliated(slice, room, &jid, actor.as_deref(), reason.as_deref());
                    }
                }
            }
            slice.iq_result(&answer, None);
        },
    )?;
    Ok(None)
}

fn change(
    room: &Room,
    iq: &Iq,
    asker: (Affiliation, Role),
    item: &Element,
) -> Result<Change, StanzaError> {
    let nick = item.get("nick");
    let named = nick.and_then(|nick| room.occupants.named(nick));
    match (item.get("role"), item.get("affiliation")) {
        (Some(role), None) => {
            let role = Role::parse(role).ok_or(StanzaError::BAD_REQUEST)?;
            // who may nothing here learns nothing of who is in
            if asker.1 < Role::Moderator && asker.0 < Affiliation::Admin {
                return Err(StanzaError::FORBIDDEN);
            }
            let by_jid = item.get("jid").and_then(|jid| room.occupants.find(jid));
            let place = named.or(by_jid);
            let target = place.and_then(|place| Some((place, room.occupants.get(place)?)));
            let (place, target) = target.ok_or(StanzaError::ITEM_NOT_FOUND)?;
            may_change_role(asker, (target.affiliation, target.role), role)?;
            Ok(Change::Role(place, role))
        }
        (None, Some(affiliation)) => {
            let new = Affiliation::parse(affiliation).ok_or(StanzaError::BAD_REQUEST)?;
            if asker.0 < Affiliation::Admin {
                return Err(StanzaError::FORBIDDEN);
            }
            let jid = match (item.get("jid"), named) {
                (Some(jid), _) => {
                    let jid = Jid::parse(jid).map_err(|_| StanzaError::JID_MALFORMED)?;
                    jid.bare().to_owned()
                }
                (None, Some(place)) => {
                    let occupant = room.occupants.get(place);
                    occupant
                        .ok_or(StanzaError::ITEM_NOT_FOUND)?
                        .bare
                        .to_string()
                }
                (None, None) if nick.is_some() => return Err(StanzaError::ITEM_NOT_FOUND),
                (None, None) => return Err(StanzaError::BAD_REQUEST),
            };
            // 9.1: nobody bans himself
            if new == Affiliation::Outcast && jid == iq.from.bare() {
                return Err(StanzaError::CONFLICT);
            }
            may_change_affiliation(asker.0, room.state.affiliation(&jid), new)?;
            Ok(Change::Affiliation(jid, new))
        }
        _ => Err(StanzaError::BAD_REQUEST),
    }
}

/// The role of somebody who is in becomes another one; none: he is kicked (8.2).
pub fn set_role(
    slice: &mut Slice,
    room: &mut Room,
    place: Place,
    role: Role,
    actor: &str,
    reason: Option<&str>,
) {
    let actor = Some(actor).filter(|actor| !actor.is_empty());
    let Some(occupant) = room.occupants.get_mut(place) else {
        return;
    };
    if role == Role::None {
        let show = Show {
            statuses: &[307],
            actor,
            reason,
            ..Show::gone(occupant)
        };
        return join::put_out(slice, room, place, &show);
    }
    if occupant.role == role {
        return;
    }
    let old = std::mem::replace(&mut occupant.role, role);
    let show = Show {
        actor,
        reason,
        ..Show::here(occupant)
    };
    room.became(slice, place, old, &show);
}

/// The affiliation of a person has changed, durably: those of his nicknames who are in get it, and what comes with it.
pub fn affiliated(
    slice: &mut Slice,
    room: &mut Room,
    jid: &str,
    actor: Option<&str>,
    reason: Option<&str>,
) {
    // an entry may be for a whole domain
    let domain = |bare: &str| {
        bare.split_once('@')
            .is_some_and(|(_, domain)| domain == jid)
    };
    if room.occupants.of(jid).next().is_none() {
        tell_absent(slice, room, jid, reason);
    }
    for place in room.occupants.places() {
        let moderated = room.state.settings.moderated;
        let members_only = room.state.settings.members_only;
        let Some(occupant) = room.occupants.get_mut(place) else {
            continue;
        };
        if *occupant.bare != *jid && !domain(&occupant.bare) {
            continue;
        }
        let new = room.state.affiliation(&occupant.bare);
        let old = std::mem::replace(&mut occupant.affiliation, new);
        if old == new {
            continue;
        }
        let statuses: &[u16] = match new {
            Affiliation::Outcast => &[301],
            Affiliation::None if members_only => &[321],
            _ => &[],
        };
        if !statuses.is_empty() {
            let show = Show {
                statuses,
                actor,
                reason,
                ..Show::gone(occupant)
            };
            join::put_out(slice, room, place, &show);
            continue;
        }
        let role = match occupant.role {
            _ if new >= Affiliation::Admin => Role::Moderator,
            _ if old >= Affiliation::Admin => new.role(moderated),
            Role::Visitor if new == Affiliation::Member => Role::Participant,
            role => role,
        };
        let was = std::mem::replace(&mut occupant.role, role);
        let show = Show {
            actor,
            reason,
            ..Show::here(occupant)
        };
        room.became(slice, place, was, &show);
    }
}

/// Status 101: somebody's affiliation has changed while he is not in the room. It is not kept for him.
fn tell_absent(slice: &mut Slice, room: &Room, jid: &str, reason: Option<&str>) {
    let Ok(to) = Jid::parse(jid) else { return };
    if !slice.env.is_local(&to) || to.local().is_none() {
        return;
    }
    let mut item = Element::new("item", NS_USER)
        .attr("affiliation", room.state.affiliation(jid).as_str())
        .attr("jid", jid)
        .attr("role", Role::None.as_str());
    if let Some(reason) = reason {
        item = item.child(Element::new("reason", NS_USER).text(reason));
    }
    let status = Element::new("status", NS_USER).attr("code", "101");
    let message = Element::new("message", NS_CLIENT)
        .attr("to", jid)
        .attr("id", crate::xmpp::random_id())
        .child(Element::new("x", NS_USER).child(item).child(status))
        .attr("from", &*room.jid);
    let meta = Meta::new(Kind::Normal).with(Meta::SERVER | Meta::ROOM | Meta::NO_STORE);
    slice.route_element(&to, &room.jid, &message, meta, None);
}

impl Room {
    /// Somebody's role or affiliation is another one: all learn it. Who begins to see real addresses sees all anew.
    fn became(&self, slice: &mut Slice, place: Place, old: Role, show: &Show<'_>) {
        let bit = |role: Role| self.state.settings.presence_of & role.bit() != 0;
        if bit(old) && !bit(show.role) {
            // others do not see such people
            let gone = Show {
                kind: Kind::Unavailable,
                role: Role::None,
                ..show.clone()
            };
            self.tell_others_of(slice, place, &gone);
            self.tell_himself(slice, place, show);
        } else {
            self.tell(slice, place, show);
        }
        let sees_now = self.shows_jids_to(show.role) && !self.shows_jids_to(old);
        let sessions = self.occupants.get(place).filter(|_| sees_now);
        let sessions: Vec<Box<str>> = sessions
            .map(|o| o.sessions.iter().map(|s| s.jid.clone()).collect())
            .unwrap_or_default();
        for jid in sessions {
            self.tell_of_others(slice, place, &jid);
        }
    }
}
