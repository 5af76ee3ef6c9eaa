//! `room`: users come into chat rooms (XEP-0045) as fast as asked, then some of them talk: how long it takes to be in, how long
//! until each occupant has a message, what one delivery costs, and whether live users beside notice.
//!
//! The first of each room makes it and takes it as it is (section 10.1.2) before the others come.

use std::time::{Duration, Instant};

use crate::chat::{self, Pace, Plan, Traffic};
use crate::fleet::Fleet;
use crate::live::{self, Live};
use crate::metrics::Counters;
use crate::options::{Global, RoomOptions};
use crate::report::Report;
use crate::timeline::Kind;

pub fn run(global: &Global, options: &RoomOptions) -> Result<Report, String> {
    let occupants = options.occupants;
    let users = options.rooms * occupants;
    if users % 2 == 1 {
        return Err("--rooms times --occupants must be even".into());
    }
    if options.senders > occupants {
        return Err("--senders must not be more than --occupants".into());
    }
    let global = &Global {
        users,
        ..global.clone()
    };
    let counters = Counters::new(&options.metrics)?;
    let mut report = Report::new("room");
    let fleet = Fleet::start_as(global, global.target()?, "rooms", live::others_priority())?;
    let login = fleet.login_all("log in")?;
    report.note_failures(&login.failures);
    let live = Live::start(global, &options.live, &mut report)?;
    fleet.wait_until_still();
    if report.is_failure() {
        fleet.stop(&mut report)?;
        return Ok(report);
    }

    let run = chat::run_number();
    let joins = Plan {
        run,
        epoch: Instant::now(),
        pace: Pace::Rate(options.join_rate),
        messages: Some(users.into()),
        pairs: users / 2,
        offline_pairs: 0,
        ack: None,
        no_store: false,
        threads: global.threads,
        drain: Duration::from_secs_f64(options.drain),
        body: 0,
        bare: false,
        one_way: false,
        traffic: Traffic::Make { occupants },
    };
    if let Some(live) = &live {
        live.begin_phase();
    }
    let start = Instant::now();
    fleet.start_chat(joins.clone());
    let made = fleet.finish_chat("make the rooms")?;
    fleet.wait_until_still();
    let before = fleet.snapshot();
    fleet.start_chat(Plan {
        run: run + 1,
        epoch: Instant::now(),
        traffic: Traffic::Join { occupants },
        ..joins.clone()
    });
    let joined = fleet.finish_chat("come in")?;
    fleet.wait_until_still();
    let join_usage = before.until(&fleet.snapshot());
    report.band("coming in", start, Instant::now(), true);

    if let Some(live) = &live {
        live.begin_phase();
    }
    let start = Instant::now();
    let counted_before = counters.read()?;
    let before = fleet.snapshot();
    fleet.start_chat(Plan {
        run: run + 2,
        epoch: Instant::now(),
        pace: Pace::Rate(options.rate),
        messages: None,
        body: options.body,
        no_store: options.room_no_store,
        traffic: Traffic::Room {
            occupants,
            senders: options.senders,
        },
        ..joins
    });
    fleet.watch("talk", Duration::from_secs_f64(options.duration), || {
        fleet.progress(Kind::Message)
    });
    fleet.stop_chat();
    let outcome = fleet.finish_chat("drain")?;
    let usage = before.until(&fleet.snapshot());
    let counted = counters.read()?;
    report.band("talk", start, Instant::now(), true);
    if let Some(live) = &live {
        live.begin_phase();
    }
    let beside = live.map(|live| live.finish(&mut report)).transpose()?;

    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    report.number("rooms", "rooms", options.rooms, "");
    report.number("occupants", "occupants of each", occupants, "");
    report.number("senders", "senders in each", options.senders, "");
    report.number("joined", "came in", joined.tally.received, "");
    report.latencies("join", "until one is in", &joined.measured().latencies);
    report.usage(&join_usage, joined.tally.received.max(1), "join", "us", 1e6);
    let tally = &outcome.tally;
    report.number("rate_per_s", "rate asked for", options.rate, "messages/s");
    report.number("sent", "messages", tally.sent, "");
    report.number("bounced", "refused", tally.bounced, "");
    report.number("deliveries", "deliveries", tally.received, "");
    let expected = (tally.sent - tally.bounced) * u64::from(occupants);
    report.number("lost", "lost", expected.saturating_sub(tally.received), "");
    report.latencies(
        "latency",
        "until each has it",
        &outcome.measured().latencies,
    );
    report.latencies("lag", "generator's lag", &outcome.measured().lag);
    counters.report(
        &mut report,
        &[(&counted_before, &counted, tally.received)],
        "delivery",
    )?;
    report.usage(&usage, tally.received, "delivery", "us", 1e6);
    let came = made.tally.received + joined.tally.received;
    if came != u64::from(users) {
        report.fail(format!("{came} of {users} came in"));
    }
    if tally.received != expected {
        report.fail(format!("{} of {expected} deliveries came", tally.received));
    }
    if let Some(beside) = &beside {
        beside.report(&mut report, "beside", "beside the rooms");
    }
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}
