//! Where an instance of Redis is, as the operator wrote it.
//!
//! In: `unix:///run/redis/1.sock?db=1&user=nitro&pass=secret`, `redis://user:secret@host:6379/1`, or `rediss://` for the
//! same over TLS; each may carry `weight=` (its share of the keys, default 1) and `name=` (its name on the ring) behind
//! `?`. Out: an [`Address`].
//! Promises: the password is in no `Debug` and no log; what is not understood is refused with a sentence, so that a
//! slip of the pen never becomes a default.
//!
//! An instance's name decides which keys it holds: without `name=` it is the address without credentials.

use std::fmt;
use std::path::PathBuf;

use redis::{ConnectionAddr, IntoConnectionInfo};
use rustls::pki_types::ServerName;

/// See the module's page.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    /// Its name on the ring, in logs and in metrics.
    pub name: Box<str>,
    pub endpoint: Endpoint,
    pub user: Option<Box<str>>,
    pub password: Option<Box<str>>,
    pub database: u32,
    /// 1 to [`WEIGHT_MAX`].
    pub weight: u32,
}

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    Unix(PathBuf),
    /// The host may be a name: whoever connects looks it up, outside of a shard.
    Tcp {
        host: Box<str>,
        port: u16,
        /// `rediss://`: with TLS, and a certificate for `host`.
        tls: bool,
    },
}

pub const WEIGHT_MAX: u32 = crate::store::ring::WEIGHT_PLAIN_MAX;

/// Why an address is not one; the text never holds the password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error(
        "`redis.instances`: an address must look like unix:///run/redis/1.sock or redis://host:6379/0 ({0})"
    )]
    Malformed(String),
    #[error(
        "`redis.instances`: nothing may stand behind `#`: a certificate is always verified, see `redis.ca_file`"
    )]
    Fragment,
    #[error(
        "`redis.instances`: `{0}` is not known behind `?`: db, user, pass, weight and name are"
    )]
    UnknownParameter(String),
    #[error("`redis.instances`: {0} must be a whole number from {1} to {2}")]
    Range(&'static str, u32, u32),
    #[error(
        "`redis.instances`: two instances have the name {0}: give one of them another with ?name="
    )]
    SameName(Box<str>),
}

impl Address {
    pub fn parse(text: &str) -> Result<Address, AddressError> {
        let malformed = |why: &str| AddressError::Malformed(why.into());
        let mut url = redis::parse_redis_url(text).ok_or_else(|| malformed("it is no such URL"))?;
        let tls = match url.scheme() {
            "redis" | "unix" => false,
            // the crate would want its own TLS for it
            "rediss" => url.set_scheme("redis").is_ok(),
            _ => {
                return Err(malformed(
                    "it begins with neither unix: nor redis: nor rediss:",
                ));
            }
        };
        if url.fragment().is_some() {
            return Err(AddressError::Fragment);
        }
        let unix = url.scheme() == "unix";
        let (mut name, mut weight) = (None, 1);
        for (key, value) in url.query_pairs() {
            match (&*key, unix) {
                ("db" | "user" | "pass", true) => {}
                ("weight", _) => weight = number("weight", &value, 1, WEIGHT_MAX)?,
                ("name", _) if !value.is_empty() => name = Some(Box::from(&*value)),
                _ => return Err(AddressError::UnknownParameter(key.into_owned())),
            }
        }
        // The crate's error may quote what it did not understand.
        let info = url
            .into_connection_info()
            .map_err(|_| malformed("path, host or database number is missing or wrong"))?;
        let endpoint = match info.addr() {
            ConnectionAddr::Unix(path) if path.file_name().is_some() => {
                Endpoint::Unix(path.clone())
            }
            ConnectionAddr::Tcp(host, _) if tls && ServerName::try_from(&**host).is_err() => {
                return Err(malformed(
                    "its host is no name that a certificate could be for",
                ));
            }
            ConnectionAddr::Tcp(host, port) => Endpoint::Tcp {
                host: host.as_str().into(),
                port: *port,
                tls,
            },
            _ => return Err(malformed("the path of the socket is missing")),
        };
        let settings = info.redis_settings();
        let database = u32::try_from(settings.db())
            .map_err(|_| AddressError::Range("the database number", 0, u32::MAX))?;
        let name = name.unwrap_or_else(|| match &endpoint {
            Endpoint::Unix(path) => format!("{}#{database}", path.display()).into(),
            Endpoint::Tcp { host, port, .. } => format!("{host}:{port}#{database}").into(),
        });
        Ok(Address {
            name,
            endpoint,
            user: settings.username().map(Box::from),
            password: settings.password().map(Box::from),
            database,
            weight,
        })
    }

    /// Is it reached over TLS?
    pub fn is_tls(&self) -> bool {
        matches!(self.endpoint, Endpoint::Tcp { tls: true, .. })
    }

    /// The whole list, whose names must differ.
    pub fn parse_all<'a>(
        texts: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Address>, AddressError> {
        let mut all: Vec<Address> = Vec::new();
        for text in texts {
            let address = Address::parse(text)?;
            if all.iter().any(|other| other.name == address.name) {
                return Err(AddressError::SameName(address.name));
            }
            all.push(address);
        }
        Ok(all)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({:?})", self.name, self.endpoint)
    }
}

fn number(what: &'static str, text: &str, least: u32, most: u32) -> Result<u32, AddressError> {
    text.parse()
        .ok()
        .filter(|number| (least..=most).contains(number))
        .ok_or(AddressError::Range(what, least, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_where_who_and_how_much() {
        let unix =
            Address::parse("unix:///run/r/1.sock?db=3&user=nitro&pass=a%26b&weight=4").unwrap();
        assert_eq!(unix.endpoint, Endpoint::Unix("/run/r/1.sock".into()));
        assert_eq!((unix.database, unix.weight), (3, 4));
        assert_eq!(&*unix.name, "/run/r/1.sock#3");
        assert_eq!(unix.user.as_deref(), Some("nitro"));
        assert_eq!(unix.password.as_deref(), Some("a&b"));

        let tcp = Address::parse("redis://me:s%40crt@[::1]:7000/2?name=east").unwrap();
        assert_eq!(
            tcp.endpoint,
            Endpoint::Tcp {
                host: "::1".into(),
                port: 7000,
                tls: false
            }
        );
        assert_eq!((tcp.database, tcp.weight, &*tcp.name), (2, 1, "east"));
        assert_eq!(tcp.password.as_deref(), Some("s@crt"));
        assert!(!format!("{tcp:?}{unix:?}").contains("crt"));
        let plain = Address::parse("redis://cache.example").unwrap();
        assert_eq!((&*plain.name, plain.user), ("cache.example:6379#0", None));

        let secure = Address::parse("rediss://me:s%40crt@cache.example:7001/2?weight=3").unwrap();
        assert!(secure.is_tls() && !tcp.is_tls() && !unix.is_tls());
        assert_eq!((secure.database, secure.weight), (2, 3));
        assert_eq!(secure.password.as_deref(), Some("s@crt"));
        assert_eq!(&*secure.name, "cache.example:7001#2");
    }

    #[test]
    fn what_is_not_understood_is_refused_with_a_sentence_without_the_password() {
        for (text, says) in [
            ("rediss://:hunter2@host#insecure", "always verified"),
            ("rediss://:hunter2@a..b", "certificate"),
            ("http://:hunter2@host", "must look like"),
            ("redis://:hunter2@host/x", "database number"),
            ("redis://:hunter2@host/-1", "database number"),
            ("redis://", "must look like"),
            ("unix:///", "must look like"),
            ("unix:///s?weight=0&pass=hunter2", "weight must be"),
            ("redis://host?wieght=3", "wieght"),
            ("redis://host?db=3", "`db` is not known"),
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
            assert!(
                error.contains("redis.instances") && !error.contains("hunter2"),
                "{error}"
            );
        }
        let twice = Address::parse_all(["redis://:a@host", "redis://:b@host:6379/0"]);
        assert_eq!(twice, Err(AddressError::SameName("host:6379#0".into())));
    }
}
