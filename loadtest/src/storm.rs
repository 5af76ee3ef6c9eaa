//! `storm`: many users log in as fast as they can; what a login costs the server, and how long it takes.
//!
//! An unmeasured warm-up teaches the generator the salts (keys are derived then) and warms the server's caches. Log-outs
//! are never part of a measurement: users log out, the server comes to rest, then the clock and the CPU counters start.
//!
//! With `--for` the users log in and out again and again for that time instead, log-outs being part of it, and others
//! ([`live`]) may chat before and meanwhile: what a storm does to those who are already in.

use std::time::{Duration, Instant};

use crate::fleet::{Fleet, raise_file_limit};
use crate::live::{self, Live};
use crate::metrics::{Counters, Reading};
use crate::options::{Global, StormOptions, Target};
use crate::proc::{Bottleneck, Usage};
use crate::register::check_ring;
use crate::report::{self, Report, median};
use crate::timeline::Kind;
use crate::worker::{Job, Outcome};

struct Round {
    usage: Usage,
    outcome: Outcome,
    /// Presence stanzas of others that all clients together received.
    presences: u64,
    counted: (Reading, Reading),
}

pub fn run(global: &Global, options: &StormOptions) -> Result<Report, String> {
    match options.duration {
        Some(seconds) => run_for(global, options, Duration::from_secs_f64(seconds.max(0.0))),
        None if options.live.live_users > 0 => Err("--live-users wants --for".into()),
        None => run_rounds(global, options),
    }
}

/// The users log in and out again and again, perhaps beside others who chat.
fn run_for(global: &Global, options: &StormOptions, duration: Duration) -> Result<Report, String> {
    if duration.is_zero() || options.rate.is_some_and(|rate| rate <= 0.0) {
        return Err("--for and --rate must be greater than 0".into());
    }
    if options.rate.is_none() && global.parallel > global.users as usize / 2 {
        return Err(
            "with --for, --parallel is at most half of --users: the others are on line or leave"
                .into(),
        );
    }
    let counters = Counters::new(&options.metrics)?;
    raise_file_limit(u64::from(global.users) + u64::from(options.live.live_users))?;
    let mut report = Report::new("storm");
    let fleet = Fleet::start_as(global, global.target()?, "storm", live::others_priority())?;
    if options.warm {
        let warm = fleet.login_all("warm up")?;
        report.note_failures(&warm.failures);
        if !report.is_failure() {
            log_out(&fleet, &fleet.everyone(), &mut report)?;
        }
    }
    if report.is_failure() {
        fleet.stop(&mut report)?;
        return Ok(report);
    }
    let live = Live::start(global, &options.live, &mut report)?;
    if report.is_failure() {
        fleet.stop(&mut report)?;
        return Ok(report);
    }

    let counted_before = counters.read()?;
    let before = fleet.snapshot();
    if let Some(live) = &live {
        live.begin_phase();
    }
    let start = Instant::now();
    fleet.start_run(Job::Login, &fleet.everyone(), options.rate, true);
    let logins_before = fleet.done();
    fleet.watch("storm", duration, || {
        let rate = (fleet.done() - logins_before) as f64 / start.elapsed().as_secs_f64();
        let logins = fleet.progress(Kind::Login);
        let beside = live.as_ref().map(Live::progress).unwrap_or_default();
        format!(
            "{rate:.0} logins/s ({logins}), {} failed; messages {beside}",
            fleet.failed()
        )
    });
    let usage = before.until(&fleet.snapshot());
    report.band("storm", start, Instant::now(), true);
    let logins_in_time = fleet.done();
    // the rest is not the storm any more: fewer and fewer are in progress
    if let Some(live) = &live {
        live.begin_phase();
    }
    fleet.stop_run();
    let outcome = fleet.finish(|| {
        live.iter().for_each(|live| {
            live.progress();
        })
    })?;
    let chat = live.map(|live| live.finish(&mut report)).transpose()?;
    let counted = counters.read()?;
    let logins_in_time = logins_in_time.saturating_sub(fleet.done() - outcome.done);

    head(&mut report, global, options);
    report.number("seconds", "storm", usage.wall.as_secs_f64(), "s");
    report.number("logins", "logins", logins_in_time, "");
    let failed: u64 = outcome.failures.values().sum();
    report.number("failed", "failed", failed, "");
    let per_second = logins_in_time as f64 / usage.wall.as_secs_f64();
    report.number("logins_per_s", "logins", per_second, "/s");
    report.latencies("login", "login", &outcome.latencies);
    if let Some(server) = usage.server {
        let per_cpu = logins_in_time as f64 / server.as_secs_f64().max(1e-9);
        let label = "logins per server CPU second";
        let unit = "(each with its log-out, and the live messages)";
        report.number("logins_per_server_cpu_s", label, per_cpu, unit);
    }
    if let Some(chat) = &chat {
        chat.report(&mut report, "storm", "in the storm");
    }
    report.latencies("turn", "turns of the generator's storm", &outcome.turns);
    counters.report(
        &mut report,
        &[(&counted_before, &counted, logins_in_time)],
        "login",
    )?;
    note_derivations(&mut report, outcome.derivations);
    report.usage(&usage, logins_in_time, "login", "ms", 1e3);
    report.note_failures(&outcome.failures);
    report.note_failures(&fleet.disconnections());
    if logins_in_time == 0 {
        report.fail("nobody logged in");
    }
    fleet.stop(&mut report)?;
    Ok(report)
}

fn run_rounds(global: &Global, options: &StormOptions) -> Result<Report, String> {
    check_ring(global.users, options.contacts_online)?;
    if options.rounds == 0 || options.rate.is_some_and(|rate| rate <= 0.0) {
        return Err("--rounds and --rate must be greater than 0".into());
    }
    let counters = Counters::new(&options.metrics)?;
    let fleet = Fleet::start(global, global.target()?)?;
    let mut report = Report::new("storm");
    let mut online = false;
    if options.warm || options.contacts_online > 0 {
        let warm = fleet.login_all("warm up")?;
        report.note_failures(&warm.failures);
        if report.is_failure() {
            fleet.stop(&mut report)?;
            return Ok(report);
        }
        online = true;
    }
    if !online {
        // What an earlier run left to the server is not part of the first round.
        fleet.wait_until_quiet();
    }
    let mut rounds = Vec::new();
    for number in 0..options.rounds {
        let users = measured_users(global.users, options.contacts_online, number);
        if online {
            log_out(&fleet, &users, &mut report)?;
        }
        rounds.push(round(&fleet, options, &counters, &users)?);
        online = true;
    }
    rows(&mut report, global, options, &rounds);
    let counted: Vec<_> = rounds
        .iter()
        .map(|round| (&round.counted.0, &round.counted.1, round.outcome.done))
        .collect();
    counters.report(&mut report, &counted, "login")?;
    if options.hold > 0.0 || options.rss {
        fleet.rest("hold", Duration::from_secs_f64(options.hold));
    }
    if options.rss {
        match fleet.server_rss_kib() {
            Some(rss) => report.number("server_rss_kib", "server resident memory", rss, "KiB"),
            None => report.say("--rss wants --server-pid"),
        }
    }
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}

/// Everyone; or with contacts those whose contacts are all among the others, each round its own.
fn measured_users(users: u32, contacts: u32, round: u32) -> Vec<u32> {
    if contacts == 0 {
        return (0..users).collect();
    }
    let step = contacts / 2 + 1;
    // The last ones would have the first ones among their contacts.
    (0..users / step)
        .map(|number| number * step + round % step)
        .collect()
}

fn log_out(fleet: &Fleet, users: &[u32], report: &mut Report) -> Result<(), String> {
    let outcome = fleet.run(Job::Logout, users, None, "log out")?;
    report.note_failures(&outcome.failures);
    fleet.wait_until_quiet();
    Ok(())
}

fn round(
    fleet: &Fleet,
    options: &StormOptions,
    counters: &Counters,
    users: &[u32],
) -> Result<Round, String> {
    let presences = fleet.presences();
    let counted_before = counters.read()?;
    let before = fleet.snapshot();
    let outcome = fleet.run(Job::Login, users, options.rate, "storm")?;
    let mut usage = before.until(&fleet.snapshot());
    if options.contacts_online > 0 {
        // Presence to and from contacts belongs to a login and may be under way when the last one is complete.
        fleet.wait_until_quiet();
        let until_quiet = before.until(&fleet.snapshot());
        usage.server = until_quiet.server;
        usage.processes = until_quiet.processes;
    }
    if !counters.is_empty() {
        // What a login leaves to be done later belongs to it.
        fleet.wait_until_quiet();
    }
    Ok(Round {
        counted: (counted_before, counters.read()?),
        usage,
        outcome,
        presences: fleet.presences() - presences,
    })
}

fn rows(report: &mut Report, global: &Global, options: &StormOptions, rounds: &[Round]) {
    let logins: u64 = rounds.iter().map(|round| round.outcome.done).sum();
    let mut latencies = report::histogram();
    for round in rounds {
        latencies
            .add(&round.outcome.latencies)
            .expect("histograms have the same bounds");
        report.note_failures(&round.outcome.failures);
    }
    let per_login =
        |time: Duration, round: &Round| time.as_secs_f64() * 1e3 / round.outcome.done.max(1) as f64;
    let server: Vec<f64> = rounds
        .iter()
        .filter_map(|round| Some(per_login(round.usage.server?, round)))
        .collect();
    let generator: Vec<f64> = rounds
        .iter()
        .map(|round| per_login(round.usage.generator, round))
        .collect();
    let rates: Vec<f64> = rounds
        .iter()
        .map(|round| round.outcome.done as f64 / round.usage.wall.as_secs_f64())
        .collect();
    let failed: u64 = rounds
        .iter()
        .flat_map(|round| round.outcome.failures.values())
        .sum();

    head(report, global, options);
    report.number(
        "rounds",
        "rounds",
        options.rounds,
        "(figures are medians, latencies of all)",
    );
    report.number("logins", "logins", logins, "");
    report.number("failed", "failed", failed, "");
    report.number("logins_per_s", "logins", median(&rates), "/s");
    report.list("logins_per_s_of_rounds", &rates);
    report.latencies("login", "login", &latencies);
    if options.contacts_online > 0 {
        let presences: u64 = rounds.iter().map(|round| round.presences).sum();
        report.number(
            "contacts_online",
            "contacts online",
            options.contacts_online,
            "",
        );
        let each = presences as f64 / logins.max(1) as f64;
        let label = "presences of others per login";
        report.number("presences_per_login", label, each, "(to and from contacts)");
        let expected = f64::from(options.contacts_online) * 2.0;
        if (each - expected).abs() > expected * 0.02 {
            report.say(format!(
                "expected {expected} presences per login: are the rosters made (register --roster)?"
            ));
        }
    }
    if !server.is_empty() {
        let usages: Vec<_> = rounds
            .iter()
            .map(|round| (&round.usage, round.outcome.done))
            .collect();
        report.server_cpu(&usages, "login", "ms", 1e3);
        report.list("server_cpu_ms_per_login_of_rounds", &server);
    }
    report.number(
        "generator_cpu_ms_per_login",
        "generator CPU per login",
        median(&generator),
        "ms",
    );
    let derivations: u64 = rounds.iter().map(|round| round.outcome.derivations).sum();
    note_derivations(report, derivations);
    // The round that ran worst for the generator decides.
    let worst = rounds.iter().max_by_key(|round| {
        (
            round.usage.bottleneck() == Bottleneck::Generator,
            (round.usage.generator_busiest.running * 1e6) as u64,
        )
    });
    report.bottleneck(&worst.expect("there is at least one round").usage);
}

/// What was asked for.
fn head(report: &mut Report, global: &Global, options: &StormOptions) {
    let Target { mechanism, .. } = global.target().expect("it was valid at the start");
    report.number("users", "users", global.users, "");
    report.text("mechanism", "mechanism", mechanism.name().to_owned());
    report.text(
        "login",
        "login",
        format!("{:?}", global.login).to_lowercase(),
    );
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    match options.rate {
        Some(rate) => report.number("rate_per_s", "rate asked for", rate, "logins/s"),
        None => report.number("parallel", "in progress", global.parallel as u64, "logins"),
    }
}

fn note_derivations(report: &mut Report, derivations: u64) {
    report.number(
        "key_derivations",
        "SCRAM keys derived while measuring",
        derivations,
        "",
    );
    if derivations > 0 {
        report.say("SCRAM keys were derived while measuring (new salts, or --warm false): times are partly the generator's");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::register::contacts;

    #[test]
    fn contacts_of_measured_users_stay_online() {
        for (users, count) in [(5000, 20), (101, 20), (23, 4), (5, 2)] {
            for round in 0..30 {
                let measured = measured_users(users, count, round);
                assert!(!measured.is_empty());
                for user in &measured {
                    assert!(*user < users);
                    assert!(
                        contacts(*user, users, count).all(|contact| !measured.contains(&contact))
                    );
                }
            }
        }
        assert_eq!(measured_users(5000, 20, 0).len(), 454);
        assert_eq!(measured_users(3, 0, 7), [0, 1, 2]);
    }
}
