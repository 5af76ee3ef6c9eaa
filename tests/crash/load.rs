//! What one client does from the start of a round until the server is killed.

use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::bot::{Bot, State, Trouble};
use crate::round::Round;

/// How a client spends a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub enum Role {
    /// Logs in and stays until the end.
    Online,
    /// Not there.
    Offline,
    /// Logs in, is cut off at some instant, and does not come back before the kill: the server keeps its session.
    Cut,
    /// As [`Role::Cut`], but the connection stays: it neither reads nor writes any more.
    Mute,
    /// Is cut off and resumes, again and again.
    Resuming,
    /// Logs in and out in order.
    Visiting,
}

impl Role {
    /// Half on line, a quarter off line, a quarter cut off or resuming.
    pub fn draw(rng: &mut Rng, sm: bool) -> Role {
        match (rng.u8(..100), sm) {
            (0..42, _) => Role::Online,
            (42..50, _) => Role::Visiting,
            (50..75, _) => Role::Offline,
            (75..86, true) => Role::Cut,
            (86..90, true) => Role::Mute,
            (_, true) => Role::Resuming,
            (_, false) => Role::Online,
        }
    }

    pub fn sends(self) -> bool {
        self != Role::Offline
    }
}

/// One client's round; `kill_at` is about when the kill comes.
pub fn play(bot: &mut Bot, round: &Round, role: Role, kill_at: Duration, rng: &mut Rng) {
    if role == Role::Offline {
        return;
    }
    if let Err(trouble) = act(bot, round, role, kill_at, rng) {
        match trouble {
            Trouble::Gone if round.is_killed() => {}
            Trouble::Gone => end(bot, round),
            // an answer that does not come because the server is killed while one waits is none
            Trouble::Refused(_) if round.is_killed() => {}
            Trouble::Refused(why) => {
                bot.note(round, why.clone());
                bot.wrong("refused", why);
            }
        }
    }
    match role {
        Role::Mute => {
            round.await_death(Duration::from_secs(30));
            bot.cut(round);
        }
        _ => bot.drain(round),
    }
}

fn act(
    bot: &mut Bot,
    round: &Round,
    role: Role,
    kill_at: Duration,
    rng: &mut Rng,
) -> Result<(), Trouble> {
    let resume = rng.u8(..10) < 8;
    bot.log_in(round, resume)?;
    let some_time = |rng: &mut Rng| kill_at.mul_f64(0.1 + 0.7 * rng.f64());
    match role {
        Role::Offline => {}
        Role::Online => chat(bot, round, rng, None)?,
        Role::Cut | Role::Mute => {
            let until = some_time(rng);
            chat(bot, round, rng, Some(until))?;
            if role == Role::Cut {
                bot.cut(round);
            }
        }
        Role::Resuming => loop {
            let until = Duration::from_millis(rng.u64(5..120));
            chat(bot, round, rng, Some(until))?;
            bot.cut(round);
            if round.is_killed() {
                return Ok(());
            }
            bot.log_in(round, true)?;
        },
        Role::Visiting => loop {
            let until = some_time(rng);
            chat(bot, round, rng, Some(until))?;
            bot.leave(round);
            if round.await_death(Duration::from_millis(rng.u64(5..100))) {
                return Ok(());
            }
            bot.log_in(round, false)?;
        },
    }
    Ok(())
}

/// Sends and receives until the connection ends or `for_as_long` has passed.
fn chat(
    bot: &mut Bot,
    round: &Round,
    rng: &mut Rng,
    for_as_long: Option<Duration>,
) -> Result<(), Trouble> {
    /// Stanzas that no count covers yet: then the client waits for one.
    const OPEN_MAX: usize = 300;
    let end = for_as_long.map(|time| Instant::now() + time);
    let mut next_burst = Instant::now();
    loop {
        let now = Instant::now();
        if end.is_some_and(|end| now >= end) {
            return Ok(());
        }
        if now >= next_burst && bot.open() < OPEN_MAX {
            let count = rng.u32(1..=6);
            for _ in 0..count {
                one_message(bot, round, rng);
            }
            let mean = round.message_every * count;
            next_burst = now + mean.mul_f64(2.0 * rng.f64());
            something_else(bot, round, rng);
        }
        if bot.open() >= OPEN_MAX {
            bot.ask_count(round);
        }
        let wait = next_burst.saturating_duration_since(Instant::now());
        let wait = wait.clamp(Duration::from_millis(1), Duration::from_millis(20));
        if !bot.listen(round, wait) {
            return Err(Trouble::Gone);
        }
    }
}

fn one_message(bot: &mut Bot, round: &Round, rng: &mut Rng) {
    let newcomer = || {
        let newcomers = round.newcomers.lock().unwrap();
        newcomers.last().copied()
    };
    let user = match rng.u8(..100) {
        0..6 => bot.profile.user,
        6..12 => newcomer().unwrap_or(0),
        _ => rng.usize(..round.lasting),
    };
    let clients = &round.users[user].1;
    let to_bot =
        (user < round.lasting && rng.u8(..10) < 3).then(|| clients[rng.usize(..clients.len())]);
    let fleeting = rng.u8(..100) < 3;
    bot.message(round, user, to_bot, fleeting);
}

/// Now and then: counts, changes of the account, subscriptions, a look into the archive.
fn something_else(bot: &mut Bot, round: &Round, rng: &mut Rng) {
    if rng.u8(..10) < 4 {
        bot.ask_count(round);
    }
    if rng.u8(..10) < 2 {
        bot.acknowledge(round);
    }
    if round.archive && rng.u8(..10) == 0 {
        retract(bot, round, rng);
    }
    if !bot.profile.speaker {
        return;
    }
    if round.archive && rng.u8(..20) == 0 {
        bot.synchronise(round, 0);
    }
    if rng.u8(..100) < 4 {
        let user = rng.usize(..round.lasting);
        if user != bot.profile.user && !bot.subscribed.contains_key(&user) {
            bot.subscribe(round, user);
        }
    }
    if rng.u8(..100) < 20 {
        change(bot, round, rng);
    }
}

/// Takes back one of the last messages that the server has accepted.
fn retract(bot: &mut Bot, round: &Round, rng: &mut Rng) {
    /// How far back.
    const LAST: usize = 40;
    let first = bot.sent.len().saturating_sub(LAST);
    let may = |number: &usize| {
        let sent = &bot.sent[*number];
        // newcomers of earlier rounds do not come any more
        let comes = sent.to_user < round.lasting || sent.round == round.number;
        comes && sent.state == State::Accepted && !sent.fleeting && sent.retracts.is_none()
    };
    let candidates: Vec<usize> = (first..bot.sent.len()).filter(may).collect();
    if let Some(number) = rng.choice(candidates) {
        bot.retract(round, number);
    }
}

fn change(bot: &mut Bot, round: &Round, rng: &mut Rng) {
    let value = format!("v{}", rng.u32(..));
    let contact = format!("c{}@example.org", rng.u8(..12));
    match rng.u8(..100) {
        0..35 => {
            let iq = format!(
                "<query xmlns='jabber:iq:roster'><item jid='{contact}' name='{value}'><group>g</group></item></query>"
            );
            bot.change(round, &format!("roster:{contact}"), Some(value), &iq);
        }
        35..45 => {
            let key = format!("roster:{contact}");
            // removing what is not there is an error, and no change
            if bot.facts.allowed(&key).iter().all(Option::is_some) {
                let iq = format!(
                    "<query xmlns='jabber:iq:roster'><item jid='{contact}' subscription='remove'/></query>"
                );
                bot.change(round, &key, None, &iq);
            }
        }
        45..55 => {
            let iq = format!(
                "<query xmlns='jabber:iq:private'><note xmlns='urn:example:note'>{value}</note></query>"
            );
            bot.change(round, "private", Some(value), &iq);
        }
        55..63 => {
            let iq = format!("<vCard xmlns='vcard-temp'><NICKNAME>{value}</NICKNAME></vCard>");
            bot.change(round, "vcard", Some(value), &iq);
        }
        63..69 => {
            let iq = format!("<block xmlns='urn:xmpp:blocking'><item jid='{contact}'/></block>");
            bot.change(
                round,
                &format!("block:{contact}"),
                Some("blocked".into()),
                &iq,
            );
        }
        69..73 => {
            let iq =
                format!("<unblock xmlns='urn:xmpp:blocking'><item jid='{contact}'/></unblock>");
            bot.change(round, &format!("block:{contact}"), None, &iq);
        }
        73..86 => {
            // so long that the items of one node need several documents
            let pad = "x".repeat(1000);
            let item = format!("i{}", rng.u8(..20));
            let note = format!("<note xmlns='urn:example:note' pad='{pad}'>{value}</note>");
            let options = "<publish-options><x xmlns='jabber:x:data' type='submit'><field var='pubsub#max_items'>\
                           <value>max</value></field></x></publish-options>";
            let iq = format!(
                "<pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='urn:example:notes'><item id='{item}'>{note}</item>\
                 </publish>{options}</pubsub>"
            );
            bot.change(round, &format!("item:{item}"), Some(value), &iq);
        }
        86..90 => {
            let item = format!("i{}", rng.u8(..20));
            let key = format!("item:{item}");
            if bot.facts.allowed(&key).iter().all(Option::is_some) {
                let iq = format!(
                    "<pubsub xmlns='http://jabber.org/protocol/pubsub'><retract node='urn:example:notes'><item id='{item}'/></retract></pubsub>"
                );
                bot.change(round, &key, None, &iq);
            }
        }
        90..93 => {
            let iq = format!(
                "<pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='http://jabber.org/protocol/nick'><item id='current'>\
                 <nick xmlns='http://jabber.org/protocol/nick'>{value}</nick></item></publish></pubsub>"
            );
            bot.change(round, "nick", Some(value), &iq);
        }
        93..96 if round.archive => {
            // somebody who does not exist: what is archived stays the same
            let iq = format!(
                "<prefs xmlns='urn:xmpp:mam:2' default='always'><never><jid>{value}@example.org</jid></never></prefs>"
            );
            bot.change(round, "prefs", Some(value), &iq);
        }
        _ if bot.profile.alone => {
            let name = &bot.profile.name;
            let iq = format!(
                "<query xmlns='jabber:iq:register'><username>{name}</username><password>{value}</password></query>"
            );
            bot.change(round, "password", Some(value), &iq);
        }
        _ => {}
    }
}

fn end(bot: &mut Bot, round: &Round) {
    // the kill may be on its way: the connection ended a moment before it was announced only if the server did it
    let text = format!("{}: the connection ended while the server lived", bot.jid());
    bot.note(round, text.clone());
    bot.wrong("disconnects", text);
}

/// Makes new accounts, one after the other, until the server is killed.
pub fn register(bots: &mut [Bot], round: &Round, rng: &mut Rng) {
    for bot in bots {
        match bot.register(round, crate::PASSWORD) {
            Ok(()) => round.newcomers.lock().unwrap().push(bot.profile.user),
            Err(Trouble::Refused(why)) if !round.is_killed() => bot.wrong("refused", why),
            Err(_) => {}
        }
        if round.await_death(Duration::from_millis(rng.u64(20..300))) {
            return;
        }
    }
}
