//! Certificates of clients (XEP-0178). In: the certification authorities and revocation lists that the operator trusts, and the
//! chain that a client has shown in its handshake. Out: the names in it, or why it does not hold. Promise: names are given only
//! while the chain holds, whatever the handshake was.
//!
//! **The handshake takes every chain** of up to 16 KiB whose key the client has and TLS can verify (RSA from 2048 bits on). Refused there, a client with a certificate of some other
//! authority could not come in at all, because TLS has no second try; this way it logs in with its password, and XEP-0178
//! asks no more than that EXTERNAL is not offered.
//!
//! **The chain is verified behind the handshake**, also behind one that resumes an earlier session: there rustls takes the chain
//! from the ticket and asks nobody, though the certificate may have ended since.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};
use x509_parser::asn1_rs::{self, Oid, TaggedExplicit, Utf8String, oid};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;

/// id-on-xmppAddr (RFC 6120, 13.7.1.4).
const XMPP_ADDR: Oid<'static> = oid!(1.3.6.1.5.5.7.8.5);
/// A connection keeps the chain as long as it lives, and so does its client's ticket. Three certificates with keys of RSA have a third
/// of it.
const CHAIN_BYTES_MAX: usize = 16 * 1024;
/// Certificates between a client's and its authority's. Which one signed which is found by trying: a chain of a hundred that all
/// claim the same name, of nobody's making, would keep a core for a second.
const INTERMEDIATES_MAX: usize = 4;

/// Who vouches for clients. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ClientAuthority(Arc<dyn ClientCertVerifier>);

/// What a certificate that holds calls its owner, as it stands there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientNames {
    /// id-on-xmppAddr (RFC 6120, 13.7.1.4).
    pub xmpp: Vec<String>,
    /// rfc822Name (RFC 5280, 4.2.1.6).
    pub email: Vec<String>,
}

impl ClientAuthority {
    /// Reads certificates of authorities (PEM) and revocation lists (PEM or DER, any number in a file). With lists, there must be
    /// a current one of each authority in a client's chain. The error is a sentence that names the file.
    pub fn load(authorities: &Path, revoked: &[PathBuf]) -> Result<Self, String> {
        let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(authorities)
            .and_then(Iterator::collect)
            .map_err(|e| {
                format!(
                    "{} cannot be read: {e}; tls.client_ca must name a PEM file with certificates",
                    authorities.display()
                )
            })?;
        if certificates.is_empty() {
            return Err(format!(
                "{} contains no certificate: tls.client_ca must name a PEM file with those that clients' certificates are signed with",
                authorities.display()
            ));
        }
        let mut roots = RootCertStore::empty();
        for (n, certificate) in (1..).zip(certificates) {
            roots.add(certificate).map_err(|e| {
                format!(
                    "certificate {n} in {} cannot vouch for clients: {e}; take it out of the file of tls.client_ca",
                    authorities.display()
                )
            })?;
        }
        let mut lists = Vec::new();
        for path in revoked {
            lists.extend(revocation_lists(path)?);
        }
        let provider = Arc::new(super::tls::provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .with_crls(lists)
            .enforce_revocation_expiration()
            .allow_unauthenticated()
            .build()
            .map_err(|e| {
                format!("clients cannot be verified: {e}; see tls.client_ca and tls.client_crl")
            })?;
        Ok(Self(verifier))
    }

    /// For handshakes.
    pub(super) fn asking(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::new(Asking(self.0.clone()))
    }

    /// The names in a chain (leaf first) whose key the client has shown to have, if it holds at this moment.
    pub(super) fn names(&self, chain: &[CertificateDer<'_>]) -> Result<ClientNames, Error> {
        let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
        // here, not in the handshake: such a client may still have a password
        if intermediates.len() > INTERMEDIATES_MAX {
            return Err(Error::General("its chain is too long".into()));
        }
        self.0
            .verify_client_cert(leaf, intermediates, UnixTime::now())?;
        names(leaf).ok_or_else(|| Error::General("its names cannot be read".into()))
    }
}

fn revocation_lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let wrong = |why: String| {
        format!(
            "{}: {why}; tls.client_crl must name files with revocation lists, PEM or DER",
            path.display()
        )
    };
    let bytes = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
    let lists = match memchr::memmem::find(&bytes, b"-----BEGIN ").is_some() {
        true => CertificateRevocationListDer::pem_slice_iter(&bytes)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| wrong(e.to_string()))?,
        false => vec![CertificateRevocationListDer::from(bytes)],
    };
    if lists.is_empty() {
        return Err(wrong("it contains no revocation list".into()));
    }
    for list in &lists {
        let (_, list) = CertificateRevocationList::from_der(list)
            .map_err(|e| wrong(format!("this is no revocation list ({e})")))?;
        let now = x509_parser::time::ASN1Time::now();
        if let Some(end) = list.next_update().filter(|end| *end < now) {
            tracing::warn!(
                file = %path.display(),
                issuer = %list.issuer(),
                %end,
                "a revocation list is out of date: no certificate of its issuer lets in; fetch a new one and reload"
            );
        }
    }
    Ok(lists)
}

/// `None`: it is no certificate, or a name in it is not what it should be.
fn names(certificate: &[u8]) -> Option<ClientNames> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut names = ClientNames::default();
    let Some(all) = certificate.subject_alternative_name().ok()? else {
        return Some(names);
    };
    for name in &all.value.general_names {
        match name {
            GeneralName::OtherName(kind, value) if *kind == XMPP_ADDR => {
                let parsed = TaggedExplicit::<Utf8String, asn1_rs::Error, 0>::from_der(value);
                let (rest, text) = parsed.ok()?;
                if !rest.is_empty() {
                    return None;
                }
                names.xmpp.push(text.into_inner().string());
            }
            GeneralName::RFC822Name(text) => names.email.push((*text).to_owned()),
            _ => {}
        }
    }
    Some(names)
}

/// Asks for a certificate and takes any, or none.
#[derive(Debug)]
struct Asking(Arc<dyn ClientCertVerifier>);

/// One that cannot even be read never holds, so nobody needs to look at its signature, which cannot be verified either.
fn is_readable(certificate: &CertificateDer<'_>) -> bool {
    ParsedCertificate::try_from(certificate).is_ok()
}

impl ClientCertVerifier for Asking {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let bytes = leaf.len() + intermediates.iter().map(|c| c.len()).sum::<usize>();
        match bytes <= CHAIN_BYTES_MAX {
            true => Ok(ClientCertVerified::assertion()),
            false => Err(Error::General("the client's chain is too long".into())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match is_readable(certificate) {
            true => self.0.verify_tls12_signature(message, certificate, signed),
            false => Ok(HandshakeSignatureValid::assertion()),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match is_readable(certificate) {
            true => self.0.verify_tls13_signature(message, certificate, signed),
            false => Ok(HandshakeSignatureValid::assertion()),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension,
        DnType, IsCa, Issuer, KeyIdMethod, KeyPair, OtherNameValue, SanType, SerialNumber,
        date_time_ymd,
    };

    use super::*;

    fn xmpp(address: &str) -> SanType {
        let oid = vec![1, 3, 6, 1, 5, 5, 7, 8, 5];
        SanType::OtherName((oid, OtherNameValue::Utf8String(address.into())))
    }

    fn with_names(names: Vec<SanType>) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params
    }

    fn der(params: &CertificateParams) -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn xmpp_and_email_addresses_are_found_and_nothing_else() {
        let other = OtherNameValue::Utf8String("mallory@example.com".into());
        let found = names(&der(&with_names(vec![
            SanType::DnsName("example.com".try_into().unwrap()),
            xmpp("alice@example.com"),
            SanType::OtherName((vec![1, 3, 6, 1, 4, 1, 311, 20, 2, 3], other)),
            SanType::Rfc822Name("alice@example.org".try_into().unwrap()),
            xmpp("\u{e9}@example.com"),
        ])));
        let expected = ClientNames {
            xmpp: vec!["alice@example.com".into(), "\u{e9}@example.com".into()],
            email: vec!["alice@example.org".into()],
        };
        assert_eq!(found, Some(expected));
        assert_eq!(
            names(&der(&with_names(vec![]))),
            Some(ClientNames::default())
        );
    }

    /// A certificate whose only name is this otherName, written by hand.
    fn with_other_name(value: &[u8]) -> Vec<u8> {
        let oid = [0x06, 8, 0x2b, 6, 1, 5, 5, 7, 8, 5];
        let name = [&[0xa0, (oid.len() + value.len()) as u8], &oid[..], value].concat();
        let all = [&[0x30, name.len() as u8], &name[..]].concat();
        let mut params = CertificateParams::default();
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], all)];
        der(&params)
    }

    #[test]
    fn an_xmpp_address_that_is_no_utf8_string_gives_no_names_at_all() {
        let good = names(&with_other_name(b"\xa0\x05\x0c\x03a@b")).unwrap();
        assert_eq!(good.xmpp, ["a@b"]);
        for bad in [
            &b"\x0c\x03a@b"[..],
            b"\xa0\x05\x16\x03a@b",
            b"\xa0\x05\x0c\x03a@\xff",
            b"\xa0\x05\x0c\x03a@b\x00",
            b"",
        ] {
            let found = names(&with_other_name(bad));
            assert!(
                found.as_ref().is_none_or(|n| n.xmpp.is_empty()),
                "{bad:?}: {found:?}"
            );
        }
        assert_eq!(names(b"nonsense"), None);
    }

    /// An authority in a file, and a certificate of it.
    fn authority(folder: &Path) -> (PathBuf, CertificateDer<'static>, Issuer<'static, KeyPair>) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let path = folder.join("authority.pem");
        std::fs::write(&path, params.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let leaf = with_names(vec![xmpp("a@b")])
            .signed_by(&key, &issuer)
            .unwrap();
        (path, leaf.der().clone(), issuer)
    }

    #[test]
    fn the_handshake_takes_any_chain_up_to_its_bound_and_names_are_given_of_those_that_hold() {
        let folder = tempfile::tempdir().unwrap();
        let (path, leaf, _) = authority(folder.path());
        let clients = ClientAuthority::load(&path, &[]).unwrap();
        let asking = clients.asking();
        let stranger = CertificateDer::from(der(&with_names(vec![xmpp("a@b")])));
        let rubbish = CertificateDer::from(vec![7; 100]);
        for certificate in [&leaf, &stranger, &rubbish] {
            let taken = asking.verify_client_cert(certificate, &[], UnixTime::now());
            assert!(taken.is_ok());
        }
        let long = CertificateDer::from(vec![7; CHAIN_BYTES_MAX]);
        let refused = asking.verify_client_cert(&leaf, &[long], UnixTime::now());
        assert!(refused.is_err());
        assert_eq!(clients.names(&[leaf]).unwrap().xmpp, ["a@b"]);
        for chain in [&[stranger][..], &[rubbish], &[]] {
            assert!(clients.names(chain).is_err());
        }
    }

    #[test]
    fn a_chain_of_many_that_could_have_signed_each_other_is_not_searched() {
        let folder = tempfile::tempdir().unwrap();
        let (path, leaf, _) = authority(folder.path());
        let clients = ClientAuthority::load(&path, &[]).unwrap();
        let mut params = with_names(vec![]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "everyone");
        let issuer = Issuer::new(params.clone(), KeyPair::generate().unwrap());
        let key = KeyPair::generate().unwrap();
        let signed = with_names(vec![xmpp("a@b")])
            .signed_by(&key, &issuer)
            .unwrap();
        let mut chain = vec![signed.der().clone()];
        chain.extend((0..INTERMEDIATES_MAX).map(|_| der(&params).into()));
        let began = std::time::Instant::now();
        assert!(clients.names(&chain).is_err());
        assert!(began.elapsed() < std::time::Duration::from_secs(1));
        let many = |leaf: &CertificateDer<'static>, most: usize| {
            let others = (0..most).map(|_| CertificateDer::from(der(&params)));
            [leaf.clone()].into_iter().chain(others).collect::<Vec<_>>()
        };
        // what is too much beside one that holds is not looked at, what is not does no harm
        assert!(clients.names(&many(&leaf, INTERMEDIATES_MAX)).is_ok());
        assert!(clients.names(&many(&leaf, INTERMEDIATES_MAX + 1)).is_err());
    }

    #[test]
    fn with_lists_there_must_be_a_current_one_of_the_authority() {
        let folder = tempfile::tempdir().unwrap();
        let (path, leaf, issuer) = authority(folder.path());
        let holds = |until: i32, issuer: &Issuer<'_, KeyPair>, as_pem: bool| {
            let list = CertificateRevocationListParams {
                this_update: date_time_ymd(2020, 1, 1),
                next_update: date_time_ymd(until, 1, 1),
                crl_number: SerialNumber::from(1),
                issuing_distribution_point: None,
                revoked_certs: vec![],
                key_identifier_method: KeyIdMethod::Sha256,
            };
            let list = list.signed_by(issuer).unwrap();
            let file = folder.path().join("list");
            match as_pem {
                true => std::fs::write(&file, list.pem().unwrap()).unwrap(),
                false => std::fs::write(&file, list.der()).unwrap(),
            }
            let clients = ClientAuthority::load(&path, &[file]).unwrap();
            clients.names(std::slice::from_ref(&leaf)).is_ok()
        };
        assert!(holds(4000, &issuer, true) && holds(4000, &issuer, false));
        assert!(!holds(2021, &issuer, true));
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "another");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let other = Issuer::new(params, KeyPair::generate().unwrap());
        assert!(!holds(4000, &other, true));
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_named_with_their_key() {
        let folder = tempfile::tempdir().unwrap();
        let (path, ..) = authority(folder.path());
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let none = folder.path().join("none");
        let empty = file("empty", b"");
        let broken = file(
            "broken",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        );
        let says = |ca: &Path, crl: &[PathBuf], file: &Path, key: &str| {
            let error = ClientAuthority::load(ca, crl).unwrap_err();
            let file = file.display().to_string();
            assert!(error.contains(&file) && error.contains(key), "{error}");
        };
        for ca in [&none, &empty, &broken] {
            says(ca, &[], ca, "tls.client_ca");
        }
        for crl in [&none, &empty, &path] {
            says(&path, std::slice::from_ref(crl), crl, "tls.client_crl");
        }
    }
}
