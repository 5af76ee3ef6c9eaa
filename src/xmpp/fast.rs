//! Tokens instead of passwords (XEP-0484): a client that has authenticated once gets a token for its installation, and comes in
//! with it in one round trip, without the work of SCRAM. In: the account's record, what the client wants. Out: whether its
//! token is one, and the change of the record, if there must be one.
//!
//! **At rest.** The mechanism needs the token itself, not a hash of it. So nothing is stored from which a token could be made
//! without the server's secret: a record holds a random salt for each token, and the token is
//! HMAC(key, account, its password's keys, installation, mechanism, salt), where the key comes from the file `secret` in the
//! data folder. Who has stolen the database, a journal or what Redis holds has no token; who has stolen the whole data folder
//! (or a backup of it, which holds the secret) has, until the password or the secret is changed. Because the password's keys
//! go in, every change of the password ends all tokens, whichever way it came; because the account's creation does, none
//! outlives its account. Who logs in by certificate gets none, because it would outlive that ([`super::sasl::external`]). A log-in that was under way meanwhile gets none: its proof held for what the account was before
//! ([`account`]).
//!
//! **How seldom something is written.** A token is written once, journalled before `<success/>` gives it away; logging in with
//! it changes nothing. It is replaced when between a third and two thirds of its life are over, at a moment that its salt
//! decides, so that those who got theirs in one storm do not get new ones in another. The old one is valid until the new one
//! was used: that is the second and last write.
//!
//! **Replay.** The `count` must be a number where it is there, and is not remembered: it protects from the replay of TLS early
//! data (0-RTT), and nitro takes none. Remembering it durably would be a write for each login, and forgetting it with a crash
//! would make early data unsafe.

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::hmac;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use super::feature::time::stamp;
use super::push;
use super::sasl::token::{Attempt, Ht};
use super::sasl::{ChannelBindings, Failure};
use crate::store::record::{ArchivedScramKeys, ArchivedUserRecord, Token, UserRecord};
use crate::xml::dom::Element;

pub const NS: &str = "urn:xmpp:fast:0";

/// How tokens are given.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Seconds that a token is valid; 0: none are given or taken.
    pub life_seconds: u64,
    /// Of one account; of more the oldest go.
    pub tokens_max: usize,
}

/// What an `<authenticate/>` says of tokens.
#[derive(Debug, Default)]
pub struct Wishes {
    /// `<request-token/>` with a mechanism of ours.
    pub request: Option<Ht>,
    /// `<fast/>`: it authenticates with one.
    pub fast: bool,
    pub invalidate: bool,
    /// The salt of the one that it has used, when that was right.
    pub used: Option<[u8; 16]>,
}

impl Wishes {
    pub fn read(authenticate: &Element) -> Result<Wishes, Failure> {
        let request = authenticate.find("request-token", NS);
        let fast = authenticate.find("fast", NS);
        let is_number = |count: &str| count.parse::<u32>().is_ok();
        if fast
            .and_then(|fast| fast.get("count"))
            .is_some_and(|count| !is_number(count))
        {
            return Err(Failure::MALFORMED_REQUEST.with_text("count is no number"));
        }
        Ok(Wishes {
            request: request
                .and_then(|request| request.get("mechanism"))
                .and_then(Ht::from_name),
            fast: fast.is_some(),
            invalidate: fast.is_some_and(|f| matches!(f.get("invalidate"), Some("true" | "1"))),
            used: None,
        })
    }

    /// Is there anything to look at in the account's tokens?
    pub fn is_any(&self) -> bool {
        self.request.is_some() || self.used.is_some()
    }
}

/// The feature inside `<inline/>`. `unbound`: with the mechanism that binds to no channel.
pub fn write_feature(bindings: &ChannelBindings, unbound: bool, out: &mut String) {
    push(out, &["<fast xmlns='", NS, "'>"]);
    for ht in Ht::ALL {
        if ht.can_bind(bindings) && (unbound || ht != Ht::None) {
            push(out, &["<mechanism>", ht.name(), "</mechanism>"]);
        }
    }
    out.push_str("</fast>");
}

/// An installation's id, as it is kept.
fn installation(agent: &str) -> [u8; 16] {
    let hash = digest(&SHA256, agent.as_bytes());
    hash.as_ref()[..16].try_into().expect("it has 32 bytes")
}

/// What a proof holds for: an account, from its creation on, with its password. It changes when the account is made anew or
/// gets another password.
pub type Account = [u8; 32];

/// The account that a proof is checked against.
pub fn account(record: &ArchivedUserRecord) -> Account {
    let mut context = aws_lc_rs::digest::Context::new(&SHA256);
    for part in [
        &record.created_at.to_native().to_le_bytes()[..],
        keys(record.sha1.as_ref()),
        keys(record.sha256.as_ref()),
    ] {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    let hash = context.finish();
    hash.as_ref().try_into().expect("it has 32 bytes")
}

fn keys(keys: Option<&ArchivedScramKeys>) -> &[u8] {
    keys.map_or(&[], |keys| &keys.stored_key)
}

/// The token that belongs to a salt.
fn token(
    key: &[u8; 32],
    name: &str,
    record: &ArchivedUserRecord,
    agent: &str,
    ht: u8,
    salt: &[u8; 16],
) -> String {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    let parts: [&[u8]; 8] = [
        b"token",
        name.as_bytes(),
        agent.as_bytes(),
        &[ht],
        salt,
        &record.created_at.to_native().to_le_bytes(),
        keys(record.sha1.as_ref()),
        keys(record.sha256.as_ref()),
    ];
    for part in parts {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    BASE64_URL_SAFE_NO_PAD.encode(context.sign())
}

/// Is it a token of this account and installation? Its salt and the server's proof.
pub fn check(
    attempt: &Attempt,
    record: Option<&ArchivedUserRecord>,
    agent: &str,
    key: &[u8; 32],
    unix: u64,
) -> Result<([u8; 16], Vec<u8>), Failure> {
    let Some(record) = record else {
        return Err(Failure::NOT_AUTHORIZED);
    };
    let this = installation(agent);
    let mut expired = false;
    // at most two are of one installation
    for one in record.tokens.iter().rev() {
        if one.agent != this || one.mechanism != attempt.ht as u8 {
            continue;
        }
        let token = token(
            key,
            &attempt.username,
            record,
            agent,
            one.mechanism,
            &one.salt,
        );
        match attempt.check(&token) {
            Some(proof) if one.expires_at > unix => return Ok((one.salt, proof)),
            Some(_) => expired = true,
            None => {}
        }
    }
    Err(match expired {
        true => Failure::CREDENTIALS_EXPIRED,
        false => Failure::NOT_AUTHORIZED,
    })
}

/// A change of an account's tokens.
#[derive(Debug)]
pub struct Plan {
    agent: [u8; 16],
    used: Option<[u8; 16]>,
    /// All tokens of the installation end with this log-in. Nobody is let in before that is durable.
    pub invalidates: bool,
    add: Option<Token>,
    unix: u64,
    tokens_max: usize,
}

/// What is to be changed now that the client is authenticated; `None`: nothing, and nothing is written.
pub fn plan(
    record: &ArchivedUserRecord,
    agent: &str,
    wishes: &Wishes,
    terms: Terms,
    unix: u64,
    random: [u8; 16],
) -> Option<Plan> {
    let this = installation(agent);
    let mine = || record.tokens.iter().filter(|one| one.agent == this);
    let used = wishes
        .used
        .and_then(|salt| mine().find(|one| one.salt == salt));
    let invalidates = wishes.invalidate && used.is_some();
    let replaced = used
        .filter(|_| !invalidates)
        .filter(|used| {
            is_due(
                used.issued_at.into(),
                used.expires_at.into(),
                used.salt[0],
                unix,
            )
        })
        .and_then(|used| Ht::ALL.into_iter().find(|ht| *ht as u8 == used.mechanism));
    let add = wishes
        .request
        .or(replaced)
        .filter(|_| terms.life_seconds > 0)
        .map(|ht| Token {
            agent: this,
            salt: random,
            mechanism: ht as u8,
            issued_at: unix,
            expires_at: unix + terms.life_seconds,
        });
    // the one that was used stands behind an older one: that has had its time
    let older = used.is_some_and(|used| mine().next().is_some_and(|first| first.salt != used.salt));
    (add.is_some() || invalidates || older).then_some(Plan {
        agent: this,
        used: wishes.used,
        invalidates,
        add,
        unix,
        tokens_max: terms.tokens_max,
    })
}

fn is_due(issued_at: u64, expires_at: u64, salt: u8, unix: u64) -> bool {
    let third = expires_at.saturating_sub(issued_at) / 3;
    unix >= issued_at + third + third * u64::from(salt) / 256
}

impl Plan {
    /// Carries it out. How many tokens went because there were too many.
    pub fn apply(&self, record: &mut UserRecord) -> usize {
        let tokens = &mut record.tokens;
        tokens.retain(|one| one.expires_at > self.unix);
        let mine = |one: &Token| one.agent == self.agent;
        match self.used {
            Some(used) => {
                if let Some(at) = tokens.iter().position(|one| mine(one) && one.salt == used) {
                    let mut place = 0..;
                    tokens.retain(|one| place.next().is_none_or(|n| n >= at) || !mine(one));
                }
                let keeps = |one: &Token| one.salt == used || self.add.is_none();
                tokens.retain(|one| !mine(one) || (!self.invalidates && keeps(one)));
            }
            // a password: what this client has not used goes, but for one that it may still have
            None => {
                let mut first = true;
                tokens.retain(|one| !mine(one) || std::mem::take(&mut first));
            }
        }
        tokens.extend(self.add.clone());
        let over = tokens.len().saturating_sub(self.tokens_max);
        tokens.drain(..over);
        over
    }

    /// `<token/>`, when the change is durable.
    pub fn answer(
        &self,
        key: &[u8; 32],
        name: &str,
        record: &ArchivedUserRecord,
        agent: &str,
    ) -> Option<String> {
        let new = self.add.as_ref()?;
        let token = token(key, name, record, agent, new.mechanism, &new.salt);
        let expiry = stamp(new.expires_at);
        Some(format!(
            "<token xmlns='{NS}' expiry='{expiry}' token='{token}'/>"
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::record::Record;

    const KEY: [u8; 32] = [5; 32];
    const TERMS: Terms = Terms {
        life_seconds: 3000,
        tokens_max: 4,
    };

    struct Account {
        record: UserRecord,
        random: u8,
    }

    impl Account {
        fn new() -> Account {
            Account {
                record: crate::store::record::tests::user(0),
                random: 0,
            }
        }

        /// A client comes, with its token or with the password; the token that it gets. `Err`: the condition.
        fn comes(
            &mut self,
            agent: &str,
            with: Option<&str>,
            wishes: Wishes,
            unix: u64,
        ) -> Result<Option<String>, &'static str> {
            let record = Record::new(&self.record);
            let used = match with {
                Some(token) => Some(self.check(agent, token, Ht::None, unix)?),
                None => None,
            };
            let wishes = Wishes { used, ..wishes };
            self.random += 1;
            let plan = plan(record.get(), agent, &wishes, TERMS, unix, [self.random; 16]);
            let Some(plan) = plan else { return Ok(None) };
            plan.apply(&mut self.record);
            let record = Record::new(&self.record);
            let answer = plan.answer(&KEY, "alice", record.get(), agent);
            Ok(answer.map(|a| {
                a.split("token='")
                    .nth(1)
                    .unwrap()
                    .split('\'')
                    .next()
                    .unwrap()
                    .into()
            }))
        }

        fn check(
            &self,
            agent: &str,
            token: &str,
            ht: Ht,
            unix: u64,
        ) -> Result<[u8; 16], &'static str> {
            let hash = hmac::sign(
                &hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes()),
                b"Initiator",
            );
            let message = [b"alice\0", hash.as_ref()].concat();
            let attempt = Attempt::start(ht, &message, &ChannelBindings::default());
            let record = Record::new(&self.record);
            check(&attempt.unwrap(), Some(record.get()), agent, &KEY, unix)
                .map(|(salt, _)| salt)
                .map_err(|failure| failure.condition)
        }

        fn gets(&mut self, agent: &str, unix: u64) -> String {
            self.comes(agent, None, request(), unix).unwrap().unwrap()
        }
    }

    fn request() -> Wishes {
        Wishes {
            request: Some(Ht::None),
            ..Wishes::default()
        }
    }

    #[test]
    fn a_young_token_lets_in_again_and_again_and_nothing_is_written() {
        let mut account = Account::new();
        let token = account.gets("desk", 0);
        let before = account.record.clone();
        for unix in [1, 10, 900] {
            assert_eq!(
                account.comes("desk", Some(&token), Wishes::default(), unix),
                Ok(None)
            );
        }
        assert_eq!(account.record, before);
        // nobody else's client, no other mechanism, no other word
        assert_eq!(
            account.check("phone", &token, Ht::None, 1),
            Err("not-authorized")
        );
        assert_eq!(
            account.check("desk", "other", Ht::None, 1),
            Err("not-authorized")
        );
    }

    #[test]
    fn the_store_holds_no_token_and_a_new_password_ends_them() {
        let mut account = Account::new();
        let token = account.gets("desk", 0);
        let record = Record::new(&account.record);
        assert!(memchr::memmem::find(record.bytes(), token.as_bytes()).is_none());
        let raw = BASE64_URL_SAFE_NO_PAD.decode(&token).unwrap();
        assert!(memchr::memmem::find(record.bytes(), &raw).is_none());
        account.record.sha256 = Some(crate::store::record::tests::keys(9, 32));
        assert_eq!(
            account.check("desk", &token, Ht::None, 1),
            Err("not-authorized")
        );
    }

    #[test]
    fn a_proof_holds_for_one_account_and_password() {
        let of = |record: &UserRecord| super::account(Record::new(record).get());
        let before = Account::new().record;
        let mut after = before.clone();
        after.disabled = true;
        after.tokens.push(Token::default());
        assert_eq!(of(&before), of(&after));
        after.sha256 = Some(crate::store::record::tests::keys(9, 32));
        assert_ne!(of(&before), of(&after));
        let mut anew = before.clone();
        anew.created_at += 1;
        assert_ne!(of(&before), of(&anew));
    }

    #[test]
    fn an_old_token_is_replaced_and_ends_when_the_new_one_was_used() {
        let mut account = Account::new();
        let old = account.gets("desk", 0);
        let new = account
            .comes("desk", Some(&old), Wishes::default(), 2001)
            .unwrap()
            .unwrap();
        // the answer was lost: the old one still lets in, and brings another
        let newer = account
            .comes("desk", Some(&old), Wishes::default(), 2002)
            .unwrap()
            .unwrap();
        assert_eq!(
            account.check("desk", &new, Ht::None, 2003),
            Err("not-authorized")
        );
        assert_eq!(
            account.comes("desk", Some(&newer), Wishes::default(), 2004),
            Ok(None)
        );
        assert_eq!(
            account.check("desk", &old, Ht::None, 2005),
            Err("not-authorized")
        );
        assert_eq!(account.record.tokens.len(), 1);
        assert_eq!(
            account.check("desk", &newer, Ht::None, 9000),
            Err("credentials-expired")
        );
    }

    #[test]
    fn an_invalidated_token_is_gone_with_that_log_in() {
        let mut account = Account::new();
        let token = account.gets("desk", 0);
        let other = account.gets("phone", 0);
        // one more, that it has not used yet
        let new = account.comes("desk", Some(&token), Wishes::default(), 2800);
        let new = new.unwrap().unwrap();
        let invalidate = Wishes {
            invalidate: true,
            ..Wishes::default()
        };
        assert_eq!(
            account.comes("desk", Some(&token), invalidate, 2900),
            Ok(None)
        );
        for token in [token, new] {
            assert_eq!(
                account.check("desk", &token, Ht::None, 2901),
                Err("not-authorized")
            );
        }
        assert!(account.check("phone", &other, Ht::None, 2901).is_ok());
    }

    #[test]
    fn those_who_got_tokens_together_do_not_get_new_ones_together() {
        let due = |unix| {
            (0..=255)
                .filter(|salt| is_due(0, 3000, *salt, unix))
                .count()
        };
        assert_eq!((due(999), due(1000), due(2000)), (0, 1, 256));
        assert!((120..136).contains(&due(1500)));
    }

    proptest! {
        #[test]
        fn there_are_never_too_many_and_the_last_one_given_always_works(
            steps in proptest::collection::vec((0..6_u8, 0..3_u8, 1..2000_u64), 1..60),
        ) {
            let mut account = Account::new();
            let mut held: [Option<String>; 6] = Default::default();
            let mut unix = 0;
            for (client, kind, later) in steps {
                unix += later;
                let agent = format!("client {client}");
                let held = &mut held[usize::from(client)];
                let with = held.clone().filter(|_| kind > 0);
                let wishes = if kind == 1 { request() } else { Wishes::default() };
                match account.comes(&agent, with.as_deref(), wishes, unix) {
                    Ok(Some(token)) => {
                        prop_assert!(account.check(&agent, &token, Ht::None, unix).is_ok());
                        *held = Some(token);
                    }
                    Ok(None) => {}
                    Err(_) => *held = None,
                }
                prop_assert!(account.record.tokens.len() <= TERMS.tokens_max);
                for one in &account.record.tokens {
                    let of_it = account.record.tokens.iter().filter(|o| o.agent == one.agent);
                    prop_assert!(of_it.count() <= 2);
                }
            }
        }
    }
}
