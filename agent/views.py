"""What follows from all records that this node has: nodes, networks, endpoints, addresses.

Records go in as `apply` gets them, from peers or from disk, in any order between origins
(an endpoint can come before its network); the views are the same whichever came first.
What stands opposite: lookups.py, which finds things in them; node/, which writes this node's own
records.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import structlog

from agent.core import bounds
from agent.core.addresses import Addresses
from agent.core.catalogue import NETWORKS_MAX, Catalogue, is_closed_as
from agent.core.members import EndpointChange, Member, Members
from agent.core.replica import Change as Update
from agent.core.replica import Record
from agent.core.servicebounds import check_health, check_service
from agent.core.servicecatalogue import SERVICES_MAX, ServiceCatalogue
from agent.core.services import Selection
from agent.errors import Invalid, VxmeshError
from agent.model import (
    Claims,
    Endpoint,
    Network,
    Node,
    Notice,
    Removal,
    Sandbox,
    TokenState,
    Trust,
    check_endpoint,
    check_sound,
)
from agent.servicemodel import Health, Service

NODE, NETWORK, ENDPOINT, CLAIMS = "n/", "w/", "e/", "r/"
REMOVAL = "x/"
TRUST, TOKEN = "a/", "t/"  # followed by model.ONLY
SERVICE, HEALTH = "s/", "h/"  # followed by the ids of a service and of an endpoint

_endpoint = msgspec.msgpack.Decoder(Endpoint)
_network = msgspec.msgpack.Decoder(Network)
_claims = msgspec.msgpack.Decoder(Claims)
_node = msgspec.msgpack.Decoder(Node)
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    ENDPOINT: _endpoint,
    NETWORK: _network,
    CLAIMS: _claims,
    NODE: _node,
    REMOVAL: msgspec.msgpack.Decoder(Removal),
    TRUST: msgspec.msgpack.Decoder(Trust),
    TOKEN: msgspec.msgpack.Decoder(TokenState),
    SERVICE: msgspec.msgpack.Decoder(Service),
    HEALTH: msgspec.msgpack.Decoder(Health),
}
# Removals that are heeded; they are kept for good. A cluster that had so many nodes lost would
# have had another one each day for a quarter of a century.
REMOVALS_MAX = 10_000
MANY = 64  # endpoints at once from which on it pays to look at them together
SLICE = 1000  # looked at together; one that is not plain costs the others of its slice time
log = structlog.get_logger()


class Status(NamedTuple):
    """What this node believes of another one, and why.

    `state` is alive, suspect, unreachable or left. `withdrawn`: its endpoints count as gone,
    their rows and names are taken back until it returns.
    """

    state: str
    reason: str
    since: float  # seconds since the epoch
    withdrawn: bool = False
    incarnation: int = 0


@dataclass(slots=True)
class Change:
    """What one method call changed."""

    own: list[Record] = field(default_factory=list)  # to be stored, then published
    nodes: set[str] = field(default_factory=set)
    networks: dict[str, Network | None] = field(default_factory=dict)  # id -> as it was before
    endpoints: list[EndpointChange] = field(default_factory=list)
    sandboxes: set[str] = field(default_factory=set)
    floor: int = 0  # our own tombstones up to here were dropped
    statuses: dict[str, Status | None] = field(default_factory=dict)  # node -> as it was before
    notices: list[Notice] = field(default_factory=list)
    rewritten: bool = False  # our own records got new versions: store all of them
    trust: bool = False  # somebody states anew whom to trust, or which join token holds
    services: dict[str, Service | None] = field(default_factory=dict)  # id -> as it was before
    health: set[str] = field(default_factory=set)  # endpoints of which something else is said
    # Services (ids) that may lead elsewhere now: they, a backend, its health or node changed.
    led: set[str] = field(default_factory=set)
    _inhabited: tuple[int, list[Endpoint]] = field(
        default=(0, []), repr=False
    )  # of so many of `endpoints`

    def inhabited(self, me: str) -> list[Endpoint]:
        """Of `endpoints`, as they were and as they are: those that sandboxes of node `me` have.

        Looked for once, whoever asks: a bulk has 100,000, and none of them.
        """
        looked_at, found = self._inhabited
        if looked_at != len(self.endpoints):
            found = [
                member.endpoint
                for each in self.endpoints
                for member in (each.old, each.new)
                if member and member.endpoint.sandbox and member.node == me
            ]
            self._inhabited = len(self.endpoints), found
        return found


class Views:
    """The views of one node. `me` is its id."""

    def __init__(self, me: Node) -> None:
        self.me = me.id
        self.catalogue = Catalogue()
        self.nodes: dict[str, Node] = {me.id: me}
        self.members: dict[str, Members] = {}
        self.addresses: dict[str, Addresses] = {}
        self.sandboxes: dict[str, Sandbox] = {}
        self.status: dict[str, Status] = {}  # of other nodes; none: not decided yet
        self.withdrawn: set[str] = set()  # nodes whose endpoints count as gone
        self.removals: dict[str, Removal] = {}  # nodes that are not heard any more, for good
        self.expelled: Removal | None = None  # this node is one of them
        self.inherited: set[str] = set()  # the removed nodes whose heir this node is
        # Origin -> what it states. Whether to believe it is cluster/identity's to say.
        self.trusts: dict[str, Trust] = {}
        self.tokens: dict[str, TokenState] = {}
        self._closed: set[str] = set()  # networks that are known to be removed
        self._unheeded: list[Removal] = []  # removals that `apply` met and nobody has acted on
        # Network -> removed node -> its record of it, which was the newest here: it counts until
        # the heir's copy has come.
        self._orphans: dict[str, dict[str, Network]] = {}
        self._service_orphans: dict[str, dict[str, Service]] = {}  # the same of services
        self.services = ServiceCatalogue()
        self.selection = Selection()
        self._ingress: dict[str, set[str]] = {}  # network -> its services published on this node
        self._health: dict[tuple[str, str], Health] = {}  # endpoint, origin -> what that one says
        self._claims: dict[str, dict[str, Claims]] = {}  # network -> origin -> claims
        self._network_of: dict[str, str] = {}  # endpoint id -> network id

    def apply(self, updates: list[Update], change: Change) -> set[str]:
        """Take changed records; the networks whose ownership of addresses may have moved."""
        self.catalogue.hold()
        self.services.hold()
        try:
            touched = self._apply(updates, change)
        finally:
            self._note_networks(self.catalogue.release(), change)
            self._note_services(self.services.release(), change)
        return touched | set(change.networks)

    def _apply(self, updates: list[Update], change: Change) -> set[str]:
        touched: set[str] = set()
        for are_endpoints, run in _runs(updates):
            for start in range(0, len(run), SLICE):
                part = run[start : start + SLICE]
                if not (are_endpoints and len(part) >= MANY and self._take_many(part, change)):
                    touched |= self._apply_each(part, change)
        return touched

    def _apply_each(self, updates: list[Update], change: Change) -> set[str]:
        touched: set[str] = set()
        decode, take = _endpoint.decode, self._take_endpoint
        found: Any
        for update in updates:
            origin, key, value = update.origin, update.key, update.value
            kind = key[:2]
            try:
                if kind == ENDPOINT and value:
                    found = decode(value)
                    check_endpoint(found, key[2:])
                    if origin != self.me:
                        bounds.check_endpoint(found)
                        self._check_endpoint(origin, found)
                else:
                    found = _decoders[kind].decode(value) if value and kind in _decoders else None
                    if isinstance(found, Service):
                        check_service(found, key[2:])
                        if origin != self.me:
                            self._check_room(origin, found)
                    elif isinstance(found, Health):
                        check_health(found, key[2:])
                    elif found is not None:
                        check_sound(found, key[2:])
                        if origin != self.me:
                            bounds.check_bounds(found)
                            self._check_room(origin, found)
            except (msgspec.MsgspecError, VxmeshError, ValueError) as error:
                # Of a newer agent, a broken or a hostile one. What it had before stands.
                log.warning("record.unusable", peer=origin, key=key[:60], error=str(error)[:200])
                continue
            if kind == ENDPOINT:
                if value:
                    take(origin, found, change)
                else:
                    self._drop_endpoint(key[2:], change, origin)
            elif kind == NETWORK:
                if isinstance(found, Network):
                    self._take_network(origin, found, change)
                else:
                    self._drop_network(origin, key[2:], change)
                    touched.add(key[2:])
            elif kind == SERVICE:
                if isinstance(found, Service):
                    self._take_service(origin, found, change)
                else:
                    self._drop_service(origin, key[2:], change)
            elif kind == HEALTH:
                self._take_health(origin, key[2:], found, change)
            elif kind == CLAIMS:
                self._take_claims(origin, key[2:], found if isinstance(found, Claims) else None)
                touched.add(key[2:])
            elif kind == NODE and key[2:] == origin:
                if isinstance(found, Node):
                    self.nodes[origin] = found
                elif origin != self.me:
                    self.nodes.pop(origin, None)
                change.nodes.add(origin)
            elif kind == REMOVAL and isinstance(found, Removal):
                if origin == self.me:
                    self.inherited.add(found.node)
                self._unheeded.append(found)
            elif kind in (TRUST, TOKEN):
                stated: dict[str, Any] = self.trusts if kind == TRUST else self.tokens
                if found is None:
                    stated.pop(origin, None)
                else:
                    stated[origin] = found
                change.trust = True
        return touched

    def _take_many(self, updates: Sequence[Update], change: Change) -> bool:
        """Take endpoints of one node if they are new, plain and of one network; False, with
        nothing changed, if they have to be looked at one by one."""
        try:
            endpoints = [_endpoint.decode(update.value) for update in updates]
        except (msgspec.MsgspecError, ValueError):
            return False
        ids = [update.key[2:] for update in updates]
        if not bounds.are_plain(endpoints, ids) or not self._network_of.keys().isdisjoint(ids):
            return False
        fresh = self._take_fresh(endpoints, updates[0].origin)
        if fresh is None:
            return False
        network = endpoints[0].network
        change.endpoints.extend([EndpointChange(network, None, member) for member in fresh])
        return True

    def _take_fresh(self, endpoints: Sequence[Endpoint], node: str) -> list[Member] | None:
        """Add endpoints of one network of which nothing is known; see Members.put_fresh."""
        network = endpoints[0].network
        fresh = self._members(network).put_fresh(endpoints, node)
        if fresh is None:
            return None
        self._network_of.update(dict.fromkeys([endpoint.id for endpoint in endpoints], network))
        addresses = self.addresses.get(network)
        if addresses:
            addresses.space.take_all([a for endpoint in endpoints for a in endpoint.addresses])
        return fresh

    def _check_endpoint(self, origin: str, value: Endpoint) -> None:
        """Invalid if another node's record would take what is not its to take."""
        network = self._network_of.get(value.id)
        if network is not None and self.members[network].all[value.id].node != origin:
            # Ids are 64 random bits: this one was copied, to take the endpoint from its node.
            raise Invalid("endpoint", f"{value.id} is another node's")
        members = self.members.get(value.network)
        if members is not None:
            members.check_claims(value)

    def _check_room(self, origin: str, value: object) -> None:
        """Invalid if there is no room for another node's record."""
        if isinstance(value, Network):
            if not self.catalogue.has_room(origin, value):
                raise Invalid("network", f"is one too many of {origin}: {NETWORKS_MAX} are let be")
            self.catalogue.check_overlaps(value)
        elif isinstance(value, Service):
            if not self.services.has_room(origin, value):
                raise Invalid("service", f"is one too many of {origin}: {SERVICES_MAX} are let be")
        elif isinstance(value, Removal):
            kept = len(self.removals) + len(self._unheeded)
            # Whoever is here can be removed, however many others were who never were.
            is_needed = value.node in self.removals or value.node in self.nodes
            if not is_needed and kept >= REMOVALS_MAX:
                raise Invalid("removal", f"is one too many: {REMOVALS_MAX} are kept")

    def _take_network(self, origin: str, network: Network, change: Change) -> None:
        id = network.id
        self._note_networks(self.catalogue.put(origin, network), change)
        orphans = self._orphans.get(id, {})
        for lost, last in list(orphans.items()):
            # A deletion is final, whatever else was written, and what was closed is not opened.
            is_later = network.stamp >= last.stamp and is_closed_as(last, [network])
            if network.deleted or (not last.deleted and is_later):
                self._note_networks(self.catalogue.drop(lost, id), change)
                del orphans[lost]

    def _drop_network(self, origin: str, id: str, change: Change) -> None:
        self._note_networks(self.catalogue.drop(origin, id), change)
        if origin not in self.removals:
            # Only a creator takes its record back, and then the network is gone for all.
            for lost in self._orphans.pop(id, {}):
                self._note_networks(self.catalogue.drop(lost, id), change)
        self._note_closed(id)

    def _note_closed(self, id: str) -> None:
        """A network may be known to be removed: what we stated of its addresses may go then."""
        if not self.catalogue.get(id) and self.me in self._claims.get(id, ()):
            self._closed.add(id)

    def _note_networks(self, before: dict[str, Network | None], change: Change) -> None:
        for id, old in before.items():
            network = self.catalogue.get(id)
            change.networks.setdefault(id, old)
            if network is None:
                self._note_closed(id)
                self.addresses.pop(id, None)
                if id in self.members and not self.members[id].all:
                    del self.members[id]
            elif id not in self.addresses:
                addresses = self.addresses[id] = Addresses(network, self.me)
                for origin, claims in self._claims.get(id, {}).items():
                    addresses.ring.merge(origin, claims)
                for member in self._members(id).all.values():
                    for address in member.endpoint.addresses:
                        addresses.space.take(address)
                for service in self.services.of(id):
                    for address in service.vips:
                        addresses.space.take(address)

    # -- services --

    def _take_service(self, origin: str, service: Service, change: Change) -> None:
        id = service.id
        self._note_services(self.services.put(origin, service), change)
        orphans = self._service_orphans.get(id, {})
        for lost, last in list(orphans.items()):
            if service.deleted or (not last.deleted and service.stamp >= last.stamp):
                self._note_services(self.services.drop(lost, id), change)
                del orphans[lost]

    def _drop_service(self, origin: str, id: str, change: Change) -> None:
        self._note_services(self.services.drop(origin, id), change)
        if origin not in self.removals:
            for lost in self._service_orphans.pop(id, {}):
                self._note_services(self.services.drop(lost, id), change)

    def _note_services(self, before: dict[str, Service | None], change: Change) -> None:
        for id, old in before.items():
            change.services.setdefault(id, old)
            new = self.services.get(id)
            for service, is_new in ((old, False), (new, True)):
                addresses = self.addresses.get(service.network) if service else None
                for vip in service.vips if service and addresses else ():
                    assert addresses is not None
                    (addresses.space.take if is_new else addresses.space.release)(vip)

    def _take_health(
        self, origin: str, endpoint: str, health: Health | None, change: Change
    ) -> None:
        if health is None:
            self._health.pop((endpoint, origin), None)
        else:
            self._health[endpoint, origin] = health
        change.health.add(endpoint)

    def _note_ingress(self, id: str, old: Service | None, new: Service | None) -> None:
        if old and id in (published := self._ingress.get(old.network, set())):
            published.remove(id)
            if not published:
                del self._ingress[old.network]
        if new and new.published and (not new.publish_on or self.me in new.publish_on):
            self._ingress.setdefault(new.network, set()).add(id)

    def _select(self, change: Change) -> None:
        """Find out which services may lead elsewhere by a change. Once, at its end: an endpoint
        and the service that chooses it may be a part of it both."""
        change.led |= self.selection.moved(change.endpoints)
        for id in change.services:
            service = self.services.get(id)
            if service:
                self.selection.put(service, self.members.get(service.network))
            else:
                self.selection.drop(id)
            self._note_ingress(id, change.services[id], service)
            change.led.add(id)
        for endpoint in change.health:
            change.led |= self.selection.services_of(endpoint)
        for id in change.networks:
            change.led.update(service.id for service in self.services.of(id))

    def _take_claims(self, origin: str, network: str, claims: Claims | None) -> None:
        addresses = self.addresses.get(network)
        if claims is None:
            stated = self._claims.get(network, {})
            stated.pop(origin, None)
            if not stated:
                self._claims.pop(network, None)
            if addresses:
                addresses.ring.forget(origin)
        else:
            self._claims.setdefault(network, {})[origin] = claims
            if addresses:
                addresses.ring.merge(origin, claims)

    def _take_endpoint(self, origin: str, endpoint: Endpoint, change: Change) -> None:
        network = endpoint.network
        if self._network_of.get(endpoint.id, network) != network:
            self._drop_endpoint(endpoint.id, change)  # it was in another network before
        members = self.members.get(network) or self._members(network)
        old = members.put(endpoint, origin)
        self._network_of[endpoint.id] = network
        if old:
            self._release(old.endpoint)
        addresses = self.addresses.get(network)
        if addresses:
            for address in endpoint.addresses:
                addresses.space.take(address)
        change.endpoints.append(EndpointChange(network, old, Member(endpoint, origin)))

    def _drop_endpoint(self, id: str, change: Change, origin: str = "") -> None:
        """An endpoint is gone. With an `origin`, only if it was that one's."""
        network = self._network_of.get(id)
        if network is None:
            return
        if origin and self.members[network].all[id].node != origin:
            return
        del self._network_of[id]
        old = self.members[network].drop(id)
        if old:
            self._release(old.endpoint)
            change.endpoints.append(EndpointChange(network, old, None))
        if not self.members[network].all and not self.catalogue.get(network):
            del self.members[network]

    def _members(self, network: str) -> Members:
        found = self.members.get(network)
        if found is None:
            found = self.members[network] = Members(self.me, self.withdrawn)
        return found

    def _release(self, endpoint: Endpoint) -> None:
        addresses = self.addresses.get(endpoint.network)
        if addresses:
            for address in endpoint.addresses:
                addresses.space.release(address)


def _runs(updates: list[Update]) -> Iterator[tuple[bool, list[Update]]]:
    """The updates in turn, those together that can be looked at together: endpoints of one node
    that live, of which it says True. A bulk has nothing else, and is told by a glance."""
    if len(updates) >= MANY and len({update.origin for update in updates}) == 1:
        kinds = {update.key[:2] for update in updates}
        if kinds == {ENDPOINT} and b"" not in [update.value for update in updates]:
            yield True, updates
            return
    for (_, are_endpoints), group in itertools.groupby(updates, _kind_of_run):
        yield are_endpoints, list(group)


def _kind_of_run(update: Update) -> tuple[str, bool]:
    """The same for updates that can be looked at together: endpoints of one node that live."""
    return update.origin, bool(update.value) and update.key[:2] == ENDPOINT
