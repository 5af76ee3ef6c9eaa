//! Protocol behaviour as dialogues: every `tests/dialogues/*.dlg` is one test, played by raw TCP clients against one
//! blade that runs on all cores.
//!
//! `cargo test --test dialogues -- roster` plays those with "roster" in their names. With `NITRO_DIALOGUE_PORT=5222` they
//! are played against a server that runs already (it must allow registration and log-in without TLS);
//! `NITRO_DIALOGUE_DOMAIN` names its domain, and `NITRO_DIALOGUE_PEER=prosody` leaves out those that are known to differ.

#[path = "blade/mod.rs"]
mod blade;
#[path = "dialogue/mod.rs"]
mod dialogue;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use blade::Blade;
use dialogue::run::{self, Server};
use dialogue::script;
use libtest_mimic::{Arguments, Trial};

/// Dialogues mostly wait for the network.
const AT_ONCE: usize = 8;

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    let peer = std::env::var("NITRO_DIALOGUE_PEER").unwrap_or_else(|_| "nitro".to_owned());
    let domain =
        std::env::var("NITRO_DIALOGUE_DOMAIN").unwrap_or_else(|_| blade::DOMAIN.to_owned());
    let running = std::env::var("NITRO_DIALOGUE_PORT").ok().map(|port| {
        let port = port.parse().expect("NITRO_DIALOGUE_PORT is a port");
        SocketAddr::from((Ipv4Addr::LOCALHOST, port))
    });
    let own = Arc::new(Mutex::new(None::<Blade>));
    let address = {
        let own = own.clone();
        // The first dialogue starts the blade; `--list` needs none.
        move || match running {
            Some(address) => address,
            None => {
                // A blade that did not start poisons the lock; the others then fail at once with a word about it.
                let mut own = own.lock().expect("the blade started");
                own.get_or_insert_with(|| {
                    Blade::start(&[
                        ("c2s.require_tls", "false"),
                        ("upload.url", "\"https://chat.localhost\""),
                    ])
                })
                .c2s
            }
        }
    };
    let run_tag = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_millis() % 0x1_0000_0000);
    let mut files: Vec<_> =
        fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dialogues"))
            .expect("tests/dialogues")
            .map(|entry| entry.expect("an entry of tests/dialogues").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "dlg"))
            .collect();
    files.sort();
    let mut trials = Vec::new();
    for (number, file) in files.into_iter().enumerate() {
        let text = fs::read_to_string(&file).expect("the dialogue");
        let name = file
            .file_stem()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let script = script::parse(&text);
        let differs = script
            .as_ref()
            .is_ok_and(|script| script.differs.contains_key(&peer));
        let (address, domain, tag) = (
            address.clone(),
            domain.clone(),
            format!("{number}-{run_tag:x}"),
        );
        let trial = Trial::test(name.clone(), move || {
            let script = script.map_err(|why| format!("{name}.dlg: {why}"))?;
            let server = Server {
                address: address(),
                domain,
            };
            run::play(&script, &server, &tag).map_err(|why| format!("{name}.dlg, {why}").into())
        });
        trials.push(trial.with_ignored_flag(differs));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // `exit` runs no destructors: stop the blade before.
    if let Ok(mut own) = own.lock() {
        own.take();
    }
    conclusion.exit();
}
