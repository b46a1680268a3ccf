"""Hosts that fall silent, agents that die, cables that come back: what all others then believe.

Five hosts with an agent each and two workloads on each. Truth is computed from what lives
(agreement.py). Times are printed (pytest -s), never asserted.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from agent.testbed import Testbed, temporary
from tests.netns.agreement import Agreement
from tests.netns.world import World

HOSTS = ("h1", "h2", "h3", "h4", "h5")
CUT = float(os.environ.get("VXMESH_CUT_SECONDS", "6"))  # longer than any timer of the detector


@pytest.fixture(scope="module")
def five() -> Iterator[Testbed]:
    with temporary(hosts=5) as made:
        yield made


@pytest.fixture
def world(five: Testbed) -> Iterator[World]:
    made = World(five)
    yield made
    made.clean()


@pytest.fixture
def all_same(world: World) -> Agreement:
    net = world.network()
    for host in HOSTS:
        for number in (1, 2):
            world.workload(host, net, f"{host}-{number}")
    agreement = Agreement(world, net)
    agreement.wait()
    return agreement


def states(world: World, host: str) -> dict[str, str]:
    return {n["name"]: n["state"] for n in world.read(host, "node", "ls")}


def report(what: str, seconds: float) -> None:
    print(f"\n{what}: {seconds:.2f} s", end="")


@pytest.mark.parametrize("lost", [("h5",), ("h4", "h5")], ids=["one of five", "two of five"])
def test_what_a_cut_takes_a_heal_brings_back(
    world: World, all_same: Agreement, lost: tuple[str, ...]
) -> None:
    rest = [h for h in HOSTS if h not in lost]
    began = time.monotonic()
    if len(lost) == 1:
        world.bed.cut(lost[0])
    for a in lost if len(lost) > 1 else ():
        for b in rest:
            world.bed.cut(a, b)
    report("withdrawn by the rest", all_same.wait(rest))
    all_same.wait(lost)  # and the other way round: each half has itself
    assert {states(world, "h1")[h] for h in lost} == {"unreachable"}
    time.sleep(max(0.0, CUT - (time.monotonic() - began)))
    assert all_same.differences(rest) == []
    for a in lost:
        world.bed.heal(a)
    report("all the same again", all_same.wait())
    world.wait(lambda: set(states(world, "h1").values()) == {"alive"}, "all are alive to h1")
    assert world.reaches("h1", "h1-1", f"{lost[0]}-1")


def test_one_way_is_no_way(world: World, all_same: Agreement) -> None:
    # What h5 sends is lost, what is sent to it arrives.
    for other in HOSTS[:4]:
        world.bed.cut("h5", other, one_way=True)
    report("withdrawn by the rest", all_same.wait(HOSTS[:4]))
    time.sleep(CUT)
    world.bed.heal("h5")
    report("all the same again", all_same.wait())


def test_two_that_cannot_see_each_other_are_alive_to_all(world: World, all_same: Agreement) -> None:
    # The others' helpers reach both (SWIM's indirect probe): nobody is withdrawn.
    world.bed.cut("h1", "h2")
    time.sleep(CUT)
    assert all_same.differences() == []
    assert "unreachable" not in {*states(world, "h3").values(), *states(world, "h1").values()}
    # And what changes meanwhile goes round by the third.
    world.workload("h1", all_same.network, "late")
    all_same.wait()


def test_a_dead_agent_is_not_a_dead_host(world: World, all_same: Agreement) -> None:
    world.bed.kill("h5")
    world.wait(lambda: states(world, "h1")["h5"] == "unreachable", "h1 noticed")
    reason = next(n["reason"] for n in world.read("h1", "node", "ls") if n["name"] == "h5")
    assert reason.startswith("agent"), reason
    time.sleep(CUT)
    assert world.pings("h1", "h1-1", "h5-1", within=10), "rows and names are kept"
    # It takes part: a change is not everywhere before its kernel has it too.
    late = world.try_vx("h1", "network", "create", "late", "--wait=4")
    assert late.returncode == 1
    assert "not in the kernel of h5 (its agent does not answer) after 4 s" in late.stderr
    waiting = world.host("h1").popen(
        ["vxmesh", "network", "rm", "late", "--wait=60"], stderr=-1, text=True
    )
    world.bed.start("h5")
    assert waiting.wait(120) == 0, waiting.communicate()[1]
    world.wait(lambda: states(world, "h1")["h5"] == "alive", "h1 sees it again")
    all_same.wait()


def test_an_agent_that_hangs_is_not_a_dead_host(world: World, all_same: Agreement) -> None:
    pid = world.host("h5").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        world.wait(lambda: states(world, "h1")["h5"] == "unreachable", "h1 noticed")
        time.sleep(CUT)
        assert world.pings("h1", "h1-1", "h5-1", within=10), "rows and names are kept"
    finally:
        os.kill(pid, signal.SIGCONT)
    world.wait(lambda: states(world, "h1")["h5"] == "alive", "h1 sees it again")
    all_same.wait()
