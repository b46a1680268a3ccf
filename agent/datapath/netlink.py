"""Links, addresses and routes of one network namespace, through pyroute2.

The one file that sees pyroute2. It drops keywords that it does not know without a word, so
what is set here is read back in the tests. It enters namespaces by forking, which gRPC's
threads do not survive: the socket is made in a throw-away thread instead and handed over.
And it sends in the event loop's thread, though the kernel works a request off in the thread
that sends it and makes it wait for every other one that changes a network device (the RTNL),
100 ms where many containers come and go: so it has a loop in a thread of its own here.
What stands opposite: bulk.py for FDB and neighbour rows. Source: rtnetlink(7).
"""

from __future__ import annotations

import asyncio
import errno
import functools
import ipaddress
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from agent.datapath.linkstate import IFF_LOWER_UP, IFF_UP, SKIP_STATISTICS
from agent.syscalls import socket_in

PROTOCOL = 120  # of every route that is ours: RTPROT_*, 0-255, not in /etc/iproute2/rt_protos
TABLE_MAIN = 254
IFA_F_NODAD = 0x02
NUD_INCOMPLETE, NUD_FAILED = 0x01, 0x20  # linux/neighbour.h
RTNH_F_ONLINK = 4
IFA_F_NOPREFIXROUTE = 0x200
RTN_UNICAST, RTN_UNREACHABLE = 1, 7
METRIC_LAST = 0xFF000000  # of a route that any other one to the same prefix is preferred to
RT_SCOPE_NOWHERE = 255  # of a route to delete: whichever it has
BR_STATE_FORWARDING = 3  # linux/if_bridge.h

T = TypeVar("T")
P = ParamSpec("P")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def _thread_loop() -> asyncio.AbstractEventLoop:
    """The loop in which all requests are made; its thread is started with the first one."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="netlink", daemon=True).start()
        return _loop


def in_thread(
    function: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Have a coroutine run in that loop, whatever loop it is called in.

    One that makes many requests is better sent there whole than each request by itself.
    """

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        coroutine = function(*args, **kwargs)
        loop = _thread_loop()
        if asyncio.get_running_loop() is loop:
            return await coroutine
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))

    return call


@dataclass(frozen=True, slots=True)
class Link:
    """A network device as the kernel has it. What a kind of device has not is 0 or empty."""

    index: int
    name: str
    kind: str
    alias: str
    mac: str
    mtu: int
    up: bool
    carrier: bool
    master: int
    peer: int  # index of a veth's other end, in that end's namespace
    vni: int
    local: str
    data_port: int
    learning: bool  # of a VXLAN device
    proxy: bool
    port_learning: bool  # of a bridge port
    port_flood: bool
    port_forwards: bool


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route of the main table."""

    destination: str  # CIDR; 0.0.0.0/0 or ::/0 for the default
    gateway: str
    device: int
    protocol: int
    source: str
    mtu: int  # 0: the device's


class Netlink:
    """One namespace's links, addresses and routes. Every call raises OSError if refused."""

    def __init__(self, netns: str | Path) -> None:
        """Open in the namespace at path `netns`."""
        self._socket = socket_in(netns, socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE)
        self._opened: Any = None

    @property
    def _route(self) -> Any:
        """pyroute2's object, which belongs to the thread that makes it."""
        if self._opened is None:
            self._opened = AsyncIPRoute(use_socket=self._socket)
        return self._opened

    def close(self) -> None:
        """Close the socket."""
        asyncio.run_coroutine_threadsafe(self._close(), _thread_loop()).result()

    async def _close(self) -> None:
        if self._opened is not None:
            self._opened.close()
        self._socket.close()

    async def __aenter__(self) -> Netlink:
        return self

    async def __aexit__(self, *_: object) -> None:
        await in_thread(self._close)()

    # -- links --

    @in_thread
    async def links(self) -> list[Link]:
        """All devices."""
        answer = await _call(self._route.link("dump", ext_mask=SKIP_STATISTICS))
        return [_link(message) async for message in _all(answer)]

    @in_thread
    async def link(self, name: str) -> Link | None:
        """The device with that name, if there is one.

        To look at it also makes the kernel take in a carrier that has just come, instead of
        some time soon (linkwatch_sync_dev in rtnl_getlink).
        """
        try:
            answer = await _call(self._route.link("get", ifname=name, ext_mask=SKIP_STATISTICS))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return _link(answer[0])

    @in_thread
    async def index(self, name: str) -> int:
        """The index of a device that must be there."""
        link = await self.link(name)
        if link is None:
            raise OSError(errno.ENODEV, f"device {name}: {os.strerror(errno.ENODEV)}")
        return link.index

    @in_thread
    async def add_bridge(self, name: str, mac: str, mtu: int) -> None:
        """A bridge without spanning tree and without multicast snooping, down."""
        await _call(
            self._route.link(
                "add",
                ifname=name,
                kind="bridge",
                address=mac,
                mtu=mtu,
                br_stp_state=0,
                br_forward_delay=0,
                br_mcast_snooping=0,
            )
        )

    @in_thread
    async def add_vxlan(
        self, name: str, vni: int, local: str, port: int, mtu: int, master: int, netns: int
    ) -> None:
        """A VXLAN device in the namespace of file descriptor `netns`, on bridge `master` there.

        Its UDP socket is in *this* namespace. No learning, no default destination; it answers
        ARP and neighbour solicitations itself (proxy). With `local` empty all that it sends
        and takes is IPv6, from the address that the route says.
        """
        local = local or "::"
        await _call(
            self._route.link(
                "add",
                ifname=name,
                kind="vxlan",
                mtu=mtu,
                master=master,
                net_ns_fd=netns,
                vxlan_id=vni,
                vxlan_port=port,
                vxlan_learning=0,
                vxlan_proxy=1,
                **{"vxlan_local6" if ":" in local else "vxlan_local": local},
            )
        )

    @in_thread
    async def add_wireguard(self, name: str) -> None:
        """A WireGuard device, down. OSError, EOPNOTSUPP where the kernel has none."""
        await _call(self._route.link("add", ifname=name, kind="wireguard"))

    @in_thread
    async def add_veth(
        self,
        name: str,
        peer: str,
        netns: int,
        mtu: int,
        *,
        master: int = 0,
        peer_mac: str = "",
        index: int = 0,
    ) -> None:
        """A veth pair whose end `peer` is in the namespace of file descriptor `netns`; both down.

        EEXIST if either name is taken. Where `master` or `index` is 0 there is none, or any.
        """
        other: dict[str, object] = {"ifname": peer, "net_ns_fd": netns, "mtu": mtu}
        if peer_mac:
            other["address"] = peer_mac
        mine = {"master": master} if master else {}
        if index:
            mine["index"] = index
        await _call(self._route.link("add", ifname=name, kind="veth", mtu=mtu, peer=other, **mine))

    @in_thread
    async def set_port(self, index: int, flood: bool, alias: str = "") -> None:
        """As a port of a bridge: learn nothing, and with `flood` take what no other port takes.

        With `alias` the device gets that too, and is set up: one call for a new port.
        """
        extra = {"ifalias": alias, "flags": IFF_UP, "change": IFF_UP} if alias else {}
        await _call(
            self._route.link(
                "set",
                index=index,
                kind="bridge_slave",
                learning=0,
                unicast_flood=int(flood),
                **extra,
            )
        )

    @in_thread
    async def set_link(self, index: int, /, **what: object) -> None:
        """Change `ifalias`, `state` (up, down), `mtu`, `master`, `address` of a device."""
        unknown = what.keys() - {"ifalias", "state", "mtu", "master", "address"}
        if unknown:  # pyroute2 would drop it
            raise TypeError(f"set_link: {unknown}")
        await _call(self._route.link("set", index=index, **what))

    @in_thread
    async def delete_link(self, index: int) -> None:
        """Delete a device; fine if it is gone."""
        try:
            await _call(self._route.link("del", index=index))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    # -- addresses --

    @in_thread
    async def addresses(self, index: int) -> set[str]:
        """The addresses of a device, in interface notation."""
        answer = await _call(self._route.addr("dump", match={"index": index}))
        return {
            f"{m.get_attr('IFA_LOCAL') or m.get_attr('IFA_ADDRESS')}/{m['prefixlen']}"
            async for m in _all(answer)
            if m["index"] == index
        }

    @in_thread
    async def find_address(self, address: str) -> int:
        """The index of the device that has `address`; 0 if none has."""
        async for m in _all(await _call(self._route.addr("dump"))):
            if (m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS")) == address:
                return int(m["index"])
        return 0

    @in_thread
    async def add_address(self, index: int, interface: str) -> None:
        """Add an address in interface notation, without duplicate detection; fine if there."""
        flags = {"flags": IFA_F_NODAD} if ":" in interface else {}
        try:
            await _call(self._route.addr("add", index=index, address=interface, **flags))
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise

    @in_thread
    async def add_host_address(self, index: int, address: str) -> None:
        """Add an address that no route follows from; fine if there."""
        flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE
        interface = f"{address}/{128 if ':' in address else 32}"
        try:
            await _call(self._route.addr("add", index=index, address=interface, flags=flags))
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise

    @in_thread
    async def delete_address(self, index: int, interface: str) -> None:
        """Take an address away; fine if it is gone."""
        try:
            await _call(self._route.addr("del", index=index, address=interface))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise

    # -- neighbours --

    @in_thread
    async def forget_unresolved(self, addresses: Collection[str]) -> int:
        """Delete the neighbour entries of `addresses` that are being resolved in vain; how many.

        The kernel asks for one of them once a second at most; for a new one, at once.
        """
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            answer = await _call(self._route.neigh("dump", family=family))
            async for m in _all(answer):
                address = m.get_attr("NDA_DST")
                if m["state"] & (NUD_INCOMPLETE | NUD_FAILED) and address in addresses:
                    found.append((m["ifindex"], address))
        for index, address in found:
            try:
                await _call(self._route.neigh("del", ifindex=index, dst=address))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
        return len(found)

    # -- routes --

    @in_thread
    async def routes(self) -> list[Route]:
        """The unicast routes of the main table, IPv4 and IPv6."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            answer = await _call(self._route.route("dump", family=family, table=TABLE_MAIN))
            async for m in _all(answer):
                if m["type"] == RTN_UNICAST and m.get_attr("RTA_TABLE") == TABLE_MAIN:
                    found += _routes(m)
        return found

    @in_thread
    async def is_unreachable(self, prefix: str) -> bool:
        """Whether what no other route leads to in an IPv6 `prefix` is answered by an error."""
        dump = self._route.route("dump", family=socket.AF_INET6, table=TABLE_MAIN)
        return any(
            [
                m["type"] == RTN_UNREACHABLE
                and m["proto"] == PROTOCOL
                and f"{m.get_attr('RTA_DST')}/{m['dst_len']}" == prefix
                async for m in _all(await _call(dump))
            ]
        )

    @in_thread
    async def add_unreachable(self, prefix: str) -> None:
        """Let nothing in an IPv6 `prefix` go out that has no route of its own; fine if there."""
        try:
            await _call(
                self._route.route(
                    "add",
                    family=socket.AF_INET6,
                    dst=prefix,
                    type=RTN_UNREACHABLE,
                    priority=METRIC_LAST,
                    proto=PROTOCOL,
                )
            )
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise

    @in_thread
    async def delete_unreachable(self, prefix: str) -> None:
        """Take that away; fine if it is gone."""
        try:
            await _call(
                self._route.route(
                    "del",
                    family=socket.AF_INET6,
                    dst=prefix,
                    type=RTN_UNREACHABLE,
                    priority=METRIC_LAST,
                    proto=PROTOCOL,
                )
            )
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise

    @in_thread
    async def set_route(self, destination: str, device: int, source: str) -> None:
        """A route of ours to a neighbour beyond `device`, in place of the one there is."""
        await _call(
            self._route.route(
                "replace", dst=destination, oif=device, prefsrc=source, proto=PROTOCOL
            )
        )

    @in_thread
    async def add_route(
        self, destination: str, gateway: str, device: int, source: str = ""
    ) -> None:
        """Add a route that bears our protocol number; EEXIST if there is one to that prefix."""
        extra = {"prefsrc": source} if source else {}
        await _call(
            self._route.route(
                "add", dst=destination, gateway=gateway, oif=device, proto=PROTOCOL, **extra
            )
        )

    @in_thread
    async def delete_route(
        self, destination: str, gateway: str, device: int, *, any_protocol: bool = False
    ) -> None:
        """Delete a route of ours, or with `any_protocol` whosever it is; fine if it is gone."""
        protocol = 0 if any_protocol else PROTOCOL
        via = {"gateway": gateway} if gateway else {}
        request = {"dst": destination, "oif": device, "proto": protocol, **via}
        try:
            await _call(self._route.route("del", scope=RT_SCOPE_NOWHERE, **request))
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.ENODEV):
                raise

    # -- routing by mark --

    @in_thread
    async def set_table_default(self, table: int, gateway: str, device: int) -> None:
        """Have `table` lead everything of the gateway's family there, and nowhere else."""
        await _call(
            self._route.route(
                "replace",
                dst="::/0" if ":" in gateway else "0.0.0.0/0",
                gateway=gateway,
                oif=device,
                table=table,
                proto=PROTOCOL,
                flags=RTNH_F_ONLINK,
            )
        )

    @in_thread
    async def lookups(self, table: int) -> dict[tuple[str, int], int]:
        """The rules that lead to `table`: (source address, mark) -> priority."""
        found = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            answer = await _call(self._route.rule("dump", family=family))
            async for m in _all(answer):
                if m.get_attr("FRA_TABLE") == table:
                    key = (m.get_attr("FRA_SRC") or "", m.get_attr("FRA_FWMARK") or 0)
                    found[key] = m.get_attr("FRA_PRIORITY") or 0
        return found

    @in_thread
    async def set_lookup(
        self, verb: Literal["add", "del"], table: int, source: str, mark: int, priority: int
    ) -> None:
        """A rule: what `source` sends with the bits of `mark` looks in `table`; fine if so."""
        try:
            await _call(
                self._route.rule(
                    verb,
                    family=socket.AF_INET6 if ":" in source else socket.AF_INET,
                    table=table,
                    src=source,
                    fwmark=mark,
                    fwmask=mark,
                    priority=priority,
                    protocol=PROTOCOL,
                )
            )
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOENT):
                raise


async def _call(coroutine: Awaitable[T]) -> T:
    try:
        return await coroutine
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from None


async def _all(answer: AsyncIterator[T]) -> AsyncIterator[T]:
    try:
        async for message in answer:
            yield message
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from None


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info else None) or ""
    data = info.get_attr("IFLA_INFO_DATA") if info and kind == "vxlan" else None
    port = (
        info.get_attr("IFLA_INFO_SLAVE_DATA")
        if info and info.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge"
        else None
    )

    def vxlan(name: str) -> Any:
        return data.get_attr(f"IFLA_VXLAN_{name}") if data else None

    def brport(name: str) -> bool:
        return bool(port and port.get_attr(f"IFLA_BRPORT_{name}"))

    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=kind,
        alias=message.get_attr("IFLA_IFALIAS") or "",
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(message["flags"] & IFF_UP),
        carrier=bool(message["flags"] & IFF_LOWER_UP),
        master=message.get_attr("IFLA_MASTER") or 0,
        peer=message.get_attr("IFLA_LINK") or 0,
        vni=vxlan("ID") or 0,
        local=vxlan("LOCAL") or vxlan("LOCAL6") or "",
        data_port=vxlan("PORT") or 0,
        learning=bool(vxlan("LEARNING")),
        proxy=bool(vxlan("PROXY")),
        port_learning=brport("LEARNING"),
        port_flood=brport("UNICAST_FLOOD"),
        port_forwards=bool(port and port.get_attr("IFLA_BRPORT_STATE") == BR_STATE_FORWARDING),
    )


def _routes(message: Any) -> list[Route]:
    """The route of a message; for one with several next hops, one each."""
    default = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
    destination = f"{message.get_attr('RTA_DST') or default}/{message['dst_len']}"
    metrics = message.get_attr("RTA_METRICS")
    hops = message.get_attr("RTA_MULTIPATH") or [message]
    return [
        Route(
            destination=str(ipaddress.ip_network(destination)),
            gateway=hop.get_attr("RTA_GATEWAY") or "",
            device=(hop.get_attr("RTA_OIF") if hop is message else hop["oif"]) or 0,
            protocol=message["proto"],
            source=message.get_attr("RTA_PREFSRC") or "",
            mtu=(metrics.get_attr("RTAX_MTU") if metrics else None) or 0,
        )
        for hop in hops
    ]
