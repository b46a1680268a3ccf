"""A request for a certificate: PKCS #10 (RFC 2986), and the proof of who asks.

The request is signed with the key that the certificate is to be for, and once more with the
record key (Ed25519): that one a node keeps for its whole life, so it says that a node which
asks again, even with no valid certificate left, is the one it was.
What stands opposite: enrol.py and renewal.py make them, desk.py judges.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from agent.cluster.identity.authority import new_key
from agent.errors import Invalid

REQUEST_MAX = 4096  # bytes; ours have some 250
_CONTEXT = b"vxmesh certificate request 1\0"


@dataclass(frozen=True, slots=True)
class Request:
    """A request, and the key that stays here."""

    key: ec.EllipticCurvePrivateKey
    request: bytes  # DER
    proof: bytes


def make(node: str, record_key: bytes) -> Request:
    """A request by `node` for a new key; `record_key` is the private one, 32 bytes."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    request = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    signer = ed25519.Ed25519PrivateKey.from_private_bytes(record_key)
    return Request(key, request, signer.sign(_signed(node, request)))


def check(node: str, record_key: bytes, request: bytes, proof: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a certificate is wanted for; Invalid unless who asks holds both keys.

    `record_key` is the public one.
    """
    if len(request) > REQUEST_MAX:
        raise Invalid("request", f"is too long: {len(request)} bytes")
    try:
        found = x509.load_der_x509_csr(request)
        whole = found.is_signature_valid
        key = found.public_key()
        verifier = ed25519.Ed25519PublicKey.from_public_bytes(record_key)
        verifier.verify(proof, _signed(node, request))
    except InvalidSignature:
        raise Invalid("request", "is not signed with the node's record key") from None
    except Exception as error:  # cryptography's parsers have many ways to say malformed
        raise Invalid("request", f"is malformed ({error})"[:200]) from None
    if not whole or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise Invalid("request", "is not for a P-256 key, or not signed with it")
    return key


def public_half(record_key: bytes) -> bytes:
    """The public half (32 bytes) of a private Ed25519 key (32 bytes)."""
    found = ed25519.Ed25519PrivateKey.from_private_bytes(record_key).public_key()
    return found.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _signed(node: str, request: bytes) -> bytes:
    return _CONTEXT + node.encode() + b"\0" + request
