"""What reaches the disk, and that a restart from it knows what was known."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from pathlib import Path

import pytest

from agent.core.replica import Delta, Record, Replica
from agent.errors import Unavailable
from agent.listeners import ToStore
from agent.model import Network, Node, encode
from agent.node import NodeState
from agent.requests import parse_endpoint, parse_network
from agent.restart import begin, recall
from agent.store import Batch, PeerBatch, Store
from agent.views import Status
from tests.sim.keys import sealer_of

OTHER = "2" * 16


def make(id: str = "1" * 16) -> NodeState:
    node = Node(id, f"n{id[0]}", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    return NodeState(node, lambda: 1.0, random.Random(1))


def reload(store: Store) -> NodeState:
    fresh = make()
    meta, records, sandboxes = store.load()
    fresh.restore(records, sandboxes, int(meta.get("version", 0)), int(meta.get("floor", 0)))
    for known in store.load_peers():
        fresh.restore_peer(known.origin, known.records, known.version, known.floor)
    return fresh


def network(name: str) -> Record:
    spec = Network(name * 16, name, "overlay", (f"10.{ord(name)}.0.0/24",),
                   (f"10.{ord(name)}.0.1",), "", ord(name), 0, False, False, {}, {}, 0.0,
                   OTHER)  # fmt: skip
    return Record(f"w/{name * 16}", 0, encode(spec))


async def test_published_only_when_on_disk(tmp_path: Path) -> None:
    node, store = make(), Store(tmp_path)
    published: list[int] = []
    storing = ToStore(node, store, lambda: published.append(node.replica.published))
    web = node.create_network(parse_network("web", subnets=["10.1.0.0/24"]))
    assert node.version(node.me) == 0
    await storing.durable()
    assert node.version(node.me) == node.replica.written() > 0
    assert published == [node.replica.written()]
    node.create_endpoint(web.id, parse_endpoint("a"))
    await storing.durable()
    back = reload(store)
    assert back.find_endpoint("a")[1] == node.find_endpoint("a")[1]
    assert back.addresses[web.id].ring.segments() == node.addresses[web.id].ring.segments()
    await store.close()


async def test_seals_of_others_are_kept_with_what_they_cover(tmp_path: Path) -> None:
    origin, node, store = Replica(OTHER, sealer_of(OTHER)), make(), Store(tmp_path)
    node.replica.sealer = sealer_of(node.me)
    storing = ToStore(node, store, lambda: None)

    def write(key: str, value: bytes = b"v") -> None:
        known = origin.put(f"e/{key}", value).version - 1
        origin.publish(known + 1)
        made = Delta(OTHER, known, known + 1, origin.since(OTHER, known))
        assert origin.prove(made, introduce=True)
        assert node.merge(made, OTHER)

    for number in range(1500):
        write(f"stays{number}" if number % 300 == 0 else "changes", b"%d" % number)
        if number % 40 == 0:
            storing.keep_peers()
    storing.keep_peers()
    await store.close()
    store = Store(tmp_path)
    (kept,) = store.load_peers()
    assert len(kept.seals) < 100, "those that were joined or dropped are still there"
    back = make()
    back.replica.sealer = sealer_of(back.me, lambda id: True)
    back.restore_peer(OTHER, kept.records, kept.version, kept.floor, kept.seals)
    made = back.delta(OTHER, 0)
    assert [r.key for r in made.records] == [r.key for r in origin.since(OTHER, 0)]
    third = make("3" * 16)
    third.replica.sealer = sealer_of(third.me)
    assert third.merge(made, back.me)
    await store.close()


async def test_what_others_wrote_is_kept_behind(tmp_path: Path) -> None:
    node, store = make(), Store(tmp_path)
    storing = ToStore(node, store, lambda: None)
    a, b = (network(n)._replace(version=v) for n, v in (("a", 1), ("b", 2)))
    node.merge(Delta(OTHER, 0, 2, [a, b]))
    storing.keep_peers()
    await store.close()
    store = Store(tmp_path)
    back = reload(store)
    assert {n.name for n in back.catalogue.all()} == {"a", "b"}
    assert back.digest()[OTHER] == (2, 0)
    await store.close()


async def test_a_removal_whose_tombstone_is_collected_at_once_is_kept(tmp_path: Path) -> None:
    node, store = make(), Store(tmp_path)
    storing = ToStore(node, store, lambda: None)
    a, b = (network(n)._replace(version=v) for n, v in (("a", 1), ("b", 2)))
    node.merge(Delta(OTHER, 0, 2, [a, b]))
    storing.keep_peers()
    # Removed and collected before the next write: the records after 2 say nothing of it.
    assert node.merge(Delta(OTHER, 2, 3, [Record(a.key, 3, b"")]))
    assert node.merge(Delta(OTHER, 3, 4, [], 3))
    assert node.since(OTHER, 2) == []
    storing.keep_peers()
    await store.close()
    store = Store(tmp_path)
    assert {n.name for n in reload(store).catalogue.all()} == {"b"}
    await store.close()


async def test_an_own_record_goes_to_disk_with_what_it_rests_on(tmp_path: Path) -> None:
    node, store = make(), Store(tmp_path)
    storing = ToStore(node, store, lambda: None)
    node.merge(Delta(OTHER, 0, 1, [network("a")._replace(version=1)]))
    node.describe(node.nodes[node.me])
    await storing.durable()
    assert {n.name for n in reload(store).catalogue.all()} == {"a"}
    await store.close()


async def test_a_failed_write_is_made_up_for_before_anything_is_published(tmp_path: Path) -> None:
    node, store = make(), Store(tmp_path)
    storing = ToStore(node, store, lambda: None)
    node.create_network(parse_network("a", subnets=["10.1.0.0/24"]))
    await storing.durable()
    before = node.version(node.me)
    commit = store._commit

    def full(batches: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    store._commit = full  # type: ignore[method-assign]
    node.create_network(parse_network("b", subnets=["10.2.0.0/24"]))
    with pytest.raises(Unavailable, match="disk is full"):
        await storing.durable()
    assert node.version(node.me) == before, "what is not on disk is not told"
    store._commit = commit  # type: ignore[method-assign]
    node.create_network(parse_network("c", subnets=["10.3.0.0/24"]))
    await storing.durable()
    assert node.version(node.me) == node.replica.written()
    assert {n.name for n in reload(store).catalogue.all()} == {"a", "b", "c"}
    await store.close()


async def test_a_number_too_large_for_the_disk_does_not_stop_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(Unavailable):
        await store.write(PeerBatch(OTHER, [], 1 << 63, 0))
    with pytest.raises(Unavailable, match="could not be written before"):
        await store.write(PeerBatch(OTHER, [], 4, 0))
    await store.write(PeerBatch(OTHER, [], 5, 0, replace=True))
    await store.write(PeerBatch(OTHER, [], 6, 0))
    assert [known.version for known in store.load_peers()] == [6]
    await store.close()


async def test_who_counts_as_gone_does_so_after_a_restart(tmp_path: Path) -> None:
    # Else a restart would bring names back that were withdrawn days ago.
    node, store = make(), Store(tmp_path)
    begin(store, "boot", lambda: node.me)
    storing = ToStore(node, store, lambda: None)
    other = Node(OTHER, "n2", "10.99.0.2", 7946, "10.99.0.2", 4789, "0", 0.0, 1500)
    node.merge(Delta(OTHER, 0, 1, [Record(f"n/{OTHER}", 1, encode(other))]))
    node.describe(node.nodes[node.me])
    node.set_status(OTHER, Status("unreachable", "silent", 1.0, True, 7))
    await storing.durable()
    await store.close()
    store = Store(tmp_path)
    life = begin(store, "boot", lambda: node.me)
    again = make()
    recall(again, store, life)
    assert again.withdrawn == {OTHER} and again.status[OTHER].incarnation == 7
    storing = ToStore(again, store, lambda: None)
    again.set_status(OTHER, Status("alive", "", 2.0, False, 8))
    again.describe(again.nodes[again.me])
    await storing.durable()
    await store.close()
    store = Store(tmp_path)
    assert begin(store, "boot", lambda: node.me).withdrawn == {}
    await store.close()


async def test_a_disk_that_stays_full_is_tried_once_a_second(tmp_path: Path) -> None:
    node, store = make(), Store(tmp_path)
    storing = ToStore(node, store, lambda: None)

    def full(batches: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    store._commit = full  # type: ignore[method-assign]
    for number in range(20):
        node.create_network(parse_network(f"n{number}", subnets=[f"10.{number}.0.0/24"]))
    with pytest.raises(Unavailable):
        await storing.durable()
    handle = storing._again
    assert handle is not None
    node.create_network(parse_network("more", subnets=["10.99.0.0/24"]))
    with pytest.raises(Unavailable):
        await storing.durable()
    assert storing._again is handle, "one timer, however much has failed"
    handle.cancel()
    await store.close()


async def test_a_write_of_ours_looks_only_at_origins_that_changed(tmp_path: Path) -> None:
    """The price of a change must not be that of the cluster."""
    store = Store(tmp_path)
    node = make()
    storing = ToStore(node, store, lambda: None)
    for number in range(200):
        node.merge(Delta(f"p{number}", 0, 1, [Record("e/none", 1, b"")]))
    storing.keep_peers()
    looked: list[str] = []
    state = storing._state

    def count(origin: str) -> tuple[int, int, int]:
        looked.append(origin)
        return state(origin)

    storing._state = count  # type: ignore[method-assign]
    node.merge(Delta("p7", 1, 2, [Record("e/none", 2, b"")]))
    node.describe(node.nodes[node.me])
    assert looked == ["p7"]
    await storing.durable()
    await store.close()


async def test_the_disk_is_told_how_much_lives(tmp_path: Path) -> None:
    """Or it would write an origin anew that has nothing dead."""
    store = Store(tmp_path)
    node = make()
    told: list[tuple[int, bool]] = []
    write = store.write

    def spy(batch: Batch | PeerBatch) -> asyncio.Future[None]:
        if isinstance(batch, PeerBatch):
            told.append((batch.size, batch.reseal))
        return write(batch)

    store.write = spy  # type: ignore[method-assign]
    storing = ToStore(node, store, lambda: None)
    node.merge(Delta("p", 0, 3, [Record(f"e/{n}", n, b"") for n in (1, 2, 3)]))
    node.replica.all_seals = lambda origin: ([], 1)  # type: ignore[method-assign]
    storing.keep_peers()
    assert told == [(3, False), (3, True)]
    await storing.durable()
    await store.close()
