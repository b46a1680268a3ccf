"""A network device as the kernel tells of it in one message, with what we set and no more.

Read by hand, 10 µs a device: in the background all of them are looked at again and again, and
pyroute2 would hold the interpreter for 300 µs each. What stands opposite: netlink.py, which
makes and changes devices; networks.py, which says how each should be.
Layouts: struct ifinfomsg (linux/rtnetlink.h), attributes of linux/if_link.h; an event of a
bridge (AF_BRIDGE, br_fill_ifinfo) has the settings of the port and not the alias.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass

from agent.datapath.netlinkmessages import read_attributes
from agent.datapath.packing import AF_BRIDGE, ATTRIBUTE, HEADER, NLM_F_DUMP, NLM_F_REQUEST

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
SKIP_STATISTICS = 8  # RTEXT_FILTER_SKIP_STATS: half of a link's answer is counters

_INFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS, _IFNAME, _MTU, _MASTER, _PROTINFO, _LINKINFO, _IFALIAS, _GROUP, _EXT_MASK = (
    1, 3, 4, 10, 12, 18, 20, 27, 29,
)  # fmt: skip
_INFO_DATA, _INFO_SLAVE_DATA, _INFO_KIND = 2, 5, 1
_BRPORT_LEARNING, _BRPORT_UNICAST_FLOOD = 8, 9
_BRPORT_MCAST_FLOOD, _BRPORT_BCAST_FLOOD = 27, 30
_VXLAN_LEARNING, _VXLAN_PROXY = 7, 11


@dataclass(frozen=True, slots=True)
class LinkState:
    """What a message says of a device; None where this kind of message says nothing."""

    index: int
    name: str
    up: bool
    carrier: bool
    mac: bytes
    mtu: int
    master: int  # 0: on no bridge
    alias: str | None = None
    learning: bool | None = None  # as a port of a bridge
    flood: bool | None = None
    vxlan_learning: bool | None = None
    vxlan_proxy: bool | None = None
    groups: bool | None = None  # as a port of a bridge: broadcast and multicast are flooded to it
    group: int | None = None  # of devices


def read_index(data: bytes, offset: int = 0) -> int:
    """Of a link's message at `offset`, the device only: most are not worth reading further."""
    return int(_INFO.unpack_from(data, offset + 16)[2])


def read_link(data: bytes, offset: int = 0) -> LinkState:
    """A message RTM_NEWLINK at `offset`."""
    length = HEADER.unpack_from(data, offset)[0]
    family, _, index, flags, _ = _INFO.unpack_from(data, offset + 16)
    found = dict(read_attributes(data, offset + 32, offset + length))
    port = vxlan = b""
    if family == AF_BRIDGE:
        port = found.get(_PROTINFO, b"")
    else:
        info = found.get(_LINKINFO, b"")
        inner = dict(read_attributes(info, 0, len(info)))
        port = inner.get(_INFO_SLAVE_DATA, b"")
        if inner.get(_INFO_KIND, b"").rstrip(b"\0") == b"vxlan":
            vxlan = inner.get(_INFO_DATA, b"")
    alias = None
    if family != AF_BRIDGE:
        alias = found.get(_IFALIAS, b"").rstrip(b"\0").decode(errors="replace")
    learning, flood = _flags(port, _BRPORT_LEARNING, _BRPORT_UNICAST_FLOOD)
    groups = _flags(port, _BRPORT_MCAST_FLOOD, _BRPORT_BCAST_FLOOD)
    vxlan_learning, vxlan_proxy = _flags(vxlan, _VXLAN_LEARNING, _VXLAN_PROXY)
    return LinkState(
        index=index,
        name=found.get(_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        up=bool(flags & IFF_UP),
        carrier=bool(flags & IFF_LOWER_UP),
        mac=found.get(_ADDRESS, b""),
        mtu=_number(found.get(_MTU, b"")),
        master=_number(found.get(_MASTER, b"")),
        alias=alias,
        learning=learning,
        flood=flood,
        vxlan_learning=vxlan_learning,
        vxlan_proxy=vxlan_proxy,
        groups=None if None in groups else all(groups),
        group=_number(found[_GROUP]) if _GROUP in found else None,
    )


def pack_dump_links(master: int) -> bytes:
    """A request for all devices on a bridge, or without `master` for all there are.

    The socket must have NETLINK_GET_STRICT_CHK on.
    """
    attributes = ATTRIBUTE.pack(8, _MASTER) + struct.pack("=I", master) if master else b""
    attributes += ATTRIBUTE.pack(8, _EXT_MASK) + struct.pack("=I", SKIP_STATISTICS)
    flags = NLM_F_REQUEST | NLM_F_DUMP
    head = HEADER.pack(32 + len(attributes), RTM_GETLINK, flags, 0, 0)
    return head + _INFO.pack(0, 0, 0, 0, 0) + attributes


def pack_get_link(index: int) -> bytes:
    """A request for one device."""
    attributes = ATTRIBUTE.pack(8, _EXT_MASK) + struct.pack("=I", SKIP_STATISTICS)
    head = HEADER.pack(32 + len(attributes), RTM_GETLINK, NLM_F_REQUEST, 0, 0)
    return head + _INFO.pack(0, 0, index, 0, 0) + attributes


def _number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)


def _flags(data: bytes, *kinds: int) -> list[bool | None]:
    found = dict(read_attributes(data, 0, len(data)))
    return [bool(found[kind][0]) if kind in found else None for kind in kinds]
