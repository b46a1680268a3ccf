"""The name server's other processes: each answers on sockets of its own, by SO_REUSEPORT.

The kernel deals questions out by the asker's address and port. The first process has the agent's
feed and the lock; it hands on what it is fed, as it came, and says that a change is in force when
it is so in all. A worker that ends leaves its sockets to the first process, which answers on them
from then on: no question is lost for long. When the first ends, the others do.
What stands opposite: intake.py, which calls `forward` here, and serves the feed in a worker.
Source: socket(7), SO_REUSEPORT.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence

from agent.resolver import feed

WORKERS_MAX = 64
SETTLE_SECONDS = 10.0  # a worker that does not take a change in is ended

Sockets = tuple[list[socket.socket], list[socket.socket]]  # UDP, TCP

_log = logging.getLogger("vxmesh.resolver.workers")


class _Worker:
    """One of them, as the first process sees it."""

    def __init__(self, pid: int, sock: socket.socket, sockets: Sockets) -> None:
        self.pid = pid
        self.sock = sock
        self.sockets = sockets
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.sent = 0  # messages that are to be confirmed
        self.done = 0
        self.moved = asyncio.Event()  # `done` or `counters` changed, or it ended
        self.counters: dict[str, int] = {}
        self.asked = self.told = 0  # of counters
        self.ended = False


class Workers:
    """All of them. `adopt` is called with the sockets of one that has ended."""

    def __init__(self, adopt: Callable[[Sockets], None] = lambda _sockets: None) -> None:
        self.adopt = adopt
        self._workers: list[_Worker] = []
        self._tasks: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return sum(not worker.ended for worker in self._workers)

    def fork(
        self, sets: Sequence[Sockets], serve: Callable[[socket.socket, Sockets], None]
    ) -> None:
        """A process for each of `sets`, which calls `serve` with the feed and its sockets.

        Before there is a loop or a thread in this process: the new ones are copies of it.
        """
        for sockets in sets:
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    ours.close()
                    for worker in self._workers:
                        worker.sock.close()
                    serve(theirs, sockets)
                    status = 0
                except BaseException:
                    _log.exception("worker")
                finally:
                    os._exit(status)
            theirs.close()
            self._workers.append(_Worker(pid, ours, sockets))

    async def start(self, setup: str) -> None:
        """Begin to feed them."""
        for worker in self._workers:
            worker.reader, worker.writer = await asyncio.open_unix_connection(sock=worker.sock)
            worker.writer.write(feed.frame(feed.Hello(feed.PROTOCOL, setup)))
            self._tasks.append(asyncio.create_task(self._read(worker)))

    async def forward(self, payload: bytes, confirmed: bool) -> None:
        """Hand on a message as it came; returns when it is in force if it is to be `confirmed`."""
        living = [worker for worker in self._workers if not worker.ended]
        for worker in living:
            assert worker.writer is not None
            worker.writer.write(len(payload).to_bytes(4, "big") + payload)
            worker.sent += confirmed
        for worker in living:
            assert worker.writer is not None
            try:
                async with asyncio.timeout(SETTLE_SECONDS):
                    await worker.writer.drain()
                    while confirmed and worker.done < worker.sent and not worker.ended:
                        worker.moved.clear()
                        await worker.moved.wait()
            except OSError:
                # TimeoutError is one. Better none than one that answers what is no longer so.
                worker.writer.transport.abort()

    async def counters(self) -> Counter[str]:
        """What all of them counted so far."""
        total: Counter[str] = Counter()
        for worker in self._workers:
            if not worker.ended and worker.writer is not None:
                worker.asked += 1
                worker.writer.write(feed.frame(feed.StatsQuery(worker.asked)))
                try:
                    async with asyncio.timeout(SETTLE_SECONDS):
                        while worker.told < worker.asked and not worker.ended:
                            worker.moved.clear()
                            await worker.moved.wait()
                except TimeoutError:
                    _log.warning("worker silent", extra={"fields": {"pid": worker.pid}})
            total.update(worker.counters)
        return total

    def sockets(self) -> list[socket.socket]:
        """All that they listen on."""
        return [sock for worker in self._workers for each in worker.sockets for sock in each]

    async def close(self) -> None:
        """End them."""
        self.adopt = lambda _sockets: None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            if worker.writer is not None:
                worker.writer.close()
            worker.sock.close()
        for sock in self.sockets():
            sock.close()

    async def _read(self, worker: _Worker) -> None:
        assert worker.reader is not None
        try:
            while True:
                message = feed.to_agent_decoder.decode(await feed.read_frame(worker.reader))
                if isinstance(message, feed.Done):
                    worker.done += 1
                elif isinstance(message, feed.Stats):
                    worker.told, worker.counters = message.id, message.counters
                worker.moved.set()
        except (EOFError, OSError, ValueError) as error:
            worker.ended = True
            worker.moved.set()
            _log.error("worker ended", extra={"fields": {"pid": worker.pid, "error": str(error)}})
            await asyncio.to_thread(os.waitpid, worker.pid, 0)
            self.adopt(worker.sockets)
