"""Packets that make a client notice at once that its connection is over.

A reset must bear the number that its receiver expects next, which nobody here knows. But an
acknowledgement that fits nothing is answered with one that does (RFC 9293, 3.10.7.4), and
that answer, which belongs to no connection that is known, is refused by our rules (chain
`stray`) with a reset whose number is right.
What stands opposite: connections.py; balancerules.py, whose rules leave these packets untracked.
Source: RFC 9293; ip(7) and ipv6(7), raw sockets.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from agent.datapath.conntrack import Tuple
from agent.drivers.marks import UNTRACKED
from agent.syscalls import socket_in

SO_MARK = 36
IPV6_HDRINCL = 36
ACK = 0x10


def send(netns: str | Path, family: int, tuples: Iterable[Tuple]) -> None:
    """Send one packet for each of these, from its source to its target. OSError if not at all."""
    raw = socket_in(netns, family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        raw.setsockopt(socket.SOL_SOCKET, SO_MARK, UNTRACKED)
        raw.setblocking(False)
        if family == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
        for one in tuples:
            target = socket.inet_ntop(family, one.target)
            with contextlib.suppress(OSError):  # whoever has gone need not be told
                raw.sendto(packet(one), (target, 0))


def packet(one: Tuple) -> bytes:
    """An acknowledgement of nothing, with its IP header (IPv4: the kernel sums that up)."""
    segment = struct.pack(
        ">HHIIBBHHH", one.source_port, one.target_port, 0, 0, 5 << 4, ACK, 0, 0, 0
    )
    pseudo = one.source + one.target + struct.pack(">II", len(segment), socket.IPPROTO_TCP)
    total = sum(struct.unpack(f">{(len(pseudo) + len(segment)) // 2}H", pseudo + segment))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    segment = segment[:16] + struct.pack(">H", total) + segment[18:]
    if len(one.source) == 16:
        head = struct.pack(">IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, 64)
        return head + one.source + one.target + segment
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, socket.IPPROTO_TCP, 0)
    return head + one.source + one.target + segment
