//! Accounts and sessions of one shard, as `nitro user` and `nitro session` ask. A request runs where its user lives, so the
//! cache is right at once; it is answered when what it changed is durable.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::mpsc::Sender;

use crate::admin::{
    AdminReply, AdminRequest, ComponentLine, Existing, ImportRoster, ImportUser, Outcome,
    SessionLine, UserDetail, import_roster, import_user,
};
use crate::store::record::Record;
use crate::xmpp::component::Conn;
use crate::xmpp::error::StreamError;
use crate::xmpp::feature::{register, roster};
use crate::xmpp::slice::{Op, Slice, Slot, Then, WriteError};

/// A request for this shard alone, and where its answer goes.
pub struct Call {
    pub request: AdminRequest,
    pub reply: Sender<AdminReply>,
}

/// Takes a request whose users (if it names any) all live in this slice.
pub fn call(slice: &mut Slice, call: Call) {
    use AdminRequest::*;
    let reply = call.reply;
    match call.request {
        UserAdd { name, keys } => with(slice, name, reply, |slice, name, reply| {
            if slice.user(&name).is_some() {
                return answer(&reply, AdminReply::user_exists(&name));
            }
            let record = Record::new(&keys.into_record(slice.now.unix));
            let who = name.clone();
            add(
                slice,
                &name,
                record,
                Box::new(move |_, result| answer(&reply, done(&who, result))),
            );
        }),
        UserPasswd { name, keys } => with(slice, name, reply, |slice, name, reply| {
            let who = name.clone();
            let then: Then = Box::new(move |_, result| answer(&reply, done(&who, result)));
            slice.edit(&name, |record| keys.put_into(record), then);
        }),
        UserDisable { name } => with(slice, name, reply, |slice, name, reply| {
            let who = name.clone();
            let then: Then = Box::new(move |slice, result| {
                if result.is_ok() {
                    end_sessions(
                        slice,
                        &who,
                        None,
                        &StreamError::text("not-authorized", "the account is disabled"),
                    );
                }
                answer(&reply, done(&who, result));
            });
            slice.edit(&name, |record| record.disabled = true, then);
        }),
        UserEnable { name } => with(slice, name, reply, |slice, name, reply| {
            let who = name.clone();
            let then: Then = Box::new(move |_, result| answer(&reply, done(&who, result)));
            slice.edit(&name, |record| record.disabled = false, then);
        }),
        UserRemove { name } => with(slice, name, reply, |slice, name, reply| {
            let who = name.clone();
            register::remove_account(
                slice,
                &name,
                Box::new(move |_, result| answer(&reply, done(&who, result))),
            );
        }),
        UserShow { name } => with(slice, name, reply, |slice, name, reply| {
            let shown = slice.user(&name).map(|user| UserDetail {
                offline_messages: user.offline.len() as u64,
                last_at: user.last.as_ref().map(|last| last.at),
                sessions: Some(user.sessions.len()),
                ..UserDetail::of(&name, &user.record.to_owned())
            });
            answer(
                &reply,
                match shown {
                    Some(user) => AdminReply::User { user },
                    None => AdminReply::no_such_user(&name),
                },
            );
        }),
        SessionKick { name, resource } => {
            let error = StreamError::text("policy-violation", "ended by an operator");
            let sessions = end_sessions(slice, &name, resource.as_deref(), &error);
            answer(&reply, AdminReply::Kicked { sessions });
        }
        SessionList { name, after, limit } => {
            let mut sessions: Vec<SessionLine> = slice
                .sessions
                .iter()
                .filter(|s| name.as_deref().is_none_or(|name| &*s.user == name) && *s.jid > *after)
                .map(|s| SessionLine {
                    jid: s.jid.to_string(),
                    address: s.peer.to_string(),
                    since: s.since,
                    tls: s.tls,
                    shard: slice.env.shard as usize,
                    priority: s.presence.as_ref().map(|p| p.priority),
                    parked: s.link.is_none(),
                })
                .collect();
            sessions.sort_unstable_by(|a, b| a.jid.cmp(&b.jid));
            sessions.truncate(limit);
            answer(&reply, AdminReply::Sessions { sessions });
        }
        ArchivePurged => {
            slice.recent.clear();
            answer(&reply, AdminReply::Done);
        }
        ComponentList => {
            let conns = slice.components.conns().filter(|conn| conn.up);
            let line = |conn: &Conn| ComponentLine {
                host: conn.host.to_string(),
                address: conn.peer.to_string(),
                since: conn.since,
                shard: slice.env.shard as usize,
                stanzas_in: conn.stanzas_in,
                stanzas_out: conn.stanzas_out,
                waiting_bytes: conn.waiting() as u64,
            };
            let components = conns.map(line).collect();
            answer(&reply, AdminReply::Components { components });
        }
        ComponentKick { host } => {
            let error = StreamError::text("policy-violation", "ended by an operator");
            let sessions = slice.component_kick(&host, &error);
            answer(&reply, AdminReply::Kicked { sessions });
        }
        ImportUsers { existing, users } => import_users(slice, existing, users, reply),
        ImportRosters { rosters } => import_rosters(slice, rosters, reply),
        UserList { .. }
        | UsersKnown { .. }
        | Journals
        | Figures
        | GroupList
        | GroupReload
        | GroupShow { .. } => answer(&reply, AdminReply::refused("this request is not a shard's")),
    }
}

/// Nobody may be waiting any more.
fn answer(reply: &Sender<AdminReply>, with: AdminReply) {
    let _ = reply.send(with);
}

/// The same sentences as when nitro does not run.
fn done(name: &str, result: Result<(), WriteError>) -> AdminReply {
    match result {
        Ok(()) => AdminReply::Done,
        Err(WriteError::Missing) => AdminReply::no_such_user(name),
        Err(WriteError::Conflict) => AdminReply::user_exists(name),
        Err(error) => AdminReply::refused(error.to_string()),
    }
}

/// Runs `then` when the user is known; refuses if he is not there, except for an addition.
fn with(
    slice: &mut Slice,
    name: String,
    reply: Sender<AdminReply>,
    then: impl FnOnce(&mut Slice, String, Sender<AdminReply>) + 'static,
) {
    let who = name.clone();
    slice.when_known(&who, Box::new(move |slice| then(slice, name, reply)));
}

/// Adds an account whose name is known to be free.
fn add(slice: &mut Slice, name: &str, record: Record, then: Then) {
    slice.write(name, Op::AddUser { record }, then);
}

fn end_sessions(
    slice: &mut Slice,
    name: &str,
    resource: Option<&str>,
    error: &StreamError,
) -> usize {
    let mut ended = 0;
    for sid in slice.sessions_of(name) {
        let wanted = slice
            .sessions
            .get(sid)
            .is_some_and(|s| resource.is_none_or(|r| s.resource() == r));
        if wanted {
            slice.end(sid, Some(error.clone()));
            ended += 1;
        }
    }
    ended
}

/// Outcomes of a batch: the last one to come sends the answer.
struct Batch {
    outcomes: Vec<Outcome>,
    open: usize,
    reply: Sender<AdminReply>,
}

impl Batch {
    fn new(entries: usize, reply: Sender<AdminReply>) -> Rc<RefCell<Batch>> {
        let batch = Batch {
            outcomes: vec![Outcome::Skipped; entries],
            open: entries,
            reply,
        };
        if entries == 0 {
            answer(
                &batch.reply,
                AdminReply::Imported {
                    outcomes: Vec::new(),
                },
            );
        }
        Rc::new(RefCell::new(batch))
    }

    fn set(&mut self, at: usize, outcome: Outcome) {
        self.outcomes[at] = outcome;
        self.open -= 1;
        if self.open == 0 {
            answer(
                &self.reply,
                AdminReply::Imported {
                    outcomes: std::mem::take(&mut self.outcomes),
                },
            );
        }
    }
}

fn written(outcome: Outcome, result: Result<(), WriteError>) -> Outcome {
    match result {
        Ok(()) => outcome,
        Err(error) => Outcome::Refused(error.to_string()),
    }
}

fn import_users(
    slice: &mut Slice,
    existing: Existing,
    users: Vec<ImportUser>,
    reply: Sender<AdminReply>,
) {
    let batch = Batch::new(users.len(), reply);
    for (at, user) in users.into_iter().enumerate() {
        let batch = batch.clone();
        let name = user.name;
        let who = name.clone();
        slice.when_known(
            &who,
            Box::new(move |slice| {
                let old = slice.user(&name).map(|user| user.record.to_owned());
                if old.is_none() && !matches!(slice.users.peek(&name), Some(Slot::Missing)) {
                    return batch
                        .borrow_mut()
                        .set(at, Outcome::Refused("the database does not answer".into()));
                }
                let is_new = old.is_none();
                let (record, outcome) = import_user(old, user.keys, existing, slice.now.unix);
                let Some(record) = record else {
                    return batch.borrow_mut().set(at, outcome);
                };
                let then: Then =
                    Box::new(move |_, result| batch.borrow_mut().set(at, written(outcome, result)));
                match is_new {
                    true => add(slice, &name, Record::new(&record), then),
                    false => {
                        slice.edit(&name, |old| *old = record, then);
                    }
                }
            }),
        );
    }
}

fn import_rosters(slice: &mut Slice, rosters: Vec<ImportRoster>, reply: Sender<AdminReply>) {
    let batch = Batch::new(rosters.len(), reply);
    let most = slice.env.limits.roster_items_max;
    for (at, entry) in rosters.into_iter().enumerate() {
        let batch = batch.clone();
        let who = entry.name.clone();
        slice.when_known(
            &who,
            Box::new(move |slice| {
                let Some(user) = slice.user(&entry.name) else {
                    return batch
                        .borrow_mut()
                        .set(at, Outcome::Refused("there is no such user".into()));
                };
                let mut record = user.record.to_owned();
                let outcome = import_roster(&mut record, &entry.items, most);
                if !matches!(outcome, Outcome::Added | Outcome::Replaced) {
                    return batch.borrow_mut().set(at, outcome);
                }
                let name = entry.name.clone();
                let then: Then = Box::new(move |slice, result| {
                    if result.is_ok() {
                        for item in &entry.items {
                            roster::push_item(slice, &entry.name, &item.jid);
                        }
                    }
                    batch.borrow_mut().set(at, written(outcome, result));
                });
                slice.edit(&name, |old| *old = record, then);
            }),
        );
    }
}
