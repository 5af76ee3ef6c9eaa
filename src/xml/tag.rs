//! The grammar of one start tag.
//!
//! In: a tag's text from `<` to `>`. Out: its name and attributes, in order, as slices of the text.
//! Promise: what passes obeys XML 1.0 productions 40, 41, 44 and Namespaces in XML productions 7 to 15: names, white space
//! between attributes, quotes, no `<` in values, no broken references. Prefixes are resolved by the caller.

use super::names::{CLASS, HIGH, PART, START, continues_name, starts_name};
use super::{XmlError, escape, is_space};

/// One attribute as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr<'a> {
    /// Qualified name as written, such as `to` or `xml:lang`.
    pub name: &'a str,
    /// Value without its quotes, still escaped.
    pub raw: &'a str,
    /// The quote around the value: `'` or `"`.
    pub quote: u8,
}

/// A qualified name: `local` or `prefix:local`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QName<'a> {
    pub full: &'a str,
    /// Bytes of the prefix; 0 if there is none.
    prefix_len: usize,
}

impl<'a> QName<'a> {
    #[inline]
    pub fn prefix(&self) -> Option<&'a str> {
        (self.prefix_len > 0).then(|| &self.full[..self.prefix_len])
    }

    #[inline]
    pub fn local(&self) -> &'a str {
        match self.prefix_len {
            0 => self.full,
            n => &self.full[n + 1..],
        }
    }
}

/// Reads one start tag from left to right.
pub(super) struct TagReader<'a> {
    text: &'a str,
    at: usize,
    /// `<a/>`
    pub empty: bool,
}

impl<'a> TagReader<'a> {
    /// `text` is the whole tag, from `<` to `>`.
    #[inline]
    pub fn open(text: &'a str) -> Result<(QName<'a>, Self), XmlError> {
        let body = text
            .strip_prefix('<')
            .and_then(|t| t.strip_suffix('>'))
            .ok_or(XmlError::NotWellFormed("tag"))?;
        let (body, empty) = match body.strip_suffix('/') {
            Some(body) => (body, true),
            None => (body, false),
        };
        let mut reader = Self {
            text: body,
            at: 0,
            empty,
        };
        let name = reader.name()?;
        Ok((name, reader))
    }

    /// The next attribute, `xmlns` declarations included; None at the tag's end. The flag says that the value is plain: what
    /// is written is what is meant.
    #[inline]
    pub fn next(&mut self) -> Result<Option<(QName<'a>, Attr<'a>, bool)>, XmlError> {
        let bytes = self.text.as_bytes();
        match bytes.get(self.at) {
            None => return Ok(None),
            Some(&b) if is_space(b) => self.skip_space(),
            Some(_) => {
                return Err(XmlError::NotWellFormed(
                    "no white space before an attribute",
                ));
            }
        }
        if self.at == bytes.len() {
            return Ok(None);
        }
        let name = self.name()?;
        self.skip_space();
        if bytes.get(self.at) != Some(&b'=') {
            return Err(XmlError::NotWellFormed("attribute without a value"));
        }
        self.at += 1;
        self.skip_space();
        let quote = match bytes.get(self.at) {
            Some(&q @ (b'"' | b'\'')) => q,
            _ => return Err(XmlError::NotWellFormed("attribute value without quotes")),
        };
        let start = self.at + 1;
        let mut at = start;
        let mut plain = true;
        loop {
            match bytes.get(at) {
                None => return Err(XmlError::NotWellFormed("attribute value without an end")),
                Some(&b) if !VALUE_STOP[usize::from(b)] => at += 1,
                Some(&b) if b == quote => break,
                Some(b'<') => return Err(XmlError::NotWellFormed("'<' in an attribute value")),
                Some(b'&') => {
                    plain = false;
                    at += escape::reference(&bytes[at..])?.1;
                }
                Some(&b) => {
                    plain &= !is_space(b);
                    at += 1;
                }
            }
        }
        self.at = at + 1;
        let raw = &self.text[start..at];
        Ok(Some((
            name,
            Attr {
                name: name.full,
                raw,
                quote,
            },
            plain,
        )))
    }

    #[inline]
    fn skip_space(&mut self) {
        let bytes = self.text.as_bytes();
        while self.at < bytes.len() && is_space(bytes[self.at]) {
            self.at += 1;
        }
    }

    /// A name with at most one colon, both sides being names in themselves (Namespaces in XML, production 7).
    #[inline]
    fn name(&mut self) -> Result<QName<'a>, XmlError> {
        let start = self.at;
        let mut end = self.ncname(start)?;
        let mut prefix_len = 0;
        if self.text.as_bytes().get(end) == Some(&b':') {
            prefix_len = end - start;
            end = self.ncname(end + 1)?;
        }
        self.at = end;
        Ok(QName {
            full: &self.text[start..end],
            prefix_len,
        })
    }

    /// The end of the name without colons that begins at `start`.
    #[inline]
    fn ncname(&self, start: usize) -> Result<usize, XmlError> {
        const BAD: XmlError = XmlError::NotWellFormed("name");
        let bytes = self.text.as_bytes();
        let class = |at: usize| bytes.get(at).map_or(0, |b| CLASS[usize::from(*b)]);
        let mut at = start;
        if class(at) & (START | HIGH) == 0 {
            return Err(BAD);
        }
        loop {
            while class(at) & PART != 0 {
                at += 1;
            }
            if class(at) & HIGH == 0 {
                return Ok(at);
            }
            let c = self.text[at..]
                .chars()
                .next()
                .expect("class() saw a byte there");
            if !(if at == start {
                starts_name(c)
            } else {
                continues_name(c)
            }) {
                return Err(BAD);
            }
            at += c.len_utf8();
        }
    }
}

/// Bytes of an attribute value that want a look.
static VALUE_STOP: [bool; 256] = {
    let mut table = [false; 256];
    let stops = b"\"'<&\t\n\r";
    let mut n = 0;
    while n < stops.len() {
        table[stops[n] as usize] = true;
        n += 1;
    }
    table
};
