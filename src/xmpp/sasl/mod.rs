//! SASL, the server's side (RFC 6120, 6; RFC 5802; RFC 7677; RFC 4616; RFC 4422, appendix A). In: the client's messages, decoded from base64, and
//! the keys of the account that they name. Out: [`Step`]s, whose data the caller encodes and sends.
//!
//! ```text
//! <auth>      -> Exchange::start   -> Start::User: look the account up, on its owner's shard
//!                     credentials  -> Step::Challenge, or Step::CheckPassword (PLAIN)
//! <response>  ->      respond      -> Step::Success or Step::Failure
//! (PLAIN)     ->      verified     -> Step::Success or Step::Failure
//! (EXTERNAL)  ->  credentials      -> Step::Success or Step::Failure
//! ```
//!
//! The promise: an unknown user, an account without keys and a wrong password go through the same messages and the same
//! computing, and end in the same failure. Nobody is authorised to act as another user.

pub mod binding;
pub mod decoy;
pub mod external;
mod plain;
pub mod scram;
pub mod token;

use std::fmt;

use crate::xmpp::jid::{self, Jid};
pub use binding::{ChannelBindings, Exporter};
pub use decoy::Decoy;
pub use plain::PasswordCheck;
pub use scram::{Credentials, Hash, SaslError, ScramKeys, ScramKeysRef, derive};

/// The most bytes of one message from a client, decoded. Longer ones are malformed.
pub const MESSAGE_BYTES_MAX: usize = 8192;

/// The most bytes of a password.
pub const PASSWORD_BYTES_MAX: usize = 1024;

/// A mechanism that this server knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mechanism {
    /// RFC 4422, appendix A, XEP-0178: the certificate that the client has shown in the TLS handshake.
    External,
    /// RFC 7677, bound to the TLS channel.
    ScramSha256Plus,
    /// RFC 5802, bound to the TLS channel.
    ScramSha1Plus,
    /// RFC 7677.
    ScramSha256,
    /// RFC 5802.
    ScramSha1,
    /// RFC 4616; over TLS only.
    Plain,
}

impl Mechanism {
    /// All of them, the strongest first: the order to advertise.
    pub const ALL: [Mechanism; 6] = [
        Mechanism::External,
        Mechanism::ScramSha256Plus,
        Mechanism::ScramSha1Plus,
        Mechanism::ScramSha256,
        Mechanism::ScramSha1,
        Mechanism::Plain,
    ];

    /// What to advertise to a client without certificate: the PLUS mechanisms where the stream has a channel binding, PLAIN where
    /// the stream is encrypted (and the operator wants it).
    pub fn offered(has_binding: bool, plain: bool) -> &'static [Mechanism] {
        const ALL: &[Mechanism] = &Mechanism::ALL;
        match (has_binding, plain) {
            (true, true) => &ALL[1..],
            (true, false) => &ALL[1..5],
            (false, true) => &ALL[3..],
            (false, false) => &ALL[3..5],
        }
    }

    /// The registered name.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::External => "EXTERNAL",
            Mechanism::ScramSha256Plus => "SCRAM-SHA-256-PLUS",
            Mechanism::ScramSha1Plus => "SCRAM-SHA-1-PLUS",
            Mechanism::ScramSha256 => "SCRAM-SHA-256",
            Mechanism::ScramSha1 => "SCRAM-SHA-1",
            Mechanism::Plain => "PLAIN",
        }
    }

    /// The mechanism of this name, which is compared byte by byte.
    pub fn from_name(name: &str) -> Option<Mechanism> {
        Mechanism::ALL.into_iter().find(|m| m.name() == name)
    }

    /// Whether it binds to the TLS channel.
    pub fn is_plus(self) -> bool {
        matches!(self, Mechanism::ScramSha256Plus | Mechanism::ScramSha1Plus)
    }

    /// Whether what it proves can be used in no other channel: TLS itself has authenticated the client, or it binds to the channel.
    pub fn is_bound(self) -> bool {
        self.is_plus() || self == Mechanism::External
    }

    /// The hash of a SCRAM mechanism.
    pub fn hash(self) -> Option<Hash> {
        match self {
            Mechanism::ScramSha256Plus | Mechanism::ScramSha256 => Some(Hash::Sha256),
            Mechanism::ScramSha1Plus | Mechanism::ScramSha1 => Some(Hash::Sha1),
            Mechanism::Plain | Mechanism::External => None,
        }
    }
}

/// What this stream has been offered. It must be what was sent in `<stream:features/>`: the client checks a hash of it
/// (XEP-0474).
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// The mechanisms as advertised, in any order.
    pub mechanisms: &'a [Mechanism],
    /// The bindings of this stream's TLS channel, all of which were advertised (XEP-0440).
    pub bindings: &'a ChannelBindings,
    /// Whether the stream is encrypted.
    pub encrypted: bool,
    /// The domain that the stream is for, normalised: a user's authorisation identity is `localpart@domain`.
    pub domain: &'a str,
    /// The accounts that the client's certificate stands for, as localparts ([`external::accounts`]).
    pub certified: &'a [Box<str>],
}

/// What the first message led to.
#[derive(Debug)]
pub enum Start {
    /// There was no initial response: send an empty `<challenge/>` and call [`Exchange::start`] again with the response.
    NeedInitial,
    /// The message names a user: look up [`Exchange::username`] and call [`Exchange::credentials`].
    User(Exchange),
}

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// Send this in `<challenge/>`, pass the `<response/>` to [`Exchange::respond`].
    Challenge(Vec<u8>),
    /// The user is who he says. Send this in `<success/>`, which is empty if there is none.
    Success {
        /// The server's signature, for SCRAM.
        additional: Vec<u8>,
    },
    /// Run it on a helper thread (milliseconds of computing), then call [`Exchange::verified`].
    CheckPassword(PasswordCheck),
    /// Send `<failure/>`; the exchange is over.
    Failure(Failure),
}

/// A SASL failure (RFC 6120, 6.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{condition}{}{}", if text.is_some() { ": " } else { "" }, text.unwrap_or(""))]
pub struct Failure {
    /// The name of the condition's element.
    pub condition: &'static str,
    /// For a person, in English.
    pub text: Option<&'static str>,
}

impl Failure {
    /// The client sent `<abort/>`.
    pub const ABORTED: Failure = Failure::new("aborted");
    /// The account is switched off. Tell nobody but those who proved to be its owner.
    pub const ACCOUNT_DISABLED: Failure = Failure::new("account-disabled");
    /// A token that was right and is too old (RFC 6120, 6.5.3).
    pub const CREDENTIALS_EXPIRED: Failure = Failure::new("credentials-expired");
    /// PLAIN without TLS.
    pub const ENCRYPTION_REQUIRED: Failure = Failure::new("encryption-required");
    /// The data is no base64.
    pub const INCORRECT_ENCODING: Failure = Failure::new("incorrect-encoding");
    /// The user may not act as this identity, or it is no address.
    pub const INVALID_AUTHZID: Failure = Failure::new("invalid-authzid");
    /// The mechanism is unknown or was not offered.
    pub const INVALID_MECHANISM: Failure = Failure::new("invalid-mechanism");
    /// The message is not of the mechanism's form.
    pub const MALFORMED_REQUEST: Failure = Failure::new("malformed-request");
    /// No such user, or a wrong password: nobody can tell which.
    pub const NOT_AUTHORIZED: Failure = Failure::new("not-authorized");
    /// The tier that knows does not answer, or attempts come too fast.
    pub const TEMPORARY_AUTH_FAILURE: Failure = Failure::new("temporary-auth-failure");

    const fn new(condition: &'static str) -> Failure {
        Failure {
            condition,
            text: None,
        }
    }

    /// The same condition with a text.
    pub const fn with_text(self, text: &'static str) -> Failure {
        Failure {
            condition: self.condition,
            text: Some(text),
        }
    }
}

/// The keys of a new password, SHA-1 and SHA-256, each with a fresh salt. Costs milliseconds.
pub fn new_keys(password: &str, iterations: u32) -> Result<(ScramKeys, ScramKeys), SaslError> {
    let mut salts = [[0; 16]; 2];
    for salt in &mut salts {
        aws_lc_rs::rand::fill(salt).expect("the system gives random bytes");
    }
    Ok((
        derive(Hash::Sha1, password, &salts[0], iterations)?,
        derive(Hash::Sha256, password, &salts[1], iterations)?,
    ))
}

impl From<ScramKeys> for crate::store::record::ScramKeys {
    fn from(keys: ScramKeys) -> Self {
        Self {
            iterations: keys.iterations,
            salt: keys.salt,
            stored_key: keys.stored_key,
            server_key: keys.server_key,
        }
    }
}

/// One authentication in progress. It is `Send`, so that it moves to the user's owner with its connection.
pub struct Exchange {
    username: String,
    state: State,
}

enum State {
    /// SCRAM; the credentials are to come.
    Named(Box<scram::Server>),
    /// SCRAM; the client's proof is to come.
    Challenged(Box<scram::Server>),
    /// PLAIN; the credentials are to come.
    Password(Box<str>),
    /// PLAIN; the verdict is to come.
    Checking,
    /// EXTERNAL; whether there is such an account is to come.
    Certified,
    /// Succeeded or failed.
    Over,
}

impl Exchange {
    /// Takes the client's first message, decoded from base64 (`None`: there was no initial response; `=` is an empty one).
    pub fn start(
        mechanism: Mechanism,
        initial: Option<&[u8]>,
        offer: &Offer<'_>,
    ) -> Result<Start, Failure> {
        if !offer.mechanisms.contains(&mechanism) {
            return Err(if mechanism == Mechanism::Plain && !offer.encrypted {
                Failure::ENCRYPTION_REQUIRED
            } else {
                Failure::INVALID_MECHANISM
            });
        }
        let Some(message) = initial else {
            return Ok(Start::NeedInitial);
        };
        let message = text(message)?;
        let (username, state) = match mechanism.hash() {
            Some(hash) => {
                let (username, server) =
                    scram::Server::start(hash, mechanism.is_plus(), message, offer)?;
                (username, State::Named(Box::new(server)))
            }
            None if mechanism == Mechanism::External => {
                (external::parse(message, offer)?, State::Certified)
            }
            None => {
                let (username, password) = plain::parse(message, offer.domain)?;
                (username, State::Password(password.into()))
            }
        };
        Ok(Start::User(Exchange { username, state }))
    }

    /// The localpart of the user, normalised.
    pub fn username(&self) -> &str {
        &self.username
    }

    /// Is it EXTERNAL, with the credentials to come?
    pub fn is_external(&self) -> bool {
        matches!(self.state, State::Certified)
    }

    /// Takes the account's keys. Without an account, or without fitting keys, the exchange goes on with a decoy's and fails at
    /// its end. `nonce` is fresh randomness, at least 18 bytes.
    pub fn credentials(
        &mut self,
        account: Option<Credentials<'_>>,
        decoy: &Decoy,
        nonce: &[u8],
    ) -> Step {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Named(mut server) => {
                let challenge = server.challenge(&self.username, account, decoy, nonce);
                self.state = State::Challenged(server);
                Step::Challenge(challenge)
            }
            State::Password(password) => {
                self.state = State::Checking;
                let keys = decoy.plain_keys(&self.username, account);
                Step::CheckPassword(PasswordCheck::new(password, keys))
            }
            State::Certified => match account {
                Some(_) => Step::Success {
                    additional: Vec::new(),
                },
                None => Step::Failure(Failure::NOT_AUTHORIZED),
            },
            _ => Step::Failure(Failure::MALFORMED_REQUEST),
        }
    }

    /// Takes a `<response/>`, decoded from base64.
    pub fn respond(&mut self, message: &[u8]) -> Step {
        let State::Challenged(server) = std::mem::replace(&mut self.state, State::Over) else {
            return Step::Failure(Failure::MALFORMED_REQUEST);
        };
        match text(message).and_then(|message| server.finish(message)) {
            Ok(additional) => Step::Success { additional },
            Err(failure) => Step::Failure(failure),
        }
    }

    /// Takes the verdict of [`PasswordCheck::run`].
    pub fn verified(&mut self, correct: bool) -> Step {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Checking if correct => Step::Success {
                additional: Vec::new(),
            },
            State::Checking => Step::Failure(Failure::NOT_AUTHORIZED),
            _ => Step::Failure(Failure::MALFORMED_REQUEST),
        }
    }
}

// Passwords and keys stay out of logs.
impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// All mechanisms speak UTF-8 without NUL, but for PLAIN's separators.
fn text(message: &[u8]) -> Result<&str, Failure> {
    if message.len() > MESSAGE_BYTES_MAX {
        return Err(Failure::MALFORMED_REQUEST.with_text("The message is too long"));
    }
    std::str::from_utf8(message)
        .map_err(|_| Failure::MALFORMED_REQUEST.with_text("The message is not UTF-8"))
}

/// The user's localpart. A name that no account can have is refused at once: whether a name is well-formed is no secret.
fn username(name: &str) -> Result<String, Failure> {
    jid::localpart(name)
        .map(|local| local.into_owned())
        .map_err(|_| Failure::NOT_AUTHORIZED)
}

/// A user acts as himself only: the authorisation identity is his bare address (RFC 6120, 6.3.8).
fn check_authzid(authzid: &str, username: &str, domain: &str) -> Result<(), Failure> {
    let jid = Jid::parse(authzid).map_err(|_| Failure::INVALID_AUTHZID)?;
    if jid.is_bare() && jid.local() == Some(username) && jid.domain() == domain {
        Ok(())
    } else {
        Err(Failure::INVALID_AUTHZID)
    }
}

#[cfg(test)]
mod tests;
