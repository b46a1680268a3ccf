"""Networks of IPv6 alone, over an underlay of IPv6: names, services, the way out, the MTU.

What is written for both families is tested for both where it is; here there is no IPv4 to fall
back on, neither inside nor between the hosts.
"""

from __future__ import annotations

import ipaddress
import json
import sys
from collections.abc import Iterator

import pytest

from agent.testbed import Testbed, temporary
from tests.netns.test_paths import Box, Hole, wait_path
from tests.netns.test_services import ASK, SERVER, Backend, ask, ready, refused, wait_served
from tests.netns.world import World, said, until_said

pytestmark = pytest.mark.netns
SERVER6 = (
    SERVER.replace("'0.0.0.0'", "'::'")
    .replace(
        " daemon_threads = True\n", " daemon_threads = True\n address_family = socket.AF_INET6\n"
    )
    .replace("import http.server, os, socketserver", "import http.server, os, socket, socketserver")
)


@pytest.fixture(scope="module")
def bed6() -> Iterator[Testbed]:
    """Two hosts whose agents reach each other by IPv6."""
    with temporary(hosts=2, underlay=6, agent_options=["--path-interval", "0.5"]) as made:
        yield made


@pytest.fixture
def world(bed6: Testbed) -> Iterator[World]:
    made = World(bed6)
    yield made
    made.clean()


def test_workloads_reach_each_other_by_name_and_have_no_ipv4(world: World) -> None:
    net = world.network("--ipv6-only")
    [subnet] = world.read("h2", "network", "inspect", net)["subnets"]
    assert ipaddress.IPv6Network(subnet).subnet_of(ipaddress.IPv6Network("fd00::/8"))
    one, two = world.workload("h1", net), world.workload("h2", net)
    shown = json.loads(world.inside("h1", one, "ip", "-j", "addr", "show", "eth0").stdout)
    assert {a["family"] for a in shown[0]["addr_info"]} == {"inet6"}
    conf = world.inside("h1", one, "cat", "/etc/resolv.conf").stdout
    gateway = world.read("h1", "network", "inspect", net)["gateways"][0]
    assert f"nameserver {gateway}\n" in conf and conf.count("nameserver") == 1
    assert world.reaches("h1", one, two) and world.reaches("h2", two, f"{one}.{net}")
    back = world.inside("h1", one, "getent", "hosts", world.address("h2", two))
    assert f"{two}.{net}.vxmesh.internal" in back.stdout


def test_the_mtu_is_what_fits_over_ipv6(world: World) -> None:
    net = world.network("--ipv6-only")
    one, two = world.workload("h1", net), world.workload("h2", net)
    assert world.link("h1", one)["mtu"] == 1500 - 70
    to = world.address("h2", two)
    for size, passes in ((1430 - 48, True), (1430 - 47, False)):
        within = "10" if passes else "1"
        done = world.inside("h1", one, "ping", "-c1", "-W", within, "-M", "do", "-s", str(size), to)
        assert (done.returncode == 0) == passes, done.stdout


def test_a_black_hole_between_ipv6_hosts_is_found(world: World) -> None:
    net = world.network("--ipv6-only")
    one, _ = Box(world, "h1", net), Box(world, "h2", net)
    wait_path(world, "h1", "h2", ("whole", 1500, 1500))
    hole = Hole(world)
    world.later(hole.fill)
    hole.dig(1400)
    wait_path(world, "h1", "h2", ("narrow", 1400, 1500))
    one.wait_mtu(1400 - 70)


def test_traffic_leaves_as_the_hosts_unless_internal(world: World) -> None:
    free = world.workload("h1", world.network("--ipv6-only"))
    shut = world.workload("h1", world.network("--ipv6-only", "--internal"))
    client = world.bed.client.address6
    capture = world.bed.client.popen(
        ["tcpdump", "-nni", "eth0", "-c", "1", "-l", "--immediate-mode", "ip6[40] == 128"],
        stdout=-1, stderr=-1, text=True,
    )  # fmt: skip
    until_said(capture.stderr, "listening on")
    assert world.reaches("h1", free, client)
    out, _ = capture.communicate(timeout=30)
    assert f"{world.host('h1').address6} > {client}" in out
    assert not world.pings("h1", shut, client)


def test_a_service_is_reached_by_name_and_published_port_and_sees_the_client(
    world: World,
) -> None:
    net = world.network("--ipv6-only")
    world.workload("h1", net, "client")
    back = Backend(world, "h2", net, "back", "--label", "app=web")
    back.start(SERVER6)
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--selector", "app=web", "--health", "tcp", "--health-interval", "0.5",
        "--publish", "8080:80", "--wait=10",
    )  # fmt: skip
    wait_served(world, "h1", "client", "http://web/")
    assert ask(world, "h1", "client", "http://web/") == f"back {world.address('h1', 'client')}"
    client = world.bed.client
    for host in ("h1", "h2"):  # without a backend there, and with
        command = ["python", "-c", ASK, f"http://[{world.host(host).address6}]:8080/"]
        told = f"back {client.address6}"
        world.wait(lambda c=command, t=told: client.run(c).stdout.strip() == t, f"by {host}")  # type: ignore[misc]
    back.stop()
    world.wait(lambda: ready(world, "h1", "web") == set(), "unhealthy")


def test_with_affinity_a_client_stays_at_every_node_when_backends_come(world: World) -> None:
    net = world.network("--ipv6-only")
    for host, name in (("h1", "one"), ("h2", "two")):
        Backend(world, host, net, name).start(SERVER6)
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--publish", "8080:80", "--affinity", "client", "--affinity-timeout", "1800", "--wait=10",
    )  # fmt: skip

    def answers() -> list[str]:
        urls = [f"http://[{world.host(host).address6}]:8080/" for host in ("h1", "h2")]
        asked = [world.bed.client.run(["python", "-c", ASK, url]) for url in urls]
        return [done.stdout.partition(" ")[0] or done.stderr for done in asked]

    add = ("service", "backend", "add", "web", "--wait=10")
    world.vx("h1", *add, "one")
    assert answers() == ["one"] * 2
    world.vx("h2", *add, "two", "--weight", "100")
    assert answers() == ["one"] * 2
    world.vx("h2", "service", "backend", "drain", "web", "one", "--wait=10")
    assert answers() == ["two"] * 2


HOLDER = """
import socket, sys
s = socket.create_server((sys.argv[1], 8088), family=socket.AF_INET6)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("at", ["::", "its own address"])
def test_a_port_that_something_holds_over_ipv6_is_told_with_the_node(world: World, at: str) -> None:
    net, h2 = world.network("--ipv6-only"), world.host("h2")
    command = [sys.executable, "-c", HOLDER, at if at == "::" else h2.address6]
    holder = h2.popen(command, stdin=-1, stdout=-1, text=True)
    world.later(holder.kill)
    assert said(holder.stdout) == "up\n"
    make = ("service", "create", "web", "--network", net, "--port", "80", "--publish", "8088:80")
    status, error = refused(world, "h1", *make)
    assert status == 5 and "h2 (" in error["message"], error
    assert world.read("h1", "service", "ls") == []
    world.vx("h1", *make, "--publish-on", "h1", "--wait=10")
    assert world.read("h2", "service", "inspect", "web")["publish_on"] == ["h1"]
