//! HTTP file upload (XEP-0363): the service at `upload.DOMAIN` that gives slots to this server's users. The files themselves come and go
//! by the HTTP door.
//!
//! In: requests of sessions of this slice, answers of those who keep the folder ([`crate::store::upload`]). Out: slots, and what is asked of
//! them. A slot is two addresses; that for PUT ends with a token, which is a MAC over all that the slot allows ([`Key`]). So no
//! table of slots is kept or shared between cores: whichever core gets the body can tell whether it may be taken.

use std::rc::Rc;

use aws_lc_rs::{constant_time, hmac};
use fnv::FnvHashMap;

use super::{Feature, NONE, disco, ping, time};
use crate::store::change::Id;
use crate::store::upload::{self, Entry, Owner, Refused};
use crate::xml::dom::Element;
use crate::xml::view::View;
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::{self, Field, Form};
use crate::xmpp::iq::Iq;
use crate::xmpp::jid::Jid;
use crate::xmpp::meta::Kind;
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:xmpp:http:upload:0";

/// What the path of each file begins with.
pub const PATH: &str = "/upload/";

pub static FEATURE: Feature = Feature {
    name: "HTTP file upload",
    spec: "XEP-0363",
    version: "1.1.0",
    ..NONE
};

/// From the section `upload` of the configuration.
#[derive(Clone, Debug)]
pub struct Limits {
    /// What stands before [`PATH`] in the addresses that clients get, e.g. `https://chat.example.com:5443`.
    pub url: Box<str>,
    pub file_bytes_max: u64,
    pub slot_seconds: u64,
    /// Requests that wait for an answer.
    pub waiting_max: usize,
    /// The same of one user.
    pub user_waiting_max: usize,
}

/// What the MACs of slots and the names of owners are made with.
#[derive(Clone)]
pub struct Key(Rc<hmac::Key>);

/// Is there room for this file of this owner? Answered by [`Slice::slot_reserved`].
pub struct Ask {
    pub ticket: u64,
    pub owner: Owner,
    pub entry: Entry,
}

/// Requests at work.
#[derive(Default)]
pub struct Uploads {
    waiting: FnvHashMap<u64, Waiting>,
    /// How many of them are whose.
    by_owner: FnvHashMap<Owner, usize>,
    last: u64,
    pub counters: Counters,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub slots: u64,
    pub refused: u64,
}

struct Waiting {
    iq: Iq,
    owner: Owner,
    entry: Entry,
    /// As it stands in the addresses.
    filename: String,
}

// ---- tokens --------------------------------------------------------------------------------------------------------

impl Key {
    /// Of the secret in the data folder.
    pub fn new(secret: &[u8; 32]) -> Key {
        let master = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let key = hmac::sign(&master, b"nitro http upload");
        Key(Rc::new(hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())))
    }

    /// The number that stands for an account: always the same, and tells nothing of its name.
    pub fn owner(&self, name: &str) -> Owner {
        let tag = self.tag(&[b"owner", name.as_bytes()]);
        let mut owner = [0; 16];
        owner.copy_from_slice(&tag.as_ref()[..16]);
        Owner(owner)
    }

    fn tag(&self, parts: &[&[u8]]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.0);
        for part in parts {
            // no two lists of parts are the same bytes
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        context.sign()
    }

    fn slot_tag(&self, owner: Owner, entry: &Entry, filename: &str) -> hmac::Tag {
        let (owner, entry) = (owner.name(), entry.name());
        self.tag(&[
            b"put",
            owner.as_bytes(),
            entry.as_bytes(),
            filename.as_bytes(),
        ])
    }

    /// What the address for PUT has behind its question mark. The entry tells length, type and when the slot was given.
    pub fn token(&self, owner: Owner, entry: &Entry, filename: &str) -> String {
        upload::hex(self.slot_tag(owner, entry, filename).as_ref())
    }

    /// In constant time, whatever the token is.
    pub fn is_token(&self, token: &[u8], owner: Owner, entry: &Entry, filename: &str) -> bool {
        let right = self.token(owner, entry, filename);
        constant_time::verify_slices_are_equal(token, right.as_bytes()).is_ok()
    }
}

/// A path behind [`PATH`]: owner, entry, file name as it stands there; `None`: there is nothing of that name.
pub fn parse_path(path: &str) -> Option<(Owner, Entry, &str)> {
    let mut parts = path.strip_prefix(PATH)?.splitn(3, '/');
    let owner = Owner::parse(parts.next()?)?;
    let entry = Entry::parse(parts.next()?)?;
    let filename = parts.next()?;
    (!filename.is_empty() && !filename.contains('/')).then_some((owner, entry, filename))
}

/// Bytes of a file name, before they are escaped.
const NAME_BYTES_MAX: usize = 200;

/// A name that a client may save the file under: without folders, without what no file name has.
fn safe_name(given: &str) -> String {
    let last = given.rsplit(['/', '\\']).next().unwrap_or_default();
    let mut name: String = last
        .chars()
        .filter(|c| !c.is_control() && !is_invisible(*c))
        .collect();
    while name.len() > NAME_BYTES_MAX {
        // its ending stays
        let dot = name.rfind('.').filter(|dot| name.len() - dot < 20);
        let end = dot.unwrap_or(name.len());
        let Some((at, _)) = name[..end].char_indices().next_back() else {
            break;
        };
        let cut = end
            .saturating_sub((name.len() - NAME_BYTES_MAX).max(1))
            .min(at);
        name.replace_range(name.floor_char_boundary(cut)..end, "");
    }
    let name = name.trim_matches(['.', ' ']);
    match name {
        "" => "file".to_owned(),
        name => name.to_owned(),
    }
}

/// Characters that turn the order of what is read, or are not seen.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// For an address: everything but RFC 3986's unreserved characters is escaped.
fn escaped(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(byte as char);
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

// ---- the service ---------------------------------------------------------------------------------------------------

/// A request of a session of this slice to the service.
pub fn outbound(slice: &mut Slice, sid: SessionId, view: &View<'_>, to: &Jid<'_>, kind: Kind) {
    let Some(iq) = Iq::of_session(slice, sid, view, to, kind) else {
        return;
    };
    let node = iq.payload.get("node").is_some();
    match (&*iq.payload.name, &*iq.payload.ns) {
        _ if iq.set => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
        ("query", disco::NS_INFO | disco::NS_ITEMS) if node => {
            slice.iq_error(&iq, &StanzaError::ITEM_NOT_FOUND);
        }
        ("query", disco::NS_INFO) => {
            let info = info(slice.env.limits.upload.file_bytes_max);
            slice.iq_result(&iq, Some(info));
        }
        ("query", disco::NS_ITEMS) => {
            slice.iq_result(&iq, Some(Element::new("query", disco::NS_ITEMS)));
        }
        ("ping", ping::NS) => slice.iq_result(&iq, None),
        ("request", NS) => request(slice, iq),
        _ => slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE),
    }
}

/// Section 4.
fn info(file_bytes_max: u64) -> Element {
    let identity = Element::new("identity", disco::NS_INFO)
        .attr("category", "store")
        .attr("type", "file")
        .attr("name", "HTTP File Upload");
    let form = Form::new(form::Kind::Result, NS)
        .field(Field::text("max-file-size", &file_bytes_max.to_string()));
    let features = [disco::NS_INFO, disco::NS_ITEMS, NS, ping::NS];
    let query = Element::new("query", disco::NS_INFO).child(identity);
    let query = features.iter().fold(query, |query, feature| {
        query.child(Element::new("feature", disco::NS_INFO).attr("var", *feature))
    });
    query.child(form.element())
}

/// Section 5.
fn request(slice: &mut Slice, iq: Iq) {
    let limits = &slice.env.limits.upload;
    let filename = iq.payload.get("filename").unwrap_or_default();
    let bytes = iq
        .payload
        .get("size")
        .and_then(|size| size.trim().parse::<u64>().ok());
    let (false, Some(bytes @ 1..)) = (filename.is_empty(), bytes) else {
        let error = StanzaError::BAD_REQUEST.text("filename and size (in bytes, not 0) are needed");
        return slice.iq_error(&iq, &error);
    };
    if bytes > limits.file_bytes_max {
        slice.uploads.counters.refused += 1;
        let most = limits.file_bytes_max.to_string();
        let detail =
            Element::new("file-too-large", NS).child(Element::new("max-file-size", NS).text(most));
        let error = StanzaError::NOT_ACCEPTABLE.text("the file is too large");
        return slice.iq_error_with(&iq, &error, detail);
    }
    if slice.uploads.waiting.len() >= limits.waiting_max {
        slice.uploads.counters.refused += 1;
        return slice.iq_error(&iq, &StanzaError::RESOURCE_CONSTRAINT);
    }
    let filename = safe_name(filename);
    let mut id = [0; 16];
    aws_lc_rs::rand::fill(&mut id).expect("the system gives random bytes");
    let entry = Entry {
        at: slice.now.unix,
        bytes,
        id,
        ending: match iq.payload.get("content-type") {
            Some(typ) => upload::ending_of_type(typ),
            None => upload::ending_of_name(&filename),
        },
    };
    let Some(key) = &slice.env.upload_key else {
        return slice.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
    };
    let owner = key.owner(iq.from.local().unwrap_or_default());
    let own = slice.uploads.by_owner.entry(owner).or_default();
    if *own >= limits.user_waiting_max {
        slice.uploads.counters.refused += 1;
        let error =
            StanzaError::RESOURCE_CONSTRAINT.text("wait for the slots that you have asked for");
        return slice.iq_error(&iq, &error);
    }
    *own += 1;
    slice.uploads.last += 1;
    let ticket = slice.uploads.last;
    let waiting = Waiting {
        iq,
        owner,
        entry,
        filename: escaped(&filename),
    };
    slice.uploads.waiting.insert(ticket, waiting);
    slice.fx.slots.push(Ask {
        ticket,
        owner,
        entry,
    });
}

/// What the account has put goes with it, up to the removal's own time: whoever reads that in the journal says the same.
pub fn account_removed(slice: &mut Slice, name: &str, revision: Id) {
    if let Some(key) = &slice.env.upload_key {
        let owner = key.owner(name);
        let at = revision.unix_ms() / 1000;
        slice.fx.uploads_gone.push((owner, at));
    }
}

impl Slice {
    /// Is there room for what was asked? `None`: nobody can say now.
    pub fn slot_reserved(&mut self, ticket: u64, answer: Option<Result<(), Refused>>) {
        let Some(waiting) = self.uploads.waiting.remove(&ticket) else {
            return;
        };
        if let Some(own) = self.uploads.by_owner.get_mut(&waiting.owner) {
            *own -= 1;
            if *own == 0 {
                self.uploads.by_owner.remove(&waiting.owner);
            }
        }
        let iq = &waiting.iq;
        let error = match answer {
            Some(Ok(())) => return self.give_slot(waiting),
            Some(Err(Refused::Quota(Some(at)))) => {
                self.uploads.counters.refused += 1;
                let retry = Element::new("retry", NS).attr("stamp", time::stamp(at));
                let error = QUOTA.wait();
                return self.iq_error_with(iq, &error, retry);
            }
            Some(Err(Refused::Quota(None))) => QUOTA,
            Some(Err(Refused::Full)) => {
                StanzaError::RESOURCE_CONSTRAINT.text("there is no room for more files")
            }
            Some(Err(Refused::Broken)) => StanzaError::INTERNAL_SERVER_ERROR,
            None => StanzaError::RESOURCE_CONSTRAINT,
        };
        self.uploads.counters.refused += 1;
        self.iq_error(iq, &error);
    }

    fn give_slot(&mut self, waiting: Waiting) {
        let Waiting {
            iq,
            owner,
            entry,
            filename,
        } = waiting;
        let Some(key) = &self.env.upload_key else {
            return self.iq_error(&iq, &StanzaError::SERVICE_UNAVAILABLE);
        };
        let token = key.token(owner, &entry, &filename);
        let base = &self.env.limits.upload.url;
        let get = format!("{base}{PATH}{}/{}/{filename}", owner.name(), entry.name());
        let put = format!("{get}?{token}");
        let slot = Element::new("slot", NS)
            .child(Element::new("put", NS).attr("url", put))
            .child(Element::new("get", NS).attr("url", get));
        self.uploads.counters.slots += 1;
        self.iq_result(&iq, Some(slot));
    }
}

const QUOTA: StanzaError =
    StanzaError::RESOURCE_CONSTRAINT.text("your quota of uploads is used up");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xmpp::parse_stanza;
    use crate::xmpp::testing::{Client, World};

    fn world() -> (World, Client) {
        let mut w = World::new(1);
        w.add("romeo");
        let romeo = w.login("romeo", "garden");
        (w, romeo)
    }

    fn request(attrs: &str) -> String {
        format!(
            "<iq type='get' id='u' to='upload.localhost'><request xmlns='urn:xmpp:http:upload:0' {attrs}/></iq>"
        )
    }

    /// The addresses of a slot, without what is the same in all.
    fn slot(w: &mut World, client: Client, attrs: &str) -> (String, String) {
        w.send(client, &request(attrs));
        let got = w.take(client).concat();
        let answer = parse_stanza(got.as_bytes()).unwrap();
        let slot = answer.find("slot", NS).unwrap_or_else(|| panic!("{got}"));
        let url = |name| {
            let url = slot.find(name, NS).unwrap().get("url").unwrap();
            url.strip_prefix("https://localhost:5443")
                .unwrap()
                .to_owned()
        };
        (url("put"), url("get"))
    }

    #[test]
    fn a_slot_is_two_addresses_and_the_token_fits_no_other() {
        let (mut w, romeo) = world();
        let (put, get) = slot(
            &mut w,
            romeo,
            "filename='my juliet.jpg' size='23456' content-type='image/jpeg'",
        );
        let (path, token) = put.split_once('?').unwrap();
        assert_eq!(path, get);
        let (owner, entry, filename) = parse_path(path).unwrap();
        assert_eq!(
            (entry.bytes, entry.ending, filename),
            (23_456, "jpg", "my%20juliet.jpg")
        );
        let key = Key::new(&[9; 32]);
        assert_eq!(owner, key.owner("romeo"));
        assert!(key.is_token(token.as_bytes(), owner, &entry, filename));
        let other = key.owner("juliet");
        assert!(!key.is_token(token.as_bytes(), other, &entry, filename));
        assert!(!key.is_token(token.as_bytes(), owner, &entry, "my.html"));
        for wrong in [
            Entry {
                bytes: 23_457,
                ..entry
            },
            Entry {
                at: entry.at + 1,
                ..entry
            },
            Entry {
                ending: "bin",
                ..entry
            },
            Entry {
                id: [0; 16],
                ..entry
            },
        ] {
            assert!(!key.is_token(token.as_bytes(), owner, &wrong, filename));
        }
        assert!(!key.is_token(b"", owner, &entry, filename));
        assert!(!Key::new(&[8; 32]).is_token(token.as_bytes(), owner, &entry, filename));
        assert_ne!(
            slot(&mut w, romeo, "filename='my juliet.jpg' size='23456'").1,
            get
        );
    }

    #[test]
    fn names_are_made_safe_and_keep_their_ending() {
        let long = format!("{}.tar.gz", "\u{fc}".repeat(500));
        for (given, safe) in [
            ("my-juliet.jpg", "my-juliet.jpg"),
            ("../../etc/passwd", "passwd"),
            ("C:\\Users\\romeo\\a.png", "a.png"),
            ("..", "file"),
            ("/", "file"),
            ("a\u{0}b\r\nc.png", "abc.png"),
            ("cod\u{202e}gpj.exe", "codgpj.exe"),
            (".htaccess", "htaccess"),
            ("%2e%2e%2f", "%2e%2e%2f"),
        ] {
            assert_eq!(safe_name(given), safe);
        }
        let safe = safe_name(&long);
        assert!(
            safe.len() <= NAME_BYTES_MAX && safe.ends_with(".gz"),
            "{safe}"
        );
        assert!(safe_name(&"x".repeat(5000)).len() <= NAME_BYTES_MAX);
        assert_eq!(escaped("%2e/\"\u{fc}"), "%252e%2F%22%C3%BC");
    }

    #[test]
    fn no_other_path_is_one() {
        for path in [
            "/upload/",
            "/upload/..%2f",
            "/upload/../../nitro.db",
            "/uploads/x",
            "/upload/abababababababababababababababab/../x",
            "/upload/abababababababababababababababab/6ab13f00-5ba0-abababababababababababababababab.jpg",
            "/upload/abababababababababababababababab/6ab13f00-5ba0-abababababababababababababababab.jpg/",
            "/upload/abababababababababababababababab/6ab13f00-5ba0-abababababababababababababababab.jpg/a/b",
            "/upload/ABababababababababababababababab/6ab13f00-5ba0-abababababababababababababababab.jpg/a",
        ] {
            assert!(parse_path(path).is_none(), "{path}");
        }
    }

    #[test]
    fn the_service_is_found_and_says_how_large_a_file_may_be() {
        let (mut w, romeo) = world();
        w.send(romeo, "<iq type='get' id='i' to='localhost'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>");
        assert!(
            w.take(romeo)
                .concat()
                .contains("<item jid='upload.localhost'")
        );
        w.send(romeo, "<iq type='get' id='i' to='upload.localhost'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>");
        let got = w.take(romeo).concat();
        for wanted in [
            "category='store' type='file'",
            "var='urn:xmpp:http:upload:0'",
            "<field var='max-file-size'><value>100000</value>",
        ] {
            assert!(got.contains(wanted), "{got}");
        }
    }

    #[test]
    fn what_is_too_large_or_too_much_is_said_as_the_specification_has_it() {
        let (mut w, romeo) = world();
        w.send(romeo, &request("filename='a.png' size='100001'"));
        let got = w.take(romeo).concat();
        assert!(
            got.contains("<error type='modify'><not-acceptable ")
                && got.contains("<file-too-large xmlns='urn:xmpp:http:upload:0'><max-file-size>100000</max-file-size>"),
            "{got}"
        );
        for (refused, kind, detail) in [
            (
                Refused::Quota(Some(1_512_344_525)),
                "wait",
                "<retry xmlns='urn:xmpp:http:upload:0' stamp='2017-12-03T23:42:05Z'/>",
            ),
            (Refused::Quota(None), "wait", "quota"),
            (Refused::Full, "wait", "no room"),
        ] {
            w.slots = Err(refused);
            w.send(romeo, &request("filename='a.png' size='10'"));
            let got = w.take(romeo).concat();
            assert!(
                got.contains(&format!("<error type='{kind}'><resource-constraint ")),
                "{got}"
            );
            assert!(got.contains(detail), "{got}");
        }
        assert_eq!(w.slices[0].uploads.counters.refused, 4);
    }

    #[test]
    fn the_requests_of_one_user_that_wait_are_bounded_and_others_have_their_own() {
        let (mut w, romeo) = world();
        w.add("juliet");
        let juliet = w.login("juliet", "balcony");
        w.slots_held = true;
        let refused = |got: &[String]| got.concat().contains("<resource-constraint");
        // of World's limits
        for _ in 0..8 {
            w.send(romeo, &request("filename='a.png' size='10'"));
            assert!(w.take(romeo).is_empty());
        }
        w.send(romeo, &request("filename='a.png' size='10'"));
        assert!(refused(&w.take(romeo)));
        w.send(juliet, &request("filename='a.png' size='10'"));
        assert!(w.take(juliet).is_empty());
        w.slots_held = false;
        w.send(
            romeo,
            "<iq type='get' id='p' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>",
        );
        assert_eq!(w.take(romeo).concat().matches("<slot ").count(), 8);
        assert!(w.take(juliet).concat().contains("<slot "));
        w.send(romeo, &request("filename='a.png' size='10'"));
        assert!(w.take(romeo).concat().contains("<slot "));
    }

    #[test]
    fn mistakes_are_answered() {
        let (mut w, romeo) = world();
        for attrs in [
            "filename='a.png'",
            "size='10'",
            "filename='' size='10'",
            "filename='a.png' size='0'",
            "filename='a.png' size='-1'",
            "filename='a.png' size='99999999999999999999999'",
            "filename='a.png' size='ten'",
        ] {
            w.send(romeo, &request(attrs));
            let got = w.take(romeo).concat();
            assert!(got.contains("<bad-request "), "{attrs}: {got}");
        }
        w.send(
            romeo,
            &request("filename='a' size='1'").replace("'get'", "'set'"),
        );
        assert!(w.take(romeo).concat().contains("<service-unavailable"));
    }
}
