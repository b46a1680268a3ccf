"""A member that does not pass on what it was given: what it forges is refused, and nobody is
misled. Its own records are its own affair; of others' it holds the true ones and no key."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from agent.core.replica import Delta, Record
from agent.core.session import Message
from agent.errors import VxmeshError
from agent.requests import parse_endpoint, parse_network
from tests.sim.cluster import Cluster
from tests.sim.keys import sealed
from tests.sim.network import Weather

FAIR = Weather(loss=0.0, duplication=0.0, delay=(0.0005, 0.002), partitions=0)
STORM, CALM = 8.0, 20.0  # virtual s of load, and until all must have the same


class Liar:
    """Changes the deltas of other origins that hostile nodes send, by one of its tricks."""

    def __init__(self, trick: Callable[[Liar, Delta], Delta | None], rng: random.Random) -> None:
        self.trick, self.rng = trick, rng
        self.old: dict[str, Delta] = {}  # origin -> the first that was to be sent
        self.told = 0

    def tamper(self, sender: str, message: Message) -> Message | None:
        if not isinstance(message, Delta) or message.origin == sender:
            return message
        self.old.setdefault(message.origin, message)
        if not message.records or self.rng.random() < 0.3:
            return message
        changed = self.trick(self, message)
        self.told += changed is not message
        return changed

    def alter_a_value(self, delta: Delta) -> Delta:
        place = self.rng.randrange(len(delta.records))
        records = list(delta.records)
        records[place] = records[place]._replace(value=records[place].value + b"!")
        return replace(delta, records=records)

    def bury(self, delta: Delta) -> Delta:
        """A tombstone where something lives."""
        first, *rest = delta.records
        return replace(delta, records=[first._replace(value=b""), *rest])

    def forge_with_a_seal_of_its_own(self, delta: Delta) -> Delta:
        key, version, _ = delta.records[-1]
        node = Record(key, version, b"forged")
        fresh = replace(delta, records=[*delta.records[:-1], node], seals=())
        made = replace(sealed(replace(fresh, origin="f" * 16)), origin=delta.origin)
        return replace(made, certificate=delta.certificate)

    def add_a_record(self, delta: Delta) -> Delta:
        upto = delta.upto + 1
        return replace(delta, upto=upto, records=[*delta.records, Record("e/forged", upto, b"x")])

    def replay_as_new(self, delta: Delta) -> Delta:
        """What the origin once said, under the version of what it says now."""
        old, (first, *rest) = self.old[delta.origin].records[0], delta.records
        if old == first:
            return delta
        return replace(delta, records=[old._replace(version=first.version), *rest])

    def claim_more(self, delta: Delta) -> Delta:
        """Whoever believed that would wait for nothing that the origin writes from now on."""
        return replace(delta, upto=delta.upto + 1_000_000)

    def claim_a_floor(self, delta: Delta) -> Delta:
        return replace(delta, floor=1 << 61)

    def reset_to_nothing(self, delta: Delta) -> Delta:
        return replace(
            delta, base=0, upto=delta.upto + 10**6, records=[], reset=True, complete=True
        )

    def forget_all_but_this(self, delta: Delta) -> Delta:
        """A whole state in which next to nothing is left. None of it is false."""
        return replace(delta, base=0, records=[delta.records[-1]], reset=True, complete=True)

    def leave_out_seals(self, delta: Delta) -> Delta:
        return replace(delta, seals=delta.seals[1:])

    def drop(self, delta: Delta) -> None:
        return None


REFUSED = [
    Liar.alter_a_value,
    Liar.bury,
    Liar.forge_with_a_seal_of_its_own,
    Liar.add_a_record,
    Liar.replay_as_new,
    Liar.claim_more,
    Liar.claim_a_floor,
    Liar.reset_to_nothing,
    Liar.leave_out_seals,
]


def play(trick: Callable[[Liar, Delta], Delta | None], seed: int) -> tuple[Cluster, Liar]:
    cluster = Cluster(seed, 10, FAIR, everybody=3)
    rng = random.Random(seed)
    cluster.hostile = set(rng.sample(sorted(cluster.nodes), 2))
    liar = Liar(trick, rng)
    clock, honest = cluster.clock, sorted(cluster.nodes.keys() - cluster.hostile)
    first = cluster.nodes[honest[0]].state
    network = first.create_network(parse_network("net", subnets=["10.0.0.0/16"])).id
    clock.run_until(clock.now + 2.0)
    start = clock.now
    cluster.tamper = liar.tamper

    def step(number: int) -> None:
        node = cluster.nodes[rng.choice(honest)]
        local = sorted(id for m in node.state.members.values() for id in m.local)
        if local and rng.random() < 0.3:
            node.state.remove_endpoints([rng.choice(local)])
        elif node.state.catalogue.get(network):
            spec = parse_endpoint(f"e{number}", addresses=[f"10.0.{number}.9"])
            with contextlib.suppress(VxmeshError):  # an owner may not have heard yet
                node.state.commit(node.allocate(lambda: node.state.reserve(network, [spec])))

    for number in range(60):
        clock.at(start + rng.uniform(0, STORM), lambda number=number: step(number))  # type: ignore[misc]
    clock.run_until(start + STORM + CALM)
    return cluster, liar


def refused(cluster: Cluster) -> Counter[str]:
    return sum((Counter(node.state.refused) for node in cluster.nodes.values()), Counter[str]())


@pytest.mark.parametrize("trick", REFUSED)
@pytest.mark.parametrize("seed", range(3))
def test_what_a_hostile_relay_makes_up_is_refused_and_misleads_nobody(
    trick: Callable[[Liar, Delta], Delta | None], seed: int
) -> None:
    cluster, liar = play(trick, seed)
    assert liar.told > 10, "nothing was relayed by the liars: nothing was tested"
    assert sum(refused(cluster).values()) > 5
    cluster.check_always()
    cluster.check_equal()


@pytest.mark.parametrize("seed", range(3))
def test_what_a_hostile_relay_drops_comes_by_others(seed: int) -> None:
    cluster, liar = play(Liar.drop, seed)
    assert liar.told > 10
    assert not +refused(cluster)
    cluster.check_equal()


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_state_of_a_hostile_relay_takes_nothing_away(seed: int) -> None:
    cluster, liar = play(Liar.forget_all_but_this, seed)
    assert liar.told > 10
    cluster.check_equal()
    assert not any(node.state.replica.doubted for node in cluster.nodes.values())


def test_honest_relays_are_never_refused() -> None:
    cluster, _ = play(lambda liar, delta: delta, 1)
    assert not +refused(cluster)
    cluster.check_equal()
