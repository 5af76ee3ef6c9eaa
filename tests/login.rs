//! Login in one round trip (XEP-0388, XEP-0386, XEP-0198 section 9) over TLS, by a client that is written here and not by the
//! server's code.

#[path = "blade/mod.rs"]
mod blade;
#[path = "login/external.rs"]
mod external;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::prelude::{BASE64_STANDARD, Engine};
use blade::{Blade, DOMAIN};
use rustls::client::WantsClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, aws_lc_rs as provider, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, ConfigBuilder, DigitallySignedStruct, SignatureScheme,
    StreamOwned, SupportedProtocolVersion,
};

const PASSWORD: &str = "secret";
const AGENT: &str =
    "<user-agent id='d4565fa7-4d72-4749-b3d3-740edbf87770'><software>Test</software></user-agent>";
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const SETTINGS: [(&str, &str); 2] = [("registration", "\"on\""), ("sasl.iterations", "4096")];

/// The blade's certificate is its own; these tests are not about that.
#[derive(Debug)]
struct Anybody(CryptoProvider);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

struct Client {
    stream: StreamOwned<ClientConnection, TcpStream>,
    /// Received and not taken.
    text: String,
    features: String,
}

/// All but the client's certificate.
fn configuration(
    versions: &[&'static SupportedProtocolVersion],
) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider::default_provider())))
}

impl Client {
    fn connect(address: SocketAddr) -> Client {
        Client::saying(address, "")
    }

    /// With more attributes in the header of the stream.
    fn saying(address: SocketAddr, header: &str) -> Client {
        let config = configuration(rustls::DEFAULT_VERSIONS).with_no_client_auth();
        Client::with(address, Arc::new(config), header)
    }

    fn with(address: SocketAddr, config: Arc<ClientConfig>, header: &str) -> Client {
        let name = ServerName::try_from(DOMAIN).unwrap();
        let tls = ClientConnection::new(config, name).unwrap();
        let socket = TcpStream::connect(address).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(ANSWER_WITHIN)).unwrap();
        let mut client = Client {
            stream: StreamOwned::new(tls, socket),
            text: String::new(),
            features: String::new(),
        };
        client.open(header);
        client
    }

    /// Begins a stream, with more attributes in its header; the server's header.
    fn open(&mut self, header: &str) -> String {
        self.send(&format!(
            "<?xml version='1.0'?><stream:stream to='{DOMAIN}' version='1.0' xmlns='jabber:client' \
             xmlns:stream='http://etherx.jabber.org/streams'{header}>"
        ));
        let answer = self.until("<stream:features");
        self.features = self.until("</stream:features>");
        answer
    }

    fn send(&mut self, xml: &str) {
        self.stream.write_all(xml.as_bytes()).unwrap();
        self.stream.flush().unwrap();
    }

    /// All up to the end of `end`.
    fn until(&mut self, end: &str) -> String {
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            if let Some(at) = self.text.find(end) {
                let rest = self.text.split_off(at + end.len());
                return std::mem::replace(&mut self.text, rest);
            }
            assert!(Instant::now() < deadline, "no {end} in {}", self.text);
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(n) if n > 0 => self.text += std::str::from_utf8(&bytes[..n]).unwrap(),
                end_of_stream => panic!("{end_of_stream:?} instead of {end}: {}", self.text),
            }
        }
    }

    /// PLAIN in SASL2.
    fn authenticate_plain(&mut self, name: &str) -> String {
        self.send(&format!(
            "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='PLAIN'><initial-response>{}</initial-response></authenticate>",
            BASE64_STANDARD.encode(format!("\0{name}\0{PASSWORD}"))
        ));
        self.outcome()
    }

    fn register(address: SocketAddr, name: &str) {
        let mut client = Client::connect(address);
        client.send(&format!(
            "<iq type='set' id='1'><query xmlns='jabber:iq:register'><username>{name}</username>\
             <password>{PASSWORD}</password></query></iq>"
        ));
        let answer = client.until(">");
        assert!(answer.contains("type='result'"), "{answer}");
    }

    /// SCRAM-SHA-256 in SASL2 with `inline`; all from `<success>` or `<failure>` to its end.
    fn authenticate(&mut self, name: &str, inline: &str) -> String {
        let first = format!("n={name},r=abcdefgh");
        self.send(&format!(
            "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='SCRAM-SHA-256'><initial-response>{}</initial-response>\
             {inline}</authenticate>",
            BASE64_STANDARD.encode(format!("n,,{first}"))
        ));
        let challenge = self.until("</challenge>");
        assert!(challenge.contains("xmlns='urn:xmpp:sasl:2'"), "{challenge}");
        let data = challenge.split(['>', '<']).nth(2).unwrap();
        let challenge = String::from_utf8(BASE64_STANDARD.decode(data).unwrap()).unwrap();
        let field = |name: &str| {
            let field = challenge.split(',').find(|part| part.starts_with(name));
            field.unwrap()[2..].to_owned()
        };
        let mut salted = [0; 32];
        pbkdf2::derive(
            pbkdf2::PBKDF2_HMAC_SHA256,
            NonZeroU32::new(field("i=").parse().unwrap()).unwrap(),
            &BASE64_STANDARD.decode(field("s=")).unwrap(),
            PASSWORD.as_bytes(),
            &mut salted,
        );
        let client_key = sign(&salted, &[b"Client Key"]);
        let stored = digest::digest(&digest::SHA256, &client_key);
        let without_proof = format!("c=biws,r={}", field("r="));
        let message = format!("{first},{challenge},{without_proof}");
        let signature = sign(stored.as_ref(), &[message.as_bytes()]);
        let proof: Vec<u8> = client_key
            .iter()
            .zip(&signature)
            .map(|(a, b)| a ^ b)
            .collect();
        let last = format!("{without_proof},p={}", BASE64_STANDARD.encode(proof));
        self.send(&format!(
            "<response xmlns='urn:xmpp:sasl:2'>{}</response>",
            BASE64_STANDARD.encode(last)
        ));
        self.outcome()
    }

    fn outcome(&mut self) -> String {
        self.outcome_in("urn:xmpp:sasl:2")
    }

    fn outcome_in(&mut self, ns: &str) -> String {
        let kind = self.until(&format!("'{ns}'>"));
        match kind.contains("<success") {
            true => kind + &self.until("</success>"),
            false => kind + &self.until("</failure>"),
        }
    }
}

fn sign(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    parts.iter().for_each(|part| context.update(part));
    context.sign().as_ref().to_vec()
}

/// The value of the first attribute of this name behind `element`.
fn attribute(xml: &str, element: &str, name: &str) -> String {
    let (_, rest) = xml
        .split_once(element)
        .unwrap_or_else(|| panic!("no {element} in {xml}"));
    let (_, rest) = rest.split_once(&format!(" {name}='")).unwrap();
    rest.split_once('\'').unwrap().0.to_owned()
}

fn text(xml: &str, element: &str) -> String {
    let (_, rest) = xml.split_once(&format!("<{element}>")).unwrap();
    rest.split_once('<').unwrap().0.to_owned()
}

fn bind(more: &str) -> String {
    format!("{AGENT}<bind xmlns='urn:xmpp:bind:0'><tag>Desk</tag>{more}</bind>")
}

const MANAGED: &str =
    "<enable xmlns='urn:xmpp:sm:3' resume='true'/><enable xmlns='urn:xmpp:carbons:2'/>";

#[test]
fn a_session_begins_with_its_authentication_and_goes_on_with_the_next() {
    let blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let mut first = Client::connect(blade.c2s_tls);
    assert!(
        first
            .features
            .contains("<authentication xmlns='urn:xmpp:sasl:2'>"),
        "{}",
        first.features
    );
    let success = first.authenticate("alice", &bind(MANAGED));
    let jid = text(&success, "authorization-identifier");
    assert!(
        jid.starts_with(&format!("alice@{DOMAIN}/Desk/")),
        "{success}"
    );
    let data = BASE64_STANDARD
        .decode(text(&success, "additional-data"))
        .unwrap();
    assert!(data.starts_with(b"v="), "{success}");
    let previd = attribute(&success, "<enabled", "id");
    let features = first.until("</stream:features>");
    assert!(
        !features.contains("urn:xmpp:sm:3") && !features.contains("xmpp-bind"),
        "{features}"
    );
    // the session is one as any other: it is available and talks
    first.send(&format!(
        "<presence/><message to='{jid}' type='chat' id='m1'><body>to myself</body></message>"
    ));
    let mut seen = first.until("</message>");
    assert!(seen.contains("<presence"), "{seen}");
    drop(first);

    // cut with one stanza acknowledged: the rest comes again, behind success and features
    let mut second = Client::connect(blade.c2s_tls);
    let resume = format!(
        "{AGENT}<resume xmlns='urn:xmpp:sm:3' previd='{previd}' h='1'/><bind xmlns='urn:xmpp:bind:0'/>"
    );
    let success = second.authenticate("alice", &resume);
    assert_eq!(text(&success, "authorization-identifier"), jid, "{success}");
    assert_eq!(attribute(&success, "<resumed", "h"), "2");
    assert!(!success.contains("<bound"), "{success}");
    seen = second.until("</message>");
    assert!(
        seen.starts_with("<stream:features>") && seen.contains("to myself"),
        "{seen}"
    );

    // what cannot be resumed is told, and binding follows; the same client takes its old place
    let mut third = Client::connect(blade.c2s_tls);
    let resume = format!(
        "<resume xmlns='urn:xmpp:sm:3' previd='nothing' h='0'/>{}",
        bind(MANAGED)
    );
    let success = third.authenticate("alice", &resume);
    assert!(
        success.contains("<failed xmlns='urn:xmpp:sm:3'") && success.contains("<bound"),
        "{success}"
    );
    assert_eq!(text(&success, "authorization-identifier"), jid);
    assert!(second.until("</stream:stream>").contains("<conflict"));
}

#[test]
fn without_inline_requests_the_older_binding_follows_without_a_new_stream() {
    let blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let mut client = Client::connect(blade.c2s_tls);
    let success = client.authenticate("alice", "");
    assert_eq!(
        text(&success, "authorization-identifier"),
        format!("alice@{DOMAIN}")
    );
    assert!(client.until("</stream:features>").contains("xmpp-bind"));
    client.send("<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>r</resource></bind></iq>");
    assert!(client.until("</iq>").contains(&format!("alice@{DOMAIN}/r")));
}

#[test]
fn failures_are_told_in_the_profile_that_was_spoken_and_nothing_inline_is_done() {
    let blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let mut client = Client::connect(blade.c2s_tls);
    client.send(&format!(
        "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='NONE'>{}</authenticate>",
        bind("")
    ));
    let failure = client.outcome();
    assert!(
        failure.contains("<invalid-mechanism xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>"),
        "{failure}"
    );
    client.send(&format!(
        "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='PLAIN'><initial-response>{}</initial-response>{}</authenticate>",
        BASE64_STANDARD.encode("\0alice\0wrong"),
        bind("")
    ));
    assert!(client.outcome().contains("<not-authorized"));
    client.send("<authenticate xmlns='urn:xmpp:sasl:2' mechanism='SCRAM-SHA-256'/>");
    client.until("</challenge>");
    client.send("<abort xmlns='urn:xmpp:sasl:2'/>");
    assert!(client.outcome().contains("<aborted"));
    // three failures are as many as a connection has
    assert!(
        client
            .until("</stream:stream>")
            .contains("policy-violation")
    );
}

#[test]
fn it_is_not_offered_in_the_clear_nor_where_the_operator_does_not_want_it() {
    let blade = Blade::start(&[&SETTINGS[..], &[("sasl.sasl2", "false")]].concat());
    let mut client = Client::connect(blade.c2s_tls);
    assert!(
        !client.features.contains("urn:xmpp:sasl:2"),
        "{}",
        client.features
    );
    client.send("<authenticate xmlns='urn:xmpp:sasl:2' mechanism='PLAIN'/>");
    assert!(client.until("</stream:stream>").contains("not-authorized"));
}

// ---- tokens (XEP-0484) -----------------------------------------------------------------------------------------------------

impl Client {
    /// Logs in with a token; all from `<success>` or `<failure>` to its end.
    fn show(
        &mut self,
        name: &str,
        mechanism: &str,
        token: &str,
        fast: &str,
        inline: &str,
    ) -> String {
        let binding = match mechanism {
            "HT-SHA-256-EXPR" => {
                let exported = self.stream.conn.export_keying_material(
                    [0; 32],
                    b"EXPORTER-Channel-Binding",
                    Some(b""),
                );
                exported.unwrap().to_vec()
            }
            _ => Vec::new(),
        };
        let hash = sign(token.as_bytes(), &[b"Initiator", &binding]);
        let message = [name.as_bytes(), b"\0", &hash].concat();
        self.send(&format!(
            "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='{mechanism}'><initial-response>{}</initial-response>\
             <fast xmlns='urn:xmpp:fast:0'{fast}/>{inline}</authenticate>",
            BASE64_STANDARD.encode(message)
        ));
        let outcome = self.outcome();
        if outcome.contains("<success") {
            let proof = BASE64_STANDARD
                .decode(text(&outcome, "additional-data"))
                .unwrap();
            assert_eq!(proof, sign(token.as_bytes(), &[b"Responder", &binding]));
        }
        outcome
    }
}

fn request(mechanism: &str) -> String {
    format!("<request-token xmlns='urn:xmpp:fast:0' mechanism='{mechanism}'/>")
}

#[test]
fn a_token_lets_in_and_resumes_in_one_round_trip_after_a_kill_too_until_it_is_invalidated() {
    let mut blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let mut client = Client::connect(blade.c2s_tls);
    let offered = client.features.split("<fast ").nth(1).unwrap().to_owned();
    for mechanism in ["HT-SHA-256-EXPR", "HT-SHA-256-ENDP", "HT-SHA-256-NONE"] {
        assert!(offered.contains(mechanism), "{offered}");
    }
    let mechanism = "HT-SHA-256-EXPR";
    let success = client.authenticate("alice", &(bind(MANAGED) + &request(mechanism)));
    let token = attribute(&success, "<token", "token");
    assert!(attribute(&success, "<token", "expiry").ends_with('Z'));
    let previd = attribute(&success, "<enabled", "id");
    drop(client);

    let resume = format!("{AGENT}<resume xmlns='urn:xmpp:sm:3' previd='{previd}' h='0'/>");
    let mut client = Client::connect(blade.c2s_tls);
    let success = client.show("alice", mechanism, &token, " count='1'", &resume);
    assert!(
        success.contains("<resumed") && !success.contains("<token"),
        "{success}"
    );

    // given is given
    blade.kill();
    blade.restart();
    let mut client = Client::connect(blade.c2s_tls);
    let success = client.show("alice", mechanism, &token, "", &bind(""));
    assert!(success.contains("<bound"), "{success}");

    // not with another mechanism, another installation, another name, or broken counts
    for (name, mechanism, fast, agent, condition) in [
        ("alice", "HT-SHA-256-NONE", "", AGENT, "<not-authorized"),
        (
            "alice",
            mechanism,
            "",
            "<user-agent id='another'/>",
            "<not-authorized",
        ),
        ("nobody", mechanism, "", AGENT, "<not-authorized"),
        ("alice", mechanism, "", "", "<malformed-request"),
        (
            "alice",
            mechanism,
            " count='x'",
            AGENT,
            "<malformed-request",
        ),
    ] {
        let mut client = Client::connect(blade.c2s_tls);
        let failure = client.show(name, mechanism, &token, fast, agent);
        assert!(
            failure.contains(condition),
            "{mechanism} {agent}: {failure}"
        );
    }

    let mut client = Client::connect(blade.c2s_tls);
    let success = client.show("alice", mechanism, &token, " invalidate='true'", AGENT);
    assert!(
        success.contains("<success") && !success.contains("<token"),
        "{success}"
    );
    blade.kill();
    blade.restart();
    let mut client = Client::connect(blade.c2s_tls);
    let failure = client.show("alice", mechanism, &token, "", AGENT);
    assert!(failure.contains("<not-authorized"), "{failure}");
}

#[test]
fn a_new_password_ends_tokens_and_too_many_push_out_the_oldest() {
    let blade = Blade::start(&[&SETTINGS[..], &[("limits.tokens_per_user_max", "2")]].concat());
    Client::register(blade.c2s_tls, "alice");
    let mechanism = "HT-SHA-256-NONE";
    let agent = |n: usize| format!("<user-agent id='installation {n}'/>");
    let tokens: Vec<String> = (0..3)
        .map(|n| {
            let mut client = Client::connect(blade.c2s_tls);
            let success = client.authenticate("alice", &(agent(n) + &request(mechanism)));
            attribute(&success, "<token", "token")
        })
        .collect();
    let comes = |n: usize| {
        let mut client = Client::connect(blade.c2s_tls);
        let outcome = client.show("alice", mechanism, &tokens[n], "", &agent(n));
        (client, outcome)
    };
    assert!(comes(0).1.contains("<not-authorized"));
    assert!(comes(1).1.contains("<success"));
    let (mut client, success) = comes(2);
    assert!(success.contains("<success"), "{success}");
    client.send("<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>");
    client.until("</iq>");
    client.send(
        "<iq type='set' id='p'><query xmlns='jabber:iq:register'><username>alice</username>\
         <password>changed</password></query></iq>",
    );
    assert!(client.until("id='p'").contains("result") || client.until(">").contains("result"));
    assert!(comes(2).1.contains("<not-authorized"));
}

#[test]
fn who_was_disabled_or_lost_his_password_while_he_logged_in_gets_no_session() {
    let blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let jid = format!("alice@{DOMAIN}");
    let binds = |meanwhile: &[(&str, &[&str])]| {
        let mut client = Client::connect(blade.c2s_tls);
        let success = client.authenticate("alice", AGENT);
        assert!(success.contains("<success"), "{success}");
        client.until("</stream:features>");
        for (command, more) in meanwhile {
            let arguments = [&["user", command, &jid], *more].concat();
            let output = blade.nitro(&arguments, "changed\n");
            assert!(output.status.success(), "{output:?}");
        }
        client.send("<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>");
        client.until("</iq>")
    };
    assert!(binds(&[]).contains("<jid>"));
    assert!(binds(&[("disable", &[]), ("enable", &[])]).contains("<jid>"));
    let refused = binds(&[("disable", &[])]);
    assert!(refused.contains("<not-authorized"), "{refused}");
    blade.nitro(&["user", "enable", &jid], "");
    let refused = binds(&[("passwd", &["--password-stdin"])]);
    assert!(refused.contains("<not-authorized"), "{refused}");
}

#[test]
fn who_lost_his_password_while_he_logged_in_gets_no_old_session_either() {
    let blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let mut first = Client::connect(blade.c2s_tls);
    let success = first.authenticate("alice", &bind(MANAGED));
    let previd = attribute(&success, "<enabled", "id");
    first.until("</stream:features>");
    let mut second = Client::connect(blade.c2s_tls);
    assert!(second.authenticate("alice", AGENT).contains("<success"));
    second.until("</stream:features>");
    let arguments = ["user", "passwd", "alice@localhost", "--password-stdin"];
    let output = blade.nitro(&arguments, "changed\n");
    assert!(output.status.success(), "{output:?}");
    second.send(&format!(
        "<resume xmlns='urn:xmpp:sm:3' previd='{previd}' h='0'/>"
    ));
    let refused = second.until("</failed>");
    assert!(refused.contains("<not-authorized"), "{refused}");
    // and nobody has lost his connection by that
    first.send("<iq type='get' id='p'><ping xmlns='urn:xmpp:ping'/></iq>");
    assert!(first.until("/>").contains("id='p'"));
}

#[test]
fn who_names_an_address_in_the_stream_header_is_let_in_as_that_one_only() {
    let blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let mut client = Client::saying(blade.c2s_tls, " from='bob@localhost'");
    let failure = client.authenticate_plain("alice");
    assert!(failure.contains("<invalid-authzid"), "{failure}");
    // as himself he does; the answer goes to him
    let mut client = Client::saying(blade.c2s_tls, "");
    assert!(client.authenticate_plain("alice").contains("<success"));
    let mut client = Client::saying(blade.c2s_tls, " from='Alice@LOCALHOST/desk'");
    assert!(client.authenticate("alice", "").contains("<success"));
    // what is no account's address says nothing
    let mut client = Client::saying(blade.c2s_tls, " from='localhost'");
    assert!(client.authenticate("alice", "").contains("<success"));

    // the older way: the stream behind the authentication has another header
    for (from, to) in [
        ("alice@localhost", Some("to='alice@localhost'")),
        ("bob@localhost", None),
    ] {
        let mut client = Client::connect(blade.c2s_tls);
        client.send(&format!(
            "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{}</auth>",
            BASE64_STANDARD.encode(format!("\0alice\0{PASSWORD}"))
        ));
        let outcome = client.outcome_in("urn:ietf:params:xml:ns:xmpp-sasl");
        assert!(outcome.contains("<success"), "{outcome}");
        client.send(&format!(
            "<stream:stream to='{DOMAIN}' from='{from}' version='1.0' xmlns='jabber:client' \
             xmlns:stream='http://etherx.jabber.org/streams'>"
        ));
        match to {
            Some(to) => assert!(client.until("</stream:features>").contains(to)),
            None => assert!(client.until("</stream:stream>").contains("<invalid-from")),
        }
    }
}

#[test]
fn binding_tells_what_the_archive_has_where_that_is_known() {
    let blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let mut client = Client::connect(blade.c2s_tls);
    client.authenticate("alice", &bind(""));
    client.send(
        "<message to='alice@localhost' type='chat'><body>to myself</body></message>\
         <iq type='get' id='m'><metadata xmlns='urn:xmpp:mam:2'/></iq>",
    );
    let told = client.until("</metadata>");
    let (_, ends) = told.split_once("<start").unwrap();
    let mut client = Client::connect(blade.c2s_tls);
    let success = client.authenticate("alice", &bind(MANAGED));
    let (_, bound) = success.split_once("<bound").unwrap();
    let expected = format!("<metadata xmlns='urn:xmpp:mam:2'><start{ends}<enabled");
    assert!(bound.contains(&expected), "{success} and not {expected}");
}

#[test]
fn where_all_mechanisms_bind_to_the_channel_tokens_do() {
    let mut blade = Blade::start(&SETTINGS);
    Client::register(blade.c2s_tls, "alice");
    let mechanism = "HT-SHA-256-NONE";
    let mut client = Client::connect(blade.c2s_tls);
    let success = client.authenticate("alice", &(AGENT.to_owned() + &request(mechanism)));
    let token = attribute(&success, "<token", "token");
    blade.kill();
    blade.set("sasl.mechanisms", "[\"SCRAM-SHA-256-PLUS\"]");
    blade.restart();
    let mut client = Client::connect(blade.c2s_tls);
    let offered = &client.features;
    assert!(
        offered.contains("HT-SHA-256-EXPR") && !offered.contains(mechanism),
        "{offered}"
    );
    let failure = client.show("alice", mechanism, &token, "", AGENT);
    assert!(failure.contains("<invalid-mechanism"), "{failure}");
}

#[test]
fn without_tokens_in_the_configuration_none_are_given_or_taken() {
    let blade = Blade::start(&[&SETTINGS[..], &[("sasl.token_days", "0")]].concat());
    Client::register(blade.c2s_tls, "alice");
    let mut client = Client::connect(blade.c2s_tls);
    assert!(
        !client.features.contains("urn:xmpp:fast:0"),
        "{}",
        client.features
    );
    let success = client.authenticate("alice", &(AGENT.to_owned() + &request("HT-SHA-256-NONE")));
    assert!(
        success.contains("<success") && !success.contains("<token"),
        "{success}"
    );
}
