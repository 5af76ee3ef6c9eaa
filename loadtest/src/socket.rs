//! Bytes in and out of one client: a non-blocking TCP socket with or without TLS, with or without WebSocket in it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use mio::net::TcpStream;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientConnection, ClientSessionStore, Resumption, Tls12ClientSessionValue,
    Tls13ClientSessionValue,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, NamedGroup, RootCertStore, SignatureScheme};
use socket2::{Domain, Protocol, Type};

use crate::options::{Global, Target, TlsMode};
use crate::websocket::Framing;

pub struct Socket {
    pub stream: TcpStream,
    tls: Option<Box<ClientConnection>>,
    pub websocket: Option<Box<Framing>>,
    connected: bool,
    /// How much of the output has been written (without TLS).
    written: usize,
}

/// What TLS connections are made from.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Socket {
    pub fn connect(target: &Target, user: u32) -> io::Result<Socket> {
        let socket = socket2::Socket::new(
            Domain::for_address(target.address),
            Type::STREAM.nonblocking().cloexec(),
            Some(Protocol::TCP),
        )?;
        socket.set_tcp_nodelay(true)?;
        if let Some(bytes) = target.receive_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        if let Some(source) = target.source(user) {
            socket.bind(&source.into())?;
        }
        connect(&socket, target.address)?;
        Ok(Socket {
            stream: TcpStream::from_std(socket.into()),
            tls: None,
            websocket: (target.websocket.as_ref())
                .map(|path| Box::new(Framing::new(path, &target.domain))),
            connected: false,
            written: 0,
        })
    }

    pub fn start_tls(&mut self, tls: &Tls) -> Result<(), rustls::Error> {
        let mut connection = ClientConnection::new(tls.config.clone(), tls.name.clone())?;
        connection.set_buffer_limit(None);
        self.tls = Some(Box::new(connection));
        Ok(())
    }

    /// Ends the connection with a reset, without a goodbye of TCP or TLS.
    pub fn reset(self) {
        // without it the peer is told by an ordinary end of the connection
        let _ = socket2::SockRef::from(&self.stream).set_linger(Some(std::time::Duration::ZERO));
    }

    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Takes bytes off the wire through TLS and appends the plain text. Returns false when the peer ended TLS.
    pub fn decrypt(&mut self, mut wire: &[u8], plain: &mut Vec<u8>) -> io::Result<bool> {
        let tls = self.tls.as_mut().expect("only called with TLS");
        let mut open = true;
        while !wire.is_empty() {
            tls.read_tls(&mut wire)?;
            let state = tls.process_new_packets().map_err(io::Error::other)?;
            open &= !state.peer_has_closed();
            let start = plain.len();
            plain.resize(start + state.plaintext_bytes_to_read(), 0);
            tls.reader().read_exact(&mut plain[start..])?;
            if !open {
                break;
            }
        }
        Ok(open)
    }

    /// For channel binding (RFC 9266, section 4.2); `None` before the end of the handshake.
    pub fn exporter(&self) -> Option<[u8; 32]> {
        self.tls
            .as_ref()?
            .export_keying_material([0; 32], b"EXPORTER-Channel-Binding", Some(b""))
            .ok()
    }

    pub fn wants_write(&self) -> bool {
        let framed = |framing: &Framing| !framing.wire.is_empty();
        self.websocket.as_deref().is_some_and(framed)
            || self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Writes what it can of `out`, and empties it once all is written.
    pub fn flush(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        if !self.connected {
            if let Some(error) = self.stream.take_error()? {
                return Err(error);
            }
            match self.stream.peer_addr() {
                Ok(_) => self.connected = true,
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        let out = match &mut self.websocket {
            Some(framing) => {
                framing.frame(out);
                &mut framing.wire
            }
            None => out,
        };
        let outcome = match &mut self.tls {
            Some(tls) => {
                if !out.is_empty() {
                    tls.writer().write_all(out)?;
                    out.clear();
                }
                flush_tls(tls, &mut self.stream)
            }
            None => flush_plain(&mut self.stream, out, &mut self.written),
        };
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            outcome => outcome,
        }
    }
}

/// EINPROGRESS is how a non-blocking connect begins.
fn connect(socket: &socket2::Socket, address: SocketAddr) -> io::Result<()> {
    match socket.connect(&address.into()) {
        Err(error)
            if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

fn flush_tls(tls: &mut ClientConnection, stream: &mut TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(stream)?;
    }
    Ok(())
}

fn flush_plain(stream: &mut TcpStream, out: &mut Vec<u8>, written: &mut usize) -> io::Result<()> {
    while *written < out.len() {
        match stream.write(&out[*written..]) {
            Ok(count) => *written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    *written = 0;
    out.clear();
    Ok(())
}

impl Tls {
    pub fn new(options: &Global, target: &Target) -> Result<Tls, String> {
        let provider = Arc::new(CryptoProvider {
            // X25519 first, whatever the library prefers: what servers are compared with.
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
                aws_lc_rs::kx_group::SECP384R1,
            ],
            ..aws_lc_rs::default_provider()
        });
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?;
        let mut config = if options.verify(&target.address) {
            let mut roots = RootCertStore::empty();
            let file = options.tls_ca.display();
            let certificates = CertificateDer::pem_file_iter(&options.tls_ca)
                .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
                .map_err(|error| format!("--tls-ca {file}: {error}"))?;
            roots.add_parsable_certificates(certificates);
            builder.with_root_certificates(roots).with_no_client_auth()
        } else {
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
                .with_no_client_auth()
        };
        config.resumption = match options.tls_resume {
            true => Resumption::store(Arc::new(Tickets::new(options.users as usize))),
            false => Resumption::disabled(),
        };
        config.alpn_protocols = match (&target.websocket, target.tls) {
            (Some(_), _) => vec![b"http/1.1".to_vec()],
            // XEP-0368
            (None, TlsMode::Direct) => vec![b"xmpp-client".to_vec()],
            (None, _) => Vec::new(),
        };
        let name = ServerName::try_from(target.domain.clone())
            .map_err(|_| format!("--domain {}: not a host name", target.domain))?;
        Ok(Tls {
            config: Arc::new(config),
            name,
        })
    }
}

/// One ticket for each user, as each real client keeps its own: the library's store keeps eight for a server. TLS 1.3 only.
#[derive(Debug)]
struct Tickets {
    tickets: Mutex<VecDeque<Tls13ClientSessionValue>>,
    most: usize,
}

impl Tickets {
    fn new(most: usize) -> Tickets {
        Tickets {
            tickets: Mutex::default(),
            most,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Tls13ClientSessionValue>> {
        self.tickets.lock().expect("nobody panics with it")
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut tickets = self.lock();
        if tickets.len() == self.most {
            tickets.pop_front();
        }
        tickets.push_back(ticket);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.lock().pop_front()
    }
}

/// Believes every certificate, without spending CPU on it: the peer is the machine itself.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
