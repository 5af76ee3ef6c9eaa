//! A real redis-server for tests: in a temporary folder, on a unix socket, nothing written to disk unless it is asked to.

#![allow(dead_code)] // every test uses its own part

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long redis-server may take to answer, or to end.
const WITHIN: Duration = Duration::from_secs(10);

pub struct Redis {
    folder: TempDir,
    options: Vec<String>,
    tls_port: u16,
    child: Option<Child>,
}

impl Redis {
    /// Starts one. `None`: redis-server is not installed.
    pub fn start() -> Option<Redis> {
        Redis::start_with(&[])
    }

    /// The same with options of its command line, such as `["--maxmemory", "2mb"]`.
    pub fn start_with(options: &[&str]) -> Option<Redis> {
        let known = Command::new("redis-server")
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if known.is_err() {
            return None;
        }
        let folder = tempfile::Builder::new()
            .prefix("redis-")
            .tempdir()
            .expect("a temporary folder");
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut redis = Redis {
            folder,
            options,
            tls_port: 0,
            child: None,
        };
        redis.restart();
        Some(redis)
    }

    /// One that also speaks TLS on a port of 127.0.0.1, with the certificate that [`certify`] has put into `folder`. Clients
    /// must show one of the same authority.
    pub fn start_with_tls(folder: &Path, options: &[&str]) -> Option<Redis> {
        // The kernel gives nobody else this number soon; if somebody takes it, the server does not start and says so.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its number").port();
        drop(listener);
        let file = |name: &str| folder.join(name).display().to_string();
        let (port_text, ca) = (port.to_string(), file("ca.pem"));
        let (certificate, key) = (file("certificate.pem"), file("key.pem"));
        let tls = [
            ["--tls-port", &port_text],
            ["--tls-cert-file", &certificate],
            ["--tls-key-file", &key],
            ["--tls-ca-cert-file", &ca],
        ];
        let mut redis = Redis::start_with(&[tls.as_flattened(), options].concat())?;
        redis.tls_port = port;
        Some(redis)
    }

    /// Host and port of the TLS of one that has it.
    pub fn tls_address(&self) -> String {
        format!("127.0.0.1:{}", self.tls_port)
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// As in `redis.instances`.
    pub fn url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("redis-server runs").id()
    }

    /// Starts the process (again) on the same socket, and waits until it answers.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "redis-server runs already");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("redis.log"))
            .expect("the log file");
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no"])
            .arg("--unixsocket")
            .arg(self.socket())
            .arg("--dir")
            .arg(self.folder.path())
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file"))
            .stderr(log)
            .spawn()
            .expect("redis-server starts");
        self.child = Some(child);
        let deadline = Instant::now() + WITHIN;
        while self.command("PING").is_none() {
            assert!(
                Instant::now() < deadline,
                "redis-server does not answer; its log:\n{}",
                std::fs::read_to_string(self.folder.path().join("redis.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(5)); // the poll's interval; the bound is the deadline
        }
    }

    /// An inline command on a connection of its own; the first bytes of the answer.
    pub fn command(&self, command: &str) -> Option<String> {
        let mut socket = UnixStream::connect(self.socket()).ok()?;
        socket.set_read_timeout(Some(WITHIN)).ok()?;
        write!(socket, "{command}\r\n").ok()?;
        let mut answer = [0; 4096];
        let length = socket.read(&mut answer).ok()?;
        (length > 0).then(|| String::from_utf8_lossy(&answer[..length]).into_owned())
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP: it hangs until [`Redis::go_on`].
    pub fn stop(&self) {
        signal(self.pid(), Signal::STOP);
    }

    pub fn go_on(&self) {
        signal(self.pid(), Signal::CONT);
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Makes an authority and a certificate of it for 127.0.0.1, as server and as client: `ca.pem`, `certificate.pem`, `key.pem`.
pub fn certify(folder: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
    let write = |name: &str, pem: String| {
        std::fs::write(folder.join(name), pem).expect("a file in a temporary folder");
    };
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::new(Vec::new()).expect("no names are good names");
    // a certificate of the same name as its issuer would count as self-signed
    ca.distinguished_name
        .push(DnType::CommonName, "a test's authority");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let own = ca.self_signed(&ca_key).expect("a certificate");
    write("ca.pem", own.pem());
    let key = KeyPair::generate().expect("a key");
    let leaf = CertificateParams::new(vec!["127.0.0.1".into()]).expect("an address is a name");
    let leaf = leaf.signed_by(&key, &Issuer::new(ca, ca_key));
    write("certificate.pem", leaf.expect("a certificate").pem());
    write("key.pem", key.serialize_pem());
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a child's pid");
    kill_process(pid, signal).expect("a signal to a child that has not been waited for");
}
