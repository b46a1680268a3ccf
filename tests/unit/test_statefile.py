"""A state file that is not what was written is refused, in whichever way it came to be so."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.core.replica import Record
from agent.errors import Unavailable, VxmeshError
from agent.model import Sandbox
from agent.restart import begin
from agent.statefile import SCHEMA, checksum
from agent.store import Batch, PeerBatch, Store, reset

BOX = Sandbox("1" * 16, "box", "/proc/1/ns/net", 7, 1, 2, 3.0)


def read(store: Store) -> object:
    return store.load(), [(p.origin, p.records, p.version, p.floor) for p in store.load_peers()]


async def fill(directory: Path) -> object:
    """A state of some pages, closed; what is in it."""
    store = Store(directory)
    store.set_meta({"node": "n" * 16, "incarnation": "1"})
    records = [Record(f"e/{n:016x}", n + 1, bytes([n]) * 90) for n in range(150)]
    await store.write(Batch(records, 150, 3, sandboxes={BOX.id: BOX}))
    for origin in "ab":
        peer = [Record(f"e/{origin}{n:015x}", n + 1, bytes([n]) * 120) for n in range(100)]
        await store.write(PeerBatch(origin * 16, peer, 100, 7))
    found = read(store)
    await store.close()
    return found


@pytest.fixture
async def directory(tmp_path: Path) -> Path:
    await fill(tmp_path)
    return tmp_path


def refused(directory: Path) -> str:
    """Why a state is refused; that it is left as it was, and that there is a way out."""
    path = directory / "state.db"
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(Unavailable) as caught:
        read(Store(directory))
    assert "--reset-state" in str(caught.value)
    assert (path.read_bytes() if path.is_file() else b"") == before
    return caught.value.why


def test_a_missing_file_is_a_fresh_start(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "deep")
    assert read(store) == (({}, [], []), [])


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: truncate(path, 0), "is empty"),
        (lambda path: truncate(path, 50), ""),
        (lambda path: truncate(path, path.stat().st_size // 2), ""),
        (lambda path: path.write_bytes(b"not a database at all" * 100), "not a database"),
        (lambda path: path.write_bytes(bytes(8192)), "not a database"),
        (lambda path: (path.unlink(), path.mkdir()), "is no file"),
        (lambda path: Path(f"{path}-wal").write_bytes(b"garbage" * 99), "log is garbage"),
        (lambda path: Path(f"{path}-wal").write_bytes(b"\x37\x7f\x06\x82" * 99), "log is garbage"),
        (lambda path: (Path(f"{path}-wal").write_bytes(b"x"), path.unlink()), "its log is there"),
    ],
)
def test_damage_is_refused_with_a_way_out(
    directory: Path, damage: Callable[[Path], object], why: str
) -> None:
    damage(directory / "state.db")
    assert why in refused(directory)
    assert reset(directory) is not None
    assert read(Store(directory)) == (({}, [], []), [])


def sql(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (f"PRAGMA user_version={SCHEMA + 1}", f"newer agent wrote it: schema {SCHEMA + 1}"),
        ("PRAGMA application_id=77", "another program"),
        ("DROP TABLE log", "lacks the table log"),
        ("UPDATE log SET records = x'90' WHERE origin = ''", "table log"),
        ("UPDATE log SET number = 999 WHERE origin = ''", "table log"),
        ("UPDATE log SET origin = 'c' WHERE number = 2", "without its version"),
        ("UPDATE meta SET value = '9' WHERE key = 'floor'", "table meta"),
        ("UPDATE sandboxes SET id = 'x'", "table sandboxes"),
    ],
)
def test_what_another_program_did_to_it_is_refused(
    directory: Path, statement: str, why: str
) -> None:
    sql(directory / "state.db", statement)
    assert why in refused(directory)


def test_an_empty_database_in_its_place_is_refused(tmp_path: Path) -> None:
    sql(tmp_path / "state.db", "VACUUM")
    assert refused(tmp_path)
    (tmp_path / "state.db").unlink()
    sql(tmp_path / "state.db", "CREATE TABLE notes (text)")
    assert "lacks the table" in refused(tmp_path)


async def test_records_without_a_node_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    await store.write(Batch([Record("e/x", 1, b"1")], 1))
    with pytest.raises(Unavailable, match="but not whose"):
        begin(store, "boot", lambda: "new")
    await store.close()


async def test_no_flipped_byte_goes_unseen(tmp_path: Path) -> None:
    """Either it is refused, or nothing that counts was hit and all is as it was written."""
    whole = await fill(tmp_path)
    path = tmp_path / "state.db"
    good = path.read_bytes()
    rng = random.Random(7)
    offsets = {*range(100), *(rng.randrange(len(good)) for _ in range(900))}
    refusals = 0
    for offset in sorted(offsets):
        bad = bytearray(good)
        bad[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            store = Store(tmp_path)
        except VxmeshError:
            refusals += 1
            continue
        try:
            assert read(store) == whole, f"byte {offset}"
        except VxmeshError:
            refusals += 1
        await store.close()
    assert refusals > len(offsets) / 2


async def test_a_log_with_a_torn_end_gives_back_what_was_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.set_meta({"node": "n"})
    await store.write(Batch([Record("e/a", 1, b"1")], 1))
    log = tmp_path / "state.db-wal"
    size = log.stat().st_size
    await store.write(Batch([Record("e/b", 2, b"2")], 2))
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for part in ("state.db", "state.db-wal"):
        (crashed / part).write_bytes((tmp_path / part).read_bytes())
    await store.close()
    truncate(crashed / "state.db-wal", size + 100)
    assert Store(crashed).load()[1] == [Record("e/a", 1, b"1")]


async def test_a_crash_while_the_file_is_made_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "state.db.new").write_bytes(b"half a file")
    store = Store(tmp_path)
    assert read(store) == (({}, [], []), [])
    await store.close()
    assert not (tmp_path / "state.db.new").exists()


def before_the_log(db: sqlite3.Connection, mine: list[Record], peers: list[PeerBatch]) -> None:
    """Give records a row each."""
    db.execute("DROP TABLE log")
    db.execute("CREATE TABLE records (key TEXT PRIMARY KEY, version, value, crc)")
    db.execute("CREATE TABLE peer_records (origin, key, version, value, crc)")
    for record in mine:
        db.execute("INSERT INTO records VALUES (?, ?, ?, ?)", (*record, checksum(record)))
    for row in ((peer.origin, *record) for peer in peers for record in peer.records):
        db.execute("INSERT INTO peer_records VALUES (?, ?, ?, ?, ?)", (*row, checksum(row)))


@pytest.mark.parametrize("schema", [0, 1, 2])
async def test_a_state_of_a_schema_before_is_taken_over(directory: Path, schema: int) -> None:
    store = Store(directory)
    whole = read(store)
    mine, peers = store.load()[1], store.load_peers()
    await store.close()
    path = directory / "state.db"
    db = sqlite3.connect(path)
    db.execute("DROP TABLE peer_seals")
    if schema < 2:
        before_the_log(db, mine, peers)
    if schema == 0:
        for table in ("meta", "peers", "sandboxes", "records", "peer_records"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN crc")
        db.execute("PRAGMA application_id=0")
    db.execute(f"PRAGMA user_version={schema}")
    db.commit()
    db.close()
    before = path.read_bytes()
    store = Store(directory)
    assert read(store) == whole
    await store.close()
    store = Store(directory)
    assert read(store) == whole
    await store.close()
    if schema == 1:
        path.write_bytes(before)
        sql(path, "UPDATE records SET version = 999 WHERE version = 7")
        assert "table records" in refused(directory)


def test_checksums_tell_columns_apart() -> None:
    assert checksum(("ab", "c")) != checksum(("a", "bc"))
    assert len({checksum((column,)) for column in (1, "1", b"1", 1.0)}) == 4


async def test_incarnations_rise_with_every_start(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        store = Store(tmp_path)
        life = begin(store, f"boot {number // 2}", lambda: "a" * 16)
        assert (life.node, life.incarnation) == ("a" * 16, number)
        # Not one was written in vain: after a power cut something may be missing.
        assert life.may_have_lost == (number == 2)
        await store.write(Batch([Record("e/x", number, b"1")], number))
        await store.close()
