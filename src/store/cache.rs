//! The shard's cache: bare local part → the user's state, bounded in bytes.
//!
//! In: entries with their size, pins of those that are busy (online, or with writes under way). Out: the entries, and
//! on [`Cache::evict`] the coldest idle ones. Promises: a pinned entry is never evicted; while enough is idle, the
//! bytes stay under the bound after each `evict`; every operation is O(1), amortised.
//!
//! Idle entries form a doubly linked list from the coldest to the warmest, threaded through the slots. A read only
//! marks its entry (so that it needs no `&mut`), and eviction gives a marked one a second chance at the warm end.

use std::cell::Cell;
use std::rc::Rc;

use fnv::FnvHashMap;

/// What an entry costs beside its value's bytes and its name: slot, table entry, allocations' heads.
pub const ENTRY_OVERHEAD_BYTES: usize = 96;

const NONE: u32 = u32::MAX;

/// See the module's page. `V` is the user's state on this shard.
pub struct Cache<V> {
    bytes_max: usize,
    bytes: usize,
    index: FnvHashMap<Rc<str>, u32>,
    slots: Vec<Option<Slot<V>>>,
    free: Vec<u32>,
    coldest: u32,
    warmest: u32,
    idle: usize,
    hits: Cell<u64>,
    misses: Cell<u64>,
    evictions: u64,
}

struct Slot<V> {
    name: Rc<str>,
    value: V,
    bytes: usize,
    pins: u32,
    read: Cell<bool>,
    colder: u32,
    warmer: u32,
}

/// Figures for the metrics; the counts only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    pub entries: usize,
    /// Entries nobody has pinned.
    pub idle: usize,
    /// Values, names and [`ENTRY_OVERHEAD_BYTES`] each.
    pub bytes: usize,
    pub bytes_max: usize,
}

impl<V> Cache<V> {
    pub fn new(bytes_max: usize) -> Cache<V> {
        Cache {
            bytes_max,
            bytes: 0,
            index: FnvHashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            coldest: NONE,
            warmest: NONE,
            idle: 0,
            hits: Cell::new(0),
            misses: Cell::new(0),
            evictions: 0,
        }
    }

    /// The entry; counts as a hit or a miss, and a hit keeps it warm.
    pub fn get(&self, name: &str) -> Option<&V> {
        let slot = self.slot(self.find(name)?);
        slot.read.set(true);
        Some(&slot.value)
    }

    /// As [`Cache::get`], to change it. Tell the new size with [`Cache::set_bytes`].
    pub fn get_mut(&mut self, name: &str) -> Option<&mut V> {
        let at = self.find(name)?;
        let slot = self.slot_mut(at);
        slot.read.set(true);
        Some(&mut slot.value)
    }

    /// The entry, without counting and without warming it: for listings and metrics.
    pub fn peek(&self, name: &str) -> Option<&V> {
        self.index.get(name).map(|at| &self.slot(*at).value)
    }

    /// Adds an idle entry of `bytes`, or replaces the value of an entry and keeps its pins; gives back the old value.
    /// Evicts nothing: call [`Cache::evict`] after.
    pub fn insert(&mut self, name: &str, value: V, bytes: usize) -> Option<V> {
        if let Some(&at) = self.index.get(name) {
            let old = std::mem::replace(&mut self.slot_mut(at).value, value);
            self.set_slot_bytes(at, bytes);
            if self.slot(at).pins == 0 {
                self.unlink(at);
                self.link_warmest(at);
            }
            return Some(old);
        }
        let name: Rc<str> = name.into();
        self.bytes += total_bytes(&name, bytes);
        let slot = Slot {
            name: name.clone(),
            value,
            bytes,
            pins: 0,
            read: Cell::new(false),
            colder: NONE,
            warmer: NONE,
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.slots[at as usize] = Some(slot);
                at
            }
            None => {
                self.slots.push(Some(slot));
                (self.slots.len() - 1) as u32
            }
        };
        self.index.insert(name, at);
        self.link_warmest(at);
        None
    }

    /// The value's new size, after a change; false if there is no such entry.
    pub fn set_bytes(&mut self, name: &str, bytes: usize) -> bool {
        let Some(&at) = self.index.get(name) else {
            return false;
        };
        self.set_slot_bytes(at, bytes);
        true
    }

    /// Takes an entry out, pinned or not (its pins are forgotten).
    pub fn remove(&mut self, name: &str) -> Option<V> {
        let at = self.index.remove(name)?;
        if self.slot(at).pins == 0 {
            self.unlink(at);
        }
        Some(self.free_slot(at).value)
    }

    /// Makes an entry busy; counted, so each pin needs its [`Cache::unpin`]. False if there is no such entry.
    pub fn pin(&mut self, name: &str) -> bool {
        let Some(&at) = self.index.get(name) else {
            return false;
        };
        if self.slot(at).pins == 0 {
            self.unlink(at);
        }
        self.slot_mut(at).pins += 1;
        true
    }

    /// Takes one pin back; with the last one the entry becomes idle, as the warmest. False if there was no pin.
    pub fn unpin(&mut self, name: &str) -> bool {
        let Some(&at) = self.index.get(name) else {
            return false;
        };
        let slot = self.slot_mut(at);
        if slot.pins == 0 {
            return false;
        }
        slot.pins -= 1;
        if slot.pins == 0 {
            slot.read.set(false);
            self.link_warmest(at);
        }
        true
    }

    /// How often an entry is pinned; 0 also if there is none.
    pub fn pins(&self, name: &str) -> u32 {
        self.index.get(name).map_or(0, |at| self.slot(*at).pins)
    }

    /// Evicts idle entries, coldest first, until the bytes are under the bound or nothing is idle; how many went.
    pub fn evict(&mut self, mut evicted: impl FnMut(&str, V)) -> usize {
        let mut count = 0;
        while self.bytes > self.bytes_max && self.coldest != NONE {
            let at = self.coldest;
            self.unlink(at);
            // A second chance is given once for each read, so the loop ends.
            if self.slot(at).read.replace(false) && self.coldest != NONE {
                self.link_warmest(at);
                continue;
            }
            let slot = self.free_slot(at);
            self.index.remove(&slot.name);
            self.evictions += 1;
            count += 1;
            evicted(&slot.name, slot.value);
        }
        count
    }

    /// Over the bound although all that is idle may have gone: the busy ones alone need more.
    pub fn is_over(&self) -> bool {
        self.bytes > self.bytes_max
    }

    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &V)> {
        self.slots
            .iter()
            .flatten()
            .map(|slot| (&*slot.name, &slot.value))
    }

    /// All entries, in no order, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut V)> {
        self.slots
            .iter_mut()
            .flatten()
            .map(|slot| (&*slot.name, &mut slot.value))
    }

    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.get(),
            misses: self.misses.get(),
            evictions: self.evictions,
            entries: self.index.len(),
            idle: self.idle,
            bytes: self.bytes,
            bytes_max: self.bytes_max,
        }
    }

    fn find(&self, name: &str) -> Option<u32> {
        let found = self.index.get(name).copied();
        let counter = if found.is_some() {
            &self.hits
        } else {
            &self.misses
        };
        counter.set(counter.get() + 1);
        found
    }

    fn slot(&self, at: u32) -> &Slot<V> {
        self.slots[at as usize]
            .as_ref()
            .expect("the index and the list name only slots in use")
    }

    fn slot_mut(&mut self, at: u32) -> &mut Slot<V> {
        self.slots[at as usize]
            .as_mut()
            .expect("the index and the list name only slots in use")
    }

    fn set_slot_bytes(&mut self, at: u32, bytes: usize) {
        let old = std::mem::replace(&mut self.slot_mut(at).bytes, bytes);
        self.bytes = self.bytes - old + bytes;
    }

    /// Empties a slot that stands in no list any more.
    fn free_slot(&mut self, at: u32) -> Slot<V> {
        let slot = self.slots[at as usize]
            .take()
            .expect("the index and the list name only slots in use");
        self.bytes -= total_bytes(&slot.name, slot.bytes);
        self.free.push(at);
        slot
    }

    fn link_warmest(&mut self, at: u32) {
        let colder = std::mem::replace(&mut self.warmest, at);
        let slot = self.slot_mut(at);
        (slot.colder, slot.warmer) = (colder, NONE);
        match colder {
            NONE => self.coldest = at,
            colder => self.slot_mut(colder).warmer = at,
        }
        self.idle += 1;
    }

    fn unlink(&mut self, at: u32) {
        let slot = self.slot(at);
        let (colder, warmer) = (slot.colder, slot.warmer);
        match colder {
            NONE => self.coldest = warmer,
            colder => self.slot_mut(colder).warmer = warmer,
        }
        match warmer {
            NONE => self.warmest = colder,
            warmer => self.slot_mut(warmer).colder = colder,
        }
        self.idle -= 1;
    }
}

fn total_bytes(name: &str, bytes: usize) -> usize {
    name.len() + bytes + ENTRY_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cache(entries: usize) -> Cache<u32> {
        Cache::new(entries * (ENTRY_OVERHEAD_BYTES + 1 + 100))
    }

    #[test]
    fn the_coldest_idle_entry_goes_first_and_a_busy_one_never() {
        let mut cache = cache(2);
        for (n, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
            cache.insert(name, n as u32, 100);
        }
        cache.pin("a");
        cache.get("b"); // read: warmer than c
        let mut gone = Vec::new();
        assert_eq!(cache.evict(|name, _| gone.push(name.to_owned())), 2);
        assert_eq!(gone, ["c", "d"]);
        cache.insert("e", 4, 500);
        cache.evict(|_, _| {});
        assert_eq!(cache.peek("a"), Some(&0));
        cache.unpin("a");
        assert_eq!(cache.stats().evictions, 4);
    }

    #[test]
    fn an_entry_too_large_for_the_cache_is_evicted_even_if_it_was_just_read() {
        let mut cache = cache(1);
        cache.insert("a", 1, 1000);
        cache.get("a");
        assert_eq!(cache.evict(|_, _| {}), 1);
        assert_eq!(cache.stats().bytes, 0);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u8, u16),
        Get(u8),
        SetBytes(u8, u16),
        Remove(u8),
        Pin(u8),
        Unpin(u8),
        Evict,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let name = 0u8..24;
        proptest::collection::vec(
            prop_oneof![
                (name.clone(), 0u16..600).prop_map(|(n, bytes)| Step::Insert(n, bytes)),
                name.clone().prop_map(Step::Get),
                (name.clone(), 0u16..600).prop_map(|(n, bytes)| Step::SetBytes(n, bytes)),
                name.clone().prop_map(Step::Remove),
                name.clone().prop_map(Step::Pin),
                name.prop_map(Step::Unpin),
                Just(Step::Evict),
            ],
            0..200,
        )
    }

    /// The same promise, written as slowly as can be: idle entries in a vector, coldest first.
    #[derive(Default)]
    struct Model {
        idle: Vec<Entry>,
        busy: Vec<Entry>,
    }

    #[derive(Clone, PartialEq, Debug)]
    struct Entry {
        name: String,
        value: u32,
        bytes: usize,
        pins: u32,
        read: bool,
    }

    impl Model {
        fn entry(&mut self, name: &str) -> Option<&mut Entry> {
            self.idle
                .iter_mut()
                .chain(&mut self.busy)
                .find(|entry| entry.name == name)
        }
        fn take(&mut self, name: &str) -> Option<Entry> {
            for list in [&mut self.idle, &mut self.busy] {
                if let Some(at) = list.iter().position(|entry| entry.name == name) {
                    return Some(list.remove(at));
                }
            }
            None
        }
        fn put(&mut self, entry: Entry) {
            if entry.pins == 0 {
                self.idle.push(entry)
            } else {
                self.busy.push(entry)
            }
        }
        fn bytes(&self) -> usize {
            let all = self.idle.iter().chain(&self.busy);
            all.map(|entry| entry.name.len() + entry.bytes + ENTRY_OVERHEAD_BYTES)
                .sum()
        }
    }

    proptest! {
        #[test]
        fn the_cache_does_what_a_simple_model_does(steps in steps(), bytes_max in 0usize..6000) {
            let mut cache = Cache::new(bytes_max);
            let mut model = Model::default();
            for (value, step) in steps.into_iter().enumerate() {
                let value = value as u32;
                match step {
                    Step::Insert(n, bytes) => {
                        let (name, bytes) = (format!("user{n}"), usize::from(bytes));
                        let old = model.take(&name);
                        prop_assert_eq!(cache.insert(&name, value, bytes), old.as_ref().map(|entry| entry.value));
                        let (pins, read) = old.map_or((0, false), |entry| (entry.pins, entry.read));
                        model.put(Entry { name, value, bytes, pins, read });
                    }
                    Step::Get(n) => {
                        let name = format!("user{n}");
                        let want = model.entry(&name).map(|entry| { entry.read = true; entry.value });
                        prop_assert_eq!(cache.get(&name).copied(), want);
                    }
                    Step::SetBytes(n, bytes) => {
                        let name = format!("user{n}");
                        let known = model.entry(&name).map(|entry| entry.bytes = bytes.into()).is_some();
                        prop_assert_eq!(cache.set_bytes(&name, bytes.into()), known);
                    }
                    Step::Remove(n) => {
                        let name = format!("user{n}");
                        prop_assert_eq!(cache.remove(&name), model.take(&name).map(|entry| entry.value));
                    }
                    Step::Pin(n) => {
                        let name = format!("user{n}");
                        let taken = model.take(&name);
                        prop_assert_eq!(cache.pin(&name), taken.is_some());
                        if let Some(entry) = taken {
                            model.put(Entry { pins: entry.pins + 1, ..entry });
                        }
                    }
                    Step::Unpin(n) => {
                        let name = format!("user{n}");
                        let pinned = model.entry(&name).is_some_and(|entry| entry.pins > 0);
                        prop_assert_eq!(cache.unpin(&name), pinned);
                        if pinned {
                            let entry = model.take(&name).unwrap();
                            model.put(Entry { pins: entry.pins - 1, read: entry.read && entry.pins > 1, ..entry });
                        }
                    }
                    Step::Evict => {
                        let mut want = Vec::new();
                        while model.bytes() > bytes_max && !model.idle.is_empty() {
                            let mut entry = model.idle.remove(0);
                            if std::mem::take(&mut entry.read) && !model.idle.is_empty() {
                                model.idle.push(entry);
                            } else {
                                want.push((entry.name, entry.value));
                            }
                        }
                        let mut got = Vec::new();
                        cache.evict(|name, value| got.push((name.to_owned(), value)));
                        prop_assert_eq!(got, want);
                        prop_assert!(!cache.is_over() || cache.stats().idle == 0);
                    }
                }
                prop_assert_eq!(cache.stats().bytes, model.bytes());
                prop_assert_eq!(cache.stats().idle, model.idle.len());
                prop_assert_eq!(cache.len(), model.idle.len() + model.busy.len());
                prop_assert!(cache.slots.len() <= 24, "slots are used again");
            }
        }
    }
}
