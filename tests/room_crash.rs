//! `kill -9` while people talk in a room: what the server has acknowledged is in the room's archive, once and in order; what was
//! taken back by who had said it (XEP-0424) or by a moderator (XEP-0425), as far as the server has said so, is a tombstone there,
//! and nothing else is; and the room is as its owner has left it.
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

const NS_RETRACT: &str = "urn:xmpp:message-retract:1";
const NS_MODERATE: &str = "urn:xmpp:message-moderate:1";

/// What one has done in a round, and what the server has said of it.
#[derive(Default)]
struct Talk {
    /// So many messages were acknowledged.
    acknowledged: u32,
    /// Stable ids of messages that he has taken back, what was said in them, and whether the server has taken that.
    taken_back: BTreeMap<String, (String, bool)>,
}

/// Stable id and body of what was said in the room.
fn said(element: &Element) -> Option<(String, String)> {
    let id = element.child("stanza-id")?;
    if element.attribute("type") != Some("groupchat") || id.attribute("by") != Some(ROOM) {
        return None;
    }
    Some((id.attribute("id")?.to_owned(), client::body(element)?))
}

/// Talks until the connection ends. The last message of a burst takes back what he has seen of himself last.
fn talk(mut sender: Client, round: u32, number: usize) -> Talk {
    let mut talk = Talk::default();
    let mut count = 0;
    let own = format!("{round}-{number}-");
    let mut last: Option<(String, String)> = None;
    // number of the message that takes back, stable id
    let mut waiting: Option<(u32, String)> = None;
    loop {
        let mut burst = String::new();
        for place in 0..7 {
            let mut retract = String::new();
            if place == 6
                && waiting.is_none()
                && let Some((id, body)) = last.take()
            {
                retract = format!("<retract xmlns='{NS_RETRACT}' id='{id}'/>");
                waiting = Some((count, id.clone()));
                talk.taken_back.insert(id, (body, false));
            }
            burst += &format!(
                "<message type='groupchat' to='{ROOM}'>{retract}<body>{own}{count}</body></message>"
            );
            count += 1;
        }
        burst += "<r xmlns='urn:xmpp:sm:3'/>";
        if sender.connection.send(burst.as_bytes()).is_err() {
            return talk;
        }
        loop {
            let Ok(element) = sender.connection.next_element() else {
                return talk;
            };
            if element.name == "a" {
                // the presence with which he came in is one
                talk.acknowledged = client::h(&element) - 1;
                if let Some((_, id)) = waiting.take_if(|(n, _)| *n < talk.acknowledged) {
                    talk.taken_back.get_mut(&id).expect("it was noted").1 = true;
                }
                break;
            }
            let seen = said(&element).filter(|(_, body)| body.starts_with(&own));
            if let Some(seen) = seen.filter(|_| element.child("retract").is_none()) {
                last = Some(seen);
            }
        }
    }
}

/// Takes back what others say, one after the other, until the connection ends.
fn moderate(mut moderator: Client) -> Talk {
    let mut talk = Talk::default();
    let mut waiting: Option<String> = None;
    while let Ok(element) = moderator.connection.next_element() {
        if element.name == "iq" && element.attribute("id") == Some("moderate") {
            let id = waiting.take().expect("an answer to a request");
            if element.attribute("type") == Some("result") {
                talk.taken_back.get_mut(&id).expect("it was noted").1 = true;
            } else {
                // its sender was faster, or the room has too much to do
                talk.taken_back.remove(&id);
            }
        }
        let takes_back = element.child("retract").is_some();
        if waiting.is_none()
            && !takes_back
            && let Some((id, body)) = said(&element)
        {
            let request = format!(
                "<iq type='set' id='moderate' to='{ROOM}'><moderate xmlns='{NS_MODERATE}' id='{id}'>                 <retract xmlns='{NS_RETRACT}'/></moderate></iq>"
            );
            talk.taken_back.insert(id.clone(), (body, false));
            waiting = Some(id);
            if moderator.connection.send(request.as_bytes()).is_err() {
                break;
            }
        }
    }
    talk
}

fn join(client: &mut Client, nick: &str) {
    client.send(&format!(
        "<presence to='{ROOM}/{nick}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
    ));
    client.find(|e| e.name == "message" && e.child("subject").is_some());
}

/// Stable id and body of all in the room's archive, in its order; tombstones without body.
fn archive(reader: &mut Client) -> Vec<(String, Option<String>)> {
    let mut entries = Vec::new();
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
                let message = message.expect("a message");
                let body = client::body(message);
                let tombstone = message.child("retracted").is_some();
                assert!(!(tombstone && body.is_some()), "{message}");
                // a moderator's word is no message of ours
                if tombstone || body.is_some() {
                    let id = result.attribute("id").expect("a stable id");
                    entries.push((id.to_owned(), body));
                }
            } else if element.attribute("id") == Some("page") {
                let fin = element.child("fin").expect("a page");
                if fin.attribute("complete") == Some("true") {
                    return entries;
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

/// Of two who have taken back the same, one may have heard that it was done.
fn note(all: &mut BTreeMap<String, (String, bool)>, new: BTreeMap<String, (String, bool)>) {
    for (id, (body, taken)) in new {
        all.entry(id).or_insert((body, false)).1 |= taken;
    }
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
    let mut taken_back: BTreeMap<String, (String, bool)> = BTreeMap::new();
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
        let mut moderator = Client::online(&blade, owner_name, "r");
        join(&mut moderator, "Owner");
        let moderator = std::thread::spawn(move || moderate(moderator));
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
            let talk = thread.join().unwrap();
            promised.insert((round, number), talk.acknowledged);
            note(&mut taken_back, talk.taken_back);
        }
        note(&mut taken_back, moderator.join().unwrap().taken_back);
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
    let mut tombstones = 0;
    for (id, body) in &kept {
        let asked = taken_back.get(id);
        match body {
            Some(body) => {
                let promised = asked.is_some_and(|(_, taken)| *taken);
                assert!(
                    !promised,
                    "{body} was taken back, and that was acknowledged"
                );
            }
            None => {
                assert!(asked.is_some(), "nobody has taken back {id}");
                tombstones += 1;
            }
        }
    }
    let taken = taken_back.values().filter(|(_, taken)| *taken).count();
    assert!(
        taken as u32 >= kills * 3,
        "only {taken} were taken back: that proves nothing"
    );
    // what stood where a tombstone is now
    let body = |(id, body): &(String, Option<String>)| match body {
        Some(body) => body.clone(),
        None => taken_back[id].0.clone(),
    };
    let kept: Vec<String> = kept.iter().map(body).collect();
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
        "{kills} kills, {all} acknowledged, {} in the archive, {taken} taken back, {tombstones} tombstones",
        kept.len()
    );
}
