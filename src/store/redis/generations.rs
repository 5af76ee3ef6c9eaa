//! What a blade must not forget about its instances: each one's generation, and how the ring used to look.
//!
//! In: the instances that are configured, and requests for a new generation. Out: [`Generation`]s that are durable when
//! they are given out, and the [`Placement`] of names. Promises:
//!
//! - each shard has a generation of its own for each instance, so a write that one missed does not make the others' users
//!   cold. The numbers of a user only grow: a shard that needs a new one gets, if there is one, another's that is newer
//!   than its own (it never wrote there), and with another number of shards all go on with the newest;
//! - a number is made once, even if the file is lost or an old one is restored: numbers are microseconds since
//!   1970, and at least one more than the last;
//! - a name that left an instance and comes back (an instance was added and taken away, a weight changed twice) does
//!   not find there what it left behind: its key holds the number of the change that brought it to its instance. Names
//!   that stayed keep their keys, so adding an instance costs the names that move and no others.
//!
//! One small JSON file, replaced whole (written aside, synced, renamed, folder synced). It is the blade's: shards share
//! it behind a lock and must not wait for its disk, so a thread of the blade renews. A file that cannot be read is the
//! same as none: all copies are cold then, none is wrong. Whoever restores a backup of the database leaves this file
//! out, and deletes one that is there: Redis may hold what the backup does not know yet.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::address::Address;
use crate::store::folder::sync_above;
use crate::store::ring::{Ring, SLOTS};

/// What keys of an instance begin with, and the server that it was made for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    pub number: u64,
    /// `run_id` of `INFO server`; empty: it was not known.
    pub run_id: Box<str>,
}

/// Which instance holds a name, and since which change of the ring. Cheap to clone.
#[derive(Clone)]
pub struct Placement {
    ring: Ring,
    since: Arc<[u32]>,
}

/// See the module's page.
#[derive(Debug)]
pub struct Generations {
    path: PathBuf,
    shards: usize,
    incarnation: u64,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    version: u32,
    last_number: u64,
    /// By instance: one for each shard.
    generations: BTreeMap<String, Vec<Option<Generation>>>,
    /// The oldest first; the last one is in use.
    layouts: Vec<Layout>,
}

/// How the ring looked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Grows with each change.
    pub epoch: u32,
    /// Name and weight.
    pub members: Vec<(String, u32)>,
}

const VERSION: u32 = 1;

/// Beyond, names that stayed longer are cold once.
const LAYOUTS_MAX: usize = 16;

impl Generations {
    /// Reads the file, notes the ring as it is configured now, forgets instances that are not configured any more.
    /// `unix_us`: now.
    pub fn open(
        path: impl Into<PathBuf>,
        addresses: &[Address],
        shards: usize,
        unix_us: u64,
    ) -> io::Result<Generations> {
        let path = path.into();
        let mut state = match fs::read(&path) {
            Ok(bytes) => read(&bytes).unwrap_or_else(|why| {
                tracing::warn!(
                    "{} is not used ({why}): what Redis holds is read anew from the database",
                    path.display()
                );
                State::default()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => State::default(),
            Err(error) => return Err(error),
        };
        let members: Vec<_> = addresses
            .iter()
            .map(|address| (address.name.to_string(), address.weight))
            .collect();
        let epoch = state.layouts.last().map_or(0, |layout| layout.epoch);
        if state.layouts.last().map(|layout| &layout.members) != Some(&members) {
            let epoch = epoch + 1;
            state.layouts.push(Layout { epoch, members });
            let surplus = state.layouts.len().saturating_sub(LAYOUTS_MAX);
            state.layouts.drain(..surplus);
        }
        state
            .generations
            .retain(|name, _| addresses.iter().any(|address| *address.name == **name));
        for of_shards in state.generations.values_mut() {
            if of_shards.len() != shards {
                let newest = of_shards.iter().flatten().max_by_key(|of| of.number);
                *of_shards = vec![newest.cloned(); shards];
            }
        }
        let incarnation = state.next_number(unix_us);
        let generations = Generations {
            path,
            shards,
            incarnation,
            state,
        };
        generations.write()?;
        Ok(generations)
    }

    /// Somebody changes, or may have changed, what the copies were made of, without telling the ring: none of them is
    /// used again. Durable when it returns.
    pub fn forget(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Ok(()) => sync_above(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A number of the same series for this process: greater than those of all before it.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// What a shard has for each instance as configured, if it has one.
    pub fn all(&self, shard: usize) -> Vec<Option<Generation>> {
        let members = &self.layout().members;
        members
            .iter()
            .map(|(name, _)| self.state.generations.get(name)?[shard].clone())
            .collect()
    }

    pub fn placement(&self) -> Placement {
        Placement::new(&self.state.layouts)
    }

    /// A new generation for the instance with this index, durable when this returns. On an error nothing has changed.
    pub fn renew(
        &mut self,
        shard: usize,
        instance: usize,
        run_id: &str,
        unix_us: u64,
    ) -> io::Result<Generation> {
        let name = self.layout().members[instance].0.clone();
        let before = self.state.generations.clone();
        let of_shards = before.get(&name);
        let mut of_shards = of_shards.cloned().unwrap_or(vec![None; self.shards]);
        let own = of_shards[shard].as_ref().map_or(0, |own| own.number);
        let newer = of_shards
            .iter()
            .flatten()
            .filter(|of| of.number > own && *of.run_id == *run_id)
            .max_by_key(|of| of.number);
        let generation = newer.cloned().unwrap_or_else(|| Generation {
            // Not made again, whatever the disk makes of it.
            number: self.state.next_number(unix_us),
            run_id: run_id.into(),
        });
        of_shards[shard] = Some(generation.clone());
        self.state.generations.insert(name, of_shards);
        if let Err(error) = self.write() {
            self.state.generations = before;
            return Err(error);
        }
        Ok(generation)
    }

    fn layout(&self) -> &Layout {
        self.state.layouts.last().expect("`open` noted one")
    }

    fn write(&self) -> io::Result<()> {
        let aside = self.path.with_extension("new");
        let mut file = fs::File::create(&aside)?;
        file.write_all(&serde_json::to_vec_pretty(&self.state)?)?;
        file.sync_all()?;
        fs::rename(&aside, &self.path)?;
        sync_above(&self.path)
    }
}

impl State {
    fn next_number(&mut self, unix_us: u64) -> u64 {
        self.last_number = unix_us.max(self.last_number + 1);
        self.last_number
    }
}

impl Default for State {
    fn default() -> State {
        State {
            version: VERSION,
            last_number: 0,
            generations: BTreeMap::new(),
            layouts: Vec::new(),
        }
    }
}

fn read(bytes: &[u8]) -> Result<State, String> {
    let state: State = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let usable = |layout: &Layout| layout.members.iter().any(|(_, weight)| *weight > 0);
    match state.version {
        VERSION if state.layouts.iter().all(usable) => Ok(state),
        VERSION => Err("it names a ring without instances".into()),
        other => Err(format!(
            "it has version {other}, this nitro reads {VERSION}"
        )),
    }
}

impl Placement {
    /// `history`: the oldest first, the last one in use; not empty.
    pub fn new(history: &[Layout]) -> Placement {
        let (now, before) = history.split_last().expect("a ring is in use");
        let ring = Ring::new(&now.members);
        let mut since = vec![now.epoch; SLOTS];
        let mut stayed = vec![true; SLOTS];
        for layout in before.iter().rev() {
            let old = Ring::new(&layout.members);
            let same: Vec<_> = layout
                .members
                .iter()
                .map(|(name, _)| now.members.iter().position(|(other, _)| other == name))
                .collect();
            for slot in 0..SLOTS {
                stayed[slot] &= same[old.slot_owner(slot)] == Some(ring.slot_owner(slot));
                if stayed[slot] {
                    since[slot] = layout.epoch;
                }
            }
        }
        Placement {
            ring,
            since: since.into(),
        }
    }

    /// Index of the instance, and the epoch since which it holds the name.
    pub fn of(&self, name: &str) -> (usize, u32) {
        let slot = Ring::slot(name);
        (self.ring.slot_owner(slot), self.since[slot])
    }

    pub fn instances(&self) -> usize {
        self.ring.members()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addresses(list: &[(&str, u32)]) -> Vec<Address> {
        list.iter()
            .map(|(name, weight)| {
                Address::parse(&format!(
                    "unix:///r/{name}.sock?weight={weight}&name={name}"
                ))
                .unwrap()
            })
            .collect()
    }

    #[test]
    fn a_number_is_never_given_out_twice_whatever_the_clock_and_the_file_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("redis.json");
        let two = addresses(&[("a", 1), ("b", 1)]);
        let mut generations = Generations::open(&path, &two, 1, 10).unwrap();
        assert_eq!(generations.all(0), [None, None]);
        let first = generations.renew(0, 0, "x", 1000).unwrap();
        let second = generations.renew(0, 1, "y", 900).unwrap();
        assert!(second.number > first.number);
        drop(generations);
        let mut generations = Generations::open(&path, &two, 1, 10).unwrap();
        assert_eq!(
            generations.all(0),
            [Some(first.clone()), Some(second.clone())]
        );
        assert!(generations.renew(0, 0, "x", 5).unwrap().number > second.number);
        fs::write(&path, b"{ half").unwrap();
        let mut generations = Generations::open(&path, &two, 1, 10).unwrap();
        assert_eq!(generations.all(0), [None, None]);
        assert!(generations.renew(0, 0, "x", 2000).unwrap().number >= 2000);
    }

    #[test]
    fn what_was_forgotten_is_not_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("redis.json");
        Generations::forget(&path).unwrap();
        let one = addresses(&[("a", 1)]);
        let mut generations = Generations::open(&path, &one, 1, 10).unwrap();
        generations.renew(0, 0, "x", 1000).unwrap();
        Generations::forget(&path).unwrap();
        let again = Generations::open(&path, &one, 1, 20).unwrap();
        assert_eq!(again.all(0), [None]);
    }

    #[test]
    fn an_instance_that_was_taken_away_comes_back_as_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("redis.json");
        let mut generations =
            Generations::open(&path, &addresses(&[("a", 1), ("b", 1)]), 1, 10).unwrap();
        generations.renew(0, 1, "x", 1000).unwrap();
        Generations::open(&path, &addresses(&[("a", 1)]), 1, 10).unwrap();
        let generations =
            Generations::open(&path, &addresses(&[("a", 1), ("b", 1)]), 1, 10).unwrap();
        assert_eq!(generations.all(0), [None, None]);
    }

    #[test]
    fn a_shard_that_missed_a_write_does_not_make_the_others_cold() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("redis.json");
        let one = addresses(&[("a", 1)]);
        let open = |shards, unix_us| Generations::open(&path, &one, shards, unix_us).unwrap();
        let numbers = |of: &Generations, shards| {
            let number = |shard| of.all(shard)[0].as_ref().map(|of: &Generation| of.number);
            (0..shards).map(number).collect::<Vec<_>>()
        };
        // Both see a new server: they meet at one number.
        let mut generations = open(2, 10);
        let first = generations.renew(1, 0, "x", 1000).unwrap();
        assert_eq!(generations.renew(0, 0, "x", 1001).unwrap(), first);
        // One misses a write; the other one keeps its own.
        let second = generations.renew(0, 0, "x", 2000).unwrap();
        assert!(second.number > first.number);
        let generations = open(2, 20);
        assert_eq!(
            numbers(&generations, 2),
            [Some(second.number), Some(first.number)]
        );
        // Users go to other shards: the newest number is behind none of theirs.
        assert_eq!(numbers(&open(3, 30), 3), [Some(second.number); 3]);
        // Another server: no shard's number is good for it.
        let third = open(3, 40).renew(2, 0, "y", 3000).unwrap();
        assert!(third.number > second.number);
        assert_eq!(open(3, 50).renew(1, 0, "y", 4000).unwrap(), third);
    }

    #[test]
    fn a_failed_renewal_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/redis.json");
        fs::create_dir(folder.path().join("sub")).unwrap();
        let mut generations = Generations::open(&path, &addresses(&[("a", 1)]), 1, 10).unwrap();
        let first = generations.renew(0, 0, "x", 1000).unwrap();
        fs::remove_dir_all(folder.path().join("sub")).unwrap();
        generations.renew(0, 0, "y", 2000).unwrap_err();
        assert_eq!(generations.all(0), [Some(first)]);
    }

    #[test]
    fn adding_an_instance_leaves_the_keys_of_those_who_stay() {
        let members = |count: usize| {
            (0..count)
                .map(|n| (format!("redis-{n}"), 1))
                .collect::<Vec<_>>()
        };
        for count in [1, 3, 4, 8] {
            let old = Layout {
                epoch: 4,
                members: members(count),
            };
            let new = Layout {
                epoch: 5,
                members: members(count + 1),
            };
            let (before, after) = (
                Placement::new(std::slice::from_ref(&old)),
                Placement::new(&[old, new]),
            );
            let changed = (0..100_000)
                .map(|n| format!("trader{n:06}"))
                .filter(|name| before.of(name) != after.of(name))
                .count();
            let bound = 1.0 / (count + 1) as f64 + 0.02;
            assert!(
                changed as f64 / 100_000.0 <= bound,
                "{changed} of 100,000 names have other keys"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        /// A copy left behind is never found again, whatever became of the ring meanwhile.
        #[test]
        fn who_comes_back_to_an_instance_does_not_find_what_he_left(
            rings in proptest::collection::vec(proptest::collection::vec(0u32..3, 3), 1..8),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("redis.json");
            let names: Vec<_> = (0..200).map(|n| format!("user{n}")).collect();
            // (instance, name, since) → the newest write that reached it; one write of each name for each ring
            let mut copies = std::collections::HashMap::new();
            for (round, weights) in rings.iter().enumerate() {
                let list: Vec<_> = ["a", "b", "c"].into_iter().zip(weights.iter().copied())
                    .filter(|(_, weight)| *weight > 0)
                    .collect();
                if list.is_empty() {
                    continue;
                }
                let placement = Generations::open(&path, &addresses(&list), 1, 10).unwrap().placement();
                for name in &names {
                    let (at, since) = placement.of(name);
                    let key = (list[at].0, name.clone(), since);
                    if let Some((_, latest)) = copies.get(&key) {
                        prop_assert_eq!(latest, &copies[&("latest", name.clone(), 0)].1);
                    }
                    copies.insert(key, ((), round));
                    copies.insert(("latest", name.clone(), 0), ((), round));
                }
            }
        }
    }
}
