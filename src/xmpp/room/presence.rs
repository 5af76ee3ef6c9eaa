//! How the presence of somebody in a room is written (XEP-0045 section 7.2), and to whom it is told: others see a real address
//! only in a room that shows it, or as moderators (section 4.2).

use aws_lc_rs::hmac;

use super::fanout::{self, Audience};
use super::occupants::{Occupant, Place};
use super::privilege::Role;
use super::{NS, NS_USER, Room};
use crate::store::room::Affiliation;
use crate::xml::Element;
use crate::xml::escape::escape_text;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::feature::occupant_id;
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::{Env, Slice};

/// What is told of somebody beside what he is.
#[derive(Clone, Debug)]
pub struct Show<'a> {
    pub kind: Kind,
    pub affiliation: Affiliation,
    pub role: Role,
    /// To all; 110 is added for himself.
    pub statuses: &'a [u16],
    /// To himself only.
    pub own_statuses: &'a [u16],
    /// Section 7.6.
    pub new_nick: Option<&'a str>,
    /// The nickname of who did it.
    pub actor: Option<&'a str>,
    pub reason: Option<&'a str>,
    /// Section 10.9.
    pub destroy: Option<&'a Element>,
    /// He goes by himself, and his presence says how.
    pub farewell: bool,
    /// Of the stanza that it answers, for who has sent it.
    pub id: Option<&'a str>,
}

impl Show<'_> {
    /// He is there, as he is.
    pub fn here(occupant: &Occupant) -> Show<'static> {
        Show {
            kind: Kind::Available,
            affiliation: occupant.affiliation,
            role: occupant.role,
            statuses: &[],
            own_statuses: &[],
            new_nick: None,
            actor: None,
            reason: None,
            destroy: None,
            farewell: false,
            id: None,
        }
    }

    /// He has gone.
    pub fn gone(occupant: &Occupant) -> Show<'static> {
        Show {
            kind: Kind::Unavailable,
            role: Role::None,
            ..Show::here(occupant)
        }
    }
}

/// XEP-0421: the same for a person whenever he is in this room, telling nothing of him.
pub fn occupant_id(env: &Env, room: &str, bare: &str) -> Box<str> {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&env.id_key[0].to_be_bytes());
    key[8..].copy_from_slice(&env.id_key[1].to_be_bytes());
    let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
    let mut signed = b"occupant-id\0".to_vec();
    signed.extend_from_slice(room.as_bytes());
    signed.push(0);
    signed.extend_from_slice(bare.as_bytes());
    let tag = hmac::sign(&key, &signed);
    let hex = tag.as_ref()[..20].iter().map(|b| format!("{b:02x}"));
    hex.collect::<String>().into()
}

/// The payload of a client's presence that goes on to others, as XML: all but what the room writes itself.
pub fn payload(presence: &Element) -> Vec<u8> {
    let mut out = Vec::new();
    for child in presence.elements() {
        let own = child.ns == NS || child.ns == NS_USER || child.ns == occupant_id::NS;
        if !own {
            child.write(&mut out, NS_CLIENT);
        }
    }
    out
}

/// `<presence/>` without `to`.
fn write(
    room: &Room,
    occupant: &Occupant,
    payload: &[u8],
    show: &Show<'_>,
    jid: Option<&str>,
    own: bool,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(320 + payload.len());
    out.extend_from_slice(b"<presence");
    if show.kind == Kind::Unavailable {
        out.extend_from_slice(b" type='unavailable'");
    }
    if let Some(id) = show.id.filter(|_| own) {
        attribute("id", id, &mut out);
    }
    attribute("from", &room.occupant_jid(&occupant.nick), &mut out);
    out.push(b'>');
    out.extend_from_slice(payload);
    out.extend_from_slice(b"<x xmlns='http://jabber.org/protocol/muc#user'><item");
    attribute("affiliation", show.affiliation.as_str(), &mut out);
    attribute("role", show.role.as_str(), &mut out);
    if let Some(jid) = jid {
        attribute("jid", jid, &mut out);
    }
    if let Some(nick) = show.new_nick {
        attribute("nick", nick, &mut out);
    }
    if show.actor.is_none() && show.reason.is_none() {
        out.extend_from_slice(b"/>");
    } else {
        out.push(b'>');
        if let Some(actor) = show.actor {
            out.extend_from_slice(b"<actor");
            attribute("nick", actor, &mut out);
            out.extend_from_slice(b"/>");
        }
        if let Some(reason) = show.reason {
            out.extend_from_slice(b"<reason>");
            escape_text(reason, &mut out);
            out.extend_from_slice(b"</reason>");
        }
        out.extend_from_slice(b"</item>");
    }
    if let Some(destroy) = show.destroy {
        destroy.write(&mut out, NS_USER);
    }
    let mut status = |code: u16| {
        out.extend_from_slice(b"<status code='");
        out.extend_from_slice(code.to_string().as_bytes());
        out.extend_from_slice(b"'/>");
    };
    if own {
        show.own_statuses.iter().copied().for_each(&mut status);
        status(110);
    }
    show.statuses.iter().copied().for_each(status);
    out.extend_from_slice(b"</x><occupant-id xmlns='urn:xmpp:occupant-id:0'");
    attribute("id", &occupant.id, &mut out);
    out.extend_from_slice(b"/></presence>");
    out
}

impl Room {
    /// Does somebody with this role see real addresses?
    pub fn shows_jids_to(&self, role: Role) -> bool {
        self.state.settings.non_anonymous || role == Role::Moderator
    }

    /// Is the presence of somebody with this role shown to others (`muc#roomconfig_presencebroadcast`)?
    fn shows(&self, role: Role) -> bool {
        self.state.settings.presence_of & role.bit() != 0
    }

    /// Those who are in, by whether they see real addresses, perhaps but for one.
    pub fn audiences(&self, env: &Env, besides: Option<Place>) -> (Audience, Audience) {
        let (mut see, mut others) = (Audience::default(), Audience::default());
        for (place, occupant) in self.occupants.iter() {
            if Some(place) == besides {
                continue;
            }
            let audience = match self.shows_jids_to(occupant.role) {
                true => &mut see,
                false => &mut others,
            };
            for session in &occupant.sessions {
                audience.add(env, &session.jid);
            }
        }
        (see, others)
    }

    pub fn everybody(&self, env: &Env) -> Audience {
        Audience::of(env, self.occupants.sessions())
    }

    /// Tells everybody of one occupant, and himself last.
    pub fn tell(&self, slice: &mut Slice, place: Place, show: &Show<'_>) {
        self.tell_others(slice, place, show);
        self.tell_himself(slice, place, show);
    }

    /// `show` may be of a role that he has no more: what counts is whether others have seen him.
    pub fn tell_others(&self, slice: &mut Slice, place: Place, show: &Show<'_>) {
        let Some(occupant) = self.occupants.get(place) else {
            return;
        };
        let seen_as = match show.kind {
            Kind::Unavailable => occupant.role,
            _ => show.role,
        };
        if self.shows(seen_as) {
            self.tell_others_of(slice, place, show);
        }
    }

    /// The same, whatever others may see.
    pub fn tell_others_of(&self, slice: &mut Slice, place: Place, show: &Show<'_>) {
        let Some(occupant) = self.occupants.get(place) else {
            return;
        };
        let audiences = self.audiences(&slice.env, Some(place));
        self.tell_each(slice, occupant, show, &audiences);
    }

    /// Tells these of somebody who was in, as far as others have seen him.
    pub fn tell_those(
        &self,
        slice: &mut Slice,
        occupant: &Occupant,
        show: &Show<'_>,
        audiences: &(Audience, Audience),
    ) {
        if self.shows(occupant.role) {
            self.tell_each(slice, occupant, show, audiences);
        }
    }

    fn tell_each(
        &self,
        slice: &mut Slice,
        occupant: &Occupant,
        show: &Show<'_>,
        (see, others): &(Audience, Audience),
    ) {
        let payload = match show.farewell || show.kind == Kind::Available {
            true => occupant.presence(),
            false => b"",
        };
        let jid = occupant.sessions.last().map(|s| &*s.jid);
        let meta = Meta::new(show.kind).with(Meta::LAZY);
        let full = write(self, occupant, payload, show, jid, false);
        fanout::send(slice, see, &full, meta);
        let plain = write(self, occupant, payload, show, None, false);
        fanout::send(slice, others, &plain, meta);
    }

    /// Tells somebody of himself (status 110), each of his sessions.
    pub fn tell_himself(&self, slice: &mut Slice, place: Place, show: &Show<'_>) {
        if let Some(occupant) = self.occupants.get(place) {
            let jids: Vec<Box<str>> = occupant.sessions.iter().map(|s| s.jid.clone()).collect();
            for jid in jids {
                self.tell_session(slice, place, &jid, show);
            }
        }
    }

    /// The same for one session.
    pub fn tell_session(&self, slice: &mut Slice, place: Place, jid: &str, show: &Show<'_>) {
        let Some(occupant) = self.occupants.get(place) else {
            return;
        };
        let payload = match show.farewell || show.kind == Kind::Available {
            true => occupant.presence(),
            false => b"",
        };
        let own = write(self, occupant, payload, show, Some(jid), true);
        let renamed = show.new_nick.is_some();
        let out = match show.kind {
            Kind::Unavailable if !renamed => Meta::OUT,
            Kind::Available => Meta::IN,
            _ => 0,
        };
        let audience = Audience::of(&slice.env, [jid]);
        fanout::send(slice, &audience, &own, Meta::new(show.kind).with(out));
    }

    /// Section 7.2.3: one who comes in learns of all who are in.
    pub fn tell_of_others(&self, slice: &mut Slice, place: Place, jid: &str) {
        let Some(newcomer) = self.occupants.get(place) else {
            return;
        };
        let sees = self.shows_jids_to(newcomer.role);
        let mut stanzas = Vec::new();
        for (other, occupant) in self.occupants.iter() {
            if other == place || !self.shows(occupant.role) {
                continue;
            }
            let real = occupant.sessions.last().map(|s| &*s.jid);
            let real = real.filter(|_| sees);
            let here = Show::here(occupant);
            stanzas.push(write(
                self,
                occupant,
                occupant.presence(),
                &here,
                real,
                false,
            ));
        }
        let audience = Audience::of(&slice.env, [jid]);
        fanout::send_all(slice, &audience, &stanzas, Meta::new(Kind::Available));
    }
}
