//! The journal's door to the disk: one folder of files.
//!
//! In: reads, writes and syncs by file name. Out: what the operating system answers. Promise: nothing in the journal
//! touches a file but through this seam, so that tests can put a disk behind it that forgets, fills up, tears writes
//! and fails. [`Folder`] is the real one.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::store::folder::sync_above;

/// One flat folder. A new name, a rename or a removal is durable after [`Disk::sync_dir`], bytes after
/// [`DiskFile::datasync`].
pub trait Disk: Send + Sync {
    /// Names of all regular files. Names that are not UTF-8 are left out.
    fn list(&self) -> io::Result<Vec<String>>;
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// An empty file; what had this name is emptied.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Atomic; replaces what had the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    fn sync_dir(&self) -> io::Result<()>;
    /// How an operator finds the file.
    fn path(&self, name: &str) -> String;
    /// Unpredictable bytes.
    fn random(&self) -> [u8; 16];
    /// Ends the process, because nothing that this disk says can be believed any more: after a failed `fdatasync` the
    /// next one may succeed although the bytes are lost.
    fn die(&self, why: &str) -> ! {
        crate::observe::flush_log();
        eprintln!("{why}");
        std::process::abort()
    }
}

/// An open file; reads and writes name their place, so that it can be shared.
pub trait DiskFile: Send + Sync {
    /// Like `pread`: may read less; 0 at the end.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Like `pwrite`: may write less.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Returns when all that was written, and the length, is durable.
    fn datasync(&self) -> io::Result<()>;
    fn bytes(&self) -> io::Result<u64>;
}

/// Reads until `into` is full or the file ends; the number of bytes read.
pub fn read_full(file: &dyn DiskFile, into: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Writes all of `bytes`.
pub fn write_full(file: &dyn DiskFile, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.write_at(&bytes[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => done += written,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The disk has no room, or this user may not use more of it: it may pass.
pub fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// A folder of the real file system.
pub struct Folder {
    path: PathBuf,
    /// Kept open, for syncing.
    dir: File,
    sync_delay: Duration,
}

struct FolderFile {
    file: File,
    sync_delay: Duration,
}

impl Folder {
    /// Opens the folder, making it with mode 0700 if it is missing.
    ///
    /// # Errors
    /// A sentence that names the folder.
    pub fn open(path: &Path) -> Result<Folder, String> {
        let shown = path.display();
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .and_then(|()| sync_above(path));
        made.map_err(|e| {
            format!("{shown}: the journal's folder cannot be made ({e}); run as the owner of its parent folder")
        })?;
        Folder::existing(path)
    }

    /// Opens the folder, which must be there.
    ///
    /// # Errors
    /// A sentence that names the folder.
    pub fn existing(path: &Path) -> Result<Folder, String> {
        let dir = File::open(path).map_err(|e| {
            format!(
                "{}: the journal's folder cannot be opened ({e}); run as the owner of the folder",
                path.display()
            )
        })?;
        Ok(Folder {
            path: path.into(),
            dir,
            sync_delay: Duration::ZERO,
        })
    }

    /// Every sync of a file takes so much longer: for tests that nothing is acknowledged before it.
    pub fn delay_syncs(mut self, by: Duration) -> Folder {
        self.sync_delay = by;
        self
    }

    fn file(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(create)
            .mode(0o600)
            .open(self.path.join(name))?;
        Ok(Arc::new(FolderFile {
            file,
            sync_delay: self.sync_delay,
        }))
    }
}

impl Disk for Folder {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.extend(entry.file_name().into_string());
            }
        }
        Ok(names)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.file(name, false)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.file(name, true)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.dir.sync_all()
    }

    fn path(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    fn random(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        aws_lc_rs::rand::fill(&mut bytes).expect("the system gives random bytes");
        bytes
    }
}

impl DiskFile for FolderFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.file.write_at(bytes, offset)
    }

    fn datasync(&self) -> io::Result<()> {
        if !self.sync_delay.is_zero() {
            std::thread::sleep(self.sync_delay);
        }
        self.file.sync_data()
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}
