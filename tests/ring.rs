//! The Redis ring of a real blade: real redis-servers on unix sockets, with all that can happen to them.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;
#[path = "servers/mariadb.rs"]
mod mariadb;
#[path = "servers/redis.rs"]
mod redis;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use blade::{Blade, DOMAIN};
use client::{Client, PASSWORD, authenticated, wait_until};
use mariadb::Mariadb;
use redis::Redis;

/// How long anything may take that is waited for.
const WITHIN: Duration = Duration::from_secs(30);

/// A blade and its instances.
struct House {
    blade: Blade,
    redis: Vec<Redis>,
}

impl House {
    fn new(instances: usize, settings: &[(&str, &str)]) -> House {
        House::with(
            (0..instances)
                .map(|_| Redis::start().expect(NO_REDIS))
                .collect(),
            settings,
        )
    }

    fn with(redis: Vec<Redis>, settings: &[(&str, &str)]) -> House {
        let urls: Vec<String> = redis.iter().map(|one| format!("{:?}", one.url())).collect();
        let urls = format!("[{}]", urls.join(", "));
        let own = [
            ("redis.instances", &*urls),
            ("redis.pause_ms_max", "200"),
            ("limits.auth_failure_delay_ms", "0"),
        ];
        let blade = client::blade(&[&own[..], settings].concat());
        let house = House { blade, redis };
        house.wait_in_use();
        house
    }

    /// Every shard uses every instance.
    fn wait_in_use(&self) {
        wait_until("the instances are in use", WITHIN, || {
            let states = self.figures("nitro_redis_state");
            !states.is_empty() && states.iter().all(|state| *state == 1)
        });
    }

    /// Import through the running blade: `prefix0`, `prefix1` … with the usual password.
    fn import(&self, prefix: &str, count: usize, contacts: usize) {
        let accounts = self.blade.folder().join("accounts.csv");
        let rosters = self.blade.folder().join("rosters.csv");
        let rows: String = (0..count)
            .map(|n| format!("{prefix}{n},{PASSWORD}\n"))
            .collect();
        fs::write(&accounts, format!("username,password\n{rows}")).unwrap();
        let rows: String = (0..count)
            .flat_map(|one| (1..=contacts).map(move |other| (one, (one + other) % count)))
            .map(|(one, other)| format!("{prefix}{one},{prefix}{other}\n"))
            .collect();
        fs::write(&rosters, format!("username,contact\n{rows}")).unwrap();
        let output = self.blade.nitro(
            &[
                "user",
                "import",
                accounts.to_str().unwrap(),
                "--rosters",
                rosters.to_str().unwrap(),
            ],
            "",
        );
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
    }

    fn figures(&self, name: &str) -> Vec<u64> {
        figures(&self.blade, name)
    }

    fn sum(&self, name: &str) -> u64 {
        self.figures(name).iter().sum()
    }

    /// The ring has answered for everything, and the database has everything.
    fn settle(&self) {
        let (mut last, mut same) = (u64::MAX, 0);
        wait_until("everything is in Redis and in the database", WITHIN, || {
            let now = self.sum("nitro_sql_drained_total");
            same = if now == last { same + 1 } else { 0 };
            last = now;
            std::thread::sleep(Duration::from_millis(50)); // between two looks
            // the drain rests for half a second at most
            same >= 30 && self.sum("nitro_redis_waiting") == 0
        });
    }
}

const NO_REDIS: &str = "Redis is not installed: apt-get install redis-server";

fn figures(blade: &Blade, name: &str) -> Vec<u64> {
    let (_, text) = blade.http_get("/metrics").expect("metrics");
    text.lines()
        .filter(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect()
}

/// Logs in as all of them, some at a time.
fn log_in_all(blade: &Blade, prefix: &str, count: usize) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    Client::bind(blade, &format!("{prefix}{n}"), "r");
                }
            });
        }
    });
}

#[test]
fn a_warm_login_after_a_restart_costs_no_statement() {
    const USERS: usize = 1000;
    let mut house = House::new(4, &[]);
    house.import("u", USERS, 3);
    house.settle();
    let mood = "<iq type='set' id='{id}'><pubsub xmlns='http://jabber.org/protocol/pubsub'>\
        <publish node='http://jabber.org/protocol/mood'><item><mood xmlns='http://jabber.org/protocol/mood'><happy/></mood></item>\
        </publish></pubsub></iq>";
    for n in 0..20 {
        let mut client = Client::bind(&house.blade, &format!("u{n}"), "r");
        let answer = client.connection.request(mood).unwrap();
        assert_eq!(answer.attribute("type"), Some("result"), "{answer}");
    }
    for kill in [false, true] {
        house.settle();
        match kill {
            true => drop(house.blade.kill()),
            false => drop(house.blade.terminate()),
        }
        house.blade.restart();
        house.wait_in_use();
        house.settle();
        let before = house.sum("nitro_sql_statements_total");
        log_in_all(&house.blade, "u", USERS);
        let hits = house.sum("nitro_redis_hits_total");
        assert_eq!(hits, USERS as u64);
        // and what clients of people need at once
        for n in 0..40 {
            let name = format!("u{n}");
            let mut client = Client::bind(&house.blade, &name, "caps");
            client.send(
                "<presence><c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='urn:c' ver='x'/></presence>",
            );
            let mood = client
                .connection
                .request(
                    "<iq type='get' id='{id}'><pubsub xmlns='http://jabber.org/protocol/pubsub'>\
                     <items node='http://jabber.org/protocol/mood'/></pubsub></iq>",
                )
                .unwrap();
            let wanted = if n < 20 { "result" } else { "error" };
            assert_eq!(mood.attribute("type"), Some(wanted), "{mood}");
        }
        assert_eq!(house.sum("nitro_sql_loads_total"), 0);
        assert_eq!(house.sum("nitro_sql_statements_total"), before);
    }
}

// ---- what was changed never comes back ---------------------------------------------------------------------------

fn set_password(blade: &Blade, name: &str, password: &str) {
    let output = blade.nitro(
        &["user", "passwd", name, "--password-stdin"],
        &format!("{password}\n"),
    );
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

fn remove(blade: &Blade, name: &str) {
    let output = blade.nitro(&["user", "remove", name], "");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

fn can_log_in(blade: &Blade, name: &str, password: &str) -> bool {
    authenticated(blade.c2s, name, password).is_ok()
}

/// What happens to the instances around a change.
#[derive(Debug, Clone, Copy)]
enum Fault {
    None,
    /// Dead during the change; back, with what it held before, after it.
    Down,
    /// Hangs with the change in its socket, and goes on after nitro has died.
    Hung,
    /// Alive, then restarted with what it held before the change.
    OldDump,
    /// Alive, then another server with the old data while nitro is down.
    OldDumpMeanwhile,
    /// Takes no more memory.
    Full,
}

const FAULTS: [Fault; 6] = [
    Fault::None,
    Fault::Down,
    Fault::Hung,
    Fault::OldDump,
    Fault::OldDumpMeanwhile,
    Fault::Full,
];

impl House {
    fn each(&mut self, act: impl FnMut(&mut Redis)) {
        self.redis.iter_mut().for_each(act);
    }

    /// `change` is made while the fault is there; nitro is killed or stopped, and has a cold cache afterwards.
    fn through(&mut self, fault: Fault, gently: bool, change: impl FnOnce(&Blade)) {
        self.settle();
        self.each(|redis| {
            let saved = redis.command("SAVE").expect("an answer");
            assert!(saved.starts_with("+OK"), "{saved}");
        });
        match fault {
            Fault::Down => self.each(|redis| redis.kill()),
            Fault::Hung => self.each(|redis| redis.stop()),
            Fault::Full => self.each(|redis| {
                redis.command("CONFIG SET maxmemory 1");
            }),
            Fault::None | Fault::OldDump | Fault::OldDumpMeanwhile => {}
        }
        change(&self.blade);
        match fault {
            Fault::Down => self.each(|redis| redis.restart()),
            Fault::OldDump => self.each(|redis| {
                redis.kill();
                redis.restart();
            }),
            _ => {}
        }
        match gently {
            true => drop(self.blade.terminate()),
            false => drop(self.blade.kill()),
        }
        match fault {
            Fault::Hung => self.each(|redis| redis.go_on()),
            Fault::OldDumpMeanwhile => self.each(|redis| {
                redis.kill();
                redis.restart();
            }),
            Fault::Full => self.each(|redis| {
                redis.command("CONFIG SET maxmemory 0");
            }),
            Fault::None | Fault::Down | Fault::OldDump => {}
        }
        self.blade.restart();
    }
}

#[test]
fn an_old_password_never_works_again_whatever_an_instance_went_through() {
    let mut house = House::new(2, &[]);
    let mut number = 0;
    for gently in [false, true] {
        for fault in FAULTS {
            let names: Vec<String> = (0..4).map(|n| format!("u{number}x{n}")).collect();
            number += 1;
            for name in &names {
                house.blade.add_user(name, "old");
            }
            house.through(fault, gently, |blade| {
                for name in &names {
                    set_password(blade, name, "new");
                }
            });
            // at once, once more when everything has calmed down, and after another cold start
            for look in 0..3 {
                for name in &names {
                    let (old, new) = (
                        can_log_in(&house.blade, name, "old"),
                        can_log_in(&house.blade, name, "new"),
                    );
                    assert!(!old && new, "{fault:?}, {gently}, {look}: {old} {new}");
                }
                if let (Fault::None, 1) = (fault, look) {
                    let hits = house.sum("nitro_redis_hits_total");
                    assert_eq!(hits, names.len() as u64, "it is the ring that is asked");
                }
                if look == 0 {
                    house.wait_in_use();
                    house.settle();
                    house.blade.kill();
                    house.blade.restart();
                    house.wait_in_use();
                }
            }
        }
    }
}

#[test]
fn a_removed_user_never_comes_back() {
    let mut house = House::new(2, &[]);
    for (number, fault) in FAULTS.into_iter().enumerate() {
        let names: Vec<String> = (0..4).map(|n| format!("u{number}x{n}")).collect();
        for name in &names {
            house.blade.add_user(name, "old");
        }
        house.through(fault, false, |blade| {
            for name in &names {
                remove(blade, name);
            }
        });
        for look in 0..2 {
            for name in &names {
                assert!(!can_log_in(&house.blade, name, "old"), "{fault:?}, {look}");
            }
            if look == 0 {
                house.wait_in_use();
                house.settle();
                house.blade.kill();
                house.blade.restart();
                house.wait_in_use();
            }
        }
    }
}

#[test]
fn a_change_made_while_no_nitro_runs_is_what_the_next_start_knows() {
    let mut house = House::new(2, &[]);
    house.blade.add_user("alice", "old");
    house.settle();
    house.blade.terminate();
    set_password(&house.blade, "alice", "new");
    house.blade.restart();
    house.wait_in_use();
    assert!(!can_log_in(&house.blade, "alice", "old"));
    assert!(can_log_in(&house.blade, "alice", "new"));
    // and a start without the ring, which is not told what changes
    let urls = format!("[{:?}, {:?}]", house.redis[0].url(), house.redis[1].url());
    house.settle();
    house.blade.terminate();
    house.blade.set("redis.instances", "[]");
    house.blade.restart();
    set_password(&house.blade, "alice", "newer");
    house.blade.terminate();
    house.blade.set("redis.instances", &urls);
    house.blade.restart();
    house.wait_in_use();
    assert!(!can_log_in(&house.blade, "alice", "new"));
    assert!(can_log_in(&house.blade, "alice", "newer"));
}

#[test]
fn that_there_is_no_such_user_is_known_for_a_while() {
    let mut house = House::new(2, &[("redis.missing_ttl_seconds", "2")]);
    // an instance is written to when its first change has given it a generation
    for n in 0..20 {
        house.blade.add_user(&format!("u{n}"), "old");
    }
    house.settle();
    assert!(!can_log_in(&house.blade, "nobody", "x"));
    assert_eq!(house.sum("nitro_redis_offers_total"), 1);
    house.blade.kill();
    house.blade.restart();
    house.wait_in_use();
    assert!(!can_log_in(&house.blade, "nobody", "x"));
    assert_eq!(house.sum("nitro_sql_loads_total"), 0);
    house.blade.kill();
    std::thread::sleep(Duration::from_millis(2100)); // the word's own time
    house.blade.restart();
    house.wait_in_use();
    assert!(!can_log_in(&house.blade, "nobody", "x"));
    assert_eq!(house.sum("nitro_sql_loads_total"), 1);
    // and it stands in nobody's way
    house.blade.add_user("nobody", "x");
    house.settle();
    house.blade.kill();
    house.blade.restart();
    assert!(can_log_in(&house.blade, "nobody", "x"));
}

// ---- TLS ---------------------------------------------------------------------------------------------------------

/// Two instances with TLS, an account and keys in database 3, and the settings of a blade for them; `folder` has the files.
fn with_tls(folder: &Path) -> (Vec<Redis>, Vec<(&'static str, String)>) {
    redis::certify(folder);
    // as config/nitro-redis.conf has it
    let user = "--user nitro on >s3cret ~nitro:* +get +getrange +set +eval +evalsha +pexpire +hset +hdel +hgetall \
        +info +select +client|setname";
    let options: Vec<&str> = user.split_whitespace().collect();
    let start = |_| Redis::start_with_tls(folder, &options).expect(NO_REDIS);
    let redis: Vec<Redis> = (0..2).map(start).collect();
    let url = |one: &Redis| format!("\"rediss://nitro:s3cret@{}/3\"", one.tls_address());
    let urls: Vec<String> = redis.iter().map(url).collect();
    let file = |name: &str| format!("{:?}", folder.join(name));
    let settings = vec![
        ("redis.instances", format!("[{}]", urls.join(", "))),
        ("redis.ca_file", file("ca.pem")),
        ("redis.certificate", file("certificate.pem")),
        ("redis.key", file("key.pem")),
        ("redis.pause_ms_max", "200".into()),
        // handshakes of debug builds on a busy machine
        ("redis.timeout_ms", "5000".into()),
        ("redis.connect_timeout_ms", "5000".into()),
    ];
    (redis, settings)
}

fn blade_with(settings: &[(&str, String)]) -> Blade {
    let settings: Vec<(&str, &str)> = settings.iter().map(|(k, v)| (*k, &**v)).collect();
    client::blade(&settings)
}

#[test]
fn over_tls_a_login_after_a_restart_is_as_warm_as_over_a_socket() {
    const USERS: usize = 60;
    let folder = tempfile::tempdir().unwrap();
    let (redis, settings) = with_tls(folder.path());
    let blade = blade_with(&settings);
    let mut house = House { blade, redis };
    house.wait_in_use();
    house.import("u", USERS, 40);
    house.settle();
    for redis in &house.redis {
        let keys = redis.command("INFO keyspace").unwrap();
        assert!(keys.contains("db3:"), "{keys}");
    }
    house.blade.kill();
    house.blade.restart();
    house.wait_in_use();
    house.settle();
    log_in_all(&house.blade, "u", USERS);
    assert_eq!(house.sum("nitro_redis_hits_total"), USERS as u64);
    assert_eq!(house.sum("nitro_sql_loads_total"), 0);
    // a server that is restarted is shaken hands with anew
    for redis in &mut house.redis {
        redis.kill();
        redis.restart();
    }
    house.wait_in_use();
    set_password(&house.blade, "u0", "new");
    house.settle();
    assert!(can_log_in(&house.blade, "u0", "new"));
}

#[test]
fn an_instance_that_nobody_vouches_for_is_told_nothing_and_log_ins_go_on() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (redis, mut settings) = with_tls(folder.path());
    redis::certify(other.path());
    for (key, value, says) in [
        ("redis.ca_file", "ca.pem", "vouches for its certificate"),
        // its own authority again, but nothing to show
        ("redis.certificate", "", "redis.certificate"),
    ] {
        match key {
            "redis.ca_file" => {
                let wrong = format!("{:?}", other.path().join(value));
                settings.iter_mut().find(|one| one.0 == key).unwrap().1 = wrong;
            }
            _ => {
                settings.retain(|one| !["redis.certificate", "redis.key"].contains(&one.0));
                let right = format!("{:?}", folder.path().join("ca.pem"));
                settings
                    .iter_mut()
                    .find(|one| one.0 == "redis.ca_file")
                    .unwrap()
                    .1 = right;
            }
        }
        let blade = blade_with(&settings);
        blade.add_user("alice", PASSWORD);
        wait_until("the instances are given up", WITHIN, || {
            let states = figures(&blade, "nitro_redis_state");
            !states.is_empty() && states.iter().all(|state| *state == 2)
        });
        Client::bind(&blade, "alice", "r");
        let errors = || figures(&blade, "nitro_redis_errors_total");
        wait_until("it is tried again", WITHIN, || {
            errors().iter().all(|count| *count >= 3)
        });
        let opened = figures(&blade, "nitro_redis_breaker_opened_total");
        assert!(opened.iter().all(|times| *times == 1), "{opened:?}");
        let log = blade.log();
        let told = log.lines().filter(|line| line.contains(says)).count();
        assert_eq!(told, opened.len(), "each shard says it once:\n{log}");
        assert!(!log.contains("s3cret"));
    }
    for redis in &redis {
        assert!(!redis.command("INFO keyspace").unwrap().contains("db3:"));
    }
}

#[test]
fn files_that_cannot_be_used_end_the_start_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    redis::certify(folder.path());
    let blade = Blade::prepare(&[
        ("redis.instances", "[\"rediss://127.0.0.1:7000\"]"),
        ("redis.ca_file", "\"missing.pem\""),
    ]);
    for command in ["check-config", "serve"] {
        let output = blade.nitro(&[command], "");
        assert!(!output.status.success());
        let sentence = String::from_utf8_lossy(&output.stderr);
        assert!(
            sentence.contains("redis.ca_file: missing.pem"),
            "{sentence}"
        );
    }
}

// ---- messages ----------------------------------------------------------------------------------------------------

fn message(to: &str, text: &str) -> String {
    format!("<message type='chat' to='{to}@{DOMAIN}'><body>{text}</body></message>")
}

#[test]
fn a_message_that_waits_is_found_by_the_next_log_in_after_any_kill() {
    let mut house = House::new(2, &[]);
    for n in 0..4 {
        house.blade.add_user(&format!("u{n}"), PASSWORD);
    }
    house.settle();
    for (round, settled) in [true, false, true].into_iter().enumerate() {
        let mut alice = Client::online(&house.blade, "u0", "a");
        alice.enable_resumption();
        for n in 1..4 {
            alice.send(&message(&format!("u{n}"), &round.to_string()));
        }
        assert_eq!(alice.ask_h(), 3);
        if settled {
            // SQL has them, the journal does not need to any more
            house.settle();
        }
        house.blade.kill();
        house.blade.restart();
        house.wait_in_use();
        for n in 1..4 {
            let mut client = Client::bind(&house.blade, &format!("u{n}"), "r");
            client.send("<presence/>");
            assert_eq!(client.next_body(), round.to_string());
            client.settle();
        }
        house.settle();
    }
    // who has nothing waiting is read from the ring alone
    house.blade.kill();
    house.blade.restart();
    house.wait_in_use();
    for n in 1..4 {
        Client::bind(&house.blade, &format!("u{n}"), "r");
    }
    assert_eq!(house.sum("nitro_sql_loads_total"), 0);
}

#[test]
fn without_its_database_a_blade_starts_and_serves_what_redis_and_the_journal_hold() {
    const USERS: usize = 20;
    let Some(mut mariadb) = Mariadb::start() else {
        eprintln!("SKIPPED: MariaDB is not installed, a start with Redis alone is not tested");
        return;
    };
    let mut house = House::new(2, &[("database", &format!("\"{}\"", mariadb.url()))]);
    house.import("u", USERS, 3);
    house.import("late", 1, 0);
    house.settle();
    mariadb.kill();
    // again and again, without a look at the database
    for round in 0..2 {
        let mut alice = Client::online(&house.blade, "u0", "a");
        alice.enable_resumption();
        alice.send(&message("late0", &round.to_string()));
        let item = format!(
            "<iq type='set' id='{{id}}'><query xmlns='jabber:iq:roster'><item jid='round{round}@{DOMAIN}'/></query></iq>"
        );
        let result = alice.connection.request(&item).unwrap();
        assert_eq!(result.attribute("type"), Some("result"), "{result}");
        assert_eq!(alice.ask_h(), 2);
        house.blade.kill();
        house.blade.restart();
        house.wait_in_use();
        log_in_all(&house.blade, "u", USERS);
        let mut alice = Client::bind(&house.blade, "u0", "b");
        let roster = "<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>";
        let roster = alice.connection.request(roster).unwrap().to_string();
        for contact in ["u3@", &format!("round{round}@")] {
            assert!(roster.contains(contact), "{contact}: {roster}");
        }
    }
    mariadb.restart();
    wait_until("the database is there", WITHIN, || {
        can_log_in(&house.blade, "late0", PASSWORD)
    });
    let mut late = Client::online(&house.blade, "late0", "r");
    assert_eq!([late.next_body(), late.next_body()], ["0", "1"]);
    wait_until("the database has the journal", WITHIN, || {
        house.sum("nitro_journal_backlog_bytes") == 0
    });
}

#[test]
fn nobody_on_line_feels_what_happens_to_instances() {
    const PAIRS: usize = 6;
    let mut house = House::new(4, &[]);
    house.import("u", 2 * PAIRS, 0);
    house.import("other", 60, 0);
    house.settle();
    let stop = AtomicBool::new(false);
    let blade = house.blade.c2s;
    let mut pairs: Vec<(Client, Client)> = (0..PAIRS)
        .map(|n| {
            (
                Client::online(&house.blade, &format!("u{}", 2 * n), "a"),
                Client::online(&house.blade, &format!("u{}", 2 * n + 1), "b"),
            )
        })
        .collect();
    let sent = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (one, other) in &mut pairs {
            let (stop, sent) = (&stop, &sent);
            scope.spawn(move || {
                let to = other.jid.split('@').next().unwrap().to_owned();
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    one.send(&message(&to, &number.to_string()));
                    // in order, each once
                    assert_eq!(other.next_body(), number.to_string());
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut next = 0;
        let mut log_in_some = || {
            for _ in 0..5 {
                let name = format!("other{next}");
                authenticated(blade, &name, PASSWORD).expect("a log-in");
                next += 1;
            }
        };
        for redis in 0..2 {
            house.redis[redis].kill();
            log_in_some();
            house.redis[redis].restart();
            house.redis[redis].stop();
            log_in_some();
            house.redis[redis].go_on();
            house.redis[redis].command("FLUSHALL");
            log_in_some();
            house.redis[redis].command("CONFIG SET maxmemory 1");
            log_in_some();
            house.redis[redis].command("CONFIG SET maxmemory 0");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(sent.load(Ordering::Relaxed) > 100);
    house.wait_in_use();
    house.settle();
    let log = house.blade.log();
    let told = log
        .lines()
        .filter(|line| line.contains("Redis instance"))
        .count();
    assert!(told < 100, "{log}");
}

// ---- sessions and addresses --------------------------------------------------------------------------------------

/// Where a user is logged in, as the instances have it: `blade:shard:resource`.
fn sessions(house: &House, name: &str) -> Vec<String> {
    let mut all: Vec<String> = house
        .redis
        .iter()
        .filter_map(|redis| redis.command(&format!("HKEYS nitro:s:{name}")))
        .flat_map(|answer| {
            let lines = answer.lines().map(str::to_owned);
            lines.filter(|line| line.contains(':')).collect::<Vec<_>>()
        })
        .collect();
    all.sort();
    all
}

fn time_to_live_ms(house: &House, name: &str) -> i64 {
    let of = |redis: &Redis| -> Option<i64> {
        let answer = redis.command(&format!("PTTL nitro:s:{name}"))?;
        answer.trim().strip_prefix(':')?.parse().ok()
    };
    house.redis.iter().filter_map(of).max().unwrap_or(-2)
}

#[test]
fn the_ring_knows_who_is_logged_in_where() {
    let settings = [
        ("redis.blade", "\"east\""),
        ("redis.sessions_ttl_seconds", "15"),
    ];
    let mut house = House::new(2, &settings);
    for name in ["alice", "bob"] {
        house.blade.add_user(name, PASSWORD);
    }
    let one = Client::online(&house.blade, "alice", "one");
    let two = Client::bind(&house.blade, "alice", "two");
    wait_until("both are there", WITHIN, || {
        sessions(&house, "alice").len() == 2
    });
    let all = sessions(&house, "alice");
    let (east, resource) = all[0].split_once(':').unwrap();
    assert_eq!(east, "east");
    assert!(
        resource.ends_with(":one") && all[1].ends_with(":two"),
        "{all:?}"
    );
    drop(two);
    wait_until("one is left", WITHIN, || {
        sessions(&house, "alice").len() == 1
    });
    // renewed, also on an instance that has forgotten
    house.each(|redis| {
        redis.command("FLUSHALL");
    });
    wait_until("it is there again", WITHIN, || {
        sessions(&house, "alice") == all[..1]
    });
    let seen = time_to_live_ms(&house, "alice");
    assert!((1..=15_000).contains(&seen), "{seen}");
    drop(one);
    wait_until("nobody is left", WITHIN, || {
        sessions(&house, "alice").is_empty()
    });
    // who is killed is believed in until his time is over, and is not renewed
    let _there = Client::bind(&house.blade, "bob", "r");
    wait_until("he is there", WITHIN, || sessions(&house, "bob").len() == 1);
    house.blade.kill();
    assert!(time_to_live_ms(&house, "bob") <= 15_000);
}

#[test]
fn an_instance_is_found_by_the_name_of_its_host_and_asks_for_a_password() {
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        free.local_addr().unwrap().port().to_string()
    };
    let options = ["--port", &port, "--bind", "127.0.0.1"];
    let redis = Redis::start_with(&options).expect(NO_REDIS);
    redis.command("ACL SETUSER nitro on >secret ~nitro:* +get +getrange +set +eval +evalsha +pexpire +hset +hdel +hgetall +info +select");
    let url = format!("[\"redis://nitro:secret@localhost:{port}/0\"]");
    let blade = client::blade(&[("redis.instances", &url)]);
    wait_until("the instance is in use", WITHIN, || {
        let states = figures(&blade, "nitro_redis_state");
        !states.is_empty() && states.iter().all(|state| *state == 1)
    });
    blade.add_user("alice", PASSWORD);
    wait_until("its copy is written", WITHIN, || {
        figures(&blade, "nitro_redis_stored_total")
            .iter()
            .sum::<u64>()
            == 1
    });
}

#[test]
fn a_wrong_address_is_a_sentence_and_nothing_starts() {
    for (urls, says) in [
        ("[\"rediss://host:6379#insecure\"]", "always verified"),
        ("[\"redis://a\", \"redis://a\"]", "the name a:6379#0"),
    ] {
        let blade = Blade::prepare(&[("redis.instances", urls)]);
        for command in ["serve", "check-config"] {
            let output = blade.nitro(&[command], "");
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && error.contains(says), "{error}");
            assert!(error.contains("redis.instances"), "{error}");
        }
    }
}
