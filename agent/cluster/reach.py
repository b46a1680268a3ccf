"""Waiting until a node's port takes connections: short attempts, close upon each other.

A cable that is back must carry records within half a second, however long it was out, so nothing
here may wait for a timer that has backed off: TCP sends its first packet again after 1, 3, 7 ... s
and gRPC's channels after up to 120 s. So each attempt is a new socket, made at a steady pace and
given up soon; only when one is connected is a channel made. What stands opposite: peers.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

PROBE_EVERY = (0.2, 0.25)  # s, by chance in between, so that nodes do not keep step
# s; three round trips to the other side of the world. Some probes are on their way at a time, so
# that a long way does not make the pace slow.
PROBE_WITHIN = 1.0
# Nodes that can be waited for at that pace; more share it, or 100 dead nodes would cost 450 new
# sockets a second. With 10: 50 a second at most, and each of 100 nodes every 2 s.
AT_FULL_PACE = 10


class Reach:
    """Waits for any number of ports at once."""

    def __init__(self) -> None:
        self._waiting = 0
        self._again = asyncio.Event()

    def redial(self) -> None:
        """Let all that wait try now: the network may have come back."""
        self._again.set()
        self._again = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Sleep, or until `redial`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._again.wait()

    async def answers(self, target: str) -> None:
        """Return when a connection to host:port has been made (it is closed again)."""
        probes: set[asyncio.Task[bool]] = set()
        self._waiting += 1
        try:
            while True:
                probes.add(asyncio.create_task(_probe(target)))
                pace = random.uniform(*PROBE_EVERY) * max(1.0, self._waiting / AT_FULL_PACE)
                if await self._any(probes, pace):
                    return
        finally:
            self._waiting -= 1
            for probe in probes:
                probe.cancel()

    async def _any(self, probes: set[asyncio.Task[bool]], seconds: float) -> bool:
        """Whether a probe got through before the time is up or all are to try again."""
        pause = asyncio.create_task(self.wait(seconds))
        try:
            while not pause.done():
                await asyncio.wait({pause, *probes}, return_when=asyncio.FIRST_COMPLETED)
                for probe in [p for p in probes if p.done()]:
                    probes.remove(probe)
                    if probe.result():
                        return True
            return False
        finally:
            pause.cancel()


async def _probe(target: str) -> bool:
    host, _, port = target.rpartition(":")
    try:
        async with asyncio.timeout(PROBE_WITHIN):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, ValueError):  # TimeoutError is the first, a name that cannot be the second
        return False
    writer.close()
    return True
