//! Last activity (XEP-0012): how long the server has been up, and how long ago a user logged out, told only to those who may
//! see his presence. That he logged out is noted by [`super::presence`].

use super::{Feature, Iq, IqRoute, NONE, Target, disco};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::slice::Slice;

pub const NS: &str = "jabber:iq:last";

pub static FEATURE: Feature = Feature {
    name: "Last activity",
    spec: "XEP-0012",
    version: "2.0",
    server: &[NS],
    account: &[NS],
    iq: &[
        IqRoute {
            name: "query",
            ns: NS,
            target: Target::Server,
            handle: uptime,
        },
        IqRoute {
            name: "query",
            ns: NS,
            target: Target::Account,
            handle: activity,
        },
    ],
    ..NONE
};

fn uptime(slice: &mut Slice, iq: Iq) {
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    // the slice's clock starts with the server
    let seconds = slice.now.ms / 1000;
    slice.iq_result(&iq, Some(query(seconds, "")));
}

fn activity(slice: &mut Slice, iq: Iq) {
    if !disco::may_see(slice, iq.account(), &iq.from) {
        return slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    }
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    let Some(user) = slice.user(iq.account()) else {
        return;
    };
    let mut sessions = user
        .sessions
        .iter()
        .filter_map(|sid| slice.sessions.get(*sid));
    let answer = match &user.last {
        // who is connected but has said that he is away is not betrayed by this
        _ if sessions.any(|session| session.presence.is_some()) => query(0, ""),
        Some(last) => query(slice.now.unix.saturating_sub(last.at), &last.status),
        None if !user.sessions.is_empty() => query(0, ""),
        // was never here
        None => return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND),
    };
    slice.iq_result(&iq, Some(answer));
}

fn query(seconds: u64, status: &str) -> Element {
    let query = Element::new("query", NS).attr("seconds", seconds.to_string());
    if status.is_empty() {
        query
    } else {
        query.text(status)
    }
}

/// Must this stanza be answered by `<forbidden/>`, because it asks a session, or a user who does not exist, for what the asker
/// may not know (XEP-0012 section 4)?
pub fn forbids(slice: &Slice, name: &str, from: &Jid<'_>, stanza: &[u8], meta: Meta) -> bool {
    meta.kind == Kind::IqGet
        && memchr::memmem::find(stanza, NS.as_bytes()).is_some()
        && crate::xmpp::parse_stanza(stanza).is_some_and(|iq| iq.find("query", NS).is_some())
        && !disco::may_see(slice, name, from)
}

#[cfg(test)]
mod tests {
    use crate::xmpp::testing::{Client, World};

    fn ask(to: &str) -> String {
        format!("<iq type='get' id='l' to='{to}'><query xmlns='jabber:iq:last'/></iq>")
    }

    #[track_caller]
    fn told(w: &mut World, client: Client, to: &str, answer: &str) {
        w.send(client, &ask(to));
        let got = w.take(client).concat();
        assert!(
            got.contains(answer) && got.contains(&format!("from='{to}'")),
            "wanted {answer}, got {got}"
        );
    }

    #[test]
    fn the_server_tells_how_long_it_has_been_up() {
        let mut w = World::new(1);
        w.add("alice");
        let a = w.login("alice", "a");
        told(&mut w, a, "localhost", "seconds='1000'");
        w.advance(5000);
        told(&mut w, a, "localhost", "seconds='1005'");
    }

    #[test]
    fn a_contact_is_told_how_long_ago_the_user_went_and_why() {
        let mut w = World::new(2);
        let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
        w.befriend(&alice, &bob);
        let b = w.online(&bob, "b");
        let jid = format!("{alice}@localhost");
        told(&mut w, b, &jid, "<item-not-found");
        let a = w.online(&alice, "a");
        w.take(b);
        told(&mut w, b, &jid, "seconds='0'");
        w.send(
            a,
            "<presence type='unavailable'><status>gone &amp; away</status></presence>",
        );
        w.take(b);
        w.advance(7000);
        told(&mut w, b, &jid, "seconds='7'>gone &amp; away</query>");
        w.logout(a);
        told(&mut w, b, &jid, "seconds='7'>gone &amp; away</query>");
    }

    #[test]
    fn a_stranger_hears_the_same_of_everybody() {
        let mut w = World::new(1);
        w.add("alice");
        w.add("mallory");
        // sees him, but is not seen
        w.item("alice", "mallory", crate::store::record::Subscription::To);
        let a = w.online("alice", "a");
        let m = w.online("mallory", "m");
        w.take(a);
        for to in [
            "alice@localhost",
            "alice@localhost/a",
            "alice@localhost/b",
            "nobody@localhost",
            "nobody@localhost/a",
        ] {
            w.send(m, &ask(to));
            w.expect(m, &[&format!(
                "<iq type='error' id='l' from='{to}' to='mallory@localhost/m'><query xmlns='jabber:iq:last'/>\
                 <error type='auth'><forbidden xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>"
            )]);
        }
        w.expect(a, &[]);
    }

    #[test]
    fn the_client_of_a_contact_answers_for_itself() {
        let mut w = World::new(1);
        w.befriend("alice", "bob");
        let a = w.online("alice", "a");
        let b = w.online("bob", "b");
        w.take(a);
        w.send(b, &ask("alice@localhost/a"));
        w.expect(a, &["<iq type='get' id='l' from='bob@localhost/b' to='alice@localhost/a'><query xmlns='jabber:iq:last'/></iq>"]);
    }
}
