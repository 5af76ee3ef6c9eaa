//! Clients that are broken, slow, greedy or malicious: each is bounded, and harms nobody else.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use blade::{Blade, DOMAIN};
use client::connection::Connection;
use client::{Client, PASSWORD, authenticated, body, wait_until};

const SASL: &str = "urn:ietf:params:xml:ns:xmpp-sasl";
const HEADER: &str = "<?xml version='1.0'?><stream:stream to='localhost' version='1.0' xmlns='jabber:client' \
                      xmlns:stream='http://etherx.jabber.org/streams'>";

/// Reads to the end or a reset; what came.
fn rest(socket: &mut TcpStream, within: Duration) -> Result<String, String> {
    socket.set_read_timeout(Some(within)).unwrap();
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(why) if why.kind() == ErrorKind::ConnectionReset => {}
        Err(why) => return Err(why.to_string()),
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[test]
fn who_never_authenticates_is_cut_whatever_he_does_meanwhile() {
    let blade = client::blade(&[("limits.auth_seconds_max", "1")]);
    blade.add_user("alice", PASSWORD);
    let silent = TcpStream::connect(blade.c2s).unwrap();
    let mut open = TcpStream::connect(blade.c2s).unwrap();
    open.write_all(HEADER.as_bytes()).unwrap();
    let half_open_tls = TcpStream::connect(blade.c2s_tls).unwrap();
    let mut broken_hello = TcpStream::connect(blade.c2s_tls).unwrap();
    // a handshake record that announces more than will ever come
    broken_hello.write_all(&[22, 3, 1, 2, 0, 1, 0]).unwrap();
    let mut starttls = client::opened(blade.c2s);
    starttls
        .send(b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
        .unwrap();
    assert_eq!(starttls.next_element().unwrap().name, "proceed");
    let unbound = authenticated(blade.c2s, "alice", PASSWORD).unwrap();
    let begun = Instant::now();
    let within = Duration::from_secs(8);
    for (what, mut socket, told) in [
        ("silent", silent, true),
        ("with an open stream", open, true),
        ("half-open TLS", half_open_tls, false),
        ("half a client hello", broken_hello, false),
        ("half-open STARTTLS", starttls.into_socket(), false),
        ("without binding", unbound.into_socket(), true),
    ] {
        let said = rest(&mut socket, within).unwrap_or_else(|why| panic!("{what}: {why}"));
        assert_eq!(said.contains("connection-timeout"), told, "{what}: {said}");
    }
    assert!(begun.elapsed() < within, "{:?}", begun.elapsed());
}

/// Sends `bytes` again and again, one by one, until the server has had enough; what it said and how much it took.
fn trickle(
    connection: &mut Connection,
    bytes: &[u8],
    at_once: usize,
    most: usize,
) -> (String, usize) {
    let mut socket = connection.socket();
    socket.set_nonblocking(true).unwrap();
    let mut said = Vec::new();
    let mut sent = 0;
    let mut chunk = [0; 4096];
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        assert!(Instant::now() < deadline, "not cut after {sent} bytes");
        match socket.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => said.extend_from_slice(&chunk[..length]),
            Err(why) if why.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        if sent < most {
            let piece: Vec<u8> = bytes
                .iter()
                .copied()
                .cycle()
                .skip(sent)
                .take(at_once)
                .collect();
            match socket.write(&piece) {
                Ok(length) => sent += length,
                Err(why) if why.kind() == ErrorKind::WouldBlock => {}
                Err(_) => sent += at_once,
            }
        }
    }
    (String::from_utf8_lossy(&said).into_owned(), sent)
}

#[test]
fn an_endless_stanza_name_or_attribute_is_cut_at_the_limit_before_and_after_log_in() {
    let blade = client::blade(&[("limits.stanza_bytes_max", "20000")]);
    blade.add_user("alice", PASSWORD);
    for (what, start, more) in [
        ("name", "<", "a"),
        ("attribute name", "<message ", "b"),
        ("attribute value", "<message to='", "c"),
        ("text", "<message><body>", "d"),
        ("children", "<message>", "<x/>"),
    ] {
        for logged_in in [false, true] {
            let limit = if logged_in { 20_000 } else { 16_384 };
            let mut connection = match logged_in {
                true => Client::bind(&blade, "alice", "a").connection,
                false => client::opened(blade.c2s),
            };
            connection.send(start.as_bytes()).unwrap();
            // byte by byte at first, then in larger pieces, so that the test ends some day
            let (said, sent) = trickle(&mut connection, more.as_bytes(), 40, 300_000);
            assert!(
                said.contains("policy-violation") || said.contains("not-well-formed"),
                "{what}, logged in: {logged_in}: {said}"
            );
            // what was on its way when the limit was hit is the kernel's
            assert!(
                sent < limit + 200_000,
                "{what}, logged in: {logged_in}: {sent} bytes were taken"
            );
        }
    }
    let mut alice = Client::online(&blade, "alice", "a");
    alice.settle();
}

#[test]
fn who_goes_on_sending_after_his_stream_error_is_read_away_for_a_moment_only() {
    let blade = client::blade(&[]);
    let mut socket = TcpStream::connect(blade.c2s).unwrap();
    socket.write_all(HEADER.as_bytes()).unwrap();
    let nested = b"<a>".repeat(64 << 10);
    socket.write_all(&nested).unwrap();
    // what the kernel's buffers take is no more than a few megabytes
    let mut taken = 0;
    while taken < 256 << 20 {
        match socket.write(&nested) {
            Ok(count) => taken += count,
            Err(_) => break,
        }
    }
    assert!(taken < 64 << 20, "{taken} bytes");
    let said = rest(&mut socket, Duration::from_secs(8)).unwrap();
    assert!(said.contains("<policy-violation"), "{said}");
}

#[test]
fn a_stanza_that_comes_byte_by_byte_is_a_stanza() {
    let blade = client::blade(&[]);
    blade.add_user("alice", PASSWORD);
    let mut alice = Client::online(&blade, "alice", "a");
    let to = alice.jid.clone();
    for byte in format!("<message type='chat' to='{to}'><body>sl\u{f6}w</body></message>").bytes() {
        alice.connection.send(&[byte]).unwrap();
    }
    assert_eq!(alice.next_body(), "sl\u{f6}w");
}

/// Sends messages of about 1 KiB to `to` until the log or the sessions say that the recipient was cut.
fn flood(from: &mut Client, to: &str, count: usize) {
    let filler = "x".repeat(1000);
    for n in 0..count {
        from.send(&format!(
            "<message type='chat' to='{to}'><body>{n} {filler}</body></message>"
        ));
        if n % 256 == 255 {
            from.settle();
        }
    }
    from.settle();
}

fn sessions(blade: &Blade, name: &str) -> String {
    let output = blade.nitro(&["session", "list", name], "");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_client_that_does_not_read_is_disconnected_and_others_go_on() {
    let blade = client::blade(&[
        ("limits.stanza_bytes_max", "65536"),
        ("limits.send_queue_bytes_max", "65536"),
    ]);
    for name in ["alice", "bob"] {
        blade.add_user(name, PASSWORD);
    }
    let mut alice = Client::online(&blade, "alice", "a");
    let deaf = Client::online(&blade, "bob", "deaf");
    // more than both kernels' buffers hold
    flood(&mut alice, &deaf.jid, 16 * 1024);
    wait_until("the end of the session", Duration::from_secs(10), || {
        sessions(&blade, "bob").is_empty()
    });
    alice.settle();
    let mut again = Client::online(&blade, "bob", "listens");
    alice.send(&format!(
        "<message type='chat' to='{}'><body>hello</body></message>",
        again.jid
    ));
    again.find(|e| e.name == "message" && body(e).as_deref() == Some("hello"));
}

#[test]
fn a_client_that_does_not_read_is_parked_if_it_can_resume_and_loses_nothing() {
    let blade = client::blade(&[
        ("limits.stanza_bytes_max", "65536"),
        ("limits.send_queue_bytes_max", "65536"),
        ("stream_management.unacked_bytes_max", "100000000"),
        ("stream_management.unacked_stanzas_max", "1000000"),
    ]);
    for name in ["alice", "bob"] {
        blade.add_user(name, PASSWORD);
    }
    const COUNT: usize = 12 * 1024;
    let mut alice = Client::online(&blade, "alice", "a");
    let mut deaf = Client::online(&blade, "bob", "deaf");
    let previd = deaf.enable_resumption();
    flood(&mut alice, &deaf.jid, COUNT);
    wait_until("the session is parked", Duration::from_secs(10), || {
        sessions(&blade, "bob").contains("parked")
    });
    // what did arrive on the old connection, up to its end
    let mut got = 0;
    loop {
        match deaf.connection.next() {
            Ok(Some(client::xml::Item::Element(e))) if e.name == "message" => {
                assert!(body(&e).unwrap().starts_with(&format!("{got} ")));
                got += 1;
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(why) => panic!("{why}"),
        }
    }
    assert!(
        got < COUNT,
        "the server sent everything: the test does not test"
    );
    // The client must read faster than the limit here, as any client that comes back must.
    let mut back = authenticated(blade.c2s, "bob", PASSWORD).unwrap();
    client::resume(&mut back, &previd, got as u32).expect("the session is there");
    for n in got..COUNT {
        let message = back
            .find(|e| e.name == "message")
            .unwrap_or_else(|why| panic!("message {n}: {why}"));
        assert!(body(&message).unwrap().starts_with(&format!("{n} ")), "{n}");
    }
}

#[test]
fn what_a_parked_client_never_fetches_goes_off_line() {
    let blade = client::blade(&[
        ("limits.stanza_bytes_max", "65536"),
        ("limits.send_queue_bytes_max", "65536"),
        ("stream_management.unacked_bytes_max", "100000000"),
        ("stream_management.unacked_stanzas_max", "1000000"),
        ("stream_management.resume_seconds_max", "1"),
        ("limits.offline_messages_max", "1000000"),
        ("limits.offline_bytes_max", "1000000000"),
    ]);
    for name in ["alice", "bob"] {
        blade.add_user(name, PASSWORD);
    }
    const COUNT: usize = 10 * 1024;
    let mut alice = Client::online(&blade, "alice", "a");
    let mut deaf = Client::online(&blade, "bob", "deaf");
    deaf.enable_resumption();
    flood(&mut alice, &format!("bob@{DOMAIN}"), COUNT);
    wait_until("the end of the session", Duration::from_secs(15), || {
        sessions(&blade, "bob").is_empty()
    });
    drop(deaf);
    let mut bob = Client::bind(&blade, "bob", "later");
    bob.send("<presence/>");
    for n in 0..COUNT {
        let got = bob.next_body();
        assert!(got.starts_with(&format!("{n} ")), "{got:.8} instead of {n}");
    }
}

/// Seconds of CPU that the process has used.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn without_descriptors_the_server_neither_spins_nor_dies_and_serves_again_later() {
    let blade = client::blade(&[]);
    blade.add_user("alice", PASSWORD);
    let mut alice = Client::online(&blade, "alice", "a");
    let room = descriptors(blade.pid()) as u64 + 40;
    let limit = libc::rlimit {
        rlim_cur: room,
        rlim_max: room,
    };
    // SAFETY: the pid is that of a child which has not been waited for; the limit is read, nothing is written back.
    let set = unsafe {
        libc::prlimit(
            blade.pid() as libc::pid_t,
            libc::RLIMIT_NOFILE,
            &limit,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(set, 0);
    let mut crowd = Vec::new();
    for _ in 0..200 {
        let connected = TcpStream::connect_timeout(&blade.c2s, Duration::from_secs(2));
        crowd.extend(connected);
    }
    wait_until("the descriptors run out", Duration::from_secs(10), || {
        blade.log().contains("cannot be accepted")
    });
    let (cpu, begun) = (cpu_seconds(blade.pid()), Instant::now());
    // who is in goes on, and measures time here
    while begun.elapsed() < Duration::from_secs(2) {
        alice.settle();
        std::thread::sleep(Duration::from_millis(50)); // the pace of a usual client, not a wait
    }
    let used = (cpu_seconds(blade.pid()) - cpu) / begun.elapsed().as_secs_f64();
    assert!(
        used < 0.5,
        "{used:.2} of a core while descriptors are missing"
    );
    let lines = blade.log().lines().count();
    assert!(lines < 400, "{lines} lines of log");
    drop(crowd);
    wait_until("a log-in", Duration::from_secs(10), || {
        let Ok(mut connection) = Connection::connect(blade.c2s) else {
            return false;
        };
        connection.open(DOMAIN).is_ok()
            && connection
                .authenticate("alice", PASSWORD)
                .is_ok_and(|e| e.name == "success")
    });
    alice.settle();
}

/// Whether the connection is let in, or turned away with this condition.
fn entered(connection: Result<Connection, String>) -> Result<Connection, String> {
    let mut connection = connection?;
    let features = connection.open(DOMAIN);
    match features {
        Ok(_) => Ok(connection),
        Err(why) => Err(client_error(&mut connection).unwrap_or(why)),
    }
}

fn client_error(connection: &mut Connection) -> Option<String> {
    client::ended(connection)
}

/// The condition with which a new connection is turned away; none: it is let in.
fn turned_away(address: SocketAddr, first: &[u8]) -> Option<String> {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.write_all(first).unwrap();
    let mut connection = Connection::over(socket).unwrap();
    let _ = connection.send(HEADER.as_bytes());
    let _ = connection.next();
    let element = connection.next_element().unwrap();
    match element.name.as_str() {
        "features" => None,
        _ => element.children.first().map(|c| c.name.clone()),
    }
}

#[test]
fn connections_beyond_the_limit_are_told_so_and_find_room_later() {
    let blade = client::blade(&[("limits.connections_max", "5")]);
    blade.add_user("alice", PASSWORD);
    // the connections of the start are given back
    wait_until("room", Duration::from_secs(5), || {
        turned_away(blade.c2s, b"").is_none()
    });
    let mut held = Vec::new();
    wait_until("five are in", Duration::from_secs(5), || {
        if let Ok(connection) = entered(Connection::connect(blade.c2s)) {
            held.push(connection);
        }
        held.len() == 5
    });
    assert_eq!(
        turned_away(blade.c2s, b"").as_deref(),
        Some("resource-constraint")
    );
    held.pop();
    wait_until("room again", Duration::from_secs(5), || {
        turned_away(blade.c2s, b"").is_none()
    });
}

/// A PROXY v2 header that names a client.
fn proxied(client: SocketAddrV4) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    bytes.extend(client.ip().octets());
    bytes.extend(Ipv4Addr::LOCALHOST.octets());
    bytes.extend(client.port().to_be_bytes());
    bytes.extend(5222u16.to_be_bytes());
    bytes
}

fn through_proxy(blade: &Blade, client: SocketAddrV4) -> Connection {
    let mut socket = TcpStream::connect(blade.c2s).unwrap();
    socket.write_all(&proxied(client)).unwrap();
    Connection::over(socket).unwrap()
}

#[test]
fn limits_for_an_address_apply_to_the_client_that_a_trusted_proxy_names() {
    let blade = client_blade_behind_proxy(&[
        ("limits.connections_per_address_max", "3"),
        ("limits.unauthenticated_per_address_max", "2"),
    ]);
    let one = |port| SocketAddrV4::new([192, 0, 2, 1].into(), port);
    let other = SocketAddrV4::new([192, 0, 2, 2].into(), 1);
    blade.add_user("alice", PASSWORD);
    let mut first = entered(Ok(through_proxy(&blade, one(1)))).unwrap();
    let second = entered(Ok(through_proxy(&blade, one(2)))).unwrap();
    let condition = turned_away(blade.c2s, &proxied(one(3)));
    assert_eq!(
        condition.as_deref(),
        Some("resource-constraint"),
        "two are not logged in yet"
    );
    assert_eq!(turned_away(blade.c2s, &proxied(other)), None);
    // who has logged in no longer counts as unauthenticated, but still as a connection
    assert_eq!(
        first.authenticate("alice", PASSWORD).unwrap().name,
        "success"
    );
    first.open(DOMAIN).unwrap();
    first.bind("a").unwrap();
    let third = entered(Ok(through_proxy(&blade, one(4)))).unwrap();
    drop(second);
    wait_until("the place is given back", Duration::from_secs(5), || {
        turned_away(blade.c2s, &proxied(one(5))).is_none()
    });
    drop(third);
    let list = sessions(&blade, "alice");
    assert!(
        list.contains("192.0.2.1"),
        "the session's address is the proxy's: {list}"
    );
}

#[test]
fn a_proxied_client_is_never_loopback() {
    let blade = client_blade_behind_proxy(&[]);
    for client in [[192, 0, 2, 1], [127, 0, 0, 1]] {
        let mut connection = through_proxy(&blade, SocketAddrV4::new(client.into(), 4000));
        let features = connection.open(DOMAIN).unwrap();
        assert!(features.child("register").is_none(), "{features}");
        let refused = connection.register("mallory", "x").unwrap_err();
        assert!(refused.contains("not-allowed"), "{refused}");
    }
}

#[test]
fn who_comes_from_a_trusted_proxy_without_its_header_is_not_served() {
    let blade = client_blade_behind_proxy(&[("limits.auth_seconds_max", "1")]);
    let mut rude = TcpStream::connect(blade.c2s).unwrap();
    rude.write_all(HEADER.as_bytes()).unwrap();
    assert_eq!(rest(&mut rude, Duration::from_secs(5)).unwrap(), "");
    let mut silent = TcpStream::connect(blade.c2s).unwrap();
    assert_eq!(rest(&mut silent, Duration::from_secs(5)).unwrap(), "");
}

/// The start cannot be seen by connecting: the test's own address is the proxy's. `/healthz` is not proxied.
fn client_blade_behind_proxy(settings: &[(&str, &str)]) -> Blade {
    let proxy = [("trusted_proxies", "[\"127.0.0.1/32\"]")];
    client::blade(&[&proxy[..], settings].concat())
}

#[test]
fn a_thousand_resources_of_one_user_are_bounded_and_the_first_ones_live() {
    let blade = client::blade(&[]);
    blade.add_user("alice", PASSWORD);
    let mut held: Vec<Client> = (0..16)
        .map(|n| Client::online(&blade, "alice", &format!("r{n}")))
        .collect();
    for n in 16..1000 {
        // one connection may try again and again
        let mut connection = authenticated(blade.c2s, "alice", PASSWORD).unwrap();
        for attempt in 0..if n < 20 { 200 } else { 0 } {
            let answer = connection
                .request(&format!(
                    "<iq type='set' id='{{id}}'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'>\
                     <resource>more-{n}-{attempt}</resource></bind></iq>"
                ))
                .unwrap();
            let error = answer.child("error").unwrap_or_else(|| panic!("{answer}"));
            assert!(error.child("resource-constraint").is_some(), "{answer}");
        }
        if n >= 20 {
            break;
        }
    }
    // the same resource again: the old session makes room
    let mut again = Client::online(&blade, "alice", "r0");
    assert_eq!(held[0].ends().as_deref(), Some("conflict"));
    again.settle();
    for client in &mut held[1..] {
        client.settle();
    }
}

#[test]
fn failed_attempts_end_the_connection_and_are_held_back_longer_each_time() {
    let blade = client::blade(&[
        ("limits.auth_failure_delay_ms", "40"),
        ("limits.auth_failure_delay_ms_max", "400"),
    ]);
    blade.add_user("alice", PASSWORD);
    for name in ["alice", "nobody"] {
        let mut delays = Vec::new();
        for _ in 0..2 {
            let mut connection = client::opened(blade.c2s);
            for _ in 0..3 {
                let begun = Instant::now();
                let outcome = connection.authenticate(name, "wrong").unwrap();
                assert!(outcome.child("not-authorized").is_some(), "{outcome}");
                delays.push(begun.elapsed().as_millis());
            }
            assert_eq!(
                client::ended(&mut connection).as_deref(),
                Some("policy-violation"),
                "{name}"
            );
        }
        for (delay, least) in delays.iter().zip([40, 80, 160, 320, 400, 400]) {
            assert!(*delay >= least, "{name}: {delays:?}");
        }
    }
}

#[test]
fn garbage_in_sasl_is_refused_by_its_condition_and_the_stream_goes_on() {
    let blade = client::blade(&[
        ("limits.auth_failure_delay_ms", "0"),
        ("limits.auth_attempts_max", "100"),
    ]);
    blade.add_user("alice", PASSWORD);
    let mut connection = client::opened(blade.c2s);
    for (auth, condition) in [
        (
            "<auth xmlns='{}' mechanism='SCRAM-SHA-1'>!!!!</auth>",
            "incorrect-encoding",
        ),
        (
            "<auth xmlns='{}' mechanism='SCRAM-SHA-1'>AAAA=AAA</auth>",
            "incorrect-encoding",
        ),
        (
            "<auth xmlns='{}' mechanism='SCRAM-SHA-1'>AAAA</auth>",
            "malformed-request",
        ),
        (
            "<auth xmlns='{}' mechanism='SCRAM-SHA-1'>////</auth>",
            "malformed-request",
        ),
        (
            "<auth xmlns='{}' mechanism='SCRAM-SHA-1'>=</auth>",
            "malformed-request",
        ),
        (
            "<auth xmlns='{}' mechanism='ANONYMOUS'/>",
            "invalid-mechanism",
        ),
        ("<auth xmlns='{}' mechanism=''/>", "invalid-mechanism"),
        ("<auth xmlns='{}'/>", "invalid-mechanism"),
        // "n,,n=,r=x" and "n,,n=alice,r="
        (
            "<auth xmlns='{}' mechanism='SCRAM-SHA-1'>biwsbj0scj14</auth>",
            "malformed-request",
        ),
        (
            "<auth xmlns='{}' mechanism='SCRAM-SHA-1'>biwsbj1hbGljZSxyPQ==</auth>",
            "malformed-request",
        ),
        (
            "<auth xmlns='{}' mechanism='PLAIN'>AGFsaWNlAHNlY3JldA==</auth>",
            "encryption-required",
        ),
    ] {
        connection
            .send(auth.replace("{}", SASL).as_bytes())
            .unwrap();
        let answer = connection.next_element().unwrap();
        assert_eq!(answer.name, "failure", "{auth}: {answer}");
        let got = &answer.children[0].name;
        assert!(
            got == condition || (condition == "malformed-request" && got == "not-authorized"),
            "{auth}: {answer}"
        );
    }
    assert_eq!(
        connection.authenticate("alice", PASSWORD).unwrap().name,
        "success"
    );
}

#[test]
fn garbage_instead_of_a_handshake_closes_that_connection_only() {
    let blade = client::blade(&[]);
    blade.add_user("alice", PASSWORD);
    let mut alice = Client::online(&blade, "alice", "a");
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        &[22, 3, 1, 0xff, 0xff, 1, 2, 3],
    ] {
        let mut socket = TcpStream::connect(blade.c2s_tls).unwrap();
        let _ = socket.write_all(garbage);
        rest(&mut socket, Duration::from_secs(5)).unwrap();
    }
    alice.settle();
}
