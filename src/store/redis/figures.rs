//! The figures of the Redis instances as metrics.

use std::sync::atomic::Ordering::Relaxed;

use super::Counters;
use crate::observe::Row;
use crate::rows;

/// Of one instance as one shard sees it. Its label is not called `instance`: that is the name of a scraped target.
pub static ROWS: &[Row<Counters>] = rows! { Counters, &["shard", "redis"];
    /// Users asked for. When one instance has far more than its weight says, a few users log in again and again.
    counter "nitro_redis_reads" => |c| c.reads.get();
    /// Users found. When they are few beside nitro_redis_reads, the copies are cold: usual after an instance was replaced.
    counter "nitro_redis_hits" => |c| c.hits.get();
    /// Users not found: the database was asked. When they stay many, the instance evicts: give it more memory.
    counter "nitro_redis_misses" => |c| c.misses.get();
    /// Users not asked for, or without answer, because of the instance's state: the database was asked. When it rises, look at
    /// nitro_redis_state.
    counter "nitro_redis_unavailable" => |c| c.unavailable.get();
    /// Changes to be written. When it rises without logins or changes, tell the developers.
    counter "nitro_redis_stores" => |c| c.stores.get();
    /// Changes written. When it falls behind nitro_redis_stores, see nitro_redis_stores_missed.
    counter "nitro_redis_stored" => |c| c.stored.get();
    /// Changes not written: what the instance held before is not used any more. When it rises, the instance fails: look at its log.
    counter "nitro_redis_stores_missed" => |c| c.missed_stores.get();
    /// Copies of what the database said. When they are as many as nitro_redis_reads, copies do not stay: give the instance memory.
    counter "nitro_redis_offers" => |c| c.offers.get();
    /// Lost connections, deadlines, refusals, garbage. When it rises, look at the instance's log and at the network.
    counter "nitro_redis_errors" => |c| c.errors.get();
    /// Generations asked for: the copies began anew. When it rises again and again, the instance restarts or loses writes.
    counter "nitro_redis_renewals" => |c| c.renewals.get();
    /// Times that the instance was given up for a while. When it rises, look at nitro_redis_errors and redis.timeout_ms.
    counter "nitro_redis_breaker_opened" => |c| c.breaker_opened.get();
    /// 0: connecting, 1: in use, 2: given up for a while. When it is not 1 for long, start the instance; meanwhile the database
    /// is read.
    gauge "nitro_redis_state" => |c| c.state() as u64;
    /// Commands without answer. When they come near redis.commands_max, the instance is too slow.
    gauge "nitro_redis_in_flight" => |c| c.in_flight.load(Relaxed) as u64;
    /// Answers. When their rate falls while nitro_redis_in_flight rises, the instance hangs.
    counter "nitro_redis_round_trips" => |c| c.round_trips.get();
    /// Microseconds from sending to answer, together; nitro_redis_round_trip_seconds says more. When it grows faster than
    /// nitro_redis_round_trips, the instance gets slower.
    counter "nitro_redis_round_trip_microseconds" => |c| c.round_trip_us_sum.get();
};
