//! The grammar of one start tag.
//!
//! In: a tag's text from `<` to `>`. Out: its name and attributes, in order, as slices of the text.
//! Promise: what passes obeys XML 1.0 productions 40, 41, 44 and Namespaces in XML productions 7 to 15: names, white space
//! between attributes, quotes, no `<` in values, no broken references. Prefixes are resolved by the caller.

use memchr::memchr3;

use super::names::{CLASS, COLON, HIGH, PART, START, continues_name, starts_name};
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

    /// The next attribute, `xmlns` declarations included; None at the tag's end.
    #[inline]
    pub fn next(&mut self) -> Result<Option<(QName<'a>, Attr<'a>)>, XmlError> {
        let bytes = self.text.as_bytes();
        if self.at == bytes.len() {
            return Ok(None);
        }
        if !is_space(bytes[self.at]) {
            return Err(XmlError::NotWellFormed(
                "no white space before an attribute",
            ));
        }
        self.skip_space();
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
        loop {
            match memchr3(quote, b'<', b'&', &bytes[at..]) {
                None => return Err(XmlError::NotWellFormed("attribute value without an end")),
                Some(n) => at += n,
            }
            match bytes[at] {
                b'<' => return Err(XmlError::NotWellFormed("'<' in an attribute value")),
                b'&' => at += escape::reference(&bytes[at..])?.1,
                _ => break,
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
        const BAD: XmlError = XmlError::NotWellFormed("name");
        let bytes = self.text.as_bytes();
        let start = self.at;
        let mut at = start;
        let mut prefix_len = 0;
        let mut fresh = true; // at the first character of the prefix or of the local name
        while let Some(&b) = bytes.get(at) {
            let class = CLASS[usize::from(b)];
            if class & PART != 0 {
                if fresh && class & START == 0 {
                    return Err(BAD);
                }
                fresh = false;
                at += 1;
            } else if class & COLON != 0 {
                if fresh || prefix_len != 0 {
                    return Err(BAD);
                }
                prefix_len = at - start;
                fresh = true;
                at += 1;
            } else if class & HIGH != 0 {
                let c = self.text[at..]
                    .chars()
                    .next()
                    .expect("at is before the end");
                if !(if fresh {
                    starts_name(c)
                } else {
                    continues_name(c)
                }) {
                    return Err(BAD);
                }
                fresh = false;
                at += c.len_utf8();
            } else {
                break;
            }
        }
        if fresh {
            return Err(BAD);
        }
        self.at = at;
        Ok(QName {
            full: &self.text[start..at],
            prefix_len,
        })
    }
}
