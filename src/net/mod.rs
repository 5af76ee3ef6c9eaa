//! Bytes in and out. In: sockets, as the kernel reports them ready. Out: plaintext of the peer, and what the shard has
//! to say, encrypted where TLS is on. Promise: nothing here waits, an idle connection owns no buffer, and a
//! [`Transport`] may move to another core between any two calls.
//!
//! | file | one reason to change |
//! |---|---|
//! | `socket` | system calls on one connected socket |
//! | `listener` | ports: binding, sharing, accepting, running out of descriptors |
//! | `transport` | plain, TLS or WebSocket behind one type: reading, writing, what the kernel did not take |
//! | `websocket` | frames of WebSocket, elements of XMPP in them |
//! | `tls` | rustls: configuration, records in and out, channel bindings |
//! | `tls_client` | the other side of TLS, towards Redis |
//! | `client_certificate` | certificates of clients: whom they are trusted for, their names |
//! | `certificate` | the self-signed certificate of a first start, fingerprints |
//! | `proxy` | PROXY protocol v2 |

mod certificate;
mod client_certificate;
mod listener;
mod proxy;
mod socket;
mod tls;
mod tls_client;
mod transport;
mod websocket;

pub use certificate::{fingerprint, generate_certificate};
pub use client_certificate::{ClientAuthority, ClientNames};
pub use listener::{Listener, REFUSED_NO_DESCRIPTOR, listen_shared, probe_port};
pub use proxy::{PROXY_HEADER_MAX_BYTES, Proxied, ProxyError, parse_proxy_header};
pub use socket::Socket;
pub use tls::{ChannelBindings, Exporter, TlsConfig, TlsVersion};
pub use tls_client::{TlsClient, TlsClientConfig};
pub use transport::{Read, Scratch, Transport};
pub use websocket::WebSocketLimits;

#[cfg(test)]
mod tests;
