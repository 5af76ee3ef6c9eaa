//! Ports. In: addresses from the configuration. Out: accepted sockets. Promise: all shards of this process share a port
//! and the kernel spreads connects over them; no second process joins unnoticed; running out of descriptors neither
//! spins nor kills.

use super::socket::{Socket, canonical};
use crate::observe::Counter;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Connections closed unserved because no descriptor was left.
pub static REFUSED_NO_DESCRIPTOR: Counter = Counter::new();

/// Connections that died between connect and accept are skipped in one call; more than these end the call.
const DEAD_CONNECTS_MAX: usize = 64;

/// One shard's share of a listening port.
pub struct Listener {
    fd: OwnedFd,
    address: SocketAddr,
    /// Given up for a moment when no descriptor is left, to accept and close one connection.
    spare: RefCell<Option<File>>,
}

/// Asks once, before the shards start, whether `address` is free: listeners that share a port (`SO_REUSEPORT`) would
/// let a second process of the same user in, and it would take half of the connects. Gives the address with the port that
/// the kernel chose if it was 0; `None`: this machine has no such address family. The error is a sentence.
pub fn probe_port(address: SocketAddr) -> Result<Option<SocketAddr>, String> {
    match bind(address, false) {
        Ok(fd) => {
            let bound = rustix::net::getsockname(&fd).map_err(|e| sentence(address, e.into()))?;
            Ok(Some(bound.try_into().unwrap_or(address)))
        }
        Err(e)
            if address.is_ipv6()
                && matches!(
                    e.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                ) =>
        {
            Ok(None)
        }
        Err(e) => Err(sentence(address, e)),
    }
}

/// Listens at `address` together with the other shards. An IPv6 address takes IPv6 only.
/// `backlog` connects may wait to be accepted. The error is a sentence.
pub fn listen_shared(address: SocketAddr, backlog: i32) -> Result<Listener, String> {
    let open = || -> io::Result<Listener> {
        let fd = bind(address, true)?;
        rustix::net::listen(&fd, backlog)?;
        let address = rustix::net::getsockname(&fd)?.try_into()?;
        Ok(Listener {
            fd,
            address,
            spare: RefCell::new(spare()),
        })
    };
    open().map_err(|e| sentence(address, e))
}

impl Listener {
    /// Takes one connection, nonblocking and closed on exec; `None`: no more at the moment.
    ///
    /// Errors: no descriptor (EMFILE, ENFILE) or no memory is left. One connection was then accepted and closed, so
    /// that a client hears something; the caller stops accepting and tries again after some 100 ms, because an
    /// edge-triggered set reports nothing new.
    pub fn accept(&self) -> io::Result<Option<(Socket, SocketAddr)>> {
        for _ in 0..DEAD_CONNECTS_MAX {
            match self.accept_one() {
                Ok((fd, peer)) => return Ok(Some((Socket::new(fd, peer), peer))),
                Err(Errno::AGAIN) => return Ok(None),
                Err(error @ (Errno::MFILE | Errno::NFILE)) => {
                    self.refuse_one();
                    return Err(error.into());
                }
                Err(error @ (Errno::NOBUFS | Errno::NOMEM)) => return Err(error.into()),
                // accept(2): errors of the new connection, which is gone; the next one may be fine.
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// Where it listens: with the port that the kernel chose, if the configuration said 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn accept_one(&self) -> Result<(OwnedFd, SocketAddr), Errno> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (fd, peer) = rustix::net::acceptfrom_with(&self.fd, flags)?;
        let peer = peer.ok_or(Errno::CONNABORTED)?;
        Ok((fd, canonical(peer.try_into()?)))
    }

    fn refuse_one(&self) {
        let mut spare_fd = self.spare.borrow_mut();
        drop(spare_fd.take());
        if self.accept_one().is_ok() {
            REFUSED_NO_DESCRIPTOR.one();
        }
        *spare_fd = spare();
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

fn bind(address: SocketAddr, shared: bool) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // Old connections in TIME_WAIT do not hinder a restart; a listening socket still does.
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if shared {
        sockopt::set_socket_reuseport(&fd, true)?;
    }
    // Small writes leave at once: a shard collects its output itself. Accepted sockets inherit it (tcp(7) does not say so,
    // Linux does it, a test watches), which saves a call for each.
    sockopt::set_tcp_nodelay(&fd, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, true)?;
    }
    rustix::net::bind(&fd, &address)?;
    Ok(fd)
}

fn sentence(address: SocketAddr, error: io::Error) -> String {
    let port = address.port();
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => format!(
            "port {port} is in use (asked for {address}): another server, perhaps another nitro, listens there; stop it or choose another port"
        ),
        Some(libc::EACCES) => format!(
            "port {port} may not be opened by this user: choose a port above 1023, or give the binary CAP_NET_BIND_SERVICE"
        ),
        Some(libc::EADDRNOTAVAIL) => {
            format!(
                "{address} is not an address of this machine: choose one that `ip address` lists, or 0.0.0.0"
            )
        }
        Some(libc::EAFNOSUPPORT) => {
            format!(
                "{address} cannot be used because IPv6 is off on this machine: listen on an IPv4 address"
            )
        }
        _ => format!("cannot listen at {address}: {error}"),
    }
}
