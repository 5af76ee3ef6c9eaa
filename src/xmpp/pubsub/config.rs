//! A node's configuration (XEP-0060 section 8.2), its form, and the preconditions of a publication (section 7.1.5).

use rkyv::{Archive, Deserialize, Serialize};

use super::{NS_ERRORS, refused, unsupported};
use crate::xmpp::error::StanzaError;
use crate::xmpp::form::{Field, Form, Kind, Values};

pub const FORM: &str = "http://jabber.org/protocol/pubsub#node_config";
pub const OPTIONS_FORM: &str = "http://jabber.org/protocol/pubsub#publish-options";

/// Bytes of a title, a type, a roster group; groups of one node.
const TEXT_BYTES_MAX: usize = 256;
const GROUPS_MAX: usize = 64;

/// Who may see the items of a node (section 4.5). The owner always may.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[rkyv(derive(Clone, Copy))]
#[repr(u8)]
pub enum Access {
    Open,
    /// Subscribers of the owner's presence.
    Presence,
    /// Those of them in certain groups of his roster.
    Roster,
    /// Those whom he names.
    Whitelist,
}

/// When somebody who comes on line hears of the last item.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[rkyv(derive(Clone, Copy))]
#[repr(u8)]
pub enum SendLast {
    Never,
    OnSub,
    OnSubAndPresence,
}

const ACCESS: &[(&str, Access)] = &[
    ("open", Access::Open),
    ("presence", Access::Presence),
    ("roster", Access::Roster),
    ("whitelist", Access::Whitelist),
];
const SEND_LAST: &[(&str, SendLast)] = &[
    ("never", SendLast::Never),
    ("on_sub", SendLast::OnSub),
    ("on_sub_and_presence", SendLast::OnSubAndPresence),
];

#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub access: Access,
    pub send_last: SendLast,
    /// Items that are kept; [`Config::MAX`]: as many as the server allows.
    pub max_items: u32,
    /// Are items kept at all? If not, they are told to those who are there, and gone.
    pub persist: bool,
    pub deliver_payloads: bool,
    pub notify_retract: bool,
    pub notify_delete: bool,
    pub notify_config: bool,
    pub roster_groups: Vec<String>,
    pub title: String,
    pub typ: String,
}

impl Config {
    /// `max` in the form.
    pub const MAX: u32 = u32::MAX;

    /// XEP-0163 section 5: what a node has when nobody says otherwise.
    pub fn personal() -> Config {
        Config {
            access: Access::Presence,
            send_last: SendLast::OnSubAndPresence,
            max_items: 1,
            persist: true,
            deliver_payloads: true,
            notify_retract: true,
            notify_delete: true,
            notify_config: false,
            roster_groups: Vec::new(),
            title: String::new(),
            typ: String::new(),
        }
    }

    /// Seen by everybody (XEP-0222).
    pub fn public() -> Config {
        Config {
            access: Access::Open,
            ..Config::personal()
        }
    }

    /// XEP-0223: seen by the owner only, all items kept, nothing told that was not asked for.
    pub fn private() -> Config {
        Config {
            access: Access::Whitelist,
            send_last: SendLast::Never,
            max_items: Config::MAX,
            ..Config::personal()
        }
    }

    /// This configuration with what a form says. Fields that are known to XEP-0060 and do nothing here are let pass, others are
    /// refused.
    pub fn with(&self, values: &Values) -> Result<Config, StanzaError> {
        let mut config = self.clone();
        for (var, given) in values.iter() {
            config.take(var, given, values)?;
        }
        if config.roster_groups.len() > GROUPS_MAX {
            return Err(StanzaError::NOT_ACCEPTABLE.text("too many groups of the roster"));
        }
        Ok(config)
    }

    fn take(&mut self, var: &str, given: &[String], values: &Values) -> Result<(), StanzaError> {
        let Some(name) = var.strip_prefix("pubsub#") else {
            return Ok(());
        };
        let set = |place: &mut bool| -> Result<(), StanzaError> {
            *place = values.boolean(var)?.unwrap_or(*place);
            Ok(())
        };
        let text = |place: &mut String| -> Result<(), StanzaError> {
            *place = values
                .text(var, TEXT_BYTES_MAX)?
                .unwrap_or_default()
                .to_owned();
            Ok(())
        };
        match name {
            "access_model" => {
                if values.one(var)? == Some("authorize") {
                    return Err(StanzaError {
                        kind: "modify",
                        condition: StanzaError::NOT_ACCEPTABLE.condition,
                        ..refused(StanzaError::NOT_ACCEPTABLE, "unsupported-access-model")
                    });
                }
                self.access = *values.choice(var, ACCESS)?.unwrap_or(&self.access);
            }
            "send_last_published_item" => {
                self.send_last = *values.choice(var, SEND_LAST)?.unwrap_or(&self.send_last);
            }
            "max_items" => match values.one(var)? {
                Some("max") => self.max_items = Config::MAX,
                _ => {
                    let most = values.number(var)?;
                    let most = most.map(|n| n.clamp(1, u64::from(Config::MAX) - 1));
                    self.max_items = most.map_or(self.max_items, |n| n as u32);
                }
            },
            "persist_items" => set(&mut self.persist)?,
            "deliver_payloads" => set(&mut self.deliver_payloads)?,
            "notify_retract" => set(&mut self.notify_retract)?,
            "notify_delete" => set(&mut self.notify_delete)?,
            "notify_config" => set(&mut self.notify_config)?,
            "roster_groups_allowed" => {
                if given.iter().any(|group| group.len() > TEXT_BYTES_MAX) {
                    return Err(StanzaError::NOT_ACCEPTABLE.text("a field of the form is too long"));
                }
                self.roster_groups = given.to_vec();
            }
            "title" => text(&mut self.title)?,
            "type" => text(&mut self.typ)?,
            "publish_model" => {
                if values.one(var)?.is_some_and(|model| model != "publishers") {
                    return Err(unsupported("publish-options"));
                }
            }
            "deliver_notifications"
            | "notify_sub"
            | "presence_based_delivery"
            | "notification_type"
            | "purge_offline"
            | "itemreply"
            | "max_payload_size"
            | "item_expire"
            | "node_type"
            | "description"
            | "language"
            | "collection"
            | "children"
            | "contact"
            | "body_xslt"
            | "dataform_xslt"
            | "tempsub"
            | "subscribe" => {}
            _ => {
                return Err(StanzaError::NOT_ACCEPTABLE.text("the node has no such option"));
            }
        }
        Ok(())
    }

    /// Section 7.1.5: may something be published that expects these options of a node that is there?
    pub fn meets(&self, options: &Values) -> Result<(), StanzaError> {
        let wanted = self.with(options);
        match wanted {
            Ok(wanted) if wanted == *self => Ok(()),
            _ => Err(NOT_MET),
        }
    }

    pub fn form(&self, kind: Kind) -> Form {
        let name = |of: &[(&'static str, Access)]| {
            let found = of.iter().find(|(_, access)| *access == self.access);
            found.map_or("", |(name, _)| name)
        };
        let last = SEND_LAST.iter().find(|(_, when)| *when == self.send_last);
        let most = match self.max_items {
            Config::MAX => "max".to_owned(),
            most => most.to_string(),
        };
        let choices = |field: Field, names: &mut dyn Iterator<Item = &'static str>| {
            names.fold(field, |field, name| field.option(name, name))
        };
        let access = Field::list("pubsub#access_model", name(ACCESS)).label("Who sees the items");
        let send = Field::list(
            "pubsub#send_last_published_item",
            last.map_or("", |(name, _)| name),
        )
        .label("When the last item is sent");
        Form::new(kind, FORM)
            .field(Field::text("pubsub#title", &self.title).label("Title"))
            .field(Field::text("pubsub#type", &self.typ).label("Type of the payloads"))
            .field(choices(access, &mut ACCESS.iter().map(|(name, _)| *name)))
            .field(
                Field::lists(
                    "pubsub#roster_groups_allowed",
                    self.roster_groups.iter().map(String::as_str),
                )
                .label("Groups of the roster that see the items"),
            )
            .field(Field::text("pubsub#max_items", &most).label("Items that are kept"))
            .field(Field::boolean("pubsub#persist_items", self.persist).label("Items are kept"))
            .field(
                Field::boolean("pubsub#deliver_payloads", self.deliver_payloads)
                    .label("Notifications hold the payload"),
            )
            .field(choices(send, &mut SEND_LAST.iter().map(|(name, _)| *name)))
            .field(
                Field::boolean("pubsub#notify_retract", self.notify_retract)
                    .label("Tell of items that are removed"),
            )
            .field(
                Field::boolean("pubsub#notify_delete", self.notify_delete)
                    .label("Tell when the node is removed"),
            )
            .field(
                Field::boolean("pubsub#notify_config", self.notify_config)
                    .label("Tell of changes of the configuration"),
            )
    }
}

/// The node that is there has other options.
pub const NOT_MET: StanzaError = StanzaError::CONFLICT.detail("precondition-not-met", NS_ERRORS);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::dom::Element;

    fn values(fields: &[(&str, &str)]) -> Values {
        let mut xml = String::from("<x xmlns='jabber:x:data' type='submit'>");
        for (var, value) in fields {
            xml += &format!("<field var='{var}'><value>{value}</value></field>");
        }
        Values::read(&Element::parse(&(xml + "</x>")).unwrap(), FORM).unwrap()
    }

    #[test]
    fn what_a_form_says_is_what_the_next_form_shows() {
        let asked = [
            ("FORM_TYPE", FORM),
            ("pubsub#access_model", "roster"),
            ("pubsub#max_items", "max"),
            ("pubsub#send_last_published_item", "never"),
            ("pubsub#persist_items", "0"),
            ("pubsub#roster_groups_allowed", "Desk"),
            ("pubsub#title", "T"),
        ];
        let config = Config::personal().with(&values(&asked)).unwrap();
        assert_eq!(config.max_items, Config::MAX);
        let shown = Values::read(&config.form(Kind::Form).element(), FORM).unwrap();
        for (var, value) in asked {
            assert_eq!(shown.one(var), Ok(Some(value)), "{var}");
        }
        assert_eq!(Config::public().with(&shown), Ok(config));
    }

    #[test]
    fn options_are_preconditions() {
        let config = Config::private();
        let mets = [
            (("pubsub#access_model", "whitelist"), true),
            (("pubsub#access_model", "open"), false),
            (("pubsub#max_items", "max"), true),
            (("pubsub#max_items", "10"), false),
            (("pubsub#no_such_thing", "1"), false),
            (("urn:example", "1"), true),
        ];
        for (field, met) in mets {
            assert_eq!(config.meets(&values(&[field])).is_ok(), met, "{field:?}");
        }
    }

    #[test]
    fn what_nobody_can_do_is_refused() {
        for (var, value) in [
            ("pubsub#access_model", "authorize"),
            ("pubsub#access_model", "everybody"),
            ("pubsub#max_items", "many"),
            ("pubsub#publish_model", "open"),
            ("pubsub#unheard_of", "1"),
        ] {
            assert!(Config::personal().with(&values(&[(var, value)])).is_err());
        }
    }
}
