//! `soak`: a moderate load for hours: live users chat all the time, others log in and out again at a rate; what grows
//! that should not. Memory of the server as a slope by least squares, latencies as the last quarter against the first.

use std::time::{Duration, Instant};

use crate::fleet::{Fleet, raise_file_limit};
use crate::live::{self, Live};
use crate::metrics::Counters;
use crate::options::{Global, SoakOptions};
use crate::report::{Report, median};
use crate::timeline::{self, Kind};
use crate::worker::Job;

/// Points of a plot; a longer soak has longer intervals, unless --interval says otherwise.
const POINTS: f64 = 720.0;
/// Of a soak: caches fill, this is not a leak.
const SETTLING_SHARE: f64 = 0.1;

pub fn run(global: &Global, options: &SoakOptions) -> Result<Report, String> {
    if options.live.live_users == 0 {
        return Err("soak wants --live-users".into());
    }
    if global.server_pid.is_empty() {
        return Err("soak wants --server-pid: it watches the server's memory".into());
    }
    let duration = options.duration.0;
    let global = &Global {
        interval: global
            .interval
            .max((duration.as_secs_f64() / POINTS).ceil()),
        ..global.clone()
    };
    let counters = Counters::new(&options.metrics)?;
    raise_file_limit(u64::from(global.users) + u64::from(options.live.live_users))?;
    let mut report = Report::new("soak");
    let fleet = Fleet::start_as(global, global.target()?, "storm", live::others_priority())?;
    let warm = fleet.login_all("warm up")?;
    report.note_failures(&warm.failures);
    let logout = fleet.run(Job::Logout, &fleet.everyone(), None, "log out")?;
    report.note_failures(&logout.failures);
    let live = Live::start(global, &options.live, &mut report)?.expect("there are live users");
    if report.is_failure() {
        fleet.stop(&mut report)?;
        return Ok(report);
    }

    let counted_before = counters.read()?;
    let before = fleet.snapshot();
    live.begin_phase();
    let start = Instant::now();
    fleet.start_run(
        Job::Login,
        &fleet.everyone(),
        Some(options.login_rate),
        true,
    );
    fleet.watch("soak", duration, || {
        format!(
            "logins {}, {} failed; messages {}",
            fleet.progress(Kind::Login),
            fleet.failed(),
            live.progress()
        )
    });
    let usage = before.until(&fleet.snapshot());
    let end = Instant::now();
    report.band("soak", start, end, false);
    live.begin_phase();
    fleet.stop_run();
    let outcome = fleet.finish(|| {
        live.progress();
    })?;
    let chat = live.finish(&mut report)?;
    let counted = counters.read()?;

    report.number("users", "users who log in and out", global.users, "");
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    report.number("seconds", "soak", usage.wall.as_secs_f64(), "s");
    report.number(
        "login_rate_per_s",
        "logins asked for",
        options.login_rate,
        "/s",
    );
    report.number("logins", "logins", outcome.done, "");
    let failed: u64 = outcome.failures.values().sum();
    report.number("failed", "failed", failed, "");
    report.latencies("login", "login", &outcome.latencies);
    chat.report(&mut report, "soak", "in the soak");
    counters.report(
        &mut report,
        &[(&counted_before, &counted, outcome.done)],
        "login",
    )?;
    report.usage(&usage, outcome.done, "login", "ms", 1e3);
    report.note_failures(&outcome.failures);
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    leaks(&mut report, start, end);
    Ok(report)
}

fn leaks(report: &mut Report, start: Instant, end: Instant) {
    let (from, to) = (timeline::seconds(start), timeline::seconds(end));
    let settled = from + (to - from) * SETTLING_SHARE;
    let memory: Vec<(f64, f64)> = report
        .readings()
        .iter()
        .copied()
        .filter(|(at, _)| (settled..=to).contains(at))
        .collect();
    if let (Some((_, first)), Some((_, last))) = (memory.first(), memory.last()) {
        let slope = slope(&memory) * 1024.0 * 3600.0;
        report.number("rss_first_mib", "memory after a tenth of it", *first, "MiB");
        report.number("rss_last_mib", "memory at the end", *last, "MiB");
        report.number("rss_slope_kib_per_hour", "  grows by", slope, "KiB/hour");
    }
    for (kind, key) in [(Kind::Message, "message"), (Kind::Login, "login")] {
        let p99s: Vec<f64> = report
            .points_of(kind)
            .filter(|point| (from..to).contains(&point.second))
            .map(|point| point.p99 as f64 / 1e6)
            .collect();
        if let Some(drift) = drift(&p99s) {
            report.number(
                &format!("{key}_p99_drift"),
                &format!("{key} p99, last quarter to first"),
                drift,
                "",
            );
        }
    }
}

/// By least squares, per second.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |value: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(value).sum::<f64>() / count;
    let (x, y) = (mean(&|point| point.0), mean(&|point| point.1));
    let covariance: f64 = points
        .iter()
        .map(|point| (point.0 - x) * (point.1 - y))
        .sum();
    let variance: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    if variance == 0.0 {
        0.0
    } else {
        covariance / variance
    }
}

/// The median of the last quarter to that of the first.
fn drift(values: &[f64]) -> Option<f64> {
    let quarter = values.len() / 4;
    let (first, last) = (values.get(..quarter)?, &values[values.len() - quarter..]);
    (quarter > 0).then(|| median(last) / median(first))
}

/// A time with its unit: `90`, `90s`, `30m`, `8h`, `2d`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Long(pub Duration);

impl std::str::FromStr for Long {
    type Err = String;

    fn from_str(text: &str) -> Result<Long, String> {
        let number = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
        let scale = match &text[number.len()..] {
            "" | "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return Err("a time such as 90s, 30m, 8h or 2d is expected".into()),
        };
        match number.parse::<f64>() {
            Ok(number) if number > 0.0 && number.is_finite() => {
                Ok(Long(Duration::from_secs_f64(number * scale)))
            }
            _ => Err("a time greater than 0 is expected".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leak_is_a_slope_and_a_drift_a_quotient() {
        let memory: Vec<_> = (0..100)
            .map(|second| (f64::from(second), 50.0 + 0.25 * f64::from(second)))
            .collect();
        assert!((slope(&memory) - 0.25).abs() < 1e-9);
        assert_eq!(slope(&[(1.0, 5.0)]), 0.0);
        let p99s = [1.0, 1.0, 1.2, 9.0, 1.1, 1.0, 2.0, 2.2];
        assert!((drift(&p99s).unwrap() - 2.1).abs() < 1e-9);
        assert_eq!(drift(&[1.0, 2.0, 3.0]), None);
    }

    #[test]
    fn long_times_have_units() {
        let seconds = |text: &str| text.parse::<Long>().map(|long| long.0.as_secs());
        assert_eq!(seconds("90"), Ok(90));
        assert_eq!(seconds("1.5h"), Ok(5400));
        assert_eq!(seconds("2d"), Ok(172_800));
        assert!(seconds("h").is_err() && seconds("5w").is_err() && seconds("0s").is_err());
    }
}
