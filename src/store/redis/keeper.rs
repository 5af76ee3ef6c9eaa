//! What the ring needs and a shard must not wait for: new generations on the disk, host names.
//!
//! In: requests of the shards. Out: answers to the shard that asked, by its sink. One thread for the disk and, where an
//! instance is named by host, one for names, which may take seconds. Promises: a generation is durable when it is
//! answered, and a shard never gets one that it has used; shards that ask for the same server after the same event share
//! one, so that after a restart all find their copies.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::generations::{Generation, Generations};

/// Between two attempts at a disk that fails.
const PAUSE: Duration = Duration::from_millis(500);

/// For one shard, about the instance with this index.
#[derive(Debug)]
pub enum Reply {
    Generation(usize, Generation),
    /// An error is for the log.
    Found(usize, Result<SocketAddr, String>),
}

/// Passes a reply on to its shard.
pub type Sink = Box<dyn Fn(Reply) + Send>;

struct Renew {
    shard: usize,
    instance: usize,
    run_id: Box<str>,
}

struct Find {
    shard: usize,
    instance: usize,
    host: Box<str>,
    port: u16,
}

/// The shards' side. Bounded by use: an instance has one request of a shard's under way at most.
#[derive(Clone)]
pub struct Keeper {
    renewals: Sender<Renew>,
    names: Sender<Find>,
}

impl Keeper {
    /// Starts the threads; they end with the last clone. `sinks` twice over, by shard.
    pub fn start(
        generations: Generations,
        disk: Vec<Sink>,
        names: Vec<Sink>,
    ) -> Result<Keeper, String> {
        let (renewals, renewing) = mpsc::channel();
        let (finds, finding) = mpsc::channel();
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into());
            thread
                .spawn(work)
                .map(drop)
                .map_err(|error| format!("a thread cannot start: {error}"))
        };
        spawn(
            "redis-disk",
            Box::new(move || renew_all(generations, &renewing, &disk)),
        )?;
        spawn("redis-names", Box::new(move || find_all(&finding, &names)))?;
        Ok(Keeper {
            renewals,
            names: finds,
        })
    }

    /// Answered by [`Reply::Generation`].
    pub fn renew(&self, shard: usize, instance: usize, run_id: Box<str>) {
        let _ = self.renewals.send(Renew {
            shard,
            instance,
            run_id,
        });
    }

    /// Answered by [`Reply::Found`].
    pub fn find(&self, shard: usize, instance: usize, host: Box<str>, port: u16) {
        let _ = self.names.send(Find {
            shard,
            instance,
            host,
            port,
        });
    }
}

fn renew_all(mut generations: Generations, asked: &Receiver<Renew>, sinks: &[Sink]) {
    for ask in asked {
        let generation = renew(&mut generations, &ask);
        sinks[ask.shard](Reply::Generation(ask.instance, generation));
    }
}

/// Tries until the disk takes it: until then nothing that was missed may go into SQL.
fn renew(generations: &mut Generations, ask: &Renew) -> Generation {
    let mut failed = false;
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix_us = now.unwrap_or_default().as_micros() as u64;
        match generations.renew(ask.shard, ask.instance, &ask.run_id, unix_us) {
            Ok(generation) => return generation,
            Err(error) if !std::mem::replace(&mut failed, true) => {
                tracing::error!(%error, "the generations of the Redis instances cannot be written in `data_dir`; \
                    copies are not used, and what waits for them is not drained, until they can");
            }
            Err(_) => {}
        }
        std::thread::sleep(PAUSE);
    }
}

fn find_all(asked: &Receiver<Find>, sinks: &[Sink]) {
    for ask in asked {
        let found = (&*ask.host, ask.port).to_socket_addrs();
        let found = match found.map(|mut all| all.next()) {
            Ok(Some(address)) => Ok(address),
            Ok(None) => Err(format!("{} has no address", ask.host)),
            Err(error) => Err(format!("{}: {error}", ask.host)),
        };
        sinks[ask.shard](Reply::Found(ask.instance, found));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::redis::Address;

    #[test]
    fn shards_share_a_new_generation_and_never_get_one_twice() {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::parse("unix:///r/a.sock").unwrap();
        let path = folder.path().join("redis.json");
        let generations = Generations::open(path, &[address], 2, 10).unwrap();
        let (replies, got) = mpsc::channel();
        let sinks = |_| {
            let sink = |replies: mpsc::Sender<Reply>| -> Sink {
                Box::new(move |reply| replies.send(reply).unwrap())
            };
            vec![sink(replies.clone()), sink(replies.clone())]
        };
        let keeper = Keeper::start(generations, sinks(0), sinks(1)).unwrap();
        let renew = |shard, run_id: &str| {
            keeper.renew(shard, 0, run_id.into());
            match got.recv_timeout(Duration::from_secs(10)).unwrap() {
                Reply::Generation(0, generation) => generation,
                other => panic!("{other:?}"),
            }
        };
        let first = renew(0, "x");
        assert_eq!(renew(1, "x"), first);
        // missed a write under it
        let second = renew(1, "x");
        assert!(second.number > first.number);
        assert_eq!(renew(0, "x"), second);
        // the server was replaced
        let third = renew(0, "y");
        assert!(third.number > second.number && renew(1, "y") == third);
        keeper.find(0, 0, "127.0.0.1".into(), 7000);
        match got.recv_timeout(Duration::from_secs(10)).unwrap() {
            Reply::Found(0, Ok(address)) => assert_eq!(address.port(), 7000),
            other => panic!("{other:?}"),
        }
    }
}
