//! What operators are promised: the first start, accounts and sessions from the command line, refusals in sentences,
//! the end by SIGTERM and the reload by SIGHUP.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blade::{Blade, DOMAIN};
use client::{Client, PASSWORD, authenticated, wait_until};

/// A refusal must come within this.
const REFUSED_WITHIN: Duration = Duration::from_secs(15);

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// The command succeeds; its output.
fn done(blade: &Blade, arguments: &[&str], input: &str) -> String {
    let output = blade.nitro(arguments, input);
    assert!(
        output.status.success(),
        "nitro {arguments:?}: {}",
        text(&output)
    );
    text(&output)
}

/// The command is refused with this status; its sentence.
fn refused(blade: &Blade, arguments: &[&str], status: i32) -> String {
    let output = blade.nitro(arguments, "");
    assert_eq!(
        output.status.code(),
        Some(status),
        "nitro {arguments:?}: {}",
        text(&output)
    );
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `nitro serve` with these settings ends by itself with this status; what it said.
fn start_refused(settings: &[String], status: i32, prepare: impl Fn(&mut Command)) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nitro"));
    command
        .arg("serve")
        .args(settings.iter().flat_map(|s| ["--set", s.as_str()]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    prepare(&mut command);
    let mut child = command.spawn().expect("nitro starts");
    let deadline = Instant::now() + REFUSED_WITHIN;
    while child.try_wait().expect("its state").is_none() {
        if Instant::now() >= deadline {
            let _ = child.kill();
            let output = child.wait_with_output().expect("its output");
            panic!("nitro was not refused: {}", text(&output));
        }
        std::thread::sleep(Duration::from_millis(5)); // the poll's interval; the bound is the deadline
    }
    let output = child.wait_with_output().expect("its output");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(status), "{said}");
    said
}

/// Settings of a nitro of its own: no ports but those that are added.
fn settings(folder: &Path, more: &[String]) -> Vec<String> {
    let mut all = vec![
        format!("data_dir=\"{}\"", folder.join("data").display()),
        "c2s.listen=[]".to_owned(),
        "c2s.listen_tls=[]".to_owned(),
        "http.listen=[]".to_owned(),
    ];
    all.extend_from_slice(more);
    all
}

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("nitro-test-")
        .tempdir()
        .expect("a temporary folder")
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path)
        .unwrap_or_else(|why| panic!("{}: {why}", path.display()))
        .permissions()
        .mode()
        & 0o777
}

#[test]
fn the_first_start_says_where_it_listens_the_fingerprint_and_how_to_add_an_account() {
    let mut blade = client::blade(&[]);
    // it listens a moment before it says so
    let announced = |log: &str| log.contains("  data  ");
    let within = Duration::from_secs(10);
    client::wait_until("the announcement", within, || announced(&blade.log()));
    let log = blade.log();
    for wanted in [
        blade.c2s.to_string(),
        blade.c2s_tls.to_string(),
        blade.http.to_string(),
        format!("user add alice@{DOMAIN}"),
        blade.data_dir().display().to_string(),
    ] {
        assert!(log.contains(&wanted), "{wanted} is not in:\n{log}");
    }
    assert!(
        log.contains(&served_fingerprint(blade.c2s_tls)),
        "the served certificate's fingerprint is not in:\n{log}"
    );
    assert!(log.lines().count() <= 10, "more than a few lines:\n{log}");
    // an account is there: the next start does not explain how to add one
    blade.add_user("alice", PASSWORD);
    blade.terminate();
    blade.restart();
    client::wait_until("the second announcement", within, || {
        announced(&blade.log()[log.len()..])
    });
    let second = &blade.log()[log.len()..];
    assert!(second.contains(&blade.c2s.to_string()), "{second}");
    assert!(!second.contains("user add"), "{second}");
}

#[test]
fn what_lies_in_the_data_folder_is_for_its_owner_only() {
    let blade = client::blade(&[]);
    let data = blade.data_dir();
    assert_eq!(mode(&data), 0o700);
    for private in ["key.pem", "nitro.sock", "secret", "nitro.lock"] {
        assert_eq!(mode(&data.join(private)), 0o600, "{private}");
    }
}

#[test]
fn accounts_are_managed_on_the_running_and_on_the_stopped_server_alike() {
    let mut blade = client::blade(&[]);
    for running in [true, false] {
        if !running {
            blade.terminate();
        }
        blade.add_user("alice", PASSWORD);
        blade.add_user("bob", PASSWORD);
        let again = refused_with(&blade, &["user", "add", "alice", "--password-stdin"], "x\n");
        assert!(again.contains("alice"), "{again}");
        let list = done(&blade, &["user", "list"], "");
        assert_eq!(list, "alice@localhost\nbob@localhost\n");
        assert_eq!(done(&blade, &["user", "list", "b"], ""), "bob@localhost\n");
        let shown = done(&blade, &["user", "show", "alice@localhost"], "");
        assert!(shown.contains("alice@localhost"), "{shown}");
        done(&blade, &["user", "disable", "alice"], "");
        let list = done(&blade, &["user", "list", "a"], "");
        assert!(list.contains("disabled"), "{list}");
        done(&blade, &["user", "enable", "alice"], "");
        done(
            &blade,
            &["user", "passwd", "bob", "--password-stdin"],
            "new\n",
        );
        done(&blade, &["user", "remove", "alice"], "");
        done(&blade, &["user", "remove", "bob"], "");
        assert_eq!(done(&blade, &["user", "list"], ""), "");
        for command in ["show", "remove", "disable", "enable"] {
            let why = refused(&blade, &["user", command, "carol"], 1);
            assert!(why.contains("carol"), "{command}: {why}");
        }
    }
    let why = refused(&blade, &["session", "list"], 1);
    assert!(why.contains("nitro serve"), "{why}");
}

fn refused_with(blade: &Blade, arguments: &[&str], input: &str) -> String {
    let output = blade.nitro(arguments, input);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    text(&output)
}

#[test]
fn a_change_by_the_operator_holds_at_once_on_the_running_server() {
    let blade = client::blade(&[("limits.auth_failure_delay_ms", "0")]);
    blade.add_user("alice", PASSWORD);
    blade.add_user("bob", PASSWORD);
    let log_in = |password| authenticated(blade.c2s, "alice", password).map(drop);
    // in the cache before each change
    assert_eq!(log_in(PASSWORD), Ok(()));
    done(
        &blade,
        &["user", "passwd", "alice", "--password-stdin"],
        "other\n",
    );
    assert_eq!(log_in(PASSWORD), Err("not-authorized".to_owned()));
    assert_eq!(log_in("other"), Ok(()));

    let mut session = Client::online(&blade, "bob", "desk");
    done(&blade, &["user", "disable", "bob"], "");
    assert_eq!(session.ends().as_deref(), Some("not-authorized"));
    let disabled = authenticated(blade.c2s, "bob", PASSWORD).map(drop);
    assert_eq!(disabled, Err("account-disabled".to_owned()));
    done(&blade, &["user", "enable", "bob"], "");

    let mut session = Client::online(&blade, "bob", "desk");
    done(&blade, &["user", "remove", "bob"], "");
    assert!(
        session.ends().is_some(),
        "the stream ended without an error"
    );
    let removed = authenticated(blade.c2s, "bob", PASSWORD).map(drop);
    assert_eq!(removed, Err("not-authorized".to_owned()));
    blade.add_user("bob", "new");
    assert!(authenticated(blade.c2s, "bob", "new").is_ok());
}

#[test]
fn sessions_are_listed_and_kicked() {
    let blade = client::blade(&[]);
    blade.add_user("alice", PASSWORD);
    blade.add_user("bob", PASSWORD);
    let mut desk = Client::online(&blade, "alice", "desk");
    let mut phone = Client::online(&blade, "alice", "phone");
    let mut bob = Client::bind(&blade, "bob", "pad");
    let list = done(&blade, &["session", "list"], "");
    for jid in [&desk.jid, &phone.jid, &bob.jid] {
        assert!(list.contains(jid.as_str()), "{jid} is not in:\n{list}");
    }
    assert!(
        list.contains("no presence") && list.contains("priority 0"),
        "{list}"
    );
    let list = done(&blade, &["session", "list", "bob"], "");
    assert_eq!(list.lines().count(), 1, "{list}");
    done(&blade, &["session", "kick", "alice@localhost/desk"], "");
    assert_eq!(desk.ends().as_deref(), Some("policy-violation"));
    phone.settle();
    done(&blade, &["session", "kick", "alice"], "");
    assert_eq!(phone.ends().as_deref(), Some("policy-violation"));
    bob.settle();
    let why = refused(&blade, &["session", "kick", "alice"], 1);
    assert!(why.contains("no session"), "{why}");
}

/// Alice, whose account and one message in its archive are 40 days old; no server runs.
fn add_old_account(blade: &Blade) {
    use nitro::store::change::{ArchivedChange, Change, Id, Message};
    use nitro::store::record::{Record, UserRecord};
    use nitro::store::sql::{Ahead, Database, Entry, Position, Sql};
    let database = Database::Sqlite(blade.data_dir().join("nitro.db"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let then_ms = now.unwrap().as_millis() as u64 - 40 * 24 * 3_600_000;
    let (sha1, sha256) = nitro::xmpp::sasl::new_keys(PASSWORD, 4096).unwrap();
    let record = Record::new(&UserRecord {
        sha1: Some(sha1.into()),
        sha256: Some(sha256.into()),
        ..UserRecord::default()
    });
    let account = Change::AddUser {
        name: "alice",
        revision: Id::at(then_ms).0,
        record: record.bytes(),
    };
    let message = Change::Message(Message {
        id: Id::at(then_ms + 1).0,
        owner: "alice",
        what: Message::ARCHIVE | Message::RECEIVED,
        kind: 0,
        flags: 1,
        peer: "bob@localhost/x",
        twin: 0,
        stream: "",
        count: 0,
        stanza:
            b"<message to='alice@localhost' from='bob@localhost/x' type='chat'><body>old</body></message>",
    });
    let payloads = [account, message].map(|change| {
        let mut payload = Vec::new();
        change.encode(&mut payload);
        payload
    });
    let entry = |(seq, payload): (u64, &'static [u8])| Entry {
        at: Position {
            identity: 1,
            journal: 999,
            seq,
        },
        change: ArchivedChange::access(payload).unwrap(),
    };
    // for the test's process: an entry borrows for ever
    let payloads = payloads.map(|payload| &*payload.leak());
    let entries: Vec<_> = (1..).zip(payloads).map(entry).collect();
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    runtime.block_on(async {
        let mut sql = Sql::open(&database, 1 << 20, Default::default())
            .await
            .unwrap();
        let outcome = sql.apply(&entries, &Ahead::default()).await.unwrap();
        assert_eq!(outcome.skipped, 0);
        sql.close().await;
    });
}

#[test]
fn what_was_purged_is_shown_no_more_by_the_running_server() {
    let mut blade = client::blade(&[]);
    blade.terminate();
    add_old_account(&blade);
    blade.restart();
    let mut alice = Client::online(&blade, "alice", "a");
    let shown = |client: &mut Client| {
        let last = "<set xmlns='http://jabber.org/protocol/rsm'><before/></set>";
        let query =
            format!("<iq type='set' id='{{id}}'><query xmlns='urn:xmpp:mam:2'>{last}</query></iq>");
        let answer = client.connection.request(&query).expect("an answer");
        let text = answer.to_string();
        let count = text
            .split("count>")
            .nth(1)
            .and_then(|rest| rest.split('<').next());
        count.and_then(|n| n.parse::<u32>().ok()).expect(&text)
    };
    // the second one comes from memory
    assert_eq!((shown(&mut alice), shown(&mut alice)), (1, 1));
    let purge = |more: &[&str]| done(&blade, &[&["archive", "purge"], more].concat(), "");
    let said = purge(&["--older-than", "30", "--dry-run"]);
    assert!(
        said.starts_with("1 entries would be deleted, 0 stay"),
        "{said}"
    );
    let said = purge(&["--older-than", "50"]);
    assert!(said.starts_with("0 entries deleted"), "{said}");
    let nobody = ["archive", "purge", "--older-than", "30", "--user", "nobody"];
    let why = refused(&blade, &nobody, 1);
    assert!(why.contains("there is no user nobody"), "{why}");
    assert_eq!(shown(&mut alice), 1);
    let said = purge(&["--older-than", "30", "--user", "alice@localhost"]);
    assert!(said.starts_with("1 entries deleted"), "{said}");
    assert_eq!(shown(&mut alice), 0);
}

#[test]
fn an_import_names_the_line_of_every_bad_row_and_takes_all_others() {
    let mut blade = client::blade(&[]);
    for running in [true, false] {
        let tag = if running { "r" } else { "s" };
        let accounts = blade.folder().join(format!("accounts-{tag}.csv"));
        let rosters = blade.folder().join(format!("rosters-{tag}.csv"));
        fs::write(
            &accounts,
            format!(
                "username,password\n{tag}1,{PASSWORD}\n@,x\n{tag}2,{PASSWORD}\n{tag}3,\n{tag}1,again\n"
            ),
        )
        .unwrap();
        fs::write(
            &rosters,
            format!("username,contact,name,groups\n{tag}1,{tag}2,Second,desk;fx\n{tag}1,nobody-{tag},,\n"),
        )
        .unwrap();
        if !running {
            blade.terminate();
        }
        let import = [
            "user",
            "import",
            accounts.to_str().unwrap(),
            "--rosters",
            rosters.to_str().unwrap(),
        ];
        let said = refused_with(&blade, &import, "");
        for line in [3, 5, 6] {
            let place = format!("accounts-{tag}.csv:{line}:");
            assert!(said.contains(&place), "{place} is not in:\n{said}");
        }
        let place = format!("rosters-{tag}.csv:3:");
        assert!(said.contains(&place), "{place} is not in:\n{said}");
        for good in ["accounts", "rosters"] {
            assert!(!said.contains(&format!("{good}-{tag}.csv:2:")), "{said}");
        }
        if !running {
            blade.restart();
        }
        for (own, other, name) in [(1, 2, Some("Second")), (2, 1, None)] {
            let mut client = Client::bind(&blade, &format!("{tag}{own}"), "a");
            let roster = client
                .connection
                .request("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>")
                .expect("the roster");
            let item = roster.child("query").and_then(|query| query.child("item"));
            let item = item.unwrap_or_else(|| panic!("no contact: {roster}"));
            let jid = format!("{tag}{other}@{DOMAIN}");
            assert_eq!(item.attribute("jid"), Some(jid.as_str()), "{roster}");
            assert_eq!(item.attribute("subscription"), Some("both"), "{roster}");
            assert_eq!(item.attribute("name"), name, "{roster}");
        }
    }
}

#[test]
fn a_second_nitro_on_the_same_data_folder_is_refused() {
    let blade = client::blade(&[]);
    let why = start_refused(&settings(blade.folder(), &[]), 1, |_| {});
    let pid = format!("process {}", blade.pid());
    assert!(why.contains(&pid) && why.contains("data_dir"), "{why}");
}

#[test]
fn a_port_in_use_is_named_even_if_another_nitro_has_it() {
    let blade = client::blade(&[]);
    let held = TcpListener::bind("127.0.0.1:0").expect("a port");
    for (key, address) in [
        ("c2s.listen", blade.c2s),
        ("c2s.listen_tls", blade.c2s_tls),
        ("http.listen", blade.http),
        ("c2s.listen", held.local_addr().unwrap()),
    ] {
        let own = folder();
        let why = start_refused(
            &settings(own.path(), &[format!("{key}=[\"{address}\"]")]),
            1,
            |_| {},
        );
        let port = format!("port {}", address.port());
        assert!(why.contains(&port) && why.contains(key), "{why}");
        assert!(!why.contains("panicked"), "{why}");
    }
}

#[test]
fn an_unusable_certificate_or_key_is_a_sentence() {
    let own = folder();
    let there = own.path().join("there.pem");
    fs::write(&there, "not a certificate").unwrap();
    let missing = own.path().join("missing.pem");
    let pair = |certificate: &Path, key: &Path| {
        [
            format!("tls.certificate=\"{}\"", certificate.display()),
            format!("tls.key=\"{}\"", key.display()),
        ]
    };
    for (certificate, key) in [(&missing, &missing), (&there, &missing), (&there, &there)] {
        let all = settings(own.path(), &pair(certificate, key));
        let why = start_refused(&all, 1, |_| {});
        assert!(why.contains(".pem"), "{why}");
        assert!(!why.contains("panicked"), "{why}");
    }
    // a key of another certificate
    let (one, other) = (own.path().join("one"), own.path().join("other"));
    for name in [&one, &other] {
        nitro::net::generate_certificate(
            DOMAIN,
            &name.with_extension("pem"),
            &name.with_extension("key"),
        )
        .unwrap();
    }
    let all = settings(
        own.path(),
        &pair(&one.with_extension("pem"), &other.with_extension("key")),
    );
    let why = start_refused(&all, 1, |_| {});
    assert!(why.contains("key") && !why.contains("panicked"), "{why}");
    let one_only = format!("tls.certificate=\"{}\"", there.display());
    let why = start_refused(&settings(own.path(), &[one_only]), 2, |_| {});
    assert!(why.contains("tls.key"), "{why}");
}

#[test]
fn a_mistake_in_the_configuration_is_one_sentence_with_key_and_line_and_status_2() {
    let own = folder();
    let file = own.path().join("nitro.toml");
    for (text, key, line) in [
        ("domain = \"a.example\"\nspeling = 1\n", "speling", 2),
        (
            "[limits]\n\nstanza_bytes_max = \"big\"\n",
            "limits.stanza_bytes_max",
            3,
        ),
        ("registration = \"perhaps\"\n", "registration", 1),
        ("[ping]\nidle_seconds = 1\n", "ping.idle_seconds", 2),
        ("domain = \n", "TOML", 1),
    ] {
        fs::write(&file, text).unwrap();
        let why = start_refused(&[], 2, |command| {
            command.arg("--config").arg(&file);
        });
        assert_eq!(why.trim_end().lines().count(), 1, "{why}");
        let name = key.rsplit('.').next().unwrap();
        assert!(why.contains(name), "{key}: {why}");
        assert!(
            why.contains(&format!("line {line}")) || why.contains(&format!(":{line}")),
            "{why}"
        );
    }
    let why = start_refused(&["speling=1".to_owned()], 2, |_| {});
    assert!(why.contains("speling"), "{why}");
}

#[test]
fn too_little_locked_memory_is_a_sentence() {
    let own = folder();
    let why = start_refused(&settings(own.path(), &[]), 1, |command| {
        // SAFETY: between fork and exec this makes one system call, which is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                let limit = libc::rlimit {
                    rlim_cur: 65_536,
                    rlim_max: 65_536,
                };
                match libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            })
        };
    });
    assert!(why.contains("64 KiB") && why.contains("ulimit -l"), "{why}");
    assert!(!why.contains("panicked"), "{why}");
}

#[test]
fn sigterm_says_farewell_keeps_what_was_accepted_and_ends_with_status_0() {
    let mut blade = client::blade(&[]);
    for name in ["alice", "bob"] {
        blade.add_user(name, PASSWORD);
    }
    let mut alice = Client::online(&blade, "alice", "a");
    let mut negotiating = client::opened(blade.c2s);
    alice.enable_resumption();
    const COUNT: usize = 200;
    let messages: String = (0..COUNT)
        .map(|n| format!("<message type='chat' to='bob@{DOMAIN}'><body>{n}</body></message>"))
        .collect();
    alice.send(&messages);
    let h = alice.ask_h();
    assert_eq!(h as usize, COUNT);
    let begun = Instant::now();
    blade.signal(libc::SIGTERM);
    assert_eq!(alice.ends().as_deref(), Some("system-shutdown"));
    assert_eq!(
        client::ended(&mut negotiating).as_deref(),
        Some("system-shutdown")
    );
    let status = blade.wait(Duration::from_secs(12));
    assert_eq!(status.code(), Some(0), "{}", blade.log());
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert!(!blade.data_dir().join("nitro.sock").exists());
    blade.restart();
    let mut bob = Client::bind(&blade, "bob", "b");
    bob.send("<presence/>");
    for n in 0..COUNT {
        assert_eq!(bob.next_body(), n.to_string());
    }
}

#[test]
fn a_client_that_hangs_does_not_keep_the_server_from_ending_in_time() {
    let mut blade = client::blade(&[("shutdown.seconds_max", "2")]);
    blade.add_user("alice", PASSWORD);
    let _silent = Client::online(&blade, "alice", "a");
    let _half_open = TcpStream::connect(blade.c2s_tls).unwrap();
    blade.signal(libc::SIGTERM);
    let status = blade.wait(Duration::from_secs(5));
    assert_eq!(status.code(), Some(0), "{}", blade.log());
}

#[test]
fn sighup_reloads_the_certificate_and_says_what_it_cannot() {
    let own = folder();
    let (certificate, key) = (own.path().join("c.pem"), own.path().join("k.pem"));
    nitro::net::generate_certificate(DOMAIN, &certificate, &key).unwrap();
    let file = own.path().join("nitro.toml");
    let write = |more: &str| {
        let text = format!(
            "{more}\n[tls]\ncertificate = \"{}\"\nkey = \"{}\"\n",
            certificate.display(),
            key.display()
        );
        fs::write(&file, text).unwrap();
    };
    write("");
    let data = own.path().join("data");
    let ports = Blade::prepare(&[]); // free ports, and a log
    let log_path = own.path().join("log");
    let log = fs::File::create(&log_path).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_nitro"))
        .arg("serve")
        .arg("--config")
        .arg(&file)
        .args(["--set", &format!("data_dir=\"{}\"", data.display())])
        .args(["--set", &format!("c2s.listen=[\"{}\"]", ports.c2s)])
        .args(["--set", &format!("c2s.listen_tls=[\"{}\"]", ports.c2s_tls)])
        .args(["--set", &format!("http.listen=[\"{}\"]", ports.http)])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut child = Killed(child);
    let pid = child.0.id() as libc::pid_t;
    let said = || fs::read_to_string(&log_path).unwrap_or_default();
    wait_until("the start", blade::READY_WITHIN, || {
        said().contains("SHA-256")
    });
    let before = served_fingerprint(ports.c2s_tls);
    let hang_up = || {
        // SAFETY: the pid is that of a child which has not been waited for, so it names no other process.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGHUP) }, 0);
    };

    fs::remove_file(&certificate).unwrap();
    fs::remove_file(&key).unwrap();
    hang_up();
    wait_until("the refusal", REFUSED_WITHIN, || {
        said().contains("not reloaded")
    });
    assert_eq!(served_fingerprint(ports.c2s_tls), before);

    nitro::net::generate_certificate(DOMAIN, &certificate, &key).unwrap();
    write("registration = \"off\"\ncores = \"0\"\n");
    hang_up();
    wait_until("the reload", REFUSED_WITHIN, || {
        said().contains("INFO nitro::blade: reloaded: ")
    });
    let log = said();
    let line = log
        .lines()
        .find(|line| line.contains("INFO nitro::blade: reloaded: "))
        .unwrap();
    assert!(line.contains("registration"), "{line}");
    let (_, later) = line
        .split_once("until a restart")
        .unwrap_or_else(|| panic!("nothing about what a restart needs: {line}"));
    assert!(
        later.contains("cores") && !later.contains("listen"),
        "{line}"
    );
    wait_until("the new certificate", REFUSED_WITHIN, || {
        let now = served_fingerprint(ports.c2s_tls);
        now != before && line.contains(&now)
    });
    let features = client::opened(ports.c2s).open(DOMAIN);
    drop(features);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    wait_until("the end", blade::STOPPED_WITHIN, || {
        child.0.try_wait().unwrap().is_some()
    });
}

/// Killed when the test ends early.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The SHA-256 fingerprint of the certificate that a new handshake shows.
fn served_fingerprint(address: SocketAddr) -> String {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    struct Anybody(Arc<rustls::crypto::CryptoProvider>);
    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
        }
        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    let name = ServerName::try_from(DOMAIN).unwrap();
    let mut tls = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = TcpStream::connect(address).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    while tls.is_handshaking() {
        tls.complete_io(&mut socket).expect("the handshake");
    }
    let fingerprint = nitro::net::fingerprint(&tls.peer_certificates().unwrap()[0]);
    tls.send_close_notify();
    let _ = tls.complete_io(&mut socket);
    let _ = socket.read(&mut [0; 64]);
    fingerprint
}
