"""When to say that a network is nearly full: once on the way up, and again only after a while down.

PURE, and cheap enough for every change: how full it is gets counted only when so many addresses
have moved that a threshold can have been crossed.
What stands opposite: node/networks.py, which counts and tells.
"""

from __future__ import annotations

from math import ceil

HIGH = 0.80  # of the addresses: an operator should hear of it
LOW = 0.70  # below this it may be told again; in between it would be told for every endpoint


class Fill:
    """One network."""

    __slots__ = ("_full", "_until")

    def __init__(self) -> None:
        self._full: set[int] = set()  # families above HIGH that have not been below LOW since
        self._until = 0  # addresses that may come or go before anything can have been crossed

    def is_due(self, moved: int) -> bool:
        """Note that `moved` addresses came or went; whether `look` must be called."""
        self._until -= moved
        return self._until <= 0

    def look(self, family: int, total: int, used: int) -> bool:
        """Take a count of one family; whether it became nearly full. All families in one go."""
        crossed = False
        if family in self._full:
            if used < LOW * total:
                self._full.discard(family)
        elif total and used >= HIGH * total:
            self._full.add(family)
            crossed = True
        down, up = used - ceil(LOW * total) + 1, ceil(HIGH * total) - used
        left = max(1, down if family in self._full else up)
        # The family that is nearest to a threshold decides when to look again.
        self._until = left if self._until <= 0 else min(self._until, left)
        return crossed
