"""The records of a simulated host, and a cluster of hosts that know everything already.

A host's node is the agent's own `NodeState`: replica, catalogue, rings, spaces. A thousand of
them in one process, each with the endpoints of all, would be ten million objects, so above
`EXACT` two things are done otherwise, and the figures of a run say so:

* what all know at the start is shared: the records of an origin until a host merges something
  new of it, the ring of a network until a host hears a claim about it;
* the endpoints of other hosts are kept as records only, not in the indices (core/members.py)
  from which rows and names are made.

What stands opposite: peers.py, whose sessions speak for a node; load.py, which writes.
"""

from __future__ import annotations

import copy
import random
import tracemalloc
from collections.abc import Callable, Sequence

from agent.cluster.codec import Encoder, decode
from agent.core.addresses import Addresses
from agent.core.members import EndpointChange
from agent.core.origin import Origin
from agent.core.replica import Change as Update
from agent.core.replica import Delta, Replica
from agent.core.seals import Sealer
from agent.model import Claims, Endpoint, Network, Node
from agent.node import NodeState
from agent.requests import EndpointSpec, parse_endpoint, parse_network
from agent.views import Change
from tests.sim.keys import sealer_of

EPOCH = 1_000_000.0  # s; the wall clock when the virtual one is 0
PER_NETWORK = 50  # hosts that share a network
EXACT = 200_000  # endpoints, counted on each host that knows them, up to which nothing is shared


class State(NodeState):
    """A host's node, all its own. `arrived` is told an origin and the versions before and after
    of what has come; the kernel is taken to follow at once."""

    def __init__(
        self,
        me: Node,
        clock: Callable[[], float],
        rng: random.Random,
        arrived: Callable[[State, str, int, int], None],
    ) -> None:
        super().__init__(me, clock, rng)
        self.arrived = arrived
        self.written: Callable[[], None] = lambda: None  # called when there is something to tell
        self.replica.sealer = sealer_of(me.id, self.nodes.__contains__)
        self.listeners.append(self._changed)

    def _changed(self, change: Change) -> None:
        self.replica.publish(self.replica.written())
        if change.own:
            self.written()

    def applied(self, origin: str) -> int:
        return self.replica.version(origin)

    def withholds(self) -> bool:
        return False

    def merge(self, delta: Delta, sender: str = "") -> bool:
        origin = delta.origin
        before = self.replica.version(origin)
        fits = super().merge(delta, sender)
        after = self.replica.version(origin)
        if after > before:
            self.arrived(self, origin, before, after)
        return fits

    def state_of(self, since: int = 0) -> Delta:
        """What this node has written after a version."""
        return self.delta(self.me, since)


class SharedReplica(Replica):
    """A replica of which every origin is `common` to all hosts until something of it changes."""

    def __init__(
        self, me: str, sealer: Sealer | None, own: Origin, common: dict[str, Origin]
    ) -> None:
        super().__init__(me, sealer)
        self._common = common
        self._origins = {**common, me: own}
        self.published = own.version

    def merge(self, delta: Delta, sender: str = "") -> list[Update] | None:
        shared = self._common.get(delta.origin)
        if shared is not None and self._origins.get(delta.origin) is shared:
            self._origins[delta.origin] = snapshot(shared)
        return super().merge(delta, sender)


def snapshot(origin: Origin) -> Origin:
    """A copy that shares the records themselves, which never change."""
    fresh = copy.copy(origin)
    fresh.records, fresh.tombstones = dict(origin.records), dict(origin.tombstones)
    fresh.seals = origin.seals.copy()
    return fresh


class Common:
    """What all hosts know at the start, once."""

    def __init__(self, states: Sequence[State]) -> None:
        for state in states:
            state.state_of()  # so that all of it is sealed
        self.origins = {s.me: snapshot(s.replica._origins[s.me]) for s in states}
        self.networks: dict[str, Network] = {}
        self.claims: dict[str, dict[str, Claims]] = {}
        for state in states:
            for network, stated in state._claims.items():
                if state.me in stated:
                    self.claims.setdefault(network, {})[state.me] = stated[state.me]
            self.networks.update({n.id: n for n in state.catalogue.all()})
        self.addresses = {id: self.read(network, "") for id, network in self.networks.items()}

    def read(self, network: Network, me: str) -> Addresses:
        """The addresses of a network, as `me` sees them; none are in use."""
        addresses = Addresses(network, me)
        for origin, claims in self.claims.get(network.id, {}).items():
            addresses.ring.merge(origin, claims)
        return addresses


class SlimState(State):
    """A host's node that shares what is `Common`, and indexes no endpoints but its own."""

    _common: Common | None = None  # until `share`

    def share(self, common: Common) -> None:
        """Know all that the others know."""
        self._common = common
        own, sealer = self.replica._origins[self.me], self.replica.sealer
        self.replica = SharedReplica(self.me, sealer, own, common.origins)
        for network in common.networks.values():
            self.catalogue.put(network.creator, network)
        self.addresses = dict(common.addresses)
        self._claims = dict(common.claims)

    def _own(self, network: str) -> None:
        """From now on this host has its own view of a network's addresses."""
        common, known = self._common, self.catalogue.get(network)
        if common is None or known is None:
            return
        if self.addresses[network] is not common.addresses.get(network):
            return
        self._claims[network] = dict(common.claims[network])
        addresses = self.addresses[network] = common.read(known, self.me)
        for member in self._members(network).all.values():
            for address in member.endpoint.addresses:
                addresses.space.take(address)

    def create_endpoint(self, network_id: str, spec: EndpointSpec, sandbox: str = "") -> Endpoint:
        self._own(network_id)
        return super().create_endpoint(network_id, spec, sandbox)

    def donate(
        self, network_id: str, to: str, family: int, ranges: list[tuple[bytes, bytes]]
    ) -> str:
        self._own(network_id)
        return super().donate(network_id, to, family, ranges)

    def _take_claims(self, origin: str, network: str, claims: Claims | None) -> None:
        self._own(network)
        super()._take_claims(origin, network, claims)

    def _take_endpoint(self, origin: str, endpoint: Endpoint, change: Change) -> None:
        if origin == self.me:
            super()._take_endpoint(origin, endpoint, change)
        else:
            change.endpoints.append(EndpointChange(endpoint.network, None, None))


def describe(number: int, id: str) -> Node:
    """The record of a host: the `number`-th of all."""
    address = f"10.99.{number // 250}.{number % 250 + 1}"
    return Node(id, f"n{number + 1}", address, 7946, address, 4789, "sim", EPOCH, 1500)


def furnish(states: Sequence[State], endpoints: int) -> list[str]:
    """Give each host `endpoints` endpoints, and all knowledge of all; the networks' ids.

    The hosts do it themselves: of each PER_NETWORK one makes a network and donates each of the
    others a part of its addresses. Only the telling is cut short.
    """
    everybody = {s.me: s.nodes[s.me] for s in states}
    for state in states:
        state.nodes.update(everybody)
        state.describe(everybody[state.me])
    networks: list[str] = []
    share = max(64, 4 << (endpoints - 1).bit_length())  # addresses of a host; a power of two
    prefix = 32 - (PER_NETWORK * share - 1).bit_length()
    for first in range(0, len(states), PER_NETWORK):
        group = states[first : first + PER_NETWORK]
        base = (10 << 24 | 128 << 16) + len(networks) * (1 << 32 - prefix)
        subnet = f"{base >> 24}.{base >> 16 & 255}.{base >> 8 & 255}.{base & 255}/{prefix}"
        spec = parse_network(f"net{len(networks)}", subnets=[subnet])
        network = group[0].create_network(spec).id
        networks.append(network)
        for place, state in enumerate(group[1:], 1):
            low = base + place * share
            part = (low.to_bytes(4), (low + share - 1).to_bytes(4))
            refused = group[0].donate(network, state.me, 4, [part])
            assert not refused, refused
        for state in group:
            if state is not group[0]:
                state.merge(group[0].state_of(), group[0].me)
            for number in range(endpoints):
                name = f"e{number}-{state.nodes[state.me].name}"
                state.create_endpoint(network, parse_endpoint(name))
    slim = [state for state in states if isinstance(state, SlimState)]
    if slim:
        common = Common(slim)
        for state in slim:
            state.share(common)
    else:
        for state in states:
            for other in states:
                if other is not state:
                    state.merge(other.state_of(), other.me)
    return networks


def alone(states: Sequence[State]) -> int:
    """Bytes that the records of all take in a node of its own, with every view of them: what
    one agent has to hold, as it comes off the wire."""
    me = describe(len(states), "f" * 16)
    encoder = Encoder()
    wire = [encoder.encode(state.state_of()) for state in states]
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    node = NodeState(me, lambda: EPOCH, random.Random(0))
    for data in wire:
        delta = decode(data)
        assert isinstance(delta, Delta)
        node.merge(delta)
    after, _ = tracemalloc.get_traced_memory()
    if not running:
        tracemalloc.stop()
    return after - before
