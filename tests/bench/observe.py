"""What the kernel of a network namespace holds, seen from outside: when rows came and went.

Counts the FDB rows of a VXLAN device, and its neighbour rows, whose MAC begins with PREFIX. It
listens to what the kernel tells of each row and drains that every few milliseconds; a dump at
the end confirms it. Dumps alone would disturb what is measured: on Linux 6.18 one of 100,000
FDB rows holds the lock that writers need for 0.7 s, one of 10,000 for 5 ms. So would reading what
each message says, which is left until there are as many as rows to wait for.
The same for whoever writes the rows. Source: netlink(7), rtnetlink(7), linux/neighbour.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

T = TypeVar("T")

PREFIX = b"\x02\x50"  # what the MACs of the benchmark begin with
INTERVAL = 0.01  # seconds between two looks at what has been told
BUFFER = 64 << 20  # bytes; a row's message takes about 1 KiB of it
RECEIVE = 1 << 18
EVENT = 4096  # bytes; what is told of one row has 100

NETLINK_ROUTE, RTNLGRP_NEIGH = 0, 3
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NETLINK_GET_STRICT_CHK = 270, 1, 12
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
AF_INET, AF_BRIDGE = 2, 7
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
NTF_SELF = 0x02
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
DUMP_ATTEMPTS = 10

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_NDMSG = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, ifindex, state, flags, type
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_MAC = _ATTRIBUTE.pack(10, NDA_LLADDR) + PREFIX
# A row of the VXLAN device itself has a destination behind its MAC; what the bridge above it
# says of the same MAC has none.
_FDB_ROW = re.compile(
    re.escape(_MAC) + b"(.{4})\0\0" + re.escape(_ATTRIBUTE.pack(8, NDA_DST)), re.DOTALL
)
_DESTINATION = _ATTRIBUTE.pack(8, NDA_DST)  # IPv4
_NEIGHBOUR_ROW = re.compile(re.escape(_DESTINATION) + b"(.{4})" + re.escape(_MAC), re.DOTALL)


class Enter(Protocol):
    """Runs a function in the namespace that is looked at."""

    def __call__(self, function: Callable[[], T], /) -> T: ...


class Late(Exception):
    """The rows did not come, or go, in the time given; says how many there are."""


class Observer:
    """The rows of one device, as told by the kernel from the moment this was made."""

    def __init__(self, enter: Enter, device: str) -> None:
        """OSError if there is no such device."""
        self.ifindex = enter(lambda: socket.if_nametoindex(device))
        self._events, self._dumps = enter(lambda: (_socket(), _socket()))
        self._events.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self._events.setblocking(False)
        self._events.bind((0, 0))  # without a port number of its own it is told nothing
        _attach(self._events, self.ifindex)
        self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_NEIGH)
        self._dumps.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        self._told: list[bytes] = []  # received and not read yet
        self._refresh()

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._events.close()
        self._dumps.close()

    def watch(
        self, fdb: int, neighbours: int, timeout: float = 60.0, *, at_once: bool = False
    ) -> Watch:
        """Begin to look for exactly that many rows, in a thread; see Watch.

        `at_once` wakes up for every row, for the time of a single one.
        """
        self._drain()  # what was told before is no part of it
        return Watch(lambda stop: self._look(fdb, neighbours, timeout, at_once, stop))

    def dump(self) -> tuple[set[bytes], set[bytes]]:
        """Of all FDB rows the last four bytes of the MAC, of all neighbour rows the address."""
        return self._dump(AF_BRIDGE, _FDB_ROW), self._dump(AF_INET, _NEIGHBOUR_ROW)

    def _look(
        self, fdb: int, neighbours: int, timeout: float, at_once: bool, stop: threading.Event
    ) -> float:
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        while True:
            if at_once:
                poll.poll(INTERVAL * 1000)
            else:
                time.sleep(INTERVAL)
            self._receive()
            now = time.monotonic()
            away = abs(fdb - len(self._fdb)) + abs(neighbours - len(self._neighbours))
            if len(self._told) >= away or now > deadline or stop.is_set():
                self._read()
            if (len(self._fdb), len(self._neighbours)) == (fdb, neighbours):
                break
            if now > deadline or stop.is_set():
                self._refresh()
                raise Late(
                    f"{len(self._fdb)} of {fdb} FDB rows and {len(self._neighbours)} of "
                    f"{neighbours} neighbour rows after {timeout:.0f} s"
                )
        found = self.dump()
        if found != (self._fdb, self._neighbours):
            raise Late(
                f"told of {fdb} FDB rows and {neighbours} neighbour rows, but a dump has "
                f"{len(found[0])} and {len(found[1])}"
            )
        return now

    def _refresh(self) -> None:
        self._told.clear()
        self._fdb, self._neighbours = self.dump()

    def _drain(self) -> None:
        self._receive()
        self._read()

    def _receive(self) -> None:
        receive, told = self._events.recv, self._told.append
        while True:
            try:
                told(receive(EVENT))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._refresh()  # events were lost

    def _read(self) -> None:
        """Take in what was received, in its order."""
        told, self._told = self._told, []
        for data in told:
            comes = _HEADER.unpack_from(data)[1] == RTM_NEWNEIGH
            mac = data.find(_MAC, 28)
            if data[16] == AF_BRIDGE:
                if mac > 0:
                    change = self._fdb.add if comes else self._fdb.discard
                    change(data[mac + 6 : mac + 10])
            elif data[28:32] == _DESTINATION:  # a neighbour that goes is told of without its MAC
                change = self._neighbours.add if comes and mac > 0 else self._neighbours.discard
                change(data[32:36])

    def _dump(self, family: int, row: re.Pattern[bytes]) -> set[bytes]:
        flags = NLM_F_REQUEST | NLM_F_DUMP
        if family == AF_BRIDGE:  # where the device is named differs, see net/core/rtnetlink.c
            request = _HEADER.pack(28, RTM_GETNEIGH, flags, 0, 0)
            request += _NDMSG.pack(family, self.ifindex, 0, 0, 0)
        else:
            request = _HEADER.pack(36, RTM_GETNEIGH, flags, 0, 0)
            request += _NDMSG.pack(family, 0, 0, 0, 0)
            request += _ATTRIBUTE.pack(8, NDA_IFINDEX) + struct.pack("=I", self.ifindex)
        for _ in range(DUMP_ATTEMPTS):
            found: set[bytes] = set()
            self._dumps.send(request)
            disturbed = done = False
            while not done:
                data = self._dumps.recv(RECEIVE)
                found.update(row.findall(data))
                done, interrupted = _ending(data)
                disturbed |= interrupted
            if not disturbed:
                return found
        raise Late(f"a dump of device {self.ifindex} was disturbed {DUMP_ATTEMPTS} times")


class Watch:
    """A look for rows that is under way."""

    def __init__(self, look: Callable[[threading.Event], float]) -> None:
        self._stop = threading.Event()
        self._time = 0.0
        self._failure: BaseException | None = None

        def work() -> None:
            try:
                self._time = look(self._stop)
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=work, name="observer", daemon=True)
        self._thread.start()

    def result(self) -> float:
        """When (time.monotonic) the rows were there; waits for it. Late if they were not."""
        self._thread.join()
        if self._failure:
            raise self._failure
        return self._time

    def cancel(self) -> None:
        """Give up, because what would have changed the rows failed."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            with contextlib.suppress(Exception):
                self.cancel()


def _socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)


def _attach(sock: socket.socket, ifindex: int) -> None:
    """Let the kernel drop what is not of that device, and the bridge's word on its rows.

    Classic BPF, linux/filter.h: ifindex is the word at byte 20, the family the byte at 16, its
    flags the byte at 26.
    """
    load_byte, load_word, equal, any_bit, return_ = 0x30, 0x20, 0x15, 0x45, 0x06
    instruction = struct.Struct("=HBBI")  # code, jump if true, jump if false, operand
    program = b"".join(
        instruction.pack(*line)
        for line in (
            (load_word, 0, 0, 20),
            (equal, 0, 5, socket.htonl(ifindex)),
            (load_byte, 0, 0, 16),
            (equal, 0, 2, AF_BRIDGE),
            (load_byte, 0, 0, 26),
            (any_bit, 0, 1, NTF_SELF),
            (return_, 0, 0, 0xFFFFFFFF),
            (return_, 0, 0, 0),
        )
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    count = len(program) // instruction.size
    sock.setsockopt(
        socket.SOL_SOCKET,
        SO_ATTACH_FILTER,
        struct.pack("@HP", count, ctypes.addressof(buffer)),  # struct sock_fprog
    )


def _ending(data: bytes) -> tuple[bool, bool]:
    """Whether a datagram ends its dump, and whether the kernel says that it lacks rows."""
    offset, interrupted = 0, False
    while offset + 16 <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
        interrupted |= bool(flags & NLM_F_DUMP_INTR)
        if kind == NLMSG_ERROR:
            code = -int.from_bytes(data[offset + 16 : offset + 20], "little", signed=True)
            raise OSError(code, "dump of rows")
        if kind == NLMSG_DONE:
            return True, interrupted
        offset += (length + 3) & ~3
    return False, interrupted
