"""The typed async client of vxmesh.v1.Control; the command line uses nothing else.

    async with Client() as client:
        network = await client.create_network("web")

Every call raises a VxmeshError (errors.py) when the agent refuses, NoAgent when none answers.
Replies are the messages of proto/types.proto. What stands opposite: api/control.py; the ways
there are clientunix.py (of a command) and clientgrpc.py, with clientsocket.py and clienttls.py.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from agent.clientcalls import Calls, Refused
from agent.clientsocket import open_to_us, shut_to_us, unix_path
from agent.errors import Denied, Invalid, NoAgent, VxmeshError, from_code
from agent.rpc import control_pb2 as pb
from agent.rpc import types_pb2 as types

if TYPE_CHECKING:
    from agent.clienttls import Bundle

DEFAULT_HOST = "unix:///run/vxmesh/agent.sock"
TCP = "tcp://"
# Bytes of an announce file a message: the agent parses one while the next is on its way.
_CHUNK = 1 << 17


class Client:
    """A connection to one agent. `host` is a gRPC target, by default VXMESH_HOST's.

    Who may not connect agent.sock but read.sock beside it gets that, and can look. For
    `tcp://HOST:PORT` it takes a certificate: `tls` is the file that `vxmesh cluster user` wrote,
    by default VXMESH_TLS's; Invalid if it cannot be used.
    """

    def __init__(self, host: str = "", tls: str = "", *, blocks: bool = False) -> None:
        """With `blocks` it needs no event loop where the agent is of this host, and lets none run
        (clientunix.py); `self.blocks` is whether it is so."""
        self.host = open_to_us(host or os.environ.get("VXMESH_HOST", "") or DEFAULT_HOST)
        self.blocks = blocks and unix_path(self.host) is not None
        self._calls: Calls | None = None
        self._bundle: Bundle | None = None
        if self.host.startswith(TCP):
            # Imported here: `cryptography` takes 50 ms, which the sockets of a host do without.
            from agent.clienttls import Bundle, file_for

            self._bundle = Bundle(file_for(self.host, tls))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        if self._calls:
            await self._calls.close()

    async def info(self) -> pb.Info:
        """The agent's node id, name, version and revision."""
        return cast(pb.Info, await self._call("GetInfo", pb.GetInfoRequest()))

    async def nodes(self) -> list[types.Node]:
        """Every node, by name."""
        return list((await self._call("ListNodes", pb.ListNodesRequest())).nodes)

    async def node(self, ref: str) -> types.Node:
        """A node by name, id or prefix."""
        return cast(types.Node, await self._call("GetNode", pb.GetRequest(ref=ref)))

    async def remove_nodes(
        self, refs: Sequence[str], wait: float = 0.0, *, force: bool = False
    ) -> list[str]:
        """Remove nodes that will not come back: the agent inherits their addresses. Their ids.

        With `force` also those that live: they are cut off, and their workloads go on running.
        """
        request = pb.RemoveRequest(refs=refs, wait=_wait(wait), force=force)
        return list((await self._call("RemoveNode", request)).removed)

    async def leave(self, *, force: bool = False, wait: float = 0.0) -> list[pb.Handover]:
        """Have the agent hand everything over and end; with `force`, workloads too."""
        request = pb.LeaveNodeRequest(force=force, wait=_wait(wait))
        return list((await self._call("LeaveNode", request)).handovers)

    async def rotate_keys(self) -> types.Node:
        """Change the WireGuard key of the agent's node; returns when all use the new one."""
        return cast(types.Node, await self._call("RotateKeys", pb.RotateKeysRequest()))

    async def create_network(
        self,
        name: str,
        *,
        driver: str = "overlay",
        subnets: Sequence[str] = (),
        gateways: Sequence[str] = (),
        ip_range: str = "",
        ip_ranges: Sequence[str] = (),
        internal: bool = False,
        mtu: int = 0,
        vni: int = 0,
        encrypted: bool = False,
        ipv6: bool = False,
        ipv6_only: bool = False,
        options: dict[str, str] | None = None,
        labels: dict[str, str] | None = None,
        ipam_driver: str = "",
        ipam_options: dict[str, str] | None = None,
        wait: float = 0.0,
    ) -> types.Network:
        """Make a network. Without `subnets` a free one is chosen; `wait` is in seconds."""
        request = pb.CreateNetworkRequest(
            name=name,
            driver=driver,
            subnets=subnets,
            gateways=gateways,
            ip_range=ip_range,
            ip_ranges=ip_ranges,
            internal=internal,
            mtu=_unsigned("--mtu", mtu),
            vni=_unsigned("--vni", vni),
            encrypted=encrypted,
            ipv6=ipv6,
            ipv6_only=ipv6_only,
            options=options,
            labels=labels,
            ipam_driver=ipam_driver,
            ipam_options=ipam_options,
            wait=_wait(wait),
        )
        return cast(types.Network, await self._call("CreateNetwork", request))

    async def networks(self) -> list[types.Network]:
        """Every network, by name."""
        reply = await self._call("ListNetworks", pb.ListNetworksRequest())
        return list(reply.networks)

    async def network(self, ref: str) -> types.Network:
        """A network by name, id or prefix, with who owns which of its addresses."""
        return cast(types.Network, await self._call("GetNetwork", pb.GetRequest(ref=ref)))

    async def remove_networks(self, refs: Sequence[str], wait: float = 0.0) -> list[str]:
        """Remove networks that have no endpoints; their ids."""
        request = pb.RemoveRequest(refs=refs, wait=_wait(wait))
        return list((await self._call("RemoveNetwork", request)).removed)

    async def prune_networks(self, wait: float = 0.0) -> list[str]:
        """Remove every network without an endpoint; their ids."""
        request = pb.PruneNetworksRequest(wait=_wait(wait))
        return list((await self._call("PruneNetworks", request)).removed)

    async def create_endpoint(
        self,
        network: str,
        name: str,
        *,
        addresses: Sequence[str] = (),
        mac: str = "",
        aliases: Sequence[str] = (),
        labels: dict[str, str] | None = None,
        netns: str = "",
        ifname: str = "",
        sandbox: str = "",
        priority: int = 0,
        wait: float = 0.0,
    ) -> types.Endpoint:
        """Make an endpoint; with `netns` (a name or path) an interface in that namespace, with
        `sandbox` in one that is there, while its workload runs."""
        request = pb.CreateEndpointRequest(
            network=network,
            name=name,
            addresses=addresses,
            mac=mac,
            aliases=aliases,
            labels=labels,
            netns=netns,
            ifname=ifname,
            sandbox=sandbox,
            priority=_signed("--priority", priority),
            wait=_wait(wait),
        )
        return cast(types.Endpoint, await self._call("CreateEndpoint", request))

    async def announce(self, network: str, lines: Iterable[bytes], wait: float = 0.0) -> int:
        """Announce interfaces that exist, all or none: pieces of a file of JSON lines; how many."""

        def requests() -> Iterator[pb.AnnounceRequest]:
            header = pb.AnnounceHeader(network=network, wait=_wait(wait))
            yield pb.AnnounceRequest(header=header)
            for piece in lines:
                for start in range(0, len(piece), _CHUNK):
                    yield pb.AnnounceRequest(lines=piece[start : start + _CHUNK])

        try:
            reply = await self._connect().upload("Announce", requests())
        except Refused as error:
            raise self._error(error) from None
        return cast(pb.AnnounceReply, reply).announced

    async def endpoints(self, network: str = "", node: str = "") -> list[types.Endpoint]:
        """Endpoints, of one network or node or of all."""
        request = pb.ListEndpointsRequest(network=network, node=node)
        found: list[types.Endpoint] = []
        async for reply in self._stream("ListEndpoints", request):
            found.extend(reply.endpoints)
        return found

    async def endpoint(self, ref: str, network: str = "") -> types.Endpoint:
        """An endpoint by name, id or prefix."""
        return cast(
            types.Endpoint,
            await self._call("GetEndpoint", pb.GetRequest(ref=ref, network=network)),
        )

    async def remove_endpoints(
        self, refs: Sequence[str] = (), network: str = "", *, all: bool = False, wait: float = 0.0
    ) -> list[str]:
        """Remove endpoints of the agent's node; with `all`, all in `network`. Their ids."""
        request = pb.RemoveRequest(refs=refs, network=network, all=all, wait=_wait(wait))
        return list((await self._call("RemoveEndpoint", request)).removed)

    async def set_health(
        self, ref: str, state: str, reason: str = "", network: str = "", wait: float = 0.0
    ) -> types.Endpoint:
        """Say how an endpoint of the agent's node is: healthy, unhealthy, or "" for no more."""
        request = pb.SetEndpointHealthRequest(
            ref=ref, network=network, state=state, reason=reason, wait=_wait(wait)
        )
        return cast(types.Endpoint, await self._call("SetEndpointHealth", request))

    async def create_service(
        self,
        name: str,
        network: str,
        settings: pb.ServiceSettings | None = None,
        wait: float = 0.0,
    ) -> types.Service:
        """Make a service. What `settings` leave out has its default; `wait` is in seconds."""
        request = pb.CreateServiceRequest(
            name=name, network=network, settings=settings, wait=_wait(wait)
        )
        return cast(types.Service, await self._call("CreateService", request))

    async def services(self, network: str = "") -> list[types.Service]:
        """Services, of one network or of all, by network and name."""
        request = pb.ListServicesRequest(network=network)
        return list((await self._call("ListServices", request)).services)

    async def service(self, ref: str, network: str = "") -> types.Service:
        """A service by name, id or prefix, with its backends."""
        request = pb.GetRequest(ref=ref, network=network)
        return cast(types.Service, await self._call("GetService", request))

    async def update_service(
        self,
        ref: str,
        settings: pb.ServiceSettings,
        fields: Sequence[str],
        network: str = "",
        wait: float = 0.0,
    ) -> types.Service:
        """Change the `fields` (names of ServiceSettings') of a service to those of `settings`."""
        request = pb.UpdateServiceRequest(
            ref=ref, network=network, settings=settings, wait=_wait(wait)
        )
        request.mask.paths.extend(fields)
        return cast(types.Service, await self._call("UpdateService", request))

    async def remove_services(
        self, refs: Sequence[str], network: str = "", wait: float = 0.0
    ) -> list[str]:
        """Remove services; their ids."""
        request = pb.RemoveRequest(refs=refs, network=network, wait=_wait(wait))
        return list((await self._call("RemoveServices", request)).removed)

    async def add_backend(
        self,
        ref: str,
        endpoint: str,
        *,
        weight: int | None = None,
        network: str = "",
        wait: float = 0.0,
    ) -> types.Service:
        """Make an endpoint a backend of a service, or change its weight, or end its draining."""
        request = pb.BackendRequest(ref=ref, network=network, endpoint=endpoint, wait=_wait(wait))
        if weight is not None:
            request.weight = _unsigned("--weight", weight)
        return cast(types.Service, await self._call("AddBackend", request))

    async def remove_backend(
        self, ref: str, endpoint: str, *, network: str = "", wait: float = 0.0
    ) -> types.Service:
        """Take an endpoint that was named out of a service's backends."""
        request = pb.BackendRequest(ref=ref, network=network, endpoint=endpoint, wait=_wait(wait))
        return cast(types.Service, await self._call("RemoveBackend", request))

    async def drain_backend(
        self, ref: str, endpoint: str, *, network: str = "", wait: float = 0.0
    ) -> types.Service:
        """Send no new connections to a backend; those that it has go on."""
        request = pb.BackendRequest(ref=ref, network=network, endpoint=endpoint, wait=_wait(wait))
        return cast(types.Service, await self._call("DrainBackend", request))

    async def create_sandbox(
        self,
        pid: int,
        networks: Sequence[str],
        *,
        name: str = "",
        addresses: Sequence[str] = (),
        aliases: Sequence[str] = (),
        labels: dict[str, str] | None = None,
        macs: dict[str, str] | None = None,
        defaults: Sequence[str] = (),
        publishes: Sequence[types.Publish] = (),
        log: str = "",
        wait: float = 0.0,
    ) -> types.Sandbox:
        """Give the network namespace of a process an interface in each network.

        `macs` are by network, or by "" if there is but one; `defaults` are those of the networks
        that are to have the default routes, the first one first.
        """
        request = pb.CreateSandboxRequest(
            name=name,
            networks=networks,
            pid=pid,
            addresses=addresses,
            aliases=aliases,
            labels=labels,
            macs=macs,
            defaults=defaults,
            publishes=publishes,
            log=log,
            wait=_wait(wait),
        )
        return cast(types.Sandbox, await self._call("CreateSandbox", request))

    async def sandboxes(self) -> list[types.Sandbox]:
        """The sandboxes of the agent's node."""
        reply = await self._call("ListSandboxes", pb.ListSandboxesRequest())
        return list(reply.sandboxes)

    async def sandbox(self, ref: str) -> types.Sandbox:
        """A sandbox by name, id or prefix."""
        return cast(types.Sandbox, await self._call("GetSandbox", pb.GetRequest(ref=ref)))

    async def remove_sandboxes(self, refs: Sequence[str], wait: float = 0.0) -> list[str]:
        """Take the interfaces of sandboxes away; their ids."""
        request = pb.RemoveRequest(refs=refs, wait=_wait(wait))
        return list((await self._call("RemoveSandbox", request)).removed)

    async def resolve(self, name: str, type: str = "", network: str = "") -> pb.ResolveReply:
        """What the name server answers, and why."""
        request = pb.ResolveRequest(name=name, type=type, network=network)
        return cast(pb.ResolveReply, await self._call("Resolve", request))

    async def metrics(self) -> str:
        """The agent's metrics, in Prometheus' text format."""
        reply: pb.MetricsReply = await self._call("GetMetrics", pb.GetMetricsRequest())
        return reply.text

    async def issue_user(
        self, name: str, request: bytes, *, read: bool = False
    ) -> pb.UserCertificate:
        """A certificate for who uses agents over TCP; `request` is clienttls.make_request's."""
        asked = pb.IssueUserRequest(name=name, read=read, request=request)
        return cast(pb.UserCertificate, await self._call("IssueUser", asked))

    async def join_token(self, *, rotate: bool = False) -> pb.JoinToken:
        """What another machine needs to join; with `rotate` a new one, and the old one is void."""
        request = pb.GetJoinTokenRequest(rotate=rotate)
        return cast(pb.JoinToken, await self._call("GetJoinToken", request))

    async def rotate_authority(self, *, force: bool = False) -> pb.Cluster:
        """Begin to change the cluster's CA; with `force`, nodes that are away are left behind."""
        request = pb.RotateAuthorityRequest(force=force)
        return cast(pb.Cluster, await self._call("RotateAuthority", request))

    async def cluster(self) -> pb.Cluster:
        """Who the cluster is, whom it trusts, and whose certificates end when."""
        return cast(pb.Cluster, await self._call("GetCluster", pb.GetClusterRequest()))

    async def watch(self, since: int = 0) -> AsyncIterator[pb.Event]:
        """Changes after revision `since`; with 0 the present state first, then `synced`."""
        async for event in self._stream("Watch", pb.WatchRequest(since=since)):
            yield event

    async def events(
        self, since: int = 0, *, not_before: float = 0.0, follow: bool = False
    ) -> AsyncIterator[pb.Event]:
        """What is in the agent's history, then `synced`; with `follow` goes on from there.

        `since` is a revision, `not_before` in seconds since the epoch. Where the history does
        not reach back so far, an event `trimmed` comes first.
        """
        request = pb.WatchRequest(since=since, history=True, not_before=not_before, end=not follow)
        async for event in self._stream("Watch", request):
            yield event

    def _connect(self) -> Calls:
        """The way to the agent, made at the first call: gRPC's is one of the loop that runs."""
        if self._calls is None:
            # Imported here: one takes 0.1 s, the other is what a program with a loop cannot use.
            if self._bundle:
                self._calls = self._bundle.connect(self.host.removeprefix(TCP))
            elif self.blocks:
                from agent.clientunix import UnixCalls

                self._calls = UnixCalls(str(unix_path(self.host)))
            else:
                from agent.clientgrpc import connect

                self._calls = connect(self.host)
        return self._calls

    async def _call(self, method: str, request: Any) -> Any:
        try:
            return await self._connect().call(method, request)
        except Refused as error:
            raise self._error(error) from None

    async def _stream(self, method: str, request: Any) -> AsyncIterator[Any]:
        try:
            async for reply in self._connect().stream(method, request):
                yield reply
        except Refused as error:
            raise self._error(error) from None

    def _error(self, error: Refused) -> VxmeshError:
        if error.details:
            return _from_details(error.details)
        if error.code == "UNAVAILABLE":
            if denied := self._denied(error.text):
                return denied
            return NoAgent(
                f"agent at {self.host}",
                "does not answer",
                "Start one with 'vxmesh agent', or say where it is with --host or VXMESH_HOST",
            )
        return from_code(error.code, "the request", error.text or "was refused")

    def _denied(self, details: str) -> Denied | None:
        """The error if an agent may well be there, and it is us that it does not take."""
        if self._bundle:
            return self._bundle.problem(self.host, details)
        return shut_to_us(self.host)


def _from_details(data: bytes) -> VxmeshError:
    from google.rpc import error_details_pb2, status_pb2

    status = status_pb2.Status.FromString(data)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            parts = info.metadata
            return from_code(info.reason, parts["what"], parts["why"], parts["fix"])
    return VxmeshError("the request", status.message)


def _wait(seconds: float) -> pb.Wait | None:
    return pb.Wait(seconds=seconds) if seconds else None


def _signed(what: str, number: int) -> int:
    if abs(number) >= 1 << 31:
        raise Invalid(f"{what} {number}", "is out of range", "Use a smaller number")
    return number


def _unsigned(what: str, number: int) -> int:
    if not 0 <= number < 1 << 32:
        raise Invalid(f"{what} {number}", "is out of range", "Use a positive number")
    return number
