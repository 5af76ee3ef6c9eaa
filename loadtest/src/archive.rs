//! `archive`: users on line read their archives (XEP-0313): the last page, the last page with one peer, and everything, page by
//! page backwards. How long a page takes, how many a second, what one costs the server. Before it, the two users of each pair
//! fill their archives with messages to one another.

use std::time::Instant;

use crate::element::{attribute, escape, find, name, unescape};
use crate::fleet::Fleet;
use crate::metrics::Counters;
use crate::options::{ArchiveOptions, Global};
use crate::proc::Usage;
use crate::report::Report;
use crate::worker::{Job, Outcome};

/// What a user on line asks his server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// So many messages to the other one of the pair; done when the server has read them.
    Fill { messages: u32, body: u32 },
    /// The newest entries.
    Last { most: u32 },
    /// The newest entries with the other one of the pair.
    LastWith { most: u32 },
    /// The page before the one that was read last; nothing when there is none.
    Back { most: u32, first: bool },
}

/// Where a user is in his archive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The id of the first entry that was read.
    first: Option<String>,
    complete: bool,
    /// Results of the page under way, and of all pages together.
    results: u32,
    pub read: u64,
    pub pages: u64,
}

const ID: &str = "archive";

impl Ask {
    /// Appends the request to `out`; how many stanzas it has. 0: there is nothing to ask.
    pub fn write(self, place: &mut Place, peer: &str, out: &mut Vec<u8>) -> u32 {
        place.results = 0;
        let (most, with, before) = match self {
            Ask::Fill { messages, body } => {
                let text = "x".repeat(body as usize);
                for n in 0..messages {
                    let message = format!(
                        "<message type='chat' id='f{n}' to='{}'><body>{text}</body></message>",
                        escape(peer)
                    );
                    out.extend_from_slice(message.as_bytes());
                }
                let ping = format!("<iq type='get' id='{ID}'><ping xmlns='urn:xmpp:ping'/></iq>");
                out.extend_from_slice(ping.as_bytes());
                return messages + 1;
            }
            Ask::Last { most } => (most, String::new(), String::new()),
            Ask::LastWith { most } => (most, form(peer), String::new()),
            Ask::Back { first: true, most } => {
                *place = Place {
                    read: place.read,
                    pages: place.pages,
                    ..Place::default()
                };
                (most, String::new(), String::new())
            }
            Ask::Back { .. } if place.complete => return 0,
            Ask::Back { most, .. } => {
                (most, String::new(), place.first.clone().unwrap_or_default())
            }
        };
        let query = format!(
            "<iq type='set' id='{ID}'><query xmlns='urn:xmpp:mam:2'>{with}<set xmlns='http://jabber.org/protocol/rsm'>\
             <max>{most}</max><before>{}</before></set></query></iq>",
            escape(&before)
        );
        out.extend_from_slice(query.as_bytes());
        1
    }

    /// A stanza has come: is it the end of the answer?
    pub fn read(self, place: &mut Place, stanza: &[u8]) -> Option<Result<(), String>> {
        if name(stanza) == b"message" {
            place.results += u32::from(find(stanza, b"result").is_some());
            return None;
        }
        if name(stanza) != b"iq" || attribute(stanza, b"id") != Some(ID.as_bytes()) {
            return None;
        }
        if attribute(stanza, b"type") != Some(b"result") {
            return Some(Err("the server refused a query of the archive".into()));
        }
        if let Ask::Fill { .. } = self {
            return Some(Ok(()));
        }
        let Some(fin) = find(stanza, b"fin") else {
            return Some(Err("an answer has no <fin/>".into()));
        };
        place.complete = attribute(fin.raw, b"complete") == Some(b"true");
        let first = find(stanza, b"first");
        if first.is_none() && place.results > 0 {
            return Some(Err("a page has entries and does not name the first".into()));
        }
        if let Some(first) = first {
            let id = unescape(first.text).into_owned();
            place.first = Some(String::from_utf8_lossy(&id).into_owned());
        }
        place.read += u64::from(place.results);
        place.pages += 1;
        Some(Ok(()))
    }
}

fn form(with: &str) -> String {
    format!(
        "<x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'><value>urn:xmpp:mam:2</value></field>\
         <field var='with'><value>{}</value></field></x>",
        escape(with)
    )
}

/// One kind of reading.
struct Read {
    usage: Usage,
    outcome: Outcome,
    seconds: f64,
}

pub fn run(global: &Global, options: &ArchiveOptions) -> Result<Report, String> {
    let mut global = global.clone();
    global.users = (global.users / 2).max(1) * 2;
    let counters = Counters::new(&options.metrics)?;
    let fleet = Fleet::start(&global, global.target()?)?;
    let mut report = Report::new("archive");
    let login = fleet.login_all("log in")?;
    report.note_failures(&login.failures);
    let fill = |messages: u32| {
        let body = options.body;
        let job = Job::Ask(Ask::Fill { messages, body });
        fleet.run(job, &fleet.everyone(), None, "fill")
    };
    // a little at a time: nobody is to fall behind as a slow reader
    const FILL: u32 = 50;
    for begun in (0..options.messages).step_by(FILL as usize) {
        if !report.is_failure() {
            let filled = fill(FILL.min(options.messages - begun))?;
            report.note_failures(&filled.failures);
        }
    }
    fleet.wait_until_quiet();
    report.number("users", "users", global.users, "");
    report.text("tls", "TLS", format!("{:?}", global.tls).to_lowercase());
    let each = 2 * options.messages;
    report.number("filled", "messages in each archive, made before", each, "");
    report.number("page", "entries of a page", options.page, "");
    let most = options.page;
    let whole = each.div_ceil(most).max(1);
    let back = Ask::Back { most, first: true };
    let kinds = [
        ("last", "last page", Ask::Last { most }, options.rounds),
        (
            "with",
            "last page with one peer",
            Ask::LastWith { most },
            options.rounds,
        ),
        ("back", "page by page back through everything", back, whole),
    ];
    for (key, label, ask, rounds) in kinds {
        if report.is_failure() {
            break;
        }
        let counted_before = counters.read()?;
        let read = ask_all(&fleet, ask, rounds, options.rate, label)?;
        let counted = counters.read()?;
        let pages = read.outcome.done;
        report.note_failures(&read.outcome.failures);
        report.begin_section(key, label);
        report.number("pages", "pages", pages, "");
        report.number("pages_per_s", "pages", pages as f64 / read.seconds, "/s");
        report.latencies("page", "a page", &read.outcome.latencies);
        counters.report(&mut report, &[(&counted_before, &counted, pages)], "page")?;
        report.usage(&read.usage, pages, "page", "us", 1e6);
    }
    report.note_failures(&fleet.disconnections());
    fleet.stop(&mut report)?;
    Ok(report)
}

fn ask_all(
    fleet: &Fleet,
    ask: Ask,
    rounds: u32,
    rate: Option<f64>,
    title: &str,
) -> Result<Read, String> {
    fleet.wait_until_quiet();
    let before = fleet.snapshot();
    let start = Instant::now();
    let mut outcome = Outcome::new();
    for round in 0..rounds {
        let ask = match ask {
            Ask::Back { most, .. } => Ask::Back {
                most,
                first: round == 0,
            },
            ask => ask,
        };
        outcome.add(fleet.run(Job::Ask(ask), &fleet.everyone(), rate, title)?);
        if !outcome.failures.is_empty() {
            break;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let usage = before.until(&fleet.snapshot());
    Ok(Read {
        usage,
        outcome,
        seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_pages_back_until_there_is_nothing_more() {
        let mut place = Place::default();
        let back = |first| Ask::Back { most: 2, first };
        let mut out = Vec::new();
        assert_eq!(back(true).write(&mut place, "b@c", &mut out), 1);
        assert!(String::from_utf8_lossy(&out).contains("<max>2</max><before></before>"));
        let result = b"<message><result xmlns='urn:xmpp:mam:2' id='x'/></message>";
        assert_eq!(back(true).read(&mut place, result), None);
        assert_eq!(
            back(true).read(&mut place, b"<message><body/></message>"),
            None
        );
        let fin = b"<iq type='result' id='archive'><fin xmlns='urn:xmpp:mam:2'><set><first index='0'>x&amp;</first></set></fin></iq>";
        assert_eq!(back(true).read(&mut place, fin), Some(Ok(())));
        out.clear();
        assert_eq!(back(false).write(&mut place, "b@c", &mut out), 1);
        assert!(String::from_utf8_lossy(&out).contains("<before>x&amp;</before>"));
        let fin = b"<iq type='result' id='archive'><fin complete='true'><set/></fin></iq>";
        assert_eq!(back(false).read(&mut place, fin), Some(Ok(())));
        assert_eq!(back(false).write(&mut place, "b@c", &mut out), 0);
        assert_eq!((place.pages, place.read), (2, 1));
        let refused = b"<iq type='error' id='archive'/>";
        assert!(back(false).read(&mut place, refused).unwrap().is_err());
    }
}
