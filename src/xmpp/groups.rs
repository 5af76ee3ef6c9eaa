//! Groups that an administrator keeps: everybody in a group has everybody else in his roster, subscribed both ways.
//!
//! In: rows of group and member ([`Groups::new`]), made by whoever reads them. Out: who shares a group with whom. One immutable
//! structure for the whole blade; every shard holds a reference and swaps it between two turns, so nothing on the way of a
//! message takes a lock, and no user has a copy of anything.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use fnv::FnvHashMap;
use smallvec::SmallVec;

use crate::store::ring::{Ring, hash};

#[derive(Default)]
pub struct Groups {
    /// In the order of their names.
    groups: Vec<Group>,
    /// In the order of their names.
    people: Vec<Person>,
    by_name: FnvHashMap<Box<str>, u32>,
}

pub struct Group {
    pub name: Box<str>,
    /// Of all that is seen of it in rosters.
    hash: u64,
    /// Places in [`Groups::people`], ascending.
    members: Vec<u32>,
    /// The same of each shard's users.
    by_shard: Vec<Vec<u32>>,
}

/// Somebody who is in a group. There may be no such account.
pub struct Person {
    /// Local part.
    pub name: Box<str>,
    /// What contacts see in their rosters; may be empty.
    pub label: Box<str>,
    /// Places in [`Groups::groups`], ascending.
    groups: SmallVec<[u32; 4]>,
    /// See [`Groups::version`].
    version: u64,
}

/// A row: `user` is a prepared local part.
pub struct Row {
    pub group: String,
    pub user: String,
    pub label: String,
}

impl Groups {
    /// Rows that stand twice count once; of several labels of a user the first that is not empty counts.
    pub fn new(rows: impl IntoIterator<Item = Row>, ring: &Ring) -> Groups {
        let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut labels: BTreeMap<String, String> = BTreeMap::new();
        for row in rows {
            let label = labels.entry(row.user.clone()).or_default();
            if label.is_empty() {
                *label = row.label;
            }
            groups.entry(row.group).or_default().push(row.user);
        }
        let mut people: Vec<Person> = labels
            .into_iter()
            .map(|(name, label)| Person {
                name: name.into(),
                label: label.into(),
                groups: SmallVec::new(),
                version: 0,
            })
            .collect();
        let place = |(at, person): (usize, &Person)| (person.name.clone(), at as u32);
        let by_name: FnvHashMap<Box<str>, u32> = people.iter().enumerate().map(place).collect();
        let groups = groups.into_iter().enumerate().map(|(at, (name, users))| {
            let mut members: Vec<u32> = users.iter().map(|user| by_name[&**user]).collect();
            members.sort_unstable();
            members.dedup();
            let mut by_shard = vec![Vec::new(); ring.members()];
            let mut seen = format!("{name}\n");
            for member in &members {
                let person = &mut people[*member as usize];
                person.groups.push(at as u32);
                by_shard[ring.owner(&person.name)].push(*member);
                let _ = writeln!(seen, "{}\t{}", person.name, person.label);
            }
            Group {
                name: name.into(),
                hash: hash(&seen),
                members,
                by_shard,
            }
        });
        let groups: Vec<Group> = groups.collect();
        for person in &mut people {
            let mut all = String::new();
            for at in &person.groups {
                let _ = write!(all, "{:x} ", groups[*at as usize].hash);
            }
            person.version = hash(&all).max(1);
        }
        Groups {
            groups,
            people,
            by_name,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Users who are in a group.
    pub fn people(&self) -> usize {
        self.people.len()
    }

    /// Name and number of members of each group, in order.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.groups.iter().map(|g| (&*g.name, g.members.len()))
    }

    /// The members of a group, in order.
    pub fn members(&self, group: &str) -> Option<impl Iterator<Item = &Person>> {
        let members = self.find(group)?.1.members.iter();
        Some(members.map(|member| &self.people[*member as usize]))
    }

    fn find(&self, group: &str) -> Option<(u32, &Group)> {
        let at = self
            .groups
            .binary_search_by(|g| (*g.name).cmp(group))
            .ok()?;
        Some((at as u32, &self.groups[at]))
    }

    pub fn person(&self, user: &str) -> Option<&Person> {
        match self.people.is_empty() {
            true => None,
            false => Some(&self.people[*self.by_name.get(user)? as usize]),
        }
    }

    /// The groups of a user.
    pub fn of<'a>(&'a self, person: &'a Person) -> impl Iterator<Item = &'a Group> {
        person.groups.iter().map(|at| &self.groups[*at as usize])
    }

    /// The groups in which both are, in order.
    pub fn common<'a>(
        &'a self,
        one: &'a Person,
        other: &'a Person,
    ) -> impl Iterator<Item = &'a str> {
        let both = one.groups.iter().filter(|at| other.groups.contains(at));
        both.map(|at| &*self.groups[*at as usize].name)
    }

    /// Do two different users share a group?
    pub fn together(&self, one: &str, other: &str) -> bool {
        let (Some(a), Some(b)) = (self.person(one), self.person(other)) else {
            return false;
        };
        one != other && a.groups.iter().any(|at| b.groups.contains(at))
    }

    /// Do two different users share a group of `most` members or fewer?
    pub fn together_in_small(&self, one: &str, other: &str, most: usize) -> bool {
        let (Some(a), Some(b)) = (self.person(one), self.person(other)) else {
            return false;
        };
        let mut common = a.groups.iter().filter(|at| b.groups.contains(at));
        one != other && common.any(|at| self.groups[*at as usize].members.len() <= most)
    }

    /// Everybody with whom a user shares a group, each once, by groups.
    pub fn contacts<'a>(&'a self, user: &'a Person) -> impl Iterator<Item = &'a Person> {
        user.groups.iter().flat_map(move |at| {
            let members = self.groups[*at as usize].members.iter();
            self.met_in(user, *at, members)
        })
    }

    /// Everybody with whom a user shares a group of `most` members or fewer, each once.
    pub fn contacts_in_small<'a>(
        &'a self,
        user: &'a Person,
        most: usize,
    ) -> impl Iterator<Item = &'a Person> {
        let small = move |at: &&u32| self.groups[**at as usize].members.len() <= most;
        user.groups.iter().filter(small).flat_map(move |at| {
            let members = self.groups[*at as usize].members.iter();
            let people = members.map(|member| &self.people[*member as usize]);
            people.filter(move |person| {
                let mut common = user.groups.iter().filter(|at| person.groups.contains(at));
                common.find(small) == Some(at) && person.name != user.name
            })
        })
    }

    /// Those of one shard with whom a user shares this group and none before it.
    pub fn contacts_of_shard<'a>(
        &'a self,
        user: &'a Person,
        group: &str,
        shard: usize,
    ) -> impl Iterator<Item = &'a Person> {
        let found = self.find(group).into_iter();
        found.flat_map(move |(at, group)| {
            let members = group.by_shard.get(shard).map(Vec::as_slice);
            self.met_in(user, at, members.unwrap_or_default().iter())
        })
    }

    fn met_in<'a>(
        &'a self,
        user: &'a Person,
        group: u32,
        members: impl Iterator<Item = &'a u32>,
    ) -> impl Iterator<Item = &'a Person> {
        let people = members.map(|member| &self.people[*member as usize]);
        people.filter(move |person| {
            let mut common = user.groups.iter().filter(|at| person.groups.contains(at));
            common.next() == Some(&group) && person.name != user.name
        })
    }

    /// Has a shard users of one of these groups?
    pub fn reaches(&self, user: &str, shard: usize) -> bool {
        let person = self.person(user).into_iter();
        person
            .flat_map(|person| self.of(person))
            .any(|group| group.by_shard.get(shard).is_some_and(|m| !m.is_empty()))
    }

    /// Changes with all that a user sees in his roster; the same after a restart. 0: he is in no group.
    pub fn version(&self, user: &str) -> u64 {
        self.person(user).map_or(0, |person| person.version)
    }

    /// All for whom these groups look different than those before.
    pub fn changed<'a>(&'a self, before: &'a Groups) -> impl Iterator<Item = &'a str> {
        let differ = self
            .people
            .iter()
            .filter(|person| before.version(&person.name) != person.version);
        let gone = before
            .people
            .iter()
            .filter(|person| self.person(&person.name).is_none());
        differ.chain(gone).map(|person| &*person.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::testing::ring;

    fn groups(rows: &[(&str, &str, &str)]) -> Groups {
        let row = |(group, user, label): &(&str, &str, &str)| Row {
            group: (*group).into(),
            user: (*user).into(),
            label: (*label).into(),
        };
        Groups::new(rows.iter().map(row), &ring(2))
    }

    #[test]
    fn everybody_meets_everybody_else_of_his_groups_once() {
        let g = groups(&[
            ("desk", "alice", "Alice"),
            ("desk", "bob", ""),
            ("floor", "alice", ""),
            ("floor", "bob", "Bob"),
            ("floor", "carol", ""),
            ("floor", "carol", ""),
            ("other", "dave", ""),
        ]);
        let names = |user: &str| -> Vec<&str> {
            let person = g.person(user).unwrap();
            g.contacts(person).map(|p| &*p.name).collect()
        };
        assert_eq!(names("alice"), ["bob", "carol"]);
        assert_eq!(names("carol"), ["alice", "bob"]);
        assert!(names("dave").is_empty());
        assert!(g.person("nobody").is_none());
        for (one, other, together) in [
            ("alice", "bob", true),
            ("bob", "carol", true),
            ("alice", "alice", false),
            ("alice", "dave", false),
            ("nobody", "alice", false),
        ] {
            assert_eq!(g.together(one, other), together, "{one} {other}");
            assert_eq!(g.together(other, one), together, "{one} {other}");
        }
        let (alice, bob) = (g.person("alice").unwrap(), g.person("bob").unwrap());
        assert_eq!(g.common(alice, bob).collect::<Vec<_>>(), ["desk", "floor"]);
        assert_eq!((&*bob.label, &*alice.label), ("Bob", "Alice"));
        let by_shard: Vec<&str> = (0..2)
            .flat_map(|shard| {
                let desk = g.contacts_of_shard(alice, "desk", shard);
                desk.chain(g.contacts_of_shard(alice, "floor", shard))
            })
            .map(|p| &*p.name)
            .collect();
        assert_eq!(by_shard.len(), 2, "{by_shard:?}");
        assert_eq!(
            g.sizes().collect::<Vec<_>>(),
            [("desk", 2), ("floor", 3), ("other", 1)]
        );
    }

    #[test]
    fn a_version_changes_with_what_is_seen_and_only_then() {
        let rows = [
            ("desk", "alice", "Alice"),
            ("desk", "bob", "Bob"),
            ("other", "dave", ""),
        ];
        let before = groups(&rows);
        let mut turned = rows;
        turned.reverse();
        let mut renamed = rows;
        renamed[1].2 = "Robert";
        assert_eq!(groups(&turned).version("alice"), before.version("alice"));
        assert_ne!(groups(&renamed).version("alice"), before.version("alice"));
        assert_eq!(groups(&renamed).version("dave"), before.version("dave"));
        assert_eq!(before.version("nobody"), 0);
        let more = [&rows[..], &[("other", "alice", "")]].concat();
        assert_ne!(groups(&more).version("alice"), before.version("alice"));
        assert_eq!(groups(&more).version("bob"), before.version("bob"));
    }
}
