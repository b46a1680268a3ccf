"""TCP sockets of a network namespace that bear one of our marks: found, and ended.

What stands opposite: ledsockets.py, which says which. Source: sock_diag(7), linux/inet_diag.h.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent.datapath.netlinkmessages import answers, attribute, check, message, read_attributes
from agent.datapath.packing import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
)

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
TIMEOUT = 5.0  # s, for an answer of the kernel
WHAT = "sockets"  # in errors
# ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT: whoever has one may wait for something
STATES = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8
_REQUEST = struct.Struct("=BBBBI48s")  # struct inet_diag_req_v2, with its inet_diag_sockid
_ANSWER = struct.Struct("=4B48s5I")  # struct inet_diag_msg
_ID = struct.Struct(">HH16s16s")  # the beginning of struct inet_diag_sockid
_ATTRIBUTE_BYTECODE, _ATTRIBUTE_MARK = 1, 15  # INET_DIAG_REQ_BYTECODE, INET_DIAG_MARK
_MARK_CONDITION = 10  # INET_DIAG_BC_MARK_COND


class Socket(NamedTuple):
    """A TCP socket. Addresses have 4 or 16 bytes, as its family; ::ffff:a.b.c.d is IPv6."""

    family: int
    mark: int
    source: bytes
    source_port: int
    target: bytes
    target_port: int
    id: bytes  # what the kernel knows it by


def open_here() -> socket.socket:
    """A socket for the calls below, in the calling thread's namespace. OSError."""
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
    )
    sock.settimeout(TIMEOUT)
    return sock


def find(diag: socket.socket, family: int, mark: int, mask: int) -> Iterator[Socket]:
    """The TCP sockets of AF_INET or AF_INET6 whose mark has `mark` in the bits of `mask`.

    OSError.
    """
    # One operation of 12 bytes; if it holds, on to the end: else past it, which drops the socket.
    condition = struct.pack("=BBHII", _MARK_CONDITION, 12, 16, mark, mask)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, STATES, bytes(48))
    body += attribute(_ATTRIBUTE_BYTECODE, condition)
    _send(diag, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, body)
    for kind, body in answers(diag):
        if kind == NLMSG_DONE:
            return
        if kind == NLMSG_ERROR:
            check(body, WHAT)
        else:
            yield _read(body)


def destroy(diag: socket.socket, sockets: Iterable[Socket]) -> int:
    """End sockets: whoever has one is told that its connection was aborted (ECONNABORTED), and
    the other end is sent a reset. How many were still there. One that the kernel refuses keeps no
    other from its end. OSError, the last such one."""
    ended, refusal = 0, None
    for one in sockets:
        try:
            _destroy(diag, one)
        except TimeoutError:
            raise
        except OSError as error:
            # Before Linux 6.0 it says EOPNOTSUPP of one that only waits for its time to pass.
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP):
                refusal = error
        else:
            ended += 1
    if refusal:
        raise refusal
    return ended


def _destroy(diag: socket.socket, one: Socket) -> None:
    request = _REQUEST.pack(one.family, socket.IPPROTO_TCP, 0, 0, STATES, one.id)
    _send(diag, SOCK_DESTROY, NLM_F_ACK, request)
    _, body = next(answers(diag))
    check(body, WHAT)


def check_possible() -> None:
    """OSError (EOPNOTSUPP, ENOENT) if this kernel cannot find or end sockets so."""
    with open_here() as diag:
        for _ in find(diag, socket.AF_INET, 0xFFFFFFFF, 0xFFFFFFFF):
            pass
        try:
            _destroy(diag, Socket(socket.AF_INET, 0, b"", 0, b"", 0, bytes(48)))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


def _send(diag: socket.socket, kind: int, flags: int, body: bytes) -> None:
    diag.send(message(kind, flags | NLM_F_REQUEST, body))


def _read(body: bytes) -> Socket:
    family, _, _, _, id, *_ = _ANSWER.unpack_from(body)
    source_port, target_port, source, target = _ID.unpack_from(id)
    width = 4 if family == socket.AF_INET else 16
    found = dict(read_attributes(body, _ANSWER.size))
    mark = int.from_bytes(found.get(_ATTRIBUTE_MARK, b""), sys.byteorder)
    return Socket(family, mark, source[:width], source_port, target[:width], target_port, id)
