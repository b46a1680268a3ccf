"""The graph of streams: connected, of few links each, of a small diameter, and calm."""

from __future__ import annotations

import math
import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.topology import EVERYBODY, Topology, distance, neighbours

Graph = dict[str, set[str]]


def ids(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [rng.randbytes(8).hex() for _ in range(count)]


def graph(nodes: list[str], everybody: int = EVERYBODY) -> Graph:
    """The streams as they are used: both ways."""
    topology = Topology(nodes, everybody)
    links: Graph = {node: set() for node in nodes}
    for node in nodes:
        for other in topology.neighbours(node):
            links[node].add(other)
            links[other].add(node)
    return links


def hops(links: Graph, start: str) -> dict[str, int]:
    found, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for other in links[node]:
            if other in links and other not in found:
                found[other] = found[node] + 1
                queue.append(other)
    return found


@given(st.sets(st.text(min_size=1, max_size=16), min_size=1, max_size=120), st.integers(0, 10))
def test_any_set_of_nodes_is_connected(nodes: set[str], everybody: int) -> None:
    links = graph(sorted(nodes), everybody)
    assert set(hops(links, min(nodes))) == nodes
    assert all(node not in others for node, others in links.items())


@given(st.sets(st.text(min_size=1, max_size=16), min_size=1, max_size=EVERYBODY))
def test_few_nodes_have_streams_to_everyone(nodes: set[str]) -> None:
    for node in nodes:
        assert neighbours(node, nodes) == nodes - {node} == neighbours(node, nodes - {node})


@pytest.mark.parametrize("count", [31, 100, 300, 1000, 3000])
def test_links_and_hops_grow_with_the_logarithm(count: int) -> None:
    for seed in range(3):
        links = graph(ids(count, seed))
        degrees = [len(others) for others in links.values()]
        mean = sum(degrees) / count
        assert 1.2 * math.log(count, 3) < mean < 2.6 * math.log(count, 3) + 1, mean
        assert max(degrees) <= 4 * math.log2(count), max(degrees)
        furthest = max(max(hops(links, node).values()) for node in list(links)[:20])
        assert furthest <= math.log2(count), furthest


def test_silent_deaths_do_not_cut_it_in_two() -> None:
    whole = 0
    for seed in range(200):
        rng = random.Random(seed)
        nodes = ids(300, seed)
        links = graph(nodes)
        for dead in rng.sample(nodes, rng.randint(15, 30)):
            for other in links.pop(dead):
                if other in links:
                    links[other].discard(dead)
        whole += set(hops(links, next(iter(links)))) == set(links)
    assert whole >= 198


@pytest.mark.parametrize("count", [100, 1000])
def test_a_join_moves_few_streams(count: int) -> None:
    for seed in range(5):
        nodes = ids(count + 1, seed)
        before, after = graph(nodes[:-1]), graph(nodes)
        moved = sum(len(after[n] ^ before.get(n, set())) for n in nodes) / 2
        # Its own, the fingers that now point at it, and as many that pointed at its successor.
        assert moved <= 10 * math.log2(count), moved


def test_someone_is_always_nearer_to_any_other() -> None:
    # What core/stability.py rests on: going to the neighbour nearest to an origin arrives there.
    nodes = ids(200, 1)
    links = graph(nodes)
    for origin in nodes[:50]:
        for node in nodes:
            if node != origin:
                nearest = min(distance(other, origin) for other in links[node])
                assert nearest < distance(node, origin)
