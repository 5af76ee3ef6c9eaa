//! nitro: an instant-messaging server for trading floors, thread-per-core and shared-nothing.

pub mod config;
pub mod store;
pub mod xmpp;
