"""Networks with `-O flood=on`: broadcast and multicast reach all members, and nobody else."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.datapath.guardrules import FLOOD_BURST_MIN, link_local
from agent.drivers.base import DEFAULT
from agent.drivers.wireguard import PREFIX
from agent.notation import format_address, format_mac, parse_mac
from agent.syscalls import in_netns
from agent.testbed import Testbed
from tests.needs import lacks
from tests.netns.frames import (
    ADVERTISE,
    ARP,
    BROADCAST,
    IPV4,
    IPV6,
    ROUTER_ADVERTISE,
    TARGET_LINK,
    Ear,
    arp,
    ethernet,
    icmp6,
    listening,
    mark_of,
    neighbour,
    send,
    udp4,
    udp6,
)
from tests.netns.world import World

pytestmark = pytest.mark.netns
FLOOD = ("--ipv6", "-O", "flood=on")
PORT = 4321
ALL_NODES = "ff02::1"
OWN_NETNS = Path("/run/vxmesh/netns")  # as a host sees it
NOBODY = bytes.fromhex("0200aaaaaaaa")
OWN = 3  # frames that a sandbox's kernel sends to all at once


@dataclass(frozen=True)
class Member:
    """A workload in one network."""

    host: str
    name: str
    netns: Path
    mac: bytes
    v4: str
    v6: str

    @property
    def local(self) -> str:
        return format_address(link_local(self.mac))


def member(world: World, host: str, network: str, wait: bool = True) -> Member:
    """A workload; on return all hosts have it in their kernels, unless one cannot be waited for."""
    if wait:
        name = world.workload(host, network)
    else:
        name = f"late-{network}"
        world.vx(host, "run", "--network", network, "--name", name, "-d", "--", "sleep", "3600")
    pid = world.read(host, "sandbox", "inspect", name)["pid"]
    endpoint = world.read(host, "endpoint", "inspect", name)
    v4, v6 = sorted(endpoint["addresses"], key=lambda a: ":" in a)
    return Member(host, name, Path(f"/proc/{pid}/ns/net"), parse_mac(endpoint["mac"]), v4, v6)


def group_mac(address: str) -> bytes:
    """Of a multicast group (RFC 1112, section 6.4; RFC 2464, section 7)."""
    if ":" in address:
        return b"\x33\x33" + socket.inet_pton(socket.AF_INET6, address)[12:]
    low = socket.inet_aton(address)[1:]
    return b"\x01\x00\x5e" + bytes([low[0] & 0x7F]) + low[1:]


def to_all(who: Member) -> dict[str, bytes]:
    """A frame of each kind that is for all members, by name."""
    broadcast = who.v4.rpartition(".")[0] + ".255"
    found = {
        to: ethernet(BROADCAST, who.mac, IPV4, udp4(who.v4, to, PORT))
        for to in ("255.255.255.255", broadcast)
    }
    for to in ("224.0.0.251", "239.1.2.3"):
        found[to] = ethernet(group_mac(to), who.mac, IPV4, udp4(who.v4, to, PORT))
    for to, source in ((ALL_NODES, who.local), ("ff05::1:3", who.v6)):
        found[to] = ethernet(group_mac(to), who.mac, IPV6, udp6(source, to, PORT))
    return found


def straight(one: Member, two: Member) -> bytes:
    return ethernet(two.mac, one.mac, IPV4, udp4(one.v4, two.v4, PORT))


class Scene:
    """Two networks that flood: one with members on two hosts, another one's on all three."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.network, other = world.network(*FLOOD), world.network(*FLOOD)
        self.vni = world.vni(self.network)
        self.me = member(world, "h1", self.network)
        self.near = member(world, "h1", self.network)
        self.far = member(world, "h2", self.network)
        self.strangers = [member(world, host, other) for host in ("h1", "h2", "h3")]
        self.addresses = [host.address for host in world.bed.hosts]

    def lead(self, *hosts: set[int]) -> bool:
        """Whether the default rows of each host lead to the hosts of these numbers."""
        found = [defaults(self.world, host.name, self.vni) for host in self.world.bed.hosts]
        return found == [{self.addresses[n - 1] for n in numbers} for numbers in hosts]


@pytest.fixture(scope="module")
def scene(bed: Testbed) -> Iterator[Scene]:
    """For all tests of this module: what one of them takes away, it makes again."""
    world = World(bed)
    try:
        yield Scene(world)
    finally:
        world.clean()


def settle(one: Member, two: Member, ear: Ear) -> None:
    """Return when what `one` sent before has come to `two`, if it comes."""
    frame = straight(one, two)
    send(one.netns, "eth0", frame)
    assert ear.hears(frame), f"{one.name} to {two.name}"


def defaults(world: World, host: str, vni: int) -> set[str]:
    """Where a network's default rows lead to on a host; empty if it is not there."""
    done = world.run(
        host, "nsenter", "--net=/run/vxmesh/netns", "bridge", "-j", "fdb", "show", "dev",
        f"vxl{vni}",
    )  # fmt: skip
    rows = json.loads(done.stdout) if done.returncode == 0 else []
    found = [row["dst"] for row in rows if row["mac"] == format_mac(DEFAULT)]
    assert len(found) == len(set(found))
    return set(found)


@contextlib.contextmanager
def wire(world: World, host: str) -> Iterator[Ear]:
    """What comes to a host by its wire."""
    with contextlib.closing(Ear(Path(world.host(host).netns))) as ear:
        yield ear


def passed(world: World, one: str, two: str, ear: Ear) -> None:
    """Return when what host `one` sent to `two` before has come to that one's wire."""
    token, address = os.urandom(16), world.host(two).address

    def work() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(token, (address, 9))

    world.host(one).call(work)
    assert Ear.wait(lambda: any(token in frame for frame in ear.heard()), 30)


def test_what_is_for_all_reaches_the_members_and_no_host_without_one(scene: Scene) -> None:
    world, me, near, far = scene.world, scene.me, scene.near, scene.far
    inspected = world.read("h2", "network", "inspect", scene.network)
    assert inspected["options"] == {"flood": "on"}
    assert scene.lead({2}, {1}, set())
    places = [m.netns for m in (near, far, *scene.strangers)]
    with listening(*places) as (ear, there, *others), wire(world, "h3") as outside:
        for sender, hearers in ((me, (ear, there)), (far, (ear,))):
            sent = to_all(sender)
            send(sender.netns, "eth0", *sent.values())
            for hearer in hearers:
                assert [to for to, frame in sent.items() if not hearer.hears(frame)] == []
        unknown = ethernet(NOBODY, me.mac, IPV4, udp4(me.v4, far.v4, PORT))
        send(me.netns, "eth0", unknown)
        settle(me, far, there)
        settle(me, near, ear)
        passed(world, "h1", "h3", outside)
        assert not there.has(unknown) and not ear.has(unknown), "unicast that nobody has"
        marks = [mark_of(frame) for frame in (*sent.values(), unknown)]
        for one in (*others, outside):
            assert not any(mark in frame for frame in one.heard() for mark in marks)
        for hearer in (ear, there):  # once each: no copy comes back by another host
            heard = [f for f in hearer.heard() if mark_of(f) in marks]
            assert len(heard) == len({mark_of(f) for f in heard})
        # A third host has one now, and then no more.
        late = member(world, "h3", scene.network)
        assert scene.lead({2, 3}, {1, 3}, {1, 2})
        with listening(late.netns) as (ear3,):
            sent = to_all(me)
            send(me.netns, "eth0", *sent.values())
            assert [to for to, frame in sent.items() if not ear3.hears(frame)] == []
        world.vx("h3", "sandbox", "rm", late.name, "--wait=10")
        assert scene.lead({2}, {1}, set())


def receiver(who: Member, family: socket.AddressFamily, group: str) -> socket.socket:
    """A socket that waits for what is sent to a group, or with none to all."""

    def work() -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind(("", PORT))
        index = struct.pack("@I", socket.if_nametoindex("eth0"))
        if family == socket.AF_INET6:
            packed = socket.inet_pton(family, group)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, packed + index)
        elif group:
            request = socket.inet_aton(group) + socket.inet_aton(who.v4)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        sock.settimeout(30)
        return sock

    return in_netns(who.netns, work)


GROUPS = (
    (socket.AF_INET, ""),
    (socket.AF_INET, "239.7.7.7"),
    (socket.AF_INET6, "ff02::7777"),
    (socket.AF_INET6, "ff05::7777"),
)


def say(who: Member, family: socket.AddressFamily, group: str, token: bytes) -> None:
    """Send it to a group, or with none to all."""

    def work() -> None:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            if family == socket.AF_INET6:
                index = socket.if_nametoindex("eth0")
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 4)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
                sock.sendto(token, (group, PORT, 0, index))
            else:
                sock.sendto(token, (group or "255.255.255.255", PORT))

    in_netns(who.netns, work)


def test_programs_find_each_other_by_it(scene: Scene) -> None:
    """With the kernel's own sockets: groups are joined, and nobody asks who has joined."""
    me, far = scene.me, scene.far
    for family, group in GROUPS:
        token = os.urandom(16)
        with contextlib.closing(receiver(far, family, group)) as sock:
            say(me, family, group, token)
            data, source = sock.recvfrom(100)
        assert data == token, group
        assert source[0].split("%")[0] in (me.v4, me.v6, me.local), group


def test_by_default_nothing_is_for_all_hosts(scene: Scene) -> None:
    world = scene.world
    network = world.network("--ipv6")
    me, near, far = (member(world, host, network) for host in ("h1", "h1", "h2"))
    vni = world.vni(network)
    assert defaults(world, "h1", vni) == defaults(world, "h2", vni) == set()
    with listening(near.netns, far.netns) as (ear, there):
        sent = to_all(me)
        send(me.netns, "eth0", *sent.values())
        assert [to for to, frame in sent.items() if not ear.hears(frame)] == []
        settle(me, far, there)
        assert [to for to, frame in sent.items() if there.has(frame)] == []


def test_it_is_of_overlays_and_its_values_are_checked(scene: Scene) -> None:
    for options, words in (
        (("-O", "flood=yes"), "option flood='yes': is unknown. Use on or off"),
        (("-O", "flood=on", "-O", "flood-rate=0"), "is no number of packets a second"),
        (("-O", "flood-rate=5"), "Give -O flood=on as well"),
        (("--driver", "bridge", "-O", "flood=on"), "driver bridge has no VXLAN to flood"),
    ):
        done = scene.world.try_vx("h1", "network", "create", "wrong", *options)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_what_is_not_ones_own_is_not_sent_to_all(scene: Scene) -> None:
    me, near, far = scene.me, scene.near, scene.far
    nodes = group_mac(ALL_NODES)
    announced = neighbour(me.v6, ALL_NODES, ADVERTISE, me.v6, (TARGET_LINK, me.mac), flags=0x20)
    gratuitous = arp(1, me.mac, me.v4, bytes(6), me.v4)
    wrong = {
        "another's address": ethernet(BROADCAST, me.mac, IPV4, udp4(near.v4, "255.255.255.255", 1)),
        "another's MAC": ethernet(BROADCAST, near.mac, IPV4, udp4(me.v4, "255.255.255.255", 1)),
        "a DHCP server's answer": ethernet(
            BROADCAST, me.mac, IPV4, udp4(me.v4, "255.255.255.255", 68, source_port=67)
        ),
        "a router's advertisement": ethernet(
            nodes, me.mac, IPV6, icmp6(me.local, ALL_NODES, ROUTER_ADVERTISE, bytes(12))
        ),
        "a DHCPv6 server's answer": ethernet(nodes, me.mac, IPV6, udp6(me.local, ALL_NODES, 546)),
        "no IP": ethernet(BROADCAST, me.mac, 0x88B5, bytes(46)),
    }
    here = {
        "ARP": ethernet(BROADCAST, me.mac, ARP, gratuitous),
        "an advertisement": ethernet(nodes, me.mac, IPV6, announced),
    }
    with listening(near.netns, far.netns) as (ear, there):
        send(me.netns, "eth0", *wrong.values(), *here.values())
        assert [what for what, frame in here.items() if not ear.hears(frame)] == []
        settle(me, far, there)
        assert [what for what, frame in {**wrong, **here}.items() if there.has(frame)] == []
        assert [what for what, frame in wrong.items() if ear.has(frame)] == []


def test_a_sandbox_sends_no_more_to_all_than_its_share(scene: Scene) -> None:
    world, rate, count = scene.world, 20, 400
    network = world.network(*FLOOD, "-O", f"flood-rate={rate}")
    me, near, far = (member(world, host, network) for host in ("h1", "h1", "h2"))
    flood = [
        ethernet(BROADCAST, me.mac, IPV4, udp4(me.v4, "255.255.255.255", PORT))
        for _ in range(count)
    ]

    def dropped() -> int:
        """How many of its frames were too many."""
        listed = world.in_own("h1", "nft", "list", "set", "bridge", "vxmesh", "flooding")
        found = re.search(rf'"{port}" .*? counter packets (\d+)', listed)
        assert found, listed
        return int(found[1])

    port = f"vxp{world.read('h1', 'endpoint', 'inspect', me.name)['id'][:12]}"
    before = dropped()
    with listening(near.netns, far.netns) as (ear, there):
        begin = time.monotonic()
        for at in range(0, count, rate):  # for a second, in which a share that is too large shows
            send(me.netns, "eth0", *flood[at : at + rate])
            time.sleep(rate / count)
        settle(me, far, there)
        settle(me, near, ear)
        # They have all come as far as they come: however long that took, no more may have come.
        most = FLOOD_BURST_MIN + rate * (time.monotonic() - begin) + 1
        marks = {mark_of(frame) for frame in flood}
        for hearer in (ear, there):
            heard = sum(mark_of(frame) in marks for frame in hearer.heard())
            # The sandbox's own kernel may just have had some of it, for groups and routers.
            assert FLOOD_BURST_MIN - OWN <= heard <= most
            assert count - heard <= dropped() - before <= count - heard + OWN, (
                "each is one or other"
            )
        # Another's share is its own, and one who has none left still asks and is answered.
        frame = to_all(near)["255.255.255.255"]
        send(near.netns, "eth0", frame)
        assert there.hears(frame)
    world.run("h1", "nsenter", f"--net={me.netns}", "ip", "neigh", "flush", "dev", "eth0")
    assert world.reaches("h1", me.name, far.v4) and world.reaches("h1", me.name, far.v6)

    def told() -> bool:
        return any(
            event["kind"] == "guard.broadcast" and event["fields"]["sandbox"] == me.name
            for event in map(json.loads, world.vx("h1", "events", "-o", "json").splitlines())
        )

    world.wait(told, "guard.broadcast")


def test_what_is_asked_of_all_is_answered_by_no_other_host(scene: Scene) -> None:
    """A question for the gateway in a frame for all members: it reaches those, and of the hosts
    the own one alone, under its limit."""
    world, me, far = scene.world, scene.me, scene.far
    gateways = world.read("h1", "network", "inspect", scene.network)["gateways"]
    v4, v6 = sorted(gateways, key=lambda a: ":" in a)

    def question(port: int) -> list[bytes]:
        return [
            ethernet(BROADCAST, me.mac, IPV4, udp4(me.v4, v4, port)),
            ethernet(group_mac(ALL_NODES), me.mac, IPV6, udp6(me.v6, v6, port)),
        ]

    def bridge(host: str) -> Ear:
        return world.host(host).call(lambda: Ear(OWN_NETNS, f"vxb{scene.vni}"))

    asked, other = question(53), question(54)
    with (
        contextlib.closing(bridge("h1")) as here,
        contextlib.closing(bridge("h2")) as there,
        listening(far.netns) as (ear,),
    ):
        send(me.netns, "eth0", *asked, *other)
        assert all(there.hears(frame) for frame in other), "they come so far"
        assert not any(there.has(frame) for frame in asked)
        assert all(here.hears(frame) and ear.hears(frame) for frame in asked)


def test_rows_that_others_change_are_put_right(scene: Scene) -> None:
    world, me, far, vni = scene.world, scene.me, scene.far, scene.vni
    second = world.host("h2").address
    device, zero, mac = f"vxl{vni}", format_mac(DEFAULT), format_mac(far.mac)

    def bridge(*words: str) -> None:
        world.in_own("h1", "bridge", *words)

    def is_right() -> bool:
        return defaults(world, "h1", vni) == {second}

    bridge("fdb", "del", zero, "dev", device, "dst", second, "self")
    world.wait(is_right, "the default row is back")
    bridge("fdb", "append", zero, "dev", device, "dst", "192.0.2.9", "self", "permanent")
    world.wait(is_right, "a foreign one is gone")

    def led() -> set[str]:
        rows = json.loads(world.in_own("h1", "bridge", "-j", "fdb", "show", "dev", device))
        return {row["mac"] for row in rows if "static" in (row.get("state"), *row["flags"])}

    assert led() == {mac}
    bridge("fdb", "del", mac, "dev", device, "master")
    world.wait(lambda: led() == {mac}, "the bridge's entry is back")
    bridge("fdb", "add", format_mac(NOBODY), "dev", device, "master", "static")
    world.wait(lambda: led() == {mac}, "a foreign entry is gone")
    port = f"vxp{world.read('h1', 'endpoint', 'inspect', me.name)['id'][:12]}"
    bridge("fdb", "replace", mac, "dev", port, "master", "static")
    world.wait(lambda: led() == {mac}, "one that was led away is back")
    for flag in ("flood on", "bcast_flood off", "mcast_flood off"):
        bridge("link", "set", "dev", device, *flag.split())
    link = ("-d", "-j", "link", "show", "dev", device)

    def flags() -> tuple[bool, bool, bool]:
        found = json.loads(world.in_own("h1", "bridge", *link))[0]
        return found["flood"], found["bcast_flood"], found["mcast_flood"]

    world.wait(lambda: flags() == (False, True, True), "the port's settings are back")
    with listening(far.netns) as (ear,):
        frame = to_all(me)["255.255.255.255"]
        send(me.netns, "eth0", frame)
        assert ear.hears(frame)
        settle(me, far, ear)


def test_of_an_encrypted_network_it_goes_inside_wireguard(scene: Scene) -> None:
    if shutil.which("wireguard-go") is None:
        lacks("needs wireguard-go: scripts/setup.sh installs it")
    world = scene.world
    network = world.network(*FLOOD, "--encrypted")
    me, far = (member(world, host, network) for host in ("h1", "h2"))
    vni = world.vni(network)
    inner = [ipaddress.IPv6Address(vtep) for vtep in defaults(world, "h1", vni)]
    assert len(inner) == 1 and inner[0] in ipaddress.IPv6Network(PREFIX)
    with listening(far.netns) as (ear,), wire(world, "h2") as outside:
        sent = to_all(me)
        send(me.netns, "eth0", *sent.values())
        # The first waits for WireGuard's handshake, which it tries every five seconds.
        assert [to for to, frame in sent.items() if not ear.hears(frame, 30)] == []
        passed(world, "h1", "h2", outside)
        assert not any(mark_of(f) in heard for f in sent.values() for heard in outside.heard())


def test_it_goes_on_while_the_agent_is_away_and_after(scene: Scene) -> None:
    world, me, far, vni = scene.world, scene.me, scene.far, scene.vni
    with listening(far.netns) as (ear,):
        world.bed.kill("h1")
        frame = to_all(me)["255.255.255.255"]
        send(me.netns, "eth0", frame)
        assert ear.hears(frame)
        # Meanwhile somebody takes away what leads there, and the third host gets a member.
        world.in_own("h1", "bridge", "fdb", "del", format_mac(DEFAULT), "dev", f"vxl{vni}", "self")
        third = member(world, "h3", scene.network, wait=False)
        world.bed.start("h1")
        world.wait(lambda: scene.lead({2, 3}, {1, 3}, {1, 2}), "all default rows are there")
        with listening(third.netns) as (ear3,):
            frame = to_all(me)["ff05::1:3"]
            send(me.netns, "eth0", frame)
            assert ear.hears(frame) and ear3.hears(frame)
    world.vx("h3", "sandbox", "rm", third.name, "--wait=30")
