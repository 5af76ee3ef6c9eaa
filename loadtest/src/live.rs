//! Users who are on line all the time and chat at a fixed rate while something else happens: what they notice of it.
//!
//! They have a fleet of their own, so that a connection of theirs never waits behind the work of a storm inside the
//! generator: its thread computes no SCRAM after its start, and gets a core whenever it has something to do
//! ([`Priority`]). What the generator itself adds is measured: the lag from when a message was due to when it was written.

use std::time::{Duration, Instant};

use serde_json::{Map, json};

use crate::chat::{self, Outcome, Pace, Phase, Plan, Traffic};
use crate::fleet::{Fleet, Priority};
use crate::options::{Global, LiveOptions};
use crate::report::{Histogram, Report};
use crate::timeline::Kind;

/// Chat before the quiet time: caches fill, what logging in left behind ends.
const SETTLE: Duration = Duration::from_secs(1);
/// After the end, what did not come for so long is lost.
const DRAIN: Duration = Duration::from_secs(10);
/// From this share of a p99 on the generator's own lag counts as the cause of it.
const LAG_SHARE_MAX: f64 = 0.25;

pub struct Live {
    fleet: Fleet,
    options: LiveOptions,
}

/// A chat with a quiet time and a time in which something happened.
pub struct LiveOutcome {
    chat: Outcome,
    options: LiveOptions,
    disconnected: u64,
    disconnections: crate::report::Failures,
}

/// What the rest of the generator has to be content with beside live users.
pub fn others_priority() -> Priority {
    if Priority::may_be_first() {
        Priority::Normal
    } else {
        Priority::Last
    }
}

impl Live {
    /// Logs the live users in, if there are to be any, and lets them chat for the quiet time; what failed is in the report.
    pub fn start(
        global: &Global,
        options: &LiveOptions,
        report: &mut Report,
    ) -> Result<Option<Live>, String> {
        if options.live_users == 0 {
            return Ok(None);
        }
        if options.live_rate <= 0.0 || options.quiet <= 0.0 {
            return Err("--live-rate and --quiet must be greater than 0".into());
        }
        if global.resource.is_empty() {
            return Err(
                "--resource may not be empty with --live-users: messages go to full addresses"
                    .into(),
            );
        }
        let global = Global {
            users: (options.live_users / 2).max(1) * 2,
            prefix: options.live_prefix.clone(),
            accounts: None,
            first: 0,
            threads: 1,
            ..global.clone()
        };
        let fleet = Fleet::start_as(&global, global.target()?, "live", Priority::First)?;
        let live = Live {
            fleet,
            options: options.clone(),
        };
        live.quiet_time(report)?;
        Ok(Some(live))
    }

    fn quiet_time(&self, report: &mut Report) -> Result<(), String> {
        let login = self.fleet.login_all("live users")?;
        report.note_failures(&login.failures);
        if report.is_failure() {
            return Ok(());
        }
        self.fleet.wait_until_quiet();
        self.fleet.start_chat(self.plan());
        self.fleet.watch_chat("settle", SETTLE);
        self.begin_phase();
        let quiet = Duration::from_secs_f64(self.options.quiet);
        let start = Instant::now();
        self.fleet.watch_chat("quiet", quiet);
        report.band("quiet", start, Instant::now(), false);
        Ok(())
    }

    /// What is due from now on is counted apart.
    pub fn begin_phase(&self) {
        self.fleet.begin_chat_phase();
    }

    /// For the line of progress; to be called now and then while something else is waited for.
    pub fn progress(&self) -> String {
        self.fleet.collect();
        self.fleet.progress(Kind::Message)
    }

    pub fn finish(self, report: &mut Report) -> Result<LiveOutcome, String> {
        self.fleet.stop_chat();
        let outcome = LiveOutcome {
            chat: self.fleet.finish_chat("drain")?,
            options: self.options,
            disconnected: self.fleet.disconnected(),
            disconnections: self.fleet.disconnections(),
        };
        self.fleet.stop(report)?;
        Ok(outcome)
    }

    fn plan(&self) -> Plan {
        Plan {
            run: chat::run_number(),
            epoch: Instant::now(),
            pace: Pace::Rate(self.options.live_rate),
            messages: None,
            pairs: (self.options.live_users / 2).max(1),
            offline_pairs: 0,
            ack: None,
            no_store: self.options.no_store,
            threads: 1,
            drain: DRAIN,
            body: self.options.live_body,
            bare: false,
            one_way: false,
            traffic: Traffic::Messages,
        }
    }
}

impl LiveOutcome {
    /// Settling, quiet, what happened, and perhaps what was due after it.
    fn phases(&self) -> Option<(&Phase, &Phase)> {
        Some((self.chat.phases.get(1)?, self.chat.phases.get(2)?))
    }

    /// Rows of the live users; `key` and `when` name what happened beside them.
    pub fn report(&self, report: &mut Report, key: &str, when: &str) {
        let tally = &self.chat.tally;
        report.number("live_users", "live users", self.options.live_users, "");
        let rate = self.options.live_rate;
        report.number("live_rate_per_s", "live messages", rate, "/s");
        let stored = if self.options.no_store {
            "no (hint)"
        } else {
            "yes"
        };
        report.text("live_to_be_stored", "  to be stored", stored.into());
        let Some((quiet, beside)) = self.phases() else {
            return report.fail("the live users had no time to chat");
        };
        report.number("live_quiet_seconds", "quiet time", self.options.quiet, "s");
        report.number(
            "live_quiet_messages",
            "  messages",
            quiet.latencies.len(),
            "",
        );
        report.number(
            &format!("live_{key}_messages"),
            &format!("  messages {when}"),
            beside.latencies.len(),
            "",
        );
        report.latencies("live_quiet", "live message, quiet", &quiet.latencies);
        let label = format!("live message, {when}");
        report.latencies(&format!("live_{key}"), &label, &beside.latencies);
        ratios(report, key, when, &quiet.latencies, &beside.latencies);
        report.latencies("lag_quiet", "generator's lag, quiet", &quiet.lag);
        let label = format!("generator's lag, {when}");
        report.latencies(&format!("lag_{key}"), &label, &beside.lag);
        report.number("live_sent", "live messages sent", tally.sent, "");
        report.number("live_lost", "live lost", tally.lost, "");
        report.number("live_duplicated", "live duplicated", tally.duplicated, "");
        report.number("live_reordered", "live reordered", tally.reordered, "");
        report.number("live_bounced", "live bounced", tally.bounced, "");
        let lost = self.disconnected;
        report.number("live_disconnected", "live connections lost", lost, "");
        self.judge(report, when, quiet, beside);
    }

    fn judge(&self, report: &mut Report, when: &str, quiet: &Phase, beside: &Phase) {
        let mut own_fault = false;
        for (time, phase) in [("in the quiet time", quiet), (when, beside)] {
            let p99 = |histogram: &Histogram| histogram.value_at_quantile(0.99) as f64;
            let (lag, latency) = (p99(&phase.lag), p99(&phase.latencies));
            if lag > latency * LAG_SHARE_MAX {
                own_fault = true;
                report.say(format!(
                    "the generator was late itself {time}: p99 of its lag is {:.3} ms of {:.3} ms: latencies are partly its own",
                    lag / 1e6,
                    latency / 1e6
                ));
            }
        }
        report.flag("generator_lag", own_fault);
        if !self.chat.tally.is_clean() {
            report.fail("live messages were lost, duplicated, reordered or bounced");
        }
        if beside.latencies.is_empty() || quiet.latencies.is_empty() {
            report.fail("no live message arrived");
        }
        report.note_failures(&self.disconnections);
    }
}

/// How much longer a message takes than in the quiet time.
fn ratios(report: &mut Report, key: &str, when: &str, quiet: &Histogram, beside: &Histogram) {
    let ratio = |of: &dyn Fn(&Histogram) -> u64| of(beside) as f64 / of(quiet).max(1) as f64;
    let ratios = [
        ("p50", ratio(&|h| h.value_at_quantile(0.5))),
        ("p99", ratio(&|h| h.value_at_quantile(0.99))),
        ("p99.9", ratio(&|h| h.value_at_quantile(0.999))),
        ("max", ratio(&|h| h.max())),
    ];
    let shown: Vec<_> = ratios
        .iter()
        .map(|(name, ratio)| format!("{name} {ratio:.2}"))
        .collect();
    let figures: Map<_, _> = ratios
        .iter()
        .map(|(name, ratio)| ((*name).to_owned(), json!(ratio)))
        .collect();
    report.figures(
        &format!("live_{key}_ratio"),
        &format!("  {when}, times quiet"),
        shown.join("  "),
        figures,
    );
}
