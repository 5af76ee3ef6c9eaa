//! `kill -9` at random instants under load: nothing that was acknowledged is lost.
//!
//! ```console
//! $ cargo test --test crash                                   # a few kills, seed 1: part of `cargo test`
//! $ cargo test --test crash -- --kills 50 --seed 7
//! $ cargo test --test crash -- --kills 50 --database mysql --redis 4
//! $ cargo test --test crash -- --kills 50 --seeds 1..20 --results crash.jsonl   # 1,000 kills; once more: resumes
//! ```
//!
//! In: a seed, a server. Out: one JSON line for each kill and one for each seed on standard output, what went wrong with the
//! events of both clients on standard error, and a status other than 0 if anything did.
//!
//! About 35 clients of 20 users, most with stream management ([`bot`]), send numbered messages to each other while
//! accounts are made and changed ([`load`]): half are on line, a quarter off line, the others cut off, silent, or just
//! resuming. After 0.2 to 2 seconds the server is killed and started again on the same data; clients resume or log in, and
//! send again, under new ids, what no count covered. One start in four is killed, too, and one in four is on other cores.
//! Now and then, and at the end, everybody logs in, and what was received, archives, rosters and accounts are compared
//! with what was promised ([`check`], [`judge`]).
//!
//! The seed decides who does what and when the kill comes; what the machine makes of it differs from run to run.
//!
//! Can it fail? A server that counts in `<a h/>` what it has only read, one whose replay does not forward what the other
//! side's journal does not hold, forwards it twice, or leaves out one pending delivery in eight: each was found within six
//! kills. A server that keeps sessions in memory only fails at the first check, and passes (as for losses) with `--gently`.

#[path = "blade/mod.rs"]
mod blade;
#[path = "crash/bot.rs"]
mod bot;
#[path = "crash/check.rs"]
mod check;
#[path = "client/mod.rs"]
mod client;
#[path = "crash/facts.rs"]
mod facts;
#[path = "crash/judge.rs"]
mod judge;
#[path = "crash/load.rs"]
mod load;
#[path = "servers/mariadb.rs"]
mod mariadb;
#[path = "servers/redis.rs"]
mod redis;
#[path = "crash/round.rs"]
mod round;
#[path = "crash/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use fastrand::Rng;
use serde_json::{Value, json};

use bot::Trouble;
use check::Scope;
use client::PASSWORD;
use judge::World;
use load::Role;
use round::Round;
use server::{Database, Server};

/// The name that `cargo test FILTER` is compared with.
const NAME: &str = "what_was_acknowledged_survives_kill_minus_9";
/// Users of the whole run: so many with one, two and three clients.
const USERS: [usize; 3] = [11, 5, 4];
/// Accounts made in a round, at most.
const NEWCOMERS: usize = 4;
/// A proof with fewer accepted messages for each kill proves nothing.
const ACCEPTED_MIN: u64 = 20;

#[derive(Parser, Clone)]
#[command(about = "kill -9 at random instants under load: nothing that was acknowledged is lost.")]
struct Options {
    /// Kills for each seed
    #[arg(long, default_value_t = 6)]
    kills: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Many seeds, both ends included: 1..20
    #[arg(long, value_parser = span)]
    seeds: Option<(u64, u64)>,
    /// Appends one JSON line for each seed; seeds that are in it already (same kills, database and Redis) are left out
    #[arg(long)]
    results: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = Database::Sqlite)]
    database: Database,
    /// How many redis-servers the blade gets
    #[arg(long, default_value_t = 0)]
    redis: usize,
    /// A server without archive is an error (require), or is said and left unproven (try)
    #[arg(long, default_value = "try", value_parser = ["try", "require"])]
    archive: String,
    /// Messages a second of all clients together
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// Kills between two checks of everything
    #[arg(long, default_value_t = 5)]
    check_every: u32,
    /// A kind of broken promise (as the report names it) that is counted apart and does not fail the run
    #[arg(long, value_name = "KIND")]
    tolerate: Vec<String>,
    /// Keys of the configuration, as `nitro serve --set` takes them
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Leaves the server's data and log behind if anything was wrong
    #[arg(long)]
    keep: bool,
    /// SIGTERM instead of SIGKILL: a server that stops in order must pass, whatever it keeps in memory
    #[arg(long)]
    gently: bool,
    /// Another server: its client port (no TLS, in-band registration, domain localhost)
    #[arg(
        long,
        value_name = "HOST:PORT",
        requires = "kill_command",
        requires = "start_command"
    )]
    external: Option<std::net::SocketAddr>,
    /// Kills that server; returns when it is dead
    #[arg(long)]
    kill_command: Option<String>,
    /// Starts it again; returns at once or when it serves
    #[arg(long)]
    start_command: Option<String>,

    /// Names of tests to run, as for other test programs
    #[arg(hide = true)]
    filters: Vec<String>,
    #[arg(long, hide = true)]
    list: bool,
    #[arg(long, hide = true)]
    ignored: bool,
    #[arg(long, hide = true)]
    include_ignored: bool,
    #[arg(long, hide = true)]
    exact: bool,
    #[arg(long, hide = true)]
    nocapture: bool,
    #[arg(long, short, hide = true)]
    quiet: bool,
    #[arg(long, hide = true)]
    skip: Vec<String>,
    #[arg(long, hide = true)]
    test_threads: Option<String>,
    #[arg(long, hide = true)]
    color: Option<String>,
    #[arg(long, hide = true)]
    format: Option<String>,
}

fn span(text: &str) -> Result<(u64, u64), String> {
    let ends = text.split_once("..").map(|(first, last)| {
        let last = last.strip_prefix('=').unwrap_or(last);
        (first.parse(), last.parse())
    });
    match ends {
        Some((Ok(first), Ok(last))) if first <= last => Ok((first, last)),
        _ => Err("two numbers are wanted, as in 1..20".to_owned()),
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let named = |name: &String| match options.exact {
        true => name == NAME,
        false => NAME.contains(name.as_str()),
    };
    let chosen = (options.filters.is_empty() || options.filters.iter().any(named))
        && !options.skip.iter().any(named)
        && !options.ignored;
    if options.list {
        if chosen {
            println!("{NAME}: test");
        }
        return ExitCode::SUCCESS;
    }
    if !chosen {
        println!("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out");
        return ExitCode::SUCCESS;
    }
    let (first, last) = options.seeds.unwrap_or((options.seed, options.seed));
    let mut wrong = 0;
    for seed in first..=last {
        if let Some(line) = recorded(&options, seed) {
            println!("seed {seed} is in the results: {line}");
            wrong += line["wrong_total"].as_u64().unwrap_or(1);
            continue;
        }
        let line = run(&options, seed);
        println!("{line}");
        wrong += line["wrong_total"].as_u64().unwrap_or(1);
        if let Some(path) = &options.results {
            let file = File::options().create(true).append(true).open(path);
            let written = file.and_then(|mut file| writeln!(file, "{line}"));
            written.unwrap_or_else(|why| panic!("{}: {why}", path.display()));
        }
    }
    let (word, passed) = if wrong == 0 { ("ok", 1) } else { ("FAILED", 0) };
    println!("\ntest {NAME} ... {word}");
    println!(
        "test result: {word}. {passed} passed; {} failed; 0 ignored; 0 measured; 0 filtered out",
        1 - passed
    );
    if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What a result must agree in to be the same run.
fn identity(options: &Options, seed: u64) -> Vec<(&'static str, Value)> {
    let server = match options.external {
        Some(address) => address.to_string(),
        None => "nitro".to_owned(),
    };
    vec![
        ("seed", json!(seed)),
        ("kills", json!(options.kills)),
        ("server", json!(server)),
        ("database", json!(options.database.name())),
        ("redis", json!(options.redis)),
        ("gently", json!(options.gently)),
    ]
}

fn recorded(options: &Options, seed: u64) -> Option<Value> {
    let text = fs::read_to_string(options.results.as_ref()?).ok()?;
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|line| {
            identity(options, seed)
                .iter()
                .all(|(key, value)| line[key] == *value)
        })
}

/// One seed: its result.
fn run(options: &Options, seed: u64) -> Value {
    let begun = Instant::now();
    let mut rng = Rng::with_seed(seed);
    let mut server = match (
        options.external,
        &options.kill_command,
        &options.start_command,
    ) {
        (Some(address), Some(kill), Some(start)) => Server::external(address, kill, start),
        _ => Server::nitro(options.database, options.redis, &options.settings),
    };
    if options.keep {
        let folder = server.keep(true);
        eprintln!("seed {seed}: data and log are in {}", folder.display());
    }
    let mut world = World::new(format!("seed {seed}"), options.tolerate.clone());
    for (place, count) in USERS.iter().enumerate() {
        for _ in 0..*count {
            let clients: Vec<(bool, bool)> = (0..=place)
                .map(|_| (rng.u8(..100) < 85, rng.u8(..100) < 40))
                .collect();
            let name = format!("u{}", world.users.len());
            world.add_user(&name, &clients);
        }
    }
    world.lasting = world.users.len();
    let archive = settle_in(&mut world, &server, begun);
    if !archive {
        eprintln!(
            "NOT PROVEN ({}): the server does not announce urn:xmpp:mam:2, archives are not looked at",
            world.title
        );
        if options.archive == "require" {
            world.wrong("no_archive", "urn:xmpp:mam:2 is not announced", |_| {
                Vec::new()
            });
        }
    }
    let mut restart_ms_max = 0;
    let cores = own_cores();
    for number in 1..=options.kills {
        let first_newcomer = world.users.len();
        for _ in 0..NEWCOMERS {
            let name = format!("x{}", world.users.len());
            world.add_user(&name, &[(true, false)]);
        }
        let kill_at = Duration::from_secs_f64(0.2 + 1.8 * rng.f64());
        let roles: Vec<Role> = world
            .bots
            .iter()
            .map(|bot| match bot.profile.user < world.lasting {
                true => Role::draw(&mut rng, bot.profile.sm),
                false => Role::Offline,
            })
            .collect();
        let (counts, died_itself) = one_round(
            &mut world,
            &mut server,
            &mut rng,
            number,
            begun,
            options,
            archive,
            &roles,
            kill_at,
            first_newcomer,
        );
        if let Some(status) = died_itself {
            let text = format!("in round {number}: {status}; log:\n{}", server.log());
            world.wrong("died_by_itself", &text, |_| Vec::new());
        }
        world.merge();
        if rng.u8(..4) == 0 {
            server.start_and_kill(Duration::from_millis(rng.u64(..150)));
            world.totals.kills_at_start += 1;
        }
        if rng.u8(..4) == 0 {
            server.use_cores(&match rng.u8(..3) {
                0 => cores[0].to_string(),
                1 => cores[cores.len() - 1].to_string(),
                _ => "all".to_owned(),
            });
        }
        let restarted = Instant::now();
        server.restart();
        let restart_ms = restarted.elapsed().as_millis() as u64;
        restart_ms_max = restart_ms_max.max(restart_ms);
        let last = number == options.kills;
        let mut check_ms = 0;
        if last || number % options.check_every == 0 {
            let checked = Instant::now();
            // newcomers that were checked once are only asked for their passwords, at the end
            let users: Vec<usize> = (0..world.users.len())
                .filter(|user| {
                    *user < world.lasting || world.bots[world.speaker(*user)].session == 0
                })
                .collect();
            let (jids, all) = (world.jids.clone(), world.users.clone());
            let mut round = Round::new(server.address(), number, begun, &jids, &all, world.lasting);
            round.archive = archive;
            check::check(&mut world, &round, &users, Scope { archive, last });
            check_ms = checked.elapsed().as_millis() as u64;
        }
        println!(
            "{}",
            json!({
                "seed": seed, "kill": number, "after_ms": kill_at.as_millis() as u64, "roles": counts,
                "restart_ms": restart_ms, "check_ms": check_ms,
                "sent": world.bots.iter().map(|bot| bot.sent.len()).sum::<usize>(),
                "wrong": world.wrong_count(),
            })
        );
    }
    if world.totals.accepted < ACCEPTED_MIN * u64::from(options.kills) {
        let text = format!("only {} messages were accepted", world.totals.accepted);
        world.wrong("too_little_for_a_proof", &text, |_| Vec::new());
    }
    if archive && (world.totals.retractions == 0 || world.totals.tombstones == 0) {
        let text = "no message was retracted";
        world.wrong("too_little_for_a_proof", text, |_| Vec::new());
    }
    if options.keep && world.wrong_count() == 0 {
        server.keep(false);
    }
    let mut line = serde_json::Map::new();
    for (key, value) in identity(options, seed) {
        line.insert(key.to_owned(), value);
    }
    line.insert("archive_checked".to_owned(), json!(archive));
    if let Value::Object(totals) = json!(world.totals) {
        line.extend(totals);
    }
    line.insert("restart_ms_max".to_owned(), json!(restart_ms_max));
    line.insert("seconds".to_owned(), json!(begun.elapsed().as_secs()));
    line.insert("wrong_total".to_owned(), json!(world.wrong_count()));
    Value::Object(line)
}

/// The cores that this process may run on.
fn own_cores() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None).expect("the own affinity");
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|core| set.is_set(*core))
        .collect()
}

/// Makes the accounts; does the server have archives?
fn settle_in(world: &mut World, server: &Server, begun: Instant) -> bool {
    let (jids, users) = (world.jids.clone(), world.users.clone());
    let round = Round::new(server.address(), 0, begun, &jids, &users, world.lasting);
    for (_, clients) in &users {
        for bot in clients {
            let bot = &mut world.bots[*bot];
            if bot.profile.speaker {
                bot.register(&round, PASSWORD).expect("a new account");
            }
            bot.registered = true;
        }
    }
    let bot = &mut world.bots[0];
    let own = round.bare_jid(0);
    let features = bot.log_in(&round, false).and_then(|()| {
        let iq = "<query xmlns='http://jabber.org/protocol/disco#info'/>";
        bot.ask(
            &round,
            &format!("<iq type='get' to='{own}' id='{{id}}'>{iq}</iq>"),
        )
    });
    let features = match features {
        Ok(features) => features,
        Err(Trouble::Gone) => panic!("the server hung up"),
        Err(Trouble::Refused(why)) => panic!("{why}"),
    };
    bot.leave(&round);
    features.child("query").is_some_and(|query| {
        let mut found = query.children.iter();
        found.any(|feature| feature.attribute("var") == Some("urn:xmpp:mam:2"))
    })
}

/// Load, and the kill in the middle of it: how many clients played which role; how the server ended, if it was not killed.
#[allow(clippy::too_many_arguments)] // one caller; what a round needs
fn one_round(
    world: &mut World,
    server: &mut Server,
    rng: &mut Rng,
    number: u32,
    begun: Instant,
    options: &Options,
    archive: bool,
    roles: &[Role],
    kill_at: Duration,
    first_newcomer: usize,
) -> (BTreeMap<String, usize>, Option<String>) {
    let (jids, users) = (world.jids.clone(), world.users.clone());
    let mut round = Round::new(
        server.address(),
        number,
        begun,
        &jids,
        &users,
        world.lasting,
    );
    let senders = roles.iter().filter(|role| role.sends()).count();
    round.message_every = Duration::from_secs(senders.max(1) as u64) / options.rate.max(1);
    round.archive = archive;
    let mut counts = BTreeMap::new();
    for (role, bot) in roles.iter().zip(&world.bots) {
        if bot.profile.user < world.lasting {
            *counts
                .entry(format!("{role:?}").to_lowercase())
                .or_insert(0) += 1;
        }
    }
    let newcomer = world.users[first_newcomer].1[0];
    let (bots, newcomers) = world.bots.split_at_mut(newcomer);
    let mut ended = None;
    std::thread::scope(|scope| {
        let round = &round;
        for (bot, role) in bots.iter_mut().zip(roles) {
            let mut rng = rng.fork();
            scope.spawn(move || load::play(bot, round, *role, kill_at, &mut rng));
        }
        let mut rng = rng.fork();
        scope.spawn(move || load::register(newcomers, round, &mut rng));
        std::thread::sleep(kill_at); // the random instant itself: nothing is waited for
        round.announce_kill();
        ended = server.kill(options.gently);
        round.announce_death();
    });
    (counts, ended)
}
