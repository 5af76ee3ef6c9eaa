//! One connected stream socket. In: a descriptor. Out: bytes, without ever waiting. Promise: every call is one system
//! call, and a peer that is gone is an error, never a signal.

use rustix::net::{RecvFlags, SendFlags, Shutdown};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// A nonblocking TCP or unix stream. Closed when dropped.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    peer: SocketAddr,
}

impl Socket {
    /// `fd` is a connected, nonblocking stream socket.
    pub(super) fn new(fd: OwnedFd, peer: SocketAddr) -> Self {
        Self { fd, peer }
    }

    /// Reads what is there, at most `buffer.len()` bytes. `Ok(0)`: the peer sends no more. `WouldBlock`: nothing yet.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (taken, _) = rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT)?;
        Ok(taken)
    }

    /// Hands bytes to the kernel; returns how many it took. `WouldBlock`: its buffer is full.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::net::send(&self.fd, bytes, flags)?)
    }

    /// The same, but the kernel may keep them until more bytes or the end of the stream go with them.
    pub fn send_more(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL | SendFlags::MORE;
        Ok(rustix::net::send(&self.fd, bytes, flags)?)
    }

    /// Ends the sending direction: the peer reads an end of stream after all that was sent.
    pub fn shutdown(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.fd, Shutdown::Write)?)
    }

    /// Where the peer is, IPv4 in its own form even on a dual-stack listener. For a unix socket `127.0.0.1:0`. Behind
    /// a trusted proxy this is the proxy until [`set_peer`](Self::set_peer).
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Replaces the peer's address by what a trusted proxy says.
    pub fn set_peer(&mut self, peer: SocketAddr) {
        self.peer = canonical(peer);
    }

    /// Bytes that the kernel took and the peer has not acknowledged (SIOCOUTQ). Zero after a shutdown means that
    /// everything arrived.
    pub fn unsent(&self) -> io::Result<usize> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: this request (SIOCOUTQ, the same number as TIOCOUTQ) writes one c_int through the pointer.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(usize::try_from(bytes).unwrap_or(0))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl TryFrom<TcpStream> for Socket {
    type Error = io::Error;

    fn try_from(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let peer = canonical(stream.peer_addr()?);
        Ok(Self::new(stream.into(), peer))
    }
}

impl TryFrom<UnixStream> for Socket {
    type Error = io::Error;

    fn try_from(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self::new(stream.into(), (Ipv4Addr::LOCALHOST, 0).into()))
    }
}

/// An IPv4 address that came through an IPv6 socket (`::ffff:192.0.2.1`) in its own form, so that limits and networks
/// in the configuration mean both.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
