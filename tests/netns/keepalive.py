"""An HTTP server as a rolling replacement wants them: it ends without breaking off a request.

`python keepalive.py NAME [PORT]` answers every GET with NAME, on connections that are kept alive
unless the client says otherwise. After SIGTERM each answer says that the connection ends with it,
and when there is none left, and no more have come for GRACE, so does the process. It writes its
process id first and the number of requests last, a line each. Only the standard library.
What stands opposite: test_harm.py, with wrk.
Source: RFC 9112, 9.6 (`Connection: close`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

GRACE = 0.2  # s without a connection, for those that the kernel still holds out to be accepted
BACKLOG = 1024
END = b"\r\n\r\n"


class Server:
    """One of them; counts."""

    def __init__(self, name: str) -> None:
        body = name.encode()
        self._answers = [
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s"
            % (len(body), how, body)
            for how in (b"keep-alive", b"close")
        ]
        self.requests = 0
        self.open: set[Connection] = set()
        self.is_ending = False

    def answer(self, head: bytes) -> tuple[bytes, bool]:
        """What a request is answered with, and whether the connection ends with it."""
        self.requests += 1
        ends = self.is_ending or b"connection: close" in head.lower()
        return self._answers[ends], ends

    async def end(self) -> None:
        """Return when nobody has a connection any more."""
        self.is_ending = True
        quiet = 0.0
        while quiet < GRACE:
            await asyncio.sleep(GRACE / 10)
            quiet = 0.0 if self.open else quiet + GRACE / 10


class Connection(asyncio.Protocol):
    """Requests one after the other."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self._server, self._data = server, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.open.add(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while END in self._data:
            head, _, self._data = self._data.partition(END)
            answer, ends = self._server.answer(head)
            self.transport.write(answer)
            if ends:
                self.transport.close()
                return

    def connection_lost(self, error: Exception | None) -> None:
        self._server.open.discard(self)


async def serve(name: str, port: int) -> None:
    """Until SIGTERM, and then until the last connection ends."""
    loop, told, server = asyncio.get_running_loop(), asyncio.Event(), Server(name)
    loop.add_signal_handler(signal.SIGTERM, told.set)
    sock = socket.create_server(("0.0.0.0", port), backlog=BACKLOG)
    listening = await loop.create_server(lambda: Connection(server), sock=sock, backlog=BACKLOG)
    print(os.getpid(), flush=True)
    await told.wait()
    await server.end()
    listening.close()
    print(server.requests, flush=True)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000))
