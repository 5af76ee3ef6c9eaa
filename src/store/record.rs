//! The user's record: everything a login needs, in one piece.
//!
//! In: bytes from SQL, Redis or a file, or a [`UserRecord`] built by hand. Out: a [`Record`], checked once when it
//! enters the process and then read in place, without copies. Promise: whoever holds a [`Record`] holds valid bytes
//! whose roster and block list are sorted, so looking up a contact is a binary search.
//!
//! Layout: one version byte, then the rkyv archive of [`UserRecord`]. The archive needs no alignment (rkyv's
//! `unaligned`), so bytes are used where they lie.

use std::sync::LazyLock;

use rkyv::{Archive, Deserialize, Serialize, rancor};

use super::room::{ArchivedRoomRecord, RoomRecord};

/// The version byte written before each archive. A release reads its own version and those of its predecessors.
pub const RECORD_VERSION: u8 = 3;

/// The version byte of a room's record: another kind of entity, told apart by the highest bit.
pub const ROOM_VERSION: u8 = 0x81;

/// What a room shows to who looks for a user's data: none.
static NOBODY: LazyLock<Record> = LazyLock::new(|| Record::new(&UserRecord::default()));

/// What the server knows about one account, as a value that can be changed; [`Record`] is its stored form.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct UserRecord {
    /// Unix seconds.
    pub created_at: u64,
    /// A disabled account exists but cannot log in.
    pub disabled: bool,
    /// Keys for SCRAM-SHA-1, if the account has them.
    pub sha1: Option<ScramKeys>,
    /// Keys for SCRAM-SHA-256, if the account has them.
    pub sha256: Option<ScramKeys>,
    /// RFC 6121, 2.6: grows with each change of the roster.
    pub roster_version: u64,
    /// Sorted by `jid`; at most one item for each.
    pub roster: Vec<RosterItem>,
    /// XEP-0191: JIDs of any form (bare, full, domain), sorted.
    pub blocked: Vec<String>,
    /// RFC 6121, 3.1.3: inbound subscription requests that the user has not answered, sorted by `jid`.
    pub requests: Vec<SubscriptionRequest>,
    /// XEP-0441; `None`: everything is archived.
    pub archiving: Option<Box<Archiving>>,
    /// XEP-0357: where notifications are published, in the order in which they were enabled. Here, because it must be known
    /// whenever a message comes for somebody without a session, and that must not cost a read.
    pub push: Vec<PushService>,
    /// XEP-0484: what clients may authenticate with, the oldest first. Nothing from which a token could be made.
    pub tokens: Vec<Token>,
}

/// XEP-0357, section 5: a node of an app server.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct PushService {
    /// Prepared JID of the app server.
    pub jid: String,
    /// Empty: none was given.
    pub node: String,
    /// The form with the publish options, as XML that stands alone; empty: none was given.
    pub options: String,
}

/// XEP-0484: what is kept of one token (see [`crate::xmpp::fast`]).
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct Token {
    /// Stands for the client's installation.
    pub agent: [u8; 16],
    pub salt: [u8; 16],
    /// As a number, [`crate::xmpp::sasl::token::Ht`].
    pub mechanism: u8,
    /// Unix seconds.
    pub issued_at: u64,
    /// Unix seconds.
    pub expires_at: u64,
}

/// XEP-0441: with whom the user wants messages archived. The lists hold prepared JIDs, sorted; a bare one stands for all its
/// resources.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct Archiving {
    /// For those who are on neither list.
    pub default: ArchiveDefault,
    pub always: Vec<String>,
    pub never: Vec<String>,
}

/// XEP-0441, 2.1.1.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[rkyv(derive(Debug, Clone, Copy, PartialEq, Eq))]
#[repr(u8)]
pub enum ArchiveDefault {
    #[default]
    Always,
    Never,
    /// Messages with contacts.
    Roster,
}

/// The layout of version 2, which had neither push notifications nor tokens.
#[derive(Archive, Serialize, Deserialize)]
struct RecordOfVersion2 {
    created_at: u64,
    disabled: bool,
    sha1: Option<ScramKeys>,
    sha256: Option<ScramKeys>,
    roster_version: u64,
    roster: Vec<RosterItem>,
    blocked: Vec<String>,
    requests: Vec<SubscriptionRequest>,
    archiving: Option<Box<Archiving>>,
}

impl From<RecordOfVersion2> for UserRecord {
    fn from(old: RecordOfVersion2) -> UserRecord {
        UserRecord {
            created_at: old.created_at,
            disabled: old.disabled,
            sha1: old.sha1,
            sha256: old.sha256,
            roster_version: old.roster_version,
            roster: old.roster,
            blocked: old.blocked,
            requests: old.requests,
            archiving: old.archiving,
            push: Vec::new(),
            tokens: Vec::new(),
        }
    }
}

/// The layout of version 1, which had no preferences of archiving either.
#[derive(Archive, Serialize, Deserialize)]
struct RecordOfVersion1 {
    created_at: u64,
    disabled: bool,
    sha1: Option<ScramKeys>,
    sha256: Option<ScramKeys>,
    roster_version: u64,
    roster: Vec<RosterItem>,
    blocked: Vec<String>,
    requests: Vec<SubscriptionRequest>,
}

impl From<RecordOfVersion1> for UserRecord {
    fn from(old: RecordOfVersion1) -> UserRecord {
        let next = RecordOfVersion2 {
            created_at: old.created_at,
            disabled: old.disabled,
            sha1: old.sha1,
            sha256: old.sha256,
            roster_version: old.roster_version,
            roster: old.roster,
            blocked: old.blocked,
            requests: old.requests,
            archiving: None,
        };
        next.into()
    }
}

/// RFC 5802: what a server stores instead of a password.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct ScramKeys {
    pub iterations: u32,
    pub salt: Vec<u8>,
    pub stored_key: Vec<u8>,
    pub server_key: Vec<u8>,
}

/// RFC 6121, 2.1.2: one contact.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct RosterItem {
    /// Usually bare, already prepared (RFC 7622).
    pub jid: String,
    /// Empty: none was given.
    pub name: String,
    pub groups: Vec<String>,
    pub subscription: Subscription,
    /// `ask='subscribe'`: the user's own request is pending.
    pub ask: bool,
    /// RFC 6121, 3.4: the contact's request was approved in advance.
    pub approved: bool,
}

/// RFC 6121, 2.1.2.5.
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
    Hash,
    PartialOrd,
    Ord,
)]
#[rkyv(derive(Debug, Clone, Copy, PartialEq, Eq))]
#[repr(u8)]
pub enum Subscription {
    #[default]
    None,
    /// The user sees the contact's presence.
    To,
    /// The contact sees the user's presence.
    From,
    Both,
}

/// A subscription request as it came, to be shown again at each login until it is answered.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
pub struct SubscriptionRequest {
    /// The bare JID that asks.
    pub jid: String,
    /// The whole `<presence type='subscribe'/>`, self-contained.
    pub stanza: Vec<u8>,
}

/// Why bytes are not a [`Record`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("the user record is empty")]
    Empty,
    #[error(
        "the user record has version {found}, this nitro reads versions up to {RECORD_VERSION}: it was written by another release, start that one"
    )]
    UnknownVersion { found: u8 },
    #[error("the user record is damaged: {0}")]
    Damaged(String),
}

/// A user's record as stored bytes that were checked; see the module's page.
#[derive(Clone, PartialEq, Eq)]
pub struct Record(Box<[u8]>);

impl Record {
    /// Archives `user`. Lists that are not sorted are sorted on the way (of doubles the last one stays).
    pub fn new(user: &UserRecord) -> Record {
        if user.is_sorted() {
            return Record(encode(user));
        }
        let mut sorted = user.clone();
        sorted.sort();
        Record(encode(&sorted))
    }

    /// Archives a room.
    pub fn room(room: &RoomRecord) -> Record {
        let mut sorted = room.clone();
        sorted.sort();
        let bytes = rkyv::api::high::to_bytes_in::<_, rancor::Error>(&sorted, vec![ROOM_VERSION]);
        let bytes =
            bytes.expect("writing to memory fails only beyond 2 GiB, far above every limit");
        Record(bytes.into_boxed_slice())
    }

    pub fn is_room(&self) -> bool {
        self.0[0] == ROOM_VERSION
    }

    /// The room that it is, to be changed; `None`: it is a user.
    pub fn to_room(&self) -> Option<RoomRecord> {
        if !self.is_room() {
            return None;
        }
        let room = rkyv::access::<ArchivedRoomRecord, rancor::Error>(&self.0[1..])
            .expect("it was checked when it was made");
        let room = rkyv::deserialize::<RoomRecord, rancor::Error>(room);
        Some(room.expect("a checked record holds no value that cannot be copied"))
    }

    /// Checks bytes that come from outside: version, structure, UTF-8 and order.
    pub fn from_bytes(bytes: impl Into<Box<[u8]>>) -> Result<Record, RecordError> {
        let bytes = bytes.into();
        match bytes.first() {
            None => return Err(RecordError::Empty),
            Some(&RECORD_VERSION) => {}
            Some(&1) => return from_version_1(&bytes[1..]),
            Some(&2) => return from_version_2(&bytes[1..]),
            Some(&ROOM_VERSION) => {
                let room = rkyv::access::<ArchivedRoomRecord, rancor::Error>(&bytes[1..])
                    .map_err(|error| RecordError::Damaged(error.to_string()))?;
                if !room.is_sorted() {
                    return Err(RecordError::Damaged("its lists are not sorted".into()));
                }
                return Ok(Record(bytes));
            }
            Some(&found) => return Err(RecordError::UnknownVersion { found }),
        }
        let user = rkyv::access::<ArchivedUserRecord, rancor::Error>(&bytes[1..])
            .map_err(|error| RecordError::Damaged(error.to_string()))?;
        if !user.is_sorted() {
            return Err(RecordError::Damaged("its lists are not sorted".into()));
        }
        Ok(Record(bytes))
    }

    /// The user's record, read in place; that of nobody if it is a room's.
    #[allow(unsafe_code)]
    pub fn get(&self) -> &ArchivedUserRecord {
        if self.is_room() {
            return NOBODY.get();
        }
        // SAFETY: a `Record` of a user is only made by `new`, which archived these bytes, or by `from_bytes`, which validated
        // them; they are never changed after. Checking again on each read would cost more than the read.
        unsafe { rkyv::access_unchecked::<ArchivedUserRecord>(&self.0[1..]) }
    }

    /// The stored form, version byte included.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The stored form, version byte included.
    pub fn into_bytes(self) -> Box<[u8]> {
        self.0
    }

    /// A copy of a user's that can be changed and archived again with [`Record::new`].
    pub fn to_owned(&self) -> UserRecord {
        rkyv::deserialize::<UserRecord, rancor::Error>(self.get())
            .expect("a checked record holds no value that cannot be copied")
    }
}

impl std::fmt::Debug for Record {
    // The bytes hold keys: never into a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Record({} bytes)", self.0.len())
    }
}

/// A predecessor's form becomes this one's.
fn from_version_1(bytes: &[u8]) -> Result<Record, RecordError> {
    let damaged = |error: rancor::Error| RecordError::Damaged(error.to_string());
    let old = rkyv::access::<ArchivedRecordOfVersion1, rancor::Error>(bytes).map_err(damaged)?;
    let old = rkyv::deserialize::<RecordOfVersion1, rancor::Error>(old).map_err(damaged)?;
    taken_over(UserRecord::from(old))
}

fn from_version_2(bytes: &[u8]) -> Result<Record, RecordError> {
    let damaged = |error: rancor::Error| RecordError::Damaged(error.to_string());
    let old = rkyv::access::<ArchivedRecordOfVersion2, rancor::Error>(bytes).map_err(damaged)?;
    let old = rkyv::deserialize::<RecordOfVersion2, rancor::Error>(old).map_err(damaged)?;
    taken_over(UserRecord::from(old))
}

fn taken_over(user: UserRecord) -> Result<Record, RecordError> {
    if !user.is_sorted() {
        return Err(RecordError::Damaged("its lists are not sorted".into()));
    }
    Ok(Record(encode(&user)))
}

fn encode(user: &UserRecord) -> Box<[u8]> {
    // The serializer appends, so the version byte goes in first and nothing is moved; positions inside an archive are
    // relative, so one byte before it does no harm where alignment does not matter.
    rkyv::api::high::to_bytes_in::<_, rancor::Error>(user, vec![RECORD_VERSION])
        .expect("writing to memory fails only beyond 2 GiB, far above every limit on a roster")
        .into_boxed_slice()
}

impl UserRecord {
    /// Position of a contact in the sorted roster, or where it belongs.
    pub fn roster_position(&self, jid: &str) -> Result<usize, usize> {
        self.roster
            .binary_search_by(|item| item.jid.as_str().cmp(jid))
    }

    /// The contact, if there is one.
    pub fn roster_item(&self, jid: &str) -> Option<&RosterItem> {
        self.roster_position(jid).ok().map(|at| &self.roster[at])
    }

    /// Adds the contact or replaces it, in order.
    pub fn put_roster_item(&mut self, item: RosterItem) {
        match self.roster_position(&item.jid) {
            Ok(at) => self.roster[at] = item,
            Err(at) => self.roster.insert(at, item),
        }
    }

    /// Takes the contact out.
    pub fn remove_roster_item(&mut self, jid: &str) -> Option<RosterItem> {
        self.roster_position(jid)
            .ok()
            .map(|at| self.roster.remove(at))
    }

    /// Blocks a JID; false if it was blocked before.
    pub fn block(&mut self, jid: &str) -> bool {
        match self.blocked.binary_search_by(|one| one.as_str().cmp(jid)) {
            Ok(_) => false,
            Err(at) => {
                self.blocked.insert(at, jid.to_owned());
                true
            }
        }
    }

    /// Unblocks a JID; false if it was not blocked.
    pub fn unblock(&mut self, jid: &str) -> bool {
        match self.blocked.binary_search_by(|one| one.as_str().cmp(jid)) {
            Ok(at) => {
                self.blocked.remove(at);
                true
            }
            Err(_) => false,
        }
    }

    /// Keeps an inbound request; a newer one of the same contact replaces it.
    pub fn put_request(&mut self, request: SubscriptionRequest) {
        match self.request_position(&request.jid) {
            Ok(at) => self.requests[at] = request,
            Err(at) => self.requests.insert(at, request),
        }
    }

    /// Takes an inbound request out, because it was answered or withdrawn.
    pub fn remove_request(&mut self, jid: &str) -> Option<SubscriptionRequest> {
        self.request_position(jid)
            .ok()
            .map(|at| self.requests.remove(at))
    }

    fn request_position(&self, jid: &str) -> Result<usize, usize> {
        self.requests
            .binary_search_by(|one| one.jid.as_str().cmp(jid))
    }

    fn is_sorted(&self) -> bool {
        ascends(self.roster.iter().map(|item| item.jid.as_str()))
            && ascends(self.blocked.iter().map(String::as_str))
            && ascends(self.requests.iter().map(|one| one.jid.as_str()))
            && self.archiving.as_ref().is_none_or(|archiving| {
                ascends(archiving.always.iter().map(String::as_str))
                    && ascends(archiving.never.iter().map(String::as_str))
            })
    }

    fn sort(&mut self) {
        for list in self
            .archiving
            .iter_mut()
            .flat_map(|a| [&mut a.always, &mut a.never])
        {
            list.sort();
            list.dedup();
        }
        // Stable sort of the reversed list puts the last double first, where dedup keeps it.
        self.roster.reverse();
        self.roster.sort_by(|a, b| a.jid.cmp(&b.jid));
        self.roster.dedup_by(|a, b| a.jid == b.jid);
        self.blocked.sort();
        self.blocked.dedup();
        self.requests.reverse();
        self.requests.sort_by(|a, b| a.jid.cmp(&b.jid));
        self.requests.dedup_by(|a, b| a.jid == b.jid);
    }
}

impl ArchivedUserRecord {
    /// The contact, by binary search.
    pub fn roster_item(&self, jid: &str) -> Option<&ArchivedRosterItem> {
        let at = self
            .roster
            .binary_search_by(|item| item.jid.as_str().cmp(jid))
            .ok()?;
        Some(&self.roster[at])
    }

    /// Whether exactly this JID stands on the block list. XEP-0191 matches full, bare, domain/resource and domain
    /// forms: ask once for each form of the address.
    pub fn blocks(&self, jid: &str) -> bool {
        self.blocked
            .binary_search_by(|one| one.as_str().cmp(jid))
            .is_ok()
    }

    /// The pending inbound request of a bare JID.
    pub fn request(&self, jid: &str) -> Option<&ArchivedSubscriptionRequest> {
        let at = self
            .requests
            .binary_search_by(|one| one.jid.as_str().cmp(jid))
            .ok()?;
        Some(&self.requests[at])
    }

    /// XEP-0441: does the user want messages with `peer` (a bare or full JID) archived? A full JID goes before its bare one,
    /// and "never" before "always". `shared`: is it somebody with whom he shares a group?
    pub fn archives(&self, peer: &str, shared: impl FnOnce() -> bool) -> bool {
        let Some(archiving) = self.archiving.as_ref() else {
            return true;
        };
        let lists = |list: &rkyv::vec::ArchivedVec<rkyv::string::ArchivedString>, jid: &str| {
            list.binary_search_by(|one| one.as_str().cmp(jid)).is_ok()
        };
        let bare = peer.split_once('/').map_or(peer, |(bare, _)| bare);
        for jid in [peer, bare] {
            if lists(&archiving.never, jid) {
                return false;
            }
            if lists(&archiving.always, jid) {
                return true;
            }
        }
        match archiving.default {
            ArchivedArchiveDefault::Always => true,
            ArchivedArchiveDefault::Never => false,
            ArchivedArchiveDefault::Roster => self.roster_item(bare).is_some() || shared(),
        }
    }

    fn is_sorted(&self) -> bool {
        ascends(self.roster.iter().map(|item| item.jid.as_str()))
            && ascends(self.blocked.iter().map(|one| one.as_str()))
            && ascends(self.requests.iter().map(|one| one.jid.as_str()))
            && self.archiving.as_ref().is_none_or(|archiving| {
                ascends(archiving.always.iter().map(|one| one.as_str()))
                    && ascends(archiving.never.iter().map(|one| one.as_str()))
            })
    }
}

impl Subscription {
    /// The user receives the contact's presence (`to` or `both`).
    pub fn to(self) -> bool {
        matches!(self, Subscription::To | Subscription::Both)
    }

    /// The contact receives the user's presence (`from` or `both`).
    pub fn from(self) -> bool {
        matches!(self, Subscription::From | Subscription::Both)
    }

    /// Back from the two directions.
    pub fn of(to: bool, from: bool) -> Subscription {
        match (to, from) {
            (false, false) => Subscription::None,
            (true, false) => Subscription::To,
            (false, true) => Subscription::From,
            (true, true) => Subscription::Both,
        }
    }

    /// The attribute's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Subscription::None => "none",
            Subscription::To => "to",
            Subscription::From => "from",
            Subscription::Both => "both",
        }
    }
}

impl From<ArchivedSubscription> for Subscription {
    fn from(archived: ArchivedSubscription) -> Subscription {
        match archived {
            ArchivedSubscription::None => Subscription::None,
            ArchivedSubscription::To => Subscription::To,
            ArchivedSubscription::From => Subscription::From,
            ArchivedSubscription::Both => Subscription::Both,
        }
    }
}

impl ArchivedRosterItem {
    pub fn subscription(&self) -> Subscription {
        self.subscription.into()
    }
}

/// Strictly ascending: sorted and without doubles.
fn ascends<'a>(mut items: impl Iterator<Item = &'a str>) -> bool {
    let Some(mut previous) = items.next() else {
        return true;
    };
    items.all(|item| std::mem::replace(&mut previous, item) < item)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn keys(fill: u8, hash_len: usize) -> ScramKeys {
        ScramKeys {
            iterations: 10_000,
            salt: vec![fill; 16],
            stored_key: vec![fill; hash_len],
            server_key: vec![fill; hash_len],
        }
    }

    pub(crate) fn user(contacts: usize) -> UserRecord {
        UserRecord {
            created_at: 1_790_000_000,
            sha1: Some(keys(1, 20)),
            sha256: Some(keys(2, 32)),
            roster_version: contacts as u64,
            roster: (0..contacts)
                .map(|n| RosterItem {
                    jid: format!("trader{n:05}@example.com"),
                    name: format!("Trader {n}"),
                    groups: vec!["Desk".into()],
                    subscription: Subscription::Both,
                    ..RosterItem::default()
                })
                .collect(),
            ..UserRecord::default()
        }
    }

    #[test]
    fn a_record_is_small_because_every_user_on_line_has_one() {
        let empty = Record::new(&user(0)).bytes().len();
        assert!(empty <= 300, "{empty} bytes without contacts");
        let fifty = Record::new(&user(50)).bytes().len();
        assert!(fifty <= empty + 50 * 80, "{fifty} bytes with 50 contacts");
    }

    #[test]
    fn an_unknown_version_is_refused_by_name() {
        let mut bytes = Record::new(&user(3)).into_bytes();
        bytes[0] = 9;
        let error = Record::from_bytes(bytes).unwrap_err();
        assert_eq!(error, RecordError::UnknownVersion { found: 9 });
        assert!(error.to_string().contains("version 9"));
        assert_eq!(Record::from_bytes(vec![]).unwrap_err(), RecordError::Empty);
    }

    #[test]
    fn records_of_the_release_before_are_read() {
        let now = user(3);
        let old = RecordOfVersion1 {
            created_at: now.created_at,
            disabled: now.disabled,
            sha1: now.sha1.clone(),
            sha256: now.sha256.clone(),
            roster_version: now.roster_version,
            roster: now.roster.clone(),
            blocked: now.blocked.clone(),
            requests: now.requests.clone(),
        };
        let bytes = |old: &RecordOfVersion1| {
            rkyv::api::high::to_bytes_in::<_, rancor::Error>(old, vec![1]).unwrap()
        };
        let read = Record::from_bytes(bytes(&old)).unwrap();
        assert_eq!(read.to_owned(), now);
        assert_eq!(read.bytes()[0], RECORD_VERSION);
        let second = RecordOfVersion2 {
            created_at: now.created_at,
            disabled: now.disabled,
            sha1: now.sha1.clone(),
            sha256: now.sha256.clone(),
            roster_version: now.roster_version,
            roster: now.roster.clone(),
            blocked: now.blocked.clone(),
            requests: now.requests.clone(),
            archiving: None,
        };
        let bytes_of_second =
            rkyv::api::high::to_bytes_in::<_, rancor::Error>(&second, vec![2]).unwrap();
        assert_eq!(Record::from_bytes(bytes_of_second).unwrap().to_owned(), now);
        let mut cut = bytes(&old);
        cut.truncate(20);
        assert!(matches!(
            Record::from_bytes(cut),
            Err(RecordError::Damaged(_))
        ));
        // as the first release has written an account without anything
        let mut empty = RecordOfVersion1 {
            created_at: 7,
            ..old
        };
        (empty.sha1, empty.sha256, empty.roster_version) = (None, None, 0);
        empty.roster.clear();
        let text: String = bytes(&empty).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            text,
            "01070000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000b5ffffff00000000adffffff00000000a5ffffff00000000"
        );
        let hex = text;
        let first: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect();
        let empty = Record::from_bytes(first).unwrap();
        assert_eq!(
            empty.to_owned(),
            UserRecord {
                created_at: 7,
                ..UserRecord::default()
            }
        );
    }

    #[test]
    fn records_of_version_2_are_read_with_their_preferences() {
        let mut now = user(3);
        now.archiving = Some(Box::new(Archiving {
            default: ArchiveDefault::Roster,
            always: vec!["a@x".into()],
            never: vec![],
        }));
        let old = RecordOfVersion2 {
            created_at: now.created_at,
            disabled: now.disabled,
            sha1: now.sha1.clone(),
            sha256: now.sha256.clone(),
            roster_version: now.roster_version,
            roster: now.roster.clone(),
            blocked: now.blocked.clone(),
            requests: now.requests.clone(),
            archiving: now.archiving.clone(),
        };
        let bytes = rkyv::api::high::to_bytes_in::<_, rancor::Error>(&old, vec![2]).unwrap();
        let read = Record::from_bytes(bytes.clone()).unwrap();
        assert_eq!(read.to_owned(), now);
        assert_eq!(read.bytes()[0], RECORD_VERSION);
        let cut = Record::from_bytes(&bytes[..20]);
        assert!(matches!(cut, Err(RecordError::Damaged(_))));
    }

    #[test]
    fn preferences_go_by_the_full_jid_then_the_bare_one_then_the_default() {
        let jids = |jids: &[&str]| jids.iter().map(|jid| jid.to_string()).collect();
        let mut record = user(1);
        record.archiving = Some(Box::new(Archiving {
            default: ArchiveDefault::Roster,
            always: jids(&["a@x", "never@x/but"]),
            never: jids(&["a@x/phone", "never@x"]),
        }));
        let record = Record::new(&record);
        for (peer, archived) in [
            ("a@x", true),
            ("a@x/desk", true),
            ("a@x/phone", false),
            ("never@x", false),
            ("never@x/desk", false),
            ("never@x/but", true),
            ("trader00000@example.com/desk", true),
            ("stranger@example.com", false),
        ] {
            assert_eq!(record.get().archives(peer, || false), archived, "{peer}");
        }
        assert!(Record::new(&user(0)).get().archives("anybody@x", || false));
    }

    #[test]
    fn lists_are_sorted_however_they_came() {
        let mut mixed = user(5);
        mixed.roster.reverse();
        mixed.roster.push(RosterItem {
            name: "newer".into(),
            ..mixed.roster[0].clone()
        });
        mixed.blocked = vec!["b@x".into(), "a@x".into(), "b@x".into()];
        let record = Record::new(&mixed);
        assert_eq!(record.get().roster.len(), 5);
        assert_eq!(
            record
                .get()
                .roster_item("trader00004@example.com")
                .unwrap()
                .name
                .as_str(),
            "newer"
        );
        assert!(
            record.get().blocks("a@x") && record.get().blocks("b@x") && !record.get().blocks("c@x")
        );
        Record::from_bytes(record.bytes()).unwrap();
        // Bytes from elsewhere whose order is wrong would make lookups miss.
        let mut unsorted = user(2);
        unsorted.roster.reverse();
        assert!(matches!(
            Record::from_bytes(encode(&unsorted)),
            Err(RecordError::Damaged(_))
        ));
    }

    fn any_user() -> impl Strategy<Value = UserRecord> {
        let keys = || {
            proptest::option::of((any::<u32>(), any::<[u8; 4]>(), any::<Vec<u8>>()).prop_map(
                |(iterations, salt, key)| ScramKeys {
                    iterations,
                    salt: salt.into(),
                    stored_key: key.clone(),
                    server_key: key,
                },
            ))
        };
        let item = (
            ".{0,20}",
            ".{0,9}",
            proptest::collection::vec(".{0,12}", 0..3),
            any::<[bool; 4]>(),
        )
            .prop_map(
                |(jid, name, groups, [to, from, ask, approved])| RosterItem {
                    jid,
                    name,
                    groups,
                    subscription: Subscription::of(to, from),
                    ask,
                    approved,
                },
            );
        let request = (".{0,20}", any::<Vec<u8>>())
            .prop_map(|(jid, stanza)| SubscriptionRequest { jid, stanza });
        let jids = || proptest::collection::vec(".{0,20}", 0..4);
        let default = prop_oneof![
            Just(ArchiveDefault::Always),
            Just(ArchiveDefault::Never),
            Just(ArchiveDefault::Roster)
        ];
        let archiving = (default, jids(), jids()).prop_map(|(default, always, never)| {
            Box::new(Archiving {
                default,
                always,
                never,
            })
        });
        let token = any::<([u8; 16], [u8; 16], u8, u64, u64)>().prop_map(
            |(agent, salt, mechanism, issued_at, expires_at)| Token {
                agent,
                salt,
                mechanism,
                issued_at,
                expires_at,
            },
        );
        (
            any::<(u64, bool, u64)>(),
            keys(),
            keys(),
            proptest::collection::vec(item, 0..20),
            proptest::collection::vec(".{0,20}", 0..9),
            proptest::collection::vec(request, 0..4),
            proptest::option::of(archiving),
            proptest::collection::vec((".{0,12}", ".{0,9}", ".{0,20}"), 0..3),
            proptest::collection::vec(token, 0..3),
        )
            .prop_map(
                |(
                    (created_at, disabled, roster_version),
                    sha1,
                    sha256,
                    roster,
                    blocked,
                    requests,
                    archiving,
                    push,
                    tokens,
                )| {
                    let push = push.into_iter();
                    let push = push.map(|(jid, node, options)| PushService { jid, node, options });
                    let mut user = UserRecord {
                        created_at,
                        disabled,
                        sha1,
                        sha256,
                        roster_version,
                        roster,
                        blocked,
                        requests,
                        archiving,
                        push: push.collect(),
                        tokens,
                    };
                    user.sort();
                    user
                },
            )
    }

    proptest! {
        #[test]
        fn what_was_archived_comes_back(user in any_user()) {
            let record = Record::new(&user);
            prop_assert_eq!(&record.to_owned(), &user);
            let again = Record::from_bytes(record.bytes()).unwrap();
            prop_assert_eq!(again.to_owned(), user.clone());
            for item in &user.roster {
                let found = record.get().roster_item(&item.jid).unwrap();
                prop_assert_eq!(found.subscription(), item.subscription);
            }
        }

        #[test]
        fn damaged_bytes_never_become_a_record_that_panics(
            user in any_user(), at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = Record::new(&user).into_bytes().into_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(record) = Record::from_bytes(bytes.clone()) {
                let _ = record.to_owned();
            }
            bytes.truncate(cut.index(bytes.len()));
            if let Ok(record) = Record::from_bytes(bytes) {
                let _ = record.to_owned();
            }
        }
    }
}
