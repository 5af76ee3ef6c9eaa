//! One connection that speaks HTTP, and one request of it with its answer. In: readiness, bytes. Out: bodies piece by piece, both
//! ways. Promise: nothing is read that nobody wants yet, a body is never held as a whole unless its handler says how much that
//! may be, and who is slow (head, body or taking the answer) has a deadline. The last answer of a connection is heard: it is closed
//! when the client has taken all of it, and a body that was refused is read away within bounds, because closing before resets
//! the connection and takes the answer back (RFC 9112 section 9.6).

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use super::request::{Head, Limits, Refusal};
use super::{After, Side};
use crate::config::Config;
use crate::net::{Read, Transport};
use crate::observe::{Stage, record};
use crate::rt;
use crate::shard::doors::Pass;
use crate::shard::login::Guest;
use crate::shard::{Kind, Shard, Waits};

/// Bytes of an answer that wait for the client before whoever sends it has to wait.
const UNSENT_BYTES_MAX: usize = 128 << 10;
/// Bytes of a body that nobody wanted which are read away to keep the connection.
const UNWANTED_BYTES_MAX: u64 = 64 << 10;

/// A client that was told the end and goes on sending may pause so long; as nginx's lingering_timeout.
const LINGER_PAUSE_MS: u64 = 5000;

/// The connection is of no use any more: broken, or too slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// A connection, watched by the shard.
pub struct Conn {
    pub transport: Transport,
    /// Read and not yet taken.
    pub unread: Vec<u8>,
    /// As the socket says; a proxy's, if there is one.
    pub peer: SocketAddr,
    pub side: Side,
    /// Its place among the connections of its address; none behind a proxy.
    pub pass: Option<Pass>,
    /// Its place among those that log in, until it is known that it does not.
    pub guest: Option<Guest>,
    /// When it was accepted, and when the TLS handshake could begin; monotonic microseconds of the blade.
    pub accepted_us: u64,
    began_us: u64,
    link: u64,
    waits: Rc<Waits>,
}

/// What is answered. The body stands here unless it is streamed ([`Exchange::begin`]).
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    /// Without a body.
    pub fn empty(status: u16) -> Answer {
        Answer {
            status,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    pub fn new(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Answer {
        let mut answer = Answer::empty(status).with("Content-Type", content_type);
        answer.body = body.into();
        answer
    }

    /// A sentence for people.
    pub fn text(status: u16, text: &str) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Answer {
        self.headers.push((name, value.into()));
        self
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Answer {
        Answer::text(refusal.status, refusal.text)
    }
}

impl Conn {
    /// Watches a connection; `None`: it cannot be.
    pub fn new(shard: &Shard, transport: Transport, peer: SocketAddr, side: Side) -> Option<Conn> {
        let waits = Rc::new(Waits::default());
        let link = shard.links.borrow_mut().insert(Kind::Waits(waits.clone()));
        if shard.readiness.add(transport.socket(), link).is_err() {
            shard.links.borrow_mut().remove(link);
            return None;
        }
        Some(Conn {
            transport,
            unread: Vec::new(),
            peer,
            side,
            pass: None,
            guest: None,
            accepted_us: shard.now_us(),
            began_us: shard.now_us(),
            link,
            waits,
        })
    }

    /// Ends the watch.
    pub fn leave(&self, shard: &Shard) {
        shard.links.borrow_mut().remove(self.link);
        shard.readiness.remove(self.transport.socket());
    }

    /// Lets the client hear what was said last, then closes.
    pub fn close(self, shard: &Shard) {
        shard.links.borrow_mut().remove(self.link);
        if !self.transport.handshaking() {
            shard.close_transport(self.transport, &[]);
        }
    }

    /// Waits for readiness, and sends what waits.
    async fn ready(&mut self, shard: &Shard, deadline_ms: u64) -> Result<(), Gone> {
        let now_ms = shard.now_ms();
        let queued_ms = self.guest.as_ref().map_or(0, |g| g.queued_ms(now_ms));
        let left = Duration::from_millis((deadline_ms + queued_ms).saturating_sub(now_ms));
        let waits = self.waits.clone();
        let waited = rt::timeout(left, async move { waits.ready.wait().await });
        let waited = match &self.guest {
            Some(guest) => guest.away(waited).await,
            None => waited.await,
        };
        waited.map_err(|_| Gone)?;
        self.transport.flush().map_err(|_| Gone)?;
        Ok(())
    }

    /// Reads until there is something new in `unread`, with the handshake on the way.
    async fn fill(&mut self, shard: &Shard, deadline_ms: u64) -> Result<(), Gone> {
        loop {
            let handshaking = self.transport.handshaking();
            let more = {
                let mut scratch = shard.scratch.borrow_mut();
                match self.transport.read(&mut scratch) {
                    Ok(Read::Data { bytes, .. }) => {
                        self.unread.extend_from_slice(bytes);
                        true
                    }
                    Ok(Read::HandshakeDone | Read::WouldBlock) => false,
                    Ok(Read::Eof) | Err(_) => return Err(Gone),
                }
            };
            let handshake_done = handshaking && !self.transport.handshaking();
            if handshake_done {
                record(Stage::TlsHandshake, shard.now_us() - self.began_us);
            }
            if more {
                return Ok(());
            }
            if !handshake_done {
                self.ready(shard, deadline_ms).await?;
            }
        }
    }

    /// The next request's head. `Ok(None)`: none came in time, or the client has gone.
    pub async fn head(&mut self, shard: &Shard, first: bool) -> Result<Option<Head>, Refusal> {
        let config = shard.config.borrow().clone();
        let limits = Limits {
            head_bytes_max: config.limits.http_head_bytes_max,
            headers_max: config.limits.http_headers_max,
        };
        let head_ms = config.limits.http_seconds_max * 1000;
        if !first && self.unread.is_empty() {
            let idle_ms = shard.now_ms() + config.web.idle_seconds_max * 1000;
            if self.fill(shard, idle_ms).await.is_err() {
                return Ok(None);
            }
        }
        let deadline_ms = shard.fresh_ms() + head_ms;
        loop {
            if let Some((head, taken)) = Head::parse(&self.unread, &limits)? {
                self.unread.drain(..taken);
                return Ok(Some(head));
            }
            if self.fill(shard, deadline_ms).await.is_err() {
                let late = shard.now_us() / 1000 >= deadline_ms;
                return match late && !self.unread.is_empty() {
                    true => Err(Refusal {
                        status: 408,
                        text: "too slow",
                    }),
                    false => Ok(None),
                };
            }
        }
    }

    /// Ends the sending direction, and reads away what the client goes on sending until it has heard the end.
    async fn linger(&mut self, shard: &Shard) {
        let limits = shard.config.borrow().limits.clone();
        let _ = self.transport.finish(&[], &mut shard.scratch.borrow_mut());
        let until_ms = shard.now_ms() + limits.http_linger_seconds_max * 1000;
        let mut left = limits.http_linger_bytes_max;
        let mut shut = false;
        loop {
            rt::yield_if_needed().await;
            if !shut && self.transport.pending() == 0 {
                let _ = self.transport.socket().shutdown();
                shut = true;
            }
            let read = read_away(self.transport.socket());
            match read {
                Ok(0) => return,
                Ok(taken) if taken > left => break,
                Ok(taken) => left -= taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let pause_ms = shard.now_ms() + LINGER_PAUSE_MS;
                    if self.ready(shard, until_ms.min(pause_ms)).await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
            if shard.now_ms() >= until_ms {
                break;
            }
        }
        shard.gauges.http_refused.one();
    }

    /// Answers what is no request; the connection ends then.
    pub async fn refuse(&mut self, shard: &Rc<Shard>, refusal: Refusal) {
        shard.gauges.http_refused.one();
        if self.transport.handshaking() {
            return;
        }
        let bytes = head_of(&refusal.into(), None, None, true, true);
        let _ = self
            .transport
            .write(&bytes, &mut shard.scratch.borrow_mut());
        // a body may be coming, of whatever length
        self.linger(shard).await;
    }
}

/// Takes what is there, and throws it away.
fn read_away(socket: &crate::net::Socket) -> io::Result<usize> {
    socket.recv(&mut [0; 16 << 10])
}

/// One request, from its head to the end of its answer.
pub struct Exchange<'c> {
    pub shard: &'c Rc<Shard>,
    pub config: std::sync::Arc<Config>,
    pub conn: &'c mut Conn,
    pub head: Head,
    /// `Access-Control-*` fields of the answer.
    pub cors: Option<String>,
    /// Bytes of the request's body that are not read yet.
    body_left: u64,
    body_read: u64,
    /// Bytes of the answer's body that are not sent yet.
    answer_left: u64,
    answer_sent: u64,
    answered: bool,
    continued: bool,
    began_ms: u64,
}

impl<'c> Exchange<'c> {
    pub fn new(shard: &'c Rc<Shard>, conn: &'c mut Conn, head: Head) -> Exchange<'c> {
        Exchange {
            config: shard.config.borrow().clone(),
            body_left: head.body_bytes,
            body_read: 0,
            answer_left: 0,
            answer_sent: 0,
            answered: false,
            continued: !head.expects_continue,
            began_ms: shard.fresh_ms(),
            cors: None,
            shard,
            conn,
            head,
        }
    }

    /// A request that comes from another shard: its body was read there.
    pub fn moved(shard: &'c Rc<Shard>, conn: &'c mut Conn, head: Head) -> Exchange<'c> {
        let mut exchange = Exchange::new(shard, conn, head);
        exchange.body_left = 0;
        exchange.continued = true;
        exchange
    }

    /// The client, and whether its way to here is encrypted, as a believed reverse proxy says
    /// (`web.proxies`; `X-Forwarded-For`, `X-Forwarded-Proto`) or as the socket does.
    pub fn client(&self) -> (SocketAddr, bool) {
        let peer = self.conn.peer;
        if !self.is_proxied() {
            return (peer, self.conn.transport.encrypted());
        }
        // the proxy has appended whom it has seen: what stands before is the client's own word
        let last = self.head.all("x-forwarded-for").last();
        let named = last.and_then(|list| list.rsplit(',').next());
        let address = named.and_then(|one| one.trim().trim_matches(['[', ']']).parse().ok());
        let https = self
            .head
            .get("x-forwarded-proto")
            .is_some_and(|proto| proto.eq_ignore_ascii_case("https"));
        let client = address.map_or(peer, |ip| SocketAddr::new(ip, 0));
        (client, https || self.conn.transport.encrypted())
    }

    /// Whether the other end is a reverse proxy that is believed.
    pub fn is_proxied(&self) -> bool {
        self.config.is_web_proxy(self.conn.peer.ip()) && self.head.get("x-forwarded-for").is_some()
    }

    /// A slow peer has the time of a request and what it has moved at the least rate.
    fn deadline_ms(&self, moved: u64) -> u64 {
        let limits = &self.config.limits;
        self.began_ms
            + limits.http_seconds_max * 1000
            + moved * 1000 / limits.http_bytes_per_second_min
    }

    /// Appends the next piece of the request's body to `into`; `false`: that was all. Errors: the client is gone or slower
    /// than `limits.http_bytes_per_second_min`.
    pub async fn read_body(&mut self, into: &mut Vec<u8>) -> Result<bool, Gone> {
        if self.body_left == 0 {
            return Ok(false);
        }
        if !self.continued && self.conn.unread.is_empty() {
            self.continued = true;
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        self.continued = true;
        if self.conn.unread.is_empty() {
            let deadline_ms = self.deadline_ms(self.body_read);
            if self.conn.fill(self.shard, deadline_ms).await.is_err() {
                self.shard.gauges.http_refused.one();
                return Err(Gone);
            }
        }
        let most = usize::try_from(self.body_left).unwrap_or(usize::MAX);
        let taken = self.conn.unread.len().min(most);
        into.extend(self.conn.unread.drain(..taken));
        self.body_left -= taken as u64;
        self.body_read += taken as u64;
        Ok(true)
    }

    /// The whole body of a request that may have `most` bytes. `Ok(None)`: it has more, and that was answered.
    pub async fn whole_body(&mut self, most: usize) -> Result<Option<Vec<u8>>, Gone> {
        if self.head.body_bytes > most as u64 {
            self.shard.gauges.http_refused.one();
            self.answer(Answer::text(413, "the body is too large"))
                .await?;
            return Ok(None);
        }
        let mut body = Vec::with_capacity(self.head.body_bytes as usize);
        while self.read_body(&mut body).await? {}
        Ok(Some(body))
    }

    /// Answers at once.
    pub async fn answer(&mut self, answer: Answer) -> Result<After, Gone> {
        let length = answer.body.len() as u64;
        let mut bytes = self.begin_with(&answer, Some(length));
        if &*self.head.method != "HEAD" {
            bytes.extend_from_slice(&answer.body);
        }
        self.answer_left = 0;
        self.write(&bytes).await?;
        Ok(After::Next)
    }

    /// Switches protocols: `head` is the whole answer.
    pub async fn switch(&mut self, head: &[u8]) -> Result<(), Gone> {
        self.answered = true;
        self.write(head).await
    }

    #[allow(dead_code)] // for uploads
    /// Begins an answer whose body of `length` bytes is then [sent](Self::send) piece by piece (nothing of it after HEAD).
    pub async fn begin(&mut self, answer: Answer, length: u64) -> Result<(), Gone> {
        let bytes = self.begin_with(&answer, Some(length));
        self.answer_left = match &*self.head.method {
            "HEAD" => 0,
            _ => length,
        };
        self.write(&bytes).await
    }

    #[allow(dead_code)] // for uploads
    /// Sends a piece of the body; waits for a client that does not take it. What is more than was announced is an error of the
    /// handler: the connection ends.
    pub async fn send(&mut self, piece: &[u8]) -> Result<(), Gone> {
        if &*self.head.method == "HEAD" {
            return Ok(());
        }
        let length = piece.len() as u64;
        self.answer_left = self.answer_left.checked_sub(length).ok_or(Gone)?;
        self.answer_sent += length;
        self.write(piece).await
    }

    fn begin_with(&mut self, answer: &Answer, length: Option<u64>) -> Vec<u8> {
        self.answered = true;
        // an answer may have waited
        self.began_ms = self.shard.fresh_ms();
        if self.body_left > UNWANTED_BYTES_MAX || !self.continued || self.shard.stopping.get() {
            self.head.keep_alive = false;
        }
        let close = !self.head.keep_alive;
        head_of(
            answer,
            length,
            self.cors.as_deref(),
            close,
            self.head.is_1_1,
        )
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.conn
            .transport
            .write(bytes, &mut self.shard.scratch.borrow_mut())
            .map_err(|_| Gone)?;
        while self.conn.transport.pending() > UNSENT_BYTES_MAX {
            let deadline_ms = self.deadline_ms(self.answer_sent);
            self.conn.ready(self.shard, deadline_ms).await?;
        }
        Ok(())
    }

    /// Whether another request may follow: the answer is complete, and what is left of the request was read away.
    pub async fn end(mut self) -> bool {
        if !self.answered || self.answer_left > 0 {
            return false;
        }
        if !self.head.keep_alive {
            self.last_words().await;
            return false;
        }
        let mut unwanted = Vec::new();
        loop {
            unwanted.clear();
            match self.read_body(&mut unwanted).await {
                Ok(true) => {}
                Ok(false) => return true,
                Err(Gone) => return false,
            }
        }
    }
}

impl Exchange<'_> {
    /// Waits until the client has taken the answer as fast as it must, and has heard it.
    async fn last_words(&mut self) {
        let deadline_ms = self.deadline_ms(self.answer_sent);
        while self.conn.transport.pending() > 0 {
            if self.conn.ready(self.shard, deadline_ms).await.is_err() {
                return;
            }
        }
        if self.body_left > 0 {
            self.conn.linger(self.shard).await;
        }
    }
}

/// The head of an answer, and its body if it is not streamed or left out.
fn head_of(
    answer: &Answer,
    length: Option<u64>,
    cors: Option<&str>,
    close: bool,
    is_1_1: bool,
) -> Vec<u8> {
    let status = answer.status;
    let mut head = format!("HTTP/1.1 {status} {}\r\n", reason(status));
    let now = httpdate::fmt_http_date(SystemTime::now());
    head.push_str(&format!(
        "Date: {now}\r\nX-Content-Type-Options: nosniff\r\n"
    ));
    if !answer
        .headers
        .iter()
        .any(|(name, _)| *name == "Cache-Control")
    {
        head.push_str("Cache-Control: no-store\r\n");
    }
    for (name, value) in &answer.headers {
        // what a handler lets through must not begin a field of its own
        let value: String = value.chars().filter(|c| !c.is_control()).collect();
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !matches!(status, 204 | 304) {
        let length = length.unwrap_or(answer.body.len() as u64);
        head.push_str(&format!("Content-Length: {length}\r\n"));
    }
    if let Some(cors) = cors {
        head.push_str(cors);
    }
    match close {
        true => head.push_str("Connection: close\r\n"),
        false if !is_1_1 => head.push_str("Connection: keep-alive\r\n"),
        false => {}
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    if length.is_none() {
        bytes.extend_from_slice(&answer.body);
    }
    bytes
}

/// RFC 9110 section 15.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        206 => "Partial Content",
        304 => "Not Modified",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        426 => "Upgrade Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "Answer",
    }
}
