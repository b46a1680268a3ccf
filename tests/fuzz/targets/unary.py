"""What nodes ask each other, and what they answer: each call of vxmesh.v1.Peer.

The first byte of an input chooses the call, the rest is its message.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc.aio
from google.protobuf.message import DecodeError, Message

from agent.cluster.callers import Caller
from agent.cluster.codec import delta_from_proto, rumours_from_proto
from agent.cluster.consent import Consent
from agent.cluster.detector import Detector, sound_rumours
from agent.cluster.dialer import Dialer
from agent.cluster.server import PeerServer
from agent.core.membership import PRESETS, Outcome
from agent.core.removal import Ask
from agent.errors import VxmeshError
from agent.node import NodeState
from agent.plan import Plan
from agent.rpc import peer_pb2 as pb
from tests.fuzz import world
from tests.fuzz.engine import Target
from tests.fuzz.shapes import message

REQUESTS: list[type[Message]] = [
    pb.SpaceRequest, pb.PingRequest, pb.PingForRequest, pb.AppliedRequest, pb.RemovalAsk,
    pb.Delivery,
]  # fmt: skip
REPLIES: list[type[Message]] = [pb.PingReply, pb.SpaceReply, pb.RemovalAnswer, pb.DeliveryReply]


class Aborted(grpc.aio.AbortError):
    """A handler ended its call with a status: that is an answer too."""


class Context:
    """As much of a call as the handlers look at."""

    async def abort(self, code: Any, details: str = "", metadata: Any = ()) -> None:
        """End the call."""
        assert isinstance(details, str)
        raise Aborted

    async def abort_with_status(self, status: Any) -> None:
        """End the call."""
        raise Aborted


class Detecting(Detector):
    """A detector that pings nobody."""

    async def ping(
        self, target: str, timeout: float, host_answers: Callable[[], None] = lambda: None
    ) -> tuple[Outcome, int]:
        """Nobody answers."""
        assert 0 < timeout <= 10
        return Outcome.SILENT, 0

    def _spawn(self, work: Any) -> None:
        work.close()


async def _durable() -> None:
    pass


class Peer:
    """The server's handlers over a node, called without a server."""

    def __init__(self, node: NodeState, caller: str) -> None:
        self.node, self.caller = node, caller
        dialer = cast(Dialer, None)
        self.detector = Detecting(node, PRESETS["lan"], 1 << 20, dict, dialer)
        for id in node.nodes:
            self.detector._add(id)
        self.claims = Checked(caller)
        server: Any = object.__new__(PeerServer)
        server.node, server.pings, server._durable = node, self.detector, _durable
        server._claims, server._dialer = self.claims, dialer
        server._moved = asyncio.Event()
        server._errands = Unbounded()
        consent: Any = object.__new__(Consent)
        consent.node, consent._durable, consent._claims = node, _durable, self.claims
        self.methods: list[Callable[[Any, Any], Awaitable[Message]]] = [
            server._request_space, server._ping, server._ping_for, server._await_applied,
            consent._agree, consent._take_delivery,
        ]  # fmt: skip
        self.consent = consent


class Checked:
    """As claims.Claims, of a caller whose certificate names one node."""

    def __init__(self, node: str) -> None:
        self._node = node

    async def check(self, claimed: str, context: Any) -> Caller:
        """Aborted if it claims to be another."""
        if claimed != self._node:
            raise Aborted
        return Caller(self._node, "10.99.0.2")

    async def member(self, context: Any) -> Caller:
        """Whoever it is."""
        return Caller(self._node, "10.99.0.2")


class Unbounded:
    """As inflight.InFlight, for one call."""

    async def run(self, method: Any, request: Any, context: Any) -> Any:
        """Make the call, to nobody."""
        return pb.Applied()


def ask(data: bytes) -> None:
    """A request of PEER, in its name, at the handler of that call."""
    if not data:
        return
    number = data[0] % len(REQUESTS)
    try:
        request = REQUESTS[number].FromString(data[1:])
    except DecodeError:
        return  # gRPC answers INTERNAL by itself
    if isinstance(request, pb.AppliedRequest):
        request.seconds = min(request.seconds, 0.0)
    state = world.make()
    plan = Plan(state)

    async def call() -> None:
        peer = Peer(state, world.PEER)
        try:
            reply = await peer.methods[number](request, Context())
        except Aborted:
            pass
        except VxmeshError:
            if number not in (5,):  # a delivery that is none: gRPC tells its sender so
                raise
        else:
            assert reply.ByteSize() < 1 << 20
            type(reply).FromString(reply.SerializeToString())
            if isinstance(reply, pb.PingReply):
                rumours_from_proto(reply.rumours)
            if isinstance(reply, pb.SpaceReply) and reply.HasField("delta"):
                delta_from_proto(reply.delta)
        rumours_from_proto(
            pb.Rumour(node=n, incarnation=i, state=s, by=b)
            for n, i, s, b in peer.detector.membership.table()
        )

    LOOP.run_until_complete(call())
    world.look(state, plan)


def make_request(rng: random.Random) -> bytes:
    """For `ask`."""
    number = rng.randrange(len(REQUESTS))
    made = message(REQUESTS[number], rng, world.KNOWN)
    for field in ("requester", "node", "remover"):
        if field in REQUESTS[number].DESCRIPTOR.fields_by_name and rng.random() < 0.9:
            setattr(made, field, world.PEER)
    if isinstance(made, pb.SpaceRequest) and rng.random() < 0.8:
        made.family = 4
        del made.ranges[:]
        for _ in range(rng.choice((0, 1, 2, 8))):
            low = rng.randrange(256)
            high = rng.randrange(low, 256) if rng.random() < 0.8 else 0
            made.ranges.add(start=bytes([10, 1, 0, low]), end=bytes([10, 1, 0, high]))
    return bytes([number]) + made.SerializeToString()


def answer(data: bytes) -> None:
    """What a hostile node answers to this node's own calls."""
    if not data:
        return
    number = data[0] % len(REPLIES)
    try:
        reply: Any = REPLIES[number].FromString(data[1:])
    except DecodeError:
        return
    state = world.make()
    plan = Plan(state)

    async def take() -> None:
        peer = Peer(state, world.PEER)

        async def call(*arguments: Any) -> Any:
            return reply

        peer.consent._call = call
        if number == 0:
            peer.detector.take(world.PEER, sound_rumours(reply))
            peer.detector._compare(world.PEER, reply.table)
        elif number == 1:
            if reply.HasField("delta"):
                state.merge(delta_from_proto(reply.delta))
        elif number == 2:
            asked = Ask(state.me, frozenset((world.THIRD,)))
            attempt = state.removing.begin({world.THIRD}, world.NOW)
            state.removing.take(attempt, world.PEER, await peer.consent.ask(world.PEER, asked))
            state.removing.look(attempt)
            state.removing.lacking(attempt)
        else:
            await peer.consent.deliver(world.PEER)

    LOOP.run_until_complete(take())
    world.look(state, plan)


def make_reply(rng: random.Random) -> bytes:
    """For `answer`."""
    number = rng.randrange(len(REPLIES))
    return bytes([number]) + message(REPLIES[number], rng, world.KNOWN).SerializeToString()


LOOP = asyncio.new_event_loop()
TARGETS = [
    Target("peer.requests", ask, make_request, ()),
    Target("peer.replies", answer, make_reply, (VxmeshError,)),
]
