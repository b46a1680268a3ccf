"""Who holds streams to whom: a function of the node ids alone, so that nobody has to be asked.

PURE. Up to `everybody` nodes: everyone to everyone. Above, nodes stand on a ring of hashed ids
(Chord; Stoica and others, 2001) and each opens a stream to its successor and to one of the
first few nodes after each of the points 2^64/3^k from itself. Streams are used both ways, so
distances are written in balanced ternary digits and 3 is the base that reaches furthest for the
number of links; a node opens about log3 n and is opened as many. The successors alone keep the
graph connected, and a node that comes or goes moves only the fingers that point at it.
Why not HyParView: docs/decisions/0006-streams-follow-from-the-ids.md.

What stands opposite: cluster/peers.py opens what this says, core/stability.py sends what is
known of an origin along the same ring.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

# Nodes up to which everyone has a stream to everyone: 29 streams cost little, and a record
# needs one hop. The price grows with the square.
EVERYBODY = 30
BASE = 3
# Nodes after a point of which one is chosen, by rendezvous hashing. With 1 a node behind a wide
# gap is everybody's finger: 70 streams at 3,000 nodes; with 4 half as many. More gains nothing.
SPREAD = 4
CIRCLE = 1 << 64


@lru_cache(maxsize=1 << 16)
def position(node: str) -> int:
    """Where a node stands on the ring, 0 <= position < CIRCLE."""
    return int.from_bytes(blake2b(node.encode(), digest_size=8).digest(), "big")


def distance(a: str, b: str) -> int:
    """How far apart two nodes stand, the shorter way round."""
    apart = (position(a) - position(b)) % CIRCLE
    return min(apart, CIRCLE - apart)


class Topology:
    """The streams among a set of nodes."""

    def __init__(self, nodes: Iterable[str], everybody: int = EVERYBODY) -> None:
        ring = sorted((position(node), node) for node in set(nodes))
        self._ring = [node for _, node in ring]
        self._positions = [at for at, _ in ring]
        self._index = {node: index for index, node in enumerate(self._ring)}
        self.is_bounded = len(ring) > everybody  # not everyone has a stream to everyone

    def __contains__(self, node: str) -> bool:
        return node in self._index

    def neighbours(self, node: str) -> set[str]:
        """Whom `node`, one of the set, opens streams to. Others open some to it."""
        if not self.is_bounded:
            return set(self._ring) - {node}
        at = position(node)
        nearest = self._ring[(self._index[node] + 1) % len(self._ring)]
        found = {nearest}
        step = CIRCLE // BASE
        while step and (after := self._after(at + step))[0] != nearest:
            found.add(min(after, key=lambda other: _rank(node, other)))
            step //= BASE
        return found - {node}

    def opens(self, a: str, b: str) -> bool:
        """Whether `a` opens a stream to `b`; False if one of them is not of the set."""
        return a in self and b in self and b in self.neighbours(a)

    def _after(self, point: int) -> list[str]:
        """The first nodes at or after a point."""
        first = bisect_left(self._positions, point % CIRCLE)
        return [self._ring[(first + n) % len(self._ring)] for n in range(SPREAD)]


def _rank(node: str, other: str) -> int:
    """A number that any two nodes share with hardly another pair (rendezvous hashing)."""
    mixed = (position(node) ^ position(other)) * 0x9E3779B97F4A7C15 % CIRCLE
    return mixed ^ mixed >> 32


def neighbours(me: str, nodes: Iterable[str], everybody: int = EVERYBODY) -> set[str]:
    """Whom `me` opens and keeps streams to, of `nodes` (in which it may be left out)."""
    return Topology({me, *nodes}, everybody).neighbours(me)
