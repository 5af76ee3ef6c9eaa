"""Certificates of clients: an authority, and what it signs for an XMPP address (RFC 6120, 13.7.1.4)."""

import datetime
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

XMPP_ADDR = x509.ObjectIdentifier("1.3.6.1.5.5.7.8.5")


class Authority:
    """Writes into `folder`; `path` is its own certificate."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "clients")])
        basic = x509.BasicConstraints(ca=True, path_length=0)
        certificate = self.sign(self.name, self.key, basic, critical=True)
        self.path = self.folder / "authority.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, jid):
        """Paths of a certificate for this address and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        value = jid.encode()
        address = x509.OtherName(XMPP_ADDR, bytes([0x0C, len(value)]) + value)  # DER of a UTF8String
        certificate = self.sign(x509.Name([]), key, x509.SubjectAlternativeName([address]), critical=True)
        paths = self.folder / f"{jid}.pem", self.folder / f"{jid}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        return paths

    def sign(self, subject, key, extension, critical):
        now = datetime.datetime.utcnow()
        day = datetime.timedelta(days=1)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
        return builder.add_extension(extension, critical=critical).sign(self.key, hashes.SHA256())
