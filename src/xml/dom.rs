//! A small owned tree, for everything that is not on the way of a message.
//!
//! In: checked XML, or a builder's calls. Out: values to look at and change, and XML text again.
//! Promise: parsing what [`Element::write`] wrote gives an equal element (adjacent text joined), and what is written needs no
//! prefix from anywhere and is well-formed whatever the strings hold. Names are the caller's duty.

use std::borrow::Cow;

use quick_xml::events::Event;
use quick_xml::reader::Reader;

use super::escape::{escape_attr, escape_text, unescape, unescape_attr};
use super::framer::Limits;
use super::header::StreamNs;
use super::tag::{Attr, QName, TagReader};
use super::view::View;
use super::{NS_XML, XmlError, is_space};

/// An XML element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// Local name.
    pub name: String,
    /// Namespace; empty for none.
    pub ns: String,
    /// Keys are `name` for attributes without prefix, `xml:lang` (or `xml:…`) for those of XML itself, and
    /// `{namespace}name` for all others. Namespace declarations are not among them.
    pub attrs: Vec<(String, String)>,
    pub children: Vec<Node>,
}

/// What stands in an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Element(Element),
    /// Unescaped text.
    Text(String),
}

/// For whole documents of our own; stanzas come with the limits of their stream.
const DOCUMENT_LIMITS: Limits = Limits {
    stanza_bytes_max: usize::MAX,
    header_bytes_max: 0,
    depth_max: 128,
    attributes_max: 256,
};

impl Element {
    pub fn new(name: &str, ns: &str) -> Self {
        Self {
            name: name.to_owned(),
            ns: ns.to_owned(),
            attrs: Vec::new(),
            children: Vec::new(),
        }
    }

    /// Sets an attribute; see [`Element::attrs`] for the form of `key`.
    pub fn attr(mut self, key: &str, value: impl Into<String>) -> Self {
        self.set(key, value);
        self
    }

    /// Appends a child element.
    pub fn child(mut self, child: Element) -> Self {
        self.children.push(Node::Element(child));
        self
    }

    /// Appends text.
    pub fn text(mut self, text: impl Into<String>) -> Self {
        self.push_text(text.into());
        self
    }

    /// The value of an attribute; see [`Element::attrs`] for the form of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.attrs
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
    }

    /// Sets or replaces an attribute.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        let value = value.into();
        match self.attrs.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.attrs.push((key.to_owned(), value)),
        }
    }

    /// Removes an attribute and gives back its value.
    pub fn unset(&mut self, key: &str) -> Option<String> {
        let at = self.attrs.iter().position(|(k, _)| k == key)?;
        Some(self.attrs.remove(at).1)
    }

    /// Is this its local name and namespace?
    pub fn is(&self, name: &str, ns: &str) -> bool {
        self.name == name && self.ns == ns
    }

    /// The first direct child with this local name and namespace.
    pub fn find(&self, name: &str, ns: &str) -> Option<&Element> {
        self.elements().find(|e| e.is(name, ns))
    }

    /// Direct child elements.
    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(e) => Some(e),
            Node::Text(_) => None,
        })
    }

    /// The text directly in this element, without that of its children.
    pub fn text_content(&self) -> String {
        let texts = self.children.iter().filter_map(|node| match node {
            Node::Text(t) => Some(t.as_str()),
            Node::Element(_) => None,
        });
        texts.collect()
    }

    /// Removes those direct child elements for which `remove` says true.
    pub fn remove_children(&mut self, mut remove: impl FnMut(&Element) -> bool) {
        self.children.retain(|node| match node {
            Node::Element(e) => !remove(e),
            Node::Text(_) => true,
        });
    }

    /// Parses a document of one element, white space around it allowed.
    pub fn parse(xml: &str) -> Result<Element, XmlError> {
        let xml = xml.trim_matches(|c: char| c.is_ascii() && is_space(c as u8));
        Self::parse_in(xml.as_bytes(), &StreamNs::default(), &DOCUMENT_LIMITS)
    }

    /// Parses one element frame of a stream.
    pub fn parse_in(frame: &[u8], stream: &StreamNs, limits: &Limits) -> Result<Element, XmlError> {
        Ok(View::parse(frame, stream, limits)?.to_element())
    }

    /// Appends this element as XML, to stand where the default namespace is `parent_ns`. Uses no prefixes but `xml:` and
    /// those it makes for attributes of other namespaces.
    pub fn write(&self, out: &mut Vec<u8>, parent_ns: &str) {
        out.push(b'<');
        out.extend_from_slice(self.name.as_bytes());
        if self.ns != parent_ns {
            push_attr(out, "xmlns", &self.ns);
        }
        let mut made = 0;
        for (key, value) in &self.attrs {
            match key.strip_prefix('{').and_then(|k| k.split_once('}')) {
                None => push_attr(out, key, value),
                Some(("", local)) => push_attr(out, local, value),
                Some((ns, local)) => {
                    push_attr(out, &format!("xmlns:a{made}"), ns);
                    push_attr(out, &format!("a{made}:{local}"), value);
                    made += 1;
                }
            }
        }
        if self.children.is_empty() {
            out.extend_from_slice(b"/>");
            return;
        }
        out.push(b'>');
        for node in &self.children {
            match node {
                Node::Element(e) => e.write(out, &self.ns),
                Node::Text(t) => escape_text(t, out),
            }
        }
        out.extend_from_slice(b"</");
        out.extend_from_slice(self.name.as_bytes());
        out.push(b'>');
    }

    /// As [`Element::write`], into a new string.
    pub fn to_xml(&self, parent_ns: &str) -> String {
        let mut out = Vec::new();
        self.write(&mut out, parent_ns);
        String::from_utf8(out).expect("written from strings, cut at ASCII only")
    }

    fn push_text(&mut self, text: String) {
        match self.children.last_mut() {
            _ if text.is_empty() => {}
            Some(Node::Text(last)) => last.push_str(&text),
            _ => self.children.push(Node::Text(text)),
        }
    }

    /// Builds the tree of an element that [`View::parse`] accepted. `default` and `prefixes` are what it has from outside.
    pub(super) fn from_checked<'p>(
        xml: &str,
        default: &str,
        prefixes: impl Iterator<Item = (&'p str, &'p str)>,
    ) -> Element {
        let prefixes = prefixes
            .map(|(p, ns)| (p.to_owned(), ns.to_owned(), 0))
            .collect();
        Builder {
            prefixes,
            open: Vec::new(),
        }
        .build(xml, default)
        .expect("the view checked these bytes")
    }
}

fn push_attr(out: &mut Vec<u8>, name: &str, value: &str) {
    out.push(b' ');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"='");
    escape_attr(value, out);
    out.push(b'\'');
}

struct Builder {
    /// Prefix, namespace, depth of its declaration (0: outside).
    prefixes: Vec<(String, String, usize)>,
    /// Open elements and the default namespace in each.
    open: Vec<(Element, String)>,
}

impl Builder {
    /// None if `xml` is not what was promised.
    fn build(mut self, xml: &str, default: &str) -> Option<Element> {
        let mut reader = Reader::from_str(xml);
        reader.config_mut().check_end_names = false;
        loop {
            let start = reader.buffer_position() as usize;
            let event = reader.read_event().ok()?;
            let token = &xml[start..reader.buffer_position() as usize];
            let done = match event {
                Event::Start(_) => {
                    let opened = self.element(token, default)?;
                    self.open.push(opened);
                    None
                }
                Event::Empty(_) => {
                    let depth = self.open.len() + 1;
                    let (element, _) = self.element(token, default)?;
                    self.close(element, depth)
                }
                Event::End(_) => {
                    let depth = self.open.len();
                    let (element, _) = self.open.pop()?;
                    self.close(element, depth)
                }
                Event::Text(_) | Event::GeneralRef(_) => {
                    let text = unescape(token).ok()?.into_owned();
                    self.open.last_mut()?.0.push_text(text);
                    None
                }
                Event::CData(_) => {
                    let text = token.strip_prefix("<![CDATA[")?.strip_suffix("]]>")?;
                    let text = text.replace("\r\n", "\n").replace('\r', "\n");
                    self.open.last_mut()?.0.push_text(text);
                    None
                }
                _ => return None,
            };
            if done.is_some() {
                return done;
            }
        }
    }

    fn element(&mut self, token: &str, outer_default: &str) -> Option<(Element, String)> {
        let depth = self.open.len() + 1;
        let (name, mut tag) = TagReader::open(token).ok()?;
        let mut default = self
            .open
            .last()
            .map_or(outer_default, |(_, ns)| ns)
            .to_owned();
        let mut attrs: Vec<(QName<'_>, Attr<'_>)> = Vec::new();
        while let Some((name, attr, _)) = tag.next().ok()? {
            if name.full == "xmlns" {
                default = unescape_attr(attr.raw).ok()?.into_owned();
            } else if name.prefix() == Some("xmlns") {
                let ns = unescape_attr(attr.raw).ok()?.into_owned();
                self.prefixes.push((name.local().to_owned(), ns, depth));
            } else {
                attrs.push((name, attr));
            }
        }
        let ns = match name.prefix() {
            None => default.clone(),
            Some(prefix) => self.resolve(prefix).to_owned(),
        };
        let mut element = Element {
            name: name.local().to_owned(),
            ns,
            attrs: Vec::new(),
            children: Vec::new(),
        };
        for (name, attr) in attrs {
            let key = match name.prefix() {
                None | Some("xml") => Cow::Borrowed(name.full),
                Some(prefix) => Cow::Owned(format!("{{{}}}{}", self.resolve(prefix), name.local())),
            };
            element
                .attrs
                .push((key.into_owned(), unescape_attr(attr.raw).ok()?.into_owned()));
        }
        Some((element, default))
    }

    /// Hands a finished element to its parent, or gives it back if it is the top one.
    fn close(&mut self, element: Element, depth: usize) -> Option<Element> {
        self.prefixes.retain(|(_, _, at)| *at < depth);
        match self.open.last_mut() {
            Some((parent, _)) => {
                parent.children.push(Node::Element(element));
                None
            }
            None => Some(element),
        }
    }

    /// A prefix that is unknown (possible only when a child is read by itself) is no namespace.
    fn resolve(&self, prefix: &str) -> &str {
        if prefix == "xml" {
            return NS_XML;
        }
        self.prefixes
            .iter()
            .rev()
            .find(|(p, _, _)| p == prefix)
            .map_or("", |(_, ns, _)| ns)
    }
}
