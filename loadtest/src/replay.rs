//! `replay`: logins by an arrival curve, such as that of a market open, perhaps beside live users. Open loop: a login counts
//! from when the curve had it due, however many are in progress. Users who have been in come again after the last one.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fleet::{Fleet, raise_file_limit};
use crate::live::{self, Live};
use crate::metrics::Counters;
use crate::options::{Global, ReplayOptions};
use crate::report::Report;
use crate::timeline::Kind;
use crate::worker::Job;

/// Logins per second over time, even changes between its points.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// (seconds, logins per second, logins before).
    points: Vec<(f64, f64, f64)>,
}

impl Curve {
    /// From `seconds,logins_per_s` lines; a first line that is no numbers is a heading.
    pub fn parse(text: &str) -> Result<Curve, String> {
        let mut points: Vec<(f64, f64, f64)> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fields: Option<(f64, f64)> = line.split_once(',').and_then(|(time, rate)| {
                Some((time.trim().parse().ok()?, rate.trim().parse().ok()?))
            });
            let wrong = |what: &str| format!("line {}: {what}: {line}", number + 1);
            let Some((time, rate)) = fields else {
                if number == 0 {
                    continue;
                }
                return Err(wrong("two numbers are expected"));
            };
            if !(time >= 0.0 && rate >= 0.0 && time.is_finite() && rate.is_finite()) {
                return Err(wrong("seconds and rate must not be negative"));
            }
            let before = match points.last() {
                None => 0.0,
                Some((earlier, _, _)) if *earlier >= time => {
                    return Err(wrong("seconds must grow"));
                }
                Some((earlier, from, before)) => before + (time - earlier) * (from + rate) / 2.0,
            };
            points.push((time, rate, before));
        }
        let curve = Curve { points };
        if curve.logins() < 1.0 {
            return Err("no login in it: two lines at least, seconds,logins_per_s".into());
        }
        Ok(curve)
    }

    /// So many times as fast, with so many times the rate.
    fn scaled(mut self, speed: f64, scale: f64) -> Curve {
        for (time, rate, before) in &mut self.points {
            *time /= speed;
            *rate *= scale;
            *before *= scale / speed;
        }
        self
    }

    fn logins(&self) -> f64 {
        self.points.last().map_or(0.0, |(_, _, before)| *before)
    }

    fn seconds(&self) -> f64 {
        self.points.last().map_or(0.0, |(time, _, _)| *time)
    }

    /// When the n-th login (from 0) is due; `None` after the end.
    pub fn due(&self, number: u64) -> Option<Duration> {
        let number = number as f64;
        let after = self.points.partition_point(|point| point.2 <= number);
        let (to, from) = (
            self.points.get(after)?,
            self.points.get(after.checked_sub(1)?)?,
        );
        // rate * t + slope / 2 * t^2 = rest
        let rest = number - from.2;
        let slope = (to.1 - from.1) / (to.0 - from.0);
        let root = (from.1 * from.1 + 2.0 * slope * rest).max(0.0).sqrt();
        let time = if rest == 0.0 {
            0.0
        } else {
            2.0 * rest / (from.1 + root)
        };
        Some(Duration::from_secs_f64(from.0 + time.min(to.0 - from.0)))
    }
}

fn read(path: &Path) -> Result<Curve, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
    text.and_then(|text| Curve::parse(&text))
        .map_err(|error| format!("--curve {}: {error}", path.display()))
}

pub fn run(global: &Global, options: &ReplayOptions) -> Result<Report, String> {
    let curve = Arc::new(read(&options.curve)?.scaled(options.speed, options.scale));
    let counters = Counters::new(&options.metrics)?;
    raise_file_limit(u64::from(global.users) + u64::from(options.live.live_users))?;
    let mut report = Report::new("replay");
    let fleet = Fleet::start_as(global, global.target()?, "storm", live::others_priority())?;
    if options.warm {
        let warm = fleet.login_all("warm up")?;
        report.note_failures(&warm.failures);
        let logout = fleet.run(Job::Logout, &fleet.everyone(), None, "log out")?;
        report.note_failures(&logout.failures);
        fleet.wait_until_quiet();
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
    fleet.start_curve(&curve);
    fleet.watch("replay", Duration::from_secs_f64(curve.seconds()), || {
        let beside = live.as_ref().map(Live::progress).unwrap_or_default();
        let failed = fleet.failed();
        format!(
            "{}, {failed} failed; messages {beside}",
            fleet.progress(Kind::Login)
        )
    });
    let outcome = fleet.finish(|| {
        live.iter().for_each(|live| {
            live.progress();
        })
    })?;
    let usage = before.until(&fleet.snapshot());
    report.band("arrival curve", start, Instant::now(), true);
    let chat = live.map(|live| live.finish(&mut report)).transpose()?;
    let counted = counters.read()?;

    report.number("users", "users", global.users, "");
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    report.number("curve_seconds", "curve", curve.seconds(), "s");
    report.number("curve_logins", "logins of the curve", curve.logins(), "");
    report.number(
        "seconds",
        "until the last was in",
        usage.wall.as_secs_f64(),
        "s",
    );
    report.number("logins", "logins", outcome.done, "");
    let failed: u64 = outcome.failures.values().sum();
    report.number("failed", "failed", failed, "");
    report.latencies("login", "login", &outcome.latencies);
    if let Some(chat) = &chat {
        chat.report(&mut report, "storm", "in the storm");
    }
    report.latencies("turn", "turns of the generator's storm", &outcome.turns);
    counters.report(
        &mut report,
        &[(&counted_before, &counted, outcome.done)],
        "login",
    )?;
    report.usage(&usage, outcome.done, "login", "ms", 1e3);
    report.note_failures(&outcome.failures);
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(curve: &Curve, number: u64) -> f64 {
        curve.due(number).unwrap().as_secs_f64()
    }

    #[test]
    fn arrivals_follow_the_curve() {
        let curve = Curve::parse("seconds,logins_per_s\n0,0\n10,20\n20,20\n30,0\n").unwrap();
        assert_eq!((curve.logins(), curve.seconds()), (400.0, 30.0));
        // on the way up t^2 of them have come after t seconds
        assert!((due(&curve, 0) - 0.0).abs() < 1e-9);
        assert!((due(&curve, 25) - 5.0).abs() < 1e-9);
        assert!((due(&curve, 200) - 15.0).abs() < 1e-9);
        assert!(due(&curve, 399) < 30.0 && curve.due(400).is_none());
        let times: Vec<_> = (0..400).map(|number| due(&curve, number)).collect();
        assert!(times.windows(2).all(|pair| pair[0] <= pair[1]));
        let fast = curve.scaled(10.0, 5.0);
        assert_eq!((fast.logins(), fast.seconds()), (200.0, 3.0));
        assert!((due(&fast, 100) - 1.5).abs() < 1e-9);
    }

    #[test]
    fn a_pause_in_the_curve_has_no_arrivals() {
        let curve = Curve::parse("0,10\n1,10\n1.001,0\n5,0\n5.001,10\n6,10").unwrap();
        let in_pause = (0..curve.logins() as u64)
            .map(|number| due(&curve, number))
            .filter(|time| (1.01..5.0).contains(time));
        assert_eq!(in_pause.count(), 0);
        assert!(due(&curve, 15) > 5.0);
    }

    #[test]
    fn what_is_no_curve_is_told_with_its_line() {
        for (text, said) in [
            ("", "no login"),
            ("seconds,rate\n0,5", "no login"),
            ("0,5\n10,x", "line 2: two numbers"),
            ("0,5\n10,-1", "line 2: seconds and rate"),
            ("5,5\n5,6", "line 2: seconds must grow"),
        ] {
            let error = Curve::parse(text).unwrap_err();
            assert!(error.contains(said), "{text:?}: {error}");
        }
    }
}
