//! What an SRE is promised of a running server: health and readiness, metrics and histograms of what happened, logs of
//! histograms, a log that fail2ban can read and nobody can forge, and `nitro top` for scripts.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use base64::Engine as _;
use blade::Blade;
use client::{Client, PASSWORD, authenticated, opened, wait_until};
use regex::Regex;

/// Figures are published a few times a second.
const WITHIN: Duration = Duration::from_secs(20);

/// The sum of a sample over all its labels.
fn metric(blade: &Blade, name: &str) -> f64 {
    let (code, page) = blade.http_get("/metrics").expect("an answer");
    assert_eq!(code, 200, "{page}");
    let samples = page
        .lines()
        .filter(|l| l.split(['{', ' ']).next() == Some(name));
    let values = samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap());
    values.sum()
}

#[test]
fn what_happened_is_in_the_metrics() {
    let blade = client::blade(&[]);
    blade.add_user("alice", PASSWORD);
    blade.add_user("bob", PASSWORD);
    let mut alice = Client::online(&blade, "alice", "a");
    let mut bob = Client::online(&blade, "bob", "b");
    alice.enable_resumption();
    for n in 0..3 {
        let to = &bob.jid;
        alice.send(&format!(
            "<message to='{to}' type='chat'><body>{n}</body></message>"
        ));
        assert_eq!(bob.next_body(), n.to_string());
    }
    alice.settle();
    // of another log-in, TLS
    let refused = authenticated(blade.c2s, "alice", "wrong").err();
    assert_eq!(refused.as_deref(), Some("not-authorized"));
    for (name, wanted) in [
        ("nitro_login_seconds_count", 2.0),
        ("nitro_sasl_seconds_count", 2.0),
        ("nitro_login_presence_seconds_count", 2.0),
        ("nitro_message_seconds_count", 3.0),
        ("nitro_messages_in_total", 3.0),
        ("nitro_auth_failures_total", 1.0),
        ("nitro_sessions", 2.0),
        ("nitro_sql_up", 1.0),
    ] {
        wait_until(name, WITHIN, || metric(&blade, name) == wanted);
    }
    for name in [
        "nitro_journal_commit_seconds_count",
        "nitro_message_settled_seconds_count",
        "nitro_loop_lag_seconds_count",
        "nitro_sql_load_seconds_count",
        "nitro_sql_batch_seconds_count",
        "nitro_shard_cpu_seconds_total",
        "process_resident_memory_bytes",
    ] {
        wait_until(name, WITHIN, || metric(&blade, name) > 0.0);
    }
    let settled = metric(&blade, "nitro_message_settled_seconds_count");
    assert!(settled >= 3.0, "{settled}");
    // a message is journalled on both sides before it is written: neither 0 nor a minute
    let mean = metric(&blade, "nitro_message_seconds_sum") / 3.0;
    assert!((20e-6..10.0).contains(&mean), "{mean}");
    drop(alice);
    wait_until("the disconnect", WITHIN, || {
        metric(&blade, "nitro_disconnects_total") == 1.0
    });
}

#[test]
fn a_reader_gets_the_content_type_of_what_it_asked_for() {
    let blade = client::blade(&[]);
    let head = |accept: &str| {
        let mut socket = TcpStream::connect(blade.http).unwrap();
        socket.set_read_timeout(Some(WITHIN)).unwrap();
        write!(
            socket,
            "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{accept}\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    };
    let (open, body) =
        head("Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n");
    assert!(
        open.contains("Content-Type: application/openmetrics-text; version=1.0.0"),
        "{open}"
    );
    assert!(body.ends_with("# EOF\n"));
    assert!(
        open.contains(&format!("Content-Length: {}\r\n", body.len())),
        "{open}"
    );
    let (older, body) = head("Accept: text/plain\r\n");
    assert!(
        older.contains("Content-Type: text/plain; version=0.0.4"),
        "{older}"
    );
    assert!(body.contains("# TYPE nitro_binds_total counter"));
}

#[test]
fn a_server_is_ready_until_it_stops_and_says_so() {
    // one shard: a shard that has nobody to wait for ends at once, and the door of HTTP with the first one
    let mut blade = client::blade(&[("cores", "\"0\"")]);
    blade.add_user("alice", PASSWORD);
    assert_eq!(blade.http_get("/readyz"), Some((200, "ready\n".into())));
    assert_eq!(blade.http_get("/healthz"), Some((200, "ok\n".into())));
    // a client that does not hang up holds the end up for a moment
    let _silent = Client::online(&blade, "alice", "a");
    blade.signal(libc::SIGTERM);
    wait_until("not ready", WITHIN, || match blade.http_get("/readyz") {
        Some((503, text)) => text == "the server stops\n",
        Some((200, _)) => false,
        other => panic!("{other:?}"),
    });
    assert!(
        blade.wait(blade::STOPPED_WITHIN).success(),
        "{}",
        blade.log()
    );
}

#[test]
fn histogram_logs_are_read_by_the_reader_of_their_format_and_complete_at_the_end() {
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
    let mut blade = Blade::prepare(&client::PLAIN);
    let dir = blade.folder().join("histograms");
    blade.set("histograms.dir", &format!("\"{}\"", dir.display()));
    blade.set("histograms.interval_seconds", "1");
    blade.restart();
    blade.add_user("alice", PASSWORD);
    for resource in ["a", "b", "c"] {
        Client::online(&blade, "alice", resource);
    }
    assert!(blade.terminate().success(), "{}", blade.log());
    let mut logins = 0;
    let mut tags = Vec::new();
    for file in fs::read_dir(&dir).unwrap() {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        for entry in IntervalLogIterator::new(&bytes) {
            let LogEntry::Interval(interval) = entry.unwrap() else {
                continue;
            };
            let tag = interval.tag().unwrap().as_str().to_owned();
            let decoded = base64::engine::general_purpose::STANDARD
                .decode(interval.encoded_histogram())
                .unwrap();
            let histogram: hdrhistogram::Histogram<u64> = Deserializer::new()
                .deserialize(&mut decoded.as_slice())
                .unwrap();
            if tag.starts_with("login.shard") {
                logins += histogram.len();
            }
            tags.push(tag);
        }
    }
    assert_eq!(logins, 3, "{tags:?}");
    assert!(tags.iter().any(|t| t == "loop_lag.shard0"), "{tags:?}");
}

/// The filter's expression, as fail2ban would compile it; what `<ADDR>` stands for is the group `address`.
fn filter() -> Regex {
    let filter = include_str!("../config/fail2ban/nitro-filter.conf");
    let line = filter
        .lines()
        .find_map(|l| l.strip_prefix("failregex = "))
        .unwrap();
    assert_eq!(line.matches("<ADDR>").count(), 1);
    Regex::new(&line.replace(
        "<ADDR>",
        r"(?P<address>(?:[0-9]{1,3}\.){3}[0-9]{1,3}|[0-9a-fA-F:]+)",
    ))
    .unwrap()
}

#[test]
fn logins_failures_and_disconnects_are_a_line_each_and_fail2ban_reads_the_failures() {
    let blade = client::blade(&[("limits.auth_failure_delay_ms", "0")]);
    blade.add_user("alice", PASSWORD);
    let alice = Client::online(&blade, "alice", "the desk");
    drop(alice);
    assert!(authenticated(blade.c2s, "alice", "wrong").is_err());
    // names that try to forge another address, a line of their own, or the end of their quotes
    let forged = [
        "x\" address=6.6.6.6 user=\"y",
        "x\n2026-11-28T09:00:00.000000Z  INFO nitro::shard::login: authentication failed address=6.6.6.6 user=\"y",
        "INFO nitro::shard::login: authentication failed address=6.6.6.6 user=\"",
        "x\u{2028}INFO nitro::shard::login: authentication failed address=6.6.6.6 user=\"",
    ];
    for name in forged {
        let mut connection = opened(blade.c2s);
        let bare = format!("n,,n={},r=abcdefgh", name.replace(',', "=2C"));
        let bare = base64::engine::general_purpose::STANDARD.encode(bare);
        let auth = format!(
            "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='SCRAM-SHA-256'>{bare}</auth>"
        );
        connection.send(auth.as_bytes()).unwrap();
        connection.find(|e| e.name == "failure").unwrap();
    }
    // and one who has an account logs in with a resource of that kind
    let resource = "INFO nitro::shard::login: authentication failed address=6.6.6.6 user=\"";
    let escaped = resource.replace('"', "&quot;");
    drop(Client::bind(&blade, "alice", &escaped));
    let lines = |text: &str| -> Vec<String> {
        let log = blade.log();
        log.lines()
            .filter(|l| l.contains(text))
            .map(String::from)
            .collect()
    };
    wait_until("the lines", WITHIN, || lines("disconnected").len() == 2);
    let login =
        &lines("logged in address=127.0.0.1 user=\"alice@localhost\" resource=\"the desk\"");
    assert_eq!(login.len(), 1, "{}", blade.log());
    let end = &lines(
        "disconnected address=127.0.0.1 user=\"alice@localhost\" resource=\"the desk\" reason=\"connection lost\"",
    );
    assert_eq!(end.len(), 1, "{}", blade.log());
    let filter = filter();
    let log = blade.log();
    let found: Vec<&str> = log
        .lines()
        .filter_map(|line| Some(filter.captures(line)?.name("address")?.as_str()))
        .collect();
    assert!(!found.is_empty(), "{log}");
    assert!(
        found.iter().all(|address| *address == "127.0.0.1"),
        "{found:?} in\n{log}"
    );
    assert!(!log.contains(PASSWORD) && !log.contains("wrong"), "{log}");
    // the same lines as the journal has them, and as fail2ban sees them when it has cut the time out
    for line in lines("authentication failed address=127.0.0.1") {
        let journal = format!("blade1 nitro[4711]: {line}");
        assert!(filter.is_match(&journal), "{journal}");
        let (_, cut) = line.split_once('Z').unwrap();
        assert!(filter.is_match(cut), "{cut}");
    }
}

#[test]
fn a_message_leaves_no_word_in_the_log_even_when_everything_is_logged() {
    let blade = client::blade(&[("log.level", "\"trace\"")]);
    blade.add_user("alice", PASSWORD);
    let mut alice = Client::online(&blade, "alice", "a");
    let to = alice.jid.clone();
    alice.send(&format!(
        "<message to='{to}' type='chat'><body>sell-everything</body></message>"
    ));
    assert_eq!(alice.next_body(), "sell-everything");
    alice.settle();
    let log = blade.log();
    assert!(
        !log.contains("sell-everything") && !log.contains(PASSWORD),
        "{log}"
    );
}

#[test]
fn a_log_of_json_is_one_object_a_line() {
    let mut blade = client::blade(&[("log.format", "\"json\"")]);
    blade.add_user("alice", PASSWORD);
    drop(Client::online(&blade, "alice", "a"));
    blade.terminate();
    let log = blade.log();
    let objects: Vec<serde_json::Value> = log
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))
        .collect();
    let login = objects
        .iter()
        .find(|o| o["message"] == "logged in")
        .unwrap_or_else(|| panic!("{log}"));
    assert_eq!(login["user"], "alice@localhost");
    assert_eq!(login["address"], "127.0.0.1");
    assert!(
        objects.iter().any(|o| o["message"] == "disconnected"),
        "{log}"
    );
}

/// Names of metrics in an expression of Prometheus.
fn names(expression: &str) -> Vec<String> {
    let name = Regex::new(r"\b(?:nitro|process)_[a-z_]+").unwrap();
    // what a rule of ours records begins with the labels that are left
    let recorded = Regex::new(r"\b[a-z_]+:[a-z_]+:[a-z0-9_]+").unwrap();
    let expression = recorded.replace_all(expression, " ");
    name.find_iter(&expression)
        .map(|m| m.as_str().to_owned())
        .collect()
}

/// All names of samples and families that nitro shows.
fn shown() -> Vec<String> {
    let list = include_str!("../config/metrics.md");
    let mut all = Vec::new();
    for row in list.lines().filter(|l| l.starts_with("| `")) {
        let cells: Vec<&str> = row.split(" | ").collect();
        let name = cells[0].trim_matches(['|', ' ', '`']);
        all.push(name.to_owned());
        if cells[1] == "histogram" {
            all.extend(["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")));
        }
    }
    all
}

#[test]
fn rules_and_dashboard_name_only_metrics_that_there_are() {
    let shown = shown();
    assert!(shown.len() > 100);
    let rules = include_str!("../config/prometheus/nitro-rules.yml");
    let dashboard = include_str!("../config/grafana/nitro-dashboard.json");
    let value: serde_json::Value = serde_json::from_str(dashboard).unwrap();
    let panels = value["panels"].as_array().unwrap();
    let mut expressions: Vec<(String, String)> = Vec::new();
    for panel in panels {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let title = panel["title"].as_str().unwrap().to_owned();
            expressions.push((title, target["expr"].as_str().unwrap().to_owned()));
        }
    }
    assert!(expressions.len() > 40);
    let recorded: Vec<&str> = rules
        .lines()
        .filter_map(|l| l.trim().strip_prefix("- record: "))
        .collect();
    let alerts = rules
        .lines()
        .filter(|l| l.trim().starts_with("- alert: "))
        .count();
    let actions = rules
        .lines()
        .filter(|l| l.trim().starts_with("action: "))
        .count();
    assert!(
        alerts > 10 && alerts == actions,
        "every alert says what to do"
    );
    let record = Regex::new(r"\b[a-z_]+:[a-z_]+:[a-z0-9_]+").unwrap();
    // comments and what to do name metrics too, without `_total` where they are spoken of
    for line in rules.lines() {
        expressions.push(("rules".into(), line.to_owned()));
        for used in record.find_iter(line) {
            assert!(recorded.contains(&used.as_str()), "{line}");
        }
    }
    for (place, expression) in expressions {
        for name in names(&expression) {
            assert!(shown.contains(&name), "{place}: {name} in {expression}");
        }
    }
    // in a rate only what grows
    for wrong in Regex::new(r"rate\((nitro_[a-z_]+)")
        .unwrap()
        .captures_iter(rules)
    {
        let name = &wrong[1];
        assert!(
            name.ends_with("_total") || name.ends_with("_bucket"),
            "{name}"
        );
    }
}

#[test]
fn top_tells_scripts_what_happens_core_by_core() {
    let mut blade = client::blade(&[]);
    blade.add_user("alice", PASSWORD);
    let mut alice = Client::online(&blade, "alice", "a");
    let to = alice.jid.clone();
    // something happens meanwhile
    let figures = std::thread::scope(|scope| {
        let top = scope.spawn(|| blade.nitro(&["top", "--once", "--json", "--interval", "2"], ""));
        while !top.is_finished() {
            alice.send(&format!(
                "<message to='{to}' type='chat'><body>x</body></message>"
            ));
            alice.next_body();
        }
        top.join().unwrap()
    });
    assert!(
        figures.status.success(),
        "{}",
        String::from_utf8_lossy(&figures.stderr)
    );
    let figures: serde_json::Value =
        serde_json::from_slice(&figures.stdout).expect("one JSON object");
    assert_eq!(figures["release"], env!("CARGO_PKG_VERSION"));
    let seconds = figures["seconds"].as_f64().unwrap();
    assert!((1.5..30.0).contains(&seconds), "{seconds}");
    let cores = figures["shards"].as_array().unwrap();
    assert!(!cores.is_empty());
    let sum = |name: &str| {
        cores
            .iter()
            .map(|core| core[name].as_f64().unwrap())
            .sum::<f64>()
    };
    assert_eq!(sum("sessions"), 1.0);
    assert!(sum("messages_per_second") > 0.0);
    assert!(sum("cpu_percent") > 0.0);
    assert_eq!(figures["tiers"]["sql_up"], true);
    let message = &figures["stages"]["message"];
    assert!(message["count"].as_u64().unwrap() > 0, "{figures}");
    let at = |name: &str| message[name].as_u64().unwrap();
    assert!(
        at("p50_us") > 0 && at("p50_us") <= at("p99_us") && at("p99_us") <= at("max_us"),
        "{message}"
    );
    // people get the same as a page
    let page = blade.nitro(
        &["top", "--once", "--interval", "0.2", "--stage", "login"],
        "",
    );
    let page = String::from_utf8_lossy(&page.stdout).into_owned();
    assert!(
        page.contains("loop_lag") && page.contains("SQL up"),
        "{page}"
    );
    // without a terminal the page of its own is refused, and without a server too
    let why = blade.nitro(&["top"], "");
    assert!(
        String::from_utf8_lossy(&why.stderr).contains("--once --json"),
        "{why:?}"
    );
    blade.terminate();
    let why = blade.nitro(&["top", "--once"], "");
    assert_eq!(why.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&why.stderr).contains("nitro serve"),
        "{why:?}"
    );
}
