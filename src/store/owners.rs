//! Since when every user has had the same owner: what a journal says of somebody is the newest only from then on, unless the
//! database can be asked.
//!
//! In: the number of shards of a start, and the highest id that is known. Out: an [`Id`]; what is newer was written since
//! the owners are what they are, so no other journal can have had anything newer that was carried over and is gone from
//! it. Promise: the file is durable before anything is journalled in that start; without it everything is in doubt, and
//! whoever changes the database by hand removes it.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use super::change::Id;
use super::folder::sync_above;

/// What stands in the file is told, and made true for this start.
///
/// # Errors
/// The file cannot be written.
pub fn since(path: &Path, shards: usize, last_id: Id) -> io::Result<Id> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let known = parse(&text).filter(|(known, _)| *known == shards);
    if let Some((_, since)) = known {
        return Ok(since);
    }
    let aside = path.with_extension("new");
    let mut file = fs::File::create(&aside)?;
    writeln!(file, "{shards} {}", last_id.0)?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    sync_above(path)?;
    Ok(last_id)
}

/// The database is about to be changed by hand: from then on it is asked.
///
/// # Errors
/// The file cannot be removed.
pub fn forget(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_above(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn parse(text: &str) -> Option<(usize, Id)> {
    let (shards, since) = text.trim_end().split_once(' ')?;
    Some((shards.parse().ok()?, Id(since.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_the_same_as_long_as_the_number_of_shards_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("owners");
        let since = |shards, last_id| since(&path, shards, Id(last_id)).unwrap().0;
        assert_eq!(since(2, 0), 0);
        assert_eq!(since(2, 50), 0);
        assert_eq!(since(3, 60), 60);
        assert_eq!(since(2, 70), 70);
        assert_eq!(since(2, 80), 70);
        forget(&path).unwrap();
        forget(&path).unwrap();
        assert_eq!(since(2, 90), 90);
        fs::write(&path, "2 9").unwrap();
        assert_eq!(since(2, 95), 9);
        fs::write(&path, "nonsense").unwrap();
        assert_eq!(since(2, 99), 99);
    }
}
