"""What others do to our namespaces: devices gone or down, rows or rules deleted.

A filter in the kernel passes only what can mean a loss, so that our own writing does not come
back to us. An event is never an order: it says what to look at again.
What stands opposite: reconciler.py, which looks. Source: netlink(7); Linux
Documentation/networking/filter.rst (classic BPF).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent.datapath.packing import (
    AF_BRIDGE,
    ATTRIBUTE,
    HEADER,
    NDA_DST,
    NDA_LLADDR,
    NDMSG,
    RTM_DELNEIGH,
)
from agent.syscalls import socket_in

RTM_NEWLINK, RTM_DELLINK = 16, 17
RTNLGRP_LINK, RTNLGRP_NEIGH = 1, 3
NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7
NFT_DELETIONS = {0x0A02, 0x0A05, 0x0A08}  # of a table, a chain, a rule
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000

# A deleted row costs about 1 KiB while it waits: this is 30,000 of them, and only while so.
RECEIVE_BUFFER = 32 << 20  # bytes
RECEIVE = 1 << 16
TURN = 128  # datagrams handled in one turn of the loop, about 0.5 ms

_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jump if true, if false, k
_LINK_INFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change


@dataclass(slots=True)
class Events:
    """What was seen in one turn."""

    lost: set[int] = field(default_factory=set)  # devices gone, or off their bridge
    down: set[int] = field(default_factory=set)  # devices set down or without carrier
    macs: dict[int, list[bytes]] = field(default_factory=dict)  # FDB rows gone, by device
    addresses: dict[int, list[bytes]] = field(default_factory=dict)  # neighbour rows gone


class _Listener:
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


class Monitor(_Listener):
    """Devices and rows of one namespace."""

    def __init__(
        self,
        netns: str | Path,
        seen: Callable[[Events], None],
        overrun: Callable[[], None],
        buffer: int = RECEIVE_BUFFER,
    ) -> None:
        """Call `seen` with what was lost; `overrun` when events were, too many for `buffer`."""
        super().__init__(netns, socket.NETLINK_ROUTE, overrun)
        self._seen = seen
        self._muted: list[int] = []
        self._attach()
        self._start((RTNLGRP_LINK, RTNLGRP_NEIGH), buffer)

    @contextlib.contextmanager
    def muting(self, ifindex: int) -> Iterator[None]:
        """Meanwhile, hear nothing of deleted rows of a device: it, or many of them, are to go."""
        self._muted.append(ifindex)
        self._attach()
        try:
            yield
        finally:
            self._muted.remove(ifindex)
            self._attach()

    def _attach(self) -> None:
        program = _filter(self._muted)
        buffer = ctypes.create_string_buffer(program, len(program))
        length = len(program) // _INSTRUCTION.size
        fprog = struct.pack("@HP", length, ctypes.addressof(buffer))  # struct sock_fprog
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)

    def _handle(self, received: list[bytes]) -> None:
        events = Events()
        for data in received:
            _, kind, _, _, _ = HEADER.unpack_from(data)
            if kind == RTM_DELNEIGH:
                _row(data, events)
                continue
            _, _, index, flags, _ = _LINK_INFO.unpack_from(data, 16)
            if kind == RTM_DELLINK:  # with family AF_BRIDGE: it has left its bridge
                events.lost.add(index)
            elif flags & (IFF_UP | IFF_LOWER_UP) != IFF_UP | IFF_LOWER_UP:
                events.down.add(index)
        self._seen(events)


class TableMonitor(_Listener):
    """Whether somebody deletes from the nftables table `vxmesh` of one namespace."""

    def __init__(
        self, netns: str | Path, deleted: Callable[[], None], buffer: int = RECEIVE_BUFFER
    ) -> None:
        """Call `deleted` when a chain, a rule or the table went, or events were lost."""
        super().__init__(netns, NETLINK_NETFILTER, deleted)
        self._deleted = deleted
        self._start((NFNLGRP_NFTABLES,), buffer)

    def _handle(self, received: list[bytes]) -> None:
        for data in received:
            offset = 0
            while offset + 16 <= len(data):
                length, kind, _, _, _ = HEADER.unpack_from(data, offset)
                if kind in NFT_DELETIONS and b"vxmesh\0" in data[offset : offset + length]:
                    self._deleted()
                    return
                offset += (length + 3) & ~3


class CarrierMonitor(_Listener):
    """Devices of one namespace that come up, or get their carrier back."""

    def __init__(
        self, netns: str | Path, up: Callable[[], None], buffer: int = RECEIVE_BUFFER
    ) -> None:
        """Call `up` when one did, or events were lost."""
        super().__init__(netns, socket.NETLINK_ROUTE, up)
        self._up = up
        self._running: dict[int, bool] = {}
        self._start((RTNLGRP_LINK,), buffer)

    def _handle(self, received: list[bytes]) -> None:
        came = False
        for data in received:
            _, kind, _, _, _ = HEADER.unpack_from(data)
            if kind not in (RTM_NEWLINK, RTM_DELLINK):
                continue
            family, _, index, flags, _ = _LINK_INFO.unpack_from(data, 16)
            if family != socket.AF_UNSPEC:
                continue  # what a bridge says of its ports
            now = kind == RTM_NEWLINK and flags & (IFF_UP | IFF_LOWER_UP) == IFF_UP | IFF_LOWER_UP
            # A device is told of again and again; only the first event after it was down counts.
            came = came or (now and not self._running.get(index, True))
            self._running[index] = now
            if kind == RTM_DELLINK:
                del self._running[index]
        if came:
            self._up()


def _filter(muted: list[int]) -> bytes:
    """A program that passes link events, and deleted rows of devices that are not muted.

    The type is a half-word at byte 4 of struct nlmsghdr, the device of a row the word at byte
    20. Loads are in network order, hence the swapping.
    """
    load_half, load_word, equal, return_ = 0x28, 0x20, 0x15, 0x06
    drop, accept = (return_, 0, 0, 0), (return_, 0, 0, 0xFFFFFFFF)
    program = [
        (load_half, 0, 0, 4),
        (equal, 3, 0, socket.htons(RTM_NEWLINK)),
        (equal, 2, 0, socket.htons(RTM_DELLINK)),
        (equal, 2, 0, socket.htons(RTM_DELNEIGH)),
        drop,
        accept,
        (load_word, 0, 0, 20),
    ]
    for index in muted:
        program += [(equal, 0, 1, socket.htonl(index)), drop]
    program.append(accept)
    return b"".join(_INSTRUCTION.pack(*line) for line in program)


def _row(data: bytes, events: Events) -> None:
    """Note which row a RTM_DELNEIGH is about."""
    family, index, _, _, _ = NDMSG.unpack_from(data, 16)
    wanted, rows = (NDA_LLADDR, events.macs) if family == AF_BRIDGE else (NDA_DST, events.addresses)
    at = 28
    while at + 4 <= len(data):
        size, kind = ATTRIBUTE.unpack_from(data, at)
        if size < 4:
            return
        if kind == wanted:
            rows.setdefault(index, []).append(data[at + 4 : at + size])
            return
        at += (size + 3) & ~3
