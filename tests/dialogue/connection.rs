//! One raw TCP client: stream headers, in-band registration, SCRAM-SHA-1, and an inbox of what the server sent.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::prelude::{BASE64_STANDARD, Engine};

use super::xml::{Element, Framer, Item};

/// How long a server may take to answer.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What [`Connection::hear`] got.
#[allow(dead_code)] // only tests that kill the server listen like that
pub enum Heard {
    Item(Item),
    /// Nothing came in time.
    Nothing,
    /// The other side has gone, in order or not.
    Closed,
}

pub struct Connection {
    pub socket: TcpStream,
    framer: Framer,
    /// Items that came while something else was waited for.
    inbox: VecDeque<Item>,
    at_end: bool,
    next_id: u32,
}

impl Connection {
    pub fn connect(server: SocketAddr) -> Result<Connection, String> {
        let socket = TcpStream::connect_timeout(&server, ANSWER_WITHIN)
            .map_err(|why| format!("connect: {why}"))?;
        Connection::over(socket)
    }

    /// A connection that stands already, and on which something may have been said.
    pub fn over(socket: TcpStream) -> Result<Connection, String> {
        socket.set_nodelay(true).map_err(|why| why.to_string())?;
        Ok(Connection {
            socket,
            framer: Framer::default(),
            inbox: VecDeque::new(),
            at_end: false,
            next_id: 0,
        })
    }

    pub fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.socket
            .write_all(bytes)
            .map_err(|why| format!("send: {why}"))
    }

    /// As `send`, for input after which a server may hang up at any time.
    pub fn send_rudely(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// The stream may start anew: the next thing from the server is a header.
    pub fn restart(&mut self) {
        self.framer.restart();
    }

    /// The next item, or nothing when the server has closed the connection.
    pub fn next(&mut self) -> Result<Option<Item>, String> {
        match self.inbox.pop_front() {
            Some(item) => Ok(Some(item)),
            None => self.read(Instant::now() + ANSWER_WITHIN),
        }
    }

    /// The next item if it comes within `wait`. A connection that breaks, even inside an element, is closed: for clients
    /// whose server is killed. `Err`: the server sent what is no XML stream.
    #[allow(dead_code)] // as above
    pub fn hear(&mut self, wait: Duration) -> Result<Heard, String> {
        if let Some(item) = self.inbox.pop_front() {
            return Ok(Heard::Item(item));
        }
        let deadline = Instant::now() + wait;
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some(item) = self.framer.next()? {
                return Ok(Heard::Item(item));
            }
            if self.at_end {
                return Ok(Heard::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let set = match left.is_zero() {
                true => self.socket.set_nonblocking(true),
                false => self.socket.set_read_timeout(Some(left)),
            };
            let read = set.and_then(|()| self.socket.read(&mut chunk));
            if left.is_zero() {
                let _ = self.socket.set_nonblocking(false);
            }
            match read {
                Ok(0) => self.at_end = true,
                Ok(length) => self.framer.feed(&chunk[..length]),
                Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
                Err(why)
                    if matches!(
                        why.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) =>
                {
                    if left.is_zero() || Instant::now() >= deadline {
                        return Ok(Heard::Nothing);
                    }
                }
                Err(_) => self.at_end = true,
            }
        }
    }

    pub fn next_element(&mut self) -> Result<Element, String> {
        match self.next()? {
            Some(Item::Element(element)) => Ok(element),
            Some(Item::Header(header)) => Err(format!("a second stream header came:\n{header}")),
            Some(Item::End) => Err("the server ended the stream".to_owned()),
            None => Err("the server closed the connection".to_owned()),
        }
    }

    /// Waits for the first element that is `wanted`; keeps what else comes for later, in order.
    pub fn find(&mut self, wanted: impl Fn(&Element) -> bool) -> Result<Element, String> {
        let is_wanted = |item: &Item| matches!(item, Item::Element(element) if wanted(element));
        let deadline = Instant::now() + ANSWER_WITHIN;
        if let Some(place) = self.inbox.iter().position(is_wanted)
            && let Some(Item::Element(element)) = self.inbox.remove(place)
        {
            return Ok(element);
        }
        loop {
            match self.read(deadline)? {
                Some(Item::Element(element)) if wanted(&element) => return Ok(element),
                Some(item) => self.inbox.push_back(item),
                None => return Err("the server closed the connection".to_owned()),
            }
        }
    }

    /// What waits in the inbox, with the next item first.
    pub fn put_back(&mut self, item: Item) {
        self.inbox.push_front(item);
    }

    /// Elements that have been received and not been asked for.
    pub fn unread(&self) -> impl Iterator<Item = &Item> {
        self.inbox.iter()
    }

    pub fn forget(&mut self) {
        self.inbox.clear();
    }

    fn read(&mut self, deadline: Instant) -> Result<Option<Item>, String> {
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some(item) = self.framer.next()? {
                return Ok(Some(item));
            }
            if self.at_end {
                return match self.framer.rest().trim() {
                    "" => Ok(None),
                    rest => Err(format!("the connection ended in the middle of: {rest}")),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!(
                    "nothing came within {ANSWER_WITHIN:?} (unparsed: {:?})",
                    self.framer.rest()
                ));
            }
            self.socket
                .set_read_timeout(Some(left))
                .map_err(|why| why.to_string())?;
            match self.socket.read(&mut chunk) {
                Ok(0) => self.at_end = true,
                Ok(length) => self.framer.feed(&chunk[..length]),
                // What has come before a reset has been read; a server that closes with our bytes unread resets.
                Err(why) if why.kind() == std::io::ErrorKind::ConnectionReset => self.at_end = true,
                Err(why)
                    if matches!(
                        why.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
                Err(why) => return Err(format!("receive: {why}")),
            }
        }
    }

    /// Sends a stream header, and takes the server's header and features.
    pub fn open(&mut self, domain: &str) -> Result<Element, String> {
        self.restart();
        let header = format!(
            "<?xml version='1.0'?><stream:stream to='{domain}' version='1.0' xmlns='jabber:client' \
             xmlns:stream='http://etherx.jabber.org/streams'>"
        );
        self.send(header.as_bytes())?;
        match self.next()? {
            Some(Item::Header(_)) => {}
            other => return Err(format!("instead of a stream header came {other:?}")),
        }
        let features = self.next_element()?;
        if features.name != "features" {
            return Err(format!("instead of stream features came\n{features}"));
        }
        Ok(features)
    }

    /// In-band registration (XEP-0077).
    pub fn register(&mut self, name: &str, password: &str) -> Result<(), String> {
        let answer = self.request(&format!(
            "<iq type='set' id='{{id}}'><query xmlns='jabber:iq:register'><username>{name}</username>\
             <password>{password}</password></query></iq>"
        ))?;
        if answer.attribute("type") != Some("result") {
            return Err(format!("registration of {name} failed:\n{answer}"));
        }
        Ok(())
    }

    /// Sends an IQ (`{id}` stands for its id) and waits for its answer.
    pub fn request(&mut self, iq: &str) -> Result<Element, String> {
        let id = self.send_request(iq)?;
        self.answer(&id)
    }

    pub fn send_request(&mut self, iq: &str) -> Result<String, String> {
        self.next_id += 1;
        let id = format!("runner-{}", self.next_id);
        self.send(iq.replace("{id}", &id).as_bytes())?;
        Ok(id)
    }

    pub fn answer(&mut self, id: &str) -> Result<Element, String> {
        self.find(|element| {
            element.name == "iq"
                && element.attribute("id") == Some(id)
                && matches!(element.attribute("type"), Some("result" | "error"))
        })
    }

    /// SCRAM-SHA-1 (RFC 5802); the outcome is `<success/>` (already verified) or `<failure/>`.
    pub fn authenticate(&mut self, name: &str, password: &str) -> Result<Element, String> {
        const SASL: &str = "urn:ietf:params:xml:ns:xmpp-sasl";
        let client_first = format!("n={name},r=dialogue-{}", self.next_id);
        let initial = BASE64_STANDARD.encode(format!("n,,{client_first}"));
        self.send(
            format!("<auth xmlns='{SASL}' mechanism='SCRAM-SHA-1'>{initial}</auth>").as_bytes(),
        )?;
        let challenge = self.next_element()?;
        if challenge.name != "challenge" {
            return Ok(challenge);
        }
        let decode = |text: &str| {
            BASE64_STANDARD
                .decode(text.trim())
                .map_err(|why| format!("base64 '{text}': {why}"))
        };
        let server_first =
            String::from_utf8(decode(&challenge.text)?).map_err(|why| why.to_string())?;
        let field = |name: char| {
            let found = server_first
                .split(',')
                .find_map(|field| field.strip_prefix(&format!("{name}=")));
            found.ok_or_else(|| format!("no {name}= in the challenge '{server_first}'"))
        };
        let rounds: u32 = field('i')?
            .parse()
            .map_err(|why| format!("iteration count: {why}"))?;
        let rounds = NonZeroU32::new(rounds).ok_or("iteration count 0")?;
        let mut salted = [0; digest::SHA1_OUTPUT_LEN];
        pbkdf2::derive(
            pbkdf2::PBKDF2_HMAC_SHA1,
            rounds,
            &decode(field('s')?)?,
            password.as_bytes(),
            &mut salted,
        );
        let sign = |key: &[u8], text: &[u8]| {
            hmac::sign(
                &hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key),
                text,
            )
            .as_ref()
            .to_vec()
        };
        let client_key = sign(&salted, b"Client Key");
        let stored_key = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &client_key);
        let without_proof = format!("c=biws,r={}", field('r')?);
        let auth_message = format!("{client_first},{server_first},{without_proof}");
        let signature = sign(stored_key.as_ref(), auth_message.as_bytes());
        let proof: Vec<u8> = client_key
            .iter()
            .zip(&signature)
            .map(|(key, mask)| key ^ mask)
            .collect();
        let response = BASE64_STANDARD.encode(format!(
            "{without_proof},p={}",
            BASE64_STANDARD.encode(proof)
        ));
        self.send(format!("<response xmlns='{SASL}'>{response}</response>").as_bytes())?;
        let outcome = self.next_element()?;
        if outcome.name == "success" {
            let server_signature = sign(&sign(&salted, b"Server Key"), auth_message.as_bytes());
            let expected = format!("v={}", BASE64_STANDARD.encode(server_signature));
            if decode(&outcome.text)? != expected.as_bytes() {
                return Err("the server's SCRAM signature is wrong".to_owned());
            }
        }
        Ok(outcome)
    }

    /// Resource binding; the answer is the full JID.
    pub fn bind(&mut self, resource: &str) -> Result<String, String> {
        let answer = self.request(&format!(
            "<iq type='set' id='{{id}}'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>{resource}</resource>\
             </bind></iq>"
        ))?;
        let jid = answer.child("bind").and_then(|bind| bind.child("jid"));
        jid.map(|jid| jid.text.clone())
            .ok_or_else(|| format!("binding failed:\n{answer}"))
    }
}
