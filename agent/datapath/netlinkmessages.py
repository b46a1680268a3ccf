"""What netlink messages of every family have in common: a header, attributes, answers.

What stands opposite: conntrack.py, sockdiag.py, egress.py, linkpacking.py and linkstate.py say what
is in them; packing.py, where there are very many, packs by hand.
Source: netlink(7), linux/netlink.h.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from agent.datapath.packing import ATTRIBUTE, CODE, HEADER

RECEIVE = 1 << 17  # bytes of a datagram; the kernel sends less
TYPE = 0x3FFF  # of an attribute, without NLA_F_NESTED and NLA_F_NET_BYTEORDER


def message(kind: int, flags: int, body: bytes) -> bytes:
    """A whole message, without number and port."""
    return HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, filled up to a multiple of four bytes."""
    return ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def read_attributes(
    data: bytes, at: int = 0, end: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """The attributes from `at` on, by type; up to one that is none."""
    end = len(data) if end is None else end
    while at + 4 <= end:
        size, kind = ATTRIBUTE.unpack_from(data, at)
        if size < 4:
            return
        yield kind & TYPE, data[at + 4 : at + size]
        at += (size + 3) & ~3


def answers(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    """What the kernel answers, for as long as one asks: type and body of each message. OSError."""
    while True:
        data, at = sock.recv(RECEIVE), 0
        while at + HEADER.size <= len(data):
            length, kind, _, _, _ = HEADER.unpack_from(data, at)
            yield kind, data[at + HEADER.size : at + length]
            at += max(HEADER.size, (length + 3) & ~3)


def check(body: bytes, what: str) -> None:
    """Raise what the body of an NLMSG_ERROR says about `what`, unless it acknowledges. OSError."""
    code = -int(CODE.unpack_from(body)[0])
    if code:
        raise OSError(code, f"{what}: {os.strerror(code)}")
