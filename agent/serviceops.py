"""What callers ask of services, from beginning to end: ports looked at on all hosts, addresses
donated, the change made and seen in the kernels.

What stands opposite: agent/node/services.py (state), operations.py (the rest of changing calls),
cluster/ports.py (other nodes).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

import structlog

from agent.allocator import Donors, with_space
from agent.completion import IpamDriver
from agent.errors import Conflict, Invalid, VxmeshError
from agent.model import Endpoint, Publish
from agent.node import NodeState
from agent.ports import Taken, find_taken
from agent.requests import EndpointSpec
from agent.servicemodel import DNSRR, HEALTHY, UNHEALTHY, Service
from agent.servicespec import ServiceSpec

log = structlog.get_logger()
TOLD = 5  # nodes named in one error


class PortAsker(Protocol):
    """Who asks other nodes."""

    def live_nodes(self) -> Sequence[str]:
        """The other nodes (ids) that count as members."""

    async def check_ports(self, node: str, ports: Sequence[Publish]) -> list[Taken]:
        """Which of these ports cannot be published there; VxmeshError if it does not answer."""


class Done(Protocol):
    """Operations.done."""

    def __call__(self, wait: float = 0.0, networks: Sequence[str] = ()) -> Awaitable[None]: ...


class _Finding(NamedTuple):
    node: str  # name
    taken: list[Taken]


class ServiceOperations:
    """Every changing call that is about services."""

    def __init__(self, node: NodeState, donors: Donors, asker: PortAsker, done: Done) -> None:
        self.node = node
        self._donors = donors
        self._asker = asker
        self._done = done
        self.ipam: IpamDriver | None = None

    async def create(self, spec: ServiceSpec, wait: float = 0.0) -> Service:
        """Make a service; Conflict names the node on which a port to publish is taken."""
        looked_at = self.node.preview(spec)
        self.node.check_published(looked_at)
        await self._check_hosts(looked_at)
        async with self._addressed(spec) as own:
            service = await with_space(
                self.node, self._donors, lambda: self.node.create_service(own)
            )
        await self._done(wait, [service.network])
        return service

    @contextlib.asynccontextmanager
    async def _addressed(self, spec: ServiceSpec) -> AsyncIterator[ServiceSpec]:
        """`spec` with the addresses that a plugin gives, where they are its to give."""
        network = self.node.find_network(spec.network)
        if self.ipam is None or network.ipam is None or spec.mode == DNSRR:
            yield spec
            return
        async with self.ipam.addresses(network, EndpointSpec(spec.name, spec.vips)) as own:
            yield dataclasses.replace(spec, vips=own.addresses)

    async def update(
        self, ref: str, network: str, spec: ServiceSpec, fields: Sequence[str], wait: float = 0.0
    ) -> Service:
        """Change some fields of a service."""
        looked_at = self.node.preview(spec, ref, network, fields)
        self.node.check_published(looked_at)
        await self._check_hosts(looked_at)
        service = self.node.update_service(ref, network, spec, fields)
        await self._done(wait, [service.network])
        return service

    async def remove(self, refs: Sequence[str], network: str = "", wait: float = 0.0) -> list[str]:
        """Remove services."""
        found = [self.node.find_service(ref, network) for ref in refs]
        ids = list(dict.fromkeys(service.id for service in found))  # named twice, it is one
        for id in ids:
            self.node.remove_service(id)
        await self._done(wait, [service.network for service in found])
        return ids

    async def change_backend(self, change: Callable[[], Service], wait: float = 0.0) -> Service:
        """Make a change of one backend."""
        service = change()
        await self._done(wait, [service.network])
        return service

    async def tell_health(
        self, ref: str, network: str, state: str, reason: str, wait: float = 0.0
    ) -> Endpoint:
        """The runtime says how an endpoint of this node is."""
        if state not in ("", HEALTHY, UNHEALTHY):
            raise Invalid(f"health {state[:20]!r}", "is unknown", "Use healthy or unhealthy")
        if reason and state != UNHEALTHY:
            raise Invalid("a reason", "is told of what is unhealthy only", "Leave it out")
        if not reason.isprintable():
            raise Invalid("the reason", "has control characters", "Use plain text")
        found, member = self.node.find_endpoint(ref, network)
        self.node.tell_health(member.endpoint.id, state, reason)
        await self._done(wait, [found.id])
        return member.endpoint

    # -- ports of hosts --

    async def _check_hosts(self, service: Service) -> None:
        """Conflict if something else than services holds a port on a node that is to publish it."""
        ports = [
            Publish(port.published, port.target, port.protocol, port.published_at)
            for port in service.published
        ]
        if not ports:
            return
        on = service.publish_on
        others = [id for id in self._asker.live_nodes() if not on or id in on]
        findings = list(await asyncio.gather(*(self._ask(id, ports) for id in others)))
        if not on or self.node.me in on:
            mine = await asyncio.to_thread(find_taken, ports)
            findings.append(_Finding(self.node.node_name(self.node.me), mine))
        for port in ports:
            taken = [(f.node, t) for f in findings for t in f.taken if t.publish == port]
            held = sorted((node, t.why) for node, t in taken if not t.is_foreign)
            if held:
                nodes = ", ".join(f"{node} ({why})" for node, why in held[:TOLD])
                more = f" and {len(held) - TOLD} more" if len(held) > TOLD else ""
                raise Conflict(
                    f"port {port.host_port}/{port.protocol}",
                    f"cannot be published on {nodes}{more}",
                    "Stop what holds it, choose another, or name other nodes with --publish-on",
                )
            if port.host_address and taken and len(taken) == len(findings):
                raise Invalid(
                    f"address {port.host_address}",
                    "is no node's that is to publish the port",
                    "Use one of a host's own",
                )

    async def _ask(self, id: str, ports: Sequence[Publish]) -> _Finding:
        """What a node says; one that cannot be asked has nothing against it."""
        try:
            return _Finding(self.node.node_name(id), await self._asker.check_ports(id, ports))
        except VxmeshError as error:
            log.warning("ports.unasked", node=id, error=str(error))
            return _Finding(self.node.node_name(id), [])
