"""What is found in the views: by name, id or prefix, and what several of them say together.

Nothing here changes anything.
What stands opposite: views.py, how records become views; node/, api/ and all who ask.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from agent.core.catalogue import give_way
from agent.core.members import Member
from agent.core.services import Row, rows
from agent.core.waysout import Way, lead, priorities
from agent.errors import Invalid, NotFound
from agent.lanmodel import host_side_name, is_host_side
from agent.model import OVERLAY, PREDEFINED, Endpoint, Network, Node, Sandbox, plugin_of
from agent.notation import shorten
from agent.servicemodel import Health, Service
from agent.views import Status, Views

T = TypeVar("T")


class Lookups(Views):
    """The views of one node, to be looked at."""

    def find_network(self, ref: str) -> Network:
        """A network by name, id or unambiguous prefix of its id; NotFound or Invalid."""
        named = self.catalogue.named(ref.lower())
        if named:
            return named
        if ref.lower() in PREDEFINED:
            raise Invalid(
                f"network {ref.lower()}",
                "is there by itself on each node, without endpoints and services",
                f"Use it with 'vxmesh run --network {ref.lower()}' alone",
            )
        return _by_prefix("network", ref, {n.id: n for n in self.catalogue.all()})

    def find_endpoint(self, ref: str, network: str = "") -> tuple[Network, Member]:
        """An endpoint by name, id or prefix, in one network or any; NotFound or Invalid."""
        if network:
            networks = [self.find_network(network)]
        else:
            networks = sorted(self.catalogue.all(), key=lambda n: n.id)
        found = [
            (n, m) for n in networks if n.id in self.members
            for m in self.members[n.id].with_name(ref.lower())
        ]  # fmt: skip
        if len(found) == 1:
            return found[0]
        if found:
            where = ", ".join(f"{self.catalogue.name(n.id)} ({m.endpoint.id})" for n, m in found)
            raise Invalid(f"endpoint {ref}", f"is in several: {where}", "Give --network or the id")
        known = self.catalogue.get(self.network_of(ref))
        if known and (not network or known in networks):
            return known, self.members[known.id].all[ref]
        every = {
            id: (n, m) for n in networks if n.id in self.members
            for id, m in self.members[n.id].all.items()
        }  # fmt: skip
        return _by_prefix("endpoint", ref, every)

    def find_sandbox(self, ref: str) -> Sandbox:
        """A sandbox of this node by name, id or prefix; NotFound or Invalid."""
        for sandbox in self.sandboxes.values():
            if sandbox.name == ref.lower():
                return sandbox
        return _by_prefix("sandbox", ref, self.sandboxes)

    def find_service(self, ref: str, network: str = "") -> Service:
        """A service by name, id or prefix, in one network or any; NotFound or Invalid."""
        only = self.find_network(network).id if network else ""
        every = [s for s in self.services.all() if not only or s.network == only]
        found = [s for s in every if s.name == ref.lower()]
        if len(found) > 1:
            where = ", ".join(sorted(f"{self.catalogue.name(s.network)} ({s.id})" for s in found))
            raise Invalid(f"service {ref}", f"is in several: {where}", "Give --network or the id")
        return found[0] if found else _by_prefix("service", ref, {s.id: s for s in every})

    def health_of(self, member: Member) -> Health | None:
        """How an endpoint is, as its own node says; None if it has said nothing."""
        return self._health.get((member.endpoint.id, member.node))

    def backends_of(self, service: Service, now: float) -> list[Row]:
        """The backends of a service as they are at `now`, seconds since the epoch."""
        members = self.members.get(service.network)
        ids = self.selection.endpoints_of(service.id) if members else ()
        held = [m for m in (members.all.get(id) for id in ids) if m] if members else []
        return rows(service, held, self.health_of, self.withdrawn, now)

    def network_of(self, endpoint: str) -> str:
        """The id of the network that an endpoint is in; empty if there is no such endpoint."""
        return self._network_of.get(endpoint, "")

    def local_endpoint(self, id: str) -> Endpoint | None:
        """An endpoint of this node by its whole id."""
        members = self.members.get(self.network_of(id))
        return members.local.get(id) if members else None

    def with_ways(self, sandbox: Sandbox) -> Sandbox:
        """A sandbox with its default routes where they belong by what is known now.

        As it is while the network of one of its interfaces is not known, after a start, and if it
        has no interface of ours at all.
        """
        if sandbox.stack:
            return sandbox
        ways = self.ways_out(sandbox)
        if ways is None:
            return sandbox
        return msgspec.structs.replace(sandbox, default=lead(ways, 4), default6=lead(ways, 6))

    def ways_out(self, sandbox: Sandbox) -> list[Way] | None:
        """A sandbox's interfaces in the order in which they were connected; None while the network
        of one is not known."""
        ways = []
        for id, priority in zip(sandbox.endpoints, priorities(sandbox), strict=True):
            endpoint = self.local_endpoint(id)
            network = self.catalogue.get(endpoint.network) if endpoint else None
            if endpoint is None:
                continue
            if network is None:
                return None
            gateways = sandbox.lent.get(id, ()) if plugin_of(network) else network.gateways
            led = {6 if ":" in gateway else 4 for gateway in gateways}
            has = {6 if len(address) == 16 else 4 for address in endpoint.addresses}
            ways.append(Way(id, priority, frozenset(() if network.internal else led & has)))
        return ways

    def host_side(self, network: str) -> Endpoint | None:
        """The endpoint of this host's own interface in a network on its wire, if it has one."""
        members = self.members.get(network)
        named = members.with_name(host_side_name(self.nodes[self.me].name)) if members else ()
        found = (m.endpoint for m in named if m.node == self.me and is_host_side(m.endpoint))
        return next(found, None)

    def node_name(self, id: str) -> str:
        """A node's name; its id if it is not known."""
        node = self.nodes.get(id) or self.removals.get(id)
        return node.name if node else id

    def condition(self, id: str) -> Status:
        """What this node believes of a node; unreachable if it has not been heard of yet."""
        if id == self.me:
            return Status("alive", "", self.nodes[id].since)
        return self.status.get(id) or Status("unreachable", "has not answered yet", 0.0)

    def find_node(self, ref: str) -> Node:
        """A node by name, id or prefix; NotFound or Invalid."""
        for node in self.nodes.values():
            if node.name == ref.lower():
                return node
        return _by_prefix("node", ref, self.nodes)

    def local_networks(self) -> list[Network]:
        """The networks that have an endpoint on this node."""
        return [
            n for n in self.catalogue.all() if n.id in self.members and self.members[n.id].local
        ]

    def is_present(self, id: str) -> bool:
        """Whether a network is on this node: by an endpoint, or by a service published here."""
        members = self.members.get(id)
        network = self.catalogue.get(id)
        published = id in self._ingress and network is not None and network.driver == OVERLAY
        return network is not None and (published or bool(members and members.local))

    def present_networks(self) -> list[Network]:
        """The networks that are on this node."""
        return [n for n in self.catalogue.all() if self.is_present(n.id)]

    def partakers(self, network: str) -> set[str]:
        """The nodes (ids) between which frames of a network go: those with an endpoint in it, and
        those at which a service of it is published."""
        members = self.members.get(network)
        found = {node for node, count in members.count.items() if count} if members else set()
        for service in self.services.of(network):
            if service.published:
                found.update(service.publish_on or self.nodes)
        return found

    def has_narrow_paths(self) -> bool:
        """Whether any node has found a path too narrow."""
        return any(node.narrow for node in self.nodes.values())

    def gives_way(self) -> dict[str, frozenset[str]]:
        """Network id -> those of its subnets that have no gateway and no way out on this node,
        because an older network that is here as well has these addresses."""
        if not self.catalogue.overlapping():
            return {}
        return give_way(n for n in self.present_networks() if self.catalogue.overlap(n.id))


def _by_prefix(noun: str, ref: str, objects: dict[str, T]) -> T:
    """The object whose id is `ref` or alone begins with it."""
    if ref in objects:
        return objects[ref]
    found = [id for id in objects if ref and id.startswith(ref)]
    if len(found) == 1:
        return objects[found[0]]
    if found:
        raise Invalid(
            f"{noun} {ref}", f"is ambiguous: {len(found)} ids begin so", "Give more of it"
        )
    raise NotFound(f"{noun} {shorten(ref)}", "does not exist", f"See 'vxmesh {noun} ls'")
