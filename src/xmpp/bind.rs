//! Resource binding (RFC 6120 section 7): an authenticated connection becomes a session of its user.

use std::rc::Rc;

use super::error::{StanzaError, StreamError};
use super::fast;
use super::feature::{archive, sm};
use super::random_id;
use super::sasl::Failure;
use super::session::{Session, SessionId};
use super::slice::Slice;
use crate::observe::Stamp;
use crate::store::record::ArchivedUserRecord;
use crate::xml::StreamNs;

/// What a connection brings into its session.
pub struct Arrival<'a> {
    /// Local part, authenticated, loaded.
    pub user: &'a str,
    /// What he has authenticated against.
    pub account: Option<fast::Account>,
    /// As the client wishes it, prepared; `None`: the server makes one.
    pub resource: Option<&'a str>,
    pub link: u64,
    pub lang: Option<Box<str>>,
    pub stream_ns: Rc<StreamNs>,
    pub peer: Box<str>,
    pub tls: bool,
}

/// What a client wants enabled together with its binding (XEP-0386).
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// XEP-0198.
    pub sm: Option<sm::Wish>,
    /// XEP-0280.
    pub carbons: bool,
    /// XEP-0352: it begins inactive.
    pub inactive: bool,
    /// It is told which messages its archive has, where that is known without reading (XEP-0386, XEP-0313).
    pub archive: bool,
}

/// What a client is told of its new session.
#[derive(Debug, Default)]
pub struct Answers {
    /// `<enabled/>` or `<failed/>` of stream management, if that was asked for.
    pub enabled: String,
    /// `<metadata/>` of the archive, if that is known.
    pub archive: String,
}

/// Enables what was asked for in a session that has just begun; the answers.
pub fn enable(slice: &mut Slice, sid: SessionId, extras: &Extras) -> Answers {
    if let Some(session) = slice.sessions.get_mut(sid) {
        session.carbons = extras.carbons;
        session.csi.inactive = extras.inactive;
    }
    let name = slice.sessions.get(sid).map(|session| session.user.clone());
    let archive = match name {
        Some(name) if extras.archive => archive::known_ends(slice, &name).unwrap_or_default(),
        _ => String::new(),
    };
    let enabled = match &extras.sm {
        Some(wish) => sm::begin(slice, sid, wish).unwrap_or_default(),
        None => String::new(),
    };
    Answers { enabled, archive }
}

/// Is the account still what the client has authenticated against? Since then it may have been disabled, made anew, or given another
/// password.
pub fn check_account(
    record: &ArchivedUserRecord,
    account: Option<fast::Account>,
) -> Result<(), Failure> {
    if record.disabled {
        Err(Failure::ACCOUNT_DISABLED)
    } else if account != Some(fast::account(record)) {
        Err(Failure::NOT_AUTHORIZED)
    } else {
        Ok(())
    }
}

/// Begins the session. A session that has the resource already ends with `<conflict/>` (RFC 6120 7.7.2.2, case 3).
pub fn bind(slice: &mut Slice, arrival: Arrival<'_>) -> Result<SessionId, StanzaError> {
    let generated;
    let resource = match arrival.resource {
        Some(resource) => resource,
        None => {
            generated = random_id();
            &generated
        }
    };
    let Some(user) = slice.user(arrival.user) else {
        return Err(StanzaError::NOT_AUTHORIZED);
    };
    if check_account(user.record.get(), arrival.account).is_err() {
        return Err(StanzaError::NOT_AUTHORIZED);
    }
    if let Some(old) = slice.find_session(arrival.user, resource) {
        slice.end(
            old,
            Some(StreamError::text(
                "conflict",
                "the resource was bound by another connection",
            )),
        );
    }
    let Some(user) = slice.user(arrival.user) else {
        return Err(StanzaError::NOT_AUTHORIZED);
    };
    if user.sessions.len() >= slice.env.limits.resources_per_user_max {
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("too many sessions of this user"));
    }
    let name = user.name.clone();
    let jid = format!("{name}@{}/{resource}", slice.env.domain).into_boxed_str();
    let now = slice.now;
    let session = |id| Session {
        id,
        user: name.clone(),
        jid,
        lang: arrival.lang,
        stream_ns: arrival.stream_ns,
        out: Vec::new(),
        unsent: 0,
        burst: (0, 0),
        link: Some(arrival.link),
        settling: false,
        unconfirmed: None,
        dirty: false,
        fanned: false,
        interested: false,
        carbons: false,
        blocklist: false,
        presence: None,
        caps: None,
        directed: Default::default(),
        rooms: Default::default(),
        rooms_rate: Default::default(),
        csi: Default::default(),
        paced: None,
        sm: None,
        accept: Default::default(),
        heard_ms: now.ms,
        pinged: false,
        bound: Some(Stamp::at(now.us)),
        since: now.unix,
        peer: arrival.peer,
        tls: arrival.tls,
    };
    slice
        .begin(arrival.user, session)
        .ok_or(StanzaError::NOT_AUTHORIZED)
}
