//! A stream over BOSH (XEP-0124, XEP-0206): requests on connections of their own, so that any core may accept them, at most two of
//! them open. The client always asks before it waits.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use super::connection::{ANSWER_WITHIN, Came, Connection, Web};
use super::xml::{self, Item};

const NS: &str = "http://jabber.org/protocol/httpbind";
const XBOSH: &str = "urn:xmpp:xbosh";
/// Seconds that the server may hold a request; a deadline may come before.
const WAIT_S: u64 = 10;
/// Requests at a time: one that is held and one that says something.
const OPEN_MAX: usize = 2;

pub struct Bosh {
    server: SocketAddr,
    /// More fields of each request.
    fields: String,
    sid: String,
    rid: u64,
    /// The requests that have no answer yet, oldest first.
    open: VecDeque<TcpStream>,
    /// What has come of the answer to the oldest one.
    answer: Vec<u8>,
    items: VecDeque<Item>,
    /// The next answer begins a stream.
    begins: bool,
    ended: bool,
}

impl Bosh {
    pub fn connect(server: SocketAddr, fields: &[(&'static str, &str)]) -> Connection {
        let fields = fields.iter();
        Connection::over_web(Box::new(Bosh {
            server,
            fields: fields
                .map(|(name, value)| format!("{name}: {value}\r\n"))
                .collect(),
            sid: String::new(),
            rid: 1_573_741_820,
            open: VecDeque::new(),
            answer: Vec::new(),
            items: VecDeque::new(),
            begins: false,
            ended: false,
        }))
    }

    /// The next request of the session.
    fn request(&mut self, attributes: &str, payload: &str) -> Result<(), String> {
        self.rid += 1;
        let (sid, rid) = (&self.sid, self.rid);
        let body =
            format!("<body xmlns='{NS}' sid='{sid}' rid='{rid}' {attributes}>{payload}</body>");
        self.post(&body)
    }

    fn post(&mut self, body: &str) -> Result<(), String> {
        let deadline = Instant::now() + ANSWER_WITHIN;
        while self.open.len() >= OPEN_MAX && !self.ended {
            if self.answer(deadline)? == Came::Nothing {
                return Err(format!("no answer within {ANSWER_WITHIN:?}"));
            }
        }
        let mut socket = TcpStream::connect_timeout(&self.server, ANSWER_WITHIN)
            .map_err(|why| format!("connect: {why}"))?;
        let request = format!(
            "POST /bosh HTTP/1.1\r\nHost: {}\r\nContent-Type: text/xml; charset=utf-8\r\nContent-Length: {}\r\n{}\
             Connection: close\r\n\r\n{body}",
            self.server,
            body.len(),
            self.fields
        );
        socket
            .write_all(request.as_bytes())
            .map_err(|why| format!("send: {why}"))?;
        self.open.push_back(socket);
        Ok(())
    }

    /// Reads on at the answer to the oldest request.
    fn answer(&mut self, deadline: Instant) -> Result<Came, String> {
        let Some(socket) = self.open.front_mut() else {
            return Ok(Came::Nothing);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Came::Nothing);
        }
        socket
            .set_read_timeout(Some(left))
            .map_err(|why| why.to_string())?;
        let mut chunk = [0; 16 * 1024];
        match socket.read(&mut chunk) {
            Ok(0) => {
                self.open.pop_front();
                let answer = std::mem::take(&mut self.answer);
                self.take(&String::from_utf8(answer).map_err(|why| why.to_string())?)?;
                Ok(Came::Some)
            }
            Ok(length) => {
                self.answer.extend_from_slice(&chunk[..length]);
                Ok(Came::Some)
            }
            Err(why) => match why.kind() {
                ErrorKind::Interrupted => Ok(Came::Some),
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(Came::Nothing),
                _ => Err(format!("receive: {why}")),
            },
        }
    }

    /// A whole answer.
    fn take(&mut self, answer: &str) -> Result<(), String> {
        let body = match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => body,
            _ => return Err(format!("instead of a body came\n{answer}")),
        };
        let mut body = xml::parse(body).map_err(|why| format!("{why} in: {body}"))?;
        if (&*body.namespace, &*body.name) != (NS, "body") {
            return Err(format!("instead of a body came\n{body}"));
        }
        let children = std::mem::take(&mut body.children);
        let ends = body.attribute("type") == Some("terminate");
        let condition = body.attribute("condition").map(str::to_owned);
        if let Some(sid) = body.attribute("sid") {
            sid.clone_into(&mut self.sid);
        }
        if self.begins && !ends {
            self.begins = false;
            self.items.push_back(Item::Header(body.clone()));
        }
        self.items.extend(children.into_iter().map(Item::Element));
        if ends && !self.ended {
            self.ended = true;
            // what an error of the stream says is among the children
            if condition.is_some_and(|condition| condition != "remote-stream-error") {
                self.items.push_back(Item::Element(body));
            }
            self.items.push_back(Item::End);
        }
        Ok(())
    }
}

impl Web for Bosh {
    fn open(&mut self, domain: &str) -> Result<(), String> {
        self.begins = true;
        if self.sid.is_empty() {
            let rid = self.rid;
            return self.post(&format!(
                "<body xmlns='{NS}' xmlns:xmpp='{XBOSH}' rid='{rid}' to='{domain}' ver='1.6' wait='{WAIT_S}' hold='1' \
                 xml:lang='en' content='text/xml; charset=utf-8' xmpp:version='1.0'/>"
            ));
        }
        self.request(
            &format!("xmlns:xmpp='{XBOSH}' xmpp:restart='true' to='{domain}' xml:lang='en'"),
            "",
        )
    }

    fn send(&mut self, xml: &str) -> Result<(), String> {
        let payload = xml::standalone(xml);
        self.request("", &payload.concat())
    }

    fn send_raw(&mut self, bytes: &[u8]) -> Result<(), String> {
        let text = std::str::from_utf8(bytes).map_err(|why| why.to_string())?;
        if let Ok(body) = xml::parse(text) {
            self.begins |= body.attribute("sid").is_none();
            if let Some(rid) = body.attribute("rid").and_then(|rid| rid.parse().ok()) {
                self.rid = rid;
            }
        }
        self.post(text)
    }

    fn close(&mut self) -> Result<(), String> {
        self.request("type='terminate'", "")
    }

    fn read(&mut self, deadline: Instant, inbox: &mut VecDeque<Item>) -> Result<Came, String> {
        if self.items.is_empty() {
            if self.ended {
                return Ok(Came::End);
            }
            if self.open.is_empty() {
                self.request("", "")?;
            }
            let came = self.answer(deadline)?;
            if self.items.is_empty() {
                return Ok(came);
            }
        }
        inbox.append(&mut self.items);
        Ok(Came::Some)
    }
}
