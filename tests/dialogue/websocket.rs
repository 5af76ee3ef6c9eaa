//! A stream over WebSocket (RFC 7395), as tungstenite understands RFC 6455: a server whose frames only its own tests can read
//! is found out. Each message is judged for itself, so namespaces that stand elsewhere do not count.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use tungstenite::client::IntoClientRequest;
use tungstenite::http::{HeaderName, HeaderValue};
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Error, Message};

use super::connection::{ANSWER_WITHIN, Came, Connection, Web};
use super::xml::{self, Item};

const FRAMING: &str = "urn:ietf:params:xml:ns:xmpp-framing";

pub struct WebSocket {
    socket: tungstenite::WebSocket<TcpStream>,
}

impl WebSocket {
    /// The handshake (section 3.1); `fields`: more of its header.
    pub fn connect(
        server: SocketAddr,
        fields: &[(&'static str, &str)],
    ) -> Result<Connection, String> {
        let stream = TcpStream::connect_timeout(&server, ANSWER_WITHIN)
            .map_err(|why| format!("connect: {why}"))?;
        stream.set_nodelay(true).map_err(|why| why.to_string())?;
        let mut request = format!("ws://{server}/ws")
            .into_client_request()
            .map_err(|why| why.to_string())?;
        for (name, value) in [("sec-websocket-protocol", "xmpp")].iter().chain(fields) {
            let value = HeaderValue::from_str(value).map_err(|why| why.to_string())?;
            request
                .headers_mut()
                .insert(HeaderName::from_static(name), value);
        }
        let (socket, _) =
            tungstenite::client(request, stream).map_err(|why| format!("handshake: {why}"))?;
        Ok(Connection::over_web(Box::new(WebSocket { socket })))
    }

    fn message(&mut self, text: &str) -> Result<(), String> {
        self.socket
            .send(Message::text(text))
            .map_err(|why| format!("send: {why}"))
    }
}

impl Web for WebSocket {
    fn open(&mut self, domain: &str) -> Result<(), String> {
        self.message(&format!(
            "<open xmlns='{FRAMING}' to='{domain}' version='1.0'/>"
        ))
    }

    fn send(&mut self, xml: &str) -> Result<(), String> {
        for element in xml::standalone(xml) {
            self.message(&element)?;
        }
        Ok(())
    }

    fn send_raw(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.message(std::str::from_utf8(bytes).map_err(|why| why.to_string())?)
    }

    fn close(&mut self) -> Result<(), String> {
        self.message(&format!("<close xmlns='{FRAMING}'/>"))
    }

    fn read(&mut self, deadline: Instant, inbox: &mut VecDeque<Item>) -> Result<Came, String> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Came::Nothing);
        }
        let set = self.socket.get_ref().set_read_timeout(Some(left));
        set.map_err(|why| why.to_string())?;
        match self.socket.read() {
            Ok(Message::Text(text)) => {
                if !text.starts_with('<') {
                    return Err(format!("a message that does not begin with '<': {text}"));
                }
                let element = xml::parse(&text).map_err(|why| format!("{why} in: {text}"))?;
                inbox.push_back(match (&*element.namespace, &*element.name) {
                    (FRAMING, "open") => Item::Header(element),
                    (FRAMING, "close") => Item::End,
                    _ => Item::Element(element),
                });
                Ok(Came::Some)
            }
            Ok(Message::Close(Some(frame)))
                if !matches!(frame.code, CloseCode::Normal | CloseCode::Away) =>
            {
                Err(format!("the server closed with {}", frame.code))
            }
            Ok(Message::Binary(_)) => Err("a binary message came".to_owned()),
            Ok(_) => Ok(Came::Some),
            Err(Error::ConnectionClosed | Error::AlreadyClosed) => Ok(Came::End),
            Err(Error::Io(why))
                if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
            {
                Ok(Came::Nothing)
            }
            Err(Error::Io(why)) if why.kind() == ErrorKind::ConnectionReset => Ok(Came::End),
            Err(why) => Err(format!("receive: {why}")),
        }
    }
}
