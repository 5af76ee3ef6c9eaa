//! A disk that forgets: behind the same seam as the real one, all in memory, and every decision from a seed.
//!
//! Between a write and its sync both states are kept. A crash of the machine keeps any subset of what was not synced, in
//! pieces of 4096 or 512 bytes, and of the folder's entries; a crash of the process keeps all. The number of calls until
//! the next crash can be set, so that it comes in the middle of anything.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::{Disk, DiskFile};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// `kill -9`: the page cache lives on.
    Process,
    /// Power: what was not synced is there or not, piece by piece.
    Machine { piece: usize },
    /// Power: nothing that was not synced is there.
    Forgetful,
}

#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

struct State {
    random: Random,
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Not durable: which file has got which name, or none, in order.
    moves: Vec<(usize, Option<String>)>,
    /// Of the files together.
    bytes_max: u64,
    bytes_read: u64,
    calls_left: Option<u64>,
    /// Handles of an earlier life do not work any more.
    life: u64,
    failing: Option<Failing>,
}

/// A call that does not do what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failing {
    Sync,
    Write,
    /// A sync does not end until this is over.
    HeldSync,
}

#[derive(Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Written and not synced: from, to.
    dirty: Vec<(usize, usize)>,
}

struct SimFile {
    disk: SimDisk,
    inode: usize,
    life: u64,
}

impl SimDisk {
    pub fn new(seed: u64) -> SimDisk {
        SimDisk(Arc::new(Mutex::new(State {
            random: Random(seed),
            inodes: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            moves: Vec::new(),
            bytes_max: u64::MAX,
            bytes_read: 0,
            calls_left: None,
            life: 0,
            failing: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // a test that dies by its disk looks at it afterwards
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The machine stops after so many calls from now.
    pub fn crash_after(&self, calls: u64) {
        self.state().calls_left = Some(calls);
    }

    pub fn has_crashed(&self) -> bool {
        self.state().calls_left == Some(0)
    }

    pub fn set_bytes_max(&self, bytes: u64) {
        self.state().bytes_max = bytes;
    }

    /// By all reads so far.
    pub fn bytes_read(&self) -> u64 {
        self.state().bytes_read
    }

    pub fn set_failing(&self, failing: Option<Failing>) {
        self.state().failing = failing;
    }

    /// Ends a life.
    pub fn crash(&self, how: Crash) {
        let state = &mut *self.state();
        state.calls_left = None;
        state.failing = None;
        state.life += 1;
        let State { random, inodes, .. } = state;
        // sometimes nearly all is kept, sometimes nearly nothing
        let (keep, piece) = match how {
            Crash::Process => (random.below(5), 4096),
            Crash::Machine { piece } => (random.below(5), piece),
            Crash::Forgetful => (0, 4096),
        };
        for inode in inodes {
            for (from, to) in &inode.dirty {
                let mut at = *from;
                while at < *to {
                    let end = ((at / piece + 1) * piece).min(*to);
                    if random.below(4) < keep {
                        let length = inode.durable.len().max(end);
                        inode.durable.resize(length, 0);
                        inode.durable[at..end].copy_from_slice(&inode.now[at..end]);
                    }
                    at = end;
                }
            }
        }
        if how == Crash::Process {
            // the kernel goes on: some has been written back meanwhile, the rest is still to be
            return;
        }
        // of each file, its renames up to some point; those of different files are independent of each other
        let mut stuck = BTreeSet::new();
        for (inode, name) in std::mem::take(&mut state.moves) {
            if how == Crash::Forgetful || stuck.contains(&inode) || state.random.one_in(2) {
                stuck.insert(inode);
                continue;
            }
            state.durable_names.retain(|_, at| *at != inode);
            if let Some(name) = name {
                state.durable_names.insert(name, inode);
            }
        }
        state.names = state.durable_names.clone();
        for inode in &mut state.inodes {
            inode.now.clone_from(&inode.durable);
            inode.dirty.clear();
        }
        // files without a name are gone
        let named: Vec<_> = state.names.values().copied().collect();
        for (at, inode) in state.inodes.iter_mut().enumerate() {
            if !named.contains(&at) {
                *inode = Inode::default();
            }
        }
    }

    /// The bytes of a file, to look at or to damage durably.
    pub fn edit<T>(&self, name: &str, f: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let mut state = self.state();
        let at = state.names[name];
        let inode = &mut state.inodes[at];
        let result = f(&mut inode.now);
        inode.durable = inode.now.clone();
        result
    }

    /// A durable file of these bytes.
    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.state();
        let inode = Inode {
            durable: bytes.clone(),
            now: bytes,
            dirty: Vec::new(),
        };
        state.inodes.push(inode);
        let at = state.inodes.len() - 1;
        state.names.insert(name.into(), at);
        state.durable_names.insert(name.into(), at);
    }
}

impl State {
    /// Counts a call that changes something; an error when the machine has stopped.
    fn call(&mut self, life: u64) -> io::Result<()> {
        self.runs(life)?;
        if let Some(left) = &mut self.calls_left {
            *left -= 1;
        }
        self.runs(life)
    }

    fn runs(&self, life: u64) -> io::Result<()> {
        match life == self.life && self.calls_left != Some(0) {
            true => Ok(()),
            false => Err(io::Error::other("the machine has stopped")),
        }
    }

    fn room(&self) -> u64 {
        let used: u64 = self
            .names
            .values()
            .map(|at| self.inodes[*at].now.len() as u64)
            .sum();
        self.bytes_max.saturating_sub(used)
    }
}

impl Disk for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        let state = self.state();
        state.runs(state.life)?;
        Ok(state.names.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.state();
        let life = state.life;
        state.runs(life)?;
        let inode = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile {
            disk: self.clone(),
            inode,
            life,
        }))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.state();
        let life = state.life;
        state.call(life)?;
        assert!(!state.names.contains_key(name), "names are given once");
        state.inodes.push(Inode::default());
        let inode = state.inodes.len() - 1;
        state.names.insert(name.into(), inode);
        state.moves.push((inode, Some(name.into())));
        Ok(Arc::new(SimFile {
            disk: self.clone(),
            inode,
            life,
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        let life = state.life;
        state.call(life)?;
        assert!(
            !state.names.contains_key(to) || from.ends_with(".new"),
            "nothing is replaced"
        );
        let inode = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        if let Some(replaced) = state.names.insert(to.into(), inode) {
            state.moves.push((replaced, None));
        }
        state.moves.push((inode, Some(to.into())));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        let life = state.life;
        state.call(life)?;
        let inode = state.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        state.moves.push((inode, None));
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.state();
        let life = state.life;
        state.call(life)?;
        if state.failing == Some(Failing::Sync) {
            return Err(io::Error::from_raw_os_error(5));
        }
        state.moves.clear();
        state.durable_names = state.names.clone();
        Ok(())
    }

    fn path(&self, name: &str) -> String {
        format!("journal/{name}")
    }

    fn random(&self) -> [u8; 16] {
        let random = &mut self.state().random;
        let (a, b) = (random.next(), random.next());
        (u128::from(a) << 64 | u128::from(b)).to_le_bytes()
    }

    fn die(&self, why: &str) -> ! {
        std::panic::panic_any(format!("died: {why}"))
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = &mut *self.disk.state();
        state.runs(self.life)?;
        let bytes = &state.inodes[self.inode].now;
        let from = (offset as usize).min(bytes.len());
        let mut read = into.len().min(bytes.len() - from);
        if read > 1 && state.random.one_in(8) {
            read = 1 + state.random.below(read as u64 - 1) as usize;
        }
        into[..read].copy_from_slice(&bytes[from..from + read]);
        state.bytes_read += read as u64;
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let state = &mut *self.disk.state();
        if state.failing == Some(Failing::Write) {
            return Err(io::Error::from_raw_os_error(5));
        }
        // the call in which the machine stops still writes something
        let stops = state.calls_left == Some(1) && self.life == state.life;
        let called = state.call(self.life);
        if !stops {
            called?;
        }
        let mut length = bytes.len();
        if length > 1 && (stops || state.random.one_in(8)) {
            length = 1 + state.random.below(length as u64 - 1) as usize;
        }
        let (from, to) = (offset as usize, offset as usize + length);
        let room = state.room();
        let inode = &mut state.inodes[self.inode];
        if to.saturating_sub(inode.now.len()) as u64 > room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        inode.now.resize(inode.now.len().max(to), 0);
        inode.now[from..to].copy_from_slice(&bytes[..length]);
        inode.dirty.push((from, to));
        match stops {
            true => Err(io::Error::other("the machine has stopped")),
            false => Ok(length),
        }
    }

    fn datasync(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        while state.failing == Some(Failing::HeldSync) {
            drop(state);
            std::thread::yield_now();
            state = self.disk.state();
        }
        state.call(self.life)?;
        if state.failing == Some(Failing::Sync) {
            return Err(io::Error::from_raw_os_error(5));
        }
        let inode = &mut state.inodes[self.inode];
        inode.durable.resize(inode.now.len(), 0);
        for (from, to) in std::mem::take(&mut inode.dirty) {
            inode.durable[from..to].copy_from_slice(&inode.now[from..to]);
        }
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        let state = self.disk.state();
        state.runs(self.life)?;
        Ok(state.inodes[self.inode].now.len() as u64)
    }
}
