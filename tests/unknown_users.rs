//! An unknown user and a wrong password look the same: in bytes, and in time.
//!
//! Time: every name is tried once. For each step (until the challenge, until the failure) the medians of two kinds of
//! names are compared; they may differ by no more than the larger interquartile range of the two. One attempt of a kind
//! then tells nearly nothing, and there is no second one of the same state: the first brings the name into the cache.
//! Names that were tried before are compared with such, others with others, and a name that nobody tried with one that is
//! in the cache: `sasl.answer_ms_min` covers the query of the database.

#[path = "blade/mod.rs"]
mod blade;
#[path = "client/mod.rs"]
mod client;

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine};
use blade::Blade;
use client::connection::Connection;
use client::xml::Element;

const SASL: &str = "urn:ietf:params:xml:ns:xmpp-sasl";
/// Names of each kind.
const NAMES: usize = 150;
/// Noise on a busy machine may spoil a round; a difference that is there spoils all of them.
const ROUNDS: usize = 3;

struct Attempt {
    salt: Vec<u8>,
    iterations: u32,
    failure: Element,
    until_challenge: Duration,
    until_failure: Duration,
}

fn attempt(connection: &mut Connection, name: &str) -> Attempt {
    let initial = BASE64_STANDARD.encode(format!("n,,n={name},r=fyko+d2lbbFgONRv9qkxdawL"));
    let begun = Instant::now();
    connection
        .send(format!("<auth xmlns='{SASL}' mechanism='SCRAM-SHA-1'>{initial}</auth>").as_bytes())
        .unwrap();
    let challenge = connection.next_element().unwrap();
    let until_challenge = begun.elapsed();
    assert_eq!(challenge.name, "challenge", "{challenge}");
    let text = String::from_utf8(BASE64_STANDARD.decode(&challenge.text).unwrap()).unwrap();
    let field = |key: &str| {
        let found = text.split(',').find_map(|f| f.strip_prefix(key));
        found
            .unwrap_or_else(|| panic!("no {key} in {text}"))
            .to_owned()
    };
    let proof = BASE64_STANDARD.encode([7; 20]);
    let response = BASE64_STANDARD.encode(format!("c=biws,r={},p={proof}", field("r=")));
    let begun = Instant::now();
    connection
        .send(format!("<response xmlns='{SASL}'>{response}</response>").as_bytes())
        .unwrap();
    let failure = connection.next_element().unwrap();
    Attempt {
        salt: BASE64_STANDARD.decode(field("s=")).unwrap(),
        iterations: field("i=").parse().unwrap(),
        until_failure: begun.elapsed(),
        until_challenge,
        failure,
    }
}

/// Accounts of two kinds: some were imported with another iteration count.
fn import(blade: &Blade, prefix: &str, iterations: &str) {
    let file = blade.folder().join(format!("{prefix}.csv"));
    let rows: String = (0..NAMES).map(|n| format!("{prefix}{n},x\n")).collect();
    fs::write(&file, format!("username,password\n{rows}")).unwrap();
    // The count is that of the importing command.
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_nitro"))
        .args(["user", "import", file.to_str().unwrap()])
        .args([
            "--set",
            &format!("data_dir=\"{}\"", blade.data_dir().display()),
        ])
        .args(["--set", &format!("sasl.iterations={iterations}")])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A quarter, the half, three quarters.
fn quartiles(mut times: Vec<Duration>) -> [Duration; 3] {
    times.sort_unstable();
    [1, 2, 3].map(|q| times[times.len() * q / 4])
}

fn prepared() -> Blade {
    let blade = Blade::prepare(
        &[
            &client::PLAIN[..],
            &[
                ("limits.auth_failure_delay_ms", "0"),
                ("limits.auth_attempts_max", "100"),
                ("log.level", "\"warn\""),
            ],
        ]
        .concat(),
    );
    import(&blade, "usual", "4096");
    import(&blade, "other", "9000");
    blade
}

#[test]
fn an_unknown_user_gets_what_a_known_one_gets_byte_for_byte() {
    let mut blade = prepared();
    blade.restart();
    let mut connection = client::opened(blade.c2s);
    let mut looks: [BTreeSet<(u32, usize)>; 2] = Default::default();
    let mut failures = BTreeSet::new();
    for n in 0..90 {
        if n % 30 == 0 {
            connection = client::opened(blade.c2s);
        }
        let kind = if n % 2 == 0 { "usual" } else { "other" };
        for (place, name) in [format!("{kind}{n}"), format!("nobody{n}")]
            .iter()
            .enumerate()
        {
            let attempt = attempt(&mut connection, name);
            looks[place].insert((attempt.iterations, attempt.salt.len()));
            failures.insert(attempt.failure.to_string());
        }
    }
    assert_eq!(looks[0], looks[1]);
    assert_eq!(looks[0].len(), 2, "{looks:?}");
    assert_eq!(failures.len(), 1, "{failures:?}");
    // asked again, also after a restart, a name keeps its salt
    let name = "nobody1000";
    let first = attempt(&mut client::opened(blade.c2s), name);
    blade.terminate();
    blade.restart();
    let second = attempt(&mut client::opened(blade.c2s), name);
    assert_eq!(
        (first.salt, first.iterations),
        (second.salt, second.iterations)
    );
    // accounts that come later, in quick succession, change what strangers are told
    import(&blade, "later", "5000");
    import(&blade, "latest", "6000");
    client::wait_until("the look of the latest", Duration::from_secs(15), || {
        let mut connection = client::opened(blade.c2s);
        (0..40).any(|n| attempt(&mut connection, &format!("none{n}")).iterations == 6000)
    });
}

#[test]
fn an_unknown_user_takes_the_same_time_as_a_known_one() {
    let mut blade = prepared();
    let mut told = String::new();
    for _ in 0..ROUNDS {
        blade.restart();
        // in the cache before
        let mut connection = client::opened(blade.c2s);
        for n in 0..NAMES / 2 {
            if n % 50 == 49 {
                connection = client::opened(blade.c2s);
            }
            attempt(&mut connection, &format!("usual{n}"));
            attempt(&mut connection, &format!("nobody-warm{n}"));
            if n % 25 == 24 {
                connection = client::opened(blade.c2s);
            }
        }
        let half = NAMES / 2;
        let kinds = [
            "unknown, cold",
            "known, cold",
            "known, cold, other count",
            "unknown, cached",
            "known, cached",
        ];
        let mut times: [[Vec<Duration>; 2]; 5] = Default::default();
        for n in 0..half {
            if n % 10 == 0 {
                connection = client::opened(blade.c2s);
            }
            let names = [
                format!("nobody{n}"),
                format!("usual{}", half + n),
                format!("other{n}"),
                format!("nobody-warm{n}"),
                format!("usual{n}"),
            ];
            for turn in 0..names.len() {
                // each kind comes as often behind each other one
                let kind = (turn + n) % names.len();
                let attempt = attempt(&mut connection, &names[kind]);
                times[kind][0].push(attempt.until_challenge);
                times[kind][1].push(attempt.until_failure);
            }
        }
        let times = times.map(|kind| kind.map(quartiles));
        let mut same = true;
        told.clear();
        #[allow(clippy::needless_range_loop)] // the second index
        for step in 0..2 {
            for (kind, name) in kinds.iter().enumerate() {
                let [low, median, high] = times[kind][step];
                told += &format!("step {step}, {name}: {low:?} {median:?} {high:?}\n");
            }
            for (one, other) in [(0, 1), (0, 2), (3, 4), (0, 4)] {
                let [[a1, a2, a3], [b1, b2, b3]] = [times[one][step], times[other][step]];
                let spread = (a3 - a1).max(b3 - b1);
                if a2.abs_diff(b2) > spread {
                    told += &format!("step {step}: {} and {} differ\n", kinds[one], kinds[other]);
                    same = false;
                }
            }
        }
        eprintln!("{told}");
        if same {
            return;
        }
        blade.terminate();
    }
    panic!("in {ROUNDS} rounds:\n{told}");
}
