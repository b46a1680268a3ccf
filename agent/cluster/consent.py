"""Departures on the wire: consent to removals, and the last delivery of a node that leaves.

What stands opposite: this file on the other node; agent/departures.py calls, core/removal.py
decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from agent.cluster.claims import Claims
from agent.cluster.codec import delta_from_proto, delta_to_proto
from agent.cluster.dialer import Dialer
from agent.cluster.inflight import InFlight
from agent.core.removal import Answer, Ask, Verdict
from agent.core.seals import Unproven
from agent.errors import Invalid, Unavailable
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.rpc import peer_pb2_grpc as pb_grpc

log = structlog.get_logger()

ANSWER_WITHIN = 2.0  # s; for one try
ENQUIRE_EVERY = 5.0  # s; of removers by force, what became of it
DELIVER_WITHIN = 5.0  # s; the receiver writes to its disk
BEHIND_MAX = 20_000  # records that fit into an answer; the streams bring what does not
LOST_MAX = 1000  # nodes that one asks to remove together

Durable = Callable[[], Awaitable[None]]


class Consent:
    """Both sides of the calls."""

    def __init__(self, node: NodeState, durable: Durable, dialer: Dialer, claims: Claims) -> None:
        self.node = node
        self._durable = durable
        self._dialer = dialer
        self._claims = claims
        self._calls = InFlight()

    # -- asking --

    async def ask(self, voter: str, ask: Ask) -> Answer:
        """A node's answer; Unavailable if there is none. The records that it sends are merged."""
        node = self.node
        known = [
            pb.DigestEntry(origin=origin, version=node.version(origin))
            for origin in [*sorted(ask.lost), voter]
        ]
        request = _to_proto(ask)
        request.known.extend(known)
        reply: pb.RemovalAnswer = await self._call(voter, "AgreeRemoval", request, ANSWER_WITHIN)
        for delta in reply.deltas:
            try:
                node.merge(delta_from_proto(delta), voter)
            except Invalid as error:
                name = f"node {node.node_name(voter)}"
                raise Unavailable(name, f"answers what cannot be read: {error}") from None
        return Answer(
            Verdict(reply.verdict) if reply.verdict in list(Verdict) else Verdict.STRANGER,
            reply.about,
            frozenset(reply.settled),
            {entry.origin: entry.version for entry in reply.versions},
            frozenset(reply.voters),
        )

    async def release(self, ask: Ask, voters: list[str]) -> None:
        """Tell those that were asked that the removal was given up; they forget it in time."""
        request = _to_proto(ask)
        request.release = True
        calls = [self._call(voter, "AgreeRemoval", request, ANSWER_WITHIN) for voter in voters]
        await asyncio.gather(*calls, return_exceptions=True)

    async def settle(self) -> None:
        """Ask removers by force what became of it, where this node has not heard of the end.

        Until it has, it takes nothing of whom it agreed to cut off. Never returns.
        """
        while True:
            await asyncio.sleep(ENQUIRE_EVERY)
            await asyncio.gather(*map(self._enquire, self.node.removing.open_ends()))

    async def _enquire(self, ask: Ask) -> None:
        request = _to_proto(ask)
        request.remover, request.enquiry = self.node.me, True
        try:
            reply = await self._call(ask.remover, "AgreeRemoval", request, ANSWER_WITHIN)
        except Unavailable:
            return  # nobody else knows
        if reply.verdict == Verdict.AGREED:
            self.node.removing.release(ask)  # of this attempt, if another one has begun since

    async def deliver(self, peer: str) -> None:
        """Bring `peer` all that this node wrote; Unavailable if it does not confirm it."""
        node, known = self.node, 0
        for _ in range(3):  # what it has, then what it lacks, then what came since
            reply: pb.DeliveryReply = await self._call(
                peer,
                "Deliver",
                pb.Delivery(
                    node=node.me,
                    delta=delta_to_proto(node.delta(node.me, known)) if known else None,
                ),
                DELIVER_WITHIN,
            )
            if reply.version >= node.version(node.me):
                return
            known = reply.version
        raise Unavailable(f"node {node.node_name(peer)}", "does not take what this node wrote")

    async def _call(self, peer: str, method: str, request: Any, seconds: float) -> Any:
        node = self.node.nodes.get(peer)
        if node is None:
            raise Unavailable(f"node {peer}", "is not known here")
        channel = self._dialer.channel(node)
        try:
            stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            return await getattr(stub, method)(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise self._dialer.heed(error, peer) from None
        finally:
            await channel.close()

    # -- answering --

    def handlers(self) -> dict[str, Any]:
        """For cluster/server.py: the methods of the service."""
        return {
            "AgreeRemoval": grpc.unary_unary_rpc_method_handler(
                self._calls.bounded(self._agree),
                request_deserializer=pb.RemovalAsk.FromString,
                response_serializer=pb.RemovalAnswer.SerializeToString,
            ),
            "Deliver": grpc.unary_unary_rpc_method_handler(
                self._calls.bounded(self._take_delivery),
                request_deserializer=pb.Delivery.FromString,
                response_serializer=pb.DeliveryReply.SerializeToString,
            ),
        }

    async def _agree(
        self,
        request: pb.RemovalAsk,
        context: grpc.aio.ServicerContext[pb.RemovalAsk, pb.RemovalAnswer],
    ) -> pb.RemovalAnswer:
        await self._claims.check(request.remover, context)
        if len(request.lost) > LOST_MAX:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many nodes")
        node = self.node
        ask = Ask(request.remover, frozenset(request.lost), request.force, request.number)
        if request.release:
            node.removing.release(ask)
            return pb.RemovalAnswer()
        if request.enquiry:
            verdict = Verdict.RIVAL if node.removing.pursues(ask) else Verdict.AGREED
            return pb.RemovalAnswer(verdict=int(verdict), about=node.me)
        # What we own by a donation that nobody else has heard of must be among what we tell.
        await self._durable()
        answer = node.removing.decide(ask, node.monotonic())
        if ask.force and answer.verdict is Verdict.AGREED:
            await self._durable()  # a crash must not open the door again
        log.info(
            "removal.asked",
            by=ask.remover,
            lost=sorted(ask.lost),
            force=ask.force,
            verdict=answer.verdict.name,
        )
        reply = pb.RemovalAnswer(
            verdict=int(answer.verdict),
            about=answer.about,
            settled=sorted(answer.settled),
            versions=[pb.DigestEntry(origin=o, version=v) for o, v in answer.versions.items()],
            voters=sorted(answer.voters),
        )
        left = BEHIND_MAX
        for origin, known in {entry.origin: entry.version for entry in request.known}.items():
            if origin in answer.versions and node.version(origin) > known:
                delta = node.delta(origin, known)
                if len(delta.records) <= left and delta.upto == node.version(origin):
                    left -= len(delta.records)
                    reply.deltas.append(delta_to_proto(delta))
        return reply

    async def _take_delivery(
        self,
        request: pb.Delivery,
        context: grpc.aio.ServicerContext[pb.Delivery, pb.DeliveryReply],
    ) -> pb.DeliveryReply:
        node, sender = self.node, request.node
        await self._claims.check(sender, context)
        if request.HasField("delta"):
            try:
                delta = delta_from_proto(request.delta)
                if delta.origin == sender:
                    node.merge(delta, sender)
            except (Invalid, Unproven) as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                raise
            if delta.origin == sender:
                await self._durable()
        return pb.DeliveryReply(version=node.version(sender))


def _to_proto(ask: Ask) -> pb.RemovalAsk:
    return pb.RemovalAsk(
        remover=ask.remover, lost=sorted(ask.lost), force=ask.force, number=ask.number
    )
