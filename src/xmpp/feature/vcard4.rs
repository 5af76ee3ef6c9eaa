//! vCard4 (XEP-0292) in a node that everybody may read, and its bridge to vcard-temp (XEP-0054).
//!
//! Whoever writes one writes both, in one step: the other form gets what it can say. A vCard4 that its user keeps from strangers
//! (another access model than `open`) does not go into the vcard-temp, which has none, and is left alone when that is set: what it says is
//! more than what an old client knows of. Photos are [`super::avatar`]'s.

use super::{Feature, NONE, NodeRule, vcard};
use crate::xml::dom::Element;
use crate::xmpp::pubsub::config::{Access, Config};
use crate::xmpp::pubsub::edit::Op;
use crate::xmpp::pubsub::nodes::{Node, Nodes};

pub const NODE: &str = "urn:xmpp:vcard4";
pub const NS: &str = "urn:ietf:params:xml:ns:vcard-4.0";

pub static FEATURE: Feature = Feature {
    name: "vCard4",
    spec: "XEP-0292",
    version: "0.12.0",
    nodes: &[NodeRule {
        name: NODE,
        config: Config::public,
    }],
    ..NONE
};

/// Fields of one text: vcard-temp, vCard4, what the value lies in there.
const SIMPLE: &[(&str, &str, &str)] = &[
    ("FN", "fn", "text"),
    ("NICKNAME", "nickname", "text"),
    ("BDAY", "bday", "date"),
    ("TITLE", "title", "text"),
    ("ROLE", "role", "text"),
    ("URL", "url", "uri"),
    ("DESC", "note", "text"),
];

/// Fields of parts.
const NAME: &[(&str, &str)] = &[
    ("FAMILY", "surname"),
    ("GIVEN", "given"),
    ("MIDDLE", "additional"),
    ("PREFIX", "prefix"),
    ("SUFFIX", "suffix"),
];
const ADDRESS: &[(&str, &str)] = &[
    ("POBOX", "pobox"),
    ("EXTADD", "ext"),
    ("STREET", "street"),
    ("LOCALITY", "locality"),
    ("REGION", "region"),
    ("PCODE", "code"),
    ("CTRY", "country"),
];

/// Empty elements of vcard-temp, values of `type` in vCard4.
const TYPES: &[(&str, &str)] = &[
    ("HOME", "home"),
    ("WORK", "work"),
    ("VOICE", "voice"),
    ("FAX", "fax"),
    ("CELL", "cell"),
    ("VIDEO", "video"),
    ("PAGER", "pager"),
];

/// What is written together with a change of a node: the vcard-temp, if it is a vCard4 for everybody.
pub fn goes_with(nodes: &Nodes, node: &str, op: &Op) -> Vec<(String, Vec<u8>)> {
    let Op::Publish {
        payload,
        options,
        config,
        ..
    } = op
    else {
        return Vec::new();
    };
    if node != NODE {
        return Vec::new();
    }
    let config = match (nodes.get(NODE), options) {
        (Some(node), _) => node.config.clone(),
        (None, Some(options)) => config.with(options).unwrap_or_else(|_| Config::private()),
        (None, None) => config.clone(),
    };
    let card = std::str::from_utf8(payload).ok();
    let card = card.and_then(|text| Element::parse(text).ok());
    match card.filter(|card| card.is("vcard", NS) && config.access == Access::Open) {
        Some(card) => {
            let mut bytes = Vec::new();
            to_temp(&card).write(&mut bytes, "");
            vec![(vcard::KEY.to_owned(), bytes)]
        }
        None => Vec::new(),
    }
}

/// The publication that goes with a vcard-temp; none into a node that its owner has closed.
pub fn of_card(nodes: &Nodes, card: &Element) -> Option<(String, Op)> {
    let closed = |node: &Node| node.config.access != Access::Open;
    if nodes.get(NODE).is_some_and(closed) {
        return None;
    }
    let mut payload = Vec::new();
    from_temp(card).write(&mut payload, "");
    let op = Op::Publish {
        id: "current".to_owned(),
        payload,
        options: None,
        config: Config::public(),
    };
    Some((NODE.to_owned(), op))
}

fn temp(name: &str) -> Element {
    Element::new(name, vcard::NS)
}

fn four(name: &str) -> Element {
    Element::new(name, NS)
}

fn texts(of: &Element, name: &str) -> Vec<String> {
    let found = of.elements().filter(|e| e.name == name);
    let texts = found.map(|e| e.text_content().trim().to_owned());
    texts.filter(|text| !text.is_empty()).collect()
}

fn from_temp(card: &Element) -> Element {
    let mut out = four("vcard");
    for field in card.elements().filter(|e| e.ns == vcard::NS) {
        let simple = SIMPLE.iter().find(|(name, _, _)| *name == field.name);
        let types = || {
            let types = TYPES
                .iter()
                .filter(|(name, _)| field.find(name, vcard::NS).is_some());
            let mut types = types
                .map(|(_, typ)| four("type").child(four("text").text(*typ)))
                .peekable();
            types.peek().is_some().then(|| {
                let texts = types.fold(four("type"), |all, one| {
                    one.elements()
                        .fold(all, |all, text| all.child(text.clone()))
                });
                four("parameters").child(texts)
            })
        };
        let parts = |name: &str, table: &[(&str, &str)]| {
            let mut element = types().into_iter().fold(four(name), Element::child);
            for (old, new) in table {
                for text in texts(field, old) {
                    element = element.child(four(new).text(text));
                }
            }
            element
        };
        let typed = |name: &str, value: Element| {
            types()
                .into_iter()
                .fold(four(name), Element::child)
                .child(value)
        };
        let made = match &*field.name {
            _ if simple.is_some() => {
                let Some((_, name, value)) = simple else {
                    continue;
                };
                let text = field.text_content();
                if text.trim().is_empty() {
                    continue;
                }
                four(name).child(four(value).text(text.trim()))
            }
            "N" => parts("n", NAME),
            "ADR" => parts("adr", ADDRESS),
            "TEL" => match &texts(field, "NUMBER")[..] {
                [number, ..] => typed("tel", four("text").text(number.as_str())),
                [] => continue,
            },
            "EMAIL" => match &texts(field, "USERID")[..] {
                [address, ..] => typed("email", four("text").text(address.as_str())),
                [] => continue,
            },
            "JABBERID" => four("impp")
                .child(four("uri").text(format!("xmpp:{}", field.text_content().trim()))),
            "ORG" => {
                let names = ["ORGNAME", "ORGUNIT"]
                    .map(|name| texts(field, name))
                    .concat();
                names
                    .into_iter()
                    .fold(four("org"), |org, name| org.child(four("text").text(name)))
            }
            "CATEGORIES" => texts(field, "KEYWORD")
                .into_iter()
                .fold(four("categories"), |all, word| {
                    all.child(four("text").text(word))
                }),
            _ => continue,
        };
        out = out.child(made);
    }
    out
}

fn to_temp(card: &Element) -> Element {
    let mut out = temp("vCard");
    for field in card.elements().filter(|e| e.ns == NS) {
        let types = || {
            let given: Vec<String> = field
                .find("parameters", NS)
                .and_then(|p| p.find("type", NS))
                .map(|typ| texts(typ, "text"))
                .unwrap_or_default();
            TYPES
                .iter()
                .filter(move |(_, typ)| given.iter().any(|one| one == typ))
                .map(|(name, _)| temp(name))
        };
        let value = || {
            ["text", "uri", "date"]
                .iter()
                .find_map(|name| texts(field, name).into_iter().next())
        };
        let simple = SIMPLE.iter().find(|(_, name, _)| *name == field.name);
        let parts = |name: &str, table: &[(&str, &str)]| {
            let mut element = types().fold(temp(name), Element::child);
            for (old, new) in table {
                for text in texts(field, new) {
                    element = element.child(temp(old).text(text));
                }
            }
            element
        };
        let made = match (&*field.name, simple) {
            (_, Some((name, _, _))) => match value() {
                Some(text) => temp(name).text(text),
                None => continue,
            },
            ("n", _) => parts("N", NAME),
            ("adr", _) => parts("ADR", ADDRESS),
            ("tel", _) => match value() {
                Some(number) => types()
                    .fold(temp("TEL"), Element::child)
                    .child(temp("NUMBER").text(number.trim_start_matches("tel:"))),
                None => continue,
            },
            ("email", _) => match value() {
                Some(address) => types()
                    .fold(temp("EMAIL"), Element::child)
                    .child(temp("INTERNET"))
                    .child(temp("USERID").text(address.trim_start_matches("mailto:"))),
                None => continue,
            },
            ("impp", _) => match value().as_deref().and_then(|uri| uri.strip_prefix("xmpp:")) {
                Some(jid) => temp("JABBERID").text(jid),
                None => continue,
            },
            ("org", _) => {
                let mut names = texts(field, "text").into_iter();
                let org = names.next().into_iter().fold(temp("ORG"), |org, name| {
                    org.child(temp("ORGNAME").text(name))
                });
                names.fold(org, |org, name| org.child(temp("ORGUNIT").text(name)))
            }
            ("categories", _) => texts(field, "text")
                .into_iter()
                .fold(temp("CATEGORIES"), |all, word| {
                    all.child(temp("KEYWORD").text(word))
                }),
            _ => continue,
        };
        out = out.child(made);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_forms_can_say_survives_the_way_there_and_back() {
        let card = "<vCard xmlns='vcard-temp'><FN>Alice &amp; Co</FN><N><FAMILY>L</FAMILY><GIVEN>A</GIVEN></N><NICKNAME>al</NICKNAME>\
            <BDAY>1990-01-02</BDAY><ADR><WORK/><STREET>1 Lane</STREET><LOCALITY>London</LOCALITY><CTRY>UK</CTRY></ADR>\
            <TEL><WORK/><VOICE/><NUMBER>+44 1</NUMBER></TEL><EMAIL><WORK/><INTERNET/><USERID>a@example.com</USERID></EMAIL>\
            <JABBERID>a@example.org</JABBERID><ORG><ORGNAME>Bank</ORGNAME><ORGUNIT>FX</ORGUNIT></ORG><TITLE>T</TITLE>\
            <ROLE>R</ROLE><URL>https://example.com/</URL><DESC>about</DESC></vCard>";
        let card = Element::parse(card).unwrap();
        let four = from_temp(&card);
        assert_eq!(
            four.find("fn", NS)
                .unwrap()
                .find("text", NS)
                .unwrap()
                .text_content(),
            "Alice & Co"
        );
        assert_eq!(to_temp(&four), card);
    }
}
