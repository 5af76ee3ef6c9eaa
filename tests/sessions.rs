//! Sessions: where they live, what survives a cut connection or a killed server, how dead clients are found.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::fs;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use blade::{Blade, DOMAIN};
use client::connection::Connection;
use client::xml::{Element, Item};
use client::{Client, PASSWORD, authenticated, body, number, resume};
use nitro::store::ring::Ring;

/// Adds `prefix0`, `prefix1` … and makes each pair in `contacts` mutual contacts.
fn import(blade: &Blade, prefix: &str, count: usize, contacts: &[(usize, usize)]) {
    let accounts = blade.folder().join("accounts.csv");
    let rosters = blade.folder().join("rosters.csv");
    let rows: String = (0..count)
        .map(|n| format!("{prefix}{n},{PASSWORD}\n"))
        .collect();
    fs::write(&accounts, format!("username,password\n{rows}")).unwrap();
    let rows: String = contacts
        .iter()
        .map(|(one, other)| format!("{prefix}{one},{prefix}{other}\n"))
        .collect();
    fs::write(&rosters, format!("username,contact\n{rows}")).unwrap();
    let output = blade.nitro(
        &[
            "user",
            "import",
            accounts.to_str().unwrap(),
            "--rosters",
            rosters.to_str().unwrap(),
        ],
        "",
    );
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn message(to: &str, text: &str) -> String {
    format!("<message type='chat' to='{to}'><body>{text}</body></message>")
}

#[test]
fn every_session_lives_on_its_users_owner_and_both_shards_have_some() {
    const USERS: usize = 120;
    let blade = client::blade(&[]);
    import(&blade, "u", USERS, &[]);
    let held: Vec<Client> = (0..USERS)
        .map(|n| Client::bind(&blade, &format!("u{n}"), "r"))
        .collect();
    let log = blade.log();
    let (_, shards) = log.split_once(" with ").unwrap();
    let shards: usize = shards.split(' ').next().unwrap().parse().unwrap();
    let ring = Ring::of_shards(shards);
    let output = blade.nitro(&["session", "list"], "");
    let list = String::from_utf8(output.stdout).unwrap();
    assert_eq!(list.lines().count(), USERS);
    let mut filled = vec![0; shards];
    for line in list.lines() {
        let name = line.split('@').next().unwrap();
        let (_, shard) = line.split_once("shard ").unwrap();
        let shard: usize = shard.split(' ').next().unwrap().parse().unwrap();
        assert_eq!(shard, ring.owner(name), "{line}");
        filled[shard] += 1;
    }
    assert!(filled.iter().all(|n| *n > 0), "{filled:?}");
    drop(held);
}

/// A client that counts what it was sent, as XEP-0198 wants it.
struct Counting {
    connection: Connection,
    h: u32,
    bodies: Vec<String>,
}

impl Counting {
    /// Takes one item; false at the end of the connection.
    fn take(&mut self) -> bool {
        match self.connection.next() {
            Ok(Some(Item::Element(element))) => {
                self.count(&element);
                true
            }
            Ok(Some(_)) => true,
            Ok(None) => false,
            Err(why) => panic!("after {} messages: {why}", self.bodies.len()),
        }
    }

    fn count(&mut self, element: &Element) {
        match element.name.as_str() {
            "message" | "presence" | "iq" => self.h = self.h.wrapping_add(1),
            "r" => {
                let ack = format!("<a xmlns='urn:xmpp:sm:3' h='{}'/>", self.h);
                self.connection.send_rudely(ack.as_bytes());
            }
            _ => {}
        }
        if element.name == "message" {
            self.bodies.push(body(element).expect("a body"));
        }
    }
}

#[test]
fn a_cut_stream_resumes_again_and_again_without_loss_doubling_or_reordering() {
    const CUTS: usize = 20;
    const BETWEEN: usize = 40;
    const COUNT: usize = (CUTS + 1) * BETWEEN;
    let blade = client::blade(&[]);
    import(&blade, "u", 2, &[]);
    let mut bob = Client::bind(&blade, "u1", "b");
    let previd = bob.enable_resumption();
    bob.send("<presence/>");
    let to = bob.jid.clone();
    let mut bob = Counting {
        connection: bob.connection,
        h: 0,
        bodies: Vec::new(),
    };
    let mut alice = Client::online(&blade, "u0", "a");
    let sender = std::thread::spawn(move || {
        for n in 0..COUNT {
            // full and bare JID by turns: they must not overtake one another
            let bare = to.split('/').next().unwrap();
            alice.send(&message(
                if n % 2 == 0 { &to } else { bare },
                &n.to_string(),
            ));
            if n % 16 == 15 {
                alice.settle();
            }
        }
        alice
    });
    for cut in 1..=CUTS {
        while bob.bodies.len() < cut * BETWEEN {
            assert!(bob.take(), "the connection ended");
        }
        // with and without a word, with unread bytes on the way
        if cut % 2 == 0 {
            let _ = bob.connection.socket().shutdown(Shutdown::Both);
        }
        let mut connection = authenticated(blade.c2s, "u1", PASSWORD).unwrap();
        assert!(
            resume(&mut connection, &previd, bob.h).is_some(),
            "cut {cut}"
        );
        bob.connection = connection;
    }
    while bob.bodies.len() < COUNT {
        assert!(bob.take(), "the connection ended");
    }
    let expected: Vec<String> = (0..COUNT).map(|n| n.to_string()).collect();
    assert_eq!(bob.bodies, expected);
    let mut alice = sender.join().expect("the sender");
    alice.settle();
    assert_eq!(alice.unread_messages(), 0, "a message came back");
}

#[test]
fn the_count_of_handled_stanzas_is_exact_and_what_it_covers_survives_a_kill() {
    const COUNT: usize = 60;
    let mut blade = client::blade(&[]);
    import(&blade, "u", 6, &[]);
    let mut alice = Client::online(&blade, "u0", "a");
    alice.enable_resumption();
    assert_eq!(alice.ask_h(), 0);
    let mut sent = 0;
    for n in 0..COUNT {
        // five recipients off line, on both shards; other stanzas between them
        alice.send(&message(
            &format!("u{}@{DOMAIN}", 1 + n % 5),
            &n.to_string(),
        ));
        sent += 1;
        if n % 3 == 0 {
            alice.send("<presence><status>s</status></presence>");
            alice.send("<iq type='get' id='x'><ping xmlns='urn:xmpp:ping'/></iq>");
            alice.send(" ");
            sent += 2;
        }
    }
    assert_eq!(alice.ask_h(), sent);
    blade.kill();
    blade.restart();
    for recipient in 1..=5 {
        let mut client = Client::bind(&blade, &format!("u{recipient}"), "r");
        client.send("<presence/>");
        for n in (0..COUNT).filter(|n| 1 + n % 5 == recipient) {
            assert_eq!(client.next_body(), n.to_string());
        }
    }
}

#[test]
fn what_was_answered_survives_a_kill_right_after_the_answer() {
    let mut blade = client::blade(&[]);
    for round in 0..3 {
        let name = format!("u{round}");
        Client::register(&blade, &name);
        blade.kill();
        blade.restart();
        let mut client = Client::bind(&blade, &name, "a");
        let answer = client
            .connection
            .request(
                "<iq type='set' id='{id}'><query xmlns='jabber:iq:roster'><item jid='x@example.com' name='X'>\
                 <group>g</group></item></query></iq>",
            )
            .unwrap();
        assert_eq!(answer.attribute("type"), Some("result"), "{answer}");
        blade.kill();
        blade.restart();
        let mut client = Client::bind(&blade, &name, "a");
        let roster = client
            .connection
            .request("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>")
            .unwrap();
        let item = roster.child("query").and_then(|query| query.child("item"));
        let item = item.unwrap_or_else(|| panic!("{roster}"));
        assert_eq!(item.attribute("name"), Some("X"), "{roster}");
        let answer = client.connection.request(
            "<iq type='set' id='{id}'><query xmlns='jabber:iq:register'><remove/></query></iq>",
        );
        drop(answer);
        blade.kill();
        blade.restart();
        let gone = authenticated(blade.c2s, &name, PASSWORD).map(drop);
        assert_eq!(gone, Err("not-authorized".to_owned()));
    }
}

#[test]
fn a_dead_client_is_found_by_ping_and_a_living_one_is_left_alone() {
    let blade = client::blade(&[("ping.idle_seconds", "10"), ("ping.timeout_seconds", "1")]);
    import(&blade, "u", 2, &[]);
    let mut dead = Client::online(&blade, "u0", "dead");
    let begun = Instant::now();
    let mut living = Client::online(&blade, "u1", "living");
    let ping = |client: &mut Client| {
        // `find` waits ten seconds, the server's pause
        let is_ping = |e: &Element| e.name == "iq" && e.child("ping").is_some();
        let found = client.connection.find(is_ping);
        found.or_else(|_| client.connection.find(is_ping))
    };
    let asked = ping(&mut living).expect("a ping");
    let id = asked.attribute("id").unwrap();
    living.send(&format!("<iq type='result' to='{DOMAIN}' id='{id}'/>"));
    assert_eq!(dead.ends().as_deref(), Some("connection-timeout"));
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_secs(10) && took < Duration::from_secs(16),
        "{took:?}"
    );
    living.settle();
}

#[test]
fn an_inactive_client_gets_presence_before_the_message_behind_it() {
    let blade = client::blade(&[]);
    import(&blade, "u", 2, &[(0, 1)]);
    let mut alice = Client::online(&blade, "u0", "a");
    let mut bob = Client::online(&blade, "u1", "b");
    alice.settle();
    bob.settle();
    bob.connection.forget();
    bob.send("<inactive xmlns='urn:xmpp:csi:0'/>");
    bob.settle();
    bob.connection.forget();
    for round in 0..5 {
        for n in 0..3 {
            alice.send(&format!(
                "<presence><status>{round}-{n}</status></presence>"
            ));
        }
        alice.send(&message(&bob.jid, &format!("after {round}")));
        let mut status = None;
        loop {
            let element = bob.connection.next_element().unwrap();
            match element.name.as_str() {
                "presence" => status = element.child("status").map(|s| s.text.clone()),
                "message" => {
                    assert_eq!(
                        body(&element).as_deref(),
                        Some(format!("after {round}").as_str())
                    );
                    break;
                }
                other => panic!("{other}"),
            }
        }
        assert_eq!(status.as_deref(), Some(format!("{round}-2").as_str()));
    }
}

#[test]
fn carbons_keep_the_order_of_a_conversation_even_for_an_inactive_client() {
    const COUNT: usize = 100;
    let blade = client::blade(&[]);
    import(&blade, "u", 2, &[]);
    let mut alice = Client::online(&blade, "u0", "a");
    let mut desk = Client::online(&blade, "u1", "desk");
    let mut phone = Client::online(&blade, "u1", "phone");
    let enabled = phone
        .connection
        .request("<iq type='set' id='{id}'><enable xmlns='urn:xmpp:carbons:2'/></iq>")
        .unwrap();
    assert_eq!(enabled.attribute("type"), Some("result"), "{enabled}");
    phone.send("<inactive xmlns='urn:xmpp:csi:0'/>");
    phone.settle();
    for n in 0..COUNT {
        match n % 2 {
            0 => {
                alice.send(&message(&desk.jid, &n.to_string()));
                assert_eq!(desk.next_body(), n.to_string());
            }
            _ => {
                desk.send(&message(&alice.jid, &n.to_string()));
                assert_eq!(alice.next_body(), n.to_string());
            }
        }
    }
    phone.send("<active xmlns='urn:xmpp:csi:0'/>");
    for n in 0..COUNT {
        let carbon = phone.find(|e| e.name == "message");
        let wrapper = carbon.child(if n % 2 == 0 { "received" } else { "sent" });
        let inner = wrapper
            .and_then(|w| w.child("forwarded"))
            .and_then(|f| f.child("message"))
            .unwrap_or_else(|| panic!("{n}: {carbon}"));
        assert_eq!(body(inner), Some(n.to_string()));
    }
}

/// More than kernels hold for a peer that does not read, so much of it is on its way when the stream ends.
#[test]
fn who_logs_out_without_stream_management_while_messages_are_on_their_way_gets_each_once() {
    const MESSAGES: usize = 80;
    let blade = client::blade(&[]);
    import(&blade, "u", 2, &[(0, 1)]);
    for reads in [true, false] {
        let mut alice = Client::online(&blade, "u0", "a");
        alice.enable_resumption();
        let mut bob = Client::online(&blade, "u1", "b");
        let long = "x".repeat(8 << 10);
        for n in 0..MESSAGES {
            alice.send(&message(&bob.jid, &format!("{n} {long}")));
        }
        alice.ask_h();
        bob.send("</stream:stream>");
        let mut got = Vec::new();
        while reads && let Ok(Some(item)) = bob.connection.next() {
            match item {
                Item::Element(element) if element.name == "message" => got.push(number(&element)),
                Item::Element(_) => {}
                _ => break,
            }
        }
        if reads {
            assert!(!got.is_empty(), "nothing was on its way");
        }
        // with unread bytes, if he has not read: the kernel resets the connection
        drop(bob);
        let mut bob = Client::online(&blade, "u1", "b");
        while got.len() < MESSAGES {
            got.push(number(&bob.find(|e| e.name == "message")));
        }
        bob.settle();
        assert_eq!(bob.unread_messages(), 0, "{reads}");
        got.sort_unstable();
        assert_eq!(got, (0..MESSAGES).collect::<Vec<_>>(), "{reads}");
        for client in [&mut alice, &mut bob] {
            client.send("</stream:stream>");
            assert_eq!(client.ends(), None);
        }
    }
}

#[test]
fn whoever_leaves_the_cache_between_log_in_and_binding_is_loaded_again() {
    const OTHERS: usize = 8_000;
    let blade = client::blade(&[("cache.bytes_max", "1_048_576")]);
    import(&blade, "u", 2, &[]);
    let mut slow = authenticated(blade.c2s, "u0", PASSWORD).unwrap();
    // whoever is asked for is cached, also if there is no such account
    let mut busy = Client::bind(&blade, "u1", "r");
    for part in 0..OTHERS / 500 {
        let ask = |n: usize| {
            format!(
                "<iq type='get' id='{n}' to='nobody{n}@{DOMAIN}'><query xmlns='jabber:iq:last'/></iq>"
            )
        };
        let all: String = (part * 500..(part + 1) * 500).map(ask).collect();
        busy.send(&all);
        for _ in 0..500 {
            busy.find(|e| e.name == "iq");
        }
    }
    // shards tell their figures a few times a second
    client::wait_until("users to leave the cache", Duration::from_secs(10), || {
        let (_, metrics) = blade.http_get("/metrics").unwrap();
        let evictions = metrics
            .lines()
            .filter_map(|line| {
                line.strip_prefix("nitro_cache_evictions")?
                    .split(' ')
                    .nth(1)
            })
            .map(|count| count.parse::<usize>().unwrap());
        evictions.sum::<usize>() > OTHERS / 4
    });
    let jid = slow.bind("r").expect("binding");
    assert_eq!(jid, format!("u0@{DOMAIN}/r"));
}
