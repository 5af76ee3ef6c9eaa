//! The door for `nitro user` and `nitro session` while nitro runs.
//!
//! In flow lines of JSON from the unix socket `nitro.sock`, out flow checked [`AdminRequest`]s to the blade's handler and
//! its replies back. Promise: only the owner of the data folder gets in; a slow, silent or talkative client costs a
//! bounded thread and nothing else. Everything here runs on plain threads, never on a shard.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{AdminReply, AdminRequest, BATCH_MAX, LINE_BYTES_MAX, LIST_MAX};
use crate::xmpp::jid;

/// The socket's name in the data folder.
pub const SOCKET_NAME: &str = "nitro.sock";

/// A client that is silent for so long is left; also how long a reply may take to be read.
const IDLE: Duration = Duration::from_secs(60);

/// The running door; [`AdminServer::stop`] closes it.
pub struct AdminServer {
    dir: PathBuf,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl AdminServer {
    /// Opens the door of `dir`. The caller holds the folder's [`super::lock::DataLock`], so a socket that lies there is a
    /// dead one. `handler` is called on the connections' threads, several at a time; it may block.
    ///
    /// # Errors
    /// A sentence.
    pub fn start<H>(dir: &Path, connections_max: usize, handler: H) -> Result<AdminServer, String>
    where
        H: Fn(AdminRequest) -> AdminReply + Send + Sync + 'static,
    {
        let cannot = |e: io::Error| {
            format!(
                "{}: the admin socket cannot be made ({e}); choose a data_dir on a file system with sockets",
                dir.join(SOCKET_NAME).display()
            )
        };
        let listener = bind(dir).map_err(cannot)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let (stop, handler) = (stopping.clone(), Arc::new(handler));
        let thread = std::thread::Builder::new()
            .name("admin".into())
            .spawn(move || accept(&listener, &stop, connections_max, &handler))
            .map_err(cannot)?;
        Ok(AdminServer {
            dir: dir.into(),
            stopping,
            thread,
        })
    }

    /// Takes no connection any more. Requests that are being answered end with the process.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        // Wakes the accepting thread; if nobody can connect, it has ended by itself.
        if connect(&self.dir).is_ok() {
            let _ = self.thread.join();
        }
        let _ = std::fs::remove_file(self.dir.join(SOCKET_NAME));
    }
}

/// Connects to the door of `dir`.
pub(super) fn connect(dir: &Path) -> io::Result<UnixStream> {
    let dir = File::open(dir)?;
    UnixStream::connect(short(&dir, SOCKET_NAME))
}

/// A path of the folder that fits into a socket address (108 bytes) however deep the folder lies.
fn short(dir: &File, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).into()
}

/// The socket is made inside a folder of mode 0700 and moved out when its own mode is right: at no time can anybody
/// else connect.
fn bind(dir: &Path) -> io::Result<UnixListener> {
    let private = dir.join(".nitro.sock");
    match std::fs::remove_dir_all(&private) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    DirBuilder::new().mode(0o700).create(&private)?;
    let listener = UnixListener::bind(short(&File::open(&private)?, SOCKET_NAME))?;
    let made = private.join(SOCKET_NAME);
    std::fs::set_permissions(&made, Permissions::from_mode(0o600))?;
    std::fs::rename(&made, dir.join(SOCKET_NAME))?;
    std::fs::remove_dir(&private)?;
    Ok(listener)
}

fn accept<H>(listener: &UnixListener, stop: &AtomicBool, connections_max: usize, handler: &Arc<H>)
where
    H: Fn(AdminRequest) -> AdminReply + Send + Sync + 'static,
{
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = listener.accept();
        if stop.load(Ordering::Acquire) {
            return;
        }
        let mut stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // EMFILE and its kin: the connection stays in the queue, so do not spin on it.
                tracing::warn!("the admin socket cannot accept: {e}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let one = Open::new(&open);
        if open.load(Ordering::Relaxed) > connections_max {
            let busy = AdminReply::refused(
                "too many nitro commands at once; try again (see limits.admin_connections_max)",
            );
            let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
            let _ = reply(&mut stream, &busy);
            continue;
        }
        let handler = handler.clone();
        let spawned = std::thread::Builder::new()
            .name("admin-client".into())
            .spawn(move || {
                if let Err(e) = serve(stream, &*handler) {
                    tracing::debug!("an admin connection ended: {e}");
                }
                drop(one);
            });
        if let Err(e) = spawned {
            tracing::warn!("an admin connection got no thread: {e}");
        }
    }
}

/// Counts a connection while it lives.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: &Arc<AtomicUsize>) -> Open {
        count.fetch_add(1, Ordering::Relaxed);
        Open(count.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(stream: UnixStream, handler: &dyn Fn(AdminRequest) -> AdminReply) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut out = stream.try_clone()?;
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    while read_line(&mut lines, &mut line)? {
        let answer = match serde_json::from_slice::<AdminRequest>(&line) {
            Err(e) => AdminReply::refused(format!(
                "the server does not understand the request ({e}); use the nitro command of its release"
            )),
            Ok(request) => match check(&request) {
                Err(sentence) => AdminReply::refused(sentence),
                Ok(()) => handler(request),
            },
        };
        reply(&mut out, &answer)?;
    }
    Ok(())
}

/// One line of at most [`LINE_BYTES_MAX`]; false at the end.
pub(super) fn read_line(from: &mut BufReader<UnixStream>, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    from.take(LINE_BYTES_MAX as u64).read_until(b'\n', line)?;
    match line.last() {
        None => Ok(false),
        Some(b'\n') => Ok(true),
        Some(_) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a line is cut off or too long",
        )),
    }
}

fn reply(to: &mut UnixStream, reply: &AdminReply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply).map_err(io::Error::other)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// What the handler need not check again: names are prepared, keys have the right form, batches are bounded.
fn check(request: &AdminRequest) -> Result<(), String> {
    use AdminRequest::*;
    let too_many = |n: usize, max: usize| match n > max {
        true => Err(format!("{n} are too many for one request; ask for {max}")),
        false => Ok(()),
    };
    match request {
        UserAdd { name, keys } | UserPasswd { name, keys } => {
            check_name(name)?;
            keys.check()
        }
        UserRemove { name } | UserShow { name } | UserDisable { name } | UserEnable { name } => {
            check_name(name)
        }
        UserList { limit, .. } => too_many(*limit, LIST_MAX),
        SessionList { name, limit, .. } => {
            too_many(*limit, LIST_MAX)?;
            name.as_deref().map_or(Ok(()), check_name)
        }
        SessionKick { name, .. } => check_name(name),
        Journals
        | Figures
        | ArchivePurged
        | ComponentList
        | ComponentKick { .. }
        | GroupList
        | GroupReload
        | GroupShow { .. } => Ok(()),
        UsersKnown { names } => {
            too_many(names.len(), BATCH_MAX)?;
            names.iter().try_for_each(|name| check_name(name))
        }
        ImportUsers { users, .. } => {
            too_many(users.len(), BATCH_MAX)?;
            users.iter().try_for_each(|user| {
                check_name(&user.name)?;
                user.keys.check()
            })
        }
        ImportRosters { rosters } => {
            too_many(rosters.len(), BATCH_MAX)?;
            rosters.iter().try_for_each(|roster| {
                check_name(&roster.name)?;
                roster
                    .items
                    .iter()
                    .try_for_each(|item| match jid::Jid::parse(&item.jid) {
                        Ok(parsed) if parsed.is_bare() && parsed.as_str() == item.jid => Ok(()),
                        _ => Err(format!("{:?} is no bare JID", item.jid)),
                    })
            })
        }
    }
}

fn check_name(name: &str) -> Result<(), String> {
    match jid::localpart(name) {
        Ok(prepared) if prepared == name => Ok(()),
        _ => Err(format!("{name:?} is no prepared user name")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Client;
    use super::*;

    fn show(name: &str) -> AdminRequest {
        AdminRequest::UserShow { name: name.into() }
    }

    fn echo(request: AdminRequest) -> AdminReply {
        AdminReply::refused(format!("{request:?}"))
    }

    #[test]
    fn requests_reach_the_handler_and_replies_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let server = AdminServer::start(dir.path(), 2, echo).unwrap();
        let mut client = Client::connect(dir.path()).unwrap().unwrap();
        for name in ["alice", "bob"] {
            assert_eq!(client.call(&show(name)).unwrap(), echo(show(name)));
        }
        server.stop();
        assert!(Client::connect(dir.path()).unwrap().is_none());
    }

    #[test]
    fn the_socket_is_for_its_owner_only_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET_NAME);
        drop(UnixListener::bind(&path).unwrap());
        assert!(Client::connect(dir.path()).unwrap().is_none());
        let server = AdminServer::start(dir.path(), 2, echo).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(Client::connect(dir.path()).unwrap().is_some());
        server.stop();
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_deeper_than_a_socket_address_works() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let server = AdminServer::start(&deep, 2, echo).unwrap();
        assert!(Client::connect(&deep).unwrap().is_some());
        server.stop();
    }

    #[test]
    fn one_connection_too_many_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let server = AdminServer::start(dir.path(), 1, echo).unwrap();
        let mut first = Client::connect(dir.path()).unwrap().unwrap();
        first.call(&show("a")).unwrap();
        let mut second = Client::connect(dir.path()).unwrap().unwrap();
        let AdminReply::Refused { sentence } = second.call(&show("a")).unwrap() else {
            panic!("the second connection was served")
        };
        assert!(sentence.starts_with("too many"), "{sentence}");
        server.stop();
    }

    #[test]
    fn what_the_handler_may_trust_is_checked_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let never = |_| panic!("reached the handler");
        let server = AdminServer::start(dir.path(), 9, never).unwrap();
        let mut client = Client::connect(dir.path()).unwrap().unwrap();
        let keys = super::super::Keys::default();
        for request in [
            show("Alice"),
            show("a@b"),
            AdminRequest::UserAdd {
                name: "a".into(),
                keys,
            },
            AdminRequest::UserList {
                prefix: String::new(),
                after: String::new(),
                limit: LIST_MAX + 1,
            },
            AdminRequest::UsersKnown {
                names: vec!["a".into(); BATCH_MAX + 1],
            },
            AdminRequest::ImportRosters {
                rosters: vec![super::super::ImportRoster {
                    name: "a".into(),
                    items: vec![super::super::ImportItem {
                        jid: "a@b/c".into(),
                        label: None,
                        groups: None,
                    }],
                }],
            },
        ] {
            let answer = client.call(&request).unwrap();
            assert!(matches!(answer, AdminReply::Refused { .. }), "{answer:?}");
        }
        server.stop();
    }

    #[test]
    fn a_line_that_is_no_request_is_answered_and_one_without_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let server = AdminServer::start(dir.path(), 9, echo).unwrap();
        let mut stream = connect(dir.path()).unwrap();
        stream.write_all(b"{\"request\":\"nonsense\"}\n").unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap());
        let mut line = Vec::new();
        assert!(read_line(&mut lines, &mut line).unwrap());
        assert!(String::from_utf8_lossy(&line).contains("does not understand"));
        let chunk = vec![b'x'; 1 << 20];
        let written = (0..=LINE_BYTES_MAX >> 20).try_for_each(|_| stream.write_all(&chunk));
        // Whether the last bytes still fit or not, the server hangs up.
        let ended = matches!(read_line(&mut lines, &mut line), Ok(false) | Err(_));
        assert!(written.is_err() || ended);
        server.stop();
    }
}
