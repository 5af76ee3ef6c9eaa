//! What the Redis ring has to be told of this slice's users, and how far SQL may go before it was.
//!
//! In: changes as their groups become durable, what the ring and SQL say of users, answers to stores. Out: copies to be
//! stored ([`Slice::ring_stores`]) or offered ([`Slice::ring_offers`]), and [`Warmth::drainable`]. Promises (those that
//! [`crate::store::redis`] builds on):
//!
//! - a copy is made of what is durable in the journal, never of what is only in memory, and each has a newer number;
//! - SQL has a change of a record, of the index of nodes, a removal or a last activity only after the ring has answered for it;
//! - SQL has a message that waits for its recipient (and that the journal alone does not show any more) only after the
//!   ring says that something waits. Most messages are taken long before, so this is looked at a moment after they were
//!   accepted, not for each.
//!
//! Without a ring all of this is switched off and costs nothing.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use fnv::FnvHashMap;

use super::feature;
use super::pubsub::nodes::ArchivedNodes;
use super::slice::{Slice, Slot, User};
use crate::store::record::Record;
use crate::store::redis::Keep;
use crate::store::tier::{Answer, Loaded, Request};
use crate::store::warm::Warm;

/// How long a message may wait for its recipient before the ring is told.
const SETTLE_MS: u64 = 200;
/// How long a user must have had nothing that waits before the ring is told.
const CALM_MS: u64 = 1000;
/// Users that could not be told of and are looked at again in one turn.
const LOOKS_MAX: usize = 64;
/// Pause between two such looks.
const LOOK_MS: u64 = 5;
/// The same when SQL could not say who somebody is.
const UNKNOWN_MS: u64 = 1000;
/// Users of the last start who are being loaded at the same time.
const STARTING_MAX: usize = 64;

/// Why SQL is asked for a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behind {
    /// The ring does not have him.
    Missed,
    /// What the ring has is not known.
    Unavailable,
    /// The ring has him, and says that something waits for him.
    Pending,
}

/// What a user's copy says, and must say, of messages that wait for him.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waits {
    /// SQL may have some: every copy must say so.
    must: bool,
    /// The ring says so, or has no copy.
    says: bool,
    /// Number of the last copy that was sent.
    sent: u64,
}

/// A copy that must be stored.
#[derive(Default)]
struct Change {
    /// The first record of the journal that waits for it.
    seq: Option<u64>,
    /// The newest durable record, where the one in memory is newer.
    record: Option<(u64, Record)>,
    /// Record, index of nodes, removal or last activity has changed, so that also a removed user is told of.
    whole: bool,
    /// Messages have waited for long.
    waits: bool,
    /// The last start left something.
    start: bool,
}

/// A message that was accepted and may be taken soon.
struct Settling {
    seq: u64,
    due_ms: u64,
    user: Rc<str>,
    id: u64,
}

/// A copy that the ring has not answered for.
struct Flight {
    name: Rc<str>,
    seq: Option<u64>,
    start: bool,
}

/// See the module's page.
#[derive(Default)]
pub struct Warmth {
    on: bool,
    changed: FnvHashMap<Rc<str>, Change>,
    /// Those of `changed` that were not looked at yet, and those that could not be stored.
    fresh: Vec<Rc<str>>,
    later: VecDeque<Rc<str>>,
    look_ms: u64,
    /// Of `changed` and `flying`: numbers in the journal, and how many wait for each.
    open: BTreeMap<u64, u32>,
    flying: FnvHashMap<u64, Flight>,
    settling: VecDeque<Settling>,
    calm: VecDeque<(u64, Rc<str>)>,
    landed_seq: u64,
    /// What the last start left: not looked at yet, and not answered yet.
    start: VecDeque<Rc<str>>,
    start_open: usize,
    behind: FnvHashMap<Box<str>, Behind>,
    offers: Vec<Rc<str>>,
    /// Sessions that came (or are still there) and went, in order: user, resource, whether it is there.
    pub sessions: Vec<(Rc<str>, Box<str>, bool)>,
}

impl Warmth {
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Copies that wait to be stored or answered.
    pub fn waiting(&self) -> usize {
        self.changed.len() + self.flying.len() + self.start.len()
    }

    /// Is there somebody to be looked at again before the next tick?
    pub fn looks_again(&self, now_ms: u64) -> bool {
        let starts = !self.start.is_empty() && self.changed.len() < STARTING_MAX;
        !self.fresh.is_empty()
            || starts
            || (!self.later.is_empty() && self.look_ms <= now_ms + LOOK_MS)
    }

    /// The ring has answered for everything that the last start left.
    pub fn has_started(&self) -> bool {
        self.start.is_empty() && self.start_open == 0
    }

    /// SQL may have this slice's own journal up to here.
    pub fn drainable(&self) -> u64 {
        let open = self.open.keys().next().copied();
        let settling = self.settling.front().map(|message| message.seq);
        let first = open.into_iter().chain(settling).min();
        first.map_or(self.landed_seq, |seq| self.landed_seq.min(seq - 1))
    }

    /// Everything up to `seq` is durable in the journal and was acted on.
    pub fn landed(&mut self, seq: u64) {
        self.landed_seq = self.landed_seq.max(seq);
    }

    /// A message that waits for its recipient is durable.
    pub fn accepted(&mut self, seq: u64, user: &Rc<str>, id: u64, now_ms: u64) {
        if self.on {
            self.settling.push_back(Settling {
                seq,
                due_ms: now_ms + SETTLE_MS,
                user: user.clone(),
                id,
            });
        }
    }

    /// A user's copy must be stored before SQL has the journal's record `seq`.
    fn change(&mut self, user: &Rc<str>, seq: Option<u64>) -> &mut Change {
        let change = self.changed.entry(user.clone()).or_insert_with(|| {
            self.fresh.push(user.clone());
            Change::default()
        });
        if let (Some(seq), None) = (seq, change.seq) {
            change.seq = Some(seq);
            *self.open.entry(seq).or_insert(0) += 1;
        }
        change
    }

    fn close(&mut self, seq: Option<u64>, start: bool) {
        if start {
            self.start_open -= 1;
        }
        let Some(seq) = seq else { return };
        let Some(count) = self.open.get_mut(&seq) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.open.remove(&seq);
        }
    }
}

/// What has become of an attempt to tell of a user.
enum Told {
    /// There is nothing to tell.
    Needless,
    /// Under this number.
    Sent(u64),
    /// Not now.
    Later,
}

/// Takes name, number, value and how long it is to be kept; false: not now.
pub type Store<'a> = &'a mut dyn FnMut(&str, u64, &[u8], Keep) -> bool;

/// The same, but it does not matter whether it gets there.
pub type Offer<'a> = &'a mut dyn FnMut(&str, u64, &[u8], Keep);

impl Slice {
    /// There is a ring: from here on it is told. Called once, before anything else happens.
    pub fn ring_on(&mut self) {
        self.warmth.on = true;
        self.warmth.landed(self.ledger.sealed_seq());
        let names: Vec<Rc<str>> = self
            .overlay
            .names()
            .filter(|name| self.overlay.concerns_ring(name))
            .map(Rc::from)
            .collect();
        self.warmth.start_open = names.len();
        self.warmth.start = names.into();
    }

    // ---- loads

    /// The ring has a user's copy, or the word that there is none. `false`: SQL must be asked.
    pub fn ring_loaded(&mut self, name: &str, value: &[u8]) -> bool {
        let Some(warm) = Warm::decode(value) else {
            self.ring_behind(name, Behind::Missed);
            return false;
        };
        if warm.pending {
            self.ring_behind(name, Behind::Pending);
            return false;
        }
        let revision = warm.revision;
        let user = warm.record.map(|record| Loaded {
            record,
            revision,
            pending: Vec::new(),
            last: warm.last,
            // one that cannot be read is made anew, and so the copy heals
            index: warm
                .index
                .filter(|bytes| bytes.is_empty() || ArchivedNodes::access(bytes).is_some()),
        });
        let name = name.into();
        self.answers(vec![Answer::Loaded { name, user }]);
        true
    }

    /// SQL must be asked for a user.
    pub fn ring_behind(&mut self, name: &str, why: Behind) {
        self.warmth.behind.insert(name.into(), why);
        self.fx.behind.push(Request::Load { name: name.into() });
    }

    /// A user was loaded.
    pub(super) fn ring_known(&mut self, name: &str) {
        if !self.warmth.on {
            return;
        }
        let behind = self.warmth.behind.remove(name);
        let now_ms = self.now.ms;
        let Some(user) = self.user_mut(name) else {
            if behind.is_some_and(|why| why != Behind::Pending) {
                self.warmth.offers.push(name.into());
            }
            return;
        };
        let waits = user.has_waiting();
        user.waits = Waits {
            must: waits,
            says: match behind {
                None | Some(Behind::Unavailable) => false,
                // a copy that is offered now, or none
                Some(Behind::Missed) => waits,
                Some(Behind::Pending) => true,
            },
            sent: 0,
        };
        let user = user.name.clone();
        match behind {
            Some(Behind::Missed | Behind::Unavailable) => self.warmth.offers.push(user),
            Some(Behind::Pending) if !waits => {
                self.warmth.calm.push_back((now_ms + CALM_MS, user));
            }
            _ => {}
        }
    }

    /// Nobody can say who the user is.
    pub(super) fn ring_unknown(&mut self, name: &str) {
        if !self.warmth.on {
            return;
        }
        self.warmth.behind.remove(name);
        if self.warmth.changed.contains_key(name) {
            self.warmth.look_ms = self.now.ms + UNKNOWN_MS;
        }
    }

    // ---- changes

    /// The ring has answered for a copy, by its number: it holds it, or nobody will read what it holds.
    pub fn ring_stored(&mut self, number: u64) {
        let Some(flight) = self.warmth.flying.remove(&number) else {
            return;
        };
        self.warmth.close(flight.seq, flight.start);
        if let Some(user) = self.user_mut(&flight.name)
            && user.waits.sent == number
        {
            user.waits.says = user.waits.must;
        }
    }

    /// The index of a user's nodes was read from SQL: the ring is offered a copy with it.
    pub(super) fn ring_read_index(&mut self, name: &Rc<str>) {
        if self.warmth.on {
            self.warmth.offers.push(name.clone());
        }
    }

    /// A user's record (`Some`: with its revision), the index of his nodes, his removal or last activity is durable.
    pub(super) fn ring_changed(
        &mut self,
        name: &Rc<str>,
        seq: u64,
        record: Option<(u64, &Record)>,
    ) {
        let mut newer = false;
        if let (Some((revision, _)), Some(user)) = (record, self.user_mut(name)) {
            user.durable = revision;
            newer = user.revision != revision;
        }
        if !self.warmth.on {
            return;
        }
        let change = self.warmth.change(name, Some(seq));
        change.whole = true;
        if let Some((revision, record)) = record {
            change.record = newer.then(|| (revision, record.clone()));
        }
    }

    /// A client has taken the last message that waited for a user.
    pub(super) fn ring_calm(&mut self, name: &Rc<str>) {
        let due_ms = self.now.ms + CALM_MS;
        self.warmth.calm.push_back((due_ms, name.clone()));
    }

    /// Looks at what was to settle. The shard calls it a few times a second.
    pub fn ring_tick(&mut self) {
        if !self.warmth.on {
            return;
        }
        let now_ms = self.now.ms;
        while let Some(message) = self.warmth.settling.front()
            && message.due_ms <= now_ms
        {
            let message = self.warmth.settling.pop_front().expect("was there");
            let told = match self.users.peek(&message.user) {
                Some(Slot::Present(user)) => {
                    (user.waits.must && user.waits.says) || !user.waits_for(message.id)
                }
                Some(Slot::Missing | Slot::Room(_)) => true,
                Some(Slot::Loading { .. }) | None => false,
            };
            if !told {
                let change = self.warmth.change(&message.user, Some(message.seq));
                change.waits = true;
            }
        }
        while let Some((due_ms, _)) = self.warmth.calm.front()
            && *due_ms <= now_ms
        {
            let (_, name) = self.warmth.calm.pop_front().expect("was there");
            if self.user(&name).is_some_and(|user| user.is_calm()) {
                self.warmth.change(&name, None);
            }
        }
    }

    // ---- copies

    /// Gives away what must be stored and can be now. The numbers come back by [`Warmth::stored`].
    pub fn ring_stores(&mut self, store: Store<'_>) {
        self.start_some();
        for name in std::mem::take(&mut self.warmth.fresh) {
            if !self.tell(&name, store) {
                self.warmth.later.push_back(name);
            }
        }
        if self.warmth.later.is_empty() || self.now.ms < self.warmth.look_ms {
            return;
        }
        self.warmth.look_ms = self.now.ms + LOOK_MS;
        for _ in 0..self.warmth.later.len().min(LOOKS_MAX) {
            let Some(name) = self.warmth.later.pop_front() else {
                break;
            };
            if !self.tell(&name, store) {
                self.warmth.later.push_back(name);
            }
        }
    }

    /// Some more of what the last start left.
    fn start_some(&mut self) {
        while let Some(name) = self.warmth.start.front()
            && self.warmth.changed.len() < STARTING_MAX
        {
            let name = name.clone();
            self.warmth.start.pop_front();
            let change = self.warmth.change(&name, None);
            (change.whole, change.waits) = (true, true);
            if std::mem::replace(&mut change.start, true) {
                self.warmth.start_open -= 1;
            }
        }
    }

    fn tell(&mut self, name: &Rc<str>, store: Store<'_>) -> bool {
        let Some(change) = self.warmth.changed.remove(name) else {
            return true;
        };
        match self.try_tell(name, &change, store) {
            Told::Later => {
                self.warmth.changed.insert(name.clone(), change);
                return false;
            }
            Told::Needless => self.warmth.close(change.seq, change.start),
            Told::Sent(number) => {
                let flight = Flight {
                    name: name.clone(),
                    seq: change.seq,
                    start: change.start,
                };
                self.warmth.flying.insert(number, flight);
            }
        }
        true
    }

    fn try_tell(&mut self, name: &Rc<str>, change: &Change, store: Store<'_>) -> Told {
        let mut value = Vec::new();
        let mut waits = false;
        match self.users.peek(name) {
            Some(Slot::Present(user)) => {
                waits = user.has_waiting() && (user.waits.must || change.waits);
                let (revision, record) = match &change.record {
                    _ if user.durable == user.revision => (user.revision, &user.record),
                    Some((revision, record)) if *revision == user.durable => (*revision, record),
                    // a newer one is about to be durable
                    _ => return Told::Later,
                };
                warm(user, revision, record, waits).encode(&mut value);
            }
            Some(Slot::Room(Some(room))) => {
                let Some(copy) = room.warm() else {
                    // a newer one is about to be durable
                    return Told::Later;
                };
                copy.encode(&mut value);
            }
            Some(Slot::Room(None)) => return Told::Later,
            Some(Slot::Missing) if change.whole => Warm::missing(0).encode(&mut value),
            Some(Slot::Missing) => return Told::Needless,
            Some(Slot::Loading { .. }) => return Told::Later,
            None => {
                self.want(name);
                return Told::Later;
            }
        }
        let number = self.next_id();
        if !store(name, number, &value, Keep::Long) {
            return Told::Later;
        }
        if let Some(user) = self.user_mut(name) {
            user.waits = Waits {
                must: waits,
                says: false,
                sent: number,
            };
        }
        Told::Sent(number)
    }

    /// Gives away what SQL has said and the ring did not know.
    pub fn ring_offers(&mut self, offer: Offer<'_>) {
        for name in std::mem::take(&mut self.warmth.offers) {
            if self.warmth.changed.contains_key(&name) {
                continue;
            }
            let mut value = Vec::new();
            let keep = match self.users.peek(&name) {
                Some(Slot::Present(user)) if user.durable == user.revision => {
                    warm(user, user.revision, &user.record, user.waits.must).encode(&mut value);
                    Keep::Long
                }
                Some(Slot::Room(Some(room))) => {
                    let Some(copy) = room.warm() else {
                        continue;
                    };
                    copy.encode(&mut value);
                    Keep::Long
                }
                Some(Slot::Missing) => {
                    Warm::missing(0).encode(&mut value);
                    Keep::Short
                }
                _ => continue,
            };
            let number = self.next_id();
            offer(&name, number, &value, keep);
        }
    }
}

fn warm(user: &User, revision: u64, record: &Record, pending: bool) -> Warm {
    Warm {
        revision,
        record: Some(record.clone()),
        last: user.last.clone(),
        // what is in memory is durable: it is set when it was written
        index: feature::pep::stored(user).map(Into::into),
        pending,
    }
}

impl User {
    /// Does a message wait for one of his clients to take it?
    fn has_waiting(&self) -> bool {
        !self.offline.is_empty() || !self.held.is_empty()
    }

    /// Does this one?
    fn waits_for(&self, id: u64) -> bool {
        self.offline.has(id)
            || self
                .held
                .binary_search_by_key(&id, |(held, _)| *held)
                .is_ok()
    }

    /// Nothing waits, but the ring says so, or would have to.
    pub(super) fn is_calm(&self) -> bool {
        (self.waits.must || self.waits.says) && !self.has_waiting()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::slice::Op;
    use crate::xmpp::testing::{Client, World};

    /// What a ring was told, in order: name, number, copy.
    type Copies = Vec<(String, u64, Warm)>;

    fn told(w: &mut World) -> Copies {
        let mut told = Copies::new();
        w.slices[0].ring_stores(&mut |name, number, value, keep| {
            assert_eq!(keep, Keep::Long);
            told.push((name.into(), number, Warm::decode(value).expect("a copy")));
            true
        });
        told
    }

    fn answer(w: &mut World, told: &Copies) {
        for (_, number, _) in told {
            w.slices[0].ring_stored(*number);
        }
    }

    /// Is there something in the journal that SQL may not have?
    fn holds(w: &World) -> bool {
        w.slices[0].ledger.sealed_seq() != w.slices[0].warmth.drainable()
    }

    fn world() -> (World, Client) {
        let mut w = World::new(1);
        for name in ["alice", "bob"] {
            w.add(name);
        }
        w.slices[0].ring_on();
        let client = w.login("alice", "a");
        (w, client)
    }

    fn rename(w: &mut World, client: Client, to: &str) {
        let set = format!(
            "<iq type='set' id='r'><query xmlns='jabber:iq:roster'><item jid='x@y' name='{to}'/></query></iq>"
        );
        w.send(client, &set);
    }

    fn message(w: &mut World, client: Client, text: &str) {
        let chat = format!("<message type='chat' to='bob@localhost'><body>{text}</body></message>");
        w.send(client, &chat);
    }

    fn settle(w: &mut World) {
        w.advance(SETTLE_MS + 1);
        w.slices[0].ring_tick();
    }

    #[test]
    fn a_change_goes_to_sql_only_when_the_ring_has_answered_for_it() {
        let (mut w, client) = world();
        assert!(told(&mut w).is_empty());
        rename(&mut w, client, "one");
        assert!(holds(&w));
        let first = told(&mut w);
        assert_eq!(first.len(), 1);
        assert_eq!(first[0].2.revision, w.user("alice").revision);
        rename(&mut w, client, "two");
        let second = told(&mut w);
        assert!(second[0].1 > first[0].1);
        answer(&mut w, &second);
        assert!(holds(&w), "the first was not answered");
        answer(&mut w, &first);
        assert!(!holds(&w));
    }

    #[test]
    fn what_cannot_be_stored_now_is_stored_later() {
        let (mut w, client) = world();
        rename(&mut w, client, "one");
        w.slices[0].ring_stores(&mut |_, _, _, _| false);
        assert!(holds(&w));
        w.advance(LOOK_MS + 1);
        let later = told(&mut w);
        answer(&mut w, &later);
        assert!(later.len() == 1 && !holds(&w));
    }

    #[test]
    fn a_copy_is_made_of_what_is_durable() {
        let (mut w, client) = world();
        rename(&mut w, client, "one");
        let durable = w.user("alice").revision;
        w.tier.held = true;
        rename(&mut w, client, "two");
        assert_ne!(w.user("alice").revision, durable);
        for (_, _, copy) in told(&mut w) {
            assert_eq!(copy.revision, durable);
            let record = copy.record.expect("a user");
            assert_ne!(record.bytes(), w.user("alice").record.bytes());
        }
        w.release();
        w.advance(LOOK_MS + 1);
        let copies = told(&mut w);
        assert_eq!(copies.last().unwrap().2.revision, w.user("alice").revision);
    }

    #[test]
    fn a_message_that_waits_is_told_before_sql_has_it_and_one_that_is_taken_soon_is_not() {
        let (mut w, client) = world();
        w.confirms = true;
        let b = w.online("bob", "b");
        let came = told(&mut w);
        answer(&mut w, &came);
        message(&mut w, client, "1");
        assert!(holds(&w), "it may wait");
        settle(&mut w);
        assert!(told(&mut w).is_empty() && !holds(&w));

        w.logout(b);
        let left = told(&mut w);
        assert!(left.iter().all(|(_, _, copy)| !copy.pending));
        answer(&mut w, &left);
        message(&mut w, client, "2");
        settle(&mut w);
        assert!(holds(&w));
        let waits = told(&mut w);
        assert!(waits.len() == 1 && waits[0].2.pending);
        assert!(holds(&w), "the ring has not answered");
        answer(&mut w, &waits);
        assert!(!holds(&w));
        // a second one changes nothing
        message(&mut w, client, "3");
        settle(&mut w);
        assert!(told(&mut w).is_empty() && !holds(&w));

        // and when he has taken all, the ring hears that, too
        w.online("bob", "b");
        let there = told(&mut w);
        answer(&mut w, &there);
        w.advance(CALM_MS + 1);
        w.slices[0].ring_tick();
        let calm = told(&mut w);
        assert!(calm.len() == 1 && !calm[0].2.pending, "{calm:?}");
    }

    #[test]
    fn who_is_removed_is_told_as_missing() {
        let (mut w, _) = world();
        let gone = Box::new(|slice: &mut Slice, done: Result<(), _>| {
            assert_eq!(done, Ok(()));
            slice.set_user("bob", None);
        });
        w.slices[0].write("bob", Op::RemoveUser, gone);
        w.run();
        let copies = told(&mut w);
        assert_eq!(copies.len(), 1);
        assert_eq!(copies[0].2, Warm::missing(0));
    }

    #[test]
    fn what_the_last_start_left_is_told_before_anything_goes_to_sql() {
        let (mut w, client) = world();
        w.tier.dry = true;
        rename(&mut w, client, "one");
        message(&mut w, client, "1");
        w.crash(1);
        w.slices[0].ring_on();
        w.run();
        let mut all = Copies::new();
        for _ in 0..4 {
            assert!(!w.slices[0].warmth.has_started());
            all.extend(told(&mut w));
            w.run();
            w.advance(LOOK_MS + 1);
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let names: Vec<(&str, bool)> = all.iter().map(|(n, _, c)| (&**n, c.pending)).collect();
        assert_eq!(names, [("alice", false), ("bob", true)]);
        answer(&mut w, &all);
        assert!(w.slices[0].warmth.has_started());
    }

    const CAPS: &str =
        "<presence><c xmlns='http://jabber.org/protocol/caps' node='urn:c' ver='1'/></presence>";

    fn publish(w: &mut World, client: Client, text: &str) {
        let iq = format!(
            "<iq type='set' id='p'><pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='urn:x'>\
             <item id='1'><x xmlns='urn:x'>{text}</x></item></publish></pubsub></iq>"
        );
        w.send(client, &iq);
    }

    #[test]
    fn a_copy_has_the_index_of_nodes_and_sql_only_what_the_ring_has() {
        let (mut w, client) = world();
        publish(&mut w, client, "one");
        assert!(holds(&w));
        let first = told(&mut w);
        let index = first[0].2.index.clone().expect("the index");
        assert!(first.len() == 1 && memchr::memmem::find(&index, b"one").is_some());
        answer(&mut w, &first);
        assert!(!holds(&w));
        // a copy is made of what is durable here, too
        w.tier.held = true;
        publish(&mut w, client, "two");
        rename(&mut w, client, "x");
        for (_, _, copy) in told(&mut w) {
            assert_eq!(copy.index.as_ref(), Some(&index));
        }
        w.release();
        w.advance(LOOK_MS + 1);
        let copies = told(&mut w);
        let last = copies.last().unwrap().2.index.as_ref().unwrap();
        assert!(memchr::memmem::find(last, b"two").is_some());
        // another document is nothing for the ring
        answer(&mut w, &copies);
        w.send(
            client,
            "<iq type='set' id='v'><query xmlns='jabber:iq:private'><x xmlns='urn:y'/></query></iq>",
        );
        assert!(told(&mut w).is_empty() && !holds(&w));
    }

    #[test]
    fn a_client_with_capabilities_whose_user_is_warm_reads_nothing() {
        let (mut w, client) = world();
        publish(&mut w, client, "one");
        let copy = told(&mut w).pop().unwrap().2;
        for index in [copy.index.clone(), None] {
            w.crash(1);
            w.slices[0].ring_on();
            let warm = Warm {
                index,
                ..copy.clone()
            };
            let mut value = Vec::new();
            warm.encode(&mut value);
            w.slices[0].want("alice");
            w.slices[0].fx.requests.clear();
            assert!(w.slices[0].ring_loaded("alice", &value));
            let reads = w.tier.reads;
            let client = w.login("alice", "a");
            w.send(client, CAPS);
            assert_eq!(w.tier.reads - reads, usize::from(warm.index.is_none()));
            assert!(w.user("alice").pep.is_some());
            // what was read is offered, so that the next one reads nothing
            let mut offered = Vec::new();
            w.slices[0].ring_offers(&mut |name, _, value, _| {
                offered.push((name.to_owned(), Warm::decode(value).unwrap().index));
            });
            let wanted = (String::from("alice"), copy.index.clone());
            assert_eq!(
                offered.contains(&wanted),
                warm.index.is_none(),
                "{offered:?}"
            );
        }
    }

    #[test]
    fn an_index_that_only_the_journal_has_is_newer_than_that_of_a_copy() {
        let (mut w, client) = world();
        publish(&mut w, client, "old");
        let copy = told(&mut w).pop().unwrap();
        answer(&mut w, &vec![copy.clone()]);
        w.tier.dry = true;
        publish(&mut w, client, "new");
        w.crash(1);
        w.slices[0].ring_on();
        assert!(!w.slices[0].warmth.has_started(), "it must be told first");
        let mut value = Vec::new();
        copy.2.encode(&mut value);
        w.slices[0].want("alice");
        w.slices[0].fx.requests.clear();
        assert!(w.slices[0].ring_loaded("alice", &value));
        let client = w.login("alice", "a");
        w.send(
            client,
            "<iq type='get' id='g'><pubsub xmlns='http://jabber.org/protocol/pubsub'><items node='urn:x'/></pubsub></iq>",
        );
        let got = w.take(client).concat();
        assert!(got.contains("new") && !got.contains("old"), "{got}");
    }
}
