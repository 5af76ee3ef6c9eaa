//! Hashed tokens (HT-SHA-256-*, draft-schmaus-kitten-sasl-ht): one message there, one back. In: the client's message and the
//! token that it may have. Out: the server's proof that it knows the token too.
//!
//! The token itself never goes over the wire after it was given, and what goes is bound to the TLS channel where the mechanism
//! says so. HT-SHA-256-UNIQ is not offered: tls-unique is not defined for TLS 1.3 (RFC 8446, C.5).

use std::fmt;

use aws_lc_rs::hmac;

use super::binding::{TLS_EXPORTER, TLS_SERVER_END_POINT};
use super::{ChannelBindings, Failure, MESSAGE_BYTES_MAX};

/// What a token's use is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Ht {
    /// RFC 9266.
    Exporter = 1,
    /// RFC 5929.
    EndPoint = 2,
    /// Nothing: for clients that cannot see the channel (web pages).
    None = 3,
}

impl Ht {
    /// The strongest first.
    pub const ALL: [Ht; 3] = [Ht::Exporter, Ht::EndPoint, Ht::None];

    pub fn name(self) -> &'static str {
        match self {
            Ht::Exporter => "HT-SHA-256-EXPR",
            Ht::EndPoint => "HT-SHA-256-ENDP",
            Ht::None => "HT-SHA-256-NONE",
        }
    }

    pub fn from_name(name: &str) -> Option<Ht> {
        Ht::ALL.into_iter().find(|ht| ht.name() == name)
    }

    /// Whether there is on this stream what it binds to.
    pub fn can_bind(self, bindings: &ChannelBindings) -> bool {
        match self {
            Ht::Exporter => bindings.has(TLS_EXPORTER),
            Ht::EndPoint => bindings.has(TLS_SERVER_END_POINT),
            Ht::None => true,
        }
    }

    /// What it binds to on this stream; `None`: it cannot be used here.
    fn binding(self, bindings: &ChannelBindings) -> Option<&[u8]> {
        match self {
            Ht::Exporter => bindings.get(TLS_EXPORTER),
            Ht::EndPoint => bindings.get(TLS_SERVER_END_POINT),
            Ht::None => Some(&[]),
        }
    }
}

/// A client's attempt; the account's tokens are to come. It is `Send`, so that it moves to the user's owner.
pub struct Attempt {
    pub ht: Ht,
    /// Localpart, normalised.
    pub username: String,
    hash: [u8; 32],
    binding: Box<[u8]>,
}

impl Attempt {
    /// Takes the client's message: user, NUL, HMAC(token, "Initiator" and the channel binding).
    pub fn start(ht: Ht, message: &[u8], bindings: &ChannelBindings) -> Result<Attempt, Failure> {
        let malformed = Failure::MALFORMED_REQUEST;
        let binding = ht.binding(bindings).ok_or(Failure::INVALID_MECHANISM)?;
        if message.len() > MESSAGE_BYTES_MAX {
            return Err(malformed);
        }
        let at = message.iter().position(|byte| *byte == 0);
        let (name, hash) = message.split_at(at.ok_or(malformed)?);
        let name = std::str::from_utf8(name).map_err(|_| malformed)?;
        Ok(Attempt {
            ht,
            username: super::username(name)?,
            hash: hash[1..].try_into().map_err(|_| malformed)?,
            binding: binding.into(),
        })
    }

    /// The server's proof, if the client has this token.
    pub fn check(&self, token: &str) -> Option<Vec<u8>> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
        let sign = |who: &[u8]| {
            let mut context = hmac::Context::with_key(&key);
            context.update(who);
            context.update(&self.binding);
            context.sign()
        };
        super::scram::equal(sign(b"Initiator").as_ref(), &self.hash)
            .then(|| sign(b"Responder").as_ref().to_vec())
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(token: &str, binding: &[u8]) -> Vec<u8> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
        let hash = hmac::sign(&key, &[b"Initiator", binding].concat());
        [b"alice\0", hash.as_ref()].concat()
    }

    fn bindings() -> ChannelBindings {
        ChannelBindings {
            exporter: Some(crate::xmpp::sasl::Exporter::new(|| [7; 32])),
            server_end_point: Some([9; 48].into()),
        }
    }

    #[test]
    fn only_the_token_passes_and_only_on_the_channel_that_the_client_saw() {
        let bound: [(Ht, &[u8]); 3] = [
            (Ht::Exporter, &[7; 32]),
            (Ht::EndPoint, &[9; 48]),
            (Ht::None, &[]),
        ];
        for (ht, binding) in bound {
            let start = |message: &[u8]| Attempt::start(ht, message, &bindings()).unwrap();
            let attempt = start(&message("token", binding));
            assert_eq!(attempt.username, "alice");
            let key = hmac::Key::new(hmac::HMAC_SHA256, b"token");
            let proof = hmac::sign(&key, &[b"Responder", binding].concat());
            assert_eq!(attempt.check("token").unwrap(), proof.as_ref());
            assert!(attempt.check("other").is_none());
            assert!(
                start(&message("token", b"elsewhere"))
                    .check("token")
                    .is_none()
            );
            assert_eq!(Ht::from_name(ht.name()), Some(ht));
        }
        let none = ChannelBindings::default();
        for ht in [Ht::Exporter, Ht::EndPoint] {
            let refused = Attempt::start(ht, &message("token", b""), &none).unwrap_err();
            assert_eq!(refused, Failure::INVALID_MECHANISM);
        }
    }

    proptest! {
        #[test]
        fn any_message_is_taken_or_refused_and_never_passes(message: Vec<u8>) {
            if let Ok(attempt) = Attempt::start(Ht::None, &message, &bindings()) {
                prop_assert!(attempt.check("token").is_none());
            }
        }
    }
}
