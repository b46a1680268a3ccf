"""The one owner of this node's state: every change is one synchronous method, so no locks.

A change goes into the replica and comes out as a `Change` to listeners that do not know each
other: cluster/ pushes records, drivers/ and datapath/ mend the kernel, resolver/ is fed, the
store writes. Time and chance come from outside, so a simulation can own them.
What stands opposite: api/ calls the methods, agent/allocator.py waits for donated addresses.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec
import structlog

from agent.core.addresses import Range
from agent.core.catalogue import next_stamp
from agent.core.members import Member, Members
from agent.core.replica import Change as Update
from agent.core.replica import Delta, Record, Replica
from agent.errors import Conflict, Exhausted, InUse, Invalid, NotFound
from agent.model import (
    VNI_MAX,
    Endpoint,
    Network,
    Node,
    Sandbox,
    encode,
    format_address,
    format_mac,
)
from agent.requests import EndpointSpec, NetworkSpec
from agent.subnets import check_subnets, choose_subnets, first_gateway
from agent.views import CLAIMS, ENDPOINT, NETWORK, NODE, Change, EndpointChange, Views

log = structlog.get_logger()

COLLECT_AFTER = 30.0  # s that tombstones are kept after all have seen them
VNI_MIN_CHOSEN = 4096  # below: left for those who choose their own


class NeedSpace(Exception):
    """This node does not own the addresses; `owners` may donate them, best first.

    `ranges` are the addresses meant; empty: any.
    """

    def __init__(
        self, network: Network, family: int, owners: dict[str, list[Range]], label: str
    ) -> None:
        super().__init__(label)
        self.network = network
        self.family = family
        self.owners = owners
        self.label = label


class NodeState(Views):
    """This node: its replica, and the views that follow from all records it has."""

    def __init__(self, me: Node, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(me)
        self.clock = clock
        self.rng = rng
        self.replica = Replica(me.id)
        self.listeners: list[Callable[[Change], None]] = []
        # Milliseconds of the start: a watcher of this agent's earlier life is told apart.
        self.revision = int(clock() * 1000)
        self._kernel: dict[str, int] = {}  # origin -> version that our kernel has
        self._seen: dict[str, dict[str, tuple[int, int]]] = {}  # peer -> its digest
        self._floors: deque[tuple[float, int]] = deque()  # when all had our records up to where
        self.collect_after = COLLECT_AFTER
        self._change: Change | None = None

    # -- what sessions ask (core/session.py: Store) --

    def digest(self) -> dict[str, tuple[int, int]]:
        """What this node has of each origin."""
        return self.replica.digest()

    def version(self, origin: str) -> int:
        """The version of `origin` that is here without holes."""
        return self.replica.version(origin)

    def floor(self, origin: str) -> int:
        """Up to where tombstones of `origin` are gone."""
        return self.replica.floor(origin)

    def since(self, origin: str, version: int) -> list[Record]:
        """Records of `origin` after `version`."""
        return self.replica.since(origin, version)

    def applied(self, origin: str) -> int:
        """Up to which version of `origin` this node's kernel is right."""
        return self._kernel.get(origin, 0)

    def merge(self, delta: Delta) -> bool:
        """Take a peer's delta; False if something before it is missing."""
        before = self.replica.version(delta.origin)
        updates = self.replica.merge(delta)
        if updates is None:
            return False
        # Also when no view changes by it: how far we have got is news to who waits for it.
        if updates or self.replica.version(delta.origin) != before:
            with _Recording(self) as change:
                self._take(updates, change)
        return True

    def seen(self, peer: str, entries: dict[str, tuple[int, int]]) -> None:
        """A peer's digest: learn of lost records of ours, and collect tombstones."""
        theirs = entries.get(self.me, (0, 0))[0]
        if self.replica.surpass(theirs):
            with _Recording(self) as change:
                change.rewritten = True
                change.own = self.replica.items(self.me)
        self._seen[peer] = entries
        others = [id for id in self.nodes if id != self.me]
        if others and all(id in self._seen for id in others):
            floor = min(self._seen[id].get(self.me, (0, 0))[0] for id in others)
            self._collect(floor)

    def _collect(self, seen_by_all: int) -> None:
        """Drop tombstones that all have had for a while.

        Not at once: who keeps records a little behind on disk would have to write all of them
        anew if tombstones went before they were written.
        """
        now = self.clock()
        if not self._floors or self._floors[-1][1] < seen_by_all:
            self._floors.append((now, seen_by_all))
        floor = 0
        while self._floors and self._floors[0][0] <= now - self.collect_after:
            floor = self._floors.popleft()[1]
        if floor and self.replica.collect(self.me, floor):
            with _Recording(self) as change:
                change.floor = floor

    # -- life --

    def restore(
        self, records: Iterable[Record], sandboxes: Iterable[Sandbox], version: int, floor: int
    ) -> None:
        """Take back what was stored before the last stop, before anything else is called."""
        records = list(records)
        self.replica.restore(records, version, floor)
        self.sandboxes = {s.id: s for s in sandboxes}
        self.apply([Update(self.me, r.key, r.value) for r in records if r.value], Change())

    def restore_peer(
        self, origin: str, records: Iterable[Record], version: int, floor: int
    ) -> None:
        """Take back what was known of another origin. After `restore`, before anything else."""
        self.apply(self.replica.restore_peer(origin, records, version, floor), Change())

    def describe(self, node: Node) -> None:
        """State what this node is (at start, and when its routes or MTU change)."""
        with _Recording(self) as change:
            self._put(NODE + node.id, node)
            self.nodes[node.id] = node
            change.nodes.add(node.id)

    def kernel_has(self, versions: dict[str, int]) -> None:
        """The kernel holds everything up to these versions."""
        self._kernel = versions

    def versions(self) -> dict[str, int]:
        """Origin -> version, of all that has been taken in: a mark for `kernel_has`."""
        versions = {origin: self.replica.version(origin) for origin in self.replica.origins()}
        versions[self.me] = self.replica.written()
        return versions

    # -- networks --

    def create_network(self, spec: NetworkSpec) -> Network:
        """Make a network; Conflict names what stands in the way, and nothing is changed."""
        if self.catalogue.named(spec.name):
            raise Conflict(f"network {spec.name}", "exists", "Choose another name")
        taken = [
            (f"network {self.catalogue.name(n.id)}", s)
            for n in self.catalogue.all()
            for s in n.subnets
        ] + [(f"a route of host {n.name}", r) for n in self.nodes.values() for r in n.routes]
        id = self._new_id()
        if spec.subnets:
            check_subnets(spec.subnets, taken)
        subnets = spec.subnets or choose_subnets(id, spec.ipv6, taken)
        gateways = tuple(first_gateway(subnet, spec.gateways) for subnet in subnets)
        now = self.clock()
        network = Network(
            id,
            spec.name,
            spec.driver,
            subnets,
            gateways,
            spec.ip_range,
            self._choose_vni(spec.vni, id),
            spec.mtu,
            spec.internal,
            False,
            spec.options,
            spec.labels,
            now,
            self.me,
            next_stamp(now, self.catalogue.stamp),
        )
        with _Recording(self) as change:
            self._put(NETWORK + id, network)
            self._take_network(self.me, network, change)
            self._state_claims(id)
        return network

    def remove_network(self, id: str) -> None:
        """Remove a network; InUse names its endpoints, NotFound if there is none."""
        network = self.find_network(id)
        held = self.members.get(network.id)
        if held and held.all:
            some = sorted(held.all.values(), key=lambda m: m.endpoint.name)[:3]
            names = ", ".join(f"{m.endpoint.name} on {self.node_name(m.node)}" for m in some) + (
                f" and {len(held.all) - 3} more" if len(held.all) > 3 else ""
            )
            raise InUse(
                f"network {self.catalogue.name(network.id)}",
                f"has endpoints: {names}",
                "Remove them first with 'vxmesh endpoint rm' on their node",
            )
        with _Recording(self) as change:
            if self.catalogue.writers(network.id) == {self.me}:
                self._delete(NETWORK + network.id)
                ids = self.catalogue.drop(self.me, network.id)
                self._note_networks(ids, network.id, network, change)
            else:
                stamp = next_stamp(self.clock(), self.catalogue.stamp)
                gone = msgspec.structs.replace(network, stamp=stamp, deleted=True)
                self._put(NETWORK + network.id, gone)
                self._take_network(self.me, gone, change)
            self._state_claims(network.id)

    def _choose_vni(self, wanted: int, id: str) -> int:
        used = {n.vni: n for n in self.catalogue.all()}
        if wanted:
            if wanted in used:
                other = self.catalogue.name(used[wanted].id)
                raise Conflict(f"VNI {wanted}", f"is network {other}'s", "Choose another")
            return wanted
        count = VNI_MAX - VNI_MIN_CHOSEN + 1
        if len(used) >= count:
            raise Exhausted("VNIs", "are all taken", "Remove networks that nobody uses")
        vni = int(id, 16) % count
        while vni + VNI_MIN_CHOSEN in used:
            vni = (vni + 1) % count
        return vni + VNI_MIN_CHOSEN

    # -- endpoints --

    def create_endpoint(self, network_id: str, spec: EndpointSpec, sandbox: str = "") -> Endpoint:
        """Make an endpoint of this node.

        NeedSpace if another node must donate an address first; Conflict or Exhausted say what
        is taken. Nothing is changed by a call that raises.
        """
        network = self.find_network(network_id)
        endpoint = self._prepare(network, spec, sandbox)
        self._reserve(endpoint)
        self.commit([endpoint])
        return endpoint

    def reserve(self, network_id: str, specs: Sequence[EndpointSpec]) -> list[Endpoint]:
        """Take names, MACs and addresses of endpoints that `commit` will make known.

        All or none; raises as `create_endpoint` does. What is reserved must be committed or
        given back with `cancel`.
        """
        network = self.find_network(network_id)
        self._check_owned(network, [a for s in specs for a in s.addresses])
        members, space = self._members(network.id), self.addresses[network.id].space
        subnet = self.addresses[network.id].ring.owner
        ids = self.rng.randbytes(8 * len(specs)).hex()
        done: list[Endpoint] = []
        try:
            for number, spec in enumerate(specs):
                name, mac, given = spec.name, spec.mac, spec.addresses
                # What is free and whole needs no more than this; the rest is looked at closely.
                plain = mac and given and name not in members.by_name and mac not in members.by_mac
                for address in given:
                    plain = (
                        plain
                        and address not in members.by_address
                        and not space.reserved(address)
                        and subnet(address) is not None
                    )
                if plain:
                    id = ids[16 * number : 16 * number + 16]
                    endpoint = Endpoint(id, network.id, name, mac, given, spec.aliases, spec.labels)
                else:
                    endpoint = self._prepare(network, spec, "", owned=True)
                self._reserve(endpoint)
                done.append(endpoint)
        except BaseException:
            self.cancel(done)
            raise
        return done

    def cancel(self, endpoints: Iterable[Endpoint]) -> None:
        """Give back what was reserved and not committed."""
        for endpoint in endpoints:
            self.members[endpoint.network].drop(endpoint.id)
            self._network_of.pop(endpoint.id, None)
            self._release(endpoint)

    def commit(self, endpoints: Iterable[Endpoint]) -> None:
        """Make reserved endpoints known to all."""
        with _Recording(self) as change:
            for endpoint in endpoints:
                self._put(ENDPOINT + endpoint.id, endpoint)
                change.endpoints.append(
                    EndpointChange(endpoint.network, None, Member(endpoint, self.me))
                )

    def remove_endpoints(self, ids: Iterable[str]) -> list[str]:
        """Remove endpoints of this node; InUse if one lives elsewhere. All or none."""
        ids = list(ids)
        for id in ids:
            network = self._network_of.get(id)
            member = self.members[network].all.get(id) if network else None
            if member is None or (member.node == self.me and not self.is_committed(id)):
                raise NotFound(f"endpoint {id}", "does not exist")
            if member.node != self.me:
                raise InUse(
                    f"endpoint {member.endpoint.name}",
                    f"lives on {self.node_name(member.node)}",
                    "Remove it there",
                )
        with _Recording(self) as change:
            for id in ids:
                self._delete(ENDPOINT + id)
                self._drop_endpoint(id, change)
        return ids

    def is_committed(self, id: str) -> bool:
        """Whether an endpoint of this node is more than reserved."""
        return bool(self.replica.get(self.me, ENDPOINT + id))

    def _prepare(
        self, network: Network, spec: EndpointSpec, sandbox: str, owned: bool = False
    ) -> Endpoint:
        members = self._members(network.id)
        for other in members.with_name(spec.name):
            raise Conflict(
                f"endpoint {spec.name}",
                f"exists in network {self.catalogue.name(network.id)} on "
                f"{self.node_name(other.node)}",
                "Choose another name, or use an alias, which may be shared",
            )
        if spec.mac:
            holder = members.with_mac(spec.mac)
            if holder:
                raise Conflict(
                    f"MAC {format_mac(spec.mac)}",
                    f"is taken by {holder.endpoint.name} on {self.node_name(holder.node)}",
                    "Choose another, or leave --mac out",
                )
        for address in spec.addresses:
            self._check_static(network, members, address)
        if not owned:
            self._check_owned(network, spec.addresses)
        chosen = list(spec.addresses)
        given = {len(address) for address in chosen}
        for family, width in ((4, 4), (6, 16)):
            has = any((":" in s) == (family == 6) for s in network.subnets)
            if has and width not in given and not (given and owned):
                chosen.append(self._pick(network, family))
        mac = spec.mac or self._choose_mac(members, chosen)
        return Endpoint(
            self._new_id(),
            network.id,
            spec.name,
            mac,
            tuple(chosen),
            spec.aliases,
            spec.labels,
            sandbox,
        )

    def _check_static(self, network: Network, members: Members, address: bytes) -> None:
        text = format_address(address)
        space = self.addresses[network.id].space
        if self.addresses[network.id].ring.owner(address) is None:
            raise Invalid(
                f"address {text}",
                f"is in no subnet of {self.catalogue.name(network.id)}",
                f"Use one of {', '.join(network.subnets)}",
            )
        holder = members.with_address(address)
        if holder:
            raise Conflict(
                f"address {text}",
                f"is taken by {holder.endpoint.name} on {self.node_name(holder.node)}",
                "Choose another, or leave it out",
            )
        if space.reserved(address):
            raise Conflict(
                f"address {text}",
                "is the gateway's, or no host's (first or last of its subnet)",
                "Choose another",
            )

    def _check_owned(self, network: Network, addresses: Iterable[bytes]) -> None:
        foreign = self.addresses[network.id].foreign(addresses)
        for owner, ranges in foreign.items():
            label = f"address {format_address(ranges[0][0])}"
            family = 4 if len(ranges[0][0]) == 4 else 6
            raise NeedSpace(
                network,
                family,
                {owner: [r for r in ranges if len(r[0]) == len(ranges[0][0])]},
                label,
            )

    def _pick(self, network: Network, family: int) -> bytes:
        addresses = self.addresses[network.id]
        address = addresses.pick(family)
        if address is not None:
            return address
        donors = addresses.donors(family)
        if donors:
            label = f"an address in network {self.catalogue.name(network.id)}"
            raise NeedSpace(network, family, {owner: [] for owner in donors}, label)
        total, used = addresses.space.usage(family)
        raise Exhausted(
            f"network {self.catalogue.name(network.id)}",
            f"has no free address: {used} of {total} are used",
            "Remove endpoints, or create a network with a larger subnet",
        )

    def _choose_mac(self, members: Members, addresses: Sequence[bytes]) -> bytes:
        # From the address, so that who gets an address again has the MAC that neighbours
        # still remember for it.
        mac = b"\x02\x76" + addresses[0][-4:]
        while mac in members.by_mac or not addresses:
            mac = b"\x06" + self.rng.randbytes(5)
        return mac

    def _reserve(self, endpoint: Endpoint) -> None:
        self._members(endpoint.network).put(endpoint, self.me)
        self._network_of[endpoint.id] = endpoint.network
        space = self.addresses[endpoint.network].space
        for address in endpoint.addresses:
            space.take(address)

    # -- addresses --

    def donate(self, network_id: str, to: str, family: int, ranges: list[Range]) -> str:
        """Another node asks for addresses; why none went, or nothing if some did."""
        addresses = self.addresses.get(network_id)
        if addresses is None:
            return "the network is not known here"
        if to not in self.nodes or to == self.me:
            return "who asks is not known here yet; try again shortly"
        before = addresses.claims()
        kept = addresses.donate(to, family, ranges)
        if addresses.claims() != before:
            with _Recording(self):
                self._state_claims(network_id)
        elif kept:
            holder = self._members(network_id).with_address(kept[0])
            name = holder.endpoint.name if holder else "someone who has not been heard of"
            return f"{format_address(kept[0])} is taken by {name}"
        elif ranges:
            return "this node does not own them any more"
        else:
            total, used = addresses.space.usage(family)
            return f"nothing is free here ({used} of the network's {total} are used)"
        return ""

    def _state_claims(self, network: str) -> None:
        addresses = self.addresses.get(network)
        claims = addresses.claims() if addresses else None  # none: the network was removed
        key = CLAIMS + network
        stated = self.replica.get(self.me, key)
        if claims is None or not claims.segments:
            if stated:
                self._delete(key)
        elif stated != encode(claims):
            self._put(key, claims)
            # A network that goes from here and comes back finds its ring in what was stated.
            self._claims.setdefault(network, {})[self.me] = claims

    # -- sandboxes --

    def put_sandbox(self, sandbox: Sandbox) -> None:
        """Add or replace a sandbox of this node; Conflict if its name is another's."""
        for other in self.sandboxes.values():
            if other.name == sandbox.name and other.id != sandbox.id:
                raise Conflict(f"sandbox {sandbox.name}", "exists", "Choose another --name")
        with _Recording(self) as change:
            self.sandboxes[sandbox.id] = sandbox
            change.sandboxes.add(sandbox.id)

    def drop_sandbox(self, id: str) -> None:
        """Remove a sandbox with its endpoints; no error if it is gone."""
        sandbox = self.sandboxes.get(id)
        if sandbox is None:
            return
        with _Recording(self) as change:
            del self.sandboxes[id]
            change.sandboxes.add(id)
            held = [e for e in sandbox.endpoints if e in self._network_of]
            for endpoint in held:
                self._delete(ENDPOINT + endpoint)
                self._drop_endpoint(endpoint, change)

    # -- writing --

    def _take(self, updates: list[Update], change: Change) -> None:
        for network in self.apply(updates, change):
            self._state_claims(network)
            if network in change.networks and not self.catalogue.get(network):
                # Removed elsewhere while we made endpoints in it: nobody could name them any more.
                members = self.members.get(network)
                for id in list(members.local) if members else ():
                    self._delete(ENDPOINT + id)
                    self._drop_endpoint(id, change)

    def _put(self, key: str, value: msgspec.Struct) -> None:
        assert self._change is not None
        self._change.own.append(self.replica.put(key, encode(value)))

    def _delete(self, key: str) -> None:
        assert self._change is not None
        self._change.own.append(self.replica.delete(key))

    def _new_id(self) -> str:
        return self.rng.randbytes(8).hex()


class _Recording:
    """Collects one Change, nested calls into one, and tells the listeners at its end."""

    def __init__(self, node: NodeState) -> None:
        self.node = node
        self.outer = node._change

    def __enter__(self) -> Change:
        if self.node._change is None:
            self.node._change = Change()
        return self.node._change

    def __exit__(self, *error: object) -> None:
        node, change = self.node, self.node._change
        node._change = self.outer
        if self.outer is None and change is not None:
            node.revision += 1
            for listener in list(node.listeners):
                try:
                    listener(change)
                except Exception as failure:
                    # One that fails must not keep the change from the others.
                    log.exception("listener.failed", error=repr(failure))
