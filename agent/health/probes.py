"""One look at a backend: a TCP connection, or an HTTP GET, from inside its sandbox.

A socket lives in the network namespace in which it was made, so one is made there, by a thread
of its own, and used in the event loop like any other. Source: namespaces(7); RFC 9112 (HTTP/1.1).
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from agent.notation import format_address
from agent.servicemodel import HTTP
from agent.syscalls import in_netns

HEAD_MAX = 1024  # bytes of an answer that its first line may take
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")


class Vanished(Exception):
    """The sandbox is not there any more: there is nothing to look at."""


@dataclass(frozen=True, slots=True)
class Target:
    """What to look at."""

    netns: str  # path
    inode: int  # which namespace is meant
    address: bytes
    port: int
    kind: str  # tcp or http
    path: str
    host: str  # for the Host field of HTTP
    timeout: float  # s


class Prober:
    """Looks at targets. To be closed."""

    def __init__(self, threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="probe")

    def close(self) -> None:
        """End the threads; looks under way fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def look(self, target: Target) -> str:
        """Why it is not healthy, for people; empty if it is. Vanished if it is gone."""
        loop = asyncio.get_running_loop()
        sock = await loop.run_in_executor(self._threads, _socket_inside, target)
        with sock:
            where = f"port {target.port}"
            try:
                async with asyncio.timeout(target.timeout):
                    await loop.sock_connect(sock, (format_address(target.address), target.port))
                    if target.kind == HTTP:
                        return await _get(loop, sock, target)
                    return ""
            except TimeoutError:
                return f"{where}: no answer within {target.timeout:g} s"
            except OSError as error:
                # Of a connection asyncio's own text has the address in it, and not the reason.
                text = os.strerror(error.errno) if error.errno else str(error)
                return f"{where}: {text.lower()}"


async def _get(loop: asyncio.AbstractEventLoop, sock: socket.socket, target: Target) -> str:
    request = (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.host}\r\n"
        "User-Agent: vxmesh-health\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    )
    await loop.sock_sendall(sock, request.encode())
    head = b""
    while b"\n" not in head and len(head) < HEAD_MAX:
        piece = await loop.sock_recv(sock, HEAD_MAX - len(head))
        if not piece:
            break
        head += piece
    found = _STATUS.match(head)
    if not found:
        return f"port {target.port}: what answers does not speak HTTP"
    status = int(found[1])
    return "" if 200 <= status < 400 else f"GET {target.path}: status {status}"


def _socket_inside(target: Target) -> socket.socket:
    """A non-blocking socket in the target's namespace; Vanished if that is gone."""
    family = socket.AF_INET if len(target.address) == 4 else socket.AF_INET6
    try:
        fd = os.open(target.netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise Vanished(target.netns) from None
    try:
        if os.fstat(fd).st_ino != target.inode:
            raise Vanished(target.netns)  # another one has its place
        kind = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            return in_netns(f"/proc/self/fd/{fd}", lambda: socket.socket(family, kind))
        except FileNotFoundError:
            raise Vanished(target.netns) from None
    finally:
        os.close(fd)
