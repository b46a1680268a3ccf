"""Paths that let less through than both ends' devices say: packets vanish in the switch, and no
ICMP tells of it."""

from __future__ import annotations

import array
import asyncio
import fcntl
import json
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

from agent.client import Client
from agent.rpc import types_pb2 as pb
from agent.syscalls import in_netns
from tests.netns.world import World

pytestmark = pytest.mark.netns

SIOCGIFMTU = 0x8921  # netdevice(7)
WITHIN = 60.0  # s; two looks a second, and some 5 s to be sure


class Hole:
    """What the switch does to what goes from h1 to h2: by default nothing."""

    def __init__(self, world: World) -> None:
        self._netns = f"--net=/run/netns/{world.host('h1').namespace.removesuffix('h1')}fabric"

    def dig(self, mtu: int) -> None:
        """Drop what is longer, both ways."""
        self.rule(
            *(
                f'iifname "p-{a}" oifname "p-{b}" meta length > {mtu} drop'
                for a, b in (("h1", "h2"), ("h2", "h1"))
            )
        )

    def rule(self, *rules: str) -> None:
        """Do what these rules of nft(8) say, and nothing else any more."""
        body = "\n".join(("type filter hook forward priority 1; policy accept;", *rules))
        self._load(f"table bridge hole {{\n chain forward {{\n{body}\n}}\n}}")

    def fill(self) -> None:
        self._load("")

    def _load(self, rules: str) -> None:
        text = f"table bridge hole\ndelete table bridge hole\n{rules}\n"
        command = ["nsenter", self._netns, "nft", "-f", "-"]
        subprocess.run(command, input=text, text=True, check=True, timeout=60)


@pytest.fixture
def hole(world: World) -> Iterator[Hole]:
    made = Hole(world)
    yield made
    made.fill()


T = TypeVar("T")


def call(world: World, host: str, ask: Callable[[Client], Awaitable[T]]) -> T:
    """Ask an agent. By its API: the command line takes a hundred times as long."""

    async def run() -> T:
        async with Client(world.host(host).target) as client:
            return await ask(client)

    return asyncio.run(run())


def paths(world: World, node: str, host: str) -> list[pb.Path]:
    """What `host` tells of the paths of a node."""
    return list(call(world, host, lambda client: client.node(node)).paths)


def path(world: World, start: str, end: str, host: str = "") -> tuple[str, int, int]:
    """State, MTU and what should be of a path, as `host` tells of it."""
    found = paths(world, start, host or start)
    [one] = [p for p in found if (p.from_node, p.to_node) == (start, end)]
    return one.state, one.mtu, one.expected


def tunnel(world: World, start: str, end: str) -> str:
    """In what state frames through VXLAN come, as the one who sends them tells."""
    return next(p.tunnel for p in paths(world, start, start) if p.to_node == end)


def wait_path(world: World, start: str, end: str, wanted: tuple[str, int, int]) -> None:
    world.wait(lambda: path(world, start, end) == wanted, f"{start} to {end}: {wanted}", WITHIN)


def wait_tunnel(world: World, start: str, end: str, wanted: str) -> None:
    world.wait(lambda: tunnel(world, start, end) == wanted, f"{start} to {end}: {wanted}", WITHIN)


class Box:
    """A workload, looked at and used from outside."""

    def __init__(self, world: World, host: str, network: str) -> None:
        self._world, self.host = world, host
        self.name = world.workload(host, network)
        sandbox = call(world, host, lambda client: client.sandbox(self.name))
        self._pid, self.address = sandbox.pid, sandbox.endpoints[0].addresses[0]

    @property
    def mtu(self) -> int:
        def ask() -> int:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                told = fcntl.ioctl(sock, SIOCGIFMTU, struct.pack("16si", b"eth0", 0))
            return int(struct.unpack("16si", told)[1])

        return in_netns(f"/proc/{self._pid}/ns/net", ask)

    def wait_mtu(self, mtu: int) -> None:
        what = f"an MTU of {mtu} in {self.name} of {self.host}"
        self._world.wait(lambda: self.mtu == mtu, what, WITHIN)

    def passes(self, size: int, to: Box) -> bool:
        """Whether an IP packet of `size` bytes gets there and back, unbroken."""
        return self._ping(to, "-M", "do", "-s", str(size - 28))

    def passes_in_pieces(self, size: int, to: Box) -> bool:
        return self._ping(to, "-s", str(size - 28))

    def _ping(self, to: Box, *options: str) -> bool:
        inside = ("nsenter", "-t", str(self._pid), "-n")
        done = subprocess.run(
            [*inside, "ping", "-c3", "-i0.2", "-W5", *options, to.address],
            capture_output=True, timeout=60,
        )  # fmt: skip
        return done.returncode == 0


def notices(world: World) -> list[Any]:
    """What h1 has told."""
    lines = world.vx("h1", "events", "-o", "json").splitlines()
    return [event for event in map(json.loads, lines) if "fields" in event]


def test_a_black_hole_is_found_heeded_told_and_forgotten(world: World, hole: Hole) -> None:
    net, other = world.network(), world.network()
    one, two, three = (Box(world, host, net) for host in ("h1", "h2", "h3"))
    apart = Box(world, "h1", other)
    whole, narrow = ("whole", 1500, 1500), ("narrow", 1400, 1500)
    for start, end in (("h1", "h2"), ("h2", "h1"), ("h1", "h3")):
        wait_path(world, start, end, whole)
    assert one.passes(1450, two)

    hole.dig(1400)
    wait_path(world, "h1", "h2", narrow)
    wait_path(world, "h2", "h1", narrow)
    # On each host with the network, as a frame larger than a device's MTU is dropped by it.
    for box in (one, two, three):
        box.wait_mtu(1350)
    assert one.passes(1350, two)
    assert three.passes_in_pieces(4000, one)
    # Nobody else is the slower for it.
    assert path(world, "h1", "h3") == whole
    assert apart.mtu == 1450
    world.wait(lambda: path(world, "h2", "h1", "h3") == narrow, "h3 has heard of both ways")
    assert call(world, "h3", lambda client: client.network(net)).mtu == 1350

    hole.fill()
    for box in (one, two, three):
        box.wait_mtu(1450)
    wait_path(world, "h1", "h2", whole)
    assert one.passes(1450, two)

    def kinds() -> list[str]:
        return [e["kind"] for e in notices(world) if e["fields"].get("networks") == net]

    world.wait(lambda: "path.mended" in kinds(), "it is told that it is mended")
    assert kinds() == ["path.narrow", "path.mended"]
    told = [e for e in notices(world) if e["fields"].get("networks") == net]
    says = "path from h1 to h2 takes packets of 1400 bytes, and should take 1500"
    assert told[0]["message"].startswith(says)


FROM_H1 = 'iifname "p-h1" oifname "p-h2" udp dport 4789 '
# Bits from the outer UDP header on: 8 bytes of that, 8 VXLAN, 14 Ethernet, 20 IPv4, in TCP the
# checksum after 16 of 20, then magic and kind and a nonce, the last bit of which says that the
# checksum was the device's to compute.
CHECKSUM, LAST_OF_NONCE = 8 * (8 + 8 + 14 + 20 + 16), 8 * (8 + 8 + 14 + 20 + 20 + 5 + 7)


def tx_checksum(world: World, host: str, on: bool) -> None:
    """ethtool -K eth0 tx on|off, by ethtool(8)'s own ioctl: SIOCETHTOOL, ETHTOOL_STXCSUM."""

    def ask() -> None:
        value = array.array("B", struct.pack("=II", 0x17, on))
        name = struct.pack("16sP", b"eth0", value.buffer_info()[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, 0x8946, name)

    world.host(host).call(ask)


def test_a_device_that_breaks_checksums_is_named_with_what_mends_it(
    world: World, hole: Hole
) -> None:
    for start, end in (("h1", "h2"), ("h2", "h1")):
        wait_tunnel(world, start, end, "sound")
    # The testbed's wires carry frames whose checksum nobody computes; as over a real one they have
    # it computed here, and the switch stands for a device that does so wrongly.
    tx_checksum(world, "h1", False)
    world.later(lambda: tx_checksum(world, "h1", True))
    hole.rule(f"{FROM_H1} @th,{LAST_OF_NONCE},8 & 1 == 1 @th,{CHECKSUM},16 set 0x1234")
    wait_tunnel(world, "h1", "h2", "checksums")

    def kinds() -> list[str]:
        told = [e["kind"] for e in notices(world) if e["fields"].get("name") == "h2"]
        return [kind for kind in told if kind.startswith("tunnel.")]

    world.wait(lambda: kinds()[-1:] == ["tunnel.checksums"], "it is told")
    told = [e for e in notices(world) if e["kind"] == "tunnel.checksums"]
    assert told[-1]["message"].endswith("Run 'ethtool -K eth0 tx off' on h1")
    assert told[-1]["fields"]["device"] == "eth0" and told[-1]["fields"]["name"] == "h2"
    assert tunnel(world, "h2", "h1") == "sound"
    hole.rule(FROM_H1 + "drop")
    wait_tunnel(world, "h1", "h2", "blocked")
    hole.fill()
    wait_tunnel(world, "h1", "h2", "sound")
    world.wait(lambda: kinds()[-1:] == ["tunnel.mended"], "it is told that it is mended")
    assert kinds()[-3:] == ["tunnel.checksums", "tunnel.blocked", "tunnel.mended"]
