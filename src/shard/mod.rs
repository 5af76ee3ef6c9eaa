//! One core put together: the listeners, the connections, the slice of users, and the ways to the other shards and to the
//! tiers. Sockets, batches and answers flow in; [`crate::xmpp::slice`] decides; its effects are carried out by
//! [`Shard::flush`] once per turn, so that one system call, one TLS record and one mesh message carry many stanzas.
//!
//! | file | what it does |
//! |---|---|
//! | `live` | the readiness task: ready sockets, answers, output; connections of sessions |
//! | `login` | a connection from accept to its session, a task in the login queue; hand-over to the owner |
//! | `admission` | storm control: who of those who log in may compute now |
//! | `journal` | groups of changes on their way to the disk |
//! | `redis` | its end of the Redis ring |
//! | `doors` | who may connect, how often, and how fast after failures |
//! | `moves` | what travels between shards, and what happens when a way is full |
//! | `http` | the HTTP door: requests of operators, of web pages and of other clients |
//! | `web` | XMPP for web pages |
//! | `figures` | the metrics of the whole blade, put together |
//! | `component` | connections of components |
//! | `upload` | uploaded files: bodies that come and go by HTTP, threads for the disk |
//! | `admin` | accounts and sessions, as `nitro user` and `nitro session` ask |

pub mod admin;
pub mod admission;
mod component;
pub mod doors;
pub mod figures;
mod http;
pub mod journal;
mod live;
mod login;
pub mod moves;
pub mod redis;
pub mod upload;
mod web;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use fnv::FnvHashMap;
use slab::Slab;

use crate::config::{Config, RoomCreation};
use crate::net::{Scratch, TlsConfig, Transport};
use crate::observe::{HighWater, Histograms, LoopLag, Snapshot, begin_recording, exchange};
use crate::rt::{self, Inbox, InboxSender, MeshEnd, Notify, Queue, Readiness, SlotSetter};
use crate::store::change::Id;
use crate::store::journal::{Committed, Files, Floors, Status, Writer};
use crate::store::overlay::Position;
use crate::store::recovery::Found;
use crate::store::ring::Ring;
use crate::store::sql::lane::LaneSender;
use crate::store::tier::{Answer, Ticket};
use crate::xml::{Framer, StreamNs};
use crate::xmpp::component::Hosts;
use crate::xmpp::feature::upload::Key;
use crate::xmpp::groups::Groups;
use crate::xmpp::sasl::Decoy;
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::{Computed, Env, Job, Limits, Now, Slice, Start};

use admission::{Admission, Loads, Login};
use doors::{Doors, Frequency};
use journal::{Foreign, Journal};
use moves::Ways;
use redis::{Redis, RedisParts};

/// From other threads into a shard.
pub enum Inbound {
    Answers(Vec<Answer>),
    /// A group of this shard's journal is durable.
    Committed(Box<Committed>),
    /// SQL has everything of a journal up to a position.
    Drained(Position),
    Computed(Ticket, Computed),
    /// What the Redis ring needs from outside.
    Redis(crate::store::redis::keeper::Reply),
    Admin(admin::Call),
    /// Configuration, certificate and secrets of components were loaded again.
    Reload(Arc<Config>, TlsConfig, Arc<Hosts>),
    /// An administrator's groups were loaded again.
    Groups(Arc<Groups>),
    /// What challenges of unknown users must look like has changed.
    Decoy(Arc<Decoy>),
    /// Hand over what was recorded, go on with the empty set, send it with the number given.
    Histograms(
        usize,
        Histograms,
        crossbeam_channel::Sender<(usize, Histograms)>,
    ),
    /// The page that an HTTP request of this shard has asked for.
    Page(u64, String),
    /// A thread has done something with the folder of uploads.
    Uploaded(upload::Done),
    /// There is something unread: turn once more.
    Nudge,
    /// Say farewell to everybody and end.
    Stop,
}

/// A port and what is spoken there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// RFC 6120, with STARTTLS.
    Xmpp,
    /// XEP-0368.
    XmppTls,
    /// XEP-0114.
    Component,
    /// For operators.
    Http,
    /// HTTP for clients, behind a reverse proxy.
    Web,
    /// HTTP for clients, with TLS.
    WebTls,
}

impl Door {
    /// Whether a client begins with the TLS handshake.
    pub fn begins_with_tls(self) -> bool {
        matches!(self, Door::XmppTls | Door::WebTls)
    }

    pub fn is_web(self) -> bool {
        matches!(self, Door::Web | Door::WebTls)
    }
}

/// All that a shard is made of; built by the blade, sent to its core.
pub struct Parts {
    pub config: Arc<Config>,
    pub tls: TlsConfig,
    pub components: Arc<Hosts>,
    pub groups: Arc<Groups>,
    pub ring: Arc<Ring>,
    pub decoy: Arc<Decoy>,
    pub id_key: [u64; 2],
    /// Of the slots for uploads, and the threads that keep the files; none: there are no uploads. Where they are switched off it is
    /// for what removed accounts have left.
    pub upload: Option<([u8; 32], upload::Files)>,
    pub login_key: [u8; 32],
    pub listen: Vec<(SocketAddr, Door)>,
    pub mesh: MeshEnd<moves::Sent>,
    pub inbox: Inbox<Inbound>,
    pub lane: LaneSender,
    pub journal: Writer,
    pub floors: Floors,
    pub foreign: Arc<Foreign>,
    pub files: Files,
    /// What the last start left.
    pub found: Found,
    pub last_id: Id,
    /// Where instances are configured.
    pub redis: Option<RedisParts>,
    pub helpers: crate::blade::Helpers,
    pub own_inbox: InboxSender<Inbound>,
    pub doors: Arc<Doors>,
    pub loads: Arc<Loads>,
    pub started: Instant,
    pub gauges: Arc<crate::observe::Gauges>,
    pub pages: figures::Pages,
}

pub struct Shard {
    number: usize,
    slice: RefCell<Slice>,
    links: RefCell<Links>,
    readiness: Readiness,
    scratch: RefCell<Scratch>,
    ways: RefCell<Ways>,
    inbox: Inbox<Inbound>,
    own_inbox: InboxSender<Inbound>,
    lane: LaneSender,
    journal: Journal,
    redis: Option<Redis>,
    helpers: crate::blade::Helpers,
    config: RefCell<Arc<Config>>,
    tls: RefCell<TlsConfig>,
    decoy: RefCell<Arc<Decoy>>,
    doors: Arc<Doors>,
    loads: Arc<Loads>,
    frequency: RefCell<Frequency>,
    logins_slowed: Cell<u64>,
    /// Connections that were only accepted here.
    knocks_moved: Cell<u64>,
    /// Live connections that have more to read than one turn allows, or bytes left from their login.
    unread: RefCell<VecDeque<u64>>,
    /// Those whose peers have gone, still to be read to their end.
    leaving: RefCell<VecDeque<u64>>,
    /// Log-ins that wait for a user to be loaded.
    waiting: RefCell<FnvHashMap<Box<str>, Vec<SlotSetter<()>>>>,
    started: Instant,
    stopping: Cell<bool>,
    /// Connections that are past the first gate and have no session yet.
    negotiating: Cell<usize>,
    admission: Admission<Box<login::Knock>>,
    /// When the turn of the live loop began that is at work; monotonic microseconds of the blade.
    turn_began_us: Cell<u64>,
    /// When [`Shard::flush`] was called last, or when this turn began.
    flushed_us: Cell<u64>,
    /// Connections that came from other shards.
    hand_overs: Cell<u64>,
    http_open: Cell<usize>,
    web_open: Cell<usize>,
    bosh: RefCell<web::bosh::Sessions>,
    /// Connections at the ports for components.
    components_open: Rc<Cell<usize>>,
    /// Sessions that have begun, until their login task hands the connection over.
    bound: RefCell<Vec<(u64, SessionId)>>,
    /// The namespaces that most stream headers declare.
    usual_ns: RefCell<Rc<StreamNs>>,
    gauges: Arc<crate::observe::Gauges>,
    /// Of the live loop.
    lag: RefCell<LoopLag>,
    /// The most that came at once by the inbox.
    inbox_depth: HighWater,
    /// The most connections that waited to be read on.
    unread_depth: HighWater,
    leaving_depth: HighWater,
    /// The most sessions that waited to be told what many are told.
    fanned_depth: HighWater,
    pages: figures::Pages,
    /// HTTP requests that wait for their page.
    pages_waiting: RefCell<FnvHashMap<u64, SlotSetter<String>>>,
    /// Of the folder of uploads.
    files: Option<upload::Files>,
    /// Who waits for what is done with it, by number.
    upload_waits: RefCell<FnvHashMap<u64, SlotSetter<Box<dyn Any + Send>>>>,
    upload_number: Cell<u64>,
    /// A removal of an account is being written down there.
    upload_forgets: Cell<bool>,
    page_tickets: Cell<u64>,
}

/// A place in the readiness set. A link is its slot and generation, as one number.
struct Link {
    generation: u32,
    kind: Kind,
}

enum Kind {
    /// Somebody waits for readiness: an HTTP request, a PROXY header.
    Waits(Rc<Waits>),
    /// A port: told when it may accept.
    Listener(Rc<Notify>),
    /// A connection that logs in: told when it may compute.
    Login(Rc<Login>),
    Live(Box<LiveLink>),
    Component(Box<component::ComponentLink>),
    /// Says its last words.
    Closing {
        transport: Box<Transport>,
        /// Its last words, until they are said.
        last: Option<Box<[u8]>>,
        /// How long it has to hear them, from then on.
        until_ms: u64,
        shut: bool,
        /// Its peer has said that it sends no more.
        ended: bool,
        /// Bytes that were read away.
        read: usize,
        /// See [`Closing::left`](crate::xmpp::slice::Closing::left).
        left: Option<Rc<str>>,
    },
    Inbox,
    Mesh,
    /// The keeper's end of a session of requests.
    Bosh,
    /// The socket of the instance with this index.
    Redis(usize),
}

/// What a task waits for that is not a session yet.
#[derive(Default)]
struct Waits {
    ready: Notify,
    /// The peer sends no more; that edge does not come again.
    closed: Cell<bool>,
}

/// The connection of a session.
struct LiveLink {
    transport: Transport,
    framer: Framer,
    /// The unfinished frame; owns nothing when there is none.
    rest: Vec<u8>,
    session: SessionId,
    _pass: doors::Pass,
    /// For the first seconds it counts as a login.
    begins: Begins,
}

/// What is left of a login when the session has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begins {
    /// Nothing.
    No,
    /// It is read when there is a place: until `ms` of the monotonic clock.
    Until {
        ms: u64,
        queued: bool,
        /// The peer sends no more; that edge does not come again.
        closed: bool,
    },
}

#[derive(Default)]
struct Links {
    slab: Slab<Link>,
    generation: u32,
}

impl Link {
    /// By what the rest of the shard knows it; `slot`: where it stands.
    fn number(&self, slot: usize) -> u64 {
        (u64::from(self.generation) << 32) | slot as u64
    }
}

impl Links {
    fn insert(&mut self, kind: Kind) -> u64 {
        self.generation = self.generation.wrapping_add(1);
        let slot = self.slab.insert(Link {
            generation: self.generation,
            kind,
        });
        self.slab[slot].number(slot)
    }

    fn get_mut(&mut self, link: u64) -> Option<&mut Kind> {
        let entry = self.slab.get_mut(link as u32 as usize)?;
        (entry.generation == (link >> 32) as u32).then_some(&mut entry.kind)
    }

    fn remove(&mut self, link: u64) -> Option<Kind> {
        self.get_mut(link)?;
        Some(self.slab.remove(link as u32 as usize).kind)
    }
}

impl Shard {
    /// Runs the shard on this core until [`Inbound::Stop`]. An error is a sentence for the operator.
    pub async fn run(number: usize, parts: Parts) -> Result<(), String> {
        let shards = parts.ring.members();
        let config = parts.config;
        let (upload_key, files) = parts.upload.unzip();
        let env = Env {
            domain: config.domain.as_str().into(),
            rooms: config.rooms_host().map(Into::into),
            upload: files.as_ref().and(config.upload_host()).map(Into::into),
            upload_key: upload_key.as_ref().map(Key::new),
            shard: number as u16,
            ring: Rc::new((*parts.ring).clone()),
            limits: limits(&config, shards),
            id_key: parts.id_key,
            login_key: parts.login_key,
            features: Default::default(),
        };
        let mesh = parts.mesh.connect();
        let journals = parts.files;
        let read_back = move |place, into: &mut Vec<u8>| {
            journals
                .read(place, into)
                .map_err(|error| error.to_string())
        };
        let start = Start {
            next_seq: parts.journal.next_seq(),
            last_id: parts.last_id,
            found: parts.found,
            read_back: Rc::new(read_back),
        };
        let mut slice = Slice::new(env, shards, config.cache.bytes_max / shards, start);
        slice.groups = parts.groups;
        slice.component_configure(parts.components, component::settings(&config));
        let redis = parts.redis.map(|redis| Redis::new(number, redis));
        if redis.is_some() {
            slice.ring_on();
        }
        crate::xmpp::room::directory::find(&mut slice);
        let shard = Rc::new(Shard {
            number,
            slice: RefCell::new(slice),
            redis,
            links: RefCell::default(),
            readiness: Readiness::new().map_err(|e| format!("epoll_create: {e}"))?,
            scratch: RefCell::new(Scratch::new()),
            ways: RefCell::new(Ways::new(mesh)),
            inbox: parts.inbox,
            own_inbox: parts.own_inbox,
            lane: parts.lane,
            journal: Journal::new(number, parts.journal, parts.floors, parts.foreign),
            helpers: parts.helpers,
            config: RefCell::new(config.clone()),
            tls: RefCell::new(parts.tls),
            decoy: RefCell::new(parts.decoy),
            doors: parts.doors,
            loads: parts.loads,
            frequency: RefCell::default(),
            logins_slowed: Cell::new(0),
            knocks_moved: Cell::new(0),
            unread: RefCell::default(),
            leaving: RefCell::default(),
            waiting: RefCell::default(),
            started: parts.started,
            stopping: Cell::new(false),
            negotiating: Cell::new(0),
            admission: Admission::new(&config),
            flushed_us: Cell::default(),
            turn_began_us: Cell::new(parts.started.elapsed().as_micros() as u64),
            hand_overs: Cell::new(0),
            http_open: Cell::new(0),
            web_open: Cell::new(0),
            bosh: RefCell::default(),
            components_open: Rc::default(),
            bound: RefCell::default(),
            usual_ns: RefCell::new(Rc::new(StreamNs::client())),
            gauges: parts.gauges,
            lag: RefCell::new(LoopLag::new(parts.started.elapsed().as_micros() as u64)),
            inbox_depth: HighWater::default(),
            unread_depth: HighWater::default(),
            leaving_depth: HighWater::default(),
            fanned_depth: HighWater::default(),
            pages: parts.pages,
            pages_waiting: RefCell::default(),
            files,
            upload_waits: RefCell::default(),
            upload_number: Cell::new(0),
            upload_forgets: Cell::new(false),
            page_tickets: Cell::new(0),
        });
        begin_recording();
        shard.clock();
        let bell = shard.links.borrow_mut().insert(Kind::Inbox);
        shard
            .readiness
            .add(&shard.inbox, bell)
            .map_err(|e| format!("epoll_ctl: {e}"))?;
        let bell = shard.links.borrow_mut().insert(Kind::Mesh);
        shard
            .readiness
            .add(shard.ways.borrow().mesh(), bell)
            .map_err(|e| format!("epoll_ctl: {e}"))?;
        for (address, door) in parts.listen {
            let listener = crate::net::listen_shared(address, config.c2s.backlog as i32)?;
            rt::spawn(Queue::Login, login::accept(shard.clone(), listener, door));
        }
        let ticking = shard.clone();
        rt::spawn(Queue::House, async move { ticking.tick_forever().await });
        shard.gauges.shard_is_ready();
        shard.clone().live().await;
        shard.pages.last(number, exchange(Histograms::new()));
        Ok(())
    }

    fn publish(&self) {
        let slice = self.slice.borrow();
        let (ways, cache, c) = (self.ways.borrow(), slice.users.stats(), &slice.counters);
        let journal = self.journal.state();
        let snapshot = Snapshot {
            sessions: slice.sessions.len() as u64,
            parked: slice.parked as u64,
            negotiating: self.negotiating.get() as u64,
            binds: c.binds,
            disconnects: c.disconnects,
            resumptions: c.resumptions,
            hand_overs: self.hand_overs.get(),
            messages_in: c.messages_in,
            messages_delivered: c.messages_delivered,
            messages_offline: c.messages_offline,
            presences_in: c.presences_in,
            iqs_in: c.iqs_in,
            bounces: c.bounces,
            overflows: c.overflows,
            load_queue_full: c.load_queue_full,
            rooms: slice.rooms.count as u64,
            room_messages: c.room_messages,
            room_deliveries: c.room_deliveries,
            room_refused: c.room_refused,
            room_waiting_max: self.fanned_depth.get(slice.now.ms),
            mesh_sent: ways.sent,
            mesh_full: ways.full,
            mesh_refused: c.mesh_refused,
            mesh_kept_max: ways.kept_most.get(slice.now.ms),
            inbox_max: self.inbox_depth.get(slice.now.ms),
            unread_max: self.unread_depth.get(slice.now.ms),
            leaving_max: self.leaving_depth.get(slice.now.ms),
            journal_waiting_max: self.journal.waiting.get(slice.now.ms),
            cpu_us: rt::thread_cpu_us(),
            cache_hits: cache.hits,
            cache_misses: cache.misses,
            cache_evictions: cache.evictions,
            cache_bytes: cache.bytes as u64,
            archive_hits: slice.recent.hits,
            archive_misses: slice.recent.misses,
            archive_bytes: slice.recent.bytes() as u64,
            journal_commits: journal.commits(),
            journal_records: journal.records(),
            journal_bytes: journal.bytes(),
            journal_commit_us: journal.commit_us_sum(),
            journal_commit_us_max: journal.commit_us_max(),
            journal_backlog: journal.backlog_bytes(),
            journal_segments: journal.segments() as u64,
            journal_status: match journal.status() {
                Status::Open => 0,
                Status::BacklogFull => 1,
                Status::DiskFull => 2,
            },
            journal_refused: c.journal_refused,
            journal_waited: c.journal_waited,
            pep_sent: c.pep_sent,
            pep_dropped: c.pep_dropped,
            pep_waiting: slice.pep.waiting() as u64,
            caps_remembered: slice.caps.len() as u64,
            overlay_items: slice.overlay.items() as u64,
            ring_waiting: slice.warmth.waiting() as u64,
            logins_computing: self.admission.computing() as u64,
            logins_computing_bound: self.admission.places() as u64,
            gate_first: self.admission.knocks() as u64,
            gate_second: self.admission.at_second_gate() as u64,
            gate_waits: self.admission.waits.get().0,
            gate_wait_us: self.admission.waits.get().1 * 1000,
            gate_late: self.admission.late.get(),
            bosh: self.bosh.borrow().len() as u64,
            logins_slowed: self.logins_slowed.get(),
            knocks_moved: self.knocks_moved.get(),
            presence_waiting: slice.pace.waiting() as u64,
            presence_merged: slice.pace.merged,
            upload_slots: slice.uploads.counters.slots,
            upload_slots_refused: slice.uploads.counters.refused,
            push_sent: slice.push.counters.sent,
            push_failed: slice.push.counters.failed,
            push_disabled: slice.push.counters.disabled,
            push_limited: slice.push.counters.limited,
            push_waiting: slice.push.waiting() as u64,
            regrouping: slice.regrouping.len() as u64,
            components: slice.components.conns().filter(|conn| conn.up).count() as u64,
            component_joins: slice.components.counters.joins,
            component_ends: slice.components.counters.ends,
            component_conflicts: slice.components.counters.refused,
            component_stanzas_in: slice.components.counters.stanzas_in,
            component_stanzas_out: slice.components.counters.stanzas_out,
            component_queue: slice.components.waiting() as u64,
            component_slow: slice.components.counters.overflows,
            component_unreachable: slice.components.counters.unreachable,
            component_lost: slice.components.counters.lost,
        };
        if let Some(files) = self.files.as_ref().filter(|_| self.number == 0) {
            files.tell(&self.gauges);
        }
        self.gauges.publish(self.number, snapshot);
    }

    /// Makes the live loop turn, from another task of this shard.
    fn nudge(&self) {
        // a full inbox makes it turn anyway
        let _ = self.own_inbox.try_send(Inbound::Nudge);
    }

    /// Where a peer's time begins: the clock read anew and rounded up, so that it is never cut short by the turn's age.
    fn fresh_ms(&self) -> u64 {
        self.now_us().div_ceil(1000)
    }

    /// Monotonic milliseconds, as the clock was read last.
    fn now_ms(&self) -> u64 {
        self.slice.borrow().now.ms
    }

    /// Reads the clock for everything that this turn does.
    fn clock(&self) {
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let us = self.now_us();
        self.slice.borrow_mut().now = Now {
            ms: us / 1000,
            us,
            unix: unix.as_secs(),
            unix_ms: unix.as_millis() as u64,
        };
    }

    /// Monotonic microseconds of the blade: comparable between shards.
    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// While others wait at the first gate and there is no room behind it, who is silent there has to go.
    fn tick_gates(&self, now_ms: u64) {
        self.admission.tick(now_ms);
        self.wake_for_gates();
        let config = self.config.borrow().clone();
        let full = self.negotiating.get() >= config.storm.logins_begun_max;
        if !full || self.admission.knocks() == 0 {
            return;
        }
        for (_, link) in &self.links.borrow().slab {
            if let Kind::Login(login) = &link.kind
                && login.silent_ms(now_ms) > config.storm.silent_seconds_max * 1000
            {
                login.cut();
                self.gauges.logins_silent.one();
            }
        }
    }

    /// Seconds and slow things: timers of sessions, farewells that take too long, figures for whoever looks.
    async fn tick_forever(self: Rc<Self>) {
        loop {
            rt::sleep(std::time::Duration::from_millis(250)).await;
            self.clock();
            let now_ms = {
                let mut slice = self.slice.borrow_mut();
                slice.tick();
                slice.ring_tick();
                if let Some(redis) = &self.redis {
                    redis.renew_sessions(&mut slice);
                }
                slice.now.ms
            };
            self.confirm_deliveries();
            self.tick_gates(now_ms);
            self.component_tick(now_ms);
            self.bosh_tick(now_ms);
            self.publish();
            self.end_closing(now_ms);
            self.flush();
            if self.stopping.get() {
                // those who did not hang up have just been left: the live loop may end
                self.nudge();
            }
        }
    }
}

/// The slice's limits, from the configuration.
pub fn limits(config: &Config, shards: usize) -> Limits {
    let l = &config.limits;
    let sm = &config.stream_management;
    Limits {
        xml: crate::xml::Limits {
            stanza_bytes_max: l.stanza_bytes_max,
            header_bytes_max: l.stream_header_bytes_max,
            depth_max: l.depth_max as u16,
            attributes_max: l.attributes_max as u16,
        },
        resources_per_user_max: l.resources_per_user_max,
        roster_items_max: l.roster_items_max,
        roster_item_bytes_max: l.roster_item_bytes_max,
        blocked_max: l.blocked_max,
        subscription_requests_max: l.subscription_requests_max,
        directed_presence_max: l.directed_presence_max,
        record_bytes_max: (config.journal.segment_bytes - (128 << 10))
            .min(crate::store::journal::PAYLOAD_BYTES_MAX as usize),
        send_queue_bytes_max: l.send_queue_bytes_max,
        deferred_stanzas_max: l.deferred_stanzas_max,
        offline_messages_max: l.offline_messages_max,
        offline_bytes_max: l.offline_bytes_max,
        private_bytes_max: l.private_bytes_max,
        vcard_bytes_max: l.vcard_bytes_max,
        load_queue_bytes_max: l.send_queue_bytes_max,
        mesh_backlog_bytes_max: l.mesh_backlog_bytes_max,
        unacked_bytes_max: sm.unacked_bytes_max,
        unacked_stanzas_max: sm.unacked_stanzas_max,
        resume_ms_max: sm.resume_seconds_max * 1000,
        parked_max: sm.parked_max,
        ping_idle_ms: config.ping.idle_seconds * 1000,
        ping_timeout_ms: config.ping.timeout_seconds * 1000,
        registration: config.registration != crate::config::Registration::Off,
        iterations: config.sasl.iterations,
        archive_page_max: crate::xmpp::feature::archive::PAGE_MAX,
        archive_prefs_max: config.archive.preferences_max,
        archive_keep_ms: config.archive.keep_days * 24 * 3_600_000,
        archive_recent_bytes_max: config.archive.recent_bytes_max / shards.max(1),
        pubsub: crate::xmpp::pubsub::edit::Bounds {
            nodes_max: l.pubsub_nodes_max,
            items_max: l.pubsub_items_max,
            item_bytes_max: l.pubsub_item_bytes_max,
            bytes_max: l.pubsub_bytes_max,
            affiliations_max: l.pubsub_affiliations_max,
        },
        pubsub_page_items_max: l.pubsub_page_items_max,
        pep_waiting_max: l.pep_waiting_max,
        group_greetings_members_max: config.groups.last_items_members_max,
        caps_remembered_max: l.caps_remembered_max,
        rooms: room_limits(config),
        push: push_limits(config),
        upload: upload::limits(config),
    }
}

/// Unix time in seconds.
fn unix() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

fn push_limits(config: &Config) -> crate::xmpp::feature::push::Limits {
    let p = &config.push;
    crate::xmpp::feature::push::Limits {
        services_max: p.services_max,
        service_bytes_max: p.service_bytes_max,
        sender: p.sender,
        body: p.body,
        body_bytes_max: p.body_bytes_max,
        placeholder: p.placeholder.as_str().into(),
        inactive: p.inactive,
        repeat_ms: p.repeat_minutes * 60_000,
        told_max: p.told_max,
        per_second_max: p.per_second_max,
        waiting_max: p.waiting_max,
        answer_ms_max: p.answer_seconds_max * 1000,
        retry_ms: p.retry_seconds * 1000,
        tries_max: p.tries_max,
    }
}

fn room_limits(config: &Config) -> crate::xmpp::room::Limits {
    let r = &config.rooms;
    crate::xmpp::room::Limits {
        creators: match r.creation {
            RoomCreation::Anyone => None,
            RoomCreation::Admins => Some(r.admins.clone()),
        },
        rooms_max: r.rooms_max,
        per_session_max: config.limits.rooms_per_session_max,
        session_presences_per_second_max: config.limits.room_presences_per_second_max,
        occupants_max: r.occupants_max,
        affiliates_max: r.affiliations_max,
        nick_bytes_max: r.nick_bytes_max,
        subject_bytes_max: r.subject_bytes_max,
        history_max: r.history_max,
        history_bytes_max: r.history_bytes_max,
        messages_per_second_max: r.messages_per_second_max,
        presences_per_second_max: r.presences_per_second_max,
        lasting_per_owner_max: r.persistent_per_owner_max,
        lasting_max: r.persistent_max,
        left_ms: r.left_seconds * 1000,
        registrations_per_second_max: r.registrations_per_second_max,
        requests_max: r.requests_max,
        persistent: r.persistent,
        archive_keep_ms: config.rooms_keep_days() * 24 * 3_600_000,
    }
}

/// Gives a slow job to the helper threads; the answer comes by the inbox.
fn give_job(
    helpers: &crate::blade::Helpers,
    inbox: &InboxSender<Inbound>,
    ticket: Ticket,
    job: Job,
) -> bool {
    helpers.submit(inbox.clone(), ticket, job)
}
