//! Storms: many log in at once. Who is in must not notice, who has to wait hears something.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use blade::{Blade, DOMAIN};
use client::{Client, PASSWORD, opened, wait_until};

/// One shard, so that gates and limits are those of one.
const ONE: (&str, &str) = ("cores", "\"0\"");
const RETRY: &str = "<retry-after xmlns='urn:nitro:storm:0' seconds='";

/// All that the server says, to the end of the connection.
fn rest(socket: &mut TcpStream) -> Vec<u8> {
    let within = Duration::from_secs(20);
    socket.set_read_timeout(Some(within)).unwrap();
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(why) if why.kind() == ErrorKind::ConnectionReset => {}
        Err(why) => panic!("neither heard nor closed: {why}"),
    }
    bytes
}

fn metric(blade: &Blade, name: &str) -> u64 {
    let (_, text) = blade.http_get("/metrics").expect("metrics");
    text.lines()
        .filter(|line| line.starts_with(name))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

/// What is said over direct TLS, by a client that sends nothing but its handshake.
fn told_by_tls(blade: &Blade) -> String {
    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    let file = blade.data_dir().join("certificate.pem");
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(file).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(DOMAIN).unwrap();
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = TcpStream::connect(blade.c2s_tls).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut said = Vec::new();
    rustls::Stream::new(&mut tls, &mut socket)
        .read_to_end(&mut said)
        .expect("a proper end");
    String::from_utf8(said).unwrap()
}

#[test]
fn who_waits_too_long_is_told_when_to_come_back_in_the_clear_and_through_tls() {
    let blade = client::blade(&[
        ONE,
        ("storm.logins_begun_max", "1"),
        ("storm.wait_seconds_max", "1"),
        ("storm.silent_seconds_max", "60"),
    ]);
    // one that is past the first gate and never goes on
    let holder = opened(blade.c2s);
    let mut waiting = TcpStream::connect(blade.c2s).unwrap();
    let said = String::from_utf8(rest(&mut waiting)).unwrap();
    assert!(
        said.contains("<resource-constraint") && said.contains(RETRY),
        "{said}"
    );
    let said = told_by_tls(&blade);
    assert!(
        said.contains("<resource-constraint") && said.contains(RETRY),
        "{said}"
    );
    // figures are told a few times a second
    wait_until("both are counted", Duration::from_secs(10), || {
        metric(&blade, "nitro_gate_refused_total") == 2
    });
    drop(holder);
    drop(opened(blade.c2s));
}

#[test]
fn more_than_may_wait_are_refused_at_once() {
    let blade = client::blade(&[ONE, ("limits.logins_in_progress_max", "1")]);
    // those who looked whether the blade is up may still be leaving
    let mut holder = None;
    wait_until("there is room for one", Duration::from_secs(10), || {
        let mut connection = client::connection::Connection::connect(blade.c2s).unwrap();
        let open = connection.open(DOMAIN).is_ok();
        holder = open.then_some(connection);
        open
    });
    let said = rest(&mut TcpStream::connect(blade.c2s).unwrap());
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.contains("<resource-constraint") && said.contains(RETRY),
        "{said}"
    );
    // RFC 8446 6: a fatal alert, internal_error
    let said = rest(&mut TcpStream::connect(blade.c2s_tls).unwrap());
    assert_eq!(said, [21, 3, 3, 0, 2, 2, 80]);
    drop(holder);
    wait_until("the place is free", Duration::from_secs(10), || {
        metric(&blade, "nitro_connections_negotiating") == 0
    });
    drop(opened(blade.c2s));
}

#[test]
fn a_client_that_is_silent_makes_room_for_those_who_wait() {
    let blade = client::blade(&[
        ONE,
        ("storm.logins_begun_max", "1"),
        ("storm.silent_seconds_max", "1"),
    ]);
    let mut silent = opened(blade.c2s);
    // waits at the first gate until the other is cut
    let next = opened(blade.c2s);
    assert_eq!(
        client::ended(&mut silent).as_deref(),
        Some("connection-timeout")
    );
    drop(next);
    // nobody waits: a silent client has its time
    let mut alone = opened(blade.c2s);
    let quiet = alone.hear(Duration::from_millis(2500)).unwrap();
    assert!(matches!(quiet, client::connection::Heard::Nothing));
}

#[test]
fn those_who_wait_unread_hear_that_the_server_stops() {
    let mut blade = client::blade(&[ONE, ("storm.logins_begun_max", "1")]);
    let holder = opened(blade.c2s);
    let mut waiting = TcpStream::connect(blade.c2s).unwrap();
    // whether it waits at the gate by now or still in the kernel: it is told
    blade.signal(15);
    let said = String::from_utf8(rest(&mut waiting)).unwrap();
    assert!(said.contains("<system-shutdown"), "{said}");
    drop(holder);
    blade.wait(Duration::from_secs(15));
}

/// Half of a conversation: `count` messages, one every two milliseconds; the sorted times that they took.
fn converse(from: &mut Client, to: &mut Client, count: usize) -> Vec<Duration> {
    let mut took = Vec::new();
    for number in 0..count {
        let sent = Instant::now();
        from.send(&format!(
            "<message type='chat' to='{}' id='m{number}'><body>{number}</body></message>",
            to.jid
        ));
        assert_eq!(to.next_body(), number.to_string(), "in order, none lost");
        took.push(sent.elapsed());
        std::thread::sleep(Duration::from_millis(2)); // the pace of the conversation
    }
    took.sort();
    took
}

#[test]
fn live_messages_flow_while_many_log_in_again_and_again() {
    const USERS: usize = 40;
    const MESSAGES: usize = 300;
    let blade = client::blade(&[]);
    for user in ["alice", "bob"] {
        blade.add_user(user, PASSWORD);
    }
    for user in 0..USERS {
        blade.add_user(&format!("storm{user}"), PASSWORD);
    }
    let mut alice = Client::online(&blade, "alice", "a");
    let mut bob = Client::online(&blade, "bob", "b");
    let quiet = converse(&mut alice, &mut bob, MESSAGES);
    let (over, logins) = (AtomicBool::new(false), AtomicUsize::new(0));
    let stormy = std::thread::scope(|scope| {
        for first in 0..4 {
            let (blade, over, logins) = (&blade, &over, &logins);
            scope.spawn(move || {
                let users = (first..USERS).step_by(4).cycle();
                for user in users.take_while(|_| !over.load(Relaxed)) {
                    let mut client = Client::online(blade, &format!("storm{user}"), "r");
                    client.send("</stream:stream>");
                    logins.fetch_add(1, Relaxed);
                }
            });
        }
        wait_until("the storm rages", Duration::from_secs(60), || {
            logins.load(Relaxed) > 50
        });
        let before = logins.load(Relaxed);
        let stormy = converse(&mut alice, &mut bob, MESSAGES);
        // before anything is asserted: the others look at it
        over.store(true, Relaxed);
        assert!(logins.load(Relaxed) > before, "it went on meanwhile");
        stormy
    });
    // generous: clients, their key derivations and the server share two cores, and this is a debug build
    let (quiet, stormy) = (quiet[MESSAGES * 9 / 10], stormy[MESSAGES * 9 / 10]);
    let bar = quiet * 10 + Duration::from_millis(150);
    assert!(
        stormy < bar,
        "p90 is {quiet:?} in peace, {stormy:?} in the storm"
    );
}

#[test]
fn who_says_something_and_is_gone_with_many_others_is_heard() {
    const USERS: usize = 25;
    const EACH: usize = 4;
    let blade = client::blade(&[ONE]);
    blade.add_user("bob", PASSWORD);
    let mut bob = Client::online(&blade, "bob", "b");
    let mut crowd = Vec::new();
    for user in (0..USERS).map(|user| format!("user{user}")) {
        blade.add_user(&user, PASSWORD);
        for resource in 0..EACH {
            crowd.push(Client::online(&blade, &user, &resource.to_string()));
        }
    }
    for (number, one) in crowd.iter_mut().enumerate() {
        one.send(&format!(
            "<message type='chat' to='{}'><body>{number}</body></message>",
            bob.jid
        ));
    }
    drop(crowd);
    let mut heard: Vec<usize> = (0..USERS * EACH)
        .map(|_| bob.next_body().parse().unwrap())
        .collect();
    heard.sort();
    assert_eq!(heard, (0..USERS * EACH).collect::<Vec<_>>());
    wait_until("only bob is left", Duration::from_secs(20), || {
        metric(&blade, "nitro_sessions{") == 1
    });
    wait_until("they went one by one", Duration::from_secs(20), || {
        metric(&blade, "nitro_leaving_connections_max{") > 0
    });
}

#[test]
fn a_slow_handshake_and_a_trickling_client_do_not_hold_up_others() {
    let blade = client::blade(&[ONE, ("storm.logins_computing_max", "1")]);
    blade.add_user("alice", PASSWORD);
    let mut slow: Vec<_> = (0..50)
        .map(|n| {
            let address = [blade.c2s, blade.c2s_tls][n % 2];
            TcpStream::connect(address).unwrap()
        })
        .collect();
    for (at, socket) in slow.iter_mut().enumerate() {
        // the beginning of a stream header, the beginning of a client hello
        let bytes: &[u8] = [&b"<?xml version"[..], &[22, 3, 1, 2, 0, 1, 0]][at % 2];
        socket.write_all(bytes).unwrap();
    }
    let begun = Instant::now();
    Client::online(&blade, "alice", "a").settle();
    assert!(begun.elapsed() < Duration::from_secs(10));
}
