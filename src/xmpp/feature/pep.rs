//! Personal eventing (XEP-0163): an account's own nodes, on the parts of publish-subscribe (XEP-0060) that it needs.
//!
//! In: requests to an account, from its user and from others; presence of clients that want to hear of nodes (`NODE+notify`,
//! [`super::caps`]); changes that other features make ([`begin`], [`commit`]). Out: results, documents for the journal, and
//! notifications: to the user's own available resources and to his subscribers, to each resource that wants the node.
//!
//! Promises: a publication is answered, and told, when it is durable. Changes of one user run one after the other and are made
//! as a whole. Nobody sees an item that the node's access model keeps from him, whatever way he asks, and nobody whom
//! the user blocks, or who blocks the user, hears of anything. To somebody who does not stand in the user's roster, what he may not
//! see looks like an account that does not exist.
//!
//! **Between shards.** A notification goes to each shard with subscribers once ([`Item::Event`]); there each recipient's own roster,
//! block list and capabilities decide. Who comes on line tells the owners of his contacts, a shard at a time, what he wants
//! ([`Item::Interest`]), and they send him the last items.
//!
//! **Memory.** The index of a user is read when it is first needed and stays with him in the cache. What a greeting has to read (a
//! contact who is not in the cache, his index, or the bucket of a last item that does not lie in it) is read once for all who
//! wait for it, [`READS_MAX`] at a time for each shard; the others wait, and beyond `limits.pep_waiting_max` who has come does not hear
//! of it until something is published.
//!
//! **Who is greeted** (XEP-0163 section 4.3.4 wants it for every subscriber): whoever comes hears the last items of his own account, of
//! the contacts in his roster, and of the members of shared groups of `groups.last_items_members_max` at most: in a group of
//! thousands each arrival would read thousands of indexes. An address of a component is told of nothing: the server knows what a client
//! wants from the capabilities of its own sessions, and asks nobody else for theirs.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::rc::Rc;

use fnv::FnvHashMap;

use super::rsm::{Shown, Wanted};
use super::{
    FEATURES, Feature, Iq, IqRoute, NONE, NodeRule, Target, avatar, blocking, bookmarks, vcard4,
};
use crate::store::change::Id;
use crate::store::record::ArchivedUserRecord;
use crate::store::tier::ReadError;
use crate::xml::dom::Element;
use crate::xmpp::batch::Item;
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::{self, Values};
use crate::xmpp::jid::Jid;
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::pubsub::config::{self, Access, Config};
use crate::xmpp::pubsub::edit::{self, Edit, INVALID_PAYLOAD, Op, Told};
use crate::xmpp::pubsub::event::{self, Event};
use crate::xmpp::pubsub::nodes::{
    self, Affiliation, ArchivedAffiliation, ArchivedNode, ArchivedNodes, Bucket, Nodes,
};
use crate::xmpp::pubsub::{NS, NS_OWNER, refused, unsupported};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::{Op as Write, Slice, User};

pub static FEATURE: Feature = Feature {
    name: "Personal eventing, publish-subscribe",
    spec: "XEP-0163, XEP-0060",
    version: "1.2.2, 1.30.0",
    account: &[
        NS,
        "http://jabber.org/protocol/pubsub#access-open",
        "http://jabber.org/protocol/pubsub#access-presence",
        "http://jabber.org/protocol/pubsub#access-roster",
        "http://jabber.org/protocol/pubsub#access-whitelist",
        "http://jabber.org/protocol/pubsub#auto-create",
        "http://jabber.org/protocol/pubsub#auto-subscribe",
        "http://jabber.org/protocol/pubsub#config-node",
        "http://jabber.org/protocol/pubsub#config-node-max",
        "http://jabber.org/protocol/pubsub#create-and-configure",
        "http://jabber.org/protocol/pubsub#create-nodes",
        "http://jabber.org/protocol/pubsub#delete-items",
        "http://jabber.org/protocol/pubsub#delete-nodes",
        "http://jabber.org/protocol/pubsub#filtered-notifications",
        "http://jabber.org/protocol/pubsub#item-ids",
        "http://jabber.org/protocol/pubsub#last-published",
        "http://jabber.org/protocol/pubsub#member-affiliation",
        "http://jabber.org/protocol/pubsub#modify-affiliations",
        "http://jabber.org/protocol/pubsub#multi-items",
        "http://jabber.org/protocol/pubsub#outcast-affiliation",
        "http://jabber.org/protocol/pubsub#persistent-items",
        "http://jabber.org/protocol/pubsub#presence-notifications",
        "http://jabber.org/protocol/pubsub#publish",
        "http://jabber.org/protocol/pubsub#publish-options",
        "http://jabber.org/protocol/pubsub#purge-nodes",
        "http://jabber.org/protocol/pubsub#retract-items",
        "http://jabber.org/protocol/pubsub#retrieve-affiliations",
        "http://jabber.org/protocol/pubsub#retrieve-default",
        "http://jabber.org/protocol/pubsub#retrieve-items",
        "http://jabber.org/protocol/pubsub#rsm",
    ],
    iq: &[
        IqRoute {
            name: "pubsub",
            ns: NS,
            target: Target::Account,
            handle: request,
        },
        IqRoute {
            name: "pubsub",
            ns: NS_OWNER,
            target: Target::Account,
            handle: owner_request,
        },
    ],
    ..NONE
};

/// Changes of one user that may wait for the one at work.
const WAITING_MAX: usize = 64;

/// Indexes and buckets that one shard reads at a time for those who are greeted.
pub const READS_MAX: usize = 32;

/// How often the items of a node are read again because it was changed meanwhile.
const AGAIN_MAX: u8 = 3;

/// Bytes of payload in one answer; the rest is on the next page.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// Runs with the user's nodes, alone. An error: it has not begun.
pub type Work = Box<dyn FnOnce(&mut Slice, Result<Turn, StanzaError>)>;

/// Work of one user's that goes on; ended by [`commit`] or [`end`]. It counts for the account that it was begun for: when that is removed
/// meanwhile, nothing is changed, even if there is another one of this name.
pub struct Turn {
    name: Rc<str>,
    pub nodes: Nodes,
}

/// The index of a user's nodes, as it is stored. Empty: he has none.
pub struct Index {
    bytes: Box<[u8]>,
    /// What the metadata of his avatar say, once somebody has asked; see [`avatar::hash`].
    avatar: OnceCell<Option<Box<str>>>,
}

impl Index {
    pub fn new(bytes: Box<[u8]>) -> Rc<Index> {
        Rc::new(Index {
            bytes,
            avatar: OnceCell::new(),
        })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The hash of the avatar, read once.
    pub fn avatar(&self) -> Option<&str> {
        let read = || avatar::hash_in(&Nodes::decode(&self.bytes).ok()?);
        self.avatar.get_or_init(read).as_deref()
    }
}

/// What was read for it.
type ThenItems = Box<dyn FnOnce(&mut Slice, Result<Vec<nodes::Item>, StanzaError>)>;

type ThenBuckets =
    Box<dyn FnOnce(&mut Slice, Result<BTreeMap<Bucket, Vec<nodes::Item>>, StanzaError>)>;

/// Changes at work, and greetings that wait.
#[derive(Default)]
pub struct Pep {
    /// With the account that each was begun for.
    changes: FnvHashMap<Rc<str>, VecDeque<(Rc<str>, Work)>>,
    greetings: FnvHashMap<Source, Audience>,
    /// Of `greetings` that are not being read.
    order: VecDeque<Source>,
    /// Of all of them.
    waiting: usize,
    reading: usize,
    /// [`pump`] is at work.
    pumping: bool,
}

impl Pep {
    /// Greetings that wait for something to be read.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Indexes and buckets that are being read for greetings.
    pub fn reading(&self) -> usize {
        self.reading
    }
}

/// What is to be read for greetings: a user's index, or one of the buckets.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Source {
    name: Rc<str>,
    bucket: Option<Bucket>,
}

/// Who has come on line and is to hear of what is read: full JID, and the nodes that he wants. Each once, with what he wanted last.
type Audience = BTreeMap<Rc<str>, Rc<str>>;

/// What a node has when nobody says otherwise.
pub fn default_config(node: &str) -> Config {
    let rule =
        FEATURES
            .iter()
            .flat_map(|f| f.nodes)
            .find(|rule| match rule.name.strip_suffix('*') {
                Some(prefix) => node.starts_with(prefix),
                None => node == rule.name,
            });
    rule.map_or_else(Config::personal, |NodeRule { config, .. }| config())
}

// ---- the index ---------------------------------------------------------------------------------------------------

/// Reads the user's index, if that was not done yet; then he has [`User::pep`].
pub fn with_index(
    slice: &mut Slice,
    name: &str,
    then: impl FnOnce(&mut Slice, Result<(), ReadError>) + 'static,
) {
    let Some(user) = slice.user(name) else {
        return then(slice, Err(ReadError("there is no such user".into())));
    };
    if user.pep.is_some() {
        return then(slice, Ok(()));
    }
    let user = user.name.clone();
    slice.read(
        name,
        nodes::KEY,
        Box::new(move |slice, result| {
            let result = result.and_then(|bytes| {
                let bytes = bytes.unwrap_or_default();
                Nodes::decode(&bytes).map_err(ReadError)?;
                // an account that was removed meanwhile is not this one, and a newer index stays
                if let Some(now) = slice.user_mut(&user)
                    && Rc::ptr_eq(&now.name, &user)
                    && now.pep.is_none()
                {
                    now.pep = Some(Index::new(bytes));
                    slice.resize(&user);
                    slice.ring_read_index(&user);
                }
                Ok(())
            });
            if let Err(error) = &result {
                tracing::warn!(user = &*user, %error, "nodes could not be read");
            }
            then(slice, result);
        }),
    );
}

fn index(slice: &Slice, name: &str) -> Option<Rc<Index>> {
    slice.user(name)?.pep.clone()
}

/// The nodes of a user whose index was read.
pub fn nodes_of(slice: &Slice, name: &str) -> Option<Nodes> {
    Nodes::decode(index(slice, name)?.bytes()).ok()
}

/// Reads some buckets of the user's.
fn read_buckets(slice: &mut Slice, name: &str, wanted: Vec<Bucket>, then: ThenBuckets) {
    if wanted.is_empty() {
        return then(slice, Ok(BTreeMap::new()));
    }
    struct Reading {
        left: usize,
        found: Result<BTreeMap<Bucket, Vec<nodes::Item>>, StanzaError>,
        then: Option<ThenBuckets>,
    }
    let reading = Rc::new(RefCell::new(Reading {
        left: wanted.len(),
        found: Ok(BTreeMap::new()),
        then: Some(then),
    }));
    for bucket in wanted {
        let (shared, user) = (reading.clone(), name.to_owned());
        slice.read(
            name,
            &nodes::key(bucket),
            Box::new(move |slice, result| {
                let items = result
                    .map_err(|error| error.to_string())
                    .and_then(|bytes| nodes::decode_items(&bytes.unwrap_or_default()));
                let mut reading = shared.borrow_mut();
                match (items, &mut reading.found) {
                    (Ok(items), Ok(found)) => {
                        found.insert(bucket, items);
                    }
                    (Ok(_), Err(_)) => {}
                    (Err(error), _) => {
                        tracing::warn!(user, error, "items could not be read");
                        reading.found = Err(StanzaError::RESOURCE_CONSTRAINT);
                    }
                }
                reading.left -= 1;
                if reading.left == 0
                    && let Some(then) = reading.then.take()
                {
                    let found = std::mem::replace(&mut reading.found, Ok(BTreeMap::new()));
                    drop(reading);
                    then(slice, found);
                }
            }),
        );
    }
}

/// All items of one of the user's nodes, oldest first; none if there is no such node. The index must have been read.
pub fn read_items(slice: &mut Slice, name: &str, node: &str, then: ThenItems) {
    read_items_again(slice, name, node.to_owned(), AGAIN_MAX, then);
}

fn read_items_again(slice: &mut Slice, name: &str, node: String, again: u8, then: ThenItems) {
    let before = index(slice, name);
    let nodes = nodes_of(slice, name).unwrap_or_default();
    let Some(found) = nodes.get(&node) else {
        return then(slice, Ok(Vec::new()));
    };
    if let Some(item) = &found.inline {
        return then(slice, Ok(vec![item.clone()]));
    }
    let user = name.to_owned();
    read_buckets(
        slice,
        name,
        found.all_buckets(),
        Box::new(move |slice, result| {
            // a change in between may have moved items from one bucket to another
            let now = index(slice, &user);
            let same = before.zip(now).is_some_and(|(a, b)| Rc::ptr_eq(&a, &b));
            match result {
                Ok(_) if !same && again > 0 => {
                    read_items_again(slice, &user, node, again - 1, then);
                }
                Ok(_) if !same => then(slice, Err(StanzaError::RESOURCE_CONSTRAINT)),
                Ok(found) => {
                    let mut items: Vec<_> = found.into_values().flatten().collect();
                    items.sort_unstable_by_key(|item| item.seq);
                    then(slice, Ok(items));
                }
                Err(error) => then(slice, Err(error)),
            }
        }),
    );
}

// ---- changes -----------------------------------------------------------------------------------------------------

/// Does `work` when nothing else of the user's is at work. It must go on to [`commit`] or [`end`].
pub fn begin(slice: &mut Slice, name: &str, work: Work) {
    let Some(user) = slice.user(name) else {
        return work(slice, Err(StanzaError::ITEM_NOT_FOUND));
    };
    let name = user.name.clone();
    match slice.pep.changes.get_mut(&name) {
        None => {
            slice.pep.changes.insert(name.clone(), VecDeque::new());
            start(slice, name, work);
        }
        Some(waiting) if waiting.len() < WAITING_MAX => waiting.push_back((name, work)),
        Some(_) => work(slice, Err(StanzaError::RESOURCE_CONSTRAINT)),
    }
}

fn start(slice: &mut Slice, name: Rc<str>, work: Work) {
    with_index(slice, &name.clone(), move |slice, result| {
        let nodes = result.ok().and_then(|()| nodes_of(slice, &name));
        let refused = match nodes {
            _ if !is_there(slice, &name) => StanzaError::ITEM_NOT_FOUND,
            Some(nodes) => return work(slice, Ok(Turn { name, nodes })),
            None => StanzaError::RESOURCE_CONSTRAINT,
        };
        work(slice, Err(refused));
        next(slice, &name);
    });
}

/// Is it still the account whose [`User::name`] this is, and not a later one of the same name? (Who has a change at work stays in the
/// cache.)
fn is_there(slice: &Slice, account: &Rc<str>) -> bool {
    let user = slice.user(account);
    user.is_some_and(|user| Rc::ptr_eq(&user.name, account))
}

/// The work is over: the next.
pub fn end(slice: &mut Slice, turn: Turn) {
    next(slice, &turn.name);
}

fn next(slice: &mut Slice, name: &Rc<str>) {
    let Some(waiting) = slice.pep.changes.get_mut(name) else {
        return;
    };
    match waiting.pop_front() {
        Some((account, work)) => start(slice, account, work),
        None => {
            slice.pep.changes.remove(name);
        }
    }
}

/// What is to be changed, as a whole.
#[derive(Default)]
pub struct Change {
    /// Names of nodes, and what becomes of them.
    pub ops: Vec<(String, Op)>,
    /// Other documents of the user's that go with it, by key; empty: none any more.
    pub documents: Vec<(String, Vec<u8>)>,
}

/// Makes a change; `then` hears when it is durable, or why it is not made.
pub fn commit(
    slice: &mut Slice,
    turn: Turn,
    change: Change,
    then: impl FnOnce(&mut Slice, Result<(), StanzaError>) + 'static,
) {
    let Turn { name, nodes } = turn;
    let bounds = &slice.env.limits.pubsub;
    let mut wanted: Vec<Bucket> = match &change.ops[..] {
        [(node, op)] => edit::wanted(&nodes, node, op, bounds),
        ops => {
            let all = ops.iter().filter_map(|(node, _)| nodes.get(node));
            all.flat_map(|node| node.all_buckets()).collect()
        }
    };
    wanted.sort_unstable();
    wanted.dedup();
    read_buckets(
        slice,
        &name.clone(),
        wanted,
        Box::new(move |slice, buckets| {
            let done = |slice: &mut Slice, result| {
                then(slice, result);
            };
            let made = match is_there(slice, &name) {
                true => buckets.and_then(|buckets| make(slice, nodes, buckets, change)),
                false => Err(StanzaError::ITEM_NOT_FOUND),
            };
            let (outcome, documents) = match made {
                Ok(made) => made,
                Err(error) => {
                    done(slice, Err(error));
                    return next(slice, &name);
                }
            };
            let (index, told) = (outcome.nodes, outcome.told);
            let user = name.clone();
            write_all(slice, &name, documents, move |slice, result| {
                let result = result.map_err(|error| {
                    tracing::warn!(user = &*user, %error, "nodes could not be stored");
                    StanzaError::from(error)
                });
                let ok = result.is_ok() && is_there(slice, &user);
                if ok {
                    written(slice, &user, &index);
                }
                done(slice, result);
                if ok {
                    for told in &told {
                        notify(slice, &user, told);
                    }
                    bookmarks::changed(slice, &user, &told);
                }
                next(slice, &user);
            });
        }),
    );
}

type Documents = Vec<(String, Vec<u8>)>;

fn make(
    slice: &mut Slice,
    nodes: Nodes,
    buckets: BTreeMap<Bucket, Vec<nodes::Item>>,
    change: Change,
) -> Result<(edit::Outcome, Documents), StanzaError> {
    let seqs: Vec<u64> = change.ops.iter().map(|_| slice.next_id()).collect();
    let mut edit = Edit::new(nodes, buckets, &slice.env.limits.pubsub);
    for ((node, op), seq) in change.ops.into_iter().zip(seqs) {
        edit.apply(&node, op, seq)?;
    }
    let mut outcome = edit.finish();
    let mut documents = change.documents;
    documents.append(&mut outcome.documents);
    Ok((outcome, documents))
}

/// Several documents of one user, in one group of the journal.
fn write_all(
    slice: &mut Slice,
    name: &str,
    documents: Documents,
    then: impl FnOnce(&mut Slice, Result<(), crate::xmpp::slice::WriteError>) + 'static,
) {
    let mut then = Some(then);
    let last = documents.len();
    if last == 0 {
        return then.take().expect("was not called")(slice, Ok(()));
    }
    for (n, (key, value)) in documents.into_iter().enumerate() {
        let op = Write::PutDocument {
            key: key.into(),
            value: Some(value.into()),
        };
        // whatever refuses the last one has refused those before it: nothing happens in between
        match then.take_if(|_| n + 1 == last) {
            Some(then) => slice.write(name, op, Box::new(then)),
            None => slice.write(name, op, Box::new(|_, _| {})),
        }
    }
}

/// The index is durable: from now on it is what everybody sees.
fn written(slice: &mut Slice, name: &Rc<str>, index: &Nodes) {
    let index = Index::new(index.encode().into());
    let now = index.clone();
    let Some(user) = slice.user_mut(name) else {
        return;
    };
    let before = user.pep.replace(index);
    slice.resize(name);
    if before.as_ref().and_then(|index| index.avatar()) != now.avatar() {
        avatar::changed(slice, name);
    }
}

// ---- who may see what --------------------------------------------------------------------------------------------

/// Somebody who looks at nodes of a user's.
struct Viewer<'a> {
    record: &'a ArchivedUserRecord,
    bare: &'a str,
    /// Groups of an administrator's that the two share: in them everybody is everybody's contact.
    shared: Vec<&'a str>,
}

impl<'a> Viewer<'a> {
    fn new(slice: &'a Slice, record: &'a ArchivedUserRecord, name: &str, jid: &'a Jid<'_>) -> Self {
        let mut shared = Vec::new();
        if slice.together(name, jid)
            && let Some(other) = jid.local()
            && let Some(both) = slice.groups.person(name).zip(slice.groups.person(other))
        {
            shared.extend(slice.groups.common(both.0, both.1));
        }
        Viewer {
            record,
            bare: jid.bare(),
            shared,
        }
    }

    fn is_subscribed(&self) -> bool {
        let item = self.record.roster_item(self.bare);
        !self.shared.is_empty() || item.is_some_and(|item| item.subscription().from())
    }
}

/// May somebody see the items of a node of the user's?
fn may_see(viewer: &Viewer<'_>, node: &nodes::Node) -> Result<(), StanzaError> {
    let groups = |wanted: &str| node.config.roster_groups.iter().any(|one| one == wanted);
    visible(
        viewer,
        node.config.access,
        node.affiliation(viewer.bare),
        groups,
    )
}

fn may_see_archived(viewer: &Viewer<'_>, node: &ArchivedNode) -> bool {
    let affiliation = node
        .affiliations
        .iter()
        .find(|one| one.0 == *viewer.bare)
        .map(|one| match one.1 {
            ArchivedAffiliation::Member => Affiliation::Member,
            ArchivedAffiliation::Outcast => Affiliation::Outcast,
        });
    let groups = |wanted: &str| node.config.roster_groups.iter().any(|one| *one == *wanted);
    visible(viewer, node.access(), affiliation, groups).is_ok()
}

fn visible(
    viewer: &Viewer<'_>,
    access: Access,
    affiliation: Option<Affiliation>,
    allowed: impl Fn(&str) -> bool,
) -> Result<(), StanzaError> {
    let item = viewer.record.roster_item(viewer.bare);
    let in_group = || {
        viewer.shared.iter().any(|group| allowed(group))
            || item.is_some_and(|item| item.groups.iter().any(|group| allowed(group)))
    };
    nodes::may_see(access, affiliation, viewer.is_subscribed(), in_group)
}

/// A node of the account that the request may see; the owner sees all.
fn seen_node(slice: &Slice, iq: &Iq, node: &str) -> Result<nodes::Node, StanzaError> {
    let nodes = nodes_of(slice, iq.account()).ok_or(StanzaError::RESOURCE_CONSTRAINT)?;
    let found = nodes.get(node).ok_or(StanzaError::ITEM_NOT_FOUND);
    if iq.own() {
        return found.cloned();
    }
    let user = slice.user(iq.account());
    let record = user.ok_or(StanzaError::SERVICE_UNAVAILABLE)?.record.get();
    let viewer = Viewer::new(slice, record, iq.account(), &iq.from);
    let seen = found.and_then(|found| {
        may_see(&viewer, found)?;
        Ok(found.clone())
    });
    match record.roster_item(iq.from.bare()).is_some() || viewer.is_subscribed() {
        true => seen,
        false => seen.map_err(|_| StanzaError::SERVICE_UNAVAILABLE),
    }
}

/// Names and titles of the nodes of an account that `asker` may see; the index must have been read.
pub fn listed(slice: &Slice, iq: &Iq) -> Vec<(String, String)> {
    let (Some(nodes), Some(user)) = (nodes_of(slice, iq.account()), slice.user(iq.account()))
    else {
        return Vec::new();
    };
    let viewer = Viewer::new(slice, user.record.get(), iq.account(), &iq.from);
    let seen = |node: &nodes::Node| iq.own() || may_see(&viewer, node).is_ok();
    let nodes = nodes.nodes.into_iter().filter(seen);
    nodes.map(|node| (node.name, node.config.title)).collect()
}

/// What disco#info of a node says (XEP-0060 section 5.3), or why not.
pub fn node_info(slice: &Slice, iq: &Iq, name: &str) -> Result<Config, StanzaError> {
    seen_node(slice, iq, name).map(|node| node.config)
}

// ---- notifications -----------------------------------------------------------------------------------------------

const NOTICE: Meta = Meta {
    kind: Kind::Headline,
    flags: Meta::SERVER | Meta::LAZY,
    read: None,
};

/// Tells of a change those who may know and want to.
pub fn notify(slice: &mut Slice, name: &str, told: &Told) {
    let bare = format!("{name}@{}", slice.env.domain);
    let stanza = event::message(&bare, &told.event.element(&told.node.name));
    to_sessions(slice, name, &told.node.name, &stanza);
    let Some(user) = slice.user(name) else {
        return;
    };
    let record = user.record.get();
    let mut names: BTreeMap<u16, Vec<String>> = BTreeMap::new();
    let own = record.roster.iter().filter_map(|item| {
        let contact = slice.env.local_part(&item.jid)?;
        item.subscription().from().then_some(contact)
    });
    let shared = slice.groups.person(name).into_iter();
    let shared = shared.flat_map(|person| slice.groups.contacts(person));
    let shared = shared.map(|person| &*person.name).filter(|contact| {
        let item = record.roster_item(&format!("{contact}@{}", slice.env.domain));
        item.is_none_or(|item| !item.subscription().from())
    });
    for contact in own.chain(shared) {
        let Ok(jid) = Jid::from_parts(Some(contact), &slice.env.domain, None) else {
            continue;
        };
        if may_see(&Viewer::new(slice, record, name, &jid), &told.node).is_err() {
            continue;
        }
        // XEP-0191 section 4: a blocked contact hears nothing
        if !record.blocked.is_empty() && blocking::blocks(slice, name, &jid) {
            continue;
        }
        let owner = slice.env.owner(contact);
        names.entry(owner).or_default().push(contact.to_owned());
    }
    for (owner, names) in names {
        let names = names.join("\n");
        if owner == slice.env.shard {
            event_in(slice, &names, &bare, &told.node.name, &stanza);
            continue;
        }
        let batch = &mut slice.fx.mesh[usize::from(owner)];
        let item = Item::Event {
            from: batch.put(bare.as_bytes()),
            node: batch.put(told.node.name.as_bytes()),
            stanza: batch.put(&stanza),
            names: batch.put(names.as_bytes()),
        };
        batch.items.push(item);
    }
}

/// To those of the user's own available resources that want the node.
pub fn to_sessions(slice: &mut Slice, name: &str, node: &str, stanza: &[u8]) {
    let Some(rest) = stanza.strip_prefix(event::START) else {
        return;
    };
    for sid in slice.sessions_of(name) {
        let Some(session) = slice.sessions.get(sid) else {
            continue;
        };
        let wants = session.caps.as_ref().is_some_and(|c| c.wants_node(node));
        if session.presence.is_none() || !wants {
            continue;
        }
        let mut head = event::START.to_vec();
        attribute("to", &session.jid, &mut head);
        slice.counters.pep_sent += 1;
        slice.send(sid, &[&head, rest], NOTICE);
    }
}

/// A notification of a node of bare JID `from` for users of this slice (local parts, separated by line feeds): to those of their
/// resources that want it.
pub fn event_in(slice: &mut Slice, names: &str, from: &str, node: &str, stanza: &[u8]) {
    let Ok(from) = Jid::parse(from) else {
        return;
    };
    for name in names.lines() {
        let Some(user) = slice.user(name).filter(|u| !u.sessions.is_empty()) else {
            continue;
        };
        // the sender's side may lag behind: what counts is what the recipient's own roster says
        let item = user.record.get().roster_item(from.bare());
        let subscribed = item.is_some_and(|item| item.subscription().to());
        if (subscribed || slice.together(name, &from))
            && slice.hooks.admission(slice, name, &from, NOTICE).is_ok()
        {
            to_sessions(slice, name, node, stanza);
        }
    }
}

/// A session of this slice is available and it is known what it wants: it hears the last items of its own account and of its
/// contacts (XEP-0163 section 4.3.4).
pub fn arrived(slice: &mut Slice, sid: SessionId) {
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let name = session.user.clone();
    let Some(user) = slice.user(&name) else {
        return;
    };
    let record = user.record.get();
    let mut contacts = vec![name.to_string()];
    let own = record.roster.iter().filter_map(|item| {
        let contact = slice.env.local_part(&item.jid)?;
        item.subscription().to().then_some(contact)
    });
    contacts.extend(own.map(str::to_owned));
    let most = slice.env.limits.group_greetings_members_max;
    let shared = slice.groups.person(&name).into_iter();
    let shared = shared.flat_map(|person| slice.groups.contacts_in_small(person, most));
    let shared = shared.filter(|contact| {
        let item = record.roster_item(&format!("{}@{}", contact.name, slice.env.domain));
        item.is_none_or(|item| !item.subscription().to())
    });
    contacts.extend(shared.map(|contact| contact.name.to_string()));
    ask(slice, sid, contacts);
}

/// A contact lets the user see his presence from now on: what his nodes have is shown to each of the user's resources.
pub fn subscribed(slice: &mut Slice, user: &str, contact: &str) {
    for sid in slice.sessions_of(user) {
        if slice
            .sessions
            .get(sid)
            .is_some_and(|s| s.presence.is_some())
        {
            ask(slice, sid, vec![contact.to_owned()]);
        }
    }
}

/// The session asks the owners of these users for their last items.
fn ask(slice: &mut Slice, sid: SessionId, contacts: Vec<String>) {
    let Some((session, entity)) = slice
        .sessions
        .get(sid)
        .and_then(|session| Some((session, session.caps.clone()?)))
        .filter(|(_, entity)| !entity.wants().is_empty())
    else {
        return;
    };
    let full = session.jid.clone();
    let mut names: BTreeMap<u16, Vec<String>> = BTreeMap::new();
    for contact in contacts {
        let owner = slice.env.owner(&contact);
        names.entry(owner).or_default().push(contact);
    }
    for (owner, names) in names {
        let names = names.join("\n");
        if owner == slice.env.shard {
            interest_in(slice, &names, &full, entity.wants());
            continue;
        }
        let batch = &mut slice.fx.mesh[usize::from(owner)];
        let item = Item::Interest {
            from: batch.put(full.as_bytes()),
            wants: batch.put(entity.wants().as_bytes()),
            names: batch.put(names.as_bytes()),
        };
        batch.items.push(item);
    }
}

/// Full JID `from` wants to hear of nodes (`wants`: each followed by a line feed) of users of this slice (local parts, separated by line
/// feeds).
pub fn interest_in(slice: &mut Slice, names: &str, from: &str, wants: &str) {
    let (to, wants): (Rc<str>, Rc<str>) = (from.into(), wants.into());
    for name in names.lines() {
        if slice.user(name).is_some_and(|user| user.pep.is_some()) {
            greet(slice, name, &to, &wants, None);
            continue;
        }
        let index = Source {
            name: name.into(),
            bucket: None,
        };
        enlist(slice, index, &to, &wants);
    }
    pump(slice);
}

/// Somebody (`to`, full JID) is to hear of nodes as soon as something was read.
fn enlist(slice: &mut Slice, source: Source, to: &Rc<str>, wants: &Rc<str>) {
    let pep = &mut slice.pep;
    let audience = pep.greetings.get_mut(&source);
    if let Some(wanted) = audience.and_then(|audience| audience.get_mut(to)) {
        *wanted = wants.clone();
        return;
    }
    if pep.waiting >= slice.env.limits.pep_waiting_max {
        slice.counters.pep_dropped += 1;
        return;
    }
    pep.waiting += 1;
    let audience = pep.greetings.entry(source.clone()).or_insert_with(|| {
        pep.order.push_back(source);
        Audience::new()
    });
    audience.insert(to.clone(), wants.clone());
}

/// Reads for those who wait, as much as may be read at a time.
fn pump(slice: &mut Slice) {
    // what is known is there at once: the loop goes on, not deeper
    if std::mem::replace(&mut slice.pep.pumping, true) {
        return;
    }
    while slice.pep.reading < READS_MAX
        && let Some(source) = slice.pep.order.pop_front()
    {
        slice.pep.reading += 1;
        let Source { name, bucket } = source.clone();
        match bucket {
            None => slice.when_known(
                &name.clone(),
                Box::new(move |slice| {
                    with_index(slice, &name, move |slice, result| {
                        was_read(slice, &source, result.is_ok().then_some(None));
                    });
                }),
            ),
            Some(bucket) => read_buckets(
                slice,
                &name,
                vec![bucket],
                Box::new(move |slice, found| {
                    let items = found.ok().and_then(|mut found| found.remove(&bucket));
                    was_read(slice, &source, items.map(|items| Some((bucket, items))));
                }),
            ),
        }
    }
    slice.pep.pumping = false;
}

type ReadBucket = (Bucket, Vec<nodes::Item>);

/// A source of greetings was read, if it is an index without anything else; `None`: it could not be read.
fn was_read(slice: &mut Slice, source: &Source, found: Option<Option<ReadBucket>>) {
    let audience = slice.pep.greetings.remove(source).unwrap_or_default();
    slice.pep.waiting -= audience.len();
    slice.pep.reading -= 1;
    if let Some(found) = found {
        for (to, wants) in audience {
            greet(slice, &source.name, &to, &wants, found.as_ref());
        }
    }
    pump(slice);
}

/// The last items of the user's nodes that `to` (full JID) wants and may see; those that do not lie in the index come from a bucket
/// that was read for it, or wait for one.
fn greet(slice: &mut Slice, name: &str, to: &Rc<str>, wants: &Rc<str>, found: Option<&ReadBucket>) {
    let (Ok(jid), Some(user)) = (Jid::parse(to), slice.user(name)) else {
        return;
    };
    let own = slice.env.is_local(&jid) && jid.local() == Some(name);
    let record = user.record.get();
    let viewer = Viewer::new(slice, record, name, &jid);
    if !own && (!viewer.is_subscribed() || blocking::blocks(slice, name, &jid)) {
        return;
    }
    let Some(bytes) = user.pep.clone() else {
        return;
    };
    let Some(index) = ArchivedNodes::access(bytes.bytes()) else {
        return;
    };
    let mut cold: Vec<(Bucket, Rc<str>)> = Vec::new();
    let mut warm: Vec<Vec<u8>> = Vec::new();
    for node in wants.lines().filter_map(|wanted| index.get(wanted)) {
        if !node.greets() || !(own || may_see_archived(&viewer, node)) {
            continue;
        }
        let item = match (node.inline.as_ref(), node.last.as_ref()) {
            (Some(item), _) => nodes::Item {
                id: item.id.as_str().to_owned(),
                seq: item.seq.to_native(),
                payload: item.payload.to_vec(),
            },
            (None, Some(id)) => {
                let bucket = node.bucket_of(id);
                match found {
                    Some((read, items)) if *read == bucket => {
                        match items.iter().find(|item| item.id == **id) {
                            Some(item) => item.clone(),
                            None => continue,
                        }
                    }
                    _ => {
                        cold.push((bucket, node.name.as_str().into()));
                        continue;
                    }
                }
            }
            (None, None) => continue,
        };
        let payload = node.config.deliver_payloads;
        warm.push(last_item(slice, name, node.name.as_str(), item, payload));
    }
    for stanza in warm {
        send_to(slice, name, &jid, &stanza);
    }
    for (bucket, node) in cold {
        let source = Source {
            name: name.into(),
            bucket: Some(bucket),
        };
        enlist(slice, source, to, &node);
    }
}

/// A notification of an item that was published before (XEP-0060 section 12.7: with its time).
fn last_item(slice: &Slice, name: &str, node: &str, item: nodes::Item, payload: bool) -> Vec<u8> {
    let bare = format!("{name}@{}", slice.env.domain);
    let at = Id(item.seq).unix_ms();
    let mut inner = Event::Published { item, payload }.element(node);
    inner.extend_from_slice(b"<delay xmlns='urn:xmpp:delay'");
    attribute("stamp", &super::time::stamp_ms(at), &mut inner);
    inner.extend_from_slice(b"/>");
    event::message(&bare, &inner)
}

fn send_to(slice: &mut Slice, name: &str, to: &Jid<'_>, stanza: &[u8]) {
    let Some(rest) = stanza.strip_prefix(event::START) else {
        return;
    };
    let mut out = slice.buffer();
    out.extend_from_slice(event::START);
    attribute("to", to.as_str(), &mut out);
    out.extend_from_slice(rest);
    let bare = format!("{name}@{}", slice.env.domain);
    slice.counters.pep_sent += 1;
    slice.route(to, &bare, &out, NOTICE, None);
    slice.reuse(out);
}

// ---- requests ----------------------------------------------------------------------------------------------------

/// The elements of a request that are of its own namespace.
fn parts(iq: &Iq) -> impl Iterator<Item = &Element> {
    iq.payload.elements().filter(|e| e.ns == iq.payload.ns)
}

fn request(slice: &mut Slice, iq: Iq) {
    let Some(action) = parts(&iq).next().cloned() else {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    };
    let error = match (&*action.name, iq.set) {
        ("items", false) => return items(slice, iq, action),
        ("affiliations", false) => return affiliations(slice, iq, action),
        // nobody subscribes here: the subscription to presence is one to all nodes
        ("subscriptions", _) => unsupported("retrieve-subscriptions"),
        ("subscribe" | "unsubscribe", true) => unsupported("subscribe"),
        ("options", _) => unsupported("subscription-options"),
        ("default", _) => unsupported("subscription-options"),
        ("publish" | "retract" | "create", true) if !iq.own() => refused_to(slice, &iq),
        ("publish", true) => return publish(slice, iq, action),
        ("retract", true) => return retract(slice, iq, action),
        ("create", true) => return create(slice, iq, action),
        _ => StanzaError::BAD_REQUEST,
    };
    slice.iq_error(&iq, &error);
}

/// Somebody else wants to change a node.
fn refused_to(slice: &Slice, iq: &Iq) -> StanzaError {
    let user = slice.user(iq.account());
    let known = user.is_some_and(|u| u.record.get().roster_item(iq.from.bare()).is_some());
    match known || slice.together(iq.account(), &iq.from) {
        true => StanzaError::FORBIDDEN,
        false => StanzaError::SERVICE_UNAVAILABLE,
    }
}

fn owner_request(slice: &mut Slice, iq: Iq) {
    let Some(action) = parts(&iq).next().cloned() else {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    };
    if !iq.own() {
        let error = refused_to(slice, &iq);
        return slice.iq_error(&iq, &error);
    }
    let node = action.get("node").unwrap_or_default().to_owned();
    let error = match (&*action.name, iq.set) {
        ("default", false) => {
            let form = Config::personal().form(form::Kind::Form).element();
            let answer = Element::new("default", NS_OWNER).child(form);
            let answer = Element::new("pubsub", NS_OWNER).child(answer);
            return slice.iq_result(&iq, Some(answer));
        }
        _ if node.is_empty() => refused(StanzaError::BAD_REQUEST, "nodeid-required"),
        ("configure", false) => return show_config(slice, iq, node),
        ("configure", true) => return configure(slice, iq, node, action),
        ("delete", true) => return change(slice, iq, node, Op::Delete, None),
        ("purge", true) => return change(slice, iq, node, Op::Purge, None),
        ("affiliations", false) => return show_affiliations(slice, iq, node),
        ("affiliations", true) => return affiliate(slice, iq, node, action),
        ("subscriptions", _) => unsupported("manage-subscriptions"),
        _ => StanzaError::BAD_REQUEST,
    };
    slice.iq_error(&iq, &error);
}

/// One change that the owner asked for; `answer` goes into the result.
fn change(slice: &mut Slice, iq: Iq, node: String, op: Op, answer: Option<Element>) {
    let name = iq.account().to_owned();
    begin(
        slice,
        &name,
        Box::new(move |slice, turn| match turn {
            Err(error) => slice.iq_error(&iq, &error),
            Ok(turn) => {
                let documents = vcard4::goes_with(&turn.nodes, &node, &op);
                let change = Change {
                    ops: vec![(node, op)],
                    documents,
                };
                commit(slice, turn, change, move |slice, result| match result {
                    Ok(()) => slice.iq_result(&iq, answer),
                    Err(error) => slice.iq_error(&iq, &error),
                });
            }
        }),
    );
}

/// What a client wants to publish.
struct Publication {
    node: String,
    id: Option<String>,
    payload: Vec<u8>,
    options: Option<Values>,
}

impl Publication {
    fn of(iq: &Iq, action: &Element) -> Result<Publication, StanzaError> {
        let mut items = action.elements().filter(|e| e.is("item", NS));
        let item = items.next();
        if items.next().is_some() {
            return Err(refused(StanzaError::BAD_REQUEST, "max-items-exceeded"));
        }
        let item = item.ok_or(refused(StanzaError::BAD_REQUEST, "item-required"))?;
        let mut payloads = item.elements();
        let payload = payloads
            .next()
            .ok_or(refused(StanzaError::BAD_REQUEST, "payload-required"))?;
        if payloads.next().is_some() || payload.ns.is_empty() {
            return Err(INVALID_PAYLOAD);
        }
        let mut bytes = Vec::new();
        payload.write(&mut bytes, "");
        let options = match iq.payload.find("publish-options", NS) {
            Some(options) => Values::of(options, config::OPTIONS_FORM)?,
            None => None,
        };
        let id = item.get("id").filter(|id| !id.is_empty());
        Ok(Publication {
            node: action.get("node").unwrap_or_default().to_owned(),
            id: id.map(str::to_owned),
            payload: bytes,
            options,
        })
    }
}

/// XEP-0060 section 7.1.
fn publish(slice: &mut Slice, iq: Iq, action: Element) {
    let Publication {
        node,
        id,
        payload,
        options,
    } = match Publication::of(&iq, &action) {
        Ok(publication) => publication,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    if node == bookmarks::OLD_NODE {
        return bookmarks::publish_old(slice, iq, &payload);
    }
    if node == bookmarks::NODE
        && let Err(error) = bookmarks::check(id.as_deref(), &payload)
    {
        return slice.iq_error(&iq, &error);
    }
    let id = id.unwrap_or_else(crate::xmpp::random_id);
    let answer = Element::new("pubsub", NS).child(
        Element::new("publish", NS)
            .attr("node", node.as_str())
            .child(Element::new("item", NS).attr("id", id.as_str())),
    );
    let config = default_config(&node);
    let op = Op::Publish {
        id,
        payload,
        options,
        config,
    };
    if node == bookmarks::NODE {
        // what an older release, or a list in private storage, has comes first
        let name = iq.account().to_owned();
        return bookmarks::moved(slice, &name, move |slice, result| match result {
            Ok(()) => change(slice, iq, node, op, Some(answer)),
            Err(error) => slice.iq_error(&iq, &error),
        });
    }
    change(slice, iq, node, op, Some(answer));
}

/// XEP-0060 section 7.2.
fn retract(slice: &mut Slice, iq: Iq, action: Element) {
    let node = action.get("node").unwrap_or_default().to_owned();
    let items = action.elements().filter(|e| e.is("item", NS));
    let ids: Option<Vec<String>> = items.map(|e| e.get("id").map(str::to_owned)).collect();
    let Some(ids) = ids else {
        return slice.iq_error(&iq, &refused(StanzaError::BAD_REQUEST, "item-required"));
    };
    let notify = matches!(action.get("notify"), Some("1" | "true"));
    change(slice, iq, node, Op::Retract { ids, notify }, None);
}

/// XEP-0060 section 8.1. A node without a name gets one.
fn create(slice: &mut Slice, iq: Iq, action: Element) {
    let named = action.get("node").filter(|node| !node.is_empty());
    let node = named.map_or_else(crate::xmpp::random_id, str::to_owned);
    let config = default_config(&node);
    let values = match iq.payload.find("configure", NS) {
        Some(configure) => Values::of(configure, config::FORM),
        None => Ok(None),
    };
    let config = match values.and_then(|values| match values {
        Some(values) => config.with(&values),
        None => Ok(config),
    }) {
        Ok(config) => config,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let answer = named.is_none().then(|| {
        let create = Element::new("create", NS).attr("node", node.as_str());
        Element::new("pubsub", NS).child(create)
    });
    change(slice, iq, node, Op::Create { config }, answer);
}

/// Does `then` when the index of the account was read.
fn with_account(slice: &mut Slice, iq: Iq, then: impl FnOnce(&mut Slice, Iq) + 'static) {
    let name = iq.account().to_owned();
    with_index(slice, &name, move |slice, result| match result {
        Ok(()) => then(slice, iq),
        Err(_) => slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT),
    });
}

/// XEP-0060 section 8.2.1.
fn show_config(slice: &mut Slice, iq: Iq, node: String) {
    with_account(slice, iq, move |slice, iq| {
        match seen_node(slice, &iq, &node) {
            Err(error) => slice.iq_error(&iq, &error),
            Ok(found) => {
                let form = found.config.form(form::Kind::Form).element();
                let configure = Element::new("configure", NS_OWNER)
                    .attr("node", node)
                    .child(form);
                let answer = Element::new("pubsub", NS_OWNER).child(configure);
                slice.iq_result(&iq, Some(answer));
            }
        }
    });
}

/// XEP-0060 section 8.2.4.
fn configure(slice: &mut Slice, iq: Iq, node: String, action: Element) {
    let Some(x) = action.find("x", form::NS) else {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    };
    let values = match form::Answer::read(x, config::FORM) {
        Ok(form::Answer::Submitted(values)) => values,
        Ok(form::Answer::Cancelled) => return slice.iq_result(&iq, None),
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let name = iq.account().to_owned();
    begin(
        slice,
        &name,
        Box::new(move |slice, turn| {
            let turn = match turn {
                Ok(turn) => turn,
                Err(error) => return slice.iq_error(&iq, &error),
            };
            let config = match turn.nodes.get(&node) {
                Some(found) => found.config.with(&values),
                None => Err(StanzaError::ITEM_NOT_FOUND),
            };
            match config {
                Err(error) => {
                    slice.iq_error(&iq, &error);
                    end(slice, turn);
                }
                Ok(config) => {
                    let change = Change {
                        ops: vec![(node, Op::Configure { config })],
                        ..Change::default()
                    };
                    commit(slice, turn, change, move |slice, result| match result {
                        Ok(()) => slice.iq_result(&iq, None),
                        Err(error) => slice.iq_error(&iq, &error),
                    });
                }
            }
        }),
    );
}

fn affiliation_name(affiliation: Affiliation) -> &'static str {
    match affiliation {
        Affiliation::Member => "member",
        Affiliation::Outcast => "outcast",
    }
}

/// XEP-0060 section 8.9.1: who has one, for the owner.
fn show_affiliations(slice: &mut Slice, iq: Iq, node: String) {
    with_account(slice, iq, move |slice, iq| {
        let found = match seen_node(slice, &iq, &node) {
            Ok(found) => found,
            Err(error) => return slice.iq_error(&iq, &error),
        };
        let one = |jid: &str, name: &str| {
            Element::new("affiliation", NS_OWNER)
                .attr("jid", jid)
                .attr("affiliation", name)
        };
        let list = Element::new("affiliations", NS_OWNER)
            .attr("node", node)
            .child(one(iq.from.bare(), "owner"));
        let list = found
            .affiliations
            .iter()
            .fold(list, |list, (jid, affiliation)| {
                list.child(one(jid, affiliation_name(*affiliation)))
            });
        slice.iq_result(&iq, Some(Element::new("pubsub", NS_OWNER).child(list)));
    });
}

/// XEP-0060 section 8.9.2.
fn affiliate(slice: &mut Slice, iq: Iq, node: String, action: Element) {
    let wanted = action.elements().filter(|e| e.is("affiliation", NS_OWNER));
    let read = |e: &Element| -> Result<(String, Option<Affiliation>), StanzaError> {
        let jid = e.get("jid").ok_or(StanzaError::BAD_REQUEST)?;
        let jid = Jid::parse(jid).map_err(|_| StanzaError::JID_MALFORMED)?;
        let affiliation = match e.get("affiliation") {
            Some("member") => Some(Affiliation::Member),
            Some("outcast") => Some(Affiliation::Outcast),
            Some("none") => None,
            _ => return Err(StanzaError::NOT_ACCEPTABLE),
        };
        if jid.bare() == iq.from.bare() {
            // the owner stays what he is
            return Err(StanzaError::NOT_ACCEPTABLE);
        }
        Ok((jid.bare().to_owned(), affiliation))
    };
    match wanted.map(read).collect::<Result<Vec<_>, _>>() {
        Err(error) => slice.iq_error(&iq, &error),
        Ok(jids) => change(slice, iq, node, Op::Affiliate { jids }, None),
    }
}

/// XEP-0060 section 5.7: the asker's own affiliations with the account's nodes.
fn affiliations(slice: &mut Slice, iq: Iq, action: Element) {
    let only = action.get("node").map(str::to_owned);
    with_account(slice, iq, move |slice, iq| {
        let nodes = nodes_of(slice, iq.account()).unwrap_or_default();
        let mut list = Element::new("affiliations", NS);
        for node in nodes.nodes.iter() {
            let affiliation = match node.affiliation(iq.from.bare()) {
                _ if iq.own() => "owner",
                Some(affiliation) => affiliation_name(affiliation),
                None => continue,
            };
            if only.as_ref().is_none_or(|only| *only == node.name) {
                let one = Element::new("affiliation", NS)
                    .attr("node", node.name.as_str())
                    .attr("affiliation", affiliation);
                list = list.child(one);
            }
        }
        if !iq.own() && list.children.is_empty() {
            return slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
        }
        slice.iq_result(&iq, Some(Element::new("pubsub", NS).child(list)));
    });
}

/// XEP-0060 section 6.5: items of a node, page by page if there are many.
fn items(slice: &mut Slice, iq: Iq, action: Element) {
    let node = action.get("node").unwrap_or_default().to_owned();
    let wanted = match Wanted::of(&iq.payload) {
        Ok(wanted) => wanted,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let newest = match action.get("max_items").map(str::parse::<usize>) {
        None => None,
        Some(Ok(most)) if most > 0 => Some(most),
        Some(_) => return slice.iq_error(&iq, &StanzaError::BAD_REQUEST),
    };
    if node.is_empty() {
        let error = refused(StanzaError::BAD_REQUEST, "nodeid-required");
        return slice.iq_error(&iq, &error);
    }
    let ids: Vec<String> = action
        .elements()
        .filter(|e| e.is("item", NS))
        .filter_map(|e| e.get("id").map(str::to_owned))
        .collect();
    let old = node == bookmarks::OLD_NODE && iq.own();
    let page = move |slice: &mut Slice, iq: Iq, node: String, items: Vec<nodes::Item>| {
        let answer = match page(slice, &node, items, &ids, newest, &wanted) {
            Ok(answer) => answer,
            Err(error) => return slice.iq_error(&iq, &error),
        };
        slice.iq_result(&iq, Some(answer));
    };
    if old || (node == bookmarks::NODE && iq.own()) {
        let name = iq.account().to_owned();
        return bookmarks::items(slice, &name, old, move |slice, found| match found {
            Ok(found) => page(slice, iq, node, found),
            Err(error) => slice.iq_error(&iq, &error),
        });
    }
    with_account(slice, iq, move |slice, iq| {
        if let Err(error) = seen_node(slice, &iq, &node) {
            return slice.iq_error(&iq, &error);
        }
        let name = iq.account().to_owned();
        read_items(
            slice,
            &name,
            &node.clone(),
            Box::new(move |slice, found| match found {
                Ok(found) => page(slice, iq, node, found),
                Err(error) => slice.iq_error(&iq, &error),
            }),
        );
    });
}

/// The answer with what is wanted of a node's items (oldest first). Without a wish for a page all are given, up to the bound of
/// a page; then the newest, and the answer says that there are more.
fn page(
    slice: &Slice,
    node: &str,
    mut items: Vec<nodes::Item>,
    ids: &[String],
    newest: Option<usize>,
    wanted: &Wanted,
) -> Result<Element, StanzaError> {
    if !ids.is_empty() {
        let ids: HashSet<&str> = ids.iter().map(String::as_str).collect();
        items.retain(|item| ids.contains(&*item.id));
        if items.is_empty() {
            return Err(StanzaError::ITEM_NOT_FOUND);
        }
    }
    if let Some(most) = newest {
        let gone = items.len().saturating_sub(most);
        items.drain(..gone);
    }
    let count = items.len();
    let at = |id: &String| {
        let found = items.iter().position(|item| item.id == *id);
        found.ok_or(StanzaError::ITEM_NOT_FOUND)
    };
    let from = wanted
        .after
        .as_ref()
        .map(at)
        .transpose()?
        .map_or(0, |n| n + 1);
    let to = wanted.before.as_ref().map(at).transpose()?.unwrap_or(count);
    let limit = slice.env.limits.pubsub_page_items_max as u64;
    let most = wanted.max.unwrap_or(limit).min(limit) as usize;
    let asked = wanted.max.is_some() || wanted.after.is_some() || wanted.backwards;
    let backwards = wanted.backwards || !asked;
    let range = from.min(to)..to;
    let mut bytes = 0;
    let mut fits = |n: &usize| {
        bytes += items[*n].bytes();
        bytes <= PAGE_BYTES_MAX || bytes == items[*n].bytes()
    };
    let shown: Vec<usize> = match backwards {
        false => range.take(most).take_while(&mut fits).collect(),
        true => {
            let mut shown: Vec<_> = range.rev().take(most).take_while(&mut fits).collect();
            shown.reverse();
            shown
        }
    };
    let mut list = Element::new("items", NS).attr("node", node);
    for n in &shown {
        let item = &items[*n];
        let mut element = Element::new("item", NS).attr("id", item.id.as_str());
        if let Some(payload) = payload(item) {
            element = element.child(payload);
        }
        list = list.child(element);
    }
    let answer = Element::new("pubsub", NS).child(list);
    if !asked && shown.len() == count {
        return Ok(answer);
    }
    let ends = shown.first().zip(shown.last());
    let set = Shown {
        ends: ends.map(|(a, b)| (items[*a].id.clone(), items[*b].id.clone())),
        index: shown.first().map(|n| *n as u64),
        count: Some(count as u64),
    };
    Ok(answer.child(set.element()))
}

/// The payload of a stored item.
pub fn payload(item: &nodes::Item) -> Option<Element> {
    Element::parse(std::str::from_utf8(&item.payload).ok()?).ok()
}

/// The user's index for his copy in Redis, if it is known and not too long for that.
pub fn stored(user: &User) -> Option<&[u8]> {
    let index = user.pep.as_ref()?.bytes();
    (index.len() <= crate::store::warm::INDEX_BYTES_MAX).then_some(index)
}

/// The nodes' part of [`crate::xmpp::slice::User`] that counts as its bytes in the cache.
pub fn bytes(user: &User) -> usize {
    user.pep
        .as_ref()
        .map_or(0, |index| index.bytes.len() + size_of::<Index>())
}

#[cfg(test)]
mod tests;
