"""What a user shows an agent over TCP: one file with their key, certificate and the cluster's CAs.

`vxmesh cluster user NAME` writes it, private key first, in PEM. What stands opposite:
api/tlsfront.py of the agent.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import Conflict, Denied, Invalid
from agent.unreadable import UNREADABLE
from agent.users import User, read_user

if TYPE_CHECKING:
    from agent.clientgrpc import GrpcCalls

VARIABLE = "VXMESH_TLS"
_DOMAIN = "vxmesh.internal"  # as cluster/trust.py: of the names in nodes' certificates


class Bundle:
    """One such file."""

    def __init__(self, path: Path) -> None:
        """Invalid if it cannot be read or is none."""
        self._path = path
        try:
            data = path.read_bytes()
            begin = data.index(b"-----BEGIN CERTIFICATE-----")
            self._key = data[:begin]
            key = serialization.load_pem_private_key(self._key, None)
            own, *authorities = x509.load_pem_x509_certificates(data[begin:])
            is_own = own.public_key() == key.public_key()
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
            raise Invalid(f"file {path}", why, "Give that of 'vxmesh cluster user NAME'") from None
        except UNREADABLE:
            raise self._invalid("is not a user's key and certificate in PEM") from None
        if not authorities or not is_own:
            raise self._invalid("is not whole")
        self.user: User = read_user(own)
        self._own, self._authorities = own, authorities

    def connect(self, target: str) -> GrpcCalls:
        """A way to host:port that stands only if an agent of the cluster answers there."""
        from agent.clientgrpc import connect_tls  # 0.1 s, and the command that issues needs none

        # Which node of the cluster it is is not asked: a user names a host as they reach it.
        name = f"member.{self.user.cluster}.{_DOMAIN}"
        roots = b"".join(map(_pem, self._authorities))
        return connect_tls(target, roots, self._key, _pem(self._own), name)

    def problem(self, host: str, details: str) -> Denied | None:
        """Why the agent at `host` and this user did not come together, if it is because one did
        not believe the other; `details` are what gRPC says."""
        what = f"certificate of {self.user.name}"
        again = f"Have it issued anew: 'vxmesh cluster user {self.user.name}'"
        now, begin = datetime.datetime.now(datetime.UTC), self._own.not_valid_before_utc
        end = self._own.not_valid_after_utc
        if now >= end:
            return Denied(what, f"ended on {end:%Y-%m-%d at %H:%M} UTC", again)
        if now < begin:
            why = f"begins on {begin:%Y-%m-%d at %H:%M} UTC only"
            return Denied(what, why, "Set this machine's clock")
        if "CERTIFICATE_VERIFY_FAILED" in details or "Hostname Verification" in details:
            return Denied(
                f"agent at {host}",
                "is of another cluster than this certificate, or the cluster's CA was replaced",
                again,
            )
        # In TLS 1.3 who dials has finished before it is judged, so a refusal is a connection
        # that ends; one that never stood is a port at which nobody listens.
        if "Connection refused" in details or "timed out" in details or "resol" in details:
            return None
        return Denied(
            what,
            f"was not believed by the agent at {host} ({details[:120]})",
            f"{again}. The agent's events say why",
        )

    def _invalid(self, why: str) -> Invalid:
        return Invalid(f"file {self._path}", why, "Give that of 'vxmesh cluster user NAME'")


def file_for(host: str, tls: str) -> Path:
    """The file to show at `host`: `tls`, or VXMESH_TLS's; Invalid if there is none."""
    found = tls or os.environ.get(VARIABLE, "")
    if not found:
        raise Invalid(
            f"--host {host}",
            "takes a certificate",
            f"Give --tls FILE or {VARIABLE}, with what 'vxmesh cluster user NAME' wrote on a node",
        )
    return Path(found)


def make_request(name: str) -> tuple[bytes, bytes]:
    """A new key (PEM, PKCS #8) and the request for its certificate (PKCS #10, DER)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return (
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER),
    )


@contextlib.contextmanager
def reserve_bundle(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Make a file that only its owner can read, and give what writes it; it is gone again if that
    was not called. Conflict if it exists, Invalid if it cannot be made: before anything is issued.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Conflict(f"file {path}", "exists", "Remove it, or name another with --out") from None
    except OSError as error:
        raise Invalid(f"file {path}", f"cannot be written ({error.strerror})") from None
    is_written = False

    def write(data: bytes) -> None:
        nonlocal is_written
        file.write(data)
        is_written = True

    with os.fdopen(descriptor, "wb") as file:
        try:
            yield write
        finally:
            if not is_written:
                path.unlink(missing_ok=True)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
