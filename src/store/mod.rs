//! The tiers: a shard's cache, and behind it SQL on its own thread.
//!
//! In: requests of the shards ([`tier`]). Out: answers, and records that are read in place ([`record`]). Promise: a
//! write that was answered is durable, and a cold login costs at most one round trip. Nothing here builds a stanza.

pub mod cache;
pub mod change;
pub mod drain;
pub(crate) mod folder;
pub mod journal;
pub mod overlay;
pub mod owners;
pub mod recent;
pub mod record;
pub mod recovery;
pub mod redis;
pub mod ring;
pub mod room;
pub mod settle;
pub mod sql;
pub mod tier;
pub mod upload;
pub mod warm;
