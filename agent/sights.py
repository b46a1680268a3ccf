"""Which networks each sandbox of this host may see names of, by the address that it asks from.

Also by itself: who asks from inside a sandbox that reaches no gateway of ours has no address that
the name server would know it by. With hundreds of sandboxes, only those are looked at again that
a change is about.
What stands opposite: feed.py, which tells the name server.
"""

from __future__ import annotations

from collections import Counter

from agent.lanmodel import is_on_lan
from agent.model import WORKLOAD, Endpoint
from agent.node import NodeState
from agent.notation import holds
from agent.resolver.feed import Place, View
from agent.views import Change

ROOM = b"sandbox "  # how the keys of views begin that are no addresses: longer than any


class Sights:
    """Those of one node."""

    def __init__(self, node: NodeState) -> None:
        self._node = node
        self.views: dict[bytes, View] = {}
        self._held: dict[str, dict[bytes, View]] = {}  # sandbox -> the views that it is for
        self._holders: dict[bytes, set[str]] = {}  # view -> sandboxes; the youngest has it
        self._seen: dict[str, tuple[str, ...]] = {}  # sandbox -> the networks that it sees
        self._count: Counter[str] = Counter()  # network -> how many see it
        self._workloads: dict[str, set[str]] = {}  # sandbox -> the workloads that it is part of
        self._together: dict[str, set[str]] = {}  # workload -> its sandboxes
        self._apart: dict[str, frozenset[str]] = {}

    @property
    def networks(self) -> set[str]:
        """The networks (ids) that any sandbox here sees."""
        return set(self._count)

    def renew(self) -> set[bytes]:
        """Look at everything; the views that were or are there."""
        return self._look_at(self._seen.keys() | self._node.sandboxes.keys())

    def changed(self, change: Change) -> set[bytes]:
        """Take in a change of the node; the views that came, went or may be others now."""
        if change.networks or self._node.gives_way() != self._apart:
            return self.renew()
        inhabited = change.inhabited(self._node.me)
        return self._look_at(change.sandboxes.union(e.sandbox for e in inhabited))

    def _look_at(self, sandboxes: set[str]) -> set[bytes]:
        """Look at these, and at what is a part of one workload with one of them."""
        self._apart = self._node.gives_way()
        touched: set[str] = set()
        for id in sandboxes:
            before = self._workloads.pop(id, set())
            now = {e.labels[WORKLOAD] for e in self._inside(id) if WORKLOAD in e.labels}
            for workload in before - now:
                self._together[workload].remove(id)
                if not self._together[workload]:
                    del self._together[workload]
            for workload in now:
                self._together.setdefault(workload, set()).add(id)
            if now:
                self._workloads[id] = now
            touched |= before | now
        beside = {id for workload in touched for id in self._together.get(workload, ())}
        keys: set[bytes] = set()
        for id in sandboxes | beside:
            keys |= self._look(id)
        return keys

    def _inside(self, id: str) -> list[Endpoint]:
        """The endpoints of a sandbox."""
        sandbox = self._node.sandboxes.get(id)
        if sandbox is None or sandbox.stack:  # it asks whom the host asks
            return []
        return [e for e in map(self._node.local_endpoint, sandbox.endpoints) if e]

    def _look(self, id: str) -> set[bytes]:
        """See what a sandbox sees by now; the views that it had and has."""
        node, held = self._node, self._inside(id)
        beside = [
            endpoint
            for workload in sorted(self._workloads.get(id, ()))
            for other in sorted(self._together[workload], key=self._age)
            for endpoint in self._inside(other)
            if endpoint.labels.get(WORKLOAD) == workload
        ]
        networks = dict.fromkeys(e.network for e in (*held, *beside))
        seen = tuple(network for network in networks if node.catalogue.get(network))
        views: dict[bytes, View] = {}
        if any(map(self._is_on_lan, seen)):
            sandbox = node.sandboxes[id]
            place = Place(sandbox.netns, sandbox.inode, sandbox.pid, sandbox.start_time)
            key = ROOM + id.encode()
            views[key] = View(key, seen, place)
        for endpoint in held:
            without = self._apart.get(endpoint.network, ())
            for address in endpoint.addresses:
                # Another network's workload may ask from the same address: that one is meant.
                if not (without and holds(without, address)):
                    views[address] = View(address, seen)
        before = self._seen.pop(id, ())
        if seen:
            self._seen[id] = seen
            self._count.update(seen)
        self._count.subtract(before)
        for network in before:
            if not self._count[network]:
                del self._count[network]
        return self._keep(id, views)

    def _keep(self, id: str, views: dict[bytes, View]) -> set[bytes]:
        before = self._held.pop(id, {})
        if views:
            self._held[id] = views
        for key in before.keys() - views.keys():
            self._holders[key].remove(id)
        for key in views:
            self._holders.setdefault(key, set()).add(id)
        for key in before.keys() | views.keys():
            holders = self._holders[key]
            if holders:
                self.views[key] = self._held[max(holders, key=self._age)][key]
            else:
                del self._holders[key], self.views[key]
        return before.keys() | views.keys()

    def _age(self, id: str) -> tuple[float, str]:
        """What sandboxes are sorted by, so that who looks again finds the same."""
        sandbox = self._node.sandboxes.get(id)
        return (sandbox.created if sandbox else 0.0), id

    def _is_on_lan(self, id: str) -> bool:
        network = self._node.catalogue.get(id)
        return network is not None and is_on_lan(network)
