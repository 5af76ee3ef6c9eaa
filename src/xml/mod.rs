//! XML as XMPP uses it (RFC 6120 §4 and §11).
//!
//! In: the bytes of an endless stream. Out: frames ([`Framer`]), the stream header ([`StreamHeader`]), zero-copy views of
//! complete stanzas ([`View`]), and small owned trees ([`Element`]) for what is not hot.
//! Promise: what [`View::parse`] accepts is well-formed, namespace-well-formed, restricted XML (RFC 6120 §11.1) for every
//! parser a recipient may have, so its bytes can be forwarded as they came.
//!
//! ```text
//! bytes -> Framer::next -> Frame::Header  -> StreamHeader::parse
//!                       -> Frame::Element -> View::parse -> (hot path)  raw(), attrs(), inner(), children()
//!                                                        -> (the rest)  to_element() -> Element
//! ```

pub mod dom;
pub mod escape;
pub mod framer;
pub mod header;
mod names;
mod standalone;
mod tag;
#[cfg(test)]
mod tests;
pub mod view;

pub use dom::{Element, Node};
pub use escape::{escape_attr, escape_text, unescape};
pub use framer::{Frame, FrameKind, Framer, Limits, MESSAGE};
pub use header::{HeaderError, StreamHeader, StreamNs};
pub use standalone::{Attributes, missing_declaration};
pub use tag::Attr;
pub use view::{Child, View};

/// Namespace of the stream element (RFC 6120 §4.8.1).
pub const NS_STREAMS: &str = "http://etherx.jabber.org/streams";
/// Content namespace of client streams (RFC 6120 §4.8.2).
pub const NS_CLIENT: &str = "jabber:client";
/// Content namespace of server streams (RFC 6120 §4.8.2).
pub const NS_SERVER: &str = "jabber:server";
/// What the prefix `xml` is bound to, always (Namespaces in XML 1.0 §3).
pub const NS_XML: &str = "http://www.w3.org/XML/1998/namespace";
/// What the prefix `xmlns` is bound to, always (Namespaces in XML 1.0 §3).
pub const NS_XMLNS: &str = "http://www.w3.org/2000/xmlns/";

/// Why bytes were refused. Each ends the stream; [`XmlError::condition`] names the stream error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// Breaks XML 1.0 or Namespaces in XML 1.0.
    #[error("not well-formed: {0}")]
    NotWellFormed(&'static str),
    /// Well-formed, but forbidden in XMPP (RFC 6120 §11.1): comment, processing instruction, DTD, entity.
    #[error("restricted XML: {0}")]
    Restricted(&'static str),
    /// A limit was passed; the text names it.
    #[error("too big: {0}")]
    TooBig(&'static str),
    /// A prefix that nobody declared.
    #[error("undeclared namespace prefix")]
    BadPrefix,
    /// Not UTF-8 (RFC 6120 §11.6).
    #[error("encoding is not UTF-8")]
    Encoding,
    /// XML that has no place where it stands, such as text between stanzas.
    #[error("bad format: {0}")]
    BadFormat(&'static str),
}

impl XmlError {
    /// The stream error condition of RFC 6120 §4.9.3.
    pub fn condition(&self) -> &'static str {
        match self {
            Self::NotWellFormed(_) => "not-well-formed",
            Self::Restricted(_) => "restricted-xml",
            Self::TooBig(_) => "policy-violation",
            // not namespace-well-formed (RFC 6120 4.9.3.13)
            Self::BadPrefix => "not-well-formed",
            Self::Encoding => "unsupported-encoding",
            Self::BadFormat(_) => "bad-format",
        }
    }
}

/// XML white space (XML 1.0 §2.3, production 3).
pub(crate) const fn is_space(b: u8) -> bool {
    matches!(b, b' ' | b'\t' | b'\r' | b'\n')
}
