//! Logins with a client's certificate (XEP-0178), whose authority, certificates and revocation lists are made here.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, DnType,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, OtherNameValue, RevocationReason,
    RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::client::ResolvesClientCert;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{HandshakeKind, SupportedProtocolVersion};

use super::*;

const XMPP_ADDR: &[u64] = &[1, 3, 6, 1, 5, 5, 7, 8, 5];
const OFFERED: &str = "<mechanism>EXTERNAL</mechanism>";
const NS_SASL: &str = "urn:ietf:params:xml:ns:xmpp-sasl";
const BOTH: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];

struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        Authority {
            certificate: params.self_signed(&key).unwrap(),
            issuer: Issuer::new(params, key),
        }
    }

    /// With these XMPP addresses, and whatever `more` puts in.
    fn issue(&self, addresses: &[&str], more: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = CertificateParams::default();
        params.subject_alt_names = addresses
            .iter()
            .map(|address| {
                let value = OtherNameValue::Utf8String((*address).to_owned());
                SanType::OtherName((XMPP_ADDR.to_vec(), value))
            })
            .collect();
        more(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Identity {
            chain: vec![certificate.der().clone()],
            key,
        }
    }

    /// Writes the list of what it has revoked.
    fn revoke(&self, serials: &[u64], to: &Path) {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(4000, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).unwrap();
        std::fs::write(to, list.pem().unwrap()).unwrap();
    }

    /// A blade that trusts it, with the accounts alice and bob.
    fn blade(&self, more: &[(&str, &str)]) -> Blade {
        let mut blade = Blade::prepare(&SETTINGS);
        let path = blade.folder().join("authority.pem");
        std::fs::write(&path, self.certificate.pem()).unwrap();
        blade.set("tls.client_ca", &format!("{path:?}"));
        for (key, value) in more {
            blade.set(key, value);
        }
        blade.restart();
        for name in ["alice", "bob"] {
            Client::register(blade.c2s_tls, name);
        }
        blade
    }
}

/// What a client is set up with that has this certificate; its connections resume each other's TLS sessions.
fn with(identity: &Identity, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let key = PrivateKeyDer::try_from(identity.key.serialize_der()).unwrap();
    let config = configuration(versions).with_client_auth_cert(identity.chain.clone(), key);
    Arc::new(config.unwrap())
}

impl Client {
    fn offers_external(&self) -> bool {
        self.features.contains(OFFERED)
    }

    fn was_resumed(&self) -> bool {
        self.stream.conn.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// In the older profile; all from `<success>` or `<failure>` to its end.
    fn auth_external(&mut self, data: &str) -> String {
        self.send(&format!(
            "<auth xmlns='{NS_SASL}' mechanism='EXTERNAL'>{data}</auth>"
        ));
        self.outcome_in(NS_SASL)
    }

    /// In SASL2, with this identity and with `inline`.
    fn authenticate_external(&mut self, authzid: &str, inline: &str) -> String {
        self.send(&format!(
            "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='EXTERNAL'><initial-response>{}</initial-response>{inline}\
             </authenticate>",
            BASE64_STANDARD.encode(authzid)
        ));
        self.outcome()
    }
}

#[test]
fn a_certificate_lets_in_whom_it_names_in_both_profiles_and_both_versions_of_tls() {
    let authority = Authority::new("clients");
    let blade = authority.blade(&[]);
    // the address is prepared like any other
    let alice = authority.issue(&["Alice@LOCALHOST", "alice@localhost"], |_| {});
    for version in BOTH {
        let config = with(&alice, &[version]);
        let connect = || Client::with(blade.c2s_tls, config.clone(), "");
        let mut client = connect();
        // in both lists
        assert_eq!(client.features.matches(OFFERED).count(), 2);
        let success = client.authenticate_external("", &bind(MANAGED));
        let jid = text(&success, "authorization-identifier");
        assert!(
            jid.starts_with("alice@localhost/Desk/") && success.contains("<enabled"),
            "{success}"
        );
        let previd = attribute(&success, "<enabled", "id");
        drop(client);

        // one round trip later
        let resume = format!("{AGENT}<resume xmlns='urn:xmpp:sm:3' previd='{previd}' h='0'/>");
        let success = connect().authenticate_external("alice@localhost", &resume);
        assert!(success.contains("<resumed"), "{success}");

        // without an initial response it is asked for
        let mut client = connect();
        client.send("<authenticate xmlns='urn:xmpp:sasl:2' mechanism='EXTERNAL'/>");
        client.until("</challenge>");
        client.send("<response xmlns='urn:xmpp:sasl:2'/>");
        assert!(client.outcome().contains("<success"));

        // the older way, each of its three ways to say nothing, and the address
        for data in ["=", "", &BASE64_STANDARD.encode("alice@localhost")] {
            let mut client = connect();
            let outcome = match data {
                "" => {
                    client.send(&format!("<auth xmlns='{NS_SASL}' mechanism='EXTERNAL'/>"));
                    client.until("</challenge>");
                    client.send(&format!("<response xmlns='{NS_SASL}'/>"));
                    client.outcome_in(NS_SASL)
                }
                data => client.auth_external(data),
            };
            assert!(outcome.contains("<success"), "{data}: {outcome}");
            client.open("");
            client.send(
                "<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>",
            );
            assert!(client.until("</iq>").contains("<jid>alice@localhost/"));
        }
    }
    let (_, metrics) = blade.http_get("/metrics").unwrap();
    let logins = metrics
        .lines()
        .find(|l| l.starts_with("nitro_certificate_logins_total "));
    assert_eq!(
        logins,
        Some("nitro_certificate_logins_total 12"),
        "{metrics}"
    );
}

#[test]
fn whose_certificate_does_not_hold_is_not_offered_external_and_comes_in_by_password() {
    let authority = Authority::new("clients");
    let list = tempfile::NamedTempFile::new().unwrap();
    authority.revoke(&[7], list.path());
    let blade = authority.blade(&[("tls.client_crl", &format!("[{:?}]", list.path()))]);
    let good = authority.issue(&["alice@localhost"], |_| {});
    assert!(Client::with(blade.c2s_tls, with(&good, &BOTH), "").offers_external());

    let alice = &["alice@localhost"][..];
    // the same name, another key
    let impostor = Authority::new("clients").issue(alice, |_| {});
    let expired = authority.issue(alice, |p| p.not_after = date_time_ymd(2020, 1, 1));
    let early = authority.issue(alice, |p| p.not_before = date_time_ymd(3000, 1, 1));
    let revoked = authority.issue(alice, |p| p.serial_number = Some(SerialNumber::from(7)));
    let server = authority.issue(alice, |p| {
        p.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    let elsewhere = authority.issue(
        &["alice@example.com", "localhost", "alice@localhost/x"],
        |_| {},
    );
    let nameless = authority.issue(&[], |p| {
        p.distinguished_name.push(DnType::CommonName, "alice");
        let email = "alice@localhost".try_into().unwrap();
        p.subject_alt_names.push(SanType::Rfc822Name(email));
    });
    for (what, identity) in [
        ("impostor", &impostor),
        ("expired", &expired),
        ("early", &early),
        ("revoked", &revoked),
        ("server", &server),
        ("elsewhere", &elsewhere),
        ("nameless", &nameless),
    ] {
        for version in BOTH {
            let mut client = Client::with(blade.c2s_tls, with(identity, &[version]), "");
            assert!(!client.offers_external(), "{what}: {}", client.features);
            let failure = client.auth_external("=");
            assert!(failure.contains("<invalid-mechanism"), "{what}: {failure}");
            let failure = client.authenticate_external("alice@localhost", "");
            assert!(failure.contains("<invalid-mechanism"), "{what}: {failure}");
            let success = client.authenticate("alice", &bind(""));
            assert!(success.contains("<bound"), "{what}: {success}");
        }
    }
    assert!(!Client::connect(blade.c2s_tls).offers_external());
}

#[test]
fn a_certificate_acts_for_nobody_whom_it_does_not_name() {
    let authority = Authority::new("clients");
    let blade = authority.blade(&[("limits.auth_attempts_max", "9")]);
    let alice = authority.issue(&["alice@localhost"], |_| {});
    let both = authority.issue(&["alice@localhost", "bob@localhost"], |_| {});
    let nobody = authority.issue(&["nobody@localhost"], |_| {});
    let outcomes = |identity: &Identity, authzid: &str, condition: &str| {
        let mut client = Client::with(blade.c2s_tls, with(identity, &BOTH), "");
        let data = match authzid {
            "" => "=".to_owned(),
            authzid => BASE64_STANDARD.encode(authzid),
        };
        let outcome = client.auth_external(&data);
        assert!(outcome.contains(condition), "{authzid:?}: {outcome}");
        if condition != "<success" {
            let outcome = client.authenticate_external(authzid, "");
            assert!(outcome.contains(condition), "{authzid:?}: {outcome}");
        }
    };
    for wrong in [
        "bob@localhost",
        "alice@example.com",
        "alice@localhost/desk",
        "alice",
        "localhost",
        "@",
        "alice@localhost\0",
    ] {
        outcomes(&alice, wrong, "<invalid-authzid");
    }
    outcomes(&both, "", "<invalid-authzid");
    outcomes(&both, "bob@localhost", "<success");
    outcomes(&both, "carol@localhost", "<invalid-authzid");
    outcomes(&nobody, "", "<not-authorized");
    blade.nitro(&["user", "disable", "alice@localhost"], "");
    outcomes(&alice, "", "<account-disabled");
}

#[test]
fn an_email_address_counts_where_the_operator_says_so_and_there_is_no_xmpp_address() {
    let authority = Authority::new("clients");
    let blade = authority.blade(&[("tls.client_email", "true")]);
    let email = |address: &str| SanType::Rfc822Name(address.to_owned().try_into().unwrap());
    let by_mail = authority.issue(&[], |p| {
        p.subject_alt_names = vec![email("other@example.com"), email("alice@localhost")];
    });
    let success =
        Client::with(blade.c2s_tls, with(&by_mail, &BOTH), "").authenticate_external("", "");
    assert_eq!(
        text(&success, "authorization-identifier"),
        "alice@localhost"
    );
    let named = authority.issue(&["alice@example.com"], |p| {
        p.subject_alt_names.push(email("alice@localhost"));
    });
    assert!(!Client::with(blade.c2s_tls, with(&named, &BOTH), "").offers_external());
}

/// Connects until EXTERNAL is not offered any more, resuming TLS each time.
fn until_it_ends(address: SocketAddr, config: &Arc<ClientConfig>) {
    let deadline = Instant::now() + ANSWER_WITHIN;
    loop {
        let client = Client::with(address, config.clone(), "");
        assert!(client.was_resumed());
        if !client.offers_external() {
            return;
        }
        assert!(Instant::now() < deadline, "it never ends");
        std::thread::sleep(Duration::from_millis(100)); // the clock's; the bound is the deadline
    }
}

#[test]
fn a_resumed_tls_session_does_not_outlive_its_certificate() {
    let authority = Authority::new("clients");
    let list = tempfile::NamedTempFile::new().unwrap();
    authority.revoke(&[], list.path());
    let blade = authority.blade(&[("tls.client_crl", &format!("[{:?}]", list.path()))]);
    for version in BOTH {
        let lasting = authority.issue(&["alice@localhost"], |p| {
            p.serial_number = Some(SerialNumber::from(7));
        });
        let config = with(&lasting, &[version]);
        let first = Client::with(blade.c2s_tls, config.clone(), "");
        assert!(first.offers_external() && !first.was_resumed());
        let mut second = Client::with(blade.c2s_tls, config.clone(), "");
        assert!(second.offers_external() && second.was_resumed());
        let success = second.authenticate_external("", &bind(""));
        assert!(success.contains("<bound"), "{success}");

        // it expires in a moment, and its tickets have longer to live
        let now = std::time::UNIX_EPOCH.elapsed().unwrap();
        let short = authority.issue(&["alice@localhost"], |p| {
            p.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(now.as_secs() + 4);
        });
        let short = with(&short, &[version]);
        assert!(Client::with(blade.c2s_tls, short.clone(), "").offers_external());
        until_it_ends(blade.c2s_tls, &short);

        // revoked: the reloaded server takes no ticket of before
        authority.revoke(&[7], list.path());
        reload(&blade);
        let mut client = not_resumed(blade.c2s_tls, &config);
        assert!(!client.offers_external());
        let failure = client.authenticate_external("alice@localhost", "");
        assert!(failure.contains("<invalid-mechanism"), "{failure}");
        assert!(!Client::with(blade.c2s_tls, config.clone(), "").offers_external());
        authority.revoke(&[], list.path());
        reload(&blade);
        assert!(not_resumed(blade.c2s_tls, &config).offers_external());
    }
    let (_, metrics) = blade.http_get("/metrics").unwrap();
    let resumed = metrics
        .lines()
        .find(|l| l.starts_with("nitro_tls_resumptions_total "));
    let resumed: f64 = resumed.unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    assert!(resumed >= 4.0, "{metrics}");
}

/// Connects until the server takes no ticket of before.
fn not_resumed(address: SocketAddr, config: &Arc<ClientConfig>) -> Client {
    let deadline = Instant::now() + ANSWER_WITHIN;
    loop {
        let client = Client::with(address, config.clone(), "");
        if !client.was_resumed() {
            return client;
        }
        assert!(Instant::now() < deadline, "tickets outlive the reload");
    }
}

fn reload(blade: &Blade) {
    let count = || blade.log().matches("reloaded: certificate").count();
    let before = count();
    blade.signal(libc::SIGHUP);
    let deadline = Instant::now() + ANSWER_WITHIN;
    while count() == before {
        assert!(Instant::now() < deadline, "{}", blade.log());
        std::thread::sleep(Duration::from_millis(10)); // the poll's interval; the bound is the deadline
    }
}

#[test]
fn a_login_by_certificate_gets_no_token_that_would_outlive_it() {
    let authority = Authority::new("clients");
    let blade = authority.blade(&[]);
    let alice = authority.issue(&["alice@localhost"], |_| {});
    let wish = AGENT.to_owned() + &request("HT-SHA-256-NONE");
    let success =
        Client::with(blade.c2s_tls, with(&alice, &BOTH), "").authenticate_external("", &wish);
    assert!(
        success.contains("<success") && !success.contains("<token"),
        "{success}"
    );
}

/// Has no certificate, and notes that it was asked for one.
#[derive(Debug, Default)]
struct Asked(AtomicBool);

impl ResolvesClientCert for Asked {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[test]
fn only_clients_of_the_ports_for_xmpp_are_asked_for_a_certificate() {
    let authority = Authority::new("clients");
    let blade = authority.blade(&[]);
    let plain = Blade::start(&SETTINGS);
    for (address, expected) in [
        (blade.c2s_tls, true),
        (blade.web_tls, false),
        (plain.c2s_tls, false),
    ] {
        let asked = Arc::new(Asked::default());
        let config = configuration(&BOTH).with_client_cert_resolver(asked.clone());
        let name = ServerName::try_from(DOMAIN).unwrap();
        let mut tls = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(ANSWER_WITHIN)).unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).unwrap();
        }
        assert_eq!(asked.0.load(Ordering::Relaxed), expected, "{address}");
    }
}
