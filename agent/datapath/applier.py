"""Applies desired values to the kernel, in an order in which nothing is ever let through that
should not be: devices, then rules, then rows.

What stands opposite: reconciler.py says what and when; networks.py, uplink.py, nftables.py
and bulk.py know how.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from agent.datapath import namespaces, nft, sandbox
from agent.datapath.backlog import Failures, Key
from agent.datapath.bulk import Bulk
from agent.datapath.monitor import Monitor
from agent.datapath.netlink import Link, Netlink
from agent.datapath.networks import Networks
from agent.datapath.nftables import Nftables
from agent.datapath.uplink import Uplink
from agent.drivers.base import Bridge, DesiredState, Rows
from agent.errors import VxmeshError

log = structlog.get_logger()

CHUNK = 1000  # MACs and addresses pulled at once: 2 to 4 ms of the loop
MUTED_ROWS = 500  # from so many deleted rows on, their events are not worth hearing


@dataclass(frozen=True, slots=True)
class Look:
    """How closely to look at what should be right already."""

    links: Mapping[str, Link] | None = None  # all devices by name, if they were just read
    interior: bool = False  # into the sandboxes too
    rows: bool = False  # at all rows
    drift: bool = True  # and count as repairs what differs
    gone: Callable[[str], None] | None = None  # told of endpoints whose namespace is gone


class Applier:
    """The parts of one host's kernel state."""

    def __init__(
        self,
        desired: DesiredState,
        netns: Path,
        host_netns: str,
        failures: Failures,
        monitor: Monitor,
    ) -> None:
        """Open what is needed in our namespace and the host's; both must be there."""
        self._desired, self._failures, self._monitor = desired, failures, monitor
        self._netns = netns
        self.repairs: Counter[str] = Counter()
        self.stale_tables = True  # since the rules were loaded, a network came, changed or went
        with contextlib.ExitStack() as stack:
            fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            self._own = stack.enter_context(contextlib.closing(Netlink(netns)))
            self._host = stack.enter_context(contextlib.closing(Netlink(host_netns)))
            self._bulk = stack.enter_context(contextlib.closing(Bulk(netns)))
            self._own_table = stack.enter_context(contextlib.closing(Nftables(netns)))
            self._host_table = stack.enter_context(contextlib.closing(Nftables(host_netns)))
            self.networks = Networks(self._own, self._host, fd, self._bulk, monitor)
            self.uplink = Uplink(self._own, self._host, netns, host_netns)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close; the kernel stays as it is."""
        self._stack.close()

    async def attempt(self, key: Key, work: Coroutine[Any, Any, None], whole: bool = True) -> None:
        """Do it; a failure is noted and tried again later, and stops nothing else.

        Success makes an earlier failure forgotten only if this was the `whole` of it.
        """
        try:
            await work
        except (VxmeshError, OSError) as error:
            self._failures.failed(key, error)
        except Exception as error:
            log.exception("datapath.fault", what=key)
            self._failures.failed(key, error)
        else:
            if whole:
                self._failures.succeeded(key)

    @contextlib.contextmanager
    def counting_repairs(self) -> Iterator[None]:
        """Count the devices that have to be made or mended meanwhile as repairs."""
        self.networks.fixed.clear()
        yield
        self.repairs.update(+self.networks.fixed)

    async def compare(
        self, interior: bool, drift: bool = False, gone: Callable[[str], None] | None = None
    ) -> None:
        """Everything that is desired with everything that is there; see Look."""
        links = await self._own.links()
        bridges = self._desired.bridges()
        await self.networks.sweep(links, bridges.values())
        look = Look({link.name: link for link in links}, interior, True, drift, gone)
        for vni in self.in_turn(self.networks.held.keys() | bridges.keys()):
            await self.attempt(("bridge", vni, ""), self.bridge(vni, look))

    def in_turn(self, vnis: Iterable[int]) -> list[int]:
        """The order in which networks are made so: who gives addresses up before who gets them.

        A network without a bridge first, then those with fewer gateways: two bridges that have
        one address would for a moment take each other's packets.
        """

        def gateways(vni: int) -> int:
            bridge = self._desired.bridge(vni)
            return len(bridge.gateways) if bridge else -1

        return sorted(vnis, key=lambda vni: (gateways(vni), vni))

    async def bridge(self, vni: int, look: Look | None = None) -> None:
        """A network's devices and ports; only what is to change, unless there is a `look`."""
        bridge, held = self._desired.bridge(vni), self.networks.held.get(vni)
        if look is None and self._failures.stands(("bridge", vni, "")):
            look = Look(interior=True, rows=True, drift=False)
        if held and (bridge is None or held.bridge.network != bridge.network):
            self.stale_tables = True
            now = self._renumbered(held.bridge)
            if now is not None:
                await self.attempt(("bridge", now, ""), self.bridge(now, look))
            await self.networks.remove(vni)
            held = None
        if bridge is None:
            if self._failures.forget(vni):
                await self._sweep()
            return
        changed = held is None or _without_ports(held.bridge) != _without_ports(bridge)
        resized = held is not None and held.bridge.mtu != bridge.mtu
        fresh = False
        if changed or look:
            self.stale_tables |= changed
            fresh = await self.networks.ensure(bridge, look.links if look else None)
        before = self.networks.elsewhere(bridge) if changed or look else None
        held = self.networks.held[vni]
        if before is not None:
            # The rows first: then the workloads can go on from the moment that they are moved.
            await self._all_rows(held.vxlan, vni, fresh, False)
            await self.networks.hand_over(before, vni)
            await self.networks.remove(before)
            fresh = False
        if self._failures.forget(vni, bridge.ports):
            await self._sweep()
        for endpoint in held.ports.keys() - bridge.ports.keys():
            await self.networks.detach(vni, endpoint)
        for endpoint, port in bridge.ports.items():
            if not (look or resized) and held.ports.get(endpoint, (None, 0))[0] == port:
                continue
            if look and look.gone and not sandbox.alive(port):
                look.gone(endpoint)
            interior = resized or (look is not None and look.interior)
            attach = self.networks.attach(vni, port, interior, look.links if look else None)
            await self.attempt(("port", vni, endpoint), attach)
        if fresh or (look and look.rows):
            drift = look is not None and look.drift and not fresh
            await self.attempt(("rows", vni, ""), self._all_rows(held.vxlan, vni, fresh, drift))

    def _renumbered(self, held: Bridge) -> int | None:
        """The VNI that a network has now, if it is still to be here and that is free."""
        for vni, bridge in self._desired.bridges().items():
            if bridge.network == held.network:
                return None if vni in self.networks.held else vni
        return None

    async def _all_rows(self, vxlan: int, vni: int, fresh: bool, drift: bool) -> None:
        rows = self._desired.all_rows(vni)
        if fresh:
            await self._bulk.write(vxlan, rows)
        else:
            keep = not self._desired.complete()
            fdb, neighbours = await self._bulk.reconcile(vxlan, rows, keep=keep)
            if drift:
                self._count(fdb=fdb, neighbour=neighbours)

    async def _sweep(self) -> None:
        """Delete what a failed attempt at something no longer wanted may have left."""
        await self.networks.sweep(await self._own.links(), self._desired.bridges().values())

    async def rows(self, vni: int, macs: list[bytes], addresses: list[bytes]) -> None:
        """The rows of these keys. A chunk is written while the next one is pulled."""
        held = self.networks.held.get(vni)
        if held is None:
            return
        many = len(macs) + len(addresses) > MUTED_ROWS
        with self._monitor.muting(held.vxlan) if many else contextlib.nullcontext():
            writing: asyncio.Task[None] | None = None
            for start in range(0, max(len(macs), len(addresses)), CHUNK):
                end = start + CHUNK
                rows = self._desired.rows(vni, macs[start:end], addresses[start:end])
                if writing:
                    await writing
                writing = asyncio.create_task(self._bulk.write(held.vxlan, rows))
                await asyncio.sleep(0)  # let it begin before the next chunk is pulled
            if writing:
                await writing

    async def restore(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> None:
        """Put rows back that were deleted and are still wanted."""
        held = self.networks.held.get(vni)
        if held is None:
            return
        rows = self._desired.rows(vni, macs, addresses)
        wanted = Rows([r for r in rows.fdb if r[1]], [r for r in rows.neighbours if r[1]])
        fdb, neighbours = await self._bulk.restore(held.vxlan, wanted)
        self._count(fdb=fdb, neighbour=neighbours)

    def _count(self, **repairs: int) -> None:
        self.repairs.update(+Counter(repairs))

    async def tables(self) -> None:
        """The rules of both namespaces."""
        self.stale_tables = False  # whatever comes of it: a failure has its own next attempt
        bridges = self._bridges()
        await self._own_table.load(nft.own(bridges))
        await asyncio.to_thread(namespaces.set_sysctls, self._netns, namespaces.FORWARDING)
        await self._host_table.load(nft.host(bridges, self._desired.forwards()))

    async def check_tables(self) -> None:
        """Put rules back that somebody else deleted."""
        for table in (self._own_table, self._host_table):
            self._count(nft=not await table.check())

    async def routes(self) -> None:
        """The host's routes to the networks that may be reached from it."""
        await self.uplink.set_routes(_outward(self._bridges()))

    async def check_routes(self) -> None:
        """The same, against what the host really has."""
        await self.uplink.read_routes()
        self._count(route=await self.uplink.set_routes(_outward(self._bridges())))

    async def mend_uplink(self) -> None:
        """The way out: its devices, addresses and routes."""
        self._count(link=bool(await self.uplink.ensure()))

    def _bridges(self) -> list[Bridge]:
        return [held.bridge for held in self.networks.held.values()]


def prepare(netns: Path) -> None:
    """Make our namespace, unless it is there."""
    namespaces.ensure(netns)
    namespaces.set_sysctls(netns, namespaces.OWN)


def _without_ports(bridge: Bridge) -> Bridge:
    return dataclasses.replace(bridge, ports={})


def _outward(bridges: Iterable[Bridge]) -> list[str]:
    """The subnets that the host has a route to."""
    return [subnet for b in bridges for subnet in b.open_subnets]
