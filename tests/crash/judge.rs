//! All books together: was every promise kept?
//!
//! In: what the clients noted ([`Bot`]). Out: [`Totals`]: counters of work and, by kind, of broken promises, each of the
//! first ones with the events of both clients on standard error.
//!
//! Receipts are judged as they come ([`World::merge`]), archives and losses when a check says that all is there
//! ([`World::judge_losses`], [`World::judge_archives`]).
//!
//! | counter of broken promises | what happened |
//! |---|---|
//! | `lost`, `late` | an accepted message never came, or only after the check |
//! | `reordered` | first receipts of one sender's messages are not in the order of sending |
//! | `duplicates_with_another_stable_id`, `without_stable_id` | XEP-0359: a duplicate cannot be told, or no message can |
//! | `twice_in_a_session` | the same message twice in one stream, resumptions included |
//! | `misdelivered`, `changed_or_invented` | a stranger got it; it is not as it was sent, or nobody sent it |
//! | `missing_in_archive`, `twice_in_archive` | an accepted message is not in an archive of its two users, or more often than once |
//! | `archive_reordered`, `archive_order_not_as_seen` | positions are not in the order of sending; a client saw another order |
//! | `archive_changes_behind_its_reader` | something appeared or vanished before a position that was read already |
//! | `archive_id_is_not_stable_id`, `archive_refused` | XEP-0313: ids differ; a page is refused or wrongly told |
//! | `retraction_lost`, `retracted_by_nobody` | XEP-0424: an accepted retraction left no tombstone in an archive; a tombstone that nobody asked for |
//! | `stored_against_its_hint` | XEP-0334 no-store, but in an archive |
//! | `count_beyond_sent`, `count_goes_back`, `bad_count` | XEP-0198: `h` of `<a/>`, `<resumed/>` or `<failed/>` is wrong |
//! | `failed_without_h`, `failed_h_too_low` | after a restart `<failed/>` does not cover a message that was covered |
//! | `failed_h_forgets_what_is_not_kept` | it covers all messages, but not presence or IQs behind the last one |
//! | `bad_failed` | `<failed/>` without item-not-found |
//! | `changes_lost`, `changes_refused` | roster, private data, vCard, nodes, block list, archive preferences are not as answered; a change is an error |
//! | `subscriptions_lost` | a covered request or approval is not in the rosters of both, or was not told |
//! | `refused`, `disconnects`, `stream_errors`, `garbage` | a living server does not serve: no log-in, no answer, no stream |
//! | `died_by_itself`, `no_archive`, `too_little_for_a_proof` | the run itself |

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::bot::{Bot, Entry, Profile, State, Way, Wrong};

/// Counters of work done.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub struct Totals {
    /// Kills of a server that had just been started, beside those under load.
    pub kills_at_start: u64,
    pub sent: u64,
    pub accepted: u64,
    /// Direct receipts, duplicates among them.
    pub received: u64,
    /// The same message once more, with the same stable id: what a crash may cause.
    pub duplicates: u64,
    /// Overtook offline messages because the client had no presence yet: told, and not wrong.
    pub early: u64,
    /// Came back as errors: not accepted.
    pub refused_messages: u64,
    pub archive_entries: u64,
    /// Retractions that were accepted, and tombstones in the archives as they were read at the end.
    pub retractions: u64,
    pub tombstones: u64,
    /// Pages that had to be asked for again.
    pub archive_waits: u64,
    pub accounts_made: u64,
    pub changes_answered: u64,
    pub resumptions: u64,
    pub failed_resumptions: u64,
    /// Broken promises by kind. Every counter must stay away.
    pub wrong: BTreeMap<String, u64>,
    /// Those that were asked to be tolerated.
    pub tolerated: BTreeMap<String, u64>,
}

/// What the judge remembers of one message.
#[derive(Default)]
struct Fate {
    received: bool,
    /// In the recipient's archive and in what he was sent.
    stable_id: Option<Box<str>>,
    /// Place in the archives of recipient and sender.
    in_recipients: Option<usize>,
    in_senders: Option<usize>,
}

/// What the judge remembers of one client.
#[derive(Default)]
struct Book {
    fates: Vec<Fate>,
    /// Receipts merged, messages judged for loss.
    merged: usize,
    judged: usize,
    /// Receipts of this session: sender, number, way.
    session: u32,
    in_session: HashSet<(usize, usize, Way)>,
    /// Last number from a client, to the bare or full JID, in this session.
    last_live: HashMap<(usize, bool), usize>,
    /// Messages in the order in which this client saw them first, with the session that matters; judged against the
    /// archive and forgotten.
    order: Vec<(u32, usize, usize)>,
    last_place: (u32, usize),
}

/// What the judge remembers of one user.
#[derive(Default)]
struct Archive {
    merged: usize,
    compared: usize,
    /// Last number of a client in this archive.
    last: HashMap<usize, usize>,
}

pub struct World {
    pub bots: Vec<Bot>,
    /// Local part, clients.
    pub users: Vec<(String, Vec<usize>)>,
    /// Users of the whole run; those behind are newcomers of a round.
    pub lasting: usize,
    pub jids: Vec<String>,
    pub totals: Totals,
    books: Vec<Book>,
    archives: Vec<Archive>,
    /// Last number of a client that a user with a single client received first.
    last_first: HashMap<(usize, usize), usize>,
    pub title: String,
    /// Kinds of broken promises that are counted apart.
    tolerated: Vec<String>,
}

/// Broken promises of a kind that are told with all their events, and told at all.
const TOLD_IN_FULL: u64 = 2;
const TOLD: u64 = 6;

impl World {
    pub fn new(title: String, tolerated: Vec<String>) -> World {
        World {
            bots: Vec::new(),
            users: Vec::new(),
            lasting: 0,
            jids: Vec::new(),
            totals: Totals::default(),
            books: Vec::new(),
            archives: Vec::new(),
            last_first: HashMap::new(),
            title,
            tolerated,
        }
    }

    /// A user with these clients: (stream management, carbons).
    pub fn add_user(&mut self, name: &str, clients: &[(bool, bool)]) -> usize {
        let user = self.users.len();
        let mut numbers = Vec::new();
        for (place, (sm, carbons)) in clients.iter().enumerate() {
            let number = self.bots.len();
            numbers.push(number);
            let profile = Profile {
                number,
                user,
                name: name.to_owned(),
                resource: format!("r{place}"),
                sm: *sm,
                carbons: *carbons,
                alone: clients.len() == 1,
                speaker: place == 0,
            };
            let bot = Bot::new(profile, crate::PASSWORD);
            self.jids.push(bot.jid());
            self.bots.push(bot);
            self.books.push(Book::default());
        }
        self.users.push((name.to_owned(), numbers));
        self.archives.push(Archive::default());
        user
    }

    pub fn speaker(&self, user: usize) -> usize {
        self.users[user].1[0]
    }

    pub fn wrong_count(&self) -> u64 {
        self.totals.wrong.values().sum()
    }

    /// Counts a broken promise; the first ones of a kind are told.
    pub fn wrong(&mut self, kind: &str, text: &str, events: impl FnOnce(&World) -> Vec<String>) {
        let tolerated = self.tolerated.iter().any(|one| one == kind);
        let counts = match tolerated {
            true => &mut self.totals.tolerated,
            false => &mut self.totals.wrong,
        };
        let count = counts.entry(kind.to_owned()).or_default();
        *count += 1;
        let count = *count;
        if tolerated {
            return;
        }
        if count <= TOLD {
            eprintln!("WRONG ({}) {kind}: {text}", self.title);
        }
        if count <= TOLD_IN_FULL {
            for line in events(self) {
                eprintln!("    {line}");
            }
        }
    }

    fn wrong_message(&mut self, kind: &str, from: usize, number: usize, text: &str) {
        self.wrong_messages(kind, from, &[number], text);
    }

    /// Of the first of these messages of `from`; the others have to do with it.
    fn wrong_messages(&mut self, kind: &str, from: usize, messages: &[usize], text: &str) {
        let number = messages[0];
        let sent = &self.bots[from].sent[number];
        let (to, round) = (sent.to_user, sent.round);
        let addressee = match sent.to_bot {
            Some(bot) => self.jids[bot].clone(),
            None => self.users[to].0.clone(),
        };
        let text = format!(
            "m{number} of {} to {addressee}, sent in round {round} as stanza {} of session {}, {:?}: {text}",
            self.jids[from], sent.counted_as, sent.session, sent.state
        );
        self.wrong(kind, &text, |world| {
            let sender = &world.bots[from];
            let mut lines = vec![format!("-- {} (sender)", sender.jid())];
            lines.extend(sender.events_around(sender, messages, round));
            for bot in &world.users[to].1 {
                let bot = &world.bots[*bot];
                lines.push(format!("-- {} (recipient)", bot.jid()));
                lines.extend(bot.events_around(sender, messages, round));
            }
            lines
        });
    }

    /// Judges what the clients noted since the last call.
    pub fn merge(&mut self) {
        for number in 0..self.bots.len() {
            for Wrong { kind, text } in std::mem::take(&mut self.bots[number].wrong) {
                self.wrong(kind, &text, |_| Vec::new());
            }
            self.books[number]
                .fates
                .resize_with(self.bots[number].sent.len(), Fate::default);
        }
        for number in 0..self.bots.len() {
            while self.books[number].merged < self.bots[number].received.len() {
                self.merge_receipt(number, self.books[number].merged);
                self.books[number].merged += 1;
            }
        }
    }

    fn merge_receipt(&mut self, me: usize, place: usize) {
        let profile = self.bots[me].profile.clone();
        let receipt = &self.bots[me].received[place];
        let (from, number, way) = (receipt.from, receipt.number, receipt.way);
        let (session, to_full, delayed) = (receipt.session, receipt.to_full, receipt.delayed);
        let early = receipt.early;
        let stable_id = receipt.stable_id.clone();
        if number >= self.bots[from].sent.len() {
            let text = format!("{} got m{number} of {}", self.jids[me], self.jids[from]);
            return self.wrong("changed_or_invented", &text, |_| Vec::new());
        }
        let sent = &self.bots[from].sent[number];
        let (to_user, fleeting) = (sent.to_user, sent.fleeting);

        let book = &mut self.books[me];
        if book.session != session {
            book.session = session;
            book.in_session.clear();
            book.last_live.clear();
        }
        let again = !book.in_session.insert((from, number, way));
        if again {
            let text = format!("{} got it twice in session {session}", self.jids[me]);
            self.wrong_message("twice_in_a_session", from, number, &text);
        }
        if to_user == profile.user && !fleeting && way != Way::CopyOfSent {
            let fate = &mut self.books[from].fates[number];
            match (&fate.stable_id, stable_id) {
                (None, Some(id)) => fate.stable_id = Some(id),
                (Some(known), Some(id)) if *known != id => {
                    let text = format!("stable ids {known} and {id}");
                    let kind = "duplicates_with_another_stable_id";
                    self.wrong_message(kind, from, number, &text);
                }
                (_, None) if way == Way::Direct => {
                    self.wrong_message("without_stable_id", from, number, &self.jids[me].clone());
                }
                _ => {}
            }
        }
        if way != Way::Direct {
            return;
        }
        self.totals.received += 1;
        if to_user != profile.user {
            let text = format!("{} got it", self.jids[me]);
            return self.wrong_message("misdelivered", from, number, &text);
        }
        let first = !std::mem::replace(&mut self.books[from].fates[number].received, true);
        if self.bots[from].sent[number].state == State::Lost {
            self.wrong_message("late", from, number, "arrived after the check");
        }
        // Several clients of a user read independently, and what one of them holds may come to another one later: so
        // for them order is judged within what one session is sent live.
        let (last, ordered) = match profile.alone {
            true => (
                self.last_first.get_mut(&(profile.user, from)),
                first && !early,
            ),
            false => (
                self.books[me].last_live.get_mut(&(from, to_full)),
                !delayed && !early && !again,
            ),
        };
        self.totals.early += u64::from(early);
        if ordered {
            match last {
                Some(last) if *last > number => {
                    let messages = [number, *last];
                    let text = format!("{} got it after m{last}", self.jids[me]);
                    self.wrong_messages("reordered", from, &messages, &text);
                }
                Some(last) => *last = number,
                None if profile.alone => {
                    self.last_first.insert((profile.user, from), number);
                }
                None => {
                    self.books[me].last_live.insert((from, to_full), number);
                }
            }
            if !fleeting {
                let session = if profile.alone { 0 } else { session };
                self.books[me].order.push((session, from, number));
            }
        }
        let _ = first || {
            // several clients may get the same message; a duplicate is what one of them, or a later one, gets again
            self.totals.duplicates += u64::from(profile.alone);
            true
        };
    }

    /// Accepted messages that nobody has received yet: client and number.
    pub fn missing(&self) -> Vec<(usize, usize)> {
        let mut missing = Vec::new();
        for (from, bot) in self.bots.iter().enumerate() {
            let book = &self.books[from];
            for number in book.judged..bot.sent.len() {
                let sent = &bot.sent[number];
                let received = book.fates.get(number).is_some_and(|fate| fate.received);
                if sent.state == State::Accepted && !sent.fleeting && !received {
                    missing.push((from, number));
                }
            }
        }
        missing
    }

    /// All that can come has come: what is missing is lost.
    pub fn judge_losses(&mut self) {
        for (from, number) in self.missing() {
            self.wrong_message("lost", from, number, "accepted and never received");
            self.bots[from].sent[number].state = State::Lost;
        }
    }

    /// All archives have been read to their ends. `whole`: also from the begin, in one go.
    pub fn judge_archives(&mut self, users: &[usize], whole: bool) {
        for &user in users {
            self.judge_archive(user);
            if whole {
                let syncs = &self.bots[self.speaker(user)].syncs;
                if syncs[1].entries != syncs[2].entries {
                    let text = difference(&syncs[1].entries, &syncs[2].entries);
                    let text = format!("{} at the end: {text}", self.users[user].0);
                    self.wrong("archive_changes_behind_its_reader", &text, |_| Vec::new());
                }
            }
        }
        for from in 0..self.bots.len() {
            for number in self.books[from].judged..self.bots[from].sent.len() {
                let sent = &self.bots[from].sent[number];
                if !matches!(sent.state, State::Accepted | State::Lost) || sent.fleeting {
                    continue;
                }
                let to_user = sent.to_user;
                let fate = &self.books[from].fates[number];
                let (senders, recipients) = (fate.in_senders, fate.in_recipients);
                let own = self.bots[from].profile.user;
                if users.contains(&own) && senders.is_none() {
                    let text = "accepted and not in the sender's archive";
                    self.wrong_message("missing_in_archive", from, number, text);
                }
                if users.contains(&to_user) && to_user != own && recipients.is_none() {
                    let text = "accepted and not in the recipient's archive";
                    self.wrong_message("missing_in_archive", from, number, text);
                }
            }
        }
        for me in 0..self.bots.len() {
            for (session, from, number) in std::mem::take(&mut self.books[me].order) {
                let Some(place) = self.books[from].fates[number].in_recipients else {
                    continue; // missing: told above, if it was accepted
                };
                let (last_session, last) = self.books[me].last_place;
                if last_session == session && last > place {
                    let text = format!(
                        "{} saw it behind what stands at {last} in the archive, but it stands at {place}",
                        self.jids[me]
                    );
                    self.wrong_message("archive_order_not_as_seen", from, number, &text);
                }
                self.books[me].last_place = (session, place);
            }
        }
    }

    /// All archives have been read from the begin: what was retracted is a tombstone in those of both, and nothing else is.
    pub fn judge_retractions(&mut self, users: &[usize]) {
        // by sender and message: whether somebody was promised that it is gone
        let mut asked: HashMap<(usize, usize), bool> = HashMap::new();
        for (from, bot) in self.bots.iter().enumerate() {
            for sent in &bot.sent {
                let Some(target) = sent.retracts else {
                    continue;
                };
                let promised = matches!(sent.state, State::Accepted | State::Lost);
                *asked.entry((from, target)).or_default() |= promised;
                self.totals.retractions += u64::from(promised);
            }
        }
        for &user in users {
            let speaker = self.speaker(user);
            for place in 0..self.bots[speaker].syncs[2].entries.len() {
                let entry = &self.bots[speaker].syncs[2].entries[place];
                let (Some((from, number)), by) = (entry.message, entry.retracted_by) else {
                    continue;
                };
                let promised = asked.get(&(from, number)).copied();
                let right = by.is_some_and(|(bot, by)| {
                    let sent = self.bots.get(bot).and_then(|bot| bot.sent.get(by));
                    bot == from && sent.is_some_and(|sent| sent.retracts == Some(number))
                });
                self.totals.tombstones += u64::from(right);
                let text = format!("in the archive of {}, by {by:?}", self.users[user].0);
                if by.is_some() && !right {
                    self.wrong_message("retracted_by_nobody", from, number, &text);
                } else if by.is_none() && promised == Some(true) {
                    self.wrong_message("retraction_lost", from, number, &text);
                }
            }
        }
    }

    fn judge_archive(&mut self, user: usize) {
        let speaker = self.speaker(user);
        while self.archives[user].merged < self.bots[speaker].syncs[1].entries.len() {
            let place = self.archives[user].merged;
            self.archives[user].merged += 1;
            self.totals.archive_entries += 1;
            let entry = self.bots[speaker].syncs[1].entries[place].clone();
            let Some((from, number)) = entry.message else {
                continue; // told when it was read
            };
            let known = self.bots.get(from).and_then(|bot| bot.sent.get(number));
            let Some(sent) = known else {
                let text = format!("{}: {entry:?}", self.users[user].0);
                self.wrong("changed_or_invented", &text, |_| Vec::new());
                continue;
            };
            let own = self.bots[from].profile.user == user;
            let received = sent.to_user == user;
            if sent.fleeting {
                let text = "no-store, but in an archive";
                self.wrong_message("stored_against_its_hint", from, number, text);
                continue;
            }
            let fate = &mut self.books[from].fates[number];
            let again =
                own && fate.in_senders.is_some() || received && fate.in_recipients.is_some();
            if own {
                fate.in_senders.get_or_insert(place);
            }
            if received {
                fate.in_recipients.get_or_insert(place);
            }
            let known_id = fate.stable_id.clone().filter(|_| received);
            if again {
                let text = format!(
                    "once more as {} in the archive of {}",
                    entry.id, self.users[user].0
                );
                self.wrong_message("twice_in_archive", from, number, &text);
                continue;
            }
            if !own && !received {
                let text = format!("in the archive of {}", self.users[user].0);
                self.wrong_message("misdelivered", from, number, &text);
            }
            if let Some(known) = known_id.filter(|known| *known != entry.id) {
                let text = format!("{} in the archive, stable id {known}", entry.id);
                self.wrong_message("archive_id_is_not_stable_id", from, number, &text);
            }
            match self.archives[user].last.get(&from) {
                Some(&last) if last > number => {
                    let text = format!("behind m{last} in the archive of {}", self.users[user].0);
                    self.wrong_messages("archive_reordered", from, &[number, last], &text);
                }
                _ => {
                    self.archives[user].last.insert(from, number);
                }
            }
        }
        // what was read while the load ran: nothing came before it later, nothing went
        let syncs = &self.bots[speaker].syncs;
        let from = self.archives[user].compared;
        let (live, all) = (&syncs[0].entries, &syncs[1].entries);
        let common = live.len().min(all.len());
        let differs = (live[from..] != all[from.min(common)..common])
            .then(|| difference(&all[..common], live));
        self.archives[user].compared = live.len();
        if let Some(text) = differs {
            let text = format!("{} under load: {text}", self.users[user].0);
            self.wrong("archive_changes_behind_its_reader", &text, |_| Vec::new());
        }
    }

    /// A check is over: what it judged is not judged again.
    pub fn close(&mut self) {
        for (from, bot) in self.bots.iter_mut().enumerate() {
            self.books[from].judged = bot.sent.len();
            bot.events.clear();
        }
        self.totals.sent = self.bots.iter().map(|bot| bot.sent.len() as u64).sum();
        let count = |states: &[State]| {
            let all = self.bots.iter().flat_map(|bot| &bot.sent);
            all.filter(|sent| states.contains(&sent.state)).count() as u64
        };
        self.totals.accepted = count(&[State::Accepted, State::Lost]);
        self.totals.refused_messages = count(&[State::Refused]);
        self.totals.accounts_made = self
            .bots
            .iter()
            .filter(|bot| bot.registered && bot.profile.speaker)
            .count() as u64;
        self.totals.changes_answered = self.bots.iter().map(|bot| bot.changes_answered).sum();
        self.totals.archive_waits = self.bots.iter().map(|bot| bot.archive_waits).sum();
        self.totals.resumptions = self.bots.iter().map(|bot| bot.resumptions).sum();
        self.totals.failed_resumptions = self.bots.iter().map(|bot| bot.failed_resumptions).sum();
    }
}

/// The first difference of two lists that should be equal.
fn difference(now: &[Entry], then: &[Entry]) -> String {
    let place = (0..now.len().max(then.len()))
        .find(|place| now.get(*place) != then.get(*place))
        .unwrap_or(0);
    format!(
        "place {place} is {:?} and was {:?} (lengths {} and {})",
        now.get(place),
        then.get(place),
        now.len(),
        then.len()
    )
}
