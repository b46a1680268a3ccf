"""The cluster's CA: how it is made, and the certificates that are issued with it (RFC 5280).

P-256 for all keys of TLS. A certificate is good for both ends of a connection, as every node is
both, and names its node and that node's record key (trust.py says how). Nothing here reads a
clock, a disk or the network. What stands opposite: desk.py decides whom to issue one to.
"""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import math
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.cluster import trust
from agent.errors import Invalid
from agent.unreadable import UNREADABLE

AUTHORITY_LIFE = 10 * 365 * 86_400.0  # s; who wants another one sooner has rotate-ca
BACKDATED = 300.0  # s that the receiver's clock may be behind ours ...
BACKDATED_SHARE = 1 / 20  # ... or this share of a short life, so that its two thirds stay that
FINGERPRINT_BYTES = 20  # of SHA-256: 160 bits, 32 letters


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA whose key this node has."""

    certificate: bytes  # DER
    key: ec.EllipticCurvePrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def make_authority(cluster: str, now: float) -> Authority:
    """A new CA for `cluster` (its id); `now` in seconds since the epoch."""
    key = new_key()
    serial = x509.random_serial_number()
    # Two CAs of one cluster have different names, so that which one issued is never in doubt.
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"vxmesh {cluster}"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"vxmesh CA {serial:x}"[:40]),
        ]
    )
    usage = _usage(digital_signature=True, key_cert_sign=True, crl_sign=True)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(_moment(math.floor(now - BACKDATED)))
        .not_valid_after(_moment(math.ceil(now + AUTHORITY_LIFE)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(made.public_bytes(serialization.Encoding.DER), key)


def issue(
    authority: Authority,
    cluster: str,
    node: str,
    record_key: bytes,
    public_key: ec.EllipticCurvePublicKey,
    now: float,
    life: float,
) -> bytes:
    """A certificate (DER) for a node that holds `public_key`'s key, for `life` s from `now` on.

    `record_key` is the public one, 32 bytes. It never outlives the CA's own certificate.
    """
    ca = x509.load_der_x509_certificate(authority.certificate)
    names = x509.SubjectAlternativeName(
        [
            x509.DNSName(trust.node_name(cluster, node)),
            x509.DNSName(trust.member_name(cluster)),
            x509.UniformResourceIdentifier(trust.RECORD_KEY + record_key.hex()),
        ]
    )
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    end = min(_moment(math.ceil(now + life)), ca.not_valid_after_utc)
    begin = max(_moment(math.floor(now - backdated(life))), ca.not_valid_before_utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]))
        .issuer_name(ca.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(names, critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.DER)


def backdated(life: float) -> float:
    """How long before now a certificate with that life begins, in s."""
    return min(BACKDATED, life * BACKDATED_SHARE)


def fingerprint(certificate: bytes) -> str:
    """What a person can compare: 160 bits of SHA-256 of a certificate (DER), as 32 letters."""
    digest = hashlib.sha256(certificate).digest()[:FINGERPRINT_BYTES]
    return base64.b32encode(digest).decode().lower()


@functools.lru_cache(maxsize=4096)
def issuer_of(certificate: bytes, authorities: tuple[bytes, ...]) -> bytes | None:
    """Which of `authorities` signed a certificate (all DER); None if none did."""
    try:
        found = x509.load_der_x509_certificate(certificate)
    except UNREADABLE:
        return None
    for der in authorities:
        try:
            found.verify_directly_issued_by(x509.load_der_x509_certificate(der))
        except (InvalidSignature, *UNREADABLE):
            continue
        return der
    return None


def public_key_of(certificate: bytes) -> ec.EllipticCurvePublicKey:
    """The key in a certificate (DER); Invalid if it is no P-256 key."""
    try:
        found = x509.load_der_x509_certificate(certificate).public_key()
    except UNREADABLE:
        raise Invalid("certificate", "is malformed") from None
    if not isinstance(found, ec.EllipticCurvePublicKey) or found.curve.name != "secp256r1":
        raise Invalid("certificate", "is not for a P-256 key")
    return found


def belongs(key: ec.EllipticCurvePrivateKey, certificate: bytes) -> bool:
    """Whether a certificate (DER) is for that key."""
    try:
        return public_key_of(certificate) == key.public_key()
    except Invalid:
        return False


def ends(certificate: bytes) -> float:
    """When a certificate (DER) ends, in seconds since the epoch."""
    return x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp()


def begins(certificate: bytes) -> float:
    """When a certificate (DER) begins to be valid, in seconds since the epoch."""
    return x509.load_der_x509_certificate(certificate).not_valid_before_utc.timestamp()


def to_pem(certificate: bytes) -> bytes:
    """PEM of a certificate in DER."""
    found = x509.load_der_x509_certificate(certificate)
    return found.public_bytes(serialization.Encoding.PEM)


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _usage(**given: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: given.get(name, False) for name in names})
