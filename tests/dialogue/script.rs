//! Text of a dialogue -> declarations and steps. `tests/dialogues/README.md` describes the format.

use std::collections::BTreeMap;

/// A dialogue as it stands in its file.
#[derive(Debug, Default)]
pub struct Script {
    pub clients: BTreeMap<String, Client>,
    /// Accounts to be made before the first step, by the name they have in the script.
    pub accounts: Vec<String>,
    /// Names whose addresses belong to nobody.
    pub nobodies: Vec<String>,
    /// Servers known to answer otherwise, and why.
    pub differs: BTreeMap<String, String>,
    /// The streams are encrypted.
    pub tls: bool,
    /// Where it can be played alone; empty: everywhere.
    only: Vec<Transport>,
    pub steps: Vec<Step>,
}

/// What carries the streams of a script's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    WebSocket,
    Bosh,
}

impl Transport {
    #[allow(dead_code)] // not every test that plays dialogues plays them over all
    pub const ALL: [Transport; 3] = [Transport::Tcp, Transport::WebSocket, Transport::Bosh];

    pub fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::WebSocket => "websocket",
            Transport::Bosh => "bosh",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Client {
    /// The account's name in the script.
    pub account: String,
    pub resource: String,
}

#[derive(Debug)]
pub struct Step {
    pub line: usize,
    pub who: String,
    pub action: Action,
}

#[derive(Debug)]
pub enum Action {
    /// TCP only.
    Connects,
    /// TCP and a stream, up to the features.
    Opens,
    /// Up to the features after SASL; with a password, up to the outcome of SASL, which is left to the next step.
    Authenticates {
        password: Option<String>,
    },
    /// By the extensible profile (XEP-0388), with these elements beside the proof, up to its outcome, which is left to the
    /// next step.
    AuthenticatesWith(String),
    /// Up to the bound resource.
    LogsIn,
    /// Logs in if need be, and sends presence.
    ComesOnline,
    /// Asks for the roster: is "interested" in pushes from now on.
    GetsRoster,
    Sends(String),
    SendsRaw(String),
    Receives {
        expected: String,
        ordered: bool,
    },
    /// In any order, among other things, which are dropped.
    EventuallyReceives(String),
    /// Everyone settles; what has come to this client by then is forgotten.
    Drains,
    ReceivesHeader(String),
    ReceivesStreamError(String),
    ReceivesNothing,
    /// All that this client has sent has been dealt with, and what it caused has come.
    Settles,
    Closes,
    IsCut,
    IsClosed,
    /// Both see each other's presence.
    AreFriends {
        with: String,
    },
}

pub fn parse(text: &str) -> Result<Script, String> {
    let mut script = Script::default();
    let lines: Vec<&str> = text.lines().collect();
    let mut at = 0;
    while at < lines.len() {
        let number = at + 1;
        let line = lines[at].trim_end();
        at += 1;
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line.starts_with(' ') {
            return Err(format!(
                "line {number}: an indented line without a step that ends with ':'"
            ));
        }
        let block = if line.ends_with(':') {
            let start = at;
            while at < lines.len() && (lines[at].trim().is_empty() || lines[at].starts_with(' ')) {
                at += 1;
            }
            let indent = lines[start..at].iter().filter(|one| !one.trim().is_empty());
            let indent = indent
                .map(|one| one.len() - one.trim_start().len())
                .min()
                .unwrap_or(0);
            let body: Vec<&str> = lines[start..at]
                .iter()
                .map(|one| one.get(indent..).unwrap_or(""))
                .collect();
            body.join("\n").trim_matches('\n').to_owned()
        } else {
            String::new()
        };
        script
            .add(number, line, block)
            .map_err(|why| format!("line {number}: {why}"))?;
    }
    Ok(script)
}

impl Script {
    /// What it says of bytes and headers is said of TCP, if nothing else is named.
    pub fn plays_over(&self, transport: Transport) -> bool {
        let is_raw = |step: &Step| {
            matches!(
                step.action,
                Action::Connects | Action::SendsRaw(_) | Action::ReceivesHeader(_)
            )
        };
        match &self.only[..] {
            [] => transport == Transport::Tcp || !self.steps.iter().any(is_raw),
            only => only.contains(&transport),
        }
    }

    fn add(&mut self, line: usize, text: &str, block: String) -> Result<(), String> {
        let (first, rest) = text
            .split_once(' ')
            .ok_or_else(|| format!("not a step: {text}"))?;
        match first {
            "client" => self.declare(rest),
            "account" => {
                self.accounts.push(rest.to_owned());
                Ok(())
            }
            "nobody" => {
                self.nobodies.push(rest.to_owned());
                Ok(())
            }
            "differs" => {
                let (server, why) = rest.split_once(": ").ok_or("differs SERVER: REASON")?;
                self.differs.insert(server.to_owned(), why.to_owned());
                Ok(())
            }
            "over" if rest == "tls" => {
                self.tls = true;
                Ok(())
            }
            "only" => {
                let (names, _why) = rest.split_once(": ").unwrap_or((rest, ""));
                for name in names.split(", ") {
                    let known = Transport::ALL.into_iter().find(|one| one.name() == name);
                    self.only
                        .push(known.ok_or_else(|| format!("no transport '{name}'"))?);
                }
                Ok(())
            }
            who if self.clients.contains_key(who) => {
                let action = action(rest, block)?;
                self.steps.push(Step {
                    line,
                    who: who.to_owned(),
                    action,
                });
                Ok(())
            }
            who => Err(format!("'{who}' is not declared (client {who})")),
        }
    }

    /// `Alice`, `Phone of Alice`, `Phone of Alice, resource desk`
    fn declare(&mut self, text: &str) -> Result<(), String> {
        let (text, resource) = match text.split_once(", resource ") {
            Some((text, resource)) => (text, Some(resource)),
            None => (text, None),
        };
        let (name, account) = text.split_once(" of ").unwrap_or((text, text));
        let resource = resource.map_or_else(|| name.to_lowercase(), str::to_owned);
        if !self.accounts.iter().any(|known| known == account) {
            self.accounts.push(account.to_owned());
        }
        self.clients.insert(
            name.to_owned(),
            Client {
                account: account.to_owned(),
                resource,
            },
        );
        Ok(())
    }
}

fn action(text: &str, block: String) -> Result<Action, String> {
    Ok(match text {
        "connects" => Action::Connects,
        "opens" => Action::Opens,
        "authenticates" => Action::Authenticates { password: None },
        "authenticates with:" => Action::AuthenticatesWith(block),
        "logs in" => Action::LogsIn,
        "comes online" => Action::ComesOnline,
        "gets roster" => Action::GetsRoster,
        "sends:" => Action::Sends(block),
        "sends raw:" => Action::SendsRaw(block),
        "receives:" => Action::Receives {
            expected: block,
            ordered: true,
        },
        "receives in any order:" => Action::Receives {
            expected: block,
            ordered: false,
        },
        "receives header:" => Action::ReceivesHeader(block),
        "receives stream error:" => Action::ReceivesStreamError(block),
        "eventually receives:" => Action::EventuallyReceives(block),
        "drains" => Action::Drains,
        "receives nothing" => Action::ReceivesNothing,
        "settles" => Action::Settles,
        "closes" => Action::Closes,
        "is cut" => Action::IsCut,
        "is closed" => Action::IsClosed,
        _ => {
            if let Some(password) = text.strip_prefix("authenticates with password ") {
                Action::Authenticates {
                    password: Some(password.to_owned()),
                }
            } else if let Some(with) = text
                .strip_prefix("and ")
                .and_then(|rest| rest.strip_suffix(" are friends"))
            {
                Action::AreFriends {
                    with: with.to_owned(),
                }
            } else {
                return Err(format!("unknown step '{text}'"));
            }
        }
    })
}
