//! The permanent state of a chat room (XEP-0045): configuration, affiliations, reserved nicknames, subject.
//!
//! A room is an owner like a user, under the name `NAME@rooms`, which no user can have. Its state is a [`RoomRecord`], the other
//! kind of [`super::record::Record`]: accounts, journals, caches and copies carry it as they carry a user's.

use rkyv::{Archive, Deserialize, Serialize};

/// What stands behind the `@` in the names of rooms, wherever the store has names.
pub const LABEL: &str = "rooms";

/// Key of the document of a room that says who has made it: a bare JID. A statement names it, too.
pub const MAKER_KEY: &str = "room-maker";

/// XEP-0045 section 5.2, ascending.
#[derive(
    Archive,
    Serialize,
    Deserialize,
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
)]
#[repr(u8)]
pub enum Affiliation {
    Outcast,
    #[default]
    None,
    Member,
    Admin,
    Owner,
}

/// Who may do something.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Who {
    #[default]
    Anyone,
    Participants,
    Moderators,
    Nobody,
}

/// The state of a room, as a value that can be changed.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct RoomRecord {
    /// Unix seconds.
    pub created_at: u64,
    pub settings: Settings,
    /// Sorted by `jid`; at most one entry for each.
    pub affiliates: Vec<Affiliate>,
    pub subject: Option<Subject>,
    /// SHA-1 of the picture in its vCard, hexadecimal (XEP-0486); empty: there is none.
    pub avatar: String,
}

/// What the configuration form (section 10.2) shows.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    pub title: String,
    pub description: String,
    /// `xml:lang` of the discussions; empty: not said.
    pub lang: String,
    /// Empty: none is needed.
    pub password: String,
    pub persistent: bool,
    /// Can be found by service discovery.
    pub public: bool,
    pub members_only: bool,
    pub moderated: bool,
    /// Everybody sees real addresses; else moderators do.
    pub non_anonymous: bool,
    /// Messages are archived.
    pub archived: bool,
    /// Everybody who is in may invite; else admins may.
    pub invites: bool,
    /// Participants may change the subject; else moderators may.
    pub subject_open: bool,
    pub private_messages: Who,
    /// 0: as many as the server lets in.
    pub occupants_max: u32,
    /// Messages that are shown to who comes in; no more than the server keeps.
    pub history_max: u32,
    /// Whose presence is shown to others, and who may see the list of members: bits of [`Settings`].
    pub presence_of: u8,
    pub member_list_for: u8,
}

impl Settings {
    pub const VISITORS: u8 = 1;
    pub const PARTICIPANTS: u8 = 2;
    pub const MODERATORS: u8 = 4;
    pub const ALL: u8 = 7;
}

/// Somebody with an affiliation other than none.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct Affiliate {
    /// Bare JID, or a domain (section 9.1).
    pub jid: String,
    pub affiliation: Affiliation,
    /// The nickname that is kept for him; empty: none.
    pub nick: String,
    pub reason: String,
}

#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct Subject {
    pub text: String,
    /// Of who has set it.
    pub nick: String,
    /// Unix seconds.
    pub at: u64,
}

impl RoomRecord {
    fn position(&self, jid: &str) -> Result<usize, usize> {
        self.affiliates
            .binary_search_by(|one| one.jid.as_str().cmp(jid))
    }

    pub fn affiliate(&self, jid: &str) -> Option<&Affiliate> {
        self.position(jid).ok().map(|at| &self.affiliates[at])
    }

    /// Of a bare JID; an entry for its domain counts where it has none of its own (section 9.1).
    pub fn affiliation(&self, bare: &str) -> Affiliation {
        let domain = bare.split_once('@').map_or("", |(_, domain)| domain);
        let one = self.affiliate(bare).or_else(|| self.affiliate(domain));
        one.map_or(Affiliation::None, |one| one.affiliation)
    }

    /// Adds, replaces, or with [`Affiliation::None`] takes out. A nickname stays reserved unless there is a new one.
    pub fn affiliate_as(&mut self, mut new: Affiliate) {
        match (self.position(&new.jid), new.affiliation) {
            (Ok(at), Affiliation::None) => {
                self.affiliates.remove(at);
            }
            (Err(_), Affiliation::None) => {}
            (Ok(at), _) => {
                if new.nick.is_empty() && new.affiliation != Affiliation::Outcast {
                    new.nick = std::mem::take(&mut self.affiliates[at].nick);
                }
                self.affiliates[at] = new;
            }
            (Err(at), _) => self.affiliates.insert(at, new),
        }
    }

    pub fn owners(&self) -> usize {
        let owners = self.affiliates.iter();
        owners
            .filter(|one| one.affiliation == Affiliation::Owner)
            .count()
    }

    pub(super) fn sort(&mut self) {
        self.affiliates.sort_by(|a, b| a.jid.cmp(&b.jid));
        self.affiliates.dedup_by(|a, b| a.jid == b.jid);
    }
}

impl ArchivedRoomRecord {
    pub(super) fn is_sorted(&self) -> bool {
        self.affiliates
            .iter()
            .map(|one| one.jid.as_str())
            .is_sorted_by(|a, b| a < b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::{Record, RecordError};

    fn room() -> RoomRecord {
        let mut room = RoomRecord {
            created_at: 7,
            ..RoomRecord::default()
        };
        for (jid, affiliation) in [
            ("b@x", Affiliation::Owner),
            ("a@x", Affiliation::Member),
            ("bad.example", Affiliation::Outcast),
        ] {
            room.affiliate_as(Affiliate {
                jid: jid.into(),
                affiliation,
                nick: format!("nick of {jid}"),
                ..Affiliate::default()
            });
        }
        room
    }

    #[test]
    fn a_room_is_kept_as_a_record_that_no_user_can_be_taken_for() {
        let record = Record::room(&room());
        let again = Record::from_bytes(record.bytes()).unwrap();
        assert_eq!(again.to_room(), Some(room()));
        assert!(again.is_room() && again.get().sha1.is_none() && again.get().roster.is_empty());
        assert_eq!(Record::new(&Default::default()).to_room(), None);
        let mut damaged = record.into_bytes().into_vec();
        damaged.truncate(9);
        assert!(matches!(
            Record::from_bytes(damaged),
            Err(RecordError::Damaged(_))
        ));
    }

    #[test]
    fn an_entry_of_a_domain_counts_for_who_has_none() {
        let mut room = room();
        assert_eq!(room.affiliation("a@x"), Affiliation::Member);
        assert_eq!(room.affiliation("c@x"), Affiliation::None);
        assert_eq!(room.affiliation("c@bad.example"), Affiliation::Outcast);
        let member = Affiliate {
            jid: "c@bad.example".into(),
            affiliation: Affiliation::Member,
            ..Affiliate::default()
        };
        room.affiliate_as(member);
        assert_eq!(room.affiliation("c@bad.example"), Affiliation::Member);
        assert_eq!(room.owners(), 1);
    }

    #[test]
    fn a_reserved_nick_stays_with_its_owner_until_he_is_gone() {
        let mut room = room();
        let entry = |affiliation| Affiliate {
            jid: "a@x".into(),
            affiliation,
            ..Affiliate::default()
        };
        room.affiliate_as(entry(Affiliation::Admin));
        assert_eq!(room.affiliate("a@x").unwrap().nick, "nick of a@x");
        room.affiliate_as(entry(Affiliation::Outcast));
        assert_eq!(room.affiliate("a@x").unwrap().nick, "");
        room.affiliate_as(entry(Affiliation::None));
        assert_eq!(room.affiliate("a@x"), None);
    }
}
