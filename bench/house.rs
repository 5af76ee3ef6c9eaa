//! A shard's sans-IO parts for benches: a slice whose users are loaded, clients that log in and write to each other, and
//! what a shard does at the end of its turns.
//!
//! In: nothing but a number of rounds. Out: work, handed to [`House::around`] where it is the server's; the clients' side
//! (their proof of a password) goes beside it. There is no socket and no clock.

#![allow(dead_code)] // every bench uses its own part

use std::cell::OnceCell;
use std::hint::black_box;
use std::rc::Rc;

use aws_lc_rs::{digest, hmac};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use nitro::store::journal::Place;
use nitro::store::overlay::Position;
use nitro::store::record::{ArchivedScramKeys, Record, RosterItem, Subscription, UserRecord};
use nitro::store::ring::Ring;
use nitro::store::tier::{Answer, Loaded};
use nitro::xml::{Framer, StreamNs};
use nitro::xmpp::bind::{Answers, Arrival, bind, enable};
use nitro::xmpp::fast::{self, Wishes};
use nitro::xmpp::negotiation::{Negotiation, Policy, Step};
use nitro::xmpp::sasl::decoy::Shape;
use nitro::xmpp::sasl::token::Ht;
use nitro::xmpp::sasl::{
    self, ChannelBindings, Credentials, Decoy, Mechanism, ScramKeys, ScramKeysRef,
};
use nitro::xmpp::session::SessionId;
use nitro::xmpp::slice::{Env, Limits, Now, Slice, Start};

const DOMAIN: &str = "localhost";
const PASSWORD: &str = "secret";
const CONTACTS: usize = 20;
const HEADER: &str = "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='localhost' version='1.0'>";
const BIND: &str = "<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>desk</resource></bind></iq>";
/// Names the client's installation.
const AGENT: &str = "d4565fa7-4d72-4749-b3d3-740edbf87770";
const LOGIN_KEY: [u8; 32] = [1; 32];
const ROSTER: &str = "<iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>";
const PRESENCE: &str = "<presence/>";
/// 220 bytes, to be archived on both sides.
pub const CHAT: &str = "<message to='bob@localhost/desk' id='c0ffee42' type='chat' xml:lang='en'>\
<body>EURUSD 1.0842/44, can you do 25m?</body>\
<active xmlns='http://jabber.org/protocol/chatstates'/>\
<request xmlns='urn:xmpp:receipts'/></message>";
/// The same, not to be stored.
pub const FLEETING: &str = "<message to='bob@localhost/desk' id='c0ffee42' type='chat' xml:lang='en'>\
<body>EURUSD 1.0842/44, can you do 25m?</body>\
<no-store xmlns='urn:xmpp:hints'/></message>";

pub struct House {
    /// What runs the server's work.
    pub around: fn(&mut dyn FnMut()),
    slice: Slice,
    keys: (ScramKeys, ScramKeys),
    salted: [u8; 20],
    decoy: Decoy,
    links: u64,
    /// Who writes messages.
    sender: Option<Live>,
    /// Of the user who logs in with one.
    token: Option<String>,
}

struct Live {
    session: SessionId,
    framer: Framer,
}

/// What a connection has been sent; its buffer is used again.
type Out = Vec<u8>;

impl House {
    /// One shard, on which all live: carol, who has no contacts, alice with hers, who are on line, and bob, who is too.
    pub fn new() -> House {
        let keys = sasl::new_keys(PASSWORD, 4096).expect("a good password");
        let mut salted = [0; 20];
        let iterations = std::num::NonZeroU32::new(4096).expect("it is not zero");
        let algorithm = aws_lc_rs::pbkdf2::PBKDF2_HMAC_SHA1;
        aws_lc_rs::pbkdf2::derive(
            algorithm,
            iterations,
            &keys.0.salt,
            PASSWORD.as_bytes(),
            &mut salted,
        );
        let env = Env {
            domain: DOMAIN.into(),
            rooms: Some(format!("rooms.{DOMAIN}").into()),
            upload: None,
            upload_key: None,
            shard: 0,
            ring: Rc::new(Ring::of_shards(1)),
            limits: limits(),
            id_key: [1, 2],
            login_key: LOGIN_KEY,
            features: OnceCell::new(),
        };
        // what is delivered at once is never read back
        let start = Start::new(Rc::new(|_, _| Err("nothing is kept".into())));
        let mut slice = Slice::new(env, 1, 64 << 20, start);
        slice.now = Now {
            ms: 1_000_000,
            unix: 1_790_000_000,
            unix_ms: 1_790_000_000_000,
            ..Now::default()
        };
        let mut house = House {
            slice,
            keys,
            salted,
            decoy: Decoy::new(
                &[7; 32],
                &[],
                Shape {
                    iterations: 4096,
                    salt_len: 16,
                },
            ),
            links: 0,
            around: |work| work(),
            sender: None,
            token: None,
        };
        let contacts: Vec<String> = (0..CONTACTS).map(|n| format!("trader{n:02}")).collect();
        house.add("alice", &contacts);
        house.add("carol", &[]);
        house.add("bob", &[]);
        for contact in &contacts {
            house.add(contact, &["alice".into()]);
            house.online(contact);
        }
        house.online("bob");
        house
    }

    fn add(&mut self, name: &str, contacts: &[String]) {
        let record = self.record(contacts);
        self.load(name, &record);
    }

    fn record(&self, contacts: &[String]) -> UserRecord {
        let item = |contact: &String| RosterItem {
            jid: format!("{contact}@{DOMAIN}"),
            name: contact.to_uppercase(),
            groups: vec!["Desk".into()],
            subscription: Subscription::Both,
            ..RosterItem::default()
        };
        UserRecord {
            sha1: Some(self.keys.0.clone().into()),
            sha256: Some(self.keys.1.clone().into()),
            roster: contacts.iter().map(item).collect(),
            ..UserRecord::default()
        }
    }

    fn load(&mut self, name: &str, record: &UserRecord) {
        self.slice.want(name);
        self.slice.fx.requests.clear();
        self.slice.answers(vec![Answer::Loaded {
            name: name.into(),
            user: Some(Loaded {
                record: Record::new(record),
                revision: 1,
                pending: Vec::new(),
                last: None,
                index: None,
            }),
        }]);
        self.settle();
    }

    /// A session that is available, without its login.
    fn online(&mut self, name: &str) -> SessionId {
        let session = self.arrive(name, Some("desk"));
        self.element(session, PRESENCE);
        self.settle();
        session
    }

    fn arrive(&mut self, user: &str, resource: Option<&str>) -> SessionId {
        self.links += 1;
        let known = self.slice.user(user);
        let arrival = Arrival {
            user,
            account: known.map(|known| nitro::xmpp::fast::account(known.record.get())),
            resource,
            link: self.links,
            lang: None,
            stream_ns: Rc::new(StreamNs::client()),
            peer: "127.0.0.1".into(),
            tls: false,
        };
        bind(&mut self.slice, arrival).expect("a loaded user")
    }

    fn element(&mut self, session: SessionId, xml: &str) {
        let taken = self.slice.element(session, xml.as_bytes());
        taken.expect("a good stanza");
    }

    /// What a shard does at the end of its turns until nothing moves: commits, output, drain.
    fn settle(&mut self) {
        let place = |_| Place {
            file: 1,
            offset: 4096,
            len: 100,
        };
        loop {
            while let Some(group) = self.slice.seal() {
                self.slice.committed(Some(&group), &place);
                self.slice.ledger.give_back(group);
            }
            self.slice.release(usize::MAX);
            let mut dirty = std::mem::take(&mut self.slice.fx.dirty);
            dirty.extend(std::iter::from_fn(|| self.slice.next_fanned()));
            if dirty.is_empty() {
                break;
            }
            for session in dirty {
                if let Some((_, bytes)) = self.slice.take_out(session) {
                    self.slice.reuse(black_box(bytes));
                }
            }
            for session in std::mem::take(&mut self.slice.fx.unconfirmed) {
                self.slice.confirmed(session);
            }
        }
        self.slice.fx.closing.clear();
        self.slice.fx.loaded.clear();
        let seq = self.slice.ledger.sealed_seq();
        self.slice.drained(Position { journal: 0, seq });
    }

    fn count(&mut self, mut work: impl FnMut(&mut Self)) {
        (self.around)(&mut || work(self));
    }

    /// Connect to available: SCRAM-SHA-1 without TLS, roster, presence; then log-out, uncounted.
    pub fn log_in(&mut self, name: &'static str) {
        let mut negotiation = Negotiation::new(DOMAIN, policy());
        let mut out = Out::new();
        let mut framer = Framer::new();
        let first = format!("n,,n={name},r=fyko+d2lbbFgONRv9qkxdawL");
        let auth = format!(
            "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='SCRAM-SHA-1'>{}</auth>",
            BASE64_STANDARD.encode(&first)
        );
        let both = format!("{HEADER}{auth}");
        self.count(|this| {
            let step = this.frames(&mut negotiation, &mut framer, &both, &mut out);
            assert!(matches!(step, Step::Login { .. }));
            assert!(this.slice.want(name));
            let user = this.slice.user(name).expect("it is cached");
            let record = user.record.get();
            let keys = Credentials {
                sha1: record.sha1.as_ref().map(borrow),
                sha256: record.sha256.as_ref().map(borrow),
            };
            negotiation.credentials(Some(keys), false, &this.decoy, &mut out);
        });
        let response = self.response(&first, &out);
        self.count(|this| {
            out.clear();
            let step = this.frames(&mut negotiation, &mut framer, &response, &mut out);
            assert!(matches!(step, Step::Authenticated));
            framer = Framer::new();
        });
        let both = format!("{HEADER}{BIND}");
        let mut session = None;
        self.count(|this| {
            let step = this.frames(&mut negotiation, &mut framer, &both, &mut out);
            let Step::Bind { resource, .. } = step else {
                panic!("it is bound");
            };
            let new = this.arrive(name, resource.as_deref());
            let jid = &*this.slice.sessions.get(new).expect("it is new").jid;
            negotiation.bound(Ok((jid, &Answers::default())), &this.slice.env, &mut out);
            session = Some(new);
        });
        self.settle_in(session.expect("it was bound"), &mut framer);
    }

    /// Roster and presence; then log-out, uncounted.
    fn settle_in(&mut self, session: SessionId, framer: &mut Framer) {
        for stanza in [ROSTER, PRESENCE] {
            self.count(|this| {
                this.frame_and_take(session, framer, stanza);
                this.settle();
            });
        }
        self.slice.end(session, None);
        self.settle();
    }

    /// Connect to available in one round trip: a token (XEP-0484) by XEP-0388, with XEP-0386's binding, XEP-0198 and XEP-0280,
    /// as if within TLS; roster, presence; then log-out, uncounted.
    pub fn log_in_by_token(&mut self, name: &'static str) {
        let token = self.token(name);
        let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
        let proof = hmac::sign(&key, b"Initiator");
        let initial = BASE64_STANDARD.encode([name.as_bytes(), b"\0", proof.as_ref()].concat());
        let both = format!(
            "{HEADER}<authenticate xmlns='urn:xmpp:sasl:2' mechanism='HT-SHA-256-NONE'>\
             <initial-response>{initial}</initial-response><user-agent id='{AGENT}'/><fast xmlns='urn:xmpp:fast:0'/>\
             <bind xmlns='urn:xmpp:bind:0'><tag>desk</tag><enable xmlns='urn:xmpp:sm:3' resume='true'/>\
             <enable xmlns='urn:xmpp:carbons:2'/></bind></authenticate>"
        );
        let mut negotiation = Negotiation::new(DOMAIN, policy());
        negotiation.encrypted(ChannelBindings::default());
        let (mut out, mut framer) = (Out::new(), Framer::new());
        let mut session = None;
        self.count(|this| {
            let step = this.frames(&mut negotiation, &mut framer, &both, &mut out);
            assert!(matches!(step, Step::Login { .. }) && negotiation.shows_token());
            assert!(this.slice.want(name));
            let user = this.slice.user(name).expect("it is cached");
            let (record, now) = (user.record.get(), this.slice.now.unix);
            negotiation.account = Some(fast::account(record));
            let step = negotiation.token(Some(record), &this.slice.env, now, &mut out);
            assert!(matches!(step, Step::Authenticated));
            let step = negotiation.proceed(&this.slice.env, &mut out);
            assert!(matches!(step, Step::Tokens));
            let wishes = &negotiation.request().expect("it came along").tokens;
            assert!(fast::plan(record, AGENT, wishes, TERMS, now, [1; 16]).is_none());
            let step = negotiation.tokens(Ok(None), &this.slice.env, &mut out);
            let Step::Bind { resource, extras } = step else {
                panic!("it is bound");
            };
            let new = this.arrive(name, resource.as_deref());
            let answers = enable(&mut this.slice, new, &extras);
            let jid = &*this.slice.sessions.get(new).expect("it is new").jid;
            negotiation.bound(Ok((jid, &answers)), &this.slice.env, &mut out);
            session = Some(new);
        });
        assert!(out.ends_with(b"</stream:features>"));
        self.settle_in(session.expect("it was bound"), &mut framer);
    }

    /// The user's token; at first he is made, with it.
    fn token(&mut self, name: &str) -> String {
        if self.token.is_none() {
            let wishes = Wishes {
                request: Some(Ht::None),
                ..Wishes::default()
            };
            let mut record = self.record(&[]);
            let now = self.slice.now.unix;
            let plan = fast::plan(
                Record::new(&record).get(),
                AGENT,
                &wishes,
                TERMS,
                now,
                [9; 16],
            );
            let plan = plan.expect("a token was asked for");
            plan.apply(&mut record);
            let answer = plan.answer(&LOGIN_KEY, name, Record::new(&record).get(), AGENT);
            let answer = answer.expect("a token is given");
            let (_, token) = answer.split_once("token='").expect("it is in there");
            let token = token.split('\'').next().expect("it ends");
            self.token = Some(token.to_owned());
            self.load(name, &record);
        }
        self.token.clone().expect("it was made")
    }

    /// Frames of one read; the last step.
    fn frames(
        &mut self,
        negotiation: &mut Negotiation,
        framer: &mut Framer,
        bytes: &str,
        out: &mut Out,
    ) -> Step {
        let mut rest = bytes.as_bytes();
        let mut last = Step::Continue;
        while !rest.is_empty() {
            let frame = framer.next(rest, negotiation.limits()).expect("good XML");
            let frame = frame.expect("whole frames");
            let step = negotiation.frame(frame.kind, &rest[..frame.len], &self.slice.env, out);
            last = step.expect("a good frame");
            rest = &rest[frame.len..];
        }
        last
    }

    fn frame_and_take(&mut self, session: SessionId, framer: &mut Framer, stanza: &str) {
        let frame = framer.next(stanza.as_bytes(), &self.slice.env.limits.xml);
        let frame = frame.expect("good XML").expect("a whole stanza");
        self.element(session, &stanza[..frame.len]);
    }

    /// The client's proof (RFC 5802 section 3).
    fn response(&self, first: &str, out: &Out) -> String {
        let text = std::str::from_utf8(out).expect("XML");
        let (_, rest) = text.rsplit_once("<challenge").expect("a challenge");
        let data = rest.split(['>', '<']).nth(1).expect("its data");
        let challenge = BASE64_STANDARD.decode(data).expect("base64");
        let challenge = String::from_utf8(challenge).expect("text");
        let nonce = challenge.split(',').next().expect("a nonce");
        let without_proof = format!("c=biws,{nonce}");
        let message = format!("{},{challenge},{without_proof}", &first[3..]);
        let mac = |key: &[u8], data: &[u8]| {
            let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key);
            hmac::sign(&key, data)
        };
        let client_key = mac(&self.salted, b"Client Key");
        let stored = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, client_key.as_ref());
        let signature = mac(stored.as_ref(), message.as_bytes());
        let proof: Vec<u8> = client_key
            .as_ref()
            .iter()
            .zip(signature.as_ref())
            .map(|(a, b)| a ^ b)
            .collect();
        let data = format!("{without_proof},p={}", BASE64_STANDARD.encode(proof));
        format!(
            "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>{}</response>",
            BASE64_STANDARD.encode(data)
        )
    }

    /// Read to written, of one message from carol to bob.
    pub fn chat(&mut self, stanza: &str) {
        if self.sender.is_none() {
            let mut framer = Framer::new();
            let header = framer.next(HEADER.as_bytes(), &self.slice.env.limits.xml);
            header.expect("good XML");
            let session = self.online("carol");
            self.sender = Some(Live { session, framer });
        }
        self.slice.now.ms += 1;
        self.slice.now.unix_ms += 1;
        self.count(|this| {
            let mut sender = this.sender.take().expect("she is on line");
            this.frame_and_take(sender.session, &mut sender.framer, stanza);
            this.settle();
            this.sender = Some(sender);
        });
    }
}

fn borrow(keys: &ArchivedScramKeys) -> ScramKeysRef<'_> {
    ScramKeysRef {
        iterations: keys.iterations.to_native(),
        salt: &keys.salt,
        stored_key: &keys.stored_key,
        server_key: &keys.server_key,
    }
}

fn policy() -> Policy {
    Policy {
        tls_offered: true,
        tls_required: false,
        mechanisms: Mechanism::ALL.to_vec(),
        register: true,
        sasl2: true,
        tokens: true,
        attempts_max: 3,
        xml: Default::default(),
    }
}

/// Long ones: none is due.
const TERMS: fast::Terms = fast::Terms {
    life_seconds: 21 * 86_400,
    tokens_max: 16,
};

/// The defaults of the configuration, as far as anything here comes near them.
fn limits() -> Limits {
    Limits {
        xml: Default::default(),
        resources_per_user_max: 16,
        roster_items_max: 2000,
        roster_item_bytes_max: 4096,
        blocked_max: 1000,
        subscription_requests_max: 500,
        directed_presence_max: 500,
        record_bytes_max: 1 << 24,
        send_queue_bytes_max: 2 << 20,
        deferred_stanzas_max: 500,
        offline_messages_max: 1000,
        offline_bytes_max: 4 << 20,
        private_bytes_max: 1 << 16,
        vcard_bytes_max: 192 << 10,
        load_queue_bytes_max: 1 << 20,
        mesh_backlog_bytes_max: 64 << 20,
        unacked_bytes_max: 2 << 20,
        unacked_stanzas_max: 5000,
        resume_ms_max: 300_000,
        parked_max: 50_000,
        ping_idle_ms: 300_000,
        ping_timeout_ms: 60_000,
        registration: true,
        iterations: 4096,
        archive_page_max: 250,
        archive_prefs_max: 200,
        archive_keep_ms: 0,
        archive_recent_bytes_max: 32 << 20,
        pubsub: nitro::xmpp::pubsub::edit::Bounds {
            nodes_max: 100,
            items_max: 1000,
            item_bytes_max: 192 << 10,
            bytes_max: 1 << 20,
            affiliations_max: 100,
        },
        pubsub_page_items_max: 500,
        pep_waiting_max: 10_000,
        group_greetings_members_max: 100,
        caps_remembered_max: 10_000,
        rooms: nitro::xmpp::room::Limits {
            creators: None,
            rooms_max: 10_000,
            per_session_max: 200,
            session_presences_per_second_max: 1000,
            occupants_max: 2000,
            affiliates_max: 5000,
            nick_bytes_max: 128,
            subject_bytes_max: 4096,
            history_max: 100,
            history_bytes_max: 1 << 18,
            messages_per_second_max: 50,
            presences_per_second_max: 10,
            lasting_per_owner_max: 100,
            lasting_max: 1000,
            left_ms: 600_000,
            registrations_per_second_max: 1000,
            requests_max: 100,
            persistent: false,
            archive_keep_ms: 0,
        },
        push: nitro::xmpp::feature::push::Limits {
            services_max: 16,
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
        upload: nitro::xmpp::feature::upload::Limits {
            url: "https://localhost:5443".into(),
            file_bytes_max: 100_000,
            slot_seconds: 300,
            waiting_max: 100,
            user_waiting_max: 8,
        },
    }
}
