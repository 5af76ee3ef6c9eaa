//! A component's connection until its secret is proved (XEP-0114 section 3).
//!
//! In: stream header and `<handshake/>`. Out: this server's header with a fresh stream id, and whether the peer knows the secret
//! of the name that it wants to serve. Sans-IO; who failed is held back by the shard, as at log-ins of users.

use std::rc::Rc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

use super::{Hosts, NS_ACCEPT};
use crate::xml::{self, FrameKind, StreamHeader, StreamNs, View, escape_attr};
use crate::xmpp::error::StreamError;
use crate::xmpp::{NS_CLIENT, NS_STREAM, jid, random_id};

pub struct Handshake {
    id: String,
    /// From the header on.
    host: Option<Box<str>>,
    ns: Rc<StreamNs>,
    answered: bool,
}

/// What a frame has led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    Continue,
    /// The peer may serve this name.
    Proved(Box<str>),
    /// The peer does not know the secret of this name: it hears [`NOT_AUTHORIZED`] when it has waited.
    Failed(Box<str>),
    /// It closed the stream.
    End,
}

pub const NOT_AUTHORIZED: StreamError =
    StreamError::text("not-authorized", "this is not the secret");

impl Default for Handshake {
    fn default() -> Handshake {
        Handshake::with_id(random_id())
    }
}

impl Handshake {
    fn with_id(id: String) -> Handshake {
        Handshake {
            id,
            host: None,
            ns: Rc::new(StreamNs::client()),
            answered: false,
        }
    }

    /// The namespaces of the peer's header, with `jabber:client` in the place of `jabber:component:accept`: behind this door
    /// stanzas are in the namespace that the rest of the server knows.
    pub fn stream_ns(&self) -> Rc<StreamNs> {
        self.ns.clone()
    }

    /// A frame of the peer.
    pub fn frame(
        &mut self,
        kind: FrameKind,
        frame: &[u8],
        hosts: &Hosts,
        limits: &xml::Limits,
        out: &mut Vec<u8>,
    ) -> Result<Step, StreamError> {
        match kind {
            FrameKind::Whitespace => Ok(Step::Continue),
            FrameKind::End => {
                out.extend_from_slice(b"</stream:stream>");
                Ok(Step::End)
            }
            FrameKind::Header => self.header(frame, hosts, out),
            FrameKind::Element => {
                let view = View::parse(frame, &self.ns, limits)?;
                self.proof(&view, hosts)
            }
        }
    }

    /// Writes an error, behind a header if there was none.
    pub fn refuse(&mut self, error: &StreamError, out: &mut Vec<u8>) {
        if !self.answered {
            self.answer(None, out);
        }
        error.write(out);
    }

    fn header(
        &mut self,
        frame: &[u8],
        hosts: &Hosts,
        out: &mut Vec<u8>,
    ) -> Result<Step, StreamError> {
        let header = StreamHeader::parse(frame).map_err(|e| StreamError::new(e.condition()))?;
        if &*header.ns.default != NS_ACCEPT {
            return Err(StreamError::new("invalid-namespace"));
        }
        let to = header.to.as_deref().and_then(|to| jid::domainpart(to).ok());
        let Some(host) = to.filter(|to| hosts.serves(to)) else {
            return Err(StreamError::new("host-unknown"));
        };
        self.ns = Rc::new(as_client(header.ns));
        self.answer(Some(&host), out);
        self.host = Some((*host).into());
        Ok(Step::Continue)
    }

    fn answer(&mut self, host: Option<&str>, out: &mut Vec<u8>) {
        out.extend_from_slice(
            format!(
                "<?xml version='1.0'?><stream:stream xmlns='{NS_ACCEPT}' xmlns:stream='{NS_STREAM}' id='{}'",
                self.id
            )
            .as_bytes(),
        );
        if let Some(host) = host {
            out.extend_from_slice(b" from='");
            escape_attr(host, out);
            out.push(b'\'');
        }
        out.push(b'>');
        self.answered = true;
    }

    fn proof(&mut self, view: &View<'_>, hosts: &Hosts) -> Result<Step, StreamError> {
        let Some(host) = &self.host else {
            return Err(StreamError::new("not-authorized"));
        };
        if view.name() != "handshake" || !matches!(view.ns(), NS_CLIENT | NS_ACCEPT) {
            return Err(StreamError::text(
                "not-authorized",
                "the handshake comes first",
            ));
        }
        let given = view.to_element().text_content();
        // the name may have been taken out of the configuration meanwhile: like a wrong secret
        let right = hosts
            .secret(host)
            .is_some_and(|secret| is_proof(given.trim(), &self.id, secret));
        Ok(match right {
            true => Step::Proved(host.clone()),
            false => Step::Failed(host.clone()),
        })
    }
}

/// Section 3: hexadecimal SHA-1 of stream id and secret.
fn is_proof(given: &str, id: &str, secret: &str) -> bool {
    let wanted = proof(id, secret);
    let given = given.to_ascii_lowercase();
    verify_slices_are_equal(given.as_bytes(), wanted.as_bytes()).is_ok()
}

pub fn proof(id: &str, secret: &str) -> String {
    let hash = digest(
        &SHA1_FOR_LEGACY_USE_ONLY,
        format!("{id}{secret}").as_bytes(),
    );
    hash.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn as_client(mut ns: StreamNs) -> StreamNs {
    let of = |ns: &mut Box<str>| {
        if **ns == *NS_ACCEPT {
            *ns = NS_CLIENT.into();
        }
    };
    of(&mut ns.default);
    for (_, ns) in &mut ns.prefixes {
        of(ns);
    }
    ns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ComponentPolicy as Policy;

    const HEADER: &str = "<stream:stream xmlns='jabber:component:accept' \
                          xmlns:stream='http://etherx.jabber.org/streams' to='plays.shakespeare.lit'>";

    fn hosts() -> Hosts {
        let host = (
            "plays.shakespeare.lit".into(),
            "test".into(),
            Policy::Refuse,
        );
        Hosts::new([host])
    }

    fn run(
        handshake: &mut Handshake,
        kind: FrameKind,
        frame: &str,
    ) -> (Result<Step, StreamError>, String) {
        let mut out = Vec::new();
        let limits = xml::Limits::default();
        let step = handshake.frame(kind, frame.as_bytes(), &hosts(), &limits, &mut out);
        (step, String::from_utf8(out).unwrap())
    }

    #[test]
    fn the_example_of_the_specification_is_right_and_upper_case_too() {
        // XEP-0114 example 3: id 3BF96D32, its digest with the secret "test"
        let digest = "aaee83c26aeeafcbabeabfcbcd50df997e0a2a1e";
        assert_eq!(proof("3BF96D32", "test"), digest);
        for digest in [digest.to_owned(), digest.to_uppercase()] {
            let mut handshake = Handshake::with_id("3BF96D32".into());
            let (step, said) = run(&mut handshake, FrameKind::Header, HEADER);
            assert_eq!(step, Ok(Step::Continue));
            assert_eq!(
                said,
                "<?xml version='1.0'?><stream:stream xmlns='jabber:component:accept' \
                 xmlns:stream='http://etherx.jabber.org/streams' id='3BF96D32' from='plays.shakespeare.lit'>"
            );
            let (step, _) = run(
                &mut handshake,
                FrameKind::Element,
                &format!("<handshake>{digest}</handshake>"),
            );
            assert_eq!(step, Ok(Step::Proved("plays.shakespeare.lit".into())));
        }
    }

    #[test]
    fn a_wrong_proof_a_replayed_one_and_none_are_refused() {
        let replayed = "aaee83c26aeeafcbabeabfcbcd50df997e0a2a1e";
        for given in ["", "00", replayed, &format!("{replayed}0")] {
            let mut handshake = Handshake::default();
            assert_eq!(
                run(&mut handshake, FrameKind::Header, HEADER).0,
                Ok(Step::Continue)
            );
            let frame = format!("<handshake>{given}</handshake>");
            let (step, _) = run(&mut handshake, FrameKind::Element, &frame);
            assert_eq!(step, Ok(Step::Failed("plays.shakespeare.lit".into())));
        }
        let mut handshake = Handshake::default();
        assert_eq!(
            run(&mut handshake, FrameKind::Header, HEADER).0,
            Ok(Step::Continue)
        );
        let (step, _) = run(
            &mut handshake,
            FrameKind::Element,
            "<message to='a@b' from='plays.shakespeare.lit'/>",
        );
        assert_eq!(step.unwrap_err().condition, "not-authorized");
    }

    #[test]
    fn unknown_names_and_other_namespaces_get_the_stream_errors_of_the_specification() {
        for (header, condition) in [
            (
                HEADER.replace("plays.shakespeare.lit", "other.example"),
                "host-unknown",
            ),
            (
                HEADER.replace(" to='plays.shakespeare.lit'", ""),
                "host-unknown",
            ),
            (
                HEADER.replace("jabber:component:accept", "jabber:client"),
                "invalid-namespace",
            ),
            (
                HEADER.replace("jabber:component:accept", "jabber:component:connect"),
                "invalid-namespace",
            ),
        ] {
            let mut handshake = Handshake::default();
            let (step, said) = run(&mut handshake, FrameKind::Header, &header);
            let error = step.unwrap_err();
            assert_eq!((error.condition, &*said), (condition, ""));
            let mut out = Vec::new();
            handshake.refuse(&error, &mut out);
            let said = String::from_utf8(out).unwrap();
            assert!(said.contains("<stream:stream ") && said.ends_with("</stream:stream>"));
        }
    }

    #[test]
    fn prefixes_of_the_component_namespace_mean_the_client_namespace() {
        let header = "<stream:stream xmlns='jabber:component:accept' xmlns:c='jabber:component:accept' \
                      xmlns:stream='http://etherx.jabber.org/streams' to='plays.shakespeare.lit'>";
        let mut handshake = Handshake::default();
        assert_eq!(
            run(&mut handshake, FrameKind::Header, header).0,
            Ok(Step::Continue)
        );
        let ns = handshake.stream_ns();
        assert_eq!(&*ns.default, NS_CLIENT);
        assert_eq!(ns.resolve("c"), Some(NS_CLIENT));
    }
}
