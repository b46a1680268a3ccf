"""Names of containers on every host, without a flag; and what is not ours goes where it went."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest

from agent.testbed.engines import IMAGE
from tests.docker.world import DockerWorld


def address_by(world: DockerWorld, host: str, container: str, name: str) -> str:
    """What a container is answered for a name; empty: there is none."""
    done = world.try_docker(host, "exec", container, "nslookup", "-type=a", name)
    lines = done.stdout.partition("Name:")[2].splitlines()
    found = [line.split()[1] for line in lines if line.startswith("Address")]
    return found[0] if found else ""


def pair(world: DockerWorld, *options: str, of: str = "web") -> str:
    """Network `of`, `one` on h1, and on h3 `two` with options, which h1 knows; its address."""
    world.docker("h1", "network", "create", "-d", "vxmesh", of)
    world.wait(lambda: of in world.networks("h3"), f"{of} is on h3")
    world.container("h1", of, "one")
    world.container("h3", of, "two", *options)
    known = lambda: "two" in world.vx("h1", "endpoint", "ls")  # noqa: E731
    world.wait(known, "two is known")
    return str(world.about("h3", "two", of)["IPAddress"])


def test_every_name_that_docker_gives(world: DockerWorld) -> None:
    address = pair(world, "--hostname", "box", "--network-alias", "my_db", "--network-alias", "x")
    id = world.docker("h3", "inspect", "-f", "{{.Id}}", "two")[:12]
    for name in ("two", "two.web", "two.web.vxmesh.internal", "box", "my_db", "MY_DB", "x", id):
        asked = partial(address_by, world, "h1", "one", name)
        world.wait(lambda a=asked: a() == address, f"{name} is answered")  # type: ignore[misc]
    assert address_by(world, "h1", "one", "three") == ""


def test_another_name_and_none(world: DockerWorld) -> None:
    address = pair(world)
    world.docker("h3", "rename", "two", "new")
    world.wait(lambda: address_by(world, "h1", "one", "new") == address, "new is its name")
    assert address_by(world, "h1", "one", "two") == ""
    world.docker("h3", "rm", "-f", "new")
    world.wait(lambda: address_by(world, "h1", "one", "new") == "", "it has none")


def test_the_same_name_on_two_hosts_is_either(world: DockerWorld) -> None:
    address = pair(world)
    world.wait(lambda: "web" in world.networks("h2"), "web is on h2")
    world.container("h2", "web", "two")
    other = world.about("h2", "two", "web")["IPAddress"]
    known = lambda: len(world.read("h1", "endpoint", "ls")) == 3  # noqa: E731
    world.wait(known, "both are known")

    def seen() -> set[str]:
        return {address_by(world, "h1", "one", "two") for _ in range(4)}

    world.wait(lambda: seen() == {address, other}, "both are answered, in turn")


def test_a_container_in_two_networks_sees_the_names_of_both(world: DockerWorld) -> None:
    address = pair(world)
    world.docker("h1", "network", "create", "-d", "vxmesh", "aside")
    world.wait(lambda: "aside" in world.networks("h3"), "aside is on h3")
    world.container("h3", "aside", "three")
    world.docker("h1", "network", "connect", "aside", "one")
    there = world.about("h3", "three", "aside")["IPAddress"]
    world.wait(lambda: address_by(world, "h1", "one", "three") == there, "three is seen")
    assert address_by(world, "h1", "one", "two") == address
    assert address_by(world, "h3", "two", "three") == ""
    world.docker("h1", "network", "disconnect", "aside", "one")
    world.wait(lambda: address_by(world, "h1", "one", "three") == "", "three is seen no more")


def test_a_container_whose_default_route_is_another_networks(world: DockerWorld) -> None:
    address = pair(world)
    world.docker("h1", "network", "create", "-d", "bridge", "aaa")  # the first of these has it
    world.later(lambda: world.docker("h1", "network", "rm", "aaa"))
    world.docker("h1", "network", "connect", "aaa", "one")
    world.later(lambda: world.docker("h1", "rm", "-f", "one"))
    gateway = world.about("h1", "one", "aaa")["Gateway"]
    assert f"default via {gateway} " in world.docker("h1", "exec", "one", "ip", "route")
    world.wait(lambda: address_by(world, "h1", "one", "two") == address, "two is seen")
    # And in two of ours, of which either has the routes to the name servers.
    world.docker("h1", "network", "create", "-d", "vxmesh", "--internal", "inside")
    world.docker("h1", "network", "connect", "inside", "one")
    world.wait(lambda: address_by(world, "h1", "one", "two") == address, "two is seen still")
    world.docker("h1", "restart", "one")
    world.wait(lambda: address_by(world, "h1", "one", "two") == address, "two is seen again")


@pytest.mark.parametrize("policy", ["ACCEPT", "DROP"])
def test_published_ports_and_the_way_out_whatever_is_forwarded(
    world: DockerWorld, policy: str
) -> None:
    # DROP is what an engine sets that starts before anything else forwards.
    if policy == "DROP":
        world.bed.kill("h1", engine=True)
    assert world.run("h1", "iptables", "-P", "FORWARD", policy).returncode == 0
    world.later(lambda: world.run("h1", "iptables", "-P", "FORWARD", "ACCEPT"))
    if policy == "DROP":
        assert world.run("h1", "iptables", "-F", "DOCKER-USER").returncode == 0
        world.bed.start("h1")
    world.docker("h1", "network", "create", "-d", "vxmesh", "web")
    serve = "echo hello > /var/www/index.html; httpd -f -v -h /var/www"
    world.docker(
        "h1", "run", "-d", "--network", "web", "--name", "www", "--stop-timeout", "0",
        "-p", "8080:80", IMAGE, "sh", "-c", serve,
    )  # fmt: skip
    url = f"http://{world.host('h1').address}:8080/"
    client = world.bed.client
    world.wait(lambda: world.fetched(url) == ["hello"], "it is served")
    world.logged("h1", "www", client.address)
    answering = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000)"
    server = client.popen([sys.executable, "-c", answering], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        ask = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 10 {client.address} 8000"

        def answered() -> str:
            return world.try_docker("h1", "exec", "www", "sh", "-c", ask).stdout

        world.wait(lambda: "200 OK" in answered(), "the outside is reached")
    finally:
        server.kill()
        server.wait()
