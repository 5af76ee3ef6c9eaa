//! A redis-server process that can be hurt.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use redis::Value;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

pub struct Server {
    folder: TempDir,
    options: Vec<String>,
    process: Option<Process>,
}

/// Ends with its owner.
pub struct Process(Child);

/// For whatever a test waits for on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

impl Server {
    pub fn start() -> Server {
        Server::start_with(&[])
    }

    pub fn start_with(options: &[&str]) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let options: Vec<_> = options.iter().map(|option| option.to_string()).collect();
        let process = Some(spawn(folder.path(), &options));
        let server = Server {
            folder,
            options,
            process,
        };
        server.wait_until_it_answers();
        server
    }

    pub fn socket(&self) -> PathBuf {
        socket(self.folder.path())
    }

    pub fn address(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    pub fn dump(&self) -> PathBuf {
        self.folder.path().join("dump.rdb")
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// After a kill: with the dump that lies there, if any. Does not wait until it has read it.
    pub fn begin_again(&mut self, options: &[&str]) {
        let more = options.iter().map(|option| option.to_string());
        let options: Vec<_> = self.options.iter().cloned().chain(more).collect();
        self.process = Some(spawn(self.folder.path(), &options));
    }

    pub fn restart(&mut self) {
        self.begin_again(&[]);
        self.wait_until_it_answers();
    }

    /// With nothing in it.
    pub fn restart_empty(&mut self) {
        let _ = std::fs::remove_file(self.dump());
        self.restart();
    }

    /// Gives the process away, so that another one may answer at its path.
    pub fn leave(&mut self) -> Process {
        self.process.take().expect("it runs")
    }

    pub fn take_back(&mut self, process: Process) {
        self.process = Some(process);
    }

    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// One command over a connection of its own, as the default user.
    pub fn ask(&self, command: &[&str]) -> Value {
        self.try_ask(command).expect("the server answers")
    }

    /// All keys of users, and what they hold.
    pub fn users(&self) -> Vec<(String, Vec<u8>)> {
        let Value::Array(keys) = self.ask(&["KEYS", "*:u:*"]) else {
            panic!("KEYS gives an array");
        };
        let keys = keys.into_iter().map(|key| match key {
            Value::BulkString(key) => String::from_utf8(key).unwrap(),
            other => panic!("{other:?}"),
        });
        keys.filter_map(|key| match self.ask(&["GET", &key]) {
            Value::BulkString(value) => Some((key, value)),
            _ => None,
        })
        .collect()
    }

    /// How often it has carried out a command.
    pub fn calls(&self, command: &str) -> u64 {
        let Value::BulkString(text) = self.ask(&["INFO", "commandstats"]) else {
            panic!("INFO gives text");
        };
        let text = String::from_utf8(text).unwrap();
        let start = format!("cmdstat_{command}:calls=");
        text.lines()
            .find_map(|line| line.strip_prefix(&start)?.split(',').next()?.parse().ok())
            .unwrap_or(0)
    }

    fn try_ask(&self, command: &[&str]) -> Option<Value> {
        let mut packed = redis::cmd(command[0]);
        command[1..].iter().for_each(|part| {
            packed.arg(*part);
        });
        self.try_say(&packed.get_packed_command())
    }

    /// Bytes of one command, over a connection of its own.
    pub fn say(&self, command: &[u8]) -> Value {
        self.try_say(command).expect("the server answers")
    }

    fn try_say(&self, command: &[u8]) -> Option<Value> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The end of sending makes it answer and close, so the answer is whole.
        stream.write_all(command).ok()?;
        stream.shutdown(std::net::Shutdown::Write).ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok()?;
        redis::parse_redis_value(&answer).ok()
    }

    fn wait_until_it_answers(&self) {
        let start = Instant::now();
        // Whoever needs a password says so as well.
        while !matches!(
            self.try_ask(&["PING"]),
            Some(Value::SimpleString(_) | Value::ServerError(_))
        ) {
            assert!(start.elapsed() < PATIENCE, "redis-server does not answer");
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }

    fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it runs");
        let pid = Pid::from_raw(process.0.id().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("redis.sock")
}

fn spawn(folder: &Path, options: &[String]) -> Process {
    let child = Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--appendonly", "no"])
        .args(["--enable-debug-command", "yes", "--loglevel", "warning"])
        .arg("--unixsocket")
        .arg(socket(folder))
        .arg("--dir")
        .arg(folder)
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed (tests/run installs it)");
    Process(child)
}
