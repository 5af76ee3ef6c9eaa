//! The process as the kernel sees it. In: `/proc/self`. Out: figures under the names that all exporters use.

use std::fs;

use super::table::Row;
use crate::rows;

/// The figures at one moment; 0 where the kernel does not say.
#[derive(Debug, Default)]
pub struct Process {
    resident_bytes: u64,
    cpu_us: u64,
    open_files: u64,
    open_files_max: u64,
    threads: u64,
    started_us: u64,
}

pub static PROCESS: &[Row<Process>] = rows! { Process, &[];
    /// Resident memory. When it grows while nitro_sessions and nitro_cache_bytes do not, note the load and tell the developers.
    gauge "process_resident_memory_bytes" => |p| p.resident_bytes;
    /// Processor time of all threads. When it is far more than the nitro_shard_cpu_seconds of all shards, the database lane and
    /// the journals take the rest: give them a core (sql.core).
    counter "process_cpu_seconds" => |p| p.cpu_us;
    /// Open descriptors. When they come near process_max_fds, connections will be refused: raise the hard limit (ulimit -Hn).
    gauge "process_open_fds" => |p| p.open_files;
    /// Descriptors that the process may have. When it is small, raise the hard limit (ulimit -Hn).
    gauge "process_max_fds" => |p| p.open_files_max;
    /// Threads. When they grow, tell the developers: their number is fixed but for admin connections.
    gauge "process_threads" => |p| p.threads;
    /// When the process started, since 1970. When it changes unasked, it has crashed: look into the log.
    gauge "process_start_time_seconds" => |p| p.started_us;
};

impl Process {
    /// `started_us`: when the process started, unix microseconds.
    pub fn read(started_us: u64) -> Process {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let of = |key: &str| -> Option<u64> {
            let line = status.lines().find(|line| line.starts_with(key))?;
            line.split_ascii_whitespace().nth(1)?.parse().ok()
        };
        let limit = || -> Option<u64> {
            let limits = fs::read_to_string("/proc/self/limits").ok()?;
            let line = limits.lines().find(|l| l.starts_with("Max open files"))?;
            line.split_ascii_whitespace().nth(3)?.parse().ok()
        };
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Process {
            resident_bytes: of("VmRSS:").unwrap_or_default() * 1024,
            cpu_us: cpu.tv_sec as u64 * 1_000_000 + cpu.tv_nsec as u64 / 1000,
            open_files: fs::read_dir("/proc/self/fd").map_or(0, |all| all.count() as u64),
            open_files_max: limit().unwrap_or_default(),
            threads: of("Threads:").unwrap_or_default(),
            started_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_something_of_everything() {
        let process = Process::read(1);
        for row in PROCESS {
            assert!((row.get)(&process) > 0, "{}", row.about.name);
        }
        assert!(process.resident_bytes > 1 << 20);
    }
}
