//! Channel bindings. In: the exporter secret of a TLS 1.3 connection, the server's certificate. Out: the bytes that a client
//! on the same channel computes too, and their names for the stream features (XEP-0440).
//!
//! The promise: what is advertised can be used, and only over the very channel of this stream.

use aws_lc_rs::{digest, hkdf};

/// Namespace of XEP-0440 (version 1.0.0).
pub const NS_SASL_CHANNEL_BINDING: &str = "urn:xmpp:sasl-cb:0";

const TLS_EXPORTER: &str = "tls-exporter";
const TLS_SERVER_END_POINT: &str = "tls-server-end-point";

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

/// The `tls-exporter` binding from the exporter secret of TLS 1.3, which rustls gives to its `KeyLog` as `EXPORTER_SECRET`
/// (RFC 8446, 7.5 with the label of RFC 9266 and an empty context).
///
/// The secret is as long as the output of its cipher suite's hash, and tells it thereby: SHA-256 or SHA-384. `None` for other
/// lengths.
pub fn tls_exporter_from_secret(secret: &[u8]) -> Option<[u8; 32]> {
    let (hkdf, hash) = match secret.len() {
        32 => (hkdf::HKDF_SHA256, &digest::SHA256),
        48 => (hkdf::HKDF_SHA384, &digest::SHA384),
        _ => return None,
    };
    let empty = digest::digest(hash, b"");
    let mut derived = [0; 48];
    let derived = &mut derived[..secret.len()];
    expand_label(
        hkdf,
        secret,
        b"EXPORTER-Channel-Binding",
        empty.as_ref(),
        derived,
    )?;
    let mut binding = [0; 32];
    expand_label(hkdf, derived, b"exporter", empty.as_ref(), &mut binding)?;
    Some(binding)
}

/// The `tls-server-end-point` binding of a certificate in DER: its hash by the function of its signature, SHA-256 in place of
/// MD5 and SHA-1. `None` where the binding is undefined (Ed25519) or the hash unknown.
pub fn tls_server_end_point(certificate: &[u8]) -> Option<Box<[u8]>> {
    let hash = signature_hash(certificate)?;
    Some(digest::digest(hash, certificate).as_ref().into())
}

/// HKDF-Expand-Label (RFC 8446, 7.1).
fn expand_label(
    hkdf: hkdf::Algorithm,
    secret: &[u8],
    label: &[u8],
    context: &[u8],
    out: &mut [u8],
) -> Option<()> {
    const PREFIX: &[u8] = b"tls13 ";
    struct Len(usize);
    impl hkdf::KeyType for Len {
        fn len(&self) -> usize {
            self.0
        }
    }
    let out_len = u16::try_from(out.len()).ok()?.to_be_bytes();
    let label_len = [u8::try_from(PREFIX.len() + label.len()).ok()?];
    let context_len = [u8::try_from(context.len()).ok()?];
    let info = [
        &out_len[..],
        &label_len,
        PREFIX,
        label,
        &context_len,
        context,
    ];
    hkdf::Prk::new_less_safe(hkdf, secret)
        .expand(&info, Len(out.len()))
        .and_then(|okm| okm.fill(out))
        .ok()
}

const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;

/// The hash function of a certificate's signatureAlgorithm (RFC 5280, 4.1.1.2).
fn signature_hash(certificate: &[u8]) -> Option<&'static digest::Algorithm> {
    let (certificate, _) = der(certificate, SEQUENCE)?;
    let (_to_be_signed, rest) = der(certificate, SEQUENCE)?;
    let (algorithm, _) = der(rest, SEQUENCE)?;
    let (oid, parameters) = der(algorithm, OBJECT_IDENTIFIER)?;
    match oid {
        // 1.2.840.113549.1.1: RSA with PKCS #1 v1.5. MD5 and SHA-1 are replaced (RFC 5929, 4.1).
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, n] => match n {
            4 | 5 | 11 => Some(&digest::SHA256),
            12 => Some(&digest::SHA384),
            13 => Some(&digest::SHA512),
            14 => Some(&digest::SHA224),
            10 => pss_hash(parameters),
            _ => None,
        },
        // 1.2.840.10045.4: ECDSA.
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1] => Some(&digest::SHA256),
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, n] => match n {
            1 => Some(&digest::SHA224),
            2 => Some(&digest::SHA256),
            3 => Some(&digest::SHA384),
            4 => Some(&digest::SHA512),
            _ => None,
        },
        _ => None,
    }
}

/// RSASSA-PSS-params (RFC 4055, 3.1): the hash stands in `[0]`, and is SHA-1 by default.
fn pss_hash(parameters: &[u8]) -> Option<&'static digest::Algorithm> {
    let (parameters, _) = der(parameters, SEQUENCE)?;
    let Some((hash, _)) = der(parameters, 0xa0) else {
        return Some(&digest::SHA256);
    };
    let (algorithm, _) = der(hash, SEQUENCE)?;
    let (oid, _) = der(algorithm, OBJECT_IDENTIFIER)?;
    match oid {
        [0x2b, 0x0e, 3, 2, 26] => Some(&digest::SHA256),
        // 2.16.840.1.101.3.4.2
        [0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, n] => match n {
            1 => Some(&digest::SHA256),
            2 => Some(&digest::SHA384),
            3 => Some(&digest::SHA512),
            4 => Some(&digest::SHA224),
            _ => None,
        },
        _ => None,
    }
}

/// The content of the DER element at the start of `data`, and what follows it.
fn der(data: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&first, rest) = data.split_first()?;
    if first != tag {
        return None;
    }
    let (&len, rest) = rest.split_first()?;
    let (len, rest) = match len {
        0..=0x7f => (usize::from(len), rest),
        0x81..=0x83 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(len & 0x7f))?;
            let len = bytes
                .iter()
                .fold(0, |len, &byte| len << 8 | usize::from(byte));
            (len, rest)
        }
        _ => return None,
    };
    rest.split_at_checked(len)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

    use super::*;

    /// Keeps what rustls logs as the exporter secret.
    #[derive(Debug, Default)]
    struct Exporter(Mutex<Vec<u8>>);

    impl rustls::KeyLog for Exporter {
        fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
            if label == "EXPORTER_SECRET" {
                *self.0.lock().unwrap() = secret.to_vec();
            }
        }
    }

    fn certificate(
        algorithm: &'static rcgen::SignatureAlgorithm,
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        (certificate.der().clone(), key.into())
    }

    #[test]
    fn the_exporter_binding_is_the_one_that_rustls_computes() {
        use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
        for suite in [
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ] {
            let mut provider = default_provider();
            provider.cipher_suites = vec![suite];
            let provider = Arc::new(provider);
            let (certificate, key) = certificate(&rcgen::PKCS_ECDSA_P256_SHA256);
            let log = Arc::new(Exporter::default());
            let mut server = ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![certificate.clone()], key)
                .unwrap();
            server.key_log = log.clone();
            let mut roots = RootCertStore::empty();
            roots.add(certificate).unwrap();
            let client = ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            let name = ServerName::try_from("localhost").unwrap();
            let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
            let mut server = ServerConnection::new(Arc::new(server)).unwrap();
            for _ in 0..10 {
                let mut wire = Vec::new();
                while client.wants_write() {
                    client.write_tls(&mut wire).unwrap();
                }
                server.read_tls(&mut wire.as_slice()).unwrap();
                server.process_new_packets().unwrap();
                let mut wire = Vec::new();
                while server.wants_write() {
                    server.write_tls(&mut wire).unwrap();
                }
                client.read_tls(&mut wire.as_slice()).unwrap();
                client.process_new_packets().unwrap();
            }
            assert!(!client.is_handshaking() && !server.is_handshaking());

            let ours = tls_exporter_from_secret(&log.0.lock().unwrap()).unwrap();
            let label = b"EXPORTER-Channel-Binding";
            // TLS 1.3 does not tell an empty context from none.
            let theirs = server
                .export_keying_material([0; 32], label, Some(b""))
                .unwrap();
            assert_eq!(ours, theirs);
            let theirs = client.export_keying_material([0; 32], label, None).unwrap();
            assert_eq!(ours, theirs);
        }
        assert_eq!(tls_exporter_from_secret(&[0; 64]), None);
        assert_eq!(tls_exporter_from_secret(&[]), None);
    }

    #[test]
    fn the_end_point_binding_takes_the_hash_of_the_certificates_signature() {
        for (algorithm, hash) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, Some(&digest::SHA256)),
            (&rcgen::PKCS_ECDSA_P384_SHA384, Some(&digest::SHA384)),
            (&rcgen::PKCS_ECDSA_P521_SHA512, Some(&digest::SHA512)),
            (&rcgen::PKCS_RSA_SHA256, Some(&digest::SHA256)),
            (&rcgen::PKCS_RSA_SHA384, Some(&digest::SHA384)),
            (&rcgen::PKCS_RSA_SHA512, Some(&digest::SHA512)),
            (&rcgen::PKCS_ED25519, None),
        ] {
            let (certificate, _) = certificate(algorithm);
            let expected = hash.map(|hash| digest::digest(hash, &certificate).as_ref().into());
            assert_eq!(tls_server_end_point(&certificate), expected);
            // Cut anywhere before its signature, it is no certificate, and no reason to panic.
            for len in 0..certificate.len().min(64) {
                assert_eq!(tls_server_end_point(&certificate[..len]), None);
            }
        }
    }

    #[test]
    fn md5_and_sha1_are_replaced_and_pss_names_its_hash_in_its_parameters() {
        fn wrap(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
            let content = parts.concat();
            let mut out = vec![tag, 0x81, content.len() as u8];
            out.extend(content);
            out
        }
        let of = |oid: &[u8], parameters: &[u8]| {
            let oid = wrap(OBJECT_IDENTIFIER, &[oid]);
            let algorithm = wrap(SEQUENCE, &[&oid, parameters]);
            let certificate = wrap(SEQUENCE, &[&wrap(SEQUENCE, &[]), &algorithm, &[3, 0]]);
            signature_hash(&certificate)
        };
        let rsa = |n| [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, n];
        let sha2 = |n| [0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, n];
        assert_eq!(of(&rsa(4), &[5, 0]), Some(&digest::SHA256));
        assert_eq!(of(&rsa(5), &[5, 0]), Some(&digest::SHA256));
        assert_eq!(
            of(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1], &[]),
            Some(&digest::SHA256)
        );
        assert_eq!(of(&[0x2b, 0x65, 0x70], &[]), None);
        assert_eq!(of(&rsa(10), &wrap(SEQUENCE, &[])), Some(&digest::SHA256));
        for (n, hash) in [
            (1, &digest::SHA256),
            (2, &digest::SHA384),
            (3, &digest::SHA512),
        ] {
            let oid = wrap(OBJECT_IDENTIFIER, &[&sha2(n)]);
            let parameters = wrap(SEQUENCE, &[&wrap(0xa0, &[&wrap(SEQUENCE, &[&oid])])]);
            assert_eq!(of(&rsa(10), &parameters), Some(hash));
        }
    }

    #[test]
    fn what_is_advertised_is_what_can_be_used() {
        let mut out = String::new();
        ChannelBindings::default().write_feature(&mut out);
        assert_eq!(out, "");
        let bindings = ChannelBindings {
            exporter: Some([1; 32]),
            server_end_point: Some([2; 32].into()),
        };
        bindings.write_feature(&mut out);
        assert_eq!(
            out,
            "<sasl-channel-binding xmlns='urn:xmpp:sasl-cb:0'><channel-binding type='tls-exporter'/>\
             <channel-binding type='tls-server-end-point'/></sasl-channel-binding>"
        );
        assert_eq!(bindings.get("tls-exporter"), Some(&[1; 32][..]));
        assert_eq!(bindings.get("tls-server-end-point"), Some(&[2; 32][..]));
        assert_eq!(bindings.get("tls-unique"), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_certificate_or_not(bytes in proptest::collection::vec(0_u8..0x90, 0..64)) {
            let _ = tls_server_end_point(&bytes);
        }
    }
}
