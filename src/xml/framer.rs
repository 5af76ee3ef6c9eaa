//! Cuts the endless stream into frames.
//!
//! In: whatever bytes have arrived and are not yet consumed. Out: the next complete frame's kind and length, or "more bytes,
//! please", or the reason why this stream must end.
//! Promise: no byte is scanned twice however the input trickles; nothing grows past its limit before it is refused; the cut
//! is exact (quotes, CDATA sections); how the input was split never changes the frames. What is inside a frame is checked by
//! [`View::parse`](super::View::parse): the framer refuses only what it sees on its way, so that a client that waits for an
//! answer to broken markup gets one.

use memchr::{memchr, memchr2};

use super::names::{CLASS, COLON, HIGH, START};
use super::{XmlError, is_space};

/// What one stream may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one top-level element.
    pub stanza_bytes_max: usize,
    /// Bytes of XML declaration and stream header, white space before them included.
    pub header_bytes_max: usize,
    /// Elements inside one another; the top-level element counts as 1.
    pub depth_max: u16,
    /// Attributes of one element, namespace declarations included.
    pub attributes_max: u16,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stanza_bytes_max: 256 * 1024,
            header_bytes_max: 4 * 1024,
            depth_max: 32,
            attributes_max: 32,
        }
    }
}

/// One piece of the stream: the first `len` bytes of the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: FrameKind,
    /// Bytes to consume.
    pub len: usize,
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// White space, XML declaration and `<stream:stream …>`; for [`StreamHeader::parse`](super::StreamHeader::parse).
    Header,
    /// One complete child of the stream; for [`View::parse`](super::View::parse).
    Element,
    /// `</stream:stream>`
    End,
    /// White space between elements (RFC 6120 §4.6.1 keep-alive).
    Whitespace,
}

/// The scanning state of one stream. Holds no bytes.
#[derive(Clone, Debug)]
pub struct Framer {
    /// Bytes of the current frame that are already scanned.
    at: u32,
    /// Where the current markup's `<` is.
    mark: u32,
    /// Open elements within the frame.
    depth: u16,
    phase: Phase,
    inside: Inside,
    /// The start tag is being read byte by byte.
    exact: bool,
    /// The open quote inside such a tag, else 0.
    quote: u8,
    /// Where the stream comes in messages.
    messages: Messages,
    /// Digest of the stream element's name.
    header: u8,
    /// Digests of the open elements' names. Only a shortcut: a wrong end tag (255 of 256) is refused as it comes, while the
    /// client waits; the rest is found by the view at the frame's end.
    names: [u8; NAMES],
}

const NAMES: usize = 22;

const _: () = assert!(
    std::mem::size_of::<Framer>() <= 40,
    "one per connection: keep it small"
);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Before the stream header; the XML declaration may come.
    Prolog,
    /// Before the stream header, after the XML declaration.
    Declared,
    Stream,
    Closed,
}

/// Where the transport carries messages (RFC 7395), it puts [`MESSAGE`] before each, and each holds one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Messages {
    /// It carries an endless stream.
    None,
    /// The next message must begin.
    Expected,
    /// One has begun, its element has not.
    Begun,
}

/// The begin of a message: INFORMATION SEPARATOR TWO, which no XML may hold, so that it is found wherever it does not belong.
pub const MESSAGE: u8 = 0x1E;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    Text,
    /// After `<`.
    Markup,
    StartTag,
    EndTag,
    /// After `<!`.
    Bang,
    Cdata,
    /// After `<?`.
    Declaration,
}

impl Default for Framer {
    fn default() -> Self {
        Self::new()
    }
}

impl Framer {
    /// Expects optional white space and XML declaration, then the stream header.
    pub fn new() -> Self {
        Self {
            at: 0,
            mark: 0,
            depth: 0,
            phase: Phase::Prolog,
            inside: Inside::Text,
            exact: false,
            quote: 0,
            header: 0,
            messages: Messages::None,
            names: [0; NAMES],
        }
    }

    /// The same for a stream of messages: [`MESSAGE`] comes before each, as [`FrameKind::Whitespace`].
    pub fn of_messages() -> Self {
        Self {
            messages: Messages::Expected,
            ..Self::new()
        }
    }

    /// After STARTTLS or SASL: a new stream header is expected (RFC 6120 §5.4.3.3 and §6.4.6).
    pub fn restart(&mut self) {
        *self = match self.messages {
            Messages::None => Self::new(),
            _ => Self::of_messages(),
        };
    }

    /// The next frame. `buf` begins at the first byte not yet consumed; on Some the caller consumes `len` bytes and calls
    /// again; on None it calls again with the same bytes and more. After an error the stream is over.
    pub fn next(&mut self, buf: &[u8], limits: &Limits) -> Result<Option<Frame>, XmlError> {
        let (max, what) = match self.phase {
            Phase::Prolog | Phase::Declared => (limits.header_bytes_max, "stream header"),
            Phase::Stream | Phase::Closed => (limits.stanza_bytes_max, "stanza"),
        };
        let max = max.min(u32::MAX as usize);
        let window = &buf[..buf.len().min(max)];
        match self.scan(window, limits)? {
            Some(frame) => {
                self.at = 0;
                self.mark = 0;
                Ok(Some(frame))
            }
            None if buf.len() >= max => Err(XmlError::TooBig(what)),
            None => Ok(None),
        }
    }

    fn scan(&mut self, buf: &[u8], limits: &Limits) -> Result<Option<Frame>, XmlError> {
        loop {
            let step = match self.inside {
                Inside::Text if self.depth > 0 => self.text(buf),
                Inside::Text => match self.between(buf)? {
                    Between::Markup => Some(()),
                    Between::Nothing => None,
                    Between::Whitespace(len) => {
                        return Ok(Some(Frame {
                            kind: FrameKind::Whitespace,
                            len,
                        }));
                    }
                },
                Inside::Markup => self.markup(buf)?,
                Inside::StartTag => match self.start_tag(buf, limits)? {
                    Some(Some(frame)) => return Ok(Some(frame)),
                    Some(None) => Some(()),
                    None => None,
                },
                Inside::EndTag => match self.end_tag(buf)? {
                    Some(Some(frame)) => return Ok(Some(frame)),
                    Some(None) => Some(()),
                    None => None,
                },
                Inside::Bang => self.bang(buf)?,
                Inside::Cdata => self.cdata(buf),
                Inside::Declaration => self.declaration(buf)?,
            };
            if step.is_none() {
                return Ok(None);
            }
        }
    }

    /// Character data of an element.
    #[inline]
    fn text(&mut self, buf: &[u8]) -> Option<()> {
        let rest = &buf[self.at as usize..];
        // Between two tags there is often nothing: not worth a call.
        let found = if rest.first() == Some(&b'<') {
            Some(0)
        } else {
            memchr(b'<', rest)
        };
        match found {
            Some(n) => {
                self.open_markup(self.at as usize + n);
                Some(())
            }
            None => {
                self.at = buf.len() as u32;
                None
            }
        }
    }

    /// Between the stream's children, or before the stream.
    fn between(&mut self, buf: &[u8]) -> Result<Between, XmlError> {
        let start = self.at as usize;
        if self.messages != Messages::None
            && let Some(step) = self.message(buf.get(start).copied())?
        {
            return Ok(step);
        }
        let space = buf[start..].iter().take_while(|b| is_space(**b)).count();
        let at = start + space;
        let before_stream = matches!(self.phase, Phase::Prolog | Phase::Declared);
        if !before_stream && space > 0 {
            return Ok(Between::Whitespace(space));
        }
        self.at = at as u32;
        match buf.get(at) {
            None => Ok(Between::Nothing),
            Some(b'<') => match self.phase {
                Phase::Closed => Err(XmlError::NotWellFormed("markup after the stream's end")),
                _ => {
                    self.open_markup(at);
                    Ok(Between::Markup)
                }
            },
            // UTF-16 or UTF-32, with or without byte order mark.
            Some(0 | 0xFE | 0xFF) if before_stream => Err(XmlError::Encoding),
            Some(_) if self.phase == Phase::Stream => {
                Err(XmlError::BadFormat("text between stanzas"))
            }
            Some(_) => Err(XmlError::NotWellFormed("text outside of the stream")),
        }
    }

    /// The byte between two elements, where these come in messages.
    fn message(&mut self, next: Option<u8>) -> Result<Option<Between>, XmlError> {
        match (next, self.messages) {
            (Some(MESSAGE), Messages::Begun) => Err(XmlError::BadFormat("empty message")),
            (Some(MESSAGE), _) if self.at == 0 => {
                self.messages = Messages::Begun;
                Ok(Some(Between::Whitespace(1)))
            }
            (Some(b'<'), Messages::Begun) => {
                self.messages = Messages::Expected;
                Ok(None)
            }
            (Some(b'<'), _) => Err(XmlError::BadFormat("two elements in one message")),
            (Some(b), Messages::Begun) if is_space(b) => Err(XmlError::BadFormat(
                "a message that does not begin with '<'",
            )),
            _ => Ok(None),
        }
    }

    #[inline]
    fn open_markup(&mut self, mark: usize) {
        self.mark = mark as u32;
        self.at = mark as u32 + 1;
        self.inside = Inside::Markup;
    }

    /// The byte after `<` decides what it is.
    #[inline]
    fn markup(&mut self, buf: &[u8]) -> Result<Option<()>, XmlError> {
        let Some(&b) = buf.get(self.at as usize) else {
            return Ok(None);
        };
        self.inside = match b {
            b'/' if self.phase == Phase::Stream => Inside::EndTag,
            b'/' => return Err(XmlError::NotWellFormed("end tag before the stream")),
            b'!' => Inside::Bang,
            b'?' if self.phase == Phase::Prolog => Inside::Declaration,
            b'?' => return Err(XmlError::Restricted("processing instruction")),
            // UTF-16, little-endian, without byte order mark.
            0 if self.phase == Phase::Prolog => return Err(XmlError::Encoding),
            b if CLASS[usize::from(b)] & (START | HIGH | COLON) != 0 => Inside::StartTag,
            _ => return Err(XmlError::NotWellFormed("'<' that begins no markup")),
        };
        self.at += 1;
        Ok(Some(()))
    }

    /// Some(Some(frame)) when the tag completes a frame, Some(None) when the tag is complete, None for more bytes.
    #[inline]
    fn start_tag(
        &mut self,
        buf: &[u8],
        limits: &Limits,
    ) -> Result<Option<Option<Frame>>, XmlError> {
        let Some(end) = (if self.exact {
            self.exact_tag_end(buf)?
        } else {
            self.tag_end(buf)?
        }) else {
            return Ok(None);
        };
        self.exact = false;
        let empty = buf[end - 1] == b'/';
        if !empty
            && buf[self.mark as usize..end]
                .trim_ascii_end()
                .ends_with(b"/")
        {
            return Err(XmlError::NotWellFormed("white space between '/' and '>'"));
        }
        self.inside = Inside::Text;
        self.at = end as u32 + 1;
        let done = |kind| Ok(Some(Some(Frame { kind, len: end + 1 })));
        if self.phase != Phase::Stream {
            if empty {
                return Err(XmlError::BadFormat(
                    "empty element in place of a stream header",
                ));
            }
            self.header = digest(start_name(buf, self.mark));
            self.phase = Phase::Stream;
            return done(FrameKind::Header);
        }
        if self.depth >= limits.depth_max {
            return Err(XmlError::TooBig("depth"));
        }
        if empty {
            return if self.depth == 0 {
                done(FrameKind::Element)
            } else {
                Ok(Some(None))
            };
        }
        if let Some(slot) = self.names.get_mut(usize::from(self.depth)) {
            *slot = digest(start_name(buf, self.mark));
        }
        self.depth += 1;
        Ok(Some(None))
    }

    /// Where the start tag's `>` is. The first `>` is the one if quotes of only one kind stand before it, in pairs; that is
    /// so in nearly every tag and is seen fast. Otherwise the tag is read byte by byte.
    #[inline]
    fn tag_end(&mut self, buf: &[u8]) -> Result<Option<usize>, XmlError> {
        let start = self.at as usize;
        let end = match memchr2(b'>', b'<', &buf[start..]) {
            None => {
                self.at = buf.len() as u32;
                return Ok(None);
            }
            Some(n) => start + n,
        };
        if buf[end] == b'<' {
            return Err(XmlError::NotWellFormed("'<' in a tag"));
        }
        let quotes = Quotes::count(&buf[self.mark as usize + 1..end]);
        if quotes.paired() {
            return Ok(Some(end));
        }
        self.exact = true;
        self.at = self.mark + 1;
        self.exact_tag_end(buf)
    }

    #[cold]
    fn exact_tag_end(&mut self, buf: &[u8]) -> Result<Option<usize>, XmlError> {
        for (at, &b) in buf.iter().enumerate().skip(self.at as usize) {
            match b {
                b'<' => return Err(XmlError::NotWellFormed("'<' in a tag")),
                b'"' | b'\'' if self.quote == 0 => self.quote = b,
                b'"' | b'\'' if self.quote == b => self.quote = 0,
                b'>' if self.quote == 0 => return Ok(Some(at)),
                _ => {}
            }
        }
        self.at = buf.len() as u32;
        Ok(None)
    }

    /// Returns as [`Self::start_tag`] does.
    #[inline]
    fn end_tag(&mut self, buf: &[u8]) -> Result<Option<Option<Frame>>, XmlError> {
        let start = self.at as usize;
        let end = match memchr2(b'>', b'<', &buf[start..]) {
            None => {
                self.at = buf.len() as u32;
                return Ok(None);
            }
            Some(n) if buf[start + n] == b'<' => {
                return Err(XmlError::NotWellFormed("'<' in an end tag"));
            }
            Some(n) => start + n,
        };
        let name = buf[self.mark as usize + 2..end].trim_ascii_end();
        if name.iter().any(|b| is_space(*b)) {
            return Err(XmlError::NotWellFormed("white space in an end tag"));
        }
        const MISMATCH: XmlError = XmlError::NotWellFormed("end tag does not match its start tag");
        self.inside = Inside::Text;
        self.at = end as u32 + 1;
        if self.depth == 0 {
            if digest(name) != self.header {
                return Err(MISMATCH);
            }
            self.phase = Phase::Closed;
            return Ok(Some(Some(Frame {
                kind: FrameKind::End,
                len: end + 1,
            })));
        }
        self.depth -= 1;
        if self
            .names
            .get(usize::from(self.depth))
            .is_some_and(|open| *open != digest(name))
        {
            return Err(MISMATCH);
        }
        let complete = self.depth == 0;
        Ok(Some(complete.then_some(Frame {
            kind: FrameKind::Element,
            len: end + 1,
        })))
    }

    /// `<!`: a CDATA section, or something that XMPP forbids.
    fn bang(&mut self, buf: &[u8]) -> Result<Option<()>, XmlError> {
        const CDATA: &[u8] = b"<![CDATA[";
        let seen = &buf[self.mark as usize..];
        match seen.get(2) {
            None => return Ok(None),
            Some(b'-') => return Err(XmlError::Restricted("comment")),
            Some(b'D') => return Err(XmlError::Restricted("document type declaration")),
            // Decided by its first byte, so that it is the same however the rest arrives.
            Some(b'[') if self.depth == 0 => {
                return Err(match self.phase {
                    Phase::Stream => XmlError::BadFormat("text between stanzas"),
                    _ => XmlError::NotWellFormed("text outside of the stream"),
                });
            }
            Some(_) => {}
        }
        let known = seen.len().min(CDATA.len());
        if seen[..known] != CDATA[..known] {
            return Err(XmlError::NotWellFormed("'<!' that begins no markup"));
        }
        if known < CDATA.len() {
            return Ok(None);
        }
        self.at = self.mark + CDATA.len() as u32;
        self.inside = Inside::Cdata;
        Ok(Some(()))
    }

    fn cdata(&mut self, buf: &[u8]) -> Option<()> {
        const OPEN: usize = b"<![CDATA[".len();
        let content = self.mark as usize + OPEN;
        let mut at = self.at as usize;
        while let Some(n) = memchr(b'>', &buf[at..]) {
            let end = at + n;
            at = end + 1;
            if buf[content..end].ends_with(b"]]") {
                self.at = at as u32;
                self.inside = Inside::Text;
                return Some(());
            }
        }
        self.at = buf.len() as u32;
        None
    }

    /// `<?` before the stream: the XML declaration, or a processing instruction.
    fn declaration(&mut self, buf: &[u8]) -> Result<Option<()>, XmlError> {
        const XML: &[u8] = b"<?xml";
        let seen = &buf[self.mark as usize..];
        let known = seen.len().min(XML.len());
        if seen[..known] != XML[..known] || seen.get(XML.len()).is_some_and(|b| !is_space(*b)) {
            return Err(XmlError::Restricted("processing instruction"));
        }
        let start = self.at as usize;
        match memchr2(b'>', b'<', &buf[start..]) {
            None => {
                self.at = buf.len() as u32;
                Ok(None)
            }
            Some(n) if buf[start + n] == b'>' && buf[start + n - 1] == b'?' => {
                self.at = (start + n + 1) as u32;
                self.phase = Phase::Declared;
                self.inside = Inside::Text;
                Ok(Some(()))
            }
            Some(_) => Err(XmlError::NotWellFormed("XML declaration")),
        }
    }
}

enum Between {
    Markup,
    Nothing,
    Whitespace(usize),
}

/// The name in the start tag whose `<` is at `mark`; the tag is complete in `buf`.
#[inline]
fn start_name(buf: &[u8], mark: u32) -> &[u8] {
    let name = &buf[mark as usize + 1..];
    let len = name
        .iter()
        .take_while(|b| !is_space(**b) && **b != b'/' && **b != b'>')
        .count();
    &name[..len]
}

/// One byte that tells most names apart.
#[inline]
fn digest(name: &[u8]) -> u8 {
    name.iter()
        .fold(0_u8, |h, b| h.rotate_left(3).wrapping_add(*b))
}

/// The quotes in a piece of a tag.
struct Quotes {
    any_single: bool,
    any_double: bool,
    odd: bool,
}

impl Quotes {
    /// Without branches, in blocks: vector code.
    #[inline]
    fn count(tag: &[u8]) -> Self {
        const BLOCK: usize = 16;
        let mut single = [0_u8; BLOCK];
        let mut double = [0_u8; BLOCK];
        let mut odd = [0_u8; BLOCK];
        let mut look = |block: &[u8; BLOCK]| {
            for n in 0..BLOCK {
                let s = u8::from(block[n] == b'\'');
                let d = u8::from(block[n] == b'"');
                single[n] |= s;
                double[n] |= d;
                odd[n] ^= s | d;
            }
        };
        let (blocks, rest) = tag.as_chunks::<BLOCK>();
        blocks.iter().for_each(&mut look);
        let mut last = [0; BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        look(&last);
        let any = |lanes: [u8; BLOCK]| u128::from_ne_bytes(lanes) != 0;
        Self {
            any_single: any(single),
            any_double: any(double),
            odd: odd.iter().fold(0, |p, n| p ^ n) != 0,
        }
    }

    fn paired(&self) -> bool {
        !(self.odd || self.any_single && self.any_double)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str =
        "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";

    /// A framer that has seen the header.
    fn in_stream() -> Framer {
        let mut framer = Framer::new();
        let frame = framer.next(HEADER.as_bytes(), &Limits::default());
        assert_eq!(
            frame,
            Ok(Some(Frame {
                kind: FrameKind::Header,
                len: HEADER.len()
            }))
        );
        framer
    }

    /// Feeds everything at once.
    fn frames(framer: &mut Framer, mut input: &[u8]) -> Result<Vec<(FrameKind, String)>, XmlError> {
        let mut out = Vec::new();
        while let Some(frame) = framer.next(input, &Limits::default())? {
            let (head, rest) = input.split_at(frame.len);
            out.push((frame.kind, String::from_utf8_lossy(head).into_owned()));
            input = rest;
        }
        Ok(out)
    }

    fn one(input: &str) -> Result<Option<Frame>, XmlError> {
        in_stream().next(input.as_bytes(), &Limits::default())
    }

    #[test]
    fn a_session_is_cut_into_its_frames() {
        let header = format!("\n<?xml version='1.0'?>\r\n{HEADER}");
        let input = format!("{header}<a/> \n\t<b><c>x</c><b/></b ><d e='1'/></stream:stream>");
        let got = frames(&mut Framer::new(), input.as_bytes()).unwrap();
        let got: Vec<_> = got
            .iter()
            .map(|(kind, text)| (*kind, text.as_str()))
            .collect();
        let expected = [
            (FrameKind::Header, header.as_str()),
            (FrameKind::Element, "<a/>"),
            (FrameKind::Whitespace, " \n\t"),
            (FrameKind::Element, "<b><c>x</c><b/></b >"),
            (FrameKind::Element, "<d e='1'/>"),
            (FrameKind::End, "</stream:stream>"),
        ];
        assert_eq!(got, expected);
    }

    #[test]
    fn quotes_and_cdata_hide_markup() {
        for stanza in [
            r#"<a b='>' c=">"/>"#,
            r#"<a b='/>"' c="'>"></a>"#,
            r#"<a b='"'>"</a>"#,
            r#"<a b="'" c='"' d='>>'>'</a>"#,
            "<a><![CDATA[</a>]] ></a>]]]></a>",
            "<a><![CDATA[]]></a>",
            "<a><![CDATA[>]]></a>",
            "<a><![CDATA[<!-- ]]]]><![CDATA[>]]>]]</a>",
            "<a b='/'></a>",
            "<a b='/'>x</a>",
            "<a b='1'/>",
        ] {
            let frame = one(&format!("{stanza}<next/>")).unwrap();
            assert_eq!(
                frame,
                Some(Frame {
                    kind: FrameKind::Element,
                    len: stanza.len()
                }),
                "{stanza}"
            );
        }
    }

    #[test]
    fn a_restart_expects_a_header_again() {
        let mut framer = in_stream();
        framer.restart();
        let header = format!("<?xml version='1.0'?>{HEADER}");
        let got = frames(&mut framer, format!("{header}<a/>").as_bytes()).unwrap();
        assert_eq!(
            got,
            [
                (FrameKind::Header, header),
                (FrameKind::Element, "<a/>".to_owned())
            ]
        );
    }

    #[test]
    fn incomplete_input_waits() {
        for input in [
            "",
            "<",
            "<a",
            "<a b",
            "<a b='",
            "<a b='>",
            "<a/",
            "<a>",
            "<a></",
            "<a></a",
            "<a><!",
            "<a><![CDA",
            "<a><![CDATA[]]",
            "<a>&",
        ] {
            assert_eq!(one(input), Ok(None), "{input}");
        }
        for input in [
            "",
            " ",
            "<",
            "<?",
            "<?xm",
            "<?xml",
            "<?xml ?",
            "<?xml version='1.0'?>",
            "<stream:stream",
            "<stream:stream a='>'",
        ] {
            assert_eq!(
                Framer::new().next(input.as_bytes(), &Limits::default()),
                Ok(None),
                "{input}"
            );
        }
    }

    #[test]
    fn broken_markup_is_refused_before_the_stanza_ends() {
        for (input, condition) in [
            ("<message><body>hi</message>", "not-well-formed"),
            ("<a><b></c>", "not-well-formed"),
            ("</a>", "not-well-formed"),
            ("<a></ a>", "not-well-formed"),
            ("<a><b></b c>", "not-well-formed"),
            ("<a><b></b</a>", "not-well-formed"),
            ("<a>1 < 2", "not-well-formed"),
            ("<a><>", "not-well-formed"),
            ("<a><1>", "not-well-formed"),
            ("<a/ >", "not-well-formed"),
            ("<a b='<", "not-well-formed"),
            ("<a b=\"<", "not-well-formed"),
            ("<a <b>", "not-well-formed"),
            ("<a b='1\"><c d='", "not-well-formed"),
            ("<a><![cdata[", "not-well-formed"),
            ("<a><!x", "not-well-formed"),
            ("<a><!--", "restricted-xml"),
            ("<!-", "restricted-xml"),
            ("<!DOCTYPE", "restricted-xml"),
            ("<?xml version='1.0'?>", "restricted-xml"),
            ("<a><?php", "restricted-xml"),
            ("hello", "bad-format"),
            ("&amp;", "bad-format"),
            ("<![CDATA[", "bad-format"),
            ("\0", "bad-format"),
        ] {
            assert_eq!(one(input).unwrap_err().condition(), condition, "{input}");
        }
    }

    #[test]
    fn what_is_no_stream_is_refused() {
        for (input, condition) in [
            (&b"GET / HTTP/1.1\r\n"[..], "not-well-formed"),
            (b"\xEF\xBB\xBF<stream:stream>", "not-well-formed"),
            (b"\xFF\xFE<\0", "unsupported-encoding"),
            (b"\xFE\xFF\0<", "unsupported-encoding"),
            (b"\0<\0?", "unsupported-encoding"),
            (b"<\0?\0", "unsupported-encoding"),
            (b"<?php ?>", "restricted-xml"),
            (b"<?xml-stylesheet ?>", "restricted-xml"),
            (
                b"<?xml version='1.0'?><?xml version='1.0'?>",
                "restricted-xml",
            ),
            (b"<?xml version='1.0'>", "not-well-formed"),
            (b"<?xml version='1.0' <", "not-well-formed"),
            (b"<!DOCTYPE a>", "restricted-xml"),
            (b"<!-- -->", "restricted-xml"),
            (b"</stream:stream>", "not-well-formed"),
            (b"<![CDATA[", "not-well-formed"),
            (b"<message/>", "bad-format"),
            (b"\x16\x03\x01", "not-well-formed"),
        ] {
            let got = Framer::new().next(input, &Limits::default()).unwrap_err();
            assert_eq!(
                got.condition(),
                condition,
                "{}",
                String::from_utf8_lossy(input)
            );
        }
    }

    #[test]
    fn nothing_but_white_space_follows_the_end() {
        let mut framer = in_stream();
        assert_eq!(frames(&mut framer, b"</stream:stream>\n").unwrap().len(), 2);
        assert!(framer.next(b"<a/>", &Limits::default()).is_err());
    }

    #[test]
    fn a_stanza_is_refused_at_its_limit_and_not_before() {
        let limits = Limits {
            stanza_bytes_max: 20,
            ..Limits::default()
        };
        let fits = b"<a>4567890123456</a>";
        assert_eq!(
            in_stream().next(fits, &limits),
            Ok(Some(Frame {
                kind: FrameKind::Element,
                len: 20
            }))
        );
        assert_eq!(
            in_stream().next(b"<a>45678901234567</a>", &limits),
            Err(XmlError::TooBig("stanza"))
        );
        for endless in [
            "<aaaaaaaaaaaaaaaaaaaaaaaa",
            "<a bbbbbbbbbbbbbbbbbbbbbbbb",
            "<a b='ccccccccccccccccc",
            "<a b='>>>>>>>>>>>>>>>>>",
            "<a>ttttttttttttttttttttt",
            "<a><![CDATA[>>>>>>>>>>",
            "<a></aaaaaaaaaaaaaaaaaa",
            "<a                    ",
        ] {
            let mut framer = in_stream();
            for len in 1..20 {
                assert_eq!(
                    framer.next(&endless.as_bytes()[..len], &limits),
                    Ok(None),
                    "{endless} {len}"
                );
            }
            assert_eq!(
                framer.next(&endless.as_bytes()[..20], &limits),
                Err(XmlError::TooBig("stanza")),
                "{endless}"
            );
        }
    }

    #[test]
    fn a_header_is_refused_at_its_limit() {
        let limits = Limits {
            header_bytes_max: 20,
            ..Limits::default()
        };
        for endless in [
            "                              ",
            "<?xml version='1.0'                ",
            "<stream:stream a='                  ",
        ] {
            let mut framer = Framer::new();
            assert_eq!(
                framer.next(&endless.as_bytes()[..19], &limits),
                Ok(None),
                "{endless}"
            );
            assert_eq!(
                framer.next(&endless.as_bytes()[..20], &limits),
                Err(XmlError::TooBig("stream header")),
                "{endless}"
            );
        }
    }

    #[test]
    fn depth_is_refused_at_its_limit_also_beyond_the_name_digests() {
        let limits = Limits {
            depth_max: 30,
            ..Limits::default()
        };
        let fits = format!("{}<b/>{}", "<a>".repeat(29), "</a>".repeat(29));
        assert_eq!(
            in_stream()
                .next(fits.as_bytes(), &limits)
                .unwrap()
                .unwrap()
                .len,
            fits.len()
        );
        for deep in ["<a>".repeat(31), "<a>".repeat(30) + "<b/>"] {
            assert_eq!(
                in_stream().next(deep.as_bytes(), &limits),
                Err(XmlError::TooBig("depth"))
            );
        }
    }

    /// Quadratic work would be 10^10 steps here and show as a hanging test.
    #[test]
    fn trickled_bytes_are_scanned_once() {
        const LEN: usize = 150_000;
        for (start, fill) in [
            ("<a>", "x"),
            ("<a>", ">"),
            ("<a b='", "x"),
            ("<a b='", ">"),
            ("<a b='\"", ">"),
            ("<a b='", "\""),
            ("<a><![CDATA[", "x"),
            ("<a><![CDATA[", ">"),
            ("<a><![CDATA[", "]"),
            ("<a", "x"),
            ("<a", " "),
            ("<a", "/"),
            ("<a></a", "x"),
            ("<a></a", " "),
        ] {
            let input = start.to_owned() + &fill.repeat(LEN);
            let mut framer = in_stream();
            for len in 1..=input.len() {
                assert_eq!(
                    framer.next(&input.as_bytes()[..len], &Limits::default()),
                    Ok(None),
                    "{start} {fill}"
                );
            }
        }
    }
}
