//! Whole runs of the program against a small server in this process that does just enough: SASL PLAIN, binding, an empty
//! roster, presence to oneself, messages between full JIDs, stream management with resumption. What is tested is the
//! generator: exit status, the JSON document, the files it writes.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

#[derive(Default)]
struct Shared {
    /// Where to write to a full JID.
    online: Mutex<HashMap<String, (TcpStream, Wire)>>,
    /// Sessions that may be resumed, by their name, and their full JIDs.
    sessions: Mutex<HashMap<String, String>>,
    /// Lose every tenth message.
    lossy: bool,
}

/// Serves until the test's process ends; its port.
fn server(lossy: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let shared = Arc::new(Shared {
        lossy,
        ..Shared::default()
    });
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, shared) = (stream.unwrap(), shared.clone());
            thread::spawn(move || serve(stream, &shared));
        }
    });
    port
}

const HEADER: &str = "<?xml version='1.0'?><stream:stream xmlns='jabber:client' \
                      xmlns:stream='http://etherx.jabber.org/streams' id='1' version='1.0'>";

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Wire {
    #[default]
    Tcp,
    /// RFC 7395: a frame for each element.
    WebSocket,
}

impl Wire {
    fn write(self, mut stream: &TcpStream, text: &str) -> std::io::Result<()> {
        if self == Wire::Tcp {
            return stream.write_all(text.as_bytes());
        }
        let (mut rest, mut frames) = (text, Vec::new());
        while let Some(length) = element(rest) {
            let said = &rest[..length];
            rest = &rest[length..];
            let said = match said.split([' ', '>']).next() {
                Some("<?xml") => continue,
                Some("<stream:stream") => "<open xmlns='urn:ietf:params:xml:ns:xmpp-framing'/>",
                Some("</stream:stream") => "<close xmlns='urn:ietf:params:xml:ns:xmpp-framing'/>",
                _ => said,
            };
            frames.extend_from_slice(&[0x81, 126]);
            frames.extend_from_slice(&u16::try_from(said.len()).unwrap().to_be_bytes());
            frames.extend_from_slice(said.as_bytes());
        }
        stream.write_all(&frames)
    }
}

/// Answers the upgrade, then hands over what the client says as a stream would have it.
fn serve_websocket(mut stream: TcpStream, shared: &Shared) {
    let mut client = Client {
        wire: Wire::WebSocket,
        ..Client::default()
    };
    let (mut request, mut byte) = (Vec::new(), [0]);
    while !request.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        request.push(byte[0]);
    }
    let request = String::from_utf8(request).unwrap();
    assert!(request.starts_with("GET /xmpp HTTP/1.1\r\nHost: localhost\r\n"));
    assert!(request.contains("Sec-WebSocket-Protocol: xmpp\r\n"));
    let key = request.split("Sec-WebSocket-Key: ").nth(1).unwrap();
    let key = key.split("\r\n").next().unwrap();
    let proof = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let sha1 = &aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY;
    let proof = aws_lc_rs::digest::digest(sha1, proof.as_bytes());
    let proof = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, proof);
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {proof}\r\n\r\n"
    );
    stream.write_all(answer.as_bytes()).unwrap();
    let mut head = [0; 2];
    while stream.read_exact(&mut head).is_ok() {
        assert_eq!((head[0], head[1] & 0x80), (0x81, 0x80), "one masked text");
        let mut length = u16::from(head[1] & 0x7f);
        if length == 126 {
            let mut extended = [0; 2];
            stream.read_exact(&mut extended).unwrap();
            length = u16::from_be_bytes(extended);
        }
        let (mut key, mut payload) = ([0; 4], vec![0; length.into()]);
        stream.read_exact(&mut key).unwrap();
        stream.read_exact(&mut payload).unwrap();
        for (byte, key) in payload.iter_mut().zip(key.iter().cycle()) {
            *byte ^= key;
        }
        let said = String::from_utf8(payload).unwrap();
        assert_eq!(element(&said), Some(said.len()), "one element: {said}");
        assert!(said.contains(" xmlns='"), "no namespace: {said}");
        let said = match said.split(' ').next().unwrap() {
            "<open" => "<stream:stream>".to_owned(),
            "<close" => "</stream:stream>".to_owned(),
            _ => said.replacen(" xmlns='jabber:client'", "", 1),
        };
        let answer = client.answer(&said, &stream, shared);
        if client.wire.write(&stream, &answer).is_err() || said == "</stream:stream>" {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

fn serve(mut stream: TcpStream, shared: &Shared) {
    stream.set_nodelay(true).unwrap();
    let mut first = [0; 4];
    if stream.peek(&mut first).is_ok() && first == *b"GET " {
        return serve_websocket(stream, shared);
    }
    let mut client = Client::default();
    let (mut buffer, mut unread) = ([0; 16384], String::new());
    while let Ok(count) = stream.read(&mut buffer)
        && count > 0
    {
        unread.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
        while let Some(length) = element(&unread) {
            let rest = unread.split_off(length);
            let said = std::mem::replace(&mut unread, rest);
            let answer = client.answer(&said, &stream, shared);
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
            if said == "</stream:stream>" {
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}

/// The length of the first whole element, tag of a stream or declaration.
fn element(unread: &str) -> Option<usize> {
    let tag = unread.find('>')? + 1;
    let name = unread[1..].split([' ', '>', '/']).next()?;
    let alone = unread.starts_with("<?xml") || name == "stream:stream" || unread.starts_with("</");
    if alone || unread[..tag].ends_with("/>") {
        return Some(tag);
    }
    let end = format!("</{name}>");
    Some(unread.find(&end)? + end.len())
}

fn attribute<'a>(element: &'a str, name: &str) -> &'a str {
    let start = element.find(&format!(" {name}='")).unwrap() + name.len() + 3;
    element[start..].split('\'').next().unwrap()
}

#[derive(Default)]
struct Client {
    wire: Wire,
    user: Option<String>,
    jid: String,
    messages: u64,
}

impl Client {
    fn answer(&mut self, said: &str, stream: &TcpStream, shared: &Shared) -> String {
        let wire = self.wire;
        let bound = |jid: &str| {
            let stream = stream.try_clone().unwrap();
            shared
                .online
                .lock()
                .unwrap()
                .insert(jid.into(), (stream, wire));
        };
        if said.starts_with("<stream:stream") {
            return match self.user {
                None => format!(
                    "{HEADER}<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>\
                     <mechanism>PLAIN</mechanism></mechanisms></stream:features>"
                ),
                Some(_) => format!(
                    "{HEADER}<stream:features><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>\
                     <sm xmlns='urn:xmpp:sm:3'/></stream:features>"
                ),
            };
        }
        if said.starts_with("<auth") {
            let text = said.split(['>', '<']).nth(2).unwrap();
            let text = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, text).unwrap();
            let text = String::from_utf8(text).unwrap();
            self.user = text.split('\0').nth(1).map(str::to_owned);
            return "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>".into();
        }
        if said.starts_with("<iq type='set' id='bind'>") {
            self.jid = format!("{}@localhost/loadtest", self.user.as_ref().unwrap());
            bound(&self.jid);
            return format!(
                "<iq type='result' id='bind'><bind><jid>{}</jid></bind></iq>",
                self.jid
            );
        }
        if said.starts_with("<enable") {
            let mut sessions = shared.sessions.lock().unwrap();
            let id = format!("s{}", sessions.len());
            sessions.insert(id.clone(), self.jid.clone());
            return format!("<enabled xmlns='urn:xmpp:sm:3' id='{id}' resume='true'/>");
        }
        if said.starts_with("<resume") {
            let id = attribute(said, "previd");
            return match shared.sessions.lock().unwrap().get(id) {
                Some(jid) => {
                    self.jid = jid.clone();
                    bound(jid);
                    format!("<resumed xmlns='urn:xmpp:sm:3' previd='{id}' h='2'/>")
                }
                None => "<failed xmlns='urn:xmpp:sm:3'><item-not-found/></failed>".into(),
            };
        }
        if said.starts_with("<iq type='get' id='roster'>") {
            return "<iq type='result' id='roster'><query xmlns='jabber:iq:roster'/></iq>".into();
        }
        if said == "<presence/>" {
            return format!("<presence from='{}'/>", self.jid);
        }
        if said.starts_with("<message") {
            self.messages += 1;
            if shared.lossy && self.messages.is_multiple_of(10) {
                return String::new();
            }
            let out = said.replacen("<message", &format!("<message from='{}'", self.jid), 1);
            if let Some((to, wire)) = shared.online.lock().unwrap().get(attribute(said, "to")) {
                let _ = wire.write(to, &out);
            }
        }
        if said == "</stream:stream>" {
            return said.into();
        }
        String::new()
    }
}

struct Run {
    status: i32,
    json: Value,
    error: String,
}

fn loadtest(port: u16, arguments: &str) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_loadtest"))
        .args(arguments.split_whitespace())
        .args(["--port", &port.to_string()])
        .args(["--mechanism", "plain", "--json", "-"])
        .output()
        .unwrap();
    Run {
        status: output.status.code().unwrap(),
        json: serde_json::from_slice(&output.stdout).unwrap_or_default(),
        error: String::from_utf8(output.stderr).unwrap(),
    }
}

const STORM: &str =
    "storm -n 8 --parallel 2 --for 0.5 --quiet 0.3 --warm false --live-users 4 --live-rate 100";

#[test]
fn a_storm_beside_live_users_is_measured_and_written_down() {
    let folder = std::env::temp_dir().join(format!("loadtest-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = |name: &str| -> PathBuf { folder.join(name) };
    let files = format!(
        "--html {} --hdr {} --interval 0.1",
        file("page.html").display(),
        file("log.hlog").display()
    );
    let run = loadtest(
        server(false),
        &format!("{STORM} {files} --fail-if failed>0"),
    );
    let json = &run.json;
    assert_eq!(
        (run.status, &json["ok"]),
        (0, &Value::Bool(true)),
        "{json} {}",
        run.error
    );
    assert!(json["logins"].as_u64().unwrap() > 0 && json["failed"] == 0);
    assert!(
        json["live_quiet_messages"].as_u64().unwrap() >= 20,
        "{json}"
    );
    assert!(
        json["live_storm_messages"].as_u64().unwrap() >= 30,
        "{json}"
    );
    assert_eq!(json["live_lost"], 0);
    assert!(json["live_storm_ms"]["p99"].as_f64().unwrap() > 0.0);
    assert!(json["live_storm_ratio"]["p99"].as_f64().unwrap() > 0.0);
    assert!(json["lag_storm_ms"]["max"].as_f64().unwrap() > 0.0);
    assert_eq!(json["limits"][0]["held"], true);
    let page = std::fs::read_to_string(file("page.html")).unwrap();
    assert!(page.contains(">storm</text>") && page.contains("messages: latency over time"));
    let log = std::fs::read_to_string(file("log.hlog")).unwrap();
    for tag in ["Tag=login,", "Tag=message,", "Tag=lag,"] {
        assert!(log.contains(tag), "{tag}: {log}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_exit_status_tells_losses_broken_limits_and_runs_that_could_not_be_made() {
    let chat = "chat -n 4 --rate 200 --duration 0.3 --warmup 0 --drain 0.3";
    let good = server(false);
    assert_eq!(loadtest(good, chat).status, 0);
    let broken = loadtest(good, &format!("{chat} --fail-if chat.p99>0us"));
    assert_eq!(
        (broken.status, &broken.json["limits"][0]["held"]),
        (1, &Value::Bool(false))
    );
    let unknown = loadtest(good, &format!("{chat} --fail-if caht.p99>1ms"));
    assert_eq!(unknown.status, 2);
    assert!(
        unknown.error.contains("no figure caht.p99"),
        "{}",
        unknown.error
    );
    assert_eq!(
        loadtest(good, &format!("{chat} --fail-if chat.p99")).status,
        2
    );
    let lost = loadtest(server(true), chat);
    assert_eq!(lost.status, 1, "{}", lost.json);
    assert!(lost.json["lost"].as_u64().unwrap() > 0);
}

#[test]
fn everyone_who_is_cut_comes_back_into_his_session() {
    let run = loadtest(
        server(false),
        "reconnect -n 6 --parallel 3 --online 0 --gap 0.1 --rounds 2",
    );
    let json = &run.json;
    assert_eq!(run.status, 0, "{json} {}", run.error);
    assert_eq!(
        (&json["resumed"], &json["begun_anew"]),
        (&12.into(), &0.into())
    );
    assert!(json["recovery_seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_curve_is_replayed_to_its_end() {
    let curve = std::env::temp_dir().join(format!("loadtest-curve-{}", std::process::id()));
    std::fs::write(&curve, "seconds,logins_per_s\n0,20\n1,60\n").unwrap();
    let arguments = format!("replay -n 10 --warm false --curve {}", curve.display());
    let run = loadtest(server(false), &arguments);
    assert_eq!(run.status, 0, "{} {}", run.json, run.error);
    assert_eq!(run.json["logins"], 40);
    std::fs::remove_file(curve).unwrap();
}

#[test]
fn over_websocket_users_log_in_chat_come_back_and_log_out() {
    let port = server(false);
    let chat =
        "chat -n 4 --rate 200 --duration 0.3 --warmup 0 --drain 0.3 --body 300 --websocket=/xmpp";
    let run = loadtest(port, chat);
    assert_eq!(run.status, 0, "{} {}", run.json, run.error);
    assert!(run.json["sent"].as_u64().unwrap() > 20 && run.json["lost"] == 0);
    let storm = loadtest(port, "storm -n 8 --parallel 2 --rounds 2 --websocket=/xmpp");
    assert_eq!(storm.status, 0, "{} {}", storm.json, storm.error);
    assert_eq!(storm.json["failed"], 0);
    let back = "reconnect -n 6 --parallel 3 --online 0 --gap 0.1 --websocket=/xmpp";
    let run = loadtest(port, back);
    assert_eq!((run.status, &run.json["resumed"]), (0, &6.into()));
    let lost = loadtest(server(true), chat);
    assert_eq!(lost.status, 1, "{}", lost.json);
    let starttls = loadtest(port, &format!("{chat} --tls starttls"));
    assert_eq!(starttls.status, 2);
    assert!(
        starttls.error.contains("--tls direct"),
        "{}",
        starttls.error
    );
}
