"""Services as the datapath takes them, and which backend each slot of one leads to. Pure.

A service's port is a row of slots, each of which leads to one backend; a new connection falls
on a slot by chance, or with affinity by its client's address. Weights are numbers of slots.
What stands opposite: core/services.py says which backends there are; datapath/balancerules.py
writes slots as elements of a map.
Source: weights by the divisor method of Webster (Balinski & Young, Fair Representation, 1982);
affinity by weighted rendezvous hashing (Thaler & Ravishankar 1998; Schindelhauer & Schomaker
2005).
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from agent.drivers.marks import ASKED, UNTRACKED

# How many slots a service may have. Up to 16 any number, so that a few equal backends have one
# slot each; the rules have one chain for each size.
SPREAD_SIZES = (*range(1, 17), 64, 256, 1024, 4096)
STICKY_SIZES = (256, 1024, 4096)
DEVIATION = 1 / 8  # by which a backend's share may be off what its weight says
STICKY_SLOTS = 16  # a backend, at least: the choice by hash is uneven with fewer


class FrontendKey(NamedTuple):
    """What tells one frontend from another on a host."""

    service: str
    protocol: str
    port: int
    version: int = 4


@dataclass(frozen=True, slots=True)
class Backend:
    """One endpoint that a service leads to."""

    address: bytes  # 4 or 16 bytes
    port: int  # the target port
    weight: int  # its share of new connections beside the others'; 0: none
    key: str  # endpoint id
    # Gets no new connection, while those that it has go on: also one that is unhealthy for now.
    # The connections of a backend that is left out altogether are reset.
    draining: bool = False
    outside: bool = False  # in its node's own stack, at that one's address: host.py


@dataclass(frozen=True, slots=True)
class Frontend:
    """One port of a service in one family of addresses, as one host is to balance it."""

    service: str  # service id
    network: str  # network id
    vni: int
    protocol: Literal["tcp", "udp"]
    address: bytes  # the VIP; b"": none (dnsrr), only published ports lead here
    port: int  # at the VIP
    backends: tuple[Backend, ...]  # sorted by key, all of this frontend's family
    affinity: float = 0.0  # s for which a client is to stay with its backend; 0: none
    # Where it is published on THIS host: an address of the host, or b"" for all of this family's.
    published: tuple[tuple[bytes, int], ...] = ()
    prefer_local: bool = False  # backends of this host only, while there is one
    refuse: bool = True  # with no backend, refuse at once; else new connections get no answer
    version: Literal[4, 6] = 4  # a service with addresses of both families has two frontends

    @property
    def id(self) -> FrontendKey:
        """The key in DesiredState.frontends()."""
        return FrontendKey(self.service, self.protocol, self.port, self.version)


def eligible(frontend: Frontend, local: frozenset[str] = frozenset()) -> tuple[Backend, ...]:
    """The backends that new connections may go to; `local` are the endpoints of this host."""
    able = tuple(b for b in frontend.backends if b.weight > 0 and not b.draining)
    if frontend.prefer_local:
        return tuple(b for b in able if b.key in local) or able
    return able


def assign(
    backends: Sequence[Backend], affinity: bool = False, before: Sequence[str] = ()
) -> tuple[str, ...]:
    """The key of a backend for each slot; empty without backends. How many slots: the length.

    Without affinity each backend has as many slots as Webster's method gives it, and `before`,
    an assignment of the same service, is kept as far as that allows: a backend that goes moves
    its own slots only, one that comes takes slots for itself only. (When the number of slots
    changes with it, those that there are no longer move too.) With affinity, slots are chosen by
    hash alone, so that all hosts choose the same, before and after they restart; they are for
    clients that the kernel does not know yet.
    """
    able = [b for b in backends if b.weight > 0 and not b.draining]
    if not able:
        return ()
    weights = {b.key: b.weight for b in able}
    if affinity:
        wanted = len(able) * STICKY_SLOTS
        return _by_hash(weights, next((s for s in STICKY_SIZES if s >= wanted), STICKY_SIZES[-1]))
    return _by_quota(_quotas(weights), before)


def tokens(backends: Sequence[Backend]) -> dict[str, int]:
    """A number for each backend that is no other's of these, not 0 and no mark of ours; by key.

    It becomes the mark of its packets for a time, so one of ours would have them go astray.

    It is the same on every host, after a restart, and whoever else is there; but for two whose
    numbers would be the same, once in 2^32 pairs: then that of the second one is the next.
    """
    found: dict[str, int] = {}
    used = {0, ASKED, UNTRACKED}
    for key in sorted(b.key for b in backends):
        token = zlib.crc32(key.encode())
        while token in used:
            token = (token + 1) % 2**32
        used.add(token)
        found[key] = token
    return found


def _quotas(weights: dict[str, int]) -> dict[str, int]:
    """How many slots each gets, in the smallest size that does the weights justice."""
    divisor = math.gcd(*weights.values())
    total = sum(weights.values())
    if total // divisor <= 16:
        return {key: weight // divisor for key, weight in weights.items()}
    found: dict[str, int] = {}
    for size in SPREAD_SIZES:
        if size < len(weights) or size <= 16:
            continue
        found = _webster(weights, size)
        if all(
            abs(count * total - weights[key] * size) <= DEVIATION * weights[key] * size
            for key, count in found.items()
        ):
            break
    return found or _webster(weights, SPREAD_SIZES[-1])


def _webster(weights: dict[str, int], size: int) -> dict[str, int]:
    """Seats by Webster's method: each next one to whose weight / (2 seats + 1) is greatest.

    Whoever leaves, nobody else has fewer for it. The first total - n seats fall where the
    weights say, rounded down: only the rest is looked for.
    """
    total = sum(weights.values())
    found = {key: max(0, weight * size // total - 1) for key, weight in weights.items()}
    queue = [(-weights[key] / (2 * found[key] + 1), key) for key in weights]
    heapq.heapify(queue)
    for _ in range(size - sum(found.values())):
        _, key = queue[0]
        found[key] += 1
        heapq.heapreplace(queue, (-weights[key] / (2 * found[key] + 1), key))
    return found


def _by_quota(quotas: dict[str, int], before: Sequence[str]) -> tuple[str, ...]:
    size = sum(quotas.values())
    left = dict(quotas)
    slots: list[str] = [""] * size
    for slot, key in enumerate(before[:size]):
        if left.get(key, 0) > 0:
            slots[slot] = key
            left[key] -= 1
    missing = iter([key for key in sorted(left) for _ in range(left[key])])
    return tuple(key or next(missing) for key in slots)


@functools.lru_cache(4096)
def _scores(key: str, size: int) -> tuple[float, ...]:
    """-ln of a number in (0, 1) for each slot, by hash of the backend: as if drawn once for all."""
    digest = hashlib.shake_128(key.encode()).digest(8 * size)
    return tuple(-math.log((n + 0.5) / 2**64) for n in struct.unpack(f">{size}Q", digest))


def _by_hash(weights: dict[str, int], size: int) -> tuple[str, ...]:
    """Each slot to whose score / weight is least: shares are as the weights."""
    keys = sorted(weights)
    rows = [[score / weights[key] for score in _scores(key, size)] for key in keys]
    return tuple(keys[column.index(min(column))] for column in zip(*rows, strict=True))
