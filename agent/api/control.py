"""vxmesh.v1.Control: requests in, one call of operations.py or a look at the node, replies out.

What stands opposite: client.py and, through it, the command line.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import grpc.aio

from agent.api import convert
from agent.api.errors import reports, reports_stream
from agent.api.metrics import Metrics
from agent.api.requests import all_of, refs_of, wait_of
from agent.api.services import ServiceControl
from agent.api.watch import Watchers
from agent.core.members import Member
from agent.core.tunnels import Tunnel
from agent.departures import Departures
from agent.encryption import Encryption
from agent.errors import Exhausted, Invalid, Unsupported
from agent.model import Network, Sandbox
from agent.node import NodeState
from agent.notation import parse_mac
from agent.operations import Operations
from agent.requests import parse_endpoint, parse_ifname, parse_network, parse_publish
from agent.rpc import control_pb2 as pb
from agent.rpc import control_pb2_grpc as pb_grpc
from agent.rpc import types_pb2 as types

PAGE = 1000  # endpoints a message of ListEndpoints
# bytes; some 2,000,000 lines, of all uploads together: held in memory until the last has come
ANNOUNCE_MAX = 256 << 20

Context = grpc.aio.ServicerContext[Any, Any]


class Resolver(Protocol):
    """What resolver/ offers: the name server's own answer, and why."""

    async def resolve(self, name: str, type: str, networks: list[str]) -> pb.ResolveReply:
        """As a sandbox in just these networks (ids) would get it."""


class Users(Protocol):
    """What cluster/identity offers to who wants to use agents over TCP."""

    def issue(self, name: str, right: str, request: bytes) -> pb.UserCertificate:
        """A certificate for the key in `request` (PKCS #10, DER); `right` is read or change."""


class Administration(Protocol):
    """What cluster/identity offers."""

    async def join_token(self, rotate: bool) -> pb.JoinToken:
        """What another machine needs to join; with `rotate` a new one."""

    async def rotate_authority(self, force: bool) -> pb.Cluster:
        """Begin to change the CA, or go on with it; `force`: leave nodes behind."""

    async def cluster(self) -> pb.Cluster:
        """Who the cluster is and whom it trusts."""


class Control(ServiceControl, pb_grpc.ControlServicer):
    """The servicer."""

    def __init__(
        self,
        node: NodeState,
        operations: Operations,
        departures: Departures,
        health: convert.Health,
        resolver: Resolver,
        watchers: Watchers,
        metrics: Metrics,
        administration: Administration,
        encryption: Encryption,
    ) -> None:
        self.node = node
        self.operations = operations
        self.departures = departures
        self.health = health
        self.resolver = resolver
        self.watchers = watchers
        self.metrics = metrics
        self._uploading = 0  # bytes of announcements that are not complete
        self.users: Users | None = None  # where the node has an identity
        self.administration = administration
        self.encryption = encryption
        self.paths: convert.Measures = dict  # where paths are measured
        self.tunnels: Callable[[], Mapping[str, Tunnel]] = dict  # and frames through VXLAN tried

    @reports
    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.Info:
        me = self.node.nodes[self.node.me]
        return pb.Info(node_id=me.id, name=me.name, version=me.version, revision=self.node.revision)

    # -- nodes --

    @reports
    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesReply:
        nodes = sorted(self.node.nodes.values(), key=lambda n: (n.name, n.id))
        return pb.ListNodesReply(nodes=[convert.node(self.node, self.health, n) for n in nodes])

    @reports
    async def GetNode(self, request: pb.GetRequest, context: Context) -> types.Node:
        node = self.node.find_node(request.ref)
        reply = convert.node(self.node, self.health, node)
        reply.paths.extend(convert.paths(self.node, self.paths, self.tunnels(), node))
        return reply

    @reports
    async def RemoveNode(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveReply:
        ids = await self.departures.remove_nodes(
            refs_of(request.refs), wait_of(request), force=request.force
        )
        return pb.RemoveReply(removed=ids)

    @reports
    async def LeaveNode(self, request: pb.LeaveNodeRequest, context: Context) -> pb.LeaveNodeReply:
        done = await self.departures.leave(request.force, wait_of(request))
        return pb.LeaveNodeReply(handovers=[convert.handover(self.node, h) for h in done])

    @reports
    async def RotateKeys(self, request: pb.RotateKeysRequest, context: Context) -> types.Node:
        await self.encryption.rotate()
        return convert.node(self.node, self.health, self.node.nodes[self.node.me])

    # -- networks --

    @reports
    async def CreateNetwork(
        self, request: pb.CreateNetworkRequest, context: Context
    ) -> types.Network:
        spec = parse_network(
            request.name,
            driver=request.driver,
            subnets=request.subnets,
            gateways=request.gateways,
            ip_ranges=[request.ip_range, *request.ip_ranges],
            internal=request.internal,
            mtu=request.mtu,
            vni=request.vni,
            encrypted=request.encrypted,
            ipv6=request.ipv6,
            ipv6_only=request.ipv6_only,
            options=dict(request.options),
            labels=dict(request.labels),
            ipam_driver=request.ipam_driver,
            ipam_options=dict(request.ipam_options),
        )
        network = await self.operations.create_network(spec, wait_of(request))
        return convert.network(self.node, network)

    @reports
    async def ListNetworks(
        self, request: pb.ListNetworksRequest, context: Context
    ) -> pb.ListNetworksReply:
        found = sorted(self.node.catalogue.all(), key=lambda n: self.node.catalogue.name(n.id))
        return pb.ListNetworksReply(networks=[convert.network(self.node, n) for n in found])

    @reports
    async def GetNetwork(self, request: pb.GetRequest, context: Context) -> types.Network:
        return convert.network(self.node, self.node.find_network(request.ref), ranges=True)

    @reports
    async def RemoveNetwork(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveReply:
        ids = await self.operations.remove_networks(refs_of(request.refs), wait_of(request))
        return pb.RemoveReply(removed=ids)

    @reports
    async def PruneNetworks(
        self, request: pb.PruneNetworksRequest, context: Context
    ) -> pb.RemoveReply:
        return pb.RemoveReply(removed=await self.operations.prune_networks(wait_of(request)))

    # -- endpoints --

    @reports
    async def CreateEndpoint(
        self, request: pb.CreateEndpointRequest, context: Context
    ) -> types.Endpoint:
        name = request.name
        if request.sandbox and not name:
            name = self.node.find_sandbox(request.sandbox).name
        spec = parse_endpoint(
            name,
            addresses=request.addresses,
            mac=request.mac,
            aliases=request.aliases,
            labels=dict(request.labels),
            priority=request.priority,
        )
        if request.ifname:
            parse_ifname(request.ifname)
        if request.sandbox and request.netns:
            raise Invalid("--netns", "does not go with --sandbox", "Give one of them")
        if not (request.sandbox or request.netns):
            for flag, given in (("--ifname", request.ifname), ("--priority", request.priority)):
                if given:
                    fix = "Give --sandbox or --netns as well"
                    raise Invalid(flag, "has no namespace to be in", fix)
        endpoint = await self.operations.create_endpoint(
            request.network, spec, request.netns, request.ifname, wait_of(request), request.sandbox
        )
        return convert.endpoint(self.node, Member(endpoint, self.node.me))

    @reports
    async def Announce(
        self, requests: AsyncIterator[pb.AnnounceRequest], context: Context
    ) -> pb.AnnounceReply:
        size = 0

        async def pieces() -> AsyncIterator[bytes]:
            nonlocal size
            async for request in requests:
                if request.WhichOneof("part") != "lines":
                    raise Invalid("Announce", "has a second header", "Send one, and then lines")
                size += len(request.lines)
                self._uploading += len(request.lines)
                _check_upload(size, self._uploading)
                yield request.lines

        try:
            first = await anext(requests, None)
            if first is None or first.WhichOneof("part") != "header":
                raise Invalid("Announce", "has no header", "Send the header first")
            header = first.header
            count = await self.operations.announce(header.network, pieces(), wait_of(header))
            return pb.AnnounceReply(announced=count)
        finally:
            self._uploading -= size

    @reports_stream
    async def ListEndpoints(
        self, request: pb.ListEndpointsRequest, context: Context
    ) -> AsyncIterator[pb.ListEndpointsReply]:
        networks: list[Network]
        if request.network:
            networks = [self.node.find_network(request.network)]
        else:
            networks = sorted(
                self.node.catalogue.all(), key=lambda n: self.node.catalogue.name(n.id)
            )
        only = self.node.find_node(request.node).id if request.node else ""
        for network in networks:
            members = self.node.members.get(network.id)
            found = [
                m for m in (members.all.values() if members else ()) if not only or m.node == only
            ]
            found.sort(key=lambda m: m.endpoint.name)
            for start in range(0, len(found), PAGE):
                page = found[start : start + PAGE]
                yield pb.ListEndpointsReply(
                    endpoints=[convert.endpoint(self.node, m) for m in page]
                )

    @reports
    async def GetEndpoint(self, request: pb.GetRequest, context: Context) -> types.Endpoint:
        _, member = self.node.find_endpoint(request.ref, request.network)
        return convert.endpoint(self.node, member)

    @reports
    async def RemoveEndpoint(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveReply:
        ids = await self.operations.remove_endpoints(
            refs_of(request.refs), request.network, wait_of(request), request.all, by_user=True
        )
        return pb.RemoveReply(removed=ids)

    # -- sandboxes --

    @reports
    async def CreateSandbox(
        self, request: pb.CreateSandboxRequest, context: Context
    ) -> types.Sandbox:
        spec = parse_endpoint(
            request.name or "unnamed",
            addresses=request.addresses,
            aliases=request.aliases,
            labels=dict(request.labels),
        )
        publishes = [
            parse_publish(p.host_port, p.target_port, p.protocol or "tcp", p.host_address)
            for p in request.publishes
        ]
        sandbox = await self.operations.create_sandbox(
            request.name,
            all_of(request.networks),
            request.pid,
            spec=spec,
            macs={ref: parse_mac(mac) for ref, mac in request.macs.items()},
            defaults=all_of(request.defaults),
            publishes=publishes,
            log=request.log,
            wait=wait_of(request),
        )
        return self._sandbox(sandbox)

    @reports
    async def ListSandboxes(
        self, request: pb.ListSandboxesRequest, context: Context
    ) -> pb.ListSandboxesReply:
        found = sorted(self.node.sandboxes.values(), key=lambda s: s.name)
        return pb.ListSandboxesReply(sandboxes=[self._sandbox(s) for s in found])

    @reports
    async def GetSandbox(self, request: pb.GetRequest, context: Context) -> types.Sandbox:
        return self._sandbox(self.node.find_sandbox(request.ref))

    @reports
    async def RemoveSandbox(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveReply:
        ids = await self.operations.remove_sandboxes(
            refs_of(request.refs), wait_of(request), by_user=True
        )
        return pb.RemoveReply(removed=ids)

    def _sandbox(self, sandbox: Sandbox) -> types.Sandbox:
        return convert.sandbox(self.node, sandbox, self.operations.resolv_conf(sandbox))

    # -- names, changes --

    @reports
    async def Resolve(self, request: pb.ResolveRequest, context: Context) -> pb.ResolveReply:
        if request.network:
            networks = [self.node.find_network(request.network).id]
        else:
            networks = [n.id for n in self.node.local_networks()]
        return await self.resolver.resolve(request.name, request.type, networks)

    @reports_stream
    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Event]:
        async for event in self.watchers.watch(request):
            yield event

    @reports
    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.MetricsReply:
        return pb.MetricsReply(text=(await self.metrics.text()).decode())

    @reports
    async def IssueUser(self, request: pb.IssueUserRequest, context: Context) -> pb.UserCertificate:
        if self.users is None:
            raise Unsupported("certificates", "are issued by no agent without an identity")
        right = "read" if request.read else "change"
        return self.users.issue(request.name, right, request.request)

    # -- identity --

    @reports
    async def GetJoinToken(self, request: pb.GetJoinTokenRequest, context: Context) -> pb.JoinToken:
        return await self.administration.join_token(request.rotate)

    @reports
    async def RotateAuthority(
        self, request: pb.RotateAuthorityRequest, context: Context
    ) -> pb.Cluster:
        return await self.administration.rotate_authority(request.force)

    @reports
    async def GetCluster(self, request: pb.GetClusterRequest, context: Context) -> pb.Cluster:
        return await self.administration.cluster()


def _check_upload(size: int, all: int) -> None:
    if size > ANNOUNCE_MAX:
        raise Invalid("the file", f"is larger than {ANNOUNCE_MAX >> 20} MiB", "Split it")
    if all > ANNOUNCE_MAX:
        why = f"there are {ANNOUNCE_MAX >> 20} MiB of others on their way"
        raise Exhausted("the file", why, "Announce one after the other")
