//! The `nitro` command: see [`nitro::cli`].

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Number of `mi_option_purge_delay` (mimalloc.h, the same in versions 2 and 3); the bindings do not name it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
/// Freed memory goes back to the kernel after so many milliseconds. By mimalloc's second it went while it was needed again a
/// moment later: the SQL thread spent half of its time in the kernel's zeroing of pages, on a shard's core.
const PURGE_DELAY_MS: std::ffi::c_long = 20_000;

fn main() -> ExitCode {
    // No huge pages, which mimalloc asks for: the first touch of one takes 0.1 ms, and 4.8 ms where a hypervisor has taken the
    // memory back; all of a core wait for it. Without them logins and messages cost as much, and half the memory is resident.
    //
    // SAFETY: sets a number that the allocator reads whenever it frees, and a flag of this process; no other thread runs yet.
    #[allow(unsafe_code)]
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, PURGE_DELAY_MS);
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
    nitro::cli::run()
}
