//! Presence subscriptions (RFC 6121 section 3 and appendix A, with pre-approval).
//!
//! In: presence of type subscribe, subscribed, unsubscribe and unsubscribed, from the user's client ([`outbound`]) and
//! from contacts ([`inbound`]). Out: the contact's new state in the record, roster pushes, the stanza itself where the
//! table says so, and the presence that follows from it. [`State`] is the table, without any effect. Promise: nothing
//! of a change is told to anybody before it is durable, and until then the stanza is not acknowledged.
//!
//! Order, as the RFC has it: a subscriber's client gets `subscribed`, then the push, then the contact's presence. Both
//! may live on different shards and each makes its own side durable, so the presence is not sent along with
//! `subscribed`: the subscriber's owner asks for it when its own side stands ([`ask`]).

use super::{Feature, NONE, pep, presence, roster};
use crate::store::record::{
    ArchivedUserRecord, RosterItem, Subscription, SubscriptionRequest, UserRecord,
};
use crate::xml::view::View;
use crate::xmpp::batch::{Item, Receipt};
use crate::xmpp::component::Host;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::message::{self, attribute, bounce_out};
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::parse_stanza;
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::{Fate, Slice, WriteError};

pub static FEATURE: Feature = Feature {
    name: "Presence subscriptions, with pre-approval",
    spec: "RFC 6121 3",
    stream: Some(|_| "<sub xmlns='urn:xmpp:features:pre-approval'/>".to_owned()),
    ..NONE
};

/// The most bytes of a request that is kept until it is answered (3.1.3, the security warning).
pub const REQUEST_BYTES_MAX: usize = 8 * 1024;

// ---- the table ---------------------------------------------------------------------------------------------------

/// What a user's server knows about one contact (A.1), from the user's side; pre-approval (3.4) is a flag beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub subscription: Subscription,
    /// `ask='subscribe'`.
    pub pending_out: bool,
    /// The contact's request waits for the user's answer; not to be seen in the roster.
    pub pending_in: bool,
    pub approved: bool,
}

/// What a subscription stanza does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub state: State,
    /// Outbound: the stanza goes to the contact. Inbound: it is delivered to the user.
    pub pass: bool,
    /// The server answers the contact on behalf of the user.
    pub reply: Option<Kind>,
}

impl State {
    pub fn of(record: &ArchivedUserRecord, contact: &str) -> State {
        let pending_in = record.request(contact).is_some();
        match record.roster_item(contact) {
            Some(item) => State {
                subscription: item.subscription(),
                pending_out: item.ask,
                pending_in,
                approved: item.approved,
            },
            // A.1: no item is the same as "None"
            None => State {
                pending_in,
                ..State::default()
            },
        }
    }

    /// A.2: the user's client sends it.
    pub fn outbound(self, kind: Kind) -> Step {
        let (to, from) = (self.subscription.to(), self.subscription.from());
        let mut next = self;
        let pass = match kind {
            Kind::Subscribe => {
                next.pending_out |= !to;
                true
            }
            Kind::Unsubscribe => {
                next.subscription = Subscription::of(false, from);
                next.pending_out = false;
                true
            }
            Kind::Subscribed if self.pending_in => {
                next.subscription = Subscription::of(to, true);
                next.pending_in = false;
                true
            }
            Kind::Subscribed => {
                next.approved |= !from;
                false
            }
            Kind::Unsubscribed => {
                next.subscription = Subscription::of(to, false);
                next.pending_in = false;
                next.approved = false;
                from || self.pending_in
            }
            _ => false,
        };
        Step {
            state: next,
            pass,
            reply: None,
        }
    }

    /// A.3: the contact sends it.
    pub fn inbound(self, kind: Kind) -> Step {
        let (to, from) = (self.subscription.to(), self.subscription.from());
        let mut next = self;
        let mut reply = None;
        let pass = match kind {
            Kind::Subscribe if from => {
                reply = Some(Kind::Subscribed);
                false
            }
            Kind::Subscribe if self.approved => {
                // 3.4.2 leaves it open whether an approval is used up: it is, who went away has to ask again
                next.subscription = Subscription::of(to, true);
                next.approved = false;
                reply = Some(Kind::Subscribed);
                false
            }
            Kind::Subscribe => {
                next.pending_in = true;
                !self.pending_in
            }
            Kind::Unsubscribe => {
                next.subscription = Subscription::of(to, false);
                next.pending_in = false;
                let changed = from || self.pending_in;
                reply = changed.then_some(Kind::Unsubscribed);
                changed
            }
            Kind::Subscribed if self.pending_out => {
                next.subscription = Subscription::of(true, from);
                next.pending_out = false;
                true
            }
            Kind::Unsubscribed => {
                next.subscription = Subscription::of(false, from);
                next.pending_out = false;
                to || self.pending_out
            }
            _ => false,
        };
        Step {
            state: next,
            pass,
            reply,
        }
    }

    /// Would a client see the difference in its roster? Only then is there a push and a new version (2.6.3).
    fn looks_like(self, other: State) -> bool {
        State {
            pending_in: other.pending_in,
            ..self
        } == other
    }
}

// ---- out ---------------------------------------------------------------------------------------------------------

/// A client's subscription stanza. `to` is somebody's, of whatever form.
pub fn outbound(slice: &mut Slice, sid: SessionId, view: &View<'_>, kind: Kind, to: &Jid<'_>) {
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let (user, own, jid) = (
        session.user.clone(),
        session.bare().to_owned(),
        session.jid.clone(),
    );
    // 3.1.2: a full JID is taken as its bare one
    let to = to.to_bare();
    let reached = slice.is_reached(&to);
    let server = slice.env.is_local(&to) && to.local().is_none();
    let opens = matches!(kind, Kind::Subscribe | Kind::Subscribed);
    let refusal = if to.as_str() == own {
        Some(StanzaError::NOT_ALLOWED.text("one's own presence needs no subscription"))
    } else if opens && !reached {
        Some(StanzaError::REMOTE_SERVER_NOT_FOUND)
    } else if opens && server {
        Some(StanzaError::SERVICE_UNAVAILABLE)
    } else {
        message::may_send(slice, sid, &to).err()
    };
    if let Some(error) = refusal {
        return bounce_out(slice, sid, view, &error);
    }
    let Some(record) = slice.user(&user).map(|u| u.record.get()) else {
        return;
    };
    let before = State::of(record, to.as_str());
    let together = slice.together(&user, &to);
    if together && (opens || before == State::default()) {
        // an administrator's group has settled it
        return;
    }
    let step = before.outbound(kind);
    let reaches = step.pass && reached && !server;
    let stanza = reaches.then(|| {
        let lang = slice.sessions.get(sid).and_then(|s| s.lang.as_deref());
        message::compose(view, &own, Some(&to), lang, Vec::new())
    });
    let receipt = slice.current;
    let meta = Meta::new(kind);
    if step.state == before {
        if let Some(stanza) = stanza {
            slice.route(&to, &own, &stanza, meta, receipt);
        }
        return;
    }
    if slice.forwards_full() {
        return bounce_out(slice, sid, view, &StanzaError::RESOURCE_CONSTRAINT);
    }
    let Some(change) = Change::new(slice, &user, to.as_str(), before, step.state, None) else {
        return bounce_out(slice, sid, view, &roster::FULL);
    };
    if let Some(receipt) = receipt {
        slice.defer(receipt);
    }
    let then_user = user.clone();
    let (forwarded, forwarded_to) = (stanza.clone(), to.clone());
    let forwarded_from = own.clone();
    let made = change.make(slice, &user, move |slice, result, push| {
        match result {
            Ok(()) => {
                if kind == Kind::Unsubscribed && before.subscription.from() && !together {
                    // 3.2.2: while the contact is still subscribed
                    presence::hide(slice, &then_user, &to);
                }
                if let Some(push) = push {
                    roster::push(slice, &then_user, &push);
                }
            }
            Err(error) => {
                let stanza = stanza.unwrap_or_else(|| plain(kind, &own, to.as_str(), None));
                slice.bounce(&to, &jid, &stanza, meta, &error);
            }
        }
        if let Some(receipt) = receipt {
            slice.settle(receipt);
        }
    });
    if let Some(stanza) = forwarded.filter(|_| made) {
        slice.forward(&forwarded_to, &forwarded_from, &stanza, meta, receipt);
    }
}

/// 2.5.2: the contact is taken out of the roster: he is told, together with that change.
pub fn dissolve(slice: &mut Slice, user: &str, item: &RosterItem) {
    let Ok(contact) = Jid::parse(&item.jid) else {
        return;
    };
    let own = format!("{user}@{}", slice.env.domain);
    if item.subscription.to() || item.ask {
        say(slice, Kind::Unsubscribe, &own, &contact, None);
    }
    if item.subscription.from() {
        say(slice, Kind::Unsubscribed, &own, &contact, None);
    }
}

// ---- in ----------------------------------------------------------------------------------------------------------

/// A contact's subscription stanza for a user of this slice who is present; admitted already.
pub fn inbound(
    slice: &mut Slice,
    to: &Jid<'_>,
    from: &Jid<'_>,
    stanza: &[u8],
    meta: Meta,
    receipt: Option<Receipt>,
) -> Fate {
    if slice.waits_for_room(to, from, stanza, meta, receipt) {
        return Fate::Open;
    }
    let user: Box<str> = to.local().expect("only users are routed to").into();
    let Some(record) = slice.user(&user).map(|u| u.record.get()) else {
        return Fate::Decided;
    };
    let kind = meta.kind;
    let waiting = record.requests.len();
    let before = State::of(record, from.bare());
    let step = before.inbound(kind);
    if step.state == before {
        if let Some(reply) = step.reply {
            say(slice, reply, to.bare(), from, id_of(stanza).as_deref());
        }
        if kind == Kind::Subscribed && before.subscription.to() {
            // nothing new here, but the contact says so because its side is new
            ask(slice, &user, from);
        }
        return Fate::Decided;
    }
    let asks = step.state.pending_in && !before.pending_in;
    if asks && stanza.len() > REQUEST_BYTES_MAX {
        let error = StanzaError::POLICY_VIOLATION.text("the request is too large to be kept");
        slice.bounce(to, from.as_str(), stanza, meta, &error);
        return Fate::Decided;
    }
    if asks && waiting >= slice.env.limits.subscription_requests_max {
        let error = StanzaError::RESOURCE_CONSTRAINT.text("too many requests wait for an answer");
        slice.bounce(to, from.as_str(), stanza, meta, &error);
        return Fate::Decided;
    }
    let change = Change::new(
        slice,
        &user,
        from.bare(),
        before,
        step.state,
        asks.then_some(stanza),
    );
    let Some(change) = change else {
        return Fate::Decided;
    };
    let news = News {
        user,
        to: to.to_bare(),
        from: from.borrowed().into_owned(),
        stanza: stanza.into(),
        meta,
        before,
        step,
    };
    let user = news.user.clone();
    change.make(slice, &user, move |slice, result, push| {
        match result {
            Ok(()) => news.tell(slice, push),
            Err(error) => {
                slice.bounce(&news.to, news.from.as_str(), &news.stanza, meta, &error);
            }
        }
        if let Some(receipt) = receipt {
            slice.settle(receipt);
        }
    });
    Fate::Open
}

/// A contact's stanza that has changed the state.
struct News {
    user: Box<str>,
    to: Jid<'static>,
    from: Jid<'static>,
    stanza: Box<[u8]>,
    meta: Meta,
    before: State,
    step: Step,
}

impl News {
    /// The new state stands: the user learns it, and what follows from it is done.
    fn tell(&self, slice: &mut Slice, push: Option<Vec<u8>>) {
        if self.step.pass {
            deliver(slice, &self.user, &self.stanza, self.meta);
        }
        if let Some(push) = push {
            roster::push(slice, &self.user, &push);
        }
        match self.meta.kind {
            Kind::Subscribed => ask(slice, &self.user, &self.from),
            // 3.3.3
            Kind::Unsubscribe
                if self.before.subscription.from() && !slice.together(&self.user, &self.from) =>
            {
                presence::hide(slice, &self.user, &self.from.to_bare());
            }
            _ => {}
        }
        match self.step.reply {
            // A.3.2, a SHOULD for servers that may have lost their state. Here both sides are ours: it would change
            // nothing, except that it could cross a new request of the contact's and cancel it
            Some(Kind::Unsubscribed) if slice.env.is_local(&self.from) => {}
            Some(reply) => {
                let id = id_of(&self.stanza);
                say(slice, reply, self.to.as_str(), &self.from, id.as_deref());
            }
            None => {}
        }
    }
}

/// 3.1.3: requests are for available resources; 3.1.6, 3.2.3, 3.3.3: the rest is for interested ones.
fn deliver(slice: &mut Slice, user: &str, stanza: &[u8], meta: Meta) {
    for sid in slice.sessions_of(user) {
        let Some(session) = slice.sessions.get(sid) else {
            continue;
        };
        let takes = match meta.kind {
            Kind::Subscribe => session.presence.is_some(),
            _ => session.interested,
        };
        if takes {
            slice.send(sid, &[stanza], meta);
        }
    }
}

/// 3.1.3: a new available resource gets all requests that wait for an answer.
pub fn deliver_requests(slice: &mut Slice, sid: SessionId) {
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let name = session.user.clone();
    let Some(user) = slice.user(&name) else {
        return;
    };
    if user.record.get().requests.is_empty() {
        return;
    }
    let meta = Meta::new(Kind::Subscribe);
    for request in user.record.to_owned().requests {
        // blocked since it came?
        let admitted =
            Jid::parse(&request.jid).is_ok_and(|jid| presence::admit(slice, &name, &jid, meta));
        if admitted {
            slice.send(sid, &[&request.stanza], meta);
        }
    }
}

/// Asks for the contact's presence, on behalf of each available resource of the user.
fn ask(slice: &mut Slice, user: &str, contact: &Jid<'_>) {
    if slice.host(contact.domain()) == Host::Component {
        for sid in slice.sessions_of(user) {
            presence::probe_component(slice, sid, contact);
        }
        return;
    }
    let Some(name) = contact.local().filter(|_| slice.env.is_local(contact)) else {
        return;
    };
    pep::subscribed(slice, user, name);
    let owner = slice.env.owner(name);
    for sid in slice.sessions_of(user) {
        let Some(session) = slice.sessions.get(sid).filter(|s| s.presence.is_some()) else {
            continue;
        };
        let full = &session.jid;
        if owner == slice.env.shard {
            let full = full.clone();
            presence::probe_in(slice, name, &full);
            continue;
        }
        let batch = &mut slice.fx.mesh[owner as usize];
        let from = batch.put(full.as_bytes());
        let names = batch.put(name.as_bytes());
        batch.items.push(Item::Probe { from, names });
    }
}

// ---- tools -------------------------------------------------------------------------------------------------------

/// A change of one contact's state, ready to be made.
struct Change {
    contact: String,
    /// The item as it will be, and its push.
    item: Option<(RosterItem, Vec<u8>)>,
    version: u64,
    /// `Some(None)`: the request is answered or withdrawn.
    request: Option<Option<SubscriptionRequest>>,
}

impl Change {
    /// `None`: the roster has no room for a new item.
    fn new(
        slice: &mut Slice,
        user: &str,
        contact: &str,
        before: State,
        after: State,
        request: Option<&[u8]>,
    ) -> Option<Change> {
        let version = roster::next_version(slice, user);
        let item = if after.looks_like(before) {
            None
        } else {
            let mut item = roster::item_or_room(slice, user, contact)?;
            item.subscription = after.subscription;
            item.ask = after.pending_out;
            item.approved = after.approved;
            let push = roster::push_query(slice, user, &item, version);
            Some((item, push))
        };
        let request = (after.pending_in != before.pending_in).then(|| {
            request.map(|stanza| SubscriptionRequest {
                jid: contact.to_owned(),
                stanza: stanza.to_vec(),
            })
        });
        Some(Change {
            contact: contact.to_owned(),
            item,
            version,
            request,
        })
    }

    /// Makes it; `then` gets the push, when the change is durable or has failed. `false`: it has failed.
    fn make(
        self,
        slice: &mut Slice,
        user: &str,
        then: impl FnOnce(&mut Slice, Result<(), StanzaError>, Option<Vec<u8>>) + 'static,
    ) -> bool {
        let Change {
            contact,
            item,
            version,
            request,
        } = self;
        let (item, push) = item.unzip();
        let change = |record: &mut UserRecord| {
            if let Some(item) = item {
                record.put_roster_item(item);
                record.roster_version = version;
            }
            match request {
                Some(Some(request)) => record.put_request(request),
                Some(None) => {
                    record.remove_request(&contact);
                }
                None => {}
            }
        };
        let then = move |slice: &mut Slice, result: Result<(), WriteError>| {
            then(slice, result.map_err(WriteError::into), push);
        };
        slice.edit(user, change, Box::new(then))
    }
}

/// The server speaks for the user: an empty subscription stanza between bare JIDs.
pub fn say(slice: &mut Slice, kind: Kind, own: &str, contact: &Jid<'_>, id: Option<&str>) {
    let server = slice.env.is_local(contact) && contact.local().is_none();
    if server || !slice.is_reached(contact) {
        return;
    }
    let contact = contact.to_bare();
    let stanza = plain(kind, own, contact.as_str(), id);
    let meta = Meta::new(kind).with(Meta::SERVER);
    slice.forward(&contact, own, &stanza, meta, None);
}

fn plain(kind: Kind, from: &str, to: &str, id: Option<&str>) -> Vec<u8> {
    let typ = match kind {
        Kind::Subscribe => "subscribe",
        Kind::Subscribed => "subscribed",
        Kind::Unsubscribe => "unsubscribe",
        _ => "unsubscribed",
    };
    let mut out = b"<presence".to_vec();
    attribute("from", from, &mut out);
    attribute("to", to, &mut out);
    if let Some(id) = id {
        attribute("id", id, &mut out);
    }
    attribute("type", typ, &mut out);
    out.extend_from_slice(b"/>");
    out
}

/// The `id` of a stanza.
pub fn id_of(stanza: &[u8]) -> Option<String> {
    parse_stanza(stanza)?.get("id").map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::slice::Limits;
    use crate::xmpp::testing::{Client, World, bare};

    // ---- the table: appendix A, written as it stands there -------------------------------------------------------

    const NONE: &str = "None";
    const OUT: &str = "None + Pending Out";
    const IN: &str = "None + Pending In";
    const OUT_IN: &str = "None + Pending Out+In";
    const TO: &str = "To";
    const TO_IN: &str = "To + Pending In";
    const FROM: &str = "From";
    const FROM_OUT: &str = "From + Pending Out";
    const BOTH: &str = "Both";
    const STATES: [&str; 9] = [NONE, OUT, IN, OUT_IN, TO, TO_IN, FROM, FROM_OUT, BOTH];

    fn state(name: &str) -> State {
        let (subscription, pending) = name.split_once(" + Pending ").unwrap_or((name, ""));
        State {
            subscription: match subscription {
                "None" => Subscription::None,
                "To" => Subscription::To,
                "From" => Subscription::From,
                _ => Subscription::Both,
            },
            pending_out: pending.contains("Out"),
            pending_in: pending.contains("In"),
            approved: false,
        }
    }

    /// Rows: existing state, passed on?, new state (`None`: no state change).
    type Table = [(bool, Option<&'static str>); 9];

    fn check(step: fn(State, Kind) -> Step, kind: Kind, table: Table) {
        for (name, (pass, new)) in STATES.into_iter().zip(table) {
            let got = step(state(name), kind);
            assert_eq!(got.pass, pass, "{kind:?} in {name}");
            assert_eq!(got.state, state(new.unwrap_or(name)), "{kind:?} in {name}");
        }
    }

    const NO: (bool, Option<&str>) = (false, None);

    #[test]
    fn outbound_subscribe_is_table_2() {
        let yes = (true, None);
        check(
            State::outbound,
            Kind::Subscribe,
            [
                (true, Some(OUT)),
                yes,
                (true, Some(OUT_IN)),
                yes,
                yes,
                yes,
                (true, Some(FROM_OUT)),
                yes,
                yes,
            ],
        );
    }

    #[test]
    fn outbound_unsubscribe_is_table_3() {
        check(
            State::outbound,
            Kind::Unsubscribe,
            [
                (true, None),
                (true, Some(NONE)),
                (true, None),
                (true, Some(IN)),
                (true, Some(NONE)),
                (true, Some(IN)),
                (true, None),
                (true, Some(FROM)),
                (true, Some(FROM)),
            ],
        );
    }

    #[test]
    fn outbound_subscribed_is_table_4() {
        for name in STATES {
            let existing = state(name);
            let got = existing.outbound(Kind::Subscribed);
            let (pass, new) = match name {
                IN => (true, state(FROM)),
                OUT_IN => (true, state(FROM_OUT)),
                TO_IN => (true, state(BOTH)),
                NONE | OUT | TO => {
                    let approved = State {
                        approved: true,
                        ..existing
                    };
                    (false, approved)
                }
                _ => (false, existing),
            };
            assert_eq!((got.pass, got.state), (pass, new), "{name}");
        }
    }

    #[test]
    fn outbound_unsubscribed_is_table_5() {
        check(
            State::outbound,
            Kind::Unsubscribed,
            [
                NO,
                NO,
                (true, Some(NONE)),
                (true, Some(OUT)),
                NO,
                (true, Some(TO)),
                (true, Some(NONE)),
                (true, Some(OUT)),
                (true, Some(TO)),
            ],
        );
        for name in [NONE, OUT, TO] {
            let approved = State {
                approved: true,
                ..state(name)
            };
            let got = approved.outbound(Kind::Unsubscribed);
            assert_eq!(
                (got.pass, got.state),
                (false, state(name)),
                "3.2.2, rule 2, in {name}"
            );
        }
    }

    #[test]
    fn inbound_subscribe_is_table_6() {
        check(
            State::inbound,
            Kind::Subscribe,
            [
                (true, Some(IN)),
                (true, Some(OUT_IN)),
                NO,
                NO,
                (true, Some(TO_IN)),
                NO,
                NO,
                NO,
                NO,
            ],
        );
        for name in STATES {
            let reply = state(name).inbound(Kind::Subscribe).reply;
            let wanted = matches!(name, FROM | FROM_OUT | BOTH).then_some(Kind::Subscribed);
            assert_eq!(reply, wanted, "note 2 in {name}");
        }
        for (name, new) in [(NONE, FROM), (OUT, FROM_OUT), (TO, BOTH)] {
            let approved = State {
                approved: true,
                ..state(name)
            };
            let got = approved.inbound(Kind::Subscribe);
            assert_eq!(
                (got.pass, got.state),
                (false, state(new)),
                "note 1 in {name}"
            );
            assert_eq!(got.reply, Some(Kind::Subscribed));
        }
    }

    #[test]
    fn inbound_unsubscribe_is_table_7() {
        let table = [
            NO,
            NO,
            (true, Some(NONE)),
            (true, Some(OUT)),
            NO,
            (true, Some(TO)),
            (true, Some(NONE)),
            (true, Some(OUT)),
            (true, Some(TO)),
        ];
        check(State::inbound, Kind::Unsubscribe, table);
        for (name, (pass, _)) in STATES.into_iter().zip(table) {
            let reply = state(name).inbound(Kind::Unsubscribe).reply;
            assert_eq!(
                reply,
                pass.then_some(Kind::Unsubscribed),
                "note 1 in {name}"
            );
        }
    }

    #[test]
    fn inbound_subscribed_is_table_8() {
        check(
            State::inbound,
            Kind::Subscribed,
            [
                NO,
                (true, Some(TO)),
                NO,
                (true, Some(TO_IN)),
                NO,
                NO,
                NO,
                (true, Some(BOTH)),
                NO,
            ],
        );
    }

    #[test]
    fn inbound_unsubscribed_is_table_9() {
        check(
            State::inbound,
            Kind::Unsubscribed,
            [
                NO,
                (true, Some(NONE)),
                NO,
                (true, Some(IN)),
                (true, Some(NONE)),
                (true, Some(IN)),
                NO,
                (true, Some(FROM)),
                (true, Some(FROM)),
            ],
        );
        // 4.3.2: not even an answer to a probe takes a pre-approval back
        let approved = State {
            approved: true,
            ..state(TO)
        };
        assert!(approved.inbound(Kind::Unsubscribed).state.approved);
    }

    proptest::proptest! {
        #[test]
        fn both_sides_agree_after_any_exchange(stanzas in proptest::collection::vec((0..2usize, 0..4usize), 0..40)) {
            let kinds = [Kind::Subscribe, Kind::Subscribed, Kind::Unsubscribe, Kind::Unsubscribed];
            let mut sides = [State::default(); 2];
            for (sender, kind) in stanzas {
                let step = sides[sender].outbound(kinds[kind]);
                sides[sender] = step.state;
                let (mut to, mut stanza) = (1 - sender, step.pass.then_some(kinds[kind]));
                while let Some(kind) = stanza {
                    let step = sides[to].inbound(kind);
                    sides[to] = step.state;
                    (to, stanza) = (1 - to, step.reply);
                }
                for (a, b) in [(sides[0], sides[1]), (sides[1], sides[0])] {
                    proptest::prop_assert_eq!(a.subscription.to(), b.subscription.from());
                    proptest::prop_assert_eq!(a.pending_out, b.pending_in);
                    proptest::prop_assert!(!(a.pending_out && a.subscription.to()));
                    proptest::prop_assert!(!(a.approved && (a.pending_in || a.subscription.from())));
                }
            }
        }
    }

    // ---- the dialogues -------------------------------------------------------------------------------------------

    /// Romeo in his orchard and Juliet, who may live on another shard.
    struct Verona {
        world: World,
        romeo: String,
        juliet: String,
        orchard: Client,
    }

    fn verona(shard: usize, change: impl Fn(&mut Limits)) -> Verona {
        let mut world = World::with(2, change);
        let (romeo, juliet) = (world.on(0, "romeo"), world.on(shard, "juliet"));
        world.add(&romeo);
        world.add(&juliet);
        let orchard = world.online(&romeo, "orchard");
        Verona {
            world,
            romeo: bare(&romeo),
            juliet: bare(&juliet),
            orchard,
        }
    }

    impl Verona {
        fn balcony(&mut self) -> Client {
            let name = self.juliet.split('@').next().unwrap().to_owned();
            self.world.online(&name, "balcony")
        }

        fn record(&self, jid: &str) -> &UserRecord {
            self.world.stored(jid.split('@').next().unwrap())
        }

        fn asks(&mut self) {
            let juliet = self.juliet.clone();
            self.world.send(
                self.orchard,
                &format!("<presence type='subscribe' id='q' to='{juliet}/x'><status>Hi &amp; ho</status></presence>"),
            );
        }

        fn request(&self) -> String {
            let (r, j) = (&self.romeo, &self.juliet);
            format!(
                "<presence type='subscribe' id='q' from='{r}' to='{j}'><status>Hi &amp; ho</status></presence>"
            )
        }

        /// A push to Romeo about Juliet.
        fn push(&self, attrs: &str) -> String {
            let (r, j) = (&self.romeo, &self.juliet);
            format!(
                "<iq type='set' id='*' to='{r}/orchard'><query xmlns='jabber:iq:roster' ver='*'>\
                 <item jid='{j}' {attrs}/></query></iq>"
            )
        }

        /// A push to Juliet about Romeo.
        fn push_back(&self, attrs: &str) -> String {
            let (r, j) = (&self.romeo, &self.juliet);
            format!(
                "<iq type='set' id='*' to='{j}/balcony'><query xmlns='jabber:iq:roster' ver='*'>\
                 <item jid='{r}' {attrs}/></query></iq>"
            )
        }
    }

    #[test]
    fn a_request_is_approved_and_the_subscriber_sees_subscribed_then_the_push_then_presence() {
        for shard in [0, 1] {
            let mut v = verona(shard, |_| {});
            let balcony = v.balcony();
            v.asks();
            let (r, j) = (v.romeo.clone(), v.juliet.clone());
            v.world
                .expect(v.orchard, &[&v.push("subscription='none' ask='subscribe'")]);
            v.world.expect(balcony, &[&v.request()]);
            assert!(
                v.record(&j).roster.is_empty(),
                "3.1.3: no item before approval"
            );
            v.asks();
            v.world.expect(v.orchard, &[]);
            v.world.expect(balcony, &[]);
            v.world.send(
                balcony,
                &format!("<presence type='subscribed' id='p' to='{r}'/>"),
            );
            v.world
                .expect(balcony, &[&v.push_back("subscription='from'")]);
            v.world.expect(
                v.orchard,
                &[
                    &format!("<presence type='subscribed' id='p' from='{j}' to='{r}'/>"),
                    &v.push("subscription='to'"),
                    &format!("<presence from='{j}/balcony' to='{r}'/>"),
                ],
            );
            assert!(v.record(&j).requests.is_empty());
            // again: the server answers for her (3.1.3, rule 2)
            v.asks();
            v.world.expect(balcony, &[]);
            v.world.expect(
                v.orchard,
                &[&format!("<presence from='{j}/balcony' to='{r}'/>")],
            );
        }
    }

    #[test]
    fn a_request_comes_at_every_login_until_it_is_answered_and_only_once() {
        for shard in [0, 1] {
            let mut v = verona(shard, |_| {});
            v.asks();
            v.asks();
            assert_eq!(v.record(&v.juliet).requests.len(), 1);
            let name = v.juliet.split('@').next().unwrap().to_owned();
            let (r, j) = (v.romeo.clone(), v.juliet.clone());
            for resource in ["a", "b"] {
                let client = v.world.login(&name, resource);
                v.world.send(client, "<presence/>");
                v.world.expect(
                    client,
                    &[
                        &format!("<presence from='{j}/{resource}' to='{j}'/>"),
                        &v.request(),
                    ],
                );
                v.world
                    .send(client, "<presence><show>away</show></presence>");
                assert_eq!(v.world.take(client).len(), 1, "only its own presence");
                v.world.logout(client);
            }
            let balcony = v.balcony();
            v.world.take(v.orchard);
            v.world.send(
                balcony,
                &format!("<presence type='unsubscribed' to='{r}'/>"),
            );
            v.world.expect(
                v.orchard,
                &[
                    &format!("<presence type='unsubscribed' from='{j}' to='{r}'/>"),
                    &v.push("subscription='none'"),
                ],
            );
            v.world.expect(balcony, &[]);
            let client = v.world.login(&name, "c");
            v.world.send(client, "<presence/>");
            let got = v.world.take(client);
            assert!(!got.iter().any(|s| s.contains("subscribe")), "{got:?}");
        }
    }

    #[test]
    fn a_withdrawn_request_is_forgotten() {
        let mut v = verona(1, |_| {});
        let balcony = v.balcony();
        v.asks();
        v.world.take(balcony);
        let (r, j) = (v.romeo.clone(), v.juliet.clone());
        v.world.send(
            v.orchard,
            &format!("<presence type='unsubscribe' to='{j}'/>"),
        );
        v.world.expect(
            balcony,
            &[&format!(
                "<presence type='unsubscribe' from='{r}' to='{j}'/>"
            )],
        );
        assert!(v.record(&j).requests.is_empty());
        assert!(!v.record(&r).roster[0].ask);
    }

    #[test]
    fn a_cancelled_subscriber_sees_unavailable_first() {
        for shard in [0, 1] {
            let mut v = verona(shard, |_| {});
            let balcony = v.balcony();
            let (r, j) = (v.romeo.clone(), v.juliet.clone());
            v.asks();
            v.world
                .send(balcony, &format!("<presence type='subscribed' to='{r}'/>"));
            v.world.take(balcony);
            v.world.take(v.orchard);
            v.world.send(
                balcony,
                &format!("<presence type='unsubscribed' to='{r}'/>"),
            );
            v.world.expect(
                v.orchard,
                &[
                    &format!("<presence type='unavailable' from='{j}/balcony' to='{r}'/>"),
                    &format!("<presence type='unsubscribed' from='{j}' to='{r}'/>"),
                    &v.push("subscription='none'"),
                ],
            );
            v.world
                .expect(balcony, &[&v.push_back("subscription='none'")]);
            v.world
                .send(balcony, "<presence><show>dnd</show></presence>");
            v.world.expect(v.orchard, &[]);
        }
    }

    #[test]
    fn who_unsubscribes_gets_unavailable_and_may_ask_again_at_once() {
        for shard in [0, 1] {
            let mut v = verona(shard, |_| {});
            let balcony = v.balcony();
            let (r, j) = (v.romeo.clone(), v.juliet.clone());
            v.asks();
            v.world
                .send(balcony, &format!("<presence type='subscribed' to='{r}'/>"));
            v.world.take(balcony);
            v.world.take(v.orchard);
            // both before anything is carried out: an automatic answer to the first must not cancel the second
            let unsubscribe = format!("<presence type='unsubscribe' to='{j}'/>");
            v.world.element(v.orchard, &unsubscribe).unwrap();
            v.asks();
            v.world.expect(
                balcony,
                &[
                    &format!("<presence type='unsubscribe' from='{r}' to='{j}'/>"),
                    &v.push_back("subscription='none'"),
                    &v.request(),
                ],
            );
            let got = v.world.take(v.orchard);
            let gone = format!("<presence type='unavailable' from='{j}/balcony' to='{r}'/>");
            assert!(
                got.iter().any(|s| crate::xmpp::testing::matches(&gone, s)),
                "{got:?}"
            );
            assert!(v.record(&r).roster[0].ask);
            v.world
                .send(balcony, &format!("<presence type='subscribed' to='{r}'/>"));
            assert_eq!(v.record(&r).roster[0].subscription, Subscription::To);
        }
    }

    #[test]
    fn a_pre_approved_request_is_answered_by_the_server_even_for_who_is_offline() {
        for shard in [0, 1] {
            let mut v = verona(shard, |_| {});
            let balcony = v.balcony();
            let (r, j) = (v.romeo.clone(), v.juliet.clone());
            v.world
                .send(balcony, &format!("<presence type='subscribed' to='{r}'/>"));
            v.world.expect(
                balcony,
                &[&v.push_back("subscription='none' approved='true'")],
            );
            v.world.expect(v.orchard, &[]);
            v.world.logout(balcony);
            v.asks();
            v.world.expect(
                v.orchard,
                &[
                    &v.push("subscription='none' ask='subscribe'"),
                    &format!("<presence type='subscribed' id='q' from='{j}' to='{r}'/>"),
                    &v.push("subscription='to'"),
                ],
            );
            let item = &v.record(&j).roster[0];
            assert_eq!(
                (item.subscription, item.approved),
                (Subscription::From, false)
            );
        }
    }

    #[test]
    fn a_pre_approval_can_be_taken_back() {
        let mut v = verona(1, |_| {});
        let balcony = v.balcony();
        let r = v.romeo.clone();
        v.world
            .send(balcony, &format!("<presence type='subscribed' to='{r}'/>"));
        v.world.send(
            balcony,
            &format!("<presence type='unsubscribed' to='{r}'/>"),
        );
        let got = v.world.take(balcony);
        assert!(got.len() == 2 && !got[1].contains("approved"), "{got:?}");
        v.asks();
        v.world.expect(balcony, &[&v.request()]);
    }

    #[test]
    fn nobody_is_subscribed_to_who_does_not_exist_or_is_elsewhere_or_to_oneself() {
        let mut v = verona(0, |_| {});
        let r = v.romeo.clone();
        v.world.send(
            v.orchard,
            "<presence type='subscribe' to='nobody@localhost'/>",
        );
        let got = v.world.take(v.orchard);
        let end = format!("<presence type='unsubscribed' from='nobody@localhost' to='{r}'/>");
        // answered at once where the account is known to be missing, after the load otherwise
        assert!(
            got.iter().any(|s| crate::xmpp::testing::matches(&end, s)),
            "{got:?}"
        );
        assert!(!v.record(&r).roster[0].ask);
        for (to, condition) in [
            ("a@elsewhere.example", "remote-server-not-found"),
            ("localhost", "service-unavailable"),
            (&*r, "not-allowed"),
            ("@x", "jid-malformed"),
        ] {
            v.world.send(
                v.orchard,
                &format!("<presence type='subscribe' id='7' to='{to}'/>"),
            );
            let got = v.world.take(v.orchard);
            assert!(
                got.len() == 1 && got[0].contains(condition),
                "{to}: {got:?}"
            );
            assert!(got[0].contains("id='7'"));
        }
        assert_eq!(v.record(&r).roster.len(), 1);
        v.world.send(v.orchard, "<presence type='subscribe'/>");
        assert!(v.world.take(v.orchard)[0].contains("bad-request"));
    }

    #[test]
    fn limits_are_errors() {
        let mut v = verona(1, |limits| {
            limits.roster_items_max = 1;
            limits.subscription_requests_max = 0;
        });
        let j = v.juliet.clone();
        v.asks();
        let got = v.world.take(v.orchard);
        assert!(
            got.iter()
                .any(|s| s.contains("resource-constraint") && s.contains("type='error'")),
            "{got:?}"
        );
        assert!(v.record(&j).requests.is_empty());
        v.world.send(
            v.orchard,
            "<presence type='subscribe' to='other@localhost'/>",
        );
        assert!(v.world.take(v.orchard)[0].contains("the roster is full"));
        let big = "x".repeat(REQUEST_BYTES_MAX);
        let mut v = verona(1, |_| {});
        v.world.send(
            v.orchard,
            &format!("<presence type='subscribe' to='{j}'><status>{big}</status></presence>"),
        );
        let got = v.world.take(v.orchard);
        assert!(
            got.iter().any(|s| s.contains("policy-violation")),
            "{:?}",
            got.len()
        );
        assert!(v.record(&j).requests.is_empty());
    }

    #[test]
    fn a_change_is_told_when_it_is_durable_and_acknowledged_when_both_sides_are() {
        for shard in [0, 1] {
            let mut v = verona(shard, |_| {});
            let balcony = v.balcony();
            v.world.send(v.orchard, "<enable xmlns='urn:xmpp:sm:3'/>");
            v.world.take(v.orchard);
            v.world.tier.held = true;
            v.asks();
            v.world.expect(v.orchard, &[]);
            v.world.expect(balcony, &[]);
            assert_eq!(v.world.session(v.orchard).accept.h(), 0);
            v.world.release();
            assert_eq!(v.world.session(v.orchard).accept.h(), 1);
            assert_eq!(v.record(&v.juliet).requests.len(), 1);
        }
    }

    #[test]
    fn a_change_that_cannot_be_stored_is_an_error_and_no_change() {
        let mut v = verona(1, |_| {});
        v.world.tier.broken = true;
        v.asks();
        let got = v.world.take(v.orchard);
        assert!(
            got.len() == 1 && got[0].contains("resource-constraint"),
            "{got:?}"
        );
        let name = v.romeo.split('@').next().unwrap().to_owned();
        assert!(v.world.user(&name).record.get().roster.is_empty());
    }

    #[test]
    fn a_removed_account_leaves_no_subscription_behind() {
        let mut v = verona(1, |_| {});
        let balcony = v.balcony();
        let r = v.romeo.clone();
        v.asks();
        v.world
            .send(balcony, &format!("<presence type='subscribed' to='{r}'/>"));
        v.world
            .send(balcony, &format!("<presence type='subscribe' to='{r}'/>"));
        let name = v.juliet.split('@').next().unwrap().to_owned();
        let slice = v.world.slice_of(&name);
        crate::xmpp::feature::register::remove_account(slice, &name, Box::new(|_, _| {}));
        v.world.run();
        assert_eq!(v.record(&r).roster[0].subscription, Subscription::None);
        assert!(v.record(&r).requests.is_empty());
    }
}
