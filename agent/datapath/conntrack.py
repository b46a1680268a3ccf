"""The kernel's table of connections in one network namespace: looked through, and deleted from.

By netlink, no `conntrack` binary needed. What stands opposite: connections.py, which says which.
Layouts: struct nfgenmsg (linux/netfilter/nfnetlink.h), linux/netfilter/nfnetlink_conntrack.h;
attributes are big-endian.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from agent.datapath.bulk import SO_RCVBUFFORCE
from agent.datapath.netlinkmessages import answers, attribute, check, message, read_attributes
from agent.datapath.packing import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
)
from agent.syscalls import socket_in

NETLINK_NETFILTER = 12
CT_GET, CT_DELETE = 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_ORIGINAL, _REPLY, _ID = 1, 2, 12  # CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID
_IP, _PROTOCOL = 1, 2  # CTA_TUPLE_IP, CTA_TUPLE_PROTO
_NUMBER, _SOURCE_PORT, _TARGET_PORT = 1, 2, 3
BUFFER = 4 << 20  # bytes
BATCH = 200  # deletions sent before their answers are read
TIMEOUT = 5.0  # s, for an answer of the kernel
WHAT = "connection tracking"  # in errors


class Tuple(NamedTuple):
    """One direction of a connection. Ports are 0 where the protocol has none."""

    source: bytes
    source_port: int
    target: bytes
    target_port: int


class Entry(NamedTuple):
    """One connection."""

    protocol: int  # IPPROTO_*
    original: Tuple
    reply: Tuple
    raw: tuple[bytes, bytes]  # the reply tuple and the id, as the kernel wrote them


class Conntrack:
    """The table of one namespace. Blocks: for a thread."""

    def __init__(self, netns: str | Path) -> None:
        """For the namespace at path `netns`. OSError."""
        self._sock = socket_in(netns, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self._sock.settimeout(TIMEOUT)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def find(self, family: int, needles: Iterable[bytes] | None = None) -> Iterator[Entry]:
        """The TCP and UDP connections of AF_INET or AF_INET6.

        With `needles`, those only whose message has one of them in it, which is quicker than
        to read them all. OSError if the kernel has no such table.
        """
        body = struct.pack(">BBH", family, 0, 0)
        flags = NLM_F_REQUEST | NLM_F_DUMP
        self._sock.send(message(CT_GET, flags, body))
        sought = None if needles is None else list(needles)
        for kind, body in answers(self._sock):
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                check(body, WHAT)
            elif sought is None or any(needle in body for needle in sought):
                entry = _read(body[4:])
                if entry and entry.protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                    yield entry

    def delete(self, entries: Iterable[Entry], family: int) -> list[Entry]:
        """Delete connections, and those that were still there. OSError."""
        left, deleted = list(entries), []
        while left:
            part, left = left[:BATCH], left[BATCH:]
            self._sock.send(b"".join(_deletion(entry, family) for entry in part))
            said = answers(self._sock)
            for entry in part:
                _, message = next(said)
                try:
                    check(message, WHAT)
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        raise
                else:
                    deleted.append(entry)
        return deleted


def _read(data: bytes) -> Entry | None:
    found = dict(read_attributes(data))
    original, reply = found.get(_ORIGINAL), found.get(_REPLY)
    if original is None or reply is None:
        return None
    protocol, there = _read_tuple(original)
    return Entry(protocol, there, _read_tuple(reply)[1], (reply, found.get(_ID, b"")))


def _read_tuple(data: bytes) -> tuple[int, Tuple]:
    found = dict(read_attributes(data))
    addresses = [a for _, a in read_attributes(found.get(_IP, b""))]  # the source's, the target's
    ports = dict(read_attributes(found.get(_PROTOCOL, b"")))

    def number(kind: int) -> int:
        return int.from_bytes(ports.get(kind, b""), "big")

    source, target = addresses if len(addresses) == 2 else (b"", b"")
    return number(_NUMBER), Tuple(source, number(_SOURCE_PORT), target, number(_TARGET_PORT))


def _deletion(entry: Entry, family: int) -> bytes:
    """Not another connection that has come to the same ports meanwhile: that leads to another
    backend, so what is answered to it is another tuple. The id alone would not do: it is made of
    the original tuple and of a place in memory, and whoever takes the first gets the second."""
    reply, identity = entry.raw
    body = struct.pack(">BBH", family, 0, 0)
    body += attribute(_REPLY | 0x8000, reply) + attribute(_ID, identity)
    return message(CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, body)


def with_table(netns: str | Path, work: Callable[[Conntrack], None]) -> None:
    """Do something with the table of the namespace at `netns`; nothing where there is none."""
    table = Conntrack(netns)
    try:
        work(table)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPROTONOSUPPORT, errno.ENOENT):
            raise
    finally:
        table.close()
