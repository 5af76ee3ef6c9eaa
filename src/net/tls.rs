//! TLS by rustls's unbuffered connection. In: records from the peer, plaintext from the shard. Out: plaintext, records,
//! channel bindings. Promise: between two calls a connection keeps its keys and at most one unfinished record.
//!
//! rustls's buffered connection would cost 4 KiB more for each idle client; this one writes into the shard's buffers.

use super::certificate::fingerprint;
use super::client_certificate::{ClientAuthority, ClientNames};
use aws_lc_rs::digest::{self, digest};
use aws_lc_rs::hkdf::{self, KeyType, Prk};
use rustls::crypto::{CryptoProvider, GetRandomFailed, SecureRandom, aws_lc_rs as provider};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{HandshakeKind, KeyLog, ProtocolVersion, ServerConfig};
use std::cell::Cell;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What a record adds to its plaintext, at most (header, explicit nonce, content type, tag), rounded up.
const RECORD_OVERHEAD_BYTES: usize = 64;
/// rustls cuts plaintext into records of this size.
const RECORD_PLAINTEXT_BYTES: usize = 16 * 1024;
/// Room for what rustls puts in front of application data by itself (a key update).
const EXTRA_RECORDS_BYTES: usize = 256;
/// A ticket has a quarter of it. More than one read's is never held back.
const HELD_BYTES_MAX: usize = 1024;
/// Application protocol of XMPP over direct TLS (XEP-0368); clients that name none are welcome too.
const ALPN_XMPP_CLIENT: &[u8] = b"xmpp-client";
/// At the ports for HTTP, and only there: a browser is never led to a port that speaks another protocol.
const ALPN_HTTP: &[u8] = b"http/1.1";

/// The server's side of TLS for one certificate. Cheap to clone; reloading makes a new one, and connections keep theirs.
#[derive(Clone)]
pub struct TlsConfig(Arc<Shared>);

struct Shared {
    server: Arc<ServerConfig>,
    https: Arc<ServerConfig>,
    /// Who vouches for clients at the ports for XMPP; `None`: clients are asked for no certificate.
    clients: Option<ClientAuthority>,
    /// tls-server-end-point (RFC 5929, 4.1).
    end_point: Option<Vec<u8>>,
    fingerprint: String,
}

/// The protocol version that a handshake agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// RFC 5246.
    V1_2,
    /// RFC 8446.
    V1_3,
}

/// What SCRAM-PLUS may bind to, as bytes for the `cbind-data` field.
#[derive(Clone, Default)]
pub struct ChannelBindings {
    /// tls-exporter (RFC 9266); TLS 1.3 only.
    pub exporter: Option<Exporter>,
    /// tls-server-end-point (RFC 5929): the hash of the certificate; absent for signatures without a hash.
    pub end_point: Option<Vec<u8>>,
}

impl TlsConfig {
    /// Reads a PEM certificate chain (leaf first) and its key; TLS 1.2 is spoken unless `only_tls13`. The error is a sentence that names the file.
    /// With `clients`, those who come for XMPP are asked for a certificate.
    pub fn load(
        certificate: &Path,
        key: &Path,
        only_tls13: bool,
        clients: Option<ClientAuthority>,
    ) -> Result<Self, String> {
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(certificate)
            .and_then(Iterator::collect)
            .map_err(|e| unreadable("certificate", certificate, e))?;
        if chain.is_empty() {
            return Err(format!(
                "{} contains no certificate: tls.certificate must name a PEM file with the whole chain",
                certificate.display()
            ));
        }
        let private = PrivateKeyDer::from_pem_file(key).map_err(|e| unreadable("key", key, e))?;
        Self::new(chain, private, only_tls13, clients).map_err(|e| {
            format!(
                "the certificate {} and the key {} cannot be used together: {e}",
                certificate.display(),
                key.display()
            )
        })
    }

    fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        only_tls13: bool,
        clients: Option<ClientAuthority>,
    ) -> Result<Self, rustls::Error> {
        let versions: &[&rustls::SupportedProtocolVersion] = match only_tls13 {
            true => &[&rustls::version::TLS13],
            false => &[&rustls::version::TLS13, &rustls::version::TLS12],
        };
        let end_point = end_point(&chain[0]);
        let fingerprint = fingerprint(&chain[0]);
        let builder = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(versions)?;
        let mut https = builder
            .clone()
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        // a browser would ask its user which certificate to show
        let mut server = match &clients {
            None => https.clone(),
            Some(clients) => builder
                .with_client_cert_verifier(clients.asking())
                .with_cert_resolver(https.cert_resolver.clone()),
        };
        let ticketer = provider::Ticketer::new()?;
        for config in [&mut server, &mut https] {
            config.ignore_client_order = true;
            // Tickets carry their state with them: no table of sessions that cores would share.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.ticketer = ticketer.clone();
            config.send_tls13_tickets = 1;
            config.key_log = Arc::new(CatchExporter);
        }
        server.alpn_protocols = vec![ALPN_XMPP_CLIENT.to_vec()];
        https.alpn_protocols = vec![ALPN_HTTP.to_vec()];
        Ok(Self(Arc::new(Shared {
            clients,
            https: Arc::new(https),
            server: Arc::new(server),
            end_point,
            fingerprint,
        })))
    }

    /// SHA-256 of the leaf certificate, `AB:CD:…`.
    pub fn fingerprint(&self) -> &str {
        &self.0.fingerprint
    }
}

/// The cryptography of both sides. aws-lc-rs as it comes prefers X25519: measured 10 us cheaper than the hybrid with ML-KEM.
pub(super) fn provider() -> CryptoProvider {
    let mut provider = provider::default_provider();
    // AES-128-GCM with SHA-256 first: processors compute SHA-256 in hardware but not SHA-384, on which a handshake's key
    // schedule would spend a tenth of its time.
    provider.cipher_suites.sort_by_key(|suite| {
        let name = format!("{:?}", suite.suite());
        (!name.starts_with("TLS13_"), !name.contains("AES_128_GCM"))
    });
    provider.secure_random = &Stock;
    provider
}

/// Hellos and tickets ask for few bytes each: see [`crate::random`].
#[derive(Debug)]
struct Stock;

impl SecureRandom for Stock {
    fn fill(&self, out: &mut [u8]) -> Result<(), GetRandomFailed> {
        crate::random::random(out);
        Ok(())
    }
}

fn unreadable(what: &str, path: &Path, error: pem::Error) -> String {
    let path = path.display();
    match error {
        pem::Error::Io(e) => {
            format!(
                "cannot read the {what} {path}: {e}; tls.{what} must name a file this user may read"
            )
        }
        pem::Error::NoItemsFound => {
            format!("{path} contains no {what}: tls.{what} must name a PEM file")
        }
        e => format!("{path} is no valid PEM file with a {what}: {e:?}"),
    }
}

/// One server connection. `Send`: nothing in it is tied to a core.
pub(super) struct Tls {
    connection: UnbufferedServerConnection,
    config: TlsConfig,
    /// Received and not yet understood: the beginning of a record, or of a handshake message. Owns no memory when empty.
    unfinished: Vec<u8>,
    /// `unfinished` was put there from outside and rustls has not seen it.
    unseen: bool,
    exporter: Option<Exporter>,
    /// Records that go to the peer before the next ones. Owns no memory when empty.
    held: Vec<u8>,
    closed_by_peer: bool,
    failed: bool,
}

/// What [`Tls::open`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// Everything was taken in.
    Fine,
    /// The peer has said that it sends no more (close_notify).
    Closed,
}

impl Tls {
    /// A connection before its handshake; `received` is what the peer has sent of it already.
    pub(super) fn new(config: &TlsConfig, received: &[u8]) -> io::Result<Self> {
        Self::with(config.0.server.clone(), config, received)
    }

    /// The same for HTTP.
    pub(super) fn https(config: &TlsConfig) -> io::Result<Self> {
        Self::with(config.0.https.clone(), config, &[])
    }

    fn with(server: Arc<ServerConfig>, config: &TlsConfig, received: &[u8]) -> io::Result<Self> {
        let connection = UnbufferedServerConnection::new(server).map_err(broken)?;
        Ok(Self {
            connection,
            config: config.clone(),
            unfinished: received.to_vec(),
            unseen: !received.is_empty(),
            exporter: None,
            held: Vec::new(),
            closed_by_peer: false,
            failed: false,
        })
    }

    pub(super) fn handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    pub(super) fn failed(&self) -> bool {
        self.failed
    }

    pub(super) fn closed_by_peer(&self) -> bool {
        self.closed_by_peer
    }

    /// Whether there is something to [`open`](Self::open) without asking the kernel.
    pub(super) fn has_unseen(&self) -> bool {
        self.unseen
    }

    pub(super) fn version(&self) -> Option<TlsVersion> {
        match self.connection.protocol_version()? {
            ProtocolVersion::TLSv1_3 => Some(TlsVersion::V1_3),
            ProtocolVersion::TLSv1_2 => Some(TlsVersion::V1_2),
            _ => None,
        }
    }

    /// Whether the handshake resumed an earlier session.
    pub(super) fn resumed(&self) -> bool {
        self.connection.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// The names in the certificate that the client has shown; `Err`: why it does not hold now. `None`: it was asked for none, or has
    /// none. Costs the verification of the chain's signatures.
    pub(super) fn client_names(&self) -> Option<Result<ClientNames, rustls::Error>> {
        let clients = self.config.0.clients.as_ref()?;
        Some(clients.names(self.connection.peer_certificates()?))
    }

    pub(super) fn channel_bindings(&self) -> ChannelBindings {
        ChannelBindings {
            exporter: self.exporter.clone(),
            end_point: self.config.0.end_point.clone(),
        }
    }

    /// Puts what was held back in front of what goes to the peer.
    pub(super) fn prepend_held(&mut self, out: &mut Vec<u8>) {
        if !self.held.is_empty() {
            let behind = std::mem::replace(out, std::mem::take(&mut self.held));
            out.extend_from_slice(&behind);
        }
    }

    /// Holds `out` back for the records that answer what has just come, where nobody waits for it: behind a handshake of TLS 1.3
    /// these are tickets, which need no packet of their own.
    pub(super) fn hold(&mut self, out: &mut Vec<u8>) {
        let done = !self.failed && !self.closed_by_peer && !self.handshaking();
        if done && self.version() == Some(TlsVersion::V1_3) && out.len() <= HELD_BYTES_MAX {
            self.held.extend_from_slice(out);
            out.clear();
        }
    }

    /// Copies the unfinished bytes to the front of `input`; returns how many. New bytes are then received behind them,
    /// and both given to [`open`](Self::open); if nothing came, nothing is to be done.
    pub(super) fn restore(&self, input: &mut [u8]) -> io::Result<usize> {
        let length = self.unfinished.len();
        // Without room for more, the message in it can never be finished.
        if length > input.len() || (length == input.len() && !self.unseen) {
            return Err(broken("a TLS message is too long"));
        }
        input[..length].copy_from_slice(&self.unfinished);
        Ok(length)
    }

    /// Takes in `input` (the restored bytes and the new ones), appends plaintext to `plain` and what the peer must be
    /// told (handshake, tickets, alerts) to `out`, which is to be sent even after an error.
    pub(super) fn open(
        &mut self,
        input: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> io::Result<Opened> {
        CAUGHT.set(None);
        let taken = self.process(input, plain, out);
        if let Some(secret) = CAUGHT.take() {
            self.exporter = Some(secret);
        }
        self.unseen = false;
        match taken {
            Ok(taken) => {
                let rest = if self.closed_by_peer {
                    &[]
                } else {
                    &input[taken..]
                };
                if rest.is_empty() {
                    self.unfinished = Vec::new();
                } else {
                    self.unfinished.clear();
                    self.unfinished.extend_from_slice(rest);
                }
                Ok(match self.closed_by_peer {
                    true => Opened::Closed,
                    false => Opened::Fine,
                })
            }
            Err(error) => {
                self.failed = true;
                self.encode_alert(out);
                Err(broken(error))
            }
        }
    }

    /// What a failed connection still has to say. Asked only while something is queued: then rustls looks at no input,
    /// where it would otherwise slice past the end of an empty one after an unfinished handshake message.
    fn encode_alert(&mut self, out: &mut Vec<u8>) {
        while self.connection.wants_write() {
            let status = self.connection.process_tls_records(&mut []);
            let Ok(ConnectionState::EncodeTlsData(mut data)) = status.state else {
                return;
            };
            let encoded = append(out, 0, |room| data.encode(room).map_err(encode_room));
            if encoded.is_err() {
                return;
            }
        }
    }

    fn process(
        &mut self,
        input: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<usize, rustls::Error> {
        let mut taken = 0;
        loop {
            let UnbufferedStatus { mut discard, state } =
                self.connection.process_tls_records(&mut input[taken..]);
            let idle = match state? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        plain.extend_from_slice(record.payload);
                    }
                    false
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    append(out, 0, |room| data.encode(room).map_err(encode_room))?;
                    false
                }
                ConnectionState::TransmitTlsData(transmit) => {
                    transmit.done();
                    false
                }
                ConnectionState::PeerClosed => {
                    self.closed_by_peer = true;
                    false
                }
                // Early data is never offered, so never read.
                ConnectionState::ReadEarlyData(_) => {
                    return Err(rustls::Error::General("early data".into()));
                }
                _ => true,
            };
            taken += discard;
            if idle {
                return Ok(taken);
            }
        }
    }

    /// Encrypts all of `plain` behind what is in `out`. Only after the handshake.
    pub(super) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        let records = plain.len() / RECORD_PLAINTEXT_BYTES + 1;
        let room = plain.len() + records * RECORD_OVERHEAD_BYTES + EXTRA_RECORDS_BYTES;
        self.with_writer(out, room, |writer, room| writer.encrypt(plain, room))
    }

    /// Appends the alert that ends our direction.
    pub(super) fn seal_close(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        self.with_writer(out, EXTRA_RECORDS_BYTES, |writer, room| {
            writer.queue_close_notify(room)
        })
    }

    fn with_writer(
        &mut self,
        out: &mut Vec<u8>,
        expected: usize,
        mut write: impl FnMut(
            &mut rustls::unbuffered::WriteTraffic<'_, rustls::server::ServerConnectionData>,
            &mut [u8],
        ) -> Result<usize, EncryptError>,
    ) -> io::Result<()> {
        if self.failed || self.handshaking() {
            return Err(broken("nothing can be written outside a TLS session"));
        }
        loop {
            // With the unfinished bytes, not with an empty slice: rustls remembers how far into them it has seen, and
            // would slice past the end.
            let UnbufferedStatus { discard, state } =
                self.connection.process_tls_records(&mut self.unfinished);
            let done = match state.map_err(broken)? {
                ConnectionState::WriteTraffic(mut writer) => {
                    append(out, expected, |room| {
                        write(&mut writer, room).map_err(encrypt_room)
                    })
                    .map_err(broken)?;
                    true
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    append(out, 0, |room| data.encode(room).map_err(encode_room))
                        .map_err(broken)?;
                    false
                }
                ConnectionState::TransmitTlsData(transmit) => {
                    transmit.done();
                    false
                }
                // Every complete record was taken in when it arrived, and a closed session takes no more.
                _ => return Err(broken("the TLS session is closed")),
            };
            self.unfinished.drain(..discard);
            if done {
                return Ok(());
            }
        }
    }
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// What an encoder says when it cannot write: how much room it needs, or why it never will.
enum NoRoom {
    Bytes(usize),
    Never(String),
}

fn encode_room(error: EncodeError) -> NoRoom {
    match error {
        EncodeError::InsufficientSize(size) => NoRoom::Bytes(size.required_size),
        other => NoRoom::Never(other.to_string()),
    }
}

fn encrypt_room(error: EncryptError) -> NoRoom {
    match error {
        EncryptError::InsufficientSize(size) => NoRoom::Bytes(size.required_size),
        other => NoRoom::Never(other.to_string()),
    }
}

/// Lets `write` fill `room` bytes behind `out`, or as many as it then asks for.
fn append(
    out: &mut Vec<u8>,
    mut room: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, NoRoom>,
) -> Result<(), rustls::Error> {
    let start = out.len();
    for _ in 0..2 {
        out.resize(start + room, 0);
        match write(&mut out[start..]) {
            Ok(written) => {
                out.truncate(start + written);
                return Ok(());
            }
            Err(NoRoom::Bytes(needed)) => room = needed,
            Err(NoRoom::Never(why)) => {
                out.truncate(start);
                return Err(rustls::Error::General(why));
            }
        }
    }
    out.truncate(start);
    Err(rustls::Error::General("no room for a record".into()))
}

/// The exporter secret of TLS 1.3, as long as the hash of the cipher suite.
#[derive(Clone)]
pub enum Exporter {
    /// Of a cipher suite with SHA-256.
    Sha256([u8; 32]),
    /// Of a cipher suite with SHA-384.
    Sha384([u8; 48]),
}

impl Exporter {
    /// `None`: no suite has a hash of this length.
    fn new(secret: &[u8]) -> Option<Exporter> {
        match secret.len() {
            32 => secret.try_into().ok().map(Exporter::Sha256),
            48 => secret.try_into().ok().map(Exporter::Sha384),
            _ => None,
        }
    }

    /// tls-exporter: TLS-Exporter("EXPORTER-Channel-Binding", "", 32), RFC 9266 section 4 and RFC 8446 section 7.5. Costs
    /// about as much as encrypting two records.
    pub fn binding(&self) -> [u8; 32] {
        let (hash, hkdf, secret) = match self {
            Exporter::Sha256(secret) => (&digest::SHA256, hkdf::HKDF_SHA256, &secret[..]),
            Exporter::Sha384(secret) => (&digest::SHA384, hkdf::HKDF_SHA384, &secret[..]),
        };
        let empty = digest(hash, b"");
        let mut derived = [0u8; 48];
        let derived = &mut derived[..secret.len()];
        let mut binding = [0u8; 32];
        expand_label(
            hkdf,
            secret,
            b"EXPORTER-Channel-Binding",
            empty.as_ref(),
            derived,
        )
        .and_then(|()| expand_label(hkdf, derived, b"exporter", empty.as_ref(), &mut binding))
        .expect("a hash can be expanded to its own length");
        binding
    }
}

/// HKDF-Expand-Label (RFC 8446, section 7.1).
fn expand_label(
    algorithm: hkdf::Algorithm,
    secret: &[u8],
    label: &[u8],
    context: &[u8],
    out: &mut [u8],
) -> Option<()> {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let length = u16::try_from(out.len()).ok()?.to_be_bytes();
    let label_length = [u8::try_from(label.len() + 6).ok()?];
    let context_length = [u8::try_from(context.len()).ok()?];
    let info = [
        &length[..],
        &label_length,
        b"tls13 ",
        label,
        &context_length,
        context,
    ];
    let prk = Prk::new_less_safe(algorithm, secret);
    let okm = prk.expand(&info, Length(out.len())).ok()?;
    okm.fill(out).ok()
}

thread_local! {
    /// What [`CatchExporter`] caught during the call of [`Tls::open`] that is under way on this thread.
    static CAUGHT: Cell<Option<Exporter>> = const { Cell::new(None) };
}

/// The unbuffered connection exports no keying material, but it offers its secrets to a key log while it processes
/// records. This one takes the exporter secret, which can make channel bindings and decrypt nothing, and no other.
#[derive(Debug)]
struct CatchExporter;

impl KeyLog for CatchExporter {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        if self.will_log(label) {
            CAUGHT.set(Exporter::new(secret));
        }
    }

    fn will_log(&self, label: &str) -> bool {
        label == "EXPORTER_SECRET"
    }
}

/// tls-server-end-point: the certificate hashed as its signature hashes, but never weaker than SHA-256 (RFC 5929, 4.1).
fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let hash = match signature_hash(certificate)? {
        Hash::Sha256 => &digest::SHA256,
        Hash::Sha384 => &digest::SHA384,
        Hash::Sha512 => &digest::SHA512,
    };
    Some(digest(hash, certificate).as_ref().to_vec())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// Object identifiers of signature algorithms (and, for RSASSA-PSS, of the hash in its parameters) as DER contents.
const SIGNATURE_HASHES: &[(&[u8], Hash)] = &[
    // {md5,sha1}WithRSAEncryption, ecdsa-with-SHA1: too weak, SHA-256 instead.
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 4], Hash::Sha256),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5], Hash::Sha256),
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1], Hash::Sha256),
    // sha{256,384,512}WithRSAEncryption
    (
        &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11],
        Hash::Sha256,
    ),
    (
        &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 12],
        Hash::Sha384,
    ),
    (
        &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 13],
        Hash::Sha512,
    ),
    // ecdsa-with-SHA{256,384,512}
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2], Hash::Sha256),
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3], Hash::Sha384),
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 4], Hash::Sha512),
];
const RSASSA_PSS: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 10];
/// id-sha256 is …4.2.1, then id-sha384 and id-sha512.
const SHA2: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2];

/// The hash of a certificate's signature: `Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm SEQUENCE {
/// OBJECT IDENTIFIER, parameters }, … }` (RFC 5280, 4.1). `None` where the algorithm has none of its own (Ed25519).
fn signature_hash(certificate: &[u8]) -> Option<Hash> {
    let (certificate, _) = element(certificate, 0x30)?;
    let (_tbs, rest) = element(certificate, 0x30)?;
    let (algorithm, _) = element(rest, 0x30)?;
    let (identifier, parameters) = element(algorithm, 0x06)?;
    if identifier == RSASSA_PSS {
        // The first SHA-2 identifier in the parameters is the message hash; without one it is SHA-1.
        let at = memchr::memmem::find(parameters, SHA2);
        return Some(match at.and_then(|at| parameters.get(at + SHA2.len())) {
            Some(2) => Hash::Sha384,
            Some(3) => Hash::Sha512,
            _ => Hash::Sha256,
        });
    }
    let known = SIGNATURE_HASHES.iter().find(|(oid, _)| *oid == identifier);
    known.map(|(_, hash)| *hash)
}

/// Contents of the DER element with `tag` at the start of `bytes`, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        short @ 0..=0x7f => (usize::from(short), rest),
        0x81..=0x83 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first - 0x80))?;
            let length = digits.iter().fold(0, |n, d| n << 8 | usize::from(*d));
            (length, rest)
        }
        _ => return None,
    };
    if found != tag {
        return None;
    }
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed_with(algorithm: &'static rcgen::SignatureAlgorithm) -> Vec<u8> {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_end_point_is_hashed_as_the_signature_is() {
        let of = |algorithm| end_point(&signed_with(algorithm)).map(|hash| hash.len());
        assert_eq!(of(&rcgen::PKCS_ECDSA_P256_SHA256), Some(32));
        assert_eq!(of(&rcgen::PKCS_ECDSA_P384_SHA384), Some(48));
        assert_eq!(of(&rcgen::PKCS_ED25519), None);
        let der = signed_with(&rcgen::PKCS_ECDSA_P256_SHA256);
        let sha256 = digest(&digest::SHA256, &der);
        assert_eq!(end_point(&der).unwrap(), sha256.as_ref());
    }

    #[test]
    fn rubbish_has_no_end_point_and_does_no_harm() {
        let der = signed_with(&rcgen::PKCS_ECDSA_P256_SHA256);
        for cut in 0..der.len() {
            let _ = end_point(&der[..cut]);
        }
        assert_eq!(end_point(&[0x30, 0x83, 0xff, 0xff, 0xff]), None);
        assert_eq!(end_point(&[0x30, 0x85, 0, 0, 0, 0, 0]), None);
    }
}
