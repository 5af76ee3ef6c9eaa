//! One nitro process: starts the shards, the SQL lane, the helper threads and the admin socket; hears signals; ends in order.

use std::collections::HashMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aws_lc_rs::hmac;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::admin::lock::DataLock;
use crate::admin::server::AdminServer;
use crate::admin::{AdminReply, AdminRequest, JournalLine, Outcome, UserLine};
use crate::config::{Config, LogFormat, reloadable_diff};
use crate::groups_file;
use crate::net::{self, ClientAuthority, TlsConfig};
use crate::observe::{self, Gauges, IntervalLog, IntervalLogConfig, Observer, Recorder};
use crate::rt::{self, InboxSender};
use crate::shard::admin::Call;
use crate::shard::admission::Loads;
use crate::shard::doors::Doors;
use crate::shard::figures::{Pages, Sources};
use crate::shard::journal::Foreign;
use crate::shard::redis::RedisParts;
use crate::shard::upload::Files;
use crate::shard::{Door, Inbound, Parts, Shard};
use crate::store::change::{ArchivedChange, Id};
use crate::store::drain::{DrainConfig, Source};
use crate::store::journal::{self, Journals, State, disk::Folder};
use crate::store::overlay::Position;
use crate::store::recovery::{Found, Recovery};
use crate::store::redis::hold::{Held, Hold};
use crate::store::redis::keeper::{self, Keeper};
use crate::store::redis::{self, Generations};
use crate::store::ring::Ring;
use crate::store::sql::admin::Store;
use crate::store::sql::lane::{AnswerSink, Lane, LaneConfig};
use crate::store::sql::{self, Database};
use crate::store::tier::Ticket;
use crate::xmpp::component::Hosts;
use crate::xmpp::groups::Groups;
use crate::xmpp::sasl::decoy::{Decoy, Profile, Shape};
use crate::xmpp::slice::Job;

/// Batches of answers and other messages that may wait for one shard.
const INBOX_MAX: usize = 4096;
/// How long a foreign thread waits for room in a shard's inbox.
const INBOX_PATIENCE: Duration = Duration::from_secs(30);
/// How long an operator's request may take.
const ADMIN_PATIENCE: Duration = Duration::from_secs(50);
/// How long a list waits for the database to have what was changed.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);
/// The look of decoys follows the accounts not more often than that.
const DECOY_PAUSE: Duration = Duration::from_secs(5);
/// And at least that often, for the accounts that are made in-band.
const DECOY_IDLE: Duration = Duration::from_secs(300);
/// How far the threads that compute passwords and figures step back behind the shards.
const BEHIND_NICE: i32 = 10;

/// Runs the server until it is told to stop. A mistake of the operator is one sentence on standard error.
pub fn serve(config: Config, load: impl Fn() -> Result<Config, String>) -> ExitCode {
    let ended = run(config, load);
    observe::flush_log();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("nitro: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config, load: impl Fn() -> Result<Config, String>) -> Result<(), String> {
    observe::start_log(
        config.log.level.as_str(),
        config.log.format == LogFormat::Json,
    );
    rt::probe()?;
    let files = rt::raise_open_files()?;
    if files < 4096 {
        tracing::warn!(
            files,
            "few open files are allowed: raise the hard limit (ulimit -Hn) for more connections"
        );
    }
    let _lock = DataLock::acquire(&config.data_dir)?;
    let cores = config.cores.pick(&rt::cores_online())?;
    let mut config = config;
    let listen = open_ports(&mut config)?;
    let (tls, fingerprint) = load_tls(&config)?;
    let components = Arc::new(Hosts::new(config.component_hosts()?));
    let secret = secret(&config.data_dir)?;
    let database = crate::admin::database(&config)?;
    let mut accounts = Accounts::new(&database)?;
    let decoy = Arc::new(accounts.decoy(&secret, &config));
    let account_count = accounts.if_there(Store::count).unwrap_or(u64::MAX);

    let started = Instant::now();
    let shards = cores.len();
    if shards > crate::store::change::Id::SHARDS_MAX {
        return Err(format!(
            "cores: {shards} are too many; name at most {} of them",
            crate::store::change::Id::SHARDS_MAX
        ));
    }
    let ring = Arc::new(Ring::of_shards(shards));
    let options = crate::admin::journal_options(&config);
    let folder = Arc::new(Folder::open(&config.journal_dir())?);
    let mut journals = journal::open(folder, &options).map_err(|error| error.to_string())?;
    let positions = accounts.if_there(Store::positions);
    let (mut found, last_id, removed) = recover(&journals, &ring, positions.as_deref())?;
    let last_id = last_id.max(accounts.if_there(Store::highest_id).unwrap_or_default());
    let owners = crate::admin::owners(&config);
    let since = crate::store::owners::since(&owners, shards, last_id).map_err(|error| {
        format!(
            "{}: {error}; make the data folder writable",
            owners.display()
        )
    })?;
    if positions.is_none() {
        for found in &mut found {
            found.doubtful = Some(since);
        }
    }
    if accounts.is_missing() {
        tracing::error!(
            %database,
            "the database cannot be reached: nitro serves what its journals hold, and goes on trying"
        );
    }
    let gauges = Arc::new(Gauges::new(shards));
    let (senders, inboxes): (Vec<_>, Vec<_>) = (0..shards)
        .map(|_| rt::inbox::<Inbound>(INBOX_MAX).map_err(|e| format!("eventfd: {e}")))
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .unzip();
    let mut writers = Vec::new();
    for (n, sender) in senders.iter().enumerate() {
        let drained = drained_of(&journals, n as u16, positions.as_deref());
        let sender = sender.clone();
        let landed = move |committed| {
            // a shard that takes nothing for so long has ended
            let _ = sender.send(Inbound::Committed(Box::new(committed)), INBOX_PATIENCE);
        };
        let writer = journals.writer(n as u16, drained, Box::new(landed));
        writers.push(Some(writer.map_err(|error| error.to_string())?));
    }
    let states: Vec<Arc<State>> = writers.iter().flatten().map(|w| w.state()).collect();
    let redis = start_redis(&config, shards, last_id, &senders)?;
    let hold = redis.as_ref().map(|redis| redis.hold.clone());
    let (lane, feeds) = start_lane(&config, &database, &cores, &mut journals, hold, &senders)?;
    let files = journals.files();
    let foreign = Arc::new(Foreign {
        left: shards.into(),
        shards,
    });
    let mut found: Vec<Option<Found>> = found.into_iter().map(Some).collect();
    let sources = Arc::new(Sources {
        gauges: gauges.clone(),
        sql: lane.counters(),
        redis: redis.as_ref().map(|redis| redis.figures.clone()),
        started_us: unix_us(),
    });
    let (observer, observing) = start_observer(&config, &senders, lane.counters())?;
    let pages = Pages { sources, observer };
    let helpers = Helpers::start(config.limits.password_checks_waiting_max);
    let files_of_users = match config.upload_host() {
        Some(_) => Some(Files::start(&config)?),
        // switched off: what removed accounts have left still goes
        None if config.upload_dir().exists() => Files::start(&config)
            .inspect_err(|error| tracing::error!("{error}"))
            .ok(),
        None => None,
    };
    if let Some(files) = &files_of_users {
        // a stop may have come between the end of an account and that of its files
        let key = crate::xmpp::feature::upload::Key::new(&secret);
        for (name, at) in removed {
            files.forget(key.owner(&name), at);
        }
    }
    let doors = Arc::new(Doors::default());
    let loads = Arc::new(Loads::new(shards));
    let id_key = [
        u64::from_le_bytes(secret[0..8].try_into().expect("eight bytes")),
        u64::from_le_bytes(secret[8..16].try_into().expect("eight bytes")),
    ];
    let login_key = login_key(&secret);
    let shared = Arc::new(config.clone());
    let groups = Arc::new(groups_file::load(&config, &ring)?);
    let meshes = rt::mesh(shards, config.limits.mesh_queue_batches_max)
        .map_err(|e| format!("the mesh cannot be made: {e}"))?;
    let parts: Vec<Option<Parts>> = inboxes
        .into_iter()
        .zip(meshes)
        .enumerate()
        .map(|(n, (inbox, mesh))| {
            Some(Parts {
                config: shared.clone(),
                tls: tls.clone(),
                components: components.clone(),
                groups: groups.clone(),
                ring: ring.clone(),
                decoy: decoy.clone(),
                id_key,
                upload: files_of_users.clone().map(|files| (secret, files)),
                login_key,
                listen: listen
                    .iter()
                    .copied()
                    .filter(|(_, door)| *door != Door::Http || n == 0)
                    .collect(),
                mesh,
                inbox,
                lane: lane.sender(),
                journal: writers[n].take().expect("one for each shard"),
                floors: options.floors.clone(),
                foreign: foreign.clone(),
                files: files.clone(),
                found: found[n].take().unwrap_or_default(),
                last_id,
                redis: redis.clone().map(|mut redis| {
                    redis.config.shard = n as u16;
                    redis
                }),
                helpers: helpers.clone(),
                own_inbox: senders[n].clone(),
                doors: doors.clone(),
                loads: loads.clone(),
                started,
                gauges: gauges.clone(),
                pages: pages.clone(),
            })
        })
        .collect();
    // before anybody can connect: who has come is told that the server stops
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|e| format!("signals cannot be heard: {e}"))?;
    let parts = Arc::new(Mutex::new(parts));
    let (failed, failures) = mpsc::channel::<String>();
    let threads = rt::run_shards(&cores, move |n| {
        let parts = parts.lock().ok().and_then(|mut parts| parts[n].take());
        let failed = failed.clone();
        async move {
            let Some(parts) = parts else { return };
            if let Err(sentence) = Shard::run(n, parts).await {
                let _ = failed.send(sentence);
            }
        }
    })?;
    let shared_groups = Arc::new(Mutex::new((shared.clone(), groups)));
    let handler = Operators {
        groups: shared_groups.clone(),
        senders: senders.clone(),
        ring: ring.clone(),
        accounts: Mutex::new(accounts),
        states,
        feeds,
        changed: follow_accounts(&shared, &database, secret, &senders)?,
        pages: pages.clone(),
    };
    let admin = AdminServer::start(
        &config.data_dir,
        config.limits.admin_connections_max,
        move |request| handler.answer(request),
    )?;
    let up = wait_ready(&gauges, shards, &failures)?;
    announce(&config, &listen, &fingerprint, account_count, shards, up);

    let mut current = config;
    for signal in signals.forever() {
        if signal != SIGHUP {
            break;
        }
        match reload(&current, &load, &ring) {
            Ok((config, tls, components, groups, sentence)) => {
                let shared = Arc::new(config.clone());
                let components = Arc::new(components);
                for sender in &senders {
                    let reload = Inbound::Reload(shared.clone(), tls.clone(), components.clone());
                    let _ = sender.send(reload, INBOX_PATIENCE);
                }
                let groups = Arc::new(groups);
                if let Ok(mut now) = shared_groups.lock() {
                    *now = (shared, groups.clone());
                    send_groups(&senders, &groups);
                }
                observe::set_log_level(config.log.level.as_str());
                current = config;
                tracing::info!("{sentence}");
            }
            Err(sentence) => tracing::error!("not reloaded: {sentence}"),
        }
    }
    tracing::info!("stopping");
    // whatever hangs, the process ends in time
    let patience = Duration::from_secs(current.shutdown.seconds_max);
    let until = Instant::now() + patience.mul_f32(0.8);
    std::thread::spawn(move || {
        std::thread::sleep(patience);
        observe::flush_log();
        eprintln!("nitro: stopping took longer than shutdown.seconds_max; ending now");
        std::process::exit(0);
    });
    admin.stop();
    for sender in &senders {
        let _ = sender.send(Inbound::Stop, INBOX_PATIENCE);
    }
    // what was written so far must reach the disk, even if a shard does not end
    while !threads.iter().all(|thread| thread.is_finished()) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
    lane.stop();
    pages.observer.stop();
    // it has as long as is left, see above
    let _ = observing.join();
    tracing::info!("stopped");
    Ok(())
}

/// Claims every port, so that a second process is refused; an address family that the machine lacks is left out, and port
/// 0 becomes a free one.
fn open_ports(config: &mut Config) -> Result<Vec<(SocketAddr, Door)>, String> {
    let mut all = Vec::new();
    let doors = [
        ("c2s.listen", &mut config.c2s.listen, Door::Xmpp),
        ("c2s.listen_tls", &mut config.c2s.listen_tls, Door::XmppTls),
        (
            "component.listen",
            &mut config.component.listen,
            Door::Component,
        ),
        ("http.listen", &mut config.http.listen, Door::Http),
        ("web.listen", &mut config.web.listen, Door::Web),
        ("web.listen_tls", &mut config.web.listen_tls, Door::WebTls),
    ];
    for (key, addresses, door) in doors {
        let mut open = Vec::new();
        for address in addresses.iter() {
            match net::probe_port(*address).map_err(|e| format!("{key}: {e}"))? {
                Some(address) => open.push(address),
                None => {
                    tracing::warn!(key, %address, "this machine has no such address family: left out")
                }
            }
        }
        if open.is_empty() && !addresses.is_empty() {
            return Err(format!(
                "{key}: none of its addresses can be had on this machine; name one that can"
            ));
        }
        all.extend(open.iter().map(|a| (*a, door)));
        *addresses = open;
    }
    Ok(all)
}

fn load_tls(config: &Config) -> Result<(TlsConfig, String), String> {
    let (certificate, key, own) = config.certificate_paths();
    if own && !certificate.exists() && !key.exists() {
        net::generate_certificate(&config.domain, &certificate, &key)?;
    }
    let clients = match config.tls.client_ca.as_os_str().is_empty() {
        true => None,
        false => Some(ClientAuthority::load(
            &config.tls.client_ca,
            &config.tls.client_crl,
        )?),
    };
    let tls = TlsConfig::load(
        &certificate,
        &key,
        config.tls.version_min == crate::config::TlsVersion::V1_3,
        clients,
    )?;
    let fingerprint = tls.fingerprint().to_owned();
    Ok((tls, fingerprint))
}

/// The key of what clients are given at their login: another one than those of decoys and stable ids, from the same secret.
fn login_key(secret: &[u8; 32]) -> [u8; 32] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let mut derived = [0; 32];
    derived.copy_from_slice(hmac::sign(&key, b"nitro login").as_ref());
    derived
}

/// 32 random bytes that outlive the process: decoys, stable ids and tokens (XEP-0484) hang on them.
fn secret(dir: &Path) -> Result<[u8; 32], String> {
    use std::os::unix::fs::OpenOptionsExt;
    let path: PathBuf = dir.join("secret");
    let cannot =
        |e: std::io::Error| format!("{}: {e}; make the data folder writable", path.display());
    match std::fs::read(&path) {
        Ok(bytes) => bytes.try_into().map_err(|_| {
            format!(
                "{}: it must hold 32 bytes; remove it, and nitro makes a new one",
                path.display()
            )
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let mut secret = [0; 32];
            aws_lc_rs::rand::fill(&mut secret)
                .map_err(|_| "the system gives no random bytes".to_owned())?;
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(cannot)?;
            file.write_all(&secret)
                .and_then(|()| file.sync_all())
                .map_err(cannot)?;
            Ok(secret)
        }
        Err(e) => Err(cannot(e)),
    }
}

/// What the journals hold beyond the database, for each shard; the highest id in them; and which accounts were removed, and when in
/// unix seconds, as far as they go back.
#[allow(clippy::type_complexity)]
fn recover(
    journals: &Journals,
    ring: &Ring,
    positions: Option<&[sql::Position]>,
) -> Result<(Vec<Found>, Id, Vec<(Box<str>, u64)>), String> {
    let drained = journals
        .found()
        .iter()
        .map(|found| (found.shard, drained_of(journals, found.shard, positions)))
        .collect();
    let mut recovery = Recovery::new(ring, drained);
    let mut unreadable = None;
    let mut removed = Vec::new();
    let replayed = journals.replay(|shard, seq, place, change| {
        if let Err(error) = recovery.record(shard, seq, place, change) {
            unreadable.get_or_insert_with(|| format!("record {seq} of journal {shard}: {error}"));
        }
        if let ArchivedChange::RemoveUser { name, revision } = change {
            let at = Id(revision.to_native()).unix_ms() / 1000;
            removed.push((Box::from(&**name), at));
        }
    });
    replayed.map_err(|error| error.to_string())?;
    match unreadable {
        Some(sentence) => Err(sentence),
        None => {
            let (found, last_id) = recovery.finish();
            Ok((found, last_id, removed))
        }
    }
}

/// Up to where the database has a journal; where it cannot be asked, all that is on disk counts as new.
fn drained_of(journals: &Journals, shard: u16, positions: Option<&[sql::Position]>) -> u64 {
    let found = journals.found().iter().find(|found| found.shard == shard);
    let Some(found) = found else { return 0 };
    match positions {
        None => found.first_seq - 1,
        Some(positions) => positions
            .iter()
            .find(|at| at.identity == found.identity && at.journal == shard)
            .map_or(0, |at| at.seq),
    }
}

/// The Redis ring, if instances are configured.
fn start_redis(
    config: &Config,
    shards: usize,
    last_id: Id,
    senders: &[InboxSender<Inbound>],
) -> Result<Option<RedisParts>, String> {
    let addresses = crate::admin::redis_instances(config)?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap_or_default();
    let stepped_back = last_id.unix_ms() > now.as_millis() as u64;
    if addresses.is_empty() || stepped_back {
        // copies may be numbered higher than what comes now, or will not be told of it
        crate::admin::forget_copies(config)?;
    }
    if addresses.is_empty() {
        return Ok(None);
    }
    let tls = crate::admin::redis_tls(config, &addresses)?;
    let path = crate::admin::generations(config);
    let unix_us = now.as_micros() as u64;
    let generations = Generations::open(&path, &addresses, shards, unix_us)
        .map_err(|error| format!("{}: {error}; make the data folder writable", path.display()))?;
    let c = &config.redis;
    let blade = match c.blade.as_str() {
        "" => rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .replace(':', "-"),
        name => name.to_owned(),
    };
    let placement = generations.placement();
    let durable = (0..shards).map(|n| generations.all(n)).collect();
    let incarnation = generations.incarnation();
    let sinks = || -> Vec<keeper::Sink> {
        let sink = |sender: &InboxSender<Inbound>| {
            let sender = sender.clone();
            Box::new(move |reply| {
                // a shard that takes nothing for so long has ended
                let _ = sender.send(Inbound::Redis(reply), INBOX_PATIENCE);
            }) as keeper::Sink
        };
        senders.iter().map(sink).collect()
    };
    Ok(Some(RedisParts {
        config: redis::Config {
            ttl_ms: c.ttl_hours * 3_600_000,
            missing_ttl_ms: c.missing_ttl_seconds * 1000,
            sessions_ttl_ms: c.sessions_ttl_seconds * 1000,
            timeout_ms: c.timeout_ms,
            connect_timeout_ms: c.connect_timeout_ms,
            pause_ms_max: c.pause_ms_max,
            in_flight_max: c.commands_max,
            ..redis::Config::new(c.prefix.as_str(), blade, 0, incarnation)
        },
        addresses: addresses.into(),
        placement,
        generations: durable,
        keeper: Keeper::start(generations, sinks(), sinks())?,
        hold: Arc::new(Hold::new(shards)),
        figures: Arc::default(),
        tls,
    }))
}

/// The SQL lane, with the journals of all shards, those of an earlier start that are no more included.
fn start_lane(
    config: &Config,
    database: &Database,
    cores: &[usize],
    journals: &mut Journals,
    hold: Option<Arc<Hold>>,
    senders: &[InboxSender<Inbound>],
) -> Result<(Lane, Vec<Feed>), String> {
    let mut numbers: Vec<u16> = journals.found().iter().map(|found| found.shard).collect();
    numbers.extend(0..senders.len() as u16);
    numbers.sort_unstable();
    numbers.dedup();
    let readers: Vec<_> = numbers.into_iter().map(|n| journals.reader(n)).collect();
    let feeds = readers
        .iter()
        .map(|reader| Feed {
            shard: reader.shard(),
            identity: reader.identity(),
            state: reader.state().clone(),
        })
        .collect();
    let sources = readers
        .into_iter()
        .map(|journal| match &hold {
            None => Box::new(journal) as Box<dyn Source>,
            Some(hold) => Box::new(Held {
                journal,
                hold: hold.clone(),
            }),
        })
        .collect();
    let all = senders.to_vec();
    let drained = move |journal, seq| {
        for sender in &all {
            let _ = sender.send(Inbound::Drained(Position { journal, seq }), INBOX_PATIENCE);
        }
    };
    let lane = LaneConfig {
        queue_max: config.sql.queue_max,
        affinity: config.sql.core.pick(cores).map(|core| vec![core]),
        drain: DrainConfig {
            linger: Duration::from_millis(config.journal.drain_after_ms),
            keep_days: config.archive.keep_days,
            rooms_keep_days: config.rooms_keep_days(),
            ..DrainConfig::default()
        },
        ..LaneConfig::new(database.clone())
    };
    let answers = senders.iter().cloned().map(answer_sink).collect();
    let lane = Lane::start(lane, answers, sources, Box::new(drained))?;
    Ok((lane, feeds))
}

/// The thread that collects what shards and lane have recorded.
fn start_observer(
    config: &Config,
    senders: &[InboxSender<Inbound>],
    lane: Arc<sql::Counters>,
) -> Result<(Observer, JoinHandle<()>), String> {
    let shards = senders.iter().cloned().enumerate().map(|(n, inbox)| {
        let ask: observe::Ask = Box::new(move |number, empty, reply| {
            let question = Inbound::Histograms(number, empty, reply.clone());
            inbox.try_send(question).is_ok()
        });
        Recorder {
            shard: Some(n),
            ask,
        }
    });
    let lane = Recorder {
        shard: None,
        ask: Box::new(move |number, empty, reply| {
            reply.send((number, lane.timings.exchange(empty))).is_ok()
        }),
    };
    let recorders = shards.chain([lane]).collect();
    let mut followers = vec![observe::repeats()];
    let log = &config.histograms;
    if !log.dir.as_os_str().is_empty() {
        followers.push(Box::new(IntervalLog::new(IntervalLogConfig {
            dir: log.dir.clone(),
            interval: Duration::from_secs(log.interval_seconds),
            file_bytes_max: log.file_bytes_max as u64,
            files_max: log.files_max,
        })?));
    }
    // behind the shards: whoever looks can wait
    Observer::start(recorders, followers, || rt::step_back(BEHIND_NICE))
        .map_err(|e| format!("a thread cannot start: {e}"))
}

fn unix_us() -> u64 {
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    unix.unwrap_or_default().as_micros() as u64
}

/// A journal that is drained.
struct Feed {
    shard: u16,
    identity: u64,
    state: Arc<State>,
}

/// The database for what is not a shard's: lists and counts. It may be away.
struct Accounts {
    database: Database,
    store: Option<Store>,
}

impl Accounts {
    /// An error: the database is there and cannot be used.
    fn new(database: &Database) -> Result<Accounts, String> {
        Ok(Accounts {
            database: database.clone(),
            store: Store::open_if_there(database)?,
        })
    }

    fn is_missing(&self) -> bool {
        self.store.is_none()
    }

    fn with<T>(&mut self, ask: impl FnOnce(&mut Store) -> Result<T, String>) -> Result<T, String> {
        if self.store.is_none() {
            self.store = Some(Store::open(&self.database)?);
        }
        let answer = ask(self.store.as_mut().expect("opened a moment ago"));
        if answer.is_err() {
            // a lost connection is made anew by the next one who asks
            self.store = None;
        }
        answer
    }

    /// For the start: what was out of reach a moment ago is not tried again, each try may take long.
    fn if_there<T>(&mut self, ask: impl FnOnce(&mut Store) -> Result<T, String>) -> Option<T> {
        match self.is_missing() {
            true => None,
            false => self.with(ask).ok(),
        }
    }

    fn decoy(&mut self, secret: &[u8; 32], config: &Config) -> Decoy {
        self.if_there(|store| decoy(store, secret, config))
            .unwrap_or_else(|| made_up(secret, &[], config))
    }
}

/// What a challenge to an unknown user looks like: as those to known ones do.
fn decoy(store: &mut Store, secret: &[u8; 32], config: &Config) -> Result<Decoy, String> {
    let shape = |shape: Option<(u32, usize)>| {
        shape.map(|(iterations, salt_len)| Shape {
            iterations,
            salt_len: salt_len.min(255) as u8,
        })
    };
    let profiles: Vec<Profile> = store
        .key_distribution()?
        .into_iter()
        .map(|kind| Profile {
            sha1: shape(kind.sha1),
            sha256: shape(kind.sha256),
            accounts: kind.users,
        })
        .collect();
    Ok(made_up(secret, &profiles, config))
}

fn made_up(secret: &[u8; 32], profiles: &[Profile], config: &Config) -> Decoy {
    Decoy::new(
        secret,
        profiles,
        Shape {
            iterations: config.sasl.iterations,
            salt_len: 16,
        },
    )
}

fn answer_sink(inbox: InboxSender<Inbound>) -> AnswerSink {
    Box::new(move |answers| {
        // a shard that takes nothing for so long has ended
        let _ = inbox.send(Inbound::Answers(answers), INBOX_PATIENCE);
    })
}

fn reload(
    current: &Config,
    load: &impl Fn() -> Result<Config, String>,
    ring: &Ring,
) -> Result<(Config, TlsConfig, Hosts, Groups, String), String> {
    let wanted = load()?;
    let (live, restart) = reloadable_diff(current, &wanted);
    let merged = current.with_live_keys_of(&wanted);
    let (tls, fingerprint) = load_tls(&merged)?;
    let components = Hosts::new(merged.component_hosts()?);
    let groups = groups_file::load(&merged, ring)?;
    let mut sentence = format!("reloaded: certificate (SHA-256 {fingerprint})");
    if !live.is_empty() {
        sentence.push_str(&format!(", {}", live.join(", ")));
    }
    // ports were resolved at the start: they differ from what the file says without having changed
    if !restart.is_empty() {
        sentence.push_str(&format!(
            "; unchanged until a restart: {}",
            restart.join(", ")
        ));
    }
    Ok((merged, tls, components, groups, sentence))
}

fn send_groups(senders: &[InboxSender<Inbound>], groups: &Arc<Groups>) {
    for sender in senders {
        let _ = sender.send(Inbound::Groups(groups.clone()), INBOX_PATIENCE);
    }
}

fn announce(
    config: &Config,
    listen: &[(SocketAddr, Door)],
    fingerprint: &str,
    accounts: u64,
    shards: usize,
    up: Duration,
) {
    let at = |door: Door| {
        let all: Vec<String> = listen
            .iter()
            .filter(|(_, d)| *d == door)
            .map(|(a, _)| a.to_string())
            .collect();
        all.join(", ")
    };
    let mut out = format!(
        "nitro {} serves {} with {shards} shard{} (up in {} ms)\n",
        env!("CARGO_PKG_VERSION"),
        config.domain,
        if shards == 1 { "" } else { "s" },
        up.as_millis(),
    );
    for (name, door) in [
        ("XMPP, STARTTLS", Door::Xmpp),
        ("XMPP, TLS", Door::XmppTls),
        ("components", Door::Component),
        ("HTTP", Door::Http),
        ("web", Door::Web),
        ("web, TLS", Door::WebTls),
    ] {
        if (door == Door::Component || door.is_web()) && at(door).is_empty() {
            continue;
        }
        out.push_str(&format!("  {name:<15} {}\n", at(door)));
    }
    out.push_str(&format!(
        "  data            {}\n",
        config.data_dir.display()
    ));
    out.push_str(&format!("  certificate     SHA-256 {fingerprint}\n"));
    if accounts == 0 {
        let exe = std::env::args().next().unwrap_or_else(|| "nitro".into());
        out.push_str(&format!(
            "  add an account  {exe} user add alice@{}\n",
            config.domain
        ));
    }
    print!("{out}");
    let _ = std::io::stdout().flush();
}

// ---- helpers -------------------------------------------------------------------------------------------------------

/// Threads that do slow computing (PBKDF2) for the shards.
#[derive(Clone)]
pub struct Helpers {
    queue: SyncSender<(InboxSender<Inbound>, Ticket, Job)>,
}

impl Helpers {
    fn start(waiting_max: usize) -> Helpers {
        let (queue, jobs) = mpsc::sync_channel::<(InboxSender<Inbound>, Ticket, Job)>(waiting_max);
        let jobs = Arc::new(Mutex::new(jobs));
        let threads = std::thread::available_parallelism()
            .map_or(1, |n| n.get())
            .min(4);
        for n in 0..threads {
            let jobs = jobs.clone();
            let work = move || {
                // behind live traffic: a password is checked in milliseconds anyway
                rt::step_back(BEHIND_NICE);
                loop {
                    let job = jobs.lock().ok().and_then(|jobs| jobs.recv().ok());
                    let Some((inbox, ticket, job)) = job else {
                        return;
                    };
                    let outcome = job.run();
                    let _ = inbox.send(Inbound::Computed(ticket, outcome), INBOX_PATIENCE);
                }
            };
            let _ = std::thread::Builder::new()
                .name(format!("helper-{n}"))
                .spawn(work);
        }
        Helpers { queue }
    }

    /// `false`: too much waits already.
    pub fn submit(&self, inbox: InboxSender<Inbound>, ticket: Ticket, job: Job) -> bool {
        match self.queue.try_send((inbox, ticket, job)) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }
}

// ---- operators -----------------------------------------------------------------------------------------------------

/// Answers the admin socket: each request goes to the shard that owns its user; lists come from the database.
struct Operators {
    /// The configuration and the groups that are in force.
    groups: Arc<Mutex<(Arc<Config>, Arc<Groups>)>>,
    senders: Vec<InboxSender<Inbound>>,
    ring: Arc<Ring>,
    accounts: Mutex<Accounts>,
    /// Of the journals, by shard.
    states: Vec<Arc<State>>,
    /// All journals, those of shards that are no more included.
    feeds: Vec<Feed>,
    /// Accounts have changed.
    changed: SyncSender<()>,
    pages: Pages,
}

impl Operators {
    fn answer(&self, request: AdminRequest) -> AdminReply {
        use AdminRequest::*;
        let changes = matches!(
            request,
            UserAdd { .. } | UserPasswd { .. } | UserRemove { .. } | ImportUsers { .. }
        );
        let reply = match request {
            UserList {
                prefix,
                after,
                limit,
            } => self.list(&prefix, &after, limit),
            UsersKnown { names } => self.known(&names),
            ComponentList => {
                let mut components = Vec::new();
                for reply in self.ask_all(|_| Some(ComponentList)) {
                    match reply {
                        (_, AdminReply::Components { components: some }) => components.extend(some),
                        (_, other) => return other,
                    }
                }
                components.sort_unstable_by(|a, b| (&a.host, a.since).cmp(&(&b.host, b.since)));
                AdminReply::Components { components }
            }
            ComponentKick { host } => {
                let mut sessions = 0;
                for reply in self.ask_all(|_| Some(ComponentKick { host: host.clone() })) {
                    match reply {
                        (_, AdminReply::Kicked { sessions: some }) => sessions += some,
                        (_, other) => return other,
                    }
                }
                AdminReply::Kicked { sessions }
            }
            GroupList | GroupReload | GroupShow { .. } => self.groups(request),
            Journals => self.journals(),
            Figures => self.figures(),
            ArchivePurged => {
                let replies = self.ask_all(|_| Some(ArchivePurged));
                let refused = |(_, reply): &(_, AdminReply)| *reply != AdminReply::Done;
                match replies.into_iter().find(refused) {
                    Some((_, reply)) => reply,
                    None => AdminReply::Done,
                }
            }
            SessionList {
                name: None,
                after,
                limit,
            } => {
                let all = self.ask_all(|_| {
                    Some(SessionList {
                        name: None,
                        after: after.clone(),
                        limit,
                    })
                });
                let mut sessions = Vec::new();
                for reply in all {
                    match reply {
                        (_, AdminReply::Sessions { sessions: some }) => sessions.extend(some),
                        (_, other) => return other,
                    }
                }
                sessions.sort_unstable_by(|a, b| a.jid.cmp(&b.jid));
                sessions.truncate(limit);
                AdminReply::Sessions { sessions }
            }
            ImportUsers { existing, users } => self.split(
                users,
                |u| u.name.as_str().into(),
                |users| ImportUsers { existing, users },
            ),
            ImportRosters { rosters } => self.split(
                rosters,
                |r| r.name.as_str().into(),
                |rosters| ImportRosters { rosters },
            ),
            UserAdd { ref name, .. }
            | UserPasswd { ref name, .. }
            | UserRemove { ref name }
            | UserShow { ref name }
            | UserDisable { ref name }
            | UserEnable { ref name }
            | SessionList {
                name: Some(ref name),
                ..
            }
            | SessionKick { ref name, .. } => {
                let owner = self.ring.owner(name);
                let mut request = Some(request);
                let mut replies = self.ask_all(|n| if n == owner { request.take() } else { None });
                replies.pop().map_or_else(
                    || AdminReply::refused("the server is stopping"),
                    |(_, reply)| reply,
                )
            }
        };
        if changes {
            // full: the next count sees this change too
            let _ = self.changed.try_send(());
        }
        reply
    }

    /// Asks the shards for which there is a request, all at once, and waits for them.
    fn ask_all(
        &self,
        mut request: impl FnMut(usize) -> Option<AdminRequest>,
    ) -> Vec<(usize, AdminReply)> {
        let mut asked = Vec::new();
        for (n, sender) in self.senders.iter().enumerate() {
            let Some(request) = request(n) else { continue };
            let (reply, answer) = mpsc::channel();
            if sender
                .send(Inbound::Admin(Call { request, reply }), ADMIN_PATIENCE)
                .is_ok()
            {
                asked.push((n, answer));
            }
        }
        let late = || AdminReply::refused("the server did not answer in time; repeat the command");
        asked
            .into_iter()
            .map(|(n, a)| (n, a.recv_timeout(ADMIN_PATIENCE).unwrap_or_else(|_| late())))
            .collect()
    }

    /// Sends each shard its part of a batch and puts the outcomes back in order.
    fn split<T>(
        &self,
        entries: Vec<T>,
        name: impl Fn(&T) -> Box<str>,
        request: impl Fn(Vec<T>) -> AdminRequest,
    ) -> AdminReply {
        let mut outcomes = vec![Outcome::Skipped; entries.len()];
        let mut parts: HashMap<usize, (Vec<usize>, Vec<T>)> = HashMap::new();
        for (at, entry) in entries.into_iter().enumerate() {
            let (places, part) = parts.entry(self.ring.owner(&name(&entry))).or_default();
            places.push(at);
            part.push(entry);
        }
        let mut places: HashMap<usize, Vec<usize>> = HashMap::new();
        let replies = self.ask_all(|n| {
            let (at, part) = parts.remove(&n)?;
            places.insert(n, at);
            Some(request(part))
        });
        for (n, reply) in replies {
            match reply {
                AdminReply::Imported { outcomes: some } => {
                    for (at, outcome) in places.remove(&n).unwrap_or_default().into_iter().zip(some)
                    {
                        outcomes[at] = outcome;
                    }
                }
                other => return other,
            }
        }
        AdminReply::Imported { outcomes }
    }

    fn list(&self, prefix: &str, after: &str, limit: usize) -> AdminReply {
        self.wait_for_drain();
        let Ok(mut accounts) = self.accounts.lock() else {
            return AdminReply::refused("the server is stopping");
        };
        match accounts.with(|store| store.list(prefix, after, limit)) {
            Ok(users) => AdminReply::Users {
                users: users
                    .into_iter()
                    .map(|u| UserLine {
                        name: u.name,
                        disabled: u.disabled,
                    })
                    .collect(),
            },
            Err(sentence) => AdminReply::refused(sentence),
        }
    }

    /// Lists come from the database: what was changed until now is to be in it, if it takes it in time.
    fn wait_for_drain(&self) {
        let wanted: Vec<u64> = self.states.iter().map(|s| s.committed_seq()).collect();
        let until = Instant::now() + DRAIN_PATIENCE;
        while Instant::now() < until
            && self
                .states
                .iter()
                .zip(&wanted)
                .any(|(state, wanted)| state.drained_seq() < *wanted)
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn groups(&self, request: AdminRequest) -> AdminReply {
        let Ok(mut now) = self.groups.lock() else {
            return AdminReply::refused("the server is stopping");
        };
        match request {
            AdminRequest::GroupShow { group } => AdminReply::group(&now.1, &group),
            AdminRequest::GroupReload => match groups_file::load(&now.0, &self.ring) {
                Ok(groups) => {
                    now.1 = Arc::new(groups);
                    // under the lock: the shards get what was loaded last in the end
                    send_groups(&self.senders, &now.1);
                    AdminReply::groups(&now.1)
                }
                Err(sentence) => AdminReply::refused(sentence),
            },
            _ => AdminReply::groups(&now.1),
        }
    }

    fn journals(&self) -> AdminReply {
        let line = |feed: &Feed| JournalLine {
            shard: feed.shard,
            identity: feed.identity,
            committed: feed.state.committed_seq(),
            drained: feed.state.drained_seq(),
        };
        AdminReply::Journals {
            release: env!("CARGO_PKG_VERSION").into(),
            journals: self.feeds.iter().map(line).collect(),
        }
    }

    fn figures(&self) -> AdminReply {
        let (reply, answer) = mpsc::channel();
        let asked = self.pages.figures(move |figures| {
            let _ = reply.send(figures);
        });
        match answer.recv_timeout(ADMIN_PATIENCE) {
            Ok(figures) if asked => AdminReply::Figures {
                figures: Box::new(figures),
            },
            _ => AdminReply::refused("too many look at figures at once; repeat the command"),
        }
    }

    fn known(&self, names: &[String]) -> AdminReply {
        self.wait_for_drain();
        let Ok(mut accounts) = self.accounts.lock() else {
            return AdminReply::refused("the server is stopping");
        };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match accounts.with(|store| store.load(&names)) {
            Ok(users) => AdminReply::Known {
                known: users.iter().map(Option::is_some).collect(),
            },
            Err(sentence) => AdminReply::refused(sentence),
        }
    }
}

/// Has challenges to unknown users follow the look of the accounts, also of those that registered in-band: a while after each
/// change by an operator, and now and then. The sender says that something has changed.
fn follow_accounts(
    config: &Arc<Config>,
    database: &Database,
    secret: [u8; 32],
    senders: &[InboxSender<Inbound>],
) -> Result<SyncSender<()>, String> {
    let (changed, changes) = mpsc::sync_channel(1);
    let (config, senders) = (config.clone(), senders.to_vec());
    let mut accounts = Accounts {
        database: database.clone(),
        store: None,
    };
    let follow = move || {
        while !matches!(
            changes.recv_timeout(DECOY_IDLE),
            Err(mpsc::RecvTimeoutError::Disconnected)
        ) {
            match accounts.with(|store| decoy(store, &secret, &config)) {
                Ok(decoy) => {
                    let decoy = Arc::new(decoy);
                    for sender in &senders {
                        let _ = sender.send(Inbound::Decoy(decoy.clone()), INBOX_PATIENCE);
                    }
                }
                Err(error) => tracing::warn!(error, "the accounts' keys could not be counted"),
            }
            std::thread::sleep(DECOY_PAUSE);
        }
    };
    std::thread::Builder::new()
        .name("decoys".into())
        .spawn(follow)
        .map_err(|e| format!("a thread cannot start: {e}"))?;
    Ok(changed)
}

/// Waits until all shards listen; how long it took.
fn wait_ready(
    gauges: &Gauges,
    shards: usize,
    failures: &mpsc::Receiver<String>,
) -> Result<Duration, String> {
    let begun = Instant::now();
    while gauges.shards_ready() < shards {
        if let Ok(sentence) = failures.recv_timeout(Duration::from_millis(2)) {
            return Err(sentence);
        }
        if begun.elapsed() > Duration::from_secs(30) {
            return Err("the shards did not start within 30 s".into());
        }
    }
    Ok(begun.elapsed())
}
