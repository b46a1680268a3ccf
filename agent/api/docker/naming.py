"""Names of containers for their endpoints: the engine tells them once a container is connected.

An endpoint is made before the engine says for whom, under a name of its own; then it gets the
container's name and, as aliases, its host name, its short id and what `--network-alias` or Compose
gave it, as Docker's own resolver knows them. A name that another host's container has already
stays with that one, and is an alias of both: who asks gets either, as for every alias.
What stands opposite: mirror.py hears the events; core/names.py answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import structlog

from agent.api.docker.bindings import Bindings
from agent.api.docker.bodies import SERVICE
from agent.api.docker.driver import LABEL
from agent.api.docker.engine import Engine
from agent.api.docker.keeping import Keeper
from agent.errors import Conflict, Invalid, NotFound, VxmeshError
from agent.model import ALIASES_MAX, WORKLOAD, Endpoint
from agent.notation import LABELS_MAX, parse_alias, parse_labels
from agent.operations import Operations
from agent.servicemodel import HEALTHY, REASON_MAX, UNHEALTHY

log = structlog.get_logger()

SHORT = 12  # digits of an id, as `docker ps` shows
AT_ONCE = 256  # containers that are asked about: as a rule each waits for its own start
TRIES = 10
AGAIN = 1.0  # s
# Of tools, for themselves: of no use to select by.
TOOLS = ("com.docker.", "org.opencontainers.", "desktop.docker.")


def label_from(name: str) -> str:
    """A DNS label that is like `name`; Invalid if nothing of it can be in one."""
    found = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:63].strip("-")
    if not found:
        raise Invalid(f"name {name[:40]!r}", "has nothing that a DNS label may have")
    return found


def names_of(container: Mapping[str, Any], attached: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The name of a container in a network, and its aliases: `attached` is what the engine's
    inspect says of it there."""
    name = str(container.get("Name", "")).lstrip("/")
    wanted = [name, str((container.get("Config") or {}).get("Hostname", ""))]
    wanted += [str(container["Id"])[:SHORT], *(attached.get("Aliases") or ())]
    wanted += attached.get("DNSNames") or ()  # engines since 25 list all of them here
    aliases: list[str] = []
    for text in wanted:
        with contextlib.suppress(Invalid, IndexError):  # such as have dots
            aliases.append(parse_alias(str(text)))
    return label_from(name or str(container["Id"])[:SHORT]), list(dict.fromkeys(aliases))


def health_of(container: Mapping[str, Any]) -> tuple[str, str]:
    """What a container's HEALTHCHECK says, in our words, and why: one that is still starting gets
    no connections yet. Both empty: it has none."""
    told = (container.get("State") or {}).get("Health") or {}
    status = str(told.get("Status", ""))
    if status == HEALTHY:
        return HEALTHY, ""
    if status not in (UNHEALTHY, "starting"):
        return "", ""
    output = str((told.get("Log") or [{}])[-1].get("Output", "")) if status == UNHEALTHY else status
    reason = "".join(c if c.isprintable() else " " for c in output).strip()
    return UNHEALTHY, reason[:REASON_MAX]


class Naming:
    """Gives endpoints of the engine's containers their names."""

    def __init__(
        self, operations: Operations, bindings: Bindings, engine: Engine, keeper: Keeper
    ) -> None:
        self._operations, self._node = operations, operations.node
        self._bindings, self._engine, self._keeper = bindings, engine, keeper
        self._tasks: dict[str, asyncio.Task[None]] = {}  # a container's id -> who looks at it
        self._again: set[str] = set()  # of these, such as something happened to meanwhile
        self._turn = asyncio.Semaphore(AT_ONCE)

    def look_at(self, id: str) -> None:
        """A container may have another name, be in other networks, or be well or ill.

        One task a container looks, so that what was told last is what stays.
        """
        if not id:
            return
        self._again.add(id)
        if id not in self._tasks:
            self._tasks[id] = asyncio.create_task(self._look(id))

    async def stop(self) -> None:
        """Look at nothing more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, id: str) -> None:
        try:
            while id in self._again:
                await self._look_once(id)
        finally:
            self._again.discard(id)
            del self._tasks[id]

    async def _look_once(self, id: str) -> None:
        for _ in range(TRIES):
            try:
                async with self._turn:
                    self._again.discard(id)
                    container = await self._engine.container(id)
                if container:
                    await self.take(container)
                return
            except VxmeshError as error:
                log.warning("docker.unnamed", container=id[:SHORT], error=str(error))
            except Exception:
                log.exception("docker.fault", container=id[:SHORT])
                return
            await asyncio.sleep(AGAIN)

    async def take(self, container: Mapping[str, Any]) -> None:
        """Name the endpoints of a container, as inspect tells of it, and say how it is."""
        placed: set[str] = set()
        for endpoint, _ in self._endpoints(container):
            self._keeper.note(container, endpoint)
            # First: from when it has its labels on a service may choose it.
            await self._place(endpoint, container)
            placed.add(endpoint.id)
        if placed and container["Id"] in self._again:  # that took time, and it is another by now
            fresh = await self._engine.container(str(container["Id"]))
            if fresh is None:
                return
            container = fresh
        for endpoint, attached in self._endpoints(container):
            if endpoint.id in placed:
                self._tell_health(endpoint, container)
                self._name(endpoint, container, attached)

    def _endpoints(
        self, container: Mapping[str, Any]
    ) -> Iterator[tuple[Endpoint, Mapping[str, Any]]]:
        """A container's endpoints, each with what inspect says of its network."""
        networks = (container.get("NetworkSettings") or {}).get("Networks") or {}
        bindings = self._bindings.all()
        for attached in networks.values():
            bound = bindings.get(str(attached.get("NetworkID")))
            endpoint = self._find(bound.network, attached) if bound else None
            if endpoint:
                yield endpoint, attached

    def _find(self, network: str, attached: Mapping[str, Any]) -> Endpoint | None:
        members = self._node.members.get(network)
        docker = str(attached.get("EndpointID", ""))
        local = members.local.values() if members and docker else ()
        return next((e for e in local if e.labels.get(LABEL) == docker), None)

    async def _place(self, endpoint: Endpoint, container: Mapping[str, Any]) -> None:
        """Say where the engine has moved the interface."""
        key = str((container.get("NetworkSettings") or {}).get("SandboxKey", ""))
        pid = int((container.get("State") or {}).get("Pid", 0))
        for path in (key, f"/proc/{pid}/ns/net" if pid else ""):
            with contextlib.suppress(NotFound):
                if path:
                    await self._operations.moved(endpoint.id, path)
                    return

    def _tell_health(self, endpoint: Endpoint, container: Mapping[str, Any]) -> None:
        state, reason = health_of(container)
        with contextlib.suppress(NotFound):
            self._node.tell_health(endpoint.id, state, reason)

    def _name(
        self, endpoint: Endpoint, container: Mapping[str, Any], attached: Mapping[str, Any]
    ) -> None:
        docker, network = endpoint.labels[LABEL], endpoint.network
        name, aliases = names_of(container, attached)
        labels = self._labels(container) | {LABEL: docker}
        services = self._node.services
        asked = labels.get(SERVICE, "")  # that name is the service's own, once it is made
        aliases = [a for a in aliases if a != asked and not services.named(network, a)]
        names = [name, f"{name[:50].strip('-')}-{docker[:SHORT]}"]
        for wanted in names[name == asked :]:
            rest = [alias for alias in aliases if alias != wanted][:ALIASES_MAX]
            with contextlib.suppress(Conflict, NotFound):
                self._node.rename_endpoint(endpoint.id, wanted, rest, labels)
                return

    def _labels(self, container: Mapping[str, Any]) -> dict[str, str]:
        """A container's labels as far as they are such as ours may be, to select services' backends
        by; and its id. A service's name is lower case, as names in DNS are."""
        found: dict[str, str] = {}
        for key, value in ((container.get("Config") or {}).get("Labels") or {}).items():
            if not str(key).startswith(TOOLS) and len(found) < LABELS_MAX - 2:
                with contextlib.suppress(Invalid):
                    found |= parse_labels({str(key): str(value)})
        if SERVICE in found:
            found[SERVICE] = found[SERVICE].lower()
        return found | {WORKLOAD: str(container["Id"])[:SHORT]}
