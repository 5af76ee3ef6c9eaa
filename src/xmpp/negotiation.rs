//! From a connection's first byte to the point where a session begins: stream headers, STARTTLS, SASL, in-band
//! registration, binding or resumption (RFC 6120 sections 4 to 7, XEP-0077, XEP-0198), one after the other or all in one request
//! (XEP-0388, see [`super::sasl2`]).
//!
//! Sans-IO: frames in, bytes into `out` and a [`Step`] back; who drives it does what the step says. It may move to another
//! core between two frames: everything here is `Send`.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::bind::{Answers, Extras};
use super::error::{StanzaError, StreamError};
use super::feature::sm;
use super::jid::{self, Jid};
use super::sasl::token::{Attempt, Ht};
use super::sasl::{
    self, ChannelBindings, Credentials, Decoy, Exchange, Failure, Mechanism, PasswordCheck,
};
use super::slice::Env;
use super::{NS_CLIENT, NS_STREAM, fast, push, random_id, sasl2};
use crate::random::random;
use crate::store::record::ArchivedUserRecord;
use crate::xml::dom::Element;
use crate::xml::view::View;
use crate::xml::{FrameKind, Limits, StreamHeader, StreamNs, escape_attr};

pub const NS_TLS: &str = "urn:ietf:params:xml:ns:xmpp-tls";
pub const NS_SASL: &str = "urn:ietf:params:xml:ns:xmpp-sasl";
pub const NS_BIND: &str = "urn:ietf:params:xml:ns:xmpp-bind";
/// Of the features, so that they are written without moving.
const FEATURES_BYTES_USUAL: usize = 2048;

pub const NS_REGISTER: &str = "jabber:iq:register";

/// What this connection may do, as the configuration and its address say.
#[derive(Clone, Debug)]
pub struct Policy {
    /// STARTTLS can be had (not on a port that begins with TLS).
    pub tls_offered: bool,
    pub tls_required: bool,
    pub mechanisms: Vec<Mechanism>,
    pub register: bool,
    /// XEP-0388, over TLS.
    pub sasl2: bool,
    /// XEP-0484, with it.
    pub tokens: bool,
    pub attempts_max: u32,
    pub xml: Limits,
}

/// What has to happen next.
pub enum Step {
    /// Send `out`, read on.
    Continue,
    /// Send `out`, then the client begins the TLS handshake, then a new stream.
    StartTls,
    /// The connection belongs to the owner of this user; there, with the user loaded, call [`Negotiation::credentials`].
    Login { name: Box<str> },
    /// Slow: run it elsewhere, then call [`Negotiation::checked`].
    CheckPassword(PasswordCheck),
    /// Authentication failed: hold `out` back for a moment. `close`: it was the last attempt.
    Refused {
        name: Option<Box<str>>,
        condition: &'static str,
        close: bool,
    },
    /// Send `out`; a new stream begins. Or, if there is a [`Negotiation::request`], call [`Negotiation::proceed`].
    Authenticated,
    /// The connection belongs to the owner of this new user; there, call [`Negotiation::registered`] with the outcome.
    Register { name: Box<str>, password: String },
    /// See what has to change of the user's tokens ([`fast::plan`]), make it durable, then [`Negotiation::tokens`].
    Tokens,
    /// Begin a session with this resource (prepared; `None`: the server makes one), enable what comes with it, then
    /// [`Negotiation::bound`].
    Bind {
        resource: Option<String>,
        extras: Extras,
    },
    /// Resume the session, or [`Negotiation::not_resumed`].
    Resume { previd: String, h: u32 },
    /// The client ended the stream: send `out`, close.
    End,
}

enum Stage {
    /// Waits for a stream header.
    Header,
    /// Waits for STARTTLS, authentication or registration.
    Open,
    /// Waits for the initial response of this mechanism.
    Initial(Mechanism),
    /// Waits for a SASL response.
    Exchange(Box<Exchange>),
    /// A token was shown; those of the account are to come: [`Negotiation::token`].
    Token(Box<Attempt>),
    /// Authenticated by XEP-0388; what came along is being carried out.
    Inline,
    /// Authenticated, waits for binding or resumption.
    Bind,
}

pub struct Negotiation {
    stage: Stage,
    pub encrypted: bool,
    bindings: ChannelBindings,
    /// The accounts that the client's certificate stands for, as localparts.
    certified: Vec<Box<str>>,
    offered: Vec<Mechanism>,
    ns: StreamNs,
    pub lang: Option<Box<str>>,
    /// The bare address that the client says to have, in the header of this stream (RFC 6120, 4.7.1).
    from: Option<Box<str>>,
    /// Authenticated local part.
    user: Option<Box<str>>,
    /// The exchange at work, or the last one, speaks XEP-0388.
    sasl2: bool,
    /// What came along with it.
    request: Option<Box<sasl2::Request>>,
    /// Named by the exchange at work.
    candidate: Option<Box<str>>,
    /// The account of the exchange at work is disabled.
    disabled: bool,
    /// What the exchange at work, or the last one, was checked against.
    pub account: Option<fast::Account>,
    attempts: u32,
    /// Id of the IQ that is answered later (bind, registration).
    iq: String,
    policy: Policy,
    domain: Box<str>,
}

impl Negotiation {
    pub fn new(domain: &str, policy: Policy) -> Negotiation {
        Negotiation {
            stage: Stage::Header,
            encrypted: false,
            bindings: ChannelBindings::default(),
            certified: Vec::new(),
            offered: Vec::new(),
            ns: StreamNs::client(),
            lang: None,
            from: None,
            user: None,
            sasl2: false,
            request: None,
            candidate: None,
            disabled: false,
            account: None,
            attempts: 0,
            iq: String::new(),
            policy,
            domain: domain.into(),
        }
    }

    /// The TLS handshake is done; a new stream header comes.
    pub fn encrypted(&mut self, bindings: ChannelBindings) {
        self.encrypted = true;
        self.bindings = bindings;
        self.stage = Stage::Header;
    }

    /// The client has shown a certificate that holds and stands for these accounts (XEP-0178), localparts.
    pub fn certified(&mut self, accounts: Vec<Box<str>>) {
        self.certified = accounts;
    }

    /// The authenticated user's local part.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// What came along with the authentication at work (XEP-0388); `None`: it goes the older way.
    pub fn request(&self) -> Option<&sasl2::Request> {
        self.request.as_deref()
    }

    /// What a frame of this connection may be, before it is complete.
    pub fn limits(&self) -> &Limits {
        &self.policy.xml
    }

    pub fn stream_ns(&self) -> &StreamNs {
        &self.ns
    }

    /// Takes one frame. An error ends the stream: [`Negotiation::refuse`] writes it.
    pub fn frame(
        &mut self,
        kind: FrameKind,
        frame: &[u8],
        env: &Env,
        out: &mut Vec<u8>,
    ) -> Result<Step, StreamError> {
        match (kind, &self.stage) {
            (FrameKind::Whitespace, _) => Ok(Step::Continue),
            (FrameKind::Header, Stage::Header) => self.header(frame, env, out),
            (FrameKind::End, _) => {
                out.extend_from_slice(b"</stream:stream>");
                Ok(Step::End)
            }
            (
                FrameKind::Element,
                Stage::Open | Stage::Initial(_) | Stage::Exchange(_) | Stage::Bind,
            ) => {
                let ns = self.ns.clone();
                let view = View::parse(frame, &ns, &self.policy.xml)?;
                self.element(&view, out)
            }
            _ => Err(StreamError::new("not-well-formed")),
        }
    }

    /// Writes a stream error, with the server's header before it if there was none yet.
    pub fn refuse(&self, error: &StreamError, out: &mut Vec<u8>) {
        if matches!(self.stage, Stage::Header) {
            self.write_header(out);
        }
        error.write(out);
    }

    fn write_header(&self, out: &mut Vec<u8>) {
        for part in [
            "<?xml version='1.0'?><stream:stream xmlns='",
            NS_CLIENT,
            "' xmlns:stream='",
            NS_STREAM,
            "' id='",
            &random_id(),
            "' from='",
            &self.domain,
        ] {
            out.extend_from_slice(part.as_bytes());
        }
        if let Some(from) = &self.from {
            out.extend_from_slice(b"' to='");
            escape_attr(from, out);
        }
        out.extend_from_slice(b"' version='1.0' xml:lang='en'>");
    }

    fn header(&mut self, frame: &[u8], env: &Env, out: &mut Vec<u8>) -> Result<Step, StreamError> {
        self.from = None;
        let header = StreamHeader::parse(frame).map_err(|e| StreamError::new(e.condition()))?;
        if &*header.ns.default != NS_CLIENT {
            return Err(StreamError::new("invalid-namespace"));
        }
        let major = header
            .version
            .as_deref()
            .and_then(|v| v.split('.').next())
            .and_then(|v| v.parse::<u32>().ok());
        if major.is_none_or(|v| v < 1) {
            return Err(StreamError::new("unsupported-version"));
        }
        let to = header.to.as_deref().and_then(|to| jid::domainpart(to).ok());
        if to.as_deref() != Some(&*env.domain) {
            return Err(StreamError::new("host-unknown"));
        }
        self.lang = header.lang.map(Into::into);
        self.ns = header.ns;
        // who does not know it yet names none
        let from = header
            .from
            .as_deref()
            .and_then(|from| Jid::parse(from).ok());
        self.from = from
            .filter(|from| from.local().is_some())
            .map(|from| from.bare().into());
        if let (Some(from), Some(user)) = (&self.from, &self.user)
            && !self.is_address(from, user)
        {
            // RFC 6120, 4.9.3.9
            return Err(StreamError::new("invalid-from"));
        }
        self.write_header(out);
        self.features(env, out);
        self.stage = if self.user.is_some() {
            Stage::Bind
        } else {
            Stage::Open
        };
        Ok(Step::Continue)
    }

    fn features(&mut self, env: &Env, out: &mut Vec<u8>) {
        let mut text = String::with_capacity(FEATURES_BYTES_USUAL);
        text.push_str("<stream:features>");
        if self.user.is_some() {
            push(&mut text, &["<bind xmlns='", NS_BIND, "'/>"]);
            text.push_str(env.stream_features());
        } else {
            if self.policy.tls_offered && !self.encrypted {
                let required = if self.policy.tls_required {
                    "<required/>"
                } else {
                    ""
                };
                push(
                    &mut text,
                    &["<starttls xmlns='", NS_TLS, "'>", required, "</starttls>"],
                );
            }
            self.offered.clear();
            if self.encrypted || !self.policy.tls_required {
                self.offered
                    .extend(self.policy.mechanisms.iter().copied().filter(|m| match m {
                        Mechanism::Plain => self.encrypted,
                        Mechanism::External => !self.certified.is_empty(),
                        m if m.is_plus() => !self.bindings.is_empty(),
                        _ => true,
                    }));
                push(&mut text, &["<mechanisms xmlns='", NS_SASL, "'>"]);
                for mechanism in &self.offered {
                    push(
                        &mut text,
                        &["<mechanism>", mechanism.name(), "</mechanism>"],
                    );
                }
                text.push_str("</mechanisms>");
                // XEP-0388: only after TLS, and never without a mechanism
                if self.policy.sasl2 && self.encrypted && !self.offered.is_empty() {
                    let tokens = self.policy.tokens.then_some(&self.bindings);
                    sasl2::write_feature(&self.offered, tokens, &mut text);
                }
                if self.offered.iter().any(|m| m.is_plus()) {
                    self.bindings.write_feature(&mut text);
                }
                if self.policy.register {
                    text.push_str("<register xmlns='http://jabber.org/features/iq-register'/>");
                }
            }
        }
        text.push_str("</stream:features>");
        out.extend_from_slice(text.as_bytes());
    }

    fn element(&mut self, view: &View<'_>, out: &mut Vec<u8>) -> Result<Step, StreamError> {
        match (&self.stage, view.name(), view.ns()) {
            (Stage::Open, "starttls", NS_TLS) if self.policy.tls_offered && !self.encrypted => {
                out.extend_from_slice(format!("<proceed xmlns='{NS_TLS}'/>").as_bytes());
                self.stage = Stage::Header;
                Ok(Step::StartTls)
            }
            (Stage::Open, "auth", NS_SASL) => {
                self.sasl2 = false;
                self.auth(view, out)
            }
            (Stage::Open, "authenticate", sasl2::NS) if self.policy.sasl2 && self.encrypted => {
                self.sasl2 = true;
                self.authenticate(view, out)
            }
            (Stage::Initial(_) | Stage::Exchange(_), "response", ns) if ns == self.sasl_ns() => {
                self.response(view, out)
            }
            (Stage::Open | Stage::Initial(_) | Stage::Exchange(_), "abort", ns)
                if ns == self.sasl_ns() || (ns == NS_SASL && matches!(self.stage, Stage::Open)) =>
            {
                Ok(self.failed(Failure::ABORTED, out))
            }
            (Stage::Open, "response", NS_SASL) => Ok(self.failed(Failure::MALFORMED_REQUEST, out)),
            (Stage::Open, "iq", NS_CLIENT) => self.register(view, out),
            (Stage::Bind, "iq", NS_CLIENT) => self.bind(view, out),
            (Stage::Bind, "resume", sm::NS) => {
                let previd = view
                    .attr("previd")
                    .map(|v| v.into_owned())
                    .unwrap_or_default();
                let h = view.attr("h").and_then(|h| h.parse().ok());
                let Some(h) = h else {
                    out.extend_from_slice(&sm::failed("bad-request", None));
                    return Ok(Step::Continue);
                };
                Ok(Step::Resume { previd, h })
            }
            (Stage::Bind, _, sm::NS) => {
                out.extend_from_slice(&sm::failed("unexpected-request", None));
                Ok(Step::Continue)
            }
            _ => Err(StreamError::new("not-authorized")),
        }
    }

    // ---- SASL --------------------------------------------------------------------------------------------------

    /// The namespace of the exchange's profile.
    fn sasl_ns(&self) -> &'static str {
        match self.sasl2 {
            true => sasl2::NS,
            false => NS_SASL,
        }
    }

    /// The mechanism that the client names, if it was offered.
    fn mechanism(&self, view: &View<'_>) -> Result<Mechanism, Failure> {
        let name = view.attr("mechanism");
        let mechanism = name.as_deref().and_then(Mechanism::from_name);
        mechanism
            .filter(|m| self.offered.contains(m))
            .ok_or_else(|| {
                let plain = name.as_deref() == Some("PLAIN");
                match !self.encrypted && (plain || self.policy.tls_required) {
                    true => Failure::ENCRYPTION_REQUIRED,
                    false => Failure::INVALID_MECHANISM,
                }
            })
    }

    fn auth(&mut self, view: &View<'_>, out: &mut Vec<u8>) -> Result<Step, StreamError> {
        let begun = self
            .mechanism(view)
            .and_then(|mechanism| Ok((mechanism, decode(view)?)));
        Ok(match begun {
            Ok((mechanism, initial)) => self.start(mechanism, initial.as_deref(), out),
            Err(failure) => self.failed(failure, out),
        })
    }

    /// XEP-0388.
    fn authenticate(&mut self, view: &View<'_>, out: &mut Vec<u8>) -> Result<Step, StreamError> {
        let ht = view.attr("mechanism").as_deref().and_then(Ht::from_name);
        if let Some(ht) = ht.filter(|ht| self.policy.tokens && self.takes(*ht)) {
            return Ok(match self.show_token(ht, &view.to_element()) {
                Ok(name) => Step::Login { name },
                Err(failure) => self.failed(failure, out),
            });
        }
        let begun = self
            .mechanism(view)
            .and_then(|mechanism| Ok((mechanism, sasl2::read(&view.to_element())?)));
        Ok(match begun {
            Ok((mechanism, (initial, mut request))) => {
                request.tokens.request = request.tokens.request.filter(|ht| self.takes(*ht));
                if mechanism == Mechanism::External {
                    // it would let in when the certificate does not any more
                    request.tokens.request = None;
                }
                self.request = Some(Box::new(request));
                self.start(mechanism, initial.as_deref(), out)
            }
            Err(failure) => self.failed(failure, out),
        })
    }

    /// Is it who the header of the stream says? Whoever names an address there authenticates as that one (XEP-0388, "Initiation").
    fn check_from(&self, name: &str) -> Result<(), Failure> {
        match &self.from {
            Some(from) if !self.is_address(from, name) => Err(Failure::INVALID_AUTHZID
                .with_text("The stream's from is the address of another account")),
            _ => Ok(()),
        }
    }

    /// Is it the bare address of this account?
    fn is_address(&self, bare: &str, name: &str) -> bool {
        bare.split_once('@') == Some((name, &*self.domain))
    }

    /// Where every mechanism that is offered binds to the channel, tokens do as well.
    fn takes(&self, ht: Ht) -> bool {
        ht != Ht::None || self.offered.iter().any(|m| !m.is_bound())
    }

    /// XEP-0484: the user whose token it is said to be.
    fn show_token(&mut self, ht: Ht, authenticate: &Element) -> Result<Box<str>, Failure> {
        let (initial, mut request) = sasl2::read(authenticate)?;
        request.tokens.request = request.tokens.request.filter(|ht| self.takes(*ht));
        let message = initial.filter(|_| request.tokens.fast && request.agent.is_some());
        let message = message.ok_or(
            Failure::MALFORMED_REQUEST.with_text("A token needs <fast/> and a user agent's id"),
        )?;
        let attempt = Attempt::start(ht, &message, &self.bindings)?;
        let name: Box<str> = attempt.username.as_str().into();
        self.check_from(&name)?;
        self.candidate = Some(name.clone());
        self.request = Some(Box::new(request));
        self.stage = Stage::Token(Box::new(attempt));
        Ok(name)
    }

    /// Was a token shown? Then [`Negotiation::token`] goes on instead of [`Negotiation::credentials`].
    pub fn shows_token(&self) -> bool {
        matches!(self.stage, Stage::Token(_))
    }

    /// Does the client authenticate by the certificate that it has shown?
    pub fn shows_certificate(&self) -> bool {
        matches!(&self.stage, Stage::Exchange(exchange) if exchange.is_external())
    }

    /// The owner has loaded the user; `None`: there is none. `unix`: now, in seconds.
    pub fn token(
        &mut self,
        record: Option<&ArchivedUserRecord>,
        env: &Env,
        unix: u64,
        out: &mut Vec<u8>,
    ) -> Step {
        let (Stage::Token(attempt), Some(request)) = (&self.stage, &mut self.request) else {
            return Step::Continue;
        };
        self.disabled = record.is_some_and(|record| record.disabled);
        let agent = request.agent.as_deref().unwrap_or_default();
        let step = match fast::check(attempt, record, agent, &env.login_key, unix) {
            Ok((salt, additional)) => {
                request.tokens.used = Some(salt);
                sasl::Step::Success { additional }
            }
            Err(failure) => sasl::Step::Failure(failure),
        };
        self.sasl_step(step, out)
    }

    fn start(&mut self, mechanism: Mechanism, initial: Option<&[u8]>, out: &mut Vec<u8>) -> Step {
        let offer = sasl::Offer {
            mechanisms: &self.offered,
            bindings: &self.bindings,
            encrypted: self.encrypted,
            domain: &self.domain,
            certified: &self.certified,
        };
        let started = Exchange::start(mechanism, initial, &offer).and_then(|started| {
            if let sasl::Start::User(exchange) = &started {
                self.check_from(exchange.username())?;
            }
            Ok(started)
        });
        match started {
            Ok(sasl::Start::NeedInitial) => {
                sasl_element("challenge", self.sasl_ns(), b"", out);
                self.stage = Stage::Initial(mechanism);
                Step::Continue
            }
            Ok(sasl::Start::User(exchange)) => {
                let name: Box<str> = exchange.username().into();
                self.candidate = Some(name.clone());
                self.stage = Stage::Exchange(Box::new(exchange));
                Step::Login { name }
            }
            Err(failure) => self.failed(failure, out),
        }
    }

    fn response(&mut self, view: &View<'_>, out: &mut Vec<u8>) -> Result<Step, StreamError> {
        let data = match decode(view) {
            Ok(data) => data.unwrap_or_default(),
            Err(failure) => return Ok(self.failed(failure, out)),
        };
        let step = match &mut self.stage {
            Stage::Initial(mechanism) => {
                let mechanism = *mechanism;
                return Ok(self.start(mechanism, Some(&data), out));
            }
            Stage::Exchange(exchange) => exchange.respond(&data),
            _ => return Err(StreamError::new("not-authorized")),
        };
        Ok(self.sasl_step(step, out))
    }

    /// The owner has loaded the user whom [`Step::Login`] named; `None`: there is none.
    /// `disabled`: the account may not log in; only who proves to be its owner learns it.
    pub fn credentials(
        &mut self,
        credentials: Option<Credentials<'_>>,
        disabled: bool,
        decoy: &Decoy,
        out: &mut Vec<u8>,
    ) -> Step {
        self.disabled = disabled;
        let Stage::Exchange(exchange) = &mut self.stage else {
            return Step::Continue;
        };
        let mut nonce = [0; 18];
        random(&mut nonce);
        let step = exchange.credentials(credentials, decoy, &nonce);
        self.sasl_step(step, out)
    }

    /// The outcome of [`Step::CheckPassword`]; `None`: it could not be computed now.
    pub fn checked(&mut self, right: Option<bool>, out: &mut Vec<u8>) -> Step {
        let (Stage::Exchange(exchange), Some(right)) = (&mut self.stage, right) else {
            return self.failed(Failure::TEMPORARY_AUTH_FAILURE, out);
        };
        let step = exchange.verified(right);
        self.sasl_step(step, out)
    }

    fn sasl_step(&mut self, step: sasl::Step, out: &mut Vec<u8>) -> Step {
        match step {
            sasl::Step::Challenge(data) => {
                sasl_element("challenge", self.sasl_ns(), &data, out);
                Step::Continue
            }
            sasl::Step::Success { .. } if self.disabled => {
                self.failed(Failure::ACCOUNT_DISABLED, out)
            }
            sasl::Step::Success { additional } => {
                self.user = self.candidate.take();
                if let Some(request) = &mut self.request {
                    request.additional = additional;
                    self.stage = Stage::Inline;
                } else {
                    sasl_element("success", NS_SASL, &additional, out);
                    self.stage = Stage::Header;
                }
                Step::Authenticated
            }
            sasl::Step::Failure(failure) => self.failed(failure, out),
            sasl::Step::CheckPassword(check) => Step::CheckPassword(check),
        }
    }

    /// Refuses the attempt at work.
    pub fn failed(&mut self, failure: Failure, out: &mut Vec<u8>) -> Step {
        let condition = failure.condition;
        let failure_ns = self.sasl_ns();
        // the conditions are those of RFC 6120 in both profiles
        let condition_ns = match self.sasl2 {
            true => format!(" xmlns='{NS_SASL}'"),
            false => String::new(),
        };
        out.extend_from_slice(
            format!("<failure xmlns='{failure_ns}'><{condition}{condition_ns}/>").as_bytes(),
        );
        if let Some(text) = failure.text {
            out.extend_from_slice(b"<text xml:lang='en'>");
            crate::xml::escape_text(text, out);
            out.extend_from_slice(b"</text>");
        }
        out.extend_from_slice(b"</failure>");
        self.attempts += 1;
        self.stage = Stage::Open;
        self.user = None;
        self.request = None;
        let close = self.attempts >= self.policy.attempts_max;
        if close {
            StreamError::text(
                "policy-violation",
                "too many failed attempts to authenticate",
            )
            .write(out);
        }
        Step::Refused {
            name: self.candidate.take(),
            condition,
            close,
        }
    }

    // ---- registration ------------------------------------------------------------------------------------------

    /// XEP-0077 before authentication.
    fn register(&mut self, view: &View<'_>, out: &mut Vec<u8>) -> Result<Step, StreamError> {
        let iq = view.to_element();
        let Some(query) = iq.find("query", NS_REGISTER) else {
            return Err(StreamError::new("not-authorized"));
        };
        self.iq = iq.get("id").unwrap_or_default().to_owned();
        if !self.policy.register || (self.policy.tls_required && !self.encrypted) {
            self.iq_error(&StanzaError::NOT_ALLOWED, out);
            return Ok(Step::Continue);
        }
        match iq.get("type") {
            Some("get") => {
                let form = Element::new("query", NS_REGISTER)
                    .child(
                        Element::new("instructions", NS_REGISTER)
                            .text("Choose a username and a password."),
                    )
                    .child(Element::new("username", NS_REGISTER))
                    .child(Element::new("password", NS_REGISTER));
                self.iq_result(Some(form), out);
                Ok(Step::Continue)
            }
            Some("set") => {
                let field = |name| {
                    query
                        .find(name, NS_REGISTER)
                        .map(|e| e.text_content())
                        .unwrap_or_default()
                };
                let (username, password) = (field("username"), field("password"));
                if username.is_empty() || password.is_empty() {
                    self.iq_error(&StanzaError::NOT_ACCEPTABLE, out);
                    return Ok(Step::Continue);
                }
                match jid::localpart(&username) {
                    Ok(name) => Ok(Step::Register {
                        name: name.into_owned().into(),
                        password,
                    }),
                    Err(_) => {
                        // XEP-0077 3.1.1: a name that cannot be
                        self.iq_error(&StanzaError::NOT_ACCEPTABLE, out);
                        Ok(Step::Continue)
                    }
                }
            }
            _ => {
                self.iq_error(&StanzaError::BAD_REQUEST, out);
                Ok(Step::Continue)
            }
        }
    }

    /// The outcome of [`Step::Register`].
    pub fn registered(&mut self, outcome: Result<(), StanzaError>, out: &mut Vec<u8>) {
        match outcome {
            Ok(()) => self.iq_result(None, out),
            Err(error) => self.iq_error(&error, out),
        }
    }

    // ---- binding -----------------------------------------------------------------------------------------------

    fn bind(&mut self, view: &View<'_>, out: &mut Vec<u8>) -> Result<Step, StreamError> {
        let iq = view.to_element();
        let Some(bind) = iq
            .find("bind", NS_BIND)
            .filter(|_| iq.get("type") == Some("set"))
        else {
            // RFC 6120 7.1: no stanzas before binding
            return Err(StreamError::new("not-authorized"));
        };
        self.iq = iq.get("id").unwrap_or_default().to_owned();
        let wanted = bind
            .find("resource", NS_BIND)
            .map(|r| r.text_content())
            .filter(|r| !r.is_empty());
        match wanted.as_deref().map(jid::resourcepart).transpose() {
            Ok(resource) => Ok(Step::Bind {
                resource: resource.map(|r| r.into_owned()),
                extras: Extras::default(),
            }),
            Err(_) => {
                self.iq_error(&StanzaError::BAD_REQUEST, out);
                Ok(Step::Continue)
            }
        }
    }

    /// The session has begun, with this full JID and these answers to what was to be enabled with it, or cannot.
    pub fn bound(
        &mut self,
        outcome: Result<(&str, &Answers), StanzaError>,
        env: &Env,
        out: &mut Vec<u8>,
    ) {
        if let Some(mut request) = self.request.take() {
            let managed = matches!(outcome, Ok((_, answers)) if !answers.enabled.is_empty());
            let jid = match outcome {
                Ok((jid, answers)) => {
                    let Answers { enabled, archive } = answers;
                    let ns = sasl2::NS_BIND;
                    let bound = format!("<bound xmlns='{ns}'>{archive}{enabled}</bound>");
                    request.answers.extend_from_slice(bound.as_bytes());
                    jid.to_owned()
                }
                // XEP-0386 names none: the client is authenticated, and may bind the older way
                Err(error) => {
                    Element::new("failed", sasl2::NS_BIND)
                        .child(error.element())
                        .write(&mut request.answers, sasl2::NS);
                    return self.succeed(&request, env, out);
                }
            };
            request.write_success(&jid, out);
            out.extend_from_slice(b"</success>");
            write_rest_of_features(env, managed, out);
            return;
        }
        match outcome {
            Ok((jid, _)) => {
                let bind =
                    Element::new("bind", NS_BIND).child(Element::new("jid", NS_BIND).text(jid));
                self.iq_result(Some(bind), out);
            }
            Err(error) => self.iq_error(&error, out),
        }
    }

    /// The session cannot be given to this client, because its account is not what it has authenticated against any more.
    pub fn refused_resumption(&mut self, failure: Failure, out: &mut Vec<u8>) -> Step {
        if self.request.is_some() {
            self.candidate = self.user.take();
            return self.failed(failure, out);
        }
        // it will be refused a new one, too
        out.extend_from_slice(&sm::failed("not-authorized", None));
        Step::Continue
    }

    /// There is no such session any more; `count` of its stanzas were durable, if that is known (XEP-0198 section 5).
    pub fn not_resumed(&mut self, count: Option<u32>, env: &Env, out: &mut Vec<u8>) -> Step {
        let failed = sm::failed("item-not-found", count);
        let Some(request) = &mut self.request else {
            out.extend_from_slice(&failed);
            return Step::Continue;
        };
        request.answers.extend_from_slice(&failed);
        self.proceed(env, out)
    }

    // ---- what came along with the authentication (XEP-0388) ----------------------------------------------------

    /// The next thing to do of what came along, or, when all is done, success.
    pub fn proceed(&mut self, env: &Env, out: &mut Vec<u8>) -> Step {
        let Some(request) = &mut self.request else {
            return Step::Continue;
        };
        if request.agent.is_some() && request.tokens.is_any() {
            return Step::Tokens;
        }
        if let Some((previd, h)) = request.resume.take() {
            return Step::Resume { previd, h };
        }
        if let Some(bind) = request.bind.take() {
            let user = self.user.as_deref().unwrap_or_default();
            return Step::Bind {
                resource: Some(bind.resource(&env.login_key, user, request.agent.as_deref())),
                extras: bind.extras,
            };
        }
        if let Some(request) = self.request.take() {
            self.succeed(&request, env, out);
        }
        Step::Continue
    }

    /// The tokens are as they shall be, durably: the new one, if there is one. `Err`: the client must not be let in, because it
    /// was to end its token and that cannot be done now, or its account is not the same any more.
    pub fn tokens(
        &mut self,
        outcome: Result<Option<String>, Failure>,
        env: &Env,
        out: &mut Vec<u8>,
    ) -> Step {
        let answer = match outcome {
            Ok(answer) => answer,
            Err(failure) => {
                self.candidate = self.user.take();
                return self.failed(failure, out);
            }
        };
        if let Some(request) = &mut self.request {
            request.tokens = fast::Wishes::default();
            request
                .answers
                .extend_from_slice(answer.unwrap_or_default().as_bytes());
        }
        self.proceed(env, out)
    }

    /// Success without a session: binding or resumption goes the older way.
    fn succeed(&mut self, request: &sasl2::Request, env: &Env, out: &mut Vec<u8>) {
        let user = self.user.as_deref().unwrap_or_default();
        request.write_success(&format!("{user}@{}", self.domain), out);
        out.extend_from_slice(b"</success>");
        self.stage = Stage::Bind;
        self.features(env, out);
    }

    /// What goes before `<resumed/>` and what goes behind it, for the session with this full JID.
    pub fn resumed(&self, jid: &str, env: &Env) -> (Vec<u8>, Vec<u8>) {
        let (mut before, mut behind) = (Vec::new(), Vec::new());
        if let Some(request) = &self.request {
            request.write_success(jid, &mut before);
            behind.extend_from_slice(b"</success>");
            write_rest_of_features(env, true, &mut behind);
        }
        (before, behind)
    }

    fn iq_result(&self, payload: Option<Element>, out: &mut Vec<u8>) {
        let iq = Element::new("iq", NS_CLIENT)
            .attr("type", "result")
            .attr("id", &*self.iq);
        payload
            .into_iter()
            .fold(iq, Element::child)
            .write(out, NS_CLIENT);
    }

    fn iq_error(&self, error: &StanzaError, out: &mut Vec<u8>) {
        let iq = Element::new("iq", NS_CLIENT)
            .attr("type", "error")
            .attr("id", &*self.iq);
        iq.child(error.element()).write(out, NS_CLIENT);
    }
}

/// The base64 payload: `None` for no data, empty for "=" (RFC 6120 6.4.2).
fn decode(view: &View<'_>) -> Result<Option<Vec<u8>>, Failure> {
    match view.inner().trim() {
        "" => Ok(None),
        "=" => Ok(Some(Vec::new())),
        data => BASE64_STANDARD
            .decode(data)
            .map(Some)
            .map_err(|_| Failure::INCORRECT_ENCODING),
    }
}

fn sasl_element(name: &str, ns: &str, data: &[u8], out: &mut Vec<u8>) {
    let data = BASE64_STANDARD.encode(data);
    for part in ["<", name, " xmlns='", ns, "'>", &data, "</", name, ">"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// The features of a stream that has a session already; `managed`: with stream management.
fn write_rest_of_features(env: &Env, managed: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(b"<stream:features>");
    let all = env.stream_features();
    let management = format!("<sm xmlns='{}'/>", sm::NS);
    match all.split_once(&management).filter(|_| managed) {
        Some((before, behind)) => {
            out.extend_from_slice(before.as_bytes());
            out.extend_from_slice(behind.as_bytes());
        }
        None => out.extend_from_slice(all.as_bytes()),
    }
    out.extend_from_slice(b"</stream:features>");
}
