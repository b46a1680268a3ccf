"""The rules by which a client stays with its backend for a time, as text for nftables. Pure.

A backend is known by a token, a number that is its own within its frontend. The kernel keeps
itself, for each client of a frontend, the token of its backend, until the time-out after its
last new connection. A client that is known goes to the backend with its token, if that one may
take connections (it is in `members`); else it is forgotten. Who is not known gets a token by its
address (`sticky`). When there is no room for another client, it gets that each time.
What stands opposite: balancerules.py, whose table this is part of; drivers/balancing.py.
Source: nft(8), "set statement", jhash.

nft 1.0.6, which is Debian 12's, ends its process at a set statement with a key of more than 16
bytes (netlink_linearize.c), and when it is to list a set with `typeof jhash`. So over IPv6 the
key is two hashes, of 32 bits each and with different seeds, of what over IPv4 it is itself: who
shares both with another client shares its backend. And it takes no `dnat` to a map that is there
already if that has a `typeof` of several protocols.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent.drivers.balancing import STICKY_SIZES

CLIENTS_MOST = 65_536  # for each family, on a host: a full map takes some 7 MiB
SPANS_MAX = 64  # time-outs in force on a host; services beyond have the hash alone
STATELESS = 1  # ms; stands for those, as no time-out is that short
KEPT = frozenset({"clients4", "clients6"})

KEY = {4: "ip daddr . meta l4proto . th dport", 6: "ip6 daddr . meta l4proto . th dport"}
_HASH = "jhash ip6 saddr . ip6 daddr . meta l4proto . th dport mod 4294967295 seed {}"
_CLIENT = {4: f"ip saddr . {KEY[4]}", 6: f"{_HASH.format('0x76')} . {_HASH.format('0x786d')}"}
_NUMBER = "numgen random mod 4294967295"  # only for its type: any 32 bits
_TYPES = {
    "sticky": "type {a} . inet_proto . inet_service . mark : mark;",
    "members": "type {a} . inet_proto . inet_service . mark : {a} . inet_service;",
    "clients4": "type {a} . {a} . inet_proto . inet_service : mark;",
    "clients6": f"typeof {_NUMBER} . {_NUMBER} : meta mark;",
}
SETS = ("sticky", "members", "clients")  # each for both versions

# The mark is the packet's, and only that of a connection's first one, which alone comes here; it is
# taken off on the way out (chain `hairpin`). An entry's token cannot be changed, so who goes to
# another backend is forgotten first.
_RULES = """\
		meta mark set {client} map @clients{v} \
update @clients{v} {{ {client} timeout {span} : meta mark }} \
dnat {ip} to {key} . meta mark map @members{v}
		meta mark != 0 delete @clients{v} {{ {client} : meta mark }}
		meta mark set jhash {ip} saddr mod {size} seed 0x76
		meta mark set {key} . meta mark map @sticky{v}
		update @clients{v} {{ {client} timeout {span} : meta mark }}
		dnat {ip} to {key} . meta mark map @members{v}
"""

# Who goes by the hash alone.
_STATELESS_RULES = """\
		meta mark set jhash {ip} saddr mod {size} seed 0x76
		meta mark set {key} . meta mark map @sticky{v}
		dnat {ip} to {key} . meta mark map @members{v}
"""


def declaration(name: str, version: int) -> str:
    """That of one of SETS."""
    full = f"{name}{version}"
    types = _TYPES.get(name) or _TYPES[full]
    limits = f" size {CLIENTS_MOST}; flags dynamic,timeout;" if full in KEPT else ""
    return f"map {full} {{ {types.format(a=f'ipv{version}_addr')}{limits} }}"


def span(seconds: float) -> int:
    """A time-out in ms, of whole seconds: each one in use has chains of its own."""
    return 1000 * max(1, round(seconds))


def chain(slots: int, milliseconds: int) -> str:
    """The name of the chain for a frontend with that many slots and that time-out."""
    return f"sticky_{slots}_{milliseconds}"


def chains(spans: Iterable[int]) -> str:
    """The chains for frontends with these time-outs, in ms."""
    found = []
    for milliseconds in sorted(spans):
        for size in STICKY_SIZES:
            rules = "".join(
                (_STATELESS_RULES if milliseconds == STATELESS else _RULES).format(
                    v=version,
                    ip=ip,
                    key=KEY[version],
                    client=_CLIENT[version],
                    size=size,
                    span=_time(milliseconds),
                )
                for version, ip in ((4, "ip"), (6, "ip6"))
            )
            found.append(f"\n\tchain {chain(size, milliseconds)} {{\n{rules}\t}}\n")
    return "".join(found)


def _time(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds}s" * (seconds > 0) + f"{rest}ms" * (rest > 0)
