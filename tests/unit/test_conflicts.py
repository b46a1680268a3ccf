"""Networks that two halves of a cluster made at once: what lasts, and who is told of what."""

from __future__ import annotations

import random

import pytest

from agent.core.clock import stamp_at
from agent.core.replica import Delta
from agent.errors import Conflict
from agent.model import Network, Node, Notice, Sandbox
from agent.node import NodeState
from agent.plan import Plan
from agent.requests import parse_endpoint, parse_network
from agent.views import Change


class Half(NodeState):
    """A node with a wall clock of its own."""

    def __init__(self, number: int, now: float = 1000.0) -> None:
        address = f"10.99.0.{number}"
        me = Node(f"{number}" * 16, f"n{number}", address, 7946, address, 4789, "0", 0.0, 1500)
        self.now = now
        super().__init__(me, lambda: self.now, random.Random(number))
        self.notices: list[Notice] = []
        self.changes: list[Change] = []
        self.listeners.append(self._heard)
        self.describe(me)

    def _heard(self, change: Change) -> None:
        self.notices += change.notices
        self.changes.append(change)

    def make(self, **fields: object) -> Network:
        wanted = {"name": "web", "subnets": ["10.1.0.0/24"], "vni": 500, **fields}
        return self.create_network(parse_network(**wanted))  # type: ignore[arg-type]


def meet(*halves: NodeState) -> None:
    """Until all have all."""
    for _ in range(3):
        for source in halves:
            source.replica.publish(source.replica.written())
            for target in halves:
                known = target.version(source.me)
                records = source.since(source.me, known)
                if source is not target:
                    assert target.merge(Delta(source.me, known, source.version(source.me), records))


@pytest.fixture
def halves() -> tuple[Half, Half]:
    return Half(1), Half(2, now=1001.0)


def test_the_loser_stays_what_it_became_when_the_winner_goes(halves: tuple[Half, Half]) -> None:
    a, b = halves
    mine, theirs = a.make(), b.make()
    meet(a, b)
    became = b.catalogue.get(theirs.id)
    assert became == a.catalogue.get(theirs.id) == b.catalogue.written(theirs.id)
    assert became and (became.name, became.born) == (f"web-{theirs.id[:6]}", theirs.born)
    a.remove_network(mine.id)
    meet(a, b)
    for half in halves:
        assert list(half.catalogue.all()) == [became]
        assert half.catalogue.conflicts() == set()


def test_it_does_so_too_when_its_creator_is_away(halves: tuple[Half, Half]) -> None:
    a, b = halves
    mine, theirs = a.make(), b.make()
    b.replica.publish(b.replica.written())
    assert a.merge(Delta(b.me, 0, b.version(b.me), b.since(b.me, 0)))  # and no way back
    shown = a.catalogue.get(theirs.id)
    a.remove_network(mine.id)
    kept = a.catalogue.get(theirs.id)
    assert shown and kept and (kept.name, kept.vni) == (shown.name, shown.vni)
    b.now += 7
    meet(a, b)
    assert [(n.name, n.vni) for n in b.catalogue.all()] == [(shown.name, shown.vni)]
    b.remove_network(theirs.id)
    meet(a, b)
    assert not [*a.catalogue.all(), *b.catalogue.all()]


def test_each_node_is_told_of_each_conflict_once(halves: tuple[Half, Half]) -> None:
    a, b = halves
    c = Half(3)
    mine, theirs = a.make(), b.make()
    meet(a, b, c)
    b.make(name="later", subnets=["10.7.0.0/24"], vni=700)
    meet(a, b, c)
    for half in (a, b, c):
        assert {n.kind for n in half.notices} == {"network.conflict"}
        told = sorted((n.fields["what"], n.fields["network"], n.fields["with"])
                      for n in half.notices)  # fmt: skip
        assert told == [(what, theirs.id, mine.id) for what in ("name", "subnet", "vni")]
    text = " ".join(n.message for n in c.notices)
    assert f"web-{theirs.id[:6]} was called web" in text
    assert "overlaps 10.1.0.0/24 of the older web" in text


def test_who_was_created_after_being_seen_is_younger_whatever_the_clocks_say() -> None:
    a, b = Half(1, now=5000.0), Half(2, now=1000.0)
    first = a.make()
    meet(a, b)
    second = b.make(name="db", subnets=["10.2.0.0/24"], vni=501)
    assert second.created < first.created
    assert second.born > first.born


def test_a_clock_of_another_century_does_not_take_the_others_along() -> None:
    century = 100 * 365 * 86_400.0
    a, b = Half(1), Half(2, now=1000.0 + century)
    theirs = b.make()
    meet(a, b)
    assert [n.kind for n in a.notices] == ["clock.ahead"]
    mine = a.make(name="db", subnets=["10.2.0.0/24"], vni=501)
    assert mine.born < stamp_at(1001.0) < theirs.born
    meet(a, b)
    a.remove_network(theirs.id)
    meet(a, b)
    assert [n.id for n in b.catalogue.all()] == [mine.id]
    assert len(a.notices) == 1


def test_a_removal_at_the_same_time_as_a_rename_is_final(halves: tuple[Half, Half]) -> None:
    a, b = halves
    a.make()
    theirs = b.make()
    c = Half(3)
    meet(b, c)
    c.remove_network(theirs.id)  # while b learns that it has lost, and writes it anew
    meet(a, b)
    meet(a, b, c)
    for half in (a, b, c):
        assert half.catalogue.get(theirs.id) is None


def test_only_the_younger_of_those_on_one_host_gives_way(halves: tuple[Half, Half]) -> None:
    a, b = halves
    mine, theirs = a.make(), b.make()
    plan = Plan(b)
    touched: list[set[int]] = []
    b.listeners.append(lambda change: touched.append(plan.touched(change).bridges))
    b.create_endpoint(theirs.id, parse_endpoint("x", addresses=["10.1.0.9"]), "5" * 16)
    meet(a, b)
    became = b.catalogue.get(theirs.id)
    assert became
    held = b.find_endpoint("x")[1].endpoint
    box = Sandbox("5" * 16, "x", "/proc/9/ns/net", 9, 9, 9, 0.0, (held.id,), ("eth0",), (), "",
                  held.id)  # fmt: skip
    b.put_sandbox(box)
    assert any({500, became.vni} <= each for each in touched), "old and new devices in one go"
    # Alone here, it has everything.
    assert b.gives_way() == {}
    assert plan.bridges()[became.vni].gateways == ("10.1.0.1/24",)
    assert plan.bridges()[became.vni].open_subnets == ("10.1.0.0/24",)
    # Then the winner comes to this host.
    assert a.donate(mine.id, b.me, 4, []) == ""
    meet(a, b)
    come = b.create_endpoint(mine.id, parse_endpoint("y"))
    assert {500, became.vni} <= touched[-1]
    assert plan.bridges()[500].gateways == ("10.1.0.1/24",)
    beside = plan.bridges()[became.vni]
    assert beside.gateways == beside.open_subnets == ()
    assert list(beside.ports) == [held.id]
    # And goes.
    b.remove_endpoints([come.id])
    assert {500, became.vni} <= touched[-1]
    assert plan.bridges()[became.vni].gateways == ("10.1.0.1/24",)


def test_a_name_that_a_loser_bears_is_taken(halves: tuple[Half, Half]) -> None:
    a, b = halves
    a.make()
    theirs = b.make()
    meet(a, b)
    with pytest.raises(Conflict, match="exists"):
        a.make(name=f"web-{theirs.id[:6]}", subnets=["10.9.0.0/24"], vni=0)
