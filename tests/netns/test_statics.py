"""Several subnets of one family in a network, addresses kept free, and ranges of both families."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from tests.netns.world import World


def test_a_network_goes_on_in_its_second_subnet_when_the_first_is_full(world: World) -> None:
    net = world.network(
        "--subnet", "10.61.0.0/29", "--subnet", "10.62.0.0/24", "--subnet", "fd61::/64",
        "--aux-address", "db=10.61.0.3",
    )  # fmt: skip
    one = world.workload("h1", net)
    for name in ("a", "b", "c"):
        world.vx("h1", "endpoint", "create", "--network", net, "--name", name)
    taken = {e["addresses"][0] for e in world.read("h1", "endpoint", "ls", "--network", net)}
    assert taken == {f"10.61.0.{n}" for n in (2, 4, 5, 6)}, "all but what is kept free"
    kept = ("endpoint", "create", "--network", net, "--name", "d", "--ip", "10.61.0.3")
    assert world.try_vx("h2", *kept).returncode == 5

    two = world.workload("h2", net)
    four, six = world.read("h2", "endpoint", "inspect", two)["addresses"]
    assert ip_address(four) in ip_network("10.62.0.0/24")
    routes = world.inside("h2", two, "ip", "route", "show", "default").stdout
    assert routes.split()[:5] == ["default", "via", "10.62.0.1", "dev", "eth0"]
    beside = world.workload("h1", net, "", "--ip", "10.62.0.200")
    for target in (four, six, "10.62.0.200"):  # on the other host, and on this one
        assert world.reaches("h1", one, target), target
    for target in (one, beside):
        assert world.reaches("h2", two, target), f"{target}, by name"
    # The way back of balanced connections is by the gateway of one's own subnet, too.
    world.vx("h1", "service", "create", "web", "--network", net, "--port", "80", "--wait=10")
    ways = world.inside("h2", two, "ip", "route", "show", "table", "all").stdout
    assert "default via 10.62.0.1 dev eth0 table 836" in ways
    assert "via 10.61.0.1" not in ways


def test_each_family_has_its_range(world: World) -> None:
    net = world.network(
        "--subnet", "10.63.0.0/24", "--subnet", "fd63::/64",
        "--ip-range", "10.63.0.64/30", "--ip-range", "fd63::40/126",
    )  # fmt: skip
    for host, name in (("h1", "a"), ("h2", "b")):
        world.vx(host, "endpoint", "create", "--network", net, "--name", name, "--wait=20")
    found = {
        a for e in world.read("h1", "endpoint", "ls", "--network", net) for a in e["addresses"]
    }
    inside = [ip_network("10.63.0.64/30"), ip_network("fd63::40/126")]
    assert len(found) == 4
    assert all(any(ip_address(a) in part for part in inside) for a in found)
    assert world.read("h2", "network", "inspect", net)["ip_ranges"] == list(map(str, inside))
