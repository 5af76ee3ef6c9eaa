//! One client's bytes, plain or TLS, each with or without WebSocket in it, behind one type. In: readiness from the shard, plaintext to send. Out: plaintext
//! received. Promise: one call of [`Transport::read`] is at most one `recv`, one call of [`Transport::write`] at most
//! one `send` in the usual case; what the kernel did not take is kept and sent in order
//! (who writes bounds it: look at [`Transport::pending`]).

use super::client_certificate::ClientNames;
use super::socket::Socket;
use super::tls::{ChannelBindings, Opened, Tls, TlsConfig, TlsVersion};
use super::websocket::{Decoded, WebSocket, WebSocketLimits};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes taken from the kernel at once, and the unfinished TLS message (at most 64 KiB of handshake) before them.
const INPUT_BYTES: usize = 96 * 1024;
/// Plaintext encrypted and sent at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// What a shard keeps for frames on their way out; more is given back.
const FRAMED_BYTES_KEPT: usize = 1 << 20;
/// Buffers that all connections of a shard share: make two, one to read with and one to write with, so that answers
/// can be written while the bytes read are still borrowed.
#[derive(Default)]
pub struct Scratch {
    input: Vec<u8>,
    plain: Vec<u8>,
    out: Vec<u8>,
    /// The stream of a WebSocket where it does not fit into its place, and frames on their way out.
    framed: Vec<u8>,
}

impl Scratch {
    /// Without memory until first used.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Scratch {
    /// What was received: as it came, or decrypted.
    fn received(&mut self, sealed: bool) -> &mut [u8] {
        match sealed {
            true => &mut self.plain,
            false => &mut self.input,
        }
    }
}

/// What came, and in which buffer it is.
enum Got {
    Data {
        sealed: bool,
        len: usize,
        more: bool,
    },
    HandshakeDone,
    WouldBlock,
    Eof,
}

/// What one [`Transport::read`] gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Read<'s> {
    /// Plaintext, at least one byte. A handshake that was under way is done.
    Data {
        /// Valid until the scratch is used again.
        bytes: &'s [u8],
        /// Read again: an edge-triggered set reports nothing new. False when the kernel had no more.
        more: bool,
    },
    /// The handshake is done and no data came with it; now [`Transport::write`] may be called. Read again.
    HandshakeDone,
    /// Nothing more now: the readiness set will report.
    WouldBlock,
    /// The peer sends no more. With TLS this is said by close_notify or by the end of the stream.
    Eof,
}

/// The other end passes on what is written here, and says how much of it has arrived where it goes to.
struct Relayed {
    /// Bytes.
    written: u64,
    /// The first so many have arrived; set by the other end.
    arrived: Arc<AtomicU64>,
    /// How many bytes were written when so many messages (each behind those of the mark before) had been.
    marks: VecDeque<(u64, usize)>,
    /// Messages of all marks.
    marked: usize,
}

/// A connection that belongs to one shard at a time; `Send`, to be handed over with all its state.
pub struct Transport {
    socket: Socket,
    tls: Option<Box<Tls>>,
    web: Option<Box<WebSocket>>,
    relayed: Option<Box<Relayed>>,
    /// Bytes as they go to the wire, from `sent` on. Owns no memory when all is sent.
    unsent: Vec<u8>,
    sent: usize,
    /// Sending has failed.
    broken: bool,
}

impl Transport {
    /// Without TLS.
    pub fn plain(socket: Socket) -> Self {
        Self {
            socket,
            tls: None,
            web: None,
            relayed: None,
            unsent: Vec::new(),
            sent: 0,
            broken: false,
        }
    }

    /// Without TLS, to an end of this process that passes on what is written. `arrived`: set by that end, how many bytes of it
    /// the client must have.
    pub fn relayed(socket: Socket, arrived: Arc<AtomicU64>) -> Self {
        Self {
            relayed: Some(Box::new(Relayed {
                written: 0,
                arrived,
                marks: VecDeque::new(),
                marked: 0,
            })),
            ..Self::plain(socket)
        }
    }

    pub fn is_relayed(&self) -> bool {
        self.relayed.is_some()
    }

    /// `messages`: how many have been written and are not known to have arrived. For each write to a relayed one.
    pub fn mark(&mut self, messages: usize) {
        let Some(relayed) = &mut self.relayed else {
            return;
        };
        if messages > relayed.marked {
            let new = messages - relayed.marked;
            relayed.marks.push_back((relayed.written, new));
            relayed.marked = messages;
        }
    }

    /// Of the [marked](Self::mark) messages, oldest first, so many are now known to have arrived.
    pub fn take_arrived(&mut self) -> usize {
        let Some(relayed) = &mut self.relayed else {
            return 0;
        };
        let arrived = relayed.arrived.load(Ordering::Acquire);
        let mut messages = 0;
        while let Some((_, count)) = relayed.marks.pop_front_if(|(end, _)| *end <= arrived) {
            messages += count;
        }
        relayed.marked -= messages;
        messages
    }

    /// Begins a server handshake, for direct TLS or after `<proceed/>` (which must have been written before).
    /// `leftover`: bytes received after the plaintext that asked for it; they are TLS. Read until it blocks afterwards,
    /// whether or not the socket is reported.
    pub fn start_tls(&mut self, config: &TlsConfig, leftover: &[u8]) -> io::Result<()> {
        self.tls = Some(Box::new(Tls::new(config, leftover)?));
        Ok(())
    }

    /// Begins a server handshake for HTTP.
    pub fn start_https(&mut self, config: &TlsConfig) -> io::Result<()> {
        self.tls = Some(Box::new(Tls::https(config)?));
        Ok(())
    }

    /// The socket: its peer, its descriptor for the readiness set.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// WebSocket from here on, `early` being what came behind the request. What is read and written is the XMPP stream that it
    /// carries (RFC 7395), each message behind a [`MESSAGE`](crate::xml::MESSAGE); write whole elements only.
    pub fn start_websocket(&mut self, limits: WebSocketLimits, early: Vec<u8>) {
        self.web = Some(Box::new(WebSocket::new(limits, early)));
    }

    /// Whether the peer was told the end by the transport itself and should be left to hear it.
    pub fn has_said_farewell(&self) -> bool {
        self.web.as_ref().is_some_and(|web| web.is_closed())
    }

    /// Reads once from the kernel and decrypts. During a handshake it also answers the peer; what the kernel does not
    /// take of that is [`pending`](Self::pending).
    ///
    /// Errors: the connection is broken, or the peer violates TLS (`InvalidData`; the alert was sent). Drop it then.
    pub fn read<'s>(&mut self, scratch: &'s mut Scratch) -> io::Result<Read<'s>> {
        if self.web.is_some() {
            return self.read_websocket(scratch);
        }
        Ok(match self.receive(scratch)? {
            Got::Data { sealed, len, more } => Read::Data {
                bytes: &scratch.received(sealed)[..len],
                more,
            },
            Got::HandshakeDone => Read::HandshakeDone,
            Got::WouldBlock => Read::WouldBlock,
            Got::Eof => Read::Eof,
        })
    }

    fn read_websocket<'s>(&mut self, scratch: &'s mut Scratch) -> io::Result<Read<'s>> {
        let (decoded, sealed, more) = 'read: {
            let Some(web) = &mut self.web else {
                return Ok(Read::Eof);
            };
            if web.is_closed() {
                return Ok(Read::Eof);
            }
            let early = std::mem::take(&mut web.early);
            let got = match early.is_empty() {
                true => self.receive(scratch)?,
                false => {
                    let len = early.len();
                    scratch.input = early;
                    Got::Data {
                        sealed: false,
                        len,
                        more: true,
                    }
                }
            };
            let (sealed, len, more) = match got {
                Got::Data { sealed, len, more } => (sealed, len, more),
                Got::HandshakeDone => return Ok(Read::HandshakeDone),
                Got::WouldBlock => return Ok(Read::WouldBlock),
                Got::Eof => return Ok(Read::Eof),
            };
            let Some(web) = &mut self.web else {
                return Ok(Read::Eof);
            };
            let mut framed = std::mem::take(&mut scratch.framed);
            let mut replies = Vec::new();
            let bytes = &mut scratch.received(sealed)[..len];
            let decoded = web.decode(bytes, &mut framed, &mut replies);
            let closed = web.is_closed();
            scratch.framed = framed;
            // who does not read his pongs gets no more of them
            if !replies.is_empty() && (closed || self.pending() == 0) {
                self.send_all(&replies, &mut scratch.out)?;
            }
            // a peer that closed is told so by the next read
            if decoded != Decoded::InPlace(0) || closed {
                break 'read (decoded, sealed, more || closed);
            }
            if !more {
                return Ok(Read::WouldBlock);
            }
            // pings and empty frames alone: callers count their reads, so they hear of each
            return Ok(Read::Data { bytes: &[], more });
        };
        Ok(match decoded {
            Decoded::InPlace(0) => Read::Eof,
            Decoded::InPlace(len) => Read::Data {
                bytes: &scratch.received(sealed)[..len],
                more,
            },
            Decoded::Turned => Read::Data {
                bytes: &scratch.framed,
                more,
            },
        })
    }

    /// Reads once from the kernel and decrypts: into one of the buffers.
    fn receive(&mut self, scratch: &mut Scratch) -> io::Result<Got> {
        let Scratch {
            input, plain, out, ..
        } = scratch;
        input.resize(INPUT_BYTES, 0);
        let Some(tls) = &mut self.tls else {
            return Ok(match receive(&self.socket, input)? {
                None => Got::WouldBlock,
                Some(0) => Got::Eof,
                Some(received) => Got::Data {
                    sealed: false,
                    len: received,
                    more: received == INPUT_BYTES,
                },
            });
        };
        if tls.failed() {
            return Err(ErrorKind::InvalidData.into());
        }
        if tls.closed_by_peer() {
            return Ok(Got::Eof);
        }
        let was_handshaking = tls.handshaking();
        plain.clear();
        loop {
            out.clear();
            let unseen = tls.has_unseen();
            let kept = tls.restore(input)?;
            let (filled, full) = match unseen {
                true => (kept, true),
                false => match receive(&self.socket, &mut input[kept..])? {
                    None => return Ok(Got::WouldBlock),
                    Some(0) => return Ok(Got::Eof),
                    Some(received) => (kept + received, kept + received == INPUT_BYTES),
                },
            };
            let opened = tls.open(&mut input[..filled], plain, out);
            let handshaking = tls.handshaking();
            tls.prepend_held(out);
            if opened.is_ok() && !plain.is_empty() {
                tls.hold(out);
            }
            if !out.is_empty() {
                send_or_keep(&self.socket, &mut self.unsent, &mut self.sent, out)?;
            }
            let closed = opened? == Opened::Closed;
            return Ok(if !plain.is_empty() {
                Got::Data {
                    sealed: true,
                    len: plain.len(),
                    // A peer that closed is told so by the next read.
                    more: full || closed,
                }
            } else if closed {
                Got::Eof
            } else if was_handshaking && !handshaking {
                Got::HandshakeDone
            } else if full {
                continue;
            } else {
                Got::WouldBlock
            });
        }
    }

    /// Sends all of `bytes`: encrypts them where TLS is on, hands them to the kernel in one call, and keeps what it
    /// did not take ([`pending`](Self::pending), to be [`flush`](Self::flush)ed when the socket is writable).
    ///
    /// Errors: the connection is broken; a TLS handshake is under way.
    pub fn write(&mut self, bytes: &[u8], scratch: &mut Scratch) -> io::Result<()> {
        let written = self.try_write(bytes, scratch);
        self.broken |= written.is_err();
        written
    }

    fn try_write(&mut self, bytes: &[u8], scratch: &mut Scratch) -> io::Result<()> {
        let Some(web) = &mut self.web else {
            if let Some(relayed) = &mut self.relayed {
                relayed.written += bytes.len() as u64;
            }
            return self.send_all(bytes, &mut scratch.out);
        };
        let mut framed = std::mem::take(&mut scratch.framed);
        framed.clear();
        let sent = match web.encode(bytes, &mut framed) {
            Ok(()) => self.send_all(&framed, &mut scratch.out),
            Err(error) => Err(error),
        };
        if framed.capacity() <= FRAMED_BYTES_KEPT {
            scratch.framed = framed;
        }
        sent
    }

    /// Encrypts and sends, or keeps.
    fn send_all(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            return send_or_keep(&self.socket, &mut self.unsent, &mut self.sent, bytes);
        };
        for chunk in bytes.chunks(CHUNK_BYTES) {
            out.clear();
            tls.prepend_held(out);
            tls.seal(chunk, out)?;
            send_or_keep(&self.socket, &mut self.unsent, &mut self.sent, out)?;
        }
        Ok(())
    }

    /// Sends what waits; true when nothing waits any more. For every report that the socket is writable.
    pub fn flush(&mut self) -> io::Result<bool> {
        while self.pending() > 0 {
            match taken(self.socket.send(&self.unsent[self.sent..])) {
                Ok(0) => return Ok(false),
                Ok(taken) => self.sent += taken,
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            }
        }
        self.unsent = Vec::new();
        self.sent = 0;
        Ok(true)
    }

    /// [`write`](Self::write) or [`flush`](Self::flush) has failed: what they were given did not arrive. What the peer has sent may
    /// still be read.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Bytes, as they go to the wire, that the kernel has not taken yet.
    pub fn pending(&self) -> usize {
        self.unsent.len() - self.sent
    }

    /// Says `last` and that nothing more will come: TLS's close_notify, if a session stands. What the kernel does not take is
    /// pending like any other bytes. Shut the socket down when nothing is pending: all this and the end of the stream are one
    /// packet then. `false`: the peer has closed its WebSocket, or may not be written to any more, and `last` is not said.
    pub fn finish(&mut self, last: &[u8], scratch: &mut Scratch) -> io::Result<bool> {
        let mut said = !self.has_said_farewell();
        let mut framed = Vec::new();
        let mut last = last;
        if last.len() > CHUNK_BYTES {
            self.write(last, scratch)?;
            last = &[];
        }
        if let Some(web) = &mut self.web {
            // who may not be written to any more may still be told the end
            if web.encode(last, &mut framed).is_err() {
                framed.clear();
                said = false;
            }
            web.farewell(&mut framed);
            last = &framed;
        }
        let out = &mut scratch.out;
        out.clear();
        match &mut self.tls {
            None => out.extend_from_slice(last),
            Some(tls) if tls.handshaking() => return Ok(false),
            Some(tls) => {
                tls.prepend_held(out);
                if !last.is_empty() {
                    tls.seal(last, out)?;
                }
                tls.seal_close(out)?;
            }
        }
        if out.is_empty() {
            return Ok(said);
        }
        let taken = match self.pending() {
            0 => taken(self.socket.send_more(out))?,
            _ => 0,
        };
        keep(&mut self.unsent, &mut self.sent, &out[taken..]);
        Ok(said)
    }

    /// Whether TLS was started and its handshake is not done.
    pub fn handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.handshaking())
    }

    /// Whether what is read and written is encrypted.
    pub fn encrypted(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| !tls.handshaking())
    }

    /// What SCRAM-PLUS may bind to; nothing without TLS.
    pub fn channel_bindings(&self) -> ChannelBindings {
        self.tls
            .as_ref()
            .map(|tls| tls.channel_bindings())
            .unwrap_or_default()
    }

    /// The names in the certificate that the client has shown in its handshake; `Err`: why it does not hold now. `None`: it has
    /// shown none.
    pub fn client_names(&self) -> Option<Result<ClientNames, String>> {
        let names = self.tls.as_ref()?.client_names()?;
        Some(names.map_err(|error| error.to_string()))
    }

    /// Whether its handshake resumed an earlier TLS session.
    pub fn tls_resumed(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.resumed())
    }

    /// The version agreed on; `None` without TLS and early in its handshake.
    pub fn tls_version(&self) -> Option<TlsVersion> {
        self.tls.as_ref()?.version()
    }
}

/// `None`: nothing there.
fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match socket.recv(buffer) {
        Ok(received) => Ok(Some(received)),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

/// 0: the kernel takes nothing now.
fn taken(sent: io::Result<usize>) -> io::Result<usize> {
    match sent {
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(0),
        sent => sent,
    }
}

/// Sends `bytes` behind what waits already, without asking the kernel if something does: it would take nothing.
fn send_or_keep(
    socket: &Socket,
    unsent: &mut Vec<u8>,
    sent: &mut usize,
    bytes: &[u8],
) -> io::Result<()> {
    let taken = match unsent.len() == *sent {
        true => taken(socket.send(bytes))?,
        false => 0,
    };
    keep(unsent, sent, &bytes[taken..]);
    Ok(())
}

/// Keeps what the kernel has not taken.
fn keep(unsent: &mut Vec<u8>, sent: &mut usize, rest: &[u8]) {
    if !rest.is_empty() {
        unsent.drain(..*sent);
        *sent = 0;
        unsent.extend_from_slice(rest);
    }
}
