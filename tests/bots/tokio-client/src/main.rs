//! `tokio-client starttls|direct HOST:PORT JID` with the password on standard input: logs in, writes to itself, reads that,
//! prints the bound address and leaves. Trusts what `SSL_CERT_FILE` names.
//!
//! tokio-xmpp knows one channel binding, tls-exporter, and uses it on TLS 1.3 with SCRAM-SHA-256-PLUS or SCRAM-SHA-1-PLUS.

use std::process::ExitCode;
use std::time::Duration;

use futures::StreamExt;
use tokio_xmpp::connect::DnsConfig;
use tokio_xmpp::jid::Jid;
use tokio_xmpp::parsers::message::{Lang, Message};
use tokio_xmpp::xmlstream::Timeouts;
use tokio_xmpp::{Client, Event, Stanza, rustls};

const WITHIN: Duration = Duration::from_secs(15);
const TEXT: &str = "bound to the channel";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [transport, address, jid] = arguments.as_slice() else {
        eprintln!("usage: tokio-client starttls|direct HOST:PORT JID < password");
        return ExitCode::from(2);
    };
    let password = std::io::read_to_string(std::io::stdin()).expect("a password on standard input");
    let jid: Jid = jid.parse().expect("a JID");
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("the first provider");
    let (dns, password) = (DnsConfig::addr(address), password.trim_end());
    let client = match transport.as_str() {
        "direct" => Client::new_direct_tls_with_config(jid, password, dns, Timeouts::default()),
        _ => Client::new_starttls(jid, password, dns, Timeouts::default()),
    };
    match tokio::time::timeout(WITHIN, talk_to_itself(client)).await {
        Ok(Ok(bound)) => {
            println!("{bound}");
            ExitCode::SUCCESS
        }
        Ok(Err(why)) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
        Err(_) => {
            eprintln!("not done within {WITHIN:?}");
            ExitCode::FAILURE
        }
    }
}

async fn talk_to_itself(mut client: Client) -> Result<Jid, String> {
    let mut bound = None;
    while let Some(event) = client.next().await {
        match event {
            Event::Online { bound_jid, .. } => {
                let message =
                    Message::chat(bound_jid.clone()).with_body(Lang::new(), TEXT.to_owned());
                client
                    .send_stanza(message.into())
                    .await
                    .map_err(|why| why.to_string())?;
                bound = Some(bound_jid);
            }
            Event::Stanza(Stanza::Message(message))
                if message.bodies.values().any(|body| body == TEXT) =>
            {
                return bound.ok_or_else(|| "a message before the session".to_owned());
            }
            Event::Stanza(_) => {}
            Event::Disconnected(why) => return Err(why.to_string()),
        }
    }
    Err("the client ended".to_owned())
}
