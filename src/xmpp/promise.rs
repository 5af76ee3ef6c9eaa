//! The promise, held against the slices: what is accepted is durable, what is durable is delivered once, in order, over
//! crashes too.

use super::slice::{Op, Slice};
use super::testing::{Client, World};
use crate::store::record::{Record, UserRecord};

const ENABLE: &str = "<enable xmlns='urn:xmpp:sm:3' resume='true'/>";
const R: &str = "<r xmlns='urn:xmpp:sm:3'/>";

fn chat(to: &str, text: &str) -> String {
    format!("<message type='chat' id='{text}' to='{to}@localhost'><body>{text}</body></message>")
}

/// Bodies of the messages that came, and everything else by its name.
fn got(w: &mut World, client: Client) -> Vec<String> {
    let text = |xml: String| {
        let element = super::parse_stanza(xml.as_bytes()).unwrap();
        let body = element.find("body", super::NS_CLIENT);
        match body {
            Some(body) => body.text_content(),
            None => format!(
                "{}{}",
                element.name,
                element
                    .get("h")
                    .map(|h| format!(" {h}"))
                    .unwrap_or_default()
            ),
        }
    };
    let all = w.take(client).into_iter().map(text);
    all.filter(|name| name != "r" && !name.starts_with("enabled"))
        .collect()
}

/// The same without presence.
fn said(w: &mut World, client: Client) -> Vec<String> {
    let mut said = got(w, client);
    said.retain(|one| one != "presence");
    said
}

fn two(shards: usize) -> (World, String, String) {
    let mut w = World::new(shards);
    let (alice, bob) = (w.on(0, "alice"), w.on(shards - 1, "bob"));
    w.add(&alice);
    w.add(&bob);
    (w, alice, bob)
}

fn managed(w: &mut World, name: &str, resource: &str) -> Client {
    let client = w.login(name, resource);
    w.send(client, ENABLE);
    w.send(client, "<presence/>");
    w.take(client);
    client
}

#[test]
fn nothing_is_delivered_or_acknowledged_before_it_is_durable_and_nothing_overtakes() {
    for shards in [1, 2] {
        let (mut w, alice, bob) = two(shards);
        let a = managed(&mut w, &alice, "a");
        let b = managed(&mut w, &bob, "b");
        w.tier.held = true;
        w.send(a, &chat(&bob, "1"));
        w.send(a, R);
        let state = format!(
            "<message type='chat' to='{bob}@localhost'><active xmlns='http://jabber.org/protocol/chatstates'/></message>"
        );
        w.send(a, &state);
        let directed = format!("<presence to='{bob}@localhost/b'/>");
        w.send(a, &directed);
        w.send(a, &chat(&bob, "2"));
        assert_eq!(got(&mut w, a), [""; 0]);
        assert_eq!(got(&mut w, b), [""; 0]);
        w.release();
        assert_eq!(
            got(&mut w, b),
            ["1", "message", "presence", "2"],
            "{shards}"
        );
        assert_eq!(got(&mut w, a), ["a 2"]);
        w.send(a, R);
        assert_eq!(got(&mut w, a), ["a 5"]);
    }
}

#[test]
fn who_says_goodbye_is_heard_before_he_is_seen_going() {
    for shards in [1, 2] {
        let (mut w, alice, bob) = two(shards);
        w.befriend(&alice, &bob);
        let a = managed(&mut w, &alice, "a");
        let b = managed(&mut w, &bob, "b");
        w.take(a);
        w.tier.held = true;
        w.send(a, &chat(&bob, "goodbye"));
        w.send(a, "<presence type='unavailable'/>");
        w.release();
        assert_eq!(got(&mut w, b), ["goodbye", "presence"], "{shards}");
    }
}

#[test]
fn what_was_sent_before_stream_management_is_not_taken_for_what_comes_after() {
    let (mut w, alice, bob) = two(2);
    let a = w.login(&alice, "a");
    w.tier.held = true;
    w.send(a, &chat(&bob, "1"));
    w.send(a, ENABLE);
    w.send(a, &chat(&bob, "2"));
    w.send(a, R);
    // the first one's group is durable, the second one's is not
    w.tier.held = false;
    w.commit_only(a.shard);
    assert_eq!(w.session(a).accept.h(), 0);
    assert_eq!(w.session(a).sm.as_ref().unwrap().durable, 0);
    w.run();
    assert_eq!(got(&mut w, a), ["a 1"]);
}

#[test]
fn what_an_ended_session_has_sent_is_counted_when_it_is_decided() {
    let (mut w, alice, bob) = two(2);
    let a = managed(&mut w, &alice, "a");
    let previd = w.session(a).sm.as_ref().unwrap().id.clone();
    w.tier.held = true;
    w.send(a, &chat(&bob, "1"));
    // the resource is taken by another connection
    w.login(&alice, "a");
    let slice = w.slice_of(&alice);
    assert!(slice.is_ending(&previd));
    w.release();
    let slice = w.slice_of(&alice);
    assert!(!slice.is_ending(&previd));
    assert_eq!(slice.count_of(&previd), Some(2));
}

#[test]
fn what_waits_for_somebody_who_is_being_loaded_is_bounded_and_refused_beyond_that() {
    const SENT: usize = 10;
    const PING: &str = "<ping xmlns='urn:xmpp:ping'/>";
    for shards in [1, 2] {
        let mut w = World::with(shards, |limits| limits.load_queue_bytes_max = 600);
        let (alice, bob) = (w.on(0, "alice"), w.on(shards - 1, "bob"));
        w.add(&alice);
        w.add(&bob);
        let a = managed(&mut w, &alice, "a");
        w.tier.held = true;
        for n in 0..SENT {
            w.send(a, &chat(&bob, &n.to_string()));
        }
        // what nobody stores waits in the same bound
        w.send(
            a,
            &format!("<iq type='get' id='p' to='{bob}@localhost'>{PING}</iq>"),
        );
        w.release();
        let answers = w.take(a);
        let refused: Vec<_> = answers
            .iter()
            .filter(|x| x.contains("type='error'"))
            .collect();
        let wait = |x: &&String| x.contains("<resource-constraint") && x.contains("type='wait'");
        assert!(refused.iter().all(wait), "{answers:?}");
        assert!(refused.len() > 2 && refused.len() < SENT, "{answers:?}");
        let slice = w.slice_of(&bob);
        assert_eq!(slice.counters.load_queue_full as usize, refused.len());
        w.send(a, R);
        let h = format!("h='{}'", SENT + 2);
        assert!(w.take(a).iter().any(|x| x.contains(&h)), "all are decided");
        // who was accepted comes, and there is room again
        w.send(a, &chat(&bob, "later"));
        let b = w.online_now(&bob, "b");
        let accepted = SENT + 1 - refused.len();
        let mut expected: Vec<_> = (0..accepted).map(|n| n.to_string()).collect();
        expected.push("later".into());
        let came = got(&mut w, b);
        assert_eq!(
            came.iter()
                .filter(|x| *x != "presence")
                .cloned()
                .collect::<Vec<_>>(),
            expected
        );
    }
}

#[test]
fn a_crash_brings_back_what_no_client_has_acknowledged_with_the_same_stable_id() {
    for (shards, after) in [(1, 1), (2, 2), (2, 1), (1, 2)] {
        for dry in [false, true] {
            let (mut w, alice, bob) = two(shards);
            w.tier.dry = dry;
            let a = managed(&mut w, &alice, "a");
            let b = managed(&mut w, &bob, "b");
            w.send(a, &chat(&bob, "1"));
            w.send(a, &chat(&bob, "2"));
            let first = w.take(b);
            assert_eq!(
                first.iter().filter(|s| s.starts_with("<message")).count(),
                2
            );
            w.send(b, "<a xmlns='urn:xmpp:sm:3' h='2'/>");
            // presence counts too: b has its own presence and message 1
            w.advance(100);
            w.crash(after);
            let b = w.login(&bob, "b");
            w.send(b, "<presence/>");
            let again: Vec<String> = w
                .take(b)
                .into_iter()
                .filter(|s| s.starts_with("<message"))
                .collect();
            assert_eq!(again.len(), 1, "{shards} {after} {dry}: {again:?}");
            let id = |s: &str| {
                s[s.find("id='").unwrap()..]
                    .split("<stanza-id")
                    .nth(1)
                    .map(|s| s[s.find(" id='").unwrap()..][..22].to_owned())
            };
            let old = first.iter().find(|s| s.contains(">2<")).unwrap();
            assert!(again[0].contains(">2<") && again[0].contains("urn:xmpp:delay"));
            assert_eq!(id(&again[0]), id(old));
            // taken now: a further crash brings nothing
            w.advance(100);
            w.crash(after);
            let b = w.login(&bob, "b");
            w.send(b, "<presence/>");
            assert!(w.take(b).iter().all(|s| !s.starts_with("<message")));
        }
    }
}

#[test]
fn what_the_senders_journal_holds_alone_is_forwarded_again_once() {
    let (mut w, alice, bob) = two(2);
    let a = managed(&mut w, &alice, "a");
    w.element(a, &chat(&bob, "1")).unwrap();
    // the sender's owner commits, its batch to the other shard is lost in the crash
    let shard = a.shard;
    w.commit_only(shard);
    w.crash(2);
    let b = w.online_now(&bob, "b");
    assert_eq!(got(&mut w, b).last().unwrap(), "1");
    w.advance(100);
    w.crash(2);
    let b = w.online_now(&bob, "b");
    assert!(!got(&mut w, b).contains(&"1".to_owned()));
}

#[test]
fn a_delivery_to_an_inactive_client_has_an_end_whatever_it_says() {
    let (mut w, alice, bob) = two(1);
    let a = managed(&mut w, &alice, "a");
    let b = managed(&mut w, &bob, "b");
    w.send(b, "<inactive xmlns='urn:xmpp:csi:0'/>");
    let kept = format!(
        "<message type='chat' id='1' to='{bob}@localhost'><active xmlns='http://jabber.org/protocol/chatstates'/><store xmlns='urn:xmpp:hints'/></message>"
    );
    // nobody acknowledges the first one, and the second one is taken
    for taken in [false, true] {
        w.send(a, &kept);
        let h = w.session(b).sm.as_ref().unwrap().waiting();
        if taken {
            w.send(b, &format!("<a xmlns='urn:xmpp:sm:3' h='{h}'/>"));
        }
    }
    assert_eq!(w.tier.users[&bob].pending.len(), 0);
    w.send(a, &kept);
    w.logout(b);
    let b = w.online_now(&bob, "b");
    assert_eq!(
        got(&mut w, b)
            .iter()
            .filter(|one| *one == "message")
            .count(),
        1
    );
}

#[test]
fn no_count_covers_a_change_before_it_is_answered() {
    for enable in [ENABLE, "<enable xmlns='urn:xmpp:sm:3'/>"] {
        let (mut w, alice, bob) = two(1);
        for change in [
            "<vCard xmlns='vcard-temp'><FN>A</FN></vCard>".to_owned(),
            // what is stored is read before
            "<query xmlns='jabber:iq:private'><s xmlns='urn:s'/></query>".to_owned(),
            format!("<query xmlns='jabber:iq:roster'><item jid='{bob}@localhost'/></query>"),
            format!("<block xmlns='urn:xmpp:blocking'><item jid='{bob}@localhost'/></block>"),
            format!(
                "<query xmlns='jabber:iq:register'><username>{alice}</username><password>p</password></query>"
            ),
        ] {
            let a = w.login(&alice, "a");
            w.send(a, enable);
            w.take(a);
            w.tier.held = true;
            w.send(a, &format!("<iq type='set' id='i'>{change}</iq>"));
            w.send(a, R);
            assert_eq!(got(&mut w, a), [""; 0], "{change}");
            w.release();
            let mut heard = got(&mut w, a);
            heard.retain(|one| one == "iq" || one.starts_with("a "));
            assert_eq!(heard.last().unwrap(), "a 1", "{change}: {heard:?}");
            assert!(heard.len() > 1, "{change}: {heard:?}");
            w.logout(a);
        }
    }
}

#[test]
fn a_delivery_is_one_for_all_resources() {
    let (mut w, alice, bob) = two(1);
    let a = managed(&mut w, &alice, "a");
    let first = managed(&mut w, &bob, "first");
    let second = managed(&mut w, &bob, "second");
    w.take(first);
    w.send(a, &chat(&bob, "1"));
    w.send(a, &chat(&bob, "2"));
    assert_eq!(
        got(&mut w, first)
            .iter()
            .filter(|n| *n == "1" || *n == "2")
            .count(),
        2
    );
    // second takes message 1 only (its own and first's presence came before)
    let sent = w.session(second).sm.as_ref().unwrap().waiting();
    w.take(second);
    let h = sent - 1;
    w.send(second, &format!("<a xmlns='urn:xmpp:sm:3' h='{h}'/>"));
    w.cut(first);
    w.cut(second);
    // a third resource takes only what nobody holds
    let third = w.online_now(&bob, "third");
    assert!(!got(&mut w, third).contains(&"2".to_owned()));
    w.advance(400_000);
    // both have expired: 2 comes back, once; 1 was taken
    let got = got(&mut w, third);
    assert_eq!(got.iter().filter(|n| *n == "2").count(), 1, "{got:?}");
    assert!(!got.contains(&"1".to_owned()), "{got:?}");
}

#[test]
fn what_an_expired_session_leaves_goes_where_it_belongs() {
    let mut w = World::with(2, |limits| limits.offline_messages_max = 1);
    let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
    w.add(&alice);
    w.add(&bob);
    let a = managed(&mut w, &alice, "a");
    let b = managed(&mut w, &bob, "b");
    w.send(
        b,
        "<iq type='set' id='c'><enable xmlns='urn:xmpp:carbons:2'/></iq>",
    );
    let other = managed(&mut w, &bob, "other");
    w.send(other, "<presence type='unavailable'/>");
    w.cut(b);
    for text in ["1", "2", "3"] {
        w.send(a, &chat(&bob, text));
    }
    // of Bob's other client: a copy for this one
    w.send(other, &chat(&alice, "copied"));
    let to = format!("to='{bob}@localhost/b'");
    for stanza in [
        format!("<message type='headline' {to}><body>news</body></message>"),
        format!("<message type='groupchat' {to}><body>room</body></message>"),
        format!("<message type='error' {to}><body>error</body></message>"),
        format!("<iq type='get' id='i' {to}><ping xmlns='urn:xmpp:ping'/></iq>"),
    ] {
        w.send(a, &stanza);
    }
    assert!(w.session(b).sm.as_ref().unwrap().waiting() >= 8);
    w.take(a);
    w.logout(other);
    w.advance(400_000);
    let mut bounced = w.take(a);
    bounced.retain(|xml| !xml.starts_with("<r "));
    assert!(
        bounced.len() == 1 && bounced[0].starts_with("<iq") && bounced[0].contains("type='error'"),
        "{bounced:?}"
    );
    let b = w.online_now(&bob, "b");
    let heard = said(&mut w, b);
    assert_eq!(
        heard,
        ["1", "2", "3"],
        "beyond the limit, once, and nothing else"
    );
}

#[test]
fn without_stream_management_a_message_is_delivered_when_the_peer_has_it() {
    let (mut w, alice, bob) = two(1);
    let a = managed(&mut w, &alice, "a");
    let b = w.online(&bob, "b");
    w.confirms = false;
    w.send(a, &chat(&bob, "1"));
    assert_eq!(got(&mut w, b), ["1"]);
    w.cut(b);
    let b = w.online_now(&bob, "b");
    assert!(got(&mut w, b).contains(&"1".to_owned()));
    w.slice_of(&bob).confirmed(b.sid);
    w.cut(b);
    let b = w.online_now(&bob, "b");
    assert!(!got(&mut w, b).contains(&"1".to_owned()));
}

#[test]
fn what_is_on_its_way_when_the_last_session_ends_is_decided_by_the_end_of_its_connection() {
    for taken in [true, false] {
        let (mut w, alice, bob) = two(1);
        let a = managed(&mut w, &alice, "a");
        let b = w.online(&bob, "b");
        w.confirms = false;
        w.lefts = Some(Vec::new());
        w.send(a, &chat(&bob, "1"));
        assert_eq!(got(&mut w, b), ["1"]);
        w.logout(b);
        w.send(a, &chat(&bob, "2"));
        let lefts = w.lefts.take().unwrap();
        assert_eq!(lefts.len(), 1);
        for (shard, name) in lefts {
            w.slices[shard].left(&name, None, taken);
        }
        // nor after a crash, if its peer had it
        w.advance(2_000);
        w.crash(1);
        let b = w.online_now(&bob, "b");
        let heard = said(&mut w, b);
        let all: &[&str] = if taken { &["2"] } else { &["1", "2"] };
        assert_eq!(heard, all);
    }
}

#[test]
fn who_comes_back_before_the_end_of_his_connection_gets_what_was_on_its_way_in_order() {
    let (mut w, alice, bob) = two(1);
    let a = managed(&mut w, &alice, "a");
    let old = w.online(&bob, "b");
    w.confirms = false;
    w.lefts = Some(Vec::new());
    w.send(a, &chat(&bob, "1"));
    w.logout(old);
    w.send(a, &chat(&bob, "2"));
    let b = w.online_now(&bob, "b");
    w.send(a, &chat(&bob, "3"));
    // too late: it has been sent again
    w.slice_of(&bob).left(&bob, Some(old.link()), false);
    let heard = said(&mut w, b);
    assert_eq!(heard, ["1", "2", "3"]);

    // another client of his is there and gets it at once
    let c = w.online(&bob, "c");
    w.take(c);
    w.send(a, &chat(&bob, "4").replace("@localhost", "@localhost/b"));
    w.logout(b);
    assert_eq!(w.lefts.take().unwrap().len(), 1, "only the first");
    assert!(got(&mut w, c).contains(&"4".to_owned()));
}

#[test]
fn a_message_for_somebody_who_cannot_be_loaded_is_accepted_and_decided_when_he_can() {
    for exists in [true, false] {
        let (mut w, alice, bob) = two(2);
        let a = managed(&mut w, &alice, "a");
        if !exists {
            w.tier.users.remove(&bob);
        }
        w.tier.gone = true;
        w.send(a, &chat(&bob, "1"));
        w.send(a, R);
        assert_eq!(got(&mut w, a), ["a 2"]);
        // a crash does not change it
        w.tier.dry = true;
        w.crash(2);
        let a = {
            w.tier.gone = false;
            let a = w.online_now(&alice, "a");
            w.take(a);
            a
        };
        w.advance(2_000);
        let b = exists.then(|| w.online_now(&bob, "b"));
        match b {
            Some(b) => assert!(got(&mut w, b).contains(&"1".to_owned())),
            None => assert!(w.take(a).is_empty() || !exists),
        }
    }
}

#[test]
fn what_was_delivered_after_its_recipient_was_known_is_not_decided_again() {
    // carried over into SQL before the crash, in between, or not at all
    for (dry_before, dry_after) in [(false, false), (true, false), (true, true)] {
        let (mut w, alice, bob) = two(2);
        let a = managed(&mut w, &alice, "a");
        (w.tier.gone, w.tier.dry) = (true, dry_before);
        w.send(a, &chat(&bob, "1"));
        w.tier.gone = false;
        w.advance(2_000);
        let b = managed(&mut w, &bob, "b");
        assert!(w.session(b).sm.as_ref().unwrap().waiting() > 0);
        w.tier.dry = dry_after;
        let block = format!(
            "<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{alice}@localhost'/></block></iq>"
        );
        w.send(b, &block);
        assert!(w.take(b).iter().any(|s| s.contains("type='result'")));
        for (after, waits) in [(2, true), (1, false)] {
            w.crash(after);
            let b = w.online_now(&bob, "b");
            assert_eq!(got(&mut w, b).contains(&"1".to_owned()), waits, "{after}");
            let archive = "<iq type='set' id='m'><query xmlns='urn:xmpp:mam:2'/></iq>";
            w.send(b, archive);
            let found = w.take(b).concat();
            assert!(found.contains("<body>1</body>"), "{after}: {found}");
        }
    }
}

#[test]
fn no_count_covers_a_stanza_before_its_error_is_told() {
    // one that can be resumed, and one that cannot
    for enable in [ENABLE, "<enable xmlns='urn:xmpp:sm:3'/>"] {
        let (mut w, alice, bob) = two(2);
        let (carol, dave) = (w.on(0, "carol"), w.on(0, "dave"));
        w.add(&carol);
        w.add(&dave);
        let a = w.login(&alice, "a");
        w.send(a, enable);
        w.send(a, "<presence/>");
        w.take(a);
        let block = format!(
            "<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{alice}@localhost'/></block></iq>"
        );
        for name in [&bob, &carol] {
            let client = w.online(name, "x");
            w.send(client, &block);
        }
        let d = w.online(&dave, "d");
        // the other shard refuses the first one, while the second is on its way to the disk
        w.tier.held = true;
        w.element(a, &chat(&bob, "1")).unwrap();
        w.send(a, &chat(&dave, "2"));
        w.send(a, R);
        w.release();
        assert_eq!(got(&mut w, a), ["1", "a 3"], "{enable}");
        // her own shard refuses one, while somebody else's to her is on its way to the disk
        w.tier.held = true;
        w.send(d, &chat(&alice, "3"));
        w.send(a, &chat(&carol, "4"));
        w.send(a, R);
        w.release();
        assert_eq!(got(&mut w, a), ["3", "4", "a 4"], "{enable}");
    }
}

#[test]
fn what_an_old_journal_says_is_not_taken_for_the_newest_while_the_database_is_away() {
    let mut w = World::new(2);
    // of a shard that is no more after the next start
    let carol = w.on(1, "carol");
    let add = |w: &mut World, name: &str, password: &str| {
        let record = Record::new(&UserRecord {
            created_at: password.len() as u64,
            ..UserRecord::default()
        });
        let slice = w.slice_of(name);
        slice.want(name);
        w.run();
        let then = Box::new(|_: &mut Slice, result: Result<(), _>| result.unwrap());
        w.slice_of(name).write(name, Op::AddUser { record }, then);
        w.run();
    };
    add(&mut w, &carol, "old");
    let vcard = |n: u32| {
        format!("<iq type='set' id='v'><vCard xmlns='vcard-temp'><FN>card {n}</FN></vCard></iq>")
    };
    let c = w.login(&carol, "c");
    w.send(c, &vcard(1));
    w.crash(1);
    let c = w.login(&carol, "c");
    w.send(c, &vcard(2));
    let edit = |record: &mut UserRecord| record.created_at = 17;
    w.slice_of(&carol)
        .edit(&carol, edit, Box::new(|_, result| result.unwrap()));
    w.run();
    w.advance(100);
    add(&mut w, "newborn", "new");
    // the database has all, and is away when the next start finds only what is oldest
    w.recycle(0);
    w.tier.gone = true;
    for shards in [1, 2] {
        w.crash(shards);
        for name in [&*carol, "newborn"] {
            w.slice_of(name).want(name);
        }
        w.run();
        assert!(w.slice_of(&carol).user(&carol).is_none(), "{shards}");
        // of him the journal surely has all, as long as the owners are the same
        let known = w.slice_of("newborn").user("newborn").is_some();
        assert_eq!(known, shards == 1, "{shards}");
    }
    w.tier.gone = false;
    w.drain();
    let c = w.login(&carol, "c");
    assert_eq!(w.user(&carol).record.to_owned().created_at, 17);
    w.send(c, "<iq type='get' id='v'><vCard xmlns='vcard-temp'/></iq>");
    assert!(w.take(c).concat().contains("card 2"));
}

#[test]
fn a_subscription_reaches_the_other_owner_whatever_happens_between() {
    let (mut w, alice, bob) = two(2);
    let a = managed(&mut w, &alice, "a");
    w.element(
        a,
        &format!("<presence type='subscribe' to='{bob}@localhost'/>"),
    )
    .unwrap();
    let shard = a.shard;
    w.commit_only(shard);
    assert!(w.stored(&alice).roster[0].ask);
    w.crash(2);
    assert_eq!(w.stored(&bob).requests.len(), 1);
}

#[test]
fn the_other_half_of_a_durable_subscription_waits_until_the_journal_has_room() {
    let (mut w, alice, bob) = two(2);
    let say = |kind: &str| format!("<presence type='{kind}' to='{bob}@localhost'/>");
    let a = managed(&mut w, &alice, "a");
    w.slice_of(&bob).journal_is_full(true);
    w.send(a, &say("subscribe"));
    assert!(w.stored(&alice).roster[0].ask && w.stored(&bob).requests.is_empty());
    assert!(!w.take(a).concat().contains("type='error'"));
    // what she says later does not overtake it
    w.send(a, &chat(&alice, "1"));
    let before = w.slice_of(&alice).fx.floor;
    w.send(a, &say("unsubscribe"));
    w.slice_of(&bob).journal_is_full(false);
    w.run();
    assert!(w.stored(&bob).requests.is_empty() && !w.stored(&alice).roster[0].ask);
    w.send(a, &chat(&alice, "2"));
    assert!(w.slice_of(&alice).fx.floor > before, "both are settled");
    // and a crash does not lose it
    w.slice_of(&bob).journal_is_full(true);
    w.send(a, &say("subscribe"));
    w.crash(2);
    assert_eq!(w.stored(&bob).requests.len(), 1);
}

#[test]
fn changes_that_wait_for_their_other_halves_are_bounded_where_they_begin() {
    let mut w = World::with(2, |limits| limits.mesh_backlog_bytes_max = 1 << 10);
    let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
    w.add(&alice);
    w.add(&bob);
    let a = managed(&mut w, &alice, "a");
    w.slice_of(&bob).journal_is_full(true);
    let text = "x".repeat(600);
    let say = |kind: &str| {
        format!("<presence type='{kind}' to='{bob}@localhost'><status>{text}</status></presence>")
    };
    w.send(a, &say("subscribe"));
    w.send(a, &say("unsubscribe"));
    assert!(!w.take(a).concat().contains("type='error'"));
    w.send(a, &say("subscribe"));
    let refused = w.take(a).concat();
    assert!(refused.contains("resource-constraint"), "{refused}");
    assert!(!w.stored(&alice).roster[0].ask, "the last one was not made");
    w.slice_of(&bob).journal_is_full(false);
    w.run();
    w.send(a, &say("subscribe"));
    assert_eq!(w.stored(&bob).requests.len(), 1);
}

#[test]
fn what_a_subscription_has_changed_is_not_changed_again_after_a_crash() {
    for shards in [1, 2] {
        let (mut w, alice, bob) = two(shards);
        let a = managed(&mut w, &alice, "a");
        let b = managed(&mut w, &bob, "b");
        w.send(
            a,
            &format!("<presence type='subscribe' to='{bob}@localhost'/>"),
        );
        assert_eq!(w.stored(&bob).requests.len(), 1);
        w.send(
            b,
            &format!("<presence type='unsubscribed' to='{alice}@localhost'/>"),
        );
        w.advance(100);
        w.crash(shards);
        w.advance(100);
        assert_eq!(w.stored(&bob).requests.len(), 0, "{shards}");
        assert!(!w.stored(&alice).roster[0].ask);
    }
}

#[test]
fn a_subscription_keeps_its_place_in_the_journal_until_it_is_known_at_the_other_side() {
    let (mut w, alice, bob) = two(1);
    let a = managed(&mut w, &alice, "a");
    w.tier.gone = true;
    w.send(
        a,
        &format!("<presence type='subscribe' to='{bob}@localhost'/>"),
    );
    let before = w.slice_of(&alice).fx.floor;
    w.send(a, &chat(&alice, "1"));
    w.advance(2_000);
    w.send(a, &chat(&alice, "2"));
    assert_eq!(w.slice_of(&alice).fx.floor, before);
    w.tier.gone = false;
    w.advance(2_000);
    assert_eq!(w.stored(&bob).requests.len(), 1);
    assert!(w.slice_of(&alice).fx.floor > before);
}

#[test]
fn a_change_made_while_an_account_is_removed_does_not_bring_it_back() {
    let (mut w, alice, bob) = two(1);
    w.tier.dry = true;
    let (one, two) = (w.online(&alice, "1"), w.online(&alice, "2"));
    w.element(
        one,
        "<iq type='set' id='r'><query xmlns='jabber:iq:register'><remove/></query></iq>",
    )
    .unwrap();
    w.element(
        two,
        &format!("<iq type='set' id='r'><query xmlns='jabber:iq:roster'><item jid='{bob}@localhost'/></query></iq>"),
    )
    .unwrap();
    w.run();
    w.crash(1);
    w.slice_of(&alice).want(&alice);
    w.run();
    assert!(w.slice_of(&alice).user(&alice).is_none());
}

#[test]
fn undrained_changes_are_what_a_login_and_a_read_see() {
    let (mut w, alice, bob) = two(1);
    w.tier.dry = true;
    let a = w.online(&alice, "a");
    w.send(
        a,
        "<iq type='set' id='v'><vCard xmlns='vcard-temp'><FN>A</FN></vCard></iq>",
    );
    w.send(
        a,
        &format!("<iq type='set' id='r'><query xmlns='jabber:iq:roster'><item jid='{bob}@localhost'/></query></iq>"),
    );
    w.take(a);
    w.crash(1);
    assert!(w.tier.users[&alice].documents.is_empty());
    let a = w.login(&alice, "a");
    w.send(
        a,
        "<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>",
    );
    assert!(
        w.take(a)
            .concat()
            .contains(&format!("jid='{bob}@localhost'"))
    );
    w.send(a, "<iq type='get' id='v'><vCard xmlns='vcard-temp'/></iq>");
    assert!(w.take(a).concat().contains("<FN>A</FN>"));
}

#[test]
fn subscriptions_that_lead_nowhere_do_not_fill_the_room_for_those_under_way() {
    for shards in [1, 2] {
        let mut w = World::with(shards, |limits| limits.mesh_backlog_bytes_max = 5000);
        let (alice, nobody) = (w.on(0, "alice"), w.on(0, "nobody"));
        w.add(&alice);
        let a = managed(&mut w, &alice, "a");
        let long = "x".repeat(500);
        for _ in 0..30 {
            w.send(a, &format!("<presence type='subscribe' to='{nobody}@localhost'><status>{long}</status></presence>"));
            w.send(
                a,
                &format!("<presence type='unsubscribe' to='{nobody}@localhost'/>"),
            );
        }
        assert!(!w.slice_of(&alice).forwards_full(), "{shards}");
        assert!(!w.take(a).concat().contains("resource-constraint"));
    }
}
