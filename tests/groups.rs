//! An administrator's groups on a running blade: the file, its reload, and clients that do not ask for anything.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::fs;
use std::time::Duration;

use blade::Blade;
use client::xml::Element;
use client::{Client, wait_until};

fn start(rows: &str) -> Blade {
    let mut blade = Blade::prepare(&client::PLAIN);
    let file = blade.folder().join("groups.csv");
    fs::write(&file, format!("group,username,name\n{rows}")).unwrap();
    blade.set("groups.file", &format!("{:?}", file.display().to_string()));
    blade.restart();
    blade
}

fn write(blade: &Blade, rows: &str) {
    let file = blade.folder().join("groups.csv");
    fs::write(file, format!("group,username,name\n{rows}")).unwrap();
}

fn command(blade: &Blade, arguments: &[&str]) -> Result<String, String> {
    let output = blade.nitro(arguments, "");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

/// Asks for the roster; its items by JID with name, subscription and groups.
fn roster(client: &mut Client) -> Vec<(String, String, String, Vec<String>)> {
    let answer = client
        .connection
        .request("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>")
        .unwrap();
    let query = answer.child("query").unwrap();
    let mut items: Vec<_> = query.children.iter().map(item).collect();
    items.sort();
    items
}

fn item(item: &Element) -> (String, String, String, Vec<String>) {
    let get = |name: &str| item.attribute(name).unwrap_or_default().to_owned();
    let groups = item.children.iter().map(|g| g.text.clone()).collect();
    (get("jid"), get("name"), get("subscription"), groups)
}

fn is_push(e: &Element, jid: &str, subscription: &str) -> bool {
    let item = e.child("query").and_then(|query| query.child("item"));
    e.name == "iq"
        && e.attribute("type") == Some("set")
        && item.is_some_and(|item| {
            item.attribute("jid") == Some(jid)
                && item.attribute("subscription") == Some(subscription)
        })
}

fn is_presence(e: &Element, from: &str, typ: Option<&str>) -> bool {
    e.name == "presence" && e.attribute("from") == Some(from) && e.attribute("type") == typ
}

#[test]
fn members_of_all_cores_see_each_other_and_changes_reach_them_without_a_restart() {
    const USERS: usize = 12;
    let names: Vec<String> = (0..USERS).map(|n| format!("trader{n}")).collect();
    let row = |name: &String| format!("Desk,{name},The {name}\n");
    let blade = start(&names.iter().map(row).collect::<String>());
    for name in &names {
        Client::register(&blade, name);
    }
    let mut clients: Vec<Client> = names
        .iter()
        .map(|name| {
            let mut client = Client::bind(&blade, name, "r");
            let items = roster(&mut client);
            assert_eq!(items.len(), USERS - 1);
            assert!(items.iter().all(|(jid, name, subscription, groups)| {
                name == &format!("The {}", jid.split('@').next().unwrap())
                    && subscription == "both"
                    && groups == &["Desk"]
            }));
            client.be_available();
            client
        })
        .collect();
    for client in &mut clients {
        for name in &names {
            let full = format!("{name}@localhost/r");
            if full != client.jid {
                client.find(|e| is_presence(e, &full, None));
            }
        }
        client.connection.forget();
    }

    // one leaves, one comes
    Client::register(&blade, "newcomer");
    let mut newcomer = Client::bind(&blade, "newcomer", "r");
    assert!(roster(&mut newcomer).is_empty());
    newcomer.be_available();
    let rows: String = names[1..].iter().map(row).collect();
    write(&blade, &format!("{rows}Desk,newcomer,New\n"));
    let said = command(&blade, &["group", "reload"]).unwrap();
    assert_eq!(said, format!("Desk  {USERS} members\n"));
    let gone = clients.remove(0);
    let (gone_bare, mut gone) = (format!("{}@localhost", names[0]), gone);
    for client in &mut clients {
        client.find(|e| is_push(e, &gone_bare, "remove"));
        client.find(|e| is_presence(e, &gone.jid, Some("unavailable")));
        client.find(|e| is_push(e, "newcomer@localhost", "both"));
        client.find(|e| is_presence(e, "newcomer@localhost/r", None));
        let bare = client.jid.split('/').next().unwrap().to_owned();
        gone.find(|e| is_push(e, &bare, "remove"));
        newcomer.find(|e| is_push(e, &bare, "both"));
        newcomer.find(|e| is_presence(e, &client.jid, None));
        assert_eq!(roster(client).len(), USERS - 1);
    }
    assert!(roster(&mut gone).is_empty());
    assert_eq!(roster(&mut newcomer).len(), USERS - 1);
    wait_until("nothing is left to do", Duration::from_secs(10), || {
        let (_, page) = blade.http_get("/metrics").unwrap();
        let mut waiting = page
            .lines()
            .filter(|line| line.starts_with("nitro_group_changes_waiting{"));
        waiting.all(|line| line.ends_with(" 0"))
    });
}

#[test]
fn a_bad_file_is_told_and_changes_nothing_and_a_signal_reloads_too() {
    let blade = start("Desk,alice,\nDesk,bob,Bob\n");
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut alice = Client::online(&blade, "alice", "r");
    assert_eq!(roster(&mut alice).len(), 1);
    let shown = command(&blade, &["group", "show", "Desk"]).unwrap();
    assert_eq!(shown, "alice  \nbob  Bob\n");
    assert!(command(&blade, &["group", "show", "None"]).is_err());
    write(&blade, "Desk,a b,\n");
    for arguments in [["group", "reload"], ["group", "check"]] {
        let why = command(&blade, &arguments).unwrap_err();
        assert!(why.contains("groups.csv:2: "), "{why}");
    }
    blade.signal(libc::SIGHUP);
    wait_until("it is refused", Duration::from_secs(10), || {
        blade.log().contains("not reloaded")
    });
    assert_eq!(roster(&mut alice).len(), 1);
    write(&blade, "Desk,alice,\n");
    assert!(
        command(&blade, &["group", "check"])
            .unwrap()
            .starts_with("1 groups with 1 users")
    );
    blade.signal(libc::SIGHUP);
    alice.find(|e| is_push(e, "bob@localhost", "remove"));
    assert_eq!(
        command(&blade, &["group", "list"]).unwrap(),
        "Desk  1 members\n"
    );
}

#[test]
fn an_operator_puts_users_into_groups_and_takes_them_out_while_they_are_on_line() {
    let blade = start("Desk,alice,\n");
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut alice = Client::online(&blade, "alice", "r");
    assert!(roster(&mut alice).is_empty());
    let said = command(
        &blade,
        &["group", "add", "Desk", "bob@localhost", "--name", "Bob B."],
    );
    assert_eq!(said.unwrap(), "done; it is in force\n");
    alice.find(|e| is_push(e, "bob@localhost", "both"));
    assert_eq!(roster(&mut alice)[0].1, "Bob B.");
    let why = command(&blade, &["group", "add", "Desk", "bob"]).unwrap_err();
    assert!(why.contains("bob is in Desk already"), "{why}");
    command(&blade, &["group", "remove", "Desk", "bob"]).unwrap();
    alice.find(|e| is_push(e, "bob@localhost", "remove"));
    let file = fs::read_to_string(blade.folder().join("groups.csv")).unwrap();
    assert_eq!(file, "group,username,name\nDesk,alice,\n");
}
