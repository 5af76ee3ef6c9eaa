//! One client: its connection, its stream management, and a book of all that it sent, received and was promised.
//!
//! In: elements from the server. Out: stanzas, and the book ([`Sent`], [`Receipt`], [`Facts`], synchronised archive) from
//! which [`super::judge`] decides. What contradicts a promise at once is noted as [`Wrong`] on the spot.
//!
//! A message is *accepted* once an `<a h/>`, `<resumed h/>` or `<failed h/>` covers it. What stays uncovered when a stream
//! is given up is sent again under a new id.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::blade::DOMAIN;
use crate::client::connection::{Connection, Heard};
use crate::client::xml::{Element, Item};
use crate::facts::Facts;
use crate::round::Round;

const NS_SM: &str = "urn:xmpp:sm:3";
const NS_MAM: &str = "urn:xmpp:mam:2";
const NS_CARBONS: &str = "urn:xmpp:carbons:2";
const NS_SID: &str = "urn:xmpp:sid:0";
const NS_RETRACT: &str = "urn:xmpp:message-retract:1";
/// How long a living server may take for an answer.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// `<failed h/>` leaves out stanzas that were covered, but no message that is kept: a client that goes by the highest count
/// it saw does nothing twice.
const FAILED_H_FORGETS: &str = "failed_h_forgets_what_is_not_kept";
/// Results on a page of the archive.
const PAGE: usize = 50;

/// A promise that was not kept: its kind (a counter of the report) and what was seen.
#[derive(Debug)]
pub struct Wrong {
    pub kind: &'static str,
    pub text: String,
}

/// Why a step did not come to its end.
#[derive(Debug)]
pub enum Trouble {
    /// The connection ended.
    Gone,
    /// The server lives and refuses or is silent.
    Refused(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is known yet.
    Open,
    /// Covered by a count of the server.
    Accepted,
    /// Came back as an error.
    Refused,
    /// Its stream was given up without it being covered: it may have arrived.
    Unknown,
    /// Accepted and not received: reported once.
    Lost,
}

/// One message of this client; its number is its place in [`Bot::sent`].
#[derive(Debug)]
pub struct Sent {
    pub to_user: usize,
    /// Addressed to this client's full JID, else to the bare one.
    pub to_bot: Option<usize>,
    /// XEP-0334 no-store.
    pub fleeting: bool,
    /// XEP-0424: takes back this one of the same client.
    pub retracts: Option<usize>,
    pub state: State,
    pub round: u32,
    pub session: u32,
    pub counted_as: u32,
}

/// How a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    Direct,
    /// As a carbon copy of what another client of the user received, or sent.
    CopyOfReceived,
    CopyOfSent,
}

/// A message that came to this client.
#[derive(Debug)]
pub struct Receipt {
    pub from: usize,
    pub number: usize,
    /// The `to` was a full JID.
    pub to_full: bool,
    pub session: u32,
    /// Stanza-id by the own bare JID.
    pub stable_id: Option<Box<str>>,
    pub delayed: bool,
    pub way: Way,
    /// Before this session was available: a message to the full JID of a client that has not asked for its offline
    /// messages yet (RFC 6121 8.5.3.1 delivers it, and 4.2 wants presence first for the others).
    pub early: bool,
}

/// One entry of an archive.
#[derive(Clone, Debug)]
pub struct Entry {
    pub id: Box<str>,
    /// Sending client and number; nothing for what is none of our messages.
    pub message: Option<(usize, usize)>,
    /// A tombstone (XEP-0424): what it says that has retracted it.
    pub retracted_by: Option<(usize, usize)>,
}

/// The same place in an archive: a message stays there when it is retracted.
impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        (&self.id, self.message) == (&other.id, other.message)
    }
}

/// A synchronisation of the own archive from its begin, continued whenever there is time.
#[derive(Default)]
pub struct Sync {
    pub entries: Vec<Entry>,
    page: Vec<Entry>,
    /// Id of the query that is under way.
    active: Option<String>,
    /// The last query said that there was no more.
    pub complete: bool,
}

struct Unacked {
    count: u32,
    xml: String,
    what: What,
}

/// What a counted stanza was, for when it is covered.
#[derive(Clone, Copy)]
enum What {
    Message(usize),
    Subscribe(usize),
    Approve(usize),
    Other,
}

/// XEP-0198 state of the current or last stream.
#[derive(Default)]
struct Stream {
    /// Empty: no stream management, or not yet.
    id: String,
    sent: u32,
    covered: u32,
    /// The last count that stood for a message that is kept.
    kept: u32,
    handled: u32,
    /// The counts of the two sides do not agree any more: told once, then not looked at.
    confused: bool,
    unacked: VecDeque<Unacked>,
}

/// Which answer an IQ waits for.
enum Pending {
    Fact(String, usize),
    Archive(usize),
    Wanted,
}

pub struct Event {
    pub round: u32,
    pub at: Duration,
    pub text: String,
}

/// Who a client is.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Places in the lists of clients and users.
    pub number: usize,
    pub user: usize,
    /// Local part and resource.
    pub name: String,
    pub resource: String,
    /// Uses stream management.
    pub sm: bool,
    pub carbons: bool,
    /// The user has no other client.
    pub alone: bool,
    /// Makes the user's changes: roster, password, subscriptions.
    pub speaker: bool,
}

pub struct Bot {
    pub profile: Profile,
    /// The server said that this account exists.
    pub registered: bool,
    /// Of the last log-in.
    password: String,
    wire: Option<Connection>,
    stream: Stream,
    /// Number of the stream: a resumption continues it.
    pub session: u32,
    pub sent: Vec<Sent>,
    pub received: Vec<Receipt>,
    pub facts: Facts,
    pub changes_answered: u64,
    /// Own requests for subscription (covered?), approvals (covered?), and requests seen.
    pub subscribed: BTreeMap<usize, bool>,
    pub approved: BTreeMap<usize, bool>,
    pub requests: BTreeSet<usize>,
    /// 0: while the load runs; 1: at each check; 2: once at the end.
    pub syncs: [Sync; 3],
    pending: HashMap<String, Pending>,
    answers: HashMap<String, Element>,
    next_id: u64,
    pub events: Vec<Event>,
    pub wrong: Vec<Wrong>,
    pub failed_resumptions: u64,
    pub resumptions: u64,
    /// Pages of the archive that the server could not give at once (an error of type `wait`).
    pub archive_waits: u64,
    /// A count was asked for and not given yet.
    asked: bool,
    /// The server has told this session its own presence.
    available: bool,
}

impl Bot {
    pub fn new(profile: Profile, password: &str) -> Bot {
        let mut facts = Facts::default();
        facts.settle("password", Some(password.to_owned()));
        Bot {
            profile,
            registered: false,
            password: password.to_owned(),
            wire: None,
            stream: Stream::default(),
            session: 0,
            sent: Vec::new(),
            received: Vec::new(),
            facts,
            changes_answered: 0,
            subscribed: BTreeMap::new(),
            approved: BTreeMap::new(),
            requests: BTreeSet::new(),
            syncs: Default::default(),
            pending: HashMap::new(),
            answers: HashMap::new(),
            next_id: 0,
            events: Vec::new(),
            wrong: Vec::new(),
            failed_resumptions: 0,
            resumptions: 0,
            archive_waits: 0,
            asked: false,
            available: false,
        }
    }

    pub fn jid(&self) -> String {
        full_jid(&self.profile.name, &self.profile.resource)
    }

    /// Messages and other stanzas that no count covers yet.
    pub fn open(&self) -> usize {
        match self.stream.confused {
            true => 0,
            false => self.stream.unacked.len(),
        }
    }

    // --- coming and going

    /// In-band registration on a connection of its own. `Ok`: the account exists (now, or by an earlier try whose answer was
    /// lost).
    pub fn register(&mut self, round: &Round, password: &str) -> Result<(), Trouble> {
        let name = self.profile.name.clone();
        let mut wire = connect(round)?;
        let answer = wire
            .request(&format!(
                "<iq type='set' id='{{id}}'><query xmlns='jabber:iq:register'><username>{name}</username>\
                 <password>{password}</password></query></iq>"
            ))
            .map_err(|why| trouble(round, why))?;
        let exists = answer
            .child("error")
            .is_some_and(|error| error.child("conflict").is_some());
        if answer.attribute("type") != Some("result") && !exists {
            return Err(Trouble::Refused(format!(
                "registration of {name}: {answer}"
            )));
        }
        self.registered = true;
        self.note(round, format!("registered (existed: {exists})"));
        Ok(())
    }

    /// Logs in: resumes the last stream if there is one and `resume`, else binds; available at the end. Messages that were
    /// given up go out again under new ids.
    pub fn log_in(&mut self, round: &Round, resume: bool) -> Result<(), Trouble> {
        let mut wire = self.authenticate(round)?;
        if resume && !self.stream.id.is_empty() && !self.stream.confused {
            let xml = format!(
                "<resume xmlns='{NS_SM}' previd='{}' h='{}'/>",
                self.stream.id, self.stream.handled
            );
            wire.send(xml.as_bytes()).map_err(|_| Trouble::Gone)?;
            let answer = wire.next_element().map_err(|why| trouble(round, why))?;
            let h = answer.attribute("h").and_then(|h| h.parse().ok());
            match answer.name.as_str() {
                "resumed" => {
                    self.note(round, format!("resumed, h={h:?}"));
                    self.resumptions += 1;
                    self.wire = Some(wire);
                    match h {
                        Some(h) => self.covered(round, h, "<resumed/>"),
                        None => self.wrong("bad_count", format!("no h in {answer}")),
                    }
                    // XEP-0198 5: the rest is sent again as it was; it has not been handled
                    let again: Vec<String> = self
                        .stream
                        .unacked
                        .iter()
                        .map(|one| one.xml.clone())
                        .collect();
                    for xml in again {
                        self.write(round, &xml);
                    }
                    return Ok(());
                }
                "failed" => {
                    self.note(round, format!("not resumed, h={h:?}"));
                    self.failed_resumptions += 1;
                    if answer.child("item-not-found").is_none() {
                        let jid = self.jid();
                        self.wrong("bad_failed", format!("{jid}: {answer}"));
                    }
                    match h {
                        Some(h) => self.covered(round, h, "<failed/>"),
                        None if self.stream.covered == 0 => {}
                        None => {
                            let text = format!(
                                "{}: <failed/> without h, {} were covered before (the last message to be kept was {})",
                                self.jid(),
                                self.stream.covered,
                                self.stream.kept
                            );
                            let kind = match self.stream.kept {
                                0 => FAILED_H_FORGETS,
                                _ => "failed_without_h",
                            };
                            self.wrong(kind, text);
                        }
                    }
                }
                _ => return Err(Trouble::Refused(format!("to <resume/>: {answer}"))),
            }
        }
        let again = self.give_up(round);
        let jid = match wire.bind(&self.profile.resource) {
            Ok(jid) => jid,
            Err(why) => return Err(trouble(round, why)),
        };
        if jid != self.jid() {
            return Err(Trouble::Refused(format!("bound as {jid}")));
        }
        self.session += 1;
        self.available = false;
        self.note(round, format!("bound, session {}", self.session));
        self.wire = Some(wire);
        if self.profile.sm {
            self.enable(round)?;
        }
        if self.profile.carbons {
            let answer = self.ask(
                round,
                &format!("<iq type='set' id='{{id}}'><enable xmlns='{NS_CARBONS}'/></iq>"),
            )?;
            if answer.attribute("type") != Some("result") {
                return Err(Trouble::Refused(format!("carbons: {answer}")));
            }
        }
        self.say(round, "<presence/>".to_owned(), What::Other);
        for (to_user, to_bot, fleeting) in again {
            self.message(round, to_user, to_bot, fleeting);
        }
        Ok(())
    }

    fn authenticate(&mut self, round: &Round) -> Result<Connection, Trouble> {
        let allowed = self.facts.allowed("password");
        let passwords: Vec<String> = allowed.into_iter().flatten().map(str::to_owned).collect();
        let mut refusal = String::new();
        // a change on its way may become true between two attempts
        let rounds = if passwords.len() > 1 { 3 } else { 1 };
        for password in std::iter::repeat_n(passwords, rounds).flatten() {
            let mut wire = connect(round)?;
            let outcome = wire
                .authenticate(&self.profile.name, &password)
                .map_err(|why| trouble(round, why))?;
            if outcome.name == "success" {
                wire.open(DOMAIN).map_err(|why| trouble(round, why))?;
                self.password = password;
                return Ok(wire);
            }
            refusal = outcome.to_string();
        }
        Err(Trouble::Refused(format!(
            "{} cannot log in: {refusal}",
            self.jid()
        )))
    }

    /// No change is on its way any more (its server is dead): the password of the last log-in is the one.
    pub fn settle_password(&mut self) {
        let password = self.password.clone();
        self.facts.settle("password", Some(password));
    }

    /// Does an allowed password open the account?
    pub fn can_log_in(&mut self, round: &Round) -> Result<(), Trouble> {
        self.authenticate(round).map(drop)
    }

    fn enable(&mut self, round: &Round) -> Result<(), Trouble> {
        let xml = format!("<enable xmlns='{NS_SM}' resume='true'/>");
        self.write(round, &xml);
        loop {
            let Some(wire) = &mut self.wire else {
                return Err(Trouble::Gone);
            };
            let element = wire.next_element().map_err(|why| trouble(round, why))?;
            match element.name.as_str() {
                "enabled" => {
                    let Some(id) = element.attribute("id") else {
                        return Err(Trouble::Refused(format!("not resumable: {element}")));
                    };
                    self.stream = Stream {
                        id: id.to_owned(),
                        ..Stream::default()
                    };
                    return Ok(());
                }
                "failed" => return Err(Trouble::Refused(format!("{element}"))),
                _ => self.take(round, element),
            }
        }
    }

    /// The last stream will not be continued: its uncovered messages, to be sent again.
    fn give_up(&mut self, round: &Round) -> Vec<(usize, Option<usize>, bool)> {
        let stream = std::mem::take(&mut self.stream);
        self.asked = false;
        self.pending.clear();
        self.answers.clear();
        for sync in &mut self.syncs {
            sync.active = None;
            sync.page.clear();
        }
        let mut again = Vec::new();
        for unacked in stream.unacked {
            if let What::Message(number) = unacked.what {
                let sent = &mut self.sent[number];
                if sent.state == State::Open {
                    sent.state = State::Unknown;
                    again.push((sent.to_user, sent.to_bot, sent.fleeting));
                    self.note(round, format!("gave up m{number}"));
                }
            }
        }
        again
    }

    /// Cuts the connection as a broken network would: a reset, nothing said, unread bytes lost.
    pub fn cut(&mut self, round: &Round) {
        if let Some(wire) = self.wire.take() {
            // what had come and was not looked at is lost with it: it is neither received nor covered
            let _ = rustix::net::sockopt::set_socket_linger(wire.socket(), Some(Duration::ZERO));
            self.note(round, "cut".to_owned());
        }
        self.asked = false;
        for sync in &mut self.syncs {
            sync.active = None;
            sync.page.clear();
        }
    }

    /// Says goodbye and takes all that still comes.
    pub fn leave(&mut self, round: &Round) {
        if self.profile.sm && !self.stream.id.is_empty() {
            self.acknowledge(round);
        }
        self.write(round, "</stream:stream>");
        self.note(round, "left".to_owned());
        self.drain(round);
        self.stream.id.clear(); // nothing to be resumed
    }

    /// Takes what comes until the connection ends.
    pub fn drain(&mut self, round: &Round) {
        let deadline = Instant::now() + ANSWER_WITHIN;
        while self.listen(round, Duration::from_millis(200)) {
            if Instant::now() > deadline {
                let text = format!("{}: the connection does not end", self.jid());
                self.wrong("disconnects", text);
                self.cut(round);
            }
        }
    }

    // --- sending

    /// Sends the next numbered message.
    pub fn message(
        &mut self,
        round: &Round,
        to_user: usize,
        to_bot: Option<usize>,
        fleeting: bool,
    ) {
        self.send_message(round, to_user, to_bot, fleeting, None);
    }

    /// Takes back the message with this number, which was accepted.
    pub fn retract(&mut self, round: &Round, number: usize) {
        let to_user = self.sent[number].to_user;
        self.send_message(round, to_user, None, false, Some(number));
    }

    fn send_message(
        &mut self,
        round: &Round,
        to_user: usize,
        to_bot: Option<usize>,
        fleeting: bool,
        retracts: Option<usize>,
    ) {
        let number = self.sent.len();
        let to = match to_bot {
            Some(bot) => round.jids[bot].clone(),
            None => round.bare_jid(to_user),
        };
        let hint = match fleeting {
            true => "<no-store xmlns='urn:xmpp:hints'/>",
            false => "",
        };
        let me = self.profile.number;
        let retract = retracts.map_or(String::new(), |target| {
            format!(
                "<retract xmlns='{NS_RETRACT}' id='{}'/><fallback xmlns='urn:xmpp:fallback:0' for='{NS_RETRACT}'/>",
                message_id(me, target)
            )
        });
        let xml = format!(
            "<message type='chat' to='{to}' id='{}'>{retract}<body>{}</body>{hint}</message>",
            message_id(me, number),
            body(me, number)
        );
        self.sent.push(Sent {
            to_user,
            to_bot,
            fleeting,
            retracts,
            state: State::Open,
            round: round.number,
            session: self.session,
            counted_as: self.stream.sent.wrapping_add(1),
        });
        let taken_back = retracts.map_or(String::new(), |target| format!(", retracts m{target}"));
        self.note(round, format!("sent m{number} to {to}{taken_back}"));
        self.say(round, xml, What::Message(number));
    }

    /// Asks for the server's count.
    pub fn ask_count(&mut self, round: &Round) {
        if !self.stream.id.is_empty() && !self.asked {
            self.asked = true;
            self.write(round, &format!("<r xmlns='{NS_SM}'/>"));
        }
    }

    /// Tells the own count.
    pub fn acknowledge(&mut self, round: &Round) {
        if !self.stream.id.is_empty() {
            let xml = format!("<a xmlns='{NS_SM}' h='{}'/>", self.stream.handled);
            self.write(round, &xml);
        }
    }

    pub fn subscribe(&mut self, round: &Round, user: usize) {
        self.subscribed.entry(user).or_insert(false);
        let to = round.bare_jid(user);
        self.note(round, format!("asks {to} for a subscription"));
        self.say(
            round,
            format!("<presence type='subscribe' to='{to}'/>"),
            What::Subscribe(user),
        );
    }

    /// Asks for a change that is kept under `key`; `iq` is the content of the IQ.
    pub fn change(&mut self, round: &Round, key: &str, value: Option<String>, iq: &str) {
        let number = self.facts.ask(key, value);
        self.note(round, format!("change {number} of {key}: {iq}"));
        let id = self.id();
        self.pending
            .insert(id.clone(), Pending::Fact(key.to_owned(), number));
        self.say(
            round,
            format!("<iq type='set' id='{id}'>{iq}</iq>"),
            What::Other,
        );
    }

    /// Sends an IQ (`{id}` stands for its id) and waits for its answer.
    pub fn ask(&mut self, round: &Round, iq: &str) -> Result<Element, Trouble> {
        let id = self.id();
        self.pending.insert(id.clone(), Pending::Wanted);
        self.say(round, iq.replace("{id}", &id), What::Other);
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            if let Some(answer) = self.answers.remove(&id) {
                return Ok(answer);
            }
            if !self.listen(round, Duration::from_millis(50)) {
                return Err(Trouble::Gone);
            }
            if Instant::now() > deadline {
                return Err(Trouble::Refused(format!(
                    "{}: no answer to {iq}",
                    self.jid()
                )));
            }
        }
    }

    /// Asks for the next page of the own archive, unless one is under way.
    pub fn synchronise(&mut self, round: &Round, which: usize) {
        let sync = &mut self.syncs[which];
        if sync.active.is_some() {
            return;
        }
        let after = match sync.entries.last() {
            Some(entry) => format!("<after>{}</after>", entry.id),
            None => String::new(),
        };
        self.next_id += 1;
        let id = format!("q{}", self.next_id);
        sync.page.clear();
        sync.active = Some(id.clone());
        sync.complete = false;
        self.pending.insert(id.clone(), Pending::Archive(which));
        let xml = format!(
            "<iq type='set' id='{id}'><query xmlns='{NS_MAM}' queryid='{id}'>\
             <set xmlns='http://jabber.org/protocol/rsm'><max>{PAGE}</max>{after}</set></query></iq>"
        );
        self.say(round, xml, What::Other);
    }

    /// Reads the own archive to its end.
    pub fn synchronise_all(&mut self, round: &Round, which: usize) -> Result<(), Trouble> {
        let mut deadline = Instant::now() + ANSWER_WITHIN;
        let mut known = self.syncs[which].entries.len();
        loop {
            self.synchronise(round, which);
            while self.syncs[which].active.is_some() {
                if !self.listen(round, Duration::from_millis(50)) {
                    return Err(Trouble::Gone);
                }
                if Instant::now() > deadline {
                    let text = format!("{}: no answer to a query of the archive", self.jid());
                    return Err(Trouble::Refused(text));
                }
            }
            let sync = &self.syncs[which];
            if sync.complete {
                return Ok(());
            }
            if sync.entries.len() > known {
                known = sync.entries.len();
                deadline = Instant::now() + ANSWER_WITHIN;
            } else if !self.listen(round, Duration::from_millis(100)) {
                // told to wait: meanwhile something may come
                return Err(Trouble::Gone);
            }
        }
    }

    fn id(&mut self) -> String {
        self.next_id += 1;
        format!("i{}", self.next_id)
    }

    /// Writes a stanza and counts it.
    fn say(&mut self, round: &Round, xml: String, what: What) {
        self.write(round, &xml);
        if !self.stream.id.is_empty() {
            self.stream.sent = self.stream.sent.wrapping_add(1);
            self.stream.unacked.push_back(Unacked {
                count: self.stream.sent,
                xml,
                what,
            });
        }
    }

    /// A connection that does not take it is read to its end all the same.
    fn write(&mut self, round: &Round, xml: &str) {
        if let Some(wire) = &mut self.wire
            && let Err(why) = wire.send(xml.as_bytes())
            && !round.is_killed()
        {
            self.note(round, why);
        }
    }

    // --- receiving

    /// Takes what comes within `wait`, a bounded number of elements. False: the connection has ended.
    pub fn listen(&mut self, round: &Round, mut wait: Duration) -> bool {
        const ELEMENTS_MAX: usize = 64;
        for _ in 0..ELEMENTS_MAX {
            let Some(wire) = &mut self.wire else {
                return false;
            };
            match wire.hear(wait) {
                Ok(Heard::Item(Item::Element(element))) => {
                    self.take(round, element);
                    wait = Duration::ZERO;
                }
                Ok(Heard::Item(_)) => {}
                Ok(Heard::Nothing) => return true,
                Ok(Heard::Closed) => {
                    self.note(round, "the connection ended".to_owned());
                    self.wire = None;
                    return false;
                }
                Err(why) => {
                    let text = format!("{}: {why}", self.jid());
                    self.wrong("garbage", text);
                    self.wire = None;
                    return false;
                }
            }
        }
        true
    }

    fn take(&mut self, round: &Round, element: Element) {
        match element.name.as_str() {
            "message" | "presence" | "iq" => {
                self.stream.handled = self.stream.handled.wrapping_add(1);
            }
            "r" => return self.acknowledge(round),
            "a" => {
                self.asked = false;
                match element.attribute("h").and_then(|h| h.parse().ok()) {
                    Some(h) => self.covered(round, h, "<a/>"),
                    None => self.wrong("bad_count", format!("{}: {element}", self.jid())),
                }
                return;
            }
            _ => {
                self.note(round, format!("{element}"));
                if element.name == "error" && !round.is_killed() {
                    let text = format!("{}: {element}", self.jid());
                    self.wrong("stream_errors", text);
                }
                return;
            }
        }
        match element.name.as_str() {
            "message" => self.take_message(round, &element),
            "presence" => self.take_presence(round, &element),
            _ => self.take_iq(round, element),
        }
    }

    fn take_message(&mut self, round: &Round, element: &Element) {
        if element.attribute("type") == Some("error") {
            let number = element.attribute("id").and_then(parse_id);
            if let Some((bot, number)) = number
                && bot == self.profile.number
                && let Some(sent) = self.sent.get_mut(number)
            {
                sent.state = State::Refused;
                let error = element.child("error").map(ToString::to_string);
                self.note(round, format!("m{number} came back: {error:?}"));
            }
            return;
        }
        if let Some(result) = element.child("result")
            && result.namespace == NS_MAM
        {
            return self.take_result(result);
        }
        let wrapper = element
            .children
            .iter()
            .find(|child| child.namespace == NS_CARBONS && forwarded(child).is_some());
        let way = match wrapper.map(|wrapper| wrapper.name.as_str()) {
            None => Way::Direct,
            Some("sent") => Way::CopyOfSent,
            Some(_) => Way::CopyOfReceived,
        };
        let message = wrapper.and_then(forwarded).unwrap_or(element);
        let Some((from, number)) = self.identify(round, message) else {
            return;
        };
        let own = round.bare_jid(self.profile.user);
        let stable_id = message
            .children
            .iter()
            .find(|child| child.name == "stanza-id" && child.namespace == NS_SID)
            .filter(|child| child.attribute("by") == Some(&own))
            .and_then(|child| child.attribute("id"));
        self.note(
            round,
            format!(
                "{} m{number} of {} (stable id {stable_id:?})",
                if way == Way::Direct { "got" } else { "copy of" },
                round.jids[from]
            ),
        );
        self.received.push(Receipt {
            from,
            number,
            to_full: message.attribute("to").is_some_and(|to| to.contains('/')),
            session: self.session,
            stable_id: stable_id.map(Into::into),
            delayed: message.child("delay").is_some(),
            way,
            early: !self.available,
        });
    }

    /// Sender and number of one of our messages, if it is one, unharmed.
    fn identify(&mut self, round: &Round, message: &Element) -> Option<(usize, usize)> {
        let found = message.attribute("id").and_then(parse_id);
        let known = found.filter(|(from, number)| {
            let text = message.child("body").map(|body| body.text.as_str());
            round.jids.get(*from).map(String::as_str) == message.attribute("from")
                && text == Some(body(*from, *number).as_str())
        });
        if known.is_none() {
            let text = format!("{}: {message}", self.jid());
            self.wrong("changed_or_invented", text);
        }
        known
    }

    fn take_result(&mut self, result: &Element) {
        let query = result.attribute("queryid");
        let place = self
            .syncs
            .iter()
            .position(|sync| sync.active.as_deref() == query && query.is_some());
        let (Some(place), Some(id)) = (place, result.attribute("id")) else {
            return; // of a query that was given up
        };
        let error =
            forwarded(result).is_some_and(|message| message.attribute("type") == Some("error"));
        let tombstone = forwarded(result)
            .and_then(|message| message.child("retracted"))
            .filter(|child| child.namespace == NS_RETRACT);
        let retracted_by = tombstone.and_then(|child| child.attribute("id").and_then(parse_id));
        let message = forwarded(result).and_then(|message| {
            let (from, number) = message.attribute("id").and_then(parse_id)?;
            if retracted_by.is_some() && message.child("body").is_none() {
                return Some((from, number));
            }
            let text = message.child("body").map(|body| body.text.clone())?;
            (text == body(from, number)).then_some((from, number))
        });
        if message.is_none() && !error {
            let text = format!("{} in the archive: {result}", self.jid());
            self.wrong("changed_or_invented", text);
        }
        self.syncs[place].page.push(Entry {
            id: id.into(),
            message,
            retracted_by,
        });
    }

    fn take_presence(&mut self, round: &Round, element: &Element) {
        let from = element.attribute("from").unwrap_or_default();
        if element.attribute("type").is_none() && from == self.jid() {
            self.available = true;
        }
        if element.attribute("type") != Some("subscribe") || !self.profile.speaker {
            return;
        }
        let Some(user) = round.user(from) else {
            return;
        };
        self.note(round, format!("{from} asks for a subscription"));
        self.requests.insert(user);
        if self.approved.contains_key(&user) {
            return;
        }
        self.approved.insert(user, false);
        let to = round.bare_jid(user);
        self.say(
            round,
            format!("<presence type='subscribed' to='{to}'/>"),
            What::Approve(user),
        );
    }

    fn take_iq(&mut self, round: &Round, element: Element) {
        let id = element.attribute("id").unwrap_or_default().to_owned();
        let good = match element.attribute("type") {
            Some("result") => true,
            Some("error") => false,
            _ => {
                let to = element
                    .attribute("from")
                    .map(|from| format!(" to='{from}'"))
                    .unwrap_or_default();
                let xml = format!("<iq type='result' id='{id}'{to}/>");
                return self.say(round, xml, What::Other);
            }
        };
        match self.pending.remove(&id) {
            Some(Pending::Fact(key, number)) => {
                self.note(round, format!("change {number} of {key}: {good}"));
                self.changes_answered += u64::from(good);
                self.facts.answered(&key, number, good);
                if !good {
                    let text = format!("{}: change of {key}: {element}", self.jid());
                    self.wrong("changes_refused", text);
                }
            }
            // another one was given up when the connection broke
            Some(Pending::Archive(which)) if self.syncs[which].active.as_deref() == Some(&id) => {
                self.end_page(which, &element);
            }
            Some(Pending::Wanted) => {
                self.answers.insert(id, element);
            }
            Some(Pending::Archive(_)) | None => {}
        }
    }

    fn end_page(&mut self, which: usize, element: &Element) {
        let sync = &mut self.syncs[which];
        sync.active = None;
        let page = std::mem::take(&mut sync.page);
        let error = element
            .child("error")
            .and_then(|error| error.attribute("type"));
        if error == Some("wait") {
            self.archive_waits += 1;
            return; // asked again later
        }
        let Some(fin) = element.child("fin") else {
            let after = sync.entries.last().map(|entry| entry.id.clone());
            sync.complete = true; // as far as it can be read
            let text = format!("{}: archive after {after:?}: {element}", self.jid());
            return self.wrong("archive_refused", text);
        };
        sync.complete = fin.attribute("complete") == Some("true");
        let named = |name| fin.child("set").and_then(|set| set.child(name));
        let ends = |entry: Option<&Entry>| entry.map(|entry| entry.id.to_string());
        let told = (
            named("first").map(|first| first.text.clone()),
            named("last").map(|last| last.text.clone()),
        );
        let seen = (ends(page.first()), ends(page.last()));
        let stuck = page.is_empty() && !sync.complete;
        sync.complete |= stuck;
        sync.entries.extend(page);
        if told != seen || stuck {
            let text = format!(
                "{}: page from {seen:?} is told as {told:?}: {element}",
                self.jid()
            );
            self.wrong("archive_refused", text);
        }
    }

    /// The server's count: what it covers is accepted.
    fn covered(&mut self, round: &Round, h: u32, by: &str) {
        let stream = &mut self.stream;
        if stream.confused {
            return;
        }
        let beyond = h.wrapping_sub(stream.sent) as i32 > 0;
        let back = (h.wrapping_sub(stream.covered) as i32) < 0;
        if beyond || back {
            let text = format!(
                "{}: {by} says {h}; sent {}, covered before {} (the last message to be kept was {})",
                self.profile.name, stream.sent, stream.covered, stream.kept
            );
            stream.confused = true;
            let kind = match (beyond, by) {
                (true, _) => "count_beyond_sent",
                (false, "<failed/>") if h.wrapping_sub(stream.kept) as i32 >= 0 => FAILED_H_FORGETS,
                (false, "<failed/>") => "failed_h_too_low",
                (false, _) => "count_goes_back",
            };
            return self.wrong(kind, text);
        }
        stream.covered = h;
        let mut accepted = (usize::MAX, 0);
        while let Some(unacked) = self.stream.unacked.front() {
            if h.wrapping_sub(unacked.count) as i32 >= 0 {
                match unacked.what {
                    What::Message(number) => {
                        let sent = &mut self.sent[number];
                        if sent.state == State::Open {
                            sent.state = State::Accepted;
                        }
                        if !sent.fleeting {
                            self.stream.kept = unacked.count;
                        }
                        accepted = (accepted.0.min(number), number);
                    }
                    What::Subscribe(user) => {
                        self.subscribed.insert(user, true);
                    }
                    What::Approve(user) => {
                        self.approved.insert(user, true);
                    }
                    What::Other => {}
                }
                self.stream.unacked.pop_front();
            } else {
                break;
            }
        }
        let messages = match accepted {
            (usize::MAX, _) => "no message".to_owned(),
            (first, last) => format!("m{first} to m{last}"),
        };
        self.note(round, format!("{by} h={h}: {messages}"));
    }

    // --- the book

    pub fn note(&mut self, round: &Round, text: String) {
        self.events.push(Event {
            round: round.number,
            at: round.begun.elapsed(),
            text,
        });
    }

    pub fn wrong(&mut self, kind: &'static str, text: String) {
        self.wrong.push(Wrong { kind, text });
    }

    /// Events that tell of these messages of `sender`, what happened close to them, and how this client came and went then.
    pub fn events_around(&self, sender: &Bot, messages: &[usize], round: u32) -> Vec<String> {
        let mine = sender.profile.number == self.profile.number;
        let tells = |text: &str| {
            messages.iter().any(|number| {
                text.contains(&format!("m{number} of {}", sender.jid()))
                    || mine && text.contains(&format!("m{number} to "))
                    || mine && text.ends_with(&format!(" m{number}"))
                    || mine && covers(text, *number)
            })
        };
        let comes_or_goes = |event: &Event| {
            let begins = ["bound", "cut", "resumed", "not resumed", "left", "the conn"];
            event.round.abs_diff(round) < 2 && begins.iter().any(|one| event.text.starts_with(one))
        };
        let mut wanted = BTreeSet::new();
        let mut first = None;
        for (place, event) in self.events.iter().enumerate() {
            if tells(&event.text) {
                first.get_or_insert(place);
                wanted.extend(place.saturating_sub(1)..(place + 2).min(self.events.len()));
            }
        }
        let coming: Vec<usize> = (0..self.events.len())
            .filter(|place| comes_or_goes(&self.events[*place]))
            .collect();
        let at = coming.partition_point(|place| first.is_some_and(|first| *place < first));
        let near = at.saturating_sub(3)..(at + 6).min(coming.len());
        wanted.extend(&coming[near]);
        wanted
            .into_iter()
            .map(|place| {
                let event = &self.events[place];
                format!(
                    "round {} {:8.3} s  {}",
                    event.round,
                    event.at.as_secs_f64(),
                    event.text
                )
            })
            .collect()
    }
}

/// Does this note of [`Bot::covered`] tell of message `number`?
fn covers(text: &str, number: usize) -> bool {
    let Some((first, last)) = text
        .split_once(": m")
        .and_then(|(_, t)| t.split_once(" to m"))
    else {
        return false;
    };
    let parse = |text: &str| text.parse::<usize>().ok();
    matches!((parse(first), parse(last)), (Some(first), Some(last)) if (first..=last).contains(&number))
}

fn forwarded(wrapper: &Element) -> Option<&Element> {
    wrapper.child("forwarded")?.child("message")
}

fn connect(round: &Round) -> Result<Connection, Trouble> {
    let mut wire = Connection::connect(round.address).map_err(|why| trouble(round, why))?;
    let _ = wire.socket().set_write_timeout(Some(ANSWER_WITHIN));
    wire.open(DOMAIN).map_err(|why| trouble(round, why))?;
    Ok(wire)
}

/// While the server lives, a failure is its fault.
fn trouble(round: &Round, why: String) -> Trouble {
    match round.is_killed() {
        true => Trouble::Gone,
        false => Trouble::Refused(why),
    }
}

pub fn full_jid(name: &str, resource: &str) -> String {
    format!("{name}@{DOMAIN}/{resource}")
}

/// The id that sender and number give a message.
fn message_id(bot: usize, number: usize) -> String {
    format!("b{bot}-m{number}")
}

fn parse_id(id: &str) -> Option<(usize, usize)> {
    let (bot, number) = id.strip_prefix('b')?.split_once("-m")?;
    Some((bot.parse().ok()?, number.parse().ok()?))
}

/// The body of a message: follows from sender and number, most short, some beyond a disk block.
fn body(bot: usize, number: usize) -> String {
    let mixed = (bot * 31 + number).wrapping_mul(0x9e37_79b9) >> 3;
    let length = match mixed % 64 {
        0 => 5000,
        n => n * 6,
    };
    format!("{bot} {number} {}", "ä>x".repeat(length / 4))
}
