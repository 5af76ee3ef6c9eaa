//! Preferences of archiving (XEP-0441): with whom a user wants messages in his archive.
//!
//! In: requests of the user's own clients. Out: his preferences, as they are applied. They are a part of his record, so they
//! are known wherever he is, and a change is answered when it is durable. What follows from them is decided in
//! [`storing`](crate::xmpp::storing).

use rkyv::string::ArchivedString;
use rkyv::vec::ArchivedVec;

use super::{Feature, Iq, IqRoute, NONE, Target, archive};
use crate::store::record::{ArchiveDefault, ArchivedArchiveDefault, ArchivedUserRecord, Archiving};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::jid::Jid;
use crate::xmpp::slice::Slice;

pub static FEATURE: Feature = Feature {
    name: "Preferences of archiving",
    spec: "XEP-0441",
    version: "0.2.0",
    iq: &[IqRoute {
        name: "prefs",
        ns: archive::NS,
        target: Target::Account,
        handle,
    }],
    ..NONE
};

fn handle(slice: &mut Slice, iq: Iq) {
    if !iq.own() {
        return slice.iq_error(&iq, &StanzaError::FORBIDDEN);
    }
    if !iq.set {
        let shown = slice
            .user(iq.account())
            .map(|user| shown(user.record.get()));
        return slice.iq_result(&iq, shown);
    }
    let archiving = match read(slice, &iq.payload) {
        Ok(archiving) => archiving,
        Err(error) => return slice.iq_error(&iq, &error),
    };
    let name = iq.account().to_owned();
    let then = Box::new(move |slice: &mut Slice, result| match result {
        Ok(()) => {
            let shown = slice
                .user(iq.account())
                .map(|user| shown(user.record.get()));
            slice.iq_result(&iq, shown);
        }
        Err(error) => slice.iq_error(&iq, &StanzaError::from(error)),
    });
    slice.edit(&name, |record| record.archiving = archiving, then);
}

/// `None`: everything is archived.
fn read(slice: &Slice, prefs: &Element) -> Result<Option<Box<Archiving>>, StanzaError> {
    let default = match prefs.get("default") {
        Some("always") => ArchiveDefault::Always,
        Some("never") => ArchiveDefault::Never,
        Some("roster") => ArchiveDefault::Roster,
        _ => return Err(StanzaError::BAD_REQUEST),
    };
    let mut room = slice.env.limits.archive_prefs_max;
    let mut list = |name: &str| {
        let mut jids = Vec::new();
        let lists = prefs.elements().filter(|e| e.is(name, archive::NS));
        for jid in lists
            .flat_map(Element::elements)
            .filter(|e| e.is("jid", archive::NS))
        {
            let jid = jid.text_content();
            let jid = Jid::parse(jid.trim()).map_err(|_| StanzaError::JID_MALFORMED)?;
            room = room.checked_sub(1).ok_or(
                StanzaError::RESOURCE_CONSTRAINT.text("the lists hold too many addresses"),
            )?;
            jids.push(jid.as_str().to_owned());
        }
        Ok::<_, StanzaError>(jids)
    };
    let archiving = Archiving {
        default,
        always: list("always")?,
        never: list("never")?,
    };
    Ok((archiving != Archiving::default()).then(|| archiving.into()))
}

fn shown(record: &ArchivedUserRecord) -> Element {
    let archiving = record.archiving.as_ref();
    let default = match archiving.map(|archiving| archiving.default) {
        None | Some(ArchivedArchiveDefault::Always) => "always",
        Some(ArchivedArchiveDefault::Never) => "never",
        Some(ArchivedArchiveDefault::Roster) => "roster",
    };
    let list = |name: &str, jids: Option<&ArchivedVec<ArchivedString>>| {
        let jids = jids.into_iter().flat_map(|jids| jids.iter());
        jids.fold(Element::new(name, archive::NS), |list, jid| {
            list.child(Element::new("jid", archive::NS).text(jid.as_str()))
        })
    };
    Element::new("prefs", archive::NS)
        .attr("default", default)
        .child(list("always", archiving.map(|a| &a.always)))
        .child(list("never", archiving.map(|a| &a.never)))
}

#[cfg(test)]
mod tests {
    use crate::xmpp::parse_stanza;
    use crate::xmpp::testing::{Client, World};

    const NS: &str = super::archive::NS;
    const NS_CLIENT: &str = crate::xmpp::NS_CLIENT;

    struct Scene {
        w: World,
        alice: String,
        bob: String,
        a: Client,
        b: Client,
    }

    impl Scene {
        fn new() -> Scene {
            let mut w = World::with(2, |limits| limits.archive_prefs_max = 4);
            let (alice, bob) = (w.on(0, "alice"), w.on(1, "bob"));
            w.add(&alice);
            w.add(&bob);
            let (a, b) = (w.online(&alice, "a"), w.online(&bob, "b"));
            Scene {
                w,
                alice,
                bob,
                a,
                b,
            }
        }

        fn prefs(&mut self, default: &str, always: &[&str], never: &[&str]) -> String {
            let list = |jids: &[&str]| -> String {
                jids.iter().map(|jid| format!("<jid>{jid}</jid>")).collect()
            };
            let request = format!(
                "<iq type='set' id='p'><prefs xmlns='{NS}' default='{default}'><always>{}</always><never>{}</never></prefs></iq>",
                list(always),
                list(never)
            );
            self.w.send(self.a, &request);
            self.w.take(self.a).concat()
        }

        fn say(&mut self, client: Client, to: &str, body: &str) {
            let to = format!("{to}@localhost");
            let message = format!("<message type='chat' to='{to}'><body>{body}</body></message>");
            self.w.send(client, &message);
            self.w.advance(1000);
        }

        /// Bodies in the archive of whose client it is.
        fn archive(&mut self, client: Client) -> Vec<String> {
            self.w.take(client);
            let query = format!("<iq type='set' id='q'><query xmlns='{NS}'/></iq>");
            self.w.send(client, &query);
            let mut got = self.w.take(client);
            assert!(got.pop().unwrap().contains("<fin"));
            got.iter()
                .map(|xml| {
                    let result = parse_stanza(xml.as_bytes()).unwrap();
                    let result = result
                        .find("result", NS)
                        .unwrap()
                        .elements()
                        .next()
                        .unwrap();
                    let message = result.find("message", NS_CLIENT).unwrap();
                    message.find("body", NS_CLIENT).unwrap().text_content()
                })
                .collect()
        }
    }

    #[test]
    fn preferences_are_what_was_set_and_survive() {
        let mut s = Scene::new();
        let get = format!("<iq type='get' id='p'><prefs xmlns='{NS}'/></iq>");
        let to = format!("{}@localhost/a", s.alice);
        s.w.send(s.a, &get);
        s.w.expect(s.a, &[&format!(
            "<iq type='result' id='p' to='{to}'><prefs xmlns='{NS}' default='always'><always/><never/></prefs></iq>"
        )]);
        let set = format!(
            "<iq type='result' id='p' to='{to}'><prefs xmlns='{NS}' default='roster'>\
             <always><jid>romeo@montague.lit</jid></always>\
             <never><jid>a@b</jid><jid>montague@montague.lit/x</jid></never></prefs></iq>"
        );
        let got = s.prefs(
            "roster",
            &["ROMEO@montague.lit"],
            &["montague@montague.lit/x", "a@b"],
        );
        assert!(crate::xmpp::testing::matches(&set, &got), "{got}");
        s.w.crash(2);
        s.a = s.w.online(&s.alice, "a");
        s.w.send(s.a, &get);
        s.w.expect(s.a, &[&set]);
        // and back
        s.prefs("always", &[], &[]);
        assert_eq!(s.w.stored(&s.alice).archiving, None);
    }

    #[test]
    fn what_are_no_preferences_is_refused_and_changes_nothing() {
        let mut s = Scene::new();
        s.prefs("never", &["a@b"], &[]);
        let long = ["a@b", "b@b", "c@b", "d@b", "e@b"];
        for (answer, condition) in [
            (s.prefs("sometimes", &[], &[]), "bad-request"),
            (s.prefs("always", &["@"], &[]), "jid-malformed"),
            (s.prefs("always", &long, &[]), "resource-constraint"),
            (s.prefs("always", &[], &long), "resource-constraint"),
        ] {
            assert!(answer.contains(&format!("<{condition}")), "{answer}");
        }
        assert_eq!(
            s.w.user(&s.alice)
                .record
                .to_owned()
                .archiving
                .unwrap()
                .always,
            ["a@b"]
        );
        for typ in ["get", "set"] {
            for to in [&*s.alice.clone(), "nobody"] {
                let request = format!(
                    "<iq type='{typ}' id='p' to='{to}@localhost'><prefs xmlns='{NS}' default='never'/></iq>"
                );
                s.w.send(s.b, &request);
                assert!(s.w.take(s.b).concat().contains("<forbidden"));
            }
        }
    }

    #[test]
    fn each_side_goes_by_its_own_preferences() {
        let mut s = Scene::new();
        let (alice, bob) = (s.alice.clone(), s.bob.clone());
        s.say(s.a, &bob, "1");
        s.prefs("always", &[], &[&format!("{bob}@localhost")]);
        s.say(s.a, &bob, "2");
        s.say(s.b, &alice, "3");
        s.say(s.a, &alice, "4");
        s.prefs("never", &[], &[]);
        s.say(s.b, &alice, "5");
        s.prefs("never", &[&format!("{bob}@localhost/b")], &[]);
        s.say(s.b, &alice, "6");
        s.prefs("roster", &[], &[]);
        s.say(s.b, &alice, "7");
        assert_eq!(s.archive(s.a), ["1", "4", "6"]);
        assert_eq!(s.archive(s.b), ["1", "2", "3", "5", "6", "7"]);
    }

    #[test]
    fn preferences_hold_for_who_was_not_known_when_the_message_came() {
        for dry in [false, true] {
            let mut s = Scene::new();
            let (alice, bob) = (s.alice.clone(), s.bob.clone());
            s.prefs("always", &[], &[&format!("{bob}@localhost")]);
            // nobody is in any cache
            s.w.crash(2);
            s.b = s.w.online(&bob, "b");
            s.w.tier.dry = dry;
            s.w.tier.gone = true;
            s.say(s.b, &alice, "1");
            s.w.tier.gone = false;
            s.w.advance(2000);
            s.a = s.w.login(&alice, "a");
            s.w.send(s.a, "<presence/>");
            assert!(s.w.take(s.a).concat().contains("<body>1</body>"));
            s.say(s.b, &alice, "2");
            assert_eq!(s.archive(s.a), [] as [&str; 0], "{dry}");
            assert_eq!(s.archive(s.b), ["1", "2"]);
            s.w.crash(2);
            s.a = s.w.online(&alice, "a");
            assert_eq!(s.archive(s.a), [] as [&str; 0], "{dry}");
            s.w.drain();
            assert_eq!(s.archive(s.a), [] as [&str; 0], "{dry}");
            assert!(s.w.tier.users[&alice].archive.is_empty());
        }
    }
}
