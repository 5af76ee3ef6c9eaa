//! XMPP for web pages. In: requests that the HTTP door ([`super::http`]) has routed here. Out: connections that log in like any
//! others ([`super::login`]), and what tells a client where to find them. Promise: a session over the web is the session of any other
//! client: the same gates, the same owner, the same limits.
//!
//! | file | what it does |
//! |---|---|
//! | `websocket` | the handshake of RFC 6455 and RFC 7395 at `/ws` |
//! | `bosh` | sessions of requests at `/bosh` (XEP-0124, XEP-0206) |
//! | `host_meta` | `/.well-known/host-meta` and `.json` (XEP-0156) |

pub mod bosh;
pub mod host_meta;
pub mod websocket;
