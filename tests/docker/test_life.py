"""Agents and engines that end in whatever order, and containers that are taken out by force."""

from __future__ import annotations

from functools import partial

import pytest

from agent.testbed.engines import IMAGE
from tests.docker.world import DockerWorld


def pair(world: DockerWorld) -> None:
    """`one` on h1 and `two` on h3, in `web`, each known to the other's host."""
    world.docker("h1", "network", "create", "-d", "vxmesh", "--ipam-driver", "vxmesh", "web")
    world.wait(lambda: "web" in world.networks("h3"), "web is on h3")
    world.container("h1", "web", "one", "--restart", "always")
    world.container("h3", "web", "two")
    world.known("h1", "two")
    world.known("h3", "one")
    world.wait(lambda: names(world) == ["one", "two"], "both are known")


def names(world: DockerWorld) -> list[str]:
    """Of all endpoints, as h2 knows them."""
    return sorted(e["name"] for e in world.read("h2", "endpoint", "ls"))


def reaches(world: DockerWorld, host: str, container: str, name: str) -> bool:
    done = world.try_docker(host, "exec", container, "ping", "-c1", "-W10", name)
    return done.returncode == 0


def both_reach(world: DockerWorld) -> bool:
    return reaches(world, "h1", "one", "two") and reaches(world, "h3", "two", "one")


def nothing_is_left(world: DockerWorld) -> None:
    for host, name in (("h1", "one"), ("h3", "two")):
        world.docker(host, "rm", "-f", name)
    world.wait(lambda: world.read("h2", "endpoint", "ls") == [], "no endpoint is left")
    world.docker("h3", "network", "rm", "web")
    world.wait(lambda: not any(world.networks(h.name) for h in world.bed.hosts), "web is nowhere")
    for host in ("h1", "h3"):
        world.wait(partial(is_bare, world, host), f"{host} has no sandbox and no device left")


def is_bare(world: DockerWorld, host: str) -> bool:
    return not (world.read(host, "sandbox", "ls") or devices(world, host))


def devices(world: DockerWorld, host: str) -> list[str]:
    """What there is of networks and of interfaces that wait to be moved."""
    own = [link for link in world.links(host) if link.startswith("vx")]
    lines = world.run(host, "ip", "-o", "link").stdout.splitlines()
    return own + [line for line in lines if "vxd" in line]


def test_containers_do_not_notice_that_agents_start_anew(world: DockerWorld) -> None:
    pair(world)
    world.wait(lambda: both_reach(world), "the name servers have heard of both")
    for host in ("h1", "h3"):
        world.bed.kill(host)
        assert both_reach(world)  # by name, while it is away
        world.bed.start(host)
    assert both_reach(world)
    world.container("h3", "web", "three")
    world.wait(lambda: reaches(world, "h1", "one", "three"), "who is new is found")
    world.docker("h3", "rm", "-f", "three")
    nothing_is_left(world)


@pytest.mark.parametrize("first", ["agent", "engine"])
def test_an_engine_and_its_agent_that_end_together(world: DockerWorld, first: str) -> None:
    pair(world)
    world.bed.kill("h1", engine=first == "engine")
    world.bed.kill("h1", engine=first != "engine")
    world.bed.start("h1")  # the agent, then the engine, which starts `one` again
    world.wait(lambda: both_reach(world), "both reach each other again")
    world.wait(lambda: names(world) == ["one", "two"], "h2 knows them and no others")
    nothing_is_left(world)


def test_a_container_that_is_taken_out_by_force(world: DockerWorld) -> None:
    pair(world)
    world.docker("h3", "network", "disconnect", "-f", "web", "two")
    world.wait(lambda: names(world) == ["one"], "two is not in it")
    world.docker("h3", "network", "connect", "--alias", "again", "web", "two")
    world.wait(lambda: reaches(world, "h1", "one", "again"), "two is in it again")
    world.docker("h3", "kill", "two")
    world.wait(lambda: names(world) == ["one"], "what was killed is not in it")
    world.docker("h3", "start", "two")
    world.wait(lambda: both_reach(world), "it is back")
    nothing_is_left(world)


def test_a_network_in_use_here_is_not_removed(world: DockerWorld) -> None:
    pair(world)
    done = world.try_docker("h3", "network", "rm", "web")
    assert "active endpoints" in done.stderr  # of this host's own, as ever
    said = world.docker("h3", "run", "--rm", "--network", "web", IMAGE, "ping", "-c1", "one")
    assert "1 packets received" in said
    nothing_is_left(world)
