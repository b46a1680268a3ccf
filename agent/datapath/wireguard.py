"""The WireGuard devices of the host, and why nothing of an encrypted network passes them by.

    sandbox - bridge - VXLAN device ... [host] route to the peer's inner address - vxw0 ~~~ peer

The rows of an encrypted network name inner addresses, which lead into WireGuard by a route each.
Three things stand behind that, each of which is enough:
 - the whole inner prefix is `unreachable`, by a route that is made before anything else and that
   no other part takes away: without its own route, or its device, an address leads nowhere;
 - rules of the host's drop what is for the prefix and would leave by another device, and what
   claims to come from it by another one (nft.py, the table `vxmesh_sealed`);
 - WireGuard drops what is for an address that no peer's key has.
So the order is: the route and the rules; then devices, peers and addresses; then their routes;
and only then rows, which are somebody else's. On the way back rows go first. When a device or its
process dies its routes go with it, rows stay, and packets die.

What stands opposite: drivers/wireguard.py says what is desired, reconciler.py when;
wireguard_netlink.py and wireguard_go.py are the two implementations.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import structlog

from agent.datapath import namespaces, wireguard_go
from agent.datapath.netlink import Link, Netlink
from agent.datapath.routing import PROTOCOL
from agent.datapath.wgconfig import Config, Endpoint, difference
from agent.datapath.wireguard_go import WireguardGo
from agent.datapath.wireguard_netlink import WireguardKernel
from agent.drivers.base import WireguardDevice
from agent.drivers.wireguard import PREFIX
from agent.errors import Conflict, Unsupported, VxmeshError
from agent.notation import format_address

log = structlog.get_logger()

MARK = "vxmesh:wg"
PROBE = "vxwprobe"
KINDS = ("wireguard", "tun")  # of device: the kernel's, and wireguard-go's

Route = tuple[int, str]  # device and source


class Wireguard:
    """The devices of one host. Every method is idempotent."""

    def __init__(self, host: Netlink, host_netns: str, run_dir: Path, whose: str = "auto") -> None:
        """`host` is the namespace at `host_netns`; logs go to `run_dir`.

        `whose` says which implementation new devices get: kernel, go, or auto.
        """
        self._whose = whose
        self._host, self._host_netns = host, host_netns
        self._kernel = WireguardKernel(host, host_netns)
        self._go = WireguardGo(host_netns, run_dir)
        self._given: dict[str, dict[bytes, Endpoint]] = {}  # device -> peer -> set last
        self.indexes: dict[str, int] = {}  # of the devices that we made, by name

    async def guard(self) -> int:
        """Make the inner prefix unreachable; how many routes that took. OSError."""
        if await self._host.is_unreachable(str(PREFIX)):
            return 0
        await self._host.add_unreachable(str(PREFIX))
        return 1

    async def extend(self, devices: Sequence[WireguardDevice]) -> Counter[str]:
        """Make what is missing; how many things were, by kind. Nothing is taken away.

        To be called after `guard` and with the rules in force.
        Unsupported where there is no WireGuard; Conflict, VxmeshError, OSError.
        """
        changes: Counter[str] = Counter()
        if not devices:
            return changes
        for device in devices:
            changes += await self._ensure(device)
        have, want = await self._routes(), self._wanted(devices)
        for destination, (index, source) in want.items():
            if have.get(destination) != (index, source):
                await self._host.set_route(destination, index, source)
                changes["route"] += 1
        return changes

    async def shrink(self, devices: Sequence[WireguardDevice]) -> int:
        """Take away what is not wanted any more; how many devices and peers. OSError."""
        names = {device.device for device in devices}
        taken = 0
        for link in await self._host.links():
            if link.alias.startswith(MARK) and link.name not in names:
                await self._remove(link)
                taken += 1
        if devices:
            want = self._wanted(devices)
            for destination, (index, _) in (await self._routes()).items():
                if destination not in want:
                    await self._host.delete_route(destination, "", index)
        for device in devices:
            backend = await self._backend(device.device)
            have = await backend.get(device.device)
            update = difference(have, device, self._given.get(device.device, {}), shrink=True)
            update.private_key, update.port, update.peers = None, None, []
            if update:
                await backend.set(device.device, update)
                taken += len(update.gone)
        return taken

    async def sessions(self, name: str) -> dict[bytes, float]:
        """Public key of a peer -> when the last handshake with it was completed, s since the
        epoch; 0 if none was. Empty if there is no such device."""
        try:
            config = await (await self._backend(name)).get(name)
        except (VxmeshError, OSError):
            return {}
        return {key: peer.handshake for key, peer in config.peers.items()}

    # -- devices --

    async def _ensure(self, want: WireguardDevice) -> Counter[str]:
        changes: Counter[str] = Counter()
        name = want.device
        link, config = await self._look(name)
        # Without settings it was made by an agent that died before it could mark it.
        used = link and config and (link.alias or config.private_key)
        if used and link and link.alias != MARK:
            raise Conflict(f"device {name}", "is there and is not ours", "Delete it")
        if link is None or config is None:
            changes["wireguard"] += 1
            link, config = await self._make(name)
        self.indexes[name] = link.index
        # Before it is up, so that the kernel gives it no address of its own.
        sysctls = {
            f"ipv6/conf/{name}/disable_ipv6": "0",
            f"ipv6/conf/{name}/addr_gen_mode": "1",
            f"ipv6/conf/{name}/accept_ra": "0",
            f"ipv6/conf/{name}/accept_dad": "0",
        }
        await asyncio.to_thread(namespaces.set_sysctls, self._host_netns, sysctls)
        wrong: dict[str, object] = {}
        if link.alias != MARK:
            wrong["ifalias"] = MARK
        if link.mtu != want.mtu:
            wrong["mtu"] = want.mtu
        if not link.up:
            wrong["state"] = "up"
        if wrong:
            await self._host.set_link(link.index, **wrong)
            changes["link"] += 1
        address = format_address(want.address)
        have = await self._host.addresses(link.index)
        if f"{address}/128" not in have:
            await self._host.add_host_address(link.index, address)
            changes["address"] += 1
        for other in have - {f"{address}/128"}:
            await self._host.delete_address(link.index, other)
        given = self._given.setdefault(name, {})
        update = difference(config, want, given, shrink=False)
        if update:
            await (await self._backend(name)).set(name, update)
            changes["wireguard"] += 1
        given.clear()
        given.update({key: peer.endpoint for key, peer in want.peers.items()})
        if changes["wireguard"]:  # what was only just made right is one thing, not five
            changes = Counter(wireguard=1)
        return changes

    async def _look(self, name: str) -> tuple[Link | None, Config | None]:
        """A device and what it holds; no device if it was of no use and is gone now."""
        link = await self._host.link(name)
        if link is None:
            return None, None
        if link.kind not in KINDS:
            raise Conflict(f"device {name}", "is there and is not ours", "Delete it")
        try:
            return link, await (await self._backend(name, link)).get(name)
        except wireguard_go.Silent as error:
            if link.alias != MARK:
                raise Conflict(f"device {name}", "is there and is not ours", "Delete it") from None
            log.warning("wireguard.silent", device=name, error=str(error))
            await self._remove(link)
            return None, None

    async def _make(self, name: str) -> tuple[Link, Config]:
        self._given.pop(name, None)
        if not await _in_kernel(self._whose, self._kernel.create(name)):
            await self._go.create(name)
        link = await self._host.link(name)
        if link is None:
            raise VxmeshError(f"device {name}", "was deleted while it was made")
        return link, await (await self._backend(name, link)).get(name)

    async def _remove(self, link: Link) -> None:
        self.indexes.pop(link.name, None)
        self._given.pop(link.name, None)
        if link.kind == "tun":
            await self._go.end(link.name)  # its device goes with it
        await self._host.delete_link(link.index)

    async def _backend(self, name: str, link: Link | None = None) -> WireguardKernel | WireguardGo:
        link = link or await self._host.link(name)
        if link is None:
            raise OSError(errno.ENODEV, f"device {name} is gone")
        return self._kernel if link.kind == "wireguard" else self._go

    # -- routes --

    def _wanted(self, devices: Sequence[WireguardDevice]) -> dict[str, Route]:
        """A route for each peer's address, through the first device and from its address.

        A device that is not here has none: then what is for its peers is unreachable.
        """
        first = devices[0]
        index = self.indexes.get(first.device)
        if index is None:
            return {}
        source = format_address(first.address)
        return {
            f"{format_address(peer.address)}/128": (index, source) for peer in first.peers.values()
        }

    async def _routes(self) -> dict[str, Route]:
        """Our routes to single inner addresses."""
        return {
            route.destination: (route.device, route.source)
            for route in await self._host.routes()
            if route.protocol == PROTOCOL
            and route.destination.endswith("/128")
            and ipaddress.IPv6Network(route.destination).subnet_of(PREFIX)
        }


async def check_supported(whose: str = "auto", host_netns: str = "/proc/self/ns/net") -> None:
    """Unsupported says why this host can have no encrypted networks, and what to do."""
    if not await asyncio.to_thread(namespaces.get_sysctl, host_netns, "ipv6/conf/all/forwarding"):
        raise Unsupported(
            "encrypted networks",
            "the kernel has no IPv6, which they use inside",
            "Start it without ipv6.disable=1",
        )
    async with Netlink(host_netns) as host:
        await _delete(host, PROBE)  # of an agent that died in just that moment
        if await _in_kernel(whose, host.add_wireguard(PROBE)):
            await _delete(host, PROBE)


async def _in_kernel(whose: str, create: Coroutine[Any, Any, None]) -> bool:
    """Have the kernel make a device; False if it is wireguard-go's to do. Unsupported, OSError."""
    kernel = "was not asked"
    if whose == "go":
        create.close()
    else:
        try:
            await create
            return True
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            kernel = "has none"
    go = "was not asked" if whose == "kernel" else wireguard_go.missing()
    if go:
        raise Unsupported(
            "encrypted networks",
            f"this host has no WireGuard: the kernel {kernel}, and {wireguard_go.COMMAND} {go}",
            "Load the module 'wireguard', or install the package wireguard-go",
        )
    return False


async def remove_all(host: Netlink, host_netns: str, run_dir: Path) -> None:
    """Delete the devices, their processes, and last the route that keeps the prefix apart."""
    await Wireguard(host, host_netns, run_dir).shrink(())
    await host.delete_unreachable(str(PREFIX))


async def _delete(host: Netlink, name: str) -> None:
    with contextlib.suppress(OSError):
        await host.delete_link(await host.index(name))
