"""Where an overlay network's broadcast and multicast go: to each other host that has members.

That is one default row for each, on the network's VXLAN device. A default row takes whatever no
other row is for, so of such a network the bridge gives the device only what it knows to be
behind it: unicast for a MAC that nobody has reaches nobody, here as everywhere.
Source: Linux drivers/net/vxlan/vxlan_core.c (vxlan_xmit), net/bridge/br_forward.c (br_flood).
What stands opposite: floodmodel.py has the options, datapath/bulk.py writes the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from agent.core.members import Members
from agent.floodmodel import flood_rate
from agent.model import Network, holds

NOWHERE: frozenset[bytes] = frozenset()


def defaults(
    members: Members, vteps: Mapping[str, bytes], subnets: tuple[str, ...]
) -> frozenset[bytes]:
    """The VTEPs of the default rows: of the nodes in `vteps` that have an endpoint in the network
    (its `subnets`, CIDR), while one is here as well.

    A workload in a node's own stack has just a name in the network: nothing reaches it by these.
    """
    if not any(holds(subnets, a) for e in members.local.values() for a in e.addresses):
        return NOWHERE
    return frozenset(
        vteps[id]
        for id, count in members.count.items()
        if count and id in vteps and count > _apart(members, id, vteps[id], subnets)
    )


def _apart(members: Members, node: str, vtep: bytes, subnets: tuple[str, ...]) -> int:
    """How many of a node's endpoints have nothing but its own address, outside the network."""
    ids = members.by_address.ids(vtep)
    if not ids or holds(subnets, vtep):
        return 0
    found = (members.all[id] for id in ids)
    return sum(m.node == node and m.endpoint.addresses == (vtep,) for m in found)


class Floods:
    """The default rows of this node's networks, to tell when they become others."""

    def __init__(self) -> None:
        self._known: dict[str, frozenset[bytes]] = {}  # by network; none: no rows

    def changed(
        self, networks: Iterable[Network], find: Callable[[Network], frozenset[bytes]]
    ) -> list[int]:
        """The VNIs of those of `networks` whose rows `find` says otherwise than it did before."""
        moved = []
        for network in networks:
            if not flood_rate(network):
                continue
            found, before = find(network), self._known.pop(network.id, NOWHERE)
            if found:
                self._known[network.id] = found
            if found != before:
                moved.append(network.vni)
        return moved
