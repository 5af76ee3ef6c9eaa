//! The file of an administrator's groups (key `groups.file`): CSV with a header. In: its path and bounds. Out: [`Groups`], or one
//! sentence with file, line and mend.
//!
//! Columns: `group`, `username` (alice or alice@domain), and `name`, which is what contacts see and may be left out.

use std::collections::BTreeMap;
use std::path::Path;

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

fn read(path: &Path, config: &Config) -> Result<Vec<Row>, String> {
    let shown = path.display();
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .from_path(path)
        .map_err(|e| format!("groups.file: {shown}: {e}; name a readable file"))?;
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
    for record in reader.records() {
        let record = record.map_err(|e| match e.position() {
            Some(at) => format!("{shown}:{}: {}", at.line(), short(&e)),
            None => format!("{shown}: {e}"),
        })?;
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
        rows.push(Row {
            group: group.to_owned(),
            user,
            label: label.to_owned(),
        });
    }
    Ok(rows)
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
}
