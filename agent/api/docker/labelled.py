"""Services out of containers' labels: made with the first container that asks, gone after the last.

    vxmesh.service=api  vxmesh.port=80[:TARGET][/udp],…  vxmesh.publish=8080:80[/udp],…

Every node makes those that its own containers ask for, so two may make one at once: then the
older one stays, as of all services, and who made the other takes it back. One node alone changes
a service and removes it: who made it, or the first there if that is gone. What containers
disagree about is decided from all of them, so that every node finds the same. A service that
nobody asks for any more goes after a while, as a container that is replaced is not there for a
moment.
What stands opposite: agent/serviceops.py, which makes them; naming.py, which copies the labels.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import structlog

from agent.api.docker.bodies import SERVICE, SERVICE_PORT, SERVICE_PUBLISH
from agent.errors import Invalid, NotFound, VxmeshError
from agent.model import WORKLOAD, Endpoint
from agent.node import NodeState
from agent.servicemodel import Port, Service
from agent.serviceops import ServiceOperations
from agent.servicespec import ServiceSpec, parse_port, parse_service
from agent.views import Change

log = structlog.get_logger()

MADE = "docker.service"  # label of services: made so, by this name
GRACE = 10.0  # s without a container until a service goes
AGAIN = 2.0  # s until what failed is tried again
_PORT = re.compile(r"(\d{1,5})(?::(\d{1,5}))?(?:/(tcp|udp))?\Z")


class Wanted(NamedTuple):
    """A service that containers ask for."""

    network: str  # id
    name: str
    ports: tuple[Port, ...]


def wanted_by(endpoint: Endpoint) -> Wanted | None:
    """What a container's labels ask for; None: nothing. Invalid if they are malformed."""
    labels = endpoint.labels
    if WORKLOAD not in labels or SERVICE not in labels:
        return None
    ports = ports_of(labels.get(SERVICE_PORT, ""), labels.get(SERVICE_PUBLISH, ""))
    spec = parse_service(labels[SERVICE], endpoint.network, ports=ports)
    return Wanted(endpoint.network, spec.name, spec.ports)


def ports_of(ports: str, publishes: str) -> tuple[Port, ...]:
    """The ports of a service as labels say; a published one leads to the port that it names, which
    need not be named itself. Invalid if something is malformed."""
    found: dict[tuple[int, str], Port] = {}
    for first, second, protocol in _split(ports, SERVICE_PORT):
        found[first, protocol] = parse_port(first, second, protocol)
    more = []
    for published, second, protocol in _split(publishes, SERVICE_PUBLISH):
        port = second or published
        by_target = [p for p in found.values() if (p.target, p.protocol) == (port, protocol)]
        old = found.get((port, protocol)) or next(iter(by_target), None)
        more.append(
            parse_port(*((old.port, old.target) if old else (port, port)), protocol, published)
        )
    replaced = {(p.port, p.protocol) for p in more}
    return tuple([p for key, p in found.items() if key not in replaced] + more)


def _split(text: str, label: str) -> Iterable[tuple[int, int, str]]:
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = _PORT.match(part)
        if match is None:
            raise Invalid(f"label {label}={part[:40]}", "is malformed", "Write it as 80 or 8080:80")
        yield int(match[1]), int(match[2] or 0), match[3] or "tcp"


class Labelled:
    """The services that this node's containers ask for."""

    def __init__(self, node: NodeState, operations: ServiceOperations) -> None:
        self._node, self._operations = node, operations
        self._woken = asyncio.Event()
        self._unasked: dict[str, float] = {}  # services without a container -> since when
        self._told: set[str] = set()  # failures, so that each is logged once
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look after them from now on."""
        self._node.listeners.append(self._changed)
        self._woken.set()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Leave them as they are."""
        self._node.listeners.remove(self._changed)
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _changed(self, change: Change) -> None:
        asks = any(
            SERVICE in member.endpoint.labels
            for each in change.endpoints
            for member in (each.old, each.new)
            if member
        )
        if asks or change.services or change.networks or change.statuses:
            self._woken.set()

    async def _run(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            try:
                later = await self._once()
            except Exception:
                log.exception("docker.fault")
                later = AGAIN
            if later is not None:
                asyncio.get_running_loop().call_later(later, self._woken.set)

    async def _once(self) -> float | None:
        """Do what is to be done; after how many seconds to look again, if nothing happens."""
        later: list[float] = []
        for wanted, is_here in self._wanted().values():
            try:
                await self._ensure(wanted, is_here)
            except VxmeshError as error:
                self._tell(f"service {wanted.name}", error)
                later.append(AGAIN)
        now = asyncio.get_running_loop().time()
        for service in list(self._node.services.all()):
            if not self._is_ours(service):
                continue
            if self._is_asked_for(service) and service.name == service.labels[MADE]:
                self._unasked.pop(service.id, None)
                continue
            # One that lost its name to an older one is in nobody's use.
            grace = 0.0 if service.name != service.labels[MADE] else GRACE
            left = self._unasked.setdefault(service.id, now) + grace - now
            if left > 0:
                later.append(left)
                continue
            with contextlib.suppress(NotFound):
                await self._operations.remove([service.id])
                log.info("docker.service_removed", service=service.name)
            self._unasked.pop(service.id, None)
        return min(later, default=None)

    def _wanted(self) -> dict[tuple[str, str], tuple[Wanted, bool]]:
        """What containers ask for, and whether one of this node's does.

        Of those that disagree the endpoint with the smallest id counts: who was first or last is
        nothing that all nodes would say alike.
        """
        decides: dict[tuple[str, str], tuple[str, Wanted]] = {}
        here: set[tuple[str, str]] = set()
        for network, members in self._node.members.items():
            if not self._node.catalogue.get(network):
                continue
            for id, member in members.all.items():
                if SERVICE not in member.endpoint.labels or member.node in self._node.withdrawn:
                    continue
                try:
                    wanted = wanted_by(member.endpoint)
                except Invalid as error:
                    if member.node == self._node.me:
                        self._tell(f"labels of {member.endpoint.name}", error)
                    continue
                if wanted is None:
                    continue
                key = network, wanted.name
                if member.node == self._node.me:
                    here.add(key)
                if key not in decides or id < decides[key][0]:
                    decides[key] = id, wanted
        return {key: (wanted, key in here) for key, (_, wanted) in decides.items()}

    async def _ensure(self, wanted: Wanted, is_here: bool) -> None:
        service = self._node.services.named(wanted.network, wanted.name)
        if not (is_here if service is None else self._is_ours(service)):
            return
        spec = ServiceSpec(
            wanted.name,
            wanted.network,
            ports=wanted.ports,
            selector={SERVICE: wanted.name},
            labels={MADE: wanted.name},
        )
        if service is None:
            await self._operations.create(spec)
            log.info("docker.service_made", service=wanted.name)
        elif set(service.ports) != set(wanted.ports):
            await self._operations.update(service.id, wanted.network, spec, ["ports"])

    def _is_ours(self, service: Service) -> bool:
        """Whether this node looks after the end of a service: who made it, else the first there."""
        if MADE not in service.labels:
            return False
        there = set(self._node.nodes) - self._node.withdrawn
        return self._node.me == (service.creator if service.creator in there else min(there))

    def _is_asked_for(self, service: Service) -> bool:
        members = self._node.members.get(service.network)
        every = members.all.values() if members else ()
        return any(m.endpoint.labels.get(SERVICE) == service.labels[MADE] for m in every)

    def _tell(self, what: str, error: VxmeshError) -> None:
        text = f"{what}: {error}"
        if text not in self._told:
            self._told.add(text)
            log.warning("docker.failed", what=what, error=str(error))
