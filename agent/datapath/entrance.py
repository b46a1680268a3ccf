"""How the host's firewall has its say about published ports of services. Pure.

What is led elsewhere before the host looks whom it is for never comes by its input chains, and
there is where most people say who may come in. So a new connection to a published port is not
led away at first. It goes through the host's input chains as what it is, a packet to the
host's own port. What gets past them is caught here, just before it would be delivered, and a
copy is sent round by our namespace, which sends it straight back: it comes in again by the
uplink, and what comes to a published port from there is let through its door (nft.py, chain
`doors`). From then on the connection is known, and nothing of it takes that turn.

    client -> input chains -> `admit` -> vxmesh0 ... uplink, and back -> door -> balancing

The copy's way back in needs a host that takes a client's packet from the uplink. One with
strict reverse path filtering everywhere (conf.all.rp_filter = 1) does not: there published ports
are led to their doors at once (`is_possible`), and only forward chains are asked.

Every packet that this host gets passes such a chain, VXLAN too, so there is none while no service
has a port published here.
What stands opposite: nft.py, the host's other table; applier.py loads both.
Source: nft(8), dup; Linux net/ipv4/netfilter/nf_dup_ipv4.c.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.datapath.nft import HOST_UPLINK, Elements, Ruleset
from agent.drivers.marks import DOOR

TABLES = {4: "ip vxmesh", 6: "ip6 vxmesh"}  # `dup` is not to be had in tables of both

# Later than filter (0) and whatever else people use; what local processes send comes by lo, and
# is led to the doors by the chain `output`. What is untracked is VXLAN (nft.py), which is for no
# published port.
_CHAINS = """\
	chain input {{
		type filter hook input priority 200; policy accept;
		ct state untracked accept
		iifname {{ "lo", "{uplink}" }} accept
		{ip} daddr . meta l4proto . th dport @at goto admit
		fib daddr type local meta l4proto . th dport @any goto admit
	}}

	chain admit {{
		dup to {door} device "{uplink}"
		drop
	}}
"""


def is_possible(rp_filter: str) -> bool:
    """Whether packets may take that turn on a host with this conf.all.rp_filter."""
    return rp_filter != "1"


def ruleset(version: int, doors: Mapping[tuple[str, str], str]) -> Ruleset:
    """The table of one family, for these published ports (see nft.host)."""
    ip = "ip" if version == 4 else "ip6"
    sets = {
        "any": ("inet_proto . inet_service", f"doors{version}"),
        "at": (f"ipv{version}_addr . inet_proto . inet_service", f"doors{version}_at"),
    }
    held = {
        name: Elements(
            f"set {name} {{ type {kind}; }}", {key: "" for where, key in doors if where == map_}
        )
        for name, (kind, map_) in sets.items()
    }
    chains = _CHAINS.format(ip=ip, uplink=HOST_UPLINK, door=DOOR[version])
    return Ruleset(held, chains if any(s.elements for s in held.values()) else "", TABLES[version])
