"""The state file: made whole or not at all, and refused if it is not what was written.

A node that forgot what it owns would hand out addresses a second time, so nothing here falls
back to a fresh start: only a file that was never there is one. Every row bears a checksum,
since SQLite's own check sees damage to its trees but not to what is in them; and a log whose
head is garbage, which SQLite would take for empty, is refused as well.

Records lie in a log of pages, many a row: a row and a place in a tree of its own for each of
100,000 records costs two seconds of a processor, a page for 500 of them 20 ms in all.
What stands opposite: store.py writes and reads the tables. Source: sqlite.org/fileformat.html.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from agent.errors import InUse, Unavailable, VxmeshError

SCHEMA = 3  # PRAGMA user_version; 0: before checksums, 1: a row for each record, 2: before seals
APPLICATION = 0x76786D65  # PRAGMA application_id: "vxme"
WAL_MAGIC = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
WAL_HEADER = 32  # bytes; the last 8 are its checksum

# The columns of each table without its checksum, which is the last one.
TABLES = {
    "meta": ("key", "value"),
    "log": ("number", "origin", "records"),  # msgpack; this node's own under the origin ""
    "peers": ("origin", "version", "floor"),
    "sandboxes": ("id", "value"),
    "peer_seals": ("origin", "first", "last", "leaves", "folded", "signature"),
}
_CREATE_LOG = """
CREATE TABLE log (number INTEGER PRIMARY KEY, origin TEXT NOT NULL, records BLOB NOT NULL,
  crc INTEGER NOT NULL);
CREATE INDEX log_origin ON log (origin);
"""
_CREATE_SEALS = """
CREATE TABLE peer_seals (origin TEXT, first INTEGER, last INTEGER, leaves BLOB NOT NULL,
  folded INTEGER NOT NULL, signature BLOB NOT NULL, crc INTEGER NOT NULL,
  PRIMARY KEY (origin, first, last)) WITHOUT ROWID;
"""
_CREATE = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE peers (origin TEXT PRIMARY KEY, version INTEGER NOT NULL, floor INTEGER NOT NULL,
  crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE sandboxes (id TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL)
  WITHOUT ROWID;
{_CREATE_LOG}
{_CREATE_SEALS}
"""
# Those of schemas 0 and 1, where they differ.
_BEFORE = {
    "records": ("key", "version", "value"),
    "peer_records": ("origin", "key", "version", "value"),
}
PAGE = 500  # records a row of the log
_encode = msgspec.msgpack.Encoder().encode


class Damaged(Exception):
    """The file is not what was written; the text says in which way."""


def checksum(row: Iterable[object]) -> int:
    """CRC-32 of the columns of a row and of their types: strings, numbers and bytes."""
    return zlib.crc32(_encode(row))


def open_state(path: Path) -> sqlite3.Connection:
    """The state file at `path`, made if there is none, checked, held until it is closed.

    InUse if another agent holds it; Unavailable says what is wrong with it and what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _exists(path):
            _look_at(path)
        else:
            _make(path)
        return _open(path)
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise InUse(
                f"state {path}", "is held by another agent", "Stop that one first"
            ) from None
        raise unreadable(path, error) from None
    except (sqlite3.DatabaseError, OSError, ValueError, Damaged) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> VxmeshError:
    """The error of a state file that cannot be used."""
    return Unavailable(
        f"state {path}",
        f"cannot be used ({error})",
        "Restore it from a backup, or start with --reset-state, which sets it aside: "
        "this node then joins as a new one",
    )


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _exists(path: Path) -> bool:
    """Whether there is or was a state; Damaged if only its log is left."""
    if os.path.lexists(path):
        return True
    if _log(path).exists() and _log(path).stat().st_size:
        raise Damaged("it is missing, but its log is there")
    return False


def _look_at(path: Path) -> None:
    """Refuse what SQLite would silently take for empty."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Damaged("it is no file")
    if found.st_size == 0:
        raise Damaged("it is empty")
    try:
        with _log(path).open("rb") as file:
            head = file.read(WAL_HEADER)
    except FileNotFoundError:
        return
    # Zeros: space that was given to the file before a power cut, never written to.
    if head.strip(b"\0") and not _is_log(head):
        raise Damaged("its log is garbage")


def _is_log(head: bytes) -> bool:
    """Whether a WAL begins with a header that is whole."""
    if len(head) < WAL_HEADER or head[:4] not in WAL_MAGIC:
        return False
    order = "big" if head[3] & 1 else "little"
    words = [int.from_bytes(head[i : i + 4], order) for i in range(0, 24, 4)]  # type: ignore[arg-type]
    one = two = 0
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return head[24:] == one.to_bytes(4) + two.to_bytes(4)


def _make(path: Path) -> None:
    """Make an empty state beside its place and move it there once it is on disk.

    So a crash leaves no file or a whole one, and a file without tables is a damaged one.
    """
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    db = sqlite3.connect(fresh)
    try:
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(
            f"BEGIN; {_CREATE} PRAGMA user_version={SCHEMA};"
            f" PRAGMA application_id={APPLICATION}; COMMIT;"
        )
    finally:
        db.close()
    fresh.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, timeout=0.2)
    try:
        # Held for life: it is how a second agent on the same state is told.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("BEGIN IMMEDIATE")
        _check_schema(db)
        db.commit()
        if db.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
            raise Damaged("SQLite's own check found damage")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
    except BaseException:
        db.close()
        raise
    return db


def _check_schema(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if application not in (APPLICATION, 0) or (application == 0 and version != 0):
        raise Damaged("it is a database of another program")
    wanted = set(TABLES)
    if version < SCHEMA:
        wanted = wanted - {"peer_seals"}
    if version < 2:
        wanted = wanted - {"log"} | _BEFORE.keys()
    if not tables >= wanted:
        raise Damaged(f"it lacks the table {min(wanted - tables)}")
    if version > SCHEMA:
        raise Damaged(f"a newer agent wrote it: schema {version}, this one knows {SCHEMA}")
    if version < SCHEMA:
        _bring_up_to_date(db, version)


def _bring_up_to_date(db: sqlite3.Connection, version: int) -> None:
    """Turn a state of a schema before into today's, in the transaction that is open."""
    if version == 0:
        db.create_function("checksum", -1, lambda *row: checksum(row), deterministic=True)
        for table in TABLES.keys() - {"log", "peer_seals"}:
            columns = ", ".join(TABLES[table])
            db.execute(f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0")
            db.execute(f"UPDATE {table} SET crc = checksum({columns})")
    if version < 2:
        _make_log(db, version)
    db.execute(_CREATE_SEALS)
    db.execute(f"PRAGMA user_version={SCHEMA}")
    db.execute(f"PRAGMA application_id={APPLICATION}")


def _make_log(db: sqlite3.Connection, version: int) -> None:
    """Put what had a row for each record into the log."""
    records: dict[str, list[tuple[str, int, bytes]]] = {}
    for table, names in _BEFORE.items():
        found = f"SELECT {', '.join(names)}{', crc' if version else ''} FROM {table}"
        for row in db.execute(f"{found} ORDER BY version"):
            kept = row[: len(names)]
            if version and checksum(kept) != row[-1]:
                raise Damaged(f"table {table}: a row is not what was written")
            key, number, value = kept[-3:]
            records.setdefault(kept[0] if len(kept) == 4 else "", []).append((key, number, value))
        db.execute(f"DROP TABLE {table}")
    for statement in _CREATE_LOG.split(";")[:-1]:
        db.execute(statement)
    append(db, ((origin, rows) for origin, rows in records.items()))


def append(
    db: sqlite3.Connection, parts: Iterable[tuple[str, Sequence[tuple[str, int, bytes]]]]
) -> None:
    """Write records (key, version, value) at the end of the log, a part of one origin each."""
    number = db.execute("SELECT coalesce(max(number), 0) FROM log").fetchone()[0]
    for origin, records in parts:
        for start in range(0, len(records), PAGE):
            number += 1
            row = (number, origin, _encode(records[start : start + PAGE]))
            db.execute("INSERT INTO log VALUES (?, ?, ?, ?)", (*row, checksum(row)))


def reset(directory: Path) -> Path | None:
    """Set a state aside under a new name, whatever is there; where to, or None for nothing."""
    path = directory / "state.db"
    parts = [p for p in (path, *(path.with_name(path.name + s) for s in ("-wal", "-shm")))
             if os.path.lexists(p)]  # fmt: skip
    if not parts:
        return None
    number = 1
    while any(directory.glob(f"state.db.aside-{number}*")):
        number += 1
    aside = directory / f"state.db.aside-{number}"
    for part in parts:
        part.rename(directory / f"{aside.name}{part.name.removeprefix(path.name)}")
    return aside
