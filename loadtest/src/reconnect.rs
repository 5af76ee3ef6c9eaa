//! `reconnect`: everyone is cut at once, as when a switch forgets its connections, and comes back into his session
//! (XEP-0198, section 5): how long until all are back, how many sessions went on, what it costs the server. Beside it,
//! the same users log in afresh, so that both can be compared.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::fleet::Fleet;
use crate::metrics::{Counters, Reading};
use crate::options::{Global, ReconnectOptions};
use crate::proc::Usage;
use crate::report::{self, Report, median};
use crate::worker::{Job, Outcome};

/// One way back.
struct Back {
    usage: Usage,
    outcome: Outcome,
    /// From the first connect until the last user was in.
    seconds: f64,
    presences: u64,
}

pub fn run(global: &Global, options: &ReconnectOptions) -> Result<Report, String> {
    if options.rounds == 0 || options.rate.is_some_and(|rate| rate <= 0.0) {
        return Err("--rounds and --rate must be greater than 0".into());
    }
    let counters = Counters::new(&options.metrics)?;
    let mut target = global.target()?;
    target.stream_management = true;
    target.acknowledgements = true;
    target.resumption = true;
    let mut report = Report::new("reconnect");
    let fleet = Fleet::start(global, target)?;
    let login = fleet.login_all("log in")?;
    report.note_failures(&login.failures);
    let (mut cut, mut afresh) = (Vec::new(), Vec::new());
    let mut counted = Vec::new();
    for _ in 0..options.rounds {
        if report.is_failure() {
            break;
        }
        fleet.rest("on line", Duration::from_secs_f64(options.online));
        fleet.wait_until_quiet();
        report.note_failures(&fleet.disconnections());
        let counted_before = counters.read()?;
        let start = Instant::now();
        fleet.cut()?;
        fleet.rest("cut", Duration::from_secs_f64(options.gap));
        let back = come_back(&fleet, options, Job::Resume, "come back")?;
        report.band("everyone cut", start, Instant::now(), true);
        counted.push((counted_before, counters.read()?, back.outcome.done));
        report.note_failures(&back.outcome.failures);
        cut.push(back);
        if options.afresh && !report.is_failure() {
            let logout = fleet.run(Job::Logout, &fleet.everyone(), None, "log out")?;
            report.note_failures(&logout.failures);
            fleet.wait_until_quiet();
            let start = Instant::now();
            let back = come_back(&fleet, options, Job::Login, "log in afresh")?;
            report.band("afresh", start, Instant::now(), false);
            report.note_failures(&back.outcome.failures);
            afresh.push(back);
        }
    }
    report.number("users", "users", global.users, "");
    report.text(
        "login",
        "login",
        format!("{:?}", global.login).to_lowercase(),
    );
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    match options.rate {
        Some(rate) => report.number("rate_per_s", "rate asked for", rate, "/s"),
        None => report.number("parallel", "in progress", global.parallel as u64, ""),
    }
    report.number("rounds", "rounds", options.rounds, "(figures are medians)");
    if !cut.is_empty() {
        rows(&mut report, &cut, "recovery", "recovery");
        let resumed: u64 = cut.iter().map(|back| back.outcome.resumed).sum();
        let done: u64 = cut.iter().map(|back| back.outcome.done).sum();
        report.number("resumed", "sessions that went on", resumed, "");
        report.number("begun_anew", "sessions begun anew", done - resumed, "");
    }
    if !afresh.is_empty() {
        rows(&mut report, &afresh, "afresh", "afresh");
        compare(&mut report, &cut, &afresh);
    }
    let counted: Vec<(&Reading, &Reading, u64)> = counted
        .iter()
        .map(|(before, after, done)| (before, after, *done))
        .collect();
    counters.report(&mut report, &counted, "login")?;
    if let Some(last) = cut.last() {
        report.bottleneck(&last.usage);
    }
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}

fn come_back(
    fleet: &Fleet,
    options: &ReconnectOptions,
    job: Job,
    title: &str,
) -> Result<Back, String> {
    let presences = fleet.presences();
    let before = fleet.snapshot();
    let start = Instant::now();
    let outcome = fleet.run(job, &fleet.everyone(), options.rate, title)?;
    let seconds = start.elapsed().as_secs_f64();
    let mut usage = before.until(&fleet.snapshot());
    // presence to and from contacts belongs to it and may still be under way
    fleet.wait_until_quiet();
    let until_quiet = before.until(&fleet.snapshot());
    usage.server = until_quiet.server;
    usage.processes = until_quiet.processes;
    Ok(Back {
        usage,
        outcome,
        seconds,
        presences: fleet.presences() - presences,
    })
}

fn rows(report: &mut Report, backs: &[Back], key: &str, label: &str) {
    let seconds: Vec<f64> = backs.iter().map(|back| back.seconds).collect();
    report.number(
        &format!("{key}_seconds"),
        &format!("{label}: until all are back"),
        median(&seconds),
        "s",
    );
    report.list(&format!("{key}_seconds_of_rounds"), &seconds);
    let mut latencies = report::histogram();
    for back in backs {
        latencies
            .add(&back.outcome.latencies)
            .expect("histograms have the same bounds");
    }
    report.latencies(key, &format!("{label}: each"), &latencies);
    let presences: Vec<f64> = backs
        .iter()
        .map(|back| back.presences as f64 / back.outcome.done.max(1) as f64)
        .collect();
    report.number(
        &format!("{key}_presences_per_login"),
        &format!("{label}: presences per user"),
        median(&presences),
        "",
    );
    if let Some(cpu) = cpu(backs) {
        report.number(
            &format!("{key}_server_cpu_ms_per_login"),
            &format!("{label}: server CPU per user"),
            cpu,
            "ms",
        );
    }
}

/// Milliseconds per user, the median of the rounds.
fn cpu(backs: &[Back]) -> Option<f64> {
    let each: Vec<f64> = backs
        .iter()
        .filter_map(|back| {
            let done = back.outcome.done.max(1) as f64;
            Some(back.usage.server?.as_secs_f64() * 1e3 / done)
        })
        .collect();
    (!each.is_empty()).then(|| median(&each))
}

fn compare(report: &mut Report, cut: &[Back], afresh: &[Back]) {
    let seconds = |backs: &[Back]| {
        let each: Vec<f64> = backs.iter().map(|back| back.seconds).collect();
        median(&each)
    };
    let mut figures = serde_json::Map::new();
    let time = seconds(cut) / seconds(afresh);
    figures.insert("seconds".into(), json!(time));
    let mut shown = format!("time {time:.2}");
    if let (Some(back), Some(anew)) = (cpu(cut), cpu(afresh)) {
        figures.insert("cpu".into(), json!(back / anew));
        shown += &format!("  CPU {:.2}", back / anew);
    }
    report.figures(
        "recovery_to_afresh",
        "recovery, times afresh",
        shown,
        figures,
    );
}
