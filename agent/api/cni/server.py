"""The socket that vxmesh-cni asks: one line of JSON, one line in answer.

Only root may connect, as runtimes do. No HTTP, so that the plugin need not load any and this agent
need not serve it.
What stands opposite: agent/cni/main.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from agent import cnimodel as cni
from agent.api.cni.attachments import Asked, Attachments
from agent.cnimodel import CniError
from agent.errors import Conflict

log = structlog.get_logger()

ASKED_WITHIN = 5.0  # s from connecting until the question is whole
_decode = msgspec.json.Decoder(Asked).decode
_encode = msgspec.json.encode


class CniServer:
    """Answers the plugin on this host."""

    def __init__(self, attachments: Attachments, path: Path) -> None:
        self._path = path
        self._calls: dict[str, Callable[[Asked], Awaitable[dict[str, Any]]]] = {
            "ADD": attachments.add,
            "DEL": attachments.delete,
            "CHECK": attachments.check,
            "STATUS": attachments.status,
            "GC": attachments.collect,
        }
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen, in the place of an agent that died; Conflict if that cannot be."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)
            os.fchmod(sock.fileno(), 0o600)  # before anybody could connect; see unix(7)
            sock.bind(str(self._path))
            self._server = await asyncio.start_unix_server(
                self._serve, sock=sock, limit=cni.LINE_MAX
            )
        except OSError as error:
            sock.close()
            raise Conflict(
                f"socket {self._path}", f"cannot be listened on ({error.strerror})", "Free it"
            ) from None

    async def stop(self) -> None:
        """Listen no more. What is under way is undone, and its runtime told to try again."""
        if self._server:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            async with asyncio.timeout(ASKED_WITHIN):
                line = await reader.readline()
            writer.write(_encode(await self._answer(line)) + b"\n")
            await writer.drain()
        except (TimeoutError, ValueError, OSError):
            pass  # who asks nothing, more than fits in a line, or has gone is told nothing
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = _decode(line)
            return {"found": await self._calls[asked.command](asked)}
        except CniError as error:
            return _refusal(error)
        except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
            why = f"the agent does not understand its plugin, of another version perhaps: {error}"
            return _refusal(CniError(cni.FAILED, why))
        except Exception as error:
            log.exception("cni.failed")
            with contextlib.suppress(Exception):
                return _refusal(CniError(cni.FAILED, f"vxmesh failed: {error!r}"))
            raise


def _refusal(error: CniError) -> dict[str, Any]:
    return {"error": {"code": error.code, "details": error.details}}
