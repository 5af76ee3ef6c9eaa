//! Components and users on several shards, without sockets.

use super::*;
use crate::xmpp::testing::{Client, Component, World, bare};

const HOST: &str = "plays.localhost";

/// Romeo on shard 0, on line, and two shards that serve a component's name by this policy.
fn stage(policy: Policy) -> (World, String, Client) {
    staged(policy, Settings::default())
}

fn staged(policy: Policy, settings: Settings) -> (World, String, Client) {
    let mut world = World::new(2);
    world.serve(&[(HOST, policy), ("other.example", policy)], settings);
    let romeo = world.on(0, "romeo");
    world.add(&romeo);
    let orchard = world.online(&romeo, "orchard");
    (world, bare(&romeo), orchard)
}

fn chat(to: &str, body: &str) -> String {
    format!("<message type='chat' id='m' to='{to}'><body>{body}</body></message>")
}

/// What a client with stream management got, requests for acknowledgement not counted.
fn heard(w: &mut World, client: Client) -> Vec<String> {
    let mut got = w.take(client);
    got.retain(|element| !element.starts_with("<r "));
    got
}

#[track_caller]
fn refused(got: &[String], condition: &str, kind: &str) {
    assert!(
        got.len() == 1
            && got[0].contains(&format!("<{condition} "))
            && got[0].contains(&format!("type='{kind}'")),
        "wanted {condition}, {kind}: {got:?}"
    );
}

#[test]
fn stanzas_go_both_ways_whatever_the_shards_and_the_address() {
    for shard in [0, 1] {
        let (mut w, romeo, orchard) = stage(Policy::Refuse);
        let part = w.component(shard, HOST);
        assert!(w.component_serves(part));
        for to in [
            HOST,
            "bot@plays.localhost",
            "bot@plays.localhost/r",
            "plays.localhost/r",
        ] {
            w.send(orchard, &chat(to, "hi"));
            let got = w.component_takes(part);
            assert_eq!(got.len(), 1, "{got:?}");
            assert!(
                got[0].contains(&format!("to='{to}'"))
                    && got[0].contains(&format!("from='{romeo}/orchard'"))
                    && got[0].contains("<body>hi</body>"),
                "{got:?}"
            );
            w.component_sends(
                part,
                &format!(
                    "<message type='chat' from='{to}' to='{romeo}'><body>back</body></message>"
                ),
            );
            let got = w.take(orchard);
            assert!(
                got.len() == 1 && got[0].contains(&format!("from='{to}'")),
                "{got:?}"
            );
        }
        w.send(
            orchard,
            &format!("<iq type='get' id='q' to='{HOST}'><query xmlns='x:y'/></iq>"),
        );
        let got = w.component_takes(part);
        assert!(
            got.len() == 1 && got[0].contains("<query xmlns='x:y'/>"),
            "{got:?}"
        );
        w.component_sends(
            part,
            &format!("<iq type='result' id='q' from='{HOST}' to='{romeo}/orchard'/>"),
        );
        w.expect(
            orchard,
            &[&format!(
                "<iq type='result' id='q' from='{HOST}' to='{romeo}/orchard'/>"
            )],
        );
        w.component_sends(
            part,
            &format!(
                "<iq type='get' id='v' from='{HOST}/a' to='{romeo}/orchard'><query xmlns='jabber:iq:version'/></iq>"
            ),
        );
        assert!(w.take(orchard)[0].contains("jabber:iq:version"));
    }
}

#[test]
fn a_user_is_not_taken_for_the_namesake_of_a_component() {
    let (mut w, romeo, orchard) = stage(Policy::Refuse);
    let part = w.component(1, HOST);
    let name = romeo.split('@').next().unwrap().to_owned();
    let namesake = format!("{name}@{HOST}");
    w.send(orchard, &chat(&namesake, "to the other one"));
    assert_eq!(w.component_takes(part).len(), 1);
    assert!(w.take(orchard).is_empty());
    let sent = w.tier.users[&name].archive.values();
    assert_eq!(sent.filter(|entry| *entry.peer == *namesake).count(), 1);
    for payload in [
        "<query xmlns='jabber:iq:roster'/>",
        "<query xmlns='jabber:iq:private'><x xmlns='y'/></query>",
        "<query xmlns='urn:xmpp:mam:2'/>",
        "<blocklist xmlns='urn:xmpp:blocking'/>",
        "<query xmlns='jabber:iq:register'><password>new</password></query>",
        "<query xmlns='http://jabber.org/protocol/disco#items'/>",
    ] {
        for to in [&*romeo, "localhost"] {
            for typ in ["get", "set"] {
                w.component_sends(
                    part,
                    &format!("<iq type='{typ}' id='q' from='{namesake}' to='{to}'>{payload}</iq>"),
                );
                let got = w.component_takes(part);
                let public = to == "localhost" && typ == "get" && payload.contains("disco");
                assert_eq!(got.len(), 1);
                assert_eq!(
                    got[0].contains("type='result'"),
                    public,
                    "{payload}: {got:?}"
                );
            }
        }
    }
    assert_eq!(w.tier.changes, 0);
}

#[test]
fn a_component_speaks_for_its_own_name_only() {
    for (from, condition) in [
        ("from='romeo@localhost'", "invalid-from"),
        ("from='localhost'", "invalid-from"),
        ("from='other.example'", "invalid-from"),
        ("from='x.plays.localhost'", "invalid-from"),
        ("from='@'", "improper-addressing"),
        ("", "improper-addressing"),
    ] {
        let (mut w, romeo, orchard) = stage(Policy::Refuse);
        let part = w.component(1, HOST);
        w.component_sends(
            part,
            &format!("<message {from} to='{romeo}'><body>x</body></message>"),
        );
        assert!(w.take(orchard).is_empty());
        assert!(!w.component_serves(part));
        let got = w.component_takes(part).concat();
        assert!(got.contains(condition), "{from}: {got}");
        w.send(orchard, &chat(HOST, "gone"));
        refused(&w.take(orchard), "service-unavailable", "wait");
    }
}

#[test]
fn what_a_component_gets_wrong_comes_back_to_it_and_its_stream_goes_on() {
    let (mut w, romeo, orchard) = stage(Policy::Refuse);
    let part = w.component(0, HOST);
    for (stanza, condition) in [
        ("<message from='plays.localhost'/>", "bad-request"),
        ("<message from='plays.localhost' to='@'/>", "jid-malformed"),
        (
            "<message from='plays.localhost' to='a@elsewhere.example'/>",
            "remote-server-not-found",
        ),
        (
            "<message from='plays.localhost' to='localhost'/>",
            "service-unavailable",
        ),
        (
            "<message from='plays.localhost' to='nobody@localhost'><body>x</body></message>",
            "service-unavailable",
        ),
        (
            "<iq type='get' from='plays.localhost' to='localhost'><q xmlns='x'/></iq>",
            "bad-request",
        ),
        (
            "<iq type='get' id='1' from='plays.localhost' to='localhost'><q xmlns='x'/></iq>",
            "service-unavailable",
        ),
        (
            "<iq type='get' id='1' from='plays.localhost' to='localhost'/>",
            "bad-request",
        ),
        (
            "<presence type='what' from='plays.localhost' to='romeo@localhost'/>",
            "bad-request",
        ),
        (
            "<message from='plays.localhost' to='other.example'/>",
            "service-unavailable",
        ),
    ] {
        w.component_sends(part, stanza);
        let got = w.component_takes(part);
        assert!(
            got.len() == 1
                && got[0].contains(&format!("<{condition} "))
                && got[0].contains("type='error'"),
            "{stanza}: {got:?}"
        );
    }
    // no answer to answers
    for stanza in [
        "<iq type='result' id='1' from='plays.localhost' to='@'/>",
        "<iq type='error' id='1' from='plays.localhost' to='a@elsewhere.example'/>",
        "<message type='error' from='plays.localhost'/>",
        "<presence from='plays.localhost' to='localhost'/>",
    ] {
        w.component_sends(part, stanza);
        assert!(w.component_takes(part).is_empty(), "{stanza}");
    }
    assert!(w.component_serves(part));
    // the content namespace may be said
    w.component_sends(
        part,
        &format!(
            "<message xmlns='jabber:component:accept' type='chat' from='{HOST}' to='{romeo}'>\
             <body>x</body><a xmlns='y'><b/></a></message>"
        ),
    );
    let got = w.take(orchard);
    assert!(
        got.len() == 1 && !got[0].contains(NS_ACCEPT) && got[0].contains("<body>x</body>"),
        "{got:?}"
    );
}

#[test]
fn a_message_is_durable_before_the_component_gets_it_and_acknowledged_after() {
    for shard in [0, 1] {
        let (mut w, _, orchard) = stage(Policy::Refuse);
        let part = w.component(shard, HOST);
        w.send(orchard, "<enable xmlns='urn:xmpp:sm:3'/>");
        w.take(orchard);
        w.tier.held = true;
        w.send(orchard, &chat(HOST, "one"));
        w.send(orchard, &format!("<message type='chat' to='{HOST}'><composing xmlns='http://jabber.org/protocol/chatstates'/></message>"));
        w.send(
            orchard,
            &format!("<iq type='get' id='q' to='{HOST}'><q xmlns='x'/></iq>"),
        );
        w.send(orchard, &format!("<presence to='{HOST}'/>"));
        assert!(w.component_takes(part).is_empty());
        w.component_room(part, 0);
        w.release();
        w.send(orchard, "<r xmlns='urn:xmpp:sm:3'/>");
        assert!(
            !w.take(orchard).concat().contains("<a "),
            "the kernel has not taken it"
        );
        w.component_room(part, usize::MAX);
        let got = w.component_takes(part);
        let order = ["<body>one", "composing", "<iq ", "<presence "];
        assert_eq!(got.len(), 4, "{got:?}");
        for (got, wanted) in got.iter().zip(order) {
            assert!(got.contains(wanted), "{got}");
        }
        assert!(
            w.take(orchard)
                .concat()
                .contains("<a xmlns='urn:xmpp:sm:3' h='4'")
        );
        // it is settled: nothing is forwarded again after a crash
        w.advance(1000);
        w.crash(2);
        w.serve(&[(HOST, Policy::Refuse)], Settings::default());
        let part = w.component(shard, HOST);
        w.run();
        assert!(w.component_takes(part).is_empty());
    }
}

#[test]
fn who_writes_to_a_component_that_is_not_connected_hears_it_and_gets_his_acknowledgement() {
    let (mut w, romeo, orchard) = stage(Policy::Refuse);
    w.send(orchard, "<enable xmlns='urn:xmpp:sm:3'/>");
    heard(&mut w, orchard);
    w.send(orchard, &chat("bot@plays.localhost", "x"));
    refused(&heard(&mut w, orchard), "service-unavailable", "wait");
    w.send(
        orchard,
        &format!("<iq type='get' id='q' to='{HOST}'><q xmlns='x'/></iq>"),
    );
    refused(&heard(&mut w, orchard), "service-unavailable", "wait");
    w.send(orchard, &format!("<presence to='{HOST}/room'/>"));
    refused(&heard(&mut w, orchard), "service-unavailable", "wait");
    w.send(
        orchard,
        &format!("<presence type='subscribe' to='bot@{HOST}'/>"),
    );
    let got = heard(&mut w, orchard).concat();
    assert!(
        got.contains("type='error'") && got.contains("ask='subscribe'"),
        "{got}"
    );
    // nobody is told of presence that the server sends around, nor of answers
    for stanza in [
        format!("<presence type='unavailable' to='{HOST}'/>"),
        format!("<iq type='result' id='q' to='{HOST}'/>"),
        format!("<message type='error' to='{HOST}'/>"),
    ] {
        w.send(orchard, &stanza);
        assert!(heard(&mut w, orchard).is_empty(), "{stanza}");
    }
    w.send(orchard, "<r xmlns='urn:xmpp:sm:3'/>");
    assert!(heard(&mut w, orchard).concat().contains("h='7'"));
    w.send(orchard, &chat("a@unknown.example", "x"));
    refused(&heard(&mut w, orchard), "remote-server-not-found", "cancel");
    assert_eq!(
        w.user(romeo.split('@').next().unwrap())
            .record
            .get()
            .roster
            .len(),
        1
    );
}

#[test]
fn a_component_that_does_not_read_is_bounded_and_what_it_never_took_comes_back() {
    for shard in [0, 1] {
        let settings = Settings {
            queue_bytes_max: 1000,
            ..Settings::default()
        };
        let (mut w, _, orchard) = staged(Policy::Refuse, settings);
        let part = w.component(shard, HOST);
        w.send(orchard, "<enable xmlns='urn:xmpp:sm:3'/>");
        heard(&mut w, orchard);
        w.component_takes(part);
        // the kernel takes the first one and a part of the second
        w.component_room(part, 150);
        let mut slow = 0;
        for n in 0..20 {
            w.send(orchard, &chat(HOST, &format!("text {n:04}")));
            let got = heard(&mut w, orchard);
            if !got.is_empty() {
                refused(&got, "resource-constraint", "wait");
                slow += 1;
            }
        }
        let out = w.component_raw(part);
        assert!(
            out.contains("text 0000") && !out.contains("text 0002"),
            "{out}"
        );
        assert!((5..19).contains(&slow), "{slow}");
        assert!(w.slices[shard].components.waiting() <= 1000);
        w.component_cut(part);
        let got = heard(&mut w, orchard);
        assert_eq!(got.len(), 19 - slow, "{got:#?}");
        for (n, got) in got.iter().enumerate() {
            assert!(
                got.contains("<remote-server-timeout ")
                    && got.contains(&format!("text {:04}", n + 1)),
                "{got}"
            );
        }
        w.send(orchard, "<r xmlns='urn:xmpp:sm:3'/>");
        assert!(heard(&mut w, orchard).concat().contains("h='20'"));
        assert_eq!(w.slices[shard].components.waiting(), 0);
    }
}

#[test]
fn the_last_words_come_behind_a_stanza_that_was_begun() {
    let (mut w, _, orchard) = stage(Policy::Refuse);
    let part = w.component(1, HOST);
    w.component_takes(part);
    w.component_room(part, 10);
    w.send(orchard, &chat(HOST, "begun"));
    w.send(orchard, &chat(HOST, "not begun"));
    let slice = &mut w.slices[1];
    slice.component_end(part.id, Some(StreamError::new("system-shutdown")));
    w.run();
    let out = w.component_raw(part);
    let (stanza, end) = out.split_once("</message>").unwrap();
    assert!(
        stanza.contains("begun") && end.starts_with("<stream:error>"),
        "{out}"
    );
    assert!(!out.contains("not begun"));
    assert_eq!(w.take(orchard).len(), 2);
}

#[test]
fn a_second_connection_is_refused_or_takes_the_place_of_the_first() {
    for (first_on, second_on) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let (mut w, _, orchard) = stage(Policy::Refuse);
        let first = w.component(first_on, HOST);
        let second = w.component(second_on, HOST);
        assert!(w.component_serves(first) && !w.component_serves(second));
        assert!(w.component_raw(second).contains("<conflict "));
        w.component_cut(first);
        let third = w.component(second_on, HOST);
        assert!(w.component_serves(third), "after the first is gone");
        w.send(orchard, &chat(HOST, "x"));
        assert_eq!(w.component_takes(third).len(), 1);

        let (mut w, _, orchard) = stage(Policy::Replace);
        let first = w.component(first_on, HOST);
        let second = w.component(second_on, HOST);
        assert!(!w.component_serves(first) && w.component_serves(second));
        assert!(w.component_raw(first).contains("<conflict "));
        w.send(orchard, &chat(HOST, "x"));
        assert_eq!(w.component_takes(second).len(), 1);
    }
}

#[test]
fn connections_that_share_a_name_keep_each_senders_order_and_a_loss_moves_only_its_own_senders() {
    let mut w = World::new(2);
    let settings = Settings {
        shared_max: 4,
        ..Settings::default()
    };
    w.serve(&[(HOST, Policy::Share)], settings);
    let parts: Vec<Component> = (0..4).map(|n| w.component(n % 2, HOST)).collect();
    let fifth = w.component(0, HOST);
    assert!(!w.component_serves(fifth), "more than shared_max");
    let mut senders = Vec::new();
    for n in 0..32 {
        let name = format!("u{n}");
        w.add(&name);
        senders.push(w.online(&name, "r"));
    }
    let taken = |w: &mut World| -> Vec<Option<usize>> {
        for sender in &senders {
            for n in 0..3 {
                w.send(*sender, &chat(&format!("{n}@{HOST}"), &format!("{n}")));
            }
        }
        let mut by = vec![None; senders.len()];
        for (at, part) in parts.iter().enumerate() {
            for got in w.component_takes(*part).chunks(3) {
                let from = got[0].split("from='u").nth(1).unwrap();
                let from: usize = from.split('@').next().unwrap().parse().unwrap();
                for (n, got) in got.iter().enumerate() {
                    assert!(
                        got.contains(&format!("from='u{from}@"))
                            && got.contains(&format!("<body>{n}<")),
                        "{got}"
                    );
                }
                assert_eq!(by[from].replace(at), None);
            }
        }
        by
    };
    let before = taken(&mut w);
    for at in 0..parts.len() {
        assert!(
            before.iter().filter(|by| **by == Some(at)).count() > 1,
            "{before:?}"
        );
    }
    w.component_cut(parts[2]);
    let after = taken(&mut w);
    for (before, after) in before.iter().zip(&after) {
        assert!(after.is_some() && (before == after || *before == Some(2)));
    }
}

#[test]
fn a_name_that_is_taken_out_of_the_configuration_ends_its_connections_and_others_go_on() {
    let (mut w, _, orchard) = stage(Policy::Refuse);
    let (part, other) = (w.component(0, HOST), w.component(1, "other.example"));
    w.serve(&[("other.example", Policy::Refuse)], Settings::default());
    assert!(!w.component_serves(part) && w.component_serves(other));
    assert!(w.component_raw(part).contains("<host-gone "));
    w.send(orchard, &chat(HOST, "x"));
    refused(&w.take(orchard), "remote-server-not-found", "cancel");
    w.send(orchard, &chat("other.example", "x"));
    assert_eq!(w.component_takes(other).len(), 1);
}

#[test]
fn a_silent_connection_is_sent_white_space_and_one_that_takes_nothing_is_cut() {
    let (mut w, _, orchard) = stage(Policy::Refuse);
    let part = w.component(1, HOST);
    w.component_raw(part);
    let tick = |w: &mut World, unsent| {
        w.advance(1000);
        let alive = w.slices[1].component_tick(part.id, unsent);
        w.run();
        alive
    };
    for _ in 0..60 {
        assert!(tick(&mut w, 0));
        assert_eq!(w.component_raw(part), "");
    }
    assert!(tick(&mut w, 0));
    assert_eq!(w.component_raw(part), " ");
    // its machine acknowledges a little now and then: slow, not dead
    w.send(orchard, &chat(HOST, "for whom nobody is there"));
    for n in 0..120 {
        assert!(tick(&mut w, 100 - n / 30));
    }
    for _ in 0..29 {
        assert!(tick(&mut w, 97));
    }
    assert!(!(0..40).all(|_| tick(&mut w, 97)));
    w.run();
    w.send(orchard, &chat(HOST, "x"));
    refused(&w.take(orchard), "service-unavailable", "wait");
}

#[test]
fn disco_lists_the_components_that_are_connected() {
    let (mut w, romeo, orchard) = stage(Policy::Refuse);
    let part = w.component(1, HOST);
    let ask = "<iq type='get' id='d' to='localhost'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>";
    w.send(orchard, ask);
    w.expect(
        orchard,
        &[&format!(
            "<iq type='result' id='d' from='localhost' to='{romeo}/orchard'>\
             <query xmlns='http://jabber.org/protocol/disco#items'><item jid='rooms.localhost'/><item jid='upload.localhost'/><item jid='{HOST}'/></query></iq>"
        )],
    );
    w.component_cut(part);
    w.send(orchard, ask);
    assert!(!w.take(orchard).concat().contains(HOST));
}

#[test]
fn users_and_contacts_at_a_component_subscribe_to_each_other_and_see_each_other_come_and_go() {
    for shard in [0, 1] {
        let (mut w, romeo, orchard) = stage(Policy::Refuse);
        let part = w.component(shard, HOST);
        let bot = format!("bot@{HOST}");
        // RFC 6121 3.1: the user asks, the component's contact agrees
        w.send(
            orchard,
            &format!("<presence type='subscribe' id='s' to='{bot}'/>"),
        );
        let got = w.component_takes(part);
        assert_eq!(got.len(), 1);
        assert!(got[0].contains("type='subscribe'") && got[0].contains(&format!("from='{romeo}'")));
        w.take(orchard);
        w.component_sends(
            part,
            &format!("<presence type='subscribed' from='{bot}/x' to='{romeo}'/>"),
        );
        let got = w.take(orchard).concat();
        assert!(got.contains("subscription='to'"), "{got}");
        // and the server asks for its presence
        let got = w.component_takes(part);
        assert!(
            got.len() == 1
                && got[0].contains("type='probe'")
                && got[0].contains(&format!("from='{romeo}/orchard'")),
            "{got:?}"
        );
        w.component_sends(
            part,
            &format!("<presence from='{bot}/x' to='{romeo}'><show>away</show></presence>"),
        );
        assert!(w.take(orchard).concat().contains("<show>away"));
        // the contact asks, the user agrees
        w.component_sends(
            part,
            &format!("<presence type='subscribe' from='{bot}' to='{romeo}'/>"),
        );
        assert!(w.take(orchard).concat().contains("type='subscribe'"));
        w.send(
            orchard,
            &format!("<presence type='subscribed' to='{bot}'/>"),
        );
        let got = w.component_takes(part).concat();
        assert!(got.contains("type='subscribed'"), "{got}");
        w.take(orchard);
        // presence, probes
        w.send(orchard, "<presence><show>dnd</show></presence>");
        let got = w.component_takes(part);
        assert!(
            got.len() == 1
                && got[0].contains("<show>dnd")
                && got[0].contains(&format!("to='{bot}'")),
            "{got:?}"
        );
        w.take(orchard);
        w.component_sends(
            part,
            &format!("<presence type='probe' from='{bot}' to='{romeo}'/>"),
        );
        let got = w.component_takes(part);
        assert!(got.len() == 1 && got[0].contains("<show>dnd"), "{got:?}");
        w.component_sends(
            part,
            &format!("<presence type='probe' from='stranger@{HOST}' to='{romeo}'/>"),
        );
        assert!(
            w.component_takes(part)
                .concat()
                .contains("type='unsubscribed'")
        );
        w.logout(orchard);
        let got = w.component_takes(part);
        assert!(
            got.len() == 1 && got[0].contains("type='unavailable'"),
            "{got:?}"
        );
        // a new login shows itself and asks
        let name = romeo.split('@').next().unwrap().to_owned();
        let garden = w.online_now(&name, "garden");
        let got = w.component_takes(part).concat();
        assert!(
            got.contains("type='probe'") && got.contains("/garden'"),
            "{got}"
        );
        w.take(garden);
        // while it is away nobody is bothered
        w.component_cut(part);
        w.send(garden, "<presence><show>xa</show></presence>");
        assert_eq!(w.take(garden).len(), 1, "its own presence only");
        // removal ends both
        let part = w.component(shard, HOST);
        w.send(garden, &format!("<iq type='set' id='r'><query xmlns='jabber:iq:roster'><item jid='{bot}' subscription='remove'/></query></iq>"));
        let got = w.component_takes(part).concat();
        assert!(
            got.contains("type='unsubscribe'") && got.contains("type='unsubscribed'"),
            "{got}"
        );
        assert!(w.user(&name).record.get().roster.is_empty());
    }
}

#[test]
fn directed_presence_to_a_component_is_taken_back_when_the_session_ends() {
    let (mut w, _, orchard) = stage(Policy::Refuse);
    let part = w.component(1, HOST);
    w.send(orchard, &format!("<presence to='room@{HOST}/nick'/>"));
    assert_eq!(w.component_takes(part).len(), 1);
    w.cut(orchard);
    let got = w.component_takes(part);
    assert!(
        got.len() == 1 && got[0].contains("type='unavailable'") && got[0].contains("/nick'"),
        "{got:?}"
    );
}

#[test]
fn a_user_may_block_a_component() {
    let (mut w, romeo, orchard) = stage(Policy::Refuse);
    let part = w.component(0, HOST);
    w.send(orchard, &format!("<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{HOST}'/></block></iq>"));
    w.take(orchard);
    w.component_sends(
        part,
        &format!("<message type='chat' from='a@{HOST}' to='{romeo}'><body>x</body></message>"),
    );
    assert!(w.take(orchard).is_empty());
    refused(&w.component_takes(part), "service-unavailable", "cancel");
    w.send(orchard, &chat(&format!("a@{HOST}"), "x"));
    refused(&w.take(orchard), "not-acceptable", "cancel");
}

/// Romeo's message `x` was not handed over when the process was killed; he is on line again.
fn crashed() -> (World, Client) {
    let (mut w, romeo, orchard) = stage(Policy::Refuse);
    let part = w.component(1, HOST);
    w.component_room(part, 0);
    w.send(orchard, &chat(&format!("bot@{HOST}"), "x"));
    w.crash(2);
    w.serve(&[(HOST, Policy::Refuse)], Settings::default());
    let name = romeo.split('@').next().unwrap().to_owned();
    let archive = w.tier.users[&name].archive.len();
    assert_eq!(archive, 1, "the sender's archive has it");
    let orchard = w.online(&name, "orchard");
    (w, orchard)
}

/// Nothing holds the journals up.
fn is_settled(w: &mut World) -> bool {
    w.crash(2);
    w.slices
        .iter()
        .all(|slice| slice.ledger.waiting() == 0 && slice.components.recovered.is_empty())
}

#[test]
fn a_message_that_was_open_at_a_crash_reaches_its_component_in_front_of_later_ones() {
    for shard in [0, 1] {
        let (mut w, orchard) = crashed();
        w.send(orchard, &chat(HOST, "too early"));
        refused(&w.take(orchard), "service-unavailable", "wait");
        w.advance(30_000);
        let part = w.component(shard, HOST);
        w.send(orchard, &chat(HOST, "y"));
        w.advance(500);
        w.send(orchard, &chat(HOST, "z"));
        w.advance(500);
        let got = w.component_takes(part).concat();
        let places = ["x", "y", "z"].map(|text| got.find(&format!("<body>{text}</body>")));
        assert!(places.is_sorted() && places[0].is_some(), "{got}");
        w.send(orchard, &chat(HOST, "at once"));
        assert_eq!(w.component_takes(part).len(), 1);
        assert!(w.take(orchard).is_empty());
        assert!(is_settled(&mut w));
    }
}

#[test]
fn a_message_that_was_open_at_a_crash_comes_back_when_its_component_does_not() {
    let (mut w, orchard) = crashed();
    w.advance(500);
    w.advance(59_000);
    assert!(w.take(orchard).is_empty());
    w.advance(2_000);
    refused(&w.take(orchard), "remote-server-timeout", "wait");
    assert!(!w.slices[0].forwards_full());
    assert!(is_settled(&mut w));
}
