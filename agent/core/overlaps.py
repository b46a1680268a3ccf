"""Subnets that overlap, found without comparing each with each.

Two CIDR blocks overlap only if one contains the other: those that a block contains begin
inside it, and those that contain it are found by its address cut to each length in use.
What stands opposite: core/catalogue.py keeps the networks' subnets here.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_BITS = {4: 32, 6: 128}


class Block(NamedTuple):
    """A subnet as numbers: addresses low..high, both included."""

    family: int  # 4 or 6
    low: int
    high: int
    prefix: int

    def meets(self, other: Block) -> bool:
        """Whether they have an address in common."""
        return self.family == other.family and self.low <= other.high and other.low <= self.high


@lru_cache(maxsize=4096)
def block(subnet: str) -> Block:
    """A subnet in CIDR notation."""
    parsed = ipaddress.ip_network(subnet, strict=False)
    low, high = int(parsed.network_address), int(parsed.broadcast_address)
    return Block(parsed.version, low, high, parsed.prefixlen)


class Overlaps:
    """Who has which subnets."""

    def __init__(self) -> None:
        self._sorted: list[tuple[int, int, int, str, str]] = []  # family, low, prefix, CIDR, id
        self._exact: dict[tuple[int, int, int], set[tuple[str, str]]] = {}  # family, prefix, low
        self._prefixes: Counter[tuple[int, int]] = Counter()

    def add(self, id: str, subnets: Iterable[str]) -> None:
        """Take an object's subnets, each of them once."""
        for text in dict.fromkeys(subnets):
            family, low, _, prefix = block(text)
            insort(self._sorted, (family, low, prefix, text, id))
            self._exact.setdefault((family, prefix, low), set()).add((text, id))
            self._prefixes[family, prefix] += 1

    def discard(self, id: str, subnets: Iterable[str]) -> None:
        """Take them out again."""
        for text in dict.fromkeys(subnets):
            family, low, _, prefix = block(text)
            del self._sorted[bisect_left(self._sorted, (family, low, prefix, text, id))]
            same = self._exact[family, prefix, low]
            same.discard((text, id))
            if not same:
                del self._exact[family, prefix, low]
            self._prefixes[family, prefix] -= 1
            if not self._prefixes[family, prefix]:
                del self._prefixes[family, prefix]

    def meeting(self, subnet: str) -> set[tuple[str, str]]:
        """(CIDR, id) of all that overlap `subnet`, itself included if it is here."""
        family, low, high, prefix = block(subnet)
        start = bisect_left(self._sorted, (family, low))
        end = bisect_left(self._sorted, (family, high + 1))
        found = {(text, id) for _, _, _, text, id in self._sorted[start:end]}
        for of, length in self._prefixes:
            if of == family and length < prefix:
                shift = _BITS[family] - length
                found |= self._exact.get((family, length, low >> shift << shift), set())
        return found
