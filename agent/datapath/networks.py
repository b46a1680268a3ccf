"""The devices of overlay networks in our namespace: bridge, VXLAN device, ports.

    sandbox eth0 === vxp... - vxb<vni> - vxl<vni> ... the other hosts' VTEPs

Unicast for a MAC that is here goes to its port by a static entry; all other unicast goes to
the VXLAN device and to nothing else, and what its rows do not lead on is dropped there. Where the
network floods (drivers/flooding.py) only unicast that the device has a row for goes to it.
What stands opposite: reconciler.py, which says when. Every method is idempotent.
Source: Linux net/bridge (br_port_flags), drivers/net/vxlan.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.datapath import sandbox
from agent.datapath.bulk import Bulk
from agent.datapath.maker import Maker
from agent.datapath.monitor import Monitor
from agent.datapath.netlink import Link, Netlink
from agent.datapath.packing import Defaults
from agent.datapath.sandbox import ENDPOINT_MARK, MARK, NETWORK_MARK
from agent.drivers.base import Bridge, Port
from agent.errors import Conflict
from agent.notation import format_address, format_mac

FORWARDING_ATTEMPTS = 100  # of 1 ms; as a rule one is enough
LINK_LOCAL = bytes([0xFE, 0x80]) + bytes(6)
# Where others keep namespaces by name: searched when another VXLAN device has our VNI.
ELSEWHERE = (Path("/run/netns"), Path("/run/docker/netns"))


@dataclass(slots=True)
class Held:
    """One network as it was made."""

    bridge: Bridge  # of its `ports` only who asks (nft.py); those below are made
    index: int
    vxlan: int  # 0: none
    ports: dict[str, tuple[Port, int]] = field(default_factory=dict)  # and our end's index


class Networks:
    """All that is held. `fixed` counts by kind what had to be made or put right."""

    def __init__(
        self,
        own: Netlink,
        host: Netlink,
        own_fd: int,
        maker: Maker,
        bulk: Bulk,
        monitor: Monitor,
    ) -> None:
        self._own, self._host, self._own_fd = own, host, own_fd
        self._maker, self._bulk, self._monitor = maker, bulk, monitor
        self.held: dict[int, Held] = {}
        self.devices: dict[int, tuple[int, str]] = {}  # index -> VNI, endpoint or ""
        self.fixed: Counter[str] = Counter()

    def keep_places(self) -> None:
        """Devices are made with a place for programs from now on (shortcuts.py)."""
        self._maker.places = True

    def note_defaults(self, vxlan: int, seen: Defaults) -> None:
        """Default rows of a device came or went."""
        self._bulk.note_defaults(vxlan, seen)

    # -- bridge and VXLAN device --

    async def ensure(self, bridge: Bridge, links: Mapping[str, Link] | None = None) -> bool:
        """Make a network's bridge and VXLAN device so; True if the latter is new, without rows.

        `links` are all devices by name, if they were just read. Conflict, OSError.
        """
        held = self.held.get(bridge.vni)
        made = None
        if held is None and not (links and {bridge.device, bridge.vxlan} & links.keys()):
            made = await self._make(bridge)
            links = None  # what there is by now, whatever there was
        if made:
            (index, vxlan), fresh = made, bool(bridge.vxlan)
        else:
            index, vxlan, fresh = await self._look_at(bridge, links)
        if held and held.index != index:
            # The ports of a bridge that was deleted are on none; attaching finds them again.
            for _, port_index in held.ports.values():
                self.devices.pop(port_index, None)
            held.ports.clear()
        ports = held.ports if held else {}
        if held:
            self.devices.pop(held.index, None)
            self.devices.pop(held.vxlan, None)
        self.held[bridge.vni] = Held(bridge, index, vxlan, ports)
        self.devices[index] = (bridge.vni, "")
        if vxlan:
            self.devices[vxlan] = (bridge.vni, "")
        return fresh

    async def _make(self, bridge: Bridge) -> tuple[int, int] | None:
        """Make what is not there yet, as a rule all of it; the indexes. None if something is
        there or refused, which those find out that look at each."""
        alias = f"{NETWORK_MARK}{bridge.network}"
        try:
            made = await self._maker.network(bridge, alias, addresses_of(bridge), self._own_fd)
        except OSError:
            return None
        self.fixed["bridge"] += len([index for index in made if index])
        return made

    async def _look_at(
        self, bridge: Bridge, links: Mapping[str, Link] | None
    ) -> tuple[int, int, bool]:
        """Put right what is there of a network, one device after the other; their indexes, and
        whether the VXLAN device is new."""
        if links is None:
            found = [await self._own.link(n) for n in (bridge.device, bridge.vxlan) if n]
            links = {link.name: link for link in found if link}
        index = await self._bridge(bridge, links.get(bridge.device))
        vxlan, fresh = 0, False
        if bridge.vxlan:
            vxlan, fresh = await self._vxlan(bridge, index, links.get(bridge.vxlan))
        return index, vxlan, fresh

    async def _bridge(self, bridge: Bridge, link: Link | None) -> int:
        mark, mac = f"{NETWORK_MARK}{bridge.network}", format_mac(bridge.router_mac)
        if link and not (link.kind == "bridge" and link.alias in (mark, "")):
            await self._clear(link)
            link = None
        if link is None:
            await self._own.add_bridge(bridge.device, mac, bridge.mtu)
            index = await self._own.index(bridge.device)
            await self._own.set_link(index, ifalias=mark, group=bridge.group, state="up")
            for address in addresses_of(bridge):
                await self._own.add_address(index, address)
            self.fixed["bridge"] += 1
            return index
        wrong: dict[str, object] = {}
        if link.alias != mark:
            wrong["ifalias"] = mark
        if link.mac != mac:
            wrong["address"] = mac
        if link.mtu != bridge.mtu:
            wrong["mtu"] = bridge.mtu
        if link.group != bridge.group:
            wrong["group"] = bridge.group
        if not link.up:
            wrong["state"] = "up"
        if wrong:
            await self._own.set_link(link.index, **wrong)
        # After the link is up: IPv6 addresses go when it goes down. And first what is too many:
        # the kernel takes the other addresses of a subnet with the first one.
        wanted = addresses_of(bridge)
        addresses = 0
        for other in await self._bulk.addresses(link.index) - set(wanted):
            await self._own.delete_address(link.index, other)
            addresses += 1
        have = await self._bulk.addresses(link.index)
        for address in wanted:
            if address not in have:
                await self._own.add_address(link.index, address)
                addresses += 1
        self.fixed["link"] += bool(wrong)
        self.fixed["address"] += addresses
        return link.index

    async def _vxlan(self, bridge: Bridge, master: int, link: Link | None) -> tuple[int, bool]:
        mark = f"{NETWORK_MARK}{bridge.network}"
        if link and not (
            link.kind == "vxlan"
            and link.alias in (mark, "")
            and (link.vni, link.local, link.data_port)
            == (bridge.vni, bridge.vtep, bridge.data_port)
            and not link.learning
            and link.proxy
        ):
            await self._clear(link)
            link = None
        fresh = link is None
        if link is None:
            try:
                await self._host.add_vxlan(
                    bridge.vxlan,
                    bridge.vni,
                    bridge.vtep,
                    bridge.data_port,
                    bridge.mtu,
                    master,
                    self._own_fd,
                )
            except OSError as error:
                if error.errno != errno.EEXIST:
                    raise
                raise await self._vni_taken(bridge) from None
            link = await self._own.link(bridge.vxlan)
            if link is None:
                raise OSError(errno.ENODEV, f"device {bridge.vxlan}: deleted while it was made")
            self.fixed["bridge"] += 1
        wrong: dict[str, object] = {}
        if link.alias != mark:
            wrong["ifalias"] = mark
        if link.mtu != bridge.mtu:
            wrong["mtu"] = bridge.mtu
        if link.master != master:
            wrong["master"] = master
        if wrong:
            await self._own.set_link(link.index, **wrong)
        flood = bridge.hands_on_unknown
        right = link.port_flood == flood and link.port_groups and not link.port_learning
        if link.master != master or not right:
            await self._own.set_port(link.index, flood)
            wrong["port"] = True
        if not link.up:
            await self._maker.place(link.index)
            await self._up(bridge, link)
            wrong["state"] = "up"
        self.fixed["link"] += bool(wrong) and not fresh
        return link.index, fresh

    async def _up(self, bridge: Bridge, link: Link) -> None:
        try:
            await self._own.set_link(link.index, state="up")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            await self._delete(link.index)
            raise Conflict(
                f"UDP port {bridge.data_port}",
                "is taken on this host, so no overlay network can be here",
                "Free it, or start all agents with another --data-port",
            ) from None

    async def _vni_taken(self, bridge: Bridge) -> Conflict:
        """The error that names the VXLAN device which has our VNI and port.

        One in another namespace has them of this host only if it was moved there, or made for it:
        else its UDP socket is where it is itself.
        """
        name = ""
        places = [path for folder in ELSEWHERE for path in _entries(folder)]
        for place, links in [("this host", self._host.links), ("our namespace", self._own.links)]:
            for link in await links():
                if (link.vni, link.data_port) == (bridge.vni, bridge.data_port):
                    name = f"device {link.name} in {place}"
        for path in places if not name else []:
            try:
                async with Netlink(path) as netlink:
                    for link in await netlink.links():
                        same = (link.vni, link.data_port) == (bridge.vni, bridge.data_port)
                        if same and link.abroad:
                            name = f"device {link.name} in namespace {path}"
            except OSError:
                continue  # not a namespace, or gone meanwhile
        return Conflict(
            f"VNI {bridge.vni}",
            f"is taken by {name or 'a VXLAN device in another namespace'}",
            "Delete that device, or give the network another VNI",
        )

    async def _clear(self, link: Link) -> None:
        """Make room for a device of ours: delete what has its name, if that is ours too.

        In our own namespace a device with our name and no mark at all is one whose agent died
        before it could mark it.
        """
        if link.alias and not link.alias.startswith(MARK):
            raise Conflict(f"device {link.name}", "is there and is not ours", "Delete it")
        await self._delete(link.index)

    async def _delete(self, index: int) -> None:
        self.devices.pop(index, None)
        with self._monitor.muting(index):
            await self._bulk.delete_link(index)

    async def remove(self, vni: int) -> None:
        """Delete a network's devices; its rows go with them."""
        held = self.held.pop(vni, None)
        if held is None:
            return
        for _, index in held.ports.values():
            await self._delete(index)
        if held.vxlan:
            await self._delete(held.vxlan)
        await self._delete(held.index)

    def elsewhere(self, bridge: Bridge) -> int | None:
        """The VNI under which the same network is held, if that is another one."""
        for vni, held in self.held.items():
            if held.bridge.network == bridge.network and vni != bridge.vni:
                return vni
        return None

    async def hand_over(self, old: int, new: int) -> None:
        """A network has another VNI now: move its ports to the new bridge as they are.

        The interfaces in the sandboxes, with all that their owners did to them, stay.
        """
        source, target = self.held[old], self.held[new]
        for endpoint, (port, index) in list(source.ports.items()):
            try:
                await self._own.set_link(index, master=target.index)
                await self._own.set_port(index, flood=False)
                await self._bulk.add_static(index, port.mac)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                self.devices.pop(index, None)  # it was deleted; it is made anew like any other
            else:
                target.ports[endpoint] = (port, index)
                self.devices[index] = (new, endpoint)
            del source.ports[endpoint]

    async def sweep(self, links: Iterable[Link], wanted: Iterable[Bridge]) -> None:
        """Delete the devices that bear our mark and that nobody wants."""
        keep = {name for b in wanted for name in (b.device, b.vxlan) if name}
        keep |= {port.device for b in wanted for port in b.ports.values()}
        for link in links:
            if link.alias.startswith((NETWORK_MARK, ENDPOINT_MARK)) and link.name not in keep:
                await self._delete(link.index)

    # -- ports --

    async def attach(
        self, vni: int, port: Port, interior: bool, links: Mapping[str, Link] | None = None
    ) -> None:
        """Make a port so. NotFound, Invalid, Conflict, OSError.

        `links` as for `ensure`. With `interior` the sandbox's side of a port that is there
        already is looked into; without, only if the port is to be another than it was.
        """
        held = self.held[vni]
        old, index = held.ports.pop(port.endpoint, (None, 0))
        if old and not interior and links is None and _is_only_moved(old, port):
            held.ports[port.endpoint] = (port, index)
            return
        if old and _identity(old) != _identity(port):
            await self._delete(index)
            old, index = None, 0
        fd = sandbox.open_netns(port)
        try:
            link = None
            if links is not None or old:
                link = links.get(port.device) if links else await self._own.link(port.device)
            index = 0
            if link is None:
                try:
                    index = await self._create(held, port, fd)
                except FileExistsError:
                    link = await self._own.link(port.device)
                    if link is None:
                        raise sandbox.taken(port) from None
            if link:
                index = await self._adopt(held, port, fd, link, old, interior)
        finally:
            os.close(fd)
        held.ports[port.endpoint] = (port, index)
        self.devices[index] = (vni, port.endpoint)

    async def detach(self, vni: int, endpoint: str) -> None:
        """Delete a port; the end in the sandbox goes with it."""
        _, index = self.held[vni].ports.pop(endpoint)
        await self._delete(index)

    def forget_port(self, vni: int, endpoint: str) -> None:
        """Take note that a port has gone by itself."""
        _, index = self.held[vni].ports.pop(endpoint)
        self.devices.pop(index, None)

    async def _create(self, held: Held, port: Port, fd: int) -> int:
        mtu = held.bridge.mtu
        index = await self._maker.port(port, f"{ENDPOINT_MARK}{port.endpoint}", mtu, held.index, fd)
        try:
            if not port.is_handed_out:
                await sandbox.furnish(fd, port, mtu, index)
                await self._until_forwarding(port.device)
        except BaseException:
            await self._bulk.delete_link(index)  # nothing is left half made
            raise
        self.fixed["port"] += 1
        return index

    async def _until_forwarding(self, device: str) -> None:
        """Wait for the bridge to see a new port's carrier: before, it drops what comes.

        The first packet of a workload is an ARP request, and the next one comes a second later.
        """
        for _ in range(FORWARDING_ATTEMPTS):
            link = await self._own.link(device)
            if link is None or link.port_forwards:
                return
            await asyncio.sleep(0.001)

    async def _adopt(
        self, held: Held, port: Port, fd: int, link: Link, old: Port | None, interior: bool
    ) -> int:
        """Put right what is there under a port's name, or make it anew; the index."""
        mark = f"{ENDPOINT_MARK}{port.endpoint}"
        keep = link.kind == "veth" and link.alias == mark
        statics = await self._bulk.static_macs(link.index) if keep and link.master else set()
        keep = keep and (port.mac in statics or not statics)
        astray = statics - {port.mac} if keep else set()
        for mac in astray:
            await self._bulk.drop_static(link.index, mac)
        changes = 0
        if keep and not port.is_handed_out and (interior or port != old):
            try:
                changes = await sandbox.furnish(fd, port, held.bridge.mtu, link.index, old)
            except LookupError:
                keep = False
        if keep and port.is_handed_out and link.mtu != held.bridge.mtu:
            changes += await sandbox.resize(port, held.bridge.mtu, link.index)
        if not keep:
            await self._clear(link)
            try:
                return await self._create(held, port, fd)
            except FileExistsError:
                raise sandbox.taken(port) from None
        wrong: dict[str, object] = {}
        if link.mtu != held.bridge.mtu:
            wrong["mtu"] = held.bridge.mtu
        if link.master != held.index:
            wrong["master"] = held.index
        if not link.up:
            wrong["state"] = "up"
        if wrong:
            await self._own.set_link(link.index, **wrong)
        wrong_port = link.port_learning or link.port_flood or not link.port_groups
        if link.master != held.index or wrong_port:
            await self._own.set_port(link.index, flood=False)
            changes += 1
        if link.master != held.index or not statics:
            await self._bulk.add_static(link.index, port.mac)
            changes += 1
        self.fixed["link"] += bool(wrong)
        self.fixed["port"] += bool(changes or astray)
        return link.index


def addresses_of(bridge: Bridge) -> list[str]:
    """The addresses of a bridge: its gateways, and for IPv6 a link-local one.

    Without it the kernel cannot solicit a neighbour for a packet that it forwards
    (ndisc_send_ns). It is made of the MAC as RFC 4291, appendix A, has it, so that the hosts'
    bridges of one network differ.
    """
    if not any(":" in gateway for gateway in bridge.gateways):
        return list(bridge.gateways)
    mac = bridge.router_mac
    host = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return [*bridge.gateways, f"{format_address(LINK_LOCAL + host)}/64"]


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing if there is none, or no more."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _is_only_moved(old: Port, port: Port) -> bool:
    """Whether just the other end is elsewhere, where somebody else furnishes it."""
    return port.is_handed_out and replace(old, moved=port.moved) == port


def _identity(port: Port) -> tuple[object, ...]:
    """What cannot be changed about a port that is there."""
    return port.device, port.netns, port.inode, port.ifname, port.mac
