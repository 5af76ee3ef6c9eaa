//! Uploads (XEP-0363) over real sockets: slots by XMPP, files by HTTP, and those who would misuse them.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use blade::Blade;
use client::{Client, wait_until};

const WITHIN: Duration = Duration::from_secs(20);

fn start(settings: &[(&str, &str)]) -> (Blade, SocketAddr) {
    let own = [
        ("web.listen", "[\"127.0.0.1:0\"]"),
        ("upload.url", "\"http://files.example\""),
    ];
    let blade = client::blade(&[&own[..], settings].concat());
    let web = web(&blade, 1);
    (blade, web)
}

/// Where the blade said at its start of this number that HTTP clients may connect.
fn web(blade: &Blade, start: usize) -> SocketAddr {
    let mut port = None;
    wait_until("the ports are told", WITHIN, || {
        let log = blade.log();
        let mut lines = log
            .lines()
            .filter(|line| line.trim_start().starts_with("web "));
        let address = lines
            .nth(start - 1)
            .and_then(|l| l.split_whitespace().last());
        port = address.and_then(|address| address.parse().ok());
        port.is_some()
    });
    port.unwrap()
}

struct Slot {
    /// Path, question mark and token.
    put: String,
    get: String,
}

fn ask(user: &mut Client, attrs: &str) -> client::xml::Element {
    user.send(&format!(
        "<iq type='get' id='slot' to='upload.localhost'><request xmlns='urn:xmpp:http:upload:0' {attrs}/></iq>"
    ));
    user.find(|e| e.name == "iq" && e.attribute("id") == Some("slot"))
}

fn slot(user: &mut Client, name: &str, size: usize, typ: &str) -> Slot {
    let answer = ask(
        user,
        &format!("filename='{name}' size='{size}' content-type='{typ}'"),
    );
    assert_eq!(answer.attribute("type"), Some("result"), "{answer:?}");
    let slot = &answer.children[0];
    let url = |name: &str| {
        let one = slot.children.iter().find(|e| e.name == name).unwrap();
        let url = one.attribute("url").unwrap();
        url.strip_prefix("http://files.example").unwrap().to_owned()
    };
    Slot {
        put: url("put"),
        get: url("get"),
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

fn connect(web: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(web).unwrap();
    stream.set_read_timeout(Some(WITHIN)).unwrap();
    stream
}

/// All that comes until the server closes.
fn answer(mut stream: TcpStream) -> Answer {
    let mut all = Vec::new();
    // a reset after the answer is an end, too
    let _ = stream.read_to_end(&mut all);
    let end = all
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .map_or(all.len(), |at| at + 4);
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    Answer {
        status,
        head,
        body: all[end..].to_vec(),
    }
}

fn http(web: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
    let mut stream = connect(web);
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: files.example\r\nConnection: close\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    // who is refused may be cut off before all is sent
    let _ = stream.write_all(body);
    answer(stream)
}

fn put(web: SocketAddr, slot: &Slot, typ: &str, body: &[u8]) -> u16 {
    let headers = format!("Content-Type: {typ}\r\nContent-Length: {}\r\n", body.len());
    http(web, "PUT", &slot.put, &headers, body).status
}

fn get(web: SocketAddr, slot: &Slot, headers: &str) -> Answer {
    http(web, "GET", &slot.get, headers, b"")
}

fn files(dir: &Path) -> usize {
    let count = |path: std::path::PathBuf| match path.is_dir() {
        true => files(&path),
        false => 1,
    };
    fs::read_dir(dir)
        .unwrap()
        .map(|f| count(f.unwrap().path()))
        .sum()
}

fn user(blade: &Blade, name: &str) -> Client {
    Client::register(blade, name);
    Client::online(blade, name, "r")
}

#[test]
fn a_file_goes_up_and_comes_down_whole_in_parts_and_after_kill_9() {
    let (mut blade, at) = start(&[]);
    let mut romeo = user(&blade, "romeo");
    let body: Vec<u8> = (0..1_000_000_u32).map(|n| (n * 7 % 251) as u8).collect();
    let one = slot(&mut romeo, "my juliet.jpg", body.len(), "image/jpeg");
    assert!(one.get.ends_with("/my%20juliet.jpg"));
    assert_eq!(get(at, &one, "").status, 404);
    assert_eq!(put(at, &one, "image/jpeg", &body), 201);
    let whole = get(at, &one, "");
    assert_eq!(
        (whole.status, whole.body == body),
        (200, true),
        "{}",
        whole.head
    );
    for wanted in [
        "image/jpeg",
        "inline",
        "nosniff",
        "sandbox; default-src 'none'",
        "immutable",
    ] {
        assert!(whole.head.contains(wanted), "{}", whole.head);
    }
    let etag = whole
        .head
        .lines()
        .find_map(|l| l.strip_prefix("ETag: "))
        .unwrap()
        .to_owned();
    let part = get(
        at,
        &one,
        &format!("Range: bytes=999990-\r\nIf-Range: {etag}\r\n"),
    );
    assert_eq!((part.status, &part.body[..]), (206, &body[999_990..]));
    assert!(
        part.head
            .contains("Content-Range: bytes 999990-999999/1000000")
    );
    assert_eq!(get(at, &one, "Range: bytes=1000000-\r\n").status, 416);
    assert_eq!(
        get(at, &one, &format!("If-None-Match: {etag}\r\n")).status,
        304
    );
    let head = http(at, "HEAD", &one.get, "", b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert!(head.head.contains("Content-Length: 1000000"));
    // a page of another origin: preflight, and the answer
    let preflight = http(
        at,
        "OPTIONS",
        &one.put,
        "Origin: https://web.example\r\nAccess-Control-Request-Method: PUT\r\n",
        b"",
    );
    assert!(preflight.status == 204 && preflight.head.contains("Access-Control-Allow-Origin: *"));
    assert!(preflight.head.contains("PUT"), "{}", preflight.head);
    let page = get(at, &one, "Origin: https://web.example\r\n");
    assert!(
        page.head.contains("Access-Control-Allow-Origin: *"),
        "{}",
        page.head
    );
    // answered: so it is there after this
    blade.kill();
    blade.restart();
    let at = web(&blade, 2);
    assert!(get(at, &one, "").body == body);
    assert_eq!(files(&blade.data_dir().join("uploads")), 1);
}

#[test]
fn a_slot_is_for_one_body_of_its_length_type_token_and_time() {
    let (blade, at) = start(&[("upload.slot_seconds", "10")]);
    let mut romeo = user(&blade, "romeo");
    let uploads = blade.data_dir().join("uploads");
    let old = slot(&mut romeo, "old.png", 5, "image/png");
    let one = slot(&mut romeo, "a.png", 5, "image/png");
    let two = slot(&mut romeo, "b.png", 5, "image/png");
    let swapped = Slot {
        put: format!("{}?{}", one.get, two.put.split_once('?').unwrap().1),
        get: String::new(),
    };
    let none = Slot {
        put: one.get.clone(),
        get: String::new(),
    };
    let renamed = Slot {
        put: one.put.replace("/a.png", "/a.html"),
        get: String::new(),
    };
    let longer = Slot {
        put: one.put.replacen("-5-", "-6-", 1),
        get: String::new(),
    };
    for wrong in [&swapped, &none, &renamed] {
        assert_eq!(put(at, wrong, "image/png", b"01234"), 403, "{}", wrong.put);
    }
    assert_eq!(put(at, &longer, "image/png", b"012345"), 403);
    assert_eq!(put(at, &one, "image/png", b"0123456"), 413);
    assert_eq!(put(at, &one, "image/png", b"0123"), 413);
    assert_eq!(put(at, &one, "text/html", b"01234"), 415);
    let chunked = http(
        at,
        "PUT",
        &one.put,
        "Transfer-Encoding: chunked\r\n",
        b"5\r\n01234\r\n0\r\n\r\n",
    );
    assert_eq!(chunked.status, 411);
    assert_eq!(http(at, "PUT", &one.put, "", b"").status, 411);
    assert_eq!(files(&uploads), 0);
    assert_eq!(put(at, &one, "image/png", b"01234"), 201);
    assert_eq!(put(at, &one, "image/png", b"56789"), 409);
    assert_eq!(get(at, &one, "").body, b"01234");
    assert_eq!(http(at, "DELETE", &one.get, "", b"").status, 405);
    assert_eq!(
        http(at, "POST", &one.put, "Content-Length: 5\r\n", b"01234").status,
        405
    );
    // expired: the entry says when it was given, and that cannot be changed
    wait_until("the slot has expired", Duration::from_secs(60), || {
        put(at, &old, "image/png", b"0123") == 410
    });
    assert_eq!(files(&uploads), 1);
}

#[test]
fn no_path_leads_out_of_the_folder_and_nothing_lists_it() {
    let (blade, at) = start(&[]);
    let mut romeo = user(&blade, "romeo");
    for name in [
        "../../../secret",
        "..\\..\\secret",
        "a&#10;b",
        "\u{202e}gnp.exe",
        &"x".repeat(5000),
    ] {
        let one = slot(&mut romeo, name, 3, "image/png");
        assert_eq!(put(at, &one, "image/png", b"abc"), 201, "{name:.20}");
        let answer = get(at, &one, "");
        assert_eq!((answer.status, &answer.body[..]), (200, &b"abc"[..]));
        let last = one.get.rsplit('/').next().unwrap();
        assert!(!last.contains("..") && last.len() < 700, "{last}");
    }
    let uploads = blade.data_dir().join("uploads");
    assert_eq!(files(&uploads), 5);
    let one = slot(&mut romeo, "a.png", 3, "image/png");
    let folder = one.get.rsplit_once('/').unwrap().0;
    let owner = folder.rsplit_once('/').unwrap().0;
    for path in [
        "/upload/",
        "/upload",
        owner,
        &format!("{owner}/"),
        folder,
        &format!("{folder}/"),
        "/upload/../secret",
        "/upload/..%2f..%2fsecret",
        "/upload/%2e%2e/secret",
        "/upload/new/",
        "/upload//etc/passwd",
        &format!("{owner}/../../secret/x"),
        &format!("{owner}/%00/x"),
        &format!("{}%00.html", folder),
        "/upload/\u{2025}/x",
    ] {
        let status = http(at, "GET", path, "", b"").status;
        assert!(matches!(status, 400 | 404), "{path}: {status}");
        let status = http(at, "PUT", path, "Content-Length: 3\r\n", b"abc").status;
        assert!(matches!(status, 400 | 403 | 404 | 405), "{path}: {status}");
    }
    assert_eq!(files(&uploads), 5);
}

#[test]
fn what_is_uploaded_never_runs_in_a_page() {
    let (blade, at) = start(&[]);
    let mut romeo = user(&blade, "romeo");
    let script = b"<script>alert(1)</script>";
    for (name, typ) in [
        ("a.html", "text/html"),
        ("a.svg", "image/svg+xml"),
        ("a.xhtml", "application/xhtml+xml"),
        ("a.js", "text/javascript"),
        ("a.html", "image/png"),
    ] {
        let one = slot(&mut romeo, name, script.len(), typ);
        assert_eq!(put(at, &one, typ, script), 201);
        let head = get(at, &one, "Accept: text/html\r\n").head;
        let shown = typ == "image/png";
        assert_eq!(
            head.contains("Content-Type: image/png\r\n"),
            shown,
            "{head}"
        );
        assert_eq!(
            head.contains("Content-Type: application/octet-stream\r\n"),
            !shown
        );
        assert_eq!(head.contains("Content-Disposition: attachment"), !shown);
        assert!(head.contains("X-Content-Type-Options: nosniff\r\n"));
        assert!(head.contains("Content-Security-Policy: sandbox; default-src 'none'\r\n"));
    }
}

#[test]
fn a_body_that_is_slow_or_breaks_off_leaves_nothing() {
    let (mut blade, at) = start(&[
        ("limits.http_seconds_max", "1"),
        ("limits.http_bytes_per_second_min", "1_000_000"),
    ]);
    let mut romeo = user(&blade, "romeo");
    let uploads = blade.data_dir().join("uploads");
    let begin = |slot: &Slot, bytes: usize| {
        let mut stream = connect(at);
        let head = format!(
            "PUT {} HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n",
            slot.put
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&vec![7; bytes]).unwrap();
        stream
    };
    let one = slot(&mut romeo, "a.png", 400_000, "image/png");
    let slow = begin(&one, 300_000);
    wait_until("it is being written", WITHIN, || files(&uploads) == 1);
    assert_eq!(get(at, &one, "").status, 404);
    // the same slot twice at once
    assert_eq!(put(at, &one, "image/png", &[7; 400_000]), 409);
    let cut = answer(slow);
    assert!(matches!(cut.status, 0 | 408), "{}", cut.head);
    wait_until("nothing is left", WITHIN, || files(&uploads) == 0);
    let broken = begin(&one, 200_000);
    wait_until("it is being written", WITHIN, || files(&uploads) == 1);
    drop(broken);
    wait_until("nothing is left", WITHIN, || files(&uploads) == 0);
    let killed = begin(&one, 200_000);
    wait_until("it is being written", WITHIN, || files(&uploads) == 1);
    blade.kill();
    drop(killed);
    assert_eq!(files(&uploads), 1);
    blade.restart();
    assert_eq!(files(&uploads), 0);
    // the slot is still good
    let at = web(&blade, 2);
    assert_eq!(put(at, &one, "image/png", &[7; 400_000]), 201);
}

#[test]
fn who_does_not_read_holds_up_nobody_else() {
    let (blade, at) = start(&[
        ("limits.exempt", "[]"),
        ("upload.transfers_per_address_max", "2"),
    ]);
    let mut romeo = user(&blade, "romeo");
    let body = vec![7; 20_000_000];
    let one = slot(&mut romeo, "a.mp4", body.len(), "video/mp4");
    assert_eq!(put(at, &one, "video/mp4", &body), 201);
    let begin = || {
        let mut stream = connect(at);
        let head = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", one.get);
        stream.write_all(head.as_bytes()).unwrap();
        // it is being sent
        stream.read_exact(&mut [0; 100]).unwrap();
        stream
    };
    let slow = [begin(), begin()];
    assert_eq!(get(at, &one, "").status, 503);
    drop(slow);
    wait_until("their places are free", WITHIN, || {
        get(at, &one, "").status == 200
    });
}

/// A figure as the server told it last, a quarter of a second ago at most.
fn told(blade: &Blade, name: &str) -> u64 {
    let (_, metrics) = blade.http_get("/metrics").unwrap();
    let lines = metrics.lines().filter(|line| line.starts_with(name));
    let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.sum::<f64>() as u64
}

fn transfers(blade: &Blade) -> u64 {
    told(blade, "nitro_upload_transfers")
}

/// Polls for a second.
fn soon(mut holds: impl FnMut() -> bool) -> bool {
    let began = std::time::Instant::now();
    while !holds() {
        if began.elapsed() > Duration::from_secs(1) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20)); // the poll's interval
    }
    true
}

#[test]
fn a_slow_link_gets_the_end_of_a_file_although_the_connection_closes_behind_it() {
    let (blade, at) = start(&[]);
    let mut romeo = user(&blade, "romeo");
    let mut file = |bytes: usize| {
        let body: Vec<u8> = (0..bytes).map(|n| (n * 7 % 251) as u8).collect();
        let one = slot(&mut romeo, "a.mp4", bytes, "video/mp4");
        assert_eq!(put(at, &one, "video/mp4", &body), 201);
        (one, body)
    };
    let get_unread = |one: &Slot| {
        let mut stream = connect(at);
        let head = format!(
            "GET {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            one.get
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    // how much is given to a connection that nobody reads: the kernel's, and more than 128 KiB that wait behind it
    let large = get_unread(&file(20_000_000).0);
    let given = || told(&blade, "nitro_upload_sent_bytes");
    wait_until("the link is full", WITHIN, || {
        let before = given();
        before > 0 && !soon(|| given() > before)
    });
    let given = given() as usize;
    drop(large);
    wait_until("it was given up", WITHIN, || transfers(&blade) == 0);
    // of this some waits too, and it is all
    let (one, body) = file(given - (16 << 10));
    let mut stream = get_unread(&one);
    let mut got = vec![0; 1];
    stream.read_exact(&mut got).unwrap();
    while !soon(|| transfers(&blade) == 0) {
        let mut piece = vec![0; 16 << 10];
        let n = stream.read(&mut piece).unwrap();
        got.extend_from_slice(&piece[..n]);
    }
    // the link is down for longer than a farewell lasts (FAREWELL_MS)
    std::thread::sleep(Duration::from_secs(4));
    stream.read_to_end(&mut got).unwrap();
    assert!(
        got.ends_with(&body),
        "{} bytes of {}",
        got.len(),
        body.len()
    );
}

#[test]
fn a_reader_that_is_too_slow_is_cut() {
    let (blade, at) = start(&[
        ("limits.http_seconds_max", "3"),
        ("limits.http_bytes_per_second_min", "100_000_000"),
    ]);
    let mut romeo = user(&blade, "romeo");
    let body = vec![7; 20_000_000];
    let one = slot(&mut romeo, "a.mp4", body.len(), "video/mp4");
    assert_eq!(put(at, &one, "video/mp4", &body), 201);
    let mut stream = connect(at);
    let head = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", one.get);
    stream.write_all(head.as_bytes()).unwrap();
    wait_until("it is being sent", WITHIN, || transfers(&blade) == 1);
    wait_until("it was cut", WITHIN, || transfers(&blade) == 0);
    let mut got = Vec::new();
    let _ = stream.read_to_end(&mut got);
    assert!(got.len() < body.len(), "{}", got.len());
}

#[test]
fn who_sends_a_large_body_that_is_refused_hears_why() {
    let (mut blade, at) = start(&[("limits.http_linger_seconds_max", "60")]);
    let mut romeo = user(&blade, "romeo");
    let one = slot(&mut romeo, "a.png", 5, "image/png");
    let (path, _) = one.put.split_once('?').unwrap();
    let body = vec![7; 20_000_000];
    // does not look before it has sent everything
    let refused = |at, path: &str, fields: &str| {
        let mut stream = connect(at);
        let head = format!("PUT {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
        stream.write_all(head.as_bytes())?;
        for piece in body.chunks(64 << 10) {
            stream.write_all(piece)?;
        }
        std::io::Result::Ok(answer(stream))
    };
    let length = format!("Content-Length: {}\r\n", body.len());
    for (path, fields, status) in [
        (path, &*length, 403),
        (&one.put, &*length, 413),
        ("/upload/nothing", &*length, 404),
        (&one.put, "Transfer-Encoding: chunked\r\n", 411),
    ] {
        let answer = refused(at, path, fields).unwrap();
        assert_eq!(answer.status, status, "{path} {fields}");
        assert!(
            answer.head.contains("Connection: close\r\n"),
            "{}",
            answer.head
        );
    }
    // within bounds
    blade.terminate();
    blade.set("limits.http_linger_bytes_max", "1_000_000");
    blade.restart();
    assert!(refused(web(&blade, 2), path, &length).is_err());
}

#[test]
fn a_removed_accounts_files_go_with_it_and_a_backup_has_all_files() {
    let (mut blade, at) = start(&[]);
    let uploads = blade.data_dir().join("uploads");
    let put_one = |name: &str| {
        let mut client = user(&blade, name);
        let one = slot(&mut client, "a.png", 5, "image/png");
        assert_eq!(put(at, &one, "image/png", b"01234"), 201);
        one
    };
    let (romeo, juliet) = (put_one("romeo"), put_one("juliet"));
    let path = |slot: &Slot| {
        let parts: Vec<&str> = slot.get.split('/').collect();
        uploads.join(&parts[2][..2]).join(parts[2]).join(parts[3])
    };
    let (of_romeo, of_juliet) = (path(&romeo), path(&juliet));
    let command = |blade: &Blade, arguments: &[&str]| {
        let output = blade.nitro(arguments, "");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let backup = blade.folder().join("backup");
    let to = backup.to_str().unwrap();
    let told = command(&blade, &["backup", to]);
    assert!(told.contains("2 uploaded files, 10 B"), "{told}");
    let without = blade.folder().join("without");
    let without = without.to_str().unwrap();
    command(&blade, &["backup", without, "--without-uploads"]);
    assert!(!Path::new(without).join("uploads").exists());

    command(&blade, &["user", "remove", "romeo@localhost"]);
    wait_until("nobody gets it", WITHIN, || {
        get(at, &romeo, "").status == 404
    });
    wait_until("it is removed", WITHIN, || !of_romeo.exists());
    // as if the stop had come before that was written down
    blade.kill();
    fs::create_dir_all(of_romeo.parent().unwrap()).unwrap();
    fs::write(&of_romeo, b"01234").unwrap();
    fs::remove_dir_all(uploads.join("gone")).unwrap();
    blade.restart();
    let at = web(&blade, 2);
    assert_eq!(get(at, &romeo, "").status, 404);
    wait_until("it is removed again", WITHIN, || !of_romeo.exists());
    assert_eq!(get(at, &juliet, "").status, 200);
    // while uploads are off
    let nurse = {
        let mut client = user(&blade, "nurse");
        let one = slot(&mut client, "a.png", 5, "image/png");
        assert_eq!(put(at, &one, "image/png", b"01234"), 201);
        one
    };
    let of_nurse = path(&nurse);
    blade.terminate();
    blade.set("upload.enabled", "false");
    blade.restart();
    assert_eq!(get(web(&blade, 3), &nurse, "").status, 404);
    assert!(of_nurse.exists());
    command(&blade, &["user", "remove", "nurse@localhost"]);
    wait_until("the nurse's is removed", WITHIN, || !of_nurse.exists());
    // while no server runs
    blade.terminate();
    blade.set("upload.enabled", "true");
    command(&blade, &["user", "remove", "juliet@localhost"]);
    blade.restart();
    assert_eq!(get(web(&blade, 4), &juliet, "").status, 404);
    wait_until("hers is removed", WITHIN, || !of_juliet.exists());

    blade.terminate();
    fs::rename(blade.data_dir(), blade.folder().join("old")).unwrap();
    command(&blade, &["restore", to]);
    blade.restart();
    let at = web(&blade, 5);
    for one in [&romeo, &juliet] {
        assert_eq!(get(at, one, "").body, b"01234");
    }
    // damaged
    blade.terminate();
    fs::remove_dir_all(blade.data_dir()).unwrap();
    let copy = backup
        .join("uploads")
        .join(of_romeo.strip_prefix(&uploads).unwrap());
    fs::remove_file(copy).unwrap();
    let refused = blade.nitro(&["restore", to], "");
    assert!(!refused.status.success());
    let why = String::from_utf8(refused.stderr).unwrap();
    assert!(
        why.contains("holds 1 files, and 2 were put into it"),
        "{why}"
    );
}

#[test]
fn quotas_count_on_every_core_and_after_a_restart() {
    let (mut blade, at) = start(&[
        ("upload.user_bytes_per_day_max", "1000"),
        ("upload.file_bytes_max", "900"),
    ]);
    let mut romeo = user(&blade, "romeo");
    let refused = ask(&mut romeo, "filename='a.png' size='901'");
    let refused = format!("{refused:?}");
    assert!(
        refused.contains("file-too-large") && refused.contains("max-file-size"),
        "{refused}"
    );
    let one = slot(&mut romeo, "a.png", 600, "image/png");
    let two = slot(&mut romeo, "b.png", 400, "image/png");
    let refused = format!("{:?}", ask(&mut romeo, "filename='c.png' size='1'"));
    assert!(refused.contains("resource-constraint"), "{refused}");
    assert_eq!(put(at, &one, "image/png", &[1; 600]), 201);
    blade.terminate();
    blade.restart();
    let at = web(&blade, 2);
    let mut romeo = Client::online(&blade, "romeo", "r");
    let refused = format!("{:?}", ask(&mut romeo, "filename='c.png' size='401'"));
    assert!(
        refused.contains("resource-constraint") && refused.contains("retry"),
        "{refused}"
    );
    // a slot of before is good as long as there is room
    assert_eq!(put(at, &two, "image/png", &[1; 400]), 201);
    let refused = format!("{:?}", ask(&mut romeo, "filename='c.png' size='1'"));
    assert!(refused.contains("resource-constraint"), "{refused}");
    // somebody else has his own
    let mut juliet = user(&blade, "juliet");
    slot(&mut juliet, "a.png", 900, "image/png");
}
