//! Requests answered from the database, while no nitro runs.
//!
//! In flow the same requests as through the socket, out flow the same replies, with the same sentences. Promise: what is
//! answered as done is durable, and no server runs meanwhile: the data folder's lock is held.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use super::lock::DataLock;
use super::{
    AdminReply, AdminRequest, Existing, ImportRoster, ImportUser, Outcome, UserDetail, UserLine,
    import_roster, import_user,
};
use crate::config::Config;
use crate::store::record::{Record, UserRecord};
use crate::store::sql::admin::{Op, Store};
use crate::store::upload;
use crate::xmpp::feature::upload::Key;

/// The accounts, opened under the lock.
pub struct Direct {
    store: Store,
    roster_items_max: usize,
    /// The folder, and the secret of which owners' names are made, where there are uploads.
    uploads: Option<(PathBuf, [u8; 32])>,
    /// After `store`: the file is closed before the folder is given free.
    _lock: DataLock,
}

impl Direct {
    /// Opens (or makes) the database, and carries over what the journals hold.
    ///
    /// # Errors
    /// A sentence.
    pub fn open(config: &Config, lock: DataLock) -> Result<Direct, String> {
        let secret = std::fs::read(config.data_dir.join("secret"));
        let secret: Option<[u8; 32]> = secret.ok().and_then(|secret| secret.try_into().ok());
        let dir = config.upload_dir();
        let uploads = secret.filter(|_| dir.exists());
        Ok(Direct {
            store: crate::admin::open_store(config)?,
            uploads: uploads.map(|secret| (dir, secret)),
            roster_items_max: config.limits.roster_items_max,
            _lock: lock,
        })
    }

    /// The server removes them when it starts.
    fn forget_uploads(&self, name: &str) -> Result<(), String> {
        let Some((dir, secret)) = &self.uploads else {
            return Ok(());
        };
        upload::mark_gone(dir, Key::new(secret).owner(name), now()).map_err(|error| {
            format!(
                "the account stays, for its files in {} cannot be removed: {error}",
                dir.display()
            )
        })
    }

    /// Carries out one request. Session requests find none.
    pub fn answer(&mut self, request: AdminRequest) -> AdminReply {
        self.try_answer(request).unwrap_or_else(AdminReply::refused)
    }

    fn try_answer(&mut self, request: AdminRequest) -> Result<AdminReply, String> {
        use AdminRequest::*;
        Ok(match request {
            UserAdd { name, keys } => {
                let record = Record::new(&keys.into_record(now()));
                match self.store.add(&name, record)? {
                    true => AdminReply::Done,
                    false => AdminReply::user_exists(&name),
                }
            }
            UserPasswd { name, keys } => self.change(&name, |record| keys.put_into(record))?,
            UserDisable { name } => self.change(&name, |record| record.disabled = true)?,
            UserEnable { name } => self.change(&name, |record| record.disabled = false)?,
            UserRemove { name } => {
                if self.store.show(&name)?.is_none() {
                    return Ok(AdminReply::no_such_user(&name));
                }
                // first, so that no stop leaves files of an account that is no more
                self.forget_uploads(&name)?;
                match self.store.remove(&name)? {
                    true => AdminReply::Done,
                    false => AdminReply::no_such_user(&name),
                }
            }
            UserList {
                prefix,
                after,
                limit,
            } => {
                let listed = self.store.list(&prefix, &after, limit)?.into_iter();
                AdminReply::Users {
                    users: listed
                        .map(|user| UserLine {
                            name: user.name,
                            disabled: user.disabled,
                        })
                        .collect(),
                }
            }
            UserShow { name } => match self.store.show(&name)? {
                None => AdminReply::no_such_user(&name),
                Some(loaded) => AdminReply::User {
                    user: UserDetail {
                        offline_messages: loaded.pending.len() as u64,
                        last_at: loaded.last.map(|last| last.at),
                        ..UserDetail::of(&name, &loaded.record.to_owned())
                    },
                },
            },
            SessionList { .. } => AdminReply::Sessions { sessions: vec![] },
            GroupList | GroupReload | GroupShow { .. } => {
                AdminReply::refused("nitro does not run; see: nitro group check")
            }
            ComponentList => AdminReply::Components { components: vec![] },
            SessionKick { .. } | ComponentKick { .. } => AdminReply::Kicked { sessions: 0 },
            ArchivePurged => AdminReply::Done,
            // `open` has carried all of them over.
            Journals => AdminReply::Journals {
                release: env!("CARGO_PKG_VERSION").into(),
                journals: Vec::new(),
            },
            Figures => AdminReply::Figures {
                figures: Box::default(),
            },
            UsersKnown { names } => {
                let records = self.records(names.iter())?;
                AdminReply::Known {
                    known: records.iter().map(Option::is_some).collect(),
                }
            }
            ImportUsers { existing, users } => self.import_users(existing, users)?,
            ImportRosters { rosters } => self.import_rosters(&rosters)?,
        })
    }

    fn change(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut UserRecord),
    ) -> Result<AdminReply, String> {
        let Some(loaded) = self.store.show(name)? else {
            return Ok(AdminReply::no_such_user(name));
        };
        let mut record = loaded.record.to_owned();
        change(&mut record);
        self.store.put(name, Record::new(&record))?;
        Ok(AdminReply::Done)
    }

    fn records<'a>(
        &mut self,
        names: impl Iterator<Item = &'a String>,
    ) -> Result<Vec<Option<UserRecord>>, String> {
        let names: Vec<&str> = names.map(String::as_str).collect();
        let loaded = self.store.load(&names)?.into_iter();
        Ok(loaded
            .map(|user| user.map(|u| u.record.to_owned()))
            .collect())
    }

    fn import_users(
        &mut self,
        existing: Existing,
        users: Vec<ImportUser>,
    ) -> Result<AdminReply, String> {
        let mut records = self.records(users.iter().map(|u| &u.name))?.into_iter();
        let mut pending = Pending::default();
        for user in users {
            let before = records.next().flatten();
            let is_new = before.is_none();
            let (record, outcome) = import_user(before, user.keys, existing, now());
            let (name, record) = (user.name.into(), record.map(|r| Record::new(&r)));
            let op = record.map(|record| match is_new {
                true => Op::AddUser { name, record },
                false => Op::PutUser { name, record },
            });
            pending.push(op, outcome);
        }
        pending.apply(&mut self.store)
    }

    fn import_rosters(&mut self, rosters: &[ImportRoster]) -> Result<AdminReply, String> {
        let records = self.records(rosters.iter().map(|r| &r.name))?;
        // A user who stands twice in a batch builds on the first change.
        let mut current: HashMap<&str, UserRecord> = HashMap::new();
        let mut pending = Pending::default();
        for (roster, record) in rosters.iter().zip(records) {
            let Some(record) = record else {
                pending.push(None, Outcome::Refused("there is no such user".into()));
                continue;
            };
            let record = current.entry(&roster.name).or_insert(record);
            let outcome = import_roster(record, &roster.items, self.roster_items_max);
            let changed = matches!(outcome, Outcome::Added | Outcome::Replaced);
            let op = changed.then(|| Op::PutUser {
                name: roster.name.as_str().into(),
                record: Record::new(record),
            });
            pending.push(op, outcome);
        }
        pending.apply(&mut self.store)
    }
}

/// Outcomes of a batch and the writes that some of them hang on.
#[derive(Default)]
struct Pending {
    outcomes: Vec<Outcome>,
    ops: Vec<Op>,
    /// For each of `ops`, the place of its outcome.
    places: Vec<usize>,
}

impl Pending {
    fn push(&mut self, op: Option<Op>, outcome: Outcome) {
        if let Some(op) = op {
            self.ops.push(op);
            self.places.push(self.outcomes.len());
        }
        self.outcomes.push(outcome);
    }

    fn apply(mut self, store: &mut Store) -> Result<AdminReply, String> {
        for (place, result) in self.places.iter().zip(store.apply(&self.ops)?) {
            if let Err(error) = result {
                self.outcomes[*place] = Outcome::Refused(error.to_string());
            }
        }
        Ok(AdminReply::Imported {
            outcomes: self.outcomes,
        })
    }
}

/// Unix seconds.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::Keys;
    use super::*;
    use crate::store::record::ScramKeys;

    fn open(dir: &tempfile::TempDir) -> Direct {
        let config = Config {
            data_dir: dir.path().join("data"),
            ..Config::default()
        };
        let lock = DataLock::acquire(&config.data_dir).unwrap();
        Direct::open(&config, lock).unwrap()
    }

    fn keys(byte: u8) -> Keys {
        Keys {
            sha1: Some(ScramKeys {
                iterations: 4096,
                salt: vec![byte; 16],
                stored_key: vec![byte; 20],
                server_key: vec![byte; 20],
            }),
            sha256: None,
        }
    }

    fn refused(reply: AdminReply) -> String {
        match reply {
            AdminReply::Refused { sentence } => sentence,
            other => panic!("{other:?}"),
        }
    }

    fn shown(direct: &mut Direct, name: &str) -> UserDetail {
        match direct.answer(AdminRequest::UserShow { name: name.into() }) {
            AdminReply::User { user } => user,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_account_lives_from_add_to_remove_and_survives_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let name = || "alice".to_string();
        let add = || AdminRequest::UserAdd {
            name: name(),
            keys: keys(1),
        };
        let mut direct = open(&dir);
        assert_eq!(direct.answer(add()), AdminReply::Done);
        assert_eq!(
            refused(direct.answer(add())),
            "there is a user alice already"
        );
        drop(direct);

        let mut direct = open(&dir);
        assert_eq!(shown(&mut direct, "alice").sha1_iterations, Some(4096));
        let passwd = AdminRequest::UserPasswd {
            name: name(),
            keys: Keys {
                sha1: None,
                sha256: keys(2).sha1,
            },
        };
        assert_eq!(direct.answer(passwd), AdminReply::Done);
        // The old password's keys are gone with it.
        assert_eq!(shown(&mut direct, "alice").sha1_iterations, None);
        assert_eq!(
            direct.answer(AdminRequest::UserDisable { name: name() }),
            AdminReply::Done
        );
        assert!(shown(&mut direct, "alice").disabled);
        assert_eq!(
            direct.answer(AdminRequest::UserEnable { name: name() }),
            AdminReply::Done
        );
        assert!(!shown(&mut direct, "alice").disabled);
        assert_eq!(
            direct.answer(AdminRequest::UserRemove { name: name() }),
            AdminReply::Done
        );
        for gone in [
            AdminRequest::UserShow { name: name() },
            AdminRequest::UserRemove { name: name() },
            AdminRequest::UserDisable { name: name() },
            AdminRequest::UserPasswd {
                name: name(),
                keys: keys(1),
            },
        ] {
            assert_eq!(refused(direct.answer(gone)), "there is no user alice");
        }
    }

    #[test]
    fn a_list_is_paged_in_byte_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut direct = open(&dir);
        for name in ["fx-b", "fx-a", "other", "fx-c"] {
            let request = AdminRequest::UserAdd {
                name: name.into(),
                keys: keys(1),
            };
            assert_eq!(direct.answer(request), AdminReply::Done);
        }
        let mut page = |after: &str| match direct.answer(AdminRequest::UserList {
            prefix: "fx-".into(),
            after: after.into(),
            limit: 2,
        }) {
            AdminReply::Users { users } => users.into_iter().map(|u| u.name).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        assert_eq!(page(""), ["fx-a", "fx-b"]);
        assert_eq!(page("fx-b"), ["fx-c"]);
    }

    #[test]
    fn a_user_twice_in_a_batch_harms_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut direct = open(&dir);
        let user = |name: &str, byte| ImportUser {
            name: name.into(),
            keys: keys(byte),
        };
        let reply = direct.answer(AdminRequest::ImportUsers {
            existing: Existing::Error,
            users: vec![user("a", 1), user("a", 2), user("b", 3)],
        });
        let AdminReply::Imported { outcomes } = reply else {
            panic!("{reply:?}")
        };
        assert_eq!(outcomes[0], Outcome::Added);
        assert!(matches!(outcomes[1], Outcome::Refused(_)));
        assert_eq!(outcomes[2], Outcome::Added);
        let known = direct.answer(AdminRequest::UsersKnown {
            names: ["a", "c", "b"].map(String::from).to_vec(),
        });
        assert_eq!(
            known,
            AdminReply::Known {
                known: vec![true, false, true]
            }
        );
    }

    #[test]
    fn an_account_stays_until_it_is_written_down_that_its_files_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let gone = data.join("uploads").join("gone");
        std::fs::create_dir_all(data.join("uploads")).unwrap();
        std::fs::write(data.join("secret"), [1; 32]).unwrap();
        std::fs::write(&gone, "no folder").unwrap();
        let mut direct = open(&dir);
        let add = AdminRequest::UserAdd {
            name: "alice".into(),
            keys: keys(1),
        };
        assert!(matches!(direct.answer(add), AdminReply::Done));
        let mut remove = |name: &str| direct.answer(AdminRequest::UserRemove { name: name.into() });
        let why = refused(remove("alice"));
        assert!(why.contains("the account stays"), "{why}");
        std::fs::remove_file(&gone).unwrap();
        refused(remove("bob"));
        assert!(!gone.exists());
        assert!(matches!(remove("alice"), AdminReply::Done));
        assert_eq!(upload::marks(gone.parent().unwrap()).unwrap().len(), 1);
        refused(remove("alice"));
    }
}
