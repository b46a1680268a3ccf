"""The rules of our own namespace and of the host, as text for nftables. Pure.

Both tables are called `inet vxmesh`; a third one, of the bridges' ports, is guardrules.py's.
The chains hardly ever change; what does is in sets and maps, so that a new network or a published
port is a few elements and not a new ruleset. `inet vxmesh_sealed` is the host's too, never changes
at all, and is there while anything on the host is encrypted.
Each chain at a hook of the host is passed by every packet of VXLAN, and three to four of them cost
TCP through an overlay 5 %: so none is there that has nothing to decide.
What stands opposite: nftables.py loads them; tests/unit/datapath/golden/ shows them whole.
Source: nft(8).
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from agent.drivers import wireguard
from agent.drivers.base import Bridge, Closed, Forward, Port
from agent.drivers.marks import ASKED, DOOR, OPEN, PROVEN, UNTRACKED
from agent.notation import IPNetwork, format_address

TABLE, SEALED = "inet vxmesh", "inet vxmesh_sealed"
UPLINK, HOST_UPLINK = "uplink", "vxmesh0"
NOTHING_CLOSED = Closed()
NO_DOORS: Mapping[tuple[str, str], str] = {}

# Each packet of a sandbox to or from outside passes all of this, and each connection of its own has
# some ten of them; so who is nearly all that comes is let through first, no device's name is read
# twice, and what looks at connections, or for questions, is there only while it can find some.
# No connection tracking in here, but for what is balanced (balancerules.py): it would cost every
# packet and decide nothing. What comes over the uplink has passed the host's table, and a sandbox
# is known by its bridge. What was balanced from there may go into internal networks too, and what
# the host sends round to have it come in again goes straight back (entrance.py).
OWN_CHAINS = f"""\
	chain input {{
		type filter hook input priority filter; policy drop;
		iifname "lo" accept
		icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
		iifname . ip daddr @gateways4 accept
		iifname . ip6 daddr @gateways6 accept
		meta mark {hex(ASKED)} accept
	}}

	chain from_uplink {{
		oifgroup {hex(PROVEN)} accept
		oifgroup {hex(OPEN)} accept
		ct status dnat accept
		oifname "{UPLINK}" accept
	}}

	chain to_uplink {{
		iifgroup {hex(PROVEN)} accept
		iifname . ip saddr @egress4 accept
		iifname . ip6 saddr @egress6 accept
		ct status dnat ct state established accept
		ct status dnat ct direction reply accept
	}}

	chain forward {{
		type filter hook forward priority filter; policy drop;
		iifname "{UPLINK}" goto from_uplink
		oifname "{UPLINK}" goto to_uplink
		iifname . oifname @hairpin accept
		ct status dnat ct state established accept
	}}
"""

# After a service's VIP has become its backend; what is for a name server there goes there. Only
# what engines' containers ask is answered by us: others on their bridge ask whom they like.
ASKED_CHAINS = f"""
	chain questions {{
		ct status dnat accept
		iifname . ip saddr @asked4 udp dport 53 meta mark set {hex(ASKED)}
		iifname . ip saddr @asked4 tcp dport 53 meta mark set {hex(ASKED)}
		iifname . ip6 saddr @asked6 udp dport 53 meta mark set {hex(ASKED)}
		iifname . ip6 saddr @asked6 tcp dport 53 meta mark set {hex(ASKED)}
	}}

	chain asked {{
		type filter hook prerouting priority dstnat + 10; policy accept;
		th dport 53 goto questions
	}}
"""
_OF_BALANCED = re.compile(r"^\t\tct status dnat .*\n", re.MULTILINE)

# raw: VXLAN itself is not tracked: it would cost every packet a look at the host's connections,
# of which none are made by it. As it is so many packets, its addresses stand in the rules and not
# in a set, where each would be hashed; they come with the first network and stay when the last one
# goes: other rules mean that the whole table is loaded, ten times the work of its elements. What
# the host itself sends to that port is VXLAN, whoever's: no answer to it comes by that connection.
# from_inside: route_localnet on the uplink, which lets the host reach a published port at
# 127.0.0.1, must not let a sandbox reach what listens there. Nor an agent at any address of this
# host; and, though the guard of its port has looked already (guardrules.py), no other agent and
# no VXLAN: here fragments have been put together. Nothing of TCP is reached but by a SYN, so no
# other packet of it is looked at further (docs/decisions/0025).
# postrouting: a sandbox that uses a port published on its own host, its neighbour's or its
# own, gets its answers from the host only if the host is who asked.
# forward: nobody but the host itself gets into a sandbox, except through a published port.
TO_TUNNELS, FROM_TUNNELS = "# to this host's VTEP", "# from this host's VTEP"
HOST_CHAINS = f"""\
	chain from_inside {{
		ip daddr 127.0.0.0/8 drop
		tcp flags & syn == 0x0 accept
		udp dport @carriers counter name "guard_vxlan" drop
		tcp dport @agent_ports fib daddr type local counter name "guard_agent" drop
		ip daddr . tcp dport @agents4 counter name "guard_agent" drop
		ip6 daddr . tcp dport @agents6 counter name "guard_agent" drop
	}}

	chain raw {{
		type filter hook prerouting priority raw; policy accept;
		iifname "{HOST_UPLINK}" goto from_inside
		{TO_TUNNELS}
	}}

	chain raw_output {{
		type filter hook output priority raw; policy accept;
		{FROM_TUNNELS}
		meta mark {hex(UNTRACKED)} notrack
	}}

	chain published {{
		dnat ip to ip daddr . meta l4proto . th dport map @ports4_at
		fib daddr type local dnat ip to meta l4proto . th dport map @ports4
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @ports6_at
		ip6 daddr != ::1 fib daddr type local dnat ip6 to meta l4proto . th dport map @ports6
	}}

	chain doors {{
		dnat ip to ip daddr . meta l4proto . th dport map @doors4_at
		fib daddr type local dnat ip to meta l4proto . th dport map @doors4
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @doors6_at
		ip6 daddr != ::1 fib daddr type local dnat ip6 to meta l4proto . th dport map @doors6
	}}

	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		jump published
		iifname "{HOST_UPLINK}" jump doors
	}}

	chain output {{
		type nat hook output priority -100; policy accept;
		jump published
		jump doors
	}}

	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname "{HOST_UPLINK}" goto to_inside
		ip saddr @subnets4 masquerade
		ip6 saddr @subnets6 masquerade
		ip saddr {DOOR[4]} masquerade
		ip6 saddr {DOOR[6]} masquerade
	}}

	chain to_inside {{
		ip saddr 127.0.0.0/8 masquerade
		ip saddr @subnets4 ct status dnat masquerade
		ip6 saddr @subnets6 ct status dnat masquerade
	}}

	chain forward {{
		type filter hook forward priority filter; policy accept;
		oifname != "{HOST_UPLINK}" accept
		ct state established,related accept
		ct status dnat accept
		drop
	}}
"""


# What is inside WireGuard, and nothing else, comes from and goes to its devices. This holds when
# the devices or the route that says `unreachable` are gone, as that route holds when these rules
# are. In a table of its own, which is there before any device is and outlives every other rule.
# postrouting: after all that could change an address; a packet that would leave in the clear,
# and VXLAN of an encrypted network (IPv6, its own port, the I flag of RFC 7348) even if a row of
# somebody else's leads it elsewhere. The host's own processes have no business inside: skuid
# matches what has a socket in this namespace, which the VXLAN packets of sandboxes have not.
# IPv4, which none of this is about, is through at the first rule.
# prerouting: a packet from outside that claims to have been inside, or wants in.
# input: VXLAN of an encrypted network in the clear, to any address of the host. IPv6 fragments
# pass one by one; the first bears the port (RFC 7112), and without it there is no packet.
SEALED_CHAINS = """\
	chain postrouting {{
		type filter hook postrouting priority 300; policy accept;
		meta nfproto ipv4 oifname != "{all}" accept
		oifname {{ {devices} }} meta skuid 0-4294967294 drop
		oifname {{ {devices} }} accept
		ip6 daddr {prefix} drop
		meta nfproto ipv6 udp dport {port} @th,64,8 8 drop
	}}

	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		meta nfproto ipv4 iifname != "{all}" accept
		iifname {{ {devices} }} ip6 saddr {prefix} ip6 daddr {prefix} udp dport {port} accept
		iifname {{ {devices} }} drop
		ip6 daddr {prefix} drop
		ip6 saddr {prefix} drop
	}}

	chain input {{
		type filter hook input priority filter; policy accept;
		udp dport {port} iifname != {{ {devices} }} drop
	}}

	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname {{ {devices} }} drop
		oifname {{ {devices} }} drop
	}}
"""

_CHAIN = re.compile(r"^\s*chain (\S+) \{", re.MULTILINE)
FROM_UPLINK, AT_ONCE = f'iifname "{HOST_UPLINK}" jump doors', "jump doors"


@dataclass(frozen=True, slots=True)
class Elements:
    """A set or a map: its declaration, and its elements as text, key -> value ("" in a set)."""

    declaration: str  # "set" or "map", name, type and flags
    elements: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ruleset:
    """One table: what is in its sets by name, and its chains."""

    sets: Mapping[str, Elements]
    chains: str
    table: str = TABLE
    counters: tuple[str, ...] = ()
    # Sets and maps with elements of the kernel's own making, which outlive a new load.
    kept: frozenset[str] = frozenset()


def own(bridges: Iterable[Bridge], balanced: bool = True) -> Ruleset:
    """The table of our namespace; `balanced`: while anything is balanced there.

    Input: a bridge's sandboxes reach that bridge's gateways and nothing else of ours; but of
    what engines' containers ask, our name server is who answers, whoever is asked.
    Forward: never from one bridge to another; through the uplink only networks that are not
    internal, and only with a source of their own.
    """
    gateways: dict[int, set[str]] = {4: set(), 6: set()}
    egress: dict[int, set[str]] = {4: set(), 6: set()}
    asked: dict[int, set[str]] = {4: set(), 6: set()}
    hairpin = set()
    for bridge in bridges:
        name = f'"{bridge.device}"'
        hairpin.add(f"{name} . {name}")
        for address in askers(bridge.ports.values()):
            asked[address.version].add(f"{name} . {format_address(address.packed)}")
        for gateway in bridge.gateways:
            address = ipaddress.ip_interface(gateway).ip
            gateways[address.version].add(f"{name} . {address}")
        if bridge.open_subnets:
            for subnet in _collapse(bridge.open_subnets):
                egress[subnet.version].add(f"{name} . {subnet}")
    chains = OWN_CHAINS + ASKED_CHAINS if asked[4] or asked[6] else OWN_CHAINS
    return Ruleset(
        {
            "gateways4": _set("gateways4", "ifname . ipv4_addr", gateways[4]),
            "gateways6": _set("gateways6", "ifname . ipv6_addr", gateways[6]),
            "egress4": _set("egress4", "ifname . ipv4_addr; flags interval", egress[4]),
            "egress6": _set("egress6", "ifname . ipv6_addr; flags interval", egress[6]),
            "hairpin": _set("hairpin", "ifname . ifname", hairpin),
            "asked4": _set("asked4", "ifname . ipv4_addr", asked[4]),
            "asked6": _set("asked6", "ifname . ipv6_addr", asked[6]),
        },
        chains if balanced else _OF_BALANCED.sub("", chains),
    )


def asks(ruleset: Ruleset) -> bool:
    """Whether anybody is there, in the table of our namespace, whose questions we answer."""
    return any(ruleset.sets[name].elements for name in ("asked4", "asked6"))


def askers(ports: Iterable[Port]) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses of those of these ports that engines' containers have."""
    return {_address_of(text) for port in ports if port.is_handed_out for text in port.addresses}


@functools.lru_cache(maxsize=4096)  # all are looked at anew with each container that comes
def _address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_interface(text).ip


def host(
    bridges: Iterable[Bridge],
    forwards: Iterable[Forward],
    closed: Closed = NOTHING_CLOSED,
    doors: Mapping[tuple[str, str], str] = NO_DOORS,
    at_once: bool = False,
    tunnels: Collection[tuple[str, int]] = (),
) -> Ruleset:
    """The table of the host: masquerade, published ports, and who may not come in.

    A forward to an address in no network that is open to the host is left out: its packets
    would follow the host's default route. Of two for one port the first holds. `doors` are the
    published ports of services: (map, key) -> value; with `at_once` whoever comes is led there
    before the host's input chains are asked (entrance.py). `tunnels` are VTEP and port of the
    VXLAN that there was last, in case that there is none.
    """
    bridges = list(bridges)
    subnets = list(_collapse(s for b in bridges for s in b.open_subnets))
    maps: dict[str, dict[str, str]] = {"ports4": {}, "ports6": {}, "ports4_at": {}, "ports6_at": {}}
    for forward in forwards:
        address, publish = ipaddress.ip_address(forward.address), forward.publish
        if not any(address in subnet for subnet in subnets):
            continue
        key = f"{publish.protocol} . {publish.host_port}"
        name = f"ports{address.version}"
        if publish.host_address and not ipaddress.ip_address(publish.host_address).is_unspecified:
            name, key = f"{name}_at", f"{publish.host_address} . {key}"
        maps[name].setdefault(key, f"{address} . {publish.target_port}")
    maps |= {f"doors{end}": {} for end in ("4", "6", "4_at", "6_at")}
    for (name, key), value in doors.items():
        maps[name][key] = value
    by_version = {v: {str(s) for s in subnets if s.version == v} for v in (4, 6)}
    sets = {
        "subnets4": _set("subnets4", "ipv4_addr; flags interval", by_version[4]),
        "subnets6": _set("subnets6", "ipv6_addr; flags interval", by_version[6]),
    }
    for name, elements in maps.items():
        kind = f"ipv{name.removesuffix('_at')[-1]}_addr"
        at = f"{kind} . " if name.endswith("_at") else ""
        types = f"{at}inet_proto . inet_service : {kind} . inet_service"
        sets[name] = Elements(f"map {name} {{ type {types}; }}", elements)
    sets["agent_ports"] = _set("agent_ports", "inet_service", {str(port) for port in closed.own})
    for name, keys in closed_elements(closed).items():
        sets[name] = Elements(f"set {name} {{ {CLOSED_SETS[name]} }}", dict.fromkeys(keys, ""))
    chains = HOST_CHAINS.replace(FROM_UPLINK, AT_ONCE) if at_once else HOST_CHAINS
    ends = sorted(tunnels_of(bridges) or tunnels)
    arriving = [f"{_to(vtep)} {_untracked(port)}" for vtep, port in ends]
    leaving = [_untracked(port) for port in sorted({port for _, port in ends})]
    for place, rules in ((TO_TUNNELS, arriving), (FROM_TUNNELS, leaving)):
        chains = chains.replace(f"\t\t{place}\n", "".join(f"\t\t{rule}\n" for rule in rules))
    return Ruleset(sets, chains, counters=("guard_agent", "guard_vxlan"))


def tunnels_of(bridges: Iterable[Bridge]) -> set[tuple[str, int]]:
    """VTEP and port of the VXLAN of these networks."""
    return {(b.vtep, b.data_port) for b in bridges if b.vtep}


def _to(vtep: str) -> str:
    """What a packet to a VTEP is known by."""
    address = ipaddress.ip_address(vtep)
    return f"{'ip' if address.version == 4 else 'ip6'} daddr {address}"


def _untracked(port: int) -> str:
    """What is done with VXLAN."""
    return f"udp dport {port} notrack accept"


CLOSED_SETS = {
    "carriers": "type inet_service;",
    "agents4": "type ipv4_addr . inet_service;",
    "agents6": "type ipv6_addr . inet_service;",
}


def closed_elements(closed: Closed) -> dict[str, frozenset[str]]:
    """What is closed everywhere, as elements of CLOSED_SETS."""
    agents: dict[int, set[str]] = {4: set(), 6: set()}
    for text, port in closed.agents:
        address = ipaddress.ip_address(text)
        agents[address.version].add(f"{format_address(address.packed)} . {port}")
    return {
        "carriers": frozenset(str(port) for port in closed.carriers),
        "agents4": frozenset(agents[4]),
        "agents6": frozenset(agents[6]),
    }


def sealed(port: int) -> Ruleset:
    """The host's table that keeps the inside of WireGuard inside; `port` is VXLAN's in there."""
    devices = ", ".join(f'"{name}"' for name in wireguard.DEVICES)
    chains = SEALED_CHAINS.format(
        devices=devices, all=wireguard.DEVICES_MATCH, prefix=wireguard.PREFIX, port=port
    )
    return Ruleset({}, chains, SEALED)


def render(ruleset: Ruleset) -> str:
    """The whole table as one transaction that replaces whatever was there."""
    table = ruleset.table
    lines = [f"table {table}", f"delete table {table}", f"table {table} {{"]
    lines += [f"\tcounter {name} {{ }}" for name in ruleset.counters]
    lines += [f"\t{s.declaration}" for s in ruleset.sets.values()]
    lines += ["", ruleset.chains.rstrip("\n"), "}", *_fill(ruleset)]
    return "\n".join(lines) + "\n"


def renew(ruleset: Ruleset, chains: Set[str], sets: Set[str]) -> str:
    """The same for a table that is there, with these chains and sets: what is kept stays."""
    table = ruleset.table
    ours = set(_CHAIN.findall(ruleset.chains))
    lines = [f"flush table {table}"]
    lines += [f"delete set {table} {name}" for name in sorted(sets - ruleset.kept)]
    lines += [f"delete chain {table} {name}" for name in sorted(chains - ours)]
    lines += [f"table {table} {{"]
    lines += [f"\t{s.declaration}" for s in ruleset.sets.values()]
    lines += ["", ruleset.chains.rstrip("\n"), "}", *_fill(ruleset)]
    return "\n".join(lines) + "\n"


def _fill(ruleset: Ruleset) -> Iterator[str]:
    for name, elements in ruleset.sets.items():
        yield from change("add", ruleset.table, name, elements.elements)


def delta(old: Ruleset, new: Ruleset) -> str:
    """One transaction that makes the sets of `old` those of `new`; empty if they are the same."""
    lines: list[str] = []
    for name, after in new.sets.items():
        before = old.sets[name].elements
        if before is after.elements:
            continue
        gone = {k: v for k, v in before.items() if after.elements.get(k) != v}
        come = {k: v for k, v in after.elements.items() if before.get(k) != v}
        lines += change("delete", new.table, name, gone) + change("add", new.table, name, come)
    return "".join(f"{line}\n" for line in lines)


def change(verb: str, table: str, name: str, elements: Mapping[str, str]) -> list[str]:
    """The command that adds elements to a set or map, or deletes them; none for no element."""
    if not elements:
        return []
    inside = ", ".join(f"{k} : {v}" if v else k for k, v in sorted(elements.items()))
    return [f"{verb} element {table} {name} {{ {inside} }}"]


def _set(name: str, type_: str, elements: set[str]) -> Elements:
    return Elements(f"set {name} {{ type {type_}; }}", dict.fromkeys(elements, ""))


def _collapse(subnets: Iterable[str]) -> list[IPNetwork]:
    """The subnets without overlaps, which a set of intervals would refuse."""
    parsed = [ipaddress.ip_network(s) for s in subnets]
    return [
        *ipaddress.collapse_addresses(n for n in parsed if isinstance(n, ipaddress.IPv4Network)),
        *ipaddress.collapse_addresses(n for n in parsed if isinstance(n, ipaddress.IPv6Network)),
    ]
