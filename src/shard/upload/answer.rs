//! What is answered to a request for a file: a decision over values, without socket and without file.
//!
//! In: the request's head and what the address says of the file. Out: status, headers and which bytes follow. Promises: whatever
//! was uploaded, nothing of it runs in a page of this server (its type is one of [`upload::INLINE`] or that of a file to be saved, it
//! is not guessed, and as a page of its own it has no rights); nothing of the request but checked numbers and an escaped name comes
//! back in a header.

use std::ops::Range;

use crate::store::upload::{self, Entry};

/// Of a request's head, as far as it matters here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    pub range: Option<&'a str>,
    pub if_range: Option<&'a str>,
    pub if_none_match: Option<&'a str>,
}

/// A file, or why it is not sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    /// Which bytes of the file follow.
    pub body: Range<u64>,
}

/// In every answer: what is answered has no rights, and tells nobody where it is from. Pages of any origin may ask, for there are no
/// cookies and no other rights that a page could misuse: who knows an address may have what is there.
pub const HEADERS: &[(&str, &str)] = &[
    ("Cross-Origin-Resource-Policy", "cross-origin"),
    ("Content-Security-Policy", "sandbox; default-src 'none'"),
    ("Referrer-Policy", "no-referrer"),
];

/// To GET and HEAD of a file that is there. `keep_seconds`: how much longer it is, at most; 0: for ever.
pub fn get(entry: &Entry, filename: &str, asked: &Asked<'_>, keep_seconds: u64) -> Found {
    let etag = format!("\"{}\"", upload::hex(&entry.id));
    let max_age = match keep_seconds {
        0 => YEAR,
        seconds => seconds.min(YEAR),
    };
    let mut headers = vec![
        ("ETag", etag.clone()),
        // what is behind an address never changes
        (
            "Cache-Control",
            format!("private, max-age={max_age}, immutable"),
        ),
        ("Accept-Ranges", "bytes".to_owned()),
    ];
    let is_same = |tags: &str| {
        let mut tags = tags
            .split(',')
            .map(|tag| tag.trim().trim_start_matches("W/"));
        tags.any(|tag| tag == etag || tag == "*")
    };
    if asked.if_none_match.is_some_and(is_same) {
        return Found {
            status: 304,
            headers,
            body: 0..0,
        };
    }
    // RFC 9110 13.1.5: of another file, or by a date: the whole
    let range = asked
        .range
        .filter(|_| asked.if_range.is_none_or(|tag| tag.trim() == etag));
    let total = entry.bytes;
    let (status, body) = match range.map_or(Part::Whole, |range| parse_range(range, total)) {
        Part::Whole => (200, 0..total),
        Part::Bytes(part) => {
            let last = part.end - 1;
            headers.push((
                "Content-Range",
                format!("bytes {}-{last}/{total}", part.start),
            ));
            (206, part)
        }
        Part::None => {
            headers.push(("Content-Range", format!("bytes */{total}")));
            return Found {
                status: 416,
                headers,
                body: 0..0,
            };
        }
    };
    let disposition = match entry.is_inline() {
        true => "inline",
        false => "attachment",
    };
    let name = header_name(filename);
    headers.push(("Content-Type", entry.content_type().to_owned()));
    headers.push((
        "Content-Disposition",
        format!("{disposition}; filename*=UTF-8''{name}"),
    ));
    Found {
        status,
        headers,
        body,
    }
}

const YEAR: u64 = 31_536_000;

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Bytes(Range<u64>),
    /// Nothing of what is wanted is there.
    None,
    /// What is wanted is not understood, or several parts: all may be sent (RFC 9110 14.2).
    Whole,
}

fn parse_range(range: &str, bytes: u64) -> Part {
    let Some(range) = range.trim().strip_prefix("bytes=") else {
        return Part::Whole;
    };
    let Some((first, last)) = range.trim().split_once('-') else {
        return Part::Whole;
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // more than fits is behind every end
    let number = |text: &str| text.parse().unwrap_or(u64::MAX);
    match (first, last) {
        ("", last) if digits(last) => match number(last).min(bytes) {
            0 => Part::None,
            n => Part::Bytes(bytes - n..bytes),
        },
        (first, "") if digits(first) => match number(first) {
            first if first < bytes => Part::Bytes(first..bytes),
            _ => Part::None,
        },
        (first, last) if digits(first) && digits(last) => {
            let (first, last) = (number(first), number(last));
            match () {
                _ if first > last => Part::Whole,
                _ if first >= bytes => Part::None,
                _ => Part::Bytes(first..last.saturating_add(1).min(bytes)),
            }
        }
        _ => Part::Whole,
    }
}

/// What may stand in `filename*` (RFC 8187) of a name in an address: whoever makes an address up gets no more into the header.
fn header_name(filename: &str) -> String {
    let bytes = filename.as_bytes();
    let hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
    let keep = |(at, byte): (usize, u8)| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => Some(byte as char),
        b'%' if hex(at + 1) && hex(at + 2) => Some('%'),
        _ => None,
    };
    bytes
        .iter()
        .copied()
        .enumerate()
        .take(1000)
        .filter_map(keep)
        .collect()
}

/// Why a body is not taken, before anything of it is read: status, text.
pub type Refusal = (u16, &'static str);

/// What a PUT says of itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Offered<'a> {
    pub length: Option<u64>,
    pub content_type: Option<&'a str>,
}

/// May the body come? The token was checked.
pub fn put(
    entry: &Entry,
    offered: &Offered<'_>,
    slot_seconds: u64,
    now: u64,
) -> Result<(), Refusal> {
    if now > entry.at.saturating_add(slot_seconds) {
        return Err((410, "the slot has expired"));
    }
    match offered.length {
        None => return Err((411, "the length is needed")),
        Some(length) if length != entry.bytes => {
            return Err((413, "the slot is for another length"));
        }
        Some(_) => {}
    }
    // who says nothing, or nothing better, means what the slot was asked for
    let other = offered.content_type.is_some_and(|typ| {
        let essence = typ.split(';').next().unwrap_or_default().trim();
        !essence.eq_ignore_ascii_case(upload::OTHER_TYPE)
            && upload::ending_of_type(essence) != entry.ending
    });
    match other && entry.is_inline() {
        true => Err((415, "the slot is for another type")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            at: 1000,
            bytes: 100,
            id: [0xab; 16],
            ending: "png",
        }
    }

    fn header<'f>(found: &'f Found, name: &str) -> &'f str {
        let found = found.headers.iter().find(|(one, _)| *one == name);
        found.map_or("", |(_, value)| value)
    }

    fn asked(range: &str) -> Found {
        let asked = Asked {
            range: Some(range),
            ..Asked::default()
        };
        get(&entry(), "a.png", &asked, 0)
    }

    #[test]
    fn a_part_is_what_the_range_says_and_nothing_that_is_not_there() {
        for (range, part) in [
            ("bytes=0-0", 0..1),
            ("bytes=10-19", 10..20),
            ("bytes=90-", 90..100),
            ("bytes=90-500", 90..100),
            ("bytes=90-99999999999999999999999", 90..100),
            ("bytes=-10", 90..100),
            ("bytes=-1000", 0..100),
        ] {
            let answer = asked(range);
            assert_eq!((answer.status, &answer.body), (206, &part), "{range}");
            let wanted = format!("bytes {}-{}/100", part.start, part.end - 1);
            assert_eq!(header(&answer, "Content-Range"), wanted);
        }
        for range in [
            "bytes=100-",
            "bytes=100-200",
            "bytes=-0",
            "bytes=99999999999999999999-",
        ] {
            let answer = asked(range);
            assert_eq!(header(&answer, "Content-Range"), "bytes */100");
            assert_eq!((answer.status, answer.body), (416, 0..0), "{range}");
        }
        let many = format!("bytes={}", "0-1,".repeat(1000));
        for range in [
            "bytes=0-1,5-6",
            "bytes=5-2",
            "bytes=a-b",
            "lines=1-2",
            "bytes=",
            "bytes=-",
            "bytes=+1-2",
            &many,
        ] {
            let answer = asked(range);
            assert_eq!((answer.status, answer.body), (200, 0..100), "{range:.20}");
        }
    }

    #[test]
    fn what_a_client_has_is_not_sent_again_and_a_part_only_of_the_same_file() {
        let etag = format!("\"{}\"", "ab".repeat(16));
        for (tags, status) in [
            (etag.as_str(), 304),
            (&format!("\"x\", W/{etag}"), 304),
            ("*", 304),
            ("\"x\"", 200),
        ] {
            let asked = Asked {
                if_none_match: Some(tags),
                ..Asked::default()
            };
            assert_eq!(get(&entry(), "a", &asked, 0).status, status, "{tags}");
        }
        for (tag, status) in [
            (etag.as_str(), 206),
            ("\"x\"", 200),
            ("Sat, 28 Nov 2026 12:00:00 GMT", 200),
        ] {
            let asked = Asked {
                range: Some("bytes=0-9"),
                if_range: Some(tag),
                ..Asked::default()
            };
            assert_eq!(get(&entry(), "a", &asked, 0).status, status, "{tag}");
        }
    }

    #[test]
    fn what_was_uploaded_cannot_run_in_a_page() {
        let other = Entry {
            ending: upload::OTHER,
            ..entry()
        };
        let answer = get(&other, "evil.html", &Asked::default(), 0);
        assert_eq!(header(&answer, "Content-Type"), "application/octet-stream");
        let disposition = "attachment; filename*=UTF-8''evil.html";
        assert_eq!(header(&answer, "Content-Disposition"), disposition);
        assert!(HEADERS.contains(&("Content-Security-Policy", "sandbox; default-src 'none'")));
        let answer = get(&entry(), "a.png", &Asked::default(), 60);
        assert_eq!(header(&answer, "Content-Type"), "image/png");
        assert!(header(&answer, "Content-Disposition").starts_with("inline; "));
        assert!(header(&answer, "Cache-Control").contains("max-age=60, immutable"));
    }

    #[test]
    fn nothing_of_an_address_gets_into_a_header_but_an_escaped_name() {
        for (name, shown) in [
            ("my%20juliet.jpg", "my%20juliet.jpg"),
            ("a\r\nSet-Cookie: x", "aSet-Cookiex"),
            ("%0d%zz%", "%0dzz"),
            ("\"; x=\"", "x"),
        ] {
            assert_eq!(header_name(name), shown);
        }
        assert!(header_name(&"x".repeat(100_000)).len() <= 1000);
    }

    #[test]
    fn a_body_comes_only_as_the_slot_says() {
        let offered = |length, content_type| Offered {
            length,
            content_type,
        };
        let status = |offered: Offered<'_>, now| put(&entry(), &offered, 300, now).map_err(|e| e.0);
        assert_eq!(status(offered(Some(100), Some("image/png")), 1300), Ok(()));
        assert_eq!(status(offered(Some(100), None), 1000), Ok(()));
        assert_eq!(
            status(offered(Some(100), Some("application/octet-stream")), 1000),
            Ok(())
        );
        assert_eq!(
            status(offered(Some(100), Some("image/png")), 1301),
            Err(410)
        );
        assert_eq!(status(offered(None, None), 1000), Err(411));
        assert_eq!(status(offered(Some(101), None), 1000), Err(413));
        assert_eq!(status(offered(Some(99), None), 1000), Err(413));
        assert_eq!(
            status(offered(Some(100), Some("text/html")), 1000),
            Err(415)
        );
    }
}
