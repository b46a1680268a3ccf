"""Keys of simulated nodes: a keyed hash stands in for Ed25519, so that every run checks seals.

Whoever is simulated signs by its own id only, so a node that is to forge has to do without
the right key, as outside. What stands opposite: agent/cluster/signing.py, the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

from agent.core.replica import Delta
from agent.core.sealing import seal_own
from agent.core.seals import SIGNATURE, Sealer, Seals

CLUSTER = "sim"
_SHOWN = b"certificate of "


def sealer_of(me: str, known: Callable[[str], bool] = lambda origin: False) -> Sealer:
    """What a simulated node seals with. `known`: whose certificate is in its records."""
    return Sealer(CLUSTER, SimKeys(me, known))


def sealed(delta: Delta) -> Delta:
    """A delta as its origin would have sealed it, by itself, with its certificate."""
    sealer, seals = sealer_of(delta.origin), Seals()
    seal_own(sealer, delta.origin, seals, delta)
    delta.seals, delta.certificate = tuple(seals.all()), sealer.keys.certificate(delta.origin)
    return delta


class SimKeys:
    """agent/core/seals.py: Keys."""

    def __init__(self, me: str, known: Callable[[str], bool]) -> None:
        self.me = me
        self.verified = 0
        self._known = known
        self._met = {me}

    def sign(self, message: bytes) -> bytes:
        return _mac(self.me, message)

    def verify(self, origin: str, message: bytes, signature: bytes) -> bool:
        self.verified += 1
        return self.knows(origin) and signature == _mac(origin, message)

    def knows(self, origin: str) -> bool:
        return origin in self._met or self._known(origin)

    def certificate(self, origin: str) -> bytes:
        return _SHOWN + origin.encode() if self.knows(origin) else b""

    def meet(self, origin: str, certificate: bytes) -> None:
        if certificate == _SHOWN + origin.encode():
            self._met.add(origin)


def _mac(origin: str, message: bytes) -> bytes:
    return blake2b(message, key=b"key of " + origin.encode(), digest_size=SIGNATURE).digest()
