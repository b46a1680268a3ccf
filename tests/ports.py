"""Ports for servers that are started a moment later, and that nobody else takes meanwhile."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

_GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")  # by the kernel, to who asks for any
_LEAST = 10_000
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS

_handed_out: set[int] = set()


def free_port() -> int:
    """One that is free at all addresses of IPv4, for TCP and UDP.

    Nobody is given the same twice, nor one of what other workers of the same run are given: they
    would find it free for as long as no server is there. It is below those that the kernel gives
    by itself: a connection of anybody's, to whatever port, could take one of those before its
    server does, and one to that very port could meet itself. One of the kernel's all the same
    where it leaves few.
    """
    first, last = map(int, _GIVEN.read_text().split())
    ports = range(_LEAST, first) if first > 2 * _LEAST else range(first, last + 1)
    for _ in range(1000):
        port = secrets.choice(ports)
        if port % _WORKERS != _WORKER or port in _handed_out:
            continue
        if all(_is_free(kind, port) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
            _handed_out.add(port)
            return port
    raise AssertionError("no port is free")


def _is_free(kind: socket.SocketKind, port: int) -> bool:
    with socket.socket(socket.AF_INET, kind) as sock:
        try:
            sock.bind(("", port))
        except OSError:
            return False
        return True
