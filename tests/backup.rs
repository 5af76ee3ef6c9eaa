//! What an operator may rely on with his data: a migration between SQLite and MariaDB changes nothing, whatever
//! interrupts it; a backup holds what was acknowledged before it began; what another release wrote is refused in a
//! sentence.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;
#[path = "servers/mariadb.rs"]
mod mariadb;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blade::{Blade, DOMAIN};
use client::{Client, PASSWORD, PLAIN};
use mariadb::Mariadb;
use sqlx::{AssertSqlSafe, Connection as _, Row as _, SqliteConnection};

const USERS: usize = 1000;
const CONTACTS: usize = 20;
/// Log in, send, and have their messages wait: `speaker` to `hearer` of the same number.
const PAIRS: usize = 10;
const MESSAGES: usize = 40;

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn done(blade: &Blade, arguments: &[&str]) -> String {
    let output = blade.nitro(arguments, "");
    let said = text(&output);
    assert!(output.status.success(), "nitro {arguments:?}: {said}");
    said
}

/// One sentence that says why not.
fn refused(blade: &Blade, arguments: &[&str]) -> String {
    let output = blade.nitro(arguments, "");
    assert_eq!(
        output.status.code(),
        Some(1),
        "nitro {arguments:?}: {}",
        text(&output)
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn name(user: usize) -> String {
    format!("trader{user:04}")
}

/// SQL on a SQLite file; the first columns of its rows.
fn sqlite(path: &Path, statement: &str) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let url = format!("sqlite:{}", path.display());
        let mut connection = SqliteConnection::connect(&url).await.unwrap();
        let rows = sqlx::query(AssertSqlSafe(statement.to_owned()))
            .fetch_all(&mut connection)
            .await
            .unwrap_or_else(|why| panic!("{statement}: {why}"));
        connection.close().await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    })
}

/// Every row of every table as text, in an order that hangs on the rows alone. What is left of accounts that are gone is
/// not among it.
fn dump(path: &Path) -> Vec<(String, Vec<String>)> {
    let tables = sqlite(
        path,
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT GLOB '_sqlx*' AND name NOT GLOB 'sqlite_*' AND name <> 'gone' \
         ORDER BY name",
    );
    let rows = |table: &String| {
        // `seq` of documents is a row's number in SQLite and means nothing.
        let columns = sqlite(
            path,
            &format!(
                "SELECT name FROM pragma_table_info('{table}') WHERE NOT ('{table}' = 'documents' AND name = 'seq')"
            ),
        );
        let quoted: Vec<String> = columns.iter().map(|one| format!("quote({one})")).collect();
        sqlite(
            path,
            &format!(
                "SELECT {} AS row FROM {table} ORDER BY row",
                quoted.join("||'|'||")
            ),
        )
    };
    tables
        .into_iter()
        .map(|table| (table.clone(), rows(&table)))
        .collect()
}

type Dump = [(String, Vec<String>)];

fn same(one: &Dump, other: &Dump) {
    assert_eq!(one.len(), other.len(), "tables");
    for ((table, one), (_, other)) in one.iter().zip(other) {
        assert!(one == other, "{table} differs");
    }
}

/// Long keys of documents come back shortened from MariaDB.
fn same_but_long_keys(one: &Dump, other: &Dump) {
    let without = |dump: &Dump| {
        let others = dump.iter().filter(|(table, _)| table != "documents");
        others.cloned().collect::<Vec<_>>()
    };
    same(&without(one), &without(other));
    let documents = |dump: &Dump| {
        let found = dump.iter().find(|(table, _)| table == "documents");
        found.expect("a table of documents").1.len()
    };
    assert_eq!(documents(one), documents(other));
}

/// A thousand users with rosters; twenty of them with archives, a vCard, and messages that wait; one who is gone.
fn populate(blade: &Blade) {
    let file = |name: &str, text: String| {
        let path = blade.folder().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let rows: String = (0..USERS)
        .map(|user| format!("{},{PASSWORD}\n", name(user)))
        .collect();
    let accounts = file("accounts.csv", format!("username,password\n{rows}"));
    let rows: String = (0..USERS)
        .flat_map(|user| (1..=CONTACTS / 2).map(move |step| (user, (user + step) % USERS)))
        .map(|(user, contact)| format!("{},{},désk\n", name(user), name(contact)))
        .collect();
    let rosters = file("rosters.csv", format!("username,contact,groups\n{rows}"));
    done(blade, &["user", "import", &accounts, "--rosters", &rosters]);
    for pair in 0..PAIRS {
        let mut speaker = Client::online(blade, &name(pair), "desk");
        speaker.enable_resumption();
        let to = name(PAIRS + pair);
        for number in 0..MESSAGES {
            speaker.send(&format!(
                "<message type='chat' to='{to}@{DOMAIN}' id='m{number}'><body>{}</body></message>",
                line(pair, number)
            ));
        }
        let long = "x".repeat(1500);
        for (id, query) in [
            (
                "1",
                "<vCard xmlns='vcard-temp'><FN>José</FN></vCard>".to_owned(),
            ),
            (
                "2",
                format!("<query xmlns='jabber:iq:private'><a xmlns='{long}'>{pair}</a></query>"),
            ),
        ] {
            speaker.send(&format!("<iq type='set' id='{id}'>{query}</iq>"));
            speaker.find(|e| e.name == "iq" && e.attribute("id") == Some(id));
        }
        while speaker.ask_h() < MESSAGES as u32 {}
    }
    make_room(blade, &name(0));
    done(blade, &["user", "remove", &name(USERS - 1)]);
}

const NS_OWNER: &str = "http://jabber.org/protocol/muc#owner";

/// A room that stays, with a title, a member who has a nickname, a subject and a message.
fn make_room(blade: &Blade, owner: &str) {
    let room = format!("desk@rooms.{DOMAIN}");
    let mut owner = Client::online(blade, owner, "room");
    owner.send(&format!(
        "<presence to='{room}/Owner'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
    ));
    owner.find(|e| e.name == "message" && e.child("subject").is_some());
    for query in [
        format!(
            "<query xmlns='{NS_OWNER}'><x xmlns='jabber:x:data' type='submit'>\
             <field var='muc#roomconfig_persistentroom'><value>1</value></field>\
             <field var='muc#roomconfig_roomname'><value>Désk</value></field></x></query>"
        ),
        format!(
            "<query xmlns='http://jabber.org/protocol/muc#admin'>\
             <item affiliation='member' jid='guest@{DOMAIN}'/></query>"
        ),
    ] {
        let request = format!("<iq type='set' id='{{id}}' to='{room}'>{query}</iq>");
        let answer = owner.connection.request(&request).unwrap();
        assert_eq!(answer.attribute("type"), Some("result"), "{answer}");
    }
    owner.send(&format!(
        "<message type='groupchat' to='{room}'><subject>prices</subject></message>"
    ));
    owner.find(|e| e.child("subject").is_some_and(|s| s.text == "prices"));
    owner.send(&format!(
        "<message type='groupchat' to='{room}'><body>said in the room</body></message>"
    ));
    assert_eq!(owner.next_body(), "said in the room");
}

/// The room is there as it was left, and so is who counts as its maker.
fn check_room(blade: &Blade, owner: &str) {
    let room = format!("desk@rooms.{DOMAIN}");
    let mut owner = Client::online(blade, owner, "room");
    let mut ask = |request: &str| owner.connection.request(request).unwrap().to_string();
    client::wait_until("the list of rooms", Duration::from_secs(20), || {
        let list = format!(
            "<iq type='get' id='{{id}}' to='rooms.{DOMAIN}'>\
             <query xmlns='http://jabber.org/protocol/disco#items'/></iq>"
        );
        ask(&list).contains("Désk")
    });
    let members = ask(&format!(
        "<iq type='get' id='{{id}}' to='{room}'><query xmlns='http://jabber.org/protocol/muc#admin'>\
         <item affiliation='member'/></query></iq>"
    ));
    assert!(members.contains("guest@"), "{members}");
    owner.send(&format!(
        "<presence to='{room}/Owner'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
    ));
    assert_eq!(owner.next_body(), "said in the room", "its history");
    owner.find(|e| e.child("subject").is_some_and(|s| s.text == "prices"));
    let form = format!("<iq type='get' id='{{id}}' to='{room}'><query xmlns='{NS_OWNER}'/></iq>");
    let form = owner.connection.request(&form).unwrap();
    assert_eq!(form.attribute("type"), Some("result"), "he owns it");
}

fn line(pair: usize, number: usize) -> String {
    format!("josé {pair} says {number}")
}

/// What `populate` made is served by a blade, and changed by nothing that came between.
fn check_served(blade: &Blade) {
    check_room(blade, &name(0));
    for pair in 0..PAIRS {
        let mut speaker = Client::bind(blade, &name(pair), "desk");
        let roster = speaker
            .connection
            .request("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>")
            .unwrap();
        let items = roster.child("query").unwrap().children.len();
        assert!((CONTACTS - 1..=CONTACTS).contains(&items), "{roster}");
        let long = "x".repeat(1500);
        let private = speaker
            .connection
            .request(&format!(
                "<iq type='get' id='{{id}}'><query xmlns='jabber:iq:private'><a xmlns='{long}'/></query></iq>"
            ))
            .unwrap();
        let stored = &private.child("query").unwrap().children[0];
        assert_eq!(stored.text, pair.to_string(), "a long key of private data");
        let mut hearer = Client::online(blade, &name(PAIRS + pair), "desk");
        for number in 0..MESSAGES {
            assert_eq!(hearer.next_body(), line(pair, number));
        }
    }
}

/// What lies behind a blade that is started for a test.
fn behind(mariadb: Option<&Mariadb>) -> Vec<(&'static str, String)> {
    let mut settings: Vec<_> = PLAIN
        .iter()
        .map(|(key, value)| (*key, (*value).to_owned()))
        .collect();
    settings.extend(mariadb.map(|one| ("database", format!("\"{}\"", one.url()))));
    settings
}

fn prepared(settings: &[(&str, String)]) -> Blade {
    let settings: Vec<_> = settings
        .iter()
        .map(|(key, value)| (*key, value.as_str()))
        .collect();
    Blade::prepare(&settings)
}

/// A populated blade on SQLite, stopped; the journals are carried over.
fn populated() -> Blade {
    let mut blade = prepared(&behind(None));
    blade.restart();
    populate(&blade);
    blade.terminate();
    done(&blade, &["user", "list", "--limit", "1"]);
    blade
}

fn sqlite_url(path: &Path) -> String {
    format!("sqlite:{}", path.display())
}

#[test]
fn a_migration_to_mariadb_and_back_changes_nothing_and_both_are_served() {
    let Some(mariadb) = Mariadb::start() else {
        eprintln!("skipped: MariaDB is not installed (apt-get install mariadb-server)");
        return;
    };
    let mut blade = populated();
    let source = blade.data_dir().join("nitro.db");
    let before = dump(&source);
    let rows = |table: &str| {
        before
            .iter()
            .find(|(name, _)| name == table)
            .unwrap()
            .1
            .len()
    };
    // the room is one, too
    assert_eq!(rows("users"), USERS - 1 + 1);
    assert_eq!(rows("pending"), PAIRS * MESSAGES);
    assert_eq!(rows("archive"), 2 * PAIRS * MESSAGES + 1);
    // private data, a vCard, and the index of nodes that says so (XEP-0292); who has made the room
    assert_eq!((rows("documents"), rows("removed")), (3 * PAIRS + 1, 1));

    let said = done(&blade, &["migrate-store", "--to", &mariadb.url()]);
    assert!(said.contains("Change the key `database`"), "{said}");
    assert!(
        !said.contains("secret@"),
        "the password stays out of sight: {said}"
    );
    same(&before, &dump(&source));
    done(
        &blade,
        &["migrate-store", "--to", &mariadb.url(), "--verify"],
    );
    let again = refused(&blade, &["migrate-store", "--to", &mariadb.url()]);
    assert!(again.contains("is not empty"), "{again}");

    // Back into another file: the same rows under the same numbers, but for the long keys that MariaDB shortens.
    let back = blade.folder().join("back.db");
    blade.set("database", &format!("\"{}\"", mariadb.url()));
    done(&blade, &["migrate-store", "--to", &sqlite_url(&back)]);
    let after = dump(&back);
    same_but_long_keys(&before, &after);
    let again = blade.folder().join("again.db");
    done(&blade, &["migrate-store", "--to", &sqlite_url(&again)]);
    same(&after, &dump(&again));
    // And a third time forth: short keys stay what they are.
    blade.set("database", &format!("\"{}\"", sqlite_url(&back)));
    mariadb.sql("DROP DATABASE nitro; CREATE DATABASE nitro");
    let said = refused(
        &blade,
        &["migrate-store", "--to", &mariadb.url(), "--verify"],
    );
    assert!(said.contains("differ in the table users"), "{said}");
    done(&blade, &["migrate-store", "--to", &mariadb.url()]);

    blade.restart();
    check_served(&blade);
    blade.terminate();
    // The journal of a blade that ran on the copy knows nothing of MariaDB's.
    let wrong = refused(
        &blade,
        &[
            "migrate-store",
            "--from",
            &mariadb.url(),
            "--to",
            &sqlite_url(&again),
        ],
    );
    assert!(
        wrong.contains("belong to the database of the configuration"),
        "{wrong}"
    );
}

#[test]
fn a_migration_that_is_killed_again_and_again_ends_as_if_it_had_not_been() {
    let Some(mariadb) = Mariadb::start() else {
        eprintln!("skipped: MariaDB is not installed (apt-get install mariadb-server)");
        return;
    };
    let mut blade = populated();
    let source = blade.data_dir().join("nitro.db");
    // Enough for many batches.
    sqlite(
        &source,
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000)
         INSERT INTO archive SELECT 1000 + i, 1 + i % 500, i, 1, 'bob@localhost/é', zeroblob(300) FROM n",
    );
    let before = dump(&source);
    let back = blade.folder().join("back.db");
    let mut random = fastrand::Rng::with_seed(4);
    let (mut kills, mut midway) = (0_u32, 0);
    for (database, to) in [
        (sqlite_url(&source), mariadb.url()),
        (mariadb.url(), sqlite_url(&back)),
    ] {
        let database = format!("database=\"{database}\"");
        let data_dir = format!("data_dir=\"{}\"", blade.data_dir().display());
        let begun = Instant::now();
        loop {
            let mut child = Command::new(env!("CARGO_BIN_EXE_nitro"))
                .args([
                    "migrate-store",
                    "--to",
                    &to,
                    "--set",
                    &data_dir,
                    "--set",
                    &database,
                ])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // More patience from kill to kill, so that it comes to its end.
            let most = 300 + 150 * u64::from(kills % 12);
            let kill_at = Instant::now() + Duration::from_millis(random.u64(10..most));
            let ended = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break Some(status);
                }
                // At a random moment; once also when the archive is seen half copied, however fast the machine is.
                let caught = midway == 0 && to != mariadb.url() && is_midway(&back);
                if (caught || Instant::now() > kill_at) && begun.elapsed() < Duration::from_secs(20)
                {
                    child.kill().unwrap();
                    break None;
                }
                assert!(
                    begun.elapsed() < Duration::from_secs(240),
                    "the copy does not end"
                );
                std::thread::sleep(Duration::from_millis(2)); // the poll's interval; the bound is above
            };
            let said = text(&child.wait_with_output().unwrap());
            match ended {
                Some(status) => {
                    // Killed behind its last commit, it finds its own work.
                    assert!(status.success() || said.contains("is not empty"), "{said}");
                    break;
                }
                None => {
                    kills += 1;
                    midway += u32::from(to != mariadb.url() && is_midway(&back));
                }
            }
        }
    }
    assert!(kills >= 5, "only {kills} kills");
    assert!(midway > 0, "no kill found the archive half copied");
    eprintln!("{kills} kills, {midway} of them found the archive half copied");
    blade.set("database", &format!("\"{}\"", mariadb.url()));
    done(
        &blade,
        &["migrate-store", "--to", &sqlite_url(&back), "--verify"],
    );
    same_but_long_keys(&before, &dump(&back));
}

/// Whether some of the archive is there, and not all of it.
fn is_midway(copy: &Path) -> bool {
    let made = "SELECT name FROM sqlite_schema WHERE name = 'archive'";
    copy.exists()
        && !sqlite(copy, made).is_empty()
        && !sqlite(copy, "SELECT name FROM state WHERE name = 'copying' AND (SELECT COUNT(*) FROM archive) BETWEEN 1 AND 40000")
            .is_empty()
}

#[test]
fn wrong_sources_and_targets_are_refused_and_half_a_copy_is_not_served() {
    let mut blade = prepared(&behind(None));
    blade.restart();
    blade.add_user("alice", PASSWORD);
    let to = blade.folder().join("to.db");
    let url = sqlite_url(&to);
    let why = refused(&blade, &["migrate-store", "--to", &url]);
    assert!(why.contains("another nitro"), "{why}");
    blade.terminate();
    let own = blade.data_dir().join("nitro.db");
    for (arguments, expected) in [
        (
            ["migrate-store", "--to", &sqlite_url(&own)],
            "the same database",
        ),
        (
            ["migrate-store", "--to", "postgres://x/y"],
            "--to: a database is",
        ),
    ] {
        let why = refused(&blade, &arguments);
        assert!(why.contains(expected), "{why}");
    }
    assert!(!to.exists());
    done(&blade, &["migrate-store", "--to", &url]);

    // As an interrupted one leaves it.
    sqlite(&to, "INSERT INTO state VALUES ('copying', 7)");
    let why = refused(&blade, &["migrate-store", "--to", &url]);
    assert!(why.contains("half of a copy of another database"), "{why}");
    blade.set("database", &format!("\"{url}\""));
    for arguments in [&["serve"][..], &["user", "list"]] {
        let why = refused(&blade, arguments);
        assert!(why.contains("is half of a copy"), "{why}");
    }
    sqlite(&to, "DELETE FROM state WHERE name = 'copying'");
    sqlite(&to, "UPDATE users SET disabled = 1");
    blade.set("database", "\"\"");
    let why = refused(&blade, &["migrate-store", "--to", &url, "--verify"]);
    assert!(why.contains("differ in the table users"), "{why}");
}

#[test]
fn a_backup_under_load_holds_what_was_acknowledged_before_it_began() {
    backup_under_load(None);
}

#[test]
fn the_same_with_mariadb_behind_the_blade() {
    match Mariadb::start() {
        Some(mariadb) => backup_under_load(Some(mariadb)),
        None => eprintln!("skipped: MariaDB is not installed (apt-get install mariadb-server)"),
    }
}

fn backup_under_load(mariadb: Option<Mariadb>) {
    const SPEAKERS: usize = 4;
    let mut settings = behind(mariadb.as_ref());
    settings.push(("limits.offline_messages_max", "1000000".into()));
    let mut blade = prepared(&settings);
    blade.restart();
    for user in 0..2 * SPEAKERS {
        Client::register(&blade, &name(user));
    }
    let folder = blade.folder().join("backup");
    let acknowledged = Mutex::new(BTreeSet::new());
    let stop = AtomicBool::new(false);
    let before: BTreeSet<String> = std::thread::scope(|scope| {
        for speaker in 0..SPEAKERS {
            let (blade, acknowledged, stop) = (&blade, &acknowledged, &stop);
            scope.spawn(move || {
                let mut client = Client::online(blade, &name(speaker), "desk");
                client.enable_resumption();
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    let bodies: Vec<_> = (number..number + 10).map(|n| line(speaker, n)).collect();
                    for body in &bodies {
                        let to = name(SPEAKERS + speaker);
                        client.send(&format!(
                            "<message type='chat' to='{to}@{DOMAIN}'><body>{body}</body></message>"
                        ));
                    }
                    number += bodies.len();
                    while client.ask_h() < number as u32 {}
                    acknowledged.lock().unwrap().extend(bodies);
                }
                client.connection.forget();
            });
        }
        let count = || acknowledged.lock().unwrap().len();
        client::wait_until("some load", Duration::from_secs(30), || count() > 300);
        blade.add_user("late", PASSWORD);
        let before = acknowledged.lock().unwrap().clone();
        let output = blade.nitro(&["backup", folder.to_str().unwrap()], "");
        let during = count() - before.len();
        stop.store(true, Ordering::Relaxed);
        assert!(output.status.success(), "{}", text(&output));
        assert!(
            during > 0,
            "nothing was acknowledged while the backup was made"
        );
        eprintln!(
            "{} before, {during} meanwhile: {}",
            before.len(),
            text(&output)
        );
        before
    });
    blade.kill();

    if let Some(mariadb) = &mariadb {
        mariadb.sql("DROP DATABASE nitro; CREATE DATABASE nitro");
    }
    let mut restored = prepared(&settings);
    let said = done(&restored, &["restore", folder.to_str().unwrap()]);
    assert!(said.contains("start nitro"), "{said}");
    let secret = |blade: &Blade| fs::read(blade.data_dir().join("secret")).unwrap();
    assert_eq!(secret(&blade), secret(&restored));
    restored.restart();
    drop(Client::online(&restored, "late", "desk"));
    let mut left = before;
    for hearer in SPEAKERS..2 * SPEAKERS {
        let prefix = format!("josé {} ", hearer - SPEAKERS);
        let mut wanted = left.iter().filter(|body| body.starts_with(&prefix)).count();
        let mut client = Client::online(&restored, &name(hearer), "desk");
        let mut last = None;
        while wanted > 0 {
            let body = client.next_body();
            let number: u64 = body.rsplit(' ').next().unwrap().parse().unwrap();
            assert!(
                last.is_none_or(|last| last < number),
                "{body} after {last:?}"
            );
            last = Some(number);
            wanted -= usize::from(left.remove(&body));
        }
        // What is written now stands behind what was restored.
        client.send(&format!(
            "<message type='chat' to='{}@{DOMAIN}'><body>new</body></message>",
            name(hearer - SPEAKERS)
        ));
        client.settle();
    }
    assert!(left.is_empty());
    let mut speaker = Client::online(&restored, &name(0), "desk");
    assert_eq!(speaker.next_body(), "new");
}

#[test]
fn a_backup_that_would_miss_what_was_accepted_is_not_made() {
    let Some(mut mariadb) = Mariadb::start() else {
        eprintln!("skipped: MariaDB is not installed (apt-get install mariadb-server)");
        return;
    };
    let mut blade = prepared(&behind(Some(&mariadb)));
    blade.restart();
    populate_little(&blade);
    let folder = blade.folder().join("backup");
    let to = folder.to_str().unwrap();
    let mut alice = Client::online(&blade, "alice", "desk");
    alice.enable_resumption();
    mariadb.kill();
    alice.send("<message type='chat' to='alice@localhost'><body>without SQL</body></message>");
    while alice.ask_h() < 1 {}
    let why = refused(&blade, &["backup", to, "--wait", "1"]);
    assert!(
        why.contains("has not taken within 1 s what was accepted"),
        "{why}"
    );
    assert!(!folder.exists());
    mariadb.restart();
    done(&blade, &["backup", to]);
    let archive = sqlite(
        &folder.join("nitro.db"),
        "SELECT CAST(stanza AS TEXT) FROM archive",
    );
    assert!(
        archive.iter().any(|stanza| stanza.contains("without SQL")),
        "{archive:?}"
    );
}

#[test]
fn a_backup_of_a_stopped_server_is_restored_only_whole_and_only_into_an_empty_folder() {
    let mut blade = prepared(&behind(None));
    let folder = blade.folder().join("backup");
    let to = folder.to_str().unwrap();
    let why = refused(&blade, &["backup", to]);
    assert!(why.contains("there is no database to back up"), "{why}");
    blade.restart();
    populate_little(&blade);
    blade.kill();
    // The journals hold it all; the command carries them over.
    done(&blade, &["backup", to]);
    let why = refused(&blade, &["backup", to]);
    assert!(why.contains("is there already"), "{why}");
    let why = refused(&blade, &["restore", to]);
    assert!(why.contains("is not empty"), "{why}");

    let restore = |prepare: &dyn Fn(&mut Blade, &Path)| {
        let mut other = prepared(&behind(None));
        let copy = other.folder().join("copy");
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            // the folder of uploads is empty
            if entry.path().is_file() {
                fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
            }
        }
        prepare(&mut other, &copy);
        let why = refused(&other, &["restore", copy.to_str().unwrap()]);
        assert!(!other.data_dir().join("nitro.db").exists(), "{why}");
        why
    };
    let edit = |copy: &Path, from: &str, to: &str| {
        let path = copy.join("manifest.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replacen(from, to, 1)).unwrap();
    };
    let why = restore(&|_, copy| {
        let path = copy.join("nitro.db");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    });
    assert!(why.contains("it is not what the manifest says"), "{why}");
    let why = restore(&|_, copy| fs::remove_file(copy.join("manifest.json")).unwrap());
    assert!(
        why.contains("name the folder of a backup that was finished"),
        "{why}"
    );
    let why = restore(&|_, copy| edit(copy, "\"format\": 1", "\"format\": 2"));
    assert!(
        why.contains("the backup has format 2, this nitro reads 1"),
        "{why}"
    );
    let why = restore(&|_, copy| edit(copy, "\"schema\": ", "\"schema\": 9"));
    assert!(why.contains("it was made by a newer nitro"), "{why}");
    let why = restore(&|_, copy| edit(copy, "\"secret\"", "\"../secret\""));
    assert!(why.contains("none of a backup's"), "{why}");
    let why = restore(&|other, _| other.set("domain", "\"example.com\""));
    assert!(why.contains("set the key `domain`"), "{why}");

    // Interrupted, and repeated.
    let mut other = prepared(&behind(None));
    fs::create_dir_all(other.data_dir().join("restoring")).unwrap();
    fs::write(other.data_dir().join("secret"), "half").unwrap();
    for arguments in [&["serve"][..], &["user", "list"]] {
        let why = refused(&other, arguments);
        assert!(why.contains("a restore was interrupted here"), "{why}");
    }
    done(&other, &["restore", to]);
    other.restart();
    let mut hearer = Client::online(&other, "bob", "desk");
    assert_eq!(hearer.next_body(), "hello");
    check_room(&other, "alice");
}

#[test]
fn a_restore_that_is_killed_is_repeated_until_it_is_whole() {
    let mut blade = prepared(&behind(None));
    blade.restart();
    populate_little(&blade);
    blade.kill();
    let folder = blade.folder().join("backup");
    done(&blade, &["backup", folder.to_str().unwrap()]);
    let mut random = fastrand::Rng::with_seed(5);
    let (mut kills, mut marked) = (0, 0);
    for _ in 0..10 {
        let mut other = prepared(&behind(None));
        let data_dir = format!("data_dir=\"{}\"", other.data_dir().display());
        for most in [40, 80, 160] {
            let mut child = Command::new(env!("CARGO_BIN_EXE_nitro"))
                .arg("restore")
                .arg(&folder)
                .args(["--set", &data_dir])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            // The instant of the kill is what is tried here, not an event.
            std::thread::sleep(Duration::from_millis(random.u64(5..most)));
            child.kill().unwrap();
            if child.wait().unwrap().success() {
                break;
            }
            kills += 1;
            if other.data_dir().join("restoring").exists() {
                marked += 1;
                let why = refused(&other, &["serve"]);
                assert!(why.contains("a restore was interrupted here"), "{why}");
            }
        }
        // Behind its last step it leaves a whole folder, which is not empty any more.
        let output = other.nitro(&["restore", folder.to_str().unwrap()], "");
        let said = text(&output);
        assert!(
            output.status.success() || said.contains("is not empty"),
            "{said}"
        );
        other.restart();
        let mut hearer = Client::online(&other, "bob", "desk");
        assert_eq!(hearer.next_body(), "hello");
    }
    eprintln!("{kills} kills, {marked} of them left the mark");
    assert!(kills > 0);
}

/// A measurement: `cargo test --release --test backup -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn how_long_a_large_archive_takes() {
    let rows = std::env::var("NITRO_BACKUP_ROWS").map_or(300_000, |rows| rows.parse().unwrap());
    let mariadb = Mariadb::start().expect("MariaDB is installed");
    let mut blade = prepared(&behind(None));
    blade.restart();
    populate_little(&blade);
    blade.terminate();
    done(&blade, &["user", "list"]);
    let source = blade.data_dir().join("nitro.db");
    sqlite(
        &source,
        &format!(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
             INSERT INTO archive SELECT 1000 + i, 1 + i % 500, i, 1, 'bob@localhost/x', randomblob(300) FROM n"
        ),
    );
    let timed = |what: &str, blade: &Blade, arguments: &[&str]| {
        let begun = Instant::now();
        done(blade, arguments);
        let seconds = begun.elapsed().as_secs_f32();
        eprintln!(
            "{what}: {rows} rows in {seconds:.1} s, {:.0} rows/s",
            rows as f32 / seconds
        );
    };
    let folder = |name: &str| blade.folder().join(name).to_str().unwrap().to_owned();
    timed(
        "backup of SQLite",
        &blade,
        &["backup", &folder("of-sqlite")],
    );
    timed(
        "migration to MariaDB, with comparison",
        &blade,
        &["migrate-store", "--to", &mariadb.url()],
    );
    timed(
        "comparison",
        &blade,
        &["migrate-store", "--to", &mariadb.url(), "--verify"],
    );
    let mut behind_it = behind(None);
    behind_it.push(("database", format!("\"{}\"", mariadb.url())));
    timed(
        "backup of MariaDB",
        &prepared(&behind_it),
        &["backup", &folder("of-mariadb")],
    );
    timed(
        "restore into SQLite",
        &prepared(&behind(None)),
        &["restore", &folder("of-mariadb")],
    );
}

fn populate_little(blade: &Blade) {
    Client::register(blade, "alice");
    Client::register(blade, "bob");
    make_room(blade, "alice");
    let mut alice = Client::online(blade, "alice", "desk");
    alice.enable_resumption();
    alice.send(&format!(
        "<message type='chat' to='bob@{DOMAIN}'><body>hello</body></message>"
    ));
    while alice.ask_h() < 1 {}
}

#[test]
fn what_a_newer_release_wrote_is_refused_with_what_to_do() {
    let mut blade = prepared(&behind(None));
    blade.restart();
    populate_little(&blade);
    blade.kill();
    let segment = fs::read_dir(blade.data_dir().join("journal"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|one| one == "seg"))
        .expect("a segment");
    let good = fs::read(&segment).unwrap();
    let mut newer = good.clone();
    for header in [0, 2048] {
        newer[header + 8] = 2;
    }
    fs::write(&segment, newer).unwrap();
    let why = refused(&blade, &["serve"]);
    assert!(why.contains("the journal's format has version 2"), "{why}");
    assert!(why.contains("start that one"), "{why}");
    fs::write(&segment, good).unwrap();

    done(&blade, &["user", "show", "alice"]);
    let database = blade.data_dir().join("nitro.db");
    sqlite(
        &database,
        "UPDATE users SET record = CAST(X'09' || substr(record, 2) AS BLOB) WHERE name = 'alice'",
    );
    let why = refused(&blade, &["user", "show", "alice"]);
    assert!(why.contains("has version 9"), "{why}");
    assert!(why.contains("start that one"), "{why}");
    sqlite(
        &database,
        "INSERT INTO _sqlx_migrations SELECT 99, 'x', installed_on, 1, checksum, 0 FROM _sqlx_migrations LIMIT 1",
    );
    for arguments in [&["serve"][..], &["user", "list"]] {
        let why = refused(&blade, arguments);
        assert!(
            why.contains("it was used by a newer nitro, start that one"),
            "{why}"
        );
    }
}
