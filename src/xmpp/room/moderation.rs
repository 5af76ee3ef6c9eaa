//! Moderators take back what others have said (XEP-0425): a tombstone in what the archive shows, and a message that tells it to
//! all. The original stays in the store.
//!
//! In: a request with the stable id of a message. Out: its answer, when the retraction is durable. Promise: only a moderator
//! retracts, and only what this room's archive has.

use std::rc::Rc;

use super::info::QUERIES_MAX;
use super::{Room, at_work};
use crate::store::change::{Change, Message};
use crate::store::tier::ArchiveQuery;
use crate::xml::Element;
use crate::xmpp::NS_CLIENT;
use crate::xmpp::error::StanzaError;
use crate::xmpp::feature::{moderation, retract, stable_id};
use crate::xmpp::iq::Iq;
use crate::xmpp::ledger::Act;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::room::privilege::Role;
use crate::xmpp::slice::Slice;

const REASON_BYTES_MAX: usize = 1024;

struct Wanted {
    id: u64,
    /// As it is shown to clients.
    stable: String,
    /// The moderator's occupant JID.
    by: String,
    reason: Option<String>,
}

pub fn handle(slice: &mut Slice, room: &mut Room, iq: Iq) {
    if room.queries >= QUERIES_MAX {
        slice.counters.room_refused += 1;
        return slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT);
    }
    let wanted = match read(slice, room, &iq) {
        Ok(wanted) => wanted,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    // the archive says whether there is such a message; a query by ids is never answered from memory, so not at once
    let query = ArchiveQuery {
        name: (*room.name).into(),
        ids: vec![wanted.id],
        most: 1,
        ..ArchiveQuery::default()
    };
    let (name, iq) = (room.name.clone(), Rc::new(iq));
    room.queries += 1;
    slice.read_archive(
        query,
        Box::new(move |slice, page| {
            at_work(slice, &name, |_, room| {
                room.queries = room.queries.saturating_sub(1);
            });
            let found = match &page {
                Ok(page) => page.entries.iter().any(|entry| entry.id == wanted.id),
                Err(_) => return slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT),
            };
            let done = found.then(|| {
                at_work(slice, &name, |slice, room| {
                    moderate(slice, room, &wanted, iq.clone())
                })
            });
            match done.flatten() {
                Some(Ok(())) => {}
                Some(Err(error)) => slice.iq_error(&iq, &error),
                None => slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND),
            }
        }),
    );
}

fn read(slice: &Slice, room: &Room, iq: &Iq) -> Result<Wanted, StanzaError> {
    let place = room.occupants.find(iq.from.as_str());
    let asker = place.and_then(|place| room.occupants.get(place));
    let asker = asker.filter(|occupant| occupant.role == Role::Moderator);
    let asker = asker.ok_or(StanzaError::FORBIDDEN)?;
    if !iq.set {
        return Err(StanzaError::BAD_REQUEST);
    }
    if iq.payload.find("retract", retract::NS).is_none() {
        return Err(StanzaError::FEATURE_NOT_IMPLEMENTED.text("only to retract"));
    }
    let stable = iq.payload.get("id").ok_or(StanzaError::BAD_REQUEST)?;
    let shown = u64::from_str_radix(stable, 16).map_err(|_| StanzaError::ITEM_NOT_FOUND)?;
    let id = stable_id::unpermute(shown, slice.env.id_key);
    if stable_id::shown(id, slice.env.id_key) != stable {
        return Err(StanzaError::ITEM_NOT_FOUND);
    }
    let reason = iq.payload.find("reason", moderation::NS);
    let reason = reason.map(Element::text_content);
    if reason.as_ref().is_some_and(|r| r.len() > REASON_BYTES_MAX) {
        return Err(StanzaError::POLICY_VIOLATION.text("the reason is too long"));
    }
    Ok(Wanted {
        id,
        stable: stable.to_owned(),
        by: room.occupant_jid(&asker.nick),
        reason,
    })
}

/// Journals the message that tells it, the retraction, and the answer behind them.
fn moderate(
    slice: &mut Slice,
    room: &mut Room,
    wanted: &Wanted,
    iq: Rc<Iq>,
) -> Result<(), StanzaError> {
    // it may have become another one while the archive was read
    if room.ending {
        return Err(StanzaError::ITEM_NOT_FOUND);
    }
    if slice.ledger.full {
        slice.counters.journal_refused += 1;
        return Err(StanzaError::RESOURCE_CONSTRAINT);
    }
    let reason = wanted.reason.as_deref();
    let moderated = Element::new("moderated", moderation::NS).attr("by", &*wanted.by);
    let mut retracted = Element::new("retract", retract::NS)
        .attr("id", &*wanted.stable)
        .child(moderated);
    if let Some(reason) = reason {
        retracted = retracted.child(Element::new("reason", retract::NS).text(reason));
    }
    let id = slice.next_id();
    let told = Element::new("message", NS_CLIENT)
        .attr("type", "groupchat")
        .attr("id", format!("moderated-{}", wanted.stable))
        .attr("from", &*room.jid)
        .child(retracted);
    let mut stanza = Vec::new();
    told.write(&mut stanza, NS_CLIENT);
    let meta = Meta::new(Kind::GroupChat).with(Meta::RETRACT | Meta::STORE | Meta::SERVER);
    let (kind, flags) = meta.numbers();
    let change = Change::Message(Message {
        id,
        owner: &room.name,
        what: Message::RECEIVED | Message::ARCHIVE,
        kind,
        flags,
        peer: &room.jid,
        twin: 0,
        stream: "",
        count: 0,
        stanza: &stanza,
    });
    room.flow.messages += 1;
    let act = Act::Reflected {
        meta,
        receipt: None,
    };
    slice.ledger.journal(&room.name, &change, act);
    let owner = room.name.clone();
    retract::moderate(slice, &owner, id, &wanted.stable, &wanted.by, reason);
    // the record itself does not change: what is written behind the two is answered when they are durable
    room.change(slice, |_| {}, move |slice, _| slice.iq_result(&iq, None))
}
