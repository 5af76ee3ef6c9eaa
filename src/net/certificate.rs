//! Certificates as files. In: a domain and where to put them. Out: a self-signed certificate for the first start, and
//! the fingerprint that its users compare. Promise: a key file is never readable by others, nor ever overwritten.

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, OtherNameValue, SanType};
use rustls::pki_types::CertificateDer;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// id-on-xmppAddr (RFC 6120, 13.7.1.4), which carries a domain that DNS names cannot spell.
const XMPP_ADDR: &[u64] = &[1, 3, 6, 1, 5, 5, 7, 8, 5];
const VALID_YEARS: i32 = 10;

/// Writes a self-signed certificate for `domain` (ECDSA P-256, ten years, names: DNS and XMPP address) and its key, both
/// PEM, the key at mode 0600. Neither file may exist. The error is a sentence.
pub fn generate_certificate(domain: &str, certificate: &Path, key: &Path) -> Result<(), String> {
    let (certificate_pem, key_pem) =
        make(domain).map_err(|e| format!("cannot make a certificate for {domain}: {e}"))?;
    write_new(key, key_pem.as_bytes(), 0o600)?;
    write_new(certificate, certificate_pem.as_bytes(), 0o644)
}

/// The SHA-256 fingerprint of a certificate as people compare it: `AB:CD:…`, 32 bytes.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
    let hex: Vec<String> = hash.as_ref().iter().map(|b| format!("{b:02X}")).collect();
    hex.join(":")
}

fn make(domain: &str) -> Result<(String, String), String> {
    let ascii = idna::domain_to_ascii(domain).map_err(|e| e.to_string())?;
    let mut params = CertificateParams::new(vec![ascii]).map_err(|e| e.to_string())?;
    params.subject_alt_names.push(SanType::OtherName((
        XMPP_ADDR.to_vec(),
        OtherNameValue::Utf8String(domain.to_owned()),
    )));
    params.distinguished_name.push(DnType::CommonName, domain);
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let year = this_year();
    params.not_before = rcgen::date_time_ymd(year, 1, 1);
    params.not_after = rcgen::date_time_ymd(year + VALID_YEARS, 12, 31);
    let key = KeyPair::generate().map_err(|e| e.to_string())?;
    let certificate = params.self_signed(&key).map_err(|e| e.to_string())?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// Near enough for the ends of a certificate's life.
fn this_year() -> i32 {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    i32::try_from(1970 + seconds / 31_556_952).unwrap_or(2026)
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), String> {
    let write = || {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| format!("cannot write {}: {e}", path.display()))
}
