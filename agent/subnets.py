"""Choosing and checking subnets against other networks and the hosts' own routes.

What stands opposite: node.py, which knows what is taken.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence

from agent.errors import Conflict, Exhausted
from agent.notation import find_overlap, parse_subnet

# 10.64.0.0 to 10.127.255.255 in parts of 4,094 hosts: away from where Docker (172.17.0.0/16 and
# up, Swarm 10.0.0.0/24 and up), Kubernetes (10.96.0.0/12 lies inside, but never beside us on a
# host without its route being seen) and homes (192.168.0.0/16) begin.
POOL = ipaddress.ip_network("10.64.0.0/10")
POOL_PREFIX = 20

Taken = Iterable[tuple[str, str]]


def check_subnets(subnets: Sequence[str], taken: Taken) -> None:
    """Conflict if one of `subnets` overlaps what is taken: (name, CIDR) pairs."""
    taken = list(taken)
    for text in subnets:
        clash = find_overlap(parse_subnet(text), taken)
        if clash:
            raise Conflict(
                f"subnet {text}",
                f"overlaps {clash[1]}, {clash[0]}",
                "Choose another, or leave --subnet out to have a free one chosen",
            )


def choose_subnets(id: str, ipv4: bool, ipv6: bool, taken: Taken) -> tuple[str, ...]:
    """With `ipv4` a free subnet of the pool, with `ipv6` a unique local one (RFC 4193).

    A unique local one has 56 bits of a digest of the network's id, so that hardly two networks
    have the same. Conflict if it is taken all the same; Exhausted if the pool is full.
    """
    taken = list(taken)
    chosen = [str(_free_of_pool(id, taken))] if ipv4 else []
    if ipv6:
        unique = hashlib.blake2s(id.encode(), digest_size=7).digest()
        local = str(ipaddress.IPv6Network((b"\xfd" + unique + bytes(8), 64)))
        check_subnets([local], taken)
        chosen.append(local)
    return tuple(chosen)


def _free_of_pool(id: str, taken: Taken) -> ipaddress.IPv4Network:
    """A free IPv4 subnet; the search starts where the network's id says, so that two nodes that
    cannot see each other are unlikely to choose the same one."""
    count = 1 << (POOL_PREFIX - POOL.prefixlen)
    size = 1 << (32 - POOL_PREFIX)
    first = int(id, 16) % count
    for step in range(count):
        base = int(POOL.network_address) + (first + step) % count * size
        subnet = ipaddress.IPv4Network((base, POOL_PREFIX))
        if not find_overlap(subnet, taken):
            return subnet
    raise Exhausted(
        f"the address pool {POOL}",
        "has no free subnet",
        "Give one with --subnet, or remove networks that nobody uses",
    )


def first_gateway(subnet: str, given: Sequence[str]) -> str:
    """The gateway given for `subnet`, else its first address."""
    net = ipaddress.ip_network(subnet)
    for text in given:
        if ipaddress.ip_address(text) in net:
            return text
    return str(net.network_address + 1)
