//! What follows when an administrator's groups change while users are on line.
//!
//! In: the new groups ([`Slice::regroup`]), then one call a turn ([`Slice::regroup_some`]). Out: roster pushes for the contacts that
//! came, went or look different, and presence both ways: each user's owner tells the new contacts of his sessions, and shows those who
//! are none any more that he goes. Promise: a turn does a bounded piece of it, so nobody waits behind a group of thousands; a client
//! that is cut off in between has the old version of its roster, and asks for all of it when it comes back.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use super::feature::{blocking, presence, roster};
use super::groups::{Groups, Person};
use super::jid::Jid;
use super::slice::Slice;

/// Contacts of one user that are dealt with in a turn.
const PIECE: usize = 32;

/// Users whose contacts have changed and who have not been told of all of it.
#[derive(Default)]
pub struct Regrouping {
    users: VecDeque<Affected>,
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
}

impl Slice {
    /// These groups are in force from now on.
    pub fn regroup(&mut self, groups: Arc<Groups>) {
        let before = std::mem::replace(&mut self.groups, groups);
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
}
