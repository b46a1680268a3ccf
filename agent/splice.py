"""Two byte streams made one: what comes in on one side goes out on the other, until one ends.

For who must see a connection before gRPC does (whose it is, by certificate or by SO_PEERCRED),
and then hands it on to a gRPC server on a unix socket of our own. gRPC has no way to be given a
connection, but it tells a handler the name that the client's end of a unix socket is bound to
(`ServicerContext.peer`): `bound` makes such an end, and `caller` reads the name again.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from pathlib import Path

_PREFIX = "unix-abstract:"
_serial = itertools.count()


class Side(asyncio.Protocol):
    """One end. What comes before the other one is there is kept."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Side | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.budget: int | None = None  # bytes that may still come in here; then it is closed
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.other is None:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if self.budget is not None:
            self.budget -= len(data)
            if self.budget < 0:
                if self.transport:
                    self.transport.abort()
                return
        if self.other is None or self.other.transport is None:
            self._early.append(data)
        else:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        return False  # half a connection is none to HTTP/2

    def pause_writing(self) -> None:
        if self.other and self.other.transport and not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other and self.other.transport and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if not self.closed.done():
            self.closed.set_result(None)
        if self.other and self.other.transport:
            self.other.transport.close()

    def join(self, other: Side) -> None:
        """From now on each gets what comes in at the other one."""
        self.other, other.other = other, self
        for side, peer in ((self, other), (other, self)):
            for data in side._early:
                if peer.transport:
                    peer.transport.write(data)
            side._early.clear()
            if side.transport is None and peer.transport:
                peer.transport.close()
            elif side.transport and not side.transport.is_closing():
                side.transport.resume_reading()


def bound(name: str) -> socket.socket:
    """A unix socket whose name says who calls: `name` (free of "/"), and a number for itself.

    The name is in the abstract namespace, so any process of the host could take one: what
    relies on it must listen where only root can connect.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    made.bind(f"\0vxmesh/{name}/{id(made):x}-{next(_serial)}")
    return made


def caller(peer: str) -> str | None:
    """The name that `bound` was given, out of ServicerContext.peer(); None if there is none."""
    if not peer.startswith(_PREFIX + "vxmesh/"):
        return None
    return peer[len(_PREFIX) :].split("/")[1]


async def connect(path: Path, name: str) -> Side:
    """Connect to a server's unix socket in the name of somebody; OSError if it is not there."""
    made = bound(name)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(made, str(path))
        _, side = await loop.create_unix_connection(Side, sock=made)
    except BaseException:
        made.close()
        raise
    return side
