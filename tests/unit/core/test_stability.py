"""What all have, added up on the way to the origin."""

from __future__ import annotations

import random

from agent.core.stability import NONE, WHOLE_EVERY, Reach, Seen, Stability
from agent.core.topology import Topology, position

Digest = dict[str, tuple[int, int]]


class Cluster:
    """Nodes that have `versions` of all origins, and the streams of the topology."""

    def __init__(self, count: int, everybody: int = 30) -> None:
        rng = random.Random(count)
        self.nodes = [rng.randbytes(8).hex() for _ in range(count)]
        self.parts = {node: Stability(node) for node in self.nodes}
        self.has = {node: dict.fromkeys(self.nodes, 1) for node in self.nodes}
        topology = Topology(self.nodes, everybody)
        self.streams: dict[str, set[str]] = {node: set() for node in self.nodes}
        for a in self.nodes:
            for b in topology.neighbours(a):
                self.join(a, b)

    def join(self, a: str, b: str) -> None:
        for one, other in ((a, b), (b, a)):
            if other not in self.streams[one]:
                self.streams[one].add(other)
                self.parts[one].up(other)

    def part(self, a: str, b: str) -> None:
        for one, other in ((a, b), (b, a)):
            self.streams[one].discard(other)
            self.parts[one].down(other)

    def round(self) -> int:
        """Everyone tells everyone it has a stream to; how many entries were told."""
        told = 0
        for a in self.nodes:
            digest = {origin: (version, 0) for origin, version in self.has[a].items()}
            for b in sorted(self.streams[a]):
                seen = self.parts[a].tell(b, digest)
                if seen:
                    told += len(seen.entries)
                    self.parts[b].take(a, seen)
        return told

    def stable(self, origin: str, live: list[str] | None = None) -> int:
        live = self.nodes if live is None else live
        return self.parts[origin].stable(self.has[origin][origin], live)


def test_the_lowest_version_of_all_arrives_at_each_origin() -> None:
    for count, everybody in ((2, 30), (12, 30), (12, 3), (200, 30)):
        cluster = Cluster(count, everybody)
        for _ in range(12):
            cluster.round()
        assert [cluster.stable(node) for node in cluster.nodes] == [1] * count
        origin, behind = cluster.nodes[0], cluster.nodes[-1]
        for node in cluster.nodes:
            if node != behind:
                cluster.has[node][origin] = 7
        for _ in range(12):
            cluster.round()
        assert cluster.stable(origin) == 1
        cluster.has[behind][origin] = 5
        for _ in range(12):
            cluster.round()
        assert cluster.stable(origin) == 5


def test_nothing_is_told_when_nothing_changes() -> None:
    cluster = Cluster(60, 3)
    for _ in range(12):
        cluster.round()
    assert cluster.round() == 0
    cluster.has[cluster.nodes[5]][cluster.nodes[0]] = 2
    told = sum(cluster.round() for _ in range(10))
    assert 1 <= told <= 3, "as far as a node whose side has others with less, and no further"


def test_who_is_not_counted_keeps_everything() -> None:
    cluster = Cluster(40, 3)
    for _ in range(12):
        cluster.round()
    origin, lost = cluster.nodes[0], cluster.nodes[7]
    for peer in list(cluster.streams[lost]):
        cluster.part(lost, peer)
    for _ in range(12):
        cluster.round()
    assert cluster.stable(origin) == 0
    rest = [node for node in cluster.nodes if node != lost]
    assert cluster.stable(origin, rest) == 1
    assert cluster.stable(origin, rest[:-1]) == 0, "one is counted who is held for dead"


def test_who_moves_to_another_stream_is_counted_once() -> None:
    cluster = Cluster(40, 3)
    for _ in range(12):
        cluster.round()
    origin, mover = cluster.nodes[0], cluster.nodes[9]
    cluster.join(origin, mover)
    for _ in range(3):
        cluster.round()
        assert cluster.stable(origin) in (0, 1)
    assert cluster.stable(origin) == 1
    cluster.part(origin, mover)
    for _ in range(3):
        cluster.round()
    assert cluster.stable(origin) == 1


def test_what_was_lost_is_told_again_in_time() -> None:
    a, b = Stability("a"), Stability("b")
    a.up("b")
    b.up("a")
    digest = {"a": (3, 0), "b": (2, 0)}
    a.tell("b", digest)  # and that is lost
    assert b.stable(2, ["a", "b"]) == 0
    for _ in range(WHOLE_EVERY):
        seen = a.tell("b", digest)
        if seen:
            b.take("a", seen)
    assert b.stable(2, ["a", "b"]) == 2


def test_a_sum_that_only_looks_complete_is_not_taken() -> None:
    part = Stability("a")
    for peer in ("b", "c"):
        part.up(peer)
    twice = {"a": Reach(9, position("b"))}
    part.take("b", Seen(twice))
    part.take("c", Seen(twice))
    assert part.stable(9, ["a", "b", "c"]) == 0


def test_what_is_told_of_changes_alone_is_all_that_is_to_be_told() -> None:
    rng = random.Random(3)
    quick, thorough = Stability("me"), Stability("me")
    origins, peers = [f"o{n}" for n in range(20)], [f"p{n}" for n in range(5)]
    digest: Digest = {}
    told = 0
    for _ in range(3000):
        peer = rng.choice(peers)
        some = rng.sample(origins, 3)
        match rng.randrange(12):
            case 0:
                quick.up(peer)
                thorough.up(peer)
            case 1:
                quick.down(peer)
                thorough.down(peer)
            case 2 | 3 | 4:
                entries = {o: rng.choice([NONE, Reach(rng.randrange(5), 7)]) for o in some}
                seen = Seen(entries, rng.random() < 0.3)
                quick.take(peer, seen)
                thorough.take(peer, seen)
            case 5 | 6:
                digest = {**digest, some[0]: (rng.randrange(9), 0)}
                if rng.random() < 0.1:
                    digest.pop(some[1], None)
            case _:
                thorough._move()
                found, wanted = quick.tell(peer, digest), thorough.tell(peer, digest)
                assert found == wanted
                told += bool(found and not found.whole)
    assert told > 100
