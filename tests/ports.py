"""Ports for servers that are started a moment later, and that nobody else takes meanwhile."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

_GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")  # by the kernel, to who asks for any
_LEAST = 10_000


def free_port() -> int:
    """One that is free at all addresses of IPv4, for TCP and UDP.

    Below those that the kernel gives by itself: a connection of anybody's, to whatever port, could
    take one of those before its server does, and one to that very port could meet itself. One of
    the kernel's all the same where it leaves few.
    """
    first = int(_GIVEN.read_text().split()[0])
    for _ in range(1000):
        port = _LEAST + secrets.randbelow(first - _LEAST) if first > 2 * _LEAST else _given()
        if all(_is_free(kind, port) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
            return port
    raise AssertionError("no port is free")


def _given() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def _is_free(kind: socket.SocketKind, port: int) -> bool:
    with socket.socket(socket.AF_INET, kind) as sock:
        try:
            sock.bind(("", port))
        except OSError:
            return False
        return True
