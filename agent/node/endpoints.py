"""Endpoints of this node: checked, given what they lack, and made known.

What stands opposite: agent/allocator.py, which has addresses donated when NeedSpace is raised.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import msgspec

from agent.core import members as known
from agent.core.addresses import Range
from agent.core.members import EndpointChange, Member, Members
from agent.errors import Conflict, Exhausted, InUse, Invalid, NotFound, Unsupported
from agent.lanmodel import is_on_lan
from agent.model import BRIDGE, OVERLAY, Endpoint, Network, Node
from agent.node.networks import Networks
from agent.node.records import Recording
from agent.notation import format_address, format_mac, parse_address
from agent.requests import EndpointSpec
from agent.views import ENDPOINT


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


class Endpoints(Networks):
    """The methods of a node that are about endpoints."""

    def __init__(self, me: Node, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(me, clock, rng)
        self._held: set[tuple[str, bytes]] = set()  # network, address

    # -- addresses that are chosen before who is to have them is known --

    def hold_address(self, network_id: str, family: int, address: bytes = b"") -> bytes:
        """Keep `address`, or a free one of `family`, until an endpoint is made with it by a spec
        that says `held`, or `let_go`. While it is held nobody gets it, on whichever node.

        Raises as `create_endpoint` does. Not on disk: an agent's next life knows nothing of it.
        """
        self.check_stays()
        network = self.find_network(network_id)
        self._check_home(network)
        if address:
            self._check_static(network, self._members(network.id), address)
            self._check_owned(network, [address])
        else:
            address = self._pick(network, family)
        self._held.add((network.id, address))
        self.addresses[network.id].space.take(address)
        return address

    def let_go(self, network_id: str, address: bytes) -> None:
        """Hold an address no more; no error if it is not held."""
        if (network_id, address) in self._held:
            self._held.remove((network_id, address))
            if network_id in self.addresses:
                self.addresses[network_id].space.release(address)

    def let_all_go(self) -> None:
        """Hold nothing more: who asked for it is gone."""
        for network, address in list(self._held):
            self.let_go(network, address)

    # -- endpoints --

    def create_endpoint(self, network_id: str, spec: EndpointSpec, sandbox: str = "") -> Endpoint:
        """Make an endpoint of this node.

        NeedSpace if another node must donate an address first; Conflict or Exhausted say what
        is taken. Nothing is changed by a call that raises.
        """
        self.check_stays()
        network = self.find_network(network_id)
        self._check_home(network)
        endpoint = self._prepare(network, spec, sandbox)
        self._reserve(endpoint)
        self.commit([endpoint])
        return endpoint

    def create_host_endpoint(self, network_id: str, spec: EndpointSpec, sandbox: str) -> Endpoint:
        """Make an endpoint of a workload that is in this node's own stack: it has the node's
        address, no interface, and nothing of the network's addresses. Unsupported, Conflict,
        Exhausted."""
        self.check_stays()
        network = self.find_network(network_id)
        why = ""
        if network.driver != OVERLAY:
            why = f"whose driver is {network.driver}"
        elif network.internal or network.encrypted:
            why = "which is " + ("internal" if network.internal else "encrypted")
        if why:
            raise Unsupported(
                f"endpoint {spec.name}",
                f"of a workload in network host cannot be in {network.name}, {why}: its workloads "
                "would have to leave it to reach a node",
                "Use an overlay network that is neither internal nor encrypted",
            )
        self._check_names(network, spec.name, spec.aliases)
        mac = b"\x06" + self.rng.randbytes(5)  # of nothing: records have one
        address = parse_address(self.nodes[self.me].vtep)
        if self._members(network.id).by_address.count(address) >= known.CLAIMANTS_MAX:
            raise Exhausted(
                f"network {self.catalogue.name(network.id)}",
                f"has {known.CLAIMANTS_MAX} workloads in this node's own stack, which all have "
                "its address: others would not take one more",
                "Remove some, or run it on another node or in the network itself",
            )
        endpoint = Endpoint(
            self._new_id(),
            network.id,
            spec.name,
            mac,
            (address,),
            spec.aliases,
            spec.labels,
            sandbox,
        )
        self._reserve(endpoint)
        self.commit([endpoint])
        return endpoint

    def reserve(self, network_id: str, specs: Sequence[EndpointSpec]) -> list[Endpoint]:
        """Take names, MACs and addresses of endpoints that `commit` will make known.

        All or none; raises as `create_endpoint` does. What is reserved must be committed or
        given back with `cancel`.
        """
        self.check_stays()
        network = self.find_network(network_id)
        self._check_home(network)
        addresses = [address for spec in specs for address in spec.addresses]
        owners = self.addresses[network.id].ring.owners_of(addresses)
        if owners - {None, self.me}:
            self._check_owned(network, addresses)
        if None not in owners and self._are_whole(network, specs, addresses):
            ids = self.rng.randbytes(8 * len(specs)).hex()
            fresh = [
                Endpoint(
                    ids[at : at + 16], network.id, s.name, s.mac, s.addresses, s.aliases, s.labels
                )
                for at, s in zip(range(0, len(ids), 16), specs, strict=True)
            ]
            if self._take_fresh(fresh, self.me) is not None:
                return fresh
        done: list[Endpoint] = []
        try:
            for spec in specs:  # something is taken, or left to us: what, is looked at closely
                done.append(self._prepare(network, spec, "", owned=True))
                self._reserve(done[-1])
        except BaseException:
            self.cancel(done)
            raise
        return done

    def _are_whole(
        self, network: Network, specs: Sequence[EndpointSpec], addresses: Sequence[bytes]
    ) -> bool:
        """Whether there is nothing to choose for any of them, and no service, gateway or host
        of the network is in their way. `addresses` are those of all."""
        return (
            bool(specs)
            and self._hosts_on(network).keys().isdisjoint(addresses)
            and not self.services.of(network.id)
            and b"" not in [spec.mac for spec in specs]
            and () not in [spec.addresses for spec in specs]
            and not self.addresses[network.id].space.reserves_any(addresses)
            and not (self._held and any((network.id, a) in self._held for a in addresses))
        )

    def cancel(self, endpoints: Iterable[Endpoint]) -> None:
        """Give back what was reserved and not committed."""
        for endpoint in endpoints:
            members = self.members.get(endpoint.network)
            if members:  # else the network was removed elsewhere meanwhile
                members.drop(endpoint.id)
            self._network_of.pop(endpoint.id, None)
            self._release(endpoint)

    def amend(self, endpoint: Endpoint, mac: bytes, sandbox: str) -> Endpoint:
        """Give a reserved endpoint the MAC that its interface turned out to have; Conflict if
        that is another's."""
        members = self._members(endpoint.network)
        holder = members.with_mac(mac)
        if holder and holder.endpoint.id != endpoint.id:
            raise Conflict(
                f"MAC {format_mac(mac)}",
                f"is taken by {holder.endpoint.name} on {self.node_name(holder.node)}",
                "See why its plugin chose it",
            )
        fresh = msgspec.structs.replace(endpoint, mac=mac, sandbox=sandbox)
        members.drop(endpoint.id)
        members.put(fresh, self.me)
        return fresh

    def rename_endpoint(
        self, id: str, name: str, aliases: Sequence[str], labels: dict[str, str]
    ) -> Endpoint:
        """Give an endpoint of this node another name, aliases and labels; Conflict if the name is
        another's, NotFound if there is no such endpoint."""
        old = self.local_endpoint(id)
        if old is None or not self.is_committed(id):
            raise NotFound(f"endpoint {id}", "does not exist on this node")
        fresh = msgspec.structs.replace(
            old, name=name, aliases=tuple(dict.fromkeys(aliases)), labels=labels
        )
        if fresh == old:
            return old
        self._check_names(self.find_network(old.network), fresh.name, fresh.aliases, than=id)
        with Recording(self) as change:
            self._put(ENDPOINT + id, fresh)
            self._take_endpoint(self.me, fresh, change)
        return fresh

    def commit(self, endpoints: Iterable[Endpoint]) -> None:
        """Make reserved endpoints known to all."""
        with Recording(self) as change:
            self._put_all([(ENDPOINT + endpoint.id, endpoint) for endpoint in endpoints])
            change.endpoints.extend(
                [EndpointChange(e.network, None, Member(e, self.me)) for e in endpoints]
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
        with Recording(self) as change:
            for id in ids:
                self._delete(ENDPOINT + id)
                self._drop_endpoint(id, change)
        return ids

    def is_committed(self, id: str) -> bool:
        """Whether an endpoint of this node is more than reserved."""
        return bool(self.replica.get(self.me, ENDPOINT + id))

    def _check_home(self, network: Network) -> None:
        """InUse if a network is another node's own."""
        if network.driver == BRIDGE and network.creator != self.me:
            home = self.node_name(network.creator)
            raise InUse(
                f"network {self.catalogue.name(network.id)}",
                f"is a bridge on {home}, and no other node can have endpoints in it",
                f"Create them on {home}, or use an overlay network",
            )

    def _prepare(
        self, network: Network, spec: EndpointSpec, sandbox: str, owned: bool = False
    ) -> Endpoint:
        members = self._members(network.id)
        self._check_names(network, spec.name, spec.aliases)
        if spec.mac:
            holder = members.with_mac(spec.mac)
            if holder:
                raise Conflict(
                    f"MAC {format_mac(spec.mac)}",
                    f"is taken by {holder.endpoint.name} on {self.node_name(holder.node)}",
                    "Choose another, or leave --mac out",
                )
        for address in spec.addresses:
            self._check_static(network, members, address, spec.held)
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

    def _check_names(
        self, network: Network, name: str, aliases: Iterable[str], than: str = ""
    ) -> None:
        """Conflict if a name is that of another endpoint `than` (id), or one is a service's."""
        for other in self._members(network.id).with_name(name):
            if other.node in self.withdrawn or other.endpoint.id == than:
                continue  # what ran on a host that is gone may be started again elsewhere
            raise Conflict(
                f"endpoint {name}",
                f"exists in network {self.catalogue.name(network.id)} on "
                f"{self.node_name(other.node)}",
                "Choose another name, or use an alias, which may be shared",
            )
        for wanted in (name, *aliases):
            if self.services.named(network.id, wanted):
                raise Conflict(
                    f"endpoint {name}",
                    f"would have the name of service {wanted} in network "
                    f"{self.catalogue.name(network.id)}",
                    "Choose another name",
                )

    def _check_static(
        self, network: Network, members: Members, address: bytes, held: bool = False
    ) -> None:
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
        if (network.id, address) in self._held and not held:
            raise Conflict(
                f"address {text}",
                "is being given to an endpoint on this node",
                "Choose another, or leave it out",
            )
        service = self.services.with_address(network.id, address)
        if service:
            raise Conflict(
                f"address {text}", f"is that of service {service.name}", "Choose another"
            )
        host = self._hosts_on(network).get(address)
        if host:
            raise Conflict(f"address {text}", f"is that of host {host} itself", "Choose another")
        if space.reserved(address):
            raise Conflict(
                f"address {text}",
                "is the gateway's, kept free by an option, or no host's (first or last of its "
                "subnet)",
                "Choose another",
            )

    def _hosts_on(self, network: Network) -> dict[bytes, str]:
        """The addresses that nodes themselves have on the wire of a network, and whose they are."""
        if not is_on_lan(network):
            return {}
        nodes = self.nodes.values()
        return {parse_address(a): node.name for node in nodes for a in (node.address, node.vtep)}

    def _check_owned(self, network: Network, addresses: Iterable[bytes]) -> None:
        if network.ipam:
            return  # a plugin sees to it that no two nodes have one
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
        if network.ipam:
            raise Unsupported(
                f"an address in network {self.catalogue.name(network.id)}",
                f"is plugin {network.ipam.plugin}'s to choose, which is not asked for this",
                "Use a network whose addresses are ours",
            )
        addresses = self.addresses[network.id]
        hosts = self._hosts_on(network)
        while (address := addresses.pick(family)) is not None:
            if address not in hosts:
                return address
            addresses.space.take(address)  # for good: it is in use, though by no endpoint
        donors = addresses.donors(family)
        if donors:
            label = f"an address in network {self.catalogue.name(network.id)}"
            raise NeedSpace(network, family, {owner: [] for owner in donors}, label)
        raise Exhausted(
            f"network {self.catalogue.name(network.id)}",
            f"has no free address: {self.describe_usage(network.id, family)}",
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
            self.let_go(endpoint.network, address)
