"""Ends the connections of sandboxes that were led to a backend at connect(2), and which is gone.

Nothing on the way knows of them: what tells them apart is the socket's mark, which stays with it
whatever becomes of the agent (socketprograms.py). What stands opposite: connections.py does the
same for those that the rules balance; sockdiag.py knows how.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from agent.datapath import sandbox, sockdiag
from agent.datapath.balancer import Way
from agent.datapath.networks import Held
from agent.datapath.sockdiag import Socket
from agent.datapath.socketmaps import entry, mark
from agent.drivers.base import Port
from agent.drivers.marks import LED, LED_MASK
from agent.notation import holds

log = structlog.get_logger()

# s after which those are looked for once more whose program had chosen the backend just before it
# was no longer to be chosen, and which had not begun to connect.
STRAGGLERS = 0.2
FAILURES = 5  # looks in vain, each four times later, until it is left to the next start
TOGETHER = 64  # sandboxes of which sockets are open at once

Led = tuple[int, bytes]  # mark, entry of the backend
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Sought:
    """What is to be ended."""

    vip: bytes
    due: float  # when it is to be looked for, by the clock
    is_second: bool = False  # it has been looked for everywhere
    failures: int = 0  # looks that could not be had everywhere


class LedSockets:
    """Those of one host's sandboxes."""

    def __init__(
        self,
        held: Mapping[int, Held],
        known: Callable[[Collection[bytes]], Iterable[Way]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`held` are the networks as they are; `known` tells the ways there are by these VIPs."""
        self._held, self._known, self._clock = held, known, clock
        self._gone: dict[Led, _Sought] = {}
        self._is_possible = False  # this kernel has been seen to be able to
        self._told = ""  # the last error, which is not told twice in a row
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """End no more: the next start's compare does."""
        if self._task:
            self._task.cancel()

    def end(self, gone: Iterable[Way]) -> None:
        """Have those end that go by one of these ways. Nobody waits for it: a look into a sandbox
        takes the kernel some 2 ms, and what goes meanwhile is looked for all at once."""
        now = self._clock()
        new = {_led(way): _Sought(way.entry, now) for way in gone if way.protocol == "tcp"}
        if not new:
            return
        self._gone |= new
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._gone:
            self._wake.clear()
            now = self._clock()
            if due := {led: one for led, one in self._gone.items() if one.due <= now}:
                is_whole = await self._look(due)
                for led, one in due.items():
                    if self._gone.get(led) is one:  # and was not told anew meanwhile
                        del self._gone[led]
                        if again := _again(one, is_whole, now):
                            self._gone[led] = again
                continue
            next_one = min(one.due for one in self._gone.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(next_one - now):
                    await self._wake.wait()

    async def _look(self, due: Mapping[Led, _Sought]) -> bool:
        """End these; whether all sandboxes could be looked at."""
        vips = {one.vip for one in due.values()}
        # What is back meanwhile is left alone.
        sought = due.keys() - map(_led, self._known(vips))
        vnis = [
            vni
            for vni, held in self._held.items()
            if sought and any(holds(held.bridge.subnets, vip) for vip in vips)
        ]
        return await self._end(vnis, lambda one: _of(one) in sought)

    async def end_others(self, known: Iterable[Way]) -> None:
        """End those that were led and go by none of these ways: a start's compare.

        The accepting end of a connection within one sandbox may have the mark of the other one,
        and is left alone: it ends with that.
        """
        led = {_led(way) for way in known if way.protocol == "tcp"}
        await self._end(self._held, lambda one: _of(one) not in led and one.source != one.target)

    async def _end(self, vnis: Iterable[int], ends: Callable[[Socket], bool]) -> bool:
        """Those that have a mark of ours, in the sandboxes of some networks; whether all could be
        looked at. An agent before this one may have led some, so it matters not whether this one
        does."""
        held = [self._held[vni] for vni in vnis if vni in self._held]
        ports = {
            (inside.netns, inside.inode): inside
            for each in held
            for port, _ in each.ports.values()
            if (inside := port.inside)
        }
        if not ports:
            return True
        try:
            if not self._is_possible:
                await asyncio.to_thread(sockdiag.check_possible)
                self._is_possible = True
            count, errors = await asyncio.to_thread(_end_in, list(ports.values()), ends)
        except OSError as error:
            count, errors = 0, [error]
        if count:
            log.info("datapath.sockets_ended", count=count)
        told = str(errors[-1]) if errors else ""
        if told and told != self._told:
            log.warning("datapath.sockets_not_ended", error=told, times=len(errors))
        self._told = told
        return not errors


def _again(one: _Sought, is_whole: bool, now: float) -> _Sought | None:
    """What is to be looked for after a look that began at `now`."""
    if is_whole:
        return None if one.is_second else _Sought(one.vip, now + STRAGGLERS, True)
    if one.failures == FAILURES:
        return None
    due = now + STRAGGLERS * 4**one.failures
    return _Sought(one.vip, due, one.is_second, one.failures + 1)


def _end_in(ports: Sequence[Port], ends: Callable[[Socket], bool]) -> tuple[int, list[OSError]]:
    """How many were ended, and what stood in the way, which keeps no other sandbox from it."""
    ended, errors = 0, list[OSError]()
    for start in range(0, len(ports), TOGETHER):
        some = ports[start : start + TOGETHER]
        for diag in sandbox.in_namespaces(some, lambda port: _open()):
            if isinstance(diag, OSError):
                errors.append(diag)
                continue
            with diag:
                for family in (socket.AF_INET, socket.AF_INET6):
                    try:
                        found = list(filter(ends, sockdiag.find(diag, family, LED, LED_MASK)))
                        ended += sockdiag.destroy(diag, found)
                    except OSError as error:
                        errors.append(error)
                        if isinstance(error, TimeoutError):
                            break  # what it answers later would be taken for another answer
    return ended, errors


def _open() -> socket.socket | OSError:
    try:
        return sockdiag.open_here()
    except OSError as error:
        return error


def _led(way: Way) -> Led:
    return mark(way.entry, way.entry_port), entry(way.backend, way.backend_port)


def _of(one: Socket) -> Led:
    return one.mark, entry(one.target, one.target_port)
