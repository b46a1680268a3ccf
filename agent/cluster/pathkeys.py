"""Keys that two nodes share, out of the certificates that they have anyway.

Each knows the other's certificate from its record; the key is the Diffie-Hellman secret of the
two certificates' keys (ECDH on P-256, then HKDF: NIST SP 800-56A, RFC 5869). So nothing is
exchanged, nothing has to be kept, and with a certificate that is renewed the key is another one.
What stands opposite: pathprober.py; signing.py, which finds record keys in the same certificates.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from agent.cluster.trust import Keyring, check_issued, read_bearer
from agent.errors import Invalid
from agent.unreadable import UNREADABLE

LENGTH = 32  # bytes
PURPOSE = b"vxmesh path probe"


class PairKeys:
    """This node's keys with the others. `certificate_of` gives the certificate (DER) in a node's
    own record; empty if there is none."""

    def __init__(self, keyring: Keyring, certificate_of: Callable[[str], bytes]) -> None:
        self._keyring, self._certificate_of = keyring, certificate_of
        # Node -> its certificate, the keyring's generation, and the key; None: there can be none.
        self._held: dict[str, tuple[bytes, int, bytes | None]] = {}
        self._own: tuple[int, ec.EllipticCurvePrivateKey] | None = None

    def key(self, node: str) -> bytes | None:
        """The key shared with a node; None if its certificate is none of this cluster's. In 0.3 ms
        after a change of certificates, else at once."""
        certificate, generation = self._certificate_of(node), self._keyring.generation
        held = self._held.get(node)
        if held is None or held[:2] != (certificate, generation):
            held = self._held[node] = certificate, generation, self._agree(node, certificate)
        return held[2]

    def forget(self, node: str) -> None:
        """That node is gone."""
        self._held.pop(node, None)

    def _agree(self, node: str, der: bytes) -> bytes | None:
        held = self._keyring.current
        try:
            certificate = x509.load_der_x509_certificate(der)
            bearer = read_bearer(certificate)
            check_issued(certificate, held.authorities)
            public = certificate.public_key()
            if (bearer.cluster, bearer.node) != (held.cluster, node):
                return None
            if not isinstance(public, ec.EllipticCurvePublicKey):
                return None
            secret = self._private().exchange(ec.ECDH(), public)
        except (Invalid, ValueError, *UNREADABLE):
            return None
        info = b"\0".join((PURPOSE, *sorted((held.node.encode(), node.encode()))))
        return HKDF(hashes.SHA256(), LENGTH, salt=held.cluster.encode(), info=info).derive(secret)

    def _private(self) -> ec.EllipticCurvePrivateKey:
        generation = self._keyring.generation
        if self._own is None or self._own[0] != generation:
            key = serialization.load_pem_private_key(self._keyring.current.key, None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise Invalid("certificate", "has a key of another kind", "")
            self._own = generation, key
        return self._own[1]
