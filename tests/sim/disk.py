"""A disk on the virtual clock, with what is lost when: the store of a simulated node.

It takes the batches that the real listener (agent/listeners.py: ToStore) writes, and follows
the real store's rules: one transaction for all that gathered while the last one was written,
acknowledged in order; a commit outlives the process; only a transaction that must
(agent/store.py: must_outlive_power) is synced, with all that went before it. What stands
opposite: agent/store.py; tests/unit/test_disk.py compares what the two give back.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from agent.core.replica import Record
from agent.core.seals import Seal
from agent.errors import Unavailable, VxmeshError
from agent.model import Sandbox
from agent.store import Batch, Holes, PeerBatch, must_outlive_power, spans
from tests.sim.network import Clock

T = TypeVar("T")


class Timer:
    """What call_soon and call_later give back."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class VirtualLoop:
    """As much of an event loop as futures and ToStore need, on the virtual clock.

    One for each life of a node: once it is `dead`, nothing that was to happen in it happens.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.dead = False
        self._jobs: set[Coroutine[Any, Any, Any]] = set()

    @property
    def as_loop(self) -> asyncio.AbstractEventLoop:
        """This, for those who use no more of a loop than is here."""
        return cast(asyncio.AbstractEventLoop, self)

    def kill(self) -> None:
        """End this life: every coroutine stops where it is."""
        self.dead = True
        for job in list(self._jobs):
            job.close()
        self._jobs.clear()

    def time(self) -> float:
        return self.clock.now

    def get_debug(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self.as_loop)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Futures with an error that nobody looked at: those of a life that ended."""

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: object = None
    ) -> Timer:
        return self.call_later(0.0, callback, *args)

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: object = None
    ) -> Timer:
        timer = Timer()

        def fire() -> None:
            if not (self.dead or timer.cancelled):
                callback(*args)

        self.clock.after(delay, fire)
        return timer

    def run(
        self,
        job: Coroutine[Any, Any, T],
        done: Callable[[T], object] = lambda result: None,
        failed: Callable[[VxmeshError], object] = lambda error: None,
    ) -> None:
        """Drive a coroutine that waits for futures of this loop; then tell how it ended."""
        self._jobs.add(job)
        context = contextvars.copy_context()

        def step(_: object = None) -> None:
            if self.dead:
                return
            try:
                waited: asyncio.Future[Any] = context.run(job.send, None)
            except StopIteration as stop:
                self._jobs.discard(job)
                done(stop.value)
            except VxmeshError as error:
                self._jobs.discard(job)
                failed(error)
            else:
                waited.add_done_callback(step)

        step()


@dataclass
class Content:
    """What a state file holds."""

    meta: dict[str, str] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    peers: dict[str, tuple[int, int]] = field(default_factory=dict)  # version, floor
    peer_records: dict[str, dict[str, Record]] = field(default_factory=dict)
    peer_seals: dict[str, list[Seal]] = field(default_factory=dict)

    def copy(self) -> Content:
        """One that can be changed by itself."""
        peers = {origin: dict(rows) for origin, rows in self.peer_records.items()}
        seals = {origin: list(rows) for origin, rows in self.peer_seals.items()}
        return Content(
            dict(self.meta),
            dict(self.records),
            dict(self.sandboxes),
            dict(self.peers),
            peers,
            seals,
        )

    def apply(self, batch: Batch | PeerBatch) -> None:
        """As store.Store commits it."""
        if isinstance(batch, PeerBatch) and batch.gone:
            self.peers.pop(batch.origin, None)
            self.peer_records.pop(batch.origin, None)
            self.peer_seals.pop(batch.origin, None)
            return
        if isinstance(batch, PeerBatch):
            rows = self.peer_records.setdefault(batch.origin, {})
            _replace(rows, batch.records, batch.replace)
            self.peers[batch.origin] = (batch.version, batch.floor)
            kept = [] if batch.replace or batch.reseal else self.peer_seals.get(batch.origin, [])
            for first, last in spans(batch.seals):
                kept = [seal for seal in kept if not (first <= seal.first and seal.last <= last)]
            self.peer_seals[batch.origin] = sorted([*kept, *batch.seals])
            return
        _replace(self.records, batch.records, batch.replace)
        if batch.replace:
            self.sandboxes.clear()
        if batch.version:
            self.meta["version"] = str(batch.version)
        if batch.floor:
            self.meta["floor"] = str(batch.floor)
        self.meta.update(batch.meta)
        for id, sandbox in batch.sandboxes.items():
            if sandbox is None:
                self.sandboxes.pop(id, None)
            else:
                self.sandboxes[id] = sandbox


def _replace(rows: dict[str, Record], new: list[Record], whole: bool) -> None:
    if whole:
        rows.clear()
    rows.update((record.key, record) for record in new)


def _living(rows: dict[str, Record], floor: int) -> list[Record]:
    """As the store reads its log: without the tombstones up to the floor."""
    living = (record for record in rows.values() if record.value or record.version > floor)
    return sorted(living, key=lambda record: record.version)


Transaction = list[Batch | PeerBatch]


class Disk:
    """The state of one node. `latency` is how long a commit takes, s; `failing` how many fail."""

    def __init__(
        self, clock: Clock, rng: random.Random, latency: tuple[float, float], failing: float
    ) -> None:
        self.clock, self.rng = clock, rng
        self.latency, self.failing = latency, failing
        self.loop = VirtualLoop(clock)  # of the life that writes
        self._synced = Content()
        self._tail: list[Transaction] = []  # committed since, and not synced
        self._queue: list[tuple[Batch | PeerBatch, asyncio.Future[None]]] = []
        self._writing: Transaction = []
        self._busy = False
        self._holes = Holes()

    # -- as the store has it --

    def write(self, batch: Batch | PeerBatch) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self.loop.create_future()
        self._queue.append((batch, future))
        if not self._busy:
            self._begin()
        return future

    def load(self) -> tuple[dict[str, str], list[Record], list[Sandbox]]:
        found = self._content(len(self._tail))
        records = _living(found.records, int(found.meta.get("floor", 0)))
        return found.meta, records, list(found.sandboxes.values())

    def load_peers(self) -> list[PeerBatch]:
        found = self._content(len(self._tail))
        return [
            PeerBatch(
                o,
                _living(found.peer_records[o], floor),
                version,
                floor,
                seals=found.peer_seals.get(o, []),
            )
            for o, (version, floor) in found.peers.items()
        ]

    def set_meta(self, values: dict[str, str]) -> None:
        self._sync(len(self._tail))
        self._synced.meta.update(values)

    # -- how it fails --

    def kill(self, committed: bool | None = None) -> None:
        """The process ends. What it was writing may be `committed` (None: by chance) or not."""
        if self._writing and (self.rng.random() < 0.5 if committed is None else committed):
            self._tail.append(self._writing)
        self._writing, self._busy = [], False
        self._holes = Holes()
        self._queue.clear()
        self.loop.kill()

    def cut_power(self, kept: int | None = None) -> int:
        """The machine goes dark: of what was not synced the first `kept` (None: by chance)
        transactions are there later. How many are not."""
        self.kill()
        kept = self.rng.randint(0, len(self._tail)) if kept is None else kept
        lost = len(self._tail) - kept
        del self._tail[kept:]
        self._sync(kept)
        return lost

    def forget(self) -> None:
        """The state is set aside, but for whose it is: that node comes back with nothing."""
        meta = self._content(len(self._tail)).meta
        kept = {key: meta[key] for key in ("node", "incarnation", "boot", "version")}
        self._tail, self._synced = [], Content(kept)

    def set_back(
        self, meta: dict[str, str], records: list[Record], sandboxes: list[Sandbox]
    ) -> None:
        """An old backup takes the place of the state."""
        self._tail = []
        self._synced = Content(
            dict(meta), {r.key: r for r in records}, {box.id: box for box in sandboxes}
        )

    # -- inside --

    def _begin(self) -> None:
        queue, self._queue = self._queue, []
        batches = [batch for batch, _ in queue]
        admitted = self._holes.admit(batches)
        self._writing = list(itertools.compress(batches, admitted))
        self._busy = True

        def commit() -> None:
            error = self.rng.random() < self.failing
            self._holes.settle(batches, not error)
            if not error:
                self._tail.append(self._writing)
                if must_outlive_power(self._writing):
                    self._sync(len(self._tail))
            self._writing, self._busy = [], False
            for (_, future), written in zip(queue, admitted, strict=True):
                if written and not error:
                    future.set_result(None)
                else:
                    future.set_exception(Unavailable("state", "disk full", "Free the disk"))
            if self._queue:
                self._begin()

        self.loop.call_later(self.rng.uniform(*self.latency), commit)

    def _sync(self, count: int) -> None:
        for transaction in self._tail[:count]:
            for batch in transaction:
                self._synced.apply(batch)
        del self._tail[:count]

    def _content(self, count: int) -> Content:
        found = self._synced.copy()
        for transaction in self._tail[:count]:
            for batch in transaction:
                found.apply(batch)
        return found
