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
from collections.abc import Iterable
from dataclasses import dataclass

from agent.errors import VxmeshError
from agent.lanmodel import NAMES_AT, NAMES_PORT_INSIDE
from agent.resolver.feed import Place, View
from agent.resolver.server import Server
from agent.resolver.sockets import Listen, open_sockets
from agent.syscalls import start_time

_LISTEN = Listen(NAMES_AT, NAMES_PORT_INSIDE)

_log = logging.getLogger("vxmesh.resolver.rooms")


@dataclass(slots=True)
class _Room:
    place: Place
    pidfd: int  # -1: none


class Rooms:
    """Those of one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._rooms: dict[bytes, _Room] = {}

    async def alter(self, dropped: Iterable[bytes], views: Iterable[View]) -> None:
        """Views that are gone, and those that are new or changed."""
        for key in dropped:
            self._leave(key)
        for view in views:
            held = self._rooms.get(view.address)
            if held and held.place != view.place:
                self._leave(view.address)
                held = None
            if view.place and held is None:
                await self._enter(view.address, view.place)

    async def replace(self, views: Iterable[View]) -> None:
        """All views that there are."""
        views = [view for view in views if view.place]
        gone = self._rooms.keys() - {view.address for view in views}
        await self.alter(gone, views)

    def close(self) -> None:
        """Leave all."""
        for key in list(self._rooms):
            self._leave(key)

    async def _enter(self, key: bytes, place: Place) -> None:
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
                udp, tcp = open_sockets([_LISTEN], f"/proc/self/fd/{fd}", shared=True)
            finally:
                os.close(fd)
        except (OSError, VxmeshError) as error:
            # It has just ended, as a rule: the agent is about to say so.
            if pidfd >= 0:
                os.close(pidfd)
            fields = {"netns": place.netns, "error": str(error) or type(error).__name__}
            _log.warning("sandbox not entered", extra={"fields": fields})
            return
        self._rooms[key] = _Room(place, pidfd)
        if pidfd >= 0:
            asyncio.get_running_loop().add_reader(pidfd, self._leave, key)
        await self._server.enter(key, udp, tcp)

    def _leave(self, key: bytes) -> None:
        room = self._rooms.pop(key, None)
        if room is None:
            return
        if room.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(room.pidfd)
            os.close(room.pidfd)
        self._server.leave(key)
