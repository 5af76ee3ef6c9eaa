//! A zero-copy view of one complete stanza.
//!
//! In: the bytes of one element frame and the namespaces of its stream. Out: the stanza's name, attributes, inner bytes and
//! direct children, all as slices of the frame.
//! Promise: what is accepted is well-formed XML 1.0, namespace-well-formed and restricted (RFC 6120 §11.1) through and
//! through, not only where the view looks, so that its bytes may be sent to anybody. [`View::standalone`] says when they need
//! nothing from the stream they came from. A usual stanza costs no allocation.

use std::borrow::Cow;

use memchr::{memchr, memchr_iter, memmem};
use quick_xml::parser::{ElementParser, Parser};
use smallvec::SmallVec;

use super::dom::Element;
use super::escape::{check_references, unescape, unescape_attr};
use super::framer::Limits;
use super::header::StreamNs;
use super::tag::{Attr, TagReader};
use super::{NS_CLIENT, NS_SERVER, NS_STREAMS, NS_XML, NS_XMLNS, XmlError, is_space};

/// Prefix declarations in force at one place of a stanza: a bound on the work per name.
const PREFIXES_MAX: usize = 64;

/// One stanza, checked, as slices of its frame.
#[derive(Clone, Debug)]
pub struct View<'a> {
    raw: &'a str,
    name: &'a str,
    ns: Cow<'a, str>,
    inner: &'a str,
    attrs: SmallVec<[Attr<'a>; 6]>,
    children: SmallVec<[Child<'a>; 4]>,
    standalone: bool,
    /// The stream's default namespace.
    outer_default: Cow<'a, str>,
    /// The stream's prefixes that the stanza uses.
    outer_prefixes: Vec<(&'a str, Box<str>)>,
}

/// A direct child element of a stanza.
#[derive(Clone, Debug)]
pub struct Child<'a> {
    /// Local name.
    pub name: &'a str,
    pub ns: Cow<'a, str>,
    /// The whole child.
    pub raw: &'a str,
    /// Bytes of its start tag.
    tag_len: usize,
}

impl<'a> View<'a> {
    /// Checks a whole element and looks at its first two levels. `stream` is what the stream's header declared.
    pub fn parse(
        frame: &'a [u8],
        stream: &StreamNs,
        limits: &Limits,
    ) -> Result<View<'a>, XmlError> {
        let raw = std::str::from_utf8(frame).map_err(|_| XmlError::NotWellFormed("not UTF-8"))?;
        check_chars(raw)?;
        if raw.as_bytes().first() != Some(&b'<') {
            return Err(XmlError::NotWellFormed("an element begins with '<'"));
        }
        let mut view = View {
            raw,
            name: "",
            ns: Cow::Borrowed(""),
            inner: "",
            attrs: SmallVec::new(),
            children: SmallVec::new(),
            standalone: true,
            outer_default: intern(&stream.default),
            outer_prefixes: Vec::new(),
        };
        Check::new(&mut view, stream, limits).run()?;
        Ok(view)
    }

    /// The whole element.
    pub fn raw(&self) -> &'a str {
        self.raw
    }

    /// Local name of the top element.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Namespace of the top element.
    pub fn ns(&self) -> &str {
        &self.ns
    }

    /// The value of an attribute without prefix, or of `xml:lang` by that name; unescaped.
    pub fn attr(&self, name: &str) -> Option<Cow<'a, str>> {
        let attr = self.attrs.iter().find(|a| a.name == name)?;
        Some(unescape_attr(attr.raw).unwrap_or(Cow::Borrowed(attr.raw)))
    }

    /// All attributes but namespace declarations, as written.
    pub fn attrs(&self) -> impl Iterator<Item = Attr<'a>> {
        self.attrs.iter().copied()
    }

    /// The bytes between start tag and end tag; empty for an empty element.
    pub fn inner(&self) -> &'a str {
        self.inner
    }

    /// Direct child elements, in order.
    pub fn children(&self) -> &[Child<'a>] {
        &self.children
    }

    /// The first direct child with this local name and namespace.
    pub fn child(&self, name: &str, ns: &str) -> Option<&Child<'a>> {
        self.children.iter().find(|c| c.name == name && c.ns == ns)
    }

    /// May `inner` be put, byte for byte, between `<message …>` and `</message>` of a stream whose default namespace is
    /// `jabber:client`? True if the top element and its attributes have no prefix (but `xml:`), the default namespace at
    /// `inner` is `jabber:client`, and every prefix used in `inner` is declared in `inner`.
    pub fn standalone(&self) -> bool {
        self.standalone
    }

    /// The stanza as an owned tree.
    pub fn to_element(&self) -> Element {
        let prefixes = self.outer_prefixes.iter().map(|(p, ns)| (*p, &**ns));
        Element::from_checked(self.raw, &self.outer_default, prefixes)
    }
}

impl<'a> Child<'a> {
    /// The value of an attribute without prefix, or of `xml:lang` by that name; unescaped.
    pub fn attr(&self, name: &str) -> Option<Cow<'a, str>> {
        let (_, mut tag) = TagReader::open(&self.raw[..self.tag_len]).ok()?;
        while let Ok(Some((_, attr, _))) = tag.next() {
            if attr.name == name {
                return unescape_attr(attr.raw).ok();
            }
        }
        None
    }

    /// The bytes between start tag and end tag; empty for an empty element.
    pub fn inner(&self) -> &'a str {
        inner_of(self.raw, self.tag_len)
    }

    /// The text directly in this child, without that of its own children; unescaped.
    pub fn text(&self) -> Cow<'a, str> {
        let inner = self.inner();
        if memchr(b'<', inner.as_bytes()).is_none() {
            return unescape(inner).unwrap_or(Cow::Borrowed(inner));
        }
        // CDATA sections or child elements: seldom.
        Cow::Owned(Element::from_checked(self.raw, "", std::iter::empty()).text_content())
    }
}

/// `raw` is a whole checked element whose start tag has `tag_len` bytes.
fn inner_of(raw: &str, tag_len: usize) -> &str {
    if tag_len == raw.len() {
        return "";
    }
    let end = raw.rfind("</").unwrap_or(raw.len());
    &raw[tag_len..end]
}

/// A prefix declared by an element that is still open.
struct Declared<'a> {
    prefix: &'a str,
    ns: Cow<'a, str>,
    depth: usize,
}

/// One pass over a stanza.
struct Check<'a, 's> {
    stream: &'s StreamNs,
    limits: &'s Limits,
    view: &'s mut View<'a>,
    /// Default namespace at the stanza's inner.
    inner_default: Cow<'a, str>,
    /// Names of open elements.
    open: SmallVec<[&'a str; 8]>,
    declared: SmallVec<[Declared<'a>; 4]>,
    /// Where the direct child that is open begins.
    child_start: usize,
}

impl<'a, 's> Check<'a, 's> {
    fn new(view: &'s mut View<'a>, stream: &'s StreamNs, limits: &'s Limits) -> Self {
        Self {
            stream,
            limits,
            inner_default: view.outer_default.clone(),
            view,
            open: SmallVec::new(),
            declared: SmallVec::new(),
            child_start: 0,
        }
    }

    fn run(&mut self) -> Result<(), XmlError> {
        let raw = self.view.raw;
        let bytes = raw.as_bytes();
        let may_hold_cdata_end = memchr(b']', bytes).is_some();
        let mut inner_start = 0;
        let mut at = 0;
        loop {
            let unfinished = XmlError::NotWellFormed("element without an end");
            let start = match bytes.get(at) {
                Some(b'<') => at,
                _ => at + memchr(b'<', &bytes[at..]).ok_or(unfinished)?,
            };
            if start > at {
                if may_hold_cdata_end && raw[at..start].contains("]]>") {
                    return Err(XmlError::NotWellFormed("']]>' in text"));
                }
                check_references(&bytes[at..start])?;
            }
            let rest = &bytes[start..];
            match rest.get(1) {
                Some(b'/') => {
                    at = start + memchr(b'>', rest).ok_or(unfinished)? + 1;
                    self.end(start, at)?;
                    if self.open.is_empty() {
                        self.view.inner = &raw[inner_start..start];
                        return at_end(raw, at);
                    }
                }
                Some(b'!') => at = start + self.cdata_len(rest)?,
                Some(b'?') => return Err(XmlError::Restricted("processing instruction")),
                _ => {
                    at = start + ElementParser::Outside.feed(rest).ok_or(unfinished)? + 1;
                    let empty = bytes[at - 2] == b'/';
                    self.start(start, at, empty)?;
                    match (self.open.len(), empty) {
                        (0, _) => return at_end(raw, at),
                        (1, false) => inner_start = at,
                        _ => {}
                    }
                }
            }
        }
    }

    /// The length of the CDATA section at the start of `rest`, which begins with `<!`.
    fn cdata_len(&self, rest: &[u8]) -> Result<usize, XmlError> {
        const OPEN: &[u8] = b"<![CDATA[";
        match rest.get(2) {
            Some(b'-') => return Err(XmlError::Restricted("comment")),
            Some(b'D') => return Err(XmlError::Restricted("document type declaration")),
            _ => {}
        }
        let end = rest
            .strip_prefix(OPEN)
            .and_then(|content| memmem::find(content, b"]]>"));
        match end {
            Some(end) if !self.open.is_empty() => Ok(OPEN.len() + end + 3),
            _ => Err(XmlError::NotWellFormed("CDATA section")),
        }
    }

    fn start(&mut self, start: usize, end: usize, empty: bool) -> Result<(), XmlError> {
        let depth = self.open.len() + 1;
        if depth > usize::from(self.limits.depth_max) {
            return Err(XmlError::TooBig("depth"));
        }
        let text = &self.view.raw[start..end];
        let (name, mut tag) = TagReader::open(text)?;
        if tag.empty != empty {
            return Err(XmlError::NotWellFormed("tag"));
        }
        let mut names: SmallVec<[&'a str; 8]> = SmallVec::new();
        let mut count = 0;
        let mut default = None;
        let mut prefixed = false;
        while let Some((name, attr, plain)) = tag.next()? {
            count += 1;
            if count > self.limits.attributes_max {
                return Err(XmlError::TooBig("attributes"));
            }
            if name.full == "xmlns" {
                let ns = value(attr.raw, plain)?;
                check_declaration("", &ns)?;
                if default.replace(ns).is_some() {
                    return Err(DUPLICATE);
                }
                continue;
            }
            match name.prefix() {
                None | Some("xml") => {}
                Some("xmlns") => {
                    self.declare(name.local(), value(attr.raw, plain)?, depth)?;
                    continue;
                }
                Some(_) => prefixed = true,
            }
            if names.contains(&name.full) {
                return Err(DUPLICATE);
            }
            names.push(name.full);
            if depth == 1 {
                self.view.attrs.push(attr);
            }
        }
        if prefixed {
            self.prefixed_attributes(&names, depth)?;
        }
        let ns = match name.prefix() {
            Some(prefix) => Some(self.resolve(prefix, depth)?),
            None => None,
        };
        match depth {
            1 => {
                if let Some(default) = default {
                    self.inner_default = default;
                }
                if prefixed || ns.is_some() || self.inner_default != NS_CLIENT {
                    self.view.standalone = false;
                }
                self.view.name = name.local();
                self.view.ns = ns.unwrap_or_else(|| self.inner_default.clone());
            }
            2 => {
                self.child_start = start;
                let ns = ns.or(default).unwrap_or_else(|| self.inner_default.clone());
                self.view.children.push(Child {
                    name: name.local(),
                    ns,
                    raw: text,
                    tag_len: end - start,
                });
            }
            _ => {}
        }
        if empty {
            self.leave(depth);
        } else {
            self.open.push(name.full);
        }
        Ok(())
    }

    /// Takes note of `xmlns:prefix='ns'`.
    fn declare(&mut self, prefix: &'a str, ns: Cow<'a, str>, depth: usize) -> Result<(), XmlError> {
        check_declaration(prefix, &ns)?;
        if self
            .declared
            .iter()
            .any(|d| d.depth == depth && d.prefix == prefix)
        {
            return Err(DUPLICATE);
        }
        if self.declared.len() == PREFIXES_MAX {
            return Err(XmlError::TooBig("namespace declarations"));
        }
        self.declared.push(Declared { prefix, ns, depth });
        Ok(())
    }

    /// Their prefixes are declared, and no two are the same by namespace and local name (Namespaces in XML §6.3).
    #[cold]
    fn prefixed_attributes(&mut self, names: &[&'a str], depth: usize) -> Result<(), XmlError> {
        let mut expanded: SmallVec<[(Cow<'a, str>, &'a str); 8]> = SmallVec::new();
        for name in names {
            if let Some((prefix, local)) = name.split_once(':') {
                let ns = self.resolve(prefix, depth)?;
                if expanded.iter().any(|(n, l)| *l == local && *n == ns) {
                    return Err(DUPLICATE);
                }
                expanded.push((ns, local));
            }
        }
        Ok(())
    }

    fn end(&mut self, start: usize, end: usize) -> Result<(), XmlError> {
        let depth = self.open.len();
        let name = self
            .open
            .pop()
            .ok_or(XmlError::NotWellFormed("end tag without a start tag"))?;
        let found = self.view.raw[start + 2..end - 1]
            .trim_end_matches(|c: char| c.is_ascii() && is_space(c as u8));
        if found != name {
            return Err(XmlError::NotWellFormed(
                "end tag does not match its start tag",
            ));
        }
        if depth == 2 {
            let child = self
                .view
                .children
                .last_mut()
                .expect("the child was pushed by its start tag");
            child.raw = &self.view.raw[self.child_start..end];
        }
        self.leave(depth);
        Ok(())
    }

    /// Forgets what the element at `depth` declared.
    fn leave(&mut self, depth: usize) {
        while self.declared.last().is_some_and(|d| d.depth >= depth) {
            self.declared.pop();
        }
    }

    /// The namespace of a prefix that is used at `depth`; notes what the stanza's inner takes from outside.
    fn resolve(&mut self, prefix: &'a str, depth: usize) -> Result<Cow<'a, str>, XmlError> {
        let (ns, declared_at) = self.lookup(prefix)?;
        let inside = declared_at.is_none_or(|at| at >= 2);
        if depth >= 2 && !inside {
            self.view.standalone = false;
        }
        if declared_at == Some(0) && !self.view.outer_prefixes.iter().any(|(p, _)| *p == prefix) {
            self.view.outer_prefixes.push((prefix, (*ns).into()));
        }
        Ok(ns)
    }

    /// The namespace of a prefix and the depth that declared it: 0 is the stream, None is XML itself.
    fn lookup(&self, prefix: &str) -> Result<(Cow<'a, str>, Option<usize>), XmlError> {
        if prefix == "xml" {
            return Ok((Cow::Borrowed(NS_XML), None));
        }
        if let Some(d) = self.declared.iter().rev().find(|d| d.prefix == prefix) {
            return Ok((d.ns.clone(), Some(d.depth)));
        }
        let ns = self.stream.resolve(prefix).ok_or(XmlError::BadPrefix)?;
        Ok((intern(ns), Some(0)))
    }
}

pub(super) const DUPLICATE: XmlError = XmlError::NotWellFormed("attribute given twice");

/// The element ended at `end`; nothing may follow.
fn at_end(raw: &str, end: usize) -> Result<(), XmlError> {
    if end == raw.len() {
        Ok(())
    } else {
        Err(XmlError::NotWellFormed("bytes after the element's end"))
    }
}

/// A namespace that outlives the stream's header without an allocation, if it is one of the usual.
fn intern<'a>(ns: &str) -> Cow<'a, str> {
    for known in [NS_CLIENT, NS_STREAMS, NS_SERVER, ""] {
        if ns == known {
            return Cow::Borrowed(known);
        }
    }
    Cow::Owned(ns.to_owned())
}

/// Only characters that XML 1.0 allows (production 2)? Surrogates cannot occur in a `str`.
pub(super) fn check_chars(text: &str) -> Result<(), XmlError> {
    let bytes = text.as_bytes();
    // One pass without branches, which the compiler turns into vector code.
    let (control, high) = bytes.iter().fold((false, 0), |(control, high), &b| {
        (
            control | ((b < 0x20) & (b != b'\t') & (b != b'\n') & (b != b'\r')),
            high | b,
        )
    });
    // U+FFFE and U+FFFF are EF BF BE and EF BF BF.
    let noncharacter =
        || memchr_iter(0xEF, bytes).any(|at| matches!(bytes[at..], [_, 0xBF, 0xBE | 0xBF, ..]));
    if control || (high >= 0x80 && noncharacter()) {
        return Err(XmlError::NotWellFormed("forbidden character"));
    }
    Ok(())
}

/// What an attribute's value means. `plain` is what the tag reader said of it.
#[inline]
pub(super) fn value(raw: &str, plain: bool) -> Result<Cow<'_, str>, XmlError> {
    if plain {
        Ok(Cow::Borrowed(raw))
    } else {
        unescape_attr(raw)
    }
}

/// A declaration (of the default namespace, if `prefix` is empty) must leave `xml` and `xmlns` alone and must not undeclare a
/// prefix (Namespaces in XML §2.2, §3).
pub(super) fn check_declaration(prefix: &str, ns: &str) -> Result<(), XmlError> {
    if prefix == "xmlns" || ns == NS_XMLNS || (prefix == "xml") != (ns == NS_XML) {
        return Err(XmlError::NotWellFormed(
            "reserved prefix or namespace in a declaration",
        ));
    }
    if ns.is_empty() && !prefix.is_empty() {
        return Err(XmlError::NotWellFormed("prefix declared as no namespace"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(xml: &str) -> Result<View<'_>, XmlError> {
        View::parse(xml.as_bytes(), &StreamNs::client(), &Limits::default())
    }

    #[test]
    fn a_chat_message_is_seen() {
        let xml = "<message to='bob@localhost' id=\"1\" type='chat' xml:lang='en' note='a&amp;&#10;b\tc'>\
            <body>1 &lt; 2</body><active xmlns='http://jabber.org/protocol/chatstates'/>\
            <request xmlns='urn:xmpp:receipts' a='1' ></request ></message>";
        let view = parse(xml).unwrap();
        assert_eq!(
            (view.name(), view.ns(), view.raw()),
            ("message", "jabber:client", xml)
        );
        assert_eq!(view.attr("to").unwrap(), "bob@localhost");
        assert_eq!(view.attr("xml:lang").unwrap(), "en");
        assert_eq!(view.attr("note").unwrap(), "a&\nb c");
        assert_eq!(view.attr("from"), None);
        let names: Vec<_> = view.attrs().map(|a| (a.name, a.raw, a.quote)).collect();
        assert_eq!(names[1], ("id", "1", b'"'));
        assert_eq!(names[4], ("note", "a&amp;&#10;b\tc", b'\''));
        let children: Vec<_> = view.children().iter().map(|c| (c.name, &*c.ns)).collect();
        let chat_states = "http://jabber.org/protocol/chatstates";
        assert_eq!(
            children,
            [
                ("body", NS_CLIENT),
                ("active", chat_states),
                ("request", "urn:xmpp:receipts")
            ]
        );
        assert_eq!(view.child("body", NS_CLIENT).unwrap().text(), "1 < 2");
        assert_eq!(view.child("active", chat_states).unwrap().text(), "");
        let request = view.child("request", "urn:xmpp:receipts").unwrap();
        assert_eq!(
            request.raw,
            "<request xmlns='urn:xmpp:receipts' a='1' ></request >"
        );
        assert_eq!(request.attr("a").unwrap(), "1");
        assert!(view.inner().starts_with("<body>") && view.inner().ends_with("</request >"));
        assert!(view.standalone());
    }

    #[test]
    fn a_usual_stanza_fits_in_place() {
        let xml = "<message to='b' from='a' id='1' type='chat' xml:lang='en'>\
            <body/><a xmlns='x'/><b xmlns='x'/><c xmlns='x'/></message>";
        let view = parse(xml).unwrap();
        assert!(!view.attrs.spilled() && !view.children.spilled());
        assert!(
            view.children
                .iter()
                .all(|c| matches!(c.ns, Cow::Borrowed(_)))
        );
        assert!(std::mem::size_of::<View<'_>>() <= 704);
    }

    #[test]
    fn texts_are_those_directly_inside() {
        let view = parse("<a><b>x<![CDATA[<&]]>&#65;<c>no</c>\r\nz</b></a>").unwrap();
        assert_eq!(view.children()[0].text(), "x<&A\nz");
        assert_eq!(
            view.children()[0].inner(),
            "x<![CDATA[<&]]>&#65;<c>no</c>\r\nz"
        );
    }

    #[test]
    fn empty_elements_are_seen() {
        let view = parse("<presence/>").unwrap();
        assert_eq!(
            (view.name(), view.inner(), view.children().len()),
            ("presence", "", 0)
        );
        assert_eq!(parse("<presence></presence>").unwrap().inner(), "");
    }

    #[test]
    fn namespaces_are_resolved() {
        let view = parse(
            "<stream:error><p:a xmlns:p='urn:&#x61;'/><b xmlns=''><c/></b><d/></stream:error>",
        )
        .unwrap();
        assert_eq!((view.name(), view.ns()), ("error", NS_STREAMS));
        let children: Vec<_> = view.children().iter().map(|c| (c.name, &*c.ns)).collect();
        assert_eq!(children, [("a", "urn:a"), ("b", ""), ("d", NS_CLIENT)]);
        let view = parse("<a xmlns='urn:x'><b/><x:c xmlns:x='urn:y' xmlns='urn:z'/></a>").unwrap();
        let children: Vec<_> = view.children().iter().map(|c| (c.name, &*c.ns)).collect();
        assert_eq!(
            (view.ns(), children),
            ("urn:x", vec![("b", "urn:x"), ("c", "urn:y")])
        );
    }

    #[test]
    fn a_stanza_stands_alone_only_if_nothing_hangs_on_its_stream() {
        for xml in [
            "<message/>",
            "<message xmlns='jabber:client'><body/></message>",
            "<message xmlns='jabber:&#99;lient'><body/></message>",
            "<message xml:lang='en'><body xml:lang='de'/></message>",
            "<message xmlns:x='urn:x'><x:y xmlns:x='urn:x' x:z='1'/></message>",
            "<message xmlns:x='urn:x'><body/></message>",
            "<message><x:y xmlns:x='urn:x'><x:z><a x:b=''/></x:z></x:y></message>",
            "<message><y xmlns=''/></message>",
        ] {
            assert!(parse(xml).unwrap().standalone(), "{xml}");
        }
        for xml in [
            "<stream:message/>",
            "<message xmlns='urn:x'/>",
            "<message xmlns=''><body/></message>",
            "<message stream:a='1'/>",
            "<message xmlns:x='urn:x' x:a='1'/>",
            "<message xmlns:x='urn:x'><x:y/></message>",
            "<message xmlns:x='urn:x'><y x:z='1'/></message>",
            "<message><stream:x/></message>",
            "<message><a><b stream:x='1'/></a></message>",
            "<message><x:y xmlns:x='urn:x'/><a><stream:b/></a></message>",
            "<x:message xmlns:x='jabber:client'/>",
        ] {
            assert!(!parse(xml).unwrap().standalone(), "{xml}");
        }
        let other = StreamNs {
            default: "jabber:server".into(),
            ..StreamNs::client()
        };
        let alone = |xml: &[u8]| {
            View::parse(xml, &other, &Limits::default())
                .unwrap()
                .standalone()
        };
        assert!(!alone(b"<message/>"));
        assert!(alone(b"<message xmlns='jabber:client'/>"));
    }

    /// Malformed wherever they stand: as the stanza, as a child, and deep inside.
    #[rustfmt::skip]
    const MALFORMED: &[&str] = &[
        // tags
        "<a", "<a>", "<>", "< a/>", "<a/ >", "<a / >", "</a>", "<a></b>", "<a></a b>", "<a></ a>", "<a></a/>", "<a></A>",
        "<a><b></a></b>", "<a></a></a>", "<a//>", "<a/b/>",
        // names
        "<1/>", "<-a/>", "<.a/>", "<a\u{D7}/>", "<a!/>", "<\u{301}a/>", "<😀/>", "<a\u{A0}b='1'/>", "<:a/>", "<a:/>", "<a:b:c/>",
        "<a xmlns:b='u' b::c=''/>", "<a xmlns:b='u' :c=''/>", "<a xmlns:='u'/>", "<a xmlns:1='u'/>", "<a xmlns:b='u'><b:1/></a>",
        // attributes
        "<a b/>", "<a b=/>", "<a b=1/>", "<a b='1/>", "<a b='1\"/>", "<a b='1'c='2'/>", "<a b='1' b='2'/>", "<a ='1'/>", "<a b=='1'/>",
        "<a b='1'=/>", "<a 'b'/>", "<a b='<'/>", "<a b='&'/>", "<a b='&#0;'/>", "<a b='&#xFFFF;'/>", "<a b=''''/>",
        "<a xml:lang='' xml:lang=''/>",
        // namespaces
        "<a xmlns='u' xmlns='v'/>", "<a xmlns:p='u' xmlns:p='u'/>", "<a xmlns:p='u' xmlns:q='u' p:x='' q:x=''/>",
        "<a xmlns:p='u&#x3A;' xmlns:q='u:' p:x='' q:x=''/>", "<a xmlns:p='u v' xmlns:q='u\nv' p:x='' q:x=''/>", "<a xmlns:p=''/>",
        "<a xmlns:xml='u'/>", "<a xmlns:xmlns='u'/>", "<a xmlns:xmlns='http://www.w3.org/2000/xmlns/'/>",
        "<a xmlns:p='http://www.w3.org/XML/1998/namespace'/>", "<a xmlns='http://www.w3.org/XML/1998/namespace'/>",
        "<a xmlns:p='http://www.w3.org/2000/xmlns/'/>", "<a xmlns='http://www.w3.org/2000/xmlns/'/>",
        "<a xmlns:p='http://www.w3.org/XML/1998/namespac&#101;'/>",
        // text
        "<a>]]></a>", "<a>x]]></a>", "<a>&amp;]]></a>", "<a>]]<![CDATA[]]>></a>]]>", "<a>&</a>", "<a>& </a>", "<a>&;</a>", "<a>&amp</a>",
        "<a>&#0;</a>", "<a>&#x1F;</a>", "<a>&#xD800;</a>", "<a>&#xFFFE;</a>", "<a>&#x110000;</a>", "<a>&lt<b/>;</a>", "<a><![CDATA[]]</a>",
        "<a><![CDATA [ ]]></a>", "<a><![cdata[]]></a>",
        // characters
        "<a><![CDATA[\u{1}]]></a>", "<a>\0</a>", "<a>\u{B}</a>", "<a>\u{1F}</a>", "<a>\u{FFFE}</a>", "<a>é\u{FFFF}</a>",
        "<a b='\u{FFFF}'/>", "<a\0/>", "<a>\u{8}</a>", "<a \u{C} b='1'/>",
    ];

    #[test]
    fn malformed_stanzas_are_refused_wherever_they_are_malformed() {
        for xml in MALFORMED {
            for (before, after) in [
                ("", ""),
                ("<s>", "</s>"),
                ("<s><t><u v='w'>text", "</u></t></s>"),
            ] {
                let stanza = format!("{before}{xml}{after}");
                let got = parse(&stanza);
                assert!(
                    matches!(got, Err(XmlError::NotWellFormed(_))),
                    "{stanza:?}: {got:?}"
                );
            }
        }
        for xml in [
            "",
            " ",
            "x",
            " <a/>",
            "<a/> ",
            "<a/>x",
            "<a/><b/>",
            "<a></a><b/>",
            "<a></a>x",
            "\u{FEFF}<a/>",
            "<![CDATA[x]]>",
        ] {
            assert!(
                matches!(parse(xml), Err(XmlError::NotWellFormed(_))),
                "{xml:?}"
            );
        }
    }

    #[test]
    fn restricted_xml_is_refused() {
        for xml in [
            "<!-- x -->",
            "<?x y?>",
            "<?xml version='1.0'?>",
            "&nbsp;",
            "&AMP;",
            "<!DOCTYPE a>",
            "<!DOCTYPE a [<!ENTITY b 'c'>]>",
        ] {
            let stanza = format!("<a>{xml}</a>");
            assert_eq!(
                parse(&stanza).unwrap_err().condition(),
                "restricted-xml",
                "{stanza}"
            );
        }
        for stanza in [
            "<a b='&nbsp;'/>",
            "<?xml version='1.0'?><a/>",
            "<!-- --><a/>",
        ] {
            assert_eq!(
                parse(stanza).unwrap_err().condition(),
                "restricted-xml",
                "{stanza}"
            );
        }
    }

    #[test]
    fn undeclared_prefixes_are_refused() {
        for xml in [
            "<p:a/>",
            "<a p:b=''/>",
            "<a><p:b/></a>",
            "<a><b p:c=''/></a>",
            "<a><b xmlns:p='u'/><p:c/></a>",
            "<a><b xmlns:p='u'></b><p:c/></a>",
            "<a><b><c xmlns:p='u'/><d p:e=''/></b></a>",
            "<xmlns:a/>",
        ] {
            assert_eq!(parse(xml).unwrap_err(), XmlError::BadPrefix, "{xml}");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_refused() {
        for bytes in [
            &b"<a>\xFF</a>"[..],
            b"<a b='\xC0\x80'/>",
            b"<a>\xED\xA0\x80</a>",
            b"<a>\xF4\x90\x80\x80</a>",
            b"<a>\xC3</a>",
            b"<\xE9/>",
        ] {
            let got = View::parse(bytes, &StreamNs::client(), &Limits::default());
            assert_eq!(got.unwrap_err(), XmlError::NotWellFormed("not UTF-8"));
        }
    }

    #[test]
    fn well_formed_oddities_pass() {
        for xml in [
            "<a b = '1'\n\tc\r=\r\"2\" />",
            "<a></a \n>",
            "<a b='>'/>",
            "<a b=']]>'/>",
            "<a b='\"' c=\"'\"/>",
            "<a>]]</a>",
            "<a>]>]</a>",
            "<a>></a>",
            "<a><![CDATA[]]]]><![CDATA[>&nope;<b>]]></a>",
            "<a xmlns:xml='http://www.w3.org/XML/1998/namespace'/>",
            "<a xmlns:p='u' p:x='' x=''/>",
            "<a xmlns:p='u' xmlns:q='v' p:x='' q:x=''/>",
            "<a xmlns:p='u'><p:b xmlns:p='v' p:c=''/></a>",
            "<a.-_1/>",
            "<_/>",
            "<é/>",
            "<a·/>",
            "<a xmlns=''/>",
            "<a b=''/>",
            "<a>\u{7F}\u{85}\u{1FFFE}\u{FFFD}</a>",
            "<a>&#x10FFFF;&#9;</a>",
            "<xml/>",
            "<a xmlx='' xmlnsy=''/>",
        ] {
            parse(xml).unwrap_or_else(|e| panic!("{xml}: {e}"));
        }
    }

    #[test]
    fn limits_hold_without_a_framer() {
        let limits = Limits {
            depth_max: 3,
            attributes_max: 2,
            ..Limits::default()
        };
        let parse =
            |xml: &str| View::parse(xml.as_bytes(), &StreamNs::client(), &limits).map(|_| ());
        assert_eq!(parse("<a><b><c/></b></a>"), Ok(()));
        assert_eq!(
            parse("<a><b><c><d/></c></b></a>"),
            Err(XmlError::TooBig("depth"))
        );
        assert_eq!(parse("<a b='' c=''/>"), Ok(()));
        assert_eq!(
            parse("<a b='' xmlns='u' xmlns:c='u'/>"),
            Err(XmlError::TooBig("attributes"))
        );
    }

    #[test]
    fn namespace_declarations_in_force_are_bounded() {
        let mut deep = String::new();
        for level in 0..5 {
            let many: String = (0..30)
                .map(|n| format!(" xmlns:p{level}x{n}='urn:{n}'"))
                .collect();
            deep += &format!("<a{many}>");
        }
        deep += &"</a>".repeat(5);
        assert_eq!(
            parse(&deep).unwrap_err(),
            XmlError::TooBig("namespace declarations")
        );
    }
}
