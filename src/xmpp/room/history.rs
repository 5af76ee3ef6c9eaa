//! The last messages of a room, for those who come in (XEP-0045 section 7.2.13): as all got them, with `<delay/>`.

use std::collections::VecDeque;
use std::rc::Rc;

use super::message::{add, unsigned};
use super::{Limits, NS, Room};
use crate::store::change::{ArchivedRetract, Id};
use crate::store::tier::{ArchiveQuery, Page};
use crate::xml::Element;
use crate::xmpp::feature::{stable_id, time};
use crate::xmpp::message::attribute;
use crate::xmpp::slice::Env;

/// A message that was told.
pub struct Past {
    /// When, unix milliseconds.
    pub at_ms: u64,
    /// Without `to`.
    pub stanza: Rc<[u8]>,
}

#[derive(Default)]
pub struct History {
    past: VecDeque<Past>,
    bytes: usize,
}

/// What a newcomer wants to see; all bounds hold together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    bytes_max: Option<usize>,
    stanzas_max: Option<usize>,
    since_ms: Option<u64>,
}

impl Wanted {
    /// From `<history/>` in the presence with which somebody comes in. What is no number counts as not there.
    pub fn of(presence: &Element, now_ms: u64) -> Wanted {
        let x = presence.find("x", NS);
        let Some(history) = x.and_then(|x| x.find("history", NS)) else {
            return Wanted::default();
        };
        let number = |name: &str| history.get(name).and_then(|n| n.parse::<u64>().ok());
        let seconds = number("seconds").map(|s| now_ms.saturating_sub(s.saturating_mul(1000)));
        let since = history.get("since").and_then(time::parse);
        let since = since.map(|(ms, _)| ms.max(0) as u64);
        Wanted {
            bytes_max: number("maxchars").map(|n| n as usize),
            stanzas_max: number("maxstanzas").map(|n| n as usize),
            since_ms: seconds.max(since),
        }
    }
}

/// The page of the archive with which a room begins.
pub fn query(room: &Room, limits: &Limits) -> ArchiveQuery {
    ArchiveQuery {
        name: (*room.name).into(),
        backwards: true,
        most: limits.history_max as u32,
        ..ArchiveQuery::default()
    }
}

impl History {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn push(&mut self, past: Past, limits: &Limits) {
        self.bytes += past.stanza.len();
        self.past.push_back(past);
        while self.past.len() > limits.history_max || self.bytes > limits.history_bytes_max {
            match self.past.pop_front() {
                Some(old) => self.bytes -= old.stanza.len(),
                None => break,
            }
        }
    }

    /// What was retracted is not shown to who comes in later.
    pub fn retract(&mut self, retract: &ArchivedRetract<'_>) {
        let mut id = Vec::new();
        attribute("id", &retract.target, &mut id);
        let mut by = Vec::new();
        attribute("id", &retract.peer, &mut by);
        let has = |stanza: &[u8], part: &[u8]| memchr::memmem::find(stanza, part).is_some();
        let bytes = &mut self.bytes;
        self.past.retain(|past| {
            // by a moderator, or by whoever has said it
            let meant = has(&past.stanza, &id) && (retract.side == 0 || has(&past.stanza, &by));
            if meant {
                *bytes -= past.stanza.len();
            }
            !meant
        });
    }

    /// With what the archive has.
    pub fn fill(&mut self, env: &Env, room: &str, page: Page) {
        for entry in page.entries {
            let mut stanza = unsigned(&entry.stanza).into_owned();
            add(&mut stanza, |out| {
                out.extend_from_slice(b"<stanza-id xmlns='urn:xmpp:sid:0'");
                attribute("by", room, out);
                let id = stable_id::permute(entry.id, env.id_key);
                attribute("id", &format!("{id:016x}"), out);
                out.extend_from_slice(b"/>");
            });
            let past = Past {
                at_ms: Id(entry.id).unix_ms(),
                stanza: stanza.into(),
            };
            self.push(past, &env.limits.rooms);
        }
    }

    /// What a newcomer gets, oldest first; the newest that fit.
    pub fn select(&self, wanted: &Wanted, most: usize, room: &str) -> Vec<Vec<u8>> {
        let most = wanted.stanzas_max.map_or(most, |n| n.min(most));
        let mut room_left = wanted.bytes_max.unwrap_or(usize::MAX);
        let mut selected = Vec::new();
        for past in self.past.iter().rev() {
            let too_old = wanted.since_ms.is_some_and(|since| past.at_ms < since);
            if selected.len() == most || too_old {
                break;
            }
            let mut stanza = past.stanza.to_vec();
            add(&mut stanza, |out| {
                out.extend_from_slice(b"<delay xmlns='urn:xmpp:delay'");
                attribute("from", room, out);
                attribute("stamp", &time::stamp_ms(past.at_ms), out);
                out.extend_from_slice(b"/>");
            });
            if stanza.len() > room_left {
                break;
            }
            room_left -= stanza.len();
            selected.push(stanza);
        }
        selected.reverse();
        selected
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::testing;

    fn history(count: u64) -> History {
        let limits = testing::limits().rooms;
        let mut history = History::default();
        for n in 0..count {
            let past = Past {
                at_ms: 1_000_000 + n * 1000,
                stanza: format!("<message><body>{n}</body></message>")
                    .into_bytes()
                    .into(),
            };
            history.push(past, &limits);
        }
        history
    }

    fn numbers(history: &History, wanted: &str) -> Vec<String> {
        let presence = format!("<presence><x xmlns='{NS}'><history {wanted}/></x></presence>");
        let wanted = Wanted::of(&Element::parse(&presence).unwrap(), 1_010_000);
        let selected = history.select(&wanted, 20, "r@x");
        let text = |s: Vec<u8>| {
            let s = String::from_utf8(s).unwrap();
            assert!(s.contains("<delay xmlns='urn:xmpp:delay' from='r@x' stamp='"));
            s.split(['<', '>']).nth(4).unwrap().to_owned()
        };
        selected.into_iter().map(text).collect()
    }

    #[test]
    fn a_newcomer_gets_the_newest_that_he_wants_oldest_first() {
        let history = history(10);
        assert_eq!(numbers(&history, "").len(), 10);
        assert_eq!(numbers(&history, "maxstanzas='2'"), ["8", "9"]);
        assert_eq!(numbers(&history, "seconds='2'"), ["8", "9"]);
        assert_eq!(
            numbers(&history, "since='1970-01-01T00:16:47Z'"),
            ["7", "8", "9"]
        );
        assert!(numbers(&history, "maxchars='0'").is_empty());
        assert!(numbers(&history, "maxstanzas='0'").is_empty());
        assert_eq!(numbers(&history, "maxchars='120'").len(), 1);
        assert_eq!(numbers(&history, "maxstanzas='many'").len(), 10);
    }

    #[test]
    fn what_is_kept_is_bounded_by_number_and_bytes() {
        let history = history(10_000);
        assert_eq!(history.past.len(), testing::limits().rooms.history_max);
        let mut limits = testing::limits().rooms;
        limits.history_bytes_max = 10;
        let mut history = History::default();
        let past = Past {
            at_ms: 0,
            stanza: b"<message>12345</message>".to_vec().into(),
        };
        history.push(past, &limits);
        assert_eq!((history.past.len(), history.bytes()), (0, 0));
    }
}
