//! The README's table of specifications and the DOAP file (XEP-0453), made from the table of features and the few rows of the
//! core.

use std::fmt::Write;

use super::{FEATURES, FILES};

/// What every feature stands on: name, specification, version, file.
const CORE: &[(&str, &str, &str, &str)] = &[
    (
        "Streams, SASL, binding, stanzas",
        "RFC 6120",
        "",
        "src/xmpp/negotiation.rs",
    ),
    (
        "Messaging and presence",
        "RFC 6121",
        "",
        "src/xmpp/message.rs",
    ),
    ("Addresses (PRECIS)", "RFC 7622", "", "src/xmpp/jid.rs"),
    ("Use of TLS", "RFC 7590", "", "src/net/"),
    ("Direct TLS", "XEP-0368", "1.1.0", "src/net/"),
    (
        "Extensible SASL profile",
        "XEP-0388",
        "1.0.4",
        "src/xmpp/sasl2.rs",
    ),
    ("Bind 2", "XEP-0386", "1.1.0", "src/xmpp/sasl2.rs"),
    (
        "Fast authentication by tokens",
        "XEP-0484",
        "0.2.0",
        "src/xmpp/fast.rs",
    ),
    (
        "Logins by certificate (SASL EXTERNAL)",
        "XEP-0178",
        "1.2",
        "src/xmpp/sasl/external.rs",
    ),
    (
        "Channel-binding types",
        "XEP-0440",
        "1.0.0",
        "src/xmpp/sasl/binding.rs",
    ),
    (
        "SASL SCRAM downgrade protection",
        "XEP-0474",
        "0.5.0",
        "src/xmpp/sasl/scram.rs",
    ),
    ("WebSocket", "RFC 7395", "", "src/shard/web/websocket.rs"),
    ("BOSH", "XEP-0124", "1.11.2", "src/shard/web/bosh.rs"),
    ("XMPP over BOSH", "XEP-0206", "1.4", "src/shard/web/bosh.rs"),
    (
        "Discovering alternative connection methods (host-meta)",
        "XEP-0156",
        "1.4.0",
        "src/shard/web/host_meta.rs",
    ),
    ("Components", "XEP-0114", "1.6", "src/xmpp/component/"),
];

/// Begin and end of the table in the README.
pub const MARKERS: (&str, &str) = ("<!-- features -->\n", "<!-- /features -->");

/// One specification: name, specification, version, file.
type Row = (&'static str, &'static str, &'static str, String);

fn rows() -> Vec<Row> {
    let core = CORE.iter();
    let mut rows: Vec<Row> = core
        .map(|(n, s, v, file)| (*n, *s, *v, (*file).into()))
        .collect();
    for (feature, file) in FEATURES.iter().zip(FILES) {
        // a file may hold two specifications that only make sense together
        let mut versions = feature.version.split(", ");
        for spec in feature.spec.split(", ") {
            let version = versions.next().unwrap_or_default();
            let file = format!("src/xmpp/feature/{file}.rs");
            rows.push((feature.name, spec, version, file));
        }
    }
    rows
}

/// The table as Markdown, one row for each specification.
pub fn markdown() -> String {
    let mut out = String::from("| what | specification | version | file |\n|---|---|---|---|\n");
    for (name, spec, version, file) in rows() {
        writeln!(out, "| {name} | {spec} | {version} | `{file}` |")
            .expect("writing to memory succeeds");
    }
    out
}

/// The same for machines: a description of the project with what it implements (XEP-0453).
pub fn doap() -> String {
    let mut rfcs: Vec<&str> = Vec::new();
    let mut xeps: Vec<(&str, &str)> = Vec::new();
    for (_, spec, version, _) in rows() {
        // sections of an RFC have rows of their own
        let is_whole = |number: &&str| !number.contains(' ');
        if let Some(number) = spec.strip_prefix("XEP-") {
            xeps.push((number, version));
        } else if let Some(number) = spec.strip_prefix("RFC ").filter(is_whole) {
            rfcs.push(number);
        }
    }
    rfcs.sort_unstable();
    rfcs.dedup();
    xeps.sort_unstable();
    xeps.dedup_by_key(|(number, _)| *number);
    let mut out = String::from(DOAP_HEAD);
    for rfc in rfcs {
        writeln!(
            out,
            "    <implements rdf:resource='https://www.rfc-editor.org/info/rfc{rfc}'/>"
        )
        .expect("writing to memory succeeds");
    }
    for (number, version) in xeps {
        write!(
            out,
            "    <implements>\n      <xmpp:SupportedXep>\n        \
             <xmpp:xep rdf:resource='https://xmpp.org/extensions/xep-{number}.html'/>\n        \
             <xmpp:version>{version}</xmpp:version>\n      \
             </xmpp:SupportedXep>\n    </implements>\n"
        )
        .expect("writing to memory succeeds");
    }
    out += "  </Project>\n</rdf:RDF>\n";
    out
}

const DOAP_HEAD: &str = "<?xml version='1.0' encoding='UTF-8'?>
<!-- Generated: nitro check-config --print-doap -->
<rdf:RDF xmlns='http://usefulinc.com/ns/doap#' xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#' \
xmlns:xmpp='https://linkmauve.fr/ns/xmpp-doap#'>
  <Project>
    <name>nitro</name>
    <shortdesc xml:lang='en'>An instant-messaging server for trading floors: thread-per-core and shared-nothing</shortdesc>
    <programming-language>Rust</programming-language>
    <os>Linux</os>
    <license rdf:resource='https://www.apache.org/licenses/LICENSE-2.0'/>
    <category rdf:resource='https://linkmauve.fr/ns/xmpp-doap#category-server'/>
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_shows_the_table_as_it_is() {
        let readme = include_str!("../../../README.md");
        let (_, rest) = readme
            .split_once(MARKERS.0)
            .expect("the README has the first marker");
        let (table, _) = rest
            .split_once(MARKERS.1)
            .expect("the README has the second marker");
        assert_eq!(table, markdown(), "copy the right side into README.md");
    }

    #[test]
    fn the_doap_file_is_as_it_is_generated_and_names_each_specification_once() {
        let doap = doap();
        assert_eq!(
            include_str!("nitro.doap"),
            doap,
            "nitro check-config --print-doap > src/xmpp/feature/nitro.doap"
        );
        let body = doap.split_once("-->").expect("it has a comment").1;
        let parsed = crate::xml::Element::parse(body.trim()).expect("it is XML");
        let project = parsed.elements().next().expect("it describes a project");
        const NS: &str = "http://usefulinc.com/ns/doap#";
        let xeps = project.elements().filter(|e| e.is("implements", NS));
        let xeps = xeps.filter(|e| e.elements().next().is_some()).count();
        let wanted: std::collections::BTreeSet<_> = rows()
            .into_iter()
            .filter(|(_, spec, ..)| spec.starts_with("XEP-"))
            .map(|(_, spec, version, _)| {
                assert!(!version.is_empty(), "{spec}: which version?");
                spec
            })
            .collect();
        assert_eq!(xeps, wanted.len());
    }

    /// The README's table of the compliance suites names dialogues, files and bots.
    #[test]
    fn what_the_table_of_compliance_names_is_there() {
        let readme = include_str!("../../../README.md");
        let table = readme.split("<!-- compliance -->").nth(1).unwrap();
        let table = table.split("<!-- /compliance -->").next().unwrap();
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let bots = std::fs::read_to_string(root.join("tests/bots/scenarios.py")).unwrap();
        let dialogues = std::fs::read_dir(root.join("tests/dialogues")).unwrap();
        let dialogues: Vec<String> = dialogues
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let rows: Vec<Vec<&str>> = table
            .lines()
            .filter(|line| line.starts_with("| ") && line.contains('`'))
            .map(|line| line.split('|').map(str::trim).collect())
            .collect();
        // what the suites ask of a server, Advanced, without other servers
        for asked in [
            "RFC 6120", "RFC 7590", "XEP-0368", "XEP-0030", "XEP-0115", "XEP-0114", "XEP-0163",
            "RFC 7395", "XEP-0206", "XEP-0124", "RFC 6121", "XEP-0398", "XEP-0153", "XEP-0054",
            "XEP-0280", "XEP-0191", "XEP-0045", "XEP-0249", "XEP-0048", "XEP-0313", "XEP-0402",
            "XEP-0410", "XEP-0223", "XEP-0049", "XEP-0198", "XEP-0363", "XEP-0352", "XEP-0357",
        ] {
            let there = rows
                .iter()
                .any(|row| row[2].split(", ").any(|spec| spec == asked));
            assert!(there, "no row for {asked}");
        }
        let named = |cell: &str| -> Vec<String> {
            cell.split('`')
                .skip(1)
                .step_by(2)
                .map(str::to_owned)
                .collect()
        };
        for row in rows {
            let (ours, others) = (named(row[4]), named(row[5]));
            assert!(!ours.is_empty() && !others.is_empty(), "{row:?}");
            for name in ours {
                let there = match name.contains('/') {
                    true => root.join(&name).exists(),
                    false => dialogues.iter().any(|file| file.starts_with(&name)),
                };
                assert!(there, "{name} of {row:?}");
            }
            for name in others {
                assert!(bots.contains(&format!("async def {name}(")), "{name}");
            }
        }
    }
}
