"""What keepers state for all, signed with the CA's key: whom to trust, which join token holds.

The statements travel as records (model.Trust, model.TokenState) that any node may repeat, and
count by their signatures, not by who tells them: a member that is not a keeper can make nobody
trust anything. Each keeper repeats those in force, so they outlive who made them.
What stands opposite: rotation.py says what to state next; service.py takes and makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agent.cluster.identity.authority import Authority, public_key_of
from agent.errors import Invalid, VxmeshError
from agent.model import ONLY, TokenState, Trust, check_sound, encode

T = TypeVar("T", Trust, TokenState)
_trust = msgspec.msgpack.Decoder(Trust)


def sign_trust(trust: Trust, authorities: Iterable[Authority]) -> Trust:
    """The statement with one signature of each CA given: who trusts one of them can check it."""
    bare = msgspec.structs.replace(trust, signatures=())
    signed = tuple(
        authority.key.sign(_message(bare), ec.ECDSA(hashes.SHA256())) for authority in authorities
    )
    return msgspec.structs.replace(bare, signatures=signed)


def sign_token(state: TokenState, authority: Authority) -> TokenState:
    """The statement, signed with the key that the secret follows from."""
    bare = msgspec.structs.replace(state, signature=b"")
    made = authority.key.sign(_message(bare), ec.ECDSA(hashes.SHA256()))
    return msgspec.structs.replace(bare, signature=made)


def is_trusted(trust: Trust, cluster: str, authorities: Sequence[bytes]) -> bool:
    """Whether one of `authorities` (DER), those that are trusted now, signed it."""
    message = _message(msgspec.structs.replace(trust, signatures=()))
    return trust.cluster == cluster and any(
        _is_signed(signature, message, authority)
        for signature in trust.signatures
        for authority in authorities
    )


def newest_trust(found: Iterable[Trust], held: Trust) -> Trust | None:
    """The newest statement that those trusted by `held` signed; None if `held` is the newest."""
    newer = [t for t in found if (t.epoch, t.stamp) > (held.epoch, held.stamp)]
    for trust in sorted(newer, key=lambda t: (t.epoch, t.stamp), reverse=True):
        if is_trusted(trust, held.cluster, held.authorities):
            return trust
    return None


def newest_token(found: Iterable[TokenState], cluster: str, authority: bytes) -> TokenState | None:
    """The newest statement about the join token of one CA (DER); None if there is none."""
    for state in sorted(found, key=lambda s: s.stamp, reverse=True):
        message = _message(msgspec.structs.replace(state, signature=b""))
        if state.cluster == cluster and _is_signed(state.signature, message, authority):
            return state
    return None


def read_trust(data: bytes, cluster: str, authorities: Sequence[bytes]) -> Trust:
    """A statement that came otherwise than as a record; Invalid if it is not to be believed."""
    try:
        trust = _trust.decode(data)
        check_sound(trust, ONLY)
    except (msgspec.MsgspecError, VxmeshError, ValueError) as error:
        raise Invalid("statement of trust", f"is malformed ({error})"[:200]) from None
    if not is_trusted(trust, cluster, authorities):
        raise Invalid("statement of trust", "is not signed by the cluster's CA")
    return trust


def _message(bare: Trust | TokenState) -> bytes:
    return f"vxmesh {type(bare).__name__} 1\0".encode() + encode(bare)


def _is_signed(signature: bytes, message: bytes, authority: bytes) -> bool:
    try:
        public_key_of(authority).verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, Invalid):
        return False
    return True
