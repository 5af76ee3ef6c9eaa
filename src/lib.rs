//! nitro: an instant-messaging server for trading floors, thread-per-core and shared-nothing.

//WIP pub mod admin;
//WIP pub mod blade;
//WIP pub mod cli;
pub mod config;
pub mod net;
pub mod observe;
pub mod rt;
//WIP pub mod shard;
pub mod store;
//WIP pub mod user_import;
pub mod xml;
pub mod xmpp;
