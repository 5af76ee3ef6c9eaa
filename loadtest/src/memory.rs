//! `memory`: the server's resident memory per idle logged-in user, as a slope between two numbers of users: fixed
//! buffers would distort a quotient. The server must be freshly started: memory that it kept from earlier work would
//! be used again unseen.

use std::time::Duration;

use crate::fleet::Fleet;
use crate::options::{Global, MemoryOptions};
use crate::report::Report;
use crate::worker::Job;

pub fn run(global: &Global, options: &MemoryOptions) -> Result<Report, String> {
    if options.from >= options.to || options.from == 0 {
        return Err("--from must be greater than 0 and less than --to".into());
    }
    if global.server_pid.is_empty() {
        return Err("memory wants --server-pid".into());
    }
    let global = &Global {
        users: options.to,
        ..global.clone()
    };
    let mut report = Report::new("memory");
    let fleet = Fleet::start(global, global.target()?)?;
    let rest = Duration::from_secs_f64(options.rest);
    let empty = fleet.server_rss_kib();
    let mut readings = Vec::new();
    for users in [0..options.from, options.from..options.to] {
        let outcome = fleet.run(Job::Login, &users.collect::<Vec<_>>(), None, "log in")?;
        report.note_failures(&outcome.failures);
        fleet.rest("rest", rest);
        readings.push(fleet.server_rss_kib().ok_or("the server is gone")? as f64);
    }
    let slope = (readings[1] - readings[0]) / f64::from(options.to - options.from);
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    report.number(
        "rss_start_kib",
        "resident at the start",
        empty.unwrap_or(0),
        "KiB",
    );
    report.number("from_users", "users, first reading", options.from, "");
    report.number("rss_from_kib", "resident", readings[0] as u64, "KiB");
    report.number("to_users", "users, second reading", options.to, "");
    report.number("rss_to_kib", "resident", readings[1] as u64, "KiB");
    report.number("rest_seconds", "rest before each", options.rest, "s");
    report.number("rss_kib_per_user", "resident memory per user", slope, "KiB");
    if readings[0] <= empty.unwrap_or(0) as f64 {
        report.fail(
            "the server did not grow for the first users: it reused memory of earlier work, so the slope means nothing; \
             restart it first",
        );
    }
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}
