//! SCRAM (RFC 5802, RFC 7677), with the downgrade protection of XEP-0474 (version 0.5.0, for SASL as of RFC 6120). In: the
//! client's two messages and the stored keys. Out: the challenge, and the server's signature for the client to check.
//!
//! The promise: nobody passes without the password, without the channel that the client saw, or after somebody has thinned out
//! what was offered.

use aws_lc_rs::{constant_time, digest, hmac, pbkdf2};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use precis_profiles::OpaqueString;
use precis_profiles::precis_core::profile::PrecisFastInvocation;
use smallvec::SmallVec;
use std::borrow::Cow;
use std::num::NonZeroU32;
use std::ops::Range;

use super::{ChannelBindings, Decoy, Failure, Mechanism, Offer, PASSWORD_BYTES_MAX};

/// The most bytes of a client's nonce.
const NONCE_BYTES_MAX: usize = 1024;

/// The hash of a SCRAM mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hash {
    /// SCRAM-SHA-1.
    Sha1,
    /// SCRAM-SHA-256.
    Sha256,
}

impl Hash {
    /// Bytes of the longest output.
    pub const LEN_MAX: usize = 32;

    /// Bytes of its output, and of the keys.
    #[allow(clippy::len_without_is_empty)] // the length of an output is never zero
    pub const fn len(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
        }
    }

    fn digest(self) -> &'static digest::Algorithm {
        match self {
            Hash::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Hash::Sha256 => &digest::SHA256,
        }
    }

    fn hmac(self, key: &[u8], data: &[u8]) -> hmac::Tag {
        let algorithm = match self {
            Hash::Sha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
            Hash::Sha256 => hmac::HMAC_SHA256,
        };
        hmac::sign(&hmac::Key::new(algorithm, key), data)
    }

    fn pbkdf2(self) -> pbkdf2::Algorithm {
        match self {
            Hash::Sha1 => pbkdf2::PBKDF2_HMAC_SHA1,
            Hash::Sha256 => pbkdf2::PBKDF2_HMAC_SHA256,
        }
    }
}

/// What is stored of a password for one hash (RFC 5802, 3).
#[derive(Clone, PartialEq, Eq)]
pub struct ScramKeys {
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// The salt, of any length but zero.
    pub salt: Vec<u8>,
    /// H(ClientKey), [`Hash::len`] bytes.
    pub stored_key: Vec<u8>,
    /// ServerKey, [`Hash::len`] bytes.
    pub server_key: Vec<u8>,
}

impl ScramKeys {
    /// The same keys, borrowed.
    pub fn as_ref(&self) -> ScramKeysRef<'_> {
        ScramKeysRef {
            iterations: self.iterations,
            salt: &self.salt,
            stored_key: &self.stored_key,
            server_key: &self.server_key,
        }
    }
}

/// Stored keys, read where they are.
#[derive(Clone, Copy)]
pub struct ScramKeysRef<'a> {
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// The salt.
    pub salt: &'a [u8],
    /// H(ClientKey).
    pub stored_key: &'a [u8],
    /// ServerKey.
    pub server_key: &'a [u8],
}

/// The keys of one account, read where they are.
#[derive(Clone, Copy, Default)]
pub struct Credentials<'a> {
    /// For SCRAM-SHA-1.
    pub sha1: Option<ScramKeysRef<'a>>,
    /// For SCRAM-SHA-256.
    pub sha256: Option<ScramKeysRef<'a>>,
}

impl<'a> Credentials<'a> {
    /// The keys for this hash, if there are any and they have its length.
    pub fn keys(&self, hash: Hash) -> Option<ScramKeysRef<'a>> {
        let keys = match hash {
            Hash::Sha1 => self.sha1,
            Hash::Sha256 => self.sha256,
        }?;
        let len = hash.len();
        let usable = keys.stored_key.len() == len
            && keys.server_key.len() == len
            && !keys.salt.is_empty()
            && keys.iterations > 0;
        usable.then_some(keys)
    }
}

/// Why a password cannot be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SaslError {
    /// Empty, or with characters that PRECIS forbids (control characters).
    #[error("the password is empty or has characters that are not allowed")]
    PasswordForbidden,
    /// More than [`PASSWORD_BYTES_MAX`] bytes.
    #[error("the password is longer than {PASSWORD_BYTES_MAX} bytes")]
    PasswordTooLong,
    /// PBKDF2 needs at least one iteration and a salt.
    #[error("the iteration count is zero or the salt is empty")]
    Parameters,
}

/// Derives the keys to store. Costs milliseconds for 10,000 iterations.
///
/// The password is prepared by PRECIS OpaqueString (RFC 8265, 4.2), which has replaced the SASLprep of RFC 5802. They differ
/// for compatibility characters only (such as a ligature or a full-width letter), which SASLprep would decompose.
pub fn derive(
    hash: Hash,
    password: &str,
    salt: &[u8],
    iterations: u32,
) -> Result<ScramKeys, SaslError> {
    let iterations = NonZeroU32::new(iterations).ok_or(SaslError::Parameters)?;
    if salt.is_empty() {
        return Err(SaslError::Parameters);
    }
    if password.len() > PASSWORD_BYTES_MAX {
        return Err(SaslError::PasswordTooLong);
    }
    let password = OpaqueString::enforce(password).map_err(|_| SaslError::PasswordForbidden)?;
    let mut salted = [0; Hash::LEN_MAX];
    let salted = &mut salted[..hash.len()];
    pbkdf2::derive(hash.pbkdf2(), iterations, salt, password.as_bytes(), salted);
    let client_key = hash.hmac(salted, b"Client Key");
    Ok(ScramKeys {
        iterations: iterations.get(),
        salt: salt.to_vec(),
        stored_key: digest::digest(hash.digest(), client_key.as_ref())
            .as_ref()
            .to_vec(),
        server_key: hash.hmac(salted, b"Server Key").as_ref().to_vec(),
    })
}

/// Compares in a time that does not depend on the content.
pub(super) fn equal(a: &[u8], b: &[u8]) -> bool {
    constant_time::verify_slices_are_equal(a, b).is_ok()
}

/// The server's side between the client's first message and its last.
pub(super) struct Server {
    hash: Hash,
    /// Whether there is such an account at all.
    real: bool,
    stored_key: [u8; Hash::LEN_MAX],
    server_key: [u8; Hash::LEN_MAX],
    /// XEP-0474's hash of what was offered.
    offered: digest::Digest,
    /// What the attribute `c` has to say: the GS2 header and the channel binding, in base64.
    binding: String,
    /// RFC 5802's AuthMessage, as far as it is known.
    auth_message: String,
    /// Where in it the nonce stands: the client's part, later the whole.
    nonce: Range<usize>,
}

impl Server {
    /// Takes the client-first-message. Returns the user's localpart too.
    pub(super) fn start(
        hash: Hash,
        plus: bool,
        message: &str,
        offer: &Offer<'_>,
    ) -> Result<(String, Server), Failure> {
        let malformed = Failure::MALFORMED_REQUEST;
        let (flag, rest) = message.split_once(',').ok_or(malformed)?;
        let (authzid, bare) = rest.split_once(',').ok_or(malformed)?;
        let header = &message[..message.len() - bare.len()];
        let binding = channel_binding(flag, plus, offer)?;

        let mut attributes = bare.split(',');
        let name = attributes.next().unwrap_or_default();
        if name.starts_with("m=") {
            return Err(malformed.with_text("Mandatory SCRAM extensions are not supported"));
        }
        let name = name.strip_prefix("n=").ok_or(malformed)?;
        let nonce = attributes.next().and_then(|nonce| nonce.strip_prefix("r="));
        let nonce = nonce.ok_or(malformed)?;
        if !is_nonce(nonce) || !attributes.all(is_attribute) {
            return Err(malformed);
        }
        let username = super::username(&saslname(name).ok_or(malformed)?)?;
        if !authzid.is_empty() {
            let authzid = authzid
                .strip_prefix("a=")
                .and_then(saslname)
                .ok_or(malformed)?;
            super::check_authzid(&authzid, &username, offer.domain)?;
        }

        let nonce_start = "n=".len() + name.len() + ",r=".len();
        let server = Server {
            hash,
            real: false,
            stored_key: [0; Hash::LEN_MAX],
            server_key: [0; Hash::LEN_MAX],
            offered: offered(hash, offer.mechanisms, offer.bindings),
            binding: BASE64.encode([header.as_bytes(), binding].concat()),
            auth_message: bare.to_owned(),
            nonce: nonce_start..nonce_start + nonce.len(),
        };
        Ok((username, server))
    }

    /// Takes the account's keys. Returns the server-first-message.
    pub(super) fn challenge(
        &mut self,
        username: &str,
        account: Option<Credentials<'_>>,
        decoy: &Decoy,
        nonce: &[u8],
    ) -> Vec<u8> {
        // Made up for existing accounts too: all shall cost the same.
        let (iterations, salt) = decoy.scram(username, self.hash, account.is_some());
        let zeros = [0; Hash::LEN_MAX];
        let made_up = ScramKeysRef {
            iterations,
            salt: salt.as_bytes(),
            stored_key: &zeros[..self.hash.len()],
            server_key: &zeros[..self.hash.len()],
        };
        let real = account.and_then(|account| account.keys(self.hash));
        let keys = real.unwrap_or(made_up);
        self.real = real.is_some();
        self.stored_key[..self.hash.len()].copy_from_slice(keys.stored_key);
        self.server_key[..self.hash.len()].copy_from_slice(keys.server_key);

        let text = &mut self.auth_message;
        // Room for the client's last message too: another nonce, and what precedes it.
        text.reserve(2 * (self.nonce.len() + nonce.len() * 2) + keys.salt.len() * 2 + 192);
        text.push_str(",r=");
        let nonce_start = text.len();
        text.extend_from_within(self.nonce.clone());
        BASE64.encode_string(nonce, text);
        self.nonce = nonce_start..text.len();
        text.push_str(",s=");
        BASE64.encode_string(keys.salt, text);
        text.push_str(",i=");
        push_number(text, keys.iterations);
        text.push_str(",h=");
        BASE64.encode_string(self.offered, text);
        text.as_bytes()[nonce_start - "r=".len()..].to_vec()
    }

    /// Takes the client-final-message. Returns the server-final-message.
    pub(super) fn finish(mut self: Box<Self>, message: &str) -> Result<Vec<u8>, Failure> {
        let malformed = Failure::MALFORMED_REQUEST;
        let (without_proof, proof) = message.rsplit_once(",p=").ok_or(malformed)?;
        let mut attributes = without_proof.split(',');
        let binding = attributes.next().and_then(|c| c.strip_prefix("c="));
        let nonce = attributes.next().and_then(|r| r.strip_prefix("r="));
        let (Some(binding), Some(nonce)) = (binding, nonce) else {
            return Err(malformed);
        };
        if !attributes.all(is_attribute) {
            return Err(malformed);
        }
        let proof: SmallVec<[u8; 48]> = decode(proof).ok_or(malformed)?;
        if proof.len() != self.hash.len() {
            return Err(malformed);
        }
        let same_channel = equal(binding.as_bytes(), self.binding.as_bytes());
        let same_nonce = nonce == &self.auth_message[self.nonce.clone()];
        self.auth_message.push(',');
        self.auth_message.push_str(without_proof);
        let len = self.hash.len();
        let signature = verify(
            self.hash,
            &self.stored_key[..len],
            &self.server_key[..len],
            self.auth_message.as_bytes(),
            &proof,
        );
        match signature {
            Some(signature) if self.real && same_channel && same_nonce => {
                let mut message = String::with_capacity(2 + 44);
                message.push_str("v=");
                BASE64.encode_string(signature, &mut message);
                Ok(message.into_bytes())
            }
            _ => Err(Failure::NOT_AUTHORIZED),
        }
    }
}

/// Checks the client's proof. Returns the server's signature.
fn verify(
    hash: Hash,
    stored_key: &[u8],
    server_key: &[u8],
    auth_message: &[u8],
    proof: &[u8],
) -> Option<hmac::Tag> {
    let client_signature = hash.hmac(stored_key, auth_message);
    let mut client_key = [0; Hash::LEN_MAX];
    let client_key = &mut client_key[..hash.len()];
    for ((key, proof), signature) in client_key
        .iter_mut()
        .zip(proof)
        .zip(client_signature.as_ref())
    {
        *key = proof ^ signature;
    }
    let hashed = digest::digest(hash.digest(), client_key);
    equal(hashed.as_ref(), stored_key).then(|| hash.hmac(server_key, auth_message))
}

/// The channel binding data that the flag of the GS2 header asks for (RFC 5802, 6).
fn channel_binding<'o>(flag: &str, plus: bool, offer: &Offer<'o>) -> Result<&'o [u8], Failure> {
    let malformed = Failure::MALFORMED_REQUEST;
    match (flag, plus) {
        ("n", false) => Ok(&[]),
        // The client could bind, and has seen no offer of it: somebody has removed it on the way.
        ("y", false) if offer.mechanisms.iter().any(|m| m.is_plus()) => {
            Err(Failure::NOT_AUTHORIZED.with_text("The server does support channel binding"))
        }
        ("y", false) => Ok(&[]),
        ("n" | "y", true) => Err(malformed.with_text("This mechanism needs a channel binding")),
        _ => match (flag.strip_prefix("p="), plus) {
            (Some(_), false) => {
                Err(malformed.with_text("Channel binding needs a mechanism that ends in -PLUS"))
            }
            (Some(name), true) => offer
                .bindings
                .get(name)
                .ok_or(malformed.with_text("This channel binding type is not supported")),
            (None, _) => Err(malformed),
        },
    }
}

/// The hash of the offer for the attribute `h` (XEP-0474 0.5.0, "Server Sends Downgrade Protection Hash").
fn offered(hash: Hash, mechanisms: &[Mechanism], bindings: &ChannelBindings) -> digest::Digest {
    const BETWEEN: &[u8] = b"\x1e";
    const BEFORE_BINDINGS: &[u8] = b"\x1f";
    fn update(context: &mut digest::Context, names: &mut [&str]) {
        names.sort_unstable();
        for (i, name) in names.iter().enumerate() {
            if i > 0 {
                context.update(BETWEEN);
            }
            context.update(name.as_bytes());
        }
    }
    let mut context = digest::Context::new(hash.digest());
    let mut names: SmallVec<[&str; 8]> = mechanisms.iter().map(|m| m.name()).collect();
    update(&mut context, &mut names);
    if !bindings.is_empty() {
        context.update(BEFORE_BINDINGS);
        let mut names: SmallVec<[&str; 8]> = bindings.types().collect();
        update(&mut context, &mut names);
    }
    context.finish()
}

/// Decodes a saslname: `=2C` and `=3D` stand for comma and equals sign, which cannot stand for themselves.
fn saslname(name: &str) -> Option<Cow<'_, str>> {
    if name.is_empty() || name.contains('\0') {
        return None;
    }
    if !name.contains('=') {
        return Some(Cow::Borrowed(name));
    }
    let mut parts = name.split('=');
    let mut decoded = parts.next()?.to_owned();
    for part in parts {
        if let Some(rest) = part.strip_prefix("2C") {
            decoded.push(',');
            decoded.push_str(rest);
        } else {
            decoded.push('=');
            decoded.push_str(part.strip_prefix("3D")?);
        }
    }
    Some(Cow::Owned(decoded))
}

/// Printable ASCII; a comma has been split at.
fn is_nonce(nonce: &str) -> bool {
    !nonce.is_empty()
        && nonce.len() <= NONCE_BYTES_MAX
        && nonce.bytes().all(|byte| byte.is_ascii_graphic())
}

/// An extension that may be ignored: a letter, `=` and a value.
fn is_attribute(attribute: &str) -> bool {
    let bytes = attribute.as_bytes();
    matches!(bytes, [name, b'=', _, ..] if name.is_ascii_alphabetic()) && !bytes.contains(&0)
}

fn decode(text: &str) -> Option<SmallVec<[u8; 48]>> {
    let mut bytes = [0; 48];
    let len = BASE64.decode_slice(text, &mut bytes).ok()?;
    Some(SmallVec::from_slice(&bytes[..len]))
}

fn push_number(text: &mut String, number: u32) {
    use std::fmt::Write;
    write!(text, "{number}").expect("a String takes everything");
}
