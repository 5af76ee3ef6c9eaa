//! Nicknames (RFC 8266, XEP-0045 section 17.1.2): which are allowed, which are the same, and which look alike.

use std::collections::HashMap;

use smallvec::SmallVec;

use precis_profiles::Nickname;
use precis_profiles::precis_core::profile::{PrecisFastInvocation, Rules};
use unicode_security::confusable_detection::skeleton;

use crate::store::room::Affiliate;

/// A nickname as it is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Equal for those that RFC 8266 section 2.4 takes as equal.
    pub fold: Box<str>,
    /// Equal for those that look alike (Unicode TS 39 section 4).
    pub look: Box<str>,
    ascii: bool,
}

impl Key {
    /// `None`: not allowed as a nickname.
    pub fn of(nick: &str) -> Option<Key> {
        let enforced = Nickname::enforce(nick).ok()?;
        let profile = Nickname::default();
        let lower = profile.case_mapping_rule(&*enforced).ok()?;
        let fold = profile.normalization_rule(lower).ok()?;
        let look: String = skeleton(&fold).collect();
        Some(Key {
            look: look.to_lowercase().into(),
            ascii: nick.is_ascii(),
            fold: fold.into(),
        })
    }

    /// May the two not be in one room? Plain letters that are alike in some typefaces (rn, m) are no matter of two alphabets.
    pub fn clashes(&self, other: &Key) -> bool {
        self.fold == other.fold || (self.look == other.look && !(self.ascii && other.ascii))
    }
}

/// A nickname as it is shown (RFC 8266 section 2.3): without needless spaces. `None`: not allowed.
pub fn enforced(nick: &str) -> Option<String> {
    Some(Nickname::enforce(nick).ok()?.into_owned())
}

/// Nicknames that are kept for people (XEP-0045 section 7.10), found by what they look like: each is prepared once, and one that
/// comes is compared with its look-alikes only. In: the affiliations of a room and their revision.
#[derive(Default)]
pub struct Reserved {
    revision: u64,
    /// By bare JID.
    keys: HashMap<Box<str>, (Box<str>, Key)>,
    /// Bare JIDs, by the look of their nicknames: what is the same looks the same.
    by_look: HashMap<Box<str>, SmallVec<[Box<str>; 1]>>,
}

impl Reserved {
    /// Takes over what has changed.
    pub fn follow(&mut self, affiliates: &[Affiliate], revision: u64) {
        if self.revision == revision {
            return;
        }
        self.revision = revision;
        let of = |jid: &str| affiliates.binary_search_by(|one| one.jid.as_str().cmp(jid));
        let stale = self.keys.iter().filter(|(jid, (nick, _))| {
            let now = of(jid).ok().map(|at| &*affiliates[at].nick);
            now != Some(&**nick)
        });
        let stale: Vec<Box<str>> = stale.map(|(jid, _)| jid.clone()).collect();
        for jid in stale {
            self.forget(&jid);
        }
        for one in affiliates.iter().filter(|one| !one.nick.is_empty()) {
            if !self.keys.contains_key(&*one.jid)
                && let Some(key) = Key::of(&one.nick)
            {
                let alike = self.by_look.entry(key.look.clone()).or_default();
                alike.push((*one.jid).into());
                let kept = ((*one.nick).into(), key);
                self.keys.insert((*one.jid).into(), kept);
            }
        }
    }

    fn forget(&mut self, jid: &str) {
        let Some((_, key)) = self.keys.remove(jid) else {
            return;
        };
        if let Some(alike) = self.by_look.get_mut(&key.look) {
            alike.retain(|one| **one != *jid);
            if alike.is_empty() {
                self.by_look.remove(&key.look);
            }
        }
    }

    /// Is such a nickname kept for somebody else than this bare JID?
    pub fn clashes(&self, key: &Key, bare: &str) -> bool {
        let alike = self.by_look.get(&key.look).into_iter().flatten();
        let kept = alike.filter(|jid| ***jid != *bare);
        kept.filter_map(|jid| self.keys.get(jid))
            .any(|(_, kept)| kept.clashes(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::room::Affiliation;

    #[test]
    fn kept_nicks_follow_the_affiliations_and_each_is_prepared_once() {
        let entry = |jid: &str, nick: &str| Affiliate {
            jid: jid.into(),
            affiliation: Affiliation::Member,
            nick: nick.into(),
            ..Affiliate::default()
        };
        let mut reserved = Reserved::default();
        let taken = |reserved: &Reserved, nick: &str, by: &str| {
            reserved.clashes(&Key::of(nick).unwrap(), by)
        };
        let mut list: Vec<Affiliate> = (0..5000)
            .map(|n| entry(&format!("u{n:04}@x"), &format!("nick {n}")))
            .collect();
        reserved.follow(&list, 1);
        assert!(taken(&reserved, "Nick 17", "a@x") && !taken(&reserved, "nick 17", "u0017@x"));
        assert!(taken(&reserved, "nіck 17", "a@x"), "Cyrillic i");
        list[17].nick = "other".into();
        list.remove(18);
        // the same revision: nothing has changed
        reserved.follow(&list, 1);
        assert!(taken(&reserved, "nick 17", "a@x"));
        reserved.follow(&list, 2);
        assert!(!taken(&reserved, "nick 17", "a@x") && taken(&reserved, "OTHER", "a@x"));
        assert!(!taken(&reserved, "nick 18", "a@x") && taken(&reserved, "nick 19", "a@x"));
        assert_eq!(reserved.keys.len(), 4999);
        list.clear();
        reserved.follow(&list, 3);
        assert!(reserved.keys.is_empty() && reserved.by_look.is_empty());
    }

    fn clash(a: &str, b: &str) -> bool {
        Key::of(a).unwrap().clashes(&Key::of(b).unwrap())
    }

    #[test]
    fn nicks_that_differ_by_case_width_or_spaces_are_the_same() {
        assert!(clash("Alice", "alice"));
        assert!(clash("Alice  Bob", " alice bob "));
        assert!(clash("Ａｌｉｃｅ", "alice"));
        assert!(!clash("Alice", "Bob"));
    }

    #[test]
    fn nicks_that_look_alike_in_two_alphabets_clash() {
        // Cyrillic a, Greek omicron
        assert!(clash("аlice", "alice"));
        assert!(clash("bοb", "bob"));
        assert!(!clash("Bern", "Bem"));
    }

    #[test]
    fn what_is_no_nickname_is_refused() {
        for nick in ["", "  ", "a\u{0}b", "a\nb", "\u{2028}"] {
            assert_eq!(Key::of(nick), None, "{nick:?}");
        }
    }
}
