"""Ends the connections of sandboxes that were led to a backend at connect(2), and which is gone.

Nothing on the way knows of them: what tells them apart is the socket's mark, which stays with it
whatever becomes of the agent (socketprograms.py). What stands opposite: connections.py does the
same for those that the rules balance; sockdiag.py knows how.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import structlog

from agent.datapath import sandbox, sockdiag
from agent.datapath.balancer import Way
from agent.datapath.networks import Held
from agent.datapath.sockdiag import Socket
from agent.datapath.socketmaps import entry, mark
from agent.drivers.base import Port
from agent.drivers.marks import LED, LED_MASK
from agent.errors import VxmeshError
from agent.model import holds
from agent.syscalls import CLONE_NEWNET, in_thread, setns

log = structlog.get_logger()

# s after which those are looked for once more whose program had chosen the backend just before it
# was no longer to be chosen, and which had not begun to connect.
STRAGGLERS = 0.2
TOGETHER = 64  # sandboxes of which sockets are open at once

Led = tuple[int, bytes]  # mark, entry of the backend
T = TypeVar("T")


class LedSockets:
    """Those of one host's sandboxes."""

    def __init__(
        self, held: Mapping[int, Held], known: Callable[[Collection[bytes]], Iterable[Way]]
    ) -> None:
        """`held` are the networks as they are; `known` tells the ways there are by these VIPs."""
        self._held, self._known = held, known
        self._gone: dict[Led, bytes] = {}  # which are to be ended -> VIP
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """End no more: the next start's compare does."""
        if self._task:
            self._task.cancel()

    def end(self, gone: Iterable[Way]) -> None:
        """Have those end that go by one of these ways. Nobody waits for it: a look into a sandbox
        takes the kernel some 2 ms, and what goes meanwhile is looked for all at once."""
        new = {_led(way): way.entry for way in gone if way.protocol == "tcp"}
        if not new:
            return
        self._gone |= new
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        late: dict[Led, bytes] = {}
        while self._gone or late:
            self._wake.clear()
            new, self._gone = self._gone, {}
            vips = set((late | new).values())
            # What is back meanwhile is left alone.
            sought = (late | new).keys() - map(_led, self._known(vips))
            vnis = [
                vni
                for vni, held in self._held.items()
                if sought and any(holds(held.bridge.subnets, vip) for vip in vips)
            ]
            try:
                await self._end(vnis, lambda one: _of(one) in sought)  # noqa: B023
            except OSError as error:
                log.warning("datapath.sockets_not_ended", error=str(error))
            late = new
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STRAGGLERS if late else 0):
                    await self._wake.wait()

    async def end_others(self, known: Iterable[Way]) -> None:
        """End those that were led and go by none of these ways: a start's compare.

        The accepting end of a connection within one sandbox may have the mark of the other one,
        and is left alone: it ends with that.
        """
        led = {_led(way) for way in known if way.protocol == "tcp"}
        await self._end(self._held, lambda one: _of(one) not in led and one.source != one.target)

    async def _end(self, vnis: Iterable[int], ends: Callable[[Socket], bool]) -> None:
        """Those that have a mark of ours, in the sandboxes of some networks."""
        held = [self._held[vni] for vni in vnis if vni in self._held]
        ports = {
            (inside.netns, inside.inode): inside
            for each in held
            for port, _ in each.ports.values()
            if (inside := port.inside)
        }
        if ports:
            count = await asyncio.to_thread(_end_in, list(ports.values()), ends)
            if count:
                log.info("datapath.sockets_ended", count=count)


def _end_in(ports: Sequence[Port], ends: Callable[[Socket], bool]) -> int:
    ended = 0
    for start in range(0, len(ports), TOGETHER):
        some = ports[start : start + TOGETHER]
        for diag in in_namespaces(some, lambda port: sockdiag.open_here()):
            with diag:
                for family in (socket.AF_INET, socket.AF_INET6):
                    found = list(filter(ends, sockdiag.find(diag, family, LED, LED_MASK)))
                    ended += sockdiag.destroy(diag, found)
    return ended


def in_namespaces(ports: Collection[Port], make: Callable[[Port], T]) -> list[T]:
    """What `make` gives in the namespace of each port; those that are gone are left out."""

    def work() -> list[T]:
        found = []
        for port in ports:
            with contextlib.suppress(VxmeshError, OSError):
                fd = sandbox.open_netns(port)
                try:
                    setns(fd, CLONE_NEWNET)
                finally:
                    os.close(fd)
                found.append(make(port))
        return found

    return in_thread(work)


def _led(way: Way) -> Led:
    return mark(way.entry, way.entry_port), entry(way.backend, way.backend_port)


def _of(one: Socket) -> Led:
    return one.mark, entry(one.target, one.target_port)
