//! The server that is killed: a blade with its database and Redis, or another one by commands.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::blade::{Blade, READY_WITHIN};
use crate::client::PLAIN;
use crate::mariadb::Mariadb;
use crate::redis::Redis;

/// Where the blade keeps its permanent data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Database {
    Sqlite,
    /// A MariaDB of its own.
    Mysql,
}

impl Database {
    pub fn name(self) -> &'static str {
        match self {
            Database::Sqlite => "sqlite",
            Database::Mysql => "mysql",
        }
    }
}

pub enum Server {
    /// The tiers behind it outlive its kills.
    Nitro {
        blade: Box<Blade>,
        _mariadb: Option<Mariadb>,
        _redis: Vec<Redis>,
    },
    External {
        address: SocketAddr,
        kill: String,
        start: String,
    },
}

impl Server {
    pub fn nitro(database: Database, redis: usize, settings: &[String]) -> Server {
        let mut all: Vec<(String, String)> = PLAIN
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        // What is full refuses, and is another test's matter; a name that is tried with two passwords is not held back.
        for (key, value) in [
            ("limits.offline_messages_max", "1000000"),
            ("limits.offline_bytes_max", "1073741824"),
            ("limits.auth_failure_delay_ms", "0"),
        ] {
            all.push((key.to_owned(), value.to_owned()));
        }
        let mariadb = (database == Database::Mysql).then(|| {
            Mariadb::start().expect("MariaDB is not installed: apt-get install mariadb-server")
        });
        if let Some(mariadb) = &mariadb {
            all.push(("database".to_owned(), format!("\"{}\"", mariadb.url())));
        }
        let redis: Vec<Redis> = (0..redis)
            .map(|_| Redis::start().expect("Redis is not installed: apt-get install redis-server"))
            .collect();
        if !redis.is_empty() {
            let urls: Vec<String> = redis
                .iter()
                .map(|one| format!("\"{}\"", one.url()))
                .collect();
            all.push((
                "redis.instances".to_owned(),
                format!("[{}]", urls.join(", ")),
            ));
        }
        for setting in settings {
            let (key, value) = setting.split_once('=').expect("--set wants KEY=VALUE");
            all.push((key.to_owned(), value.to_owned()));
        }
        let all: Vec<(&str, &str)> = all.iter().map(|(key, value)| (&**key, &**value)).collect();
        Server::Nitro {
            blade: Box::new(Blade::start(&all)),
            _mariadb: mariadb,
            _redis: redis,
        }
    }

    /// A server that these shell commands kill and start; started here.
    pub fn external(address: SocketAddr, kill: &str, start: &str) -> Server {
        let mut server = Server::External {
            address,
            kill: kill.to_owned(),
            start: start.to_owned(),
        };
        server.restart();
        server
    }

    pub fn address(&self) -> SocketAddr {
        match self {
            Server::Nitro { blade, .. } => blade.c2s,
            Server::External { address, .. } => *address,
        }
    }

    /// `kill -9`, or, `gently`, SIGTERM; how the process had ended before, if it had.
    pub fn kill(&mut self, gently: bool) -> Option<String> {
        match self {
            Server::Nitro { blade, .. } if gently => {
                let status = blade.terminate();
                (!status.success()).then(|| status.to_string())
            }
            Server::Nitro { blade, .. } => {
                let status = blade.kill();
                (status.signal() != Some(libc::SIGKILL)).then(|| status.to_string())
            }
            Server::External { kill, .. } => {
                shell(kill);
                None
            }
        }
    }

    /// Starts it and kills it after this time, whatever it does then: most likely it reads what the last kill left.
    pub fn start_and_kill(&mut self, after: Duration) {
        if let Server::Nitro { blade, .. } = self {
            blade.launch();
            std::thread::sleep(after); // the random instant itself: nothing is waited for
            blade.kill();
        }
    }

    /// From the next start on it has these cores; whatever the number was, it finds what was accepted before.
    pub fn use_cores(&mut self, cores: &str) {
        if let Server::Nitro { blade, .. } = self {
            blade.set("cores", &format!("\"{cores}\""));
        }
    }

    /// On the same data; returns when it serves.
    pub fn restart(&mut self) {
        match self {
            Server::Nitro { blade, .. } => blade.restart(),
            Server::External { address, start, .. } => {
                shell(start);
                let deadline = Instant::now() + READY_WITHIN;
                while TcpStream::connect_timeout(address, READY_WITHIN).is_err() {
                    assert!(Instant::now() < deadline, "nobody listens on {address}");
                    std::thread::sleep(Duration::from_millis(10)); // the poll's interval; the bound is the deadline
                }
            }
        }
    }

    /// Whether data and log stay where they are when all is over, a panic included; the folder.
    pub fn keep(&mut self, keep: bool) -> PathBuf {
        match self {
            Server::Nitro { blade, .. } => {
                blade.keep(keep);
                blade.folder().to_owned()
            }
            Server::External { .. } => PathBuf::new(),
        }
    }

    pub fn log(&self) -> String {
        match self {
            Server::Nitro { blade, .. } => blade.log(),
            Server::External { .. } => String::new(),
        }
    }
}

fn shell(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "{command} failed"
    );
}
