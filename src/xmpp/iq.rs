//! IQ requests and answers (RFC 6120 section 8.2.3, RFC 6121 section 8.5): to the server, to an account, to a session.

use super::batch::Receipt;
use super::error::StanzaError;
use super::feature::{Target, caps, last, push, upload};
use super::jid::Jid;
use super::meta::{Kind, Meta};
use super::session::SessionId;
use super::slice::{Fate, Slice};
use super::{NS_CLIENT, message, room};
use crate::xml::dom::Element;
use crate::xml::view::View;

/// A request (`get` or `set`) for the server or an account of this slice.
pub struct Iq {
    /// The asking session, if it lives in this slice and is served directly.
    pub session: Option<SessionId>,
    /// Full JID of the asker.
    pub from: Jid<'static>,
    /// As it was addressed; `None`: no `to`, the asker's own account.
    pub to: Option<Jid<'static>>,
    pub id: String,
    pub set: bool,
    /// The one child.
    pub payload: Element,
    /// XEP-0198 receipt of a change: its fate is decided when it is answered, so no count covers it before.
    pub receipt: Option<Receipt>,
}

impl Iq {
    /// What a session of this slice asks a service of the server; it changes nothing that its count waits for.
    pub fn of_session(
        slice: &Slice,
        sid: SessionId,
        view: &View<'_>,
        to: &Jid<'_>,
        kind: Kind,
    ) -> Option<Iq> {
        let element = view.to_element();
        let payload = element.elements().next().cloned()?;
        let from = Jid::parse(&slice.sessions.get(sid)?.jid).ok()?;
        Some(Iq {
            session: Some(sid),
            from: from.into_owned(),
            to: Some(to.clone().into_owned()),
            id: element.get("id").unwrap_or_default().to_owned(),
            set: kind == Kind::IqSet,
            payload,
            receipt: None,
        })
    }

    /// Local part of the account that is asked (the asker's own when there is no `to`); for [`Target::Server`] the asker's. Empty,
    /// which no account is, when a component asks the server.
    pub fn account(&self) -> &str {
        let to = self.to.as_ref().and_then(|to| to.local());
        to.or_else(|| self.from.local()).unwrap_or_default()
    }

    /// Is it the asker's own account?
    pub fn own(&self) -> bool {
        self.to
            .as_ref()
            .is_none_or(|to| to.as_str() == self.from.bare())
    }
}

impl Slice {
    /// A request of type `set` that changes nothing: its fate is decided now.
    pub fn iq_reads(&mut self, iq: &mut Iq) {
        if let Some(receipt) = iq.receipt.take() {
            self.settle(receipt);
        }
    }

    /// `<iq type='result'>`, empty or with a payload.
    pub fn iq_result(&mut self, iq: &Iq, payload: Option<Element>) {
        let answer = answer(iq, "result");
        let answer = match payload {
            Some(payload) => answer.child(payload),
            None => answer,
        };
        self.iq_answer(iq, answer, Kind::IqResult);
    }

    pub fn iq_error(&mut self, iq: &Iq, error: &StanzaError) {
        self.iq_error_element(iq, error.element());
    }

    /// The same with an application-specific condition that has attributes or children.
    pub fn iq_error_with(&mut self, iq: &Iq, error: &StanzaError, detail: Element) {
        self.iq_error_element(iq, error.element().child(detail));
    }

    fn iq_error_element(&mut self, iq: &Iq, error: Element) {
        let answer = answer(iq, "error").child(iq.payload.clone()).child(error);
        self.iq_answer(iq, answer, Kind::IqError);
    }

    fn iq_answer(&mut self, iq: &Iq, answer: Element, kind: Kind) {
        let meta = Meta::new(kind).with(Meta::SERVER);
        match iq.session {
            Some(sid) => self.send_element(sid, &answer, meta),
            None => {
                let from = iq
                    .to
                    .as_ref()
                    .map(|to| to.as_str().to_owned())
                    .unwrap_or_default();
                self.route_element(&iq.from, &from, &answer, meta, None);
            }
        }
        if let Some(receipt) = iq.receipt {
            self.settle(receipt);
        }
    }
}

fn answer(iq: &Iq, typ: &str) -> Element {
    let answer = Element::new("iq", NS_CLIENT)
        .attr("type", typ)
        .attr("id", &*iq.id)
        .attr("to", iq.from.as_str());
    match &iq.to {
        Some(to) => answer.attr("from", to.as_str()),
        None => answer,
    }
}

/// An IQ of a session of this slice.
pub fn outbound(slice: &mut Slice, sid: SessionId, view: &View<'_>) {
    slice.counters.iqs_in += 1;
    let kind = Kind::iq(view.attr("type").as_deref());
    let requests = matches!(kind, Some(Kind::IqGet | Kind::IqSet));
    // RFC 6120 8.2.3: id required, a type, exactly one child in a request
    let (Some(kind), Some(id)) = (kind, view.attr("id")) else {
        return message::bounce_out(slice, sid, view, &StanzaError::BAD_REQUEST);
    };
    if requests && view.children().len() != 1 {
        return message::bounce_out(slice, sid, view, &StanzaError::BAD_REQUEST);
    }
    let Some(session) = slice.sessions.get(sid) else {
        return;
    };
    let to = match view.attr("to") {
        None => None,
        Some(to) => match Jid::parse(&to) {
            Ok(jid) => Some(jid.into_owned()),
            Err(_) => return message::bounce_out(slice, sid, view, &StanzaError::JID_MALFORMED),
        },
    };
    let target = match &to {
        None => Target::Account,
        Some(to) if to.as_str() == session.bare() => Target::Account,
        Some(to) if slice.env.is_room(to) && to.local().is_none() => {
            if !requests {
                return;
            }
            return room::host::outbound(slice, sid, view, to, kind);
        }
        Some(to) if slice.env.is_upload(to) => {
            if !requests {
                return;
            }
            return upload::outbound(slice, sid, view, to, kind);
        }
        Some(to) if !slice.is_reached(to) => {
            return message::bounce_out(slice, sid, view, &StanzaError::REMOTE_SERVER_NOT_FOUND);
        }
        Some(to) if slice.env.is_local(to) && to.local().is_none() => Target::Server,
        Some(to) => {
            // another user, one of the sender's own sessions, or a component
            if let Err(error) = message::may_send(slice, sid, to) {
                return message::bounce_out(slice, sid, view, &error);
            }
            let stanza = message::compose(view, &session.jid, Some(to), None, Vec::new());
            let from = session.jid.clone();
            let receipt = slice.current;
            return slice.route(to, &from, &stanza, Meta::new(kind), receipt);
        }
    };
    if !requests {
        // an answer to the server: its ping is answered by being heard
        return caps::answered(slice, sid, view);
    }
    let payload = view
        .to_element()
        .elements()
        .next()
        .cloned()
        .expect("one child was counted");
    let receipt = slice.current.filter(|_| kind == Kind::IqSet);
    let iq = Iq {
        session: Some(sid),
        from: Jid::parse(&session.jid)
            .expect("a session's JID is valid")
            .into_owned(),
        to,
        id: id.into_owned(),
        set: kind == Kind::IqSet,
        payload,
        receipt,
    };
    if let Some(receipt) = receipt {
        slice.defer(receipt);
    }
    handle(slice, iq, target);
}

/// An IQ for a user of this slice who is present.
pub fn deliver(slice: &mut Slice, to: &Jid<'_>, from: &str, stanza: &[u8], meta: Meta) -> Fate {
    let name = to.local().expect("only users are routed to");
    let Ok(from_jid) = Jid::parse(from) else {
        return Fate::Decided;
    };
    if to.is_bare() && matches!(meta.kind, Kind::IqResult | Kind::IqError) {
        // only what this server has asked in the user's name is answered so
        push::answered(slice, name, &from_jid, stanza, meta);
        return Fate::Decided;
    }
    if !slice.admits(to, &from_jid, stanza, meta) {
        return Fate::Decided;
    }
    if let Some(resource) = to.resource() {
        if last::forbids(slice, name, &from_jid, stanza, meta) {
            slice.bounce(to, from, stanza, meta, &StanzaError::FORBIDDEN);
            return Fate::Decided;
        }
        match slice.find_session(name, resource) {
            Some(sid) => slice.send(sid, &[stanza], meta),
            None => slice.bounce(to, from, stanza, meta, &StanzaError::SERVICE_UNAVAILABLE),
        }
        return Fate::Decided;
    }
    if matches!(meta.kind, Kind::IqGet | Kind::IqSet)
        && let Some(element) = super::parse_stanza(stanza)
        && let Some(payload) = element.elements().next()
    {
        let iq = Iq {
            session: None,
            from: from_jid.into_owned(),
            to: Some(to.clone().into_owned()),
            id: element.get("id").unwrap_or_default().to_owned(),
            set: meta.kind == Kind::IqSet,
            payload: payload.clone(),
            receipt: None,
        };
        handle(slice, iq, Target::Account);
    }
    Fate::Decided
}

/// Finds the handler in the table of features.
pub fn handle(slice: &mut Slice, iq: Iq, target: Target) {
    let route = slice.hooks.iq.iter().find(|r| {
        r.name == iq.payload.name
            && r.ns == iq.payload.ns
            && (r.target == target || r.target == Target::Both)
    });
    match route {
        Some(route) => (route.handle)(slice, iq),
        // RFC 6120 8.4
        None => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
    }
}
