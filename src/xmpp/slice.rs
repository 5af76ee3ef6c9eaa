//! One core's slice of users: their records, sessions and queues, and all that happens to them.
//!
//! Sans-IO: elements of clients, batches of other shards, answers of the tiers and the clock flow in; output per session,
//! batches per shard and requests to the tiers flow out by [`Effects`], which the shard carries out at the end of each turn.
//! Everything here is one core's: no lock, no sharing. Promise: what is taken in is delivered, stored, forwarded or
//! answered by an error, and the order between two full JIDs is kept.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use fnv::FnvHashMap;
use smallvec::SmallVec;

use super::accept::Acceptance;
use super::batch::{Batch, Item, Receipt};
use super::component::{self, Components, Host};
use super::error::{StanzaError, StreamError};
use super::feature::offline::Offline;
use super::feature::sm::Kept;
use super::feature::{self, Hooks, Refusal, presence, retract, stable_id};
use super::groups::Groups;
use super::jid::Jid;
use super::ledger::{Act, Acts, Entry, Ledger, Marked};
use super::meta::{Kind, Meta};
use super::pace::Pace;
use super::regroup::Regrouping;
use super::sasl::{self, PasswordCheck, SaslError, ScramKeys};
use super::session::{Session, SessionId, Sessions};
use super::warmth::{Behind, Waits, Warmth};
use super::{NS_CLIENT, iq, message, room};
use crate::observe::{Stage, Stamp, Stamps, record};
use crate::store::cache::Cache;
use crate::store::change::{ArchivedChange, ArchivedMessage, Change, Id, Message, StreamCount};
use crate::store::journal::{Group, Place, Slot as GroupSlot};
use crate::store::overlay::{Item as Undrained, Overlay, Position, ReadBack};
use crate::store::recent::Recent;
use crate::store::record::{Record, UserRecord};
use crate::store::recovery::{Found, stream_key};
use crate::store::ring::Ring;
use crate::store::tier::{
    Answer, ArchiveQuery, Entry as ArchiveEntry, Last, Loaded, Page, Query, ReadError, Request,
    StoredRoom, Ticket,
};
use crate::store::warm::INDEX_KEY;
use crate::xml;
use crate::xml::dom::Element;
use crate::xml::view::View;

/// What a slice knows of its surroundings; fixed from start to stop.
pub struct Env {
    pub domain: Box<str>,
    /// Domain of the chat rooms; `None`: there are none.
    pub rooms: Option<Box<str>>,
    /// Domain of the service of uploads, and the key of its slots; `None`: there is none.
    pub upload: Option<Box<str>>,
    pub upload_key: Option<feature::upload::Key>,
    pub shard: u16,
    pub ring: Rc<Ring>,
    pub limits: Limits,
    /// Key of the permutation that makes stable ids (XEP-0359).
    pub id_key: [u64; 2],
    /// Key of what clients are given at their login (XEP-0386: resources).
    pub login_key: [u8; 32],
    /// See [`Env::stream_features`].
    pub features: OnceCell<Box<str>>,
}

impl Env {
    /// What the table of features adds to `<stream:features/>` after authentication.
    pub fn stream_features(&self) -> &str {
        self.features.get_or_init(|| {
            feature::FEATURES
                .iter()
                .filter_map(|f| f.stream)
                .map(|f| f(self))
                .collect()
        })
    }

    /// The shard that owns the user.
    pub fn owner(&self, name: &str) -> u16 {
        self.ring.owner(name) as u16
    }

    /// Is it a user or the server of this blade?
    pub fn is_local(&self, jid: &Jid<'_>) -> bool {
        jid.domain() == &*self.domain
    }

    /// The user of this blade whose bare JID this is.
    pub fn local_part<'j>(&self, bare: &'j str) -> Option<&'j str> {
        bare.strip_suffix(&*self.domain)?.strip_suffix('@')
    }

    /// Is it a chat room of this blade, somebody in it, or the service itself?
    pub fn is_room(&self, jid: &Jid<'_>) -> bool {
        self.rooms.as_deref() == Some(jid.domain())
    }

    /// Is it the service of uploads?
    pub fn is_upload(&self, jid: &Jid<'_>) -> bool {
        self.upload.as_deref() == Some(jid.domain()) && jid.local().is_none()
    }

    /// Under which name the store and the shards know it: a user by the local part, a room as `NAME@rooms`.
    pub fn entity<'j>(&self, jid: &'j Jid<'_>) -> Option<Cow<'j, str>> {
        let local = jid.local()?;
        match self.is_room(jid) {
            true => Some(Cow::Owned(room::entity(local))),
            false => Some(Cow::Borrowed(local)),
        }
    }
}

/// Bounds on everything a client can grow (design section 7); from the configuration.
#[derive(Clone, Debug)]
pub struct Limits {
    pub xml: xml::Limits,
    pub resources_per_user_max: usize,
    pub roster_items_max: usize,
    pub roster_item_bytes_max: usize,
    pub blocked_max: usize,
    pub subscription_requests_max: usize,
    pub directed_presence_max: usize,
    /// Of one user's record: it must fit into a journal's segment.
    pub record_bytes_max: usize,
    pub send_queue_bytes_max: usize,
    pub deferred_stanzas_max: usize,
    pub offline_messages_max: usize,
    pub offline_bytes_max: usize,
    pub private_bytes_max: usize,
    pub vcard_bytes_max: usize,
    /// Bytes that wait for one user to be loaded.
    pub load_queue_bytes_max: usize,
    /// Bytes that wait for one other shard.
    pub mesh_backlog_bytes_max: usize,
    pub unacked_bytes_max: usize,
    pub unacked_stanzas_max: usize,
    pub resume_ms_max: u64,
    pub parked_max: usize,
    pub ping_idle_ms: u64,
    pub ping_timeout_ms: u64,
    pub registration: bool,
    pub iterations: u32,
    /// Entries in one answer of an archive.
    pub archive_page_max: u32,
    /// Addresses in both lists of one user's preferences of archiving.
    pub archive_prefs_max: usize,
    /// How long messages stay in users' archives; 0: for ever.
    pub archive_keep_ms: u64,
    /// Of the newest entries of archives that are kept in memory.
    pub archive_recent_bytes_max: usize,
    /// Nodes of one user.
    pub pubsub: super::pubsub::edit::Bounds,
    /// Items of a node in one answer.
    pub pubsub_page_items_max: usize,
    /// What waits to be read of contacts' nodes for those who have come.
    pub pep_waiting_max: usize,
    /// Members of a shared group that tell each other their last items at arrival.
    pub group_greetings_members_max: usize,
    /// Capabilities of clients that are remembered.
    pub caps_remembered_max: usize,
    pub rooms: room::Limits,
    pub push: feature::push::Limits,
    pub upload: feature::upload::Limits,
}

/// The clock, as the shard read it at the start of the turn.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// Monotonic milliseconds.
    pub ms: u64,
    /// The same, in microseconds: for what is measured.
    pub us: u64,
    /// Unix time in seconds.
    pub unix: u64,
    /// Unix time in milliseconds.
    pub unix_ms: u64,
}

/// A user of this slice, loaded.
pub struct User {
    pub name: Rc<str>,
    pub record: Record,
    /// Of the record; see [`Id`].
    pub revision: u64,
    /// Of the newest record that is durable.
    pub durable: u64,
    /// Bound resources, those that wait for resumption included.
    pub sessions: SmallVec<[SessionId; 2]>,
    /// Deliveries that nobody holds: for the next resource that becomes available (XEP-0160) and for those that are.
    pub offline: Offline,
    /// Deliveries that sessions hold, and how many do; ids ascend.
    pub held: Vec<(u64, u16)>,
    /// Of the last session, until the end of its connection, or until another one begins.
    left: Option<Box<Left>>,
    /// The last log-out (XEP-0012).
    pub last: Option<Last>,
    /// What Redis says of messages that wait for him.
    pub waits: Waits,
    /// The index of his nodes as stored ([`feature::pep`]), once it was needed; empty: he has none.
    pub pep: Option<Rc<feature::pep::Index>>,
}

impl User {
    fn new(name: &str, loaded: Loaded, offline: Offline) -> User {
        User {
            name: name.into(),
            record: loaded.record,
            revision: loaded.revision,
            durable: loaded.revision,
            sessions: SmallVec::new(),
            offline,
            held: Vec::new(),
            left: None,
            last: loaded.last,
            waits: Waits::default(),
            pep: loaded.index.map(feature::pep::Index::new),
        }
    }
}

/// What the slice's table holds under a name.
pub enum Slot {
    /// Asked for; what came meanwhile waits in order.
    Loading {
        queue: Vec<Queued>,
        bytes: usize,
    },
    /// No such user; remembered like a user, so that the two cost the same.
    Missing,
    Present(Box<User>),
    /// No user: a chat room. `None` while it is at work.
    Room(Option<Box<room::Room>>),
}

impl Slot {
    /// Is it known who he is, or that he is not?
    pub fn is_known(&self) -> bool {
        !matches!(self, Slot::Loading { .. })
    }
}

/// What waits for a user to be loaded.
pub enum Queued {
    Stanza(Waiting),
    Call(Call),
}

impl Queued {
    /// Part of a change that is made at the other side already (see [`Slice::forward`]): it must not be refused.
    fn is_journalled(&self) -> bool {
        match self {
            Queued::Stanza(waiting) => is_forwarded(waiting.meta, waiting.receipt),
            Queued::Call(_) => false,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Queued::Stanza(waiting) => waiting.stanza.len(),
            Queued::Call(_) => 0,
        }
    }
}

/// Is it a stanza of [`Slice::forward`], which waits in its sender's journal until it is settled?
fn is_forwarded(meta: Meta, receipt: Option<Receipt>) -> bool {
    !meta.storable() && receipt.is_some_and(|receipt| receipt.twin != 0)
}

/// Runs when a user is known: present or missing (or, when the tier cannot say, neither).
pub type Call = Box<dyn FnOnce(&mut Slice)>;

/// A stanza that waits for its recipient to be loaded.
pub struct Waiting {
    pub to: Box<str>,
    pub from: Box<str>,
    pub stanza: Box<[u8]>,
    pub meta: Meta,
    pub receipt: Option<Receipt>,
}

/// Is the fate of a stanza decided?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    Decided,
    /// Somebody will settle its receipt.
    Open,
}

/// A connection that ends: these bytes, then close.
pub struct Closing {
    pub link: u64,
    pub bytes: Vec<u8>,
    /// Messages for this user are on their way on it: what becomes of them is to be told to [`Slice::left`].
    pub left: Option<Rc<str>>,
}

impl Closing {
    pub fn new(link: u64, bytes: Vec<u8>) -> Closing {
        Closing {
            link,
            bytes,
            left: None,
        }
    }
}

/// What a session without stream management may not have had when its client ended it: its connection can still bring it.
pub struct Left {
    link: u64,
    kept: Kept,
}

/// What the shard has to carry out.
#[derive(Default)]
pub struct Effects {
    /// Sessions whose output goes to their clients in this turn.
    pub dirty: Vec<SessionId>,
    /// Sessions that only have to be told what many are told: their output goes when the turn has time for it
    /// ([`Slice::next_fanned`]), behind that of [`Effects::dirty`].
    pub fanned: VecDeque<SessionId>,
    pub closing: Vec<Closing>,
    pub requests: Vec<Request>,
    /// The same, of users of whom the Redis ring does not know enough.
    pub behind: Vec<Request>,
    /// One batch per shard.
    pub mesh: Vec<Batch>,
    /// Shards for which too much waits: stanzas for them are refused.
    pub closed: Vec<bool>,
    /// For the helper threads; answered by [`Slice::computed`].
    pub jobs: Vec<(Ticket, Job)>,
    /// For those who keep the folder of uploads; answered by [`Slice::slot_reserved`].
    pub slots: Vec<feature::upload::Ask>,
    /// Accounts that were removed, and when (unix seconds); for the same.
    pub uploads_gone: Vec<(crate::store::upload::Owner, u64)>,
    /// Users whose loading has ended: logins may wait for them.
    pub loaded: Vec<Rc<str>>,
    /// Sessions without stream management that were given messages: [`Slice::confirmed`] when their peer has all.
    pub unconfirmed: Vec<SessionId>,
    /// Sent messages below this are settled for good.
    pub floor: u64,
    /// When those messages were read that go out at the end of this turn.
    pub delivered: Stamps,
    /// Sessions that have more to get than a slow reader may have.
    overflown: Vec<SessionId>,
}

impl Effects {
    /// The connection hears `error` and ends.
    pub fn close(&mut self, link: u64, error: &StreamError) {
        let mut bytes = Vec::new();
        error.write(&mut bytes);
        self.closing.push(Closing::new(link, bytes));
    }

    /// A message goes to sessions.
    pub fn delivered(&mut self, meta: Meta) {
        if let Some(read) = meta.read {
            self.delivered.push(read);
        }
    }
}

/// A change of a user's data.
#[derive(Debug, Clone)]
pub enum Op {
    /// Fails with [`WriteError::Conflict`] if there is such a user.
    AddUser {
        record: Record,
    },
    /// The account with all that belongs to it.
    RemoveUser,
    /// `key` is "vcard", "private:NAMESPACE NAME", ...; `None` removes.
    PutDocument {
        key: Box<str>,
        value: Option<Box<[u8]>>,
    },
    PutLast {
        last: Last,
    },
}

impl From<WriteError> for StanzaError {
    fn from(error: WriteError) -> StanzaError {
        match error {
            WriteError::Full | WriteError::Unavailable => StanzaError::RESOURCE_CONSTRAINT,
            WriteError::TooLarge => StanzaError::POLICY_VIOLATION,
            WriteError::Conflict => StanzaError::CONFLICT,
            WriteError::Missing => StanzaError::ITEM_NOT_FOUND,
        }
    }
}

/// Why a change is not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("the user exists already")]
    Conflict,
    #[error("there is no such user")]
    Missing,
    #[error("the journal is full: the database takes nothing, or the disk has no space left")]
    Full,
    #[error("the account with its roster is too large: journal.segment_bytes is its bound")]
    TooLarge,
    #[error("the database is not available")]
    Unavailable,
}

/// What goes on when a write is durable, or has failed.
pub type Then = Box<dyn FnOnce(&mut Slice, Result<(), WriteError>)>;

/// What goes on when a document was read; `Err`: the tier cannot say.
pub type ThenRead = Box<dyn FnOnce(&mut Slice, Result<Option<Box<[u8]>>, ReadError>)>;

/// Slow computing that a shard gives away to a helper thread.
pub enum Job {
    /// The keys of a new password.
    Derive { password: String, iterations: u32 },
    /// Is it the password of these keys?
    Check(PasswordCheck),
}

/// What came of a [`Job`].
pub enum Computed {
    /// SHA-1 and SHA-256.
    Keys(Result<(ScramKeys, ScramKeys), SaslError>),
    Checked(bool),
    /// The helpers have too much to do: try again later.
    Busy,
}

impl Job {
    pub fn run(self) -> Computed {
        match self {
            Job::Check(check) => Computed::Checked(check.run()),
            Job::Derive {
                password,
                iterations,
            } => Computed::Keys(sasl::new_keys(&password, iterations)),
        }
    }
}

pub type ThenComputed = Box<dyn FnOnce(&mut Slice, Computed)>;

/// What goes on when a page of an archive was read.
pub type ThenPage = Box<dyn FnOnce(&mut Slice, Result<Page, ReadError>)>;

/// What goes on when rooms were read.
pub type ThenRooms = Box<dyn FnOnce(&mut Slice, Result<Vec<StoredRoom>, ReadError>)>;

enum Wait {
    Read(ThenRead),
    /// With how often it may be asked again.
    Page(Box<ArchiveQuery>, u8, ThenPage),
    /// What of the page was retracted, asked by these keys; the number is [`Recent::settle`]'s.
    Retractions(Box<(ArchiveQuery, Page, Box<[i64]>)>, u64, ThenPage),
    Compute(ThenComputed),
    Rooms(ThenRooms),
}

/// Counters of one slice; read by whoever renders metrics.
#[derive(Default, Debug, Clone)]
pub struct Counters {
    pub messages_in: u64,
    pub messages_delivered: u64,
    pub messages_offline: u64,
    pub presences_in: u64,
    pub iqs_in: u64,
    pub bounces: u64,
    pub binds: u64,
    pub disconnects: u64,
    pub resumptions: u64,
    pub overflows: u64,
    pub load_queue_full: u64,
    pub mesh_refused: u64,
    pub journal_refused: u64,
    /// Halves of changes that had to wait for room in the journal.
    pub journal_waited: u64,
    /// Notifications of nodes (XEP-0163).
    pub pep_sent: u64,
    /// Greetings left out because too many waited.
    pub pep_dropped: u64,
    /// Messages that rooms took, what came of them and of presence at occupants, and what was refused by a limit of rooms.
    pub room_messages: u64,
    pub room_deliveries: u64,
    pub room_refused: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Idle,
    Resume,
}

pub struct Slice {
    pub env: Env,
    pub now: Now,
    pub users: Cache<Slot>,
    pub sessions: Sessions,
    pub fx: Effects,
    pub pace: Pace,
    pub counters: Counters,
    pub hooks: Hooks,
    /// The inbound stanza at work, when its session has stream management.
    pub current: Option<Receipt>,
    pub parked: usize,
    pub ledger: Ledger,
    pub overlay: Overlay,
    /// The newest entries of archives that somebody reads.
    pub recent: Recent,
    pub warmth: Warmth,
    pub components: Components,
    /// An administrator's groups: the same for all shards.
    pub groups: Arc<Groups>,
    pub regrouping: Regrouping,
    /// Sessions that have ended while stanzas of theirs were not decided: `<failed/>` waits for that.
    ended: FnvHashMap<SessionId, Ended>,
    /// How many stanzas of streams that are no more were durable (XEP-0198 section 5), and until when it is known.
    counts: FnvHashMap<Box<str>, (u32, u64)>,
    /// Halves of changes that are durable at the other side already: they wait until the journal has room.
    halves: Vec<Waiting>,
    /// Stanzas of [`Slice::forward`] that are not settled, and their bytes together.
    forwards: FnvHashMap<u64, usize>,
    forwarded_bytes: usize,
    /// Users whom the tier could not load and for whom messages wait: when to ask again.
    reload: Vec<(u64, Rc<str>)>,
    /// Changes of private storage at work.
    pub(super) private: feature::private::Changes,
    pub(super) passwords: feature::register::Changes,
    /// Queries of archives at work.
    pub(super) archive: feature::archive::Queries,
    /// Changes of nodes at work.
    pub pep: feature::pep::Pep,
    /// What is known of clients' capabilities.
    pub caps: feature::caps::Known,
    pub rooms: room::Rooms,
    /// Push notifications at work.
    pub push: feature::push::Push,
    /// Requests for slots at work.
    pub uploads: feature::upload::Uploads,
    waits: FnvHashMap<Ticket, (Rc<str>, Wait)>,
    /// How often users were asked for again; see [`AGAIN_MAX`].
    again: FnvHashMap<Box<str>, u8>,
    ticket: Ticket,
    timers: BinaryHeap<Reverse<(u64, u32, u32, Timer)>>,
    /// Output buffers at rest; a session owns one only while it has output.
    buffers: Vec<Vec<u8>>,
    scratch: Vec<u8>,
}

/// Where a slice goes on after the last start.
pub struct Start {
    /// The first free number of its journal.
    pub next_seq: u64,
    /// The highest id that any journal or SQL holds.
    pub last_id: Id,
    pub found: Found,
    pub read_back: ReadBack,
}

impl Start {
    /// Nothing was before.
    pub fn new(read_back: ReadBack) -> Start {
        Start {
            next_seq: 1,
            last_id: Id(0),
            found: Found::default(),
            read_back,
        }
    }
}

/// What is left of a session that could have been resumed.
struct Ended {
    user: Rc<str>,
    stream: Box<str>,
    accept: Acceptance,
}

/// How long after a failure a user for whom messages wait is asked for again.
const RELOAD_MS: u64 = 1000;
/// How often SQL is asked again because the journal does not have any more what was to be added to its answer.
const AGAIN_MAX: u8 = 3;
const BUFFERS_MAX: usize = 64;
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// Output of one session that waits behind that of others; what has more is written in its turn.
const FANNED_BYTES_MAX: usize = 64 * 1024;

/// Bytes that a cached user costs beside its record and offline messages.
const USER_BYTES: usize = 256;

impl Slice {
    pub fn new(env: Env, shards: usize, cache_bytes_max: usize, start: Start) -> Slice {
        let ledger = Ledger::new(env.shard, start.next_seq, start.last_id);
        let overlay = Overlay::new(start.read_back.clone());
        let recent = Recent::new(env.limits.archive_recent_bytes_max);
        let mut fx = Effects::default();
        fx.mesh.resize_with(shards, Batch::default);
        fx.closed.resize(shards, false);
        let mut slice = Slice {
            env,
            now: Now::default(),
            users: Cache::new(cache_bytes_max),
            sessions: Sessions::default(),
            fx,
            pace: Pace::default(),
            counters: Counters::default(),
            hooks: Hooks::collect(),
            current: None,
            parked: 0,
            ledger,
            overlay,
            recent,
            warmth: Warmth::default(),
            components: Components::default(),
            groups: Arc::default(),
            regrouping: Regrouping::default(),
            ended: FnvHashMap::default(),
            counts: FnvHashMap::default(),
            halves: Vec::new(),
            forwards: FnvHashMap::default(),
            forwarded_bytes: 0,
            reload: Vec::new(),
            private: Default::default(),
            passwords: Default::default(),
            archive: Default::default(),
            pep: Default::default(),
            caps: Default::default(),
            rooms: Default::default(),
            push: Default::default(),
            uploads: Default::default(),
            waits: FnvHashMap::default(),
            again: FnvHashMap::default(),
            ticket: 0,
            timers: BinaryHeap::new(),
            buffers: Vec::new(),
            scratch: Vec::new(),
        };
        slice.recover(start.found);
        slice
    }

    // ---- input -------------------------------------------------------------------------------------------------

    /// One element that the client of a live session sent. An error ends the stream: pass it to [`Slice::end`].
    pub fn element(&mut self, sid: SessionId, frame: &[u8]) -> Result<(), StreamError> {
        let ms = self.now.ms;
        let Some(session) = self.sessions.get_mut(sid) else {
            return Ok(());
        };
        session.heard_ms = ms;
        session.pinged = false;
        let ns = session.stream_ns.clone();
        let view = View::parse(frame, &ns, &self.env.limits.xml)?;
        let stanza = view.ns() == NS_CLIENT && matches!(view.name(), "message" | "presence" | "iq");
        if !stanza {
            return match self.hooks.nonza(view.name(), view.ns()) {
                Some(handle) => handle(self, sid, &view),
                None => Err(StreamError::new("unsupported-stanza-type")),
            };
        }
        if let Some(from) = view.attr("from") {
            check_from(session, &from)?;
        }
        let seq = session.accept.receive();
        self.current = session.sm.is_some().then_some(Receipt {
            shard: self.env.shard,
            session: sid,
            seq,
            twin: 0,
        });
        match view.name() {
            "message" => message::outbound(self, sid, &view),
            "presence" => presence::outbound(self, sid, &view),
            _ => iq::outbound(self, sid, &view),
        }
        self.current = None;
        Ok(())
    }

    /// Whitespace of the client: it lives.
    pub fn keep_alive(&mut self, sid: SessionId) {
        let ms = self.now.ms;
        if let Some(session) = self.sessions.get_mut(sid) {
            session.heard_ms = ms;
            session.pinged = false;
        }
    }

    /// A batch of another shard.
    pub fn batch(&mut self, batch: &Batch) {
        for item in &batch.items {
            match *item {
                Item::Stanza {
                    to,
                    from,
                    stanza,
                    meta,
                    receipt,
                } => {
                    // `to` was normalised by the sender's shard: parsing borrows
                    let Ok(to) = Jid::parse(batch.text(to)) else {
                        continue;
                    };
                    let fate =
                        self.deliver(&to, batch.text(from), batch.get(stanza), meta, receipt);
                    if let (Fate::Decided, Some(receipt)) = (fate, receipt) {
                        self.settle(receipt);
                    }
                }
                Item::Presence {
                    from,
                    stanza,
                    meta,
                    names,
                } => {
                    presence::broadcast_in(
                        self,
                        batch.text(names),
                        batch.text(from),
                        batch.get(stanza),
                        meta,
                    );
                }
                Item::Probe { from, names } => {
                    presence::probe_in(self, batch.text(names), batch.text(from));
                }
                Item::Event {
                    from,
                    node,
                    stanza,
                    names,
                } => {
                    feature::pep::event_in(
                        self,
                        batch.text(names),
                        batch.text(from),
                        batch.text(node),
                        batch.get(stanza),
                    );
                }
                Item::Interest { from, wants, names } => {
                    feature::pep::interest_in(
                        self,
                        batch.text(names),
                        batch.text(from),
                        batch.text(wants),
                    );
                }
                Item::Room { stanza, meta, to } => {
                    room::fanout::deliver(self, batch.text(to), batch.get(stanza), meta);
                }
                Item::Listing {
                    name,
                    listed,
                    maker,
                    found,
                } => {
                    let (name, listed) = (batch.text(name), batch.text(listed));
                    room::directory::told(self, name, listed, batch.text(maker), found);
                }
                Item::Regrouped { shard, times } => self.regrouped(shard, times),
                Item::Group {
                    from,
                    stanza,
                    meta,
                    except,
                    probe,
                } => {
                    let presence = (batch.get(stanza), meta);
                    presence::group_in(self, batch.text(from), presence, batch.text(except), probe);
                }
                Item::Settled(receipt) => self.settle(receipt),
                Item::Component { host, conn, word } => {
                    self.component_word(batch.text(host), conn, word);
                }
            }
        }
    }

    /// Answers of the tiers.
    pub fn answers(&mut self, answers: Vec<Answer>) {
        // before, not after: whoever waits for a user who is loaded now must find him, however full the cache is
        self.evict();
        for answer in answers {
            match answer {
                Answer::Loaded { name, user } => {
                    let user = self.overlay.apply(&name, user);
                    self.overlay.release(&name);
                    match user {
                        Ok(user) => {
                            if !self.again.is_empty() {
                                self.again.remove(&name);
                            }
                            self.known(&name, user);
                        }
                        Err(error) => self.load_again(&name, &error),
                    }
                }
                Answer::LoadFailed { name, .. } => {
                    // what the journal knows may be enough
                    let user = self.overlay.apply(&name, None);
                    self.overlay.release(&name);
                    match user {
                        Ok(user) if self.overlay.is_whole(&name) => self.known(&name, user),
                        _ => self.load_failed(&name),
                    }
                }
                Answer::Document { ticket, result } => {
                    if let Some((name, Wait::Read(then))) = self.waits.remove(&ticket) {
                        then(self, result);
                        self.users.unpin(&name);
                    }
                }
                Answer::Archive { ticket, result } => self.page_read(ticket, result),
                Answer::Rooms { ticket, result } => {
                    if let Some((_, Wait::Rooms(then))) = self.waits.remove(&ticket) {
                        then(self, result);
                    }
                }
                Answer::Retractions { ticket, result } => {
                    if let Some((name, Wait::Retractions(asked, number, then))) =
                        self.waits.remove(&ticket)
                    {
                        let (query, mut page, keys) = *asked;
                        let page = result.map(|found| {
                            let found = self.overlay.retractions(&name, &keys, found);
                            let buried = retract::bury(&self.env, &mut page, &found);
                            self.recent.settle(&query, number, &buried);
                            page
                        });
                        self.overlay.release(&name);
                        then(self, page);
                        self.users.unpin(&name);
                    }
                }
            }
        }
    }

    /// What SQL has of a page.
    fn page_read(&mut self, ticket: Ticket, result: Result<Page, ReadError>) {
        let Some((name, Wait::Page(query, again, then))) = self.waits.remove(&ticket) else {
            return;
        };
        let page = match result.map(|page| self.overlay.page(&query, page)) {
            Ok(Ok(page)) => Ok(page),
            // what was carried over meanwhile stands in the journal no more, but in SQL
            Ok(Err(_)) if again > 0 => {
                let asked = Query::Archive((*query).clone());
                let wait = Wait::Page(query, again - 1, then);
                self.waits.insert(ticket, (name, wait));
                let query = asked;
                return self.fx.requests.push(Request::Read { ticket, query });
            }
            Ok(Err(error)) => Err(ReadError(error)),
            Err(error) => Err(error),
        };
        if let Ok(page) = &page
            && page.missing.is_empty()
        {
            let number = self.recent.put(&query, page);
            if page.retracted {
                let keys = retract::keys(&self.env, page);
                let asked = Query::Retractions {
                    name: (*name).into(),
                    keys: keys.clone(),
                };
                let about = Box::new((*query, page.clone(), keys));
                let wait = Wait::Retractions(about, number, then);
                self.waits.insert(ticket, (name, wait));
                let query = asked;
                return self.fx.requests.push(Request::Read { ticket, query });
            }
        }
        self.overlay.release(&name);
        then(self, page);
        self.users.unpin(&name);
    }

    /// SQL has everything of a journal up to a position.
    pub fn drained(&mut self, at: Position) {
        self.overlay.drained(at);
    }

    /// The outcome of a job in [`Effects::jobs`].
    pub fn computed(&mut self, ticket: Ticket, outcome: Computed) {
        if let Some((_, Wait::Compute(then))) = self.waits.remove(&ticket) {
            then(self, outcome);
        }
    }

    /// The shard calls it about twice a second.
    pub fn tick(&mut self) {
        while let Some(Reverse((due, slot, generation, timer))) = self.timers.peek().copied() {
            if due > self.now.ms {
                break;
            }
            self.timers.pop();
            let sid = SessionId { slot, generation };
            match timer {
                Timer::Idle => self.idle(sid),
                Timer::Resume => feature::sm::expire(self, sid),
            }
        }
        let now = self.now.ms;
        for at in (0..self.reload.len()).rev() {
            if self.reload[at].0 <= now {
                let (_, name) = self.reload.swap_remove(at);
                self.load(&name);
            }
        }
        self.counts.retain(|_, (_, until)| *until > now);
        feature::caps::tick(self);
        feature::push::tick(self);
        self.component_recovered();
        room::directory::tick(self);
        room::tick(self);
    }

    /// Every client gets `error`; parked sessions end.
    pub fn end_all(&mut self, error: &StreamError) {
        for sid in self.sessions.ids() {
            self.end(sid, Some(error.clone()));
        }
    }

    // ---- sessions ----------------------------------------------------------------------------------------------

    /// A session begins: full JID is free, the user is present.
    pub fn begin(
        &mut self,
        name: &str,
        make: impl FnOnce(SessionId) -> Session,
    ) -> Option<SessionId> {
        self.left(name, None, false);
        let Some(Slot::Present(user)) = self.users.get_mut(name) else {
            return None;
        };
        let sid = self.sessions.insert(make);
        user.sessions.push(sid);
        let owner = user.name.clone();
        if self.warmth.is_on()
            && let Some(session) = self.sessions.get(sid)
        {
            let resource = session.resource().into();
            self.warmth.sessions.push((owner, resource, true));
        }
        self.users.pin(name);
        self.counters.binds += 1;
        self.timer(self.env.limits.ping_idle_ms, sid, Timer::Idle);
        Some(sid)
    }

    /// Ends a session for good: its contacts learn it, what it held is dealt with; its client gets `error` and the end
    /// of the stream.
    pub fn end(&mut self, sid: SessionId, error: Option<StreamError>) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        let asked = error.is_none();
        let mut closing = None;
        if let Some(link) = session.link.take() {
            self.counters.disconnects += 1;
            let reason = error.as_ref().map_or("closed by the client", |error| {
                error.text.unwrap_or(error.condition)
            });
            session.log_end(reason, false);
            let mut bytes = std::mem::take(&mut session.out);
            match error {
                Some(error) => error.write(&mut bytes),
                None => bytes.extend_from_slice(b"</stream:stream>"),
            }
            closing = Some(Closing::new(link, bytes));
        } else if session.sm.is_some() {
            self.parked = self.parked.saturating_sub(1);
        }
        // nobody finds it any more, but its own farewell still names it
        let mut session = self.sessions.remove(sid).expect("was there a moment ago");
        let name = session.user.clone();
        if self.warmth.is_on() {
            let resource = session.resource().into();
            self.warmth.sessions.push((name.clone(), resource, false));
        }
        if let Some(user) = self.user_mut(&name) {
            user.sessions.retain(|s| *s != sid);
        }
        for hook in self.hooks.ended.clone().iter() {
            hook(self, &mut session);
        }
        if session.settling {
            self.fx.loaded.push(name.clone());
        }
        let mut left = Vec::new();
        if let Some(mut kept) = session.unconfirmed.take() {
            // whoever else is there gets it before what comes behind it
            let user = self.user_mut(&name).filter(|user| user.sessions.is_empty());
            match (user, closing.as_mut().filter(|_| asked)) {
                (Some(user), Some(closing)) => {
                    let link = closing.link;
                    user.left = Some(Box::new(Left { link, kept: *kept }));
                    closing.left = Some(name.clone());
                }
                _ => left = kept.take_all(),
            }
        }
        self.fx.closing.extend(closing);
        if let Some(mut sm) = session.sm.take() {
            if sm.resume_ms > 0 {
                self.remember_count(&sm.id, session.accept.h());
                let room = self.ended.len() < self.env.limits.parked_max.max(1) * 2;
                if session.accept.waiting() > 0 && room {
                    let ended = Ended {
                        user: name.clone(),
                        stream: sm.id.clone(),
                        accept: std::mem::take(&mut session.accept),
                    };
                    self.ended.insert(sid, ended);
                }
            }
            left.extend(sm.unacknowledged());
        }
        feature::sm::redirect(self, &name, left);
        self.users.unpin(&name);
    }

    fn remember_count(&mut self, stream: &str, count: u32) {
        if self.counts.len() < self.env.limits.parked_max.max(1) * 2 {
            let until = self.now.ms + 2 * self.env.limits.resume_ms_max;
            self.counts.insert(stream.into(), (count, until));
        }
    }

    /// Is something that was read from a stream that is no more not decided yet? Then its user is in [`Effects::loaded`] when all
    /// is.
    pub fn is_ending(&self, stream: &str) -> bool {
        self.ended.values().any(|ended| *ended.stream == *stream)
    }

    /// How many stanzas of a stream that is no more were durable.
    pub fn count_of(&self, stream: &str) -> Option<u32> {
        self.counts.get(stream).map(|(count, _)| *count)
    }

    /// The connection is gone without a farewell: the session waits for its client, or ends.
    pub fn link_lost(&mut self, sid: SessionId) {
        self.cut(sid, "connection lost");
    }

    /// The same, for this reason.
    pub(super) fn cut(&mut self, sid: SessionId, reason: &str) {
        let room = self.parked < self.env.limits.parked_max;
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        if session.link.take().is_some() {
            let resumable = session.sm.as_ref().is_some_and(|sm| sm.resume_ms > 0);
            session.log_end(reason, resumable && room);
            self.counters.disconnects += 1;
        }
        session.unsent = 0;
        let out = std::mem::take(&mut session.out);
        match &session.sm {
            Some(sm) if sm.resume_ms > 0 && room => {
                let wait = sm.resume_ms;
                session.accept.forget_asked();
                self.parked += 1;
                self.timer(wait, sid, Timer::Resume);
                feature::push::cut_off(self, sid);
            }
            _ => {
                // `end` counts a session without link as parked
                if session.sm.is_some() {
                    self.parked += 1;
                }
                self.end(sid, None);
            }
        }
        self.reuse(out);
    }

    fn idle(&mut self, sid: SessionId) {
        let (idle, timeout) = (
            self.env.limits.ping_idle_ms,
            self.env.limits.ping_timeout_ms,
        );
        let ms = self.now.ms;
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        let silent = ms.saturating_sub(session.heard_ms);
        if session.link.is_none() || silent < idle {
            let wait = if silent < idle { idle - silent } else { idle };
            return self.timer(wait, sid, Timer::Idle);
        }
        if session.pinged {
            let Some(link) = session.link else { return };
            let error = StreamError::text("connection-timeout", "no answer to a ping");
            self.fx.close(link, &error);
            return self.cut(sid, "no answer to a ping");
        }
        session.pinged = true;
        feature::ping::ask(self, sid);
        self.timer(timeout, sid, Timer::Idle);
    }

    fn timer(&mut self, wait_ms: u64, sid: SessionId, timer: Timer) {
        self.timers.push(Reverse((
            self.now.ms + wait_ms,
            sid.slot,
            sid.generation,
            timer,
        )));
    }

    // ---- output ------------------------------------------------------------------------------------------------

    /// Gives a stanza (in parts, self-contained, to be read in a stream of `jabber:client`) to a session.
    pub fn send(&mut self, sid: SessionId, parts: &[&[u8]], meta: Meta) {
        self.hand(sid, parts, meta, 0);
    }

    /// The same for a message that is a pending delivery of the user's, by its id.
    pub fn hand(&mut self, sid: SessionId, parts: &[&[u8]], meta: Meta, id: u64) {
        if self.sessions.get(sid).is_some_and(|s| s.paced.is_some()) {
            self.release_sender(sid, parts, meta);
        }
        self.give(sid, parts, meta, id);
    }

    /// [`Slice::send`] of what many are told at once. It may wait for a later turn: it reaches each of them behind all that was
    /// sent to him before it and ahead of all that is sent to him behind it, but not ahead of what goes to others.
    pub fn send_fanned(&mut self, sid: SessionId, parts: &[&[u8]], meta: Meta) {
        if self.sessions.get(sid).is_some_and(|s| s.paced.is_some()) {
            self.release_sender(sid, parts, meta);
        }
        self.push(sid, parts, meta, 0, Haste::Fanned);
    }

    /// [`Slice::hand`], whatever waits.
    pub(super) fn give(&mut self, sid: SessionId, parts: &[&[u8]], meta: Meta, id: u64) {
        self.push(sid, parts, meta, id, Haste::Now);
    }

    fn push(&mut self, sid: SessionId, parts: &[&[u8]], meta: Meta, id: u64, haste: Haste) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        if session.csi.inactive
            && feature::csi::hold(
                session,
                parts,
                meta,
                id,
                self.env.limits.deferred_stanzas_max,
            )
        {
            return;
        }
        if session.out.capacity() == 0
            && let Some(buffer) = self.buffers.pop()
        {
            session.out = buffer;
        }
        if id != 0 && session.sm.is_none() && session.unconfirmed.is_none() {
            self.fx.unconfirmed.push(sid);
        }
        session.push(parts, meta, id);
        self.touched_for(sid, haste);
    }

    pub fn send_element(&mut self, sid: SessionId, element: &Element, meta: Meta) {
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        element.write(&mut bytes, NS_CLIENT);
        self.send(sid, &[&bytes], meta);
        self.scratch = bytes;
    }

    /// Bytes that are no stanza: not counted, not kept, not deferred.
    pub fn send_raw(&mut self, sid: SessionId, bytes: &[u8]) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        if session.link.is_some() {
            session.out.extend_from_slice(bytes);
            self.touched(sid);
        }
    }

    /// The session has new output: written at the end of the turn, unless its client reads too slowly.
    pub(super) fn touched(&mut self, sid: SessionId) {
        self.touched_for(sid, Haste::Now);
    }

    fn touched_for(&mut self, sid: SessionId, haste: Haste) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        if !session.dirty
            && !session.fanned
            && session.unsent == 0
            && session.sm.as_ref().is_none_or(|sm| sm.waiting() <= 1)
        {
            session.burst = (0, 0);
        }
        if overflow(session, &self.env.limits).is_some() {
            self.fx.overflown.push(sid);
        }
        if session.dirty || session.link.is_none() {
            return;
        }
        if haste == Haste::Fanned && session.out.len() <= FANNED_BYTES_MAX {
            if !std::mem::replace(&mut session.fanned, true) {
                self.fx.fanned.push_back(sid);
            }
            return;
        }
        session.dirty = true;
        self.fx.dirty.push(sid);
    }

    /// The next session of [`Effects::fanned`] that still has something to say; it is [`Slice::take_out`]'s.
    pub fn next_fanned(&mut self) -> Option<SessionId> {
        while let Some(sid) = self.fx.fanned.pop_front() {
            let Some(session) = self.sessions.get_mut(sid) else {
                continue;
            };
            session.fanned = false;
            // it may have gone out already, with something that was more urgent
            if session.link.is_some() && !session.out.is_empty() {
                return Some(sid);
            }
        }
        None
    }

    /// The server itself sent so much (bytes, stanzas) at once.
    pub(super) fn allow(&mut self, sid: SessionId, (bytes, stanzas): (usize, usize)) {
        if let Some(session) = self.sessions.get_mut(sid) {
            session.burst.0 += bytes;
            session.burst.1 += stanzas;
        }
    }

    /// What the session has to say now; give the buffer back by [`Slice::reuse`].
    pub fn take_out(&mut self, sid: SessionId) -> Option<(u64, Vec<u8>)> {
        let session = self.sessions.get_mut(sid)?;
        session.dirty = false;
        let link = session.link.filter(|_| !session.out.is_empty())?;
        if let Some(sm) = &mut session.sm {
            sm.ask(&mut session.out);
        }
        Some((link, std::mem::take(&mut session.out)))
    }

    /// An empty buffer; give it back by [`Slice::reuse`].
    pub fn buffer(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_default()
    }

    pub fn reuse(&mut self, mut buffer: Vec<u8>) {
        if self.buffers.len() < BUFFERS_MAX && buffer.capacity() <= BUFFER_BYTES_MAX {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    /// Slow readers: parked if they can resume, else ended.
    pub fn cut_slow_readers(&mut self) {
        while let Some(sid) = self.fx.overflown.pop() {
            let Some(session) = self.sessions.get_mut(sid) else {
                continue;
            };
            let Some(overflow) = overflow(session, &self.env.limits) else {
                continue;
            };
            let error = StreamError::text(
                "resource-constraint",
                "the client does not read what it is sent",
            );
            self.counters.overflows += 1;
            if overflow == Overflow::Kept || session.link.is_none() {
                // nothing more can be kept for it
                self.end(sid, Some(error));
            } else if let Some(link) = session.link {
                self.fx.close(link, &error);
                self.cut(sid, "the client does not read what it is sent");
            }
        }
    }

    // ---- routing -----------------------------------------------------------------------------------------------

    /// Sends a stanza (self-contained bytes, `from` and `to` as the recipient will see them) to a local user or a component,
    /// wherever he lives. `receipt` is the inbound stanza that hangs on it: usually `slice.current`.
    pub fn route(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) {
        match self.host(to.domain()) {
            Host::Own | Host::Rooms => {}
            Host::Component => return component::route(self, to, from, stanza, meta, receipt),
            Host::Unknown => {
                if let Some(receipt) = receipt {
                    self.refused(receipt);
                }
                return component::nowhere(self, to, from, stanza, meta);
            }
        }
        let Some(name) = self.env.entity(to) else {
            // nobody reads what is sent to the server or to the service of rooms itself
            if let Some(receipt) = receipt {
                self.refused(receipt);
            }
            return self.bounce(to, from, stanza, meta, &StanzaError::SERVICE_UNAVAILABLE);
        };
        let owner = self.env.owner(&name);
        if owner == self.env.shard {
            if let (true, Some(receipt)) = (self.env.is_room(to), receipt) {
                // a room may settle at once, so its part is open before
                self.defer(receipt);
                if self.deliver(to, from, stanza, meta, Some(receipt)) == Fate::Decided {
                    self.finish(receipt);
                }
                return;
            }
            match (self.deliver(to, from, stanza, meta, receipt), receipt) {
                (Fate::Open, Some(receipt)) => self.defer(receipt),
                (Fate::Decided, Some(receipt)) => self.refused(receipt),
                _ => {}
            }
            return;
        }
        let refuses = meta.kind.may_bounce() && !is_forwarded(meta, receipt);
        if self.fx.closed[owner as usize] && refuses {
            self.counters.mesh_refused += 1;
            if let Some(receipt) = receipt {
                self.refused(receipt);
            }
            return self.bounce(to, from, stanza, meta, &StanzaError::RESOURCE_CONSTRAINT);
        }
        let batch = &mut self.fx.mesh[owner as usize];
        batch.stanza(to.as_str(), from, stanza, meta, receipt);
        if let Some(receipt) = receipt {
            self.defer(receipt);
            if receipt.twin != 0 && receipt.shard == self.env.shard {
                self.ledger.opened(receipt.twin);
            }
        }
    }

    /// A component gets the stanza, or its sender an error: [`Slice::settle`] tells.
    pub(super) fn opened(&mut self, receipt: Receipt) {
        self.defer(receipt);
        if receipt.twin != 0 && receipt.shard == self.env.shard {
            self.ledger.opened(receipt.twin);
        }
    }

    /// Nobody will journal the recipient's side of a message.
    pub(super) fn refused(&mut self, receipt: Receipt) {
        if receipt.shard != self.env.shard {
            self.settle(receipt);
        } else if receipt.twin != 0 {
            self.ledger.opened(receipt.twin);
            self.settled_twin(receipt.twin);
        }
    }

    /// The fate of a sent message is decided: its sender's owner need not forward it again.
    fn settled_twin(&mut self, twin: u64) {
        self.ledger.settled(twin, self.now.ms);
        if let Some(bytes) = self.forwards.remove(&twin) {
            self.forwarded_bytes -= bytes;
        }
    }

    /// A room has decided the fate of a stanza, and nobody else will: its part is over.
    pub(super) fn finish(&mut self, receipt: Receipt) {
        if receipt.shard != self.env.shard {
            return self.settle(receipt);
        }
        self.refused(receipt);
        self.passed_on(receipt);
    }

    /// A room has given a stanza on with its receipt: what becomes of it is for others to say, the room's own part is over.
    pub(super) fn passed_on(&mut self, receipt: Receipt) {
        if receipt.shard == self.env.shard {
            self.settle(Receipt { twin: 0, ..receipt });
        }
    }

    pub fn route_element(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        element: &Element,
        meta: Meta,
        receipt: Option<Receipt>,
    ) {
        let mut bytes = Vec::with_capacity(256);
        element.write(&mut bytes, NS_CLIENT);
        self.route(to, from, &bytes, meta, receipt);
    }

    /// Delivers to a user of this slice, or to a component that is connected here.
    fn deliver(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) -> Fate {
        match self.host(to.domain()) {
            Host::Own => {}
            Host::Rooms => return room::deliver(self, to, from, stanza, meta, receipt),
            Host::Component | Host::Unknown => {
                return component::arrived(self, to, from, stanza, meta, receipt);
            }
        }
        let name = to.local().expect("only users are routed to");
        let full = match self.users.get_mut(name) {
            Some(Slot::Present(user)) => {
                if meta.storable() {
                    return message::accept(self, to, from, stanza, meta, receipt);
                }
                if self.ledger.holds(name) {
                    let user = user.name.clone();
                    return self.deliver_behind(&user, to, from, stanza, meta, receipt);
                }
                return self.deliver_now(to, from, stanza, meta, receipt);
            }
            Some(Slot::Missing) => {
                self.refuse_missing(to, from, stanza, meta);
                return Fate::Decided;
            }
            Some(Slot::Loading { bytes, .. }) => {
                *bytes + stanza.len() > self.env.limits.load_queue_bytes_max
            }
            // no user has the name of a room
            Some(Slot::Room(_)) => return Fate::Decided,
            None => false,
        };
        // who is not loaded has no sessions: these have nobody to go to
        if matches!(
            meta.kind,
            Kind::Available
                | Kind::Unavailable
                | Kind::PresenceError
                | Kind::IqResult
                | Kind::IqError
        ) {
            return Fate::Decided;
        }
        if full && !is_forwarded(meta, receipt) {
            self.counters.load_queue_full += 1;
            self.bounce(to, from, stanza, meta, &StanzaError::RESOURCE_CONSTRAINT);
            return Fate::Decided;
        }
        self.want(name);
        if let Some(Slot::Loading { bytes, .. }) = self.users.get_mut(name) {
            *bytes += stanza.len();
        }
        if meta.storable() {
            // accepted now, decided when the user is known
            return message::accept(self, to, from, stanza, meta, receipt);
        }
        if self.ledger.holds(name) {
            return self.deliver_behind(&name.into(), to, from, stanza, meta, receipt);
        }
        self.wait_for_load(to, from, stanza, meta, receipt);
        Fate::Open
    }

    /// To a user who is present; nothing that is older waits.
    fn deliver_now(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) -> Fate {
        if meta.kind.is_message() {
            message::deliver(self, to, from, stanza, meta)
        } else if meta.kind.is_presence() {
            presence::deliver(self, to, from, stanza, meta, receipt)
        } else {
            iq::deliver(self, to, from, stanza, meta)
        }
    }

    /// Older messages for (or of) the user wait for the journal: this stanza must not overtake them.
    pub(super) fn deliver_behind(
        &mut self,
        user: &Rc<str>,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) -> Fate {
        let full = self.ledger.bytes() > self.env.limits.mesh_backlog_bytes_max;
        if full && !is_forwarded(meta, receipt) {
            self.bounce(to, from, stanza, meta, &StanzaError::RESOURCE_CONSTRAINT);
            return Fate::Decided;
        }
        let receipt = receipt.or_else(|| self.hold_for_error(user, to, meta));
        let act = Act::Behind {
            to: self.ledger.keep(to.as_str().as_bytes()),
            from: self.ledger.keep(from.as_bytes()),
            stanza: self.ledger.keep(stanza),
            meta,
            receipt,
        };
        self.ledger.queue(user, act);
        Fate::Open
    }

    /// The error with which this server answers a stanza of a session of this slice waits: no count may cover that stanza before.
    fn hold_for_error(&mut self, user: &str, to: &Jid<'_>, meta: Meta) -> Option<Receipt> {
        let error = matches!(
            meta.kind,
            Kind::MessageError | Kind::PresenceError | Kind::IqError
        );
        if !error || !meta.has(Meta::SERVER) {
            return None;
        }
        let sid = self.find_session(user, to.resource()?)?;
        let session = self.sessions.get_mut(sid)?;
        session.sm.as_ref()?;
        Some(Receipt {
            shard: self.env.shard,
            session: sid,
            seq: session.accept.hold(Stamp::at(self.now.us))?,
            twin: 0,
        })
    }

    /// Sends a stanza that changes something of another user as soon as the journal has it, and again after a crash, until
    /// it is settled at that user's owner. Called together with the change that it goes with: one group holds both.
    pub fn forward(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) {
        let Some(user) = Jid::parse(from)
            .ok()
            .and_then(|from| Some(Rc::from(from.local()?)))
        else {
            return;
        };
        let id = self.next_id();
        let (kind, flags) = meta.numbers();
        let change = Change::Message(Message {
            id,
            owner: &user,
            what: Message::SENT,
            kind,
            flags,
            peer: to.as_str(),
            twin: 0,
            stream: "",
            count: 0,
            stanza,
        });
        let receipt = Receipt {
            twin: id,
            ..receipt.unwrap_or(Receipt {
                shard: self.env.shard,
                session: SessionId::NONE,
                seq: 0,
                twin: 0,
            })
        };
        let act = Act::Forward {
            to: self.ledger.keep(to.as_str().as_bytes()),
            from: self.ledger.keep(from.as_bytes()),
            meta,
            receipt,
        };
        self.ledger.journal(&user, &change, act);
        // it has no twin, wherever it goes: its end is told by a mark
        self.ledger.opened(id);
        self.forwards.insert(id, stanza.len());
        self.forwarded_bytes += stanza.len();
        self.defer(receipt);
    }

    /// Do too many changes of this slice's users wait for their other halves? Then no new one is made: what is durable at one
    /// side is never refused at the other, so it is here that they are bounded.
    pub fn forwards_full(&self) -> bool {
        self.forwarded_bytes > self.env.limits.mesh_backlog_bytes_max
    }

    /// The other half of a change (see [`Slice::forward`]) comes in: if the journal has no room for it, or others wait, it waits
    /// and [`Slice::journal_is_full`] goes on with it. `true`: somebody will settle its receipt.
    pub(super) fn waits_for_room(
        &mut self,
        to: &Jid<'_>,
        from: &Jid<'_>,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) -> bool {
        let full = self.ledger.full || !self.halves.is_empty();
        if !full || !is_forwarded(meta, receipt) {
            return false;
        }
        self.counters.journal_waited += 1;
        self.halves.push(Waiting {
            to: to.as_str().into(),
            from: from.as_str().into(),
            stanza: stanza.into(),
            meta,
            receipt,
        });
        true
    }

    pub(super) fn wait_for_load(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        receipt: Option<Receipt>,
    ) {
        let name = self
            .env
            .entity(to)
            .expect("only users and rooms are routed to");
        if let Some(Slot::Loading { queue, .. }) = self.users.get_mut(&name) {
            queue.push(Queued::Stanza(Waiting {
                to: to.as_str().into(),
                from: from.into(),
                stanza: stanza.into(),
                meta,
                receipt,
            }));
        }
    }

    // ---- the journal -------------------------------------------------------------------------------------------

    /// A new segment begins: what the journal must say anew is said (see [`StreamCount`]).
    pub fn new_segment(&mut self) {
        let live = self.sessions.iter().filter_map(|session| {
            let sm = session.sm.as_ref().filter(|sm| sm.resume_ms > 0)?;
            (sm.durable > 0).then(|| StreamCount {
                stream: stream_key(&sm.id),
                count: sm.durable,
            })
        });
        let past = self.counts.iter().map(|(stream, (count, _))| StreamCount {
            stream: stream_key(stream),
            count: *count,
        });
        self.ledger.count(live.chain(past), self.now.ms);
    }

    /// Does the journal take new messages and changes? What waited for room goes on as soon as there is some, before anybody
    /// else takes it.
    pub fn journal_is_full(&mut self, full: bool) {
        self.ledger.full = full;
        if !full && !self.halves.is_empty() {
            let halves = std::mem::take(&mut self.halves);
            self.run_queue(halves.into_iter().map(Queued::Stanza).collect());
        }
    }

    /// The next group for the journal, when it is due; none while one is being committed. A group without changes is acted on at
    /// once.
    pub fn seal(&mut self) -> Option<Group> {
        if self.ledger.is_flying() || self.ledger.due_ms(self.now.ms)? > self.now.ms {
            return None;
        }
        let group = self.ledger.seal();
        if group.is_none() {
            self.committed(None, &|_| unreachable!("nothing was journalled"));
        }
        group
    }

    /// A group is durable; `place` tells where each change is now. Give the buffer back by [`Ledger::give_back`].
    pub fn committed(&mut self, group: Option<&Group>, place: &dyn Fn(GroupSlot) -> Place) {
        let (mut acts, floor) = self.ledger.landed();
        let Acts { entries, strings } = &mut acts;
        for entry in entries.drain(..) {
            self.act(entry, strings, group, place);
        }
        self.warmth.landed(self.ledger.sealed_seq());
        self.fx.floor = floor;
        self.ledger.give_back_acts(acts);
    }

    fn act(
        &mut self,
        entry: Entry,
        strings: &super::batch::Spans,
        group: Option<&Group>,
        place: &dyn Fn(GroupSlot) -> Place,
    ) {
        let Entry {
            seq,
            slot,
            user,
            act,
        } = entry;
        let at = Position {
            journal: self.env.shard,
            seq,
        };
        match act {
            Act::Received { to, meta, receipt } => {
                let message = message_of(group, slot);
                let (id, what) = (message.id.to_native(), message.what);
                self.archived(&user, message);
                self.overlay.add(at, &user, item_of(group, slot, place));
                if what & Message::PENDING != 0 {
                    self.warmth.accepted(seq, &user, id, self.now.ms);
                }
                self.ledger.release(&user);
                message::accepted(self, strings.text(to), message, meta);
                if let Some(receipt) = receipt {
                    if what & Message::SENT != 0 {
                        self.count(receipt);
                    }
                    self.settle(receipt);
                }
            }
            Act::Sent {
                session,
                to,
                from,
                stanza,
                meta,
                receipt,
            } => {
                let bytes = match stanza {
                    Some(stanza) => strings.get(stanza),
                    None => {
                        self.overlay.add(at, &user, item_of(group, slot, place));
                        let message = message_of(group, slot);
                        self.archived(&user, message);
                        &message.stanza
                    }
                };
                self.ledger.release(&user);
                message::sent(
                    self,
                    &user,
                    session,
                    strings.text(to),
                    strings.text(from),
                    bytes,
                    meta,
                );
                if let Some(receipt) = receipt {
                    self.count(receipt);
                    self.settle(receipt);
                }
            }
            Act::Behind {
                to,
                from,
                stanza,
                meta,
                receipt,
            } => {
                self.ledger.release(&user);
                let (from, stanza) = (strings.text(from), strings.get(stanza));
                let Ok(to) = Jid::parse(strings.text(to)) else {
                    return;
                };
                let fate = match self.users.get(&user) {
                    Some(Slot::Present(_)) => self.deliver_now(&to, from, stanza, meta, receipt),
                    Some(Slot::Loading { .. }) => {
                        self.wait_for_load(&to, from, stanza, meta, receipt);
                        Fate::Open
                    }
                    _ => self.deliver(&to, from, stanza, meta, receipt),
                };
                if let (Fate::Decided, Some(receipt)) = (fate, receipt) {
                    self.settle(receipt);
                }
            }
            Act::ToComponent {
                to,
                from,
                stanza,
                meta,
                receipt,
            } => {
                self.ledger.release(&user);
                let (from, stanza) = (strings.text(from), strings.get(stanza));
                let fate = match Jid::parse(strings.text(to)) {
                    Ok(to) => component::send(self, &to, from, stanza, meta, receipt),
                    Err(_) => Fate::Decided,
                };
                if let (Fate::Decided, Some(receipt)) = (fate, receipt) {
                    self.settle(receipt);
                }
            }
            Act::Presence { from, stanza, meta } => {
                self.ledger.release(&user);
                if let Ok(from) = Jid::parse(strings.text(from)) {
                    presence::tell_now(self, &user, &from, strings.get(stanza), meta);
                }
            }
            Act::Forward {
                to,
                from,
                meta,
                receipt,
            } => {
                if let Ok(to) = Jid::parse(strings.text(to)) {
                    let message = message_of(group, slot);
                    self.route(
                        &to,
                        strings.text(from),
                        &message.stanza,
                        meta,
                        Some(receipt),
                    );
                }
                let whole = Receipt { twin: 0, ..receipt };
                self.settle(whole);
            }
            Act::Reflected { meta, receipt } => {
                let message = message_of(group, slot);
                self.archived(&user, message);
                self.overlay.add(at, &user, item_of(group, slot, place));
                room::message::reflected(self, &user, message, meta);
                if let Some(receipt) = receipt {
                    self.settle(receipt);
                }
            }
            Act::Written { then } => {
                let item = item_of(group, slot, place);
                match &item {
                    Undrained::Record {
                        revision, record, ..
                    } => self.ring_changed(&user, seq, Some((*revision, record))),
                    Undrained::Removed { .. } | Undrained::Last { .. } => {
                        self.ring_changed(&user, seq, None);
                    }
                    Undrained::Document { key, .. } if **key == *INDEX_KEY => {
                        self.ring_changed(&user, seq, None);
                    }
                    _ => {}
                }
                if let Undrained::Removed { .. } | Undrained::Record { fresh: true, .. } = &item {
                    self.recent.forget(&user);
                }
                self.overlay.add(at, &user, item);
                then(self, Ok(()));
                self.users.unpin(&user);
            }
            Act::Counted { session, count } => feature::sm::counted(self, session, count),
            Act::Done(ids) => {
                for id in ids {
                    self.overlay.add(at, &user, Undrained::Done(id));
                }
            }
            Act::Dropped(ids) => {
                for id in ids {
                    self.overlay.add(at, &user, Undrained::Dropped(id));
                    self.recent.drop_entry(&user, id);
                }
            }
            Act::Unarchived(ids) => {
                for (user, id) in ids {
                    self.overlay.add_unarchived(at, id);
                    self.recent.drop_entry(&user, id);
                }
            }
            Act::Retracted => {
                if let ArchivedChange::Retract(retract) = change_of(group, slot) {
                    room::at_work(self, &user, |_, room| room.history.retract(retract));
                }
                self.overlay.add(at, &user, item_of(group, slot, place));
                self.recent.forget(&user);
            }
            Act::Decided(ids) => {
                for id in ids {
                    self.overlay.add_decided(at, id);
                }
            }
        }
    }

    /// A message is durable: it may be a new entry of an archive that is kept in memory.
    fn archived(&mut self, user: &str, message: &ArchivedMessage<'_>) {
        if message.what & Message::ARCHIVE == 0 || !self.recent.has(user) {
            return;
        }
        let entry = ArchiveEntry {
            id: message.id.into(),
            what: message.what,
            kind: message.kind,
            flags: message.flags.into(),
            peer: (*message.peer).into(),
            stanza: (*message.stanza).into(),
        };
        self.recent.append(user, entry);
    }

    /// A stanza of a session is in its owner's journal.
    fn count(&mut self, receipt: Receipt) {
        if receipt.shard == self.env.shard {
            feature::sm::counted(self, receipt.session, receipt.seq);
        }
    }

    /// Takes up what the last start left.
    fn recover(&mut self, found: Found) {
        for id in found.settled {
            self.ledger.opened(id);
            self.ledger.settled(id, 0);
        }
        for count in found.counts {
            let end = count.stream.iter().position(|b| *b == 0);
            let stream = &count.stream[..end.unwrap_or(count.stream.len())];
            if let Ok(stream) = std::str::from_utf8(stream) {
                self.remember_count(stream, count.count);
            }
        }
        // the journal that has told them may belong to a shard that is no more
        if !self.counts.is_empty() {
            self.new_segment();
        }
        for (at, name, item) in found.undrained {
            let name: Rc<str> = (*name).into();
            self.overlay.add(at, &name, item);
        }
        if let Some(up_to) = found.doubtful {
            self.overlay.doubt(up_to);
        }
        for (at, id) in found.gone {
            self.overlay.add_gone(at, id);
        }
        for (at, id) in found.decided {
            self.overlay.add_decided(at, id);
        }
        for (at, id) in found.unarchived {
            self.overlay.add_unarchived(at, id);
        }
        let undecided: Vec<Box<str>> = self
            .overlay
            .names()
            .filter(|name| !self.overlay.undecided(name).is_empty())
            .map(Box::from)
            .collect();
        for name in undecided {
            self.want(&name);
        }
        for id in found.open {
            self.ledger.opened(id);
        }
        let mut bytes = Vec::new();
        for (id, home, place) in found.forward {
            let receipt = Receipt {
                shard: home,
                session: SessionId::NONE,
                seq: 0,
                twin: id,
            };
            let entry = match self.overlay.entry(place, &mut bytes) {
                Ok((entry, _)) => entry,
                Err(error) => {
                    tracing::error!(
                        id,
                        error,
                        "a message that was to be forwarded cannot be read"
                    );
                    continue;
                }
            };
            let meta = Meta::from_numbers(entry.kind, entry.flags);
            let from = super::parse_stanza(&entry.stanza)
                .and_then(|stanza| stanza.get("from").map(str::to_owned));
            match (Jid::parse(&entry.peer), from) {
                // the names of components are not known yet
                (Ok(to), Some(from)) => match self.host(to.domain()) {
                    Host::Own | Host::Rooms => {
                        self.route(&to, &from, &entry.stanza, meta, Some(receipt));
                    }
                    Host::Component | Host::Unknown => {
                        self.component_recover(&to, &from, &entry.stanza, meta, receipt);
                    }
                },
                _ => self.refused(receipt),
            }
        }
    }

    /// A client has taken a pending delivery: no other gets it when this one's session ends.
    pub fn taken(&mut self, name: &str, id: u64) {
        let ms = self.now.ms;
        let Some(user) = self.user_mut(name) else {
            return;
        };
        if let Ok(at) = user.held.binary_search_by_key(&id, |(held, _)| *held) {
            user.held.remove(at);
            let none = user.held.is_empty() && user.offline.is_empty();
            let (user, calm) = (user.name.clone(), user.is_calm());
            self.ledger.done(&user, id, ms);
            if none {
                feature::push::all_taken(self, &user);
            }
            if calm {
                self.ring_calm(&user);
            }
        }
    }

    /// The peer of a session without stream management has all that it was sent.
    pub fn confirmed(&mut self, sid: SessionId) {
        self.confirmed_first(sid, usize::MAX);
    }

    /// Messages that the peer of a session without stream management may not have.
    pub fn unconfirmed(&self, sid: SessionId) -> usize {
        let session = self.sessions.get(sid);
        session
            .and_then(|session| session.unconfirmed.as_ref())
            .map_or(0, |kept| kept.len())
    }

    /// The peer of a session without stream management has so many of the messages that it was sent, oldest first, and perhaps more.
    pub fn confirmed_first(&mut self, sid: SessionId, messages: usize) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        let Some(mut kept) = session.unconfirmed.take() else {
            return;
        };
        let ids: Vec<u64> = (0..messages).map_while(|_| kept.pop()).collect();
        session.unconfirmed = Some(kept).filter(|kept| !kept.is_empty());
        let name = session.user.clone();
        for id in ids {
            self.taken(&name, id);
        }
    }

    /// What was on its way to `name` when his last session ended: the peer of that connection (`None`: of any) has `taken` it,
    /// or another client gets it.
    pub fn left(&mut self, name: &str, link: Option<u64>, taken: bool) {
        let Some(user) = self.user_mut(name) else {
            return;
        };
        let this = |left: &mut Box<Left>| link.is_none_or(|link| link == left.link);
        let Some(mut left) = user.left.take_if(this) else {
            return;
        };
        if !taken {
            return feature::sm::redirect(self, name, left.kept.take_all());
        }
        while let Some(id) = left.kept.pop() {
            self.taken(name, id);
        }
    }

    /// RFC 6121 8.5.1: the user does not exist.
    pub(super) fn refuse_missing(&mut self, to: &Jid<'_>, from: &str, stanza: &[u8], meta: Meta) {
        if meta.kind.is_message() || meta.kind.is_iq() {
            let forbidden = to
                .local()
                .zip(Jid::parse(from).ok())
                .is_some_and(|(name, from)| {
                    // what a stranger hears of an account that exists
                    feature::last::forbids(self, name, &from, stanza, meta)
                })
                || feature::archive::forbids(to, stanza, meta);
            let error = if forbidden {
                StanzaError::FORBIDDEN
            } else {
                StanzaError::SERVICE_UNAVAILABLE
            };
            self.bounce(to, from, stanza, meta, &error);
        } else if matches!(meta.kind, Kind::Subscribe | Kind::Probe) {
            presence::answer_unsubscribed(self, to, from);
        }
    }

    /// May the stanza come in to its recipient, a user of this slice? If not, its sender hears what he is to hear.
    pub fn admits(&mut self, to: &Jid<'_>, from: &Jid<'_>, stanza: &[u8], meta: Meta) -> bool {
        let name = to.local().expect("only users are routed to");
        match self.hooks.admission(self, name, from, meta) {
            Ok(()) => return true,
            Err(Refusal::Silent) => {}
            Err(Refusal::Error(error)) => self.bounce(to, from.as_str(), stanza, meta, &error),
        }
        false
    }

    /// Sends a stanza back to its sender as an error, if its kind may be answered by one.
    pub fn bounce(
        &mut self,
        to: &Jid<'_>,
        from: &str,
        stanza: &[u8],
        meta: Meta,
        error: &StanzaError,
    ) {
        if !meta.kind.may_bounce() || meta.has(Meta::COPY) {
            return;
        }
        let (Ok(back), Some(original)) = (Jid::parse(from), super::parse_stanza(stanza)) else {
            return;
        };
        self.counters.bounces += 1;
        let mut answer = Element::new(meta.kind.stanza(), NS_CLIENT)
            .attr("from", to.as_str())
            .attr("to", from)
            .attr("type", "error");
        if let Some(id) = original.get("id") {
            answer = answer.attr("id", id);
        }
        for child in original.elements() {
            answer = answer.child(child.clone());
        }
        let kind = match meta.kind {
            k if k.is_message() => Kind::MessageError,
            k if k.is_presence() => Kind::PresenceError,
            _ => Kind::IqError,
        };
        let answer = answer.child(error.element());
        // XEP-0280 6.1: those who got a copy of the message get one of the error
        let flags = Meta::SERVER | (meta.flags & (Meta::CARBON | Meta::NO_COPY));
        self.route_element(
            &back,
            to.as_str(),
            &answer,
            Meta::new(kind).with(flags),
            None,
        );
    }

    pub fn defer(&mut self, receipt: Receipt) {
        if receipt.shard != self.env.shard {
            return;
        }
        if let Some(session) = self.sessions.get_mut(receipt.session) {
            session.accept.defer(receipt.seq, Stamp::at(self.now.us));
        } else if let Some(ended) = self.ended.get_mut(&receipt.session) {
            ended.accept.defer(receipt.seq, Stamp::at(self.now.us));
        }
    }

    /// The fate of an inbound stanza is decided.
    pub fn settle(&mut self, receipt: Receipt) {
        if receipt.shard != self.env.shard {
            self.fx.mesh[receipt.shard as usize]
                .items
                .push(Item::Settled(receipt));
            return;
        }
        if receipt.twin != 0 {
            self.settled_twin(receipt.twin);
        }
        if let Some(session) = self.sessions.get_mut(receipt.session) {
            if let Some(read) = session.accept.settle(receipt.seq) {
                record(Stage::MessageSettled, read.until(self.now.us));
            }
            if session.settling && session.accept.waiting() == 0 {
                let name = session.user.clone();
                self.fx.loaded.push(name);
            }
            feature::sm::answer_asked(self, receipt.session);
        } else if let Some(ended) = self.ended.get_mut(&receipt.session) {
            ended.accept.settle(receipt.seq);
            let (h, stream) = (ended.accept.h(), ended.stream.clone());
            if ended.accept.waiting() == 0
                && let Some(ended) = self.ended.remove(&receipt.session)
            {
                self.fx.loaded.push(ended.user);
            }
            self.remember_count(&stream, h);
        }
    }

    // ---- users -------------------------------------------------------------------------------------------------

    pub fn user(&self, name: &str) -> Option<&User> {
        match self.users.get(name) {
            Some(Slot::Present(user)) => Some(user),
            _ => None,
        }
    }

    /// Does the user share a group with this contact?
    pub fn together(&self, name: &str, contact: &Jid<'_>) -> bool {
        !self.groups.is_empty()
            && self.env.is_local(contact)
            && contact
                .local()
                .is_some_and(|other| self.groups.together(name, other))
    }

    /// The same with the groups before, while not all shards have the new ones: who sends and who receives presence mean the same
    /// contacts then.
    pub fn still_together(&self, name: &str, contact: &Jid<'_>) -> bool {
        let before = |other: &str| self.regrouping.before().any(|g| g.together(name, other));
        self.together(name, contact)
            || (self.env.is_local(contact) && contact.local().is_some_and(before))
    }

    pub fn user_mut(&mut self, name: &str) -> Option<&mut User> {
        match self.users.get_mut(name) {
            Some(Slot::Present(user)) => Some(user),
            _ => None,
        }
    }

    /// Sessions of a user, parked ones included.
    pub fn sessions_of(&self, name: &str) -> SmallVec<[SessionId; 4]> {
        self.user(name)
            .map(|u| u.sessions.iter().copied().collect())
            .unwrap_or_default()
    }

    /// The session with that resource.
    pub fn find_session(&self, name: &str, resource: &str) -> Option<SessionId> {
        self.user(name)?.sessions.iter().copied().find(|sid| {
            self.sessions
                .get(*sid)
                .is_some_and(|s| s.resource() == resource)
        })
    }

    /// Makes sure that the user is here or on his way; [`Effects::loaded`] tells when. `true`: known now.
    pub fn want(&mut self, name: &str) -> bool {
        match self.users.get(name) {
            Some(Slot::Loading { .. }) => false,
            Some(_) => true,
            None => {
                self.users.insert(
                    name,
                    Slot::Loading {
                        queue: Vec::new(),
                        bytes: 0,
                    },
                    USER_BYTES,
                );
                self.users.pin(name);
                self.load(name);
                false
            }
        }
    }

    fn load(&mut self, name: &str) {
        self.overlay.hold(name);
        self.fx.requests.push(Request::Load { name: name.into() });
    }

    /// What the journal has of a user cannot be read: most likely it was carried over meanwhile, so that SQL has it.
    fn load_again(&mut self, name: &str, error: &str) {
        let asked = self.again.entry(name.into()).or_insert(0);
        *asked += 1;
        if *asked > AGAIN_MAX {
            self.again.remove(name);
            tracing::error!(user = name, error, "the journal cannot be read");
            return self.load_failed(name);
        }
        self.overlay.hold(name);
        match self.warmth.is_on() {
            true => self.ring_behind(name, Behind::Unavailable),
            false => self.fx.requests.push(Request::Load { name: name.into() }),
        }
    }

    /// The tiers and the journal have told of a user.
    fn known(&mut self, name: &str, user: Option<Loaded>) {
        let Some(mut loaded) = user else {
            self.loaded(name, Slot::Missing);
            self.ring_known(name);
            return message::decide_missing(self, name);
        };
        if loaded.record.is_room() {
            return room::loaded(self, name, loaded);
        }
        let by = format!("{name}@{}", self.env.domain);
        let mut offline = Offline::default();
        let mut undecided = Vec::new();
        let marked = match loaded.pending.is_empty() {
            true => Marked::default(),
            false => self.ledger.marked(),
        };
        for mut pending in std::mem::take(&mut loaded.pending) {
            if marked.gone.contains(&pending.id) {
                continue;
            }
            if pending.what & Message::UNDECIDED != 0 && !marked.decided.contains(&pending.id) {
                undecided.push(pending.clone());
            }
            if marked.unarchived.contains(&pending.id) {
                pending.what &= !Message::ARCHIVE;
            }
            let meta = Meta::from_numbers(pending.kind, pending.flags);
            let stanza = stable_id::stamped(&self.env, &by, pending);
            offline.put(stanza.0, stanza.1, meta);
        }
        let user = Box::new(User::new(name, loaded, offline));
        self.loaded(name, Slot::Present(user));
        self.ring_known(name);
        message::decide(self, name, undecided);
    }

    pub(super) fn loaded(&mut self, name: &str, slot: Slot) {
        let bytes = match &slot {
            Slot::Present(user) => user_bytes(user),
            Slot::Room(Some(room)) => USER_BYTES + room.bytes(),
            _ => USER_BYTES,
        };
        let Some(place) = self.users.get_mut(name) else {
            return;
        };
        if !matches!(place, Slot::Loading { .. }) {
            return;
        }
        let Slot::Loading { queue, .. } = std::mem::replace(place, slot) else {
            return;
        };
        self.users.set_bytes(name, bytes);
        self.run_queue(queue);
        self.fx.loaded.push(name.into());
        self.users.unpin(name);
    }

    /// The tier cannot say: what waits is refused for now; messages that are in the journal wait on, and the tier is asked
    /// again.
    fn load_failed(&mut self, name: &str) {
        self.ring_unknown(name);
        let Some(Slot::Loading { queue, bytes }) = self.users.get_mut(name) else {
            return;
        };
        let (journalled, refused): (Vec<_>, Vec<_>) = std::mem::take(queue)
            .into_iter()
            .partition(Queued::is_journalled);
        *bytes = journalled.iter().map(Queued::bytes).sum();
        *queue = journalled;
        let accepted = !queue.is_empty()
            || self.ledger.holds(name)
            || !self.overlay.undecided(name).is_empty();
        if accepted {
            self.reload.push((self.now.ms + RELOAD_MS, name.into()));
        } else {
            self.users.unpin(name);
            self.users.remove(name);
        }
        for waiting in refused {
            match waiting {
                Queued::Call(call) => call(self),
                Queued::Stanza(w) => {
                    if let Ok(to) = Jid::parse(&w.to) {
                        self.bounce(
                            &to,
                            &w.from,
                            &w.stanza,
                            w.meta,
                            &StanzaError::RESOURCE_CONSTRAINT,
                        );
                    }
                    self.decided(&w);
                }
            }
        }
        self.fx.loaded.push(name.into());
    }

    /// Runs `call` when the user is known, in order with what else waits for him.
    pub fn when_known(&mut self, name: &str, call: Call) {
        if self.want(name) {
            call(self);
        } else if let Some(Slot::Loading { queue, .. }) = self.users.get_mut(name) {
            queue.push(Queued::Call(call));
        }
    }

    pub(super) fn deliver_again(&mut self, waiting: Waiting) {
        self.run_queue(vec![Queued::Stanza(waiting)]);
    }

    fn run_queue(&mut self, queue: Vec<Queued>) {
        for waiting in queue {
            match waiting {
                Queued::Call(call) => call(self),
                Queued::Stanza(w) => {
                    let fate = match Jid::parse(&w.to) {
                        Ok(to) => self.deliver(&to, &w.from, &w.stanza, w.meta, w.receipt),
                        Err(_) => Fate::Decided,
                    };
                    if fate == Fate::Decided {
                        self.decided(&w);
                    }
                }
            }
        }
    }

    /// The fate of what had to wait is decided.
    fn decided(&mut self, waiting: &Waiting) {
        let Some(receipt) = waiting.receipt else {
            return;
        };
        match Jid::parse(&waiting.to).is_ok_and(|to| self.env.is_room(&to)) {
            // no record of a room's closes what its sender's owner has journalled
            true => self.finish(receipt),
            false => self.settle(receipt),
        }
    }

    /// Changes a user's record, here at once and in the journal; `then` runs when it is durable, or at once if it is not made:
    /// `false`.
    pub fn edit(&mut self, name: &str, change: impl FnOnce(&mut UserRecord), then: Then) -> bool {
        let refused = |slice: &mut Slice, then: Then, why| {
            then(slice, Err(why));
            false
        };
        if self.ledger.full {
            self.counters.journal_refused += 1;
            return refused(self, then, WriteError::Full);
        }
        self.release_user(name);
        let Some(user) = self.user(name) else {
            return refused(self, then, WriteError::Missing);
        };
        let mut record = user.record.to_owned();
        change(&mut record);
        let record = Record::new(&record);
        if record.bytes().len() > self.env.limits.record_bytes_max {
            return refused(self, then, WriteError::TooLarge);
        }
        let revision = self.next_id();
        let Some(user) = self.user_mut(name) else {
            return refused(self, then, WriteError::Missing);
        };
        user.record = record.clone();
        user.revision = revision;
        let (who, bytes) = (user.name.clone(), user_bytes(user));
        self.users.set_bytes(name, bytes);
        let change = Change::PutUser {
            name,
            revision,
            record: record.bytes(),
        };
        self.users.pin(name);
        self.ledger.journal(&who, &change, Act::Written { then });
        true
    }

    /// Changes something of a user; `then` runs when it is durable, or at once if it is not made. The user stays in the
    /// cache until then.
    pub fn write(&mut self, name: &str, op: Op, mut then: Then) {
        if self.ledger.full {
            self.counters.journal_refused += 1;
            return then(self, Err(WriteError::Full));
        }
        let who: Rc<str> = match self.users.get(name) {
            Some(Slot::Present(user)) => user.name.clone(),
            Some(Slot::Missing) => name.into(),
            // a room changes by itself
            Some(Slot::Room(_)) => return then(self, Err(WriteError::Conflict)),
            Some(Slot::Loading { .. }) | None => {
                let name: Box<str> = name.into();
                return self.when_known(
                    &name.clone(),
                    Box::new(move |slice| match slice.users.peek(&name) {
                        Some(Slot::Present(_) | Slot::Missing) => slice.write(&name, op, then),
                        _ => then(slice, Err(WriteError::Unavailable)),
                    }),
                );
            }
        };
        let present = self.user(name).is_some();
        match op {
            Op::AddUser { .. } if present => return then(self, Err(WriteError::Conflict)),
            Op::AddUser { ref record }
                if record.bytes().len() > self.env.limits.record_bytes_max =>
            {
                return then(self, Err(WriteError::TooLarge));
            }
            Op::PutDocument {
                value: Some(ref value),
                ..
            } if value.len() > self.env.limits.record_bytes_max => {
                return then(self, Err(WriteError::TooLarge));
            }
            Op::AddUser { .. } => {}
            _ if !present => return then(self, Err(WriteError::Missing)),
            _ => {}
        }
        let revision = self.next_id();
        self.users.pin(name);
        let change = match &op {
            Op::AddUser { record } => {
                // known from now on, so that nobody adds it again; told when it is durable
                self.set_user(name, Some((record.clone(), revision)));
                Change::AddUser {
                    name,
                    revision,
                    record: record.bytes(),
                }
            }
            Op::RemoveUser => {
                let who = who.clone();
                then = Box::new(move |slice, result| {
                    if result.is_ok() {
                        feature::upload::account_removed(slice, &who, Id(revision));
                    }
                    then(slice, result);
                });
                Change::RemoveUser { name, revision }
            }
            Op::PutDocument { key, value } => Change::PutDocument {
                name,
                revision,
                key,
                value: value.as_deref().unwrap_or_default(),
            },
            Op::PutLast { last } => Change::PutLast {
                name,
                revision,
                at: last.at,
                status: &last.status,
            },
        };
        self.ledger.journal(&who, &change, Act::Written { then });
    }

    /// Reads a document of a user.
    pub fn read(&mut self, name: &str, key: &str, then: ThenRead) {
        match self.overlay.document(name, key) {
            Ok(None) => {}
            Ok(Some(found)) => return then(self, Ok(found)),
            Err(error) => return then(self, Err(error)),
        }
        let query = Query::Document {
            name: name.into(),
            key: key.into(),
        };
        let ticket = self.wait(name, Wait::Read(then));
        self.users.pin(name);
        self.fx.requests.push(Request::Read { ticket, query });
    }

    /// Reads a page of an archive, from memory if it is there, what SQL does not have yet included. What was retracted is a
    /// tombstone (XEP-0424).
    pub fn read_archive(&mut self, query: ArchiveQuery, then: ThenPage) {
        self.expire_archive(&query.name);
        if let Some(page) = self.recent.page(&query) {
            return then(self, Ok(page));
        }
        let name = query.name.clone();
        let ticket = self.wait(&name, Wait::Page(Box::new(query.clone()), AGAIN_MAX, then));
        self.users.pin(&name);
        self.overlay.hold(&name);
        let query = Query::Archive(query);
        self.fx.requests.push(Request::Read { ticket, query });
    }

    /// Ids of the first and the last entry of an archive, if they are in memory; the inner `None`: it is empty. `asked`: a client waits
    /// for it, so whether they are is counted.
    pub fn archive_ends(&mut self, name: &str, asked: bool) -> Option<Option<(u64, u64)>> {
        self.expire_archive(name);
        match asked {
            true => self.recent.asked_ends(name),
            false => self.recent.ends(name),
        }
    }

    /// What may be purged of an archive any time is not given any more.
    fn expire_archive(&mut self, name: &str) {
        let limits = &self.env.limits;
        let keep_ms = match room::is_entity(name) {
            true => limits.rooms.archive_keep_ms,
            false => limits.archive_keep_ms,
        };
        if keep_ms > 0 {
            let before = Id::at(self.now.unix_ms.saturating_sub(keep_ms));
            self.recent.expire(name, before.0);
        }
    }

    /// Reads chat rooms behind this row, of all shards, as SQL has them.
    pub fn read_rooms(&mut self, after: u64, most: u32, then: ThenRooms) {
        let ticket = self.wait("", Wait::Rooms(then));
        let query = Query::Rooms { after, most };
        self.fx.requests.push(Request::Read { ticket, query });
    }

    pub fn compute(&mut self, job: Job, then: ThenComputed) {
        let ticket = self.wait("", Wait::Compute(then));
        self.fx.jobs.push((ticket, job));
    }

    fn wait(&mut self, name: &str, wait: Wait) -> Ticket {
        self.ticket += 1;
        self.waits.insert(self.ticket, (name.into(), wait));
        self.ticket
    }

    /// There is a new account, with a revision, or none any more: the table follows.
    pub fn set_user(&mut self, name: &str, record: Option<(Record, u64)>) {
        let slot = match record {
            Some((record, revision)) => {
                let loaded = Loaded {
                    record,
                    revision,
                    pending: Vec::new(),
                    last: None,
                    // nobody has made a node of it yet
                    index: Some(Box::default()),
                };
                let mut user = Box::new(User::new(name, loaded, Offline::default()));
                // not yet
                user.durable = 0;
                Slot::Present(user)
            }
            None => Slot::Missing,
        };
        match self.users.get_mut(name) {
            Some(place) => *place = slot,
            None => {
                self.users.insert(name, slot, USER_BYTES);
            }
        }
    }

    pub fn resize(&mut self, name: &str) {
        if let Some(bytes) = self.user(name).map(user_bytes) {
            self.users.set_bytes(name, bytes);
        }
    }

    fn evict(&mut self) {
        let mut rooms = 0;
        self.users
            .evict(|_, slot| rooms += usize::from(matches!(slot, Slot::Room(_))));
        self.rooms.count -= rooms;
    }

    /// A new id or revision; see [`Id`].
    pub fn next_id(&mut self) -> u64 {
        self.ledger.next_id(self.now.unix_ms)
    }

    /// A scratch buffer of the slice's; give it back by [`Slice::give_scratch`].
    pub fn take_scratch(&mut self) -> Vec<u8> {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch
    }

    pub fn give_scratch(&mut self, scratch: Vec<u8>) {
        if scratch.capacity() <= BUFFER_BYTES_MAX {
            self.scratch = scratch;
        }
    }
}

fn user_bytes(user: &User) -> usize {
    USER_BYTES
        + user.record.bytes().len()
        + user.offline.bytes()
        + 32 * user.offline.len()
        + feature::pep::bytes(user)
}

/// The change that a group holds at `slot`, which was appended by [`Ledger::journal`].
#[allow(unsafe_code)]
fn change_of(group: Option<&Group>, slot: Option<GroupSlot>) -> &ArchivedChange<'static> {
    let payload = group
        .zip(slot)
        .map(|(group, slot)| group.payload(slot))
        .expect("a change stands in its group");
    // SAFETY: the slot is what the group gave for exactly one encoded change, and its buffer is not written after.
    unsafe { ArchivedChange::access_unchecked(payload) }
}

/// What SQL does not have of it.
fn item_of(
    group: Option<&Group>,
    slot: Option<GroupSlot>,
    place: &dyn Fn(GroupSlot) -> Place,
) -> Undrained {
    let place = place(slot.expect("it was journalled"));
    let item = Undrained::of(change_of(group, slot), place);
    item.expect("this release has written it")
        .expect("an act's change is a user's")
}

fn message_of(group: Option<&Group>, slot: Option<GroupSlot>) -> &ArchivedMessage<'static> {
    match change_of(group, slot) {
        ArchivedChange::Message(message) => message,
        _ => unreachable!("the act was put together with a message"),
    }
}

/// What there is too much of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Overflow {
    /// Stanzas that the client has not acknowledged.
    Kept,
    /// Bytes that the kernel does not take.
    Unsent,
}

/// When output goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Haste {
    /// At the end of this turn.
    Now,
    /// When a turn has time.
    Fanned,
}

/// What is not known to have arrived, against what a client with stream management may leave unacknowledged.
const UNCONFIRMED_TIMES: usize = 8;

fn overflow(session: &Session, limits: &Limits) -> Option<Overflow> {
    let (bytes, stanzas) = session.burst;
    let kept = session.sm.as_ref().is_some_and(|sm| {
        sm.over(
            limits.unacked_bytes_max + bytes,
            limits.unacked_stanzas_max + stanzas,
        )
    });
    // who gives no acknowledgements is asked for them by his kernel, a few times a second and for all at once: more is between
    // two such moments of a client that keeps up. Over BOSH each request says what has arrived.
    let unconfirmed = session.unconfirmed.as_ref().is_some_and(|kept| {
        kept.over(
            UNCONFIRMED_TIMES * limits.unacked_bytes_max + bytes,
            UNCONFIRMED_TIMES * limits.unacked_stanzas_max + stanzas,
        )
    });
    // what was not offered to the kernel yet says nothing about the client
    let unsent = session.unsent > 0
        && session.unsent + session.out.len() > limits.send_queue_bytes_max + bytes;
    match (kept || unconfirmed, unsent) {
        (true, _) => Some(Overflow::Kept),
        (false, true) => Some(Overflow::Unsent),
        (false, false) => None,
    }
}

/// RFC 6120 8.1.2.1: a client may name itself, by full or bare JID, and nobody else.
fn check_from(session: &Session, from: &str) -> Result<(), StreamError> {
    let error = StreamError::new("invalid-from");
    if from == &*session.jid || from == session.bare() {
        return Ok(());
    }
    match Jid::parse(from) {
        Ok(jid) if jid.as_str() == &*session.jid || jid.as_str() == session.bare() => Ok(()),
        _ => Err(error),
    }
}
