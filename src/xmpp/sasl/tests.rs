//! Whole exchanges, against a client written here.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use proptest::prelude::*;

use super::decoy::{Profile, Shape};
use super::scram::testing::Client;
use super::*;

const NONCE: &[u8] = b"eighteen bytes, ok";
const PASSWORD: &str = "pencil";
const SALT: &[u8] = b"sixteen bytes ok";
const SHAPE: Shape = Shape {
    iterations: 16,
    salt_len: 16,
};

static KEYS: LazyLock<(ScramKeys, ScramKeys)> = LazyLock::new(|| {
    let derive = |hash| derive(hash, PASSWORD, SALT, SHAPE.iterations).unwrap();
    (derive(Hash::Sha1), derive(Hash::Sha256))
});

static BINDINGS: LazyLock<ChannelBindings> = LazyLock::new(|| ChannelBindings {
    exporter: Some(Exporter::new(|| [7; 32])),
    server_end_point: Some([9; 48].into()),
});

fn account() -> Option<Credentials<'static>> {
    Some(Credentials {
        sha1: Some(KEYS.0.as_ref()),
        sha256: Some(KEYS.1.as_ref()),
    })
}

fn decoy() -> Decoy {
    let profile = Profile {
        sha1: Some(SHAPE),
        sha256: Some(SHAPE),
        accounts: 1,
    };
    Decoy::new(&[1; 32], &[profile], SHAPE)
}

fn offer() -> Offer<'static> {
    Offer {
        mechanisms: &Mechanism::ALL,
        bindings: &BINDINGS,
        encrypted: true,
        domain: "example.com",
        certified: &[],
    }
}

/// An offer as on a stream without any channel binding.
fn unbound() -> Offer<'static> {
    static NO_BINDINGS: ChannelBindings = ChannelBindings {
        exporter: None,
        server_end_point: None,
    };
    Offer {
        mechanisms: Mechanism::offered(false, true),
        bindings: &NO_BINDINGS,
        ..offer()
    }
}

fn begin(mechanism: Mechanism, message: &str, offer: &Offer<'_>) -> Result<Exchange, Failure> {
    match Exchange::start(mechanism, Some(message.as_bytes()), offer)? {
        Start::User(exchange) => Ok(exchange),
        Start::NeedInitial => panic!("the message was there"),
    }
}

fn refused(mechanism: Mechanism, message: &str, offer: &Offer<'_>) -> &'static str {
    begin(mechanism, message, offer)
        .expect_err(message)
        .condition
}

fn challenge(exchange: &mut Exchange, account: Option<Credentials<'_>>) -> String {
    match exchange.credentials(account, &decoy(), NONCE) {
        Step::Challenge(data) => String::from_utf8(data).unwrap(),
        step => panic!("{step:?}"),
    }
}

/// A whole SCRAM exchange of an honest client.
fn scram(
    mechanism: Mechanism,
    header: &str,
    binding: &[u8],
    password: &str,
    account: Option<Credentials<'_>>,
    offer: &Offer<'_>,
) -> Result<(), Failure> {
    let mut client = Client::new(mechanism.hash().unwrap(), header, "user", "client-nonce");
    let mut exchange = begin(mechanism, &client.first(), offer)?;
    assert_eq!(exchange.username(), "user");
    let server_first = challenge(&mut exchange, account);
    let last = client.last(&server_first, binding, password, "");
    match exchange.respond(last.as_bytes()) {
        Step::Success { additional } => {
            assert_eq!(additional, client.server_final().into_bytes());
            Ok(())
        }
        Step::Failure(failure) => Err(failure),
        step => panic!("{step:?}"),
    }
}

fn plain(
    message: &str,
    account: Option<Credentials<'_>>,
    offer: &Offer<'_>,
) -> Result<String, Failure> {
    let mut exchange = begin(Mechanism::Plain, message, offer)?;
    let Step::CheckPassword(check) = exchange.credentials(account, &decoy(), NONCE) else {
        panic!("PLAIN checks a password");
    };
    assert_eq!(check.iterations(), SHAPE.iterations);
    let correct = std::thread::spawn(|| check.run()).join().unwrap();
    match exchange.verified(correct) {
        Step::Success { additional } => {
            assert!(additional.is_empty());
            Ok(exchange.username().to_owned())
        }
        Step::Failure(failure) => Err(failure),
        step => panic!("{step:?}"),
    }
}

#[test]
fn the_right_password_passes_with_every_mechanism_and_binding() {
    use Mechanism::*;
    let exporter: &[u8] = &[7; 32];
    let server_end_point: &[u8] = &[9; 48];
    for (mechanism, header, binding) in [
        (ScramSha1, "n,,", &[][..]),
        (ScramSha256, "n,,", &[]),
        (ScramSha256, "n,a=user@example.com,", &[]),
        (ScramSha256, "n,a=USER@EXAMPLE.com.,", &[]),
        (ScramSha1Plus, "p=tls-exporter,,", exporter),
        (
            ScramSha256Plus,
            "p=tls-exporter,a=user@example.com,",
            exporter,
        ),
        (ScramSha1Plus, "p=tls-server-end-point,,", server_end_point),
        (
            ScramSha256Plus,
            "p=tls-server-end-point,,",
            server_end_point,
        ),
    ] {
        scram(mechanism, header, binding, PASSWORD, account(), &offer()).unwrap();
    }
    for mechanism in [ScramSha1, ScramSha256] {
        scram(mechanism, "y,,", &[], PASSWORD, account(), &unbound()).unwrap();
    }
}

#[test]
fn wrong_password_unknown_user_and_missing_keys_end_alike() {
    let no_keys = Some(Credentials::default());
    let mut short = account().unwrap();
    short.sha1 = short.sha1.map(|keys| ScramKeysRef {
        stored_key: &keys.stored_key[..19],
        ..keys
    });
    for mechanism in [Mechanism::ScramSha1, Mechanism::ScramSha256] {
        for (password, account) in [
            ("pencils", account()),
            (PASSWORD, None),
            (PASSWORD, no_keys),
        ] {
            let failure = scram(mechanism, "n,,", &[], password, account, &offer()).unwrap_err();
            assert_eq!(failure, Failure::NOT_AUTHORIZED);
        }
    }
    let failure = scram(
        Mechanism::ScramSha1,
        "n,,",
        &[],
        PASSWORD,
        Some(short),
        &offer(),
    );
    assert_eq!(failure.unwrap_err(), Failure::NOT_AUTHORIZED);
    for (password, account) in [
        ("pencils", account()),
        (PASSWORD, None),
        (PASSWORD, no_keys),
    ] {
        let failure = plain(&format!("\0user\0{password}"), account, &offer()).unwrap_err();
        assert_eq!(failure, Failure::NOT_AUTHORIZED);
    }
}

#[test]
fn a_client_without_proof_cannot_use_the_known_keys_of_a_decoy() {
    // The decoy's keys are zeros: a client that computes with them must fail all the same.
    let mut client = Client::new(Hash::Sha1, "n,,", "user", "client-nonce");
    let mut exchange = begin(Mechanism::ScramSha1, &client.first(), &offer()).unwrap();
    let server_first = challenge(&mut exchange, None);
    let last = client.last_with_stored_key(&server_first, &[0; 20]);
    assert!(matches!(
        exchange.respond(last.as_bytes()),
        Step::Failure(Failure::NOT_AUTHORIZED)
    ));
}

#[test]
fn a_changed_channel_nonce_or_offer_fails() {
    let plus = Mechanism::ScramSha256Plus;
    let wrong = scram(
        plus,
        "p=tls-exporter,,",
        &[8; 32],
        PASSWORD,
        account(),
        &offer(),
    );
    assert_eq!(wrong.unwrap_err(), Failure::NOT_AUTHORIZED);
    let swapped = scram(
        plus,
        "p=tls-exporter,,",
        &[9; 48],
        PASSWORD,
        account(),
        &offer(),
    );
    assert_eq!(swapped.unwrap_err(), Failure::NOT_AUTHORIZED);

    let not_authorized = |tamper: fn(String) -> String, after: fn(String) -> String| {
        let mut client = Client::new(Hash::Sha256, "n,,", "user", "client-nonce");
        let mut exchange = begin(Mechanism::ScramSha256, &client.first(), &offer()).unwrap();
        let server_first = tamper(challenge(&mut exchange, account()));
        let last = after(client.last(&server_first, &[], PASSWORD, ""));
        match exchange.respond(last.as_bytes()) {
            Step::Failure(Failure::NOT_AUTHORIZED) => {}
            step => panic!("{step:?}"),
        }
    };
    // A man in the middle replaces the hash of the offer by that of his own, thinner one.
    not_authorized(
        |text| text[..text.rfind(",h=").unwrap()].to_owned() + ",h=AAAA",
        |text| text,
    );
    not_authorized(
        |text| text.replace("client-nonce", "client-nonceX"),
        |text| text,
    );
    not_authorized(|text| text, |text| text.replace("c=biws", "c=eSws"));
}

#[test]
fn extensions_that_are_not_mandatory_are_ignored_but_signed() {
    let mut client = Client::new(Hash::Sha1, "n,,", "user", "client-nonce");
    let first = format!("{},t=telemetry=1", client.first());
    client.set_first(&first);
    let mut exchange = begin(Mechanism::ScramSha1, &first, &offer()).unwrap();
    let server_first = challenge(&mut exchange, account());
    let last = client.last(&server_first, &[], PASSWORD, ",x=19C6,y=z");
    assert!(matches!(
        exchange.respond(last.as_bytes()),
        Step::Success { .. }
    ));
}

#[test]
fn a_name_is_decoded_and_normalised() {
    for (name, local) in [
        ("USER", "user"),
        ("a=2Cb=3Dc", "a,b=c"),
        ("=2C=2C", ",,"),
        ("JOSÉ", "josé"),
    ] {
        let message = format!("n,,n={name},r=x");
        let exchange = begin(Mechanism::ScramSha1, &message, &offer()).unwrap();
        assert_eq!(exchange.username(), local);
    }
    assert_eq!(
        plain("\0USER\0pencil", account(), &offer()).unwrap(),
        "user"
    );
}

#[test]
fn nobody_acts_as_another() {
    for authzid in [
        "other@example.com",
        "user@example.org",
        "user@example.com/desk",
        "user",
        "example.com",
        "@",
        "user@",
    ] {
        let message = format!("n,a={authzid},n=user,r=x");
        assert_eq!(
            refused(Mechanism::ScramSha1, &message, &offer()),
            "invalid-authzid"
        );
        let message = format!("{authzid}\0user\0pencil");
        assert_eq!(
            refused(Mechanism::Plain, &message, &offer()),
            "invalid-authzid"
        );
    }
    for authzid in ["", "user@example.com", "User@Example.COM"] {
        let message = format!("{authzid}\0user\0pencil");
        assert_eq!(plain(&message, account(), &offer()).unwrap(), "user");
    }
}

#[test]
fn the_gs2_flag_has_to_fit_mechanism_and_offer() {
    use Mechanism::*;
    for (mechanism, flag, offer, condition) in [
        (ScramSha1, "y", offer(), "not-authorized"),
        (ScramSha256, "p=tls-exporter", offer(), "malformed-request"),
        (ScramSha1, "p=tls-exporter", unbound(), "malformed-request"),
        (ScramSha256Plus, "n", offer(), "malformed-request"),
        (ScramSha256Plus, "y", offer(), "malformed-request"),
        (
            ScramSha256Plus,
            "p=tls-unique",
            offer(),
            "malformed-request",
        ),
        (ScramSha256Plus, "p=", offer(), "malformed-request"),
        (ScramSha256Plus, "p", offer(), "malformed-request"),
        (ScramSha256Plus, "", offer(), "malformed-request"),
        (ScramSha256, "x", offer(), "malformed-request"),
        (ScramSha256, "N", offer(), "malformed-request"),
        (
            ScramSha256Plus,
            "p=tls-exporter",
            unbound(),
            "invalid-mechanism",
        ),
    ] {
        let message = format!("{flag},,n=user,r=x");
        assert_eq!(
            refused(mechanism, &message, &offer),
            condition,
            "{mechanism:?} {flag}"
        );
    }
    // TLS 1.2: only the certificate's hash is there.
    let bindings = ChannelBindings {
        exporter: None,
        server_end_point: BINDINGS.server_end_point.clone(),
    };
    let offer = Offer {
        bindings: &bindings,
        ..offer()
    };
    let message = "p=tls-exporter,,n=user,r=x";
    assert_eq!(refused(ScramSha1Plus, message, &offer), "malformed-request");
}

#[test]
fn only_what_was_offered_can_be_used_and_plain_only_over_tls() {
    let plain_text = Offer {
        mechanisms: Mechanism::offered(false, false),
        encrypted: false,
        ..unbound()
    };
    let condition = |mechanism, offer: &Offer<'_>| {
        Exchange::start(mechanism, None, offer)
            .unwrap_err()
            .condition
    };
    assert_eq!(
        condition(Mechanism::Plain, &plain_text),
        "encryption-required"
    );
    assert_eq!(
        condition(Mechanism::ScramSha1Plus, &plain_text),
        "invalid-mechanism"
    );
    let no_plain = Offer {
        mechanisms: Mechanism::offered(true, false),
        ..offer()
    };
    assert_eq!(condition(Mechanism::Plain, &no_plain), "invalid-mechanism");
    for mechanism in Mechanism::ALL {
        assert_eq!(Mechanism::from_name(mechanism.name()), Some(mechanism));
        assert!(matches!(
            Exchange::start(mechanism, None, &offer()),
            Ok(Start::NeedInitial)
        ));
    }
    assert_eq!(Mechanism::from_name("scram-sha-1"), None);
    assert_eq!(Mechanism::from_name("ANONYMOUS"), None);
}

fn certified<'o>(accounts: &'o [Box<str>]) -> Offer<'o> {
    Offer {
        certified: accounts,
        ..offer()
    }
}

#[test]
fn a_certificate_lets_in_whom_it_names_if_there_is_such_an_account() {
    let (one, two) = (["user".into()], ["user".into(), "other".into()]);
    for (accounts, message, user) in [
        (&one[..], "", Ok("user")),
        (&one, "user@example.com", Ok("user")),
        (&one, "USER@Example.com.", Ok("user")),
        (&one, "other@example.com", Err("invalid-authzid")),
        (&one, "user@example.org", Err("invalid-authzid")),
        (&one, "user@example.com/desk", Err("invalid-authzid")),
        (&one, "user", Err("invalid-authzid")),
        (&one, "user@example.com\0", Err("invalid-authzid")),
        (&two, "", Err("invalid-authzid")),
        (&two, "other@example.com", Ok("other")),
        // never offered then
        (&[], "", Err("invalid-authzid")),
        (&[], "user@example.com", Err("invalid-authzid")),
    ] {
        let begun = begin(Mechanism::External, message, &certified(accounts));
        let begun = begun.as_ref().map(Exchange::username);
        assert_eq!(
            begun.map_err(|failure| failure.condition),
            user,
            "{message}"
        );
    }
    let outcome = |account: Option<Credentials<'_>>| {
        let mut exchange = begin(Mechanism::External, "", &certified(&one)).unwrap();
        exchange.credentials(account, &decoy(), NONCE)
    };
    assert!(matches!(outcome(account()), Step::Success { .. }));
    // an account without password
    let none = Credentials {
        sha1: None,
        sha256: None,
    };
    assert!(matches!(outcome(Some(none)), Step::Success { .. }));
    let Step::Failure(failure) = outcome(None) else {
        panic!("it passed");
    };
    assert_eq!(failure, Failure::NOT_AUTHORIZED);
    // and it is over
    let mut exchange = begin(Mechanism::External, "", &certified(&one)).unwrap();
    exchange.credentials(None, &decoy(), NONCE);
    let step = exchange.credentials(account(), &decoy(), NONCE);
    assert!(matches!(step, Step::Failure(_)));
}

#[test]
fn the_accounts_of_a_certificate_are_the_addresses_of_our_domain() {
    let texts = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
    let accounts = |xmpp: &[&str], email: Option<&[&str]>| {
        let email = email.map(texts);
        let accounts = external::accounts(&texts(xmpp), email.as_deref(), "example.com");
        accounts.iter().map(|a| a.to_string()).collect::<Vec<_>>()
    };
    let none: [&str; 0] = [];
    assert_eq!(
        accounts(
            &["Alice@example.com", "alice@EXAMPLE.com", "bob@example.com"],
            None
        ),
        ["alice", "bob"]
    );
    let others = [
        "alice@example.org",
        "example.com",
        "alice@example.com/desk",
        "",
        "a b@example.com",
        "@example.com",
    ];
    assert_eq!(accounts(&others, None), none);
    let email = &["alice@example.com", "alice@example.org"][..];
    assert_eq!(accounts(&[], Some(email)), ["alice"]);
    assert_eq!(accounts(&[], None), none);
    // whoever has an XMPP address is called by that
    assert_eq!(accounts(&["alice@example.org"], Some(email)), none);
}

#[test]
fn malformed_first_messages_are_refused() {
    let long_nonce = format!("n,,n=user,r={}", "x".repeat(1025));
    let long_message = format!("n,,n=user,r=x,e={}", "x".repeat(MESSAGE_BYTES_MAX));
    for message in [
        "",
        ",",
        ",,",
        "n,",
        "n,,",
        "n,,n=user",
        "n,,n=user,",
        "n,,n=user,r=",
        "n,,n=,r=x",
        "n,,r=x,n=user",
        "n,,n=us=er,r=x",
        "n,,n=user=,r=x",
        "n,,n=user=2c,r=x",
        "n,,n=us\0er,r=x",
        "n,,n=user,r=x y",
        "n,,n=user,r=é",
        "n,,n=user,r=x,",
        "n,,n=user,r=x,e",
        "n,,n=user,r=x,e=",
        "n,,n=user,r=x,1=2",
        "n,,m=ext,n=user,r=x",
        "n,a=,n=user,r=x",
        "n,user@example.com,n=user,r=x",
        "n,,,n=user,r=x",
        &long_nonce,
        &long_message,
    ] {
        let condition = refused(Mechanism::ScramSha1, message, &offer());
        assert_eq!(condition, "malformed-request", "{message:?}");
    }
    let long_password = format!("\0user\0{}", "x".repeat(PASSWORD_BYTES_MAX + 1));
    for message in [
        "",
        "user",
        "\0user",
        "\0user\0",
        "\0\0pencil",
        "a\0b\0c\0d",
        "\0user\0pencil\0",
        &long_password,
    ] {
        let condition = refused(Mechanism::Plain, message, &offer());
        assert_eq!(condition, "malformed-request", "{message:?}");
    }
    for mechanism in Mechanism::ALL {
        let failure = Exchange::start(mechanism, Some(b"\0user\0\xff"), &offer()).unwrap_err();
        assert_eq!(failure.condition, "malformed-request");
    }
    // No account can have such a name.
    assert_eq!(
        refused(Mechanism::ScramSha1, "n,,n=us er,r=x", &offer()),
        "not-authorized"
    );
    assert_eq!(
        refused(Mechanism::Plain, "\0us@er\0pencil", &offer()),
        "not-authorized"
    );
}

#[test]
fn malformed_last_messages_are_refused_and_end_the_exchange() {
    let proof = BASE64.encode([0; 20]);
    let nonce = format!("client-nonce{}", BASE64.encode(NONCE));
    for message in [
        "".to_owned(),
        "p=".to_owned(),
        format!("p={proof}"),
        format!("c=biws,p={proof}"),
        format!("r={nonce},c=biws,p={proof}"),
        format!("c=biws,r={nonce}"),
        format!("c=biws,r={nonce},p="),
        format!("c=biws,r={nonce},p=AAAA"),
        format!("c=biws,r={nonce},p=!{proof}"),
        format!("c=biws,r={nonce},p={proof},x=y"),
        format!("c=biws,r={nonce},,p={proof}"),
        format!("c=biws,r={nonce},p={}", "A".repeat(4000)),
        format!("c={},r={nonce},p={proof}", "A".repeat(MESSAGE_BYTES_MAX)),
    ] {
        let first = "n,,n=user,r=client-nonce";
        let mut exchange = begin(Mechanism::ScramSha1, first, &offer()).unwrap();
        challenge(&mut exchange, account());
        let Step::Failure(failure) = exchange.respond(message.as_bytes()) else {
            panic!("{message}");
        };
        assert_eq!(failure.condition, "malformed-request", "{message}");
        for step in [
            exchange.respond(b"again"),
            exchange.credentials(account(), &decoy(), NONCE),
            exchange.verified(true),
        ] {
            assert!(matches!(step, Step::Failure(_)));
        }
    }
}

#[test]
fn steps_out_of_order_fail() {
    let first = "n,,n=user,r=client-nonce";
    let mut exchange = begin(Mechanism::ScramSha1, first, &offer()).unwrap();
    assert!(matches!(exchange.verified(true), Step::Failure(_)));
    let mut exchange = begin(Mechanism::ScramSha1, first, &offer()).unwrap();
    assert!(matches!(exchange.respond(b"x"), Step::Failure(_)));
    let mut exchange = begin(Mechanism::Plain, "\0user\0pencil", &offer()).unwrap();
    assert!(matches!(exchange.verified(true), Step::Failure(_)));
}

#[test]
fn a_decoys_challenge_looks_like_an_accounts_and_stays_the_same() {
    let shape = |challenge: &str| {
        let parts: Vec<_> = challenge
            .split(',')
            .map(|part| {
                let (name, value) = part.split_once('=').unwrap();
                (name.to_owned(), value.len())
            })
            .collect();
        let iterations = challenge.split(',').nth(2).unwrap().to_owned();
        (parts, iterations)
    };
    for mechanism in [Mechanism::ScramSha1, Mechanism::ScramSha256] {
        let ask = |account| {
            let first = "n,,n=user,r=client-nonce";
            challenge(&mut begin(mechanism, first, &offer()).unwrap(), account)
        };
        let (real, made_up) = (ask(account()), ask(None));
        assert_eq!(shape(&real), shape(&made_up));
        assert_ne!(real, made_up);
        assert_eq!(made_up, ask(None));
        assert_eq!(shape(&real), shape(&ask(Some(Credentials::default()))));
    }
}

#[test]
fn an_exchange_is_small_and_can_move_to_its_owner() {
    fn is_send<T: Send>() {}
    is_send::<Exchange>();
    is_send::<PasswordCheck>();
    is_send::<Decoy>();
    assert!(size_of::<Exchange>() <= 64, "{}", size_of::<Exchange>());
    assert!(
        size_of::<scram::Server>() <= 320,
        "{}",
        size_of::<scram::Server>()
    );
}

#[test]
fn passwords_are_prepared_by_opaque_string() {
    let keys = |password: &str| derive(Hash::Sha256, password, SALT, 1);
    assert!(keys("jose\u{301}").unwrap() == keys("jos\u{e9}").unwrap());
    assert!(keys("a\u{a0}b").unwrap() == keys("a b").unwrap());
    assert!(keys("A").unwrap() != keys("a").unwrap());
    for (password, error) in [
        (String::new(), SaslError::PasswordForbidden),
        ("a\u{7}b".to_owned(), SaslError::PasswordForbidden),
        (
            "x".repeat(PASSWORD_BYTES_MAX + 1),
            SaslError::PasswordTooLong,
        ),
    ] {
        assert_eq!(keys(&password).err(), Some(error));
    }
    assert_eq!(
        derive(Hash::Sha1, "x", SALT, 0).err(),
        Some(SaslError::Parameters)
    );
    assert_eq!(
        derive(Hash::Sha1, "x", b"", 1).err(),
        Some(SaslError::Parameters)
    );
}

fn any_mechanism() -> impl Strategy<Value = Mechanism> {
    prop::sample::select(&Mechanism::ALL[..])
}

proptest! {
    #[test]
    fn random_bytes_neither_panic_nor_pass(
        mechanism in any_mechanism(),
        first in prop::collection::vec(any::<u8>(), 0..64),
        last in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        if let Ok(Start::User(mut exchange)) = Exchange::start(mechanism, Some(&first), &offer()) {
            let step = exchange.credentials(account(), &decoy(), NONCE);
            let passed = matches!(step, Step::Success { .. });
            prop_assert!(!passed);
            let step = exchange.respond(&last);
            prop_assert!(matches!(step, Step::Failure(_)));
        }
    }

    #[test]
    fn nearly_right_messages_neither_panic_nor_pass(
        mechanism in any_mechanism(),
        first in "(n|y|p=tls-exporter)?,(a=user@example.com)?,(m=1,)?n=[a-z=,C2D3]{0,6},r=[!-~]{0,9}(,[a-z]=.{0,3})?",
        plain in "(user@example.com|.{0,3})\0[a-zA-Z@]{0,3}\0\\PC{0,5}",
        last in "c=(biws|[A-Za-z/+=]{0,8}),r=client-nonce.{0,3}(,[a-z]=.{0,3})?,p=[A-Za-z/+]{0,44}=?=?",
    ) {
        let first = if mechanism == Mechanism::Plain { &plain } else { &first };
        if let Ok(Start::User(mut exchange)) = Exchange::start(mechanism, Some(first.as_bytes()), &offer()) {
            match exchange.credentials(account(), &decoy(), NONCE) {
                Step::Challenge(_) => {}
                Step::CheckPassword(check) => prop_assert!(!check.run()),
                step => panic!("{step:?}"),
            }
            let step = exchange.respond(last.as_bytes());
            prop_assert!(matches!(step, Step::Failure(_)));
        }
    }
}
