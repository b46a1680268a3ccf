"""What nodes ask of each other: takes streams, pings and requests for addresses.

Behind front.py, which lets in only nodes of this cluster; each must be the one that it says it is
(claims.py). Opposite: peers.py, calls.py and detector.py of another node.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from agent.cluster.callers import Caller
from agent.cluster.calls import AWAIT_MOST, Question, await_applied, clamp
from agent.cluster.claims import Claims
from agent.cluster.codec import delta_to_proto
from agent.cluster.dialer import Dialer
from agent.cluster.front import Front
from agent.cluster.inflight import ERRANDS_MAX, InFlight
from agent.cluster.link import Impostor
from agent.cluster.outside import ENROL, PEER, Handlers, OutsideServer
from agent.cluster.refusals import Refusals
from agent.errors import Conflict, Invalid
from agent.model import Publish
from agent.node import NodeState
from agent.ports import find_taken
from agent.rpc import peer_pb2 as pb

SYNC = f"/{PEER}/Sync"
DEFAULT_PORT = 7946
BEHIND_MAX = 20_000  # records that fit into the answer to a request for addresses
# Ranges of one request for addresses: each is looked for in all that we own. Who wants more asks
# again (peers.py); a bulk of 2,000 endpoints takes a few requests at worst.
RANGES_MAX = 256
MESSAGE_MAX = 16 << 20  # bytes; a batch has 4 MiB (core/session.py), an answer with records more
STREAMS_MAX = 1024  # calls of one connection; twice what inflight.py lets a node have

TAKES_WITHIN = 5.0  # s, that who called a stream may leave a message of ours lying before its end

INNER = "inner"  # below the run directory: where the front reaches the servers behind it

Accept = Callable[
    [AsyncIterator[bytes], Callable[[bytes], Awaitable[None]], Caller], Awaitable[None]
]


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
    for taken in find_taken([Publish(port, port, "tcp", address)]):
        raise Conflict(
            f"peer port {address}:{port}",
            f"cannot be taken ({taken.why})",
            "Stop what holds it, or choose another with --port (and --advertise)",
        )


class Pings(Protocol):
    """Who answers for failure detection (detector.py)."""

    def answer(self, request: pb.PingRequest) -> pb.PingReply: ...

    async def answer_for(self, request: pb.PingForRequest) -> pb.PingForReply: ...


class PeerServer:
    """vxmesh.v1.Peer, in bytes for Sync so that batches are encoded once.

    `run_dir` is where its inner sockets go, `enrol` are the methods of vxmesh.v1.Enrol, which
    those too may call that are no members, and `more` are further methods of Peer.
    """

    def __init__(
        self,
        node: NodeState,
        accept: Accept,
        durable: Callable[[], Awaitable[None]],
        dialer: Dialer,
        refusals: Refusals,
        run_dir: Path,
        enrol: Handlers | None = None,
        more: Handlers | None = None,
    ) -> None:
        self.node = node
        self._more = more or {}
        self._enrol = enrol or {}
        self._accept = accept
        self._dialer = dialer
        self._claims = Claims(node, refusals)
        self._outside = OutsideServer(node, refusals, self._enrol)
        directory = run_dir / INNER
        self._sockets = directory / "members.sock", directory / "outside.sock"
        self._front = Front(node, dialer.keyring, refusals, *self._sockets)
        self._durable = durable
        self._calls = InFlight()
        self._errands = InFlight(ERRANDS_MAX)
        self.pings: Pings | None = None
        self._server: grpc.aio.Server | None = None
        self._moved = asyncio.Event()

    async def start(self, address: str, port: int) -> None:
        """Listen on `address`; Conflict if something else holds the port."""
        check_port(address, port)
        inside, outside = self._sockets
        await asyncio.to_thread(_make_private, inside.parent)
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MESSAGE_MAX),
                ("grpc.max_concurrent_streams", STREAMS_MAX),
            ]
        )
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Sync": grpc.stream_stream_rpc_method_handler(self._sync),
            "RequestSpace": grpc.unary_unary_rpc_method_handler(
                self._calls.bounded(self._request_space),
                request_deserializer=pb.SpaceRequest.FromString,
                response_serializer=pb.SpaceReply.SerializeToString,
            ),
            "Ping": grpc.unary_unary_rpc_method_handler(
                self._calls.bounded(self._ping),
                request_deserializer=pb.PingRequest.FromString,
                response_serializer=pb.PingReply.SerializeToString,
            ),
            "PingFor": grpc.unary_unary_rpc_method_handler(
                self._errands.bounded(self._ping_for),
                request_deserializer=pb.PingForRequest.FromString,
                response_serializer=pb.PingForReply.SerializeToString,
            ),
            "AwaitApplied": grpc.unary_unary_rpc_method_handler(
                self._calls.bounded(self._await_applied),
                request_deserializer=pb.AppliedRequest.FromString,
                response_serializer=pb.Applied.SerializeToString,
            ),
            "WhoIs": grpc.unary_unary_rpc_method_handler(
                self._who_is,
                request_deserializer=pb.WhoIsRequest.FromString,
                response_serializer=pb.WhoIsReply.SerializeToString,
            ),
            **self._more,
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(PEER, handlers),
                grpc.method_handlers_generic_handler(ENROL, dict(self._enrol)),
            )
        )
        server.add_insecure_port(f"unix://{inside}")
        await server.start()
        self._server = server
        await self._outside.start(outside)
        await self._front.start(address, port)

    async def stop(self) -> None:
        """Close the port and every stream."""
        if self._server:
            self._front.close()
            await asyncio.gather(self._server.stop(0.2), self._outside.stop())
            await self._front.stop()
            self._server = None

    def kernel_moved(self) -> None:
        """The kernel has got further: let those who wait for it look."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def _await_applied(
        self,
        request: pb.AppliedRequest,
        context: grpc.aio.ServicerContext[pb.AppliedRequest, pb.Applied],
    ) -> pb.Applied:
        await self._claims.member(context)
        deadline = time.monotonic() + clamp(request.seconds, 0.0, AWAIT_MOST)
        if request.node and request.node != self.node.me:
            return await self._errands.run(self._await_for_another, request, context)
        while self.node.applied(request.origin) < request.version:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                async with asyncio.timeout(left):
                    await self._moved.wait()
            except TimeoutError:
                break
        why = self.node.why_withheld(request.networks)
        return pb.Applied(version=self.node.applied(request.origin), why=why)

    async def _await_for_another(
        self,
        request: pb.AppliedRequest,
        context: grpc.aio.ServicerContext[pb.AppliedRequest, pb.Applied],
    ) -> pb.Applied:
        """For one who cannot reach that node itself."""
        deadline = time.monotonic() + clamp(request.seconds, 0.0, AWAIT_MOST)
        node = self.node.nodes.get(request.node)
        question = Question(request.origin, request.version, deadline, tuple(request.networks))
        has = node and await await_applied(self._dialer, node, question)
        return pb.Applied(version=request.version if has else 0, why=question.why)

    async def _sync(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        caller = await self._claims.member(context)
        replies = _Replies(context.write)
        try:
            await self._accept(requests, replies.write, caller)
        except Impostor:
            await replies.end()
            await self._claims.impostor(caller, context)
        await replies.end()
        await self._claims.member(context)  # it may have been removed meanwhile: let it know

    async def _who_is(
        self, request: pb.WhoIsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.WhoIsReply:
        await self._claims.member(context)
        return pb.WhoIsReply(node=self.node.me)

    async def _ping(
        self, request: pb.PingRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PingReply:
        await self._claims.check(request.node, context)
        try:
            return (await self._pings(context)).answer(request)
        except Invalid as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise

    async def _ping_for(
        self, request: pb.PingForRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PingForReply:
        await self._claims.check(request.node, context)
        return await (await self._pings(context)).answer_for(request)

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
        await self._claims.check(request.requester, context)
        width = {4: 4, 6: 16}.get(request.family, 0)
        if len(request.ranges) > RANGES_MAX:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many ranges")
        ranges = [(r.start, r.end) for r in request.ranges]
        if not width or any(len(a) != width or len(b) != width or a > b for a, b in ranges):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "malformed ranges")
        me = self.node.me
        whole = self.node.floor(me) <= request.known <= self.node.version(me)
        known = request.known if whole else 0
        if len(self.node.since(me, known)) > BEHIND_MAX:
            return pb.SpaceReply(refused="the asker has not caught up yet; try again shortly")
        refused = self.node.donate(request.network, request.requester, request.family, ranges)
        if refused:
            return pb.SpaceReply(refused=refused)
        # Before the answer: a donation that a crash could undo would be an address twice.
        await self._durable()
        delta = self.node.delta(me, known)
        return pb.SpaceReply(delta=delta_to_proto(delta))


class _Replies:
    """What a stream is answered.

    gRPC takes one thing after the other. Who gives up writing does not take a message back, and an
    end beside one is refused: who called would never be told of it.
    """

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write
        self._last: asyncio.Future[None] | None = None

    async def write(self, data: bytes) -> None:
        """Send a message; it goes on its way though the one who waits for that is cancelled."""
        self._last = asyncio.ensure_future(self._write(data))
        self._last.add_done_callback(lambda last: last.cancelled() or last.exception())
        await asyncio.shield(self._last)

    async def end(self) -> None:
        """Wait until nothing is on its way. CancelledError if who called takes nothing: it can be
        told nothing either."""
        if self._last and not self._last.done():
            await asyncio.wait([self._last], timeout=TAKES_WITHIN)
            if not self._last.done():
                raise asyncio.CancelledError


def _make_private(directory: Path) -> None:
    """A directory that only we can enter: who reaches the sockets in it is believed."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
