use crate::xmpp::testing::{Client, World, matches};

/// A room that the shard owns.
fn room_on(w: &World, shard: usize) -> String {
    let owner = |n: &u32| usize::from(w.slices[0].env.owner(&super::entity(&format!("desk{n}"))));
    let n = (0..).find(|n| owner(n) == shard).unwrap();
    format!("desk{n}@rooms.localhost")
}

fn join(w: &mut World, client: Client, room: &str, nick: &str) {
    w.send(
        client,
        &format!(
            "<presence to='{room}/{nick}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
        ),
    );
}

/// The owner takes the room as it is.
fn accept(w: &mut World, client: Client, room: &str) {
    configure(w, client, room, &[]);
}

fn configure(w: &mut World, client: Client, room: &str, fields: &[(&str, &str)]) {
    let fields: String = fields
        .iter()
        .map(|(var, value)| format!("<field var='{var}'><value>{value}</value></field>"))
        .collect();
    w.send(
        client,
        &format!(
            "<iq type='set' id='c' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'>\
             <x xmlns='jabber:x:data' type='submit'>{fields}</x></query></iq>"
        ),
    );
}

fn say(w: &mut World, client: Client, room: &str, text: &str) {
    w.send(
        client,
        &format!("<message type='groupchat' id='{text}' to='{room}'><body>{text}</body></message>"),
    );
}

/// Alice has made a room, Bob is in it; nothing is left to take.
fn two(shards: usize) -> (World, Client, Client, String) {
    let mut w = World::new(shards);
    let (alice, bob) = (w.on(0, "alice"), w.on(shards - 1, "bob"));
    w.add(&alice);
    w.add(&bob);
    let a = w.online(&alice, "a");
    let b = w.online(&bob, "b");
    let room = room_on(&w, 0);
    join(&mut w, a, &room, "Alice");
    accept(&mut w, a, &room);
    join(&mut w, b, &room, "Bob");
    w.take(a);
    w.take(b);
    (w, a, b, room)
}

/// Exactly these come, in this order; `*` stands for any value.
#[track_caller]
fn expect(w: &mut World, client: Client, wanted: &[&str]) {
    let got = w.take(client);
    let same = got.len() == wanted.len() && got.iter().zip(wanted).all(|(g, x)| matches(x, g));
    assert!(same, "wanted {wanted:#?}\ngot {got:#?}");
}

#[track_caller]
fn has(w: &mut World, client: Client, parts: &[&str]) -> String {
    let got = w.take(client).concat();
    for part in parts {
        assert!(got.contains(part), "{part} is not in {got}");
    }
    got
}

fn admin(w: &mut World, client: Client, room: &str, items: &str) {
    w.send(
        client,
        &format!("<iq type='set' id='m' to='{room}'><query xmlns='http://jabber.org/protocol/muc#admin'>{items}</query></iq>"),
    );
}

const ITEM: &str = "http://jabber.org/protocol/muc#user";

#[test]
fn a_message_reaches_all_with_one_stable_id_and_no_real_address() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        say(&mut w, b, &room, "hello");
        let to_a = has(
            &mut w,
            a,
            &["<body>hello</body>", &format!("from='{room}/Bob'")],
        );
        let to_b = has(
            &mut w,
            b,
            &["<body>hello</body>", &format!("from='{room}/Bob'")],
        );
        let id = |text: &str| text.split("stanza-id").nth(1).unwrap().to_owned();
        assert_eq!(id(&to_a), id(&to_b));
        assert!(to_a.contains(&format!("by='{room}'")) && !to_a.contains("bob@localhost"));
    }
}

#[test]
fn nobody_sees_a_message_and_no_count_covers_it_before_it_is_durable() {
    let (mut w, a, b, room) = two(2);
    w.send(b, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
    w.take(b);
    w.tier.held = true;
    say(&mut w, b, &room, "hello");
    w.send(b, "<r xmlns='urn:xmpp:sm:3'/>");
    assert_eq!(w.take(a), Vec::<String>::new());
    assert_eq!(w.take(b), Vec::<String>::new(), "not even a count");
    // what would overtake it waits behind it
    w.send(
        b,
        &format!("<presence to='{room}/Bob'><show>away</show></presence>"),
    );
    assert_eq!(w.take(a), Vec::<String>::new());
    w.release();
    let got = w.take(a);
    assert!(
        got[0].contains("<body>hello") && got[1].contains("<show>away"),
        "{got:?}"
    );
    has(
        &mut w,
        b,
        &["<body>hello", "<a xmlns='urn:xmpp:sm:3' h='2'/>"],
    );
}

#[test]
fn what_one_says_and_does_is_seen_in_that_order_whatever_waits_for_the_journal() {
    let (mut w, a, b, room) = two(2);
    w.tier.held = true;
    say(&mut w, b, &room, "1");
    w.send(b, &format!("<presence to='{room}/Bobby'/>"));
    say(&mut w, b, &room, "2");
    w.send(b, &format!("<message type='groupchat' to='{room}'><composing xmlns='http://jabber.org/protocol/chatstates'/></message>"));
    say(&mut w, b, &room, "3");
    w.send(
        b,
        &format!("<presence type='unavailable' to='{room}/Bobby'/>"),
    );
    w.release();
    let got = w.take(a);
    let marks = [
        "<body>1<",
        "code='303'",
        "/Bobby'>",
        "<body>2<",
        "<composing",
        "<body>3<",
        "type='unavailable'",
    ];
    assert_eq!(got.len(), marks.len(), "{got:#?}");
    for (got, mark) in got.iter().zip(marks) {
        assert!(got.contains(mark), "{mark} is not {got}");
    }
    assert!(got[3].contains(&format!("from='{room}/Bobby'")));
}

#[test]
fn after_a_crash_a_room_has_its_state_and_messages_and_nobody_in_it() {
    let (mut w, a, b, room) = two(2);
    configure(
        &mut w,
        a,
        &room,
        &[
            ("muc#roomconfig_persistentroom", "1"),
            ("muc#roomconfig_roomname", "Desk"),
        ],
    );
    say(&mut w, b, &room, "one");
    w.send(
        a,
        &format!("<message type='groupchat' to='{room}'><subject>rates</subject></message>"),
    );
    say(&mut w, a, &room, "two");
    let bob = w.session(b).user.clone();
    w.crash(2);
    let b = w.online(&bob, "b");
    // XEP-0410: he is not in any more
    w.send(
        b,
        &format!("<iq type='get' id='p' to='{room}/Bob'><ping xmlns='urn:xmpp:ping'/></iq>"),
    );
    has(&mut w, b, &["type='error'", "<not-acceptable"]);
    join(&mut w, b, &room, "Bob");
    let got = w.take(b);
    assert!(
        got[0].contains("code='110'") && !got[0].contains("code='201'"),
        "{got:#?}"
    );
    assert!(
        got[1].contains("<body>one</body>")
            && got[1].contains("<delay")
            && got[1].contains("<stanza-id")
    );
    assert!(got[2].contains("<body>two</body>"));
    assert!(got[3].contains("<subject>rates</subject>"));
    assert_eq!(got.len(), 4);
    w.send(
        b,
        &format!("<iq type='set' id='q' to='{room}'><query xmlns='urn:xmpp:mam:2'/></iq>"),
    );
    let got = w.take(b);
    assert!(
        got[0].contains("<body>one</body>") && got[1].contains("<body>two</body>"),
        "{got:#?}"
    );
    assert!(got[2].contains("<fin") && got[2].contains("complete='true'"));
    w.send(b, &format!("<iq type='get' id='i' to='{room}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>"));
    has(
        &mut w,
        b,
        &["name='Desk'", "muc_persistent", "urn:xmpp:mam:2"],
    );
}

#[test]
fn an_acknowledged_message_is_in_the_archive_once_if_the_process_dies_before_anybody_got_it() {
    let (mut w, a, b, room) = two(2);
    configure(&mut w, a, &room, &[("muc#roomconfig_persistentroom", "1")]);
    let bob = w.session(b).user.clone();
    w.tier.dry = true;
    for n in 0..5 {
        say(&mut w, b, &room, &n.to_string());
    }
    w.crash(1);
    let b = w.online(&bob, "b");
    w.send(
        b,
        &format!("<iq type='set' id='q' to='{room}'><query xmlns='urn:xmpp:mam:2'/></iq>"),
    );
    let got = w.take(b);
    assert_eq!(got.len(), 6, "{got:#?}");
    for (n, got) in got[..5].iter().enumerate() {
        assert!(got.contains(&format!("<body>{n}</body>")));
    }
}

#[test]
fn a_full_journal_refuses_messages_and_changes_and_the_room_goes_on() {
    let (mut w, a, b, room) = two(1);
    w.tier.broken = true;
    say(&mut w, b, &room, "lost");
    has(&mut w, b, &["type='error'", "<resource-constraint"]);
    configure(&mut w, a, &room, &[("muc#roomconfig_roomname", "x")]);
    has(&mut w, a, &["type='error'", "<resource-constraint"]);
    w.send(
        b,
        &format!("<presence to='{room}/Bob'><show>dnd</show></presence>"),
    );
    has(&mut w, a, &["<show>dnd"]);
    w.tier.broken = false;
    say(&mut w, b, &room, "kept");
    has(&mut w, a, &["<body>kept"]);
}

#[test]
fn whoever_ends_leaves_his_rooms_however_he_ends() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        let bob = w.session(b).user.clone();
        w.cut(b);
        has(
            &mut w,
            a,
            &["type='unavailable'", &format!("from='{room}/Bob'")],
        );
        let b = w.online(&bob, "b");
        join(&mut w, b, &room, "Bob");
        w.take(a);
        w.send(b, "<presence type='unavailable'/>");
        has(&mut w, a, &["type='unavailable'"]);
        assert!(w.session(b).rooms.is_empty());
    }
}

#[test]
fn a_session_that_may_be_resumed_stays_in_and_gets_what_was_said() {
    let (mut w, a, b, room) = two(2);
    w.send(b, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
    w.cut(b);
    assert_eq!(w.take(a), Vec::<String>::new());
    say(&mut w, a, &room, "hello");
    assert_eq!(w.session(b).sm.as_ref().unwrap().waiting(), 1);
    w.take(a);
    w.advance(400_000);
    has(
        &mut w,
        a,
        &["type='unavailable'", &format!("from='{room}/Bob'")],
    );
}

#[test]
fn a_temporary_room_ends_with_its_last_occupant_and_its_archive_with_it() {
    let (mut w, a, b, room) = two(2);
    say(&mut w, b, &room, "hello");
    w.logout(b);
    w.send(
        a,
        &format!("<presence type='unavailable' to='{room}/Alice'/>"),
    );
    has(&mut w, a, &["type='unavailable'", "code='110'"]);
    assert!(w.session(a).rooms.is_empty());
    assert!(w.tier.users.keys().all(|name| !name.contains('@')));
    assert!(w.slices.iter().all(|slice| slice.rooms.count == 0));
    join(&mut w, a, &room, "Alice");
    let got = has(&mut w, a, &["code='201'"]);
    assert!(!got.contains("hello"));
}

#[test]
fn kicked_and_banned_people_are_out_and_their_sessions_know_it() {
    let (mut w, a, b, room) = two(2);
    admin(
        &mut w,
        a,
        &room,
        "<item nick='Bob' role='none'><reason>late</reason></item>",
    );
    has(
        &mut w,
        b,
        &[
            "type='unavailable'",
            "code='307'",
            "code='110'",
            "<reason>late</reason>",
            "<actor nick='Alice'/>",
        ],
    );
    has(&mut w, a, &["code='307'", "type='result'"]);
    assert!(w.session(b).rooms.is_empty());
    say(&mut w, b, &room, "x");
    has(&mut w, b, &["<not-acceptable"]);
    join(&mut w, b, &room, "Bob");
    w.take(b);
    let bob = w.session(b).bare().to_owned();
    admin(
        &mut w,
        a,
        &room,
        &format!("<item jid='{bob}' affiliation='outcast'/>"),
    );
    has(&mut w, b, &["code='301'"]);
    join(&mut w, b, &room, "Bob");
    has(&mut w, b, &["<forbidden"]);
    assert!(w.session(b).rooms.is_empty());
    // he does not get at the archive either
    w.send(
        b,
        &format!("<iq type='set' id='q' to='{room}'><query xmlns='urn:xmpp:mam:2'/></iq>"),
    );
    has(&mut w, b, &["<forbidden"]);
}

#[test]
fn who_has_no_right_changes_nothing() {
    let (mut w, a, b, room) = two(2);
    let alice = w.session(a).bare().to_owned();
    for items in [
        "<item nick='Alice' role='none'/>".to_owned(),
        "<item nick='Bob' role='moderator'/>".to_owned(),
        format!("<item jid='{alice}' affiliation='outcast'/>"),
        "<item nick='Bob' affiliation='owner'/>".to_owned(),
    ] {
        admin(&mut w, b, &room, &items);
        has(&mut w, b, &["<forbidden"]);
    }
    configure(&mut w, b, &room, &[("muc#roomconfig_roomname", "mine")]);
    has(&mut w, b, &["<forbidden"]);
    w.send(b, &format!("<iq type='set' id='d' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'><destroy/></query></iq>"));
    has(&mut w, b, &["<forbidden"]);
    w.send(
        b,
        &format!("<message type='groupchat' to='{room}'><subject>mine</subject></message>"),
    );
    has(&mut w, b, &["<forbidden"]);
    // the last owner stays
    admin(
        &mut w,
        a,
        &room,
        &format!("<item jid='{alice}' affiliation='none'/>"),
    );
    has(&mut w, a, &["<conflict"]);
}

#[test]
fn nicks_that_look_alike_are_a_conflict() {
    let (mut w, a, _, room) = two(1);
    let carol = w.on(0, "carol");
    w.add(&carol);
    let c = w.online(&carol, "c");
    for nick in ["Alice", "alice", "\u{410}lice", "\u{ff21}lice", "Bob"] {
        join(&mut w, c, &room, nick);
        has(&mut w, c, &["type='error'", "<conflict"]);
    }
    assert!(w.session(c).rooms.is_empty());
    join(&mut w, c, &room, "Carol");
    has(&mut w, c, &["code='110'"]);
    w.take(a);
    w.send(c, &format!("<presence to='{room}/ALICE'/>"));
    has(&mut w, c, &["<conflict"]);
    assert_eq!(w.session(c).rooms.len(), 1);
}

#[test]
fn nobody_speaks_in_the_name_of_the_room_or_of_another_occupant() {
    let (mut w, a, b, room) = two(2);
    w.send(
        b,
        &format!(
            "<message type='groupchat' to='{room}'><body>x</body><stanza-id xmlns='urn:xmpp:sid:0' by='{room}' id='forged'/>\
             <occupant-id xmlns='urn:xmpp:occupant-id:0' id='forged'/>\
             <x xmlns='{ITEM}'><status code='110'/></x>\
             <delay xmlns='urn:xmpp:delay' from='{room}' stamp='2000-01-01T00:00:00Z'/></message>"
        ),
    );
    let got = has(&mut w, a, &["<body>x"]);
    assert!(
        !got.contains("forged") && !got.contains("<status") && !got.contains("2000"),
        "{got}"
    );
    assert_eq!(got.matches("<stanza-id").count(), 1);
    w.send(b, &format!("<presence to='{room}/Bob'><x xmlns='{ITEM}'><item affiliation='owner' role='moderator'/></x></presence>"));
    let got = w.take(a).concat();
    assert!(!got.contains("moderator"), "{got}");
}

#[test]
fn who_floods_a_room_is_refused_and_the_others_are_not() {
    let (mut w, a, b, room) = two(1);
    w.slices[0].env.limits.rooms.messages_per_second_max = 2;
    for n in 0..10 {
        say(&mut w, b, &room, &n.to_string());
    }
    let got = w.take(b);
    assert_eq!(
        got.iter()
            .filter(|m| m.contains("<resource-constraint"))
            .count(),
        4
    );
    assert_eq!(w.take(a).len(), 6);
    say(&mut w, a, &room, "calm");
    has(&mut w, b, &["<body>calm"]);
    w.advance(1000);
    say(&mut w, b, &room, "again");
    has(&mut w, a, &["<body>again"]);
    assert_eq!(w.slices[0].counters.room_refused, 4);
}

#[test]
fn every_list_of_rooms_has_a_bound_with_an_error() {
    let (mut w, a, b, room) = two(1);
    let limits = &mut w.slices[0].env.limits.rooms;
    limits.per_session_max = 1;
    limits.rooms_max = 1;
    limits.occupants_max = 2;
    limits.affiliates_max = 2;
    limits.subject_bytes_max = 5;
    limits.nick_bytes_max = 5;
    let carol = w.on(0, "carol");
    w.add(&carol);
    let c = w.online(&carol, "c");
    join(&mut w, b, "other@rooms.localhost", "Bob");
    has(&mut w, b, &["<resource-constraint"]);
    join(&mut w, c, "other@rooms.localhost", "Carol");
    has(&mut w, c, &["<resource-constraint"]);
    assert!(w.session(c).rooms.is_empty());
    join(&mut w, c, &room, "Carol");
    has(&mut w, c, &["<service-unavailable"]);
    w.send(
        a,
        &format!("<message type='groupchat' to='{room}'><subject>too long</subject></message>"),
    );
    has(&mut w, a, &["<not-acceptable"]);
    w.send(a, &format!("<presence to='{room}/longer'/>"));
    has(&mut w, a, &["<not-acceptable"]);
    admin(
        &mut w,
        a,
        &room,
        "<item jid='x@localhost' affiliation='member'/><item jid='y@localhost' affiliation='member'/>",
    );
    has(&mut w, a, &["<resource-constraint"]);
}

#[test]
fn rooms_are_made_by_those_who_may() {
    let mut w = World::new(1);
    w.add("alice");
    w.add("bob");
    w.slices[0].env.limits.rooms.creators = Some(vec!["alice@localhost".into()]);
    let a = w.online("alice", "a");
    let b = w.online("bob", "b");
    join(&mut w, b, "desk@rooms.localhost", "Bob");
    has(&mut w, b, &["<not-allowed"]);
    join(&mut w, a, "desk@rooms.localhost", "Alice");
    has(&mut w, a, &["code='201'"]);
}

#[test]
fn several_sessions_of_one_person_share_a_nick() {
    let (mut w, a, b, room) = two(2);
    let bob = w.session(b).user.clone();
    let phone = w.online(&bob, "phone");
    w.take(b);
    join(&mut w, phone, &room, "Bob");
    has(
        &mut w,
        phone,
        &["code='110'", &format!("from='{room}/Alice'")],
    );
    w.take(a);
    w.take(b);
    say(&mut w, a, &room, "hello");
    has(&mut w, b, &["<body>hello"]);
    has(&mut w, phone, &["<body>hello"]);
    w.take(a);
    w.logout(phone);
    let got = w.take(a).concat();
    assert!(!got.contains("unavailable"), "he is still in: {got}");
    say(&mut w, b, &room, "still");
    has(&mut w, a, &["<body>still"]);
}

#[test]
fn a_private_message_goes_through_the_room_and_keeps_the_promise() {
    let (mut w, a, b, room) = two(2);
    w.send(b, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
    w.take(b);
    w.send(
        b,
        &format!("<message type='chat' id='p' to='{room}/Alice'><body>psst</body></message>"),
    );
    let got = has(
        &mut w,
        a,
        &["<body>psst", &format!("from='{room}/Bob'"), "muc#user"],
    );
    assert!(!got.contains("bob@localhost"));
    w.send(b, "<r xmlns='urn:xmpp:sm:3'/>");
    has(&mut w, b, &["h='1'"]);
    w.send(
        b,
        &format!("<message type='chat' to='{room}/Nobody'><body>psst</body></message>"),
    );
    has(&mut w, b, &["<item-not-found"]);
    let carol = w.on(0, "carol");
    w.add(&carol);
    let c = w.online(&carol, "c");
    w.send(
        c,
        &format!("<message type='chat' to='{room}/Alice'><body>spam</body></message>"),
    );
    has(&mut w, c, &["<not-acceptable"]);
    assert_eq!(w.take(a), Vec::<String>::new());
}

#[test]
fn who_blocks_a_room_hears_nothing_of_it() {
    let (mut w, a, b, room) = two(2);
    w.send(b, &format!("<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{room}'/></block></iq>"));
    w.take(b);
    say(&mut w, a, &room, "hello");
    assert_eq!(w.take(b), Vec::<String>::new());
}

#[test]
fn requests_between_occupants_find_their_way_and_tell_no_address() {
    let (mut w, a, b, room) = two(2);
    w.send(
        b,
        &format!("<iq type='get' id='v' to='{room}/Alice'><query xmlns='jabber:iq:version'/></iq>"),
    );
    let got = w.take(a).concat();
    assert!(
        got.contains(&format!("from='{room}/Bob'")) && got.contains("jabber:iq:version"),
        "{got}"
    );
    let id = got
        .split("id='")
        .nth(1)
        .unwrap()
        .split('\'')
        .next()
        .unwrap()
        .to_owned();
    w.send(a, &format!("<iq type='result' id='{id}' to='{room}/Bob'><query xmlns='jabber:iq:version'><name>x</name></query></iq>"));
    expect(
        &mut w,
        b,
        &[&format!(
            "<iq type='result' id='v' from='{room}/Alice' to='*'><query xmlns='jabber:iq:version'><name>x</name></query></iq>"
        )],
    );
    w.send(
        b,
        &format!("<iq type='get' id='s' to='{room}/Bob'><ping xmlns='urn:xmpp:ping'/></iq>"),
    );
    has(&mut w, b, &["type='result'", "id='s'"]);
    w.send(
        a,
        "<iq type='set' id='k'><vCard xmlns='vcard-temp'><FN>A</FN></vCard></iq>",
    );
    w.take(a);
    w.send(
        b,
        &format!("<iq type='get' id='c' to='{room}/Alice'><vCard xmlns='vcard-temp'/></iq>"),
    );
    has(
        &mut w,
        b,
        &["<FN>A</FN>", &format!("from='{room}/Alice'"), "id='c'"],
    );
}

#[test]
fn presence_of_a_crowd_is_merged_when_turns_have_no_room() {
    let (mut w, a, b, room) = two(1);
    w.room = 0;
    w.slices[0].release(0);
    for show in ["away", "dnd", "xa"] {
        w.send(
            b,
            &format!("<presence to='{room}/Bob'><show>{show}</show></presence>"),
        );
    }
    assert_eq!(w.take(a), Vec::<String>::new());
    assert_eq!(w.take(b).len(), 3, "his own comes at once");
    say(&mut w, b, &room, "hello");
    let got = w.take(a);
    assert!(
        got.len() == 2 && got[0].contains("<show>xa") && got[1].contains("<body>hello"),
        "{got:#?}"
    );
    assert!(got[0].contains(&format!("to='{}'", w.session(a).jid)));
}

#[test]
fn a_record_of_a_room_is_no_account() {
    let (mut w, a, _, room) = two(1);
    let name = super::entity(room.split('@').next().unwrap());
    assert!(w.slices[0].user(&name).is_none());
    w.send(
        a,
        &format!("<message type='chat' to='{room}'><body>x</body></message>"),
    );
    has(&mut w, a, &["<service-unavailable"]);
}

#[test]
fn the_list_of_rooms_is_the_same_on_all_shards() {
    let (mut w, a, b, room) = two(2);
    let ask = "<iq type='get' id='l' to='rooms.localhost'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>";
    for client in [a, b] {
        w.send(client, ask);
        has(&mut w, client, &[&format!("jid='{room}'")]);
    }
    configure(&mut w, a, &room, &[("muc#roomconfig_publicroom", "0")]);
    w.take(b);
    w.send(b, ask);
    assert!(!w.take(b).concat().contains("desk"));
}

#[test]
fn every_stanza_to_a_room_is_counted_once_its_fate_is_known() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        let blocked = w.session(b).bare().to_owned();
        let carol = w.on(0, "carol");
        w.add(&carol);
        w.send(a, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
        w.take(a);
        let join = "<x xmlns='http://jabber.org/protocol/muc#user'>";
        for stanza in [
            format!("<message type='groupchat' to='{room}'><body>x</body></message>"),
            format!(
                "<message type='groupchat' to='{room}'><active xmlns='http://jabber.org/protocol/chatstates'/></message>"
            ),
            format!("<message type='groupchat' to='{room}'><subject>x</subject></message>"),
            format!("<message type='chat' to='{room}/Bob'><body>x</body></message>"),
            format!("<message type='chat' to='{room}/Nobody'><body>x</body></message>"),
            format!("<message to='{room}'>{join}<invite to='{carol}@localhost'/></x></message>"),
            format!("<message to='{room}'>{join}<decline to='{room}/Bob'/></x></message>"),
            format!("<message to='{room}'><body>x</body></message>"),
            format!(
                "<iq type='get' id='1' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'/></iq>"
            ),
            format!(
                "<iq type='set' id='2' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'/></iq>"
            ),
            format!(
                "<iq type='get' id='3' to='{room}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>"
            ),
            format!("<iq type='set' id='4' to='{room}'><query xmlns='urn:xmpp:mam:2'/></iq>"),
            format!("<iq type='get' id='5' to='{room}'><vCard xmlns='vcard-temp'/></iq>"),
            format!(
                "<iq type='get' id='6' to='{room}/Bob'><query xmlns='jabber:iq:version'/></iq>"
            ),
            format!("<iq type='get' id='7' to='{room}'><unknown xmlns='urn:x'/></iq>"),
            format!(
                "<iq type='set' id='8' to='{room}'><query xmlns='http://jabber.org/protocol/muc#admin'><item jid='{carol}@localhost' affiliation='member'/></query></iq>"
            ),
            format!(
                "<iq type='set' id='9' to='{room}'><query xmlns='http://jabber.org/protocol/muc#admin'><item nick='Nobody' role='none'/></query></iq>"
            ),
            "<message type='chat' to='gone@rooms.localhost/Bob'><body>x</body></message>".to_owned(),
            "<iq type='get' id='10' to='gone@rooms.localhost'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>".to_owned(),
        ] {
            w.send(a, &stanza);
            assert_eq!(w.session(a).accept.waiting(), 0, "{shards} {stanza}");
        }
        // who has blocked the room refuses what comes through it
        w.send(b, &format!("<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='{room}'/></block></iq>"));
        w.send(
            a,
            &format!("<message type='chat' to='{room}/Bob'><body>x</body></message>"),
        );
        assert_eq!(w.session(a).accept.waiting(), 0, "{shards} {blocked}");
    }
}

/// What the archive shows of each message: its body, or `-` for a tombstone, or `!` for a retraction.
fn shown(w: &mut World, client: Client, room: &str) -> Vec<String> {
    w.send(
        client,
        &format!("<iq type='set' id='q' to='{room}'><query xmlns='urn:xmpp:mam:2'/></iq>"),
    );
    let all = w.take(client);
    assert!(all.last().unwrap().contains("<fin"), "{all:?}");
    let entries = all.iter().filter(|xml| xml.contains("<result"));
    let entry = |xml: &String| match xml.split("<body>").nth(1) {
        _ if xml.contains("<retracted") => "-".to_owned(),
        _ if xml.contains("<retract ") => "!".to_owned(),
        Some(rest) => rest.split("</body>").next().unwrap().to_owned(),
        None => "?".to_owned(),
    };
    entries.map(entry).collect()
}

/// The stable id of a message that has come.
fn stable_id_of(message: &str) -> String {
    let rest = message.split("<stanza-id").nth(1).unwrap();
    let rest = rest.split(" id='").nth(1).unwrap();
    rest.split('\'').next().unwrap().to_owned()
}

fn moderate(w: &mut World, client: Client, room: &str, id: &str) {
    w.send(
        client,
        &format!(
            "<iq type='set' id='mod' to='{room}'><moderate id='{id}' xmlns='urn:xmpp:message-moderate:1'>\
             <retract xmlns='urn:xmpp:message-retract:1'/><reason>not here</reason></moderate></iq>"
        ),
    );
}

#[test]
fn a_moderator_takes_back_what_another_has_said_and_nobody_else_does() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        say(&mut w, b, &room, "secret");
        w.take(a);
        let id = stable_id_of(&w.take(b).concat());
        moderate(&mut w, b, &room, &id);
        has(&mut w, b, &["<forbidden"]);
        moderate(&mut w, a, &room, "0123456789abcdef");
        has(&mut w, a, &["<item-not-found"]);
        moderate(&mut w, a, &room, &id);
        let told = [
            "type='groupchat'",
            &format!("<retract xmlns='urn:xmpp:message-retract:1' id='{id}'"),
            &format!("by='{room}/Alice'"),
            "<reason>not here</reason>",
        ];
        has(&mut w, b, &told);
        let answered = has(&mut w, a, &told);
        let result = answered.find("type='result'").expect("it is answered");
        assert!(answered.find("<retract").unwrap() < result);
        assert_eq!(shown(&mut w, b, &room), ["-", "!"], "{shards}");
        // after a crash as well
        w.crash(shards);
        let names = [w.on(0, "alice"), w.on(shards - 1, "bob")];
        let again = w.online(&names[1], "b");
        assert_eq!(shown(&mut w, again, &room), ["-", "!"], "{shards}");
    }
}

#[test]
fn who_has_said_it_takes_it_back_and_another_occupant_does_not() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        say(&mut w, b, &room, "typo");
        w.take(a);
        let id = stable_id_of(&w.take(b).concat());
        let retract = format!(
            "<message type='groupchat' id='r' to='{room}'><retract id='{id}' xmlns='urn:xmpp:message-retract:1'/></message>"
        );
        w.send(a, &retract);
        w.take(a);
        assert_eq!(shown(&mut w, a, &room), ["typo", "!"], "{shards}");
        w.send(b, &retract);
        w.take(b);
        assert_eq!(shown(&mut w, b, &room), ["-", "!", "!"], "{shards}");
    }
}

#[test]
fn pages_that_come_from_memory_are_no_queries_that_wait() {
    let (mut w, a, _, room) = two(1);
    say(&mut w, a, &room, "hello");
    w.take(a);
    for _ in 0..100 {
        w.advance(10);
        assert_eq!(shown(&mut w, a, &room), ["hello"]);
    }
}

#[test]
fn what_goes_to_the_service_itself_is_refused_and_holds_nothing_up() {
    for shards in [1, 2] {
        let (mut w, a, _, _) = two(shards);
        w.send(a, "<enable xmlns='urn:xmpp:sm:3'/>");
        w.take(a);
        let begun = w.slices[0].fx.floor;
        w.send(a, "<presence type='subscribe' to='rooms.localhost'/>");
        w.send(
            a,
            "<message type='chat' to='rooms.localhost'><body>x</body></message>",
        );
        has(&mut w, a, &["<service-unavailable"]);
        w.send(a, "<r xmlns='urn:xmpp:sm:3'/>");
        has(&mut w, a, &["h='2'"]);
        w.advance(60_000);
        let alice = w.on(0, "alice");
        w.send(
            a,
            &format!("<message type='chat' to='{alice}@localhost'><body>x</body></message>"),
        );
        w.advance(60_000);
        assert!(w.slices[0].fx.floor > begun, "nothing is open any more");
    }
}

#[test]
fn a_start_tag_with_prefixes_does_not_break_the_streams_of_those_who_are_in() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        w.send(
            b,
            &format!("<message type='groupchat' to='{room}' xmlns:f='u' f:y='1'><body>odd</body></message>"),
        );
        let got = has(&mut w, a, &["<body>odd</body>"]);
        assert_eq!(got.matches(" to=").count(), 1, "{got}");
        assert!(crate::xmpp::parse_stanza(got.as_bytes()).is_some(), "{got}");
    }
}

#[test]
fn a_new_room_shows_nothing_of_the_one_that_had_its_name() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        say(&mut w, a, &room, "secret");
        w.run();
        assert_eq!(shown(&mut w, b, &room), ["secret"]);
        // the database has the message, but does not learn of the end
        w.tier.dry = true;
        for client in [b, a] {
            w.send(
                client,
                &format!("<presence type='unavailable' to='{room}/x'/>"),
            );
        }
        join(&mut w, b, &room, "Bob");
        accept(&mut w, b, &room);
        w.take(b);
        assert_eq!(shown(&mut w, b, &room), [""; 0], "{shards}");
        w.tier.dry = false;
        w.run();
        assert_eq!(shown(&mut w, b, &room), [""; 0], "{shards}");
    }
}

#[test]
fn what_was_taken_back_is_not_shown_to_who_comes_in_later() {
    let (mut w, a, b, room) = two(2);
    say(&mut w, b, &room, "secret");
    say(&mut w, b, &room, "open");
    w.take(a);
    let id = stable_id_of(&w.take(b).concat());
    // somebody else's attempt changes nothing
    w.send(
        a,
        &format!("<message type='groupchat' id='r' to='{room}'><retract id='{id}' xmlns='urn:xmpp:message-retract:1'/></message>"),
    );
    w.add("carol");
    let c = w.online("carol", "c");
    join(&mut w, c, &room, "Carol");
    has(&mut w, c, &["<body>secret</body>", "<body>open</body>"]);
    moderate(&mut w, a, &room, &id);
    w.add("dave");
    let d = w.online("dave", "d");
    join(&mut w, d, &room, "Dave");
    let got = has(&mut w, d, &["<body>open</body>"]);
    assert!(!got.contains("secret"), "{got}");
}

#[test]
fn an_occupant_does_not_take_back_what_another_has_said_in_private() {
    let (mut w, a, b, room) = two(2);
    w.add("carol");
    let c = w.online("carol", "c");
    join(&mut w, c, &room, "Carol");
    w.send(
        b,
        &format!(
            "<message type='chat' id='m1' to='{room}/Alice'><body>between us</body></message>"
        ),
    );
    let retract = format!(
        "<message type='chat' id='r1' to='{room}/Alice'><retract id='m1' xmlns='urn:xmpp:message-retract:1'/></message>"
    );
    w.send(c, &retract);
    w.take(a);
    let alice = w.session(a).bare().to_owned();
    assert_eq!(shown(&mut w, a, &alice)[0], "between us");
    w.send(b, &retract);
    w.take(a);
    assert_eq!(shown(&mut w, a, &alice)[0], "-");
}

#[test]
fn who_leaves_and_comes_back_in_one_breath_is_no_ghost() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        let leave = format!("<presence type='unavailable' to='{room}/Bob'/>");
        let enter = format!(
            "<presence to='{room}/Bob'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
        );
        for xml in [&leave, &enter] {
            w.element(b, xml).unwrap();
        }
        w.run();
        w.take(a);
        w.send(b, "</stream:stream>");
        w.logout(b);
        has(
            &mut w,
            a,
            &[&format!("from='{room}/Bob'"), "type='unavailable'"],
        );
    }
}

#[test]
fn an_invitation_is_counted_when_it_is_with_who_is_invited() {
    let (mut w, a, _, room) = two(2);
    let carol = w.on(1, "carol");
    w.add(&carol);
    w.online(&carol, "c");
    w.send(a, "<enable xmlns='urn:xmpp:sm:3'/>");
    w.take(a);
    w.tier.held = true;
    w.send(
        a,
        &format!(
            "<message to='{room}'><x xmlns='{ITEM}'><invite to='{carol}@localhost'/></x></message>"
        ),
    );
    // the sender's own journal has it, that of who is invited has not
    w.tier.held = false;
    w.commit_only(a.shard);
    assert_eq!(w.session(a).accept.h(), 0);
    w.run();
    assert_eq!(w.session(a).accept.h(), 1);
}

#[test]
fn a_declined_invitation_does_not_tell_who_is_in() {
    let (mut w, a, b, room) = two(1);
    w.add("carol");
    let c = w.online("carol", "c");
    let decline = |to: &str| {
        format!("<message to='{room}'><x xmlns='{ITEM}'><decline to='{to}'/></x></message>")
    };
    w.send(c, &decline("alice@localhost"));
    has(&mut w, c, &["<item-not-found"]);
    assert_eq!(w.take(a), [""; 0]);
    w.send(c, &decline(&format!("{room}/Alice")));
    has(&mut w, a, &["<decline"]);
    assert_eq!(w.take(b), [""; 0]);
}

#[test]
fn whoever_asks_for_page_after_page_at_once_is_bounded() {
    let (mut w, a, _, room) = two(1);
    say(&mut w, a, &room, "hello");
    w.take(a);
    shown(&mut w, a, &room);
    for n in 0..50 {
        let query =
            format!("<iq type='set' id='q{n}' to='{room}'><query xmlns='urn:xmpp:mam:2'/></iq>");
        w.element(a, &query).unwrap();
    }
    w.run();
    let got = w.take(a).concat();
    assert!(
        got.contains("<resource-constraint") && got.contains("<fin"),
        "{got}"
    );
    w.advance(1000);
    assert_eq!(shown(&mut w, a, &room), ["hello"]);
}

#[test]
fn who_comes_and_goes_without_end_is_refused_at_his_own_shard_and_can_always_leave() {
    let mut w = World::with(2, |limits| {
        limits.rooms.session_presences_per_second_max = 1
    });
    let alice = w.on(0, "alice");
    w.add(&alice);
    let a = w.online(&alice, "a");
    let room = room_on(&w, 1);
    join(&mut w, a, &room, "Alice");
    accept(&mut w, a, &room);
    for n in 0..11 {
        join(&mut w, a, &room, &format!("Alice{n}"));
    }
    w.take(a);
    join(&mut w, a, &room, "Alice");
    has(
        &mut w,
        a,
        &["type='error'", "type='wait'", "resource-constraint"],
    );
    assert_eq!(w.slices[0].counters.room_refused, 1);
    // nobody misses a leave from where he is not
    w.send(
        a,
        "<presence type='unavailable' to='other@rooms.localhost/A'/>",
    );
    assert_eq!(w.slices[0].counters.room_refused, 2);
    w.send(
        a,
        &format!("<presence type='unavailable' to='{room}/Alice10'/>"),
    );
    has(&mut w, a, &["type='unavailable'", "code='110'"]);
    // with time it is possible again
    w.advance(1000);
    join(&mut w, a, &room, "Alice");
    has(&mut w, a, &["code='201'"]);
}

#[test]
fn whoever_comes_behind_the_end_of_a_room_is_in_the_next_one() {
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        let carol = w.on(0, "carol");
        w.add(&carol);
        let c = w.online(&carol, "c");
        w.tier.held = true;
        w.send(
            a,
            &format!(
                "<iq type='set' id='d' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'><destroy/></query></iq>"
            ),
        );
        join(&mut w, c, &room, "Carol");
        join(&mut w, b, &room, "Robert");
        w.release();
        has(&mut w, a, &["<destroy"]);
        has(&mut w, c, &["code='201'"]);
        // somebody else has made it, and has not configured it yet
        let got = has(&mut w, b, &["<destroy", "item-not-found", "not configured"]);
        assert!(!got.contains("resource-constraint"), "{got}");
        configure(&mut w, c, &room, &[]);
        join(&mut w, b, &room, "Robert");
        has(&mut w, b, &["code='110'", &format!("from='{room}/Carol'")]);
    }
}

#[test]
fn a_full_queue_of_a_room_keeps_nobody_in_and_holds_nothing_that_means_nothing() {
    let mut w = World::with(1, |limits| limits.load_queue_bytes_max = 600);
    for name in ["alice", "bob"] {
        w.add(name);
    }
    let (a, b) = (w.online("alice", "a"), w.online("bob", "b"));
    let room = room_on(&w, 0);
    join(&mut w, a, &room, "Alice");
    accept(&mut w, a, &room);
    join(&mut w, b, &room, "Bob");
    w.take(a);
    w.tier.held = true;
    w.send(
        a,
        &format!("<message type='groupchat' to='{room}'><subject>x</subject></message>"),
    );
    let text = "x".repeat(300);
    for _ in 0..5 {
        say(&mut w, b, &room, &text);
        // answers to nothing, and leaves
        w.send(b, &format!("<iq type='result' id='{text}' to='{room}'/>"));
    }
    for _ in 0..5 {
        w.send(
            b,
            &format!("<presence type='unavailable' to='{room}/Bob'/>"),
        );
    }
    let bytes = room_of(&w, &room).flow.waiting_bytes;
    assert!(bytes < 1200, "{bytes}");
    w.release();
    has(
        &mut w,
        a,
        &[
            "<subject>x",
            &format!("from='{room}/Bob'"),
            "type='unavailable'",
        ],
    );
    assert_eq!(room_of(&w, &room).occupants.len(), 1);
}

/// The room in memory.
fn room_of<'w>(w: &'w World, jid: &str) -> &'w super::Room {
    let name = super::entity(jid.split('@').next().unwrap());
    let owner = usize::from(w.slices[0].env.owner(&name));
    match w.slices[owner].users.peek(&name) {
        Some(crate::xmpp::slice::Slot::Room(Some(room))) => room,
        _ => panic!("{jid} is not in memory"),
    }
}

fn register(w: &mut World, client: Client, room: &str, nick: &str) {
    w.send(
        client,
        &format!(
            "<iq type='set' id='r' to='{room}'><query xmlns='jabber:iq:register'><x xmlns='jabber:x:data' type='submit'>\
             <field var='FORM_TYPE'><value>http://jabber.org/protocol/muc#register</value></field>\
             <field var='muc#register_roomnick'><value>{nick}</value></field></x></query></iq>"
        ),
    );
}

#[test]
fn requests_for_membership_are_bounded_whoever_asks_and_wherever_he_is() {
    let mut w = World::with(1, |limits| limits.rooms.requests_max = 2);
    let names = ["alice", "bob", "carol", "dave"];
    names.iter().for_each(|name| w.add(name));
    let [a, b, c, d] = names.map(|name| w.online(name, "x"));
    let room = room_on(&w, 0);
    join(&mut w, a, &room, "Alice");
    accept(&mut w, a, &room);
    w.take(a);
    register(&mut w, b, &room, "Bob");
    has(&mut w, b, &["type='result'"]);
    register(&mut w, b, &room, "Bob");
    has(&mut w, b, &["resource-constraint", "asked for already"]);
    register(&mut w, c, &room, "Carol");
    has(&mut w, c, &["type='result'"]);
    register(&mut w, d, &room, "Dave");
    has(&mut w, d, &["resource-constraint", "type='wait'"]);
    let asked = w.take(a);
    assert_eq!(asked.len(), 2, "{asked:#?}");
    // an answer makes room
    answer_registration(&mut w, a, &room, "carol@localhost", "Carol", false);
    register(&mut w, d, &room, "Dave");
    has(&mut w, d, &["type='result'"]);
}

fn answer_registration(w: &mut World, admin: Client, room: &str, jid: &str, nick: &str, yes: bool) {
    w.send(
        admin,
        &format!(
            "<message to='{room}'><x xmlns='jabber:x:data' type='submit'>\
             <field var='FORM_TYPE'><value>http://jabber.org/protocol/muc#register</value></field>\
             <field var='muc#register_jid'><value>{jid}</value></field>\
             <field var='muc#register_roomnick'><value>{nick}</value></field>\
             <field var='muc#register_allow'><value>{yes}</value></field></x></message>"
        ),
    );
}

#[test]
fn registrations_with_a_room_have_a_rate() {
    let mut w = World::with(1, |limits| limits.rooms.registrations_per_second_max = 1);
    w.add("alice");
    let a = w.online("alice", "a");
    let room = room_on(&w, 0);
    join(&mut w, a, &room, "Alice");
    accept(&mut w, a, &room);
    w.take(a);
    for n in 0..20 {
        register(&mut w, a, &room, &format!("A{n}"));
    }
    let got = w.take(a).concat();
    assert!(!got.contains("type='error'"), "{got}");
    register(&mut w, a, &room, "A20");
    has(&mut w, a, &["resource-constraint", "type='wait'"]);
    w.advance(1000);
    register(&mut w, a, &room, "A20");
    has(&mut w, a, &["type='result'"]);
}

#[test]
fn an_admins_yes_is_counted_when_it_is_durable() {
    let (mut w, a, b, room) = two(1);
    register(&mut w, b, &room, "Bobby");
    w.take(b);
    w.send(a, "<enable xmlns='urn:xmpp:sm:3'/>");
    w.take(a);
    w.tier.held = true;
    answer_registration(&mut w, a, &room, "bob@localhost", "Bobby", true);
    w.send(a, "<r xmlns='urn:xmpp:sm:3'/>");
    assert_eq!(w.take(a), Vec::<String>::new());
    w.release();
    let got = has(&mut w, a, &["affiliation='member'", "<a "]);
    assert!(got.contains("h='1'"), "{got}");
}

#[test]
fn who_is_not_in_and_says_no_word_of_joining_is_told_that_he_is_out() {
    let (mut w, _, b, room) = two(2);
    // the room is as after a crash: nobody is in it
    w.send(
        b,
        &format!("<presence type='unavailable' to='{room}/Bob'/>"),
    );
    w.take(b);
    w.send(
        b,
        &format!("<presence to='{room}/Bob'><show>away</show></presence>"),
    );
    has(&mut w, b, &["type='error'", "item-not-found"]);
    assert!(w.session(b).rooms.is_empty());
    w.send(b, "<presence to='new@rooms.localhost/Bob'/>");
    has(&mut w, b, &["type='error'", "item-not-found"]);
    assert!(!w.tier.users.contains_key("new@rooms"));
}

#[test]
fn who_gets_another_nickname_than_he_has_said_is_told_so() {
    let (mut w, a, b, room) = two(2);
    // another session of Bob's: the same nickname by RFC 8266
    let bob = w.session(b).user.to_string();
    let b2 = w.online(&bob, "b2");
    w.take(b2);
    join(&mut w, b2, &room, "BOB");
    let got = has(&mut w, b2, &[&format!("from='{room}/Bob'"), "code='210'"]);
    assert!(got.contains("code='110'"));
    // spaces that nobody sees
    w.take(a);
    let carol = w.on(0, "carol");
    w.add(&carol);
    let c = w.online(&carol, "c");
    join(&mut w, c, &room, "Carol  C");
    has(
        &mut w,
        c,
        &[&format!("from='{room}/Carol C'"), "code='210'"],
    );
    let got = has(&mut w, a, &[&format!("from='{room}/Carol C'")]);
    assert!(!got.contains("code='210'"), "{got}");
    // who has what he asked for is not told
    let dave = w.on(1, "dave");
    w.add(&dave);
    let d = w.online(&dave, "d");
    join(&mut w, d, &room, "Dave");
    let got = has(&mut w, d, &["code='110'"]);
    assert!(!got.contains("code='210'"), "{got}");
}

#[test]
fn whose_affiliation_changes_while_he_is_not_in_is_told_so() {
    let (mut w, a, b, room) = two(2);
    let carol = w.on(0, "carol");
    w.add(&carol);
    let c = w.online(&carol, "c");
    w.take(c);
    let make =
        format!("<item affiliation='member' jid='{carol}@localhost'><reason>hi</reason></item>");
    admin(&mut w, a, &room, &make);
    let got = has(
        &mut w,
        c,
        &["affiliation='member'", "role='none'", "code='101'", "hi"],
    );
    assert!(got.contains(&format!("from='{room}'")), "{got}");
    // it is as it was: nothing to hear
    admin(&mut w, a, &room, &make);
    assert_eq!(w.take(c), Vec::<String>::new());
    // who is in sees his presence
    let bob = w.session(b).bare().to_owned();
    w.take(b);
    admin(
        &mut w,
        a,
        &room,
        &format!("<item affiliation='member' jid='{bob}'/>"),
    );
    let got = has(&mut w, b, &["<presence", "affiliation='member'"]);
    assert!(!got.contains("code='101'"), "{got}");
}

/// Local parts in the list of rooms that this client gets, and the whole answer.
fn listed(w: &mut World, client: Client, set: &str) -> (Vec<String>, String) {
    w.take(client);
    w.send(
        client,
        &format!("<iq type='get' id='l' to='rooms.localhost'><query xmlns='http://jabber.org/protocol/disco#items'>{set}</query></iq>"),
    );
    let got = w.take(client).concat();
    let names = got.split("<item jid='").skip(1);
    let names = names.map(|item| item.split('@').next().unwrap().to_owned());
    (names.collect(), got)
}

fn lasting(w: &mut World, client: Client, room: &str) -> String {
    join(w, client, room, "Maker");
    w.take(client);
    configure(w, client, room, &[("muc#roomconfig_persistentroom", "1")]);
    w.take(client).concat()
}

/// Counts of lasting rooms that Alice has made, as each shard sees them.
fn made(w: &World, bare: &str) -> Vec<usize> {
    let slices = w.slices.iter();
    slices.map(|s| s.rooms.directory.made_by(bare)).collect()
}

#[test]
fn lasting_rooms_are_bounded_for_who_makes_them_and_the_count_outlives_a_start() {
    let mut w = World::with(2, |limits| limits.rooms.lasting_per_owner_max = 3);
    let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
    w.add(&alice);
    w.add(&bob);
    let (a, b) = (w.online(&alice, "a"), w.online(&bob, "b"));
    let bare = format!("{alice}@localhost");
    for n in 0..3 {
        let got = lasting(&mut w, a, &format!("r{n}@rooms.localhost"));
        assert!(got.contains("type='result'"), "{got}");
    }
    assert_eq!(made(&w, &bare), [3, 3]);
    let got = lasting(&mut w, a, "r3@rooms.localhost");
    assert!(got.contains("resource-constraint"), "{got}");
    // a temporary one is no matter, nor are those of others
    accept(&mut w, a, "r3@rooms.localhost");
    has(&mut w, a, &["type='result'"]);
    let got = lasting(&mut w, b, "s0@rooms.localhost");
    assert!(got.contains("type='result'"), "{got}");
    // he gives one away; it was he who made it
    admin(
        &mut w,
        a,
        "r0@rooms.localhost",
        &format!("<item affiliation='owner' jid='{bob}@localhost'/>"),
    );
    admin(
        &mut w,
        b,
        "r0@rooms.localhost",
        &format!("<item affiliation='none' jid='{bare}'/>"),
    );
    for shards in [2, 1, 3] {
        w.crash(shards);
        w.find_rooms();
        assert_eq!(made(&w, &bare), vec![3; shards]);
        let a = w.online(&alice, "a");
        let got = lasting(&mut w, a, "r4@rooms.localhost");
        assert!(got.contains("resource-constraint"), "{got}");
    }
    // one that ends makes room
    let a = w.online(&alice, "a2");
    w.send(a, "<iq type='set' id='d' to='r1@rooms.localhost'><query xmlns='http://jabber.org/protocol/muc#owner'><destroy/></query></iq>");
    has(&mut w, a, &["type='result'"]);
    assert_eq!(made(&w, &bare), [2, 2, 2]);
    let got = lasting(&mut w, a, "r5@rooms.localhost");
    assert!(got.contains("type='result'"), "{got}");
}

#[test]
fn what_is_being_made_counts_before_it_is_durable() {
    let mut w = World::with(1, |limits| {
        limits.rooms.lasting_per_owner_max = 2;
        limits.rooms.persistent = true;
    });
    w.add("alice");
    let a = w.online("alice", "a");
    w.tier.held = true;
    for n in 0..4 {
        join(&mut w, a, &format!("r{n}@rooms.localhost"), "Alice");
    }
    w.release();
    let got = w.take(a).concat();
    assert_eq!(got.matches("resource-constraint").count(), 2, "{got}");
    assert_eq!(got.matches("code='201'").count(), 2, "{got}");
    assert_eq!(made(&w, "alice@localhost"), [2]);
}

#[test]
fn the_list_of_rooms_is_whole_after_a_start_page_by_page() {
    let mut w = World::with(2, |limits| limits.rooms.lasting_max = 120);
    let alice = w.on(0, "alice");
    w.add(&alice);
    let a = w.online(&alice, "a");
    for n in 0..70 {
        if n == 60 {
            // the last ones are in the journal only
            w.tier.dry = true;
        }
        let room = format!("r{n:02}@rooms.localhost");
        join(&mut w, a, &room, "Maker");
        let hidden = ["1", "0"][usize::from(n % 10 == 9)];
        configure(
            &mut w,
            a,
            &room,
            &[
                ("muc#roomconfig_persistentroom", "1"),
                ("muc#roomconfig_publicroom", hidden),
            ],
        );
        w.send(
            a,
            &format!("<presence type='unavailable' to='{room}/Maker'/>"),
        );
    }
    w.crash(3);
    let a = w.online(&alice, "a");
    assert!(listed(&mut w, a, "").0.is_empty());
    w.find_rooms();
    let (all, _) = listed(&mut w, a, "");
    let public = (0..70).filter(|n| n % 10 != 9);
    let wanted: Vec<String> = public.map(|n| format!("r{n:02}")).collect();
    assert_eq!(all, wanted);
    // forwards and backwards
    const RSM: &str = "<set xmlns='http://jabber.org/protocol/rsm'>";
    let (mut read, mut after) = (Vec::new(), String::new());
    loop {
        let set = format!("{RSM}<max>25</max>{after}</set>");
        let (page, got) = listed(&mut w, a, &set);
        assert!(got.contains("<count>63</count>"), "{got}");
        assert_eq!(got.contains("index='0'"), read.is_empty(), "{got}");
        let Some(last) = page.last() else { break };
        after = format!("<after>{last}@rooms.localhost</after>");
        read.extend(page);
    }
    assert_eq!(read, wanted);
    let set = format!("{RSM}<max>2</max><before>r05@rooms.localhost</before></set>");
    assert_eq!(listed(&mut w, a, &set).0, ["r03", "r04"]);
    let set = format!("{RSM}<max>2</max><before/></set>");
    assert_eq!(listed(&mut w, a, &set).0, ["r67", "r68"]);
    let set = format!(
        "{RSM}<after>r05@rooms.localhost</after><before>r01@rooms.localhost</before></set>"
    );
    assert!(listed(&mut w, a, &set).1.contains("item-not-found"));
    assert_eq!(made(&w, &format!("{alice}@localhost")), [70, 70, 70]);
}

#[test]
fn while_the_database_is_away_nobody_makes_a_lasting_room_and_it_is_asked_again() {
    let (mut w, a, _, room) = two(2);
    let alice = w.session(a).user.to_string();
    let got = lasting(&mut w, a, "kept@rooms.localhost");
    assert!(got.contains("type='result'"), "{got}");
    w.crash(2);
    let a = w.online(&alice, "a");
    join(&mut w, a, &room, "Alice");
    w.tier.broken = true;
    w.find_rooms();
    let got = lasting(&mut w, a, &room);
    assert!(
        got.contains("resource-constraint") && got.contains("being counted"),
        "{got}"
    );
    w.tier.broken = false;
    w.advance(5000);
    let got = lasting(&mut w, a, &room);
    assert!(got.contains("type='result'"), "{got}");
    assert_eq!(made(&w, &format!("{alice}@localhost")), [2, 2]);
}

#[test]
fn a_temporary_room_that_a_crash_has_left_waits_for_its_people_and_ends_without_them() {
    for dry in [false, true] {
        let (mut w, a, b, room) = two(2);
        w.tier.dry = dry;
        let (alice, bob) = (w.session(a).user.to_string(), w.session(b).user.to_string());
        let other = room_on(&w, 1);
        join(&mut w, b, &other, "Bob");
        accept(&mut w, b, &other);
        say(&mut w, b, &other, "secret");
        w.crash(2);
        w.find_rooms();
        let (a, b) = (w.online(&alice, "a"), w.online(&bob, "b"));
        assert_eq!(listed(&mut w, a, "").0.len(), 2);
        // the people of one come back
        join(&mut w, a, &room, "Alice");
        w.advance(599_000);
        assert_eq!(listed(&mut w, b, "").0.len(), 2);
        w.advance(2_000);
        let (left, _) = listed(&mut w, b, "");
        assert_eq!(left, [room.split('@').next().unwrap()]);
        w.drain();
        assert!(
            !w.tier
                .users
                .contains_key(&super::entity(other.split('@').next().unwrap()))
        );
        // it begins anew, with nothing of what was
        join(&mut w, b, &other, "Bob");
        let got = has(&mut w, b, &["code='201'"]);
        assert!(!got.contains("secret"), "{got}");
        say(&mut w, a, &room, "still here");
        has(&mut w, a, &["still here"]);
    }
}

#[test]
fn the_archive_shows_real_addresses_to_those_who_may_see_them_and_nobody_else_ever() {
    let (mut w, a, b, room) = two(2);
    let (alice, bob) = (w.session(a).user.to_string(), w.session(b).user.to_string());
    let jid = format!("jid='{bob}@localhost/b'");
    // what he claims himself is nothing
    w.send(
        b,
        &format!("<message type='groupchat' to='{room}'><body>hello</body><x xmlns='{ITEM}'><item affiliation='owner' jid='king@localhost' role='moderator'/></x></message>"),
    );
    for client in [a, b] {
        let live = has(&mut w, client, &["<body>hello"]);
        assert!(!live.contains("jid='"), "{live}");
    }
    let got = kept(&mut w, a, &room);
    assert!(
        got.contains(&jid) && got.contains("affiliation='none'"),
        "{got}"
    );
    assert!(!got.contains("king@"), "{got}");
    let got = kept(&mut w, b, &room);
    assert!(got.contains("<body>hello") && !got.contains(&bob), "{got}");
    // as of now, not as of then
    configure(
        &mut w,
        a,
        &room,
        &[
            ("muc#roomconfig_whois", "anyone"),
            ("muc#roomconfig_persistentroom", "1"),
        ],
    );
    let got = kept(&mut w, b, &room);
    assert!(got.contains(&jid), "{got}");
    configure(&mut w, a, &room, &[("muc#roomconfig_whois", "moderators")]);
    assert!(!kept(&mut w, b, &room).contains(&bob));
    // nor by what is shown to who comes in, or after a crash
    w.crash(2);
    let (a, b) = (w.online(&alice, "a"), w.online(&bob, "b"));
    join(&mut w, b, &room, "Bob");
    let got = has(&mut w, b, &["<body>hello"]);
    assert!(!got.contains("affiliation='none' jid='"), "{got}");
    assert!(!kept(&mut w, b, &room).contains(&format!("{bob}@localhost")));
    // who is an owner sees it, in the room or not
    assert!(kept(&mut w, a, &room).contains(&jid));
}

#[test]
fn what_is_retracted_shows_no_address_of_who_had_said_it_to_others() {
    let (mut w, a, b, room) = two(1);
    say(&mut w, b, &room, "wrong");
    let id = stable_id_of(&has(&mut w, a, &["wrong"]));
    moderate(&mut w, a, &room, &id);
    w.take(a);
    let got = kept(&mut w, b, &room);
    assert!(
        got.contains("<retracted") && !got.contains("bob@localhost"),
        "{got}"
    );
}

#[test]
fn a_component_is_in_rooms_like_a_user() {
    use crate::config::ComponentPolicy;
    const HOST: &str = "bridge.localhost";
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        w.serve(&[(HOST, ComponentPolicy::Refuse)], Default::default());
        let bridge = w.component(shards - 1, HOST);
        w.component_takes(bridge);
        // a name that a user has, too
        let bob = w.session(b).user.to_string();
        let ghost = format!("{bob}@{HOST}/b");
        w.take(a);
        w.take(b);
        w.component_sends(
            bridge,
            &format!("<iq type='get' id='d' from='{ghost}' to='rooms.localhost'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>"),
        );
        assert!(
            w.component_takes(bridge)
                .concat()
                .contains(&format!("jid='{room}'"))
        );
        w.component_sends(
            bridge,
            &format!("<presence from='{ghost}' to='{room}/Irc'><x xmlns='http://jabber.org/protocol/muc'/></presence>"),
        );
        let got = w.component_takes(bridge).concat();
        assert!(
            got.contains("code='110'") && got.contains(&format!("from='{room}/Alice'")),
            "{got}"
        );
        assert!(got.contains("<subject"), "{got}");
        // Bob sees another occupant come, and gets nothing that is for the other one
        let got = w.take(b).concat();
        assert_eq!(got.matches("<presence").count(), 1, "{got}");
        assert!(
            !got.contains("code='110'") && got.contains(&format!("to='{bob}@localhost/b'")),
            "{got}"
        );
        has(
            &mut w,
            a,
            &[&format!("from='{room}/Irc'"), &format!("jid='{ghost}'")],
        );
        // both ways
        w.component_sends(
            bridge,
            &format!("<message type='groupchat' id='i' from='{ghost}' to='{room}'><body>from irc</body></message>"),
        );
        has(&mut w, a, &["from irc", &format!("from='{room}/Irc'")]);
        has(&mut w, b, &["from irc"]);
        say(&mut w, b, &room, "to-irc");
        let got = w.component_takes(bridge).concat();
        assert!(got.contains("from irc") && got.contains("to-irc"), "{got}");
        assert!(got.contains(&format!("to='{ghost}'")), "{got}");
        w.send(
            a,
            &format!("<message type='chat' to='{room}/Irc'><body>psst</body></message>"),
        );
        assert!(w.component_takes(bridge).concat().contains("psst"));
        // its connection goes: what cannot be delivered takes him out
        w.take(a);
        w.component_cut(bridge);
        say(&mut w, b, &room, "anybody");
        has(
            &mut w,
            a,
            &[
                "anybody",
                "type='unavailable'",
                &format!("from='{room}/Irc'"),
            ],
        );
        assert_eq!(room_of(&w, &room).occupants.len(), 2);
        // and it comes back
        let bridge = w.component(0, HOST);
        w.component_takes(bridge);
        w.component_sends(
            bridge,
            &format!("<presence from='{HOST}' to='{room}/Bot'><x xmlns='http://jabber.org/protocol/muc'/></presence>"),
        );
        assert!(w.component_takes(bridge).concat().contains("code='110'"));
        w.component_sends(
            bridge,
            &format!("<presence type='unavailable' from='{HOST}' to='{room}/Bot'/>"),
        );
        assert!(
            w.component_takes(bridge)
                .concat()
                .contains("type='unavailable'")
        );
        assert_eq!(room_of(&w, &room).occupants.len(), 2);
    }
}

/// All that the archive shows, as it comes.
fn kept(w: &mut World, client: Client, room: &str) -> String {
    w.take(client);
    w.send(
        client,
        &format!("<iq type='set' id='q' to='{room}'><query xmlns='urn:xmpp:mam:2'/></iq>"),
    );
    let all = w.take(client);
    assert!(all.last().unwrap().contains("<fin"), "{all:?}");
    // without the addresses to which it goes
    let own = w.session(client).jid.to_string();
    all.concat().replace(&format!("to='{own}'"), "")
}

/// On a thread whose stack bears no recursion.
fn on_a_small_stack(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(1 << 20);
    thread.spawn(test).unwrap().join().unwrap();
}

#[test]
fn however_much_waits_behind_the_end_of_a_room_it_is_dealt_with_one_after_the_other() {
    const MESSAGES: usize = 20_000;
    on_a_small_stack(|| {
        let mut w = World::with(1, |limits| {
            limits.load_queue_bytes_max = 64 << 20;
            limits.rooms.messages_per_second_max = 1_000_000;
            limits.deferred_stanzas_max = 1_000_000;
        });
        w.add("alice");
        let a = w.online("alice", "a");
        let room = room_on(&w, 0);
        join(&mut w, a, &room, "Alice");
        accept(&mut w, a, &room);
        w.take(a);
        // all in one write: the room ends, is made anew, and is spoken in
        let gone = format!("<presence type='unavailable' to='{room}/Alice'/>");
        w.element(a, &gone).unwrap();
        let comes = format!(
            "<presence to='{room}/Alice'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
        );
        w.element(a, &comes).unwrap();
        let says = format!("<message type='groupchat' to='{room}'><body>x</body></message>");
        for _ in 0..MESSAGES {
            w.element(a, &says).unwrap();
        }
        let waits = room_of(&w, &room).flow.waiting.len();
        assert_eq!(waits, MESSAGES + 1, "behind the end");
        w.run();
        let got = has(&mut w, a, &["code='201'"]);
        assert_eq!(got.matches("<body>x").count(), MESSAGES);
        assert_eq!(w.slices[0].rooms.again.len(), 0);
        assert_eq!(w.slices[0].rooms.depth, 0);
    });
}

#[test]
fn when_a_gateway_goes_only_those_who_stay_are_told_and_each_once_of_everybody() {
    use crate::config::ComponentPolicy;
    const HOST: &str = "irc.localhost";
    const PUPPETS: usize = 400;
    for shards in [1, 2] {
        on_a_small_stack(move || {
            let (mut w, a, b, room) = two(shards);
            w.serve(&[(HOST, ComponentPolicy::Refuse)], Default::default());
            let gateway = w.component(shards - 1, HOST);
            for n in 0..PUPPETS {
                w.component_sends(
                    gateway,
                    &format!("<presence from='p{n}@{HOST}/x@y' to='{room}/P{n}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"),
                );
            }
            w.component_takes(gateway);
            w.take(a);
            w.take(b);
            assert_eq!(room_of(&w, &room).occupants.len(), PUPPETS + 2);
            w.component_cut(gateway);
            let before: u64 = w.slices.iter().map(|s| s.counters.room_deliveries).sum();
            say(&mut w, b, &room, "anybody");
            let after: u64 = w.slices.iter().map(|s| s.counters.room_deliveries).sum();
            assert_eq!(room_of(&w, &room).occupants.len(), 2);
            for client in [a, b] {
                let got = has(&mut w, client, &["anybody", "code='333'"]);
                assert_eq!(got.matches("type='unavailable'").count(), PUPPETS);
            }
            // a message and the leaving of each for the two who stay, and nothing for those who are gone
            assert_eq!(after - before, 2 * (PUPPETS as u64 + 1));
            assert!(w.slices.iter().all(|s| s.rooms.deserted.is_empty()));
        });
    }
}

#[test]
fn a_room_of_a_gateways_people_ends_when_the_gateway_goes() {
    use crate::config::ComponentPolicy;
    const HOST: &str = "irc.localhost";
    let mut w = World::new(1);
    w.add("alice");
    let a = w.online("alice", "a");
    w.serve(&[(HOST, ComponentPolicy::Refuse)], Default::default());
    let gateway = w.component(0, HOST);
    w.component_takes(gateway);
    let room = room_on(&w, 0);
    for nick in ["One", "Two"] {
        w.component_sends(
            gateway,
            &format!("<presence from='{HOST}/{nick}' to='{room}/{nick}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"),
        );
        w.component_sends(
            gateway,
            &format!("<iq type='set' id='c' from='{HOST}/{nick}' to='{room}'><query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query></iq>"),
        );
    }
    assert_eq!(room_of(&w, &room).occupants.len(), 2);
    w.component_cut(gateway);
    // who comes in last is told to them, who cannot be reached
    join(&mut w, a, &room, "Alice");
    w.take(a);
    assert_eq!(room_of(&w, &room).occupants.len(), 1);
    w.send(
        a,
        &format!("<presence type='unavailable' to='{room}/Alice'/>"),
    );
    join(&mut w, a, &room, "Alice");
    has(&mut w, a, &["code='201'"]);
}

#[test]
fn an_address_is_of_this_server_by_its_domain_whatever_its_resource_says() {
    use super::fanout::{Audience, FOREIGN};
    let w = World::new(1);
    let env = &w.slices[0].env;
    for (jid, shard) in [
        ("alice@localhost/a", 0),
        ("alice@localhost/a@irc.localhost", 0),
        ("irc.localhost/x@localhost", FOREIGN),
        ("irc.localhost", FOREIGN),
        ("alice@irc.localhost/x@localhost", FOREIGN),
    ] {
        assert_eq!(Audience::of(env, [jid]).shards(), [shard], "{jid}");
    }
}

#[test]
fn a_nickname_that_is_too_long_as_it_is_shown_makes_no_room() {
    let mut w = World::new(1);
    w.add("alice");
    let a = w.online("alice", "a");
    let room = room_on(&w, 0);
    // 126 bytes, and 18 letters each as it is shown
    join(&mut w, a, &room, &"\u{FDFA}".repeat(42));
    has(&mut w, a, &["type='error'", "not-acceptable"]);
    assert!(w.session(a).rooms.is_empty());
    join(&mut w, a, &room, "Alice");
    has(&mut w, a, &["code='201'"]);
}

#[test]
fn who_cannot_come_into_the_room_that_he_has_made_is_told_so() {
    let mut w = World::new(1);
    w.add("alice");
    let a = w.online("alice", "a");
    let room = room_on(&w, 0);
    w.tier.held = true;
    join(&mut w, a, &room, "Alice");
    // the configuration was read anew meanwhile
    w.slices[0].env.limits.rooms.nick_bytes_max = 1;
    w.release();
    has(&mut w, a, &["type='error'", "not-acceptable"]);
    assert!(w.session(a).rooms.is_empty());
}

#[test]
fn who_may_not_register_uses_up_nobodys_registrations() {
    let mut w = World::with(1, |limits| limits.rooms.registrations_per_second_max = 1);
    ["alice", "bob"].iter().for_each(|name| w.add(name));
    let [a, b] = ["alice", "bob"].map(|name| w.online(name, "x"));
    let room = room_on(&w, 0);
    join(&mut w, a, &room, "Alice");
    accept(&mut w, a, &room);
    w.take(a);
    let refused = w.slices[0].counters.room_refused;
    for _ in 0..50 {
        // a nickname that is taken, and nothing to remove
        register(&mut w, b, &room, "Alice");
        w.send(
            b,
            &format!("<iq type='set' id='r' to='{room}'><query xmlns='jabber:iq:register'><remove/></query></iq>"),
        );
    }
    let got = w.take(b).concat();
    assert_eq!(got.matches("<conflict").count(), 50, "{got}");
    assert_eq!(w.slices[0].counters.room_refused, refused);
    register(&mut w, a, &room, "Al");
    has(&mut w, a, &["type='result'"]);
}

#[test]
fn a_room_that_waits_for_its_people_for_ever_does_not_end() {
    let (mut w, _, b, room) = two(1);
    let bob = w.session(b).user.to_string();
    for slice in &mut w.slices {
        slice.env.limits.rooms.left_ms = 0;
    }
    say(&mut w, b, &room, "hello");
    w.crash(1);
    for slice in &mut w.slices {
        slice.env.limits.rooms.left_ms = 0;
    }
    w.find_rooms();
    w.advance(40 * 24 * 3_600_000);
    let b = w.online(&bob, "b");
    join(&mut w, b, &room, "Bob");
    has(&mut w, b, &["<body>hello"]);
}

/// A room with so many in it, user n on shard n modulo `shards`; nothing is left to take.
fn crowd(shards: usize, count: usize) -> (World, Vec<Client>, String) {
    let mut w = World::new(shards);
    let room = room_on(&w, 0);
    let mut clients = Vec::new();
    for n in 0..count {
        let name = w.on(n % shards, &format!("user{n}-"));
        w.add(&name);
        let client = w.online(&name, "r");
        join(&mut w, client, &room, &format!("User{n}"));
        if n == 0 {
            accept(&mut w, client, &room);
        }
        clients.push(client);
    }
    for client in &clients {
        w.take(*client);
    }
    (w, clients, room)
}

fn bodies(all: &[String]) -> Vec<String> {
    let body = |element: &String| {
        let (_, rest) = element.split_once("<body>")?;
        Some(rest.split_once("</body>")?.0.to_owned())
    };
    all.iter().filter_map(body).collect()
}

#[test]
fn a_message_between_two_does_not_wait_for_what_a_room_says_to_many() {
    for shards in [1, 2] {
        let (mut w, clients, room) = crowd(shards, 60);
        w.fanned = 10;
        say(&mut w, clients[0], &room, "to-all");
        let told = |w: &World| {
            let told = |client: &&Client| bodies(&w.peek(**client)) == ["to-all"];
            clients.iter().filter(told).count()
        };
        assert_eq!(told(&w), 10, "the turns had time for so many");
        let late = |w: &World| {
            let waits = |c: &&Client| !w.session(**c).out.is_empty();
            *clients.iter().rev().find(waits).unwrap()
        };
        // of two who wait for it: one gets a message, the other the count of what he has sent
        let to = late(&w);
        let jid = w.session(to).jid.to_string();
        w.send(
            clients[0],
            &format!("<message type='chat' to='{jid}'><body>to-one</body></message>"),
        );
        assert_eq!(bodies(&w.take(to)), ["to-all", "to-one"]);
        let counted = late(&w);
        w.send(counted, "<enable xmlns='urn:xmpp:sm:3'/>");
        let got = w.take(counted);
        assert!(
            got.len() == 2 && got[0].contains("to-all") && got[1].starts_with("<enabled"),
            "{got:?}"
        );
        // one who ends his stream hears all of it before the end; that he goes is told later
        w.room = 0;
        w.run();
        let gone = late(&w);
        w.logout(gone);
        assert_eq!(bodies(&w.take(gone)), ["to-all"]);
        assert_eq!(told(&w), 10, "nobody else was told meanwhile");
        (w.fanned, w.room) = (usize::MAX, usize::MAX);
        w.run();
        for (n, client) in clients.iter().enumerate() {
            if ![to, counted, gone].contains(client) {
                assert_eq!(bodies(&w.peek(*client)), ["to-all"], "client {n}");
            }
        }
    }
}

#[test]
fn however_little_time_turns_have_all_get_all_of_a_room_once_in_one_order() {
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut w, clients, room) = crowd(2, 40);
        let mut said = Vec::new();
        let mut got = vec![Vec::new(); clients.len()];
        let mut sent_to = vec![0; clients.len()];
        let mut ahead = 0;
        for step in 0..60 {
            w.fanned = random.usize(0..30);
            let from = clients[random.usize(..clients.len())];
            if random.bool() {
                let text = format!("room-{step}");
                say(&mut w, from, &room, &text);
                said.push(text);
            } else {
                let to = random.usize(..clients.len());
                let jid = w.session(clients[to]).jid.to_string();
                let number = sent_to[to];
                sent_to[to] += 1;
                w.send(
                    from,
                    &format!("<message type='chat' to='{jid}'><body>own-{number}</body></message>"),
                );
                let new = bodies(&w.take(clients[to]));
                assert_eq!(new.last(), Some(&format!("own-{number}")), "at once");
                got[to].extend(new);
                let waits =
                    |n: &usize| bodies(&w.peek(clients[*n])).len() + got[*n].len() < said.len();
                ahead += usize::from((0..clients.len()).any(|n| waits(&n)));
            }
        }
        w.fanned = usize::MAX;
        w.run();
        assert!(ahead > 3, "too few went ahead of a room: {ahead}");
        for (n, client) in clients.iter().enumerate() {
            got[n].extend(bodies(&w.take(*client)));
            let of = |prefix: &str| {
                let own = got[n].iter().filter(|body| body.starts_with(prefix));
                own.cloned().collect::<Vec<_>>()
            };
            assert_eq!(of("room-"), said, "client {n}, seed {seed}");
            let own: Vec<_> = (0..sent_to[n]).map(|n| format!("own-{n}")).collect();
            assert_eq!(of("own-"), own, "client {n}, seed {seed}");
        }
    }
}

#[test]
fn a_client_is_not_kept_waiting_for_more_than_a_bounded_backlog() {
    let (mut w, clients, room) = crowd(1, 20);
    w.fanned = 0;
    let text = "x".repeat(2000);
    for _ in 0..8 {
        say(&mut w, clients[0], &room, &text);
        w.advance(1000);
    }
    assert_eq!(bodies(&w.peek(clients[9])).len(), 0);
    for _ in 0..16 {
        say(&mut w, clients[0], &room, &text);
        w.advance(1000);
    }
    assert!(bodies(&w.peek(clients[9])).len() > 12);
}

#[test]
fn who_takes_another_nickname_than_he_has_said_is_told_so() {
    let (mut w, a, b, room) = two(1);
    let take = |w: &mut World, nick: &str| {
        w.send(b, &format!("<presence to='{room}/{nick}'/>"));
        w.take(b).concat()
    };
    let got = take(&mut w, "Robert  the  Bruce");
    assert!(
        got.contains("code='303'") && got.contains(&format!("from='{room}/Robert the Bruce'")),
        "{got}"
    );
    assert_eq!(got.matches("code='210'").count(), 1, "{got}");
    let told = w.take(a).concat();
    assert!(
        told.contains("code='303'") && !told.contains("code='210'"),
        "{told}"
    );
    let got = take(&mut w, "Rob");
    assert!(
        got.contains("code='303'") && !got.contains("code='210'"),
        "{got}"
    );
}

#[test]
fn people_of_a_component_are_invited_and_become_members_and_strangers_are_not() {
    use crate::config::ComponentPolicy;
    const HOST: &str = "irc.localhost";
    for shards in [1, 2] {
        let (mut w, a, _, room) = two(shards);
        configure(&mut w, a, &room, &[("muc#roomconfig_membersonly", "1")]);
        w.serve(&[(HOST, ComponentPolicy::Refuse)], Default::default());
        let invite = |w: &mut World, to: &str| {
            w.take(a);
            w.send(
                a,
                &format!(
                    "<message to='{room}'><x xmlns='{ITEM}'><invite to='{to}'/></x></message>"
                ),
            );
            w.take(a).concat()
        };
        let got = invite(&mut w, &format!("carol@{HOST}"));
        assert!(got.contains("<remote-server-timeout"), "{got}");
        let gateway = w.component(shards - 1, HOST);
        w.component_takes(gateway);
        let got = invite(&mut w, &format!("carol@{HOST}"));
        assert!(!got.contains("type='error'"), "{got}");
        let told = w.component_takes(gateway).concat();
        assert!(
            told.contains(&format!("to='carol@{HOST}'")) && told.contains("<invite "),
            "{told}"
        );
        w.component_sends(
            gateway,
            &format!("<presence from='carol@{HOST}/x' to='{room}/Carol'><x xmlns='http://jabber.org/protocol/muc'/></presence>"),
        );
        let told = w.component_takes(gateway).concat();
        assert!(
            told.contains("code='110'") && told.contains("affiliation='member'"),
            "{told}"
        );
        for nobody in ["dave@elsewhere.example", "localhost"] {
            let got = invite(&mut w, nobody);
            assert!(got.contains("<item-not-found"), "{nobody}: {got}");
        }
    }
}

#[test]
fn those_whom_a_slow_gateway_refuses_are_out_at_once_and_only_those_who_stay_are_told() {
    use crate::config::ComponentPolicy;
    use crate::xmpp::component::Settings;
    const HOST: &str = "irc.localhost";
    const PUPPETS: usize = 300;
    for shards in [1, 2] {
        let (mut w, a, b, room) = two(shards);
        let settings = Settings {
            queue_bytes_max: 2000,
            ..Settings::default()
        };
        w.serve(&[(HOST, ComponentPolicy::Refuse)], settings);
        let gateway = w.component(shards - 1, HOST);
        for n in 0..PUPPETS {
            w.component_sends(
                gateway,
                &format!("<presence from='p{n}@{HOST}/x' to='{room}/P{n}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"),
            );
            w.component_takes(gateway);
        }
        assert_eq!(room_of(&w, &room).occupants.len(), PUPPETS + 2);
        w.component_room(gateway, 0);
        let deliveries = |w: &World| -> usize {
            let all = w.slices.iter().map(|s| s.counters.room_deliveries as usize);
            all.sum()
        };
        w.take(a);
        w.take(b);
        let before = deliveries(&w);
        say(&mut w, b, &room, "first");
        say(&mut w, b, &room, "second");
        // one who speaks is not lost
        w.component_sends(
            gateway,
            &format!("<presence from='p7@{HOST}/x' to='{room}/P7'><show>away</show></presence>"),
        );
        w.advance(300);
        let stay = room_of(&w, &room).occupants.len();
        assert!((3..40).contains(&stay), "{stay}");
        let gone = PUPPETS + 2 - stay;
        for client in [a, b] {
            let got = has(&mut w, client, &["first", "second", "code='333'"]);
            assert_eq!(got.matches("type='unavailable'").count(), gone);
            assert!(!got.contains(&format!("type='unavailable' from='{room}/P7'")));
        }
        // two messages and a presence for all, and for each who has gone a word to him and one to each who stays
        let most = 3 * (PUPPETS + 2) + 2 + gone * (stay + 1);
        let told = deliveries(&w) - before;
        assert!(told <= most, "{told} instead of {most}");
        assert!(w.slices.iter().all(|s| s.rooms.unreached.is_empty()));
    }
}
