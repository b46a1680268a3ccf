"""The simulated disk gives back what the real store does, whatever was written."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.replica import Record
from agent.model import Sandbox
from agent.store import Batch, PeerBatch, Store
from tests.sim.disk import Disk, VirtualLoop
from tests.sim.network import Clock

records = st.lists(
    st.builds(
        Record,
        st.sampled_from(["e/a", "e/b", "r/a", "w/a", "x/a"]),
        st.integers(1, 20),
        st.sampled_from([b"", b"x", b"y"]),
    ),
    max_size=4,
    unique_by=(lambda r: r.key, lambda r: r.version),
)
boxes = st.dictionaries(
    st.sampled_from("12"),
    st.sampled_from([None, Sandbox("1", "box", "/", 1, 1, 1, 0.0)]),
    max_size=2,
)
settings_of = st.dictionaries(st.just("removed"), st.sampled_from(["x", "y"]))
own = st.builds(
    Batch, records, st.integers(0, 20), st.integers(0, 20), st.booleans(), boxes, settings_of
)
peers = st.builds(
    PeerBatch,
    st.sampled_from("pq"),
    records,
    st.integers(1, 20),
    st.integers(0, 20),
    st.booleans(),
    st.booleans(),
)


def read(store: Disk | Store) -> object:
    meta, held, sandboxes = store.load()
    found = {}
    for peer in store.load_peers():
        found[peer.origin] = (sorted(peer.records), peer.version, peer.floor)
    return meta, sorted(held), sorted(sandboxes, key=lambda s: s.id), found


@settings(max_examples=60, deadline=None)
@given(st.lists(own | peers, max_size=8))
def test_it_holds_what_the_store_holds(batches: list[Batch | PeerBatch]) -> None:
    clock = Clock()
    disk = Disk(clock, random.Random(1), (0.001, 0.01), 0.0)
    disk.set_meta({"node": "n"})
    for batch in batches:
        disk.write(batch)
    clock.run_until(clock.now + 1)

    async def write() -> object:
        with tempfile.TemporaryDirectory() as directory:
            store = Store(Path(directory))
            store.set_meta({"node": "n"})
            for batch in batches:
                await store.write(batch)
            found = read(store)
            await store.close()
            back = Store(Path(directory))
            assert read(back) == found
            await back.close()
            return found

    assert read(disk) == asyncio.run(write())


def test_what_a_power_cut_takes_is_what_was_not_synced() -> None:
    clock = Clock()
    disk = Disk(clock, random.Random(1), (0.001, 0.001), 0.0)

    def write(key: str, version: int) -> None:
        disk.write(Batch([Record(key, version, b"x")], version))
        clock.run_until(clock.now + 0.01)

    write("e/a", 1)
    write("r/n", 2)  # synced, and with it what went before
    write("e/b", 3)
    write("e/c", 4)
    assert disk.cut_power(kept=1) == 1
    assert [record.key for record in disk.load()[1]] == ["e/a", "r/n", "e/b"]
    assert disk.load()[0] == {"version": "3"}
    disk.loop = VirtualLoop(clock)  # another life
    write("e/d", 4)
    write("x/n", 5)
    assert disk.cut_power(kept=0) == 0
    assert [record.key for record in disk.load()[1]] == ["e/a", "r/n", "e/b", "e/d", "x/n"]


def test_a_killed_process_loses_only_what_was_not_committed() -> None:
    for committed in (False, True):
        clock = Clock()
        disk = Disk(clock, random.Random(1), (0.1, 0.1), 0.0)
        for version in range(1, 4):
            disk.write(Batch([Record(f"e/{version}", version, b"x")], version))
            clock.run_until(clock.now + 0.06)
        # The first is written, the second is in the making, the third waits.
        disk.kill(committed)
        assert len(disk.load()[1]) == (2 if committed else 1)
