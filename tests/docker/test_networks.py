"""Networks of several real engines: what is made on one host is on all, and goes from all."""

from __future__ import annotations

import pytest

from agent.testbed import temporary
from agent.testbed.engines import IMAGE
from tests.docker.world import DockerWorld

HOSTS = ("h1", "h2", "h3")


def test_what_one_host_makes_another_uses_by_name(world: DockerWorld) -> None:
    world.docker("h1", "network", "create", "-d", "vxmesh", "web")
    world.docker("h1", "run", "-d", "--network", "web", "--name", "db", IMAGE, "sleep", "3600")
    world.wait(lambda: "web" in world.networks("h3"), "web is on h3")
    world.known("h3", "db")
    said = world.docker("h3", "run", "--rm", "--network", "web", IMAGE, "ping", "-c1", "db")
    assert "1 packets received" in said


@pytest.mark.parametrize("remover", ["h1", "h2"])
def test_a_network_appears_on_all_hosts_and_goes_from_all(world: DockerWorld, remover: str) -> None:
    label = ("--label", "com.example.team=a")
    world.docker("h1", "network", "create", "-d", "vxmesh", "--internal", *label, "n_1")
    world.wait(lambda: all("n_1" in world.networks(h) for h in HOSTS), "n_1 is everywhere")
    for host in HOSTS:
        about = world.docker(
            host, "network", "inspect", "-f", "{{.Internal}} {{.Labels}} {{.IPAM.Config}}", "n_1"
        )
        assert about.startswith("true map[com.example.team:a]")
    assert world.read("h3", "network", "inspect", "n-1")["internal"]  # its name as a DNS label
    world.docker(remover, "network", "rm", "n_1")
    world.wait(lambda: not any(world.networks(h) for h in HOSTS), "n_1 is nowhere")
    world.wait(lambda: world.read("h3", "network", "ls") == [], "and h3's agent has none")


def test_what_is_in_use_elsewhere_comes_back(world: DockerWorld) -> None:
    world.docker("h1", "network", "create", "-d", "vxmesh", "web")
    world.wait(lambda: "web" in world.networks("h2"), "web is on h2")
    world.container("h1", "web", "db")
    before = world.networks("h2")["web"]
    world.docker("h2", "network", "rm", "web")
    world.wait(lambda: world.networks("h2").get("web", before) != before, "web is back on h2")
    world.known("h2", "db")
    said = world.docker("h2", "run", "--rm", "--network", "web", IMAGE, "ping", "-c1", "db")
    assert "1 packets received" in said


def test_a_name_that_another_network_of_an_engine_has(world: DockerWorld) -> None:
    world.docker("h2", "network", "create", "--subnet", "192.168.77.0/24", "web")
    world.later(lambda: world.docker("h2", "network", "rm", "web"))
    world.docker("h1", "network", "create", "-d", "vxmesh", "web")
    id = world.read("h1", "network", "ls")[0]["id"]
    world.wait(lambda: f"web-{id[:6]}" in world.networks("h2"), "it has another name on h2")
    assert "web" in world.networks("h1")


def test_engines_and_agents_that_were_away_catch_up(world: DockerWorld) -> None:
    world.docker("h1", "network", "create", "-d", "vxmesh", "stays")
    world.docker("h1", "network", "create", "-d", "vxmesh", "goes")
    world.wait(lambda: all(len(world.networks(h)) == 2 for h in HOSTS), "both are everywhere")
    world.bed.kill("h2", engine=True)
    world.bed.kill("h3")
    world.docker("h1", "network", "rm", "goes")
    world.docker("h1", "network", "create", "-d", "vxmesh", "comes")
    world.bed.start("h2")
    world.bed.start("h3")
    right = lambda: all(sorted(world.networks(h)) == ["comes", "stays"] for h in HOSTS)  # noqa: E731
    world.wait(right, "all have what there is")


def test_what_is_removed_while_the_agent_is_away_is_removed(world: DockerWorld) -> None:
    world.docker("h1", "network", "create", "-d", "vxmesh", "web")
    world.wait(lambda: all("web" in world.networks(h) for h in HOSTS), "web is everywhere")
    world.bed.kill("h1")
    world.try_docker("h1", "network", "rm", "web")
    world.bed.start("h1")
    world.wait(lambda: not any(world.networks(h) for h in HOSTS), "web is nowhere")


def test_a_network_of_vxmesh_itself_goes_from_engines_too(world: DockerWorld) -> None:
    world.docker("h1", "network", "create", "-d", "vxmesh", "web")
    world.wait(lambda: all("web" in world.networks(h) for h in HOSTS), "web is everywhere")
    world.vx("h2", "network", "rm", "web")
    world.wait(lambda: not any(world.networks(h) for h in HOSTS), "web is nowhere")


def test_an_engine_that_is_killed_leaves_no_endpoints(world: DockerWorld) -> None:
    world.docker("h1", "network", "create", "-d", "vxmesh", "web")
    world.container("h1", "web", "db")
    world.wait(lambda: world.read("h2", "endpoint", "ls"), "db is known")
    world.bed.kill("h1", engine=True)
    world.bed.start("h1")
    world.wait(lambda: not world.read("h2", "endpoint", "ls"), "db is gone")
    world.docker("h1", "start", "db")
    world.wait(lambda: "web" in world.networks("h2"), "web is on h2")
    world.known("h2", "db")
    said = world.docker("h2", "run", "--rm", "--network", "web", IMAGE, "ping", "-c1", "db")
    assert "1 packets received" in said


def test_dockers_choice_that_a_host_uses_is_refused_with_the_way_out() -> None:
    with temporary(hosts=2, docker=True) as bed:
        world = DockerWorld(bed)
        world.docker("h2", "network", "create", "--subnet", "172.18.0.0/16", "mine")
        route = "h2 172.18.0.0/16"
        world.wait(lambda: "172.18.0.0/16" in str(world.read("h1", "node", "inspect", "h2")), route)
        done = world.try_docker("h1", "network", "create", "-d", "vxmesh", "web")
        assert "overlaps 172.18.0.0/16, a route of host h2" in done.stderr
        assert "--ipam-driver vxmesh" in done.stderr
        world.docker("h1", "network", "create", "-d", "vxmesh", "--ipam-driver", "vxmesh", "web")
        world.wait(lambda: "web" in world.networks("h2"), "web is on h2")
