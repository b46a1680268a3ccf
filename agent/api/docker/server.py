"""The plugin's socket: JSON over HTTP, as engines speak to it; failures are {"Err": …}.

Only root may connect, as engines do: by this socket networks are made and removed.
Source: docs.docker.com/engine/extend/plugin_api. Opposite: driver.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web

from agent.api.docker.driver import Driver
from agent.api.docker.ipam import Ipam
from agent.api.docker.keeping import ENGINE
from agent.errors import Conflict, VxmeshError

log = structlog.get_logger()

SOCKET = Path("/run/docker/plugins/vxmesh.sock")
TYPE = "application/vnd.docker.plugins.v1.1+json"
SHUTDOWN_WITHIN = 0.5  # s for a call under way when the agent stops
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
Call = Callable[[bytes], Awaitable[dict[str, Any]]]


class DockerPlugin:
    """Serves engines of this host."""

    def __init__(self, driver: Driver, ipam: Ipam, path: Path = SOCKET) -> None:
        self._path = path
        app = web.Application()
        app.router.add_post("/Plugin.Activate", _answering(_activate))
        for name, call in {
            "GetCapabilities": driver.get_capabilities,
            "CreateNetwork": driver.create_network,
            "DeleteNetwork": driver.delete_network,
            "CreateEndpoint": driver.create_endpoint,
            "DeleteEndpoint": driver.delete_endpoint,
            "EndpointOperInfo": driver.endpoint_oper_info,
            "Join": driver.join,
            "Leave": driver.leave,
            "ProgramExternalConnectivity": driver.program_external_connectivity,
            "RevokeExternalConnectivity": driver.revoke_external_connectivity,
            "DiscoverNew": driver.discover_new,
            "DiscoverDelete": driver.discover_delete,
        }.items():
            app.router.add_post(f"/NetworkDriver.{name}", _answering(call))
        for name, call in {
            "GetCapabilities": ipam.get_capabilities,
            "GetDefaultAddressSpaces": ipam.get_default_address_spaces,
            "RequestPool": ipam.request_pool,
            "ReleasePool": ipam.release_pool,
            "RequestAddress": ipam.request_address,
            "ReleaseAddress": ipam.release_address,
        }.items():
            app.router.add_post(f"/IpamDriver.{name}", _answering(call))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_WITHIN)

    async def start(self) -> None:
        """Listen, in the place of an agent that died; Conflict if that cannot be."""
        await self._runner.setup()
        try:
            await _make_room(self._path)
            await web.UnixSite(self._runner, str(self._path)).start()
            os.chmod(self._path, 0o600)  # noqa: PTH101 (a system call that does not block)
        except Conflict:
            await self._runner.cleanup()
            raise
        except OSError as error:
            await self._runner.cleanup()
            raise Conflict(
                f"socket {self._path}",
                f"cannot be listened on ({error.strerror})",
                "Free it, or start the agent without --docker",
            ) from None

    async def stop(self) -> None:
        """Listen no more."""
        await self._runner.cleanup()


async def _make_room(path: Path) -> None:
    """Remove a dead agent's socket; Conflict if a living one answers there (agent/serving.py)."""
    await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except FileNotFoundError:
        return
    except OSError:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        return
    writer.close()
    raise Conflict(
        f"socket {path}", "is another agent's", "Stop that one, or start this one without --docker"
    )


def _answering(call: Call) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        begin, body = time.monotonic(), await request.read()
        ENGINE.set(_asks(request))
        try:
            # Shielded: who asked may give up, and what was begun is done whole or not at all.
            found = await asyncio.shield(call(body))
        except VxmeshError as error:
            found = _refusal(str(error))
        except Exception as error:
            log.exception("docker.failed", call=request.path)
            found = _refusal(f"vxmesh failed: {error!r}")
        took = round(1000 * (time.monotonic() - begin), 1)
        log.debug("docker.call", call=request.path, ms=took, asked=body.decode(errors="replace"),
                  answer=found)  # fmt: skip
        return web.json_response(found, content_type=TYPE)

    return answer


def _asks(request: web.Request) -> int:
    """The process at the other end: SO_PEERCRED in unix(7); 0 if it is gone."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is None:
        return 0
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return int(CREDENTIALS.unpack(credentials)[0])


def _refusal(why: str) -> dict[str, Any]:
    """An engine looks for `Err` in what a network driver answers, for `Error` in an IPAM's."""
    return {"Err": why, "Error": why}


async def _activate(_: bytes) -> dict[str, Any]:
    return {"Implements": ["NetworkDriver", "IpamDriver"]}
