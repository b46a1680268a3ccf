"""The gRPC server of Control, health and reflection, and the fronts before it.

The server itself listens in a directory that only root can enter; users meet the fronts. They
come last, so that who can connect is answered. What stands opposite: daemon.py, which builds the
Control; client.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import structlog
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agent.api.front import (
    INNER_SOCKET,
    READ_SOCKET,
    SOCKET,
    Front,
    Groups,
    Limits,
    find_group,
    inner_directory,
)
from agent.api.refusals import Note
from agent.api.rights import CONTROL, Caller, Guard, Way
from agent.api.tlsfront import Believed, Context, TlsFront
from agent.rpc import control_pb2_grpc

log = structlog.get_logger()

MESSAGE_MAX = 16 << 20  # bytes of one request
STOP_WITHIN = 0.5  # s for calls under way when the agent stops


class ControlServer:
    """Serves one Control on the sockets of a run directory."""

    def __init__(
        self,
        control: Any,
        run_dir: Path,
        groups: tuple[str, str],
        refused: Note,
        limits: Limits | None = None,
    ) -> None:
        """`groups` may change and may look: names, or gids as text. `refused` is told of who is
        refused (refusals.py)."""
        self.inner = run_dir / "inner" / INNER_SOCKET
        self._control = control
        self._run_dir = run_dir
        self._names = groups
        self._refused = refused
        self._limits = limits or Limits()
        self._server: grpc.aio.Server | None = None
        self._front: Front | None = None
        self._tls: TlsFront | None = None

    async def start(self) -> None:
        """Serve; OSError if a socket cannot be made."""
        await asyncio.to_thread(inner_directory, self._run_dir)
        change, read = [await asyncio.to_thread(find_group, name) for name in self._names]
        log.info("control.groups", change=change, read=read)
        await self._start_inner()
        front = Front(self.inner, Groups(change, read), self._refused, self._limits)
        self._front = front
        if read is not None and read != change:
            await front.listen(self._run_dir / READ_SOCKET, Way.READ_SOCKET, read)
        await front.listen(self._run_dir / SOCKET, Way.SOCKET, change)

    async def listen(
        self, address: str, port: int, context: Context, believed: Believed
    ) -> TlsFront:
        """Take users over TCP too; Conflict if the port cannot be taken.

        `context` gives the TLS context of the moment, `believed` raises Invalid for a
        certificate of no CA that holds (tlsfront.py).
        """
        self._tls = TlsFront(self.inner, context, believed, self._refused, self._limits)
        await self._tls.listen(address, port)
        return self._tls

    async def stop(self) -> None:
        """Take no more connections, and end the calls under way."""
        if self._front:
            await self._front.close()
        if self._tls:
            await self._tls.close()
        if self._server:
            await self._server.stop(STOP_WITHIN)

    async def _start_inner(self) -> None:
        server = grpc.aio.server(
            interceptors=[Guard(self._names, self._refuse)],
            options=[("grpc.max_receive_message_length", MESSAGE_MAX)],
        )
        control_pb2_grpc.add_ControlServicer_to_server(self._control, server)  # type: ignore[no-untyped-call]
        health = grpc_health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        for service in ("", CONTROL):
            await health.set(service, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection(
            (CONTROL, grpc_health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        server.add_insecure_port(f"unix://{self.inner}")
        await server.start()
        self._server = server

    def _refuse(self, caller: Caller, method: str) -> None:
        who = " ".join(str(part) for part in next(iter(caller.field().items())))
        text = f"{who} has no right to call {method.rsplit('/', 1)[-1]}"
        self._refused("right", who, text)
