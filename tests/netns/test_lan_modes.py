"""The hosts' own wire in both families, and mode vepa with a switch that turns frames round."""

from __future__ import annotations

import functools
import subprocess

from agent.testbed.fabric import SWITCH, port_of
from tests.netns.test_drivers import SUBNET, _reaches
from tests.netns.world import World

WIRE6, OUTSIDE6 = "fd66:99::/64", "fd66:99::100"


def _both(world: World, *options: str) -> str:
    """A macvlan network of both families on the hosts' wire; the client is the gateway."""
    world.run("client", "ip", "addr", "add", f"{OUTSIDE6}/64", "dev", "eth0", "nodad", check=True)
    world.later(lambda: world.run("client", "ip", "addr", "del", f"{OUTSIDE6}/64", "dev", "eth0"))
    return world.network(
        "--driver", "macvlan", "--subnet", SUBNET, "--subnet", WIRE6,
        "--ip-range", "10.99.0.128/25", "--ip-range", "fd66:99::80/121",
        "--gateway", world.host("client").address, "--gateway", OUTSIDE6,
        "-O", "parent=eth0", *options,
    )  # fmt: skip


def _addresses(world: World, host: str, name: str) -> list[str]:
    found: list[str] = world.read(host, "endpoint", "inspect", name)["addresses"]
    return found


def test_workloads_on_the_wire_have_both_families(world: World) -> None:
    net = _both(world, "-O", "host-interface=true")
    one, two, far = (world.workload(h, net) for h in ("h1", "h1", "h2"))
    for target in (*_addresses(world, "h1", two), *_addresses(world, "h2", far), OUTSIDE6):
        assert world.reaches("h1", one, target), target
    assert _reaches(world, "client", _addresses(world, "h1", one)[1]), "from outside, straight"
    assert _reaches(world, "h1", _addresses(world, "h1", one)[1]), "by the host's own interface"
    routes = world.inside("h1", one, "ip", "-6", "route", "show", "default").stdout
    assert routes.startswith(f"default via {OUTSIDE6} dev eth0")
    there = _addresses(world, "h2", far)[1]

    def told() -> list[str]:
        return world.inside("h1", one, "getent", "ahostsv6", far).stdout.split()[:1]

    world.wait(lambda: told() == [there], "its name is answered with the address of that family")


def test_in_mode_vepa_workloads_of_one_host_meet_at_the_switch(world: World) -> None:
    net = _both(world, "-O", "mode=vepa")
    one, two, far = (world.workload(h, net) for h in ("h1", "h1", "h2"))
    for target in _addresses(world, "h2", far):
        assert world.reaches("h1", one, target), target
    for target in _addresses(world, "h1", two):
        assert not world.pings("h1", one, target), "the switch turns nothing round"
    switch = world.host("h1").namespace.removesuffix("h1") + SWITCH
    turn = ["bridge", "-n", switch, "link", "set", "dev", port_of("h1"), "hairpin"]
    subprocess.run([*turn, "on"], check=True)
    try:
        for target in _addresses(world, "h1", two):
            # Who has just been found to be away is asked for anew in a second only.
            reaches = functools.partial(world.pings, "h1", one, target)
            world.wait(reaches, f"{target} by way of the switch", 30)
    finally:
        subprocess.run([*turn, "off"], check=True)
