//! The admin protocol: how `nitro user` and `nitro session` reach the accounts.
//!
//! In flows an [`AdminRequest`], out flows an [`AdminReply`]; on the wire (unix socket `nitro.sock` in the data folder,
//! mode 0600) each is one line of JSON. While nitro runs, [`server`] carries requests to it, so its caches are right at
//! once; while it does not, [`direct`] answers the same requests from the SQLite file, under [`lock::DataLock`].
//!
//! Promise: a request has the same effect and the same sentences both ways, and no password ever crosses: keys are
//! derived by the command.

pub mod client;
pub mod direct;
pub mod lock;
pub mod server;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::net::TlsClientConfig;
use crate::store::journal::{Options, floors};
use crate::store::record::{RosterItem, ScramKeys, Subscription, UserRecord};
use crate::store::redis::{Address, Generations};
use crate::store::settle;
use crate::store::sql::Database;
use crate::store::sql::admin::Store;
use crate::xmpp::groups::Groups;

/// Bytes of one request or reply with its newline; what is longer ends the connection.
pub const LINE_BYTES_MAX: usize = 8 << 20;
/// Users in one [`AdminRequest::ImportUsers`], [`AdminRequest::ImportRosters`] or [`AdminRequest::UsersKnown`].
pub const BATCH_MAX: usize = 500;
/// Users or sessions in one listing.
pub const LIST_MAX: usize = 1000;

/// What an operator asks. Every `name` is a prepared localpart (RFC 7622), without the domain; [`server`] checks it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AdminRequest {
    /// -> `Done` or `Refused`.
    UserAdd { name: String, keys: Keys },
    /// Replaces the keys. -> `Done` or `Refused`.
    UserPasswd { name: String, keys: Keys },
    /// Account, offline messages, documents; ends the sessions. -> `Done` or `Refused`.
    UserRemove { name: String },
    /// At most `limit` (<= [`LIST_MAX`]) users whose name begins with `prefix` and comes after `after`, in byte order.
    /// -> `Users`.
    UserList {
        prefix: String,
        after: String,
        limit: usize,
    },
    /// -> `User` or `Refused`.
    UserShow { name: String },
    /// No log-ins any more; ends the sessions. -> `Done` or `Refused`.
    UserDisable { name: String },
    /// -> `Done` or `Refused`.
    UserEnable { name: String },
    /// The sessions of one user or of all, after the full JID `after`, in byte order of full JIDs, at most `limit`
    /// (<= [`LIST_MAX`]). -> `Sessions`.
    SessionList {
        name: Option<String>,
        after: String,
        limit: usize,
    },
    /// Ends one session (full), or all of a user (no resource). -> `Kicked` or `Refused`.
    SessionKick {
        name: String,
        resource: Option<String>,
    },
    /// The connections of components. -> `Components`.
    ComponentList,
    /// Ends the connections that serve a name. -> `Kicked` or `Refused`.
    ComponentKick { host: String },
    /// An administrator's groups. -> `Groups`.
    GroupList,
    /// -> `Group` or `Refused`.
    GroupShow { group: String },
    /// Reads their file again. -> `Groups` or `Refused`.
    GroupReload,
    /// Which of these users exist? -> `Known`, in the same order.
    UsersKnown { names: Vec<String> },
    /// -> `Imported`, in the same order. See [`import_user`].
    ImportUsers {
        existing: Existing,
        users: Vec<ImportUser>,
    },
    /// -> `Imported`, in the same order. See [`import_roster`]; contacts on line get a roster push.
    ImportRosters { rosters: Vec<ImportRoster> },
    /// How far the database has what was accepted. -> `Journals`.
    Journals,
    /// Entries of archives were deleted from the database: what is in memory of archives is forgotten. -> `Done`.
    ArchivePurged,
    /// The figures of this moment, as `nitro top` shows them. -> `Figures`.
    Figures,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AdminReply {
    /// It is done, and survives a crash.
    Done,
    /// Names in byte order.
    Users {
        users: Vec<UserLine>,
    },
    User {
        user: UserDetail,
    },
    /// In byte order of full JIDs.
    Sessions {
        sessions: Vec<SessionLine>,
    },
    /// By name, the oldest connection first.
    Components {
        components: Vec<ComponentLine>,
    },
    /// Names and numbers of members, in byte order.
    Groups {
        groups: Vec<(String, usize)>,
    },
    /// Local part of each member and what contacts see, in byte order.
    Group {
        members: Vec<(String, String)>,
    },
    /// How many sessions, or connections of components, ended.
    Kicked {
        sessions: usize,
    },
    Known {
        known: Vec<bool>,
    },
    Imported {
        outcomes: Vec<Outcome>,
    },
    Journals {
        /// Of the nitro that answers.
        release: String,
        journals: Vec<JournalLine>,
    },
    Figures {
        figures: Box<Figures>,
    },
    /// A sentence for the operator that says why not.
    Refused {
        sentence: String,
    },
}

/// One user in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UserLine {
    pub name: String,
    pub disabled: bool,
}

/// What `nitro user show` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UserDetail {
    pub name: String,
    pub disabled: bool,
    /// Unix seconds.
    pub created_at: u64,
    /// PBKDF2 iterations of the SCRAM-SHA-1 keys.
    pub sha1_iterations: Option<u32>,
    /// PBKDF2 iterations of the SCRAM-SHA-256 keys.
    pub sha256_iterations: Option<u32>,
    pub contacts: usize,
    pub blocked: usize,
    /// Subscription requests that wait for the user's answer.
    pub requests: usize,
    /// Messages that wait for the user.
    pub offline_messages: u64,
    /// Unix seconds of the last log-out, if any.
    pub last_at: Option<u64>,
    /// None when nitro does not run.
    pub sessions: Option<usize>,
}

impl UserDetail {
    /// The part that the record knows.
    pub fn of(name: &str, record: &UserRecord) -> UserDetail {
        UserDetail {
            name: name.into(),
            disabled: record.disabled,
            created_at: record.created_at,
            sha1_iterations: record.sha1.as_ref().map(|k| k.iterations),
            sha256_iterations: record.sha256.as_ref().map(|k| k.iterations),
            contacts: record.roster.len(),
            blocked: record.blocked.len(),
            requests: record.requests.len(),
            offline_messages: 0,
            last_at: None,
            sessions: None,
        }
    }
}

/// Figures by the names of their metrics (without `_total`; seconds are in microseconds), and all that was recorded of each
/// stage since the start: whoever asks twice has the figures of the time between.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Of the nitro that answers.
    pub release: String,
    /// When they were taken, unix microseconds.
    pub unix_us: u64,
    /// By shard.
    pub shards: Vec<BTreeMap<String, u64>>,
    /// Of the whole blade: SQL lane, process.
    pub blade: BTreeMap<String, u64>,
    /// Of the Redis instances, as each shard sees them.
    pub instances: Vec<InstanceFigures>,
    pub stages: Vec<StageFigures>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceFigures {
    pub shard: usize,
    pub instance: String,
    pub numbers: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageFigures {
    /// Its short name.
    pub stage: String,
    /// `None`: the SQL lane.
    pub shard: Option<usize>,
    /// Microseconds: HdrHistogram V2, in base64.
    pub histogram: String,
}

/// How far a journal is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalLine {
    pub shard: u16,
    /// Tells it from one of the same shard that began anew.
    pub identity: u64,
    /// The last record that is durable.
    pub committed: u64,
    /// The last record that is in the database.
    pub drained: u64,
}

/// One session in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionLine {
    /// The full JID.
    pub jid: String,
    /// The client's address, as the server believes it.
    pub address: String,
    /// Unix seconds of the log-in.
    pub since: u64,
    pub tls: bool,
    pub shard: usize,
    /// Priority of the available presence; none: unavailable.
    pub priority: Option<i8>,
    /// Its connection was cut and it can be resumed.
    pub parked: bool,
}

/// One connection of a component in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ComponentLine {
    /// The name that it serves.
    pub host: String,
    pub address: String,
    /// Unix seconds.
    pub since: u64,
    pub shard: usize,
    /// Stanzas from it and for it.
    pub stanzas_in: u64,
    pub stanzas_out: u64,
    /// Bytes that it has not taken yet.
    pub waiting_bytes: u64,
}

/// The salted keys of one account; at least one is there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keys {
    #[serde(default, skip_serializing_if = "Option::is_none", with = "scram")]
    pub sha1: Option<ScramKeys>,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "scram")]
    pub sha256: Option<ScramKeys>,
}

/// What an import does with a user who exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Existing {
    /// Report the row as bad.
    Error,
    /// Leave the account as it is.
    Skip,
    /// Give the account the keys of the row; the roster stays.
    Replace,
}

/// One account of an import.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportUser {
    pub name: String,
    pub keys: Keys,
}

/// Contacts to put into one roster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportRoster {
    pub name: String,
    pub items: Vec<ImportItem>,
}

/// One contact of an import: a mutual subscription.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportItem {
    /// Bare, prepared.
    pub jid: String,
    /// None: the item's name stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// None: the item's groups stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<String>>,
}

/// What became of one entry of an import.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Added,
    Replaced,
    /// It was so already, or `Existing::Skip`.
    Skipped,
    /// Why not, as a part of a sentence.
    Refused(String),
}

impl AdminReply {
    /// A sentence that says why not.
    pub fn refused(sentence: impl Into<String>) -> AdminReply {
        AdminReply::Refused {
            sentence: sentence.into(),
        }
    }

    pub fn groups(groups: &Groups) -> AdminReply {
        let sizes = groups.sizes().map(|(name, size)| (name.to_owned(), size));
        AdminReply::Groups {
            groups: sizes.collect(),
        }
    }

    pub fn group(groups: &Groups, name: &str) -> AdminReply {
        let Some(members) = groups.members(name) else {
            return AdminReply::refused(format!("there is no group {name}; see: nitro group list"));
        };
        AdminReply::Group {
            members: members
                .map(|person| (person.name.to_string(), person.label.to_string()))
                .collect(),
        }
    }

    pub fn no_such_user(name: &str) -> AdminReply {
        AdminReply::refused(format!("there is no user {name}"))
    }

    pub fn user_exists(name: &str) -> AdminReply {
        AdminReply::refused(format!("there is a user {name} already"))
    }
}

impl Keys {
    /// Whether each is what SCRAM says: lengths of the hash, iterations and salt within bounds.
    pub fn check(&self) -> Result<(), String> {
        if self.sha1.is_none() && self.sha256.is_none() {
            return Err("there are no keys".into());
        }
        for (keys, hash, length) in [(&self.sha1, "SHA-1", 20), (&self.sha256, "SHA-256", 32)] {
            let Some(keys) = keys else { continue };
            if !ITERATIONS.contains(&keys.iterations) {
                let (low, high) = ITERATIONS.into_inner();
                return Err(format!("the {hash} iterations must be {low} to {high}"));
            }
            if !(1..=255).contains(&keys.salt.len()) {
                return Err(format!("the {hash} salt must be 1 to 255 bytes"));
            }
            if keys.stored_key.len() != length || keys.server_key.len() != length {
                return Err(format!("the {hash} keys must be {length} bytes"));
            }
        }
        Ok(())
    }

    /// Gives `record` these keys instead of all that it had: an old password must not go on working by another hash.
    pub fn put_into(self, record: &mut UserRecord) {
        record.sha1 = self.sha1;
        record.sha256 = self.sha256;
    }

    /// A new account with these keys.
    pub fn into_record(self, created_at: u64) -> UserRecord {
        UserRecord {
            created_at,
            sha1: self.sha1,
            sha256: self.sha256,
            ..UserRecord::default()
        }
    }
}

/// Iteration counts that are accepted: RFC 7677's least, and what a client can bear.
const ITERATIONS: std::ops::RangeInclusive<u32> = 4096..=10_000_000;

/// Decides on one user of an import: the record to write, if any, and what to report.
pub fn import_user(
    old: Option<UserRecord>,
    keys: Keys,
    existing: Existing,
    created_at: u64,
) -> (Option<UserRecord>, Outcome) {
    match (old, existing) {
        (None, _) => (Some(keys.into_record(created_at)), Outcome::Added),
        (Some(_), Existing::Skip) => (None, Outcome::Skipped),
        (Some(_), Existing::Error) => (
            None,
            Outcome::Refused("the user exists already (see --existing)".into()),
        ),
        (Some(mut old), Existing::Replace) => {
            keys.put_into(&mut old);
            (Some(old), Outcome::Replaced)
        }
    }
}

/// Puts the contacts into `record`, each with the subscription `both`, and settles the requests between them. All or
/// nothing: a roster that would pass `items_max` is not touched. The roster version grows if anything changed.
pub fn import_roster(record: &mut UserRecord, items: &[ImportItem], items_max: usize) -> Outcome {
    let new = items
        .iter()
        .filter(|item| record.roster_item(&item.jid).is_none())
        .count();
    if record.roster.len() + new > items_max && new > 0 {
        return Outcome::Refused(format!(
            "the roster would have {} contacts (see limits.roster_items_max)",
            record.roster.len() + new
        ));
    }
    let mut changed = false;
    for item in items {
        let old = record.roster_item(&item.jid).cloned();
        let mut merged = old.clone().unwrap_or_else(|| RosterItem {
            jid: item.jid.clone(),
            ..RosterItem::default()
        });
        merged.subscription = Subscription::Both;
        merged.ask = false;
        merged.approved = false;
        if let Some(label) = &item.label {
            merged.name.clone_from(label);
        }
        if let Some(groups) = &item.groups {
            merged.groups.clone_from(groups);
        }
        changed |= record.remove_request(&item.jid).is_some();
        if old.as_ref() != Some(&merged) {
            record.put_roster_item(merged);
            changed = true;
        }
    }
    if !changed {
        return Outcome::Skipped;
    }
    record.roster_version += 1;
    match new {
        0 => Outcome::Replaced,
        _ => Outcome::Added,
    }
}

/// The database of a blade that does not run, with everything that its journals hold. An error is a sentence.
pub fn open_store(config: &Config) -> Result<Store, String> {
    let database = database(config)?;
    forget_copies(config)?;
    let owners = owners(config);
    crate::store::owners::forget(&owners).map_err(|error| {
        format!(
            "{}: {error}; it must be removed before the database is changed by hand",
            owners.display()
        )
    })?;
    settle::open(&database, &config.journal_dir(), &journal_options(config))
}

/// What Redis holds will not be what the database has: it is not used again.
pub fn forget_copies(config: &Config) -> Result<(), String> {
    let path = generations(config);
    Generations::forget(&path).map_err(|error| {
        format!(
            "{}: {error}; it must be removed before the database is changed by hand",
            path.display()
        )
    })
}

/// The instances of the ring; none: there is no ring. An error is a sentence.
pub fn redis_instances(config: &Config) -> Result<Vec<Address>, String> {
    let texts = config.redis.instances.iter().map(String::as_str);
    Address::parse_all(texts).map_err(|error| error.to_string())
}

/// How instances are reached over TLS, if any is. An error is a sentence.
pub fn redis_tls(
    config: &Config,
    addresses: &[Address],
) -> Result<Option<TlsClientConfig>, String> {
    let c = &config.redis;
    match addresses.iter().any(Address::is_tls) {
        true => TlsClientConfig::load(&c.ca_file, &c.certificate, &c.key).map(Some),
        false => Ok(None),
    }
}

/// The file with the generations of the instances.
pub fn generations(config: &Config) -> PathBuf {
    config.data_dir.join("redis.json")
}

/// The file that says since when users have had the same owners.
pub fn owners(config: &Config) -> PathBuf {
    config.data_dir.join("owners")
}

/// The database that the configuration names.
pub fn database(config: &Config) -> Result<Database, String> {
    Database::parse(&config.database()).map_err(|error| format!("database: {error}"))
}

pub fn journal_options(config: &Config) -> Options {
    Options {
        segment_bytes: config.journal.segment_bytes as u64,
        backlog_bytes_max: config.journal.backlog_bytes_max as u64,
        floors: floors(),
    }
}

/// [`ScramKeys`] as JSON: byte strings in base64.
mod scram {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

    use crate::store::record::ScramKeys;

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Json {
        iterations: u32,
        salt: String,
        stored_key: String,
        server_key: String,
    }

    pub fn serialize<S: Serializer>(keys: &Option<ScramKeys>, to: S) -> Result<S::Ok, S::Error> {
        let json = keys.as_ref().map(|k| Json {
            iterations: k.iterations,
            salt: BASE64.encode(&k.salt),
            stored_key: BASE64.encode(&k.stored_key),
            server_key: BASE64.encode(&k.server_key),
        });
        json.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<ScramKeys>, D::Error> {
        let Some(json) = Option::<Json>::deserialize(from)? else {
            return Ok(None);
        };
        let bytes = |text: String| BASE64.decode(text).map_err(D::Error::custom);
        Ok(Some(ScramKeys {
            iterations: json.iterations,
            salt: bytes(json.salt)?,
            stored_key: bytes(json.stored_key)?,
            server_key: bytes(json.server_key)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::SubscriptionRequest;

    #[test]
    fn a_request_is_one_line_and_comes_back_the_same() {
        let keys = Keys {
            sha1: None,
            sha256: Some(ScramKeys {
                iterations: 4096,
                salt: vec![0, 10, 255],
                stored_key: vec![10; 32],
                server_key: vec![13; 32],
            }),
        };
        let request = AdminRequest::UserAdd {
            name: "a\nb".into(),
            keys,
        };
        let line = serde_json::to_string(&request).unwrap();
        assert_eq!(line.lines().count(), 1);
        assert!(
            line.starts_with(r#"{"request":"user-add","name":"a\nb""#),
            "{line}"
        );
        assert_eq!(
            serde_json::from_str::<AdminRequest>(&line).unwrap(),
            request
        );
        for outcome in [Outcome::Added, Outcome::Refused("why".into())] {
            let reply = AdminReply::Imported {
                outcomes: vec![outcome],
            };
            let line = serde_json::to_string(&reply).unwrap();
            assert_eq!(serde_json::from_str::<AdminReply>(&line).unwrap(), reply);
        }
    }

    fn item(jid: &str, label: Option<&str>) -> ImportItem {
        ImportItem {
            jid: jid.into(),
            label: label.map(String::from),
            groups: None,
        }
    }

    #[test]
    fn an_imported_contact_settles_what_was_open_between_the_two() {
        let mut record = UserRecord::default();
        record.put_roster_item(RosterItem {
            jid: "b@x".into(),
            name: "Old".into(),
            groups: vec!["G".into()],
            subscription: Subscription::From,
            ask: true,
            approved: true,
        });
        record.put_request(SubscriptionRequest {
            jid: "b@x".into(),
            stanza: vec![],
        });
        assert_eq!(
            import_roster(&mut record, &[item("b@x", None)], 1),
            Outcome::Replaced
        );
        assert_eq!(
            record.roster,
            [RosterItem {
                jid: "b@x".into(),
                name: "Old".into(),
                groups: vec!["G".into()],
                subscription: Subscription::Both,
                ask: false,
                approved: false,
            }]
        );
        assert!(record.requests.is_empty());
        assert_eq!(record.roster_version, 1);
    }

    #[test]
    fn a_repeated_import_changes_nothing() {
        let mut record = UserRecord::default();
        let items = [item("b@x", Some("B")), item("c@x", None)];
        assert_eq!(import_roster(&mut record, &items, 2), Outcome::Added);
        let once = record.clone();
        assert_eq!(import_roster(&mut record, &items, 2), Outcome::Skipped);
        assert_eq!(record, once);
        assert!(matches!(
            import_roster(&mut record, &[item("d@x", None)], 2),
            Outcome::Refused(_)
        ));
        assert_eq!(record, once);
    }
}
