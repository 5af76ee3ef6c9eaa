//! The configuration form of a room (XEP-0045 sections 10.2 and 15.5.3): every field that the registry has, but those for logs of
//! other kinds than the archive and for publish-subscribe nodes.

use std::collections::BTreeSet;

use super::Limits;
use crate::store::room::{Affiliate, Affiliation, RoomRecord, Settings, Who};
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::{Field, Form, Kind, Values};

pub const FORM_TYPE: &str = "http://jabber.org/protocol/muc#roomconfig";

const TITLE_BYTES_MAX: usize = 256;
const DESCRIPTION_BYTES_MAX: usize = 4096;
const PASSWORD_BYTES_MAX: usize = 256;

const PRIVATE: &[(&str, Who)] = &[
    ("anyone", Who::Anyone),
    ("participants", Who::Participants),
    ("moderators", Who::Moderators),
    ("none", Who::Nobody),
];
const ROLES: &[(&str, u8)] = &[
    ("moderator", Settings::MODERATORS),
    ("participant", Settings::PARTICIPANTS),
    ("visitor", Settings::VISITORS),
];
const WHOIS: &[(&str, bool)] = &[("anyone", true), ("moderators", false)];

/// What a room is when its maker says nothing.
pub fn default(limits: &Limits) -> Settings {
    Settings {
        persistent: limits.persistent,
        public: true,
        archived: true,
        invites: true,
        subject_open: false,
        history_max: limits.history_max.min(20) as u32,
        presence_of: Settings::ALL,
        member_list_for: Settings::ALL,
        ..Settings::default()
    }
}

fn bits(list: u8) -> impl Iterator<Item = &'static str> {
    let named = ROLES.iter().filter(move |(_, bit)| list & bit != 0);
    named.map(|(name, _)| *name)
}

fn name_of<T: PartialEq>(choices: &[(&'static str, T)], value: &T) -> &'static str {
    let found = choices.iter().find(|(_, choice)| choice == value);
    found.map_or("", |(name, _)| name)
}

pub fn form(jid: &str, state: &RoomRecord, limits: &Limits) -> Form {
    let s = &state.settings;
    let of = |affiliation: Affiliation| {
        let all = state.affiliates.iter();
        all.filter(move |one| one.affiliation == affiliation)
            .map(|one| one.jid.as_str())
    };
    let roles = |field: Field| {
        field
            .option("Moderators", "moderator")
            .option("Participants", "participant")
            .option("Visitors", "visitor")
    };
    let whole = limits.occupants_max.to_string();
    let occupants_max = match s.occupants_max {
        0 => whole.clone(),
        most => most.to_string(),
    };
    let mut occupants =
        Field::list("muc#roomconfig_maxusers", &occupants_max).label("Most people in the room");
    let mut choices: BTreeSet<usize> = [10, 20, 30, 50, 100, 350, 1000].into();
    choices.retain(|most| *most < limits.occupants_max);
    choices.extend([limits.occupants_max]);
    choices.extend(occupants_max.parse::<usize>());
    for most in choices {
        occupants = occupants.option(most.to_string(), most.to_string());
    }
    Form::new(Kind::Form, FORM_TYPE)
        .title(format!("Configuration of {jid}"))
        .field(Field::text("muc#roomconfig_roomname", &s.title).label("Name"))
        .field(Field::text("muc#roomconfig_roomdesc", &s.description).label("Description"))
        .field(Field::text("muc#roomconfig_lang", &s.lang).label("Language of the discussions"))
        .field(
            Field::boolean("muc#roomconfig_persistentroom", s.persistent)
                .label("Stays when nobody is in"),
        )
        .field(Field::boolean("muc#roomconfig_publicroom", s.public).label("Can be found"))
        .field(
            Field::boolean("muc#roomconfig_membersonly", s.members_only).label("For members only"),
        )
        .field(
            Field::boolean("muc#roomconfig_moderatedroom", s.moderated)
                .label("Moderated: voice is given"),
        )
        .field(
            Field::boolean(
                "muc#roomconfig_passwordprotectedroom",
                !s.password.is_empty(),
            )
            .label("A password is needed"),
        )
        .field(Field::private("muc#roomconfig_roomsecret", &s.password).label("Password"))
        .field(
            Field::list("muc#roomconfig_whois", name_of(WHOIS, &s.non_anonymous))
                .label("Who sees real addresses")
                .option("Moderators", "moderators")
                .option("Anyone", "anyone"),
        )
        .field(
            Field::boolean("muc#roomconfig_enablelogging", s.archived)
                .label("Messages are archived"),
        )
        .field(
            Field::boolean("muc#roomconfig_changesubject", s.subject_open)
                .label("Participants may change the subject"),
        )
        .field(
            Field::boolean("muc#roomconfig_allowinvites", s.invites).label("Everybody may invite"),
        )
        .field(
            Field::list(
                "muc#roomconfig_allowpm",
                name_of(PRIVATE, &s.private_messages),
            )
            .label("Who may send private messages")
            .option("Anyone", "anyone")
            .option("Those with voice", "participants")
            .option("Moderators", "moderators")
            .option("Nobody", "none"),
        )
        .field(roles(
            Field::lists("muc#roomconfig_presencebroadcast", bits(s.presence_of))
                .label("Whose presence is shown"),
        ))
        .field(roles(
            Field::lists("muc#roomconfig_getmemberlist", bits(s.member_list_for))
                .label("Who may see the list of members"),
        ))
        .field(occupants)
        .field(
            Field::text("muc#maxhistoryfetch", &s.history_max.to_string())
                .label("Messages shown to who comes in"),
        )
        .field(Field::jids("muc#roomconfig_roomadmins", of(Affiliation::Admin)).label("Admins"))
        .field(Field::jids("muc#roomconfig_roomowners", of(Affiliation::Owner)).label("Owners"))
}

/// The state with what the form says; fields that are not there stay as they are.
pub fn read(values: &Values, old: &RoomRecord, limits: &Limits) -> Result<RoomRecord, StanzaError> {
    let mut state = old.clone();
    let s = &mut state.settings;
    let texts = [
        ("muc#roomconfig_roomname", &mut s.title, TITLE_BYTES_MAX),
        ("muc#roomconfig_lang", &mut s.lang, 64),
    ];
    for (var, place, most) in texts {
        if let Some(text) = values.text(var, most)? {
            *place = text.to_owned();
        }
    }
    if let Some(text) = values.lines("muc#roomconfig_roomdesc", DESCRIPTION_BYTES_MAX)? {
        s.description = text;
    }
    let booleans = [
        ("muc#roomconfig_persistentroom", &mut s.persistent),
        ("muc#roomconfig_publicroom", &mut s.public),
        ("muc#roomconfig_membersonly", &mut s.members_only),
        ("muc#roomconfig_moderatedroom", &mut s.moderated),
        ("muc#roomconfig_enablelogging", &mut s.archived),
        ("muc#roomconfig_changesubject", &mut s.subject_open),
        ("muc#roomconfig_allowinvites", &mut s.invites),
    ];
    for (var, place) in booleans {
        if let Some(value) = values.boolean(var)? {
            *place = value;
        }
    }
    let secret = values.text("muc#roomconfig_roomsecret", PASSWORD_BYTES_MAX)?;
    match (
        values.boolean("muc#roomconfig_passwordprotectedroom")?,
        secret,
    ) {
        (Some(false), _) => s.password.clear(),
        (Some(true), Some("")) | (Some(true), None) if s.password.is_empty() => {
            return Err(StanzaError::NOT_ACCEPTABLE.text("a password is needed"));
        }
        (_, Some("")) | (_, None) => {}
        (Some(true), Some(secret)) => s.password = secret.to_owned(),
        // a secret alone does not switch protection on
        (None, Some(secret)) if !s.password.is_empty() => s.password = secret.to_owned(),
        (None, Some(_)) => {}
    }
    if let Some(value) = values.choice("muc#roomconfig_whois", WHOIS)? {
        s.non_anonymous = *value;
    }
    if let Some(value) = values.choice("muc#roomconfig_allowpm", PRIVATE)? {
        s.private_messages = *value;
    }
    let lists = [
        ("muc#roomconfig_presencebroadcast", &mut s.presence_of),
        ("muc#roomconfig_getmemberlist", &mut s.member_list_for),
    ];
    for (var, place) in lists {
        if let Some(names) = values.get(var) {
            *place = 0;
            for name in names {
                let bit = ROLES.iter().find(|(one, _)| one == name);
                let bit = bit.ok_or(StanzaError::NOT_ACCEPTABLE.text("there is no such role"))?;
                *place |= bit.1;
            }
        }
    }
    match values.one("muc#roomconfig_maxusers")? {
        None => {}
        Some("" | "none") => s.occupants_max = 0,
        Some(text) => match text.parse::<usize>() {
            Ok(most) if most == limits.occupants_max => s.occupants_max = 0,
            Ok(most) if (1..limits.occupants_max).contains(&most) => {
                s.occupants_max = most as u32;
            }
            _ => {
                return Err(StanzaError::NOT_ACCEPTABLE.text("no room may have so many people"));
            }
        },
    }
    if let Some(most) = values.number("muc#maxhistoryfetch")? {
        s.history_max = most.min(limits.history_max as u64) as u32;
    }
    for (var, affiliation) in [
        ("muc#roomconfig_roomadmins", Affiliation::Admin),
        ("muc#roomconfig_roomowners", Affiliation::Owner),
    ] {
        if let Some(jids) = values.jids(var)? {
            replace(&mut state, affiliation, jids.iter().map(|jid| jid.bare()));
        }
    }
    if state.owners() == 0 {
        return Err(StanzaError::CONFLICT.text("a room must have an owner"));
    }
    if state.affiliates.len() > limits.affiliates_max
        && state.affiliates.len() > old.affiliates.len()
    {
        return Err(StanzaError::RESOURCE_CONSTRAINT.text("the room has too many affiliations"));
    }
    Ok(state)
}

/// Exactly these have the affiliation; who had it becomes a member.
fn replace<'a>(
    state: &mut RoomRecord,
    affiliation: Affiliation,
    jids: impl Iterator<Item = &'a str>,
) {
    let new: BTreeSet<&str> = jids.collect();
    for one in &mut state.affiliates {
        if one.affiliation == affiliation && !new.contains(&*one.jid) {
            one.affiliation = Affiliation::Member;
        }
    }
    for jid in new {
        state.affiliate_as(Affiliate {
            jid: jid.into(),
            affiliation,
            ..Affiliate::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::Element;
    use crate::xmpp::testing;

    fn room() -> RoomRecord {
        let mut state = RoomRecord {
            settings: default(&testing::limits().rooms),
            ..RoomRecord::default()
        };
        replace(&mut state, Affiliation::Owner, ["o@x"].into_iter());
        state
    }

    fn set(state: &RoomRecord, fields: &[(&str, &str)]) -> Result<RoomRecord, StanzaError> {
        let mut x = Element::new("x", "jabber:x:data").attr("type", "submit");
        for (var, value) in fields {
            let value = Element::new("value", "jabber:x:data").text(*value);
            let field = Element::new("field", "jabber:x:data").attr("var", *var);
            x = x.child(field.child(value));
        }
        let values = Values::read(&x, FORM_TYPE).unwrap();
        read(&values, state, &testing::limits().rooms)
    }

    #[test]
    fn what_the_form_shows_means_no_change_when_it_comes_back() {
        let limits = testing::limits().rooms;
        let mut state = room();
        state.settings.password = "secret".into();
        state.settings.occupants_max = 17;
        state.settings.description = "two\nlines".into();
        replace(&mut state, Affiliation::Admin, ["a@x", "b@x"].into_iter());
        let mut x = form("r@x", &state, &limits).element();
        x.set("type", "submit");
        let values = Values::read(&x, FORM_TYPE).unwrap();
        assert_eq!(read(&values, &state, &limits), Ok(state));
    }

    #[test]
    fn each_field_says_what_it_is_called_after() {
        let s = set(
            &room(),
            &[
                ("muc#roomconfig_roomname", "Desk"),
                ("muc#roomconfig_persistentroom", "1"),
                ("muc#roomconfig_publicroom", "0"),
                ("muc#roomconfig_membersonly", "true"),
                ("muc#roomconfig_moderatedroom", "1"),
                ("muc#roomconfig_passwordprotectedroom", "1"),
                ("muc#roomconfig_roomsecret", "x"),
                ("muc#roomconfig_whois", "anyone"),
                ("muc#roomconfig_allowpm", "moderators"),
                ("muc#roomconfig_maxusers", "10"),
                ("muc#maxhistoryfetch", "5"),
            ],
        );
        let s = s.unwrap().settings;
        assert!(s.persistent && !s.public && s.members_only && s.moderated && s.non_anonymous);
        assert_eq!((&*s.title, &*s.password), ("Desk", "x"));
        assert_eq!(
            (s.private_messages, s.occupants_max, s.history_max),
            (Who::Moderators, 10, 5)
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (field, condition) in [
            (
                ("muc#roomconfig_passwordprotectedroom", "1"),
                "not-acceptable",
            ),
            (("muc#roomconfig_maxusers", "1000000000"), "not-acceptable"),
            (("muc#roomconfig_maxusers", "0"), "not-acceptable"),
            (("muc#roomconfig_whois", "nobody"), "not-acceptable"),
            (("muc#roomconfig_membersonly", "maybe"), "not-acceptable"),
            (("muc#roomconfig_roomowners", ""), "conflict"),
            (
                ("muc#roomconfig_presencebroadcast", "king"),
                "not-acceptable",
            ),
        ] {
            assert_eq!(
                set(&room(), &[field]).unwrap_err().condition,
                condition,
                "{field:?}"
            );
        }
    }
}
