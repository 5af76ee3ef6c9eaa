//! The table of features: one file, one row. Disco, dispatch, stream features and the README's table of specifications all
//! come from [`FEATURES`], so that they cannot disagree.

pub mod archive;
pub mod archive_prefs;
pub mod avatar;
pub mod blocking;
pub mod bookmarks;
pub mod caps;
pub mod carbons;
pub mod csi;
pub mod disco;
pub mod displayed;
pub mod hints;
pub mod last;
pub mod legacy_session;
pub mod moderation;
pub mod occupant_id;
pub mod offline;
pub mod omemo;
pub mod pep;
pub mod ping;
pub mod presence;
pub mod private;
pub mod private_nodes;
pub mod profile;
pub mod push;
pub mod register;
pub mod retract;
pub mod rooms;
pub mod roster;
pub mod rsm;
pub mod self_ping;
pub mod sm;
pub mod stable_id;
pub mod subscription;
pub mod table;
pub mod time;
pub mod upload;
pub mod vcard;
pub mod vcard4;
pub mod version;

use std::rc::Rc;

use super::error::{StanzaError, StreamError};
pub use super::iq::Iq;
use super::jid::Jid;
use super::meta::Meta;
use super::pubsub::config::Config;
use super::session::{Session, SessionId};
use super::slice::{Env, Slice};
use crate::xml::view::View;

/// One row: what a feature adds to the server.
pub struct Feature {
    /// As people call it.
    pub name: &'static str,
    /// "RFC 6121 2", "XEP-0280": the specification; version as implemented ("" for an RFC).
    pub spec: &'static str,
    pub version: &'static str,
    /// Disco features of the server's domain.
    pub server: &'static [&'static str],
    /// Disco features of an account's bare JID.
    pub account: &'static [&'static str],
    /// Elements in `<stream:features/>` after authentication.
    pub stream: Option<fn(&Env) -> String>,
    /// Is it announced by service discovery? The configuration may say no.
    pub on: fn(&Env) -> bool,
    pub iq: &'static [IqRoute],
    pub nonza: &'static [NonzaRoute],
    /// Nodes of an account whose configuration is not the usual one ([`pep::default_config`]).
    pub nodes: &'static [NodeRule],
    /// A client's message leaves, before it is journalled and routed; may refuse it.
    pub message_out: Option<MessageOut>,
    /// A user's message has left for good: it is in his archive, if it is to be in one.
    pub message_sent: Option<MessageSent>,
    /// May a stanza of any kind come in to a user? Runs at the recipient's owner.
    pub admit: Option<Admit>,
    /// A message was delivered to (or stored for) a user of this slice; the sessions that have got it.
    pub message_in: Option<MessageIn>,
    /// A session sent its initial presence (RFC 6121 4.2), or left negative priorities; after the broadcast.
    pub available: Option<Available>,
    /// A session ended for good; it is out of the tables already.
    pub ended: Option<Ended>,
}

pub type MessageOut = fn(&mut Slice, SessionId, &Outgoing<'_>) -> Result<(), StanzaError>;
pub type MessageSent = fn(&mut Slice, user: &str, SessionId, &Outgoing<'_>);
pub type Admit = fn(&Slice, user: &str, from: &Jid<'_>, meta: Meta) -> Result<(), Refusal>;
pub type MessageIn = fn(&mut Slice, user: &str, message: &Incoming<'_>, taken: &[SessionId]);
pub type Available = fn(&mut Slice, SessionId);
pub type Ended = fn(&mut Slice, &mut Session);
pub type NonzaHandler = fn(&mut Slice, SessionId, &View<'_>) -> Result<(), StreamError>;

/// Nothing; rows name what they have.
pub const NONE: Feature = Feature {
    name: "",
    spec: "",
    version: "",
    server: &[],
    account: &[],
    stream: None,
    on: |_| true,
    iq: &[],
    nonza: &[],
    nodes: &[],
    message_out: None,
    message_sent: None,
    admit: None,
    message_in: None,
    available: None,
    ended: None,
};

/// A message on its way out of its sender's owner.
pub struct Outgoing<'a> {
    pub to: &'a Jid<'a>,
    /// Full JID of the sender.
    pub from: &'a str,
    /// As the recipient will get it.
    pub stanza: &'a [u8],
    pub meta: Meta,
}

/// A message at its recipient's owner.
pub struct Incoming<'a> {
    pub to: &'a Jid<'a>,
    pub from: &'a str,
    pub stanza: &'a [u8],
    pub meta: Meta,
}

/// How a stanza is kept out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    Silent,
    Error(StanzaError),
}

/// To whom an IQ request is addressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The server's domain.
    Server,
    /// A bare JID of this slice, handled on behalf of its user; requests without `to` are the sender's own account.
    Account,
    /// Either.
    Both,
}

pub struct IqRoute {
    pub name: &'static str,
    pub ns: &'static str,
    pub target: Target,
    pub handle: fn(&mut Slice, Iq),
}

pub struct NonzaRoute {
    pub name: &'static str,
    pub ns: &'static str,
    pub handle: NonzaHandler,
}

/// What a node has when nobody says otherwise.
pub struct NodeRule {
    /// The node; with `*` at the end: all that begin so.
    pub name: &'static str,
    pub config: fn() -> Config,
}

macro_rules! features {
    ($($file:ident)*) => {
        /// All that nitro speaks beside the core of streams and stanzas.
        pub static FEATURES: &[&Feature] = &[$(&$file::FEATURE),*];
        /// The name of each row's file.
        pub static FILES: &[&str] = &[$(stringify!($file)),*];
    };
}

features! {
    disco roster subscription presence blocking carbons offline archive archive_prefs retract rsm stable_id hints sm csi ping caps pep
    private_nodes avatar vcard vcard4 profile bookmarks displayed omemo private push upload register last time version legacy_session rooms
    occupant_id self_ping moderation
}

/// The rows' hooks, collected once, so that a message only meets those that exist.
#[derive(Clone)]
pub struct Hooks {
    pub iq: Rc<[&'static IqRoute]>,
    nonzas: Rc<[&'static NonzaRoute]>,
    pub message_out: Rc<[MessageOut]>,
    pub message_sent: Rc<[MessageSent]>,
    pub admit: Rc<[Admit]>,
    pub message_in: Rc<[MessageIn]>,
    pub available: Rc<[Available]>,
    pub ended: Rc<[Ended]>,
}

impl Hooks {
    pub fn collect() -> Hooks {
        Hooks {
            iq: FEATURES.iter().flat_map(|f| f.iq).collect(),
            nonzas: FEATURES.iter().flat_map(|f| f.nonza).collect(),
            message_out: FEATURES.iter().filter_map(|f| f.message_out).collect(),
            message_sent: FEATURES.iter().filter_map(|f| f.message_sent).collect(),
            admit: FEATURES.iter().filter_map(|f| f.admit).collect(),
            message_in: FEATURES.iter().filter_map(|f| f.message_in).collect(),
            available: FEATURES.iter().filter_map(|f| f.available).collect(),
            ended: FEATURES.iter().filter_map(|f| f.ended).collect(),
        }
    }

    /// May the stanza come in to the user?
    pub fn admission(
        &self,
        slice: &Slice,
        user: &str,
        from: &Jid<'_>,
        meta: Meta,
    ) -> Result<(), Refusal> {
        self.admit
            .iter()
            .try_for_each(|admit| admit(slice, user, from, meta))
    }

    pub fn nonza(&self, name: &str, ns: &str) -> Option<NonzaHandler> {
        self.nonzas
            .iter()
            .find(|r| r.name == name && r.ns == ns)
            .map(|r| r.handle)
    }
}
