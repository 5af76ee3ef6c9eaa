//! `slow-readers`: some users do not read what they are sent. Others go on writing to them, and live users chat beside:
//! what the slow ones cost the server in memory, whether it cuts them, and whether anyone else notices.

use std::time::{Duration, Instant};

use crate::chat::{self, Pace, Plan, Traffic};
use crate::fleet::{Fleet, raise_file_limit};
use crate::live::{self, Live};
use crate::options::{Global, SlowReadersOptions};
use crate::report::Report;

/// The kernel holds little for those who do not read, so that it is the server that has to.
const RECEIVE_BUFFER: usize = 4096;

pub fn run(global: &Global, options: &SlowReadersOptions) -> Result<Report, String> {
    let global = &Global {
        users: (global.users / 2).max(1) * 2,
        ..global.clone()
    };
    if global.resource.is_empty() {
        return Err("--resource may not be empty: messages go to full addresses".into());
    }
    raise_file_limit(u64::from(global.users) + u64::from(options.live.live_users))?;
    let mut report = Report::new("slow-readers");
    let mut target = global.target()?;
    target.receive_buffer = Some(RECEIVE_BUFFER);
    let fleet = Fleet::start_as(global, target, "storm", live::others_priority())?;
    let login = fleet.login_all("log in")?;
    report.note_failures(&login.failures);
    let live = Live::start(global, &options.live, &mut report)?;
    if report.is_failure() {
        fleet.stop(&mut report)?;
        return Ok(report);
    }

    let memory_before = fleet.server_rss_kib();
    let before = fleet.snapshot();
    if let Some(live) = &live {
        live.begin_phase();
    }
    let start = Instant::now();
    fleet.stop_reading();
    fleet.start_chat(Plan {
        run: chat::run_number(),
        epoch: Instant::now(),
        pace: Pace::Rate(options.rate),
        messages: None,
        pairs: global.users / 2,
        offline_pairs: 0,
        ack: None,
        no_store: options.live.no_store,
        threads: global.threads,
        drain: Duration::ZERO,
        body: options.body,
        bare: false,
        one_way: true,
        traffic: Traffic::Messages,
    });
    let mut memory_most = memory_before;
    fleet.watch(
        "slow readers",
        Duration::from_secs_f64(options.duration),
        || {
            memory_most = memory_most.max(fleet.server_rss_kib());
            let cut = fleet.disconnected();
            let beside = live.as_ref().map(Live::progress).unwrap_or_default();
            format!("{cut} cut by the server; messages of others {beside}")
        },
    );
    let usage = before.until(&fleet.snapshot());
    report.band("some do not read", start, Instant::now(), true);
    let cut = fleet.disconnected();
    if let Some(live) = &live {
        live.begin_phase();
    }
    fleet.stop_chat();
    let outcome = fleet.finish_chat("stop")?;
    let chat = live.map(|live| live.finish(&mut report)).transpose()?;

    let slow = global.users / 2;
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    report.number("slow_readers", "users who do not read", slow, "");
    report.number("seconds", "for", usage.wall.as_secs_f64(), "s");
    report.number("rate_per_s", "messages to them", options.rate, "/s");
    report.number("body", "bytes of each body", options.body as u64, "");
    report.number("sent", "sent", outcome.tally.sent, "");
    report.number("cut", "cut by the server", cut, "");
    for (reason, count) in &fleet.disconnections() {
        report.say(format!("{count} x {reason}"));
    }
    if let (Some(before), Some(most)) = (memory_before, memory_most) {
        report.number("rss_before_kib", "server memory before", before, "KiB");
        report.number("rss_most_kib", "server memory at most", most, "KiB");
        let each = most.saturating_sub(before) as f64 / f64::from(slow);
        report.number("rss_kib_per_slow_reader", "  per slow reader", each, "KiB");
    }
    if let Some(chat) = &chat {
        chat.report(&mut report, "beside", "beside slow readers");
    }
    report.bottleneck(&usage);
    fleet.stop(&mut report)?;
    Ok(report)
}
