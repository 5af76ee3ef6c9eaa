//! `kill -9` while people talk in a room: what the server has acknowledged is in the room's archive, once and in order, and the
//! room is as its owner has left it.
//!
//! `NITRO_LONG=1` for more kills.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;
#[path = "servers/mariadb.rs"]
mod mariadb;
#[path = "servers/redis.rs"]
mod redis;

use std::collections::BTreeMap;
use std::time::Duration;

use blade::Blade;
use client::Client;
use client::xml::Element;
use mariadb::Mariadb;
use redis::Redis;

const ROOM: &str = "desk@rooms.localhost";
const SENDERS: usize = 4;
const NS_OWNER: &str = "http://jabber.org/protocol/muc#owner";

/// Talks until the connection ends; how many messages were acknowledged.
fn talk(mut sender: Client, round: u32, number: usize) -> u32 {
    let mut acknowledged = 0;
    let mut said = 0;
    loop {
        let mut burst = String::new();
        for _ in 0..7 {
            burst += &format!(
                "<message type='groupchat' to='{ROOM}'><body>{round}-{number}-{said}</body></message>"
            );
            said += 1;
        }
        burst += "<r xmlns='urn:xmpp:sm:3'/>";
        let sent = sender.connection.send(burst.as_bytes());
        let answer = sent.and_then(|()| sender.connection.find(|e| e.name == "a"));
        match answer {
            // the presence with which he came in is one
            Ok(answer) => acknowledged = client::h(&answer) - 1,
            Err(_) => return acknowledged,
        }
    }
}

fn join(client: &mut Client, nick: &str) {
    client.send(&format!(
        "<presence to='{ROOM}/{nick}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
    ));
    client.find(|e| e.name == "message" && e.child("subject").is_some());
}

/// All bodies in the room's archive, in its order.
fn archive(reader: &mut Client) -> Vec<String> {
    let mut bodies = Vec::new();
    let mut after = String::new();
    loop {
        reader.send(&format!(
            "<iq type='set' id='page' to='{ROOM}'><query xmlns='urn:xmpp:mam:2'>\
             <set xmlns='http://jabber.org/protocol/rsm'><max>200</max>{after}</set></query></iq>"
        ));
        loop {
            let element = reader.find(|e| e.name == "message" || e.name == "iq");
            if let Some(result) = element.child("result") {
                let message = result.child("forwarded").and_then(|f| f.child("message"));
                bodies.extend(message.and_then(client::body));
            } else if element.attribute("id") == Some("page") {
                let fin = element.child("fin").expect("a page");
                if fin.attribute("complete") == Some("true") {
                    return bodies;
                }
                let last = fin.child("set").and_then(|set| set.child("last"));
                let last = &last.expect("a page that is not the last one").text;
                after = format!("<after>{last}</after>");
                break;
            }
        }
    }
}

fn field<'e>(form: &'e Element, var: &str) -> Option<&'e str> {
    let mut fields = form.children.iter();
    let field = fields.find(|f| f.attribute("var") == Some(var))?;
    Some(&field.child("value")?.text)
}

#[test]
fn what_was_said_in_a_room_and_acknowledged_survives_kill_minus_9() {
    survives(&[], &mut []);
}

#[test]
fn the_same_on_mariadb_and_four_redis_servers_that_lose_all_meanwhile() {
    let redis: Option<Vec<Redis>> = (0..4).map(|_| Redis::start()).collect();
    let (Some(mariadb), Some(mut redis)) = (Mariadb::start(), redis) else {
        eprintln!(
            "skipped: MariaDB and Redis are needed (apt-get install mariadb-server redis-server)"
        );
        return;
    };
    let instances: Vec<String> = redis.iter().map(|one| format!("{:?}", one.url())).collect();
    let instances = format!("[{}]", instances.join(","));
    let database = format!("{:?}", mariadb.url());
    let settings = [
        ("database", &*database),
        ("redis.instances", &*instances),
        ("redis.pause_ms_max", "200"),
    ];
    survives(&settings, &mut redis);
}

/// The Redis servers are killed with the blade, in turn, and come back empty.
fn survives(settings: &[(&str, &str)], redis: &mut [Redis]) {
    let own = [("rooms.messages_per_second_max", "1000000")];
    let mut blade: Blade = client::blade(&[&own[..], settings].concat());
    let owner_name = "owner";
    Client::register(&blade, owner_name);
    for number in 0..SENDERS {
        Client::register(&blade, &format!("sender{number}"));
    }
    let mut owner = Client::online(&blade, owner_name, "r");
    join(&mut owner, "Owner");
    owner.send(&format!(
        "<iq type='set' id='c' to='{ROOM}'><query xmlns='{NS_OWNER}'><x xmlns='jabber:x:data' type='submit'>\
         <field var='muc#roomconfig_persistentroom'><value>1</value></field>\
         <field var='muc#roomconfig_roomname'><value>Desk</value></field></x></query></iq>"
    ));
    let answer = owner.find(|e| e.name == "iq" && e.attribute("id") == Some("c"));
    assert_eq!(answer.attribute("type"), Some("result"), "{answer}");
    drop(owner);

    let kills = if std::env::var_os("NITRO_LONG").is_some() {
        40
    } else {
        3
    };
    let mut promised: BTreeMap<(u32, usize), u32> = BTreeMap::new();
    let mut rng = fastrand::Rng::with_seed(7);
    for round in 0..kills {
        let senders: Vec<Client> = (0..SENDERS)
            .map(|number| {
                let mut sender = Client::online(&blade, &format!("sender{number}"), "r");
                sender.enable_resumption();
                join(&mut sender, &format!("S{number}"));
                sender
            })
            .collect();
        let threads: Vec<_> = senders
            .into_iter()
            .enumerate()
            .map(|(number, sender)| std::thread::spawn(move || talk(sender, round, number)))
            .collect();
        // the load that the kill falls into
        std::thread::sleep(Duration::from_millis(rng.u64(150..900)));
        if !redis.is_empty() {
            redis[round as usize % 4].kill();
        }
        blade.kill();
        if !redis.is_empty() {
            redis[round as usize % 4].restart();
        }
        for (number, thread) in threads.into_iter().enumerate() {
            promised.insert((round, number), thread.join().unwrap());
        }
        blade.restart();
    }
    let mut reader = Client::online(&blade, owner_name, "r");
    // nobody has been in since the start, and it is listed
    client::wait_until("the list of rooms", Duration::from_secs(20), || {
        let list = "<iq type='get' id='{id}' to='rooms.localhost'>\
                    <query xmlns='http://jabber.org/protocol/disco#items'/></iq>";
        let answer = reader.connection.request(list).expect("an answer");
        let items = answer.child("query").map_or(&[][..], |q| &q.children[..]);
        items.iter().any(|item| item.attribute("jid") == Some(ROOM))
    });
    let kept = archive(&mut reader);
    for ((round, number), acknowledged) in &promised {
        let prefix = format!("{round}-{number}-");
        let own = kept.iter().filter_map(|body| body.strip_prefix(&prefix));
        let own: Vec<u32> = own.map(|n| n.parse().unwrap()).collect();
        let wanted: Vec<u32> = (0..own.len() as u32).collect();
        assert_eq!(own, wanted, "of {prefix}: once, in order, without holes");
        assert!(
            own.len() as u32 >= *acknowledged,
            "{prefix}: {acknowledged} were acknowledged, {} are there",
            own.len()
        );
    }
    let all: u32 = promised.values().sum();
    assert!(
        all >= kills * 20,
        "only {all} messages were acknowledged: that proves nothing"
    );
    // the room is as it was left
    reader.send(&format!(
        "<iq type='get' id='f' to='{ROOM}'><query xmlns='{NS_OWNER}'/></iq>"
    ));
    let form = reader.find(|e| e.name == "iq" && e.attribute("id") == Some("f"));
    let form = form.child("query").and_then(|q| q.child("x")).unwrap();
    assert_eq!(field(form, "muc#roomconfig_roomname"), Some("Desk"));
    assert_eq!(field(form, "muc#roomconfig_persistentroom"), Some("1"));
    println!(
        "{kills} kills, {all} acknowledged, {} in the archive",
        kept.len()
    );
}
