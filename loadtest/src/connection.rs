//! One client's side of XMPP from stream header to presence, as a state machine over stanzas: no socket, no clock.
//!
//! In: pieces cut by the [`scanner`](crate::scanner). Out: bytes appended to [`Connection::out`] and an [`Effect`] that
//! the driver carries out. It waits for each answer before it goes on, as ordinary clients do; only the roster request
//! and the initial presence leave together.

use aws_lc_rs::hmac;
use base64::prelude::{BASE64_STANDARD, Engine};

use crate::element::{attribute, escape, find, name, tags, unescape};
use crate::options::{Login, Mechanism, Target, TlsMode, Until};
use crate::scanner::Kind;
use crate::scram::{self, Exchange, KeyCache};

const SASL2: &str = "urn:xmpp:sasl:2";
/// The one mechanism for tokens that needs nothing of TLS.
const HT: &str = "HT-SHA-256-NONE";

/// A user, across all of his connections.
pub struct Account {
    pub name: String,
    pub keys: KeyCache,
    /// Of a session that was cut.
    pub resumption: Option<Resumption>,
    /// XEP-0484; it outlives log-outs, as those of real clients do.
    pub token: Option<String>,
}

/// What a client needs to go on with a session (XEP-0198, section 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumption {
    id: String,
    sent: u32,
    handled: u32,
    full_jid: String,
}

/// What a connection is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Login,
    /// Go on with the account's session, or log in where that is no more.
    Resume,
    /// XEP-0077, before authentication.
    Register,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{wanted} is not offered here (offered: {offered})")]
    MechanismNotOffered {
        wanted: &'static str,
        offered: String,
    },
    #[error("STARTTLS is not offered here")]
    StartTlsNotOffered,
    #[error("stream management (XEP-0198) is not offered here, and this run wants it")]
    ManagementNotOffered,
    #[error("sessions cannot be resumed here (XEP-0198)")]
    ResumptionNotOffered,
    #[error("the server acknowledged {acknowledged} stanzas of {sent}")]
    Acknowledged { acknowledged: u32, sent: u32 },
    #[error("this TLS connection exports nothing to bind to")]
    NothingToBind,
    #[error("authentication failed: {0}")]
    Authentication(String),
    #[error("SCRAM: {0}")]
    Scram(#[from] scram::Error),
    #[error("the server refused {what}: {condition}")]
    Refused {
        what: &'static str,
        condition: String,
    },
    #[error("stream error {0}")]
    Stream(String),
    #[error("the server closed the stream")]
    Closed,
    #[error("unexpected <{got}/> {during}")]
    Unexpected { got: String, during: &'static str },
}

/// What the driver has to do after a piece.
#[derive(Debug)]
pub enum Effect {
    None,
    /// A new stream follows: restart the scanner.
    Restart,
    /// Start TLS on the socket, then call [`Connection::open`].
    StartTls,
    /// The purpose is fulfilled: logged in, or registered.
    Done,
    /// Logged in again, in the session that was cut.
    Resumed,
    /// The account was there before.
    Exists,
    /// A stanza for the scenario.
    Live,
    /// The server has so many of our stanzas (XEP-0198, modulo 2^32).
    Acknowledged(u32),
    /// The server ended the stream in answer to our end.
    Ended,
    Failed(Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Header sent, features awaited.
    Features,
    /// `<starttls/>` sent.
    Proceed,
    Challenge,
    Success,
    Register,
    /// XEP-0388 has succeeded with a session, `resumed` or new; the features that follow are awaited.
    Features2 {
        resumed: bool,
    },
    Bind,
    Session,
    EnableStreamManagement,
    Resume,
    /// Roster request and presence sent.
    Initial,
    Online,
    Closing,
}

pub struct Connection {
    /// Bytes for the server, before TLS.
    pub out: Vec<u8>,
    /// Stanzas written to `out` since stream management was enabled, modulo 2^32. Who writes one there counts it.
    pub sent: u32,
    /// Presence stanzas received from others.
    pub presences: u64,
    /// What the TLS connection exports for channel binding, once it is there; from the driver, for mechanisms that want it.
    pub exporter: Option<[u8; 32]>,
    /// Contacts whose presence we may see; kept when [`Target::track_contacts`] asks for it.
    pub contacts: Vec<String>,
    pub archive: crate::archive::Place,
    purpose: Purpose,
    state: State,
    secure: bool,
    authenticated: bool,
    session_required: bool,
    management_offered: bool,
    managed: bool,
    /// The server's name for this session, if it may be resumed.
    resumption_id: Option<String>,
    roster_seen: bool,
    presence_seen: bool,
    /// Inbound stanzas counted for XEP-0198.
    handled: u32,
    /// Authentication was sent with the stream header: the first features are of no interest.
    ahead: bool,
    exchange: Option<Box<Exchange>>,
    full_jid: String,
}

impl Connection {
    pub fn new(purpose: Purpose, target: &Target) -> Connection {
        Connection {
            out: Vec::new(),
            sent: 0,
            presences: 0,
            exporter: None,
            contacts: Vec::new(),
            archive: Default::default(),
            purpose,
            state: State::Features,
            secure: target.tls == TlsMode::Direct,
            authenticated: false,
            session_required: false,
            management_offered: false,
            managed: false,
            resumption_id: None,
            roster_seen: false,
            presence_seen: false,
            handled: 0,
            ahead: false,
            exchange: None,
            full_jid: String::new(),
        }
    }

    pub fn is_online(&self) -> bool {
        self.state == State::Online
    }

    /// Sends the stream header.
    pub fn open(&mut self, target: &Target) {
        self.write(&[
            "<?xml version='1.0'?><stream:stream xmlns='jabber:client' \
             xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='",
            &escape(&target.domain),
            "'>",
        ]);
    }

    /// Sends the stream header, and what this user may send with it.
    pub fn begin(&mut self, target: &Target, account: &mut Account) {
        self.open(target);
        let wanted =
            self.secure && target.login == Login::Fast && self.purpose != Purpose::Register;
        if let Some(token) = account.token.clone().filter(|_| wanted) {
            let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
            let hash = hmac::sign(&key, b"Initiator");
            let message = [account.name.as_bytes(), b"\0", hash.as_ref()].concat();
            self.authenticate2(HT, &message, target, account);
            self.ahead = true;
            self.state = State::Success;
        }
    }

    /// XEP-0388: authentication, and with it all that would follow.
    fn authenticate2(
        &mut self,
        mechanism: &str,
        initial: &[u8],
        target: &Target,
        account: &mut Account,
    ) {
        let initial = BASE64_STANDARD.encode(initial);
        self.write(&[
            "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='",
            mechanism,
            "'><initial-response>",
            &initial,
            "</initial-response><user-agent id='loadtest-",
            &escape(&account.name),
            "'/>",
        ]);
        if mechanism == HT {
            self.write(&["<fast xmlns='urn:xmpp:fast:0'/>"]);
        } else if target.login == Login::Fast {
            self.write(&[
                "<request-token xmlns='urn:xmpp:fast:0' mechanism='",
                HT,
                "'/>",
            ]);
        }
        if self.purpose == Purpose::Resume
            && let Some(session) = account.resumption.take()
        {
            self.resume(session);
        }
        self.write(&["<bind xmlns='urn:xmpp:bind:0'>"]);
        if !target.resource.is_empty() {
            self.write(&["<tag>", &escape(&target.resource), "</tag>"]);
        }
        if target.stream_management {
            self.write(&[if target.resumption {
                "<enable xmlns='urn:xmpp:sm:3' resume='true'/>"
            } else {
                "<enable xmlns='urn:xmpp:sm:3'/>"
            }]);
        }
        self.write(&["</bind></authenticate>"]);
    }

    /// XEP-0388: what has come of it all.
    fn on_success2(
        &mut self,
        success: &[u8],
        target: &Target,
        account: &mut Account,
    ) -> Result<(), Error> {
        let text = |raw: &[u8]| String::from_utf8_lossy(&unescape(raw)).into_owned();
        if let Some(token) = find(success, b"token").and_then(|tag| attribute(tag.raw, b"token")) {
            account.token = Some(text(token));
        }
        self.authenticated = true;
        if find(success, b"resumed").is_some() {
            self.managed = true;
            self.state = State::Features2 { resumed: true };
            return Ok(());
        }
        if find(success, b"bound").is_none() {
            return Err(Error::Refused {
                what: "the binding of a resource",
                condition: condition(success),
            });
        }
        self.resumption_id = None;
        (self.sent, self.handled) = (0, 0);
        let jid = find(success, b"authorization-identifier").map(|tag| text(tag.text));
        self.full_jid = jid.unwrap_or_default();
        if let Some(enabled) = find(success, b"enabled") {
            self.managed = true;
            if target.resumption {
                let id = attribute(enabled.raw, b"id").filter(|_| is_resumable(enabled.raw));
                self.resumption_id = Some(text(id.ok_or(Error::ResumptionNotOffered)?));
            }
        } else if target.acknowledgements {
            return Err(Error::ManagementNotOffered);
        }
        self.state = State::Features2 { resumed: false };
        Ok(())
    }

    /// What goes on after the connection is gone.
    pub fn resumption(&self) -> Option<Resumption> {
        Some(Resumption {
            id: self.resumption_id.clone()?,
            sent: self.sent,
            handled: self.handled,
            full_jid: self.full_jid.clone(),
        })
    }

    /// Logs out: the driver waits for [`Effect::Ended`] or the end of the connection.
    pub fn close(&mut self) {
        if self.is_online() {
            self.write(&["<presence type='unavailable'/>"]);
        }
        self.write(&["</stream:stream>"]);
        self.state = State::Closing;
    }

    pub fn on_piece(
        &mut self,
        kind: Kind,
        piece: &[u8],
        target: &Target,
        account: &mut Account,
    ) -> Effect {
        match kind {
            Kind::Open => Effect::None,
            Kind::Close if self.state == State::Closing => Effect::Ended,
            Kind::Close => Effect::Failed(Error::Closed),
            Kind::Stanza => self
                .on_stanza(piece, target, account)
                .unwrap_or_else(Effect::Failed),
        }
    }

    fn on_stanza(
        &mut self,
        stanza: &[u8],
        target: &Target,
        account: &mut Account,
    ) -> Result<Effect, Error> {
        let name = name(stanza);
        if name == b"error" {
            return Err(Error::Stream(condition(stanza)));
        }
        match self.state {
            State::Features if name == b"features" => self.on_features(stanza, target, account),
            State::Proceed if name == b"proceed" => {
                self.secure = true;
                self.state = State::Features;
                Ok(Effect::StartTls)
            }
            State::Success if name == b"features" && std::mem::take(&mut self.ahead) => {
                Ok(Effect::None)
            }
            State::Features2 { resumed: true } if name == b"features" => {
                self.state = State::Online;
                Ok(Effect::Resumed)
            }
            State::Features2 { resumed: false } if name == b"features" => {
                self.send_initial(target);
                Ok(Effect::None)
            }
            State::Features2 { .. } => Err(unexpected(name, "instead of stream features")),
            State::Challenge | State::Success => self.on_sasl(name, stanza, target, account),
            State::Register if exists(stanza) => Ok(Effect::Exists),
            State::Register => {
                let registered = self.answer(stanza, name, b"register", "registration")?;
                Ok(if registered {
                    Effect::Done
                } else {
                    Effect::None
                })
            }
            State::Bind => {
                if self.answer(stanza, name, b"bind", "the binding of a resource")? {
                    let jid = find(stanza, b"jid")
                        .map(|jid| unescape(jid.text).into_owned())
                        .unwrap_or_default();
                    self.full_jid = String::from_utf8_lossy(&jid).into_owned();
                    self.after_bind(target)?;
                }
                Ok(Effect::None)
            }
            State::Session => {
                if self.answer(stanza, name, b"session", "a session")? {
                    self.session_required = false;
                    self.after_bind(target)?;
                }
                Ok(Effect::None)
            }
            State::EnableStreamManagement if name == b"enabled" => {
                self.managed = true;
                self.sent = 0;
                if target.resumption {
                    let id = attribute(stanza, b"id").filter(|_| is_resumable(stanza));
                    let id = unescape(id.ok_or(Error::ResumptionNotOffered)?);
                    self.resumption_id = Some(String::from_utf8_lossy(&id).into_owned());
                }
                self.send_initial(target);
                Ok(Effect::None)
            }
            State::EnableStreamManagement if name == b"failed" => Err(Error::Refused {
                what: "stream management",
                condition: condition(stanza),
            }),
            State::Resume if name == b"resumed" => {
                self.managed = true;
                self.state = State::Online;
                Ok(Effect::Resumed)
            }
            // The session is no more: as if it had never been tried (XEP-0198, section 5).
            State::Resume if name == b"failed" => {
                self.resumption_id = None;
                (self.sent, self.handled) = (0, 0);
                self.bind(target);
                Ok(Effect::None)
            }
            State::Resume => Err(unexpected(name, "in answer to a resumption")),
            State::Initial | State::Online | State::EnableStreamManagement => {
                self.on_live(name, stanza, target)
            }
            // What was on its way when we said goodbye.
            State::Closing => Ok(Effect::None),
            State::Features => Err(unexpected(name, "instead of stream features")),
            State::Proceed => Err(unexpected(name, "in answer to STARTTLS")),
        }
    }

    fn on_features(
        &mut self,
        features: &[u8],
        target: &Target,
        account: &mut Account,
    ) -> Result<Effect, Error> {
        if !self.secure && target.tls == TlsMode::Starttls {
            find(features, b"starttls").ok_or(Error::StartTlsNotOffered)?;
            self.write(&["<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"]);
            self.state = State::Proceed;
            return Ok(Effect::None);
        }
        if self.purpose == Purpose::Register {
            self.write(&[
                "<iq type='set' id='register'><query xmlns='jabber:iq:register'><username>",
                &escape(&account.name),
                "</username><password>",
                &escape(&target.password),
                "</password></query></iq>",
            ]);
            self.state = State::Register;
            return Ok(Effect::None);
        }
        if !self.authenticated {
            self.authenticate(features, target, account)?;
            return Ok(Effect::None);
        }
        self.session_required = session_required(features);
        self.management_offered = tags(features).any(|tag| {
            tag.name == b"sm"
                && attribute(tag.raw, b"xmlns")
                    .is_some_and(|namespace| namespace == b"urn:xmpp:sm:3")
        });
        match account.resumption.take() {
            Some(session) if self.purpose == Purpose::Resume => self.resume(session),
            _ => self.bind(target),
        }
        Ok(Effect::None)
    }

    fn resume(&mut self, session: Resumption) {
        let handled = session.handled.to_string();
        let id = escape(&session.id);
        self.write(&[
            "<resume xmlns='urn:xmpp:sm:3' h='",
            &handled,
            "' previd='",
            &id,
            "'/>",
        ]);
        (self.sent, self.handled) = (session.sent, session.handled);
        self.full_jid = session.full_jid;
        self.resumption_id = Some(session.id);
        self.state = State::Resume;
    }

    fn bind(&mut self, target: &Target) {
        self.write(&["<iq type='set' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'>"]);
        if !target.resource.is_empty() {
            self.write(&["<resource>", &escape(&target.resource), "</resource>"]);
        }
        self.write(&["</bind></iq>"]);
        self.state = State::Bind;
    }

    fn authenticate(
        &mut self,
        features: &[u8],
        target: &Target,
        account: &mut Account,
    ) -> Result<(), Error> {
        let wanted = target.mechanism.name();
        let offered = || tags(features).filter(|tag| !tag.closing && tag.name == b"mechanism");
        if !offered().any(|tag| tag.text.trim_ascii() == wanted.as_bytes()) {
            let offered: Vec<_> = offered()
                .map(|tag| String::from_utf8_lossy(tag.text))
                .collect();
            return Err(Error::MechanismNotOffered {
                wanted,
                offered: offered.join(" "),
            });
        }
        let initial = match target.mechanism {
            Mechanism::Plain => {
                self.state = State::Success;
                format!("\0{}\0{}", account.name, target.password)
            }
            Mechanism::Scram(hash) | Mechanism::ScramPlus(hash) => {
                let bound = matches!(target.mechanism, Mechanism::ScramPlus(_));
                let exporter = self.exporter.as_ref().map(|bytes| bytes.as_slice());
                if bound && exporter.is_none() {
                    return Err(Error::NothingToBind);
                }
                let exchange = Exchange::new(hash, &account.name, exporter.filter(|_| bound));
                let exchange = self.exchange.insert(Box::new(exchange));
                self.state = State::Challenge;
                exchange.client_first()
            }
        };
        if target.login != Login::Old {
            if find(features, b"authentication").is_none() {
                return Err(Error::MechanismNotOffered {
                    wanted: "XEP-0388",
                    offered: "RFC 6120's profile".into(),
                });
            }
            let state = self.state;
            self.authenticate2(wanted, initial.as_bytes(), target, account);
            self.state = state;
            return Ok(());
        }
        self.write(&[
            "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='",
            wanted,
            "'>",
            &BASE64_STANDARD.encode(initial),
            "</auth>",
        ]);
        Ok(())
    }

    fn on_sasl(
        &mut self,
        name: &[u8],
        stanza: &[u8],
        target: &Target,
        account: &mut Account,
    ) -> Result<Effect, Error> {
        let two = target.login != Login::Old;
        let payload = || {
            let data = match two && name == b"success" {
                true => find(stanza, b"additional-data"),
                false => tags(stanza).next(),
            };
            let text = data.map(|tag| tag.text.trim_ascii()).unwrap_or_default();
            let decoded = BASE64_STANDARD
                .decode(text)
                .ok()
                .and_then(|bytes| String::from_utf8(bytes).ok());
            decoded.ok_or(Error::Scram(scram::Error::Malformed))
        };
        match (name, &mut self.exchange) {
            (b"failure", _) => Err(Error::Authentication(condition(stanza))),
            (b"challenge", Some(exchange)) if self.state == State::Challenge => {
                let answer =
                    exchange.client_final(&payload()?, &target.password, &mut account.keys)?;
                self.respond(&BASE64_STANDARD.encode(answer), two);
                self.state = State::Success;
                Ok(Effect::None)
            }
            // A server may send its signature as a challenge (RFC 6120, 6.4.6): success follows our empty response.
            (b"challenge", Some(exchange)) => {
                exchange.verify(&payload()?)?;
                self.exchange = None;
                self.respond("", two);
                Ok(Effect::None)
            }
            (b"success", exchange) if self.state == State::Success => {
                if let Some(exchange) = exchange.take() {
                    exchange.verify(&payload()?)?;
                }
                if two {
                    self.on_success2(stanza, target, account)?;
                    return Ok(Effect::None);
                }
                self.authenticated = true;
                self.state = State::Features;
                self.open(target);
                Ok(Effect::Restart)
            }
            _ => Err(unexpected(name, "during authentication")),
        }
    }

    fn respond(&mut self, payload: &str, two: bool) {
        self.write(&[
            "<response xmlns='",
            if two {
                SASL2
            } else {
                "urn:ietf:params:xml:ns:xmpp-sasl"
            },
            "'>",
            payload,
            "</response>",
        ]);
    }

    fn after_bind(&mut self, target: &Target) -> Result<(), Error> {
        if self.session_required {
            self.write(&["<iq type='set' id='session'><session xmlns='urn:ietf:params:xml:ns:xmpp-session'/></iq>"]);
            self.state = State::Session;
        } else if target.stream_management && self.management_offered {
            self.write(&[if target.resumption {
                "<enable xmlns='urn:xmpp:sm:3' resume='true'/>"
            } else {
                "<enable xmlns='urn:xmpp:sm:3'/>"
            }]);
            self.state = State::EnableStreamManagement;
        } else if target.acknowledgements {
            return Err(Error::ManagementNotOffered);
        } else {
            self.send_initial(target);
        }
        Ok(())
    }

    fn send_initial(&mut self, target: &Target) {
        let presence = match target.caps {
            true => {
                "<presence><c xmlns='http://jabber.org/protocol/caps' hash='sha-1' \
                 node='urn:x-nitro:loadtest' ver='QgayPKawpkPSDYmwT/WM94uAlu0='/></presence>"
            }
            false => "<presence/>",
        };
        self.write(&[
            "<iq type='get' id='roster'><query xmlns='jabber:iq:roster'/></iq>",
            presence,
        ]);
        self.sent = self.sent.wrapping_add(2);
        self.state = State::Initial;
    }

    fn on_live(&mut self, name: &[u8], stanza: &[u8], target: &Target) -> Result<Effect, Error> {
        match name {
            b"message" => {
                self.handled = self.handled.wrapping_add(1);
                Ok(Effect::Live)
            }
            b"presence" => {
                self.handled = self.handled.wrapping_add(1);
                self.on_presence(stanza, target);
                Ok(self.login_done(target))
            }
            b"iq" => {
                self.handled = self.handled.wrapping_add(1);
                self.on_iq(stanza, target)?;
                Ok(self.login_done(target))
            }
            b"r" => {
                if self.managed {
                    let handled = self.handled.to_string();
                    self.write(&["<a xmlns='urn:xmpp:sm:3' h='", &handled, "'/>"]);
                }
                Ok(Effect::None)
            }
            b"a" if self.managed => {
                let h =
                    attribute(stanza, b"h").and_then(|h| std::str::from_utf8(h).ok()?.parse().ok());
                let acknowledged: u32 = h.ok_or(unexpected(name, "without its h"))?;
                // modulo 2^32: less than half of it behind
                if self.sent.wrapping_sub(acknowledged) > u32::MAX / 2 {
                    let sent = self.sent;
                    return Err(Error::Acknowledged { acknowledged, sent });
                }
                Ok(Effect::Acknowledged(acknowledged))
            }
            _ => Ok(Effect::None),
        }
    }

    fn on_presence(&mut self, presence: &[u8], target: &Target) {
        let from = unescape(attribute(presence, b"from").unwrap_or_default());
        if *from == *self.full_jid.as_bytes() {
            self.presence_seen |= attribute(presence, b"type").is_none();
            return;
        }
        self.presences += 1;
        if target.track_contacts && attribute(presence, b"type") == Some(b"subscribe") {
            let from = String::from_utf8_lossy(&from).into_owned();
            self.write(&["<presence type='subscribed' to='", &escape(&from), "'/>"]);
            self.sent = self.sent.wrapping_add(1);
        }
    }

    fn on_iq(&mut self, iq: &[u8], target: &Target) -> Result<(), Error> {
        let id = attribute(iq, b"id").unwrap_or_default();
        match attribute(iq, b"type").unwrap_or_default() {
            b"result" if id == b"roster" => {
                self.roster_seen = true;
                self.note_contacts(iq, target);
            }
            b"error" if id == b"roster" => {
                return Err(Error::Refused {
                    what: "the roster",
                    condition: condition(iq),
                });
            }
            kind @ (b"get" | b"set") => {
                self.note_contacts(iq, target);
                let known = find(iq, if kind == b"set" { b"query" } else { b"ping" }).is_some();
                self.answer_iq(iq, id, known);
            }
            _ => {}
        }
        Ok(())
    }

    /// Pings and roster pushes succeed; whatever else a server asks is not for us.
    fn answer_iq(&mut self, iq: &[u8], id: &[u8], known: bool) {
        self.sent = self.sent.wrapping_add(1);
        self.out.extend_from_slice(if known {
            b"<iq type='result' id=\""
        } else {
            b"<iq type='error' id=\""
        });
        self.out.extend_from_slice(&quotable(id));
        if let Some(from) = attribute(iq, b"from") {
            self.out.extend_from_slice(b"\" to=\"");
            self.out.extend_from_slice(&quotable(from));
        }
        self.write(&[if known {
            "\"/>"
        } else {
            "\"><error type='cancel'><service-unavailable \
             xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>"
        }]);
    }

    fn note_contacts(&mut self, iq: &[u8], target: &Target) {
        if !target.track_contacts {
            return;
        }
        for item in tags(iq).filter(|tag| !tag.closing && tag.name == b"item") {
            if let (Some(jid), Some(b"to" | b"both")) = (
                attribute(item.raw, b"jid"),
                attribute(item.raw, b"subscription"),
            ) {
                let jid = String::from_utf8_lossy(&unescape(jid)).into_owned();
                if !self.contacts.contains(&jid) {
                    self.contacts.push(jid);
                }
            }
        }
    }

    fn login_done(&mut self, target: &Target) -> Effect {
        let done = self.roster_seen && (self.presence_seen || target.until == Until::Roster);
        if self.state == State::Initial && done {
            self.state = State::Online;
            return Effect::Done;
        }
        Effect::Live
    }

    /// Whether this is the awaited answer; an error answer is an error.
    fn answer(
        &self,
        stanza: &[u8],
        name: &[u8],
        id: &[u8],
        what: &'static str,
    ) -> Result<bool, Error> {
        if name != b"iq" || attribute(stanza, b"id") != Some(id) {
            return Ok(false);
        }
        match attribute(stanza, b"type") {
            Some(b"result") => Ok(true),
            _ => Err(Error::Refused {
                what,
                condition: condition(stanza),
            }),
        }
    }

    fn write(&mut self, parts: &[&str]) {
        for part in parts {
            self.out.extend_from_slice(part.as_bytes());
        }
    }
}

fn is_resumable(enabled: &[u8]) -> bool {
    matches!(attribute(enabled, b"resume"), Some(b"true" | b"1"))
}

/// The session request of RFC 3921 is for servers that offer it without `<optional/>`.
fn session_required(features: &[u8]) -> bool {
    let mut tags = tags(features).skip_while(|tag| tag.name != b"session");
    let Some(session) = tags.next() else {
        return false;
    };
    if session.raw.ends_with(b"/>") {
        return true;
    }
    !tags
        .take_while(|tag| tag.name != b"session")
        .any(|tag| tag.name == b"optional")
}

/// XEP-0077, example 5: the name is taken.
fn exists(stanza: &[u8]) -> bool {
    attribute(stanza, b"id") == Some(b"register") && find(stanza, b"conflict").is_some()
}

/// The defined condition inside a SASL failure, a stanza error or a stream error.
fn condition(stanza: &[u8]) -> String {
    let mut tags = tags(stanza).filter(|tag| !tag.closing).peekable();
    let outer = tags.next();
    if outer.is_some_and(|tag| tag.name == b"iq") {
        while tags.next().is_some_and(|tag| tag.name != b"error") {}
    }
    let mut condition = None;
    let mut text = None;
    for tag in tags {
        match tag.name {
            b"text" => text = Some(tag.text),
            _ => condition = condition.or(Some(tag.name)),
        }
    }
    let condition = String::from_utf8_lossy(condition.unwrap_or(b"no condition given"));
    match text {
        Some(text) if !text.is_empty() => {
            format!("{condition} ({})", String::from_utf8_lossy(text))
        }
        _ => condition.into_owned(),
    }
}

fn unexpected(name: &[u8], during: &'static str) -> Error {
    Error::Unexpected {
        got: String::from_utf8_lossy(name).into_owned(),
        during,
    }
}

/// A raw attribute value, fit for double quotes whichever it came in.
fn quotable(raw: &[u8]) -> Vec<u8> {
    raw.iter()
        .flat_map(|byte| {
            if *byte == b'"' {
                b"&quot;".as_slice()
            } else {
                std::slice::from_ref(byte)
            }
        })
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scanner::Scanner;

    #[test]
    fn all_goes_in_one_request_and_with_a_token_it_leaves_with_the_header() {
        let mut target = Target::for_tests();
        (target.login, target.tls) = (Login::Fast, TlsMode::Direct);
        (target.stream_management, target.resumption) = (true, true);
        let resumption = Resumption {
            id: "p".into(),
            sent: 4,
            handled: 3,
            full_jid: "u0@localhost/load/x".into(),
        };
        let mut account = Account {
            name: "u0".into(),
            keys: KeyCache::default(),
            resumption: Some(resumption),
            token: Some("t".into()),
        };
        let mut connection = Connection::new(Purpose::Resume, &target);
        connection.begin(&target, &mut account);
        let said = String::from_utf8(std::mem::take(&mut connection.out)).unwrap();
        for part in [
            "<stream:stream",
            "mechanism='HT-SHA-256-NONE'",
            "<resume xmlns='urn:xmpp:sm:3' h='3' previd='p'/>",
        ] {
            assert!(said.contains(part), "{said}");
        }
        let mut hears = |stanza: &str| {
            connection.on_piece(Kind::Stanza, stanza.as_bytes(), &target, &mut account)
        };
        assert!(matches!(hears("<stream:features/>"), Effect::None));
        let success = "<success xmlns='urn:xmpp:sasl:2'><authorization-identifier>u0@localhost/load/x</authorization-identifier>\
                       <token xmlns='urn:xmpp:fast:0' expiry='' token='n'/><resumed xmlns='urn:xmpp:sm:3' previd='p' h='4'/></success>";
        assert!(matches!(hears(success), Effect::None));
        assert!(matches!(hears("<stream:features/>"), Effect::Resumed));
        assert_eq!(account.token.as_deref(), Some("n"));
    }

    struct Dialogue {
        connection: Connection,
        target: Target,
        account: Account,
        scanner: Scanner,
    }

    impl Dialogue {
        fn new(purpose: Purpose, change: impl FnOnce(&mut Target)) -> Dialogue {
            let mut target = Target::for_tests();
            change(&mut target);
            let mut connection = Connection::new(purpose, &target);
            connection.open(&target);
            Dialogue {
                connection,
                target,
                account: Account {
                    name: "u0".into(),
                    keys: KeyCache::default(),
                    resumption: None,
                    token: None,
                },
                scanner: Scanner::default(),
            }
        }

        fn client_says(&mut self, expected: &str) -> &mut Dialogue {
            let said = String::from_utf8(std::mem::take(&mut self.connection.out)).unwrap();
            assert!(
                said.contains(expected),
                "client said {said:?}, not {expected:?}"
            );
            self
        }

        /// Feeds the server's bytes; returns the last effect.
        fn server_says(&mut self, bytes: &str) -> Effect {
            let (mut rest, mut last) = (bytes.as_bytes(), Effect::None);
            while let Some(item) = self.scanner.next(rest) {
                let piece = &rest[item.start..item.end];
                last = self
                    .connection
                    .on_piece(item.kind, piece, &self.target, &mut self.account);
                if matches!(last, Effect::Restart | Effect::StartTls) {
                    self.scanner.restart();
                }
                rest = &rest[item.end..];
            }
            last
        }
    }

    const HEADER: &str = "<?xml version='1.0'?><stream:stream xmlns='jabber:client' \
                          xmlns:stream='http://etherx.jabber.org/streams' id='1' version='1.0'>";
    const MECHANISMS: &str = "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>\
                              <mechanism>PLAIN</mechanism></mechanisms></stream:features>";
    const BOUND: &str = "<iq type='result' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'>\
                         <jid>u0@localhost/a&apos;b</jid></bind></iq>";

    fn authenticated(dialogue: &mut Dialogue, features: &str) {
        dialogue
            .client_says("to='localhost'>")
            .server_says(&format!("{HEADER}{MECHANISMS}"));
        dialogue.client_says("mechanism='PLAIN'>AHUwAHNlY3JldA==</auth>");
        let effect = dialogue.server_says("<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>");
        assert!(matches!(effect, Effect::Restart));
        dialogue
            .client_says("<stream:stream")
            .server_says(&format!("{HEADER}{features}"));
        dialogue.client_says("<resource>load</resource>");
    }

    fn plain(target: &mut Target) {
        target.mechanism = Mechanism::Plain;
    }

    #[test]
    fn a_login_ends_with_roster_and_own_presence() {
        let mut dialogue = Dialogue::new(Purpose::Login, plain);
        authenticated(
            &mut dialogue,
            "<features xmlns='http://etherx.jabber.org/streams'><bind xmlns='x'/>\
             <session xmlns='urn:ietf:params:xml:ns:xmpp-session'><optional/></session></features>",
        );
        dialogue.server_says(BOUND);
        dialogue.client_says("jabber:iq:roster'/></iq><presence/>");
        dialogue.server_says("<presence from='other@localhost/x'/>");
        assert!(matches!(
            dialogue.server_says("<presence from=\"u0@localhost/a'b\"/>"),
            Effect::Live
        ));
        let effect = dialogue
            .server_says("<iq id='roster' type='result'><query xmlns='jabber:iq:roster'/></iq>");
        assert!(matches!(effect, Effect::Done));
        assert_eq!(dialogue.connection.presences, 1);
        dialogue.connection.close();
        dialogue.client_says("<presence type='unavailable'/></stream:stream>");
        assert!(matches!(
            dialogue.server_says("</stream:stream>"),
            Effect::Ended
        ));
    }

    #[test]
    fn a_session_is_requested_where_it_is_required() {
        let mut dialogue = Dialogue::new(Purpose::Login, plain);
        authenticated(
            &mut dialogue,
            "<stream:features><bind xmlns='x'/>\
             <session xmlns='urn:ietf:params:xml:ns:xmpp-session'/></stream:features>",
        );
        dialogue.server_says(BOUND);
        dialogue
            .client_says("xmpp-session'/></iq>")
            .server_says("<iq type='result' id='session'/>");
        dialogue.client_says("<presence/>");
    }

    #[test]
    fn stream_management_counts_and_answers() {
        let mut dialogue = Dialogue::new(Purpose::Login, |target| {
            plain(target);
            target.stream_management = true;
            target.until = Until::Roster;
        });
        authenticated(
            &mut dialogue,
            "<stream:features><bind xmlns='x'/><sm xmlns='urn:xmpp:sm:3'/></stream:features>",
        );
        dialogue.server_says(BOUND);
        dialogue
            .client_says("<enable")
            .server_says("<enabled xmlns='urn:xmpp:sm:3'/>");
        let effect = dialogue.server_says("<iq id='roster' type='result'/>");
        assert!(matches!(effect, Effect::Done));
        dialogue
            .client_says("<presence/>")
            .server_says("<message/><r xmlns='urn:xmpp:sm:3'/>");
        dialogue.client_says("h='2'");
        // roster request, presence and the answer to a ping
        dialogue.server_says("<iq type='get' id='1'><ping xmlns='urn:xmpp:ping'/></iq>");
        assert_eq!(dialogue.connection.sent, 3);
        let effect = dialogue.server_says("<a xmlns='urn:xmpp:sm:3' h='3'/>");
        assert!(matches!(effect, Effect::Acknowledged(3)));
        let effect = dialogue.server_says("<a xmlns='urn:xmpp:sm:3' h='4'/>");
        let Effect::Failed(error) = effect else {
            panic!("{effect:?}")
        };
        assert_eq!(error.to_string(), "the server acknowledged 4 stanzas of 3");
    }

    fn resumable(target: &mut Target) {
        plain(target);
        target.stream_management = true;
        target.acknowledgements = true;
        target.resumption = true;
        target.until = Until::Roster;
    }

    const WITH_MANAGEMENT: &str =
        "<stream:features><bind xmlns='x'/><sm xmlns='urn:xmpp:sm:3'/></stream:features>";

    /// Logs in, is cut after two stanzas from the server, and comes back.
    fn cut_and_back() -> Dialogue {
        let mut first = Dialogue::new(Purpose::Login, resumable);
        authenticated(&mut first, WITH_MANAGEMENT);
        first.server_says(BOUND);
        first
            .client_says("<enable xmlns='urn:xmpp:sm:3' resume='true'/>")
            .server_says("<enabled xmlns='urn:xmpp:sm:3' id='a&amp;b' resume='true'/>");
        first.server_says("<iq id='roster' type='result'/><message/>");
        let mut again = Dialogue::new(Purpose::Resume, resumable);
        again.account.resumption = first.connection.resumption();
        again
            .client_says("to='localhost'>")
            .server_says(&format!("{HEADER}{MECHANISMS}"));
        again.client_says("mechanism='PLAIN'");
        again.server_says("<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>");
        again.client_says("<stream:stream");
        again.server_says(&format!("{HEADER}{WITH_MANAGEMENT}"));
        again.client_says("<resume xmlns='urn:xmpp:sm:3' h='2' previd='a&amp;b'/>");
        again
    }

    #[test]
    fn a_session_that_was_cut_goes_on() {
        let mut again = cut_and_back();
        let effect = again.server_says("<resumed xmlns='urn:xmpp:sm:3' h='2' previd='a&amp;b'/>");
        assert!(matches!(effect, Effect::Resumed), "{effect:?}");
        assert!(again.connection.is_online());
        assert_eq!(again.connection.full_jid, "u0@localhost/a'b");
        again.server_says("<message/><r xmlns='urn:xmpp:sm:3'/>");
        again.client_says("h='3'");
        let effect = again.server_says("<a xmlns='urn:xmpp:sm:3' h='2'/>");
        assert!(matches!(effect, Effect::Acknowledged(2)));
    }

    #[test]
    fn a_session_that_is_no_more_is_begun_anew() {
        let mut again = cut_and_back();
        again.server_says("<failed xmlns='urn:xmpp:sm:3'><item-not-found xmlns='x'/></failed>");
        again
            .client_says("<resource>load</resource>")
            .server_says(BOUND);
        again
            .client_says("<enable")
            .server_says("<enabled xmlns='urn:xmpp:sm:3' id='c' resume='1'/>");
        let effect = again.server_says("<iq id='roster' type='result'/>");
        assert!(matches!(effect, Effect::Done));
        again.server_says("<r xmlns='urn:xmpp:sm:3'/>");
        again.client_says("h='1'");
    }

    #[test]
    fn a_server_that_does_not_resume_is_told() {
        let mut dialogue = Dialogue::new(Purpose::Login, resumable);
        authenticated(&mut dialogue, WITH_MANAGEMENT);
        dialogue.server_says(BOUND);
        let effect = dialogue.server_says("<enabled xmlns='urn:xmpp:sm:3'/>");
        assert!(matches!(
            effect,
            Effect::Failed(Error::ResumptionNotOffered)
        ));
    }

    #[test]
    fn acknowledgements_want_a_server_that_gives_them() {
        let mut dialogue = Dialogue::new(Purpose::Login, |target| {
            plain(target);
            target.stream_management = true;
            target.acknowledgements = true;
        });
        authenticated(
            &mut dialogue,
            "<stream:features><bind xmlns='x'/></stream:features>",
        );
        let effect = dialogue.server_says(BOUND);
        assert!(matches!(
            effect,
            Effect::Failed(Error::ManagementNotOffered)
        ));
    }

    #[test]
    fn starttls_comes_before_all_else() {
        let mut dialogue = Dialogue::new(Purpose::Login, |target| target.tls = TlsMode::Starttls);
        let effect = dialogue.server_says(&format!(
            "{HEADER}<stream:features><bind/></stream:features>"
        ));
        assert!(matches!(effect, Effect::Failed(Error::StartTlsNotOffered)));
        let mut dialogue = Dialogue::new(Purpose::Login, |target| target.tls = TlsMode::Starttls);
        dialogue.server_says(&format!(
            "{HEADER}<stream:features><starttls xmlns='x'/></stream:features>"
        ));
        dialogue.client_says("<starttls");
        assert!(matches!(
            dialogue.server_says("<proceed xmlns='x'/>"),
            Effect::StartTls
        ));
    }

    #[test]
    fn an_account_that_exists_is_no_failure() {
        let features = format!("{HEADER}<stream:features/>");
        let mut dialogue = Dialogue::new(Purpose::Register, |_| {});
        dialogue.server_says(&features);
        dialogue.client_says("<username>u0</username><password>secret</password>");
        let effect = dialogue.server_says(
            "<iq type='error' id='register'><query xmlns='jabber:iq:register'><username>u0</username></query>\
             <error type='cancel'><conflict xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/><text>Taken.</text></error></iq>",
        );
        assert!(matches!(effect, Effect::Exists), "{effect:?}");
    }

    #[test]
    fn failures_say_why() {
        let mut dialogue = Dialogue::new(Purpose::Login, |_| {});
        let Effect::Failed(error) = dialogue.server_says(&format!("{HEADER}{MECHANISMS}")) else {
            panic!()
        };
        assert_eq!(
            error.to_string(),
            "SCRAM-SHA-1 is not offered here (offered: PLAIN)"
        );

        let mut dialogue = Dialogue::new(Purpose::Login, plain);
        dialogue.server_says(&format!("{HEADER}{MECHANISMS}"));
        let failure = "<failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><not-authorized/><text>No.</text></failure>";
        let Effect::Failed(error) = dialogue.server_says(failure) else {
            panic!()
        };
        assert_eq!(
            error.to_string(),
            "authentication failed: not-authorized (No.)"
        );

        let mut dialogue = Dialogue::new(Purpose::Login, plain);
        let error = format!(
            "{HEADER}<stream:error><host-unknown xmlns='x'/></stream:error></stream:stream>"
        );
        let mut scanner = Scanner::default();
        let header = scanner.next(error.as_bytes()).unwrap();
        dialogue.server_says(&error[..header.end]);
        let Effect::Failed(error) =
            dialogue.server_says("<stream:error><host-unknown xmlns='x'/></stream:error>")
        else {
            panic!()
        };
        assert_eq!(error.to_string(), "stream error host-unknown");
    }

    #[test]
    fn a_ping_is_answered_and_an_unknown_request_refused() {
        let mut dialogue = Dialogue::new(Purpose::Login, |target| {
            plain(target);
            target.until = Until::Roster;
        });
        authenticated(
            &mut dialogue,
            "<stream:features><bind xmlns='x'/></stream:features>",
        );
        dialogue.server_says(BOUND);
        dialogue
            .client_says("<presence/>")
            .server_says("<iq type='get' id='\"1' from='localhost'><ping/></iq>");
        dialogue.client_says("<iq type='result' id=\"&quot;1\" to=\"localhost\"/>");
        dialogue.server_says("<iq type='get' id='2'><query xmlns='jabber:iq:version'/></iq>");
        dialogue.client_says("service-unavailable");
    }
}
