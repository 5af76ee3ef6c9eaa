//! Message archive management (XEP-0313): a user's clients read what he has sent and received, in the order in which his owner
//! accepted it, SQL and journal together as one.
//!
//! In: queries to one's own bare JID. Out: a page of results, each the stored bytes between a few that are written anew (no tree
//! is built), and behind them the answer to the query. The id of an entry is its stable id (XEP-0359). Promises: a page is a
//! piece of one consistent view, without holes; a session's queries are answered one after the other; a page does not count
//! against a slow reader, but who has not taken one gets no other. Nobody reads the archive of somebody else.

use std::collections::VecDeque;
use std::io::Write;

use fnv::FnvHashMap;

use super::{Feature, Iq, IqRoute, NONE, Target, rsm, stable_id, time};
use crate::store::change::Id;
use crate::store::tier::{ArchiveQuery, Entry, Page, ReadError};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::message::attribute;
use crate::xmpp::meta::{Kind, Meta};
use crate::xmpp::session::{Session, SessionId};
use crate::xmpp::slice::{Env, Limits, Slice};

pub const NS: &str = "urn:xmpp:mam:2";
const NS_FORM: &str = "jabber:x:data";

pub static FEATURE: Feature = Feature {
    name: "Message archive",
    spec: "XEP-0313",
    version: "1.1.3",
    // no archive of the server's own, so nothing for its domain
    account: &[
        NS,
        "urn:xmpp:mam:2#extended",
        "urn:xmpp:mam:2#groupchat-field",
    ],
    iq: &[
        IqRoute {
            name: "query",
            ns: NS,
            target: Target::Account,
            handle: query,
        },
        IqRoute {
            name: "metadata",
            ns: NS,
            target: Target::Account,
            handle: metadata,
        },
    ],
    ended: Some(forget),
    ..NONE
};

/// Default of [`Limits::archive_page_max`].
pub const PAGE_MAX: u32 = 250;
/// Where a client does not say.
const PAGE: u64 = 50;
/// A page ends before it has more, but has one entry at least.
const PAGE_BYTES_MAX: usize = 1 << 20;
/// Queries of one session that may wait for the one at work.
const WAITING_MAX: usize = 16;
/// It comes back in each result.
const QUERYID_BYTES_MAX: usize = 1024;
/// An [`Id`] holds 42 bits of time.
const UNIX_MS_MAX: i64 = (1 << 42) - 1;

const BEHIND: StanzaError =
    StanzaError::RESOURCE_CONSTRAINT.text("read what was sent before you ask for more");

/// Sessions with a query at work, and what waits behind it, oldest first.
#[derive(Default)]
pub struct Queries(FnvHashMap<SessionId, VecDeque<(Iq, Query)>>);

/// What a client asks.
enum Query {
    Page(Box<PageQuery>),
    Metadata,
}

pub struct PageQuery {
    pub wanted: ArchiveQuery,
    /// Given back in each result.
    queryid: Option<String>,
    /// Newest first on the wire (section 4.3.4).
    flipped: bool,
}

fn query(slice: &mut Slice, mut iq: Iq) {
    slice.iq_reads(&mut iq);
    if !iq.own() {
        return slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    }
    if !iq.set {
        return slice.iq_result(&iq, Some(Element::new("query", NS).child(form())));
    }
    match read_query(&slice.env, &iq) {
        Ok(query) => ask(slice, iq, Query::Page(Box::new(query))),
        Err(error) => slice.iq_error(&iq, &error),
    }
}

fn metadata(slice: &mut Slice, iq: Iq) {
    if !iq.own() {
        slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    } else if iq.set {
        slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    } else {
        ask(slice, iq, Query::Metadata);
    }
}

/// Must a request to a user who does not exist be answered by `<forbidden/>`? It would be if he did.
pub fn forbids(to: &Jid<'_>, stanza: &[u8], meta: Meta) -> bool {
    to.resource().is_none()
        && matches!(meta.kind, Kind::IqGet | Kind::IqSet)
        && memchr::memmem::find(stanza, NS.as_bytes()).is_some()
        && crate::xmpp::parse_stanza(stanza).is_some_and(|iq| {
            let payload = iq.elements().next();
            let asks = |p: &Element| ["query", "metadata", "prefs"].iter().any(|n| p.is(n, NS));
            payload.is_some_and(asks)
        })
}

// ---- the request -------------------------------------------------------------------------------------------------------

/// The fields that [`fill`] knows (section 4.1.5).
pub fn form() -> Element {
    let field = |typ: &str, var: &str| {
        Element::new("field", NS_FORM)
            .attr("type", typ)
            .attr("var", var)
    };
    // any value, not one of a list
    let open = "http://jabber.org/protocol/xdata-validate";
    let open = Element::new("validate", open)
        .attr("datatype", "xs:string")
        .child(Element::new("open", open));
    Element::new("x", NS_FORM)
        .attr("type", "form")
        .child(field("hidden", "FORM_TYPE").child(Element::new("value", NS_FORM).text(NS)))
        .child(field("jid-single", "with"))
        .child(field("text-single", "start"))
        .child(field("text-single", "end"))
        .child(field("text-single", "before-id"))
        .child(field("text-single", "after-id"))
        .child(field("list-multi", "ids").child(open))
        .child(field("boolean", "include-groupchat"))
}

pub fn read_query(env: &Env, iq: &Iq) -> Result<PageQuery, StanzaError> {
    if iq.payload.get("node").is_some() {
        // XEP-0442: for archives of publish-subscribe nodes
        return Err(StanzaError::ITEM_NOT_FOUND);
    }
    let queryid = iq.payload.get("queryid");
    if queryid.is_some_and(|id| id.len() > QUERYID_BYTES_MAX) {
        return Err(StanzaError::POLICY_VIOLATION.text("the queryid is too long"));
    }
    let page = rsm::Wanted::of(&iq.payload)?;
    let id = |id: &Option<String>| id.as_deref().map(|id| entry_id(env, id)).transpose();
    let most = page.max.unwrap_or(PAGE);
    let mut wanted = ArchiveQuery {
        name: iq.account().into(),
        after: id(&page.after)?,
        before: id(&page.before)?,
        backwards: page.backwards,
        most: most.min(env.limits.archive_page_max.into()) as u32,
        ..ArchiveQuery::default()
    };
    // To count is to touch all that matches. On his way from page to page a client knows the number already, and counting for
    // each of them would make the way as long as its square (XEP-0313 section 4.3.2: may be left out).
    wanted.count = most == 0 || (wanted.after.is_none() && wanted.before.is_none());
    let mut forms = iq.payload.elements().filter(|e| e.is("x", NS_FORM));
    if let Some(form) = forms.next() {
        fill(env, form, &mut wanted)?;
    }
    if forms.next().is_some() {
        return Err(StanzaError::BAD_REQUEST);
    }
    Ok(PageQuery {
        wanted,
        queryid: queryid.map(str::to_owned),
        flipped: iq.payload.find("flip-page", NS).is_some(),
    })
}

/// Puts the filters of a form (section 4.1, XEP-0004) into the query. A field without value is one that is not there.
fn fill(env: &Env, form: &Element, wanted: &mut ArchiveQuery) -> Result<(), StanzaError> {
    if form.get("type") != Some("submit") {
        return Err(StanzaError::BAD_REQUEST);
    }
    let mut seen = Vec::new();
    for field in form.elements().filter(|e| e.is("field", NS_FORM)) {
        let var = field.get("var").ok_or(StanzaError::BAD_REQUEST)?;
        let values = field.elements().filter(|e| e.is("value", NS_FORM));
        let values: Vec<String> = values.map(Element::text_content).collect();
        let value = values.first().map(String::as_str);
        if seen.contains(&var) || (values.len() > 1 && var != "ids") {
            return Err(StanzaError::BAD_REQUEST);
        }
        let id = || value.map(|id| entry_id(env, id)).transpose();
        match var {
            "FORM_TYPE" if value == Some(NS) => {}
            "FORM_TYPE" => return Err(StanzaError::BAD_REQUEST),
            "with" => {
                let jid = value.map(Jid::parse).transpose();
                let jid = jid.map_err(|_| StanzaError::BAD_REQUEST)?;
                wanted.with = jid.map(|jid| jid.as_str().into());
            }
            "start" => {
                let start = value.map(moment).transpose()?;
                wanted.start_ms =
                    start.map(|(ms, exact)| (ms + i64::from(!exact)).clamp(0, UNIX_MS_MAX) as u64);
            }
            "end" => {
                let end = value.map(moment).transpose()?;
                let end = end.filter(|(ms, _)| *ms < UNIX_MS_MAX);
                wanted.end_ms = end.map(|(ms, _)| ms.max(0) as u64);
            }
            "before-id" => wanted.before_id = id()?,
            "after-id" => wanted.after_id = id()?,
            "ids" if values.len() > env.limits.archive_page_max as usize => {
                return Err(StanzaError::POLICY_VIOLATION.text("too many ids in one query"));
            }
            "ids" => {
                let ids = values.iter().map(|id| entry_id(env, id));
                wanted.ids = ids.collect::<Result<_, _>>()?;
                wanted.ids.sort_unstable();
                wanted.ids.dedup();
            }
            // messages of rooms are in the archives of rooms: there is nothing to include or to leave out
            "include-groupchat" => {
                if !matches!(value, None | Some("true" | "false" | "1" | "0")) {
                    return Err(StanzaError::BAD_REQUEST);
                }
            }
            _ => return Err(StanzaError::FEATURE_NOT_IMPLEMENTED),
        }
        seen.push(var);
    }
    match seen.contains(&"FORM_TYPE") {
        true => Ok(()),
        false => Err(StanzaError::BAD_REQUEST),
    }
}

fn moment(text: &str) -> Result<(i64, bool), StanzaError> {
    time::parse(text).ok_or(StanzaError::BAD_REQUEST)
}

/// The id behind one that a client names. An error: no archive ever gave it.
fn entry_id(env: &Env, text: &str) -> Result<u64, StanzaError> {
    let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    let shown = Some(text)
        .filter(|text| text.len() == 16 && text.bytes().all(hex))
        .and_then(|text| u64::from_str_radix(text, 16).ok());
    shown
        .map(|shown| stable_id::unpermute(shown, env.id_key))
        .filter(|id| i64::try_from(*id).is_ok())
        .ok_or(StanzaError::ITEM_NOT_FOUND)
}

// ---- one query after the other -----------------------------------------------------------------------------------------

fn ask(slice: &mut Slice, iq: Iq, query: Query) {
    let Some(sid) = iq.session else {
        return slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    };
    match slice.archive.0.get_mut(&sid) {
        None => {
            slice.archive.0.insert(sid, VecDeque::new());
            work(slice, sid, iq, query);
        }
        Some(waiting) if waiting.len() < WAITING_MAX => waiting.push_back((iq, query)),
        Some(_) => slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT),
    }
}

fn work(slice: &mut Slice, sid: SessionId, iq: Iq, query: Query) {
    if is_behind(slice, sid) {
        slice.iq_error(&iq, &BEHIND);
        return next(slice, sid);
    }
    match query {
        Query::Page(query) => {
            let wanted = query.wanted.clone();
            let then = move |slice: &mut Slice, page| {
                match page {
                    Ok(page) => show(slice, sid, &iq, &query, page),
                    Err(error) => cannot_read(slice, &iq, &error),
                }
                next(slice, sid);
            };
            slice.read_archive(wanted, Box::new(then));
        }
        Query::Metadata => tell_ends(slice, sid, iq),
    }
}

/// The query at work is over: the next one.
fn next(slice: &mut Slice, sid: SessionId) {
    // the session may have ended meanwhile
    let Some(waiting) = slice.archive.0.get_mut(&sid) else {
        return;
    };
    match waiting.pop_front() {
        Some((iq, query)) => work(slice, sid, iq, query),
        None => {
            slice.archive.0.remove(&sid);
        }
    }
}

fn forget(slice: &mut Slice, session: &mut Session) {
    slice.archive.0.remove(&session.id);
}

fn cannot_read(slice: &mut Slice, iq: &Iq, error: &ReadError) {
    tracing::warn!(user = iq.account(), %error, "an archive could not be read");
    slice.iq_error(iq, &StanzaError::RESOURCE_CONSTRAINT);
}

/// Waits more for the client than it may leave waiting, its offline messages included? A page may be on top of that, once.
pub fn is_behind(slice: &Slice, sid: SessionId) -> bool {
    let limits: &Limits = &slice.env.limits;
    let (bytes, stanzas) = offline(limits);
    slice.sessions.get(sid).is_some_and(|session| {
        session.unsent + session.out.len() > limits.send_queue_bytes_max + bytes
            || session.sm.as_ref().is_some_and(|sm| {
                sm.over(
                    limits.unacked_bytes_max + bytes,
                    limits.unacked_stanzas_max + stanzas,
                )
            })
    })
}

/// Bytes and stanzas that a log-in may bring at once.
fn offline(limits: &Limits) -> (usize, usize) {
    (limits.offline_bytes_max, limits.offline_messages_max)
}

// ---- the answer --------------------------------------------------------------------------------------------------------

/// `<message><result><forwarded><delay/><message/></forwarded></result></message>` for each entry, and `<fin/>`.
fn show(slice: &mut Slice, sid: SessionId, iq: &Iq, query: &PageQuery, mut page: Page) {
    if !page.missing.is_empty() {
        return slice.iq_error(iq, &StanzaError::ITEM_NOT_FOUND);
    }
    if is_behind(slice, sid) {
        return slice.iq_error(iq, &BEHIND);
    }
    let (mut head, mut own) = (slice.buffer(), slice.buffer());
    let Some(session) = slice.sessions.get_mut(sid) else {
        return;
    };
    // it is not behind, so this and the page are all that needs to be allowed, whatever was allowed before
    session.burst = offline(&slice.env.limits);
    head.extend_from_slice(b"<message");
    attribute("from", session.bare(), &mut head);
    attribute("to", &session.jid, &mut head);
    head.extend_from_slice(b"><result xmlns='urn:xmpp:mam:2'");
    if let Some(queryid) = &query.queryid {
        attribute("queryid", queryid, &mut head);
    }
    cut(&mut page, query.wanted.backwards, head.len());
    let meta = Meta::new(Kind::Normal).with(Meta::SERVER | Meta::COPY);
    let key = slice.env.id_key;
    let shown_id = |id: u64| stable_id::shown(id, key);
    let mut bytes = 0;
    let count = page.entries.len();
    for at in 0..count {
        let entry = &page.entries[if query.flipped { count - 1 - at } else { at }];
        own.clear();
        write!(
            own,
            " id='{:016x}'><forwarded xmlns='urn:xmpp:forward:0'><delay xmlns='urn:xmpp:delay' stamp='{}'/>",
            stable_id::permute(entry.id, key),
            time::stamp_ms(Id(entry.id).unix_ms()),
        )
        .expect("writing to memory succeeds");
        // the server's own writing: unprefixed, its default namespace left to the stream
        let (open, stanza): (&[u8], _) = match entry.stanza.strip_prefix(b"<message") {
            Some(rest) => (b"<message xmlns='jabber:client'", rest),
            None => (b"", &b""[..]),
        };
        let parts = [
            &head,
            &own,
            open,
            stanza,
            b"</forwarded></result></message>",
        ];
        bytes += parts.iter().map(|part| part.len()).sum::<usize>();
        slice.send(sid, &parts, meta);
    }
    slice.allow(sid, (bytes, count));
    slice.reuse(head);
    slice.reuse(own);
    let set = rsm::Shown {
        ends: page
            .entries
            .first()
            .zip(page.entries.last())
            .map(|(first, last)| (shown_id(first.id), shown_id(last.id))),
        // Optional (XEP-0059 2.6), and a widespread library takes index and length for the end of its way, also backwards.
        index: page.index.filter(|_| !query.wanted.backwards),
        count: page.count,
    };
    let fin = Element::new("fin", NS);
    let fin = match page.complete {
        true => fin.attr("complete", "true"),
        false => fin,
    };
    slice.iq_result(iq, Some(fin.child(set.element())));
}

/// The same for somebody who is no session of this slice, from another archive than his own: messages that begin with `head` (no
/// `to`), and what ends them.
pub fn results(
    env: &Env,
    head: &[u8],
    query: &PageQuery,
    page: &mut Page,
) -> (Vec<Vec<u8>>, Element) {
    cut(page, query.wanted.backwards, head.len());
    let shown_id = |id: u64| format!("{:016x}", stable_id::permute(id, env.id_key));
    let result = |entry: &Entry| {
        let mut out = head.to_vec();
        out.extend_from_slice(b"><result xmlns='urn:xmpp:mam:2'");
        if let Some(queryid) = &query.queryid {
            attribute("queryid", queryid, &mut out);
        }
        let (id, stamp) = (shown_id(entry.id), time::stamp_ms(Id(entry.id).unix_ms()));
        write!(
            out,
            " id='{id}'><forwarded xmlns='urn:xmpp:forward:0'><delay xmlns='urn:xmpp:delay' stamp='{stamp}'/>"
        )
        .expect("writing to memory succeeds");
        if let Some(rest) = entry.stanza.strip_prefix(b"<message") {
            out.extend_from_slice(b"<message xmlns='jabber:client'");
            out.extend_from_slice(rest);
        }
        out.extend_from_slice(b"</forwarded></result></message>");
        out
    };
    let mut stanzas: Vec<Vec<u8>> = page.entries.iter().map(result).collect();
    if query.flipped {
        stanzas.reverse();
    }
    let ends = page.entries.first().zip(page.entries.last());
    let set = rsm::Shown {
        ends: ends.map(|(first, last)| (shown_id(first.id), shown_id(last.id))),
        index: page.index,
        count: page.count,
    };
    let mut fin = Element::new("fin", NS);
    if page.complete {
        fin.set("complete", "true");
    }
    (stanzas, fin.child(set.element()))
}

/// Leaves of a page what may go out at once; `overhead`: bytes on top of each stanza.
fn cut(page: &mut Page, backwards: bool, overhead: usize) {
    let mut room = PAGE_BYTES_MAX;
    let mut fits = |stanza: &[u8]| {
        let bytes = stanza.len() + overhead;
        let fits = bytes <= room;
        room = room.saturating_sub(bytes);
        fits
    };
    let entries = &mut page.entries;
    let all = entries.len();
    let kept = match backwards {
        true => entries.iter().rev().take_while(|e| fits(&e.stanza)).count(),
        false => entries.iter().take_while(|e| fits(&e.stanza)).count(),
    };
    let kept = kept.max(1);
    if kept >= all {
        return;
    }
    page.complete = false;
    if backwards {
        entries.drain(..all - kept);
        page.index = page.index.map(|index| index + (all - kept) as u64);
    } else {
        entries.truncate(kept);
    }
}

/// The same as text, for who binds (XEP-0386), where it is in memory: a log-in waits for no database.
pub fn known_ends(slice: &mut Slice, account: &str) -> Option<String> {
    let known = slice.archive_ends(account, false)?;
    let mut text = Vec::new();
    ends(&slice.env, known).write(&mut text, crate::xmpp::sasl2::NS_BIND);
    String::from_utf8(text).ok()
}

/// Section 5: the first and the last entry.
fn tell_ends(slice: &mut Slice, sid: SessionId, iq: Iq) {
    if let Some(known) = slice.archive_ends(iq.account(), true) {
        let metadata = ends(&slice.env, known);
        slice.iq_result(&iq, Some(metadata));
        return next(slice, sid);
    }
    let first = ArchiveQuery {
        name: iq.account().into(),
        most: 1,
        ..ArchiveQuery::default()
    };
    let last = ArchiveQuery {
        backwards: true,
        ..first.clone()
    };
    // the last one first: with it the archive is among those in memory, where the first one is kept, too
    let then = move |slice: &mut Slice, last: Result<Page, ReadError>| {
        let then = move |slice: &mut Slice, first: Result<Page, ReadError>| {
            match (first, last) {
                (Ok(first), Ok(last)) => {
                    let (first, last) = (first.entries.first(), last.entries.last());
                    let found = first.zip(last).map(|(first, last)| (first.id, last.id));
                    let metadata = ends(&slice.env, found);
                    slice.iq_result(&iq, Some(metadata));
                }
                (Err(error), _) | (_, Err(error)) => cannot_read(slice, &iq, &error),
            }
            next(slice, sid);
        };
        slice.read_archive(first, Box::new(then));
    };
    slice.read_archive(last, Box::new(then));
}

/// `ends`: ids of the first and the last entry, if there is one.
fn ends(env: &Env, ends: Option<(u64, u64)>) -> Element {
    let end = |name: &str, id: u64| {
        Element::new(name, NS)
            .attr("id", stable_id::shown(id, env.id_key))
            .attr("timestamp", time::stamp_ms(Id(id).unix_ms()))
    };
    let metadata = Element::new("metadata", NS);
    match ends {
        Some((first, last)) => metadata.child(end("start", first)).child(end("end", last)),
        None => metadata,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::*;
    use crate::store::tier::Entry;
    use crate::xmpp::parse_stanza;
    use crate::xmpp::testing::{Client, World, matches};

    const NS_CLIENT: &str = crate::xmpp::NS_CLIENT;

    /// Alice, whose archive it is, and whom she writes to.
    struct Scene {
        w: World,
        alice: String,
        bob: String,
        carol: String,
        a: Client,
        b: Client,
        c: Client,
    }

    /// A result on its way.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Shown {
        id: String,
        body: String,
        stamp: String,
    }

    impl Scene {
        fn new() -> Scene {
            Scene::with(|_| {})
        }

        fn with(change: impl Fn(&mut Limits)) -> Scene {
            let mut w = World::with(2, change);
            let (alice, bob, carol) = (w.on(0, "alice"), w.on(1, "bob"), w.on(0, "carol"));
            for name in [&alice, &bob, &carol] {
                w.add(name);
            }
            let a = w.online(&alice, "a");
            let b = w.online(&bob, "b");
            let c = w.online(&carol, "c");
            Scene {
                w,
                alice,
                bob,
                carol,
                a,
                b,
                c,
            }
        }

        /// `most` messages, told apart by their bodies "0", "1", …: to Bob, from Bob, to Carol, from Carol, to Bob, …, one a
        /// second. SQL has the first `drained` of them.
        fn talk(&mut self, most: usize, drained: usize) {
            for n in 0..most {
                self.w.tier.dry = n >= drained;
                let (client, to) = match n % 4 {
                    0 => (self.a, format!("{}@localhost", self.bob)),
                    1 => (self.b, format!("{}@localhost/a", self.alice)),
                    2 => (self.a, format!("{}@localhost/c", self.carol)),
                    _ => (self.c, format!("{}@localhost", self.alice)),
                };
                let message = format!("<message type='chat' to='{to}'><body>{n}</body></message>");
                self.w.send(client, &message);
                self.w.advance(1000);
            }
            self.w.tier.dry = drained < most;
            self.quiet();
        }

        /// What the clients have got so far is of no interest.
        fn quiet(&mut self) {
            for client in [self.a, self.b, self.c] {
                self.w.take(client);
            }
        }

        /// Alice asks; the results, and the answer to her request.
        fn ask(&mut self, attrs: &str, inner: &str) -> (Vec<Shown>, Element) {
            let query =
                format!("<iq type='set' id='q'><query xmlns='{NS}'{attrs}>{inner}</query></iq>");
            self.w.send(self.a, &query);
            self.answer()
        }

        fn answer(&mut self) -> (Vec<Shown>, Element) {
            let mut got = self.w.take(self.a);
            let answer = got.pop().expect("a request is answered");
            let answer = parse_stanza(answer.as_bytes()).unwrap();
            assert!(
                answer.is("iq", NS_CLIENT),
                "the answer is the last: {answer:?}"
            );
            (got.iter().map(|xml| shown(xml)).collect(), answer)
        }

        /// Bodies of the results, the `<fin/>`.
        fn page(&mut self, inner: &str) -> (Vec<Shown>, Fin) {
            let (results, answer) = self.ask("", inner);
            let fin = Fin::of(&answer);
            let ends = results.first().zip(results.last());
            let ends = ends.map(|(first, last)| (first.id.clone(), last.id.clone()));
            assert_eq!(fin.ends, ends);
            (results, fin)
        }

        fn bodies(&mut self, inner: &str) -> Vec<String> {
            self.page(inner).0.into_iter().map(|r| r.body).collect()
        }

        #[track_caller]
        fn refused(&mut self, inner: &str, condition: &str) {
            let (results, answer) = self.ask("", inner);
            let error = answer.find("error", NS_CLIENT);
            let is = error.is_some_and(|e| e.elements().next().unwrap().name == condition);
            assert!(
                results.is_empty() && is,
                "{inner}: wanted {condition}, got {answer:?}"
            );
        }

        /// Past the protocol: a page with count and index.
        fn read(&mut self, query: ArchiveQuery) -> Page {
            let page = Rc::new(RefCell::new(None));
            let put = page.clone();
            let then = move |_: &mut Slice, read| *put.borrow_mut() = Some(read);
            let slice = self.w.slice_of(&self.alice);
            slice.read_archive(query, Box::new(then));
            self.w.run();
            page.take().expect("a read is answered").unwrap()
        }

        fn all(&mut self) -> Vec<Entry> {
            let query = ArchiveQuery {
                name: (*self.alice).into(),
                most: u32::MAX,
                ..ArchiveQuery::default()
            };
            self.read(query).entries
        }
    }

    #[derive(Debug, PartialEq, Eq)]
    struct Fin {
        complete: bool,
        ends: Option<(String, String)>,
        index: Option<u64>,
        count: Option<u64>,
    }

    impl Fin {
        fn of(answer: &Element) -> Fin {
            assert_eq!(answer.get("type"), Some("result"), "{answer:?}");
            let fin = answer.find("fin", NS).unwrap();
            let set = fin.find("set", rsm::NS).unwrap();
            let text = |name: &str| set.find(name, rsm::NS).map(Element::text_content);
            let index = set.find("first", rsm::NS).and_then(|e| e.get("index"));
            Fin {
                complete: match fin.get("complete") {
                    Some("true") => true,
                    None => false,
                    other => panic!("complete={other:?}"),
                },
                ends: text("first").zip(text("last")),
                index: index.map(|n| n.parse().unwrap()),
                count: text("count").map(|n| n.parse().unwrap()),
            }
        }
    }

    fn shown(xml: &str) -> Shown {
        let element = parse_stanza(xml.as_bytes()).unwrap();
        let result = element
            .find("result", NS)
            .unwrap_or_else(|| panic!("{xml}"));
        let forwarded = result.find("forwarded", "urn:xmpp:forward:0").unwrap();
        let delay = forwarded.find("delay", "urn:xmpp:delay").unwrap();
        let message = forwarded.find("message", NS_CLIENT).unwrap();
        Shown {
            id: result.get("id").unwrap().to_owned(),
            body: message.find("body", NS_CLIENT).unwrap().text_content(),
            stamp: delay.get("stamp").unwrap().to_owned(),
        }
    }

    fn form(fields: &str) -> String {
        format!(
            "<x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE' type='hidden'><value>{NS}</value></field>\
             {fields}</x>"
        )
    }

    fn field(var: &str, value: &str) -> String {
        format!("<field var='{var}'><value>{value}</value></field>")
    }

    fn filter(var: &str, value: &str) -> String {
        form(&field(var, value))
    }

    fn set(inner: &str) -> String {
        format!("<set xmlns='http://jabber.org/protocol/rsm'>{inner}</set>")
    }

    #[test]
    fn a_query_gives_what_was_sent_and_received_and_then_the_end() {
        for drained in [2, 1, 0] {
            let mut s = Scene::new();
            s.talk(2, drained);
            let (alice, bob) = (s.alice.clone(), s.bob.clone());
            s.w.send(
                s.a,
                &format!(
                    "<iq type='set' id='juliet1'><query xmlns='{NS}' queryid='f&apos;27'/></iq>"
                ),
            );
            let result = |stamp: &str, ends: &str, body: &str| {
                format!(
                    "<message from='{alice}@localhost' to='{alice}@localhost/a'>\
                     <result xmlns='urn:xmpp:mam:2' queryid='f&apos;27' id='*'><forwarded xmlns='urn:xmpp:forward:0'>\
                     <delay xmlns='urn:xmpp:delay' stamp='{stamp}'/><message xmlns='jabber:client' {ends} type='chat'>\
                     <body>{body}</body></message></forwarded></result></message>"
                )
            };
            let sent = format!("to='{bob}@localhost' from='{alice}@localhost/a'");
            let received = format!("to='{alice}@localhost/a' from='{bob}@localhost/b'");
            let got = s.w.take(s.a);
            assert_eq!(got.len(), 3, "{got:#?}");
            let wanted = [
                result("2026-09-21T14:13:20.000Z", &sent, "0"),
                result("2026-09-21T14:13:21.000Z", &received, "1"),
            ];
            assert!(
                matches(&wanted[0], &got[0]) && matches(&wanted[1], &got[1]),
                "{got:#?}"
            );
            let fin = format!(
                "<iq type='result' id='juliet1' to='{alice}@localhost/a'><fin xmlns='{NS}' complete='true'>\
                 <set xmlns='http://jabber.org/protocol/rsm'><first index='0'>{}</first><last>{}</last><count>2</count></set>\
                 </fin></iq>",
                shown(&got[0]).id,
                shown(&got[1]).id,
            );
            assert!(matches(&fin, &got[2]), "{fin}\n{}", got[2]);
        }
    }

    #[test]
    fn an_entry_has_the_id_that_its_message_came_with() {
        let mut s = Scene::new();
        let message = format!(
            "<message type='chat' to='{}@localhost'><body>1</body></message>",
            s.alice
        );
        s.w.send(s.b, &message);
        let live = parse_stanza(s.w.take(s.a)[0].as_bytes()).unwrap();
        let id = live.find("stanza-id", "urn:xmpp:sid:0").unwrap();
        let (id, ids) = (id.get("id").unwrap(), filter("ids", id.get("id").unwrap()));
        let (results, _) = s.page(&ids);
        assert_eq!(results[0].id, id);
        assert_eq!(s.page("").0, results);
    }

    #[test]
    fn filters_are_those_of_the_specification() {
        for drained in 0..=8 {
            let mut s = Scene::new();
            s.talk(8, drained);
            let (bob, carol) = (s.bob.clone(), s.carol.clone());
            let ids: Vec<String> = s.page("").0.into_iter().map(|r| r.id).collect();
            let second = |n: u64| format!("2026-09-21T14:13:{:02}Z", 20 + n);
            for (fields, bodies) in [
                ("".to_owned(), "01234567"),
                (field("with", &format!("{bob}@localhost")), "0145"),
                (
                    field("with", &format!("{}@LOCALHOST", bob.to_uppercase())),
                    "0145",
                ),
                (field("with", &format!("{bob}@localhost/b")), "15"),
                (field("with", &format!("{carol}@localhost/c")), "2367"),
                (field("with", "localhost"), ""),
                (field("with", "nobody@example.org"), ""),
                (
                    field("start", "2010-06-07T00:00:00Z") + &field("end", "2010-07-07T13:23:54Z"),
                    "",
                ),
                (field("start", "2010-08-07T00:00:00Z"), "01234567"),
                (
                    field("start", &second(2)) + &field("end", &second(5)),
                    "2345",
                ),
                (field("start", "2026-09-21T16:13:22.0001+02:00"), "34567"),
                (field("end", "2026-09-21T14:13:22.0009Z"), "012"),
                (field("start", "9999-12-31T23:59:59Z"), ""),
                (field("end", "9999-12-31T23:59:59Z"), "01234567"),
                (field("end", "1066-10-14T09:00:00Z"), ""),
                (field("start", "1066-10-14T09:00:00Z"), "01234567"),
                (field("after-id", &ids[2]), "34567"),
                (field("before-id", &ids[2]), "01"),
                (
                    field("after-id", &ids[1]) + &field("before-id", &ids[6]),
                    "2345",
                ),
                (
                    field("after-id", &ids[6]) + &field("before-id", &ids[1]),
                    "",
                ),
                (field("ids", &ids[5]), "5"),
                (
                    format!(
                        "<field var='ids' type='list-multi'><value>{}</value><value>{}</value><value>{0}</value></field>",
                        ids[6], ids[0]
                    ),
                    "06",
                ),
                (
                    field("ids", &ids[5]) + &field("with", &format!("{carol}@localhost")),
                    "",
                ),
                (field("include-groupchat", "true"), "01234567"),
                (
                    field("include-groupchat", "false") + &field("after-id", &ids[5]),
                    "67",
                ),
                (
                    "<field var='with'/><field var='ids' type='list-multi'/>".to_owned(),
                    "01234567",
                ),
            ] {
                let (results, fin) = s.page(&form(&fields));
                let got: String = results.into_iter().map(|r| r.body).collect();
                assert_eq!(got, bodies, "{drained}: {fields}");
                assert!(fin.complete);
                assert_eq!(fin.count, Some(bodies.len() as u64), "{drained}: {fields}");
                assert_eq!(fin.index, (!bodies.is_empty()).then_some(0));
            }
        }
    }

    #[test]
    fn a_stamp_names_its_own_message() {
        let mut s = Scene::new();
        for _ in 0..3 {
            let message = format!(
                "<message type='chat' to='{}@localhost'><body>x</body></message>",
                s.bob
            );
            s.w.send(s.a, &message);
            s.w.advance(7);
        }
        let all = s.page("").0;
        assert_eq!(all[1].stamp, "2026-09-21T14:13:20.007Z");
        let only = field("start", &all[1].stamp) + &field("end", &all[1].stamp);
        assert_eq!(s.page(&form(&only)).0, [all[1].clone()]);
    }

    #[test]
    fn pages_join_without_gap_or_double_wherever_the_journal_begins() {
        const MOST: usize = 6;
        for drained in 0..=MOST {
            let mut s = Scene::new();
            s.talk(MOST, drained);
            let with_bob = filter("with", &format!("{}@localhost", s.bob));
            for filter in ["", &with_bob] {
                let all = s.page(filter).0;
                for size in 1..=MOST + 1 {
                    for backwards in [false, true] {
                        let mut walked: Vec<Shown> = Vec::new();
                        loop {
                            let place = match (backwards, walked.first(), walked.last()) {
                                (false, _, None) => String::new(),
                                (false, _, Some(last)) => format!("<after>{}</after>", last.id),
                                (true, None, _) => "<before/>".to_owned(),
                                (true, Some(first), _) => format!("<before>{}</before>", first.id),
                            };
                            let first_page = walked.is_empty();
                            let set = set(&format!("<max>{size}</max>{place}"));
                            let (page, fin) = s.page(&format!("{filter}{set}"));
                            let left = all.len() - walked.len();
                            assert_eq!(page.len(), size.min(left), "{drained} {set}");
                            assert_eq!(fin.complete, left <= size, "{drained} {set}");
                            if first_page {
                                assert_eq!(fin.count, Some(all.len() as u64));
                                assert_eq!(fin.index, (!backwards).then_some(0));
                            } else {
                                assert_eq!((fin.count, fin.index), (None, None));
                            }
                            match backwards {
                                false => walked.extend(page),
                                true => drop(walked.splice(0..0, page)),
                            }
                            if fin.complete {
                                break;
                            }
                        }
                        assert_eq!(walked, all, "{drained} {size} {backwards}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_page_that_can_be_asked_for_has_its_entries_count_and_index() {
        const MOST: usize = 6;
        for drained in 0..=MOST {
            let mut s = Scene::new();
            s.talk(MOST, drained);
            let all = s.all();
            let name: Box<str> = (*s.alice).into();
            let bob: Box<str> = format!("{}@localhost", s.bob).into();
            let places = || std::iter::once(None).chain(all.iter().map(|e| Some(e.id)));
            for with in [None, Some(bob)] {
                let matching: Vec<&Entry> = all
                    .iter()
                    .filter(|e| with.as_ref().is_none_or(|bob| e.peer.starts_with(&**bob)))
                    .collect();
                for (after, before) in places().flat_map(|a| places().map(move |b| (a, b))) {
                    for (most, backwards) in (0..=MOST + 1).flat_map(|m| [(m, false), (m, true)]) {
                        let query = ArchiveQuery {
                            name: name.clone(),
                            with: with.clone(),
                            after,
                            before,
                            backwards,
                            most: most as u32,
                            count: true,
                            ..ArchiveQuery::default()
                        };
                        let mut wanted: Vec<&Entry> = matching
                            .iter()
                            .copied()
                            .filter(|e| after.is_none_or(|a| e.id > a))
                            .filter(|e| before.is_none_or(|b| e.id < b))
                            .collect();
                        let complete = wanted.len() <= most;
                        if backwards {
                            wanted.drain(..wanted.len() - most.min(wanted.len()));
                        }
                        wanted.truncate(most);
                        let index = wanted
                            .first()
                            .and_then(|f| matching.iter().position(|e| e.id == f.id));
                        let page = s.read(query.clone());
                        assert!(
                            page.entries.iter().eq(wanted),
                            "{drained} {query:?} {page:?}"
                        );
                        assert_eq!(page.complete, complete, "{drained} {query:?} {page:?}");
                        assert_eq!(page.count, Some(matching.len() as u64));
                        assert_eq!(page.index, index.map(|i| i as u64), "{drained} {query:?}");
                        assert!(page.missing.is_empty());
                    }
                }
            }
        }
    }

    impl Scene {
        /// What Alice's archive holds, past all that reads it.
        fn truth(&mut self) -> Vec<Entry> {
            let name = self.alice.clone();
            let mut all = self.w.tier.users[&name].archive.clone();
            let overlay = &self.w.slice_of(&name).overlay;
            for (id, place) in overlay.archived(&name, 0) {
                let (entry, _) = overlay.entry(place, &mut Vec::new()).unwrap();
                all.insert(id, entry);
            }
            all.into_values().collect()
        }
    }

    /// XEP-0313 and XEP-0059 as simply as can be.
    fn model(all: &[Entry], query: &ArchiveQuery) -> Page {
        let matching: Vec<&Entry> = all.iter().filter(|e| query.matches(e)).collect();
        let mut entries: Vec<Entry> = matching
            .iter()
            .filter(|e| query.after.is_none_or(|after| e.id > after))
            .filter(|e| query.before.is_none_or(|before| e.id < before))
            .map(|e| (*e).clone())
            .collect();
        let complete = entries.len() <= query.most as usize;
        while entries.len() > query.most as usize {
            match query.backwards {
                true => drop(entries.remove(0)),
                false => drop(entries.pop()),
            }
        }
        let first = entries.first().map(|first| first.id);
        let index = first.map(|id| matching.iter().filter(|e| e.id < id).count() as u64);
        Page {
            entries,
            complete,
            count: query.count.then_some(matching.len() as u64),
            index: index.filter(|_| query.count),
            ..Page::default()
        }
    }

    /// What happens between two queries, and how they are put together: places are taken modulo what there is.
    #[derive(Debug, Clone)]
    enum Step {
        Say(u8),
        /// Is SQL to take what the journals hold from now on?
        Dry(bool),
        Drain,
        Ask {
            with: u8,
            bounds: [Option<u8>; 6],
            backwards: bool,
            most: u8,
            count: bool,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        let bound = || prop::option::weighted(0.2, any::<u8>());
        let bounds = [bound(), bound(), bound(), bound(), bound(), bound()];
        prop_oneof![
            3 => any::<u8>().prop_map(Step::Say),
            1 => any::<bool>().prop_map(Step::Dry),
            1 => Just(Step::Drain),
            6 => (0u8..6, bounds, any::<bool>(), 0u8..9, any::<bool>()).prop_map(
                |(with, bounds, backwards, most, count)| Step::Ask {
                    with,
                    bounds,
                    backwards,
                    most,
                    count,
                }
            ),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Wherever the entries lie: SQL, overlay, memory.
        #[test]
        fn any_query_is_answered_as_a_simple_model_does_it(
            steps in prop::collection::vec(step(), 1..60),
            room in prop_oneof![Just(0usize), Just(3000), Just(1 << 20)],
        ) {
            let mut s = Scene::with(|limits| limits.archive_recent_bytes_max = room);
            for step in steps {
                match step {
                    Step::Say(n) => {
                        let (client, to) = match n % 4 {
                            0 => (s.a, format!("{}@localhost", s.bob)),
                            1 => (s.b, format!("{}@localhost/a", s.alice)),
                            2 => (s.c, format!("{}@localhost", s.alice)),
                            _ => (s.a, format!("{}@localhost", s.alice)),
                        };
                        let message =
                            format!("<message type='chat' to='{to}'><body>{n}</body></message>");
                        s.w.send(client, &message);
                        s.w.advance(u64::from(n / 4));
                        s.quiet();
                    }
                    Step::Dry(dry) => s.w.tier.dry = dry,
                    Step::Drain => s.w.drain(),
                    Step::Ask { with, bounds, backwards, most, count } => {
                        let all = s.truth();
                        let at = |n: Option<u8>| {
                            let n = usize::from(n?);
                            all.get(n % all.len().max(1)).map(|e| e.id)
                        };
                        let ms = |n| at(n).map(|id| Id(id).unix_ms());
                        let bob = &s.bob;
                        let with = match with {
                            0 => Some(format!("{bob}@localhost")),
                            1 => Some(format!("{bob}@localhost/b")),
                            2 => Some(format!("{}@localhost", s.carol)),
                            _ => None,
                        };
                        let [after, before, after_id, before_id, start, end] = bounds;
                        let query = ArchiveQuery {
                            name: (*s.alice).into(),
                            with: with.map(Into::into),
                            start_ms: ms(start),
                            end_ms: ms(end),
                            after_id: at(after_id),
                            before_id: at(before_id),
                            ids: Vec::new(),
                            after: at(after),
                            before: at(before),
                            backwards,
                            most: most.into(),
                            count,
                        };
                        let wanted = model(&all, &query);
                        let got = s.read(query.clone());
                        let got = Page { last_id: 0, ..got };
                        prop_assert_eq!(got, wanted, "{:?}", query);
                    }
                }
            }
        }
    }

    #[test]
    fn the_last_page_of_a_hot_conversation_costs_no_sql() {
        let mut s = Scene::new();
        s.talk(12, 12);
        let with_bob = filter("with", &format!("{}@localhost", s.bob));
        let last = |filter: &str| format!("{filter}{}", set("<max>4</max><before/>"));
        // whoever asks first has it read
        for filter in ["", &with_bob] {
            s.bodies(&last(filter));
        }
        let before = s.w.tier.reads;
        for dry in [false, true, false] {
            s.w.tier.dry = dry;
            for n in 0..3 {
                let to = format!("{}@localhost", s.bob);
                let message =
                    format!("<message type='chat' to='{to}'><body>new{n}</body></message>");
                s.w.send(s.a, &message);
            }
            s.quiet();
            for filter in ["", &with_bob] {
                let (page, fin) = s.page(&last(filter));
                assert_eq!(page.len(), 4);
                assert_eq!(page[3].body, "new2");
                assert!(!fin.complete && fin.count.is_some());
                // what came since an entry that the client knows
                let after = set(&format!("<after>{}</after>", page[1].id));
                let (newer, fin) = s.page(&format!("{filter}{after}"));
                assert_eq!(newer, page[2..]);
                assert!(fin.complete);
                let since = form(&field("start", &page[2].stamp));
                assert!(s.page(&since).1.complete);
            }
        }
        assert_eq!(s.w.tier.reads, before);
        let recent = &s.w.slice_of(&s.alice.clone()).recent;
        assert_eq!((recent.hits, recent.misses), (18, 2));
        // users who have not asked cost nothing
        assert!(recent.has(&s.alice) && !recent.has(&s.carol));
        let bob = s.bob.clone();
        assert_eq!(s.w.slice_of(&bob).recent.bytes(), 0);
    }

    #[test]
    fn what_is_kept_in_memory_is_bounded() {
        let mut s = Scene::with(|limits| limits.archive_recent_bytes_max = 4000);
        s.talk(4, 4);
        s.page("");
        for _ in 0..50 {
            let message = format!(
                "<message type='chat' to='{}@localhost'><body>{}</body></message>",
                s.bob,
                "x".repeat(200)
            );
            s.w.send(s.a, &message);
            assert!(s.w.slice_of(&s.alice.clone()).recent.bytes() <= 4000);
        }
        s.quiet();
        assert_eq!(s.bodies("").len(), 50);
        assert_eq!(s.page("").1.count, Some(54));
    }

    #[test]
    fn a_drain_while_a_query_is_on_its_way_changes_nothing() {
        let mut s = Scene::new();
        s.talk(6, 3);
        let all = s.page("").0;
        // SQL answers before the drain, and the answer is used after it
        s.w.tier.held = true;
        s.w.send(
            s.a,
            &format!("<iq type='set' id='q'><query xmlns='{NS}'/></iq>"),
        );
        s.w.drain();
        s.w.release();
        assert_eq!(s.answer().0, all);
        assert_eq!(s.page("").0, all);
    }

    #[test]
    fn a_crash_changes_nothing() {
        for (drained, shards) in [(6, 2), (3, 2), (0, 2), (3, 1), (0, 1), (0, 3)] {
            let mut s = Scene::new();
            s.talk(6, drained);
            let all = s.page("").0;
            s.w.crash(shards);
            s.a = s.w.online(&s.alice, "a");
            s.b = s.w.online(&s.bob, "b");
            assert_eq!(s.page("").0, all, "{drained} {shards}");
            let message = format!(
                "<message type='chat' to='{}@localhost'><body>6</body></message>",
                s.alice
            );
            s.w.send(s.b, &message);
            s.w.take(s.a);
            let after = set(&format!("<after>{}</after>", all[5].id));
            assert_eq!(s.bodies(&after), ["6"], "{drained} {shards}");
            s.w.drain();
            assert_eq!(s.bodies("").len(), 7);
        }
    }

    #[test]
    fn only_the_order_on_the_wire_is_flipped() {
        let mut s = Scene::new();
        s.talk(6, 3);
        let all = s.page("").0;
        for place in [
            "".to_owned(),
            "<before/>".to_owned(),
            format!("<after>{}</after>", all[1].id),
        ] {
            let inner = set(&format!("<max>4</max>{place}"));
            let (mut page, fin) = s.page(&inner);
            let (flipped, answer) = s.ask("", &format!("{inner}<flip-page/>"));
            page.reverse();
            assert_eq!(flipped, page);
            assert_eq!(Fin::of(&answer), fin);
        }
    }

    #[test]
    fn a_client_that_wants_the_count_gets_no_entries() {
        for drained in [6, 3, 0] {
            let mut s = Scene::new();
            s.talk(6, drained);
            let after = format!("<after>{}</after>", s.page("").0[1].id);
            for place in ["", "<before/>", &after] {
                let (results, fin) = s.page(&set(&format!("<max>0</max>{place}")));
                assert!(results.is_empty() && !fin.complete);
                assert_eq!((fin.count, fin.index), (Some(6), None));
            }
            let nobody = filter("with", "nobody@localhost");
            let (_, fin) = s.page(&format!("{nobody}{}", set("<max>0</max>")));
            assert_eq!((fin.count, fin.complete), (Some(0), true));
        }
    }

    #[test]
    fn a_page_is_bounded_whatever_a_client_asks() {
        let mut s = Scene::with(|limits| {
            limits.archive_page_max = 60;
            limits.offline_messages_max = 1000;
        });
        s.talk(70, 35);
        let sizes = [
            ("", 50),
            ("<max>60</max>", 60),
            ("<max>61</max>", 60),
            ("<max>99999999999999999999</max>", 60),
        ];
        for (max, size) in sizes {
            let (results, fin) = s.page(&set(max));
            assert_eq!(
                (results.len(), fin.complete, fin.count),
                (size, false, Some(70))
            );
        }
        assert_eq!(s.page("").0.len(), 50);
        let ids: String = (0..61)
            .map(|n| format!("<value>{n:016x}</value>"))
            .collect();
        s.refused(
            &form(&format!("<field var='ids'>{ids}</field>")),
            "policy-violation",
        );
        let long = "q".repeat(QUERYID_BYTES_MAX + 1);
        let (_, answer) = s.ask(&format!(" queryid='{long}'"), "");
        assert_eq!(answer.get("type"), Some("error"));
    }

    #[test]
    fn long_messages_make_short_pages_that_join_all_the_same() {
        let mut s = Scene::new();
        let long = "x".repeat(200_000);
        for n in 0..12 {
            s.w.tier.dry = n >= 6;
            let message = format!(
                "<message type='chat' to='{}@localhost'><body>{n}{long}</body></message>",
                s.bob
            );
            s.w.send(s.a, &message);
        }
        s.quiet();
        let (first, fin) = s.page("");
        assert_eq!(
            (first.len(), fin.complete, fin.index, fin.count),
            (5, false, Some(0), Some(12))
        );
        let (second, _) = s.page(&set(&format!("<after>{}</after>", first[4].id)));
        assert!(second[0].body.starts_with("5x"));
        let (last, fin) = s.page(&set("<before/>"));
        assert_eq!(
            (last.len(), fin.complete, fin.index, fin.count),
            (5, false, None, Some(12))
        );
        assert!(last[4].body.starts_with("11x"));
    }

    #[test]
    fn what_is_not_for_archives_is_in_none_and_what_is_to_oneself_is_there_once() {
        for dry in [false, true] {
            let mut s = Scene::new();
            s.w.tier.dry = dry;
            let (alice, bob) = (s.alice.clone(), s.bob.clone());
            for (typ, to, inner) in [
                (
                    "chat",
                    &bob,
                    "<body>x</body><no-store xmlns='urn:xmpp:hints'/>",
                ),
                (
                    "chat",
                    &bob,
                    "<body>x</body><no-permanent-store xmlns='urn:xmpp:hints'/>",
                ),
                (
                    "chat",
                    &bob,
                    "<active xmlns='http://jabber.org/protocol/chatstates'/>",
                ),
                ("headline", &bob, "<body>x</body>"),
                ("groupchat", &bob, "<body>x</body>"),
                ("error", &bob, "<body>x</body>"),
                ("chat", &bob, "<body>0</body>"),
                ("chat", &alice, "<body>1</body>"),
            ] {
                s.w.send(
                    s.a,
                    &format!("<message type='{typ}' to='{to}@localhost'>{inner}</message>"),
                );
            }
            s.quiet();
            assert_eq!(s.bodies(""), ["0", "1"]);
            let own = filter("with", &format!("{alice}@localhost"));
            assert_eq!(s.bodies(&own), ["1"]);
        }
    }

    #[test]
    fn a_stanza_that_hung_on_its_stream_stands_alone_in_a_result() {
        let mut s = Scene::new();
        let message = format!(
            "<c:message xmlns:c='jabber:client' xmlns:u='urn:u' type='chat' xml:lang='de' to='{}@localhost'>\
             <c:body>1</c:body><u:y u:z='&lt;&apos;'/></c:message>",
            s.bob
        );
        s.w.send(s.a, &message);
        s.w.take(s.a);
        s.ask("", "");
        s.w.send(
            s.a,
            &format!("<iq type='set' id='q'><query xmlns='{NS}'/></iq>"),
        );
        let got = s.w.take(s.a);
        let result = parse_stanza(got[0].as_bytes()).unwrap();
        let forwarded = result.elements().next().unwrap().elements().next().unwrap();
        let message = forwarded.find("message", NS_CLIENT).unwrap();
        assert_eq!(message.get("xml:lang"), Some("de"));
        assert_eq!(
            message.find("y", "urn:u").unwrap().get("{urn:u}z"),
            Some("<'")
        );
    }

    #[test]
    fn the_form_says_what_can_be_asked() {
        let mut s = Scene::new();
        s.w.send(
            s.a,
            &format!("<iq type='get' id='form1'><query xmlns='{NS}'/></iq>"),
        );
        let to = format!("{}@localhost/a", s.alice);
        s.w.expect(s.a, &[&format!(
            "<iq type='result' id='form1' to='{to}'><query xmlns='urn:xmpp:mam:2'><x xmlns='jabber:x:data' type='form'>\
             <field type='hidden' var='FORM_TYPE'><value>urn:xmpp:mam:2</value></field>\
             <field type='jid-single' var='with'/><field type='text-single' var='start'/>\
             <field type='text-single' var='end'/><field type='text-single' var='before-id'/>\
             <field type='text-single' var='after-id'/><field type='list-multi' var='ids'>\
             <validate xmlns='http://jabber.org/protocol/xdata-validate' datatype='xs:string'><open/></validate></field>\
             <field type='boolean' var='include-groupchat'/></x></query></iq>"
        )]);
    }

    #[test]
    fn metadata_name_the_first_and_the_last_entry() {
        for drained in [4, 2, 0] {
            let mut s = Scene::new();
            let ask = format!("<iq type='get' id='m'><metadata xmlns='{NS}'/></iq>");
            let to = format!("{}@localhost/a", s.alice);
            s.w.send(s.a, &ask);
            s.w.expect(
                s.a,
                &[&format!(
                    "<iq type='result' id='m' to='{to}'><metadata xmlns='{NS}'/></iq>"
                )],
            );
            s.talk(4, drained);
            let all = s.page("").0;
            s.w.send(s.a, &ask);
            s.w.expect(s.a, &[&format!(
                "<iq type='result' id='m' to='{to}'><metadata xmlns='{NS}'><start id='{}' timestamp='{}'/>\
                 <end id='{}' timestamp='{}'/></metadata></iq>",
                all[0].id, all[0].stamp, all[3].id, all[3].stamp,
            )]);
            s.w.send(s.a, &ask.replace("get", "set"));
            assert!(s.w.take(s.a).concat().contains("<bad-request"));
        }
    }

    #[test]
    fn metadata_come_from_memory_once_they_were_asked_for_and_follow_what_happens() {
        let mut s = Scene::new();
        let ask = format!("<iq type='get' id='m'><metadata xmlns='{NS}'/></iq>");
        let wanted = |all: &[String]| {
            let ends = all.first().zip(all.last());
            ends.map(|(first, last)| (format!("<start id='{first}'"), format!("<end id='{last}'")))
        };
        s.talk(400, 400);
        let mut asked = Vec::new();
        for more in [0, 0, 1, 3] {
            s.talk(more, more);
            let reads = s.w.tier.reads;
            s.w.send(s.a, &ask);
            let got = s.w.take(s.a).concat();
            asked.push(s.w.tier.reads - reads);
            let alice = s.alice.clone();
            let key = s.w.slice_of(&alice).env.id_key;
            let ids = s.w.tier.users[&alice].archive.keys();
            let ids: Vec<String> = ids.map(|id| stable_id::shown(*id, key)).collect();
            let (first, last) = wanted(&ids).unwrap();
            assert!(got.contains(&first) && got.contains(&last), "{got}");
        }
        assert_eq!(asked, [2, 0, 0, 0], "statements");
    }

    #[test]
    fn an_account_says_that_it_has_an_archive_and_the_server_has_none() {
        let mut s = Scene::new();
        for (to, has) in [
            (format!("{}@localhost", s.alice), true),
            ("localhost".to_owned(), false),
        ] {
            let query = "<query xmlns='http://jabber.org/protocol/disco#info'/>";
            s.w.send(
                s.a,
                &format!("<iq type='get' id='disco1' to='{to}'>{query}</iq>"),
            );
            let got = s.w.take(s.a).concat();
            for var in [
                NS,
                "urn:xmpp:mam:2#extended",
                "urn:xmpp:mam:2#groupchat-field",
                rsm::NS,
            ] {
                assert_eq!(got.contains(&format!("var='{var}'")), has, "{to} {var}");
            }
        }
    }

    #[test]
    fn nobody_reads_the_archive_of_another_or_learns_whether_there_is_one() {
        let mut s = Scene::new();
        s.talk(2, 1);
        let alice = s.alice.clone();
        for to in [&*alice, "nobody"] {
            for (typ, payload) in [
                ("set", "query"),
                ("get", "query"),
                ("get", "metadata"),
                ("set", "metadata"),
            ] {
                let request = format!(
                    "<iq type='{typ}' id='q' to='{to}@localhost'><{payload} xmlns='{NS}'/></iq>"
                );
                s.w.send(s.b, &request);
                let got = s.w.take(s.b);
                let error = format!(
                    "<iq type='error' id='q' from='{to}@localhost' to='{}@localhost/b'><{payload} xmlns='{NS}'/>\
                     <error type='auth'><forbidden xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>",
                    s.bob
                );
                assert!(
                    got.len() == 1 && matches(&error, &got[0]),
                    "{request} {got:?}"
                );
            }
        }
        assert!(s.w.take(s.a).is_empty());
        // one's own, by its name
        s.w.send(
            s.a,
            &format!("<iq type='set' id='q' to='{alice}@localhost'><query xmlns='{NS}'/></iq>"),
        );
        assert_eq!(s.answer().0.len(), 2);
    }

    #[test]
    fn nothing_that_a_client_puts_into_a_query_gets_out_of_its_place() {
        for drained in [4, 0] {
            let mut s = Scene::new();
            s.talk(4, drained);
            let evil = "x'/><message xmlns='jabber:client' to='a@b'/> OR 1=1 -- \" %";
            let escaped = evil
                .replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('\'', "&apos;");
            let attrs = format!(" queryid='{escaped}'");
            let query = format!("<iq type='set' id='q'><query xmlns='{NS}'{attrs}/></iq>");
            s.w.send(s.a, &query);
            let got = s.w.take(s.a);
            assert_eq!(got.len(), 5);
            for xml in &got[..4] {
                let result = parse_stanza(xml.as_bytes()).unwrap();
                let result = result.find("result", NS).unwrap();
                assert_eq!(result.get("queryid"), Some(evil));
            }
            for place in ["after", "before"] {
                s.refused(
                    &set(&format!("<{place}>{escaped}</{place}>")),
                    "item-not-found",
                );
            }
            for var in ["before-id", "after-id", "ids"] {
                s.refused(&filter(var, &escaped), "item-not-found");
            }
            // patterns of SQL are none here
            for with in ["%", "_ob@localhost", "b%@localhost", "localhost' OR '1'='1"] {
                let with = with.replace('\'', "&apos;");
                let (results, answer) = s.ask("", &filter("with", &with));
                assert!(results.is_empty(), "{with}: {answer:?}");
            }
            assert_eq!(s.bodies(""), ["0", "1", "2", "3"]);
        }
    }

    #[test]
    fn an_id_that_somebody_forged_is_not_in_the_archive_and_names_nothing() {
        let mut s = Scene::new();
        s.talk(2, 1);
        let stolen = s.page("").0[0].id.clone();
        let message = format!(
            "<message type='chat' to='{alice}@localhost'><body>2</body>\
             <stanza-id xmlns='urn:xmpp:sid:0' by='{alice}@localhost' id='{stolen}'/></message>",
            alice = s.alice
        );
        s.w.send(s.b, &message);
        s.quiet();
        let (all, _) = s.page("");
        assert!(all[2].id != stolen);
        assert_eq!(s.bodies(&filter("ids", &stolen)), ["0"]);
        s.w.send(
            s.a,
            &format!("<iq type='set' id='q'><query xmlns='{NS}'/></iq>"),
        );
        let got = s.w.take(s.a).concat();
        assert_eq!(got.matches(&*stolen).count(), 2, "its result and <first/>");
    }

    #[test]
    fn an_id_that_the_archive_does_not_have_is_not_found() {
        for drained in [4, 2, 0] {
            let mut s = Scene::new();
            s.talk(4, drained);
            let ids: Vec<String> = s.page("").0.into_iter().map(|r| r.id).collect();
            s.w.send(
                s.b,
                &format!("<iq type='set' id='q'><query xmlns='{NS}'/></iq>"),
            );
            let bobs = shown(&s.w.take(s.b)[0]).id;
            let key = s.w.slices[0].env.id_key;
            let far = format!("{:016x}", stable_id::permute(u64::MAX, key));
            let upper = ids[0].to_uppercase();
            for id in [
                &*bobs,
                &far,
                &upper,
                "0123456789abcdef",
                "x",
                "",
                "28482-98726-73623",
                "+123456789abcdef",
            ] {
                if !id.is_empty() {
                    s.refused(&set(&format!("<after>{id}</after>")), "item-not-found");
                    s.refused(&set(&format!("<before>{id}</before>")), "item-not-found");
                }
                for var in ["before-id", "after-id", "ids"] {
                    s.refused(&filter(var, id), "item-not-found");
                }
                let some = format!(
                    "<field var='ids'><value>{}</value><value>{id}</value></field>",
                    ids[0]
                );
                s.refused(&form(&some), "item-not-found");
            }
            let (_, answer) = s.ask(" node='urn:x'", "");
            assert!(answer.find("error", NS_CLIENT).is_some());
        }
    }

    #[test]
    fn what_is_no_query_is_refused() {
        let mut s = Scene::new();
        s.talk(2, 1);
        let bad = [
            "<x xmlns='jabber:x:data' type='submit'/>".to_owned(),
            form("").replace(" type='submit'", ""),
            form("").replace("submit", "cancel"),
            form("").replace("mam:2", "mam:1"),
            form("").repeat(2),
            form("<field><value>x</value></field>"),
            form(&field("FORM_TYPE", NS)),
            filter("with", ""),
            filter("with", "@localhost"),
            filter("start", ""),
            filter("start", "yesterday"),
            filter("end", "2010-02-30T00:00:00Z"),
            form(&field("start", "2010-08-07T00:00:00Z").repeat(2)),
            form("<field var='with'><value>a@b</value><value>c@d</value></field>"),
            filter("include-groupchat", "maybe"),
            set("<max>-1</max>"),
            set("<max>ten</max>"),
        ];
        for inner in bad {
            s.refused(&inner, "bad-request");
        }
        for inner in [
            filter(
                "{http://example.com/}free-text-search",
                "Where arth thou, my Juliet?",
            ),
            filter("x", "1"),
            set("<max>1</max><index>1</index>"),
        ] {
            s.refused(&inner, "feature-not-implemented");
        }
        assert_eq!(s.bodies(""), ["0", "1"]);
    }

    #[test]
    fn what_cannot_be_read_is_to_be_asked_for_again() {
        let mut s = Scene::new();
        s.talk(2, 1);
        s.w.tier.broken = true;
        let wait = |answer: &Element| {
            let error = answer.find("error", NS_CLIENT).unwrap();
            error.get("type") == Some("wait")
                && error.elements().next().unwrap().name == "resource-constraint"
        };
        assert!(wait(&s.ask("", "").1));
        s.w.send(
            s.a,
            &format!("<iq type='get' id='m'><metadata xmlns='{NS}'/></iq>"),
        );
        assert!(wait(&s.answer().1));
        s.w.tier.broken = false;
        assert_eq!(s.bodies(""), ["0", "1"]);
    }

    #[test]
    fn queries_of_a_session_are_answered_in_order_and_have_a_limit() {
        let mut s = Scene::new();
        s.talk(3, 1);
        s.w.tier.held = true;
        for n in 0..WAITING_MAX + 3 {
            s.w.send(
                s.a,
                &format!("<iq type='set' id='q{n}'><query xmlns='{NS}'/></iq>"),
            );
        }
        let refused = s.w.take(s.a);
        assert!(
            refused.len() == 2 && refused.concat().matches("<resource-constraint").count() == 2
        );
        s.w.release();
        let got = s.w.take(s.a);
        assert_eq!(got.len(), (WAITING_MAX + 1) * 4);
        for (n, page) in got.chunks(4).enumerate() {
            assert!(page[3].contains(&format!("id='q{n}'")), "{}", page[3]);
        }
        assert!(s.w.slice_of(&s.alice.clone()).archive.0.is_empty());
    }

    #[test]
    fn a_session_that_has_ended_asks_no_more() {
        let mut s = Scene::new();
        s.talk(3, 1);
        s.w.tier.held = true;
        for _ in 0..3 {
            s.w.send(
                s.a,
                &format!("<iq type='set' id='q'><query xmlns='{NS}'/></iq>"),
            );
        }
        s.w.logout(s.a);
        s.w.release();
        assert!(s.w.slice_of(&s.alice.clone()).archive.0.is_empty());
        s.a = s.w.online(&s.alice, "a");
        assert_eq!(s.bodies("").len(), 3);
    }

    #[test]
    fn a_page_does_not_count_against_a_slow_reader_but_he_gets_no_other() {
        let mut s = Scene::with(|limits| {
            limits.unacked_stanzas_max = 10;
            limits.offline_messages_max = 5;
            limits.archive_page_max = 30;
        });
        s.talk(40, 20);
        s.w.send(s.a, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
        s.w.take(s.a);
        let query = format!(
            "<iq type='set' id='q'><query xmlns='{NS}'>{}</query></iq>",
            set("<max>30</max>")
        );
        for _ in 0..3 {
            s.w.send(s.a, &query);
        }
        assert!(!s.w.closed(s.a));
        let got = s.w.take(s.a);
        let count = |name: &str| got.iter().filter(|xml| xml.starts_with(name)).count();
        assert_eq!(
            (count("<message"), count("<iq type='error'")),
            (30, 2),
            "{got:?}"
        );
        // it goes on when the client has taken it
        s.w.send(s.a, "<a xmlns='urn:xmpp:sm:3' h='33'/>");
        s.w.send(s.a, &query);
        assert_eq!(
            s.w.take(s.a)
                .iter()
                .filter(|xml| xml.starts_with("<message"))
                .count(),
            30
        );
        // and what others send is bounded as ever
        for _ in 0..20 {
            let message = format!(
                "<message type='chat' to='{}@localhost/a'><body>x</body></message>",
                s.alice
            );
            s.w.send(s.b, &message);
        }
        assert!(s.w.closed(s.a));
    }

    #[test]
    fn results_are_for_the_session_that_asked_and_for_no_other() {
        let mut s = Scene::new();
        s.talk(3, 1);
        let other = s.w.online(&s.alice, "other");
        s.w.send(other, "<enable xmlns='urn:xmpp:carbons:2'/>");
        s.w.send(s.a, "<enable xmlns='urn:xmpp:sm:3' resume='true'/>");
        s.w.take(s.a);
        s.w.take(other);
        s.w.send(
            s.a,
            &format!("<iq type='set' id='q'><query xmlns='{NS}'/></iq>"),
        );
        assert_eq!(
            s.w.take(s.a)
                .iter()
                .filter(|xml| xml.starts_with("<message"))
                .count(),
            3
        );
        s.w.cut(s.a);
        s.w.advance(400_000);
        s.w.advance(400_000);
        let got = s.w.take(other).concat();
        assert!(!got.contains("<result"), "{got}");
        assert_eq!(s.w.user(&s.alice).offline.len(), 0);
    }
}
