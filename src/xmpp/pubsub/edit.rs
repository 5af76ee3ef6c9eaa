//! Changes of a user's nodes, made in memory: all of them, or none.
//!
//! First [`wanted`] says which buckets must be read, then [`Edit::apply`] makes one [`Op`] after the other, and [`Edit::finish`] gives
//! the documents to be written together, and what is to be told when they are. Buckets come before the index. If a crash parts the
//! two (a group of the journal that did not fit into one segment; nobody was told yet), counts are off and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use super::config::Config;
use super::event::Event;
use super::nodes::{self, Affiliation, Bucket, Item, Node, Nodes};
use super::{NS_ERRORS, refused};
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::Values;

/// What a user's nodes may grow to.
#[derive(Clone, Debug)]
pub struct Bounds {
    pub nodes_max: usize,
    /// Of one node.
    pub items_max: usize,
    /// Of one item's payload.
    pub item_bytes_max: usize,
    /// Of all items, names and lists together.
    pub bytes_max: usize,
    /// Of one node.
    pub affiliations_max: usize,
}

/// Bytes of the name of a node or an item (as of a JID: XEP-0060 section 12.7 recommends no bound).
const NAME_BYTES_MAX: usize = 3071;

/// What an item, and a node, cost beside their texts, as far as the bound on bytes is concerned.
const ITEM_BYTES: usize = 24;
const NODE_BYTES: usize = 96;

/// A change of one node.
#[derive(Clone, Debug)]
pub enum Op {
    Create {
        config: Config,
    },
    Configure {
        config: Config,
    },
    Affiliate {
        jids: Vec<(String, Option<Affiliation>)>,
    },
    Publish {
        id: String,
        payload: Vec<u8>,
        /// Preconditions; for a node that is not there, part of its configuration.
        options: Option<Values>,
        /// Of a node that is not there.
        config: Config,
    },
    Retract {
        ids: Vec<String>,
        /// Tell of it whatever the configuration says (section 7.2.2.1).
        notify: bool,
    },
    Purge,
    Delete,
}

/// The buckets that must be read before `op` can be applied to the node `name`.
pub fn wanted(nodes: &Nodes, name: &str, op: &Op, bounds: &Bounds) -> Vec<Bucket> {
    let Some(node) = nodes.get(name) else {
        return Vec::new();
    };
    let all = node.all_buckets();
    match op {
        Op::Publish { id, payload, .. } => {
            let full = node.items as usize >= most(&node.config, bounds);
            let grows = node.bytes as usize + id.len() + payload.len()
                > nodes::BUCKET_BYTES * usize::from(node.buckets);
            match full || grows || all.is_empty() {
                true => all,
                false => vec![node.bucket_of(id)],
            }
        }
        Op::Retract { .. } | Op::Configure { .. } => all,
        // they are overwritten
        Op::Create { .. } | Op::Affiliate { .. } | Op::Purge | Op::Delete => Vec::new(),
    }
}

fn most(config: &Config, bounds: &Bounds) -> usize {
    (config.max_items as usize).min(bounds.items_max).max(1)
}

/// Something to be told of a node as it is, or was, then.
#[derive(Clone, Debug)]
pub struct Told {
    pub node: Node,
    pub event: Event,
}

/// What is to be written, and told.
pub struct Outcome {
    pub nodes: Nodes,
    /// Keys and values; an empty value removes.
    pub documents: Vec<(String, Vec<u8>)>,
    pub told: Vec<Told>,
}

pub struct Edit<'b> {
    pub nodes: Nodes,
    buckets: BTreeMap<Bucket, Vec<Item>>,
    dirty: BTreeSet<Bucket>,
    told: Vec<Told>,
    changed: bool,
    bounds: &'b Bounds,
}

impl<'b> Edit<'b> {
    pub fn new(nodes: Nodes, buckets: BTreeMap<Bucket, Vec<Item>>, bounds: &'b Bounds) -> Edit<'b> {
        Edit {
            nodes,
            buckets,
            dirty: BTreeSet::new(),
            told: Vec::new(),
            changed: false,
            bounds,
        }
    }

    /// Makes a change; `seq` is the item's, if it is a publication. After an error the edit is of no use any more.
    pub fn apply(&mut self, name: &str, op: Op, seq: u64) -> Result<(), StanzaError> {
        if name.is_empty() {
            return Err(refused(StanzaError::BAD_REQUEST, "nodeid-required"));
        }
        if name.len() > NAME_BYTES_MAX {
            return Err(StanzaError::NOT_ACCEPTABLE.text("the name of the node is too long"));
        }
        let at = self.nodes.position(name);
        match (op, at) {
            (Op::Create { .. }, Ok(_)) => return Err(StanzaError::CONFLICT),
            (Op::Create { config }, Err(at)) => {
                self.insert(at, name, config)?;
            }
            (
                Op::Publish {
                    id,
                    payload,
                    options,
                    config,
                },
                at,
            ) => {
                self.publish(name, at, id, payload, options, config, seq)?;
            }
            (_, Err(_)) => return Err(StanzaError::ITEM_NOT_FOUND),
            (Op::Configure { config }, Ok(at)) => self.configure(at, config)?,
            (Op::Affiliate { jids }, Ok(at)) => self.affiliate(at, jids)?,
            (Op::Retract { ids, notify }, Ok(at)) => self.retract(at, &ids, notify)?,
            (Op::Purge, Ok(at)) => {
                self.empty(at);
                self.tell(at, Event::Purged);
            }
            (Op::Delete, Ok(at)) => {
                self.empty(at);
                if self.nodes.nodes[at].config.notify_delete {
                    self.tell(at, Event::Deleted);
                }
                self.nodes.nodes.remove(at);
            }
        }
        self.changed = true;
        if self.bytes() > self.bounds.bytes_max {
            return Err(StanzaError::POLICY_VIOLATION.text("the nodes of the account are full"));
        }
        Ok(())
    }

    pub fn finish(self) -> Outcome {
        let mut documents: Vec<(String, Vec<u8>)> = Vec::new();
        let mut buckets = self.buckets;
        for bucket in self.dirty {
            let items = buckets.remove(&bucket).unwrap_or_default();
            documents.push((nodes::key(bucket), nodes::encode_items(items)));
        }
        if self.changed {
            documents.push((nodes::KEY.to_owned(), self.nodes.encode()));
        }
        Outcome {
            nodes: self.nodes,
            documents,
            told: self.told,
        }
    }

    fn bytes(&self) -> usize {
        let of = |node: &Node| {
            let lists: usize = node
                .affiliations
                .iter()
                .map(|(jid, _)| jid.len() + 16)
                .sum();
            let groups: usize = node.config.roster_groups.iter().map(|g| g.len() + 16).sum();
            NODE_BYTES
                + node.name.len()
                + lists
                + groups
                + node.items as usize * ITEM_BYTES
                + node.bytes as usize
        };
        self.nodes.nodes.iter().map(of).sum()
    }

    fn insert(&mut self, at: usize, name: &str, config: Config) -> Result<(), StanzaError> {
        if self.nodes.nodes.len() >= self.bounds.nodes_max {
            return Err(refused(StanzaError::CONFLICT, "max-nodes-exceeded").text("too many nodes"));
        }
        let node = Node::new(name, self.nodes.free_number(), config);
        self.nodes.nodes.insert(at, node);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn publish(
        &mut self,
        name: &str,
        at: Result<usize, usize>,
        id: String,
        payload: Vec<u8>,
        options: Option<Values>,
        config: Config,
        seq: u64,
    ) -> Result<(), StanzaError> {
        if payload.len() > self.bounds.item_bytes_max {
            return Err(refused(StanzaError::NOT_ACCEPTABLE, "payload-too-big"));
        }
        if id.len() > NAME_BYTES_MAX {
            return Err(StanzaError::NOT_ACCEPTABLE.text("the id of the item is too long"));
        }
        let at = match at {
            Ok(at) => {
                if let Some(options) = &options {
                    self.nodes.nodes[at].config.meets(options)?;
                }
                at
            }
            Err(at) => {
                let config = match &options {
                    Some(options) => config.with(options)?,
                    None => config,
                };
                self.insert(at, name, config)?;
                at
            }
        };
        let item = Item { id, seq, payload };
        let told = Event::Published {
            payload: self.nodes.nodes[at].config.deliver_payloads,
            item: item.clone(),
        };
        if self.nodes.nodes[at].config.persist {
            self.put(at, item)?;
            self.trim(at)?;
            self.grow(at)?;
        }
        self.tell(at, told);
        Ok(())
    }

    fn put(&mut self, at: usize, item: Item) -> Result<(), StanzaError> {
        let node = &self.nodes.nodes[at];
        let single = most(&node.config, self.bounds) == 1;
        if single && item.bytes() <= nodes::INLINE_BYTES_MAX {
            self.empty(at);
            let node = &mut self.nodes.nodes[at];
            (node.items, node.bytes) = (1, item.bytes() as u64);
            node.last = Some(item.id.clone());
            node.inline = Some(item);
            return Ok(());
        }
        if single {
            self.empty(at);
        }
        self.unline(at);
        let bucket = self.nodes.nodes[at].bucket_of(&item.id);
        let items = self.bucket(at, bucket)?;
        let old = items.iter().position(|old| old.id == item.id);
        let old = old.map(|old| items.remove(old).bytes());
        let (bytes, id) = (item.bytes() as u64, item.id.clone());
        items.push(item);
        let node = &mut self.nodes.nodes[at];
        match old {
            Some(old) => node.bytes = node.bytes.saturating_sub(old as u64),
            None => node.items += 1,
        }
        node.bytes += bytes;
        node.last = Some(id);
        Ok(())
    }

    /// The inline item goes into its bucket, because others will come.
    fn unline(&mut self, at: usize) {
        let node = &mut self.nodes.nodes[at];
        if let Some(item) = node.inline.take() {
            let bucket = node.bucket_of(&item.id);
            self.buckets.insert(bucket, vec![item]);
            self.dirty.insert(bucket);
        }
    }

    /// The oldest items go when there are too many.
    fn trim(&mut self, at: usize) -> Result<(), StanzaError> {
        let most = most(&self.nodes.nodes[at].config, self.bounds);
        while self.nodes.nodes[at].items as usize > most {
            let mut oldest: Option<(u64, Bucket)> = None;
            for bucket in self.nodes.nodes[at].all_buckets() {
                for item in self.bucket(at, bucket)?.iter() {
                    if oldest.is_none_or(|(seq, _)| item.seq < seq) {
                        oldest = Some((item.seq, bucket));
                    }
                }
            }
            let Some((seq, bucket)) = oldest else { break };
            let items = self.bucket(at, bucket)?;
            let Some(found) = items.iter().position(|item| item.seq == seq) else {
                break;
            };
            let bytes = items.remove(found).bytes() as u64;
            let node = &mut self.nodes.nodes[at];
            node.items = node.items.saturating_sub(1);
            node.bytes = node.bytes.saturating_sub(bytes);
        }
        Ok(())
    }

    /// Twice as many buckets, while they hold too much.
    fn grow(&mut self, at: usize) -> Result<(), StanzaError> {
        let node = &self.nodes.nodes[at];
        let mut wanted = node.buckets;
        while wanted < nodes::BUCKETS_MAX
            && node.bytes as usize > nodes::BUCKET_BYTES * usize::from(wanted)
            && node.items > u32::from(wanted)
        {
            wanted *= 2;
        }
        if wanted == node.buckets || node.inline.is_some() {
            return Ok(());
        }
        let mut all = Vec::new();
        for bucket in self.nodes.nodes[at].all_buckets() {
            all.append(self.bucket(at, bucket)?);
        }
        all.sort_by_key(|item| item.seq);
        self.nodes.nodes[at].buckets = wanted;
        for bucket in self.nodes.nodes[at].all_buckets() {
            self.buckets.insert(bucket, Vec::new());
            self.dirty.insert(bucket);
        }
        for item in all {
            let bucket = self.nodes.nodes[at].bucket_of(&item.id);
            self.buckets.entry(bucket).or_default().push(item);
        }
        Ok(())
    }

    fn retract(&mut self, at: usize, ids: &[String], notify: bool) -> Result<(), StanzaError> {
        if ids.is_empty() {
            return Err(refused(StanzaError::BAD_REQUEST, "item-required"));
        }
        for id in ids {
            let node = &mut self.nodes.nodes[at];
            if node.inline.as_ref().is_some_and(|item| item.id == *id) {
                self.empty(at);
                continue;
            }
            if node.all_buckets().is_empty() {
                return Err(StanzaError::ITEM_NOT_FOUND);
            }
            let bucket = node.bucket_of(id);
            let items = self.bucket(at, bucket)?;
            let Some(found) = items.iter().position(|item| item.id == *id) else {
                return Err(StanzaError::ITEM_NOT_FOUND);
            };
            let bytes = items.remove(found).bytes() as u64;
            let node = &mut self.nodes.nodes[at];
            node.items = node.items.saturating_sub(1);
            node.bytes = node.bytes.saturating_sub(bytes);
        }
        let node = &self.nodes.nodes[at];
        if node.inline.is_none() {
            let mut newest: Option<(u64, String)> = None;
            for bucket in node.all_buckets() {
                for item in self.bucket(at, bucket)?.iter() {
                    if newest.as_ref().is_none_or(|(seq, _)| *seq < item.seq) {
                        newest = Some((item.seq, item.id.clone()));
                    }
                }
            }
            self.nodes.nodes[at].last = newest.map(|(_, id)| id);
        }
        if notify || self.nodes.nodes[at].config.notify_retract {
            self.tell(at, Event::Retracted { ids: ids.to_vec() });
        }
        Ok(())
    }

    /// No items.
    fn empty(&mut self, at: usize) {
        for bucket in self.nodes.nodes[at].all_buckets() {
            self.buckets.insert(bucket, Vec::new());
            self.dirty.insert(bucket);
        }
        let node = &mut self.nodes.nodes[at];
        (node.items, node.bytes, node.buckets) = (0, 0, 1);
        (node.last, node.inline) = (None, None);
    }

    fn configure(&mut self, at: usize, config: Config) -> Result<(), StanzaError> {
        self.nodes.nodes[at].config = config;
        if most(&self.nodes.nodes[at].config, self.bounds) > 1 {
            self.unline(at);
        }
        self.trim(at)?;
        if self.nodes.nodes[at].config.notify_config {
            self.tell(at, Event::Configured);
        }
        Ok(())
    }

    fn affiliate(
        &mut self,
        at: usize,
        jids: Vec<(String, Option<Affiliation>)>,
    ) -> Result<(), StanzaError> {
        let too_many = StanzaError::RESOURCE_CONSTRAINT.text("too many affiliations");
        if jids.len() > self.bounds.affiliations_max {
            return Err(too_many);
        }
        let list = &mut self.nodes.nodes[at].affiliations;
        for (jid, affiliation) in jids {
            list.retain(|(one, _)| *one != jid);
            if let Some(affiliation) = affiliation {
                list.push((jid, affiliation));
            }
        }
        list.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        if list.len() > self.bounds.affiliations_max {
            return Err(too_many);
        }
        Ok(())
    }

    /// A bucket that may be changed; an error: it holds items and was not read.
    fn bucket(&mut self, at: usize, bucket: Bucket) -> Result<&mut Vec<Item>, StanzaError> {
        let node = &self.nodes.nodes[at];
        if !self.buckets.contains_key(&bucket) && node.all_buckets().contains(&bucket) {
            debug_assert!(false, "bucket {bucket:?} was not read");
            return Err(StanzaError::INTERNAL_SERVER_ERROR);
        }
        self.dirty.insert(bucket);
        Ok(self.buckets.entry(bucket).or_default())
    }

    fn tell(&mut self, at: usize, event: Event) {
        let node = self.nodes.nodes[at].clone();
        self.told.push(Told { node, event });
    }
}

/// More than one op of a request, or what makes no sense in one.
pub const INVALID_PAYLOAD: StanzaError =
    StanzaError::BAD_REQUEST.detail("invalid-payload", NS_ERRORS);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        nodes_max: 10,
        items_max: 300,
        item_bytes_max: 20_000,
        bytes_max: 200_000,
        affiliations_max: 3,
    };

    /// What is stored of a user.
    #[derive(Default)]
    struct Store(BTreeMap<String, Vec<u8>>);

    impl Store {
        fn nodes(&self) -> Nodes {
            Nodes::decode(self.0.get(nodes::KEY).map_or(&[], |bytes| bytes)).unwrap()
        }

        fn bucket(&self, bucket: Bucket) -> Vec<Item> {
            let bytes = self.0.get(&nodes::key(bucket));
            nodes::decode_items(bytes.map_or(&[], |bytes| bytes)).unwrap()
        }

        /// Ids in order; also that the counts are right.
        fn items(&self, name: &str) -> Vec<String> {
            let nodes = self.nodes();
            let Some(node) = nodes.get(name) else {
                return Vec::new();
            };
            let mut all: Vec<Item> = node.inline.iter().cloned().collect();
            for bucket in node.all_buckets() {
                let items = self.bucket(bucket);
                assert!(items.iter().all(|item| node.bucket_of(&item.id) == bucket));
                all.extend(items);
            }
            all.sort_by_key(|item| item.seq);
            assert_eq!(all.len(), node.items as usize);
            assert_eq!(
                all.iter().map(Item::bytes).sum::<usize>() as u64,
                node.bytes
            );
            assert_eq!(all.last().map(|item| &item.id), node.last.as_ref());
            all.into_iter().map(|item| item.id).collect()
        }

        /// Bytes that were written.
        fn apply(&mut self, name: &str, op: Op, seq: u64) -> Result<usize, StanzaError> {
            let nodes = self.nodes();
            let wanted = wanted(&nodes, name, &op, &BOUNDS);
            let buckets = wanted.into_iter().map(|b| (b, self.bucket(b))).collect();
            let mut edit = Edit::new(nodes, buckets, &BOUNDS);
            edit.apply(name, op, seq)?;
            let outcome = edit.finish();
            let written = outcome.documents.iter().map(|(_, value)| value.len()).sum();
            for (key, value) in outcome.documents {
                self.0.insert(key, value);
            }
            assert_eq!(self.nodes(), outcome.nodes);
            Ok(written)
        }
    }

    fn publish(id: &str, bytes: usize, max_items: u32) -> Op {
        let config = Config {
            max_items,
            ..Config::personal()
        };
        Op::Publish {
            id: id.into(),
            payload: vec![b'x'; bytes],
            options: None,
            config,
        }
    }

    #[test]
    fn what_a_publication_writes_is_bounded() {
        let mut store = Store::default();
        // what a usual client has
        let names = [
            "http://jabber.org/protocol/mood",
            "http://jabber.org/protocol/nick",
            "http://jabber.org/protocol/tune",
            "urn:xmpp:avatar:metadata",
            "eu.siacs.conversations.axolotl.devicelist",
            "urn:xmpp:omemo:2:devices",
        ];
        for (n, name) in names.iter().enumerate() {
            store
                .apply(name, publish("current", 200, 1), n as u64)
                .unwrap();
        }
        let large = [
            "urn:xmpp:avatar:data",
            "urn:xmpp:vcard4",
            "urn:xmpp:bookmarks:1",
        ];
        for (n, name) in large.iter().enumerate() {
            store
                .apply(name, publish("current", 6_000, 1), n as u64)
                .unwrap();
        }
        let mut most = 0;
        for round in 0..3 {
            for n in 0..200 {
                let id = format!("someone{n:03}@example.com");
                let written = store.apply("mds", publish(&id, 130, Config::MAX), 100 + n);
                let written = written.unwrap();
                if round == 2 {
                    most = most.max(written);
                }
            }
        }
        let index = store.0[nodes::KEY].len();
        assert!(index < 2500, "an index of {index} bytes");
        assert!(most < 9_000, "{most} bytes for a displayed marker");
        let mood = publish("current", 200, 1);
        let written = store.apply(names[0], mood, 1000).unwrap();
        assert!(written < 3000, "{written} bytes for a mood");
    }

    #[test]
    fn nothing_grows_beyond_its_bound() {
        let mut store = Store::default();
        let big = store.apply("n", publish("i", BOUNDS.item_bytes_max + 1, 1), 1);
        assert_eq!(big.unwrap_err().detail.unwrap().0, "payload-too-big");
        for n in 0..11 {
            let made = store.apply(&format!("n{n}"), publish("i", 10, 1), n);
            assert_eq!(made.is_ok(), n < 10);
            if let Err(error) = made {
                assert_eq!(error.detail.unwrap().0, "max-nodes-exceeded");
            }
        }
        for n in 0..400 {
            store
                .apply("n1", publish(&format!("i{n}"), 10, Config::MAX), 100 + n)
                .unwrap();
        }
        assert_eq!(store.items("n1"), ["i399"], "it was made for one item");
        let many = Config {
            max_items: Config::MAX,
            ..Config::personal()
        };
        store
            .apply("n1", Op::Configure { config: many }, 0)
            .unwrap();
        for n in 0..400 {
            store
                .apply("n1", publish(&format!("i{n}"), 10, 1), 1000 + n)
                .unwrap();
        }
        assert_eq!(store.items("n1").len(), BOUNDS.items_max);
        assert_eq!(store.items("n1")[0], "i100");
        let mut refused = None;
        for n in 0..20 {
            let id = format!("big{n}");
            refused = store.apply("n1", publish(&id, 20_000, 1), 2000 + n).err();
            if refused.is_some() {
                break;
            }
        }
        assert_eq!(refused.unwrap().condition, "policy-violation");
        let jids = (0..4).map(|n| (format!("u{n}@x"), Some(Affiliation::Member)));
        let jids = jids.collect();
        let error = store.apply("n1", Op::Affiliate { jids }, 0).unwrap_err();
        assert_eq!(error.condition, "resource-constraint");
    }

    #[test]
    fn documents_of_another_release_are_not_read() {
        let mut bytes = Nodes::default().encode();
        bytes[0] = 9;
        assert!(Nodes::decode(&bytes).unwrap_err().contains("version 9"));
        assert!(nodes::decode_items(&[9, 0]).is_err());
    }

    proptest! {
        /// Against a list in memory.
        #[test]
        fn a_node_keeps_its_newest_items(
            steps in proptest::collection::vec((0u8..20, 0u8..60, 0usize..3), 1..120), most in 1u32..40,
        ) {
            let mut store = Store::default();
            let mut model: Vec<String> = Vec::new();
            let mut most = most;
            for (seq, (what, id, size)) in steps.into_iter().enumerate() {
                let id = format!("item{id}");
                match what {
                    0 => {
                        let done = store.apply("n", Op::Purge, 0);
                        prop_assert_eq!(done.is_ok(), store.nodes().get("n").is_some());
                        model.clear();
                    }
                    1 if store.nodes().get("n").is_some() => {
                        most = (most * 7 + 3) % 40 + 1;
                        let config = Config { max_items: most, ..Config::personal() };
                        store.apply("n", Op::Configure { config }, 0).unwrap();
                        let gone = model.len().saturating_sub(most as usize);
                        model.drain(..gone);
                    }
                    2..=5 => {
                        let known = model.iter().position(|one| *one == id);
                        let op = Op::Retract { ids: vec![id], notify: false };
                        prop_assert_eq!(store.apply("n", op, 0).is_ok(), known.is_some());
                        if let Some(at) = known { model.remove(at); }
                    }
                    _ => {
                        let bytes = [10, 900, 3000][size];
                        store.apply("n", publish(&id, bytes, most), seq as u64 + 1).unwrap();
                        model.retain(|one| *one != id);
                        model.push(id);
                        let gone = model.len().saturating_sub(most as usize);
                        model.drain(..gone);
                    }
                }
                prop_assert_eq!(&store.items("n"), &model);
            }
        }

        #[test]
        fn damaged_documents_never_panic(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut store = Store::default();
            store.apply("n", publish("i", 100, 1), 1).unwrap();
            store.apply("m", publish("i", 2000, 5), 1).unwrap();
            for value in store.0.values() {
                let mut bytes = value.clone();
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
                let _ = Nodes::decode(&bytes);
                let _ = nodes::decode_items(&bytes);
            }
        }
    }
}
