"""The interfaces of networks that are straight on a wire of the host's: macvlan and ipvlan.

    sandbox eth0 ─┐
    sandbox eth0 ─┼─ parent (eth1, or its VLAN sub-interface eth1.20) ─── the wire
    host vxh…    ─┘

Their parent is the host's own, so nothing of them is in our namespace and no event tells of what
becomes of them in the sandboxes: the background looks.
What stands opposite: applier.py, which says when. Every method is idempotent.
Source: Linux drivers/net/macvlan.c, drivers/net/ipvlan, net/8021q.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field

from agent.datapath import namespaces, nameway, sandbox
from agent.datapath.backlog import Passing
from agent.datapath.netlink import Link, Netlink
from agent.datapath.sandbox import MARK
from agent.drivers.base import HostSide, Lan, Port
from agent.errors import Conflict, NotFound, Unsupported, VxmeshError
from agent.lanmodel import PASSTHRU
from agent.notation import format_mac

VLAN_MARK = f"{MARK}vlan"  # of a sub-interface, which several networks may share
VLAN_NAME = "vxv"  # how its name begins until it has the mark; then index of the trunk.VLAN
HOST_MARK = f"{MARK}host:"
ABSENT = (errno.EOPNOTSUPP, errno.ENODEV, errno.ENOENT)  # the kernel knows no such kind of device
# So that it answers for its own address alone, and peers go on reaching the parent's there.
HOST_SYSCTLS = {"ipv4/conf/{}/arp_ignore": "1"}

Furnish = Callable[[int, Port, int, int, Port | None], Awaitable[int]]


@dataclass(slots=True)
class HeldLan:
    """One network as it was made."""

    lan: Lan  # its `ports` are not looked at; those below are
    index: int  # of the parent
    mtu: int  # of the interfaces
    ports: dict[str, Port] = field(default_factory=dict)


class Lans:
    """All that is held. `fixed` counts by kind what had to be made or put right."""

    def __init__(self, host: Netlink, host_netns: str, furnish: Furnish = sandbox.furnish) -> None:
        """`host` is the host's namespace, at path `host_netns`."""
        self._host, self._host_netns, self._furnish = host, host_netns, furnish
        self.held: dict[int, HeldLan] = {}
        # By VNI and endpoint what may be in sandboxes, be its network held or not.
        self.asked: dict[int, dict[str, Port]] = {}
        self.fixed: Counter[str] = Counter()

    async def ensure(self, lan: Lan) -> None:
        """Make what a network's interfaces hang on so, and the host's own interface.

        NotFound if the host has no such device; Unsupported, Conflict, OSError.
        """
        parent = await self._parent(lan)
        if not parent.up:
            raise Conflict(
                f"parent {lan.parent} of network {lan.name}",
                "is down",
                f"Set it up: ip link set {lan.parent} up",
            )
        mtu = lan.mtu or parent.mtu
        if mtu > parent.mtu:
            raise Conflict(
                f"MTU {lan.mtu} of network {lan.name}",
                f"is more than {lan.parent} of this host has, {parent.mtu}",
                "Raise that, or make the network anew with less",
            )
        held = self.held.get(lan.vni)
        if lan.mode == PASSTHRU and not (held and held.ports):
            await self._check_unused(lan, parent)
        ports = held.ports if held and held.index == parent.index else {}
        before = held.lan.host_side if held else None
        self.held[lan.vni] = HeldLan(lan, parent.index, mtu, ports)
        if before and (lan.host_side is None or before.device != lan.host_side.device):
            await self._delete(before.device, f"{HOST_MARK}{before.endpoint}")
        if lan.host_side:
            await self._host_side(lan, lan.host_side, parent.index, mtu)

    async def _parent(self, lan: Lan) -> Link:
        link = await self._host.link(lan.parent)
        if link is None and lan.vlan:
            link = await self._make_vlan(lan)
        if link is None:
            raise NotFound(
                f"parent {lan.parent} of network {lan.name}",
                "is not on this host",
                "Make it, or make endpoints on hosts that have it",
            )
        if link.alias == VLAN_MARK and not link.up:
            await self._host.set_link(link.index, state="up")
            self.fixed["link"] += 1
            link = await self._host.link(lan.parent) or link
        return link

    async def _make_vlan(self, lan: Lan) -> Link | None:
        trunk = await self._host.link(lan.trunk)
        if trunk is None:
            return None
        # Under a name of ours until it has the mark: whenever the agent is killed in between, it
        # is found again by the one or the other.
        name = f"{VLAN_NAME}{trunk.index}.{lan.vlan}"
        left = await self._host.link(name)
        if left is not None:
            await self._host.delete_link(left.index)
        try:
            await self._host.add_vlan(name, trunk.index, lan.vlan)
        except FileExistsError:
            raise Conflict(
                f"VLAN {lan.vlan} of device {lan.trunk}",
                "has a sub-interface of another name",
                f"Give network {lan.name} that one as its parent",
            ) from None
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            raise Unsupported(
                f"parent {lan.parent} of network {lan.name}",
                "is a VLAN sub-interface to be made, and this host's kernel has no VLANs (8021q)",
                f"Try 'modprobe 8021q', or make {lan.parent} there in another way",
            ) from None
        index = await self._host.index(name)
        await self._host.set_link(index, ifalias=VLAN_MARK)
        await self._host.set_link(index, ifname=lan.parent)
        await self._host.set_link(index, state="up")
        self.fixed["link"] += 1
        return await self._host.link(lan.parent)

    async def _check_unused(self, lan: Lan, parent: Link) -> None:
        """Conflict if the host itself speaks through a parent that is to be one workload's."""
        for address in await self._host.addresses(parent.index):
            if not address.startswith("fe80:"):
                raise Conflict(
                    f"device {lan.parent}",
                    f"has address {address} of this host, which mode passthru would cut off",
                    f"Give network {lan.name} a parent that the host does not use itself",
                )

    # -- the host's own interface --

    async def _host_side(self, lan: Lan, side: HostSide, parent: int, mtu: int) -> None:
        mark, mac = f"{HOST_MARK}{side.endpoint}", format_mac(side.mac) if side.mac else ""
        link = await self._host.link(side.device)
        if link and not (
            link.kind == lan.kind and link.alias in (mark, "") and link.peer == parent
        ):
            await self._delete(side.device, mark)
            link = None
        if link is None:
            await self._add(lan, side.device, parent, mtu, mac)
            link = await self._host.link(side.device)
            assert link is not None
            self.fixed["link"] += 1
        wrong: dict[str, object] = {}
        if link.alias != mark:
            wrong["ifalias"] = mark
        if link.mtu != mtu:
            wrong["mtu"] = mtu
        if mac and link.mac != mac:
            wrong["address"] = mac
        if wrong:
            await self._host.set_link(link.index, **wrong)
        sysctls = {name.format(side.device): value for name, value in HOST_SYSCTLS.items()}
        await asyncio.to_thread(namespaces.set_sysctls, self._host_netns, sysctls)
        if not link.up:
            await self._host.set_link(link.index, state="up")
        have = {a.partition("/")[0] for a in await self._host.addresses(link.index)}
        for address in side.addresses:
            if address not in have:
                await self._host.add_host_address(link.index, address)
                self.fixed["address"] += 1
        await self._routes(lan, side, link.index)

    async def _routes(self, lan: Lan, side: HostSide, index: int) -> None:
        """Each workload here is reached by it: by the parent, which has the subnet, it is not."""
        sources = {":" in address: address for address in side.addresses}
        wanted = {}
        for port in lan.ports.values():
            for interface in port.addresses:
                address = interface.partition("/")[0]
                if (":" in address) in sources:
                    length = 128 if ":" in address else 32
                    wanted[f"{address}/{length}"] = sources[":" in address]
        have = {r.destination: r.source for r in await self._host.routes() if r.device == index}
        for destination in have.keys() - wanted.keys():
            await self._host.delete_route(destination, "", index)
        for destination, source in wanted.items():
            if have.get(destination) != source:
                await self._host.set_route(destination, index, source)
                self.fixed["route"] += 1

    # -- the sandboxes' --

    async def attach(self, vni: int, port: Port) -> None:
        """Make an interface of a sandbox so. NotFound, Invalid, Conflict, Unsupported, OSError."""
        held = self.held[vni]
        self.asked.setdefault(vni, {})[port.endpoint] = port
        old = held.ports.get(port.endpoint)
        if old and _identity(old) != _identity(port):
            await sandbox.remove(old, held.index)
            del held.ports[port.endpoint]
            old = None
        if held.lan.mode == PASSTHRU and held.ports.keys() - {port.endpoint}:
            raise Conflict(
                f"network {held.lan.name}",
                f"has a workload on this host, which in mode passthru has {held.lan.parent} alone",
                "Use mode bridge, or another host",
            )
        fd = sandbox.open_netns(port)
        try:
            if old is None:
                await nameway.furnish(fd)
            else:
                self.fixed["nft"] += await nameway.audit(fd)
            try:
                self.fixed["port"] += bool(await self._furnished(held, port, fd, old))
            except LookupError:
                await self._create(held, port, fd)
        finally:
            os.close(fd)
        held.ports[port.endpoint] = port

    async def _create(self, held: HeldLan, port: Port, fd: int) -> None:
        mac = format_mac(port.mac) if port.mac else ""
        await sandbox.remove(port, held.index)  # what cannot be made right
        try:
            await self._add(held.lan, port.ifname, held.index, held.mtu, mac, fd)
        except FileExistsError:
            raise sandbox.taken(port) from None
        try:
            await sandbox.mark(fd, port)
            await self._furnished(held, port, fd, None)
        except BaseException:
            await sandbox.remove(port, held.index)  # nothing is left half made
            raise
        self.fixed["port"] += 1

    async def _furnished(self, held: HeldLan, port: Port, fd: int, old: Port | None) -> int:
        """As `furnish`; Passing if another interface on the parent has its MAC.

        The one that had its address and so its MAC before may be in a namespace that nobody is
        in any more, and that the kernel has not yet taken apart.
        """
        try:
            return await self._furnish(fd, port, held.mtu, held.index, old)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise Passing(
                f"MAC {format_mac(port.mac)}",
                f"is that of another interface on {held.lan.parent}",
                "Give the endpoint another one with --mac",
            ) from None

    async def _add(
        self, lan: Lan, name: str, parent: int, mtu: int, mac: str, fd: int = -1
    ) -> None:
        """The device itself, in the namespace of `fd`; -1: the host's."""
        own = fd if fd >= 0 else os.open(self._host_netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await self._host.add_sharing(lan.kind, lan.mode, name, parent, own, mtu, mac)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno in ABSENT:
                raise Unsupported(
                    f"network {lan.name}",
                    f"is of driver {lan.kind}, which this host's kernel has not",
                    f"Try 'modprobe {lan.kind}', or make endpoints on hosts that have it",
                ) from None
            if error.errno in (errno.EBUSY, errno.EINVAL):
                raise Conflict(
                    f"device {lan.parent}",
                    f"takes no {lan.kind} interface: it is part of a bridge or bond, or carries "
                    "some of another kind or mode",
                    f"See 'ip -d link', and give network {lan.name} another parent",
                ) from None
            raise
        finally:
            if fd < 0:
                os.close(own)

    def note(self, lan: Lan) -> None:
        """The interfaces that a network is about to have: they are taken away again even if the
        network cannot be made here now, as after a start while its parent is down."""
        if lan.ports:
            self.asked.setdefault(lan.vni, {}).update(lan.ports)

    async def prune(self, vni: int, wanted: Collection[str]) -> None:
        """Delete the sandboxes' interfaces of a network that are none of the `wanted` endpoints'.
        What cannot be deleted is known on."""
        held, asked = self.held.get(vni), self.asked.get(vni, {})
        for endpoint in asked.keys() - set(wanted):
            elsewhere = any(endpoint in ports for v, ports in self.asked.items() if v != vni)
            port = (held.ports.get(endpoint) if held else None) or asked[endpoint]
            if not elsewhere:
                await self._let_go(port, held.index if held else 0)
            del asked[endpoint]
            if held:
                held.ports.pop(endpoint, None)
        if not asked:
            self.asked.pop(vni, None)

    async def remove(self, vni: int) -> None:
        """Delete all of a network; its sub-interface is `sweep`'s."""
        await self.prune(vni, ())
        held = self.held.get(vni)
        if held is None:
            return
        side = held.lan.host_side
        if side:
            await self._delete(side.device, f"{HOST_MARK}{side.endpoint}")
        del self.held[vni]

    async def sweep_sandboxes(self, vni: int, wanted: Collection[str]) -> None:
        """Delete what bears our mark beside the interfaces of a network and is of no endpoint of
        `wanted`, which are those of all networks."""
        held = self.held.get(vni)
        places = {port.inode: port for port in held.ports.values()} if held else {}
        for port in places.values():
            with contextlib.suppress(VxmeshError):  # the sandbox is gone, or going
                self.fixed["link"] += await sandbox.sweep(port, wanted)

    async def _let_go(self, port: Port, parent: int) -> None:
        """Delete a sandbox's interface, and with the last one the way to the name server."""
        await sandbox.remove(port, parent)
        others = (o for ports in self.asked.values() for o in ports.values())
        if any(o.inode == port.inode and o.endpoint != port.endpoint for o in others):
            return
        with contextlib.suppress(VxmeshError, OSError):  # the sandbox is gone, or going
            fd = sandbox.open_netns(port)
            try:
                await nameway.clear(fd)
            finally:
                os.close(fd)

    def renumber(self, old: int, new: int) -> None:
        """A network goes by another VNI now, which changes nothing in the kernel."""
        self.held[new] = self.held.pop(old)
        if old in self.asked:
            self.asked[new] = self.asked.pop(old)

    async def sweep(self, wanted: Collection[Lan]) -> None:
        """Delete what bears our mark on the host and serves no network of `wanted`."""
        keep = {lan.parent for lan in wanted}
        keep |= {lan.host_side.device for lan in wanted if lan.host_side}
        for link in await self._host.links():
            if _is_ours(link) and link.name not in keep:
                await self._host.delete_link(link.index)

    async def _delete(self, device: str, mark: str) -> None:
        link = await self._host.link(device)
        if link is None:
            return
        if link.alias not in (mark, ""):
            raise Conflict(f"device {device}", "is there and is not ours", "Delete it")
        await self._host.delete_link(link.index)

    def dead(self) -> Iterable[str]:
        """The endpoints whose sandbox's namespace is gone."""
        return [
            endpoint
            for held in self.held.values()
            for endpoint, port in held.ports.items()
            if not sandbox.alive(port)
        ]


async def remove_all(host: Netlink) -> None:
    """Delete what we made in the host's namespace for such networks."""
    for link in await host.links():
        if _is_ours(link):
            await host.delete_link(link.index)


def _is_ours(link: Link) -> bool:
    """Whether a device in the host's namespace is one of ours, be it made half."""
    unmarked = link.kind == "vlan" and link.name.startswith(VLAN_NAME) and not link.alias
    return link.alias == VLAN_MARK or link.alias.startswith(HOST_MARK) or unmarked


def _identity(port: Port) -> tuple[object, ...]:
    """What cannot be changed about an interface that is there."""
    return port.netns, port.inode, port.ifname, port.kind
