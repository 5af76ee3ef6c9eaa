//! What a blade must not forget about its instances: each one's generation, and how the ring used to look.
//!
//! In: the instances that are configured, and requests for a new generation. Out: [`Generation`]s that are durable when
//! they are given out, and the [`Placement`] of names. Promises:
//!
//! - a number is given out once, even if the file is lost or an old one is restored: numbers are microseconds since
//!   1970, and at least one more than the last;
//! - a name that left an instance and comes back (an instance was added and taken away, a weight changed twice) does
//!   not find there what it left behind: its key holds the number of the change that brought it to its instance. Names
//!   that stayed keep their keys, so adding an instance costs the names that move and no others.
//!
//! One small JSON file, replaced whole (written aside, synced, renamed, folder synced). It is the blade's: shards share
//! it behind a lock and must not wait for its disk, so a thread of the blade renews. A file that cannot be read is the
//! same as none: all copies are cold then, none is wrong.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::address::Address;
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
    state: State,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    version: u32,
    last_number: u64,
    generations: BTreeMap<String, Generation>,
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
    pub fn open(path: impl Into<PathBuf>, addresses: &[Address]) -> io::Result<Generations> {
        let path = path.into();
        let found = match fs::read(&path) {
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
        let mut state = found.clone();
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
        let generations = Generations { path, state };
        if generations.state != found {
            generations.write()?;
        }
        Ok(generations)
    }

    /// Somebody changes, or may have changed, what the copies were made of, without telling the ring: none of them is
    /// used again. Durable when it returns.
    pub fn forget(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Ok(()) => sync_folder(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// For each instance as configured: what it has, if it has one.
    pub fn all(&self) -> Vec<Option<Generation>> {
        let members = &self.layout().members;
        members
            .iter()
            .map(|(name, _)| self.state.generations.get(name).cloned())
            .collect()
    }

    pub fn placement(&self) -> Placement {
        Placement::new(&self.state.layouts)
    }

    /// A new generation for the instance with this index, durable when this returns. On an error nothing has changed.
    pub fn renew(&mut self, instance: usize, run_id: &str, unix_us: u64) -> io::Result<Generation> {
        let generation = Generation {
            number: unix_us.max(self.state.last_number + 1),
            run_id: run_id.into(),
        };
        let name = self.layout().members[instance].0.clone();
        let before = self.state.clone();
        self.state.last_number = generation.number;
        self.state.generations.insert(name, generation.clone());
        if let Err(error) = self.write() {
            // The number is not used again, whatever the disk made of it.
            self.state.generations = before.generations;
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
        sync_folder(&self.path)
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|path| !path.as_os_str().is_empty());
    fs::File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
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
        let mut generations = Generations::open(&path, &two).unwrap();
        assert_eq!(generations.all(), [None, None]);
        let first = generations.renew(0, "x", 1000).unwrap();
        let second = generations.renew(1, "y", 900).unwrap();
        assert!(second.number > first.number);
        drop(generations);
        let mut generations = Generations::open(&path, &two).unwrap();
        assert_eq!(
            generations.all(),
            [Some(first.clone()), Some(second.clone())]
        );
        assert!(generations.renew(0, "x", 5).unwrap().number > second.number);
        fs::write(&path, b"{ half").unwrap();
        let mut generations = Generations::open(&path, &two).unwrap();
        assert_eq!(generations.all(), [None, None]);
        assert!(generations.renew(0, "x", 2000).unwrap().number >= 2000);
    }

    #[test]
    fn what_was_forgotten_is_not_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("redis.json");
        Generations::forget(&path).unwrap();
        let one = addresses(&[("a", 1)]);
        let mut generations = Generations::open(&path, &one).unwrap();
        generations.renew(0, "x", 1000).unwrap();
        Generations::forget(&path).unwrap();
        assert_eq!(Generations::open(&path, &one).unwrap().all(), [None]);
    }

    #[test]
    fn an_instance_that_was_taken_away_comes_back_as_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("redis.json");
        let mut generations = Generations::open(&path, &addresses(&[("a", 1), ("b", 1)])).unwrap();
        generations.renew(1, "x", 1000).unwrap();
        Generations::open(&path, &addresses(&[("a", 1)])).unwrap();
        let generations = Generations::open(&path, &addresses(&[("a", 1), ("b", 1)])).unwrap();
        assert_eq!(generations.all(), [None, None]);
    }

    #[test]
    fn a_failed_renewal_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/redis.json");
        fs::create_dir(folder.path().join("sub")).unwrap();
        let mut generations = Generations::open(&path, &addresses(&[("a", 1)])).unwrap();
        let first = generations.renew(0, "x", 1000).unwrap();
        fs::remove_dir_all(folder.path().join("sub")).unwrap();
        generations.renew(0, "y", 2000).unwrap_err();
        assert_eq!(generations.all(), [Some(first)]);
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
                let placement = Generations::open(&path, &addresses(&list)).unwrap().placement();
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
