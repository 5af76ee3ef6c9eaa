//! Figures of the blade, for whoever looks from outside. In: each shard's figures, a few times a second; events that no
//! shard counts. Out: tables for the page of `GET /metrics`. Promise: a reader never touches what a shard works with.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use super::Counter;
use super::log::LEFT_OUT;
use super::table::{About, Kind, Row};
use crate::rows;

/// A shard's row: declares each metric once, with its kind and what it means.
macro_rules! snapshot {
    ($( $(#[doc = $help:literal])+ $kind:ident $field:ident = $name:literal; )*) => {
        /// The figures of one shard at one moment.
        #[derive(Clone, Debug, Default)]
        pub struct Snapshot { $( $(#[doc = $help])+ pub $field: u64, )* }

        /// Of each shard.
        pub static SNAPSHOT: &[Row<Snapshot>] = &[ $( Row {
            about: About {
                name: $name,
                kind: Kind::$kind,
                help: concat!($($help),+),
                labels: &["shard"],
            },
            get: |s| s.$field,
        }, )* ];
    };
}

snapshot! {
    /// Sessions, those that wait to be resumed included. When they fall at once, a network is gone: look where the clients are.
    gauge sessions = "nitro_sessions";
    /// Sessions whose connection was cut and that can be resumed. When they rise at once, clients have lost their network; a
    /// storm of resumptions will follow.
    gauge parked = "nitro_sessions_parked";
    /// Connections that have not begun a session yet. When they come near limits.logins_in_progress_max, more are turned away:
    /// look at nitro_login_seconds and its parts.
    gauge negotiating = "nitro_connections_negotiating";
    /// Sessions begun. When the rate is far above the usual, clients reconnect: look at nitro_disconnects_total.
    counter binds = "nitro_binds";
    /// Sessions resumed (XEP-0198). When they are few beside nitro_binds after an outage, clients do not resume: see
    /// stream_management.resume_seconds_max.
    counter resumptions = "nitro_resumptions";
    /// Sessions that ended, for whatever reason; the log has a line with address and reason for each. When the rate is far
    /// above the usual, look for the reason that is most frequent there.
    counter disconnects = "nitro_disconnects";
    /// Connections that came from another shard because their user lives here. When it is near nitro_binds, most connects
    /// arrive at the wrong core, which is usual with two shards or more and no harm.
    counter hand_overs = "nitro_hand_overs";
    /// Messages from clients. When one shard has far more than the others, a few users make most of the traffic.
    counter messages_in = "nitro_messages_in";
    /// Messages handed to sessions. When it falls behind nitro_messages_in, look at nitro_messages_offline and nitro_bounces.
    counter messages_delivered = "nitro_messages_delivered";
    /// Messages for the offline queue. When the rate is far above the usual, many recipients are off line.
    counter messages_offline = "nitro_messages_offline";
    /// Presence stanzas from clients. When it rises without logins, clients flap: look at the network.
    counter presences_in = "nitro_presences_in";
    /// IQ stanzas from clients. When one shard has far more than the others, a client asks in a loop: `nitro session list`.
    counter iqs_in = "nitro_iqs_in";
    /// Stanzas answered by an error. When the rate is far above the usual, look at the counters of refusals beside it.
    counter bounces = "nitro_bounces";
    /// Clients cut because they did not read (limits.send_queue_bytes_max, stream_management.unacked_*). When it rises, look for
    /// clients that hang, or raise the limit.
    counter overflows = "nitro_slow_readers_cut";
    /// Stanzas refused because too much waits for one user to be loaded. When it rises, the tiers are slow or gone: look at
    /// nitro_user_read_seconds and nitro_sql_up.
    counter load_queue_full = "nitro_load_queue_full";
    /// Chat rooms in memory. When it comes near rooms.rooms_max, new ones will be refused.
    gauge rooms = "nitro_rooms";
    /// Messages that chat rooms took. When one shard has far more than the others, a few rooms make most of the traffic.
    counter room_messages = "nitro_room_messages";
    /// Stanzas of chat rooms for occupants. When it is high beside nitro_room_messages, rooms are large, or many come and go.
    counter room_deliveries = "nitro_room_deliveries";
    /// Refused by a limit of chat rooms (section `rooms` of the configuration). When it rises, somebody floods a room, or a limit
    /// is too low.
    counter room_refused = "nitro_room_refused";
    /// The most sessions that waited at once to be told what a chat room says to many, of the last minute. When it stays near
    /// the number of those who are in rooms, the shard does not keep up with its rooms: look at nitro_shard_cpu_seconds.
    gauge room_waiting_max = "nitro_room_waiting_sessions_max";
    /// Mesh messages sent to other shards. When it is far above nitro_messages_in, fan-out of presence is the traffic.
    counter mesh_sent = "nitro_mesh_messages";
    /// Mesh messages that found their way full: reading from clients stops until they are gone. When it rises, a shard is too
    /// busy: look at nitro_loop_lag_seconds of each.
    counter mesh_full = "nitro_mesh_full";
    /// Stanzas refused because too much waits for another shard (limits.mesh_backlog_bytes_max). When it rises, that shard
    /// stands still: look at its nitro_loop_lag_seconds.
    counter mesh_refused = "nitro_mesh_refused";
    /// The most mesh messages that waited at once for a full way, of the last minute. When it is not 0 often, see
    /// nitro_mesh_full_total.
    gauge mesh_kept_max = "nitro_mesh_kept_max";
    /// The most answers, commits and requests that waited at once for this shard, of the last minute. When it comes near 4096,
    /// the shard does not keep up: look at nitro_loop_lag_seconds.
    gauge inbox_max = "nitro_inbox_max";
    /// The most connections that had more to read than one turn allows, of the last minute. When it stays high, clients flood:
    /// look at nitro_messages_in_total.
    gauge unread_max = "nitro_unread_connections_max";
    /// The most connections that had ended and waited at once to be taken leave of, of the last minute. When it is high, a network
    /// or a blade was lost, or many have logged out at once: look at nitro_disconnects_total; the others' messages go on meanwhile.
    gauge leaving_max = "nitro_leaving_connections_max";
    /// The most acts (messages, changes) that waited at once for a commit of the journal, of the last minute. When it is high,
    /// look at nitro_journal_commit_seconds.
    gauge journal_waiting_max = "nitro_journal_waiting_max";
    /// Processor time of the shard's thread. When its rate is near 1 second a second, the core is full: more cores, or fewer users.
    counter cpu_us = "nitro_shard_cpu_seconds";
    /// Lookups that found the user in the cache. When their share falls, cache.bytes_max is too small for the users of a day.
    counter cache_hits = "nitro_cache_hits";
    /// Lookups that did not. When they rise beside nitro_cache_evictions, raise cache.bytes_max.
    counter cache_misses = "nitro_cache_misses";
    /// Users evicted from the cache. When it rises steadily, raise cache.bytes_max.
    counter cache_evictions = "nitro_cache_evictions";
    /// Bytes of the cache. When they stay at the share of cache.bytes_max, users are evicted: look at nitro_cache_evictions.
    gauge cache_bytes = "nitro_cache_bytes";
    /// Archive pages that were answered from memory. When they are few, see nitro_archive_misses.
    counter archive_hits = "nitro_archive_hits";
    /// Archive pages that were read from the database. When they are many beside nitro_archive_hits and nitro_archive_bytes
    /// stands at archive.recent_bytes_max, raise that; when it does not, clients read old messages, which is no harm.
    counter archive_misses = "nitro_archive_misses";
    /// Bytes of recent messages of archives in memory. When it stands at archive.recent_bytes_max, see nitro_archive_misses.
    gauge archive_bytes = "nitro_archive_bytes";
    /// Groups of changes that the journal has synced. When it stands still while nitro_journal_waiting_max rises, the disk hangs.
    counter journal_commits = "nitro_journal_commits";
    /// Changes in them. When it rises without messages, clients change rosters or documents in a loop.
    counter journal_records = "nitro_journal_records";
    /// Their bytes, before whole blocks are filled up. When the rate comes near what the disk can sync, give journal.dir a disk
    /// of its own.
    counter journal_bytes = "nitro_journal_bytes";
    /// Microseconds from handing groups over to their being durable, all together; nitro_journal_commit_seconds says more.
    /// When it grows faster than nitro_journal_commits, the disk gets slower.
    counter journal_commit_us = "nitro_journal_commit_microseconds";
    /// The slowest of them since the start. When it grows, the disk is at its limit: clients wait as long for their
    /// acknowledgements.
    gauge journal_commit_us_max = "nitro_journal_commit_microseconds_max";
    /// Bytes that the database does not have yet. When it grows, the database is away or too slow; at
    /// journal.backlog_bytes_max new messages are refused.
    gauge journal_backlog = "nitro_journal_backlog_bytes";
    /// Files of the journal that hold changes. When they grow, see nitro_journal_backlog_bytes; they need disk.
    gauge journal_segments = "nitro_journal_segments";
    /// 0: open; 1: full, the backlog's bound is reached; 2: full, the disk is. When it is not 0, new messages and changes are
    /// refused: bring the database back, or make room on the disk.
    gauge journal_status = "nitro_journal_status";
    /// Messages and changes refused because the journal was full. When it rises, see nitro_journal_status.
    counter journal_refused = "nitro_journal_refused";
    /// Subscriptions, durable at their sender, that had to wait until the recipient's full journal had room. When it rises, see
    /// nitro_journal_status.
    counter journal_waited = "nitro_journal_waited";
    /// Notifications of nodes (XEP-0163: avatars, moods, device lists, bookmarks) sent. When the rate is far above that of messages, a
    /// client publishes in a loop.
    counter pep_sent = "nitro_pep_notifications";
    /// Contacts of whose nodes somebody who has come does not hear, because too many waited to be read (limits.pep_waiting_max).
    /// When it rises, many have come at once: their avatars come when they are published again, or at the next login.
    counter pep_dropped = "nitro_pep_greetings_dropped";
    /// Contacts whose nodes wait to be read for somebody who has come. When it stays high, the database is slow: look at
    /// nitro_sql_read_seconds.
    gauge pep_waiting = "nitro_pep_greetings_waiting";
    /// Capabilities of clients that are remembered (XEP-0115). When it stays at limits.caps_remembered_max, clients announce ever
    /// new ones, and each is asked for them.
    gauge caps_remembered = "nitro_caps_remembered";
    /// Changes that the database does not have yet and the shard remembers. When they grow, see nitro_journal_backlog_bytes; each
    /// takes about 140 bytes of memory.
    gauge overlay_items = "nitro_overlay_items";
    /// Users whose copies in Redis wait to be written or answered; the database gets their changes after that. When they
    /// grow, look at nitro_redis_state.
    gauge ring_waiting = "nitro_redis_waiting";
    /// Logins that compute at the moment. When they stay at nitro_logins_computing_bound, logins wait: that is usual in a storm.
    gauge logins_computing = "nitro_logins_computing";
    /// Logins that may compute at a time, as control has found (storm.lag_us_target). When it is at its floor
    /// (storm.logins_computing_min), the shard is at its limit, or something else takes its core.
    gauge logins_computing_bound = "nitro_logins_computing_bound";
    /// Accepted connections that wait unread for their turn to log in; they grow in a storm. When they do not shrink again, see
    /// nitro_gate_refused.
    gauge gate_first = "nitro_gate_first_waiting";
    /// Logins that have named their user and wait for their turn. When they do not shrink again after a storm, look at
    /// nitro_user_read_seconds.
    gauge gate_second = "nitro_gate_second_waiting";
    /// Waits at the gates that ended. When the rate is far below that of nitro_binds, few had to wait.
    counter gate_waits = "nitro_gate_waits";
    /// These waits together: divide by nitro_gate_waits. When that grows beyond what clients bear, see nitro_gate_refused.
    counter gate_wait_us = "nitro_gate_wait_seconds";
    /// Connections refused because they waited longer than storm.wait_seconds_max. When it rises, more cores are needed, or a
    /// higher storm.lag_us_target.
    counter gate_late = "nitro_gate_refused";
    /// Sessions of BOSH that the shard keeps. When it comes near web.bosh_sessions_max, more are turned away.
    gauge bosh = "nitro_bosh_sessions";
    /// Logins held back or refused because their account logs in too often (storm.account_logins_per_minute). When it rises, a
    /// client reconnects in a loop: the log says which.
    counter logins_slowed = "nitro_logins_slowed";
    /// Connections that were accepted here and went to a shard where fewer waited. When one shard has most of them, the kernel
    /// spreads connects unevenly: that is evened out here.
    counter knocks_moved = "nitro_gate_moved";
    /// Sessions for which presence of others waits for a turn with room. When they stay many, look at nitro_loop_lag_seconds.
    gauge presence_waiting = "nitro_presence_waiting";
    /// Presences that were never sent because a newer one of the same full JID came while they waited. When it rises without a
    /// storm, clients change their presence in a loop.
    counter presence_merged = "nitro_presence_merged";
    /// Slots for uploads that were given (XEP-0363). When it is far above nitro_uploads, clients cannot reach the address in upload.url.
    counter upload_slots = "nitro_upload_slots";
    /// Requests for slots that were refused: too large, or a quota is used up (section `upload` of the configuration). When it rises, look
    /// whether the limits fit what people send.
    counter upload_slots_refused = "nitro_upload_slots_refused";
    /// Push notifications published to app servers (XEP-0357). When it is high beside nitro_messages_offline, users come and go:
    /// push.repeat_minutes bounds the rest.
    counter push_sent = "nitro_push_sent";
    /// Push notifications that an app server refused or did not answer in time (push.answer_seconds_max). When it rises, look at
    /// nitro_component_connections: the app server may be away.
    counter push_failed = "nitro_push_failed";
    /// Push services that were disabled because they refuse notifications (push.tries_max). When many are at once, an app server has
    /// lost its nodes: its clients enable them again at their next login. The log says which.
    counter push_disabled = "nitro_push_disabled";
    /// Push services and notifications left out by a limit (push.services_max, push.waiting_max). When it rises, see
    /// nitro_push_waiting.
    counter push_limited = "nitro_push_limited";
    /// Push notifications that wait for an answer or for another try. When it comes near push.waiting_max, an app server is away
    /// or slow.
    gauge push_waiting = "nitro_push_waiting";
    /// Users on line who wait to be told of a change of the groups (groups.file). When they do not go down after a reload, the group
    /// is large and many are on line: each is told of each, piece by piece.
    gauge regrouping = "nitro_group_changes_waiting";
    /// Connections of components that serve their names. When it falls, a component or its network is gone: `nitro component list`
    /// and the log say which.
    gauge components = "nitro_component_connections";
    /// Connections of components that came to serve their names. When it rises steadily, a component reconnects in a loop: the log
    /// has the reason for each end.
    counter component_joins = "nitro_component_connects";
    /// Connections of components that ended after their handshake. When it rises, see nitro_component_connects.
    counter component_ends = "nitro_component_disconnects";
    /// Connections of components refused because another one serves the name. When it rises, a component runs twice, or its old
    /// connection hangs: see component.policy and component.timeout_seconds.
    counter component_conflicts = "nitro_component_conflicts";
    /// Stanzas from components. When it is far above the usual, a component floods: look at nitro_loop_lag_seconds of its shard.
    counter component_stanzas_in = "nitro_component_stanzas_in";
    /// Stanzas for components, handed to their connections. When it stands still while nitro_component_queue_bytes is not 0, a
    /// component does not read.
    counter component_stanzas_out = "nitro_component_stanzas_out";
    /// Bytes that wait for components which do not read. When it stays near component.queue_bytes_max, the component is too slow:
    /// give its name more connections (component.policy).
    gauge component_queue = "nitro_component_queue_bytes";
    /// Stanzas refused because a component did not keep up (component.queue_bytes_max). When it rises, see
    /// nitro_component_queue_bytes.
    counter component_slow = "nitro_component_slow_refused";
    /// Stanzas refused because no connection serves the component's name. When it rises, start the component: `nitro component
    /// list` shows those that are there.
    counter component_unreachable = "nitro_component_unreachable";
    /// Stanzas returned because a component's connection ended before it took them. When it rises, see
    /// nitro_component_disconnects.
    counter component_lost = "nitro_component_returned";
}

/// Figures of the whole blade.
pub struct Gauges {
    ready: AtomicUsize,
    shards: Vec<Mutex<Snapshot>>,
    /// Accepts that failed because descriptors or memory were exhausted.
    pub accept_failures: Counter,
    /// Connections turned away by a limit.
    pub turned_away: Counter,
    /// Attempts to authenticate that were refused.
    pub auth_failures: Counter,
    /// Logins cut because their clients were silent while others waited.
    pub logins_silent: Counter,
    /// Files that were put, and what of bodies came and went.
    pub upload_files: Counter,
    pub upload_bytes_in: Counter,
    pub upload_bytes_out: Counter,
    /// Bodies that were refused.
    pub upload_refused: Counter,
    /// Transfers at the moment, and bytes of all files.
    pub upload_transfers: AtomicU64,
    pub upload_bytes: AtomicU64,
    /// HTTP requests with a head that is one.
    pub http_requests: Counter,
    /// Refused by a bound of HTTP, or because they are no HTTP.
    pub http_refused: Counter,
    /// Pages of other hosts.
    pub http_origins_refused: Counter,
    /// Opened.
    pub websockets: Counter,
    /// Sessions of requests that were begun.
    pub bosh_sessions: Counter,
    /// Requests for sessions that there are not.
    pub bosh_unknown: Counter,
    /// Sessions ended because their client broke the protocol.
    pub bosh_refused: Counter,
    /// XEP-0484.
    pub token_logins: Counter,
    pub tokens_given: Counter,
    pub tokens_evicted: Counter,
    /// XEP-0178.
    pub certificate_logins: Counter,
    pub client_certificates_refused: Counter,
    pub tls_resumed: Counter,
}

/// Of the blade.
pub static GAUGES: &[Row<Gauges>] = rows! { Gauges, &[];
    /// Shards that listen. When they are fewer than the cores in use, the server is starting, or a shard has died: look into
    /// the log.
    gauge "nitro_shards_ready" => |g| g.shards_ready() as u64;
    /// Accepts that failed for lack of descriptors or memory. When it rises, raise the hard limit on open files (ulimit -Hn).
    counter "nitro_accept_failures" => |g| g.accept_failures.get();
    /// Connections turned away by a limit of connections. When it rises, look which address has too many, or raise the limits
    /// of connections in the section `limits`.
    counter "nitro_turned_away" => |g| g.turned_away.get();
    /// Attempts to authenticate that were refused. When the rate is far above the usual, somebody guesses passwords: the log has
    /// the addresses, config/fail2ban a filter for them.
    counter "nitro_auth_failures" => |g| g.auth_failures.get();
    /// Logins cut because their clients were silent while others waited (storm.silent_seconds_max). When it rises without a storm,
    /// somebody opens connections and says nothing: look at their addresses.
    counter "nitro_logins_silent" => |g| g.logins_silent.get();
    /// Files that were uploaded (XEP-0363). When it stands still while nitro_upload_slots rises, clients cannot reach upload.url.
    counter "nitro_uploads" => |g| g.upload_files.get();
    /// Bytes of them. When it rises fast, somebody fills the disk: upload.user_bytes_per_day_max bounds each user.
    counter "nitro_upload_received_bytes" => |g| g.upload_bytes_in.get();
    /// Bytes that were downloaded. When it is near what the network bears, move the files behind a cache: they never change.
    counter "nitro_upload_sent_bytes" => |g| g.upload_bytes_out.get();
    /// Bodies that were refused: wrong token, length or type, expired or used slots, quotas, too many at once
    /// (upload.transfers_max, upload.transfers_per_address_max). When it rises, the log of the reverse proxy says who.
    counter "nitro_uploads_refused" => |g| g.upload_refused.get();
    /// Files that come or go at the moment. When they stay at upload.transfers_max, others are turned away.
    gauge "nitro_upload_transfers" => |g| g.upload_transfers.load(Relaxed);
    /// Bytes of all files, counted in the background after the start. When they come near upload.bytes_max, nothing more is taken.
    gauge "nitro_upload_files_bytes" => |g| g.upload_bytes.load(Relaxed);
    /// HTTP requests. When the rate is far above the usual, a page or a probe asks in a loop.
    counter "nitro_http_requests" => |g| g.http_requests.get();
    /// HTTP requests refused because they were malformed, too large or too slow. When it rises, somebody tries something, or a
    /// proxy sends larger heads than limits.http_head_bytes_max.
    counter "nitro_http_refused" => |g| g.http_refused.get();
    /// HTTP requests of web pages that web.origins does not allow. When it rises, a page was moved, or somebody tries to use the
    /// sessions of others.
    counter "nitro_http_origins_refused" => |g| g.http_origins_refused.get();
    /// WebSockets opened. When it rises without nitro_binds, pages connect and cannot log in: look at nitro_auth_failures.
    counter "nitro_websockets_opened" => |g| g.websockets.get();
    /// Sessions of BOSH begun. When it rises without nitro_binds, pages connect and cannot log in: look at nitro_auth_failures.
    counter "nitro_bosh_sessions_begun" => |g| g.bosh_sessions.get();
    /// Requests of BOSH for sessions that there are not. When it rises, pages come back after web.bosh_inactivity_seconds_max, or
    /// somebody guesses ids: each guess is held back longer.
    counter "nitro_bosh_unknown" => |g| g.bosh_unknown.get();
    /// Sessions of BOSH ended because their client broke the protocol: request ids out of the window, polling too often. When it
    /// rises, look which client it is.
    counter "nitro_bosh_refused" => |g| g.bosh_refused.get();
    /// Attempts to log in with a token instead of a password (XEP-0484), right or wrong. When it rises with nitro_auth_failures, tokens
    /// have ended (changed passwords, a new secret) or somebody guesses. When it falls against the logins, clients lose
    /// their tokens: look at nitro_tokens_given and nitro_tokens_evicted.
    counter "nitro_token_logins" => |g| g.token_logins.get();
    /// Tokens given to clients; each is a write of its account. When it rises to the number of logins, clients ask anew each time instead
    /// of using what they have.
    counter "nitro_tokens_given" => |g| g.tokens_given.get();
    /// Tokens that went because their account has too many (limits.tokens_per_user_max). When it rises, users have more clients than
    /// that, or a client makes up a new installation each time.
    counter "nitro_tokens_evicted" => |g| g.tokens_evicted.get();
    /// Attempts to log in with a client's certificate (XEP-0178), of accounts that there are. When it rises with nitro_auth_failures,
    /// certificates name accounts that are disabled: have them revoked.
    counter "nitro_certificate_logins" => |g| g.certificate_logins.get();
    /// Certificates of clients that did not hold: expired, revoked, or of an authority that is not in tls.client_ca. Their clients may
    /// log in otherwise. When it rises at once, a list in tls.client_crl is out of date; the log has the reason of each.
    counter "nitro_client_certificates_refused" => |g| g.client_certificates_refused.get();
    /// TLS handshakes for XMPP that resumed an earlier session of TLS, without keys and certificates; all of them are
    /// nitro_tls_handshake_seconds. When few are in a storm of clients that come back, their libraries keep no tickets, or the
    /// server was started or reloaded meanwhile: that ends all tickets.
    counter "nitro_tls_resumptions" => |g| g.tls_resumed.get();
    /// Warnings and errors that were left out of the log because the same was said too often. When it rises, look what is said.
    counter "nitro_log_lines_left_out" => |_| LEFT_OUT.get();
};

impl Gauges {
    pub fn new(shards: usize) -> Gauges {
        Gauges {
            ready: AtomicUsize::new(0),
            shards: (0..shards).map(|_| Mutex::default()).collect(),
            accept_failures: Counter::new(),
            turned_away: Counter::new(),
            auth_failures: Counter::new(),
            logins_silent: Counter::new(),
            upload_files: Counter::new(),
            upload_bytes_in: Counter::new(),
            upload_bytes_out: Counter::new(),
            upload_refused: Counter::new(),
            upload_transfers: AtomicU64::new(0),
            upload_bytes: AtomicU64::new(0),
            http_requests: Counter::new(),
            http_refused: Counter::new(),
            http_origins_refused: Counter::new(),
            websockets: Counter::new(),
            bosh_sessions: Counter::new(),
            bosh_unknown: Counter::new(),
            bosh_refused: Counter::new(),
            token_logins: Counter::new(),
            tokens_given: Counter::new(),
            tokens_evicted: Counter::new(),
            certificate_logins: Counter::new(),
            client_certificates_refused: Counter::new(),
            tls_resumed: Counter::new(),
        }
    }

    /// A shard listens.
    pub fn shard_is_ready(&self) {
        self.ready.fetch_add(1, Relaxed);
    }

    pub fn shards_ready(&self) -> usize {
        self.ready.load(Relaxed)
    }

    /// Do all shards listen?
    pub fn all_ready(&self) -> bool {
        self.shards_ready() >= self.shards.len()
    }

    pub fn publish(&self, shard: usize, snapshot: Snapshot) {
        if let Ok(mut place) = self.shards[shard].lock() {
            *place = snapshot;
        }
    }

    /// The newest figures of each shard.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        let of = |place: &Mutex<Snapshot>| place.lock().map(|s| s.clone()).unwrap_or_default();
        self.shards.iter().map(of).collect()
    }
}
