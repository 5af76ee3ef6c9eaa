//! Where this domain is served over the web (XEP-0156 section 3, RFC 6415): links in XML and in JSON, for pages of every origin.

use crate::config::Config;
use crate::shard::http::After;
use crate::shard::http::exchange::{Answer, Exchange, Gone};
use crate::xml::escape_attr;

/// XEP-0156 section 3.2.
const REL_WEBSOCKET: &str = "urn:xmpp:alt-connections:websocket";
const REL_BOSH: &str = "urn:xmpp:alt-connections:xbosh";

pub async fn xml(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    let mut body = b"<?xml version='1.0' encoding='utf-8'?>\n<XRD xmlns='http://docs.oasis-open.org/ns/xri/xrd-1.0'>\n".to_vec();
    for (rel, href) in links(&exchange.config) {
        body.extend_from_slice(format!("  <Link rel='{rel}' href='").as_bytes());
        escape_attr(&href, &mut body);
        body.extend_from_slice(b"'/>\n");
    }
    body.extend_from_slice(b"</XRD>\n");
    exchange
        .answer(Answer::new(200, "application/xrd+xml; charset=utf-8", body))
        .await
}

pub async fn json(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    let links: Vec<_> = links(&exchange.config)
        .into_iter()
        .map(|(rel, href)| serde_json::json!({ "rel": rel, "href": href }))
        .collect();
    let body = serde_json::json!({ "links": links }).to_string();
    exchange
        .answer(Answer::new(200, "application/json", body))
        .await
}

/// What is served: the configured URL, else the first TLS port under the domain's name; none where there is neither.
fn links(config: &Config) -> Vec<(&'static str, String)> {
    let own = config
        .web
        .listen_tls
        .first()
        .map(|address| format!("{}:{}", config.domain, address.port()));
    let url = |configured: &str, scheme: &str, path: &str| match configured {
        "" => own.as_ref().map(|own| format!("{scheme}://{own}{path}")),
        configured => Some(configured.to_owned()),
    };
    let websocket = url(&config.web.websocket_url, "wss", "/ws");
    let bosh = url(&config.web.bosh_url, "https", "/bosh");
    let both = [(REL_WEBSOCKET, websocket), (REL_BOSH, bosh)];
    both.into_iter()
        .filter_map(|(rel, href)| Some((rel, href?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_those_of_the_configuration_or_of_the_port() {
        let config = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            Config::load(None, &sets).unwrap()
        };
        assert_eq!(links(&config(&[])), []);
        let own = config(&["web.listen_tls=['127.0.0.1:5443']"]);
        let link = |href: &str| (REL_WEBSOCKET, href.to_owned());
        let bosh = (REL_BOSH, "https://localhost:5443/bosh".to_owned());
        assert_eq!(links(&own), [link("wss://localhost:5443/ws"), bosh]);
        let proxied = config(&["web.websocket_url='wss://chat.example.com/ws'"]);
        assert_eq!(links(&proxied), [link("wss://chat.example.com/ws")]);
    }
}
