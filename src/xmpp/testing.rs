//! A small world for tests: slices that exchange batches, journals and a tier in memory, clients whose output is collected. No socket,
//! no thread, no clock: [`World::run`] carries everything out until nothing moves any more.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use fnv::FnvHashMap;

use super::bind::{Arrival, bind};
use super::component::{ConnId, Hosts, Settings};
use super::error::StreamError;
use super::feature;
use super::parse_stanza;
use super::room;
use super::session::{Session, SessionId};
use super::slice::{Env, Limits, Now, Slice, Start, User};
use crate::config::ComponentPolicy;
use crate::store::change::{ArchivedChange, ArchivedMarks, Id, Message};
use crate::store::journal::{Group, Place, Slot};
use crate::store::overlay::Position;
use crate::store::record::{Record, RosterItem, Subscription, UserRecord};
use crate::store::recovery::{Found, Recovery};
use crate::store::ring::Ring;
use crate::store::sql::Ahead;
use crate::store::tier::{
    Answer, ArchiveQuery, Entry, Last, Loaded, Page, Pending, Query, ReadError, Request,
    Retraction, StoredRoom,
};
use crate::store::upload::Refused;
use crate::xml::{Element, FrameKind, Framer, Node, StreamNs};

pub const DOMAIN: &str = "localhost";
pub const ROOMS: &str = "rooms.localhost";
pub const UPLOAD: &str = "upload.localhost";

/// The ring of so many shards; made once, because that takes a while.
pub fn ring(shards: usize) -> Rc<Ring> {
    static RINGS: Mutex<BTreeMap<usize, Ring>> = Mutex::new(BTreeMap::new());
    let mut rings = RINGS.lock().unwrap();
    let ring = rings
        .entry(shards)
        .or_insert_with(|| Ring::of_shards(shards));
    Rc::new(ring.clone())
}

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
        record_bytes_max: 1 << 20,
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
        archive_page_max: feature::archive::PAGE_MAX,
        archive_prefs_max: 100,
        archive_keep_ms: 0,
        archive_recent_bytes_max: 1 << 20,
        pubsub: super::pubsub::edit::Bounds {
            nodes_max: 20,
            items_max: 100,
            item_bytes_max: 1 << 16,
            bytes_max: 1 << 18,
            affiliations_max: 10,
        },
        pubsub_page_items_max: 50,
        pep_waiting_max: 1000,
        group_greetings_members_max: 10,
        caps_remembered_max: 100,
        rooms: super::room::Limits {
            creators: None,
            rooms_max: 100,
            per_session_max: 20,
            session_presences_per_second_max: 1000,
            occupants_max: 1000,
            affiliates_max: 100,
            nick_bytes_max: 64,
            subject_bytes_max: 1024,
            history_max: 50,
            history_bytes_max: 1 << 18,
            messages_per_second_max: 1000,
            presences_per_second_max: 1000,
            lasting_per_owner_max: 100,
            lasting_max: 1000,
            left_ms: 600_000,
            registrations_per_second_max: 1000,
            requests_max: 100,
            persistent: false,
            archive_keep_ms: 0,
        },
        push: feature::push::Limits {
            services_max: 4,
            service_bytes_max: 4096,
            sender: false,
            body: false,
            body_bytes_max: 1024,
            placeholder: "New message".into(),
            inactive: true,
            repeat_ms: 3_600_000,
            told_max: 1000,
            per_second_max: 1000,
            waiting_max: 1000,
            answer_ms_max: 30_000,
            retry_ms: 30_000,
            tries_max: 10,
        },
        upload: feature::upload::Limits {
            url: "https://localhost:5443".into(),
            file_bytes_max: 100_000,
            slot_seconds: 300,
            waiting_max: 100,
            user_waiting_max: 8,
        },
    }
}

pub struct World {
    pub slices: Vec<Slice>,
    pub tier: Tier,
    /// What is durable, by shard; a [`Place`] is an offset in it.
    journals: Vec<Rc<RefCell<Vec<u8>>>>,
    /// Where each record is.
    records: Vec<(Position, Place)>,
    /// Groups that are being committed.
    flying: Vec<Option<Group>>,
    /// Since when users have had the same owners, as [`crate::store::owners`] keeps it: number of shards, id.
    owners: (usize, Id),
    pub now: Now,
    /// Presences that may go out in a turn of a slice.
    pub room: usize,
    /// For so many sessions, in all, turns have time to tell them what many are told.
    pub fanned: usize,
    /// What those say who keep the folder of uploads.
    pub slots: Result<(), Refused>,
    /// They say nothing.
    pub slots_held: bool,
    /// Peers without stream management have at once what they are sent.
    pub confirms: bool,
    /// What is on its way when their sessions end is the test's to decide: (shard, user). `None`: as [`World::confirms`] says.
    pub lefts: Option<Vec<(usize, Rc<str>)>>,
    clients: Vec<Connection>,
    components: Vec<ComponentEnd>,
}

/// A component's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    pub shard: usize,
    pub id: ConnId,
    link: usize,
}

#[derive(Default)]
struct ComponentEnd {
    connection: Connection,
    /// The kernel takes so much.
    room: usize,
    /// It serves its name.
    opened: bool,
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
    /// Requests and commits wait for [`World::release`].
    pub held: bool,
    /// Nothing can be written or read.
    pub broken: bool,
    /// Nobody can be loaded; the journals go on.
    pub gone: bool,
    /// Nothing is carried over from the journals.
    pub dry: bool,
    /// How many changes were carried over, messages and marks not counted.
    pub changes: usize,
    pub loads: usize,
    /// Statements that reads took.
    pub reads: usize,
    /// What was carried over, by journal.
    drained: FnvHashMap<u16, u64>,
    /// Accounts that are no more: since which revision.
    removed: BTreeMap<String, u64>,
    /// The highest id or revision that was carried over.
    pub last_id: u64,
    /// Marks that are read and not carried over yet.
    pub ahead: Ahead,
    /// Of the journals, not carried over yet.
    undrained: VecDeque<(Position, Vec<u8>)>,
    queue: VecDeque<(usize, Request)>,
}

#[derive(Default)]
pub struct Stored {
    pub record: UserRecord,
    /// It is a chat room.
    pub room: Option<Record>,
    pub revision: u64,
    /// Revision with which the account began: what is older belonged to another one.
    added: u64,
    pub archive: BTreeMap<u64, Entry>,
    pub pending: BTreeMap<u64, Pending>,
    pub retractions: BTreeMap<u64, Retraction>,
    pub documents: BTreeMap<String, Box<[u8]>>,
    /// Revisions of documents and, under the empty key, of the last log-out.
    revisions: BTreeMap<String, u64>,
    pub last: Option<Last>,
}

impl Client {
    /// Its connection, for the slice.
    pub fn link(self) -> u64 {
        self.link as u64
    }
}

impl World {
    pub fn new(shards: usize) -> World {
        World::with(shards, |_| {})
    }

    /// A world with other limits.
    pub fn with(shards: usize, change: impl Fn(&mut Limits)) -> World {
        let mut limits = limits();
        change(&mut limits);
        let now = Now {
            ms: 1_000_000,
            us: 1_000_000_000,
            unix: 1_790_000_000,
            unix_ms: 1_790_000_000_000,
        };
        let mut world = World {
            slices: Vec::new(),
            tier: Tier::default(),
            journals: Vec::new(),
            records: Vec::new(),
            flying: Vec::new(),
            owners: (0, Id(0)),
            now,
            fanned: usize::MAX,
            room: usize::MAX,
            slots: Ok(()),
            slots_held: false,
            confirms: true,
            lefts: None,
            clients: Vec::new(),
            components: Vec::new(),
        };
        world.start(shards, &limits);
        world
    }

    /// The process is killed and starts again: nothing is left but the tier and what the journals hold.
    pub fn crash(&mut self, shards: usize) {
        let limits = self.slices[0].env.limits.clone();
        self.clients.clear();
        self.components.clear();
        self.tier.queue.clear();
        self.tier.held = false;
        self.start(shards, &limits);
        self.run();
    }

    /// The list of rooms is read, as at each start.
    pub fn find_rooms(&mut self) {
        self.slices.iter_mut().for_each(room::directory::find);
        self.run();
    }

    fn start(&mut self, shards: usize, limits: &Limits) {
        let ring = ring(shards);
        let most = self.journals.len().max(shards);
        self.journals.resize_with(most, Rc::default);
        let journals = self.journals.clone();
        let unknown = self.tier.gone || self.tier.broken;
        let drained = match unknown {
            true => FnvHashMap::default(),
            false => self.tier.drained.clone(),
        };
        let mut recovery = Recovery::new(&ring, drained);
        for (at, place) in &self.records {
            let journal = journals[place.file as usize].borrow();
            let payload = &journal[place.offset as usize..][..place.len as usize];
            let change = ArchivedChange::access(payload).unwrap();
            recovery.record(at.journal, at.seq, *place, change).unwrap();
        }
        let (mut found, last_id) = recovery.finish();
        let since = self.owners_since(shards, last_id);
        for found in found.iter_mut().filter(|_| unknown) {
            found.doubtful = Some(since);
        }
        let start = |(shard, found): (usize, Found)| {
            let journals = journals.clone();
            let read_back = move |place: Place, into: &mut Vec<u8>| {
                let journal = journals[place.file as usize].borrow();
                into.extend_from_slice(&journal[place.offset as usize..][..place.len as usize]);
                Ok(())
            };
            let own = |(at, _): &&(Position, Place)| usize::from(at.journal) == shard;
            let last = self.records.iter().filter(own).map(|(at, _)| at.seq).max();
            Start {
                next_seq: last.unwrap_or_default() + 1,
                last_id,
                found,
                read_back: Rc::new(read_back),
            }
        };
        let starts = found.into_iter().enumerate().map(start).collect();
        self.begin(limits, 64 << 20, starts);
        self.flying = (0..shards).map(|_| None).collect();
    }

    /// As [`crate::store::owners::since`].
    pub fn owners_since(&mut self, shards: usize, last_id: Id) -> Id {
        if self.owners.0 != shards {
            self.owners = (shards, last_id);
        }
        self.owners.1
    }

    /// All but the last record of a journal, which the tier must have, are gone from it.
    pub fn recycle(&mut self, journal: u16) {
        let last = self.records.iter().rev();
        let last = last.map(|(at, _)| *at).find(|at| at.journal == journal);
        self.records
            .retain(|(at, _)| at.journal != journal || Some(*at) == last);
    }

    /// New slices take the place of all.
    pub fn begin(&mut self, limits: &Limits, cache_bytes_max: usize, starts: Vec<Start>) {
        let shards = starts.len();
        let ring = ring(shards);
        let slice = |(shard, start): (usize, Start)| {
            let env = Env {
                domain: DOMAIN.into(),
                rooms: Some(ROOMS.into()),
                upload: Some(UPLOAD.into()),
                upload_key: Some(feature::upload::Key::new(&[9; 32])),
                shard: shard as u16,
                ring: ring.clone(),
                limits: limits.clone(),
                id_key: [1, 2],
                login_key: [1; 32],
                features: Default::default(),
            };
            let mut slice = Slice::new(env, shards, cache_bytes_max, start);
            slice.now = self.now;
            slice
        };
        self.slices = starts.into_iter().enumerate().map(slice).collect();
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
        let user = self.slices[shard].user(name);
        let account = user.map(|user| crate::xmpp::fast::account(user.record.get()));
        let arrival = Arrival {
            user: name,
            account,
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

    /// A session that has sent initial presence; what it got is not taken.
    pub fn online_now(&mut self, name: &str, resource: &str) -> Client {
        let client = self.login(name, resource);
        self.send(client, "<presence/>");
        client
    }

    /// Commits what one slice has collected, and carries out nothing else.
    pub fn commit_only(&mut self, shard: usize) {
        self.commit(shard);
    }

    /// The client sends one element; nothing is carried out yet.
    pub fn element(&mut self, client: Client, xml: &str) -> Result<(), StreamError> {
        if self.tier.broken != self.slices[client.shard].ledger.full {
            for slice in &mut self.slices {
                slice.journal_is_full(self.tier.broken);
            }
        }
        self.slices[client.shard].element(client.sid, xml.as_bytes())
    }

    /// The client sends one element, and everything that follows from it happens.
    pub fn send(&mut self, client: Client, xml: &str) {
        if let Err(error) = self.element(client, xml) {
            self.slices[client.shard].end(client.sid, Some(error));
        }
        self.run();
    }

    /// These names are components', from now on.
    pub fn serve(&mut self, hosts: &[(&str, ComponentPolicy)], settings: Settings) {
        let host = |(name, policy): &(&str, ComponentPolicy)| {
            ((*name).to_owned(), "secret".to_owned(), *policy)
        };
        let hosts = Arc::new(Hosts::new(hosts.iter().map(host)));
        for slice in &mut self.slices {
            slice.component_configure(hosts.clone(), settings);
        }
        self.run();
    }

    /// A component that has proved its secret, on a shard.
    pub fn component(&mut self, shard: usize, host: &str) -> Component {
        let link = self.components.len();
        self.components.push(ComponentEnd {
            room: usize::MAX,
            ..ComponentEnd::default()
        });
        let ns = Rc::new(StreamNs::client());
        let id = self.slices[shard].component_join(link as u64, host, ns, "127.0.0.1:1");
        self.run();
        Component { shard, id, link }
    }

    /// The component sends one element, and everything that follows from it happens.
    pub fn component_sends(&mut self, component: Component, xml: &str) {
        let slice = &mut self.slices[component.shard];
        if let Err(error) = slice.component_element(component.id, xml.as_bytes()) {
            slice.component_end(component.id, Some(error));
        }
        self.run();
    }

    /// What the component has got since it was asked last, its handshake not counted.
    pub fn component_takes(&mut self, component: Component) -> Vec<String> {
        let out = self.component_raw(component);
        let end = b"</stream:stream>";
        let mut all = elements(out.as_bytes().strip_suffix(end).unwrap_or(out.as_bytes()));
        all.retain(|element| !element.starts_with("<handshake"));
        all
    }

    /// The same as it came, white space and a stanza that is not whole included.
    pub fn component_raw(&mut self, component: Component) -> String {
        let out = &mut self.components[component.link].connection.out;
        String::from_utf8(std::mem::take(out)).unwrap()
    }

    /// From now on the kernel takes so many bytes for the component, in all.
    pub fn component_room(&mut self, component: Component, bytes: usize) {
        self.components[component.link].room = bytes;
        self.slices[component.shard]
            .components
            .dirty
            .push(component.id);
        self.run();
    }

    pub fn component_serves(&self, component: Component) -> bool {
        let end = &self.components[component.link];
        end.opened && !end.connection.closed
    }

    /// The component's connection breaks.
    pub fn component_cut(&mut self, component: Component) {
        self.components[component.link].connection.closed = true;
        self.slices[component.shard].component_lost(component.id);
        self.run();
    }

    /// What the client has got since it was asked last, one text per element.
    pub fn take(&mut self, client: Client) -> Vec<String> {
        let out = std::mem::take(&mut self.clients[client.link].out);
        elements(&out)
    }

    /// The same, and it is asked for again.
    pub fn peek(&self, client: Client) -> Vec<String> {
        elements(&self.clients[client.link].out)
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
        self.now.us += ms * 1000;
        self.now.unix_ms += ms;
        self.now.unix = self.now.unix_ms / 1000;
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
                let asked = match self.slots_held {
                    true => Vec::new(),
                    false => std::mem::take(&mut slice.fx.slots),
                };
                for ask in asked {
                    moved = true;
                    slice.slot_reserved(ask.ticket, Some(self.slots));
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
                moved |= self.commit(from);
                let slice = &mut self.slices[from];
                slice.release(self.room);
                moved |= self.room > 0 && slice.pace.waiting() > 0;
                let confirmed = match self.confirms {
                    true => std::mem::take(&mut slice.fx.unconfirmed),
                    false => Vec::new(),
                };
                for sid in confirmed {
                    slice.confirmed(sid);
                }
                slice.cut_slow_readers();
                let mut dirty = std::mem::take(&mut slice.fx.dirty);
                while self.fanned > 0
                    && let Some(sid) = slice.next_fanned()
                {
                    self.fanned -= 1;
                    dirty.push(sid);
                }
                for sid in dirty {
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
                    match (closing.left, &mut self.lefts) {
                        (None, _) => {}
                        (Some(name), Some(lefts)) => lefts.push((from, name)),
                        (Some(name), None) => slice.left(&name, None, self.confirms),
                    }
                }
                slice.fx.loaded.clear();
                moved |= self.write_to_components(from);
                let slice = &mut self.slices[from];
                moved |= !slice.regrouping.is_empty();
                slice.regroup_some();
            }
        }
    }

    fn write_to_components(&mut self, shard: usize) -> bool {
        let slice = &mut self.slices[shard];
        let (opened, dirty, ending) = (
            std::mem::take(&mut slice.components.opened),
            std::mem::take(&mut slice.components.dirty),
            std::mem::take(&mut slice.components.ending),
        );
        let moved = !(opened.is_empty() && dirty.is_empty() && ending.is_empty());
        for link in opened {
            self.components[link as usize].opened = true;
        }
        for id in dirty {
            if let Some((link, bytes)) = slice.component_out(id) {
                let end = &mut self.components[link as usize];
                let taken = bytes.len().min(end.room);
                end.connection.out.extend_from_slice(&bytes[..taken]);
                end.room -= taken;
                slice.component_wrote(id, taken);
            }
        }
        for ending in ending {
            let connection = &mut self.components[ending.link as usize].connection;
            connection.out.extend_from_slice(&ending.bytes);
            connection.closed = true;
        }
        moved
    }
}

impl World {
    /// Commits what a slice has collected, marks too.
    fn commit(&mut self, shard: usize) -> bool {
        let slice = &mut self.slices[shard];
        if self.flying[shard].is_none() {
            if slice.ledger.due_ms(slice.now.ms).is_none() {
                return false;
            }
            // marks need not wait here
            let ms = std::mem::replace(&mut slice.now.ms, u64::MAX);
            let group = slice.seal();
            slice.now.ms = ms;
            match group {
                Some(group) => self.flying[shard] = Some(group),
                None => return true,
            }
        }
        if self.tier.held {
            return false;
        }
        let group = self.flying[shard].take().expect("it was put there");
        let base = {
            let mut journal = self.journals[shard].borrow_mut();
            let base = journal.len();
            journal.resize(base + group.bytes(), 0);
            for (seq, slot) in group.iter() {
                let at = base + slot.offset as usize;
                let payload = group.payload(slot);
                journal[at..at + payload.len()].copy_from_slice(payload);
                let at = Position {
                    journal: shard as u16,
                    seq,
                };
                self.tier.undrained.push_back((at, payload.to_vec()));
                let place = Place {
                    file: shard as u32,
                    offset: base as u32 + slot.offset,
                    len: slot.len,
                };
                self.records.push((at, place));
            }
            base
        };
        let place = |slot: Slot| Place {
            file: shard as u32,
            offset: base as u32 + slot.offset,
            len: slot.len,
        };
        self.slices[shard].committed(Some(&group), &place);
        self.slices[shard].ledger.give_back(group);
        if !self.tier.dry {
            self.drain();
        }
        true
    }

    /// Carries over what the journals hold.
    pub fn drain(&mut self) {
        if !self.tier.gone {
            // as the drain does it at its begin
            for (journal, seq) in &self.tier.drained {
                let at = Position {
                    journal: *journal,
                    seq: *seq,
                };
                for slice in &mut self.slices {
                    slice.drained(at);
                }
            }
        }
        while let Some((at, payload)) = self.tier.undrained.pop_front() {
            self.tier.apply(ArchivedChange::access(&payload).unwrap());
            self.tier.drained.insert(at.journal, at.seq);
            for slice in &mut self.slices {
                slice.drained(at);
            }
        }
    }
}

impl Tier {
    pub fn answer(&mut self, request: Request) -> Answer {
        let gone = || "broken by the test".to_owned();
        match request {
            Request::Load { name } if self.broken || self.gone => Answer::LoadFailed {
                name,
                error: gone(),
            },
            Request::Load { name } => {
                self.loads += 1;
                let user = self.users.get(&*name).map(|u| Loaded {
                    record: u.room.clone().unwrap_or_else(|| Record::new(&u.record)),
                    revision: u.revision,
                    pending: u.pending.values().cloned().collect(),
                    last: u.last.clone(),
                    index: None,
                });
                Answer::Loaded { name, user }
            }
            Request::Read { ticket, query } => self.read(ticket, query),
        }
    }

    /// As SQL does: by revision, twice changes nothing.
    pub fn apply(&mut self, change: &ArchivedChange<'_>) {
        if !matches!(
            change,
            ArchivedChange::Message(_)
                | ArchivedChange::Marks(_)
                | ArchivedChange::Decided { .. }
                | ArchivedChange::Unarchived { .. }
                | ArchivedChange::Retract(_)
        ) {
            self.changes += 1;
        }
        let record = |bytes: &[u8]| {
            let record = Record::from_bytes(bytes).unwrap();
            let room = record.is_room().then(|| record.clone());
            (record.to_owned(), room)
        };
        let id = match change {
            ArchivedChange::Message(message) => message.id.to_native(),
            ArchivedChange::AddUser { revision, .. }
            | ArchivedChange::PutUser { revision, .. }
            | ArchivedChange::RemoveUser { revision, .. }
            | ArchivedChange::PutDocument { revision, .. }
            | ArchivedChange::PutLast { revision, .. } => revision.to_native(),
            ArchivedChange::Marks(marks) => return self.apply_marks(marks),
            ArchivedChange::Decided { ids } => {
                for user in self.users.values_mut() {
                    for pending in user.pending.values_mut() {
                        if ids.iter().any(|id| *id == pending.id) {
                            pending.what &= !Message::UNDECIDED;
                        }
                    }
                }
                return;
            }
            ArchivedChange::Unarchived { ids } => {
                for user in self.users.values_mut() {
                    for id in ids.iter().map(|id| id.to_native()) {
                        user.archive.remove(&id);
                        if let Some(pending) = user.pending.get_mut(&id) {
                            pending.what &= !Message::ARCHIVE;
                        }
                    }
                }
                return;
            }
            ArchivedChange::Retract(retract) => retract.id.to_native(),
        };
        self.last_id = self.last_id.max(id);
        let name = change.owner().unwrap_or_default();
        let stored = self.users.get_mut(name);
        let newest = stored.as_ref().map(|stored| stored.revision);
        let newest = newest.max(self.removed.get(name).copied());
        let newer = newest.is_none_or(|newest| newest < id);
        match (change, stored) {
            (ArchivedChange::AddUser { record: bytes, .. }, _) if newer => {
                let (record, room) = record(bytes);
                let stored = Stored {
                    record,
                    room,
                    revision: id,
                    added: id,
                    ..Stored::default()
                };
                self.users.insert(name.to_owned(), stored);
                self.removed.remove(name);
            }
            (ArchivedChange::RemoveUser { .. }, _) if newer => {
                self.users.remove(name);
                self.removed.insert(name.to_owned(), id);
            }
            (ArchivedChange::PutUser { record: bytes, .. }, Some(user)) if newer => {
                (user.record, user.room) = record(bytes);
                user.revision = id;
            }
            (ArchivedChange::PutDocument { key, value, .. }, Some(user))
                if user.follows(key, id) =>
            {
                user.revisions.insert(key.to_string(), id);
                match value.is_empty() {
                    false => user.documents.insert(key.to_string(), (**value).into()),
                    true => user.documents.remove(&**key),
                };
            }
            (ArchivedChange::PutLast { at, status, .. }, Some(user)) if user.follows("", id) => {
                user.revisions.insert(String::new(), id);
                user.last = Some(Last {
                    at: (*at).into(),
                    status: (**status).into(),
                });
            }
            (ArchivedChange::Message(m), Some(user))
                if id > user.added && !self.ahead.dropped.contains(&id) =>
            {
                user.put(m, &self.ahead);
            }
            (ArchivedChange::Retract(r), Some(user))
                if id > user.added && !self.ahead.dropped.contains(&id) =>
            {
                let retraction = Retraction {
                    id,
                    side: r.side,
                    peer: (*r.peer).into(),
                    target: (*r.target).into(),
                    tombstone: (*r.tombstone).into(),
                };
                user.retractions.insert(id, retraction);
            }
            _ => {}
        }
    }

    fn apply_marks(&mut self, marks: &ArchivedMarks<'_>) {
        for user in self.users.values_mut() {
            for id in marks.done.iter().chain(marks.dropped.iter()) {
                user.pending.remove(&id.to_native());
            }
            for id in marks.dropped.iter() {
                user.archive.remove(&id.to_native());
                user.retractions.remove(&id.to_native());
            }
        }
    }

    /// A row's number is its place in the order of names.
    fn rooms(&self, after: u64, most: u32) -> Vec<StoredRoom> {
        let all = self.users.iter().zip(1..).skip(after as usize);
        let rooms = all.filter_map(|((name, stored), number)| {
            let maker = stored.documents.get(crate::store::room::MAKER_KEY);
            Some(StoredRoom {
                number,
                name: (**name).into(),
                record: Some(stored.room.clone()?),
                maker: maker.map_or("".into(), |m| String::from_utf8_lossy(m).into()),
            })
        });
        rooms.take(most as usize).collect()
    }

    fn read(&mut self, ticket: u64, query: Query) -> Answer {
        self.reads += 1;
        let user = self.users.get(query.name());
        let broken = self
            .broken
            .then(|| ReadError("broken by the test".to_owned()));
        match query {
            Query::Document { key, .. } => Answer::Document {
                ticket,
                result: match broken {
                    Some(error) => Err(error),
                    None => Ok(user.and_then(|u| u.documents.get(&*key).cloned())),
                },
            },
            Query::Retractions { keys, .. } => Answer::Retractions {
                ticket,
                result: match broken {
                    Some(error) => Err(error),
                    None => Ok(user
                        .into_iter()
                        .flat_map(|u| u.retractions.values())
                        .filter(|r| keys.contains(&Retraction::key(&r.target)))
                        .cloned()
                        .collect()),
                },
            },
            Query::Rooms { after, most } => Answer::Rooms {
                ticket,
                result: match broken {
                    Some(error) => Err(error),
                    None => Ok(self.rooms(after, most)),
                },
            },
            Query::Archive(query) => Answer::Archive {
                ticket,
                result: match broken {
                    Some(error) => Err(error),
                    None => Ok(user.map(|u| u.page(&query)).unwrap_or_default()),
                },
            },
        }
    }
}

impl Stored {
    /// Is a change with this revision newer than what was under the key, and of this account?
    fn follows(&self, key: &str, revision: u64) -> bool {
        self.revisions.get(key).copied().unwrap_or(self.added) < revision
    }

    fn put(&mut self, m: &crate::store::change::ArchivedMessage<'_>, ahead: &Ahead) {
        let id = m.id.to_native();
        if m.what & Message::PENDING != 0 && !ahead.done.contains(&id) {
            let pending = Pending {
                id,
                what: m.what,
                kind: m.kind,
                flags: m.flags.into(),
                stanza: (*m.stanza).into(),
            };
            self.pending.insert(id, pending);
        }
        if m.what & Message::ARCHIVE != 0 {
            let entry = Entry {
                id,
                what: m.what,
                kind: m.kind,
                flags: m.flags.into(),
                peer: (*m.peer).into(),
                stanza: (*m.stanza).into(),
            };
            self.archive.insert(id, entry);
        }
    }

    fn page(&self, query: &ArchiveQuery) -> Page {
        let all: Vec<&Entry> = self.archive.values().filter(|e| query.matches(e)).collect();
        let mut entries: Vec<Entry> = all
            .iter()
            .filter(|e| query.after.is_none_or(|after| e.id > after))
            .filter(|e| query.before.is_none_or(|before| e.id < before))
            .map(|e| (*e).clone())
            .collect();
        let most = query.most as usize;
        let complete = entries.len() <= most;
        if query.backwards && !complete {
            entries.drain(..entries.len() - most);
        }
        entries.truncate(most);
        let index = entries
            .first()
            .map(|first| all.iter().filter(|e| e.id < first.id).count() as u64);
        let known = |id: &&u64| !self.archive.contains_key(id);
        let named = [query.after, query.before, query.after_id, query.before_id];
        Page {
            count: query.count.then_some(all.len() as u64),
            index: index.filter(|_| query.count),
            complete,
            missing: named
                .iter()
                .flatten()
                .chain(&query.ids)
                .filter(known)
                .copied()
                .collect(),
            last_id: self.archive.keys().next_back().copied().unwrap_or_default(),
            retracted: !self.retractions.is_empty(),
            entries,
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
