"""Records over many streams: how often they cross one, what mends a tree, when tombstones go."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from agent.core.session import BATCH
from tests.sim.calm import CALM, Net
from tests.sim.network import Weather


def ids(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [rng.randbytes(8).hex() for _ in range(count)]


def settled(count: int, seed: int = 1, weather: Weather = CALM) -> Net:
    net = Net(ids(count, seed), seed, weather)
    net.run(3.0)
    return net


def test_after_the_first_a_record_takes_one_delta_a_node_and_few_hops() -> None:
    net = settled(100)
    writers = list(net.stores)[:10]
    for writer in writers:
        net.write(writer)
    net.run(2.0)
    assert net.equal()
    for _ in range(5):
        start = net.clock.now
        marks = [(writer, net.write(writer)) for writer in writers]
        net.run(0.5)
        for mark in marks:
            assert net.carried[mark] == 99
            assert max(net.came[mark].values()) - start < 8 * CALM.delay[1]
    crossings = [n for (_, _, version), n in net.crossed.items() if version > 1]
    assert set(crossings) == {1}


def test_in_a_wide_network_a_record_crosses_a_stream_once() -> None:
    net = settled(60, weather=Weather(0.0, 0.0, (0.001, 0.08), 0))
    rng = random.Random(5)
    marks = []
    for step in range(200):
        writer = rng.choice(list(net.stores)[:8])
        marks.append((writer, net.write(writer, rng.choice((1, 1, 5)))))
        net.run(rng.uniform(0, 0.2))
        if step == 50:
            net.crossed.clear()  # the trees have grown
            marks.clear()
    net.run(3.0)
    assert net.equal()
    crossings = list(net.crossed.values())
    assert sum(crossings) / len(crossings) <= 1.05
    carried = [net.carried[mark] for mark in marks]
    assert sum(carried) / len(carried) <= 1.15 * 59


def test_where_all_have_streams_nothing_is_relayed() -> None:
    net = settled(12)
    for node in net.stores:
        net.write(node)
    net.run(2.0)
    net.messages.clear()
    for node in net.stores:
        net.write(node)
    net.run(3.0)
    assert net.equal()
    assert net.messages["Delta"] == 12 * 11
    assert not {"Have", "Graft", "Prune", "Summary"} & set(net.messages)


def test_whom_its_own_node_does_not_reach_others_bring_it() -> None:
    net = settled(5)
    a, b, *_ = net.stores
    net.close(a, b)
    net.write(a)
    net.run(2.5)
    assert net.stores[b].version(a) == 1
    # From then on it comes at once, by the one that was asked.
    net.write(a)
    net.run(0.1)
    assert net.stores[b].version(a) == 2
    # And no more when the stream is there again.
    net.open(a, b)
    net.run(2.0)
    net.write(a)
    net.run(1.0)
    net.messages.clear()
    net.write(a)
    net.run(1.0)
    assert net.equal() and net.messages["Delta"] == 4


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_that_lost_its_nodes_is_mended_by_the_next_record(seed: int) -> None:
    net = settled(120, seed)
    writer, *rest = net.stores
    for _ in range(3):
        net.write(writer)
        net.run(0.5)
    for node in random.Random(seed).sample(rest, 10):
        net.kill(node)
    start = net.clock.now
    mark = writer, net.write(writer)
    net.run(3.0)
    times = [net.came[mark][node] for node in net.live if node != writer]
    assert len(times) == 109
    assert max(times) - start < 1.0
    net.write(writer)
    net.run(0.05)
    assert net.equal(), "the mended tree pushes at once"


def test_a_new_stream_does_not_carry_what_the_trees_carry() -> None:
    net = settled(60)
    for _ in range(2):
        for node in net.stores:
            net.write(node)
        net.run(1.0)
    nodes = list(net.stores)
    a = nodes[0]
    b = next(n for n in nodes[1:] if (a, n) not in net.sessions)
    net.open(a, b)
    net.run(1.0)
    net.crossed.clear()
    for node in nodes:
        net.write(node)
    net.run(1.0)
    assert net.equal()
    over = Counter(key[1] for key in net.crossed if key[0] == frozenset((a, b)))
    assert set(over) <= {a, b}


def test_who_joins_gets_everything_about_once() -> None:
    nodes = ids(61, 3)
    joiner, old = nodes[0], nodes[1:]
    net = Net(nodes, 3)
    for a, b in [pair for pair in net.sessions if pair[0] == joiner]:
        net.close(a, b)
    net.run(3.0)
    for node in old:
        net.write(node, 20)
    net.write(old[0], BATCH * 3)
    net.run(3.0)
    assert not any(net.stores[joiner].version(node) for node in old)
    net.crossed.clear()
    for peer in sorted(net.topology.neighbours(joiner)):
        net.open(joiner, peer)
        net.run(0.02)
    net.run(2.0)
    assert all(net.stores[joiner].version(node) for node in old)
    assert net.equal()
    records = 60 * 20 + BATCH * 3
    assert sum(net.crossed.values()) <= 1.1 * records


def test_a_storm_of_loss_ends_with_all_the_same() -> None:
    net = settled(60, weather=Weather(0.3, 0.2, (0.001, 0.3), 0))
    rng = random.Random(2)
    for _ in range(50):
        net.write(rng.choice(list(net.stores)))
        net.run(0.2)
    net.wire.weather = CALM
    net.run(6.0)
    assert net.equal()


@pytest.mark.parametrize("count", [8, 60])
def test_tombstones_go_once_every_live_node_has_them(count: int) -> None:
    net = settled(count)
    origin, away, *_ = net.stores
    store = net.stores[origin]
    net.write(origin, 3)
    net.run(2.0)
    streams = [peer for node, peer in net.sessions if node == away]
    for peer in streams:
        net.close(away, peer)
    store.replica.delete("e/1")
    net.write(origin)
    net.run(30.0)
    assert store.floor(origin) < 4, "one that is held for live lacks it"
    net.live.discard(away)
    net.run(15.0)
    assert store.floor(origin) == 5
    # Who was away comes back: nothing rises from the dead.
    net.live.add(away)
    for peer in streams:
        net.open(away, peer)
    net.write(origin)
    net.run(15.0)
    keys = [record.key for record in net.stores[away].replica.items(origin)]
    assert keys == ["e/0", "e/2", "e/4", "e/5"]
    assert net.equal() and store.floor(origin) == 6, "and it counts again"


def test_a_seed_replays() -> None:
    def play() -> tuple[Counter[str], dict[tuple[str, int], dict[str, float]]]:
        net = settled(40, weather=Weather(0.1, 0.1, (0.001, 0.1), 0))
        for node in list(net.stores)[:5]:
            net.write(node)
            net.run(0.3)
        return net.messages, net.came

    assert play() == play()
