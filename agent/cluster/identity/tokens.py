"""Join tokens: VXM-1-FINGERPRINT-SECRET.

The fingerprint is that of the CA's certificate, so a joiner knows whom it talks to before it
sends anything. The secret follows from the CA's key and a nonce (HKDF, RFC 5869), so whoever
keeps the key can show it again, and it is written nowhere; a new nonce makes another one. Of
those that held before, hashes are kept, to tell who comes with one what happened to it.
What stands opposite: statements.py carries the nonce and the hashes; enrol.py uses a token.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from agent.errors import Invalid
from agent.model import TokenState

PREFIX = "VXM-1-"
SECRET_BYTES = 16
NONCE_BYTES = 16
_FORM = re.compile(r"vxm-(\d{1,4})-([a-z2-7]{32})-([a-z2-7]{26})\Z")
_INFO = b"vxmesh join token 1\0"


@dataclass(frozen=True, slots=True)
class Token:
    """What a person types. `secret` is not to be logged."""

    fingerprint: str
    secret: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.fingerprint}-{self.secret}"

    def __repr__(self) -> str:
        return f"Token({self.fingerprint}, …)"


def parse(text: str) -> Token:
    """A token as typed, in any case and with white space around; Invalid if it is none."""
    fix = "Take the whole line that 'vxmesh cluster token' prints on a node of the cluster"
    found = _FORM.match(text.strip().lower())
    if not found:
        raise Invalid("token", "is malformed", fix)
    version, fingerprint, secret = found.groups()
    if version != "1":
        raise Invalid("token", f"is of a form that this version does not know ({version})", fix)
    return Token(fingerprint, secret)


def derive(key: ec.EllipticCurvePrivateKey, nonce: bytes) -> str:
    """The secret that holds under a nonce (empty: nobody has changed it yet)."""
    material = key.private_numbers().private_value.to_bytes(32, "big")
    kdf = HKDF(hashes.SHA256(), SECRET_BYTES, salt=None, info=_INFO + nonce)
    return base64.b32encode(kdf.derive(material)).decode().lower().rstrip("=")


def hashed(secret: str) -> bytes:
    """What is kept of a secret that is void. It is random, so a plain hash cannot be guessed."""
    return hashlib.sha256(_INFO + secret.encode()).digest()


def judge(secret: str, key: ec.EllipticCurvePrivateKey, state: TokenState | None) -> str:
    """`valid`, `void` (it held before) or `wrong`, for one CA and what is stated of its token."""
    if hmac.compare_digest(secret.encode(), derive(key, state.nonce if state else b"").encode()):
        return "valid"
    return "void" if state and hashed(secret) in state.void else "wrong"
