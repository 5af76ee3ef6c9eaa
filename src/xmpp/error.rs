//! Protocol errors: stanza errors (RFC 6120 section 8.3) and stream errors (RFC 6120 section 4.9).

use crate::xml::dom::Element;

pub const NS_STANZAS: &str = "urn:ietf:params:xml:ns:xmpp-stanzas";
pub const NS_STREAMS: &str = "urn:ietf:params:xml:ns:xmpp-streams";

/// A stanza error: condition, its type (what the sender may do about it), and an optional text in English.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StanzaError {
    pub condition: &'static str,
    pub kind: &'static str,
    pub text: Option<&'static str>,
    /// Application-specific condition: element name and namespace.
    pub detail: Option<(&'static str, &'static str)>,
    /// Its attribute `feature` (XEP-0060 names what is unsupported in this way).
    pub feature: Option<&'static str>,
}

macro_rules! stanza_errors {
    ($($name:ident = $kind:literal $condition:literal;)*) => {
        $(pub const $name: StanzaError = StanzaError { condition: $condition, kind: $kind, text: None, detail: None, feature: None };)*
    };
}

impl StanzaError {
    stanza_errors! {
        BAD_REQUEST = "modify" "bad-request";
        CONFLICT = "cancel" "conflict";
        FEATURE_NOT_IMPLEMENTED = "cancel" "feature-not-implemented";
        FORBIDDEN = "auth" "forbidden";
        INTERNAL_SERVER_ERROR = "wait" "internal-server-error";
        ITEM_NOT_FOUND = "cancel" "item-not-found";
        JID_MALFORMED = "modify" "jid-malformed";
        NOT_ACCEPTABLE = "modify" "not-acceptable";
        NOT_ALLOWED = "cancel" "not-allowed";
        NOT_AUTHORIZED = "auth" "not-authorized";
        POLICY_VIOLATION = "modify" "policy-violation";
        REGISTRATION_REQUIRED = "auth" "registration-required";
        REMOTE_SERVER_NOT_FOUND = "cancel" "remote-server-not-found";
        REMOTE_SERVER_TIMEOUT = "wait" "remote-server-timeout";
        RESOURCE_CONSTRAINT = "wait" "resource-constraint";
        SERVICE_UNAVAILABLE = "cancel" "service-unavailable";
        SUBSCRIPTION_REQUIRED = "auth" "subscription-required";
        UNEXPECTED_REQUEST = "wait" "unexpected-request";
    }

    pub const fn text(mut self, text: &'static str) -> Self {
        self.text = Some(text);
        self
    }

    /// Trying again later may help.
    pub const fn wait(mut self) -> Self {
        self.kind = "wait";
        self
    }

    pub const fn detail(mut self, name: &'static str, ns: &'static str) -> Self {
        self.detail = Some((name, ns));
        self
    }

    /// The attribute `feature` of the detail.
    pub const fn feature(mut self, feature: &'static str) -> Self {
        self.feature = Some(feature);
        self
    }

    /// `<error type='…'><condition/>[<text/>][<detail/>]</error>` in `jabber:client`.
    pub fn element(&self) -> Element {
        let mut error = Element::new("error", super::NS_CLIENT)
            .attr("type", self.kind)
            .child(Element::new(self.condition, NS_STANZAS));
        if let Some(text) = self.text {
            error = error.child(
                Element::new("text", NS_STANZAS)
                    .attr("xml:lang", "en")
                    .text(text),
            );
        }
        if let Some((name, ns)) = self.detail {
            let mut detail = Element::new(name, ns);
            if let Some(feature) = self.feature {
                detail.set("feature", feature);
            }
            error = error.child(detail);
        }
        error
    }
}

/// A stream error: the stream ends with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamError {
    pub condition: &'static str,
    pub text: Option<&'static str>,
    /// Application-specific condition, as XML (RFC 6120 4.9.4).
    pub detail: Option<Box<str>>,
}

impl StreamError {
    pub const fn new(condition: &'static str) -> Self {
        StreamError {
            condition,
            text: None,
            detail: None,
        }
    }

    pub const fn text(condition: &'static str, text: &'static str) -> Self {
        StreamError {
            condition,
            text: Some(text),
            detail: None,
        }
    }

    pub fn detail(self, xml: String) -> Self {
        StreamError {
            detail: Some(xml.into()),
            ..self
        }
    }

    /// Writes the error and the closing tag of the stream.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"<stream:error><");
        out.extend_from_slice(self.condition.as_bytes());
        out.extend_from_slice(b" xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>");
        if let Some(text) = self.text {
            out.extend_from_slice(
                b"<text xmlns='urn:ietf:params:xml:ns:xmpp-streams' xml:lang='en'>",
            );
            crate::xml::escape::escape_text(text, out);
            out.extend_from_slice(b"</text>");
        }
        if let Some(detail) = &self.detail {
            out.extend_from_slice(detail.as_bytes());
        }
        out.extend_from_slice(b"</stream:error></stream:stream>");
    }
}

impl From<crate::xml::XmlError> for StreamError {
    fn from(error: crate::xml::XmlError) -> Self {
        StreamError::new(error.condition())
    }
}
