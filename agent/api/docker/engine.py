"""A client of this host's Docker engine: the few calls that are needed, over its unix socket.

No version is asked for in the path, so each engine answers as it is; what is read here is the
same in all since 1.24. Source: docs.docker.com/reference/api/engine. Opposite: mirror.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from agent.errors import Unavailable, VxmeshError

TIMEOUT = 30.0  # s for one answer; a busy engine takes seconds
STARTING = 300.0  # s for one about a container, which is given once that has started
EVENT_MAX = 1 << 20  # bytes of one event
NOTHING: dict[str, Any] = {}


class Refused(VxmeshError):
    """The engine answered that it will not; `status` is HTTP's."""

    def __init__(self, what: str, status: int, why: str) -> None:
        super().__init__(what, why, "See the engine's log")
        self.status = status


class Event(msgspec.Struct):
    """Something happened: `kind` is network or container, `action` what, `id` to which."""

    kind: str
    action: str
    id: str
    attributes: dict[str, str]


class Engine:
    """The engine behind a socket, whether it runs or not. To be used as a context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self.path), limit=0),
            read_bufsize=EVENT_MAX,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session:
            await self._session.close()

    async def networks(self) -> list[dict[str, Any]]:
        """All of its networks, of whichever driver."""
        return list(await self._call("GET", "/networks"))

    async def network(self, id: str) -> dict[str, Any]:
        """One of them, with the endpoints in it."""
        return dict(await self._call("GET", f"/networks/{id}"))

    async def create_network(self, body: dict[str, Any]) -> str:
        """Make a network; its id."""
        return str((await self._call("POST", "/networks/create", body))["Id"])

    async def remove_network(self, id: str) -> None:
        """Remove one; fine if it is gone."""
        try:
            await self._call("DELETE", f"/networks/{id}")
        except Refused as error:
            if error.status != 404:
                raise

    async def disconnect(self, network: str, container: str) -> None:
        """Take a container out of a network, whatever its state; fine if it is not in it."""
        try:
            body = {"Container": container, "Force": True}
            await self._call("POST", f"/networks/{network}/disconnect", body)
        except Refused as error:
            if error.status not in (403, 404):
                raise

    async def containers(self, *, every: bool = False) -> list[str]:
        """The ids of those that run, or of all."""
        path = f"/containers/json?all={int(every)}"
        return [str(one["Id"]) for one in await self._call("GET", path)]

    async def container(self, id: str) -> dict[str, Any] | None:
        """All about one; None if there is none. It waits while that is being started."""
        try:
            return dict(await self._call("GET", f"/containers/{id}/json", within=STARTING))
        except Refused as error:
            if error.status == 404:
                return None
            raise

    async def events(self) -> AsyncIterator[Event | None]:
        """None once connected, then what happens, until the engine ends: Unavailable.

        First those that it remembers from before: what was missed is among them.
        """
        filters = json.dumps({"type": ["network", "container"]})
        query = {"since": "1", "filters": filters}
        forever = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT)
        try:
            assert self._session
            async with self._session.get(
                "http://docker/events", params=query, timeout=forever
            ) as answer:
                if answer.status != 200:
                    raise Refused("the engine's events", answer.status, await answer.text())
                yield None
                async for line in answer.content:
                    if event := _read_event(line):
                        yield event
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._away(error) from None
        raise self._away("it ended")

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, within: float = TIMEOUT
    ) -> Any:
        assert self._session
        url, timeout = f"http://docker{path}", aiohttp.ClientTimeout(total=within)
        try:
            async with self._session.request(method, url, json=body, timeout=timeout) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._away(error) from None
        try:
            found = json.loads(text) if text else NOTHING
        except ValueError:
            found = {"message": text[:200]}
        if answer.status >= 400:
            why = str(found.get("message", "")) or f"status {answer.status}"
            raise Refused(f"the engine's {path}", answer.status, why)
        return found

    def _away(self, why: object) -> Unavailable:
        return Unavailable(
            f"the engine at {self.path}", f"does not answer ({why or 'in time'})", "Start it"
        )


def _read_event(line: bytes) -> Event | None:
    """An event of a line; None if it is none that can be read."""
    try:
        told = json.loads(line)
        actor = told.get("Actor") or {}
        attributes = {str(k): str(v) for k, v in (actor.get("Attributes") or {}).items()}
        return Event(str(told["Type"]), str(told["Action"]), str(actor.get("ID", "")), attributes)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
