//! Uploaded files (XEP-0363): the folder, and who may put how much into it.
//!
//! In: slots that are asked for, bodies piece by piece. Out: files that are read piece by piece. Everything here blocks, so it runs on
//! threads of its own and never on a shard; the lock on the quotas is taken only there.
//!
//! A file is `FOLDER/OO/OWNER/NAME`. OWNER is a number that stands for the account (its first two digits are the fan-out), NAME has all
//! that must be known of the file: when its slot was given, its length, its random number, its type ([`Entry`]). No part of a path
//! is ever what a client has said. Since the names tell length and age, what a user has is one listing of his folder, which is read when he
//! asks first; so quotas are right after a restart, and there is one account of them for all shards.
//!
//! Promises: a file is there whole or not at all: it is written under `FOLDER/new`, synced, and only then gets its name, which no
//! other file ever had; what a stop leaves in `new` is removed at the next start. It is durable when it is answered.
//!
//! When an account is removed, `FOLDER/gone` gets an empty file whose name says whose files up to when are gone ([`mark_gone`]). From then on
//! nobody gets them; they are removed piece by piece, after a restart too. The mark stays for a day, for slots and bodies
//! that were on their way; an account of the same name that is made later has its own.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::folder::{above, sync_above};

/// Who a file belongs to, without saying it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(pub [u8; 16]);

/// Types that a browser may show in a page, with the ending that stands for each. Nothing among them can run there: no HTML, no SVG, no
/// XML, no PDF. The first ending of a type is the one that is written.
pub const INLINE: &[(&str, &str)] = &[
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("png", "image/png"),
    ("gif", "image/gif"),
    ("webp", "image/webp"),
    ("avif", "image/avif"),
    ("mp3", "audio/mpeg"),
    ("m4a", "audio/mp4"),
    ("m4a", "audio/x-m4a"),
    ("ogg", "audio/ogg"),
    ("opus", "audio/opus"),
    ("wav", "audio/wav"),
    ("wav", "audio/x-wav"),
    ("weba", "audio/webm"),
    ("mp4", "video/mp4"),
    ("webm", "video/webm"),
    ("ogv", "video/ogg"),
];

/// Of everything else: it is only ever saved.
pub const OTHER: &str = "bin";
pub const OTHER_TYPE: &str = "application/octet-stream";

/// The ending under which a file of this content type is kept.
pub fn ending_of_type(content_type: &str) -> &'static str {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let found = INLINE
        .iter()
        .find(|(_, typ)| typ.eq_ignore_ascii_case(essence));
    found.map_or(OTHER, |(ending, _)| ending)
}

/// The same for a file name.
pub fn ending_of_name(name: &str) -> &'static str {
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    let found = INLINE
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(ending));
    found.map_or(OTHER, |(_, typ)| ending_of_type(typ))
}

/// A file, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When its slot was given, unix seconds.
    pub at: u64,
    pub bytes: u64,
    pub id: [u8; 16],
    pub ending: &'static str,
}

impl Entry {
    pub fn name(&self) -> String {
        let id = hex(&self.id);
        format!("{:x}-{:x}-{id}.{}", self.at, self.bytes, self.ending)
    }

    /// Only what [`Entry::name`] gives, byte for byte.
    pub fn parse(name: &str) -> Option<Entry> {
        let (rest, ending) = name.split_once('.')?;
        let mut parts = rest.split('-');
        let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
        let (at, bytes) = (number()?, number()?);
        let entry = Entry {
            at,
            bytes,
            id: unhex(parts.next()?)?,
            ending: match ending {
                OTHER => OTHER,
                _ => INLINE.iter().find(|(known, _)| *known == ending)?.0,
            },
        };
        (entry.name() == name).then_some(entry)
    }

    pub fn content_type(&self) -> &'static str {
        let found = INLINE.iter().find(|(ending, _)| *ending == self.ending);
        found.map_or(OTHER_TYPE, |(_, typ)| typ)
    }

    /// May a browser show it?
    pub fn is_inline(&self) -> bool {
        self.ending != OTHER
    }
}

impl Owner {
    pub fn name(&self) -> String {
        hex(&self.0)
    }

    pub fn parse(name: &str) -> Option<Owner> {
        unhex(name).map(Owner)
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Lower case only, so that each number has one name.
fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != 2 * N || !text.bytes().all(lower) {
        return None;
    }
    let mut bytes = [0; N];
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * n..2 * n + 2], 16).ok()?;
    }
    Some(bytes)
}

/// From the section `upload` of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub day_bytes_max: u64,
    pub user_bytes_max: u64,
    pub user_files_max: usize,
    /// Of all files.
    pub bytes_max: u64,
    /// 0: for ever.
    pub keep_seconds: u64,
    pub slot_seconds: u64,
}

/// Why there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A user's quota; unix seconds when there is room again, if time alone makes any.
    Quota(Option<u64>),
    /// All users' files together.
    Full,
    /// The folder cannot be read or written.
    Broken,
}

/// Why a body is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotTaken {
    /// There is, or comes, such a file already.
    Replayed,
    /// The account whose slot it was is no more.
    Gone,
    Refused(Refused),
}

const DAY: u64 = 86_400;
/// Users whose files are remembered.
const USERS_MAX: usize = 10_000;

/// Files of removed accounts that are removed in one go.
const CLEARED_AT_ONCE: usize = 100;
/// How long it is remembered that an account was removed: longer than a body is on its way.
const GONE_SECONDS: u64 = DAY;

#[derive(Default)]
struct Usage {
    /// When, and how long.
    files: Vec<(u64, u64)>,
    /// Slots without a file: until when, how long, which.
    slots: Vec<(u64, u64, [u8; 16])>,
}

#[derive(Default)]
struct Quotas {
    users: HashMap<Owner, Usage>,
    /// Bytes of files that came since they were counted last, or are being counted.
    come: u64,
}

pub struct Folder {
    root: PathBuf,
    bounds: Mutex<Bounds>,
    quotas: Mutex<Quotas>,
    /// Removed accounts: until when what they put is gone, and whether all of it has been removed.
    gone: Mutex<HashMap<Owner, (u64, bool)>>,
    /// Of all files, those that were counted at the last sweep and those that have come since.
    bytes: AtomicU64,
}

/// A body that is being written.
pub struct Writing {
    file: File,
    path: PathBuf,
    owner: Owner,
    entry: Entry,
    written: u64,
    done: bool,
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.done {
            // what cannot be removed now is at the next start
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Folder {
    /// Makes the folder, and removes what was never whole.
    pub fn open(root: &Path, bounds: Bounds) -> io::Result<Folder> {
        let new = root.join("new");
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        make_dir(&new)?;
        let mut gone = HashMap::new();
        for (owner, at) in marks(root)? {
            let (until, _) = gone.entry(owner).or_insert((at, false));
            *until = at.max(*until);
        }
        Ok(Folder {
            root: root.to_owned(),
            bounds: Mutex::new(bounds),
            quotas: Mutex::default(),
            gone: Mutex::new(gone),
            bytes: AtomicU64::new(0),
        })
    }

    pub fn configure(&self, bounds: Bounds) {
        *lock(&self.bounds) = bounds;
    }

    /// Bytes of all files. Those that were there at the start count as soon as the first sweep has gone through them.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Is there room for one more? Then it is kept until the slot expires.
    pub fn reserve(&self, owner: Owner, entry: &Entry, now: u64) -> Result<(), Refused> {
        let bounds = *lock(&self.bounds);
        if let Some(until) = self.gone_until(owner).filter(|until| entry.at <= *until) {
            // an account of that name was made within this second
            return Err(Refused::Quota(Some(until + 1)));
        }
        let mut quotas = lock(&self.quotas);
        let usage = self.usage(&mut quotas, owner)?;
        usage.slots.retain(|(until, ..)| *until > now);
        if bounds.keep_seconds > 0 {
            usage
                .files
                .retain(|(at, _)| at.saturating_add(bounds.keep_seconds) > now);
        }
        if usage.slots.iter().any(|(.., id)| *id == entry.id) {
            return Ok(());
        }
        if self.bytes().saturating_add(entry.bytes) > bounds.bytes_max {
            return Err(Refused::Full);
        }
        usage.has_room(entry.bytes, &bounds, now)?;
        let until = entry.at.saturating_add(bounds.slot_seconds);
        usage.slots.push((until, entry.bytes, entry.id));
        Ok(())
    }

    /// The usage of a user, read from his folder when it is not known.
    fn usage<'q>(&self, quotas: &'q mut Quotas, owner: Owner) -> Result<&'q mut Usage, Refused> {
        if !quotas.users.contains_key(&owner) {
            if quotas.users.len() >= USERS_MAX {
                quotas.users.retain(|_, usage| !usage.slots.is_empty());
            }
            let files = entries(&self.dir(owner)).map_err(|error| broken("read", &error))?;
            let gone = self.gone_until(owner);
            let files = files
                .iter()
                .filter(|entry| gone.is_none_or(|until| entry.at > until));
            let files = files.map(|entry| (entry.at, entry.bytes)).collect();
            let usage = Usage {
                files,
                slots: Vec::new(),
            };
            quotas.users.insert(owner, usage);
        }
        Ok(quotas.users.entry(owner).or_default())
    }

    /// A body begins. Its slot was checked; after a restart nobody remembers it, so there must be room once more.
    pub fn begin(&self, owner: Owner, entry: Entry, now: u64) -> Result<Writing, NotTaken> {
        if self.is_gone(owner, &entry) {
            return Err(NotTaken::Gone);
        }
        if self.path(owner, &entry).exists() {
            return Err(NotTaken::Replayed);
        }
        self.reserve(owner, &entry, now)
            .map_err(NotTaken::Refused)?;
        let path = self.root.join("new").join(entry.name());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        match file {
            Ok(file) => Ok(Writing {
                file,
                path,
                owner,
                entry,
                written: 0,
                done: false,
            }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(NotTaken::Replayed),
            Err(error) => Err(NotTaken::Refused(broken("written", &error))),
        }
    }

    /// All of the body is there: the file is durable when this returns.
    pub fn finish(&self, mut writing: Writing) -> io::Result<()> {
        if writing.written != writing.entry.bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        writing.file.sync_data()?;
        let dir = self.dir(writing.owner);
        let path = self.path(writing.owner, &writing.entry);
        make_dir(&dir)?;
        // held until it has its name: who removes the account's files finds it, or it gets none
        let gone = lock(&self.gone);
        if gone
            .get(&writing.owner)
            .is_some_and(|(until, _)| writing.entry.at <= *until)
        {
            return Err(io::ErrorKind::NotFound.into());
        }
        // fails if there is such a file, so that nothing is ever replaced
        match fs::hard_link(&writing.path, &path) {
            // a sweep has just removed the empty folder
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_dir(&dir)?;
                fs::hard_link(&writing.path, &path)?;
            }
            other => other?,
        }
        drop(gone);
        File::open(&dir)?.sync_all()?;
        writing.done = true;
        let _ = fs::remove_file(&writing.path);
        let mut quotas = lock(&self.quotas);
        let entry = writing.entry;
        quotas.come += entry.bytes;
        self.bytes.fetch_add(entry.bytes, Relaxed);
        if let Some(usage) = quotas.users.get_mut(&writing.owner) {
            usage.slots.retain(|(.., id)| *id != entry.id);
            usage.files.push((entry.at, entry.bytes));
        }
        Ok(())
    }

    /// A file, to be read; `None`: there is none.
    pub fn read(&self, owner: Owner, entry: &Entry, now: u64) -> io::Result<Option<File>> {
        let keep = lock(&self.bounds).keep_seconds;
        if keep > 0 && entry.at.saturating_add(keep) <= now || self.is_gone(owner, entry) {
            return Ok(None);
        }
        match File::open(self.path(owner, entry)) {
            Ok(file) if file.metadata()?.len() == entry.bytes => Ok(Some(file)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes files that are too old and counts the others; at the start and then now and then.
    pub fn sweep(&self, now: u64) -> io::Result<u64> {
        let keep = lock(&self.bounds).keep_seconds;
        lock(&self.quotas).come = 0;
        let (mut total, mut removed) = (0, 0);
        for fan in subfolders(&self.root)? {
            for owner in subfolders(&fan)? {
                let mut left = false;
                for entry in entries(&owner)? {
                    if keep > 0 && entry.at.saturating_add(keep) <= now {
                        fs::remove_file(owner.join(entry.name()))?;
                        removed += 1;
                    } else {
                        total += entry.bytes;
                        left = true;
                    }
                }
                if !left {
                    // somebody may just put something in
                    let _ = fs::remove_dir(&owner);
                }
            }
        }
        // what has come meanwhile was perhaps counted, too: rather too much than too little, until the next sweep
        let come = lock(&self.quotas).come;
        self.bytes.store(total + come, Relaxed);
        Ok(removed)
    }

    /// An account was removed: what it put up to then is gone. Durable when this returns.
    pub fn forget(&self, owner: Owner, at: u64) -> io::Result<()> {
        {
            let mut gone = lock(&self.gone);
            if gone.get(&owner).is_some_and(|(until, _)| at <= *until) {
                // written down before the last stop
                return Ok(());
            }
            gone.insert(owner, (at, false));
        }
        lock(&self.quotas).users.remove(&owner);
        mark_gone(&self.root, owner, at)
    }

    fn gone_until(&self, owner: Owner) -> Option<u64> {
        lock(&self.gone).get(&owner).map(|(until, _)| *until)
    }

    fn is_gone(&self, owner: Owner, entry: &Entry) -> bool {
        self.gone_until(owner)
            .is_some_and(|until| entry.at <= until)
    }

    /// Removes some of the files of removed accounts, and marks that nobody needs any more; how many files, 0: there are no more that can
    /// be removed. Transfers wait for no listing and no removal.
    pub fn clear(&self, now: u64) -> io::Result<usize> {
        let gone: Vec<_> = lock(&self.gone)
            .iter()
            .map(|(owner, (until, cleared))| (*owner, *until, *cleared))
            .collect();
        let expired = |until: u64| until.saturating_add(GONE_SECONDS) < now;
        let mut written: HashMap<Owner, Vec<u64>> = HashMap::new();
        if gone.iter().any(|(_, until, _)| expired(*until)) {
            for (owner, at) in marks(&self.root)? {
                written.entry(owner).or_default().push(at);
            }
        }
        let mut removed = 0;
        let mut failed = Vec::new();
        for (owner, until, cleared) in gone {
            if !cleared {
                match self.clear_owner(owner, until, &mut removed) {
                    Ok(true) => {}
                    Ok(false) => return Ok(removed),
                    Err(error) => {
                        failed.push((owner, error));
                        continue;
                    }
                }
            }
            let no_more = {
                let mut table = lock(&self.gone);
                let Some(mark) = table.get_mut(&owner).filter(|mark| mark.0 == until) else {
                    continue;
                };
                mark.1 = true;
                expired(until) && table.remove(&owner).is_some()
            };
            if no_more {
                let all = written.remove(&owner).unwrap_or_default();
                // one that is made meanwhile is newer
                for at in all.into_iter().filter(|at| *at <= until) {
                    let mark = self.root.join(GONE).join(mark_name(owner, at));
                    if let Err(error) = fs::remove_file(mark) {
                        failed.push((owner, error));
                    }
                }
            }
        }
        // once for all the pieces: this is the last one
        if removed == 0 {
            for (owner, error) in failed {
                let dir = self.dir(owner);
                tracing::error!(%error, dir = %dir.display(), "upload.dir: files of a removed account cannot be removed");
            }
        }
        Ok(removed)
    }

    /// `false`: there are more than may be removed in one go.
    fn clear_owner(&self, owner: Owner, until: u64, removed: &mut usize) -> io::Result<bool> {
        let dir = self.dir(owner);
        for entry in entries(&dir)? {
            if entry.at > until {
                continue;
            }
            if *removed == CLEARED_AT_ONCE {
                return Ok(false);
            }
            match fs::remove_file(dir.join(entry.name())) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            }
            *removed += 1;
            let less = |bytes: u64| Some(bytes.saturating_sub(entry.bytes));
            let _ = self.bytes.fetch_update(Relaxed, Relaxed, less);
        }
        // not if a later account of that name has something
        let _ = fs::remove_dir(&dir);
        Ok(true)
    }

    fn dir(&self, owner: Owner) -> PathBuf {
        let name = owner.name();
        self.root.join(&name[..2]).join(name)
    }

    fn path(&self, owner: Owner, entry: &Entry) -> PathBuf {
        self.dir(owner).join(entry.name())
    }
}

impl Usage {
    fn has_room(&self, bytes: u64, bounds: &Bounds, now: u64) -> Result<(), Refused> {
        let slots: u64 = self.slots.iter().map(|(_, bytes, _)| bytes).sum();
        let free_at = |mut too_much: u64, mut files: Vec<(u64, u64)>, after: u64| {
            files.sort_unstable();
            let mut files = files.into_iter();
            loop {
                let (at, bytes) = files.next()?;
                too_much = too_much.saturating_sub(bytes);
                if too_much == 0 {
                    return Some(at + after);
                }
            }
        };
        let recent = self.files.iter().copied();
        let recent: Vec<_> = recent.filter(|(at, _)| at + DAY > now).collect();
        let wanted = recent.iter().map(|(_, bytes)| bytes).sum::<u64>() + slots + bytes;
        if wanted > bounds.day_bytes_max {
            let at = free_at(wanted - bounds.day_bytes_max, recent, DAY);
            return Err(Refused::Quota(at));
        }
        let keep = bounds.keep_seconds;
        let later = |too_much, files: Vec<(u64, u64)>| match keep {
            0 => Err(Refused::Quota(None)),
            _ => Err(Refused::Quota(free_at(too_much, files, keep))),
        };
        let wanted = self.files.iter().map(|(_, bytes)| bytes).sum::<u64>() + slots + bytes;
        if wanted > bounds.user_bytes_max {
            return later(wanted - bounds.user_bytes_max, self.files.clone());
        }
        if self.files.len() + self.slots.len() >= bounds.user_files_max {
            let files = self.files.iter().map(|(at, _)| (*at, 1)).collect();
            return later(1, files);
        }
        Ok(())
    }
}

impl Writing {
    /// The next piece; more than the slot's length is refused.
    pub fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.written += piece.len() as u64;
        if self.written > self.entry.bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.file.write_all(piece)
    }
}

/// A piece of a file, of at most so many bytes.
pub fn piece(file: &File, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
    let mut piece = vec![0; bytes];
    let mut read = 0;
    while read < bytes {
        match file.read_at(&mut piece[read..], at + read as u64)? {
            0 => break,
            n => read += n,
        }
    }
    piece.truncate(read);
    Ok(piece)
}

/// Where marks of removed accounts are.
const GONE: &str = "gone";

fn mark_name(owner: Owner, at: u64) -> String {
    format!("{}-{at:x}", owner.name())
}

/// Writes down that what an owner put up to `at` (unix seconds) is gone; for who removes an account while no server runs. Durable
/// when this returns.
pub fn mark_gone(root: &Path, owner: Owner, at: u64) -> io::Result<()> {
    let dir = root.join(GONE);
    make_dir(&dir)?;
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(dir.join(mark_name(owner, at)))?
        .sync_all()?;
    File::open(&dir)?.sync_all()
}

/// The marks in the folder: whose files up to when are gone.
pub fn marks(root: &Path) -> io::Result<Vec<(Owner, u64)>> {
    let list = match fs::read_dir(root.join(GONE)) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let parse = |name: &str| {
        let (owner, at) = name.split_once('-')?;
        Some((Owner::parse(owner)?, u64::from_str_radix(at, 16).ok()?))
    };
    let mut found = Vec::new();
    for file in list {
        found.extend(file?.file_name().to_str().and_then(parse));
    }
    Ok(found)
}

/// Files of a folder of uploads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counted {
    pub files: u64,
    pub bytes: u64,
}

/// Copies all files of one folder into another, and these marks of its: by a second name for the same file (a hard link) where both
/// are on one file system, which costs no room. Nothing is ever written into a file that has its name, so the copy stays what it is. What is there
/// already stays, what goes meanwhile is left out. Durable when this returns.
pub fn copy_all(
    from: &Path,
    to: &Path,
    marks: &[(Owner, u64)],
    told: &mut dyn FnMut(Counted),
) -> io::Result<Counted> {
    let mut counted = Counted::default();
    make_dir(to)?;
    for (owner, at) in marks {
        mark_gone(to, *owner, *at)?;
    }
    for fan in subfolders(from)? {
        for owner in subfolders(&fan)? {
            let below = owner.strip_prefix(from).map_err(io::Error::other)?;
            let target = to.join(below);
            let entries = entries(&owner)?;
            if entries.is_empty() {
                continue;
            }
            make_dir(&target)?;
            for entry in entries {
                let name = entry.name();
                if link_or_copy(&owner.join(&name), &target.join(&name))? {
                    counted.files += 1;
                    counted.bytes += entry.bytes;
                }
            }
            File::open(&target)?.sync_all()?;
            told(counted);
        }
    }
    Ok(counted)
}

/// `false`: there is no such file any more.
fn link_or_copy(from: &Path, to: &Path) -> io::Result<bool> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    match fs::hard_link(from, to) {
        Ok(()) => return Ok(true),
        Err(error) if gone(&error) => return Ok(false),
        Err(error)
            if error.kind() == io::ErrorKind::AlreadyExists
                && fs::metadata(to)?.len() == fs::metadata(from)?.len() =>
        {
            return Ok(true);
        }
        // another file system, one without links, or half a file
        Err(_) => {}
    }
    // it has its name when it is whole and durable
    let beside = to.with_extension(COPYING);
    let copy = || {
        fs::copy(from, &beside)?;
        File::open(&beside)?.sync_all()?;
        fs::rename(&beside, to)
    };
    match copy() {
        Ok(()) => Ok(true),
        Err(error) => {
            let _ = fs::remove_file(&beside);
            match gone(&error) && !from.exists() {
                true => Ok(false),
                false => Err(error),
            }
        }
    }
}

/// The ending of a file that is being copied: none that [`Entry::parse`] knows.
const COPYING: &str = "copying";

/// Counts the files of a folder; an error: one has another length than its name says.
pub fn count(root: &Path) -> io::Result<Counted> {
    let mut counted = Counted::default();
    for fan in subfolders(root)? {
        for owner in subfolders(&fan)? {
            for entry in entries(&owner)? {
                let path = owner.join(entry.name());
                if fs::metadata(&path)?.len() != entry.bytes {
                    let why = format!("{}: it has not its length", path.display());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
                counted.files += 1;
                counted.bytes += entry.bytes;
            }
        }
    }
    Ok(counted)
}

fn broken(what: &str, error: &io::Error) -> Refused {
    tracing::error!(%error, "the folder of uploads (upload.dir) cannot be {what}");
    Refused::Broken
}

/// With those above it; what was made is durable when this returns.
fn make_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    make_dir(above(dir))?;
    match DirBuilder::new().mode(0o700).create(dir) {
        // somebody else was faster
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        other => other?,
    }
    match sync_above(dir) {
        // not ours, and only there to be gone through
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        synced => synced,
    }
}

/// The files in a folder that this release has written; none where there is no folder.
fn entries(dir: &Path) -> io::Result<Vec<Entry>> {
    let list = match fs::read_dir(dir) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for file in list {
        if let Some(entry) = file?.file_name().to_str().and_then(Entry::parse) {
            found.push(entry);
        }
    }
    Ok(found)
}

/// Those that are numbers: the fan-out, and owners in it; none where there is no folder.
fn subfolders(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let list = match fs::read_dir(dir) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for file in list {
        let file = file?;
        let name = file.file_name();
        let number = |name: &str| name.bytes().all(|b| b.is_ascii_hexdigit());
        if file.file_type()?.is_dir() && name.to_str().is_some_and(number) {
            found.push(file.path());
        }
    }
    Ok(found)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_790_000_000;
    const ALICE: Owner = Owner([0xab; 16]);

    fn bounds() -> Bounds {
        Bounds {
            day_bytes_max: 1000,
            user_bytes_max: 10_000,
            user_files_max: 5,
            bytes_max: 100_000,
            keep_seconds: 10 * DAY,
            slot_seconds: 300,
        }
    }

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path(), bounds()).unwrap();
        (dir, folder)
    }

    fn entry(n: u8, bytes: u64, at: u64) -> Entry {
        Entry {
            at,
            bytes,
            id: [n; 16],
            ending: "png",
        }
    }

    fn put(folder: &Folder, entry: Entry, now: u64) -> Result<(), NotTaken> {
        let mut writing = folder.begin(ALICE, entry, now)?;
        writing.write(&vec![7; entry.bytes as usize]).unwrap();
        folder.finish(writing).unwrap();
        Ok(())
    }

    fn files(dir: &Path) -> usize {
        let list = fs::read_dir(dir).unwrap();
        let count = |path: PathBuf| match path.is_dir() {
            true => files(&path),
            false => 1,
        };
        list.map(|file| count(file.unwrap().path())).sum()
    }

    #[test]
    fn a_name_is_read_back_and_nothing_else_is_a_name() {
        let one = entry(0xfe, 23_456, NOW);
        assert_eq!(Entry::parse(&one.name()), Some(one));
        let name = one.name();
        for wrong in [
            name.to_uppercase(),
            name.replace("png", "html"),
            name.replace(".png", ""),
            format!("{name}/"),
            format!("0{name}"),
            name.replacen('-', "-+", 1),
            name.replace("png", "png\0"),
            "../../nitro.db".to_owned(),
            String::new(),
        ] {
            assert_eq!(Entry::parse(&wrong), None, "{wrong:?}");
        }
        for wrong in ["", "..", "AB", &"AB".repeat(16), &"ab".repeat(17)] {
            assert_eq!(Owner::parse(wrong), None);
        }
    }

    #[test]
    fn nothing_that_can_run_in_a_page_is_shown_in_one() {
        for (typ, name) in [
            ("text/html", "a.html"),
            ("image/svg+xml", "a.svg"),
            ("application/xhtml+xml", "a.xhtml"),
            ("application/pdf", "a.pdf"),
            ("text/javascript", "a.js"),
            ("text/plain", "a.txt"),
            ("", "png"),
        ] {
            assert_eq!(ending_of_type(typ), OTHER);
            assert_eq!(ending_of_name(name), OTHER);
        }
        assert_eq!(ending_of_type("IMAGE/PNG; charset=x"), "png");
        assert_eq!(ending_of_name("a.b.JPEG"), "jpg");
        for (ending, _) in INLINE {
            let entry = Entry {
                ending: ending_of_name(&format!("a.{ending}")),
                ..entry(1, 1, 1)
            };
            let typ = entry.content_type();
            assert!(entry.is_inline() && !typ.contains("xml") && !typ.contains("text"));
        }
    }

    #[test]
    fn a_file_is_there_when_it_is_whole_and_nothing_is_left_of_one_that_is_not() {
        let (dir, folder) = folder();
        let one = entry(1, 10, NOW);
        let mut writing = folder.begin(ALICE, one, NOW).unwrap();
        writing.write(b"01234").unwrap();
        assert!(folder.read(ALICE, &one, NOW).unwrap().is_none());
        assert!(matches!(
            folder.begin(ALICE, one, NOW),
            Err(NotTaken::Replayed)
        ));
        assert!(folder.finish(writing).is_err());
        assert_eq!(files(dir.path()), 0);
        let mut writing = folder.begin(ALICE, one, NOW).unwrap();
        assert!(writing.write(b"0123456789x").is_err());
        drop(writing);
        assert_eq!(files(dir.path()), 0);
        let mut writing = folder.begin(ALICE, one, NOW).unwrap();
        writing.write(b"0123456789").unwrap();
        folder.finish(writing).unwrap();
        let file = folder.read(ALICE, &one, NOW).unwrap().unwrap();
        assert_eq!(piece(&file, 3, 4).unwrap(), b"3456");
        assert_eq!(piece(&file, 8, 400).unwrap(), b"89");
        assert_eq!(files(dir.path()), 1);
        assert!(matches!(
            folder.begin(ALICE, one, NOW),
            Err(NotTaken::Replayed)
        ));
        assert!(folder.read(Owner([1; 16]), &one, NOW).unwrap().is_none());
    }

    #[test]
    fn what_a_stop_left_is_removed_at_the_start() {
        let (dir, folder) = folder();
        let mut writing = folder.begin(ALICE, entry(1, 10, NOW), NOW).unwrap();
        writing.write(b"01234").unwrap();
        std::mem::forget(writing);
        put(&folder, entry(2, 10, NOW), NOW).unwrap();
        assert_eq!(files(dir.path()), 2);
        drop(folder);
        Folder::open(dir.path(), bounds()).unwrap();
        assert_eq!(files(dir.path()), 1);
    }

    #[test]
    fn slots_and_files_count_for_the_day_and_after_a_restart_too() {
        let (dir, folder) = folder();
        put(&folder, entry(1, 600, NOW), NOW).unwrap();
        folder
            .reserve(ALICE, &entry(2, 300, NOW + 10), NOW + 10)
            .unwrap();
        let third = entry(3, 200, NOW + 20);
        let until = Some(NOW + DAY);
        assert_eq!(
            folder.reserve(ALICE, &third, NOW + 20),
            Err(Refused::Quota(until))
        );
        // others have their own
        folder.reserve(Owner([1; 16]), &third, NOW + 20).unwrap();
        // the slot expires unused
        folder
            .reserve(ALICE, &entry(3, 200, NOW + 400), NOW + 400)
            .unwrap();
        let folder = Folder::open(dir.path(), bounds()).unwrap();
        let more = entry(4, 500, NOW + 500);
        assert_eq!(
            folder.reserve(ALICE, &more, NOW + 500),
            Err(Refused::Quota(until))
        );
        // a slot of before the restart needs room, too
        assert!(matches!(
            folder.begin(ALICE, more, NOW + 500),
            Err(NotTaken::Refused(Refused::Quota(_)))
        ));
        folder
            .reserve(ALICE, &entry(5, 500, NOW + DAY), NOW + DAY)
            .unwrap();
    }

    #[test]
    fn files_and_their_bytes_are_bounded_and_room_comes_with_time() {
        let (_dir, folder) = folder();
        folder.configure(Bounds {
            day_bytes_max: u64::MAX / 2,
            ..bounds()
        });
        for n in 0..5 {
            put(&folder, entry(n, 100, NOW + u64::from(n)), NOW).unwrap();
        }
        let sixth = entry(6, 1, NOW);
        let refused = folder.reserve(ALICE, &sixth, NOW);
        assert_eq!(refused, Err(Refused::Quota(Some(NOW + 10 * DAY))));
        folder.configure(Bounds {
            user_files_max: 100,
            user_bytes_max: 600,
            day_bytes_max: u64::MAX / 2,
            keep_seconds: 0,
            ..bounds()
        });
        folder.reserve(ALICE, &entry(7, 100, NOW), NOW).unwrap();
        let refused = folder.reserve(ALICE, &sixth, NOW);
        assert_eq!(refused, Err(Refused::Quota(None)));
    }

    #[test]
    fn what_a_removed_account_put_is_gone_at_once_and_removed_piece_by_piece_after_a_restart_too() {
        let (dir, folder) = folder();
        folder.configure(Bounds {
            user_files_max: 1000,
            ..bounds()
        });
        for n in 0..150 {
            put(&folder, entry(n, 1, NOW), NOW).unwrap();
        }
        let other = Owner([1; 16]);
        let kept = entry(1, 10, NOW);
        let mut writing = folder.begin(other, kept, NOW).unwrap();
        writing.write(&[7; 10]).unwrap();
        folder.finish(writing).unwrap();
        // one more is on its way
        let mut coming = folder.begin(ALICE, entry(200, 1, NOW), NOW).unwrap();
        coming.write(b"x").unwrap();
        folder.forget(ALICE, NOW + 5).unwrap();
        assert!(folder.finish(coming).is_err());
        assert!(
            folder
                .read(ALICE, &entry(1, 1, NOW), NOW + 6)
                .unwrap()
                .is_none()
        );
        assert!(matches!(
            folder.begin(ALICE, entry(201, 1, NOW), NOW + 6),
            Err(NotTaken::Gone)
        ));
        let retry = Err(Refused::Quota(Some(NOW + 6)));
        assert_eq!(
            folder.reserve(ALICE, &entry(202, 1, NOW + 5), NOW + 5),
            retry
        );
        // an account of that name begins anew
        let new = entry(203, 1000, NOW + 6);
        put(&folder, new, NOW + 6).unwrap();
        assert_eq!(folder.clear(NOW + 6).unwrap(), CLEARED_AT_ONCE);
        drop(folder);
        let folder = Folder::open(dir.path(), bounds()).unwrap();
        assert!(
            folder
                .read(ALICE, &entry(149, 1, NOW), NOW + 6)
                .unwrap()
                .is_none()
        );
        assert_eq!(folder.clear(NOW + 6).unwrap(), 50);
        assert_eq!(folder.clear(NOW + 6).unwrap(), 0);
        assert!(folder.read(ALICE, &new, NOW + 6).unwrap().is_some());
        assert!(folder.read(other, &kept, NOW + 6).unwrap().is_some());
        // two files and the mark, that goes when nothing of before can come any more
        assert_eq!(files(dir.path()), 3);
        assert_eq!(folder.clear(NOW + 7 + GONE_SECONDS).unwrap(), 0);
        assert_eq!(files(dir.path()), 2);
    }

    #[test]
    fn a_folder_that_cannot_be_read_keeps_no_others_and_old_marks_go() {
        let (dir, folder) = folder();
        put(&folder, entry(1, 10, NOW), NOW).unwrap();
        folder.forget(ALICE, NOW).unwrap();
        for n in 0..20 {
            folder.forget(Owner([n; 16]), NOW).unwrap();
        }
        let broken = Owner([0xcd; 16]);
        fs::create_dir(dir.path().join("cd")).unwrap();
        fs::write(folder.dir(broken), "no folder").unwrap();
        folder.forget(broken, NOW).unwrap();
        assert_eq!(folder.clear(NOW).unwrap(), 1);
        assert_eq!(folder.clear(NOW).unwrap(), 0);
        let later = NOW + GONE_SECONDS + 1;
        // removed once more meanwhile
        folder.forget(Owner([7; 16]), later).unwrap();
        assert_eq!(folder.clear(later).unwrap(), 0);
        let mut left = marks(dir.path()).unwrap();
        left.sort_by_key(|(owner, at)| (owner.0, *at));
        let again = Owner([7; 16]);
        assert_eq!(left, [(again, NOW), (again, later), (broken, NOW)]);
        fs::remove_file(folder.dir(broken)).unwrap();
        assert_eq!(folder.clear(later).unwrap(), 0);
        assert!(
            marks(dir.path())
                .unwrap()
                .iter()
                .all(|(owner, _)| *owner == again)
        );
        assert_eq!(folder.clear(later + GONE_SECONDS + 1).unwrap(), 0);
        assert!(marks(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn a_copy_has_all_files_and_marks_and_is_whole_when_it_is_made_again() {
        let (dir, folder) = folder();
        put(&folder, entry(1, 10, NOW), NOW).unwrap();
        put(&folder, entry(2, 20, NOW), NOW).unwrap();
        folder.forget(Owner([1; 16]), NOW).unwrap();
        let to = tempfile::tempdir().unwrap();
        let root = to.path().join("uploads");
        let all = Counted {
            files: 2,
            bytes: 30,
        };
        let known = marks(dir.path()).unwrap();
        // an account that the database of the copy still has
        folder.forget(ALICE, NOW).unwrap();
        let copy = || copy_all(dir.path(), &root, &known, &mut |_| {}).unwrap();
        assert_eq!(copy(), all);
        assert_eq!((count(&root).unwrap(), files(&root)), (all, 3));
        let half = root
            .join("ab")
            .join("ab".repeat(16))
            .join(entry(1, 10, NOW).name());
        fs::remove_file(&half).unwrap();
        fs::write(&half, b"01234").unwrap();
        assert!(count(&root).is_err());
        assert_eq!(copy(), all);
        assert_eq!((count(&root).unwrap(), files(&root)), (all, 3));
        let folder = Folder::open(&root, bounds()).unwrap();
        assert!(
            folder
                .read(ALICE, &entry(2, 20, NOW), NOW)
                .unwrap()
                .is_some()
        );
        // what the original loses stays here
        fs::remove_dir_all(dir.path()).unwrap();
        assert_eq!(count(&root).unwrap(), all);
    }

    #[test]
    fn old_files_go_and_all_files_together_are_bounded() {
        let (dir, folder) = folder();
        put(&folder, entry(1, 100, NOW), NOW).unwrap();
        put(&folder, entry(2, 100, NOW + DAY), NOW + DAY).unwrap();
        assert_eq!(folder.bytes(), 200);
        let folder = Folder::open(dir.path(), bounds()).unwrap();
        assert_eq!(folder.bytes(), 0);
        assert_eq!(folder.sweep(NOW + DAY).unwrap(), 0);
        assert_eq!(folder.bytes(), 200);
        let later = NOW + 10 * DAY;
        // not before the sweep either
        assert!(
            folder
                .read(ALICE, &entry(1, 100, NOW), later)
                .unwrap()
                .is_none()
        );
        assert_eq!(folder.sweep(later).unwrap(), 1);
        assert_eq!((folder.bytes(), files(dir.path())), (100, 1));
        folder.configure(Bounds {
            bytes_max: 150,
            ..bounds()
        });
        let refused = folder.reserve(ALICE, &entry(3, 100, later), later);
        assert_eq!(refused, Err(Refused::Full));
        folder.sweep(later + DAY).unwrap();
        assert!(!dir.path().join("ab").join("ab".repeat(16)).exists());
    }
}
