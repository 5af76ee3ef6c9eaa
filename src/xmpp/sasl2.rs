//! The extensible SASL profile (XEP-0388) with what may come along in the same round trip: binding (XEP-0386) and resumption
//! (XEP-0198 section 9). In: the client's `<authenticate/>`. Out: the [`Request`], and the texts that the negotiation sends.
//!
//! Authentication itself is the same as in RFC 6120's profile ([`super::sasl`]), and so is everything behind it: the requests
//! are carried out by the steps that the older way takes, one after the other, before `<success/>` is said. nitro has no
//! tasks (second factors, forced changes of passwords), so it never sends `<continue/>`; and it reads no TLS early data: what
//! can be replayed must not authenticate (XEP-0388 "Security Considerations").
//!
//! Two places where XEP-0386 leaves room: messages that wait for the user are not thrown away when he binds but delivered as
//! ever, with the stable ids by which the client knows them from its archive, because a message that was accepted is given up
//! only to a client that has acknowledged it; and the archive's `<metadata/>` is in `<bound/>` only where it is in memory: else
//! it would cost the login a query of the database, and a client that wants it asks for it.

use aws_lc_rs::hmac;
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};

use super::bind::Extras;
use super::fast;
use super::feature::{carbons, csi, sm};
use super::jid;
use super::push;
use super::sasl::{ChannelBindings, Failure, Mechanism};
use crate::xml::dom::Element;
use crate::xml::escape_text;

pub const NS: &str = "urn:xmpp:sasl:2";
pub const NS_BIND: &str = "urn:xmpp:bind:0";

/// Bytes of a client's name for itself that go into its resource.
const TAG_BYTES_MAX: usize = 128;
/// Bytes of a `<user-agent/>`'s id; a UUID has 36.
const AGENT_BYTES_MAX: usize = 128;

/// What a client wants beside authentication, and what has come of it so far.
#[derive(Debug, Default)]
pub struct Request {
    /// Names the client's installation, always the same.
    pub agent: Option<Box<str>>,
    /// `previd` and `h`.
    pub resume: Option<(String, u32)>,
    pub bind: Option<Bind>,
    /// XEP-0484.
    pub tokens: fast::Wishes,
    /// The mechanism's last word, for `<additional-data/>`.
    pub additional: Vec<u8>,
    /// Elements for `<success/>`.
    pub answers: Vec<u8>,
}

#[derive(Debug, Default)]
pub struct Bind {
    tag: Option<Box<str>>,
    pub extras: Extras,
}

/// Reads `<authenticate/>`: its initial response and the rest.
pub fn read(authenticate: &Element) -> Result<(Option<Vec<u8>>, Request), Failure> {
    let initial = match authenticate.find("initial-response", NS) {
        // RFC 6120's sign for "empty" is not needed here and does no harm
        Some(data) => match data.text_content().trim() {
            "" | "=" => Some(Vec::new()),
            data => Some(
                BASE64_STANDARD
                    .decode(data)
                    .map_err(|_| Failure::INCORRECT_ENCODING)?,
            ),
        },
        None => None,
    };
    let agent = authenticate
        .find("user-agent", NS)
        .and_then(|agent| agent.get("id"))
        .filter(|id| !id.is_empty());
    if agent.is_some_and(|id| id.len() > AGENT_BYTES_MAX) {
        return Err(Failure::MALFORMED_REQUEST.with_text("The user agent's id is too long"));
    }
    let mut request = Request {
        agent: agent.map(Into::into),
        bind: authenticate.find("bind", NS_BIND).map(Bind::read),
        tokens: fast::Wishes::read(authenticate)?,
        ..Request::default()
    };
    if let Some(resume) = authenticate.find("resume", sm::NS) {
        let h = resume.get("h").and_then(|h| h.parse().ok());
        match (resume.get("previd"), h) {
            (Some(previd), Some(h)) => request.resume = Some((previd.to_owned(), h)),
            _ => request.answers = sm::failed("bad-request", None),
        }
    }
    Ok((initial, request))
}

impl Bind {
    fn read(bind: &Element) -> Bind {
        let tag = bind.find("tag", NS_BIND).map(|tag| tag.text_content());
        Bind {
            tag: tag.filter(|tag| !tag.is_empty()).map(Into::into),
            extras: Extras {
                sm: bind
                    .find("enable", sm::NS)
                    .map(|enable| sm::Wish::new(enable.get("resume"), enable.get("max"))),
                carbons: bind.find("enable", carbons::NS).is_some(),
                inactive: bind.find("inactive", csi::NS).is_some(),
                archive: true,
            },
        }
    }

    /// The resource: the client's tag, a slash and what tells its installation from others without showing its id (XEP-0386
    /// section "Resource identifier generation"). So a client that comes again without resuming takes the place of the
    /// session that it had.
    pub fn resource(&self, key: &[u8; 32], user: &str, agent: Option<&str>) -> String {
        let tag = self.tag.as_deref();
        let short = tag.filter(|tag| tag.len() <= TAG_BYTES_MAX);
        let tag = short.and_then(|tag| jid::resourcepart(tag).ok());
        let id = match agent {
            Some(agent) => {
                let key = hmac::Key::new(hmac::HMAC_SHA256, key);
                let mut context = hmac::Context::with_key(&key);
                for part in ["resource", user, agent, tag.as_deref().unwrap_or_default()] {
                    context.update(part.as_bytes());
                    context.update(&[0]);
                }
                BASE64_URL_SAFE_NO_PAD.encode(&context.sign().as_ref()[..9])
            }
            None => super::random_id(),
        };
        match tag {
            Some(tag) => format!("{tag}/{id}"),
            None => id,
        }
    }
}

/// The stream feature; what it names can all be had. `tokens`: with XEP-0484, on this channel.
pub fn write_feature(mechanisms: &[Mechanism], tokens: Option<&ChannelBindings>, out: &mut String) {
    push(out, &["<authentication xmlns='", NS, "'>"]);
    for mechanism in mechanisms {
        push(out, &["<mechanism>", mechanism.name(), "</mechanism>"]);
    }
    push(
        out,
        &[
            "<inline><sm xmlns='",
            sm::NS,
            "'/><bind xmlns='",
            NS_BIND,
            "'><inline>",
        ],
    );
    for feature in [carbons::NS, csi::NS, sm::NS] {
        push(out, &["<feature var='", feature, "'/>"]);
    }
    out.push_str("</inline></bind>");
    if let Some(bindings) = tokens {
        let unbound = mechanisms.iter().any(|m| !m.is_bound());
        fast::write_feature(bindings, unbound, out);
    }
    out.push_str("</inline></authentication>");
}

impl Request {
    /// `<success/>` up to where the answers begin. `jid` is full, if there is a session.
    pub fn write_success(&self, jid: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("<success xmlns='{NS}'>").as_bytes());
        if !self.additional.is_empty() {
            let data = BASE64_STANDARD.encode(&self.additional);
            out.extend_from_slice(format!("<additional-data>{data}</additional-data>").as_bytes());
        }
        out.extend_from_slice(b"<authorization-identifier>");
        escape_text(jid, out);
        out.extend_from_slice(b"</authorization-identifier>");
        out.extend_from_slice(&self.answers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(tag: &str) -> Bind {
        Bind {
            tag: Some(tag.into()),
            ..Bind::default()
        }
    }

    #[test]
    fn a_client_gets_the_same_resource_each_time_and_nobody_elses() {
        let of = |tag, user, agent| bind(tag).resource(&[1; 32], user, Some(agent));
        let first = of("Desk", "alice", "a-b-c");
        assert!(
            first.starts_with("Desk/") && first.len() == 5 + 12,
            "{first}"
        );
        assert!(!first.contains("a-b-c"));
        assert_eq!(first, of("Desk", "alice", "a-b-c"));
        for other in [
            of("Desk", "alice", "a-b-d"),
            of("Desk", "bob", "a-b-c"),
            of("Phone", "alice", "a-b-c"),
            bind("Desk").resource(&[2; 32], "alice", Some("a-b-c")),
            bind("Desk").resource(&[1; 32], "alice", None),
        ] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn a_tag_that_cannot_be_in_a_resource_is_left_out() {
        for tag in ["a\u{7}b", &"x".repeat(TAG_BYTES_MAX + 1)] {
            let resource = bind(tag).resource(&[1; 32], "alice", Some("id"));
            assert_eq!(resource.len(), 12, "{resource}");
        }
    }

    #[test]
    fn what_comes_along_is_read_whole() {
        let xml = "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='PLAIN'><initial-response>AGEAYg==</initial-response>\
                   <user-agent id='d4565fa7-4d72-4749-b3d3-740edbf87770'><software>x</software></user-agent>\
                   <resume xmlns='urn:xmpp:sm:3' previd='p' h='7'/><bind xmlns='urn:xmpp:bind:0'><tag>t</tag>\
                   <enable xmlns='urn:xmpp:carbons:2'/><enable xmlns='urn:xmpp:sm:3' resume='true' max='30'/>\
                   <inactive xmlns='urn:xmpp:csi:0'/></bind></authenticate>";
        let (initial, request) = read(&Element::parse(xml).unwrap()).unwrap();
        assert_eq!(initial.unwrap(), b"\0a\0b");
        assert_eq!(request.resume, Some(("p".to_owned(), 7)));
        let bind = request.bind.unwrap();
        assert!(bind.extras.carbons && bind.extras.inactive && bind.extras.sm.is_some());
        let xml = "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='PLAIN'><resume xmlns='urn:xmpp:sm:3' previd='p'/></authenticate>";
        let (initial, request) = read(&Element::parse(xml).unwrap()).unwrap();
        assert!(initial.is_none() && request.resume.is_none() && request.bind.is_none());
        assert!(!request.answers.is_empty());
    }

    #[test]
    fn an_endless_id_and_what_is_no_base64_are_refused() {
        let refused = |inner: &str| {
            let xml = format!(
                "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='PLAIN'>{inner}</authenticate>"
            );
            read(&Element::parse(&xml).unwrap()).unwrap_err().condition
        };
        let long = "x".repeat(AGENT_BYTES_MAX + 1);
        assert_eq!(
            refused(&format!("<user-agent id='{long}'/>")),
            "malformed-request"
        );
        assert_eq!(
            refused("<initial-response>***</initial-response>"),
            "incorrect-encoding"
        );
    }
}
