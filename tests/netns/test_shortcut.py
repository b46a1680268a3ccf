"""The short way in, on the real kernel: who takes it, who does not, and that it comes back."""

from __future__ import annotations

import functools
import json

from tests.netns.world import World

PROBE = ("inet", "vxt_long")  # sees what takes the long way from the uplink to a sandbox


def _watch(world: World, *addresses: str) -> None:
    """Count from now on what our namespace of h1 itself sends on to these addresses."""
    rules = ["type filter hook forward priority -10"]
    for address in addresses:
        rules.append(f"{'ip6' if ':' in address else 'ip'} daddr {address} counter name long")
    chain = "chain forward {\n" + "\n".join(rules) + "\n}\n"
    world.in_own("h1", "nft", f"table {' '.join(PROBE)} {{\ncounter long {{ }}\n{chain}}}")
    world.later(lambda: world.in_own("h1", "nft", "delete", "table", *PROBE))


def _long(world: World) -> int:
    listed = json.loads(world.in_own("h1", "nft", "-j", "list", "counter", *PROBE, "long"))
    return int(listed["nftables"][1]["counter"]["packets"])


def _ways(world: World, version: int) -> str:
    return world.in_own("h1", "nft", "list", "map", "netdev", "vxmesh", f"ways{version}")


def _is_reached(world: World, address: str) -> bool:
    return not world.run("h1", "ping", "-c", "1", "-W", "2", address).returncode


def test_what_comes_into_a_bridge_takes_the_short_way(world: World) -> None:
    net = world.network("--driver", "bridge", "--subnet", "10.87.0.0/24", "--subnet", "fd87::/64")
    one = world.workload("h1", net)
    found = world.read("h1", "endpoint", "inspect", one)["addresses"]
    addresses = sorted(text.split("/")[0] for text in found)
    assert [":" in address for address in addresses] == [False, True]
    _watch(world, *addresses)
    for address in addresses:
        world.wait(functools.partial(_is_reached, world, address), f"{address} is reached")
    assert _long(world) == 0
    expired = world.run("h1", "ping", "-c", "1", "-W", "2", "-t", "1", addresses[0]).stdout
    assert "exceeded" in expired, "who sent it is told, by the long way"


def test_a_bridge_that_was_made_anew_has_the_short_way_again(world: World) -> None:
    net = world.network("--driver", "bridge")
    one = world.workload("h1", net)
    address = world.address("h1", one, net)
    device = f"vxb{world.vni(net)}"
    world.wait(lambda: device in _ways(world, 4), "the short way leads there")
    world.in_own("h1", "ip", "link", "del", device)
    world.wait(lambda: device in _ways(world, 4), "it leads to the new one")
    world.wait(functools.partial(_is_reached, world, address), "the sandbox is on it")
    _watch(world, address)
    assert _is_reached(world, address)
    assert _long(world) == 0
    world.in_own("h1", "nft", "delete", "table", "netdev", "vxmesh")
    tables = functools.partial(world.in_own, "h1", "nft", "list", "tables")
    world.wait(lambda: "table netdev vxmesh" in tables(), "what others delete is put back")


def test_the_short_way_outlives_the_uplink(world: World) -> None:
    net = world.network("--driver", "bridge")
    address = world.address("h1", world.workload("h1", net), net)
    world.in_own("h1", "ip", "link", "del", "uplink")
    world.wait(functools.partial(_is_reached, world, address), "there is another uplink")
    _watch(world, address)

    def is_short() -> bool:
        before = _long(world)
        return _is_reached(world, address) and _long(world) == before

    world.wait(is_short, "and the short way from it")


def test_who_sends_too_much_for_a_bridge_is_told_so(world: World) -> None:
    net = world.network("--driver", "bridge", "--mtu", "1400")
    address = world.address("h1", world.workload("h1", net), net)
    world.wait(functools.partial(_is_reached, world, address), "it is reached")
    large = world.run("h1", "ping", "-c", "1", "-W", "2", "-M", "do", "-s", "1440", address)
    assert "1400" in large.stdout + large.stderr
    assert f"vxb{world.vni(net)}" not in _ways(world, 4)
