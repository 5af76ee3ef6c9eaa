//! The README's table of specifications, made from the table of features and the few rows of the core.

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
    ("Components", "XEP-0114", "1.6", "src/xmpp/component/"),
];

/// Begin and end of the table in the README.
pub const MARKERS: (&str, &str) = ("<!-- features -->\n", "<!-- /features -->");

/// The table as Markdown, one row for each specification.
pub fn markdown() -> String {
    let mut out = String::from("| what | specification | version | file |\n|---|---|---|---|\n");
    let mut row = |name: &str, spec: &str, version: &str, file: &str| {
        writeln!(out, "| {name} | {spec} | {version} | `{file}` |")
            .expect("writing to memory succeeds");
    };
    for (name, spec, version, file) in CORE {
        row(name, spec, version, file);
    }
    for (feature, file) in FEATURES.iter().zip(FILES) {
        // a file may hold two specifications that only make sense together
        let mut versions = feature.version.split(", ");
        for spec in feature.spec.split(", ") {
            row(
                feature.name,
                spec,
                versions.next().unwrap_or_default(),
                &format!("src/xmpp/feature/{file}.rs"),
            );
        }
    }
    out
}

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
}
