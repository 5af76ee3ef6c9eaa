//! What must be true of one account: the answered changes of its roster, private data, vCard, nodes, block list and password.
//!
//! In: changes as they are asked for, and their answers. Out: the values that a later look may find: the last answered one,
//! or any that was asked for behind it (its answer may have been lost with the server).

use std::collections::BTreeMap;

/// A change that was asked for.
#[derive(Debug)]
struct Asked {
    /// `None`: removal.
    value: Option<String>,
    state: State,
}

#[derive(Debug, PartialEq)]
enum State {
    Open,
    Answered,
    Refused,
}

/// Changes by key ("password", "vcard", "roster:JID" …), in the order of asking.
#[derive(Debug, Default)]
pub struct Facts(BTreeMap<String, Vec<Asked>>);

impl Facts {
    /// A change is about to be sent; the number for [`Facts::answered`].
    pub fn ask(&mut self, key: &str, value: Option<String>) -> usize {
        let changes = self.0.entry(key.to_owned()).or_default();
        changes.push(Asked {
            value,
            state: State::Open,
        });
        changes.len() - 1
    }

    /// The server answered by a result (`good`) or an error.
    pub fn answered(&mut self, key: &str, number: usize, good: bool) {
        if let Some(asked) = self.0.get_mut(key).and_then(|list| list.get_mut(number)) {
            asked.state = if good {
                State::Answered
            } else {
                State::Refused
            };
        }
    }

    /// What may be found, the likeliest first. `None`: nothing there.
    pub fn allowed(&self, key: &str) -> Vec<Option<&str>> {
        let mut allowed = Vec::new();
        for asked in self.0.get(key).into_iter().flatten().rev() {
            match asked.state {
                State::Refused => {}
                State::Open => allowed.push(asked.value.as_deref()),
                State::Answered => {
                    allowed.push(asked.value.as_deref());
                    return allowed;
                }
            }
        }
        allowed.push(None);
        allowed
    }

    /// Compares with what was found (password aside, which is not told); a sentence for each difference. What was found is
    /// what must be found from now on.
    pub fn judge(&mut self, found: &BTreeMap<String, String>) -> Vec<String> {
        let mut wrong = Vec::new();
        let keys: Vec<String> = self.0.keys().cloned().collect();
        for key in keys.iter().filter(|key| *key != "password") {
            let value = found.get(key).map(String::as_str);
            let allowed = self.allowed(key);
            if !allowed.contains(&value) {
                wrong.push(format!("{key} is {value:?}, not one of {allowed:?}"));
            }
            self.settle(key, value.map(str::to_owned));
        }
        for (key, value) in found {
            if !self.0.contains_key(key) {
                wrong.push(format!("{key} is '{value}', which nobody asked for"));
                self.settle(key, Some(value.clone()));
            }
        }
        wrong
    }

    /// `value` was seen: earlier changes do not matter any more.
    pub fn settle(&mut self, key: &str, value: Option<String>) {
        let state = State::Answered;
        self.0.insert(key.to_owned(), vec![Asked { value, state }]);
    }
}
