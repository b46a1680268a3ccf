"""What those can call who are no members: to enrol, and for the rest to be told why not.

A connection without a certificate, with one whose time is over, or of a node that was removed,
ends at a gRPC server of its own, in which there is nothing of the cluster to read or to write.
What stands opposite: front.py leads here; dialer.py reads what is told; identity/ enrols.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec

from agent.cluster.admission import group
from agent.cluster.callers import caller_of
from agent.cluster.refusals import Reason, Refusals
from agent.core.ratelimit import Buckets
from agent.model import Removal, encode
from agent.node import NodeState
from agent.rpc import peer_pb2

PEER = peer_pb2.DESCRIPTOR.services_by_name["Peer"].full_name
ENROL = peer_pb2.DESCRIPTOR.services_by_name["Enrol"].full_name
REMOVAL_METADATA = "vxmesh-removal-bin"  # trailing metadata for a removed node: by whom, when
REFUSED_METADATA = "vxmesh-refused"  # trailing metadata: a Reason
# To enrol takes two calls. A secret cannot be guessed; this is for the CPU (a signature is made,
# or another node asked) and the log. A dozen agents behind one address can join at once.
ENROL_RATE, ENROL_BURST = 1.0, 30.0  # calls a second, and at once, of one address
ENROL_KNOWN = 4096  # addresses, some 150 bytes each
CALLS_MOST = 64  # under way at a time, as many as connections (front.py)
MESSAGE_MOST = 64 << 10  # bytes; a request to enrol has some 2 kB
STOP_WITHIN = 0.2  # s

_removal = msgspec.msgpack.Decoder(Removal)

# What people are told whose own node is refused: what is wrong, and what to do.
AGAIN = "Run 'vxmesh cluster token' on another node, and start this one with what it prints"
TOLD = {
    Reason.NO_CERTIFICATE: ("it shows no certificate of this cluster", AGAIN),
    Reason.EXPIRED: ("its certificate has expired", AGAIN),
    Reason.EARLY: ("its certificate is not valid yet", "Set the clocks of both"),
    Reason.NAMELESS: ("its certificate names no node", AGAIN),
    Reason.REMOVED: ("it was removed from the cluster", "Start it with --reset-state"),
    Reason.IMPOSTOR: ("it speaks for another node than its certificate names", ""),
}

Handlers = Mapping[str, Any]  # method -> grpc.RpcMethodHandler, which is generic to mypy alone


class Outside(grpc.GenericRpcHandler):
    """Ends every call to the service of members, and counts those of nobody."""

    def __init__(self, node: NodeState, refusals: Refusals) -> None:
        self._node, self._refusals = node, refusals

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """For any method: its handler reads nothing, and ends the call."""
        if not str(details.method).startswith(f"/{PEER}/"):
            return None
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    async def _refuse(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        caller = caller_of(context)
        reason = caller.refused or Reason.NO_CERTIFICATE
        if reason is Reason.NO_CERTIFICATE:  # the others were noted when they came
            self._refusals.note(reason, caller.address)
        await refuse(context, reason, self._node.removals.get(caller.node))


async def refuse(
    context: grpc.aio.ServicerContext[Any, Any], reason: Reason, removal: Removal | None = None
) -> None:
    """End a call so that who called learns why; a removed node, by whom it was."""
    metadata: list[tuple[str, str | bytes]] = [(REFUSED_METADATA, reason.value)]
    text = f"this node is refused: {TOLD[reason][0]}"
    if removal:
        metadata.append((REMOVAL_METADATA, encode(removal)))
        text = f"this node was removed by {removal.by_name or removal.by}"
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, text, tuple(metadata))


def find_removal(error: Exception, me: str) -> Removal | None:
    """What `refuse` said of the removal of this node, if that is what ended a call."""
    for key, value in _trailing(error):
        if key == REMOVAL_METADATA and isinstance(value, bytes):
            try:
                removal = _removal.decode(value)
            except (msgspec.MsgspecError, ValueError):
                return None
            return removal if removal.node == me else None
    return None


def find_refusal(error: Exception) -> Reason | None:
    """Why the other side refuses this node, if that is what ended a call."""
    for key, value in _trailing(error):
        if key == REFUSED_METADATA and isinstance(value, str):
            try:
                return Reason(value)
            except ValueError:
                return None
    return None


def _trailing(error: Exception) -> list[tuple[str, str | bytes]]:
    if not isinstance(error, grpc.aio.AioRpcError):
        return []
    return list(error.trailing_metadata() or ())


class OutsideServer:
    """The server itself, on a unix socket that only the front can reach."""

    def __init__(self, node: NodeState, refusals: Refusals, enrol: Handlers) -> None:
        self._handlers = Outside(node, refusals)
        self._refusals = refusals
        self._enrol = enrol
        self._calls = Buckets(ENROL_RATE, ENROL_BURST, ENROL_KNOWN)
        self._server: grpc.aio.Server | None = None

    async def start(self, path: Path) -> None:
        """Listen at `path`."""
        server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", MESSAGE_MOST)],
            maximum_concurrent_rpcs=CALLS_MOST,
        )
        limited = {name: self._limit(handler) for name, handler in self._enrol.items()}
        enrol = grpc.method_handlers_generic_handler(ENROL, limited)
        server.add_generic_rpc_handlers((enrol, self._handlers))
        server.add_insecure_port(f"unix://{path}")
        await server.start()
        self._server = server

    def _limit(self, handler: Any) -> Any:
        """The same method, for who does not call too often."""

        async def limited(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            caller = caller_of(context)
            if not self._calls.take(group(caller.address), time.monotonic()):
                self._refusals.note(Reason.RATE, caller.address, caller.node)
                text = "too many attempts from this address: wait a minute"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            limited, handler.request_deserializer, handler.response_serializer
        )

    async def stop(self) -> None:
        """End every call."""
        if self._server:
            await self._server.stop(STOP_WITHIN)
