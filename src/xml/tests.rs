//! Properties of the whole of `xml`: random documents, broken documents and noise, judged by an independent parser.
//!
//! In: documents drawn by proptest. Out: a failing case made small. roxmltree is the judge of what is well-formed and of what
//! a document means.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;

const OPEN: &str =
    "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";

/// Frames and, at the end, the error if there is one. Runs of white space count as one, however they were cut.
type Cut = (Vec<(FrameKind, Vec<u8>)>, Option<XmlError>);

/// Feeds `input` as a connection would: each chunk is appended to what is not yet consumed.
fn cut(input: &[u8], chunks: &[usize], limits: &Limits) -> Cut {
    let mut framer = Framer::new();
    let mut out: Vec<(FrameKind, Vec<u8>)> = Vec::new();
    let (mut consumed, mut arrived) = (0, 0);
    let mut chunks = chunks.iter().cycle();
    while arrived < input.len() {
        arrived = (arrived + chunks.next().expect("at least one chunk").max(&1)).min(input.len());
        loop {
            match framer.next(&input[consumed..arrived], limits) {
                Err(e) => return (out, Some(e)),
                Ok(None) => break,
                Ok(Some(frame)) => {
                    assert!(frame.len > 0);
                    let bytes = &input[consumed..consumed + frame.len];
                    match out.last_mut() {
                        Some((FrameKind::Whitespace, run))
                            if frame.kind == FrameKind::Whitespace =>
                        {
                            run.extend(bytes)
                        }
                        _ => out.push((frame.kind, bytes.to_vec())),
                    }
                    consumed += frame.len;
                }
            }
        }
    }
    (out, None)
}

/// `stanza`, read by roxmltree where the stream's namespaces hold.
fn judge(stanza: &str) -> Result<Element, String> {
    let document = line_ends(&format!("{OPEN}{stanza}</stream:stream>"));
    let tree = roxmltree::Document::parse(&document).map_err(|e| e.to_string())?;
    let mut children = tree.root_element().children();
    match (children.next(), children.next()) {
        (Some(node), None) if node.is_element() => Ok(convert(node)),
        _ => Err("not one element".to_owned()),
    }
}

/// XML 1.0 §2.11, done before parsing: roxmltree forgets a carriage return that follows a reference.
fn line_ends(document: &str) -> String {
    document.replace("\r\n", "\n").replace('\r', "\n")
}

fn convert(node: roxmltree::Node<'_, '_>) -> Element {
    let mut out = Element::new(
        node.tag_name().name(),
        node.tag_name().namespace().unwrap_or(""),
    );
    for attr in node.attributes() {
        let key = match attr.namespace() {
            None => attr.name().to_owned(),
            Some(NS_XML) => format!("xml:{}", attr.name()),
            Some(ns) => format!("{{{ns}}}{}", attr.name()),
        };
        out.attrs.push((key, attr.value().to_owned()));
    }
    for child in node.children() {
        out = if child.is_element() {
            out.child(convert(child))
        } else {
            out.text(child.text().unwrap_or(""))
        };
    }
    out
}

fn view(stanza: &[u8]) -> Result<View<'_>, XmlError> {
    View::parse(stanza, &StreamNs::client(), &Limits::default())
}

/// All that must hold of a stanza that the view accepts.
fn check_accepted(v: &View<'_>) {
    if v.raw().contains(":xmlns") {
        return; // roxmltree takes `p:xmlns` for a declaration, which it is not
    }
    let element = v.to_element();
    let judged = judge(v.raw()).unwrap_or_else(|e| panic!("accepted, but {e}: {:?}", v.raw()));
    assert_eq!(element, judged, "{:?}", v.raw());

    assert_eq!(
        (v.name(), v.ns()),
        (element.name.as_str(), element.ns.as_str())
    );
    for (key, value) in element
        .attrs
        .iter()
        .filter(|(key, _)| !key.starts_with('{'))
    {
        assert_eq!(v.attr(key).as_deref(), Some(value.as_str()));
    }
    assert_eq!(v.attrs().count(), element.attrs.len());
    assert_eq!(v.children().len(), element.elements().count());
    for (child, e) in v.children().iter().zip(element.elements()) {
        assert_eq!(
            (child.name, &*child.ns, &*child.text()),
            (e.name.as_str(), e.ns.as_str(), e.text_content().as_str())
        );
        for (key, value) in e.attrs.iter().filter(|(key, _)| !key.starts_with('{')) {
            assert_eq!(child.attr(key).as_deref(), Some(value.as_str()));
        }
    }
    if v.standalone() {
        // On a stream that declares nothing but the default namespace, between tags of the server's own making.
        let forwarded = format!(
            "<stream xmlns='jabber:client'><message>{}</message></stream>",
            line_ends(v.inner())
        );
        let tree = roxmltree::Document::parse(&forwarded)
            .unwrap_or_else(|e| panic!("stands alone, but {e}: {:?}", v.raw()));
        let message = tree
            .root_element()
            .first_element_child()
            .expect("the message");
        assert_eq!(convert(message).children, element.children, "{:?}", v.raw());
    }
    let written = element.to_xml(NS_CLIENT);
    assert_eq!(judge(&written).as_ref(), Ok(&element), "{written}");
    assert_eq!(
        Element::parse_in(written.as_bytes(), &StreamNs::client(), &Limits::default()).as_ref(),
        Ok(&element)
    );
}

/// Characters that want care, and some that do not.
fn text() -> impl Strategy<Value = String> {
    vec(
        select(
            "ab<>&'\"]\r\n\t é日😀\u{7F}\u{FFFD}\u{2028}[;#!/?=:"
                .chars()
                .collect::<Vec<_>>(),
        ),
        1..12,
    )
    .prop_map(|chars| chars.into_iter().collect())
}

fn name() -> impl Strategy<Value = &'static str> {
    select(&["a", "b", "body", "x-y", "_", "é", "a.1", "message"][..])
}

fn namespace() -> impl Strategy<Value = &'static str> {
    select(&["", "jabber:client", "urn:a", "urn:b&'<", NS_STREAMS][..])
}

/// Owned trees with all that [`Element`] can hold.
fn element() -> impl Strategy<Value = Element> {
    let key = prop_oneof![
        name().prop_map(str::to_owned),
        Just("xml:lang".to_owned()),
        (select(&["urn:a", "urn:b"][..]), name())
            .prop_map(|(ns, local)| format!("{{{ns}}}{local}")),
    ];
    let leaf = (name(), namespace(), vec((key, text()), 0..4)).prop_map(|(name, ns, attrs)| {
        attrs
            .into_iter()
            .fold(Element::new(name, ns), |e, (key, value)| {
                e.attr(&key, value)
            })
    });
    leaf.prop_recursive(4, 24, 4, |inner| {
        let node = prop_oneof![
            inner.clone().prop_map(Node::Element),
            text().prop_map(Node::Text)
        ];
        (inner, vec(node, 0..5)).prop_map(|(top, nodes)| {
            nodes.into_iter().fold(top, |e, node| match node {
                Node::Element(child) => e.child(child),
                Node::Text(t) => e.text(t),
            })
        })
    })
}

/// Stanzas in all the ways one may write them: prefixes from everywhere, both quotes, CDATA, references, odd white space.
fn written() -> impl Strategy<Value = String> {
    let value = select(
        &[
            "'1'",
            "\"2\"",
            "'a\"b'",
            "\"it's\"",
            "'>'",
            "'/>'",
            "'&amp;&#10;'",
            "\"]]>\"",
            "''",
            "'\n\t'",
            "'é'",
        ][..],
    );
    let space = select(&[" ", "\n", "  ", "\r\n\t"][..]);
    let attr = (
        space.clone(),
        select(&["x", "y", "stream:x", "xml:lang", "p:x", "q:x", "é"][..]),
        select(&["=", " = "][..]),
        value,
    )
        .prop_map(|(space, name, equals, value)| (name, format!("{space}{name}{equals}{value}")));
    let declarations = select(
        &[
            "",
            " xmlns='urn:d'",
            " xmlns=''",
            " xmlns:p='urn:p'",
            " xmlns:q=\"urn:q\"",
            " xmlns:p='urn:pp' xmlns='jabber:client'",
            " xmlns:p='urn:&#112;'",
        ][..],
    );
    // The top element declares p and q half of the time, so that most documents are well-formed and some are not.
    let tag = (
        select(&["a", "b", "p:a", "q:b", "stream:c", "é"][..]),
        declarations,
        vec(attr, 0..3),
        select(&["", " ", "\n"][..]),
    )
        .prop_map(|(name, declarations, mut attrs, space)| {
            attrs.sort();
            attrs.dedup_by_key(|(name, _)| *name);
            let attrs: String = attrs.into_iter().map(|(_, text)| text).collect();
            (name, format!("<{name}{declarations}{attrs}{space}"), space)
        });
    let leaf = tag.clone().prop_map(|(_, open, _)| format!("{open}/>"));
    let text = select(
        &[
            "x",
            "1 &lt; 2",
            "&#x1F600;",
            "<![CDATA[<b>&]]>",
            "<![CDATA[]]]]>",
            "\r\n",
            "> ] ]]",
            "é日",
            " ",
            "'",
            "\"",
            "]",
        ][..],
    );
    let inner = leaf.prop_recursive(4, 24, 4, move |inner| {
        let node = prop_oneof![inner, text.clone().prop_map(str::to_owned)];
        (tag.clone(), vec(node, 0..4)).prop_map(|((name, open, space), nodes)| {
            format!("{open}>{}</{name}{space}>", nodes.concat())
        })
    });
    (any::<bool>(), vec(inner, 0..3)).prop_map(|(declare, children)| {
        let declared = if declare {
            " xmlns:p='urn:p' xmlns:q='urn:q'"
        } else {
            ""
        };
        format!("<message to='b'{declared}>{}</message>", children.concat())
    })
}

/// Pieces that turn a document into something nearly like it.
#[rustfmt::skip]
static FRAGMENTS: &[&[u8]] = &[
    b"<", b">", b"/", b"/>", b"</", b"'", b"\"", b"&", b";", b"=", b" ", b"]]>", b"<![CDATA[", b"<!--", b"-->", b"<?", b"?>",
    b"<!DOCTYPE a>", b"&#0;", b"&#xFFFF;", b"&nbsp;", b"&amp;", b"xmlns='u'", b" xmlns:p='urn:q'", b" xmlns:p=''", b" xmlns:xml='u'",
    b":", b"p:", b"z:", b"\0", b"\x1F", b"\xFF", b"\xC3", b"\xEF\xBF\xBF", b"\xED\xA0\x80", b"\xC3\x97", b"\xF0\x9F\x98\x80",
    b"a", b"1", b"-", b"!", b"\r", b"</a>", b"<a>", b" x='1'", b" x=''x=''", b"", b"",
];

fn fragment() -> impl Strategy<Value = &'static [u8]> {
    select(FRAGMENTS)
}

/// A document with some bytes replaced.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    (
        written(),
        vec((any::<Index>(), 0..4_usize, fragment()), 1..4),
    )
        .prop_map(|(document, edits)| {
            let mut bytes = document.into_bytes();
            for (at, remove, insert) in edits {
                let at = at.index(bytes.len() + 1);
                let end = (at + remove).min(bytes.len());
                bytes.splice(at..end, insert.iter().copied());
            }
            bytes
        })
}

/// Noise that looks like XML, and noise.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        vec(fragment(), 0..40).prop_map(|parts| parts.concat()),
        vec(any::<u8>(), 0..200),
    ]
}

/// A smoke test by default, a fuzzer with a large `PROPTEST_CASES`.
fn config() -> ProptestConfig {
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() {
        ProptestConfig::default().cases
    } else {
        1500
    };
    ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn how_the_input_is_split_never_changes_the_frames(
        stanzas in vec(prop_oneof![4 => written().prop_map(String::into_bytes), 1 => mutated(), 1 => Just(b" \n".to_vec())], 0..5),
        chunks in vec(1..60_usize, 1..8),
        stanza_bytes_max in select(&[100_usize, 300, 256 * 1024][..]),
    ) {
        let limits = Limits { stanza_bytes_max, ..Limits::default() };
        let input = [b"<?xml version='1.0'?>\n", OPEN.as_bytes(), &stanzas.concat(), b"</stream:stream>"].concat();
        let whole = cut(&input, &[input.len()], &limits);
        prop_assert_eq!(&cut(&input, &chunks, &limits), &whole);
        prop_assert_eq!(&cut(&input, &[1], &limits), &whole);
    }

    #[test]
    fn well_formed_stanzas_are_framed_whole_and_accepted(stanzas in vec(written(), 1..4)) {
        let good: Vec<String> = stanzas.into_iter().filter(|s| judge(s).is_ok()).collect();
        let input = OPEN.to_owned() + &good.concat();
        let (frames, error) = cut(input.as_bytes(), &[input.len()], &Limits::default());
        prop_assert_eq!(error, None);
        let elements: Vec<_> = frames.iter().skip(1).map(|(_, bytes)| String::from_utf8_lossy(bytes).into_owned()).collect();
        prop_assert_eq!(&elements, &good);
        for stanza in &good {
            let v = view(stanza.as_bytes());
            prop_assert!(v.is_ok(), "{:?}: {}", v, stanza);
            check_accepted(&v.unwrap());
        }
    }

    #[test]
    fn what_is_accepted_is_well_formed_and_means_the_same_to_others(stanza in prop_oneof![mutated(), written().prop_map(String::into_bytes)]) {
        if let Ok(v) = view(&stanza) {
            check_accepted(&v);
        }
    }

    #[test]
    fn noise_never_panics_and_is_well_formed_if_accepted(bytes in noise(), chunks in vec(1..9_usize, 1..4)) {
        let _ = StreamHeader::parse(&bytes);
        let _ = StreamHeader::parse(&[OPEN.as_bytes(), &bytes].concat());
        let _ = Element::parse(&String::from_utf8_lossy(&bytes));
        if let Ok(v) = view(&bytes) {
            check_accepted(&v);
        }
        cut(&bytes, &chunks, &Limits::default());
        let input = [OPEN.as_bytes(), b"<a>", &bytes, b"</a>"].concat();
        let (frames, _) = cut(&input, &chunks, &Limits::default());
        for (_, bytes) in frames.iter().filter(|(kind, _)| *kind == FrameKind::Element) {
            if let Ok(v) = view(bytes) {
                check_accepted(&v);
            }
        }
    }

    #[test]
    fn elements_survive_being_written_and_parsed(e in element(), parent in namespace()) {
        let xml = e.to_xml(parent);
        let stream = StreamNs { default: parent.into(), prefixes: Box::default() };
        let parsed = Element::parse_in(xml.as_bytes(), &stream, &Limits::default());
        prop_assert_eq!(parsed, Ok(e.clone()), "{}", xml);
        let wrapped = Element::new("w", parent).child(e);
        prop_assert_eq!(Element::parse(&wrapped.to_xml("")), Ok(wrapped));
    }

    #[test]
    fn text_survives_being_escaped(s in text()) {
        let (mut as_text, mut as_attr) = (Vec::new(), Vec::new());
        escape_text(&s, &mut as_text);
        escape_attr(&s, &mut as_attr);
        prop_assert_eq!(unescape(std::str::from_utf8(&as_text).unwrap()).unwrap(), s.as_str());
        prop_assert_eq!(escape::unescape_attr(std::str::from_utf8(&as_attr).unwrap()).unwrap(), s.as_str());
    }
}
