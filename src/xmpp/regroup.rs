//! What follows when an administrator's groups change while users are on line.
//!
//! In: the new groups ([`Slice::regroup`]), then one call a turn ([`Slice::regroup_some`]). Out: roster pushes for the contacts that
//! came, went or look different, and presence both ways: each user's owner tells the new contacts of his sessions, and shows those who
//! are none any more that he goes. Promise: a turn does a bounded piece of it, so nobody waits behind a group of thousands; a client
//! that is cut off in between has the old version of its roster, and asks for all of it when it comes back: not even a push of
//! something else carries the new one before it has all.
//!
//! **The shards do not change at the same moment.** In between, presence of somebody who comes or goes would be told to his old
//! contacts by one shard and looked for among the new ones by another, and be lost: a ghost on line, or off line. So each shard keeps
//! the old groups beside the new ones and counts contacts of both for presence, until all have said that they have the new ones
//! ([`Item::Regrouped`], one turn of each). Only then the users are dealt with, as they are on line at that moment.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use fnv::FnvHashMap;

use super::batch::Item;
use super::feature::{blocking, pep, presence, roster};
use super::groups::{Groups, Person};
use super::jid::Jid;
use super::slice::Slice;

/// Contacts of one user that are dealt with in a turn.
const PIECE: usize = 32;

/// Users whose contacts have changed and who have not been told of all of it.
#[derive(Default)]
pub struct Regrouping {
    users: VecDeque<Affected>,
    /// The groups as the clients of `users` know them.
    known: FnvHashMap<Rc<str>, Arc<Groups>>,
    /// The groups before, oldest first, while not all shards have those of now.
    before: Vec<Arc<Groups>>,
    /// How often each shard has got new ones.
    times: Vec<u64>,
}

struct Affected {
    user: Rc<str>,
    /// The groups as his clients know them.
    before: Arc<Groups>,
    /// Local parts of the contacts that are left; `None`: nobody has looked yet.
    left: Option<Vec<Box<str>>>,
}

impl Regrouping {
    /// Users.
    pub fn len(&self) -> usize {
        self.users.len()
    }

    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// Groups that other shards may still have.
    pub fn before(&self) -> impl Iterator<Item = &Groups> {
        self.before.iter().map(|groups| &**groups)
    }

    /// The same, to be held.
    pub fn older(&self) -> Vec<Arc<Groups>> {
        self.before.clone()
    }

    /// The version of the groups of which the user's clients have all: [`Groups::version`] of `now`, if they were told.
    pub fn version(&self, user: &str, now: &Groups) -> u64 {
        let known = self.known.get(user).or(self.before.first());
        known.map_or(now, |groups| groups).version(user)
    }
}

impl Slice {
    /// These groups are in force from now on.
    pub fn regroup(&mut self, groups: Arc<Groups>) {
        let before = std::mem::replace(&mut self.groups, groups);
        self.regrouping.before.push(before);
        let shard = self.env.shard;
        let seen = self.regrouping.times.get(usize::from(shard));
        let times = seen.copied().unwrap_or_default() + 1;
        for (to, batch) in self.fx.mesh.iter_mut().enumerate() {
            if to != usize::from(shard) {
                batch.items.push(Item::Regrouped { shard, times });
            }
        }
        self.regrouped(shard, times);
    }

    /// A shard, perhaps this one, has new groups.
    pub(super) fn regrouped(&mut self, shard: u16, times: u64) {
        let own = usize::from(self.env.shard);
        let all = &mut self.regrouping.times;
        all.resize(self.fx.mesh.len(), 0);
        all[usize::from(shard)] = times;
        if all.iter().all(|times| *times >= all[own]) && !self.regrouping.before.is_empty() {
            self.regroup_all();
        }
    }

    /// All shards have them: who is on line is to be told.
    fn regroup_all(&mut self) {
        let before = self.regrouping.before.swap_remove(0);
        self.regrouping.before.clear();
        // who was not told of all of the last change is told of both together
        let waiting = std::mem::take(&mut self.regrouping.users);
        let mut users: VecDeque<Affected> = waiting
            .into_iter()
            .map(|affected| Affected {
                left: None,
                ..affected
            })
            .collect();
        let known: fnv::FnvHashSet<Rc<str>> = users.iter().map(|a| a.user.clone()).collect();
        let now = self.groups.clone();
        for name in now.changed(&before) {
            let Some(user) = self.user(name).filter(|user| !user.sessions.is_empty()) else {
                continue;
            };
            let user = user.name.clone();
            if !known.contains(&user) {
                users.push_back(Affected {
                    user,
                    before: before.clone(),
                    left: None,
                });
            }
        }
        let known = users.iter().map(|a| (a.user.clone(), a.before.clone()));
        self.regrouping.known = known.collect();
        self.regrouping.users = users;
    }

    /// Does a piece of what is left to do.
    pub fn regroup_some(&mut self) {
        let Some(mut affected) = self.regrouping.users.pop_front() else {
            return;
        };
        let (user, before, now) = (
            affected.user.clone(),
            affected.before.clone(),
            self.groups.clone(),
        );
        let mut left = match affected.left.take() {
            Some(left) => left,
            None => changed(&before, &now, &user),
        };
        for _ in 0..PIECE {
            let Some(contact) = left.pop() else { break };
            let version = match left.is_empty() {
                true => now.version(&user),
                false => before.version(&user),
            };
            self.regroup_one(&user, &contact, &before, version);
        }
        if !left.is_empty() {
            affected.left = Some(left);
            // one user after the other: only his list is held
            self.regrouping.users.push_front(affected);
        } else {
            self.regrouping.known.remove(&user);
        }
    }

    fn regroup_one(&mut self, user: &str, contact: &str, before: &Groups, version: u64) {
        let Ok(jid) = Jid::from_parts(Some(contact), &self.env.domain, None) else {
            return;
        };
        let jid = jid.into_owned();
        roster::push_shared(self, user, jid.as_str(), version);
        let (was, is) = (
            before.together(user, contact),
            self.groups.together(user, contact),
        );
        if was == is || roster::own_subscription(self, user, jid.as_str()).from() {
            return;
        }
        match is {
            true if blocking::may_send(self, user, &jid).is_ok() => {
                presence::show_all(self, user, &jid);
                let most = self.env.limits.group_greetings_members_max;
                if self.groups.together_in_small(user, contact, most) {
                    pep::subscribed(self, user, contact);
                }
            }
            true => {}
            false => presence::hide(self, user, &jid),
        }
    }
}

/// The contacts that the user has not had, has no more, or has with another name or in other groups.
fn changed(before: &Groups, now: &Groups, user: &str) -> Vec<Box<str>> {
    let (was, is) = (before.person(user), now.person(user));
    let looks_as_before = |contact: &&Person| {
        let (Some(was), Some(is)) = (was, is) else {
            return false;
        };
        before.person(&contact.name).is_some_and(|old| {
            old.label == contact.label && before.common(was, old).eq(now.common(is, contact))
        })
    };
    let new = is.into_iter().flat_map(|is| now.contacts(is));
    let new = new.filter(|contact| !looks_as_before(contact));
    let gone = was.into_iter().flat_map(|was| before.contacts(was));
    let gone = gone.filter(|contact| !now.together(user, &contact.name));
    gone.chain(new)
        .map(|contact| contact.name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::groups::Row;
    use super::*;
    use crate::store::record::Subscription;
    use crate::xmpp::testing::{Client, World, ring};

    const GET: &str = "<iq type='get' id='g'><query xmlns='jabber:iq:roster'/></iq>";

    fn groups(w: &mut World, rows: &[(&str, &str)]) {
        let row = |(group, user): &(&str, &str)| Row {
            group: (*group).into(),
            user: (*user).into(),
            label: format!("Label of {user}"),
        };
        let groups = Arc::new(Groups::new(rows.iter().map(row), &ring(w.slices.len())));
        for slice in &mut w.slices {
            slice.regroup(groups.clone());
        }
        w.run();
    }

    /// Alice on shard 0 and Bob on `shard`, accounts with no contacts.
    fn two(shard: usize) -> (World, String, String) {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(shard, "bob"));
        w.add(&alice);
        w.add(&bob);
        (w, alice, bob)
    }

    fn get(w: &mut World, client: Client) -> String {
        w.send(client, GET);
        w.take(client).concat()
    }

    #[test]
    fn members_see_each_other_in_their_rosters_and_on_line_without_asking() {
        for shard in [0, 1] {
            let (mut w, alice, bob) = two(shard);
            groups(
                &mut w,
                &[
                    ("The Desk", &alice),
                    ("The Desk", &bob),
                    ("The Desk", "ghost"),
                ],
            );
            let a = w.login(&alice, "a");
            let got = get(&mut w, a);
            assert!(
                got.contains(&format!(
                    "<item jid='{bob}@localhost' name='Label of {bob}' subscription='both'><group>The Desk</group></item>"
                )) && got.contains("jid='ghost@localhost'")
                    && !got.contains(&format!("jid='{alice}@")),
                "{got}"
            );
            w.send(a, "<presence/>");
            assert_eq!(w.take(a).len(), 1, "its own presence");
            let b = w.login(&bob, "b");
            w.send(b, "<presence><show>dnd</show></presence>");
            let got = w.take(b).concat();
            assert!(
                got.contains(&format!("from='{alice}@localhost/a'")),
                "{got}"
            );
            let got = w.take(a);
            assert!(
                got.len() == 1
                    && got[0].contains("<show>dnd")
                    && got[0].contains(&format!("from='{bob}@")),
                "{got:?}"
            );
            w.send(a, &format!("<presence type='probe' to='{bob}@localhost'/>"));
            assert!(w.take(a).concat().contains("<show>dnd"));
            w.logout(b);
            assert!(w.take(a).concat().contains("type='unavailable'"));
            assert!(w.stored(&alice).roster.is_empty(), "no copy");
            assert_eq!(w.tier.loads, 2, "nobody is loaded for it");
        }
    }

    #[test]
    fn a_login_costs_one_item_for_each_other_shard_however_large_the_group_is() {
        let mut w = World::new(3);
        let me = w.on(0, "me");
        w.add(&me);
        let names: Vec<String> = (0..100).map(|n| format!("m{n}")).collect();
        let mut rows: Vec<(&str, &str)> = names.iter().map(|n| ("g", &**n)).collect();
        rows.extend(names.iter().map(|n| ("h", &**n)));
        rows.extend([("g", &*me), ("h", &*me)]);
        let rows: Vec<_> = rows.to_vec();
        groups(&mut w, &rows);
        let m = w.login(&me, "r");
        w.element(m, "<presence/>").unwrap();
        for shard in [1, 2] {
            assert_eq!(w.slices[0].fx.mesh[shard].items.len(), 1);
        }
    }

    #[test]
    fn who_is_in_two_groups_and_in_the_roster_is_told_once() {
        for shard in [0, 1] {
            let (mut w, alice, bob) = two(shard);
            w.befriend(&alice, &bob);
            groups(
                &mut w,
                &[("g", &alice), ("g", &bob), ("h", &alice), ("h", &bob)],
            );
            let a = w.online(&alice, "a");
            let b = w.online(&bob, "b");
            assert_eq!(w.take(a).len(), 1);
            let got = get(&mut w, b);
            assert_eq!(got.matches("<item ").count(), 1, "{got}");
            assert!(got.contains("<group>g</group><group>h</group>"), "{got}");
        }
    }

    #[test]
    fn a_change_is_pushed_and_shown_to_those_on_line_and_to_nobody_else() {
        for shard in [0, 1] {
            let (mut w, alice, bob) = two(shard);
            let other = w.on(1, "other");
            w.add(&other);
            let a = w.online(&alice, "a");
            let b = w.online(&bob, "b");
            let o = w.online(&other, "o");
            groups(&mut w, &[("g", &alice), ("g", &bob), ("x", &other)]);
            for (client, contact) in [(a, &bob), (b, &alice)] {
                let got = w.take(client);
                assert_eq!(got.len(), 2, "{got:#?}");
                let got = got.concat();
                assert!(
                    got.contains(&format!("<item jid='{contact}@localhost' name='Label of {contact}' subscription='both'>"))
                        && got.contains("<presence to='"),
                    "{got}"
                );
            }
            assert!(w.take(o).is_empty());
            groups(&mut w, &[("g", &alice), ("x", &other)]);
            for (client, contact) in [(a, &bob), (b, &alice)] {
                let got = w.take(client);
                assert_eq!(got.len(), 2, "{got:#?}");
                let got = got.concat();
                assert!(
                    got.contains(&format!(
                        "<item jid='{contact}@localhost' subscription='remove'/>"
                    )) && got.contains("type='unavailable'"),
                    "{got}"
                );
            }
            assert!(!get(&mut w, a).contains("<item "));
        }
    }

    #[test]
    fn contacts_by_own_will_stay_when_the_group_goes() {
        let (mut w, alice, bob) = two(1);
        w.befriend(&alice, &bob);
        groups(&mut w, &[("g", &alice), ("g", &bob)]);
        let a = w.online(&alice, "a");
        let _b = w.online(&bob, "b");
        w.take(a);
        groups(&mut w, &[]);
        let got = w.take(a);
        assert_eq!(got.len(), 1, "{got:?}");
        assert!(got[0].contains("subscription='both'/>"), "{got:?}");
    }

    #[test]
    fn the_version_of_a_roster_follows_the_groups() {
        let (mut w, alice, bob) = two(1);
        let a = w.online(&alice, "a");
        let ver = |text: &str| {
            let ver = text.split("ver='").nth(1).unwrap();
            ver.split('\'').next().unwrap().to_owned()
        };
        let ask = |w: &mut World, ver: &str| {
            w.send(
                a,
                &format!(
                    "<iq type='get' id='g'><query xmlns='jabber:iq:roster' ver='{ver}'/></iq>"
                ),
            );
            w.take(a).concat()
        };
        let plain = ver(&get(&mut w, a));
        groups(&mut w, &[("g", &alice), ("g", &bob), ("g", "carol")]);
        let pushes = w.take(a);
        // only the last of several pushes has the new version
        let versions: Vec<String> = pushes.iter().map(|push| ver(push)).collect();
        assert_eq!(versions.len(), 2);
        assert_eq!(versions[0], plain);
        assert_ne!(versions[1], plain);
        assert!(
            !ask(&mut w, &versions[1]).contains("<query"),
            "nothing is new"
        );
        assert_eq!(ask(&mut w, &plain).matches("<item ").count(), 2);
        groups(&mut w, &[]);
        assert_eq!(ver(w.take(a).last().unwrap()), plain);
        assert!(!ask(&mut w, &plain).contains("<query"));
    }

    #[test]
    fn members_may_name_and_sort_each_other_and_not_leave_or_ask() {
        let (mut w, alice, bob) = two(1);
        groups(&mut w, &[("g", &alice), ("g", &bob)]);
        let a = w.online(&alice, "a");
        let b = w.online(&bob, "b");
        w.take(a);
        let jid = format!("{bob}@localhost");
        let set = |item: &str| {
            format!("<iq type='set' id='s'><query xmlns='jabber:iq:roster'>{item}</query></iq>")
        };
        w.send(
            a,
            &set(&format!("<item jid='{jid}' subscription='remove'/>")),
        );
        assert!(w.take(a).concat().contains("<not-allowed "));
        w.send(
            a,
            &set(&format!(
                "<item jid='{jid}' name='Bobby'><group>g</group><group>mine</group></item>"
            )),
        );
        let got = w.take(a).concat();
        assert!(
            got.contains(&format!("<item jid='{jid}' name='Bobby' subscription='both'><group>mine</group><group>g</group></item>")),
            "{got}"
        );
        assert_eq!(w.stored(&alice).roster[0].groups, ["mine"]);
        assert_eq!(get(&mut w, a).matches("<item ").count(), 1);
        // his own part may go; what the group gives stays
        w.send(
            a,
            &set(&format!("<item jid='{jid}' subscription='remove'/>")),
        );
        let got = w.take(a).concat();
        assert!(
            got.contains("type='result'")
                && got.contains("subscription='both'")
                && !got.contains("'remove'"),
            "{got}"
        );
        for typ in ["subscribe", "subscribed", "unsubscribe", "unsubscribed"] {
            w.send(a, &format!("<presence type='{typ}' to='{jid}'/>"));
            assert!(w.take(a).is_empty(), "{typ}");
            assert!(w.take(b).is_empty(), "{typ}");
        }
        assert!(w.stored(&alice).roster.is_empty() && w.stored(&bob).roster.is_empty());
        w.send(b, "<presence><show>xa</show></presence>");
        assert!(w.take(a).concat().contains("<show>xa"), "still together");
    }

    #[test]
    fn own_subscriptions_may_end_within_a_group_and_nobody_looks_gone() {
        for shard in [0, 1] {
            let (mut w, alice, bob) = two(shard);
            w.befriend(&alice, &bob);
            groups(&mut w, &[("g", &alice), ("g", &bob)]);
            let a = w.online(&alice, "a");
            let b = w.online(&bob, "b");
            w.take(a);
            w.send(a, &format!("<iq type='set' id='s'><query xmlns='jabber:iq:roster'><item jid='{bob}@localhost' subscription='remove'/></query></iq>"));
            let (got, told) = (w.take(a).concat(), w.take(b).concat());
            assert!(
                got.contains("subscription='both'") && !got.contains("unavailable"),
                "{got}"
            );
            assert!(
                told.contains("subscription='both'") && !told.contains("unavailable"),
                "{told}"
            );
            assert!(w.stored(&alice).roster.is_empty());
            assert_eq!(w.stored(&bob).roster[0].subscription, Subscription::None);
        }
    }

    #[test]
    fn blocking_works_within_a_group() {
        for shard in [0, 1] {
            let (mut w, alice, bob) = two(shard);
            groups(&mut w, &[("g", &alice), ("g", &bob)]);
            let a = w.online(&alice, "a");
            let b = w.online(&bob, "b");
            w.take(a);
            let change = |what: &str| {
                format!(
                    "<iq type='set' id='b'><{what} xmlns='urn:xmpp:blocking'><item jid='{bob}@localhost'/></{what}></iq>"
                )
            };
            w.send(a, &change("block"));
            assert!(w.take(b).concat().contains("type='unavailable'"));
            w.take(a);
            w.send(a, "<presence><show>dnd</show></presence>");
            w.send(b, "<presence><show>away</show></presence>");
            assert!(!w.take(b).concat().contains("dnd"));
            assert!(!w.take(a).concat().contains("away"));
            w.send(a, &change("unblock"));
            assert!(w.take(b).concat().contains("dnd"));
            assert!(w.take(a).concat().contains("away"));
            // and over logins
            w.send(a, &change("block"));
            w.logout(b);
            w.take(a);
            let b = w.online_now(&bob, "b2");
            assert!(!w.take(b).concat().contains(&format!("from='{alice}@")));
            assert!(w.take(a).is_empty());
        }
    }

    fn made(w: &World, rows: &[(&str, &str)]) -> Arc<Groups> {
        let row = |(group, user): &(&str, &str)| Row {
            group: (*group).into(),
            user: (*user).into(),
            label: String::new(),
        };
        Arc::new(Groups::new(rows.iter().map(row), &ring(w.slices.len())))
    }

    #[test]
    fn who_comes_while_only_one_shard_has_the_new_groups_is_seen() {
        for (first, second) in [(0, 1), (1, 0)] {
            let (mut w, alice, bob) = two(1);
            let b = w.online(&bob, "b");
            let groups = made(&w, &[("g", &alice), ("g", &bob)]);
            w.slices[first].regroup(groups.clone());
            w.run();
            let a = w.login(&alice, "a");
            get(&mut w, a);
            w.send(a, "<presence/>");
            w.slices[second].regroup(groups);
            w.run();
            let (got, told) = (w.take(a).concat(), w.take(b).concat());
            assert!(
                got.contains(&format!("from='{bob}@localhost/b'")),
                "{first}: {got}"
            );
            assert!(
                told.contains(&format!("from='{alice}@localhost/a'")),
                "{first}: {told}"
            );
            assert!(
                w.slices
                    .iter()
                    .all(|slice| slice.regrouping.before().count() == 0)
            );
        }
    }

    #[test]
    fn who_goes_while_only_one_shard_has_the_new_groups_is_no_ghost() {
        // contacts by the group only, and by their own will as well
        for own in [false, true] {
            for (first, second) in [(0, 1), (1, 0)] {
                let (mut w, alice, bob) = two(1);
                if own {
                    w.befriend(&alice, &bob);
                }
                groups(&mut w, &[("g", &alice), ("g", &bob)]);
                let a = w.online(&alice, "a");
                let b = w.online(&bob, "b");
                w.take(b);
                let none = made(&w, &[]);
                w.slices[first].regroup(none.clone());
                w.run();
                w.logout(a);
                let told = w.take(b).concat();
                assert!(told.contains("type='unavailable'"), "{own} {first}: {told}");
                w.slices[second].regroup(none);
                w.run();
                let told = w.take(b).concat();
                let pushed = told.contains("subscription='remove'");
                assert_eq!(pushed, !own, "{first}: {told}");
                let c = w.online_now(&alice, "again");
                let seen = w.take(b).concat().contains("/again'");
                assert_eq!(seen, own);
                w.take(c);
            }
        }
    }

    #[test]
    fn a_client_has_the_new_version_only_when_it_has_all() {
        let mut w = World::new(1);
        w.add("alice");
        let a = w.online("alice", "a");
        let ver = |text: &str| {
            let ver = text.split("ver='").nth(1).unwrap();
            ver.split('\'').next().unwrap().to_owned()
        };
        get(&mut w, a);
        let names: Vec<String> = (0..2 * PIECE).map(|n| format!("m{n}")).collect();
        let mut rows: Vec<(&str, &str)> = names.iter().map(|name| ("g", &**name)).collect();
        rows.push(("g", "alice"));
        let new = made(&w, &rows);
        w.slices[0].regroup(new);
        w.slices[0].regroup_some();
        w.element(
            a,
            "<iq type='set' id='s'><query xmlns='jabber:iq:roster'><item jid='x@y'/></query></iq>",
        )
        .unwrap();
        w.commit_only(0);
        w.run();
        let pushes: Vec<String> = w
            .take(a)
            .into_iter()
            .filter(|s| s.contains("<item "))
            .collect();
        let of_own = pushes
            .iter()
            .position(|push| push.contains("jid='x@y'"))
            .unwrap();
        assert!(
            of_own >= PIECE && pushes.len() == 2 * PIECE + 1,
            "{of_own} of {}",
            pushes.len()
        );
        let last = ver(pushes.last().unwrap());
        assert!(pushes[..2 * PIECE].iter().all(|push| ver(push) != last));
        assert_eq!(ver(&get(&mut w, a)), last);
    }
}
