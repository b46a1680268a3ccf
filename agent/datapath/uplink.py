"""The way out: a veth pair between our namespace and the host, and the host's routes to us.

    sandbox - bridge - [our namespace] uplink === vxmesh0 [host] - masquerade - the rest

What stands opposite: nft.py says who may use it. Source: veth(4), Linux
Documentation/networking/ip-sysctl.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import structlog

from agent.datapath import namespaces, questions
from agent.datapath.linkstate import LinkState
from agent.datapath.namespaces import SYSCTL
from agent.datapath.netlink import Link, Netlink
from agent.datapath.nft import HOST_UPLINK, UPLINK
from agent.datapath.routing import PROTOCOL
from agent.errors import Conflict, VxmeshError
from agent.syscalls import in_netns

log = structlog.get_logger()

MARK = "vxmesh:uplink"
MTU = 1500  # bytes; larger packets of a sandbox are told so by our own namespace

# Link-local and a ULA (fd, then "vxmesh" in ASCII), so that no subnet is taken away from users.
HOST4, OWN4, LENGTH4 = "169.254.83.1", "169.254.83.2", 30
HOST6, OWN6, LENGTH6 = "fd76:786d:6573:6800::1", "fd76:786d:6573:6800::2", 126
LOCAL6 = ("fe80::1", "fe80::2", 64)  # without one, nothing forwarded finds its neighbour
LOOPBACK = 1
# Of our end, chosen so that it is not the same as that of the host's: then the kernel would take
# up to a second to see the carrier (linkwatch_urgent_event), and IPv6 would wait for it.
INDEX = 836_001

# On the host, for its own end only.
_HOST_END = {
    # 127.0.0.1:PORT of the host leads into a sandbox when that port is published.
    f"ipv4/conf/{HOST_UPLINK}/route_localnet": "1",
    # What a client sent comes in by it a second time (entrance.py).
    f"ipv4/conf/{HOST_UPLINK}/rp_filter": "0",
    f"ipv6/conf/{HOST_UPLINK}/disable_ipv6": "0",
    f"ipv6/conf/{HOST_UPLINK}/accept_ra": "0",
    f"ipv6/conf/{HOST_UPLINK}/accept_dad": "0",
    f"ipv6/conf/{HOST_UPLINK}/addr_gen_mode": "1",
}


class Uplink:
    """The pair of one host."""

    def __init__(self, own: Netlink, host: Netlink, own_netns: Path, host_netns: str) -> None:
        """`own` and `host` are the two namespaces, at `own_netns` and `host_netns`."""
        self._own, self._host, self._host_netns = own, host, host_netns
        self.has_ipv6 = bool(namespaces.get_sysctl(own_netns, "ipv6/conf/all/forwarding"))
        self._routes: set[str] = set()
        self._answers = False
        self.index = 0  # in our namespace
        self.host_index = 0  # of the other end

    def is_right(self, link: LinkState) -> bool:
        """Whether our end is as it was made."""
        named = link.name == UPLINK and link.alias in (MARK, None)
        return named and link.up and link.mtu == MTU

    async def ensure(self) -> Counter[str]:
        """Make the pair as it should be; how many things were not, by kind. Conflict, OSError."""
        own, host = await self._own.link(UPLINK), await self._host.link(HOST_UPLINK)
        changes: Counter[str] = Counter()
        if not (own and host and own.peer == host.index and host.peer == own.index):
            changes["link"] += 1
            own, host = await self._make(own, host)
        self.index, self.host_index = own.index, host.index
        changes["sysctl"] += await self.set_sysctls()
        await self._own.set_link(LOOPBACK, state="up")
        addresses = [(HOST4, OWN4, LENGTH4)]
        if self.has_ipv6:
            addresses += [(HOST6, OWN6, LENGTH6), LOCAL6]
        for side, link, position in ((self._host, host, 0), (self._own, own, 1)):
            if link.alias != MARK:
                await side.set_link(link.index, ifalias=MARK)
            if link.mtu != MTU:
                changes["link"] += 1
                await side.set_link(link.index, mtu=MTU)
            have = await side.addresses(link.index)
            for address in addresses:
                interface = f"{address[position]}/{address[2]}"
                if interface not in have:
                    changes["address"] += 1
                    await side.add_address(link.index, interface)
            if not link.up:
                changes["link"] += 1
                await side.set_link(link.index, state="up")
        changes["route"] += await self._default_routes()
        if self._answers:
            changes["route"] += await questions.ensure(self._own, self.has_ipv6)
        return changes

    async def answer(self) -> None:
        """Have questions to name servers elsewhere answered here from now on. OSError.

        Not before somebody asks: until there was any rule, the kernel looks for a packet's way in
        one table and does not ask for its source; then in one after the other, and it does.
        """
        if not self._answers:
            await questions.ensure(self._own, self.has_ipv6)
            self._answers = True

    async def set_sysctls(self) -> int:
        """Those of the host's end, and forwarding; how many were other."""
        # The host has to forward what sandboxes send out and what comes to published ports.
        sysctls = {**_HOST_END, "ipv4/ip_forward": "1"}
        return await asyncio.to_thread(namespaces.set_sysctls, self._host_netns, sysctls)

    async def _make(self, own: Link | None, host: Link | None) -> tuple[Link, Link]:
        # Without its mark but paired with ours, it was made by an agent that died meanwhile.
        if host and not (
            host.alias == MARK or (own and host.peer == own.index and own.alias == MARK)
        ):
            raise Conflict(
                f"device {HOST_UPLINK}", "is there and is not ours", "Rename or delete it"
            )
        if own:
            await self._own.delete_link(own.index)
        if host:
            await self._host.delete_link(host.index)
        fd = os.open(self._host_netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await self._own.add_veth(UPLINK, HOST_UPLINK, fd, MTU, index=INDEX)
        finally:
            os.close(fd)
        self._routes.clear()
        own, host = await self._own.link(UPLINK), await self._host.link(HOST_UPLINK)
        if own is None or host is None:
            raise VxmeshError(f"device {HOST_UPLINK}", "was deleted while it was made")
        return own, host

    async def _default_routes(self) -> int:
        """Lead the rest of the world there; how many routes were missing or led elsewhere."""
        have = {(r.destination, r.gateway, r.device) for r in await self._own.routes()}
        changes = 0
        wanted = [("0.0.0.0/0", HOST4)] + ([("::/0", HOST6)] if self.has_ipv6 else [])
        for destination, gateway in wanted:
            if (destination, gateway, self.index) not in have:
                changes += 1
                for _, other, device in [h for h in have if h[0] == destination]:
                    await self._own.delete_route(destination, other, device, any_protocol=True)
                await self._own.add_route(destination, gateway, self.index)
        return changes

    async def read_routes(self) -> None:
        """Look which routes of ours the host has, instead of trusting what was done before."""
        self._routes = {
            r.destination
            for r in await self._host.routes()
            if r.protocol == PROTOCOL and r.device == self.host_index
        }

    async def forward_ipv6(self) -> None:
        """Have the host forward IPv6, where it can."""
        if self.has_ipv6:
            await asyncio.to_thread(in_netns, self._host_netns, _forward_ipv6)

    async def set_routes(self, subnets: Iterable[str]) -> int:
        """Make the host's routes into our namespace exactly `subnets`; how many were missing.

        Conflict when the host has another route to just that subnet; the rest are made.
        """
        wanted = {s for s in subnets if self.has_ipv6 or ":" not in s}
        if any(":" in s for s in wanted):
            await self.forward_ipv6()
        for subnet in self._routes - wanted:
            gateway = OWN6 if ":" in subnet else OWN4
            await self._host.delete_route(subnet, gateway, self.host_index)
            self._routes.discard(subnet)
        missing = wanted - self._routes
        taken = []
        for subnet in sorted(missing):
            gateway, source = (OWN6, HOST6) if ":" in subnet else (OWN4, HOST4)
            try:
                await self._host.add_route(subnet, gateway, self.host_index, source)
            except OSError as error:
                if error.errno != errno.EEXIST:
                    raise
                taken.append(subnet)
            else:
                self._routes.add(subnet)
        if taken:
            raise Conflict(
                f"route to {', '.join(taken)}",
                "the host has another one, so this network has no way out here",
                "Remove that route, or give the network another subnet",
            )
        return len(missing)


def _forward_ipv6() -> None:
    """Let the host forward IPv6, without it losing the routes that it has by advertisement.

    A forwarding interface ignores router advertisements unless accept_ra is 2.
    """
    everywhere = SYSCTL / "ipv6/conf/all/forwarding"
    if everywhere.read_text().strip() != "0":
        return
    for accept in SYSCTL.glob("ipv6/conf/*/accept_ra"):
        # A device may go after it was listed, as containers' do at any moment.
        with contextlib.suppress(FileNotFoundError):
            if accept.parent.name != "all" and accept.read_text().strip() == "1":
                accept.write_text("2")
    everywhere.write_text("1")
