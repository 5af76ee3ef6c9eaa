//! Is this element the one that the script expects?
//!
//! The order of attributes and of child elements, prefixes and white space between elements do not matter. Wildcards in
//! attribute values and text: `{any}` (anything, but present), `{any?}` (anything, or absent), `{=name}` (anything, kept
//! under that name for later steps). `{...}` as text allows further child elements.
//!
//! What a server may add or leave out by the RFCs is tolerated where the script does not mention it: `xml:lang`, `to`
//! with the client's own address, `from` of the client's own account on an IQ, `type='normal'`, human-readable texts
//! of errors and their `by`, stanza ids (XEP-0359) and the delay stamp of a presence.

use std::collections::BTreeMap;

use super::xml::Element;

pub type Variables = BTreeMap<String, String>;

const STANZA_IDS: &str = "urn:xmpp:sid:0";
const DELAY: &str = "urn:xmpp:delay";
const STANZA_ERRORS: &str = "urn:ietf:params:xml:ns:xmpp-stanzas";
const STREAM_ERRORS: &str = "urn:ietf:params:xml:ns:xmpp-streams";
const SASL: &str = "urn:ietf:params:xml:ns:xmpp-sasl";

/// The addresses of the client that received the element.
pub struct Own<'a> {
    pub full: &'a str,
    pub bare: &'a str,
}

/// Compares, and gives the captured values; the error says what differs.
pub fn matches(expected: &Element, actual: &Element, own: &Own) -> Result<Variables, String> {
    let mut captured = Variables::new();
    element(expected, actual, Some(own), &mut captured)?;
    Ok(captured)
}

fn element(
    expected: &Element,
    actual: &Element,
    own: Option<&Own>,
    captured: &mut Variables,
) -> Result<(), String> {
    if (&expected.namespace, &expected.name) != (&actual.namespace, &actual.name) {
        return Err(format!(
            "expected <{} xmlns='{}'>, got <{} xmlns='{}'>",
            expected.name, expected.namespace, actual.name, actual.namespace
        ));
    }
    attributes(expected, actual, own, captured)?;
    let open = expected.text.contains("{...}");
    let wanted_text = expected.text.replace("{...}", "");
    let both_blank = wanted_text.trim().is_empty() && actual.text.trim().is_empty();
    if !open && !both_blank {
        let wanted = if expected.children.is_empty() {
            wanted_text.as_str()
        } else {
            wanted_text.trim()
        };
        let got = if expected.children.is_empty() {
            actual.text.as_str()
        } else {
            actual.text.trim()
        };
        text(wanted, got, captured).map_err(|why| format!("text of <{}>: {why}", actual.name))?;
    }
    let actual_children: Vec<&Element> = actual
        .children
        .iter()
        .filter(|child| !may_be_added(child, actual, expected))
        .collect();
    children(&expected.children, &actual_children, open, captured)
        .map_err(|why| format!("in <{}>: {why}", actual.name))
}

fn attributes(
    expected: &Element,
    actual: &Element,
    own: Option<&Own>,
    captured: &mut Variables,
) -> Result<(), String> {
    for (name, wanted) in &expected.attributes {
        match actual.attribute(name) {
            Some(value) => text(wanted, value, captured)
                .map_err(|why| format!("{name} of <{}>: {why}", actual.name))?,
            None if wanted == "{any?}" => {}
            None if actual.name == "message" && name == "type" && wanted == "normal" => {}
            None if actual.name == "iq"
                && name == "from"
                && own.is_some_and(|own| own.bare == wanted) => {}
            None => return Err(format!("<{}> has no {name}='{wanted}'", actual.name)),
        }
    }
    for (name, value) in &actual.attributes {
        let tolerated = match name.as_str() {
            "xml:lang" => true,
            "to" => own.is_some_and(|own| value == own.full || value == own.bare),
            "from" => actual.name == "iq" && own.is_some_and(|own| value == own.bare),
            "type" => actual.name == "message" && value == "normal",
            "by" => actual.name == "error",
            _ => false,
        };
        if !tolerated && !expected.attributes.contains_key(name) {
            return Err(format!(
                "<{}> has an unexpected {name}='{value}'",
                actual.name
            ));
        }
    }
    Ok(())
}

/// Children in any order: every expected one meets its own actual one.
fn children(
    expected: &[Element],
    actual: &[&Element],
    open: bool,
    captured: &mut Variables,
) -> Result<(), String> {
    let Some((first, others)) = expected.split_first() else {
        return match actual.first() {
            Some(extra) if !open => Err(format!("unexpected child\n{extra}")),
            _ => Ok(()),
        };
    };
    let mut closest = format!("missing child\n{first}");
    for (place, candidate) in actual.iter().enumerate() {
        let mut attempt = captured.clone();
        match element(first, candidate, None, &mut attempt) {
            Err(why) if candidate.name == first.name => closest = why,
            Err(_) => {}
            Ok(()) => {
                let rest: Vec<&Element> = actual
                    .iter()
                    .enumerate()
                    .filter(|(other, _)| *other != place)
                    .map(|(_, one)| *one)
                    .collect();
                match children(others, &rest, open, &mut attempt) {
                    Ok(()) => {
                        *captured = attempt;
                        return Ok(());
                    }
                    Err(why) => closest = why,
                }
            }
        }
    }
    Err(closest)
}

fn may_be_added(child: &Element, parent: &Element, expected: &Element) -> bool {
    let human = child.name == "text"
        && [STANZA_ERRORS, STREAM_ERRORS, SASL].contains(&child.namespace.as_str());
    let stanza_id = child.namespace == STANZA_IDS && parent.name == "message";
    let stamp = child.namespace == DELAY && parent.name == "presence";
    (human || stanza_id || stamp) && !expected.children.iter().any(|one| one.name == child.name)
}

/// One value with wildcards against one value.
fn text(wanted: &str, got: &str, captured: &mut Variables) -> Result<(), String> {
    glob(wanted, got, captured)
        .then_some(())
        .ok_or_else(|| format!("expected '{wanted}', got '{got}'"))
}

fn glob(wanted: &str, got: &str, captured: &mut Variables) -> bool {
    let Some((before, name, after)) = wildcard(wanted) else {
        return wanted == got;
    };
    let Some(rest) = got.strip_prefix(before) else {
        return false;
    };
    let ends = rest
        .char_indices()
        .map(|(place, _)| place)
        .chain([rest.len()]);
    for end in ends.collect::<Vec<_>>().into_iter().rev() {
        if glob(after, &rest[end..], captured) {
            if let Some(variable) = name.strip_prefix('=') {
                captured.insert(variable.to_owned(), rest[..end].to_owned());
            }
            return true;
        }
    }
    false
}

/// Splits at the first wildcard: what stands before it, its name, what follows.
fn wildcard(wanted: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    while let Some(open) = wanted[from..].find('{') {
        let open = from + open;
        let close = open + wanted[open..].find('}')?;
        let name = &wanted[open + 1..close];
        if name == "any" || name == "any?" || name.starts_with('=') {
            return Some((&wanted[..open], name, &wanted[close + 1..]));
        }
        from = open + 1;
    }
    None
}
