//! The doors for web pages, over their public ports: HTTP, WebSocket, host-meta. Clients that nobody here has written are in
//! tests/bots; here are the ones that mean harm.

mod blade;
mod client;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use blade::Blade;
use client::Client;

const WITHIN: Duration = Duration::from_secs(20);
const HANDSHAKE: &str = "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
                         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: xmpp\r\n";
const OPEN: &str =
    "<open xmlns='urn:ietf:params:xml:ns:xmpp-framing' to='localhost' version='1.0'/>";

fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(WITHIN)).unwrap();
    socket
}

/// What comes until the server closes, or resets because it does not want to read all.
fn all(mut socket: TcpStream) -> String {
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// The answer to bytes after which the server closes.
fn exchange(blade: &Blade, request: &str) -> String {
    let mut socket = connect(blade.web);
    socket.write_all(request.as_bytes()).unwrap();
    all(socket)
}

fn status(answer: &str) -> u16 {
    answer
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or_else(|| panic!("no status: {answer:?}"))
}

/// A WebSocket, with no more than these tests need.
struct WebSocket {
    socket: TcpStream,
    input: Vec<u8>,
}

enum Frame {
    Text(String),
    Close(u16),
    /// The connection ended.
    End,
}

impl WebSocket {
    fn open(address: SocketAddr, fields: &str) -> Result<WebSocket, u16> {
        let mut socket = connect(address);
        socket
            .write_all(format!("{HANDSHAKE}{PROXIED}{fields}\r\n").as_bytes())
            .unwrap();
        let mut input = Vec::new();
        let end = loop {
            if let Some(at) = input.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            let mut piece = [0; 4096];
            let taken = socket.read(&mut piece).unwrap();
            assert!(taken > 0, "{}", String::from_utf8_lossy(&input));
            input.extend_from_slice(&piece[..taken]);
        };
        let head = String::from_utf8(input.drain(..end).collect()).unwrap();
        match status(&head) {
            101 => {
                assert!(head.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
                assert!(head.contains("Sec-WebSocket-Protocol: xmpp\r\n"));
                assert!(!head.contains("Extensions"));
                Ok(WebSocket { socket, input })
            }
            other => Err(other),
        }
    }

    fn raw(&mut self, first: u8, payload: &[u8]) {
        let mut frame = vec![first];
        match payload.len() {
            0..126 => frame.push(0x80 | payload.len() as u8),
            _ => {
                frame.push(0x80 | 126);
                frame.extend((payload.len() as u16).to_be_bytes());
            }
        }
        let key = [9, 8, 7, 6];
        frame.extend(key);
        frame.extend(payload.iter().zip(key.iter().cycle()).map(|(b, k)| b ^ k));
        self.socket.write_all(&frame).unwrap();
    }

    fn send(&mut self, text: &str) {
        self.raw(0x81, text.as_bytes());
    }

    fn frame(&mut self) -> Frame {
        loop {
            if let [first, second, rest @ ..] = &self.input[..] {
                let (at, len) = match second {
                    126 if rest.len() >= 2 => {
                        (4, usize::from(u16::from_be_bytes([rest[0], rest[1]])))
                    }
                    126 => (0, usize::MAX),
                    127 => panic!("nothing here is so long"),
                    short => (2, usize::from(*short)),
                };
                if len < usize::MAX && self.input.len() >= at + len {
                    let first = *first;
                    let payload = self.input[at..at + len].to_vec();
                    self.input.drain(..at + len);
                    return match first {
                        0x81 => Frame::Text(String::from_utf8(payload).unwrap()),
                        0x88 => Frame::Close(u16::from_be_bytes([payload[0], payload[1]])),
                        other => panic!("a frame of kind {other:x}"),
                    };
                }
            }
            let mut piece = [0; 4096];
            match self.socket.read(&mut piece) {
                Ok(0) | Err(_) => return Frame::End,
                Ok(taken) => self.input.extend_from_slice(&piece[..taken]),
            }
        }
    }

    fn text(&mut self) -> String {
        match self.frame() {
            Frame::Text(text) => text,
            Frame::Close(code) => panic!("closed with {code}"),
            Frame::End => panic!("the connection ended"),
        }
    }

    /// The next message that has `part`.
    fn find(&mut self, part: &str) -> String {
        loop {
            let text = self.text();
            if text.contains(part) {
                return text;
            }
        }
    }

    /// Opens a stream; its features.
    fn stream(&mut self) -> String {
        self.send(OPEN);
        let open = self.text();
        assert!(
            open.starts_with("<open xmlns='urn:ietf:params:xml:ns:xmpp-framing' id='"),
            "{open}"
        );
        let features = self.text();
        assert!(
            features
                .starts_with("<stream:features xmlns:stream='http://etherx.jabber.org/streams'>"),
            "{features}"
        );
        features
    }

    /// Authenticated, with the features of the new stream read.
    fn authenticated(address: SocketAddr, name: &str) -> WebSocket {
        let mut socket = WebSocket::open(address, "").unwrap();
        socket.stream();
        use base64::Engine;
        let plain = format!("\0{name}\0{}", client::PASSWORD);
        let plain = base64::prelude::BASE64_STANDARD.encode(plain);
        let mechanism = "xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'";
        socket.send(&format!("<auth {mechanism}>{plain}</auth>"));
        socket.find("<success");
        socket.stream();
        socket
    }

    fn online(address: SocketAddr, name: &str) -> WebSocket {
        let mut socket = WebSocket::authenticated(address, name);
        socket.send(
            "<iq xmlns='jabber:client' type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>",
        );
        let bound = socket.find("<bind");
        assert!(bound.starts_with("<iq xmlns='jabber:client'"), "{bound}");
        socket.send("<presence xmlns='jabber:client'/>");
        socket.find("<presence");
        socket
    }

    /// The status with which the server closes, and the stream error before it, if any.
    fn closes(&mut self) -> (u16, String) {
        let mut error = String::new();
        loop {
            match self.frame() {
                Frame::Text(text) if text.starts_with("<stream:error") => error = text,
                Frame::Text(_) => {}
                Frame::Close(code) => return (code, error),
                Frame::End => panic!("no Close frame"),
            }
        }
    }
}

/// PLAIN without TLS stands for what a proxy that has taken TLS off says.
fn blade(settings: &[(&str, &str)]) -> Blade {
    let proxied = [("web.proxies", "['127.0.0.0/8']")];
    client::blade(&[&proxied[..], settings].concat())
}

const PROXIED: &str = "X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\n";

#[test]
fn a_chat_goes_between_tcp_and_websocket_and_a_session_is_resumed_from_socket_to_socket() {
    let blade = blade(&[]);
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut bob = Client::online(&blade, "bob", "tcp");
    let mut alice = WebSocket::online(blade.web, "alice");
    alice.send("<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
    let enabled = alice.find("<enabled");
    let id = enabled.split(" id='").nth(1).unwrap();
    let id = id.split('\'').next().unwrap().to_owned();
    // in two fragments, the second one with half a character before it
    let body = "from a page \u{1F600}";
    let message = format!(
        "<message xmlns='jabber:client' to='bob@localhost' type='chat'><body>{body}</body></message>"
    );
    let (begin, end) = message
        .as_bytes()
        .split_at(message.find('\u{1F600}').unwrap() + 2);
    alice.raw(0x01, begin);
    alice.raw(0x80, end);
    assert_eq!(bob.next_body(), body);
    bob.send("<message to='alice@localhost' type='chat'><body>back</body></message>");
    let back = alice.find("<body>back</body>");
    assert!(back.starts_with("<message xmlns='jabber:client'"), "{back}");
    // without a word
    drop(alice);
    let mut alice = WebSocket::authenticated(blade.web, "alice");
    alice.send(&format!(
        "<resume xmlns='urn:xmpp:sm:3' previd='{id}' h='1'/>"
    ));
    alice.find("<resumed");
    bob.send("<message to='alice@localhost' type='chat'><body>again</body></message>");
    alice.find("<body>again</body>");
    alice.send("<close xmlns='urn:ietf:params:xml:ns:xmpp-framing'/>");
    assert_eq!(
        alice.find("<close"),
        "<close xmlns='urn:ietf:params:xml:ns:xmpp-framing'/>"
    );
    assert_eq!(alice.closes(), (1000, String::new()));
}

#[test]
fn a_page_of_another_host_opens_no_websocket() {
    let blade = blade(&[("web.origins", "['https://desk.example.com']")]);
    let open =
        |origin: &str| WebSocket::open(blade.web, &format!("Origin: {origin}\r\n")).map(|_| ());
    assert_eq!(open("https://evil.example"), Err(403));
    assert_eq!(open("null"), Err(403));
    assert_eq!(open("https://desk.example.com"), Ok(()));
    assert_eq!(open("https://localhost"), Ok(()));
}

#[test]
fn a_handshake_that_is_none_is_answered_in_http() {
    let blade = blade(&[]);
    let with = |from: &str, to: &str| {
        assert!(HANDSHAKE.contains(from));
        let request = HANDSHAKE.replace(from, to);
        status(&exchange(
            &blade,
            &format!("{request}Connection: close\r\n\r\n"),
        ))
    };
    assert_eq!(with("Upgrade: websocket", "X: y"), 426);
    assert_eq!(with("Version: 13", "Version: 8"), 426);
    assert_eq!(with("Protocol: xmpp", "Protocol: chat"), 400);
    assert_eq!(with("dGhlIHNhbXBsZSBub25jZQ==", "dGhl"), 400);
    assert_eq!(with("GET /ws", "POST /ws"), 405);
    assert_eq!(with("GET /ws", "GET /wss"), 404);
}

#[test]
fn frames_that_break_the_protocol_end_the_connection_with_their_status_before_and_after_the_login()
{
    let blade = blade(&[("limits.websocket_fragments_max", "8")]);
    Client::register(&blade, "mallory");
    type Open = fn(SocketAddr) -> WebSocket;
    let opens: [Open; 2] = [
        |address| WebSocket::open(address, "").unwrap(),
        |address| WebSocket::online(address, "mallory"),
    ];
    for open in opens {
        let status = |bytes: &[u8]| {
            let mut socket = open(blade.web);
            socket.socket.write_all(bytes).unwrap();
            socket.closes().0
        };
        assert_eq!(status(b"\x81\x04<a/>"), 1002, "not masked");
        assert_eq!(status(b"\xC1\x84\0\0\0\0<a/>"), 1002, "compressed");
        assert_eq!(status(b"\x82\x84\0\0\0\0<a/>"), 1003, "binary");
        assert_eq!(status(b"\x81\xFF\0\0\0\x7F\0\0\0\0abcd"), 1009, "huge");
        let flood = [&b"\x01\x80\0\0\0\0"[..], &b"\x00\x80\0\0\0\0".repeat(20)].concat();
        assert_eq!(status(&flood), 1008, "fragments");
    }
}

#[test]
fn a_message_holds_one_element_that_begins_at_once() {
    let blade = blade(&[]);
    Client::register(&blade, "mallory");
    let ends = |text: &str| {
        let mut socket = WebSocket::online(blade.web, "mallory");
        socket.send(text);
        socket.closes().1
    };
    let presence = "<presence xmlns='jabber:client'/>";
    for (text, condition) in [
        (format!("{presence}{presence}"), "bad-format"),
        (" ".to_owned(), "bad-format"),
        (format!("\n{presence}"), "bad-format"),
        (
            "<message xmlns='jabber:client'>\u{1E}</message>".to_owned(),
            "not-well-formed",
        ),
        ("<a></b>".to_owned(), "not-well-formed"),
    ] {
        let error = ends(&text);
        assert!(
            error.contains(&format!("<{condition} ")),
            "{text:?}: {error}"
        );
    }
    let mut socket = WebSocket::online(blade.web, "mallory");
    socket.send("<message xmlns='jabber:client'>");
    socket.send("</message>");
    assert!(socket.closes().1.contains("<not-well-formed "));
}

#[test]
fn requests_are_answered_in_order_and_what_is_smuggled_is_not() {
    let blade = blade(&[]);
    let json = "GET /.well-known/host-meta.json HTTP/1.1\r\nHost: x\r\n";
    let two = exchange(
        &blade,
        &format!("{json}\r\nHEAD /x HTTP/1.1\r\nHost: x\r\n\r\n{json}Connection: close\r\n\r\n"),
    );
    let codes: Vec<u16> = two
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|a| a[..3].parse().unwrap())
        .collect();
    assert_eq!(codes, [200, 404, 200]);
    assert!(two.contains("\"href\":\"wss://localhost:"));
    let hidden = "GET /.well-known/host-meta.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let post = |fields: &str, body: &str| {
        let answer = exchange(
            &blade,
            &format!("POST /ws HTTP/1.1\r\nHost: x\r\n{fields}\r\n{body}"),
        );
        assert!(answer.matches("HTTP/1.1 ").count() == 1, "{answer}");
        status(&answer)
    };
    let length = hidden.len();
    assert_eq!(
        post(
            "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
            &format!("0\r\n\r\n{hidden}")
        ),
        400
    );
    assert_eq!(
        post(
            &format!("Content-Length: {length}\r\nContent-Length: 0\r\n"),
            hidden
        ),
        400
    );
    assert_eq!(
        post(
            "Transfer-Encoding: chunked\r\n",
            &format!("0\r\n\r\n{hidden}")
        ),
        411
    );
    assert_eq!(post("X: y\n", hidden), 400);
    assert_eq!(post("X: y\r\n z\r\n", hidden), 400);
    // a body that nobody wants is no request
    assert_eq!(
        post(
            &format!("Content-Length: {length}\r\nConnection: close\r\n"),
            hidden
        ),
        405
    );
}

#[test]
fn slow_and_endless_requests_are_cut() {
    let blade = blade(&[
        ("limits.http_seconds_max", "1"),
        ("limits.http_headers_max", "10"),
        ("web.connections_max", "2"),
    ]);
    let began = Instant::now();
    let answer = exchange(
        &blade,
        "GET /.well-known/host-meta HTTP/1.1\r\nHost: x\r\nX: ",
    );
    assert_eq!(status(&answer), 408);
    assert!(began.elapsed() < WITHIN);
    let many: String = (0..20).map(|n| format!("X-{n}: y\r\n")).collect();
    let answer = exchange(&blade, &format!("GET / HTTP/1.1\r\nHost: x\r\n{many}\r\n"));
    assert_eq!(status(&answer), 431);
    let long = "y".repeat(100_000);
    let answer = exchange(&blade, &format!("GET /{long}"));
    assert!(answer.is_empty() || status(&answer) == 431, "{answer}");
    // a body that stops: the answer has come, the connection goes
    let answer = exchange(
        &blade,
        "POST /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\nabc",
    );
    assert_eq!(status(&answer), 405);
}

#[test]
fn host_meta_is_for_pages_of_every_origin() {
    let blade = blade(&[("web.websocket_url", "\"wss://chat.example.com/ws\"")]);
    let get = |method: &str, path: &str| {
        exchange(
            &blade,
            &format!(
                "{method} {path} HTTP/1.1\r\nHost: x\r\nOrigin: https://evil.example\r\nConnection: close\r\n\r\n"
            ),
        )
    };
    for path in ["/.well-known/host-meta", "/.well-known/host-meta.json"] {
        let answer = get("GET", path);
        assert!(
            answer.contains("Access-Control-Allow-Origin: *\r\n"),
            "{answer}"
        );
        assert!(
            answer.contains("urn:xmpp:alt-connections:websocket"),
            "{answer}"
        );
        assert!(answer.contains("wss://chat.example.com/ws"), "{answer}");
        let preflight = get("OPTIONS", path);
        assert_eq!(status(&preflight), 204);
        assert!(preflight.contains("Access-Control-Allow-Methods: GET, HEAD, OPTIONS\r\n"));
    }
}
