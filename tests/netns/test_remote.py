"""A plugin written for Docker drives a network: its process makes veth pairs, we lend them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.testbed import temporary
from agent.testbed.agents import answers
from tests.netns import plugin
from tests.netns.world import World


class Weird:
    """The plugin `weird` on h1."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self.socket = world, directory / "weird.sock"
        self.process: subprocess.Popen[str] | None = None

    def start(self, *breaks: str) -> None:
        self.stop()
        command = [sys.executable, plugin.__file__, str(self.socket), *breaks]
        self.process = self.world.host("h1").popen(command)
        self.world.wait(lambda: answers(self.socket), "the plugin listens")

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        self.socket.unlink(missing_ok=True)

    def calls(self) -> list[str]:
        log = Path(f"{self.socket}.log")
        return log.read_text().split() if log.exists() else []

    def links(self) -> str:
        return self.world.run("h1", "ip", "-o", "link").stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture(scope="module")
def world_of_plugins(place: Path) -> Iterator[World]:
    with temporary(hosts=2, agent_options=["--plugin-dir", str(place)]) as bed:
        yield World(bed)


@pytest.fixture
def weird(world_of_plugins: World, place: Path) -> Iterator[Weird]:
    made = Weird(world_of_plugins, place)
    Path(f"{made.socket}.log").unlink(missing_ok=True)
    made.start()
    yield made
    world_of_plugins.clean()
    made.stop()


def test_two_workloads_of_a_plugin_reach_each_other_and_nothing_is_left(weird: Weird) -> None:
    world = weird.world
    world.vx("h1", "network", "create", "odd", "--driver", "remote:weird")
    one, two = world.workload("h1", "odd"), world.workload("h1", "odd")
    assert world.reaches("h1", one, world.address("h1", two, "odd"))
    inside = world.inside("h1", one, "ip", "route").stdout
    assert "192.0.2.0/24 dev weird0" in inside and "default via" in inside
    assert world.try_vx("h2", "run", "--network", "odd", "--", "true").returncode == 5
    world.vx("h1", "sandbox", "rm", one, two)
    assert ": wo" not in weird.links()
    world.vx("h1", "network", "rm", "odd")
    assert plugin.BRIDGE not in weird.links()
    assert weird.calls()[-5:] == [
        "Leave", "DeleteEndpoint", "Leave", "DeleteEndpoint", "DeleteNetwork",
    ]  # fmt: skip


def test_a_workload_is_connected_to_a_plugins_network_and_to_ours_by_order(weird: Weird) -> None:
    world = weird.world
    world.vx("h1", "network", "create", "odd", "--driver", "remote:weird")
    ours = world.network()
    one, two = world.workload("h1", ours), world.workload("h1", "odd")
    gateways = [world.read("h1", "network", "inspect", n)["gateways"][0] for n in (ours, "odd")]

    def lead() -> str:
        return world.inside("h1", one, "ip", "route", "show", "default").stdout

    join = ("endpoint", "create", "--sandbox", one, "--network")
    world.vx("h1", *join, "odd")
    assert f"via {gateways[0]} dev eth0" in lead()
    assert world.reaches("h1", one, world.address("h1", two, "odd"))
    world.vx("h1", "endpoint", "rm", one, "--network", ours)
    assert f"via {gateways[1]} dev weird0" in lead(), "by what the plugin said"
    world.vx("h1", *join, ours, "--priority", "1")
    assert f"via {gateways[0]} dev eth0" in lead()
    world.vx("h1", "endpoint", "rm", one, "--network", "odd")
    assert f"via {gateways[0]} dev eth0" in lead()
    world.wait(lambda: weird.calls()[-1:] == ["DeleteEndpoint"], "the plugin is told")
    world.vx("h1", *join, "odd", "--priority", "2")
    assert f"via {gateways[1]} dev weird0" in lead()
    assert world.reaches("h1", one, world.address("h1", two, "odd"))
    world.vx("h1", "endpoint", "rm", one, "--network", "odd")
    assert f"via {gateways[0]} dev eth0" in lead()
    assert world.reaches("h1", one, one), "by name, at a name server of ours"


def test_a_plugins_interface_that_does_not_stay_leaves_the_way_out_as_it_was(
    weird: Weird,
) -> None:
    world = weird.world
    world.vx("h1", "network", "create", "odd", "--driver", "remote:weird")
    ours = world.network()
    one = world.workload("h1", ours, "", "--publish", "8080:80")
    [gateway] = world.read("h1", "network", "inspect", ours)["gateways"]
    weird.start("refuse:ProgramExternalConnectivity")
    join = ("endpoint", "create", "--sandbox", one, "--network", "odd", "--priority", "1")
    done = world.try_vx("h1", *join)
    assert "refused NetworkDriver.ProgramExternalConnectivity" in done.stderr
    lead = world.inside("h1", one, "ip", "route", "show", "default").stdout
    assert f"via {gateway} dev eth0" in lead
    assert world.reaches("h1", one, gateway)
    assert "weird" not in world.vx("h1", "exec", one, "--", "ip", "-o", "link")


@pytest.mark.parametrize("broken", ["lie:Join", "die:Join", "refuse:Join"])
def test_a_plugin_that_breaks_leaves_nothing_half_made(weird: Weird, broken: str) -> None:
    world = weird.world
    world.vx("h1", "network", "create", "odd", "--driver", "remote:weird")
    weird.start(broken)
    done = world.try_vx("h1", "run", "--network", "odd", "--", "true")
    assert done.returncode
    assert ("nowhere" if broken == "lie:Join" else "plugin weird") in done.stderr
    assert world.read("h1", "endpoint", "ls") == []
    weird.start()
    world.wait(lambda: "DeleteEndpoint" in weird.calls(), "what was begun is undone")
    assert world.vx("h1", "run", "--network", "odd", "--", "ip", "link", "show", "weird0")


def test_what_a_dead_plugin_could_not_undo_is_undone_when_it_is_back(weird: Weird) -> None:
    world = weird.world
    world.vx("h1", "network", "create", "odd", "--driver", "remote:weird")
    one = world.workload("h1", "odd")
    weird.stop()
    world.vx("h1", "sandbox", "rm", one)
    world.vx("h1", "network", "rm", "odd")
    assert plugin.BRIDGE in weird.links()
    world.bed.kill("h1")
    world.bed.start("h1")
    weird.start()
    world.wait(lambda: plugin.BRIDGE not in weird.links(), "the network is undone")
    assert weird.calls()[-3:] == ["Leave", "DeleteEndpoint", "DeleteNetwork"]
