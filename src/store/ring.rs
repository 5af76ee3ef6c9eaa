//! Placement by consistent hashing: users to shards, and keys to Redis instances.
//!
//! In: the members with their weights, once. Out: for each key the index of the member that owns it. Promises: the
//! same members (in the same order, on any machine and in any release) give the same owners; the fullest of up to 16
//! equal members holds at most 5 % more than the mean of 100,000 keys; adding one member to n moves at most
//! 1/(n+1) + 2 % of the keys. A lookup is one hash and one read from a table.
//!
//! Each member stands on the ring at many points (virtual nodes), and a key belongs to the next point. Chance alone
//! leaves shares 1-2 % apart, so the ring is cut into [`SLOTS`] equal slots and a slot whose next point belongs to a
//! member that has its share goes on to the next one ("consistent hashing with bounded loads").

use std::hash::Hasher;

/// Slots of the ring; two bytes each, so that the table stays in a core's second-level cache.
pub const SLOTS: usize = 1 << SLOT_BITS;
const SLOT_BITS: u32 = 17;

/// Points on the ring for each unit of weight. They do not depend on the other members: if a heavier one took points
/// from the others, their keys would move as well.
const POINTS: u64 = 16_384;

/// Beyond this weight all have fewer points for each unit, to keep their number in bounds.
pub const WEIGHT_PLAIN_MAX: u32 = 16;

/// How much of its fair share a member may hold at most, in 1/1000.
const LOAD_MAX_PERMILLE: u64 = 1_002;

/// See the module's page.
#[derive(Clone)]
pub struct Ring {
    slots: std::sync::Arc<[u16]>,
    members: usize,
}

impl Ring {
    /// `members` are (name, weight); names must differ and stay what they are, since they decide the placement. A
    /// member of weight 0 owns nothing.
    ///
    /// # Panics
    /// Without any member of positive weight, or with more than 65,535 members: the configuration must refuse both.
    pub fn new(members: &[(String, u32)]) -> Ring {
        let total: u64 = members.iter().map(|(_, weight)| u64::from(*weight)).sum();
        assert!(total > 0, "a ring needs a member of positive weight");
        assert!(
            members.len() <= usize::from(u16::MAX),
            "a ring has at most 65,535 members"
        );
        let points = points(members);
        let mut room: Vec<u64> = members
            .iter()
            .map(|(_, weight)| {
                (SLOTS as u64 * u64::from(*weight) * LOAD_MAX_PERMILLE).div_ceil(total * 1000)
            })
            .collect();
        let mut next = 0;
        let slots = (0..SLOTS as u64)
            .map(|slot| {
                let start = slot << (64 - SLOT_BITS);
                while next < points.len() && points[next].0 < start {
                    next += 1;
                }
                // The sum of all room is at least SLOTS, so this ends within one turn of the ring.
                let owner = (next..next + points.len())
                    .map(|at| points[at % points.len()].1)
                    .find(|owner| room[usize::from(*owner)] > 0)
                    .expect("all room together is never less than the slots");
                room[usize::from(owner)] -= 1;
                owner
            })
            .collect();
        Ring {
            slots,
            members: members.len(),
        }
    }

    /// A ring of `count` equal members named by their number: the shards of a blade.
    pub fn of_shards(count: usize) -> Ring {
        let members: Vec<_> = (0..count).map(|shard| (shard.to_string(), 1)).collect();
        Ring::new(&members)
    }

    /// Index of the member that owns `key`.
    #[inline]
    pub fn owner(&self, key: &str) -> usize {
        self.slot_owner(Ring::slot(key))
    }

    /// In which of [`SLOTS`] a key lies, whoever the members are.
    #[inline]
    pub fn slot(key: &str) -> usize {
        (hash(key) >> (64 - SLOT_BITS)) as usize
    }

    /// Index of the member that owns a slot.
    #[inline]
    pub fn slot_owner(&self, slot: usize) -> usize {
        usize::from(self.slots[slot])
    }

    /// How many members the ring was made of.
    pub fn members(&self) -> usize {
        self.members
    }
}

/// FNV-1a, then murmur3's finalizer: FNV alone leaves the high bits of short keys almost equal.
#[inline]
pub fn hash(key: &str) -> u64 {
    let mut fnv = fnv::FnvHasher::default();
    fnv.write(key.as_bytes());
    mix(fnv.finish())
}

/// murmur3's fmix64.
#[inline]
fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// All virtual nodes as (position, member), in order of position.
fn points(members: &[(String, u32)]) -> Vec<(u64, u16)> {
    let heaviest = members
        .iter()
        .map(|(_, weight)| u64::from(*weight))
        .max()
        .unwrap_or(1);
    let scale = heaviest
        .div_ceil(u64::from(WEIGHT_PLAIN_MAX))
        .next_power_of_two();
    let mut points = Vec::new();
    for (index, (name, weight)) in members.iter().enumerate() {
        let seed = hash(name);
        let count = (POINTS * u64::from(*weight)).div_ceil(scale);
        // Point n of a member does not depend on how many it has or who else is there: that makes it consistent.
        points.extend((1..=count).map(|n| {
            (
                mix(seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))),
                index as u16,
            )
        }));
    }
    points.sort_unstable();
    points
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(prefix: &str, count: usize) -> Vec<(String, u32)> {
        (0..count).map(|n| (format!("{prefix}{n}"), 1)).collect()
    }

    fn names() -> impl Iterator<Item = String> {
        (0..100_000).map(|n| match n % 4 {
            0 => format!("u{n}"),
            1 => format!("trader{n:06}"),
            2 => format!("{n:x}.desk"),
            _ => format!("first.last{n}"),
        })
    }

    #[test]
    fn the_fullest_member_holds_at_most_five_percent_more_than_the_mean() {
        for prefix in ["", "shard-", "redis://10.0.0.7:"] {
            for count in [1, 2, 5, 11, 16] {
                let ring = Ring::new(&members(prefix, count));
                let mut held = vec![0u32; count];
                names().for_each(|name| held[ring.owner(&name)] += 1);
                let fullest = *held.iter().max().unwrap() as f64 * count as f64 / 100_000.0;
                assert!(
                    fullest <= 1.05,
                    "{prefix}: {count} members, fullest has {fullest:.3} of the mean"
                );
            }
        }
    }

    #[test]
    fn a_new_member_moves_little_more_than_its_own_share() {
        for prefix in ["", "redis-"] {
            for count in [1, 2, 3, 7, 16] {
                let (before, after) = (
                    Ring::new(&members(prefix, count)),
                    Ring::new(&members(prefix, count + 1)),
                );
                let moved = names()
                    .filter(|name| before.owner(name) != after.owner(name))
                    .count();
                let bound = 1.0 / (count + 1) as f64 + 0.02;
                assert!(
                    moved as f64 / 100_000.0 <= bound,
                    "{count}+1 members: {moved} of 100,000 moved"
                );
            }
        }
    }

    #[test]
    fn weights_are_kept() {
        let ring = Ring::new(&[
            ("a".into(), 1),
            ("b".into(), 3),
            ("c".into(), 0),
            ("d".into(), 4),
        ]);
        let mut held = [0u32; 4];
        names().for_each(|name| held[ring.owner(&name)] += 1);
        for (got, want) in held.into_iter().zip([12_500.0, 37_500.0, 0.0, 50_000.0]) {
            assert!((f64::from(got) - want).abs() <= want * 0.04, "{held:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]

        #[test]
        fn whatever_the_weights_shares_are_kept_and_little_moves(
            weights in proptest::collection::vec(1u32..=4, 1..9), newcomer in 1u32..=4, seed in any::<u32>(),
        ) {
            let mut members: Vec<_> = weights.iter().enumerate()
                .map(|(n, weight)| (format!("redis://{seed:x}.{n}"), *weight))
                .collect();
            let before = Ring::new(&members);
            let total: u32 = weights.iter().sum();
            let mut held = vec![0u32; members.len()];
            names().for_each(|name| held[before.owner(&name)] += 1);
            for (held, weight) in held.iter().zip(&weights) {
                let share = f64::from(*held) / 100_000.0 * f64::from(total) / f64::from(*weight);
                prop_assert!(share <= 1.05, "{:?} have {:?}", weights, held);
            }
            members.push(("redis://new".into(), newcomer));
            let after = Ring::new(&members);
            let moved = names().filter(|name| before.owner(name) != after.owner(name)).count();
            let bound = f64::from(newcomer) / f64::from(total + newcomer) + 0.02;
            prop_assert!(moved as f64 / 100_000.0 <= bound, "{} of 100,000 moved", moved);
        }
    }

    #[test]
    fn owners_are_the_same_in_every_release() {
        // Blades of two releases share one ring: a change of these figures splits a cluster.
        let ring = Ring::of_shards(16);
        let owners: Vec<_> = ["romeo", "juliet", "a", "b", "trader000001"]
            .map(|name| ring.owner(name))
            .into();
        assert_eq!(hash("romeo"), 6_675_334_913_285_510_461);
        assert_eq!(owners, [9, 11, 4, 0, 15]);
    }

    #[test]
    #[should_panic(expected = "positive weight")]
    fn a_ring_without_members_is_refused() {
        Ring::new(&[]);
    }
}
