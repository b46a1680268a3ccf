"""The peer port: takes streams and requests for addresses. Opposite: peers.py of another node."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from agent.cluster.calls import AWAIT_MOST, await_applied
from agent.cluster.codec import delta_to_proto
from agent.cluster.consent import Refused, refuse
from agent.errors import Conflict, Invalid
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb

SYNC = "/vxmesh.v1.Peer/Sync"
DEFAULT_PORT = 7946
BEHIND_MAX = 20_000  # records that fit into the answer to a request for addresses

Accept = Callable[[AsyncIterator[bytes], Callable[[bytes], Awaitable[None]]], Awaitable[None]]


def split_address(text: str) -> str:
    """host[:port] or [v6]:port as host:port with the default port; Invalid if malformed."""
    host, port = text, ""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isdigit() and 0 < int(port) < 65536)):
        raise Invalid(f"address {text!r}", "is malformed", "Write HOST or HOST:PORT")
    return f"[{host}]:{port or DEFAULT_PORT}" if ":" in host else f"{host}:{port or DEFAULT_PORT}"


def check_port(address: str, port: int) -> None:
    """Conflict if something else holds the port, or the address is not this host's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise Conflict(
                f"peer port {address}:{port}",
                f"cannot be taken ({error.strerror})",
                "Stop what holds it, or choose another with --port (and --advertise)",
            ) from None


class Pings(Protocol):
    """Who answers for failure detection (detector.py)."""

    def answer(self, request: pb.PingRequest) -> pb.PingReply: ...

    async def answer_for(self, request: pb.PingForRequest) -> pb.PingForReply: ...


class PeerServer:
    """vxmesh.v1.Peer, in bytes for Sync so that batches are encoded once."""

    def __init__(
        self,
        node: NodeState,
        accept: Accept,
        durable: Callable[[], Awaitable[None]],
        more: dict[str, Any] | None = None,
    ) -> None:
        self.node = node
        self._more = more or {}  # further methods of the service: name -> handler
        self._accept = accept
        self._durable = durable
        self.pings: Pings | None = None
        self._server: grpc.aio.Server | None = None
        self._moved = asyncio.Event()

    async def start(self, address: str, port: int) -> None:
        """Listen on `address`; Conflict if something else holds the port."""
        check_port(address, port)
        server = grpc.aio.server(
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 << 20)]
        )
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Sync": grpc.stream_stream_rpc_method_handler(self._sync),
            "RequestSpace": grpc.unary_unary_rpc_method_handler(
                self._request_space,
                request_deserializer=pb.SpaceRequest.FromString,
                response_serializer=pb.SpaceReply.SerializeToString,
            ),
            "Ping": grpc.unary_unary_rpc_method_handler(
                self._ping,
                request_deserializer=pb.PingRequest.FromString,
                response_serializer=pb.PingReply.SerializeToString,
            ),
            "PingFor": grpc.unary_unary_rpc_method_handler(
                self._ping_for,
                request_deserializer=pb.PingForRequest.FromString,
                response_serializer=pb.PingForReply.SerializeToString,
            ),
            "AwaitApplied": grpc.unary_unary_rpc_method_handler(
                self._await_applied,
                request_deserializer=pb.AppliedRequest.FromString,
                response_serializer=pb.Applied.SerializeToString,
            ),
            **self._more,
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("vxmesh.v1.Peer", handlers),)
        )
        target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        if server.add_insecure_port(target) == 0:
            raise Conflict(f"peer port {target}", "cannot be taken", "Choose another with --port")
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Close the port and every stream."""
        if self._server:
            await self._server.stop(0.2)

    def kernel_moved(self) -> None:
        """The kernel has got further: let those who wait for it look."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def _await_applied(
        self,
        request: pb.AppliedRequest,
        context: grpc.aio.ServicerContext[pb.AppliedRequest, pb.Applied],
    ) -> pb.Applied:
        await self._check_known(request.origin, context)
        deadline = time.monotonic() + min(request.seconds, AWAIT_MOST)
        if request.node and request.node != self.node.me:
            return await self._await_for_another(request, deadline)
        while self.node.applied(request.origin) < request.version:
            left = deadline - time.monotonic()
            if not left > 0:  # nor if it is no number
                break
            try:
                async with asyncio.timeout(left):
                    await self._moved.wait()
            except TimeoutError:
                break
        return pb.Applied(version=self.node.applied(request.origin))

    async def _await_for_another(self, request: pb.AppliedRequest, deadline: float) -> pb.Applied:
        """For one who cannot reach that node itself."""
        node = self.node.nodes.get(request.node)
        has = node and await await_applied(node, request.origin, request.version, deadline)
        return pb.Applied(version=request.version if has else 0)

    async def _sync(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        try:
            await self._accept(requests, context.write)
        except Refused as refused:
            await refuse(context, refused)

    async def _ping(
        self, request: pb.PingRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PingReply:
        await self._check_known(request.node, context)
        try:
            return (await self._pings(context)).answer(request)
        except Invalid as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise

    async def _ping_for(
        self, request: pb.PingForRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PingForReply:
        await self._check_known(request.node, context)
        return await (await self._pings(context)).answer_for(request)

    async def _check_known(self, asker: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """End the call of a node that was removed, so that it learns it."""
        if removal := self.node.removals.get(asker):
            await refuse(context, Refused(removal))

    async def _pings(self, context: grpc.aio.ServicerContext[Any, Any]) -> Pings:
        if self.pings is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this agent is starting")
            raise AssertionError("abort raises")
        return self.pings

    async def _request_space(
        self,
        request: pb.SpaceRequest,
        context: grpc.aio.ServicerContext[pb.SpaceRequest, pb.SpaceReply],
    ) -> pb.SpaceReply:
        await self._check_known(request.requester, context)
        width = {4: 4, 6: 16}.get(request.family, 0)
        ranges = [(r.start, r.end) for r in request.ranges]
        if not width or any(len(a) != width or len(b) != width or a > b for a, b in ranges):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "malformed ranges")
        me = self.node.me
        known = request.known if request.known >= self.node.floor(me) else 0
        if len(self.node.since(me, known)) > BEHIND_MAX:
            return pb.SpaceReply(refused="the asker has not caught up yet; try again shortly")
        refused = self.node.donate(request.network, request.requester, request.family, ranges)
        if refused:
            return pb.SpaceReply(refused=refused)
        # Before the answer: a donation that a crash could undo would be an address twice.
        await self._durable()
        delta = self.node.delta(me, known)
        return pb.SpaceReply(delta=delta_to_proto(delta))
