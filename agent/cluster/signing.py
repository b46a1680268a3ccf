"""The keys behind seals: this node's record key, and the others' out of their certificates.

A record key (Ed25519, RFC 8032) is a node's for its whole life and stands in each of its
certificates, so a seal outlives the certificate that was in use when it was made, and the CA too:
whether a certificate is still valid is of no matter here, only that a CA of the cluster, present
or retired, once gave that node that key.

What stands opposite: core/seals.py says what is signed; trust.py holds this node's own.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from agent.cluster.trust import Keyring, check_issued, read_bearer
from agent.core.seals import Sealer
from agent.errors import Invalid
from agent.node import NodeState

VOID_MAX = 1000  # certificates that showed no key and need not be read again; a peer chooses them


class RecordKeys:
    """agent/core/seals.py: Keys. `certificate_of` gives the certificate (DER) in a node's own
    record; empty if there is none."""

    def __init__(self, keyring: Keyring, certificate_of: Callable[[str], bytes]) -> None:
        self._keyring = keyring
        self._certificate_of = certificate_of
        self._signer: tuple[bytes, Ed25519PrivateKey] | None = None
        self._known: dict[str, tuple[bytes, Ed25519PublicKey]] = {}  # with the certificate
        self._void: dict[str, tuple[bytes, int]] = {}  # node -> what showed no key, and under
        # which generation of the keyring: with another CA it may

    def sign(self, message: bytes) -> bytes:
        """This node's signature: 64 bytes, in 35 µs."""
        secret = self._keyring.current.record_key
        if self._signer is None or self._signer[0] != secret:
            self._signer = secret, Ed25519PrivateKey.from_private_bytes(secret)
        return self._signer[1].sign(message)

    def verify(self, origin: str, message: bytes, signature: bytes) -> bool:
        """Whether `origin` signed it; in 106 µs."""
        if not self.knows(origin):
            return False
        try:
            self._known[origin][1].verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def knows(self, origin: str) -> bool:
        """Whether a certificate of `origin` was seen: one shown, or that in its record."""
        if origin not in self._known:
            self.meet(origin, self._certificate_of(origin))
        return origin in self._known

    def certificate(self, origin: str) -> bytes:
        """What shows the key of `origin`, DER; empty if nothing is known."""
        return self._known[origin][0] if self.knows(origin) else b""

    def meet(self, origin: str, certificate: bytes) -> None:
        """Take the key of `origin` from a certificate, if it is one of this cluster. The first
        key stays: a node has one for life."""
        generation = self._keyring.generation
        if not certificate or origin in self._known:
            return
        if self._void.get(origin) == (certificate, generation):
            return
        try:
            self._known[origin] = certificate, self._read(origin, certificate)
            self._void.pop(origin, None)
        except (Invalid, ValueError):
            if len(self._void) >= VOID_MAX:
                self._void.clear()
            self._void[origin] = certificate, generation

    def _read(self, origin: str, der: bytes) -> Ed25519PublicKey:
        held = self._keyring.current
        certificate = x509.load_der_x509_certificate(der)
        bearer = read_bearer(certificate)
        if (bearer.cluster, bearer.node) != (held.cluster, origin) or not bearer.record_key:
            raise Invalid("certificate", "is of another node, or has no record key", "")
        check_issued(certificate, [*held.authorities, *held.retired])
        return Ed25519PublicKey.from_public_bytes(bearer.record_key)


def seal_records(node: NodeState, keyring: Keyring) -> None:
    """From now on a node seals its records and takes others' only with their seals. To be called
    before anything is restored or merged."""

    def certificate_of(origin: str) -> bytes:
        known = node.nodes.get(origin)
        return known.certificate if known else b""

    keys = RecordKeys(keyring, certificate_of)
    node.replica.sealer = Sealer(keyring.current.cluster, keys)
