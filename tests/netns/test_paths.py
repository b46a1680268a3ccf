"""Paths that let less through than both ends' devices say: packets vanish in the switch, and no
ICMP tells of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from agent.client import Client
from agent.rpc import types_pb2 as pb
from tests.netns.world import World

pytestmark = pytest.mark.netns

WITHIN = 60.0  # s; a look each second, and some 5 s to be sure


class Hole:
    """Between h1 and h2 the switch drops, both ways, what is longer than it says."""

    def __init__(self, world: World) -> None:
        self._netns = f"--net=/run/netns/{world.host('h1').namespace.removesuffix('h1')}fabric"

    def dig(self, mtu: int) -> None:
        rules = "\n".join(
            f'iifname "p-{a}" oifname "p-{b}" meta length > {mtu} drop'
            for a, b in (("h1", "h2"), ("h2", "h1"))
        )
        hook = "type filter hook forward priority 1; policy accept;"
        self._load(f"table bridge hole {{\n chain forward {{\n{hook}\n{rules}\n}}\n}}")

    def fill(self) -> None:
        self._load("")

    def _load(self, rules: str) -> None:
        text = f"table bridge hole\ndelete table bridge hole\n{rules}\n"
        command = ["nsenter", self._netns, "nft", "-f", "-"]
        subprocess.run(command, input=text, text=True, check=True, timeout=10)


@pytest.fixture
def hole(world: World) -> Iterator[Hole]:
    made = Hole(world)
    yield made
    made.fill()


def path(world: World, start: str, end: str, host: str = "") -> tuple[str, int, int]:
    """State, MTU and what should be of a path, as `host` tells of it."""

    async def ask() -> pb.Node:
        async with Client(world.host(host or start).target) as client:
            return await client.node(start)

    [found] = [p for p in asyncio.run(ask()).paths if (p.from_node, p.to_node) == (start, end)]
    return found.state, found.mtu, found.expected


def wait_path(world: World, start: str, end: str, wanted: tuple[str, int, int]) -> None:
    world.wait(lambda: path(world, start, end) == wanted, f"{start} to {end}: {wanted}", WITHIN)


def wait_mtu(world: World, host: str, box: str, mtu: int) -> None:
    world.wait(lambda: world.link(host, box)["mtu"] == mtu, f"{mtu} in {box} of {host}", WITHIN)


def events(world: World, kind: str, network: str) -> list[Any]:
    """What h1 told of a kind, of those that were about a network."""
    lines = world.vx("h1", "events", "-o", "json").splitlines()
    told = [event for event in map(json.loads, lines) if event["kind"] == kind]
    return [event for event in told if network in event["fields"]["networks"]]


def passes(world: World, host: str, box: str, target: str, size: int) -> bool:
    """Whether an IP packet of `size` bytes gets there and back, unbroken."""
    options = ("-c1", "-W2", "-M", "do", "-s", str(size - 28))
    return world.inside(host, box, "ping", *options, target).returncode == 0


def test_a_black_hole_is_found_heeded_told_and_forgotten(world: World, hole: Hole) -> None:
    net, other = world.network(), world.network()
    boxes = {host: world.workload(host, net) for host in ("h1", "h2", "h3")}
    apart = world.workload("h1", other)
    world.workload("h3", other)
    there = world.address("h2", boxes["h2"], net)
    whole, narrow = ("whole", 1500, 1500), ("narrow", 1400, 1500)
    for start, end in (("h1", "h2"), ("h2", "h1"), ("h1", "h3")):
        wait_path(world, start, end, whole)
    assert passes(world, "h1", boxes["h1"], there, 1450)

    hole.dig(1400)
    wait_path(world, "h1", "h2", narrow)
    wait_path(world, "h2", "h1", narrow)
    # On each host with the network, as a frame larger than a device's MTU is dropped by it.
    for host, box in boxes.items():
        wait_mtu(world, host, box, 1350)
    assert world.read("h3", "network", "inspect", net)["mtu"] == 1350
    assert passes(world, "h1", boxes["h1"], there, 1350)
    far = world.inside("h3", boxes["h3"], "ping", "-c1", "-W2", "-s", "4000", there)
    assert far.returncode == 0, far.stdout
    # Nobody else is the slower for it.
    assert path(world, "h1", "h3") == whole
    assert world.link("h1", apart)["mtu"] == 1450
    assert path(world, "h2", "h1", "h3") == narrow  # h3 has heard of it
    assert world.link("h3", world.workload("h3", net))["mtu"] == 1350
    [told] = events(world, "path.narrow", net)
    says = "path from h1 to h2 takes packets of 1400 bytes, and should take 1500"
    assert told["message"].startswith(says)
    shown = world.vx("h1", "metrics")
    assert 'vxmesh_paths{state="narrow"} 1.0' in shown
    assert "vxmesh_path_mtu_min_bytes 1400.0" in shown

    hole.fill()
    for host, box in boxes.items():
        wait_mtu(world, host, box, 1450)
    assert path(world, "h1", "h2") == whole
    assert passes(world, "h1", boxes["h1"], there, 1450)
    assert events(world, "path.mended", net)
