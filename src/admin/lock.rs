//! One nitro for each data folder.
//!
//! In flows the folder's path, out flows a [`DataLock`] that holds it until it is dropped or the process ends in any
//! way. Promise: two processes never write to the same data. The folder is made if it is missing, for its owner only.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// A folder inside the data folder that is there while a restore is not finished.
pub const RESTORING: &str = "restoring";

/// Holds `nitro.lock` of the data folder by `flock`, so the kernel lets it go however the process ends.
#[derive(Debug)]
pub struct DataLock {
    _file: File,
}

impl DataLock {
    /// Takes the folder, making it with mode 0700 if it is missing.
    ///
    /// # Errors
    /// A sentence; if another process has it, with its number.
    pub fn acquire(dir: &Path) -> Result<DataLock, String> {
        let lock = DataLock::acquire_to_restore(dir)?;
        match dir.join(RESTORING).exists() {
            false => Ok(lock),
            true => Err(format!(
                "{}: a restore was interrupted here; repeat it: nitro restore FOLDER",
                dir.display()
            )),
        }
    }

    /// The same for a folder in which a restore may have been interrupted.
    ///
    /// # Errors
    /// As for [`DataLock::acquire`].
    pub fn acquire_to_restore(dir: &Path) -> Result<DataLock, String> {
        let shown = dir.display();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| {
                format!("{shown}: the data folder cannot be made ({e}); choose another data_dir")
            })?;
        let cannot = |e| {
            format!("{shown}/nitro.lock: cannot be opened ({e}); run as the owner of the folder")
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join("nitro.lock"))
            .map_err(cannot)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // What stands there is only told to the operator.
                let _ = (&mut file).take(20).read_to_string(&mut pid);
                return Err(format!(
                    "{shown}: another nitro (process {}) uses this data folder; stop it or choose another data_dir",
                    pid.trim()
                ));
            }
            Err(TryLockError::Error(e)) => {
                return Err(format!(
                    "{shown}/nitro.lock: this file system cannot lock ({e}); choose another data_dir"
                ));
            }
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(cannot)?;
        Ok(DataLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_second_nitro_on_the_same_folder_is_refused_with_the_first_ones_number() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/data");
        let first = DataLock::acquire(&dir).unwrap();
        let why = DataLock::acquire(&dir).unwrap_err();
        assert!(
            why.contains(&format!("process {})", std::process::id())),
            "{why}"
        );
        drop(first);
        DataLock::acquire(&dir).unwrap();
    }

    #[test]
    fn the_folder_is_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let _lock = DataLock::acquire(&data).unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            (mode(&data), mode(&data.join("nitro.lock"))),
            (0o700, 0o600)
        );
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let why = DataLock::acquire(&file.join("data")).unwrap_err();
        assert!(why.ends_with("choose another data_dir"), "{why}");
    }
}
