//! PLAIN (RFC 4616). In: the one message of the client. Out: a user, and a [`PasswordCheck`] that answers yes or no.
//!
//! The check is milliseconds of PBKDF2, for a decoy too: it is owned and `Send`, to be run away from the shards.

use std::fmt;

use super::decoy::PlainKeys;
use super::{Failure, PASSWORD_BYTES_MAX, scram};

/// Splits `[authzid] NUL authcid NUL passwd` into the user's localpart and his password.
pub(super) fn parse<'m>(message: &'m str, domain: &str) -> Result<(String, &'m str), Failure> {
    let mut parts = message.split('\0');
    let (Some(authzid), Some(authcid), Some(password), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Failure::MALFORMED_REQUEST);
    };
    if authcid.is_empty() || password.is_empty() {
        return Err(Failure::MALFORMED_REQUEST);
    }
    if password.len() > PASSWORD_BYTES_MAX {
        return Err(Failure::MALFORMED_REQUEST.with_text("The password is too long"));
    }
    let username = super::username(authcid)?;
    if !authzid.is_empty() {
        super::check_authzid(authzid, &username, domain)?;
    }
    Ok((username, password))
}

/// A password and the keys that it has to produce.
pub struct PasswordCheck {
    password: Box<str>,
    keys: PlainKeys,
}

impl PasswordCheck {
    pub(super) fn new(password: Box<str>, keys: PlainKeys) -> PasswordCheck {
        PasswordCheck { password, keys }
    }

    /// The number of PBKDF2 iterations that [`PasswordCheck::run`] computes.
    pub fn iterations(&self) -> u32 {
        self.keys.iterations
    }

    /// Whether the password is right. Takes milliseconds, the same for an account and for a decoy.
    pub fn run(self) -> bool {
        let keys = &self.keys;
        let Ok(derived) = scram::derive(keys.hash, &self.password, &keys.salt, keys.iterations)
        else {
            // The password itself is of no valid form, whoever the user is.
            return false;
        };
        let same = scram::equal(&derived.stored_key, &keys.stored_key[..keys.hash.len()]);
        // Not `&&` before the comparison: a decoy does the same work.
        same & keys.real
    }
}

impl fmt::Debug for PasswordCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PasswordCheck").finish_non_exhaustive()
    }
}
