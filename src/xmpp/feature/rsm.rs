//! Result set management (XEP-0059): one page of a long answer, and where in the whole it lies.
//!
//! In: the `<set/>` of a request. Out: the page that is wanted, and the `<set/>` of the answer. Ids stay what they are, text
//! that only the feature behind understands.

use super::{Feature, NONE};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;

pub const NS: &str = "http://jabber.org/protocol/rsm";

pub static FEATURE: Feature = Feature {
    name: "Result sets, page by page",
    spec: "XEP-0059",
    version: "1.0",
    account: &[NS],
    ..NONE
};

/// The page that a client wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// At most so many; `None`: it does not say. 0: only the count.
    pub max: Option<u64>,
    /// Only what comes behind this one.
    pub after: Option<String>,
    /// Only what comes before this one.
    pub before: Option<String>,
    /// The last ones that fit (section 2.3, 2.5), not the first.
    pub backwards: bool,
}

impl Wanted {
    /// Reads the `<set/>` among the children of a request; without one, nothing in particular is wanted.
    pub fn of(request: &Element) -> Result<Wanted, StanzaError> {
        let mut wanted = Wanted::default();
        let Some(set) = request.find("set", NS) else {
            return Ok(wanted);
        };
        // an empty <after/> says what no <after/> says
        let id = |element: &Element| Some(element.text_content()).filter(|id| !id.is_empty());
        for element in set.elements().filter(|e| e.ns == NS) {
            match &*element.name {
                "max" => wanted.max = Some(number(&element.text_content())?),
                "after" => wanted.after = id(element),
                "before" => {
                    wanted.before = id(element);
                    wanted.backwards = true;
                }
                // section 2.6: what would have to be counted off from the begin
                "index" => return Err(StanzaError::FEATURE_NOT_IMPLEMENTED),
                _ => {}
            }
        }
        Ok(wanted)
    }
}

/// `xs:int`, not negative; more than fits is as good as the most.
fn number(text: &str) -> Result<u64, StanzaError> {
    let text = text.trim_matches([' ', '\t', '\r', '\n']);
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(StanzaError::BAD_REQUEST);
    }
    Ok(text.parse().unwrap_or(u64::MAX))
}

/// The page that a client gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// Ids of the first and the last one; `None`: the page is empty.
    pub ends: Option<(String, String)>,
    /// How many come before the first one, in the whole result.
    pub index: Option<u64>,
    /// How many the whole result has.
    pub count: Option<u64>,
}

impl Shown {
    pub fn element(self) -> Element {
        let mut set = Element::new("set", NS);
        if let Some((first, last)) = self.ends {
            let mut element = Element::new("first", NS).text(first);
            if let Some(index) = self.index {
                element.set("index", index.to_string());
            }
            set = set
                .child(element)
                .child(Element::new("last", NS).text(last));
        }
        match self.count {
            Some(count) => set.child(Element::new("count", NS).text(count.to_string())),
            None => set,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(inner: &str) -> Result<Wanted, StanzaError> {
        let request = format!("<query xmlns='urn:a'><set xmlns='{NS}'>{inner}</set></query>");
        Wanted::of(&Element::parse(&request).unwrap())
    }

    #[test]
    fn requests_say_which_page_is_wanted() {
        let any = Wanted::default();
        assert_eq!(Wanted::of(&Element::new("query", "urn:a")), Ok(any.clone()));
        assert_eq!(wanted(""), Ok(any.clone()));
        let ten = Wanted {
            max: Some(10),
            ..any.clone()
        };
        assert_eq!(wanted("<max> 10\n</max><other/>"), Ok(ten.clone()));
        assert_eq!(wanted("<max>10</max><max xmlns='urn:b'>x</max>"), Ok(ten));
        let after = Wanted {
            after: Some("a b".into()),
            ..any.clone()
        };
        assert_eq!(wanted("<after>a b</after>"), Ok(after));
        assert_eq!(wanted("<after/>"), Ok(any.clone()));
        let last = Wanted {
            backwards: true,
            ..any.clone()
        };
        assert_eq!(wanted("<before/>"), Ok(last.clone()));
        let before = Wanted {
            before: Some("x".into()),
            ..last
        };
        assert_eq!(wanted("<before>x</before>"), Ok(before));
        let huge = wanted(&format!("<max>{}</max>", "9".repeat(50))).unwrap();
        assert_eq!(huge.max, Some(u64::MAX));
    }

    #[test]
    fn what_cannot_be_a_page_is_refused() {
        for max in ["", "-1", "+1", "1.5", "ten", "1 0", "٣"] {
            let refused = wanted(&format!("<max>{max}</max>"));
            assert_eq!(refused, Err(StanzaError::BAD_REQUEST), "{max}");
        }
        let refused = wanted("<max>10</max><index>371</index>");
        assert_eq!(refused, Err(StanzaError::FEATURE_NOT_IMPLEMENTED));
    }

    #[test]
    fn answers_say_what_is_known_of_the_page() {
        let shown = Shown {
            ends: Some(("a".into(), "<b>".into())),
            index: Some(0),
            count: Some(800),
        };
        assert_eq!(
            shown.element().to_xml(""),
            "<set xmlns='http://jabber.org/protocol/rsm'><first index='0'>a</first><last>&lt;b&gt;</last>\
             <count>800</count></set>"
        );
        let empty = Shown {
            count: Some(790),
            index: Some(3),
            ..Shown::default()
        };
        assert_eq!(
            empty.element().to_xml(NS),
            "<set><count>790</count></set>",
            "an empty page has no ends"
        );
    }
}
