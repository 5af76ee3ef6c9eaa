//! The head of an HTTP request, sans-IO. In: the bytes that have come. Out: the request and how long its body is, or the answer
//! that refuses it. Promise: where two readers could disagree about the end of a request (RFC 9112 section 11.2, request
//! smuggling) it is refused and the connection ends: both lengths, a length twice, bare CR or LF, folded lines, transfer codings.

use memchr::{memchr, memmem};

/// Header fields of one request that can be configured at most.
pub const HEADERS_MAX: usize = 256;
/// Digits of a Content-Length: more than any file has.
const LENGTH_DIGITS_MAX: usize = 15;

/// What one head may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub head_bytes_max: usize,
    pub headers_max: usize,
}

/// One request's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub method: Box<str>,
    /// Without query; begins with `/`, or is `*`.
    pub path: Box<str>,
    /// Behind the `?`; empty if there is none.
    pub query: Box<str>,
    /// Bytes of the body.
    pub body_bytes: u64,
    /// The client can take another answer on this connection.
    pub keep_alive: bool,
    /// `Expect: 100-continue`
    pub expects_continue: bool,
    /// HTTP/1.1, not 1.0.
    pub is_1_1: bool,
    /// Lower-case names, in order.
    headers: Vec<(Box<str>, Box<str>)>,
}

/// Why a request is not served; the connection ends, because nobody knows where the next one begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: u16,
    pub text: &'static str,
}

const fn refusal(status: u16, text: &'static str) -> Refusal {
    Refusal { status, text }
}

impl Head {
    /// Reads a head. `None`: it is not complete. Else the head, and how many bytes it takes.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Option<(Head, usize)>, Refusal> {
        // RFC 9112 2.2: an empty line before a request is ignored
        let skipped = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
        let bytes = &bytes[skipped..];
        let end = memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4);
        if end.unwrap_or(bytes.len()) > limits.head_bytes_max {
            return Err(refusal(431, "the request's head is too large"));
        }
        let seen = &bytes[..end.unwrap_or(bytes.len())];
        check_lines(seen)?;
        let Some(end) = end else { return Ok(None) };
        let mut room = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut room[..limits.headers_max.min(HEADERS_MAX)]);
        match request.parse(seen) {
            Ok(httparse::Status::Complete(taken)) if taken == end => {}
            Err(httparse::Error::TooManyHeaders) => {
                return Err(refusal(431, "the request has too many header fields"));
            }
            Err(httparse::Error::Version) => return Err(refusal(505, "HTTP/1.1 is spoken here")),
            _ => return Err(refusal(400, "this is not HTTP/1.1")),
        }
        let is_1_1 = request.version == Some(1);
        let headers = request
            .headers
            .iter()
            .map(|header| {
                let value = std::str::from_utf8(header.value)
                    .map_err(|_| refusal(400, "a header field is not UTF-8"))?;
                Ok((header.name.to_ascii_lowercase().into(), value.trim().into()))
            })
            .collect::<Result<Vec<(Box<str>, Box<str>)>, Refusal>>()?;
        let target = request.path.unwrap_or_default();
        let (path, query) = split_target(target)?;
        let mut head = Head {
            method: request.method.unwrap_or_default().into(),
            path: path.into(),
            query: query.into(),
            body_bytes: 0,
            keep_alive: is_1_1,
            expects_continue: false,
            is_1_1,
            headers,
        };
        head.body_bytes = head.length()?;
        match head.all("host").count() {
            1 => {}
            0 if !is_1_1 => {}
            _ => return Err(refusal(400, "a request names one Host")),
        }
        if head.has_token("connection", "close") {
            head.keep_alive = false;
        } else if head.has_token("connection", "keep-alive") {
            head.keep_alive = true;
        }
        match head.get("expect") {
            None => {}
            Some(expect) if expect.eq_ignore_ascii_case("100-continue") => {
                head.expects_continue = is_1_1;
            }
            Some(_) => return Err(refusal(417, "only 100-continue can be expected")),
        }
        Ok(Some((head, skipped + end)))
    }

    /// The first field of that (lower-case) name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// All fields of that (lower-case) name.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.headers
            .iter()
            .filter(move |(n, _)| &**n == name)
            .map(|(_, value)| &**value)
    }

    /// Whether a list of tokens, in one or more fields of that name, has `token`.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.all(name)
            .flat_map(|value| value.split(','))
            .any(|t| t.trim().eq_ignore_ascii_case(token))
    }

    /// RFC 9112 section 6.3, at its strictest.
    fn length(&self) -> Result<u64, Refusal> {
        let mut lengths = self.all("content-length");
        let length = lengths.next();
        if lengths.next().is_some() {
            return Err(refusal(400, "the length of the body is given twice"));
        }
        if let Some(coding) = self.get("transfer-encoding") {
            if length.is_some() || !self.is_1_1 {
                return Err(refusal(400, "the body has two lengths"));
            }
            return Err(match coding.eq_ignore_ascii_case("chunked") {
                true => refusal(411, "give the body's length in Content-Length"),
                false => refusal(501, "there are no transfer codings here"),
            });
        }
        let Some(length) = length else { return Ok(0) };
        let digits = length.bytes().all(|b| b.is_ascii_digit());
        if !digits || length.is_empty() || length.len() > LENGTH_DIGITS_MAX {
            return Err(refusal(400, "Content-Length is no number"));
        }
        length
            .parse()
            .map_err(|_| refusal(400, "Content-Length is no number"))
    }
}

/// Lines end in CR LF, and neither stands alone; no line is folded. `bytes` may stop anywhere.
fn check_lines(bytes: &[u8]) -> Result<(), Refusal> {
    let mut at = 0;
    while let Some(n) = memchr(b'\n', &bytes[at..]) {
        let end = at + n;
        if end == 0 || bytes[end - 1] != b'\r' {
            return Err(refusal(400, "a line ends in a bare LF"));
        }
        if matches!(bytes.get(end + 1), Some(b' ' | b'\t')) {
            return Err(refusal(400, "a header field is folded"));
        }
        at = end + 1;
    }
    let mut at = 0;
    while let Some(n) = memchr(b'\r', &bytes[at..]) {
        at += n + 1;
        if bytes.get(at).is_some_and(|next| *next != b'\n') {
            return Err(refusal(400, "a line ends in a bare CR"));
        }
    }
    Ok(())
}

/// Path and query of origin form, absolute form and `*` (RFC 9112 section 3.2).
fn split_target(target: &str) -> Result<(&str, &str), Refusal> {
    let target = match target.split_once("://") {
        Some(("http" | "https", rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
        _ => target,
    };
    if target != "*" && !target.starts_with('/') {
        return Err(refusal(400, "the request's target is no path"));
    }
    Ok(target.split_once('?').unwrap_or((target, "")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        head_bytes_max: 1024,
        headers_max: 8,
    };

    fn parse(bytes: &str) -> Result<Option<(Head, usize)>, u16> {
        Head::parse(bytes.as_bytes(), &LIMITS).map_err(|refusal| refusal.status)
    }

    fn status(head: &str) -> u16 {
        parse(head).expect_err(head)
    }

    fn head(text: &str) -> Head {
        parse(text).unwrap().unwrap().0
    }

    #[test]
    fn a_request_is_understood_when_its_head_is_complete() {
        let whole = "PUT /a/b?c=d HTTP/1.1\r\nHost: x\r\nX-A:  b \r\nContent-Length: 12\r\n\r\n";
        for cut in 0..whole.len() {
            assert_eq!(parse(&whole[..cut]), Ok(None), "{cut}");
        }
        let (head, taken) = parse(&format!("{whole}behind")).unwrap().unwrap();
        assert_eq!(taken, whole.len());
        assert_eq!(
            (&*head.method, &*head.path, &*head.query),
            ("PUT", "/a/b", "c=d")
        );
        assert_eq!((head.body_bytes, head.get("x-a")), (12, Some("b")));
        assert!(head.keep_alive && !head.expects_continue);
    }

    #[test]
    fn what_two_readers_could_cut_differently_is_refused() {
        let with = |fields: &str| status(&format!("POST / HTTP/1.1\r\nHost: x\r\n{fields}\r\n"));
        assert_eq!(
            with("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
            400
        );
        assert_eq!(with("Content-Length: 1\r\nContent-Length: 1\r\n"), 400);
        assert_eq!(with("Content-Length: 1, 1\r\n"), 400);
        assert_eq!(with("Content-Length: +1\r\n"), 400);
        assert_eq!(with("Content-Length: 0x1\r\n"), 400);
        assert_eq!(with("Content-Length: \r\n"), 400);
        assert_eq!(with("Content-Length: 9999999999999999\r\n"), 400);
        assert_eq!(with("Content-Length : 1\r\n"), 400);
        assert_eq!(with("Transfer-Encoding: chunked\r\n"), 411);
        assert_eq!(with("Transfer-Encoding: xchunked\r\n"), 501);
        assert_eq!(with("Transfer-Encoding: chunked, identity\r\n"), 501);
        assert_eq!(with("X: a\r\n b\r\n"), 400);
        assert_eq!(with("X: a\n"), 400);
        assert_eq!(with("X: a\rY: b\r\n"), 400);
        assert_eq!(with("X: \0\r\n"), 400);
        assert_eq!(
            status("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"),
            400
        );
        // as soon as it is seen
        assert_eq!(status("GET / HTTP/1.1\n"), 400);
    }

    #[test]
    fn what_is_no_request_or_too_large_is_refused() {
        assert_eq!(status("\u{16}\u{3}\u{1} hello\r\n\r\n"), 400);
        assert_eq!(status(&format!("GET /{}", "a".repeat(1024))), 431);
        let many: String = (0..9).map(|n| format!("X-{n}: y\r\n")).collect();
        assert_eq!(status(&format!("GET / HTTP/1.1\r\n{many}\r\n")), 431);
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), 400);
        assert_eq!(status("GET x HTTP/1.1\r\nHost: a\r\n\r\n"), 400);
        assert_eq!(
            status("GET / HTTP/1.1\r\nHost: a\r\nExpect: more\r\n\r\n"),
            417
        );
    }

    #[test]
    fn connections_stay_as_the_version_and_the_client_say() {
        assert!(!head("GET / HTTP/1.0\r\n\r\n").keep_alive);
        assert!(head("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keep_alive);
        assert!(
            !head("GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\n\r\n").keep_alive
        );
        assert!(
            head("\r\nGET http://x/y HTTP/1.1\r\nHost: x\r\n\r\n")
                .path
                .as_ref()
                == "/y"
        );
        assert_eq!(&*head("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n").path, "*");
    }

    /// Heads, good and bad, and what stands behind them.
    fn bytes() -> impl Strategy<Value = String> {
        let line = prop_oneof![
            Just("Host: x".to_owned()),
            Just("Content-Length: 3".to_owned()),
            Just("Transfer-Encoding: chunked".to_owned()),
            Just("Connection: close".to_owned()),
            Just(" folded".to_owned()),
            Just("GET / HTTP/1.1".to_owned()),
            Just("POST /bosh?a=b HTTP/1.1".to_owned()),
            Just(String::new()),
            "[ -~\u{e9}\\x00\t]{0,30}",
        ];
        let end =
            prop_oneof![8 => Just("\r\n"), 1 => Just("\n"), 1 => Just("\r"), 1 => Just("\r\r\n")];
        let lines = prop::collection::vec((line, end), 0..8);
        (any::<bool>(), lines).prop_map(|(begins, lines)| {
            let lines: String = lines.into_iter().map(|(line, end)| line + end).collect();
            match begins {
                true => format!("GET /x HTTP/1.1\r\nHost: x\r\n{lines}\r\n"),
                false => lines,
            }
        })
    }

    proptest! {
        /// So it does not matter in which pieces a head comes.
        #[test]
        fn what_is_said_of_the_beginning_of_a_head_is_said_of_the_whole(
            bytes in bytes(),
            cut in any::<prop::sample::Index>(),
        ) {
            let bytes = bytes.as_bytes();
            let limits = Limits { head_bytes_max: 100, headers_max: 4 };
            let whole = Head::parse(bytes, &limits);
            match Head::parse(&bytes[..cut.index(bytes.len() + 1)], &limits) {
                Ok(None) => {}
                Ok(some) => prop_assert_eq!(Ok(some), whole),
                Err(_) => prop_assert!(whole.is_err()),
            }
        }
    }
}
