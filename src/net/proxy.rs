//! PROXY protocol, version 2. In: the first bytes of a connection from a trusted proxy. Out: whom the proxy speaks for,
//! and where its header ends. Promise: bounded; a proxied connection never passes for a loopback one.
//!
//! Source: <https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt>, section 2.2.

use super::socket::canonical;
use ppp::v2::{Addresses, Command, Header, ParseError};
use std::net::SocketAddr;

/// A header with all its extensions may be this long; proxies send some hundred bytes at most.
pub const PROXY_HEADER_MAX_BYTES: usize = 2048;

/// Whom the proxy speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxied {
    /// A client at this address.
    Client(SocketAddr),
    /// A client that did not come by TCP, or whose address the proxy does not know. Not a local one.
    Unknown,
    /// The proxy itself, usually to see whether this server lives (command LOCAL).
    Proxy,
}

/// The bytes are no acceptable header: close the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// Longer than [`PROXY_HEADER_MAX_BYTES`].
    #[error("the PROXY header is too long")]
    TooLong,
    /// Not version 2, or broken.
    #[error("no valid PROXY v2 header: {0}")]
    Malformed(String),
}

/// Reads the header at the start of `bytes`. `Ok(None)`: not complete yet, try again with more. Else whom it names and
/// its length in bytes; what follows is the client's.
pub fn parse_proxy_header(bytes: &[u8]) -> Result<Option<(Proxied, usize)>, ProxyError> {
    match Header::try_from(bytes) {
        Ok(header) if header.len() > PROXY_HEADER_MAX_BYTES => Err(ProxyError::TooLong),
        Ok(header) => Ok(Some((proxied(&header), header.len()))),
        Err(ParseError::Partial(_, announced)) if announced + 16 > PROXY_HEADER_MAX_BYTES => {
            Err(ProxyError::TooLong)
        }
        Err(ParseError::Incomplete(_) | ParseError::Partial(..)) => Ok(None),
        Err(error) => Err(ProxyError::Malformed(error.to_string())),
    }
}

fn proxied(header: &Header<'_>) -> Proxied {
    if header.command == Command::Local {
        return Proxied::Proxy;
    }
    match header.addresses {
        Addresses::IPv4(ip) => Proxied::Client((ip.source_address, ip.source_port).into()),
        Addresses::IPv6(ip) => {
            Proxied::Client(canonical((ip.source_address, ip.source_port).into()))
        }
        Addresses::Unspecified | Addresses::Unix(_) => Proxied::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
        bytes.extend([0x20 | command, family]);
        bytes.extend((body.len() as u16).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    const V4: [u8; 12] = [192, 0, 2, 1, 192, 0, 2, 9, 0x30, 0x39, 0x14, 0x66];

    #[test]
    fn the_client_is_named_and_what_follows_is_left() {
        let mut bytes = header(1, 0x11, &V4);
        let length = bytes.len();
        bytes.extend(b"<stream");
        let client = Proxied::Client("192.0.2.1:12345".parse().unwrap());
        assert_eq!(parse_proxy_header(&bytes), Ok(Some((client, length))));
        let mut v6 = [0u8; 36];
        v6[..16].copy_from_slice(
            &"2001:db8::7"
                .parse::<std::net::Ipv6Addr>()
                .unwrap()
                .octets(),
        );
        v6[33] = 99;
        let client = Proxied::Client("[2001:db8::7]:99".parse().unwrap());
        let bytes = header(1, 0x21, &v6);
        assert_eq!(parse_proxy_header(&bytes), Ok(Some((client, 52))));
    }

    #[test]
    fn a_header_may_come_byte_by_byte() {
        let bytes = header(1, 0x11, &V4);
        for cut in 0..bytes.len() {
            assert_eq!(parse_proxy_header(&bytes[..cut]), Ok(None), "cut at {cut}");
        }
    }

    #[test]
    fn a_health_check_and_an_unknown_client_are_told_apart() {
        let says = |bytes: Vec<u8>| parse_proxy_header(&bytes).unwrap().unwrap().0;
        assert_eq!(says(header(0, 0, &[])), Proxied::Proxy);
        assert_eq!(says(header(1, 0, &[])), Proxied::Unknown);
        assert_eq!(says(header(1, 0x31, &[0; 216])), Proxied::Unknown);
    }

    #[test]
    fn rubbish_and_endless_headers_are_refused() {
        let malformed =
            |bytes: &[u8]| matches!(parse_proxy_header(bytes), Err(ProxyError::Malformed(_)));
        assert!(malformed(b"<stream:stream>"));
        assert!(malformed(b"PROXY TCP4 192.0.2.1 192.0.2.9 1 2\r\n"));
        assert!(malformed(&header(7, 0x11, &V4)));
        assert!(malformed(&header(1, 0x11, &V4[..4])));
        let long = header(1, 0x11, &[0; 4000]);
        assert_eq!(parse_proxy_header(&long), Err(ProxyError::TooLong));
        assert_eq!(parse_proxy_header(&long[..16]), Err(ProxyError::TooLong));
    }
}
