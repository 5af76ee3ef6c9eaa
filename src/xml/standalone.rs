//! Elements that leave their stream. In: top-level elements and stream headers as this server writes them for a client's stream.
//! Out: the declaration that an element needs where no stream header stands above it: over WebSocket (RFC 7395 section 3.3.3) and in a
//! body of BOSH (XEP-0124 section 15). Promise: linear in the start tag, nothing is copied.

use super::is_space;

/// Where a declaration has to be inserted, and which, so that the element stands alone. `None`: it does.
///
/// `element` is well-formed, uses the default namespace `jabber:client` and the prefix `stream` as the server's header declares them, and no
/// other prefix of a header.
pub fn missing_declaration(element: &[u8]) -> Option<(usize, &'static str)> {
    let mut tag = Attributes::of(element);
    let at = tag.at;
    let name = &element[1..at];
    let (wanted, text): (&[u8], _) = match name.strip_prefix(b"stream:") {
        Some(_) => (
            b"xmlns:stream",
            " xmlns:stream='http://etherx.jabber.org/streams'",
        ),
        None if name.contains(&b':') => return None,
        None => (b"xmlns", " xmlns='jabber:client'"),
    };
    match tag.any(|(name, _)| name == wanted) {
        true => None,
        false => Some((at, text)),
    }
}

/// The attributes of a start tag, as they are written: name, and the whole of ` name='value'`.
pub struct Attributes<'a> {
    tag: &'a [u8],
    at: usize,
}

impl<'a> Attributes<'a> {
    /// `element` begins with a complete start tag.
    pub fn of(element: &'a [u8]) -> Attributes<'a> {
        let name = |b: &u8| !is_space(*b) && !matches!(*b, b'/' | b'>');
        let len = element.iter().skip(1).take_while(|b| name(b)).count();
        Attributes {
            tag: element,
            at: (1 + len).min(element.len()),
        }
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = &self.tag[self.at..];
        let space = rest.iter().take_while(|b| is_space(**b)).count();
        if matches!(rest.get(space), None | Some(b'/' | b'>')) {
            return None;
        }
        let equals = space + memchr::memchr(b'=', &rest[space..])?;
        let quote = equals + 1 + memchr::memchr2(b'\'', b'"', &rest[equals + 1..])?;
        let end = quote + 1 + memchr::memchr(rest[quote], &rest[quote + 1..])?;
        self.at += end + 1;
        Some((rest[space..equals].trim_ascii_end(), &rest[..=end]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone(element: &str) -> String {
        match missing_declaration(element.as_bytes()) {
            None => element.to_owned(),
            Some((at, text)) => format!("{}{text}{}", &element[..at], &element[at..]),
        }
    }

    #[test]
    fn an_element_of_the_stream_gets_the_namespace_that_its_header_declared() {
        assert_eq!(alone("<message/>"), "<message xmlns='jabber:client'/>");
        assert_eq!(
            alone("<iq id=' xmlns=\"x\"' xmlns:a='b'><q xmlns='c'/></iq>"),
            "<iq xmlns='jabber:client' id=' xmlns=\"x\"' xmlns:a='b'><q xmlns='c'/></iq>"
        );
        assert_eq!(
            alone("<stream:error><x xmlns='y'/></stream:error>"),
            "<stream:error xmlns:stream='http://etherx.jabber.org/streams'><x xmlns='y'/></stream:error>"
        );
    }

    #[test]
    fn what_stands_alone_stays_as_it_is() {
        for element in [
            "<r xmlns='urn:xmpp:sm:3'/>",
            "<message id='>' xmlns = \"jabber:client\" to='x'>xmlns</message>",
            "<stream:features xmlns:stream='http://etherx.jabber.org/streams'/>",
        ] {
            assert_eq!(alone(element), element);
        }
    }
}
