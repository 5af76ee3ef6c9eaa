//! The newest entries of archives that somebody reads, in memory: the last page of a conversation that goes on costs no SQL.
//!
//! In: pages that reach the end of an archive, and what becomes durable in it afterwards. Out: pages, exactly as SQL and
//! overlay would give them, or nothing. Promises: only archives that were asked for are kept, so a user who never asks costs
//! nothing; all together are bounded by bytes, and the coldest go first.
//!
//! What is kept of an archive is one *tail* for each filter by address that was asked with: all entries that match, from
//! some id on to the newest one.

use std::collections::VecDeque;
use std::rc::Rc;

use smallvec::SmallVec;

use super::cache::Cache;
use super::change::Id;
use super::overlay::is_with;
use super::tier::{ArchiveQuery, Entry, Page};

/// Filters of one archive.
const TAILS_MAX: usize = 4;
/// Entries of one tail.
const ENTRIES_MAX: usize = 300;
/// What an entry costs beside its texts.
const ENTRY_BYTES: usize = size_of::<Entry>() + 32;

/// The archives of one shard that were asked for.
pub struct Recent {
    archives: Cache<Tails>,
    unsettled: u64,
    /// Pages that came from here, and pages that did not.
    pub hits: u64,
    pub misses: u64,
}

#[derive(Default)]
struct Tails {
    /// The last one was asked for last.
    tails: SmallVec<[Tail; 1]>,
    /// The archive's first entry, if somebody has asked for it.
    first: Option<u64>,
}

struct Tail {
    with: Option<Box<str>>,
    /// Ids ascend.
    entries: VecDeque<Rc<Entry>>,
    bytes: usize,
    before: Before,
    /// All that match, in the whole archive.
    count: Option<u64>,
    /// It is not known yet which of them were retracted: [`Recent::settle`] tells, with this number.
    unsettled: Option<u64>,
}

/// What matches and lies before a tail.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Something,
    Unknown,
}

/// Ids from `.0` to `.1`, both inclusive.
type Range = (u64, u64);

impl Recent {
    /// Keeps nothing if there is no room for anything.
    pub fn new(bytes_max: usize) -> Recent {
        Recent {
            archives: Cache::new(bytes_max),
            unsettled: 0,
            hits: 0,
            misses: 0,
        }
    }

    pub fn bytes(&self) -> usize {
        self.archives.stats().bytes
    }

    /// The page, if it is here.
    pub fn page(&mut self, query: &ArchiveQuery) -> Option<Page> {
        let page = self.archives.get_mut(&query.name).and_then(|archive| {
            let at = archive.position(&query.with)?;
            let page = archive.tails[at].page(query)?;
            archive.warm(at);
            Some(page)
        });
        match page {
            Some(_) => self.hits += 1,
            None => self.misses += 1,
        }
        page
    }

    /// Ids of the first and the last entry of an archive, if both are known here; the inner `None`: it is empty.
    pub fn ends(&self, name: &str) -> Option<Option<(u64, u64)>> {
        let archive = self.archives.get(name)?;
        let whole = |tail: &&Tail| tail.with.is_none();
        let tail = archive.tails.iter().find(whole)?;
        let first = match tail.is_whole() {
            true => tail.entries.front().map(|entry| entry.id),
            false => Some(archive.first?),
        };
        match (first, tail.entries.back()) {
            (Some(first), Some(last)) => Some(Some((first, last.id))),
            (None, None) => Some(None),
            _ => None,
        }
    }

    /// The same for a client that has asked for it, which is counted.
    pub fn asked_ends(&mut self, name: &str) -> Option<Option<(u64, u64)>> {
        let ends = self.ends(name);
        match ends {
            Some(_) => self.hits += 1,
            None => self.misses += 1,
        }
        ends
    }

    /// The first page of the whole archive was read.
    fn begins(&mut self, query: &ArchiveQuery, page: &Page) {
        let unbounded =
            query.before_id.is_none() && query.after_id.is_none() && query.with.is_none();
        let first = query.start_ms.is_none() && query.after.is_none() && query.ids.is_empty();
        let read = !query.backwards || page.complete;
        if unbounded
            && first
            && read
            && let Some(entry) = page.entries.first()
            && let Some(archive) = self.archives.get_mut(&query.name)
        {
            archive.first = Some(entry.id);
        }
    }

    /// Keeps a page that was read, if it reaches the end of the archive. Nothing else may have become durable since. If
    /// something in the archive was retracted, the page is not given before [`Recent::settle`] is called with this number.
    pub fn put(&mut self, query: &ArchiveQuery, page: &Page) -> u64 {
        self.unsettled += 1;
        self.begins(query, page);
        let open = query.end_ms.is_none() && query.before_id.is_none() && query.before.is_none();
        let ends = open && query.ids.is_empty() && (query.backwards || page.complete);
        let from_begin = query.start_ms.is_none() && query.after_id.is_none();
        let whole = page.complete && from_begin && query.after.is_none();
        if !ends || (page.entries.is_empty() && !whole) {
            return self.unsettled;
        }
        let mut tail = Tail {
            with: query.with.clone(),
            entries: page.entries.iter().cloned().map(Rc::new).collect(),
            bytes: page.entries.iter().map(cost).sum(),
            before: match (whole, page.complete) {
                (true, _) => Before::Nothing,
                (false, false) => Before::Something,
                (false, true) => Before::Unknown,
            },
            count: page.count.filter(|_| from_begin),
            unsettled: page.retracted.then_some(self.unsettled),
        };
        tail.trim();
        if self.archives.peek(&query.name).is_none() {
            self.archives.insert(&query.name, Tails::default(), 0);
        }
        let Some(archive) = self.archives.get_mut(&query.name) else {
            return self.unsettled;
        };
        if let Some(at) = archive.position(&query.with) {
            let old = archive.tails.remove(at);
            if old.unsettled.is_none() && old.reaches_behind(&tail) {
                tail = Tail {
                    count: tail.count.or(old.count),
                    ..old
                };
            } else {
                tail.count = tail.count.or(old.count);
            }
        } else if archive.tails.len() == TAILS_MAX {
            archive.tails.remove(0);
        }
        archive.tails.push(tail);
        self.resize(&query.name);
        self.unsettled
    }

    /// What of a page that was put before was retracted: entries as they are shown.
    pub fn settle(&mut self, query: &ArchiveQuery, number: u64, shown: &[Entry]) {
        let Some(archive) = self.archives.get_mut(&query.name) else {
            return;
        };
        let Some(at) = archive.position(&query.with) else {
            return;
        };
        let tail = &mut archive.tails[at];
        if tail.unsettled != Some(number) {
            return;
        }
        for one in shown {
            let at = tail.entries.binary_search_by_key(&one.id, |entry| entry.id);
            if let Ok(at) = at {
                tail.bytes = tail.bytes + cost(one) - cost(&tail.entries[at]);
                tail.entries[at] = Rc::new(one.clone());
            }
        }
        tail.unsettled = None;
        self.resize(&query.name);
    }

    /// Is anything of the archive here, so that [`Recent::append`] must hear of new entries?
    pub fn has(&self, name: &str) -> bool {
        !self.archives.is_empty() && self.archives.peek(name).is_some()
    }

    /// A new entry is durable.
    pub fn append(&mut self, name: &str, entry: Entry) {
        let Some(archive) = self.archives.get_mut(name) else {
            return;
        };
        let entry = Rc::new(entry);
        for tail in &mut archive.tails {
            if !tail.matches(&entry) {
                continue;
            }
            // they come in the order of their ids, so its place is the last
            let ids = tail.entries.binary_search_by_key(&entry.id, |e| e.id);
            if let Err(at) = ids {
                tail.bytes += cost(&entry);
                tail.entries.insert(at, entry.clone());
                tail.count = tail.count.map(|count| count + 1);
                tail.trim();
            }
        }
        self.resize(name);
    }

    /// An entry is none any more.
    pub fn drop_entry(&mut self, name: &str, id: u64) {
        let Some(archive) = self.archives.get_mut(name) else {
            return;
        };
        archive.first = archive.first.filter(|first| *first != id);
        for tail in &mut archive.tails {
            if let Ok(at) = tail.entries.binary_search_by_key(&id, |entry| entry.id) {
                tail.bytes -= cost(&tail.entries[at]);
                tail.entries.remove(at);
                tail.count = tail.count.map(|count| count.saturating_sub(1));
            }
        }
        // an empty one has no begin, but that of the archive
        archive
            .tails
            .retain(|tail| tail.is_whole() || !tail.entries.is_empty());
        self.resize(name);
    }

    /// The archive has changed in another way than by a new entry.
    pub fn forget(&mut self, name: &str) {
        self.archives.remove(name);
    }

    /// Entries with smaller ids may be purged any time: they are given no more.
    pub fn expire(&mut self, name: &str, before: u64) {
        let expires = |tail: &Tail| tail.first() < before;
        let begins = |archive: &Tails| archive.first.is_some_and(|first| first < before);
        let archive = self.archives.peek(name);
        if !archive.is_some_and(|archive| begins(archive) || archive.tails.iter().any(expires)) {
            return;
        }
        let Some(archive) = self.archives.get_mut(name) else {
            return;
        };
        archive.first = archive.first.filter(|first| *first >= before);
        for tail in archive.tails.iter_mut().filter(|tail| expires(tail)) {
            while tail.first() < before
                && let Some(first) = tail.entries.pop_front()
            {
                tail.bytes -= cost(&first);
            }
            (tail.before, tail.count) = (Before::Unknown, None);
        }
        archive.tails.retain(|tail| !tail.entries.is_empty());
        self.resize(name);
    }

    /// Entries were purged somewhere.
    pub fn clear(&mut self) {
        self.archives = Cache::new(self.archives.stats().bytes_max);
    }

    fn resize(&mut self, name: &str) {
        let Some(archive) = self.archives.peek(name) else {
            return;
        };
        let bytes = archive.tails.iter().map(|t| size_of::<Tail>() + t.bytes);
        let bytes = bytes.sum();
        self.archives.set_bytes(name, bytes);
        self.archives.evict(|_, _| {});
    }
}

fn cost(entry: &Entry) -> usize {
    ENTRY_BYTES + entry.stanza.len() + entry.peer.len()
}

impl Tails {
    fn position(&self, with: &Option<Box<str>>) -> Option<usize> {
        self.tails.iter().position(|tail| tail.with == *with)
    }

    fn warm(&mut self, at: usize) {
        self.tails[at..].rotate_left(1);
    }
}

impl Tail {
    fn matches(&self, entry: &Entry) -> bool {
        let with = self.with.as_deref();
        with.is_none_or(|with| is_with(&entry.peer, with))
    }

    fn trim(&mut self) {
        while self.entries.len() > ENTRIES_MAX
            && let Some(first) = self.entries.pop_front()
        {
            self.bytes -= cost(&first);
            self.before = Before::Something;
        }
    }

    fn is_whole(&self) -> bool {
        self.before == Before::Nothing
    }

    fn first(&self) -> u64 {
        self.entries.front().map_or(u64::MAX, |entry| entry.id)
    }

    fn reaches_behind(&self, other: &Tail) -> bool {
        self.is_whole() || (!other.is_whole() && self.first() <= other.first())
    }

    /// Is everything here that matches and has this id or a higher one?
    fn covers(&self, id: u64) -> bool {
        self.is_whole() || (!self.entries.is_empty() && id >= self.first())
    }

    /// Places of the entries within the range.
    fn places(&self, (first, last): Range) -> std::ops::Range<usize> {
        let begin = self.entries.partition_point(|entry| entry.id < first);
        let end = self.entries.partition_point(|entry| entry.id <= last);
        begin..end.max(begin)
    }

    fn has(&self, id: Option<u64>) -> bool {
        id.is_none_or(|id| {
            self.entries
                .binary_search_by_key(&id, |entry| entry.id)
                .is_ok()
        })
    }

    fn page(&self, query: &ArchiveQuery) -> Option<Page> {
        let bounds = [query.after, query.before, query.after_id, query.before_id];
        let known = bounds.into_iter().all(|id| self.has(id));
        if self.unsettled.is_some() || !query.ids.is_empty() || !known {
            return None;
        }
        let at = |ms: u64| Id::at(ms.min((1 << 42) - 1)).0;
        let start = query.start_ms.map_or(0, at);
        let end = query
            .end_ms
            .map_or(u64::MAX, |ms| at(ms).saturating_add(at(1) - 1));
        let filter = cut((start, end), query.after_id, query.before_id);
        let range = cut(filter, query.after, query.before);
        let places = self.places(range);
        let most = query.most as usize;
        let covered = self.covers(range.0);
        let (shown, complete) = if query.backwards {
            let first = places.end - places.len().min(most);
            let complete = match places.len() > most {
                true => false,
                false if covered => true,
                false
                    if places.len() == most && range.0 == 0 && self.before == Before::Something =>
                {
                    false
                }
                false => return None,
            };
            (first..places.end, complete)
        } else if covered {
            let end = places.start + places.len().min(most);
            (places.start..end, places.len() <= most)
        } else {
            return None;
        };
        let mut page = Page {
            complete,
            ..Page::default()
        };
        if query.count {
            let all = self.places(filter);
            let count = match self.covers(filter.0) {
                true => all.len(),
                false if filter == (0, u64::MAX) => self.count? as usize,
                false => return None,
            };
            let before = |place: usize| (count - (all.end - place)) as u64;
            page.count = Some(count as u64);
            page.index = (!shown.is_empty()).then(|| before(shown.start));
        }
        page.entries = shown.map(|at| (*self.entries[at]).clone()).collect();
        Some(page)
    }
}

/// What of a range lies between two exclusive bounds.
fn cut((first, last): Range, after: Option<u64>, before: Option<u64>) -> Range {
    let first = after.map_or(first, |after| first.max(after.saturating_add(1)));
    match before {
        Some(0) => (1, 0),
        Some(before) => (first, last.min(before - 1)),
        None => (first, last),
    }
}
