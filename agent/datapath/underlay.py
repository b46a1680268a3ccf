"""What the host itself has: the MTU towards other hosts, and what it can route to.

What stands opposite: core/ picks subnets that overlap none of these routes; drivers/overlay.py
takes the MTU of a network from that of the underlay.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass

from agent.core.bounds import ROUTES_MAX
from agent.datapath.netlink import Netlink
from agent.datapath.nft import HOST_UPLINK
from agent.datapath.routing import PROTOCOL, Route

MTU = 1500  # bytes, where there is no route at all


@dataclass(frozen=True, slots=True)
class Underlay:
    """The host as others have to know it."""

    mtu: int  # bytes
    routes: tuple[str, ...]  # CIDR, sorted; without the default and what is ours


async def describe(vtep: str, host_netns: str = "/proc/self/ns/net") -> Underlay:
    """Read both from the kernel of the host whose VTEP address is `vtep`. OSError.

    The MTU is that of the device which has the address, else of the one with the default
    route, or less where a route on it says so.
    """
    async with Netlink(host_netns) as host:
        routes = await host.routes()
        defaults = [r for r in routes if r.destination in ("0.0.0.0/0", "::/0")]
        device = await host.find_address(vtep) or next((r.device for r in defaults), 0)
        links = {link.index: link for link in await host.links()}
    mtus = [links[device].mtu] if device in links else []
    mtus += [r.mtu for r in routes if r.device == device and r.mtu]
    ours = [link.index for link in links.values() if link.name == HOST_UPLINK]
    return Underlay(
        min(mtus, default=MTU),
        widest({r.destination for r in routes if _counts(r) and r.device not in ours}),
    )


async def device_of(vtep: str, host_netns: str = "/proc/self/ns/net") -> str:
    """The name of the device that has the host's VTEP address, else of that by which packets leave
    it; empty if there is none. OSError."""
    async with Netlink(host_netns) as host:
        device = await host.find_address(vtep)
        if not device:
            routes = await host.routes()
            ways = [r.device for r in routes if r.destination in ("0.0.0.0/0", "::/0")]
            device = ways[0] if ways else 0
        return next((link.name for link in await host.links() if link.index == device), "")


def widest(routes: Collection[str]) -> tuple[str, ...]:
    """The routes (CIDR) that others are told of, sorted: of a router's hundred thousand the widest,
    as others take no more of one node."""
    by_size = sorted(routes, key=lambda route: (int(route.rpartition("/")[2]), route))
    return tuple(sorted(by_size[:ROUTES_MAX]))


async def forget_unresolved(
    addresses: Collection[str], host_netns: str = "/proc/self/ns/net"
) -> None:
    """The cable is back: let the kernel ask anew, at once, where the nodes at `addresses` are."""
    async with Netlink(host_netns) as host:
        await host.forget_unresolved(addresses)


def _counts(route: Route) -> bool:
    """Whether a subnet must not overlap this route."""
    network = ipaddress.ip_network(route.destination)
    return not (
        route.protocol == PROTOCOL
        or network.prefixlen == 0
        or network.is_link_local
        or network.is_multicast
        or network.is_loopback
    )
