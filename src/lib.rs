//! nitro: an instant-messaging server for trading floors, thread-per-core and shared-nothing.

pub mod admin;
pub mod backup;
pub mod blade;
pub mod cli;
pub mod config;
pub mod groups_file;
pub mod migrate;
pub mod net;
pub mod observe;
pub mod purge;
pub mod random;
pub mod rt;
pub mod shard;
pub mod store;
pub mod top;
pub mod user_import;
pub mod xml;
pub mod xmpp;
