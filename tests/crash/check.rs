//! After a restart: everybody logs in, takes what is his, and compares what he finds with what he was promised.
//!
//! In: the world after one or more kills, a server that serves. Out: everything judged, everybody gone.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::bot::{ANSWER_WITHIN, Bot, Trouble};
use crate::judge::World;
use crate::round::Round;

/// How long nothing may come while something is missing, until it counts as lost.
const PATIENCE: Duration = Duration::from_secs(5);

/// What may be looked at.
#[derive(Clone, Copy)]
pub struct Scope {
    pub archive: bool,
    /// The last check of the run: archives also as a whole, and every account that was ever made.
    pub last: bool,
}

/// Runs `task` for each of these clients, all at once, in threads.
fn each(
    world: &mut World,
    round: &Round,
    users: &[usize],
    task: impl Fn(&mut Bot) -> Result<(), Trouble> + Sync,
) {
    std::thread::scope(|scope| {
        for bot in &mut world.bots {
            if !users.contains(&bot.profile.user) {
                continue;
            }
            let task = &task;
            scope.spawn(move || {
                if let Err(trouble) = task(bot) {
                    let text = format!("{}: {trouble:?}", bot.jid());
                    bot.note(round, text.clone());
                    bot.wrong("refused", text);
                }
            });
        }
    });
    world.merge();
}

/// `users`: all but those who are retired.
pub fn check(world: &mut World, round: &Round, users: &[usize], scope: Scope) {
    each(world, round, users, |bot| {
        if !bot.registered {
            bot.register(round, crate::PASSWORD)?;
        }
        // whoever can asks for the count of his last stream
        bot.log_in(round, true)?;
        bot.settle_password();
        bot.message(round, bot.profile.user, None, false);
        let deadline = Instant::now() + ANSWER_WITHIN;
        while bot.profile.sm && bot.open() > 0 {
            bot.ask_count(round);
            if !bot.listen(round, Duration::from_millis(50)) {
                return Err(Trouble::Gone);
            }
            if Instant::now() > deadline {
                return Err(Trouble::Refused(format!(
                    "{} stanzas are never covered",
                    bot.open()
                )));
            }
        }
        Ok(())
    });
    take_all(world, round, users);
    // an answer behind all that is on the way: so that late duplicates are seen
    each(world, round, users, |bot| {
        bot.ask(
            round,
            "<iq type='get' id='{id}'><ping xmlns='urn:xmpp:ping'/></iq>",
        )?;
        bot.acknowledge(round);
        Ok(())
    });
    world.judge_losses();
    if scope.archive {
        each(world, round, users, |bot| {
            if bot.profile.speaker {
                bot.synchronise_all(round, 1)?;
                if scope.last {
                    bot.synchronise_all(round, 2)?;
                }
            }
            Ok(())
        });
        world.judge_archives(users, scope.last);
        if scope.last {
            world.judge_retractions(users);
        }
    }
    judge_accounts(world, round, users);
    each(world, round, users, |bot| {
        bot.leave(round);
        Ok(())
    });
    if scope.last {
        let everybody: Vec<usize> = (0..world.users.len()).collect();
        each(world, round, &everybody, |bot| {
            match bot.profile.speaker && bot.registered {
                true => bot.can_log_in(round),
                false => Ok(()),
            }
        });
    }
    world.close();
}

/// Everybody listens until nothing is missing, or nothing comes any more.
fn take_all(world: &mut World, round: &Round, users: &[usize]) {
    let mut last = (usize::MAX, Instant::now());
    loop {
        for bot in &mut world.bots {
            if users.contains(&bot.profile.user) {
                bot.listen(round, Duration::ZERO);
            }
        }
        world.merge();
        let missing = world.missing().len();
        if missing == 0 {
            return;
        }
        if missing != last.0 {
            last = (missing, Instant::now());
        }
        if last.1.elapsed() > PATIENCE {
            return;
        }
        // the poll's interval; the bound is the patience
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What an account's roster says of another account.
struct Item {
    subscription: String,
    asks: bool,
}

/// Rosters, private data, vCards, nodes, block lists and subscriptions are as answered.
fn judge_accounts(world: &mut World, round: &Round, users: &[usize]) {
    let mut rosters: BTreeMap<usize, BTreeMap<usize, Item>> = BTreeMap::new();
    for &user in users {
        let speaker = world.speaker(user);
        let bot = &mut world.bots[speaker];
        match read_account(bot, round) {
            Ok((found, roster)) => {
                for difference in bot.facts.judge(&found) {
                    let text = format!("{}: {difference}", bot.profile.name);
                    bot.note(round, text.clone());
                    bot.wrong("changes_lost", text);
                }
                rosters.insert(user, roster);
            }
            Err(trouble) => bot.wrong("refused", format!("{}: {trouble:?}", bot.jid())),
        }
    }
    let mut wrong = Vec::new();
    for &user in users {
        let speaker = &world.bots[world.speaker(user)];
        let item = |of: usize, about: usize| rosters.get(&of).and_then(|roster| roster.get(&about));
        let name = |user: usize| &world.users[user].0;
        for (&other, covered) in &speaker.subscribed {
            let there = item(user, other)
                .is_some_and(|item| item.asks || matches!(&*item.subscription, "to" | "both"));
            let told = world.bots[world.speaker(other)].requests.contains(&user);
            if *covered && rosters.contains_key(&user) && !(there && told) {
                wrong.push(format!(
                    "{} asked {}, covered; in his roster: {there}, told to the other: {told}",
                    name(user),
                    name(other)
                ));
            }
        }
        for (&other, covered) in &speaker.approved {
            let here = item(user, other)
                .is_some_and(|item| matches!(&*item.subscription, "from" | "both"));
            let there =
                item(other, user).is_some_and(|item| matches!(&*item.subscription, "to" | "both"));
            let read = rosters.contains_key(&user) && rosters.contains_key(&other);
            if *covered && read && !(here && there) {
                wrong.push(format!(
                    "{} let {} subscribe, covered; in his roster: {here}, in the other's: {there}",
                    name(user),
                    name(other)
                ));
            }
        }
    }
    for text in wrong {
        world.wrong("subscriptions_lost", &text, |_| Vec::new());
    }
    world.merge();
}

type Account = (BTreeMap<String, String>, BTreeMap<usize, Item>);

fn read_account(bot: &mut Bot, round: &Round) -> Result<Account, Trouble> {
    let mut found = BTreeMap::new();
    let mut roster = BTreeMap::new();
    let get = |content: &str| format!("<iq type='get' id='{{id}}'>{content}</iq>");
    let answer = bot.ask(round, &get("<query xmlns='jabber:iq:roster'/>"))?;
    for item in answer
        .child("query")
        .into_iter()
        .flat_map(|query| &query.children)
    {
        let jid = item.attribute("jid").unwrap_or_default();
        match round.user(jid) {
            Some(user) => {
                let subscription = item
                    .attribute("subscription")
                    .unwrap_or_default()
                    .to_owned();
                let asks = item.attribute("ask") == Some("subscribe");
                roster.insert(user, Item { subscription, asks });
            }
            None => {
                let name = item.attribute("name").unwrap_or_default().to_owned();
                found.insert(format!("roster:{jid}"), name);
            }
        }
    }
    let answer = bot.ask(
        round,
        &get("<query xmlns='jabber:iq:private'><note xmlns='urn:example:note'/></query>"),
    )?;
    let note = answer.child("query").and_then(|query| query.child("note"));
    let text = note
        .map(|note| note.text.clone())
        .filter(|text| !text.is_empty());
    found.extend(text.map(|text| ("private".to_owned(), text)));
    let answer = bot.ask(round, &get("<vCard xmlns='vcard-temp'/>"))?;
    let name = answer
        .child("vCard")
        .and_then(|card| card.child("NICKNAME"));
    found.extend(name.map(|name| ("vcard".to_owned(), name.text.clone())));
    for (node, of) in [
        ("urn:example:notes", "item:"),
        ("http://jabber.org/protocol/nick", "nick"),
    ] {
        let items = format!(
            "<pubsub xmlns='http://jabber.org/protocol/pubsub'><items node='{node}'/></pubsub>"
        );
        let answer = bot.ask(round, &get(&items))?;
        let items = answer
            .child("pubsub")
            .and_then(|pubsub| pubsub.child("items"));
        for item in items.into_iter().flat_map(|items| &items.children) {
            let key = match of {
                "nick" => of.to_owned(),
                of => format!("{of}{}", item.attribute("id").unwrap_or_default()),
            };
            let text = item.children.first().map(|payload| payload.text.clone());
            found.insert(key, text.unwrap_or_default());
        }
    }
    if round.archive {
        let answer = bot.ask(round, &get("<prefs xmlns='urn:xmpp:mam:2'/>"))?;
        let never = answer.child("prefs").and_then(|prefs| prefs.child("never"));
        for jid in never.into_iter().flat_map(|never| &never.children) {
            let (value, _) = jid.text.split_once('@').unwrap_or((&jid.text, ""));
            found.insert("prefs".to_owned(), value.to_owned());
        }
    }
    let answer = bot.ask(round, &get("<blocklist xmlns='urn:xmpp:blocking'/>"))?;
    for item in answer
        .child("blocklist")
        .into_iter()
        .flat_map(|list| &list.children)
    {
        let jid = item.attribute("jid").unwrap_or_default();
        found.insert(format!("block:{jid}"), "blocked".to_owned());
    }
    Ok((found, roster))
}
