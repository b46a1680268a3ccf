"""The way to an agent by gRPC's own library: many calls at a time, and over TCP too.

What stands opposite: api/front.py and api/tlsfront.py of the agent; clientunix.py is the other
way there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import grpc.aio

from agent.clientcalls import MESSAGE_MAX, Refused
from agent.rpc import control_pb2_grpc as pb_grpc

DETAILS = "grpc-status-details-bin"
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_MAX),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
]


class GrpcCalls:
    """Calls on a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub: Any = pb_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request)
        except grpc.aio.AioRpcError as error:
            raise _refused(error) from None

    async def upload(self, method: str, requests: Iterable[Any]) -> Any:
        async def each() -> AsyncIterator[Any]:
            for request in requests:
                yield request

        return await self.call(method, each())

    async def stream(self, method: str, request: Any) -> AsyncIterator[Any]:
        try:
            async for reply in getattr(self._stub, method)(request):
                yield reply
        except grpc.aio.AioRpcError as error:
            raise _refused(error) from None

    async def close(self) -> None:
        await self._channel.close()


def connect(target: str) -> GrpcCalls:
    """By any gRPC target that needs no certificate."""
    return GrpcCalls(grpc.aio.insecure_channel(target, options=OPTIONS))


def connect_tls(target: str, roots: bytes, key: bytes, certificate: bytes, name: str) -> GrpcCalls:
    """To host:port, if who answers has a certificate for `name` of one of `roots`; all in PEM."""
    credentials = grpc.ssl_channel_credentials(roots, key, certificate)
    named = ("grpc.ssl_target_name_override", name)
    return GrpcCalls(grpc.aio.secure_channel(target, credentials, [*OPTIONS, named]))


def _refused(error: grpc.aio.AioRpcError) -> Refused:
    details = b""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS:
            details = value if isinstance(value, bytes) else value.encode("latin-1")
    return Refused(error.code().name, error.details() or "", details)
