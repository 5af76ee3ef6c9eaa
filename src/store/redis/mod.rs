//! The Redis ring: warm copies of permanent records, and where users are logged in.
//!
//! In: loads and stores by user name from the shard that owns the users, bytes from the sockets, the clock. Out:
//! [`Event`]s, bytes for the sockets. [`Tier`] is the face; it is sans-IO, and a driver on the shard owns the sockets.
//! Promise: Redis gone means slower, never wrong. No reader is given less than what SQL may have, whatever dies, hangs,
//! is restored, replaced or filled up, and in whatever moment.
//!
//! ```text
//!  tier        which instance (placement: the ring, and since when), events
//!  instance    circuit breaker, missed writes, generation          one for each instance
//!  connection  pipelining, framing, deadlines                      one for each time it is connected
//!  generations what must outlive the process                       one file for the blade
//!  keeper      the threads for that file and for host names          one for the blade
//!  hold        how far SQL may have the journals                     one for the blade
//! ```
//!
//! Around it: [`crate::shard::redis`] owns the sockets, [`crate::xmpp::warmth`] decides what is stored and when, and
//! [`super::warm`] is what a copy looks like.
//!
//! Keys: `{prefix}{generation}.{since}:u:{name}` holds the revision (8 bytes, big-endian) and the value, written by a
//! script that never replaces a newer revision; `{prefix}s:{name}` is a hash `blade:shard:resource` → unix milliseconds
//! until which the session is believed in; `{prefix}fence:{blade}` is the process of the blade that may write (see
//! [`instance`]). All keys expire, so what nobody reads any more goes away. The rights that an ACL must give:
//! `~{prefix}* +get +getrange +set +eval +evalsha +pexpire +hset +hdel +hgetall +info +select`.
//!
//! # Why the next reader is right
//!
//! A change goes: journal → cache and answer to the client → ring → SQL. Three rules make the table true: a user is read
//! and written by his owner only; the owner drains a change into SQL only after the ring has answered it
//! ([`Event::Stored`] or [`Event::StoreMissed`]), and keeps the user in his cache until it is drained; revisions of a
//! user grow, over restarts too.
//!
//! | the process dies after | journal | ring | SQL | the next reader |
//! |---|---|---|---|---|
//! | accepting, before the commit | - | old | old | old is right: nobody was answered |
//! | the commit | new | old | old | replay put it into the cache, where it stays until it is drained; the ring gets it again |
//! | cache and answer | new | old | old | the same |
//! | sending it to the ring | new | old or new | old | the same; what the dead process left in a socket is refused, the fence being its successor's |
//! | `Stored` | new | new | old | replay, the same |
//! | `StoreMissed` | new | old, in a generation that nobody reads | old | replay, the same; the generation was durable before the event |
//! | the drain | drained | new, or never read | new | the ring's copy, or a miss and SQL |
//! | asking for a generation, before it is durable | new | not read | old | replay: nothing was answered, so nothing was drained |
//! | the generation is durable, not yet used | new | cold | old | replay; a number is wasted |
//! | SQL's answer after a miss, before or while it is offered to the ring | - | nothing, or the same | new | a miss or the same; an offer that nobody confirmed counts as a missed write |
//!
//! And while the process lives, an instance:
//!
//! | fault | what is in it | why nobody reads that |
//! |---|---|---|
//! | dies, is flushed, evicts, is replaced by an empty one | nothing | it is a miss |
//! | starts from an old dump; another one answers at its address, or the first one again | old | the run id differs from the generation's, also if the blade was down meanwhile |
//! | hangs or is cut off with a write in its socket, and goes on later | old, then the late write | a missed write: a new generation. The late one goes to the old keys |
//! | has no memory, became a replica, cannot save | old | it refused the write: a missed write; the probe before it is used again is a write |
//! | left the ring, or some of its keys did, and came back | old | `since` in the key is the change of the ring that brought the name back |
//! | answers garbage | ? | the connection is closed, nothing behind it is believed |
//!
//! A copy holds no messages, but says whether some wait: then SQL is asked as well. So the ring must say so before SQL
//! alone has such a message. Most are taken by a client in no time, so a message that still waits after a moment is told,
//! and until it is answered for the drain stays in front of it. What the journals of the last start hold is told by the
//! owners before anything at all is drained. Whoever changes the database without the ring (a start that has none
//! configured, a command while no nitro runs, a clock that went back) removes the file with the generations first: all
//! copies are cold then.
//!
//! What this does not cover: a database or a data folder restored from a backup while the file with the generations stays
//! (remove `redis.json`, then start); somebody else who writes to keys with this prefix; a server that is made a replica of an
//! old one and a master again within one connection and without a write in between; users who go from one blade to
//! another and back (their blades have generations of their own; that wants one file for the cluster).

pub mod address;
pub mod connection;
pub mod figures;
pub mod generations;
pub mod hold;
pub mod instance;
pub mod keeper;
pub mod tier;

#[cfg(test)]
mod tests;

pub use address::{Address, AddressError, Endpoint};
pub use generations::{Generation, Generations, Placement};
pub use instance::{Counters, State, Wants};
pub use tier::{Config, Event, Keep, Later, Session, Tier};
