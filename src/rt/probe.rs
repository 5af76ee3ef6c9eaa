//! What this machine allows. In: the kernel's answers. Out: the cores, the limits, or a sentence with the mend.
//! Promise: whatever glommio would panic about is refused here first, in words.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs::read_to_string;
use std::os::fd::{FromRawFd, OwnedFd};

/// glommio refuses to start below this; it registers a little memory with each of its rings.
const LOCKED_MEMORY_MIN_BYTES: u64 = 512 * 1024;
/// The oldest kernel that knows every io_uring operation glommio asks for.
const KERNEL_MIN: (u32, u32) = (5, 8);

/// The cores this process may run on (its affinity mask, so `taskset` and cgroup cpusets count), ascending.
pub fn cores_online() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|&core| set.is_set(core))
            .collect(),
        Err(_) => (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect(),
    }
}

/// Checks before the shards start that io_uring works and that enough memory may be locked, raising the soft limit
/// where the hard one allows it. The error is a sentence for the operator with the mend.
pub fn probe() -> Result<(), String> {
    let kernel = read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if version(&kernel).is_some_and(|v| v < KERNEL_MIN) {
        return Err(format!(
            "kernel {} is too old: nitro needs Linux {}.{} or newer, because it waits and writes files through io_uring",
            kernel.trim(),
            KERNEL_MIN.0,
            KERNEL_MIN.1
        ));
    }
    locked_memory()?;
    io_uring()
}

/// Raises the soft limit of open files to the hard one and returns it: `u64::MAX` stands for unlimited.
pub fn raise_open_files() -> Result<u64, String> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        setrlimit(Resource::Nofile, raised).map_err(|e| {
            format!("cannot raise the limit of open files (`ulimit -n`) to its hard limit: {e}")
        })?;
    }
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

fn locked_memory() -> Result<(), String> {
    let limit = getrlimit(Resource::Memlock);
    let enough = |bytes: Option<u64>| bytes.is_none_or(|b| b >= LOCKED_MEMORY_MIN_BYTES);
    if enough(limit.current) {
        return Ok(());
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if enough(limit.maximum) && setrlimit(Resource::Memlock, raised).is_ok() {
        return Ok(());
    }
    Err(format!(
        "only {} KiB of memory may be locked, io_uring needs {} KiB: raise it with `ulimit -l`, `LimitMEMLOCK=` in the systemd unit, or `--ulimit memlock=` for a container",
        limit.maximum.or(limit.current).unwrap_or(0) / 1024,
        LOCKED_MEMORY_MIN_BYTES / 1024
    ))
}

fn io_uring() -> Result<(), String> {
    // struct io_uring_params is 120 bytes; zero everywhere asks for no special feature.
    let mut params = [0u64; 15];
    // SAFETY: the kernel reads and writes 120 bytes of `params`, which is that large, and keeps no pointer to it.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1u32, params.as_mut_ptr()) };
    if fd >= 0 {
        // SAFETY: the call just returned this descriptor, nobody else knows it; dropping closes it.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    let disabled = read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    Err(why_no_ring(&error, disabled.trim()))
}

fn why_no_ring(error: &std::io::Error, disabled: &str) -> String {
    match (error.raw_os_error(), disabled) {
        (Some(libc::EPERM), "1" | "2") => format!(
            "io_uring is switched off by kernel.io_uring_disabled = {disabled}: `sysctl kernel.io_uring_disabled=0` allows it"
        ),
        (Some(libc::EPERM | libc::EACCES | libc::ENOSYS), _) => format!(
            "io_uring is not available ({error}): the kernel was built without it, or the container's seccomp profile forbids it (for Docker and Podman: a profile that allows io_uring_setup, io_uring_enter and io_uring_register, or `--security-opt seccomp=unconfined`)"
        ),
        (Some(libc::ENOMEM), _) => format!(
            "io_uring has no memory to lock ({error}): raise `ulimit -l`, or `LimitMEMLOCK=` in the systemd unit"
        ),
        (Some(libc::EMFILE | libc::ENFILE), _) => {
            format!("io_uring finds no free file descriptor ({error}): raise `ulimit -n`")
        }
        _ => format!("io_uring cannot be set up: {error}"),
    }
}

fn version(kernel: &str) -> Option<(u32, u32)> {
    let mut numbers = kernel.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Error;

    #[test]
    fn this_machine_is_fit_and_its_open_files_are_raised() {
        probe().unwrap();
        let limit = raise_open_files().unwrap();
        assert_eq!(
            getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
            limit
        );
        assert!(!cores_online().is_empty());
    }

    #[test]
    fn every_refusal_names_its_mend() {
        let says = |errno, disabled| why_no_ring(&Error::from_raw_os_error(errno), disabled);
        assert!(says(libc::EPERM, "2").contains("sysctl"));
        assert!(says(libc::EPERM, "0").contains("seccomp"));
        assert!(says(libc::ENOSYS, "").contains("seccomp"));
        assert!(says(libc::ENOMEM, "0").contains("ulimit -l"));
    }

    #[test]
    fn kernel_versions_compare_by_number() {
        assert_eq!(version("6.18.44-generic\n"), Some((6, 18)));
        assert!(version("5.4.0-99").unwrap() < KERNEL_MIN);
        assert!(version("5.10.1").unwrap() > KERNEL_MIN);
        assert_eq!(version("strange"), None);
    }
}
