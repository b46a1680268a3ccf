"""The sockets of this host: who connects is asked of the kernel, then handed on to gRPC.

Two sockets, because the kernel itself keeps strangers out by mode and group, and a socket has
just one group: `agent.sock` for those who may change, `read.sock` for those who may look, where
there is a group of such. What a caller may do follows from their uid and groups all the same,
whichever they come by; but by read.sock nobody changes anything, root included, so that it can
be given to a container.
What stands opposite: rights.py, which reads the name that is given here at each call.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import structlog

from agent import splice
from agent.api.refusals import Note
from agent.api.rights import Caller, Right, Way
from agent.syscalls import PeerCredentials, peer_credentials

log = structlog.get_logger()

SOCKET, READ_SOCKET = "agent.sock", "read.sock"
INNER = "inner"  # directory below the run directory, root's alone
INNER_SOCKET = "control.sock"
MODE = 0o660
# Connections at a time. Each takes three descriptors of a process that is given 1024 by default;
# a caller needs one, for however many calls. Root's are apart: nobody can keep root out.
ROOT_MOST = 200
OTHERS_MOST = 64
EACH_MOST = 16
BACKLOG = 128


class Limits(NamedTuple):
    """How many connections at a time: root's, those of all others, and of one of these."""

    root: int = ROOT_MOST
    others: int = OTHERS_MOST
    each: int = EACH_MOST


@dataclass(frozen=True, slots=True)
class Groups:
    """The gids of those who may change and of those who may look; None: there is no such."""

    change: int | None
    read: int | None

    def right(self, caller: PeerCredentials) -> Right:
        """What a process may do. Root may do all."""
        held = {caller.gid, *caller.groups}
        if caller.uid == 0 or self.change in held:
            return Right.CHANGE
        return Right.READ if self.read in held else Right.NONE


def find_group(name: str) -> int | None:
    """The gid of a group by name or number; None if it does not exist. May block."""
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        return None


class Places:
    """Who holds how many connections."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: Counter[str] = Counter()

    def take(self, who: str, is_root: bool = False) -> bool:
        """Whether `who` gets one more; if so, `leave` is to follow."""
        if is_root:
            free = self._held[who] < self._limits.root
        else:
            others = self._held.total() - self._held["0"]
            free = others < self._limits.others and self._held[who] < self._limits.each
        if free:
            self._held[who] += 1
        return free

    def leave(self, who: str) -> None:
        """One less."""
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]


class Front:
    """Takes connections on unix sockets, for the gRPC server at `inner`."""

    def __init__(self, inner: Path, groups: Groups, refused: Note, limits: Limits) -> None:
        self._inner = inner
        self._groups = groups
        self._refused = refused
        self._places = Places(limits)
        self._servers: list[tuple[asyncio.Server, Path]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, path: Path, way: Way, gid: int | None) -> None:
        """Take connections at `path`, which the members of a group may connect; None: root's."""
        sock = _make_socket(path, self._inner.parent, 0 if gid is None else gid)
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _Door(self, way), sock=sock, backlog=BACKLOG)
        self._servers.append((server, path))

    async def close(self) -> None:
        """Take no more, and take the sockets away. Connections that stand are the server's."""
        for server, path in self._servers:
            server.close()
            with contextlib.suppress(OSError):
                path.unlink()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def admit(self, door: _Door, sock: socket.socket, way: Way) -> bool:
        """Whether a connection may stand; if so it is being handed on."""
        try:
            peer = peer_credentials(sock)
        except OSError as error:
            log.error("control.unknown_caller", error=str(error))
            return False
        right = self._groups.right(peer)
        if way is Way.READ_SOCKET and right is Right.CHANGE:
            right = Right.READ
        else:
            way = Way.SOCKET  # what they may not do they may by no socket
        caller = Caller(right, way, str(peer.uid))
        if not self._places.take(caller.who, peer.uid == 0):
            text = f"uid {peer.uid} has too many connections to the agent, or all others have"
            self._refused("busy", f"uid {peer.uid}", text)
            return False
        task = asyncio.get_running_loop().create_task(self._hand_on(door, caller))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        door.closed.add_done_callback(lambda _: self._places.leave(caller.who))
        return True

    async def _hand_on(self, door: _Door, caller: Caller) -> None:
        try:
            door.join(await splice.connect(self._inner, caller.name))
        except BaseException as error:
            if door.transport:
                door.transport.abort()
            if not isinstance(error, OSError):
                raise
            log.error("control.inner_gone", error=str(error))


class _Door(splice.Side):
    """The caller's end of a connection."""

    def __init__(self, front: Front, way: Way) -> None:
        super().__init__()
        self._front, self._way = front, way

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        if not self._front.admit(self, transport.get_extra_info("socket"), self._way):
            transport.abort()


def inner_directory(run_dir: Path) -> Path:
    """Make the directory of the inner server's socket, which only root can enter."""
    directory = run_dir / INNER
    directory.mkdir(mode=0o700, exist_ok=True)
    os.chown(directory, 0, 0)
    directory.chmod(0o700)  # it may be there from a time with another mode
    return directory


def _make_socket(path: Path, private: Path, gid: int) -> socket.socket:
    """A listening socket that appears at `path` when it has its group and mode, not before."""
    made = private / f"{path.name}.new"
    made.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(str(made))
        os.chown(made, 0, gid)
        made.chmod(MODE)
        sock.listen(BACKLOG)
        made.rename(path)
    except BaseException:
        sock.close()
        raise
    return sock
