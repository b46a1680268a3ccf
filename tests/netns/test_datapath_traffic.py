"""What passes and what does not, on the real kernel: two hosts, sandboxes, an outsider."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.drivers.base import Forward
from agent.model import Publish
from agent.notation import format_mac, parse_mac
from agent.syscalls import socket_in
from tests.netns.datapath_hosts import Fabric, Host, Sandbox, counting_wire, opened, pings, run

pytestmark = pytest.mark.netns

OUTSIDER, OUTSIDER6 = "10.98.0.9", "fd98::9"


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as made:
        yield made


async def attach(host: Host, vni: int, number: int, **changes: object) -> Sandbox:
    """A sandbox with a port in a network, on a host."""
    sandbox = Sandbox(host.fabric)
    port = host.add_port(vni, number, sandbox, **changes)
    await host.reconciler.settle(port.endpoint)
    return sandbox


async def overlay(fabric: Fabric, *vnis: int) -> None:
    for vni in vnis:
        for host in fabric.hosts:
            host.add_network(vni)
    await fabric.settle()


async def test_sandboxes_of_one_network_reach_each_other(fabric: Fabric) -> None:
    await overlay(fabric, 7)
    one, two = await attach(fabric.a, 7, 2), await attach(fabric.a, 7, 3)
    far = await attach(fabric.b, 7, 4)
    await fabric.settle()
    everyone = {one: (2, "a"), two: (3, "a"), far: (4, "b")}
    attempts = [
        (sandbox.path, pattern.format(number))
        for sandbox in everyone
        for number, _ in everyone.values()
        for pattern in ("10.7.0.{}", "fd00:7::{}")
    ]
    assert pings(*attempts) == [True] * len(attempts)
    # The gateway answers too, on each host its own.
    gateways = [(s.path, g) for s in everyone for g in ("10.7.0.1", "fd00:7::1")]
    assert pings(*gateways) == [True] * len(gateways)


async def test_no_arp_and_no_solicitation_passes_the_wire(fabric: Fabric) -> None:
    await overlay(fabric, 7)
    near, far = await attach(fabric.a, 7, 2), await attach(fabric.b, 7, 3)
    await fabric.settle()
    with counting_wire(fabric.a.path, "wire") as frames:
        attempts = [
            (near.path, "10.7.0.3"),
            (far.path, "10.7.0.2"),
            (near.path, "fd00:7::3"),
            (far.path, "fd00:7::2"),
            (near.path, "10.7.0.99"),  # nobody
            (near.path, "fd00:7::99"),
        ]
        assert pings(*attempts) == [True] * 4 + [False] * 2
    inner = [frame[50:] for frame in frames if is_vxlan(frame)]
    kinds = {struct.unpack_from(">H", frame, 12)[0] for frame in inner}
    assert kinds == {0x0800, 0x86DD}
    macs = {frame[:6] for frame in inner}
    assert macs == {p.mac for h in fabric.hosts for p in h.desired.networks[7].ports.values()}


def is_vxlan(frame: bytes) -> bool:
    udp = frame[12:14] == b"\x08\x00" and frame[23] == 17
    return udp and struct.unpack_from(">H", frame, 36)[0] == 4789


async def test_two_networks_cannot_reach_each_other(fabric: Fabric) -> None:
    await overlay(fabric, 7, 8)
    mine = await attach(fabric.a, 7, 2)
    near, _ = await attach(fabric.a, 8, 3), await attach(fabric.b, 8, 4)
    neighbour = await attach(fabric.a, 8, 5)
    await fabric.settle()
    # What makes the refusals below mean something: all of these are there and answer.
    theirs = [(near.path, a) for a in ("10.8.0.1", "10.8.0.4", "10.8.0.5", "fd00:8::1")]
    assert pings(*theirs, (mine.path, "10.7.0.1"), (mine.path, "fd00:7::1")) == [True] * 6
    ways = {
        "a sandbox on the same host": "10.8.0.3",
        "one on the other host": "10.8.0.4",
        "the same by IPv6": "fd00:8::3",
        "the other host's by IPv6": "fd00:8::4",
        "their gateway": "10.8.0.1",
        "their gateway by IPv6": "fd00:8::1",
        "our namespace's end of the uplink": "169.254.83.2",
        "the same by IPv6 ": "fd76:786d:6573:6800::2",
    }
    refused = pings(*((mine.path, address) for address in ways.values()))
    assert dict(zip(ways, refused, strict=True)) == dict.fromkeys(ways, False)
    # As if their subnet were on the link: their gateway must not answer our ARP or ND either.
    mine.run("ip", "route", "add", "10.8.0.0/24", "dev", "eth0")
    mine.run("ip", "-6", "route", "add", "fd00:8::/64", "dev", "eth0")
    link = ["10.8.0.1", "10.8.0.3", "fd00:8::1", "fd00:8::3"]
    assert pings(*((mine.path, address) for address in link)) == [False] * 4
    # With the MACs put in by hand, of our own router and of the victim itself.
    router = format_mac(fabric.a.desired.networks[7].router_mac)
    victims = {p.addresses[0]: p for p in fabric.a.desired.networks[8].ports.values()}
    victim = format_mac(victims["10.8.0.3/24"].mac)
    for address, mac in (("10.8.0.1", router), ("10.8.0.3", router), ("10.8.0.5", victim)):
        mine.run("ip", "neigh", "replace", address, "lladdr", mac, "dev", "eth0")
    assert pings(*((mine.path, f"10.8.0.{n}") for n in (1, 3, 5))) == [False] * 3
    # With a source address of theirs, through the router.
    mine.run("ip", "route", "del", "10.8.0.0/24", "dev", "eth0")
    mine.run("ip", "address", "add", "10.8.0.77/32", "dev", "eth0")
    forged = ["ping", "-n", "-c1", "-W0.5", "-I", "10.8.0.77"]
    for address in ("10.8.0.1", "10.8.0.3", "10.8.0.4", OUTSIDER):
        assert not mine.run(*forged, address, check=False), address
    assert pings((neighbour.path, "10.8.0.3")) == [True]


async def test_a_sandbox_in_two_networks_reaches_both(fabric: Fabric) -> None:
    await overlay(fabric, 7, 8)
    seven, eight = await attach(fabric.a, 7, 2), await attach(fabric.b, 8, 2)
    both = await attach(fabric.b, 7, 3)
    port = fabric.b.add_port(8, 3, both, ifname="eth1", gateways=())
    await fabric.b.reconciler.settle(port.endpoint)
    await fabric.settle()
    assert pings((both.path, "10.7.0.2"), (both.path, "10.8.0.2")) == [True, True]
    assert pings((seven.path, "10.7.0.3"), (eight.path, "10.8.0.3")) == [True, True]
    assert pings((seven.path, "10.8.0.3"), (eight.path, "10.7.0.3")) == [False, False]
    both.run("sysctl", "-qw", "net.ipv4.ip_forward=1")  # its own affair, but not through us
    assert pings((seven.path, "10.8.0.2")) == [False]


async def test_an_internal_network_has_no_way_out_nor_in(fabric: Fabric) -> None:
    for host in fabric.hosts:
        host.add_network(9, internal=True)
    near, far = await attach(fabric.a, 9, 2), await attach(fabric.b, 9, 3)
    await fabric.settle()
    out = [OUTSIDER, OUTSIDER6, "10.99.0.1", "10.98.0.1", "169.254.83.1", "fd98::1"]
    assert pings(*((near.path, address) for address in out)) == [False] * len(out)
    assert pings((near.path, "10.9.0.3"), (far.path, "fd00:9::2")) == [True, True]
    assert pings((near.path, "10.9.0.1"), (near.path, "fd00:9::1")) == [True, True]
    fabric.a.run("ip", "route", "add", "10.9.0.0/24", "via", "169.254.83.2", "dev", "vxmesh0")
    assert pings((fabric.a.path, "10.9.0.2")) == [False]


# -- the way out, and in --


@contextlib.contextmanager
def echo(netns: Path, family: int, kind: int, port: int) -> Iterator[socket.socket]:
    """A socket that listens in a namespace."""
    with socket_in(netns, family, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        sock.settimeout(2)
        yield sock


def seen_by(
    server: Path,
    client: Path,
    address: str,
    port: int,
    at: int,
    kind: int = socket.SOCK_STREAM,
    within: float = 20.0,
) -> str:
    """The client's address as a server on port `at` sees it, or "" if nothing arrives `within` s.

    The client in namespace `client` talks to `address`, `port`, and must get its answer.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with echo(server, family, kind, at) as listening, socket_in(client, family, kind) as sock:
        sock.settimeout(within)
        listening.settimeout(within)
        try:
            sock.connect((address, port))
            sock.send(b"question")
            if kind == socket.SOCK_STREAM:
                accepted, peer = listening.accept()
                with accepted:
                    accepted.settimeout(within)
                    assert accepted.recv(100) == b"question"
                    accepted.send(b"answer")
            else:
                data, peer = listening.recvfrom(100)
                assert data == b"question"
                listening.sendto(b"answer", peer)
            assert sock.recv(100) == b"answer"
        except OSError:
            return ""
    return str(peer[0])


async def test_traffic_out_leaves_with_the_hosts_address(fabric: Fabric) -> None:
    await overlay(fabric, 7)
    sandbox = await attach(fabric.a, 7, 2)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        assert seen_by(fabric.outsider, sandbox.path, OUTSIDER, 999, 999, kind) == "10.98.0.1"
        assert seen_by(fabric.outsider, sandbox.path, OUTSIDER6, 999, 999, kind) == "fd98::1"
    # With a source of no network of ours it does not leave at all.
    sandbox.run("ip", "address", "add", "172.31.0.1/32", "dev", "eth0")
    command = ("ping", "-n", "-c1", "-W0.5", "-I", "172.31.0.1", OUTSIDER)
    with counting_wire(fabric.a.path, "side") as frames:
        assert not sandbox.run(*command, check=False)
    assert not [f for f in frames if f[12:14] == b"\x08\x00" and f[26:30] == b"\xac\x1f\x00\x01"]


async def test_the_host_reaches_its_sandboxes_and_an_outsider_does_not(fabric: Fabric) -> None:
    await overlay(fabric, 7)
    sandbox = await attach(fabric.a, 7, 2)
    assert pings((fabric.a.path, "10.7.0.2"), (fabric.a.path, "fd00:7::2")) == [True, True]
    run("ip", "route", "add", "10.7.0.0/24", "via", "10.98.0.1", netns=fabric.outsider)
    run("ip", "route", "add", "fd00:7::/64", "via", "fd98::1", netns=fabric.outsider)
    attempts = [(fabric.outsider, "10.7.0.2"), (fabric.outsider, "fd00:7::2")]
    assert pings(*attempts) == [False, False]
    assert pings((fabric.outsider, "10.98.0.1"), (sandbox.path, OUTSIDER)) == [True, True]
    assert seen_by(sandbox.path, fabric.outsider, "10.7.0.2", 80, 80, within=0.7) == ""


async def test_a_published_port_keeps_the_clients_address(fabric: Fabric) -> None:
    await overlay(fabric, 7)
    web, other = await attach(fabric.a, 7, 2), await attach(fabric.a, 7, 3)
    a, out = fabric.a, fabric.outsider
    assert seen_by(web.path, out, "10.98.0.1", 8080, 80, within=0.7) == ""
    udp = Publish(5300, 53, "udp")
    a.desired.published = (
        Forward(Publish(8080, 80), "10.7.0.2"),
        Forward(Publish(8080, 80), "fd00:7::2"),
        Forward(udp, "10.7.0.2"),
        Forward(Publish(8081, 80, "tcp", "10.99.0.1"), "10.7.0.2"),
    )
    a.reconciler.touch_forwards()
    await a.reconciler.settle()
    assert seen_by(web.path, out, "10.98.0.1", 8080, 80) == OUTSIDER
    assert seen_by(web.path, out, "fd98::1", 8080, 80) == OUTSIDER6
    assert seen_by(web.path, out, "10.98.0.1", 5300, 53, socket.SOCK_DGRAM) == OUTSIDER
    # Published at one address of the host only.
    assert seen_by(web.path, fabric.b.path, "10.99.0.1", 8081, 80) == "10.99.0.2"
    assert seen_by(web.path, out, "10.98.0.1", 8081, 80, within=0.7) == ""
    # From the host itself, by loopback and by its address.
    assert seen_by(web.path, a.path, "127.0.0.1", 8080, 80) == "169.254.83.1"
    assert seen_by(web.path, a.path, "10.98.0.1", 8080, 80) == "10.98.0.1"
    # From a neighbour in the same network, and from itself.
    assert seen_by(web.path, other.path, "10.98.0.1", 8080, 80) == "169.254.83.1"
    assert seen_by(web.path, web.path, "10.98.0.1", 8080, 80) == "169.254.83.1"
    a.desired.published = ()
    a.reconciler.touch_forwards()
    await a.reconciler.settle()
    assert seen_by(web.path, out, "10.98.0.1", 8080, 80, within=0.7) == ""


async def test_the_hosts_loopback_is_not_for_sandboxes(fabric: Fabric) -> None:
    """route_localnet is on at vxmesh0, so the kernel itself would let this in."""
    a = fabric.a
    (link,) = json.loads(a.run("ip", "-j", "link", "show", "vxmesh0"))
    mac = parse_mac(link["address"])

    def frame(destination: str) -> bytes:
        data = b"knock"
        udp = struct.pack(">4H", 9, 999, 8 + len(data), 0) + data
        head = struct.pack(">BBHIBBH", 0x45, 0, 20 + len(udp), 0, 64, 17, 0)
        head += socket.inet_aton("10.7.0.2") + socket.inet_aton(destination)
        total = sum(struct.unpack(">10H", head))
        total = (total & 0xFFFF) + (total >> 16)
        head = head[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
        return mac + bytes(6) + b"\x08\x00" + head + udp

    await overlay(fabric, 7)
    with (
        echo(a.path, socket.AF_INET, socket.SOCK_DGRAM, 999) as listening,
        socket_in(a.own, socket.AF_PACKET, socket.SOCK_RAW) as sock,
    ):
        sock.bind(("uplink", 0))
        listening.settimeout(20)
        sock.send(frame("169.254.83.1"))
        assert listening.recv(100) == b"knock"
        listening.settimeout(0.5)
        sock.send(frame("127.0.0.1"))
        with pytest.raises(TimeoutError):
            listening.recv(100)


# -- sizes and families --


async def test_the_largest_packet_fits_the_wire_and_no_larger_one_passes(fabric: Fabric) -> None:
    mtu = 1450
    for host in fabric.hosts:
        host.add_network(7, mtu=mtu)
    near, _ = await attach(fabric.a, 7, 2), await attach(fabric.b, 7, 3)
    await fabric.settle()
    links = fabric.a.links()
    assert {links[name]["mtu"] for name in links if name.startswith(("vxb", "vxl", "vxp"))} == {mtu}
    assert f"mtu {mtu} " in near.run("ip", "link", "show", "eth0")
    with counting_wire(fabric.a.path, "wire") as frames:
        assert near.ping("10.7.0.3", size=mtu - 28)
        assert not near.ping("10.7.0.3", size=mtu - 27, wait=0.3)
    assert max(len(frame) for frame in frames) == 1500 + 14


async def test_the_mtu_of_a_network_changes_under_way(fabric: Fabric) -> None:
    await overlay(fabric, 7)
    near, _ = await attach(fabric.a, 7, 2), await attach(fabric.b, 7, 3)
    for host in fabric.hosts:
        host.desired.networks[7] = replace(host.desired.networks[7], mtu=1300)
        host.reconciler.touch_bridge(7)
    await fabric.settle()
    links = fabric.a.links()
    assert {links[name]["mtu"] for name in links if name.startswith(("vxb", "vxl", "vxp"))} == {
        1300
    }
    assert "mtu 1300 " in near.run("ip", "link", "show", "eth0")
    assert near.ping("10.7.0.3", size=1272)


async def test_an_underlay_of_ipv6(tmp_path: Path) -> None:
    async with opened(tmp_path, ipv6=True) as fabric:
        for host in fabric.hosts:
            host.add_network(7, mtu=1430)
        near, _ = await attach(fabric.a, 7, 2), await attach(fabric.b, 7, 3)
        await fabric.settle()
        assert set(fabric.a.fdb(7).values()) == {"fd99::2"}
        with counting_wire(fabric.a.path, "wire") as frames:
            assert pings((near.path, "10.7.0.3"), (near.path, "fd00:7::3")) == [True, True]
            assert near.ping("10.7.0.3", size=1402)
        outer = {frame[12:14] for frame in frames if len(frame) > 1200}
        assert outer == {b"\x86\xdd"}
        assert max(len(frame) for frame in frames) == 1500 + 14
