"""Nodes that go: lost ones, whose addresses others inherit, and one that leaves and comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from agent.testbed import temporary
from tests.netns.world import VXMESH, World


@pytest.fixture
def own() -> Iterator[World]:
    """Three hosts of this test's own: it leaves one of them dead."""
    with temporary(hosts=3) as bed:
        yield World(bed)


@pytest.fixture
def hasty() -> Iterator[World]:
    """The same, of agents that give a dead one a few seconds only."""
    options = ("--agent-grace", "10")
    with temporary(hosts=3, agent_options=options) as bed:
        yield World(bed)


def lose(world: World, host: str, *seen_by: str) -> None:
    """Cut a host off, and wait until the others have found it dead and withdrawn it."""
    world.bed.cut(host)
    await_loss(world, host, False, *seen_by)


def await_loss(world: World, host: str, answers: bool, *seen_by: str) -> None:
    """Wait until the others have found the agent dead; `answers`: its host is there."""

    def known(other: str) -> bool:
        node = world.read(other, "node", "inspect", host)
        told = node["reason"].startswith("agent") == answers
        return bool(node["state"] == "unreachable" and told)

    for other in seen_by:
        world.wait(lambda other=other: known(other), f"{other} noticed that {host} is gone")  # type: ignore[misc]


def make(world: World, host: str, net: str, name: str, *more: str) -> None:
    world.vx(host, "endpoint", "create", "--network", net, "--name", name, *more)


def test_a_lost_nodes_addresses_are_handed_out_by_others_and_it_is_told_when_it_is_back(
    own: World,
) -> None:
    net = own.network("--subnet", "10.77.0.0/28", host="h3")
    make(own, "h3", net, "on-lost", "--ip", "10.77.0.9", "--wait=10")
    make(own, "h2", net, "on-h2", "--wait=10")
    held = own.address("h2", "on-h2")

    alive = own.try_vx("h1", "node", "rm", "h3")
    assert alive.returncode == 5 and "h3: is alive" in alive.stderr, alive.stderr
    assert "node leave" in alive.stderr

    lose(own, "h3", "h1", "h2")
    ask = ("endpoint", "create", "--network", net, "--name", "a", "--ip", "10.77.0.3")
    silent = own.try_vx("h1", *ask)
    assert silent.returncode == 1 and "vxmesh node rm h3" in silent.stderr, silent.stderr

    # Two operators at once: both are told that it is done, one of the two has done it.
    running = [
        own.host(h).popen(
            [VXMESH, "node", "rm", "h3", "--wait=60"], stdout=-1, stderr=-1, text=True
        )
        for h in ("h1", "h2")
    ]
    ends = [(*p.communicate(timeout=120), p.returncode) for p in running]
    assert [code for *_, code in ends] == [0, 0], ends
    for host in ("h1", "h2"):
        own.wait(lambda host=host: own.names(host) == ["h1", "h2"], f"{host} heard")  # type: ignore[misc]
        own.wait(lambda host=host: own.names(host, "endpoint") == ["on-h2"], f"{host} has the rest")  # type: ignore[misc]

    own.wait(lambda: own.owners("h1", net) <= {"h1", "h2"}, "its ranges are inherited")
    # Again is no error; a node that there never was is one.
    own.vx("h1", "node", "rm", "h3")
    assert own.try_vx("h1", "node", "rm", "h9").returncode == 4

    # All of it can be had, the lost one's own address included, and none of it twice.
    make(own, "h1", net, "again", "--ip", "10.77.0.9")
    for number in range(11):
        make(own, f"h{1 + number % 2}", net, f"e{number}")
    for host in ("h1", "h2"):
        own.wait(lambda host=host: len(own.read(host, "endpoint", "ls")) == 13, f"{host} has all")  # type: ignore[misc]
    taken = [e["addresses"][0] for e in own.read("h1", "endpoint", "ls")]
    assert len(set(taken)) == 13 and held in taken and "10.77.0.9" in taken
    full = own.try_vx("h2", "endpoint", "create", "--network", net, "--name", "too-many")
    assert full.returncode == 1 and "13 of 13" in full.stderr, full.stderr

    lost = own.host("h3")
    own.bed.heal("h3")
    own.wait(lambda: not own.host("h3").is_running, "h3 was told")
    log = lost.log.read_text()
    assert "was removed from the cluster by h" in log and "--reset-state" in log
    assert own.names("h1") == ["h1", "h2"]
    started = own.run("h3", VXMESH, "agent", "--name", "h3", "--advertise", lost.address)
    assert started.returncode == 1 and "was removed from the cluster" in started.stderr
    own.vx("h1", "endpoint", "rm", "again", "--wait=20")


def test_one_that_cannot_be_asked_keeps_a_removal_from_happening(own: World) -> None:
    net = own.network("--subnet", "10.77.0.0/24", host="h2")
    lose(own, "h2", "h1")
    lose(own, "h3", "h1")
    done = own.try_vx("h1", "node", "rm", "h2")
    assert done.returncode == 1 and "vxmesh node rm h2 h3" in done.stderr, done.stderr
    assert own.names("h1") == ["h1", "h2", "h3"]
    assert own.owners("h1", net) == {"h2"}
    own.vx("h1", "node", "rm", "h2", "h3", "--wait=20")
    assert own.names("h1") == ["h1"]
    make(own, "h1", net, "mine", "--wait=20")
    # A killed and started agent still knows, and has the network that h2 made.
    own.bed.kill("h1")
    own.bed.start("h1")
    assert own.names("h1") == ["h1"]
    assert own.address("h1", "mine", net)
    assert own.owners("h1", net) == {"h1"}


def test_an_agent_that_is_dead_for_good_is_removed_once_its_time_is_up(hasty: World) -> None:
    own = hasty
    net = own.network("--subnet", "10.77.0.0/28", host="h3")
    make(own, "h3", net, "on-lost", "--ip", "10.77.0.9", "--wait=10")
    own.bed.kill("h3")
    await_loss(own, "h3", True, "h1")  # h2's part is below: its time runs
    # Its endpoints are kept for a while: somebody may start it again.
    assert own.names("h1", "endpoint") == ["on-lost"]
    refused = own.try_vx("h1", "node", "rm", "h3")
    assert refused.returncode == 5 and "host that answers" in refused.stderr, refused.stderr

    def withdrawn(host: str) -> bool:
        return bool(own.read(host, "endpoint", "ls")[0]["state"] == "unreachable")

    for host in ("h1", "h2"):
        own.wait(lambda host=host: withdrawn(host), f"{host} waits no longer")  # type: ignore[misc]
    own.vx("h1", "node", "rm", "h3", "--wait=60")  # nobody waits for a node that is removed
    for host in ("h1", "h2"):
        own.wait(lambda host=host: own.names(host) == ["h1", "h2"], f"{host} heard")  # type: ignore[misc]
        own.wait(lambda host=host: own.names(host, "endpoint") == [], f"{host} has none of its")  # type: ignore[misc]
    make(own, "h2", net, "again", "--ip", "10.77.0.9", "--wait=10")
    lost = own.host("h3")
    started = own.run("h3", VXMESH, "agent", "--name", "h3", "--advertise", lost.address)
    assert started.returncode == 1 and "was removed from the cluster by h1" in started.stderr
    assert "Traceback" not in started.stderr
    assert own.names("h1") == ["h1", "h2"]


def test_who_leaves_hands_over_and_is_the_same_when_it_comes_back(own: World) -> None:
    net = own.network("--subnet", "10.77.0.0/28", host="h3")
    own.workload("h3", net, "busy")
    before = own.read("h1", "node", "inspect", "h3")
    refused = own.try_vx("h3", "node", "leave")
    assert refused.returncode == 5 and "busy" in refused.stderr and "--force" in refused.stderr
    done = own.read("h3", "node", "leave", "--force", "--wait=60")
    assert [h["network"] for h in done["handovers"]] == [net]
    own.wait(lambda: not own.host("h3").is_running, "the agent ended")
    assert "Traceback" not in own.host("h3").log.read_text()
    for host in ("h1", "h2"):
        own.wait(
            lambda host=host: (  # type: ignore[misc]
                own.read(host, "node", "inspect", "h3")["state"] == "left"
            ),
            f"{host} knows that h3 left",
        )
        own.wait(lambda host=host: own.names(host, "endpoint") == [], f"{host} has none of its")  # type: ignore[misc]
    # Who starts anew hears it from the others.
    own.bed.kill("h1")
    own.bed.start("h1")
    own.wait(lambda: own.read("h1", "node", "inspect", "h3")["state"] == "left", "h1 heard it")
    # And what was h3's: records come by streams, that it left with the first probes.
    own.wait(lambda: net in own.names("h1", "network"), "the network too")
    # Nobody misses it: its addresses are handed out, and a lost node is removed without it.
    own.wait(
        lambda: all(r["node"] != "h3" for r in own.read("h1", "network", "inspect", net)["ranges"]),
        "h1 knows who has them",
    )
    for number in range(13):
        make(own, "h1", net, f"e{number}")
    own.vx("h1", "endpoint", "rm", "--network", net, "--all", "--wait=30")

    own.bed.start("h3")
    for host in ("h1", "h2"):
        own.wait(
            lambda host=host: (  # type: ignore[misc]
                own.read(host, "node", "inspect", "h3")["state"] == "alive"
            ),
            f"{host} sees h3 again",
        )
    assert own.read("h1", "node", "inspect", "h3")["id"] == before["id"]
    own.wait(lambda: net in own.names("h3", "network"), "it hears of the network")
    make(own, "h3", net, "back", "--wait=10")
    assert own.address("h1", "back", net)
    assert json.loads(own.vx("h3", "network", "inspect", net, "-o", "json"))["name"] == net
