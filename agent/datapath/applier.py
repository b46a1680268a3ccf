"""Applies desired values to the kernel, in an order in which nothing is ever let through that
should not be: what keeps encrypted networks from going out in the clear, devices, rules, rows;
and before a port is made, its guard.

What stands opposite: reconciler.py says what and when; networks.py, uplink.py, nftables.py,
guard.py and bulk.py know how; rowapplier.py, lanapplier.py, serviceapplier.py and
wireguardapplier.py do their parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

import structlog

from agent.datapath import entrance, namespaces, nft, sandbox
from agent.datapath.backlog import Backlog, Failures, Key
from agent.datapath.balancerules import TRACKING
from agent.datapath.bulk import Bulk
from agent.datapath.guard import Guard
from agent.datapath.inspection import Inspection
from agent.datapath.lanapplier import LanApplier
from agent.datapath.lans import Lans
from agent.datapath.look import Look
from agent.datapath.maker import Maker
from agent.datapath.monitor import Monitor
from agent.datapath.netlink import Link, Netlink
from agent.datapath.networks import Held, Networks
from agent.datapath.nft import UPLINK
from agent.datapath.nftables import Nftables
from agent.datapath.refusals import Refusals
from agent.datapath.repairs import Repairs
from agent.datapath.rowapplier import RowApplier
from agent.datapath.serviceapplier import ServiceApplier
from agent.datapath.shortcuts import Shortcuts
from agent.datapath.uplink import Uplink
from agent.datapath.wireguard import Wireguard
from agent.datapath.wireguardapplier import WireguardApplier
from agent.drivers.balancing import FrontendKey
from agent.drivers.base import Bridge, Closed, DesiredState, Port
from agent.errors import VxmeshError

log = structlog.get_logger()

CHECKS = 3  # of all tables in a row, while one was wrong: somebody may go on for ever
NOTHING = (None, 0)  # where there is no port, and our end's index of it


class Applier:
    """The parts of one host's kernel state."""

    def __init__(
        self,
        desired: DesiredState,
        netns: Path,
        host_netns: str,
        failures: Failures,
        monitor: Monitor,
        backlog: Callable[[], Backlog],
        data_port: int,
        wireguard_of: str,
        at_sockets: bool,
        has_shortcuts: bool,
    ) -> None:
        """Open what is needed in our namespace and the host's; both must be there.

        `backlog` is what has been noted since the one that is being worked off; `data_port`
        VXLAN's UDP port, as it is outside WireGuard; `wireguard_of` as for Wireguard, `at_sockets`
        whether services are balanced at connect(2) where that can be, and `has_shortcuts` whether
        frames between sandboxes and other hosts go past the bridge where they can.
        """
        self._desired, self._failures, self._backlog = desired, failures, backlog
        self._path = netns
        self.repairs = Repairs()
        self.stale_tables = True  # since the rules were loaded, a network came, changed or went
        self._forwards = False  # our rules are there, so that we may forward
        self._closed = Closed()  # as it was loaded last
        self._tunnels: set[tuple[str, int]] = set()  # VTEP and port of what is not tracked
        self._balanced = True  # our namespace's rules were loaded for that
        with contextlib.ExitStack() as stack:
            self._fd = fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            self._inode = os.fstat(fd).st_ino
            self._netns = Path(f"/proc/self/fd/{fd}")  # whatever becomes of its own path
            self._own = stack.enter_context(contextlib.closing(Netlink(netns)))
            self._host = stack.enter_context(contextlib.closing(Netlink(host_netns)))
            self._bulk = stack.enter_context(contextlib.closing(Bulk(netns, monitor.muting)))
            monitor.ignore(self._bulk.port)
            self._own_table = stack.enter_context(contextlib.closing(Nftables(self._netns)))
            self._host_table = stack.enter_context(contextlib.closing(Nftables(host_netns)))
            rp_filter = namespaces.get_sysctl(host_netns, "ipv4/conf/all/rp_filter")
            names = entrance.TABLES if entrance.is_possible(rp_filter) else {}
            self._entrances = {
                version: stack.enter_context(contextlib.closing(Nftables(host_netns, table=name)))
                for version, name in names.items()
            }
            self._guard = stack.enter_context(contextlib.closing(Guard(self._netns)))
            self.refusals = Refusals(self._guard, self._host_table)
            maker = stack.enter_context(contextlib.closing(Maker(netns, host_netns)))
            self.networks = Networks(self._own, self._host, fd, maker, self._bulk, monitor)
            self.rows = RowApplier(desired, self.networks, self._bulk, self.repairs, backlog)
            self.lans = Lans(self._host, host_netns)
            self.lan_applier = LanApplier(desired, self.lans, failures, self.repairs, self.attempt)
            self.inspection = Inspection(self.networks, self._bulk)
            self.uplink = Uplink(self._own, self._host, self._netns, host_netns)
            serving = ServiceApplier(
                desired, self.networks, self.rows, self.attempt, self._netns, host_netns, at_sockets
            )
            self.serving = stack.enter_context(contextlib.closing(serving))
            shortcuts = Shortcuts(self._netns, self.networks.held, has_shortcuts)
            self.shortcuts = stack.enter_context(contextlib.closing(shortcuts))
            self.wireguard = WireguardApplier(
                desired,
                Wireguard(self._host, host_netns, netns.parent, wireguard_of),
                stack.enter_context(contextlib.closing(Nftables(host_netns, table=nft.SEALED))),
                self.networks.held,
                failures.items,
                self.repairs,
                lambda: self.uplink.has_ipv6,
                data_port,
            )
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

    async def compare(
        self, interior: bool, drift: bool = False, gone: Callable[[str], None] | None = None
    ) -> None:
        """Everything that is desired with everything that is there; see Look."""
        links = await self._own.links()
        bridges = self._desired.bridges()
        await self.networks.sweep(links, bridges.values())
        await self.attempt(("strangers", 0, ""), self.lan_applier.sweep())
        await self.attempt(("guard", 0, ""), self.guard())
        look = Look({link.name: link for link in links}, interior, True, drift, gone=gone)
        for vni in self.in_turn(self.networks.held.keys() | bridges.keys()):
            if drift:
                await self.mend(vni, look)
            else:
                await self.attempt(("bridge", vni, ""), self.bridge(vni, look))
        await self.lan_applier.compare(look, drift)

    async def guard(self) -> None:
        """All ports that are to be, at once: what they send must not be lost at a restart."""
        closed = self._desired.closed()
        self.stale_tables |= closed != self._closed
        await self._guard.load(self._desired.bridges().values(), closed)

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
        try:
            await self._bridge(vni, look)
        finally:
            self.shortcuts.note(vni, self._desired.bridge(vni))

    async def _bridge(self, vni: int, look: Look | None) -> None:
        if vni in self.lans.held or vni in self.lans.asked or self._desired.lan(vni):
            await self.lan_applier.apply(vni, look)
            if self._desired.lan(vni):
                return
        bridge, held = self._desired.bridge(vni), self.networks.held.get(vni)
        if look is None and self._failures.stands(("bridge", vni, "")):
            look = Look(interior=True, rows=True, drift=False)
        if held and (bridge is None or held.bridge.network != bridge.network):
            self.stale_tables = True
            now = self._renumbered(held.bridge)
            if now is not None:
                await self.attempt(("bridge", now, ""), self.bridge(now, look))
            await self.networks.remove(vni)
            await self._guard.release(vni)
            held = None
        if bridge is None:
            if self._failures.forget(vni):
                await self._sweep()
            return
        if bridge.encrypted and not self.wireguard.is_sealed:
            await self.wireguard.seal()  # or there is no such network here
        changed = held is None or _without_ports(held.bridge) != _without_ports(bridge)
        resized = held is not None and held.bridge.mtu != bridge.mtu
        fresh = False
        before = dict(held.ports) if held else {}
        self.shortcuts.note(vni, bridge)  # the guard forbids from here on
        if changed or look:
            self.stale_tables |= changed
            fresh = await self._ensure(bridge, look.links if look else None)
        else:
            await self._guard.admit(bridge)  # so that no port is ever there without it
        elsewhere = self.networks.elsewhere(bridge) if changed or look else None
        self.stale_tables |= held is not None and _asks_otherwise(held.bridge, bridge)
        held = self.networks.held[vni]
        held.bridge = bridge  # the same, but for its ports
        if elsewhere is not None:
            # The rows first: then the workloads can go on from the moment that they are moved.
            await self.rows.all(vni, fresh)
            self.shortcuts.forget(elsewhere)
            await self.networks.hand_over(elsewhere, vni)
            await self.networks.remove(elsewhere)
            await self._guard.release(elsewhere)
            fresh = False
        if self._failures.forget(vni, bridge.ports):
            await self._sweep()
        self.shortcuts.note(vni)
        await self._ports(held, before, look, resized)
        if changed:
            self.networks.fixed.clear()  # another network than it was is no drift
        if fresh or (look and look.rows):
            drift = look is not None and look.drift and not fresh
            await self.attempt(("rows", vni, ""), self.rows.all(vni, fresh, drift))

    async def _ensure(self, bridge: Bridge, links: Mapping[str, Link] | None) -> bool:
        """A network's devices and, meanwhile, the guard of its ports: both are there before any
        port is. Whether the VXLAN device is new."""
        ensure, admit = self.networks.ensure(bridge, links), self._guard.admit(bridge)
        fresh, admitted = await asyncio.gather(ensure, admit, return_exceptions=True)
        for outcome in (admitted, fresh):
            if isinstance(outcome, BaseException):
                raise outcome
        return fresh is True

    async def _ports(
        self, held: Held, before: Mapping[str, tuple[Port, int]], look: Look | None, resized: bool
    ) -> None:
        """A network's ports, so that they are those of its bridge; of those that are as they
        should be (and were `before`) at none, unless all are to be looked at."""
        vni, wanted = held.bridge.vni, held.bridge.ports
        for endpoint in held.ports.keys() - wanted.keys():
            await self.networks.detach(vni, endpoint)
        await self._guard.release(vni, wanted.keys())
        looked_at = list(wanted.items())
        if look is None and not resized:
            # Those that stay are as a rule the same objects, and cost next to nothing.
            have = held.ports.get
            looked_at = [(e, p) for e, p in wanted.items() if (have(e) or NOTHING)[0] is not p]
        for endpoint, port in looked_at:
            looked = look is not None and (look.only is None or endpoint in look.only)
            if not (looked or resized) and held.ports.get(endpoint, NOTHING)[0] == port:
                continue
            if look and look.gone and not sandbox.alive(port):
                look.gone(endpoint)
            interior = resized or (look is not None and look.interior)
            attach = self.networks.attach(vni, port, interior, look.links if look else None)
            fixed = self.networks.fixed.copy()
            await self.attempt(("port", vni, endpoint), attach)
            self.shortcuts.note_port(vni, endpoint)
            if before.get(endpoint, NOTHING)[0] != port:
                self.networks.fixed = fixed  # it was asked for

    def _renumbered(self, held: Bridge) -> int | None:
        """The VNI that a network has now, if it is still to be here and that is free."""
        for vni, bridge in self._desired.bridges().items():
            if bridge.network == held.network:
                return None if vni in self.networks.held else vni
        return None

    async def _sweep(self) -> None:
        """Delete what a failed attempt at something no longer wanted may have left."""
        await self.networks.sweep(await self._own.links(), self._desired.bridges().values())

    async def tables(self) -> None:
        """The rules of both namespaces."""
        self.stale_tables = False  # whatever comes of it: a failure has its own next attempt
        bridges = self._bridges()
        await self.wireguard.keep_rules()
        balancer = self.serving.balancer
        balanced = not balancer.is_idle
        rules = nft.own(bridges, balanced)
        if nft.asks(rules):
            await self.uplink.answer()
        await self._own_table.load(rules)
        await self._set_sysctls(namespaces.FORWARDING)
        self._forwards = True
        closed = self._desired.closed()
        if closed != self._closed:
            await self._guard.close_off(closed)
        doors = balancer.published()
        if balancer.publishes_ipv6:  # also where no network has an IPv6 way out
            await self.uplink.forward_ipv6()
        forwards, at_once = self._desired.forwards(), not self._entrances
        self._tunnels = nft.tunnels_of(bridges) or self._tunnels
        rules = nft.host(bridges, forwards, closed, doors, at_once, self._tunnels)
        await self._host_table.load(rules)
        for version, table in self._entrances.items():
            await table.load(entrance.ruleset(version, doors))
        self._closed, self._balanced = closed, balanced
        await balancer.retire()  # now nothing leads there any more
        opened, self.serving.opened = self.serving.opened, set()
        await self.serving.connections.forget(opened)

    async def services(self, keys: Collection[FrontendKey] | None = None) -> None:
        """Services as the frontends of these keys say, or as all there are; and the ways back.

        To be called also when ports came or went.
        """
        if keys is None:
            with contextlib.suppress(FileNotFoundError):  # a kernel without connection tracking
                await self._set_sysctls(TRACKING)
        try:
            await self.serving.apply(keys)
        finally:
            self.stale_tables |= self.serving.are_rules_stale
            self.stale_tables |= self._balanced == self.serving.balancer.is_idle
            self.serving.are_rules_stale = False

    async def routes(self) -> None:
        """The host's routes to the networks that may be reached from it."""
        await self.uplink.set_routes(_outward(self._bridges()))

    # -- what nobody asked for: whatever has to be changed is drift --

    async def mend(self, vni: int, look: Look) -> None:
        """A network's devices and ports, and as `look` says."""
        held = self.networks.held.get(vni)
        if held and self._forwards:
            device = self._set_sysctls(namespaces.of_device(held.bridge.device))
            with contextlib.suppress(FileNotFoundError):  # the device is about to be made again
                self.repairs.add("sysctl", await device, held.bridge.network)
        self.networks.fixed.clear()
        await self.attempt(("bridge", vni, ""), self.bridge(vni, look))
        held = self.networks.held.get(vni)
        for kind, count in self.networks.fixed.items() if held else ():
            self.repairs.add(kind, count, held.bridge.network if held else "")

    async def audit(self, vni: int) -> None:
        """All of a network. As a rule all is right, which a few requests in a thread tell."""
        if vni in self.lans.held:
            await self.lan_applier.mend(vni, Look(interior=True))
            return
        held = self.networks.held.get(vni)
        if held is None:
            return
        if self._failures.stands(("bridge", vni, "")) or not await self.inspection.audit(vni):
            await self.mend(vni, Look(rows=True))
            return
        if self._forwards:
            device = self._set_sysctls(namespaces.of_device(held.bridge.device))
            self.repairs.add("sysctl", await device, held.bridge.network)
        await self.rows.all(vni, drift=True)
        self.repairs.add("port", await self.serving.ways_back.audit(vni), held.bridge.network)

    def is_bound(self) -> bool:
        """Whether our namespace is at its path."""
        return namespaces.inode(self._path) == self._inode

    async def check_namespace(self) -> None:
        """Our namespace at its path: we hold it, so nothing is lost when that goes."""
        if not self.is_bound():
            await asyncio.to_thread(namespaces.bind, self._fd, self._path)
            self.repairs.add("namespace")

    async def check_strangers(self) -> None:
        """Delete devices that bear our mark and are not those that we made: renamed ones."""
        if await self.inspection.has_strangers():
            await self._sweep()

    async def check_tables(self, told: bool) -> None:
        """Rules that somebody else changed; `told` as for Nftables.check.

        Who changes several of our tables may have come to one just after it was looked at: when
        one was wrong, all are looked at again before anything is called repaired.
        """
        ours = (self.wireguard.table, self._guard.table, self._own_table, self._host_table)
        tables = (*ours, self.serving.balancer.table, *self._entrances.values())
        total = 0
        for _ in range(CHECKS):
            wrong = [table for table in tables if not await table.check(told)]
            total, told = total + len(wrong), False
            if not wrong:
                break
        self.repairs.add("nft", total)

    async def check_sockets(self) -> None:
        """The programs and maps that balance at connect(2)."""
        self.repairs.add("bpf", await self.serving.sockets.audit())

    async def begin_shortcuts(self) -> None:
        """Make ways past the bridge possible, if they can be; before any device is made."""
        await asyncio.to_thread(self.shortcuts.open)
        if self.shortcuts.is_on:
            self.networks.keep_places()

    async def check_shortcuts(self) -> None:
        """The programs and maps of ways past the bridge."""
        self.repairs.add("bpf", await self.shortcuts.audit())

    async def check_routes(self) -> None:
        """The host's routes to our networks, against what it really has."""
        await self.uplink.read_routes()
        self.repairs.add("route", await self.uplink.set_routes(_outward(self._bridges())))

    async def check_sysctls(self) -> None:
        """Those of our namespace, and what we need of the host's."""
        values = {**namespaces.OWN, **(namespaces.FORWARDING if self._forwards else {})}
        changed = await self._set_sysctls(values)
        with contextlib.suppress(FileNotFoundError):  # the uplink is gone, and an event says so
            if self._forwards:
                changed += await self._set_sysctls(namespaces.of_device(UPLINK))
            changed += await self.uplink.set_sysctls()
        self.repairs.add("sysctl", changed)

    async def mend_uplink(self) -> None:
        """The way out: its devices, addresses and routes."""
        index = self.uplink.host_index
        for kind, count in (await self.uplink.ensure()).items():
            self.repairs.add(kind, count)
        if self.uplink.host_index != index:
            for table in self._entrances.values():
                await table.check(told=True)  # `dup` leads to a device by its index

    async def _set_sysctls(self, values: Mapping[str, str]) -> int:
        return await asyncio.to_thread(namespaces.set_sysctls, self._netns, values)

    def _bridges(self) -> list[Bridge]:
        return [held.bridge for held in self.networks.held.values()]


def prepare(netns: Path) -> None:
    """Make our namespace, unless it is there."""
    namespaces.ensure(netns)
    namespaces.set_sysctls(netns, namespaces.OWN)


def _asks_otherwise(before: Bridge, now: Bridge) -> bool:
    """Whether other containers of engines ask from a bridge; looking at what differs only."""
    gone = [port for e, port in before.ports.items() if now.ports.get(e) is not port]
    come = [port for e, port in now.ports.items() if before.ports.get(e) is not port]
    return nft.askers(gone) != nft.askers(come)


def _without_ports(bridge: Bridge) -> Bridge:
    return dataclasses.replace(bridge, ports={})


def _outward(bridges: Iterable[Bridge]) -> list[str]:
    """The subnets that the host has a route to."""
    return [subnet for b in bridges for subnet in b.open_subnets]
