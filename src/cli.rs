//! The commands of `nitro`.
//!
//! In flow arguments, and passwords from a prompt or standard input; out flow text, an exit status (0 done, 1 refused or
//! partly done, 2 wrong usage or configuration) and, for `serve`, a running blade. Promise: a password is never an
//! argument, and every mistake is a sentence on standard error.

use std::ffi::OsString;
use std::io::{self, BufRead as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{
    Arg, ArgAction, ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
};

use crate::admin::client::Accounts;
use crate::admin::lock::DataLock;
use crate::admin::{
    AdminReply, AdminRequest, ComponentLine, Existing, Keys, LIST_MAX, SessionLine, UserDetail,
};
use crate::config::Config;
use crate::observe::Stage;
use crate::store::change::ArchivedChange;
use crate::store::journal::disk::{Disk, Folder};
use crate::store::journal::repair;
use crate::store::record::ScramKeys;
use crate::store::ring::Ring;
use crate::user_import::{self, Sources};
use crate::xmpp::{jid, sasl};
use crate::{backup, migrate, purge, top};

/// An instant-messaging (XMPP) server for trading floors.
///
/// Without a command it serves. Without --config it uses the defaults that config/nitro.toml shows.
#[derive(Debug, Parser)]
#[command(
    name = "nitro",
    version,
    after_help = "Example:\n  nitro serve --config /etc/nitro.toml --set 'domain=\"chat.example.com\"'"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server (the default).
    #[command(
        after_help = "Example:\n  nitro serve --set 'cores=\"0-3\"' --set c2s.require_tls=true"
    )]
    Serve,
    /// Manage accounts, whether the server runs or not.
    #[command(
        subcommand,
        after_help = "NAME is alice or alice@domain.\n\nExample:\n  nitro user add alice"
    )]
    User(User),
    /// Look at the sessions of the running server, or end them.
    #[command(subcommand, after_help = "Example:\n  nitro session list alice")]
    Session(Session),
    /// Groups that are in every member's roster (key groups.file).
    #[command(subcommand, after_help = "Example:\n  nitro group reload")]
    Group(Group),
    /// Look at the components (XEP-0114) that are connected to the running server, or end their connections.
    #[command(subcommand, after_help = "Example:\n  nitro component list")]
    Component(Component),
    /// Watch the running server, core by core: sessions, rates, latencies, lag, queues, tiers.
    ///
    /// A row is a core. Quantiles are those of the interval; h shows what the columns mean, q quits.
    #[command(after_help = "Example:\n  nitro top --once --json --interval 5")]
    Top {
        /// Between two looks.
        #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
        interval: f64,
        /// Print what happens in one interval, then end.
        #[arg(long)]
        once: bool,
        /// As one JSON object.
        #[arg(long, requires = "once")]
        json: bool,
        /// The stage whose quantiles the rows of the cores show at first.
        #[arg(long, value_name = "NAME", default_value = "message", value_parser = stage)]
        stage: Stage,
    },
    /// Look at the journals of a stopped server, or mend them.
    #[command(subcommand, after_help = "Example:\n  nitro journal verify")]
    Journal(Journal),
    /// Delete old messages from the archives, whether the server runs or not.
    #[command(
        subcommand,
        after_help = "Example:\n  nitro archive purge --older-than 365 --dry-run"
    )]
    Archive(Archive),
    /// Back up accounts, rosters, messages and secrets into a new folder, while the server runs or not.
    ///
    /// Everything that the server had accepted before the command began is in the backup: the command waits until the
    /// database has it, and then copies the database as it is at one moment (the backup of a MySQL database is a SQLite
    /// file too). Journals are not needed then.
    #[command(after_help = "Example:\n  nitro backup /var/backups/nitro-monday")]
    Backup {
        /// The folder to make.
        folder: PathBuf,
        /// How long the database may take to have everything that was accepted.
        #[arg(long, value_name = "SECONDS", default_value_t = 300)]
        wait: u64,
        /// Leave out the users' uploaded files (where another file system holds them they are copied, which may take long).
        #[arg(long)]
        without_uploads: bool,
    },
    /// Restore a backup into an empty data folder (and an empty MySQL database, if one is configured).
    #[command(after_help = "Example:\n  nitro restore /var/backups/nitro-monday")]
    Restore {
        /// The folder that `nitro backup` made.
        folder: PathBuf,
    },
    /// Copy everything from one database into another, SQLite or MySQL, while the server is stopped.
    ///
    /// A copy that was interrupted goes on when the command is repeated. What was copied is compared at the end, row by
    /// row. The source stays as it is; change the key `database` of the configuration afterwards.
    #[command(
        name = "migrate-store",
        after_help = "Example:\n  nitro migrate-store --to mysql://nitro:secret@db.example.com/nitro"
    )]
    MigrateStore {
        /// The database to fill, as the key `database` names it; it must be empty.
        #[arg(long, value_name = "DATABASE")]
        to: String,
        /// The database to copy. Default: the one of the configuration.
        #[arg(long, value_name = "DATABASE")]
        from: Option<String>,
        /// Copy nothing, only compare the two.
        #[arg(long)]
        verify: bool,
    },
    /// Check the configuration and say what it means.
    #[command(after_help = "Example:\n  nitro check-config --config /etc/nitro.toml")]
    CheckConfig {
        /// Print the configuration file with every key and its default instead.
        #[arg(long)]
        print_defaults: bool,
        /// Print the list of all metrics (config/metrics.md) instead.
        #[arg(long, conflicts_with = "print_defaults")]
        print_metrics: bool,
        /// Print the description of what is implemented for machines (DOAP, XEP-0453) instead.
        #[arg(long, conflicts_with_all = ["print_defaults", "print_metrics"])]
        print_doap: bool,
    },
    /// Print the completions of a shell.
    #[command(after_help = "Example:\n  nitro completions bash > /etc/bash_completion.d/nitro")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum Archive {
    /// Delete what was accepted more than so many days ago; what waits for its recipient stays.
    ///
    /// The key archive.keep_days does the same all the time.
    #[command(after_help = "Example:\n  nitro archive purge --older-than 365 --user alice")]
    Purge {
        /// Messages that are older.
        #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u64).range(1..=36_500))]
        older_than: u64,
        /// Of this user only: alice or alice@domain.
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
        /// Delete nothing, only count.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Subcommand)]
enum User {
    /// Add an account; asks for its password.
    #[command(after_help = "Example:\n  nitro user add alice --password-stdin < password-file")]
    Add {
        /// alice or alice@domain.
        name: String,
        #[command(flatten)]
        password: PasswordArgs,
    },
    /// Give an account a new password.
    #[command(after_help = "Example:\n  nitro user passwd alice")]
    Passwd {
        /// alice or alice@domain.
        name: String,
        #[command(flatten)]
        password: PasswordArgs,
    },
    /// Remove an account and everything that belongs to it; its sessions end.
    #[command(after_help = "Example:\n  nitro user remove alice")]
    Remove {
        /// alice or alice@domain.
        name: String,
    },
    /// List accounts, one a line.
    #[command(after_help = "Example:\n  nitro user list fx- --limit 20")]
    List {
        /// Only names that begin so.
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        /// At most so many.
        #[arg(long, value_name = "COUNT")]
        limit: Option<usize>,
    },
    /// Show one account.
    #[command(after_help = "Example:\n  nitro user show alice")]
    Show {
        /// alice or alice@domain.
        name: String,
    },
    /// Forbid an account to log in; its sessions end, its data stays.
    #[command(after_help = "Example:\n  nitro user disable alice")]
    Disable {
        /// alice or alice@domain.
        name: String,
    },
    /// Allow a disabled account to log in again.
    #[command(after_help = "Example:\n  nitro user enable alice")]
    Enable {
        /// alice or alice@domain.
        name: String,
    },
    /// Import many accounts and rosters from CSV files.
    #[command(long_about = user_import::HELP, after_help = user_import::EXAMPLE)]
    Import {
        /// The accounts.
        #[arg(required_unless_present = "rosters")]
        accounts: Option<PathBuf>,
        /// The rosters.
        #[arg(long, value_name = "FILE")]
        rosters: Option<PathBuf>,
        /// What to do with a row whose user exists.
        #[arg(long, value_enum, default_value = "error")]
        existing: Existing,
    },
}

#[derive(Debug, Subcommand)]
enum Session {
    /// List sessions, of one user or all.
    #[command(after_help = "Example:\n  nitro session list alice")]
    List {
        /// alice or alice@domain.
        name: Option<String>,
    },
    /// End one session, or all of a user.
    #[command(after_help = "Example:\n  nitro session kick alice@localhost/desk-7")]
    Kick {
        /// alice, alice@domain or alice@domain/resource.
        jid: String,
    },
}

#[derive(Debug, Subcommand)]
enum Group {
    /// List the groups that are in force, with their numbers of members.
    #[command(after_help = "Example:\n  nitro group list")]
    List,
    /// List the members of a group.
    #[command(after_help = "Example:\n  nitro group show desk")]
    Show {
        /// Its name.
        group: String,
    },
    /// Put a user into a group: a line in the file, which a running server reads again at once.
    #[command(after_help = "Example:\n  nitro group add desk alice --name Ally")]
    Add {
        /// The group; a new one begins with its first member.
        group: String,
        /// alice or alice@domain.
        user: String,
        /// What contacts see.
        #[arg(long, default_value = "")]
        name: String,
    },
    /// Take a user out of a group: out of the file, which a running server reads again at once.
    #[command(after_help = "Example:\n  nitro group remove desk alice")]
    Remove {
        /// The group; it is gone with its last member.
        group: String,
        /// alice or alice@domain.
        user: String,
    },
    /// Have the running server read the file again; who is on line sees the changes at once.
    #[command(after_help = "Example:\n  nitro group reload")]
    Reload,
    /// Read the file and tell what is wrong with it; changes nothing.
    #[command(after_help = "Example:\n  nitro group check")]
    Check,
}

#[derive(Debug, Subcommand)]
enum Component {
    /// List their connections.
    #[command(after_help = "Example:\n  nitro component list")]
    List,
    /// End the connections that serve a name. It may connect again: to keep it out, take it out of component.hosts first.
    #[command(after_help = "Example:\n  nitro component kick irc.example.com")]
    Kick {
        /// The name that it serves.
        host: String,
    },
}

#[derive(Debug, Subcommand)]
enum Journal {
    /// Read all journals and tell what is damaged; changes nothing.
    #[command(after_help = "Example:\n  nitro journal verify")]
    Verify,
    /// Save what can be saved of damaged journals, and tell what is lost.
    #[command(
        after_help = "Example:\n  nitro journal repair --backup /var/backups/nitro-journal-damaged"
    )]
    Repair {
        /// Where copies of the damaged files go; must not exist yet. Default: journal-damaged-TIME in data_dir.
        #[arg(long, value_name = "FOLDER")]
        backup: Option<PathBuf>,
    },
    /// List the records, one a line, without what they say.
    #[command(after_help = "Example:\n  nitro journal show --shard 0 --from 4711")]
    Show {
        /// Only the journal of this shard.
        #[arg(long)]
        shard: Option<u16>,
        /// Only from this sequence number on.
        #[arg(
            long,
            value_name = "NUMBER",
            default_value_t = 0,
            hide_default_value = true
        )]
        from: u64,
    },
}

#[derive(Debug, clap::Args)]
struct PasswordArgs {
    /// Read the password from the first line of standard input instead of asking for it.
    #[arg(long)]
    password_stdin: bool,
}

/// Between a fifth of a second and an hour.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.2..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("write a number of seconds from 0.2 to 3600".into()),
    }
}

fn stage(text: &str) -> Result<Stage, String> {
    let names: Vec<&str> = Stage::ALL.iter().map(|stage| stage.name()).collect();
    match Stage::ALL.iter().find(|stage| stage.name() == text) {
        Some(stage) => Ok(*stage),
        None => Err(format!("choose from {}", names.join(", "))),
    }
}

/// Carries out the command line of this process.
pub fn run() -> ExitCode {
    let (cli, options) = match parse(std::env::args_os()) {
        Ok(parsed) => parsed,
        Err(e) => e.exit(),
    };
    let command = cli.command.unwrap_or(Command::Serve);
    let done = match command {
        Command::Completions { shell } => completions(shell),
        Command::CheckConfig {
            print_defaults: true,
            ..
        } => print(&Config::default_file()),
        Command::CheckConfig {
            print_metrics: true,
            ..
        } => print(&crate::shard::figures::list()),
        Command::CheckConfig {
            print_doap: true, ..
        } => print(&crate::xmpp::feature::table::doap()),
        command => {
            let config = match Config::load(options.config.as_deref(), &options.sets) {
                Ok(config) => config,
                Err(e) => {
                    eprintln!("{e}");
                    return ExitCode::from(2);
                }
            };
            match command {
                Command::Serve => {
                    let load = || {
                        Config::load(options.config.as_deref(), &options.sets)
                            .map_err(|e| e.to_string())
                    };
                    return crate::blade::serve(config, load);
                }
                Command::User(User::Import {
                    accounts,
                    rosters,
                    existing,
                }) => {
                    let sources = Sources {
                        accounts,
                        rosters,
                        existing,
                    };
                    match user_import::run(&config, &sources) {
                        Ok(0) => Ok(()),
                        Ok(_) => return ExitCode::FAILURE,
                        Err(why) => Err(why),
                    }
                }
                Command::User(command) => user(&config, command),
                Command::Session(command) => session(&config, command),
                Command::Group(command) => group(&config, command),
                Command::Component(command) => components(&config, command),
                Command::Top {
                    interval,
                    once,
                    json,
                    stage,
                } => {
                    let interval = Duration::from_secs_f64(interval);
                    let options = top::Options {
                        interval,
                        once,
                        json,
                        stage,
                    };
                    top::run(&config, &options)
                }
                Command::Journal(command) => journal(&config, command),
                Command::Archive(Archive::Purge {
                    older_than,
                    user,
                    dry_run,
                }) => user
                    .map(|user| user_name(&user, &config.domain))
                    .transpose()
                    .and_then(|user| purge::run(&config, older_than, user, dry_run)),
                Command::Backup {
                    folder,
                    wait,
                    without_uploads,
                } => {
                    let wait = Duration::from_secs(wait);
                    backup::backup(&config, &folder, wait, !without_uploads)
                }
                Command::Restore { folder } => backup::restore(&config, &folder),
                Command::MigrateStore { to, from, verify } => {
                    migrate::run(&config, &to, from.as_deref(), verify)
                }
                _ => check_config(&config, &options),
            }
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// The options that every command takes.
#[derive(Debug, Default, PartialEq)]
struct Options {
    config: Option<PathBuf>,
    sets: Vec<String>,
}

/// `--config` and `--set` at every level. clap's own global arguments would let those behind the subcommand hide those
/// before it.
fn command() -> clap::Command {
    fn with_options(command: clap::Command) -> clap::Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("The configuration file (TOML); without it the defaults are used");
        let set = Arg::new("set")
            .long("set")
            .value_name("KEY=VALUE")
            .action(ArgAction::Append)
            .help("Override one key of the configuration; the value is TOML. Can be repeated");
        command.args([config, set]).mut_subcommands(with_options)
    }
    with_options(Cli::command())
}

fn parse(args: impl Iterator<Item = OsString>) -> Result<(Cli, Options), clap::Error> {
    let matches = command().try_get_matches_from(args)?;
    let mut options = Options::default();
    let mut level: Option<&ArgMatches> = Some(&matches);
    while let Some(matches) = level {
        options.config = matches.get_one("config").cloned().or(options.config);
        let sets = matches.get_many::<String>("set").into_iter().flatten();
        options.sets.extend(sets.cloned());
        level = matches.subcommand().map(|(_, deeper)| deeper);
    }
    Ok((Cli::from_arg_matches(&matches)?, options))
}

fn completions(shell: clap_complete::Shell) -> Result<(), String> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "nitro", &mut script);
    print(&String::from_utf8_lossy(&script))
}

fn check_config(config: &Config, options: &Options) -> Result<(), String> {
    crate::admin::redis_tls(config, &crate::admin::redis_instances(config)?)?;
    config.component_hosts()?;
    crate::groups_file::load(config, &Ring::of_shards(1))?;
    let from = match &options.config {
        Some(path) => path.display().to_string(),
        None => "the defaults".into(),
    };
    let list = |addresses: &[std::net::SocketAddr]| match addresses {
        [] => "nowhere".into(),
        some => some
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", "),
    };
    let (certificate, _, own) = config.certificate_paths();
    print(&format!(
        "the configuration is good ({from}, {} overridden)\n\
         domain       {}\n\
         data         {}, database {}\n\
         clients      {} (STARTTLS), {} (TLS)\n\
         HTTP         {}\n\
         web          {}, {} (TLS)\n\
         certificate  {}{}\n",
        options.sets.len(),
        config.domain,
        config.data_dir.display(),
        // the password stays out of sight
        crate::store::sql::Database::parse(&config.database())?,
        list(&config.c2s.listen),
        list(&config.c2s.listen_tls),
        list(&config.http.listen),
        list(&config.web.listen),
        list(&config.web.listen_tls),
        certificate.display(),
        if own {
            " (self-signed, made when missing)"
        } else {
            ""
        },
    ))
}

fn user(config: &Config, command: User) -> Result<(), String> {
    let name_of = |name: &str| user_name(name, &config.domain);
    match command {
        User::Add { name, password } => {
            let name = name_of(&name)?;
            let keys = read_keys(config, &password)?;
            Accounts::open(config)?.call(AdminRequest::UserAdd {
                name: name.clone(),
                keys,
            })?;
            print(&format!("added {name}@{}\n", config.domain))
        }
        User::Passwd { name, password } => {
            let name = name_of(&name)?;
            let keys = read_keys(config, &password)?;
            Accounts::open(config)?.call(AdminRequest::UserPasswd {
                name: name.clone(),
                keys,
            })?;
            print(&format!("{name}@{} has a new password\n", config.domain))
        }
        User::Remove { name } => {
            let name = name_of(&name)?;
            Accounts::open(config)?.call(AdminRequest::UserRemove { name: name.clone() })?;
            print(&format!("removed {name}@{}\n", config.domain))
        }
        User::Disable { name } => {
            let name = name_of(&name)?;
            Accounts::open(config)?.call(AdminRequest::UserDisable { name: name.clone() })?;
            print(&format!(
                "{name}@{} cannot log in any more\n",
                config.domain
            ))
        }
        User::Enable { name } => {
            let name = name_of(&name)?;
            Accounts::open(config)?.call(AdminRequest::UserEnable { name: name.clone() })?;
            print(&format!("{name}@{} can log in\n", config.domain))
        }
        User::Show { name } => {
            let name = name_of(&name)?;
            match Accounts::open(config)?.call(AdminRequest::UserShow { name })? {
                AdminReply::User { user } => print(&user_text(&user, &config.domain)),
                other => Err(unexpected(&other)),
            }
        }
        User::List { prefix, limit } => list_users(config, &prefix, limit.unwrap_or(usize::MAX)),
        User::Import { .. } => unreachable!("run() takes the import"),
    }
}

fn list_users(config: &Config, prefix: &str, mut limit: usize) -> Result<(), String> {
    let mut accounts = Accounts::open(config)?;
    let mut after = String::new();
    while limit > 0 {
        let page = limit.min(LIST_MAX);
        let request = AdminRequest::UserList {
            prefix: prefix.into(),
            after,
            limit: page,
        };
        let users = match accounts.call(request)? {
            AdminReply::Users { users } => users,
            other => return Err(unexpected(&other)),
        };
        let mut text = String::new();
        for user in &users {
            let disabled = if user.disabled { "  (disabled)" } else { "" };
            text += &format!("{}@{}{disabled}\n", user.name, config.domain);
        }
        print(&text)?;
        match users.last() {
            Some(last) if users.len() == page => after = last.name.clone(),
            _ => break,
        }
        limit -= page;
    }
    Ok(())
}

fn session(config: &Config, command: Session) -> Result<(), String> {
    let mut accounts = Accounts::open(config)?;
    if !accounts.is_running() {
        return Err(format!(
            "no nitro runs on {}, so there are no sessions; start it with: nitro serve",
            config.data_dir.display()
        ));
    }
    match command {
        Session::List { name } => {
            let name = name
                .map(|name| user_name(&name, &config.domain))
                .transpose()?;
            let mut after = String::new();
            loop {
                let request = AdminRequest::SessionList {
                    name: name.clone(),
                    after,
                    limit: LIST_MAX,
                };
                let sessions = match accounts.call(request)? {
                    AdminReply::Sessions { sessions } => sessions,
                    other => return Err(unexpected(&other)),
                };
                print(&sessions.iter().map(session_text).collect::<String>())?;
                match sessions.last() {
                    Some(last) if sessions.len() == LIST_MAX => after = last.jid.clone(),
                    _ => return Ok(()),
                }
            }
        }
        Session::Kick { jid } => {
            let (bare, resource) = match jid.split_once('/') {
                None => (jid.as_str(), None),
                Some((bare, resource)) => {
                    let prepared = jid::resourcepart(resource).map_err(|e| {
                        format!("{resource:?} is no resource ({e}); see: nitro session list")
                    })?;
                    (bare, Some(prepared.into_owned()))
                }
            };
            let name = user_name(bare, &config.domain)?;
            match accounts.call(AdminRequest::SessionKick { name, resource })? {
                AdminReply::Kicked { sessions: 0 } => Err(format!("{jid} has no session")),
                AdminReply::Kicked { sessions } => print(&format!("{sessions} ended\n")),
                other => Err(unexpected(&other)),
            }
        }
    }
}

fn group(config: &Config, command: Group) -> Result<(), String> {
    let edited = matches!(command, Group::Add { .. } | Group::Remove { .. });
    let request = match command {
        Group::Add { group, user, name } => {
            let user = user_name(&user, &config.domain)?;
            crate::groups_file::add(config, &group, &user, &name)?;
            AdminRequest::GroupReload
        }
        Group::Remove { group, user } => {
            let user = user_name(&user, &config.domain)?;
            crate::groups_file::remove(config, &group, &user)?;
            AdminRequest::GroupReload
        }
        Group::Check => {
            let groups = crate::groups_file::load(config, &Ring::of_shards(1))?;
            let (count, people) = (groups.len(), groups.people());
            return print(&format!("{count} groups with {people} users: no mistake\n"));
        }
        Group::List => AdminRequest::GroupList,
        Group::Reload => AdminRequest::GroupReload,
        Group::Show { group } => AdminRequest::GroupShow { group },
    };
    if edited && crate::admin::client::Client::connect(&config.data_dir)?.is_none() {
        return print("done; no nitro runs, the next start reads the file\n");
    }
    let mut accounts = Accounts::open(config)?;
    if !accounts.is_running() {
        return Err(format!(
            "no nitro runs on {}; to look at the file: nitro group check",
            config.data_dir.display()
        ));
    }
    match accounts.call(request)? {
        AdminReply::Groups { .. } if edited => print("done; it is in force\n"),
        AdminReply::Groups { groups } => {
            let line = |(name, members): &(String, usize)| format!("{name}  {members} members\n");
            print(&groups.iter().map(line).collect::<String>())
        }
        AdminReply::Group { members } => {
            let line = |(name, label): &(String, String)| format!("{name}  {label}\n");
            print(&members.iter().map(line).collect::<String>())
        }
        other => Err(unexpected(&other)),
    }
}

fn components(config: &Config, command: Component) -> Result<(), String> {
    let request = match command {
        Component::List => AdminRequest::ComponentList,
        Component::Kick { host } => {
            let prepared = jid::domainpart(&host).map(|host| host.into_owned());
            let host = prepared.map_err(|e| format!("{host:?} is no name of a component ({e})"))?;
            AdminRequest::ComponentKick { host }
        }
    };
    let mut accounts = Accounts::open(config)?;
    if !accounts.is_running() {
        return Err(format!(
            "no nitro runs on {}, so no component is connected; start it with: nitro serve",
            config.data_dir.display()
        ));
    }
    match accounts.call(request)? {
        AdminReply::Kicked { sessions: 0 } => Err("no connection serves this name".into()),
        AdminReply::Kicked { sessions } => print(&format!("{sessions} ended\n")),
        AdminReply::Components { components } => {
            print(&components.iter().map(component_text).collect::<String>())
        }
        other => Err(unexpected(&other)),
    }
}

fn component_text(component: &ComponentLine) -> String {
    let since = UNIX_EPOCH + Duration::from_secs(component.since);
    let age = SystemTime::now().duration_since(since).unwrap_or_default();
    format!(
        "{}  {}  shard {}  {} s  {} stanzas in, {} out  {} bytes wait\n",
        component.host,
        component.address,
        component.shard,
        age.as_secs(),
        component.stanzas_in,
        component.stanzas_out,
        component.waiting_bytes,
    )
}

/// The prepared localpart of `alice` or `alice@domain`.
pub(crate) fn user_name(text: &str, domain: &str) -> Result<String, String> {
    let (local, given) = match text.rsplit_once('@') {
        Some((local, given)) => (local, Some(given)),
        None => (text, None),
    };
    if let Some(given) = given {
        let same = jid::domainpart(given).is_ok_and(|given| given == domain);
        if !same {
            return Err(format!(
                "{text} is not of this server's domain; write {local} or {local}@{domain}"
            ));
        }
    }
    match jid::localpart(local) {
        Ok(prepared) => Ok(prepared.into_owned()),
        Err(e) => Err(format!("{local:?} is no user name ({e}); write e.g. alice")),
    }
}

/// Asks for a password and makes its keys.
fn read_keys(config: &Config, args: &PasswordArgs) -> Result<Keys, String> {
    let password = match args.password_stdin {
        true => first_line(io::stdin().lock())?,
        false => prompt()?,
    };
    derive_keys(&password, config.sasl.iterations)
}

fn prompt() -> Result<String, String> {
    let ask = |text: &str| {
        rpassword::prompt_password(text).map_err(|e| {
            format!("there is no terminal to ask for a password on ({e}); use --password-stdin")
        })
    };
    let password = ask("Password: ")?;
    match ask("Again: ")? == password {
        true => Ok(password),
        false => Err("the two passwords differ; repeat the command".into()),
    }
}

/// The password without its line end.
fn first_line(from: impl io::BufRead) -> Result<String, String> {
    let mut line = String::new();
    io::Read::take(from, sasl::PASSWORD_BYTES_MAX as u64 + 2)
        .read_line(&mut line)
        .map_err(|e| {
            format!("the password cannot be read from standard input ({e}); write it in UTF-8")
        })?;
    let password = line.strip_suffix('\n').unwrap_or(&line);
    let password = password.strip_suffix('\r').unwrap_or(password);
    match password.len() {
        0 => Err("standard input holds no password; write it on the first line".into()),
        1..=sasl::PASSWORD_BYTES_MAX => Ok(password.into()),
        _ => Err(format!(
            "the password is longer than {} bytes; choose a shorter one",
            sasl::PASSWORD_BYTES_MAX
        )),
    }
}

/// Fresh salts, keys for both hashes.
///
/// # Errors
/// Why the password cannot be used (RFC 8265), as a sentence.
pub(crate) fn derive_keys(password: &str, iterations: u32) -> Result<Keys, String> {
    let key = |hash| {
        let mut salt = [0; 16];
        aws_lc_rs::rand::fill(&mut salt).map_err(|_| "the system gives no random bytes")?;
        let keys = sasl::derive(hash, password, &salt, iterations)
            .map_err(|e| format!("the password cannot be used ({e}); choose another one"))?;
        Ok::<_, String>(ScramKeys {
            iterations: keys.iterations,
            salt: keys.salt,
            stored_key: keys.stored_key,
            server_key: keys.server_key,
        })
    };
    Ok(Keys {
        sha1: Some(key(sasl::Hash::Sha1)?),
        sha256: Some(key(sasl::Hash::Sha256)?),
    })
}

fn user_text(user: &UserDetail, domain: &str) -> String {
    let keys = |iterations: Option<u32>| match iterations {
        Some(n) => format!("{n} iterations"),
        None => "none".into(),
    };
    let sessions = match user.sessions {
        Some(n) => n.to_string(),
        None => "nitro does not run".into(),
    };
    format!(
        "address           {}@{domain}\n\
         log-in            {}\n\
         created           {}\n\
         last log-out      {}\n\
         sessions          {sessions}\n\
         SCRAM-SHA-1       {}\n\
         SCRAM-SHA-256     {}\n\
         contacts          {}\n\
         blocked           {}\n\
         requests          {}\n\
         offline messages  {}\n",
        user.name,
        if user.disabled { "disabled" } else { "allowed" },
        date(user.created_at),
        user.last_at.map_or("never".into(), date),
        keys(user.sha1_iterations),
        keys(user.sha256_iterations),
        user.contacts,
        user.blocked,
        user.requests,
        user.offline_messages,
    )
}

fn session_text(session: &SessionLine) -> String {
    let since = UNIX_EPOCH + Duration::from_secs(session.since);
    let age = SystemTime::now().duration_since(since).unwrap_or_default();
    let presence = match (session.parked, session.priority) {
        (true, _) => "parked".into(),
        (_, Some(priority)) => format!("priority {priority}"),
        (_, None) => "no presence".into(),
    };
    format!(
        "{}  {}  {}  shard {}  {} s  {presence}\n",
        session.jid,
        session.address,
        if session.tls { "TLS" } else { "clear" },
        session.shard,
        age.as_secs(),
    )
}

/// XEP-0082 in UTC.
fn date(unix_seconds: u64) -> String {
    // Days to civil date (Howard Hinnant's algorithm), with years that begin in March.
    let days = unix_seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let second = unix_seconds % 86_400;
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
}

pub(crate) fn unexpected(reply: &AdminReply) -> String {
    format!(
        "the running nitro is of another release (it answered {reply:?}); use its own nitro command"
    )
}

fn journal(config: &Config, command: Journal) -> Result<(), String> {
    let path = config.journal_dir();
    if !path.is_dir() {
        return Err(format!(
            "{}: there is no journal; is data_dir right?",
            path.display()
        ));
    }
    let _lock = DataLock::acquire(&config.data_dir)?;
    let disk: Arc<dyn Disk> = Arc::new(Folder::existing(&path)?);
    let verified = || repair::verify(&disk).map_err(|e| e.to_string());
    match command {
        Journal::Verify => {
            let report = verified()?;
            print(&report.to_string())?;
            match report.is_good() {
                true => print("all journals are good\n"),
                false => Err("save what can be saved with: nitro journal repair".into()),
            }
        }
        Journal::Repair { backup } => {
            if verified()?.is_good() {
                return print("all journals are good, nothing was changed\n");
            }
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let named = format!("journal-damaged-{}", now.unwrap_or_default().as_secs());
            let backup = backup.unwrap_or_else(|| config.data_dir.join(named));
            if backup.exists() {
                return Err(format!(
                    "{}: is there already; give another folder with --backup",
                    backup.display()
                ));
            }
            let copies = Folder::open(&backup)?;
            // what is dropped here may have been copied into Redis
            crate::admin::forget_copies(config)?;
            let report = repair::repair(&disk, &copies).map_err(|e| e.to_string())?;
            print(&format!(
                "{report}repaired; the damaged files as they were are in {}\n",
                backup.display()
            ))
        }
        Journal::Show { shard, from } => {
            let mut lines = String::new();
            let mut printed = Ok(());
            repair::show(&disk, |of, seq, change| {
                if printed.is_ok() && seq >= from && shard.is_none_or(|shard| shard == of) {
                    lines += &change_text(of, seq, change);
                    if lines.len() > 64 << 10 {
                        printed = print(&lines);
                        lines.clear();
                    }
                }
            })
            .map_err(|e| e.to_string())?;
            printed.and_then(|()| print(&lines))
        }
    }
}

/// What a change is about, never what it says.
fn change_text(shard: u16, seq: u64, change: &ArchivedChange) -> String {
    use crate::store::change::Message;
    let revision = |kind: &str, name: &str, revision: u64| format!("{kind} {name} {revision}");
    let text = match change {
        ArchivedChange::Message(message) => {
            let names = [
                (Message::ARCHIVE, "archive"),
                (Message::PENDING, "pending"),
                (Message::SENT, "sent"),
                (Message::RECEIVED, "received"),
                (Message::UNDECIDED, "undecided"),
            ];
            let what = names.iter().filter(|(bit, _)| message.what & bit != 0);
            let what: Vec<_> = what.map(|(_, name)| *name).collect();
            format!(
                "message {} {} {} twin {}, {} bytes",
                message.owner,
                message.id,
                what.join("+"),
                message.twin,
                message.stanza.len()
            )
        }
        ArchivedChange::AddUser {
            name, revision: r, ..
        } => revision("add-user", name, r.to_native()),
        ArchivedChange::PutUser {
            name, revision: r, ..
        } => revision("put-user", name, r.to_native()),
        ArchivedChange::RemoveUser { name, revision: r } => {
            revision("remove-user", name, r.to_native())
        }
        ArchivedChange::PutDocument {
            name,
            revision: r,
            key,
            ..
        } => {
            format!(
                "{} {:?}",
                revision("put-document", name, r.to_native()),
                &**key
            )
        }
        ArchivedChange::PutLast {
            name, revision: r, ..
        } => revision("put-last", name, r.to_native()),
        ArchivedChange::Marks(marks) => format!(
            "marks, {} done, {} dropped, {} settled, {} counts",
            marks.done.len(),
            marks.dropped.len(),
            marks.settled.len(),
            marks.counts.len()
        ),
        ArchivedChange::Decided { ids } => format!("marks, {} decided", ids.len()),
        ArchivedChange::Unarchived { ids } => format!("marks, {} not archived", ids.len()),
        ArchivedChange::Retract(retract) => {
            revision("retract", &retract.owner, retract.id.to_native())
        }
    };
    format!("{shard} {seq} {text}\n")
}

/// Writes to standard output; a reader that has gone (`| head`) is no mistake.
fn print(text: &str) -> Result<(), String> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => Err(format!("standard output cannot be written ({e})")),
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<(Cli, Options), clap::Error> {
        parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_command_ends_its_help_with_an_example_that_parses() {
        fn walk(command: &clap::Command, path: &str) {
            let help = command
                .get_after_help()
                .unwrap_or_else(|| panic!("{path} has no example"));
            let help = help.to_string();
            let example = help.lines().last().unwrap();
            let arguments = example.trim().split([' ']).map(|w| w.trim_matches('\''));
            let arguments: Vec<_> = arguments.take_while(|w| !["<", ">"].contains(w)).collect();
            assert!(
                arguments.join(" ").starts_with(path),
                "{example} is no example of {path}"
            );
            parsed(&arguments.join(" ")).unwrap_or_else(|e| panic!("{example}: {e}"));
            for sub in command.get_subcommands() {
                walk(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        walk(&command(), "nitro");
    }

    #[test]
    fn options_count_before_and_behind_the_command_together() {
        let (cli, options) = parsed(
            "nitro --config a --set x=1 user --set y=2 add --set z=3 --config b alice --set x=4",
        )
        .unwrap();
        assert!(matches!(cli.command, Some(Command::User(User::Add { .. }))));
        assert_eq!(
            options,
            Options {
                config: Some("b".into()),
                sets: ["x=1", "y=2", "z=3", "x=4"].map(String::from).to_vec(),
            }
        );
    }

    #[test]
    fn no_command_means_serve() {
        let (cli, options) = parsed("nitro --set x=1").unwrap();
        assert!(cli.command.is_none());
        assert_eq!(options.sets, ["x=1"]);
    }

    #[test]
    fn a_password_is_never_an_argument() {
        assert!(parsed("nitro user add alice secret").is_err());
        assert!(parsed("nitro user add alice --password secret").is_err());
        assert!(parsed("nitro user add alice --password-stdin").is_ok());
    }

    #[test]
    fn completions_exist_for_the_shells() {
        for shell in ["bash", "zsh", "fish"] {
            assert!(parsed(&format!("nitro completions {shell}")).is_ok());
        }
        let mut script = Vec::new();
        clap_complete::generate(
            clap_complete::Shell::Bash,
            &mut command(),
            "nitro",
            &mut script,
        );
        assert!(String::from_utf8(script).unwrap().contains("passwd"));
    }

    #[test]
    fn a_name_is_prepared_and_another_domain_refused() {
        for text in ["alice", "Alice", "alice@localhost", "ALICE@LocalHost."] {
            assert_eq!(user_name(text, "localhost").unwrap(), "alice");
        }
        assert_eq!(
            user_name("alice@example.com", "localhost").unwrap_err(),
            "alice@example.com is not of this server's domain; write alice or alice@localhost"
        );
        for text in ["", "@localhost", "a b", "a/b", "a@b@localhost"] {
            assert!(user_name(text, "localhost").is_err(), "{text}");
        }
    }

    #[test]
    fn the_password_of_standard_input_is_its_first_line() {
        let read = |text: &str| first_line(text.as_bytes());
        assert_eq!(read("geheim\nmore").unwrap(), "geheim");
        assert_eq!(read("geheim\r\n").unwrap(), "geheim");
        assert_eq!(read(" two words ").unwrap(), " two words ");
        assert!(read("").is_err());
        assert!(read("\n").is_err());
        assert!(read(&"x".repeat(sasl::PASSWORD_BYTES_MAX + 1)).is_err());
        assert!(first_line(&b"\xff\n"[..]).is_err());
    }

    #[test]
    fn a_date_is_told_in_utc() {
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(date(1_795_392_000), "2026-11-23T00:00:00Z");
    }

    #[test]
    fn a_line_about_a_change_never_says_what_it_says() {
        use crate::store::change::{Change, Marks, Message};
        let line = |change: Change| {
            let mut bytes = Vec::new();
            change.encode(&mut bytes);
            change_text(1, 7, ArchivedChange::access(&bytes).unwrap())
        };
        let message = line(Change::Message(Message {
            id: 4711,
            owner: "alice",
            what: Message::ARCHIVE | Message::RECEIVED,
            kind: 0,
            flags: 0,
            peer: "bob@localhost/desk",
            twin: 4710,
            stream: "",
            count: 0,
            stanza: b"secret",
        }));
        assert_eq!(
            message,
            "1 7 message alice 4711 archive+received twin 4710, 6 bytes\n"
        );
        let put = line(Change::PutUser {
            name: "alice",
            revision: 8,
            record: b"secret",
        });
        assert_eq!(put, "1 7 put-user alice 8\n");
        let document = line(Change::PutDocument {
            name: "alice",
            revision: 9,
            key: "vcard",
            value: b"secret",
        });
        assert_eq!(document, "1 7 put-document alice 9 \"vcard\"\n");
        let marks = line(Change::Marks(Marks {
            done: &[1, 2],
            ..Marks::default()
        }));
        assert_eq!(marks, "1 7 marks, 2 done, 0 dropped, 0 settled, 0 counts\n");
    }

    #[test]
    fn journals_are_left_alone_while_a_server_runs_and_mended_when_it_does_not() {
        use crate::store::change::Change;
        use crate::store::journal::{self, Group, Options, floors};
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().join("data"),
            ..Config::default()
        };
        let why = super::journal(&config, Journal::Verify).unwrap_err();
        assert!(why.contains("there is no journal"), "{why}");
        let lock = DataLock::acquire(&config.data_dir).unwrap();
        let path = config.journal_dir();
        let disk: Arc<dyn Disk> = Arc::new(Folder::open(&path).unwrap());
        let options = Options {
            segment_bytes: 64 << 10,
            backlog_bytes_max: 1 << 30,
            floors: floors(),
        };
        let mut journals = journal::open(disk.clone(), &options).unwrap();
        let (sender, committed) = std::sync::mpsc::channel();
        let tell = move |_| sender.send(()).unwrap();
        let writer = journals.writer(0, 0, Box::new(tell)).unwrap();
        for seq in 1..=3 {
            let mut group = Group::new();
            let change = Change::RemoveUser {
                name: "alice",
                revision: seq,
            };
            group.append(seq, &change);
            writer.submit(group);
            committed.recv_timeout(Duration::from_secs(30)).unwrap();
        }
        let why = super::journal(&config, Journal::Verify).unwrap_err();
        assert!(why.contains("another nitro"), "{why}");
        drop((writer, journals, lock));
        super::journal(&config, Journal::Verify).unwrap();
        // the second group, in the third block
        let file = disk.open("00000-000000000001.seg").unwrap();
        file.write_at(b"x", 2 * 4096 + 60).unwrap();
        let why = super::journal(&config, Journal::Verify).unwrap_err();
        assert!(why.contains("nitro journal repair"), "{why}");
        let backup = Some(dir.path().join("backup"));
        super::journal(&config, Journal::Repair { backup }).unwrap();
        assert!(dir.path().join("backup/00000-000000000001.seg").exists());
        super::journal(&config, Journal::Verify).unwrap();
        let show = Journal::Show {
            shard: None,
            from: 0,
        };
        super::journal(&config, show).unwrap();
        journal::open(disk, &options).unwrap();
    }
}
