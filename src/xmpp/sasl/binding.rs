//! Channel bindings. In: the bytes that the transport computed for this TLS channel. Out: the same by the name that a client
//! asks for, and the names for the stream features (XEP-0440).
//!
//! The exporter's bytes are computed when a client asks for them: few do, and they cost two derivations of a key.
//!
//! The promise: what is advertised can be used, and only over the very channel of this stream.

/// Namespace of XEP-0440 (version 1.0.0).
pub const NS_SASL_CHANNEL_BINDING: &str = "urn:xmpp:sasl-cb:0";

pub(super) const TLS_EXPORTER: &str = "tls-exporter";
pub(super) const TLS_SERVER_END_POINT: &str = "tls-server-end-point";

use std::fmt;
use std::sync::OnceLock;

/// The bindings of one TLS channel; none without TLS.
#[derive(Debug, Default)]
pub struct ChannelBindings {
    /// `tls-exporter` (RFC 9266), on TLS 1.3.
    pub exporter: Option<Exporter>,
    /// `tls-server-end-point` (RFC 5929, 4): a hash of the server's certificate.
    pub server_end_point: Option<Box<[u8]>>,
}

/// What gives the bytes of `tls-exporter`.
pub struct Exporter {
    compute: Box<dyn Fn() -> [u8; 32] + Send + Sync>,
    computed: OnceLock<[u8; 32]>,
}

impl Exporter {
    /// `compute` runs when the bytes are asked for, once.
    pub fn new(compute: impl Fn() -> [u8; 32] + Send + Sync + 'static) -> Exporter {
        Exporter {
            compute: Box::new(compute),
            computed: OnceLock::new(),
        }
    }

    fn bytes(&self) -> &[u8; 32] {
        self.computed.get_or_init(&self.compute)
    }
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exporter")
    }
}

impl ChannelBindings {
    /// Whether there is none: then the PLUS mechanisms are not to be offered.
    pub fn is_empty(&self) -> bool {
        self.exporter.is_none() && self.server_end_point.is_none()
    }

    /// The names of the bindings, to be advertised.
    pub fn types(&self) -> impl Iterator<Item = &'static str> {
        let exporter = self.exporter.as_ref().map(|_| TLS_EXPORTER);
        let server_end_point = self.server_end_point.as_ref().map(|_| TLS_SERVER_END_POINT);
        exporter.into_iter().chain(server_end_point)
    }

    /// Whether there is a binding of this name.
    pub fn has(&self, name: &str) -> bool {
        self.types().any(|one| one == name)
    }

    /// The bytes of the binding of this name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        match name {
            TLS_EXPORTER => self.exporter.as_ref().map(|exporter| &exporter.bytes()[..]),
            TLS_SERVER_END_POINT => self.server_end_point.as_deref(),
            _ => None,
        }
    }

    /// Appends the stream feature `<sasl-channel-binding/>` (XEP-0440); nothing if there is no binding.
    pub fn write_feature(&self, out: &mut String) {
        if self.is_empty() {
            return;
        }
        out.push_str("<sasl-channel-binding xmlns='");
        out.push_str(NS_SASL_CHANNEL_BINDING);
        out.push_str("'>");
        for name in self.types() {
            out.push_str("<channel-binding type='");
            out.push_str(name);
            out.push_str("'/>");
        }
        out.push_str("</sasl-channel-binding>");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_advertised_can_be_used() {
        let both = ChannelBindings {
            exporter: Some(Exporter::new(|| [7; 32])),
            server_end_point: Some([9; 48].into()),
        };
        let mut feature = String::new();
        both.write_feature(&mut feature);
        assert_eq!(
            feature,
            "<sasl-channel-binding xmlns='urn:xmpp:sasl-cb:0'><channel-binding type='tls-exporter'/>\
             <channel-binding type='tls-server-end-point'/></sasl-channel-binding>"
        );
        assert!(
            both.types()
                .all(|name| both.has(name) && both.get(name).is_some())
        );
        assert_eq!(both.get("tls-unique"), None);
        assert!(!both.has("tls-unique"));
    }

    #[test]
    fn the_exporter_is_computed_when_it_is_asked_for_and_once() {
        let count = std::sync::Arc::new(std::sync::atomic::AtomicU8::new(0));
        let counted = count.clone();
        let bindings = ChannelBindings {
            exporter: Some(Exporter::new(move || {
                counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                [7; 32]
            })),
            server_end_point: None,
        };
        bindings.write_feature(&mut String::new());
        assert!(bindings.has(TLS_EXPORTER) && !bindings.is_empty());
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 0);
        for _ in 0..2 {
            assert_eq!(bindings.get(TLS_EXPORTER), Some(&[7; 32][..]));
        }
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 1);
    }

    #[test]
    fn without_tls_nothing_is_advertised() {
        let mut feature = String::new();
        ChannelBindings::default().write_feature(&mut feature);
        assert!(feature.is_empty() && ChannelBindings::default().is_empty());
    }
}
