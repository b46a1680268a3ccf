"""Addresses: chosen by one ring for all engines, and as users say."""

from __future__ import annotations

from agent.testbed.engines import IMAGE
from tests.docker.world import DockerWorld

OURS = ("-d", "vxmesh", "--ipam-driver", "vxmesh")


def create(world: DockerWorld, *options: str) -> None:
    """A network `web`, on h1 and h3."""
    world.docker("h1", "network", "create", *options, "web")
    world.wait(lambda: "web" in world.networks("h3"), "web is on h3")


def test_as_the_user_says(world: DockerWorld) -> None:
    create(world, *OURS, "--subnet", "10.20.0.0/24", "--gateway", "10.20.0.254",
           "--ip-range", "10.20.0.128/26")  # fmt: skip
    world.container("h1", "web", "one", "--ip", "10.20.0.7", "--mac-address", "02:00:00:00:00:07")
    world.container("h3", "web", "two")
    one, two = world.about("h1", "one", "web"), world.about("h3", "two", "web")
    assert (one["IPAddress"], one["IPPrefixLen"]) == ("10.20.0.7", 24)
    assert (one["MacAddress"], one["Gateway"]) == ("02:00:00:00:00:07", "10.20.0.254")
    assert 128 <= int(two["IPAddress"].split(".")[3]) < 192
    seen = world.docker("h1", "exec", "one", "cat", "/sys/class/net/eth0/address")
    assert seen == "02:00:00:00:00:07"
    world.known("h3", "one")
    assert "1 packets received" in world.docker("h3", "exec", "two", "ping", "-c1", "10.20.0.7")
    done = world.try_docker(
        "h3", "run", "--rm", "--network", "web", "--ip", "10.20.0.7", IMAGE, "true"
    )
    assert "10.20.0.7: is taken by one on h1" in done.stderr


def test_a_subnet_is_chosen_that_no_host_uses(world: DockerWorld) -> None:
    create(world, *OURS)
    world.docker("h2", "network", "create", *OURS, "other")
    world.later(lambda: world.try_docker("h2", "network", "rm", "other"))

    def known() -> list[str]:
        return [n["subnets"][0] for n in world.read("h1", "network", "ls")]

    world.wait(lambda: len(known()) == 2, "h1 knows both")
    subnets = known()
    assert len(set(subnets)) == 2 and all(s.endswith("/20") for s in subnets)


def test_ipv6(world: DockerWorld) -> None:
    create(world, *OURS, "--ipv6")
    world.container("h1", "web", "one")
    address = world.about("h1", "one", "web")["GlobalIPv6Address"]
    assert address.startswith("fd")
    world.known("h3", "one")
    said = world.docker(
        "h3", "run", "--rm", "--network", "web", IMAGE, "ping6", "-c1", "-w20", address
    )
    assert "1 packets received" in said


def test_internal_has_no_way_out(world: DockerWorld) -> None:
    create(world, *OURS, "--internal")
    world.docker("h1", "network", "create", *OURS, "outward")
    world.container("h1", "web", "one")
    world.container("h1", "outward", "two")
    # The hosts' name server, to which there is a route.
    ping = ("ping", "-c1", "-W10", world.bed.client.address)
    assert "1 packets received" in world.docker("h1", "exec", "two", *ping)
    # It is ping that says so, not the engine that could not run it.
    done = world.try_docker("h1", "exec", "one", *ping)
    assert done.returncode == 1 and "Error" not in done.stderr
    assert "Network is unreachable" in done.stderr or "0 packets received" in done.stdout
    assert "default" not in world.docker("h1", "exec", "one", "ip", "route")
    address = world.about("h1", "one", "web")["IPAddress"]
    world.known("h3", "one")
    for target in (address, "one"):
        said = world.docker("h3", "run", "--rm", "--network", "web", IMAGE, "ping", "-c1", target)
        assert "1 packets received" in said


def test_aux_addresses_are_nobodys(world: DockerWorld) -> None:
    create(world, *OURS, "--subnet", "10.22.0.0/29", "--aux-address", "router=10.22.0.2")
    for host in ("h1", "h3"):
        done = world.try_docker(
            host, "run", "--rm", "--network", "web", "--ip", "10.22.0.2", IMAGE, "true"
        )
        assert "10.22.0.2: is the gateway's, kept free" in done.stderr
    given = [("h1", "c1"), ("h3", "c2"), ("h1", "c3"), ("h3", "c4")]
    for host, name in given:
        world.container(host, "web", name)
    found = [world.about(host, name, "web")["IPAddress"] for host, name in given]
    assert sorted(found) == [f"10.22.0.{n}" for n in range(3, 7)]
