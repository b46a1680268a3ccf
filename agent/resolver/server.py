"""Listens to the sandboxes, UDP and TCP, and answers each by who it is.

Answers of ours are made in the call that read the question; only what is forwarded waits.
Nobody is answered before the first full state has come (`start`): what is asked meanwhile lies
in the kernel's queue, so that a name server that has just started denies no name.
Who asks much does not make the others wait: questions are read as they come and answered in
turn, one of each asker (fairness.py); over TCP an asker is read no faster than its pace.
Sources: RFC 1035, section 4.2; RFC 7766 (TCP: several questions a connection, answered as they
are ready, idle ones closed).
What stands opposite: core/names.py decides, forward.py asks the host's resolvers.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import NamedTuple

import dns.rcode

from agent.core.names import Kind, Names
from agent.core.question import Question
from agent.resolver import messages
from agent.resolver.fairness import FairQueue, Pace
from agent.resolver.forward import Forwarder
from agent.resolver.messages import QUESTION_BYTES_MAX, Asked
from agent.resolver.sockets import Ancillary, receive, share, source_address

DATAGRAMS_PER_WAKEUP = 64  # to read one takes 4 µs; then others of the loop have their turn
ANSWERS_PER_WAKEUP = 4  # some 0.6 ms, which is how long one who asks now waits for one who floods
QUESTIONS_PER_SOURCE_MAX = 1024  # that wait: 150 ms of answering; it is its own time that it fills
# Over TCP; by UDP the kernel bounds it (datapath/guardrules.py), and there one packet is one
# question.
PACE, PACE_BURST = 1000.0, 1000.0  # questions a second of one asker, and at once after silence
CONNECTIONS_MAX = 256
CONNECTIONS_PER_SOURCE_MAX = 16
QUESTIONS_PER_CONNECTION_MAX = 16  # forwarded at once; what comes after waits to be read
IDLE_SECONDS = 10.0
_TURNS_MAX = 10_000

_log = logging.getLogger("vxmesh.resolver.server")


class _Datagram(NamedTuple):
    """A question that waits for its turn."""

    sock: socket.socket
    wire: bytes
    ancillary: Ancillary
    peer: tuple[str, int]
    source: bytes


class Server:
    """Answers on `udp` and `tcp` sockets from `names`, which may be replaced at any time."""

    def __init__(
        self,
        udp: Sequence[socket.socket],
        tcp: Sequence[socket.socket],
        forwarder: Forwarder,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self.names = Names()
        self.counters: Counter[str] = Counter()
        self._udp = udp
        self._tcp = tcp
        self._forwarder = forwarder
        self._idle_seconds = idle_seconds
        self._turns: dict[Question, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: Counter[bytes] = Counter()
        self._servers: list[asyncio.Server] = []
        self._started = False
        self._waiting: FairQueue[_Datagram] = FairQueue(QUESTIONS_PER_SOURCE_MAX)
        self._turn: asyncio.Handle | None = None  # when those that wait go on being answered
        self._pace = Pace(PACE, PACE_BURST)

    async def start(self) -> None:
        """Begin to read questions. A second call does nothing."""
        if self._started:
            return
        self._started = True
        loop = asyncio.get_running_loop()
        for sock in self._udp:
            loop.add_reader(sock, self._drain, sock)
        for sock in self._tcp:
            self._servers.append(await asyncio.start_server(self._converse, sock=sock))

    def share(self) -> None:
        """From now on another resolver may listen where we do."""
        share((*self._udp, *self._tcp))

    async def close(self) -> None:
        """Stop at once; questions that wait for an upstream get no answer."""
        loop = asyncio.get_running_loop()
        if self._turn:
            self._turn.cancel()
        for sock in self._udp:
            loop.remove_reader(sock)
            sock.close()
        for server in self._servers:
            server.close()
        for sock in self._tcp:
            sock.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reply(self, wire: bytes, source: bytes, udp: bool) -> bytes | Asked | None:
        """The answer; or the question, if upstreams are to be asked; or None for silence."""
        asked = messages.read(wire, udp)
        if not isinstance(asked, Asked):
            self.counters["malformed"] += 1
            return asked
        question = asked.question
        try:
            turn = self._turns.get(question, 0)
            answer = self.names.answer(question, self.names.view(source), turn)
            self.counters[answer.kind.value] += 1
            if len(answer.records) > 1:
                if len(self._turns) >= _TURNS_MAX:
                    self._turns.clear()
                self._turns[question] = turn + 1
            if answer.kind is not Kind.FORWARD:
                return messages.build(asked, answer)
        except Exception:
            # One question must not end the process that all sandboxes of the host ask.
            self.counters["errors"] += 1
            _log.exception("question", extra={"fields": {"labels": list(question.labels)}})
            return messages.failure(asked, dns.rcode.SERVFAIL)
        if not self._forwarder.admit(source):
            return messages.failure(asked, dns.rcode.SERVFAIL)
        return asked

    async def _forward(self, asked: Asked) -> bytes:
        """The wire form of an answer from upstream, or SERVFAIL."""
        try:
            wire = await self._forwarder.answer(asked)
        except Exception:
            self.counters["errors"] += 1
            _log.exception("forward", extra={"fields": {"labels": list(asked.question.labels)}})
            wire = None
        return wire if wire is not None else messages.failure(asked, dns.rcode.SERVFAIL)

    def _drain(self, sock: socket.socket) -> None:
        for _ in range(DATAGRAMS_PER_WAKEUP):
            try:
                wire, ancillary, peer = receive(sock, QUESTION_BYTES_MAX + 1)
            except BlockingIOError:
                break
            except OSError as error:
                _log.error("receive", extra={"fields": {"error": str(error)}})
                break
            self.counters["udp"] += 1
            source = source_address(peer)
            if not self._waiting.put(source, _Datagram(sock, wire, ancillary, peer, source)):
                self.counters["flooded"] += 1
        if self._turn is None:
            self._serve()

    def _serve(self) -> None:
        """Answer some of those that wait; if more do, go on when the loop comes round."""
        self._turn = None
        for _ in range(ANSWERS_PER_WAKEUP):
            if not self._waiting:
                return
            sock, wire, ancillary, peer, source = self._waiting.take()
            reply = self._reply(wire, source, udp=True)
            if isinstance(reply, Asked):
                self._spawn(self._forward_udp(sock, reply, ancillary, peer), source)
            elif reply is not None:
                self._send(sock, reply, ancillary, peer)
        if self._waiting:
            self._turn = asyncio.get_running_loop().call_soon(self._serve)

    async def _forward_udp(
        self,
        sock: socket.socket,
        asked: Asked,
        ancillary: Ancillary,
        peer: tuple[str, int],
    ) -> None:
        self._send(sock, await self._forward(asked), ancillary, peer)

    def _send(
        self, sock: socket.socket, wire: bytes, ancillary: Ancillary, peer: tuple[str, int]
    ) -> None:
        try:
            sock.sendmsg([wire], ancillary, 0, peer)
        except OSError:
            # A full queue, a gateway that is gone, port 0: a datagram may be lost at any time.
            self.counters["unsent"] += 1

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One TCP connection, until the asker ends it, stays idle or misbehaves."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            source = source_address(writer.get_extra_info("peername"))
            full = self._connections.total() >= CONNECTIONS_MAX
            if full or self._connections[source] >= CONNECTIONS_PER_SOURCE_MAX:
                self.counters["connections_refused"] += 1
                return
            self._connections[source] += 1
            try:
                await self._questions(reader, writer, source)
            finally:
                self._connections[source] -= 1
                if not self._connections[source]:
                    del self._connections[source]
        except (OSError, asyncio.IncompleteReadError):
            # TimeoutError is an OSError: gone, idle, or does not read what it asked for.
            writer.transport.abort()
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _questions(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: bytes
    ) -> None:
        # drain() then returns when all is with the kernel: nobody can make us keep answers.
        writer.transport.set_write_buffer_limits(0)
        loop = asyncio.get_running_loop()
        slots = asyncio.Semaphore(QUESTIONS_PER_CONNECTION_MAX)
        waiting: set[asyncio.Task[None]] = set()

        async def forward(asked: Asked) -> None:
            _write_framed(writer, await self._forward(asked))

        try:
            while True:
                async with asyncio.timeout(self._idle_seconds):
                    try:
                        size = int.from_bytes(await reader.readexactly(2), "big")
                    except asyncio.IncompleteReadError:
                        break
                    wire = await reader.readexactly(size)
                self.counters["tcp"] += 1
                # What it sends meanwhile stays in the kernel, which then takes no more of it.
                await asyncio.sleep(self._pace.delay(source, loop.time()))
                reply = self._reply(wire, source, udp=False)
                if reply is None:
                    return  # RFC 7766, section 6.2.4 leaves it open; no resolver sends such bytes
                if isinstance(reply, Asked):
                    await slots.acquire()
                    task = self._spawn(forward(reply), source)
                    task.add_done_callback(lambda _: slots.release())
                    waiting.add(task)
                    task.add_done_callback(waiting.discard)
                else:
                    _write_framed(writer, reply)
                async with asyncio.timeout(self._idle_seconds):
                    await writer.drain()
            # It may have closed its half only, and still wait for what was asked.
            if waiting:
                await asyncio.wait(waiting)
            async with asyncio.timeout(self._idle_seconds):
                await writer.drain()
        finally:
            for task in waiting:
                task.cancel()

    def _spawn(self, work: Coroutine[object, object, None], source: bytes) -> asyncio.Task[None]:
        """Run what waits for an upstream, for a question that was admitted."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Not in the work itself: a task that is cancelled before its first step never runs.
        task.add_done_callback(lambda _: self._forwarder.release(source))
        return task


def _write_framed(writer: asyncio.StreamWriter, wire: bytes) -> None:
    """RFC 1035, section 4.2.2: two bytes of length; in one write, for one segment."""
    if not writer.is_closing():
        writer.write(len(wire).to_bytes(2, "big") + wire)
