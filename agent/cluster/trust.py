"""What this node shows its peers, and whom it believes: certificate, key and the cluster's CAs.

A certificate names its node by DNS names that lead nowhere (RFC 5280, subjectAltName), so that a
dialler checks by TLS's own means that it has the node it wants: `node_name` for just that one,
`member_name` for any of the cluster. The key with which a node signs its records (Ed25519, one
for the node's whole life, as record signatures outlive certificates) is a URI beside them.

Nothing here reads or writes a disk or the network. What stands opposite: identity.py makes and
keeps what is held here; front.py and channels.py put it before connections.
"""

from __future__ import annotations

import datetime
import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from agent.errors import Invalid
from agent.unreadable import UNREADABLE

DOMAIN = "vxmesh.internal"
RECORD_KEY = "vxmesh:record-key:"  # followed by 64 hex digits
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which the ssl module has no name for.
_NO_CHECK_TIME = 0x200000


@dataclass(frozen=True, slots=True)
class Credentials:
    """One state of a node's identity. Certificates and the key are PEM."""

    cluster: str
    node: str
    certificate: bytes
    key: bytes  # P-256, new with each certificate
    authorities: tuple[bytes, ...]  # who is believed now; two while the CA is being changed
    record_key: bytes  # Ed25519, 32 bytes, private
    retired: tuple[bytes, ...] = ()  # earlier CAs: only for signatures of records by their nodes

    @property
    def not_after(self) -> float:
        """When the certificate ends, in seconds since the epoch."""
        found = x509.load_pem_x509_certificate(self.certificate)
        return found.not_valid_after_utc.timestamp()

    @property
    def life(self) -> float:
        """How long the certificate holds in all, in s."""
        found = x509.load_pem_x509_certificate(self.certificate)
        return (found.not_valid_after_utc - found.not_valid_before_utc).total_seconds()


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whom a certificate names."""

    cluster: str
    node: str
    record_key: bytes  # Ed25519, 32 bytes, public; empty if it has none


def node_name(cluster: str, node: str) -> str:
    """The DNS name in the certificate of just this node."""
    return f"{node}.node.{cluster}.{DOMAIN}"


def member_name(cluster: str) -> str:
    """The DNS name in every certificate of a cluster."""
    return f"member.{cluster}.{DOMAIN}"


def read_bearer(certificate: x509.Certificate) -> Bearer:
    """Whom a certificate names; Invalid if it names no node. Who signed it is not looked at."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except UNREADABLE:
        raise Invalid("certificate", "names no node", "") from None
    found = ("", "")
    for name in names.get_values_for_type(x509.DNSName):
        node, _, rest = name.partition(".node.")
        cluster, _, domain = rest.partition(".")
        if node and cluster and domain == DOMAIN:
            found = cluster, node
    key = b""
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        if uri.startswith(RECORD_KEY) and len(uri) == len(RECORD_KEY) + 64:
            try:
                key = bytes.fromhex(uri[len(RECORD_KEY) :])
            except ValueError:
                key = b""
            if len(key) != 32:  # blanks among the digits are passed over
                raise Invalid("certificate", "has a malformed record key", "")
    if not found[1]:
        raise Invalid("certificate", "names no node", "")
    return Bearer(*found, key)


def check_issued(certificate: x509.Certificate, authorities: Sequence[bytes]) -> None:
    """Invalid unless one of `authorities` (PEM) signed it. When it is valid is not looked at."""
    for pem in authorities:
        try:
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(pem))
        except (InvalidSignature, *UNREADABLE):
            continue
        return
    raise Invalid("certificate", "is of another cluster, or of a CA that is void", "")


def is_within(certificate: x509.Certificate, now: float) -> bool:
    """Whether a certificate (a node's or a CA's) is valid at `now`, in s since the epoch."""
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc


class Keyring:
    """The credentials that hold now. `on_change` is told after each change of them."""

    def __init__(self, credentials: Credentials) -> None:
        self.current = credentials
        self.generation = 0  # a channel or context made under another one is of yesterday
        self.on_change: list[Callable[[], None]] = []
        self._server: ssl.SSLContext | None = None
        self._client: grpc.ChannelCredentials | None = None

    def replace(self, credentials: Credentials) -> None:
        """Take new ones; a stream that stands goes on, whatever is made from now on uses them."""
        if credentials == self.current:
            return
        self.current = credentials
        self.generation += 1
        self._server = self._client = None
        for told in list(self.on_change):
            told()

    def server_context(self) -> ssl.SSLContext:
        """For who takes connections: TLS 1.3, HTTP/2, and a client's certificate must be of the
        cluster. One that has none gets through, and so does one whose time is over or has not
        come, for the caller to judge: who sees whose it is can tell so, and tell its bearer.
        """
        if self._server is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0  # a resumed session would skip the check of the certificate
            context.set_alpn_protocols(["h2"])
            context.verify_mode = ssl.CERT_OPTIONAL
            context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
            context.load_verify_locations(cadata=b"".join(self.current.authorities).decode())
            _load(context, self.current)
            self._server = context
        return self._server

    def control_context(self) -> ssl.SSLContext:
        """For who takes connections of users: TLS 1.3, HTTP/2, and only for those with a
        certificate of the cluster; whether it is a user's is for the caller to judge."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # a resumed session would skip the check of the certificate
        context.set_alpn_protocols(["h2"])
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=b"".join(self.current.authorities).decode())
        _load(context, self.current)
        return context

    def channel(
        self, target: str, node: str, options: Sequence[tuple[str, Any]]
    ) -> grpc.aio.Channel:
        """A channel to host:port that comes to stand only if `node` (its id; empty: any node of
        the cluster) answers there."""
        held = self.current
        if self._client is None:
            self._client = grpc.ssl_channel_credentials(
                b"".join(held.authorities), held.key, held.certificate
            )
        name = node_name(held.cluster, node) if node else member_name(held.cluster)
        named = ("grpc.ssl_target_name_override", name)
        return grpc.aio.secure_channel(target, self._client, [*options, named])


def _load(context: ssl.SSLContext, credentials: Credentials) -> None:
    # The ssl module takes a key from a file only; this one is in memory and nobody else's.
    descriptor = os.memfd_create("vxmesh-identity", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, credentials.certificate + credentials.key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
