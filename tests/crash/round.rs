//! What all clients of one round share: addresses, the clock, and whether the server has been killed.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::blade::DOMAIN;

pub struct Round<'a> {
    /// Client port, no TLS.
    pub address: SocketAddr,
    pub number: u32,
    /// Of the whole run: events are dated from here.
    pub begun: Instant,
    /// Full JIDs by client.
    pub jids: &'a [String],
    /// Local parts by user, and that user's clients.
    pub users: &'a [(String, Vec<usize>)],
    /// Users whom messages are for: those of the whole run.
    pub lasting: usize,
    /// Mean time between two messages of one client.
    pub message_every: Duration,
    /// The server has archives.
    pub archive: bool,
    /// Accounts registered in this round: messages are for them, too.
    pub newcomers: Mutex<Vec<usize>>,
    killed: AtomicBool,
    dead: Mutex<bool>,
    died: Condvar,
}

impl<'a> Round<'a> {
    pub fn new(
        address: SocketAddr,
        number: u32,
        begun: Instant,
        jids: &'a [String],
        users: &'a [(String, Vec<usize>)],
        lasting: usize,
    ) -> Round<'a> {
        Round {
            address,
            number,
            begun,
            jids,
            users,
            lasting,
            message_every: Duration::from_millis(20),
            archive: false,
            newcomers: Mutex::new(Vec::new()),
            killed: AtomicBool::new(false),
            dead: Mutex::new(false),
            died: Condvar::new(),
        }
    }

    pub fn bare_jid(&self, user: usize) -> String {
        format!("{}@{DOMAIN}", self.users[user].0)
    }

    /// The user with this bare or full JID.
    pub fn user(&self, jid: &str) -> Option<usize> {
        let (name, _) = jid.split_once('@')?;
        self.users.iter().position(|(one, _)| one == name)
    }

    /// Said before the server is killed: from now on nobody wonders why a connection ends.
    pub fn announce_kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
    }

    pub fn is_killed(&self) -> bool {
        self.killed.load(Ordering::SeqCst)
    }

    /// The server's process is no more.
    pub fn announce_death(&self) {
        *self.dead.lock().unwrap() = true;
        self.died.notify_all();
    }

    /// Waits for the server's death, `bound` at most; is it dead?
    pub fn await_death(&self, bound: Duration) -> bool {
        let dead = self.dead.lock().unwrap();
        *self
            .died
            .wait_timeout_while(dead, bound, |dead| !*dead)
            .unwrap()
            .0
    }
}
