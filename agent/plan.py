"""This node's desired kernel state, out of the node's views by each network's driver.

Two directions meet here: `touched` turns a change of the node into what should be looked at
again, and the DesiredState methods answer what should be there, whenever they are asked.
What stands opposite: node.py before it, datapath/reconciler.py behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from agent.balanced import Balanced
from agent.core.members import Members
from agent.drivers import bridge, flooding, ipvlan, macvlan, overlay, wireguard
from agent.drivers.balancing import Frontend, FrontendKey
from agent.drivers.base import DEFAULT, Bridge, Closed, Forward, Lan, Rows, WireguardDevice
from agent.errors import Invalid
from agent.floodmodel import flood_rate
from agent.lanmodel import MACVLAN, is_bridged, is_on_lan
from agent.localports import LocalPorts
from agent.model import BRIDGE, OVERLAY, Network
from agent.node import NodeState
from agent.notation import parse_address
from agent.published import Published
from agent.views import Change


@dataclass(slots=True)
class Touched:
    """What to look at again."""

    bridges: set[int] = field(default_factory=set)
    macs: dict[int, list[bytes]] = field(default_factory=dict)
    addresses: dict[int, list[bytes]] = field(default_factory=dict)
    forwards: bool = False
    everything: bool = False
    wireguard: bool = False
    services: set[FrontendKey] = field(default_factory=set)


class Plan:
    """DesiredState of one node."""

    def __init__(
        self, node: NodeState, private_keys: Callable[[], Mapping[bytes, bytes]] = dict
    ) -> None:
        """`private_keys` are those of this node for WireGuard, by public key."""
        self.node = node
        self.is_complete = True
        self._private_keys = private_keys
        self._vteps: dict[str, bytes] = {}
        self._inner: dict[str, bytes] = {}  # node -> address inside WireGuard to send to
        self._partners: set[str] | None = None  # nodes in the encrypted networks that are here
        self._owners: dict[bytes, str] = {}  # public key -> node whose it is
        self._devices: tuple[WireguardDevice, ...] = ()
        self._described: dict[str, tuple[str, int]] = {}
        self._closed = Closed()
        self._ports = LocalPorts(node)
        # Network -> as it was asked for last, and from which of its subnets apart.
        self._bridges: dict[str, tuple[Network, frozenset[str], Bridge]] = {}
        self._is_narrow = node.has_narrow_paths()
        self._mtus: dict[str, int] = {}  # of the overlay networks here, while a path is narrow
        self._apart = node.gives_way()
        self._published = Published(node, self._apart)
        self._subnets = self._find_subnets()
        self.balanced = Balanced(node, self._subnets)
        self.nodes_changed()
        self._touch_wireguard(Change(nodes=set(node.nodes)), Touched())
        self._floods = flooding.Floods()
        for network in node.present_networks():
            self._floods.changed(network, self._members(network), self._way(network))
        networks = {network.id: None for network in node.catalogue.all()}
        self._touch_services(Change(networks=dict(networks)), Touched())

    def nodes_changed(self) -> bool:
        """Take in the nodes; True if what rows, bridges or rules rest on changed."""
        nodes = self.node.nodes
        described = {n.id: (n.vtep, n.mtu) for n in nodes.values()}
        closed = overlay.closed(nodes[self.node.me], nodes.values(), self._subnets)
        if (described, closed) == (self._described, self._closed):
            return False
        self._closed = closed
        self._described = described
        self._reach()
        return True

    def _find_subnets(self) -> tuple[str, ...]:
        """The subnets that lead to networks here. Not all that are known: by one that has the
        underlay's addresses in it a member could open every agent to the sandboxes of others."""
        apart = self.node.gives_way()
        return tuple(
            subnet
            for network in self.node.local_networks()
            for subnet in network.subnets
            if not is_on_lan(network)  # those lead out
            and subnet not in apart.get(network.id, ())
        )

    def _reach(self) -> None:
        """Where rows may lead: to every other node that does not count as gone."""
        self._vteps = {
            id: parse_address(vtep)
            for id, (vtep, _) in self._described.items()
            if id != self.node.me and id not in self.node.withdrawn
        }

    def touched(self, change: Change) -> Touched:
        """What a change of the node may have changed in the kernel."""
        touched = Touched()
        for id in self._ports.changed(change) | change.networks.keys():
            self._bridges.pop(id, None)
        if change.nodes:
            self._bridges.clear()
        subnets, self._subnets = self._subnets, self._find_subnets()
        if (change.nodes or subnets != self._subnets) and self.nodes_changed():
            touched.everything = True
        for id, old in change.networks.items():
            for changed in (old, self.node.catalogue.get(id)):
                if changed:
                    touched.bridges.add(changed.vni)
        self._touch_statuses(change, touched)
        self._touch_wireguard(change, touched)
        me = self.node.me
        last = ""  # a change of many is of one network
        floods: set[str] = set()  # networks (ids) whose members are others now
        network: Network | None = None
        members: Members | None = None
        macs: list[bytes] = []
        addresses: list[bytes] = []
        for each in change.endpoints:
            new = each.new
            if each.network != last:
                last, network = each.network, self.node.catalogue.get(each.network)
                members = self.node.members.get(last)
                if network:
                    macs = touched.macs.setdefault(network.vni, [])
                    addresses = touched.addresses.setdefault(network.vni, [])
                    if flood_rate(network):
                        floods.add(last)
            if network is None:
                continue
            for member in (each.old, new):
                if member is None:
                    continue
                if member.node == me:
                    touched.bridges.add(network.vni)
                    alone = members is None or (member is new and not members.is_contested)
                    if alone or not (members and members.contested(member.endpoint)):
                        continue  # there is no row for what lives here, and was none
                macs.append(member.endpoint.mac)
                addresses.extend(member.endpoint.addresses)
        for id in change.sandboxes:
            sandbox = self.node.sandboxes.get(id)
            for endpoint in sandbox.endpoints if sandbox else ():
                held = self.node.catalogue.get(self.node.network_of(endpoint))
                if held:
                    touched.bridges.add(held.vni)
        self._touch_floods(change, floods, touched)
        self._look_who_gives_way(touched)
        touched.forwards = self._published.changed(change, self._apart, touched.forwards)
        self._touch_services(change, touched)
        self._touch_narrowed(change, touched)
        return touched

    def _touch_floods(self, change: Change, looked_at: Collection[str], touched: Touched) -> None:
        """The default rows of networks in which other hosts have members now, or are reached by
        other ways. Endpoints of those in `looked_at` are others, of no further one that floods."""
        for gone in [id for id in change.networks if self.node.catalogue.get(id) is None]:
            self._floods.forget(gone)
        nodes: dict[str, set[str] | None] = {id: set() for id in looked_at}
        for each in change.endpoints if nodes else ():
            moved = nodes.get(each.network)
            if moved is not None:
                moved.update(member.node for member in (each.old, each.new) if member)
        if change.nodes or change.statuses:
            nodes |= dict.fromkeys(network.id for network in self.node.present_networks())
        for id, moved in nodes.items():
            network = self.node.catalogue.get(id)
            if network and self._floods.changed(
                network, self._members(network), self._way(network), moved
            ):
                touched.macs.setdefault(network.vni, []).append(DEFAULT)

    def _touch_narrowed(self, change: Change, touched: Touched) -> None:
        """The networks whose MTU is another one because a path is found narrow or wide again, or
        because other nodes have members of them now."""
        was_narrow = self._is_narrow
        if change.nodes:
            self._is_narrow = self.node.has_narrow_paths()
        if not (was_narrow or self._is_narrow):
            return
        looked_at = {each.network for each in change.endpoints}
        looked_at.update(s.network for s in map(self.node.services.get, change.services) if s)
        looked_at.update(s.network for s in change.services.values() if s)
        everything = bool(change.nodes) or not self._mtus
        nodes = self.node.nodes.values()
        for network in self.node.present_networks():
            if network.driver != OVERLAY or not (everything or network.id in looked_at):
                continue
            mtu = overlay.mtu(network, nodes, self.node.partakers(network.id))
            if self._mtus.get(network.id) != mtu:
                self._mtus[network.id] = mtu
                self._bridges.pop(network.id, None)
                touched.bridges.add(network.vni)
        if not self._is_narrow:
            self._mtus = {}

    def _touch_services(self, change: Change, touched: Touched) -> None:
        """The frontends of services that lead elsewhere, or whose network is on this host now."""
        moved = self.balanced.moved(change)
        for network in filter(None, map(self.node.catalogue.get, moved)):
            touched.bridges.add(network.vni)
        touched.services |= self.balanced.changed(change, moved, self._subnets)

    def _touch_statuses(self, change: Change, touched: Touched) -> None:
        """The rows of nodes that were withdrawn, or are there again."""
        flipped = [
            id
            for id, before in change.statuses.items()
            if (before is not None and before.withdrawn) != (id in self.node.withdrawn)
        ]
        if flipped:
            self._reach()
        for id in flipped:
            self._touch_rows_of(id, touched)
            for network in self.node.local_networks() if self.balanced.all() else ():
                if self.balanced.vips(network.vni) is not None:
                    mac = overlay.router_mac(network.id, id)
                    touched.macs.setdefault(network.vni, []).append(mac)

    def _touch_wireguard(self, change: Change, touched: Touched) -> None:
        """Keys of others that changed, and whom there is something encrypted to talk about with."""
        for id in change.nodes | change.statuses.keys():
            node = self.node.nodes.get(id)
            there = node and id != self.node.me and id not in self.node.withdrawn
            found = wireguard.inner_address(node) if node and there else b""
            if found != self._inner.get(id, b""):
                self._touch_rows_of(id, touched, encrypted=True)
                self._inner.pop(id, None)
                if found:
                    self._inner[id] = found
        if change.nodes:
            nodes = self.node.nodes
            self._owners = wireguard.find_owners(nodes[self.node.me], nodes.values(), self._owners)
        partners = self._find_partners()
        if partners != self._partners or (change.nodes and partners is not None):
            self._partners = partners
            devices = self._find_devices()
            touched.wireguard |= devices != self._devices
            self._devices = devices

    def _find_partners(self) -> set[str] | None:
        """The nodes that have endpoints in the encrypted networks here; None: no such network."""
        here = [n for n in self.node.present_networks() if n.encrypted]
        if not here:
            return None
        counts = [self._members(n).count for n in here]
        found = {id for count in counts for id, endpoints in count.items() if endpoints}
        for network in here:
            for service in self.node.services.of(network.id):
                if service.published:
                    found.update(service.publish_on or self.node.nodes)
        return found - self.node.withdrawn

    def _find_devices(self) -> tuple[WireguardDevice, ...]:
        if self._partners is None:
            return ()
        me, nodes = self.node.nodes[self.node.me], self.node.nodes.values()
        return wireguard.devices(me, self._private_keys(), nodes, self._partners, self._owners)

    def _touch_rows_of(self, id: str, touched: Touched, encrypted: bool = False) -> None:
        """The rows of a node's endpoints, or of those in encrypted networks only."""
        for network_id, member in self.node.endpoints_of(id):
            network = self.node.catalogue.get(network_id)
            if network and (network.encrypted or not encrypted):
                touched.macs.setdefault(network.vni, []).append(member.endpoint.mac)
                addresses = touched.addresses.setdefault(network.vni, [])
                addresses.extend(member.endpoint.addresses)

    def _look_who_gives_way(self, touched: Touched) -> None:
        """A network that comes or goes may take addresses from another one here, or give back."""
        apart = self.node.gives_way()
        for id in apart.keys() | self._apart.keys():
            network = self.node.catalogue.get(id)
            if network and apart.get(id) != self._apart.get(id):
                touched.bridges.add(network.vni)
                touched.forwards = True
        self._apart = apart

    # -- DesiredState --

    def bridges(self) -> Mapping[int, Bridge]:
        """All bridges that should exist: of the overlay networks with an endpoint here, and those
        with a service that is published here."""
        present = self.node.present_networks()
        return {n.vni: self._bridge(n) for n in present if is_bridged(n)}

    def bridge(self, vni: int) -> Bridge | None:
        """The bridge of a VNI, if it should exist."""
        network = self._network(vni)
        return self._bridge(network) if network else None

    def lans(self) -> Mapping[int, Lan]:
        """The networks with an endpoint here that are on a wire of this host."""
        networks = (n for n in self.node.local_networks() if is_on_lan(n))
        return {lan.vni: lan for lan in map(self._lan, networks) if lan}

    def lan(self, vni: int) -> Lan | None:
        """One of them."""
        for network in self.node.local_networks():
            if network.vni == vni and is_on_lan(network):
                return self._lan(network)
        return None

    def rows(self, vni: int, macs: Collection[bytes], addresses: Collection[bytes]) -> Rows:
        """The desired rows of these keys."""
        network = self._network(vni)
        if network is None:
            return Rows([(mac, None) for mac in macs], [(a, None) for a in addresses])
        if not flood_rate(network):
            return self._find_rows(network, macs, addresses)
        plain = [mac for mac in macs if mac != DEFAULT]
        defaults = self._defaults(network) if len(plain) < len(macs) else None
        found = self._find_rows(network, plain, addresses)
        return replace(found, floods=True, defaults=defaults)

    def _find_rows(
        self, network: Network, macs: Collection[bytes], addresses: Collection[bytes]
    ) -> Rows:
        found = overlay.rows(self._members(network), self._way(network), macs, addresses)
        gateways = _gateways(network)
        routers, vips = self._balanced_rows(network)
        if not routers and not vips and gateways.isdisjoint(addresses):
            return found
        return Rows(
            [(mac, vtep or routers.get(mac)) for mac, vtep in found.fdb],
            [(a, None if a in gateways else m or vips.get(a)) for a, m in found.neighbours],
        )

    def all_rows(self, vni: int) -> Rows:
        """Every desired row of a network."""
        network = self._network(vni)
        if network is None:
            return Rows([], [])
        found = overlay.all_rows(self._members(network), self._way(network))
        gateways = _gateways(network)
        routers, vips = self._balanced_rows(network)
        neighbours = {**vips, **dict(found.neighbours)}
        return Rows(
            [*found.fdb, *routers.items()],
            [row for row in neighbours.items() if row[0] not in gateways],
            floods=(floods := flood_rate(network) > 0),
            defaults=self._defaults(network) if floods else None,
        )

    def _balanced_rows(self, network: Network) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """Rows of a network's services: where the routers of the other hosts are, from which
        balanced packets come; and the VIPs, for which our own router answers."""
        vips = self.balanced.vips(network.vni)
        if vips is None:
            return {}, {}
        mac = overlay.router_mac(network.id, self.node.me)
        routers = overlay.routers(network.id, self._way(network))
        return routers, dict.fromkeys(vips, mac)

    def _defaults(self, network: Network) -> frozenset[bytes]:
        members, way = self._members(network), self._way(network)
        return flooding.defaults(members, way, network.subnets)

    def _way(self, network: Network) -> dict[str, bytes]:
        """Where the rows of a network lead, by node: never outside WireGuard if it is encrypted,
        and nowhere if it is this node's own."""
        if network.driver == BRIDGE:
            return {}
        return self._inner if network.encrypted else self._vteps

    def wireguard(self) -> tuple[WireguardDevice, ...]:
        """The WireGuard devices that should exist."""
        return self._devices

    def devices_by_key(self) -> Mapping[bytes, str]:
        """Our public keys and the WireGuard devices they are on."""
        public = {private: public for public, private in self._private_keys().items()}
        return {public[d.private_key]: d.device for d in self._devices if d.private_key in public}

    def disputed_keys(self) -> set[tuple[str, str]]:
        """Nodes that state a WireGuard key of another one as their own, and that one (ids)."""
        return {
            (node.id, owner)
            for node in self.node.nodes.values()
            for key in node.wireguard
            if (owner := self._owners.get(key.public, node.id)) != node.id
        }

    def partners(self) -> set[str]:
        """The nodes that share an encrypted network with this one."""
        return self._partners or set()

    def complete(self) -> bool:
        """Whether all that peers wrote while this agent was away has come."""
        return self.is_complete

    def forwards(self) -> tuple[Forward, ...]:
        """The published ports of this node's sandboxes."""
        return self._published.all()

    def closed(self) -> Closed:
        """The ports of all known agents."""
        return self._closed

    def frontends(self) -> Mapping[FrontendKey, Frontend]:
        """The services that this host balances."""
        return self.balanced.all()

    def frontend(self, key: FrontendKey) -> Frontend | None:
        """One of them."""
        return self.balanced.all().get(key)

    def mark(self) -> object:
        """Origin -> version taken in so far; NodeState.kernel_has takes it back."""
        return self.node.versions()

    def _members(self, network: Network) -> Members:
        return self.node.members.get(network.id) or Members(self.node.me)

    def _network(self, vni: int) -> Network | None:
        for network in self.node.present_networks():
            if network.vni == vni and is_bridged(network):
                return network
        return None

    def _lan(self, network: Network) -> Lan | None:
        endpoints = self._ports.endpoints(network.id)
        endpoints += filter(None, [self.node.host_side(network.id)])
        make = macvlan.lan if network.driver == MACVLAN else ipvlan.lan
        try:
            return make(network, endpoints, self.node.sandboxes)
        except Invalid:  # another node's doing: ours were checked
            return None

    def _bridge(self, network: Network) -> Bridge:
        node = self.node
        apart = self._apart.get(network.id, frozenset())
        made_for, without, made = self._bridges.get(network.id, (None, None, None))
        if made and made_for is network and without == apart:
            return made
        me, ports = node.nodes[node.me], self._ports.ports(network)
        if network.driver == BRIDGE:
            made = bridge.bridge(network, me, ports, apart)
        else:
            members = node.partakers(network.id) if self._is_narrow else ()
            made = overlay.bridge(network, me, node.nodes.values(), ports, apart, members)
        self._bridges[network.id] = network, apart, made
        return made


def _gateways(network: Network) -> frozenset[bytes]:
    """The addresses that every host answers for itself: whoever else claims one, there is no row
    for it, or that one would be given all that workloads send outside."""
    return frozenset(parse_address(gateway) for gateway in network.gateways)
