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
struct WebSocket<S = TcpStream> {
    socket: S,
    input: Vec<u8>,
}

enum Frame {
    Text(String),
    Close(u16),
    /// The connection ended.
    End,
}

impl<S: Read + Write> WebSocket<S> {
    fn over(mut socket: S, fields: &str) -> Result<WebSocket<S>, u16> {
        socket
            .write_all(format!("{HANDSHAKE}{fields}\r\n").as_bytes())
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

impl WebSocket {
    fn open(address: SocketAddr, fields: &str) -> Result<WebSocket, u16> {
        WebSocket::over(connect(address), &format!("{PROXIED}{fields}"))
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

/// A session of requests, each on a connection of its own: they are accepted by any core.
struct Bosh {
    address: SocketAddr,
    sid: String,
    rid: u64,
}

const BODY: &str = "xmlns='http://jabber.org/protocol/httpbind' xmlns:xmpp='urn:xmpp:xbosh'";

/// Sends a body; its answer comes by [`answer`].
fn post(address: SocketAddr, body: &str) -> TcpStream {
    let mut socket = connect(address);
    let request = format!(
        "POST /bosh HTTP/1.1\r\nHost: localhost\r\n{PROXIED}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(request.as_bytes()).unwrap();
    socket
}

/// The body of an answer with status 200.
fn answer(socket: TcpStream) -> String {
    let answer = all(socket);
    assert_eq!(status(&answer), 200, "{answer}");
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

fn attribute<'a>(body: &'a str, name: &str) -> &'a str {
    let start = format!(" {name}='");
    body.split_once(&start)
        .and_then(|(_, rest)| rest.split('\'').next())
        .unwrap_or_else(|| panic!("no {name}: {body}"))
}

impl Bosh {
    fn begin(address: SocketAddr, wait: u64, hold: u64) -> Bosh {
        Bosh::begin_with(address, &format!("wait='{wait}' hold='{hold}'"))
    }

    fn begin_with(address: SocketAddr, attributes: &str) -> Bosh {
        let rid = 4_000_000_000;
        let begun = answer(post(
            address,
            &format!(
                "<body rid='{rid}' to='localhost' ver='1.6' {attributes} xmpp:version='1.0' {BODY}/>"
            ),
        ));
        assert!(begun.contains("<stream:features"), "{begun}");
        assert!(
            attribute(&begun, "sid").len() >= 27,
            "128 bits and more: {begun}"
        );
        let sid = attribute(&begun, "sid").to_owned();
        Bosh { address, sid, rid }
    }

    /// The request with this distance to the next id.
    fn request(&self, ahead: u64, attributes: &str, payload: &str) -> TcpStream {
        let (sid, rid) = (&self.sid, self.rid + ahead);
        post(
            self.address,
            &format!("<body sid='{sid}' rid='{rid}' {attributes} {BODY}>{payload}</body>"),
        )
    }

    /// The next request and its answer.
    fn ask(&mut self, attributes: &str, payload: &str) -> String {
        let socket = self.request(1, attributes, payload);
        self.rid += 1;
        answer(socket)
    }

    /// Asks until an answer has `part`.
    fn find(&mut self, mut payload: &str, part: &str) -> String {
        loop {
            let body = self.ask("", payload);
            assert!(!body.contains("terminate"), "{body}");
            if body.contains(part) {
                return body;
            }
            payload = "";
        }
    }

    fn authenticated(address: SocketAddr, name: &str) -> Bosh {
        Bosh::begin(address, 5, 1).logs_in(name)
    }

    fn logs_in(mut self, name: &str) -> Bosh {
        let bosh = &mut self;
        use base64::Engine;
        let plain = format!("\0{name}\0{}", client::PASSWORD);
        let plain = base64::prelude::BASE64_STANDARD.encode(plain);
        let mechanism = "xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'";
        bosh.find(&format!("<auth {mechanism}>{plain}</auth>"), "<success");
        let features = bosh.ask("xmpp:restart='true' to='localhost'", "");
        assert!(features.contains("<bind "), "{features}");
        self
    }

    fn online(address: SocketAddr, name: &str) -> Bosh {
        Bosh::authenticated(address, name).binds("page")
    }

    fn binds(mut self, resource: &str) -> Bosh {
        let bound = self.find(
            &format!(
                "<iq xmlns='jabber:client' type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'>\
                 <resource>{resource}</resource></bind></iq>"
            ),
            "<bind",
        );
        assert!(bound.contains("<iq xmlns='jabber:client'"), "{bound}");
        self.find("<presence xmlns='jabber:client'/>", "<presence");
        self
    }

    /// Asks for something that is answered at once.
    fn ping(&mut self) {
        self.find(
            "<iq xmlns='jabber:client' type='get' id='p' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>",
            "id='p'",
        );
    }
}

fn chat(body: &str) -> String {
    format!(
        "<message xmlns='jabber:client' to='bob@localhost' type='chat'><body>{body}</body></message>"
    )
}

#[test]
fn requests_are_handled_in_the_order_of_their_ids_once_whichever_core_accepts_them() {
    let blade = blade(&[]);
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut bob = Client::online(&blade, "bob", "tcp");
    let mut alice = Bosh::online(blade.web, "alice");
    for n in 0..10 {
        // the second one first: it waits for the first one
        let second = alice.request(2, "", &chat(&format!("{n}b")));
        let first = alice.request(1, "", &chat(&format!("{n}a")));
        assert!(!answer(first).contains("terminate"));
        alice.rid += 1;
        // asked for again, the answer is the same, and what it carried is not sent twice
        let again = alice.request(0, "", &chat(&format!("{n}a")));
        assert!(!answer(again).contains("terminate"));
        alice.rid += 1;
        bob.send(&format!(
            "<message to='alice@localhost' type='chat'><body>to {n}</body></message>"
        ));
        let held = answer(second);
        assert!(
            held.contains(&format!("<body>to {n}</body>")) || held.ends_with("/>"),
            "{held}"
        );
        let held_again = answer(alice.request(0, "", ""));
        assert_eq!(held, held_again);
        if held.ends_with("/>") {
            alice.find("", &format!("<body>to {n}</body>"));
        }
        assert_eq!(bob.next_body(), format!("{n}a"));
        assert_eq!(bob.next_body(), format!("{n}b"));
    }
    let end = alice.ask(
        "type='terminate'",
        "<presence xmlns='jabber:client' type='unavailable'/>",
    );
    assert!(
        end.contains("type='terminate'") && !end.contains("condition"),
        "{end}"
    );
    bob.settle();
    let late = alice.ask("", "");
    assert!(late.contains("condition='item-not-found'"), "{late}");
}

#[test]
fn a_session_of_requests_that_falls_silent_can_be_resumed_over_websocket() {
    let blade = blade(&[("web.bosh_inactivity_seconds_max", "5")]);
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut alice = Bosh::online(blade.web, "alice");
    let enabled = alice.find("<enable xmlns='urn:xmpp:sm:3' resume='true'/>", "<enabled");
    let id = attribute(enabled.split("<enabled").nth(1).unwrap(), "id").to_owned();
    drop(alice);
    let mut bob = Client::online(&blade, "bob", "tcp");
    bob.send("<message to='alice@localhost' type='chat'><body>meanwhile</body></message>");
    bob.settle();
    let mut page = WebSocket::authenticated(blade.web, "alice");
    page.send(&format!(
        "<resume xmlns='urn:xmpp:sm:3' previd='{id}' h='0'/>"
    ));
    page.find("<resumed");
    page.find("<body>meanwhile</body>");
}

/// To a user's sessions.
fn tell(from: &mut Client, to: &str, body: &str) {
    from.send(&format!(
        "<message to='{to}@localhost' type='chat'><body>{body}</body></message>"
    ));
}

#[test]
fn without_stream_management_what_no_request_has_confirmed_comes_again_and_nothing_else_does() {
    let blade = blade(&[("web.bosh_inactivity_seconds_max", "5")]);
    for name in ["alice", "carol", "bob"] {
        Client::register(&blade, name);
    }
    let mut bob = Client::online(&blade, "bob", "tcp");
    // one that says nothing of what it has got, but by its next ids, and falls silent
    let mut alice = Bosh::online(blade.web, "alice");
    tell(&mut bob, "alice", "one");
    alice.find("", "<body>one</body>");
    // as many as may be open, and some more
    for _ in 0..5 {
        alice.ping();
    }
    tell(&mut bob, "alice", "two");
    alice.find("", "<body>two</body>");
    // one that acknowledges answers, which it does with every request that says nothing else
    let mut carol = Bosh::begin_with(blade.web, "wait='5' hold='1' ack='1'")
        .logs_in("carol")
        .binds("page");
    tell(&mut bob, "carol", "three");
    carol.find("", "<body>three</body>");
    let end = carol.ask("type='terminate'", "");
    assert!(end.contains("type='terminate'"), "{end}");
    let mut carol = Client::online(&blade, "carol", "tcp");
    tell(&mut bob, "carol", "four");
    assert_eq!(carol.next_body(), "four");
    drop(carol);
    // what has come while she is told nothing, too
    tell(&mut bob, "alice", "three");
    let mut alice = Client::online(&blade, "alice", "tcp");
    assert_eq!(alice.next_body(), "two");
    assert_eq!(alice.next_body(), "three");
    tell(&mut bob, "alice", "four");
    assert_eq!(alice.next_body(), "four");
}

#[test]
fn an_answer_that_stalls_has_not_arrived_because_a_later_one_has() {
    let blade = blade(&[]);
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut bob = Client::online(&blade, "bob", "tcp");
    let mut alice = Bosh::online(blade.web, "alice");
    let stalled = alice.request(1, "", "");
    alice.rid += 1;
    tell(&mut bob, "alice", "one");
    let stalled = answer(stalled);
    assert!(stalled.contains("<body>one</body>"), "{stalled}");
    // as if that had not come: the next ones are answered, no more than two are ever open
    let rid = alice.rid;
    alice.ping();
    alice.ping();
    let next = std::mem::replace(&mut alice.rid, rid);
    assert_eq!(answer(alice.request(0, "", "")), stalled);
    alice.rid = next;
    let end = alice.ask("type='terminate'", "");
    assert!(end.contains("type='terminate'"), "{end}");
    let mut alice = Client::online(&blade, "alice", "tcp");
    assert_eq!(alice.next_body(), "one");
}

#[test]
fn an_acknowledgement_is_as_good_as_its_number() {
    let blade = blade(&[]);
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut bob = Client::online(&blade, "bob", "tcp");
    let mut alice = Bosh::begin_with(blade.web, "wait='5' hold='1' ack='1'")
        .logs_in("alice")
        .binds("page");
    tell(&mut bob, "alice", "one");
    alice.find("", "<body>one</body>");
    tell(&mut bob, "alice", "two");
    alice.find("", "<body>two</body>");
    // the answer with the second one is still on its way
    let has = alice.rid - 1;
    let end = alice.ask(&format!("type='terminate' ack='{has}'"), "");
    assert!(end.contains("type='terminate'"), "{end}");
    let mut alice = Client::online(&blade, "alice", "tcp");
    assert_eq!(alice.next_body(), "two");
}

#[test]
fn a_paused_session_of_requests_outlives_the_inactivity_of_others() {
    let blade = blade(&[("web.bosh_inactivity_seconds_max", "5")]);
    for name in ["alice", "bob"] {
        Client::register(&blade, name);
    }
    let mut bob = Client::online(&blade, "bob", "tcp");
    let mut paused = Bosh::online(blade.web, "alice");
    let answer = paused.ask("pause='60'", "");
    assert!(!answer.contains("terminate"), "{answer}");
    // begins its silence later, and hears of its end earlier
    let mut silent = Bosh::online(blade.web, "bob");
    let own = format!("{}/page", bob.jid.split('/').next().unwrap());
    bob.find(|e| {
        e.name == "presence"
            && e.attribute("type") == Some("unavailable")
            && e.attribute("from") == Some(&own)
    });
    let gone = silent.ask("", "");
    assert!(gone.contains("condition='item-not-found'"), "{gone}");
    paused.ping();
}

#[test]
fn last_words_reach_a_client_that_asks_when_the_stream_has_long_ended() {
    let blade = blade(&[]);
    Client::register(&blade, "alice");
    let mut alice = Bosh::online(blade.web, "alice");
    // the two ends of the session's pair are among these
    let sockets = || {
        let all = std::fs::read_to_string("/proc/net/unix").unwrap();
        let inodes: Vec<&str> = all
            .lines()
            .filter_map(|line| line.split_whitespace().nth(6))
            .collect();
        let open = std::fs::read_dir(format!("/proc/{}/fd", blade.pid())).unwrap();
        open.filter(|fd| {
            // one may close while it is looked at
            let path = fd.as_ref().unwrap().path();
            let target = std::fs::read_link(path).unwrap_or_default();
            let target = target.to_string_lossy();
            let inode = target
                .strip_prefix("socket:[")
                .and_then(|t| t.strip_suffix(']'));
            inode.is_some_and(|inode| inodes.contains(&inode))
        })
        .count()
    };
    let before = sockets();
    // takes her place, and stays
    let _twin = Client::online(&blade, "alice", "page");
    client::wait_until("the older session's connection is closed", WITHIN, || {
        sockets() < before
    });
    let end = alice.ask("", "<presence xmlns='jabber:client'/>");
    assert!(
        end.contains("type='terminate' condition='remote-stream-error'"),
        "{end}"
    );
    assert!(end.contains("<conflict "), "{end}");
}

#[test]
fn who_comes_back_with_the_id_of_before_a_restart_is_told_at_once_and_who_makes_one_up_is_not() {
    let mut blade = blade(&[
        ("limits.auth_failure_delay_ms", "5000"),
        ("limits.auth_failure_delay_ms_max", "5000"),
    ]);
    let mut alice = Bosh::begin(blade.web, 5, 1);
    blade.kill();
    blade.restart();
    let began = Instant::now();
    let gone = alice.ask("", "");
    assert!(gone.contains("condition='item-not-found'"), "{gone}");
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    alice.sid = alice.sid.replacen(
        &alice.sid[..1],
        if alice.sid.starts_with('A') { "B" } else { "A" },
        1,
    );
    let began = Instant::now();
    let gone = alice.ask("", "");
    assert!(gone.contains("condition='item-not-found'"), "{gone}");
    assert!(
        began.elapsed() >= Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_connection_that_asks_for_a_page_first_and_then_logs_in_counts_as_one_that_logs_in() {
    let blade = client::blade(&[
        ("limits.exempt", "[]"),
        ("limits.unauthenticated_per_address_max", "2"),
    ]);
    let answer = |socket: &mut TcpStream, request: &str, end: &str| {
        let mut answer = String::new();
        let mut piece = [0; 4096];
        let _ = socket.write_all(request.as_bytes());
        while !answer.contains(end) {
            match socket.read(&mut piece) {
                Ok(taken @ 1..) => answer.push_str(&String::from_utf8_lossy(&piece[..taken])),
                _ => break,
            }
        }
        answer
            .split(' ')
            .nth(1)
            .map_or(0, |code| code.parse().unwrap())
    };
    let page = "GET /.well-known/host-meta HTTP/1.1\r\nHost: x\r\n\r\n";
    let handshake = format!("{HANDSHAKE}\r\n");
    // the connections by which it was found that the blade is ready may count for a moment
    client::wait_until("two and no more log in", WITHIN, || {
        // pages are to be had on as many connections as one likes
        let (mut sockets, pages): (Vec<TcpStream>, Vec<u16>) = (0..4)
            .map(|_| {
                let mut socket = connect(blade.web);
                let code = answer(&mut socket, page, "</XRD>");
                (socket, code)
            })
            .unzip();
        let logins = sockets.iter_mut().take(3);
        let logins = logins.map(|s| answer(s, &handshake, "\r\n\r\n"));
        let logins: Vec<u16> = logins.collect();
        pages == [200; 4] && logins == [101, 101, 503]
    });
}

/// Takes any certificate: these tests are not about it.
#[derive(Debug)]
struct Anybody(rustls::crypto::CryptoProvider);

impl rustls::client::danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// SCRAM-SHA-256-PLUS over wss:// with these bytes as the channel's (RFC 9266); the outcome.
fn scram_plus(address: SocketAddr, bound: impl Fn(&mut [u8])) -> String {
    use aws_lc_rs::{digest, hmac, pbkdf2};
    use base64::Engine;
    use base64::prelude::BASE64_STANDARD as B64;
    use rustls::crypto::aws_lc_rs as provider;

    let config = rustls::ClientConfig::builder_with_provider(provider::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(
            Anybody(provider::default_provider()),
        ))
        .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let tls = rustls::ClientConnection::new(config.into(), name).unwrap();
    let tls = rustls::StreamOwned::new(tls, connect(address));
    let mut socket = WebSocket::over(tls, "").unwrap();
    let features = socket.stream();
    assert!(
        features.contains("<mechanism>SCRAM-SHA-256-PLUS<"),
        "{features}"
    );
    assert!(features.contains("type='tls-exporter'"), "{features}");

    let gs2 = "p=tls-exporter,,";
    let first = "n=alice,r=rOprNGfwEbeRWgbNEkqO";
    socket.send(&format!(
        "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='SCRAM-SHA-256-PLUS'>{}</auth>",
        B64.encode(format!("{gs2}{first}"))
    ));
    let challenge = socket.text();
    let challenge = challenge.split(['>', '<']).nth(2).unwrap();
    let challenge = String::from_utf8(B64.decode(challenge).unwrap()).unwrap();
    let part = |name: &str| {
        let found = challenge
            .split(',')
            .find_map(|part| part.strip_prefix(name));
        found.unwrap_or_else(|| panic!("{challenge}")).to_owned()
    };
    let salt = B64.decode(part("s=")).unwrap();
    let mut salted = [0; 32];
    let rounds = part("i=").parse().unwrap();
    pbkdf2::derive(
        pbkdf2::PBKDF2_HMAC_SHA256,
        rounds,
        &salt,
        client::PASSWORD.as_bytes(),
        &mut salted,
    );
    let tag = |key: &[u8], text: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text);
    let key = tag(&salted, b"Client Key");
    let stored = digest::digest(&digest::SHA256, key.as_ref());
    let mut channel = [0; 32];
    socket
        .socket
        .conn
        .export_keying_material(&mut channel, b"EXPORTER-Channel-Binding", Some(b""))
        .unwrap();
    bound(&mut channel);
    let bound = B64.encode([gs2.as_bytes(), &channel].concat());
    let last = format!("c={bound},r={}", part("r="));
    let signed = tag(
        stored.as_ref(),
        format!("{first},{challenge},{last}").as_bytes(),
    );
    let proof = key.as_ref().iter().zip(signed.as_ref()).map(|(k, s)| k ^ s);
    let proof = B64.encode(proof.collect::<Vec<u8>>());
    socket.send(&format!(
        "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>{}</response>",
        B64.encode(format!("{last},p={proof}"))
    ));
    socket.text()
}

#[test]
fn a_login_over_wss_is_bound_to_its_channel_and_to_no_other() {
    let blade = client::blade(&[("limits.auth_failure_delay_ms", "10")]);
    Client::register(&blade, "alice");
    let outcome = scram_plus(blade.web_tls, |_| {});
    assert!(outcome.starts_with("<success"), "{outcome}");
    // somebody between the two has another channel to each
    let outcome = scram_plus(blade.web_tls, |channel| channel[0] ^= 1);
    assert!(outcome.starts_with("<failure"), "{outcome}");
}

#[test]
fn a_body_that_trickles_is_cut() {
    let blade = blade(&[
        ("limits.http_seconds_max", "1"),
        ("limits.http_bytes_per_second_min", "1000000"),
    ]);
    // its time begins when it is accepted
    let began = Instant::now();
    let mut socket = connect(blade.web);
    let head = format!("POST /bosh HTTP/1.1\r\nHost: x\r\n{PROXIED}Content-Length: 10000\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    loop {
        assert!(began.elapsed() < WITHIN, "it goes on");
        if socket.write_all(b"x").is_err() {
            break;
        }
        match socket.read(&mut [0; 1024]) {
            Ok(0) => break,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Ok(_) => panic!("an answer to half a body"),
            Err(_) => break,
        }
    }
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[test]
fn what_breaks_the_protocol_of_requests_ends_the_session_with_its_condition() {
    let blade = blade(&[
        ("limits.auth_failure_delay_ms", "300"),
        ("web.bosh_polling_seconds_min", "60"),
    ]);
    let ends = |body: String, condition: &str| {
        assert!(body.contains("type='terminate'"), "{body}");
        assert!(body.contains(&format!("condition='{condition}'")), "{body}");
    };
    let bosh = Bosh::begin(blade.web, 5, 1);
    ends(answer(bosh.request(4, "", "")), "item-not-found");
    ends(answer(bosh.request(1, "", "")), "item-not-found");
    for body in [
        "<body/>",
        "no xml",
        &format!("<body {BODY}/>"),
        &format!("<body rid='-1' {BODY}/>"),
    ] {
        ends(answer(post(blade.web, body)), "bad-request");
    }
    // ids are not guessed: none is like another, and each wrong one is held back
    let other = Bosh::begin(blade.web, 5, 1);
    assert_ne!(bosh.sid, other.sid);
    let began = Instant::now();
    for sid in ["", "AAAAAAAAAAAAAAAAAAAAAAAAAAA", "no base64"] {
        let guess = format!("<body sid='{sid}' rid='7' {BODY}/>");
        ends(answer(post(blade.web, &guess)), "item-not-found");
    }
    assert!(began.elapsed() >= Duration::from_millis(900));
    // a client that polls without a pause
    let mut polls = Bosh::begin(blade.web, 0, 0);
    assert!(!polls.ask("", "").contains("terminate"));
    ends(polls.ask("", ""), "policy-violation");
    // markup that is none ends the stream, and says so
    let mut wrong = Bosh::begin(blade.web, 5, 1);
    let end = wrong.ask("", "<message xmlns='jabber:client'/>");
    ends(end.clone(), "remote-stream-error");
    assert!(end.contains("<stream:error"), "{end}");
}

#[test]
fn sessions_of_requests_are_bounded_and_a_page_of_another_host_begins_none() {
    let blade = blade(&[
        ("web.bosh_sessions_max", "1"),
        ("cores", "\"0\""),
        ("web.bosh_body_bytes_max", "16384"),
    ]);
    let _bosh = Bosh::begin(blade.web, 5, 1);
    let begin = format!("<body rid='1' to='localhost' {BODY}/>");
    assert_eq!(status(&all(post(blade.web, &begin))), 503);
    assert_eq!(status(&all(post(blade.web, &"x".repeat(20_000)))), 413);
    let with = |method: &str, origin: &str| {
        exchange(
            &blade,
            &format!(
                "{method} /bosh HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            ),
        )
    };
    assert_eq!(status(&with("POST", "https://evil.example")), 403);
    assert_eq!(status(&with("OPTIONS", "https://evil.example")), 403);
    let preflight = with("OPTIONS", "https://localhost");
    assert_eq!(status(&preflight), 204);
    assert!(preflight.contains("Access-Control-Allow-Origin: https://localhost\r\n"));
    assert!(preflight.contains("Access-Control-Allow-Methods: POST, OPTIONS\r\n"));
}
