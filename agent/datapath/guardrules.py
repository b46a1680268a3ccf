"""What a sandbox may send at all, as rules of its port on the bridge. Pure.

A sandbox has raw sockets and is root in its own namespace, so whatever it sends is suspect:
each frame is looked at where it comes out of the port, before the bridge does anything with it.
What passes is IPv4, IPv6 and ARP of the endpoint's own MAC and addresses; the rest is dropped,
by default and by a reason that is counted. The chains never change; what belongs to an endpoint
is a few elements of sets, keyed by the port, so a port that nobody has put in yet can send
nothing.
What stands opposite: guard.py puts it into the kernel; docs/guards.md tells users.
Source: nft(8); Linux net/bridge/br_input.c, net/netfilter/nft_payload.c; RFC 826 (ARP),
4861 (neighbour discovery), 4429 and 7527 (detection of duplicates), 7112 (fragments),
7113 (how router advertisements are hidden from guards), 2131 and 8415 (DHCP).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from agent.datapath.nft import CLOSED_SETS, Elements, Ruleset
from agent.drivers.base import Bridge, Port
from agent.floodmodel import RATE_DEFAULT
from agent.notation import format_address, format_mac

GUARD_TABLE = "bridge vxmesh"
COUNTER = "guard_"  # before a reason, the name of its counter in every table of ours

# reason -> what was dropped, for people
REASONS = {
    "mac": "frames with another's MAC as source",
    "address": "packets with another's address as source",
    "arp": "ARP with a sender that is another",
    "neighbour": "neighbour discovery on behalf of another",
    "dhcp": "answers of a DHCP server",
    "router": "router advertisements or redirects",
    "protocol": "frames that are no plain IPv4, IPv6 or ARP (VLAN, spanning tree, LLDP …)",
    "gateway": "packets to the gateway, or questions to name servers, beyond their limit",
    "agent": "packets to an agent's ports",
    "vxlan": "VXLAN packets of its own",
    "flood": "broadcast and multicast beyond its network's limit",
}

# The name server answers in turn, one of each asker, so one who floods costs the others little as
# long as questions do not come faster than they are read (70,000/s and more): then the sockets of
# all are full. A seventh of that is more than any workload wants and leaves room for several who
# flood. Figures: docs/decisions/0017.
GATEWAY_RATE = 10_000  # packets a second from one port to the gateway's addresses
GATEWAY_BURST = 1000  # packets at once after silence
FLOOD_BURST_MIN = 10  # packets to all at once after silence, however low the rate is

# from_ipv4, from_ipv6: what passed the check of its source must not be a server's or a router's.
# `meta l4proto != 255` is whatever has an upper layer that can be seen: a first fragment without
# one (RFC 7112) would hide what it is until it is put together.
# solicit, advertise: the length says that there is one option at most, the source's or the
# target's MAC, or of who looks for duplicates a nonce (RFC 7527); a second one behind an unknown
# one would be found by the receiver only. solicit: just what a VXLAN device answers and never
# sends on (vxlan_xmit): ICMPv6 at once behind the head, of code 0.
# input: what is for the bridge itself, to be answered or to leave by the host. From there no
# agent is reached, and no VXLAN sent, with which it could speak for others on all hosts.
# Nothing of TCP is reached but by a SYN (docs/decisions/0025), so what follows is not asked of most
# packets.
# elsewhere: where our name server answers questions to others (nft.py), they count as those
# to the gateway do, once each; whoever on that bridge asks, as one may speak for another there.
# prerouting: each frame of each port passes it. Nearly all are TCP over IPv4 with the source that
# they should have, so these are through after one look into a set and one comparison. `ether type`
# sees a VLAN's tag, as the protocol that nft would ask for by itself does not. There and in
# from_icmpv6 nothing looks into an anonymous map: while the table is replaced, a frame on its way
# through the old rules may find nothing in it (kernel 6.18: of 250 replacements 4 lost one of 500
# frames a second of IPv6).
# Nobody here answers router solicitations, so they are dropped without a count: kernels send
# them by themselves.
CHAINS = """\
	chain refused {
		iifname @trusted accept
		iifname @ports drop
		drop
	}

	chain unsolicited {
		iifname @trusted accept
		drop
	}

	chain refuse_mac {
		counter name "guard_mac" goto refused
	}

	chain refuse_address {
		iifname . ether saddr != @macs goto refuse_mac
		counter name "guard_address" goto refused
	}

	chain refuse_arp {
		counter name "guard_arp" goto refused
	}

	chain refuse_neighbour {
		counter name "guard_neighbour" goto refused
	}

	chain refuse_dhcp {
		counter name "guard_dhcp" goto refused
	}

	chain refuse_router {
		counter name "guard_router" goto refused
	}

	chain refuse_protocol {
		counter name "guard_protocol" goto refused
	}

	chain from_ipv4 {
		meta l4proto tcp accept
		udp dport 68 goto refuse_dhcp
		icmp type redirect goto refuse_router
		accept
	}

	chain from_ipv6 {
		meta l4proto 58 jump from_icmpv6
		ip6 saddr :: icmpv6 type mld2-listener-report iifname . ether saddr @macs accept
		iifname . ether saddr . ip6 saddr != @addresses6 goto refuse_address
		udp dport 546 goto refuse_dhcp
		meta l4proto != 255 accept
		goto refuse_protocol
	}

	chain from_icmpv6 {
		icmpv6 type nd-neighbor-solicit goto solicit
		icmpv6 type nd-neighbor-advert goto advertise
		icmpv6 type nd-router-solicit goto unsolicited
		icmpv6 type nd-router-advert goto refuse_router
		icmpv6 type nd-redirect goto refuse_router
	}

	chain solicit {
		ip6 nexthdr != 58 goto refuse_neighbour
		icmpv6 code != 0 goto refuse_neighbour
		ip6 saddr :: ip6 length 24 iifname . ether saddr . @th,64,128 @targets accept
		ip6 saddr :: ip6 length 32 @th,192,16 0x0e01 \
iifname . ether saddr . @th,64,128 @targets accept
		iifname . ether saddr . ip6 saddr != @addresses6 goto refuse_neighbour
		ip6 length 24 accept
		ip6 length 32 @th,192,16 0x0101 iifname . @th,208,48 @links accept
		goto refuse_neighbour
	}

	chain advertise {
		iifname . ether saddr . ip6 saddr != @addresses6 goto refuse_neighbour
		iifname . ether saddr . @th,64,128 != @targets goto refuse_neighbour
		ip6 length 24 accept
		ip6 length 32 @th,192,16 0x0201 iifname . @th,208,48 @links accept
		goto refuse_neighbour
	}

	chain from_arp {
		iifname . ether saddr != @macs goto refuse_mac
		iifname . arp saddr ether . arp saddr ip @addresses4 accept
		arp saddr ip 0.0.0.0 iifname . arp saddr ether . arp daddr ip @addresses4 accept
		goto refuse_arp
	}

	chain prerouting {
		type filter hook prerouting priority -300; policy accept;
		iifname != "vxp*" accept
		ether type ip iifname . ether saddr . ip saddr @addresses4 goto from_ipv4
		ether type ip6 goto from_ipv6
		ether type arp goto from_arp
		ether type ip goto refuse_address
		goto refuse_protocol
	}

	chain refuse_flood {
		counter name "guard_gateway" drop
	}

	chain refuse_agent {
		counter name "guard_agent"
		iifname @ports drop
		drop
	}

	chain refuse_vxlan {
		counter name "guard_vxlan"
		iifname @ports drop
		drop
	}

	chain elsewhere {
		iifname . ip daddr @gateways4 return
		iifname . ip6 daddr @gateways6 return
		iifname @asking goto refuse_flood
	}

	chain input {
		type filter hook input priority 0; policy accept;
		iifname . ip daddr @gateways4 iifname @asking goto refuse_flood
		iifname . ip6 daddr @gateways6 iifname @asking goto refuse_flood
		tcp dport 53 iifname @diverted jump elsewhere
		tcp flags & syn == 0x0 accept
		udp dport 53 iifname @diverted jump elsewhere
		udp dport @carriers goto refuse_vxlan
		ip daddr . tcp dport @agents4 goto refuse_agent
		ip6 daddr . tcp dport @agents6 goto refuse_agent
	}
"""

# Only while a network here floods: what its sandboxes send to all, once it has passed the guard,
# is counted, each sandbox's for itself. Not what the VXLAN device answers or drops instead of
# sending it on: ARP and solicitations, so who is over the limit still finds others. A solicitation
# is what it takes for one (vxlan_xmit): where sandboxes may spoof, others pass the guard.
# unflooded: and advertisements to all, which tell nobody elsewhere what the rows do not.
# unasked: questions to the gateway that came to all hosts. Each host would answer them, and past
# the limit of who asks; its own has answered, under that limit.
FLOOD_CHAINS = """
	chain refuse_groups {
		counter name "guard_flood" drop
	}

	chain groups {
		type filter hook prerouting priority -299; policy accept;
		meta pkttype != { broadcast, multicast } accept
		ether type arp accept
		ip6 nexthdr 58 ip6 length >= 24 icmpv6 type nd-neighbor-solicit icmpv6 code 0 accept
		iifname @flooding goto refuse_groups
	}

	chain unflooded {
		type filter hook forward priority 0; policy accept;
		meta pkttype { broadcast, multicast } oifname "vxl*" icmpv6 type nd-neighbor-advert drop
	}

	chain unasked {
		type filter hook input priority -1; policy accept;
		iifname "vxl*" meta pkttype { broadcast, multicast } udp dport 53 drop
	}
"""

_PORT_SETS = {
    "ports": "type ifname; counter;",
    "trusted": "type ifname;",
    "macs": "type ifname . ether_addr;",
    "addresses4": "type ifname . ether_addr . ipv4_addr;",
    "addresses6": "type ifname . ether_addr . ipv6_addr;",
    # The same as numbers: what is not the source of a frame has no name in every nft.
    "targets": "typeof iifname . ether saddr . @th,64,128;",
    "links": "typeof iifname . @th,208,48;",
    "diverted": "type ifname;",
    "asking": "type ifname; limit rate over {rate}/second burst {burst} packets; counter;",
    # Each element has a limit of its own.
    "flooding": f"type ifname; limit rate over {RATE_DEFAULT}/second; counter;",
}
_BRIDGE_SETS = {
    "gateways4": "type ifname . ipv4_addr;",
    "gateways6": "type ifname . ipv6_addr;",
}

_SETS = {**_PORT_SETS, **_BRIDGE_SETS, **CLOSED_SETS}

Keys = Mapping[str, frozenset[str]]  # set -> its elements


def of_port(bridge: Bridge, port: Port) -> Keys:
    """What the rules know of a port: what it may send, which is its MAC, its addresses and the
    link-local address of that MAC, and its gateways."""
    device, mac = f'"{port.device}"', format_mac(port.mac)
    addresses = [ipaddress.ip_interface(a).ip for a in port.addresses]
    texts = {v: [format_address(a.packed) for a in addresses if a.version == v] for v in (4, 6)}
    gateways = [ipaddress.ip_interface(g).ip for g in bridge.gateways]
    local = link_local(port.mac)
    sources6 = [*(a.packed for a in addresses if a.version == 6), local]
    return {
        "ports": frozenset({device}),
        "diverted": frozenset({device} if bridge.asked else ()),
        "asking": frozenset({device}),
        "trusted": frozenset({device} if bridge.spoof else ()),
        "flooding": frozenset({_limited(device, bridge.flood_rate)} if bridge.flood_rate else ()),
        "macs": frozenset({f"{device} . {mac}"}),
        "addresses4": frozenset(f"{device} . {mac} . {text}" for text in texts[4]),
        "addresses6": frozenset(
            f"{device} . {mac} . {text}" for text in (*texts[6], format_address(local))
        ),
        "targets": frozenset(f"{device} . {mac} . {_number(a)}" for a in sources6),
        "links": frozenset({f"{device} . {_number(port.mac)}"}),
        "gateways4": _pairs(device, (g.packed for g in gateways if g.version == 4)),
        "gateways6": _pairs(device, (g.packed for g in gateways if g.version == 6)),
    }


def _limited(device: str, rate: int) -> str:
    """An element with a limit in packets a second, a tenth of a second's at once after silence."""
    burst = max(FLOOD_BURST_MIN, rate // 10)
    return f"{device} limit rate over {rate}/second burst {burst} packets counter"


def _number(data: bytes) -> str:
    return hex(int.from_bytes(data, "big"))


def _pairs(device: str, addresses: Iterable[bytes]) -> frozenset[str]:
    return frozenset(f"{device} . {format_address(address)}" for address in addresses)


def link_local(mac: bytes) -> bytes:
    """The address that an interface gives itself (RFC 4291, appendix A)."""
    interface = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return b"\xfe\x80" + bytes(6) + interface


def ruleset(
    keys: Iterable[Keys],
    rate: int = GATEWAY_RATE,
    burst: int = GATEWAY_BURST,
    floods: bool = False,
) -> Ruleset:
    """The whole table, with the elements that are given: of ports, and what is closed.

    `rate` (packets a second) and `burst` (packets) bound what a port sends to the gateway, or asks;
    with `floods` there is a port of a network that floods.
    """
    held: dict[str, dict[str, str]] = {name: {} for name in _SETS}
    for one in keys:
        for name, elements in one.items():
            held[name].update(dict.fromkeys(elements, ""))
    sets = {
        name: Elements(f"set {name} {{ {_SETS[name].format(rate=rate, burst=burst)} }}", elements)
        for name, elements in held.items()
    }
    chains = CHAINS + FLOOD_CHAINS if floods else CHAINS
    return Ruleset(sets, chains, GUARD_TABLE, tuple(COUNTER + reason for reason in REASONS))
