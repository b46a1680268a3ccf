"""What this node must still know after a crash: its own records, its sandboxes, and others'.

SQLite in WAL mode, one writer thread, one transaction for all that has gathered while the
last one was written. Writes are acknowledged in order; only then are records published.
With synchronous=NORMAL a commit survives the end of the process, not a power cut; a node that
lost its last commits that way is told by its peers (core/replica.py: surpass). What others
wrote is kept as well, a little behind, so that a restart knows at once what its kernel is to
hold, and asks only for what it missed.
What stands opposite: agent/daemon.py restores from here at start.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from agent.core.replica import Record
from agent.errors import InUse, Unavailable, VxmeshError
from agent.model import Sandbox, encode

ROWS_A_STATEMENT = 500  # of 4 values at most: far below SQLite's limit of 32,766
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
  key TEXT PRIMARY KEY, version INTEGER NOT NULL, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS peers (
  origin TEXT PRIMARY KEY, version INTEGER NOT NULL, floor INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS peer_records (
  origin TEXT, key TEXT, version INTEGER NOT NULL, value BLOB NOT NULL,
  PRIMARY KEY (origin, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sandboxes (id TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
_sandbox = msgspec.msgpack.Decoder(Sandbox)


@dataclass(slots=True)
class Batch:
    """One change to write: all of it or nothing."""

    records: list[Record] = field(default_factory=list)
    version: int = 0  # our highest version with this batch
    floor: int = 0  # drop tombstones up to here
    replace: bool = False  # `records` are all there are
    sandboxes: dict[str, Sandbox | None] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)  # settings of the node


@dataclass(slots=True)
class PeerBatch:
    """What came of another origin since the last batch: its records up to `version`."""

    origin: str
    records: list[Record]
    version: int
    floor: int
    replace: bool = False  # `records` are all there are
    gone: bool = False  # the origin was forgotten


class Store:
    """The state directory. Opened once by a running agent; a second one is refused."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "state.db"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(self.path, check_same_thread=False, timeout=0.2)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            # Held for life: it is how a second agent on the same state is told.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("BEGIN IMMEDIATE")
            for statement in _TABLES.split(";"):
                self._db.execute(statement)
            self._db.commit()
            if self._db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check found it damaged")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise InUse(
                    f"state {self.path}", "is held by another agent", "Stop that one first"
                ) from None
            raise self._unreadable(error) from None
        except (sqlite3.DatabaseError, OSError) as error:
            raise self._unreadable(error) from None
        self._queue: queue.SimpleQueue[
            tuple[Batch | PeerBatch, Callable[[Exception | None], None]] | None
        ]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def _unreadable(self, error: Exception) -> VxmeshError:
        return Unavailable(
            f"state {self.path}",
            f"cannot be used ({error})",
            "Restore it from a backup, or start with --reset-state, which sets it aside: "
            "this node then joins as a new one",
        )

    def load(self) -> tuple[dict[str, str], list[Record], list[Sandbox]]:
        """Settings of the node, its records (oldest first), and its sandboxes."""
        try:
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
            rows = self._db.execute("SELECT key, version, value FROM records ORDER BY version")
            records = [Record(*row) for row in rows]
            boxes = [_sandbox.decode(v) for (v,) in self._db.execute("SELECT value FROM sandboxes")]
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as error:
            raise self._unreadable(error) from None
        return meta, records, boxes

    def load_peers(self) -> list[PeerBatch]:
        """What was known of the other origins, each with its records, oldest first."""
        try:
            found = []
            for origin, version, floor in self._db.execute("SELECT * FROM peers").fetchall():
                rows = self._db.execute(
                    "SELECT key, version, value FROM peer_records WHERE origin = ?"
                    " ORDER BY version",
                    (origin,),
                )
                found.append(PeerBatch(origin, [Record(*r) for r in rows], version, floor))
            return found
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from None

    def set_meta(self, values: dict[str, str]) -> None:
        """Write settings of the node, at once; only before the first `write`."""
        self._db.executemany("REPLACE INTO meta VALUES (?, ?)", values.items())
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
            error: Exception | None = None
            try:
                self._commit([batch for batch, _ in items])
            except Exception as failure:  # whatever it is, the next batch must find this thread
                error = Unavailable(
                    f"state {self.path}", f"cannot be written ({failure})", "Free the disk"
                )
            for _, done in items:
                done(error)

    def _commit(self, batches: Iterable[Batch | PeerBatch]) -> None:
        batches = list(batches)
        # Ownership of addresses must outlive a power cut too: a donation that came undone would
        # be an address handed out twice. The rest may be lost with its peers knowing it.
        # The record of a removal is in one batch with the claims that rest on it.
        claims = any(r.key.startswith("r/") for b in batches for r in b.records)
        self._db.execute(f"PRAGMA synchronous={'FULL' if claims else 'NORMAL'}")
        with self._db:
            for batch in batches:
                if isinstance(batch, PeerBatch):
                    self._commit_peer(batch)
                    continue
                if batch.replace:
                    self._db.execute("DELETE FROM records")
                self._replace("records", batch.records)
                if batch.floor:
                    self._db.execute(
                        "DELETE FROM records WHERE value = x'' AND version <= ?", (batch.floor,)
                    )
                marks = {"version": batch.version, "floor": batch.floor}
                self._db.executemany(
                    "REPLACE INTO meta VALUES (?, ?)",
                    [(key, str(value)) for key, value in marks.items() if value]
                    + list(batch.meta.items()),
                )
                for id, sandbox in batch.sandboxes.items():
                    if sandbox is None:
                        self._db.execute("DELETE FROM sandboxes WHERE id = ?", (id,))
                    else:
                        self._db.execute(
                            "REPLACE INTO sandboxes VALUES (?, ?)", (id, encode(sandbox))
                        )

    def _replace(self, table: str, rows: Sequence[tuple[object, ...]]) -> None:
        """Write rows, many a statement: each statement gives the interpreter away and takes it
        again, and with one a row this thread and the loop would hold each other up."""
        for start in range(0, len(rows), ROWS_A_STATEMENT):
            part = rows[start : start + ROWS_A_STATEMENT]
            places = ",".join(["(" + ",".join("?" * len(part[0])) + ")"] * len(part))
            values = list(itertools.chain.from_iterable(part))
            self._db.execute(f"REPLACE INTO {table} VALUES {places}", values)

    def _commit_peer(self, batch: PeerBatch) -> None:
        origin = batch.origin
        if batch.replace or batch.gone:
            self._db.execute("DELETE FROM peer_records WHERE origin = ?", (origin,))
        if batch.gone:
            self._db.execute("DELETE FROM peers WHERE origin = ?", (origin,))
            return
        self._replace("peer_records", [(origin, *r) for r in batch.records])
        if batch.floor:
            self._db.execute(
                "DELETE FROM peer_records WHERE origin = ? AND value = x'' AND version <= ?",
                (origin, batch.floor),
            )
        self._db.execute(
            "REPLACE INTO peers VALUES (?, ?, ?)", (origin, batch.version, batch.floor)
        )


def _call(
    loop: asyncio.AbstractEventLoop,
    finish: Callable[[Exception | None], None],
    error: Exception | None,
) -> None:
    try:
        loop.call_soon_threadsafe(finish, error)
    except RuntimeError:  # the loop is closed: nobody waits any more
        pass


def reset(directory: Path) -> Path | None:
    """Set a state file aside under a new name; where to, or None if there was none."""
    path = directory / "state.db"
    if not path.exists():
        return None
    number = 1
    while (aside := directory / f"state.db.aside-{number}").exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        companion = directory / f"state.db{suffix}"
        if companion.exists():
            companion.rename(directory / f"{aside.name}{suffix}")
    return aside
