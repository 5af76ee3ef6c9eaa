//! Protocol behaviour as dialogues: every `tests/dialogues/*.dlg` is one test by TCP, one by WebSocket (`NAME.websocket`) and one by
//! BOSH (`NAME.bosh`), unless it speaks of one of them only. All are played against one blade that runs on all cores.
//!
//! `cargo test --test dialogues -- roster` plays those with "roster" in their names. With `NITRO_DIALOGUE_PORT=5222` they
//! are played by TCP against a server that runs already (it must allow registration and log-in without TLS);
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
use dialogue::run::{self, Over, Server};
use dialogue::script::{self, Transport};
use libtest_mimic::{Arguments, Trial};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};

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
    let server = {
        let own = own.clone();
        // The first dialogue starts the blade; `--list` needs none.
        move |transport, tls| match running {
            Some(address) => Server {
                address,
                domain: domain.clone(),
                over: Over::Tcp,
            },
            None => {
                // A blade that did not start poisons the lock; the others then fail at once with a word about it.
                let mut own = own.lock().expect("the blade started");
                let blade = own.get_or_insert_with(|| {
                    Blade::start(&[
                        ("c2s.require_tls", "false"),
                        ("upload.url", "\"https://chat.localhost\""),
                        // who comes by a proxy is not on this machine
                        ("web.proxies", "[\"127.0.0.0/8\"]"),
                        ("registration", "\"on\""),
                        // many come from one address and fail
                        ("limits.auth_failure_delay_ms", "10"),
                        ("limits.auth_failure_delay_ms_max", "10"),
                        ("limits.registrations_per_address_per_hour", "100000"),
                    ])
                });
                Server {
                    address: blade.c2s,
                    domain: domain.clone(),
                    over: over(blade, transport, tls),
                }
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
        let script = script::parse(&text).map(Arc::new);
        let differs = script
            .as_ref()
            .is_ok_and(|script| script.differs.contains_key(&peer));
        for transport in Transport::ALL {
            let plays = match &script {
                Ok(script) => script.plays_over(transport),
                Err(_) => transport == Transport::Tcp,
            };
            // whose web ports nobody has named
            let foreign = running.is_some()
                && (transport != Transport::Tcp || script.as_ref().is_ok_and(|one| one.tls));
            if !plays || foreign {
                continue;
            }
            let title = match transport {
                Transport::Tcp => name.clone(),
                other => format!("{name}.{}", other.name()),
            };
            let (server, name, script) = (server.clone(), name.clone(), script.clone());
            let tag = format!("{}{number}-{run_tag:x}", &transport.name()[..1]);
            let trial = Trial::test(title, move || {
                let script = script.map_err(|why| format!("{name}.dlg: {why}"))?;
                let server = server(transport, script.tls);
                run::play(&script, &server, &tag).map_err(|why| format!("{name}.dlg, {why}").into())
            });
            trials.push(trial.with_ignored_flag(differs));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // `exit` runs no destructors: stop the blade before.
    if let Ok(mut own) = own.lock() {
        own.take();
    }
    conclusion.exit();
}

/// How clients come to the blade.
fn over(blade: &Blade, transport: Transport, tls: bool) -> Over {
    let (address, proxied) = (blade.web, tls);
    match transport {
        Transport::Tcp if tls => {
            let file = blade.data_dir().join("certificate.pem");
            let certificate = CertificateDer::from_pem_file(file).expect("the certificate");
            let mut roots = RootCertStore::empty();
            roots.add(certificate).expect("a good certificate");
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .expect("TLS 1.2 and 1.3")
                .with_root_certificates(roots)
                .with_no_client_auth();
            Over::Tls(blade.c2s_tls, Arc::new(config))
        }
        Transport::Tcp => Over::Tcp,
        Transport::WebSocket => Over::WebSocket { address, proxied },
        Transport::Bosh => Over::Bosh { address, proxied },
    }
}
