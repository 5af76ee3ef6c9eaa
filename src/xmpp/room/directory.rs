//! The list of rooms that can be found (XEP-0045 section 6.3). Each shard has all of it: a room tells all shards when it begins,
//! changes its name or whether it can be found, and ends.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::Room;
use crate::xml::Element;
use crate::xmpp::batch::Item;
use crate::xmpp::error::StanzaError;
use crate::xmpp::feature::{disco, rsm};
use crate::xmpp::iq::Iq;
use crate::xmpp::slice::Slice;

/// Local part and title of each room.
#[derive(Default)]
pub struct Directory(BTreeMap<Box<str>, Box<str>>);

/// Rooms in one answer.
const PAGE_MAX: usize = 500;

/// What all may know of a room has perhaps changed.
pub fn tell(slice: &mut Slice, room: &Room) {
    let s = &room.state.settings;
    let shown = s.public && !room.locked && !room.gone;
    // a room without a title is called by its name
    let listed = match (shown, s.title.is_empty()) {
        (false, _) => "",
        (true, true) => room.local(),
        (true, false) => &s.title,
    };
    let name = room.local();
    if slice.rooms.directory.0.get(name).map_or("", |title| title) == listed {
        return;
    }
    for shard in 0..slice.fx.mesh.len() {
        if shard != usize::from(slice.env.shard) {
            let batch = &mut slice.fx.mesh[shard];
            let (name, listed) = (batch.put(name.as_bytes()), batch.put(listed.as_bytes()));
            batch.items.push(Item::Listing { name, listed });
        }
    }
    told(slice, name, listed.as_bytes());
}

/// A room has told; an empty title: it is not to be found.
pub fn told(slice: &mut Slice, name: &str, listed: &[u8]) {
    let title = String::from_utf8_lossy(listed);
    match title.is_empty() {
        true => slice.rooms.directory.0.remove(name),
        false => slice.rooms.directory.0.insert(name.into(), title.into()),
    };
}

/// Section 6.3, page by page (XEP-0059).
pub fn answer(slice: &mut Slice, iq: Iq) {
    let Some(host) = slice.env.rooms.clone() else {
        return;
    };
    let wanted = match rsm::Wanted::of(&iq.payload) {
        Ok(wanted) => wanted,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let rooms = &slice.rooms.directory.0;
    let local = |id: &Option<String>| -> Option<String> {
        let id = id.as_deref()?;
        Some(id.split('@').next().unwrap_or(id).to_owned())
    };
    let (after, before) = (local(&wanted.after), local(&wanted.before));
    let unknown = |id: &Option<String>| id.as_ref().is_some_and(|id| !rooms.contains_key(&**id));
    if unknown(&after) || unknown(&before) {
        return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    }
    let behind = |name: &str| after.as_deref().is_none_or(|after| name > after);
    let ahead = |name: &str| before.as_deref().is_none_or(|before| name < before);
    let matching = rooms.iter().filter(|(name, _)| behind(name) && ahead(name));
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
        let index = first.map(|first| {
            let ahead = (Bound::Unbounded, Bound::Excluded(first));
            rooms.range::<str, _>(ahead).count() as u64
        });
        let ends = page.first().zip(page.last());
        let shown = rsm::Shown {
            ends: ends.map(|(first, last)| (jid(first.0), jid(last.0))),
            index,
            count: Some(rooms.len() as u64),
        };
        query = query.child(shown.element());
    }
    slice.iq_result(&iq, Some(query));
}
