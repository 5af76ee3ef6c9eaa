//! Escaping: text <-> its form in XML.
//!
//! In: any Rust string. Out: bytes that are well-formed as character data or as an attribute value, whatever the string held.
//! The way back knows the five predefined entities and character references, nothing else (RFC 6120 §11.1).

use std::borrow::Cow;

use memchr::{memchr, memchr2};

use super::XmlError;

/// Appends `s` as character data. Characters that XML 1.0 forbids become U+FFFD; a carriage return becomes a reference,
/// since a parser would turn it into a line feed (XML 1.0 §2.11).
pub fn escape_text(s: &str, out: &mut Vec<u8>) {
    escape(s, &TEXT, out);
}

/// Appends `s` as an attribute value, safe inside `'` and `"`. Tab and line ends become references, since a parser would
/// turn them into spaces (XML 1.0 §3.3.3); forbidden characters become U+FFFD.
pub fn escape_attr(s: &str, out: &mut Vec<u8>) {
    escape(s, &ATTR, out);
}

/// Resolves references in character data and normalises line ends (XML 1.0 §2.11). Borrows when there is nothing to do.
pub fn unescape(raw: &str) -> Result<Cow<'_, str>, XmlError> {
    match memchr2(b'&', b'\r', raw.as_bytes()) {
        None => Ok(Cow::Borrowed(raw)),
        Some(first) => unescape_from(raw, first, false).map(Cow::Owned),
    }
}

/// Resolves references in an attribute value and turns white space into spaces (XML 1.0 §3.3.3).
pub fn unescape_attr(raw: &str) -> Result<Cow<'_, str>, XmlError> {
    match raw
        .bytes()
        .position(|b| b == b'&' || (b < b' ' && super::is_space(b)))
    {
        None => Ok(Cow::Borrowed(raw)),
        Some(first) => unescape_from(raw, first, true).map(Cow::Owned),
    }
}

/// Is every reference in `raw` one that [`unescape`] resolves?
pub(super) fn check_references(raw: &[u8]) -> Result<(), XmlError> {
    let mut at = 0;
    while let Some(n) = memchr(b'&', &raw[at..]) {
        at += n;
        at += reference(&raw[at..])?.1;
    }
    Ok(())
}

/// May `c` stand in an XML 1.0 document (production 2)?
pub(super) fn is_xml_char(c: char) -> bool {
    match c {
        '\t' | '\n' | '\r' => true,
        '\0'..'\u{20}' | '\u{FFFE}' | '\u{FFFF}' => false,
        _ => true,
    }
}

/// The reference at the start of `raw` (which begins with `&`): its character and its length in bytes.
pub(super) fn reference(raw: &[u8]) -> Result<(char, usize), XmlError> {
    const PREDEFINED: [(&[u8], char); 5] = [
        (b"&amp;", '&'),
        (b"&lt;", '<'),
        (b"&gt;", '>'),
        (b"&quot;", '"'),
        (b"&apos;", '\''),
    ];
    for (form, c) in PREDEFINED {
        if raw.starts_with(form) {
            return Ok((c, form.len()));
        }
    }
    const BROKEN: XmlError = XmlError::NotWellFormed("broken reference");
    let Some(body) = raw.strip_prefix(b"&#") else {
        // `&name;` is well-formed if a DTD declares it, and there is no DTD in XMPP. `& ` is just wrong.
        let name = raw[1..]
            .iter()
            .take_while(|b| b.is_ascii_alphanumeric() || **b >= 0x80)
            .count();
        return Err(match raw.get(1 + name) {
            Some(b';') if name > 0 => XmlError::Restricted("entity"),
            _ => BROKEN,
        });
    };
    let (radix, digits, prefix) = match body.strip_prefix(b"x") {
        Some(digits) => (16, digits, 3),
        None => (10, body, 2),
    };
    let mut value: u32 = 0;
    for (n, &b) in digits.iter().enumerate() {
        if b == b';' && n > 0 {
            return match char::from_u32(value) {
                Some(c) if is_xml_char(c) => Ok((c, prefix + n + 1)),
                _ => Err(XmlError::NotWellFormed(
                    "reference to a forbidden character",
                )),
            };
        }
        let digit = char::from(b).to_digit(radix).ok_or(BROKEN)?;
        value = value.saturating_mul(radix).saturating_add(digit);
    }
    Err(BROKEN)
}

/// `first` is the index of the first byte that needs work.
fn unescape_from(raw: &str, first: usize, attribute: bool) -> Result<String, XmlError> {
    let bytes = raw.as_bytes();
    let mut out = String::with_capacity(raw.len());
    let mut copied = 0;
    let mut at = first;
    while at < bytes.len() {
        let (c, len) = match bytes[at] {
            b'&' => reference(&bytes[at..])?,
            b'\r' => {
                let len = if bytes.get(at + 1) == Some(&b'\n') {
                    2
                } else {
                    1
                };
                (if attribute { ' ' } else { '\n' }, len)
            }
            b'\t' | b'\n' if attribute => (' ', 1),
            _ => {
                at += 1;
                continue;
            }
        };
        out.push_str(&raw[copied..at]);
        out.push(c);
        at += len;
        copied = at;
    }
    out.push_str(&raw[copied..]);
    Ok(out)
}

/// For each byte: 0 = copy, else an index into [`FORMS`]. 0xEF may begin U+FFFE or U+FFFF.
type Table = [u8; 256];

const SUSPECT: u8 = 255;
const FORMS: [&[u8]; 10] = [
    b"",
    b"&amp;",
    b"&lt;",
    b"&gt;",
    b"&quot;",
    b"&apos;",
    b"&#9;",
    b"&#10;",
    b"&#13;",
    REPLACEMENT,
];
const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();
static TEXT: Table = table(false);
static ATTR: Table = table(true);

const fn table(attribute: bool) -> Table {
    let mut table = [0u8; 256];
    let mut b = 0;
    while b < 0x20 {
        table[b] = 9;
        b += 1;
    }
    table[b'\t' as usize] = if attribute { 6 } else { 0 };
    table[b'\n' as usize] = if attribute { 7 } else { 0 };
    table[b'\r' as usize] = 8;
    table[b'&' as usize] = 1;
    table[b'<' as usize] = 2;
    table[b'>' as usize] = 3;
    if attribute {
        table[b'"' as usize] = 4;
        table[b'\'' as usize] = 5;
    }
    table[0xEF] = SUSPECT;
    table
}

fn escape(s: &str, table: &Table, out: &mut Vec<u8>) {
    let bytes = s.as_bytes();
    let mut copied = 0;
    for (at, &b) in bytes.iter().enumerate() {
        let (form, len) = match table[usize::from(b)] {
            0 => continue,
            SUSPECT if matches!(bytes[at..], [_, 0xBF, 0xBE | 0xBF, ..]) => (REPLACEMENT, 3),
            SUSPECT => continue,
            n => (FORMS[usize::from(n)], 1),
        };
        out.extend_from_slice(&bytes[copied..at]);
        out.extend_from_slice(form);
        copied = at + len;
    }
    out.extend_from_slice(&bytes[copied..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> String {
        let mut out = Vec::new();
        escape_text(s, &mut out);
        String::from_utf8(out).unwrap()
    }

    fn attr(s: &str) -> String {
        let mut out = Vec::new();
        escape_attr(s, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn markup_is_escaped() {
        assert_eq!(text("a<b>&'\"]]>"), "a&lt;b&gt;&amp;'\"]]&gt;");
        assert_eq!(attr("a<b>&'\""), "a&lt;b&gt;&amp;&apos;&quot;");
        assert_eq!(text("\t\n\r"), "\t\n&#13;");
        assert_eq!(attr("\t\n\r"), "&#9;&#10;&#13;");
        assert_eq!(text("grüße 日本 😀 \u{FF21}"), "grüße 日本 😀 \u{FF21}");
    }

    #[test]
    fn forbidden_characters_never_leave() {
        assert_eq!(
            text("\0a\u{1F}b\u{FFFE}c\u{FFFF}d\u{7F}"),
            "\u{FFFD}a\u{FFFD}b\u{FFFD}c\u{FFFD}d\u{7F}"
        );
        assert_eq!(attr("\u{B}\u{FFFF}"), "\u{FFFD}\u{FFFD}");
    }

    #[test]
    fn references_are_resolved() {
        let all = "&amp;&lt;&gt;&quot;&apos;&#65;&#x42;&#x0000043;&#x1F600;";
        assert_eq!(unescape(all).unwrap(), "&<>\"'ABC😀");
        assert_eq!(unescape("a\r\nb\rc\n&#13;").unwrap(), "a\nb\nc\n\r");
        assert_eq!(
            unescape_attr("a\r\nb\tc\nd&#10;&amp;lt;").unwrap(),
            "a b c d\n&lt;"
        );
        assert!(matches!(unescape("plain"), Ok(Cow::Borrowed("plain"))));
    }

    #[test]
    fn broken_references_are_refused() {
        for raw in [
            "&",
            "& ",
            "&;",
            "&amp",
            "&#;",
            "&#x;",
            "&#65",
            "&#X41;",
            "&#xG;",
            "&#1 ;",
            "&#-1;",
            "&#+1;",
            "&amp &amp;",
        ] {
            assert_eq!(
                unescape(raw),
                Err(XmlError::NotWellFormed("broken reference")),
                "{raw}"
            );
        }
        for raw in [
            "&#0;",
            "&#1;",
            "&#xB;",
            "&#x1F;",
            "&#xD800;",
            "&#xDFFF;",
            "&#xFFFE;",
            "&#65535;",
            "&#x110000;",
            "&#99999999999999999999;",
        ] {
            let expected = Err(XmlError::NotWellFormed(
                "reference to a forbidden character",
            ));
            assert_eq!(unescape(raw), expected, "{raw}");
        }
        for raw in ["&nbsp;", "&AMP;", "&ampx;", "&é;"] {
            assert_eq!(unescape(raw), Err(XmlError::Restricted("entity")), "{raw}");
        }
    }
}
