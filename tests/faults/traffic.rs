//! Clients with stream management that know what they were promised.
//!
//! In: a blade. Out: for each message whether it was accepted, refused, received, and how long that took. A connection that
//! ends, an answer that stays away, or a message that is lost, doubled or overtaken is a panic with a sentence.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::blade::{Blade, DOMAIN};
use crate::client::connection::Heard;
use crate::client::xml::{Element, Item};
use crate::client::{self, Client, body, h};

const SM: &str = "urn:xmpp:sm:3";
/// A server that is sound may take as long for an answer, on a machine that has other things to do.
pub const WITHIN: Duration = Duration::from_secs(20);
/// Between two messages of a pair.
const PACE: Duration = Duration::from_millis(5);

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Accepted,
    /// The error's condition and type.
    Refused(String, String),
}

/// One client with stream management.
pub struct Talker {
    pub client: Client,
    /// Stanzas sent and heard since it was enabled.
    sent: u32,
    heard: u32,
    /// The server's last count.
    covered: u32,
    number: usize,
    refused: Option<(String, String, String)>,
}

impl Talker {
    pub fn online(blade: &Blade, name: &str) -> Talker {
        let mut client = Client::bind(blade, name, "r");
        client.send(&format!("<enable xmlns='{SM}'/>"));
        client.find(|e| e.name == "enabled");
        client.send("<presence/>");
        Talker {
            client,
            sent: 1,
            heard: 0,
            covered: 0,
            number: 0,
            refused: None,
        }
    }

    /// Sends a message and asks for the count.
    pub fn send(&mut self, to: &str, text: &str) -> String {
        self.number += 1;
        let id = format!("n{}", self.number);
        self.client.send(&format!(
            "<message type='chat' to='{to}' id='{id}'><body>{text}</body></message><r xmlns='{SM}'/>"
        ));
        self.sent += 1;
        id
    }

    pub fn all_is_covered(&self) -> bool {
        self.covered == self.sent
    }

    /// Waits until at most so many stanzas are not acknowledged.
    pub fn wait_for_counts(&mut self, open: u32) {
        let deadline = Instant::now() + WITHIN;
        while self.sent - self.covered > open {
            assert!(Instant::now() < deadline, "{}: no count", self.client.jid);
            self.hear(Duration::from_millis(50));
        }
    }

    /// Sends a message to a user of the blade; what became of it.
    pub fn say(&mut self, to: &str, text: &str) -> Said {
        let id = self.send(&format!("{to}@{DOMAIN}"), text);
        let deadline = Instant::now() + WITHIN;
        while !self.all_is_covered() {
            assert!(
                Instant::now() < deadline,
                "{}: no count for a message to {to}",
                self.client.jid
            );
            self.hear(Duration::from_millis(50));
        }
        // an error stands before or right behind the count
        self.ping();
        match self.refused.take() {
            Some((of, condition, kind)) if of == id => Said::Refused(condition, kind),
            other => {
                self.refused = other;
                Said::Accepted
            }
        }
    }

    /// Hears until the server is gone; how many of the last `messages` it has acknowledged.
    pub fn last_words(mut self, messages: u32) -> usize {
        let deadline = Instant::now() + WITHIN;
        while let Ok(heard) = self.client.connection.hear(WITHIN) {
            assert!(Instant::now() < deadline, "{} is not cut", self.client.jid);
            match heard {
                Heard::Item(Item::Element(e)) if e.name == "a" => self.covered = h(&e),
                Heard::Closed => break,
                _ => {}
            }
        }
        self.covered.saturating_sub(self.sent - messages) as usize
    }

    /// An IQ that is answered.
    fn ping(&mut self) {
        let iq = "<iq type='get' id='{id}'><ping xmlns='urn:xmpp:ping'/></iq>";
        self.ask(iq);
    }

    /// An IQ and its answer.
    pub fn ask(&mut self, iq: &str) -> Element {
        let id = self.client.connection.send_request(iq).expect("sent");
        self.sent += 1;
        let deadline = Instant::now() + WITHIN;
        loop {
            assert!(
                Instant::now() < deadline,
                "{}: no answer to {iq}",
                self.client.jid
            );
            match self.hear(Duration::from_millis(50)) {
                Some(e) if e.name == "iq" && e.attribute("id") == Some(&id) => return e,
                _ => {}
            }
        }
    }

    /// Takes what comes within `wait`: the next stanza, if one came.
    pub fn hear(&mut self, wait: Duration) -> Option<Element> {
        let jid = &self.client.jid;
        let element = match self.client.connection.hear(wait) {
            Ok(Heard::Item(Item::Element(element))) => element,
            Ok(Heard::Nothing) => return None,
            Ok(Heard::Closed) => panic!("{jid} was disconnected"),
            other => panic!("{jid}: {:?}", other.map(|_| "the stream ended")),
        };
        match element.name.as_str() {
            "a" => {
                self.covered = h(&element);
                None
            }
            "r" => {
                let count = self.heard;
                self.client.acknowledge(count);
                None
            }
            "message" | "presence" | "iq" => {
                self.heard += 1;
                if element.name == "message" && element.attribute("type") == Some("error") {
                    let error = element.child("error").expect("an error says what it is");
                    let condition = error.children.first().map(|c| c.name.clone());
                    self.refused = Some((
                        element.attribute("id").unwrap_or_default().to_owned(),
                        condition.unwrap_or_default(),
                        error.attribute("type").unwrap_or_default().to_owned(),
                    ));
                    return None;
                }
                Some(element)
            }
            _ => panic!("{jid}: {element}"),
        }
    }
}

/// Everything that waits for this user: bodies, in their order. Logs in, as often as it takes while the database comes back.
pub fn collect(blade: &Blade, name: &str, count: usize) -> Vec<String> {
    let mut talker = None;
    client::wait_until(
        &format!("{name} can log in"),
        WITHIN,
        || match client::authenticated(blade.c2s, name, client::PASSWORD) {
            Ok(_) => {
                talker = Some(Talker::online(blade, name));
                true
            }
            Err(condition) => {
                assert_eq!(condition, "temporary-auth-failure", "log-in of {name}");
                false
            }
        },
    );
    let mut talker = talker.expect("logged in");
    let mut bodies = Vec::new();
    let deadline = Instant::now() + WITHIN;
    while bodies.len() < count && Instant::now() < deadline {
        let heard = talker.hear(Duration::from_millis(50));
        bodies.extend(
            heard
                .as_ref()
                .filter(|e| e.name == "message")
                .and_then(body),
        );
    }
    // what comes twice comes before this
    let iq = "<iq type='get' id='{id}'><ping xmlns='urn:xmpp:ping'/></iq>";
    let id = talker.client.connection.send_request(iq).expect("sent");
    loop {
        match talker.hear(WITHIN) {
            Some(e) if e.name == "iq" && e.attribute("id") == Some(&id) => break,
            Some(e) => bodies.extend((e.name == "message").then(|| body(&e)).flatten()),
            None => assert!(Instant::now() < deadline + WITHIN, "{name}: no pong"),
        }
    }
    let heard = talker.heard;
    talker.client.acknowledge(heard);
    talker.client.send("</stream:stream>");
    talker.client.ends();
    bodies
}

/// Pairs of clients, each in a thread: one writes, the other one reads, one message after the other.
pub struct Load {
    stop: Arc<AtomicBool>,
    phase: Arc<AtomicUsize>,
    phases: Vec<&'static str>,
    threads: Vec<JoinHandle<Vec<Sample>>>,
}

/// How long one message took: to its recipient, and to its count.
struct Sample {
    phase: usize,
    received: Duration,
    counted: Duration,
}

impl Load {
    /// Users `w0`, `w1` … write to `v0`, `v1` …; they must exist.
    pub fn start(blade: &Blade, pairs: usize, phase: &'static str) -> Load {
        let mut load = Load {
            stop: Arc::default(),
            phase: Arc::default(),
            phases: vec![phase],
            threads: Vec::new(),
        };
        for pair in 0..pairs {
            let mut writer = Talker::online(blade, &format!("w{pair}"));
            let mut reader = Talker::online(blade, &format!("v{pair}"));
            // he is available when he is told so himself
            while reader.hear(WITHIN).is_some_and(|e| e.name != "presence") {}
            let (stop, phase) = (load.stop.clone(), load.phase.clone());
            load.threads.push(std::thread::spawn(move || {
                let mut samples = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let phase = phase.load(Ordering::Relaxed);
                    let (received, counted) = one(&mut writer, &mut reader, samples.len());
                    samples.push(Sample {
                        phase,
                        received,
                        counted,
                    });
                    std::thread::sleep(PACE); // the rate; nothing is waited for
                }
                samples
            }));
        }
        load
    }

    /// What follows is measured apart.
    pub fn phase(&mut self, name: &'static str) {
        self.phases.push(name);
        self.phase.store(self.phases.len() - 1, Ordering::Relaxed);
        for thread in &self.threads {
            assert!(!thread.is_finished(), "before '{name}' a client gave up");
        }
    }

    /// Stops, and says how long messages took.
    pub fn end(self, title: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let mut samples = Vec::new();
        for thread in self.threads {
            match thread.join() {
                Ok(more) => samples.extend(more),
                Err(why) => std::panic::resume_unwind(why),
            }
        }
        let mut text = format!("{title}: live messages, ms\n");
        for (phase, name) in self.phases.iter().enumerate() {
            let of = |which: fn(&Sample) -> Duration| {
                let mut all: Vec<f64> = samples
                    .iter()
                    .filter(|sample| sample.phase == phase)
                    .map(|sample| which(sample).as_secs_f64() * 1e3)
                    .collect();
                all.sort_by(f64::total_cmp);
                all
            };
            let at = |all: &[f64], share: f64| {
                let place = (all.len() as f64 * share) as usize;
                all.get(place.min(all.len().saturating_sub(1)))
                    .copied()
                    .unwrap_or(f64::NAN)
            };
            let (received, counted) = (of(|s| s.received), of(|s| s.counted));
            text += &format!(
                "  {name:24} n={:<6} received p50 {:7.2} p99 {:7.2} max {:7.2}   <a/> p50 {:7.2} p99 {:7.2} max {:7.2}\n",
                received.len(),
                at(&received, 0.5),
                at(&received, 0.99),
                at(&received, 1.0),
                at(&counted, 0.5),
                at(&counted, 0.99),
                at(&counted, 1.0),
            );
        }
        aloud(&text);
    }
}

/// Sends message `number` and sees it received, as the next one, and counted.
fn one(writer: &mut Talker, reader: &mut Talker, number: usize) -> (Duration, Duration) {
    let to = reader.client.jid.clone();
    let begun = Instant::now();
    writer.send(&to, &number.to_string());
    let (mut received, mut counted) = (None, None);
    while received.is_none() || counted.is_none() {
        assert!(
            begun.elapsed() < WITHIN,
            "{} to {to}: message {number} after {WITHIN:?}: received {received:?}, counted {counted:?}",
            writer.client.jid
        );
        if received.is_none()
            && let Some(message) = reader.hear(Duration::from_millis(2))
            && message.name == "message"
        {
            assert_eq!(body(&message), Some(number.to_string()), "{to}");
            received = Some(begun.elapsed());
        }
        if counted.is_none() {
            let wait = if received.is_some() { 50 } else { 0 };
            writer.hear(Duration::from_millis(wait));
            counted = writer.all_is_covered().then(|| begun.elapsed());
        }
        assert_eq!(
            writer.refused, None,
            "{}: message {number}",
            writer.client.jid
        );
    }
    (received.unwrap_or_default(), counted.unwrap_or_default())
}

/// To where it is read: past the capturing of tests' output.
pub fn aloud(text: &str) {
    let _ = std::io::stderr().write_all(format!("{}\n", text.trim_end()).as_bytes());
}
