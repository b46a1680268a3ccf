"""The whole core on 40 hosts with streams to a few: the small brother of the run with 1,000.

A failure prints the command that replays it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from agent.cluster.codec import Encoder
from agent.core.membership import State as Belief
from agent.core.plumtree import Graft, Have, Prune
from agent.core.replica import Delta
from agent.core.session import Applied, Digest, Hello, Message
from agent.core.stability import Reach, Seen
from agent.core.summary import BUCKETS, Summary
from tests.sim.large import nodes
from tests.sim.large.nodes import SlimState, State, describe, furnish
from tests.sim.large.run import Options
from tests.sim.large.sizes import size_of
from tests.sim.large.whole import WholeRun, versions_of, view
from tests.sim.plot import HEIGHT, NAMES, WIDTH, Point, draw

SMALL = Options(nodes=40, endpoints=5, seed=7, loss=0.05, minutes=0.35, writes=20)
FEW = 8  # up to so many hosts would all have streams to all


def told(run: WholeRun) -> str:
    """A report without what it says of this machine."""
    lines = run.report().splitlines()
    return "\n".join(
        lines[: next(n for n, line in enumerate(lines) if line.startswith("run ")) + 1]
    )


def test_all_come_to_know_the_same_and_bury_nobody_alive() -> None:
    run = WholeRun(SMALL, FEW)
    figures = run.play()
    running = [peers for peers in run.peers.values() if peers.host.runs]
    assert len(running) == 39
    for peers in running:
        assert versions_of(peers.state) == versions_of(running[0].state)
        assert peers.state.withdrawn == {run.victim.id}
        beliefs = {id: peers.member.core.state(id) for id in run.world.hosts}
        assert {id for id, b in beliefs.items() if b is not Belief.ALIVE} == {run.victim.id}
    assert figures.false_positives == []
    assert len(figures.detected) == 39
    assert max(figures.detected) < 3.5
    assert len(figures.known) == 20
    assert sorted(last for _, _, last in figures.known)[10] < 0.5
    assert max(last for _, _, last in figures.known) < 2.0
    assert 3.0 < figures.streams[0] < 10.0, "streams to all, or to nobody: nothing was tested"


def test_the_same_seed_is_the_same_report() -> None:
    first, again, other = (
        WholeRun(replace(SMALL, nodes=20, seed=seed, minutes=0.3), FEW) for seed in (7, 7, 8)
    )
    for run in (first, again, other):
        run.play()
    assert told(first) == told(again)
    assert first.figures.digest != other.figures.digest


def test_the_same_seed_is_the_same_report_in_another_process() -> None:
    options = replace(SMALL, nodes=32, minutes=0.3)
    printed = subprocess.run(
        [sys.executable, *options.command().split()[1:]],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    run = WholeRun(options)
    run.play()
    assert told(run) in printed


def test_halves_that_wrote_apart_come_to_the_same() -> None:
    run = WholeRun(replace(SMALL, loss=0.0, split=6.0, minutes=0.4), FEW)
    figures = run.play()
    late = [last for _, _, last in figures.known if last > 1.0]
    assert late, "nothing was written while the halves were apart"
    assert figures.healed < 1.0


def test_a_host_without_agent_keeps_its_endpoints() -> None:
    run = WholeRun(replace(SMALL, refuse=True), FEW)
    figures = run.play()
    assert max(figures.refused) < 2.0
    for peers in run.peers.values():
        if peers.host.runs:
            assert run.orphan.id not in peers.state.withdrawn


def test_what_is_shared_at_the_start_is_what_each_would_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "PER_NETWORK", 4)

    def made(kind: type[State]) -> list[State]:
        states = [
            kind(describe(n, f"{n:016x}"), lambda: 0.0, random.Random(n), lambda *_: None)
            for n in range(10)
        ]
        furnish(states, 3)
        return states

    for each, shared in zip(made(State), made(SlimState), strict=True):
        assert view(each, False) == view(shared, False)
        for origin in versions_of(each):
            assert each.replica.items(origin) == shared.replica.items(origin)


@pytest.mark.parametrize(
    "message",
    [
        Hello("0123456789abcdef", "boot", "sim", "0123456789abcdef"),
        Digest({f"{n:016x}": (n % 100 + 1, 0) for n in range(1000)}, 1e6, 1e6, 0.5),
        Summary(tuple(range(1 << 60, (1 << 60) + BUCKETS)), 1e6, 1e6, 0.5),
        Have({f"{n:016x}": 9 for n in range(9)}),
        Graft({f"{n:016x}": 9 for n in range(9)}),
        Prune(tuple(f"{n:016x}" for n in range(9))),
        Seen({f"{n:016x}": Reach(9, 1 << 63) for n in range(100)}),
        Applied(99),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_are_as_large_as_the_codec_makes_them(message: Message) -> None:
    assert size_of(message) == pytest.approx(len(Encoder().encode(message)), rel=0.05, abs=3)


def test_a_delta_is_as_large_as_the_codec_makes_it() -> None:
    state = State(describe(0, "0" * 16), lambda: 0.0, random.Random(0), lambda *_: None)
    furnish([state], 10)
    for since in (0, state.version(state.me) - 1):
        delta = state.state_of(since)
        assert isinstance(delta, Delta)
        assert size_of(delta) == pytest.approx(len(Encoder().encode(delta)), rel=0.1)


def test_the_plot_shows_every_size_and_every_share() -> None:
    points = [Point(n, (0.001, 0.01, 0.2), (0.002, 0.3, 99.0)) for n in (10, 1000)]
    picture = ElementTree.fromstring(draw(points, "5 % & <more>"))
    texts = {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"10", "1,000", *NAMES, "nodes", "1 s", "5 % & <more>"} <= texts
    lines = list(picture.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 2 * len(NAMES)
    for line in lines:
        for place in line.attrib["points"].split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
