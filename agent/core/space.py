"""What is free inside the addresses that a node owns.

Use is kept as one bitmap for each 256 addresses in which something is used: marking is one
dict operation, a full run is stepped over 256 addresses at a time, and a free run is found by
shifting. Nothing here costs what the subnet is, so an IPv6 /64 is as good as a /24.

What stands opposite: core/ring.py says who owns what; core/addresses.py joins the two.
"""

from __future__ import annotations

import ipaddress
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

Span = tuple[int, int]  # first and last address as integers, both included

_BITS = 256
_FULL = (1 << _BITS) - 1
_WIDTH = {4: 4, 6: 16}  # family -> bytes of an address


class _Family:
    """The addresses of one family."""

    __slots__ = ("fixed", "more", "order", "turns", "used", "width", "windows")

    def __init__(self, width: int) -> None:
        self.width = width
        # What dynamic addresses are picked from, disjoint: the first one until it is full. And
        # the last pick of each, or one less than its first address.
        self.windows: list[Span] = []
        self.turns: list[int] = []
        self.used: dict[int, int] = {}  # address // 256 -> bitmap; none is 0
        self.more: dict[int, int] = {}  # address -> users, where there are several
        self.fixed: dict[int, int] = {}  # reserved addresses, as `used`
        # The sorted keys of `used` and `fixed`, and of blocks that are empty by now.
        self.order: list[int] | None = None

    def blocks(self, low: int, high: int) -> Iterator[Span]:
        """Number and bits, inside low..high, of each block that may have a used address."""
        if self.order is None:
            self.order = sorted(self.used.keys() | self.fixed.keys())
        first, last = low // _BITS, high // _BITS
        start, stop = bisect_left(self.order, first), bisect_right(self.order, last)
        for index in range(start, stop):
            block = self.order[index]
            bits = _FULL
            if block == first:
                bits &= _FULL << low % _BITS
            if block == last:
                bits &= _FULL >> (_BITS - 1 - high % _BITS)
            yield block, bits

    def blocked(self, block: int) -> int:
        return self.used.get(block, 0) | self.fixed.get(block, 0)

    def first_free(self, low: int, high: int) -> int | None:
        number = low
        while number <= high:
            block, offset = divmod(number, _BITS)
            free = (_FULL ^ self.blocked(block)) >> offset
            if free:
                number += _lowest(free)
                return number if number <= high else None
            number = (block + 1) * _BITS
        return None


class Space:
    """The use of one network's addresses, as this node knows it.

    `subnets` are CIDR; `reserved` are addresses, four or sixteen bytes, that no endpoint gets
    (the gateways). Of themselves reserved are the network and broadcast address of IPv4 and
    the subnet-router anycast address of IPv6 (RFC 4291, section 2.6.1). In a family that one of
    `ranges` (CIDR, disjoint) is of only addresses in them are picked; use is counted anywhere.
    Of several subnets the first one is picked from until it is full.
    """

    def __init__(
        self, subnets: Iterable[str], reserved: Iterable[bytes], ranges: Iterable[str]
    ) -> None:
        self._families = {width: _Family(width) for width in _WIDTH.values()}
        fixed = [(len(address), int.from_bytes(address)) for address in reserved]
        parts = [ipaddress.ip_network(text) for text in ranges]
        for text in subnets:
            subnet = ipaddress.ip_network(text)
            width = _WIDTH[subnet.version]
            low, high = int(subnet.network_address), int(subnet.broadcast_address)
            fixed.append((width, low))
            if width == 4:
                fixed.append((width, high))
            chosen = [part for part in parts if part.version == subnet.version]
            for part in chosen or [subnet]:
                start = max(low, int(part.network_address))
                end = min(high, int(part.broadcast_address))
                if start <= end:
                    self._families[width].windows.append((start, end))
                    self._families[width].turns.append(start - 1)
        self._reserved = frozenset(number.to_bytes(width) for width, number in fixed)
        for width, number in fixed:
            masks = self._families[width].fixed
            block, offset = divmod(number, _BITS)
            masks[block] = masks.get(block, 0) | 1 << offset

    # -- marking --

    def take(self, address: bytes) -> None:
        """One more user of `address`, here or anywhere."""
        family = self._families.get(len(address))
        if family is None:
            return
        number = int.from_bytes(address)
        block, bit = number >> 8, 1 << (number & 255)
        mask = family.used.get(block, 0)
        if mask & bit:
            family.more[number] = family.more.get(number, 1) + 1
            return
        if not mask:
            family.order = None
        family.used[block] = mask | bit

    def take_all(self, addresses: Sequence[bytes]) -> None:
        """The same for many; of IPv4, a block at a time."""
        family, take = self._families[4], self.take
        if set(map(len, addresses)) != {4}:
            for address in addresses:
                take(address)
            return
        fresh: dict[int, int] = {}  # as `used`
        for number in struct.unpack(f">{len(addresses)}I", b"".join(addresses)):
            block = number >> 8
            fresh[block] = fresh.get(block, 0) | 1 << (number & 255)
        used = family.used
        bits = sum([mask.bit_count() for mask in fresh.values()])
        if bits < len(addresses) or any(used.get(b, 0) & mask for b, mask in fresh.items()):
            for address in addresses:  # one has several users
                take(address)
            return
        if not used.keys() >= fresh.keys():
            family.order = None
        for block, mask in fresh.items():
            used[block] = used.get(block, 0) | mask

    def release(self, address: bytes) -> None:
        """One user less; it is free when the last one is gone. Nothing if it has none."""
        family = self._families.get(len(address))
        if family is None:
            return
        number = int.from_bytes(address)
        users = family.more.get(number)
        if users is not None:
            if users > 2:
                family.more[number] = users - 1
            else:
                del family.more[number]
            return
        block, bit = number >> 8, 1 << (number & 255)
        mask = family.used.get(block, 0) & ~bit
        if mask:
            family.used[block] = mask
        else:
            family.used.pop(block, None)

    def used(self, address: bytes) -> bool:
        """Whether somebody uses `address`."""
        family = self._families.get(len(address))
        block, offset = divmod(int.from_bytes(address), _BITS)
        return family is not None and bool(family.used.get(block, 0) >> offset & 1)

    def reserved(self, address: bytes) -> bool:
        """Whether no endpoint may have `address`."""
        return address in self._reserved

    def reserves_any(self, addresses: Iterable[bytes]) -> bool:
        """Whether no endpoint may have one of `addresses`."""
        return not self._reserved.isdisjoint(addresses)

    def used_between(self, low: int, high: int, family: int) -> Iterator[int]:
        """The used addresses in low..high, sorted."""
        state = self._families[_WIDTH[family]]
        for block, bits in state.blocks(low, high):
            mask = state.used.get(block, 0) & bits
            while mask:
                yield block * _BITS + _lowest(mask)
                mask &= mask - 1

    # -- choosing --

    def pick(self, owned: Sequence[Span], family: int) -> bytes | None:
        """A free dynamic address inside `owned` (sorted, disjoint); None if there is none.

        In each subnet next-fit: the first one after the last pick, then from the start again, so
        that an address that was just released, which others still remember, is not the next one.
        """
        state = self._families[_WIDTH[family]]
        for index, (low, high) in enumerate(state.windows):
            turn = state.turns[index] + 1
            for start, end in ((turn, high), (low, turn - 1)):
                for first, last in _inside(owned, [(start, end)] if start <= end else ()):
                    number = state.first_free(first, last)
                    if number is not None:
                        state.turns[index] = number
                        return number.to_bytes(state.width)
        return None

    def largest_free(self, owned: Sequence[Span], family: int) -> Span | None:
        """The longest run of free dynamic addresses inside `owned`; the first of equals."""
        return self._longest(owned, family, self._families[_WIDTH[family]].windows)

    def _longest(self, owned: Sequence[Span], family: int, windows: Iterable[Span]) -> Span | None:
        state = self._families[_WIDTH[family]]
        best: Span | None = None
        size = 0
        for low, high in _inside(owned, windows):
            start = low  # of the run that we are in
            for block, bits in state.blocks(low, high):
                mask = state.blocked(block) & bits
                if not mask:
                    continue
                base = block * _BITS
                end = base + _lowest(mask)
                if end - start > size:
                    best, size = (start, end - 1), end - start
                gap = _longest_gap(mask, size)
                if gap:
                    best, size = (base + gap[0], base + gap[0] + gap[1] - 1), gap[1]
                start = base + mask.bit_length()
            if high + 1 - start > size:
                best, size = (start, high), high + 1 - start
        return best

    def offer(self, owned: Sequence[Span], family: int) -> Span | None:
        """What to donate: the upper half of the largest free run, rounded down.

        Of a run of one, that one. It is of the first subnet that has something free. None if
        nothing is free.
        """
        windows = self._families[_WIDTH[family]].windows
        found = (self._longest(owned, family, [window]) for window in windows)
        run = next((run for run in found if run), None)
        if run is None or run[0] == run[1]:
            return run
        start, end = run
        return start + (end - start + 2) // 2, end

    def usage(self, family: int) -> tuple[int, int]:
        """How many dynamic addresses the network has, and how many of them are used."""
        return self.usage_of(sorted(self._families[_WIDTH[family]].windows), family)

    def usage_of(self, owned: Sequence[Span], family: int) -> tuple[int, int]:
        """The same of those inside `owned` (sorted, disjoint)."""
        state = self._families[_WIDTH[family]]
        total = used = 0
        for low, high in _inside(owned, state.windows):
            total += high - low + 1
            for block, bits in state.blocks(low, high):
                fixed = state.fixed.get(block, 0)
                total -= (fixed & bits).bit_count()
                used += (state.used.get(block, 0) & ~fixed & bits).bit_count()
        return total, used


def _inside(owned: Sequence[Span], windows: Iterable[Span]) -> Iterator[Span]:
    """What `owned` (sorted, disjoint) and each of `windows` have in common."""
    for low, high in windows:
        first = max(bisect_right(owned, low, key=itemgetter(0)) - 1, 0)
        for index in range(first, len(owned)):
            start, end = owned[index]
            if start > high:
                break
            if end >= low:
                yield max(start, low), min(end, high)


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def _longest_gap(mask: int, longer: int) -> Span | None:
    """First and length of the longest run of zeros between two ones, if longer than `longer`.

    A run of n bits is where n shifted copies of the map meet: log n shifts tell most blocks
    that they have none.
    """
    gaps = ((1 << mask.bit_length()) - 1) ^ mask
    gaps &= ~((mask & -mask) - 1)
    runs, size = gaps, 1
    while runs and size <= longer:
        step = min(size, longer + 1 - size)
        runs &= runs >> step
        size += step
    if not runs:
        return None
    while more := runs & gaps >> size:
        runs = more
        size += 1
    return _lowest(runs), size
