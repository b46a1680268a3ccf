"""The state file: made whole or not at all, and refused if it is not what was written.

A node that forgot what it owns would hand out addresses a second time, so nothing here falls
back to a fresh start: only a file that was never there is one. Every row bears a checksum,
since SQLite's own check sees damage to its trees but not to what is in them; and a log whose
head is garbage, which SQLite would take for empty, is refused as well.
What stands opposite: store.py writes and reads the tables. Source: sqlite.org/fileformat.html.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from agent.errors import InUse, Unavailable, VxmeshError

SCHEMA = 2  # PRAGMA user_version; 0: of an agent before checksums, 1: before seals
APPLICATION = 0x76786D65  # PRAGMA application_id: "vxme"
WAL_MAGIC = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
WAL_HEADER = 32  # bytes; the last 8 are its checksum

# The columns of each table without its checksum, which is the last one.
TABLES = {
    "meta": ("key", "value"),
    "records": ("key", "version", "value"),
    "peers": ("origin", "version", "floor"),
    "peer_records": ("origin", "key", "version", "value"),
    "sandboxes": ("id", "value"),
    "peer_seals": ("origin", "first", "last", "leaves", "folded", "signature"),
}
_SEALS = """
CREATE TABLE peer_seals (origin TEXT, first INTEGER, last INTEGER, leaves BLOB NOT NULL,
  folded INTEGER NOT NULL, signature BLOB NOT NULL, crc INTEGER NOT NULL,
  PRIMARY KEY (origin, first, last)) WITHOUT ROWID;
"""
_CREATE = (
    """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE records (key TEXT PRIMARY KEY, version INTEGER NOT NULL, value BLOB NOT NULL,
  crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE peers (origin TEXT PRIMARY KEY, version INTEGER NOT NULL, floor INTEGER NOT NULL,
  crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE peer_records (origin TEXT, key TEXT, version INTEGER NOT NULL, value BLOB NOT NULL,
  crc INTEGER NOT NULL, PRIMARY KEY (origin, key)) WITHOUT ROWID;
CREATE TABLE sandboxes (id TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL)
  WITHOUT ROWID;
"""
    + _SEALS
)
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
    needed = TABLES.keys() - ({"peer_seals"} if version < 2 else set())
    if not tables >= needed:
        raise Damaged(f"it lacks the table {min(needed - tables)}")
    if version > SCHEMA:
        raise Damaged(f"a newer agent wrote it: schema {version}, this one knows {SCHEMA}")
    if version < 1:
        _add_checksums(db)
    if version < 2:
        db.execute(_SEALS)
        db.execute(f"PRAGMA user_version={SCHEMA}")


def _add_checksums(db: sqlite3.Connection) -> None:
    """Bring a state of schema 0 up to date, in the transaction that is open."""
    db.create_function("checksum", -1, lambda *row: checksum(row), deterministic=True)
    for table, columns in TABLES.items():
        if table == "peer_seals":  # these had no such table
            continue
        db.execute(f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0")
        db.execute(f"UPDATE {table} SET crc = checksum({', '.join(columns)})")
    db.execute(f"PRAGMA user_version={SCHEMA}")
    db.execute(f"PRAGMA application_id={APPLICATION}")


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
