//! `nitro backup` and `nitro restore`: a blade in a folder, and back.
//!
//! ```text
//! nitro.db         everything that was accepted: accounts, rosters, archive, what waits (SQLite, whatever the server uses)
//! secret           32 bytes on which decoys, stable ids and tokens hang
//! certificate.pem  and key.pem: what the server shows its clients
//! uploads/         the files that users have uploaded, unless they are left out
//! manifest.json    written last: releases, positions of the journals, checksums of the files and the tables
//! ```
//!
//! Promise: a backup holds everything that was acknowledged before the command began, as the database had it at one
//! moment. The order is why no journal is in it: first the positions up to which all journals are durable are asked for
//! (whatever was acknowledged is before them, on the sender's side and on the recipient's); then the command waits until
//! the database has those; then it copies the database. The other order would need a copy of the journals that fits. What
//! is accepted while the command runs may be in the backup or not, and of a message that was on its way only one side.
//!
//! No shard and no lane takes part: the copy is made by the command's own process and connection, SQLite's by
//! `VACUUM INTO` (a reader of the write-ahead log, which holds up no writer; the log grows meanwhile), MySQL's by
//! [`Copy`] in one consistent view.
//!
//! Uploaded files never change, so they are in the backup by a second name of the same file (a hard link) where both folders are on one
//! file system, and copied elsewhere. They come after the positions were asked for: whatever an acknowledged message names is there. Marks of
//! removed accounts are those of before: an account that was removed since is in the backup with its files, or is not.
//!
//! A restore checks everything before it writes anything, wants an empty data folder and no uploads where it puts some, and begins journals anew: they get
//! new identities, so no position in the restored database is taken for theirs. Redis instances begin anew as well, for
//! their generations are in the data folder. A restore that was interrupted leaves its mark (`restoring` in the data
//! folder, `copying` in a MySQL database), with which no server starts, and is repeated.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use indicatif::{HumanBytes, ProgressBar};
use serde::{Deserialize, Serialize};

use crate::admin::client::Accounts;
use crate::admin::lock::{DataLock, RESTORING};
use crate::admin::{self, AdminReply, AdminRequest, JournalLine};
use crate::cli::unexpected;
use crate::config::Config;
use crate::migrate::{bar, show, table};
use crate::store::sql::Database;
use crate::store::sql::copy::{self, Copy, Sum};
use crate::store::upload::{self, Counted, Owner};

/// The format of the folder.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const DATABASE: &str = "nitro.db";
const SECRET: &str = "secret";
const CERTIFICATE: &str = "certificate.pem";
const KEY: &str = "key.pem";
const UPLOADS: &str = "uploads";
/// How often a running server is asked how far its database is.
const POLL: Duration = Duration::from_millis(50);

/// `manifest.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// The release that made it.
    nitro: String,
    domain: String,
    /// Unix seconds at which the copy began.
    began_at: u64,
    /// Of `nitro.db`.
    schema: i64,
    /// How far the journals were in the database, the running server's and earlier ones.
    positions: Vec<JournalPosition>,
    tables: Vec<Sum>,
    files: BTreeMap<String, FileSum>,
    /// Of the folder `uploads`; none where it was left out.
    #[serde(default)]
    uploads: Option<Counted>,
}

/// Only this is read of a manifest of another format.
#[derive(Deserialize)]
struct Format {
    format: u32,
    nitro: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct JournalPosition {
    identity: u64,
    journal: u16,
    seq: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileSum {
    bytes: u64,
    sha256: String,
}

/// Makes the folder `to`. `wait`: how long the database may take to have everything that was accepted.
///
/// # Errors
/// A sentence.
pub fn backup(config: &Config, to: &Path, wait: Duration, uploads: bool) -> Result<(), String> {
    let began = Instant::now();
    let database = admin::database(config)?;
    if let Database::Sqlite(path) = &database
        && !path.exists()
    {
        return Err(format!(
            "{}: there is no database to back up; is data_dir right?",
            path.display()
        ));
    }
    check_new(to)?;
    // While no server runs, this holds the lock and carries the journals over.
    let mut accounts = Accounts::open(config)?;
    let bar = bar();
    // before the positions: what these accounts have lost is in the database, so their marks delete nothing that it still names
    let own = config.upload_dir();
    let gone = uploads.then(|| upload::marks(&own)).transpose();
    let gone = gone.map_err(|e| format!("{}: cannot be read ({e})", own.display()))?;
    let wanted = wait_for_database(&mut accounts, wait, &bar)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(to)
        .map_err(|e| {
            format!(
                "{}: the folder cannot be made ({e}); choose another one",
                to.display()
            )
        })?;
    let filled = fill(config, &database, to, &wanted, gone.as_deref(), &bar);
    bar.finish_and_clear();
    let manifest = match filled {
        Ok(manifest) => manifest,
        Err(sentence) => {
            // Half a backup is none.
            let _ = fs::remove_dir_all(to);
            return Err(sentence);
        }
    };
    eprintln!("{}", table(&manifest.tables));
    if let Some(uploads) = manifest.uploads {
        eprintln!(
            "{} uploaded files, {}",
            uploads.files,
            HumanBytes(uploads.bytes)
        );
    }
    eprintln!(
        "{0}: {1} in {2:.1} s; it holds secrets, keep it as safe as the data folder. Restore it with: nitro restore {0}",
        to.display(),
        HumanBytes(manifest.files.values().map(|file| file.bytes).sum()),
        began.elapsed().as_secs_f32(),
    );
    Ok(())
}

/// Makes the files of a backup in the empty folder `to`, the manifest last; `uploads`: with these marks of removed accounts.
fn fill(
    config: &Config,
    database: &Database,
    to: &Path,
    wanted: &[JournalLine],
    uploads: Option<&[(Owner, u64)]>,
    bar: &ProgressBar,
) -> Result<Manifest, String> {
    let began_at = unix_seconds();
    let copied = to.join(DATABASE);
    match database {
        Database::Sqlite(path) => {
            bar.set_message("copying");
            copy::vacuum_into(path, &copied)?;
        }
        Database::MySql(_) => {
            let target = Database::Sqlite(copied.clone());
            let mut copy = Copy::open(database, &target, true)?;
            let done = copy.run(&mut |progress| show(bar, progress));
            copy.close();
            done?;
        }
    }
    private(&copied)?;
    let described = copy::describe(&copied, &mut |progress| show(bar, progress))?;
    for one in wanted.iter().filter(|one| one.committed > 0) {
        let mut there = described.positions.iter();
        if !there.any(|at| {
            (at.journal, at.identity) == (one.shard, one.identity) && at.seq >= one.committed
        }) {
            return Err(format!(
                "the copy of {database} does not hold all that the journal of shard {} had given it; no backup was made",
                one.shard
            ));
        }
    }
    let (certificate, key, _) = config.certificate_paths();
    let secret = config.data_dir.join(SECRET);
    let mut files = BTreeMap::new();
    // A server that was never started has neither secret nor certificate.
    for (from, name) in [(secret, SECRET), (certificate, CERTIFICATE), (key, KEY)] {
        if from.exists() {
            files.insert(name.to_owned(), copy_file(&from, &to.join(name))?);
        }
    }
    files.insert(DATABASE.to_owned(), sum_of(&copied)?);
    sync(&copied)?;
    let own = config.upload_dir();
    let uploads = uploads
        .filter(|_| own.exists())
        .map(|gone| copy_uploads(&own, &to.join(UPLOADS), gone, bar))
        .transpose()?;
    let positions = described.positions.iter().map(|at| JournalPosition {
        identity: at.identity,
        journal: at.journal,
        seq: at.seq,
    });
    let manifest = Manifest {
        format: FORMAT,
        nitro: env!("CARGO_PKG_VERSION").into(),
        domain: config.domain.clone(),
        began_at,
        schema: copy::schema_newest(),
        positions: positions.collect(),
        tables: described.sums,
        files,
        uploads,
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| format!("{MANIFEST}: {e}"))?;
    write_new(&to.join(MANIFEST), &text)?;
    sync(to)?;
    Ok(manifest)
}

/// Fills the empty data folder, and the database of the configuration, from the folder `from`.
///
/// # Errors
/// A sentence.
pub fn restore(config: &Config, from: &Path) -> Result<(), String> {
    let manifest = read_manifest(from)?;
    if manifest.domain != config.domain {
        return Err(format!(
            "{}: this is a backup of the domain {}, and the configuration says {}; set the key `domain`",
            from.display(),
            manifest.domain,
            config.domain
        ));
    }
    check_files(from, &manifest)?;
    let database = admin::database(config)?;
    let _lock = DataLock::acquire_to_restore(&config.data_dir)?;
    let staging = config.data_dir.join(RESTORING);
    check_empty(config, &database, &staging, manifest.uploads.is_some())?;
    let cannot = |e: io::Error| format!("{}: cannot be made ({e})", staging.display());
    match fs::remove_dir_all(&staging) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(cannot(e)),
        _ => {}
    }
    DirBuilder::new()
        .mode(0o700)
        .create(&staging)
        .map_err(cannot)?;
    sync(&config.data_dir)?;

    for name in manifest.files.keys() {
        let copied = copy_file(&from.join(name), &staging.join(name))?;
        if copied != manifest.files[name] {
            return Err(format!(
                "{}: it changed while it was read",
                from.join(name).display()
            ));
        }
    }
    let copied = staging.join(DATABASE);
    let bar = bar();
    let described = copy::describe(&copied, &mut |progress| show(&bar, progress))?;
    // An older schema has just been brought up to date, and its sums with it.
    if manifest.schema == copy::schema_newest() && described.sums != manifest.tables {
        return Err(format!(
            "{}: its tables are not what the manifest says; use another backup",
            from.join(DATABASE).display()
        ));
    }
    if manifest.uploads.is_some() {
        let from = from.join(UPLOADS);
        let gone = upload::marks(&from)
            .map_err(|e| format!("{}: cannot be read ({e})", from.display()))?;
        copy_uploads(&from, &config.upload_dir(), &gone, &bar)?;
    }
    let (certificate, key, own) = config.certificate_paths();
    let mut places = vec![(SECRET, config.data_dir.join(SECRET))];
    if own {
        places.push((CERTIFICATE, certificate.clone()));
        places.push((KEY, key.clone()));
    }
    match &database {
        Database::MySql(_) => {
            let mut copy = Copy::open(&Database::Sqlite(copied), &database, false)?;
            let done = copy
                .purge()
                .and_then(|()| copy.run(&mut |progress| show(&bar, progress)));
            copy.close();
            done?;
        }
        // The last one: without it nothing is restored.
        Database::Sqlite(path) => places.push((DATABASE, path.clone())),
    }
    for (name, place) in &places {
        if manifest.files.contains_key(*name) {
            put(&staging.join(name), place)?;
        }
    }
    sync(&config.data_dir)?;
    fs::remove_dir_all(&staging)
        .map_err(|e| format!("{}: cannot be removed ({e})", staging.display()))?;
    sync(&config.data_dir)?;
    bar.finish_and_clear();
    eprintln!("{}", table(&manifest.tables));
    if !own && manifest.files.contains_key(CERTIFICATE) {
        eprintln!(
            "the certificate and its key are left to you: {0}/{CERTIFICATE} belongs to {1}, {0}/{KEY} to {2}",
            from.display(),
            certificate.display(),
            key.display()
        );
    }
    eprintln!(
        "{database} and {} are as the backup had them; start nitro",
        config.data_dir.display()
    );
    Ok(())
}

/// Waits until the database has what was durable in the journals when this began; says what that is.
fn wait_for_database(
    accounts: &mut Accounts,
    wait: Duration,
    bar: &ProgressBar,
) -> Result<Vec<JournalLine>, String> {
    let begun = Instant::now();
    let wanted = journals(accounts)?;
    let all: u64 = wanted
        .iter()
        .map(|one| one.committed - one.drained.min(one.committed))
        .sum();
    bar.set_message("waiting for the database");
    bar.set_length(all);
    loop {
        let now = journals(accounts)?;
        let behind = |one: &&JournalLine| {
            let same = now
                .iter()
                .find(|at| (at.shard, at.identity) == (one.shard, one.identity));
            // A journal of a shard that is no more goes when all of it is in the database.
            same.is_some_and(|at| at.drained < one.committed)
        };
        let Some(late) = wanted.iter().find(behind) else {
            return Ok(wanted);
        };
        if begun.elapsed() > wait {
            return Err(format!(
                "the database has not taken within {} s what was accepted before (the journal of shard {} is at {}): see \
                 to the database, or give it more time with --wait; no backup was made",
                wait.as_secs(),
                late.shard,
                late.committed
            ));
        }
        let left: u64 = now
            .iter()
            .map(|one| one.committed - one.drained.min(one.committed))
            .sum();
        bar.set_position(all.saturating_sub(left));
        std::thread::sleep(POLL);
    }
}

fn journals(accounts: &mut Accounts) -> Result<Vec<JournalLine>, String> {
    match accounts.call(AdminRequest::Journals)? {
        // Another release may know another schema, and this one would change the running server's database.
        AdminReply::Journals { release, .. } if release != env!("CARGO_PKG_VERSION") => {
            Err(format!(
                "the running nitro is release {release}, this command {}; use its own nitro command",
                env!("CARGO_PKG_VERSION")
            ))
        }
        AdminReply::Journals { journals, .. } => Ok(journals),
        other => Err(unexpected(&other)),
    }
}

// ---- what a restore checks -----------------------------------------------------------------------------------------

fn read_manifest(from: &Path) -> Result<Manifest, String> {
    let path = from.join(MANIFEST);
    let shown = path.display();
    let text = fs::read(&path).map_err(|e| {
        format!("{shown}: cannot be read ({e}); name the folder of a backup that was finished")
    })?;
    let damaged = |e| format!("{shown}: this is no manifest of a backup ({e}); use another backup");
    let format: Format = serde_json::from_slice(&text).map_err(damaged)?;
    if format.format != FORMAT {
        return Err(format!(
            "{shown}: the backup has format {}, this nitro reads {FORMAT}: restore it with nitro {}",
            format.format, format.nitro
        ));
    }
    let manifest: Manifest = serde_json::from_slice(&text).map_err(damaged)?;
    if manifest.schema > copy::schema_newest() {
        return Err(format!(
            "{shown}: the backup has schema {}, this nitro knows schemas up to {}: it was made by a newer nitro, restore \
             it with nitro {}",
            manifest.schema,
            copy::schema_newest(),
            manifest.nitro
        ));
    }
    let known = [DATABASE, SECRET, CERTIFICATE, KEY];
    match manifest
        .files
        .keys()
        .find(|name| !known.contains(&name.as_str()))
    {
        Some(name) => Err(format!(
            "{shown}: it names a file {name:?}, which is none of a backup's; use another backup"
        )),
        None if !manifest.files.contains_key(DATABASE) => Err(format!(
            "{shown}: it names no {DATABASE}; use another backup"
        )),
        None => Ok(manifest),
    }
}

fn check_files(from: &Path, manifest: &Manifest) -> Result<(), String> {
    for (name, wanted) in &manifest.files {
        let path = from.join(name);
        if sum_of(&path)? != *wanted {
            return Err(format!(
                "{}: it is not what the manifest says (length or SHA-256 differ): it was damaged since; use another backup",
                path.display()
            ));
        }
    }
    if let Some(wanted) = manifest.uploads {
        let folder = from.join(UPLOADS);
        let broken = |why: String| format!("{why}; use another backup");
        let counted =
            upload::count(&folder).map_err(|e| broken(format!("{}: {e}", folder.display())))?;
        if counted != wanted {
            return Err(broken(format!(
                "{}: it holds {} files, and {} were put into it",
                folder.display(),
                counted.files,
                wanted.files
            )));
        }
    }
    Ok(())
}

fn copy_uploads(
    from: &Path,
    to: &Path,
    gone: &[(Owner, u64)],
    bar: &ProgressBar,
) -> Result<Counted, String> {
    let mut tell = |so_far: Counted| bar.set_message(format!("uploads: {}", so_far.files));
    upload::copy_all(from, to, gone, &mut tell)
        .map_err(|e| format!("{}: uploads cannot be copied to it ({e})", to.display()))
}

/// Nothing but the lock, and what an interrupted restore left. `uploads`: they are restored, too, so there is nothing of others and no
/// mark that would delete them.
fn check_empty(
    config: &Config,
    database: &Database,
    staging: &Path,
    uploads: bool,
) -> Result<(), String> {
    let again = staging.exists();
    let upload_dir = config.upload_dir();
    let below = below(&config.data_dir, &upload_dir);
    let own = |name: &str| {
        let mut below = below.iter().flat_map(|below| below.iter());
        // it may have others beside it where it lies deeper
        below.next() == Some(name.as_ref()) && (again || below.next().is_none())
    };
    let fills = |name: &str| again && [DATABASE, SECRET, CERTIFICATE, KEY].contains(&name);
    let occupied = |folder: &Path, ignored: &dyn Fn(&str) -> bool| -> Result<(), String> {
        let listed = match fs::read_dir(folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            listed => listed.map_err(|e| format!("{}: cannot be read ({e})", folder.display()))?,
        };
        for entry in listed {
            let name = entry
                .map_err(|e| format!("{}: cannot be read ({e})", folder.display()))?
                .file_name();
            let name = name.to_string_lossy();
            if !ignored(&name) {
                return Err(format!(
                    "{}: is not empty (there is {name}); a restore wants an empty data_dir, no journals and no \
                     uploads: name other ones, or move away what is there",
                    folder.display()
                ));
            }
        }
        Ok(())
    };
    occupied(&config.data_dir, &|name| {
        name == "nitro.lock" || name == RESTORING || fills(name) || uploads && own(name)
    })?;
    if uploads && below.as_deref() != Some(Path::new("")) {
        occupied(&upload_dir, &|_| again)?;
    }
    occupied(&config.journal_dir(), &|_| false)?;
    match database {
        Database::Sqlite(path) if path.exists() && !again => Err(format!(
            "{}: is there already; name another database, or move it away",
            path.display()
        )),
        _ => Ok(()),
    }
}

/// The path of a folder in another one, if it is there.
fn below(folder: &Path, path: &Path) -> Option<PathBuf> {
    let whole = |path: &Path| fs::canonicalize(path).or_else(|_| std::path::absolute(path));
    let (folder, path) = (whole(folder).ok()?, whole(path).ok()?);
    path.strip_prefix(folder).ok().map(Path::to_owned)
}

fn check_new(to: &Path) -> Result<(), String> {
    match fs::read_dir(to).map(|mut listed| listed.next().is_none()) {
        Ok(true) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(format!(
            "{}: is there already; name a new folder",
            to.display()
        )),
    }
}

// ---- files ---------------------------------------------------------------------------------------------------------

/// Durable, for the owner only, with its sum.
fn copy_file(from: &Path, to: &Path) -> Result<FileSum, String> {
    let cannot = |e: io::Error| {
        format!(
            "{}: cannot be copied to {} ({e})",
            from.display(),
            to.display()
        )
    };
    let mut source = File::open(from).map_err(cannot)?;
    let mut target = new_file(to).map_err(cannot)?;
    let mut target_sum = Sha256::default();
    read_through(&mut source, |bytes| {
        target_sum.add(bytes);
        target.write_all(bytes)
    })
    .map_err(cannot)?;
    target.sync_all().map_err(cannot)?;
    Ok(target_sum.finish())
}

fn sum_of(path: &Path) -> Result<FileSum, String> {
    let cannot = |e: io::Error| format!("{}: cannot be read ({e})", path.display());
    let mut sum = Sha256::default();
    let mut file = File::open(path).map_err(cannot)?;
    read_through(&mut file, |bytes| {
        sum.add(bytes);
        Ok(())
    })
    .map_err(cannot)?;
    Ok(sum.finish())
}

fn read_through(file: &mut File, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            n => each(&buffer[..n])?,
        }
    }
}

struct Sha256(aws_lc_rs::digest::Context, u64);

impl Default for Sha256 {
    fn default() -> Sha256 {
        Sha256(
            aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256),
            0,
        )
    }
}

impl Sha256 {
    fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
        self.1 += bytes.len() as u64;
    }

    fn finish(self) -> FileSum {
        let hash = self.0.finish();
        FileSum {
            bytes: self.1,
            sha256: hash.as_ref().iter().map(|b| format!("{b:02x}")).collect(),
        }
    }
}

/// Into its place by a rename, or by a copy and a rename where that is another file system.
fn put(from: &Path, to: &Path) -> Result<(), String> {
    let cannot = |e: io::Error| format!("{}: cannot be made ({e})", to.display());
    let folder = to
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(cannot)?;
    if let Err(error) = fs::rename(from, to) {
        if error.kind() != io::ErrorKind::CrossesDevices {
            return Err(cannot(error));
        }
        let mut beside = to.as_os_str().to_owned();
        beside.push(".restoring");
        let beside = PathBuf::from(beside);
        let _ = fs::remove_file(&beside);
        copy_file(from, &beside)?;
        fs::rename(&beside, to).map_err(cannot)?;
    }
    sync(folder)
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let write = || {
        let mut file = new_file(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| format!("{}: cannot be written ({e})", path.display()))
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn private(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(|e| format!("{}: its mode cannot be set ({e})", path.display()))
}

/// A file or a folder.
fn sync(path: &Path) -> Result<(), String> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|e| format!("{}: cannot be synced ({e})", path.display()))
}

fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_are_restored_only_where_there_are_none_and_again_after_an_interruption() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let staging = data.join(RESTORING);
        let database = Database::Sqlite(data.join(DATABASE));
        let check = |uploads: &Path, restored: bool| {
            let sets = [
                format!("data_dir='{}'", data.display()),
                format!("upload.dir='{}'", uploads.display()),
            ];
            let config = Config::load(None, &sets).unwrap();
            check_empty(&config, &database, &staging, restored)
        };
        let outside = dir.path().join("uploads");
        let inside = data.join("other");
        fs::create_dir_all(&inside).unwrap();
        // empty
        check(&inside, true).unwrap();
        check(&outside, true).unwrap_err();
        fs::remove_dir(&inside).unwrap();
        check(&outside, true).unwrap();
        for uploads in [&outside, &inside] {
            upload::mark_gone(uploads, Owner([1; 16]), 1_790_000_000).unwrap();
            let why = check(uploads, true).unwrap_err();
            assert!(why.contains("(there is gone)"), "{why}");
            fs::create_dir(&staging).unwrap();
            check(uploads, true).unwrap();
            fs::remove_dir(&staging).unwrap();
            fs::remove_dir_all(&inside).ok();
        }
        // left out, they stay as they are
        check(&outside, false).unwrap();
    }
}
