"""Sockets inside sandboxes that reach no gateway of ours, one set a sandbox.

On a wire of others' there is no address at which we could be asked, so the name server listens
on the sandbox's loopback, and who asks there is known by the socket. A socket holds its
namespace: with the sandbox's process it is closed, whether an agent is there to say so or not.
What stands opposite: datapath/nameway.py, which leads port 53 there; server.py answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from agent.errors import VxmeshError
from agent.lanmodel import NAMES_AT, NAMES_PORT_INSIDE
from agent.resolver.feed import Place, View
from agent.resolver.server import Server
from agent.resolver.sockets import Listen, open_sockets
from agent.syscalls import start_time

_LISTEN = Listen(NAMES_AT, NAMES_PORT_INSIDE)
RETRY_FIRST, RETRY_MOST = 0.1, 30.0  # s; doubled with every failure in between

_log = logging.getLogger("vxmesh.resolver.rooms")


class _Opened(NamedTuple):
    """What there is of a room before anybody is answered in it."""

    pidfd: int  # -1: none
    udp: list[socket.socket]
    tcp: list[socket.socket]

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
        for sock in (*self.udp, *self.tcp):
            sock.close()


@dataclass(slots=True)
class _Room:
    place: Place
    pidfd: int  # -1: none


class Rooms:
    """Those of one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._rooms: dict[bytes, _Room] = {}
        self._wanted: dict[bytes, Place] = {}  # those as well that could not be entered yet
        self._tries: set[asyncio.Task[None]] = set()

    async def alter(self, dropped: Iterable[bytes], views: Iterable[View]) -> None:
        """Views that are gone, and those that are new or changed."""
        for key in dropped:
            self._wanted.pop(key, None)
            self._leave(key)
        for view in views:
            if self._wanted.get(view.address) == view.place:
                continue
            self._wanted.pop(view.address, None)
            self._leave(view.address)
            if view.place:
                self._wanted[view.address] = view.place
                if not await self._enter(view.address, view.place):
                    task = asyncio.create_task(self._try_again(view.address, view.place))
                    self._tries.add(task)
                    task.add_done_callback(self._tries.discard)

    async def replace(self, views: Iterable[View]) -> None:
        """All views that there are."""
        views = [view for view in views if view.place]
        gone = self._wanted.keys() - {view.address for view in views}
        await self.alter(gone, views)

    def close(self) -> None:
        """Leave all."""
        self._wanted.clear()
        for task in self._tries:
            task.cancel()
        for key in list(self._rooms):
            self._leave(key)

    async def _try_again(self, key: bytes, place: Place) -> None:
        delay = RETRY_FIRST
        while True:
            await asyncio.sleep(delay)
            if self._wanted.get(key) is not place or await self._enter(key, place):
                return
            delay = min(2 * delay, RETRY_MOST)

    async def _enter(self, key: bytes, place: Place) -> bool:
        """Listen there if that is still wanted once it can be; False if it is to be tried again."""
        opening = asyncio.ensure_future(asyncio.to_thread(_open, place))
        try:
            opened = await asyncio.shield(opening)
        except (OSError, VxmeshError) as error:
            fields = {"netns": place.netns, "error": str(error) or type(error).__name__}
            _log.warning("sandbox not entered", extra={"fields": fields})
            # It has just ended, as a rule: the agent is about to say so.
            return isinstance(error, ProcessLookupError | FileNotFoundError)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise
        if self._wanted.get(key) is not place:
            opened.close()
            return True
        await self._server.enter(key, opened.udp, opened.tcp)
        self._rooms[key] = _Room(place, opened.pidfd)
        if opened.pidfd >= 0:
            # Only now: who has ended meanwhile is told of at once, and is there to be left.
            asyncio.get_running_loop().add_reader(opened.pidfd, self._leave, key)
        if self._wanted.get(key) is not place:
            self._leave(key)
        return True

    def _leave(self, key: bytes) -> None:
        room = self._rooms.pop(key, None)
        if room is None:
            return
        if room.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(room.pidfd)
            os.close(room.pidfd)
        self._server.leave(key)


def _open(place: Place) -> _Opened:
    """Enter a sandbox, in a thread that may wait; ProcessLookupError if it is another one by now,
    OSError, VxmeshError."""
    pidfd = -1
    try:
        if place.pid:
            pidfd = os.pidfd_open(place.pid)
            if start_time(place.pid) != place.start_time:
                raise ProcessLookupError
        fd = os.open(place.netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_ino != place.inode:
                raise ProcessLookupError
            return _Opened(pidfd, *open_sockets([_LISTEN], f"/proc/self/fd/{fd}", shared=True))
        finally:
            os.close(fd)
    except BaseException:
        if pidfd >= 0:
            os.close(pidfd)
        raise


def _close(opening: asyncio.Future[_Opened]) -> None:
    """Close what nobody waits for any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
