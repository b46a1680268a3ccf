"""Hybrid logical clocks: stamps that follow the wall clock and never contradict causality.

Kulkarni, Demirbas, Madappa, Avva, Leone: "Logical physical clocks and consistent snapshots in
globally distributed databases", 2014. A stamp is 48 bits of milliseconds since the epoch and
16 bits that count within one. A stamp that is seen moves the clock, so what is written after
something was seen is stamped higher, whatever the two wall clocks say.

The paper's price is that one clock that is far ahead takes all others along for ever. So a
stamp of another node moves ours only up to `MAX_AHEAD`. What bears a stamp further ahead is
still taken, as every node must see the same; only the clocks stay. Who writes over such an
object goes above *its* stamp (`above`), so the poison stays in the one object.
What stands opposite: agent/node/networks.py stamps what it writes; core/judging.py compares.
"""

from __future__ import annotations

from agent.model import STAMP_MAX

MAX_AHEAD = 86_400.0  # s; clocks that differ by more are broken, and a time zone is less


def stamp_at(seconds: float) -> int:
    """The first stamp of a moment, seconds since the epoch."""
    return min(max(int(seconds * 1000), 0) << 16, STAMP_MAX)


class HybridClock:
    """One node's clock. It keeps no time of its own: each call brings the wall clock's."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = 0  # the highest stamp given or followed

    def next(self, now: float, above: int = 0) -> int:
        """A stamp higher than all that was given or followed, and than `above`.

        `now` is the wall clock in seconds since the epoch; it may have been set back.
        """
        self.last = max(stamp_at(now), self.last + 1)
        if above >= self.last:
            stamp = min(above + 1, STAMP_MAX)
            self.receive(stamp, now)
            return stamp
        return self.last

    def receive(self, stamp: int, now: float, own: bool = False) -> bool:
        """Follow a stamp that was seen; False if it is too far ahead for that.

        `own` stamps are followed wherever they are: this node may not go below itself.
        """
        if not own and stamp > stamp_at(now + MAX_AHEAD):
            return False
        self.last = max(self.last, stamp)
        return True
