"""What lies on a disk: the state file, damaged or another's, and rows that nobody wrote so."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from agent import restart
from agent.core.bounds import check_bounds
from agent.core.replica import Record
from agent.core.servicebounds import check_health, check_service
from agent.errors import VxmeshError
from agent.model import Sandbox, check_sound, encode
from agent.plan import Plan
from agent.servicemodel import Health, Service
from agent.statefile import APPLICATION, SCHEMA, checksum, open_state
from agent.store import WITHDRAWN, Batch, PeerBatch, Store
from agent.views import NODE
from tests.fuzz import world
from tests.fuzz.engine import Target, scratch
from tests.fuzz.inputs import number, text
from tests.fuzz.shapes import struct
from tests.fuzz.targets.unary import LOOP

_FILES = scratch()
BOX = Sandbox("5b" * 8, "box", "/run/netns/x", 7, 0, 0, 3.0)
Found = tuple[object, ...]


def _read(directory: Path) -> Found:
    store = Store(directory)
    try:
        peers = [(p.origin, p.records, p.version, p.floor) for p in store.load_peers()]
        return (*store.load(), peers)
    finally:
        LOOP.run_until_complete(store.close())


async def _fill(directory: Path) -> None:
    store = Store(directory)
    store.set_meta({"node": world.ME, "incarnation": "1", "boot": "b"})
    records = [Record(f"e/{n:016x}", n + 1, bytes([n]) * 90) for n in range(150)]
    await store.write(Batch(records, 150, 3, sandboxes={BOX.id: BOX}))
    for origin in (world.PEER, world.THIRD):
        peer = [Record(f"e/{origin[:2]}{n:014x}", n + 1, bytes([n]) * 120) for n in range(100)]
        await store.write(PeerBatch(origin, peer, 100, 7))
    await store.close()


def _bases() -> list[tuple[bytes, Found | None]]:
    """Files to damage, each with what is in it: None for those that are no state at all."""
    whole = Path(_FILES.name, "whole")
    LOOP.run_until_complete(_fill(whole))
    state = (whole / "state.db").read_bytes()
    other = Path(_FILES.name, "other.db")
    db = sqlite3.connect(other)
    db.executescript("CREATE TABLE meta (key, value); INSERT INTO meta VALUES ('a', 'b');")
    db.close()
    pretender = Path(_FILES.name, "pretender.db")
    db = sqlite3.connect(pretender)
    db.executescript(
        f"PRAGMA user_version={SCHEMA}; PRAGMA application_id={APPLICATION};"
        "CREATE TABLE meta (a); CREATE TABLE log (a); CREATE VIEW peers AS SELECT 1;"
        "CREATE TABLE sandboxes (key, value, crc);"
    )
    db.close()
    garbage = random.Random(1).randbytes(9000)
    return [
        (state, _read(whole)),
        (garbage, None),
        (other.read_bytes(), None),
        (pretender.read_bytes(), None),
        (b"SQLite format 3\0", None),
    ]


BASES = _bases()


def damaged(data: bytes) -> None:
    """A state file with this damage: the first byte says which file, then come changes of it.

    A change is four bytes of place and one of kind; a kind below 192 is put there, else bytes
    are taken out, doubled, blanked, or everything from there on is cut off.
    """
    if not data:
        return
    base, sound = BASES[data[0] % len(BASES)]
    buffer = bytearray(base)
    for at in range(1, len(data) - 4, 5):
        place = int.from_bytes(data[at : at + 4], "big") % (len(buffer) + 1)
        kind = data[at + 4]
        if kind < 192:
            buffer[place : place + 1] = bytes([kind])
        elif kind < 208:
            del buffer[place:]
        elif kind < 224:
            buffer[place : place + 512] = bytes(len(buffer[place : place + 512]))
        elif kind < 240:
            buffer[place:place] = buffer[place : place + kind]
        else:
            del buffer[place : place + kind]
    directory = Path(_FILES.name, "damaged")
    directory.mkdir(exist_ok=True)
    for left in directory.iterdir():
        left.unlink()
    (directory / "state.db").write_bytes(buffer)
    found = _read(directory)
    # Taken, so it is what was written: nothing was lost, and it is no fresh start.
    assert found == sound, "a damaged state was taken"


def make_damage(rng: random.Random) -> bytes:
    """For `damaged`."""
    which = rng.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4))
    size = len(BASES[which][0])
    changes = bytearray([which])
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        page = rng.randrange(size // 4096 + 1) * 4096
        place = rng.choice((rng.randrange(size + 1), page + rng.randrange(16), rng.randrange(120)))
        kind = rng.randrange(192) if rng.random() < 0.85 else rng.randrange(192, 256)
        changes += place.to_bytes(4, "big") + bytes([kind])
    return bytes(changes)


class Rows(msgspec.Struct, array_like=True):
    """A state whose rows all bear the right checksums, whoever wrote them."""

    meta: list[tuple[str, str]] = []
    log: list[tuple[str, bytes]] = []
    peers: list[tuple[str, int, int]] = []
    sandboxes: list[tuple[str, bytes]] = []


_rows = msgspec.msgpack.Decoder(Rows)


def restored(data: bytes) -> None:
    """A state with such rows, taken by a node that starts: a clear refusal, or a node that runs."""
    try:
        rows = _rows.decode(data)
        if not all(_is_own(page) for origin, page in rows.log if not origin):
            return
    except (msgspec.MsgspecError, ValueError):
        return
    directory = Path(_FILES.name, "rows")
    directory.mkdir(exist_ok=True)
    for left in directory.iterdir():
        left.unlink()
    db = open_state(directory / "state.db")
    try:
        with db:
            log = [(at + 1, *row) for at, row in enumerate(rows.log)]
            tables: dict[str, Sequence[tuple[Any, ...]]] = {
                "meta": rows.meta, "log": log, "peers": rows.peers, "sandboxes": rows.sandboxes
            }  # fmt: skip
            for table, found in tables.items():
                for row in found:
                    places = ", ".join("?" * (len(row) + 1))
                    values = (*row, checksum(row))
                    db.execute(f"REPLACE INTO {table} VALUES ({places})", values)
    except (OverflowError, UnicodeEncodeError, msgspec.MsgspecError):
        return  # no such row can be there
    finally:
        db.close()
    store = Store(directory)
    try:
        life = restart.begin(store, "boot", lambda: world.ME)
        me = world.describe(life.node, "h1", 1)
        node = world.bare(me)
        restart.recall(node, store, life)
    finally:
        LOOP.run_until_complete(store.close())
    node.describe(me)
    world.look(node, Plan(node))


def _is_own(page: bytes) -> bool:
    """Whether a node can have written these records itself. Who may write its file is root."""
    try:
        for key, _, value in msgspec.msgpack.decode(page, type=list[Record]):
            if value and key[:2] in world.KINDS:
                found = msgspec.msgpack.decode(value, type=world.KINDS[key[:2]])
                if isinstance(found, Service):
                    check_service(found, key[2:])
                elif isinstance(found, Health):
                    check_health(found, key[2:])
                else:
                    check_sound(cast(Any, found), key[2:])
                    check_bounds(found)
    except msgspec.MsgspecError:
        return True  # a page that cannot be read is to be refused
    except (VxmeshError, ValueError):
        return False
    return True


def make_rows(rng: random.Random) -> bytes:
    """For `restored`."""
    meta = {"node": world.ME, "incarnation": "1", "boot": "b", "version": "9", "floor": "0"}
    meta[WITHDRAWN] = f'{{"{world.PEER}": ["unreachable", 1]}}'
    if rng.random() < 0.5:
        key = rng.choice((*meta, "removed"))
        meta[key] = rng.choice((text(rng), "[]", '{"a": 1}', "{}", "1e9", str(number(rng))))

    def page(first: int) -> bytes:
        if rng.random() < 0.1:
            return rng.choice((b"", b"\x90", b"\x91\x93\xa1a\xff\xc4\0", b"\xc0"))
        return msgspec.msgpack.encode(world.records(rng, first))

    log = [(rng.choice(("", "", *world.NODES)), page(1 + 9 * at)) for at in range(rng.randrange(4))]
    log.append((world.PEER, msgspec.msgpack.encode([Record(
        NODE + world.PEER, 1, encode(world.describe(world.PEER, "h2", 2)))])))  # fmt: skip
    peers = [(id, rng.choice((1, 9, 1 << 62)), rng.choice((0, 0, 2))) for id in world.NODES]
    box = struct(Sandbox, rng, world.KNOWN)
    boxes = [(box.id, encode(box))] if rng.random() < 0.7 else []
    try:
        return msgspec.msgpack.encode(Rows(list(meta.items()), log, peers, boxes))
    except (OverflowError, UnicodeEncodeError):
        return b""


TARGETS = [
    Target("disk.state", damaged, make_damage, weight=0.3),
    Target("disk.rows", restored, make_rows, weight=0.3),
]
