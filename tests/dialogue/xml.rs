//! Bytes from a server -> stream header, elements, end of stream.
//!
//! Deliberately not built on the server's own parser: roxmltree judges every element, so that a server which writes
//! XML that only it can read is found out.

use std::collections::BTreeMap;
use std::fmt;

/// One element, namespaces resolved. Text is that of the element itself, without its children's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Element {
    pub namespace: String,
    pub name: String,
    /// By name, `{namespace}name` where an attribute has a namespace. Namespace declarations are not attributes.
    pub attributes: BTreeMap<String, String>,
    pub children: Vec<Element>,
    pub text: String,
}

/// What a server sends, cut at the places that matter to a client.
#[derive(Clone, Debug)]
pub enum Item {
    Header(Element),
    Element(Element),
    /// `</stream:stream>`
    End,
}

/// Cuts a server's stream into items.
#[derive(Default)]
pub struct Framer {
    buffer: Vec<u8>,
    /// The start tag of the stream as it came: it declares the namespaces of what follows.
    header: Option<String>,
}

impl Framer {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// A new stream begins (after SASL or STARTTLS).
    pub fn restart(&mut self) {
        self.header = None;
    }

    /// What has come and is not yet an item.
    pub fn rest(&self) -> String {
        String::from_utf8_lossy(&self.buffer).into_owned()
    }

    pub fn next(&mut self) -> Result<Option<Item>, String> {
        let blank = self
            .buffer
            .iter()
            .take_while(|byte| byte.is_ascii_whitespace())
            .count();
        self.buffer.drain(..blank);
        if self.header.is_none() && self.buffer.starts_with(b"<?xml ") {
            let Some(end) = tag_end(&self.buffer, 0) else {
                return Ok(None);
            };
            self.buffer.drain(..end);
            return self.next();
        }
        if self.buffer.starts_with(b"</") {
            let Some(end) = tag_end(&self.buffer, 0) else {
                return Ok(None);
            };
            self.buffer.drain(..end);
            return Ok(Some(Item::End));
        }
        if self.header.is_none() {
            let Some(end) = tag_end(&self.buffer, 0) else {
                return Ok(None);
            };
            let header = take_text(&mut self.buffer, end)?;
            let name = header[1..]
                .split([' ', '>', '\n', '\t', '/'])
                .next()
                .unwrap_or_default();
            let element = if header.ends_with("/>") {
                parse(&header)?
            } else {
                parse(&format!("{header}</{name}>"))?
            };
            self.header = Some(header);
            return Ok(Some(Item::Header(element)));
        }
        let Some(end) = element_end(&self.buffer)? else {
            return Ok(None);
        };
        let text = take_text(&mut self.buffer, end)?;
        let header = self.header.as_deref().unwrap();
        let name = header[1..]
            .split([' ', '>', '\n', '\t'])
            .next()
            .unwrap_or_default();
        let mut stream = parse(&format!("{header}{text}</{name}>"))
            .map_err(|why| format!("{why} in: {text}"))?;
        match stream.children.pop() {
            Some(element) => Ok(Some(Item::Element(element))),
            None => Err(format!("text between stanzas: {text}")),
        }
    }
}

/// The elements of a script's block, read as if they stood in a client's stream.
pub fn parse_block(text: &str) -> Result<Vec<Element>, String> {
    const OPEN: &str =
        "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";
    Ok(parse(&format!("{OPEN}{text}</stream:stream>"))?.children)
}

/// The elements of `text`, each so that it can stand alone, outside of a client's stream. What is no XML stays as it is.
#[allow(dead_code)] // only dialogues do
pub fn standalone(text: &str) -> Vec<String> {
    const OPEN: &str =
        "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";
    let whole = format!("{OPEN}{text}</stream:stream>");
    let Ok(document) = roxmltree::Document::parse(&whole) else {
        return vec![text.trim().to_owned()];
    };
    let elements = document.root_element().children();
    let elements = elements.filter(roxmltree::Node::is_element);
    elements
        .map(|element| {
            let own = &whole[element.range()];
            let tag = &own[..own.find('>').unwrap_or(own.len())];
            let name = tag.find([' ', '\n', '/']).unwrap_or(tag.len());
            match tag.contains("xmlns=") || tag[..name].contains(':') {
                true => own.to_owned(),
                false => format!("{} xmlns='jabber:client'{}", &own[..name], &own[name..]),
            }
        })
        .collect()
}

pub fn parse(text: &str) -> Result<Element, String> {
    let document =
        roxmltree::Document::parse(text).map_err(|why| format!("not well-formed XML: {why}"))?;
    Ok(convert(document.root_element()))
}

fn convert(node: roxmltree::Node) -> Element {
    let qualified = |attribute: roxmltree::Attribute| match attribute.namespace() {
        Some("http://www.w3.org/XML/1998/namespace") => format!("xml:{}", attribute.name()),
        Some(namespace) => format!("{{{namespace}}}{}", attribute.name()),
        None => attribute.name().to_owned(),
    };
    Element {
        namespace: node.tag_name().namespace().unwrap_or_default().to_owned(),
        name: node.tag_name().name().to_owned(),
        attributes: node
            .attributes()
            .map(|one| (qualified(one), one.value().to_owned()))
            .collect(),
        children: node
            .children()
            .filter(|child| child.is_element())
            .map(convert)
            .collect(),
        text: node
            .children()
            .filter(|child| child.is_text())
            .filter_map(|child| child.text())
            .collect(),
    }
}

fn take_text(buffer: &mut Vec<u8>, end: usize) -> Result<String, String> {
    let bytes: Vec<u8> = buffer.drain(..end).collect();
    String::from_utf8(bytes).map_err(|why| format!("the server sent invalid UTF-8: {why}"))
}

/// The place after the tag that starts at `start`; quotes may hold `>`.
fn tag_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut quote = None;
    for (place, &byte) in bytes.iter().enumerate().skip(start) {
        match (quote, byte) {
            (None, b'>') => return Some(place + 1),
            (None, b'\'' | b'"') => quote = Some(byte),
            (Some(open), _) if open == byte => quote = None,
            _ => {}
        }
    }
    None
}

/// The place after the element that starts at 0, if it is whole.
fn element_end(bytes: &[u8]) -> Result<Option<usize>, String> {
    const CDATA: &[u8] = b"<![CDATA[";
    let mut depth = 0_usize;
    let mut place = 0;
    while place < bytes.len() {
        let rest = &bytes[place..];
        if rest.starts_with(CDATA) {
            let Some(length) = rest.windows(3).position(|three| three == b"]]>") else {
                return Ok(None);
            };
            place += length + 3;
        } else if rest[0] == b'<' {
            let Some(end) = tag_end(bytes, place) else {
                return Ok(None);
            };
            match (rest.get(1), bytes[end - 2]) {
                (Some(b'/'), _) => depth -= 1,
                (Some(b'!' | b'?'), _) => {
                    return Err("the server sent a comment, DTD or PI".to_owned());
                }
                (_, b'/') => {}
                _ => depth += 1,
            }
            place = end;
            if depth == 0 {
                return Ok(Some(place));
            }
        } else if depth == 0 {
            return Err(format!(
                "text between stanzas: {}",
                String::from_utf8_lossy(bytes)
            ));
        } else {
            place += 1;
        }
    }
    Ok(None)
}

impl fmt::Display for Element {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        self.write(out, "", 4)
    }
}

impl Element {
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    fn write(
        &self,
        out: &mut fmt::Formatter,
        parent_namespace: &str,
        indent: usize,
    ) -> fmt::Result {
        write!(out, "{:indent$}<{}", "", self.name)?;
        if self.namespace != parent_namespace {
            write!(out, " xmlns='{}'", self.namespace)?;
        }
        for (name, value) in &self.attributes {
            write!(out, " {name}='{value}'")?;
        }
        let text = self.text.trim();
        if self.children.is_empty() && text.is_empty() {
            return write!(out, "/>");
        }
        write!(out, ">{text}")?;
        for child in &self.children {
            writeln!(out)?;
            child.write(out, &self.namespace, indent + 2)?;
        }
        if !self.children.is_empty() {
            write!(out, "\n{:indent$}", "")?;
        }
        write!(out, "</{}>", self.name)
    }
}
