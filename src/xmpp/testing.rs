//! A small world for tests: slices that exchange batches, a tier in memory, clients whose output is collected. No socket,
//! no thread, no clock: [`World::run`] carries everything out until nothing moves any more.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use super::bind::{Arrival, bind};
use super::error::StreamError;
use super::parse_stanza;
use super::session::{Session, SessionId};
use super::slice::{Env, Limits, Now, Slice, User};
use crate::store::record::{Record, RosterItem, Subscription, UserRecord};
use crate::store::ring::Ring;
use crate::store::tier::{Answer, Last, Loaded, Op, Query, ReadError, Request, WriteError};
use crate::xml::{Element, FrameKind, Framer, Node, StreamNs};

pub const DOMAIN: &str = "localhost";

/// The limits of tests: roomy, so that a test that is about one sets it.
pub fn limits() -> Limits {
    Limits {
        xml: Default::default(),
        resources_per_user_max: 16,
        roster_items_max: 1000,
        roster_item_bytes_max: 4096,
        blocked_max: 100,
        subscription_requests_max: 100,
        directed_presence_max: 100,
        send_queue_bytes_max: 1 << 20,
        deferred_stanzas_max: 1000,
        offline_messages_max: 100,
        offline_bytes_max: 1 << 20,
        private_bytes_max: 1 << 16,
        vcard_bytes_max: 1 << 16,
        load_queue_bytes_max: 1 << 16,
        mesh_backlog_bytes_max: 1 << 26,
        unacked_bytes_max: 1 << 20,
        unacked_stanzas_max: 1000,
        resume_ms_max: 300_000,
        parked_max: 100,
        ping_idle_ms: 86_400_000,
        ping_timeout_ms: 30_000,
        registration: true,
        iterations: 4096,
    }
}

pub struct World {
    pub slices: Vec<Slice>,
    pub tier: Tier,
    pub now: Now,
    clients: Vec<Connection>,
}

/// A client's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    pub shard: usize,
    pub sid: SessionId,
    link: usize,
}

#[derive(Default)]
struct Connection {
    out: Vec<u8>,
    closed: bool,
}

/// What lies behind the caches.
#[derive(Default)]
pub struct Tier {
    pub users: BTreeMap<String, Stored>,
    /// Requests wait for [`World::release`].
    pub held: bool,
    /// Nothing can be written or read.
    pub broken: bool,
    /// All changes that were made.
    pub ops: Vec<Op>,
    pub loads: usize,
    queue: VecDeque<(usize, Request)>,
}

#[derive(Default)]
pub struct Stored {
    pub record: UserRecord,
    pub offline: Vec<(u64, Box<[u8]>)>,
    pub documents: BTreeMap<String, Box<[u8]>>,
    pub last: Option<Last>,
}

impl World {
    pub fn new(shards: usize) -> World {
        World::with(shards, |_| {})
    }

    /// A world with other limits.
    pub fn with(shards: usize, change: impl Fn(&mut Limits)) -> World {
        let ring = Rc::new(Ring::of_shards(shards));
        let mut limits = limits();
        change(&mut limits);
        let now = Now {
            ms: 1_000_000,
            unix: 1_790_000_000,
        };
        let slice = |shard| {
            let env = Env {
                domain: DOMAIN.into(),
                shard: shard as u16,
                ring: ring.clone(),
                limits: limits.clone(),
                id_key: [1, 2],
                features: Default::default(),
            };
            let mut slice = Slice::new(env, shards, 64 << 20);
            slice.now = now;
            slice
        };
        World {
            slices: (0..shards).map(slice).collect(),
            tier: Tier::default(),
            now,
            clients: Vec::new(),
        }
    }

    /// `name`, or `name` with a number, such that the shard owns it.
    pub fn on(&self, shard: usize, name: &str) -> String {
        let owner = |name: &str| usize::from(self.slices[0].env.owner(name));
        let mut names = std::iter::once(name.to_owned()).chain((2..).map(|n| format!("{name}{n}")));
        names.find(|name| owner(name) == shard).unwrap()
    }

    /// Makes an account, in the tier.
    pub fn add(&mut self, name: &str) {
        self.tier.users.entry(name.to_owned()).or_default();
    }

    /// Both have the other in the roster, subscribed both ways.
    pub fn befriend(&mut self, a: &str, b: &str) {
        self.item(a, b, Subscription::Both);
        self.item(b, a, Subscription::Both);
    }

    /// Puts a contact into a roster, in the tier: before anybody logs in.
    pub fn item(&mut self, user: &str, contact: &str, subscription: Subscription) {
        let stored = self.tier.users.entry(user.to_owned()).or_default();
        stored.record.put_roster_item(RosterItem {
            jid: bare(contact),
            subscription,
            ..RosterItem::default()
        });
    }

    /// A session of an existing user; it has not sent anything.
    pub fn login(&mut self, name: &str, resource: &str) -> Client {
        let shard = usize::from(self.slices[0].env.owner(name));
        self.slices[shard].want(name);
        self.run();
        self.clients.push(Connection::default());
        let link = self.clients.len() - 1;
        let arrival = Arrival {
            user: name,
            resource: Some(resource),
            link: link as u64,
            lang: None,
            stream_ns: Rc::new(StreamNs::client()),
            tls: false,
            peer: "127.0.0.1".into(),
        };
        let sid = bind(&mut self.slices[shard], arrival).unwrap();
        self.run();
        Client { shard, sid, link }
    }

    /// A session that has asked for the roster and sent initial presence; what it got is taken.
    pub fn online(&mut self, name: &str, resource: &str) -> Client {
        let client = self.login(name, resource);
        self.send(
            client,
            "<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>",
        );
        self.send(client, "<presence/>");
        self.take(client);
        client
    }

    /// The client sends one element; nothing is carried out yet.
    pub fn element(&mut self, client: Client, xml: &str) -> Result<(), StreamError> {
        self.slices[client.shard].element(client.sid, xml.as_bytes())
    }

    /// The client sends one element, and everything that follows from it happens.
    pub fn send(&mut self, client: Client, xml: &str) {
        if let Err(error) = self.element(client, xml) {
            self.slices[client.shard].end(client.sid, Some(error));
        }
        self.run();
    }

    /// What the client has got since it was asked last, one text per element.
    pub fn take(&mut self, client: Client) -> Vec<String> {
        let out = std::mem::take(&mut self.clients[client.link].out);
        elements(&out)
    }

    /// The client has got exactly these elements, in this order, since it was asked last. The order of attributes does
    /// not matter; the value `*` stands for any.
    #[track_caller]
    pub fn expect(&mut self, client: Client, elements: &[&str]) {
        let got = self.take(client);
        let same = got.len() == elements.len()
            && got
                .iter()
                .zip(elements)
                .all(|(got, wanted)| matches(wanted, got));
        assert!(same, "wanted {elements:#?}\ngot {got:#?}");
    }

    pub fn closed(&self, client: Client) -> bool {
        self.clients[client.link].closed
    }

    /// The client ends its stream.
    pub fn logout(&mut self, client: Client) {
        self.slices[client.shard].end(client.sid, None);
        self.run();
    }

    /// The client's connection breaks.
    pub fn cut(&mut self, client: Client) {
        self.slices[client.shard].link_lost(client.sid);
        self.run();
    }

    pub fn session(&self, client: Client) -> &Session {
        self.slices[client.shard].sessions.get(client.sid).unwrap()
    }

    pub fn slice_of(&mut self, name: &str) -> &mut Slice {
        let owner = self.slices[0].env.owner(name);
        &mut self.slices[usize::from(owner)]
    }

    /// The cached user.
    pub fn user(&self, name: &str) -> &User {
        let owner = self.slices[0].env.owner(name);
        self.slices[usize::from(owner)].user(name).unwrap()
    }

    /// The user's record as the tier has it.
    pub fn stored(&self, name: &str) -> &UserRecord {
        &self.tier.users[name].record
    }

    /// Answers what the tier held back.
    pub fn release(&mut self) {
        self.tier.held = false;
        self.run();
    }

    pub fn advance(&mut self, ms: u64) {
        self.now.ms += ms;
        self.now.unix += ms / 1000;
        for slice in &mut self.slices {
            slice.now = self.now;
            slice.tick();
        }
        self.run();
    }

    /// Carries out all effects until there are none.
    pub fn run(&mut self) {
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for from in 0..self.slices.len() {
                for to in 0..self.slices.len() {
                    let batch = std::mem::take(&mut self.slices[from].fx.mesh[to]);
                    if !batch.is_empty() {
                        moved = true;
                        self.slices[to].batch(&batch);
                    }
                }
                let slice = &mut self.slices[from];
                for (ticket, job) in std::mem::take(&mut slice.fx.jobs) {
                    moved = true;
                    slice.computed(ticket, job.run());
                }
                let requests = std::mem::take(&mut slice.fx.requests);
                self.tier
                    .queue
                    .extend(requests.into_iter().map(|r| (from, r)));
                while !self.tier.held
                    && let Some((shard, request)) = self.tier.queue.pop_front()
                {
                    moved = true;
                    let answer = self.tier.answer(request);
                    self.slices[shard].answers(vec![answer]);
                }
                let slice = &mut self.slices[from];
                slice.cut_slow_readers();
                for sid in std::mem::take(&mut slice.fx.dirty) {
                    moved = true;
                    if let Some((link, bytes)) = slice.take_out(sid) {
                        self.clients[link as usize].out.extend_from_slice(&bytes);
                        slice.reuse(bytes);
                    }
                }
                for closing in std::mem::take(&mut slice.fx.closing) {
                    moved = true;
                    let client = &mut self.clients[closing.link as usize];
                    client.out.extend_from_slice(&closing.bytes);
                    client.closed = true;
                }
                slice.fx.loaded.clear();
            }
        }
    }
}

impl Tier {
    fn answer(&mut self, request: Request) -> Answer {
        let gone = || "broken by the test".to_owned();
        match request {
            Request::Load { name } if self.broken => Answer::LoadFailed {
                name,
                error: gone(),
            },
            Request::Load { name } => {
                self.loads += 1;
                let user = self.users.get(&*name).map(|u| Loaded {
                    record: Record::new(&u.record),
                    offline: u.offline.clone(),
                    last: u.last.clone(),
                });
                Answer::Loaded { name, user }
            }
            Request::Write { ticket, .. } if self.broken => Answer::Written {
                ticket,
                result: Err(WriteError::Unavailable(gone())),
            },
            Request::Write { ticket, op } => Answer::Written {
                ticket,
                result: self.write(op),
            },
            Request::Read { ticket, query } => self.read(ticket, query),
        }
    }

    fn write(&mut self, op: Op) -> Result<(), WriteError> {
        self.ops.push(op.clone());
        if let Op::AddUser { name, record } = op {
            if self.users.contains_key(&*name) {
                return Err(WriteError::Conflict);
            }
            let record = record.to_owned();
            let stored = Stored {
                record,
                ..Stored::default()
            };
            self.users.insert(name.into(), stored);
            return Ok(());
        }
        let user = self.users.get_mut(op.name()).ok_or(WriteError::Missing)?;
        match op {
            Op::AddUser { .. } => unreachable!(),
            Op::PutUser { record, .. } => user.record = record.to_owned(),
            Op::RemoveUser { name } => {
                self.users.remove(&*name);
            }
            Op::PutOffline { id, stanza, .. } => user.offline.push((id, stanza)),
            Op::DropOffline { up_to, .. } => user.offline.retain(|(id, _)| *id > up_to),
            Op::PutDocument { key, value, .. } => {
                match value {
                    Some(value) => user.documents.insert(key.into(), value),
                    None => user.documents.remove(&*key),
                };
            }
            Op::PutLast { at, status, .. } => user.last = Some(Last { at, status }),
        }
        Ok(())
    }

    fn read(&mut self, ticket: u64, query: Query) -> Answer {
        let user = self.users.get(query.name());
        let broken = self
            .broken
            .then(|| ReadError("broken by the test".to_owned()));
        match query {
            Query::Document { key, .. } => Answer::Read {
                ticket,
                result: match broken {
                    Some(error) => Err(error),
                    None => Ok(user.and_then(|u| u.documents.get(&*key).cloned())),
                },
            },
            Query::Last { .. } => Answer::ReadLast {
                ticket,
                result: match broken {
                    Some(error) => Err(error),
                    None => Ok(user.and_then(|u| u.last.clone())),
                },
            },
        }
    }
}

/// Is it the same XML? See [`World::expect`].
pub fn matches(wanted: &str, got: &str) -> bool {
    if wanted == got {
        return true;
    }
    let parse = |xml: &str| parse_stanza(xml.as_bytes());
    match (parse(wanted), parse(got)) {
        (Some(wanted), Some(got)) => alike(&wanted, &got),
        _ => false,
    }
}

fn alike(wanted: &Element, got: &Element) -> bool {
    let attrs = |e: &Element| {
        let mut attrs = e.attrs.clone();
        attrs.sort();
        attrs
    };
    let (a, b) = (attrs(wanted), attrs(got));
    let same_attrs = a.len() == b.len()
        && a.iter()
            .zip(&b)
            .all(|(a, b)| a.0 == b.0 && (a.1 == "*" || a.1 == b.1));
    let same_children = wanted.children.len() == got.children.len()
        && wanted
            .children
            .iter()
            .zip(&got.children)
            .all(|pair| match pair {
                (Node::Element(a), Node::Element(b)) => alike(a, b),
                (a, b) => a == b,
            });
    wanted.is(&got.name, &got.ns) && same_attrs && same_children
}

pub fn bare(name: &str) -> String {
    format!("{name}@{DOMAIN}")
}

/// Cuts what a client got into its elements; the end of the stream is one too.
pub fn elements(out: &[u8]) -> Vec<String> {
    let header =
        b"<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";
    let mut framer = Framer::new();
    let limits = Default::default();
    framer.next(header, &limits).unwrap().unwrap();
    let mut rest = out;
    let mut elements = Vec::new();
    while !rest.is_empty() {
        let frame = framer.next(rest, &limits).unwrap();
        let frame =
            frame.unwrap_or_else(|| panic!("half an element: {}", String::from_utf8_lossy(rest)));
        let (bytes, next) = rest.split_at(frame.len);
        rest = next;
        if frame.kind != FrameKind::Whitespace {
            elements.push(String::from_utf8(bytes.to_vec()).unwrap());
        }
    }
    elements
}
