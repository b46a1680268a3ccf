"""Certificates for users of the control port, issued by a node that keeps the CA's key.

Only by the node that is asked, on its own socket: were the request passed on to a keeper, any
node that is broken into could have itself the right to change all others.
What stands opposite: agent/users.py says what is in one; cli/user.py makes the key, which never
leaves the machine of who asked.
"""

from __future__ import annotations

import datetime
import math
from typing import Protocol

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.cluster.identity import authority as ca
from agent.cluster.identity.authority import Authority, backdated
from agent.cluster.identity.requests import REQUEST_MAX
from agent.errors import Invalid, Unavailable
from agent.model import Trust
from agent.node import NodeState
from agent.notation import parse_name
from agent.rpc import control_pb2 as pb
from agent.users import User

log = structlog.get_logger()

USER_LIFE = 90 * 86_400.0  # s; there is no other way to void one than to replace the CA

_SIGNATURE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


class Held(Protocol):
    """A node's identity, as identity/files.py holds it."""

    @property
    def cluster(self) -> str: ...

    @property
    def trust(self) -> Trust: ...

    @property
    def issuing(self) -> Authority | None: ...


class Holder(Protocol):
    """Who has this node's identity (service.py)."""

    @property
    def held(self) -> Held: ...

    def now(self) -> float: ...


class Users:
    """Issues to users."""

    def __init__(self, holder: Holder, node: NodeState) -> None:
        self._holder, self._node = holder, node

    def issue(self, name: str, right: str, request: bytes) -> pb.UserCertificate:
        """A certificate for the key in `request` (PKCS #10, DER); `right` is read or change.

        Invalid names what is wrong with name or request, Unavailable who keeps the CA's key.
        """
        held = self._holder.held
        if held.issuing is None:
            keepers = sorted(n.name for n in self._node.nodes.values() if self._node.is_keeper(n))
            raise Unavailable(
                f"certificate for user {name[:40]}",
                "can only be issued by a node that keeps the CA's key, and this one does not",
                f"Run it on {' or '.join(keepers) or 'one that does'}",
            )
        user = User(held.cluster, parse_name(name, "user"), right)
        key = read_request(request)
        made = issue_user(held.issuing, user, key, self._holder.now(), USER_LIFE)
        ends = datetime.datetime.fromtimestamp(ca.ends(made), datetime.UTC)
        self._node.tell(
            "user.issued",
            f"{user.name} got a certificate that may {user.right}, until {ends:%Y-%m-%d}",
            user=user.name,
            right=user.right,
        )
        return pb.UserCertificate(
            name=user.name,
            right=user.right,
            ends=ends.isoformat().replace("+00:00", "Z"),
            certificate=ca.to_pem(made),
            authorities=[ca.to_pem(der) for der in held.trust.authorities],
        )


def issue_user(
    authority: Authority, user: User, public_key: ec.EllipticCurvePublicKey, now: float, life: float
) -> bytes:
    """A certificate (DER), good for a client only, for `life` s from `now` on."""
    issuer = x509.load_der_x509_certificate(authority.certificate)
    begin, end = _moment(math.floor(now - backdated(life))), _moment(math.ceil(now + life))
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, user.name)]))
        .issuer_name(issuer.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(begin, issuer.not_valid_before_utc))
        .not_valid_after(min(end, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGNATURE, critical=True)
        .add_extension(usage, critical=True)
        .add_extension(user.names(), critical=False)
        .add_extension(key_id, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.DER)


def read_request(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a request, which has to be signed with it; Invalid otherwise."""
    if len(request) > REQUEST_MAX:
        raise Invalid("request", f"is too long: {len(request)} bytes")
    try:
        found = x509.load_der_x509_csr(request)
        whole, key = found.is_signature_valid, found.public_key()
    except Exception as error:  # cryptography's parsers have many ways to say malformed
        raise Invalid("request", f"is malformed ({error})"[:200]) from None
    if not whole or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise Invalid("request", "is not for a P-256 key, or not signed with it")
    return key


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
