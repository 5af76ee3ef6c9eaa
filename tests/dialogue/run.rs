//! Plays a script against a server.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use aws_lc_rs::hmac;
use base64::prelude::{BASE64_STANDARD, Engine};

use super::bosh::Bosh;
use super::connection::Connection;
use super::pattern::{self, Own, Variables};
use super::script::{Action, Client, Script, Step};
use super::websocket::WebSocket;
use super::xml::{self, Element, Item};

const SASL2: &str = "urn:xmpp:sasl:2";
const SM: &str = "urn:xmpp:sm:3";
/// Every account of every script has it.
const PASSWORD: &str = "dialogue";

/// What a proxy that has taken TLS off says (the server must believe it).
const PROXIED: [(&str, &str); 2] = [
    ("x-forwarded-for", "192.0.2.7"),
    ("x-forwarded-proto", "https"),
];

pub struct Server {
    /// By TCP: accounts are made and befriended there.
    pub address: SocketAddr,
    pub domain: String,
    pub over: Over,
}

/// How the clients of a script come.
#[allow(dead_code)] // not every test that plays dialogues plays them over all
pub enum Over {
    Tcp,
    /// Direct TLS.
    Tls(SocketAddr, Arc<rustls::ClientConfig>),
    WebSocket {
        address: SocketAddr,
        proxied: bool,
    },
    Bosh {
        address: SocketAddr,
        proxied: bool,
    },
}

/// Plays the script; `tag` makes its account names unique. The error names the line.
pub fn play(script: &Script, server: &Server, tag: &str) -> Result<(), String> {
    let mut stage = Stage {
        script,
        server,
        tag,
        variables: Variables::new(),
        live: BTreeMap::new(),
    };
    stage.prepare()?;
    for step in &script.steps {
        stage
            .step(step)
            .map_err(|why| format!("line {}: {} {why}", step.line, step.who))?;
    }
    Ok(())
}

/// A client that is connected.
struct Live {
    connection: Connection,
    full: String,
    bound: bool,
    /// It counts stanzas (XEP-0198), so the runner must not send any of its own.
    counts: bool,
}

struct Stage<'a> {
    script: &'a Script,
    server: &'a Server,
    tag: &'a str,
    variables: Variables,
    live: BTreeMap<String, Live>,
}

impl Stage<'_> {
    fn node(&self, account: &str) -> String {
        format!("{}-{}", account.to_lowercase(), self.tag)
    }

    fn bare(&self, account: &str) -> String {
        format!("{}@{}", self.node(account), self.server.domain)
    }

    fn full(&self, client: &Client) -> String {
        format!("{}/{}", self.bare(&client.account), client.resource)
    }

    /// Makes the accounts, and fills in the addresses that the script uses.
    fn prepare(&mut self) -> Result<(), String> {
        self.variables
            .insert("domain".to_owned(), self.server.domain.clone());
        self.variables.insert("tag".to_owned(), self.tag.to_owned());
        self.variables
            .insert("password".to_owned(), PASSWORD.to_owned());
        for account in self.script.accounts.iter().chain(&self.script.nobodies) {
            self.variables.insert(account.clone(), self.bare(account));
            self.variables
                .insert(format!("{account}.node"), self.node(account));
        }
        for (name, client) in &self.script.clients {
            self.variables
                .insert(format!("{name}.full"), self.full(client));
            self.variables
                .insert(format!("{name}.resource"), client.resource.clone());
        }
        for account in &self.script.accounts {
            let mut connection = self.open_tcp()?;
            connection.register(&self.node(account), PASSWORD)?;
        }
        Ok(())
    }

    fn connect(&self) -> Result<Connection, String> {
        let fields = |proxied| if proxied { &PROXIED[..] } else { &[] };
        match &self.server.over {
            Over::Tcp => Connection::connect(self.server.address),
            Over::Tls(address, config) => {
                Connection::connect_tls(*address, config.clone(), &self.server.domain)
            }
            Over::WebSocket { address, proxied } => WebSocket::connect(*address, fields(*proxied)),
            Over::Bosh { address, proxied } => Ok(Bosh::connect(*address, fields(*proxied))),
        }
    }

    fn open(&self) -> Result<Connection, String> {
        let mut connection = self.connect()?;
        connection.open(&self.server.domain)?;
        Ok(connection)
    }

    fn open_tcp(&self) -> Result<Connection, String> {
        let mut connection = Connection::connect(self.server.address)?;
        connection.open(&self.server.domain)?;
        Ok(connection)
    }

    fn authenticate(
        &self,
        mut connection: Connection,
        account: &str,
    ) -> Result<Connection, String> {
        let outcome = connection.authenticate(&self.node(account), PASSWORD)?;
        if outcome.name != "success" {
            return Err(format!("could not authenticate:\n{outcome}"));
        }
        connection.open(&self.server.domain)?;
        Ok(connection)
    }

    fn log_in(
        &self,
        connection: Connection,
        account: &str,
        resource: &str,
    ) -> Result<(Connection, String), String> {
        let mut connection = self.authenticate(connection, account)?;
        let full = connection.bind(resource)?;
        Ok((connection, full))
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        let client = &self.script.clients[&step.who];
        let who = step.who.as_str();
        match &step.action {
            Action::Connects => {
                let connection = self.connect()?;
                self.enter(who, connection, None);
            }
            Action::Opens => {
                let connection = self.open()?;
                self.enter(who, connection, None);
            }
            Action::Authenticates { password: None } => {
                let connection = self.authenticate(self.open()?, &client.account)?;
                self.enter(who, connection, None);
            }
            Action::Authenticates {
                password: Some(password),
            } => {
                let node = self.node(&client.account);
                let password = self.fill(password)?;
                if !self.live.contains_key(who) {
                    let connection = self.open()?;
                    self.enter(who, connection, None);
                }
                let connection = &mut self.live.get_mut(who).unwrap().connection;
                let outcome = connection.authenticate(&node, &password)?;
                connection.put_back(Item::Element(outcome));
            }
            Action::AuthenticatesWith(block) => {
                let node = self.node(&client.account);
                let inline = self.fill(block)?;
                if !self.live.contains_key(who) {
                    let connection = self.open()?;
                    self.enter(who, connection, None);
                }
                let live = self.live.get_mut(who).unwrap();
                live.counts |= counts(&inline);
                let outcome = live
                    .connection
                    .authenticate_with(&node, PASSWORD, &inline)?;
                live.connection.put_back(Item::Element(outcome));
            }
            Action::LogsIn => self.enter_bound(who, client)?,
            Action::ComesOnline => {
                if !self.live.contains_key(who) {
                    self.enter_bound(who, client)?;
                }
                let live = self.live.get_mut(who).unwrap();
                live.connection.send(b"<presence/>")?;
                let full = live.full.clone();
                live.connection
                    .find(|element| is_presence(element, &full, None))?;
            }
            Action::GetsRoster => {
                let connection = self.connection(who)?;
                let answer = connection
                    .request("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>")?;
                if answer.attribute("type") != Some("result") {
                    return Err(format!("got no roster:\n{answer}"));
                }
            }
            Action::Sends(block) => {
                let text = self.fill(block)?;
                self.live(who)?.counts |= counts(&text);
                self.connection(who)?.send(text.as_bytes())?;
            }
            Action::SendsRaw(block) => {
                let bytes = unescape(&self.fill(block)?)?;
                let connection = self.connection(who)?;
                // A header in the middle of the bytes starts a stream; before the first one this changes nothing.
                if bytes
                    .windows(b"<stream:stream".len())
                    .any(|window| window == b"<stream:stream")
                {
                    connection.restart();
                }
                connection.send_rudely(&bytes);
            }
            Action::Receives { expected, ordered } => {
                self.receive(who, client, expected, *ordered)?
            }
            Action::EventuallyReceives(expected) => {
                self.receive_among_others(who, client, expected)?
            }
            Action::ReceivesHeader(expected) => {
                // An end tag may be left out: a header has none.
                let text = self.fill(expected)?;
                let text = if text.ends_with("/>") {
                    text
                } else {
                    text.replacen('>', "/>", 1)
                };
                let expected = xml::parse(&text)?;
                match self.connection(who)?.next()? {
                    Some(Item::Header(header)) => {
                        let own = Own { full: "", bare: "" };
                        let captured = pattern::matches(&expected, &header, &own)?;
                        self.variables.extend(captured);
                    }
                    other => return Err(format!("expected a stream header, got {other:?}")),
                }
            }
            Action::ReceivesStreamError(condition) => self.receive_stream_error(who, condition)?,
            Action::ReceivesNothing => {
                self.settle_all(who)?;
                let live = self.live(who)?;
                let surprise = live.connection.unread().find(|item| match item {
                    Item::Element(element) => !is_aside(element),
                    _ => true,
                });
                match surprise {
                    None => {}
                    Some(Item::Element(element)) => {
                        return Err(format!("should receive nothing, got\n{element}"));
                    }
                    Some(other) => return Err(format!("should receive nothing, got {other:?}")),
                }
            }
            Action::Settles => self.settle(who)?,
            Action::Drains => {
                self.settle_all(who)?;
                self.connection(who)?.forget();
            }
            Action::Closes => {
                let mut live = self.live.remove(who).ok_or("is not connected")?;
                live.connection.close()?;
                let mut ended = false;
                while let Some(item) = live.connection.next()? {
                    ended |= matches!(item, Item::End);
                }
                if !ended {
                    return Err("was not answered with the end of the stream".to_owned());
                }
            }
            Action::IsCut => {
                self.live.remove(who).ok_or("is not connected")?;
            }
            Action::IsClosed => {
                let mut live = self.live.remove(who).ok_or("is not connected")?;
                while let Some(item) = live.connection.next()? {
                    if let Item::Element(element) = item {
                        return Err(format!("should be closed, got\n{element}"));
                    }
                }
            }
            Action::AreFriends { with } => {
                let other = self
                    .script
                    .clients
                    .get(with)
                    .ok_or_else(|| format!("{with} is not declared"))?;
                self.befriend(&client.account, &other.account)?;
            }
        }
        Ok(())
    }

    fn enter(&mut self, who: &str, connection: Connection, full: Option<String>) {
        let bound = full.is_some();
        let live = Live {
            connection,
            full: full.unwrap_or_default(),
            bound,
            counts: false,
        };
        self.live.insert(who.to_owned(), live);
    }

    fn enter_bound(&mut self, who: &str, client: &Client) -> Result<(), String> {
        let (connection, full) = self.log_in(self.open()?, &client.account, &client.resource)?;
        if full != self.full(client) {
            return Err(format!(
                "asked for resource '{}', got {full}",
                client.resource
            ));
        }
        self.enter(who, connection, Some(full));
        Ok(())
    }

    fn live(&mut self, who: &str) -> Result<&mut Live, String> {
        self.live
            .get_mut(who)
            .ok_or_else(|| "is not connected".to_owned())
    }

    /// The address of a client that is connected.
    fn address(&self, who: &str, client: &Client) -> String {
        let live = self.live.get(who).filter(|live| live.bound);
        live.map_or_else(|| self.full(client), |live| live.full.clone())
    }

    /// A client that has bound in the same round trip as it has authenticated (XEP-0386) learns its address from the outcome.
    fn note(&mut self, who: &str, element: &Element) -> Result<(), String> {
        let full = element.child("authorization-identifier").map(|id| &id.text);
        if element.namespace == SASL2
            && let Some(full) = full.filter(|full| full.contains('/'))
        {
            let full = full.clone();
            self.variables.insert(format!("{who}.full"), full.clone());
            let live = self.live(who)?;
            live.bound = true;
            live.full = full;
        }
        Ok(())
    }

    fn connection(&mut self, who: &str) -> Result<&mut Connection, String> {
        Ok(&mut self.live(who)?.connection)
    }

    fn receive(
        &mut self,
        who: &str,
        client: &Client,
        block: &str,
        ordered: bool,
    ) -> Result<(), String> {
        let mut left = xml::parse_block(&self.fill(block)?)?;
        if left.is_empty() {
            return Err("receives: needs at least one element".to_owned());
        }
        let (full, bare) = (self.address(who, client), self.bare(&client.account));
        let own = Own {
            full: &full,
            bare: &bare,
        };
        while !left.is_empty() {
            let actual = loop {
                let element = self
                    .connection(who)?
                    .next_element()
                    .map_err(|why| format!("waits for\n{}\nbut {why}", left[0]))?;
                if !is_aside(&element) || is_aside(&left[0]) {
                    break element;
                }
            };
            let candidates = if ordered { &left[..1] } else { &left[..] };
            let attempts: Vec<_> = candidates
                .iter()
                .map(|one| pattern::matches(one, &actual, &own))
                .collect();
            match attempts.iter().position(Result::is_ok) {
                Some(place) => {
                    left.remove(place);
                    self.note(who, &actual)?;
                    self.variables
                        .extend(attempts.into_iter().nth(place).unwrap()?);
                    // A value captured here may be used further down in the same block.
                    for one in &mut left {
                        fill_element(one, &self.variables);
                    }
                }
                None => {
                    let why: Vec<String> = attempts.into_iter().filter_map(Result::err).collect();
                    let expected: Vec<String> = candidates.iter().map(Element::to_string).collect();
                    return Err(format!(
                        "expects\n{}\ngot\n{actual}\n({})",
                        expected.join("\n  or\n"),
                        why.join("; or ")
                    ));
                }
            }
        }
        Ok(())
    }

    fn receive_among_others(
        &mut self,
        who: &str,
        client: &Client,
        block: &str,
    ) -> Result<(), String> {
        let mut left = xml::parse_block(&self.fill(block)?)?;
        let (full, bare) = (self.address(who, client), self.bare(&client.account));
        let own = Own {
            full: &full,
            bare: &bare,
        };
        let mut others = Vec::new();
        while !left.is_empty() {
            let actual = self.connection(who)?.next_element().map_err(|why| {
                let others: Vec<String> = others.iter().map(Element::to_string).collect();
                format!(
                    "waits for\n{}\nbut {why}; before came\n{}",
                    left[0],
                    others.join("\n")
                )
            })?;
            let found = left
                .iter()
                .enumerate()
                .find_map(|(place, one)| Some((place, pattern::matches(one, &actual, &own).ok()?)));
            match found {
                Some((place, captured)) => {
                    left.remove(place);
                    self.variables.extend(captured);
                }
                None => others.push(actual),
            }
        }
        Ok(())
    }

    /// A header if none has come yet, `<stream:error>` with this condition, the end of the stream, the end of TCP.
    fn receive_stream_error(&mut self, who: &str, condition: &str) -> Result<(), String> {
        let condition = condition
            .trim()
            .trim_start_matches('<')
            .trim_end_matches("/>")
            .to_owned();
        let mut live = self.live.remove(who).ok_or("is not connected")?;
        let mut got = None;
        loop {
            match live.connection.next()? {
                Some(Item::Header(_)) => {}
                Some(Item::Element(element)) if element.name == "features" => {}
                Some(Item::Element(element)) if element.name == "error" && got.is_none() => {
                    got = Some(element)
                }
                Some(Item::Element(element)) => {
                    return Err(format!(
                        "expects the stream error {condition}, got\n{element}"
                    ));
                }
                Some(Item::End) if got.is_some() => {}
                Some(Item::End) | None if got.is_none() => {
                    return Err(format!(
                        "expects the stream error {condition}, but the stream ends without"
                    ));
                }
                Some(Item::End) | None => break,
            }
        }
        let error = got.unwrap();
        let is_wanted = |child: &Element| {
            child.namespace == "urn:ietf:params:xml:ns:xmpp-streams" && child.name == condition
        };
        if error.namespace != "http://etherx.jabber.org/streams"
            || !error.children.iter().any(is_wanted)
        {
            return Err(format!(
                "expects the stream error {condition}, got\n{error}"
            ));
        }
        Ok(())
    }

    /// Everything that any client has sent is dealt with, and what it caused at `who` has come.
    fn settle_all(&mut self, who: &str) -> Result<(), String> {
        let others: Vec<String> = self
            .live
            .keys()
            .filter(|name| *name != who)
            .cloned()
            .collect();
        for other in others {
            let live = &self.live[&other];
            if live.bound && !live.counts {
                self.settle(&other)?;
            }
        }
        self.settle(who)
    }

    /// Asks every account of the script something that its owner answers with an error (an IQ to a resource that is
    /// not there), then the own server: what this client has sent is dealt with by then, and what it caused has come.
    fn settle(&mut self, who: &str) -> Result<(), String> {
        let accounts: Vec<String> = self
            .script
            .accounts
            .iter()
            .map(|account| self.bare(account))
            .collect();
        let domain = self.server.domain.clone();
        let live = self.live(who)?;
        if live.counts {
            live.connection
                .send(format!("<r xmlns='{SM}'/>").as_bytes())?;
            live.connection
                .find(|element| element.name == "a" && element.namespace == SM)?;
            return Ok(());
        }
        if !live.bound {
            return Err("is not bound, so the runner cannot know what it receives".to_owned());
        }
        let targets = accounts
            .iter()
            .map(|account| format!("{account}/nobody-here"))
            .chain([domain]);
        let mut ids = Vec::new();
        for target in targets {
            ids.push(live.connection.send_request(&format!(
                "<iq type='get' id='{{id}}' to='{target}'><ping xmlns='urn:xmpp:ping'/></iq>"
            ))?);
        }
        for id in ids {
            live.connection.answer(&id)?;
        }
        Ok(())
    }

    /// Subscribes both to each other, over connections of their own.
    fn befriend(&self, one: &str, other: &str) -> Result<(), String> {
        let jids = [self.bare(one), self.bare(other)];
        let log_in = |account| self.log_in(self.open_tcp()?, account, "setup");
        let mut connections = [log_in(one)?.0, log_in(other)?.0];
        for (connection, jid) in connections.iter_mut().zip(&jids) {
            connection
                .request("<iq type='get' id='{id}'><query xmlns='jabber:iq:roster'/></iq>")?;
            connection.send(b"<presence/>")?;
            connection.find(|element| is_presence(element, &format!("{jid}/setup"), None))?;
        }
        for (from, to) in [(0, 1), (1, 0)] {
            connections[from]
                .send(format!("<presence to='{}' type='subscribe'/>", jids[to]).as_bytes())?;
            connections[to].find(|element| is_presence(element, &jids[from], Some("subscribe")))?;
            connections[to]
                .send(format!("<presence to='{}' type='subscribed'/>", jids[from]).as_bytes())?;
            connections[from]
                .find(|element| is_presence(element, &jids[to], Some("subscribed")))?;
        }
        for (connection, other) in connections.iter_mut().zip(jids.iter().rev()) {
            connection.find(|element| is_push_of_both(element, other))?;
        }
        for mut connection in connections {
            connection.send(b"<presence type='unavailable'/>")?;
            for jid in &jids {
                connection.request(&format!(
                    "<iq type='get' id='{{id}}' to='{jid}/nobody-here'><ping xmlns='urn:xmpp:ping'/></iq>"
                ))?;
            }
            connection.close()?;
            while connection.next()?.is_some() {}
        }
        Ok(())
    }

    /// Fills in `{name}`, `{error TYPE CONDITION}`, `{base64:text}`, `{ht:node:token}`, `{ht-answer:token}`,
    /// `{repeat:count:text}` and `{attributes:count}`; leaves wildcards alone.
    fn fill(&self, text: &str) -> Result<String, String> {
        let mut text = fill_variables(text, &self.variables);
        while let Some(start) = text.find("{error ") {
            let length = text[start..].find('}').ok_or("no end of {error")?;
            let (kind, condition) = text[start + "{error ".len()..start + length]
                .split_once(' ')
                .ok_or("{error TYPE CONDITION}")?;
            let element = format!(
                "<error type='{kind}'><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
            );
            text.replace_range(start..=start + length, &element);
        }
        while let Some(start) = text.find("{base64:") {
            let length = text[start..].find('}').ok_or("no end of {base64:")?;
            let plain = unescape(&text[start + "{base64:".len()..start + length])?;
            text.replace_range(start..=start + length, &BASE64_STANDARD.encode(plain));
        }
        // XEP-0484 and its mechanism: a proof of the token on either side, bound to no channel
        let proof = |token: &str, side: &str| {
            let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
            hmac::sign(&key, side.as_bytes()).as_ref().to_vec()
        };
        while let Some(start) = text.find("{ht:") {
            let length = text[start..].find('}').ok_or("no end of {ht:")?;
            let (node, token) = text[start + "{ht:".len()..start + length]
                .split_once(':')
                .ok_or("{ht:NODE:TOKEN}")?;
            let message = [node.as_bytes(), b"\0", &proof(token, "Initiator")].concat();
            text.replace_range(start..=start + length, &BASE64_STANDARD.encode(message));
        }
        while let Some(start) = text.find("{ht-answer:") {
            let length = text[start..].find('}').ok_or("no end of {ht-answer:")?;
            let token = &text[start + "{ht-answer:".len()..start + length];
            let message = BASE64_STANDARD.encode(proof(token, "Responder"));
            text.replace_range(start..=start + length, &message);
        }
        while let Some(start) = text.find("{repeat:") {
            let length = text[start..].find('}').ok_or("no end of {repeat:")?;
            let (count, what) = text[start + "{repeat:".len()..start + length]
                .split_once(':')
                .ok_or("no count")?;
            let repeated = what.repeat(count.parse().map_err(|why| format!("{count}: {why}"))?);
            text.replace_range(start..=start + length, &repeated);
        }
        while let Some(start) = text.find("{attributes:") {
            let length = text[start..].find('}').ok_or("no end of {attributes:")?;
            let count = &text[start + "{attributes:".len()..start + length];
            let count: usize = count.parse().map_err(|why| format!("{count}: {why}"))?;
            let attributes: Vec<String> =
                (0..count).map(|number| format!("a{number}=''")).collect();
            text.replace_range(start..=start + length, &attributes.join(" "));
        }
        Ok(text)
    }
}

fn fill_variables(text: &str, variables: &Variables) -> String {
    let mut text = text.to_owned();
    for (name, value) in variables {
        text = text.replace(&format!("{{{name}}}"), value);
    }
    text
}

fn fill_element(element: &mut Element, variables: &Variables) {
    for value in element.attributes.values_mut() {
        *value = fill_variables(value, variables);
    }
    element.text = fill_variables(&element.text, variables);
    for child in &mut element.children {
        fill_element(child, variables);
    }
}

/// `\xNN`, `\n`, `\r`, `\t`, `\\` in raw blocks; a line break that follows a `\` is left out.
fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match bytes.next() {
            Some(b'n') => out.push(b'\n'),
            Some(b'r') => out.push(b'\r'),
            Some(b't') => out.push(b'\t'),
            Some(b'\\') => out.push(b'\\'),
            Some(b'\n') => {}
            Some(b'x') => {
                let digits: String = bytes.by_ref().take(2).map(char::from).collect();
                out.push(
                    u8::from_str_radix(&digits, 16).map_err(|why| format!("\\x{digits}: {why}"))?,
                );
            }
            other => return Err(format!("unknown escape \\{:?}", other.map(char::from))),
        }
    }
    Ok(out)
}

/// Does the client count stanzas from then on?
fn counts(sent: &str) -> bool {
    sent.contains(SM) && (sent.contains("<enable") || sent.contains("<resume"))
}

fn is_presence(element: &Element, from: &str, kind: Option<&str>) -> bool {
    element.name == "presence"
        && element.attribute("from") == Some(from)
        && element.attribute("type") == kind
}

fn is_push_of_both(element: &Element, jid: &str) -> bool {
    element.name == "iq"
        && element.attribute("type") == Some("set")
        && element.child("query").is_some_and(|query| {
            query.children.iter().any(|item| {
                item.attribute("jid") == Some(jid) && item.attribute("subscription") == Some("both")
            })
        })
}

/// What a server may say at any time and a script need not mention: a request for an acknowledgement, and "this
/// contact is not available", sent from the bare address (RFC 6121, 4.3.2).
fn is_aside(element: &Element) -> bool {
    let asks_for_ack = element.name == "r" && element.namespace == SM;
    let is_absence = element.name == "presence"
        && element.attribute("type") == Some("unavailable")
        && element
            .attribute("from")
            .is_some_and(|from| !from.contains('/'));
    asks_for_ack || is_absence
}
