//! `nitro user import`: many accounts and rosters from CSV.
//!
//! In flow two files, out flow batches to the running server or the database, a progress bar and a summary. Promise:
//! every bad row is named by its line with the reason and harms no other; what was reported as written is durable, so an
//! interrupted import can simply be repeated. Reading, key derivation (all cores) and writing run side by side, and only
//! a bounded number of rows is in memory (for rosters: 20 bytes a side of a row, and each name once).

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use csv::ByteRecord;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use crate::admin::client::Accounts;
use crate::admin::{
    AdminReply, AdminRequest, BATCH_MAX, Existing, ImportItem, ImportRoster, ImportUser, Keys,
    Outcome,
};
use crate::cli::{derive_keys, unexpected, user_name};
use crate::config::Config;
use crate::store::record::ScramKeys;
use crate::xmpp::jid::Jid;

/// The long help of the command: the formats.
pub const HELP: &str = "\
Import many accounts and rosters from CSV files.

Both files are UTF-8, separated by commas, quoted as in RFC 4180. The first line names the columns, in any order.

ACCOUNTS: `username` and either `password` or ready SCRAM keys or both (then a row fills one of them).
  username     alice or alice@domain
  password     in the clear; only its salted keys are stored
  salt, iterations, stored_key, server_key
               keys of SCRAM-SHA-1; bytes in base64
  sha256_salt, sha256_iterations, sha256_stored_key, sha256_server_key
               keys of SCRAM-SHA-256

ROSTERS: `username` and `contact`, if wanted `name` and `groups`. Each row is a mutual subscription: both see each
other's presence, and a contact of this domain gets the user into the own roster.
  contact      bob, bob@domain, or a bare JID of another domain
  name         what the user calls the contact; empty: no change
  groups       separated by semicolons; empty: no change

Rows that are bad are named with their line and the reason; all others are imported. The status is 1 if a row was bad.
An import that was interrupted can be repeated with --existing skip.";

/// The example of the command.
pub const EXAMPLE: &str =
    "Example:\n  nitro user import traders.csv --rosters desks.csv --existing skip";

/// What to import.
#[derive(Debug)]
pub struct Sources {
    pub accounts: Option<PathBuf>,
    pub rosters: Option<PathBuf>,
    pub existing: Existing,
}

/// Rows that travel together from the reader through a core to the writer.
const CHUNK_ROWS: usize = 50;
/// Bytes of one row.
const ROW_BYTES_MAX: usize = 65_536;
/// Bytes of texts in one batch of rosters; JSON makes at most six times as much of them.
const ROSTERS_BYTES_MAX: usize = 1 << 20;

/// Imports, with a progress bar and messages on standard error; returns the number of bad rows.
///
/// # Errors
/// A sentence, if the import as a whole cannot go on.
pub fn run(config: &Config, sources: &Sources) -> Result<u64, String> {
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template(
            "{msg:9} {wide_bar} {percent:>3} %  {elapsed} of about {duration}",
        )
        .expect("the template is well formed"),
    );
    let said = bar.clone();
    let mut report = Report {
        bad: 0,
        bar,
        say: Box::new(move |sentence| said.suspend(|| eprintln!("{sentence}"))),
    };
    let imported = import(config, sources, &mut report);
    report.bar.finish_and_clear();
    imported.map(|()| report.bad)
}

/// Where rows and progress are told.
struct Report<'a> {
    bad: u64,
    bar: ProgressBar,
    say: Box<dyn FnMut(String) + 'a>,
}

impl Report<'_> {
    fn bad(&mut self, file: &str, line: u64, why: &str) {
        self.bad += 1;
        (self.say)(format!("{file}:{line}: {why}"));
    }

    fn begin(&self, what: &'static str, length: u64) {
        self.bar.reset();
        self.bar.set_message(what);
        self.bar.set_length(length);
    }
}

fn import(config: &Config, sources: &Sources, report: &mut Report) -> Result<(), String> {
    // Files are opened before the accounts: a wrong name must not wait for anything.
    let mut users = sources.accounts.as_deref().map(Table::open).transpose()?;
    let mut rosters = sources.rosters.as_deref().map(Table::open).transpose()?;
    let user_columns = users.as_mut().map(UserColumns::of).transpose()?;
    let roster_columns = rosters.as_mut().map(RosterColumns::of).transpose()?;
    let mut accounts = Accounts::open(config)?;

    if let (Some(table), Some(columns)) = (users, user_columns) {
        let total = import_users(
            config,
            table,
            &columns,
            sources.existing,
            &mut accounts,
            report,
        )?;
        (report.say)(format!("accounts: {total}"));
    }
    if let (Some(table), Some(columns)) = (rosters, roster_columns) {
        let total = import_rosters(config, table, &columns, &mut accounts, report)?;
        (report.say)(format!("rosters: {total}"));
    }
    if report.bad > 0 {
        (report.say)(format!(
            "bad rows: {} (named above)",
            HumanCount(report.bad)
        ));
    }
    Ok(())
}

/// How often each [`Outcome`] came.
#[derive(Debug, Default, PartialEq)]
struct Total {
    added: u64,
    replaced: u64,
    skipped: u64,
}

impl std::fmt::Display for Total {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (added, replaced) = (HumanCount(self.added), HumanCount(self.replaced));
        let skipped = HumanCount(self.skipped);
        write!(
            f,
            "{added} added, {replaced} changed, {skipped} left as they were"
        )
    }
}

impl Total {
    /// The reason, if it was refused.
    fn count(&mut self, outcome: Outcome) -> Result<(), String> {
        match outcome {
            Outcome::Added => self.added += 1,
            Outcome::Replaced => self.replaced += 1,
            Outcome::Skipped => self.skipped += 1,
            Outcome::Refused(why) => return Err(why),
        }
        Ok(())
    }
}

/// A CSV file with its header.
struct Table {
    /// As the operator named it.
    file: String,
    bytes: u64,
    header: Vec<String>,
    rows: csv::Reader<File>,
}

impl Table {
    fn open(path: &Path) -> Result<Table, String> {
        let file = path.display().to_string();
        let cannot =
            |e: String| format!("{file}: the file cannot be read ({e}); name a readable CSV file");
        let opened = File::open(path).map_err(|e| cannot(e.to_string()))?;
        let bytes = opened.metadata().map_or(0, |m| m.len());
        let mut rows = csv::ReaderBuilder::new()
            .flexible(true)
            .buffer_capacity(1 << 16)
            .from_reader(opened);
        let header = rows.byte_headers().map_err(|e| cannot(e.to_string()))?;
        let name = |field: &[u8]| {
            let text = String::from_utf8_lossy(field);
            text.trim_start_matches('\u{feff}').trim().to_lowercase()
        };
        let header = header.iter().map(name).collect();
        Ok(Table {
            file,
            bytes,
            header,
            rows,
        })
    }

    /// Where each of the known columns stands.
    fn columns<const N: usize>(&self, known: [&str; N]) -> Result<[Option<usize>; N], String> {
        let wrong = |why: String| format!("{}:1: {why}; see nitro user import --help", self.file);
        if let Some(name) = self
            .header
            .iter()
            .find(|name| !known.contains(&name.as_str()))
        {
            let known = known.join(", ");
            return Err(wrong(format!(
                "the column {name:?} is not known, only {known}"
            )));
        }
        for (i, name) in self.header.iter().enumerate() {
            if self.header[..i].contains(name) {
                return Err(wrong(format!("the column {name:?} stands twice")));
            }
        }
        Ok(known.map(|known| self.header.iter().position(|name| name == known)))
    }

    fn missing(&self, what: &str) -> String {
        format!(
            "{}:1: there is no column {what}; see nitro user import --help",
            self.file
        )
    }

    /// The next row with its line, or `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, ByteRecord)>, String> {
        let mut row = ByteRecord::new();
        match self.rows.read_byte_record(&mut row) {
            Ok(false) => Ok(None),
            Ok(true) => Ok(Some((row.position().map_or(0, |p| p.line()), row))),
            Err(e) => Err(format!(
                "{}: the file cannot be read on ({e}); mend it and repeat",
                self.file
            )),
        }
    }
}

/// The fields of a row; what its form must be.
fn check_form(row: &ByteRecord, width: usize) -> Result<(), String> {
    if row.as_slice().len() > ROW_BYTES_MAX {
        return Err(format!(
            "the row is longer than {ROW_BYTES_MAX} bytes; is a quote missing?"
        ));
    }
    if row.len() != width {
        return Err(format!(
            "it has {} columns, the header has {width}",
            row.len()
        ));
    }
    Ok(())
}

/// A field as text; a column that is not there is empty.
fn field(row: &ByteRecord, column: Option<usize>) -> Result<&str, String> {
    let bytes = column.and_then(|at| row.get(at)).unwrap_or_default();
    std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".into())
}

/// Columns of the accounts.
struct UserColumns {
    width: usize,
    username: Option<usize>,
    password: Option<usize>,
    /// Salt, iterations, stored key, server key.
    sha1: Option<[Option<usize>; 4]>,
    sha256: Option<[Option<usize>; 4]>,
}

impl UserColumns {
    fn of(table: &mut Table) -> Result<UserColumns, String> {
        let [username, password, a, b, c, d, e, f, g, h] = table.columns([
            "username",
            "password",
            "salt",
            "iterations",
            "stored_key",
            "server_key",
            "sha256_salt",
            "sha256_iterations",
            "sha256_stored_key",
            "sha256_server_key",
        ])?;
        let keys = |columns: [Option<usize>; 4], what: &str| match columns.iter().flatten().count()
        {
            0 => Ok(None),
            4 => Ok(Some(columns)),
            _ => Err(table.missing(&format!("for all four parts of the {what} keys"))),
        };
        let columns = UserColumns {
            width: table.header.len(),
            username,
            password,
            sha1: keys([a, b, c, d], "SCRAM-SHA-1")?,
            sha256: keys([e, f, g, h], "SCRAM-SHA-256")?,
        };
        if columns.username.is_none() {
            return Err(table.missing("username"));
        }
        if password.is_none() && columns.sha1.is_none() && columns.sha256.is_none() {
            return Err(table.missing("password, nor columns of SCRAM keys"));
        }
        Ok(columns)
    }

    /// The account of a row. Derives the keys if there is a password: the slow part.
    fn user(&self, row: &ByteRecord, config: &Config) -> Result<ImportUser, String> {
        check_form(row, self.width)?;
        let name = user_name(field(row, self.username)?.trim(), &config.domain)?;
        let password = field(row, self.password)?;
        let ready = Keys {
            sha1: scram_keys(row, self.sha1, "SCRAM-SHA-1")?,
            sha256: scram_keys(row, self.sha256, "SCRAM-SHA-256")?,
        };
        let keys = match (password.is_empty(), ready == Keys::default()) {
            (false, true) => derive_keys(password, config.sasl.iterations)?,
            (false, false) => return Err("it has both a password and keys; leave one empty".into()),
            (true, true) => return Err("it has neither a password nor keys".into()),
            (true, false) => ready,
        };
        keys.check()?;
        Ok(ImportUser { name, keys })
    }
}

fn scram_keys(
    row: &ByteRecord,
    columns: Option<[Option<usize>; 4]>,
    what: &str,
) -> Result<Option<ScramKeys>, String> {
    let mut texts = [""; 4];
    for (text, column) in texts.iter_mut().zip(columns.unwrap_or_default()) {
        *text = field(row, column)?.trim();
    }
    if texts.iter().all(|text| text.is_empty()) {
        return Ok(None);
    }
    let [salt, iterations, stored_key, server_key] = texts;
    let bytes = |text: &str, part: &str| {
        let decoded = BASE64.decode(text);
        decoded.map_err(|_| format!("the {part} of the {what} keys is not base64"))
    };
    Ok(Some(ScramKeys {
        iterations: iterations
            .parse()
            .map_err(|_| format!("the iterations of the {what} keys are no number"))?,
        salt: bytes(salt, "salt")?,
        stored_key: bytes(stored_key, "stored key")?,
        server_key: bytes(server_key, "server key")?,
    }))
}

/// Rows on their way: first as read, then as accounts.
struct Chunk<T> {
    number: u64,
    rows: Vec<(u64, T)>,
    /// Bytes of the file up to its end.
    bytes: u64,
}

type Rows = Chunk<ByteRecord>;
type Users = Chunk<Result<ImportUser, String>>;

/// One thread reads, one on each core derives keys, this one writes; the channels between them are bounded.
fn import_users(
    config: &Config,
    table: Table,
    columns: &UserColumns,
    existing: Existing,
    accounts: &mut Accounts,
    report: &mut Report,
) -> Result<Total, String> {
    report.begin("accounts", table.bytes);
    let file = table.file.clone();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (to_workers, from_reader) = sync_channel::<Rows>(2 * cores);
    let (to_writer, from_workers) = sync_channel::<Users>(2 * cores);
    // Shared by the workers alone: when they end, the reader's next send fails and it ends too.
    let from_reader = Arc::new(Mutex::new(from_reader));
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || read_rows(table, &to_workers));
        for _ in 0..cores {
            let (from_reader, to_writer) = (from_reader.clone(), to_writer.clone());
            scope.spawn(move || derive_rows(config, columns, &from_reader, &to_writer));
        }
        drop((from_reader, to_writer));
        // Consumes the channel: if writing fails, everybody stops.
        let written = write_users(&file, existing, from_workers, accounts, report);
        let read = reader
            .join()
            .unwrap_or_else(|_| Err("the reading thread ended badly".into()));
        let total = written?;
        read.map(|()| total)
    })
}

fn read_rows(mut table: Table, to_workers: &SyncSender<Rows>) -> Result<(), String> {
    for number in 0.. {
        let mut rows = Vec::with_capacity(CHUNK_ROWS);
        while rows.len() < CHUNK_ROWS {
            match table.next()? {
                Some(row) => rows.push(row),
                None => break,
            }
        }
        let bytes = table.rows.position().byte();
        let at_end = rows.len() < CHUNK_ROWS;
        let sent = to_workers.send(Chunk {
            number,
            rows,
            bytes,
        });
        if at_end || sent.is_err() {
            break;
        }
    }
    Ok(())
}

fn derive_rows(
    config: &Config,
    columns: &UserColumns,
    from_reader: &Mutex<Receiver<Rows>>,
    to_writer: &SyncSender<Users>,
) {
    loop {
        let taken = from_reader
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok(Chunk {
            number,
            rows,
            bytes,
        }) = taken
        else {
            return;
        };
        let derive = |(line, row): (u64, ByteRecord)| (line, columns.user(&row, config));
        let rows = rows.into_iter().map(derive).collect();
        if to_writer
            .send(Chunk {
                number,
                rows,
                bytes,
            })
            .is_err()
        {
            return;
        }
    }
}

fn write_users(
    file: &str,
    existing: Existing,
    from_workers: Receiver<Users>,
    accounts: &mut Accounts,
    report: &mut Report,
) -> Result<Total, String> {
    let mut total = Total::default();
    let mut line_of: HashMap<String, u64> = HashMap::new();
    let mut batch: Vec<ImportUser> = Vec::with_capacity(BATCH_MAX);
    let mut lines: Vec<u64> = Vec::with_capacity(BATCH_MAX);
    // Chunks that came before their turn; as few as are on their way.
    let mut early: BTreeMap<u64, Users> = BTreeMap::new();
    let mut turn = 0;
    let mut write = |batch: &mut Vec<ImportUser>, lines: &mut Vec<u64>, report: &mut Report| {
        let request = AdminRequest::ImportUsers {
            existing,
            users: std::mem::take(batch),
        };
        for (line, outcome) in lines.drain(..).zip(outcomes(accounts, request)?) {
            if let Err(why) = total.count(outcome) {
                report.bad(file, line, &why);
            }
        }
        Ok::<(), String>(())
    };
    for chunk in from_workers {
        early.insert(chunk.number, chunk);
        while let Some(chunk) = early.remove(&turn) {
            turn += 1;
            for (line, user) in chunk.rows {
                match user {
                    Err(why) => report.bad(file, line, &why),
                    Ok(user) => match line_of.insert(user.name.clone(), line) {
                        Some(first) => {
                            let why = format!("{} stands in line {first} already", user.name);
                            report.bad(file, line, &why);
                            line_of.insert(user.name, first);
                        }
                        None => {
                            batch.push(user);
                            lines.push(line);
                        }
                    },
                }
                if batch.len() == BATCH_MAX {
                    write(&mut batch, &mut lines, report)?;
                }
            }
            report.bar.set_position(chunk.bytes);
        }
    }
    if !batch.is_empty() {
        write(&mut batch, &mut lines, report)?;
    }
    Ok(total)
}

fn outcomes(accounts: &mut Accounts, request: AdminRequest) -> Result<Vec<Outcome>, String> {
    match accounts.call(request)? {
        AdminReply::Imported { outcomes } => Ok(outcomes),
        other => Err(unexpected(&other)),
    }
}

/// Columns of the rosters.
struct RosterColumns {
    width: usize,
    username: Option<usize>,
    contact: Option<usize>,
    name: Option<usize>,
    groups: Option<usize>,
}

impl RosterColumns {
    fn of(table: &mut Table) -> Result<RosterColumns, String> {
        let [username, contact, name, groups] =
            table.columns(["username", "contact", "name", "groups"])?;
        for (column, what) in [(username, "username"), (contact, "contact")] {
            if column.is_none() {
                return Err(table.missing(what));
            }
        }
        Ok(RosterColumns {
            width: table.header.len(),
            username,
            contact,
            name,
            groups,
        })
    }
}

/// Texts that stand many times, each kept once. Number 0 is the empty text.
#[derive(Default)]
struct Texts {
    numbers: HashMap<Rc<str>, u32>,
    texts: Vec<Rc<str>>,
}

impl Texts {
    fn number(&mut self, text: &str) -> Result<u32, String> {
        if let Some(&number) = self.numbers.get(text) {
            return Ok(number);
        }
        let number = u32::try_from(self.texts.len()).map_err(|_| "there are too many names")?;
        let text: Rc<str> = text.into();
        self.texts.push(text.clone());
        self.numbers.insert(text, number);
        Ok(number)
    }

    fn text(&self, number: u32) -> &str {
        &self.texts[number as usize]
    }
}

/// One side of a row: `contact` in the roster of `user`. Numbers of [`Texts`].
struct Side {
    user: u32,
    contact: u32,
    /// 0: not given.
    name: u32,
    groups: u32,
    line: u32,
    /// The row's own side; the other one only follows from it.
    own: bool,
}

fn import_rosters(
    config: &Config,
    mut table: Table,
    columns: &RosterColumns,
    accounts: &mut Accounts,
    report: &mut Report,
) -> Result<Total, String> {
    report.begin("rosters", table.bytes);
    let mut texts = Texts::default();
    texts.number("")?;
    let mut sides = Vec::new();
    while let Some((line, row)) = table.next()? {
        if let Err(why) = read_sides(&row, line, columns, config, &mut texts, &mut sides) {
            report.bad(&table.file, line, &why);
        }
        report.bar.set_position(table.rows.position().byte());
    }

    let domain = format!("@{}", config.domain);
    let is_missing = missing_users(&domain, &sides, &texts, accounts)?;
    sides.retain(|side| {
        let gone = [side.user, side.contact]
            .into_iter()
            .find(|&n| is_missing[n as usize]);
        if let (Some(gone), true) = (gone, side.own) {
            let why = format!("there is no user {}", texts.text(gone));
            report.bad(&table.file, side.line.into(), &why);
        }
        gone.is_none()
    });

    // By roster and contact; what a row says itself goes last and so wins, a later row over an earlier one.
    sides.sort_unstable_by_key(|s| (s.user, s.contact, s.own, s.line));
    report.begin("rosters", sides.len() as u64);
    let mut total = Total::default();
    let mut done = 0;
    while done < sides.len() {
        let (rosters, firsts, end) = next_batch(&sides, done, &texts, &domain);
        let request = AdminRequest::ImportRosters { rosters };
        for (first, outcome) in firsts.into_iter().zip(outcomes(accounts, request)?) {
            if let Err(why) = total.count(outcome) {
                let (user, line) = (texts.text(sides[first].user), sides[first].line);
                report.bad(&table.file, line.into(), &format!("{user}: {why}"));
            }
        }
        done = end;
        report.bar.set_position(done as u64);
    }
    Ok(total)
}

/// Both sides of a row.
fn read_sides(
    row: &ByteRecord,
    line: u64,
    columns: &RosterColumns,
    config: &Config,
    texts: &mut Texts,
    sides: &mut Vec<Side>,
) -> Result<(), String> {
    check_form(row, columns.width)?;
    let domain = &config.domain;
    let user = user_name(field(row, columns.username)?.trim(), domain)?;
    let user = format!("{user}@{domain}");
    let contact = field(row, columns.contact)?.trim();
    let (contact, is_local) = match contact.rsplit_once('@') {
        None => (format!("{}@{domain}", user_name(contact, domain)?), true),
        Some(_) => {
            let jid =
                Jid::parse(contact).map_err(|e| format!("{contact:?} is no bare JID ({e})"))?;
            if !jid.is_bare() {
                return Err(format!("{contact:?} has a resource; write {}", jid.bare()));
            }
            (jid.as_str().to_string(), jid.domain() == domain)
        }
    };
    if user == contact {
        return Err(format!("{user} is its own contact"));
    }
    let (name, groups) = (
        field(row, columns.name)?.trim(),
        field(row, columns.groups)?,
    );
    let most = config.limits.roster_item_bytes_max;
    if name.len() + groups.len() > most {
        return Err(format!(
            "name and groups are longer than {most} bytes (see limits.roster_item_bytes_max)"
        ));
    }
    if (name.chars().chain(groups.chars())).any(|c| c < ' ' || matches!(c, '\u{fffe}' | '\u{ffff}'))
    {
        return Err("name or groups hold a control character".into());
    }
    let (user, contact) = (texts.number(&user)?, texts.number(&contact)?);
    let line = u32::try_from(line).unwrap_or(u32::MAX);
    sides.push(Side {
        user,
        contact,
        name: texts.number(name)?,
        groups: texts.number(groups)?,
        line,
        own: true,
    });
    if is_local {
        sides.push(Side {
            user: contact,
            contact: user,
            name: 0,
            groups: 0,
            line,
            own: false,
        });
    }
    Ok(())
}

/// For each text: whether it is the address of a user of this domain who does not exist.
fn missing_users(
    domain: &str,
    sides: &[Side],
    texts: &Texts,
    accounts: &mut Accounts,
) -> Result<Vec<bool>, String> {
    let mut is_local = vec![false; texts.texts.len()];
    for side in sides {
        // Each local user has a roster here: its own, or the other side of the row.
        is_local[side.user as usize] = true;
    }
    let numbers: Vec<usize> = (0..is_local.len()).filter(|&n| is_local[n]).collect();
    let mut is_missing = vec![false; is_local.len()];
    for numbers in numbers.chunks(BATCH_MAX) {
        let name = |&n: &usize| local_name(&texts.texts[n], domain).to_string();
        let names = numbers.iter().map(name).collect();
        match accounts.call(AdminRequest::UsersKnown { names })? {
            AdminReply::Known { known } if known.len() == numbers.len() => {
                for (&number, known) in numbers.iter().zip(known) {
                    is_missing[number] = !known;
                }
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(is_missing)
}

fn local_name<'a>(address: &'a str, domain: &str) -> &'a str {
    address.strip_suffix(domain).unwrap_or(address)
}

/// The rosters of the sides from `start` on, as many as one request bears; for each the place of its first side; and
/// where the next batch starts. A roster too large for one request is continued in the next.
fn next_batch(
    sides: &[Side],
    start: usize,
    texts: &Texts,
    domain: &str,
) -> (Vec<ImportRoster>, Vec<usize>, usize) {
    let mut rosters: Vec<ImportRoster> = Vec::new();
    let mut firsts: Vec<usize> = Vec::new();
    let mut bytes = 0;
    for (at, side) in sides.iter().enumerate().skip(start) {
        let text = |number: u32| (number != 0).then(|| texts.text(number).to_string());
        let is_same_roster = firsts
            .last()
            .is_some_and(|&first| sides[first].user == side.user);
        if (rosters.len() == BATCH_MAX && !is_same_roster) || bytes > ROSTERS_BYTES_MAX {
            return (rosters, firsts, at);
        }
        if !is_same_roster {
            firsts.push(at);
            rosters.push(ImportRoster {
                name: local_name(texts.text(side.user), domain).into(),
                items: Vec::new(),
            });
        }
        let item = ImportItem {
            jid: texts.text(side.contact).into(),
            label: text(side.name),
            groups: text(side.groups).map(|groups| split_groups(&groups)),
        };
        bytes += 32 + item.jid.len() + texts.text(side.name).len() + texts.text(side.groups).len();
        let items = &mut rosters
            .last_mut()
            .expect("one was pushed for the first side")
            .items;
        match items.last_mut() {
            // The same contact again, which says more or the same.
            Some(last) if last.jid == item.jid => {
                last.label = item.label.or(last.label.take());
                last.groups = item.groups.or(last.groups.take());
            }
            _ => items.push(item),
        }
    }
    (rosters, firsts, sides.len())
}

/// The groups of a field, each once (RFC 6121, 2.1.2.6).
fn split_groups(text: &str) -> Vec<String> {
    let mut groups: Vec<String> = Vec::new();
    for group in text.split(';').map(str::trim) {
        if !group.is_empty() && !groups.iter().any(|g| g == group) {
            groups.push(group.into());
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::direct::Direct;
    use crate::admin::lock::DataLock;
    use crate::admin::server::AdminServer;
    use crate::store::record::{Subscription, UserRecord};
    use crate::xmpp::sasl;

    struct Bench {
        dir: tempfile::TempDir,
        config: Config,
    }

    impl Bench {
        fn new() -> Bench {
            let dir = tempfile::tempdir().unwrap();
            let mut config = Config {
                data_dir: dir.path().join("data"),
                ..Config::default()
            };
            config.sasl.iterations = 4096;
            Bench { dir, config }
        }

        fn file(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
            let path = self.dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        }

        /// What was said, with the folder left out, and whether it went through.
        fn import(&self, sources: &Sources) -> (Vec<String>, Result<(), String>) {
            let mut said = Vec::new();
            let mut report = Report {
                bad: 0,
                bar: ProgressBar::hidden(),
                say: Box::new(|sentence| said.push(sentence)),
            };
            let result = import(&self.config, sources, &mut report);
            drop(report);
            let prefix = format!("{}/", self.dir.path().display());
            let short = |text: String| text.replace(&prefix, "");
            (said.into_iter().map(short).collect(), result.map_err(short))
        }

        fn users(&self, text: impl AsRef<[u8]>, existing: Existing) -> Vec<String> {
            let accounts = Some(self.file("users.csv", text));
            let (said, result) = self.import(&Sources {
                accounts,
                rosters: None,
                existing,
            });
            result.unwrap();
            said
        }

        fn rosters(&self, text: &str) -> Vec<String> {
            let rosters = Some(self.file("rosters.csv", text));
            let existing = Existing::Error;
            let (said, result) = self.import(&Sources {
                accounts: None,
                rosters,
                existing,
            });
            result.unwrap();
            said
        }

        fn refused(&self, accounts: Option<&str>, rosters: Option<&str>) -> String {
            let sources = Sources {
                accounts: accounts.map(|text| self.file("users.csv", text)),
                rosters: rosters.map(|text| self.file("rosters.csv", text)),
                existing: Existing::Error,
            };
            self.import(&sources).1.unwrap_err()
        }

        fn record(&self, name: &str) -> UserRecord {
            let _lock = DataLock::acquire(&self.config.data_dir).unwrap();
            let mut store = crate::admin::open_store(&self.config).unwrap();
            store.show(name).unwrap().unwrap().record.to_owned()
        }
    }

    #[test]
    fn every_bad_row_is_named_and_the_good_ones_are_imported() {
        let bench = Bench::new();
        let text = b"password,username\n\
            one,alice\n\
            two,bad name\n\
            three,bob@elsewhere\n\
            ,carol\n\
            five,Alice@localhost\n\
            six\n\
            \xff,dave\n\
            \"eight, quoted\",erin\n";
        let said = bench.users(text, Existing::Error);
        let wanted = [
            "users.csv:3: \"bad name\" is no user name",
            "users.csv:4: bob@elsewhere is not of this server's domain; write bob or bob@localhost",
            "users.csv:5: it has neither a password nor keys",
            "users.csv:6: alice stands in line 2 already",
            "users.csv:7: it has 1 columns, the header has 2",
            "users.csv:8: it is not UTF-8",
            "accounts: 2 added, 0 changed, 0 left as they were",
            "bad rows: 6 (named above)",
        ];
        assert_eq!(said.len(), wanted.len(), "{said:#?}");
        for (said, wanted) in said.iter().zip(wanted) {
            assert!(said.starts_with(wanted), "{said}");
        }
        let keys = bench.record("erin").sha256.unwrap();
        let derived = sasl::derive(sasl::Hash::Sha256, "eight, quoted", &keys.salt, 4096).unwrap();
        assert_eq!(derived.stored_key, keys.stored_key);
        assert_eq!(bench.record("alice").sha1.unwrap().iterations, 4096);
    }

    #[test]
    fn many_rows_keep_their_lines_however_the_cores_share_them() {
        let bench = Bench::new();
        let key = |n| BASE64.encode(vec![7; n]);
        let row = |i: usize| match i % 100 {
            99 => format!("u{i},{},4096,{},zzz\n", key(16), key(20)),
            _ => format!("u{i},{},4096,{},{}\n", key(16), key(20), key(20)),
        };
        let rows: String = (0..3000).map(row).collect();
        let said = bench.users(
            format!("username,salt,iterations,stored_key,server_key\n{rows}"),
            Existing::Error,
        );
        for (i, said) in said.iter().take(30).enumerate() {
            let line = 100 * i + 99 + 2;
            let wanted = "the server key of the SCRAM-SHA-1 keys is not base64";
            assert_eq!(said, &format!("users.csv:{line}: {wanted}"));
        }
        assert_eq!(
            said[30],
            "accounts: 2,970 added, 0 changed, 0 left as they were"
        );
    }

    #[test]
    fn ready_keys_are_taken_as_they_are_and_checked() {
        let bench = Bench::new();
        let key = |n| BASE64.encode(vec![7; n]);
        let (k20, k32, salt) = (key(20), key(32), key(16));
        let said = bench.users(
            format!(
                "username,password,salt,iterations,stored_key,server_key,\
                 sha256_salt,sha256_iterations,sha256_stored_key,sha256_server_key\n\
                 alice,,{salt},4096,{k20},{k20},{salt},5000,{k32},{k32}\n\
                 bob,,,,,,{salt},5000,{k32},{k32}\n\
                 carol,secret,,,,,,,,\n\
                 dave,,{salt},100,{k20},{k20},,,,\n\
                 erin,,{salt},4096,{k20},{k32},,,,\n\
                 frank,both,{salt},4096,{k20},{k20},,,,\n\
                 grace,,{salt},many,{k20},{k20},,,,\n\
                 heidi,,,4096,{k20},{k20},,,,\n"
            ),
            Existing::Error,
        );
        assert_eq!(
            said,
            [
                "users.csv:5: the SHA-1 iterations must be 4096 to 10000000",
                "users.csv:6: the SHA-1 keys must be 20 bytes",
                "users.csv:7: it has both a password and keys; leave one empty",
                "users.csv:8: the iterations of the SCRAM-SHA-1 keys are no number",
                "users.csv:9: the SHA-1 salt must be 1 to 255 bytes",
                "accounts: 3 added, 0 changed, 0 left as they were",
                "bad rows: 5 (named above)",
            ]
        );
        let alice = bench.record("alice");
        assert_eq!(alice.sha1.unwrap().stored_key, [7; 20]);
        assert_eq!(alice.sha256.unwrap().iterations, 5000);
        assert_eq!(bench.record("bob").sha1, None);
    }

    #[test]
    fn an_import_can_be_repeated() {
        let bench = Bench::new();
        bench.users("username,password\nalice,one\n", Existing::Error);
        bench.rosters("username,contact\nalice,bot@example.com\n");
        let first = bench.record("alice");
        let text = "username,password\nalice,two\nbob,three\n";
        assert_eq!(
            bench.users(text, Existing::Skip),
            ["accounts: 1 added, 0 changed, 1 left as they were"]
        );
        assert_eq!(bench.record("alice"), first);
        let said = bench.users(text, Existing::Error);
        assert_eq!(
            said[0],
            "users.csv:2: the user exists already (see --existing)"
        );
        assert_eq!(
            said[1],
            "users.csv:3: the user exists already (see --existing)"
        );
        assert_eq!(
            bench.users(text, Existing::Replace),
            ["accounts: 0 added, 2 changed, 0 left as they were"]
        );
        let replaced = bench.record("alice");
        assert_ne!(replaced.sha1, first.sha1);
        assert_eq!(replaced.roster, first.roster);
    }

    #[test]
    fn a_roster_row_is_a_mutual_subscription_in_both_rosters() {
        let bench = Bench::new();
        bench.users(
            "username,password\nalice,1\nbob,2\ncarol,3\n",
            Existing::Error,
        );
        let said = bench.rosters(
            "contact,username,groups,name\n\
             bob,alice,Desk; FX ;Desk,Bob B.\n\
             carol@localhost,alice@localhost,,\n\
             alice,bob,,Ali\n\
             ghost,alice,,\n\
             alice,ghost,,\n\
             alice,alice,,\n\
             bot@example.com/x,alice,,\n\
             bot@example.com,alice,,Bot\n",
        );
        assert_eq!(
            said,
            [
                "rosters.csv:7: alice@localhost is its own contact",
                "rosters.csv:8: \"bot@example.com/x\" has a resource; write bot@example.com",
                "rosters.csv:5: there is no user ghost@localhost",
                "rosters.csv:6: there is no user ghost@localhost",
                "rosters: 3 added, 0 changed, 0 left as they were",
                "bad rows: 4 (named above)",
            ]
        );
        let alice = bench.record("alice");
        let jids: Vec<_> = alice.roster.iter().map(|i| i.jid.as_str()).collect();
        assert_eq!(
            jids,
            ["bob@localhost", "bot@example.com", "carol@localhost"]
        );
        assert!(
            alice
                .roster
                .iter()
                .all(|i| i.subscription == Subscription::Both && !i.ask)
        );
        assert_eq!(alice.roster[0].name, "Bob B.");
        assert_eq!(alice.roster[0].groups, ["Desk", "FX"]);
        assert_eq!(alice.roster_version, 1);
        let bob = bench.record("bob");
        assert_eq!(bob.roster[0].jid, "alice@localhost");
        assert_eq!(bob.roster[0].name, "Ali");
        assert_eq!(bench.record("carol").roster[0].name, "");

        let again = bench.rosters("username,contact\nalice,bob\n");
        assert_eq!(again, ["rosters: 0 added, 0 changed, 2 left as they were"]);
        assert_eq!(bench.record("alice"), alice);
    }

    #[test]
    fn a_roster_that_would_be_too_long_is_not_touched() {
        let mut bench = Bench::new();
        bench.config.limits.roster_items_max = 1;
        bench.users(
            "username,password\nalice,1\nbob,2\ncarol,3\n",
            Existing::Error,
        );
        let said = bench.rosters("username,contact\nalice,bob\nalice,carol\n");
        assert_eq!(
            said[0],
            "rosters.csv:2: alice@localhost: the roster would have 2 contacts (see limits.roster_items_max)"
        );
        assert!(bench.record("alice").roster.is_empty());
    }

    #[test]
    fn a_wrong_header_is_refused_before_anything_is_imported() {
        let bench = Bench::new();
        for (users, rosters, wanted) in [
            (
                Some("user,password\n"),
                None,
                "users.csv:1: the column \"user\" is not known",
            ),
            (
                Some("username,username\n"),
                None,
                "users.csv:1: the column \"username\" stands twice",
            ),
            (
                Some("username\n"),
                None,
                "users.csv:1: there is no column password",
            ),
            (
                Some("password\n"),
                None,
                "users.csv:1: there is no column username",
            ),
            (Some(""), None, "users.csv:1: there is no column username"),
            (
                Some("username,salt\n"),
                None,
                "users.csv:1: there is no column for all four parts of the SCRAM-SHA-1 keys",
            ),
            (
                Some("username,password\nalice,x\n"),
                Some("username\n"),
                "rosters.csv:1: there is no column contact",
            ),
        ] {
            let said = bench.refused(users, rosters);
            assert!(said.starts_with(wanted), "{said}");
        }
        assert!(!bench.config.data_dir.exists());
    }

    #[test]
    fn a_header_may_have_a_byte_order_mark_and_capitals() {
        let bench = Bench::new();
        let said = bench.users("\u{feff}Username, Password \nalice,x\n", Existing::Error);
        assert_eq!(said, ["accounts: 1 added, 0 changed, 0 left as they were"]);
    }

    #[test]
    fn a_quote_that_is_not_closed_is_one_bad_row() {
        let bench = Bench::new();
        let rest = "x,y\n".repeat(20_000);
        let said = bench.users(
            format!("username,password\nalice,x\nbob,\"{rest}"),
            Existing::Error,
        );
        assert!(
            said[0].starts_with("users.csv:3: the row is longer than"),
            "{said:?}"
        );
        assert!(said[1].starts_with("accounts: 1 added"), "{said:?}");
    }

    #[test]
    fn a_running_server_gets_the_same_import_through_its_socket() {
        let bench = Bench::new();
        let lock = DataLock::acquire(&bench.config.data_dir).unwrap();
        let direct = Mutex::new(Direct::open(&bench.config, lock).unwrap());
        let handler = move |request| direct.lock().unwrap().answer(request);
        let server = AdminServer::start(&bench.config.data_dir, 2, handler).unwrap();
        let rows: String = (0..1200)
            .map(|i| format!("u{i},{}\n", BASE64.encode([7; 32])))
            .collect();
        let rows = rows.replace('\n', &format!(",{0},4096,{0}\n", BASE64.encode([7; 32])));
        let header = "username,sha256_stored_key,sha256_salt,sha256_iterations,sha256_server_key\n";
        let said = bench.users(format!("{header}{rows}"), Existing::Error);
        assert_eq!(
            said,
            ["accounts: 1,200 added, 0 changed, 0 left as they were"]
        );
        let pairs: String = (0..1199).map(|i| format!("u{i},u{}\n", i + 1)).collect();
        let said = bench.rosters(&format!("username,contact\n{pairs}"));
        assert_eq!(
            said,
            ["rosters: 1,200 added, 0 changed, 0 left as they were"]
        );
        server.stop();
    }
}
