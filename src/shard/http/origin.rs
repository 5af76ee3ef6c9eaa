//! Which web pages may come (RFC 6454, the Fetch standard). In: the `Origin` that a browser sends and no page can change. Out: the
//! fields that let its script read the answer, or a refusal. Promise: what is no browser sends no `Origin` and is not hindered;
//! a page of another host comes only where `web.origins` names it.

use super::Cors;
use super::request::Head;
use crate::config::Config;

/// Header fields that a page may send.
const HEADERS: &str = "Content-Type, Authorization";

/// The `Access-Control-*` fields of the answer; an error: the page may not come.
pub fn judge(
    config: &Config,
    head: &Head,
    cors: Cors,
    methods: &str,
) -> Result<Option<String>, ()> {
    let Some(origin) = head.get("origin").filter(|_| cors != Cors::No) else {
        return Ok(None);
    };
    let shown = match cors {
        Cors::Anyone => "*",
        _ if allowed(&config.web.origins, origin, head.get("host")) => origin,
        _ => return Err(()),
    };
    let mut fields = format!("Access-Control-Allow-Origin: {shown}\r\n");
    if shown != "*" {
        fields.push_str("Vary: Origin\r\n");
    }
    if &*head.method == "OPTIONS" {
        fields.push_str(&format!(
            "Access-Control-Allow-Methods: {methods}\r\nAccess-Control-Allow-Headers: {HEADERS}\r\n\
             Access-Control-Max-Age: 7200\r\n"
        ));
    }
    Ok(Some(fields))
}

/// `origins`: those of the configuration, or `*` for all. The host that is asked is always one.
fn allowed(origins: &[String], origin: &str, host: Option<&str>) -> bool {
    let named = |one: &String| one == "*" || one.eq_ignore_ascii_case(origin);
    if origins.iter().any(named) {
        return true;
    }
    let Some((scheme, authority)) = origin.split_once("://") else {
        // "null": a file, a sandbox
        return false;
    };
    let port = if scheme.eq_ignore_ascii_case("https") {
        ":443"
    } else {
        ":80"
    };
    let plain = |authority: &str| {
        let authority = authority.to_ascii_lowercase();
        authority
            .strip_suffix(port)
            .map_or(authority.clone(), str::to_owned)
    };
    host.is_some_and(|host| plain(host) == plain(authority))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_another_host_comes_only_where_it_is_named() {
        let host = Some("chat.example.com");
        let named = ["https://desk.example.com".to_owned()];
        assert!(allowed(&[], "https://chat.example.com", host));
        assert!(allowed(&[], "https://Chat.example.com:443", host));
        assert!(allowed(
            &[],
            "http://chat.example.com:8080",
            Some("chat.example.com:8080")
        ));
        assert!(allowed(&named, "https://desk.example.com", host));
        assert!(allowed(&named, "https://chat.example.com", host));
        assert!(allowed(&["*".to_owned()], "null", host));
        for strange in [
            "https://evil.example",
            "https://chat.example.com.evil.example",
            "https://chat.example.com:8443",
            "http://desk.example.com",
            "null",
            "",
        ] {
            assert!(!allowed(&named, strange, host), "{strange}");
        }
        assert!(!allowed(&[], "https://chat.example.com", None));
    }
}
