use super::*;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, RootCertStore, SupportedCipherSuite};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        generate_certificate("localhost", &files.certificate(), &files.key()).unwrap();
        files
    }

    fn certificate(&self) -> PathBuf {
        self.folder.path().join("certificate.pem")
    }

    fn key(&self) -> PathBuf {
        self.folder.path().join("key.pem")
    }

    fn server(&self) -> TlsConfig {
        TlsConfig::load(&self.certificate(), &self.key(), false, None).unwrap()
    }

    fn certified_key(&self) -> CertifiedKey {
        let key = PrivateKeyDer::from_pem_file(self.key()).unwrap();
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        CertifiedKey::from_der(vec![self.leaf()], key, &provider).unwrap()
    }

    fn leaf(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.certificate()).unwrap()
    }

    fn client(&self, suite: Option<SupportedCipherSuite>) -> ClientConfig {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites = suite.map_or(provider.cipher_suites, |one| vec![one]);
        let mut roots = RootCertStore::empty();
        roots.add(self.leaf()).unwrap();
        let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
        let versions = &versions[usize::from(suite.is_some_and(|s| s.tls13().is_none()))..];
        ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth()
    }
}

/// A rustls client on its end of a socket pair, driven by hand.
struct Client {
    tls: ClientConnection,
    stream: UnixStream,
    got: Vec<u8>,
    closed: bool,
}

impl Client {
    fn new(config: ClientConfig, stream: UnixStream) -> Self {
        stream.set_nonblocking(true).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        Self {
            tls: ClientConnection::new(Arc::new(config), name).unwrap(),
            stream,
            got: Vec::new(),
            closed: false,
        }
    }

    /// What it has to send now, as it goes to the wire.
    fn take(&mut self) -> Vec<u8> {
        let mut wire = Vec::new();
        while self.tls.wants_write() {
            self.tls.write_tls(&mut wire).unwrap();
        }
        wire
    }

    fn send(&mut self) {
        let wire = self.take();
        self.stream.write_all(&wire).unwrap();
    }

    /// Takes in all that has arrived; returns how many bytes of plaintext.
    fn receive(&mut self) -> usize {
        let before = self.got.len();
        loop {
            match self.tls.read_tls(&mut self.stream) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
            let state = self.tls.process_new_packets().unwrap();
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            self.tls.reader().read_exact(&mut plain).unwrap();
            self.got.extend(plain);
            if state.peer_has_closed() {
                self.closed = true;
                break;
            }
        }
        self.got.len() - before
    }

    fn say(&mut self, text: &[u8]) {
        self.tls.writer().write_all(text).unwrap();
        self.send();
    }
}

fn pair() -> (Transport, UnixStream) {
    let (server, client) = UnixStream::pair().unwrap();
    (Transport::plain(Socket::try_from(server).unwrap()), client)
}

/// A server and a client before their handshake.
fn tls_pair(files: &Files, client: ClientConfig) -> (Transport, Client) {
    let (mut server, stream) = pair();
    server.start_tls(&files.server(), b"").unwrap();
    (server, Client::new(client, stream))
}

fn shake(server: &mut Transport, client: &mut Client, scratch: &mut Scratch) {
    while server.handshaking() || client.tls.is_handshaking() {
        client.send();
        let read = server.read(scratch).unwrap();
        assert!(matches!(read, Read::WouldBlock | Read::HandshakeDone));
        client.receive();
    }
}

/// All plaintext that is there.
fn read_all(server: &mut Transport, scratch: &mut Scratch) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        match server.read(scratch).unwrap() {
            Read::Data { bytes, more } => {
                all.extend_from_slice(bytes);
                if !more {
                    return all;
                }
            }
            Read::HandshakeDone => {}
            Read::WouldBlock | Read::Eof => return all,
        }
    }
}

use rustls::crypto::aws_lc_rs::cipher_suite as suites;

#[test]
fn both_versions_shake_hands_and_carry_data_both_ways() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    for (suite, version) in [
        (suites::TLS13_AES_128_GCM_SHA256, TlsVersion::V1_3),
        (suites::TLS13_AES_256_GCM_SHA384, TlsVersion::V1_3),
        (suites::TLS13_CHACHA20_POLY1305_SHA256, TlsVersion::V1_3),
        (
            suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            TlsVersion::V1_2,
        ),
    ] {
        let (mut server, mut client) = tls_pair(&files, files.client(Some(suite)));
        assert!(server.handshaking() && !server.encrypted());
        shake(&mut server, &mut client, &mut scratch);
        assert!(server.encrypted());
        assert_eq!(server.tls_version(), Some(version));
        for size in [1, 300, 16_384, 16_385, 70_000] {
            let text: Vec<u8> = (0..size).map(|n| n as u8).collect();
            client.tls.set_buffer_limit(None);
            client.say(&text);
            assert_eq!(read_all(&mut server, &mut scratch), text);
            client.got.clear();
            server.write(&text, &mut scratch).unwrap();
            client.receive();
            while !server.flush().unwrap() {
                client.receive();
            }
            client.receive();
            assert_eq!(client.got, text);
        }
    }
}

fn exporter(server: &Transport) -> Option<[u8; 32]> {
    let exporter = server.channel_bindings().exporter?;
    Some(exporter.binding())
}

#[test]
fn channel_bindings_are_those_of_the_client() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    for suite in [
        suites::TLS13_AES_128_GCM_SHA256,
        suites::TLS13_AES_256_GCM_SHA384,
        suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ] {
        let (mut server, mut client) = tls_pair(&files, files.client(Some(suite)));
        shake(&mut server, &mut client, &mut scratch);
        let theirs = client
            .tls
            .export_keying_material([0u8; 32], b"EXPORTER-Channel-Binding", Some(b""))
            .unwrap();
        let ours = server.channel_bindings();
        assert_eq!(exporter(&server), suite.tls13().map(|_| theirs));
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &files.leaf());
        assert_eq!(ours.end_point.as_deref(), Some(hash.as_ref()));
    }
    let unencrypted = pair().0;
    assert_eq!(exporter(&unencrypted), None);
    assert_eq!(unencrypted.channel_bindings().end_point, None);
}

#[test]
fn every_connection_has_its_own_exporter_also_when_handshakes_interleave() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let mut all: Vec<_> = (0..3)
        .map(|_| tls_pair(&files, files.client(None)))
        .collect();
    for _ in 0..3 {
        for (server, client) in &mut all {
            client.send();
            let _ = server.read(&mut scratch).unwrap();
            client.receive();
        }
    }
    for (server, client) in &all {
        let theirs = client
            .tls
            .export_keying_material([0u8; 32], b"EXPORTER-Channel-Binding", Some(b""))
            .unwrap();
        assert_eq!(exporter(server), Some(theirs));
    }
}

#[test]
fn a_client_may_send_byte_by_byte_in_tiny_records() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let mut config = files.client(None);
    config.max_fragment_size = Some(32);
    let (mut server, mut client) = tls_pair(&files, config);
    let mut text = Vec::new();
    let mut said = false;
    while text.len() < 100 {
        if !client.tls.is_handshaking() && !said {
            client.tls.writer().write_all(&[b'x'; 100]).unwrap();
            said = true;
        }
        for byte in client.take() {
            client.stream.write_all(&[byte]).unwrap();
            text.extend(read_all(&mut server, &mut scratch));
            if server.encrypted() {
                // Writing in the middle of a record that comes in disturbs nothing.
                server.write(b".", &mut scratch).unwrap();
            }
        }
        client.receive();
    }
    assert_eq!(text, [b'x'; 100]);
    client.receive();
    assert!(client.got.len() > 100 && client.got.iter().all(|b| *b == b'.'));
}

#[test]
fn what_follows_starttls_in_the_same_read_is_the_handshake() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let (mut server, stream) = pair();
    let mut client = Client::new(files.client(None), stream);
    let mut together = b"<starttls/>".to_vec();
    together.extend(client.take());
    client.stream.write_all(&together).unwrap();
    let Read::Data { bytes, more: false } = server.read(&mut scratch).unwrap() else {
        panic!()
    };
    let leftover = bytes[b"<starttls/>".len()..].to_vec();
    server.start_tls(&files.server(), &leftover).unwrap();
    shake(&mut server, &mut client, &mut scratch);
    // The client's last flight and its first stanza may come in one segment, too.
    client.say(b"<stream>");
    assert_eq!(read_all(&mut server, &mut scratch), b"<stream>");
}

#[test]
fn data_that_comes_with_the_end_of_the_handshake_is_not_lost() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let (mut server, mut client) = tls_pair(&files, files.client(None));
    client.send();
    assert_eq!(server.read(&mut scratch).unwrap(), Read::WouldBlock);
    client.receive();
    client.say(b"<stream>");
    let read = server.read(&mut scratch).unwrap();
    let (bytes, more) = (&b"<stream>"[..], false);
    assert_eq!(read, Read::Data { bytes, more });
    assert!(!server.handshaking());
    // the ticket goes with the answer, in one packet
    let nothing = client.stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    server.write(b"<features/>", &mut scratch).unwrap();
    client.receive();
    assert_eq!(client.got, b"<features/>");
    assert_eq!(client.tls.tls13_tickets_received(), 1);
    // also when there is none
    client.tls.refresh_traffic_keys().unwrap();
    client.say(b"</stream>");
    assert_eq!(read_all(&mut server, &mut scratch), b"</stream>");
    server.finish(&[], &mut scratch).unwrap();
    server.socket().shutdown().unwrap();
    client.receive();
    assert!(client.closed);
}

#[test]
fn a_slow_reader_gets_everything_in_order() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let (mut server, mut client) = tls_pair(&files, files.client(None));
    shake(&mut server, &mut client, &mut scratch);
    let mut sent = Vec::new();
    while server.pending() < 4 << 20 {
        let line: Vec<u8> = (0..100_000u32)
            .map(|n| (n + sent.len() as u32) as u8)
            .collect();
        server.write(&line, &mut scratch).unwrap();
        sent.extend(line);
    }
    assert!(server.socket().unsent().unwrap() > 0);
    while !server.flush().unwrap() {
        client.receive();
    }
    client.receive();
    assert_eq!(server.pending(), 0);
    assert!(client.got == sent, "not what was sent");
    // And the same without TLS.
    let (mut server, mut client) = pair();
    let text = vec![b'y'; 1_000_000];
    server.write(&text, &mut scratch).unwrap();
    assert!(server.pending() > 0);
    client.set_nonblocking(true).unwrap();
    let mut got = Vec::new();
    while !server.flush().unwrap() {
        let _ = client.read_to_end(&mut got);
    }
    let _ = client.read_to_end(&mut got);
    assert!(got == text);
}

#[test]
fn a_transport_moves_to_another_core_in_the_middle_of_a_record() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let (mut server, mut client) = tls_pair(&files, files.client(None));
    shake(&mut server, &mut client, &mut scratch);
    client.tls.writer().write_all(b"<auth/>").unwrap();
    let first = client.take();
    client.tls.writer().write_all(b"<iq/>").unwrap();
    let second = client.take();
    client.stream.write_all(&first).unwrap();
    client.stream.write_all(&second[..9]).unwrap();
    assert_eq!(read_all(&mut server, &mut scratch), b"<auth/>");
    server.write(b"<success/>", &mut scratch).unwrap();
    let core = std::thread::spawn(move || {
        let mut scratch = Scratch::new();
        assert_eq!(server.read(&mut scratch).unwrap(), Read::WouldBlock);
        client.stream.write_all(&second[9..]).unwrap();
        assert_eq!(read_all(&mut server, &mut scratch), b"<iq/>");
        server.write(b"<iq type='result'/>", &mut scratch).unwrap();
        client.receive();
        assert_eq!(client.got, b"<success/><iq type='result'/>");
    });
    core.join().unwrap();
}

#[test]
fn tickets_resume_and_keys_may_change() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let server_config = files.server();
    let config = files.client(None);
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (mut server, stream) = pair();
        server.start_tls(&server_config, b"").unwrap();
        let mut client = Client::new(config.clone(), stream);
        shake(&mut server, &mut client, &mut scratch);
        assert_eq!(client.tls.handshake_kind(), Some(kind));
        let theirs = client
            .tls
            .export_keying_material([0u8; 32], b"EXPORTER-Channel-Binding", Some(b""))
            .unwrap();
        assert_eq!(exporter(&server), Some(theirs));
        client.tls.refresh_traffic_keys().unwrap();
        client.say(b"new keys");
        assert_eq!(read_all(&mut server, &mut scratch), b"new keys");
        server.write(b"ours too", &mut scratch).unwrap();
        client.receive();
        assert_eq!(client.got, b"ours too");
    }
}

#[test]
fn the_end_is_told_both_ways_after_all_that_was_said() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let (mut server, mut client) = tls_pair(&files, files.client(None));
    shake(&mut server, &mut client, &mut scratch);
    client.tls.writer().write_all(b"</stream>").unwrap();
    client.tls.send_close_notify();
    client.send();
    let (bytes, more) = (&b"</stream>"[..], true);
    assert_eq!(
        server.read(&mut scratch).unwrap(),
        Read::Data { bytes, more }
    );
    assert_eq!(server.read(&mut scratch).unwrap(), Read::Eof);
    assert_eq!(server.read(&mut scratch).unwrap(), Read::Eof);
    assert!(server.finish(b"bye", &mut scratch).unwrap());
    assert!(server.write(b"too late", &mut scratch).is_err());
    server.socket().shutdown().unwrap();
    client.receive();
    assert_eq!(client.got, b"bye");
    assert!(client.closed);
    // Without TLS the end of the stream says it.
    let (mut server, mut client) = pair();
    client.write_all(b"x").unwrap();
    drop(client);
    assert_eq!(read_all(&mut server, &mut scratch), b"x");
    assert_eq!(server.read(&mut scratch).unwrap(), Read::Eof);
    server.finish(&[], &mut scratch).unwrap();
    assert_eq!(
        server.write(b"x", &mut scratch).unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

#[test]
fn last_words_to_who_has_closed_his_websocket_count_as_not_said() {
    let mut scratch = Scratch::new();
    for closes in [false, true] {
        let (mut server, mut client) = pair();
        let limits = WebSocketLimits {
            message_bytes_max: 1000,
            fragments_max: 10,
        };
        server.start_websocket(limits, Vec::new());
        let header = b"<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";
        server.write(header, &mut scratch).unwrap();
        // RFC 6455 5.2: close, masked with zeros, status 1000
        let close = [0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8];
        client
            .write_all(&close[..if closes { 8 } else { 0 }])
            .unwrap();
        let _ = server.read(&mut scratch);
        let said = server.finish(b"<message xmlns='jabber:client'/>", &mut scratch);
        assert_eq!(said.unwrap(), !closes);
        server.socket().shutdown().unwrap();
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        let got = String::from_utf8_lossy(&got);
        assert_eq!(got.contains("<message"), !closes);
    }
}

#[test]
fn rubbish_is_answered_by_an_alert_and_harms_nothing() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let mut config = files.client(None);
    config.max_fragment_size = Some(64);
    let hello = Client::new(config, UnixStream::pair().unwrap().0).take();
    let record = 5 + usize::from(u16::from_be_bytes([hello[3], hello[4]]));
    let stanza = b"<iq type='get' id='1' to='localhost'/>";
    let cases: [Vec<u8>; 5] = [
        stanza.to_vec(),
        // A handshake message that began and goes on as something else.
        [&hello[..record], stanza].concat(),
        [&hello[..record], b"\x15\x03\x03\x00\x02\x02\x28"].concat(),
        [&hello[..record], b"\x17\x03\x03\x00\x05abcde"].concat(),
        b"\x16\x03\x01\xff\xff".to_vec(),
    ];
    for bytes in cases {
        let (mut server, mut client) = pair();
        server.start_tls(&files.server(), b"").unwrap();
        client.write_all(&bytes).unwrap();
        let error = server.read(&mut scratch).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert!(server.write(b"x", &mut scratch).is_err());
        assert!(server.read(&mut scratch).is_err());
        client.set_nonblocking(true).unwrap();
        let mut answer = [0; 64];
        if let Ok(told) = client.read(&mut answer) {
            assert_eq!(answer[0], 0x15, "an alert of {told} bytes");
        }
    }
}

#[test]
fn changed_bytes_anywhere_in_a_handshake_do_no_harm() {
    let files = Files::new();
    let server_config = files.server();
    let mut scratch = Scratch::new();
    let mut config = files.client(Some(suites::TLS13_AES_128_GCM_SHA256));
    config.max_fragment_size = Some(80);
    for at in (0..1400).step_by(7) {
        let (mut server, stream) = pair();
        server.start_tls(&server_config, b"").unwrap();
        let mut client = Client::new(config.clone(), stream);
        let mut wire = client.take();
        let at = at % wire.len();
        wire[at] ^= 0x41;
        client.stream.write_all(&wire[..at]).unwrap();
        let early = server.read(&mut scratch).map(drop);
        client.stream.write_all(&wire[at..]).unwrap();
        let late = early.and_then(|()| server.read(&mut scratch).map(drop));
        if late.is_err() {
            assert!(server.write(b"x", &mut scratch).is_err());
            assert!(server.finish(&[], &mut scratch).is_ok() || !server.handshaking());
        }
    }
}

#[test]
fn an_endless_handshake_message_is_refused() {
    let files = Files::new();
    let mut scratch = Scratch::new();
    let (mut server, mut client) = pair();
    server.start_tls(&files.server(), b"").unwrap();
    client.set_nonblocking(true).unwrap();
    // A ClientHello that claims 16 MiB, in full records.
    let mut record = vec![0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
    record.resize(5 + 0x4000, 0);
    let refused = (0..20).any(|_| {
        let _ = client.write(&record);
        server.read(&mut scratch).is_err()
    });
    assert!(refused);
}

#[test]
fn files_are_made_once_and_mistakes_are_told_in_words() {
    let files = Files::new();
    let mode = std::fs::metadata(files.key()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = generate_certificate("localhost", &files.certificate(), &files.key());
    assert!(again.unwrap_err().contains("key.pem"));
    let config = files.server();
    assert_eq!(config.fingerprint(), fingerprint(&files.leaf()));
    assert_eq!(config.fingerprint().len(), 32 * 3 - 1);
    let other = Files::new();
    let wrong = TlsConfig::load(&files.certificate(), &other.key(), false, None).err();
    assert!(wrong.unwrap().contains("cannot be used together"));
    let missing = TlsConfig::load(
        &files.folder.path().join("none.pem"),
        &files.key(),
        false,
        None,
    )
    .err();
    assert!(missing.unwrap().contains("tls.certificate"));
    let no_key = TlsConfig::load(&files.certificate(), &files.certificate(), false, None).err();
    assert!(no_key.unwrap().contains("contains no key"));
    let no_certificate = TlsConfig::load(&files.key(), &files.key(), false, None).err();
    assert!(no_certificate.unwrap().contains("no certificate"));
    let unicode = tempfile::tempdir().unwrap();
    let at = |name: &str| unicode.path().join(name);
    generate_certificate("bücher.example", &at("c"), &at("k")).unwrap();
    TlsConfig::load(&at("c"), &at("k"), false, None).unwrap();
}

#[test]
fn shards_share_a_port_and_a_second_process_is_refused() {
    let local = "127.0.0.1:0".parse().unwrap();
    let first = listen_shared(local, 16).unwrap();
    let address = first.address();
    let second = listen_shared(address, 16).unwrap();
    let refused = probe_port(address).unwrap_err();
    assert!(refused.contains(&format!("port {} is in use", address.port())));
    assert!(first.accept().unwrap().is_none());
    let clients: Vec<_> = (0..20)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    let mut accepted = Vec::new();
    for listener in [&first, &second] {
        while let Some((socket, peer)) = listener.accept().unwrap() {
            assert_eq!(socket.peer(), peer);
            assert!(rustix::net::sockopt::tcp_nodelay(&socket).unwrap());
            accepted.push(peer);
        }
    }
    let mut connected: Vec<_> = clients.iter().map(|c| c.local_addr().unwrap()).collect();
    accepted.sort();
    connected.sort();
    assert_eq!(accepted, connected);
    drop((first, second));
    probe_port(address).unwrap();
    let nowhere = probe_port("203.0.113.1:5222".parse().unwrap()).unwrap_err();
    assert!(nowhere.contains("not an address of this machine"));
}

#[test]
fn the_same_port_can_be_had_for_both_address_families() {
    let v6 = listen_shared("[::]:0".parse().unwrap(), 16).unwrap();
    let port = v6.address().port();
    let v4 = listen_shared(
        (
            "0.0.0.0:0".parse::<std::net::SocketAddr>().unwrap().ip(),
            port,
        )
            .into(),
        16,
    )
    .unwrap();
    let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (_socket, peer) = v4.accept().unwrap().unwrap();
    assert_eq!(peer, client.local_addr().unwrap());
    assert!(v6.accept().unwrap().is_none());
}

#[test]
fn a_socket_tells_what_the_peer_has_not_taken() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut socket = Socket::try_from(listener.accept().unwrap().0).unwrap();
    let mut buffer = [0; 8];
    let nothing = socket.recv(&mut buffer).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    assert_eq!(socket.send(b"abc").unwrap(), 3);
    socket.shutdown().unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"abc");
    socket.set_peer("[::ffff:192.0.2.7]:5".parse().unwrap());
    assert_eq!(
        socket.peer(),
        "192.0.2.7:5".parse::<std::net::SocketAddr>().unwrap()
    );
}

/// Runs one ignored test of this binary in a process of its own, because it changes the process.
fn in_a_process_of_its_own(test: &str) {
    let run = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored"])
        .output()
        .unwrap();
    assert!(
        run.status.success() && String::from_utf8_lossy(&run.stdout).contains("1 passed"),
        "{}",
        String::from_utf8_lossy(&run.stdout)
    );
}

#[test]
fn running_out_of_descriptors_neither_spins_nor_kills() {
    in_a_process_of_its_own("net::tests::accepts_without_descriptors");
}

#[test]
#[ignore = "lowers the limit of open files; run by the test above"]
fn accepts_without_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let listener = listen_shared("127.0.0.1:0".parse().unwrap(), 16).unwrap();
    let mut clients: Vec<_> = (0..3)
        .map(|_| TcpStream::connect(listener.address()).unwrap())
        .collect();
    let before = getrlimit(Resource::Nofile);
    let next = std::os::fd::AsRawFd::as_raw_fd(&std::fs::File::open("/dev/null").unwrap());
    let none_left = Rlimit {
        current: Some(next as u64),
        maximum: before.maximum,
    };
    setrlimit(Resource::Nofile, none_left).unwrap();
    for turned_away in 1..3 {
        let error = listener.accept().err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
        assert_eq!(listener::REFUSED_NO_DESCRIPTOR.get(), turned_away);
    }
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(listener.accept().unwrap().is_some());
    assert!(listener.accept().unwrap().is_none());
    // The two that were turned away know it, the third is served.
    for client in &mut clients[..2] {
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
#[ignore = "a measurement: cargo test --release --lib idle_tls_memory -- --ignored --nocapture"]
fn idle_tls_memory() {
    let files = Files::new();
    let suite = Some(suites::TLS13_AES_256_GCM_SHA384);
    let (server, client) = (files.server(), files.client(suite));
    measure_idle_tls("no client certificate", &server, &client);
    // the server's own stands for a client's: it is its own authority
    let clients = ClientAuthority::load(&files.certificate(), &[]).unwrap();
    let server = TlsConfig::load(&files.certificate(), &files.key(), false, Some(clients)).unwrap();
    measure_idle_tls("asked for a certificate, has none", &server, &client);
    let mut certified = files.client(suite);
    certified.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(files.certified_key()));
    measure_idle_tls("certificate of one authority", &server, &certified);
}

fn measure_idle_tls(what: &str, server_config: &TlsConfig, config: &ClientConfig) {
    let mut scratch = Scratch::new();
    let resident = || {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = pages.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    };
    let mut servers = Vec::new();
    let mut at = Vec::new();
    let mut handshakes = std::time::Duration::ZERO;
    let mut verified = std::time::Duration::ZERO;
    while servers.len() < 4000 {
        let (mut server, stream) = pair();
        server.start_tls(server_config, b"").unwrap();
        let mut client = Client::new(config.clone(), stream);
        while server.handshaking() || client.tls.is_handshaking() {
            client.send();
            let begun = std::time::Instant::now();
            let _ = server.read(&mut scratch).unwrap();
            handshakes += begun.elapsed();
            client.receive();
        }
        let begun = std::time::Instant::now();
        let names = server.client_names();
        verified += begun.elapsed();
        assert!(names.is_none_or(|names| names.is_ok()));
        client.say(b"<stream>");
        assert_eq!(read_all(&mut server, &mut scratch), b"<stream>");
        servers.push(server);
        if servers.len() % 1000 == 0 {
            at.push(resident());
        }
    }
    println!(
        "{what}: {} bytes resident per idle TLS transport, {:?} per handshake, {:?} for names",
        (at[3] - at[0]) / 3000,
        handshakes / 4000,
        verified / 4000
    );
    println!("of them Transport: {}", size_of::<Transport>());
    // what they gave back would be found by the next measurement
    std::mem::forget(servers);
}
