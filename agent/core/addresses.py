"""The addresses of one network as this node sees them: who owns them, and which are free.

Joins ring.py (ownership) and space.py (use). What stands opposite: node.py publishes the
claims and marks what endpoints use; cluster/ carries requests to the owners.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.core.ring import Ring
from agent.core.space import Space
from agent.model import Claims, Network, aux_addresses
from agent.notation import parse_address

Range = tuple[bytes, bytes]  # first and last address, both included


@dataclass(frozen=True, slots=True)
class Usage:
    """How many of a network's addresses can be chosen, in one family: of the IP range if any.

    `owned` is node -> (how many it may hand out, how many of those are used).
    """

    family: int
    total: int
    used: int
    owned: dict[str, tuple[int, int]]

    @property
    def free(self) -> int:
        """How many can still be had by somebody."""
        return self.total - self.used


class Addresses:
    """Ownership and use of one network's addresses. `me` is this node's id."""

    def __init__(self, network: Network, me: str) -> None:
        self.me = me
        self.network = network.id
        self.ring = Ring(network.creator, network.subnets)
        reserved = [parse_address(g) for g in network.gateways]
        reserved += aux_addresses(network.options)
        self.space = Space(network.subnets, reserved, network.ranges)

    def pick(self, family: int) -> bytes | None:
        """A free address that this node owns; None if it has none left."""
        return self.space.pick(self.ring.owned(self.me, family), family)

    def foreign(self, addresses: Iterable[bytes]) -> dict[str, list[Range]]:
        """Those of `addresses` that others own: owner -> contiguous ranges, sorted."""
        by_owner: dict[str, list[bytes]] = {}
        for address in addresses:
            owner = self.ring.owner(address)
            if owner is not None and owner != self.me:
                by_owner.setdefault(owner, []).append(address)
        return {owner: join_ranges(found) for owner, found in by_owner.items()}

    def donors(self, family: int) -> list[str]:
        """Other nodes that seem to have free addresses, the one with the most first."""
        room = {}
        for owner in {s.owner for s in self.ring.segments() if s.family == family} - {self.me}:
            free = self.space.largest_free(self.ring.owned(owner, family), family)
            if free:
                room[owner] = free[1] - free[0]
        return sorted(room, key=lambda owner: (-room[owner], owner))

    def families(self) -> list[int]:
        """4, 6, or both."""
        return sorted({segment.family for segment in self.ring.segments()})

    def usage(self, family: int) -> Usage:
        """How full it is, and who owns what."""
        total, used = self.space.usage(family)
        owners = {s.owner for s in self.ring.segments() if s.family == family}
        owned = {
            owner: self.space.usage_of(self.ring.owned(owner, family), family) for owner in owners
        }
        return Usage(family, total, used, owned)

    def donate(self, to: str, family: int, ranges: list[Range]) -> list[bytes]:
        """Give `to` the free addresses in `ranges`, or without ranges a part of what is free.

        Only what this node owns can go, so a stale or hostile request moves nothing else.
        Returns the requested addresses that are in use and were kept.
        """
        owned = self.ring.owned(self.me, family)
        if not ranges:
            offer = self.space.offer(owned, family)
            if offer:
                self.ring.donate(self.me, to, offer[0], offer[1], family)
            return []
        kept: list[bytes] = []
        width = 4 if family == 4 else 16
        for first, last in ranges:
            low, high = int.from_bytes(first), int.from_bytes(last)
            # Anew for each range: a request may name some addresses twice.
            for start, end in list(self.ring.owned(self.me, family)):
                if start <= high and low <= end:
                    kept += self._donate_part(to, family, width, max(low, start), min(high, end))
        return kept

    def _donate_part(self, to: str, family: int, width: int, low: int, high: int) -> list[bytes]:
        used = sorted(number for number in self.space.used_between(low, high, family))
        start = low
        for number in [*used, high + 1]:
            if start < number:
                self.ring.donate(self.me, to, start, number - 1, family)
            start = number + 1
        return [number.to_bytes(width) for number in used]

    def owners(self) -> set[str]:
        """The nodes that own addresses here."""
        return {segment.owner for segment in self.ring.segments()}

    def reclaim(self, lost: str) -> dict[int, int]:
        """Inherit what a removed node owns; family -> how many addresses."""
        return self.ring.reclaim(lost, self.me)

    def hand_over(self, to: str) -> int:
        """Give `to` all that this node owns, used or not; how many addresses."""
        count = 0
        for family in (4, 6):
            for start, end in list(self.ring.owned(self.me, family)):
                self.ring.donate(self.me, to, start, end, family)
                count += end - start + 1
        return count

    def claims(self) -> Claims:
        """What this node should state now."""
        return self.ring.claims(self.me, self.network)


def join_ranges(addresses: Iterable[bytes]) -> list[Range]:
    """Contiguous runs out of single addresses of one family or both."""
    ranges: list[Range] = []
    for address in sorted(set(addresses), key=lambda a: (len(a), a)):
        if ranges:
            first, last = ranges[-1]
            if len(last) == len(address) and int.from_bytes(last) + 1 == int.from_bytes(address):
                ranges[-1] = (first, address)
                continue
        ranges.append((address, address))
    return ranges
