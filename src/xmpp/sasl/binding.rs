//! Channel bindings. In: the bytes that the transport computed for this TLS channel. Out: the same by the name that a client
//! asks for, and the names for the stream features (XEP-0440).
//!
//! The promise: what is advertised can be used, and only over the very channel of this stream.

/// Namespace of XEP-0440 (version 1.0.0).
pub const NS_SASL_CHANNEL_BINDING: &str = "urn:xmpp:sasl-cb:0";

pub(super) const TLS_EXPORTER: &str = "tls-exporter";
pub(super) const TLS_SERVER_END_POINT: &str = "tls-server-end-point";

/// The bindings of one TLS channel; none without TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChannelBindings {
    /// `tls-exporter` (RFC 9266), on TLS 1.3.
    pub exporter: Option<[u8; 32]>,
    /// `tls-server-end-point` (RFC 5929, 4): a hash of the server's certificate.
    pub server_end_point: Option<Box<[u8]>>,
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

    /// The bytes of the binding of this name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        match name {
            TLS_EXPORTER => self.exporter.as_ref().map(|bytes| bytes.as_slice()),
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
            exporter: Some([7; 32]),
            server_end_point: Some([9; 48].into()),
        };
        let mut feature = String::new();
        both.write_feature(&mut feature);
        assert_eq!(
            feature,
            "<sasl-channel-binding xmlns='urn:xmpp:sasl-cb:0'><channel-binding type='tls-exporter'/>\
             <channel-binding type='tls-server-end-point'/></sasl-channel-binding>"
        );
        assert!(both.types().all(|name| both.get(name).is_some()));
        assert_eq!(both.get("tls-unique"), None);
    }

    #[test]
    fn without_tls_nothing_is_advertised() {
        let mut feature = String::new();
        ChannelBindings::default().write_feature(&mut feature);
        assert!(feature.is_empty() && ChannelBindings::default().is_empty());
    }
}
