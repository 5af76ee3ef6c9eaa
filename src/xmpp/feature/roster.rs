//! The roster (RFC 6121 section 2, with the versions of 2.6, once XEP-0237).
//!
//! In: roster gets and sets of the user's own clients. Out: results, written straight from the archived record; pushes
//! of each changed item to all interested resources, with the new version. Promise: a result and its pushes leave when
//! the change is durable, pushes in the order of the changes; whoever has seen a version has seen all of it.

use std::borrow::Cow;

use super::{Feature, Iq, IqRoute, NONE, Target, subscription};
use crate::store::record::{ArchivedRosterItem, RosterItem, Subscription};
use crate::xml::dom::Element;
use crate::xml::escape::escape_text;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::{self, Jid};
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::Slice;

pub const NS: &str = "jabber:iq:roster";

pub static FEATURE: Feature = Feature {
    name: "Roster, with versions",
    spec: "RFC 6121 2, XEP-0237",
    version: "1.3",
    server: &[NS],
    stream: Some(|_| "<ver xmlns='urn:xmpp:features:rosterver'/>".to_owned()),
    iq: &[IqRoute {
        name: "query",
        ns: NS,
        target: Target::Account,
        handle,
    }],
    ..NONE
};

fn handle(slice: &mut Slice, iq: Iq) {
    let answer = match iq.session {
        // 2.1.5: nobody else may read or change it
        Some(sid) if iq.own() => {
            if iq.set {
                return set(slice, iq);
            }
            get(slice, sid, &iq)
        }
        _ => Err(StanzaError::FORBIDDEN),
    };
    if let Err(error) = answer {
        slice.iq_error(&iq, &error);
    }
}

/// 2.1.3, 2.6.2: the whole roster, or an empty result if the client has this version already.
fn get(slice: &mut Slice, sid: SessionId, iq: &Iq) -> Result<(), StanzaError> {
    if iq.payload.elements().next().is_some() {
        return Err(StanzaError::BAD_REQUEST);
    }
    let mut out = slice.buffer();
    let Some(user) = slice.user(iq.account()) else {
        slice.reuse(out);
        return Err(StanzaError::ITEM_NOT_FOUND);
    };
    let record = user.record.get();
    let version = version(record.roster_version.to_native());
    out.extend_from_slice(b"<iq type='result'");
    attribute("id", &iq.id, &mut out);
    attribute("to", iq.from.as_str(), &mut out);
    if let Some(from) = &iq.to {
        attribute("from", from.as_str(), &mut out);
    }
    if iq.payload.get("ver") == Some(&version) {
        out.extend_from_slice(b"/>");
    } else {
        open_query(&version, &mut out);
        for item in record.roster.iter() {
            write_archived(item, &mut out);
        }
        out.extend_from_slice(b"</query></iq>");
    }
    if let Some(session) = slice.sessions.get_mut(sid) {
        session.interested = true;
    }
    slice.send(sid, &[&out], Meta::new(Kind::IqResult).with(Meta::SERVER));
    slice.reuse(out);
    Ok(())
}

/// What a roster set asks for, after all checks that need no roster.
enum Wish {
    Put {
        jid: Jid<'static>,
        name: String,
        groups: Vec<String>,
    },
    Remove {
        jid: Jid<'static>,
    },
}

/// 2.3.3, the errors.
fn wish(query: &Element, own: &str, bytes_max: usize) -> Result<Wish, StanzaError> {
    let mut items = query.elements();
    let (Some(item), None) = (items.next(), items.next()) else {
        return Err(StanzaError::BAD_REQUEST.text("a roster set has exactly one item"));
    };
    if !item.is("item", NS) {
        return Err(StanzaError::BAD_REQUEST);
    }
    let jid = item.get("jid").ok_or(StanzaError::BAD_REQUEST)?;
    let jid = Jid::parse(jid)
        .map_err(|_| StanzaError::JID_MALFORMED)?
        .into_owned();
    if item.get("subscription") == Some("remove") {
        return Ok(Wish::Remove { jid });
    }
    if jid.bare() == own {
        return Err(StanzaError::NOT_ALLOWED.text("that is the account itself"));
    }
    let name = item.get("name").unwrap_or_default();
    let groups: Vec<String> = item
        .elements()
        .filter(|e| e.is("group", NS))
        .map(Element::text_content)
        .collect();
    if groups.iter().any(String::is_empty) {
        return Err(StanzaError::NOT_ACCEPTABLE.text("a group has no name"));
    }
    if name.len() + groups.iter().map(String::len).sum::<usize>() > bytes_max {
        return Err(StanzaError::NOT_ACCEPTABLE.text("the name and the groups are too long"));
    }
    if has_doubles(&groups) {
        return Err(StanzaError::BAD_REQUEST.text("the same group twice"));
    }
    Ok(Wish::Put {
        jid,
        name: name.to_owned(),
        groups,
    })
}

/// 2.3.3: groups are compared as resourceparts are.
fn has_doubles(groups: &[String]) -> bool {
    let prepared = |s| jid::resourcepart(s).unwrap_or(Cow::Borrowed(s));
    let mut seen: Vec<Cow<'_, str>> = groups.iter().map(|g| prepared(g)).collect();
    seen.sort_unstable();
    seen.windows(2).any(|pair| pair[0] == pair[1])
}

fn set(slice: &mut Slice, iq: Iq) {
    let bytes_max = slice.env.limits.roster_item_bytes_max;
    match wish(&iq.payload, iq.from.bare(), bytes_max) {
        Ok(Wish::Put { jid, name, groups }) => put(slice, iq, jid, name, groups),
        Ok(Wish::Remove { jid }) => remove(slice, iq, jid),
        Err(error) => slice.iq_error(&iq, &error),
    }
}

/// 2.3 and 2.4: adds an item, or changes its name and groups.
fn put(slice: &mut Slice, iq: Iq, jid: Jid<'static>, name: String, groups: Vec<String>) {
    let user = iq.account().to_owned();
    let Some(item) = item_or_room(slice, &user, jid.as_str()) else {
        return slice.iq_error(&iq, &FULL);
    };
    let item = RosterItem {
        name,
        groups,
        ..item
    };
    let version = slice.next_id();
    let query = push_query(&item, version);
    slice.edit(
        &user,
        |record| {
            record.put_roster_item(item);
            record.roster_version = version;
        },
        Box::new(move |slice, result| match result {
            Ok(()) => {
                slice.iq_result(&iq, None);
                push(slice, iq.account(), &query);
            }
            Err(_) => slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR),
        }),
    );
}

/// 2.5: takes an item out; its subscriptions end.
fn remove(slice: &mut Slice, iq: Iq, jid: Jid<'static>) {
    let user = iq.account().to_owned();
    let Some(item) = item(slice, &user, jid.as_str()) else {
        return slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
    };
    let version = slice.next_id();
    let query = removal_query(jid.as_str(), version);
    slice.edit(
        &user,
        |record| {
            record.remove_roster_item(jid.as_str());
            record.roster_version = version;
        },
        Box::new(move |slice, result| match result {
            Ok(()) => {
                slice.iq_result(&iq, None);
                push(slice, iq.account(), &query);
                subscription::dissolve(slice, iq.account(), &item);
            }
            Err(_) => slice.iq_error(&iq, &StanzaError::INTERNAL_SERVER_ERROR),
        }),
    );
}

/// A new item would be one too many.
pub const FULL: StanzaError = StanzaError::RESOURCE_CONSTRAINT.text("the roster is full");

/// The item of a contact, copied.
pub fn item(slice: &Slice, user: &str, contact: &str) -> Option<RosterItem> {
    let item = slice.user(user)?.record.get().roster_item(contact)?;
    Some(RosterItem {
        jid: item.jid.as_str().to_owned(),
        name: item.name.as_str().to_owned(),
        groups: item.groups.iter().map(|g| g.as_str().to_owned()).collect(),
        subscription: item.subscription(),
        ask: item.ask,
        approved: item.approved,
    })
}

/// The item of a contact, or an empty one if the roster has room for it.
pub fn item_or_room(slice: &Slice, user: &str, contact: &str) -> Option<RosterItem> {
    item(slice, user, contact).or_else(|| {
        let items = slice.user(user)?.record.get().roster.len();
        (items < slice.env.limits.roster_items_max).then(|| RosterItem {
            jid: contact.to_owned(),
            ..RosterItem::default()
        })
    })
}

/// What [`push`] sends for a new or changed item (2.1.6): all of the push behind its start tag's attributes.
pub fn push_query(item: &RosterItem, ver: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(160);
    open_query(&version(ver), &mut out);
    let groups = item.groups.iter().map(String::as_str);
    let flags = (item.subscription, item.ask, item.approved);
    write_item(&item.jid, &item.name, groups, flags, &mut out);
    out.extend_from_slice(b"</query></iq>");
    out
}

/// What [`push`] sends for a removed item (2.5.2).
fn removal_query(contact: &str, ver: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(160);
    open_query(&version(ver), &mut out);
    out.extend_from_slice(b"<item");
    attribute("jid", contact, &mut out);
    out.extend_from_slice(b" subscription='remove'/></query></iq>");
    out
}

/// Sends a push to all interested resources of the user.
pub fn push(slice: &mut Slice, user: &str, query: &[u8]) {
    for sid in slice.sessions_of(user) {
        let id = slice.next_id();
        let mut head = slice.buffer();
        let Some(session) = slice.sessions.get(sid).filter(|s| s.interested) else {
            slice.reuse(head);
            continue;
        };
        head.extend_from_slice(format!("<iq type='set' id='push{id:x}'").as_bytes());
        attribute("to", &session.jid, &mut head);
        slice.send(
            sid,
            &[&head, query],
            Meta::new(Kind::IqSet).with(Meta::SERVER),
        );
        slice.reuse(head);
    }
}

/// The version as clients see it. Opaque to them; the number comes from [`Slice::next_id`], so that no version is used
/// twice, not even by an account that was removed and made again.
fn version(version: u64) -> String {
    format!("{version:x}")
}

/// Ends the start tag of an `<iq>` and opens its query; `</query></iq>` closes both.
fn open_query(version: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"><query xmlns='jabber:iq:roster' ver='");
    out.extend_from_slice(version.as_bytes());
    out.extend_from_slice(b"'>");
}

fn write_archived(item: &ArchivedRosterItem, out: &mut Vec<u8>) {
    let groups = item.groups.iter().map(|g| g.as_str());
    let flags = (item.subscription(), item.ask, item.approved);
    write_item(item.jid.as_str(), item.name.as_str(), groups, flags, out);
}

fn write_item<'a>(
    jid: &str,
    name: &str,
    groups: impl Iterator<Item = &'a str>,
    (subscription, ask, approved): (Subscription, bool, bool),
    out: &mut Vec<u8>,
) {
    out.extend_from_slice(b"<item");
    attribute("jid", jid, out);
    if !name.is_empty() {
        attribute("name", name, out);
    }
    out.extend_from_slice(b" subscription='");
    out.extend_from_slice(subscription.as_str().as_bytes());
    out.push(b'\'');
    if ask {
        out.extend_from_slice(b" ask='subscribe'");
    }
    if approved {
        out.extend_from_slice(b" approved='true'");
    }
    let mut open = false;
    for group in groups {
        if !std::mem::replace(&mut open, true) {
            out.push(b'>');
        }
        out.extend_from_slice(b"<group>");
        escape_text(group, out);
        out.extend_from_slice(b"</group>");
    }
    out.extend_from_slice(if open { "</item>" } else { "/>" }.as_bytes());
}
