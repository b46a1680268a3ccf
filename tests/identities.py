"""Authorities of the tests' own: a CA in memory, certificates of any kind, keyrings of nodes.

As agent/cluster/identity makes them, but any thing about them can be wrong: expired, of no node,
of another cluster.
"""

from __future__ import annotations

import datetime
import secrets
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.cluster.trust import RECORD_KEY, Credentials, Keyring, member_name, node_name

CLUSTER = "c" * 16
DAY = 86400.0  # s
_PEM = serialization.Encoding.PEM


class Authority:
    """A cluster's CA."""

    def __init__(self, cluster: str = CLUSTER) -> None:
        self.cluster = cluster
        self.key = ec.generate_private_key(ec.SECP256R1())
        # Two of one cluster differ in their names: by that OpenSSL finds who issued what.
        text = f"vxmesh {cluster} {secrets.token_hex(4)}"
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(_PEM)

    def credentials(
        self,
        node: str,
        begins: float = -60.0,
        ends: float = DAY,
        names: list[str] | None = None,
        authorities: tuple[bytes, ...] = (),
    ) -> Credentials:
        """A node's. `begins` and `ends` are in seconds from now; `names` are those in the
        certificate, instead of the proper ones."""
        key = ec.generate_private_key(ec.SECP256R1())
        record = ed25519.Ed25519PrivateKey.generate()
        if names is None:
            names = [node_name(self.cluster, node), member_name(self.cluster)]
        uri = RECORD_KEY + record.public_key().public_bytes_raw().hex()
        shown: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        now = datetime.datetime.now(datetime.UTC)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(seconds=begins))
            .not_valid_after(now + datetime.timedelta(seconds=ends))
            .add_extension(
                x509.SubjectAlternativeName([*shown, x509.UniformResourceIdentifier(uri)]), False
            )
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        private = key.private_bytes(
            _PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Credentials(
            self.cluster,
            node,
            certificate.public_bytes(_PEM),
            private,
            authorities or (self.pem,),
            record.private_bytes_raw(),
        )

    def keyring(self, node: str) -> Keyring:
        """What a proper member of the cluster holds."""
        return Keyring(self.credentials(node))


@cache
def authority() -> Authority:
    """One for all tests that need no other."""
    return Authority()
