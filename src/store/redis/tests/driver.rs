//! The smallest driver of a [`Tier`]: one thread, `poll`, sockets that never block; and the durable generations.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::{Address, Config, Endpoint, Event, Generations, Tier, Wants};
use super::server::PATIENCE;

pub struct Driver {
    pub tier: Tier,
    pub generations: Generations,
    /// Renewals that were asked for and not answered yet.
    pub renewals: VecDeque<(usize, Box<str>)>,
    pub renews: bool,
    /// How many were answered.
    pub renewed: u64,
    pub events: VecDeque<Event>,
    sockets: Vec<Option<Box<dyn Stream>>>,
    buffer: Vec<u8>,
    start: Instant,
}

trait Stream: Read + Write + AsFd {}
impl<S: Read + Write + AsFd> Stream for S {}

/// Short pauses, so that a test sees many of them; deadlines that a busy machine does not reach.
pub fn config() -> Config {
    Config {
        timeout_ms: 10_000,
        connect_timeout_ms: 10_000,
        pause_ms_min: 2,
        pause_ms_max: 30,
        // The driver knows it.
        ..Config::new("t:", "blade", 1, 0)
    }
}

/// For tests that wait for a deadline.
pub fn hasty() -> Config {
    Config {
        timeout_ms: 1_000,
        connect_timeout_ms: 1_000,
        ..config()
    }
}

impl Driver {
    pub fn new<'a>(
        config: Config,
        folder: &Path,
        addresses: impl IntoIterator<Item = &'a str>,
    ) -> Driver {
        let addresses = Address::parse_all(addresses).unwrap();
        let path = folder.join("redis.json");
        let generations = Generations::open(path, &addresses, 1, unix_us()).unwrap();
        let config = Config {
            incarnation: generations.incarnation(),
            ..config
        };
        let tier = Tier::new(
            config,
            &addresses,
            generations.placement(),
            generations.all(0),
        );
        Driver {
            sockets: addresses.iter().map(|_| None).collect(),
            tier,
            generations,
            renewals: VecDeque::new(),
            renews: true,
            renewed: 0,
            events: VecDeque::new(),
            buffer: vec![0; 128 << 10],
            start: Instant::now(),
        }
    }

    pub fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    /// Does what is to be done, and waits up to `wait` if that is nothing.
    pub fn turn(&mut self, wait: Duration) {
        for at in 0..self.sockets.len() {
            let now_us = self.now_us();
            match self.tier.wants(at, now_us) {
                Wants::Nothing => self.sockets[at] = None,
                Wants::Keep => {}
                Wants::Connect(address) => {
                    let socket = connect(&address.endpoint);
                    self.tier.connecting(at, now_us);
                    match socket {
                        Ok(socket) => {
                            self.sockets[at] = Some(socket);
                            self.tier.connected(at, now_us);
                        }
                        Err(error) => self.tier.lost(at, &error.to_string(), now_us),
                    }
                }
            }
            self.write(at);
        }
        self.wait(wait);
        for at in 0..self.sockets.len() {
            self.read(at);
        }
        self.tier.tick(self.now_us());
        self.take_events();
        if self.renews {
            self.renew();
        }
    }

    /// Answers what was asked for.
    pub fn renew(&mut self) {
        while let Some((instance, run_id)) = self.renewals.pop_front() {
            let generation = self.generations.renew(0, instance, &run_id, unix_us());
            let generation = generation.unwrap();
            assert!(self.tier.generation(instance, generation));
            self.renewed += 1;
            // Asks again if meanwhile another server is there.
            self.take_events();
        }
    }

    fn take_events(&mut self) {
        for event in self.tier.events() {
            match event {
                Event::Renew { instance, run_id } => self.renewals.push_back((instance, run_id)),
                other => self.events.push_back(other),
            }
        }
    }

    /// Turns until `done` says so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Driver) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "waited too long until {what}");
            self.turn(Duration::from_millis(2));
        }
    }

    /// The next event.
    pub fn event(&mut self) -> Event {
        self.until("an event comes", |driver| !driver.events.is_empty());
        self.events.pop_front().unwrap()
    }

    fn wait(&self, wait: Duration) {
        let mut polls: Vec<_> = self
            .sockets
            .iter()
            .enumerate()
            .filter_map(|(at, socket)| {
                let mut flags = PollFlags::IN;
                if !self.tier.outgoing(at).is_empty() {
                    flags |= PollFlags::OUT;
                }
                Some(PollFd::from_borrowed_fd(socket.as_ref()?.as_fd(), flags))
            })
            .collect();
        let deadline_us = self.tier.deadline_us().unwrap_or(u64::MAX);
        let wait = wait.min(Duration::from_micros(
            deadline_us.saturating_sub(self.now_us()),
        ));
        poll(&mut polls, Some(&Timespec::try_from(wait).unwrap())).unwrap();
    }

    fn write(&mut self, at: usize) {
        while let Some(socket) = &mut self.sockets[at]
            && !self.tier.outgoing(at).is_empty()
        {
            match socket.write(self.tier.outgoing(at)) {
                Ok(bytes) => self.tier.written(at, bytes),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.lose(at, &error.to_string()),
            }
        }
    }

    fn read(&mut self, at: usize) {
        let buffer = &mut self.buffer;
        while let Some(socket) = &mut self.sockets[at] {
            match socket.read(buffer) {
                Ok(0) => return self.lose(at, "it closed the connection"),
                Ok(bytes) => {
                    let now_us = self.start.elapsed().as_micros() as u64;
                    self.tier.incoming(at, &buffer[..bytes], now_us);
                    if self.tier.wants(at, now_us) != Wants::Keep {
                        self.sockets[at] = None;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.lose(at, &error.to_string()),
            }
        }
    }

    fn lose(&mut self, at: usize, why: &str) {
        self.sockets[at] = None;
        let now_us = self.now_us();
        self.tier.lost(at, why, now_us);
    }
}

fn connect(endpoint: &Endpoint) -> std::io::Result<Box<dyn Stream>> {
    Ok(match endpoint {
        Endpoint::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_nonblocking(true)?;
            Box::new(stream)
        }
        Endpoint::Tcp { host, port, .. } => {
            let stream = TcpStream::connect((&**host, *port))?;
            stream.set_nonblocking(true)?;
            Box::new(stream)
        }
    })
}

fn unix_us() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64
}
