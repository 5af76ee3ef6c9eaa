//! A sync that is slow or fails: a library, loaded in front of libc's, whose `fdatasync` of a journal's file does what
//! two switches say.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::blade::Blade;

/// How long a slow sync takes, in milliseconds.
pub const DELAY_MS: u64 = 500;

/// The switches are files: there, or not. Only files in a folder `journal` are touched: the database has syncs of its own.
const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int is_on(const char *name) {
    const char *path = getenv(name);
    return path && access(path, F_OK) == 0;
}

int fdatasync(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    int journal = 0;
    if (length > 0) {
        path[length] = 0;
        journal = strstr(path, "/journal/") != NULL;
    }
    if (journal && is_on("FAULT_FAIL")) {
        errno = EIO;
        return -1;
    }
    long result = syscall(SYS_fdatasync, fd);
    if (journal && is_on("FAULT_DELAY")) {
        struct timespec delay = { DELAY_MS / 1000, DELAY_MS % 1000 * 1000000 };
        nanosleep(&delay, NULL);
    }
    return (int)result;
}
"#;

pub struct Shim {
    fail: PathBuf,
    delay: PathBuf,
}

impl Shim {
    /// Puts it before the blade's libc, from the next start on. `None`: there is no C compiler.
    pub fn load_into(blade: &mut Blade) -> Option<Shim> {
        let folder = blade.folder();
        let (source, library) = (folder.join("shim.c"), folder.join("shim.so"));
        fs::write(&source, SOURCE).expect("the source is written");
        let status = Command::new("cc")
            .args([
                "-shared",
                "-fPIC",
                "-O1",
                &format!("-DDELAY_MS={DELAY_MS}"),
                "-o",
            ])
            .args([&library, &source])
            .status()
            .ok()?;
        assert!(status.success(), "the shim does not compile");
        let shim = Shim {
            fail: folder.join("syncs-fail"),
            delay: folder.join("syncs-are-slow"),
        };
        blade.set_env("LD_PRELOAD", library.to_str().expect("a path in UTF-8"));
        blade.set_env("FAULT_FAIL", shim.fail.to_str().expect("a path in UTF-8"));
        blade.set_env("FAULT_DELAY", shim.delay.to_str().expect("a path in UTF-8"));
        Some(shim)
    }

    pub fn slow_down(&self) {
        fs::write(&self.delay, "").expect("the switch");
    }

    pub fn fail(&self) {
        fs::write(&self.fail, "").expect("the switch");
    }

    /// Syncs are what they were.
    pub fn heal(&self) {
        for switch in [&self.delay, &self.fail] {
            let _ = fs::remove_file(switch);
        }
    }
}
