"""Ways in which a workload might get across to a network that it is not in, as raw frames.

Each way makes frames of one workload, `me`, that are for another one, with a token inside by which
whoever hears them knows them again, in whatever they were wrapped and through whatever they came.
The same way is made for a workload of the sender's own network, or for the outside, where
that is a way that works: `proof` says for whom.
What stands opposite: test_crossing.py, which sends and listens; frames.py has the layouts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import dns.message

from agent.notation import parse_address
from tests.netns.frames import (
    ADVERTISE,
    ARP,
    BROADCAST,
    ICMP,
    IPV4,
    IPV6,
    REDIRECT,
    SOLICIT,
    SOURCE_LINK,
    TARGET_LINK,
    UDP,
    VLAN,
    arp,
    checksum,
    icmp6,
    ipv4,
    ipv6,
    neighbour,
    udp4,
    udp6,
)

PORT = 4000  # UDP
VXLAN_PORT = 4789
GRE, IPIP, SIXIN4 = 47, 4, 41
ALL_NODES, ALL_NODES_MAC = "ff02::1", bytes.fromhex("333300000001")
MDNS, MDNS_MAC = "224.0.0.251", bytes.fromhex("01005e0000fb")
ROUTING = 43
# of ICMP and of ICMPv6: what tells that a packet went nowhere, and repeats it
ERRORS4, ERRORS6 = (3, 4, 5, 11, 12), (1, 2, 3, 4, REDIRECT)


@dataclass(frozen=True)
class End:
    """A workload, or what stands in for one: its addresses, and its network's router here."""

    name: str
    mac: bytes
    v4: str
    v6: str
    local: str  # IPv6 link-local
    router: bytes  # MAC
    gateway4: str
    gateway6: str
    broadcast: str  # of its subnet
    vni: int
    vip: str = ""  # of a service that leads to it
    node: str = ""  # address of its host


@dataclass(frozen=True)
class Here:
    """Where it is sent from: the sender, somebody else in the network of who is meant, hosts."""

    me: End
    friend: End
    node_mac: bytes  # of the sender's host, on the wire
    uplink_mac: bytes  # of the host's end of the way out
    published: int  # a port of its host that leads to who is meant
    port: int = PORT


Make = Callable[[Here, End, bytes], bytes]
Proof = Literal["home", "near", "client", "published", "vip", "vxlan", ""]


@dataclass(frozen=True)
class Way:
    """`proof`: to whom the same way works: "home", a workload of the sender's network where the
    other is; "near", one on its own host; "client", outside; "published", the other one, by a
    port that was opened; "vip", at home, by a service there; "vxlan", from a host; "": nobody.
    `loose`: likewise in networks that let workloads send for others. What is for all (`is_for_all`)
    comes to the sender's own host alone, "near", unless its network floods."""

    name: str
    make: Make
    proof: Proof = ""
    loose: Proof = ""
    answer: Callable[[bytes, Here, End, bytes], bool] | None = None
    is_for_all: bool = False

    def proven(self, is_loose: bool, floods: bool = False) -> Proof:
        proof = self.loose or self.proof if is_loose else self.proof
        return "home" if floods and self.is_for_all and proof else proof


def frame(to: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    return to + source + struct.pack(">H", kind) + payload


def is_answer(heard: bytes, token: bytes) -> bool:
    """Whether a frame that the sender hears has the token and is no error that repeats it."""
    if token not in heard:
        return False
    kind = struct.unpack(">H", heard[12:14])[0]
    if kind == IPV4 and heard[23] == ICMP:
        return heard[14 + 4 * (heard[14] & 15)] not in ERRORS4
    return not (kind == IPV6 and heard[20] == 58 and heard[54] in ERRORS6)


def echo4(source: str, to: str, token: bytes, ttl: int = 64) -> bytes:
    body = struct.pack(">BBHHH", 8, 0, 0, 1, 1) + token
    body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
    return with_ttl(ipv4(source, to, ICMP, body), ttl)


def echo6(source: str, to: str, token: bytes) -> bytes:
    return icmp6(source, to, 128, struct.pack(">HH", 1, 1) + token)


def with_ttl(packet: bytes, ttl: int) -> bytes:
    head = packet[:8] + bytes([ttl]) + packet[9:10] + b"\0\0" + packet[12:20]
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + packet[20:]


def with_route(packet: bytes, by: str, to: str) -> bytes:
    """A loose source route (RFC 791): to `by`, and on from there to `to`."""
    option = bytes([131, 7, 4]) + parse_address(to) + b"\1"
    head = bytes([0x47]) + packet[1:2] + struct.pack(">H", len(packet) + 8) + packet[4:10]
    head += b"\0\0" + packet[12:16] + parse_address(by) + option
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + packet[20:]


def _udp4(h: Here, to: str, token: bytes, source: str = "") -> bytes:
    return udp4(source or h.me.v4, to, h.port, token)


def _udp6(h: Here, to: str, token: bytes, source: str = "") -> bytes:
    return udp6(source or h.me.v6, to, h.port, token)


def by_router(make: Callable[[Here, End, bytes], bytes], kind: int = IPV4) -> Make:
    """The packet, sent to the sender's own gateway."""
    return lambda h, to, token: frame(h.me.router, h.me.mac, kind, make(h, to, token))


def straight(make: Callable[[Here, End, bytes], bytes], kind: int = IPV4) -> Make:
    """The packet, sent to the other's MAC, as by an entry made by hand."""
    return lambda h, to, token: frame(to.mac, h.me.mac, kind, make(h, to, token))


def at_all(make: Callable[[Here, End, bytes], bytes], kind: int = IPV4, to: bytes = BROADCAST) -> (
    Make
):  # fmt: skip
    return lambda h, end, token: frame(to, h.me.mac, kind, make(h, end, token))


def inner(h: Here, to: End, token: bytes) -> bytes:
    """An Ethernet frame as a friend of the other would send it."""
    return frame(to.mac, h.friend.mac, IPV4, _udp4(h, to.v4, token, h.friend.v4))


def vxlan(h: Here, to: End, token: bytes) -> bytes:
    return struct.pack(">II", 0x08 << 24, to.vni << 8) + inner(h, to, token)


def dhcp(h: Here, token: bytes) -> bytes:
    """A DHCPDISCOVER (RFC 2131), its token in the name of a boot file."""
    body = struct.pack(">BBBBIHH16x", 1, 1, 6, 0, 7, 0, 0) + h.me.mac + bytes(10 + 64)
    body += token.ljust(128, b"\0") + bytes.fromhex("6382536335010100ff")
    return udp4("0.0.0.0", "255.255.255.255", 67, body, source_port=68)


def question(h: Here, name: str, at: str) -> bytes:
    return udp4(h.me.v4, at, 53, dns.message.make_query(name, "A").to_wire(), source_port=4053)


def has_answer_of(heard: bytes, h: Here, to: End, token: bytes) -> bool:
    """An answer of a name server that has the other's address."""
    is_dns = heard[12:14] == b"\x08\x00" and heard[23] == UDP and heard[34:36] == b"\0\x35"
    return is_dns and parse_address(to.v4) in heard[42:]


def is_arp_answer(heard: bytes, h: Here, to: End, token: bytes) -> bool:
    return heard[12:14] == b"\x08\x06" and heard[20:22] == b"\0\2" and (
        heard[28:32] == parse_address(to.v4)
    )  # fmt: skip


def is_advertised(heard: bytes, h: Here, to: End, token: bytes) -> bool:
    is_icmp6 = heard[12:14] == b"\x86\xdd" and heard[20] == 58
    return is_icmp6 and heard[54] == ADVERTISE and parse_address(to.v6) in heard[62:78]


def _redirect(h: Here, to: End, token: bytes) -> bytes:
    """To the gateway: the other is reached by me."""
    body = bytes([5, 1, 0, 0]) + parse_address(h.me.v4) + _udp4(h, to.v4, token)[:28] + token
    body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
    return ipv4(h.me.v4, h.me.gateway4, ICMP, body)


def _vlan(h: Here, to: End, token: bytes) -> bytes:
    return struct.pack(">HH", to.vni & 4095, IPV4) + _udp4(h, to.v4, token)


def _routed6(h: Here, to: End, token: bytes) -> bytes:
    """A routing header of type 0 (RFC 2460): by our gateway to the other."""
    packet = _udp6(h, to.v6, token)
    head = bytes([UDP, 2, 0, 1]) + bytes(4) + parse_address(to.v6)
    return ipv6(h.me.v6, h.me.gateway6, ROUTING, head + packet[40:])


WAYS = [
    Way("route by our gateway", by_router(lambda h, to, t: _udp4(h, to.v4, t)), "client"),
    Way("route by our gateway, IPv6",
        by_router(lambda h, to, t: _udp6(h, to.v6, t), IPV6), "client"),
    Way("echo by our gateway", by_router(lambda h, to, t: echo4(h.me.v4, to.v4, t)), "client"),
    Way("the other's gateway", by_router(lambda h, to, t: echo4(h.me.v4, to.gateway4, t)), "home"),
    Way("the other's gateway, IPv6",
        by_router(lambda h, to, t: echo6(h.me.v6, to.gateway6, t), IPV6), "home"),
    Way("the other's router's MAC",
        lambda h, to, t: frame(to.router, h.me.mac, IPV4, _udp4(h, to.v4, t)), ""),
    Way("the other's router's MAC, IPv6",
        lambda h, to, t: frame(to.router, h.me.mac, IPV6, _udp6(h, to.v6, t)), ""),
    Way("static neighbour", straight(lambda h, to, t: _udp4(h, to.v4, t)), "home"),
    Way("static neighbour, IPv6", straight(lambda h, to, t: _udp6(h, to.v6, t), IPV6), "home"),
    Way("link-local, IPv6",
        straight(lambda h, to, t: _udp6(h, to.local, t, h.me.local), IPV6), "home"),
    Way("link-local by our gateway",
        by_router(lambda h, to, t: _udp6(h, to.local, t, h.me.local), IPV6)),
    Way("broadcast", at_all(lambda h, to, t: _udp4(h, "255.255.255.255", t)), "near",
        is_for_all=True),
    Way("directed broadcast", at_all(lambda h, to, t: _udp4(h, to.broadcast, t)), "near",
        is_for_all=True),
    Way("directed broadcast by our gateway",
        by_router(lambda h, to, t: _udp4(h, to.broadcast, t))),
    Way("broadcast with the other's address", at_all(lambda h, to, t: _udp4(h, to.v4, t)), "near",
        is_for_all=True),
    Way("multicast", at_all(lambda h, to, t: _udp4(h, MDNS, t), to=MDNS_MAC), "near",
        is_for_all=True),
    Way("multicast, IPv6",
        at_all(lambda h, to, t: _udp6(h, ALL_NODES, t, h.me.local), IPV6, ALL_NODES_MAC), "near",
        is_for_all=True),
    Way("multicast of a site by our gateway, IPv6",
        by_router(lambda h, to, t: _udp6(h, "ff05::1", t), IPV6)),
    Way("the own node's address", by_router(lambda h, to, t: _udp4(h, h.me.node, t))),
    Way("the other's node's address",
        by_router(lambda h, to, t: _udp4(h, to.node, t)), "published"),
    Way("the own node as next hop",
        lambda h, to, t: frame(h.node_mac, h.me.mac, IPV4, _udp4(h, to.v4, t))),
    Way("the way out as next hop",
        lambda h, to, t: frame(h.uplink_mac, h.me.mac, IPV4, _udp4(h, to.v4, t))),
    Way("the host's end of the way out", by_router(lambda h, to, t: _udp4(h, "169.254.83.1", t))),
    Way("a published port at loopback",
        by_router(lambda h, to, t: udp4(h.me.v4, "127.0.0.1", h.published, t))),
    Way("from loopback", by_router(lambda h, to, t: _udp4(h, to.v4, t, "127.0.0.1"))),
    Way("from a friend's address", by_router(lambda h, to, t: _udp4(h, to.v4, t, h.friend.v4))),
    Way("from a friend's address, straight",
        straight(lambda h, to, t: _udp4(h, to.v4, t, h.friend.v4)), "", "home"),
    Way("from a friend's address, IPv6",
        by_router(lambda h, to, t: _udp6(h, to.v6, t, h.friend.v6), IPV6)),
    Way("from the other's gateway's address",
        by_router(lambda h, to, t: _udp4(h, to.v4, t, to.gateway4))),
    Way("from the node's address", by_router(lambda h, to, t: _udp4(h, to.v4, t, h.me.node))),
    Way("from a friend's MAC", inner, "", "home"),
    Way("from the other's router's MAC",
        lambda h, to, t: frame(to.mac, to.router, IPV4, _udp4(h, to.v4, t, to.gateway4))),
    Way("ARP for the other", at_all(
        lambda h, to, t: arp(1, h.me.mac, h.me.v4, bytes(6), to.v4) + t, ARP),
        "near", answer=is_arp_answer),
    # Not to another host: no ARP crosses the wire.
    Way("ARP that poisons", straight(
        lambda h, to, t: arp(2, h.me.mac, h.friend.v4, to.mac, to.v4) + t, ARP), "", "near"),
    Way("solicitation for the other, IPv6",
        at_all(lambda h, to, t: neighbour(
            h.me.v6, ALL_NODES, SOLICIT, to.v6, (SOURCE_LINK, h.me.mac)) + t, IPV6, ALL_NODES_MAC),
        "near", answer=is_advertised),
    Way("advertisement that poisons, IPv6",
        straight(lambda h, to, t: neighbour(
            h.friend.v6, to.v6, ADVERTISE, h.friend.v6, (TARGET_LINK, h.me.mac), flags=0x20) + t,
            IPV6), "", "home"),
    Way("VXLAN by hand", by_router(
        lambda h, to, t: udp4(h.me.v4, to.node, VXLAN_PORT, vxlan(h, to, t))), "vxlan"),
    Way("VXLAN by hand to the own gateway", by_router(
        lambda h, to, t: udp4(h.me.v4, h.me.gateway4, VXLAN_PORT, vxlan(h, to, t)))),
    Way("GRE to the node", by_router(lambda h, to, t: ipv4(
        h.me.v4, to.node, GRE, struct.pack(">HH", 0, IPV4) + _udp4(h, to.v4, t, h.friend.v4)))),
    Way("GRE with a frame inside", by_router(lambda h, to, t: ipv4(
        h.me.v4, to.node, GRE, struct.pack(">HH", 0, 0x6558) + inner(h, to, t)))),
    Way("IP in IP to the node", by_router(lambda h, to, t: ipv4(
        h.me.v4, to.node, IPIP, _udp4(h, to.v4, t, h.friend.v4)))),
    Way("IPv6 in IP to the node", by_router(lambda h, to, t: ipv4(
        h.me.v4, to.node, SIXIN4, _udp6(h, to.v6, t, h.friend.v6)))),
    Way("source route by the gateway", by_router(
        lambda h, to, t: with_route(_udp4(h, to.v4, t), h.me.gateway4, to.v4))),
    Way("source route by the node", by_router(
        lambda h, to, t: with_route(_udp4(h, to.v4, t), to.node, to.v4))),
    Way("routing header, IPv6", by_router(_routed6, IPV6)),
    Way("TTL that ends at the gateway", by_router(
        lambda h, to, t: echo4(h.me.v4, to.v4, t, ttl=1))),
    Way("redirect to the gateway", by_router(_redirect)),
    Way("a later fragment", by_router(lambda h, to, t: ipv4(
        h.me.v4, to.v4, UDP, t, flags=3, id=77))),
    Way("IPv4-mapped, IPv6", by_router(
        lambda h, to, t: _udp6(h, f"::ffff:{to.v4}", t), IPV6)),
    Way("NAT64's prefix, IPv6", by_router(
        lambda h, to, t: _udp6(h, f"64:ff9b::{to.v4}", t), IPV6)),
    Way("the VIP of the other's service", by_router(
        lambda h, to, t: _udp4(h, to.vip, t)), "vip"),
    Way("VLAN tag of the other's VNI", straight(_vlan, VLAN)),
    Way("a protocol that is not IP", straight(lambda h, to, t: bytes(30) + t, 0x88B5), ""),
    Way("a name server's answer", by_router(lambda h, to, t: question(
        h, f"{to.name}.", h.me.gateway4) + t), "home", answer=has_answer_of),
    Way("the other's name server", by_router(lambda h, to, t: question(
        h, f"{t.hex()}.", to.gateway4)), "home",
        answer=lambda heard, h, to, t: t.hex().encode() in heard and heard[34:36] == b"\0\x35"),
    Way("DHCP", at_all(lambda h, to, t: dhcp(h, t)), "", "near", is_for_all=True),
    Way("broadcast of the hosts' wire", by_router(
        lambda h, to, t: _udp4(h, to.node.rpartition(".")[0] + ".255", t))),
]  # fmt: skip
