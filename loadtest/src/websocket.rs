//! XMPP over WebSocket (RFC 7395, RFC 6455): the upgrade and the frames of one client.
//!
//! In: bytes off the wire, and the elements that the client has for the server. Out: whole messages, and in [`Framing::wire`]
//! what is to be written, masked. What the client has to say before the upgrade is answered waits.

use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::digest;
use base64::prelude::{BASE64_STANDARD, Engine};
use memchr::memmem;

use crate::element;
use crate::scanner::Scanner;

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// What a server's answer to the upgrade, and one message, may have at most.
const ANSWER_BYTES_MAX: usize = 16 << 10;
const MESSAGE_BYTES_MAX: u64 = 64 << 20;

/// A bit of a frame's first byte: the last one of its message; and of its second one.
const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the server refused WebSocket: {0}")]
    Refused(String),
    #[error("the server's WebSocket frames are not RFC 6455: {0}")]
    Malformed(&'static str),
    #[error("the server closed the WebSocket{0}")]
    Closed(String),
}

/// What there is at the beginning of the bytes read.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// More bytes are needed.
    Nothing,
    /// So many bytes had nothing for the client.
    Skip(usize),
    /// A message in one frame is at `start..end`; what follows begins at `end`.
    Message { start: usize, end: usize },
    /// The last frame of a message of several, which [`Framing::message`] has whole; what follows begins here.
    Joined(usize),
}

pub struct Framing {
    /// Bytes for the server, framed.
    pub wire: Vec<u8>,
    /// A message of several frames, as far as it is there.
    pub message: Vec<u8>,
    in_message: bool,
    upgraded: bool,
    /// The answer to our key that proves a WebSocket server (RFC 6455, section 4.1).
    accept: String,
    random: u64,
}

impl Framing {
    /// The upgrade is in `wire`.
    pub fn new(path: &str, host: &str) -> Framing {
        static SEED: AtomicU64 = AtomicU64::new(0x9e37_79b9_7f4a_7c15);
        let mut framing = Framing {
            wire: Vec::new(),
            message: Vec::new(),
            in_message: false,
            upgraded: false,
            accept: String::new(),
            random: SEED.fetch_add(0x2545_f491_4f6c_dd1d, Ordering::Relaxed),
        };
        let words = [(); 4].map(|()| framing.masking_key());
        let key = BASE64_STANDARD.encode(words.concat());
        framing.accept = accept(&key);
        framing.wire.extend_from_slice(
            format!(
                "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n\
                 Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: xmpp\r\n\r\n"
            )
            .as_bytes(),
        );
        framing
    }

    /// Each element of `out` becomes a message in `wire`.
    pub fn frame(&mut self, out: &mut Vec<u8>) {
        if !self.upgraded {
            return;
        }
        let mut scanner = Scanner::inside();
        let mut at = 0;
        while let Some(item) = scanner.next(&out[at..]) {
            let element = &out[at + item.start..at + item.end];
            at += item.end;
            let name = element::name(element);
            // RFC 7395, section 3.3.3: a message stands for itself, with its namespace
            let (head, rest) = match name {
                b"message" | b"presence" | b"iq" => element.split_at(1 + name.len()),
                _ => element.split_at(0),
            };
            let namespace: &[u8] = match head {
                [] => b"",
                _ => b" xmlns='jabber:client'",
            };
            self.write(TEXT, &[head, namespace, rest]);
        }
        debug_assert_eq!(at, out.len(), "whole elements are written");
        out.clear();
    }

    /// What is next in `bytes`. Afterwards those that it covers are not given again.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Read, Error> {
        if !self.upgraded {
            return self.read_answer(bytes);
        }
        let Some((first, second)) = bytes.first().zip(bytes.get(1)) else {
            return Ok(Read::Nothing);
        };
        if second & MASKED != 0 {
            return Err(Error::Malformed("a masked frame"));
        }
        let (length, start) = match (second & 0x7f, &bytes[2..]) {
            (126, [a, b, ..]) => (u64::from(u16::from_be_bytes([*a, *b])), 4),
            (127, [a, b, c, d, e, f, g, h, ..]) => {
                (u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]), 10)
            }
            (126 | 127, _) => return Ok(Read::Nothing),
            (short, _) => (u64::from(short), 2),
        };
        if length.saturating_add(self.message.len() as u64) > MESSAGE_BYTES_MAX {
            return Err(Error::Malformed("a message without end"));
        }
        let end = start + length as usize;
        let Some(payload) = bytes.get(start..end) else {
            return Ok(Read::Nothing);
        };
        let last = first & FIN != 0;
        match first & 0x7f {
            TEXT if self.in_message => Err(Error::Malformed("a message within a message")),
            TEXT if last => Ok(Read::Message { start, end }),
            TEXT => {
                self.in_message = true;
                self.message.clear();
                self.message.extend_from_slice(payload);
                Ok(Read::Skip(end))
            }
            0 if !self.in_message => Err(Error::Malformed("a continuation of nothing")),
            0 => {
                self.message.extend_from_slice(payload);
                self.in_message = !last;
                Ok(match last {
                    true => Read::Joined(end),
                    false => Read::Skip(end),
                })
            }
            PING if last => {
                self.write(PONG, &[payload]);
                Ok(Read::Skip(end))
            }
            PONG if last => Ok(Read::Skip(end)),
            CLOSE => Err(Error::Closed(match payload {
                [a, b, ..] => format!(" with {}", u16::from_be_bytes([*a, *b])),
                _ => String::new(),
            })),
            BINARY => Err(Error::Malformed("a binary message")),
            _ => Err(Error::Malformed("an unknown frame")),
        }
    }

    fn read_answer(&mut self, bytes: &[u8]) -> Result<Read, Error> {
        let Some(end) = memmem::find(bytes, b"\r\n\r\n") else {
            return match bytes.len() > ANSWER_BYTES_MAX {
                true => Err(Error::Refused("an answer without end".into())),
                false => Ok(Read::Nothing),
            };
        };
        let answer = String::from_utf8_lossy(&bytes[..end]);
        let mut lines = answer.split("\r\n");
        let status = lines.next().unwrap_or_default();
        if status.split(' ').nth(1) != Some("101") {
            return Err(Error::Refused(status.to_owned()));
        }
        let accepted = lines
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("Sec-WebSocket-Accept"))
            .is_some_and(|(_, value)| value.trim() == self.accept);
        if !accepted {
            return Err(Error::Refused("it does not answer our key".into()));
        }
        self.upgraded = true;
        self.accept = String::new();
        Ok(Read::Skip(end + 4))
    }

    fn write(&mut self, kind: u8, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let wire = &mut self.wire;
        wire.push(FIN | kind);
        match length {
            0..126 => wire.push(MASKED | length as u8),
            126..0x1_0000 => {
                wire.push(MASKED | 126);
                wire.extend_from_slice(&(length as u16).to_be_bytes());
            }
            _ => {
                wire.push(MASKED | 127);
                wire.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        let key = self.masking_key();
        self.wire.extend_from_slice(&key);
        let start = self.wire.len();
        for part in parts {
            self.wire.extend_from_slice(part);
        }
        mask(&mut self.wire[start..], key);
    }

    /// A new one each time; that nobody can guess it is for browsers to care about.
    fn masking_key(&mut self) -> [u8; 4] {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((self.random >> 32) as u32).to_ne_bytes()
    }
}

fn mask(payload: &mut [u8], key: [u8; 4]) {
    let word = u32::from_ne_bytes(key);
    let word = u64::from(word) << 32 | u64::from(word);
    let mut words = payload.chunks_exact_mut(8);
    for bytes in &mut words {
        let masked = u64::from_ne_bytes((&*bytes).try_into().expect("chunks of 8")) ^ word;
        bytes.copy_from_slice(&masked.to_ne_bytes());
    }
    for (byte, key) in words.into_remainder().iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
}

/// RFC 6455, section 4.2.2.
pub fn accept(key: &str) -> String {
    let key = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let hash = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, key.as_bytes());
    BASE64_STANDARD.encode(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upgraded() -> Framing {
        let mut framing = Framing::new("/ws", "localhost");
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nsec-websocket-accept: {}\r\n\r\n",
            framing.accept
        );
        for cut in 0..answer.len() {
            let read = framing.read(&answer.as_bytes()[..cut]).unwrap();
            assert_eq!(read, Read::Nothing, "{cut}");
        }
        let read = framing.read(answer.as_bytes()).unwrap();
        assert_eq!(read, Read::Skip(answer.len()));
        framing.wire.clear();
        framing
    }

    #[test]
    fn the_key_is_answered_as_in_the_rfc() {
        assert_eq!(
            accept("dGhlIHNhbXBsZSBub25jZQ=="),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
    }

    #[test]
    fn nothing_is_framed_before_the_upgrade_and_a_refusal_is_told() {
        let mut framing = Framing::new("/ws", "localhost");
        assert!(framing.wire.starts_with(b"GET /ws HTTP/1.1\r\n"));
        let (mut out, before) = (b"<open/>".to_vec(), framing.wire.len());
        framing.frame(&mut out);
        assert_eq!((&out[..], framing.wire.len()), (&b"<open/>"[..], before));
        let refused = framing.read(b"HTTP/1.1 403 Forbidden\r\n\r\n").unwrap_err();
        assert!(refused.to_string().contains("403 Forbidden"));
        let unproven = framing.read(b"HTTP/1.1 101 Yes\r\n\r\n").unwrap_err();
        assert!(unproven.to_string().contains("our key"), "{unproven}");
    }

    #[test]
    fn each_element_is_one_masked_message_with_its_namespace() {
        let mut framing = upgraded();
        let long = format!("<message to='a'><body>{}</body></message>", "x".repeat(300));
        let mut out = [&long, "<r xmlns='urn:xmpp:sm:3'/>", "<presence/>"]
            .concat()
            .into_bytes();
        framing.frame(&mut out);
        assert!(out.is_empty());
        let (mut wire, mut said) = (&framing.wire[..], Vec::new());
        while let [first, second, rest @ ..] = wire {
            assert_eq!((*first, second & MASKED), (FIN | TEXT, MASKED));
            let (length, rest) = match second & 0x7f {
                126 => (usize::from(rest[0]) << 8 | usize::from(rest[1]), &rest[2..]),
                short => (short.into(), rest),
            };
            let (key, rest) = rest.split_at(4);
            let (payload, rest) = rest.split_at(length);
            assert_ne!(key, [0; 4]);
            let plain = payload
                .iter()
                .zip(key.iter().cycle())
                .map(|(byte, key)| byte ^ key);
            said.push(String::from_utf8(plain.collect()).unwrap());
            wire = rest;
        }
        let message = long.replacen("<message", "<message xmlns='jabber:client'", 1);
        assert_eq!(
            said,
            [
                &message,
                "<r xmlns='urn:xmpp:sm:3'/>",
                "<presence xmlns='jabber:client'/>"
            ]
        );
    }

    #[test]
    fn messages_in_one_frame_and_in_several_are_read_and_pings_answered() {
        let mut framing = upgraded();
        let bytes = [
            b"\x81\x04<a/>".as_slice(),
            b"\x01\x02<b\x89\x01!\x80\x02/>",
            b"\x81\x7e\x00\x04<c/>",
            b"\x88\x02\x03\xe8",
        ]
        .concat();
        let (mut at, mut read) = (0, Vec::new());
        let error = loop {
            // nothing is taken before it is whole
            let whole = (at..=bytes.len()).find_map(|cut| match framing.read(&bytes[at..cut]) {
                Ok(Read::Nothing) => None,
                read => Some(read),
            });
            match whole.expect("all is there") {
                Ok(Read::Message { start, end }) => {
                    read.push(bytes[at + start..at + end].to_vec());
                    at += end;
                }
                Ok(Read::Joined(end)) => {
                    read.push(framing.message.clone());
                    at += end;
                }
                Ok(Read::Skip(end)) => at += end,
                Ok(Read::Nothing) => unreachable!("passed over"),
                Err(error) => break error,
            }
        };
        assert_eq!(read, [b"<a/>", b"<b/>", b"<c/>"]);
        assert_eq!(framing.wire.len(), 2 + 4 + 1);
        assert!(error.to_string().ends_with("with 1000"), "{error}");
    }
}
