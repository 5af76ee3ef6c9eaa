//! A real blade for integration tests: `nitro serve` on free ports of 127.0.0.1 with its data in a temporary folder.
//!
//! ```ignore
//! mod blade;
//! use blade::Blade;
//!
//! let blade = Blade::start(&[("c2s.require_tls", "false")]); // values are TOML, as in `--set key=value`
//! blade.add_user("alice", "secret");                         // `nitro user add` on the running blade
//! let socket = std::net::TcpStream::connect(blade.c2s)?;     // also: blade.c2s_tls, blade.http
//! let status = blade.terminate();                            // SIGTERM, waits with a bound
//! ```
//!
//! [`Blade::start`] returns once the ports accept and `/healthz` answers 200; it panics with the blade's log if that
//! takes longer than [`READY_WITHIN`]. Dropping a blade kills its process by pid and removes its folder.
//! [`Blade::kill`] and [`Blade::restart`] are for crash tests: the data folder and the ports stay the same.

#![allow(dead_code)] // every integration test uses its own part

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a blade may take from start to a healthy answer.
pub const READY_WITHIN: Duration = Duration::from_secs(20);
/// How long a blade may take from SIGTERM to its end.
pub const STOPPED_WITHIN: Duration = Duration::from_secs(20);

/// The host that every test blade serves.
pub const DOMAIN: &str = "localhost";

pub struct Blade {
    folder: TempDir,
    settings: Vec<String>,
    /// A command that runs another one, with its arguments; empty: none.
    wrapper: Vec<String>,
    environment: Vec<(String, String)>,
    child: Option<Child>,
    /// Client port, STARTTLS.
    pub c2s: SocketAddr,
    /// Client port, direct TLS.
    pub c2s_tls: SocketAddr,
    /// HTTP port (`/healthz`, `/metrics`).
    pub http: SocketAddr,
    /// HTTP for clients, plain.
    pub web: SocketAddr,
    /// HTTP for clients, TLS.
    pub web_tls: SocketAddr,
}

impl Blade {
    /// Starts a blade with these settings on top of the tests' defaults (domain `localhost`, all cores, registration
    /// from loopback) and waits until it is ready.
    pub fn start(settings: &[(&str, &str)]) -> Blade {
        let mut blade = Blade::prepare(settings);
        blade.restart();
        blade
    }

    /// A blade that is not started yet: for tests that put something into its folder first. [`Blade::restart`] starts it.
    pub fn prepare(settings: &[(&str, &str)]) -> Blade {
        let folder = tempfile::Builder::new()
            .prefix("nitro-test-")
            .tempdir()
            .expect("a temporary folder");
        let [c2s, c2s_tls, http, web, web_tls] = free_addresses();
        let data_dir = folder.path().join("data");
        let all = vec![
            format!("domain=\"{DOMAIN}\""),
            format!("data_dir=\"{}\"", data_dir.display()),
            "cores=\"all\"".to_owned(),
            "registration=\"loopback\"".to_owned(),
            // many blades start here: small files
            "journal.segment_bytes=4194304".to_owned(),
            format!("c2s.listen=[\"{c2s}\"]"),
            format!("c2s.listen_tls=[\"{c2s_tls}\"]"),
            format!("http.listen=[\"{http}\"]"),
            format!("web.listen=[\"{web}\"]"),
            format!("web.listen_tls=[\"{web_tls}\"]"),
        ];
        let mut blade = Blade {
            folder,
            settings: all,
            wrapper: Vec::new(),
            environment: Vec::new(),
            child: None,
            c2s,
            c2s_tls,
            http,
            web,
            web_tls,
        };
        for (key, value) in settings {
            blade.set(key, value);
        }
        blade
    }

    /// Starts the process (again) on the same folder and ports, and waits until it is ready.
    pub fn restart(&mut self) {
        self.launch();
        self.wait_until_ready();
    }

    /// Another value of a setting, from the next start on.
    pub fn set(&mut self, key: &str, value: &str) {
        self.settings
            .retain(|one| !one.starts_with(&format!("{key}=")));
        self.settings.push(format!("{key}={value}"));
    }

    /// From the next start on, the server is started by this command (that must `exec` it).
    pub fn wrap(&mut self, command: Vec<String>) {
        self.wrapper = command;
    }

    /// A variable of the server's environment, from the next start on.
    pub fn set_env(&mut self, key: &str, value: &str) {
        self.environment.push((key.to_owned(), value.to_owned()));
    }

    /// Starts the process (again) on the same folder and ports, and does not wait for it.
    pub fn launch(&mut self) {
        assert!(self.child.is_none(), "the blade runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("the log file");
        let nitro = env!("CARGO_BIN_EXE_nitro");
        let mut command = match self.wrapper.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(nitro);
                command
            }
            None => Command::new(nitro),
        };
        let child = command
            .arg("serve")
            .args(self.set_options())
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file"))
            .stderr(log)
            .spawn()
            .expect("nitro starts");
        self.child = Some(child);
    }

    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + READY_WITHIN;
        while !self.is_ready() {
            let ended = self
                .child
                .as_mut()
                .unwrap()
                .try_wait()
                .expect("the blade's state");
            if let Some(status) = ended {
                self.child = None;
                panic!(
                    "the blade ended at once ({status}); its log:\n{}",
                    self.log()
                );
            }
            assert!(
                Instant::now() < deadline,
                "not ready within {READY_WITHIN:?}; log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10)); // the poll's interval; the bound is the deadline
        }
    }

    /// The folder given as `data_dir`.
    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The temporary folder around `data_dir`: free for the test's own files, and the blade's working directory.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Whether the folder stays when the blade is dropped: for somebody who wants to look into it.
    pub fn keep(&mut self, keep: bool) {
        self.folder.disable_cleanup(keep);
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the blade runs").id()
    }

    /// What the blade has printed since its first start.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Runs `nitro ARGUMENTS` with this blade's settings and gives `input` to it.
    pub fn nitro(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nitro"))
            .args(arguments)
            .args(self.set_options())
            .current_dir(self.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("nitro starts");
        // A command that does not read its input may have closed it.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().expect("nitro's output")
    }

    /// `nitro user add NAME@localhost --password-stdin`.
    pub fn add_user(&self, name: &str, password: &str) {
        let jid = format!("{name}@{DOMAIN}");
        let output = self.nitro(
            &["user", "add", &jid, "--password-stdin"],
            &format!("{password}\n"),
        );
        assert!(
            output.status.success(),
            "nitro user add {jid}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// `GET path` on the HTTP port: status code and body, or nothing if nobody answers.
    pub fn http_get(&self, path: &str) -> Option<(u16, String)> {
        let mut socket = TcpStream::connect_timeout(&self.http, Duration::from_secs(2)).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        write!(
            socket,
            "GET {path} HTTP/1.1\r\nHost: {DOMAIN}\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let code = head.split(' ').nth(1)?.parse().ok()?;
        Some((code, body.to_owned()))
    }

    /// SIGTERM, then waits for the end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait(STOPPED_WITHIN)
    }

    /// `kill -9`, as a power cut would.
    pub fn kill(&mut self) -> ExitStatus {
        self.signal(libc::SIGKILL);
        self.wait(STOPPED_WITHIN)
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the pid is that of a child which has not been waited for, so it names no other process.
        let result = unsafe { libc::kill(self.pid() as libc::pid_t, signal) };
        assert_eq!(
            result,
            0,
            "signal {signal} to the blade: {}",
            std::io::Error::last_os_error()
        );
    }

    /// Waits for the end of the process; panics when it takes longer than `bound`.
    pub fn wait(&mut self, bound: Duration) -> ExitStatus {
        let deadline = Instant::now() + bound;
        loop {
            if let Some(status) = self
                .child
                .as_mut()
                .expect("the blade runs")
                .try_wait()
                .expect("the blade's state")
            {
                self.child = None;
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the blade did not end within {bound:?}; its log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5)); // the poll's interval; the bound is the deadline
        }
    }

    fn is_ready(&self) -> bool {
        let accepts =
            |address| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
        matches!(self.http_get("/healthz"), Some((200, _)))
            && accepts(self.c2s)
            && accepts(self.c2s_tls)
    }

    fn set_options(&self) -> impl Iterator<Item = &str> {
        self.settings.iter().flat_map(|setting| ["--set", setting])
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("blade.log")
    }
}

impl Drop for Blade {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the blade's log:\n{}", self.log());
        }
    }
}

/// Addresses on which nobody listens, below the range from which the kernel picks ports of outgoing connections.
/// Test processes start at different places (by pid), so that two of them do not meet.
fn free_addresses<const N: usize>() -> [SocketAddr; N] {
    const FIRST: u16 = 12_000;
    const COUNT: u16 = 20_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id().wrapping_mul(97) % u32::from(COUNT)) as u16;
    let next_free = || {
        for _ in 0..COUNT {
            let offset = (u32::from(start) + u32::from(NEXT.fetch_add(1, Ordering::Relaxed)))
                % u32::from(COUNT);
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST + offset as u16));
            if TcpListener::bind(address).is_ok() {
                return address;
            }
        }
        panic!("no free port between {FIRST} and {}", FIRST + COUNT);
    };
    std::array::from_fn(|_| next_free())
}
