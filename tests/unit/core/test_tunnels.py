"""Ways through VXLAN, of which the test knows what becomes of frames."""

from __future__ import annotations

import random

import pytest

from agent.core.tunnels import PACE, PROOF, ROUNDS, Frame, Tunnel, Tunnels, Turn


class Way:
    """What becomes of frames to one node: right, wrong or lost, by kind; and of datagrams."""

    def __init__(self, plain: str = "right", offloaded: str = "right", loss: float = 0.0) -> None:
        self.plain, self.offloaded, self.loss = plain, offloaded, loss
        self.answers = True


class World:
    def __init__(self, **ways: Way) -> None:
        self.ways, self.now, self.rng = ways, 50.0, random.Random(5)
        self.tunnels = Tunnels(60.0, random.Random(1))
        self.sent: list[Frame] = []
        self.turns: list[Turn] = []
        for node in ways:
            self.tunnels.put(node, self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.tunnels.next_timer()) <= end:
            self.now = max(self.now, due)
            frames, asked = self.tunnels.handle_timer(self.now)
            self.sent += frames
            for frame in frames:
                way = self.ways[frame.node]
                what = way.offloaded if frame.offloaded else way.plain
                if what != "lost" and self.rng.random() >= way.loss:
                    self.tunnels.reported(frame.node, frame.nonce, what == "right", self.now)
            for node in asked:
                if self.ways[node].answers:
                    self.tunnels.answered(node, self.now)
            self.turns += self.tunnels.turns()
        self.now = end


def test_it_is_due_at_once_for_what_is_new_or_ends_a_look_only() -> None:
    tunnels = Tunnels(60.0, random.Random(1))
    assert tunnels.put("b", 50.0) and not tunnels.put("b", 50.0)
    assert not tunnels.answered("b", 50.0)
    [first], _ = tunnels.handle_timer(50.0)
    assert not tunnels.reported("b", first.nonce, False, 50.0), "the frames that follow tell more"
    later = tunnels.next_timer()
    [second, plain], _ = tunnels.handle_timer(later)
    assert not tunnels.reported("b", plain.nonce, True, later)
    assert not tunnels.reported("b", first.nonce, True, later), "that one was counted"
    assert tunnels.reported("b", second.nonce, True, later)
    assert tunnels.turns() and not tunnels.turns() and tunnels.next_timer() > later + 50.0


def test_a_sound_way_costs_one_frame_a_look() -> None:
    world = World(b=Way())
    world.run(290)
    assert world.turns == [Turn("b", Tunnel.UNKNOWN, Tunnel.SOUND)]
    assert len(world.sent) == 5 and all(frame.offloaded for frame in world.sent)


@pytest.mark.parametrize("offloaded", ["wrong", "lost"])
def test_a_nic_that_breaks_checksums_or_drops_such_frames(offloaded: str) -> None:
    way = Way(offloaded=offloaded)
    world = World(b=way)
    world.run(10)
    assert world.tunnels.state("b") is Tunnel.CHECKSUMS
    world.run(300)
    assert len(world.turns) == 1
    way.offloaded = "right"
    world.run(70)
    assert world.tunnels.state("b") is Tunnel.SOUND


def test_a_port_that_is_closed_to_vxlan() -> None:
    world = World(b=Way("lost", "lost"))
    world.run(10)
    assert world.turns == [Turn("b", Tunnel.UNKNOWN, Tunnel.BLOCKED)]
    assert len(world.sent) == 2 * ROUNDS - 1


def test_a_host_that_is_away_says_nothing() -> None:
    way = Way()
    world = World(b=way)
    world.run(1)
    way.plain = way.offloaded = "lost"
    way.answers = False
    world.run(300)
    assert world.tunnels.state("b") is Tunnel.SOUND
    world.tunnels.answered("b", world.now)  # at some other time
    assert world.tunnels.state("b") is Tunnel.SOUND


def test_an_answer_that_comes_before_it_was_asked_for_is_no_proof() -> None:
    way = Way("lost", "lost")
    way.answers = False
    world = World(b=way)
    world.run(1)
    world.tunnels.answered("b", world.now)
    world.run(PROOF + 10)
    assert world.tunnels.state("b") is Tunnel.UNKNOWN


def test_a_way_that_breaks_every_frame_is_no_nics_doing() -> None:
    world = World(b=Way("wrong", "wrong"))
    world.run(200)
    assert world.turns == []


@pytest.mark.parametrize("seed", range(5))
def test_loss_accuses_nobody(seed: int) -> None:
    world = World(b=Way(loss=0.5))
    world.rng = random.Random(seed)
    world.run(2 * 86_400)
    assert world.turns == [Turn("b", Tunnel.UNKNOWN, Tunnel.SOUND)]


def test_reports_of_what_was_not_sent_and_of_nodes_that_went() -> None:
    world = World(b=Way("lost", "lost"))
    world.run(1)
    world.tunnels.reported("b", 1, True, world.now)
    world.tunnels.reported("c", 1, True, world.now)
    assert world.tunnels.state("b") is Tunnel.UNKNOWN
    world.tunnels.drop("b")
    world.run(100)
    assert world.tunnels.nodes() == set() and world.turns == []


def test_many_are_looked_at_in_turn() -> None:
    world = World(**{f"n{n}": Way() for n in range(100)})
    world.run(21)
    assert len(world.turns) == 100
    world.sent.clear()
    world.run(70)
    assert {frame.node for frame in world.sent} == set(world.ways)
    assert len(world.sent) <= 71 * PACE
