"""The interfaces of this node's sandboxes, by network: kept as the node changes.

A network can have hundreds of them here, and each that comes or goes asks anew for all that its
network should have. So only those are worked out again that a change is about; the others stay
the very objects that they were, by which whoever compares two answers sees it at once.
What stands opposite: plan.py, which makes bridges of them; drivers/overlay.py, which makes one.
"""

from __future__ import annotations

from agent.drivers import overlay
from agent.drivers.base import Port
from agent.model import Endpoint, Network
from agent.node import NodeState
from agent.views import Change


class LocalPorts:
    """Those of one node."""

    def __init__(self, node: NodeState) -> None:
        self._node = node
        self._inside: dict[str, dict[str, Endpoint]] = {}  # network -> its endpoints in sandboxes
        self._network_of: dict[str, str] = {}  # endpoint of one of those -> network
        self._listed: dict[str, tuple[str, ...]] = {}  # sandbox -> endpoints, as looked at last
        self._ports: dict[str, tuple[Network, dict[str, Port]]] = {}  # network -> made for it
        self._stale: dict[str, set[str]] = {}  # network -> endpoints to be made into ports anew
        self.changed(Change(sandboxes=set(node.sandboxes)))

    def changed(self, change: Change) -> set[str]:
        """Take in a change of the node; the networks (ids) that may have other ports now."""
        node = self._node
        looked_at: set[str] = set()
        for id in change.sandboxes:
            looked_at.update(self._listed.pop(id, ()))
            sandbox = node.sandboxes.get(id)
            if sandbox and not sandbox.stack:  # else it has no interface
                self._listed[id] = sandbox.endpoints
                looked_at.update(sandbox.endpoints)
        looked_at.update(endpoint.id for endpoint in change.inhabited(node.me))
        touched: set[str] = set()
        for id in looked_at:
            touched |= self._look(id)
        return touched

    def endpoints(self, network: str) -> list[Endpoint]:
        """The endpoints of a network (id) that sandboxes here have."""
        return list(self._inside.get(network, {}).values())

    def ports(self, network: Network) -> dict[str, Port]:
        """The ports of a network's bridge, by endpoint; the caller's own."""
        made_for, ports = self._ports.get(network.id, (None, {}))
        inside = self._inside.get(network.id, {})
        stale = self._stale.pop(network.id, set())
        if made_for is not network:
            stale |= inside.keys() | ports.keys()  # its subnets, its gateways
            self._ports[network.id] = network, ports
        for id in stale:
            endpoint = inside.get(id)
            sandbox = self._node.sandboxes.get(endpoint.sandbox) if endpoint else None
            if endpoint is None or sandbox is None:
                ports.pop(id, None)
                continue
            made = overlay.port(network, endpoint, sandbox)
            if ports.get(id) != made:
                ports[id] = made
        if not ports:
            self._ports.pop(network.id, None)
        return ports.copy()

    def _look(self, id: str) -> set[str]:
        """See in which network an endpoint is inside a sandbox by now; that, and the one before."""
        before = self._network_of.pop(id, None)
        endpoint = self._node.local_endpoint(id)
        now = None
        if endpoint and id in self._listed.get(endpoint.sandbox, ()):
            now = self._network_of[id] = endpoint.network
            self._inside.setdefault(now, {})[id] = endpoint
        if before is not None and before != now:
            del self._inside[before][id]
            if not self._inside[before]:
                del self._inside[before]
        touched = {network for network in (before, now) if network is not None}
        for network in touched:
            self._stale.setdefault(network, set()).add(id)
        return touched
