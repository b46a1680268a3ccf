"""The rules that balance services in our namespace, as text for nftables. Pure.

A packet to a VIP, or to a door (the port of our uplink to which the host leads a published
one), is given one of the service's slots by chance, or by its client's address, and goes on to
the backend that the slot leads to. Its source stays as it is. The chains never change; a
frontend is elements of maps, and what one backend costs is its own slots.
Only these packets, and the answers to them, are tracked.
What stands opposite: balancer.py loads it; tests/unit/datapath/golden/ shows it whole;
replies.py brings the answers back here.
Source: nft(8), numgen and jhash; kernel ip-sysctl.rst.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.datapath.nft import DOOR, UNTRACKED, UPLINK, Elements, Ruleset
from agent.drivers.balancing import SPREAD_SIZES, STICKY_SIZES, Frontend
from agent.model import format_address

BALANCE_TABLE = "inet vxmesh_balance"
# raw: errors about a balanced connection may come from any router on the way.
# raw_output: that client and backend are on one link is no reason to have them talk directly; IPv4
# is told so by a sysctl.
# stray: what is in the middle of a connection that nobody knows (any more) is refused, so that
# whoever waits for an answer to it waits no longer. Tracking is told to be liberal
# (TRACKING), so what it calls invalid is no part of any connection.
# refuse: what is still for a VIP or a door after `balance` has no backend, or no such port.
# hairpin: a backend that reaches itself would answer itself; it sees the VIP instead. And one that
# is in a node's own stack, reached from outside by a published port, would answer the client
# itself, who knows nothing of it; it sees this host instead.
# echo: a VIP answers ping while it is there at all, as people expect of an address.
CHAINS = f"""\
	chain raw {{
		type filter hook prerouting priority raw; policy accept;
		ip daddr @vips4 accept
		ip6 daddr @vips6 accept
		iifname "{UPLINK}" ip daddr {DOOR[4]} accept
		iifname "{UPLINK}" ip6 daddr {DOOR[6]} accept
		ip saddr . meta l4proto . th sport @backends4 accept
		ip6 saddr . meta l4proto . th sport @backends6 accept
		icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} accept
		icmpv6 type {{ destination-unreachable, packet-too-big, time-exceeded, \
parameter-problem }} accept
		notrack
	}}

	chain raw_output {{
		type filter hook output priority raw; policy accept;
		meta mark {hex(UNTRACKED)} notrack
		icmpv6 type nd-redirect drop
	}}

	chain mangle {{
		type filter hook prerouting priority mangle; policy accept;
		ct state established,related accept
		ip daddr @vips4 jump stray
		ip6 daddr @vips6 jump stray
		iifname "{UPLINK}" ip daddr {DOOR[4]} jump stray
		iifname "{UPLINK}" ip6 daddr {DOOR[6]} jump stray
	}}

	chain stray {{
		ct state invalid drop
		tcp flags & (fin | syn | rst | ack) != syn ct state new reject with tcp reset
	}}

	chain balance {{
		type nat hook prerouting priority dstnat; policy accept;
		ip daddr . meta l4proto . th dport vmap @services4
		ip6 daddr . meta l4proto . th dport vmap @services6
		ip daddr @vips4 icmp type echo-request redirect
		ip6 daddr @vips6 icmpv6 type echo-request redirect
	}}

	chain hairpin {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr . ip daddr @selves4 ct status dnat snat ip to ct original ip daddr
		ip6 saddr . ip6 daddr @selves6 ct status dnat snat ip6 to ct original ip6 daddr
		oifname "{UPLINK}" ct original ip daddr {DOOR[4]} ct status dnat snat ip to {DOOR[4]}
		oifname "{UPLINK}" ct original ip6 daddr {DOOR[6]} ct status dnat snat ip6 to {DOOR[6]}
	}}

	chain forward {{
		type filter hook forward priority filter - 1; policy accept;
		ct status dnat accept
		ip daddr @vips4 goto refuse
		ip6 daddr @vips6 goto refuse
	}}

	chain input {{
		type filter hook input priority filter - 1; policy accept;
		iifname "{UPLINK}" ip daddr {DOOR[4]} goto refuse
		iifname "{UPLINK}" ip6 daddr {DOOR[6]} goto refuse
	}}

	chain refuse {{
		ip daddr . meta l4proto . th dport @silent4 drop
		ip6 daddr . meta l4proto . th dport @silent6 drop
		meta l4proto tcp reject with tcp reset
		meta l4proto udp reject with icmpx port-unreachable
	}}
"""

# Not by turns (numgen inc): one counter serves all services, so a client that asks two of them
# in turn would find the same half of each one's backends for ever.
_KEY = {4: "ip daddr . meta l4proto . th dport", 6: "ip6 daddr . meta l4proto . th dport"}
_CHOICE = {
    "spread": {4: "numgen random mod {size}", 6: "numgen random mod {size}"},
    "sticky": {4: "jhash ip saddr mod {size} seed 0x76", 6: "jhash ip6 saddr mod {size} seed 0x76"},
}
_ENTRIES = ("silent", "services", "slots")  # what each address and port of a service has
_SETS = {
    "vips": "set {name} {{ type {address}; }}",
    "backends": "set {name} {{ type {address} . inet_proto . inet_service; }}",
    "selves": "set {name} {{ type {address} . {address}; }}",
    "silent": "set {name} {{ type {address} . inet_proto . inet_service; }}",
    "services": "map {name} {{ type {address} . inet_proto . inet_service : verdict; }}",
    "slots": "map {name} {{ typeof {ip} daddr . meta l4proto . th dport . numgen random mod 65536 "
    ": {ip} daddr . th dport; }}",
}

Claims = Mapping[str, Mapping[str, str]]  # set or map -> key -> value, "" in a set

# Of our namespace, once there are rules that track: for what is balanced there it is enough to
# know which connection a packet belongs to; what it may say is its ends' affair.
TRACKING = {"netfilter/nf_conntrack_tcp_be_liberal": "1"}


def _chains() -> str:
    chains = [CHAINS]
    for kind, sizes in (("spread", SPREAD_SIZES), ("sticky", STICKY_SIZES)):
        for size in sizes:
            rules = "".join(
                f"\t\tdnat {ip} to {_KEY[v]} . {_CHOICE[kind][v].format(size=size)} map @slots{v}\n"
                for v, ip in ((4, "ip"), (6, "ip6"))
            )
            chains.append(f"\n\tchain {kind}_{size} {{\n{rules}\t}}\n")
    return "".join(chains)


def ruleset(claims: Iterable[Claims]) -> Ruleset:
    """The whole table, with the elements that are given."""
    sets: dict[str, Elements] = {}
    for version, ip in ((4, "ip"), (6, "ip6")):
        for name, declaration in _SETS.items():
            full = f"{name}{version}"
            text = declaration.format(name=full, ip=ip, address=f"ipv{version}_addr")
            sets[full] = Elements(text, {})
    for one in claims:
        for name, elements in one.items():
            held = sets[name].elements
            assert isinstance(held, dict)
            held.update(elements)
    # A verdict's chain must be there before the element that leads to it.
    return Ruleset(sets, _chains(), BALANCE_TABLE)


@dataclass(frozen=True, slots=True)
class Placed:
    """A frontend, and what this host adds to it."""

    frontend: Frontend
    slots: tuple[str, ...]  # see drivers.balancing.assign
    doors: tuple[int, ...] = ()  # the ports of our uplink that lead to it
    local: frozenset[str] = frozenset()  # those of its backends that are on this host


def claims(placed: Placed) -> Claims:
    """What a frontend has in the sets and maps."""
    frontend = placed.frontend
    version, protocol = frontend.version, frontend.protocol
    found: dict[str, dict[str, str]] = {
        f"{name}{version}": {} for name in ("vips", "backends", "selves", *_ENTRIES)
    }
    targets = {}
    for backend in frontend.backends:
        address = format_address(backend.address)
        targets[backend.key] = f"{address} . {backend.port}"
        found[f"backends{version}"][f"{address} . {protocol} . {backend.port}"] = ""
        if backend.key in placed.local:
            found[f"selves{version}"][f"{address} . {address}"] = ""
    entries = [(DOOR[version], door) for door in placed.doors]
    if frontend.address:
        vip = format_address(frontend.address)
        found[f"vips{version}"][vip] = ""
        entries.append((vip, frontend.port))
    for address, port in entries:
        key = f"{address} . {protocol} . {port}"
        if placed.slots:
            kind = "sticky" if frontend.affinity else "spread"
            found[f"services{version}"][key] = f"goto {kind}_{len(placed.slots)}"
            slots = found[f"slots{version}"]
            for slot, backend_key in enumerate(placed.slots):
                slots[f"{key} . {slot}"] = targets[backend_key]
        elif not frontend.refuse:
            found[f"silent{version}"][key] = ""
    return found


def doors(published: Mapping[tuple[int, bytes, str, int], int]) -> dict[tuple[str, str], str]:
    """Elements of the host's maps of published ports (nft.py): (map, key) -> value.

    `published` is (IP version, host address or b"", protocol, host port) -> door.
    """
    found = {}
    for (version, address, protocol, port), door in published.items():
        name, key = f"doors{version}", f"{protocol} . {port}"
        if address and not ipaddress.ip_address(address).is_unspecified:
            name, key = f"{name}_at", f"{format_address(address)} . {key}"
        found[name, key] = f"{DOOR[version]} . {door}"
    return found
