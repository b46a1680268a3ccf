"""One stream between two nodes, as a state machine: what to send, and when.

PURE: messages go in with the time, messages come out; the socket is somebody else's
(cluster/link.py), and so is the clock (the simulation has its own). Each side

* pushes what its own origin writes as soon as it is published, from a cursor that moves on
  with each delta sent, so that many small writes leave as one batch and nothing is queued;
* tells its digest every `digest_interval`; what the peer turns out to lack is repaired from
  there. Third nodes' records are relayed when the stream opens, and later only if the peer
  has stood still on that origin for a whole interval, because their own node pushes them;
* says up to which version of the peer's origin its kernel is right (`Applied`).

The stream may lose, double or reorder messages: a delta that does not fit is left, and the
next digest makes up for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from agent.core.replica import Delta, Record

DIGEST_INTERVAL = 1.0  # s; the price of a missed push is this long, of halving it a digest more
# A cursor may be ahead of the peer because data is on its way; past this it is lost.
REPAIR_AFTER = 2.0  # s; longer than one full batch needs on a slow link
BATCH = 1000  # records a delta; 421,000 records/s at 100 a message, little gained above 1,000


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of each side."""

    node: str
    boot: str
    version: str
    name: str


@dataclass(frozen=True, slots=True)
class Digest:
    """Origin -> (version, floor), and three clocks for the round trip time."""

    entries: dict[str, tuple[int, int]]
    time: float = 0.0
    echo: float = 0.0
    held: float = 0.0


@dataclass(frozen=True, slots=True)
class Applied:
    """The sender's kernel has the receiver's records up to `version`."""

    version: int


Message = Hello | Digest | Delta | Applied


class Store(Protocol):
    """What a session needs of the node that it speaks for."""

    me: str

    def digest(self) -> dict[str, tuple[int, int]]: ...

    def version(self, origin: str) -> int: ...

    def floor(self, origin: str) -> int: ...

    def since(self, origin: str, version: int) -> list[Record]: ...

    def merge(self, delta: Delta) -> bool:
        """Take it in; False if something before it is missing."""

    def seen(self, peer: str, entries: dict[str, tuple[int, int]]) -> None:
        """A peer told its digest."""

    def applied(self, origin: str) -> int:
        """Up to which version of `origin` our kernel is right."""


@dataclass(slots=True)
class _Cursor:
    """How far we have told the peer of one origin."""

    sent: int  # everything up to here has been sent
    pushed: float = float("-inf")  # when something was sent last
    told: int = -1  # what the peer's last digest said
    due: bool = False  # a third node's records: relay them
    reset: bool = False  # we are in the midst of sending a whole state


class Session:
    """Our end of a stream to one peer."""

    def __init__(self, store: Store, hello: Hello, rng: random.Random, now: float) -> None:
        self.store = store
        self.peer: Hello | None = None
        self.heard = now  # when the last message came
        self.rtt: float | None = None  # s, smoothed as in RFC 6298
        self.peer_applied = 0  # of our own origin
        self.peer_version = -1  # of its own origin, as its last digest told
        self._out: list[Message] = [hello]
        self._rng = rng
        self._cursors: dict[str, _Cursor] = {}
        self._introduced = False  # the peer's first digest has come
        self._applied_told = 0
        self._next_digest = now
        self._now = now  # the latest that we were told, also while `to_send` is held up
        self._echo: tuple[float, float] = (0.0, 0.0)  # the peer's clock, and ours when it came

    def receive(self, message: Message, now: float) -> None:
        """Take one message of the peer."""
        self.heard = self._now = now
        match message:
            case Hello():
                self.peer = message
            case Delta():
                if not self.store.merge(message) and message.upto > self.store.version(
                    message.origin
                ):
                    self._next_digest = min(self._next_digest, now + DIGEST_INTERVAL / 10)
            case Applied():
                self.peer_applied = max(self.peer_applied, message.version)
            case Digest():
                self._take_digest(message, now)

    def _take_digest(self, digest: Digest, now: float) -> None:
        self._echo = (digest.time, now)
        if digest.echo:
            sample = max(0.0, now - digest.echo - digest.held)
            self.rtt = sample if self.rtt is None else self.rtt + (sample - self.rtt) / 8
        if self.peer:
            self.peer_version = digest.entries.get(self.peer.node, (0, 0))[0]
            self.store.seen(self.peer.node, digest.entries)
        for origin in self.store.digest():
            told = digest.entries.get(origin, (0, 0))[0]
            cursor = self._cursors.get(origin)
            if cursor is None:
                cursor = self._cursors[origin] = _Cursor(sent=told, due=not self._introduced)
            else:
                self._compare(cursor, told, now)
                if cursor.sent == told < self.store.version(origin) and told == cursor.told:
                    cursor.due = True
            cursor.told = told
        self._introduced = True

    @staticmethod
    def _compare(cursor: _Cursor, told: int, now: float) -> None:
        ahead = told > cursor.sent  # it heard it from another
        lost = told == cursor.told and now - cursor.pushed > REPAIR_AFTER
        if ahead or (lost and told < cursor.sent):
            cursor.sent, cursor.reset = told, False

    def to_send(self, now: float) -> Iterator[Message]:
        """What should go out now, a piece at a time; may be left off and asked for again."""
        self._now = now
        while self._out:
            yield self._out.pop(0)
        if now >= self._next_digest:
            self._next_digest = now + DIGEST_INTERVAL * self._rng.uniform(0.9, 1.1)
            theirs, came = self._echo
            yield Digest(self.store.digest(), now, theirs, now - came if theirs else 0.0)
        yield from self._applied()
        if not self._introduced:
            return
        for origin in [self.store.me, *self._cursors]:
            cursor = self._cursors.setdefault(origin, _Cursor(sent=0))
            wanted = origin == self.store.me or cursor.due
            if wanted and cursor.sent < self.store.version(origin):
                yield from self._push(origin, cursor)
            cursor.due = False

    def _applied(self) -> Iterator[Message]:
        if self.peer:
            version = self.store.applied(self.peer.node)
            if version > self._applied_told:
                self._applied_told = version
                yield Applied(version)

    def _push(self, origin: str, cursor: _Cursor) -> Iterator[Message]:
        floor = self.store.floor(origin)
        if 0 < cursor.sent < floor and not cursor.reset:
            cursor.sent, cursor.reset = 0, True
        target = self.store.version(origin)
        records = self.store.since(origin, cursor.sent)
        sent = cursor.sent
        for start in range(0, max(1, len(records)), BATCH):
            if cursor.sent != sent:
                return  # a digest that came while we waited set it anew: begin there
            batch = records[start : start + BATCH]
            last = start + BATCH >= len(records)
            upto = target if last else batch[-1].version
            base, cursor.pushed = sent, self._now
            sent = cursor.sent = upto
            reset = cursor.reset
            if last:
                cursor.reset = False
            yield Delta(origin, base, upto, batch, floor, reset, reset and last)

    def next_timer(self) -> float:
        """When `to_send` should be asked again though nothing has happened."""
        return self._next_digest
