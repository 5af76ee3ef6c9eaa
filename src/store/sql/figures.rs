//! The figures of the SQL lane as metrics.

use std::sync::atomic::Ordering::Relaxed;

use super::Counters;
use crate::observe::Row;
use crate::rows;

/// Of the lane, which serves all shards.
pub static ROWS: &[Row<Counters>] = rows! { Counters, &[];
    /// 1: the database has answered its last statement; 0: it has not. When it is 0, bring the database back: messaging goes on,
    /// changes wait in the journals, log-ins of users who are neither cached nor in Redis fail.
    gauge "nitro_sql_up" => |c| u64::from(c.up.load(Relaxed));
    /// SQL statements, BEGIN and COMMIT included. When they are many beside nitro_binds, users are read again and again: look at
    /// nitro_cache_evictions.
    counter "nitro_sql_statements" => |c| c.statements.load(Relaxed);
    /// Users asked for. When the rate is high, log-ins are cold: that is usual after a restart without Redis.
    counter "nitro_sql_loads" => |c| c.loads.load(Relaxed);
    /// Documents (vCards, private storage) and retractions on archive pages asked for. When the rate is high, clients ask in a loop.
    counter "nitro_sql_documents" => |c| c.reads.load(Relaxed);
    /// Archive pages asked for. When the rate is high, somebody synchronises large archives: look at nitro_sql_read_seconds.
    counter "nitro_sql_pages" => |c| c.pages.load(Relaxed);
    /// Records of journals that are in the database, or need not be. When it stands still while nitro_journal_records rises, the
    /// database takes nothing: look at nitro_sql_up and the log.
    counter "nitro_sql_drained" => |c| c.drained.load(Relaxed);
    /// Rows that the drain wrote or deleted. When there are far more than nitro_sql_drained, messages are written as pending and
    /// deleted again: raise journal.drain_after_ms.
    counter "nitro_sql_rows" => |c| c.rows.load(Relaxed);
    /// Entries of archives deleted because they were older than archive.keep_days. When it rises without pause for hours, there
    /// was much to delete, after that key was lowered for example.
    counter "nitro_sql_archive_purged" => |c| c.purged.load(Relaxed);
    /// Records that the database refused. When it is not 0, look at its table `quarantine` and tell the developers.
    counter "nitro_sql_quarantined" => |c| c.quarantined.load(Relaxed);
    /// Transactions committed. When there are nearly as many as nitro_sql_drained, batches are small, which is usual with little
    /// traffic.
    counter "nitro_sql_transactions" => |c| c.transactions.load(Relaxed);
    /// Attempts repeated because the database was locked or gone. When it rises, look at the database's log.
    counter "nitro_sql_retries" => |c| c.retries.load(Relaxed);
    /// Requests answered by a failure. When it rises, log-ins fail: look at nitro_sql_up.
    counter "nitro_sql_failures" => |c| c.failures.load(Relaxed);
    /// Batches refused because the lane's queue was full; they wait on their shard. When it rises, the database is too slow: look
    /// at nitro_sql_load_seconds.
    counter "nitro_sql_refused" => |c| c.refused.load(Relaxed);
    /// Requests that wait or are under way. When they stay high, look at nitro_sql_load_seconds and nitro_sql_read_seconds.
    gauge "nitro_sql_queue" => |c| c.queue_depth.load(Relaxed) as u64;
    /// The most of them since the start. When it comes near sql.queue_max, requests wait on their shards.
    gauge "nitro_sql_queue_max" => |c| c.queue_depth_max.load(Relaxed) as u64;
    /// Records read from journals and not yet in the database. When they stay high, look at nitro_sql_batch_seconds.
    gauge "nitro_sql_drain_waiting" => |c| c.drain_waiting.load(Relaxed) as u64;
};
