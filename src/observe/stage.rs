//! The stages whose time is measured: one table gives each its name, its help and who records it.

/// Declares each stage once.
macro_rules! stages {
    ($( $(#[doc = $help:literal])+ $who:ident $stage:ident = $name:literal; )*) => {
        /// Something whose duration is recorded in microseconds; see [`super::record`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Stage { $( $(#[doc = $help])+ $stage, )* }

        impl Stage {
            /// In the order of the table.
            pub const ALL: [Stage; stages!(@count $($stage)*)] = [ $( Stage::$stage, )* ];

            /// Its short name: the metric's, without `nitro_` and unit.
            pub fn name(self) -> &'static str {
                match self { $( Stage::$stage => $name, )* }
            }

            /// The name of its metric.
            pub fn metric(self) -> &'static str {
                match self { $( Stage::$stage => concat!("nitro_", $name, "_seconds"), )* }
            }

            /// What it means, and what to do when it is bad.
            pub fn help(self) -> &'static str {
                match self { $( Stage::$stage => concat!($($help),+), )* }
            }

            /// Who records it.
            pub fn place(self) -> Place {
                match self { $( Stage::$stage => Place::$who, )* }
            }
        }
    };
    (@count $($stage:ident)*) => { 0 $( + { let _ = stringify!($stage); 1 } )* };
}

/// Where a stage is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On each shard, for itself.
    Shard,
    /// On the SQL lane, which serves all shards.
    Lane,
}

stages! {
    /// From accepting a connection to its bound session, the client's own time included. When it grows, look which of its
    /// parts does: TLS, SASL, the read of the user.
    Shard Login = "login";
    /// From accepting a connection to its resumed session (XEP-0198). When it grows while nitro_login_seconds does not,
    /// clients come back while what they sent before is still being decided: look at nitro_journal_commit_seconds.
    Shard Resume = "resume";
    /// From the begin of a TLS handshake to its end, the client's own time included. When it grows with nitro_loop_lag_seconds,
    /// the cores are busy: log-ins are to be spread or slowed; when it grows alone, look at the network.
    Shard TlsHandshake = "tls_handshake";
    /// From the first element that names a user to his being authenticated, held-back failures included. When it grows, look at
    /// nitro_user_read_seconds, then at the clients.
    Shard Sasl = "sasl";
    /// How long a log-in waits for a user who is not cached: Redis, else SQL. When it grows, look at the tier that is slow:
    /// nitro_redis_round_trip_seconds, nitro_sql_load_seconds.
    Shard UserRead = "user_read";
    /// From the bound session to its first available presence, roster included: the client's own time is most of it. When it
    /// grows on all shards at once, look at nitro_loop_lag_seconds.
    Shard LoginPresence = "login_presence";
    /// From reading a client's message to writing it to a recipient's connection, on whichever shard he is; what must be stored
    /// is durable by then. When it grows, look at nitro_journal_commit_seconds (stored messages) and nitro_loop_lag_seconds.
    Shard Message = "message";
    /// From reading a client's stanza to its being decided on both sides, so that it may be acknowledged (XEP-0198); of
    /// those that had to wait for it. When it grows, look at nitro_journal_commit_seconds and nitro_mesh_queue_seconds.
    Shard MessageSettled = "message_settled";
    /// From handing a group of changes to the journal to its being durable. When it grows, the disk is at its limit: give
    /// journal.dir a disk of its own, and look what else writes.
    Shard JournalCommit = "journal_commit";
    /// From sending a command to a Redis instance to its answer. When it grows, the instance is busy (SLOWLOG, INFO) or the
    /// network is; beyond redis.timeout_ms it is left alone for a while and SQL is read.
    Shard RedisRoundTrip = "redis_round_trip";
    /// How late the live loop takes up an event that comes at any moment, sampled by a probe every millisecond. When it grows,
    /// the core has too much to do, or other threads run on it: look at nitro_shard_cpu_seconds, sql.core and the machine.
    Shard LoopLag = "loop_lag";
    /// From one shard's sending a batch to another's taking it up. When it grows on one shard, that one is too busy: look at
    /// its nitro_loop_lag_seconds.
    Shard MeshQueue = "mesh_queue";
    /// One statement for up to 50 users who log in. When it grows, the database is slow: look at its own
    /// figures, and whether nitro_sql_batch_seconds grows too.
    Lane SqlLoad = "sql_load";
    /// One statement for documents, or one page of an archive. When it grows alone, somebody pages through
    /// large archives: look at nitro_sql_pages.
    Lane SqlRead = "sql_read";
    /// One transaction of the drain, which carries journals into the database. When it grows, nitro_journal_backlog_bytes will
    /// follow: look at the database's disk and locks.
    Lane SqlBatch = "sql_batch";
}
