//! Uploaded files at this shard (XEP-0363): what the slice asks of the folder, and the bodies that come and go by HTTP.
//!
//! In: questions of the slice, requests of the HTTP door. Out: slots that are answered, files. Whatever touches the folder
//! ([`crate::store::upload`]) runs on threads of the whole blade ([`Files`]), so a slow disk holds up files and nothing else; a shard gives
//! them one piece of a body at a time and reads or sends the next one when that is done. So a transfer has one piece in memory, whatever
//! the file's size, and a client that is too fast for the disk is not read.
//!
//! Slots have a queue and a thread of their own: who asks for many holds up no transfer. Removed accounts are written down there, of each
//! shard one at a time. A transfer whose piece finds the queue
//! full waits for room.

mod answer;
mod serve;

use std::any::Any;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Weak};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fnv::FnvHashMap;

use crate::config::Config;
use crate::observe::Gauges;
use crate::rt::{self, InboxSender, slot};
use crate::store::upload::{Bounds, Folder, Owner, Refused, Writing};
use crate::xmpp::feature::upload::{Ask, Limits};
use crate::xmpp::slice::Slice;

use super::doors::network;
use super::{Inbound, Shard, unix};

pub(super) use serve::serve;

/// Pieces that are written or read at once.
pub const PIECE_BYTES: usize = 128 << 10;
/// Answers that a shard does not take in time are forgotten: it stops.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two pieces of what is removed.
const CLEAR_PAUSE: Duration = Duration::from_millis(20);
/// How often, and in which distance, a piece looks for room in the queue: ten seconds.
const ROOM_TRIES: u32 = 500;
const ROOM_PAUSE: Duration = Duration::from_millis(20);
/// How often files that are too old are removed.
const SWEEP: Duration = Duration::from_secs(3600);

type Outcome = Box<dyn Any + Send>;
type Work = Box<dyn FnOnce(&Folder) -> Done + Send>;
/// Work, and who is told of its outcome.
type Waiting = (InboxSender<Inbound>, Work);

/// What a thread has done for a shard.
pub enum Done {
    /// Of [`Ask::ticket`].
    Slot(u64, Result<(), Refused>),
    /// By a number of [`Shard::upload_waits`].
    Piece(u64, Outcome),
    Discarded,
    /// It is written down that an account was removed.
    Forgotten,
}

/// The threads, and what waits for them.
#[derive(Clone)]
pub struct Files {
    /// Pieces of transfers.
    queue: SyncSender<Waiting>,
    /// Slots, and whatever else the slice asks for.
    slots: SyncSender<Waiting>,
    /// Wakes who removes what removed accounts have left.
    gone: SyncSender<()>,
    folder: Arc<Folder>,
    transfers: Arc<Transfers>,
}

impl Files {
    /// An error is a sentence for the operator.
    pub fn start(config: &Config) -> Result<Files, String> {
        let dir = config.upload_dir();
        let folder = Folder::open(&dir, bounds(config)).map_err(|error| {
            format!(
                "upload.dir: {}: {error}; make the folder writable",
                dir.display()
            )
        })?;
        let folder = Arc::new(folder);
        let waiting_max = config.upload.waiting_max;
        let (queue, pieces) = mpsc::sync_channel(waiting_max);
        let pieces = Arc::new(Mutex::new(pieces));
        for n in 0..config.upload.threads {
            work(&format!("files-{n}"), pieces.clone(), folder.clone())?;
        }
        let (slots, asked) = mpsc::sync_channel(waiting_max);
        work("files-slots", Arc::new(Mutex::new(asked)), folder.clone())?;
        let sweeping = Arc::downgrade(&folder);
        let (gone, told) = mpsc::sync_channel(1);
        spawn("files-sweep", move || {
            rt::step_back(NICE);
            sweep_forever(&sweeping, &told);
        })?;
        Ok(Files {
            queue,
            slots,
            gone,
            folder,
            transfers: Arc::default(),
        })
    }

    pub fn configure(&self, config: &Config) {
        self.folder.configure(bounds(config));
    }

    /// For the metrics.
    pub fn tell(&self, gauges: &Gauges) {
        gauges.upload_bytes.store(self.folder.bytes(), Relaxed);
        gauges
            .upload_transfers
            .store(self.transfers.count.load(Relaxed), Relaxed);
    }

    /// Work for a transfer; given back when too much waits.
    fn submit(&self, inbox: InboxSender<Inbound>, work: Work) -> Result<(), Work> {
        match self.queue.try_send((inbox, work)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full((_, work)) | TrySendError::Disconnected((_, work))) => Err(work),
        }
    }

    /// Work that a slice has asked for; `false`: too much waits.
    fn ask(&self, inbox: InboxSender<Inbound>, work: Work) -> bool {
        self.slots.try_send((inbox, work)).is_ok()
    }
}

/// Removes what is old now and then, and what removed accounts have left as soon as that is told.
fn sweep_forever(sweeping: &Weak<Folder>, told: &Receiver<()>) {
    while let Some(folder) = sweeping.upgrade() {
        clear(&folder);
        match folder.sweep(unix()) {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "old uploads were removed"),
            Err(error) => tracing::error!(%error, "upload.dir: old files cannot be removed"),
        }
        drop(folder);
        let next = Instant::now() + SWEEP;
        loop {
            match told.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let Some(folder) = sweeping.upgrade() else {
                return;
            };
            clear(&folder);
        }
    }
}

/// Piece by piece, so that transfers have the disk in between.
fn clear(folder: &Folder) {
    let mut all = 0;
    loop {
        match folder.clear(unix()) {
            Ok(0) => break,
            Ok(removed) => all += removed,
            Err(error) => {
                tracing::error!(%error, "upload.dir: files of removed accounts cannot be removed");
                break;
            }
        }
        std::thread::sleep(CLEAR_PAUSE);
    }
    if all > 0 {
        tracing::info!(removed = all, "uploads of removed accounts were removed");
    }
}

/// A thread that does one thing after the other until all senders have gone.
fn work(
    name: &str,
    queue: Arc<Mutex<Receiver<Waiting>>>,
    folder: Arc<Folder>,
) -> Result<(), String> {
    let run = move || {
        rt::step_back(NICE);
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((inbox, work)) = next else { return };
            let done = work(&folder);
            let _ = inbox.send(Inbound::Uploaded(done), PATIENCE);
        }
    };
    spawn(name, run)
}

/// Behind live traffic.
const NICE: i32 = 5;

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    match thread.spawn(run) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("the thread {name} cannot be started: {error}")),
    }
}

fn bounds(config: &Config) -> Bounds {
    let u = &config.upload;
    Bounds {
        day_bytes_max: u.user_bytes_per_day_max,
        user_bytes_max: u.user_bytes_max,
        user_files_max: u.user_files_max,
        bytes_max: u.bytes_max,
        // switched off: only what removed accounts have left goes
        keep_seconds: match config.upload_host() {
            Some(_) => u.keep_days * 86_400,
            None => 0,
        },
        slot_seconds: u.slot_seconds,
    }
}

/// The slice's part of the configuration.
pub fn limits(config: &Config) -> Limits {
    let u = &config.upload;
    Limits {
        url: config.upload_url().into(),
        file_bytes_max: u.file_bytes_max,
        slot_seconds: u.slot_seconds,
        waiting_max: u.waiting_max,
        user_waiting_max: u.user_waiting_max,
    }
}

/// Transfers at work, of all shards and by address. Locked when one begins and ends, as the tables of [`super::doors`] are.
#[derive(Default)]
struct Transfers {
    count: AtomicU64,
    by_address: Mutex<FnvHashMap<IpAddr, usize>>,
}

/// One of the transfers that may be at once; gives its place back.
struct Place {
    transfers: Arc<Transfers>,
    address: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.transfers.count.fetch_sub(1, Relaxed);
        let Some(address) = self.address else { return };
        let mut table = self.transfers.lock();
        if let Some(count) = table.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                table.remove(&address);
            }
        }
    }
}

impl Transfers {
    fn lock(&self) -> MutexGuard<'_, FnvHashMap<IpAddr, usize>> {
        let table = self.by_address.lock();
        table.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Files {
    /// `None`: as many transfers as may be are there, all together or of this address.
    fn place(&self, config: &Config, address: IpAddr) -> Option<Place> {
        let u = &config.upload;
        let mut place = Place {
            transfers: self.transfers.clone(),
            address: None,
        };
        let before = self.transfers.count.fetch_add(1, Relaxed);
        if before >= u.transfers_max as u64 {
            return None;
        }
        if !config.is_exempt(address) {
            let address = network(address);
            let mut table = self.transfers.lock();
            let count = table.entry(address).or_default();
            if *count >= u.transfers_per_address_max {
                return None;
            }
            *count += 1;
            place.address = Some(address);
        }
        Some(place)
    }

    /// Removes what is not whole.
    fn discard(&self, inbox: InboxSender<Inbound>, writing: Writing) {
        let work: Work = Box::new(move |_| {
            drop(writing);
            Done::Discarded
        });
        // if too much waits it is removed here
        let _ = self.submit(inbox, work);
    }
}

impl Files {
    /// An account was removed.
    fn forgets(&self, owner: Owner, at: u64) -> Work {
        let gone = self.gone.clone();
        Box::new(move |folder| {
            if let Err(error) = folder.forget(owner, at) {
                tracing::error!(%error, "upload.dir: it cannot be written down that an account was removed");
            }
            // full: told already
            let _ = gone.try_send(());
            Done::Forgotten
        })
    }

    /// The same, at once: at the start, of what the journals tell.
    pub fn forget(&self, owner: Owner, at: u64) {
        self.forgets(owner, at)(&self.folder);
    }
}

impl Shard {
    /// What the slice has asked of the folder.
    pub(super) fn ask_for_slots(&self, slice: &mut Slice) {
        if let Some(files) = &self.files {
            // one at a time: whoever asks for a slot does not wait behind all of them
            if !self.upload_forgets.get()
                && let Some(&(owner, at)) = slice.fx.uploads_gone.last()
                && files.ask(self.own_inbox.clone(), files.forgets(owner, at))
            {
                slice.fx.uploads_gone.pop();
                self.upload_forgets.set(true);
            }
        }
        for ask in std::mem::take(&mut slice.fx.slots) {
            let Ask {
                ticket,
                owner,
                entry,
            } = ask;
            let now = slice.now.unix;
            let work: Work =
                Box::new(move |folder| Done::Slot(ticket, folder.reserve(owner, &entry, now)));
            let files = self.files.as_ref();
            let asked = files.is_some_and(|files| files.ask(self.own_inbox.clone(), work));
            if !asked {
                slice.slot_reserved(ticket, None);
            }
        }
    }

    pub(super) fn uploaded(&self, done: Done) {
        match done {
            Done::Slot(ticket, answer) => {
                self.slice.borrow_mut().slot_reserved(ticket, Some(answer));
            }
            Done::Discarded => {}
            Done::Forgotten => self.upload_forgets.set(false),
            Done::Piece(number, outcome) => {
                let waiting = self.upload_waits.borrow_mut().remove(&number);
                if let Some(waiting) = waiting {
                    waiting.set(outcome);
                }
            }
        }
    }

    /// Does something with the folder elsewhere, and waits for it; `None`: too much waits, and there was no room for a while.
    async fn with_folder<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folder) -> T + Send + 'static,
    ) -> Option<T> {
        let files = self.files.as_ref()?;
        let number = self.upload_number.get();
        self.upload_number.set(number + 1);
        let (setter, outcome) = slot::<Outcome>();
        let mut work: Work = Box::new(move |folder| Done::Piece(number, Box::new(work(folder))));
        let mut tries = 0;
        while let Err(back) = files.submit(self.own_inbox.clone(), work) {
            if tries == ROOM_TRIES {
                return None;
            }
            tries += 1;
            work = back;
            rt::sleep(ROOM_PAUSE).await;
        }
        self.upload_waits.borrow_mut().insert(number, setter);
        let _forgotten = Forgotten {
            shard: self,
            number,
        };
        outcome
            .take()
            .await?
            .downcast()
            .ok()
            .map(|outcome| *outcome)
    }
}

/// Who has stopped waiting does not leave his number behind.
struct Forgotten<'a> {
    shard: &'a Shard,
    number: u64,
}

impl Drop for Forgotten<'_> {
    fn drop(&mut self) {
        self.shard.upload_waits.borrow_mut().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::upload::Entry;

    #[test]
    fn slots_are_answered_while_the_disk_holds_up_all_transfers() {
        let dir = tempfile::tempdir().unwrap();
        let sets = [
            format!("data_dir='{}'", dir.path().display()),
            "upload.waiting_max=16".to_owned(),
            "upload.threads=1".to_owned(),
        ];
        let files = Files::start(&Config::load(None, &sets).unwrap()).unwrap();
        let (sender, inbox) = rt::inbox::<Inbound>(64).unwrap();
        let nothing = || -> Work { Box::new(|_| Done::Discarded) };
        let (_go, wait) = mpsc::channel::<()>();
        let slow: Work = Box::new(move |_| {
            let _ = wait.recv();
            Done::Discarded
        });
        assert!(files.submit(sender.clone(), slow).is_ok());
        while files.submit(sender.clone(), nothing()).is_ok() {}
        let entry = Entry {
            at: unix(),
            bytes: 10,
            id: [1; 16],
            ending: "png",
        };
        let ask: Work =
            Box::new(move |folder| Done::Slot(7, folder.reserve(Owner([1; 16]), &entry, unix())));
        assert!(files.ask(sender, ask));
        let deadline = Instant::now() + PATIENCE;
        let mut got = Vec::new();
        while !got
            .iter()
            .any(|one| matches!(one, Inbound::Uploaded(Done::Slot(7, Ok(())))))
        {
            assert!(Instant::now() < deadline, "no answer");
            inbox.drain(&mut got);
            std::thread::yield_now();
        }
    }
}
