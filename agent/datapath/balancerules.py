"""The rules that balance services in our namespace, as text for nftables. Pure.

A packet to a VIP, or to a door (the port of our uplink to which the host leads a published
one), is given one of the service's slots by chance, or by its client's address, and goes on to
the backend that the slot leads to; with affinity, to that which its client had
(affinityrules.py). Its source stays as it is. The chains never change, but for some that come
with a new time-out of affinity; a frontend is elements of maps, and what one backend costs is its
own slots.
Only these packets, and the answers to them, are tracked.
What stands opposite: balancer.py loads it; tests/unit/datapath/golden/ shows it whole;
replies.py brings the answers back here.
Source: nft(8), numgen and jhash; kernel ip-sysctl.rst.
"""

from __future__ import annotations

import ipaddress
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.datapath import affinityrules
from agent.datapath.affinityrules import KEY
from agent.datapath.nft import UPLINK, Elements, Ruleset
from agent.drivers.balancing import SPREAD_SIZES, Frontend, eligible, tokens
from agent.drivers.marks import DOOR, UNTRACKED
from agent.notation import format_address

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
# itself, who knows nothing of it; it sees this host instead: such backends (`outside`), and no
# other address, as what comes from us the host lets out under its own. A mark that led to a backend
# (affinityrules.py) means nothing to what comes after.
# counted: connections by service, which the mark tells, and backend. Chains for nat see the first
# packet of a connection only, so that is what it costs.
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
		ct state established,related,untracked accept
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
		ct mark set ip daddr . meta l4proto . th dport map @marks4
		ct mark set ip6 daddr . meta l4proto . th dport map @marks6
		ip daddr . meta l4proto . th dport vmap @services4
		ip6 daddr . meta l4proto . th dport vmap @services6
		ip daddr @vips4 icmp type echo-request redirect
		ip6 daddr @vips6 icmpv6 type echo-request redirect
	}}

	chain hairpin {{
		type nat hook postrouting priority srcnat; policy accept;
		ct status dnat ct mark . ip daddr @counted4
		ct status dnat ct mark . ip6 daddr @counted6
		meta mark set 0
		ip saddr . ip daddr @selves4 ct status dnat snat ip to ct original ip daddr
		ip6 saddr . ip6 daddr @selves6 ct status dnat snat ip6 to ct original ip6 daddr
		oifname "{UPLINK}" ip daddr . meta l4proto . th dport @outside4 \
ct original ip daddr {DOOR[4]} ct status dnat snat ip to {DOOR[4]}
		oifname "{UPLINK}" ip6 daddr . meta l4proto . th dport @outside6 \
ct original ip6 daddr {DOOR[6]} ct status dnat snat ip6 to {DOOR[6]}
	}}

	chain forward {{
		type filter hook forward priority filter - 1; policy accept;
		ct state untracked accept
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
_ENTRIES = (
    "silent",
    "marks",
    "services",
    "slots",
    "sticky",
    "members",
)  # what each address and port of a service has
_SETS = {
    "vips": "set {name} {{ type {address}; }}",
    "backends": "set {name} {{ type {address} . inet_proto . inet_service; }}",
    "selves": "set {name} {{ type {address} . {address}; }}",
    "outside": "set {name} {{ type {address} . inet_proto . inet_service; }}",
    "silent": "set {name} {{ type {address} . inet_proto . inet_service; }}",
    "marks": "map {name} {{ type {address} . inet_proto . inet_service : mark; }}",
    "counted": "set {name} {{ type mark . {address}; counter; }}",
    "services": "map {name} {{ type {address} . inet_proto . inet_service : verdict; }}",
    "slots": "map {name} {{ typeof {key} . numgen random mod 65536 : {ip} daddr . th dport; }}",
}

Claims = Mapping[str, Mapping[str, str]]  # set or map -> key -> value, "" in a set

# Of our namespace, once there are rules that track: for what is balanced there it is enough to
# know which connection a packet belongs to; what it may say is its ends' affair. One that was reset
# is forgotten after 1 s, when nothing of it is under way any more, and not after 10: a client that
# takes its port again by then is led to the same backend, which may be one that was killed.
TRACKING = {
    "netfilter/nf_conntrack_tcp_be_liberal": "1",
    "netfilter/nf_conntrack_tcp_timeout_close": "1",
}


def _chains(spans: Iterable[int]) -> str:
    chains = [CHAINS]
    for size in SPREAD_SIZES:
        rules = "".join(
            f"\t\tdnat {ip} to {KEY[v]} . numgen random mod {size} map @slots{v}\n"
            for v, ip in ((4, "ip"), (6, "ip6"))
        )
        chains.append(f"\n\tchain spread_{size} {{\n{rules}\t}}\n")
    return "".join(chains) + affinityrules.chains(spans)


def ruleset(claims: Iterable[Claims], spans: Iterable[int] = ()) -> Ruleset:
    """The whole table, with the elements that are given.

    `spans` are the time-outs of affinity, in ms, that frontends have.
    """
    sets: dict[str, Elements] = {}
    for version, ip in ((4, "ip"), (6, "ip6")):
        for name, declaration in _SETS.items():
            full = f"{name}{version}"
            address = f"ipv{version}_addr"
            text = declaration.format(name=full, ip=ip, address=address, key=KEY[version])
            sets[full] = Elements(text, {})
        for name in affinityrules.SETS:
            sets[f"{name}{version}"] = Elements(affinityrules.declaration(name, version), {})
    for one in claims:
        for name, elements in one.items():
            held = sets[name].elements
            assert isinstance(held, dict)
            held.update(elements)
    # A verdict's chain must be there before the element that leads to it.
    return Ruleset(sets, _chains(spans), BALANCE_TABLE, kept=affinityrules.KEPT)


@dataclass(frozen=True, slots=True)
class Placed:
    """A frontend, and what this host adds to it."""

    frontend: Frontend
    slots: tuple[str, ...]  # see drivers.balancing.assign
    doors: tuple[int, ...] = ()  # the ports of our uplink that lead to it
    local: frozenset[str] = frozenset()  # those of its backends that are on this host
    stateless: bool = False  # there was no room for its time-out of affinity

    @property
    def span(self) -> int:
        """The time-out of its affinity, in ms; 0: none."""
        if self.stateless:
            return affinityrules.STATELESS
        return affinityrules.span(self.frontend.affinity) if self.frontend.affinity else 0


def claims(placed: Placed) -> Claims:
    """What a frontend has in the sets and maps."""
    frontend = placed.frontend
    version, protocol = frontend.version, frontend.protocol
    found: dict[str, dict[str, str]] = {
        f"{name}{version}": {}
        for name in ("vips", "backends", "selves", "outside", "counted", *_ENTRIES)
    }
    targets = {}
    for backend in frontend.backends:
        address = format_address(backend.address)
        targets[backend.key] = f"{address} . {backend.port}"
        found[f"backends{version}"][f"{address} . {protocol} . {backend.port}"] = ""
        found[f"counted{version}"][counted(frontend.service, backend.address)] = ""
        if backend.outside:
            found[f"outside{version}"][f"{address} . {protocol} . {backend.port}"] = ""
        if backend.key in placed.local:
            found[f"selves{version}"][f"{address} . {address}"] = ""
    entries = [(DOOR[version], door) for door in placed.doors]
    if frontend.address:
        vip = format_address(frontend.address)
        found[f"vips{version}"][vip] = ""
        entries.append((vip, frontend.port))
    for address, port in entries:
        key = f"{address} . {protocol} . {port}"
        found[f"marks{version}"][key] = _mark(frontend.service)
        size = len(placed.slots)
        if placed.span and size:
            found[f"services{version}"][key] = f"goto {affinityrules.chain(size, placed.span)}"
            marks = {k: f"0x{token:08x}" for k, token in tokens(frontend.backends).items()}
            for slot, backend_key in enumerate(placed.slots):
                found[f"sticky{version}"][f"{key} . 0x{slot:08x}"] = marks[backend_key]
            for backend in eligible(frontend, placed.local):
                member = f"{key} . {marks[backend.key]}"
                found[f"members{version}"][member] = targets[backend.key]
        elif size:
            found[f"services{version}"][key] = f"goto spread_{size}"
            for slot, backend_key in enumerate(placed.slots):
                found[f"slots{version}"][f"{key} . {slot}"] = targets[backend_key]
        elif not frontend.refuse:
            found[f"silent{version}"][key] = ""
    return found


def counted(service: str, backend: bytes) -> str:
    """The element that counts what a service (id) leads to a backend's address."""
    return f"{_mark(service)} . {format_address(backend)}"


def _mark(service: str) -> str:
    """Its connections' mark, in our namespace. Two services have the same one by a chance of one
    to 2^32; then what both lead to one backend is counted for both."""
    return f"0x{zlib.crc32(service.encode()):08x}"


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
