//! The Redis ring of a real blade: real redis-servers on unix sockets, with all that can happen to them.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;
#[path = "servers/redis.rs"]
mod redis;

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use blade::{Blade, DOMAIN};
use client::{Client, PASSWORD, authenticated, wait_until};
use redis::Redis;

/// How long anything may take that is waited for.
const WITHIN: Duration = Duration::from_secs(30);

/// A blade and its instances.
struct House {
    blade: Blade,
    redis: Vec<Redis>,
}

impl House {
    fn new(instances: usize, settings: &[(&str, &str)]) -> House {
        House::with(
            (0..instances).map(|_| Redis::start().expect(NO_REDIS)).collect(),
            settings,
        )
    }

    fn with(redis: Vec<Redis>, settings: &[(&str, &str)]) -> House {
        let urls: Vec<String> = redis.iter().map(|one| format!("{:?}", one.url())).collect();
        let urls = format!("[{}]", urls.join(", "));
        let own = [
            ("redis.instances", &*urls),
            ("redis.pause_ms_max", "200"),
            ("limits.auth_failure_delay_ms", "0"),
        ];
        let blade = client::blade(&[&own[..], settings].concat());
        let house = House { blade, redis };
        house.wait_in_use();
        house
    }

    /// Every shard uses every instance.
    fn wait_in_use(&self) {
        wait_until("the instances are in use", WITHIN, || {
            let states = self.figures("nitro_redis_state");
            !states.is_empty() && states.iter().all(|state| *state == 1)
        });
    }

    /// Import through the running blade: `prefix0`, `prefix1` … with the usual password.
    fn import(&self, prefix: &str, count: usize, contacts: usize) {
        let accounts = self.blade.folder().join("accounts.csv");
        let rosters = self.blade.folder().join("rosters.csv");
        let rows: String = (0..count).map(|n| format!("{prefix}{n},{PASSWORD}\n")).collect();
        fs::write(&accounts, format!("username,password\n{rows}")).unwrap();
        let rows: String = (0..count)
            .flat_map(|one| (1..=contacts).map(move |other| (one, (one + other) % count)))
            .map(|(one, other)| format!("{prefix}{one},{prefix}{other}\n"))
            .collect();
        fs::write(&rosters, format!("username,contact\n{rows}")).unwrap();
        let output = self.blade.nitro(
            &[
                "user",
                "import",
                accounts.to_str().unwrap(),
                "--rosters",
                rosters.to_str().unwrap(),
            ],
            "",
        );
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
    }

    fn figures(&self, name: &str) -> Vec<u64> {
        figures(&self.blade, name)
    }

    fn sum(&self, name: &str) -> u64 {
        self.figures(name).iter().sum()
    }

    /// The ring has answered for everything, and the database has everything.
    fn settle(&self) {
        let (mut last, mut same) = (u64::MAX, 0);
        wait_until("everything is in Redis and in the database", WITHIN, || {
            let now = self.sum("nitro_sql_drained_total");
            same = if now == last { same + 1 } else { 0 };
            last = now;
            std::thread::sleep(Duration::from_millis(50)); // between two looks
            // the drain rests for half a second at most
            same >= 30 && self.sum("nitro_redis_waiting") == 0
        });
    }
}

const NO_REDIS: &str = "Redis is not installed: apt-get install redis-server";

fn figures(blade: &Blade, name: &str) -> Vec<u64> {
    let (_, text) = blade.http_get("/metrics").expect("metrics");
    text.lines()
        .filter(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect()
}

/// Logs in as all of them, some at a time.
fn log_in_all(blade: &Blade, prefix: &str, count: usize) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    Client::bind(blade, &format!("{prefix}{n}"), "r");
                }
            });
        }
    });
}

#[test]
fn a_warm_login_after_a_restart_costs_no_statement() {
    const USERS: usize = 1000;
    let mut house = House::new(4, &[]);
    house.import("u", USERS, 3);
    house.settle();
    for kill in [false, true] {
        match kill {
            true => drop(house.blade.kill()),
            false => drop(house.blade.terminate()),
        }
        house.blade.restart();
        house.wait_in_use();
        house.settle();
        let before = house.sum("nitro_sql_statements_total");
        log_in_all(&house.blade, "u", USERS);
        assert_eq!(house.sum("nitro_redis_hits_total"), USERS as u64);
        assert_eq!(house.sum("nitro_sql_loads_total"), 0);
        assert_eq!(house.sum("nitro_sql_statements_total"), before);
    }
}
