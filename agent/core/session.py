"""One stream between two nodes, as a state machine: what to send, and when.

PURE: messages go in with the time, messages come out; the socket is somebody else's
(cluster/link.py), and so is the clock (the simulation has its own). Each side

* pushes what its own origin writes as soon as it is published, from a cursor that moves on
  with each delta sent, so that many small writes leave as one batch and nothing is queued;
* passes on what came of others as core/plumtree.py says: at once where the stream is eager for
  that origin, by saying so where it is lazy, not at all where everyone has a stream to everyone;
* tells what it has every `DIGEST_INTERVAL`: a digest, or its summary where nodes are many, and
  then the entries of the buckets that differed twice. **Who lacks something asks for it**, be it
  from a digest, a `Have` or a delta that does not fit, once it had time to come by itself;
* says up to which version of the peer's origin its kernel is right (`Applied`), and what its
  side has seen of each origin (core/stability.py).

What the peer sent or told to have is never sent to it, so a record crosses a stream once, but
for the two that meet on the way. The stream may lose, double or reorder messages: a delta that
does not fit is left, and the next digest makes up for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from agent.core.plumtree import (
    GRAFT_AFTER,
    GRAFT_RETRY,
    GRAFT_TRIES,
    HAVE_DELAY,
    Graft,
    Have,
    Mesh,
    Prune,
)
from agent.core.replica import ORIGINS_MAX, Delta, Record
from agent.core.stability import Seen
from agent.core.summary import Summary, bucket, differing
from agent.errors import Invalid

DIGEST_INTERVAL = 1.0  # s; the price of a missed push is this long, of halving it a digest more
BATCH = 1000  # records a delta; 421,000 records/s at 100 a message, little gained above 1,000
# Values a delta, but for the last record: with the largest records it must fit what a peer takes
# in one message (16 MiB, cluster/server.py), or it would never take anything of ours again.
BATCH_BYTES = 4 << 20
DOUBT_EVERY = 10.0  # s; so long a whole state may take before it is asked for again
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of each side."""

    node: str
    boot: str
    version: str
    name: str


@dataclass(frozen=True, slots=True)
class Digest:
    """Origin -> (version, floor), and three clocks for the round trip time.

    With `buckets` (bits) it has only the origins that fall into those, see core/summary.py.
    """

    entries: dict[str, tuple[int, int]]
    time: float = 0.0
    echo: float = 0.0
    held: float = 0.0
    buckets: int = 0


@dataclass(frozen=True, slots=True)
class Applied:
    """The sender's kernel has the receiver's records up to `version`; or with `withholds` all of
    them but what concerns some networks, in whose way something is."""

    version: int
    withholds: bool = False


Message = Hello | Digest | Delta | Applied | Summary | Have | Graft | Prune | Seen


class Store(Protocol):
    """What a session needs of the node that it speaks for."""

    me: str

    def digest(self) -> dict[str, tuple[int, int]]: ...

    def version(self, origin: str) -> int: ...

    def floor(self, origin: str) -> int: ...

    def since(self, origin: str, version: int) -> list[Record]: ...

    def merge(self, delta: Delta, sender: str) -> bool:
        """Take in what a peer sent; False if something before it is missing. Unproven ends the
        stream."""

    def prove(self, delta: Delta, introduce: bool) -> bool:
        """Add its seals to a delta, maybe shortening it; see Replica.prove."""

    def seen(self, peer: str, entries: dict[str, tuple[int, int]]) -> None:
        """A peer told its digest, or a part of it."""

    def stable(self, version: int) -> None:
        """Every live node has our own records up to `version`."""

    def applied(self, origin: str) -> int:
        """Up to which version of `origin` our kernel is right."""

    def withholds(self) -> bool:
        """Whether there are networks for which it is not, all the same."""

    def is_doubted(self, origin: str) -> bool:
        """Whether only `origin` itself can say what it holds; see Replica.doubted."""

    def is_heard(self, origin: str) -> bool:
        """Whether records of `origin` are taken: those of a removed node are not."""


@dataclass(slots=True)
class _Cursor:
    """How it stands with one origin on this stream."""

    sent: int = 0  # the peer has everything up to here, or it is on its way to it
    eager: bool | None = None  # pushed at once, or not; None: neither end has asked yet
    reset: bool = False  # we are in the midst of sending a whole state
    introduced: bool = False  # the peer has been shown the origin's certificate


@dataclass(slots=True)
class _Wanted:
    """What the peer has of an origin and we lack."""

    version: int
    due: float  # when to ask for it
    tries: int = 0


class Session:
    """Our end of a stream to one peer. `mesh` is shared by all sessions of a node."""

    def __init__(
        self, store: Store, hello: Hello, rng: random.Random, now: float, mesh: Mesh | None = None
    ) -> None:
        self.store = store
        self.peer: Hello | None = None
        self.heard = now  # when the last message came
        self.rtt: float | None = None  # s, smoothed as in RFC 6298
        self.peer_applied = 0  # of our own origin
        self.peer_withholds = False
        self.pending = False  # `to_send` has something since it was last asked
        self._mesh = mesh or Mesh(store.me)
        self._out: list[Message] = [hello]
        self._rng = rng
        self._cursors: dict[str, _Cursor] = {store.me: _Cursor()}
        self._introduced = False  # the peer's first digest has come
        self._opening: dict[str, int] = {}  # what that told and we still lack
        self._applied_told = (0, False)
        self._next_digest = now
        self._is_told = False  # the peer got our whole digest
        self._echo: tuple[float, float] = (0.0, 0.0)  # the peer's clock, and ours when it came
        self._differed = 0  # buckets that its last summary did not share
        self._asked = 0  # buckets whose digest it is to be told
        # In the order in which they came, so that a simulation replays.
        self._dirty: dict[str, None] = {}  # origins to be pushed
        self._lazy: dict[str, None] = {}  # origins to be told of in a `Have` ...
        self._have_at = NEVER  # ... by then
        self._pruned: dict[str, None] = {}  # origins to be told of in a `Prune`
        self._wanted: dict[str, _Wanted] = {}
        self._graft_at = NEVER
        self._doubted_at = -NEVER  # when the peer was last asked for all of its own

    @property
    def missing(self) -> int:
        """How many versions of what the peer had when the stream opened are not here yet;
        -1 as long as it has not told."""
        if not self._introduced:
            return -1
        lacking = {o: v - self.store.version(o) for o, v in self._opening.items()}
        self._opening = {
            o: v for o, v in self._opening.items() if lacking[o] > 0 and self.store.is_heard(o)
        }
        return sum(lacking[origin] for origin in self._opening)

    def note(self, origin: str, now: float) -> None:
        """Something new of a third node is here, from another stream."""
        if self._is_peer(origin):
            return
        cursor = self._cursors.get(origin)
        relays = self._mesh.relays()
        if relays if cursor is None or cursor.eager is None else cursor.eager:
            self._dirty[origin] = None
            self.pending = True
        elif relays or cursor is None:  # where all have streams: a node that the peer may not know
            self._lazy[origin] = None
            if self._have_at == NEVER:
                self._have_at = now + HAVE_DELAY * self._rng.uniform(0.5, 1.5)
                self.pending = True

    # -- what comes --

    def receive(self, message: Message, now: float) -> None:
        """Take one message of the peer."""
        self.heard = now
        match message:
            case Hello():
                if self.peer and self.peer.node != message.node:
                    raise Invalid("peer", "says that it is another node now")
                self.peer = message
            case Delta():
                self._take_delta(message, now)
            case Applied():
                self.peer_applied = max(self.peer_applied, message.version)
                self.peer_withholds = message.withholds
            case Digest():
                self._take_digest(message, now)
            case Summary():
                self._take_summary(message, now)
            case Have():
                for origin, version in message.entries.items():
                    self._peer_has(origin, version, now)
            case Graft():
                for origin, version in message.entries.items():
                    cursor = self._cursor(origin)
                    cursor.sent = 0 if message.whole else version
                    cursor.reset, cursor.eager = message.whole, True
                    cursor.introduced = False  # it may be what the peer lacks
                    self._dirty[origin] = None
            case Prune():
                for origin in message.origins:
                    self._cursor(origin).eager = False
            case Seen():
                if self.peer:
                    self._mesh.stability.take(self.peer.node, message)

    def _take_delta(self, delta: Delta, now: float) -> None:
        origin = delta.origin
        if origin == self.store.me:
            return
        cursor, mesh = self._cursor(origin), self._mesh
        before = self.store.version(origin)
        fits = self.store.merge(delta, self.peer.node if self.peer else "")
        after = self.store.version(origin)
        cursor.sent = max(cursor.sent, delta.upto)
        part = delta.reset and not delta.complete
        if after > before:
            if self._is_peer(origin) or cursor.eager is not False:
                mesh.adopt(origin, self)
            mesh.spread(origin, self, now)
        elif not fits:
            self._want(origin, delta.upto, now)
        elif not part and delta.upto <= before:
            self._take_duplicate(origin, cursor)
        if fits and (part or len(delta.records) >= BATCH):
            mesh.expect(origin, now)

    def _take_duplicate(self, origin: str, cursor: _Cursor) -> None:
        parent = self._mesh.parent(origin)
        if self._is_peer(origin):
            self._mesh.adopt(origin, self)  # nothing is shorter, so let the other be pruned
        elif parent is not None and parent is not self:
            cursor.eager = False
            self._pruned[origin] = None

    def _take_digest(self, digest: Digest, now: float) -> None:
        self._take_clocks(digest, now)
        if self.peer:
            self.store.seen(self.peer.node, digest.entries)
        if not self._introduced:
            self._introduced = True
            told = {o: v for o, (v, _) in digest.entries.items() if o != self.store.me}
            self._opening = {o: v for o, v in told.items() if v > self.store.version(o)}
            if self._mesh.relays():
                # A new stream where trees have grown: it is not to carry all of them again.
                for origin, parent in self._mesh.parents().items():
                    if parent is not self and not self._is_peer(origin):
                        self._cursor(origin).eager = False
                        self._pruned[origin] = None
        for origin, (version, _) in digest.entries.items():
            self._peer_has(origin, version, now)

    def _take_summary(self, summary: Summary, now: float) -> None:
        self._take_clocks(summary, now)
        digest = self.store.digest()
        differ = differing(self._mesh.summarizer.update(digest), summary.buckets)
        twice, self._differed = differ & self._differed, differ
        self._asked |= twice  # one digest, however many summaries come before we can send it

    def _take_clocks(self, message: Digest | Summary, now: float) -> None:
        if message.time:
            self._echo = (message.time, now)
        if message.echo:
            self._is_told = True
            sample = max(0.0, now - message.echo - message.held)
            self.rtt = sample if self.rtt is None else self.rtt + (sample - self.rtt) / 8

    def _peer_has(self, origin: str, version: int, now: float) -> None:
        cursor = self._cursor(origin)
        cursor.sent = max(cursor.sent, version)
        self._want(origin, version, now)

    def _want(self, origin: str, version: int, now: float) -> None:
        """Ask for it, unless it comes by itself."""
        have = self.store.version(origin)
        if origin == self.store.me or version <= have or not self.store.is_heard(origin):
            return
        wanted = self._wanted.get(origin)
        if wanted is None:
            # A node that was not known, or a tree that has lost its root: nobody else brings it.
            alone = have == 0 or (self._mesh.relays() and self._mesh.parent(origin) is None)
            due = now if alone else now + self._patience(GRAFT_AFTER)
            wanted = self._wanted[origin] = _Wanted(version, due)
            self._graft_at = min(self._graft_at, due)
        elif version > wanted.version:
            wanted.version, wanted.tries = version, 0

    def _patience(self, least: float) -> float:
        return max(least, 3 * (self.rtt or 0.0)) * self._rng.uniform(1.0, 1.2)

    def _cursor(self, origin: str) -> _Cursor:
        cursor = self._cursors.get(origin)
        if cursor is None:
            if len(self._cursors) > ORIGINS_MAX:
                raise Invalid("peer", f"speaks of more than {ORIGINS_MAX} nodes")
            cursor = self._cursors[origin] = _Cursor()
        return cursor

    def _is_peer(self, origin: str) -> bool:
        return self.peer is not None and self.peer.node == origin

    # -- what goes --

    def to_send(self, now: float) -> Iterator[Message]:
        """What should go out now, a piece at a time; may be left off and asked for again."""
        self.pending = False
        while self._out:
            yield self._out.pop(0)
        if self._asked:
            asked, self._asked = self._asked, 0
            digest = self.store.digest()
            told = {o: have for o, have in digest.items() if asked >> bucket(o) & 1}
            yield Digest(told, buckets=asked)
        if self._pruned:
            pruned, self._pruned = tuple(self._pruned), {}
            yield Prune(pruned)
        if self._introduced:
            self._dirty[self.store.me] = None
            while self._dirty:
                origin = next(iter(self._dirty))
                del self._dirty[origin]
                yield from self._push_new(origin)
        # After what has been pushed: who sees more in a digest than has come lacks it for sure.
        if now >= self._next_digest:
            self._next_digest = now + DIGEST_INTERVAL * self._rng.uniform(0.9, 1.1)
            yield from self._tell(now)
        yield from self._applied()
        if now >= self._graft_at:
            yield from self._grafts(now)
        if now >= self._have_at:
            yield from self._haves()

    def _push_new(self, origin: str) -> Iterator[Message]:
        cursor = self._cursor(origin)
        eager = self._mesh.relays() if cursor.eager is None else cursor.eager
        if (eager or origin == self.store.me) and not self._is_peer(origin):
            # More than once if a digest or a graft that came while we waited set it anew.
            while cursor.sent < self.store.version(origin):
                yield from self._push(origin, cursor)

    def _tell(self, now: float) -> Iterator[Message]:
        digest = self.store.digest()
        theirs, came = self._echo
        held = now - came if theirs else 0.0
        if self._is_told and self._mesh.relays():
            yield Summary(self._mesh.summarizer.update(digest), now, theirs, held)
        else:
            yield Digest(digest, now, theirs, held)
        if self.peer and self._introduced:
            doubted = self.store.is_doubted(self.peer.node)
            if doubted and now - self._doubted_at >= DOUBT_EVERY:
                self._doubted_at = now
                yield Graft({self.peer.node: 0}, whole=True)
            seen = self._mesh.stability.tell(self.peer.node, digest)
            if seen:
                yield seen
        if self._mesh.live:
            me = self.store.me
            stable = self._mesh.stability.stable(self.store.version(me), self._mesh.live())
            if stable:
                self.store.stable(stable)

    def _applied(self) -> Iterator[Message]:
        if self.peer:
            told = self.store.applied(self.peer.node), self.store.withholds()
            if told > self._applied_told or told[1] != self._applied_told[1]:
                self._applied_told = told
                yield Applied(*told)

    def _grafts(self, now: float) -> Iterator[Message]:
        """Ask for what is due, unless another stream has just been asked for it."""
        entries: dict[str, int] = {}
        for origin, wanted in list(self._wanted.items()):
            have = self.store.version(origin)
            over = have >= wanted.version or wanted.tries == GRAFT_TRIES
            if over or not self.store.is_heard(origin):
                del self._wanted[origin]
                continue
            if wanted.due > now:
                continue
            patience = self._patience(GRAFT_RETRY)
            wanted.due = self._mesh.expected(origin) + patience
            if wanted.due <= now:
                wanted.due = now + 1.3 * patience  # the others who have it are next
                wanted.tries += 1
                entries[origin] = have
                self._cursor(origin).eager = True
                self._mesh.expect(origin, now)
        self._graft_at = min((wanted.due for wanted in self._wanted.values()), default=NEVER)
        if entries:
            yield Graft(entries)

    def _haves(self) -> Iterator[Message]:
        lazy, self._lazy, self._have_at = self._lazy, {}, NEVER
        entries = {o: self.store.version(o) for o in lazy}
        entries = {o: v for o, v in entries.items() if v > self._cursor(o).sent}
        if entries:
            yield Have(entries)

    def _push(self, origin: str, cursor: _Cursor) -> Iterator[Message]:
        floor = self.store.floor(origin)
        if 0 < cursor.sent < floor and not cursor.reset:
            cursor.sent, cursor.reset = 0, True
        target = self.store.version(origin)
        records = self.store.since(origin, cursor.sent)
        sent, start = cursor.sent, 0
        while start == 0 or start < len(records):
            if cursor.sent != sent:
                return  # a message that came while we waited set it anew: begin there
            batch = _batch(records, start)
            last = start + len(batch) >= len(records)
            upto = target if last else batch[-1].version
            complete = cursor.reset and last
            delta = Delta(origin, sent, upto, batch, floor, cursor.reset, complete)
            if not self.store.prove(delta, not cursor.introduced):
                if self.store.since(origin, sent)[: len(batch)] == batch:
                    # It is not to be proven here: others have to.
                    cursor.sent, cursor.reset = target, False
                return  # or it has changed since: begin anew
            sent = cursor.sent = delta.upto
            start += max(1, len(delta.records))
            if sent == target:
                cursor.reset = False
            cursor.introduced = True
            yield delta

    def next_timer(self) -> float:
        """When `to_send` should be asked again though nothing has happened."""
        return min(self._next_digest, self._have_at, self._graft_at)


def _batch(records: list[Record], start: int) -> list[Record]:
    """The records from `start` on that go into one delta."""
    batch = records[start : start + BATCH]
    if sum([len(record.value) for record in batch]) > BATCH_BYTES:
        size = 0
        for count, record in enumerate(batch, 1):
            size += len(record.value)
            if size > BATCH_BYTES:
                return batch[:count]
    return batch
