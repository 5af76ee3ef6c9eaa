//! A blade with MariaDB and four redis-servers that holds a thousand users: what bots find on its public port.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;
#[allow(clippy::duplicate_mod)] // the client is built on the dialogues' connection, too
#[path = "dialogue/mod.rs"]
mod dialogue;
#[path = "fixture/mod.rs"]
mod fixture;
#[path = "servers/mariadb.rs"]
mod mariadb;
#[path = "servers/redis.rs"]
mod redis;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use client::{Client, body};
use dialogue::script::Transport;
use mariadb::Mariadb;
use redis::Redis;

use fixture::{CONTACTS, Cluster, HISTORY, USERS};

/// Users who are looked at: some at the ends of desks and of the ring.
const SAMPLE: [usize; 8] = [0, 1, 49, 50, 333, 500, 998, 999];

#[test]
fn a_populated_cluster_serves_its_users_before_and_after_a_kill_of_every_tier() {
    let mut cluster = Cluster::start();
    everybody_finds_what_is_his(&cluster);
    contacts_see_and_hear_each_other(&cluster, 123);
    scripts_run(&cluster);
    cluster.blade.kill();
    cluster.blade.restart();
    everybody_finds_what_is_his(&cluster);
    // Redis comes back empty
    for redis in &mut cluster.redis {
        redis.kill();
        redis.restart();
    }
    contacts_see_and_hear_each_other(&cluster, 456);
    if let Some(mariadb) = &mut cluster.mariadb {
        mariadb.kill();
        mariadb.restart();
    }
    contacts_see_and_hear_each_other(&cluster, 789);
    everybody_finds_what_is_his(&cluster);
}

#[test]
fn the_real_servers_are_killed_hang_and_come_back() {
    let mut redis = Redis::start().expect("Redis is not installed: apt-get install redis-server");
    assert_eq!(redis.command("SET key value").as_deref(), Some("+OK\r\n"));
    redis.stop();
    let pid = redis.pid();
    redis.go_on();
    assert_eq!(redis.command("GET key").as_deref(), Some("$5\r\nvalue\r\n"));
    redis.kill();
    assert_eq!(redis.command("PING"), None);
    redis.restart();
    assert_ne!(redis.pid(), pid);
    // it keeps nothing on disk
    assert_eq!(redis.command("GET key").as_deref(), Some("$-1\r\n"));

    let mut mariadb =
        Mariadb::start().expect("MariaDB is not installed: apt-get install mariadb-server");
    mariadb.sql("CREATE TABLE nitro.kept (n INT PRIMARY KEY); INSERT INTO nitro.kept VALUES (7)");
    mariadb.stop();
    mariadb.go_on();
    mariadb.kill();
    mariadb.restart();
    assert!(
        !mariadb.try_sql("INSERT INTO nitro.kept VALUES (7)"),
        "the row is there"
    );
}

fn everybody_finds_what_is_his(cluster: &Cluster) {
    for user in SAMPLE {
        let mut client = cluster.online(user, "bot");
        roster_is_whole(&mut client, user);
        history_is_whole(&mut client, user);
        let waiting = client.connection.unread().count();
        client.settle();
        assert_eq!(
            client.unread_messages(),
            0,
            "{user} was sent old messages ({waiting} waited)"
        );
    }
}

fn roster_is_whole(client: &mut Client, user: usize) {
    let answer = client
        .connection
        .request("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>")
        .unwrap();
    let items = &answer.child("query").expect("a roster").children;
    let found: BTreeSet<&str> = items
        .iter()
        .filter(|item| item.attribute("subscription") == Some("both"))
        .filter_map(|item| item.attribute("jid"))
        .collect();
    let wanted: BTreeSet<String> = Cluster::contacts(user).map(Cluster::jid).collect();
    assert_eq!(wanted.len(), CONTACTS);
    assert!(
        found.iter().copied().eq(wanted.iter().map(String::as_str)),
        "{answer}"
    );
}

/// All that the user said to his partner stands in his archive, once and in order (XEP-0313).
fn history_is_whole(client: &mut Client, user: usize) {
    let with = Cluster::jid(Cluster::partner(user));
    let query = format!(
        "<iq type='set' id='{{id}}'><query xmlns='urn:xmpp:mam:2' queryid='{user}'>\
         <x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'><value>urn:xmpp:mam:2</value></field>\
         <field var='with'><value>{with}</value></field></x>\
         <set xmlns='http://jabber.org/protocol/rsm'><max>100</max></set></query></iq>"
    );
    client.connection.forget();
    let fin = client.connection.request(&query).unwrap();
    let fin = fin.child("fin").unwrap_or_else(|| panic!("{fin}"));
    assert_eq!(fin.attribute("complete"), Some("true"), "{fin}");
    let mut lines = Vec::new();
    for item in client.connection.unread() {
        let client::xml::Item::Element(element) = item else {
            continue;
        };
        let message = element
            .child("result")
            .and_then(|result| result.child("forwarded"))
            .and_then(|forwarded| forwarded.child("message"));
        lines.extend(message.and_then(body));
    }
    client.connection.forget();
    lines.retain(|line| line.starts_with(&Cluster::name(user)));
    let wanted: Vec<String> = (0..HISTORY)
        .map(|number| Cluster::line(user, number))
        .collect();
    assert_eq!(lines, wanted);
}

fn contacts_see_and_hear_each_other(cluster: &Cluster, user: usize) {
    let other = (user + CONTACTS / 2) % USERS;
    let mut one = cluster.online(user, "bot");
    let mut two = cluster.online(other, "bot");
    let (first, second) = (one.jid.clone(), two.jid.clone());
    one.find(|e| e.name == "presence" && e.attribute("from") == Some(&second));
    two.find(|e| e.name == "presence" && e.attribute("from") == Some(&first));
    for number in 0..10 {
        let text = format!("live {number}");
        one.send(&format!(
            "<message type='chat' to='{}'><body>{text}</body></message>",
            Cluster::jid(other)
        ));
        assert_eq!(two.next_body(), text);
    }
    // who was never on line gets it when he comes
    let absent = (other + 1) % USERS;
    one.send(&format!(
        "<message type='chat' to='{}'><body>for later</body></message>",
        Cluster::jid(absent)
    ));
    one.settle();
    let mut late = cluster.online(absent, "bot");
    assert_eq!(late.next_body(), "for later");
    late.settle();
}

/// Every dialogue of `tests/dialogues` that goes by TCP in the clear, with accounts of its own among the thousand.
fn scripts_run(cluster: &Cluster) {
    const AT_ONCE: usize = 8;
    let files: Vec<PathBuf> =
        fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dialogues"))
            .expect("tests/dialogues")
            .map(|entry| entry.expect("an entry of tests/dialogues").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "dlg"))
            .collect();
    let (waiting, failed) = (
        Mutex::new(files.into_iter().enumerate()),
        Mutex::new(Vec::new()),
    );
    let play_some = || {
        loop {
            let Some((number, file)) = waiting.lock().unwrap().next() else {
                return;
            };
            let server = dialogue::run::Server {
                address: cluster.blade.c2s,
                domain: blade::DOMAIN.to_owned(),
                over: dialogue::run::Over::Tcp,
            };
            let text = fs::read_to_string(&file).expect("the dialogue");
            let played = dialogue::script::parse(&text).and_then(|script| {
                let plays = script.plays_over(Transport::Tcp) && !script.tls;
                match plays {
                    true => dialogue::run::play(&script, &server, &format!("c{number}")),
                    false => Ok(()),
                }
            });
            if let Err(why) = played {
                failed
                    .lock()
                    .unwrap()
                    .push(format!("{}: {why}", file.display()));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(play_some);
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
