//! What the drain reads of a journal.
//!
//! In: the position that SQL has. Out: the records behind it. Promise: only committed ones, whole, in order, each once
//! for each time that it is asked for.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use super::JournalError;
use super::format::{BLOCK, Records};
use super::scan::{Live, Window};
use super::segments::Journal;
use super::state::State;
use super::writer::Keeper;
use crate::rt::give_way;

/// The reading end of a journal.
pub struct Reader {
    journal: Arc<Journal>,
    keeper: Arc<Keeper>,
    window: Window,
    /// A group that was read last: file, offset, its first record.
    cursor: Option<(u32, u32, u64)>,
}

impl Reader {
    pub(super) fn new(journal: Arc<Journal>, keeper: Arc<Keeper>) -> Reader {
        Reader {
            journal,
            keeper,
            window: Window::default(),
            cursor: None,
        }
    }

    /// The journal's number.
    pub fn shard(&self) -> u16 {
        self.journal.shard
    }

    /// Tells this journal from one of the same number that began anew.
    pub fn identity(&self) -> u64 {
        super::identity(&self.journal.id)
    }

    pub fn state(&self) -> &Arc<State> {
        &self.journal.state
    }

    /// The last record that can be read.
    pub fn committed(&self) -> u64 {
        self.journal.state.committed_seq()
    }

    /// Appends payloads to `bytes`, and for each its sequence number and range to `records`: those of the `wanted` numbers, until
    /// `bytes_max` is reached, but at least one if there is one. Reads the file: not for a shard's thread. Who goes on
    /// where he stopped reads each block about once.
    ///
    /// # Errors
    /// The disk cannot be read, or has changed what was written.
    pub fn read(
        &mut self,
        wanted: RangeInclusive<u64>,
        bytes_max: usize,
        bytes: &mut Vec<u8>,
        records: &mut Vec<(u64, Range<usize>)>,
    ) -> Result<(), JournalError> {
        let before = bytes.len();
        let (mut wanted, last) = wanted.into_inner();
        while wanted <= last
            && let Some((live, end, last_seq)) = self.segment(wanted)
        {
            let mut at = match self.cursor {
                Some((file, at, first)) if file == live.id && first <= wanted => at,
                _ => BLOCK,
            };
            while at < end {
                give_way();
                let group = self.window.group(&live, at, end)?;
                let (head, group) = group.map_err(|why| live.damaged(u64::from(at), why))?;
                if head.first_seq > last {
                    return Ok(());
                }
                if head.records > 0 {
                    self.cursor = Some((live.id, at, head.first_seq));
                }
                if head.next_seq() > wanted {
                    let first = wanted;
                    for record in Records::new(&head, group).skip_while(|r| r.seq < first) {
                        if record.seq > last {
                            return Ok(());
                        }
                        let taken = bytes.len() - before;
                        if taken > 0 && taken + record.payload.len() > bytes_max {
                            return Ok(());
                        }
                        let from = bytes.len();
                        bytes.extend_from_slice(record.payload);
                        records.push((record.seq, from..bytes.len()));
                        wanted = record.seq + 1;
                    }
                }
                at += head.padded();
            }
            // the last numbers may be in no group, if a repair has dropped them
            wanted = wanted.max(last_seq + 1);
        }
        Ok(())
    }

    /// Everything up to `seq` is in SQL, durably, together with this position.
    pub fn drained(&self, seq: u64) {
        self.journal.drained(seq);
        self.keeper.ring();
    }

    /// `f` is called after each commit, on the committer's thread: it must only pass the word on. The first one given
    /// stays.
    pub fn on_progress(&self, f: impl Fn() + Send + Sync + 'static) {
        self.journal.on_progress(Box::new(f));
    }

    /// The segment with the record `seq` or the next one there is: where its groups end, its last record.
    fn segment(&self, seq: u64) -> Option<(Arc<Live>, u32, u64)> {
        let table = self.journal.table();
        let at = table.segments.partition_point(|s| s.last_seq < seq);
        let segment = table.segments.get(at)?;
        Some((segment.live.clone(), segment.end, segment.last_seq))
    }
}
