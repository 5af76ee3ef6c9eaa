//! Client state indication (XEP-0352): while a client is inactive, what may wait waits: presence (only the newest of each
//! full JID) and messages that say nothing (chat states). Anything else goes out at once, with what waited before it, so
//! that the order stays.

use super::{Feature, NONE, NonzaRoute, push};
use crate::xml::view::View;
use crate::xmpp::error::StreamError;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::pace::from_of;
use crate::xmpp::session::{Session, SessionId};
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:xmpp:csi:0";

pub static FEATURE: Feature = Feature {
    name: "Client state indication",
    spec: "XEP-0352",
    version: "1.0.0",
    stream: Some(|_| format!("<csi xmlns='{NS}'/>")),
    nonza: &[
        NonzaRoute {
            name: "active",
            ns: NS,
            handle: active,
        },
        NonzaRoute {
            name: "inactive",
            ns: NS,
            handle: inactive,
        },
    ],
    ..NONE
};

/// The most bytes of a stanza that may wait; with the limit of stanzas this bounds what one inactive client costs.
const HELD_STANZA_BYTES_MAX: usize = 4096;

#[derive(Debug, Default)]
pub struct Csi {
    pub inactive: bool,
    held: Vec<(Box<[u8]>, Meta)>,
}

/// Keeps the stanza back, if it may wait and no more than `most` do. `false`: the caller sends it; what waited was sent before.
/// A pending delivery (`id`) never waits, whatever it says: its end must be known.
pub fn hold(session: &mut Session, parts: &[&[u8]], meta: Meta, id: u64, most: usize) -> bool {
    let lazy = id == 0
        && (meta.has(Meta::LAZY) || matches!(meta.kind, Kind::Available | Kind::Unavailable));
    let bytes: usize = parts.iter().map(|part| part.len()).sum();
    if !lazy || bytes > HELD_STANZA_BYTES_MAX || session.csi.held.len() >= most {
        release(session);
        return false;
    }
    let stanza: Box<[u8]> = parts.concat().into();
    if meta.kind.is_presence()
        && let Some(from) = from_of(&stanza)
    {
        // only the newest presence of a full JID is worth telling
        session
            .csi
            .held
            .retain(|(old, m)| !(m.kind.is_presence() && from_of(old) == Some(from)));
    }
    session.csi.held.push((stanza, meta));
    true
}

/// The client is active (again): what waited goes out.
pub fn activate(session: &mut Session) {
    session.csi.inactive = false;
    release(session);
}

fn release(session: &mut Session) {
    for (stanza, meta) in std::mem::take(&mut session.csi.held) {
        session.push(&[&stanza], meta, 0);
    }
}

fn active(slice: &mut Slice, sid: SessionId, _: &View<'_>) -> Result<(), StreamError> {
    if let Some(session) = slice.sessions.get_mut(sid) {
        activate(session);
        slice.touched(sid);
        push::is_there(slice, sid);
    }
    Ok(())
}

fn inactive(slice: &mut Slice, sid: SessionId, _: &View<'_>) -> Result<(), StreamError> {
    if let Some(session) = slice.sessions.get_mut(sid) {
        session.csi.inactive = true;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::xmpp::testing::{Client, World};

    /// Alice, inactive, who sees Bob and Carol.
    fn inactive() -> (World, Client, Client, Client) {
        let mut w = World::with(1, |limits| limits.deferred_stanzas_max = 3);
        w.befriend("alice", "bob");
        w.befriend("alice", "carol");
        let a = w.online("alice", "a");
        let b = w.online("bob", "b");
        let c = w.online("carol", "c");
        w.send(a, "<inactive xmlns='urn:xmpp:csi:0'/>");
        w.take(a);
        (w, a, b, c)
    }

    fn state(to: &str) -> String {
        format!(
            "<message to='{to}' type='chat'><paused xmlns='http://jabber.org/protocol/chatstates'/></message>"
        )
    }

    #[test]
    fn what_may_wait_goes_out_before_what_may_not_and_only_the_newest_presence() {
        let (mut w, a, b, c) = inactive();
        for show in ["away", "xa", "dnd"] {
            w.send(b, &format!("<presence><show>{show}</show></presence>"));
        }
        w.send(c, &state("alice@localhost"));
        w.expect(a, &[]);
        w.send(
            b,
            "<message to='alice@localhost' type='chat'><body>x</body></message>",
        );
        let got = w.take(a);
        let order = ["<show>dnd</show>", "<paused", "<body>"];
        assert!(
            got.len() == 3
                && got
                    .iter()
                    .zip(order)
                    .all(|(got, wanted)| got.contains(wanted)),
            "{got:?}"
        );
    }

    #[test]
    fn all_goes_out_when_the_client_is_active_or_too_much_waits() {
        let (mut w, a, b, _) = inactive();
        w.send(b, &state("alice@localhost"));
        w.send(a, "<active xmlns='urn:xmpp:csi:0'/>");
        assert_eq!(w.take(a).len(), 1);
        w.send(a, "<inactive xmlns='urn:xmpp:csi:0'/>");
        for _ in 0..3 {
            w.send(b, &state("alice@localhost"));
        }
        w.expect(a, &[]);
        w.send(b, &state("alice@localhost"));
        assert_eq!(w.take(a).len(), 4);
        let long = format!("<presence><status>{}</status></presence>", "x".repeat(5000));
        w.send(b, &long);
        assert_eq!(w.take(a).len(), 1);
    }

    #[test]
    fn nobodys_presence_takes_anothers_place() {
        let (mut w, a, b, c) = inactive();
        w.send(c, "<presence><show>away</show></presence>");
        w.send(b, "<presence id=\" from='carol@localhost/c'\"/>");
        w.send(a, "<active xmlns='urn:xmpp:csi:0'/>");
        let got = w.take(a).concat();
        assert!(got.contains("<show>away</show>"), "{got}");
    }
}
