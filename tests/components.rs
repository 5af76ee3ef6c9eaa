//! Components (XEP-0114) over real sockets: secrets and their reload, connections that die under load, components that do not
//! read, and users on every core.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::collections::HashSet;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use blade::Blade;
use client::connection::{Connection, Heard};
use client::xml::{Element, Item};
use client::{Client, body, ended, number, wait_until};
use nitro::xmpp::component::proof;

const HOST: &str = "echo.localhost";
const SECRET: &str = "open sesame";

/// A blade with a port for components, and where that is.
fn start(settings: &[(&str, &str)]) -> (Blade, SocketAddr) {
    let hosts = format!("{{ \"{HOST}\" = \"{SECRET}\" }}");
    let own = [
        ("component.listen", "[\"127.0.0.1:0\"]"),
        ("component.hosts", hosts.as_str()),
    ];
    let blade = client::blade(&[&own[..], settings].concat());
    let port = port(&blade, 1);
    (blade, port)
}

/// Where the blade said that components may connect, at its start of this number.
fn port(blade: &Blade, start: usize) -> SocketAddr {
    let mut port = None;
    wait_until("the ports are told", Duration::from_secs(10), || {
        let log = blade.log();
        let mut lines = log
            .lines()
            .filter(|line| line.trim_start().starts_with("components "));
        let address = lines
            .nth(start - 1)
            .and_then(|line| line.split_whitespace().last());
        port = address.and_then(|address| address.parse().ok());
        port.is_some()
    });
    port.unwrap()
}

/// A connection whose header was answered, and the id of its stream.
fn opened(port: SocketAddr, host: &str) -> (Connection, String) {
    let mut connection = Connection::connect(port).expect("a connection");
    let id = open(&mut connection, host);
    (connection, id)
}

/// The id of the stream that is opened.
fn open(connection: &mut Connection, host: &str) -> String {
    let header = format!(
        "<?xml version='1.0'?><stream:stream to='{host}' xmlns='jabber:component:accept' \
         xmlns:stream='http://etherx.jabber.org/streams'>"
    );
    connection.send(header.as_bytes()).unwrap();
    let Ok(Some(Item::Header(answer))) = connection.next() else {
        panic!("no header")
    };
    let id = answer.to_string();
    let id = id.split("id='").nth(1).or_else(|| id.split("id=\"").nth(1));
    let id = id
        .and_then(|id| id.split(['\'', '"']).next())
        .expect("a stream id");
    id.to_owned()
}

/// Proves a secret; the server's answer, or nothing when it ended the stream.
fn shake(connection: &mut Connection, id: &str, secret: &str) -> Result<(), String> {
    let handshake = format!("<handshake>{}</handshake>", proof(id, secret));
    connection.send(handshake.as_bytes())?;
    match connection.next()? {
        Some(Item::Element(e)) if e.name == "handshake" => Ok(()),
        Some(Item::Element(e)) => Err(e.children[0].name.clone()),
        other => Err(format!("{other:?}")),
    }
}

fn join(port: SocketAddr, host: &str, secret: &str) -> Result<Connection, String> {
    let (mut connection, id) = opened(port, host);
    shake(&mut connection, &id, secret).map(|()| connection)
}

fn connect(port: SocketAddr) -> Connection {
    join(port, HOST, SECRET).expect("a handshake")
}

/// Sends every chat message that comes back to its sender, until `count` have come.
fn echo(component: &mut Connection, count: usize) {
    for _ in 0..count {
        let message = component.find(|e| e.name == "message").unwrap();
        let (from, to) = (
            message.attribute("from").unwrap(),
            message.attribute("to").unwrap(),
        );
        let text = body(&message).unwrap();
        let answer =
            format!("<message type='chat' from='{to}' to='{from}'><body>{text}</body></message>");
        component.send(answer.as_bytes()).unwrap();
    }
}

fn chat(to: &str, text: &str) -> String {
    format!("<message type='chat' to='{to}'><body>{text}</body></message>")
}

fn metric(blade: &Blade, name: &str) -> u64 {
    let (_, page) = blade.http_get("/metrics").expect("the metrics");
    let values = page.lines().filter_map(|line| {
        let (metric, value) = line.rsplit_once(' ')?;
        metric
            .starts_with(&format!("{name}{{"))
            .then(|| value.parse::<u64>().ok())?
    });
    values.sum()
}

#[test]
fn users_of_every_core_reach_a_component_wherever_it_is_connected() {
    let (blade, port) = start(&[]);
    let mut users: Vec<Client> = (0..8)
        .map(|n| {
            let name = format!("user{n}");
            Client::register(&blade, &name);
            Client::online(&blade, &name, "r")
        })
        .collect();
    // the kernel chooses the core of each connection
    for round in 0..4 {
        let mut component = connect(port);
        for user in &mut users {
            user.send(&chat(&format!("bot{round}@{HOST}/x"), "hello"));
        }
        echo(&mut component, users.len());
        for user in &mut users {
            assert_eq!(user.next_body(), "hello");
            user.send(&format!(
                "<iq type='get' id='q{round}' to='{HOST}'><query xmlns='x:y'/></iq>"
            ));
        }
        for _ in 0..users.len() {
            let iq = component.find(|e| e.name == "iq").unwrap();
            let answer = format!(
                "<iq type='result' id='{}' from='{HOST}' to='{}'><query xmlns='x:y'/></iq>",
                iq.attribute("id").unwrap(),
                iq.attribute("from").unwrap()
            );
            component.send(answer.as_bytes()).unwrap();
        }
        for user in &mut users {
            let id = format!("q{round}");
            user.find(|e| e.name == "iq" && e.attribute("id") == Some(&id));
        }
        let listed = blade.nitro(&["component", "list"], "");
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert!(
            listed.starts_with(HOST) && listed.contains("16 stanzas in, 16 out"),
            "{listed}"
        );
        component.send(b"</stream:stream>").unwrap();
        assert_eq!(ended(&mut component), None);
    }
    wait_until("four are counted", Duration::from_secs(10), || {
        metric(&blade, "nitro_component_connects_total") == 4
    });
}

#[test]
fn a_wrong_secret_is_held_back_and_refused_and_a_reload_changes_names_and_secrets() {
    let secrets = tempfile::tempdir().unwrap();
    let (file, config) = (
        secrets.path().join("secret"),
        secrets.path().join("nitro.toml"),
    );
    fs::write(&file, "first\n").unwrap();
    let hosts = format!(
        "{{ \"{HOST}\" = {{ secret_file = \"{}\" }} }}",
        file.display()
    );
    let (blade, port) = start(&[
        ("component.hosts", hosts.as_str()),
        ("limits.auth_failure_delay_ms", "300"),
    ]);
    fs::write(&config, "").unwrap();
    let begun = Instant::now();
    assert_eq!(
        join(port, HOST, "wrong").err().as_deref(),
        Some("not-authorized")
    );
    assert!(
        begun.elapsed() >= Duration::from_millis(290),
        "{:?}",
        begun.elapsed()
    );
    let begun = Instant::now();
    assert_eq!(
        join(port, HOST, "wrong").err().as_deref(),
        Some("not-authorized")
    );
    assert!(
        begun.elapsed() >= Duration::from_millis(590),
        "the second waits longer"
    );
    assert!(metric(&blade, "nitro_component_connects_total") == 0);
    let (mut unknown, _) = opened(port, "other.localhost");
    assert_eq!(ended(&mut unknown).as_deref(), Some("host-unknown"));
    let mut old = join(port, HOST, "first").expect("the secret in the file");
    let mut other = Connection::connect(port).unwrap();
    other.send(b"<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='x'>").unwrap();
    assert_eq!(ended(&mut other).as_deref(), Some("invalid-namespace"));

    fs::write(&file, "second\n").unwrap();
    blade.signal(libc::SIGHUP);
    wait_until("reloaded", Duration::from_secs(10), || {
        blade.log().contains("reloaded: certificate")
    });
    // the connection that stands goes on; the next one needs the new secret
    let text = format!(
        "<iq type='get' id='1' from='{HOST}' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>"
    );
    old.send(text.as_bytes()).unwrap();
    assert_eq!(old.answer("1").unwrap().attribute("type"), Some("result"));
    old.send(b"</stream:stream>").unwrap();
    assert_eq!(ended(&mut old), None);
    assert_eq!(
        join(port, HOST, "first").err().as_deref(),
        Some("not-authorized")
    );
    let _new = join(port, HOST, "second").expect("the new secret");
    assert_eq!(
        join(port, HOST, "second").err().as_deref(),
        Some("conflict")
    );

    // a file that is gone changes nothing
    fs::remove_file(&file).unwrap();
    blade.signal(libc::SIGHUP);
    wait_until("refused", Duration::from_secs(10), || {
        blade.log().contains("not reloaded: component.hosts")
    });
}

#[test]
fn a_component_that_dies_under_load_loses_nothing_that_its_kernel_did_not_take() {
    const ROUNDS: usize = 5;
    const BATCH: usize = 2000;
    let (blade, port) = start(&[
        ("component.policy", "\"replace\""),
        ("stream_management.unacked_bytes_max", "100000000"),
        ("stream_management.unacked_stanzas_max", "100000"),
        ("limits.send_queue_bytes_max", "100000000"),
    ]);
    Client::register(&blade, "alice");
    let mut alice = Client::online(&blade, "alice", "r");
    alice.enable_resumption();
    let (mut seen, mut returned) = (HashSet::new(), HashSet::new());
    let mut sent = 0;
    for round in 0..ROUNDS {
        let mut component = connect(port);
        let filler = "x".repeat(500);
        for n in 0..BATCH {
            alice.send(&chat(HOST, &format!("{} {filler}", sent + n)));
        }
        sent += BATCH;
        // it reads some and is killed in the middle; in the last round it lives
        let end = match round + 1 == ROUNDS {
            true => sent - 1,
            false => sent - BATCH + 300,
        };
        let mut last = None;
        while last.is_none_or(|last| last < end) {
            let number = number(&component.find(|e| e.name == "message").unwrap());
            assert!(
                last.replace(number).is_none_or(|last| last < number),
                "order"
            );
            assert!(seen.insert(number), "{number} came twice");
        }
        drop(component);
        wait_until("the end is noticed", Duration::from_secs(10), || {
            metric(&blade, "nitro_component_connections") == 0
        });
    }
    // every one of them is acknowledged: handed over, or returned before
    wait_until("all is decided", Duration::from_secs(20), || {
        alice.ask_h() as usize >= sent
    });
    while let Ok(Heard::Item(item)) = alice.connection.hear(Duration::from_millis(200)) {
        if let Item::Element(e) = item
            && e.name == "message"
        {
            assert_eq!(e.attribute("type"), Some("error"));
            assert!(returned.insert(number(&e)), "returned twice");
        }
    }
    assert!(seen.is_disjoint(&returned), "delivered and returned");
    // in the last round the component took all; before, what its kernel had and nobody read is gone, as XEP-0114 has it
    let last: HashSet<usize> = (sent - BATCH..sent).collect();
    assert!(last.is_subset(&seen));
    wait_until("all are counted", Duration::from_secs(10), || {
        let counted = ["returned", "unreachable", "slow_refused"]
            .map(|name| metric(&blade, &format!("nitro_component_{name}_total")) as usize);
        counted.iter().sum::<usize>() == returned.len()
            && metric(&blade, "nitro_component_queue_bytes") == 0
    });
}

#[test]
fn a_component_that_does_not_read_disturbs_nobody_and_is_cut_in_time() {
    let (blade, port) = start(&[
        ("component.queue_bytes_max", "300000"),
        ("component.timeout_seconds", "1"),
    ]);
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut alice = Client::online(&blade, "alice", "r");
    let mut bob = Client::online(&blade, "bob", "r");
    let component = connect(port);
    let filler = "y".repeat(20_000);
    let mut errors = 0;
    let is_error = |e: &Element, condition: &str| {
        e.attribute("type") == Some("error")
            && e.child("error")
                .is_some_and(|error| error.child(condition).is_some())
    };
    // its kernel and ours take some megabytes before anything waits
    let until = Instant::now() + Duration::from_secs(60);
    while errors == 0 {
        assert!(Instant::now() < until, "nothing was refused");
        for _ in 0..20 {
            alice.send(&chat(HOST, &filler));
        }
        alice.settle();
        errors += alice
            .connection
            .unread()
            .filter(|item| matches!(item, Item::Element(e) if is_error(e, "resource-constraint") || is_error(e, "remote-server-timeout")))
            .count();
        alice.send(&chat("bob@localhost", "still here"));
        assert_eq!(bob.next_body(), "still here");
        bob.connection.forget();
    }
    wait_until("it is cut", Duration::from_secs(20), || {
        metric(&blade, "nitro_component_connections") == 0
    });
    assert_eq!(metric(&blade, "nitro_component_queue_bytes"), 0);
    alice.find(|e| is_error(e, "remote-server-timeout"));
    drop(component);
    let mut component = connect(port);
    alice.connection.forget();
    alice.send(&chat(HOST, "again"));
    echo(&mut component, 1);
    let echoed = alice.find(|e| e.name == "message" && e.attribute("type") == Some("chat"));
    assert_eq!(body(&echoed).as_deref(), Some("again"));
}

#[test]
fn a_stop_tells_components_and_a_restart_lets_them_in_again() {
    let (mut blade, port) = start(&[]);
    let mut component = connect(port);
    let mut half = opened(port, HOST).0;
    blade.signal(libc::SIGTERM);
    assert_eq!(ended(&mut component).as_deref(), Some("system-shutdown"));
    assert_eq!(ended(&mut half).as_deref(), Some("system-shutdown"));
    assert!(blade.wait(blade::STOPPED_WITHIN).success());
    blade.restart();
    let port = self::port(&blade, 2);
    connect(port);
}

/// The app server gets what a message for bob makes nitro say; bob's name is in it.
fn notified(component: &mut Connection) -> String {
    let push = component.find(|e| e.name == "iq" && e.attribute("type") == Some("set"));
    let push = push.expect("a notification");
    let answer = format!(
        "<iq type='result' id='{}' from='{HOST}' to='{}'/>",
        push.attribute("id").unwrap(),
        push.attribute("from").unwrap()
    );
    component.send(answer.as_bytes()).unwrap();
    let publish = &push.children[0].children[0];
    publish.attribute("node").unwrap().to_owned()
}

#[test]
fn push_services_survive_kill_9_and_a_user_is_told_wherever_he_lives() {
    let (mut blade, port) = start(&[]);
    let mut component = connect(port);
    let names: Vec<String> = (0..4).map(|n| format!("phone{n}")).collect();
    Client::register(&blade, "alice");
    for name in &names {
        Client::register(&blade, name);
        let mut phone = Client::online(&blade, name, "r");
        phone.send(&format!(
            "<iq type='set' id='e'><enable xmlns='urn:xmpp:push:0' jid='{HOST}' node='{name}'/></iq>"
        ));
        let answer = phone.find(|e| e.attribute("id") == Some("e"));
        assert_eq!(answer.attribute("type"), Some("result"));
    }
    // answered: so they are there after this
    blade.kill();
    drop(component);
    blade.restart();
    let port = self::port(&blade, 2);
    component = connect(port);
    let mut alice = Client::online(&blade, "alice", "r");
    for _ in 0..3 {
        for name in &names {
            alice.send(&chat(&format!("{name}@localhost"), "Wherefore art thou?"));
        }
    }
    let mut told: Vec<String> = names.iter().map(|_| notified(&mut component)).collect();
    told.sort();
    assert_eq!(told, names);
    alice.settle();
    wait_until("four are counted", Duration::from_secs(10), || {
        metric(&blade, "nitro_push_sent_total") == 4
    });
}

#[test]
fn what_was_open_at_a_crash_reaches_the_component_when_it_comes_back() {
    let (mut blade, port) = start(&[]);
    Client::register(&blade, "alice");
    let mut alice = Client::online(&blade, "alice", "r");
    let mut component = connect(port);
    let filler = "y".repeat(50_000);
    let mut sent = 0;
    // its kernel and ours take some megabytes before anything waits
    while metric(&blade, "nitro_component_queue_bytes") < 200_000 {
        assert!(sent < 2_000, "nothing waits");
        for _ in 0..4 {
            alice.send(&chat(HOST, &format!("{sent} {filler}")));
            sent += 1;
        }
        alice.settle();
        wait_until("they are durable", Duration::from_secs(20), || {
            metric(&blade, "nitro_component_stanzas_out_total") == sent
        });
    }
    assert_eq!(alice.unread_messages(), 0, "nothing was refused");
    blade.kill();
    let mut came = HashSet::new();
    while let Ok(Some(item)) = component.next() {
        if let Item::Element(e) = &item
            && e.name == "message"
        {
            came.insert(number(e));
        }
    }
    assert!((came.len() as u64) < sent, "all were read before the crash");
    blade.restart();
    let mut component = connect(self::port(&blade, 2));
    let mut last = None;
    while (came.len() as u64) < sent {
        let now = number(&component.find(|e| e.name == "message").unwrap());
        assert!(last < Some(now), "in order");
        last = Some(now);
        came.insert(now);
    }
}

#[test]
fn an_operator_ends_the_connections_of_a_name() {
    let (blade, port) = start(&[("component.policy", "\"share\"")]);
    let mut both = [connect(port), connect(port)];
    let nitro = |arguments: &[&str]| {
        let output = blade.nitro(arguments, "");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    assert!(!nitro(&["component", "kick", "other.localhost"]).0);
    assert_eq!(
        nitro(&["component", "kick", "ECHO.localhost"]),
        (true, "2 ended\n".into())
    );
    for component in &mut both {
        assert_eq!(ended(component).as_deref(), Some("policy-violation"));
    }
    // it may come back
    connect(port);
}

#[test]
fn a_trusted_proxy_says_for_whom_it_speaks() {
    let (blade, port) = start(&[
        ("component.proxy", "true"),
        ("trusted_proxies", "[\"127.0.0.1/32\"]"),
    ]);
    let mut component = Connection::connect(port).unwrap();
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    header.extend([192, 0, 2, 7, 127, 0, 0, 1, 0x30, 0x39, 0x14, 0xe3]);
    // in two pieces, and the stream behind it
    component.send(&header[..9]).unwrap();
    component.send(&header[9..]).unwrap();
    let id = open(&mut component, HOST);
    shake(&mut component, &id, SECRET).unwrap();
    let list = String::from_utf8(blade.nitro(&["component", "list"], "").stdout).unwrap();
    assert!(list.contains("192.0.2.7:12345"), "{list}");
    // without one it is nobody
    let mut bare = Connection::connect(port).unwrap();
    bare.send(format!("<stream:stream to='{HOST}' xmlns='jabber:component:accept'>").as_bytes())
        .unwrap();
    assert!(!matches!(bare.next(), Ok(Some(_))));
}
