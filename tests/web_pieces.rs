//! The doors for web pages, byte by byte: whatever pieces a conversation comes in, the answers are the same.

mod blade;
mod client;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use blade::Blade;
use regex::Regex;

const WITHIN: Duration = Duration::from_secs(20);
/// Longer than the server needs to take what has come, mostly: pieces that arrive together are one piece more or less.
const PAUSE: Duration = Duration::from_micros(300);
const AT_ONCE: usize = 8;

/// Sends the bytes in these pieces; all that comes until the server closes, without what is another one each time.
fn say(address: SocketAddr, bytes: &[u8], cuts: &[usize]) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    socket.set_read_timeout(Some(WITHIN)).unwrap();
    let mut from = 0;
    for to in cuts.iter().copied().chain([bytes.len()]) {
        socket.write_all(&bytes[from..to]).unwrap();
        from = to;
        if to < bytes.len() {
            std::thread::sleep(PAUSE);
        }
    }
    let mut said = Vec::new();
    socket.read_to_end(&mut said).unwrap();
    let said = String::from_utf8_lossy(&said);
    let other = Regex::new(r"( (?:auth|s)?id='|alice@localhost/|Date: )[^'<\r]{2,}").unwrap();
    other.replace_all(&said, "$1").into_owned()
}

/// Every cut in two, and some in many pieces.
fn however_it_is_cut(blade: &Blade, conversation: &[u8], every: usize) -> String {
    let whole = say(blade.web, conversation, &[]);
    let next = AtomicUsize::new(1);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let cut = next.fetch_add(every, Relaxed);
                    if cut >= conversation.len() {
                        return;
                    }
                    let said = say(blade.web, conversation, &[cut]);
                    assert_eq!(said, whole, "cut at {cut}");
                    let mut random = fastrand::Rng::with_seed(cut as u64);
                    let mut cuts: Vec<usize> = (0..random.usize(2..12))
                        .map(|_| random.usize(1..conversation.len()))
                        .collect();
                    cuts.sort_unstable();
                    let said = say(blade.web, conversation, &cuts);
                    assert_eq!(said, whole, "cut at {cuts:?}");
                }
            });
        }
    });
    whole
}

fn blade() -> Blade {
    client::blade(&[("web.proxies", "['127.0.0.0/8']")])
}

#[test]
fn requests_are_answered_the_same_in_whatever_pieces_they_come() {
    let blade = blade();
    // a session that ends as it begins: none is left behind
    let body = "<body rid='1' to='elsewhere' xmlns='http://jabber.org/protocol/httpbind'/>";
    let requests = format!(
        "GET /.well-known/host-meta HTTP/1.1\r\nHost: x\r\nOrigin: https://page.example\r\n\r\n\
         \r\nHEAD /nothing HTTP/1.1\r\nHost: x\r\n\r\n\
         POST /bosh HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}\
         POST /bosh HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nno body\
         GET /.well-known/host-meta.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let said = however_it_is_cut(&blade, requests.as_bytes(), 1);
    let codes: Vec<&str> = said.split("HTTP/1.1 ").skip(1).map(|a| &a[..3]).collect();
    assert_eq!(codes, ["200", "404", "200", "200", "200"], "{said}");
    assert!(said.contains("<host-unknown "), "{said}");
    assert!(said.contains("condition='bad-request'"), "{said}");
}

/// A client's frame.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        0..126 => frame.push(0x80 | payload.len() as u8),
        _ => {
            frame.push(0x80 | 126);
            frame.extend((payload.len() as u16).to_be_bytes());
        }
    }
    let key = [0x37, 0xFA, 0x21, 0x3D];
    frame.extend(key);
    frame.extend(payload.iter().zip(key.iter().cycle()).map(|(b, k)| b ^ k));
    frame
}

#[test]
fn a_websocket_says_the_same_in_whatever_pieces_it_is_spoken_to() {
    let blade = blade();
    blade.add_user("alice", client::PASSWORD);
    let open = "<open xmlns='urn:ietf:params:xml:ns:xmpp-framing' to='localhost' version='1.0'/>";
    let plain = BASE64_STANDARD.encode(format!("\0alice\0{}", client::PASSWORD));
    let auth =
        format!("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{plain}</auth>");
    let bind = "<iq xmlns='jabber:client' type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>";
    let ping = "<iq xmlns='jabber:client' type='get' id='p' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>";
    let note = format!(
        "<iq xmlns='jabber:client' type='get' id='n'><unknown xmlns='urn:example'>{}</unknown></iq>",
        "\u{1F600}".repeat(40)
    );
    let mut said = b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: xmpp\r\n\
        X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\n\r\n"
        .to_vec();
    for text in [open, &auth, open, bind, ping] {
        said.extend(frame(0x81, text.as_bytes()));
    }
    said.extend(frame(0x89, b"?"));
    // in three fragments, cut within characters
    let (begin, rest) = note.as_bytes().split_at(90);
    let (middle, end) = rest.split_at(31);
    said.extend(frame(0x01, begin));
    said.extend(frame(0x00, middle));
    said.extend(frame(0x80, end));
    said.extend(frame(
        0x81,
        b"<close xmlns='urn:ietf:params:xml:ns:xmpp-framing'/>",
    ));
    // a log-in each: every third place
    let heard = however_it_is_cut(&blade, &said, 3);
    for part in [
        "101 Switching",
        "<success ",
        "<jid>alice@",
        "'p'",
        "'n'",
        "<close ",
    ] {
        assert!(heard.contains(part), "no {part}: {heard}");
    }
}
