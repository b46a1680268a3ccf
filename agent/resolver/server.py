"""Listens to the sandboxes, UDP and TCP, and answers each by who it is.

Answers of ours are made in the call that read the question; only what is forwarded waits. Over
UDP most are ready (table.py), and go out as the questions come in (datagrams.py).
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
import contextlib
import functools
import logging
import socket
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import NamedTuple

import dns.rcode

from agent.core.names import Kind, Names
from agent.core.question import Question
from agent.resolver import hugepages, messages
from agent.resolver.datagrams import Datagram, Datagrams
from agent.resolver.fairness import FairQueue, Pace
from agent.resolver.forward import Forwarder
from agent.resolver.sockets import share, source_address
from agent.resolver.table import TURNS_MAX, Answers, Table
from agent.resolver.wire import Asked, build, failure

READS_PER_WAKEUP = 4  # of up to 64 datagrams; a turn of the loop costs as much as five answers
READS_AT_END = 16  # times that: a socket that is closed is emptied, but for one who floods it
READS_IN_ROOM = 1  # the same of a sandbox's own socket, on which no kernel's limit is
ANSWERS_PER_WAKEUP = 16  # some 0.5 ms, which is how long one who asks now waits for one who floods
QUESTIONS_PER_SOURCE_MAX = 1024  # that wait: 30 ms of answering; it is its own time that it fills
# Over TCP; by UDP the kernel bounds it (datapath/guardrules.py), and there one packet is one
# question.
PACE, PACE_BURST = 1000.0, 1000.0  # questions a second of one asker, and at once after silence
CONNECTIONS_MAX = 256
CONNECTIONS_PER_SOURCE_MAX = 16
QUESTIONS_PER_CONNECTION_MAX = 16  # forwarded at once; what comes after waits to be read
IDLE_SECONDS = 10.0
_TURNS_MAX = 10_000
GATHERED = 8192  # answers that were made ready, some 8 MiB, before they go into huge pages

_log = logging.getLogger("vxmesh.resolver.server")


_KINDS = [kind.value for kind in Kind]  # the first is table.POSITIVE
_NUMBERS = {kind: number for number, kind in enumerate(Kind)}


class _Room(NamedTuple):
    """The sockets in one sandbox."""

    udp: list[Datagrams]
    tcp: list[asyncio.Server]
    connections: set[asyncio.StreamWriter]


class _Same:
    """The ready answers of one asker, whatever address it asks from."""

    def __init__(self, answers: Answers | None) -> None:
        self._answers = answers

    def get(self, source: bytes) -> Answers | None:
        return self._answers


class Server:
    """Answers on `udp` and `tcp` sockets from `names`, which may be replaced at any time."""

    def __init__(
        self,
        udp: Sequence[socket.socket],
        tcp: Sequence[socket.socket],
        forwarder: Forwarder,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._names = Names()
        self._counters: Counter[str] = Counter()
        self._counts = [0] * len(_KINDS)  # answers that were ready, by kind
        self._busy_ns = 0  # answering by UDP
        self._table = Table()
        self._datagrams = [Datagrams(sock) for sock in udp]
        self._udp = udp
        self._tcp = tcp
        self._forwarder = forwarder
        self._idle_seconds = idle_seconds
        self._turns: dict[Question, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: Counter[bytes] = Counter()
        self._servers: list[asyncio.Server] = []
        self._started = False
        self._starting = asyncio.Lock()
        self._waiting: FairQueue[tuple[socket.socket, Datagram]] = FairQueue(
            QUESTIONS_PER_SOURCE_MAX
        )
        self._rooms: dict[bytes, _Room] = {}
        self._fresh = 0  # answers made ready that were not put into huge pages
        self._gathering: asyncio.Future[bool] | None = None
        self._turn: asyncio.Handle | None = None  # when those that wait go on being answered
        self._pace = Pace(PACE, PACE_BURST)

    @property
    def names(self) -> Names:
        """What is answered from. Whoever changes it calls `changed`."""
        return self._names

    @names.setter
    def names(self, names: Names) -> None:
        names.watch()
        self._names = names
        self._table.clear()

    def changed(self) -> None:
        """Answers of what has changed in `names` are to be made anew."""
        stale = self._names.take_stale()
        if stale.everything:
            self._table.clear()
            return
        if stale.views:
            self._table.forget_sources()
        self._table.forget(stale.names)

    @property
    def counters(self) -> Counter[str]:
        """What was asked and answered so far."""
        found = Counter(self._counters)
        for kind, count in zip(_KINDS, self._counts, strict=True):
            found[kind] += count
        found["ready"] = sum(self._counts)
        found["unsent"] += sum(datagrams.unsent for datagrams in self._datagrams)
        found["kept"] = len(self._table)
        found["busy_us"] = self._busy_ns // 1000
        return found

    async def start(self) -> None:
        """Begin to read questions. A second call does nothing."""
        async with self._starting:
            if self._started:
                return
            await self._listen(self._datagrams, self._tcp)
            for key, room in list(self._rooms.items()):
                await self._listen_in(key, room)
            self._started = True

    async def _listen(self, udp: Sequence[Datagrams], tcp: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        for datagrams in udp:
            loop.add_reader(datagrams.sock, self._drain, datagrams)
        for sock in tcp:
            self._servers.append(await asyncio.start_server(self._converse, sock=sock))

    def share(self) -> None:
        """From now on another resolver may listen where we do."""
        share((*self._udp, *self._tcp))

    async def adopt(self, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]) -> None:
        """Answer on these as well."""
        async with self._starting:
            self._udp, self._tcp = (*self._udp, *udp), (*self._tcp, *tcp)
            more = [Datagrams(sock) for sock in udp]
            self._datagrams += more
            if self._started:
                await self._listen(more, tcp)

    async def enter(
        self, key: bytes, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]
    ) -> None:
        """Answer on these sockets too, where whoever asks is `key`, whatever its address."""
        # They listen already, and what comes before the start waits in the kernel.
        servers = [
            await asyncio.start_server(
                functools.partial(self._converse, key=key), sock=sock, start_serving=False
            )
            for sock in tcp
        ]
        room = self._rooms[key] = _Room([Datagrams(sock) for sock in udp], servers, set())
        async with self._starting:
            if self._started:
                await self._listen_in(key, room)

    async def _listen_in(self, key: bytes, room: _Room) -> None:
        """Read there, unless it is left: before, or while this waits."""
        loop = asyncio.get_running_loop()
        if self._rooms.get(key) is not room:
            return
        for datagrams in room.udp:
            loop.add_reader(datagrams.sock, self._drain, datagrams, key)
        for server in room.tcp:
            if self._rooms.get(key) is room:
                await server.start_serving()

    def leave(self, key: bytes) -> None:
        """Answer there no more: sockets and connections are closed, for they hold the sandbox."""
        room = self._rooms.pop(key, None)
        if room is None:
            return
        self._finish(room.udp, key)
        for datagrams in room.udp:
            asyncio.get_running_loop().remove_reader(datagrams.sock)
            datagrams.sock.close()
        for server in room.tcp:
            server.close()
        for writer in room.connections:
            writer.transport.abort()

    def _finish(self, udp: Sequence[Datagrams], key: bytes = b"") -> None:
        """Answer what has come there; what comes from now on is another's who listens there too.

        With a socket that is just closed the questions in it would be lost.
        """
        if not self._started:
            return
        for datagrams in udp:
            with contextlib.suppress(OSError):  # without a route to ourselves the others get less
                # Of several sockets on a port the kernel deals out nothing to those that are
                # connected: net/core/sock_reuseport.c, reuseport_select_sock_by_hash.
                datagrams.sock.connect(datagrams.sock.getsockname())
            for _ in range(READS_AT_END):
                before = self._counters["udp"]
                self._read(datagrams, key)
                while self._waiting:
                    self._serve()
                if before == self._counters["udp"]:
                    break

    async def close(self) -> None:
        """Answer what has come, and stop; what waits for an upstream gets no answer."""
        loop = asyncio.get_running_loop()
        self._finish(self._datagrams)
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
            self._counters["malformed"] += 1
            return asked
        question = asked.question
        try:
            view = self._names.view(source)
            key = wire[2:]
            turn = self._table.turn(view, key)
            if turn is None:
                turn = self._turns.get(question, 0)
            answer = self._names.answer(question, view, turn)
            self._counters[answer.kind.value] += 1
            several = len(answer.records)
            if several > 1:
                if len(self._turns) >= _TURNS_MAX:
                    self._turns.clear()
                self._turns[question] = turn + 1
            if answer.kind is Kind.REFUSED:
                return failure(asked, dns.rcode.REFUSED)
            if answer.kind is not Kind.FORWARD:
                made = build(asked, answer)
                if asked.plain and udp and view and several <= TURNS_MAX:
                    kind = _NUMBERS[answer.kind]
                    self._table.put(source, view, question, key, made[2:], kind, max(several, 1))
                    self._fresh += 1
                    if self._fresh >= GATHERED:
                        self._gather()
                return made
        except Exception:
            # One question must not end the process that all sandboxes of the host ask.
            self._counters["errors"] += 1
            _log.exception("question", extra={"fields": {"labels": list(question.labels)}})
            return failure(asked, dns.rcode.SERVFAIL)
        kept = self._forwarder.kept(asked)
        if kept is not None:
            return kept
        if not self._forwarder.admit(source):
            return failure(asked, dns.rcode.SERVFAIL)
        return asked

    def _gather(self) -> None:
        """Have the table's memory in huge pages, if the kernel can, without waiting for it."""
        last = self._gathering
        if last is not None and not (last.done() and last.result()):
            return
        self._fresh = 0
        loop = asyncio.get_running_loop()
        self._gathering = loop.run_in_executor(None, hugepages.gather)

    async def _forward(self, asked: Asked) -> bytes:
        """The wire form of an answer from upstream, or SERVFAIL."""
        try:
            wire = await self._forwarder.answer(asked)
        except Exception:
            self._counters["errors"] += 1
            _log.exception("forward", extra={"fields": {"labels": list(asked.question.labels)}})
            wire = None
        return wire if wire is not None else failure(asked, dns.rcode.SERVFAIL)

    def _drain(self, datagrams: Datagrams, key: bytes = b"") -> None:
        started = time.perf_counter_ns()
        self._read(datagrams, key)
        self._busy_ns += time.perf_counter_ns() - started

    def _go_on(self) -> None:
        started = time.perf_counter_ns()
        self._serve()
        self._busy_ns += time.perf_counter_ns() - started

    def _read(self, datagrams: Datagrams, key: bytes) -> None:
        by_source = self._table.by_source
        ready = _Same(by_source.get(key)) if key else by_source
        for _ in range(READS_IN_ROOM if key else READS_PER_WAKEUP):
            try:
                count, others = datagrams.serve(ready, self._counts)
            except OSError as error:
                _log.error("receive", extra={"fields": {"error": str(error)}})
                return
            if not count:
                return
            self._counters["udp"] += count
            for datagram in others:
                if key:
                    datagram = datagram._replace(source=key)
                if not self._waiting.put(datagram.source, (datagrams.sock, datagram)):
                    self._counters["flooded"] += 1
            if others:
                if self._turn is None:
                    self._serve()
                return

    def _serve(self) -> None:
        """Answer some of those that wait; if more do, go on when the loop comes round."""
        self._turn = None
        for _ in range(ANSWERS_PER_WAKEUP):
            if not self._waiting:
                return
            sock, datagram = self._waiting.take()
            reply = self._reply(datagram.wire, datagram.source, udp=True)
            if isinstance(reply, Asked):
                self._spawn(self._forward_udp(sock, reply, datagram), datagram.source)
            elif reply is not None:
                self._send(sock, reply, datagram)
        if self._waiting:
            self._turn = asyncio.get_running_loop().call_soon(self._go_on)

    async def _forward_udp(self, sock: socket.socket, asked: Asked, datagram: Datagram) -> None:
        self._send(sock, await self._forward(asked), datagram)

    def _send(self, sock: socket.socket, wire: bytes, datagram: Datagram) -> None:
        try:
            sock.sendmsg([wire], datagram.ancillary, 0, datagram.peer)
        except OSError:
            # A full queue, a gateway that is gone, port 0: a datagram may be lost at any time.
            self._counters["unsent"] += 1

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes = b""
    ) -> None:
        """One TCP connection, until the asker ends it, stays idle or misbehaves.

        With a `key`, it is in that sandbox.
        """
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        room = self._rooms.get(key)
        if room:
            room.connections.add(writer)
        try:
            source = key or source_address(writer.get_extra_info("peername"))
            full = self._connections.total() >= CONNECTIONS_MAX
            if full or self._connections[source] >= CONNECTIONS_PER_SOURCE_MAX:
                self._counters["connections_refused"] += 1
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
            if room:
                room.connections.discard(writer)
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
                self._counters["tcp"] += 1
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
