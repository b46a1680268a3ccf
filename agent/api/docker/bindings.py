"""Which network of ours an engine means by an id of its own: kept, as an engine tells it once.

An engine has an id for each network that no other engine knows; after a restart of either side
neither tells the other anew. What stands opposite: driver.py, which binds and releases.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent.errors import NotFound

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
        self._held: dict[str, Bound] = {}
        self.making: set[str] = set()  # engine's ids of networks that are made at this moment
        if self._path.exists():
            self._held = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Bound])

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

    def put(self, docker: str, bound: Bound) -> None:
        """Bind. OSError if it cannot be kept."""
        self._write({**self._held, docker: bound})

    def drop(self, docker: str) -> None:
        """Release; no error if it is not bound."""
        self._write({id: bound for id, bound in self._held.items() if id != docker})

    def _write(self, held: dict[str, Bound]) -> None:
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(held))
        fresh.replace(self._path)
        self._held = held
