"""Applies the rows of VXLAN devices: those that were asked for, and what others did to them.

What stands opposite: applier.py does the devices, and calls this; bulk.py knows how.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from agent.datapath.backlog import Backlog
from agent.datapath.bulk import Bulk
from agent.datapath.networks import Networks
from agent.datapath.repairs import Repairs
from agent.drivers.base import DesiredState, Rows

CHUNK = 1000  # MACs and addresses pulled at once: 1 to 2 ms of the loop
AHEAD = 3  # chunks that wait for the thread, so that it has work while the loop is elsewhere


class RowApplier:
    """Those of one host."""

    def __init__(
        self,
        desired: DesiredState,
        networks: Networks,
        bulk: Bulk,
        repairs: Repairs,
        backlog: Callable[[], Backlog],
    ) -> None:
        """`backlog` is what has been noted since the one that is being worked off."""
        self._desired, self._networks, self._bulk = desired, networks, bulk
        self._repairs, self._backlog = repairs, backlog

    async def all(self, vni: int, fresh: bool = False, drift: bool = False) -> None:
        """All rows of a network; of a `fresh` device, which has none. With `drift` what differs
        is that."""
        held = self._networks.held.get(vni)
        if held is None or not held.vxlan:
            return  # a network of this host alone
        rows = self._desired.all_rows(vni)
        if fresh:
            await self._bulk.write(held.vxlan, rows, fresh=True)
            return
        keep = not self._desired.complete()
        backlog = self._backlog()
        asked = backlog.awaits(vni)
        macs, addresses = map(set, backlog.rows.get(vni, ((), ())))  # to be written anyway
        fdb, neighbours = await self._bulk.reconcile(held.vxlan, rows, keep=keep)
        if drift and not asked:
            self._count(vni, len(fdb - macs), len(neighbours - addresses))

    async def write(self, vni: int, macs: list[bytes], addresses: list[bytes]) -> None:
        """The rows of these keys. Chunks are pulled while those before them are written."""
        held = self._networks.held.get(vni)
        if held is None or not held.vxlan:
            return
        keep = not self._desired.complete()
        writing: deque[asyncio.Future[tuple[int, int]]] = deque()
        failures: list[OSError] = []
        for start in range(0, max(len(macs), len(addresses)), CHUNK):
            end = start + CHUNK
            rows = self._desired.rows(vni, macs[start:end], addresses[start:end])
            if len(writing) == AHEAD:
                await _note_failure(writing.popleft(), failures)
            writing.append(self._bulk.write(held.vxlan, rows, keep))
        for each in writing:
            await _note_failure(each, failures)
        if failures:
            raise failures[0]

    # -- what nobody asked for: whatever has to be changed is drift --

    async def restore(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> None:
        """Put rows back that were deleted and are still wanted."""
        held = self._networks.held.get(vni)
        macs, addresses = list(macs), list(addresses)
        if held is None or not held.vxlan:
            return
        for start in range(0, max(len(macs), len(addresses)), CHUNK):
            end = start + CHUNK
            rows = self._not_asked(vni, macs[start:end], addresses[start:end])
            wanted = replace(
                rows,
                fdb=[r for r in rows.fdb if r[1]],
                neighbours=[r for r in rows.neighbours if r[1]],
            )
            self._count(vni, *await self._bulk.restore(held.vxlan, wanted))

    async def correct(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> None:
        """Make rows right that somebody added or changed."""
        held = self._networks.held.get(vni)
        if held is not None and held.vxlan:
            rows = self._not_asked(vni, macs, addresses)
            self._count(vni, *await self._bulk.correct(held.vxlan, rows))

    def _not_asked(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> Rows:
        """The rows of these keys, without those that are about to be written anyway."""
        backlog = self._backlog()
        if backlog.awaits(vni):
            return Rows([], [])
        asked = backlog.rows.get(vni, (set(), set()))
        return self._desired.rows(
            vni, [m for m in macs if m not in asked[0]], [a for a in addresses if a not in asked[1]]
        )

    def _count(self, vni: int, fdb: int, neighbours: int) -> None:
        held = self._networks.held.get(vni)
        network = held.bridge.network if held else ""
        self._repairs.add("fdb", fdb, network)
        self._repairs.add("neighbour", neighbours, network)


async def _note_failure(writing: Awaitable[object], failures: list[OSError]) -> None:
    try:
        await writing
    except OSError as error:
        failures.append(error)
