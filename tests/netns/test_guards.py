"""A hostile sandbox, and what the others hear of it: raw frames on the real kernel.

In each case a frame that is not the sandbox's to send goes first and then one that is, the same
but for what makes it wrong. When the second has come to the other one, the first would have.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from agent.datapath.guardrules import link_local
from agent.drivers.base import Closed, Port
from agent.model import HANDED_OUT
from agent.notation import format_address, parse_address
from tests.netns import frames
from tests.netns.datapath_hosts import (
    Fabric,
    Host,
    Sandbox,
    connects,
    opened,
    pings,
    restart,
    run,
    until,
)
from tests.netns.frames import ARP, BROADCAST, IPV4, IPV6, Ear, ethernet, listening, mark_of, send

pytestmark = pytest.mark.netns

VNI = 7
ALL_NODES, ALL_NODES_MAC = "ff02::1", bytes.fromhex("333300000001")
STRANGER = bytes.fromhex("02aabbccddee")  # no MAC of anybody


@dataclass(frozen=True)
class Net:
    """Two sandboxes on a, one on b: `me` is the hostile one, `near` and `far` are the others."""

    fabric: Fabric
    me: Sandbox
    near: Sandbox
    far: Sandbox
    mine: Port
    nears: Port
    fars: Port

    @property
    def host(self) -> Host:
        return self.fabric.a

    @property
    def router(self) -> bytes:
        return self.host.desired.networks[VNI].router_mac

    def dropped(self, reason: str) -> int:
        listed = self.host.inside("nft", "list", "counter", "bridge", "vxmesh", f"guard_{reason}")
        return int(re.search(r"packets (\d+)", listed)[1])  # type: ignore[index]

    def send(self, *sent: bytes) -> None:
        send(self.me.path, "eth0", *sent)


def ip(port: Port, version: int = 4) -> str:
    return port.addresses[version == 6].split("/")[0]


def local(port: Port) -> str:
    return format_address(link_local(port.mac))


async def build(fabric: Fabric, **changes: object) -> Net:
    sandboxes = [Sandbox(fabric) for _ in range(3)]
    ports = []
    for host in fabric.hosts:
        host.add_network(VNI, **changes)
    for sandbox, host, number in zip(
        sandboxes, (fabric.a, fabric.a, fabric.b), (2, 3, 4), strict=True
    ):
        ports.append(host.add_port(VNI, number, sandbox))
        await host.reconciler.settle(ports[-1].endpoint)
    await fabric.settle()
    (me, near, far), (mine, nears, fars) = sandboxes, ports
    return Net(fabric, me, near, far, mine, nears, fars)


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as made:
        yield made


@pytest.fixture
async def net(fabric: Fabric) -> Net:
    return await build(fabric)


# -- spoofing: (net, whom it is for) -> the wrong frame, the right one --

Case = Callable[[Net, Port], tuple[bytes, bytes]]


def source_mac(net: Net, to: Port) -> tuple[bytes, bytes]:
    packet = frames.udp4(ip(net.mine), ip(to), 4000)
    other = net.fars if to is net.nears else net.nears
    return ethernet(to.mac, other.mac, IPV4, packet), ethernet(to.mac, net.mine.mac, IPV4, packet)


def source_mac_of_nobody(net: Net, to: Port) -> tuple[bytes, bytes]:
    packet = frames.udp6(ip(net.mine, 6), ip(to, 6), 4000)
    return ethernet(to.mac, STRANGER, IPV6, packet), ethernet(to.mac, net.mine.mac, IPV6, packet)


def tcp4(source: str, to: str) -> bytes:
    return frames.ipv4(source, to, frames.TCP, frames.tcp_syn(999, 4000))


def tcp6(source: str, to: str) -> bytes:
    return frames.ipv6(source, to, frames.TCP, frames.tcp_syn(999, 4000))


def source_mac_of_tcp(net: Net, to: Port) -> tuple[bytes, bytes]:
    packet = tcp4(ip(net.mine), ip(to))
    return ethernet(to.mac, STRANGER, IPV4, packet), ethernet(to.mac, net.mine.mac, IPV4, packet)


def pair_of_another_of_tcp(net: Net, to: Port) -> tuple[bytes, bytes]:
    other = net.fars if to is net.nears else net.nears
    return (
        ethernet(to.mac, other.mac, IPV6, tcp6(ip(other, 6), ip(to, 6))),
        ethernet(to.mac, net.mine.mac, IPV6, tcp6(ip(net.mine, 6), ip(to, 6))),
    )


def source_address_of_tcp(net: Net, to: Port) -> tuple[bytes, bytes]:
    other = net.fars if to is net.nears else net.nears
    wrong, right = (tcp4(ip(port), ip(to)) for port in (other, net.mine))
    return ethernet(to.mac, net.mine.mac, IPV4, wrong), ethernet(to.mac, net.mine.mac, IPV4, right)


def source_address6_of_tcp(net: Net, to: Port) -> tuple[bytes, bytes]:
    wrong, right = (tcp6(source, ip(to, 6)) for source in ("fd00:7::99", ip(net.mine, 6)))
    return ethernet(to.mac, net.mine.mac, IPV6, wrong), ethernet(to.mac, net.mine.mac, IPV6, right)


def mapped_source(net: Net, to: Port) -> tuple[bytes, bytes]:
    """IPv6 whose source is one's own IPv4 address as IPv6 has it."""
    wrong, right = (tcp6(s, ip(to, 6)) for s in (f"::ffff:{ip(net.mine)}", ip(net.mine, 6)))
    return ethernet(to.mac, net.mine.mac, IPV6, wrong), ethernet(to.mac, net.mine.mac, IPV6, right)


def longer_than_it_is(net: Net, to: Port) -> tuple[bytes, bytes]:
    right = tcp6(ip(net.mine, 6), ip(to, 6))
    length = int.from_bytes(right[4:6], "big") + 100
    wrong = right[:4] + length.to_bytes(2, "big") + right[6:]
    return ethernet(to.mac, net.mine.mac, IPV6, wrong), ethernet(to.mac, net.mine.mac, IPV6, right)


def vlan_tagged_tcp(net: Net, to: Port) -> tuple[bytes, bytes]:
    packet = tcp4(ip(net.mine), ip(to))
    tagged = (5).to_bytes(2, "big") + IPV4.to_bytes(2, "big") + packet
    return (
        ethernet(to.mac, net.mine.mac, frames.VLAN, tagged),
        ethernet(to.mac, net.mine.mac, IPV4, packet),
    )


def pair_of_another(net: Net, to: Port) -> tuple[bytes, bytes]:
    """Another's MAC and address, which would be right on another port."""
    other = net.fars if to is net.nears else net.nears
    return (
        ethernet(to.mac, other.mac, IPV4, frames.udp4(ip(other), ip(to), 4000)),
        ethernet(to.mac, net.mine.mac, IPV4, frames.udp4(ip(net.mine), ip(to), 4000)),
    )


def source_address(net: Net, to: Port) -> tuple[bytes, bytes]:
    other = net.fars if to is net.nears else net.nears
    return (
        ethernet(to.mac, net.mine.mac, IPV4, frames.udp4(ip(other), ip(to), 4000)),
        ethernet(to.mac, net.mine.mac, IPV4, frames.udp4(ip(net.mine), ip(to), 4000)),
    )


def source_address_of_the_gateway(net: Net, to: Port) -> tuple[bytes, bytes]:
    return (
        ethernet(to.mac, net.mine.mac, IPV4, frames.udp4("10.7.0.1", ip(to), 4000)),
        ethernet(to.mac, net.mine.mac, IPV4, frames.udp4(ip(net.mine), ip(to), 4000)),
    )


def source_address6(net: Net, to: Port) -> tuple[bytes, bytes]:
    other = net.fars if to is net.nears else net.nears
    return (
        ethernet(to.mac, net.mine.mac, IPV6, frames.udp6(ip(other, 6), ip(to, 6), 4000)),
        ethernet(to.mac, net.mine.mac, IPV6, frames.udp6(ip(net.mine, 6), ip(to, 6), 4000)),
    )


def link_local_of_another(net: Net, to: Port) -> tuple[bytes, bytes]:
    other = net.fars if to is net.nears else net.nears
    return (
        ethernet(to.mac, net.mine.mac, IPV6, frames.udp6(local(other), local(to), 4000)),
        ethernet(to.mac, net.mine.mac, IPV6, frames.udp6(local(net.mine), local(to), 4000)),
    )


def advertisement(net: Net, to: Port) -> tuple[bytes, bytes]:
    """Another's address is said to be at my MAC."""
    other = net.fars if to is net.nears else net.nears

    def make(target: str) -> bytes:
        option = (frames.TARGET_LINK, net.mine.mac)
        source = ip(net.mine, 6)
        message = frames.neighbour(source, ip(to, 6), frames.ADVERTISE, target, option, flags=0x20)
        return ethernet(to.mac, net.mine.mac, IPV6, message)

    return make(ip(other, 6)), make(ip(net.mine, 6))


def advertisement_of_another_mac(net: Net, to: Port) -> tuple[bytes, bytes]:
    """My address is said to be at another's MAC: its traffic would be sent there."""

    def make(*options: tuple[int, bytes]) -> bytes:
        message = frames.neighbour(
            ip(net.mine, 6), ip(to, 6), frames.ADVERTISE, ip(net.mine, 6), *options, flags=0x20
        )
        return ethernet(to.mac, net.mine.mac, IPV6, message)

    wrong = (frames.TARGET_LINK, STRANGER)
    return make(wrong), make((frames.TARGET_LINK, net.mine.mac))


def advertisement_with_a_second_option(net: Net, to: Port) -> tuple[bytes, bytes]:
    """Behind a right one a wrong one, for who looks at the first only."""

    def make(*options: tuple[int, bytes]) -> bytes:
        message = frames.neighbour(
            ip(net.mine, 6), ip(to, 6), frames.ADVERTISE, ip(net.mine, 6), *options, flags=0x20
        )
        return ethernet(to.mac, net.mine.mac, IPV6, message)

    right = (frames.TARGET_LINK, net.mine.mac)
    return make(right, (frames.TARGET_LINK, STRANGER)), make(right)


def router_advertisement(net: Net, to: Port) -> tuple[bytes, bytes]:
    body = bytes([64, 0]) + (1800).to_bytes(2, "big") + bytes(8)
    source = local(net.mine)
    rogue = frames.icmp6(source, local(to), frames.ROUTER_ADVERTISE, body)
    echo = frames.icmp6(source, local(to), 128, body)
    return (ethernet(to.mac, net.mine.mac, IPV6, m) for m in (rogue, echo))  # type: ignore[return-value]


def router_advertisement_behind_options(net: Net, to: Port) -> tuple[bytes, bytes]:
    """RFC 7113: a header in front, for who looks at the first one only."""
    body = bytes([64, 0]) + (1800).to_bytes(2, "big") + bytes(8)
    pad = bytes([frames.ICMP6, 0, 1, 4, 0, 0, 0, 0])
    rogue, echo = (
        frames.icmp6(local(net.mine), local(to), type, body, before=pad)
        for type in (frames.ROUTER_ADVERTISE, 128)
    )
    return ethernet(to.mac, net.mine.mac, IPV6, rogue), ethernet(to.mac, net.mine.mac, IPV6, echo)


def first_fragment_without_a_header(net: Net, to: Port) -> tuple[bytes, bytes]:
    """RFC 7112: what it is would be seen only when it is put together."""
    options = bytes([frames.UDP, 0, 1, 4, 0, 0, 0, 0])
    hidden = bytes([frames.OPTIONS, 0, 0, 1, 0, 0, 0, 9]) + options
    open_ = bytes([frames.UDP, 0, 0, 1, 0, 0, 0, 9]) + bytes([3, 231, 15, 160, 0, 14, 0, 1])
    wrong, right = (
        frames.ipv6(ip(net.mine, 6), ip(to, 6), frames.FRAGMENT, payload)
        for payload in (hidden, open_)
    )
    # Without the mark behind it, the kernel would see a header in that.
    return ethernet(to.mac, net.mine.mac, IPV6, wrong), ethernet(to.mac, net.mine.mac, IPV6, right)


def redirect6(net: Net, to: Port) -> tuple[bytes, bytes]:
    body = bytes(4) + bytes(32)
    wrong, right = (
        frames.icmp6(local(net.mine), local(to), type, body) for type in (frames.REDIRECT, 128)
    )
    return ethernet(to.mac, net.mine.mac, IPV6, wrong), ethernet(to.mac, net.mine.mac, IPV6, right)


def redirect4(net: Net, to: Port) -> tuple[bytes, bytes]:
    def make(type: int) -> bytes:
        body = bytes([type, 1, 0, 0]) + bytes(32)
        body = body[:2] + frames.checksum(body).to_bytes(2, "big") + body[4:]
        packet = frames.ipv4(ip(net.mine), ip(to), frames.ICMP, body)
        return ethernet(to.mac, net.mine.mac, IPV4, packet)

    return make(5), make(8)


def dhcp_offer(net: Net, to: Port) -> tuple[bytes, bytes]:
    wrong, right = (frames.udp4(ip(net.mine), ip(to), p, source_port=67) for p in (68, 69))
    return ethernet(to.mac, net.mine.mac, IPV4, wrong), ethernet(to.mac, net.mine.mac, IPV4, right)


def dhcp6_advertise(net: Net, to: Port) -> tuple[bytes, bytes]:
    wrong, right = (frames.udp6(local(net.mine), local(to), port) for port in (546, 548))
    return ethernet(to.mac, net.mine.mac, IPV6, wrong), ethernet(to.mac, net.mine.mac, IPV6, right)


def vlan_tagged(net: Net, to: Port) -> tuple[bytes, bytes]:
    packet = frames.udp4(ip(net.mine), ip(to), 4000)
    tagged = (5).to_bytes(2, "big") + IPV4.to_bytes(2, "big") + packet
    return (
        ethernet(to.mac, net.mine.mac, frames.VLAN, tagged),
        ethernet(to.mac, net.mine.mac, IPV4, packet),
    )


def unknown_protocol(net: Net, to: Port) -> tuple[bytes, bytes]:
    return (
        ethernet(to.mac, net.mine.mac, 0x88B5, bytes(46)),
        ethernet(to.mac, net.mine.mac, IPV4, frames.udp4(ip(net.mine), ip(to), 4000)),
    )


EVERYWHERE: list[tuple[Case, str]] = [
    (source_mac, "mac"),
    (source_mac_of_nobody, "mac"),
    (source_mac_of_tcp, "mac"),
    (pair_of_another, "mac"),
    (pair_of_another_of_tcp, "mac"),
    (source_address, "address"),
    (source_address_of_the_gateway, "address"),
    (source_address6, "address"),
    (source_address_of_tcp, "address"),
    (source_address6_of_tcp, "address"),
    (mapped_source, "address"),
    (longer_than_it_is, "protocol"),
    (link_local_of_another, "address"),
    (advertisement, "neighbour"),
    (advertisement_of_another_mac, "neighbour"),
    (advertisement_with_a_second_option, "neighbour"),
    (router_advertisement, "router"),
    (router_advertisement_behind_options, "router"),
    (redirect6, "router"),
    (redirect4, "router"),
    (dhcp_offer, "dhcp"),
    (dhcp6_advertise, "dhcp"),
    (vlan_tagged, "protocol"),
    (vlan_tagged_tcp, "protocol"),
    (unknown_protocol, "protocol"),
]


async def test_what_is_not_its_own_reaches_nobody(net: Net) -> None:
    with listening(net.near.path, net.far.path) as (near, far):
        for case, reason in EVERYWHERE:
            for ear, to in ((near, net.nears), (far, net.fars)):
                wrong, right = case(net, to)
                before = net.dropped(reason)
                net.send(wrong, right)
                assert ear.hears(right), f"{case.__name__}: the right one did not come"
                assert not any(e.has(wrong) for e in (near, far)), case.__name__
                assert net.dropped(reason) == before + 1, case.__name__


# -- what is told to all of a bridge --


def arps(net: Net) -> dict[str, bytes]:
    """ARP by which `near` would believe something of another."""
    me, other = net.mine.mac, ip(net.fars)
    return {
        "request": frames.arp(1, me, other, bytes(6), ip(net.nears)),
        "reply": frames.arp(2, me, other, net.nears.mac, ip(net.nears)),
        "gratuitous": frames.arp(1, me, other, bytes(6), other),
        "gratuitous reply": frames.arp(2, me, other, BROADCAST, other),
        "of the gateway": frames.arp(2, me, "10.7.0.1", BROADCAST, "10.7.0.1"),
        "with another MAC inside": frames.arp(2, STRANGER, ip(net.mine), BROADCAST, ip(net.mine)),
        "probe for another's": frames.arp(1, me, "0.0.0.0", bytes(6), other),
    }


async def test_arp_on_behalf_of_another_reaches_nobody(net: Net) -> None:
    right = frames.arp(1, net.mine.mac, ip(net.mine), bytes(6), ip(net.mine))
    probe = frames.arp(1, net.mine.mac, "0.0.0.0", bytes(6), ip(net.mine))
    with listening(net.near.path) as (ear,):
        for name, body in arps(net).items():
            before = net.dropped("arp")
            for to in (BROADCAST, net.nears.mac):
                wrong = ethernet(to, net.mine.mac, ARP, body)
                sound = [ethernet(to, net.mine.mac, ARP, body) for body in (right, probe)]
                net.send(wrong, *sound)
                assert all(ear.hears(frame) for frame in sound), name
                assert not ear.has(wrong), name
            assert net.dropped("arp") == before + 2, name
        stolen = ethernet(BROADCAST, net.nears.mac, ARP, arps(net)["gratuitous"])
        sound_one = ethernet(BROADCAST, net.mine.mac, ARP, right)
        net.send(stolen, sound_one)
        assert ear.hears(sound_one) and not ear.has(stolen)
    cache = json.loads(net.near.run("ip", "-j", "neigh", "show", "10.7.0.4"))
    assert [n for n in cache if n.get("lladdr") == "02:00:00:07:01:02"] == []


async def test_duplicates_are_looked_for_and_not_denied(net: Net) -> None:
    def ask(source: str, target: str, *options: tuple[int, bytes]) -> bytes:
        group = format_address(bytes.fromhex("ff02" + "00" * 9 + "01ff") + bytes([0, 0, 4]))
        message = frames.neighbour(source, group, frames.SOLICIT, target, *options)
        return ethernet(ALL_NODES_MAC, net.mine.mac, IPV6, message)

    mine, nonce = ip(net.mine, 6), (frames.NONCE, bytes(6))
    right = {
        "own": ask("::", mine),
        "own with a nonce (RFC 7527)": ask("::", mine, nonce),
        "who has": ask(mine, ip(net.fars, 6), (frames.SOURCE_LINK, net.mine.mac)),
        "who has, without an option": ask(local(net.mine), ip(net.fars, 6)),
    }
    wrong = {
        "another's": ask("::", ip(net.nears, 6)),
        "with another MAC": ask(mine, ip(net.fars, 6), (frames.SOURCE_LINK, STRANGER)),
        "from another": ask(ip(net.fars, 6), ip(net.nears, 6), (frames.SOURCE_LINK, net.mine.mac)),
        **{name: frame for name, (frame, _) in unanswered(net).items()},
    }
    with listening(net.near.path) as (ear,):
        before = net.dropped("neighbour")
        net.send(*wrong.values(), *right.values())
        for name, frame in right.items():
            assert ear.hears(frame), name
        for name, frame in wrong.items():
            assert not ear.has(frame), name
        assert net.dropped("neighbour") == before + len(wrong)


def unanswered(net: Net) -> dict[str, tuple[bytes, bool]]:
    """Solicitations that a VXLAN device or a receiver does not take for one, or that are larger
    than any has to be; and whether the device answers them nonetheless."""
    pad = bytes([frames.ICMP6, 0, 1, 4, 0, 0, 0, 0])
    own = bytes(4) + parse_address(ip(net.mine, 6))
    nonce = bytes([frames.NONCE, 1]) + bytes(6)

    def ask(source: str, body: bytes, before: bytes = b"", code: int = 0) -> bytes:
        message = frames.icmp6(source, ALL_NODES, frames.SOLICIT, body, before, code)
        return ethernet(ALL_NODES_MAC, net.mine.mac, IPV6, message)

    return {
        "of code 1": (ask(ip(net.mine, 6), own, code=1), False),
        "of code 1, for duplicates": (ask("::", own, code=1), False),
        "behind options": (ask(ip(net.mine, 6), own, pad), False),
        "behind options, for duplicates": (ask("::", own, pad), False),
        "cut off": (ask(ip(net.mine, 6), own[:16]), False),
        "large, for duplicates": (ask("::", own + nonce + bytes(1000)), True),
        "for duplicates, with another option": (ask("::", own + b"\1\1" + bytes(6)), True),
    }


async def test_only_solicitations_that_are_answered_here_are_without_limit(fabric: Fabric) -> None:
    """Where sandboxes may spoof, the limit on what is for all is all there is."""
    net = await build(fabric, spoof=True, flood_rate=1)
    own = bytes(4) + parse_address(ip(net.mine, 6))
    sound = frames.icmp6(ip(net.mine, 6), ALL_NODES, frames.SOLICIT, own)
    last = ethernet(net.nears.mac, net.mine.mac, IPV4, frames.udp4(ip(net.mine), ip(net.nears), 9))
    plain = ethernet(ALL_NODES_MAC, net.mine.mac, IPV6, sound)
    with listening(net.near.path) as (ear,):
        for name, (frame, answered) in {**unanswered(net), "plain": (plain, True)}.items():
            before = net.dropped("flood")
            net.send(*[frame] * 200, last)
            assert ear.hears(last), name
            dropped = net.dropped("flood") - before
            heard = sum(mark_of(frame) in one for one in ear.heard())
            if answered:
                assert heard == 200, name
            else:  # and what the sandbox's own kernel says to all is dropped with it
                assert heard < 100 and dropped >= 200 - heard, name
            ear.forget()


async def test_frames_for_bridges_reach_nobody(net: Net) -> None:
    """Spanning tree, PAUSE, LACP, 802.1X, LLDP; and IP at those addresses."""
    with listening(net.near.path, net.far.path) as (near, far):
        wrong = []
        for last in (0, 1, 2, 3, 0x0E):
            to = bytes.fromhex("0180c20000") + bytes([last])
            bpdu = b"\x42\x42\x03" + bytes(43)
            wrong.append(to + net.mine.mac + len(bpdu).to_bytes(2, "big") + bpdu)
            wrong[-1] += ethernet(b"", b"", 0, b"")[-8:]
            wrong += [ethernet(to, net.mine.mac, kind, bytes(46)) for kind in (0x8808, 0x88CC)]
            stolen = frames.arp(2, net.mine.mac, ip(net.fars), BROADCAST, ip(net.fars))
            wrong.append(ethernet(to, net.mine.mac, ARP, stolen))
        right = ethernet(
            BROADCAST, net.mine.mac, IPV4, frames.udp4(ip(net.mine), "10.7.0.255", 4000)
        )
        net.send(*wrong, right)
        assert near.hears(right)
        assert not any(ear.has(frame) for frame in wrong for ear in (near, far))
        # Nor do they lead our own namespace astray.
        assert "10.7.0.4" not in net.host.inside("ip", "neigh", "show", "nud", "all", "dev", "vxb7")


@pytest.mark.parametrize("udp", [True, False])
async def test_questions_to_others_are_limited_where_ours_answers_them(net: Net, udp: bool) -> None:
    def question(to: str) -> bytes:
        payload = frames.udp4(ip(net.mine), to, 53)
        if not udp:
            payload = frames.ipv4(ip(net.mine), to, 6, frames.tcp_syn(999, 53))
        return ethernet(net.router, net.mine.mac, IPV4, payload)

    elsewhere, gateway = question("192.0.2.53"), question("10.7.0.1")

    def dropped_of(frame: bytes, count: int) -> int:
        """How many of so many are, when all have come as far as they come."""
        before = net.dropped("gateway")
        net.send(*[frame] * count, last)
        assert ear.hears(last)
        ear.forget()
        return net.dropped("gateway") - before

    last = ethernet(net.nears.mac, net.mine.mac, IPV4, frames.udp4(ip(net.mine), ip(net.nears), 9))
    with listening(net.near.path) as (ear,):
        assert dropped_of(elsewhere, 8000) == 0, "nobody here answers for others"
        bridge = net.host.desired.networks[VNI]
        net.host.desired.networks[VNI] = replace(bridge, asked=True)
        net.host.reconciler.touch_bridge(VNI)
        await net.fabric.settle()
        for frame in (elsewhere, gateway):
            # As fast as this machine can; what is more than its share in a second may not be.
            dropped = (dropped_of(frame, 8000) for _ in range(20))
            count = next((each for each in dropped if each), 0)
            assert 0 < count < 8000, "one packet counts once"


async def test_whose_questions_ours_answers_follows_an_engines_containers(net: Net) -> None:
    def answered() -> set[str]:
        table = net.host.inside("nft", "list", "set", "inet", "vxmesh", "asked4")
        return set(re.findall(r'"vxb7" \. ([\d.]+)', table))

    assert answered() == set()
    bridge = net.host.desired.networks[VNI]
    for given in ({ip(net.mine)}, {ip(net.mine), ip(net.nears)}, {ip(net.nears)}, set()):
        ports = {
            id: replace(port, netns=HANDED_OUT if ip(port) in given else port.netns)
            for id, port in bridge.ports.items()
        }
        net.host.set_ports(VNI, ports)
        await net.fabric.settle()
        assert answered() == given


async def test_a_flood_of_macs_fills_no_table(net: Net) -> None:
    rng = random.Random(4)
    flood, macs = [], []
    for number in range(2000):
        mac = b"\x02" + rng.randbytes(5)
        macs.append(mac.hex(":"))
        spoofed = frames.arp(1, mac, f"10.7.{number % 255}.9", bytes(6), "10.7.0.3")
        flood.append(ethernet(BROADCAST, mac, ARP, spoofed))
        flood.append(ethernet(net.nears.mac, mac, IPV4, frames.udp4("10.7.0.9", "10.7.0.3", 4000)))
    right = ethernet(
        net.nears.mac, net.mine.mac, IPV4, frames.udp4(ip(net.mine), ip(net.nears), 4000)
    )
    with listening(net.near.path) as (ear,):
        net.send(*flood, right)
        assert ear.hears(right)
        heard = b"".join(ear.heard())
        assert not any(mark_of(frame) in heard for frame in flood)
    tables = net.host.inside("bridge", "fdb", "show") + net.host.inside("ip", "neigh")
    tables += net.near.run("ip", "neigh")
    assert "02:" in tables and not any(mac in tables for mac in macs)
    assert net.dropped("mac") >= len(flood)


async def test_ordinary_life_is_not_dropped(net: Net) -> None:
    """Interfaces come up, duplicates are looked for, groups joined, neighbours found and asked."""
    ways = [
        (box.path, address)
        for box in (net.me, net.near, net.far)
        for port in (net.mine, net.nears, net.fars)
        for address in (ip(port), ip(port, 6))
    ]
    ways += [(net.me.path, "10.7.0.1"), (net.me.path, "fd00:7::1"), (net.me.path, "10.98.0.9")]
    ways += [(net.me.path, f"{local(net.nears)}%eth0")]
    assert pings(*ways) == [True] * len(ways)
    net.me.run("ip", "link", "set", "eth0", "down")
    net.me.run("ip", "link", "set", "eth0", "up")
    await until(lambda: all(pings((net.me.path, ip(net.nears)))), "it is up again")
    for reason in ("mac", "address", "arp", "neighbour", "dhcp", "router", "protocol"):
        assert net.dropped(reason) == 0, reason


# -- when it is there --


def spoofed(net: Net) -> tuple[bytes, bytes]:
    return source_address(net, net.nears)


async def test_a_port_is_guarded_from_its_first_frame(fabric: Fabric) -> None:
    """A sandbox that sends from before its interface is there, while others come and go."""
    net = await build(fabric)
    with listening(net.near.path) as (ear,):
        late = Sandbox(fabric)
        wrong = ethernet(
            net.nears.mac, STRANGER, IPV4, frames.udp4("10.7.0.9", ip(net.nears), 4000)
        )
        stop = asyncio.Event()

        def shout() -> None:
            try:
                send(late.path, "eth0", *([wrong] * 200))
            except OSError:
                pass  # not there yet, or not up

        async def keep_shouting() -> int:
            times = 0
            while not stop.is_set():
                await asyncio.to_thread(shout)
                times += 1
            return times

        shouting = asyncio.create_task(keep_shouting())
        load = [net.host.add_port(VNI, number, Sandbox(fabric)) for number in range(20, 40)]
        port = net.host.add_port(VNI, 9, late)
        await net.host.reconciler.settle(port.endpoint)
        right = ethernet(net.nears.mac, port.mac, IPV4, frames.udp4(ip(port), ip(net.nears), 4000))
        before = net.dropped("mac")
        await until(lambda: net.dropped("mac") > before + 200, "it shouts")
        send(late.path, "eth0", right)
        assert ear.hears(right) and not ear.has(wrong)
        stop.set()
        assert await shouting
        ports = net.host.desired.networks[VNI].ports
        net.host.set_ports(VNI, {e: p for e, p in ports.items() if p not in load})
        await fabric.settle()
    listed = net.host.inside("nft", "list", "set", "bridge", "vxmesh", "macs")
    assert listed.count("vxp") == 3  # only what is still there


async def test_the_guard_outlives_the_agent_and_its_restart(net: Net) -> None:
    wrong, right = spoofed(net)
    wrong6, right6 = source_address6(net, net.nears)
    stop = asyncio.Event()

    async def keep_sending() -> int:
        sent = 0
        while not stop.is_set():
            await asyncio.to_thread(net.send, *([wrong, wrong6, right, right6] * 20))
            sent += 20
            ear.heard()  # what waits there too long would be lost there
        return sent

    with listening(net.near.path) as (ear,):
        sending = asyncio.create_task(keep_sending())
        for _ in range(6):
            await restart(net.host)
        await net.host.reconciler.stop()
        await asyncio.to_thread(net.send, wrong, wrong6, right, right6)
        stop.set()
        sent = await sending + 1

        def came() -> list[int]:
            marks = [mark_of(frame) for frame in (right, right6)]
            return [sum(mark in frame for frame in ear.heard()) for mark in marks]

        ear.wait(lambda: came() == [sent, sent], 5)
        assert (came(), ear.lost()) == ([sent, sent], 0), "what is its own is never dropped"
        assert not ear.has(wrong) and not ear.has(wrong6)


async def test_a_guard_that_somebody_deletes_is_put_back(net: Net) -> None:
    for command in (
        ("delete", "table", "bridge", "vxmesh"),
        ("flush", "chain", "bridge", "vxmesh", "from_ipv4"),
        ("delete", "chain", "bridge", "vxmesh", "prerouting"),
        ("add", "element", "bridge", "vxmesh", "trusted", f'{{ "{net.mine.device}" }}'),
        ("flush", "set", "bridge", "vxmesh", "macs"),
        ("flush", "ruleset"),
    ):
        before = net.host.reconciler.repairs["nft"]
        shown = _shown(net)
        net.host.inside("nft", *command)
        back = functools.partial(_repaired, net, before, shown)
        await until(back, " ".join(command))
        with listening(net.near.path) as (ear,):
            wrong, right = spoofed(net)
            net.send(wrong, right)
            assert ear.hears(right) and not ear.has(wrong), command


def _shown(net: Net) -> list[str]:
    """The guard in the kernel; in which order its parts are listed is chance."""
    listed = net.host.inside("nft", "-s", "list", "table", "bridge", "vxmesh", check=False)
    return sorted(listed.replace(",", " ").split())


def _repaired(net: Net, before: int, shown: list[str]) -> bool:
    return net.host.reconciler.repairs["nft"] > before and _shown(net) == shown


async def test_what_is_compared_in_the_background_is_right_after_any_change(net: Net) -> None:
    """The elements that were altered one by one are those that the kernel lists."""
    extra = net.host.add_port(VNI, 5, Sandbox(net.fabric))
    await net.host.reconciler.settle(extra.endpoint)
    ports = dict(net.host.desired.networks[VNI].ports)
    moved = replace(ports[net.mine.endpoint], addresses=("10.7.0.77/24", "fd00:7::77/64"))
    del ports[extra.endpoint]
    net.host.set_ports(VNI, {**ports, moved.endpoint: moved})
    net.host.add_network(8)
    await net.fabric.settle()
    net.host.reconciler.audit()
    await net.fabric.settle()
    assert net.host.reconciler.repairs["nft"] == 0
    now = replace(net, mine=moved)
    old = ethernet(
        net.nears.mac, net.mine.mac, IPV4, frames.udp4(ip(net.mine), ip(net.nears), 4000)
    )
    new = ethernet(net.nears.mac, net.mine.mac, IPV4, frames.udp4(ip(moved), ip(net.nears), 4000))
    with listening(net.near.path) as (ear,):
        now.send(old, new)
        assert ear.hears(new) and not ear.has(old)


async def test_a_network_may_allow_spoofing(fabric: Fabric) -> None:
    net = await build(fabric, spoof=True)
    virtual = bytes.fromhex("00005e000101")  # VRRP's, RFC 5798
    announced = ethernet(
        BROADCAST, virtual, ARP, frames.arp(2, virtual, "10.7.0.100", BROADCAST, "10.7.0.100")
    )
    other = ethernet(net.nears.mac, virtual, IPV4, frames.udp4("10.7.0.100", ip(net.nears), 4000))
    with listening(net.near.path) as (ear,):
        net.send(announced, other)
        assert ear.hears(announced) and ear.hears(other)
    # Another network on the same host is guarded all the same.
    net.host.add_network(8)
    strict = Sandbox(fabric)
    port = net.host.add_port(8, 2, strict)
    await net.host.reconciler.settle(port.endpoint)
    before = net.dropped("arp") + net.dropped("mac")
    send(strict.path, "eth0", announced)
    await until(lambda: net.dropped("arp") + net.dropped("mac") > before, "it is dropped")
    # What is the agents' is closed here too.
    assert net.host.inside("nft", "list", "set", "bridge", "vxmesh", "ports").count("vxp") == 3


# -- the hosts --


async def test_no_agent_and_no_vtep_is_reached(net: Net) -> None:
    """By the way out: our own host at each of its addresses, the other host, the outsider."""
    run("ip", "route", "add", "10.99.0.0/24", "via", "10.98.0.1", netns=net.fabric.outsider)
    for host in net.fabric.hosts:
        host.desired.closes = Closed(
            carriers=frozenset({4789}),
            agents=frozenset({("10.99.0.1", 7946), ("10.99.0.2", 7946), ("10.99.0.2", 9100)}),
            own=frozenset({7946, 9100}),
        )
        host.reconciler.touch_all()
    await net.fabric.settle()
    assert net.host.reconciler.failures() == []

    def leaves(packet: bytes) -> bytes:
        return ethernet(net.router, net.mine.mac, IPV4, packet)

    mine = ip(net.mine)
    tcp = [frames.tcp_syn(4000, port) for port in (7946, 9100, 8080)]
    for to, ear_at, device in (
        ("10.99.0.2", net.fabric.b.path, "wire"),
        ("10.98.0.9", net.fabric.outsider, "side"),
    ):
        ear = Ear(ear_at, device)
        before = net.dropped("vxlan")
        forged = leaves(frames.udp4(mine, to, 4789, b"\x08" + bytes(7) + secrets_of(1)))
        right = leaves(frames.udp4(mine, to, 4790, b"\x08" + bytes(7) + secrets_of(2)))
        net.send(forged, right)
        assert ear.wait(functools.partial(_came, ear, secrets_of(2)), 30)
        assert not any(secrets_of(1) in frame for frame in ear.heard())
        assert net.dropped("vxlan") == before + 1
        ear.close()
    before = net.dropped("agent")
    net.send(*(leaves(frames.ipv4(mine, "10.99.0.2", frames.TCP, syn)) for syn in tcp))
    await until(lambda: net.dropped("agent") == before + 2, "two of three are dropped")


def _came(ear: Ear, payload: bytes) -> bool:
    return any(payload in frame for frame in ear.heard())


def secrets_of(number: int) -> bytes:
    """Bytes to know a payload by, after its addresses were translated."""
    return b"vxmesh-guard-%d" % number


async def test_an_agents_ports_are_closed_at_every_address_of_its_host(net: Net) -> None:
    net.host.desired.closes = Closed(own=frozenset({9100}))
    net.host.reconciler.touch_all()
    await net.fabric.settle()
    command = ["nsenter", f"--net={net.host.path}", sys.executable, "-u", "-c", LISTEN]
    listener = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        assert listener.stdout
        assert await asyncio.wait_for(listener.stdout.readline(), 60)
        for address in ("10.99.0.1", "10.98.0.1", "169.254.83.1", "fd98::1"):
            assert connects(net.me.path, address, 9101), "another port is open as before"
            assert not connects(net.me.path, address, 9100, 0.7), address
            assert connects(net.host.path, address, 9100), "to the host itself it is open"
    finally:
        listener.kill()
        await listener.wait()
    shown = net.host.run("nft", "list", "counter", "inet", "vxmesh", "guard_agent")
    assert int(re.search(r"packets (\d+)", shown)[1]) >= 4  # type: ignore[index]


LISTEN = """
import select, socket
servers = [socket.create_server(("::", p), family=socket.AF_INET6, dualstack_ipv6=True)
           for p in (9100, 9101)]
print()
while True:
    for server in select.select(servers, [], [])[0]:
        server.accept()
"""
