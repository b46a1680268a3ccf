"""What the guards dropped, read from the kernel's counters every few seconds.

A counter begins at nought again when its table is loaded anew, so what is kept here is how much
each rose. Which sandbox it was is looked at only when something rose at all.
What stands opposite: guardrules.py, which has the reasons; the daemon, which tells of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from agent.datapath.guard import Guard
from agent.datapath.guardrules import COUNTER, REASONS
from agent.datapath.nftables import Nftables


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was dropped of one endpoint since the last reading, in frames."""

    endpoint: str  # id
    spoofed: int  # that are not its own to send
    flooded: int  # to its gateway, more than its limit
    groups: int  # broadcast and multicast, more than its network's limit
    reasons: tuple[str, ...]  # of REASONS: those for which anything was dropped on this host


class Refusals:
    """The counters of one host's tables."""

    def __init__(self, guard: Guard, host: Nftables) -> None:
        self.total: Counter[str] = Counter(dict.fromkeys(REASONS, 0))  # frames, by reason
        self._guard, self._host = guard, host
        self._before: dict[str, Mapping[str, int]] = {}  # by where it was read

    async def read(self) -> list[Refusal]:
        """Read; what came since the last time, by endpoint. VxmeshError if a table is gone."""
        risen: Counter[str] = Counter()
        for place, table in (("guard", self._guard.table), ("host", self._host)):
            risen += self._rise(place, await table.counters())
        by_reason = {name.removeprefix(COUNTER): count for name, count in risen.items()}
        self.total.update(by_reason)
        if not by_reason:
            return []
        endpoints = self._guard.endpoints()
        spoofed = self._rise("ports", await self._guard.table.counted("ports"))
        flooded = self._rise("asking", await self._guard.table.counted("asking"))
        groups = self._rise("flooding", await self._guard.table.counted("flooding"))
        reasons = tuple(sorted(by_reason))
        return [
            Refusal(endpoints[d], spoofed[d], flooded[d], groups[d], reasons)
            for d in sorted(spoofed.keys() | flooded.keys() | groups.keys())
            if d in endpoints
        ]

    def _rise(self, place: str, reading: Mapping[str, int]) -> Counter[str]:
        before = self._before.get(place, {})
        self._before[place] = reading
        risen: Counter[str] = Counter()
        for name, value in reading.items():
            last = before.get(name, 0)
            risen[name] = value - last if value >= last else value
        return +risen
