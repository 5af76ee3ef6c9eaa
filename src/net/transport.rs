//! One client's bytes, plain or TLS, behind one type. In: readiness from the shard, plaintext to send. Out: plaintext
//! received. Promise: one call of [`Transport::read`] is at most one `recv`, one call of [`Transport::write`] at most
//! one `send` in the usual case; what the kernel did not take is kept and sent in order
//! (who writes bounds it: look at [`Transport::pending`]).

use super::socket::Socket;
use super::tls::{ChannelBindings, Opened, Tls, TlsConfig, TlsVersion};
use std::io::{self, ErrorKind};

/// Bytes taken from the kernel at once, and the unfinished TLS message (at most 64 KiB of handshake) before them.
const INPUT_BYTES: usize = 96 * 1024;
/// Plaintext encrypted and sent at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// Buffers that all connections of a shard share: make two, one to read with and one to write with, so that answers
/// can be written while the bytes read are still borrowed.
#[derive(Default)]
pub struct Scratch {
    input: Vec<u8>,
    plain: Vec<u8>,
    out: Vec<u8>,
}

impl Scratch {
    /// Without memory until first used.
    pub fn new() -> Self {
        Self::default()
    }
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

/// A connection that belongs to one shard at a time; `Send`, to be handed over with all its state.
pub struct Transport {
    socket: Socket,
    tls: Option<Box<Tls>>,
    /// Bytes as they go to the wire, from `sent` on. Owns no memory when all is sent.
    unsent: Vec<u8>,
    sent: usize,
}

impl Transport {
    /// Without TLS.
    pub fn plain(socket: Socket) -> Self {
        Self {
            socket,
            tls: None,
            unsent: Vec::new(),
            sent: 0,
        }
    }

    /// Begins a server handshake, for direct TLS or after `<proceed/>` (which must have been written before).
    /// `leftover`: bytes received after the plaintext that asked for it; they are TLS. Read until it blocks afterwards,
    /// whether or not the socket is reported.
    pub fn start_tls(&mut self, config: &TlsConfig, leftover: &[u8]) -> io::Result<()> {
        self.tls = Some(Box::new(Tls::new(config, leftover)?));
        Ok(())
    }

    /// The socket: its peer, its descriptor for the readiness set.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Reads once from the kernel and decrypts. During a handshake it also answers the peer; what the kernel does not
    /// take of that is [`pending`](Self::pending).
    ///
    /// Errors: the connection is broken, or the peer violates TLS (`InvalidData`; the alert was sent). Drop it then.
    pub fn read<'s>(&mut self, scratch: &'s mut Scratch) -> io::Result<Read<'s>> {
        let Scratch { input, plain, out } = scratch;
        input.resize(INPUT_BYTES, 0);
        let Some(tls) = &mut self.tls else {
            return Ok(match receive(&self.socket, input)? {
                None => Read::WouldBlock,
                Some(0) => Read::Eof,
                Some(received) => Read::Data {
                    bytes: &input[..received],
                    more: received == INPUT_BYTES,
                },
            });
        };
        if tls.failed() {
            return Err(ErrorKind::InvalidData.into());
        }
        if tls.closed_by_peer() {
            return Ok(Read::Eof);
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
                    None => return Ok(Read::WouldBlock),
                    Some(0) => return Ok(Read::Eof),
                    Some(received) => (kept + received, kept + received == INPUT_BYTES),
                },
            };
            let opened = tls.open(&mut input[..filled], plain, out);
            let handshaking = tls.handshaking();
            if !out.is_empty() {
                send_or_keep(&self.socket, &mut self.unsent, &mut self.sent, out)?;
            }
            let closed = opened? == Opened::Closed;
            return Ok(if !plain.is_empty() {
                Read::Data {
                    bytes: plain,
                    // A peer that closed is told so by the next read.
                    more: full || closed,
                }
            } else if closed {
                Read::Eof
            } else if was_handshaking && !handshaking {
                Read::HandshakeDone
            } else if full {
                continue;
            } else {
                Read::WouldBlock
            });
        }
    }

    /// Sends all of `bytes`: encrypts them where TLS is on, hands them to the kernel in one call, and keeps what it
    /// did not take ([`pending`](Self::pending), to be [`flush`](Self::flush)ed when the socket is writable).
    ///
    /// Errors: the connection is broken; a TLS handshake is under way.
    pub fn write(&mut self, bytes: &[u8], scratch: &mut Scratch) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            return send_or_keep(&self.socket, &mut self.unsent, &mut self.sent, bytes);
        };
        for chunk in bytes.chunks(CHUNK_BYTES) {
            scratch.out.clear();
            tls.seal(chunk, &mut scratch.out)?;
            send_or_keep(&self.socket, &mut self.unsent, &mut self.sent, &scratch.out)?;
        }
        Ok(())
    }

    /// Sends what waits; true when nothing waits any more. For every report that the socket is writable.
    pub fn flush(&mut self) -> io::Result<bool> {
        while self.pending() > 0 {
            match send(&self.socket, &self.unsent[self.sent..])? {
                0 => return Ok(false),
                taken => self.sent += taken,
            }
        }
        self.unsent = Vec::new();
        self.sent = 0;
        Ok(true)
    }

    /// Bytes, as they go to the wire, that the kernel has not taken yet.
    pub fn pending(&self) -> usize {
        self.unsent.len() - self.sent
    }

    /// Tells the peer that nothing more will come: TLS's close_notify, if a session stands. Sent or pending like any
    /// other bytes; shut the socket down when nothing is pending.
    pub fn close_notify(&mut self, scratch: &mut Scratch) -> io::Result<()> {
        let Some(tls) = self.tls.as_mut().filter(|tls| !tls.handshaking()) else {
            return Ok(());
        };
        scratch.out.clear();
        tls.seal_close(&mut scratch.out)?;
        send_or_keep(&self.socket, &mut self.unsent, &mut self.sent, &scratch.out)
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
fn send(socket: &Socket, bytes: &[u8]) -> io::Result<usize> {
    match socket.send(bytes) {
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
        true => send(socket, bytes)?,
        false => 0,
    };
    if taken < bytes.len() {
        unsent.drain(..*sent);
        *sent = 0;
        unsent.extend_from_slice(&bytes[taken..]);
    }
    Ok(())
}
