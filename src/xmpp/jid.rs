//! XMPP addresses (RFC 7622). In: text as a peer sent it. Out: a [`Jid`], one normalised text with the offsets of its parts.
//!
//! The promise: two texts that name the same entity become the same bytes, and a normalised text parses to itself. Nearly
//! all addresses on the wire are normalised ASCII already: those are checked byte by byte and borrowed, without allocation.

use std::borrow::{Borrow, Cow};
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::Ipv6Addr;

use idna::uts46::{AsciiDenyList, Hyphens, Uts46};
use memchr::memchr;
use precis_profiles::precis_core::profile::PrecisFastInvocation;
use precis_profiles::{OpaqueString, UsernameCaseMapped};

/// The most bytes of one part, after normalisation (RFC 7622, 3.2 to 3.4).
pub const PART_BYTES_MAX: usize = 1023;

/// The most bytes of a whole address: three parts, `@` and `/`.
pub const JID_BYTES_MAX: usize = 3 * PART_BYTES_MAX + 2;

/// The most bytes of one part before normalisation, which shrinks it to a third at most (full-width ASCII). It bounds the
/// work that a stranger's address can cause.
const RAW_PART_BYTES_MAX: usize = 3 * PART_BYTES_MAX;

/// The most characters of one part that PRECIS allows only in a context (zero-width joiners, Arabic digits, ...). Each makes
/// the profile look through the whole part, so this too bounds the work.
const CONTEXTUAL_MAX: usize = 64;

/// In place of an offset: the part is missing.
const NONE: u16 = u16::MAX;

/// A normalised address: `[localpart@]domainpart[/resourcepart]`.
///
/// Equality, order and hash are those of [`Jid::as_str`], so that a map keyed by `Jid` can be asked with a normalised `&str`.
#[derive(Clone)]
pub struct Jid<'a> {
    text: Cow<'a, str>,
    at: u16,
    slash: u16,
}

impl<'a> Jid<'a> {
    /// Parses and normalises an address, borrowing it if it is in normal form.
    pub fn parse(s: &'a str) -> Result<Jid<'a>, JidError> {
        let (bare, raw_resource) = split_at_byte(s, b'/');
        let (raw_local, raw_domain) = match split_at_byte(bare, b'@') {
            (local, Some(domain)) => (Some(local), domain),
            (domain, None) => (None, domain),
        };
        let local = raw_local.map(localpart).transpose()?;
        let domain = domainpart(raw_domain)?;
        let resource = raw_resource.map(resourcepart).transpose()?;
        let (local, resource) = (local.as_deref(), resource.as_deref());
        let (at, slash, len) = offsets(local, &domain, resource);
        let text = if local == raw_local && domain == raw_domain && resource == raw_resource {
            Cow::Borrowed(s)
        } else {
            Cow::Owned(join(local, &domain, resource, len))
        };
        Ok(Jid { text, at, slash })
    }

    /// Normalises the parts and puts them together.
    pub fn from_parts(
        local: Option<&str>,
        domain: &str,
        resource: Option<&str>,
    ) -> Result<Jid<'static>, JidError> {
        let local = local.map(localpart).transpose()?;
        let domain = domainpart(domain)?;
        let resource = resource.map(resourcepart).transpose()?;
        let (at, slash, len) = offsets(local.as_deref(), &domain, resource.as_deref());
        let text = Cow::Owned(join(local.as_deref(), &domain, resource.as_deref(), len));
        Ok(Jid { text, at, slash })
    }

    /// The whole address in normal form.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The localpart, normalised.
    pub fn local(&self) -> Option<&str> {
        (self.at != NONE).then(|| &self.text[..usize::from(self.at)])
    }

    /// The domainpart, normalised: U-labels, no trailing dot.
    pub fn domain(&self) -> &str {
        let start = if self.at == NONE {
            0
        } else {
            usize::from(self.at) + 1
        };
        &self.text[start..self.bare_len()]
    }

    /// The resourcepart, normalised.
    pub fn resource(&self) -> Option<&str> {
        (self.slash != NONE).then(|| &self.text[usize::from(self.slash) + 1..])
    }

    /// The address without its resourcepart.
    pub fn bare(&self) -> &str {
        &self.text[..self.bare_len()]
    }

    /// Whether there is no resourcepart.
    pub fn is_bare(&self) -> bool {
        self.slash == NONE
    }

    /// The same address, owning its text.
    pub fn into_owned(self) -> Jid<'static> {
        Jid {
            text: Cow::Owned(self.text.into_owned()),
            at: self.at,
            slash: self.slash,
        }
    }

    /// The same address, borrowing this one's text.
    pub fn borrowed(&self) -> Jid<'_> {
        Jid {
            text: Cow::Borrowed(&self.text),
            at: self.at,
            slash: self.slash,
        }
    }

    /// The address without its resourcepart, owned.
    pub fn to_bare(&self) -> Jid<'static> {
        Jid {
            text: Cow::Owned(self.bare().to_owned()),
            at: self.at,
            slash: NONE,
        }
    }

    /// The bare address with this resourcepart, which is normalised first.
    pub fn with_resource(&self, resource: &str) -> Result<Jid<'static>, JidError> {
        let resource = resourcepart(resource)?;
        let bare = self.bare();
        let mut text = String::with_capacity(bare.len() + 1 + resource.len());
        text.push_str(bare);
        text.push('/');
        text.push_str(&resource);
        Ok(Jid {
            text: Cow::Owned(text),
            at: self.at,
            slash: bare.len() as u16,
        })
    }

    fn bare_len(&self) -> usize {
        if self.slash == NONE {
            self.text.len()
        } else {
            usize::from(self.slash)
        }
    }
}

/// The localpart in normal form: PRECIS UsernameCaseMapped (RFC 8265, 3.3), without the characters of RFC 7622, 3.3.1.
pub fn localpart(s: &str) -> Result<Cow<'_, str>, JidError> {
    let part = Part::Local;
    if !s.is_empty() && s.len() <= PART_BYTES_MAX && s.bytes().all(is_normal_local_byte) {
        return Ok(Cow::Borrowed(s));
    }
    let text = stable(part, s, |s| UsernameCaseMapped::enforce(s))?;
    if text.bytes().any(is_excluded_local_byte) {
        return Err(part.error(Reason::Forbidden));
    }
    Ok(text)
}

/// The domainpart in normal form: U-labels by UTS #46 with the letters, digits and hyphens rule, one trailing dot removed, or
/// an IPv6 address in brackets (RFC 7622, 3.2).
pub fn domainpart(s: &str) -> Result<Cow<'_, str>, JidError> {
    let part = Part::Domain;
    let name = s.strip_suffix('.').unwrap_or(s);
    if is_normal_domain(name) {
        return Ok(Cow::Borrowed(name));
    }
    part.check_raw(s)?;
    if let Some(literal) = s.strip_prefix('[') {
        let address: Ipv6Addr = literal
            .strip_suffix(']')
            .and_then(|address| address.parse().ok())
            .ok_or(part.error(Reason::Forbidden))?;
        let text = format!("[{address}]");
        return Ok(if text == s {
            Cow::Borrowed(s)
        } else {
            Cow::Owned(text)
        });
    }
    let (text, result) =
        Uts46::new().to_unicode(s.as_bytes(), AsciiDenyList::STD3, Hyphens::CheckFirstLast);
    result.map_err(|_| part.error(Reason::Forbidden))?;
    let text = match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.strip_suffix('.').unwrap_or(text)),
        Cow::Owned(mut text) => {
            // Also an ideographic full stop, which has been mapped by now.
            if text.ends_with('.') {
                text.pop();
            }
            Cow::Owned(text)
        }
    };
    part.check_result(&text)?;
    if text.split('.').any(str::is_empty) {
        return Err(part.error(Reason::Forbidden));
    }
    Ok(text)
}

/// The resourcepart in normal form: PRECIS OpaqueString (RFC 8265, 4.2).
pub fn resourcepart(s: &str) -> Result<Cow<'_, str>, JidError> {
    if !s.is_empty() && s.len() <= PART_BYTES_MAX && s.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        return Ok(Cow::Borrowed(s));
    }
    stable(Part::Resource, s, |s| OpaqueString::enforce(s))
}

/// Why a text is no address: which part, and what is wrong with it. The answer to a client is `<jid-malformed/>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the {part} {reason}")]
pub struct JidError {
    /// Where the fault is.
    pub part: Part,
    /// What it is.
    pub reason: Reason,
}

/// A part of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Before the `@`.
    Local,
    /// The server or service.
    Domain,
    /// After the `/`.
    Resource,
}

/// What is wrong with a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It has no characters, though its separator stands.
    Empty,
    /// It has more than [`PART_BYTES_MAX`] bytes.
    TooLong,
    /// Its profile forbids a character or their combination.
    Forbidden,
}

impl Part {
    fn error(self, reason: Reason) -> JidError {
        JidError { part: self, reason }
    }

    fn check_raw(self, s: &str) -> Result<(), JidError> {
        if s.is_empty() {
            Err(self.error(Reason::Empty))
        } else if s.len() > RAW_PART_BYTES_MAX {
            Err(self.error(Reason::TooLong))
        } else {
            Ok(())
        }
    }

    fn check_result(self, s: &str) -> Result<(), JidError> {
        if s.is_empty() {
            Err(self.error(Reason::Empty))
        } else if s.len() > PART_BYTES_MAX {
            Err(self.error(Reason::TooLong))
        } else {
            Ok(())
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Local => "localpart",
            Part::Domain => "domainpart",
            Part::Resource => "resourcepart",
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Empty => "is empty",
            Reason::TooLong => "is longer than 1023 bytes",
            Reason::Forbidden => "has characters that are not allowed there",
        })
    }
}

impl fmt::Display for Jid<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Jid<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

// The offsets follow from the text: neither localpart nor domainpart can hold `@` or `/`.
impl PartialEq for Jid<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Jid<'_> {}

impl PartialOrd for Jid<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Jid<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.text.cmp(&other.text)
    }
}

impl Hash for Jid<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl Borrow<str> for Jid<'_> {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

fn split_at_byte(s: &str, byte: u8) -> (&str, Option<&str>) {
    match memchr(byte, s.as_bytes()) {
        Some(at) => (&s[..at], Some(&s[at + 1..])),
        None => (s, None),
    }
}

/// Offsets of `@` and `/`, and the length of the whole. They fit: each part is at most 1023 bytes.
fn offsets(local: Option<&str>, domain: &str, resource: Option<&str>) -> (u16, u16, usize) {
    let at = local.map_or(NONE, |local| local.len() as u16);
    let bare_len = local.map_or(0, |local| local.len() + 1) + domain.len();
    let slash = resource.map_or(NONE, |_| bare_len as u16);
    let len = bare_len + resource.map_or(0, |resource| 1 + resource.len());
    (at, slash, len)
}

fn join(local: Option<&str>, domain: &str, resource: Option<&str>, len: usize) -> String {
    let mut text = String::with_capacity(len);
    if let Some(local) = local {
        text.push_str(local);
        text.push('@');
    }
    text.push_str(domain);
    if let Some(resource) = resource {
        text.push('/');
        text.push_str(resource);
    }
    text
}

/// Applies a PRECIS profile until its output is stable: the profiles are not idempotent for every input, and RFC 8264, 7 has
/// what stays unstable refused.
fn stable(
    part: Part,
    s: &str,
    enforce: for<'x> fn(&'x str) -> Result<Cow<'x, str>, precis_profiles::precis_core::Error>,
) -> Result<Cow<'_, str>, JidError> {
    part.check_raw(s)?;
    if s.chars().filter(|&c| is_contextual(c)).count() > CONTEXTUAL_MAX {
        return Err(part.error(Reason::Forbidden));
    }
    let refused = |_| part.error(Reason::Forbidden);
    let mut text = enforce(s).map_err(refused)?;
    let mut rounds = 3;
    while let Cow::Owned(once) = &text {
        part.check_result(once)?;
        let again = enforce(once).map_err(refused)?;
        if *again == **once {
            break;
        }
        if rounds == 0 {
            return Err(part.error(Reason::Forbidden));
        }
        rounds -= 1;
        text = Cow::Owned(again.into_owned());
    }
    part.check_result(&text)?;
    Ok(text)
}

/// RFC 5892, appendix A.
fn is_contextual(c: char) -> bool {
    matches!(
        c,
        '\u{b7}' | '\u{375}' | '\u{5f3}' | '\u{5f4}' | '\u{660}'..='\u{669}' | '\u{6f0}'..='\u{6f9}'
            | '\u{200c}' | '\u{200d}' | '\u{30fb}'
    )
}

/// Visible ASCII without capitals: unchanged by UsernameCaseMapped.
fn is_normal_local_byte(b: u8) -> bool {
    matches!(b, b'!'..=b'~') && !b.is_ascii_uppercase() && !is_excluded_local_byte(b)
}

/// RFC 7622, 3.3.1. (The space is out by its profile.)
fn is_excluded_local_byte(b: u8) -> bool {
    matches!(b, b'"' | b'&' | b'\'' | b'/' | b':' | b'<' | b'>' | b'@')
}

/// Letters, digits and hyphens in lower case, with nothing that UTS #46 would look into (`xn--`).
fn is_normal_domain(s: &str) -> bool {
    if s.is_empty() || s.len() > PART_BYTES_MAX {
        return false;
    }
    let mut before = b'.';
    let mut label_start = 0;
    for (i, b) in s.bytes().enumerate() {
        match b {
            b'a'..=b'z' | b'0'..=b'9' => {}
            // `xn--` ends in a hyphen that follows a hyphen.
            b'-' if before == b'.' || (before == b'-' && i - label_start == 3) => return false,
            b'-' => {}
            b'.' if before == b'.' || before == b'-' => return false,
            b'.' => label_start = i + 1,
            _ => return false,
        }
        before = b;
    }
    before != b'.' && before != b'-'
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn is_borrowed(jid: &Jid<'_>) -> bool {
        matches!(jid.text, Cow::Borrowed(_))
    }

    fn reason(s: &str) -> (Part, Reason) {
        let error = Jid::parse(s).expect_err(s);
        (error.part, error.reason)
    }

    #[test]
    fn every_form_splits_into_its_parts() {
        for (text, local, domain, resource) in [
            ("localhost", None, "localhost", None),
            ("a@b", Some("a"), "b", None),
            ("b/r", None, "b", Some("r")),
            ("a@b/r", Some("a"), "b", Some("r")),
            (
                "a@b.example/x@y/z w",
                Some("a"),
                "b.example",
                Some("x@y/z w"),
            ),
            ("b/a@c", None, "b", Some("a@c")),
            ("o`neil@[::1]/1", Some("o`neil"), "[::1]", Some("1")),
            ("a@127.0.0.1", Some("a"), "127.0.0.1", None),
            (
                "ß@exämple.example/☠",
                Some("ß"),
                "exämple.example",
                Some("☠"),
            ),
        ] {
            let jid = Jid::parse(text).unwrap();
            assert_eq!(
                (jid.local(), jid.domain(), jid.resource(), jid.as_str()),
                (local, domain, resource, text)
            );
            assert!(is_borrowed(&jid), "{text}");
            assert_eq!(jid.is_bare(), resource.is_none());
            assert_eq!(Jid::from_parts(local, domain, resource).unwrap(), jid);
            assert_eq!(jid.to_bare().as_str(), jid.bare());
            assert_eq!(
                jid.with_resource("new").unwrap(),
                Jid::parse(&format!("{}/new", jid.bare())).unwrap()
            );
        }
    }

    #[test]
    fn texts_of_the_same_entity_become_the_same_bytes() {
        for (text, normal) in [
            ("Alice@Example.COM./Desk", "alice@example.com/Desk"),
            ("ＡＬＩＣＥ@example.com", "alice@example.com"),
            ("jose\u{301}@example.com", "jos\u{e9}@example.com"),
            ("a@XN--EXMPLE-CUA.com", "a@exämple.com"),
            ("a@example。com。", "a@example.com"),
            ("a@b/x\u{a0}y", "a@b/x y"),
            ("a@[0:0::0:1]", "a@[::1]"),
            ("σίσυφος@b", "σίσυφος@b"),
            ("ΣΊΣΥΦΟΣ@b", "σίσυφοσ@b"),
        ] {
            assert_eq!(Jid::parse(text).unwrap().as_str(), normal, "{text}");
        }
    }

    #[test]
    fn a_malformed_address_is_refused_with_its_reason() {
        use Part::*;
        use Reason::*;
        for (text, part, why) in [
            ("", Domain, Empty),
            ("@b", Local, Empty),
            ("a@", Domain, Empty),
            ("a@/r", Domain, Empty),
            ("a@b/", Resource, Empty),
            ("a@.", Domain, Empty),
            ("a@b@c", Domain, Forbidden),
            ("a@b..c", Domain, Forbidden),
            ("a@b..", Domain, Forbidden),
            ("a@.b", Domain, Forbidden),
            ("a@-b", Domain, Forbidden),
            ("a@b-.c", Domain, Forbidden),
            ("a@b c", Domain, Forbidden),
            ("a@b_c", Domain, Forbidden),
            ("a@xn--a", Domain, Forbidden),
            ("a@℀.com", Domain, Forbidden),
            ("a@[::1", Domain, Forbidden),
            ("a@[127.0.0.1]", Domain, Forbidden),
            ("a@[fe80::1%eth0]", Domain, Forbidden),
            ("a b@c", Local, Forbidden),
            ("a\"b@c", Local, Forbidden),
            ("a&b@c", Local, Forbidden),
            ("a'b@c", Local, Forbidden),
            ("a:b@c", Local, Forbidden),
            ("a<b@c", Local, Forbidden),
            ("a>b@c", Local, Forbidden),
            ("a＠b@c", Local, Forbidden),
            ("a\u{7f}@c", Local, Forbidden),
            ("henry\u{2163}@c", Local, Forbidden),
            ("\u{265a}@c", Local, Forbidden),
            ("a\u{5d0}1b@c", Local, Forbidden),
            ("a@b/\0", Resource, Forbidden),
            ("a@b/\n", Resource, Forbidden),
            ("a@b/\u{fffe}", Resource, Forbidden),
        ] {
            assert_eq!(reason(text), (part, why), "{text:?}");
        }
    }

    #[test]
    fn each_part_holds_1023_bytes_and_no_more() {
        let most = "a".repeat(PART_BYTES_MAX);
        let text = format!("{most}@{most}/{most}");
        assert_eq!(text.len(), JID_BYTES_MAX);
        let jid = Jid::parse(&text).unwrap();
        assert_eq!(jid.resource(), Some(most.as_str()));
        assert_eq!(jid.domain(), most);
        assert_eq!(
            reason(&format!("{most}a@b")),
            (Part::Local, Reason::TooLong)
        );
        assert_eq!(reason(&format!("{most}a")), (Part::Domain, Reason::TooLong));
        assert_eq!(
            reason(&format!("a/{most}a")),
            (Part::Resource, Reason::TooLong)
        );
        // The limit is on what normalisation leaves.
        let wide = "ａ".repeat(PART_BYTES_MAX);
        assert_eq!(localpart(&wide).unwrap(), most);
        assert_eq!(
            reason(&"é".repeat(PART_BYTES_MAX / 2 + 1)),
            (Part::Domain, Reason::TooLong)
        );
    }

    #[test]
    fn characters_that_need_their_context_are_bounded() {
        let digits = "\u{661}".repeat(CONTEXTUAL_MAX);
        assert!(resourcepart(&digits).is_ok());
        assert!(resourcepart(&(digits + "\u{661}")).is_err());
        assert!(resourcepart("\u{661}\u{6f1}").is_err());
    }

    #[test]
    fn a_jid_is_a_text_and_two_offsets() {
        assert_eq!(size_of::<Jid<'_>>(), size_of::<String>() + 8);
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused_and_the_result_is_stable(s in "\\PC*|[a-zA-Z@/.:ß\\-σſａ０。 ]{0,20}|.*@.*/.*") {
            if let Ok(jid) = Jid::parse(&s) {
                let text = jid.as_str();
                let again = Jid::parse(text).unwrap();
                prop_assert_eq!(again.as_str(), text);
                prop_assert!(is_borrowed(&again));
                prop_assert_eq!((again.at, again.slash), (jid.at, jid.slash));
                prop_assert!(text.len() <= JID_BYTES_MAX);
            }
        }

        #[test]
        fn the_fast_paths_agree_with_the_profiles(s in "[ -~]{1,12}|(xn--)?[a-z.\\-]{1,9}") {
            if let Ok(local) = localpart(&s) {
                prop_assert_eq!(local, UsernameCaseMapped::enforce(s.as_str()).unwrap());
            }
            prop_assert_eq!(resourcepart(&s).unwrap(), OpaqueString::enforce(s.as_str()).unwrap());
            let (name, result) =
                Uts46::new().to_unicode(s.as_bytes(), AsciiDenyList::STD3, Hyphens::CheckFirstLast);
            if is_normal_domain(&s) {
                prop_assert!(result.is_ok());
                prop_assert_eq!(&*name, &*s);
            }
        }
    }
}
