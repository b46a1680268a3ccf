"""Whether ports could be published on another host: both sides of the question.

What stands opposite: this file on the other node; agent/serviceops.py asks, agent/ports.py looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from agent.cluster.claims import Claims
from agent.cluster.dialer import Dialer
from agent.cluster.inflight import InFlight
from agent.errors import Invalid, Unavailable
from agent.model import Publish
from agent.node import NodeState
from agent.notation import format_address, parse_address
from agent.ports import Taken, find_taken
from agent.requests import parse_publish
from agent.rpc import peer_pb2 as pb
from agent.rpc import peer_pb2_grpc as pb_grpc
from agent.servicemodel import PORTS_MAX

ANSWER_WITHIN = 3.0  # s
WHY_MAX = 120  # characters of what another node says


class PortCheck:
    """Asks, and answers."""

    def __init__(self, node: NodeState, dialer: Dialer, claims: Claims) -> None:
        self.node = node
        self._dialer = dialer
        self._claims = claims
        self._calls = InFlight()

    async def ask(self, id: str, ports: Sequence[Publish]) -> list[Taken]:
        """Which of these ports cannot be published on a node; Unavailable if it does not answer."""
        node = self.node.nodes.get(id)
        if node is None:
            raise Unavailable(f"node {id}", "is not known here")
        request = pb.PortsRequest(node=self.node.me, ports=[_to_proto(port) for port in ports])
        channel = self._dialer.channel(node)
        try:
            stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            reply: pb.PortsReply = await stub.CheckPorts(request, timeout=ANSWER_WITHIN)
        except grpc.aio.AioRpcError as error:
            raise self._dialer.heed(error, id) from None
        finally:
            await channel.close()
        asked = {_key(port): port for port in ports}
        found = []
        for taken in reply.taken:
            at = taken.port.address
            port = asked.get((taken.port.protocol, taken.port.port, at))
            why = "".join(c if c.isprintable() else "?" for c in taken.why[:WHY_MAX])
            if port:
                found.append(Taken(port, why, taken.foreign))
        return found

    def handlers(self) -> dict[str, Any]:
        """For cluster/server.py: the methods of the service."""
        return {
            "CheckPorts": grpc.unary_unary_rpc_method_handler(
                self._calls.bounded(self._check),
                request_deserializer=pb.PortsRequest.FromString,
                response_serializer=pb.PortsReply.SerializeToString,
            )
        }

    async def _check(
        self,
        request: pb.PortsRequest,
        context: grpc.aio.ServicerContext[pb.PortsRequest, pb.PortsReply],
    ) -> pb.PortsReply:
        await self._claims.check(request.node, context)
        if len(request.ports) > PORTS_MAX:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many ports")
        try:
            ports = [_from_proto(port) for port in request.ports]
        except Invalid as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        held = [(port, self.node.publisher(port)) for port in ports]
        found = [Taken(port, f"{holder} publishes it") for port, holder in held if holder]
        free = [port for port, holder in held if not holder]
        found += await asyncio.to_thread(find_taken, free)
        return pb.PortsReply(
            taken=[
                pb.PortTaken(port=_to_proto(t.publish), why=t.why, foreign=t.is_foreign)
                for t in found
            ]
        )


def _key(port: Publish) -> tuple[str, int, str]:
    return port.protocol, port.host_port, port.host_address


def _to_proto(port: Publish) -> pb.HostPort:
    return pb.HostPort(protocol=port.protocol, port=port.host_port, address=port.host_address)


def _from_proto(port: pb.HostPort) -> Publish:
    """Invalid if it is none."""
    address = format_address(parse_address(port.address)) if port.address else ""
    return parse_publish(port.port, port.port, port.protocol, address)
