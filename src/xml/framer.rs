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
            names: [0; NAMES],
        }
    }

    /// After STARTTLS or SASL: a new stream header is expected (RFC 6120 §5.4.3.3 and §6.4.6).
    pub fn restart(&mut self) {
        *self = Self::new();
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
            Some(_) => {}
        }
        let known = seen.len().min(CDATA.len());
        if seen[..known] != CDATA[..known] {
            return Err(XmlError::NotWellFormed("'<!' that begins no markup"));
        }
        if self.depth == 0 {
            return Err(match self.phase {
                Phase::Stream => XmlError::BadFormat("text between stanzas"),
                _ => XmlError::NotWellFormed("text outside of the stream"),
            });
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
        !self.odd && !(self.any_single && self.any_double)
    }
}
