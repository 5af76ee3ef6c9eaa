//! Who may connect and register, and how fast somebody who failed may try again.
//!
//! Addresses are counted for the whole blade, so this is the one place that shards share: a connect, a close, a failure or
//! a registration takes its lock for a moment, a stanza never does. Tables whose keys strangers choose use the standard
//! library's seeded hasher and are bounded.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::config::Config;

#[derive(Default)]
pub struct Doors {
    open: AtomicUsize,
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    addresses: HashMap<IpAddr, Count>,
    registrations: HashMap<IpAddr, VecDeque<Instant>>,
    failures: HashMap<Box<str>, Failures>,
    /// Keys of `failures`, oldest first.
    order: VecDeque<Box<str>>,
}

#[derive(Default)]
struct Count {
    connections: usize,
    unauthenticated: usize,
}

struct Failures {
    count: u32,
    last: Instant,
}

/// How often the accounts of one shard log in. Each has so many logins at once as it has a minute, then they come evenly; what
/// is too often is held back, whatever address it comes from, so that nobody else behind that address notices. Only
/// who has proved to be its owner counts: nobody can use up another one's logins.
#[derive(Default)]
pub struct Frequency {
    /// When, in ms of the monotonic clock, an account's logins would be even again. Who is not here is.
    even_ms: HashMap<Box<str>, u64>,
    swept_ms: u64,
}

/// Somebody is held back so long at most; then he is told to come back later.
const HELD_BACK_MS_MAX: u64 = 10_000;

impl Frequency {
    /// An account logs in: how long that is to be held back, or in how many seconds it may try again.
    pub fn login(&mut self, account: &str, now_ms: u64, config: &Config) -> Result<Duration, u64> {
        let storm = &config.storm;
        let pause_ms = 60_000 / storm.account_logins_per_minute.clamp(1, 60_000);
        if self.even_ms.len() >= storm.accounts_remembered_max {
            if now_ms.saturating_sub(self.swept_ms) >= 1000 {
                self.swept_ms = now_ms;
                self.even_ms.retain(|_, even| *even > now_ms);
            }
            // so many are there that log in often: a known one is slowed, a new one is not
            if self.even_ms.len() >= storm.accounts_remembered_max
                && !self.even_ms.contains_key(account)
            {
                return Ok(Duration::ZERO);
            }
        }
        let even = match self.even_ms.get_mut(account) {
            Some(even) => even,
            None => self.even_ms.entry(account.into()).or_insert(0),
        };
        let next = now_ms.max(*even) + pause_ms;
        let wait_ms = next.saturating_sub(now_ms + 60_000);
        if wait_ms > HELD_BACK_MS_MAX {
            return Err(wait_ms.div_ceil(1000));
        }
        *even = next;
        Ok(Duration::from_millis(wait_ms))
    }
}

/// Why a connection is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shut {
    /// `limits.connections_max`
    Blade,
    /// `limits.connections_per_address_max`
    Address,
    /// `limits.unauthenticated_per_address_max`
    Unauthenticated,
    /// `limits.logins_in_progress_max`
    Logins,
}

/// One connection's place; given back when dropped.
pub struct Pass {
    doors: Arc<Doors>,
    /// `None`: exempt from limits per address.
    address: Option<IpAddr>,
    authenticated: bool,
}

/// Failures older than this are forgiven.
const FORGIVEN: Duration = Duration::from_secs(900);

impl Doors {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        // a panic ends the process, so nobody meets a poisoned lock
        self.tables
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A connection comes from `address`; `proxied`: a proxy says so. A proxy's word makes nobody local.
    pub fn enter(
        self: &Arc<Self>,
        address: IpAddr,
        proxied: bool,
        config: &Config,
    ) -> Result<Pass, Shut> {
        let exempt =
            config.is_exempt(address) && !(proxied && address.to_canonical().is_loopback());
        if self.open.fetch_add(1, Ordering::Relaxed) >= config.limits.connections_max {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return Err(Shut::Blade);
        }
        let mut pass = Pass {
            doors: self.clone(),
            address: None,
            authenticated: false,
        };
        if exempt {
            return Ok(pass);
        }
        let key = network(address);
        let mut tables = self.tables();
        let count = tables.addresses.entry(key).or_default();
        if count.connections >= config.limits.connections_per_address_max {
            return Err(Shut::Address);
        }
        if count.unauthenticated >= config.limits.unauthenticated_per_address_max {
            return Err(Shut::Unauthenticated);
        }
        count.connections += 1;
        count.unauthenticated += 1;
        drop(tables);
        pass.address = Some(key);
        Ok(pass)
    }

    /// May this address make one more account now? Counts it.
    pub fn register(&self, address: IpAddr, config: &Config) -> bool {
        if config.is_exempt(address) {
            return true;
        }
        let hour = Duration::from_secs(3600);
        let mut tables = self.tables();
        tables
            .registrations
            .retain(|_, times| times.back().is_some_and(|t| t.elapsed() < hour));
        if tables.registrations.len() >= config.limits.auth_failures_remembered_max {
            return false;
        }
        let times = tables.registrations.entry(network(address)).or_default();
        while times.front().is_some_and(|t| t.elapsed() >= hour) {
            times.pop_front();
        }
        if times.len() >= config.limits.registrations_per_address_per_hour {
            return false;
        }
        times.push_back(Instant::now());
        true
    }

    /// An attempt to authenticate failed: how long its answer is held back. It doubles with each failure of the account
    /// or (unless exempt) the address.
    pub fn failed(&self, address: IpAddr, account: Option<&str>, config: &Config) -> Duration {
        let limits = &config.limits;
        let mut worst = 0;
        let mut tables = self.tables();
        let by_address = (!config.is_exempt(address)).then(|| network(address).to_string());
        for key in by_address.as_deref().into_iter().chain(account) {
            worst = worst.max(tables.count_failure(key, limits.auth_failures_remembered_max));
        }
        delay(worst, limits)
    }

    /// Somebody has named what this server never gave out: how long his answer is held back. Counted apart from passwords, so that
    /// nobody behind the same address logs in more slowly.
    pub fn guessed(&self, address: IpAddr, config: &Config) -> Duration {
        let limits = &config.limits;
        let count = match config.is_exempt(address) {
            true => 1,
            false => {
                let key = format!("guess {}", network(address));
                let mut tables = self.tables();
                tables.count_failure(&key, limits.auth_failures_remembered_max)
            }
        };
        delay(count, limits)
    }

    /// The account's owner has proved himself.
    pub fn succeeded(&self, account: &str) {
        let mut tables = self.tables();
        if !tables.failures.is_empty() {
            tables.failures.remove(account);
        }
    }

    /// Connections of the blade.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

impl Tables {
    fn count_failure(&mut self, key: &str, remembered_max: usize) -> u32 {
        while self.order.len() >= remembered_max
            && let Some(oldest) = self.order.pop_front()
        {
            self.failures.remove(&oldest);
        }
        if let Some(failures) = self.failures.get_mut(key) {
            failures.count = if failures.last.elapsed() > FORGIVEN {
                1
            } else {
                failures.count.saturating_add(1)
            };
            failures.last = Instant::now();
            return failures.count;
        }
        self.order.push_back(key.into());
        self.failures.insert(
            key.into(),
            Failures {
                count: 1,
                last: Instant::now(),
            },
        );
        1
    }
}

impl Pass {
    /// A connection that was used for something else logs in after all: it counts among those that have not yet. An error: as many
    /// as may be are there; it stays what it was.
    pub fn begins_login(&mut self, config: &Config) -> Result<(), Shut> {
        let Some(address) = self.address.filter(|_| self.authenticated) else {
            return Ok(());
        };
        let mut tables = self.doors.tables();
        let count = tables.addresses.entry(address).or_default();
        if count.unauthenticated >= config.limits.unauthenticated_per_address_max {
            return Err(Shut::Unauthenticated);
        }
        count.unauthenticated += 1;
        self.authenticated = false;
        Ok(())
    }

    /// The connection has logged in.
    pub fn authenticated(&mut self) {
        if let Some(address) = self.address
            && !std::mem::replace(&mut self.authenticated, true)
            && let Some(count) = self.doors.tables().addresses.get_mut(&address)
        {
            count.unauthenticated = count.unauthenticated.saturating_sub(1);
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.doors.open.fetch_sub(1, Ordering::Relaxed);
        let Some(address) = self.address else { return };
        let mut tables = self.doors.tables();
        let Some(count) = tables.addresses.get_mut(&address) else {
            return;
        };
        count.connections = count.connections.saturating_sub(1);
        if !self.authenticated {
            count.unauthenticated = count.unauthenticated.saturating_sub(1);
        }
        if count.connections == 0 {
            tables.addresses.remove(&address);
        }
    }
}

/// After so many failures.
fn delay(failures: u32, limits: &crate::config::Limits) -> Duration {
    let doubled = limits
        .auth_failure_delay_ms
        .saturating_mul(1 << failures.saturating_sub(1).min(16));
    Duration::from_millis(
        doubled
            .max(limits.auth_failure_delay_ms)
            .min(limits.auth_failure_delay_ms_max),
    )
}

/// An IPv6 subscriber has a /64 to choose addresses from: it counts as one.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let s = v6.segments();
            IpAddr::V6(Ipv6Addr::new(s[0], s[1], s[2], s[3], 0, 0, 0, 0))
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(sets: &[&str]) -> Config {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Config::load(None, &sets).unwrap()
    }

    #[test]
    fn an_address_has_a_bounded_number_of_connections_and_gives_them_back() {
        let config = config(&["limits.connections_per_address_max=2"]);
        let doors = Arc::new(Doors::default());
        let stranger = "192.0.2.1".parse().unwrap();
        let first = doors.enter(stranger, false, &config).unwrap();
        let _second = doors.enter(stranger, false, &config).unwrap();
        assert_eq!(
            doors.enter(stranger, false, &config).err(),
            Some(Shut::Address)
        );
        drop(first);
        assert!(doors.enter(stranger, false, &config).is_ok());
        assert_eq!(doors.open(), 1);
        let local = "127.0.0.1".parse().unwrap();
        let _claimed = [
            doors.enter(local, true, &config).unwrap(),
            doors.enter(local, true, &config).unwrap(),
        ];
        assert_eq!(doors.enter(local, true, &config).err(), Some(Shut::Address));
        assert!((0..5).all(|_| {
            doors
                .enter("127.0.0.1".parse().unwrap(), false, &config)
                .is_ok()
        }));
    }

    #[test]
    fn those_who_have_logged_in_make_room_for_those_who_have_not() {
        let config = config(&["limits.unauthenticated_per_address_max=1"]);
        let doors = Arc::new(Doors::default());
        let stranger = "192.0.2.1".parse().unwrap();
        let mut first = doors.enter(stranger, false, &config).unwrap();
        assert_eq!(
            doors.enter(stranger, false, &config).err(),
            Some(Shut::Unauthenticated)
        );
        first.authenticated();
        let second = doors.enter(stranger, false, &config).unwrap();
        // what was a request for a page and becomes a login is one
        assert_eq!(first.begins_login(&config), Err(Shut::Unauthenticated));
        drop(second);
        assert_eq!(first.begins_login(&config), Ok(()));
        assert_eq!(
            doors.enter(stranger, false, &config).err(),
            Some(Shut::Unauthenticated)
        );
        first.authenticated();
        assert!(doors.enter(stranger, false, &config).is_ok());
    }

    #[test]
    fn failures_are_held_back_longer_and_longer_up_to_a_bound_and_forgotten_after_success() {
        let config = config(&[
            "limits.auth_failure_delay_ms=100",
            "limits.auth_failure_delay_ms_max=350",
        ]);
        let doors = Doors::default();
        let exempt = "127.0.0.1".parse().unwrap();
        let delays: Vec<u128> = (0..4)
            .map(|_| doors.failed(exempt, Some("alice"), &config).as_millis())
            .collect();
        assert_eq!(delays, [100, 200, 350, 350]);
        doors.succeeded("alice");
        assert_eq!(
            doors.failed(exempt, Some("alice"), &config).as_millis(),
            100
        );
    }

    #[test]
    fn what_is_remembered_of_failures_is_bounded() {
        let config = config(&["limits.auth_failures_remembered_max=100"]);
        let doors = Doors::default();
        for i in 0..1000 {
            doors.failed(
                "127.0.0.1".parse().unwrap(),
                Some(&format!("user{i}")),
                &config,
            );
        }
        assert!(doors.tables().failures.len() <= 100 && doors.tables().order.len() <= 100);
    }

    #[test]
    fn an_account_in_a_loop_is_slowed_then_refused_and_no_other_is() {
        let config = config(&["storm.account_logins_per_minute=60"]);
        let mut frequency = Frequency::default();
        let mut login = |account: &str, now_ms| frequency.login(account, now_ms, &config);
        for _ in 0..60 {
            assert_eq!(login("alice", 0), Ok(Duration::ZERO));
        }
        assert_eq!(login("alice", 0), Ok(Duration::from_secs(1)));
        assert_eq!(login("bob", 0), Ok(Duration::ZERO));
        for seconds in 2..=10 {
            assert_eq!(login("alice", 0), Ok(Duration::from_secs(seconds)));
        }
        // what is refused is not held against it
        assert_eq!((login("alice", 0), login("alice", 0)), (Err(11), Err(11)));
        assert_eq!(login("alice", 80_000), Ok(Duration::ZERO));
    }

    #[test]
    fn what_is_remembered_of_logins_is_bounded() {
        let config = config(&["storm.accounts_remembered_max=100"]);
        let mut frequency = Frequency::default();
        for n in 0..1000 {
            let name = format!("user{n}");
            assert_eq!(frequency.login(&name, n, &config), Ok(Duration::ZERO));
            assert!(frequency.even_ms.len() <= 100);
        }
        // and forgotten when it does not matter any more
        frequency.login("late", 100_000, &config).unwrap();
        assert_eq!(frequency.even_ms.len(), 1);
    }

    #[test]
    fn an_address_registers_a_bounded_number_of_accounts_an_hour() {
        let config = config(&["limits.registrations_per_address_per_hour=2"]);
        let doors = Doors::default();
        let stranger = "2001:db8::1".parse().unwrap();
        let neighbour = "2001:db8::2".parse().unwrap();
        assert!(doors.register(stranger, &config) && doors.register(neighbour, &config));
        assert!(!doors.register(stranger, &config));
        assert!(doors.register("192.0.2.1".parse().unwrap(), &config));
    }
}
