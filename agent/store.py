"""What this node must still know after a crash: its own records, its sandboxes, and others'.

SQLite in WAL mode, one writer thread, one transaction for all that has gathered while the
last one was written. Writes are acknowledged in order; only then are records published.
With synchronous=NORMAL a commit survives the end of the process, not a power cut, unless it
must (must_outlive_power). What others wrote is kept as well, a little behind, so that a
restart knows at once what its kernel is to hold, and asks only for what it missed.

Records are appended to a log, and of one key the last one counts (as in a log-structured
store: Rosenblum, Ousterhout 1991). An origin's part of it is written anew once most of it is
dead; so the disk holds at most four states of an origin and twice `SLACK` records.
What stands opposite: restart.py restores from here at start; statefile.py is the file itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from agent.core.replica import Record
from agent.core.seals import Seal
from agent.errors import Unavailable, VxmeshError
from agent.model import Sandbox, encode
from agent.statefile import TABLES, Damaged, append, checksum, open_state, reset, unreadable

__all__ = ["Batch", "PeerBatch", "Store", "must_outlive_power", "reset"]

LASTING = frozenset(("r/", "w/", "x/", "a/", "t/"))  # claims, networks, removals, trust, tokens
SLACK = 5000  # records of an origin that may be dead in the log, beyond as many as live
ME = ""  # this node's own origin, as the log has it
_sandbox = msgspec.msgpack.Decoder(Sandbox)
_page = msgspec.msgpack.Decoder(list[Record])
HELD = "held"  # key of the meta: node that is removed by force -> remover -> attempt, as JSON
WITHDRAWN = "withdrawn"  # key of the meta: node id -> state and incarnation, as JSON


@dataclass(slots=True)
class Batch:
    """One change to write: all of it or nothing."""

    records: list[Record] = field(default_factory=list)
    version: int = 0  # our highest version with this batch
    floor: int = 0  # drop tombstones up to here
    replace: bool = False  # `records` and `sandboxes` are all there are
    sandboxes: dict[str, Sandbox | None] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)  # settings of the node
    size: int = 0  # our records with this batch, tombstones included


@dataclass(slots=True)
class PeerBatch:
    """What came of another origin since the last batch: its records up to `version`."""

    origin: str
    records: list[Record]
    version: int
    floor: int
    replace: bool = False  # `records` are all there are
    gone: bool = False  # the origin was forgotten
    size: int = 0  # the origin's records with this batch, tombstones included
    seals: Sequence[Seal] = ()  # those that cover `records`, and more
    reseal: bool = False  # `seals` are all there are


def must_outlive_power(batches: Iterable[Batch | PeerBatch]) -> bool:
    """Whether a transaction has to be synced to the disk itself, with all that went before it.

    Ownership of addresses: a donation that came undone would be an address handed out twice.
    Networks: one that was removed must not rise again, nor must a node, by a removal undone on
    its heir, or on itself (`meta`), nor a join token that is void. Whole states under new
    versions: under those versions nothing else may ever be written. The rest may be lost with
    the power, and a node that may have lost some says everything anew (restart.py).
    """
    return any(
        isinstance(batch, Batch)
        and (
            batch.replace
            or batch.meta
            or not LASTING.isdisjoint({r.key[:2] for r in batch.records})
        )
        for batch in batches
    )


class Holes:
    """What may be written after a write that failed: nothing that rests on what was lost.

    Records say what changed since the last batch, so one batch that is missing makes those
    behind it false until all is written anew, of this node's own as of each other origin. An
    origin that was forgotten goes only when nothing is missing: what took its place might be.
    """

    def __init__(self) -> None:
        self._holed: set[str] = set()  # origins; this node is ""
        self._then: set[str] = set()  # the same once a transaction has succeeded

    def admit(self, batches: Sequence[Batch | PeerBatch]) -> list[bool]:
        """Which of the batches of a transaction leave the disk true, were it to succeed."""
        self._then = set(self._holed)
        admitted = []
        for batch in batches:
            origin = _origin(batch)
            if isinstance(batch, PeerBatch) and batch.gone:
                admitted.append(not self._then - {origin})
                if admitted[-1]:
                    self._then.discard(origin)
                continue
            if batch.replace:
                self._then.discard(origin)
            admitted.append(origin not in self._then)
        return admitted

    def settle(self, batches: Sequence[Batch | PeerBatch], written: bool) -> None:
        """What became of the transaction that was asked for last."""
        self._holed = self._then if written else self._holed | set(map(_origin, batches))


def _origin(batch: Batch | PeerBatch) -> str:
    return batch.origin if isinstance(batch, PeerBatch) else ""


class Store:
    """The state directory. Opened once by a running agent; a second one is refused."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "state.db"
        self._db = open_state(self.path)
        self._holes = Holes()
        self._logged: dict[str, int] = {}  # origin -> its records in the log
        self._live: dict[str, int] = {}  # those that are not dead
        self._queue: queue.SimpleQueue[
            tuple[Batch | PeerBatch, Callable[[Exception | None], None]] | None
        ]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def load(self) -> tuple[dict[str, str], list[Record], list[Sandbox]]:
        """Settings of the node, its records (oldest first), and its sandboxes."""
        try:
            meta = dict(self._rows("meta"))
            records = self._living(ME, int(meta.get("floor", 0)))
            boxes = [_sandbox.decode(value) for _, value in self._rows("sandboxes")]
        except (sqlite3.DatabaseError, msgspec.MsgspecError, ValueError, Damaged) as error:
            raise unreadable(self.path, error) from None
        return meta, records, boxes

    def load_peers(self) -> list[PeerBatch]:
        """What was known of the other origins, each with its records, oldest first."""
        try:
            found = {
                origin: PeerBatch(origin, self._living(origin, floor), version, floor)
                for origin, version, floor in self._rows("peers")
            }
            logged = {origin for (origin,) in self._db.execute("SELECT DISTINCT origin FROM log")}
            if strangers := logged - found.keys() - {ME}:
                raise Damaged(f"records of {min(strangers)} without its version")
            sealed: dict[str, list[Seal]] = {}
            for origin, *seal in self._rows("peer_seals", "ORDER BY origin, first"):
                sealed.setdefault(origin, []).append(Seal(*seal))
            for origin, batch in found.items():
                batch.seals = sealed.get(origin, ())
        except (sqlite3.DatabaseError, msgspec.MsgspecError, ValueError, Damaged) as error:
            raise unreadable(self.path, error) from None
        return list(found.values())

    def _living(self, origin: str, floor: int) -> list[Record]:
        """The records of an origin without those that were overwritten and its tombstones up to
        `floor`, oldest first; how many the log has is counted by the way."""
        newest: dict[str, Record] = {}
        logged = 0
        for _, _, page in self._rows("log", "WHERE origin = ? ORDER BY number", (origin,)):
            records = _page.decode(page)
            logged += len(records)
            newest.update((record.key, record) for record in records)
        living = [r for r in newest.values() if r.value or r.version > floor]
        living.sort(key=lambda record: record.version)
        self._logged[origin], self._live[origin] = logged, len(living)
        return living

    def _rows(
        self, table: str, which: str = "", values: tuple[str, ...] = ()
    ) -> Iterable[tuple[Any, ...]]:
        """The rows of a table, each as it was written; Damaged if one is not."""
        columns = ", ".join(TABLES[table])
        for *row, crc in self._db.execute(f"SELECT {columns}, crc FROM {table} {which}", values):
            if checksum(row) != crc:
                raise Damaged(f"table {table}: a row is not what was written")
            yield tuple(row)

    def set_meta(self, values: dict[str, str]) -> None:
        """Write settings of the node, at once and for good; only before the first `write`."""
        self._db.execute("PRAGMA synchronous=FULL")
        self._replace("meta", list(values.items()))
        self._db.commit()

    def write(self, batch: Batch | PeerBatch) -> asyncio.Future[None]:
        """Queue a batch; the future is done when it is on disk, in the order of calls."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def finish(error: Exception | None) -> None:
            if future.done():
                return
            if error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._queue.put((batch, lambda error: _call(loop, finish, error)))
        return future

    async def close(self) -> None:
        """Write what is queued and close the file."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._db.close()

    def _work(self) -> None:
        stopping = False
        while not stopping:
            item = self._queue.get()
            if item is None:
                return
            items = [item]
            while not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    stopping = True
                    break
                items.append(more)
            batches = [batch for batch, _ in items]
            admitted = self._holes.admit(batches)
            error: Exception | None = None
            try:
                self._commit(itertools.compress(batches, admitted))
            except Exception as failure:  # whatever it is, the next batch must find this thread
                error = failure
            self._holes.settle(batches, error is None)
            for (_, done), written in zip(items, admitted, strict=True):
                done(None if written and error is None else self._lost(error))
            if error is None:
                # Later, then; and the next batch must find this thread, whatever it is.
                with contextlib.suppress(Exception):
                    self._compact(1 if self._queue.empty() else 2)

    def _lost(self, error: Exception | None) -> VxmeshError:
        why = f"cannot be written ({error})" if error else "could not be written before"
        return Unavailable(f"state {self.path}", why, "Free the disk; it is tried again")

    def _commit(self, batches: Iterable[Batch | PeerBatch]) -> None:
        batches = list(batches)
        full = must_outlive_power(batches)
        self._db.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
        with self._db:
            for batch in batches:
                if isinstance(batch, PeerBatch):
                    self._commit_peer(batch)
                    continue
                if batch.replace:
                    self._clear(ME)
                    self._db.execute("DELETE FROM sandboxes")
                self._append(ME, batch.records, batch.size)
                marks = {"version": batch.version, "floor": batch.floor}
                rows = [(key, str(value)) for key, value in marks.items() if value]
                self._replace("meta", [*rows, *batch.meta.items()])
                for id, sandbox in batch.sandboxes.items():
                    if sandbox is None:
                        self._db.execute("DELETE FROM sandboxes WHERE id = ?", (id,))
                    else:
                        self._replace("sandboxes", [(id, encode(sandbox))])

    def _replace(self, table: str, rows: Sequence[tuple[object, ...]]) -> None:
        places = ", ".join("?" * (len(TABLES[table]) + 1))
        for row in rows:
            self._db.execute(f"REPLACE INTO {table} VALUES ({places})", (*row, checksum(row)))

    def _commit_peer(self, batch: PeerBatch) -> None:
        origin = batch.origin
        if batch.replace or batch.gone:
            self._clear(origin)
        if batch.replace or batch.gone or batch.reseal:
            self._db.execute("DELETE FROM peer_seals WHERE origin = ?", (origin,))
        if batch.gone:
            self._db.execute("DELETE FROM peers WHERE origin = ?", (origin,))
            return
        self._append(origin, batch.records, batch.size)
        for first, last in spans(batch.seals):  # what they say again, in longer runs
            self._db.execute(
                "DELETE FROM peer_seals WHERE origin = ? AND first >= ? AND last <= ?",
                (origin, first, last),
            )
        self._replace("peer_seals", [(origin, *seal) for seal in batch.seals])
        self._replace("peers", [(origin, batch.version, batch.floor)])

    # -- the log --

    def _append(self, origin: str, records: Sequence[Record], live: int) -> None:
        append(self._db, [(origin, records)])
        self._logged[origin] = self._logged.get(origin, 0) + len(records)
        self._live[origin] = live

    def _clear(self, origin: str) -> None:
        self._db.execute("DELETE FROM log WHERE origin = ?", (origin,))
        self._logged[origin] = self._live[origin] = 0

    def _compact(self, patience: int) -> None:
        """Write the origins anew of whose records in the log more are dead than may be: when there
        is nothing else to write, or with more patience while there is."""
        for origin, logged in list(self._logged.items()):
            if logged <= patience * (2 * self._live.get(origin, 0) + SLACK):
                continue
            # If this fails, which no answer depends on, it is tried when there is twice as much.
            self._live[origin] = logged
            with self._db:
                floors = "SELECT floor FROM peers WHERE origin = ?"
                if origin == ME:
                    floors = "SELECT value FROM meta WHERE key = 'floor' AND ? = ''"
                found = self._db.execute(floors, (origin,)).fetchone()
                living = self._living(origin, int(found[0]) if found else 0)
                self._clear(origin)
                self._append(origin, living, len(living))


def spans(seals: Iterable[Seal]) -> list[tuple[int, int]]:
    """The versions that seals (by first version) cover, in as few pieces as can be."""
    found: list[tuple[int, int]] = []
    for seal in seals:
        if found and seal.first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], seal.last)
        else:
            found.append((seal.first, seal.last))
    return found


def _call(
    loop: asyncio.AbstractEventLoop,
    finish: Callable[[Exception | None], None],
    error: Exception | None,
) -> None:
    try:
        loop.call_soon_threadsafe(finish, error)
    except RuntimeError:  # the loop is closed: nobody waits any more
        pass
