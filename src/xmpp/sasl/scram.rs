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

/// A client, for tests.
#[cfg(test)]
pub(super) mod testing {
    use super::*;

    pub(in super::super) struct Client {
        hash: Hash,
        header: String,
        bare: String,
        server_final: String,
    }

    impl Client {
        pub(in super::super) fn new(hash: Hash, header: &str, name: &str, nonce: &str) -> Client {
            Client {
                hash,
                header: header.to_owned(),
                bare: format!("n={name},r={nonce}"),
                server_final: String::new(),
            }
        }

        pub(in super::super) fn first(&self) -> String {
            format!("{}{}", self.header, self.bare)
        }

        pub(in super::super) fn set_first(&mut self, first: &str) {
            self.bare = first[self.header.len()..].to_owned();
        }

        pub(in super::super) fn last(
            &mut self,
            server_first: &str,
            binding: &[u8],
            password: &str,
            extensions: &str,
        ) -> String {
            let value = |name: &str| {
                let part = server_first.split(',').find(|part| part.starts_with(name));
                &part.unwrap()[name.len()..]
            };
            let salt = BASE64.decode(value("s=")).unwrap();
            let iterations = NonZeroU32::new(value("i=").parse().unwrap()).unwrap();
            let c = BASE64.encode([self.header.as_bytes(), binding].concat());
            let without_proof = format!("c={c},r={}{extensions}", value("r="));
            let auth_message = format!("{},{server_first},{without_proof}", self.bare);
            let mut salted = vec![0; self.hash.len()];
            let algorithm = self.hash.pbkdf2();
            pbkdf2::derive(
                algorithm,
                iterations,
                &salt,
                password.as_bytes(),
                &mut salted,
            );
            let client_key = self.hash.hmac(&salted, b"Client Key");
            let stored_key = digest::digest(self.hash.digest(), client_key.as_ref());
            let signature = self.hash.hmac(stored_key.as_ref(), auth_message.as_bytes());
            let pairs = client_key.as_ref().iter().zip(signature.as_ref());
            let proof: Vec<u8> = pairs.map(|(a, b)| a ^ b).collect();
            let server_key = self.hash.hmac(&salted, b"Server Key");
            let signature = self.hash.hmac(server_key.as_ref(), auth_message.as_bytes());
            self.server_final = format!("v={}", BASE64.encode(signature));
            format!("{without_proof},p={}", BASE64.encode(proof))
        }

        /// As one who knows the stored key, and takes it for the client's.
        pub(in super::super) fn last_with_stored_key(
            &mut self,
            server_first: &str,
            stored_key: &[u8],
        ) -> String {
            let nonce = server_first.split(',').next().unwrap();
            let without_proof = format!("c={},{nonce}", BASE64.encode(&self.header));
            let auth_message = format!("{},{server_first},{without_proof}", self.bare);
            let signature = self.hash.hmac(stored_key, auth_message.as_bytes());
            let proof: Vec<u8> = signature.as_ref().to_vec();
            format!("{without_proof},p={}", BASE64.encode(proof))
        }

        pub(in super::super) fn server_final(&self) -> String {
            self.server_final.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Client;
    use super::*;

    struct Vector {
        hash: Hash,
        header: &'static str,
        client_first_bare: &'static str,
        server_first: &'static str,
        binding: &'static [u8],
        extensions: &'static str,
        client_final: &'static str,
        server_final: &'static str,
    }

    const VECTORS: [Vector; 3] = [
        // RFC 5802, 5.
        Vector {
            hash: Hash::Sha1,
            header: "n,,",
            client_first_bare: "n=user,r=fyko+d2lbbFgONRv9qkxdawL",
            server_first: "r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096",
            binding: b"",
            extensions: "",
            client_final: "c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=",
            server_final: "v=rmF9pqV8S7suAoZWja4dJRkFsKQ=",
        },
        // RFC 7677, 3.
        Vector {
            hash: Hash::Sha256,
            header: "n,,",
            client_first_bare: "n=user,r=rOprNGfwEbeRWgbNEkqO",
            server_first: "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
            binding: b"",
            extensions: "",
            client_final: "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
            server_final: "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
        },
        // XEP-0474 0.5.0, "Full Example".
        Vector {
            hash: Hash::Sha1,
            header: "p=tls-exporter,,",
            client_first_bare: "n=user,r=12C4CD5C-E38E-4A98-8F6D-15C38F51CCC6",
            server_first: "r=12C4CD5C-E38E-4A98-8F6D-15C38F51CCC6a09117a6-ac50-4f2f-93f1-93799c2bddf6,s=QSXCR+Q6sek8bf92,i=4096,h=G6k/rBLDqgOhRRaCuuatSDFkJ08=",
            binding: b"THIS IS FAKE CB DATA",
            extensions: ",x=19C6532F-1CF4-4A27-A18D-DC9CEA41BBB3",
            client_final: "c=cD10bHMtZXhwb3J0ZXIsLFRISVMgSVMgRkFLRSBDQiBEQVRB,r=12C4CD5C-E38E-4A98-8F6D-15C38F51CCC6a09117a6-ac50-4f2f-93f1-93799c2bddf6,x=19C6532F-1CF4-4A27-A18D-DC9CEA41BBB3,p=M/SIDjT+dfcxUh89jZEypRvFxB4=",
            server_final: "v=MQrMPvv7yv4x4Cq4W4Ih25EqS2c=",
        },
    ];

    #[test]
    fn the_specifications_exchanges_are_reproduced() {
        for vector in VECTORS {
            let keys = {
                let salt = vector.server_first.split(",s=").nth(1).unwrap();
                let salt = BASE64.decode(salt.split(',').next().unwrap()).unwrap();
                derive(vector.hash, "pencil", &salt, 4096).unwrap()
            };
            let bare = vector.client_first_bare;
            let nonce = vector.server_first.split(',').next().unwrap();
            let header = vector.header.as_bytes();
            let server_first_at = bare.len() + 1;
            let mut stored_key = [0; Hash::LEN_MAX];
            stored_key[..vector.hash.len()].copy_from_slice(&keys.stored_key);
            let mut server_key = [0; Hash::LEN_MAX];
            server_key[..vector.hash.len()].copy_from_slice(&keys.server_key);
            // As after `challenge`, but with the specification's nonce.
            let server = Server {
                hash: vector.hash,
                real: true,
                stored_key,
                server_key,
                offered: digest::digest(vector.hash.digest(), b""),
                binding: BASE64.encode([header, vector.binding].concat()),
                auth_message: format!("{bare},{}", vector.server_first),
                nonce: server_first_at + 2..server_first_at + nonce.len(),
            };
            let answer = Box::new(server).finish(vector.client_final).unwrap();
            assert_eq!(String::from_utf8(answer).unwrap(), vector.server_final);

            // The client of the other tests is right, too.
            let mut client = Client::new(vector.hash, vector.header, "", "");
            client.set_first(&format!("{}{bare}", vector.header));
            let last = client.last(
                vector.server_first,
                vector.binding,
                "pencil",
                vector.extensions,
            );
            assert_eq!(last, vector.client_final);
            assert_eq!(client.server_final(), vector.server_final);
        }
    }

    #[test]
    fn the_offers_hash_is_that_of_the_specification() {
        let bindings = ChannelBindings {
            exporter: Some(crate::xmpp::sasl::Exporter::new(|| [0; 32])),
            server_end_point: Some([0].into()),
        };
        let mechanisms = [Mechanism::ScramSha1Plus, Mechanism::ScramSha1];
        let hash = offered(Hash::Sha1, &mechanisms, &bindings);
        assert_eq!(BASE64.encode(hash), "G6k/rBLDqgOhRRaCuuatSDFkJ08=");

        let hash = offered(
            Hash::Sha256,
            Mechanism::offered(false, true),
            &Default::default(),
        );
        let text = b"PLAIN\x1eSCRAM-SHA-1\x1eSCRAM-SHA-256";
        assert_eq!(
            hash.as_ref(),
            digest::digest(&digest::SHA256, text).as_ref()
        );
    }

    #[test]
    fn the_challenge_carries_both_nonces_the_keys_shape_and_the_offers_hash() {
        let decoy = Decoy::new(
            &[0; 32],
            &[],
            super::super::decoy::Shape {
                iterations: 10_000,
                salt_len: 16,
            },
        );
        let keys = derive(Hash::Sha1, "pencil", b"salt", 4096).unwrap();
        let account = Credentials {
            sha1: Some(keys.as_ref()),
            sha256: None,
        };
        let bindings = ChannelBindings {
            exporter: Some(crate::xmpp::sasl::Exporter::new(|| [0; 32])),
            server_end_point: Some([0].into()),
        };
        let offer = Offer {
            mechanisms: &[Mechanism::ScramSha1Plus, Mechanism::ScramSha1],
            bindings: &bindings,
            encrypted: true,
            domain: "example.com",
            certified: &[],
        };
        let (name, mut server) =
            Server::start(Hash::Sha1, false, "n,,n=user,r=abc", &offer).unwrap();
        let challenge = server.challenge(&name, Some(account), &decoy, b"123456");
        assert_eq!(
            String::from_utf8(challenge).unwrap(),
            "r=abcMTIzNDU2,s=c2FsdA==,i=4096,h=G6k/rBLDqgOhRRaCuuatSDFkJ08="
        );
    }
}
