"""Paths on a virtual clock, through a network of which the test knows what it lets through."""

from __future__ import annotations

import heapq
import itertools
import random
from math import inf

import pytest

from agent.core.pathmtu import Measure, State
from agent.core.paths import PACE, Found, Paths, Send

TOP, FLOOR = 1500, 576


class Way:
    """What the network between this node and one other does to packets."""

    def __init__(self, mtu: int = TOP, delay: float = 0.002, loss: float = 0.0) -> None:
        self.mtu = mtu
        self.delay = delay  # s, each way
        self.loss = loss  # each way
        self.is_up = True
        self.device = inf  # what our own device takes


class World:
    """One node's paths; `run` lets time go by."""

    def __init__(self, ways: dict[str, Way], known: dict[str, int] | None = None) -> None:
        self.ways, self.now = ways, 100.0
        self.rng = random.Random(7)
        self.paths = Paths(10.0, random.Random(1), known or {})
        self.sent: list[tuple[float, Send]] = []
        self.found: list[tuple[float, Found]] = []
        self._events: list[tuple[float, int, str, int]] = []
        self._count = itertools.count()
        for node in ways:
            self.paths.put(node, TOP, FLOOR, self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = self._events[0][0] if self._events else inf
            self.now = max(self.now, min(due, self.paths.next_timer()))
            if self.now > end:
                self.now = end
                return
            while self._events and self._events[0][0] <= self.now:
                _, _, node, nonce = heapq.heappop(self._events)
                self.paths.answered(node, nonce, self.now)
            for send in self.paths.handle_timer(self.now):
                self._carry(send)
            self.found += [(self.now, found) for found in self.paths.found()]

    def _carry(self, send: Send) -> None:
        self.sent.append((self.now, send))
        way = self.ways[send.node]
        if send.size > way.device:
            self.paths.unsendable(send.node, self.now)
            return
        share = (1 - way.loss) ** 2
        if way.is_up and send.size <= way.mtu and self.rng.random() < share:
            arrival = self.now + 2 * way.delay
            heapq.heappush(self._events, (arrival, next(self._count), send.node, send.nonce))

    def states(self) -> dict[str, tuple[str, int]]:
        measures = {node: self.paths.measure(node) for node in self.ways}
        return {node: (m.state.value, m.mtu) for node, m in measures.items()}


def test_a_path_as_wide_as_its_ends_costs_a_packet_and_is_whole() -> None:
    world = World({"b": Way()})
    world.run(5)
    assert world.states() == {"b": ("whole", TOP)}
    assert [send.size for _, send in world.sent] == [TOP]
    world.run(100)
    assert 9 <= len(world.sent) <= 12
    assert [found for _, found in world.found] == [
        Found("b", Measure(State.UNKNOWN, 0, TOP), Measure(State.WHOLE, TOP, TOP))
    ]


@pytest.mark.parametrize("mtu", [576, 577, 1000, 1279, 1280, 1399, 1400, 1492, 1499])
@pytest.mark.parametrize("delay", [0.0001, 0.15])
def test_a_black_hole_is_found_to_the_byte_and_told_once(mtu: int, delay: float) -> None:
    way = Way(delay=delay)
    world = World({"b": way})
    world.run(15)
    way.mtu = mtu
    world.run(90)
    assert world.states() == {"b": ("narrow", mtu)}
    assert world.paths.narrow() == {"b": mtu}
    assert [found.after.state for _, found in world.found] == [State.WHOLE, State.NARROW]
    way.mtu = 1450 if mtu < 1450 else TOP
    world.run(60)
    assert world.states()["b"][1] == way.mtu
    way.mtu = TOP
    world.run(60)
    assert world.states() == {"b": ("whole", TOP)}
    assert world.paths.narrow() == {}


def test_a_path_that_is_mended_in_the_midst_of_a_look_is_whole_at_once() -> None:
    for number in range(120):
        way = Way(mtu=1400)
        world = World({"b": way})
        world.run(15)
        world.sent.clear()
        while TOP not in (send.size for _, send in world.sent):  # it sees whether it is mended
            world.run(0.01)
        world.run(number * 0.005)
        way.mtu = TOP
        world.run(30)
        assert [(f.after.state, f.after.mtu) for _, f in world.found] == [
            (State.NARROW, 1400),
            (State.WHOLE, TOP),
        ], number


def test_jumbo_frames_that_a_switch_drops() -> None:
    world = World({"b": Way(mtu=1500)})
    world.paths.put("b", 9000, FLOOR, world.now)
    world.run(30)
    assert world.paths.measure("b") == Measure(State.NARROW, 1500, 9000)


def test_our_own_device_is_narrower_than_it_was_said_to_be() -> None:
    way = Way()
    way.device = 1400
    world = World({"b": way})
    world.run(30)
    assert world.states() == {"b": ("narrow", 1400)}


@pytest.mark.parametrize("loss", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_loss_makes_no_path_narrow(loss: float, seed: int) -> None:
    world = World({"b": Way(loss=loss)})
    world.rng = random.Random(seed)
    world.run(6 * 3600)
    assert {found.after.state for _, found in world.found} <= {State.WHOLE, State.SILENT}
    assert world.paths.measure("b").mtu == TOP


@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_path_is_found_through_loss(seed: int) -> None:
    way = Way(mtu=1400, loss=0.2)
    world = World({"b": way})
    world.rng = random.Random(seed)
    world.run(300)
    assert world.paths.narrow()["b"] == 1400


def test_a_host_that_goes_away_and_comes_back_is_not_narrow() -> None:
    way = Way()
    world = World({"b": way})
    world.run(15)
    way.is_up = False
    world.run(60)
    assert world.states() == {"b": ("silent", TOP)}
    assert world.paths.narrow() == {}
    way.is_up = True
    world.run(30)
    assert world.states() == {"b": ("whole", TOP)}
    assert State.NARROW not in {found.after.state for _, found in world.found}


def test_a_narrow_path_whose_host_is_away_stays_narrow() -> None:
    way = Way(mtu=1400)
    world = World({"b": way})
    world.run(30)
    way.is_up = False
    world.run(60)
    assert world.states() == {"b": ("silent", 1400)}
    assert world.paths.narrow() == {"b": 1400}


def test_a_peer_that_never_answers_is_unknown() -> None:
    way = Way()
    way.is_up = False
    world = World({"b": way})
    world.run(100)
    assert world.states() == {"b": ("unknown", 0)}


def test_large_packets_lost_for_a_second_change_nothing() -> None:
    """As when a queue that counts bytes is full: it takes small packets and no large ones."""
    way = Way()
    world = World({"b": way})
    for _ in range(50):
        world.paths.hasten(["b"], world.now)
        way.mtu = 1000
        world.run(1.0)
        way.mtu = TOP
        world.run(29)
    assert [found.after.state for _, found in world.found] == [State.WHOLE]


def test_an_answer_that_comes_late_counts() -> None:
    world = World({"b": Way(delay=2.0)})
    world.run(60)
    assert world.states() == {"b": ("whole", TOP)}


def test_what_an_earlier_life_found_stands_until_it_is_measured() -> None:
    way = Way(mtu=1400)
    world = World({"b": way}, known={"b": 1400, "c": 1300})
    assert world.states() == {"b": ("narrow", 1400)}
    assert world.paths.narrow() == {"b": 1400, "c": 1300}  # c has not been heard of yet
    way.mtu = TOP
    world.run(30)
    assert world.paths.narrow() == {"c": 1300}
    world.paths.forget(["c"])
    assert world.paths.narrow() == {}


def test_devices_that_change_their_mtu() -> None:
    way = Way(mtu=9000)
    world = World({"b": way})
    world.run(15)
    world.paths.put("b", 9000, FLOOR, world.now)
    assert world.states() == {"b": ("unknown", TOP)}  # neither narrow nor known to be whole
    world.run(1)
    assert world.states() == {"b": ("whole", 9000)}
    world.paths.put("b", 1400, FLOOR, world.now)
    assert world.states() == {"b": ("whole", 1400)}
    world.run(1)
    assert max(send.size for when, send in world.sent if when >= world.now - 1) == 1400
    assert State.NARROW not in {found.after.state for _, found in world.found}


def test_many_paths_share_a_pace_and_a_hurry_is_paced_too() -> None:
    world = World({f"n{n}": Way() for n in range(300)})
    world.run(31)
    assert set(world.states().values()) == {("whole", TOP)}
    world.sent.clear()
    world.run(300)
    assert len(world.sent) <= 300 * PACE * 1.05  # nor are there fewer than a look each 33 s:
    assert {send.node for _, send in world.sent[-400:]} == set(world.ways)
    begin = world.now
    world.paths.hasten(world.paths.nodes(), world.now)
    world.sent.clear()
    world.run(31)
    assert {send.node for _, send in world.sent} == set(world.ways)
    first = [when for when, _ in world.sent if when < begin + 5]
    assert len(first) <= 5 * PACE + 1


def test_a_path_that_is_looked_at_may_go_or_change() -> None:
    world = World({"b": Way(mtu=1400), "c": Way()})
    world.run(0.5)  # in the midst of it
    world.paths.put("b", 1300, FLOOR, world.now)
    world.run(5)
    assert world.states()["b"] == ("whole", 1300)
    world.paths.put("b", TOP, FLOOR, world.now)
    world.run(0.5)
    world.paths.drop("b")
    world.run(30)
    assert world.paths.nodes() == {"c"}
    assert world.paths.measure("b").state is State.UNKNOWN
