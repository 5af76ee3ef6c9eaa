//! Roles and affiliations, and who may do what to whom (XEP-0045 section 5): pure decisions.

use crate::store::room::{Affiliation, Settings};
use crate::xmpp::error::StanzaError;

/// Section 5.1, ascending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Not in the room.
    None,
    Visitor,
    Participant,
    Moderator,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::None => "none",
            Role::Visitor => "visitor",
            Role::Participant => "participant",
            Role::Moderator => "moderator",
        }
    }

    pub fn parse(text: &str) -> Option<Role> {
        Some(match text {
            "none" => Role::None,
            "visitor" => Role::Visitor,
            "participant" => Role::Participant,
            "moderator" => Role::Moderator,
            _ => return None,
        })
    }

    /// The bit of [`Settings::presence_of`] and [`Settings::member_list_for`].
    pub fn bit(self) -> u8 {
        match self {
            Role::None => 0,
            Role::Visitor => Settings::VISITORS,
            Role::Participant => Settings::PARTICIPANTS,
            Role::Moderator => Settings::MODERATORS,
        }
    }
}

impl Affiliation {
    pub fn as_str(self) -> &'static str {
        match self {
            Affiliation::Outcast => "outcast",
            Affiliation::None => "none",
            Affiliation::Member => "member",
            Affiliation::Admin => "admin",
            Affiliation::Owner => "owner",
        }
    }

    pub fn parse(text: &str) -> Option<Affiliation> {
        Some(match text {
            "outcast" => Affiliation::Outcast,
            "none" => Affiliation::None,
            "member" => Affiliation::Member,
            "admin" => Affiliation::Admin,
            "owner" => Affiliation::Owner,
            _ => return None,
        })
    }

    /// With which he comes in (section 5.1.2).
    pub fn role(self, moderated: bool) -> Role {
        match self {
            Affiliation::Outcast => Role::None,
            Affiliation::None if moderated => Role::Visitor,
            Affiliation::None | Affiliation::Member => Role::Participant,
            Affiliation::Admin | Affiliation::Owner => Role::Moderator,
        }
    }
}

/// May somebody change the role of somebody in the room (sections 5.1.3, 8.2 to 8.4, 9.6, 9.7)?
pub fn may_change_role(
    (actor, actor_role): (Affiliation, Role),
    (target, target_role): (Affiliation, Role),
    new: Role,
) -> Result<(), StanzaError> {
    let admin = actor >= Affiliation::Admin;
    if actor_role < Role::Moderator && !admin {
        return Err(StanzaError::FORBIDDEN);
    }
    // 9.6, 9.7: to make a moderator, or to take that away, is for admins
    if (new == Role::Moderator || target_role == Role::Moderator) && !admin {
        return Err(match new {
            Role::Moderator => StanzaError::FORBIDDEN,
            _ => StanzaError::NOT_ALLOWED,
        });
    }
    // 8.2: nobody does it to those above him; admins and owners are moderators always (5.1.2)
    if new < target_role && (target > actor || target >= Affiliation::Admin) {
        return Err(StanzaError::NOT_ALLOWED);
    }
    Ok(())
}

/// May somebody change an affiliation (section 5.2.2 and 9.1 to 10.8)?
pub fn may_change_affiliation(
    actor: Affiliation,
    old: Affiliation,
    new: Affiliation,
) -> Result<(), StanzaError> {
    match actor {
        Affiliation::Owner => Ok(()),
        // 5.2.2: those of admins and owners are for owners
        Affiliation::Admin if old >= Affiliation::Admin => Err(StanzaError::NOT_ALLOWED),
        Affiliation::Admin if new >= Affiliation::Admin => Err(StanzaError::FORBIDDEN),
        Affiliation::Admin => Ok(()),
        _ => Err(StanzaError::FORBIDDEN),
    }
}

/// May somebody see the list of those with an affiliation?
pub fn may_list(
    settings: &Settings,
    (actor, role): (Affiliation, Role),
    list: Affiliation,
) -> bool {
    match list {
        _ if actor >= Affiliation::Admin => true,
        // 9.5: whom the configuration lets in; those who are members themselves in a room for members (muc_membersonly)
        Affiliation::Member | Affiliation::Admin | Affiliation::Owner => {
            settings.member_list_for & role.bit() != 0
                && (settings.non_anonymous || role == Role::Moderator)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Affiliation as A;
    use Role as R;

    fn condition(result: Result<(), StanzaError>) -> &'static str {
        result.map_or_else(|error| error.condition, |()| "")
    }

    #[test]
    fn the_role_at_coming_in_is_that_of_the_table() {
        for (affiliation, open, moderated) in [
            (A::Outcast, R::None, R::None),
            (A::None, R::Participant, R::Visitor),
            (A::Member, R::Participant, R::Participant),
            (A::Admin, R::Moderator, R::Moderator),
            (A::Owner, R::Moderator, R::Moderator),
        ] {
            assert_eq!(
                (affiliation.role(false), affiliation.role(true)),
                (open, moderated)
            );
        }
    }

    #[test]
    fn roles_are_changed_by_moderators_and_never_of_those_above() {
        let may = |actor, target, new| condition(may_change_role(actor, target, new));
        let moderator = (A::None, R::Moderator);
        assert_eq!(may(moderator, (A::None, R::Participant), R::None), "");
        assert_eq!(may(moderator, (A::None, R::Visitor), R::Participant), "");
        assert_eq!(may(moderator, (A::None, R::Participant), R::Visitor), "");
        assert_eq!(
            may(moderator, (A::Member, R::Participant), R::None),
            "not-allowed"
        );
        assert_eq!(
            may(moderator, (A::Admin, R::Moderator), R::None),
            "not-allowed"
        );
        assert_eq!(
            may(moderator, (A::None, R::Participant), R::Moderator),
            "forbidden"
        );
        assert_eq!(may(moderator, moderator, R::Participant), "not-allowed");
        assert_eq!(
            may((A::None, R::Participant), (A::None, R::Visitor), R::None),
            "forbidden"
        );
        let admin = (A::Admin, R::Moderator);
        assert_eq!(may(admin, (A::None, R::Participant), R::Moderator), "");
        assert_eq!(may(admin, moderator, R::Participant), "");
        assert_eq!(
            may(admin, (A::Owner, R::Moderator), R::Participant),
            "not-allowed"
        );
        assert_eq!(
            may((A::Owner, R::Moderator), admin, R::Participant),
            "not-allowed"
        );
    }

    #[test]
    fn affiliations_of_admins_and_owners_are_for_owners() {
        let may = |actor, old, new| condition(may_change_affiliation(actor, old, new));
        for new in [A::Outcast, A::None, A::Member] {
            assert_eq!(may(A::Admin, A::Member, new), "");
            assert_eq!(may(A::Admin, A::Owner, new), "not-allowed");
            assert_eq!(may(A::Admin, A::Admin, new), "not-allowed");
            assert_eq!(may(A::Member, A::None, new), "forbidden");
        }
        assert_eq!(may(A::Admin, A::None, A::Admin), "forbidden");
        assert_eq!(may(A::Admin, A::None, A::Owner), "forbidden");
        for new in [A::Outcast, A::None, A::Member, A::Admin, A::Owner] {
            assert_eq!(may(A::Owner, A::Owner, new), "");
        }
    }
}
