//! A small disk: a tmpfs in a user and mount namespace of its own, for which nobody has to be root.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::blade::Blade;

pub struct Room {
    /// Holds the namespaces: what is on the disk outlives the server.
    holder: Child,
    /// Where the processes in the namespace see it.
    path: PathBuf,
}

impl Room {
    /// A disk of so many bytes that the blade finds as [`Room::path`], from its next start on. `None`: this kernel makes no
    /// such namespaces for us.
    pub fn for_blade(blade: &mut Blade, bytes: u64) -> Option<Room> {
        let path = blade.folder().join("room");
        fs::create_dir(&path).expect("the place of the disk");
        let script = format!(
            "mount -t tmpfs -o size={bytes} tmpfs '{}' && echo ready && exec cat",
            path.display()
        );
        let mut holder = Command::new("unshare")
            .args(["-Urm", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("a pipe");
        let _ = BufReader::new(stdout).read_line(&mut line);
        if line.trim() != "ready" {
            let _ = holder.kill();
            let _ = holder.wait();
            return None;
        }
        let target = holder.id().to_string();
        blade.wrap(
            [
                "nsenter",
                "-t",
                &target,
                "-U",
                "-m",
                "--preserve-credentials",
                "--",
            ]
            .map(str::to_owned)
            .to_vec(),
        );
        Some(Room { holder, path })
    }

    /// For processes in the namespace.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same for this one.
    fn seen_from_here(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        root.join(self.path.strip_prefix("/").expect("an absolute path"))
    }

    /// Fills what is left.
    pub fn fill(&self) {
        let mut ballast = File::options()
            .create(true)
            .append(true)
            .open(self.seen_from_here().join("ballast"))
            .expect("the ballast");
        for size in [1 << 16, 1 << 12, 1] {
            let piece = vec![b'x'; size];
            while ballast.write_all(&piece).is_ok() {}
        }
    }

    /// Makes room.
    pub fn empty(&self) {
        fs::remove_file(self.seen_from_here().join("ballast")).expect("the ballast is there");
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
