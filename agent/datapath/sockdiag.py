"""TCP sockets of a network namespace that bear one of our marks: found, and ended.

What stands opposite: ledsockets.py, which says which. Source: sock_diag(7), linux/inet_diag.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent.datapath.packing import (
    ATTRIBUTE,
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
)

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
TIMEOUT = 5.0  # s, for an answer of the kernel
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
    body += ATTRIBUTE.pack(4 + len(condition), _ATTRIBUTE_BYTECODE) + condition
    _send(diag, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, body)
    for kind, message in _messages(diag):
        if kind == NLMSG_DONE:
            return
        if kind == NLMSG_ERROR:
            _check(message)
        else:
            yield _read(message)


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
    _, message = next(_messages(diag))
    _check(message)


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
    diag.send(HEADER.pack(HEADER.size + len(body), kind, flags | NLM_F_REQUEST, 0, 0) + body)


def _messages(diag: socket.socket) -> Iterator[tuple[int, bytes]]:
    while True:
        data, at = diag.recv(1 << 17), 0
        while at + HEADER.size <= len(data):
            length, kind = HEADER.unpack_from(data, at)[:2]
            yield kind, data[at + HEADER.size : at + length]
            at += (length + 3) & ~3


def _check(message: bytes) -> None:
    """Raise what an NLMSG_ERROR says."""
    code = -struct.unpack_from("=i", message)[0]
    if code:
        raise OSError(code, f"sockets: {os.strerror(code)}")


def _read(message: bytes) -> Socket:
    family, _, _, _, id, *_ = _ANSWER.unpack_from(message)
    source_port, target_port, source, target = _ID.unpack_from(id)
    width = 4 if family == socket.AF_INET else 16
    at, mark = _ANSWER.size, 0
    while at + 4 <= len(message):
        size, kind = ATTRIBUTE.unpack_from(message, at)
        if size < 4:
            break
        if kind == _ATTRIBUTE_MARK:
            (mark,) = struct.unpack_from("=I", message, at + 4)
        at += (size + 3) & ~3
    return Socket(family, mark, source[:width], source_port, target[:width], target_port, id)
