"""Which address a container had, so that it has it again when it starts anew.

An engine asks for an address and does not say for whom, and when it starts anew it starts all its
containers at once. But it mounts a container's root just before it asks, and asks for one container
of a network after the other, in the order in which they came: so of those that do not run, the
first in the engine's list of mounts whose address is free is who asks. A guess that is wrong gives
a container the address of another one that starts: free it was, and names follow.
What stands opposite: ipam.py asks, naming.py and mirror.py tell. Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import msgspec
import structlog

from agent import wholefile
from agent.model import Endpoint
from agent.notation import format_address, parse_address

log = structlog.get_logger()

FILE = "docker-addresses.json"  # below the state directory
SOON = 1.0  # s until what changed is written
ENGINE: ContextVar[int] = ContextVar("engine", default=0)  # process that the call at hand is of
PROC = Path("/proc")


class Kept(msgspec.Struct):
    """Of one container: where its root is mounted, and its addresses by network of ours."""

    root: str
    addresses: dict[str, list[str]]


def root_of(container: Mapping[str, Any]) -> str:
    """Where a container's root is mounted, as inspect tells; its id where it does not: newer
    engines mount at a path that has it."""
    data = (container.get("GraphDriver") or {}).get("Data") or {}
    return str(data.get("MergedDir") or container["Id"])


def mount_points(mountinfo: str) -> list[str]:
    """The mount points of a process, the last one made last."""
    return [f[4] for line in mountinfo.splitlines() if len(f := line.split(" ")) > 4]


class Keeper:
    """The containers of this host's engine that have, or had, an endpoint."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._kept: dict[str, Kept] = {}  # by the container's id
        self._running: set[str] = set()
        self._is_stale = False  # the file says something else
        self._writing: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        if self._path.exists():
            with contextlib.suppress(msgspec.MsgspecError):  # then all get new ones
                self._kept = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Kept])

    # -- what the engine tells --

    def note(self, container: Mapping[str, Any], endpoint: Endpoint) -> None:
        """A container has that endpoint, and runs."""
        id = str(container["Id"])
        kept = self._kept.setdefault(id, Kept("", {}))
        addresses, root = [format_address(a) for a in endpoint.addresses], root_of(container)
        if (kept.root, kept.addresses.get(endpoint.network)) != (root, addresses):
            kept.root, kept.addresses[endpoint.network] = root, addresses
            self._change()

    def started(self, id: str) -> None:
        """A container runs."""
        self._running.add(id)

    def ended(self, id: str) -> None:
        """It runs no more; it may start again."""
        self._running.discard(id)

    def forget(self, id: str) -> None:
        """It is removed, and does not start again."""
        self._running.discard(id)
        if self._kept.pop(id, None):
            self._change()

    def all_ended(self) -> None:
        """The engine ended: what it will start it takes for new."""
        self._running.clear()

    def only(self, ids: Collection[str]) -> None:
        """The engine has these containers and no others."""
        for id in self._kept.keys() - set(ids):
            self.forget(id)

    # -- what is asked --

    async def wanted(self, network: str, family: int, is_used: Callable[[bytes], bool]) -> bytes:
        """The address in a network that the container had which the engine starts now, if that is
        free; empty: it had none, or none is free."""
        waiting = {
            kept.root: address
            for id, kept in self._kept.items()
            if id not in self._running
            for address in map(parse_address, kept.addresses.get(network, ()))
            if len(address) == (16 if family == 6 else 4) and not is_used(address)
        }
        if not waiting:
            return b""
        try:
            path = PROC / str(ENGINE.get()) / "mountinfo"
            text = await asyncio.to_thread(path.read_text, errors="replace")
        except OSError:
            return b""
        return first_of(mount_points(text), waiting)

    # -- the file --

    async def close(self) -> None:
        """Write what is not written yet."""
        self._hurry.set()
        if self._writing:
            await self._writing

    def _change(self) -> None:
        self._is_stale = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while self._is_stale:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SOON):
                    await self._hurry.wait()
            self._is_stale = False
            content = msgspec.json.encode(self._kept)
            try:
                await asyncio.to_thread(wholefile.replace, self._path, content)
            except OSError as error:
                log.warning("docker.failed", what="keep addresses", error=str(error))


def first_of(mounted: Iterable[str], waiting: Mapping[str, bytes]) -> bytes:
    """The address of whose root was mounted first; empty: none is mounted."""
    ids = {part: address for part, address in waiting.items() if not part.startswith("/")}
    for point in mounted:
        if point in waiting:
            return waiting[point]
        for part in point.split("/") if ids else ():
            if part in ids:
                return ids[part]
    return b""
