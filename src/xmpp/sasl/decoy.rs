//! What a client is told of an account that does not exist. In: a secret key, the shapes of the real accounts' keys, a name.
//! Out: an iteration count and a salt.
//!
//! The promise: for a given name they are always the same, and across names they are spread like those of the real accounts,
//! so that a challenge does not tell whether its account exists.

use aws_lc_rs::hmac;

use super::scram::{Credentials, Hash, ScramKeysRef};

/// The visible part of stored keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// Bytes of the salt.
    pub salt_len: u8,
}

/// A kind of account: which keys it has, and of which shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Profile {
    /// Keys for SCRAM-SHA-1.
    pub sha1: Option<Shape>,
    /// Keys for SCRAM-SHA-256.
    pub sha256: Option<Shape>,
    /// How many accounts are of this kind.
    pub accounts: u64,
}

/// Makes up keys for names without an account. Shards share it or own equal ones (same secret, same profiles).
///
/// The secret must outlive the process (a file in the data folder), and the profiles should change rarely: then only names at
/// the edge between two profiles change their look. It is assumed that accounts have a salt of its own for each hash.
pub struct Decoy {
    key: hmac::Key,
    /// With the running total of accounts, so that a number below the last total picks a profile.
    profiles: Vec<(u64, Profile)>,
    fallback: Shape,
}

impl Decoy {
    /// `profiles` describe the accounts at hand. `fallback` is the shape that new accounts get; it also stands for keys that an
    /// account of its kind does not have.
    pub fn new(secret: &[u8; 32], profiles: &[Profile], fallback: Shape) -> Decoy {
        let mut sorted = profiles.to_vec();
        sorted.sort_unstable();
        let mut total = 0_u64;
        let profiles = sorted
            .into_iter()
            .filter(|profile| profile.accounts > 0)
            .map(|profile| {
                total = total.saturating_add(profile.accounts);
                (total, profile)
            })
            .collect();
        Decoy {
            key: hmac::Key::new(hmac::HMAC_SHA256, secret),
            profiles,
            fallback,
        }
    }

    /// Iterations and salt for one hash. Called for existing accounts too, so that all cost the same; `exists` tells those
    /// that lack keys for this hash from names without account.
    pub(super) fn scram(&self, username: &str, hash: Hash, exists: bool) -> (u32, Salt) {
        let profile = self.profile(username);
        let shape = match hash {
            Hash::Sha1 => profile.sha1,
            Hash::Sha256 => profile.sha256,
        };
        let shape = shape.filter(|_| !exists).unwrap_or(self.fallback);
        (shape.iterations, self.salt(username, hash, shape))
    }

    /// The keys that PLAIN checks: the account's strongest, or made-up ones.
    pub(super) fn plain_keys(&self, username: &str, account: Option<Credentials<'_>>) -> PlainKeys {
        let exists = account.is_some();
        let (made_up_hash, shape) = {
            let profile = self.profile(username);
            let sha256 = profile.sha256.map(|shape| (Hash::Sha256, shape));
            let sha1 = profile.sha1.map(|shape| (Hash::Sha1, shape));
            sha256
                .or(sha1)
                .filter(|_| !exists)
                .unwrap_or((Hash::Sha256, self.fallback))
        };
        let salt = self.salt(username, made_up_hash, shape);
        let made_up = ScramKeysRef {
            iterations: shape.iterations,
            salt: salt.as_bytes(),
            stored_key: &[0; Hash::LEN_MAX][..made_up_hash.len()],
            server_key: &[],
        };
        let real = account.and_then(|account| {
            let keys = |hash| account.keys(hash).map(|keys| (hash, keys));
            keys(Hash::Sha256).or_else(|| keys(Hash::Sha1))
        });
        let (hash, keys) = real.unwrap_or((made_up_hash, made_up));
        let mut stored_key = [0; Hash::LEN_MAX];
        stored_key[..hash.len()].copy_from_slice(keys.stored_key);
        PlainKeys {
            real: real.is_some(),
            hash,
            iterations: keys.iterations,
            salt: keys.salt.into(),
            stored_key,
        }
    }

    fn profile(&self, username: &str) -> Profile {
        let number = self.digest(0, username);
        let number = u64::from_be_bytes(number[..8].try_into().expect("eight bytes"));
        let total = self.profiles.last().map_or(0, |&(total, _)| total);
        // Scaled without bias: below `total`.
        let number = ((u128::from(number) * u128::from(total)) >> 64) as u64;
        let index = self.profiles.partition_point(|&(end, _)| end <= number);
        self.profiles.get(index).map_or(
            Profile {
                sha1: Some(self.fallback),
                sha256: Some(self.fallback),
                accounts: 0,
            },
            |&(_, profile)| profile,
        )
    }

    fn salt(&self, username: &str, hash: Hash, shape: Shape) -> Salt {
        let mut salt = Salt {
            bytes: [0; 255],
            len: shape.salt_len,
        };
        let tag = match hash {
            Hash::Sha1 => 1,
            Hash::Sha256 => 128,
        };
        // At most eight blocks of 32 bytes.
        for (tag, block) in (tag..).zip(salt.bytes[..usize::from(salt.len)].chunks_mut(32)) {
            block.copy_from_slice(&self.digest(tag, username)[..block.len()]);
        }
        salt
    }

    fn digest(&self, tag: u8, username: &str) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&[tag]);
        context.update(username.as_bytes());
        let mut digest = [0; 32];
        digest.copy_from_slice(context.sign().as_ref());
        digest
    }
}

/// A made-up salt.
pub(super) struct Salt {
    bytes: [u8; 255],
    len: u8,
}

impl Salt {
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// What PLAIN compares with.
pub(super) struct PlainKeys {
    /// Whether there is such an account at all.
    pub(super) real: bool,
    pub(super) hash: Hash,
    pub(super) iterations: u32,
    pub(super) salt: Box<[u8]>,
    pub(super) stored_key: [u8; Hash::LEN_MAX],
}
