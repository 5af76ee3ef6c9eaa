//! The stream header (RFC 6120 §4.7).
//!
//! In: one [`FrameKind::Header`](super::FrameKind::Header) frame. Out: its addresses, version and language, and the
//! namespaces it declares, by which every stanza of the stream is read.
//! Promise: what passes is a well-formed UTF-8 header of an XMPP stream, or the error says which stream error to send.

use std::borrow::Cow;

use smallvec::SmallVec;

use super::escape::unescape_attr;
use super::tag::{Attr, QName, TagReader};
use super::view::{check_chars, check_declaration, check_unique};
use super::{NS_CLIENT, NS_STREAMS, NS_XML, XmlError};

/// Attributes of a stream header, declarations included: a fixed bound, since each stanza looks at the declarations.
const ATTRIBUTES_MAX: usize = 32;

/// What a stream header said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    pub to: Option<String>,
    pub from: Option<String>,
    pub version: Option<String>,
    /// `xml:lang`
    pub lang: Option<String>,
    pub ns: StreamNs,
}

/// The namespaces that a stream header declares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamNs {
    /// The default namespace; empty if there is none.
    pub default: Box<str>,
    /// Prefix and namespace, `xml` and `xmlns` excluded.
    pub prefixes: Box<[(Box<str>, Box<str>)]>,
}

impl StreamNs {
    /// What clients usually declare: `xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'`.
    pub fn client() -> Self {
        Self {
            default: NS_CLIENT.into(),
            prefixes: Box::new([("stream".into(), NS_STREAMS.into())]),
        }
    }

    /// The namespace of a declared prefix.
    pub fn resolve(&self, prefix: &str) -> Option<&str> {
        self.prefixes
            .iter()
            .find(|(p, _)| **p == *prefix)
            .map(|(_, ns)| &**ns)
    }
}

/// Why a stream header was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error(transparent)]
    Xml(#[from] XmlError),
    /// The root element is not in the namespace of streams.
    #[error("the root element is not in the namespace {NS_STREAMS}")]
    Namespace,
    /// The root element is not `stream`.
    #[error("the root element is not a stream")]
    Name,
}

impl HeaderError {
    /// The stream error condition of RFC 6120 §4.9.3.
    pub fn condition(&self) -> &'static str {
        match self {
            Self::Xml(e) => e.condition(),
            Self::Namespace => "invalid-namespace",
            Self::Name => "bad-format",
        }
    }
}

impl StreamHeader {
    /// Reads a header frame: white space, XML declaration (if any), start tag of the stream.
    pub fn parse(frame: &[u8]) -> Result<Self, HeaderError> {
        let text = std::str::from_utf8(frame).map_err(|_| XmlError::Encoding)?;
        check_chars(text)?;
        let mut tag = text.trim_start_matches(SPACE);
        if let Some(rest) = tag.strip_prefix("<?xml") {
            let (declaration, rest) = rest
                .split_once("?>")
                .ok_or(XmlError::NotWellFormed("XML declaration"))?;
            check_xml_declaration(declaration)?;
            tag = rest.trim_start_matches(SPACE);
        }
        let (name, mut reader) = TagReader::open(tag)?;
        let mut attrs: SmallVec<[(QName<'_>, Attr<'_>); 8]> = SmallVec::new();
        let mut ns = StreamNs::default();
        let mut prefixes = Vec::new();
        while let Some((name, attr)) = reader.next()? {
            if attrs.len() == ATTRIBUTES_MAX {
                return Err(XmlError::TooBig("attributes of the stream header").into());
            }
            check_declaration(name, attr.raw)?;
            match (name.prefix(), name.full) {
                (None, "xmlns") => ns.default = unescape_attr(attr.raw)?.into(),
                (Some("xmlns"), _) if name.local() != "xml" => {
                    prefixes.push((name.local().into(), unescape_attr(attr.raw)?.into()));
                }
                _ => {}
            }
            attrs.push((name, attr));
        }
        ns.prefixes = prefixes.into();
        let resolve = |prefix: &str| match prefix {
            "xml" => Ok(Cow::Borrowed(NS_XML)),
            // Declarations differ in their local names or are duplicates: any namespace of their own will do.
            "xmlns" => Ok(Cow::Borrowed(super::NS_XMLNS)),
            _ => ns
                .resolve(prefix)
                .map(Cow::Borrowed)
                .ok_or(XmlError::BadPrefix),
        };
        for prefix in attrs.iter().filter_map(|(name, _)| name.prefix()) {
            resolve(prefix)?;
        }
        check_unique(&attrs, resolve)?;
        let root = match name.prefix() {
            None => Cow::Borrowed(&*ns.default),
            Some(prefix) => resolve(prefix)?,
        };
        if root != NS_STREAMS {
            return Err(HeaderError::Namespace);
        }
        if name.local() != "stream" {
            return Err(HeaderError::Name);
        }
        if reader.empty {
            return Err(XmlError::BadFormat("empty stream").into());
        }
        let get = |key: &str| -> Result<Option<String>, XmlError> {
            let attr = attrs.iter().find(|(name, _)| name.full == key);
            attr.map(|(_, attr)| unescape_attr(attr.raw).map(Cow::into_owned))
                .transpose()
        };
        Ok(Self {
            to: get("to")?,
            from: get("from")?,
            version: get("version")?,
            lang: get("xml:lang")?,
            ns,
        })
    }
}

const SPACE: [char; 4] = [' ', '\t', '\r', '\n'];

/// What stands between `<?xml` and `?>` (XML 1.0 production 23).
fn check_xml_declaration(text: &str) -> Result<(), XmlError> {
    const BAD: XmlError = XmlError::NotWellFormed("XML declaration");
    // Its pseudo-attributes are written as attributes are, so the tag reader can read them.
    let tag = format!("<xml{text}>");
    let (_, mut reader) = TagReader::open(&tag)?;
    let mut expected: &[&str] = &["version", "encoding", "standalone"];
    while let Some((name, attr)) = reader.next()? {
        let place = expected.iter().position(|e| *e == name.full).ok_or(BAD)?;
        let version_is_missing = place > 0 && expected[0] == "version";
        if version_is_missing {
            return Err(BAD);
        }
        match name.full {
            "version" if attr.raw != "1.0" => return Err(XmlError::NotWellFormed("XML version")),
            "encoding" if !attr.raw.eq_ignore_ascii_case("utf-8") => {
                return Err(XmlError::Encoding);
            }
            "standalone" if !matches!(attr.raw, "yes" | "no") => return Err(BAD),
            _ => expected = &expected[place + 1..],
        }
    }
    if reader.empty || expected.first() == Some(&"version") {
        Err(BAD)
    } else {
        Ok(())
    }
}
