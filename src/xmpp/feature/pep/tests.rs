use super::*;
use crate::store::record::{RosterItem, Subscription};
use crate::xmpp::pubsub::NS_ERRORS;
use crate::xmpp::testing::{Client, World};

const TUNE: &str = "http://jabber.org/protocol/tune";

/// A client that is on line and wants to hear of these nodes; what it got is taken.
fn capable(w: &mut World, name: &str, resource: &str, wants: &[&str]) -> Client {
    let client = capable_now(w, name, resource, wants);
    w.take(client);
    client
}

/// The same, but what it got is not taken.
fn capable_now(w: &mut World, name: &str, resource: &str, wants: &[&str]) -> Client {
    let client = w.login(name, resource);
    w.send(
        client,
        &format!("<presence><c xmlns='http://jabber.org/protocol/caps' node='urn:c' ver='{}'/></presence>", wants.len()),
    );
    let id = queries(&w.peek(client)).pop();
    let features = wants
        .iter()
        .map(|node| format!("<feature var='{node}+notify'/>"));
    let features: String = features.collect();
    if let Some(id) = id {
        w.send(
            client,
            &format!(
                "<iq type='result' id='{id}' to='localhost'><query xmlns='http://jabber.org/protocol/disco#info'>{features}</query></iq>"
            ),
        );
    }
    client
}

fn queries(got: &[String]) -> Vec<String> {
    let asks = got.iter().filter(|s| s.contains("disco#info"));
    asks.filter_map(|s| {
        Some(
            crate::xmpp::parse_stanza(s.as_bytes())?
                .get("id")?
                .to_owned(),
        )
    })
    .collect()
}

/// The notifications among what the client has got since it was asked last.
fn events(w: &mut World, client: Client) -> Vec<String> {
    let got = w.take(client);
    got.into_iter()
        .filter(|s| s.contains("pubsub#event"))
        .collect()
}

fn publish(node: &str, id: &str, payload: &str) -> String {
    let id = match id {
        "" => String::new(),
        id => format!(" id='{id}'"),
    };
    format!(
        "<iq type='set' id='p'><pubsub xmlns='{NS}'><publish node='{node}'><item{id}>{payload}</item></publish></pubsub></iq>"
    )
}

fn with_options(iq: &str, options: &[(&str, &str)]) -> String {
    let fields = options
        .iter()
        .map(|(var, value)| format!("<field var='pubsub#{var}'><value>{value}</value></field>"));
    let form = format!(
        "<publish-options><x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE' type='hidden'>\
         <value>http://jabber.org/protocol/pubsub#publish-options</value></field>{}</x></publish-options>",
        fields.collect::<String>()
    );
    iq.replace("</publish>", &format!("</publish>{form}"))
}

fn get(to: &str, node: &str) -> String {
    let to = match to {
        "" => String::new(),
        to => format!(" to='{to}@localhost'"),
    };
    format!("<iq type='get' id='g'{to}><pubsub xmlns='{NS}'><items node='{node}'/></pubsub></iq>")
}

fn owner(typ: &str, inner: &str) -> String {
    format!("<iq type='{typ}' id='o'><pubsub xmlns='{NS_OWNER}'>{inner}</pubsub></iq>")
}

#[track_caller]
fn succeeds(w: &mut World, client: Client, iq: &str) -> String {
    w.send(client, iq);
    let got = w.take(client);
    let answer = got.iter().find(|s| s.starts_with("<iq type='result'"));
    answer.unwrap_or_else(|| panic!("{iq}: {got:?}")).clone()
}

#[track_caller]
fn fails(w: &mut World, client: Client, iq: &str, conditions: &[&str]) {
    w.send(client, iq);
    let got = w.take(client).concat();
    for condition in conditions {
        assert!(got.contains(&format!("<{condition} ")), "{iq}: {got}");
    }
}

const SONG: &str = "<tune xmlns='http://jabber.org/protocol/tune'><title>Yesterday</title></tune>";

#[test]
fn what_is_published_is_told_to_those_who_want_it_and_may_know_wherever_they_live() {
    let mut w = World::new(3);
    let names = [
        (0, "alice"),
        (0, "bob"),
        (1, "carol"),
        (2, "stranger"),
        (1, "oneway"),
    ];
    let [alice, bob, carol, stranger, oneway] = names.map(|(shard, name)| w.on(shard, name));
    w.befriend(&alice, &bob);
    w.befriend(&alice, &carol);
    w.add(&stranger);
    // sees nothing of Alice
    w.item(&alice, &oneway, Subscription::To);
    w.item(&oneway, &alice, Subscription::From);
    let a = capable(&mut w, &alice, "a", &[TUNE]);
    let quiet = capable(&mut w, &alice, "quiet", &["urn:other", "urn:more"]);
    let b = capable(&mut w, &bob, "b", &[TUNE]);
    let deaf = w.online(&bob, "deaf");
    let c = capable(&mut w, &carol, "c", &[TUNE]);
    let s = capable(&mut w, &stranger, "s", &[TUNE]);
    let o = capable(&mut w, &oneway, "o", &[TUNE]);
    for client in [a, quiet, b, c, s, o] {
        w.take(client);
    }
    w.send(a, &publish(TUNE, "1", SONG));
    for (client, full) in [
        (a, format!("{alice}@localhost/a")),
        (b, format!("{bob}@localhost/b")),
        (c, format!("{carol}@localhost/c")),
    ] {
        let got = events(&mut w, client);
        assert_eq!(got.len(), 1, "{full}: {got:?}");
        let message = crate::xmpp::parse_stanza(got[0].as_bytes()).unwrap();
        assert_eq!(message.get("to"), Some(&*full));
        assert_eq!(message.get("from"), Some(&*format!("{alice}@localhost")));
        assert_eq!(message.get("type"), Some("headline"));
        assert!(
            got[0].contains(&format!(
                "<items node='{TUNE}'><item id='1'>{SONG}</item></items>"
            )),
            "{got:?}"
        );
    }
    for client in [quiet, deaf, s, o] {
        assert!(events(&mut w, client).is_empty());
    }
}

#[test]
fn nothing_is_answered_or_told_before_it_is_durable_and_it_is_there_after_a_crash() {
    let mut w = World::new(2);
    let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
    w.befriend(&alice, &bob);
    let a = capable(&mut w, &alice, "a", &[TUNE]);
    let b = capable(&mut w, &bob, "b", &[TUNE]);
    succeeds(&mut w, a, &publish(TUNE, "0", SONG));
    w.take(b);
    w.tier.held = true;
    w.send(a, &publish(TUNE, "1", SONG));
    assert!(w.take(a).is_empty() && w.take(b).is_empty());
    w.release();
    assert!(w.take(a).concat().contains("type='result'"));
    assert_eq!(events(&mut w, b).len(), 1);
    // an item in a bucket
    let big = format!("<data xmlns='urn:big'>{}</data>", "x".repeat(3000));
    succeeds(&mut w, a, &publish("urn:big", "big", &big));
    w.crash(3);
    let a = w.login(&alice, "a");
    let got = succeeds(&mut w, a, &get("", TUNE));
    assert!(got.contains("<item id='1'>"), "{got}");
    assert!(succeeds(&mut w, a, &get("", "urn:big")).contains(&big));
}

#[test]
fn who_comes_on_line_hears_the_last_item_of_his_own_nodes_and_of_his_contacts() {
    for shard in [0, 1] {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(shard, "bob"));
        w.befriend(&alice, &bob);
        let a = w.online(&alice, "a");
        succeeds(&mut w, a, &publish(TUNE, "1", SONG));
        let big = format!("<data xmlns='urn:big'>{}</data>", "x".repeat(3000));
        succeeds(&mut w, a, &publish("urn:big", "big", &big));
        let never = publish("urn:never", "n", "<n xmlns='urn:never'/>");
        succeeds(
            &mut w,
            a,
            &with_options(&never, &[("send_last_published_item", "never")]),
        );
        w.logout(a);
        // the contact is off line, and nothing of him is in memory
        w.crash(2);
        let wants = [TUNE, "urn:big", "urn:never"];
        for name in [&alice, &bob] {
            let client = capable_now(&mut w, name, "x", &wants);
            let got = events(&mut w, client);
            assert_eq!(got.len(), 2, "{got:?}");
            assert!(
                got.iter()
                    .all(|s| s.contains("<delay xmlns='urn:xmpp:delay' stamp='2026-"))
            );
            assert!(got[0].contains("Yesterday") && got[1].contains("urn:big"));
            // the same presence again says nothing new
            w.send(client, "<presence><show>away</show><c xmlns='http://jabber.org/protocol/caps' node='urn:c' ver='3'/></presence>");
            assert!(events(&mut w, client).is_empty());
        }
    }
}

#[test]
fn a_new_subscriber_hears_the_last_items() {
    let mut w = World::new(2);
    let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
    w.add(&alice);
    w.add(&bob);
    let a = w.online(&alice, "a");
    succeeds(&mut w, a, &publish(TUNE, "1", SONG));
    let b = capable(&mut w, &bob, "b", &[TUNE]);
    w.send(
        b,
        &format!("<presence to='{alice}@localhost' type='subscribe'/>"),
    );
    assert!(events(&mut w, b).is_empty());
    w.send(
        a,
        &format!("<presence to='{bob}@localhost' type='subscribed'/>"),
    );
    assert_eq!(events(&mut w, b).len(), 1);
}

#[test]
fn who_is_blocked_hears_nothing_and_who_blocks_is_left_alone() {
    for shard in [0, 1] {
        for blocker in [0, 1] {
            let mut w = World::new(2);
            let names = [w.on(0, "alice"), w.on(shard, "bob")];
            let [alice, bob] = &names;
            w.befriend(alice, bob);
            let blocked = format!("{}@localhost", names[1 - blocker]);
            w.tier
                .users
                .get_mut(&names[blocker])
                .unwrap()
                .record
                .block(&blocked);
            let a = capable(&mut w, alice, "a", &[TUNE]);
            succeeds(&mut w, a, &publish(TUNE, "1", SONG));
            let b = capable_now(&mut w, bob, "b", &[TUNE]);
            assert!(events(&mut w, b).is_empty());
            succeeds(&mut w, a, &publish(TUNE, "2", SONG));
            assert!(events(&mut w, b).is_empty());
        }
    }
}

#[test]
fn an_access_model_keeps_items_from_those_who_are_not_meant_whatever_way_they_ask() {
    let mut w = World::new(2);
    let [alice, friend, desk, other, stranger] = [
        (0, "alice"),
        (1, "friend"),
        (0, "desk"),
        (1, "other"),
        (1, "stranger"),
    ]
    .map(|(s, n)| w.on(s, n));
    w.befriend(&alice, &friend);
    w.befriend(&alice, &desk);
    w.item(&alice, &other, Subscription::To);
    w.item(&other, &alice, Subscription::From);
    w.add(&stranger);
    let record = &mut w.tier.users.get_mut(&alice).unwrap().record;
    record.put_roster_item(RosterItem {
        jid: format!("{desk}@localhost"),
        groups: vec!["Desk".into()],
        subscription: Subscription::Both,
        ..RosterItem::default()
    });
    let a = w.online(&alice, "a");
    for (access, more) in [
        ("open", None),
        ("presence", None),
        ("roster", Some("Desk")),
        ("whitelist", None),
    ] {
        let mut options = vec![("access_model", access)];
        options.extend(more.map(|group| ("roster_groups_allowed", group)));
        let node = format!("urn:{access}");
        let iq = publish(&node, "1", &format!("<x xmlns='{node}'/>"));
        succeeds(&mut w, a, &with_options(&iq, &options));
    }
    let member = format!(
        "<affiliations node='urn:whitelist'><affiliation jid='{friend}@localhost' affiliation='member'/></affiliations>"
    );
    succeeds(&mut w, a, &owner("set", &member));
    let outcast = format!(
        "<affiliations node='urn:open'><affiliation jid='{desk}@localhost' affiliation='outcast'/></affiliations>"
    );
    succeeds(&mut w, a, &owner("set", &outcast));
    let nodes = ["urn:open", "urn:presence", "urn:roster", "urn:whitelist"];
    let expected: [(&str, [Option<&str>; 4]); 4] = [
        (&friend, [None, None, Some("not-in-roster-group"), None]),
        (&desk, [Some("forbidden"), None, None, Some("closed-node")]),
        (
            &other,
            [
                None,
                Some("presence-subscription-required"),
                Some("not-in-roster-group"),
                Some("closed-node"),
            ],
        ),
        // as where there is no such account
        (
            &stranger,
            [
                None,
                Some("service-unavailable"),
                Some("service-unavailable"),
                Some("service-unavailable"),
            ],
        ),
    ];
    for (name, refusals) in expected {
        let subscribed = name == friend || name == desk;
        let client = capable_now(&mut w, name, "c", &nodes);
        let greeted = events(&mut w, client);
        let greeted_with = |node: &str| {
            greeted
                .iter()
                .any(|s| s.contains(&format!("<items node='{node}'>")))
        };
        let info = format!(
            "<iq type='get' id='i' to='{alice}@localhost'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>"
        );
        w.send(client, &info);
        let listed = w.take(client).concat();
        for (node, refusal) in nodes.iter().zip(refusals) {
            let ask = get(&alice, node);
            match refusal {
                None => {
                    assert!(succeeds(&mut w, client, &ask).contains("<item id='1'>"));
                }
                Some(condition) => fails(&mut w, client, &ask, &[condition]),
            }
            assert_eq!(
                listed.contains(&format!("node='{node}'")),
                refusal.is_none(),
                "{name} {node}: {listed}"
            );
            assert_eq!(
                greeted_with(node),
                refusal.is_none() && subscribed,
                "{name} {node}: {greeted:?}"
            );
            let disco = format!(
                "<iq type='get' id='d' to='{alice}@localhost'><query xmlns='http://jabber.org/protocol/disco#items' node='{node}'/></iq>"
            );
            w.send(client, &disco);
            let shown = w.take(client).concat();
            assert_eq!(shown.contains("name='1'"), refusal.is_none(), "{shown}");
        }
        // and nothing new
        w.take(client);
        for node in nodes {
            w.send(a, &publish(node, "1", &format!("<x xmlns='{node}'/>")));
        }
        let told = events(&mut w, client);
        for (node, refusal) in nodes.iter().zip(refusals) {
            let heard = told
                .iter()
                .any(|s| s.contains(&format!("<items node='{node}'>")));
            assert_eq!(
                heard,
                refusal.is_none() && subscribed,
                "{name} {node}: {told:?}"
            );
        }
    }
    let own = capable_now(&mut w, &alice, "own", &nodes);
    assert_eq!(events(&mut w, own).len(), 4, "the owner sees all");
}

#[test]
fn only_the_owner_changes_anything() {
    let mut w = World::new(2);
    let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
    w.befriend(&alice, &bob);
    let thief = w.on(1, "thief");
    w.add(&thief);
    let a = w.online(&alice, "a");
    succeeds(&mut w, a, &publish(TUNE, "1", SONG));
    for (name, condition) in [(bob, "forbidden"), (thief, "service-unavailable")] {
        let client = w.online(&name, "x");
        for iq in [
            publish(TUNE, "1", SONG),
            format!(
                "<iq type='set' id='p'><pubsub xmlns='{NS}'><retract node='{TUNE}'><item id='1'/></retract></pubsub></iq>"
            ),
            format!(
                "<iq type='set' id='p'><pubsub xmlns='{NS}'><create node='urn:new'/></pubsub></iq>"
            ),
            owner("set", &format!("<delete node='{TUNE}'/>")),
            owner("set", &format!("<purge node='{TUNE}'/>")),
            owner("get", &format!("<configure node='{TUNE}'/>")),
            owner("get", &format!("<affiliations node='{TUNE}'/>")),
        ] {
            let iq = iq.replace("<iq ", &format!("<iq to='{alice}@localhost' "));
            fails(&mut w, client, &iq, &[condition]);
        }
    }
    assert!(succeeds(&mut w, a, &get("", TUNE)).contains("Yesterday"));
}

#[test]
fn retracting_purging_and_deleting_are_told() {
    let mut w = World::new(2);
    let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
    w.befriend(&alice, &bob);
    let a = w.online(&alice, "a");
    let b = capable(&mut w, &bob, "b", &[TUNE]);
    let many = with_options(&publish(TUNE, "1", SONG), &[("max_items", "10")]);
    succeeds(&mut w, a, &many);
    for id in ["2", "3"] {
        succeeds(&mut w, a, &publish(TUNE, id, SONG));
    }
    w.take(b);
    let retract = |id: &str| {
        format!(
            "<iq type='set' id='p'><pubsub xmlns='{NS}'><retract node='{TUNE}'><item id='{id}'/></retract></pubsub></iq>"
        )
    };
    succeeds(&mut w, a, &retract("3"));
    assert!(events(&mut w, b).concat().contains("<retract id='3'/>"));
    fails(&mut w, a, &retract("3"), &["item-not-found"]);
    // the newest that is left
    let greeted = capable_now(&mut w, &bob, "late", &[TUNE, "urn:x"]);
    assert!(events(&mut w, greeted).concat().contains("<item id='2'>"));
    w.take(b);
    succeeds(&mut w, a, &owner("set", &format!("<purge node='{TUNE}'/>")));
    assert!(
        events(&mut w, b)
            .concat()
            .contains(&format!("<purge node='{TUNE}'/>"))
    );
    assert!(!succeeds(&mut w, a, &get("", TUNE)).contains("<item "));
    succeeds(
        &mut w,
        a,
        &owner("set", &format!("<delete node='{TUNE}'/>")),
    );
    assert!(
        events(&mut w, b)
            .concat()
            .contains(&format!("<delete node='{TUNE}'/>"))
    );
    fails(&mut w, a, &get("", TUNE), &["item-not-found"]);
}

#[test]
fn options_that_the_node_does_not_have_are_refused_so_that_nothing_private_is_seen() {
    let mut w = World::new(1);
    w.befriend("alice", "bob");
    let a = w.online("alice", "a");
    let b = capable(&mut w, "bob", "b", &["urn:secret"]);
    succeeds(
        &mut w,
        a,
        &publish("urn:secret", "1", "<s xmlns='urn:secret'/>"),
    );
    assert_eq!(events(&mut w, b).len(), 1);
    let private = with_options(
        &publish("urn:secret", "1", "<s xmlns='urn:secret'>plan</s>"),
        &[("persist_items", "true"), ("access_model", "whitelist")],
    );
    fails(&mut w, a, &private, &["conflict", "precondition-not-met"]);
    assert!(events(&mut w, b).is_empty());
    let configure = format!(
        "<configure node='urn:secret'><x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'><value>{}</value></field>\
         <field var='pubsub#access_model'><value>whitelist</value></field></x></configure>",
        config::FORM
    );
    succeeds(&mut w, a, &owner("set", &configure));
    succeeds(&mut w, a, &private);
    assert!(events(&mut w, b).is_empty());
    let shown = succeeds(&mut w, a, &owner("get", "<configure node='urn:secret'/>"));
    assert!(shown.contains("<value>whitelist</value>"), "{shown}");
}

#[test]
fn nodes_of_known_features_have_their_own_defaults() {
    for (node, access) in [
        ("urn:xmpp:mds:displayed:0", Access::Whitelist),
        ("urn:xmpp:bookmarks:1", Access::Whitelist),
        ("eu.siacs.conversations.axolotl.bundles:31415", Access::Open),
        ("urn:xmpp:omemo:2:devices", Access::Open),
        ("urn:xmpp:vcard4", Access::Open),
        ("urn:xmpp:avatar:metadata", Access::Presence),
        ("urn:unheard:of", Access::Presence),
    ] {
        assert_eq!(default_config(node).access, access, "{node}");
    }
    assert_eq!(
        default_config("urn:xmpp:omemo:2:bundles").max_items,
        Config::MAX
    );
}

#[test]
fn pages_follow_each_other_and_say_how_many_there_are() {
    let mut w = World::with(1, |limits| limits.pubsub_page_items_max = 4);
    w.add("alice");
    let a = w.online("alice", "a");
    for n in 0..10 {
        let iq = publish("urn:n", &format!("i{n}"), "<n xmlns='urn:n'/>");
        succeeds(&mut w, a, &with_options(&iq, &[("max_items", "max")]));
    }
    let mut page = |set: &str, items: &str| {
        let iq = get("", "urn:n").replace("<items node='urn:n'/>", items);
        let iq = iq.replace("</pubsub>", &format!("{set}</pubsub>"));
        let got = succeeds(&mut w, a, &iq);
        let iq = crate::xmpp::parse_stanza(got.as_bytes()).unwrap();
        let pubsub = iq.find("pubsub", NS).unwrap();
        let items = pubsub.find("items", NS).unwrap();
        let ids: Vec<_> = items
            .elements()
            .map(|e| e.get("id").unwrap()[1..].to_owned())
            .collect();
        let count = pubsub.find("set", super::super::rsm::NS).map(|set| {
            set.find("count", super::super::rsm::NS)
                .unwrap()
                .text_content()
        });
        (ids.concat(), count)
    };
    let all = "<items node='urn:n'/>";
    let set = |inner: &str| format!("<set xmlns='http://jabber.org/protocol/rsm'>{inner}</set>");
    let ten = Some("10".to_owned());
    assert_eq!(
        page("", all),
        ("6789".into(), ten.clone()),
        "the newest, and that there are more"
    );
    assert_eq!(page(&set("<max>3</max>"), all), ("012".into(), ten.clone()));
    assert_eq!(
        page(&set("<max>3</max><after>i2</after>"), all),
        ("345".into(), ten.clone())
    );
    assert_eq!(
        page(&set("<max>30</max><after>i8</after>"), all),
        ("9".into(), ten.clone())
    );
    assert_eq!(
        page(&set("<max>2</max><before/>"), all),
        ("89".into(), ten.clone())
    );
    assert_eq!(
        page(&set("<max>2</max><before>i8</before>"), all),
        ("67".into(), ten.clone())
    );
    assert_eq!(page(&set("<max>0</max>"), all), ("".into(), ten));
    assert_eq!(
        page("", "<items node='urn:n' max_items='2'/>"),
        ("89".into(), None)
    );
    let two = "<items node='urn:n'><item id='i1'/><item id='i7'/></items>";
    assert_eq!(page("", two), ("17".into(), None));
    // what is no id of this node says nothing about others
    for bad in [
        "<after>i99</after>",
        "<before>../i1</before>",
        "<max>-1</max>",
        "<index>3</index>",
    ] {
        let iq = get("", "urn:n").replace("</pubsub>", &format!("{}</pubsub>", set(bad)));
        w.send(a, &iq);
        assert!(w.take(a).concat().contains("type='error'"), "{bad}");
    }
}

#[test]
fn mistakes_are_answered_as_the_specification_says() {
    let mut w = World::new(1);
    w.add("alice");
    let a = w.online("alice", "a");
    succeeds(&mut w, a, &publish(TUNE, "1", SONG));
    let set =
        |inner: &str| format!("<iq type='set' id='p'><pubsub xmlns='{NS}'>{inner}</pubsub></iq>");
    let item = "<item id='1'><x xmlns='urn:x'/></item>";
    let cases: &[(String, &[&str])] = &[
        (
            set(&format!("<publish>{item}</publish>")),
            &["bad-request", "nodeid-required"],
        ),
        (
            set("<publish node='n'/>"),
            &["bad-request", "item-required"],
        ),
        (
            set("<publish node='n'><item id='1'/></publish>"),
            &["bad-request", "payload-required"],
        ),
        (
            set("<publish node='n'><item><a xmlns='urn:a'/><b xmlns='urn:b'/></item></publish>"),
            &["bad-request", "invalid-payload"],
        ),
        (
            set("<publish node='n'><item><a xmlns=''/></item></publish>"),
            &["bad-request", "invalid-payload"],
        ),
        (
            set(&format!("<publish node='n'>{item}{item}</publish>")),
            &["bad-request", "max-items-exceeded"],
        ),
        (set(&format!("<create node='{TUNE}'/>")), &["conflict"]),
        (
            set(&format!("<retract node='{TUNE}'/>")),
            &["bad-request", "item-required"],
        ),
        (
            set(&format!("<retract node='{TUNE}'><item/></retract>")),
            &["bad-request", "item-required"],
        ),
        (
            set("<retract node='none'><item id='1'/></retract>"),
            &["item-not-found"],
        ),
        (
            set(&format!("<subscribe node='{TUNE}' jid='alice@localhost'/>")),
            &["feature-not-implemented", "unsupported"],
        ),
        (get("", "none"), &["item-not-found"]),
        (get("", ""), &["bad-request", "nodeid-required"]),
        (owner("set", "<delete node='none'/>"), &["item-not-found"]),
        (
            owner("set", "<purge/>"),
            &["bad-request", "nodeid-required"],
        ),
        (
            owner("get", "<subscriptions node='n'/>"),
            &["feature-not-implemented", "unsupported"],
        ),
        (
            with_options(
                &publish("urn:n", "1", "<n xmlns='urn:n'/>"),
                &[("access_model", "authorize")],
            ),
            &["not-acceptable", "unsupported-access-model"],
        ),
        (
            format!("<iq type='set' id='p'><pubsub xmlns='{NS}'/></iq>"),
            &["bad-request"],
        ),
    ];
    for (iq, conditions) in cases {
        fails(&mut w, a, iq, conditions);
    }
    w.send(
        a,
        &set(&format!("<subscribe node='{TUNE}' jid='alice@localhost'/>")),
    );
    let got = w.take(a).concat();
    assert!(
        got.contains(&format!(
            "<unsupported xmlns='{NS_ERRORS}' feature='subscribe'/>"
        )),
        "{got}"
    );
}

#[test]
fn changes_that_overtake_one_another_are_all_kept_and_those_that_wait_have_a_limit() {
    let mut w = World::new(1);
    w.add("alice");
    let a = w.online("alice", "a");
    w.tier.held = true;
    for n in 0..WAITING_MAX + 2 {
        let iq = publish("urn:n", &format!("i{n}"), "<n xmlns='urn:n'/>");
        w.send(a, &with_options(&iq, &[("max_items", "max")]));
    }
    let got = w.take(a);
    assert!(
        got.len() == 1 && got[0].contains("<resource-constraint"),
        "{got:?}"
    );
    w.release();
    assert_eq!(w.take(a).len(), WAITING_MAX + 1);
    let nodes = nodes_of(&w.slices[0], "alice").unwrap();
    assert_eq!(nodes.get("urn:n").unwrap().items as usize, WAITING_MAX + 1);
    assert!(w.slices[0].pep.changes.is_empty());
}

#[test]
fn what_cannot_be_read_or_stored_is_an_error_and_blocks_nothing() {
    let mut w = World::new(1);
    w.add("alice");
    let a = w.online("alice", "a");
    w.tier.broken = true;
    for _ in 0..2 {
        fails(
            &mut w,
            a,
            &publish(TUNE, "1", SONG),
            &["resource-constraint"],
        );
        fails(&mut w, a, &get("", TUNE), &["resource-constraint"]);
    }
    w.tier.broken = false;
    succeeds(&mut w, a, &publish(TUNE, "1", SONG));
    assert!(succeeds(&mut w, a, &get("", TUNE)).contains("Yesterday"));
}

#[test]
fn limits_are_told_by_the_protocols_own_errors() {
    let mut w = World::with(1, |limits| {
        limits.pubsub.nodes_max = 2;
        limits.pubsub.item_bytes_max = 500;
        limits.pubsub.bytes_max = 1200;
    });
    w.add("alice");
    let a = w.online("alice", "a");
    let payload = |bytes: usize| format!("<n xmlns='urn:n'>{}</n>", "x".repeat(bytes));
    fails(
        &mut w,
        a,
        &publish("urn:n", "1", &payload(501)),
        &["not-acceptable", "payload-too-big"],
    );
    succeeds(&mut w, a, &publish("urn:1", "1", &payload(400)));
    succeeds(&mut w, a, &publish("urn:2", "1", &payload(400)));
    fails(
        &mut w,
        a,
        &publish("urn:3", "1", &payload(1)),
        &["conflict", "max-nodes-exceeded"],
    );
    let many = |id: &str| publish("urn:4", id, &payload(400));
    succeeds(&mut w, a, &owner("set", "<delete node='urn:1'/>"));
    succeeds(&mut w, a, &with_options(&many("a"), &[("max_items", "5")]));
    fails(&mut w, a, &many("b"), &["policy-violation"]);
    let node = "n".repeat(4000);
    fails(
        &mut w,
        a,
        &publish(&node, "1", &payload(1)),
        &["not-acceptable"],
    );
}

#[test]
fn greetings_that_wait_are_bounded() {
    let mut w = World::with(1, |limits| limits.pep_waiting_max = 3);
    for n in 0..READS_MAX + 10 {
        w.befriend("alice", &format!("u{n}"));
    }
    let a = w.login("alice", "a");
    w.tier.held = true;
    w.send(
        a,
        "<presence><c xmlns='http://jabber.org/protocol/caps' node='urn:c' ver='1'/></presence>",
    );
    let id = queries(&w.take(a)).pop().unwrap();
    w.send(
        a,
        &format!("<iq type='result' id='{id}' to='localhost'><query xmlns='http://jabber.org/protocol/disco#info'><feature var='x+notify'/></query></iq>"),
    );
    assert!(w.slices[0].counters.pep_dropped > 0);
    assert!(w.slices[0].pep.waiting() <= 3);
    w.release();
    assert_eq!(w.slices[0].pep.waiting(), 0);
}

#[test]
fn a_user_without_nodes_costs_next_to_nothing_and_one_with_nodes_his_index() {
    let mut w = World::new(1);
    w.befriend("alice", "bob");
    let a = capable(&mut w, "alice", "a", &[TUNE]);
    let index = w.user("alice").pep.as_ref();
    assert_eq!(index.map(|index| index.bytes()), Some(&[][..]));
    assert_eq!(bytes(w.user("alice")), size_of::<Index>());
    succeeds(&mut w, a, &publish(TUNE, "1", SONG));
    let index = bytes(w.user("alice"));
    assert!(index < 400, "{index} bytes");
    assert!(
        size_of::<Index>() <= 48
            && size_of::<Option<std::rc::Rc<super::super::caps::Entity>>>() == 8
    );
}

/// One greeting after the other, not one inside the other.
#[test]
fn thousands_who_wait_for_a_user_who_has_come_do_not_pile_up() {
    let mut w = World::with(1, |limits| limits.pep_waiting_max = 100_000);
    w.befriend("alice", "bob");
    let a = w.online("alice", "a");
    succeeds(&mut w, a, &publish(TUNE, "1", SONG));
    w.crash(1);
    w.tier.held = true;
    let slice = &mut w.slices[0];
    for n in 0..50_000 {
        interest_in(slice, "alice", &format!("bob@localhost/{n}"), "urn:x\n");
    }
    assert!(slice.pep.waiting() >= 50_000);
    w.release();
    assert_eq!(w.slices[0].pep.waiting(), 0);
}

#[test]
fn who_shares_a_group_is_a_contact_and_who_does_not_is_none() {
    use crate::xmpp::groups::{Groups, Row};
    for shard in [0, 1] {
        let mut w = World::new(2);
        let names = [w.on(0, "alice"), w.on(shard, "bob"), w.on(shard, "carol")];
        names.iter().for_each(|name| w.add(name));
        let row = |user: &String| Row {
            group: "Desk".into(),
            user: user.as_str().into(),
            label: String::new(),
        };
        let groups = Groups::new(names[..2].iter().map(row), &crate::xmpp::testing::ring(2));
        let groups = std::sync::Arc::new(groups);
        for slice in &mut w.slices {
            slice.regroup(groups.clone());
        }
        w.run();
        let bob = capable(&mut w, &names[1], "b", &[TUNE]);
        let carol = capable(&mut w, &names[2], "c", &[TUNE]);
        let alice = w.online(&names[0], "a");
        w.take(bob);
        succeeds(
            &mut w,
            alice,
            &publish(TUNE, "", "<tune xmlns='http://jabber.org/protocol/tune'/>"),
        );
        assert_eq!(events(&mut w, bob).len(), 1, "{shard}");
        assert_eq!(events(&mut w, carol).len(), 0);
        // and at arrival, in a group that is not too large for that
        for (most, greeted) in [(2, 1), (1, 0)] {
            for slice in &mut w.slices {
                slice.env.limits.group_greetings_members_max = most;
            }
            let late = capable_now(&mut w, &names[1], &format!("late{most}"), &[TUNE]);
            assert_eq!(events(&mut w, late).len(), greeted, "{shard} {most}");
        }
        succeeds(&mut w, bob, &get(&names[0], TUNE));
        fails(
            &mut w,
            carol,
            &get(&names[0], TUNE),
            &["service-unavailable"],
        );
    }
}

/// A node of alice's with an item that does not lie in the index, and contacts who want it.
fn with_cold_item(contacts: usize) -> World {
    let mut w = World::new(1);
    w.add("alice");
    for n in 0..contacts {
        w.befriend("alice", &format!("u{n}"));
    }
    let a = w.online("alice", "a");
    let long = format!("<x xmlns='urn:x'>{}</x>", "x".repeat(2000));
    succeeds(&mut w, a, &publish("urn:x", "1", &long));
    w
}

#[test]
fn what_many_wait_for_is_read_once_and_who_waits_twice_hears_it_once() {
    let mut w = with_cold_item(20);
    w.crash(1);
    let clients: Vec<Client> = (0..20).map(|n| w.online(&format!("u{n}"), "r")).collect();
    w.slices[0].want("alice");
    w.run();
    w.tier.held = true;
    let reads = w.tier.reads;
    for _ in 0..2 {
        for n in 0..20 {
            interest_in(
                &mut w.slices[0],
                "alice",
                &format!("u{n}@localhost/r"),
                "urn:x\n",
            );
        }
    }
    assert_eq!(
        (w.slices[0].pep.waiting(), w.slices[0].pep.reading()),
        (20, 1)
    );
    w.release();
    assert_eq!(
        (w.slices[0].pep.waiting(), w.slices[0].pep.reading()),
        (0, 0)
    );
    assert_eq!(w.tier.reads - reads, 2, "the index and a bucket");
    for client in clients {
        assert_eq!(events(&mut w, client).len(), 1);
    }
}

#[test]
fn buckets_are_read_within_the_same_bounds_as_indexes() {
    let mut w = World::with(1, |limits| limits.pubsub.nodes_max = 100);
    w.befriend("alice", "bob");
    let a = w.online("alice", "a");
    let mut wants = String::new();
    for n in 0..READS_MAX + 8 {
        let long = format!("<x xmlns='urn:x'>{}</x>", "x".repeat(2000));
        succeeds(&mut w, a, &publish(&format!("urn:{n}"), "1", &long));
        wants += &format!("urn:{n}\n");
    }
    let bob = w.online("bob", "b");
    w.tier.held = true;
    let reads = w.tier.reads;
    interest_in(&mut w.slices[0], "alice", "bob@localhost/b", &wants);
    let pep = &w.slices[0].pep;
    assert_eq!((pep.waiting(), pep.reading()), (READS_MAX + 8, READS_MAX));
    w.release();
    assert_eq!(w.slices[0].pep.waiting(), 0);
    assert_eq!(w.tier.reads - reads, READS_MAX + 8);
    assert_eq!(events(&mut w, bob).len(), READS_MAX + 8);
}

#[test]
fn a_change_that_was_begun_for_an_account_is_not_made_to_the_next_one_of_its_name() {
    // the index, or the bucket, is being read
    for crash in [true, false] {
        let mut w = with_cold_item(0);
        if crash {
            w.crash(1);
        }
        let a = w.online("alice", "a");
        w.tier.held = true;
        let (record, revision) = (w.user("alice").record.clone(), w.slices[0].next_id());
        let outcome = |slice: &mut Slice| {
            let heard = std::rc::Rc::new(std::cell::Cell::new(None));
            let hears = heard.clone();
            begin(
                slice,
                "alice",
                Box::new(move |slice, turn| match turn {
                    Err(_) => hears.set(Some(false)),
                    Ok(turn) => {
                        let op = Op::Publish {
                            id: "2".into(),
                            payload: b"<x xmlns='urn:x'/>".to_vec(),
                            options: None,
                            config: Config::personal(),
                        };
                        let change = Change {
                            ops: vec![("urn:x".into(), op)],
                            ..Change::default()
                        };
                        commit(slice, turn, change, move |_, result| {
                            hears.set(Some(result.is_ok()));
                        });
                    }
                }),
            );
            heard
        };
        let slice = &mut w.slices[0];
        let (first, second) = (outcome(slice), outcome(slice));
        slice.set_user("alice", None);
        slice.set_user("alice", Some((record, revision)));
        let third = outcome(slice);
        w.release();
        let heard = [first.get(), second.get(), third.get()];
        assert_eq!(heard, [Some(false), Some(false), Some(true)], "{crash}");
        let nodes = nodes_of(&w.slices[0], "alice").unwrap();
        assert!(w.slices[0].pep.changes.is_empty() && nodes.nodes.len() == 1);
        let _ = a;
    }
}

#[test]
fn a_page_by_ids_is_what_was_named_however_many_that_are() {
    let mut w = World::new(1);
    w.add("alice");
    let a = w.online("alice", "a");
    for n in 0..5 {
        let item = publish("urn:x", &n.to_string(), "<x xmlns='urn:x'/>");
        let options = [("persist_items", "1"), ("max_items", "10")];
        succeeds(&mut w, a, &with_options(&item, &options));
    }
    let ids: String = (3..2000).map(|n| format!("<item id='{n}'/>")).collect();
    let ask = format!(
        "<iq type='get' id='g'><pubsub xmlns='{NS}'><items node='urn:x'>{ids}</items></pubsub></iq>"
    );
    let got = succeeds(&mut w, a, &ask);
    assert_eq!(got.matches("<item ").count(), 2, "{got}");
}
