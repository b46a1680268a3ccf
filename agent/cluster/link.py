"""A session on a real stream: the one thin piece of asyncio around core/session.py."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterable, Awaitable, Callable

import structlog

from agent.cluster.codec import Encoder, Rumours, decode
from agent.core.plumtree import Mesh
from agent.core.session import Hello, Message, Session, Store
from agent.errors import Unavailable, VxmeshError
from agent.notation import shorten

log = structlog.get_logger()

STALE = 1.5  # s; a digest missed: another stream is tried, and takes this one's place
SILENCE = 3.0  # s; three digests missed: the stream is dead even if TCP has not noticed
WATCH_INTERVAL = 0.25  # s; how late a silent stream may be ended
HELLO_WITHIN = 3.0  # s; for the peer to say who it is

Write = Callable[[bytes], Awaitable[None]]


class Impostor(VxmeshError):
    """The peer says that it is another node than its certificate names."""

    def __init__(self, claimed: str) -> None:
        super().__init__("peer", f"says that it is {shorten(claimed)}, which it is not")
        self.claimed = claimed


class Link:
    """One stream to one peer. `dialer` is the id of the node that opened it."""

    def __init__(
        self,
        store: Store,
        hello: Hello,
        encoder: Encoder,
        mesh: Mesh,
        heard: Callable[[str, Message | Rumours], None],
        dialed: bool,
        expected: str,
    ) -> None:
        """`heard` is given the peer's id and each message, once the session has taken it.

        `expected` is the id of the node on the other side, by its certificate.
        """
        self.dialed = dialed
        self.expected = expected
        self.me = hello.node
        self.session = Session(store, hello, random.Random(), time.monotonic(), mesh)
        self.closed = asyncio.Event()  # told to end
        self.ended = asyncio.Event()  # and out of the table of streams
        self.stale = asyncio.Event()  # silent for `STALE`, doubted, or ended: see `until_stale`
        self.greeted = asyncio.Event()
        self._doubted = -1.0  # when somebody said that it may be of no use
        self._encoder = encoder
        self._heard = heard
        self._wake = asyncio.Event()
        self._posted: list[bytes] = []

    @property
    def last_heard(self) -> float:
        """When the peer's last message came, on the monotonic clock."""
        return self.session.heard

    def post(self, data: bytes) -> None:
        """Send an encoded message that is none of the session's, before those that are."""
        self._posted.append(data)
        self._wake.set()

    @property
    def is_stale(self) -> bool:
        """Whether nothing has come for `STALE`, or since it was doubted."""
        heard = self.session.heard
        return time.monotonic() - heard > STALE or heard < self._doubted

    async def until_stale(self) -> None:
        """Return when nothing has come for `STALE`, or the stream has ended."""
        if not self.is_stale and not self.ended.is_set():
            # It was silent or doubted, and something came since; `_watch` sees that up to `STALE`
            # later. Who waits in a loop for what is set would keep the loop from ever hearing more.
            self.stale.clear()
        await self.stale.wait()

    def doubt(self) -> None:
        """The network was away: what TCP still has to send may wait for a long timer."""
        self._doubted = time.monotonic()
        self.stale.set()

    @property
    def peer(self) -> str:
        """The peer's node id; empty before its Hello."""
        return self.session.peer.node if self.session.peer else ""

    @property
    def dialer(self) -> str:
        """The id of the node that opened the stream."""
        return self.me if self.dialed else self.peer

    def wake(self) -> None:
        """Something may have to be sent."""
        self._wake.set()

    def close(self) -> None:
        """End `run` soon."""
        self.closed.set()
        self._wake.set()

    async def run(
        self, read: AsyncIterable[bytes], write: Write, greeted: Callable[[Link], bool]
    ) -> None:
        """Carry messages until the stream ends, is closed, or falls silent.

        `greeted` is called once the peer has said who it is; it says whether to go on. Impostor
        if it is not.
        """
        tasks = [
            asyncio.ensure_future(self._read(read, greeted)),
            asyncio.ensure_future(self._write(write)),
            asyncio.ensure_future(self.closed.wait()),
            asyncio.ensure_future(self._watch()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Impostor:
            raise
        except VxmeshError as error:
            log.warning("peer.refused", peer=self.peer, error=str(error))
        except Exception as error:
            if type(error).__module__.startswith("grpc"):
                raise  # the stream's own end
            log.exception("peer.failed", peer=self.peer, error=repr(error))
        finally:
            self.closed.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, read: AsyncIterable[bytes], greeted: Callable[[Link], bool]) -> None:
        async for data in read:
            message = decode(data)
            if isinstance(message, Hello):
                if message.node != self.expected:
                    raise Impostor(message.node)
                if self.greeted.is_set():
                    raise Unavailable("peer", "says twice who it is", "")
            elif not self.greeted.is_set():
                # Before anything of it is taken in.
                raise Unavailable("peer", "did not say who it is", "")
            if isinstance(message, Rumours):
                self.session.heard = time.monotonic()
            else:
                self.session.receive(message, time.monotonic())
            self._heard(self.peer, message)
            if not self.greeted.is_set():
                self.greeted.set()
                if not greeted(self):
                    return
            self._wake.set()

    async def _write(self, write: Write) -> None:
        while True:
            self._wake.clear()
            now = time.monotonic()
            for message in self.session.to_send(now):
                await write(self._encoder.encode(message))
                while self._posted and self.greeted.is_set():
                    await write(self._posted.pop(0))
            while self._posted and self.greeted.is_set():
                await write(self._posted.pop(0))
            wait = max(0.0, self.session.next_timer() - time.monotonic())
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with
            # what it waits for, as `close` has it, and the stream would never end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait, SILENCE)):
                    await self._wake.wait()

    async def _watch(self) -> None:
        """End a silent stream; apart from the writer, which a dead peer can hold up for ever."""
        started = time.monotonic()
        while True:
            now = time.monotonic()
            if now - self.session.heard > SILENCE:
                raise Unavailable("peer", f"has been silent for {SILENCE:.0f} s", "")
            if not self.greeted.is_set() and now - started > HELLO_WITHIN:
                raise Unavailable("peer", "did not say who it is", "")
            if self.is_stale:
                self.stale.set()
            else:
                self.stale.clear()
            wait = WATCH_INTERVAL
            if self.greeted.is_set() and not self.is_stale:  # what comes only puts it off
                wait = max(self.session.heard + STALE - now, 0.001)
            await asyncio.sleep(wait)
