//! Random faults, seeded, against an owner as simple as can be: nobody ever reads what is older than what SQL may have.
//!
//! The owner keeps the order of a write: journal (here: `waiting`, which survives a crash), cache (so it asks nobody
//! about a user with a write that waits), ring, and SQL once the ring has answered. The whole check is [`Owner::take`].
//! What interleaves is the real thing: several servers, sockets, kernel, clock; so a seed repeats the steps, not the
//! timing. `NITRO_SIM_SECONDS=600 cargo test --lib redis::tests::model` goes on with more seeds.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::{Config, Event, Keep};
use super::driver::{Driver, config};
use super::server::Server;

const NAMES: usize = 10;
const STEPS: usize = 500;

#[test]
fn no_reader_ever_gets_less_than_what_was_confirmed() {
    let seconds = std::env::var("NITRO_SIM_SECONDS").map_or(0, |text| text.parse().unwrap());
    let (start, mut total) = (Instant::now(), Seen::default());
    for seed in 1.. {
        run(seed, &mut total);
        if seed >= 4 && start.elapsed() >= Duration::from_secs(seconds) {
            println!("{seed} seeds: {total:?}");
            break;
        }
    }
    // It proves nothing if nothing happens.
    assert!(total.loaded > 100 && total.missed_stores > 50 && total.renewals > 20);
}

/// What happened, over all seeds.
#[derive(Debug, Default)]
struct Seen {
    loaded: u64,
    missed: u64,
    unavailable: u64,
    stored: u64,
    missed_stores: u64,
    renewals: u64,
}

struct Owner<'a> {
    /// The last revision that was accepted, by name.
    accepted: BTreeMap<String, u64>,
    /// Not in SQL yet: the newest revision.
    waiting: BTreeMap<String, u64>,
    sql: BTreeMap<String, u64>,
    /// To be given to the ring, in order.
    to_store: VecDeque<(String, u64)>,
    /// What each load under way must bring at least, by name.
    loads: BTreeMap<String, VecDeque<u64>>,
    seen: &'a mut Seen,
}

fn run(seed: u64, seen: &mut Seen) {
    let mut dice = Dice(seed);
    let folder = tempfile::tempdir().unwrap();
    let mut servers = [Server::start(), Server::start()];
    let addresses = servers.each_ref().map(Server::address);
    let mut stopped = [false; 2];
    let mut driver = blade(folder.path(), &addresses, &mut dice);
    let mut owner = Owner {
        accepted: BTreeMap::new(),
        waiting: BTreeMap::new(),
        sql: BTreeMap::new(),
        to_store: VecDeque::new(),
        loads: BTreeMap::new(),
        seen,
    };
    for step in 0..STEPS {
        let at = dice.below(2);
        if dice.below(12) == 0 {
            // Whoever talks to a server that hangs, hangs.
            if stopped[at] {
                servers[at].go_on();
                stopped[at] = false;
            } else {
                stopped[at] = fault(&mut servers[at], &mut dice);
            }
        }
        if dice.below(60) == 0 {
            // kill -9 of the blade, and perhaps another configuration at the next start.
            drop(driver);
            driver = blade(folder.path(), &addresses, &mut dice);
            owner.replay();
        }
        for _ in 0..dice.below(6) {
            let name = format!("user{}", dice.below(NAMES));
            match dice.below(3) {
                0 => owner.write(&name),
                _ => owner.read(&name, &mut driver),
            }
        }
        driver.renews = dice.below(4) > 0;
        owner.store(&mut driver);
        driver.turn(Duration::from_micros(dice.below(4000) as u64));
        owner.take(&mut driver, &format!("seed {seed}, step {step}"));
    }
    // When all is well again, all is answered.
    driver.renews = true;
    for (server, stopped) in servers.iter().zip(stopped) {
        if stopped {
            server.go_on();
        }
        server.ask(&["CONFIG", "SET", "maxmemory", "0"]);
    }
    driver.until("everything is answered", |driver| {
        owner.store(driver);
        owner.take(driver, &format!("seed {seed}, at the end"));
        owner.waiting.is_empty() && owner.loads.values().all(VecDeque::is_empty)
    });
}

/// A blade's start, on one of several rings.
fn blade(folder: &Path, addresses: &[String; 2], dice: &mut Dice) -> Driver {
    let heavier = format!("{}?weight=3", addresses[1]);
    let ring: &[&str] = match dice.below(5) {
        0 => &[&addresses[0]],
        1 => &[&addresses[0], &heavier],
        _ => &[&addresses[0], &addresses[1]],
    };
    let config = Config {
        timeout_ms: 25,
        connect_timeout_ms: 25,
        pause_ms_min: 1,
        pause_ms_max: 8,
        in_flight_max: 20,
        ..config()
    };
    Driver::new(config, folder, ring.iter().copied())
}

/// Something happens to a server; true if it hangs now.
fn fault(server: &mut Server, dice: &mut Dice) -> bool {
    match dice.below(11) {
        0 => {
            server.kill();
            server.restart();
        }
        1 => {
            server.kill();
            server.restart_empty();
        }
        2 | 3 => {
            server.ask(&["SAVE"]);
        }
        4 => {
            server.ask(&["FLUSHALL"]);
        }
        5 => {
            server.ask(&["CONFIG", "SET", "maxmemory", "1"]);
        }
        6 => {
            server.ask(&["CONFIG", "SET", "maxmemory", "0"]);
        }
        7 => {
            server.ask(&["SCRIPT", "FLUSH"]);
        }
        8 => {
            server.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        }
        9 => {
            // Evicted.
            for (key, _) in server.users() {
                if dice.below(2) == 0 {
                    server.ask(&["DEL", &key]);
                }
            }
        }
        _ => {
            server.stop();
            return true;
        }
    }
    false
}

impl Owner<'_> {
    fn write(&mut self, name: &str) {
        let revision = self.accepted.get(name).map_or(1, |revision| revision + 1);
        self.accepted.insert(name.into(), revision);
        self.waiting.insert(name.into(), revision);
        self.to_store.push_back((name.into(), revision));
    }

    fn read(&mut self, name: &str, driver: &mut Driver) {
        if self.waiting.contains_key(name) {
            return;
        }
        let least = self.sql.get(name).copied().unwrap_or(0);
        self.loads.entry(name.into()).or_default().push_back(least);
        let now_us = driver.now_us();
        driver.tier.load(name, now_us);
    }

    /// In order, as far as the ring takes them.
    fn store(&mut self, driver: &mut Driver) {
        for _ in 0..self.to_store.len() {
            let (name, revision) = self.to_store.pop_front().unwrap();
            let (value, now_us) = (value(&name, revision), driver.now_us());
            let taken = driver
                .tier
                .store(&name, revision, &value, Keep::Long, now_us);
            if taken.is_err() {
                self.to_store.push_back((name, revision));
            }
        }
    }

    fn take(&mut self, driver: &mut Driver, when: &str) {
        while let Some(event) = driver.events.pop_front() {
            match event {
                Event::Loaded {
                    name,
                    revision,
                    value: got,
                } => {
                    let least = self.asked(&name);
                    let most = self.accepted.get(&*name).copied().unwrap_or(0);
                    assert!(
                        (least..=most).contains(&revision) && got == value(&name, revision),
                        "{when}: {name} has revision {revision}, confirmed is {least}"
                    );
                    self.seen.loaded += 1;
                }
                Event::Missed { name } => {
                    self.asked(&name);
                    self.seen.missed += 1;
                    if !self.waiting.contains_key(&*name) {
                        let revision = self.sql.get(&*name).copied().unwrap_or(0);
                        let (value, now_us) = (value(&name, revision), driver.now_us());
                        driver
                            .tier
                            .offer(&name, revision, &value, Keep::Long, now_us);
                    }
                }
                Event::Unavailable { name } => {
                    self.asked(&name);
                    self.seen.unavailable += 1;
                }
                Event::Stored { name, revision } => {
                    self.seen.stored += 1;
                    self.drain(&name, revision);
                }
                Event::StoreMissed { name, revision, .. } => {
                    self.seen.missed_stores += 1;
                    self.drain(&name, revision);
                }
                other => panic!("{other:?}"),
            }
        }
        self.seen.renewals += std::mem::take(&mut driver.renewed);
    }

    fn asked(&mut self, name: &str) -> u64 {
        let loads = self.loads.get_mut(name).and_then(VecDeque::pop_front);
        loads.expect("each load is answered once")
    }

    fn drain(&mut self, name: &str, revision: u64) {
        let sql = self.sql.entry(name.into()).or_default();
        *sql = revision.max(*sql);
        if self.waiting.get(name) == Some(&revision) {
            self.waiting.remove(name);
        }
    }

    /// After a crash the journal gives back what was not drained.
    fn replay(&mut self) {
        self.loads.clear();
        let waiting = self.waiting.iter();
        self.to_store = waiting.map(|(name, at)| (name.clone(), *at)).collect();
    }
}

fn value(name: &str, revision: u64) -> Vec<u8> {
    format!("{name} {revision}").into_bytes()
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}
