"""The agent's half of the feed: finds or starts the name server and keeps it up to date.

`send` only notes what changed; one task at a time writes it, in pieces, so that neither the
caller nor the agent's loop ever waits for the resolver. When the connection breaks, it finds
or starts the resolver again and feeds it `snapshot()`.
What stands opposite: intake.py, in the other process.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.errors import Unavailable, from_code
from agent.resolver import feed
from agent.resolver.launch import LOG, last_words, spawn
from agent.syscalls import start_time

OPEN_SECONDS = 10.0  # to find or start it; a start takes 0.3
GREET_SECONDS = 3.0
FIRST_FEED_SECONDS = 30.0  # 100,000 names take less than one
QUERY_SECONDS = 6.0  # an upstream has 4.5
STOP_SECONDS = 5.0
PENDING_ROWS_MAX = 50_000  # if it lags so far behind, a full state is less than the changes
_STREAM_BYTES = 1 << 20
_POLL_SECONDS = 0.02
_BACKOFF_SECONDS = (0.05, 5.0)  # first and longest pause between attempts to come back

_log = logging.getLogger("vxmesh.resolver.client")

T = TypeVar("T")


class _Connection:
    """An open connection whose greeting was accepted."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.pid = pid

    async def write(self, messages: Iterable[feed.ToResolver]) -> None:
        """Write frame by frame; others of the loop have their turn after each."""
        for message in messages:
            self.writer.write(feed.frame(message))
            await self.writer.drain()
            await asyncio.sleep(0)


class ResolverClient:
    """Keeps the name server of this host fed.

    `run_dir` holds its socket, lock and log; `netns` is the path of the namespace where it
    listens (None: our own), on `listen` (none: port 53 of all addresses), and `workers` how many
    processes it has. `snapshot` returns the whole state at that moment, in sequences that do not
    change afterwards.
    """

    def __init__(
        self,
        run_dir: Path,
        netns: str | None,
        snapshot: Callable[[], feed.State],
        listen: Sequence[str] = (),
        resolv_conf: str = "/etc/resolv.conf",
        workers: int = 1,
    ) -> None:
        self._run_dir = run_dir
        self._netns = netns
        self._snapshot = snapshot
        self._listen = tuple(listen)
        self._resolv_conf = resolv_conf
        self._workers = workers
        self._pending = feed.Batch()
        self._replacement: feed.State | None = None
        self._whole = True  # the next thing to write is a full state
        self._wake = asyncio.Event()
        self._asked = 0  # changes asked for so far, the number of the last
        self._applied = 0  # the last that the resolver confirmed
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[feed.Verdict | feed.Stats]] = {}
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None  # the one that we started, if any

    @property
    def pid(self) -> int:
        """Process id of the resolver; 0 while there is no connection to one."""
        return self._connection.pid if self._connection is not None else 0

    async def connect_or_spawn(self) -> None:
        """Find the resolver or start one, and feed it; returns when it has the whole state.

        From then on it is kept: found or started again whenever it is lost. Raises Unavailable
        if it cannot be had, with the reason that it gave; nothing goes on then.
        """
        connection = await self._open()
        self._stopping = False
        self._asked += 1
        self._task = asyncio.create_task(self._keep(connection), name="resolver-feed")
        try:
            async with asyncio.timeout(FIRST_FEED_SECONDS):
                await self.flush()
        except TimeoutError:
            await self.close()
            raise Unavailable(
                "name server", "it does not take the state", f"See {self._run_dir / LOG}"
            ) from None

    async def replace(self, state: feed.State) -> None:
        """Feed `state` in place of all that was sent so far; returns when it is in force.

        Names resolve from the old state until then. Changes sent meanwhile come after it. If
        there is no connection now, what `snapshot` gives then is taken instead.
        """
        self._replacement = state
        self._whole = True
        self._pending = feed.Batch()
        self._asked += 1
        self._wake.set()
        await self.flush()

    def send(self, batch: feed.Batch) -> None:
        """Note changes, to be written soon. Never waits, and never holds on to `batch`.

        `snapshot` must tell of them already: it may be called at any time after this.
        """
        self._asked += 1
        if self._connection is None or (self._whole and self._replacement is None):
            return  # a snapshot is still to be taken, and will have this in it
        self._pending.merge(batch)
        if len(self._pending) > PENDING_ROWS_MAX:
            _log.warning("name server lags: feeding it anew")
            self._pending = feed.Batch()
            self._replacement = None
            self._whole = True
        self._wake.set()

    async def flush(self) -> None:
        """Wait until all that was sent so far is in force."""
        if self._applied >= self._asked:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[done] = self._asked
        try:
            await done
        finally:
            self._waiting.pop(done, None)

    async def query(
        self,
        name: str,
        type: str = "A",
        address: bytes = b"",
        networks: tuple[str, ...] = (),
    ) -> feed.Verdict:
        """What the resolver would answer, and why: to `address` or, if empty, in `networks`.

        Raises Invalid for what is no name or type, Unavailable if the resolver does not answer.
        """
        query = feed.Query(next(self._ids), name, type, address, networks)
        verdict = await self._ask(query, feed.Verdict)
        if verdict.error is not None:
            raise from_code(*verdict.error)
        return verdict

    async def stats(self) -> feed.Stats:
        """Counters of the resolver; Unavailable if it does not answer."""
        return await self._ask(feed.StatsQuery(next(self._ids)), feed.Stats)

    async def stop(self) -> None:
        """End the resolver and this client. Names no longer resolve on this host."""
        self._stopping = True
        connection = self._connection
        if connection is None:
            await self.close()
            try:
                connection = await self._connect(self._setup())
            except (OSError, EOFError, ValueError, msgspec.MsgspecError):
                return  # there is none, or nothing that it could belong to
        if connection is not None:
            started = start_time(connection.pid)
            connection.writer.write(feed.frame(feed.Stop()))
            deadline = asyncio.get_running_loop().time() + STOP_SECONDS
            while started and start_time(connection.pid) == started:
                if asyncio.get_running_loop().time() > deadline:
                    _log.warning("name server %d does not end", connection.pid)
                    break
                await asyncio.sleep(_POLL_SECONDS)
            connection.writer.close()
        await self.close()
        if self._process is not None and self._process.poll() is not None:
            self._process = None

    async def close(self) -> None:
        """End this client; the resolver goes on with what it has."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for future in self._waiting:
            if not future.done():
                future.set_exception(Unavailable("name server", "the agent is ending"))

    async def _ask(self, query: feed.Query | feed.StatsQuery, kind: type[T]) -> T:
        what = "name server"
        if self._connection is None:
            raise Unavailable(what, "it is not connected", "Try again in a second")
        reply: asyncio.Future[feed.Verdict | feed.Stats]
        reply = asyncio.get_running_loop().create_future()
        self._replies[query.id] = reply
        try:
            self._connection.writer.write(feed.frame(query))
            async with asyncio.timeout(QUERY_SECONDS):
                answer = await reply
        except (OSError, EOFError):
            raise Unavailable(what, "it does not answer", "Try again in a second") from None
        finally:
            del self._replies[query.id]
        assert isinstance(answer, kind)
        return answer

    async def _keep(self, connection: _Connection) -> None:
        """Feed one connection after the other until cancelled."""
        pause = _BACKOFF_SECONDS[0]
        while True:
            started = asyncio.get_running_loop().time()
            try:
                await self._session(connection)
            except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
                if self._stopping:
                    return
                _log.warning("name server lost: %s", error)
            except Exception:
                # Such as a snapshot that fails: names must not stay stale for ever after it.
                _log.exception("name server not fed")
            if asyncio.get_running_loop().time() - started > _BACKOFF_SECONDS[1]:
                pause = _BACKOFF_SECONDS[0]
            while True:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _BACKOFF_SECONDS[1])
                try:
                    connection = await self._open()
                    break
                except Unavailable as error:
                    _log.error("%s", error)

    async def _session(self, connection: _Connection) -> None:
        self._connection = connection
        self._whole, self._replacement, self._pending = True, None, feed.Batch()
        self._wake.set()
        reading = asyncio.create_task(self._read(connection), name="resolver-replies")
        writing = asyncio.create_task(self._write(connection), name="resolver-changes")
        try:
            done, _ = await asyncio.wait((reading, writing), return_when="FIRST_COMPLETED")
            for task in done:
                task.result()
        finally:
            self._connection = None
            self._asked += 1  # the state that the next one is to get: `flush` waits for it
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
            connection.writer.close()
            for reply in self._replies.values():
                if not reply.done():
                    reply.set_exception(EOFError("connection lost"))

    async def _read(self, connection: _Connection) -> None:
        while True:
            message = feed.to_agent_decoder.decode(await feed.read_frame(connection.reader))
            if isinstance(message, feed.Done):
                self._applied = max(self._applied, message.seq)
                for future, number in list(self._waiting.items()):
                    if number <= self._applied and not future.done():
                        future.set_result(None)
            elif isinstance(message, feed.Verdict | feed.Stats):
                reply = self._replies.get(message.id)
                if reply is not None and not reply.done():
                    reply.set_result(message)
            else:
                raise ValueError("a second welcome")

    async def _write(self, connection: _Connection) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            number = self._asked
            if self._whole:
                # From taking the state to clearing the flag nothing waits: what changes later
                # is sent later, and nothing is lost between.
                state = self._replacement if self._replacement is not None else self._snapshot()
                self._replacement, self._whole = None, False
                # What was sent after an explicit state was given is not in it.
                batch, self._pending = self._pending, feed.Batch()
                await connection.write([feed.Reset()])
                await connection.write(feed.state_changes(state))
                await connection.write(batch.changes())
                await connection.write([feed.Commit(number)])
            else:
                batch, self._pending = self._pending, feed.Batch()
                await connection.write(batch.changes())
                await connection.write([feed.Changes(seq=number)])

    async def _open(self) -> _Connection:
        """A greeted connection: to the resolver that runs or, if none fits, to a new one."""
        try:
            setup = self._setup()
        except OSError as error:
            raise Unavailable(
                "name server", str(error), "Start the agent, which makes it"
            ) from None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + OPEN_SECONDS
        reason = "it did not listen in time"
        while loop.time() < deadline:
            try:
                connection = await self._connect(setup)
                if connection is not None:
                    return connection
            except (FileNotFoundError, ConnectionRefusedError):
                status = self._process.poll() if self._process is not None else 0
                if status not in (None, 0, feed.EXIT_LOCKED):
                    self._process = None
                    reason = last_words(self._run_dir) or f"it ended with status {status}"
                    break
                if status is not None:
                    self._process = self._spawn()
            except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
                reason = f"what listens does not greet: {str(error) or 'no answer'}"
            await asyncio.sleep(_POLL_SECONDS)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()  # it is of no use, and nothing half made is to be left
        raise Unavailable("name server", reason, f"See {self._run_dir / LOG}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            return spawn(self._run_dir, self._netns, self._listen, self._resolv_conf, self._workers)
        except OSError as error:
            raise Unavailable("name server", f"it cannot be started: {error}") from error

    def _setup(self) -> str:
        return feed.setup_of(self._listen, self._netns, self._workers)

    async def _connect(self, setup: str) -> _Connection | None:
        """A greeted connection to the resolver that runs; None if it does not fit and ended."""
        reader, writer = await asyncio.open_unix_connection(
            str(self._run_dir / feed.SOCKET), limit=_STREAM_BYTES
        )
        accepted = False
        try:
            async with asyncio.timeout(GREET_SECONDS):
                writer.write(feed.frame(feed.Hello(feed.PROTOCOL, setup)))
                await writer.drain()
                welcome = feed.to_agent_decoder.decode(await feed.read_frame(reader))
                if not isinstance(welcome, feed.Welcome):
                    raise ValueError("no welcome")
                accepted = welcome.accepted
                if accepted:
                    return _Connection(reader, writer, welcome.pid)
                _log.info("name server %d is of another setup and ends", welcome.pid)
                await reader.read()
                return None
        finally:
            if not accepted:
                writer.close()
