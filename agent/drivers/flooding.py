"""Where an overlay network's broadcast and multicast go: to each other host that has members.

That is one default row for each, on the network's VXLAN device. A default row takes whatever no
other row is for, so of such a network the bridge gives the device only what it knows to be
behind it: unicast for a MAC that nobody has reaches nobody, here as everywhere.
Source: Linux drivers/net/vxlan/vxlan_core.c (vxlan_xmit), net/bridge/br_forward.c (br_flood).
What stands opposite: floodmodel.py has the options, datapath/bulk.py writes the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from agent.core.members import Members
from agent.floodmodel import flood_rate
from agent.model import Network
from agent.notation import holds

NOWHERE: frozenset[bytes] = frozenset()


def defaults(
    members: Members, vteps: Mapping[str, bytes], subnets: tuple[str, ...]
) -> frozenset[bytes]:
    """The VTEPs of the default rows: of the nodes in `vteps` that have an endpoint in the network
    (its `subnets`, CIDR), while one is here as well.

    A workload in a node's own stack has just a name in the network: nothing reaches it by these.
    """
    if not _takes_part(members, members.me, vteps, subnets):
        return NOWHERE
    return frozenset(
        vteps[id]
        for id in members.count
        if id in vteps and _takes_part(members, id, vteps, subnets)
    )


def _takes_part(
    members: Members, node: str, vteps: Mapping[str, bytes], subnets: tuple[str, ...]
) -> bool:
    if node == members.me:
        return any(holds(subnets, a) for e in members.local.values() for a in e.addresses)
    count = members.count.get(node, 0)
    return count > 0 and count > _apart(members, node, vteps.get(node, b""), subnets)


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
        self._known: dict[str, frozenset[bytes]] = {}  # by network that floods
        self._hosts: dict[str, set[str]] = {}  # nodes that take part, as far as was looked

    def forget(self, network: str) -> None:
        """A network (id) is no longer."""
        self._known.pop(network, None)
        self._hosts.pop(network, None)

    def changed(
        self,
        network: Network,
        members: Members,
        vteps: Mapping[str, bytes],
        nodes: Collection[str] | None = None,
    ) -> bool:
        """Whether a network's default rows are others than they were: `members` and `vteps` as
        for `defaults`. Only endpoints of these `nodes` are others, or None: all may be new."""
        if not flood_rate(network):
            self.forget(network.id)
            return False
        hosts = self._hosts.get(network.id)
        # Ways change as well, and are not told of while no endpoint is here.
        if hosts is None or nodes is None or (members.me in nodes and members.me not in hosts):
            nodes, hosts = members.count.keys() | {members.me}, set()
            moved = True
        else:
            moved = False
        for node in nodes:
            takes_part = _takes_part(members, node, vteps, network.subnets)
            moved |= takes_part != (node in hosts)
            (hosts.add if takes_part else hosts.discard)(node)
        self._hosts[network.id] = hosts
        if not moved:
            return False
        before = self._known.get(network.id, NOWHERE)
        self._known[network.id] = defaults(members, vteps, network.subnets)
        return self._known[network.id] != before
