//! Who is in a room: nicknames, the people behind them, and their sessions. Several sessions of one person may share a nickname.

use std::collections::HashMap;

use slab::Slab;
use smallvec::SmallVec;

use super::nick::Key;
use super::privilege::Role;
use crate::store::room::Affiliation;

/// Somebody in the room, under one nickname.
pub struct Occupant {
    pub nick: Box<str>,
    key: Key,
    /// Real bare JID.
    pub bare: Box<str>,
    pub affiliation: Affiliation,
    pub role: Role,
    /// Newest presence last.
    pub sessions: SmallVec<[Session; 1]>,
    /// XEP-0421.
    pub id: Box<str>,
    pub messages: Bucket,
    pub presences: Bucket,
    /// He has asked for voice.
    pub asked: bool,
}

pub struct Session {
    /// Full JID.
    pub jid: Box<str>,
    /// Tells it apart from others of this room, also later ones.
    pub serial: u32,
    /// What it says in its presence, as XML.
    pub presence: Box<[u8]>,
}

impl Occupant {
    /// What others see of his presence: that of the session which has spoken last.
    pub fn presence(&self) -> &[u8] {
        self.sessions
            .last()
            .map_or(b"", |session| &session.presence)
    }
}

/// What one person may send: so many a second, and some at once.
#[derive(Clone, Copy, Default)]
pub struct Bucket {
    used: u32,
    at_ms: u64,
}

impl Bucket {
    /// Takes one; false: there is none left. `per_second` on average, `burst` seconds' worth at once.
    pub fn take(&mut self, now_ms: u64, per_second: u32, burst: u32) -> bool {
        let back = (now_ms.saturating_sub(self.at_ms)).min(3_600_000) * u64::from(per_second);
        // in thousandths
        self.used = self
            .used
            .saturating_sub(back.min(u64::from(u32::MAX)) as u32);
        self.at_ms = now_ms;
        let most = per_second.saturating_mul(burst).saturating_mul(1000);
        if self.used.saturating_add(1000) > most {
            return false;
        }
        self.used += 1000;
        true
    }
}

/// Position in [`Occupants`]; stays while the occupant does.
pub type Place = usize;

#[derive(Default)]
pub struct Occupants {
    list: Slab<Occupant>,
    /// By the nickname's fold; strangers choose nicknames, so the hasher is seeded.
    by_fold: HashMap<Box<str>, Place>,
    /// By what the nickname looks like.
    by_look: HashMap<Box<str>, SmallVec<[Place; 1]>>,
    by_jid: HashMap<Box<str>, Place>,
    serial: u32,
    /// Sessions have come or gone since it was looked at.
    changed: bool,
}

impl Occupants {
    /// Have sessions come or gone since this was asked last?
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// People, not sessions.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Place, &Occupant)> {
        self.list.iter()
    }

    pub fn places(&self) -> Vec<Place> {
        self.list.iter().map(|(place, _)| place).collect()
    }

    pub fn get(&self, place: Place) -> Option<&Occupant> {
        self.list.get(place)
    }

    pub fn get_mut(&mut self, place: Place) -> Option<&mut Occupant> {
        self.list.get_mut(place)
    }

    /// Who sits behind a full JID.
    pub fn find(&self, jid: &str) -> Option<Place> {
        self.by_jid.get(jid).copied()
    }

    /// Who has exactly this nickname, as far as nicknames differ.
    pub fn named(&self, nick: &str) -> Option<Place> {
        // as it is written, mostly
        let fold = Key::of(nick)?.fold;
        self.by_fold.get(&fold).copied()
    }

    /// All nicknames of a person.
    pub fn of<'a>(&'a self, bare: &'a str) -> impl Iterator<Item = Place> + 'a {
        let own = move |(_, one): &(Place, &Occupant)| *one.bare == *bare;
        self.list.iter().filter(own).map(|(place, _)| place)
    }

    /// Somebody whose nickname is the same or looks like it.
    pub fn clash(&self, key: &Key, besides: Option<Place>) -> Option<Place> {
        let alike = self.by_look.get(&key.look).into_iter().flatten().copied();
        let same = self.by_fold.get(&key.fold).copied();
        same.into_iter().chain(alike).find(|place| {
            Some(*place) != besides && self.list.get(*place).is_some_and(|o| o.key.clashes(key))
        })
    }

    /// Somebody comes in, under a nickname that nobody has.
    pub fn add(
        &mut self,
        nick: &str,
        key: Key,
        bare: &str,
        affiliation: Affiliation,
        role: Role,
        id: Box<str>,
    ) -> Place {
        let place = self.list.insert(Occupant {
            nick: nick.into(),
            key,
            bare: bare.into(),
            affiliation,
            role,
            sessions: SmallVec::new(),
            id,
            messages: Bucket::default(),
            presences: Bucket::default(),
            asked: false,
        });
        self.index(place);
        place
    }

    fn index(&mut self, place: Place) {
        let key = self.list[place].key.clone();
        self.by_fold.insert(key.fold, place);
        self.by_look.entry(key.look).or_default().push(place);
    }

    fn unindex(&mut self, place: Place) {
        let key = &self.list[place].key;
        self.by_fold.remove(&key.fold);
        if let Some(alike) = self.by_look.get_mut(&key.look) {
            alike.retain(|one| *one != place);
            if alike.is_empty() {
                self.by_look.remove(&key.look);
            }
        }
    }

    /// A session of somebody who is in.
    pub fn add_session(&mut self, place: Place, jid: &str, presence: &[u8]) {
        self.serial = self.serial.wrapping_add(1);
        self.changed = true;
        if let Some(occupant) = self.list.get_mut(place) {
            occupant.sessions.push(Session {
                jid: jid.into(),
                serial: self.serial,
                presence: presence.into(),
            });
            self.by_jid.insert(jid.into(), place);
        }
    }

    /// The session's presence is another one; it is the newest now.
    pub fn set_presence(&mut self, place: Place, jid: &str, presence: &[u8]) {
        if let Some(occupant) = self.list.get_mut(place)
            && let Some(at) = occupant.sessions.iter().position(|s| *s.jid == *jid)
        {
            let mut session = occupant.sessions.remove(at);
            session.presence = presence.into();
            occupant.sessions.push(session);
        }
    }

    pub fn rename(&mut self, place: Place, nick: &str, key: Key) {
        self.unindex(place);
        let occupant = &mut self.list[place];
        occupant.nick = nick.into();
        occupant.key = key;
        self.index(place);
    }

    /// A session goes. The occupant, if it was the last one.
    pub fn remove_session(&mut self, place: Place, jid: &str) -> Option<Occupant> {
        self.by_jid.remove(jid);
        self.changed = true;
        let occupant = self.list.get_mut(place)?;
        occupant.sessions.retain(|session| *session.jid != *jid);
        if occupant.sessions.is_empty() {
            return self.remove(place);
        }
        None
    }

    /// Somebody goes with all sessions.
    pub fn remove(&mut self, place: Place) -> Option<Occupant> {
        self.list.get(place)?;
        self.changed = true;
        self.unindex(place);
        let occupant = self.list.remove(place);
        for session in &occupant.sessions {
            self.by_jid.remove(&session.jid);
        }
        Some(occupant)
    }

    /// Full JIDs of all.
    pub fn sessions(&self) -> impl Iterator<Item = &str> {
        self.list
            .iter()
            .flat_map(|(_, o)| o.sessions.iter().map(|s| &*s.jid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(o: &mut Occupants, nick: &str, bare: &str) -> Place {
        let key = Key::of(nick).unwrap();
        o.add(
            nick,
            key,
            bare,
            Affiliation::None,
            Role::Participant,
            "".into(),
        )
    }

    #[test]
    fn somebody_is_found_by_nick_and_address_until_his_last_session_goes() {
        let mut o = Occupants::default();
        let alice = add(&mut o, "Alice", "alice@x");
        o.add_session(alice, "alice@x/a", b"1");
        o.add_session(alice, "alice@x/b", b"2");
        assert_eq!(
            (o.named("ALICE"), o.find("alice@x/b")),
            (Some(alice), Some(alice))
        );
        assert_eq!(o.get(alice).unwrap().presence(), b"2");
        o.set_presence(alice, "alice@x/a", b"3");
        assert_eq!(o.get(alice).unwrap().presence(), b"3");
        assert!(o.remove_session(alice, "alice@x/a").is_none());
        o.rename(alice, "Al", Key::of("Al").unwrap());
        assert_eq!((o.named("Alice"), o.named("al")), (None, Some(alice)));
        assert!(o.remove_session(alice, "alice@x/b").is_some());
        assert!(o.is_empty() && o.named("al").is_none() && o.by_jid.is_empty());
        assert!(o.by_fold.is_empty() && o.by_look.is_empty());
    }

    #[test]
    fn a_look_alike_is_found_but_for_oneself() {
        let mut o = Occupants::default();
        let alice = add(&mut o, "alice", "alice@x");
        let cyrillic = Key::of("аlice").unwrap();
        assert_eq!(o.clash(&cyrillic, None), Some(alice));
        assert_eq!(o.clash(&cyrillic, Some(alice)), None);
    }

    #[test]
    fn a_rate_gives_a_burst_and_then_its_average() {
        let mut b = Bucket::default();
        let at_once = (0..100).filter(|_| b.take(1000, 5, 3)).count();
        assert_eq!(at_once, 15);
        assert!(!b.take(1100, 5, 3));
        assert!(b.take(1200, 5, 3) && !b.take(1200, 5, 3));
        let later = (0..100).filter(|_| b.take(100_000_000, 5, 3)).count();
        assert_eq!(later, 15);
    }
}
