//! nitro: an instant-messaging server for trading floors, thread-per-core and shared-nothing.

pub mod net;
pub mod observe;
pub mod rt;
