//! Looks into one stanza without building a tree: attributes of its first tag, and a walk over all its tags.

use std::borrow::Cow;

use memchr::memchr;

/// A tag inside a stanza.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag<'a> {
    /// Local name, without prefix.
    pub name: &'a [u8],
    /// From `<` to `>`.
    pub raw: &'a [u8],
    pub closing: bool,
    /// The text after the tag, up to the next one.
    pub text: &'a [u8],
}

/// The local name of the stanza's first tag.
pub fn name(stanza: &[u8]) -> &[u8] {
    let name = &stanza[1..];
    let end = name
        .iter()
        .position(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b'/' | b'>'));
    let name = &name[..end.unwrap_or(name.len())];
    match memchr(b':', name) {
        Some(colon) => &name[colon + 1..],
        None => name,
    }
}

/// The raw (still escaped) value of an attribute of the stanza's first tag.
pub fn attribute<'a>(stanza: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let mut rest = &stanza[stanza
        .iter()
        .position(|byte| byte.is_ascii_whitespace() || *byte == b'>')?..];
    loop {
        rest = rest.trim_ascii_start();
        let end = rest
            .iter()
            .position(|byte| matches!(byte, b'=' | b'>' | b'/'))?;
        if rest[end] != b'=' {
            return None;
        }
        let name = rest[..end].trim_ascii_end();
        let value = rest[end + 1..].trim_ascii_start();
        let quote = *value.first()?;
        let length = memchr(quote, &value[1..])?;
        if name == wanted {
            return Some(&value[1..1 + length]);
        }
        rest = &value[length + 2..];
    }
}

/// All tags of a stanza in document order.
pub fn tags(stanza: &[u8]) -> impl Iterator<Item = Tag<'_>> {
    let mut rest = stanza;
    std::iter::from_fn(move || {
        loop {
            rest = &rest[memchr(b'<', rest)?..];
            if let Some(data) = rest.strip_prefix(b"<![CDATA[") {
                rest = &data[memchr::memmem::find(data, b"]]>")? + 3..];
                continue;
            }
            let end = tag_end(rest)?;
            let (raw, after) = rest.split_at(end);
            rest = after;
            let closing = raw.get(1) == Some(&b'/');
            let text = &after[..memchr(b'<', after).unwrap_or(after.len())];
            return Some(Tag {
                name: name(if closing { &raw[1..] } else { raw }),
                raw,
                closing,
                text,
            });
        }
    })
}

/// The first opening tag of this name.
pub fn find<'a>(stanza: &'a [u8], wanted: &[u8]) -> Option<Tag<'a>> {
    tags(stanza).find(|tag| !tag.closing && tag.name == wanted)
}

fn tag_end(markup: &[u8]) -> Option<usize> {
    let mut quote = None;
    for (at, &byte) in markup.iter().enumerate() {
        match quote {
            Some(open) if open == byte => quote = None,
            Some(_) => {}
            None if byte == b'>' => return Some(at + 1),
            None if byte == b'"' || byte == b'\'' => quote = Some(byte),
            None => {}
        }
    }
    None
}

/// Escapes text for element content and attribute values of either quote.
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(['&', '<', '>', '"', '\'']) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            other => escaped.push(other),
        }
    }
    Cow::Owned(escaped)
}

/// Undoes the five named entities; anything else stays as it is. Servers differ in what they escape in a JID.
pub fn unescape(raw: &[u8]) -> Cow<'_, [u8]> {
    if memchr(b'&', raw).is_none() {
        return Cow::Borrowed(raw);
    }
    const ENTITIES: [(&[u8], u8); 5] = [
        (b"&amp;", b'&'),
        (b"&lt;", b'<'),
        (b"&gt;", b'>'),
        (b"&quot;", b'"'),
        (b"&apos;", b'\''),
    ];
    let mut text = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((&first, tail)) = rest.split_first() {
        match ENTITIES.iter().find(|(entity, _)| rest.starts_with(entity)) {
            Some((entity, byte)) => {
                text.push(*byte);
                rest = &rest[entity.len()..];
            }
            None => {
                text.push(first);
                rest = tail;
            }
        }
    }
    Cow::Owned(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_of_any_legal_shape_are_found() {
        let stanza = b"<x:message\n from = 'a@b/c>' to=\"it's\" id='7'/>";
        assert_eq!(name(stanza), b"message");
        assert_eq!(attribute(stanza, b"from"), Some(&b"a@b/c>"[..]));
        assert_eq!(attribute(stanza, b"to"), Some(&b"it's"[..]));
        assert_eq!(attribute(stanza, b"id"), Some(&b"7"[..]));
        assert_eq!(attribute(stanza, b"type"), None);
        assert_eq!(attribute(b"<a><b id='1'/></a>", b"id"), None);
        assert_eq!(attribute(b"<a/>", b"id"), None);
    }

    #[test]
    fn tags_are_walked_with_their_text() {
        let stanza = b"<a><m>PLAIN</m><![CDATA[<no>]]><n k='>'/></a>";
        let names: Vec<_> = tags(stanza)
            .map(|tag| (tag.name, tag.closing, tag.text))
            .collect();
        assert_eq!(
            names,
            [
                (&b"a"[..], false, &b""[..]),
                (b"m", false, b"PLAIN"),
                (b"m", true, b""),
                (b"n", false, b""),
                (b"a", true, b"")
            ]
        );
    }

    #[test]
    fn escaping_and_back_is_the_identity() {
        let text = "a&b<c>'d\"&amp;";
        assert_eq!(&*unescape(escape(text).as_bytes()), text.as_bytes());
    }
}
