//! The protocol: stream negotiation, SASL, addresses, sessions, and one file per feature, as state machines over bytes and
//! values with no socket and no clock of their own.

pub mod jid;
pub mod sasl;
