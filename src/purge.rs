//! `nitro archive purge`: what is older than so many days goes out of the archives, whether the server runs or not.
//!
//! In: an age, and perhaps a user. Out: rows deleted in small steps with pauses, a line with what has gone and what stays.
//! Promises: what waits for its recipient stays; a server that runs meanwhile is not held up, and shows nothing any more that
//! has gone. [`crate::store::sql::purge`] does the work.

use std::time::{Duration, Instant};

use crate::admin::client::Client;
use crate::admin::{self, AdminReply, AdminRequest};
use crate::config::Config;
use crate::store::sql::Database;
use crate::store::sql::admin::Store;
use crate::store::sql::purge::{Purge, Whose};

/// Of the time that a step took, its pause while a server runs.
const STEP_PAUSE: u32 = 2;

/// Deletes, or (`dry`) only counts.
///
/// # Errors
/// A sentence.
pub fn run(config: &Config, days: u64, user: Option<String>, dry: bool) -> Result<(), String> {
    let database = admin::database(config)?;
    if let Database::Sqlite(path) = &database
        && !path.exists()
    {
        return Err(format!(
            "{}: there is no such database; name the configuration that the server uses with --config",
            path.display()
        ));
    }
    let runs = Client::connect(&config.data_dir)?.is_some();
    let mut store = Store::open(&database)?;
    if let Some(name) = &user
        && store.show(name)?.is_none()
    {
        return Err(format!("there is no user {name}"));
    }
    let mut purge = Purge::older_than(days, user.map_or(Whose::All, Whose::One), dry);
    while !purge.is_over() {
        let begun = Instant::now();
        store.purge_step(&mut purge)?;
        if runs {
            let pause = begun.elapsed() * STEP_PAUSE;
            std::thread::sleep(pause.min(Duration::from_secs(1)));
        }
    }
    drop(store);
    // it may have been started or stopped meanwhile
    if let (false, Some(mut server)) = (dry, Client::connect(&config.data_dir)?) {
        match server.call(&AdminRequest::ArchivePurged)? {
            AdminReply::Done => {}
            AdminReply::Refused { sentence } => return Err(sentence),
            _ => return Err("the server gave an answer of another release".into()),
        }
    }
    let (gone, kept) = (purge.gone, purge.kept);
    let done = if dry { "would be deleted" } else { "deleted" };
    println!("{gone} entries {done}, {kept} stay because they wait for their recipients");
    Ok(())
}
