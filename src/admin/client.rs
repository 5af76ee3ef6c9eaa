//! The command's side of the admin socket.
//!
//! In flow requests, out flow replies, one after the other. Promise: a server that does not answer is a sentence after a
//! bounded wait, never a command that hangs.

use std::io::{self, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::direct::Direct;
use super::lock::DataLock;
use super::server::{connect, read_line};
use super::{AdminReply, AdminRequest};
use crate::config::Config;

/// How long the server may take for one request (a batch of an import waits for its commit).
const DEADLINE: Duration = Duration::from_secs(60);

/// A connection to a running nitro.
pub struct Client {
    to: UnixStream,
    from: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Client {
    /// None: no nitro runs on this data folder.
    ///
    /// # Errors
    /// A sentence, if one seems to run but cannot be reached.
    pub fn connect(dir: &Path) -> Result<Option<Client>, String> {
        let open = || {
            let to = connect(dir)?;
            to.set_read_timeout(Some(DEADLINE))?;
            to.set_write_timeout(Some(DEADLINE))?;
            let from = BufReader::new(to.try_clone()?);
            Ok::<_, io::Error>(Client {
                to,
                from,
                line: Vec::new(),
            })
        };
        match open() {
            Ok(client) => Ok(Some(client)),
            Err(e) => match e.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                io::ErrorKind::PermissionDenied => Err(format!(
                    "{}: you may not talk to this nitro; run the command as the user that it runs as",
                    dir.display()
                )),
                _ => Err(format!(
                    "{}: the running nitro cannot be reached ({e})",
                    dir.display()
                )),
            },
        }
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// A sentence, if the connection broke; whether the request was carried out is then unknown.
    pub fn call(&mut self, request: &AdminRequest) -> Result<AdminReply, String> {
        let lost = |e: io::Error| {
            format!(
                "the running nitro did not answer ({e}); look into its log, then repeat the command"
            )
        };
        self.line.clear();
        serde_json::to_writer(&mut self.line, request).map_err(|e| lost(e.into()))?;
        self.line.push(b'\n');
        // A server that is full answers without reading, so a failed write does not mean that there is no reply.
        let written = self.to.write_all(&self.line);
        match read_line(&mut self.from, &mut self.line) {
            Ok(true) => serde_json::from_slice(&self.line).map_err(|e| lost(e.into())),
            Ok(false) => Err(lost(
                written.err().unwrap_or(io::ErrorKind::UnexpectedEof.into()),
            )),
            Err(e) => Err(lost(e)),
        }
    }
}

/// Whoever answers requests now: the running nitro, or this process on the data folder itself.
pub enum Accounts {
    Running(Client),
    Direct(Box<Direct>),
}

impl Accounts {
    /// Finds out which of the two.
    ///
    /// # Errors
    /// A sentence.
    pub fn open(config: &Config) -> Result<Accounts, String> {
        // Between the two lies a nitro that is starting or stopping, or another command: that passes.
        const PATIENCE: Duration = Duration::from_secs(10);
        let begun = Instant::now();
        loop {
            if let Some(client) = Client::connect(&config.data_dir)? {
                return Ok(Accounts::Running(client));
            }
            match DataLock::acquire(&config.data_dir) {
                Ok(lock) => return Ok(Accounts::Direct(Box::new(Direct::open(config, lock)?))),
                Err(why) if begun.elapsed() > PATIENCE => return Err(why),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Whether a nitro runs.
    pub fn is_running(&self) -> bool {
        matches!(self, Accounts::Running(_))
    }

    /// Asks and waits for the answer; a refusal is an error too.
    ///
    /// # Errors
    /// A sentence.
    pub fn call(&mut self, request: AdminRequest) -> Result<AdminReply, String> {
        let reply = match self {
            Accounts::Running(client) => client.call(&request)?,
            Accounts::Direct(direct) => direct.answer(request),
        };
        match reply {
            AdminReply::Refused { sentence } => Err(sentence),
            reply => Ok(reply),
        }
    }
}
