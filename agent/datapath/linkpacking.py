"""The devices of our networks as netlink messages: bridge, VXLAN device, pair. Bytes only.

By hand as what reads them (linkstate.py): pyroute2 takes 300 µs of the interpreter for each, and
one after the other through two threads, and a network and its port are some ten.
What stands opposite: maker.py sends them; netlink.py has the same requests one by one.
Layouts: struct ifinfomsg (linux/rtnetlink.h), attributes of linux/if_link.h, linux/veth.h.
"""

from __future__ import annotations

import struct

from agent.datapath.linkstate import (
    IFF_UP,
    RTM_DELLINK,
    RTM_NEWLINK,
)
from agent.datapath.netlinkmessages import attribute, message
from agent.datapath.packing import (
    AF_INET,
    AF_INET6,
    IFA_ADDRESS,
    IFA_LOCAL,
    IFADDRMSG,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    RTM_NEWADDR,
)
from agent.datapath.routing import IFA_F_NODAD
from agent.notation import parse_address

_INFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS, _IFNAME, _MTU, _MASTER, _LINKINFO, _IFALIAS, _GROUP, _NET_NS_FD = (
    1, 3, 4, 10, 18, 20, 27, 28,
)  # fmt: skip
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 2, 4, 5
_BR_FORWARD_DELAY, _BR_STP_STATE, _BR_MCAST_SNOOPING = 1, 5, 23
_BRPORT_LEARNING, _BRPORT_UNICAST_FLOOD = 8, 9
_VXLAN_ID, _VXLAN_LOCAL, _VXLAN_LEARNING, _VXLAN_PROXY, _VXLAN_PORT, _VXLAN_LOCAL6 = (
    1, 4, 7, 11, 15, 17,
)  # fmt: skip
_VETH_INFO_PEER = 1

_NEW = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
_CHANGE = NLM_F_REQUEST | NLM_F_ACK


def new_bridge(name: str, mac: bytes, mtu: int, group: int) -> bytes:
    """A bridge without spanning tree and without multicast snooping, in a device group, up."""
    data = _number(_BR_FORWARD_DELAY, 0) + _number(_BR_STP_STATE, 0)
    data += attribute(_BR_MCAST_SNOOPING, b"\0")
    attributes = _name(name) + _number(_MTU, mtu) + attribute(_ADDRESS, mac)
    attributes += _number(_GROUP, group)
    return _link(_NEW, attributes + _kind("bridge", data), up=True)


def new_vxlan(
    name: str, vni: int, local: str, port: int, mtu: int, master: int, netns: int
) -> bytes:
    """A VXLAN device, down; see Netlink.add_vxlan."""
    address = parse_address(local or "::")
    kind = _VXLAN_LOCAL if len(address) == 4 else _VXLAN_LOCAL6
    data = _number(_VXLAN_ID, vni) + attribute(kind, address)
    data += attribute(_VXLAN_PORT, port.to_bytes(2, "big"))
    data += attribute(_VXLAN_LEARNING, b"\0") + attribute(_VXLAN_PROXY, b"\1")
    attributes = _name(name) + _number(_MTU, mtu) + _number(_MASTER, master)
    return _link(_NEW, attributes + _number(_NET_NS_FD, netns) + _kind("vxlan", data))


def new_pair(name: str, peer: str, netns: int, mtu: int, master: int, peer_mac: bytes) -> bytes:
    """A veth pair, both ends down, the other one in the namespace of file descriptor `netns`."""
    other = _INFO.pack(0, 0, 0, 0, 0) + _name(peer) + _number(_MTU, mtu)
    other += _number(_NET_NS_FD, netns) + attribute(_ADDRESS, peer_mac)
    attributes = _name(name) + _number(_MTU, mtu) + _number(_MASTER, master)
    return _link(_NEW, attributes + _kind("veth", attribute(_VETH_INFO_PEER, other)))


def mark(name: str, alias: str) -> bytes:
    """Give the device with that name an alias."""
    return _link(_CHANGE, _name(name) + _text(_IFALIAS, alias))


def mark_port(name: str, alias: str, *, flood: bool) -> bytes:
    """The same for a port of a bridge, which is set up, learns nothing, and with `flood` takes what
    no other port takes, if it is unicast: all in one, so that it is never up and otherwise."""
    data = attribute(_BRPORT_LEARNING, b"\0") + attribute(_BRPORT_UNICAST_FLOOD, bytes([flood]))
    info = _text(_INFO_SLAVE_KIND, "bridge") + attribute(_INFO_SLAVE_DATA, data)
    attributes = _name(name) + _text(_IFALIAS, alias) + attribute(_LINKINFO, info)
    return _link(_CHANGE, attributes, up=True)


def delete(name: str) -> bytes:
    """Delete the device with that name."""
    return _link(_CHANGE, _name(name), kind=RTM_DELLINK)


def new_address(index: int, interface: str) -> bytes:
    """An address in interface notation, without duplicate detection."""
    text, _, prefix = interface.partition("/")
    address = parse_address(text)
    family, flags = (AF_INET, 0) if len(address) == 4 else (AF_INET6, IFA_F_NODAD)
    body = IFADDRMSG.pack(family, int(prefix), flags, 0, index)
    body += attribute(IFA_LOCAL, address) + attribute(IFA_ADDRESS, address)
    return message(RTM_NEWADDR, _NEW, body)


def numbered(request: bytes, sequence: int) -> bytes:
    """The same message with that number, by which its answer is known."""
    return request[:8] + struct.pack("=I", sequence) + request[12:]


def _link(flags: int, attributes: bytes, *, up: bool = False, kind: int = RTM_NEWLINK) -> bytes:
    body = _INFO.pack(0, 0, 0, IFF_UP * up, IFF_UP * up) + attributes
    return message(kind, flags, body)


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _name(name: str) -> bytes:
    return _text(_IFNAME, name)


def _kind(kind: str, data: bytes) -> bytes:
    inside = _text(_INFO_KIND, kind) + attribute(_INFO_DATA, data)
    return attribute(_LINKINFO, inside)
