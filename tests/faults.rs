//! Faults of disk and database under load: nobody is disconnected, nothing that was accepted is lost, nothing is said or
//! delivered before it is durable, and afterwards everything is where it belongs.
//!
//! ```console
//! $ cargo test --test faults
//! $ NITRO_LONG=1 cargo test --test faults          # a database that hangs does so for a minute
//! ```
//!
//! Real servers, a real MariaDB; a disk that is slow or fails is a library before libc's `fdatasync` ([`shim`]), one that
//! is full a small tmpfs in a namespace of its own ([`room`]), a locked database another process ([`lock`]). What a machine
//! does not have (MariaDB, a C compiler, namespaces, Python) is skipped, and said aloud.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;
#[path = "faults/lock.rs"]
mod lock;
#[path = "servers/mariadb.rs"]
mod mariadb;
#[path = "faults/room.rs"]
mod room;
#[path = "faults/shim.rs"]
mod shim;
#[path = "faults/traffic.rs"]
mod traffic;

use std::time::{Duration, Instant};

use blade::{Blade, DOMAIN};
use client::{Client, PASSWORD, PLAIN, authenticated, body, wait_until};
use lock::Lock;
use mariadb::Mariadb;
use room::Room;
use shim::{DELAY_MS, Shim};
use traffic::{Load, Said, Talker, WITHIN, aloud, collect};

/// Pairs of clients that talk while a fault lasts.
const PAIRS: usize = 4;

fn skipped(missing: &str) {
    aloud(&format!("SKIPPED: {missing}"));
}

/// How long a database hangs.
fn hang() -> Duration {
    match std::env::var_os("NITRO_LONG").is_some() {
        true => Duration::from_secs(60),
        false => Duration::from_secs(10),
    }
}

/// How long nobody listens where it was.
fn refusal() -> Duration {
    match std::env::var_os("NITRO_LONG").is_some() {
        true => Duration::from_secs(120),
        false => Duration::from_secs(4),
    }
}

/// A blade that is not started; log-ins that fail for want of the database are not held back, and offline queues are long.
fn prepared(settings: &[(&str, &str)]) -> Blade {
    let always = [
        ("limits.auth_failure_delay_ms", "0"),
        ("limits.offline_messages_max", "1000000"),
        ("limits.offline_bytes_max", "1073741824"),
    ];
    Blade::prepare(&[&PLAIN[..], &always, settings].concat())
}

fn register(blade: &Blade, names: &[&str]) {
    for name in names {
        Client::register(blade, name);
    }
}

fn register_pairs(blade: &Blade) {
    for pair in 0..PAIRS {
        register(blade, &[&format!("w{pair}"), &format!("v{pair}")]);
    }
}

/// A figure of `/metrics`, all shards together.
fn metric(blade: &Blade, name: &str) -> Option<u64> {
    let (_, text) = blade.http_get("/metrics")?;
    let values = text.lines().filter_map(|line| {
        let (key, value) = line.rsplit_once(' ')?;
        let key = key.split('{').next()?;
        let key = key.strip_suffix("_total").unwrap_or(key);
        (key == name && !line.starts_with('#')).then(|| value.parse::<u64>().ok())?
    });
    values.reduce(|a, b| a + b)
}

/// Until the database has all that the journals hold.
fn wait_until_drained(blade: &Blade, within: Duration) {
    wait_until("all journals are drained", within, || {
        let drained = metric(blade, "nitro_sql_drained");
        let records = metric(blade, "nitro_journal_records");
        metric(blade, "nitro_journal_backlog_bytes") == Some(0) && drained >= records
    });
}

/// As in `nitro_journal_status`: figures are published a few times a second.
fn wait_until_status(blade: &Blade, status: u64) {
    wait_until("the journal's status", WITHIN, || {
        metric(blade, "nitro_journal_status") == Some(status)
    });
}

/// Until the database has what was journalled up to now, though more comes all the time.
fn wait_until_caught_up(blade: &Blade) {
    let records = metric(blade, "nitro_journal_records");
    wait_until("the drain catches up", WITHIN, || {
        metric(blade, "nitro_sql_drained") >= records
    });
}

fn letters(round: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{round} {n}")).collect()
}

/// What must go on while the database is away, until `enough`: a cached user logs in, sessions read what they have, and
/// messages to somebody who cannot be loaded are accepted; one who is not cached is told to come again. How many messages
/// there were.
fn meanwhile(
    blade: &Blade,
    writer: &mut Talker,
    round: &str,
    strangers: bool,
    enough: impl Fn() -> bool,
) -> usize {
    let mut count = 0;
    let (mut login_max, mut accepted_max) = (Duration::ZERO, Duration::ZERO);
    loop {
        let begun = Instant::now();
        let known = Client::online(blade, "known", "r");
        login_max = login_max.max(begun.elapsed());
        drop(known);
        if strangers {
            let refused = authenticated(blade.c2s, &format!("cold-{round}"), PASSWORD).err();
            assert_eq!(refused.as_deref(), Some("temporary-auth-failure"));
        }
        for _ in 0..20 {
            let begun = Instant::now();
            let text = format!("{round} {count}");
            let said = writer.say(&format!("away-{round}"), &text);
            assert_eq!(said, Said::Accepted, "{text}");
            assert_eq!(writer.say("late", &text), Said::Accepted, "{text}");
            accepted_max = accepted_max.max(begun.elapsed());
            count += 1;
        }
        let roster = writer.ask("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>");
        assert_eq!(roster.attribute("type"), Some("result"), "{roster}");
        if enough() {
            aloud(&format!(
                "{round}: {count} messages to each of two; log-in of a cached user at most {login_max:?}, two messages accepted in \
                 at most {accepted_max:?}"
            ));
            return count;
        }
    }
}

/// Until this much time has passed.
fn for_some_time(time: Duration) -> impl Fn() -> bool {
    let until = Instant::now() + time;
    move || Instant::now() >= until
}

/// Nothing but the load for a while: what it is measured against.
fn quiet() {
    std::thread::sleep(Duration::from_secs(2)); // how long is measured; nothing is waited for
}

#[test]
fn a_mariadb_that_hangs_dies_and_is_absent_loses_and_disconnects_nobody() {
    const ROUNDS: [&str; 4] = ["hangs", "dies", "restarts", "absent"];
    let Some(mut mariadb) = Mariadb::start() else {
        return skipped("MariaDB is not installed: its faults are not tested");
    };
    let mut blade = prepared(&[("database", &format!("\"{}\"", mariadb.url()))]);
    // made while no server runs: no journal knows them
    for round in ROUNDS {
        for kind in ["cold", "away"] {
            blade.add_user(&format!("{kind}-{round}"), PASSWORD);
        }
    }
    blade.restart();
    register_pairs(&blade);
    register(&blade, &["known", "writer", "late"]);
    // from now on nobody is cached who has not logged in
    blade.terminate();
    blade.restart();

    let mut writer = Talker::online(&blade, "writer");
    drop(Client::online(&blade, "known", "r"));
    let mut load = Load::start(&blade, PAIRS, "quiet");
    quiet();

    load.phase("MariaDB hangs");
    mariadb.stop();
    let mut late = letters(
        "hangs",
        meanwhile(&blade, &mut writer, "hangs", true, for_some_time(hang())),
    );
    let expected = late.clone();
    load.phase("drain catches up");
    mariadb.go_on();
    assert_eq!(collect(&blade, "away-hangs", expected.len()), expected);
    collect(&blade, "cold-hangs", 0);
    wait_until_caught_up(&blade);

    load.phase("MariaDB is killed");
    mariadb.kill();
    let enough = for_some_time(refusal());
    let count = meanwhile(&blade, &mut writer, "dies", true, enough);
    load.phase("drain catches up (2)");
    mariadb.restart();
    let expected = letters("dies", count);
    late.extend(expected.clone());
    assert_eq!(collect(&blade, "away-dies", count), expected);
    collect(&blade, "cold-dies", 0);
    wait_until_caught_up(&blade);

    load.phase("MariaDB restarts");
    mariadb.shut_down();
    let enough = for_some_time(Duration::ZERO);
    let count = meanwhile(&blade, &mut writer, "restarts", true, enough);
    mariadb.restart();
    let expected = letters("restarts", count);
    late.extend(expected.clone());
    assert_eq!(collect(&blade, "away-restarts", count), expected);
    load.phase("quiet again");
    quiet();
    load.end("MariaDB");
    wait_until_drained(&blade, WITHIN);

    // nitro dies, too, and is back first
    register(&blade, &["newborn"]);
    mariadb.kill();
    assert_eq!(writer.say("newborn", "welcome"), Said::Accepted);
    let enough = for_some_time(Duration::ZERO);
    let count = meanwhile(&blade, &mut writer, "absent", true, enough);
    let expected = letters("absent", count);
    late.extend(expected.clone());
    drop(writer);
    blade.kill();
    let begun = Instant::now();
    blade.restart();
    aloud(&format!("a start without MariaDB: {:?}", begun.elapsed()));
    let refused = authenticated(blade.c2s, "cold-absent", PASSWORD).err();
    assert_eq!(refused.as_deref(), Some("temporary-auth-failure"));
    // all about him is in the journal
    assert_eq!(collect(&blade, "newborn", 1), ["welcome"]);
    mariadb.restart();
    assert_eq!(collect(&blade, "away-absent", count), expected);
    wait_until_drained(&blade, WITHIN);

    mariadb.stop();
    blade.kill();
    let begun = Instant::now();
    blade.restart();
    aloud(&format!(
        "a start while MariaDB hangs: {:?}",
        begun.elapsed()
    ));
    mariadb.go_on();
    collect(&blade, "cold-absent", 0);
    wait_until_drained(&blade, WITHIN);

    // what was drained is read from the database
    blade.terminate();
    blade.restart();
    assert_eq!(collect(&blade, "late", late.len()), late);
}

#[test]
fn nothing_is_acknowledged_delivered_or_answered_before_the_sync_has_ended() {
    let mut blade = prepared(&[]);
    let Some(shim) = Shim::load_into(&mut blade) else {
        return skipped("no C compiler (cc): slow syncs are not tested");
    };
    blade.restart();
    register(&blade, &["juliet", "romeo"]);
    let mut juliet = Talker::online(&blade, "juliet");
    let mut romeo = Talker::online(&blade, "romeo");
    assert_eq!(juliet.say("romeo", "first"), Said::Accepted);
    while romeo.hear(WITHIN).and_then(|e| body(&e)).as_deref() != Some("first") {}
    wait_until_drained(&blade, WITHIN);

    shim.slow_down();
    let delay = Duration::from_millis(DELAY_MS);
    for number in 0..3 {
        let begun = Instant::now();
        juliet.send(&format!("romeo@{DOMAIN}"), &format!("{number}"));
        let (mut received, mut counted) = (None, None);
        while received.is_none() || counted.is_none() {
            assert!(begun.elapsed() < WITHIN, "{received:?} {counted:?}");
            let heard = romeo.hear(Duration::from_millis(2));
            if heard.is_some_and(|e| e.name == "message") {
                received.get_or_insert(begun.elapsed());
            }
            juliet.hear(Duration::from_millis(2));
            if juliet.all_is_covered() {
                counted.get_or_insert(begun.elapsed());
            }
        }
        let (received, counted) = (received.unwrap(), counted.unwrap());
        assert!(
            received >= delay && counted >= delay,
            "message {number}: received after {received:?}, acknowledged after {counted:?}"
        );
        aloud(&format!(
            "sync + {delay:?}: received after {received:?}, acknowledged after {counted:?}"
        ));
    }
    let begun = Instant::now();
    let result = juliet.ask(
        "<iq type='set' id='{id}'><query xmlns='jabber:iq:roster'><item jid='nurse@example.org'/></query></iq>",
    );
    assert_eq!(result.attribute("type"), Some("result"), "{result}");
    assert!(
        begun.elapsed() >= delay,
        "a change was answered after {:?}",
        begun.elapsed()
    );
    shim.heal();
    assert_eq!(juliet.say("romeo", "last"), Said::Accepted);
}

#[test]
fn a_sync_that_fails_ends_the_process_with_a_sentence_and_costs_nothing_acknowledged() {
    let mut blade = prepared(&[]);
    let Some(shim) = Shim::load_into(&mut blade) else {
        return skipped("no C compiler (cc): failing syncs are not tested");
    };
    blade.restart();
    register(&blade, &["juliet", "romeo"]);
    let mut juliet = Talker::online(&blade, "juliet");
    let mut said = Vec::new();
    for number in 0..50 {
        let text = format!("{number}");
        assert_eq!(juliet.say("romeo", &text), Said::Accepted);
        said.push(text);
    }
    // in the middle of many
    const MANY: u32 = 200;
    for number in 0..MANY {
        if number == MANY / 2 {
            juliet.wait_for_counts(MANY / 4);
            shim.fail();
        }
        let text = format!("{}", 50 + number);
        juliet.send(&format!("romeo@{DOMAIN}"), &text);
        said.push(text);
    }
    let status = blade.wait(WITHIN);
    assert!(!status.success(), "{status}");
    let log = blade.log();
    assert!(
        log.contains("journal") && log.contains("Input/output error"),
        "no sentence in the log:\n{log}"
    );
    let acknowledged = 50 + juliet.last_words(MANY);
    shim.heal();
    blade.restart();
    let received = collect(&blade, "romeo", acknowledged);
    aloud(&format!(
        "a sync failed: {} sent, {acknowledged} acknowledged, {} there after the restart",
        said.len(),
        received.len()
    ));
    // more may have reached the disk
    assert!(received.len() >= acknowledged);
    assert_eq!(received, said[..received.len()]);
}

#[test]
fn a_locked_sqlite_file_holds_nobody_up_and_other_cores_find_what_it_did_not_take() {
    let mut blade = prepared(&[("cores", "\"0-1\"")]);
    blade.restart();
    register_pairs(&blade);
    register(
        &blade,
        &[
            "known",
            "writer",
            "late",
            "away-lock",
            "away-cores",
            "away-back",
        ],
    );
    blade.terminate();
    blade.restart();
    let mut writer = Talker::online(&blade, "writer");
    drop(Client::online(&blade, "known", "r"));
    let database = blade.data_dir().join("nitro.db");
    let mut load = Load::start(&blade, PAIRS, "quiet");
    quiet();
    load.phase("SQLite is locked");
    let Some(lock) = Lock::take(&database) else {
        return skipped("no python3 with sqlite3: locks are not tested");
    };
    let count = meanwhile(
        &blade,
        &mut writer,
        "lock",
        false,
        for_some_time(Duration::from_secs(10)),
    );
    let expected = letters("lock", count);
    let mut late = expected.clone();
    load.phase("drain catches up");
    drop(lock);
    assert_eq!(collect(&blade, "away-lock", count), expected);
    wait_until_caught_up(&blade);
    load.phase("quiet again");
    quiet();
    load.end("SQLite");
    wait_until_drained(&blade, WITHIN);

    // what is in no database yet is found by every number of cores
    for (round, cores) in [("cores", "0"), ("back", "0-1")] {
        let lock = Lock::take(&database).expect("as before");
        let count = meanwhile(
            &blade,
            &mut writer,
            round,
            false,
            for_some_time(Duration::ZERO),
        );
        let expected = letters(round, count);
        late.extend(expected.clone());
        drop(writer);
        blade.kill();
        blade.set("cores", &format!("\"{cores}\""));
        blade.restart();
        assert_eq!(collect(&blade, &format!("away-{round}"), count), expected);
        drop(lock);
        wait_until_drained(&blade, WITHIN);
        writer = Talker::online(&blade, "writer");
        drop(Client::online(&blade, "known", "r"));
    }

    // a command on the stopped server first takes over what the journals hold
    let lock = Lock::take(&database).expect("as before");
    let result = writer.ask(
        "<iq type='set' id='{id}'><query xmlns='jabber:iq:register'><username>writer</username>\
         <password>from-the-journal</password></query></iq>",
    );
    assert_eq!(result.attribute("type"), Some("result"), "{result}");
    assert_eq!(writer.say("late", "the last"), Said::Accepted);
    late.push("the last".into());
    drop(writer);
    blade.kill();
    drop(lock);
    let output = blade.nitro(
        &[
            "user",
            "passwd",
            &format!("known@{DOMAIN}"),
            "--password-stdin",
        ],
        "by-command\n",
    );
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let output = blade.nitro(
        &[
            "user",
            "passwd",
            &format!("writer@{DOMAIN}"),
            "--password-stdin",
        ],
        "by-command\n",
    );
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    blade.restart();
    for name in ["known", "writer"] {
        for old in [PASSWORD, "from-the-journal"] {
            assert!(
                authenticated(blade.c2s, name, old).is_err(),
                "{name}: {old}"
            );
        }
        assert!(
            authenticated(blade.c2s, name, "by-command").is_ok(),
            "{name}"
        );
    }
    assert_eq!(collect(&blade, "late", late.len()), late);
}

/// Messages that fill a journal.
fn large() -> String {
    "x".repeat(60_000)
}

/// Says large things until one is refused, as a full journal refuses.
fn say_until_refused(writer: &mut Talker, to: &str, within: Duration) -> usize {
    let deadline = Instant::now() + within;
    for said in 0.. {
        assert!(
            Instant::now() < deadline,
            "nothing refused within {within:?}"
        );
        match writer.say(to, &format!("{said} {}", large())) {
            Said::Accepted => {}
            Said::Refused(condition, kind) => {
                assert_eq!((&*condition, &*kind), ("resource-constraint", "wait"));
                return said;
            }
        }
    }
    unreachable!("it counts until it returns")
}

/// Of large messages, as they came and as they were sent.
fn numbers(bodies: &[String]) -> Vec<String> {
    let number = |body: &String| body.split(' ').next().unwrap_or_default().to_owned();
    bodies.iter().map(number).collect()
}

fn expected(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

/// While the journal is full: who is in stays and reads, who comes gets in.
fn a_full_journal_lets_in_and_answers(blade: &Blade, writer: &mut Talker) {
    drop(Client::online(blade, "known", "r"));
    let roster = writer.ask("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>");
    assert_eq!(roster.attribute("type"), Some("result"), "{roster}");
    let change = writer.ask(
        "<iq type='set' id='{id}'><query xmlns='jabber:iq:roster'><item jid='nurse@example.org'/></query></iq>",
    );
    let condition = change
        .child("error")
        .and_then(|e| e.children.first())
        .map(|e| e.name.clone());
    assert_eq!(
        condition.as_deref(),
        Some("resource-constraint"),
        "{change}"
    );
}

fn wait_until_it_accepts(writer: &mut Talker, to: &str, within: Duration) {
    wait_until("messages are accepted again", within, || {
        writer.say(to, "again") == Said::Accepted
    });
}

#[test]
fn a_journal_at_its_bound_refuses_messages_lets_in_and_goes_on_when_the_database_does() {
    let Some(mariadb) = Mariadb::start() else {
        return skipped("MariaDB is not installed: the bound of the backlog is not tested");
    };
    let mut blade = prepared(&[
        ("database", &format!("\"{}\"", mariadb.url())),
        ("journal.backlog_bytes_max", "67108864"),
        ("cores", "\"0\""),
    ]);
    blade.restart();
    register(&blade, &["known", "writer", "romeo"]);
    let mut writer = Talker::online(&blade, "writer");
    drop(Client::online(&blade, "known", "r"));
    drop(Client::online(&blade, "romeo", "r"));
    wait_until_drained(&blade, WITHIN);
    mariadb.stop();
    let begun = Instant::now();
    let accepted = say_until_refused(&mut writer, "romeo", Duration::from_secs(60));
    aloud(&format!(
        "64 MiB of backlog: {accepted} messages of 60 kB accepted in {:?}",
        begun.elapsed()
    ));
    wait_until_status(&blade, 1);
    let log = blade.log();
    assert!(
        log.contains("new messages are refused until it has caught up"),
        "{log}"
    );
    a_full_journal_lets_in_and_answers(&blade, &mut writer);
    mariadb.go_on();
    wait_until_it_accepts(&mut writer, "romeo", Duration::from_secs(60));
    wait_until_drained(&blade, Duration::from_secs(60));
    let received = collect(&blade, "romeo", accepted + 1);
    assert_eq!(numbers(&received[..accepted]), expected(accepted));
    assert_eq!(received[accepted..], ["again"]);
}

#[test]
fn a_full_disk_under_the_journal_refuses_messages_and_goes_on_when_there_is_room() {
    let mut blade = prepared(&[("cores", "\"0\""), ("journal.segment_bytes", "1048576")]);
    let Some(room) = Room::for_blade(&mut blade, 16 << 20) else {
        return skipped("no user and mount namespaces: full disks are not tested");
    };
    blade.set(
        "journal.dir",
        &format!("\"{}\"", room.path().join("journal").display()),
    );
    blade.restart();
    register(&blade, &["known", "writer", "romeo"]);
    let mut writer = Talker::online(&blade, "writer");
    drop(Client::online(&blade, "known", "r"));
    drop(Client::online(&blade, "romeo", "r"));
    wait_until_drained(&blade, WITHIN);
    // else what is written is soon taken over, and there is room again
    let Some(lock) = Lock::take(&blade.data_dir().join("nitro.db")) else {
        return skipped("no python3 with sqlite3: full disks are not tested");
    };
    room.fill();
    let accepted = say_until_refused(&mut writer, "romeo", Duration::from_secs(60));
    assert!(accepted > 0, "what is preallocated can be used");
    wait_until_status(&blade, 2);
    a_full_journal_lets_in_and_answers(&blade, &mut writer);
    // what was accepted is on the disk, and is found and delivered however full that is
    drop(writer);
    blade.kill();
    blade.restart();
    wait_until_status(&blade, 2);
    assert_eq!(
        numbers(&collect(&blade, "romeo", accepted)),
        expected(accepted)
    );
    drop(lock);
    room.empty();
    wait_until_status(&blade, 0);

    let mut writer = Talker::online(&blade, "writer");
    drop(Client::online(&blade, "known", "r"));
    wait_until_drained(&blade, WITHIN);
    let lock = Lock::take(&blade.data_dir().join("nitro.db")).expect("as before");
    room.fill();
    let accepted = say_until_refused(&mut writer, "romeo", Duration::from_secs(60));
    room.empty();
    wait_until_it_accepts(&mut writer, "romeo", WITHIN);
    drop(lock);
    wait_until_drained(&blade, WITHIN);
    assert_eq!(collect(&blade, "romeo", accepted + 1).len(), accepted + 1);
}

#[test]
fn a_full_disk_under_the_database_is_felt_by_nobody_and_is_caught_up_with() {
    let mut blade = prepared(&[]);
    let Some(room) = Room::for_blade(&mut blade, 24 << 20) else {
        return skipped("no user and mount namespaces: full disks are not tested");
    };
    blade.set(
        "database",
        &format!("\"sqlite:{}\"", room.path().join("nitro.db").display()),
    );
    blade.restart();
    register_pairs(&blade);
    register(
        &blade,
        &["known", "writer", "late", "away-disk", "away-start"],
    );
    blade.terminate();
    blade.restart();
    let mut writer = Talker::online(&blade, "writer");
    drop(Client::online(&blade, "known", "r"));
    wait_until_drained(&blade, WITHIN);
    let mut load = Load::start(&blade, PAIRS, "quiet");
    quiet();
    load.phase("disk of SQLite is full");
    room.fill();
    let retries = metric(&blade, "nitro_sql_retries");
    let until = for_some_time(Duration::from_secs(3));
    let count = meanwhile(&blade, &mut writer, "disk", false, || {
        until() && metric(&blade, "nitro_sql_retries") > retries
    });
    let log = blade.log();
    assert!(log.contains("is full"), "{log}");
    load.phase("drain catches up");
    room.empty();
    let expected = letters("disk", count);
    assert_eq!(collect(&blade, "away-disk", count), expected);
    wait_until_caught_up(&blade);
    load.end("full disk of SQLite");
    wait_until_drained(&blade, WITHIN);
    assert_eq!(metric(&blade, "nitro_sql_quarantined"), Some(0));

    // nor by a start
    room.fill();
    let enough = for_some_time(Duration::from_secs(1));
    let more = meanwhile(&blade, &mut writer, "start", false, enough);
    drop(writer);
    blade.kill();
    blade.restart();
    assert_eq!(collect(&blade, "away-start", more), letters("start", more));
    room.empty();
    wait_until_drained(&blade, WITHIN);
    blade.terminate();
    blade.restart();
    let late = [expected, letters("start", more)].concat();
    assert_eq!(collect(&blade, "late", late.len()), late);
}
