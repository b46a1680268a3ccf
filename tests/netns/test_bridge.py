"""Bridge networks on the real kernel: one node's own, with a way out and published ports."""

from __future__ import annotations

import json

from tests.netns.world import World


def test_a_bridge_is_on_the_node_that_made_it_alone(world: World) -> None:
    net, other = world.network("--driver", "bridge"), world.network()
    one, two = world.workload("h1", net), world.workload("h1", net)
    apart = world.workload("h1", other)
    assert world.pings("h1", one, world.read("h1", "network", "inspect", net)["gateways"][0])
    assert world.pings("h1", one, world.host("client").address)
    assert world.pings("h1", one, two), "by name"
    assert not world.pings("h1", one, world.address("h1", apart, other))
    assert f"vxl{world.vni(net)}" not in world.links("h1")
    refused = world.try_vx("h2", "run", "--network", net, "-o", "json", "--", "true")
    assert refused.returncode
    assert "is a bridge on h1" in json.loads(refused.stderr)["error"]["message"]
