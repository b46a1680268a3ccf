"""A digest in 64 numbers, to see cheaply whether two nodes have the same.

PURE. Origins fall into 64 buckets by the hash of their id, and each bucket is summed up in one
64-bit hash of what one has of its origins (one level of a Merkle tree, as in Dynamo's
anti-entropy; DeCandia and others, 2007). Under a steady load some records are always on their
way; with buckets that is a few entries told for nothing, not a whole digest every second.
What stands opposite: core/session.py, which tells the entries of the buckets that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent.core.topology import CIRCLE, position

BUCKETS = 64  # one bit each in Digest.buckets; 512 bytes an interval and stream
_SHIFT = 64 - 6  # the highest bits of the position choose the bucket


@dataclass(frozen=True, slots=True)
class Summary:
    """The hash of each bucket, and three clocks as a Digest has them."""

    buckets: tuple[int, ...]
    time: float = 0.0
    echo: float = 0.0
    held: float = 0.0


def bucket(origin: str) -> int:
    """The number of the bucket that an origin falls into."""
    return position(origin) >> _SHIFT


def differing(mine: tuple[int, ...], theirs: tuple[int, ...]) -> int:
    """The buckets that differ, as bits."""
    if mine == theirs:
        return 0
    pairs = zip(mine, theirs, strict=True)
    return sum(1 << number for number, (a, b) in enumerate(pairs) if a != b)


class Summarizer:
    """Keeps the hashes of a digest up to date; the cost is what changed, and one look at it."""

    def __init__(self) -> None:
        self._counted: dict[str, int] = {}  # origin -> version that is in the hashes
        self._buckets = [0] * BUCKETS
        self._digest: Mapping[str, tuple[int, int]] = {}  # what was last looked at

    def update(self, digest: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
        """The hashes of `digest`: origin -> (version, floor). Floors are not looked at: they
        come with records, so two nodes that have the same may well have different ones. A digest
        that is given again is not looked at again."""
        if digest is self._digest:
            return tuple(self._buckets)
        self._digest = digest
        counted = self._counted
        for origin in counted.keys() - digest.keys():
            self._buckets[bucket(origin)] ^= _mix(origin, counted.pop(origin))
        for origin, (version, _) in digest.items():
            before = counted.get(origin, 0)
            if version != before:
                self._buckets[bucket(origin)] ^= _mix(origin, before) ^ _mix(origin, version)
                counted[origin] = version
        return tuple(self._buckets)


def _mix(origin: str, version: int) -> int:
    """A hash of both; 0 for version 0, which is as good as not knowing the origin."""
    if not version:
        return 0
    mixed = (position(origin) ^ version * 0x9E3779B97F4A7C15) % CIRCLE
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % CIRCLE  # splitmix64 (Steele, 2014)
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % CIRCLE
    return mixed ^ mixed >> 31
