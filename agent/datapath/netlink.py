"""The devices of one network namespace, and with them all that is asked of its kernel one by one.

What stands opposite: routing.py for addresses and routes, bulk.py for FDB and neighbour rows,
which are many. Source: rtnetlink(7).
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from agent.datapath.linkstate import IFF_LOWER_UP, IFF_UP, SKIP_STATISTICS
from agent.datapath.routing import Routing
from agent.datapath.rtnetlink import each, in_thread, request
from agent.notation import format_mac

BR_STATE_FORWARDING = 3  # linux/if_bridge.h
NTF_SELF, NUD_PERMANENT = 0x02, 0x80  # linux/neighbour.h
IPVLAN_MODES = {"l2": 0, "l3": 1}  # linux/if_link.h


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
    group: int
    # Index of what it hangs on, in that one's namespace: a veth's other end, the parent of a
    # macvlan, ipvlan or VLAN device.
    peer: int
    vni: int
    local: str
    data_port: int
    learning: bool  # of a VXLAN device
    proxy: bool
    port_learning: bool  # of a bridge port
    port_flood: bool
    port_groups: bool  # floods broadcast and multicast to it
    port_forwards: bool
    abroad: bool = False  # what it hangs on, or its UDP socket, is in another namespace


class Netlink(Routing):
    """One namespace's links, addresses and routes. Every call raises OSError if refused."""

    @in_thread
    async def links(self) -> list[Link]:
        """All devices."""
        answer = await request(self._route.link("dump", ext_mask=SKIP_STATISTICS))
        return [_link(message) async for message in each(answer)]

    @in_thread
    async def link(self, name: str) -> Link | None:
        """The device with that name, if there is one.

        To look at it also makes the kernel take in a carrier that has just come, instead of
        some time soon (linkwatch_sync_dev in rtnl_getlink).
        """
        try:
            answer = await request(self._route.link("get", ifname=name, ext_mask=SKIP_STATISTICS))
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
        await request(
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
        await request(
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
        await request(self._route.link("add", ifname=name, kind="wireguard"))

    @in_thread
    async def add_veth(
        self,
        name: str,
        peer: str,
        netns: int,
        mtu: int,
        *,
        index: int = 0,
    ) -> None:
        """A veth pair whose end `peer` is in the namespace of file descriptor `netns`; both down.

        EEXIST if either name is taken. Where `index` is 0 it may have any.
        """
        other: dict[str, object] = {"ifname": peer, "net_ns_fd": netns, "mtu": mtu}
        mine = {"index": index} if index else {}
        await request(
            self._route.link("add", ifname=name, kind="veth", mtu=mtu, peer=other, **mine)
        )

    @in_thread
    async def add_sharing(
        self, kind: str, mode: str, name: str, parent: int, netns: int, mtu: int, mac: str = ""
    ) -> None:
        """A macvlan or ipvlan device on the device with index `parent`, in the namespace of file
        descriptor `netns`; down.

        EOPNOTSUPP where the kernel has none, EBUSY if the parent is given away otherwise.
        """
        if kind == "ipvlan":
            told: dict[str, object] = {"ipvlan_mode": IPVLAN_MODES[mode]}
        else:
            told = {"macvlan_mode": mode}
        if mac:
            told["address"] = mac
        await request(
            self._route.link(
                "add", ifname=name, kind=kind, link=parent, net_ns_fd=netns, mtu=mtu, **told
            )
        )

    @in_thread
    async def add_vlan(self, name: str, trunk: int, vlan: int) -> None:
        """The VLAN sub-interface of a device, down; EOPNOTSUPP where the kernel has none."""
        await request(self._route.link("add", ifname=name, kind="vlan", link=trunk, vlan_id=vlan))

    @in_thread
    async def set_port(self, index: int, flood: bool) -> None:
        """As a port of a bridge: learn nothing, take broadcast and multicast, and with `flood`
        unicast that no other port takes."""
        await request(
            self._route.link(
                "set",
                index=index,
                kind="bridge_slave",
                learning=0,
                unicast_flood=int(flood),
                mcast_flood=1,
                bcast_flood=1,
            )
        )

    @in_thread
    async def lead(self, index: int, mac: bytes, vtep: str) -> None:
        """Have a VXLAN device send what is for `mac` to a VTEP."""
        await request(
            self._route.fdb(
                "replace",
                ifindex=index,
                lladdr=format_mac(mac),
                dst=vtep,
                state=NUD_PERMANENT,
                flags=NTF_SELF,
            )
        )

    @in_thread
    async def set_link(self, index: int, /, **what: object) -> None:
        """Change `ifalias`, `ifname`, `state` (up, down), `mtu`, `master`, `group`, `address`."""
        known = {"ifalias", "ifname", "state", "mtu", "master", "group", "address"}
        unknown = what.keys() - known
        if unknown:  # pyroute2 would drop it
            raise TypeError(f"set_link: {unknown}")
        await request(self._route.link("set", index=index, **what))

    @in_thread
    async def hand_over(self, index: int, name: str, netns: int) -> None:
        """Move a device that is down into the namespace of file descriptor `netns`, as `name`."""
        await request(self._route.link("set", index=index, ifname=name, net_ns_fd=netns))

    @in_thread
    async def delete_link(self, index: int) -> None:
        """Delete a device; fine if it is gone."""
        try:
            await request(self._route.link("del", index=index))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise


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
        group=message.get_attr("IFLA_GROUP") or 0,
        peer=message.get_attr("IFLA_LINK") or 0,
        vni=vxlan("ID") or 0,
        local=vxlan("LOCAL") or vxlan("LOCAL6") or "",
        data_port=vxlan("PORT") or 0,
        learning=bool(vxlan("LEARNING")),
        proxy=bool(vxlan("PROXY")),
        port_learning=brport("LEARNING"),
        port_flood=brport("UNICAST_FLOOD"),
        port_groups=brport("MCAST_FLOOD") and brport("BCAST_FLOOD"),
        port_forwards=bool(port and port.get_attr("IFLA_BRPORT_STATE") == BR_STATE_FORWARDING),
        abroad=message.get_attr("IFLA_LINK_NETNSID") is not None,
    )
