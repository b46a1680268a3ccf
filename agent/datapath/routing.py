"""Addresses, routes, rules and unresolved neighbours of one network namespace.

What the kernel sends where, once the devices are there. Every route and rule of ours bears our
protocol number.
What stands opposite: netlink.py has the devices; bulk.py the FDB and neighbour rows.
Source: rtnetlink(7).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from agent.datapath.rtnetlink import Rtnetlink, each, in_thread, request

PROTOCOL = 120  # of every route that is ours: RTPROT_*, 0-255, not in /etc/iproute2/rt_protos
TABLE_MAIN = 254
IFA_F_NODAD = 0x02
NUD_INCOMPLETE, NUD_FAILED = 0x01, 0x20  # linux/neighbour.h
RTNH_F_ONLINK = 4
IFA_F_NOPREFIXROUTE = 0x200
RTN_UNICAST, RTN_LOCAL, RTN_UNREACHABLE = 1, 2, 7
METRIC_LAST = 0xFF000000  # of a route that any other one to the same prefix is preferred to
RT_SCOPE_HOST = 254
RT_SCOPE_NOWHERE = 255  # of a route to delete: whichever it has


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route of the main table."""

    destination: str  # CIDR; 0.0.0.0/0 or ::/0 for the default
    gateway: str
    device: int
    protocol: int
    source: str
    mtu: int  # 0: the device's


class Routing(Rtnetlink):
    """One namespace's addresses and routes. Every call raises OSError if refused."""

    # -- addresses --

    @in_thread
    async def addresses(self, index: int) -> set[str]:
        """The addresses of a device, in interface notation."""
        answer = await request(self._route.addr("dump", match={"index": index}))
        return {
            f"{m.get_attr('IFA_LOCAL') or m.get_attr('IFA_ADDRESS')}/{m['prefixlen']}"
            async for m in each(answer)
            if m["index"] == index
        }

    @in_thread
    async def find_address(self, address: str) -> int:
        """The index of the device that has `address`; 0 if none has."""
        async for m in each(await request(self._route.addr("dump"))):
            if (m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS")) == address:
                return int(m["index"])
        return 0

    @in_thread
    async def add_address(self, index: int, interface: str) -> None:
        """Add an address in interface notation, without duplicate detection; fine if there."""
        flags = {"flags": IFA_F_NODAD} if ":" in interface else {}
        try:
            await request(self._route.addr("add", index=index, address=interface, **flags))
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise

    @in_thread
    async def add_host_address(self, index: int, address: str) -> None:
        """Add an address that no route follows from; fine if there."""
        flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE
        interface = f"{address}/{128 if ':' in address else 32}"
        try:
            await request(self._route.addr("add", index=index, address=interface, flags=flags))
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise

    @in_thread
    async def delete_address(self, index: int, interface: str) -> None:
        """Take an address away; fine if it is gone."""
        try:
            await request(self._route.addr("del", index=index, address=interface))
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
            answer = await request(self._route.neigh("dump", family=family))
            async for m in each(answer):
                address = m.get_attr("NDA_DST")
                if m["state"] & (NUD_INCOMPLETE | NUD_FAILED) and address in addresses:
                    found.append((m["ifindex"], address))
        for index, address in found:
            try:
                await request(self._route.neigh("del", ifindex=index, dst=address))
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
            answer = await request(self._route.route("dump", family=family, table=TABLE_MAIN))
            async for m in each(answer):
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
                async for m in each(await request(dump))
            ]
        )

    @in_thread
    async def add_unreachable(self, prefix: str) -> None:
        """Let nothing in an IPv6 `prefix` go out that has no route of its own; fine if there."""
        try:
            await request(
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
            await request(
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
        await request(
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
        await request(
            self._route.route(
                "add", dst=destination, gateway=gateway, oif=device, proto=PROTOCOL, **extra
            )
        )

    @in_thread
    async def replace_route(self, destination: str, gateway: str, device: int) -> None:
        """Have a route lead elsewhere, in one step: between, there is always one."""
        await request(
            self._route.route(
                "replace", dst=destination, gateway=gateway, oif=device, proto=PROTOCOL
            )
        )

    @in_thread
    async def delete_route(
        self, destination: str, gateway: str, device: int, *, any_protocol: bool = False
    ) -> None:
        """Delete a route of ours, or with `any_protocol` whosever it is; fine if it is gone."""
        protocol = 0 if any_protocol else PROTOCOL
        via = {"gateway": gateway} if gateway else {}
        route = {"dst": destination, "oif": device, "proto": protocol, **via}
        try:
            await request(self._route.route("del", scope=RT_SCOPE_NOWHERE, **route))
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.ENODEV):
                raise

    # -- routing by mark --

    @in_thread
    async def set_table_default(self, table: int, gateway: str, device: int) -> None:
        """Have `table` lead everything of the gateway's family there, and nowhere else."""
        await request(
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
            answer = await request(self._route.rule("dump", family=family))
            async for m in each(answer):
                if m.get_attr("FRA_TABLE") == table:
                    key = (m.get_attr("FRA_SRC") or "", m.get_attr("FRA_FWMARK") or 0)
                    found[key] = m.get_attr("FRA_PRIORITY") or 0
        return found

    @in_thread
    async def tables_of(self, sources: Collection[str], mark: int) -> set[int]:
        """The tables that rules lead what one of `sources` sends with `mark` to."""
        found = set()
        for family in (socket.AF_INET, socket.AF_INET6):
            answer = await request(self._route.rule("dump", family=family))
            async for m in each(answer):
                if m.get_attr("FRA_SRC") in sources and m.get_attr("FRA_FWMARK") == mark:
                    found.add(int(m.get_attr("FRA_TABLE")))
        return found

    @in_thread
    async def set_lookup(
        self, verb: Literal["add", "del"], table: int, source: str, mark: int, priority: int
    ) -> None:
        """A rule: what `source` sends with the bits of `mark` looks in `table`; fine if so."""
        try:
            await request(
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

    @in_thread
    async def set_local_default(self, table: int, device: int, ipv6: bool) -> None:
        """Have what looks in `table` arrive here, whatever its destination."""
        await request(
            self._route.route(
                "replace",
                family=socket.AF_INET6 if ipv6 else socket.AF_INET,
                dst="::/0" if ipv6 else "0.0.0.0/0",
                oif=device,
                table=table,
                type=RTN_LOCAL,
                scope=RT_SCOPE_HOST,
                proto=PROTOCOL,
            )
        )

    @in_thread
    async def ensure_mark(self, mark: int, table: int, priority: int, ipv6: bool) -> int:
        """A rule: what has just that mark looks in `table`; 1 if there was none."""
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        async for m in each(await request(self._route.rule("dump", family=family))):
            if (m.get_attr("FRA_TABLE"), m.get_attr("FRA_FWMARK")) == (table, mark):
                return 0
        await request(
            self._route.rule(
                "add",
                family=family,
                table=table,
                fwmark=mark,
                fwmask=0xFFFFFFFF,
                priority=priority,
                protocol=PROTOCOL,
            )
        )
        return 1


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
