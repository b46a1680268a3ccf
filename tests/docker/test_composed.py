"""docker-compose.yml: three hosts and a client by one command, and a host's own agent by another.

The image is built as the Dockerfile says, on one that lacks nothing (base.py): that apt and pip can
get what a plain base lacks is not seen here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent.testbed import Testbed
from agent.testbed.agents import answers
from tests.docker.base import give_base
from tests.docker.test_compose import need_compose
from tests.docker.test_life import reaches
from tests.docker.world import ANSWERED, FETCH, DockerWorld
from tests.netns.world import Failed

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/compose.md"
HOSTS = ("h1", "h2", "h3")
PROJECT = "composed"
TIMEOUT = 300.0  # s; for an image to be built, and three agents to start, beside other tests
MANY = 80  # connections, of which some reach each of three backends, but for 1 in 10^13 times
SOON = 60.0  # s; the three share what others leave of two cores


class Composed:
    """What is made of docker-compose.yml on one host of a testbed."""

    def __init__(self, world: DockerWorld, base: str) -> None:
        self.world, self._base = world, base

    def compose(self, *words: str, fine: bool = True) -> str:
        """A docker-compose command; its stdout. Failed if it fails and is to be `fine`."""
        settings = {"BASE": self._base, "COMPOSE_PROJECT_NAME": PROJECT}
        settings |= {"DOCKER_BUILDKIT": "0", "VXMESH_NAME": "h1"}
        settings["VXMESH_ADVERTISE"] = self.world.host("h1").address
        words = ("docker-compose", "-f", str(ROOT / "docker-compose.yml"), *words)
        done = self.world.run("h1", *words, timeout=TIMEOUT, env=settings)
        if fine and done.returncode:
            raise Failed(f"{' '.join(words)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def answers(self, host: str, count: int = 12, within: float = ANSWERED) -> set[str]:
        """Who answers the client at a host's port; "" where nobody does. Each connection's backend
        is a matter of chance: of three, one is missed by 12 connections in 1 of 43 times."""
        url = f"http://{host}:8080/"
        asks = ("python3", "-c", FETCH, url, str(count), str(within))
        return set(json.loads(self.exec("client", *asks)))

    def exec(self, service: str, *words: str, fine: bool = True) -> str:
        """A command in a service's container; its stdout. docker-compose's own takes 0.5 s more."""
        done = self.world.try_docker("h1", "exec", f"{PROJECT}_{service}_1", *words)
        if fine and done.returncode:
            raise Failed(f"{service}: {' '.join(words)}: {done.returncode}: {done.stderr}")
        return done.stdout

    def inspect(self, of: str, node: str) -> dict[str, Any]:
        """A node as another one tells it; empty: that one's agent is away."""
        said = self.exec(of, "vxmesh", "node", "inspect", node, "-o", "json", fine=False)
        return dict(json.loads(said)) if said else {}


@pytest.fixture(scope="module")
def composed(docker_bed: Testbed) -> Iterator[Composed]:
    """All of the file, up, as the page's first line makes it."""
    need_compose()
    made = Composed(DockerWorld(docker_bed), give_base(docker_bed.host("h1")))
    first = lines()[0]
    try:
        made.compose(*first[1:])
        yield made
    finally:
        made.compose("down", "-v")


def lines() -> list[list[str]]:
    """The words of the lines that the page starts with."""
    found = re.search(r"```\n(.*?)```", PAGE.read_text(), re.S)
    assert found
    split = [shlex.split(line) for line in found[1].splitlines()]
    assert [words[0] for words in split] == ["docker-compose"] * 4
    return split


def test_the_four_lines(composed: Composed) -> None:
    _, ls, ping, logs = lines()
    said = composed.compose("exec", "-T", *ls[2:])  # no terminal is here
    assert [line.split()[2] for line in said.splitlines()[1:]] == ["alive"] * 3
    assert " 0% packet loss" in composed.compose("exec", "-T", *ping[2:])

    def seen() -> set[str]:
        return set(re.findall(r"leads to (\S+)", composed.compose(*logs[1:])))

    until(composed, lambda: seen() == {*HOSTS}, "all answer the client")


def test_each_workload_sees_the_clients_own_address(composed: Composed) -> None:
    assert composed.answers("h1", MANY, within=20) == {*HOSTS}
    address = composed.exec("client", "hostname", "-i").strip()
    for host in HOSTS:
        log = partial(composed.exec, host, "cat", f"/run/vxmesh/logs/w{host[1:]}.log")
        until(composed, lambda log=log: address in log(), f"{host} has logged it")  # type: ignore[misc]


def test_agents_that_start_anew_one_after_the_other(composed: Composed) -> None:
    for host in HOSTS:
        before = life(composed, host)
        composed.compose("kill", "-s", "HUP", host)
        assert composed.answers(host, 6, within=20) <= {*HOSTS}  # nobody notices
        until(composed, partial(is_another, composed, host, before), f"{host} is back")
    assert composed.answers("h2", MANY, within=20) == {*HOSTS}
    ping = ("vxmesh", "exec", "w1", "ping", "-c1", "w3")
    until(
        composed, lambda: " 0% packet loss" in composed.exec("h1", *ping, fine=False), "w3 answers"
    )


def until(composed: Composed, holds: Callable[[], object], text: str) -> None:
    composed.world.wait(holds, text, SOON)


def life(composed: Composed, host: str) -> str:
    """What tells an agent from the one before: since when it runs; empty: there is none."""
    return str(composed.inspect(host, host).get("since", ""))


def is_another(composed: Composed, host: str, before: str) -> bool:
    return life(composed, host) not in ("", before)


def test_a_host_that_is_cut_off(composed: Composed) -> None:
    composed.exec("h3", "ip", "link", "set", "eth0", "down")
    composed.world.wait(
        lambda: composed.inspect("h1", "h3").get("state") == "unreachable", "h3 is gone", SOON
    )
    until(composed, lambda: composed.answers("h1") == {"h1", "h2"}, "two answer")
    composed.exec("h3", "ip", "link", "set", "eth0", "up")
    until(composed, lambda: composed.answers("h1") == {*HOSTS}, "h3 is back")


def test_a_host_that_is_killed(composed: Composed) -> None:
    before = life(composed, "h2")
    composed.compose("kill", "h2")
    until(composed, lambda: composed.answers("h1") == {"h1", "h3"}, "two answer")
    composed.compose("start", "h2")
    until(composed, lambda: composed.answers("h1") == {*HOSTS}, "h2 is back")
    until(composed, partial(is_another, composed, "h2", before), "its agent too")
    assert composed.exec("h1", "vxmesh", "node", "ls").count("\n") == 4  # as the node that it was


def agent_answers(world: DockerWorld) -> bool:
    """Whether h1 has an agent, whoever started it, that h2 knows too."""
    if not answers(world.host("h1").socket):
        return False
    return bool(world.read("h2", "node", "inspect", "h1")["state"] == "alive")


def test_an_agent_in_a_container_is_a_hosts_own(composed: Composed) -> None:
    composed.compose("stop", "-t", "0")
    world = composed.world
    # As on a host that systemd has started; a testbed's mounts are apart from each other.
    assert world.run("h1", "mount", "--make-rshared", "/run").returncode == 0
    world.bed.kill("h1")
    try:
        composed.compose("up", "-d", "agent")
        until(composed, partial(agent_answers, world), "it is there")
        world.docker("h1", "network", "create", "-d", "vxmesh", "web")
        until(composed, lambda: "web" in world.networks("h3"), "web is on h3")
        world.container("h1", "web", "one")
        world.container("h3", "web", "two")
        for host, container, other in (("h1", "one", "two"), ("h3", "two", "one")):
            reached = partial(reaches, world, host, container, other)
            until(composed, reached, f"{container} reaches {other}")
        composed.compose("stop", "agent")
        address = world.about("h3", "two", "web")["IPAddress"]
        assert reaches(world, "h1", "one", address)  # what it made is the host's
        composed.compose("start", "agent")
        until(composed, partial(agent_answers, world), "it is back")
        until(composed, lambda: reaches(world, "h1", "one", "two"), "one reaches two")
    finally:
        for host, container in (("h1", "one"), ("h3", "two")):
            world.try_docker(host, "rm", "-f", container)
        world.try_docker("h3", "network", "rm", "web")
        composed.compose("rm", "-sf", "agent")
        world.run("h1", "mount", "--make-rprivate", "/run")
        world.bed.start("h1")
