//! EXTERNAL (RFC 4422, appendix A; XEP-0178): the client's certificate has authenticated it already. In: the names in a
//! certificate that holds, and the client's one message, the identity that it wants to act as. Out: a user.

use super::{Failure, Offer};
use crate::xmpp::jid::Jid;

/// The accounts of `domain` that a certificate stands for, as localparts, each once: those that its XMPP addresses name. One
/// without any XMPP address stands for the accounts called like its e-mail addresses, where `email` gives them.
pub fn accounts<'n>(
    xmpp: &'n [String],
    email: Option<&'n [String]>,
    domain: &str,
) -> Vec<Box<str>> {
    let names = match (xmpp, email) {
        ([], Some(email)) => email,
        (xmpp, _) => xmpp,
    };
    let mut accounts: Vec<Box<str>> = Vec::new();
    for name in names {
        if let Ok(jid) = Jid::parse(name)
            && let Some(local) = account(&jid, domain)
            && !accounts.iter().any(|known| **known == *local)
        {
            accounts.push(local.into());
        }
    }
    accounts
}

/// The localpart of a bare address of `domain`.
fn account<'j>(jid: &'j Jid<'_>, domain: &str) -> Option<&'j str> {
    jid.local()
        .filter(|_| jid.is_bare() && jid.domain() == domain)
}

/// The user as whom the client acts: whom it names, or, if it names none, the only one that there is.
pub(super) fn parse(message: &str, offer: &Offer<'_>) -> Result<String, Failure> {
    if message.is_empty() {
        return match offer.certified {
            [only] => Ok(only.as_ref().into()),
            _ => Err(Failure::INVALID_AUTHZID
                .with_text("The certificate has several addresses: say which")),
        };
    }
    let jid = Jid::parse(message).map_err(|_| Failure::INVALID_AUTHZID)?;
    account(&jid, offer.domain)
        .filter(|local| offer.certified.iter().any(|known| **known == **local))
        .map(Into::into)
        .ok_or(Failure::INVALID_AUTHZID)
}
