"""The short way in: from the uplink straight onto the bridge of a network. Pure.

What comes to us over the uplink has passed the host's rules. If it is for a sandbox of an open
network of this node alone, ours ask nothing more: they would send it on to its bridge. So it is
sent there where it comes in, before there is any hook, any search for a route and any tracking,
which is a twentieth of its whole way from the host into the sandbox (docs/decisions/0022).

    host ... vxmesh0 === uplink - `arriving` - bridge - sandbox

Not into an overlay, where there may be services, and answers come this way that are to be
translated back; not where packets could be too large for the bridge, which the sender would have
to be told; and no packet whose time is up. Not to the gateway, nor to a subnet's first and last
address, which are no sandbox's. A device is known by its index: one that was made anew is not
found, and what is not found here takes the long way.
What stands opposite: nft.py has the long way; applier.py loads both.
Source: nft(8), fwd; Linux net/netfilter/nft_fwd_netdev.c.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Iterator

from agent.datapath.nft import UPLINK, Elements, Ruleset
from agent.drivers.base import Bridge

TABLE = "netdev vxmesh"
_CHAINS = f"""\
	chain arriving {{
		type filter hook ingress device "{UPLINK}" priority 0; policy accept;
		ip ttl > 1 fwd ip to ip daddr device ip daddr map @ways4
		ip6 hoplimit > 1 fwd ip6 to ip6 daddr device ip6 daddr map @ways6
	}}
"""


def ruleset(networks: Iterable[tuple[Bridge, int]], mtu: int) -> Ruleset:
    """The table for these bridges and their indexes; `mtu` is the uplink's, in bytes.

    Without a way there is no chain."""
    ways: dict[int, dict[str, str]] = {4: {}, 6: {}}
    for bridge, index in networks:
        if bridge.vxlan or bridge.mtu < mtu:
            continue
        for subnet in bridge.open_subnets:
            version = ipaddress.ip_network(subnet).version
            ways[version].update((text, str(index)) for text in _ranges(subnet, bridge.gateways))
    sets = {
        name: Elements(
            f"map {name} {{ type {kind} : iface_index; flags interval; }}", ways[version]
        )
        for name, kind, version in (("ways4", "ipv4_addr", 4), ("ways6", "ipv6_addr", 6))
    }
    return Ruleset(sets, _CHAINS if any(ways.values()) else "", TABLE)


def _ranges(subnet: str, gateways: Iterable[str]) -> Iterator[str]:
    """The addresses between a subnet's first, its last and its gateways, as intervals."""
    network = ipaddress.ip_network(subnet)
    first, last = int(network.network_address), int(network.broadcast_address)
    found = {int(ipaddress.ip_interface(gateway).ip) for gateway in gateways}
    bounds = [first, *sorted(n for n in found if first < n < last), last]
    make = type(network.network_address)
    for below, above in itertools.pairwise(bounds):
        low, high = below + 1, above - 1
        if low < high:
            yield f"{make(low)}-{make(high)}"
        elif low == high:
            yield str(make(low))
