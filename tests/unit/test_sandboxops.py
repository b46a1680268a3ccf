"""Sandboxes in the networks that each node has by itself: none and host."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from agent.drivers.base import Stack
from agent.errors import Conflict, Invalid, Unsupported
from agent.model import Node, Publish
from agent.node import NodeState
from agent.operations import Operations
from agent.plan import Plan
from agent.requests import EndpointSpec, parse_network
from agent.servicespec import ServiceSpec
from tests.unit.test_operations import Alone, SlowKernel

BARE = EndpointSpec("unnamed")
OTHERS: list[dict[str, Any]] = [
    {"spec": EndpointSpec("x", addresses=(b"\x0a\1\0\2",))},
    {"spec": EndpointSpec("x", aliases=("y",))},
    {"spec": EndpointSpec("x", labels={"a": "b"})},
    {"spec": BARE, "publishes": (Publish(80, 80),)},
]


class Stacks:
    def __init__(self) -> None:
        self.furnished: list[Stack] = []

    async def furnish(self, stack: Stack) -> None:
        self.furnished.append(stack)


async def _durable() -> None:
    pass


def _operations(stacks: Stacks) -> Operations:
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    node = NodeState(me, lambda: 1000.0, random.Random(1))
    node.describe(me)
    made = Operations(node, Alone(), SlowKernel(), _durable)
    made.furnish = stacks.furnish
    return made


@pytest.fixture
def child() -> Iterator[int]:
    """A process in this process's own network namespace."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


async def test_a_workload_of_the_host_network_is_in_the_hosts_stack(child: int) -> None:
    stacks = Stacks()
    operations = _operations(stacks)
    made = await operations.create_sandbox("web", ["host"], child, spec=BARE)
    assert (made.name, made.stack, made.endpoints) == ("web", "host", ())
    assert made.inode == os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
    assert stacks.furnished == [Stack(made.netns, made.inode, ())]
    with pytest.raises(Conflict, match="is in a sandbox already"):
        await operations.create_sandbox("again", ["host"], child, spec=BARE)
    operations.adopt()
    assert list(operations.node.sandboxes) == [made.id], "it lives on after a restart"


async def test_a_workload_of_network_none_has_a_stack_of_its_own(child: int) -> None:
    operations = _operations(Stacks())
    with pytest.raises(Conflict, match="is in the host's own network namespace"):
        await operations.create_sandbox("web", ["none"], child, spec=BARE)
    assert not operations.node.sandboxes


@pytest.mark.parametrize("network", ["none", "host"])
@pytest.mark.parametrize("what", OTHERS)
async def test_what_needs_an_endpoint_is_refused_there(
    network: str, what: dict[str, Any], child: int
) -> None:
    with pytest.raises(Invalid, match=f"in network {network} is none"):
        await _operations(Stacks()).create_sandbox("web", [network], child, **what)


@pytest.mark.parametrize("networks", [["x", "none"], ["none", "x"], ["x", "host"]])
async def test_they_are_never_one_of_several(networks: list[str], child: int) -> None:
    operations = _operations(Stacks())
    operations.node.create_network(parse_network("x"))
    with pytest.raises(
        Invalid, match=r"cannot be some of several. Give none alone, and host first"
    ):
        await operations.create_sandbox("web", networks, child, spec=BARE)


async def test_a_workload_of_the_host_can_be_known_in_overlay_networks(child: int) -> None:
    operations = _operations(Stacks())
    node = operations.node
    net = node.create_network(parse_network("x"))
    spec = EndpointSpec("unnamed", labels={"app": "web"}, aliases=("www",))
    made = await operations.create_sandbox("web", ["host", "x"], child, spec=spec)
    [member] = node.members[net.id].with_name("web")
    assert (member.endpoint.addresses, member.endpoint.labels) == (
        (b"\x0a\x63\0\1",), {"app": "web"},
    )  # fmt: skip
    assert made.endpoints == (member.endpoint.id,)
    bridge = Plan(node).bridge(net.vni)
    assert bridge and not bridge.ports, "there is no interface"
    assert node.addresses[net.id].space.usage(4)[1] == 0, "nothing of the network's is used"
    operations.drop_sandbox(made.id)
    assert not node.members[net.id].all


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"internal": True}, "which is internal"),
        ({"encrypted": True}, "which is encrypted"),
        ({"driver": "bridge"}, "whose driver is bridge"),
    ],
)
async def test_but_not_where_its_workloads_cannot_reach_a_node(
    words: dict[str, Any], why: str, child: int
) -> None:
    operations = _operations(Stacks())
    operations.node.create_network(parse_network("x", **words))
    with pytest.raises(Unsupported, match=why):
        await operations.create_sandbox("web", ["host", "x"], child, spec=BARE)
    assert not operations.node.sandboxes


def test_they_are_there_by_themselves() -> None:
    cases: list[dict[str, Any]] = [
        {"name": "none"},
        {"name": "HOST"},
        {"name": "x", "driver": "none"},
    ]
    for words in cases:
        with pytest.raises(Invalid, match="is there by itself"):
            parse_network(**words)
    node = _operations(Stacks()).node
    with pytest.raises(Invalid, match="without endpoints and services"):
        node.find_network("host")


@pytest.mark.parametrize("driver", ["bridge", "remote:weird"])
def test_services_are_in_overlay_networks_alone(driver: str) -> None:
    node = _operations(Stacks()).node
    node.create_network(parse_network("lab", driver=driver))
    with pytest.raises(Unsupported, match=f"cannot be in lab, whose driver is {driver}"):
        node.create_service(ServiceSpec("web", "lab", mode="dnsrr"))


@pytest.mark.parametrize("driver", ["bridge", "remote:weird"])
@pytest.mark.parametrize("what", [{"encrypted": True}, {"vni": 7}])
def test_what_is_vxlans_is_refused_elsewhere(driver: str, what: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match=f"of driver {driver} has no VXLAN"):
        parse_network("lab", driver=driver, **what)
