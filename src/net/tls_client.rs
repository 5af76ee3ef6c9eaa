//! TLS towards a server that nitro connects to (an instance of Redis), without its socket.
//!
//! In: bytes of the socket, plaintext for the server. Out: plaintext of the server, bytes for the socket, or a sentence
//! that says why the server is not to be trusted. Promise: no plaintext leaves before the server's certificate has been
//! verified, its chain and its name; there is no switch that leaves this out.
//!
//! This is rustls's buffered connection: a blade has a few of them, and what they hold while idle does not matter.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{CertificateError, ClientConfig, ClientConnection, Error, RootCertStore};

use super::tls::provider;

/// Whom to trust and who one is. Cheap to clone.
#[derive(Clone)]
pub struct TlsClientConfig(Arc<ClientConfig>);

impl TlsClientConfig {
    /// `ca_file`: certificates (PEM) of those who may vouch for a server; empty: those that the system trusts. `certificate`
    /// and `key`: the client's own (PEM), both or none. The error is a sentence that names the key of the configuration.
    pub fn load(ca_file: &Path, certificate: &Path, key: &Path) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        match ca_file.as_os_str().is_empty() {
            true => {
                let found = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(found.certs);
                if roots.is_empty() {
                    return Err("redis.ca_file: the system has no certificates of its own (Debian's are in the package \
                         ca-certificates); name a PEM file with those that vouch for the instances"
                        .into());
                }
            }
            false => {
                for one in chain("redis.ca_file", ca_file)? {
                    roots.add(one).map_err(|error| {
                        let file = ca_file.display();
                        format!("redis.ca_file: {file} holds a certificate that vouches for nobody ({error})")
                    })?;
                }
            }
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS towards Redis: {error}"))?
            .with_root_certificates(roots);
        let config = match certificate.as_os_str().is_empty() {
            true => builder.with_no_client_auth(),
            false => {
                let chain = chain("redis.certificate", certificate)?;
                let own = PrivateKeyDer::from_pem_file(key)
                    .map_err(|error| unreadable("redis.key", key, error))?;
                builder.with_client_auth_cert(chain, own).map_err(|error| {
                    format!("redis.certificate: it and redis.key cannot be used together ({error})")
                })?
            }
        };
        Ok(Self(Arc::new(config)))
    }
}

fn chain(what: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(file).and_then(|certificates| certificates.collect());
    match all.map_err(|error| unreadable(what, file, error))? {
        none if none.is_empty() => Err(unreadable(what, file, pem::Error::NoItemsFound)),
        all => Ok(all),
    }
}

fn unreadable(what: &str, file: &Path, error: pem::Error) -> String {
    let why = match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound => "nothing of the kind is in it".into(),
        error => format!("it is not PEM: {error:?}"),
    };
    format!(
        "{what}: {} cannot be used ({why}); name a PEM file that this user may read",
        file.display()
    )
}

/// One connection.
pub struct TlsClient {
    connection: ClientConnection,
    out: Vec<u8>,
    sent: usize,
}

/// Plaintext that one [`TlsClient::seal`] takes at most.
const SEAL_BYTES_MAX: usize = 32 << 10;

impl TlsClient {
    /// `host` is the name or address that the server's certificate must be for. Begins the handshake:
    /// [`TlsClient::outgoing`].
    pub fn new(config: &TlsClientConfig, host: &str) -> Result<Self, String> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| format!("{host} is no name that a certificate could be for"))?;
        let connection = ClientConnection::new(config.0.clone(), name).map_err(sentence)?;
        let mut client = Self {
            connection,
            out: Vec::new(),
            sent: 0,
        };
        client.collect();
        Ok(client)
    }

    /// Until the server has been verified. Nothing may be sealed before.
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Takes what the socket brought and appends the plaintext in it. After an error only [`TlsClient::outgoing`] is left:
    /// it tells the server why.
    pub fn open(&mut self, mut records: &[u8], plain: &mut Vec<u8>) -> Result<(), String> {
        while !records.is_empty() {
            let read = self.connection.read_tls(&mut records);
            let taken = read.map_err(|error| format!("TLS fails: {error}"))?;
            let processed = self.connection.process_new_packets();
            self.collect();
            let state = processed.map_err(sentence)?;
            let begin = plain.len();
            plain.resize(begin + state.plaintext_bytes_to_read(), 0);
            let read = self.connection.reader().read_exact(&mut plain[begin..]);
            read.map_err(|error| format!("TLS fails: {error}"))?;
            if taken == 0 || state.peer_has_closed() {
                return Err("it has closed the connection".into());
            }
        }
        Ok(())
    }

    /// Encrypts the begin of `plain`; how many bytes of it. Call it again when all of [`TlsClient::outgoing`] was sent.
    pub fn seal(&mut self, plain: &[u8]) -> usize {
        let some = &plain[..plain.len().min(SEAL_BYTES_MAX)];
        // it fails where the connection has failed, and then `open` has said so
        let taken = self.connection.writer().write(some).unwrap_or(0);
        self.collect();
        taken
    }

    /// What is to be sent to the socket next.
    pub fn outgoing(&self) -> &[u8] {
        &self.out[self.sent..]
    }

    /// The socket took so many bytes of it.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
    }

    fn collect(&mut self) {
        while self.connection.wants_write() {
            if self.connection.write_tls(&mut self.out).is_err() {
                return; // a vector takes everything
            }
        }
    }
}

/// For the log.
fn sentence(error: Error) -> String {
    match error {
        // the second: somebody of the same name, but with another key
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "nobody in `redis.ca_file` vouches for its certificate".into(),
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is for another name than that in `redis.instances`".into(),
        Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "its certificate has expired".into(),
        Error::InvalidMessage(_) => {
            "it does not speak TLS there: the port may be that of redis://".into()
        }
        Error::AlertReceived(alert) => format!(
            "it breaks TLS off ({alert:?}): if it asks for a client's certificate, look at `redis.certificate`"
        ),
        error => format!("TLS fails: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tls::{Tls, TlsConfig};
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    /// A CA and what it has signed: ca.pem, certificate.pem, key.pem.
    fn authority(folder: &Path, name: &str, ca_name: &str) {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.distinguished_name.push(DnType::CommonName, ca_name);
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = ca.self_signed(&ca_key).unwrap();
        std::fs::write(folder.join("ca.pem"), certificate.pem()).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![name.into()]).unwrap();
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        std::fs::write(folder.join("certificate.pem"), leaf.pem()).unwrap();
        std::fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
    }

    fn none() -> &'static Path {
        Path::new("")
    }

    /// Both ends, and what goes between them in pieces of `cut` bytes; what the server has read.
    fn talk(client: &mut TlsClient, server: &mut Tls, cut: usize) -> Result<Vec<u8>, String> {
        let (mut plain, mut got) = (Vec::new(), Vec::new());
        loop {
            let there = client.outgoing().to_vec();
            client.sent(there.len());
            let mut back = Vec::new();
            for piece in there.chunks(cut) {
                let mut input = vec![0; 128 << 10];
                let had = server.restore(&mut input).unwrap();
                input[had..had + piece.len()].copy_from_slice(piece);
                // a refused client is the client's to tell
                let _ = server.open(&mut input[..had + piece.len()], &mut plain, &mut back);
            }
            for piece in back.chunks(cut) {
                client.open(piece, &mut got)?;
            }
            if client.outgoing().is_empty() && back.is_empty() {
                return Ok(plain);
            }
        }
    }

    #[test]
    fn who_is_vouched_for_is_talked_to_however_records_are_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        authority(folder.path(), "cache.example", "CA");
        let server =
            TlsConfig::load(&path("certificate.pem"), &path("key.pem"), false, None).unwrap();
        let config = TlsClientConfig::load(&path("ca.pem"), none(), none()).unwrap();
        let long = vec![b'x'; 100_000];
        for cut in [1, 7, 1000, usize::MAX] {
            let mut client = TlsClient::new(&config, "cache.example").unwrap();
            let mut server = Tls::new(&server, b"").unwrap();
            assert!(client.is_handshaking());
            assert_eq!(talk(&mut client, &mut server, cut).unwrap(), b"");
            assert!(!client.is_handshaking());
            let (mut rest, mut heard) = (&long[..], Vec::new());
            while !rest.is_empty() {
                rest = &rest[client.seal(rest)..];
                heard.extend(talk(&mut client, &mut server, cut.max(1000)).unwrap());
            }
            assert!(heard == long);
            let (mut records, mut got) = (Vec::new(), Vec::new());
            server.seal(&long, &mut records).unwrap();
            for piece in records.chunks(cut.max(1000)) {
                client.open(piece, &mut got).unwrap();
            }
            assert!(got == long);
            server.seal_close(&mut records).unwrap();
            let closed = client.open(&records[records.len() - 24..], &mut got);
            assert_eq!(closed.unwrap_err(), "it has closed the connection");
        }
    }

    #[test]
    fn who_is_not_vouched_for_is_told_nothing() {
        let [one, other, namesake] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        authority(one.path(), "cache.example", "CA");
        authority(other.path(), "cache.example", "another CA");
        authority(namesake.path(), "cache.example", "CA");
        let path = |name: &str| one.path().join(name);
        let server =
            TlsConfig::load(&path("certificate.pem"), &path("key.pem"), false, None).unwrap();
        for (ca, host, says) in [
            (other.path(), "cache.example", "vouches for"),
            (namesake.path(), "cache.example", "vouches for"),
            (one.path(), "other.example", "for another name"),
            (one.path(), "127.0.0.1", "for another name"),
        ] {
            let config = TlsClientConfig::load(&ca.join("ca.pem"), none(), none()).unwrap();
            let mut client = TlsClient::new(&config, host).unwrap();
            let mut server = Tls::new(&server, b"").unwrap();
            let error = talk(&mut client, &mut server, usize::MAX).unwrap_err();
            assert!(error.contains(says), "{error}");
            assert!(client.is_handshaking());
        }
        let config = TlsClientConfig::load(&path("ca.pem"), none(), none()).unwrap();
        let mut client = TlsClient::new(&config, "cache.example").unwrap();
        let plainly = b"-ERR wrong number of arguments for 'get' command\r\n";
        let error = client.open(plainly, &mut Vec::new()).unwrap_err();
        assert!(error.contains("does not speak TLS"), "{error}");
    }

    #[test]
    fn files_that_do_not_serve_are_refused_with_the_key_that_names_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        authority(folder.path(), "cache.example", "CA");
        std::fs::write(path("empty.pem"), "").unwrap();
        for (ca, certificate, key, says) in [
            ("none.pem", "", "", "redis.ca_file: "),
            ("empty.pem", "", "", "redis.ca_file: "),
            ("key.pem", "", "", "redis.ca_file: "),
            ("ca.pem", "none.pem", "key.pem", "redis.certificate: "),
            ("ca.pem", "certificate.pem", "ca.pem", "redis.key: "),
        ] {
            let of = |name: &str| match name {
                "" => none().to_owned(),
                name => path(name),
            };
            let loaded = TlsClientConfig::load(&of(ca), &of(certificate), &of(key));
            let sentence = loaded.err().expect("it is refused");
            assert!(sentence.starts_with(says), "{sentence}");
        }
        TlsClientConfig::load(&path("ca.pem"), &path("certificate.pem"), &path("key.pem")).unwrap();
    }
}
