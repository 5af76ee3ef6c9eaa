//! WebSocket on the server's side (RFC 6455 section 5), and the framing of XMPP in it (RFC 7395), sans-IO. In: bytes of the client;
//! elements and stream headers for it, as they are written to a TCP stream. Out: the stream that a client on TCP would have sent, with
//! [`MESSAGE`] before each message; frames, one for each element. So everything above sees one kind of stream.
//!
//! Promise: payload is unmasked where the kernel put it and moved once, to close the gaps that headers leave; no message is
//! ever collected here, however it is fragmented, so an idle or slow connection holds no buffer; what leaves is copied once, behind its
//! frame header. Only `<open/>` and `<close/>` are held until they are complete.
//!
//! That is why the framing is our own: tungstenite, soketto, fastwebsockets and ratchet collect each message in a buffer of theirs (and
//! the latter three want an asynchronous runtime); websocket-sans-io works in place, but its only release computes a phase in `u8` that
//! overflows (a panic wherever overflow is checked) and validates nothing.

use std::io::{self, ErrorKind};

use memchr::memmem;

use crate::xml::{
    Attributes, FrameKind, Framer, Limits, MESSAGE, NS_CLIENT, NS_STREAMS, StreamNs, View,
    escape_attr, missing_declaration,
};

/// RFC 7395 section 3.3.
const NS_FRAMING: &str = "urn:ietf:params:xml:ns:xmpp-framing";
/// Payload of a control frame (RFC 6455 section 5.5).
const CONTROL_BYTES_MAX: u64 = 125;
/// Bytes of `<open/>` or `<close/>`.
const FRAMING_BYTES_MAX: usize = 4096;
/// What this server writes is its own business.
const OWN: Limits = Limits {
    stanza_bytes_max: u32::MAX as usize,
    header_bytes_max: 64 * 1024,
    depth_max: u16::MAX,
    attributes_max: u16::MAX,
};

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Status of a Close frame (RFC 6455 section 7.4.1).
type Code = u16;
const NORMAL: Code = 1000;
const PROTOCOL_ERROR: Code = 1002;
const NO_TEXT: Code = 1003;
const NOT_UTF8: Code = 1007;
const POLICY: Code = 1008;
const TOO_BIG: Code = 1009;

/// What one client may send.
#[derive(Clone, Copy, Debug)]
pub struct WebSocketLimits {
    /// Bytes of one message.
    pub message_bytes_max: usize,
    /// Frames of one message.
    pub fragments_max: u32,
}

/// The state of one connection. Holds no payload, beside the short messages named above.
pub(super) struct WebSocket {
    limits: WebSocketLimits,
    /// The head of the frame that is being read; its last four bytes are the key.
    head: [u8; 14],
    head_len: u8,
    /// Of the frame whose payload is being read.
    opcode: u8,
    is_last: bool,
    /// Its mask, turned to the next byte.
    key: [u8; 4],
    payload_left: u64,
    in_payload: bool,
    /// Frames of the message that is not complete; 0: none is.
    fragments: u32,
    message_bytes: u64,
    /// The message may be `<open/>` or `<close/>`: it is in `held`.
    holds: bool,
    held: Vec<u8>,
    /// Payload of a control frame.
    control: Vec<u8>,
    /// The client's Close frame has come, or it has broken the protocol: nothing more is read.
    closed: bool,
    close_sent: bool,
    /// Cuts what is written.
    framer: Framer,
    /// Read with the request that opened it.
    pub(super) early: Vec<u8>,
}

const _: () = assert!(
    size_of::<WebSocket>() <= 256,
    "one per connection: keep it small"
);

/// What one piece of input has become.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decoded {
    /// The first bytes of the input.
    InPlace(usize),
    /// The other buffer.
    Turned,
}

/// Where the stream is put together: in place, until something does not fit.
struct Stream<'b> {
    bytes: &'b mut [u8],
    written: usize,
    turned: &'b mut Vec<u8>,
    is_turned: bool,
}

impl Stream<'_> {
    /// From now on the stream goes to the other buffer.
    fn turn(&mut self) -> &mut Vec<u8> {
        if !self.is_turned {
            self.turned.extend_from_slice(&self.bytes[..self.written]);
            self.is_turned = true;
        }
        self.turned
    }

    /// `read` bytes of the input are consumed. There is room: a frame's head was among them.
    fn begin_message(&mut self, read: usize) {
        if self.is_turned || self.written >= read {
            self.turn().push(MESSAGE);
        } else {
            self.bytes[self.written] = MESSAGE;
            self.written += 1;
        }
    }

    /// Payload that lies unmasked at `from` of the input.
    fn payload(&mut self, from: usize, len: usize) {
        if self.is_turned {
            self.turned.extend_from_slice(&self.bytes[from..from + len]);
        } else {
            if self.written != from {
                self.bytes.copy_within(from..from + len, self.written);
            }
            self.written += len;
        }
    }
}

impl WebSocket {
    pub(super) fn new(limits: WebSocketLimits, early: Vec<u8>) -> WebSocket {
        WebSocket {
            limits,
            head: [0; 14],
            head_len: 0,
            opcode: 0,
            is_last: false,
            key: [0; 4],
            payload_left: 0,
            in_payload: false,
            fragments: 0,
            message_bytes: 0,
            holds: false,
            held: Vec::new(),
            control: Vec::new(),
            closed: false,
            close_sent: false,
            framer: Framer::new(),
            early,
        }
    }

    /// Nothing more is read.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Turns input into the stream, in place or in `turned`; `replies` are frames for the client (pong, close).
    pub(super) fn decode(
        &mut self,
        bytes: &mut [u8],
        turned: &mut Vec<u8>,
        replies: &mut Vec<u8>,
    ) -> Decoded {
        turned.clear();
        let mut stream = Stream {
            bytes,
            written: 0,
            turned,
            is_turned: false,
        };
        let mut pong = None;
        if let Err(code) = self.take(&mut stream, &mut pong) {
            self.closed = true;
            self.close(code, replies);
        }
        // RFC 6455 5.5.3: the newest ping is enough
        if let Some(payload) = pong.filter(|_| !self.close_sent) {
            frame_head(PONG, payload.len(), replies);
            replies.extend_from_slice(&payload);
        }
        match stream.is_turned {
            true => Decoded::Turned,
            false => Decoded::InPlace(stream.written),
        }
    }

    /// An error is the status with which the connection ends.
    fn take(&mut self, stream: &mut Stream<'_>, pong: &mut Option<Vec<u8>>) -> Result<(), Code> {
        let mut read = 0;
        loop {
            if !self.in_payload {
                if !self.take_head(stream.bytes, &mut read)? {
                    return Ok(());
                }
                self.begin_frame(stream, read)?;
            }
            let here = stream.bytes.len() - read;
            let len = usize::try_from(self.payload_left).map_or(here, |left| left.min(here));
            if len > 0 {
                unmask(&mut stream.bytes[read..read + len], &mut self.key);
                if self.opcode >= CLOSE {
                    self.control
                        .extend_from_slice(&stream.bytes[read..read + len]);
                } else {
                    self.payload(stream, read, len);
                }
                self.payload_left -= len as u64;
                read += len;
            }
            if self.payload_left > 0 {
                return Ok(());
            }
            self.in_payload = false;
            if self.opcode >= CLOSE {
                self.end_control(pong)?;
            } else if self.is_last {
                self.fragments = 0;
                if std::mem::take(&mut self.holds) {
                    let held = std::mem::take(&mut self.held);
                    turn_framing(&held, stream.turn());
                }
            }
        }
    }

    /// Whether the head of a frame is complete.
    fn take_head(&mut self, bytes: &[u8], read: &mut usize) -> Result<bool, Code> {
        loop {
            let have = usize::from(self.head_len);
            let need = match have {
                0 | 1 => 2,
                _ => {
                    if self.head[1] & 0x80 == 0 {
                        // section 5.1: a client masks
                        return Err(PROTOCOL_ERROR);
                    }
                    let extended = match self.head[1] & 0x7F {
                        126 => 2,
                        127 => 8,
                        _ => 0,
                    };
                    2 + extended + 4
                }
            };
            if have >= 2 && have == need {
                return Ok(true);
            }
            let taken = (need - have).min(bytes.len() - *read);
            if taken == 0 {
                return Ok(false);
            }
            self.head[have..have + taken].copy_from_slice(&bytes[*read..*read + taken]);
            self.head_len += taken as u8;
            *read += taken;
        }
    }

    fn begin_frame(&mut self, stream: &mut Stream<'_>, read: usize) -> Result<(), Code> {
        let end = usize::from(std::mem::take(&mut self.head_len));
        let head = &self.head[..end];
        self.key.copy_from_slice(&head[end - 4..]);
        let extended = head[2..end - 4]
            .iter()
            .fold(0_u64, |n, b| n << 8 | u64::from(*b));
        let length = match head[1] & 0x7F {
            // section 5.2: the shortest form, the highest bit of eight bytes is 0
            126 if extended < 126 => return Err(PROTOCOL_ERROR),
            127 if extended < 1 << 16 || extended >> 63 != 0 => return Err(PROTOCOL_ERROR),
            126 | 127 => extended,
            short => u64::from(short),
        };
        self.is_last = head[0] & 0x80 != 0;
        self.opcode = head[0] & 0x0F;
        if head[0] & 0x70 != 0 {
            return Err(PROTOCOL_ERROR);
        }
        match self.opcode {
            CLOSE | PING | PONG => {
                if !self.is_last || length > CONTROL_BYTES_MAX {
                    return Err(PROTOCOL_ERROR);
                }
                self.control.clear();
            }
            TEXT if self.fragments == 0 => {
                stream.begin_message(read);
                self.message_bytes = 0;
                self.holds = true;
            }
            CONTINUATION if self.fragments > 0 => {}
            // RFC 7395 3.1: text only
            BINARY if self.fragments == 0 => return Err(NO_TEXT),
            _ => return Err(PROTOCOL_ERROR),
        }
        if self.opcode < CLOSE {
            self.fragments += 1;
            self.message_bytes = self.message_bytes.saturating_add(length);
            if self.fragments > self.limits.fragments_max {
                return Err(POLICY);
            }
            if self.message_bytes > self.limits.message_bytes_max as u64 {
                return Err(TOO_BIG);
            }
        }
        self.payload_left = length;
        self.in_payload = true;
        Ok(())
    }

    /// Unmasked payload of a message at `from` of the input.
    fn payload(&mut self, stream: &mut Stream<'_>, from: usize, len: usize) {
        if !self.holds {
            return stream.payload(from, len);
        }
        let piece = &stream.bytes[from..from + len];
        if self.held.is_empty() && len >= 3 && !may_be_framing(piece) {
            self.holds = false;
            return stream.payload(from, len);
        }
        self.held.extend_from_slice(piece);
        if !may_be_framing(&self.held) || self.held.len() > FRAMING_BYTES_MAX {
            self.holds = false;
            let held = std::mem::take(&mut self.held);
            stream.turn().extend_from_slice(&held);
        }
    }

    fn end_control(&mut self, pong: &mut Option<Vec<u8>>) -> Result<(), Code> {
        let payload = std::mem::take(&mut self.control);
        match self.opcode {
            PING => *pong = Some(payload),
            CLOSE => {
                let code = match &payload[..] {
                    [] => NORMAL,
                    [_] => return Err(PROTOCOL_ERROR),
                    [high, low, reason @ ..] => {
                        let code = u16::from_be_bytes([*high, *low]);
                        if !matches!(code, 1000..=1003 | 1007..=1011 | 3000..=4999) {
                            return Err(PROTOCOL_ERROR);
                        }
                        if std::str::from_utf8(reason).is_err() {
                            return Err(NOT_UTF8);
                        }
                        code
                    }
                };
                // section 5.5.1: echoed, and the connection ends
                return Err(code);
            }
            _ => {}
        }
        Ok(())
    }

    /// The Close frame, once.
    fn close(&mut self, code: Code, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.close_sent, true) {
            frame_head(CLOSE, 2, out);
            out.extend_from_slice(&code.to_be_bytes());
        }
    }

    /// The end of our direction, if it was not said.
    pub(super) fn farewell(&mut self, out: &mut Vec<u8>) {
        self.close(NORMAL, out);
    }

    /// Appends the frames that carry `bytes`: whole elements and headers of a stream.
    ///
    /// Errors: they are not whole.
    pub(super) fn encode(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        let broken = |why: &str| io::Error::new(ErrorKind::InvalidInput, why.to_owned());
        if self.close_sent {
            return Ok(());
        }
        out.reserve(bytes.len() + bytes.len() / 8 + 64);
        let mut rest = bytes;
        while !rest.is_empty() {
            if rest.starts_with(b"<?xml") {
                self.framer.restart();
            }
            let frame = self.framer.next(rest, &OWN);
            let frame = frame.map_err(|error| broken(&error.to_string()))?;
            let frame = frame.ok_or_else(|| broken("half an element"))?;
            let (piece, behind) = rest.split_at(frame.len);
            rest = behind;
            match frame.kind {
                FrameKind::Element => match missing_declaration(piece) {
                    None => text(&[piece], out),
                    Some((at, declaration)) => {
                        text(&[&piece[..at], declaration.as_bytes(), &piece[at..]], out);
                    }
                },
                FrameKind::Header => {
                    let at = memmem::find(piece, b"<stream:stream").unwrap_or(0);
                    let mut open = format!("<open xmlns='{NS_FRAMING}'").into_bytes();
                    for (name, attribute) in Attributes::of(&piece[at..]) {
                        if !name.starts_with(b"xmlns") {
                            open.extend_from_slice(attribute);
                        }
                    }
                    open.extend_from_slice(b"/>");
                    text(&[&open], out);
                }
                FrameKind::End => {
                    let close = format!("<close xmlns='{NS_FRAMING}'/>");
                    text(&[close.as_bytes()], out);
                }
                FrameKind::Whitespace => {}
            }
        }
        Ok(())
    }
}

/// Whether a message that begins so may be `<open/>` or `<close/>`; no stanza begins so.
fn may_be_framing(begin: &[u8]) -> bool {
    let begin = &begin[..begin.len().min(3)];
    b"<op".starts_with(begin) || b"<cl".starts_with(begin)
}

/// What a client on TCP would have sent in place of `<open/>` or `<close/>`; anything else stays as it is.
fn turn_framing(message: &[u8], stream: &mut Vec<u8>) {
    let none = StreamNs::default();
    let limits = Limits {
        header_bytes_max: FRAMING_BYTES_MAX,
        ..Limits::default()
    };
    let trimmed = message.trim_ascii_end();
    match View::parse(trimmed, &none, &limits) {
        Ok(view) if view.ns() == NS_FRAMING && view.name() == "open" => {
            stream.extend_from_slice(
                format!("<stream:stream xmlns='{NS_CLIENT}' xmlns:stream='{NS_STREAMS}'")
                    .as_bytes(),
            );
            for name in ["to", "from", "version", "xml:lang"] {
                if let Some(value) = view.attr(name) {
                    stream.extend_from_slice(format!(" {name}='").as_bytes());
                    escape_attr(&value, stream);
                    stream.push(b'\'');
                }
            }
            stream.push(b'>');
        }
        Ok(view) if view.ns() == NS_FRAMING && view.name() == "close" => {
            stream.extend_from_slice(b"</stream:stream>");
        }
        _ => stream.extend_from_slice(message),
    }
}

/// A text message in one frame.
fn text(pieces: &[&[u8]], out: &mut Vec<u8>) {
    frame_head(TEXT, pieces.iter().map(|piece| piece.len()).sum(), out);
    for piece in pieces {
        out.extend_from_slice(piece);
    }
}

/// The head of a whole, unmasked message.
fn frame_head(opcode: u8, length: usize, out: &mut Vec<u8>) {
    out.push(0x80 | opcode);
    match length {
        0..126 => out.push(length as u8),
        126..65_536 => {
            out.push(126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            out.push(127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

/// Section 5.3, a word at a time; the key is turned to the byte that comes next.
fn unmask(bytes: &mut [u8], key: &mut [u8; 4]) {
    let [a, b, c, d] = *key;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let turned = bytes.len() % 4;
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
    key.rotate_left(turned);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: WebSocketLimits = WebSocketLimits {
        message_bytes_max: 100_000,
        fragments_max: 4,
    };
    const OPEN: &str =
        "<open xmlns='urn:ietf:params:xml:ns:xmpp-framing' to='a&amp;b' version='1.0'/>";
    const HEADER: &str = "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='a&amp;b' version='1.0'>";

    /// A client's frame.
    fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        frame_head(0, payload.len(), &mut frame);
        frame[0] = first;
        frame[1] |= 0x80;
        let key = [0x37, 0xFA, 0x21, 0x3D];
        frame.extend_from_slice(&key);
        frame.extend(payload.iter().zip(key.iter().cycle()).map(|(b, k)| b ^ k));
        frame
    }

    /// The stream and the replies, whatever pieces the input comes in.
    fn decode(input: &[u8], piece: usize) -> (String, Vec<u8>, bool) {
        let mut socket = WebSocket::new(LIMITS, Vec::new());
        let (mut stream, mut turned, mut replies) = (Vec::new(), Vec::new(), Vec::new());
        for bytes in input.chunks(piece) {
            let mut bytes = bytes.to_vec();
            match socket.decode(&mut bytes, &mut turned, &mut replies) {
                Decoded::InPlace(len) => stream.extend_from_slice(&bytes[..len]),
                Decoded::Turned => stream.extend_from_slice(&turned),
            }
            if socket.is_closed() {
                break;
            }
        }
        (
            String::from_utf8(stream).unwrap(),
            replies,
            socket.is_closed(),
        )
    }

    /// The status with which a client's frames end the connection.
    fn status(input: &[u8]) -> u16 {
        let (_, replies, closed) = decode(input, usize::MAX);
        assert!(closed, "{input:02x?} was taken");
        assert_eq!(replies[..2], [0x88, 2]);
        u16::from_be_bytes([replies[2], replies[3]])
    }

    #[test]
    fn messages_become_the_stream_however_they_are_cut_and_fragmented() {
        let long = format!("<message>{}</message>", "x".repeat(70_000));
        let mut input = masked(0x81, OPEN.as_bytes());
        input.extend(masked(0x01, b"<pre"));
        input.extend(masked(0x89, b"are you there"));
        input.extend(masked(0x00, b""));
        input.extend(masked(0x80, b"sence/>"));
        input.extend(masked(0x81, b"<r xmlns='urn:xmpp:sm:3'/>"));
        input.extend(masked(0x81, long.as_bytes()));
        input.extend(masked(0x81, b"<cl/>"));
        input.extend(masked(
            0x81,
            b"<close xmlns='urn:ietf:params:xml:ns:xmpp-framing'/>",
        ));
        let expected = format!(
            "\x1E{HEADER}\x1E<presence/>\x1E<r xmlns='urn:xmpp:sm:3'/>\x1E{long}\x1E<cl/>\x1E</stream:stream>"
        );
        for piece in [1, 2, 3, 5, 7, 64, 1000, 8191, usize::MAX] {
            let (stream, replies, closed) = decode(&input, piece);
            assert!(stream == expected, "in pieces of {piece}");
            assert!(!closed);
            assert_eq!(replies, [b"\x8A\x0D", &b"are you there"[..]].concat());
        }
    }

    #[test]
    fn what_breaks_the_protocol_ends_it_with_its_status() {
        // not masked
        assert_eq!(status(b"\x81\x05hello"), PROTOCOL_ERROR);
        // reserved bits and opcodes
        assert_eq!(status(&masked(0xC1, b"<a/>")), PROTOCOL_ERROR);
        assert_eq!(status(&masked(0x83, b"<a/>")), PROTOCOL_ERROR);
        assert_eq!(status(&masked(0x8B, b"")), PROTOCOL_ERROR);
        // a continuation of nothing, a message within a message
        assert_eq!(status(&masked(0x80, b"<a/>")), PROTOCOL_ERROR);
        assert_eq!(
            status(&[masked(0x01, b"<a"), masked(0x81, b"<a/>")].concat()),
            PROTOCOL_ERROR
        );
        // control frames in fragments, or long
        assert_eq!(status(&masked(0x09, b"")), PROTOCOL_ERROR);
        assert_eq!(status(&masked(0x89, &[b'x'; 126])), PROTOCOL_ERROR);
        assert_eq!(status(&masked(0x82, b"<a/>")), NO_TEXT);
        // lengths that are longer than they need be, or no lengths
        assert_eq!(status(b"\x81\xFE\0\x05abcd<a/>x"), PROTOCOL_ERROR);
        assert_eq!(status(b"\x81\xFF\0\0\0\0\0\0\0\x05abcd"), PROTOCOL_ERROR);
        assert_eq!(status(b"\x81\xFF\x80\0\0\0\0\0\0\0abcd"), PROTOCOL_ERROR);
    }

    #[test]
    fn what_is_huge_is_refused_by_its_head_and_fragments_are_counted() {
        assert_eq!(status(b"\x81\xFF\0\0\0\xFF\0\0\0\0abcd"), TOO_BIG);
        let half = vec![b'x'; 60_000];
        assert_eq!(
            status(&[masked(0x01, &half), masked(0x80, &half)].concat()),
            TOO_BIG
        );
        let mut flood = masked(0x01, b"");
        (0..4).for_each(|_| flood.extend(masked(0x00, b"")));
        assert_eq!(status(&flood), POLICY);
    }

    #[test]
    fn a_close_is_echoed_and_a_wrong_one_is_an_error() {
        assert_eq!(status(&masked(0x88, b"")), NORMAL);
        assert_eq!(status(&masked(0x88, b"\x0F\xA0bye")), 4000);
        assert_eq!(status(&masked(0x88, b"\x03")), PROTOCOL_ERROR);
        assert_eq!(status(&masked(0x88, b"\x03\xED")), PROTOCOL_ERROR);
        assert_eq!(status(&masked(0x88, b"\x03\xE8\xFF")), NOT_UTF8);
    }

    #[test]
    fn what_is_written_to_a_stream_leaves_in_messages_that_stand_alone() {
        let mut socket = WebSocket::new(LIMITS, Vec::new());
        let mut out = Vec::new();
        let header = "<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' id='7' from='x' version='1.0'>";
        for _ in 0..2 {
            socket
                .encode(format!("{header}<stream:features/>").as_bytes(), &mut out)
                .unwrap();
        }
        socket
            .encode(
                b"<message/>\n<a xmlns='urn:xmpp:sm:3' h='1'/></stream:stream>",
                &mut out,
            )
            .unwrap();
        socket.farewell(&mut out);
        socket.farewell(&mut out);
        let open =
            "<open xmlns='urn:ietf:params:xml:ns:xmpp-framing' id='7' from='x' version='1.0'/>";
        let features = "<stream:features xmlns:stream='http://etherx.jabber.org/streams'/>";
        let mut expected = Vec::new();
        for message in [
            open,
            features,
            open,
            features,
            "<message xmlns='jabber:client'/>",
            "<a xmlns='urn:xmpp:sm:3' h='1'/>",
            "<close xmlns='urn:ietf:params:xml:ns:xmpp-framing'/>",
        ] {
            text(&[message.as_bytes()], &mut expected);
        }
        expected.extend_from_slice(b"\x88\x02\x03\xE8");
        assert_eq!(out, expected);
        let mut socket = WebSocket::new(LIMITS, Vec::new());
        socket.encode(header.as_bytes(), &mut out).unwrap();
        assert!(socket.encode(b"<message>", &mut out).is_err());
    }

    /// What a client may say: messages, each in fragments of these lengths, pings among them.
    fn conversation() -> impl Strategy<Value = (Vec<u8>, String)> {
        let message = prop_oneof![
            Just("<presence/>".to_owned()),
            Just("<o/>".to_owned()),
            Just("<cl/>".to_owned()),
            Just(OPEN.to_owned()),
            "<message><body>[ -;=?-~\u{e9}\u{1F600}]{0,300}</body></message>",
        ];
        let fragments = prop::collection::vec(0..40_usize, 0..3);
        let one = (message, fragments, any::<bool>());
        prop::collection::vec(one, 1..8).prop_map(|messages| {
            let (mut input, mut stream) = (Vec::new(), String::new());
            for (message, fragments, ping) in messages {
                let mut rest = message.as_bytes();
                let mut opcode = TEXT;
                for length in fragments {
                    let (piece, behind) = rest.split_at(length.min(rest.len()));
                    input.extend(masked(opcode, piece));
                    if ping {
                        input.extend(masked(0x80 | PING, b"?"));
                    }
                    (rest, opcode) = (behind, CONTINUATION);
                }
                input.extend(masked(0x80 | opcode, rest));
                stream.push('\x1E');
                stream.push_str(match message == OPEN {
                    true => HEADER,
                    false => &message,
                });
            }
            (input, stream)
        })
    }

    proptest! {
        #[test]
        fn cuts_and_fragments_change_nothing(
            (input, expected) in conversation(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(input.len())).collect();
            cuts.sort_unstable();
            let mut socket = WebSocket::new(LIMITS, Vec::new());
            let (mut stream, mut turned, mut replies) = (Vec::new(), Vec::new(), Vec::new());
            for (from, to) in [0].iter().chain(&cuts).zip(cuts.iter().chain([&input.len()])) {
                let mut bytes = input[*from..*to].to_vec();
                match socket.decode(&mut bytes, &mut turned, &mut replies) {
                    Decoded::InPlace(len) => stream.extend_from_slice(&bytes[..len]),
                    Decoded::Turned => stream.extend_from_slice(&turned),
                }
            }
            prop_assert_eq!(String::from_utf8(stream).unwrap(), expected);
            prop_assert!(!socket.is_closed());
        }

        #[test]
        fn bytes_of_any_kind_give_the_same_however_they_are_cut(
            mut input in prop::collection::vec(any::<u8>(), 0..200),
            begins in any::<bool>(),
            piece in 1..50_usize,
        ) {
            if begins {
                // else nearly all ends at the first byte
                input.splice(0..0, masked(0x81, b"<presence/>"));
                input.splice(0..0, masked(0x01, b"<mess"));
                input.splice(11..11, masked(0x80, b"age/>"));
            }
            let bytes = |piece: usize| {
                let mut socket = WebSocket::new(LIMITS, Vec::new());
                let (mut stream, mut turned, mut replies) = (Vec::new(), Vec::new(), Vec::new());
                for bytes in input.chunks(piece) {
                    let mut bytes = bytes.to_vec();
                    match socket.decode(&mut bytes, &mut turned, &mut replies) {
                        Decoded::InPlace(len) => stream.extend_from_slice(&bytes[..len]),
                        Decoded::Turned => stream.extend_from_slice(&turned),
                    }
                    if socket.is_closed() {
                        break;
                    }
                }
                let end = replies.iter().rposition(|byte| *byte == 0x88);
                (stream, end.map(|at| replies[at..].to_vec()), socket.is_closed())
            };
            prop_assert_eq!(bytes(piece), bytes(usize::MAX));
        }
    }
}
