//! Figures of the blade, for whoever looks from outside. In: each shard's figures, a few times a second; events that no
//! shard counts. Out: the OpenMetrics text of `GET /metrics`. Promise: a reader never touches what a shard works with.

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::Counter;

/// A shard's row: declares each metric once, with its kind and what it means.
macro_rules! snapshot {
    ($( $(#[doc = $help:literal])+ $kind:ident $field:ident = $name:literal; )*) => {
        /// The figures of one shard at one moment.
        #[derive(Clone, Debug, Default)]
        pub struct Snapshot { $( $(#[doc = $help])+ pub $field: u64, )* }

        const ROWS: &[Row] = &[ $( Row {
            name: $name, kind: stringify!($kind), help: concat!($($help),+), get: |s| s.$field,
        }, )* ];
    };
}

struct Row {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    get: fn(&Snapshot) -> u64,
}

snapshot! {
    /// Sessions, those that wait to be resumed included.
    gauge sessions = "nitro_sessions";
    /// Sessions whose connection was cut and that can be resumed.
    gauge parked = "nitro_sessions_parked";
    /// Connections that have not begun a session yet.
    gauge negotiating = "nitro_connections_negotiating";
    /// Sessions begun.
    counter binds = "nitro_binds";
    /// Sessions resumed.
    counter resumptions = "nitro_resumptions";
    /// Connections that came from another shard because their user lives here.
    counter hand_overs = "nitro_hand_overs";
    /// Messages from clients.
    counter messages_in = "nitro_messages_in";
    /// Messages handed to sessions.
    counter messages_delivered = "nitro_messages_delivered";
    /// Messages for the offline queue.
    counter messages_offline = "nitro_messages_offline";
    /// Presence stanzas from clients.
    counter presences_in = "nitro_presences_in";
    /// IQ stanzas from clients.
    counter iqs_in = "nitro_iqs_in";
    /// Stanzas answered by an error.
    counter bounces = "nitro_bounces";
    /// Clients cut because they did not read (limits.send_queue_bytes_max, stream_management.unacked_*).
    counter overflows = "nitro_slow_readers_cut";
    /// Stanzas refused because too much waits for one user to be loaded.
    counter load_queue_full = "nitro_load_queue_full";
    /// Mesh messages sent to other shards.
    counter mesh_sent = "nitro_mesh_messages";
    /// Mesh messages that found their way full: reading from clients stops until they are gone.
    counter mesh_full = "nitro_mesh_full";
    /// Stanzas refused because too much waits for another shard (limits.mesh_backlog_bytes_max).
    counter mesh_refused = "nitro_mesh_refused";
    /// Lookups that found the user in the cache.
    counter cache_hits = "nitro_cache_hits";
    /// Lookups that did not.
    counter cache_misses = "nitro_cache_misses";
    /// Users evicted from the cache.
    counter cache_evictions = "nitro_cache_evictions";
    /// Bytes of the cache.
    gauge cache_bytes = "nitro_cache_bytes";
    /// Groups of changes that the journal has synced.
    counter journal_commits = "nitro_journal_commits";
    /// Changes in them.
    counter journal_records = "nitro_journal_records";
    /// Their bytes, before whole blocks are filled up.
    counter journal_bytes = "nitro_journal_bytes";
    /// Microseconds from handing groups over to their being durable, all together: divide by nitro_journal_commits.
    counter journal_commit_us = "nitro_journal_commit_microseconds";
    /// The slowest of them. When it grows, the disk is at its limit: clients wait as long for their acknowledgements.
    gauge journal_commit_us_max = "nitro_journal_commit_microseconds_max";
    /// Bytes that the database does not have yet. When it grows, the database is away or too slow; at
    /// journal.backlog_bytes_max new messages are refused.
    gauge journal_backlog = "nitro_journal_backlog_bytes";
    /// Files of the journal that hold changes.
    gauge journal_segments = "nitro_journal_segments";
    /// 0: open; 1: full, the backlog's bound is reached; 2: full, the disk is. New messages and changes are refused.
    gauge journal_status = "nitro_journal_status";
    /// Messages and changes refused because the journal was full.
    counter journal_refused = "nitro_journal_refused";
    /// Subscriptions, durable at their sender, that had to wait until the recipient's full journal had room.
    counter journal_waited = "nitro_journal_waited";
    /// Changes that the database does not have yet and the shard remembers.
    gauge overlay_items = "nitro_overlay_items";
    /// Users whose copies in Redis wait to be written or answered; the database gets their changes after that.
    gauge ring_waiting = "nitro_redis_waiting";
    /// Logins that compute at the moment.
    gauge logins_computing = "nitro_logins_computing";
    /// Logins that may compute at a time, as control has found (storm.lag_us_target). At its floor
    /// (storm.logins_computing_min) the shard is at its limit, or something else takes its core.
    gauge logins_computing_bound = "nitro_logins_computing_bound";
    /// Accepted connections that wait unread for their turn to log in. It grows in a storm; when it does not shrink again, see
    /// nitro_gate_refused.
    gauge gate_first = "nitro_gate_first_waiting";
    /// Logins that have named their user and wait for their turn.
    gauge gate_second = "nitro_gate_second_waiting";
    /// Waits at the gates that ended.
    counter gate_waits = "nitro_gate_waits";
    /// Milliseconds of these waits together: divide by nitro_gate_waits.
    counter gate_wait_ms = "nitro_gate_wait_milliseconds";
    /// Connections refused because they waited longer than storm.wait_seconds_max: more cores are needed, or a higher
    /// storm.lag_us_target.
    counter gate_late = "nitro_gate_refused";
    /// Logins held back or refused because their account logs in too often (storm.account_logins_per_minute).
    counter logins_slowed = "nitro_logins_slowed";
    /// Connections that were accepted here and went to a shard where fewer waited.
    counter knocks_moved = "nitro_gate_moved";
    /// Sessions for which presence of others waits for a turn with room.
    gauge presence_waiting = "nitro_presence_waiting";
    /// Presences that were never sent because a newer one of the same full JID came while they waited.
    counter presence_merged = "nitro_presence_merged";
}

/// A metric with labels of its own.
pub struct Table {
    pub name: &'static str,
    /// `counter` or `gauge`.
    pub kind: &'static str,
    pub help: &'static str,
    /// Labels as in `shard="0",instance="a"` (values escaped by [`label`]), and the value.
    pub rows: Vec<(String, u64)>,
}

/// A label's value as OpenMetrics wants it.
pub fn label(value: &str) -> String {
    value
        .replace('\\', r"\\")
        .replace('"', "\\\"")
        .replace('\n', r"\n")
}

/// Figures of the whole blade.
pub struct Gauges {
    ready: AtomicUsize,
    shards: Vec<Mutex<Snapshot>>,
    /// Accepts that failed because descriptors or memory were exhausted.
    pub accept_failures: Counter,
    /// Connections turned away by a limit.
    pub turned_away: Counter,
    /// Logins cut because their clients were silent while others waited.
    pub logins_silent: Counter,
}

impl Gauges {
    pub fn new(shards: usize) -> Gauges {
        Gauges {
            ready: AtomicUsize::new(0),
            shards: (0..shards).map(|_| Mutex::default()).collect(),
            accept_failures: Counter::new(),
            turned_away: Counter::new(),
            logins_silent: Counter::new(),
        }
    }

    /// A shard listens.
    pub fn shard_is_ready(&self) {
        self.ready.fetch_add(1, Relaxed);
    }

    pub fn shards_ready(&self) -> usize {
        self.ready.load(Relaxed)
    }

    pub fn publish(&self, shard: usize, snapshot: Snapshot) {
        if let Ok(mut place) = self.shards[shard].lock() {
            *place = snapshot;
        }
    }

    /// OpenMetrics text, with `more` (name, help, value) counters of the blade, and `tables`.
    pub fn render(&self, more: &[(&str, &str, u64)], tables: &[Table]) -> String {
        let shards: Vec<Snapshot> = self
            .shards
            .iter()
            .map(|s| s.lock().map(|s| s.clone()).unwrap_or_default())
            .collect();
        let mut out = String::with_capacity(8 * 1024);
        for row in ROWS {
            let (name, kind) = (row.name, row.kind);
            let total = if kind == "counter" { "_total" } else { "" };
            let _ = writeln!(
                out,
                "# TYPE {name} {kind}\n# HELP {name} {}",
                row.help.trim()
            );
            for (n, shard) in shards.iter().enumerate() {
                let _ = writeln!(out, "{name}{total}{{shard=\"{n}\"}} {}", (row.get)(shard));
            }
        }
        let own = [
            (
                "nitro_accept_failures",
                "Accepts that failed for lack of descriptors or memory.",
                self.accept_failures.get(),
            ),
            (
                "nitro_turned_away",
                "Connections turned away by a limit of connections.",
                self.turned_away.get(),
            ),
            (
                "nitro_logins_silent",
                "Logins cut because their clients were silent while others waited (storm.silent_seconds_max).",
                self.logins_silent.get(),
            ),
        ];
        for (name, help, value) in own.iter().chain(more) {
            let _ = writeln!(
                out,
                "# TYPE {name} counter\n# HELP {name} {help}\n{name}_total {value}"
            );
        }
        for table in tables {
            let (name, kind) = (table.name, table.kind);
            let total = if kind == "counter" { "_total" } else { "" };
            let _ = writeln!(out, "# TYPE {name} {kind}\n# HELP {name} {}", table.help);
            for (labels, value) in &table.rows {
                let _ = writeln!(out, "{name}{total}{{{labels}}} {value}");
            }
        }
        out.push_str("# EOF\n");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_tables_stand_before_the_end() {
        let table = Table {
            name: "nitro_x",
            kind: "counter",
            help: "X.",
            rows: vec![(format!("a=\"{}\"", label("b\"\\\n")), 3)],
        };
        let text = Gauges::new(1).render(&[], &[table]);
        assert!(
            text.ends_with("nitro_x_total{a=\"b\\\"\\\\\\n\"} 3\n# EOF\n"),
            "{text}"
        );
    }

    #[test]
    fn every_metric_is_there_once_for_each_shard_with_type_and_help() {
        let gauges = Gauges::new(2);
        gauges.publish(
            1,
            Snapshot {
                sessions: 7,
                ..Snapshot::default()
            },
        );
        let text = gauges.render(&[("nitro_sql_statements", "Statements.", 3)], &[]);
        assert!(
            text.contains("nitro_sessions{shard=\"1\"} 7\n")
                && text.contains("nitro_sql_statements_total 3\n")
        );
        assert_eq!(text.matches("# TYPE ").count(), ROWS.len() + 4);
        assert_eq!(text.matches("# HELP ").count(), ROWS.len() + 4);
        assert_eq!(text.matches("{shard=\"0\"}").count(), ROWS.len());
        assert!(text.ends_with("# EOF\n"));
        let mut names: Vec<&str> = ROWS.iter().map(|r| r.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ROWS.len());
    }
}
