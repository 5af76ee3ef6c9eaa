//! The stream header (RFC 6120 §4.7).
//!
//! In: one [`FrameKind::Header`](super::FrameKind::Header) frame. Out: its addresses, version and language, and the
//! namespaces it declares, by which every stanza of the stream is read.
//! Promise: what passes is a well-formed UTF-8 header of an XMPP stream, or the error says which stream error to send.

use super::tag::{QName, TagReader};
use super::view::{DUPLICATE, check_chars, check_declaration, value};
use super::{NS_CLIENT, NS_STREAMS, XmlError};

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
        let mut attrs: Vec<(QName<'_>, String)> = Vec::new();
        let mut ns = StreamNs::default();
        let mut prefixes = Vec::new();
        while let Some((name, attr, plain)) = reader.next()? {
            if attrs.len() == ATTRIBUTES_MAX {
                return Err(XmlError::TooBig("attributes of the stream header").into());
            }
            if attrs.iter().any(|(n, _)| n.full == name.full) {
                return Err(DUPLICATE.into());
            }
            let value = value(attr.raw, plain)?.into_owned();
            if name.full == "xmlns" {
                check_declaration("", &value)?;
                ns.default = value.as_str().into();
            } else if name.prefix() == Some("xmlns") {
                check_declaration(name.local(), &value)?;
                if name.local() != "xml" {
                    prefixes.push((name.local().into(), value.as_str().into()));
                }
            }
            attrs.push((name, value));
        }
        ns.prefixes = prefixes.into();
        let resolve = |prefix: &str| ns.resolve(prefix).ok_or(XmlError::BadPrefix);
        let mut expanded: Vec<(&str, &str)> = Vec::new();
        for (name, _) in &attrs {
            let Some(prefix) = name.prefix().filter(|p| !matches!(*p, "xml" | "xmlns")) else {
                continue;
            };
            let attr = (resolve(prefix)?, name.local());
            if expanded.contains(&attr) {
                return Err(DUPLICATE.into());
            }
            expanded.push(attr);
        }
        let root = match name.prefix() {
            None => &*ns.default,
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
        let get = |key: &str| {
            attrs
                .iter()
                .find(|(name, _)| name.full == key)
                .map(|(_, value)| value.clone())
        };
        Ok(Self {
            to: get("to"),
            from: get("from"),
            version: get("version"),
            lang: get("xml:lang"),
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
    while let Some((name, attr, _)) = reader.next()? {
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

#[cfg(test)]
mod tests {
    use super::*;

    const NS: &str = "xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'";

    fn condition(header: &str) -> &'static str {
        StreamHeader::parse(header.as_bytes())
            .unwrap_err()
            .condition()
    }

    #[test]
    fn a_header_is_read() {
        let declaration = "<?xml version=\"1.0\" encoding='UTF-8' standalone='yes' ?>";
        let text = format!(
            "\n{declaration} <stream:stream {NS} to='a&amp;b' from='x@y' version='1.0' xml:lang='de' id='7' >"
        );
        let header = StreamHeader::parse(text.as_bytes()).unwrap();
        assert_eq!(header.to.as_deref(), Some("a&b"));
        assert_eq!(header.from.as_deref(), Some("x@y"));
        assert_eq!(header.version.as_deref(), Some("1.0"));
        assert_eq!(header.lang.as_deref(), Some("de"));
        assert_eq!(header.ns, StreamNs::client());
    }

    #[test]
    fn prefixes_are_free() {
        let header = b"<stream xmlns='http://etherx.jabber.org/streams' xmlns:c='jabber:client' xmlns:d='urn:d' d:x='1'>";
        let ns = StreamHeader::parse(header).unwrap().ns;
        assert_eq!(&*ns.default, NS_STREAMS);
        assert_eq!(ns.resolve("c"), Some(NS_CLIENT));
        assert_eq!(ns.resolve("d"), Some("urn:d"));
        assert_eq!(ns.resolve("stream"), None);
    }

    #[test]
    fn wrong_headers_get_their_condition() {
        assert_eq!(condition(&format!("<stream:features {NS}>")), "bad-format");
        assert_eq!(condition(&format!("<stream {NS}>")), "invalid-namespace");
        assert_eq!(condition("<stream>"), "invalid-namespace");
        assert_eq!(
            condition("<stream:stream xmlns='jabber:client' xmlns:stream='urn:other'>"),
            "invalid-namespace"
        );
        assert_eq!(
            condition("<stream:stream xmlns='jabber:client'>"),
            "not-well-formed"
        );
        assert_eq!(
            condition(&format!("<stream:stream {NS} x:y='1'>")),
            "not-well-formed"
        );
        assert_eq!(condition(&format!("<stream:stream {NS}/>")), "bad-format");
        let latin = format!("<?xml version='1.0' encoding='ISO-8859-1'?><stream:stream {NS}>");
        assert_eq!(condition(&latin), "unsupported-encoding");
        assert_eq!(
            condition(&format!("<stream:stream {NS} to='\u{FFFF}'>")),
            "not-well-formed"
        );
        let bytes = b"<stream:stream to='\xFF'>";
        assert_eq!(
            StreamHeader::parse(bytes).unwrap_err().condition(),
            "unsupported-encoding"
        );
    }

    #[test]
    fn malformed_headers_are_refused() {
        for header in [
            format!("<stream:stream {NS} {NS}>"),
            format!("<stream:stream {NS} to='a' to='b'>"),
            format!("<stream:stream {NS} to='a'from='b'>"),
            format!("<stream:stream {NS} to>"),
            format!("<stream:stream {NS} to=a>"),
            format!("<stream:stream {NS} to='&'>"),
            format!("<stream:stream {NS} xmlns:xml='urn:x'>"),
            format!("<stream:stream {NS} xmlns:xmlns='urn:x'>"),
            format!("<stream:stream {NS} xmlns:a=''>"),
            format!("<stream:stream {NS} xmlns:a='urn:a' xmlns:b='urn:a' a:x='' b:x=''>"),
            format!("<stream::stream {NS}>"),
            format!("<:stream {NS}>"),
            format!("<?xml?><stream:stream {NS}>"),
            format!("<?xml encoding='utf-8'?><stream:stream {NS}>"),
            format!("<?xml version='1.1'?><stream:stream {NS}>"),
            format!("<?xml version='1.0' version='1.0'?><stream:stream {NS}>"),
            format!("<?xml version='1.0' standalone='maybe'?><stream:stream {NS}>"),
            format!("<?xml version='1.0' standalone='yes' encoding='utf-8'?><stream:stream {NS}>"),
            format!("<?xml version='1.0'/?><stream:stream {NS}>"),
            format!("<?xml version='1.0' x='y'?><stream:stream {NS}>"),
        ] {
            assert_eq!(condition(&header), "not-well-formed", "{header}");
        }
    }

    #[test]
    fn many_attributes_are_refused() {
        let many: String = (0..40).map(|n| format!(" xmlns:p{n}='urn:{n}'")).collect();
        assert_eq!(
            condition(&format!("<stream:stream {NS}{many}>")),
            "policy-violation"
        );
    }
}
