//! The client's side of SCRAM-SHA-1, SCRAM-SHA-256 and SCRAM-SHA-512 (RFC 5802, RFC 7677), without channel binding or
//! (-PLUS) with that of the TLS exporter (RFC 9266).
//!
//! In: the server's messages. Out: ours. The expensive part, the salted password, is kept in a [`KeyCache`], so that a login
//! whose salt is known costs a few HMACs: a generator that derived keys while it measures would measure itself.

use aws_lc_rs::{digest, hmac, pbkdf2, rand};
use base64::prelude::{BASE64_STANDARD, Engine};
use std::num::NonZeroU32;

/// More would let a hostile server stall the generator.
const ITERATIONS_MAX: u32 = 10_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    Sha1,
    Sha256,
    Sha512,
}

/// How the server is told of channel binding (RFC 5802, section 6).
const UNBOUND: &str = "n,,";
const BOUND: &str = "p=tls-exporter,,";

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("the server's SCRAM challenge is malformed")]
    Malformed,
    #[error("the server's SCRAM nonce does not begin with ours")]
    Nonce,
    #[error("the server asks for {0} iterations, more than {ITERATIONS_MAX}")]
    Iterations(u32),
    #[error("the server's SCRAM signature is wrong")]
    ServerSignature,
    #[error("the server refused with SCRAM error {0}")]
    Refused(String),
}

impl Hash {
    fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha-1",
            Hash::Sha256 => "sha-256",
            Hash::Sha512 => "sha-512",
        }
    }

    fn hmac(self) -> hmac::Algorithm {
        match self {
            Hash::Sha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
            Hash::Sha256 => hmac::HMAC_SHA256,
            Hash::Sha512 => hmac::HMAC_SHA512,
        }
    }

    fn digest(self) -> &'static digest::Algorithm {
        match self {
            Hash::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Hash::Sha256 => &digest::SHA256,
            Hash::Sha512 => &digest::SHA512,
        }
    }

    fn pbkdf2(self) -> pbkdf2::Algorithm {
        match self {
            Hash::Sha1 => pbkdf2::PBKDF2_HMAC_SHA1,
            Hash::Sha256 => pbkdf2::PBKDF2_HMAC_SHA256,
            Hash::Sha512 => pbkdf2::PBKDF2_HMAC_SHA512,
        }
    }
}

/// What a password becomes with one salt and iteration count.
struct Keys {
    hash: Hash,
    salt: Vec<u8>,
    iterations: u32,
    salted: Vec<u8>,
    client: hmac::Tag,
    stored: hmac::Key,
    server: hmac::Key,
}

impl Keys {
    /// Costs PBKDF2: milliseconds.
    fn derive(hash: Hash, password: &str, salt: &[u8], iterations: NonZeroU32) -> Keys {
        let mut salted = vec![0; hash.digest().output_len()];
        pbkdf2::derive(
            hash.pbkdf2(),
            iterations,
            salt,
            password.as_bytes(),
            &mut salted,
        );
        Keys::from_salted(hash, salted, salt, iterations.get())
    }

    fn from_salted(hash: Hash, salted: Vec<u8>, salt: &[u8], iterations: u32) -> Keys {
        let key = hmac::Key::new(hash.hmac(), &salted);
        let client = hmac::sign(&key, b"Client Key");
        let stored = digest::digest(hash.digest(), client.as_ref());
        let server = hmac::sign(&key, b"Server Key");
        Keys {
            hash,
            salt: salt.to_vec(),
            iterations,
            salted,
            client,
            stored: hmac::Key::new(hash.hmac(), stored.as_ref()),
            server: hmac::Key::new(hash.hmac(), server.as_ref()),
        }
    }

    fn fit(&self, hash: Hash, salt: &[u8], iterations: u32) -> bool {
        self.hash == hash && self.iterations == iterations && self.salt == salt
    }
}

/// The keys of one user, and how often they had to be derived.
#[derive(Default)]
pub struct KeyCache {
    keys: Option<Keys>,
    pub derivations: u64,
}

impl KeyCache {
    /// A line for [`KeyCache::from_line`]: hash, iterations, salt and salted password.
    pub fn to_line(&self) -> Option<String> {
        let keys = self.keys.as_ref()?;
        let (salt, salted) = (
            BASE64_STANDARD.encode(&keys.salt),
            BASE64_STANDARD.encode(&keys.salted),
        );
        let hash = keys.hash.name();
        Some(format!("{hash} {} {salt} {salted}", keys.iterations))
    }

    /// `None`: not a line of [`KeyCache::to_line`].
    pub fn from_line(line: &str) -> Option<KeyCache> {
        let mut fields = line.split(' ');
        let hash = fields.next()?;
        let hash = [Hash::Sha1, Hash::Sha256, Hash::Sha512]
            .into_iter()
            .find(|known| known.name() == hash)?;
        let iterations = fields.next()?.parse().ok()?;
        let salt = BASE64_STANDARD.decode(fields.next()?).ok()?;
        let salted = BASE64_STANDARD.decode(fields.next()?).ok()?;
        let length_is_right = salted.len() == hash.digest().output_len();
        (length_is_right && fields.next().is_none()).then(|| KeyCache {
            keys: Some(Keys::from_salted(hash, salted, &salt, iterations)),
            derivations: 0,
        })
    }

    fn get(&mut self, hash: Hash, password: &str, salt: &[u8], iterations: NonZeroU32) -> &Keys {
        if !self
            .keys
            .as_ref()
            .is_some_and(|keys| keys.fit(hash, salt, iterations.get()))
        {
            self.derivations += 1;
            self.keys = None;
        }
        self.keys
            .get_or_insert_with(|| Keys::derive(hash, password, salt, iterations))
    }
}

/// One authentication in progress.
pub struct Exchange {
    hash: Hash,
    nonce: String,
    first_bare: String,
    gs2_header: &'static str,
    /// The header and the data of the channel.
    channel: Vec<u8>,
    server_signature: Option<hmac::Tag>,
}

impl Exchange {
    /// `exporter`: what the TLS connection exports for channel binding; `None`: without.
    pub fn new(hash: Hash, username: &str, exporter: Option<&[u8]>) -> Exchange {
        let mut nonce = [0; 18];
        rand::fill(&mut nonce).expect("the system gives random bytes");
        Exchange::with_nonce(hash, username, BASE64_STANDARD.encode(nonce), exporter)
    }

    fn with_nonce(hash: Hash, username: &str, nonce: String, exporter: Option<&[u8]>) -> Exchange {
        let username = username.replace('=', "=3D").replace(',', "=2C");
        let first_bare = format!("n={username},r={nonce}");
        let gs2_header = if exporter.is_some() { BOUND } else { UNBOUND };
        Exchange {
            hash,
            nonce,
            first_bare,
            gs2_header,
            channel: [gs2_header.as_bytes(), exporter.unwrap_or_default()].concat(),
            server_signature: None,
        }
    }

    pub fn client_first(&self) -> String {
        format!("{}{}", self.gs2_header, self.first_bare)
    }

    /// Answers the challenge. The cached keys are used when they fit the challenge's salt.
    pub fn client_final(
        &mut self,
        server_first: &str,
        password: &str,
        cache: &mut KeyCache,
    ) -> Result<String, Error> {
        let field = |wanted: &str| {
            server_first
                .split(',')
                .find_map(|part| part.strip_prefix(wanted))
        };
        if let Some(error) = field("e=") {
            return Err(Error::Refused(error.to_owned()));
        }
        let nonce = field("r=").ok_or(Error::Malformed)?;
        let salt = field("s=")
            .and_then(|salt| BASE64_STANDARD.decode(salt).ok())
            .ok_or(Error::Malformed)?;
        let iterations: NonZeroU32 = field("i=")
            .and_then(|iterations| iterations.parse().ok())
            .ok_or(Error::Malformed)?;
        if !nonce.starts_with(&self.nonce) {
            return Err(Error::Nonce);
        }
        if iterations.get() > ITERATIONS_MAX {
            return Err(Error::Iterations(iterations.get()));
        }
        let keys = cache.get(self.hash, password, &salt, iterations);
        let channel = BASE64_STANDARD.encode(&self.channel);
        let without_proof = format!("c={channel},r={nonce}");
        let message = format!("{},{server_first},{without_proof}", self.first_bare);
        let signature = hmac::sign(&keys.stored, message.as_bytes());
        let proof: Vec<u8> = keys
            .client
            .as_ref()
            .iter()
            .zip(signature.as_ref())
            .map(|(key, sign)| key ^ sign)
            .collect();
        self.server_signature = Some(hmac::sign(&keys.server, message.as_bytes()));
        Ok(format!(
            "{without_proof},p={}",
            BASE64_STANDARD.encode(proof)
        ))
    }

    /// Checks that the server knows the password too.
    pub fn verify(&self, server_final: &str) -> Result<(), Error> {
        if let Some(error) = server_final.strip_prefix("e=") {
            return Err(Error::Refused(error.to_owned()));
        }
        let signature = server_final
            .split(',')
            .find_map(|part| part.strip_prefix("v="))
            .ok_or(Error::Malformed)?;
        let signature = BASE64_STANDARD
            .decode(signature)
            .map_err(|_| Error::Malformed)?;
        match &self.server_signature {
            Some(expected) if expected.as_ref() == signature => Ok(()),
            _ => Err(Error::ServerSignature),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(hash: Hash, nonce: &str) -> Exchange {
        Exchange::with_nonce(hash, "user", nonce.to_owned(), None)
    }

    #[test]
    fn sha1_matches_rfc_5802_section_5() {
        let mut exchange = exchange(Hash::Sha1, "fyko+d2lbbFgONRv9qkxdawL");
        assert_eq!(
            exchange.client_first(),
            "n,,n=user,r=fyko+d2lbbFgONRv9qkxdawL"
        );
        let server_first = "r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096";
        let answer = exchange
            .client_final(server_first, "pencil", &mut KeyCache::default())
            .unwrap();
        assert_eq!(
            answer,
            "c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts="
        );
        assert_eq!(exchange.verify("v=rmF9pqV8S7suAoZWja4dJRkFsKQ="), Ok(()));
        assert_eq!(
            exchange.verify("v=rmF9pqV8S7suAoZWja4dJRkFsKR="),
            Err(Error::Malformed)
        );
        assert_eq!(
            exchange.verify("v=rmF9pqV8S7suAoZWja4dJRkFsKU="),
            Err(Error::ServerSignature)
        );
        assert_eq!(
            exchange.verify("e=invalid-proof"),
            Err(Error::Refused("invalid-proof".into()))
        );
    }

    #[test]
    fn sha256_matches_rfc_7677_section_3() {
        let mut exchange = exchange(Hash::Sha256, "rOprNGfwEbeRWgbNEkqO");
        let server_first = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let answer = exchange
            .client_final(server_first, "pencil", &mut KeyCache::default())
            .unwrap();
        assert_eq!(
            answer,
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
             p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        assert_eq!(
            exchange.verify("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="),
            Ok(())
        );
    }

    #[test]
    fn a_bound_channel_is_part_of_what_is_proved() {
        let answer = |exporter: Option<&[u8]>| {
            let mut exchange = Exchange::with_nonce(Hash::Sha512, "u", "n".into(), exporter);
            let first = exchange.client_first();
            let last = exchange.client_final("r=nx,s=QQ==,i=1", "p", &mut KeyCache::default());
            (first, last.unwrap())
        };
        let ((first, bound), (_, other), (_, unbound)) =
            (answer(Some(b"abc")), answer(Some(b"abd")), answer(None));
        assert_eq!(first, "p=tls-exporter,,n=u,r=n");
        assert!(
            bound.starts_with("c=cD10bHMtZXhwb3J0ZXIsLGFiYw==,r=nx,p="),
            "{bound}"
        );
        assert!(unbound.starts_with("c=biws,r=nx,p="));
        let proof = |answer: &str| answer.rsplit_once("p=").unwrap().1.to_owned();
        assert_ne!(proof(&bound), proof(&other));
        assert_ne!(proof(&bound), proof(&unbound));
    }

    #[test]
    fn keys_are_kept_while_the_salt_stays() {
        let mut cache = KeyCache::default();
        let mut derivations_after = |challenge: &str| {
            exchange(Hash::Sha1, "a")
                .client_final(challenge, "pencil", &mut cache)
                .unwrap();
            cache.derivations
        };
        assert_eq!(derivations_after("r=ab,s=QQ==,i=10"), 1);
        assert_eq!(derivations_after("r=ac,s=QQ==,i=10"), 1);
        assert_eq!(derivations_after("r=ac,s=Qg==,i=10"), 2);
        assert_eq!(derivations_after("r=ac,s=Qg==,i=11"), 3);
    }

    #[test]
    fn bad_challenges_are_refused() {
        let answer = |challenge: &str| {
            exchange(Hash::Sha1, "abc").client_final(challenge, "p", &mut KeyCache::default())
        };
        assert_eq!(answer("r=abd,s=QQ==,i=1"), Err(Error::Nonce));
        assert_eq!(answer("r=abcd,s=QQ==,i=0"), Err(Error::Malformed));
        assert_eq!(answer("r=abcd,s=!,i=1"), Err(Error::Malformed));
        assert_eq!(
            answer("r=abcd,s=QQ==,i=4294967295"),
            Err(Error::Iterations(u32::MAX))
        );
        assert_eq!(answer(""), Err(Error::Malformed));
    }

    #[test]
    fn a_name_with_comma_or_equals_sign_is_escaped() {
        assert_eq!(
            Exchange::with_nonce(Hash::Sha1, "a,b=c", "n".into(), None).client_first(),
            "n,,n=a=2Cb=3Dc,r=n"
        );
    }

    #[test]
    fn keys_outlive_a_run() {
        let mut cache = KeyCache::default();
        assert_eq!(cache.to_line(), None);
        let four = NonZeroU32::new(4).unwrap();
        cache.get(Hash::Sha256, "pencil", b"salt", four);
        let line = cache.to_line().unwrap();
        let mut read = KeyCache::from_line(&line).unwrap();
        let (own, other) = (
            cache.get(Hash::Sha256, "pencil", b"salt", four).client,
            read.get(Hash::Sha256, "pencil", b"salt", four).client,
        );
        assert_eq!(own.as_ref(), other.as_ref());
        assert_eq!((cache.derivations, read.derivations), (1, 0));
        read.get(Hash::Sha256, "pencil", b"other salt", four);
        assert_eq!(read.derivations, 1);
        for bad in ["", "sha-1 4 c2FsdA== c2hvcnQ=", "md5 4 a b", &line[1..]] {
            assert!(KeyCache::from_line(bad).is_none(), "{bad}");
        }
    }
}
