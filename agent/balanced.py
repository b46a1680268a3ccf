"""The services that this host balances, as frontends: kept as the node changes.

What stands opposite: plan.py, which has the kernel look at those that became others;
drivers/frontends.py makes them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from agent.drivers.balancing import Frontend, FrontendKey
from agent.drivers.frontends import elsewhere, frontends
from agent.node import NodeState
from agent.views import Change


class Balanced:
    """Those of one node."""

    def __init__(self, node: NodeState, subnets: tuple[str, ...]) -> None:
        """`subnets` are those that lead to networks here."""
        self._node = node
        self._frontends: dict[FrontendKey, Frontend] = {}
        self._vips: dict[int, set[bytes]] = {}  # VNI -> those of its frontends
        self._keys: dict[str, set[FrontendKey]] = {}  # service -> those of its frontends
        self._outside: set[str] = set()  # services with a backend at an address of a node
        self._present: set[str] = set()  # the networks that are on this host
        self._subnets = subnets

    def all(self) -> Mapping[FrontendKey, Frontend]:
        """All of them."""
        return self._frontends

    def vips(self, vni: int) -> Collection[bytes] | None:
        """The VIPs in a network; None if it has no frontend."""
        return self._vips.get(vni)

    def moved(self, change: Change) -> list[str]:
        """The networks that came to this host or left it, since a change of the node was taken in
        last; and those that the change is about."""
        me = self._node.me
        looked_at = {
            each.network
            for each in change.endpoints
            if (each.new and each.new.node == me) or (each.old and each.old.node == me)
        }
        looked_at.update(change.networks)
        for id in change.led:
            service = self._node.services.get(id) or change.services.get(id)
            if service:
                looked_at.add(service.network)
        return [
            id
            for id in looked_at
            if self._node.is_present(id) != (id in self._present) or id in change.networks
        ]

    def changed(
        self, change: Change, moved: Collection[str], subnets: tuple[str, ...]
    ) -> set[FrontendKey]:
        """Take in a change of the node; the frontends that are others now, or went.

        `moved` are the networks as told before, `subnets` as of now.
        """
        node, led = self._node, set(change.led)
        for id in moved:
            (self._present.add if node.is_present(id) else self._present.discard)(id)
            led.update(service.id for service in node.services.of(id))
        if change.nodes:  # an address at which a port is published may be another one's
            led.update(
                service.id
                for service in node.services.all()
                if any(port.published_at for port in service.ports)
            )
        if change.nodes or self._subnets != subnets:
            led |= self._outside
        self._subnets = subnets
        changes: dict[FrontendKey, Frontend | None] = {}
        for id in led:
            found = {frontend.id: frontend for frontend in self._make(id)}
            for key in self._keys.get(id, set()) - found.keys():
                changes[key] = None
            for key, frontend in found.items():
                if self._frontends.get(key) != frontend:
                    changes[key] = frontend
            if found:
                self._keys[id] = set(found)
            else:
                self._keys.pop(id, None)
        self.take_in(changes)
        return set(changes)

    def take_in(self, changes: Mapping[FrontendKey, Frontend | None]) -> None:
        """Take in frontends that came, changed or (None) went."""
        moved = False
        for key, frontend in changes.items():
            old = self._frontends.pop(key, None)
            moved |= (old and (old.vni, old.address)) != (
                frontend and (frontend.vni, frontend.address)
            )
            if frontend:
                self._frontends[key] = frontend
        if not moved:
            return
        self._vips = {}
        for one in self._frontends.values():
            vips = self._vips.setdefault(one.vni, set())
            if one.address:
                vips.add(one.address)

    def _make(self, id: str) -> list[Frontend]:
        node = self._node
        service = node.services.get(id)
        network = node.catalogue.get(service.network) if service else None
        if not service or not network or network.id not in self._present:
            self._outside.discard(id)
            return []
        rows = node.backends_of(service, node.clock())
        (self._outside.add if elsewhere(network, rows) else self._outside.discard)(id)
        return frontends(service, network, rows, node.nodes.values(), node.me, self._subnets)
