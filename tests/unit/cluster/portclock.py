"""The clock of peer ports, by which certificates end: a test sets it forward instead of waiting.

TLS has the machine's own, by which they hold; so none has to be shown within seconds.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from agent.cluster import front


class PortClock:
    """Of all ports of this process, in place of the module `time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0  # s
        self._looks = 0
        monkeypatch.setattr(front, "time", self)
        monkeypatch.setattr(front, "LOOK_EVERY", 0.01)

    def time(self) -> float:
        self._looks += 1
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic()

    async def advance(self, seconds: float, connections: int = 1) -> None:
        """Set it forward; return when each of so many connections has looked at it since."""
        self.ahead += seconds
        enough = self._looks + 3 * connections
        async with asyncio.timeout(60):
            while self._looks < enough:
                await asyncio.sleep(0.01)
