//! `nitro migrate-store`: everything from one database into another.
//!
//! In: two databases as the key `database` names them. Out: the target filled and compared, progress on standard error,
//! and the key to change. Promises: no server runs meanwhile (the data folder's lock is held), and what its journals hold
//! is in the source before it is read; a command that was interrupted is simply repeated. [`crate::store::sql::copy`] does the work.

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use crate::admin::{self, lock::DataLock};
use crate::config::Config;
use crate::store::sql::Database;
use crate::store::sql::copy::{Copy, Doing, Progress, Sum};

/// Copies, or only compares.
///
/// # Errors
/// A sentence.
pub fn run(config: &Config, to: &str, from: Option<&str>, verify: bool) -> Result<(), String> {
    let own = admin::database(config)?;
    let parse = |option: &str, text: &str| {
        Database::parse(text).map_err(|error| format!("{option}: {error}"))
    };
    let to = parse("--to", to)?;
    let from = from.map_or(Ok(own.clone()), |text| parse("--from", text))?;
    let _lock = DataLock::acquire(&config.data_dir)?;
    if let Database::Sqlite(path) = &from
        && !path.exists()
    {
        return Err(format!(
            "{}: there is no such database; name the one to copy with --from, or its data_dir",
            path.display()
        ));
    }
    if from.to_string() == own.to_string() {
        drop(admin::open_store(config)?);
    } else if holds_journals(config)? {
        return Err(format!(
            "the journals in {} belong to the database of the configuration, {own}, and not to {from}: set the key \
             `database` to the one to copy, or leave out --from",
            config.journal_dir().display()
        ));
    }
    let mut copy = Copy::open(&from, &to, false)?;
    let bar = bar();
    let mut tell = |progress| show(&bar, progress);
    let sums = match verify {
        true => copy.compare(&mut tell),
        false => copy.purge().and_then(|()| copy.run(&mut tell)),
    };
    copy.close();
    bar.finish_and_clear();
    let sums = sums?;
    eprintln!("{}", table(&sums));
    match verify {
        true => eprintln!("{from} and {to} hold the same"),
        false => eprintln!(
            "{to} holds everything that {from} does, compared row by row. Change the key `database` of the \
             configuration to it before nitro starts again; {from} is as it was"
        ),
    }
    Ok(())
}

/// Any segment counts: also one of which everything is in its database.
fn holds_journals(config: &Config) -> Result<bool, String> {
    let folder = config.journal_dir();
    let listed = match std::fs::read_dir(&folder) {
        Ok(listed) => listed,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(format!("{}: cannot be read ({error})", folder.display())),
    };
    let segment = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.path().extension().is_some_and(|e| e == "seg"))
    };
    Ok(listed.into_iter().any(segment))
}

/// A bar for a copy; nothing is drawn where there is no terminal.
pub(crate) fn bar() -> ProgressBar {
    let style = "{msg:26} {wide_bar} {human_pos} of {human_len}  {elapsed} of about {duration}";
    ProgressBar::new(0)
        .with_style(ProgressStyle::with_template(style).expect("the template is well formed"))
}

pub(crate) fn show(bar: &ProgressBar, progress: Progress) {
    let doing = match progress.doing {
        Doing::Copying => "copying",
        Doing::Comparing => "comparing",
    };
    let message = format!("{doing} {}", progress.table);
    if bar.message() != message {
        bar.reset();
        bar.set_message(message);
    }
    bar.set_length(progress.of);
    bar.set_position(progress.done);
}

/// One line for each table that has rows.
pub(crate) fn table(sums: &[Sum]) -> String {
    let lines = sums.iter().filter(|sum| sum.rows > 0).map(|sum| {
        let rows = HumanCount(sum.rows).to_string();
        format!(
            "  {:<16} {rows:>12} rows, checksum {}",
            sum.table, sum.checksum
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_segments_count_as_journals() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().into(),
            ..Config::default()
        };
        assert!(!holds_journals(&config).unwrap());
        let journals = config.journal_dir();
        std::fs::create_dir_all(&journals).unwrap();
        std::fs::write(journals.join("00000-1.spare"), "").unwrap();
        assert!(!holds_journals(&config).unwrap());
        std::fs::write(journals.join("00000-000000000001.seg"), "").unwrap();
        assert!(holds_journals(&config).unwrap());
    }

    #[test]
    fn a_database_that_is_not_there_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().join("data"),
            ..Config::default()
        };
        let to = format!("sqlite:{}", dir.path().join("to.db").display());
        let why = run(&config, &to, None, false).unwrap_err();
        assert!(why.contains("there is no such database"), "{why}");
        assert!(!dir.path().join("to.db").exists());
    }
}
