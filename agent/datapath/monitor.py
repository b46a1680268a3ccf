"""What others do to the devices, rows, addresses and routes of a namespace.

A filter in the kernel passes only what can mean drift, so that next to nothing of our own
writing comes back to us. An event is never an order: it says what to look at again.
What stands opposite: drift.py, which compares it with what should be. Source: netlink(7),
rtnetlink(7); Linux net/core/rtnetlink.c, net/core/neighbour.c (__neigh_notify has the port of
who asked), drivers/net/vxlan/vxlan_core.c (vxlan_fdb_notify has not).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent.datapath import sockfilter
from agent.datapath.linkstate import (
    RTM_DELLINK,
    RTM_NEWLINK,
    LinkState,
    read_index,
    read_link,
)
from agent.datapath.packing import (
    AF_BRIDGE,
    ATTRIBUTE,
    HEADER,
    NDA_DST,
    NDA_IFINDEX,
    NDA_LLADDR,
    NDA_PORT,
    NDA_VNI,
    NDMSG,
    NTF_SELF,
    NUD_NOARP,
    NUD_PERMANENT,
    RTM_DELNEIGH,
    RTM_NEWADDR,
    RTM_NEWNEIGH,
    Defaults,
    read_address,
)
from agent.datapath.routing import PROTOCOL
from agent.drivers.base import DEFAULT
from agent.syscalls import socket_in

RTM_DELADDR, RTM_DELROUTE, RTM_NEWNETCONF = 21, 25, 80
# RTNLGRP_*: LINK, NEIGH; IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, IPV4_, IPV6_NETCONF
ROW_GROUPS, ADDRESS_GROUPS = (1, 3), (5, 7, 9, 11, 24, 25)
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
SO_RCVBUFFORCE = 33
EVERY_DEVICE = 0xFFFFFFFF  # NETCONFA_IFINDEX_ALL

# A deleted row costs about 1 KiB while it waits: this is 30,000 of them, and only while so.
RECEIVE_BUFFER = 32 << 20  # bytes
RECEIVE = 1 << 16
TURN = 128  # datagrams handled in one turn of the loop, about 0.5 ms

Rows = dict[int, list[tuple[bytes, bytes]]]  # by device: MAC and VTEP, or address and MAC


@dataclass(slots=True)
class Events:
    """What was seen in one turn."""

    lost: set[int] = field(default_factory=set)  # devices gone, or off their bridge
    links: list[LinkState] = field(default_factory=list)  # devices that something changed on
    macs: dict[int, list[bytes]] = field(default_factory=dict)  # FDB rows gone, by device
    addresses: dict[int, list[bytes]] = field(default_factory=dict)  # neighbour rows gone
    new_macs: Rows = field(default_factory=dict)  # FDB rows that came or changed
    new_addresses: Rows = field(default_factory=dict)  # neighbour rows; b"" if not permanent
    defaults: dict[int, Defaults] = field(default_factory=dict)  # of both, in their order
    entries: list[tuple[int, bytes]] = field(default_factory=list)  # new static ones of a bridge
    interfaces: list[tuple[int, str, bool]] = field(default_factory=list)  # address, whether new
    routes: bool = False  # one that bore our mark is gone
    forwarding: bool = False  # somebody set it, for all devices


class Listener:
    """A multicast netlink socket, drained a turn of the loop at a time."""

    def __init__(self, netns: str | Path, protocol: int, overrun: Callable[[], None]) -> None:
        self._overrun = overrun
        self._socket = socket_in(netns, socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.bind((0, 0))  # an address: events are not sent to where they come from, 0
        self._socket.setblocking(False)

    def _start(self, groups: tuple[int, ...], buffer: int) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer)
        for group in groups:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        asyncio.get_running_loop().add_reader(self._socket, self._ready)

    def close(self) -> None:
        """Stop listening."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _ready(self) -> None:
        received: list[bytes] = []
        for _ in range(TURN):
            try:
                received.append(self._socket.recv(RECEIVE))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._overrun()
        if received:
            self._handle(received)

    def _handle(self, received: list[bytes]) -> None:
        raise NotImplementedError


class Monitor(Listener):
    """One namespace: ours, or with `host` the host's, of which only a little is ours."""

    def __init__(
        self,
        netns: str | Path,
        seen: Callable[[Events], None],
        overrun: Callable[[], None],
        buffer: int = RECEIVE_BUFFER,
        host: bool = False,
    ) -> None:
        """Call `seen` with what happened; `overrun` when events were lost, too many for `buffer`.

        Of the host's namespace that is addresses and routes that went, and forwarding.
        """
        super().__init__(netns, socket.NETLINK_ROUTE, overrun)
        self._seen = seen
        self._host = host
        self._muted: list[tuple[int, bool]] = []
        self._ignored = 0
        self._lock = threading.Lock()  # rows are written, and so muted, in a thread
        self._attach()
        self._start(ADDRESS_GROUPS if host else ROW_GROUPS + ADDRESS_GROUPS, buffer)

    def ignore(self, port: int) -> None:
        """Hear nothing of neighbour rows that the netlink socket with this port writes."""
        with self._lock:
            self._ignored = port
            self._attach()

    @contextlib.contextmanager
    def muting(self, ifindex: int, deleted: bool = True) -> Iterator[None]:
        """Meanwhile, hear nothing of rows of a device that are deleted, or of others."""
        muted = (ifindex, deleted)
        with self._lock:
            self._muted.append(muted)
            self._attach()
        try:
            yield
        finally:
            with self._lock:
                self._muted.remove(muted)
                self._attach()

    def _attach(self) -> None:
        program = _host_filter() if self._host else _filter(self._muted, self._ignored)
        sockfilter.attach(self._socket, program)

    def _handle(self, received: list[bytes]) -> None:
        events = Events()
        for data in received:
            _, kind, _, _, _ = HEADER.unpack_from(data)
            if kind in (RTM_DELNEIGH, RTM_NEWNEIGH):
                _row(data, kind == RTM_NEWNEIGH, events)
            elif kind == RTM_NEWLINK:
                events.links.append(read_link(data))
            elif kind == RTM_DELLINK:  # with family AF_BRIDGE: it has left its bridge
                events.lost.add(read_index(data))
            elif kind in (RTM_NEWADDR, RTM_DELADDR):
                events.interfaces.append((*read_address(data), kind == RTM_NEWADDR))
            elif kind == RTM_DELROUTE:
                events.routes = True
            else:
                events.forwarding = True
        self._seen(events)


# Offsets: the type is a half-word at byte 4 of struct nlmsghdr, the port of who asked for the
# change the word at 12; what follows begins at 16. ndmsg: family 0, device 4; rtmsg: protocol
# 5; netconfmsg is 4 bytes with its padding, then NETCONFA_IFINDEX has its value at 8.
_ROUTE: list[sockfilter.Line] = ["route:", (21, 1), (PROTOCOL, 1, "accept"), "drop"]
_NETCONF: list[sockfilter.Line] = ["netconf:", (24, 4), (EVERY_DEVICE, 4, "accept"), "drop"]
_END: list[sockfilter.Line] = ["accept:", "accept"]


def _filter(muted: list[tuple[int, bool]], ignored: int) -> bytes:
    """Links and addresses; rows that others wrote or deleted, of devices that are not muted."""
    program: list[sockfilter.Line] = [
        (4, 2),
        (RTM_NEWLINK, 2, "accept"),
        (RTM_DELLINK, 2, "accept"),
        (RTM_NEWADDR, 2, "accept"),
        (RTM_DELADDR, 2, "accept"),
        (RTM_DELROUTE, 2, "route"),
        (RTM_NEWNETCONF, 2, "netconf"),
        (RTM_DELNEIGH, 2, "row"),
        (RTM_NEWNEIGH, 2, "new"),
        "drop",
        *_ROUTE,
        *_NETCONF,
        "new:",
        (16, 1),
        (AF_BRIDGE, 1, "newrow"),
        (12, 4),
        (0, 4, "drop"),  # the kernel itself, which learns and forgets neighbours
        (ignored, 4, "drop"),
        "newrow:",
        (20, 4),
        *[(index, 4, "drop") for index, deleted in muted if not deleted],
        "accept",
        "row:",
        (20, 4),
        *[(index, 4, "drop") for index, deleted in muted if deleted],
        *_END,
        "drop:",
        "drop",
    ]
    return sockfilter.assemble(program)


def _host_filter() -> bytes:
    return sockfilter.assemble(
        [
            (4, 2),
            (RTM_DELADDR, 2, "accept"),
            (RTM_DELROUTE, 2, "route"),
            (RTM_NEWNETCONF, 2, "netconf"),
            "drop",
            *_ROUTE,
            *_NETCONF,
            *_END,
        ]
    )


def _row(data: bytes, new: bool, events: Events) -> None:
    """Note which row a RTM_DELNEIGH or RTM_NEWNEIGH is about."""
    family, index, state, flags, _ = NDMSG.unpack_from(data, 16)
    mac = destination = b""
    is_odd = False
    at, end = 28, len(data)
    while at + 4 <= end:
        size, kind = ATTRIBUTE.unpack_from(data, at)
        if kind == NDA_LLADDR:
            mac = data[at + 4 : at + size]
        elif kind == NDA_DST:
            destination = data[at + 4 : at + size]
        elif kind in (NDA_PORT, NDA_VNI, NDA_IFINDEX):
            is_odd = True
        if size < 4 or (mac and destination and mac != DEFAULT):
            break
        at += (size + 3) & ~3
    if family == AF_BRIDGE:
        if mac == DEFAULT:
            if new and is_odd:
                destination = b""  # none of ours, wherever it leads
            events.defaults.setdefault(index, []).append((destination, new))
        if not new:
            events.macs.setdefault(index, []).append(mac)
        elif flags & NTF_SELF:
            events.new_macs.setdefault(index, []).append((mac, destination))
        elif state & NUD_NOARP and not state & NUD_PERMANENT:
            events.entries.append((index, mac))
    elif new:
        kept = mac if state & NUD_PERMANENT else b""
        events.new_addresses.setdefault(index, []).append((destination, kept))
    else:
        events.addresses.setdefault(index, []).append(destination)
