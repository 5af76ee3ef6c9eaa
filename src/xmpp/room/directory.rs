//! The list of rooms that can be found (XEP-0045 section 6.3), and who has made those that last. Each shard has all of it: a room
//! tells all shards when it begins, changes its name or whether it can be found or lasts, and ends.
//!
//! At the start the first shard reads all rooms from the database, page by page ([`find`]), and tells their owners; what only the
//! journal has is loaded. Until that is complete nobody makes a lasting room, for nobody knows how many he has. What is made on
//! several shards in the same moment is counted by each alone, so each may take as many as there was room for: for that moment the
//! bound holds for each shard, not for all together.
//!
//! A temporary room that the database has is left from before the start. It waits for those who come back, then it ends ([`tick`]).

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::rc::Rc;

use super::{Room, at_work, entity, owner};
use crate::store::room::{Affiliation, LABEL, RoomRecord};
use crate::store::tier::{ReadError, StoredRoom};
use crate::xml::Element;
use crate::xmpp::batch::Item;
use crate::xmpp::error::StanzaError;
use crate::xmpp::feature::{disco, rsm};
use crate::xmpp::iq::Iq;
use crate::xmpp::slice::{Slice, Slot};

#[derive(Default)]
pub struct Directory {
    /// Titles of those that can be found, by local part.
    shown: BTreeMap<Box<str>, Box<str>>,
    /// Who has made each room that lasts: bare JIDs by local part. Strangers choose both, so the hasher is seeded.
    makers: HashMap<Box<str>, Box<str>>,
    /// How many of them each has made.
    made: HashMap<Box<str>, usize>,
    /// The same of rooms of this shard whose change waits for the journal.
    making: HashMap<Box<str>, usize>,
    /// The database is being read.
    incomplete: bool,
    /// The first shard: behind which row to read on, and when; ms of the monotonic clock.
    read_on: Option<(u64, u64)>,
    /// Temporary rooms of this shard that were there before anybody was in, and since when; ms of the monotonic clock.
    left: HashMap<Rc<str>, u64>,
}

/// Rooms in one answer.
const PAGE_MAX: usize = 500;
/// Rooms that are read at once at the start: a record may be large, and log-ins use the same connections.
const READ_MAX: u32 = 50;
/// When the database is asked again.
const RETRY_MS: u64 = 5000;
/// Rooms left from a crash that end in one tick.
const ENDS_MAX: usize = 20;

impl Directory {
    /// What all know of a room; empty texts: it is not shown, does not last.
    fn put(&mut self, name: &str, title: &str, maker: &str) {
        match title.is_empty() {
            true => self.shown.remove(name),
            false => self.shown.insert(name.into(), title.into()),
        };
        let old = match maker.is_empty() {
            true => self.makers.remove(name),
            false => {
                *self.made.entry(maker.into()).or_default() += 1;
                self.makers.insert(name.into(), maker.into())
            }
        };
        if let Some(old) = old {
            less(&mut self.made, &old);
        }
    }

    fn has(&self, name: &str) -> bool {
        self.shown.contains_key(name) || self.makers.contains_key(name)
    }

    fn is(&self, name: &str, title: &str, maker: &str) -> bool {
        self.shown.get(name).map_or("", |title| title) == title
            && self.makers.get(name).map_or("", |maker| maker) == maker
    }

    /// Lasting rooms that somebody has made.
    #[cfg(test)]
    pub fn made_by(&self, bare: &str) -> usize {
        self.made.get(bare).copied().unwrap_or(0)
    }
}

fn less(counts: &mut HashMap<Box<str>, usize>, key: &str) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

// ---- what rooms tell ---------------------------------------------------------------------------------------------------

/// Under which title a room is listed, empty: it cannot be found.
fn title<'a>(local: &'a str, state: &'a RoomRecord) -> &'a str {
    match (state.settings.public, state.settings.title.is_empty()) {
        (false, _) => "",
        // a room without a title is called by its name
        (true, true) => local,
        (true, false) => &state.settings.title,
    }
}

/// Who counts as the maker of a room that does not say it: rooms of earlier releases, and those that did not last.
fn first_owner(state: &RoomRecord) -> &str {
    let owner = |one: &&crate::store::room::Affiliate| one.affiliation == Affiliation::Owner;
    let first = state.affiliates.iter().find(owner);
    first.map_or("", |one| &one.jid)
}

/// What all may know of a room has perhaps changed.
pub fn tell(slice: &mut Slice, room: &mut Room) {
    if room.maker.is_empty() {
        let known = slice.rooms.directory.makers.get(room.local());
        room.maker = known.map_or_else(|| first_owner(&room.state).into(), Clone::clone);
    }
    let listed = match room.locked || room.gone {
        true => "",
        false => title(room.local(), &room.state),
    };
    let maker = match room.state.settings.persistent && !room.gone {
        true => &*room.maker,
        false => "",
    };
    tell_all(slice, room.local(), listed, maker);
}

fn tell_all(slice: &mut Slice, name: &str, listed: &str, maker: &str) {
    if slice.rooms.directory.is(name, listed, maker) {
        return;
    }
    for shard in 0..slice.fx.mesh.len() {
        if shard != usize::from(slice.env.shard) {
            let batch = &mut slice.fx.mesh[shard];
            let (name, listed) = (batch.put(name.as_bytes()), batch.put(listed.as_bytes()));
            let maker = batch.put(maker.as_bytes());
            let found = false;
            batch.items.push(Item::Listing {
                name,
                listed,
                maker,
                found,
            });
        }
    }
    slice.rooms.directory.put(name, listed, maker);
}

/// Another shard has told of a room. `found`: it has read it in the database, and this is the room's own shard; without a name, it
/// has read all.
pub fn told(slice: &mut Slice, name: &str, listed: &str, maker: &str, found: bool) {
    match found {
        false => slice.rooms.directory.put(name, listed, maker),
        true if name.is_empty() => slice.rooms.directory.incomplete = false,
        true => self::found(slice, name, listed, maker),
    }
}

// ---- lasting rooms -----------------------------------------------------------------------------------------------------

/// May this person (a bare JID) have one more room that lasts?
pub fn may_last(slice: &mut Slice, maker: &str) -> Result<(), StanzaError> {
    let limits = &slice.env.limits.rooms;
    let directory = &slice.rooms.directory;
    let error = StanzaError::RESOURCE_CONSTRAINT;
    let count = |counts: &HashMap<Box<str>, usize>| counts.get(maker).copied().unwrap_or(0);
    let own = count(&directory.made) + count(&directory.making);
    let all = directory.makers.len() + directory.making.values().sum::<usize>();
    let refused = if directory.incomplete {
        error
            .text("the rooms are being counted: try again soon")
            .wait()
    } else if own >= limits.lasting_per_owner_max {
        error.text("you have made too many rooms that stay")
    } else if all >= limits.lasting_max {
        error.text("there are too many rooms that stay")
    } else {
        return Ok(());
    };
    slice.counters.room_refused += 1;
    Err(refused)
}

/// One more is about to last: it is counted from now on.
pub fn lasts_soon(slice: &mut Slice, maker: &str) {
    *slice
        .rooms
        .directory
        .making
        .entry(maker.into())
        .or_default() += 1;
}

/// It is durable: [`tell`] counts it.
pub fn lasts(slice: &mut Slice, maker: &str) {
    less(&mut slice.rooms.directory.making, maker);
}

// ---- the start ---------------------------------------------------------------------------------------------------------

/// At the start of each shard: the rooms that were there before.
pub fn find(slice: &mut Slice) {
    if slice.env.rooms.is_none() {
        return;
    }
    slice.rooms.directory.incomplete = true;
    let is_room = |name: &&str| {
        name.split_once('@')
            .is_some_and(|(_, label)| label == LABEL)
    };
    let undrained = slice.overlay.names().filter(is_room);
    let undrained: Vec<Box<str>> = undrained.map(Into::into).collect();
    for name in undrained {
        slice.want(&name);
    }
    if slice.env.shard == 0 {
        read_on(slice, 0);
    }
}

fn read_on(slice: &mut Slice, after: u64) {
    slice.read_rooms(
        after,
        READ_MAX,
        Box::new(move |slice, page| page_read(slice, after, page)),
    );
}

fn page_read(slice: &mut Slice, after: u64, page: Result<Vec<StoredRoom>, ReadError>) {
    let page = match page {
        Ok(page) => page,
        Err(error) => {
            tracing::warn!(%error, "the list of rooms could not be read: it is tried again");
            slice.rooms.directory.read_on = Some((after, slice.now.ms + RETRY_MS));
            return;
        }
    };
    let last = page.last().map(|one| one.number);
    for one in &page {
        let state = one.record.as_ref().and_then(|record| record.to_room());
        let Some(((local, _), state)) = one.name.split_once('@').zip(state) else {
            continue;
        };
        let maker = match (state.settings.persistent, one.maker.is_empty()) {
            (false, _) => "",
            (true, false) => &one.maker,
            (true, true) => first_owner(&state),
        };
        let owner = slice.env.owner(&one.name);
        hand(slice, owner, local, title(local, &state), maker);
    }
    match last {
        Some(last) => read_on(slice, last),
        None => {
            for shard in 0..slice.fx.mesh.len() {
                hand(slice, shard as u16, "", "", "");
            }
        }
    }
}

fn hand(slice: &mut Slice, shard: u16, name: &str, listed: &str, maker: &str) {
    if shard == slice.env.shard {
        return told(slice, name, listed, maker, true);
    }
    let batch = &mut slice.fx.mesh[usize::from(shard)];
    let (name, listed) = (batch.put(name.as_bytes()), batch.put(listed.as_bytes()));
    let maker = batch.put(maker.as_bytes());
    let found = true;
    batch.items.push(Item::Listing {
        name,
        listed,
        maker,
        found,
    });
}

/// A room of this shard is in the database. What it has told itself is newer.
fn found(slice: &mut Slice, local: &str, listed: &str, maker: &str) {
    let name = entity(local);
    match slice.users.peek(&name) {
        Some(Slot::Loading { .. }) => {
            let (local, listed, maker) = (local.to_owned(), listed.to_owned(), maker.to_owned());
            let again = move |slice: &mut Slice| match slice.users.peek(&entity(&local)) {
                // the database did not say, or is too slow: what was read is better than nothing
                None | Some(Slot::Loading { .. }) => tell_all(slice, &local, &listed, &maker),
                Some(_) => found(slice, &local, &listed, &maker),
            };
            slice.when_known(&name, Box::new(again));
        }
        Some(Slot::Room(Some(_))) => {
            at_work(slice, &name, |slice, room| {
                if !maker.is_empty() && room.maker_guessed {
                    room.maker = maker.into();
                    room.maker_guessed = false;
                }
                tell(slice, room);
            });
        }
        Some(_) => {}
        None if slice.rooms.directory.has(local) => {}
        None => {
            tell_all(slice, local, listed, maker);
            if maker.is_empty() {
                left(slice, &name);
            }
        }
    }
}

/// A room that does not last has nobody in it, because the server has just started.
pub fn left(slice: &mut Slice, name: &str) {
    let now = slice.now.ms;
    let left = &mut slice.rooms.directory.left;
    left.entry(name.into()).or_insert(now);
}

/// Goes on with what waits for its time.
pub fn tick(slice: &mut Slice) {
    let now = slice.now.ms;
    if let Some((after, _)) = slice.rooms.directory.read_on.filter(|(_, due)| *due <= now) {
        slice.rooms.directory.read_on = None;
        read_on(slice, after);
    }
    let wait = slice.env.limits.rooms.left_ms;
    if wait == 0 {
        return;
    }
    let left = &slice.rooms.directory.left;
    let due = left.iter().filter(|(_, since)| **since + wait <= now);
    let due: Vec<Rc<str>> = due.take(ENDS_MAX).map(|(name, _)| name.clone()).collect();
    for name in due {
        let end = name.clone();
        slice.when_known(
            &name,
            Box::new(move |slice| {
                at_work(slice, &end, |slice, room| {
                    if room.occupants.is_empty() && !room.state.settings.persistent {
                        owner::end(slice, room, None, |_, _| {});
                    }
                });
                // if nobody knows whether it is there, it is tried again
                if slice.users.peek(&end).is_some_and(Slot::is_known) {
                    slice.rooms.directory.left.remove(&end);
                }
            }),
        );
    }
}

// ---- the list ----------------------------------------------------------------------------------------------------------

/// Section 6.3, page by page (XEP-0059). A page costs what it holds, however long the list is; where in the list it begins is said
/// of its first page only (XEP-0059 section 2.6 leaves that open).
pub fn answer(slice: &mut Slice, iq: Iq) {
    let Some(host) = slice.env.rooms.clone() else {
        return;
    };
    let wanted = match rsm::Wanted::of(&iq.payload) {
        Ok(wanted) => wanted,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let rooms = &slice.rooms.directory.shown;
    let local = |id: &Option<String>| -> Option<String> {
        let id = id.as_deref()?;
        Some(id.split('@').next().unwrap_or(id).to_owned())
    };
    let (after, before) = (local(&wanted.after), local(&wanted.before));
    let unknown = |id: &Option<String>| id.as_ref().is_some_and(|id| !rooms.contains_key(&**id));
    let crossed = after.is_some() && before.is_some() && after >= before;
    if unknown(&after) || unknown(&before) || crossed {
        return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    }
    let bound = |id: &'_ Option<String>| -> Bound<Box<str>> {
        match id {
            Some(id) => Bound::Excluded((**id).into()),
            None => Bound::Unbounded,
        }
    };
    let matching = rooms.range::<Box<str>, _>((bound(&after), bound(&before)));
    let most = wanted.max.unwrap_or(PAGE_MAX as u64).min(PAGE_MAX as u64) as usize;
    let mut page: Vec<_> = match wanted.backwards {
        true => matching.rev().take(most).collect(),
        false => matching.take(most).collect(),
    };
    if wanted.backwards {
        page.reverse();
    }
    let jid = |name: &str| format!("{name}@{host}");
    let mut query = Element::new("query", disco::NS_ITEMS);
    for (name, title) in &page {
        let item = Element::new("item", disco::NS_ITEMS)
            .attr("jid", jid(name))
            .attr("name", &***title);
        query = query.child(item);
    }
    let paged = iq.payload.find("set", rsm::NS).is_some() || page.len() < rooms.len();
    if paged {
        let first = page.first().map(|(name, _)| &***name);
        let begins = rooms.first_key_value().map(|(name, _)| &**name);
        let ends = page.first().zip(page.last());
        let shown = rsm::Shown {
            ends: ends.map(|(first, last)| (jid(first.0), jid(last.0))),
            index: (first.is_some() && first == begins).then_some(0),
            count: Some(rooms.len() as u64),
        };
        query = query.child(shown.element());
    }
    slice.iq_result(&iq, Some(query));
}
