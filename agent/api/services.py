"""The calls of vxmesh.v1.Control that are about services and the health of endpoints.

What stands opposite: agent/serviceops.py does them; control.py has the other calls.
"""

from __future__ import annotations

from typing import Any

import grpc.aio

from agent.api import convert
from agent.api.errors import reports
from agent.api.requests import refs_of, wait_of
from agent.core.members import Member
from agent.errors import Invalid, Unsupported
from agent.node import NodeState
from agent.rpc import control_pb2 as pb
from agent.rpc import types_pb2 as types
from agent.servicemodel import Service
from agent.serviceops import ServiceOperations
from agent.servicespec import (
    ServiceSpec,
    parse_check,
    parse_port,
    parse_service,
    parse_weight,
)

Context = grpc.aio.ServicerContext[Any, Any]
# Fields of ServiceSettings and what they are called in a spec, where that differs.
_FIELDS = {"affinity_timeout": "affinity"}


class ServiceControl:
    """The methods."""

    node: NodeState
    service_operations: ServiceOperations | None = None

    @reports
    async def CreateService(
        self, request: pb.CreateServiceRequest, context: Context
    ) -> types.Service:
        if not request.name:
            raise Invalid("service", "has no name", "Give one")
        spec = _spec(request.settings, request.name, request.network)
        service = await self._operations().create(spec, wait_of(request))
        return self._shown(service)

    @reports
    async def ListServices(
        self, request: pb.ListServicesRequest, context: Context
    ) -> pb.ListServicesReply:
        if request.network:
            found = self.node.services.of(self.node.find_network(request.network).id)
        else:
            found = list(self.node.services.all())
        found.sort(key=lambda s: (self.node.catalogue.name(s.network), s.name))
        return pb.ListServicesReply(services=[convert.service(self.node, s) for s in found])

    @reports
    async def GetService(self, request: pb.GetRequest, context: Context) -> types.Service:
        return convert.service(self.node, self.node.find_service(request.ref, request.network))

    @reports
    async def UpdateService(
        self, request: pb.UpdateServiceRequest, context: Context
    ) -> types.Service:
        fields = list(dict.fromkeys(_FIELDS.get(path, path) for path in request.mask.paths))
        if not fields:
            raise Invalid("the update", "changes nothing", "Say what is to be changed")
        spec = _spec(request.settings)
        service = await self._operations().update(
            request.ref, request.network, spec, fields, wait_of(request)
        )
        return self._shown(service)

    @reports
    async def RemoveServices(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveReply:
        ids = await self._operations().remove(
            refs_of(request.refs), request.network, wait_of(request)
        )
        return pb.RemoveReply(removed=ids)

    @reports
    async def AddBackend(self, request: pb.BackendRequest, context: Context) -> types.Service:
        weight = parse_weight(request.weight) if request.HasField("weight") else None
        return await self._change(
            request,
            lambda: self.node.add_backend(request.ref, request.network, request.endpoint, weight),
        )

    @reports
    async def RemoveBackend(self, request: pb.BackendRequest, context: Context) -> types.Service:
        return await self._change(
            request,
            lambda: self.node.remove_backend(request.ref, request.network, request.endpoint),
        )

    @reports
    async def DrainBackend(self, request: pb.BackendRequest, context: Context) -> types.Service:
        return await self._change(
            request,
            lambda: self.node.drain_backend(request.ref, request.network, request.endpoint),
        )

    @reports
    async def SetEndpointHealth(
        self, request: pb.SetEndpointHealthRequest, context: Context
    ) -> types.Endpoint:
        endpoint = await self._operations().tell_health(
            request.ref, request.network, request.state, request.reason, wait_of(request)
        )
        return convert.endpoint(self.node, Member(endpoint, self.node.me))

    async def _change(self, request: pb.BackendRequest, change: Any) -> types.Service:
        service = await self._operations().change_backend(change, wait_of(request))
        return self._shown(service)

    def _operations(self) -> ServiceOperations:
        if self.service_operations is None:
            raise Unsupported("services", "are not made by this agent")
        return self.service_operations

    def _shown(self, service: Service) -> types.Service:
        """As it is seen; one that was removed meanwhile as it was."""
        return convert.service(self.node, self.node.services.get(service.id) or service)


def _spec(settings: pb.ServiceSettings, name: str = "", network: str = "") -> ServiceSpec:
    check = settings.health
    return parse_service(
        name,
        network,
        mode=settings.mode,
        vips=settings.vips,
        ports=[
            parse_port(p.port, p.target, p.protocol, p.published, p.published_at)
            for p in settings.ports
        ],
        selector=dict(settings.selector),
        affinity=settings.affinity,
        affinity_timeout=settings.affinity_timeout,
        health=parse_check(
            check.kind,
            check.path,
            check.port,
            check.interval,
            check.timeout,
            check.rise,
            check.fall,
        ),
        publish_on=settings.publish_on,
        prefer_local=settings.prefer_local,
        all_unhealthy=settings.all_unhealthy,
        drain_timeout=settings.drain_timeout,
        labels=dict(settings.labels),
    )
