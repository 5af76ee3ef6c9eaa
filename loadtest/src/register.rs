//! `register`: makes the accounts of a load test, and rosters in a ring, over the protocol or as CSV files.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use crate::fleet::Fleet;
use crate::options::{Global, RegisterOptions};
use crate::report::Report;
use crate::worker::Job;

/// The group that contacts are in.
const ROSTER_GROUP: &str = "Ring";

/// The contacts of a user: the nearest `count` of a ring of `users`, half of them on each side.
pub fn contacts(user: u32, users: u32, count: u32) -> impl Iterator<Item = u32> {
    let user = u64::from(user);
    let users = u64::from(users);
    (1..=u64::from(count / 2))
        .flat_map(move |step| [(user + step) % users, (user + users - step) % users])
        .map(|contact| contact as u32)
}

pub fn check_ring(users: u32, contacts: u32) -> Result<(), String> {
    if !contacts.is_multiple_of(2) {
        return Err(format!(
            "{contacts} contacts in a ring: the number must be even"
        ));
    }
    if contacts > 0 && contacts >= users {
        return Err(format!("{contacts} contacts need more than {users} users"));
    }
    Ok(())
}

pub fn run(global: &Global, options: &RegisterOptions) -> Result<Report, String> {
    check_ring(global.users, options.roster)?;
    if global.accounts.is_some() || global.first > 0 {
        return Err("register makes the accounts from 0 on: --users says how many".into());
    }
    match &options.csv {
        Some(csv) => write_files(global, options, csv),
        None => register(global, options.roster),
    }
}

fn register(global: &Global, roster: u32) -> Result<Report, String> {
    let mut report = Report::new("register");
    let mut target = global.target()?;
    target.track_contacts = roster > 0;
    let fleet = Fleet::start(global, target)?;
    let start = Instant::now();
    let before = fleet.snapshot();
    let outcome = fleet.run(Job::Register, &fleet.everyone(), None, "register")?;
    let usage = before.until(&fleet.snapshot());
    let seconds = start.elapsed().as_secs_f64();
    report.number("users", "users", global.users, "");
    report.number(
        "registered",
        "registered",
        outcome.done - outcome.existed,
        "",
    );
    report.number("existed", "existed before", outcome.existed, "");
    report.number("seconds", "time", seconds, "s");
    report.number(
        "registrations_per_s",
        "registrations",
        outcome.done as f64 / seconds,
        "/s",
    );
    report.latencies("registration", "registration", &outcome.latencies);
    report.usage(&usage, outcome.done, "registration", "ms", 1e3);
    report.note_failures(&outcome.failures);

    if roster > 0 && outcome.failures.is_empty() {
        let start = Instant::now();
        let login = fleet.login_all("log in")?;
        report.note_failures(&login.failures);
        // All at once: who is not subscribed to yet cannot fulfil his neighbour's wait otherwise.
        let befriend = Job::Befriend {
            users: global.users,
            contacts: roster,
        };
        let outcome = fleet.run(befriend, &fleet.everyone(), None, "rosters")?;
        report.number("rosters", "rosters made", outcome.done, "");
        report.number("roster_contacts", "contacts of each", roster, "");
        report.number(
            "roster_seconds",
            "time for rosters",
            start.elapsed().as_secs_f64(),
            "s",
        );
        report.note_failures(&outcome.failures);
        fleet.wait_until_quiet();
        let logout = fleet.run(Job::Logout, &fleet.everyone(), None, "log out")?;
        report.note_failures(&logout.failures);
    }
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}

fn write_files(global: &Global, options: &RegisterOptions, csv: &Path) -> Result<Report, String> {
    let mut report = Report::new("register");
    write_file(csv, |file| write_accounts(file, global))?;
    report.text("csv", "accounts", csv.display().to_string());
    report.number("users", "users", global.users, "");
    if let Some(roster_csv) = &options.roster_csv {
        if options.roster == 0 {
            return Err("--roster-csv wants --roster K".into());
        }
        write_file(roster_csv, |file| {
            write_rosters(file, global, options.roster)
        })?;
        report.text("roster_csv", "rosters", roster_csv.display().to_string());
        report.number("roster_contacts", "contacts of each", options.roster, "");
    }
    Ok(report)
}

fn write_file(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), String> {
    let outcome = File::create(path).map(BufWriter::new).and_then(|mut file| {
        write(&mut file)?;
        file.flush()
    });
    outcome.map_err(|error| format!("{}: {error}", path.display()))
}

fn write_accounts(out: &mut impl Write, global: &Global) -> std::io::Result<()> {
    writeln!(out, "username,password")?;
    let password = field(&global.password);
    for user in 0..global.users {
        writeln!(
            out,
            "{},{password}",
            field(&format!("{}{user}", global.prefix))
        )?;
    }
    Ok(())
}

/// Both directions of each friendship, so that each side has its own name and group for the other.
fn write_rosters(out: &mut impl Write, global: &Global, roster: u32) -> std::io::Result<()> {
    writeln!(out, "username,contact,name,groups")?;
    for user in 0..global.users {
        for contact in contacts(user, global.users, roster) {
            let name = |number: u32| field(&format!("{}{number}", global.prefix));
            writeln!(
                out,
                "{},{},{},{ROSTER_GROUP}",
                name(user),
                name(contact),
                name(contact)
            )?;
        }
    }
    Ok(())
}

/// RFC 4180.
fn field(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Cli;
    use clap::Parser;

    #[test]
    fn the_ring_is_mutual_and_of_the_right_size() {
        for user in 0..11 {
            let mut own: Vec<_> = contacts(user, 11, 4).collect();
            assert!(
                own.iter()
                    .all(|contact| contacts(*contact, 11, 4).any(|back| back == user))
            );
            own.sort_unstable();
            own.dedup();
            assert_eq!(own.len(), 4);
            assert!(!own.contains(&user));
        }
        assert!(check_ring(11, 3).is_err());
        assert!(check_ring(4, 4).is_err());
        assert!(check_ring(5, 4).is_ok());
        assert!(check_ring(1, 0).is_ok());
    }

    #[test]
    fn files_have_the_columns_of_the_import() {
        let global =
            Cli::parse_from(["loadtest", "-n", "3", "--password", "a,\"b", "register"]).global;
        let mut accounts = Vec::new();
        write_accounts(&mut accounts, &global).unwrap();
        let accounts = String::from_utf8(accounts).unwrap();
        assert_eq!(accounts.lines().next(), Some("username,password"));
        assert_eq!(accounts.lines().nth(3), Some("load2,\"a,\"\"b\""));
        let mut rosters = Vec::new();
        write_rosters(&mut rosters, &global, 2).unwrap();
        let rosters = String::from_utf8(rosters).unwrap();
        assert_eq!(
            rosters.lines().take(3).collect::<Vec<_>>(),
            [
                "username,contact,name,groups",
                "load0,load1,load1,Ring",
                "load0,load2,load2,Ring"
            ]
        );
        assert_eq!(rosters.lines().count(), 7);
    }
}
