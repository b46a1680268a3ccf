"""Which network of ours an engine means by an id of its own: kept, as an engine tells it once.

An engine has an id for each network that no other engine knows; after a restart of either side
neither tells the other anew. What stands opposite: driver.py, which binds and releases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from agent import wholefile
from agent.errors import NotFound

log = structlog.get_logger()

FILE = "docker.json"  # below the state directory


class Bound(msgspec.Struct, frozen=True):
    """A network of ours, and whether it goes with the engine's: it was made for that, here or on
    another host."""

    network: str
    made: bool


class Bindings:
    """The engine's network id -> ours, in a file that is replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._lock = asyncio.Lock()
        self._held: dict[str, Bound] = self._read()
        self.making: set[str] = set()  # engine's ids of networks that are made at this moment

    def get(self, docker: str) -> Bound:
        """NotFound if the engine's network was never made here."""
        bound = self._held.get(docker)
        if bound is None:
            raise NotFound(
                f"Docker's network {docker[:12]}",
                "is not known to this agent",
                "Remove it with 'docker network rm' and make it anew",
            )
        return bound

    def all(self) -> dict[str, Bound]:
        """The engine's id -> what it means."""
        return dict(self._held)

    async def put(self, docker: str, bound: Bound) -> None:
        """Bind. OSError if it cannot be kept."""
        await self._change({docker: bound})

    async def drop(self, docker: str) -> None:
        """Release; no error if it is not bound. OSError if it cannot be kept."""
        await self._change({docker: None})

    async def _change(self, change: Mapping[str, Bound | None]) -> None:
        # Shielded: who gives up must not let the next one write while a thread still does.
        await asyncio.shield(asyncio.ensure_future(self._write(change)))

    async def _write(self, change: Mapping[str, Bound | None]) -> None:
        async with self._lock:
            both = {**self._held, **change}
            held = {id: bound for id, bound in both.items() if bound}
            await asyncio.to_thread(wholefile.replace, self._path, msgspec.json.encode(held))
            self._held = held

    def _read(self) -> dict[str, Bound]:
        """What is there; nothing if that is not what was written."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Bound])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            why = str(error)
        try:
            aside = str(wholefile.set_aside(self._path))
        except OSError as error:
            aside = f"nowhere ({error.strerror})"
        log.error(
            "docker.bindings_unreadable",
            file=str(self._path),
            error=why,
            set_aside=aside,
            fix="Networks are bound again by what the engine lists; make such anew as containers"
            " cannot be connected to",
        )
        return {}
