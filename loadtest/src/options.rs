//! The command line, and the [`Target`] that every connection needs from it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::limits::Limit;
use crate::scram::Hash;
use crate::soak::Long;

/// Source ports that one address has for one server, with room to spare.
const CONNECTIONS_PER_ADDRESS: u32 = 25_000;

/// Load generator for XMPP servers.
#[derive(Parser, Debug)]
#[command(version, about, max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make the accounts PREFIX0 … PREFIX(N-1), over XEP-0077 or as CSV files for an import.
    #[command(
        after_help = "Example:\n  loadtest register --users 5000 --csv users.csv --roster 20 --roster-csv rosters.csv"
    )]
    Register(RegisterOptions),
    /// Users log in as fast as they can.
    #[command(
        after_help = "Example:\n  loadtest storm --users 5000 --tls starttls --server-pid $(pidof nitro) --rounds 5\n  \
                      taskset -c 1 loadtest storm --users 10000 --for 30 --live-users 100 --live-rate 1000 --keys keys\n  \
                      loadtest storm --users 10000 --metrics http://127.0.0.1:5280/metrics --metric nitro_sql_statements"
    )]
    Storm(StormOptions),
    /// Pairs of online users chat: latency, losses, server CPU per message.
    #[command(
        after_help = "Example:\n  loadtest chat --users 200 --window 8 --duration 10 --server-pid $(pidof nitro)\n  \
                      loadtest chat --users 1000 --rate 2000 --ack --offline-share 0.25 --server-pid $(pidof nitro) \
                      --server-pid $(pidof mariadbd)"
    )]
    Chat(ChatOptions),
    /// A moderate load for hours: leaks of memory and drift of latencies.
    #[command(
        after_help = "Example:\n  loadtest soak --for 8h --users 2000 --login-rate 5 --live-users 200 --live-rate 200 \
                      --server-pid $(pidof nitro) --html soak.html --fail-if 'rss_slope_kib_per_hour > 1024' \
                      --fail-if 'message_p99_drift > 1.5'"
    )]
    Soak(SoakOptions),
    /// Some users do not read what they are sent: what they cost, and whether others notice.
    #[command(
        after_help = "Example:\n  loadtest slow-readers --users 200 --rate 2000 --body 1000 --live-users 100 --server-pid $(pidof nitro)"
    )]
    SlowReaders(SlowReadersOptions),
    /// Hostile clients: how the server answers them, and whether others notice.
    #[command(
        after_help = "Example:\n  loadtest flood --attackers 60 --for 20 --live-users 100 --server-pid $(pidof nitro)"
    )]
    Flood(FloodOptions),
    /// Users on line change their presence: latency and price of the fan-out to their contacts.
    #[command(
        after_help = "Example:\n  loadtest register --users 1000 --roster 20 --csv users.csv --roster-csv rosters.csv\n  \
                      loadtest presence --users 1000 --contacts 20 --rate 200 --server-pid $(pidof nitro)"
    )]
    Presence(PresenceOptions),
    /// Users come into chat rooms, and some of them talk: latency and price of a delivery, and whether others notice.
    #[command(
        after_help = "Example:\n  loadtest room --rooms 2 --occupants 350 --senders 10 --rate 20 --live-users 100 --server-pid $(pidof nitro)\n  \
                      loadtest room --rooms 1 --occupants 350 --join-rate 1000000 --server-pid $(pidof nitro)   # all at once"
    )]
    Room(RoomOptions),
    /// Everyone is cut at once: how long until all are back, in their sessions (XEP-0198), and what it costs.
    #[command(
        after_help = "Example:\n  loadtest register --users 25000 --roster 50 --csv users.csv --roster-csv rosters.csv\n  \
                      loadtest reconnect --users 10000 --accounts 25000 --rounds 5 --server-pid $(pidof nitro)"
    )]
    Reconnect(ReconnectOptions),
    /// Logins by an arrival curve, such as a market open.
    #[command(
        after_help = "The curve is a CSV file with the columns seconds and logins_per_s; between two lines the rate changes evenly:\n  \
                      seconds,logins_per_s\n  0,5\n  60,400\n  90,400\n  120,20\n\n\
                      Example:\n  loadtest replay --curve open.csv --users 20000 --live-users 100 --html open.html"
    )]
    Replay(ReplayOptions),
    /// Users on line read their archives (XEP-0313): the last page, with one peer, everything page by page.
    #[command(
        after_help = "Example:\n  loadtest archive --users 200 --messages 500 --server-pid $(pidof nitro) \
                      --metrics http://127.0.0.1:5280/metrics --metric nitro_sql_pages"
    )]
    Archive(ArchiveOptions),
    /// Resident memory of the server per idle user.
    #[command(
        after_help = "Example:\n  loadtest memory --from 500 --to 5000 --server-pid $(pidof nitro)"
    )]
    Memory(MemoryOptions),
}

#[derive(Args, Debug, Clone)]
pub struct Global {
    /// Name or address of the server.
    #[arg(long, global = true, default_value = "127.0.0.1")]
    pub host: String,
    /// Port [default: 5222, 5223 with --tls direct; 5280 and 5443 with --websocket].
    #[arg(long, global = true)]
    pub port: Option<u16>,
    /// The XMPP domain.
    #[arg(long, global = true, default_value = "localhost")]
    pub domain: String,
    #[arg(long, global = true, value_enum, default_value_t = TlsMode::None)]
    pub tls: TlsMode,
    /// Clients come by WebSocket (RFC 7395) to this path of the server's web port: ws://, and with --tls direct wss://.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "/ws"
    )]
    pub websocket: Option<String>,
    /// Whether the server's certificate is verified; auto: not on loopback.
    #[arg(long, global = true, value_enum, default_value_t = Verify::Auto)]
    pub tls_verify: Verify,
    /// Trusted certificates (PEM) for verification.
    #[arg(
        long,
        global = true,
        default_value = "/etc/ssl/certs/ca-certificates.crt"
    )]
    pub tls_ca: PathBuf,
    /// Resume TLS sessions (each login is a full handshake otherwise).
    #[arg(long, global = true)]
    pub tls_resume: bool,
    /// Number of users.
    #[arg(long, short = 'n', global = true, default_value_t = 1000)]
    pub users: u32,
    /// Users are named PREFIX0, PREFIX1, …
    #[arg(long, global = true, default_value = "load")]
    pub prefix: String,
    /// Spread the users evenly over this many accounts: with rosters in a ring, users/accounts is the share of everyone's
    /// contacts who are on line [default: as many as users].
    #[arg(long, global = true, value_name = "M")]
    pub accounts: Option<u32>,
    /// The first account is PREFIX<FIRST>: several generators share the accounts of one prefix.
    #[arg(long, global = true, default_value_t = 0)]
    pub first: u32,
    /// Password of all users.
    #[arg(long, global = true, default_value = "secret")]
    pub password: String,
    /// SASL mechanism.
    #[arg(long, global = true, value_enum, default_value_t = MechanismOption::ScramSha1)]
    pub mechanism: MechanismOption,
    /// How to log in: RFC 6120's way, all in one request (XEP-0388, XEP-0386), or so with a token after the first time (XEP-0484), sent
    /// together with the stream header. The last two need TLS.
    #[arg(long, global = true, value_enum, default_value_t = Login::Old)]
    pub login: Login,
    /// Keep the users' SCRAM keys in this file from run to run (for the same --password): no key is derived while the first
    /// logins after a restart of the server are measured.
    #[arg(long, global = true, value_name = "FILE")]
    pub keys: Option<PathBuf>,
    /// Resource to bind; empty: the server makes one.
    #[arg(long, global = true, default_value = "loadtest")]
    pub resource: String,
    /// Announce capabilities (XEP-0115), as clients of people do: then the server needs what it knows of the user's nodes (XEP-0163) at
    /// each login.
    #[arg(long, global = true)]
    pub caps: bool,
    /// When a login is complete.
    #[arg(long, global = true, value_enum, default_value_t = Until::Presence)]
    pub until: Until,
    /// Logins (or registrations, log-outs) in progress at a time, outside of --rate.
    #[arg(long, global = true, default_value_t = 100)]
    pub parallel: usize,
    /// Seconds until a login has failed.
    #[arg(long, global = true, default_value_t = 30.0)]
    pub timeout: f64,
    /// Threads of the generator.
    #[arg(long, global = true, default_value_t = 1)]
    pub threads: usize,
    /// Connect from 127.0.0.1 … 127.0.0.N [default: as many as the connections need].
    #[arg(long, global = true, value_name = "N")]
    pub source_addresses: Option<u8>,
    /// Processes of the server: their CPU time and memory are reported. Several (server, database, ...), also by giving
    /// it several times: together, and apart by name.
    #[arg(long, global = true, value_delimiter = ',', value_name = "PID")]
    pub server_pid: Vec<u32>,
    /// Count the children of --server-pid too.
    #[arg(long, global = true)]
    pub server_children: bool,
    /// Write the result as one JSON line to this file (appended); "-": to standard output, instead of the table.
    #[arg(long, global = true, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a report with plots: one HTML page that needs no network.
    #[arg(long, global = true, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Put the histograms into the JSON document too, as lists of [nanoseconds, count]: to pool those of several runs.
    #[arg(long, global = true)]
    pub histograms: bool,
    /// Write the latencies of each --interval as an HdrHistogram log (V2, nanoseconds, a tag for each kind).
    #[arg(long, global = true, value_name = "FILE")]
    pub hdr: Option<PathBuf>,
    /// Seconds that a point of the plots and an entry of the log stand for.
    #[arg(
        long,
        global = true,
        value_name = "SECONDS",
        default_value_t = 1.0,
        value_parser = positive
    )]
    pub interval: f64,
    /// A limit: the run fails (exit status 1) if this is true of its figures. Several times: several limits. Figures are
    /// the keys of the JSON document (`failed>0`), histograms have p50, p99, p99.9 ..., max, mean and count
    /// (`chat.p99>2ms`); also `3*NAME` and `max(A,B)`, `min(A,B)`: `live_storm.p99 > max(3*live_quiet.p99, 1ms)`.
    #[arg(long, global = true, value_name = "COMPARISON")]
    pub fail_if: Vec<Limit>,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("a number greater than 0 is expected".into()),
    }
}

#[derive(Args, Debug)]
pub struct RegisterOptions {
    /// Contacts of each user: the K nearest in a ring, mutual.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub roster: u32,
    /// Write the accounts to this CSV file instead of registering them.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write the contacts to this CSV file (with --csv).
    #[arg(long, value_name = "FILE", requires = "csv")]
    pub roster_csv: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct StormOptions {
    /// Logins per second, open loop: latency counts from the time a login was due.
    #[arg(long)]
    pub rate: Option<f64>,
    /// Measured rounds; the users log out between them.
    #[arg(long, default_value_t = 1)]
    pub rounds: u32,
    /// Log in once unmeasured before: learns the SCRAM keys and warms the server's caches.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub warm: bool,
    /// Measure users whose K contacts (see register --roster) are online: some users log out and in among the others.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub contacts_online: u32,
    /// Instead of rounds: the users log in and out again and again for so long, at most half of them on line once all have
    /// been; a log-out is part of the price of a login.
    #[arg(long = "for", value_name = "SECONDS", conflicts_with_all = ["rounds", "contacts_online", "hold", "rss"])]
    pub duration: Option<f64>,
    #[command(flatten)]
    pub live: LiveOptions,
    /// Stay online this long after the last round.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub hold: f64,
    /// Report the server's resident memory at the end of --hold.
    #[arg(long)]
    pub rss: bool,
    #[command(flatten)]
    pub metrics: MetricsOptions,
}

/// Users who chat all the time while something else happens: what they notice of it.
#[derive(Args, Debug, Clone)]
pub struct LiveOptions {
    /// With --for: so many others, on line all the time, send one another messages: their latency in a quiet time before
    /// the storm and in the storm. The accounts are LIVE-PREFIX0, LIVE-PREFIX1, …
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub live_users: u32,
    /// Messages per second of all of them together, open loop: latency counts from the time a message was due.
    #[arg(
        long,
        value_name = "RATE",
        default_value_t = 1000.0,
        requires = "live_users"
    )]
    pub live_rate: f64,
    #[arg(
        long,
        value_name = "PREFIX",
        default_value = "live",
        requires = "live_users"
    )]
    pub live_prefix: String,
    /// Bytes of the body of each of their messages.
    #[arg(long, value_name = "BYTES", default_value_t = 100)]
    pub live_body: usize,
    /// Length of the quiet time.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub quiet: f64,
    /// Their messages are to be stored by a server with an archive: with a body and without a hint (the default).
    #[arg(long, conflicts_with = "no_store")]
    pub stored: bool,
    /// Their messages have the hint <no-store/> (XEP-0334).
    #[arg(long)]
    pub no_store: bool,
}

#[derive(Args, Debug, Clone)]
pub struct ChatOptions {
    /// Messages of each sender under way: a receipt lets the next one go (an acknowledgement, when the recipient is off
    /// line).
    #[arg(long, default_value_t = 8, conflicts_with = "rate")]
    pub window: u32,
    /// Messages per second of all together, open loop: latency counts from the time a message was due.
    #[arg(long)]
    pub rate: Option<f64>,
    /// Seconds to measure.
    #[arg(long, default_value_t = 10.0)]
    pub duration: f64,
    /// Send this many messages instead of for a duration.
    #[arg(long, conflicts_with = "duration")]
    pub messages: Option<u64>,
    /// Seconds of chat before the measurement [default: 1, with --messages or --settle 0].
    #[arg(long)]
    pub warmup: Option<f64>,
    /// Seconds without any receipt after which what is missing at the end is lost.
    #[arg(long, default_value_t = 5.0)]
    pub drain: f64,
    /// Bytes of each body.
    #[arg(long, default_value_t = 100)]
    pub body: usize,
    /// Address bare JIDs instead of full ones.
    #[arg(long)]
    pub bare: bool,
    /// XEP-0198: enable stream management and answer the server's requests.
    #[arg(long)]
    pub sm: bool,
    /// The same, and ask for an acknowledgement behind every N-th message of a sender: measures the time from when a
    /// message was due to the <a/> that covers it, and counts what was acknowledged and lost.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1", require_equals = true)]
    pub ack: Option<u32>,
    /// Share of the recipients who are off line: they log in when all is sent, and what waits for them must be there,
    /// in order.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, conflicts_with_all = ["messages", "no_store"])]
    pub offline_share: f64,
    /// Messages as a server with an archive must store them, with a body and without a hint. This is the default; with
    /// --no-store beside it both are measured, one after the other.
    #[arg(long)]
    pub stored: bool,
    /// Messages that must not be stored: with a body and the hint <no-store/> (XEP-0334).
    #[arg(long)]
    pub no_store: bool,
    /// What the server does behind the messages belongs to their price (a journal that is drained into a database, say):
    /// its CPU time is counted until it has been at rest for so long, and divided by all messages.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", require_equals = true)]
    pub settle: Option<f64>,
    #[command(flatten)]
    pub metrics: MetricsOptions,
}

#[derive(Args, Debug, Clone)]
pub struct ArchiveOptions {
    /// Messages that each user sends to the other one of his pair before, so that both archives have twice as many.
    #[arg(long, default_value_t = 200)]
    pub messages: u32,
    /// Bytes of each body.
    #[arg(long, default_value_t = 100)]
    pub body: u32,
    /// Entries of a page.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub page: u32,
    /// Times that each user reads the last page of each kind.
    #[arg(long, default_value_t = 10)]
    pub rounds: u32,
    /// Pages per second of all users together, open loop [default: --parallel at a time].
    #[arg(long, value_parser = positive)]
    pub rate: Option<f64>,
    #[command(flatten)]
    pub metrics: MetricsOptions,
}

/// Counters of the server that a run is asked to look at.
#[derive(Args, Debug, Clone, Default)]
pub struct MetricsOptions {
    /// Where the server shows its counters (Prometheus text), such as http://127.0.0.1:5280/metrics.
    /// Its histograms, by shard, go into the --html report.
    #[arg(long, value_name = "URL")]
    pub metrics: Option<String>,
    /// Report by how much this counter grew for each login or message; the sum of all its labels. Its `_total` may be
    /// left out. Several times: several counters.
    #[arg(long, value_name = "NAME", requires = "metrics")]
    pub metric: Vec<String>,
}

#[derive(Args, Debug)]
pub struct SoakOptions {
    /// How long: 90s, 30m, 8h, 2d.
    #[arg(long = "for", value_name = "TIME", default_value = "1h")]
    pub duration: Long,
    /// Logins per second of the users who log in and out again.
    #[arg(long, value_name = "RATE", default_value_t = 5.0, value_parser = positive)]
    pub login_rate: f64,
    #[command(flatten)]
    pub live: LiveOptions,
    #[command(flatten)]
    pub metrics: MetricsOptions,
}

#[derive(Args, Debug)]
pub struct SlowReadersOptions {
    /// Every second one of --users does not read; the others write to them, so many messages per second together.
    #[arg(long, default_value_t = 1000.0, value_parser = positive)]
    pub rate: f64,
    /// Bytes of each body.
    #[arg(long, default_value_t = 1000)]
    pub body: usize,
    /// Seconds of it.
    #[arg(long = "for", value_name = "SECONDS", default_value_t = 20.0, value_parser = positive)]
    pub duration: f64,
    #[command(flatten)]
    pub live: LiveOptions,
}

#[derive(Args, Debug)]
pub struct FloodOptions {
    /// Connections at a time.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=2000))]
    pub attackers: u32,
    /// What they do, several by commas [default: all, evenly].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub attack: Vec<Attack>,
    /// Seconds of it.
    #[arg(long = "for", value_name = "SECONDS", default_value_t = 20.0, value_parser = positive)]
    pub duration: f64,
    #[command(flatten)]
    pub live: LiveOptions,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attack {
    /// Connects and says nothing.
    Silent,
    /// Sends its stream header byte by byte.
    Trickle,
    /// Sends what is no XML.
    Garbage,
    /// Sends an element whose text has no end.
    Endless,
    /// Opens elements without end.
    Nested,
    /// Guesses a password (of PREFIX `load`, user 0, by PLAIN).
    Guess,
}

#[derive(Args, Debug)]
pub struct PresenceOptions {
    /// Contacts of each user who are on line (see register --roster).
    #[arg(long, value_name = "K", default_value_t = 20)]
    pub contacts: u32,
    /// Changes per second of all users together, open loop: latency counts from the time a change was due.
    #[arg(long, default_value_t = 100.0, value_parser = positive)]
    pub rate: f64,
    /// Seconds to measure.
    #[arg(long, default_value_t = 10.0, value_parser = positive)]
    pub duration: f64,
    /// Seconds without any presence after which what is missing will not come.
    #[arg(long, default_value_t = 5.0, value_parser = positive)]
    pub drain: f64,
    #[command(flatten)]
    pub metrics: MetricsOptions,
}

#[derive(Args, Debug)]
pub struct RoomOptions {
    /// Chat rooms, load0 ... at the server's service `rooms.DOMAIN`.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rooms: u32,
    /// Users in each; together they are --users.
    #[arg(long, default_value_t = 350, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub occupants: u32,
    /// Of these, those who talk.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub senders: u32,
    /// Users who come in per second.
    #[arg(long, default_value_t = 200.0, value_parser = positive)]
    pub join_rate: f64,
    /// Messages per second of all senders together, open loop: latency counts from the time a message was due.
    #[arg(long, default_value_t = 20.0, value_parser = positive)]
    pub rate: f64,
    /// Bytes of each body.
    #[arg(long, default_value_t = 100)]
    pub body: usize,
    /// Mark messages so that no archive keeps them (XEP-0334).
    #[arg(long)]
    pub room_no_store: bool,
    /// Seconds to measure.
    #[arg(long, default_value_t = 10.0, value_parser = positive)]
    pub duration: f64,
    /// Seconds without any stanza after which what is missing will not come.
    #[arg(long, default_value_t = 5.0, value_parser = positive)]
    pub drain: f64,
    #[command(flatten)]
    pub metrics: MetricsOptions,
    #[command(flatten)]
    pub live: LiveOptions,
}

#[derive(Args, Debug)]
pub struct ReconnectOptions {
    /// How often everyone is cut.
    #[arg(long, default_value_t = 1)]
    pub rounds: u32,
    /// Seconds on line before the cut.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0)]
    pub online: f64,
    /// Seconds from the cut until the users try to come back.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub gap: f64,
    /// Users come back at this rate, open loop [default: --parallel at a time, as fast as they can].
    #[arg(long)]
    pub rate: Option<f64>,
    /// In each round also log everyone out, and in again without resumption: what the same costs afresh.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub afresh: bool,
    #[command(flatten)]
    pub metrics: MetricsOptions,
}

#[derive(Args, Debug)]
pub struct ReplayOptions {
    /// The arrival curve.
    #[arg(long, value_name = "FILE")]
    pub curve: PathBuf,
    /// Replay it so many times as fast.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = positive)]
    pub speed: f64,
    /// Multiply its rates.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = positive)]
    pub scale: f64,
    /// Log in once unmeasured before: learns the SCRAM keys and warms the server's caches.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub warm: bool,
    #[command(flatten)]
    pub live: LiveOptions,
    #[command(flatten)]
    pub metrics: MetricsOptions,
}

#[derive(Args, Debug)]
pub struct MemoryOptions {
    /// The smaller number of users.
    #[arg(long, default_value_t = 500)]
    pub from: u32,
    /// The larger number of users.
    #[arg(long, default_value_t = 5000)]
    pub to: u32,
    /// Seconds of rest before each reading.
    #[arg(long, default_value_t = 30.0)]
    pub rest: f64,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    None,
    Starttls,
    Direct,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    Auto,
    On,
    Off,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// The roster and the reflection of the own presence have arrived.
    Presence,
    /// The roster has arrived.
    Roster,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Login {
    Old,
    Sasl2,
    Fast,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum MechanismOption {
    #[value(name = "scram-sha-1")]
    ScramSha1,
    #[value(name = "scram-sha-256")]
    ScramSha256,
    #[value(name = "scram-sha-512")]
    ScramSha512,
    #[value(name = "scram-sha-1-plus")]
    ScramSha1Plus,
    #[value(name = "scram-sha-256-plus")]
    ScramSha256Plus,
    #[value(name = "scram-sha-512-plus")]
    ScramSha512Plus,
    Plain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    Plain,
    Scram(Hash),
    /// Bound to the TLS connection by its exporter.
    ScramPlus(Hash),
}

impl Mechanism {
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::Plain => "PLAIN",
            Mechanism::Scram(Hash::Sha1) => "SCRAM-SHA-1",
            Mechanism::Scram(Hash::Sha256) => "SCRAM-SHA-256",
            Mechanism::Scram(Hash::Sha512) => "SCRAM-SHA-512",
            Mechanism::ScramPlus(Hash::Sha1) => "SCRAM-SHA-1-PLUS",
            Mechanism::ScramPlus(Hash::Sha256) => "SCRAM-SHA-256-PLUS",
            Mechanism::ScramPlus(Hash::Sha512) => "SCRAM-SHA-512-PLUS",
        }
    }
}

/// What all connections of a run have in common.
#[derive(Clone, Debug)]
pub struct Target {
    pub address: SocketAddr,
    pub source_addresses: u8,
    pub domain: String,
    pub password: String,
    pub resource: String,
    pub tls: TlsMode,
    /// The path of RFC 7395; `None`: XMPP over TCP itself.
    pub websocket: Option<String>,
    pub mechanism: Mechanism,
    pub login: Login,
    pub until: Until,
    pub caps: bool,
    pub stream_management: bool,
    /// A login to a server without stream management fails.
    pub acknowledgements: bool,
    /// Ask for sessions that may be resumed; a server that has none fails the login.
    pub resumption: bool,
    /// Bytes that the kernel may hold for a client; its own default if `None`.
    pub receive_buffer: Option<usize>,
    /// Accept every subscription and note whose presence may be seen (to build rosters).
    pub track_contacts: bool,
    pub login_timeout: Duration,
}

impl Global {
    pub fn target(&self) -> Result<Target, String> {
        if let Some(path) = &self.websocket {
            if self.tls == TlsMode::Starttls {
                return Err(
                    "--websocket: there is no STARTTLS, use --tls direct for wss://".into(),
                );
            }
            if !path.starts_with('/') || path.contains(|byte: char| !byte.is_ascii_graphic()) {
                return Err(format!(
                    "--websocket {path}: a path such as /ws is expected"
                ));
            }
        }
        let port = self.port.unwrap_or(match (&self.websocket, self.tls) {
            (None, TlsMode::Direct) => 5223,
            (None, _) => 5222,
            (Some(_), TlsMode::Direct) => 5443,
            (Some(_), _) => 5280,
        });
        let mut addresses = (self.host.as_str(), port)
            .to_socket_addrs()
            .map_err(|error| format!("--host {}: {error}", self.host))?;
        let address = addresses
            .next()
            .ok_or_else(|| format!("--host {}: no address", self.host))?;
        let ipv4_loopback = matches!(address.ip(), IpAddr::V4(ip) if ip.octets()[0] == 127);
        let needed = self.users.div_ceil(CONNECTIONS_PER_ADDRESS).clamp(1, 250) as u8;
        let source_addresses =
            self.source_addresses
                .unwrap_or(if ipv4_loopback { needed } else { 1 });
        if source_addresses > 1 && !ipv4_loopback {
            return Err("--source-addresses: the server is not on 127.0.0.0/8".into());
        }
        if self.users == 0 || self.threads == 0 || self.parallel == 0 || self.timeout <= 0.0 {
            return Err(
                "--users, --threads, --parallel and --timeout must be greater than 0".into(),
            );
        }
        if self.accounts.is_some_and(|accounts| accounts < self.users) {
            return Err("--accounts must be at least --users".into());
        }
        let mechanism = match self.mechanism {
            MechanismOption::Plain => Mechanism::Plain,
            MechanismOption::ScramSha1 => Mechanism::Scram(Hash::Sha1),
            MechanismOption::ScramSha256 => Mechanism::Scram(Hash::Sha256),
            MechanismOption::ScramSha512 => Mechanism::Scram(Hash::Sha512),
            MechanismOption::ScramSha1Plus => Mechanism::ScramPlus(Hash::Sha1),
            MechanismOption::ScramSha256Plus => Mechanism::ScramPlus(Hash::Sha256),
            MechanismOption::ScramSha512Plus => Mechanism::ScramPlus(Hash::Sha512),
        };
        if matches!(mechanism, Mechanism::ScramPlus(_)) && self.tls == TlsMode::None {
            return Err(format!(
                "--mechanism {}: it is bound to TLS, and --tls is none",
                mechanism.name()
            ));
        }
        if self.login != Login::Old && self.tls == TlsMode::None {
            return Err("--login sasl2 and fast are for TLS only, and --tls is none".into());
        }
        Ok(Target {
            address,
            source_addresses,
            domain: self.domain.clone(),
            password: self.password.clone(),
            resource: self.resource.clone(),
            tls: self.tls,
            websocket: self.websocket.clone(),
            mechanism,
            login: self.login,
            until: self.until,
            caps: self.caps,
            stream_management: false,
            acknowledgements: false,
            resumption: false,
            receive_buffer: None,
            track_contacts: false,
            login_timeout: Duration::from_secs_f64(self.timeout),
        })
    }

    pub fn verify(&self, address: &SocketAddr) -> bool {
        match self.tls_verify {
            Verify::Auto => !address.ip().is_loopback(),
            Verify::On => true,
            Verify::Off => false,
        }
    }
}

impl Target {
    /// The address that the connection of the n-th user comes from; `None` leaves it to the kernel.
    pub fn source(&self, user: u32) -> Option<SocketAddr> {
        (self.source_addresses > 1).then(|| {
            let last = 1 + (user % u32::from(self.source_addresses)) as u8;
            SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0))
        })
    }

    #[cfg(test)]
    pub fn for_tests() -> Target {
        let cli = Cli::parse_from(["loadtest", "--resource", "load", "register"]);
        cli.global.target().unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn many_users_spread_over_source_addresses() {
        let target = |users: &str| {
            Cli::parse_from(["loadtest", "-n", users, "register"])
                .global
                .target()
                .unwrap()
        };
        assert_eq!(target("25000").source(7), None);
        assert_eq!(
            target("50001").source(5),
            Some("127.0.0.3:0".parse().unwrap())
        );
    }
}
