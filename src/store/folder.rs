//! The folder that a path lies in. In: a path that was made, renamed or removed. Out: that it stays so when the machine stops.

use std::fs::File;
use std::io;
use std::path::Path;

/// The folder of a path; of a bare name the one that the process works in.
pub fn above(path: &Path) -> &Path {
    let folder = path.parent().filter(|path| !path.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// What was done to the path's name is durable when this returns.
pub fn sync_above(path: &Path) -> io::Result<()> {
    File::open(above(path))?.sync_all()
}
