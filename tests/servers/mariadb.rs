//! A real mariadbd for tests: in a temporary folder, on a unix socket, with a database and an account.

#![allow(dead_code)] // every test uses its own part

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long mariadbd may take to serve, or to end.
const WITHIN: Duration = Duration::from_secs(60);
const DATABASE: &str = "nitro";
const USER: &str = "nitro";
const PASSWORD: &str = "secret";

pub struct Mariadb {
    folder: TempDir,
    options: Vec<String>,
    child: Option<Child>,
}

impl Mariadb {
    /// Makes the data folder and starts it. `None`: MariaDB is not installed.
    pub fn start() -> Option<Mariadb> {
        Mariadb::start_with(&[])
    }

    /// The same with options of its command line.
    pub fn start_with(options: &[&str]) -> Option<Mariadb> {
        program("mariadbd")?;
        let install = program("mariadb-install-db")?;
        program("mariadb")?;
        let folder = tempfile::Builder::new()
            .prefix("mariadb-")
            .tempdir()
            .expect("a temporary folder");
        let log = File::create(folder.path().join("mariadb.log")).expect("the log file");
        // Servers that share one stumble over each other's temporary tables.
        fs::create_dir(folder.path().join("tmp")).expect("a folder for temporary tables");
        let status = Command::new(install)
            .args([
                "--no-defaults",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ])
            .arg(format!(
                "--datadir={}",
                folder.path().join("data").display()
            ))
            .arg(format!("--tmpdir={}", folder.path().join("tmp").display()))
            .args(as_oneself())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file"))
            .stderr(log)
            .status()
            .expect("mariadb-install-db runs");
        let mut mariadb = Mariadb {
            folder,
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            child: None,
        };
        assert!(status.success(), "mariadb-install-db:\n{}", mariadb.log());
        mariadb.restart();
        mariadb.sql(&format!(
            "CREATE DATABASE {DATABASE}; CREATE USER '{USER}'@'localhost' IDENTIFIED BY '{PASSWORD}'; \
             GRANT ALL ON {DATABASE}.* TO '{USER}'@'localhost'"
        ));
        Some(mariadb)
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("mariadb.sock")
    }

    /// As in `database`.
    pub fn url(&self) -> String {
        format!(
            "mysql://{USER}:{PASSWORD}@localhost/{DATABASE}?socket={}",
            self.socket().display()
        )
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("mariadbd runs").id()
    }

    /// Starts the process (again) on the same data, and waits until it serves.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "mariadbd runs already");
        let log = File::options()
            .append(true)
            .open(self.folder.path().join("mariadb.log"))
            .expect("the log file");
        let child = Command::new(program("mariadbd").expect("it was there"))
            .args([
                "--no-defaults",
                "--skip-networking",
                "--innodb-buffer-pool-size=64M",
            ])
            .arg(format!(
                "--datadir={}",
                self.folder.path().join("data").display()
            ))
            .arg(format!(
                "--tmpdir={}",
                self.folder.path().join("tmp").display()
            ))
            .arg(format!("--socket={}", self.socket().display()))
            .arg(format!(
                "--pid-file={}",
                self.folder.path().join("pid").display()
            ))
            .args(as_oneself())
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file"))
            .stderr(log)
            .spawn()
            .expect("mariadbd starts");
        self.child = Some(child);
        let deadline = Instant::now() + WITHIN;
        while !self.try_sql("SELECT 1") {
            assert!(
                Instant::now() < deadline,
                "mariadbd does not serve; its log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20)); // the poll's interval; the bound is the deadline
        }
    }

    /// Statements as root; panics if they fail.
    pub fn sql(&self, statements: &str) {
        assert!(
            self.try_sql(statements),
            "{statements} failed; the log:\n{}",
            self.log()
        );
    }

    /// Statements as root: did they succeed?
    pub fn try_sql(&self, statements: &str) -> bool {
        let status = Command::new("mariadb")
            .args([
                "--no-defaults",
                "--user=root",
                "--batch",
                "--execute",
                statements,
            ])
            .arg(format!("--socket={}", self.socket().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("mariadb.log")).unwrap_or_default()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends it in order.
    pub fn shut_down(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(child.id(), Signal::TERM);
            let deadline = Instant::now() + WITHIN;
            while matches!(child.try_wait(), Ok(None)) {
                assert!(Instant::now() < deadline, "mariadbd does not end");
                std::thread::sleep(Duration::from_millis(5)); // the poll's interval; the bound is the deadline
            }
        }
    }

    /// SIGSTOP: it hangs until [`Mariadb::go_on`].
    pub fn stop(&self) {
        signal(self.pid(), Signal::STOP);
    }

    pub fn go_on(&self) {
        signal(self.pid(), Signal::CONT);
    }
}

impl Drop for Mariadb {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Root must say that it means to run it as root.
fn as_oneself() -> Option<String> {
    rustix::process::geteuid()
        .is_root()
        .then(|| "--user=root".to_owned())
}

/// Where a program is; Debian keeps servers away from users' paths.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| Path::new(file).is_file())
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a child's pid");
    kill_process(pid, signal).expect("a signal to a child that has not been waited for");
}
