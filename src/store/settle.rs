//! Journals and database brought together while no server runs: everything that the journals hold goes into SQL.
//!
//! Promise: a command that changes the database by hand sees, and changes, the newest state.

use std::sync::Arc;

use super::drain::{Drain, DrainConfig, DrainHandle, Source};
use super::journal::{self, Options, disk::Folder};
use super::sql::admin::Store;
use super::sql::{Database, Sql, runtime};

/// Opens the database after the journals in `folder` (if there are any) were carried over. An error is a sentence.
pub fn open(
    database: &Database,
    folder: &std::path::Path,
    options: &Options,
) -> Result<Store, String> {
    let mut store = Store::open(database)?;
    if !folder.exists() {
        return Ok(store);
    }
    let mut journals = journal::open(Arc::new(Folder::open(folder)?), options)
        .map_err(|error| error.to_string())?;
    let shards: Vec<u16> = journals.found().iter().map(|found| found.shard).collect();
    if shards.is_empty() {
        return Ok(store);
    }
    let readers: Vec<_> = shards.iter().map(|shard| journals.reader(*shard)).collect();
    let wanted: Vec<_> = readers
        .iter()
        .map(|reader| (reader.identity(), reader.committed()))
        .collect();
    let sources = readers
        .into_iter()
        .map(|reader| Box::new(reader) as Box<dyn Source>)
        .collect();
    runtime()?.block_on(async {
        let sql = Sql::open(database, 64 << 20, Default::default()).await?;
        let handle = DrainHandle::default();
        handle.stop();
        let config = DrainConfig {
            linger: std::time::Duration::ZERO,
            ..DrainConfig::default()
        };
        Drain::new(config, sources, Box::new(|_, _| {}), Default::default())
            .run(sql, &handle)
            .await;
        Ok::<(), String>(())
    })?;
    let reached = store.positions()?;
    for ((identity, committed), shard) in wanted.into_iter().zip(shards) {
        let at = reached
            .iter()
            .find(|at| at.identity == identity && at.journal == shard)
            .map_or(0, |at| at.seq);
        if at < committed {
            return Err(format!(
                "the journal of shard {shard} could not be carried over into the database (it has {at} of {committed} \
                 records); start nitro and look at its log"
            ));
        }
    }
    Ok(store)
}
