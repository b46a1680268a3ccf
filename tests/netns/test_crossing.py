"""Two workloads in two networks: no way across, but by a workload that is in both.

Every way of crossing.py is sent for real. That nothing comes of it says something only because
of the rest: each frame is seen leaving its sandbox; put at the other's own port, it is heard; and
where there is a place that the same way leads to, at home or outside, it arrives there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from agent.client import Client
from agent.datapath.guardrules import link_local
from agent.notation import format_address, parse_mac
from agent.rpc.types_pb2 import Endpoint, Network
from agent.testbed import Testbed, temporary
from agent.testbed.host import Host
from tests.netns.crossing import PORT, VXLAN_PORT, WAYS, End, Here, Way, is_answer, vxlan
from tests.netns.frames import IPV4, Ear, ethernet, send, udp4
from tests.netns.world import World

pytestmark = pytest.mark.netns
OWN = Path("/run/vxmesh/netns")
SOON = 30.0  # s, for a frame that comes in milliseconds
_ports = itertools.count(18300)


@pytest.fixture(scope="module")
def bed_of_both() -> Iterator[Testbed]:
    """Two hosts whose wire has IPv4 and IPv6."""
    with temporary(hosts=2, ipv6=True) as made:
        yield made


@dataclass(frozen=True)
class Case:
    """Which drivers the sender's and the other's network have, and where the other is."""

    sender: str
    other: str
    host: str  # of the other; the sender is on h1
    is_loose: bool = False  # workloads may send for others
    floods: bool = False  # broadcast and multicast go to all hosts, in both networks

    def __str__(self) -> str:
        where = "same" if self.host == "h1" else "other"
        more = "-loose" * self.is_loose + "-flood" * self.floods
        return f"{self.sender}-{self.other}-{where}{more}"


PAIRS = (("overlay", "overlay"), ("overlay", "bridge"), ("bridge", "overlay"))
CASES = [Case(a, b, host) for a, b in PAIRS for host in ("h1", "h2")]
CASES += [
    Case("overlay", "overlay", "h1", is_loose=True),
    Case("overlay", "overlay", "h2", is_loose=True),
    Case("overlay", "bridge", "h1", is_loose=True),
    Case("bridge", "overlay", "h2", is_loose=True),
    Case("overlay", "overlay", "h2", floods=True),
    Case("overlay", "overlay", "h2", is_loose=True, floods=True),
]


class Box:
    """A workload: what is known of it, and what reaches it."""

    def __init__(
        self, host: Host, pid: int, endpoint: Endpoint, network: Network, vips: list[str]
    ) -> None:
        self.name, self.host, self.network = endpoint.name, host, network.name
        self.netns = Path(f"/proc/{pid}/ns/net")
        self.port = f"vxp{endpoint.id[:12]}"
        v4, v6 = sorted(endpoint.addresses, key=lambda a: ":" in a)
        gateway4, gateway6 = sorted(network.gateways, key=lambda a: ":" in a)
        [subnet] = [s for s in network.subnets if ":" not in s]
        mac = parse_mac(endpoint.mac)
        self.end = End(
            name=self.name,
            mac=mac,
            v4=v4,
            v6=v6,
            local=format_address(link_local(mac)),
            router=mac_of(host, f"vxb{network.vni}", OWN),
            gateway4=gateway4,
            gateway6=gateway6,
            broadcast=str(ipaddress.ip_network(subnet).broadcast_address),
            vni=network.vni,
            vip=next((vip for vip in vips if ":" not in vip), v4),
            node=host.address,
        )

    def at_port(self, function: Callable[[Path, str], Any]) -> Any:
        """What a function of a namespace and a device gives for the other end of its eth0."""
        return self.host.call(lambda: function(OWN, self.port))


async def known(world: World, names: Sequence[str]) -> list[Box]:
    """The workloads of those names, in that order."""
    found: dict[str, Box] = {}
    for host in world.bed.hosts:
        async with Client(host.target) as client:
            networks = {network.name: network for network in await client.networks()}
            services = {service.network: service for service in await client.services()}
            pids = {sandbox.name: sandbox.pid for sandbox in await client.sandboxes()}
            for one in await client.endpoints():
                if one.name in pids:
                    vips = services[one.network].vips if one.network in services else []
                    pid, net = pids[one.name], networks[one.network]
                    found[one.name] = Box(host, pid, one, net, list(vips))
    return [found[name] for name in names]


def mac_of(host: Host, device: str, netns: Path | None = None) -> bytes:
    enter = ["nsenter", f"--net={netns}"] if netns else []
    command = [*enter, "ip", "-j", "link", "show", device]
    return parse_mac(json.loads(host.run(command, check=True).stdout)[0]["address"])


class Scene:
    """The sender and one more in its network, the other and one more in its own, and ears."""

    def __init__(self, world: World, case: Case) -> None:
        self.world, self.case = world, case
        more = ("-O", "spoof=allow") * case.is_loose + ("-O", "flood=on") * case.floods
        home_at = case.host if case.sender == "overlay" else "h1"
        a = world.network("--driver", case.sender, "--ipv6", *more)
        at = case.host if case.other == "bridge" else "h1"
        b = world.network("--driver", case.other, "--ipv6", *more, host=at)
        self.published = next(_ports)
        run = world.workload
        me, near, home = run("h1", a), run("h1", a), run(home_at, a, "", "--label", f"of={a}")
        publish = ("--publish", f"{self.published}:{PORT}/udp", "--label", f"of={b}")
        # In an overlay the friend is on the sender's host, so that the other's rows are there too.
        other, friend = run(case.host, b, "", *publish), run(at, b)
        for network, driver in ((a, case.sender), (b, case.other)):
            if driver == "overlay":
                world.vx(
                    "h1", "service", "create", f"to-{network}", "--network", network, "--port",
                    f"{PORT}/udp", "--selector", f"of={network}", "--health", "none", "--wait=10",
                )  # fmt: skip
        boxes = asyncio.run(known(world, (me, near, home, other, friend)))
        self.me, self.near, self.home, self.other, self.friend = boxes
        client = world.bed.client
        self.client = replace(self.other.end, v4=client.address, v6=client.address6)
        h1 = world.host("h1")
        self.here = Here(
            self.me.end, self.friend.end, mac_of(h1, "eth0"), mac_of(h1, "vxmesh0"), self.published
        )
        if case.host != "h1":
            self._lead_to_the_other_host()

    def _lead_to_the_other_host(self) -> None:
        """The sender's host sends what is for the other by the wire, if it comes so far."""
        h1, there = self.world.host("h1"), self.other
        for family, address, by in (
            ("-4", f"{there.end.v4}/32", there.host.address),
            ("-6", f"{there.end.v6}/128", there.host.address6),
        ):
            command = ["ip", family, "route", "replace", address, "via", by]
            h1.run(command, check=True)
            undo = ["ip", family, "route", "del", address]
            self.world.later(functools.partial(h1.run, undo))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """With ears at all of them, and at the other end of the sender's eth0."""
        with contextlib.ExitStack() as stack:
            boxes = (self.me, self.near, self.home, self.other, self.friend)
            self.ears = {
                box.name: stack.enter_context(contextlib.closing(Ear(box.netns))) for box in boxes
            }
            self.left = stack.enter_context(contextlib.closing(self.me.at_port(Ear)))
            client = self.world.bed.client
            wire = Path(client.netns)
            self.outside = stack.enter_context(contextlib.closing(Ear(wire)))
            yield

    def send(self, *frames: bytes) -> None:
        send(self.me.netns, "eth0", *frames)

    def has_left(self, token: bytes) -> bool:
        return Ear.wait(lambda: any(has(f, token) for f in self.left.heard()), SOON)

    def hears(self, box: Box, token: bytes) -> bool:
        return any(has(f, token) for f in self.ears[box.name].heard())

    def answered(self, way: Way, here: Here, to: End, token: bytes) -> bool:
        heard = self.ears[self.me.name].heard()
        other = way.answer
        return any(is_answer(f, token) or (other and other(f, here, to, token)) for f in heard)

    def crosses(self, way: Way, token: bytes) -> bool:
        """Whether anybody of the other network heard it, or the sender heard of it."""
        heard = self.hears(self.other, token) or self.hears(self.friend, token)
        return heard or self.answered(way, self.here, self.other.end, token)

    def settle(self) -> None:
        """Return when what was sent before has come as far as it comes: frames after it, to all
        that the sender does reach, have arrived."""
        for box in (self.near, self.home):
            token = os.urandom(16)
            packet = udp4(self.me.end.v4, box.end.v4, PORT, token)
            self.send(ethernet(box.end.mac, self.me.end.mac, IPV4, packet))
            assert Ear.wait(functools.partial(self.hears, box, token), SOON), box.name
        token = os.urandom(16)
        packet = udp4(self.me.end.v4, self.client.v4, PORT, token)
        self.send(ethernet(self.me.end.router, self.me.end.mac, IPV4, packet))
        assert Ear.wait(lambda: any(token in f for f in self.outside.heard()), SOON), "outside"
        token = os.urandom(16)  # and in the other network
        packet = udp4(self.friend.end.v4, self.other.end.v4, PORT, token)
        frame = ethernet(self.other.end.mac, self.friend.end.mac, IPV4, packet)
        send(self.friend.netns, "eth0", frame)
        assert Ear.wait(lambda: self.hears(self.other, token), SOON), "the friend's"

    def proves(self, way: Way) -> bool:
        """Whether the same way leads where it should; true where there is no such place."""
        token, proof = os.urandom(16), way.proven(self.case.is_loose, self.case.floods)
        here, ear = self.here, self.ears[self.home.name]
        if proof in ("", "vip") and (not proof or self.case.sender != "overlay"):
            return True
        to = self.home.end
        if proof == "near":
            to, ear = self.near.end, self.ears[self.near.name]
        elif proof == "client":
            to, ear = self.client, self.outside
        elif proof in ("published", "vxlan"):
            to, ear = self.other.end, self.ears[self.other.name]
            here = replace(here, port=here.published)
        if proof in ("home", "near"):
            here = replace(here, friend=(self.near if to is self.home.end else self.home).end)
        if proof == "vxlan":
            if self.case.other == "overlay":
                self._send_vxlan(to, token)
            else:
                return True
        else:
            self.send(way.make(here, to, token))
        return Ear.wait(
            lambda: any(has(f, token) for f in ear.heard()) or self.answered(way, here, to, token),
            SOON,
        )

    def _send_vxlan(self, to: End, token: bytes) -> None:
        """From the host that the other is not on, where its root may."""
        where = self.world.host("h2" if self.case.host == "h1" else "h1")

        def work() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(vxlan(self.here, to, token), (to.node, VXLAN_PORT))

        where.call(work)

    def would_be_heard(self, way: Way) -> bool:
        """Whether the other hears the frame when it is put at its own port."""
        token = os.urandom(16)
        frame = way.make(self.here, self.other.end, token)
        self.other.at_port(lambda netns, device: send(netns, device, frame))
        return Ear.wait(lambda: self.hears(self.other, token), SOON)


@pytest.fixture(scope="module")
def scene(bed_of_both: Testbed, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The networks and workloads of a case, for all tests of it."""
    world = World(bed_of_both)
    try:
        yield Scene(world, request.param)
    finally:
        world.clean()


def does(world: World, host: str, name: str, *lines: str) -> None:
    """Run lines in a workload's stack, all of which have to work."""
    for line in lines:
        done = world.inside(host, name, "sh", "-c", line)
        assert done.returncode == 0, (line, done.stderr)


def reaches(world: World, one: Box, two: Box, within: float = 1.0) -> list[bool]:
    """Whether one's pings are answered by two `within` s: IPv4, IPv6."""
    ways = (two.end.v4, two.end.v6)
    return [world.pings(one.host.name, one.name, to, within=within) for to in ways]


def has(frame: bytes, token: bytes) -> bool:
    return token in frame or token.hex().encode() in frame


@pytest.mark.parametrize("scene", CASES, ids=str, indirect=True)
def test_no_way_leads_across(scene: Scene) -> None:
    with scene.listening():
        tokens = {way.name: os.urandom(16) for way in WAYS}
        assert len(tokens) == len(WAYS), "each has a name of its own"
        for way in WAYS:
            scene.send(way.make(scene.here, scene.other.end, tokens[way.name]))
            assert scene.has_left(tokens[way.name]), way.name
        scene.settle()
        assert [w.name for w in WAYS if scene.crosses(w, tokens[w.name])] == []
        assert [w.name for w in WAYS if not scene.would_be_heard(w)] == [], "put at its port"
        assert [w.name for w in WAYS if not scene.proves(w)] == [], "where it should arrive"
        scene.settle()
        assert [w.name for w in WAYS if scene.crosses(w, tokens[w.name])] == [], "later"


@pytest.mark.parametrize(
    "scene", [c for c in CASES if c.is_loose and not c.floods], ids=str, indirect=True
)
def test_a_workload_in_both_is_a_router_if_it_is_made_one(scene: Scene) -> None:
    world, case, me, other = scene.world, scene.case, scene.me, scene.other
    at = "h1" if case.sender == "bridge" else case.host
    name = world.workload(at, me.network, "", "--network", other.network)
    for box, network in ((me, me.network), (other, other.network)):
        to = {me.name: other, other.name: me}[box.name].end
        by = world.read(at, "endpoint", "inspect", name, "--network", network)["addresses"]
        v4, v6 = sorted(by, key=lambda a: ":" in a)
        ways = (f"ip route add {to.v4} via {v4}", f"ip -6 route add {to.v6} via {v6}")
        does(world, box.host.name, box.name, *ways)
    shut = "net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0"
    does(world, at, name, f"sysctl -qw {shut}")
    assert reaches(world, me, other) == [False, False], "it does not forward"
    does(world, at, name, f"sysctl -qw {shut.replace('=0', '=1')}")
    assert reaches(world, me, other, 10) == [True, True]
    assert reaches(world, other, me, 10) == [True, True]
    world.vx(at, "endpoint", "rm", name, "--network", other.network, "--wait=10")
    assert reaches(world, me, other) == [False, False], "it is in one of them only"
