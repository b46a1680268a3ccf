from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import msgspec
import pytest

from agent.core.replica import Record
from agent.errors import InUse, Unavailable, VxmeshError
from agent.model import Publish, Sandbox
from agent.restart import begin
from agent.store import SLACK, Batch, Holes, PeerBatch, Store, must_outlive_power, reset

BOX = Sandbox("1" * 16, "box", "/proc/1/ns/net", 7, 1, 2, 3.0, publishes=(Publish(80, 8080),))


async def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.set_meta({"node": "n"})
    await store.write(Batch([Record("b", 1, b"x"), Record("a", 2, b"y")], 2))
    await store.write(Batch([Record("b", 3, b"z")], 3, sandboxes={BOX.id: BOX}))
    await store.close()
    back = Store(tmp_path)
    meta, records, boxes = back.load()
    assert meta == {"node": "n", "version": "3"}
    assert records == [Record("a", 2, b"y"), Record("b", 3, b"z")]
    assert boxes == [BOX]
    await back.write(Batch(version=4, floor=4, sandboxes={BOX.id: None}))
    await back.write(Batch([Record("c", 5, b"")], 5))
    await back.write(Batch(version=6, floor=5))
    assert back.load()[1] == [Record("a", 2, b"y"), Record("b", 3, b"z")]
    assert back.load()[2] == []
    await back.write(Batch([Record("n", 9, b"1")], 9, replace=True))
    assert back.load()[1] == [Record("n", 9, b"1")]
    await back.close()


async def test_many_writes_are_acknowledged_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    done: list[int] = []
    futures = []
    for number in range(200):
        future = store.write(Batch([Record("k", number + 1, b"v")], number + 1))
        future.add_done_callback(lambda _, n=number: done.append(n))  # type: ignore[misc]
        futures.append(future)
    await asyncio.gather(*futures)
    await asyncio.sleep(0)
    assert done == list(range(200))
    await store.close()


async def test_a_second_agent_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(InUse, match="held by another agent"):
        Store(tmp_path)
    await store.close()


async def test_a_damaged_file_is_refused_with_a_way_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    await store.write(Batch([Record(f"k{n}", n + 1, b"v" * 99) for n in range(500)], 500))
    await store.close()
    path = tmp_path / "state.db"
    whole = path.read_bytes()
    for damaged in (b"not a database at all" * 100, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(Unavailable, match="--reset-state"):
            Store(tmp_path).load()
        assert path.read_bytes() == damaged, "nothing is thrown away without being asked to"
    aside = reset(tmp_path)
    assert aside is not None and aside.exists()
    fresh = Store(tmp_path)
    assert fresh.load() == ({}, [], [])
    await fresh.close()
    assert reset(tmp_path / "nowhere") is None


def test_what_must_outlive_a_power_cut() -> None:
    def must(*batches: Batch | PeerBatch) -> bool:
        return must_outlive_power(batches)

    record = Record("x/" + "a" * 16, 1, b"x")
    assert must(Batch([Record("e/a", 1, b"x")]), Batch([record]))
    assert must(Batch(meta={"removed": "by n1"}))
    assert not must(Batch([Record("e/a", 1, b"x")]))
    # What others wrote they tell again, and one that is forgotten once more is forgotten again.
    assert not must(PeerBatch("p", [record], 1, 0), PeerBatch("q", [], 0, 0, gone=True))


def test_a_forgotten_origin_is_kept_while_something_else_is_missing() -> None:
    holes = Holes()
    gone = PeerBatch("p", [], 0, 0, gone=True)
    holes.settle([Batch([Record("x/p", 1, b"x")])], written=False)
    assert holes.admit([gone]) == [False]
    assert holes.admit([Batch([], 1, replace=True), gone]) == [True, True]
    holes.settle([gone], written=True)
    # A hole of its own is no matter: all of it goes.
    holes.settle([PeerBatch("p", [], 1, 0)], written=False)
    assert holes.admit([gone, PeerBatch("p", [], 1, 0)]) == [True, True]


async def test_a_forgotten_origin_leaves_nothing_and_settings_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.set_meta({"node": "a" * 16})
    for origin in "pq":
        await store.write(PeerBatch(origin, [Record("e/a", 1, b"x")], 1, 0))
    await store.write(PeerBatch("p", [], 0, 0, gone=True))
    await store.write(Batch(meta={"removed": "by n1"}))
    await store.close()
    store = Store(tmp_path)
    assert [peer.origin for peer in store.load_peers()] == ["q"]
    assert store.load()[0] == {"node": "a" * 16, "removed": "by n1"}
    with pytest.raises(VxmeshError, match="by n1") as caught:
        begin(store, "boot 1", lambda: "b" * 16)
    assert "--reset-state" in str(caught.value)
    assert "incarnation" not in store.load()[0]
    await store.close()


async def test_what_is_dead_in_the_log_does_not_pile_up(tmp_path: Path) -> None:
    """One key written over and over, of this node's own and of a peer's; one that lives on; one
    whose tombstone is collected: its older value must not rise again."""
    store = Store(tmp_path)
    store.set_meta({"node": "n"})
    rounds, size = 40, 1000
    keys = [f"e/{number}" for number in range(size)]
    version = 1
    still = Record("w/still", 1, b"x")
    await store.write(Batch([still, Record("e/gone", 1, b"x")], 1))
    await store.write(PeerBatch("p", [still, Record("e/gone", 1, b"x")], 1, 0))
    newest: list[Record] = []
    for _ in range(rounds):
        newest = [Record(key, version + n, b"v") for n, key in enumerate(keys, 1)]
        version += size + 1
        both = [*newest, Record("e/gone", version, b"")]
        await store.write(Batch(both, version, floor=version, size=size + 2))
        await store.write(PeerBatch("p", both, version, version, size=size + 2))
    assert store.load()[1] == [still, *newest]
    await store.close()
    db = sqlite3.connect(tmp_path / "state.db")
    for origin in ("", "p"):
        pages = db.execute("SELECT records FROM log WHERE origin = ?", (origin,)).fetchall()
        logged = sum(len(msgspec.msgpack.decode(page)) for (page,) in pages)
        assert logged <= 2 * (2 * (size + 2) + SLACK), f"{logged} of {origin!r}"
    db.close()
    store = Store(tmp_path)
    assert store.load()[1] == [still, *newest]
    (peer,) = store.load_peers()
    assert (peer.records, peer.version, peer.floor) == ([still, *newest], version, version)
    await store.close()
