//! The one typed configuration.
//!
//! In flows: built-in defaults, then a TOML file, then `--set key=value` overrides. Out flows: a [`Config`] whose every
//! value has been checked, or ONE sentence that names the key, the place and the mend.
//!
//! Promise: the table in `keys!` is the single source. The struct, its defaults, the parser, the reload rules and
//! `config/nitro.toml` come from it and cannot disagree. This module knows no other.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::IpNet;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Writes the structs, defaults, setters and the table [`KEYS`] from one list.
///
/// A row is `live|restart name: type = default => range;` where `live` keys take effect on SIGHUP and the range
/// (numbers only) is inclusive. Lists may be empty unless the text says otherwise.
macro_rules! keys {
    (
        { $( $(#[doc = $tdoc:literal])* $tmark:ident $tkey:ident : $tty:ty = $tdef:expr $(=> $trange:expr)?; )* }
        $(
            #[doc = $sdoc:literal]
            $section:ident : $Section:ident {
                $( $(#[doc = $doc:literal])* $mark:ident $key:ident : $ty:ty = $def:expr $(=> $range:expr)?; )*
            }
        )*
    ) => {
        /// The whole configuration of a blade. Every field is the TOML key of the same name.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Config {
            $( $(#[doc = $tdoc])* pub $tkey: $tty, )*
            $( #[doc = $sdoc] pub $section: $Section, )*
        }
        $(
            #[doc = $sdoc]
            #[derive(Debug, Clone, PartialEq)]
            pub struct $Section { $( $(#[doc = $doc])* pub $key: $ty, )* }
        )*

        impl Default for Config {
            fn default() -> Self {
                Config {
                    $( $tkey: $tdef, )*
                    $( $section: $Section { $( $key: $def, )* }, )*
                }
            }
        }

        /// Every key, in the order of `config/nitro.toml`.
        pub static KEYS: &[Key] = &[
            $( Key {
                name: stringify!($tkey), section: "", section_doc: "", doc: &[$($tdoc),*],
                live: mark!($tmark), range: || range_text(&[$(<$tty as Value>::bounds(&$trange)),*]),
                show: |c| c.$tkey.show(),
                set: |c, v| { c.$tkey = <$tty as Value>::read(v)?; $( within(&c.$tkey, &$trange)?; )? Ok(()) },
                copy: |from, to| to.$tkey = from.$tkey.clone(),
            }, )*
            $( $( Key {
                name: concat!(stringify!($section), ".", stringify!($key)),
                section: stringify!($section), section_doc: $sdoc, doc: &[$($doc),*],
                live: mark!($mark), range: || range_text(&[$(<$ty as Value>::bounds(&$range)),*]),
                show: |c| c.$section.$key.show(),
                set: |c, v| {
                    c.$section.$key = <$ty as Value>::read(v)?;
                    $( within(&c.$section.$key, &$range)?; )?
                    Ok(())
                },
                copy: |from, to| to.$section.$key = from.$section.$key.clone(),
            }, )* )*
        ];
    };
}

macro_rules! mark {
    (live) => {
        true
    };
    (restart) => {
        false
    };
}

keys! {
    {
        /// The XMPP domain that this server serves: the part of every address behind the `@`.
        restart domain: String = "localhost".into();
        /// The folder of everything that must survive: database, generated certificate, lock and admin socket. It is made
        /// at the first start. A relative path starts at the current folder.
        restart data_dir: PathBuf = "./data".into();
        /// Where permanent data is kept: `sqlite:PATH`, `mysql://USER:PASSWORD@HOST/NAME` (MySQL 8, MariaDB 10.11 or newer) or
        /// `mysql://USER@localhost/NAME?socket=PATH`. Empty: the SQLite file `nitro.db` in `data_dir`.
        restart database: String = String::new();
        /// The cores to use, one shard on each: "all", or numbers and spans such as "0-3" or "0,2". "all" means the cores
        /// that this process may run on.
        restart cores: Cores = Cores::All;
        /// Who may make an account in-band (XEP-0077): "off", "loopback" (clients on the same machine, never through a
        /// proxy) or "on" (everybody, within `limits.registrations_per_address_per_hour`).
        live registration: Registration = Registration::Loopback;
        /// Networks of the proxies whose PROXY v2 header is believed and required (for HTTP see `web.proxies`). A client that
        /// comes through one of them is never loopback.
        live trusted_proxies: Vec<IpNet> = Vec::new();
    }

    /// Connections of clients.
    c2s: C2s {
        /// Addresses for clients that start in the clear and upgrade with STARTTLS (RFC 6120). An address of a family that
        /// this machine does not have (IPv6 switched off) is skipped with a warning. Port 0 takes a free one.
        restart listen: Vec<SocketAddr> = addresses(&["0.0.0.0:5222", "[::]:5222"]);
        /// Addresses for clients that begin with TLS at once (XEP-0368).
        restart listen_tls: Vec<SocketAddr> = addresses(&["0.0.0.0:5223", "[::]:5223"]);
        /// Whether a client must use TLS before it may authenticate (RFC 7590).
        live require_tls: bool = true;
        /// Connects that the kernel keeps waiting for each listener.
        restart backlog: usize = 4096 => 1..=65_535;
    }

    /// Components (XEP-0114): programs that serve names of their own (see "Components" in README.md).
    component: Component {
        /// Addresses for components; a component may run on another machine. The protocol is in the clear: keep it on loopback, in a
        /// network of its own or in a tunnel. Empty: none.
        restart listen: Vec<SocketAddr> = Vec::new();
        /// Whether connections from `trusted_proxies` begin with a PROXY v2 header at these addresses, too, as they must at those of
        /// clients. Others connect without one.
        live proxy: bool = false;
        /// The names that components serve, subdomains or any others, and the secret of each: `"irc.example.com" = "secret"`, or
        /// `"irc.example.com" = { secret_file = "/etc/nitro/irc.secret", policy = "share" }` (or `secret`; a policy of its own may
        /// be left out). SIGHUP reads the files again: connections that stand go on, those of a name that is gone end.
        live hosts: ComponentHosts = ComponentHosts::default();
        /// What happens to a further connection for a name: "refuse" (it gets `<conflict/>`), "replace" (the older one gets it) or
        /// "share": each sender's stanzas go to one of the connections, by consistent hashing of the bare JID.
        live policy: ComponentPolicy = ComponentPolicy::Refuse;
        /// Connections of one name where they share it.
        live shared_max: usize = 16 => 1..=1000;
        /// Connections of one shard at these addresses; more are turned away with `<resource-constraint/>`.
        live connections_max: usize = 256 => 1..=100_000;
        /// Bytes that wait for a component that does not read; stanzas beyond it are answered with `<resource-constraint/>`. Four times
        /// as many may come at once for one that does.
        live queue_bytes_max: usize = 4_194_304 => 65_536..=1_073_741_824;
        /// Seconds without a stanza after which a component is sent white space, so that a dead connection shows.
        live keepalive_seconds: u64 = 60 => 1..=86_400;
        /// Seconds in which a component's machine must acknowledge something of what it was sent; then the connection is cut.
        live timeout_seconds: u64 = 60 => 1..=3600;
    }

    /// Groups that an administrator keeps: everybody in one has everybody else in his roster (see "Shared groups" in README.md).
    groups: Groups {
        /// CSV with the columns `group`, `username` and, if wanted, `name` (what contacts see). SIGHUP and `nitro group reload` read
        /// it again. Empty: no groups.
        live file: PathBuf = PathBuf::new();
        /// Members of one group.
        live members_max: usize = 5000 => 1..=100_000;
        /// Rows of the file: members of all groups together.
        live memberships_max: usize = 200_000 => 1..=10_000_000;
        /// Whoever comes on line is told the last items (mood, avatar and other nodes, XEP-0163) of all members of his groups up to this
        /// size, and of no member of larger ones: those he hears when they change.
        live last_items_members_max: usize = 100 => 0..=100_000;
    }

    /// The HTTP door: health checks and metrics. It has no authentication: keep it on loopback.
    http: Http {
        /// Addresses to listen on.
        restart listen: Vec<SocketAddr> = addresses(&["127.0.0.1:5280", "[::1]:5280"]);
    }

    /// HTTP for clients, apart from the operators' door (see "Web" in README.md).
    web: Web {
        /// Addresses for plain HTTP, for a reverse proxy. Empty: none.
        restart listen: Vec<SocketAddr> = Vec::new();
        /// Addresses for HTTPS, with the certificate of section `tls`. Empty: none.
        restart listen_tls: Vec<SocketAddr> = Vec::new();
        /// Networks of the reverse proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed. A client that comes through
        /// one of them is never loopback; a proxy that is not named here passes for its clients, loopback included.
        live proxies: Vec<IpNet> = Vec::new();
        /// Origins of other hosts whose pages may come, e.g. ["https://desk.example.com"], or ["*"]: all. A page of the host that it asks
        /// (`Host`, `Origin`) always may; others get 403.
        live origins: Vec<String> = Vec::new();
        /// Where clients find WebSocket, for host-meta (XEP-0156), e.g. "wss://chat.example.com/ws". Empty: the first port of
        /// `web.listen_tls` under the name of `domain`.
        live websocket_url: String = String::new();
        /// Where clients find BOSH, e.g. "https://chat.example.com/bosh". Empty: as above.
        live bosh_url: String = String::new();
        /// BOSH sessions of one shard at the same time; more get 503 with `Retry-After`.
        live bosh_sessions_max: usize = 10_000 => 1..=10_000_000;
        /// Bytes of the body of one BOSH request; more get 413.
        live bosh_body_bytes_max: usize = 524_288 => 16_384..=16_777_216;
        /// Seconds that a BOSH request waits for something to say at most (`wait`).
        live bosh_wait_seconds_max: u64 = 60 => 1..=600;
        /// Seconds that a BOSH session may be without a request (`inactivity`).
        live bosh_inactivity_seconds_max: u64 = 60 => 5..=3600;
        /// Seconds that a BOSH session may be paused (`maxpause`).
        live bosh_pause_seconds_max: u64 = 120 => 5..=3600;
        /// Seconds between empty requests of a BOSH client that polls (`polling`); faster ones end with `policy-violation`.
        live bosh_polling_seconds_min: u64 = 2 => 0..=60;
        /// HTTP connections of clients of one shard at the same time; more are closed.
        live connections_max: usize = 10_000 => 1..=10_000_000;
        /// Seconds that a connection stays open between two requests.
        live idle_seconds_max: u64 = 60 => 1..=3600;
    }

    /// Certificate and versions of TLS.
    tls: Tls {
        /// The certificate chain, PEM, leaf first. Empty: a self-signed certificate `certificate.pem` in `data_dir`, made at
        /// the first start. SIGHUP reads the file again.
        live certificate: PathBuf = PathBuf::new();
        /// The private key, PEM. Empty exactly when `tls.certificate` is: then `key.pem` in `data_dir`, mode 0600.
        live key: PathBuf = PathBuf::new();
        /// The oldest TLS version that is accepted: "1.2" or "1.3".
        live version_min: TlsVersion = TlsVersion::V1_2;
        /// Whoever has a certificate that these authorities have signed logs in with it (SASL EXTERNAL, XEP-0178): PEM, with
        /// all authorities in one file. Empty: clients are asked for no certificate. SIGHUP reads the file again.
        live client_ca: PathBuf = PathBuf::new();
        /// Files with the lists of certificates that these authorities have revoked, PEM or DER. With any, there must be a list that
        /// is not out of date of each authority in a client's chain. SIGHUP reads the files again.
        live client_crl: Vec<PathBuf> = Vec::new();
        /// Whether a certificate without an XMPP address stands for the account that is called like its e-mail address.
        live client_email: bool = false;
    }

    /// Authentication.
    sasl: Sasl {
        /// PBKDF2 iterations of the SCRAM keys of new passwords. Existing accounts keep theirs until the password changes.
        live iterations: u32 = 10_000 => 4096..=10_000_000;
        /// Milliseconds that the answer to a client's first message takes at least, so that its time does not tell whether
        /// the account exists or is cached: a little more than a query of the database takes.
        live answer_ms_min: u64 = 3 => 0..=1000;
        /// The mechanisms that are offered. Those with channel binding (-PLUS) and PLAIN need TLS anyway, EXTERNAL a client's
        /// certificate (tls.client_ca).
        live mechanisms: Vec<String> = MECHANISMS.iter().map(|m| m.to_string()).collect();
        /// Whether authentication, binding and resumption in one step (XEP-0388, XEP-0386) are offered over TLS, beside the older
        /// way.
        live sasl2: bool = true;
        /// Days that a token is valid with which a client logs in instead of a password (XEP-0484); it is replaced long before.
        /// 0: none are given or taken. A new password ends all.
        live token_days: u64 = 21 => 0..=365;
    }

    /// What the server bears. Every limit is counted in the metrics when it is hit.
    limits: Limits {
        /// Networks to which limits per address do not apply (bank proxies, load testers).
        live exempt: Vec<IpNet> = networks(&["127.0.0.0/8", "::1/128"]);

        /// Bytes of one stanza; more ends the stream with `<policy-violation/>` (RFC 6120 4.9.3.14 and 13.12: at least
        /// 10000).
        live stanza_bytes_max: usize = 262_144 => 10_000..=16_777_216;
        /// Bytes of a stanza before authentication.
        live unauthenticated_stanza_bytes_max: usize = 16_384 => 10_000..=1_048_576;
        /// Bytes of a stream header.
        live stream_header_bytes_max: usize = 4096 => 1024..=65_536;
        /// How deep elements may be nested in a stanza.
        live depth_max: usize = 64 => 8..=1000;
        /// Attributes of one element.
        live attributes_max: usize = 64 => 8..=1000;

        /// Connections of the whole blade.
        live connections_max: usize = 200_000 => 1..=10_000_000;
        /// Connections from one address (an IPv6 /64 counts as one).
        live connections_per_address_max: usize = 1000 => 1..=10_000_000;
        /// Connections from one address that have not authenticated yet.
        live unauthenticated_per_address_max: usize = 100 => 1..=10_000_000;
        /// Seconds from connect to a bound session; later the stream ends with `<connection-timeout/>`.
        live auth_seconds_max: u64 = 30 => 1..=600;
        /// Failed attempts to authenticate on one connection, then it ends with `<policy-violation/>`.
        live auth_attempts_max: usize = 3 => 1..=100;
        /// Milliseconds that the first failure of an address or account is held back; doubles with each further one.
        live auth_failure_delay_ms: u64 = 250 => 0..=60_000;
        /// Milliseconds that a failure is held back at most.
        live auth_failure_delay_ms_max: u64 = 8000 => 0..=600_000;
        /// Addresses and accounts whose failures are remembered, for each shard; the oldest are forgotten.
        live auth_failures_remembered_max: usize = 10_000 => 100..=10_000_000;
        /// Passwords (PLAIN, registration) that wait for the helper thread which computes their keys.
        restart password_checks_waiting_max: usize = 1000 => 1..=1_000_000;
        /// Connections of one shard that have not begun a session yet; more are turned away with `<resource-constraint/>`.
        live logins_in_progress_max: usize = 20_000 => 1..=10_000_000;
        /// Accounts made in-band from one address in an hour.
        live registrations_per_address_per_hour: usize = 10 => 1..=1_000_000;

        /// Sessions of one user at the same time.
        live resources_per_user_max: usize = 16 => 1..=1000;
        /// Tokens of one user (XEP-0484); beyond it the oldest go, and their clients are asked for the password again.
        live tokens_per_user_max: usize = 16 => 2..=100;
        /// Contacts in one roster.
        live roster_items_max: usize = 2000 => 1..=100_000;
        /// Bytes of one contact's name and groups together.
        live roster_item_bytes_max: usize = 4096 => 256..=65_536;
        /// Addresses in one block list.
        live blocked_max: usize = 1000 => 1..=100_000;
        /// Subscription requests that wait for one user's answer.
        live subscription_requests_max: usize = 500 => 1..=100_000;
        /// Addresses to which one session may have sent directed presence.
        live directed_presence_max: usize = 500 => 1..=100_000;
        /// Chat rooms that one session is in.
        live rooms_per_session_max: usize = 200 => 1..=100_000;
        /// Presences of one session for chat rooms in a second, on average: coming in, changes, other nicknames; twelve times as
        /// many at once. More are refused with `<resource-constraint/>`.
        live room_presences_per_second_max: u32 = 50 => 1..=1_000_000;
        /// Messages kept for a user who is off line (XEP-0160).
        live offline_messages_max: usize = 1000 => 0..=1_000_000;
        /// Bytes of messages kept for a user who is off line.
        live offline_bytes_max: usize = 4_194_304 => 0..=1_073_741_824;
        /// Bytes of all that one user keeps in private storage (XEP-0049).
        live private_bytes_max: usize = 65_536 => 1024..=16_777_216;
        /// Bytes of a vCard, photo included (XEP-0054).
        live vcard_bytes_max: usize = 196_608 => 1024..=16_777_216;
        /// Nodes of one user (XEP-0163); beyond it `<conflict/>` with `<max-nodes-exceeded/>`.
        live pubsub_nodes_max: usize = 100 => 1..=1000;
        /// Items of one node, whatever its configuration says; then the oldest goes.
        live pubsub_items_max: usize = 1000 => 1..=100_000;
        /// Bytes of one item; beyond it `<not-acceptable/>` with `<payload-too-big/>`.
        live pubsub_item_bytes_max: usize = 196_608 => 1024..=4_194_304;
        /// Bytes of all items and nodes of one user; beyond it `<policy-violation/>`.
        live pubsub_bytes_max: usize = 1_048_576 => 4096..=8_388_608;
        /// Addresses in the list of affiliations of one node; beyond it `<resource-constraint/>`.
        live pubsub_affiliations_max: usize = 100 => 1..=10_000;
        /// Items in one answer; the others are on further pages (XEP-0059).
        live pubsub_page_items_max: usize = 500 => 1..=10_000;
        /// Contacts of one shard whose nodes wait to be read for somebody who has come (each contact counts for each who has come); he
        /// does not hear of those beyond.
        live pep_waiting_max: usize = 10_000 => 1..=1_000_000;
        /// Capabilities of clients (XEP-0115) that one shard remembers; the oldest that no session uses goes.
        live caps_remembered_max: usize = 10_000 => 16..=1_000_000;

        /// Bytes queued for a client that does not read; then it is disconnected, or parked if it can resume.
        live send_queue_bytes_max: usize = 2_097_152 => 65_536..=1_073_741_824;
        /// Stanzas held back for an inactive client (XEP-0352); then they are sent all the same.
        live deferred_stanzas_max: usize = 500 => 1..=100_000;

        /// Batches in the queue from one shard to another.
        restart mesh_queue_batches_max: usize = 1024 => 64..=65_536;
        /// Bytes that one shard keeps back for another one whose queue is full (meanwhile it reads no client); beyond it
        /// stanzas for that shard are refused with `<resource-constraint/>`.
        live mesh_backlog_bytes_max: usize = 67_108_864 => 1_048_576..=17_179_869_184;

        /// HTTP connections of operators at the same time.
        live http_connections_max: usize = 256 => 1..=100_000;
        /// Bytes of an HTTP request's head.
        live http_head_bytes_max: usize = 8192 => 1024..=1_048_576;
        /// Header fields of an HTTP request.
        live http_headers_max: usize = 64 => 8..=256;
        /// Seconds for the head of an HTTP request; and for its body or its answer beside what
        /// `limits.http_bytes_per_second_min` gives.
        live http_seconds_max: u64 = 10 => 1..=600;
        /// Bytes a second that a body must come at, and an answer be taken, on average; slower connections are cut.
        live http_bytes_per_second_min: u64 = 1024 => 1..=1_073_741_824;
        /// Bytes of a refused body that are read away so that its sender hears why; more end the connection by a reset.
        live http_linger_bytes_max: usize = 67_108_864 => 65_536..=17_179_869_184;
        /// And the seconds that this may take.
        live http_linger_seconds_max: u64 = 30 => 1..=600;
        /// Frames of one WebSocket message; more end the connection with status 1008.
        live websocket_fragments_max: u32 = 256 => 1..=1_000_000;
        /// Connections of `nitro user` and `nitro session` to the admin socket at the same time.
        restart admin_connections_max: usize = 8 => 1..=1000;
    }

    /// Many logins at once: who is in must not notice (see "Storms" in README.md).
    storm: Storm {
        /// Microseconds that a turn of a shard's loop should take at most, and so what a message waits for logins: the number
        /// of logins that compute at a time is lowered while turns take longer and raised while they do not. Half of it is for
        /// what large chat rooms say: who is told in later turns waits behind messages between two.
        live lag_us_target: u64 = 300 => 20..=100_000;
        /// Logins of one shard that may compute at a time even when turns take too long.
        live logins_computing_min: usize = 1 => 1..=1000;
        /// Logins of one shard that may compute at a time when turns are short.
        live logins_computing_max: usize = 64 => 1..=1000;
        /// Connections of one shard that are past the first gate and have not begun a session yet. The others wait unread.
        live logins_begun_max: usize = 4096 => 1..=10_000_000;
        /// Seconds that a connection waits at a gate at most; then it is refused with `<resource-constraint/>` and
        /// `<retry-after/>`. Time that it waits there does not count for `limits.auth_seconds_max`.
        live wait_seconds_max: u64 = 20 => 1..=600;
        /// Seconds that a client may be silent during its login while `storm.logins_begun_max` connections are past the first
        /// gate and others wait there; then it ends with `<connection-timeout/>`.
        live silent_seconds_max: u64 = 5 => 1..=600;
        /// Seconds since a user's last log-out in which he goes before strangers.
        live recent_seconds: u64 = 600 => 0..=86_400;
        /// Logins of one account in a minute, as many of them at once; then they are held back to come evenly, and refused when
        /// that takes more than ten seconds. Other accounts at the same address are not.
        live account_logins_per_minute: u64 = 240 => 1..=60_000;
        /// Accounts of one shard whose logins are remembered; beyond it those that are not known yet are not held back.
        live accounts_remembered_max: usize = 100_000 => 100..=10_000_000;
        /// Sessions of one shard for which presence of others waits; while there are more, nobody new is let in.
        live presence_waiting_max: usize = 1000 => 1..=10_000_000;
        /// The least that `<retry-after/>` says, in seconds; up to twice as much, by chance.
        live retry_seconds_min: u64 = 5 => 1..=3600;
        /// The most, by chance up to twice as much.
        live retry_seconds_max: u64 = 120 => 1..=3600;
    }

    /// Chat rooms (XEP-0045).
    rooms: RoomsSection {
        /// Whether there are any.
        restart enabled: bool = true;
        /// The domain of the rooms' addresses. Empty: `rooms.` and `domain`.
        restart host: String = String::new();
        /// Who may make a room: "anyone", or "admins", those in `rooms.admins`.
        live creation: RoomCreation = RoomCreation::Anyone;
        /// Bare addresses of those who may make rooms if not everybody may, e.g. ["desk@chat.example.com"].
        live admins: Vec<String> = Vec::new();
        /// Whether a new room stays when its last occupant leaves, if its maker does not say.
        live persistent: bool = false;
        /// Days after which a message is taken out of the archives of rooms. 0: as in those of users (`archive.keep_days`); to keep
        /// for long what users' archives lose, say 36500.
        restart keep_days: u64 = 0 => 0..=36_500;
        /// Rooms that one shard has in memory; new ones are refused beyond.
        live rooms_max: usize = 10_000 => 1..=10_000_000;
        /// Rooms that stay when nobody is in, made by one account; more are refused with `<resource-constraint/>`.
        live persistent_per_owner_max: usize = 100 => 0..=10_000_000;
        /// Such rooms altogether.
        live persistent_max: usize = 100_000 => 0..=10_000_000;
        /// How long a temporary room with nobody in it waits after a restart of the server for those who come back, in seconds. Then
        /// it ends, and its archive with it: let it be longer than people are away over a night. 0: it waits for ever.
        live left_seconds: u64 = 86_400 => 0..=2_592_000;
        /// People in one room; its configuration may say less.
        live occupants_max: usize = 2000 => 1..=100_000;
        /// Members, admins, owners and outcasts of one room.
        live affiliations_max: usize = 5000 => 10..=100_000;
        /// Bytes of a nickname.
        live nick_bytes_max: usize = 128 => 8..=1023;
        /// Bytes of a subject.
        live subject_bytes_max: usize = 4096 => 16..=65_536;
        /// Messages that a room keeps in memory for those who come in; its configuration may show less.
        live history_max: usize = 100 => 0..=10_000;
        /// Bytes of them.
        live history_bytes_max: usize = 262_144 => 0..=16_777_216;
        /// Messages of one occupant in a second, on average; three times as many at once. More are refused with
        /// `<resource-constraint/>`.
        live messages_per_second_max: u32 = 50 => 1..=1_000_000;
        /// The same of presence.
        live presences_per_second_max: u32 = 10 => 1..=1_000_000;
        /// Registrations with one room in a second (members, nicknames that are kept), on average; twenty times as many at once.
        live registrations_per_second_max: u32 = 5 => 1..=1_000_000;
        /// Requests for membership of one room that wait for an admin's answer, an hour at most.
        live requests_max: usize = 100 => 1..=100_000;
    }

    /// Push notifications (XEP-0357): app servers are told when something waits for somebody (see "Push notifications" in README.md).
    push: PushSection {
        /// Services that one user may have enabled; more are refused with `<resource-constraint/>`. 0: there are no push notifications.
        live services_max: usize = 16 => 0..=1000;
        /// Bytes of one of them: address, node and publish options.
        live service_bytes_max: usize = 4096 => 256..=65_536;
        /// Whether notifications say who has written. They go through app servers, and from there through others.
        live sender: bool = false;
        /// Whether notifications say what was written.
        live body: bool = false;
        /// Bytes of that; more is cut off.
        live body_bytes_max: usize = 1024 => 16..=65_536;
        /// What stands in its place otherwise: app servers take a notification with a text for an urgent one. Empty: nothing.
        live placeholder: String = "New message".into();
        /// Whether a client that has said that it is inactive (XEP-0352) counts as asleep, like one whose connection is gone.
        live inactive: bool = true;
        /// Minutes after which a user who has not been there since is told again, by the next message.
        live repeat_minutes: u64 = 60 => 1..=525_600;
        /// Users of one shard of whom that is remembered; others are told of each message.
        live told_max: usize = 100_000 => 100..=10_000_000;
        /// Notifications of one shard in a second; more wait.
        live per_second_max: u32 = 500 => 1..=1_000_000;
        /// Notifications of one shard that wait for an answer or for another try; more are left out.
        live waiting_max: usize = 10_000 => 10..=1_000_000;
        /// Seconds in which an app server must answer.
        live answer_seconds_max: u64 = 30 => 1..=600;
        /// Seconds until a notification that has failed is tried again, doubled each time up to an hour.
        live retry_seconds: u64 = 30 => 1..=3600;
        /// How often a notification is tried before its service is disabled.
        live tries_max: u32 = 10 => 1..=100;
    }

    /// Uploaded files (XEP-0363; see "Uploads" in README.md). They come and go by the ports of section `web`.
    upload: Upload {
        /// Whether clients may upload, where `upload.url` is known.
        restart enabled: bool = true;
        /// The address of the service. Empty: `upload.` and `domain`.
        restart host: String = String::new();
        /// Where clients reach the web ports, e.g. "https://chat.example.com" or "https://files.example.com:5443": what stands before
        /// `/upload/` in the addresses that they get. Empty: `https://`, the domain and the first port of `web.listen_tls`; without such
        /// a port there are no uploads.
        live url: String = String::new();
        /// The folder of the files. Empty: `uploads` in `data_dir`. Backups leave it out: copy it as it is, files never change.
        restart dir: PathBuf = PathBuf::new();
        /// Bytes of one file; beyond it `<file-too-large/>`.
        live file_bytes_max: u64 = 26_214_400 => 1..=1_099_511_627_776;
        /// Bytes that one user may upload in 24 hours; beyond it `<resource-constraint/>`.
        live user_bytes_per_day_max: u64 = 524_288_000 => 1..=1_099_511_627_776;
        /// Bytes of all files of one user.
        live user_bytes_max: u64 = 5_368_709_120 => 1..=1_099_511_627_776;
        /// Files of one user.
        live user_files_max: usize = 10_000 => 1..=1_000_000;
        /// Bytes of all files.
        live bytes_max: u64 = 107_374_182_400 => 1..=1_152_921_504_606_846_976;
        /// Days that a file stays. 0: for ever.
        live keep_days: u64 = 30 => 0..=36_500;
        /// Seconds in which an upload must begin.
        live slot_seconds: u64 = 300 => 10..=86_400;
        /// Files that come or go at the same time; more get 503.
        live transfers_max: usize = 256 => 1..=100_000;
        /// The same of one address (an IPv6 /64 counts as one), where `limits.exempt` does not say otherwise.
        live transfers_per_address_max: usize = 16 => 1..=100_000;
        /// Pieces of files that wait for the disk, and apart from them requests for slots: more of these are refused, a piece waits
        /// for room.
        restart waiting_max: usize = 1024 => 16..=1_000_000;
        /// Requests for slots of one user that wait; more are refused.
        live user_waiting_max: usize = 32 => 1..=1_000_000;
        /// Threads that write and read pieces; one more answers requests for slots.
        restart threads: usize = 2 => 1..=64;
    }

    /// Stream management (XEP-0198).
    stream_management: StreamManagement {
        /// Seconds that a session whose connection was cut can be resumed.
        live resume_seconds_max: u64 = 300 => 0..=86_400;
        /// Bytes sent to a client and not yet acknowledged; more ends the session.
        live unacked_bytes_max: usize = 2_097_152 => 65_536..=1_073_741_824;
        /// Stanzas sent to a client and not yet acknowledged.
        live unacked_stanzas_max: usize = 5000 => 10..=1_000_000;
        /// Sessions of one shard that wait to be resumed; the oldest end first.
        live parked_max: usize = 50_000 => 0..=10_000_000;
    }

    /// Finding dead clients (XEP-0199).
    ping: Ping {
        /// Seconds of silence after which a client is asked.
        live idle_seconds: u64 = 300 => 10..=86_400;
        /// Seconds that it has to answer.
        live timeout_seconds: u64 = 60 => 1..=3600;
    }

    /// The cache of users.
    cache: Cache {
        /// Bytes of the whole blade, divided evenly among its shards. Users on line are never evicted.
        restart bytes_max: usize = 1_073_741_824 => 1_048_576..=1_099_511_627_776;
    }

    /// The SQL lane.
    sql: Sql {
        /// The core that its threads are bound to: a number, or "auto" for the last of `cores`.
        restart core: LaneCore = LaneCore::Auto;
        /// Requests that wait for SQL; what comes then is refused.
        restart queue_max: usize = 100_000 => 100..=10_000_000;
    }

    /// The Redis ring between cache and database: warm copies, so that a login after a restart costs no SQL.
    redis: Redis {
        /// The instances, whose keys are spread by consistent hashing: "unix:///run/nitro-redis/1.sock?db=0&user=U&pass=P",
        /// "redis://USER:PASSWORD@HOST:6379/0" or, over TLS, "rediss://USER:PASSWORD@HOST:6379/0"; behind `?` also `weight=N`
        /// (its share, 1 to 1000) and `name=NAME` (which decides the keys it holds; else the address does). Empty: no ring.
        restart instances: Vec<String> = Vec::new();
        /// Who vouches for the certificates of instances behind `rediss://`, which must be for the host in the address: a PEM
        /// file. Empty: the certificates that the system trusts.
        restart ca_file: PathBuf = PathBuf::new();
        /// The client certificate chain for instances that ask for one (`tls-auth-clients`), PEM, leaf first. Empty: none.
        restart certificate: PathBuf = PathBuf::new();
        /// Its private key, PEM. Empty exactly when `redis.certificate` is.
        restart key: PathBuf = PathBuf::new();
        /// What all keys begin with: tells several blades on the same instances apart.
        restart prefix: String = "nitro:".into();
        /// This blade's name in the list of sessions, without `:`. Empty: the machine's name.
        restart blade: String = String::new();
        /// Hours that a user's copy stays without being written again.
        restart ttl_hours: u64 = 168 => 1..=8760;
        /// Seconds that the word stays that there is no such user.
        restart missing_ttl_seconds: u64 = 60 => 1..=3600;
        /// Seconds that a session is believed in; it is renewed three times in that span.
        restart sessions_ttl_seconds: u64 = 90 => 15..=3600;
        /// Milliseconds that an instance may be silent when it owes an answer (eight times as many for the oldest one while
        /// others are answered), then it is left alone for a while.
        restart timeout_ms: u64 = 250 => 10..=10_000;
        /// Milliseconds for a connection.
        restart connect_timeout_ms: u64 = 250 => 10..=10_000;
        /// Longest pause, in milliseconds, until an instance that has failed is tried again.
        restart pause_ms_max: u64 = 5000 => 100..=600_000;
        /// Commands of one shard that wait for one instance; what comes then is read from the database.
        restart commands_max: usize = 16_384 => 100..=1_000_000;
    }

    /// The journals: what was accepted and is not in the database yet. One for each shard.
    journal: Journal {
        /// Their folder, on a disk of its own if possible. Empty: `journal` in `data_dir`.
        restart dir: PathBuf = PathBuf::new();
        /// Length of a file. A multiple of 4096; at least twice `limits.stanza_bytes_max`, and no account with its roster may be
        /// larger.
        restart segment_bytes: usize = 64 << 20 => (1 << 20)..=(1 << 30);
        /// What one shard's journal may hold that the database has not taken: beyond it new messages and changes are refused
        /// with `<resource-constraint/>`. An hour without database at 1,000 messages a second takes 7.3 GiB on two shards, 3.6 GiB
        /// each, and 4.4 GiB on a single one (measured: `bench/measure --only journal-hour`; mostly blocks that groups do not
        /// fill, so half the rate takes little less and longer texts little more): 8 GiB are about twice that. The disk should
        /// have that much for each shard, and 0.7 GiB more; if it is full before, the answer is the same.
        restart backlog_bytes_max: usize = 8 << 30 => (64 << 20)..=(1 << 44);
        /// Milliseconds that a change rests before it is written into the database: a delivery that is taken in this time
        /// is never written as pending.
        restart drain_after_ms: u64 = 500 => 0..=60_000;
    }

    /// Archives of messages (XEP-0313).
    archive: Archive {
        /// Days after which a message is taken out of the archives, a little at a time; what waits for its recipient stays. 0:
        /// never. Rooms may have another number (`rooms.keep_days`).
        restart keep_days: u64 = 0 => 0..=36_500;
        /// Bytes, of the whole blade, for the newest messages of archives that are being read: a page of them costs no SQL. 0:
        /// none are kept.
        restart recent_bytes_max: usize = 67_108_864 => 0..=1_099_511_627_776;
        /// Addresses in both lists of a user's preferences together (XEP-0441).
        live preferences_max: usize = 200 => 0..=10_000;
    }

    /// Stopping.
    shutdown: Shutdown {
        /// Seconds from SIGTERM to the end of the process.
        live seconds_max: u64 = 10 => 1..=600;
    }

    /// Logging, to standard error.
    log: Log {
        /// "error", "warn", "info", "debug" or "trace".
        live level: LogLevel = LogLevel::Info;
        /// "text", or "json" for one JSON object a line.
        restart format: LogFormat = LogFormat::Text;
    }

    /// Histogram logs: every stage's durations, interval by interval, in HdrHistogram's own format (V2), for its tools.
    histograms: Histograms {
        /// Their folder; it is made. Empty: no such logs.
        restart dir: PathBuf = PathBuf::new();
        /// Seconds of one interval.
        restart interval_seconds: u64 = 10 => 1..=3600;
        /// Bytes after which a new file is begun.
        restart file_bytes_max: usize = 67_108_864 => 65_536..=1_073_741_824;
        /// Files in the folder; the oldest are removed.
        restart files_max: usize = 10 => 2..=100_000;
    }
}

/// The SASL mechanisms that nitro has, strongest first (the default of `sasl.mechanisms`).
pub const MECHANISMS: &[&str] = &[
    "EXTERNAL",
    "SCRAM-SHA-256-PLUS",
    "SCRAM-SHA-1-PLUS",
    "SCRAM-SHA-256",
    "SCRAM-SHA-1",
    "PLAIN",
];

/// An operator's mistake: one sentence with key, place and mend. `nitro` prints it and exits with status 2.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl Config {
    /// Defaults, then `file`, then each `key=value` of `sets`.
    ///
    /// # Errors
    /// The first mistake, in the order of the file, then of `sets`.
    pub fn load(file: Option<&Path>, sets: &[String]) -> Result<Config, ConfigError> {
        let mut loading = Loading::default();
        if let Some(path) = file {
            let shown = path.display();
            let text = std::fs::read_to_string(path).map_err(|e| {
                ConfigError(format!(
                    "{shown}: the configuration file cannot be read ({e}); name a readable file with --config"
                ))
            })?;
            loading.file(&shown.to_string(), &text)?;
        }
        for set in sets {
            loading.set(set)?;
        }
        loading.finish()
    }

    /// The database's address; see the key `database`.
    pub fn database(&self) -> String {
        match self.database.as_str() {
            "" => format!("sqlite:{}", self.data_dir.join("nitro.db").display()),
            database => database.to_owned(),
        }
    }

    /// Each component's name, secret and policy; files of secrets are read now.
    ///
    /// # Errors
    /// A sentence about a file that cannot be read or holds no secret.
    pub fn component_hosts(&self) -> Result<Vec<(String, String, ComponentPolicy)>, String> {
        const SECRET_BYTES_MAX: u64 = 4096;
        let read = |name: &str, path: &Path| {
            use std::io::Read as _;
            let mut text = String::new();
            let wrong = |why: String| format!("component.hosts: {name}: {}: {why}", path.display());
            std::fs::File::open(path)
                .and_then(|file| file.take(SECRET_BYTES_MAX).read_to_string(&mut text))
                .map_err(|e| wrong(format!("{e}; make the file readable for nitro")))?;
            match text.trim_end_matches(['\r', '\n']) {
                "" => Err(wrong("there is no secret in it; write one line".into())),
                secret => Ok(secret.to_owned()),
            }
        };
        self.component
            .hosts
            .0
            .iter()
            .map(|(name, host)| {
                let secret = match &host.secret {
                    ComponentSecret::Text(secret) => secret.clone(),
                    ComponentSecret::File(path) => read(name, path)?,
                };
                Ok((
                    name.clone(),
                    secret,
                    host.policy.unwrap_or(self.component.policy),
                ))
            })
            .collect()
    }

    /// The folder of the journals.
    pub fn journal_dir(&self) -> PathBuf {
        match self.journal.dir.as_os_str().is_empty() {
            true => self.data_dir.join("journal"),
            false => self.journal.dir.clone(),
        }
    }

    /// Paths of certificate chain and key, and whether they are nitro's own (generated when missing).
    pub fn certificate_paths(&self) -> (PathBuf, PathBuf, bool) {
        if self.tls.certificate.as_os_str().is_empty() {
            let dir = &self.data_dir;
            (dir.join("certificate.pem"), dir.join("key.pem"), true)
        } else {
            (self.tls.certificate.clone(), self.tls.key.clone(), false)
        }
    }

    /// Days after which messages go out of the archives of rooms; 0: never.
    pub fn rooms_keep_days(&self) -> u64 {
        match self.rooms.keep_days {
            0 => self.archive.keep_days,
            days => days,
        }
    }

    /// The domain of chat rooms; `None`: there are none.
    /// Domain of the service of uploads, if there is one.
    pub fn upload_host(&self) -> Option<String> {
        let on = self.upload.enabled && !self.upload_url().is_empty();
        on.then(|| match self.upload.host.is_empty() {
            true => format!("upload.{}", self.domain),
            false => self.upload.host.clone(),
        })
    }

    /// What addresses of files begin with, without `/` at the end; empty: not known.
    pub fn upload_url(&self) -> String {
        if !self.upload.url.is_empty() {
            return self.upload.url.trim_end_matches('/').to_owned();
        }
        let Some(address) = self.web.listen_tls.first() else {
            return String::new();
        };
        let host = idna::domain_to_ascii(&self.domain).unwrap_or_else(|_| self.domain.clone());
        match address.port() {
            443 => format!("https://{host}"),
            port => format!("https://{host}:{port}"),
        }
    }

    pub fn upload_dir(&self) -> PathBuf {
        match self.upload.dir.as_os_str().is_empty() {
            true => self.data_dir.join("uploads"),
            false => self.upload.dir.clone(),
        }
    }

    pub fn rooms_host(&self) -> Option<String> {
        self.rooms
            .enabled
            .then(|| match self.rooms.host.is_empty() {
                true => format!("rooms.{}", self.domain),
                false => self.rooms.host.clone(),
            })
    }

    /// Whether limits per address do not apply to `address`.
    pub fn is_exempt(&self, address: IpAddr) -> bool {
        holds(&self.limits.exempt, address)
    }

    /// Whether `address` is a proxy whose PROXY header is believed.
    pub fn is_trusted_proxy(&self, address: IpAddr) -> bool {
        holds(&self.trusted_proxies, address)
    }

    /// Whether `address` is a reverse proxy whose word about its client is believed.
    pub fn is_web_proxy(&self, address: IpAddr) -> bool {
        holds(&self.web.proxies, address)
    }

    /// This configuration with the reloadable keys of `new`: what is in force after SIGHUP.
    pub fn with_live_keys_of(&self, new: &Config) -> Config {
        let mut merged = self.clone();
        for key in KEYS.iter().filter(|k| k.live) {
            (key.copy)(new, &mut merged);
        }
        merged
    }

    /// The text of `config/nitro.toml`: every key with its default and meaning.
    pub fn default_file() -> String {
        let mut out = String::from(
            "# The configuration of nitro: every key with its default. Generated from src/config.rs by\n\
             # `nitro check-config --print-defaults`; a test keeps the two equal.\n\
             # Use it with `nitro serve --config FILE`. Keys that are left out keep their defaults.\n\
             # Keys that SIGHUP does not reload need a restart.\n",
        );
        let defaults = Config::default();
        let mut section = "";
        for key in KEYS {
            out.push('\n');
            if key.section != section {
                section = key.section;
                out.push_str(&format!("#{}\n[{section}]\n\n", key.section_doc));
            }
            for line in key.doc {
                out.push_str(&format!("#{line}\n"));
            }
            let reloaded = if key.live { " Reloaded by SIGHUP." } else { "" };
            match (key.range)() + reloaded {
                facts if facts.is_empty() => {}
                facts => out.push_str(&format!("#{facts}\n")),
            }
            let name = key.name.rsplit('.').next().unwrap_or(key.name);
            out.push_str(&format!("{name} = {}\n", (key.show)(&defaults)));
        }
        out
    }
}

/// What differs between two configurations: the names of the keys that a running blade takes over, and of those that
/// need a restart.
pub fn reloadable_diff(old: &Config, new: &Config) -> (Vec<&'static str>, Vec<&'static str>) {
    let changed = KEYS.iter().filter(|k| (k.show)(old) != (k.show)(new));
    let (live, restart): (Vec<_>, Vec<_>) = changed.partition(|k| k.live);
    let names = |keys: Vec<&'static Key>| keys.iter().map(|k| k.name).collect();
    (names(live), names(restart))
}

/// One row of the table.
pub struct Key {
    /// The dotted name, such as `c2s.listen`.
    pub name: &'static str,
    /// The section, or "".
    pub section: &'static str,
    section_doc: &'static str,
    /// The lines of its description.
    pub doc: &'static [&'static str],
    /// Whether SIGHUP reloads it.
    pub live: bool,
    range: fn() -> String,
    show: fn(&Config) -> String,
    set: fn(&mut Config, &DeValue) -> Result<(), String>,
    copy: fn(&Config, &mut Config),
}

impl Key {
    fn find(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|k| k.name == name)
    }
}

/// The cores to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cores {
    /// Every core that the process may run on.
    All,
    /// These, ascending, without repetition, never empty.
    List(Vec<usize>),
}

impl Cores {
    /// The cores to start shards on, given those that the process may run on (ascending).
    ///
    /// # Errors
    /// A sentence, if one of the list is not allowed.
    pub fn pick(&self, allowed: &[usize]) -> Result<Vec<usize>, String> {
        match self {
            Cores::All => Ok(allowed.to_vec()),
            Cores::List(list) => match list.iter().find(|core| !allowed.contains(core)) {
                Some(core) => Err(format!(
                    "cores: this process may not run on core {core}; choose from {}",
                    Cores::List(allowed.to_vec()).text()
                )),
                None => Ok(list.clone()),
            },
        }
    }

    fn text(&self) -> String {
        let Cores::List(list) = self else {
            return "all".into();
        };
        let mut spans: Vec<(usize, usize)> = Vec::new();
        for &core in list {
            match spans.last_mut() {
                Some((_, end)) if *end + 1 == core => *end = core,
                _ => spans.push((core, core)),
            }
        }
        let spans: Vec<String> = spans
            .iter()
            .map(|&(a, b)| {
                if a == b {
                    a.to_string()
                } else {
                    format!("{a}-{b}")
                }
            })
            .collect();
        spans.join(",")
    }
}

impl FromStr for Cores {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        const CORE_MAX: usize = 1023; // what a kernel cpu_set_t holds
        if text == "all" {
            return Ok(Cores::All);
        }
        let mut list = Vec::new();
        for span in text.split(',') {
            let (first, last) = span.split_once('-').unwrap_or((span, span));
            let number = |s: &str| s.trim().parse::<usize>().map_err(drop);
            let (first, last) = (number(first)?, number(last)?);
            if first > last || last > CORE_MAX {
                return Err(());
            }
            list.extend(first..=last);
        }
        list.sort_unstable();
        list.dedup();
        Ok(Cores::List(list))
    }
}

/// The core of the SQL lane's threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneCore {
    /// The last of the cores in use.
    Auto,
    /// This one.
    Core(usize),
}

impl LaneCore {
    /// The core, given those in use.
    pub fn pick(self, cores: &[usize]) -> Option<usize> {
        match self {
            LaneCore::Auto => cores.last().copied(),
            LaneCore::Core(core) => Some(core),
        }
    }
}

/// An enumeration whose values are words in the file.
macro_rules! choice {
    ($(#[doc = $doc:literal])* $Name:ident { $( $(#[doc = $vdoc:literal])* $Variant:ident = $word:literal, )* }) => {
        $(#[doc = $doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $Name { $( $(#[doc = $vdoc])* $Variant, )* }

        impl $Name {
            /// The word in the file.
            pub fn as_str(self) -> &'static str {
                match self { $( $Name::$Variant => $word, )* }
            }
        }

        impl Value for $Name {
            fn read(value: &DeValue) -> Result<Self, String> {
                let words = one_of(&[$($word),*]);
                match value {
                    DeValue::String(s) => match s.as_ref() {
                        $( $word => Ok($Name::$Variant), )*
                        other => Err(format!("{other:?} is not known here; write {words}")),
                    },
                    other => Err(mistyped(other, &words)),
                }
            }

            fn show(&self) -> String {
                quote(self.as_str())
            }
        }
    };
}

choice! {
    /// Who may make an account in-band.
    Registration {
        /// Nobody.
        Off = "off",
        /// Clients whose real peer address is on this machine.
        Loopback = "loopback",
        /// Everybody.
        On = "on",
    }
}

choice! {
    /// Who may make chat rooms.
    RoomCreation {
        /// Everybody.
        Anyone = "anyone",
        /// Those in `rooms.admins`.
        Admins = "admins",
    }
}

choice! {
    /// What happens to a further connection for a component's name.
    ComponentPolicy {
        /// It is refused.
        Refuse = "refuse",
        /// It takes the place of the older one.
        Replace = "replace",
        /// They share the senders.
        Share = "share",
    }
}

/// The names that components serve (key `component.hosts`), normalised.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ComponentHosts(BTreeMap<String, ComponentHost>);

/// One of them, as it stands in the configuration.
#[derive(Clone, PartialEq, Eq)]
struct ComponentHost {
    secret: ComponentSecret,
    /// `None`: `component.policy`.
    policy: Option<ComponentPolicy>,
}

#[derive(Clone, PartialEq, Eq)]
enum ComponentSecret {
    Text(String),
    File(PathBuf),
}

impl std::fmt::Debug for ComponentHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ComponentHost")
    }
}

impl ComponentHosts {
    const EXAMPLE: &str = r#"{ "irc.example.com" = "secret" }"#;

    fn host(value: &DeValue) -> Result<ComponentHost, String> {
        const FORM: &str = r#"a secret in quotes, or { secret_file = "PATH", policy = "share" }"#;
        let (secret, policy) = match value {
            DeValue::String(secret) => (ComponentSecret::Text(secret.to_string()), None),
            DeValue::Table(table) => {
                let (mut secret, mut policy) = (None, None);
                for (key, value) in table {
                    let value = value.get_ref();
                    let given = match &**key.get_ref() {
                        "policy" => {
                            policy = Some(ComponentPolicy::read(value)?);
                            continue;
                        }
                        "secret" => ComponentSecret::Text(String::read(value)?),
                        "secret_file" => ComponentSecret::File(PathBuf::read(value)?),
                        other => return Err(format!("{other:?} is not known here; write {FORM}")),
                    };
                    if secret.replace(given).is_some() {
                        return Err("secret and secret_file are both there; leave one out".into());
                    }
                }
                let missing = || format!("the secret is missing; write {FORM}");
                (secret.ok_or_else(missing)?, policy)
            }
            other => return Err(mistyped(other, FORM)),
        };
        match &secret {
            ComponentSecret::Text(text) if text.is_empty() => {
                Err("the secret is empty; write one".into())
            }
            ComponentSecret::File(path) if path.as_os_str().is_empty() => {
                Err("secret_file is empty; write a path".into())
            }
            _ => Ok(ComponentHost { secret, policy }),
        }
    }
}

impl Value for ComponentHosts {
    fn read(value: &DeValue) -> Result<Self, String> {
        const HOSTS_MAX: usize = 1000;
        let DeValue::Table(table) = value else {
            return Err(mistyped(
                value,
                &format!("names with their secrets, e.g. {}", Self::EXAMPLE),
            ));
        };
        if table.len() > HOSTS_MAX {
            return Err(format!(
                "there are {} names; write at most {HOSTS_MAX}",
                table.len()
            ));
        }
        let mut hosts = BTreeMap::new();
        for (name, value) in table {
            let name = normal_domain(name.get_ref())?;
            let host = Self::host(value.get_ref()).map_err(|why| format!("{name}: {why}"))?;
            if hosts.insert(name.clone(), host).is_some() {
                return Err(format!("{name} is there twice; leave one out"));
            }
        }
        Ok(ComponentHosts(hosts))
    }

    fn show(&self) -> String {
        let host = |(name, host): (&String, &ComponentHost)| {
            let mut fields = vec![match &host.secret {
                ComponentSecret::Text(secret) => format!("secret = {}", quote(secret)),
                ComponentSecret::File(path) => {
                    format!("secret_file = {}", quote(&path.to_string_lossy()))
                }
            }];
            if let Some(policy) = host.policy {
                fields.push(format!("policy = {}", policy.show()));
            }
            format!("{} = {{ {} }}", quote(name), fields.join(", "))
        };
        match self.0.is_empty() {
            true => "{}".into(),
            false => {
                let all: Vec<String> = self.0.iter().map(host).collect();
                format!("{{ {} }}", all.join(", "))
            }
        }
    }
}

choice! {
    /// A version of TLS.
    TlsVersion {
        /// RFC 5246.
        V1_2 = "1.2",
        /// RFC 8446.
        V1_3 = "1.3",
    }
}

choice! {
    /// How much is logged.
    LogLevel {
        /// What needs somebody now.
        Error = "error",
        /// What somebody should look at.
        Warn = "warn",
        /// Start, stop, reload.
        Info = "info",
        /// Sessions.
        Debug = "debug",
        /// Stanzas.
        Trace = "trace",
    }
}

choice! {
    /// How a line of the log looks.
    LogFormat {
        /// For people and fail2ban.
        Text = "text",
        /// For collectors of logs.
        Json = "json",
    }
}

/// How a type is read from TOML and written to it. Errors say what is wrong and what to write.
trait Value: Sized {
    fn read(value: &DeValue) -> Result<Self, String>;
    /// As TOML.
    fn show(&self) -> String;
    /// A range as text.
    fn bounds(range: &RangeInclusive<Self>) -> String {
        format!("{} to {}", range.start().show(), range.end().show())
    }
}

macro_rules! number {
    ($($ty:ty),*) => { $( impl Value for $ty {
        fn read(value: &DeValue) -> Result<Self, String> {
            match value {
                DeValue::Integer(i) => <$ty>::from_str_radix(i.as_str(), i.radix())
                    .map_err(|_| format!("{i} is out of range; write a whole number that is not negative")),
                other => Err(mistyped(other, "a whole number")),
            }
        }

        /// Long numbers are grouped: 262_144.
        fn show(&self) -> String {
            let digits = self.to_string();
            if digits.len() < 5 {
                return digits;
            }
            let mut out = String::new();
            for (i, digit) in digits.chars().enumerate() {
                if i > 0 && (digits.len() - i).is_multiple_of(3) {
                    out.push('_');
                }
                out.push(digit);
            }
            out
        }
    } )* };
}
number!(u32, u64, usize);

impl Value for bool {
    fn read(value: &DeValue) -> Result<Self, String> {
        match value {
            DeValue::Boolean(b) => Ok(*b),
            other => Err(mistyped(other, "true or false")),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for String {
    fn read(value: &DeValue) -> Result<Self, String> {
        match value {
            DeValue::String(s) => Ok(s.to_string()),
            other => Err(mistyped(other, "a text in quotes")),
        }
    }

    fn show(&self) -> String {
        quote(self)
    }
}

impl Value for PathBuf {
    fn read(value: &DeValue) -> Result<Self, String> {
        match value {
            DeValue::String(s) if s.contains('\0') => {
                Err("a path holds no NUL; leave it out".into())
            }
            DeValue::String(s) => Ok(s.as_ref().into()),
            other => Err(mistyped(other, "a path in quotes")),
        }
    }

    fn show(&self) -> String {
        quote(&self.to_string_lossy())
    }
}

/// What stands in a list of the file as a text of its own.
trait Item: Sized {
    /// "a list of …", and one to show.
    const KIND: &'static str;
    const EXAMPLE: &'static str;
    fn parse(text: &str) -> Option<Self>;
    fn text(&self) -> String;
}

impl Item for SocketAddr {
    const KIND: &'static str = "an address with a port";
    const EXAMPLE: &'static str = r#"["0.0.0.0:5222"]"#;
    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
    fn text(&self) -> String {
        self.to_string()
    }
}

impl Item for IpNet {
    const KIND: &'static str = "a network";
    const EXAMPLE: &'static str = r#"["10.1.0.0/16", "::1"]"#;
    fn parse(text: &str) -> Option<Self> {
        let single = || text.parse::<IpAddr>().map(IpNet::from);
        text.parse::<IpNet>()
            .or_else(|_| single())
            .ok()
            .map(|net| net.trunc())
    }
    fn text(&self) -> String {
        self.to_string()
    }
}

impl Item for String {
    const KIND: &'static str = "a text";
    const EXAMPLE: &'static str = r#"["SCRAM-SHA-256"]"#;
    fn parse(text: &str) -> Option<Self> {
        Some(text.to_string())
    }
    fn text(&self) -> String {
        self.clone()
    }
}

impl Item for PathBuf {
    const KIND: &'static str = "a path";
    const EXAMPLE: &'static str = r#"["/etc/nitro/clients.crl"]"#;
    fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| text.into())
    }
    fn text(&self) -> String {
        self.to_string_lossy().into_owned()
    }
}

impl<T: Item> Value for Vec<T> {
    fn read(value: &DeValue) -> Result<Self, String> {
        const ITEMS_MAX: usize = 1000;
        let DeValue::Array(array) = value else {
            return Err(mistyped(value, &format!("a list, e.g. {}", T::EXAMPLE)));
        };
        if array.len() > ITEMS_MAX {
            return Err(format!(
                "the list has {} items; write at most {ITEMS_MAX}",
                array.len()
            ));
        }
        let item = |value: &Spanned<DeValue>| match value.get_ref() {
            DeValue::String(s) => T::parse(s).ok_or_else(|| {
                let wrong: &str = s;
                format!("{wrong:?} is not {}; write e.g. {}", T::KIND, T::EXAMPLE)
            }),
            other => Err(mistyped(
                other,
                &format!("a list of texts, e.g. {}", T::EXAMPLE),
            )),
        };
        array.iter().map(item).collect()
    }

    fn show(&self) -> String {
        let items: Vec<String> = self.iter().map(|item| quote(&item.text())).collect();
        format!("[{}]", items.join(", "))
    }
}

impl Value for Cores {
    fn read(value: &DeValue) -> Result<Self, String> {
        const WORDS: &str = r#""all", or numbers and spans such as "0-3" or "0,2""#;
        match value {
            DeValue::String(s) => s.parse().map_err(|()| {
                let wrong: &str = s;
                format!("{wrong:?} names no cores; write {WORDS}")
            }),
            other => Err(mistyped(other, WORDS)),
        }
    }

    fn show(&self) -> String {
        quote(&self.text())
    }
}

impl Value for LaneCore {
    fn read(value: &DeValue) -> Result<Self, String> {
        match value {
            DeValue::String(s) if s == "auto" => Ok(LaneCore::Auto),
            DeValue::Integer(_) => {
                let core = usize::read(value)?;
                within(&core, &(0..=1023))?;
                Ok(LaneCore::Core(core))
            }
            other => Err(mistyped(other, r#""auto" or the number of a core"#)),
        }
    }

    fn show(&self) -> String {
        match self {
            LaneCore::Auto => quote("auto"),
            LaneCore::Core(n) => n.to_string(),
        }
    }
}

fn within<T: Value + PartialOrd>(value: &T, range: &RangeInclusive<T>) -> Result<(), String> {
    if range.contains(value) {
        Ok(())
    } else {
        let (shown, bounds) = (value.show(), T::bounds(range));
        Err(format!(
            "{shown} is out of range; write a number from {bounds}"
        ))
    }
}

fn range_text(range: &[String]) -> String {
    range
        .iter()
        .map(|bounds| format!(" Range: {bounds}."))
        .collect()
}

/// A TOML basic string.
fn quote(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn mistyped(found: &DeValue, wanted: &str) -> String {
    let found = match found {
        DeValue::String(s) => {
            let s: &str = s;
            return format!("{s:?} is a text; write {wanted}");
        }
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    format!("found {found}; write {wanted}")
}

fn one_of(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|w| quote(w)).collect();
    words.join(" or ")
}

fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
    let parse = |t: &&str| t.parse().expect("a built-in address is well formed");
    texts.iter().map(parse).collect()
}

fn networks(texts: &[&str]) -> Vec<IpNet> {
    let parse = |t: &&str| t.parse().expect("a built-in network is well formed");
    texts.iter().map(parse).collect()
}

/// IPv4 in IPv6 (`::ffff:1.2.3.4`, a dual-stack socket's view) counts as IPv4.
fn holds(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|net| net.contains(&address))
}

/// A configuration while it is put together.
#[derive(Default)]
struct Loading {
    config: Config,
    /// Where each key was set last: `FILE:LINE: ` or `--set `.
    places: BTreeMap<&'static str, String>,
}

impl Loading {
    fn file(&mut self, file: &str, text: &str) -> Result<(), ConfigError> {
        let line = |at: usize| {
            1 + text.as_bytes()[..at]
                .iter()
                .filter(|&&b| b == b'\n')
                .count()
        };
        let table = DeTable::parse(text).map_err(|e| {
            let line = line(e.span().map_or(0, |s| s.start.min(text.len())));
            let why = e.message().lines().collect::<Vec<_>>().join(" ");
            ConfigError(format!(
                "{file}:{line}: this is not TOML ({why}); mend the line"
            ))
        })?;
        self.table("", table.get_ref(), &|at| format!("{file}:{}: ", line(at)))
    }

    fn set(&mut self, set: &str) -> Result<(), ConfigError> {
        let Some((key, value)) = set.split_once('=') else {
            return Err(ConfigError(format!(
                "--set {set}: there is no value; write --set {set}=VALUE"
            )));
        };
        let (key, value) = (key.trim(), value.trim());
        let parsed = DeValue::parse(value).map_err(|e| {
            let bare = !value.is_empty() && !value.contains(['"', '\'', '[', '{', '\n']);
            let mend = if bare {
                format!("quote it: --set '{key}={}'", quote(value))
            } else {
                let why = e.message().lines().next().unwrap_or_default();
                format!("mend it ({why}) or see config/nitro.toml for the form")
            };
            ConfigError(format!(
                "--set {key}: {value:?} is not a TOML value; {mend}"
            ))
        })?;
        self.value(key, &parsed, &|_| "--set ".into(), 0)
    }

    /// The rows of one table, in the order of the text.
    fn table(
        &mut self,
        section: &str,
        table: &DeTable,
        place: &dyn Fn(usize) -> String,
    ) -> Result<(), ConfigError> {
        let mut rows: Vec<_> = table.iter().collect();
        rows.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in rows {
            let name = match section {
                "" => key.get_ref().to_string(),
                _ => format!("{section}.{}", key.get_ref()),
            };
            self.value(&name, value, place, key.span().start)?;
        }
        Ok(())
    }

    fn value(
        &mut self,
        name: &str,
        value: &Spanned<DeValue>,
        place: &dyn Fn(usize) -> String,
        at: usize,
    ) -> Result<(), ConfigError> {
        let wrong = |why: String| ConfigError(format!("{}{name}: {why}", place(at)));
        if let Some(key) = Key::find(name) {
            (key.set)(&mut self.config, value.get_ref()).map_err(wrong)?;
            check(&mut self.config, key.name).map_err(wrong)?;
            self.places.insert(key.name, place(at));
            return Ok(());
        }
        if KEYS.iter().any(|k| k.section == name) {
            return match value.get_ref() {
                DeValue::Table(table) => self.table(name, table, place),
                _ => Err(wrong(format!(
                    "this is a section; write [{name}] and its keys below"
                ))),
            };
        }
        let mend = match nearest(name) {
            Some(near) => format!("did you mean {near}?"),
            None => "remove it, or see config/nitro.toml for all keys".into(),
        };
        Err(wrong(format!("there is no such key; {mend}")))
    }

    /// Checks between keys.
    fn finish(self) -> Result<Config, ConfigError> {
        let c = &self.config;
        let wrong = |key: &str, why: String| {
            let place = self.places.get(key).map_or("", String::as_str);
            Err(ConfigError(format!("{place}{key}: {why}")))
        };
        let empty = |path: &Path| path.as_os_str().is_empty();
        for (certificate, key, key_certificate, key_key) in [
            (&c.tls.certificate, &c.tls.key, "tls.certificate", "tls.key"),
            (
                &c.redis.certificate,
                &c.redis.key,
                "redis.certificate",
                "redis.key",
            ),
        ] {
            let (set, missing) = match (empty(certificate), empty(key)) {
                (false, true) => (key_certificate, key_key),
                (true, false) => (key_key, key_certificate),
                _ => continue,
            };
            return wrong(
                set,
                format!("it stands without {missing}; set both or none"),
            );
        }
        if empty(&c.tls.client_ca) {
            for (key, set) in [
                ("tls.client_crl", !c.tls.client_crl.is_empty()),
                ("tls.client_email", c.tls.client_email),
            ] {
                if set {
                    return wrong(key, "it stands without tls.client_ca; set that, too".into());
                }
            }
            if c.sasl.mechanisms.iter().all(|m| m == "EXTERNAL") {
                return wrong(
                    "sasl.mechanisms",
                    "nobody could log in: EXTERNAL needs tls.client_ca; set that, too".into(),
                );
            }
        } else if !c.sasl.mechanisms.iter().any(|m| m == "EXTERNAL") {
            return wrong(
                "tls.client_ca",
                "no certificate lets in without EXTERNAL; add it to sasl.mechanisms".into(),
            );
        }
        if c.rooms_host().as_deref() == Some(&*c.domain) {
            return wrong(
                "rooms.host",
                "it is the same as domain; write e.g. \"rooms.\" before it".into(),
            );
        }
        if c.component.hosts.0.contains_key(&c.domain) {
            return wrong(
                "component.hosts",
                format!(
                    "{} is the domain of this server; leave it to the server",
                    c.domain
                ),
            );
        }
        if let Some(upload) = c.upload_host() {
            if upload == c.domain || Some(&*upload) == c.rooms_host().as_deref() {
                return wrong(
                    "upload.host",
                    format!(
                        "{upload} is another service's; write e.g. \"upload.\" before the domain"
                    ),
                );
            }
            if c.component.hosts.0.contains_key(&*upload) {
                return wrong(
                    "component.hosts",
                    format!(
                        "{upload} is this server's own (upload.host); give one of them another name, or switch upload.enabled off"
                    ),
                );
            }
        }
        if let Some(rooms) = c.rooms_host()
            && c.component.hosts.0.contains_key(&*rooms)
        {
            return wrong(
                "component.hosts",
                format!("{rooms} is this server's own (rooms.host); give one of them another name"),
            );
        }
        // The pair of a smaller and a larger limit; whichever was set by the operator is named.
        let l = &c.limits;
        for (small, large, key_small, key_large) in [
            (
                2 * l.stanza_bytes_max,
                c.journal.segment_bytes,
                "limits.stanza_bytes_max",
                "journal.segment_bytes",
            ),
            (
                l.stanza_bytes_max,
                l.send_queue_bytes_max,
                "limits.stanza_bytes_max",
                "limits.send_queue_bytes_max",
            ),
            (
                l.stanza_bytes_max,
                c.component.queue_bytes_max,
                "limits.stanza_bytes_max",
                "component.queue_bytes_max",
            ),
            (
                l.stanza_bytes_max,
                c.stream_management.unacked_bytes_max,
                "limits.stanza_bytes_max",
                "stream_management.unacked_bytes_max",
            ),
            (
                c.storm.logins_computing_min,
                c.storm.logins_computing_max,
                "storm.logins_computing_min",
                "storm.logins_computing_max",
            ),
            (
                c.storm.retry_seconds_min as usize,
                c.storm.retry_seconds_max as usize,
                "storm.retry_seconds_min",
                "storm.retry_seconds_max",
            ),
        ] {
            if small > large {
                return match self.places.contains_key(key_small) {
                    true => wrong(
                        key_small,
                        format!(
                            "{small} is more than {key_large} ({large}); lower it or raise that"
                        ),
                    ),
                    false => wrong(
                        key_large,
                        format!(
                            "{large} is less than {key_small} ({small}); raise it or lower that"
                        ),
                    ),
                };
            }
        }
        Ok(self.config)
    }
}

/// Checks of single keys that a range cannot say, and their normal forms.
fn check(c: &mut Config, key: &str) -> Result<(), String> {
    match key {
        "domain" => c.domain = normal_domain(&c.domain)?,
        "rooms.host" if !c.rooms.host.is_empty() => c.rooms.host = normal_domain(&c.rooms.host)?,
        "data_dir" if c.data_dir.as_os_str().is_empty() => {
            return Err(r#"it is empty; write a folder, e.g. "./data""#.into());
        }
        "database" if !c.database.is_empty() => match c.database.split_once(':') {
            Some(("sqlite" | "mysql" | "mariadb", rest)) if !rest.is_empty() => {}
            // without what may be a password
            _ => {
                return Err(
                    "this is no database; write \"sqlite:PATH\" or \"mysql://USER:PASSWORD@HOST/NAME\"".into(),
                );
            }
        },
        "upload.host" if !c.upload.host.is_empty() => {
            c.upload.host = normal_domain(&c.upload.host)?;
        }
        "upload.url" if !c.upload.url.is_empty() => {
            let host = c
                .upload
                .url
                .strip_prefix("https://")
                .or(c.upload.url.strip_prefix("http://"));
            let fine = |host: &str| {
                !host.is_empty()
                    && host
                        .bytes()
                        .all(|b| (b'!'..=b'~').contains(&b) && !b"\"'<>?#\\".contains(&b))
            };
            if !host.is_some_and(fine) {
                return Err(
                    "this is no address of a web server; write e.g. \"https://chat.example.com\""
                        .into(),
                );
            }
        }
        "redis.blade" if c.redis.blade.contains(':') => {
            return Err("it must not contain `:`; write e.g. \"blade1\"".into());
        }
        "journal.segment_bytes" if !c.journal.segment_bytes.is_multiple_of(4096) => {
            return Err("it must be a multiple of 4096".into());
        }
        "sasl.mechanisms" => {
            let list = &c.sasl.mechanisms;
            if let Some(wrong) = list.iter().find(|m| !MECHANISMS.contains(&m.as_str())) {
                return Err(format!(
                    "{wrong:?} is not known here; choose from {}",
                    MECHANISMS.join(", ")
                ));
            }
            if list.is_empty() {
                return Err(format!(
                    "nobody could log in; choose from {}",
                    MECHANISMS.join(", ")
                ));
            }
        }
        _ => {}
    }
    Ok(())
}

/// Lower case, U-labels, no dot at the end (RFC 7622 3.2).
fn normal_domain(domain: &str) -> Result<String, String> {
    let (normal, result) = idna::domain_to_unicode(domain.strip_suffix('.').unwrap_or(domain));
    let forbidden = |c: char| c.is_control() || c.is_whitespace() || "\"&'/:<>@\\".contains(c);
    let labels = normal
        .split('.')
        .all(|label| (1..=63).contains(&label.len()));
    if result.is_err() || !labels || normal.len() > 1023 || normal.contains(forbidden) {
        return Err(format!(
            "{domain:?} is no domain name; write e.g. \"chat.example.com\""
        ));
    }
    Ok(normal)
}

/// The key that was probably meant.
fn nearest(name: &str) -> Option<&'static str> {
    // A key of the right name in another section is a better guess than any likeness.
    let last = |s: &str| s.rsplit('.').next().map(str::to_string);
    let same: Vec<_> = KEYS.iter().filter(|k| last(k.name) == last(name)).collect();
    if let [only] = same[..] {
        return Some(only.name);
    }
    let distances = KEYS.iter().map(|k| (edits(name, k.name), k.name));
    let (distance, near) = distances.min()?;
    (distance <= 1 + name.len() / 4).then_some(near)
}

/// Levenshtein's distance.
fn edits(a: &str, b: &str) -> usize {
    // Longer names are no misspellings of ours; this bounds the work.
    if a.len() > 100 {
        return usize::MAX;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Result<Config, ConfigError> {
        let mut loading = Loading::default();
        loading.file("nitro.toml", text)?;
        loading.finish()
    }

    fn sentence(text: &str) -> String {
        file(text).expect_err(text).to_string()
    }

    fn set(sets: &[&str]) -> Result<Config, ConfigError> {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Config::load(None, &sets)
    }

    fn set_sentence(text: &str) -> String {
        set(&[text]).expect_err(text).to_string()
    }

    #[test]
    fn the_committed_file_is_the_generated_one() {
        let committed = include_str!("../config/nitro.toml");
        assert_eq!(
            committed,
            Config::default_file(),
            "run: cargo run -- check-config --print-defaults > config/nitro.toml"
        );
    }

    #[test]
    fn the_generated_file_sets_every_key_to_its_default() {
        let text = Config::default_file();
        let mut loading = Loading::default();
        loading.file("nitro.toml", &text).unwrap();
        assert_eq!(loading.places.len(), KEYS.len());
        assert_eq!(loading.finish().unwrap(), Config::default());
    }

    #[test]
    fn defaults_pass_their_own_ranges_and_are_not_repeated() {
        for key in KEYS {
            let shown = (key.show)(&Config::default());
            set(&[&format!("{}={shown}", key.name)]).unwrap();
            assert_eq!(KEYS.iter().filter(|k| k.name == key.name).count(), 1);
            assert!(!key.doc.is_empty(), "{}", key.name);
        }
    }

    #[test]
    fn a_file_is_read_and_sets_override_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        std::fs::write(&path, "domain = 'a.example'\n[c2s]\nlisten = ['[::1]:1']\n").unwrap();
        let sets = [
            "c2s.require_tls=false".into(),
            "domain = \"B.example.\"".into(),
        ];
        let config = Config::load(Some(&path), &sets).unwrap();
        assert_eq!(config.domain, "b.example");
        assert_eq!(config.c2s.listen, addresses(&["[::1]:1"]));
        assert!(!config.c2s.require_tls);
        assert_eq!(config.http, Config::default().http);
    }

    #[test]
    fn dotted_keys_and_inline_tables_mean_the_same_as_sections() {
        let by_section = file("[ping]\nidle_seconds = 60\ntimeout_seconds = 5").unwrap();
        assert_eq!(
            file("ping.idle_seconds = 60\nping.timeout_seconds = 5").unwrap(),
            by_section
        );
        assert_eq!(
            set(&["ping={idle_seconds=60,timeout_seconds=5}"]).unwrap(),
            by_section
        );
    }

    #[test]
    fn components_have_secrets_in_the_file_or_in_files_of_their_own_and_a_policy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "of a file\n").unwrap();
        let text = format!(
            "[component]\npolicy = 'replace'\n[component.hosts]\n'IRC.localhost' = 'one'\n\
             'bot.example' = {{ secret_file = '{}', policy = 'share' }}",
            path.display()
        );
        let config = file(&text).unwrap();
        let wanted = [
            ("bot.example", "of a file", ComponentPolicy::Share),
            ("irc.localhost", "one", ComponentPolicy::Replace),
        ];
        let wanted = wanted.map(|(name, secret, policy)| (name.into(), secret.into(), policy));
        assert_eq!(config.component_hosts().unwrap(), wanted);
        let shown = format!("component.hosts={}", config.component.hosts.show());
        assert_eq!(
            set(&[&shown]).unwrap().component.hosts,
            config.component.hosts
        );
        assert!(!format!("{config:?}").contains("one\""));
        std::fs::write(&path, "\n").unwrap();
        assert!(config.component_hosts().unwrap_err().contains("no secret"));
        std::fs::remove_file(&path).unwrap();
        let why = config.component_hosts().unwrap_err();
        assert!(why.contains("bot.example") && why.contains("readable"));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let why = Config::load(Some(Path::new("/nowhere/n.toml")), &[])
            .unwrap_err()
            .to_string();
        assert!(why.starts_with("/nowhere/n.toml: "), "{why}");
    }

    #[test]
    fn a_mistake_names_key_line_and_mend() {
        for (text, wanted) in [
            (
                "\n[c2s]\nlisten = [\"foo\"]",
                r#"nitro.toml:3: c2s.listen: "foo" is not an address with a port; write e.g. ["0.0.0.0:5222"]"#,
            ),
            (
                "c2s.listen = 'foo'",
                r#"nitro.toml:1: c2s.listen: "foo" is a text; write a list, e.g. ["0.0.0.0:5222"]"#,
            ),
            (
                "domian = 'a'",
                "nitro.toml:1: domian: there is no such key; did you mean domain?",
            ),
            (
                "[c2s]\n\nrequire_tsl = true",
                "nitro.toml:3: c2s.require_tsl: there is no such key; did you mean c2s.require_tls?",
            ),
            (
                "require_tls = true",
                "nitro.toml:1: require_tls: there is no such key; did you mean c2s.require_tls?",
            ),
            (
                "[quite.else]\na = 1",
                "nitro.toml:1: quite: there is no such key; remove it, or see config/nitro.toml for all keys",
            ),
            (
                "c2s = 5",
                "nitro.toml:1: c2s: this is a section; write [c2s] and its keys below",
            ),
            (
                "c2s.require_tls = 'yes'",
                r#"nitro.toml:1: c2s.require_tls: "yes" is a text; write true or false"#,
            ),
            (
                "limits.depth_max = 0",
                "nitro.toml:1: limits.depth_max: 0 is out of range; write a number from 8 to 1000",
            ),
            (
                "sasl.iterations = 4095",
                "nitro.toml:1: sasl.iterations: 4095 is out of range; write a number from 4096 to 10_000_000",
            ),
            (
                "limits.depth_max = -1",
                "nitro.toml:1: limits.depth_max: -1 is out of range; write a whole number that is not negative",
            ),
            (
                "limits.depth_max = 1.5",
                "nitro.toml:1: limits.depth_max: found a number; write a whole number",
            ),
            (
                "cores = 'many'",
                r#"nitro.toml:1: cores: "many" names no cores; write "all", or numbers and spans such as "0-3" or "0,2""#,
            ),
            (
                "component.hosts = ['irc.localhost']",
                r#"nitro.toml:1: component.hosts: found a list; write names with their secrets, e.g. { "irc.example.com" = "secret" }"#,
            ),
            (
                "[component.hosts]\n'irc.localhost' = { policy = 'share' }",
                r#"nitro.toml:1: component.hosts: irc.localhost: the secret is missing; write a secret in quotes, or { secret_file = "PATH", policy = "share" }"#,
            ),
            (
                "[component.hosts]\n'localhost' = 'x'",
                "nitro.toml:1: component.hosts: localhost is the domain of this server; leave it to the server",
            ),
            (
                "registration = 'maybe'",
                r#"nitro.toml:1: registration: "maybe" is not known here; write "off" or "loopback" or "on""#,
            ),
            (
                "limits.exempt = ['10.0.0.0/33']",
                r#"nitro.toml:1: limits.exempt: "10.0.0.0/33" is not a network; write e.g. ["10.1.0.0/16", "::1"]"#,
            ),
            (
                "domain = 'a b'",
                r#"nitro.toml:1: domain: "a b" is no domain name; write e.g. "chat.example.com""#,
            ),
            (
                "database = 'postgres://x'",
                r#"nitro.toml:1: database: this is no database; write "sqlite:PATH" or "mysql://USER:PASSWORD@HOST/NAME""#,
            ),
            (
                "tls.client_crl = ['c.crl']",
                "nitro.toml:1: tls.client_crl: it stands without tls.client_ca; set that, too",
            ),
            (
                "tls.client_email = true",
                "nitro.toml:1: tls.client_email: it stands without tls.client_ca; set that, too",
            ),
            (
                "sasl.mechanisms = ['PLAIN']\ntls.client_ca = 'ca.pem'",
                "nitro.toml:2: tls.client_ca: no certificate lets in without EXTERNAL; add it to sasl.mechanisms",
            ),
            (
                "sasl.mechanisms = ['EXTERNAL']",
                "nitro.toml:1: sasl.mechanisms: nobody could log in: EXTERNAL needs tls.client_ca; set that, too",
            ),
            (
                "\ntls.key = 'k'",
                "nitro.toml:2: tls.key: it stands without tls.certificate; set both or none",
            ),
            (
                "limits.stanza_bytes_max = 10_000_000",
                "nitro.toml:1: limits.stanza_bytes_max: 10000000 is more than limits.send_queue_bytes_max (2097152); lower it or raise that",
            ),
        ] {
            assert_eq!(sentence(text), wanted);
        }
    }

    #[test]
    fn the_first_mistake_of_the_file_is_told() {
        assert!(sentence("zzzzzzzzz = 1\naaaaaaaaa = 1").contains("zzzzzzzzz"));
    }

    #[test]
    fn text_that_is_not_toml_is_one_sentence_with_its_line() {
        for text in [
            "a =\nb",
            "\na = [1",
            "\n\u{0}",
            "domain = 'a'\ndomain = 'b'",
        ] {
            let why = sentence(text);
            assert!(why.starts_with("nitro.toml:"), "{why}");
            assert_eq!(why.lines().count(), 1, "{why}");
        }
        assert!(sentence("domain = 'a'\ndomain = 'b'").starts_with("nitro.toml:2: "));
    }

    #[test]
    fn a_mistake_in_a_set_names_the_option_and_the_mend() {
        for (text, wanted) in [
            (
                "domain",
                "--set domain: there is no value; write --set domain=VALUE",
            ),
            (
                "domain=chat.example.com",
                r#"--set domain: "chat.example.com" is not a TOML value; quote it: --set 'domain="chat.example.com"'"#,
            ),
            (
                "c2s.listen=[\"foo\"]",
                r#"--set c2s.listen: "foo" is not an address with a port; write e.g. ["0.0.0.0:5222"]"#,
            ),
            (
                "c2s.lisen=[]",
                "--set c2s.lisen: there is no such key; did you mean c2s.listen?",
            ),
            (
                "tls.certificate='c'",
                "--set tls.certificate: it stands without tls.key; set both or none",
            ),
        ] {
            assert_eq!(set_sentence(text), wanted);
        }
        for text in [
            "domain=",
            "domain='a'\ncores='0'",
            "c2s.listen=[",
            "=1",
            "domain='a' 'b'",
        ] {
            assert!(set_sentence(text).starts_with("--set "), "{text}");
        }
    }

    #[test]
    fn cores_are_read_and_picked_from_those_allowed() {
        let cores = |s: &str| set(&[&format!("cores={s:?}")]).map(|c| c.cores);
        assert_eq!(cores("0-3").unwrap(), Cores::List(vec![0, 1, 2, 3]));
        assert_eq!(cores("2,0,2").unwrap(), Cores::List(vec![0, 2]));
        assert_eq!(cores("0-1,4").unwrap().show(), r#""0-1,4""#);
        for wrong in ["", "3-1", "a", "0-", "5000", "0-99999999999999999999"] {
            assert!(cores(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Cores::All.pick(&[1, 2]), Ok(vec![1, 2]));
        assert_eq!(Cores::List(vec![2]).pick(&[1, 2]), Ok(vec![2]));
        assert_eq!(
            Cores::List(vec![0]).pick(&[1, 2]).unwrap_err(),
            "cores: this process may not run on core 0; choose from 1-2"
        );
    }

    #[test]
    fn a_reload_tells_what_it_takes_over_and_what_needs_a_restart() {
        let old = Config::default();
        let new = set(&[
            "ping.idle_seconds=60",
            "domain='other'",
            "cache.bytes_max=2_000_000",
            "limits.depth_max=9",
        ])
        .unwrap();
        let (applied, restart) = reloadable_diff(&old, &new);
        assert_eq!(applied, ["limits.depth_max", "ping.idle_seconds"]);
        assert_eq!(restart, ["domain", "cache.bytes_max"]);
        let merged = old.with_live_keys_of(&new);
        assert_eq!(reloadable_diff(&old, &merged), (applied, vec![]));
        assert_eq!(merged.domain, "localhost");
    }

    #[test]
    fn the_domain_and_the_mechanisms_are_those_of_the_protocol() {
        for domain in [
            "Chat.Example.com.",
            "localhost",
            "B\u{fc}cher.example",
            "xn--bcher-kva.example",
            "10.0.0.1",
        ] {
            let own = normal_domain(domain).unwrap();
            assert_eq!(crate::xmpp::jid::domainpart(domain).unwrap(), own);
            assert_eq!(crate::xmpp::jid::domainpart(&own).unwrap(), own);
        }
        let names: Vec<_> = crate::xmpp::sasl::Mechanism::ALL
            .iter()
            .map(|m| m.name())
            .collect();
        assert_eq!(names, MECHANISMS);
    }

    #[test]
    fn a_mapped_address_is_exempt_like_its_own() {
        let config = Config::default();
        assert!(config.is_exempt("::ffff:127.0.0.1".parse().unwrap()));
        assert!(config.is_exempt("::1".parse().unwrap()));
        assert!(!config.is_exempt("10.0.0.1".parse().unwrap()));
        assert!(!config.is_trusted_proxy("127.0.0.1".parse().unwrap()));
    }

    #[test]
    fn paths_of_database_and_certificate_follow_the_data_folder() {
        let config = set(&["data_dir='/d'"]).unwrap();
        assert_eq!(config.database(), "sqlite:/d/nitro.db");
        assert_eq!(config.journal_dir(), Path::new("/d/journal"));
        assert_eq!(config.certificate_paths().1, Path::new("/d/key.pem"));
        let config = set(&[
            "database='sqlite:x.db'",
            "tls.certificate='c'",
            "tls.key='k'",
        ])
        .unwrap();
        assert_eq!(config.database(), "sqlite:x.db");
        assert_eq!(config.certificate_paths(), ("c".into(), "k".into(), false));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,60}", key in "[a-z._]{0,20}") {
            let _ = file(&text);
            let _ = file(&format!("{key} = {text}"));
            let _ = set(&[&text, &format!("{key}={text}")]);
        }
    }
}
