//! Presence of a crowd that comes or goes, spread over turns of the loop, so that no message waits behind it.
//!
//! In: broadcast presence for sessions of this slice ([`Slice::pace`]), and how many may go out in a turn
//! ([`Slice::release`]). Out: the same, at once while the turn has room, and else in later turns. Promise: a client gets what
//! it is owed, though only the newest presence of a full JID that waits; presence never comes after what the same full JID
//! has sent behind it (a message, a request, directed presence, anything about a subscription: none of these ever waits
//! here). A client that does not read, or that is cut off and may resume, gets the newest of each when it reads again.
//!
//! A contact who goes and comes back while both wait is told as having come (with the presence of the new session), one who
//! comes and goes as having gone.

use std::collections::VecDeque;
use std::rc::Rc;

use super::meta::Meta;
use super::session::SessionId;
use super::slice::Slice;

/// Presence of one session that goes out in one turn; what is more comes in its next turn.
const BATCH: usize = 64;
/// Of one session that waits; the oldest then goes at once.
const HELD_MAX: usize = 1000;

/// One presence for many sessions; made once.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Value of the attribute, as it stands in the stanza.
    from: Rc<[u8]>,
    /// Without `to`.
    stanza: Rc<[u8]>,
    meta: Meta,
}

impl Shared {
    /// `None`: it does not say from whom it is.
    pub fn new(stanza: &[u8], meta: Meta) -> Option<Shared> {
        Some(Shared {
            from: from_of(stanza)?.into(),
            stanza: stanza.into(),
            meta,
        })
    }
}

/// What waits for one session.
#[derive(Debug, Default)]
pub struct Paced {
    held: VecDeque<Shared>,
    /// Stands in [`Slice::paced`].
    queued: bool,
}

/// How much presence may go out in this turn, and whose waits.
pub struct Pace {
    left: usize,
    queue: VecDeque<SessionId>,
    /// Presences that a newer one of the same full JID has replaced.
    pub merged: u64,
}

impl Default for Pace {
    /// Nothing waits until somebody counts turns.
    fn default() -> Pace {
        Pace {
            left: usize::MAX,
            queue: VecDeque::new(),
            merged: 0,
        }
    }
}

impl Pace {
    /// Sessions with presence that waits.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }
}

impl Slice {
    /// Broadcast presence for one session. `shared` is made when it is first needed.
    pub fn pace(&mut self, sid: SessionId, stanza: &[u8], meta: Meta, shared: &mut Option<Shared>) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        let waits = session.paced.is_some() || session.unsent > 0 || session.link.is_none();
        if !waits && self.pace.left > 0 {
            self.pace.left -= 1;
            return super::feature::presence::write_to(self, sid, stanza, meta);
        }
        if shared.is_none() {
            *shared = Shared::new(stanza, meta);
        }
        let Some(shared) = shared else {
            return super::feature::presence::write_to(self, sid, stanza, meta);
        };
        let paced = session.paced.get_or_insert_default();
        let mut oldest = None;
        if let Some(old) = paced.held.iter_mut().find(|old| old.from == shared.from) {
            *old = shared.clone();
            self.pace.merged += 1;
        } else {
            if paced.held.len() >= HELD_MAX {
                oldest = paced.held.pop_front();
            }
            paced.held.push_back(shared.clone());
        }
        self.requeue(sid);
        if let Some(oldest) = oldest {
            super::feature::presence::write_to(self, sid, &oldest.stanza, oldest.meta);
        }
    }

    /// The session may be given what waits for it: its client reads again.
    pub fn requeue(&mut self, sid: SessionId) {
        if let Some(session) = self.sessions.get_mut(sid)
            && session.unsent == 0
            && session.link.is_some()
            && let Some(paced) = &mut session.paced
            && !std::mem::replace(&mut paced.queued, true)
        {
            self.pace.queue.push_back(sid);
        }
    }

    /// A turn: so many presences may go out. What has waited goes first, a batch for each session in turn.
    pub fn release(&mut self, most: usize) {
        self.pace.left = most;
        while self.pace.left > 0
            && let Some(sid) = self.pace.queue.pop_front()
        {
            let Some(session) = self.sessions.get_mut(sid) else {
                continue;
            };
            let reads = session.unsent == 0 && session.link.is_some();
            let Some(paced) = &mut session.paced else {
                continue;
            };
            paced.queued = false;
            if !reads {
                continue;
            }
            let count = paced.held.len().min(BATCH).min(self.pace.left);
            let batch: Vec<Shared> = paced.held.drain(..count).collect();
            if paced.held.is_empty() {
                session.paced = None;
            }
            // one write for all of them, which is what costs
            self.pace.left -= count.div_ceil(8);
            for shared in batch {
                super::feature::presence::write_to(self, sid, &shared.stanza, shared.meta);
            }
            self.requeue(sid);
        }
    }

    /// What waits for the sessions of a user goes out: whom they may see is about to change.
    pub fn release_user(&mut self, name: &str) {
        for sid in self.sessions_of(name) {
            self.release_session(sid, |_| true);
        }
    }

    fn release_session(&mut self, sid: SessionId, wanted: impl Fn(&[u8]) -> bool) {
        let Some(session) = self.sessions.get_mut(sid) else {
            return;
        };
        let Some(paced) = &mut session.paced else {
            return;
        };
        let mut out = Vec::new();
        paced.held.retain(|shared| {
            let goes = wanted(&shared.from);
            if goes {
                out.push(shared.clone());
            }
            !goes
        });
        if paced.held.is_empty() && !paced.queued {
            session.paced = None;
        }
        for shared in out {
            super::feature::presence::write_to(self, sid, &shared.stanza, shared.meta);
        }
    }

    /// A stanza goes to a session: presence of its sender must not come behind it.
    pub(super) fn release_sender(&mut self, sid: SessionId, parts: &[&[u8]], meta: Meta) {
        let whole;
        let stanza = match parts {
            [stanza] => *stanza,
            parts => {
                whole = parts.concat();
                &whole
            }
        };
        match from_of(stanza) {
            Some(from) if from.contains(&b'/') => self.release_session(sid, |held| held == from),
            Some(bare) => self.release_session(sid, |held| {
                held.strip_prefix(bare)
                    .is_some_and(|rest| rest.first().is_none_or(|byte| *byte == b'/'))
            }),
            // the server's own
            None if meta.kind.is_iq() || meta.has(Meta::SERVER) => {}
            None => self.release_session(sid, |_| true),
        }
    }
}

/// The value of `from` as it stands in the start tag of a stanza that the server wrote: behind all that the client wrote, whose
/// values may hold anything.
pub fn from_of(stanza: &[u8]) -> Option<&[u8]> {
    let end = memchr::memchr(b'>', stanza)?;
    let tag = &stanza[..end];
    let start = memchr::memmem::rfind(tag, b" from='")? + 7;
    let len = memchr::memchr(b'\'', &tag[start..])?;
    Some(&tag[start..start + len])
}

#[cfg(test)]
mod tests {
    use crate::xmpp::testing::{Client, World};

    /// Alice sees Bob and Carol, who have just been told of; no turn has room for presence.
    fn crowded() -> (World, Client, Client, Client) {
        let mut w = World::new(1);
        w.befriend("alice", "bob");
        w.befriend("alice", "carol");
        let a = w.online("alice", "a");
        let b = w.online("bob", "b");
        let c = w.online("carol", "c");
        w.take(a);
        w.room = 0;
        w.run();
        (w, a, b, c)
    }

    fn order(got: &[String], wanted: &[&str]) {
        let alike = |(got, wanted): (&String, &&str)| got.contains(wanted);
        assert!(
            got.len() == wanted.len() && got.iter().zip(wanted).all(alike),
            "{got:?}"
        );
    }

    #[test]
    fn presence_waits_for_a_turn_with_room_and_only_the_newest_of_each_full_jid_comes() {
        let (mut w, a, b, c) = crowded();
        for show in ["away", "xa", "dnd"] {
            w.send(b, &format!("<presence><show>{show}</show></presence>"));
        }
        w.send(c, "<presence><show>chat</show></presence>");
        w.expect(a, &[]);
        assert_eq!(w.slices[0].pace.merged, 2);
        w.room = 1;
        w.run();
        order(&w.take(a), &["<show>dnd</show>", "<show>chat</show>"]);
        assert_eq!(w.slices[0].pace.waiting(), 0);
    }

    #[test]
    fn a_message_waits_for_no_presence_but_comes_behind_its_senders() {
        let (mut w, a, b, c) = crowded();
        w.send(b, "<presence><show>away</show></presence>");
        w.send(c, "<presence><show>dnd</show></presence>");
        w.send(
            b,
            "<message to='alice@localhost' type='chat'><body>x</body></message>",
        );
        order(&w.take(a), &["<show>away</show>", "<body>"]);
        w.send(
            c,
            "<iq type='get' to='alice@localhost/a' id='1'><query xmlns='jabber:iq:version'/></iq>",
        );
        order(&w.take(a), &["<show>dnd</show>", "<iq"]);
    }

    #[test]
    fn what_is_about_a_subscription_and_directed_presence_never_wait_and_come_in_order() {
        let (mut w, a, b, c) = crowded();
        w.send(b, "<presence><show>away</show></presence>");
        w.send(
            b,
            "<presence to='alice@localhost/a'><show>dnd</show></presence>",
        );
        order(&w.take(a), &["<show>away</show>", "<show>dnd</show>"]);
        w.send(c, "<presence><show>xa</show></presence>");
        w.send(c, "<presence to='alice@localhost' type='unsubscribed'/>");
        let got = w.take(a).concat();
        let at = |what: &str| got.find(what).unwrap_or_else(|| panic!("{what}: {got}"));
        assert!(at("<show>xa</show>") < at("type='unavailable'"));
        assert!(at("type='unavailable'") < at("type='unsubscribed'"));
    }

    #[test]
    fn who_goes_and_comes_back_meanwhile_has_come_and_who_goes_last_has_gone() {
        let (mut w, a, b, _) = crowded();
        w.send(b, "<presence type='unavailable'/>");
        w.send(b, "<presence><show>away</show></presence>");
        w.room = 8;
        w.run();
        order(&w.take(a), &["<show>away</show>"]);
        w.room = 0;
        w.run();
        w.send(b, "<presence/>");
        w.logout(b);
        w.room = 8;
        w.run();
        order(&w.take(a), &["type='unavailable'"]);
    }

    #[test]
    fn nobody_hears_of_one_whom_he_has_just_blocked() {
        let (mut w, a, b, _) = crowded();
        w.send(b, "<presence><show>away</show></presence>");
        w.send(
            a,
            "<iq type='set' id='1'><block xmlns='urn:xmpp:blocking'><item jid='bob@localhost'/></block></iq>",
        );
        let before = w.take(a);
        w.room = 8;
        w.run();
        let after = w.take(a).concat();
        assert!(before[0].contains("<show>away</show>"), "{before:?}");
        assert!(!after.contains("bob"), "{after}");
    }

    #[test]
    fn a_client_that_does_not_read_gets_the_newest_when_it_reads_again() {
        let (mut w, a, b, _) = crowded();
        w.room = 8;
        w.slices[0].sessions.get_mut(a.sid).unwrap().unsent = 1;
        for show in ["away", "xa", "dnd"] {
            w.send(b, &format!("<presence><show>{show}</show></presence>"));
        }
        w.expect(a, &[]);
        w.slices[0].sessions.get_mut(a.sid).unwrap().unsent = 0;
        w.slices[0].requeue(a.sid);
        w.run();
        order(&w.take(a), &["<show>dnd</show>"]);
    }

    #[test]
    fn what_waits_for_one_session_is_bounded_and_nothing_of_it_is_lost() {
        let mut w = World::new(1);
        let count = super::HELD_MAX + 5;
        for n in 0..count {
            w.befriend("alice", &format!("u{n}"));
        }
        let a = w.online("alice", "a");
        w.take(a);
        w.room = 0;
        w.run();
        for n in 0..count {
            w.online(&format!("u{n}"), "r");
        }
        assert_eq!(w.take(a).len(), 5);
        w.room = 1;
        w.run();
        assert_eq!(w.take(a).len(), super::HELD_MAX);
    }
}
