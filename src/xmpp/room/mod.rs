//! Chat rooms (XEP-0045): state, occupants, and what they say.
//!
//! A room lives in the slice of the shard that owns its name (`NAME@rooms`, by the same ring as users), beside the users there.
//! In: stanzas that sessions have sent to the room ([`outbound`] at the session's shard, then the mesh, then [`deliver`]).
//! Out: stanzas for single people by [`Slice::route`], and for many by [`fanout`]: one mesh item for each shard, with shared
//! bytes and the list of recipients, `to` spliced in at their shard. Promises: a message is in the room's journal before anybody
//! sees it and before its sender's count covers it, a change of the room before it is told; all who are in see all that happens
//! in one order, that in which the room took it: what could overtake a message or a change that waits for the journal queues
//! behind it ([`Flow`]). Occupants are in memory only: after a crash there are none, and XEP-0410 tells them.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | the room as a value, the way in, order, changes that must be durable |
//! | `occupants.rs` | who is in, under which nickname, from which sessions; rates |
//! | `privilege.rs` | roles, affiliations, who may do what (section 5) |
//! | `nick.rs` | which nicknames are the same or look alike (RFC 8266) |
//! | `join.rs` | coming in, another nickname, going (section 7.1, 7.2, 7.6, 7.14) |
//! | `presence.rs` | how occupants' presence is written and to whom it is told |
//! | `message.rs` | to all, to one, the subject (section 7.4, 7.5, 8.1) |
//! | `mediated.rs` | invitations, declines, requests for voice and registration by message (section 7.8, 7.13, 8.6) |
//! | `history.rs` | the last messages, for those who come in (section 7.2.13) |
//! | `admin.rs` | kick, voice, ban, lists (section 8, 9, 10.3 to 10.8) |
//! | `owner.rs` | making, configuring, destroying (section 10) |
//! | `settings.rs` | the configuration form (section 10.2) |
//! | `iq.rs` | requests to the room and between occupants |
//! | `info.rs` | what a room says of itself: disco, registration, avatar, archive |
//! | `host.rs` | the service itself: `rooms.DOMAIN` without a room |
//! | `directory.rs` | the list of rooms, on each shard |
//! | `fanout.rs` | one stanza for many occupants |

pub mod admin;
pub mod directory;
pub mod fanout;
pub mod history;
pub mod host;
pub mod info;
pub mod iq;
pub mod join;
pub mod mediated;
pub mod message;
pub mod moderation;
pub mod nick;
pub mod occupants;
pub mod owner;
pub mod presence;
pub mod privilege;
pub mod settings;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

use smallvec::SmallVec;

use self::history::History;
use self::occupants::Occupants;
use super::batch::Receipt;
use super::error::StanzaError;
use super::jid::Jid;
use super::ledger::Act;
use super::message::{bounce_out, compose, may_send};
use super::meta::{Kind, Meta};
use super::session::SessionId;
use super::slice::{Fate, Slice, Slot, Waiting, WriteError};
use crate::store::change::Change;
use crate::store::record::Record;
use crate::store::room::{LABEL, RoomRecord};
use crate::store::tier::Loaded;
use crate::store::warm::Warm;
use crate::xml::Element;
use crate::xml::view::View;

pub const NS: &str = "http://jabber.org/protocol/muc";
pub const NS_USER: &str = "http://jabber.org/protocol/muc#user";
pub const NS_ADMIN: &str = "http://jabber.org/protocol/muc#admin";
pub const NS_OWNER: &str = "http://jabber.org/protocol/muc#owner";

/// Bounds of rooms; from the configuration.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Who may make a room: everybody, or these (bare JIDs).
    pub creators: Option<Vec<String>>,
    /// Rooms that a shard has in memory.
    pub rooms_max: usize,
    /// Rooms that a session is in.
    pub per_session_max: usize,
    /// Presences of one session for rooms in a second, on average; twelve times as many at once.
    pub session_presences_per_second_max: u32,
    pub occupants_max: usize,
    pub affiliates_max: usize,
    pub nick_bytes_max: usize,
    pub subject_bytes_max: usize,
    /// Messages, and their bytes, that a room keeps for those who come in.
    pub history_max: usize,
    pub history_bytes_max: usize,
    /// Messages of one occupant in a second, on average.
    pub messages_per_second_max: u32,
    /// The same of presence; three times as much at once.
    pub presences_per_second_max: u32,
    /// Lasting rooms that one person has made, and that there are.
    pub lasting_per_owner_max: usize,
    pub lasting_max: usize,
    /// How long a temporary room that was there at the start waits for those who come back; 0: for ever.
    pub left_ms: u64,
    /// Registrations with a room in a second, on average; twenty times as many at once.
    pub registrations_per_second_max: u32,
    /// Requests for membership of a room that wait for an admin.
    pub requests_max: usize,
    /// What a room is when its maker says nothing.
    pub persistent: bool,
    /// How long messages stay in the archives of rooms; 0: for ever.
    pub archive_keep_ms: u64,
}

/// Seconds' worth of a session's presence that may come at once: a client that comes into all its rooms, and sets a status.
const SESSION_BURST: u32 = 12;

/// The store's name of a room.
pub fn entity(local: &str) -> String {
    format!("{local}@{LABEL}")
}

/// Is it the store's name of a room?
pub fn is_entity(name: &str) -> bool {
    name.contains('@')
}

/// What a slice has of rooms beside the rooms.
#[derive(Default)]
pub struct Rooms {
    /// Rooms in memory.
    pub count: usize,
    /// Came for a room that was at work, or behind the end of one: dealt with when no room is at work any more.
    again: VecDeque<Waiting>,
    /// Rooms at work, each inside the one before.
    depth: u32,
    /// Domains that a room wanted to reach and nobody serves, by the room's bare JID.
    deserted: Vec<(Box<str>, Box<str>)>,
    /// Store's names of rooms with people whom a component does not reach.
    unreached: Vec<Rc<str>>,
    pub directory: directory::Directory,
}

impl Rooms {
    fn desert(&mut self, room: &str, domain: &str) {
        let known = |(one, of): &(Box<str>, Box<str>)| **one == *room && **of == *domain;
        if !self.deserted.iter().any(known) {
            self.deserted.push((room.into(), domain.into()));
        }
    }

    fn next_deserted(&mut self, room: &str) -> Option<Box<str>> {
        let at = self.deserted.iter().position(|(one, _)| **one == *room)?;
        Some(self.deserted.swap_remove(at).1)
    }
}

/// A room of this slice, loaded.
pub struct Room {
    /// The store's name.
    pub name: Rc<str>,
    /// Bare JID.
    pub jid: Rc<str>,
    pub state: RoomRecord,
    record: Record,
    revision: u64,
    /// Of the newest record that is durable.
    durable: u64,
    /// Its maker has not configured it yet (section 10.1): nobody else comes in.
    pub locked: bool,
    /// Is about to be destroyed; it is.
    pub ending: bool,
    gone: bool,
    pub occupants: Occupants,
    /// Full JIDs of sessions that a component serves and what was sent to them came back: out at the next tick, all at once.
    unreached: HashSet<Box<str>>,
    pub history: History,
    /// Everybody who is in, as of the last message.
    audience: Option<fanout::Audience>,
    /// Bare JID of who has made it; empty: not known yet. It counts for him while it lasts.
    maker: Box<str>,
    /// It was taken from the affiliations: the database may know better.
    maker_guessed: bool,
    /// Nicknames that are kept for people.
    reserved: nick::Reserved,
    /// Bare JIDs of those who have asked to be members, and when; ms of the monotonic clock.
    asked: HashMap<Box<str>, u64>,
    registrations: occupants::Bucket,
    /// Queries of its archive at work.
    pub queries: usize,
    /// When archive queries came last, and how many then; ms of the monotonic clock.
    pub pages: (u64, u8),
    flow: Flow,
}

/// What keeps the order: a stanza is dealt with when nothing that came before it waits for the journal, or is a message behind
/// messages.
#[derive(Default)]
struct Flow {
    /// Messages in the journal's hands.
    messages: u32,
    /// Changes in the journal's hands.
    changes: u32,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
}

/// Bytes of a room beside its record and what it holds.
const ROOM_BYTES: usize = 512;

impl Room {
    fn new(slice: &mut Slice, name: &str, jid: &str, record: Record, revision: u64) -> Room {
        slice.rooms.count += 1;
        Room {
            name: name.into(),
            jid: jid.into(),
            state: record.to_room().unwrap_or_default(),
            record,
            revision,
            durable: revision,
            locked: false,
            ending: false,
            gone: false,
            occupants: Occupants::default(),
            unreached: HashSet::new(),
            history: History::default(),
            audience: None,
            maker: "".into(),
            maker_guessed: true,
            reserved: nick::Reserved::default(),
            asked: HashMap::new(),
            registrations: occupants::Bucket::default(),
            queries: 0,
            pages: (0, 0),
            flow: Flow::default(),
        }
    }

    /// The local part of its address.
    pub fn local(&self) -> &str {
        self.jid.split('@').next().unwrap_or_default()
    }

    pub fn bytes(&self) -> usize {
        ROOM_BYTES + self.record.bytes().len() + self.history.bytes()
    }

    /// What Redis keeps of it; `None`: a newer record is about to be durable.
    pub fn warm(&self) -> Option<Warm> {
        (self.revision == self.durable).then(|| Warm {
            revision: self.revision,
            record: Some(self.record.clone()),
            last: None,
            index: None,
            pending: false,
        })
    }

    /// The address of somebody in it.
    pub fn occupant_jid(&self, nick: &str) -> String {
        format!("{}/{nick}", self.jid)
    }

    fn is_idle(&self) -> bool {
        self.flow.changes == 0 && self.flow.messages == 0
    }
}

// ---- at the shard of a session -----------------------------------------------------------------------------------------

/// Presence of a session of this slice for a room.
pub fn outbound(slice: &mut Slice, sid: SessionId, view: &View<'_>, kind: Kind, to: &Jid<'_>) {
    if to.local().is_none() {
        return;
    }
    if let Err(error) = may_send(slice, sid, to) {
        return bounce_out(slice, sid, view, &error);
    }
    let limits = &slice.env.limits.rooms;
    let (most, rate) = (
        limits.per_session_max,
        limits.session_presences_per_second_max,
    );
    let ms = slice.now.ms;
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    let listed = session.rooms.iter().position(|room| **room == *to.bare());
    if !session.rooms_rate.take(ms, rate, SESSION_BURST) {
        match kind {
            Kind::Available => {
                slice.counters.room_refused += 1;
                let error = StanzaError::RESOURCE_CONSTRAINT.text("too much presence for rooms");
                return bounce_out(slice, sid, view, &error.wait());
            }
            // leaving what it is in is always possible, and nobody misses the rest
            _ if listed.is_none() => {
                slice.counters.room_refused += 1;
                return;
            }
            _ => {}
        }
    }
    match (kind, listed) {
        // section 7.2.1
        (Kind::Available, _) if to.is_bare() => {
            return bounce_out(slice, sid, view, &StanzaError::JID_MALFORMED);
        }
        (Kind::Available, None) => {
            if session.rooms.len() >= most {
                slice.counters.room_refused += 1;
                let error = StanzaError::RESOURCE_CONSTRAINT.text("in too many rooms");
                return bounce_out(slice, sid, view, &error);
            }
            session.rooms.push(to.bare().into());
        }
        (Kind::Unavailable, Some(at)) => {
            session.rooms.swap_remove(at);
        }
        _ => {}
    }
    let (jid, user) = (session.jid.clone(), session.user.clone());
    let lang = session.lang.clone();
    let mut stanza = compose(view, &jid, Some(to), lang.as_deref(), Vec::new());
    if kind == Kind::Available {
        stanza = crate::xmpp::feature::avatar::announce(slice, &user, view, stanza);
    }
    slice.route(to, &jid, &stanza, Meta::new(kind), None);
}

/// A session has gone: the rooms it was in learn it.
pub fn leave_all(slice: &mut Slice, jid: &str, stanza: &[u8], rooms: SmallVec<[Box<str>; 0]>) {
    for room in rooms {
        if let Ok(room) = Jid::parse(&room) {
            slice.route(&room, jid, stanza, Meta::new(Kind::Unavailable), None);
        }
    }
}

// ---- at the room's shard -----------------------------------------------------------------------------------------------

/// A stanza for a room of this slice.
pub fn deliver(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    let Some(name) = slice.env.entity(to) else {
        return Fate::Decided;
    };
    let limits = &slice.env.limits;
    let full = match slice.users.get_mut(&name) {
        Some(Slot::Room(Some(_))) => {
            let waiting = waiting_of(to, from, stanza, meta, receipt);
            let fate = at_work(slice, &name, |slice, room| room.take_in(slice, waiting));
            return fate.unwrap_or(Fate::Decided);
        }
        Some(Slot::Room(None)) => {
            // it has caused this stanza itself
            let waiting = waiting_of(to, from, stanza, meta, receipt);
            slice.rooms.again.push_back(waiting);
            return Fate::Open;
        }
        Some(Slot::Missing) => return missing(slice, &name, to, from, stanza, meta),
        Some(Slot::Present(_)) => return Fate::Decided,
        Some(Slot::Loading { bytes, .. }) => *bytes + stanza.len() > limits.load_queue_bytes_max,
        // nobody is in a room that is not loaded
        None if !meta.kind.may_bounce() || matches!(meta.kind, Kind::Unavailable | Kind::Probe) => {
            return Fate::Decided;
        }
        None => false,
    };
    if full {
        slice.counters.load_queue_full += 1;
        slice.bounce(to, from, stanza, meta, &StanzaError::RESOURCE_CONSTRAINT);
        return Fate::Decided;
    }
    slice.want(&name);
    if let Some(Slot::Loading { bytes, .. }) = slice.users.get_mut(&name) {
        *bytes += stanza.len();
    }
    slice.wait_for_load(to, from, stanza, meta, receipt);
    Fate::Open
}

/// There is no such room: somebody may make it.
fn missing(
    slice: &mut Slice,
    name: &str,
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
) -> Fate {
    match meta.kind {
        Kind::Available => owner::create(slice, name, to, from, stanza),
        Kind::Unavailable | Kind::Probe => {}
        _ => slice.bounce(to, from, stanza, meta, &StanzaError::ITEM_NOT_FOUND),
    }
    Fate::Decided
}

/// The tier has told of a room: it is there when its last messages are.
pub fn loaded(slice: &mut Slice, name: &str, loaded: Loaded) {
    let Some(host) = slice.env.rooms.clone() else {
        // rooms were switched off
        return slice.loaded(name, Slot::Missing);
    };
    let local = name.split('@').next().unwrap_or_default();
    let jid = format!("{local}@{host}");
    let mut room = Room::new(slice, name, &jid, loaded.record, loaded.revision);
    if !room.state.settings.archived {
        return begin(slice, room);
    }
    let query = history::query(&room, &slice.env.limits.rooms);
    slice.read_archive(
        query,
        Box::new(move |slice, page| {
            match page {
                Ok(page) => room.history.fill(&slice.env, &room.jid, page),
                // the room goes on without
                Err(error) => {
                    tracing::warn!(room = &*room.jid, %error, "the history of a room could not be read");
                }
            }
            begin(slice, room);
        }),
    );
}

fn begin(slice: &mut Slice, mut room: Room) {
    directory::tell(slice, &mut room);
    let name = room.name.clone();
    if !room.state.settings.persistent {
        directory::left(slice, &name);
    }
    slice.loaded(&name, Slot::Room(Some(Box::new(room))));
    slice.ring_known(&name);
}

pub(super) fn waiting_of(
    to: &Jid<'_>,
    from: &str,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Waiting {
    Waiting {
        to: to.as_str().into(),
        from: from.into(),
        stanza: stanza.into(),
        meta,
        receipt,
    }
}

/// Does something with a room and its slice; what comes for the room meanwhile is dealt with after, by the outermost call: one
/// stanza after the other, however many they are, and never one inside the other. `None`: there is no such room, or it is at work.
pub fn at_work<R>(
    slice: &mut Slice,
    name: &str,
    work: impl FnOnce(&mut Slice, &mut Room) -> R,
) -> Option<R> {
    let Some(Slot::Room(place)) = slice.users.get_mut(name) else {
        return None;
    };
    let mut room = place.take()?;
    slice.rooms.depth += 1;
    let was_empty = room.occupants.is_empty();
    let result = work(slice, &mut room);
    room.drop_deserted(slice);
    room.go_on(slice);
    // who is in keeps the room in memory
    match (was_empty, room.occupants.is_empty()) {
        (true, false) => {
            slice.users.pin(name);
        }
        (false, true) => {
            slice.users.unpin(name);
        }
        _ => {}
    }
    if room.gone {
        slice.rooms.count -= 1;
    } else if let Some(Slot::Room(place)) = slice.users.get_mut(name) {
        let bytes = room.bytes();
        *place = Some(room);
        slice.users.set_bytes(name, bytes);
    }
    if slice.rooms.depth == 1 {
        // no room is at work, and those that these stanzas set to work are inside of this one
        while let Some(waiting) = slice.rooms.again.pop_front() {
            slice.deliver_again(waiting);
        }
    }
    slice.rooms.depth -= 1;
    Some(result)
}

/// A few times a second: who was found to be unreachable behind a component that goes on is out.
pub fn tick(slice: &mut Slice) {
    for name in std::mem::take(&mut slice.rooms.unreached) {
        at_work(slice, &name, join::drop_unreached);
    }
}

/// Is who sends it out of the room then?
fn ends_presence(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Unavailable | Kind::PresenceError | Kind::MessageError
    )
}

/// Is who sends it in, or out, then?
fn decides_presence(kind: Kind) -> bool {
    kind == Kind::Available || ends_presence(kind)
}

impl Room {
    fn take_in(&mut self, slice: &mut Slice, waiting: Waiting) -> Fate {
        if self.flow.waiting.is_empty() && self.is_ready(&waiting) {
            return self.deal_with(slice, waiting);
        }
        let full =
            self.flow.waiting_bytes + waiting.stanza.len() > slice.env.limits.load_queue_bytes_max;
        if full && !self.must_hear(&waiting) {
            slice.counters.room_refused += 1;
            if waiting.meta.kind.may_bounce()
                && waiting.meta.kind != Kind::Unavailable
                && let Ok(to) = Jid::parse(&waiting.to)
            {
                let error = &StanzaError::RESOURCE_CONSTRAINT;
                slice.bounce(&to, &waiting.from, &waiting.stanza, waiting.meta, error);
            }
            return Fate::Decided;
        }
        self.flow.waiting_bytes += waiting.stanza.len();
        self.flow.waiting.push_back(waiting);
        Fate::Open
    }

    /// Does somebody go who is in, or is about to be? Nobody stays in as a ghost because the queue is full. So many can wait
    /// beyond its bound as have come in, or wait within it.
    fn must_hear(&self, waiting: &Waiting) -> bool {
        if !ends_presence(waiting.meta.kind) {
            return false;
        }
        let mut own = self.flow.waiting.iter().rev();
        match own.find(|one| one.from == waiting.from && decides_presence(one.meta.kind)) {
            Some(last) => !ends_presence(last.meta.kind),
            None => self.occupants.find(&waiting.from).is_some(),
        }
    }

    /// May it be dealt with before what is in the journal's hands is durable?
    fn is_ready(&self, waiting: &Waiting) -> bool {
        self.is_idle() || (self.flow.changes == 0 && message::only_follows(self, waiting))
    }

    /// What waited goes on, as far as it can.
    fn go_on(&mut self, slice: &mut Slice) {
        while let Some(waiting) = self.flow.waiting.front()
            && self.is_ready(waiting)
            && let Some(waiting) = self.flow.waiting.pop_front()
        {
            self.flow.waiting_bytes -= waiting.stanza.len();
            let receipt = waiting.receipt;
            if let (Fate::Decided, Some(receipt)) = (self.deal_with(slice, waiting), receipt) {
                slice.finish(receipt);
            }
            self.drop_deserted(slice);
        }
    }

    /// Those whom nobody can reach any more are out, all at once.
    fn drop_deserted(&mut self, slice: &mut Slice) {
        while let Some(domain) = slice.rooms.next_deserted(&self.jid) {
            join::drop_domain(slice, self, &domain);
        }
    }

    fn deal_with(&mut self, slice: &mut Slice, stanza: Waiting) -> Fate {
        let (Ok(to), Ok(from)) = (Jid::parse(&stanza.to), Jid::parse(&stanza.from)) else {
            return Fate::Decided;
        };
        if self.ending {
            // what has come behind the end meets nobody, or the room that the first of them makes
            slice.rooms.again.push_back(stanza);
            return Fate::Open;
        }
        let kind = stanza.meta.kind;
        if kind.is_message() {
            message::inbound(slice, self, &to, &from, &stanza)
        } else if kind.is_iq() {
            iq::inbound(slice, self, &to, &from, &stanza)
        } else {
            join::inbound(slice, self, &to, &from, &stanza);
            Fate::Decided
        }
    }

    /// An error for the sender of a stanza.
    pub fn refuse(&self, slice: &mut Slice, to: &Jid<'_>, stanza: &Waiting, error: &StanzaError) {
        slice.bounce(to, &stanza.from, &stanza.stanza, stanza.meta, error);
    }

    /// Sends an element to somebody, wherever he is.
    pub fn send(&self, slice: &mut Slice, to: &Jid<'_>, from: &str, element: &Element, kind: Kind) {
        let meta = Meta::new(kind).with(Meta::SERVER | Meta::ROOM);
        slice.route_element(to, from, element, meta, None);
    }

    /// Changes the state of the room, in memory at once and in the journal; `then` tells what is to be told when it is durable.
    /// Everything else waits until then. An error: it is not made, and `then` does not run.
    pub fn change(
        &mut self,
        slice: &mut Slice,
        change: impl FnOnce(&mut RoomRecord),
        then: impl FnOnce(&mut Slice, &mut Room) + 'static,
    ) -> Result<(), StanzaError> {
        let mut state = self.state.clone();
        change(&mut state);
        self.put(slice, state, false, then)
    }

    fn put(
        &mut self,
        slice: &mut Slice,
        state: RoomRecord,
        new: bool,
        then: impl FnOnce(&mut Slice, &mut Room) + 'static,
    ) -> Result<(), StanzaError> {
        if slice.ledger.full {
            slice.counters.journal_refused += 1;
            return Err(WriteError::Full.into());
        }
        let record = Record::room(&state);
        if record.bytes().len() > slice.env.limits.record_bytes_max {
            return Err(WriteError::TooLarge.into());
        }
        let revision = slice.next_id();
        let name = self.name.clone();
        let change = match new {
            true => Change::AddUser {
                name: &name,
                revision,
                record: record.bytes(),
            },
            false => Change::PutUser {
                name: &name,
                revision,
                record: record.bytes(),
            },
        };
        self.written(slice, &change, move |slice, room| {
            room.durable = revision;
            then(slice, room);
        });
        self.state = state;
        self.record = record;
        self.revision = revision;
        Ok(())
    }

    /// Journals a change of the room's, and goes on with it when it is durable.
    fn written(
        &mut self,
        slice: &mut Slice,
        change: &Change<'_>,
        then: impl FnOnce(&mut Slice, &mut Room) + 'static,
    ) {
        self.flow.changes += 1;
        let name = self.name.clone();
        slice.users.pin(&name);
        let act = Act::Written {
            then: Box::new(move |slice, _| {
                at_work(slice, &name, |slice, room| {
                    room.flow.changes = room.flow.changes.saturating_sub(1);
                    then(slice, room);
                });
            }),
        };
        slice.ledger.journal(&self.name, change, act);
    }
}
