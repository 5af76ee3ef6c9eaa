//! Nicknames (RFC 8266, XEP-0045 section 17.1.2): which are allowed, which are the same, and which look alike.

use precis_profiles::Nickname;
use precis_profiles::precis_core::profile::{PrecisFastInvocation, Rules};
use unicode_security::confusable_detection::skeleton;

/// A nickname as it is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Equal for those that RFC 8266 section 2.4 takes as equal.
    pub fold: Box<str>,
    /// Equal for those that look alike (Unicode TS 39 section 4).
    pub look: Box<str>,
    ascii: bool,
}

impl Key {
    /// `None`: not allowed as a nickname.
    pub fn of(nick: &str) -> Option<Key> {
        let enforced = Nickname::enforce(nick).ok()?;
        let profile = Nickname::default();
        let lower = profile.case_mapping_rule(&*enforced).ok()?;
        let fold = profile.normalization_rule(lower).ok()?;
        let look: String = skeleton(&fold).collect();
        Some(Key {
            look: look.to_lowercase().into(),
            ascii: nick.is_ascii(),
            fold: fold.into(),
        })
    }

    /// May the two not be in one room? Plain letters that are alike in some typefaces (rn, m) are no matter of two alphabets.
    pub fn clashes(&self, other: &Key) -> bool {
        self.fold == other.fold || (self.look == other.look && !(self.ascii && other.ascii))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clash(a: &str, b: &str) -> bool {
        Key::of(a).unwrap().clashes(&Key::of(b).unwrap())
    }

    #[test]
    fn nicks_that_differ_by_case_width_or_spaces_are_the_same() {
        assert!(clash("Alice", "alice"));
        assert!(clash("Alice  Bob", " alice bob "));
        assert!(clash("Ａｌｉｃｅ", "alice"));
        assert!(!clash("Alice", "Bob"));
    }

    #[test]
    fn nicks_that_look_alike_in_two_alphabets_clash() {
        // Cyrillic a, Greek omicron
        assert!(clash("аlice", "alice"));
        assert!(clash("bοb", "bob"));
        assert!(!clash("Bern", "Bem"));
    }

    #[test]
    fn what_is_no_nickname_is_refused() {
        for nick in ["", "  ", "a\u{0}b", "a\nb", "\u{2028}"] {
            assert_eq!(Key::of(nick), None, "{nick:?}");
        }
    }
}
