//! Cuts the endless XML stream of a server into its top-level pieces.
//!
//! In: a byte slice that begins where the last piece ended and grows at its end. Out: the stream header, complete
//! stanzas, the stream's end, each as a range of that slice. Nothing is copied and nothing is scanned twice, however
//! the bytes trickle in. It cuts by nesting depth alone and does not validate: judging a server's XML is not a load
//! generator's job, but any legal XML (either quote, prefixes, CDATA, declarations) is cut in the right places.

use memchr::{memchr, memchr3, memmem};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `<stream:stream …>`
    Open,
    /// A complete child of the stream.
    Stanza,
    /// `</stream:stream>`
    Close,
}

/// One piece: `buffer[start..end]`; the next call's buffer begins at `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    pub kind: Kind,
    pub start: usize,
    pub end: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Lexical {
    #[default]
    Text,
    /// After `<`, before it is known what begins.
    Markup,
    Tag {
        quote: Option<u8>,
    },
    ProcessingInstruction,
    Comment,
    CData,
    /// `<!…>` of another kind.
    Declaration,
}

/// Invariant: `buffer[..scanned]` has been looked at and holds no complete piece.
#[derive(Debug, Default)]
pub struct Scanner {
    depth: u32,
    scanned: usize,
    /// Where the piece being collected begins.
    item: usize,
    /// Where the markup being read begins (its `<`).
    markup: usize,
    lexical: Lexical,
}

impl Scanner {
    /// Of whole elements, as if a stream were open.
    pub fn inside() -> Scanner {
        Scanner {
            depth: 1,
            ..Scanner::default()
        }
    }

    /// The next complete piece of `buffer`, or `None` until more bytes are there.
    pub fn next(&mut self, buffer: &[u8]) -> Option<Item> {
        loop {
            match self.lexical {
                Lexical::Text => {
                    let Some(offset) = memchr(b'<', &buffer[self.scanned..]) else {
                        self.scanned = buffer.len();
                        return None;
                    };
                    self.markup = self.scanned + offset;
                    if self.depth <= 1 {
                        self.item = self.markup;
                    }
                    self.scanned = self.markup;
                    self.lexical = Lexical::Markup;
                }
                Lexical::Markup => {
                    self.lexical = markup_kind(&buffer[self.markup..])?;
                    self.scanned = self.markup + 1;
                }
                Lexical::Tag { quote: Some(quote) } => {
                    let Some(offset) = memchr(quote, &buffer[self.scanned..]) else {
                        self.scanned = buffer.len();
                        return None;
                    };
                    self.scanned += offset + 1;
                    self.lexical = Lexical::Tag { quote: None };
                }
                Lexical::Tag { quote: None } => {
                    let Some(offset) = memchr3(b'>', b'"', b'\'', &buffer[self.scanned..]) else {
                        self.scanned = buffer.len();
                        return None;
                    };
                    let at = self.scanned + offset;
                    self.scanned = at + 1;
                    if buffer[at] != b'>' {
                        self.lexical = Lexical::Tag {
                            quote: Some(buffer[at]),
                        };
                        continue;
                    }
                    self.lexical = Lexical::Text;
                    if let Some(kind) =
                        self.tag_ends(buffer[self.markup + 1] == b'/', buffer[at - 1] == b'/')
                    {
                        let item = Item {
                            kind,
                            start: self.item,
                            end: self.scanned,
                        };
                        self.scanned = 0;
                        return Some(item);
                    }
                }
                Lexical::ProcessingInstruction => self.skip_to(buffer, 2, b"?>")?,
                Lexical::Comment => self.skip_to(buffer, 4, b"-->")?,
                Lexical::CData => self.skip_to(buffer, 9, b"]]>")?,
                Lexical::Declaration => self.skip_to(buffer, 2, b">")?,
            }
        }
    }

    /// How many leading bytes of the buffer nobody needs (white space between stanzas): the caller drops them.
    pub fn discard(&mut self) -> usize {
        if self.depth > 1 || self.lexical != Lexical::Text {
            return 0;
        }
        std::mem::take(&mut self.scanned)
    }

    /// A new stream begins with the next byte (after TLS or SASL).
    pub fn restart(&mut self) {
        *self = Scanner::default();
    }

    fn tag_ends(&mut self, closing: bool, empty: bool) -> Option<Kind> {
        if closing {
            self.depth = self.depth.saturating_sub(1);
            return match self.depth {
                0 => Some(Kind::Close),
                1 => Some(Kind::Stanza),
                _ => None,
            };
        }
        if empty {
            return match self.depth {
                0 => Some(Kind::Close),
                1 => Some(Kind::Stanza),
                _ => None,
            };
        }
        self.depth += 1;
        (self.depth == 1).then_some(Kind::Open)
    }

    fn skip_to(&mut self, buffer: &[u8], opening_len: usize, terminator: &[u8]) -> Option<()> {
        let from = self.scanned.max(self.markup + opening_len);
        match memmem::find(&buffer[from..], terminator) {
            Some(offset) => {
                self.scanned = from + offset + terminator.len();
                self.lexical = Lexical::Text;
                Some(())
            }
            None => {
                // The terminator may be cut in the middle: look at its first bytes again.
                self.scanned = from.max((buffer.len() + 1).saturating_sub(terminator.len()));
                None
            }
        }
    }
}

fn markup_kind(markup: &[u8]) -> Option<Lexical> {
    match markup.get(1)? {
        b'?' => Some(Lexical::ProcessingInstruction),
        b'!' => match markup.get(2)? {
            b'[' => (markup.len() >= 9).then_some(Lexical::CData),
            b'-' => (markup.len() >= 4).then_some(Lexical::Comment),
            _ => Some(Lexical::Declaration),
        },
        _ => Some(Lexical::Tag { quote: None }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "<?xml version=\"1.0\" encoding='utf-8'?>\n",
        "<stream:stream id=\"a>b\" xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>",
        "<stream:features><mechanisms xmlns='x'><mechanism>PLAIN</mechanism></mechanisms></stream:features>",
        "  \n",
        "<presence from='a/b' to=\"it's > here\"/>",
        "<message id='1' ><body>a<![CDATA[ </message> ]] > ]]>b &lt;</body><x y='/'></x></message>",
        "<iq type='result'/><!-- never legal, <still> cut --> ",
        "<x:a xmlns:x='y'><x:b/></x:a>",
        "</stream:stream>",
    );

    fn expected() -> Vec<(Kind, &'static str)> {
        let piece = |from: &str, to: &str| {
            let start = STREAM.find(from).unwrap();
            let end = start + STREAM[start..].find(to).unwrap() + to.len();
            &STREAM[start..end]
        };
        vec![
            (Kind::Open, piece("<stream:stream", "streams'>")),
            (
                Kind::Stanza,
                piece("<stream:features", "</stream:features>"),
            ),
            (Kind::Stanza, piece("<presence", "/>")),
            (Kind::Stanza, piece("<message", "</x></message>")),
            (Kind::Stanza, piece("<iq", "/>")),
            (Kind::Stanza, piece("<x:a", "</x:a>")),
            (Kind::Close, "</stream:stream>"),
        ]
    }

    /// Feeds the pieces as a connection does: finished items and discarded bytes are cut off in front.
    fn scan(chunks: &[&[u8]]) -> Vec<(Kind, String)> {
        let (mut scanner, mut buffer, mut found) = (Scanner::default(), Vec::new(), Vec::new());
        for chunk in chunks {
            buffer.extend_from_slice(chunk);
            while let Some(item) = scanner.next(&buffer) {
                found.push((
                    item.kind,
                    String::from_utf8(buffer[item.start..item.end].to_vec()).unwrap(),
                ));
                buffer.drain(..item.end);
            }
            buffer.drain(..scanner.discard());
        }
        found
    }

    fn same(found: Vec<(Kind, String)>, how: &str) {
        let found: Vec<_> = found
            .iter()
            .map(|(kind, text)| (*kind, text.as_str()))
            .collect();
        assert_eq!(found, expected(), "{how}");
    }

    #[test]
    fn splitting_at_every_byte_changes_nothing() {
        let bytes = STREAM.as_bytes();
        same(scan(&[bytes]), "whole");
        for at in 0..=bytes.len() {
            same(
                scan(&[&bytes[..at], &bytes[at..]]),
                &format!("split at {at}"),
            );
        }
        for size in 1..40 {
            same(
                scan(&bytes.chunks(size).collect::<Vec<_>>()),
                &format!("chunks of {size}"),
            );
        }
    }

    #[test]
    fn white_space_between_stanzas_is_discarded() {
        let mut scanner = Scanner::default();
        assert_eq!(scanner.next(b"<s>").unwrap().kind, Kind::Open);
        assert_eq!(scanner.next(b" \n "), None);
        assert_eq!(scanner.discard(), 3);
        assert_eq!(scanner.next(b"<a"), None);
        assert_eq!(scanner.discard(), 0);
        assert_eq!(
            scanner.next(b"<a/>"),
            Some(Item {
                kind: Kind::Stanza,
                start: 0,
                end: 4
            })
        );
    }

    #[test]
    fn a_restart_begins_a_new_stream() {
        let mut scanner = Scanner::default();
        assert_eq!(scanner.next(b"<s>").unwrap().kind, Kind::Open);
        assert_eq!(scanner.next(b"<ok/>").unwrap().kind, Kind::Stanza);
        scanner.restart();
        assert_eq!(scanner.next(b"<s>").unwrap().kind, Kind::Open);
    }
}
