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

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(iterations: u32, salt_len: u8) -> Option<Shape> {
        Some(Shape {
            iterations,
            salt_len,
        })
    }

    const FALLBACK: Shape = Shape {
        iterations: 10_000,
        salt_len: 16,
    };

    fn mixed() -> Decoy {
        let profile = |sha1, sha256, accounts| Profile {
            sha1,
            sha256,
            accounts,
        };
        Decoy::new(
            &[3; 32],
            &[
                profile(shape(10_000, 16), shape(10_000, 16), 700),
                profile(shape(4096, 12), None, 300),
                profile(shape(1, 1), shape(1, 1), 0),
            ],
            FALLBACK,
        )
    }

    #[test]
    fn made_up_shapes_are_spread_like_the_real_ones() {
        let decoy = mixed();
        let mut imported = 0;
        for i in 0..10_000 {
            let name = format!("user{i}");
            let (iterations, salt) = decoy.scram(&name, Hash::Sha1, false);
            let sha256 = decoy.scram(&name, Hash::Sha256, false);
            match (iterations, salt.as_bytes().len()) {
                (10_000, 16) => {}
                (4096, 12) => imported += 1,
                other => panic!("{other:?}"),
            }
            // An imported account has no such keys, and would be answered with the fallback.
            assert_eq!((sha256.0, sha256.1.as_bytes().len()), (10_000, 16));
        }
        assert!((2_800..3_200).contains(&imported), "{imported}");
    }

    #[test]
    fn a_salt_depends_on_secret_name_and_hash_and_on_nothing_else() {
        let decoy = mixed();
        let salt = |decoy: &Decoy, name, hash| {
            let shape = Shape {
                iterations: 1,
                salt_len: 255,
            };
            decoy.salt(name, hash, shape).as_bytes().to_vec()
        };
        let base = salt(&decoy, "a", Hash::Sha1);
        assert_eq!(base.len(), 255);
        assert_eq!(base, salt(&mixed(), "a", Hash::Sha1));
        assert_ne!(base, salt(&decoy, "b", Hash::Sha1));
        assert_ne!(base, salt(&decoy, "a", Hash::Sha256));
        let other = Decoy::new(&[4; 32], &[], FALLBACK);
        assert_ne!(base, salt(&other, "a", Hash::Sha1));
    }

    #[test]
    fn an_account_without_keys_gets_the_fallback_as_a_stranger_of_its_kind_does() {
        let decoy = mixed();
        for name in ["a", "b", "c", "d", "e", "f"] {
            let (iterations, salt) = decoy.scram(name, Hash::Sha256, true);
            assert_eq!((iterations, salt.as_bytes().len()), (10_000, 16));
        }
    }

    #[test]
    fn plain_computes_as_long_for_a_stranger_as_for_an_account_of_his_kind() {
        let decoy = mixed();
        let mut seen = std::collections::BTreeSet::new();
        for i in 0..100 {
            let keys = decoy.plain_keys(&format!("user{i}"), None);
            assert!(!keys.real);
            seen.insert((keys.hash.len(), keys.iterations, keys.salt.len()));
        }
        let seen: Vec<_> = seen.into_iter().collect();
        assert_eq!(seen, [(20, 4096, 12), (32, 10_000, 16)]);
    }
}
