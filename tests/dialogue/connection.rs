//! One client: stream headers, in-band registration, SCRAM-SHA-1, and an inbox of what the server sent. Raw TCP, TLS on it, or
//! something of the web's that carries a stream ([`Web`]).

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::prelude::{BASE64_STANDARD, Engine};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

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

/// A stream that something else than TCP carries.
pub trait Web: Send {
    /// The stream begins, or begins anew.
    fn open(&mut self, domain: &str) -> Result<(), String>;

    /// Whole elements, as they would stand in a stream on TCP.
    fn send(&mut self, xml: &str) -> Result<(), String>;

    /// One message or request, as it stands.
    fn send_raw(&mut self, bytes: &[u8]) -> Result<(), String>;

    /// The end of the stream.
    fn close(&mut self) -> Result<(), String>;

    /// Waits for something, until `deadline` at most, and adds what came to the inbox.
    fn read(&mut self, deadline: Instant, inbox: &mut VecDeque<Item>) -> Result<Came, String>;
}

/// How a wait ended.
#[derive(Debug, PartialEq)]
pub enum Came {
    /// Bytes have come, perhaps whole items.
    Some,
    /// It was time.
    Nothing,
    /// Nothing more will come.
    End,
}

enum Wire {
    Tcp {
        socket: TcpStream,
        tls: Option<Box<ClientConnection>>,
        framer: Framer,
    },
    Web(Box<dyn Web>),
}

pub struct Connection {
    wire: Wire,
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
        Ok(Connection::on(Wire::Tcp {
            socket,
            tls: None,
            framer: Framer::default(),
        }))
    }

    /// Direct TLS; the handshake comes with the first bytes.
    #[allow(dead_code)] // only dialogues come like that
    pub fn connect_tls(
        server: SocketAddr,
        config: Arc<ClientConfig>,
        domain: &str,
    ) -> Result<Connection, String> {
        let mut connection = Connection::connect(server)?;
        let name =
            ServerName::try_from(domain.to_owned()).map_err(|why| format!("{domain}: {why}"))?;
        let session = ClientConnection::new(config, name).map_err(|why| format!("TLS: {why}"))?;
        if let Wire::Tcp { tls, .. } = &mut connection.wire {
            *tls = Some(Box::new(session));
        }
        Ok(connection)
    }

    #[allow(dead_code)] // only dialogues come like that
    pub fn over_web(web: Box<dyn Web>) -> Connection {
        Connection::on(Wire::Web(web))
    }

    fn on(wire: Wire) -> Connection {
        Connection {
            wire,
            inbox: VecDeque::new(),
            at_end: false,
            next_id: 0,
        }
    }

    /// The socket of a connection by TCP.
    #[allow(dead_code)] // only some tests look below
    pub fn socket(&self) -> &TcpStream {
        match &self.wire {
            Wire::Tcp { socket, .. } => socket,
            Wire::Web(_) => panic!("this is not TCP"),
        }
    }

    /// The same, for tests that go on without what is above it.
    #[allow(dead_code)]
    pub fn into_socket(self) -> TcpStream {
        match self.wire {
            Wire::Tcp { socket, .. } => socket,
            Wire::Web(_) => panic!("this is not TCP"),
        }
    }

    pub fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        let sent = match &mut self.wire {
            Wire::Tcp { socket, tls, .. } => match tls {
                Some(tls) => rustls::Stream::new(&mut **tls, socket).write_all(bytes),
                None => socket.write_all(bytes),
            },
            Wire::Web(web) => {
                let text = std::str::from_utf8(bytes).map_err(|why| why.to_string())?;
                return web.send(text);
            }
        };
        sent.map_err(|why| format!("send: {why}"))
    }

    /// As `send`, for input after which a server may hang up at any time; on the web one message or request as it stands.
    pub fn send_rudely(&mut self, bytes: &[u8]) {
        let _ = match &mut self.wire {
            Wire::Tcp { .. } => self.send(bytes),
            Wire::Web(web) => web.send_raw(bytes),
        };
    }

    /// Says the end of the stream.
    #[allow(dead_code)] // only dialogues do
    pub fn close(&mut self) -> Result<(), String> {
        match &mut self.wire {
            Wire::Tcp { .. } => self.send(b"</stream:stream>"),
            Wire::Web(web) => web.close(),
        }
    }

    /// The stream may start anew: the next thing from the server is a header.
    pub fn restart(&mut self) {
        if let Wire::Tcp { framer, .. } = &mut self.wire {
            framer.restart();
        }
    }

    /// The next item, or nothing when the server has closed the connection.
    pub fn next(&mut self) -> Result<Option<Item>, String> {
        if self.inbox.is_empty() {
            self.fill(Instant::now() + ANSWER_WITHIN)?;
        }
        Ok(self.inbox.pop_front())
    }

    /// The next item if it comes within `wait`. A connection that breaks, even inside an element, is closed: for clients
    /// whose server is killed. `Err`: the server sent what is no XML stream.
    #[allow(dead_code)] // as above
    pub fn hear(&mut self, wait: Duration) -> Result<Heard, String> {
        let deadline = Instant::now() + wait;
        loop {
            if let Some(item) = self.inbox.pop_front() {
                return Ok(Heard::Item(item));
            }
            match self.wait(deadline)? {
                Came::Some => {}
                Came::Nothing => return Ok(Heard::Nothing),
                Came::End => return Ok(Heard::Closed),
            }
        }
    }

    /// One read, or what an earlier one has brought; whole items go to the inbox, behind what is there.
    fn wait(&mut self, deadline: Instant) -> Result<Came, String> {
        let (socket, tls, framer) = match &mut self.wire {
            Wire::Tcp {
                socket,
                tls,
                framer,
            } => (socket, tls, framer),
            Wire::Web(web) => return web.read(deadline, &mut self.inbox),
        };
        if let Some(item) = framer.next()? {
            self.inbox.push_back(item);
            return Ok(Came::Some);
        }
        if self.at_end {
            return Ok(Came::End);
        }
        let mut chunk = [0; 16 * 1024];
        let left = deadline.saturating_duration_since(Instant::now());
        let set = match left.is_zero() {
            true => socket.set_nonblocking(true),
            false => socket.set_read_timeout(Some(left)),
        };
        let read = set.and_then(|()| match tls {
            Some(tls) => rustls::Stream::new(&mut **tls, socket).read(&mut chunk),
            None => socket.read(&mut chunk),
        });
        if left.is_zero() {
            let _ = socket.set_nonblocking(false);
        }
        match read {
            Ok(0) => self.at_end = true,
            Ok(length) => framer.feed(&chunk[..length]),
            Err(why) if why.kind() == ErrorKind::Interrupted => {}
            Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if Instant::now() >= deadline {
                    return Ok(Came::Nothing);
                }
            }
            // What has come before a reset has been read; a server that closes with our bytes unread resets.
            Err(_) => self.at_end = true,
        }
        Ok(Came::Some)
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
        let mut seen = 0;
        loop {
            let place = self.inbox.iter().skip(seen).position(is_wanted);
            if let Some(place) = place.map(|place| seen + place)
                && let Some(Item::Element(element)) = self.inbox.remove(place)
            {
                return Ok(element);
            }
            seen = self.inbox.len();
            if !self.fill(deadline)? {
                return Err("the server closed the connection".to_owned());
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

    /// Waits until there is more in the inbox. `false`: nothing more will come.
    fn fill(&mut self, deadline: Instant) -> Result<bool, String> {
        let before = self.inbox.len();
        while self.inbox.len() == before {
            match self.wait(deadline)? {
                Came::Some => {}
                Came::Nothing => {
                    return Err(format!(
                        "nothing came within {ANSWER_WITHIN:?} (unparsed: {:?})",
                        self.unparsed()
                    ));
                }
                Came::End => {
                    return match self.unparsed().trim() {
                        "" => Ok(false),
                        rest => Err(format!("the connection ended in the middle of: {rest}")),
                    };
                }
            }
        }
        Ok(true)
    }

    fn unparsed(&self) -> String {
        match &self.wire {
            Wire::Tcp { framer, .. } => framer.rest(),
            Wire::Web(_) => String::new(),
        }
    }

    /// Sends a stream header, and takes the server's header and features.
    pub fn open(&mut self, domain: &str) -> Result<Element, String> {
        self.restart();
        match &mut self.wire {
            Wire::Web(web) => web.open(domain)?,
            Wire::Tcp { .. } => self.send(
                format!(
                    "<?xml version='1.0'?><stream:stream to='{domain}' version='1.0' xmlns='jabber:client' \
                     xmlns:stream='http://etherx.jabber.org/streams'>"
                )
                .as_bytes(),
            )?,
        }
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
        self.scram(name, password, None)
    }

    /// The same in the extensible profile (XEP-0388), with `inline` beside it in the request.
    #[allow(dead_code)] // only dialogues come like that
    pub fn authenticate_with(
        &mut self,
        name: &str,
        password: &str,
        inline: &str,
    ) -> Result<Element, String> {
        self.scram(name, password, Some(inline))
    }

    fn scram(
        &mut self,
        name: &str,
        password: &str,
        inline: Option<&str>,
    ) -> Result<Element, String> {
        let ns = match inline {
            None => "urn:ietf:params:xml:ns:xmpp-sasl",
            Some(_) => "urn:xmpp:sasl:2",
        };
        let client_first = format!("n={name},r=dialogue-{}", self.next_id);
        let initial = BASE64_STANDARD.encode(format!("n,,{client_first}"));
        let request = match inline {
            None => format!("<auth xmlns='{ns}' mechanism='SCRAM-SHA-1'>{initial}</auth>"),
            Some(inline) => format!(
                "<authenticate xmlns='{ns}' mechanism='SCRAM-SHA-1'><initial-response>{initial}</initial-response>\
                 {inline}</authenticate>"
            ),
        };
        self.send(request.as_bytes())?;
        let challenge = self.next_element()?;
        if challenge.name != "challenge" || challenge.namespace != ns {
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
        self.send(format!("<response xmlns='{ns}'>{response}</response>").as_bytes())?;
        let outcome = self.next_element()?;
        if outcome.name == "success" {
            let server_signature = sign(&sign(&salted, b"Server Key"), auth_message.as_bytes());
            let expected = format!("v={}", BASE64_STANDARD.encode(server_signature));
            let said = match inline {
                None => Some(&outcome),
                Some(_) => outcome.child("additional-data"),
            };
            if decode(said.map_or("", |said| &said.text))? != expected.as_bytes() {
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
