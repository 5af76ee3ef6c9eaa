//! The file of an administrator's groups (key `groups.file`): CSV with a header. In: its path and bounds. Out: [`Groups`], or one
//! sentence with file, line and mend.
//!
//! Columns: `group`, `username` (alice or alice@domain), and `name`, which is what contacts see and may be left out.
//!
//! The file is the one truth: [`add`] and [`remove`] change it, nothing else. They leave all other lines as they are, check the
//! whole as a reload would, and put it in the place of the old one by a rename, so that whoever reads sees one or the other.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::cli::user_name;
use crate::config::Config;
use crate::store::ring::Ring;
use crate::xmpp::groups::{Groups, Row};
use crate::xmpp::jid;

/// Bytes of a group's name and of a label.
const TEXT_BYTES_MAX: usize = 1023;

/// The groups that the configuration names; none if it names no file.
///
/// # Errors
/// A sentence for the operator.
pub fn load(config: &Config, ring: &Ring) -> Result<Groups, String> {
    let path = &config.groups.file;
    if path.as_os_str().is_empty() {
        return Ok(Groups::default());
    }
    Ok(Groups::new(read(path, config)?, ring))
}

/// Puts a user (prepared local part) into a group.
///
/// # Errors
/// A sentence for the operator; then the file is what it was.
pub fn add(config: &Config, group: &str, user: &str, label: &str) -> Result<(), String> {
    change(config, |path, old| {
        let old = match old {
            Some(old) => old,
            None => b"group,username,name\n".to_vec(),
        };
        let found = lines(&old, path, config)?;
        if found
            .rows
            .iter()
            .any(|(row, _)| row.group == group && row.user == user)
        {
            return Err(format!("{user} is in {group} already"));
        }
        if !label.is_empty() && !found.header.iter().any(|column| column == "name") {
            let shown = path.display();
            return Err(format!(
                "{shown}:1: there is no column name; put it into the header"
            ));
        }
        let mut line = csv::Writer::from_writer(Vec::new());
        let fields = found.header.iter().map(|column| match column {
            "group" => group,
            "username" => user,
            _ => label,
        });
        line.write_record(fields).map_err(|e| e.to_string())?;
        let line = line.into_inner().map_err(|e| e.to_string())?;
        let mut new = old;
        if !new.ends_with(b"\n") {
            new.push(b'\n');
        }
        new.extend(line);
        Ok(new)
    })
}

/// Takes a user (prepared local part) out of a group.
///
/// # Errors
/// A sentence for the operator; then the file is what it was.
pub fn remove(config: &Config, group: &str, user: &str) -> Result<(), String> {
    change(config, |path, old| {
        let old = old.unwrap_or_default();
        let found = lines(&old, path, config)?;
        let mut new = Vec::with_capacity(old.len());
        let mut from = 0;
        for (row, place) in found.rows {
            if row.group == group && row.user == user {
                new.extend_from_slice(&old[from..place.start]);
                from = place.end;
            }
        }
        if from == 0 {
            return Err(format!(
                "{user} is not in {group}; see: nitro group show {group}"
            ));
        }
        new.extend_from_slice(&old[from..]);
        Ok(new)
    })
}

/// Replaces the file by what `edit` makes of it (of nothing, if there is none yet).
fn change(
    config: &Config,
    edit: impl FnOnce(&Path, Option<Vec<u8>>) -> Result<Vec<u8>, String>,
) -> Result<(), String> {
    let path = &config.groups.file;
    if path.as_os_str().is_empty() {
        return Err("groups.file names no file; set it in the configuration first".into());
    }
    let failed = |e: io::Error| format!("groups.file: {}: {e}", path.display());
    // behind a link lies the file that is to be replaced
    let path = match fs::canonicalize(path) {
        Ok(path) => path,
        Err(e) if e.kind() == io::ErrorKind::NotFound => path.clone(),
        Err(e) => return Err(failed(e)),
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    // one command after the other; what else writes the file is beyond this
    let lock = File::open(&folder).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let (old, mode) = match fs::read(&path) {
        Ok(old) => (
            Some(old),
            Some(fs::metadata(&path).map_err(failed)?.permissions()),
        ),
        Err(e) if e.kind() == io::ErrorKind::NotFound => (None, None),
        Err(e) => return Err(failed(e)),
    };
    let new = edit(&path, old)?;
    rows(&new, &path, config)?;
    let mut beside = path.clone().into_os_string();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let write = || -> io::Result<()> {
        let mut file = File::create(&beside)?;
        if let Some(mode) = mode {
            file.set_permissions(mode)?;
        }
        file.write_all(&new)?;
        file.sync_all()?;
        fs::rename(&beside, &path)?;
        lock.sync_all()
    };
    write().map_err(failed)
}

fn read(path: &Path, config: &Config) -> Result<Vec<Row>, String> {
    let shown = path.display();
    let bytes =
        fs::read(path).map_err(|e| format!("groups.file: {shown}: {e}; name a readable file"))?;
    rows(&bytes, path, config)
}

fn rows(bytes: &[u8], path: &Path, config: &Config) -> Result<Vec<Row>, String> {
    let found = lines(bytes, path, config)?;
    Ok(found.rows.into_iter().map(|(row, _)| row).collect())
}

/// What a file says, and where.
struct Lines {
    header: csv::StringRecord,
    /// With the bytes of each.
    rows: Vec<(Row, std::ops::Range<usize>)>,
}

fn lines(bytes: &[u8], path: &Path, config: &Config) -> Result<Lines, String> {
    let shown = path.display();
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .from_reader(bytes);
    let header = reader
        .headers()
        .map_err(|e| format!("{shown}: {e}"))?
        .clone();
    let column = |name: &str| header.iter().position(|column| column == name);
    let (Some(group_at), Some(user_at)) = (column("group"), column("username")) else {
        return Err(format!(
            "{shown}:1: the header must name the columns group and username (and may name name)"
        ));
    };
    let known = ["group", "username", "name"];
    if let Some(other) = header.iter().find(|column| !known.contains(column)) {
        return Err(format!(
            "{shown}:1: there is no column {other:?}; write group, username and name"
        ));
    }
    let label_at = column("name");
    let (members_max, all_max) = (config.groups.members_max, config.groups.memberships_max);
    let mut members: BTreeMap<String, usize> = BTreeMap::new();
    let mut rows = Vec::new();
    let mut record = csv::StringRecord::new();
    loop {
        let begin = reader.position().byte() as usize;
        let more = reader
            .read_record(&mut record)
            .map_err(|e| match e.position() {
                Some(at) => format!("{shown}:{}: {}", at.line(), short(&e)),
                None => format!("{shown}: {e}"),
            })?;
        if !more {
            break;
        }
        let place = begin..reader.position().byte() as usize;
        let line = record.position().map_or(0, csv::Position::line);
        let wrong = |why: String| format!("{shown}:{line}: {why}");
        let group = record.get(group_at).unwrap_or_default();
        let user = record.get(user_at).unwrap_or_default();
        let label = label_at.and_then(|at| record.get(at)).unwrap_or_default();
        if jid::resourcepart(group).is_err() {
            return Err(wrong(format!("{group:?} is no name of a group")));
        }
        if label.len() > TEXT_BYTES_MAX || label.chars().any(char::is_control) {
            return Err(wrong(
                "the name is too long or holds control characters".into(),
            ));
        }
        let user = user_name(user, &config.domain).map_err(wrong)?;
        let count = members.entry(group.to_owned()).or_default();
        *count += 1;
        if *count > members_max {
            return Err(wrong(format!(
                "{group} has more than {members_max} members; raise groups.members_max"
            )));
        }
        if rows.len() >= all_max {
            return Err(wrong(format!(
                "there are more than {all_max} rows; raise groups.memberships_max"
            )));
        }
        let row = Row {
            group: group.to_owned(),
            user,
            label: label.to_owned(),
        };
        rows.push((row, place));
    }
    Ok(Lines { header, rows })
}

fn short(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!("it has {len} columns, the header has {expected_len}"),
        csv::ErrorKind::Utf8 { .. } => "it is not UTF-8".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::testing::ring;

    fn file(text: &str, sets: &[&str]) -> Result<Groups, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("groups.csv");
        std::fs::write(&path, text).unwrap();
        let mut sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        sets.push(format!("groups.file={:?}", path.display().to_string()));
        let config = Config::load(None, &sets).unwrap();
        load(&config, &ring(2))
    }

    #[test]
    fn a_file_names_groups_members_and_what_contacts_see() {
        let text = "group,username,name\n\"Equities, EU\",Alice@localhost,\"Alice A.\"\n\"Equities, EU\",bob,\n";
        let groups = file(text, &[]).unwrap();
        let members = groups.members("Equities, EU").unwrap();
        let members: Vec<_> = members.map(|p| (&*p.name, &*p.label)).collect();
        assert_eq!(members, [("alice", "Alice A."), ("bob", "")]);
        assert!(file("username,group\nalice,desk\n", &[]).is_ok());
        assert!(file("group,username\n", &[]).unwrap().is_empty());
        let config = Config::default();
        assert!(load(&config, &ring(2)).unwrap().is_empty());
    }

    #[test]
    fn a_mistake_names_file_line_and_mend() {
        let two = "group,username\ng,a\ng,b\n";
        for (text, sets, wanted) in [
            ("group\ng\n", vec![], "groups.csv:1: the header must name"),
            (
                "group,username,label\n",
                vec![],
                "groups.csv:1: there is no column \"label\"",
            ),
            (
                "group,username\ng,a\ng\n",
                vec![],
                "groups.csv:3: it has 1 columns, the header has 2",
            ),
            (
                "group,username\n,a\n",
                vec![],
                "groups.csv:2: \"\" is no name of a group",
            ),
            (
                "group,username\ng,a b\n",
                vec![],
                "groups.csv:2: \"a b\" is no user name",
            ),
            (
                "group,username\ng,a@elsewhere\n",
                vec![],
                "groups.csv:2: a@elsewhere is not of this server's domain",
            ),
            (
                two,
                vec!["groups.members_max=1"],
                "groups.csv:3: g has more than 1 members; raise groups.members_max",
            ),
            (
                two,
                vec!["groups.memberships_max=1"],
                "groups.csv:3: there are more than 1 rows; raise groups.memberships_max",
            ),
        ] {
            let why = file(text, &sets).err().unwrap_or_default();
            assert!(why.contains(wanted), "{text}: {why}");
        }
        let config = Config::load(None, &["groups.file='/nowhere/g.csv'".into()]).unwrap();
        let why = load(&config, &ring(1)).err().unwrap();
        assert!(why.starts_with("groups.file: /nowhere/g.csv"), "{why}");
    }

    #[test]
    fn members_come_and_go_and_the_rest_of_the_file_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("groups.csv");
        let set = format!("groups.file={:?}", path.display().to_string());
        let config = Config::load(None, &[set]).unwrap();
        let text = || fs::read_to_string(&path).unwrap();
        // a new file
        add(&config, "Equities, EU", "alice", "Alice \"A\"").unwrap();
        let first = "group,username,name\n\"Equities, EU\",alice,\"Alice \"\"A\"\"\"\n";
        assert_eq!(text(), first);
        // one that somebody else has written
        let own = "username , group\r\n\r\n alice,desk\r\nBob@localhost , desk\r\nbob,other";
        fs::write(&path, own).unwrap();
        add(&config, "desk", "carol", "").unwrap();
        assert_eq!(text(), format!("{own}\ncarol,desk\n"));
        remove(&config, "desk", "bob").unwrap();
        assert_eq!(
            text(),
            "username , group\r\n\r\n alice,desk\r\nbob,other\ncarol,desk\n"
        );
        let before = text();
        for (result, wanted) in [
            (
                add(&config, "desk", "carol", ""),
                "carol is in desk already",
            ),
            (
                add(&config, "desk", "dave", "Dave"),
                "there is no column name",
            ),
            (add(&config, "", "dave", ""), "is no name of a group"),
            (remove(&config, "desk", "bob"), "bob is not in desk"),
            (
                add(&Config::default(), "desk", "a", ""),
                "groups.file names no file",
            ),
        ] {
            let why = result.unwrap_err();
            assert!(why.contains(wanted), "{why}");
            assert_eq!(text(), before);
        }
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing is left beside"
        );
    }
}
