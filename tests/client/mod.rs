//! A raw XMPP client for tests that a dialogue cannot tell: many connections at once, cut and resumed streams, clients
//! that do not read. Built on the dialogues' own connection (which does not use the server's parser).

#![allow(dead_code)] // every integration test uses its own part

#[path = "../dialogue/connection.rs"]
pub mod connection;
#[path = "../dialogue/xml.rs"]
pub mod xml;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::blade::{Blade, DOMAIN};
use connection::Connection;
use xml::{Element, Item};

pub const PASSWORD: &str = "secret";
const SM: &str = "urn:xmpp:sm:3";

/// What these tests' blades have in common: log-ins without TLS, cheap keys.
pub const PLAIN: [(&str, &str); 2] = [("c2s.require_tls", "false"), ("sasl.iterations", "4096")];

/// A blade with [`PLAIN`] and `settings`.
pub fn blade(settings: &[(&str, &str)]) -> Blade {
    Blade::start(&[&PLAIN[..], settings].concat())
}

/// One logged-in client.
pub struct Client {
    pub connection: Connection,
    pub jid: String,
}

impl Client {
    /// Registers `name` in-band.
    pub fn register(blade: &Blade, name: &str) {
        let mut connection = opened(blade.c2s);
        connection
            .register(name, PASSWORD)
            .expect("in-band registration");
    }

    /// Logs in and binds; no presence yet.
    pub fn bind(blade: &Blade, name: &str, resource: &str) -> Client {
        let mut connection = authenticated(blade.c2s, name, PASSWORD).expect("log-in");
        let jid = connection.bind(resource).expect("binding");
        Client { connection, jid }
    }

    /// Logs in, binds and is available.
    pub fn online(blade: &Blade, name: &str, resource: &str) -> Client {
        let mut client = Client::bind(blade, name, resource);
        client.be_available();
        client
    }

    pub fn be_available(&mut self) {
        self.send("<presence/>");
        let own = self.jid.clone();
        self.find(|e| e.name == "presence" && e.attribute("from") == Some(&own));
    }

    pub fn send(&mut self, xml: &str) {
        self.connection
            .send(xml.as_bytes())
            .expect("the server takes it");
    }

    pub fn find(&mut self, wanted: impl Fn(&Element) -> bool) -> Element {
        match self.connection.find(wanted) {
            Ok(element) => element,
            Err(why) => panic!("{}: {why}", self.jid),
        }
    }

    /// The next message's body; answers pings and requests for acknowledgement of nobody.
    pub fn next_body(&mut self) -> String {
        let message = self.find(|e| e.name == "message");
        body(&message).expect("a body")
    }

    /// The server has handled everything that was sent before.
    pub fn settle(&mut self) {
        let answer = self
            .connection
            .request("<iq type='get' id='{id}'><ping xmlns='urn:xmpp:ping'/></iq>")
            .expect("an answer to a ping");
        assert_eq!(answer.attribute("type"), Some("result"), "{answer}");
    }

    /// Messages that came while something else was looked for.
    pub fn unread_messages(&self) -> usize {
        let messages = self
            .connection
            .unread()
            .filter(|item| matches!(item, Item::Element(e) if e.name == "message"));
        messages.count()
    }

    /// Enables stream management with resumption; the id for [`resume`].
    pub fn enable_resumption(&mut self) -> String {
        self.send(&format!("<enable xmlns='{SM}' resume='true'/>"));
        let enabled = self.find(|e| e.name == "enabled");
        enabled
            .attribute("id")
            .expect("a resumable session")
            .to_owned()
    }

    /// Asks for the count of handled stanzas.
    pub fn ask_h(&mut self) -> u32 {
        self.send(&format!("<r xmlns='{SM}'/>"));
        h(&self.find(|e| e.name == "a"))
    }

    pub fn acknowledge(&mut self, h: u32) {
        self.send(&format!("<a xmlns='{SM}' h='{h}'/>"));
    }

    /// Waits for the stream's end; the condition of its stream error, if there was one.
    pub fn ends(&mut self) -> Option<String> {
        ended(&mut self.connection)
    }
}

/// A connection with an open stream.
pub fn opened(address: SocketAddr) -> Connection {
    let mut connection = Connection::connect(address).expect("a connection");
    connection.open(DOMAIN).expect("stream features");
    connection
}

/// A connection that is authenticated and waits for binding or resumption. `Err`: the SASL failure's condition.
pub fn authenticated(
    address: SocketAddr,
    name: &str,
    password: &str,
) -> Result<Connection, String> {
    let mut connection = opened(address);
    let outcome = connection
        .authenticate(name, password)
        .expect("a SASL outcome");
    if outcome.name != "success" {
        return Err(outcome
            .children
            .first()
            .map_or_else(|| outcome.to_string(), |c| c.name.clone()));
    }
    connection.open(DOMAIN).expect("stream features");
    Ok(connection)
}

/// Resumes on an authenticated connection; the server's `h`, or nothing if it has no such session.
pub fn resume(connection: &mut Connection, previd: &str, h: u32) -> Option<u32> {
    let xml = format!("<resume xmlns='{SM}' previd='{previd}' h='{h}'/>");
    connection.send(xml.as_bytes()).expect("sent");
    let answer = connection.next_element().expect("an answer to <resume/>");
    (answer.name == "resumed").then(|| self::h(&answer))
}

pub fn h(element: &Element) -> u32 {
    let h = element.attribute("h").expect("a count");
    h.parse().expect("a number")
}

pub fn body(message: &Element) -> Option<String> {
    message.child("body").map(|body| body.text.clone())
}

/// The number with which its body begins.
pub fn number(message: &Element) -> usize {
    let text = body(message).expect("a body");
    let number = text.split(' ').next().unwrap_or_default();
    number.parse().expect("a number")
}

/// Reads to the end of the connection; the condition of the last stream error.
pub fn ended(connection: &mut Connection) -> Option<String> {
    let mut condition = None;
    loop {
        match connection.next() {
            Ok(Some(Item::Element(e))) if e.name == "error" => {
                condition = e.children.first().map(|c| c.name.clone());
            }
            Ok(Some(_)) => {}
            Ok(None) => return condition,
            Err(why) => panic!("no end of the stream: {why}"),
        }
    }
}

/// Polls until `holds`; panics with `what` after `within`.
pub fn wait_until(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {within:?}");
        std::thread::sleep(Duration::from_millis(5)); // the poll's interval; the bound is the deadline
    }
}
