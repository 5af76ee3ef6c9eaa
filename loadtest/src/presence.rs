//! `presence`: users on line change their presence at a rate, and the server sends each change to all contacts on line:
//! how long that takes until each has it, and what one delivery costs. A server may merge changes of one user that come
//! soon after one another; so at the end everyone changes once more, slowly, and these must all arrive.

use std::time::{Duration, Instant};

use crate::chat::{self, Outcome, Pace, Plan, Traffic};
use crate::fleet::Fleet;
use crate::metrics::Counters;
use crate::options::{Global, PresenceOptions};
use crate::register::check_ring;
use crate::report::Report;
use crate::timeline::Kind;

/// Everyone's last change takes so long.
const LAST_CHANGES: Duration = Duration::from_secs(4);

pub fn run(global: &Global, options: &PresenceOptions) -> Result<Report, String> {
    let mut global = global.clone();
    global.users = (global.users / 2).max(1) * 2;
    check_ring(global.users, options.contacts)?;
    if options.contacts == 0 {
        return Err("--contacts must be greater than 0".into());
    }
    let counters = Counters::new(&options.metrics)?;
    let fleet = Fleet::start(&global, global.target()?)?;
    let mut report = Report::new("presence");
    let login = fleet.login_all("log in")?;
    report.note_failures(&login.failures);
    fleet.wait_until_quiet();
    if report.is_failure() {
        fleet.stop(&mut report)?;
        return Ok(report);
    }

    let plan = Plan {
        run: chat::run_number(),
        epoch: Instant::now(),
        pace: Pace::Rate(options.rate),
        messages: None,
        pairs: global.users / 2,
        offline_pairs: 0,
        ack: None,
        no_store: false,
        threads: global.threads,
        drain: Duration::from_secs_f64(options.drain),
        body: 0,
        bare: false,
        one_way: false,
        traffic: Traffic::Presence {
            contacts: options.contacts,
        },
    };
    let counted_before = counters.read()?;
    let before = fleet.snapshot();
    fleet.start_chat(plan.clone());
    fleet.watch(
        "presence",
        Duration::from_secs_f64(options.duration),
        || fleet.progress(Kind::Presence),
    );
    fleet.stop_chat();
    let outcome = fleet.finish_chat("drain")?;
    let usage = before.until(&fleet.snapshot());
    let counted = counters.read()?;
    let last = last_changes(&fleet, &plan, global.users)?;

    let tally = &outcome.tally;
    let contacts = u64::from(options.contacts);
    report.number("users", "users", global.users, "");
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    report.number("contacts", "contacts on line of each", options.contacts, "");
    report.number("rate_per_s", "rate asked for", options.rate, "changes/s");
    report.number("changes", "changes", tally.sent, "");
    report.number("deliveries", "deliveries", tally.received, "");
    let expected = tally.sent * contacts;
    let merged = expected.saturating_sub(tally.received);
    report.number("merged", "merged with later ones, or lost", merged, "");
    report.latencies(
        "latency",
        "until each contact has it",
        &outcome.measured().latencies,
    );
    report.alias("presence", "latency");
    report.latencies("lag", "generator's lag", &outcome.measured().lag);
    counters.report(
        &mut report,
        &[(&counted_before, &counted, tally.received)],
        "delivery",
    )?;
    report.usage(&usage, tally.received, "delivery", "us", 1e6);
    let (sent, received) = (last.tally.sent * contacts, last.tally.received);
    report.number("last_expected", "last changes of all: expected", sent, "");
    report.number(
        "last_received",
        "last changes of all: received",
        received,
        "",
    );
    if received != sent {
        report.fail(format!(
            "{received} of {sent} last changes of presence arrived: contacts are out of date, or the rosters are not \
             those of register --roster {contacts}"
        ));
    }
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}

fn last_changes(fleet: &Fleet, plan: &Plan, users: u32) -> Result<Outcome, String> {
    fleet.wait_until_quiet();
    fleet.start_chat(Plan {
        run: plan.run + 1,
        epoch: Instant::now(),
        pace: Pace::Rate(f64::from(users) / LAST_CHANGES.as_secs_f64()),
        messages: Some(users.into()),
        ..plan.clone()
    });
    fleet.finish_chat("last changes")
}
