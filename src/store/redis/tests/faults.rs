//! Each fault alone, with what the operator sees and what the next reader gets.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use redis::Value;

use super::super::{Config, Event, Keep, Later, Session, State, Wants};
use super::driver::{Driver, config, hasty};
use super::server::Server;

// ---- what a test says

fn one(server: &Server, folder: &Path) -> Driver {
    with(config(), server, folder)
}

fn with(config: Config, server: &Server, folder: &Path) -> Driver {
    let mut driver = Driver::new(config, folder, [&*server.address()]);
    driver.until("the instance is used", usable);
    driver
}

/// The first instance is connected and its generation is known.
fn usable(driver: &mut Driver) -> bool {
    driver.turn(Duration::ZERO);
    load(driver, "nobody")
        == Event::Missed {
            name: "nobody".into(),
        }
}

fn load(driver: &mut Driver, name: &str) -> Event {
    let now_us = driver.now_us();
    driver.tier.load(name, now_us);
    driver.event()
}

fn try_store(driver: &mut Driver, name: &str, revision: u64, value: &str) -> Result<(), Later> {
    let now_us = driver.now_us();
    let value = value.as_bytes();
    driver.tier.store(name, revision, value, Keep::Long, now_us)
}

/// Until it is accepted and answered: was it stored?
fn store(driver: &mut Driver, name: &str, revision: u64, value: &str) -> bool {
    driver.until("a store is accepted", |driver| {
        try_store(driver, name, revision, value).is_ok()
    });
    match driver.event() {
        Event::Stored {
            name: of,
            revision: at,
        } => {
            assert_eq!((&*of, at), (name, revision));
            true
        }
        Event::StoreMissed {
            name: of,
            revision: at,
            instance: 0,
        } => {
            assert_eq!((&*of, at), (name, revision));
            false
        }
        other => panic!("{other:?}"),
    }
}

fn loaded(name: &str, revision: u64, value: &str) -> Event {
    Event::Loaded {
        name: name.into(),
        revision,
        value: value.into(),
    }
}

fn missed(name: &str) -> Event {
    Event::Missed { name: name.into() }
}

fn unavailable(name: &str) -> Event {
    Event::Unavailable { name: name.into() }
}

fn state(driver: &Driver) -> State {
    driver.tier.counters(0).state()
}

/// Does some key of the server hold this value of this user?
fn holds(server: &Server, name: &str, value: &str) -> bool {
    server
        .users()
        .iter()
        .any(|(key, held)| key.ends_with(&format!(":u:{name}")) && held[8..] == *value.as_bytes())
}

// ---- without faults

#[test]
fn what_was_stored_is_loaded_over_restarts_of_the_blade() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 7, "old"));
    assert!(store(&mut driver, "alice", 9, "new"));
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 9, "new"));
    drop(driver);
    let mut driver = one(&server, folder.path());
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 9, "new"));
    assert_eq!(driver.tier.counters(0).renewals.get(), 0);
}

#[test]
fn an_older_revision_never_replaces_a_newer_one() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    // Beyond what a double tells apart, and bytes that a locale would sort otherwise.
    let revisions = [
        0,
        1,
        255,
        256,
        1 << 31,
        1 << 32,
        (1 << 53) + 1,
        (1 << 53) + 2,
        (1 << 63) - 1,
        0xff7f_00ff_80ff_007f,
        u64::MAX,
    ];
    for pair in revisions.windows(2) {
        let name = format!("user{}", pair[0]);
        assert!(store(&mut driver, &name, pair[1], "newer"));
        assert!(store(&mut driver, &name, pair[0], "older"));
        assert_eq!(load(&mut driver, &name), loaded(&name, pair[1], "newer"));
        assert!(store(&mut driver, &name, pair[1], "the same"));
        assert_eq!(load(&mut driver, &name), loaded(&name, pair[1], "the same"));
    }
}

#[test]
fn those_who_ask_together_share_one_read() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "x"));
    let before = server.calls("get");
    for _ in 0..3 {
        let now_us = driver.now_us();
        driver.tier.load("alice", now_us);
    }
    for _ in 0..3 {
        assert_eq!(driver.event(), loaded("alice", 1, "x"));
    }
    assert_eq!(server.calls("get"), before + 1);
}

#[test]
fn thousands_of_loads_go_through_one_connection_and_what_is_too_much_is_said_at_once() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    let names: Vec<_> = (0..6000).map(|n| format!("user{n}")).collect();
    // a quarter of the room is for loads
    for names in names[..4000].chunks(2000) {
        for name in names {
            try_store(&mut driver, name, 5, name).unwrap();
        }
        for name in names {
            assert!(matches!(driver.event(), Event::Stored { name: of, .. } if *of == **name));
        }
    }
    let now_us = driver.now_us();
    names.iter().for_each(|name| driver.tier.load(name, now_us));
    let mut counts = [0; 3];
    for _ in &names {
        match driver.event() {
            Event::Loaded { name, value, .. } => {
                assert_eq!(name.as_bytes(), value);
                counts[0] += 1;
            }
            Event::Missed { .. } => counts[1] += 1,
            Event::Unavailable { .. } => counts[2] += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(counts, [4000, 96, 6000 - 4096]);
}

#[test]
fn short_lived_words_end_by_themselves_and_touched_ones_live_on() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let config = Config {
        missing_ttl_ms: 60,
        ..config()
    };
    let mut driver = with(config, &server, folder.path());
    for name in ["alice", "bob"] {
        let now_us = driver.now_us();
        driver.tier.offer(name, 0, b"nobody", Keep::Short, now_us);
    }
    let now_us = driver.now_us();
    driver.tier.touch("bob", now_us);
    driver.until("the word has ended", |driver| {
        load(driver, "alice") == missed("alice")
    });
    assert_eq!(load(&mut driver, "bob"), loaded("bob", 0, "nobody"));
}

#[test]
fn what_is_too_large_is_not_kept_but_holds_off_what_is_older() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let config = Config {
        value_bytes_max: 100,
        ..config()
    };
    let mut driver = with(config, &server, folder.path());
    assert!(store(&mut driver, "alice", 5, "small"));
    assert!(store(&mut driver, "alice", 6, &"large".repeat(50)));
    assert!(store(&mut driver, "alice", 5, "small"));
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn a_server_that_forgot_the_script_is_told_again() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    server.ask(&["SCRIPT", "FLUSH"]);
    for revision in [1, 2, 3] {
        try_store(&mut driver, "alice", revision, "x").unwrap();
    }
    for _ in 0..3 {
        assert!(matches!(driver.event(), Event::Stored { .. }));
    }
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 3, "x"));
    assert_eq!(driver.tier.counters(0).errors.get(), 0);
}

#[test]
fn sessions_are_found_until_they_log_out_or_are_not_renewed() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    let ask = |driver: &mut Driver, unix_ms| {
        let now_us = driver.now_us();
        driver.tier.sessions("alice", unix_ms, now_us);
        match driver.event() {
            Event::Sessions { name, sessions } if &*name == "alice" => sessions.unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let set = |driver: &mut Driver, resources: &[&str], unix_ms| {
        let now_us = driver.now_us();
        let resources = resources.iter().copied();
        driver
            .tier
            .sessions_set("alice", resources, unix_ms, now_us)
    };
    assert!(ask(&mut driver, 0).is_empty());
    assert!(set(&mut driver, &["desk", "a:b é"], 1000));
    assert_eq!(ask(&mut driver, 1000).len(), 2);
    let now_us = driver.now_us();
    assert!(driver.tier.sessions_remove("alice", "desk", now_us));
    let left = Session {
        blade: "blade".into(),
        shard: 1,
        resource: "a:b é".into(),
        until_ms: 91_000,
    };
    assert_eq!(ask(&mut driver, 1000), [left]);
    assert!(ask(&mut driver, 91_000).is_empty());
    assert!(set(&mut driver, &["a:b é"], 60_000));
    assert_eq!(ask(&mut driver, 91_000).len(), 1);
}

#[test]
fn a_database_number_a_password_and_a_narrow_acl_are_enough() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let rights =
        "~t:* +get +getrange +set +eval +evalsha +pexpire +hset +hdel +hgetall +info +select";
    let mut acl = vec!["ACL", "SETUSER", "nitro", "on", ">s&cret"];
    acl.extend(rights.split(' '));
    assert_eq!(server.ask(&acl), Value::Okay);
    let address = format!("{}?db=3&user=nitro&pass=s%26cret", server.address());
    let mut driver = Driver::new(config(), folder.path(), [&*address]);
    driver.until("the instance is used", usable);
    assert!(store(&mut driver, "alice", 1, "x"));
    let now_us = driver.now_us();
    driver.tier.touch("alice", now_us);
    driver.tier.sessions_set("alice", ["desk"], 1000, now_us);
    driver.tier.sessions_remove("alice", "desk", now_us);
    driver.tier.sessions("alice", 1000, now_us);
    assert!(matches!(
        driver.event(),
        Event::Sessions {
            sessions: Some(_),
            ..
        }
    ));
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 1, "x"));
    assert!(server.users().is_empty(), "database 0 was not asked for");
    assert_eq!(driver.tier.counters(0).errors.get(), 0);
}

// ---- faults

#[test]
fn a_killed_instance_is_unavailable_at_once_and_comes_back_empty() {
    let (mut server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "x"));
    server.kill();
    driver.until("the breaker opens", |driver| state(driver) == State::Open);
    assert_eq!(load(&mut driver, "alice"), unavailable("alice"));
    assert!(!store(&mut driver, "alice", 2, "y"));
    // The new generation holds nothing, so nothing more has to be renewed.
    for revision in 3..50 {
        assert!(!store(&mut driver, "alice", revision, "z"));
    }
    assert_eq!(driver.tier.counters(0).renewals.get(), 2);
    server.restart_empty();
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
    let now_us = driver.now_us();
    driver.tier.offer("alice", 49, b"z", Keep::Long, now_us);
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 49, "z"));
}

#[test]
fn an_old_dump_does_not_bring_back_an_old_password() {
    let (mut server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "old password"));
    assert_eq!(server.ask(&["SAVE"]), Value::Okay);
    assert!(store(&mut driver, "alice", 2, "new password"));
    server.kill();
    server.restart();
    assert!(holds(&server, "alice", "old password"));
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn an_old_dump_does_not_come_back_while_the_blade_is_down() {
    let (mut server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "old password"));
    assert_eq!(server.ask(&["SAVE"]), Value::Okay);
    assert!(store(&mut driver, "alice", 2, "new password"));
    drop(driver);
    server.kill();
    server.restart();
    let mut driver = one(&server, folder.path());
    assert!(holds(&server, "alice", "old password"));
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn a_hung_instance_that_goes_on_with_an_old_write_misleads_nobody() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = with(hasty(), &server, folder.path());
    assert!(store(&mut driver, "alice", 1, "first"));
    server.stop();
    assert!(!store(&mut driver, "alice", 2, "in its socket"));
    assert_eq!(state(&driver), State::Open);
    assert!(!store(&mut driver, "alice", 3, "after the deadline"));
    assert_eq!(load(&mut driver, "alice"), unavailable("alice"));
    server.go_on();
    driver.until("the old write is carried out", |_| {
        holds(&server, "alice", "in its socket")
    });
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn a_removed_user_does_not_come_back_with_a_hung_instance() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = with(hasty(), &server, folder.path());
    server.stop();
    try_store(&mut driver, "alice", 1, "here").unwrap();
    driver.turn(Duration::ZERO);
    // The blade ends without having heard, and starts again; the journal still has the change and then the removal.
    drop(driver);
    let mut driver = Driver::new(hasty(), folder.path(), [&*server.address()]);
    assert!(!store(&mut driver, "alice", 2, "removed"));
    server.go_on();
    driver.until("the old write is carried out", |_| {
        holds(&server, "alice", "here")
    });
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn what_a_dead_process_left_in_a_socket_is_refused() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    try_store(&mut driver, "alice", 1, "late").unwrap();
    // As if the network kept it.
    let late = driver.tier.outgoing(0).to_vec();
    drop(driver);
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 2, "new"));
    let answer_to_late = |say: &str| {
        for (key, _) in server.users() {
            server.ask(&["DEL", &key]); // as eviction does
        }
        assert_eq!(server.say(&late), Value::Int(-1), "{say}");
    };
    answer_to_late("while the fence is the new process's");
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
    server.ask(&["FLUSHALL"]);
    answer_to_late("while there is no fence");
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
    assert!(
        store(&mut driver, "alice", 3, "newer"),
        "the fence is set again"
    );
    answer_to_late("afterwards");
    assert_eq!(driver.tier.counters(0).errors.get(), 0);
}

#[test]
fn two_blades_of_one_name_are_found_out() {
    let (server, folders) = (
        Server::start(),
        [(); 2].map(|()| tempfile::tempdir().unwrap()),
    );
    let mut first = one(&server, folders[0].path());
    let mut second = one(&server, folders[1].path());
    assert!(store(&mut second, "alice", 1, "x"));
    let lines = log_of(|| assert!(!store(&mut first, "alice", 2, "y")));
    assert!(lines.contains("a name of its own"), "{lines}");
}

#[test]
fn an_offer_that_nobody_confirmed_is_a_missed_write() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = with(hasty(), &server, folder.path());
    assert!(store(&mut driver, "bob", 1, "x"));
    let renewals = driver.tier.counters(0).renewals.get();
    server.stop();
    let now_us = driver.now_us();
    driver.tier.offer("alice", 1, b"x", Keep::Long, now_us);
    driver.until("the breaker opens", |driver| state(driver) == State::Open);
    assert_eq!(driver.tier.counters(0).renewals.get(), renewals + 1);
    // What was not even sent cannot come late.
    let now_us = driver.now_us();
    driver.tier.offer("alice", 1, b"x", Keep::Long, now_us);
    assert_eq!(driver.tier.counters(0).renewals.get(), renewals + 1);
    server.go_on();
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn a_flushed_instance_misses_and_is_filled_again() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "x"));
    server.ask(&["FLUSHALL"]);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
    assert!(store(&mut driver, "alice", 2, "y"));
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 2, "y"));
    assert_eq!(driver.tier.counters(0).errors.get(), 0);
}

#[test]
fn an_instance_out_of_memory_is_not_read_although_it_answers_reads() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "old"));
    server.ask(&["CONFIG", "SET", "maxmemory", "1"]);
    assert!(!store(&mut driver, "alice", 2, "new"));
    assert!(holds(&server, "alice", "old"));
    assert_eq!(load(&mut driver, "alice"), unavailable("alice"));
    // It goes on trying, and the probe fails, since it is a write.
    let errors = driver.tier.counters(0).errors.get();
    driver.until("it has tried again", |driver| {
        driver.tier.counters(0).errors.get() > errors + 2
    });
    assert_eq!(state(&driver), State::Open);
    server.ask(&["CONFIG", "SET", "maxmemory", "0"]);
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn a_slow_instance_costs_a_load_no_more_than_the_deadline() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = with(hasty(), &server, folder.path());
    assert!(store(&mut driver, "alice", 1, "x"));
    let sleeping = std::thread::scope(|scope| {
        let sleeping = scope.spawn(|| server.ask(&["DEBUG", "SLEEP", "4"]));
        // From here on an answer comes late or in time; what counts is that one comes before the sleep ends.
        driver.until("a load is unavailable", |driver| {
            load(driver, "alice") == unavailable("alice")
        });
        assert!(!sleeping.is_finished());
        assert_eq!(state(&driver), State::Open);
        sleeping.join().unwrap()
    });
    assert_eq!(sleeping, Value::Okay);
    driver.until("the instance is used", usable);
    // Nothing was written meanwhile, so what it holds is good.
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 1, "x"));
}

#[test]
fn a_wrong_password_opens_the_breaker_and_is_said_once() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    server.ask(&["CONFIG", "SET", "requirepass", "right"]);
    let address = |password| format!("{}?pass={password}", server.address());
    let lines = log_of(|| {
        let mut driver = Driver::new(config(), folder.path(), [&*address("hunter2")]);
        driver.until("it has tried ten times", |driver| {
            driver.tier.counters(0).errors.get() >= 10
        });
        assert_eq!(state(&driver), State::Open);
        assert_eq!(load(&mut driver, "alice"), unavailable("alice"));
    });
    assert_eq!(lines.lines().count(), 1, "{lines}");
    assert!(
        lines.contains("refuses the login (WRONGPASS)") && !lines.contains("hunter2"),
        "{lines}"
    );
    let mut driver = Driver::new(config(), folder.path(), [&*address("right")]);
    driver.until("the instance is used", usable);
}

#[test]
fn a_dead_instance_is_logged_when_it_goes_and_when_it_comes_back_not_a_thousand_times() {
    let (mut server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    let lines = log_of(|| {
        server.kill();
        driver.until("the breaker opens", |driver| state(driver) == State::Open);
        for _ in 0..1000 {
            assert_eq!(load(&mut driver, "alice"), unavailable("alice"));
        }
        driver.until("it has tried ten times", |driver| {
            driver.tier.counters(0).errors.get() >= 10
        });
        server.restart_empty();
        driver.until("the instance is used", usable);
    });
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(driver.tier.counters(0).unavailable.get() >= 1000);
}

#[test]
fn a_server_without_login_does_not_make_us_log_the_password() {
    let (server, folder) = (
        Server::start_with(&["--rename-command", "AUTH", ""]),
        tempfile::tempdir().unwrap(),
    );
    let address = format!("{}?user=nitro&pass=hunter2", server.address());
    let lines = log_of(|| {
        let mut driver = Driver::new(config(), folder.path(), [&*address]);
        driver.until("the breaker opens", |driver| state(driver) == State::Open);
    });
    assert!(
        lines.contains("refuses the login (ERR)") && !lines.contains("hunter2"),
        "{lines}"
    );
}

#[test]
fn pauses_between_tries_grow_up_to_their_bound() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config {
        pause_ms_min: 10,
        pause_ms_max: 1000,
        ..config()
    };
    // Its own clock: nobody is there to be waited for.
    let tier = &mut Driver::new(config, folder.path(), ["unix:///nowhere/redis.sock"]).tier;
    let (mut now_us, mut pauses_ms) = (0, Vec::new());
    for _ in 0..12 {
        assert!(matches!(tier.wants(0, now_us), Wants::Connect(_)));
        tier.connecting(0, now_us);
        assert_eq!(tier.wants(0, now_us), Wants::Keep);
        tier.lost(0, "nobody is there", now_us);
        let next_us = tier.deadline_us().unwrap();
        assert_eq!(tier.wants(0, next_us - 1), Wants::Nothing);
        pauses_ms.push((next_us - now_us) / 1000);
        now_us = next_us;
    }
    for (n, pause_ms) in pauses_ms.iter().enumerate() {
        let most = (10u64 << n).min(1000);
        assert!((most * 3 / 4..=most).contains(pause_ms), "{pauses_ms:?}");
    }
}

#[test]
fn who_speaks_nonsense_is_not_listened_to() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("redis://{}", listener.local_addr().unwrap());
    let folder = tempfile::tempdir().unwrap();
    // Ends with the process: it waits in accept.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1000]);
            let _ = stream.write_all(b"+OK\r\nSSH-2.0-OpenSSH_9.2p1\r\n");
        }
    });
    let mut driver = Driver::new(config(), folder.path(), [&*address]);
    driver.until("it has tried ten times", |driver| {
        driver.tier.counters(0).errors.get() >= 10
    });
    assert_eq!(state(&driver), State::Open);
    assert_eq!(load(&mut driver, "alice"), unavailable("alice"));
    assert!(!store(&mut driver, "alice", 1, "x"));
}

#[test]
fn an_instance_replaced_by_an_empty_one_and_back_shows_nothing_old() {
    let (mut server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "old"));
    // The first one hangs, off its path, and another one answers there.
    server.stop();
    let aside = server.socket().with_extension("aside");
    std::fs::rename(server.socket(), &aside).unwrap();
    let hung = server.leave();
    server.restart();
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
    assert!(store(&mut driver, "alice", 2, "new"));
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 2, "new"));
    server.kill();
    std::fs::rename(&aside, server.socket()).unwrap();
    server.take_back(hung);
    server.go_on();
    driver.until("the instance is used", usable);
    assert!(holds(&server, "alice", "old"));
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn a_replica_is_refused_even_if_the_connection_was_there_before() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "old"));
    server.ask(&["REPLICAOF", "127.0.0.1", "1"]);
    assert!(!store(&mut driver, "alice", 2, "new"));
    assert_eq!(load(&mut driver, "alice"), unavailable("alice"));
    let errors = driver.tier.counters(0).errors.get();
    driver.until("it has tried again", |driver| {
        driver.tier.counters(0).errors.get() > errors
    });
    server.ask(&["REPLICAOF", "NO", "ONE"]);
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

#[test]
fn an_instance_that_still_loads_its_dump_is_waited_for() {
    let (mut server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    for n in 0..20 {
        assert!(store(&mut driver, &format!("user{n}"), 1, "x"));
    }
    server.ask(&["SAVE"]);
    server.kill();
    server.begin_again(&[
        "--key-load-delay",
        "50000",
        "--loading-process-events-interval-bytes",
        "1024",
    ]);
    driver.until("the breaker opens", |driver| state(driver) == State::Open);
    assert_eq!(load(&mut driver, "user1"), unavailable("user1"));
    driver.until("the instance is used", usable);
    assert_eq!(load(&mut driver, "user1"), missed("user1"));
}

#[test]
fn a_key_of_another_kind_is_a_miss_and_left_behind() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "x"));
    let key = server.users()[0].0.clone();
    server.ask(&["DEL", &key]);
    server.ask(&["LPUSH", &key, "x"]);
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
    assert!(!store(&mut driver, "alice", 2, "y"));
    driver.until("the instance is used", usable);
    assert!(store(&mut driver, "alice", 3, "z"));
    assert_eq!(load(&mut driver, "alice"), loaded("alice", 3, "z"));
}

#[test]
fn without_a_durable_generation_nothing_is_answered_and_nothing_is_read() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    assert!(store(&mut driver, "alice", 1, "old"));
    driver.renews = false;
    server.ask(&["CONFIG", "SET", "maxmemory", "1"]);
    try_store(&mut driver, "alice", 2, "new").unwrap();
    driver.until("a new generation is asked for", |driver| {
        !driver.renewals.is_empty()
    });
    server.ask(&["CONFIG", "SET", "maxmemory", "0"]);
    driver.until("the instance is there again", |driver| {
        state(driver) == State::Ready
    });
    assert!(driver.events.is_empty(), "{:?}", driver.events);
    assert_eq!(load(&mut driver, "alice"), unavailable("alice"));
    assert_eq!(try_store(&mut driver, "alice", 3, "newer"), Err(Later));
    driver.renew();
    assert!(matches!(
        driver.event(),
        Event::StoreMissed { revision: 2, .. }
    ));
    assert_eq!(load(&mut driver, "alice"), missed("alice"));
}

// ---- figures

/// `CARGO_PROFILE_TEST_OPT_LEVEL=3 cargo test --lib redis::tests::faults::cpu -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, of optimised code only"]
fn cpu_of_a_load() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mut driver = one(&server, folder.path());
    let names: Vec<_> = (0..2000).map(|n| format!("user{n}")).collect();
    let value = "x".repeat(600);
    for name in &names {
        assert!(store(&mut driver, name, 1, &value));
    }
    for at_once in [1, 16, 100, 500, 2000] {
        let rounds = 200_000 / at_once.max(10);
        let begin = cpu_us();
        for round in 0..rounds {
            let now_us = driver.now_us();
            for n in 0..at_once {
                let name = &names[(round * at_once + n) % names.len()];
                driver.tier.load(name, now_us);
            }
            driver.until("all are answered", |driver| driver.events.len() >= at_once);
            driver.events.clear();
        }
        let micros = (cpu_us() - begin) as f64 / (rounds * at_once) as f64;
        println!("{at_once} loads of 600 bytes at once: {micros:.2} us of client CPU each");
    }
}

fn cpu_us() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec * 1_000_000 + time.tv_nsec / 1000
}

/// What `work` logs on this thread.
fn log_of(work: impl FnOnce()) -> String {
    use std::sync::{Arc, Mutex};
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    // With a single subscriber, other threads' tests would decide from theirs (none) which lines are never logged.
    let _second = tracing::Dispatch::new(tracing_subscriber::fmt().finish());
    let lines = Lines::default();
    let to = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || to.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, work);
    let bytes = lines.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}
