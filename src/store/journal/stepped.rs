//! Journals without threads, for simulations: what committer, keeper and drain do, one step at a time, on a disk that
//! forgets. The code is that of the real ones; only the threads are left out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::segments::{Appender, CommitError, Journal, Kept, Role};
use super::sim::SimDisk;
use super::*;

/// The journals of one life.
pub struct Stepped {
    journals: Journals,
    running: BTreeMap<u16, Running>,
}

struct Running {
    journal: Arc<Journal>,
    reader: Reader,
    /// `None`: its shard is no more.
    appender: Option<Appender>,
    flying: Option<Group>,
}

impl Stepped {
    pub fn open(disk: &SimDisk, options: &Options) -> Result<Stepped, JournalError> {
        Ok(Stepped {
            journals: open(Arc::new(disk.clone()), options)?,
            running: BTreeMap::new(),
        })
    }

    pub fn journals(&self) -> &Journals {
        &self.journals
    }

    /// Goes on with the journals of these shards, leaves the others; `drained` tells what SQL has, by number and
    /// identity. Gives the next free number of each shard.
    pub fn start(
        &mut self,
        shards: u16,
        drained: impl Fn(u16, u64) -> u64,
    ) -> Result<Vec<u64>, JournalError> {
        let found: BTreeMap<u16, u64> = self
            .journals
            .found()
            .iter()
            .map(|found| (found.shard, found.identity))
            .collect();
        let mut next = Vec::new();
        for shard in 0..shards {
            let drained = found.get(&shard).map_or(0, |id| drained(shard, *id));
            let (journal, appender, next_seq) = self.journals.adopt(shard, drained)?;
            next.push(next_seq);
            self.run(shard, journal, Some(appender));
        }
        for (shard, id) in found.into_iter().filter(|(shard, _)| *shard >= shards) {
            let journal = self.journals.journals[&shard].clone();
            journal.set_role(Role::Left);
            self.run(shard, journal, None);
            self.running[&shard].reader.drained(drained(shard, id));
        }
        Ok(next)
    }

    fn run(&mut self, shard: u16, journal: Arc<Journal>, appender: Option<Appender>) {
        let reader = Reader::new(journal.clone(), self.journals.keeper.clone());
        let running = Running {
            journal,
            reader,
            appender,
            flying: None,
        };
        self.running.insert(shard, running);
    }

    pub fn status(&self, shard: u16) -> Status {
        self.running[&shard].journal.state.status()
    }

    pub fn submit(&mut self, shard: u16, group: Group) {
        let flying = &mut self.running.get_mut(&shard).unwrap().flying;
        assert!(flying.is_none(), "one group is in flight at a time");
        *flying = Some(group);
    }

    /// Commits what was submitted; `None`: there is nothing, or no room for it now. An error: the disk has stopped.
    pub fn commit(&mut self, shard: u16) -> Result<Option<Committed>, JournalError> {
        let running = self.running.get_mut(&shard).unwrap();
        let (Some(mut group), Some(appender)) = (running.flying.take(), &mut running.appender)
        else {
            return Ok(None);
        };
        match appender.commit(&mut group) {
            Ok(()) => Ok(Some(Committed {
                group,
                took: Duration::ZERO,
            })),
            Err(CommitError::Disk(error)) => Err(error),
            Err(_) => {
                running.flying = Some(group);
                Ok(None)
            }
        }
    }

    /// One step of tidying up in every journal, or of making spares alone; did it do anything?
    pub fn keep(&mut self, recycles: bool) -> Result<bool, JournalError> {
        let mut worked = false;
        for running in self.running.values() {
            let journal = &running.journal;
            worked |= match recycles {
                true => journal.keep()? == Kept::Worked,
                false if journal.state.spares() > 0 || running.appender.is_none() => false,
                false => journal.make_spare()? == Kept::Worked,
            };
        }
        self.running.retain(|_, one| !one.journal.is_gone());
        Ok(worked)
    }

    /// For the drain, with the journals' numbers.
    pub fn readers(&mut self) -> impl Iterator<Item = &mut Reader> {
        self.running.values_mut().map(|one| &mut one.reader)
    }
}
